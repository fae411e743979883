"""`Part`: parameters that share a rule, a dtype and a device, updated where they are by one of our optimizers."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch

import fastopt
from fastopt.hyper import EMA, WEIGHT_DECAY
from fastopt.interop.torch import check_product
from fastopt.kernels.contract import MASTER, REST
from fastopt.rules.asgd import asgd
from fastopt.rules.nadam import product
from fastopt.step.gate import through_gate
from fastopt.step.info import StepInfo
from fastopt.storage.intake import ALONE, Taken
from fastopt.torch.memory import HostMemory, device_of
from fastopt.torch.parameters import HALF, Arrays, dense_view, rows_of, same_strides
from fastopt.torch.states import States, one_buffer


def product_of(n: int, values: Mapping[str, Any]) -> float:
    """NAdam's product of momenta, after n updates."""
    return product(n, values["betas"][0], values["momentum_decay"])


def next_of(n: int, values: Mapping[str, Any]) -> Any:
    """What ASGD's next update is prepared with, after n."""
    return asgd.prepare(n + 1, *[values[name] for name in asgd.hyperparameters])


FOLLOWING: Mapping[str, Mapping[str, Callable[[int, Mapping[str, Any]], float]]] = {
    "nadam": {"mu_product": product_of},
    "asgd": {"eta": lambda n, values: next_of(n, values).eta, "mu": lambda n, values: next_of(n, values).new},
}
"""By rule: numbers that torch keeps as states, and that follow from the number of updates and the hyperparameters."""


OURS = (EMA, MASTER, REST)
"""States that torch's class of the same name has not."""


class StaleError(Exception):
    """A parameter is not what it was: another dtype, shape or device. The parts have to be made again."""


class Member(NamedTuple):
    """A parameter of a torch optimizer."""

    param: torch.Tensor
    group: int
    """The number of its param group."""
    name: str
    """For errors."""


class Part:
    """The parameters of a torch optimizer that one of our optimizers updates, in one launch.

    Args:
        members: the parameters, all of one dtype, on one device.
        memory: of this device.
        make: called with a tree of arrays: makes our optimizer of these arrays, which stay where they are.
        values: for each param group of torch the hyperparameters of the rule, by name, checked.
        states: the states of all parameters, as torch shows them.
        names: torch's name of each state, by ours.
        numbered: what is shown of a number per tensor, row or column: called with our name of it, the shape of the
            parameter and a tensor, it returns torch's name and a view of the tensor, or None.
        counts: whether torch's state has a `step`.
        shares: whether states that already lie as ours would may be used where they are.
        sparse: whether gradients may be sparse.
        by_matrix: whether the rule looks at matrices as a whole, or at their rows or columns.
    """

    def __init__(
        self,
        members: Sequence[Member],
        memory: HostMemory,
        make: Callable[[Mapping[str, Any]], fastopt.Optimizer],
        values: Sequence[Mapping[str, Any]],
        states: States,
        names: Mapping[str, str],
        *,
        numbered: Callable[[str, torch.Size, torch.Tensor], tuple[str, torch.Tensor] | None],
        counts: bool,
        shares: bool,
        sparse: bool,
        by_matrix: bool,
    ):
        self._numbered = numbered
        self.memory, self.on_host = memory, memory.on_host
        self.by_matrix = by_matrix
        self.sparse = sparse
        self.by_rows = sparse and self.on_host and members[0].param.dtype not in HALF
        self.seen = False
        """Whether gradients were seen to be where their parameters are. They can only move together."""
        self.params = [member.param for member in members]
        self.names = [member.name for member in members]
        self.of = [member.group for member in members]
        self.dtype = self.params[0].dtype
        self.sizes = [p.numel() for p in self.params]
        self.shapes = [p.shape for p in self.params]
        self.single = [k for k, size in enumerate(self.sizes) if size == 1]
        """By number: parameters whose gradient may be contiguous though it is a view of a complex number."""
        self.rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """By name: the rows of sparse gradients of this step, and their numbers."""
        self.shadows: dict[int, torch.Tensor] = {}
        """By number: copies of parameters whose elements have gaps between them in memory."""
        self.dense: dict[int, tuple[int, ...]] = {}
        """By number: the strides of parameters that are not contiguous, but have no gaps: channels last, transposed."""
        arrays = [self._array(k, p) for k, p in enumerate(self.params)]
        self.opt = make(OrderedDict(zip(self.names, arrays, strict=True)))
        self.pipeline = self.opt._running
        self.gate = self.pipeline.gate
        self.members_of = {
            group: tuple([k for k, own in enumerate(self.of) if own == group]) for group in dict.fromkeys(self.of)
        }
        self._acting: dict[tuple[str, int], tuple[int, ...]] = {}
        """By name and group: the parameters on which a hyperparameter of a matrixwise rule acts."""
        self._begin(values, states, names, counts=counts, shares=shares)
        self._locate()

    # --- where things are ---------------------------------------------------------------------------------------------

    def _array(self, k: int, p: torch.Tensor) -> Any:
        """An array over the memory of a parameter, or of a copy where it has gaps."""
        view = self._view(p)
        if view is None:
            shadow = self.shadows.get(k)
            if shadow is None:
                shadow = self.shadows[k] = self.memory.empty(p.shape, p.dtype)
            view = shadow.copy_(p.detach())
        elif not p.is_contiguous():
            self.dense[k] = p.stride()
        return self.memory.array(view)

    def _view(self, p: torch.Tensor) -> torch.Tensor | None:
        """A contiguous view of a parameter; None where a copy has its place. A matrix keeps its rows and columns."""
        return None if self.by_matrix and not p.is_contiguous() else dense_view(p)

    def _strides(self, k: int) -> tuple[int, ...]:
        """The strides of a parameter's states: its own, or contiguous ones where it has gaps."""
        return self.shadows[k].stride() if k in self.shadows else self.params[k].stride()

    def _locate(self) -> None:
        """Take the addresses of the parameters, and of the states."""
        self.at = [p.data_ptr() for p in self.params]
        flat = self.pipeline.flat
        self.places = flat.layout.places(flat.addresses, 0)
        self._plain = self.seen and not self.shadows and not self.dense

    def _follow(self) -> None:
        """Update the parameters where they are now."""
        for k, p in enumerate(self.params):
            if device_of(p) != self.memory.device or p.shape != self.shapes[k]:
                raise StaleError
            if (self._view(p) is None) != (k in self.shadows):
                raise StaleError
            if k not in self.shadows and self.dense.get(k) != (None if p.is_contiguous() else p.stride()):
                raise StaleError
        arrays = [self._array(k, p) for k, p in enumerate(self.params)]
        self.pipeline.replace(self.pipeline.flat.tree(arrays))
        self._locate()

    # --- states -------------------------------------------------------------------------------------------------------

    def _views(self, buffers: Sequence[torch.Tensor], counts: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """For each parameter its states by torch's names, as views of the buffers."""
        offsets = self.pipeline.flat.offsets
        found = []
        for k, (shape, offset) in enumerate(zip(self.shapes, offsets, strict=True)):
            own = {"step": counts[k]} if self._counts else {}
            for name, numbers in self._extra.items():
                own[name] = numbers[k]
            strides = self._strides(k)
            for name, buffer in zip(self._shown, buffers, strict=True):
                own[name] = buffer.as_strided(shape, strides, offset)
            own.update(self._numbers[k])
            own.update({name: self.memory.tensor(array) for name, array in self._matrices(k).items()})
            found.append(own)
        return found

    def _matrices(self, k: int) -> dict[str, Any]:
        """The matrices that the rule keeps for a parameter, by torch's names; none where it is not treated as one."""
        matrices = self.pipeline.matrices
        if not matrices.arrays or not matrices.chosen[k]:
            return {}
        return {self._torchs.get(name, name): own[k] for name, own in matrices.arrays.items()}

    def _begin(
        self,
        values: Sequence[Mapping[str, Any]],
        states: States,
        names: Mapping[str, str],
        *,
        counts: bool,
        shares: bool,
    ) -> None:
        """Continue from the states that there are, and let all others begin."""
        pipeline, rule = self.pipeline, self.opt.rule
        averages = () if pipeline.average is None else (EMA,)
        self._counts = counts
        self._torchs = names
        self._following = FOLLOWING.get(rule.name, {})
        self._extra = {
            name: torch.ones(len(self.params), dtype=torch.float32, device="cpu") for name in self._following
        }
        kept = () if pipeline.kept is None else (pipeline.formats.keeps,)
        self._shown = [names.get(name, name) for name in (*rule.states, *averages, *kept)]
        self._numbers: list[dict[str, torch.Tensor]] = [{} for _ in self.params]
        for (name, over), buffer in zip(rule.over.items(), pipeline.numbers, strict=True):
            for k, array in enumerate(pipeline.flat.number_views(buffer, over)):
                shown = self._numbered(name, self.shapes[k], self.memory.tensor(array))
                if shown is not None:
                    self._numbers[k][shown[0]] = shown[1]
        old = [dict(states[p]) if p in states else {} for p in self.params]
        self._check(old)
        numbers = [self._count(k, entry) for k, entry in enumerate(old)]
        self.counts = torch.tensor(numbers, dtype=torch.float32, device="cpu")  # as torch's, which are there, too
        own = (*pipeline.states, *[each for each in (pipeline.average, pipeline.kept) if each is not None])
        self.buffers = [self.memory.tensor(buffer) for buffer in own]
        views = self._views(self.buffers, self.counts)
        if shares:
            self._adopt(old, views)
            views = self._views(self.buffers, self.counts)
        base = pipeline.groups.base
        changes = [
            {
                **pipeline.groups.changes[k],
                **{name: value for name, value in values[group].items() if value != base[name]},
            }
            for k, group in enumerate(self.of)
        ]
        for k, entry in enumerate(old):
            if "mu_product" in entry and not shares:
                where = f"state of {self.names[k]}: mu_product"
                check_product(entry["mu_product"], numbers[k], values[self.of[k]], where)
        pipeline.resume(numbers, changes, [k for k, entry in enumerate(old) if not entry])
        for k, (entry, fresh) in enumerate(zip(old, views, strict=True)):
            for name, view in fresh.items():
                given = entry.get(name)
                if name == "step" or given is None or view.data_ptr() == given.data_ptr():
                    continue
                if self.on_host and given.is_shared():  # which torch says of every tensor on a device
                    raise ValueError(
                        f"state of {self.names[k]}: {name}: must not be in shared memory by itself, because states lie "
                        f"in one buffer here; call share_memory() of the optimizer"
                    )
                view.copy_(given)
        self._states, self._fresh = states, views
        self.waiting = {k for k, entry in enumerate(old) if not entry and views[k]}
        """Parameters without a state that torch shows: they have had no gradient."""
        for k in range(len(old)):
            if k not in self.waiting and views[k]:
                states.show(self.params[k], views[k])
        self._note_buffers()
        self._count_now()

    def _check(self, old: Sequence[Mapping[str, Any]]) -> None:
        """Refuse states that are not of these parameters."""
        for k, entry in enumerate(old):
            shapes = dict.fromkeys(self._shown, self.shapes[k]) | dict.fromkeys(self._extra, torch.Size())
            matrices = {name: torch.Size(array.shape) for name, array in self._matrices(k).items()}
            matrices |= {name: view.shape for name, view in self._numbers[k].items()}
            known = ["step", *shapes, *matrices]
            for name, shape in (shapes | matrices).items():
                value = entry.get(name)
                if value is None:
                    continue
                if not isinstance(value, torch.Tensor) or value.shape != shape:
                    found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                    raise ValueError(
                        f"state of {self.names[k]}: {name}: must be a tensor of shape {tuple(shape)}, got {found}"
                    )
            required = (*self._shown, *matrices)
            lacking = [name for name in required if name not in entry and name not in OURS]
            if lacking and any(name in entry for name in known if name not in OURS):
                raise ValueError(
                    f"state of {self.names[k]}: must have {', '.join(required)}, as the optimizer has, got "
                    f"{', '.join(map(str, entry))}"
                )

    def _count(self, k: int, entry: Mapping[str, Any]) -> int:
        """How many updates a parameter has had, as far as its state shows."""
        if not self._counts:
            return int(any(name in entry for name in self._shown))
        value = entry.get("step", 0)
        number = float(value.item() if isinstance(value, torch.Tensor) else value)
        if not (number >= 0 and number == int(number)):
            raise ValueError(f"state of {self.names[k]}: step: must be a whole number from 0, got {number}")
        return int(number)

    def _adopt(self, old: Sequence[Mapping[str, Any]], views: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Use the memory in which the states already lie as ours would."""
        found = [
            one_buffer([entry.get(name) for entry in old], [view[name] for view in views], buffer)
            for name, buffer in zip(self._shown, self.buffers, strict=True)
        ]
        if self.buffers and all(buffer is not None for buffer in found):
            self.buffers = [buffer for buffer in found if buffer is not None]
            self.pipeline.hold_states_in([self.memory.array(buffer) for buffer in self.buffers])
        if self._counts:
            counts = one_buffer([entry.get("step") for entry in old], [view["step"] for view in views], self.counts)
            self.counts = self.counts if counts is None else counts

    def _note_buffers(self) -> None:
        self._buffers_at = [buffer.data_ptr() for buffer in (*self.buffers, self.counts)]

    def check_shareable(self) -> None:
        """Refuse to move states of a device to shared memory."""
        if not self.on_host:
            raise RuntimeError(
                f"share_memory(): {self.names[0]}: must be on the CPU, got a tensor on {self.memory.device}"
            )

    def share_memory(self) -> None:
        """Move the states to shared memory, and show all of them."""
        for k in sorted(self.waiting):
            self._states.show(self.params[k], self._fresh[k])
        self.waiting.clear()
        for buffer in (*self.buffers, self.counts):
            buffer.share_memory_()

    def moved(self) -> bool:
        """Whether states are no longer where they were: they were moved to shared memory."""
        return [buffer.data_ptr() for buffer in (*self.buffers, self.counts)] != self._buffers_at

    # --- counts of updates --------------------------------------------------------------------------------------------

    def _count_now(self) -> None:
        self._numbers_now = self.counts.numpy()
        self._bytes_now = memoryview(self._numbers_now).cast("B")  # type: ignore[arg-type]
        self._bytes = bytearray(self._bytes_now)
        if self._extra:
            self._put_following()

    def recount(self) -> None:
        """Take the counts of updates that somebody has written into torch's state."""
        if self._bytes_now != self._bytes:
            found = self._numbers_now.tolist()
            counts = [self._count(k, {"step": number}) for k, number in enumerate(found)] if self._counts else found
            self.pipeline.resume(counts, self.pipeline.groups.changes, [])
            self._count_now()

    def _counted(self, present: list[bool] | None) -> None:
        numbers = self._numbers_now
        numbers += 1.0 if present is None else np.array(present, np.float32)
        self._bytes[:] = self._bytes_now  # memory of its own would be sought among all that the backward pass has freed
        if self._extra:
            self._put_following()

    def _put_following(self) -> None:
        """Write the numbers that torch shows as states."""
        groups, steps = self.pipeline.groups, self.pipeline.steps
        for name, following in self._following.items():
            found = [following(steps - group.missed, group.values) for group in groups.list]
            self._extra[name].numpy()[:] = [found[number] for number in groups.of]

    # --- a step -------------------------------------------------------------------------------------------------------

    @contextmanager
    def hold(self, context: str) -> Iterator[None]:
        """Hold the parameters elsewhere, inside a context of our optimizer."""
        held = getattr(self.opt, context)()
        with self.memory.current():
            held.__enter__()
        increment_version(self.params)
        try:
            yield
        finally:
            with self.memory.current():  # torch's current stream may be another one by now
                held.__exit__(*sys.exc_info())

    def measure(self, taken: Taken) -> tuple[float, bool]:
        """The norm of gradients that were taken, and whether all of them are finite."""
        return self.pipeline.measure(taken)

    def set_hyper(self, name: str, value: Any, group: int) -> None:
        """Set a hyperparameter of a param group of torch."""
        members: tuple[int, ...] | None = self.members_of[group]
        whole = self.opt.rule.matrixwise
        if len(self.members_of) == 1:
            members = None
        elif whole is not None and name in (*whole.matrix_only, *whole.other_only):
            acting = name in whole.matrix_only
            values_of = self.pipeline.groups.values_of
            members = self._acting.setdefault(
                (name, group), tuple([k for k in self.members_of[group] if values_of(k)[whole.chosen] == acting])
            )
            if not members:
                return
        self.pipeline.set_hyper(name, value, members)

    def refuse_shadows(self, what: str) -> None:
        """Refuse to hold parameters elsewhere that have gaps between their elements."""
        for k in self.shadows:
            raise RuntimeError(
                f"{what}(): {self.names[k]}: must have no gaps between its elements, got strides "
                f"{self.params[k].stride()}; use contiguous()"
            )

    def _from_sparse(self, k: int, g: torch.Tensor, optimizer: str) -> torch.Tensor | None:
        """A dense gradient in the place of a sparse one; None where its rows are in `rows`.

        Row by row where a row without a gradient stays as it is, so that all rows are up to date at all times.
        """
        if not self.sparse or g.layout is not torch.sparse_coo:
            raise RuntimeError(
                f"{self.names[k]}.grad: must be dense, got {g.layout}; {optimizer} does not support sparse gradients"
            )
        rule, values = self.opt.rule, self.pipeline.groups.values_of(k)
        if rule.states and values[WEIGHT_DECAY] != 0.0 and "lr_decay" in values:
            raise RuntimeError(f"{optimizer}: weight_decay must be 0 with sparse gradients, got {values[WEIGHT_DECAY]}")
        still = self.by_rows and rule.name in STILL and values[WEIGHT_DECAY] == 0.0 and self.pipeline.average is None
        rows = rows_of(g) if still and g.dtype is self.dtype and k not in self.shadows and k not in self.dense else None
        if rows is None:
            return g.to_dense()
        self.rows[self.names[k]] = rows
        return None

    def take(self, optimizer: str) -> Taken:
        """Look at every parameter and its gradient, and take their addresses.

        Raises StaleError where the parts have to be made again; RuntimeError for a gradient that is sparse.
        """
        self.rows.clear()
        dtype = self.dtype
        at: list[int] = []
        grads_at: list[int] = []
        grads: list[torch.Tensor | None] = []
        if self._plain:
            add_at, add_grad_at, add = at.append, grads_at.append, grads.append
            try:
                for p, size in zip(self.params, self.sizes, strict=True):
                    g = p.grad
                    if g is None or g.dtype is not dtype or p.dtype is not dtype or g.numel() != size:
                        break
                    if not g.is_contiguous():
                        break
                    add(g)
                    add_at(p.data_ptr())
                    add_grad_at(g.data_ptr())
                else:
                    if any(grads[k].is_neg() for k in self.single):  # type: ignore[union-attr]
                        return self._take_each(optimizer)
                    if at != self.at:
                        self._follow()
                    if self.on_host:
                        self.places[:, 1] = grads_at
                    else:
                        self._place(grads_at)
                    return Taken(self.places, None, grads)
            except RuntimeError:  # of a sparse gradient, which has no address
                pass
        return self._take_each(optimizer)

    def _place(self, grads_at: Sequence[int]) -> None:
        """Note where the gradients are. A device keeps a table of places that it was sent, so another one is made."""
        if self.on_host:
            self.places[:, 1] = grads_at
        elif self.places[:, 1].tolist() != grads_at:
            self.places = self.places.copy()
            self.places[:, 1] = grads_at

    def _take_each(self, optimizer: str) -> Taken:
        """As `take`, where something is not as usual: no gradient, other strides, another dtype, the first step."""
        grads: list[torch.Tensor | None] = []
        moved = False
        for k, p in enumerate(self.params):
            if p.dtype is not self.dtype or p.numel() != self.sizes[k]:
                raise StaleError
            g = p.grad
            if g is not None:
                moved = moved or p.data_ptr() != self.at[k]
                if device_of(g) != self.memory.device and device_of(p) == self.memory.device:
                    raise RuntimeError(
                        f"{self.names[k]}.grad: must be on {self.memory.device} as its parameter, got a tensor on "
                        f"{device_of(g)}"
                    )
                if g.layout is not STRIDED:
                    g = self._from_sparse(k, g, optimizer)
            if g is not None:
                if g.shape != p.shape:
                    raise StaleError if p.shape != self.shapes[k] else _misshapen(self.names[k], p, g)
                like = self.shadows.get(k, p)
                if g.dtype is not self.dtype or g.is_neg() or not same_strides(g, like):
                    g = self.memory.empty(like.shape, self.dtype, like.stride()).copy_(g.detach())
            grads.append(g)
        if moved:
            self._follow()
        for k, shadow in self.shadows.items():
            shadow.copy_(self.params[k].detach())
        self._place([0 if g is None else g.data_ptr() for g in grads])
        present = [g is not None for g in grads]
        self.seen = self.seen or all(present)
        self._plain = self.seen and not self.shadows and not self.dense
        return Taken(self.places, None if all(present) else present, grads)

    @through_gate
    def advance(self, taken: Taken, beside: tuple[float, bool] = ALONE) -> StepInfo:
        """Make a step with gradients that were taken. beside : `Taken.beside`."""
        places, present, grads, _ = taken
        given = Taken(places, present, Arrays(grads), beside)
        if self.rows:
            rows, self.rows = self.rows, {}
            info = self.pipeline.step_rows(rows, given)
            present = [g is not None or name in rows for name, g in zip(self.names, grads, strict=True)]
        else:
            info = self.pipeline.step(given, 1.0, "mean")
        if self.pipeline.options.skips and info.skipped:  # a device is waited for
            return info
        self._counted(present)
        for k, shadow in self.shadows.items():
            if grads[k] is not None:
                self.params[k].detach().copy_(shadow)
        if self.waiting:
            for k in [k for k in self.waiting if present is None or present[k]]:
                self._states.show(self.params[k], self._fresh[k])
                self.waiting.discard(k)
        updated = self.params if present is None else [p for p, here in zip(self.params, present, strict=True) if here]
        increment_version(updated)
        return info


def _there(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `Part` whose work is done on the device."""

    @wraps(method)
    def working(self: DevicePart, *args: Any, **kwargs: Any) -> Any:
        with self.memory.current():
            return method(self, *args, **kwargs)

    return working


class DevicePart(Part):
    """The same on a CUDA device: all work is ordered with torch's."""

    def __init__(self, members: Sequence[Member], memory: HostMemory, *args: Any, **kwargs: Any):
        with memory.current():
            super().__init__(members, memory, *args, **kwargs)

    take = _there(Part.take)
    advance = _there(Part.advance)
    measure = _there(Part.measure)
    set_hyper = _there(Part.set_hyper)
    recount = _there(Part.recount)


increment_version = torch.autograd.graph.increment_version
STRIDED = torch.strided
STILL = ("sgd", "adagrad")
"""Rules by which elements without a gradient stay as they are."""


def _misshapen(name: str, p: torch.Tensor, g: torch.Tensor) -> ValueError:
    return ValueError(f"{name}.grad: must have shape {tuple(p.shape)} as its parameter, got {tuple(g.shape)}")
