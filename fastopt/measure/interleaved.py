"""How everything is timed: the contestants take turns in one run (A B C, C B A, ...), and medians are compared.

Absolute times of two runs are not comparable on a shared machine; a ratio within one run is, because a drift of the
machine hits all contestants alike.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

SAMPLE = 500e-6  # seconds; a faster call is repeated until a sample takes this long
WARM = 4e-3  # seconds before each sample: the threads of the last contestant's OpenMP spin for some milliseconds
SLOW = 50e-3  # seconds; to a call that takes longer, neither that nor what is in the caches makes a difference


class Spread(NamedTuple):
    """The times of one contestant, in seconds per call: their median, and what 8 of 10 samples lie between.

    Args:
        median: of the samples; > 0, in seconds.
        low: their 10th percentile; > 0, in seconds.
        high: their 90th percentile; > 0, in seconds.
        samples: the number of them, from 1.

    >>> Spread.of([3e-6, 1e-6, 2e-6]).median
    2e-06
    """

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """The spread of some samples.

        Args:
            times: at least one, in seconds per call.

        Returns:
            A `Spread`; percentiles between two samples are interpolated linearly.

        >>> spread = Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
        >>> [round(x, 1) for x in spread]
        [3.0, 1.4, 4.6, 5]
        """
        low, median, high = (float(x) for x in np.percentile(times, (10, 50, 90)))
        return cls(median, low, high, len(times))


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    rounds: int = 5,
    before: Mapping[str, Callable[[], object]] | None = None,
    after_round: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Seconds per call of each contestant, from at least `rounds` rounds and about `seconds` in all.

    Every contestant is called twice before the first round. In a round each of them runs warm for 4 ms (a call of
    more than 50 ms is not made twice), and then for one sample of at least half a millisecond; the next round goes the
    other way round.

    Args:
        contestants: by name; at least one.
        seconds: the rounds go on for so long; a number > 0.
        rounds: so many at least, from 1.
        before: by name, what a contestant needs done before it runs. It is not part of the sample.
        after_round: called after each round, for a progress bar.
        clock: returns seconds.

    Returns:
        A dict of `Spread`, by name, in the order of `contestants`.

    >>> spreads = interleave({"sum": lambda: sum(range(100)), "list": lambda: list(range(100))}, seconds=0.01)
    >>> [name for name, spread in spreads.items() if spread.low <= spread.median <= spread.high]
    ['sum', 'list']
    """
    before = before or {}
    takes, repeats = {}, {}
    for name, call in contestants.items():
        for _ in range(2):  # the first compiles, and touches the memory
            if name in before:
                before[name]()
            start = clock()
            call()
        takes[name] = clock() - start
        repeats[name] = max(1, round(SAMPLE / max(takes[name], 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    collecting = gc.isenabled()
    gc.disable()  # as timeit does: whose turn it is when the garbage of all is collected is chance
    try:
        stop = clock() + seconds
        while clock() < stop or len(times[order[0]]) < rounds:
            for name in order:
                times[name].append(_sample(contestants[name], repeats[name], takes[name], before.get(name), clock))
            order.reverse()
            if after_round is not None:
                after_round()
    finally:
        if collecting:
            gc.enable()
    return {name: Spread.of(samples) for name, samples in times.items()}


def _sample(
    call: Callable[[], object],
    repeat: int,
    takes: float,
    before: Callable[[], object] | None,
    clock: Callable[[], float],
) -> float:
    """Seconds per call of one sample, taken warm."""
    if before is not None:
        before()
    start = clock()
    while takes < SLOW and clock() - start < WARM:
        call()  # what fits into the cache is there again, after the others have had their turn
    if before is not None:
        before()
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat
