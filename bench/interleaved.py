"""How everything here is timed: the contestants take turns in one run (A B C, C B A, ...), and medians are compared.

Absolute times of two runs are not comparable on a shared machine; a ratio within one run is, because a drift of the
machine hits all contestants alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

SAMPLE = 500e-6  # seconds; a faster call is repeated until a sample takes this long
WARM = 4e-3  # seconds before each sample: the threads of the last contestant's OpenMP spin for some milliseconds


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    rounds: int = 7,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median seconds of one call of each contestant, from at least `rounds` rounds and about `seconds` in all.

    before: what a contestant needs done before a sample, and is not part of it.
    """
    before = before or {}
    repeats = {}
    for name, call in contestants.items():
        call()  # compiles, and touches the memory
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(SAMPLE / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(samples[order[0]]) < rounds:
        for name in order:
            call, repeat = contestants[name], repeats[name]
            start = time.perf_counter()
            while time.perf_counter() - start < WARM:
                call()  # what fits into the cache is there again, after the others have had their turn
            if name in before:
                before[name]()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            samples[name].append((time.perf_counter() - start) / repeat)
        order.reverse()
    return {name: statistics.median(times) for name, times in samples.items()}
