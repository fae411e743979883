"""A step in company: between the matrix products of an iteration, and beside busy processes.

A step alone is measured by its fastest samples. In company the products are measured as well: threads that keep
spinning after a step slow the following products, and threads that wake up late delay the step.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from fastopt import get_num_threads, set_num_threads
from fastopt.kernels.driver import DRIVER
from fastopt.measure.interleaved import Spread

PAUSE = 0.03  # seconds before each turn, for the threads of the previous contestant to go to sleep
UNCOUNTED = 10  # first iterations of each turn, which are not counted


class Part(NamedTuple):
    """The times of one part of an iteration, in seconds.

    Args:
        spread: `Spread` of the medians of the rounds; contestants are compared by it.
        mean: mean over all iterations.
        p99: 99th percentile of all iterations.

    >>> Part(Spread(2e-6, 1e-6, 3e-6, 5, 1.0), 2.5e-6, 9e-6).mean
    2.5e-06
    """

    spread: Spread
    mean: float
    p99: float


def products(rows: int = 256, width: int = 512) -> Callable[[], object]:
    """Return two products of float32 matrices, (rows, width) by (width, width): stand-ins for forward and backward.

    Args:
        rows: number of rows of the first matrix; at least 1.
        width: number of columns of both matrices; at least 1.

    Returns:
        A function without arguments that computes the products.

    >>> products(2, 3)().shape
    (2, 3)
    """
    rng = np.random.default_rng(0)
    X, W = (rng.standard_normal(shape, np.float32) for shape in ((rows, width), (width, width)))

    def work() -> object:
        X @ W
        return X @ W

    return work


Step = Callable[[], object]


def ways(step: Step, *, openmp: bool = False) -> tuple[dict[str, Step], dict[str, Callable[[], None]]]:
    """Return a fastopt step as contestants: unchanged, on one thread and, on request, on OpenMP's threads.

    Args:
        step: a function without arguments.
        openmp: whether to add numba's OpenMP threads, which fastopt uses where it has no thread pool.

    Returns:
        Two dicts by name: the steps, and the functions to call before a contestant's turn. These functions change the
        number of threads of the whole process: use them inside ``with using(...)`` of `fastopt.kernels.threads`.

    >>> list(ways(lambda: None)[0])
    ['fastopt', 'one thread']
    """
    count = get_num_threads()

    def on(threads: int, mode: str | None) -> Callable[[], None]:
        def switch() -> None:
            set_num_threads(threads)
            DRIVER.choose(mode)

        return switch

    before = {"fastopt": on(count, None), "one thread": on(1, None)}
    if openmp:
        before["OpenMP"] = on(count, "numba")
    return dict.fromkeys(before, step), before


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run other processes that compute without a pause, inside a ``with`` block.

    Args:
        count: number of processes, from 0.

    >>> with busy_processes(1):
    ...     pass
    """
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3 if others else 0.0)
        yield
    finally:
        for other in others:
            other.kill()
        for other in others:
            other.wait()


def accompany(
    work: Callable[[], object],
    steps: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: int = 5,
    before: Mapping[str, Callable[[], object]] | None = None,
    after_round: Callable[[], object] | None = None,
    times: dict[str, list[np.ndarray]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Part]]:
    """Time iterations of `work` and a step; the contestants take turns (A B C, C B A, ...).

    Args:
        work: function to call before each step.
        steps: functions by name; at least one, fastopt's first.
        seconds: duration of the measurement, > 0.
        rounds: number of turns of each contestant, from 1.
        before: functions by name, called before a contestant's turn.
        after_round: function to call after each round.
        times: times of earlier visits by name; new times are appended. One array of shape (3, n) per turn: the times of
            n iterations, their work and their steps. Pass {} first.
        clock: function that returns seconds.

    Returns:
        For ``"iteration"``, ``"work"`` and ``"step"``, a `Part` for each contestant.

    >>> parts = accompany(lambda: sum(range(1000)), {"a": lambda: None, "b": lambda: sum(range(9000))}, seconds=0.05)
    >>> parts["step"]["b"].spread.median > parts["step"]["a"].spread.median
    True
    """
    before = before or {}
    times = {} if times is None else times
    turn = seconds / rounds / len(steps)
    for number in range(rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            if name in before:
                before[name]()
            time.sleep(min(PAUSE, turn / 4))
            times.setdefault(name, []).append(_turn(work, steps[name], turn, clock))
        if after_round is not None:
            after_round()
    parts: dict[str, dict[str, Part]] = {}
    for k, part in enumerate(("iteration", "work", "step")):
        medians = {name: [float(np.median(turn[k])) for turn in turns] for name, turns in times.items()}
        first = next(iter(medians.values()))
        parts[part] = {}
        for name, turns in times.items():
            everything = np.concatenate([turn[k] for turn in turns])
            spread = Spread.of(medians[name], first)
            parts[part][name] = Part(spread, float(everything.mean()), float(np.percentile(everything, 99)))
    return parts


def _turn(
    work: Callable[[], object], step: Callable[[], object], seconds: float, clock: Callable[[], float]
) -> np.ndarray:
    """Return the times of one turn: a row for whole iterations, one for the work, one for the steps."""
    found: list[tuple[float, float, float]] = []
    end = clock() + seconds
    while len(found) < UNCOUNTED + 3 or clock() < end:
        begun = clock()
        work()
        between = clock()
        step()
        found.append((clock() - begun, between - begun, clock() - between))
    return np.array(found[UNCOUNTED:]).T
