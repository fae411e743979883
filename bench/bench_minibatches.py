"""fastopt.minibatches: gathering rows against `X[rows]` and other methods, epochs against a hand-written loop.

Every call gathers different rows, so no call reads rows that were just used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
from groups import Group, by_name, each_contestant
from numpy.typing import NDArray

import fastopt
from fastopt.batches import _gathers_by_take
from fastopt.measure import Result, compare

Array = NDArray[Any]

DATA_BYTES = 128 * 2**20  # larger than the caches, like real data
MOST_ROWS = 1_000_000
WIDTHS = (None, 1, 10, 64, 784, 3072)
"""Lengths of the rows; None stands for a vector."""


@numba.njit(error_model="numpy")
def copy_rows(X: Array, rows: Array, out: Array) -> None:
    for i in range(rows.size):
        source, target = X[rows[i]], out[i]
        for j in range(source.size):
            target[j] = source[j]


def by_kernel(X: Array, rows: Array) -> Array:
    out = np.empty((rows.size, *X.shape[1:]), X.dtype)
    copy_rows(X, rows, out)
    return out


WAYS: dict[str, Callable[[Array, Array], Array]] = {
    "X[rows]": lambda X, rows: X[rows],  # a function like the others: a call costs as much as a small batch
    "np.take": lambda X, rows: np.take(X, rows, axis=0),
    "take into out": lambda X, rows: X.take(rows, 0, np.empty((rows.size, *X.shape[1:]), X.dtype), "clip"),
    "njit kernel": by_kernel,
}


def data(width: int | None, dtype: str) -> Array:
    """Return an array of DATA_BYTES (or MOST_ROWS rows), 1-D if `width` is None."""
    rows = min(MOST_ROWS, DATA_BYTES // ((width or 1) * np.dtype(dtype).itemsize))
    return np.ones((rows,) if width is None else (rows, width), dtype)


def random_rows(count: int, batch: int) -> Iterator[Array]:
    """Yield batches of row numbers, epoch after epoch, endlessly."""
    order = np.random.default_rng(0).permutation(count)
    return itertools.cycle([order[start : start + batch] for start in range(0, count - batch + 1, batch)])


def gathering(batch: int, width: int | None, dtype: str) -> Group:
    ways = {name: way for name, way in WAYS.items() if width is not None or way is not by_kernel}  # which needs rows

    def run(title: str, **how: Any) -> Result:
        X = data(width, dtype)
        rows = random_rows(len(X), batch)
        ours = (lambda X, rows: X.take(rows, 0)) if _gathers_by_take(X) else WAYS["X[rows]"]
        calls = {name: lambda way=way: way(X, next(rows)) for name, way in {"fastopt": ours, **ways}.items()}
        return compare(title, calls, width=width, batch=batch, dtype=dtype, **how)

    title = f"{batch} of {'vector' if width is None else f'rows of {width}'}, {dtype}"
    return Group(f"gather {title}", ("fastopt", *ways), run, 0.3, title=title)


GATHERING = by_name(
    gathering(batch, width, dtype)
    for width, dtype in [*((width, "float32") for width in WIDTHS), (None, "int64"), (784, "uint8")]
    for batch in (1, 32, 256, 4096)
)


@pytest.mark.parametrize(**each_contestant(GATHERING))
def test_gather(measure, group, contestant):
    measure(GATHERING[group], contestant)


def epoch_by_hand(rng: np.random.Generator, X: Array, y: Array, batch: int) -> None:
    order = rng.permutation(len(X))
    for start in range(0, len(X), batch):
        rows = order[start : start + batch]
        _ = X[rows], y[rows]


def epochs(shape: tuple[int, ...], batch: int) -> Group:
    def run(title: str, **how: Any) -> Result:
        X, y = np.ones(shape, np.float32), np.ones(shape[0], np.int64)
        batches = fastopt.minibatches(X, y, batch_size=batch, rng=0)
        rng = np.random.default_rng(0)

        def epoch() -> None:
            for _ in batches:
                pass

        return compare(title, {"fastopt": epoch, "by hand": lambda: epoch_by_hand(rng, X, y, batch)}, **how)

    return Group(f"epoch of {'x'.join(map(str, shape))}, batches of {batch}", ("fastopt", "by hand"), run, 0.6)


EPOCHS = by_name(
    epochs(shape, batch) for shape in ((1797, 64), (20_000, 784), (5_000, 3, 32, 32)) for batch in (1, 64, 1024)
)


@pytest.mark.parametrize(**each_contestant(EPOCHS))
def test_epoch(measure, group, contestant):
    measure(EPOCHS[group], contestant)
