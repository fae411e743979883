"""`RankPipeline`: the steps of an optimizer that several processes make together."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt.kernels.contract import Adder, Cut
from fastopt.signals import deferred_signals
from fastopt.step.gate import through_gate
from fastopt.step.inputs import Inputs
from fastopt.step.matrices import Matrices, chosen_by, shape_in
from fastopt.step.norms import Pending
from fastopt.step.options import REDUCTION, StepOptions
from fastopt.step.pipeline import Pipeline
from fastopt.step.plan import MOST_MASKS, Plan
from fastopt.step.ranks import Ranks, Same, Scattered, Votes, in_order
from fastopt.step.rows import check_indices
from fastopt.step.storage import Memory, StateFormats
from fastopt.step.wire import Wire
from fastopt.storage.intake import Taken
from fastopt.storage.layout import LINE, PLACE
from fastopt.storage.trees import flatten

if TYPE_CHECKING:
    from fastopt.rule import Rule
    from fastopt.step.info import StepInfo
    from fastopt.storage.flat import FlatParams


LARGE, MOST_PADDED = 2**20, 1.5
"""Parameters of so many elements whose buffer is so many times as long are worth a warning."""


class Offer(NamedTuple):
    """What a rank brings to a step."""

    present: np.ndarray
    """For each parameter whether it has a gradient."""
    weight: float
    """The weight of its gradients in the mean."""
    taken: Taken | None = None
    """The gradients; None for those that were accumulated."""
    own: bool = False
    """Whether they are those in opt.grads."""
    loss: float = 0.0
    """The loss times the weight."""
    same: Same = ()
    """What must be the same on every rank."""


class RankPlan(Plan):
    """A plan for the part of the parameters that a rank updates."""

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any):
        self._ranks = ranks
        self._cuts: dict[int, tuple[Any, Cut]] = {}
        self._held: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        super().__init__(*args, **kwargs)

    def chunks(self, rows: Sequence[int], *, whole: bool = False, apart: bool = False) -> Any:
        """As `Plan`: those of this rank; with those of all where they are for partial sums."""
        if self._tiled and not whole:
            return super().chunks(self.held(rows))
        chunks = super().chunks(rows, whole=whole, apart=apart)
        found = self._cuts.get(id(chunks))
        if found is None or found[0] is not chunks:  # which are kept, so that their id is not given to others
            if len(self._cuts) >= MOST_MASKS:
                self._cuts.clear()
            layout, ranks = self.flat.layout, self._ranks
            counts = layout.blocks_by_part(chunks)
            cut = Cut(layout.cut(chunks), chunks, lambda lines: ranks.gathered(lines, counts))
            found = self._cuts[id(chunks)] = (chunks, cut)
        return found[1] if whole or self.rule.sums else found[1].own

    def held(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows of the table of the parameters that this rank has whole, and -1 for the others."""
        found = self._held.get(id(rows))
        if found is None or found[0] is not rows:
            if len(self._held) >= MOST_MASKS:
                self._held.clear()
            own = [row if here else -1 for row, here in zip(rows, self.flat.layout.is_held, strict=True)]
            found = self._held[id(rows)] = (rows, own)
        return found[1]


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
        self.sharded = flat.layout.parts > 1
        """Whether each rank updates a part of the parameters, and holds the states of this part alone."""
        self.sums_of_part: Any = None
        """Of the gradients of all ranks, those that this rank updates by; made when they are first needed."""
        self._exchanged = False
        """Whether the gradients of this step have been added up over the ranks."""
        self._wire = None if ranks.wire is None else Wire(ranks.wire, ranks.comm)
        """What sends them in fewer bytes; or None."""
        if self._wire is not None and (flat.device is not None or flat.compute != np.float32):
            found = f"{flat.compute} on {flat.backend!r}"
            raise ValueError(f"wire: must be None unless gradients are added up in float32 on the CPU, got {found}")
        if self.sharded:
            self._check_shards(rule, flat, options)
            self._make_plan = partial(RankPlan, ranks)
        super().__init__(rule, flat, options, base, changes)
        self.size = flat.layout.length

    def __copy__(self) -> RankPipeline:
        """A shallow copy, for a deep one of the same ranks."""
        twin = object.__new__(RankPipeline)
        twin.__dict__.update(self.__dict__, sums_of_part=None, _wire=copy.deepcopy(self._wire))
        return twin

    def _check_shards(self, rule: Rule, flat: FlatParams, options: StepOptions) -> None:
        """Refuse what cannot be cut into parts."""
        formats = StateFormats.of(rule, flat, options)
        for refused, reason in (
            (
                rule.lined and any(sums.over == "all" for sums in rule.sums),
                f"rule {rule.name!r} has sums over lines of parameters and over all of them",
            ),
            (flat.members is not None, "the members of a population would be cut"),
            (flat.device is not None, "the kernels of the CUDA backend do not gather partial sums"),
            (bool(formats.coded), "blocks of codes would be cut"),
            (formats.stochastic, "rounding='stochastic' draws by the place in the buffer of one process"),
        ):
            if refused:
                raise ValueError(f"shard: must be False, because {reason}, got True")

    @property
    def advice(self) -> list[str]:
        """As `Pipeline`; and where parts that cut no matrix are much longer than the parameters."""
        found, layout = super().advice, self.flat.layout
        own = sum(layout.sizes)
        if any(layout.uncut) and own > LARGE and layout.size > MOST_PADDED * own:
            found.append(
                f"shard: {layout.parts} parts that cut no matrix take {layout.size / own:.1f} times the memory of the "
                f"parameters: use fewer processes, or shard=False"
            )
        return found

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether this rank writes files: the first one."""
        return self.ranks.rank == 0

    def refuse_parts(self, what: str) -> None:
        """As `Pipeline`."""
        if self.sharded:
            raise RuntimeError(
                f"{what}: must be read where one process holds all of it, got ranks with a part each; state_dict(), "
                f"which every rank calls, gathers the parts"
            )

    def begin_together(self, call: str) -> None:
        """As `Pipeline`: where parts are gathered."""
        if self.sharded:
            self.ranks.vote(call)

    def together(self, call: str) -> Any:
        """A block that raises on every rank where it raises on one."""
        return self.ranks.together(call)

    @property
    def identity(self) -> Same:
        """What ranks must have in common to begin."""
        flat, groups = self.flat, self.groups
        tree = repr((flat.paths, flat.shapes, flat.dtype.name, flat.members))
        of_ranks = (self.ranks.order, self.ranks.wire, self.ranks.size)
        options = repr((self.rule.name, self.options, *of_ranks, sorted(groups.base)))
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
        Inputs.checked(self.rule, self.flat, extra, loss, votes.mask.tolist())  # the same
        with deferred_signals, self.ranks.committed():
            try:
                self._exchange(offer, votes, total)
                info = super().step(None, grad_scale, reduction, extra, loss, deferred=deferred)
                if info.skipped is False:
                    self.spread()
                return info
            finally:
                self.pending, self._exchanged = None, False
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
        with self.ranks.together("add") as same:
            if self.sharded:
                raise RuntimeError(
                    "add(): must have shard=False, because parts are cut at construction, got shard=True"
                )
            leaves = map(self.backend.adopt, flatten(params)[0])
            same.append(("the values of the parameters", self._crc_of(leaves)))
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

    @through_gate
    def step_rows(
        self, rows: Mapping[str, tuple[Any, np.ndarray]], grads: Any = None, grad_scale: float = 1.0
    ) -> StepInfo:
        """Make a step of the rows of all ranks, one after the other, and the mean of their sums."""
        flat, ranks = self.flat, self.ranks
        offer, error = Offer(np.zeros(len(flat.paths), np.bool_), 1.0), None
        own: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        try:
            if self.sharded or flat.device is not None:
                raise RuntimeError("step_rows(): must have shard=False, and parameters on the CPU, with comm=")
            offer, own = self._offer_of_rows(rows, grads, grad_scale)
        except BaseException as raised:
            error = raised
        votes = ranks.vote("step_rows", error, offer.same, (1.0, 0.0), offer.present)
        counts = ranks.gathered(np.array([[len(own[k][0]) if k in own else -1 for k in range(len(flat.paths))]]))
        for k in np.flatnonzero(votes.mask & (counts >= 0).any(axis=0)).tolist():
            raise ValueError(f"grads: must be None on every rank for {flat.paths[k]!r}, which is in rows as well")
        everything = {}
        for k in np.flatnonzero((counts >= 0).any(axis=0)).tolist():
            of_ranks, width = np.maximum(counts[:, k], 0).tolist(), flat.shapes[k][1]
            indices, row_grads = own.get(k, (np.zeros(0, np.int64), np.zeros((0, width), flat.compute)))
            everything[flat.paths[k]] = (
                ranks.gathered(indices[:, None], of_ranks)[:, 0],
                ranks.gathered(row_grads, of_ranks),
            )
        dense = None
        with deferred_signals:
            if votes.mask.any():
                with ranks.committed():
                    self._exchange(offer, votes, float(ranks.size))
                _, views = self._places_of_sums()
                self.pending, self._exchanged = None, False
                dense = flat.tree([view if here else None for view, here in zip(views, votes.mask, strict=True)])
            return super().step_rows(everything, dense, grad_scale * ranks.size)

    def _offer_of_rows(
        self, rows: Mapping[str, tuple[Any, np.ndarray]], grads: Any, grad_scale: float
    ) -> tuple[Offer, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Check what this rank brings to a step of rows: gradients, and by parameter indices and rows."""
        self.refuse_while_held("step_rows")
        if self.pending is not None:
            raise ValueError("step_rows(): accumulated gradients are waiting; call step(), or zero_grad() to drop them")
        plan, flat = self.current_plan(), self.flat
        plan.table.unscale(grad_scale * self.ranks.size)
        own = {}
        for k in self.rows.check(rows, self.groups.values_of):
            indices, row_grads = rows[flat.paths[k]]
            found = check_indices("indices", indices, flat.shapes[k][0], self.backend)
            own[k] = (found, np.ascontiguousarray(row_grads))
        taken = None if grads is None else self.intake.take_to_add(grads)
        present = np.zeros(len(flat.paths), np.bool_) if taken is None else self.present_of(taken, 1.0)
        same = self._same(plan, repr(float(grad_scale)), self._behind())
        return Offer(present, 1.0, taken, same=same), own

    def read_rows(self, path: str, indices: Any) -> np.ndarray:
        """Rows of a parameter, after those that any rank reads were brought up to date on every rank."""
        if self.clocks:  # on every rank
            with self.ranks.together("read_rows") as same:
                self.refuse_while_held("read_rows")
                k = self.flat.matrix(path)
                found = check_indices("indices", indices, self.flat.shapes[k][0], self.backend)
                same.append(("the path", path.encode()))
            counts = self.ranks.gathered(np.array([[found.size]]))[:, 0].tolist()
            everything = np.unique(self.ranks.gathered(found[:, None], counts))
            if k in self.clocks:
                self.rows.catch_up(k, everything, self.current_plan())
        return super().read_rows(path, indices)

    def _behind(self) -> bytes:
        """Which rows are behind."""
        clocks = sorted(self.clocks.items())
        return b"".join([repr((k, clock.now)).encode() + clock.last.tobytes() for k, clock in clocks])

    def _same(self, plan: Plan, arguments: str, behind: bytes) -> Same:
        """What must be the same on every rank in a step."""
        plan.write_table(self.groups, self.steps + 1, 1.0)
        groups = np.array([*self.groups.of, *[group.frozen for group in self.groups.list]], np.int64)
        return (
            ("the number of updates", self.steps.to_bytes(8, "little")),
            ("the hyperparameters", plan.table.by_group.tobytes() + groups.tobytes()),
            ("grad_scale, reduction and extra", arguments.encode()),
            ("what is up to date of rows", behind),
        )

    @property
    def nbytes(self) -> Memory:
        """What this rank holds."""
        found = super().nbytes
        kept = (self.sums_of_part, self._wire)
        return found._replace(scratch=found.scratch + sum(each.nbytes for each in kept if each is not None))

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
        behind = self._behind()
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
        whole = self.rule.matrixwise
        if whole is not None:
            self._refuse_cut(chosen_by(self.groups.given(whole.chosen)), whole.chosen)
        plan.table.inputs, _ = Inputs.checked(self.rule, self.flat, extra, loss, present.tolist())
        trees = [(name, tree) for name, tree in sorted((extra or {}).items()) if tree is not None]
        crc = self._crc_of([leaf for name, tree in trees for leaf in self.flat.check_extra(tree, name)])
        given = [name for name, _ in trees]
        same = self._same(plan, repr((float(grad_scale), reduction, given, crc)), behind)
        own = taken is not None and grads is None
        return Offer(present, number, taken, own, 0.0 if loss is None else number * float(loss), same)

    def _exchange(self, offer: Offer, votes: Votes, total: float) -> None:
        """Add up the gradients of all ranks, and let them be those that were accumulated."""
        flat = self.flat
        as_they_are = self.sharded and offer.own and offer.weight == 1.0 and flat.dtype == flat.compute
        if offer.taken is not None and not as_they_are:
            self.add_up(offer.taken, offer.present, offer.weight)
        if not as_they_are:
            _, views = self._places_of_sums()
            for k in np.flatnonzero(votes.mask & ~offer.present).tolist():
                views[k].fill(-0.0)  # which leaves every number as it is: 0 would make 0 of a -0
        pending = self.new_pending()
        pending.present, pending.weight = votes.mask, total
        if self.sharded and self.sums_of_part is None:
            self.sums_of_part = self.backend.zeros(flat.layout.length, flat.compute)
        whole = flat.grad if as_they_are else self.sums
        if self._wire is not None:
            if not as_they_are:
                self._clear(votes.mask)
            self._wire.add_up(whole, self.sums_of_part)
        elif self.sharded:
            self.ranks.add_up_parts(whole, self.sums_of_part, self.backend)
        else:
            self.ranks.add_up(self.sums, self.backend)
        self._exchanged = True
        adder = self.adder
        if adder.measure:
            self._measure_sums(pending, adder)
        self.pending = pending

    def _places_of_sums(self) -> tuple[np.ndarray, list[Any]]:
        if not self._exchanged or not self.sharded:
            return super()._places_of_sums()
        flat = self.flat
        distances = flat.compute.itemsize * np.subtract(flat.offsets, flat.layout.start)
        return flat.places_of(flat.addresses, self.backend.address(self.sums_of_part) + distances), []

    def _clear(self, mask: np.ndarray) -> None:
        """Let the sums be 0 wherever no rank has a gradient: a NaN of an earlier step would be one of a whole block."""
        end = 0
        places = zip(self.flat.offsets, self.flat.layout.sizes, mask.tolist(), strict=True)
        for offset, size, present in sorted(places):
            if present:
                self.sums[end:offset] = 0.0
                end = max(end, offset + size)
        self.sums[end:] = 0.0

    def _measure_sums(self, pending: Pending, adder: Adder) -> None:
        """Leave the partial sums that adding up the gradients would have left, by the same kernel."""
        flat, plan = self.flat, self.plan
        at = self._places_of_sums()[0][:, 1]
        places = flat.split.places(at, at)
        present = np.tile(pending.present, flat.members or 1)
        once = np.array([1.0, 0.0], flat.compute)
        cut = plan.chunks(plan.of, whole=True)
        chunks = cut.own if self.sharded else cut
        partials = self.backend.zeros(pending.partials.size, pending.partials.dtype).reshape(pending.partials.shape)
        if self.sharded:
            partials = partials[: flat.layout.blocks_by_part(cut.whole)[self.ranks.rank]]
        everything = np.ones(len(present), np.bool_)
        self.backend.add(places, present, everything, once, chunks, partials, adder, flat.compute)
        pending.partials = cut.gathered(partials) if self.sharded else partials

    def _partials(self, *args: Any, **kwargs: Any) -> tuple[Any, np.ndarray, float]:
        partials, chunks, factor = super()._partials(*args, **kwargs)
        return partials, chunks.whole if type(chunks) is Cut else chunks, factor

    def _decided(self, plan: Plan, parts: Sequence[tuple[Any, np.ndarray]], *args: Any, **kwargs: Any) -> Any:
        self._measured = parts
        return super()._decided(plan, parts, *args, **kwargs)

    def _refuse_nonfinite(self, finite: bool, present: Sequence[bool] | None, grads: Any, unscale: float) -> None:
        if not self.sharded or finite or self.options.nonfinite != "raise":
            super()._refuse_nonfinite(finite, present, grads, unscale)
            return
        (partials, chunks), *_ = self._measured
        block = int(np.flatnonzero(partials[:, 1] != 0.0)[0])
        k = int(chunks[np.searchsorted(chunks[:, LINE], block, side="right") - 1, PLACE])
        self.refuse_gradient(k)

    def _transform(self, plan: Plan, places: np.ndarray, rows: Sequence[int], table: Any, *, scaled: bool) -> None:
        whole = self.rule.matrixwise
        if isinstance(plan, RankPlan) and whole is not None:
            rows = plan.held(rows)
        super()._transform(plan, places, rows, table, scaled=scaled)

    def _refuse_cut(self, chosen: Sequence[bool], name: str) -> None:
        """Refuse to treat a parameter as a matrix of which ranks have a part each. name : what `chosen` is called."""
        for path, is_chosen, is_cut in zip(self.flat.paths, chosen, self.flat.layout.is_cut, strict=True):
            if is_chosen and is_cut:
                raise ValueError(
                    f"parameter {path!r}: must have {name} from construction on, as in overrides={{{path!r}: "
                    f"{{{name!r}: True}}}}, because it was cut among ranks, got it later; or use shard=False"
                )

    def _chosen(self) -> tuple[bool, ...]:
        """As `Pipeline`, of the parameters that this rank has whole: of others it keeps no matrices."""
        return self._of_this_rank(super()._chosen())

    def _of_this_rank(self, chosen: tuple[bool, ...]) -> tuple[bool, ...]:
        """The same, but for parameters that other ranks have."""
        held = self.flat.layout.is_held if chosen else ()
        return tuple([here and own for here, own in zip(chosen, held, strict=True)])

    def matrices_for(self, values: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> Matrices:
        """As `Pipeline`, of the parameters that this rank has whole."""
        whole = self.rule.matrixwise
        if whole is None or not whole.matrices:
            return self.matrices
        chosen = chosen_by([change.get(whole.chosen, values[whole.chosen]) for change in changes])
        return self.matrices.fitted(self._of_this_rank(chosen))

    def _own_of(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        if not self.sharded:
            return arrays
        if name in self.rule.matrices:
            views = self.matrices.arrays[name]
            return [
                array if here else view
                for array, view, here in zip(arrays, views, self.flat.layout.is_held, strict=True)
            ]
        return self.flat.held(arrays) if name in self.formats.states else arrays

    def restart(self) -> None:
        """As `Pipeline`."""
        super().restart()
        if self._wire is not None:
            self._wire.forget()

    def restore(self, arrays: Mapping[str, Sequence[Any]], steps: int, nonfinite: tuple[int, int]) -> None:
        """As `Pipeline`."""
        super().restore(arrays, steps, nonfinite)
        if self._wire is not None:
            self._wire.forget()

    def spread(self) -> None:
        """Send the parameters that this rank has written to the others."""
        if self.sharded:
            with self.ranks.committed():
                self.ranks.spread(self.flat.data)

    def elsewhere(self, context: str, move: Callable[[], None]) -> Any:
        """As `Pipeline`; where parts are moved, every rank enters the block."""
        self.begin_together(context)
        return super().elsewhere(context, move)

    def shown(self) -> dict[str, list[Any]]:
        """What is kept for each parameter: see `Pipeline.shown`. Arrays of which others hold a part are `Scattered`."""
        found = self.views()
        if not self.sharded:
            return found
        layout, rule = self.flat.layout, self.rule
        for name in self.formats.states:
            found[name] = [
                Scattered(own, held.start, shape, self.ranks)
                for own, held, shape in zip(found[name], layout.held, layout.shapes, strict=True)
            ]
        for name in rule.numbers if rule.lined else ():
            found[name] = [
                Scattered(own.reshape(-1) if here else own.reshape(-1)[:0], 0, own.shape, self.ranks)
                for own, here in zip(found[name], layout.is_held, strict=True)
            ]
        for name in rule.matrices:
            shapes = [shape_in(self.flat, rule, name, k, chosen=here) for k, here in enumerate(super()._chosen())]
            found[name] = [
                Scattered(own.reshape(-1), 0, shape, self.ranks) for own, shape in zip(found[name], shapes, strict=True)
            ]
        return found
