"""`RowSteps`: tracks rows that row-wise steps have not updated yet, and brings them up to date."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from fastopt import scalars
from fastopt.closed_forms import MOST, History
from fastopt.hyper import WEIGHT_DECAY
from fastopt.kernels import check_device, get_backend
from fastopt.kernels.contract import Backend, Chunk, Features, Kernel, Place, StepHyper
from fastopt.rule import Rule
from fastopt.signals import deferred_signals
from fastopt.step.plan import Plan
from fastopt.step.table import Point
from fastopt.storage.flat import FlatParams, named
from fastopt.storage.layout import Layout

ROWS_AT_ONCE = 65_536
"""The most rows that one launch brings up to date: a table of 65,536 chunks takes 3 MB."""


class Clock:
    """The last update of each row of one parameter, counted in steps since all rows were up to date."""

    def __init__(self, rows: int, history: History):
        self.history = history
        self.now = 0
        self.last = np.zeros(rows, np.int32)
        self.replay: list[np.ndarray] = []
        """The row of the table of hyperparameters of each step."""

    def tick(self, touched: np.ndarray, line: np.ndarray, t: int, point: Point) -> None:
        """Record step number `t`, which updated the rows `touched` with these hyperparameters and this table row."""
        self.now += 1
        self.last[touched] = self.now
        self.replay.append(line)
        self.history.append(t, point)


class RowSteps:
    """The 2-D parameters of an optimizer that have rows to bring up to date, each with its `Clock`."""

    def __init__(
        self,
        rule: Rule,
        flat: FlatParams,
        buffers: tuple[np.ndarray, ...],
        ema: float | None,
    ):
        """buffers : the rule's states, and the average. ema : the decay rate of the average."""
        self.clocks: dict[int, Clock] = {}
        self._scratch: dict[int, np.ndarray] = {}
        self._rule = rule
        self._flat = flat
        self._backend = get_backend(flat.backend)
        self._buffers = buffers
        self._ema = ema

    def check(
        self, rows: Any, values_of: Callable[[int], Mapping[str, Any]]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return for each parameter its touched rows, each once, and their gradients; raise an error for bad input.

        values_of : returns the hyperparameters of a parameter, by its index.
        """
        if not isinstance(rows, Mapping) or not rows:
            got = "an empty one" if isinstance(rows, Mapping) else type(rows).__name__
            raise TypeError(f"rows: must be a dict {{path: (indices, row_grads)}} that is not empty, got {got}")
        idle = self._rule.idle
        if idle is None:
            raise TypeError(
                f"step_rows(): must have a rule with a closed form for rows without a gradient, got "
                f"{self._rule.name!r}; use step()"
            )
        found = {}
        for path, pair in rows.items():
            k = self._flat.matrix(path)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise TypeError(f"rows[{path!r}]: must be (indices, row_grads), got {type(pair).__name__}")
            values = values_of(k)
            decay = values[WEIGHT_DECAY]
            l2 = not self._rule.decoupled and (callable(decay) or decay != 0.0)
            reason = idle.refusal(self._rule, values, l2)
            if reason is not None:
                raise ValueError(
                    f"rows[{path!r}]: must have a closed form for rows without a gradient, got none: {reason}; or use "
                    f"step()"
                )
            count, width = self._flat.shapes[k]
            indices = check_indices(f"rows[{path!r}]: indices", pair[0], count, self._backend)
            shape = (indices.size, width)
            row_grads = check_row_grads(f"rows[{path!r}]: row_grads", pair[1], shape, self._flat.compute, self._backend)
            if any(self._backend.overlap(row_grads, own) for own in (self._flat.arrays[k], *self._buffers)):
                row_grads = row_grads.copy()  # the kernel reads the gradients while it writes these buffers
            if k not in self._scratch:
                self._scratch[k] = np.empty(count, np.int32)
            found[k] = summed(indices, row_grads, self._scratch[k], self._backend)
        return found

    def start_clock(self, k: int, plan: Plan) -> None:
        """Give parameter number `k` a clock with room for one more step."""
        if k in self.clocks and self.clocks[k].now >= MOST:
            self.stop(k, plan)
        if k not in self.clocks:
            idle = self._rule.idle
            assert idle is not None  # `check` ensures it
            ema_weight = None if self._ema is None else 1.0 - self._ema
            self.clocks[k] = Clock(self._flat.shapes[k][0], idle.history(self._rule, ema_weight))

    def stop(self, k: int, plan: Plan) -> None:
        """Bring every row of parameter number `k` up to date."""
        clock = self.clocks[k]
        behind = np.flatnonzero(clock.last < clock.now)
        for first in range(0, behind.size, ROWS_AT_ONCE):
            self.catch_up(k, behind[first : first + ROWS_AT_ONCE], plan)
        del self.clocks[k]  # an interrupt before leaves a clock of rows that are up to date

    def catch_up(self, k: int, indices: np.ndarray, plan: Plan) -> None:
        """Bring rows of parameter number `k` up to date. `indices` has each row at most once."""
        clock = self.clocks[k]
        indices = indices[clock.last[indices] < clock.now]
        if indices.size == 0:
            return
        history = clock.history
        form = form_of(history.scalar, history.hyper)
        features = Features(still=True, scattered=True)
        kernel = self._backend.kernel(form, history.hyper, self._flat.compute, features)
        with deferred_signals:
            lines, coefficients = self._coefficients(k, indices, plan)
            table = np.zeros((len(coefficients), len(StepHyper._fields) + coefficients.shape[1]), self._flat.compute)
            table[:, len(StepHyper._fields) :] = coefficients
            self._launch(k, kernel, indices, lines, table)
            clock.last[indices] = clock.now

    def update(
        self,
        k: int,
        indices: np.ndarray,
        grads: np.ndarray,
        line: np.ndarray,
        flags: Mapping[str, bool],
        plan: Plan,
    ) -> None:
        """Bring rows of parameter number `k` up to date and update them, in one pass.

        line : the parameter's row of the table of hyperparameters.
        flags : the flags of the kernel.
        """
        if indices.size == 0:
            return
        history = self.clocks[k].history
        lines, coefficients = self._coefficients(k, indices, plan)
        table = np.empty((len(coefficients), line.size + coefficients.shape[1]), self._flat.compute)
        table[:, : line.size] = line
        table[:, line.size :] = coefficients
        kernel = plan.row_kernel(flags, (history.scalar, history.hyper))
        self._launch(k, kernel, indices, lines, table, grads)

    def _launch(
        self,
        k: int,
        kernel: Kernel,
        indices: np.ndarray,
        lines: Any,
        table: np.ndarray,
        grads: np.ndarray | None = None,
    ) -> None:
        """Run a kernel on rows of parameter number `k`. Their gradients are consecutive in `grads`."""
        width = self._flat.shapes[k][1]
        if width:
            p = self._backend.address(self._flat.arrays[k])
            g = p if grads is None else self._backend.address(grads)  # None: the kernel does not read gradients
            places = np.array([Place(p, g, self._flat.offsets[k], 0)], np.int64)
            chunks = chunks_of(indices, width, lines)
            kernel.launch(places, self._buffers, table, chunks, indices.size * width)

    def _coefficients(self, k: int, indices: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Return the line of coefficients for each row, by its age; and the coefficients of all ages.

        Where the closed form is not exact (Adam's, in the first hundreds of steps), this makes the missed steps of the
        rows one by one. The age of these rows is then 0.
        """
        clock = self.clocks[k]
        ages = clock.now - clock.last[indices]
        distinct = np.flatnonzero(np.bincount(ages))
        coefficients, exact = clock.history.coefficients(distinct)
        of_age = np.zeros(clock.now + 1, np.int64)
        of_age[distinct] = np.arange(distinct.size)
        lines = of_age[ages]
        if exact.all():
            return lines, coefficients
        kernel = plan.row_kernel({"ema": self._ema is not None, "still": True}, None)
        late = ~exact[lines]
        left, since = indices[late], clock.last[indices[late]]
        for step in range(int(since.min()), clock.now):
            self._launch(k, kernel, left[since <= step], 0, clock.replay[step][None])
        lines[late] = distinct.size
        present = clock.history.coefficients(np.zeros(1, np.int64))[0]
        return lines, np.concatenate([coefficients, present])


def check_indices(name: str, indices: Any, rows: int, backend: Backend) -> np.ndarray:
    """Return `indices` as int64 on the host; raise an error unless they are 1-D integers in [0, rows)."""
    scalars.refuse_masked(name, indices)
    array = np.asarray(backend.host(indices) if isinstance(indices, backend.array_type) else indices)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: must be integers, got dtype {scalars.dtype_name(array.dtype)}")
    if array.ndim != 1:
        raise ValueError(f"{name}: must be a 1-D array of row numbers, got shape {array.shape}")
    if array.min() < 0 or array.max() >= rows:
        worst = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{name}: must be row numbers from 0 to {rows - 1}, got {worst}")
    return array.astype(np.int64, copy=False)


def check_row_grads(
    name: str, grads: Any, shape: tuple[int, int], dtype: np.dtype[Any], backend: Backend
) -> np.ndarray:
    """Return `grads` as a C-contiguous array; raise an error unless they have the backend, shape and dtype."""
    scalars.refuse_masked(name, grads)
    if not isinstance(grads, backend.array_type):
        raise TypeError(f"{name}: must be {named(backend.array_type)} of row gradients, got {named(type(grads))}")
    if grads.dtype != dtype:
        raise TypeError(
            f"{name}: must have dtype {dtype} as its parameter, got {scalars.dtype_name(grads.dtype)}; "
            f"use grad.astype({dtype.name!r})"
        )
    if grads.shape != shape:
        raise ValueError(f"{name}: must have shape {shape}, a row for each index, got {grads.shape}")
    check_device(name, grads, backend, backend.device, "the current one")
    return grads if grads.flags.c_contiguous else grads.copy(order="C")


def summed(
    indices: np.ndarray, grads: np.ndarray, scratch: np.ndarray, backend: Backend
) -> tuple[np.ndarray, np.ndarray]:
    """Return each index once, and the sum of its rows of `grads`. `scratch`: one int32 per row, overwritten."""
    order = np.arange(indices.size, dtype=np.int32)
    scratch[indices] = order
    if (scratch[indices] == order).all():  # no index is repeated
        return indices, grads
    by_row = np.argsort(indices, kind="stable")
    ordered = indices[by_row]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return ordered[starts], backend.sum_rows(grads, by_row, starts)


def chunks_of(rows: np.ndarray, width: int, group: Any) -> np.ndarray:
    """Return a line of `Chunk` for each of a parameter's `rows`, whose gradients are consecutive.

    group : the row of the table of hyperparameters: one for all, or one for each.
    """
    start = rows * width
    grad = np.arange(0, rows.size * width, width)
    zeros = np.zeros_like(start)
    columns = {"place": zeros, "start": start, "stop": start + width, "grad": grad, "group": zeros + group}
    return np.stack([columns.get(name, zeros) for name in Chunk._fields], axis=1)


def one_run(address: int, size: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places and chunks of row gradients that begin at an address, with one row of the table."""
    layout = Layout.of([(size,)])
    chunks = layout.chunks([0], whole=True)
    chunks[:, Chunk._fields.index("group")] = group
    return layout.places(address, address), chunks


@cache
def form_of(scalar: Callable[..., Any], hyper: type) -> Rule:
    """Return the closed form of a history as a rule, so that the kernels of rules run it."""

    def prepare(t):  # type: ignore[no-untyped-def]
        return hyper(*[0.0] * len(hyper._fields))  # type: ignore[attr-defined]

    return Rule(scalar, prepare)  # type: ignore[arg-type]
