"""`RankPipeline`: the steps of an optimizer that several processes make together."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt.kernels.contract import Adder
from fastopt.signals import deferred_signals
from fastopt.step.inputs import Inputs
from fastopt.step.norms import Pending
from fastopt.step.options import REDUCTION, StepOptions
from fastopt.step.pipeline import Pipeline
from fastopt.step.ranks import Ranks, Same, Votes, in_order
from fastopt.storage.intake import Taken

if TYPE_CHECKING:
    from fastopt.rule import Rule
    from fastopt.step.info import StepInfo
    from fastopt.storage.flat import FlatParams


class Offer(NamedTuple):
    """What a rank brings to a step."""

    present: np.ndarray
    """For each parameter whether it has a gradient."""
    weight: float
    """The weight of its gradients in the mean."""
    taken: Taken | None = None
    """The gradients; None for those that were accumulated."""
    loss: float = 0.0
    """The loss times the weight."""
    same: Same = ()
    """What must be the same on every rank."""


class RankPipeline(Pipeline):
    """A pipeline whose gradients are the mean over the ranks.

    A step adds up the gradients of all ranks, as one process adds up those of as many micro-batches by `accumulate`.
    It then goes on as that process does: all ranks compute what it would.
    """

    def __init__(
        self,
        rule: Rule,
        flat: FlatParams,
        options: StepOptions,
        base: Mapping[str, Any],
        changes: Sequence[Mapping[str, Any]],
        ranks: Ranks,
    ):
        self.ranks = ranks
        super().__init__(rule, flat, options, base, changes)

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether this rank writes files: the first one."""
        return self.ranks.rank == 0

    def together(self, call: str) -> Any:
        """A block that raises on every rank where it raises on one."""
        return self.ranks.together(call)

    @property
    def identity(self) -> Same:
        """What ranks must have in common to begin."""
        flat, groups = self.flat, self.groups
        tree = repr((flat.paths, flat.shapes, flat.dtype.name, flat.members))
        options = repr((self.rule.name, self.options, self.ranks.order, self.ranks.size, sorted(groups.base)))
        return (
            ("the tree of parameters", tree.encode()),
            ("rule and options", options.encode()),
            ("the values of the parameters", self._crc_of(flat.arrays)),
        )

    def _crc_of(self, arrays: Iterable[Any]) -> bytes:
        """A check sum of arrays of the backend; of None as well."""
        crc = 0
        for array in arrays:
            crc = zlib.crc32(b"", crc + 1)
            if array is not None:
                crc = zlib.crc32(np.ascontiguousarray(self.backend.host(array)).reshape(-1).view(np.uint8).data, crc)
        return crc.to_bytes(8, "little")

    def step(
        self,
        grads: Any,
        grad_scale: float,
        reduction: str,
        extra: Any = None,
        loss: Any = None,
        *,
        deferred: bool = False,
        weight: float | None = None,
    ) -> StepInfo:
        """Make a step of the mean over the ranks, each of which calls this: see `Optimizer.step`."""
        own = grads is None and self.pending is None
        offer, error = Offer(np.zeros(len(self.flat.paths), np.bool_), 0.0), None
        try:
            offer = self._offer(grads, grad_scale, reduction, extra, loss, weight)
        except BaseException as raised:
            error = raised
        numbers = (offer.weight, offer.loss)
        votes = self.ranks.vote("step", error, offer.same, numbers, offer.present)
        total = in_order([of_rank[0] for of_rank in votes.numbers])
        if reduction == "mean":
            self.plan.table.unscale(grad_scale, total or 1.0)  # out of range on every rank or on none
        if loss is not None:
            loss = in_order([of_rank[1] for of_rank in votes.numbers]) / (total or 1.0)
        with deferred_signals:
            try:
                with self.ranks.committed():
                    self._exchange(offer, votes, total)
                return super().step(None, grad_scale, reduction, extra, loss, deferred=deferred)
            finally:
                self.pending = None
                if own and self.options.zero_grad:
                    self.flat.zero_grad()

    def step_weighted(
        self, grads: Any, grad_scale: float, reduction: str, extra: Any, loss: Any, weight: float
    ) -> StepInfo:
        """The same, with a weight of this rank's gradients in the mean."""
        return self.step(grads, grad_scale, reduction, extra, loss, weight=weight)

    def update(self, params: Any, grads: Any, grad_scale: float, extra: Any, loss: Any) -> StepInfo:
        """Make a step of other arrays: see `Optimizer.update`."""
        try:
            self.replace(params)
        except BaseException as error:
            self.ranks.vote("step", error)  # which raises it
        return super().update(params, grads, grad_scale, extra, loss)

    def add(self, params: Any, hyper: Mapping[str, Any]) -> None:
        """Add parameters on every rank: see `Optimizer.add`."""
        with self.ranks.together("add"):
            super().add(params, hyper)
        self.ranks.parameters = len(self.flat.paths)

    def set_params(self, params: Any) -> None:
        """Write the same values into the parameters of every rank: see `Optimizer.set_params`."""
        with self.ranks.together("set_params") as same:
            self.refuse_while_held("set_params")
            crc = self._crc_of(self.flat.check_values(params))
            same.append(("the values of the parameters", crc))
        super().set_params(params)

    def step_rows(
        self, rows: Mapping[str, tuple[Any, np.ndarray]], grads: Any = None, grad_scale: float = 1.0
    ) -> StepInfo:
        """Refuse: rows of several ranks are not added up yet."""
        raise RuntimeError("step_rows(): must be of one process, got an optimizer with comm=; use step()")

    def ascended(self, rho: float, grads: Any, context: str) -> Any:
        """Refuse: the way would have to be that of the gradients of all ranks."""
        raise RuntimeError(f"{context}(): must be of one process, got an optimizer with comm=")

    def _offer(
        self, grads: Any, grad_scale: float, reduction: str, extra: Any, loss: Any, weight: float | None
    ) -> Offer:
        """Check what this rank brings; nothing is changed."""
        self.refuse_while_held("step")
        if self.gradients_in:
            self._check_context()
        if self.watched:
            self.check_trees()
        self.flush_rows()
        if self.device is not None:
            self.device.check_place(self.flat.device)
            if self.device.backend.capturing():
                raise RuntimeError(
                    "step(): must not be captured in a CUDA graph with comm=, whose ranks vote on the host"
                )
        REDUCTION.check("reduction", reduction)
        plan, pending, taken = self.current_plan(), self.pending, None
        plan.table.unscale(grad_scale)
        if pending is not None:
            self.refuse_two(grads, weight)
            present, number = pending.present, pending.weight
        else:
            number = 1.0 if weight is None else self.checked_weight(weight)
            taken = self.intake.take_to_add(self.flat.grads if grads is None else grads)
            present = self.present_of(taken, number)
        plan.table.inputs, _ = Inputs.checked(self.rule, self.flat, extra, loss, present.tolist())
        plan.write_table(self.groups, self.steps + 1, 1.0)
        groups = np.array([*self.groups.of, *[group.frozen for group in self.groups.list]], np.int64)
        trees = [(name, tree) for name, tree in sorted((extra or {}).items()) if tree is not None]
        crc = self._crc_of([leaf for name, tree in trees for leaf in self.flat.check_extra(tree, name)])
        given = [name for name, _ in trees]
        same = (
            ("the number of updates", self.steps.to_bytes(8, "little")),
            ("the hyperparameters", plan.table.by_group.tobytes() + groups.tobytes()),
            ("grad_scale, reduction and extra", repr((float(grad_scale), reduction, given, crc)).encode()),
        )
        return Offer(present, number, taken, 0.0 if loss is None else number * float(loss), same)

    def _exchange(self, offer: Offer, votes: Votes, total: float) -> None:
        """Add up the gradients of all ranks, and let them be those that were accumulated."""
        if offer.taken is not None:
            self.add_up(offer.taken, offer.present, offer.weight)
        places, views = self._places_of_sums()
        for k in np.flatnonzero(votes.mask & ~offer.present).tolist():
            views[k].fill(-0.0)  # which leaves every number as it is: 0 would make 0 of a -0
        self.ranks.add_up(self.sums, self.backend)
        pending = self.new_pending()
        pending.present, pending.weight = votes.mask, total
        adder = self.adder
        if adder.measure:
            self._measure_sums(places, pending, adder)
        self.pending = pending

    def _measure_sums(self, places: np.ndarray, pending: Pending, adder: Adder) -> None:
        """Leave the partial sums that adding up the gradients would have left, by the same kernel."""
        places = self.flat.split.places(places[:, 1], places[:, 1])
        present = np.tile(pending.present, self.flat.members or 1)
        once = np.array([1.0, 0.0], self.flat.compute)
        chunks = self.plan.chunks(self.plan.of, whole=True)
        everything = np.ones(len(present), np.bool_)
        self.backend.add(places, present, everything, once, chunks, pending.partials, adder, self.flat.compute)
