"""Interleaved timing: the contestants take turns in one run (A B C, C B A, ...), and each round is compared.

On a shared machine absolute times of two runs are not comparable. Ratios within one round are comparable, because a
drift of the machine affects all contestants alike. The time of a turn is that of its fastest sample, which excludes
short interruptions by other programs.

Two errors remain: drifts over seconds, and the place of the arrays in memory. To average them, visit a case several
times with new arrays.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

SAMPLE = 200e-6  # seconds; a faster call is repeated until a sample takes this long
SAMPLES = 8  # samples per turn, of which the fastest counts
TURN = 4e-3  # seconds of a turn after which no further sample starts
WARM = 4e-3  # seconds of warm-up before each turn: OpenMP threads of the previous contestant spin for milliseconds
SLOW = 50e-3  # seconds; a longer call needs no warm-up, because spinning threads and cold caches hardly affect it


class Spread(NamedTuple):
    """The times of one contestant, in seconds per call: their median, and the range of 8 of 10 rounds.

    Args:
        median: median of the rounds; > 0, in seconds.
        low: 10th percentile; > 0, in seconds.
        high: 90th percentile; > 0, in seconds.
        rounds: number of rounds, from 1.
        ratio: time as a multiple of the first contestant's: the median of the rounds' ratios.

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
        """Return the spread of the times of some rounds.

        Args:
            times: at least one time, in seconds per call.
            first: times of the first contestant in the same rounds, of the same length.

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
    """Measure the seconds per call of each contestant, in at least `rounds` rounds and about `seconds` in all.

    Every contestant is called twice before the first round. In a round each contestant first warms up for 4 ms (unless
    a call takes more than 50 ms), and then runs up to eight samples of at least 0.2 ms within 4 ms, of which the
    fastest counts. The next round reverses the order.

    Args:
        contestants: functions by name; at least one.
        seconds: duration of the rounds, > 0.
        rounds: minimum number of rounds, from 1.
        before: functions by name, called before a contestant's samples and not timed.
        after_round: function to call after each round, for a progress bar.
        times: times of earlier visits to the same contestants by name; new times are appended. Pass {} first.
        clock: function that returns seconds.

    Returns:
        A dict of `Spread`, by name, in the order of `contestants`.

    >>> spreads = interleave({"sum": lambda: sum(range(100)), "list": lambda: list(range(100))}, seconds=0.01)
    >>> [name for name, spread in spreads.items() if spread.low <= spread.median <= spread.high]
    ['sum', 'list']
    """
    before = before or {}
    takes, repeats = {}, {}
    for name, call in contestants.items():
        for _ in range(2):  # the first call compiles and touches the memory
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
    gc.disable()  # as timeit does: a collection would hit a random contestant
    try:
        stop = clock() + seconds
        while clock() < stop or made < rounds:
            turns = {
                name: _turn(contestants[name], repeats[name], takes[name], before.get(name), clock) for name in order
            }
            for name in contestants:  # store whole rounds only, even after an interrupt
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
    """Return the seconds per call of the fastest sample of a turn, after the warm-up."""
    if before is not None:
        before()
    start = clock()
    while takes < SLOW and clock() - start < WARM:
        call()  # refills the caches, which the other contestants have used
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
