"""`RowSteps`: the rows of parameters that row-wise steps leave behind, and how they are brought up to date."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from fastopt.closed_forms import MOST, History
from fastopt.kernels import get_backend
from fastopt.kernels.contract import Backend, Features, Kernel, StepHyper
from fastopt.rule import Rule
from fastopt.step.table import WEIGHT_DECAY, Point
from fastopt.storage.flat import FlatParams, Layout, named

ROWS_AT_ONCE = 65_536
"""How many rows are brought up to date in one launch: a table of as many chunks is 2.6 MB."""


class Clock:
    """When each row of one parameter was updated last, counted in steps since all of them were up to date."""

    def __init__(self, rows: int, history: History):
        self.history = history
        self.now = 0
        self.last = np.zeros(rows, np.int32)
        self.replay: list[np.ndarray] = []
        """The table's row of each step."""

    def tick(self, touched: np.ndarray, line: np.ndarray, t: int, point: Point) -> None:
        """Step number `t` was made, with these hyperparameters and this row of the table, and updated these rows."""
        self.now += 1
        self.last[touched] = self.now
        self.replay.append(line)
        self.history.append(t, point)


class RowSteps:
    """The 2-D parameters of an optimizer some of whose rows are behind, by number, each with its `Clock`."""

    def __init__(
        self,
        rule: Rule,
        flat: FlatParams,
        buffers: tuple[np.ndarray, ...],
        ema: float | None,
        kernel: Callable[[Mapping[str, bool], tuple[Any, type] | None], Kernel],
    ):
        """buffers: the rule's states, and the average. kernel: the rule's update on scattered chunks, by its flags."""
        self.clocks: dict[int, Clock] = {}
        self._scratch: dict[int, np.ndarray] = {}
        self._rule = rule
        self._flat = flat
        self._backend = get_backend(flat.backend)
        self._buffers = buffers
        self._ema = ema
        self._kernel = kernel

    def check(
        self, rows: Any, values_of: Callable[[int], Mapping[str, Any]]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By parameter its touched rows, each once, and their gradients; an error where something does not fit.

        values_of : the hyperparameters of the parameter of a number.
        """
        if not isinstance(rows, Mapping) or not rows:
            raise TypeError(f"rows: expected {{path: (indices, row_grads)}}, found {type(rows).__name__}")
        idle = self._rule.idle
        if idle is None:
            raise TypeError(
                f"step_rows(): rule {self._rule.name!r} has no closed form for rows without a gradient; use step()"
            )
        found = {}
        for path, pair in rows.items():
            k = self._flat.matrix(path)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise TypeError(f"rows[{path!r}]: expected (indices, row_grads), found {type(pair).__name__}")
            values = values_of(k)
            decay = values[WEIGHT_DECAY]
            l2 = not self._rule.decoupled and (callable(decay) or decay != 0.0)
            reason = idle.refusal(self._rule, values, l2)
            if reason is not None:
                raise ValueError(
                    f"step_rows(): no closed form for rows of {path!r} without a gradient: {reason}; or use step()"
                )
            count, width = self._flat.shapes[k]
            indices = check_indices(f"rows[{path!r}]: indices", pair[0], count, self._backend)
            shape = (indices.size, width)
            row_grads = check_row_grads(f"rows[{path!r}]: row_grads", pair[1], shape, self._flat.dtype, self._backend)
            if any(self._backend.overlap(row_grads, own) for own in (self._flat.data, *self._buffers)):
                row_grads = row_grads.copy()  # it is read while these are written
            if k not in self._scratch:
                self._scratch[k] = np.empty(count, np.int32)
            found[k] = summed(indices, row_grads, self._scratch[k], self._backend)
        return found

    def wind(self, k: int) -> None:
        """See that parameter number `k` has a clock with room for one more step."""
        if k in self.clocks and self.clocks[k].now >= MOST:
            self.stop(k)
        if k not in self.clocks:
            idle = self._rule.idle
            assert idle is not None  # `check` has seen to it
            fresh = None if self._ema is None else 1.0 - self._ema
            self.clocks[k] = Clock(self._flat.shapes[k][0], idle.history(self._rule, fresh))

    def stop(self, k: int) -> None:
        """Bring every row of parameter number `k` up to date."""
        clock = self.clocks[k]
        behind = np.flatnonzero(clock.last < clock.now)
        for first in range(0, behind.size, ROWS_AT_ONCE):
            self.catch_up(k, behind[first : first + ROWS_AT_ONCE])
        del self.clocks[k]

    def catch_up(self, k: int, indices: np.ndarray) -> None:
        """Bring rows of parameter number `k`, each named once, up to date."""
        clock = self.clocks[k]
        indices = indices[clock.last[indices] < clock.now]
        if indices.size == 0:
            return
        lines, coefficients = self._coefficients(k, indices)
        table = np.zeros((len(coefficients), len(StepHyper._fields) + coefficients.shape[1]), self._flat.dtype)
        table[:, len(StepHyper._fields) :] = coefficients
        history = clock.history
        form = form_of(history.scalar, history.hyper)
        features = Features(still=True, scattered=True)
        kernel = self._backend.kernel(form, history.hyper, self._flat.dtype, features)
        self._launch(k, kernel, indices, lines, table, self._flat.grad)
        clock.last[indices] = clock.now

    def update(
        self, k: int, indices: np.ndarray, grads: np.ndarray, line: np.ndarray, flags: Mapping[str, bool]
    ) -> None:
        """Bring rows of parameter number `k` up to date and update them, in one pass.

        line : its row of the table of hyperparameters.
        flags : of the kernel.
        """
        if indices.size == 0:
            return
        history = self.clocks[k].history
        lines, coefficients = self._coefficients(k, indices)
        table = np.empty((len(coefficients), line.size + coefficients.shape[1]), self._flat.dtype)
        table[:, : line.size] = line
        table[:, line.size :] = coefficients
        kernel = self._kernel(flags, (history.scalar, history.hyper))
        self._launch(k, kernel, indices, lines, table, grads.reshape(-1))

    def _launch(
        self, k: int, kernel: Kernel, indices: np.ndarray, lines: Any, table: np.ndarray, grad: np.ndarray
    ) -> None:
        """Run a kernel on rows of parameter number `k`, whose gradients follow each other in `grad`."""
        width = self._flat.shapes[k][1]
        if width:
            chunks = lines_of(indices, self._flat.offsets[k], width, lines, k)
            kernel.launch(self._flat.data, grad, self._buffers, table, chunks)

    def _coefficients(self, k: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row the line of coefficients of its age, and the coefficients of all ages that there are.

        Rows for which the closed form is not exact (Adam's, in the first hundreds of steps) make their steps here, one
        by one, and are then of age 0.
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
        kernel = self._kernel({"ema": self._ema is not None, "still": True}, None)
        late = ~exact[lines]
        left, since = indices[late], clock.last[indices[late]]
        for step in range(int(since.min()), clock.now):
            self._launch(k, kernel, left[since <= step], 0, clock.replay[step][None], self._flat.grad)
        lines[late] = distinct.size
        present = clock.history.coefficients(np.zeros(1, np.int64))[0]
        return lines, np.concatenate([coefficients, present])


def check_indices(name: str, indices: Any, rows: int, backend: Backend) -> np.ndarray:
    """`indices` as int64 on the host; an error that names them unless they are 1-D integers in [0, rows)."""
    array = np.asarray(backend.host(indices) if isinstance(indices, backend.array_type) else indices)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, found dtype {array.dtype.str!r}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D array of row numbers, found shape {array.shape}")
    if array.min() < 0 or array.max() >= rows:
        worst = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{name}: holds {worst}; expected row numbers from 0 to {rows - 1}")
    return array.astype(np.int64, copy=False)


def check_row_grads(
    name: str, grads: Any, shape: tuple[int, int], dtype: np.dtype[Any], backend: Backend
) -> np.ndarray:
    """`grads`, C-contiguous, of the backend; an error that names them unless they have this shape and dtype."""
    if not isinstance(grads, backend.array_type):
        raise TypeError(f"{name}: expected {named(backend.array_type)} of row gradients, found {named(type(grads))}")
    if grads.dtype != dtype:
        raise TypeError(
            f"{name}: expected dtype {dtype.str!r} as the parameter's, found {grads.dtype.str!r}; "
            f"use grad.astype({dtype.name!r})"
        )
    if grads.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, a row for each index, found {grads.shape}")
    return grads if grads.flags.c_contiguous else grads.copy(order="C")


def summed(
    indices: np.ndarray, grads: np.ndarray, scratch: np.ndarray, backend: Backend
) -> tuple[np.ndarray, np.ndarray]:
    """Every index once, and the sum of its rows of `grads`. `scratch`: int32, one per row; overwritten."""
    order = np.arange(indices.size, dtype=np.int32)
    scratch[indices] = order
    if (scratch[indices] == order).all():  # none is repeated
        return indices, grads
    by_row = np.argsort(indices, kind="stable")
    ordered = indices[by_row]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return ordered[starts], backend.sum_rows(grads, by_row, starts)


def lines_of(rows: np.ndarray, offset: int, width: int, line: Any, param: int) -> np.ndarray:
    """A table of chunks, one for each of a parameter's `rows`, whose gradients follow each other in a buffer.

    line : the row of the table of hyperparameters, one for all or one each.
    """
    table = np.empty((rows.size, 5), np.int64)
    np.multiply(rows, width, out=table[:, 0])
    table[:, 0] += offset
    np.add(table[:, 0], width, out=table[:, 1])
    table[:, 2] = line
    table[:, 3] = param
    table[:, 4] = np.arange(0, rows.size * width, width) if width else 0
    return table


def one_run(size: int, line: int) -> np.ndarray:
    """The chunks of a buffer of its own, all of it under one row of the table of hyperparameters."""
    return Layout.of([(size,)]).chunks([0], layerwise=True) + np.array([0, 0, line, 0, 0])


@cache
def form_of(scalar: Callable[..., Any], hyper: type) -> Rule:
    """The closed form of a history as a rule, so that the kernels of rules run it."""

    def prepare(t):  # type: ignore[no-untyped-def]
        return hyper(*[0.0] * len(hyper._fields))  # type: ignore[attr-defined]

    return Rule(scalar, prepare)  # type: ignore[arg-type]
