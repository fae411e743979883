"""`Clock`: when each row of a parameter was updated last; the checks of row-wise gradients, and their sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fastopt.flat import Layout
from fastopt.idle import History
from fastopt.rule import Rule


class Clock:
    """When each row of one parameter was updated last, counted in steps since all of them were up to date."""

    def __init__(self, rows: int, history: History):
        self.history = history
        self.now = 0
        self.last = np.zeros(rows, np.int32)
        self.replay: list[np.ndarray] = []
        """The table's row of each step."""

    def tick(self, touched: np.ndarray, line: np.ndarray) -> None:
        """A step was made that updated these rows; `line` is its row of the table."""
        self.now += 1
        self.last[touched] = self.now
        self.replay.append(line)


def check_indices(name: str, indices: Any, rows: int) -> np.ndarray:
    """`indices` as int64; an error that names them unless they are 1-D integers in [0, rows)."""
    array = np.asarray(indices)
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


def check_row_grads(name: str, grads: Any, indices: np.ndarray, param: np.ndarray) -> np.ndarray:
    """`grads`; an error that names them unless they hold a row for each index, in the dtype of the parameter."""
    if not isinstance(grads, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array of row gradients, found {type(grads).__name__}")
    if grads.dtype != param.dtype:
        raise TypeError(
            f"{name}: expected dtype {param.dtype.str!r} as the parameter's, found {grads.dtype.str!r}; "
            f"use grad.astype({param.dtype.name!r})"
        )
    expected = (indices.size, param.shape[1])
    if grads.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, a row for each index, found {grads.shape}")
    return np.ascontiguousarray(grads)


def summed(indices: np.ndarray, grads: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every index once, and the sum of its rows of `grads`. `scratch`: int32, one per row; overwritten."""
    order = np.arange(indices.size, dtype=np.int32)
    scratch[indices] = order
    if (scratch[indices] == order).all():  # none is repeated
        return indices, grads
    by_row = np.argsort(indices, kind="stable")
    ordered = indices[by_row]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return ordered[starts], np.add.reduceat(grads[by_row], starts, axis=0)


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
