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
from numpy.typing import NDArray

import fastopt
from fastopt.batches import _gathers_by_take
from fastopt.measure import compare

Array = NDArray[Any]

DATA_BYTES = 128 * 2**20  # larger than the caches, like real data
MOST_ROWS = 1_000_000


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


@pytest.mark.parametrize("batch", [1, 32, 256, 4096])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [*((width, "float32") for width in (None, 1, 10, 64, 784, 3072)), (None, "int64"), (784, "uint8")],
)
def test_gather(measure, width, dtype, batch):
    def case(title: str, **options: Any) -> Any:
        X = data(width, dtype)
        rows = random_rows(len(X), batch)
        ours = WAYS["np.take"] if _gathers_by_take(X) else WAYS["X[rows]"]
        ways = {"fastopt": (lambda X, rows: X.take(rows, 0)) if _gathers_by_take(X) else ours, **WAYS}
        if width is None:
            del ways["njit kernel"]  # this kernel needs rows
        calls = {name: lambda way=way: way(X, next(rows)) for name, way in ways.items()}
        return compare(title, calls, width=width, batch=batch, dtype=dtype, **options)

    name = "vector" if width is None else f"rows of {width}"
    measure(case, f"{batch} of {name}, {dtype}", seconds=0.3)


def epoch_by_hand(rng: np.random.Generator, X: Array, y: Array, batch: int) -> None:
    order = rng.permutation(len(X))
    for start in range(0, len(X), batch):
        rows = order[start : start + batch]
        _ = X[rows], y[rows]


@pytest.mark.parametrize("batch", [1, 64, 1024])
@pytest.mark.parametrize("shape", [(1797, 64), (20_000, 784), (5_000, 3, 32, 32)], ids=str)
def test_epoch(measure, shape, batch):
    def case(title: str, **options: Any) -> Any:
        X, y = np.ones(shape, np.float32), np.ones(shape[0], np.int64)
        batches = fastopt.minibatches(X, y, batch_size=batch, rng=0)
        rng = np.random.default_rng(0)

        def epoch() -> None:
            for _ in batches:
                pass

        return compare(title, {"fastopt": epoch, "by hand": lambda: epoch_by_hand(rng, X, y, batch)}, **options)

    measure(case, f"epoch of {'x'.join(map(str, shape))}, batches of {batch}", seconds=0.6)
