"""How everything is timed: the contestants take turns in one run (A B C, C B A, ...), and each round is compared.

Absolute times of two runs are not comparable on a shared machine; a ratio within one round is, because a drift of the
machine hits all contestants alike. A turn's time is that of its fastest sample, for all: what another program takes
away for a moment is no property of a contestant.

Measured, the ratio of the same two contestants in windows of 1.5 s (standard deviation of its logarithm): the ratio of
the medians of single samples 3-10 %, the median of the ratios 2-8 %, that of the fastest of eight 1.5-5 %; 11-13 %
whichever way for torch with two threads below a million parameters. What is left are drifts of seconds and where in
memory the arrays come to lie: visit a case several times, and make it anew.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

SAMPLE = 200e-6  # seconds; a faster call is repeated until a sample takes this long
SAMPLES = 8  # of a turn, of which the fastest counts
TURN = 4e-3  # seconds after which no further sample is begun
WARM = 4e-3  # seconds before each turn: the threads of the last contestant's OpenMP spin for some milliseconds
SLOW = 50e-3  # seconds; to a call that takes longer, neither that nor what is in the caches makes a difference


class Spread(NamedTuple):
    """The times of one contestant, in seconds per call: their median, and what 8 of 10 rounds lie between.

    Args:
        median: of the rounds; > 0, in seconds.
        low: their 10th percentile; > 0, in seconds.
        high: their 90th percentile; > 0, in seconds.
        rounds: the number of them, from 1.
        ratio: how many times as long as the first contestant it takes: the median of the ratios of the rounds.

    >>> Spread.of([3e-6, 1e-6, 2e-6], [1e-6, 1e-6, 1e-6]).median
    2e-06
    """

    median: float
    low: float
    high: float
    rounds: int
    ratio: float

    @classmethod
    def of(cls, times: Sequence[float], first: Sequence[float]) -> Spread:
        """The spread of the times of some rounds.

        Args:
            times: at least one, in seconds per call.
            first: those of the first contestant in the same rounds, as many.

        Returns:
            A `Spread`; percentiles between two rounds are interpolated linearly.

        >>> spread = Spread.of([4.0, 1.0, 2.0, 3.0, 5.0], [2.0, 1.0, 1.0, 1.0, 5.0])
        >>> [round(x, 1) for x in spread]
        [3.0, 1.4, 4.6, 5, 2.0]
        """
        low, median, high = (float(x) for x in np.percentile(times, (10, 50, 90)))
        return cls(median, low, high, len(times), float(np.median(np.divide(times, first))))


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    rounds: int = 5,
    before: Mapping[str, Callable[[], object]] | None = None,
    after_round: Callable[[], object] | None = None,
    times: dict[str, list[float]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Seconds per call of each contestant, from at least `rounds` rounds and about `seconds` in all.

    Every contestant is called twice before the first round. In a round each of them runs warm for 4 ms (a call of
    more than 50 ms is not made twice), and then for up to eight samples of at least 0.2 ms, in 4 ms, of which the
    fastest counts; the next round goes the other way round.

    Args:
        contestants: by name; at least one.
        seconds: the rounds go on for so long; a number > 0.
        rounds: so many at least, from 1.
        before: by name, what a contestant needs done before it runs. It is not part of the sample.
        after_round: called after each round, for a progress bar.
        times: those of earlier visits to the same contestants, by name, to which the new ones are added; {} at first.
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
    times = {} if times is None else times
    order = list(contestants)
    made = 0
    collecting = gc.isenabled()
    gc.disable()  # as timeit does: whose turn it is when the garbage of all is collected is chance
    try:
        stop = clock() + seconds
        while clock() < stop or made < rounds:
            turns = {
                name: _turn(contestants[name], repeats[name], takes[name], before.get(name), clock) for name in order
            }
            for name in contestants:  # whole rounds only, also where one is interrupted
                times.setdefault(name, []).append(turns[name])
            made += 1
            order.reverse()
            if after_round is not None:
                after_round()
    finally:
        if collecting:
            gc.enable()
    first = times[next(iter(contestants))]
    return {name: Spread.of(times[name], first) for name in contestants}


def _turn(
    call: Callable[[], object],
    repeat: int,
    takes: float,
    before: Callable[[], object] | None,
    clock: Callable[[], float],
) -> float:
    """Seconds per call of the fastest sample of a turn, taken warm."""
    if before is not None:
        before()
    start = clock()
    while takes < SLOW and clock() - start < WARM:
        call()  # what fits into the cache is there again, after the others have had their turn
    fastest = math.inf
    began = clock()
    for _ in range(SAMPLES):
        if before is not None:
            before()
        start = clock()
        for _ in range(repeat):
            call()
        stop = clock()
        fastest = min(fastest, (stop - start) / repeat)
        if stop - began >= TURN:
            break
    return fastest
