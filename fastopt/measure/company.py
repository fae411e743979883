"""A step in the company it lives in: between the matrix products of an iteration, and beside busy processes.

Alone, a step is measured by its fastest samples. Here its neighbours are what is measured, too: threads that spin on
after a step slow the products that follow, and threads that do not come in time hold up the step.
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

PAUSE = 0.03  # seconds before each turn, in which the threads of the last contestant go to sleep
UNCOUNTED = 10  # iterations of each turn


class Part(NamedTuple):
    """What a part of an iteration took, in seconds.

    Args:
        spread: of the medians of the rounds, by which contestants are compared.
        mean: of all iterations.
        p99: the 99th percentile of all iterations.

    >>> Part(Spread(2e-6, 1e-6, 3e-6, 5, 1.0), 2.5e-6, 9e-6).mean
    2.5e-06
    """

    spread: Spread
    mean: float
    p99: float


def products(rows: int = 256, width: int = 512) -> Callable[[], object]:
    """Two products of float32 matrices, (rows, width) by (width, width), as of a forward and a backward pass.

    Args:
        rows: of the first matrix; at least 1.
        width: of both; at least 1.

    Returns:
        A function without arguments.

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
    """A step of ours as contestants: as it is, on one thread and, on request, on OpenMP's threads.

    Args:
        step: a function without arguments.
        openmp: whether numba's OpenMP threads take part, as where fastopt has no threads of its own.

    Returns:
        Two dicts by name: of the steps, and of what has to be called before a contestant's turn. It changes the number
        of threads for the whole process: use it inside ``with using(...)`` of `fastopt.kernels.threads`.

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
    """Have other processes compute all the time, inside a ``with`` block.

    Args:
        count: how many; from 0.

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
    """Time iterations of `work` and a step, the contestants taking turns (A B C, C B A, ...).

    Args:
        work: what comes before each step.
        steps: by name; at least one, and the first is ours.
        seconds: to be spent, a number > 0.
        rounds: the number of turns of each contestant; from 1.
        before: by name, what is done before a contestant's turn.
        after_round: called after each round.
        times: those of earlier visits, by name, to which the new ones are added, an array of shape (3, n) a turn: of n
            iterations, their work and their steps; {} at first.
        clock: returns seconds.

    Returns:
        For ``"iteration"``, ``"work"`` and ``"step"`` a `Part` for each contestant.

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
    """Rows of the whole iterations, of the work and of the steps."""
    found: list[tuple[float, float, float]] = []
    end = clock() + seconds
    while len(found) < UNCOUNTED + 3 or clock() < end:
        begun = clock()
        work()
        between = clock()
        step()
        found.append((clock() - begun, between - begun, clock() - between))
    return np.array(found[UNCOUNTED:]).T
