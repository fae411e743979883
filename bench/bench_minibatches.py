"""Benchmarks of fastopt.minibatches: gathering against `X[rows]` and other ways, epochs against a loop by hand.

Run with `pytest bench/bench_minibatches.py --benchmark-enable --benchmark-json=FILE`. The ratios in `extra_info` are
the figures to trust: they come from runs that alternate, ours and the other (A B, B A, ...), on rows not touched just
before, so that drifts of the machine hit both alike. Below 1 ours is faster. Nothing is asserted here.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

import fastopt
from fastopt.batches import _gathers_by_take

Array = NDArray[Any]

DATA_BYTES = 128 * 2**20  # beyond the caches, as real data is
MOST_ROWS = 1_000_000


def interleaved_ratio(
    ours: Callable[[], object], other: Callable[[], object], seconds: float = 0.25
) -> tuple[float, int]:
    """Median time of `ours` over that of `other`, from alternating runs of about 0.5 ms, and the number of pairs."""
    start = time.perf_counter()
    ours(), other()
    calls = max(1, int(1e-3 / (time.perf_counter() - start)))
    times: dict[Callable[[], object], list[float]] = {ours: [], other: []}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[ours]) < 15:
        pair = (ours, other) if len(times[ours]) % 2 else (other, ours)  # each goes first every second time
        for run in pair:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[run].append((time.perf_counter() - start) / calls)
    return statistics.median(times[ours]) / statistics.median(times[other]), len(times[ours])


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
    "np.take": lambda X, rows: np.take(X, rows, axis=0),
    "take into out": lambda X, rows: X.take(rows, 0, np.empty((rows.size, *X.shape[1:]), X.dtype), "clip"),
    "njit kernel": by_kernel,
}


def data(width: int | None, dtype: str) -> Array:
    """An array of DATA_BYTES (or MOST_ROWS rows), 1-D if `width` is None."""
    rows = min(MOST_ROWS, DATA_BYTES // ((width or 1) * np.dtype(dtype).itemsize))
    return np.ones((rows,) if width is None else (rows, width), dtype)


def random_rows(count: int, batch: int) -> Iterator[Array]:
    """Batches of row numbers, epoch after epoch, without end."""
    order = np.random.default_rng(0).permutation(count)
    return itertools.cycle([order[start : start + batch] for start in range(0, count - batch + 1, batch)])


def measure(benchmark: Any, X: Array, batch: int, way: Callable[[Array], Array]) -> None:
    rows = random_rows(len(X), batch)

    def indexing(chosen: Array) -> Array:  # a function as `way` is one: a call takes as long as a small batch
        return X[chosen]

    ratio, pairs = interleaved_ratio(lambda: way(next(rows)), lambda: indexing(next(rows)))
    benchmark.extra_info.update(ratio_to_indexing=round(ratio, 3), pairs=pairs)
    benchmark.pedantic(way, setup=lambda: ((next(rows),), {}), rounds=50)


@pytest.mark.parametrize("batch", [1, 32, 256, 4096])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8"])
@pytest.mark.parametrize("width", [None, 1, 10, 64, 784, 3072])
def test_gather(benchmark: Any, width: int | None, dtype: str, batch: int) -> None:
    X = data(width, dtype)
    measure(benchmark, X, batch, (lambda rows: X.take(rows, 0)) if _gathers_by_take(X) else (lambda rows: X[rows]))


@pytest.mark.parametrize("batch", [1, 32, 256, 4096])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8"])
def test_take_from_one_axis(benchmark: Any, dtype: str, batch: int) -> None:
    X = data(None, dtype)
    measure(benchmark, X, batch, lambda rows: X.take(rows, 0))


@pytest.mark.parametrize("batch", [1, 32, 256, 4096])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [1, 10, 64, 784, 3072])
def test_other_ways_to_gather(benchmark: Any, width: int, way: str, batch: int) -> None:
    X = data(width, "float32")
    measure(benchmark, X, batch, lambda rows: WAYS[way](X, rows))


def epoch_by_hand(rng: np.random.Generator, X: Array, y: Array, batch: int) -> None:
    order = rng.permutation(len(X))
    for start in range(0, len(X), batch):
        rows = order[start : start + batch]
        _ = X[rows], y[rows]


@pytest.mark.parametrize("batch", [1, 64, 1024])
@pytest.mark.parametrize("shape", [(1797, 64), (20_000, 784), (5_000, 3, 32, 32)], ids=str)
def test_epoch(benchmark: Any, shape: tuple[int, ...], batch: int) -> None:
    X, y = np.ones(shape, np.float32), np.ones(shape[0], np.int64)
    batches = fastopt.minibatches(X, y, batch_size=batch, rng=0)
    rng = np.random.default_rng(0)

    def epoch() -> None:
        for _ in batches:
            pass

    ratio, pairs = interleaved_ratio(epoch, lambda: epoch_by_hand(rng, X, y, batch), seconds=1.0)
    benchmark.extra_info.update(ratio_to_loop_by_hand=round(ratio, 3), pairs=pairs)
    benchmark.pedantic(epoch, rounds=5)
