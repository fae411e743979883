"""Compare contestants in a `Result`: times with their spread, bandwidth, share of the limit, and absent rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt import get_num_threads
from fastopt.measure import batchnorm, machine
from fastopt.measure.company import accompany, products
from fastopt.measure.interleaved import Spread, interleave
from fastopt.measure.limit import bytes_of, limit_of
from fastopt.measure.rivals import RIVALS, Contestant, Work, enter, of_fastopt

OURS = "fastopt"
LIMIT = "limit"


class Result(NamedTuple):
    """One interleaved run. The first contestant is fastopt.

    Args:
        title: title of the table row.
        seconds: `Spread` of the calls, by contestant; at least one.
        absent: reasons of rivals that did not take part, by name.
        bytes: number of bytes that a call must read and write, or None if unknown.
        facts: description of the measurement, for charts; values that JSON can hold.

    >>> spreads = {"fastopt": Spread(1e-6, 9e-7, 2e-6, 30, 1), "numpy": Spread(3e-6, 3e-6, 4e-6, 30, 3)}
    >>> result = Result("SGD", spreads, {})
    >>> result.ours.median, round(result.times("numpy"), 3)
    (1e-06, 3)
    """

    title: str
    seconds: dict[str, Spread]
    absent: dict[str, str]
    bytes: int | None = None
    facts: Mapping[str, Any] = {}

    @property
    def ours(self) -> Spread:
        """The times of the first contestant."""
        return next(iter(self.seconds.values()))

    def times(self, name: str) -> float | None:
        """Return a contestant's time as a multiple of fastopt's.

        Formula: the median over the rounds of ``time(name) / time(ours)``, no unit.

        Args:
            name: name of the contestant.

        Returns:
            A float > 0; None if the contestant did not take part.

        >>> Result("sum", {"a": Spread(2.0, 2.0, 2.0, 1, 1.0), "b": Spread(3.0, 3.0, 3.0, 1, 1.5)}, {}).times("b")
        1.5
        """
        return self.seconds[name].ratio if name in self.seconds else None

    def bandwidth(self, name: str = OURS) -> float | None:
        """Return the rate at which a contestant moves `bytes`; rates above the memory's come from caches.

        Formula: ``1e-9 bytes / median(name)``, in GB/s (1e9 bytes).

        Args:
            name: name of the contestant.

        Returns:
            A float > 0; None if the contestant did not take part, or `bytes` is None.

        >>> Result("copy", {"fastopt": Spread(0.5, 0.5, 0.5, 1, 1.0)}, {}, bytes=10**9).bandwidth()
        2.0
        """
        if self.bytes is None or name not in self.seconds:
            return None
        return 1e-9 * self.bytes / self.seconds[name].median

    def record(self) -> dict[str, Any]:
        """Return the result for JSON, with times rounded to four digits.

        Returns:
            A dict of the fields by name; a `Spread` is the list ``[median, low, high, rounds, ratio]``.

        >>> Result("copy", {"fastopt": Spread(1 / 3, 0.25, 0.5, 9, 1.0)}, {}).record()["seconds"]
        {'fastopt': [0.3333, 0.25, 0.5, 9, 1.0]}
        """
        spreads = {
            name: [spread.rounds if field == "rounds" else float(f"{x:.4g}") for field, x in spread._asdict().items()]
            for name, spread in self.seconds.items()
        }
        return {
            "title": self.title,
            "seconds": spreads,
            "absent": dict(self.absent),
            "bytes": self.bytes,
            "facts": dict(self.facts),
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Result:
        """Return the result of a record, to the record's four digits.

        Args:
            record: return value of `record`, also after a round trip through JSON.

        Returns:
            A `Result`.

        >>> result = Result("copy", {"fastopt": Spread(0.3, 0.25, 0.5, 9, 1.0)}, {"torch": "not installed"}, bytes=80)
        >>> Result.of(result.record()) == result
        True
        """
        seconds = {name: Spread(*numbers) for name, numbers in record["seconds"].items()}
        return cls(record["title"], seconds, dict(record["absent"]), record["bytes"], dict(record["facts"]))


def compare(
    title: str,
    contestants: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: int = 5,
    before: Mapping[str, Callable[[], object]] | None = None,
    after_round: Callable[[], object] | None = None,
    times: dict[str, list[float]] | None = None,
    absent: Mapping[str, str] | None = None,
    moved: int | None = None,
    **facts: Any,
) -> Result:
    """Time contestants with `interleave` and return a `Result`.

    Args:
        title: title of the table row.
        contestants: as for `interleave`; fastopt's first.
        seconds: as for `interleave`, > 0.
        rounds: as for `interleave`, from 1.
        before: as for `interleave`.
        after_round: as for `interleave`.
        times: as for `interleave`.
        absent: reasons of rivals that do not take part, by name.
        moved: number of bytes that a call must read and write, or None if unknown.
        **facts: description of the measurement; values that JSON can hold.

    Returns:
        A `Result`.

    >>> result = compare("sums", {"a": lambda: sum(range(1000)), "b": lambda: sum(range(9000))}, seconds=0.01)
    >>> result.times("b") > 1
    True
    """
    spreads = interleave(contestants, seconds, rounds, before, after_round, times)
    return Result(title, spreads, dict(absent or {}), moved, facts)


def compare_step(
    title: str,
    work: Work,
    rivals: Sequence[str] = tuple(RIVALS),
    *,
    seconds: float,
    rounds: int = 5,
    limit: bool = True,
    left_out: Mapping[str, str] | None = None,
    after_round: Callable[[], object] | None = None,
    times: dict[str, list[float]] | None = None,
) -> Result:
    """Compare a step of fastopt with the memory limit and with rivals.

    Args:
        title: title of the table row.
        work: the step.
        rivals: names in `RIVALS`; KeyError for another name.
        seconds: duration of the measurement, > 0.
        rounds: minimum number of rounds, from 1, even if they exceed `seconds`.
        limit: whether to include the memory limit; exclude it if a step is not bound by memory (Muon).
        left_out: reasons of rivals excluded from this comparison, by name.
        after_round: function to call after each round.
        times: as for `interleave`: times of earlier visits with the same arguments.

    Returns:
        A `Result`, whose contestants are ``"fastopt"``, ``"limit"`` and the rivals that take part.

    Raises:
        MemoryError: too little memory for all contestants; the message gives both sizes.
        KeyError: fastopt has no optimizer of that name.
        TypeError, ValueError, RuntimeError: as for the optimizer, about the shapes, dtype and options of `work`.

    >>> result = compare_step("SGD", Work("SGD", ((1000,),)), ["numpy"], seconds=0.02, rounds=3)
    >>> list(result.seconds), result.bytes
    (['fastopt', 'limit', 'numpy'], 12000)
    """
    check_memory(work, 1 + limit + len(rivals))
    ours = of_fastopt(work)
    assert ours.optimizer is not None
    contestants = {OURS: ours}
    if limit:
        contestants[LIMIT] = Contestant(limit_of(ours.optimizer).step, list)
    entered, absent = enter(work, rivals)
    contestants |= entered
    facts = {
        "optimizer": work.optimizer,
        "options": dict(work.options),
        "parameters": work.size,
        "tensors": len(work.shapes),
        "groups": work.groups,
        "dtype": work.dtype,
        "states": len(ours.optimizer.rule.states),
        "threads": get_num_threads(),
    }
    return compare(
        title,
        {name: each.step for name, each in contestants.items()},
        seconds=seconds,
        rounds=rounds,
        before={name: each.before for name, each in contestants.items() if each.before is not None},
        after_round=after_round,
        times=times,
        absent={**(left_out or {}), **absent},
        moved=bytes_of(ours.optimizer),
        **facts,
    )


def compare_company(
    title: str,
    steps: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: int = 5,
    work: Callable[[], object] | None = None,
    before: Mapping[str, Callable[[], object]] | None = None,
    after_round: Callable[[], object] | None = None,
    times: dict[str, list[np.ndarray]] | None = None,
    absent: Mapping[str, str] | None = None,
    **facts: Any,
) -> Result:
    """Time whole iterations of two matrix products and a step; the contestants take turns.

    Args:
        title: title of the table row.
        steps: functions by name; fastopt's first.
        seconds: duration of the measurement, > 0.
        rounds: number of turns of each contestant, from 1.
        work: function to call before each step; None means `fastopt.measure.company.products`.
        before: functions by name, called before a contestant's turn.
        after_round: function to call after each round.
        times: as for `fastopt.measure.company.accompany`: times of earlier visits by name, arrays of shape (3, n).
        absent: reasons of rivals that do not take part, by name.
        **facts: description of the measurement; values that JSON can hold.

    Returns:
        A `Result` of the whole iterations. Its ``parts`` fact holds, for ``"iteration"``, ``"work"`` and ``"step"`` of
        each contestant, the median, the ratio to fastopt's, the mean and the 99th percentile; times in seconds.

    >>> result = compare_company("nothing", {"a": lambda: None}, seconds=0.05, rounds=2)
    >>> sorted(result.facts["parts"])
    ['iteration', 'step', 'work']
    """
    parts = accompany(
        work or products(), steps, seconds=seconds, rounds=rounds, before=before, after_round=after_round, times=times
    )
    figures = {
        part: {
            name: [float(f"{x:.4g}") for x in (each.spread.median, each.spread.ratio, each.mean, each.p99)]
            for name, each in of.items()
        }
        for part, of in parts.items()
    }
    seconds_of = {name: each.spread for name, each in parts["iteration"].items()}
    return Result(title, seconds_of, dict(absent or {}), None, {**facts, "parts": figures})


def check_memory(work: Work, contestants: int) -> None:
    """Raise MemoryError if the contestants and the temporary arrays of one of them exceed the free memory."""
    _check_bytes((contestants + 1) * work.bytes_each)


def _check_bytes(needed: int) -> None:
    free = machine.free_memory()
    if free is not None and needed > 0.9 * free:
        raise MemoryError(f"needs {1e-9 * needed:.1f} GB of memory, and {1e-9 * free:.1f} GB are free")


def compare_batchnorm(
    title: str,
    shape: tuple[int, ...],
    *,
    axis: int = 1,
    way: str = "forward",
    rivals: Iterable[str] = ("torch", "numpy"),
    seconds: float,
    rounds: int = 5,
    left_out: Mapping[str, str] | None = None,
    after_round: Callable[[], object] | None = None,
    times: dict[str, list[float]] | None = None,
) -> Result:
    """Compare a pass of BatchNorm in float32 with the limit (a copy, or a sum of two arrays) and with rivals.

    Args:
        title: title of the table row.
        shape: shape of x: (N, C), (N, C, ...) or, with axis=-1, (N, ..., C).
        axis: axis of the channels, 1 or -1.
        way: ``"forward"``, ``"backward"`` or ``"inference"``; inference includes ReLU.
        rivals: a subset of ``"torch"`` and ``"numpy"``.
        seconds: duration of the measurement, > 0.
        rounds: minimum number of rounds, from 1, even if they exceed `seconds`.
        left_out: reasons of rivals excluded from this comparison, by name.
        after_round: function to call after each round.
        times: as for `interleave`: times of earlier visits with the same arguments.

    Returns:
        A `Result`, whose contestants are ``"fastopt"``, ``"limit"`` and the rivals that take part.

    Raises:
        ValueError: `way` is another string.
        MemoryError: too little memory for all contestants; the message gives both sizes.
        PermissionError: other users may write to the directory ``FASTOPT_CACHE_DIR``.
        TypeError, ValueError, RuntimeError: as for `fastopt.batchnorm_forward`, about the shape and the axis.

    >>> result = compare_batchnorm("small", (8, 4), seconds=0.02, rivals=["numpy"], rounds=3)
    >>> list(result.seconds), result.bytes
    (['fastopt', 'limit', 'numpy'], 256)
    """
    rivals = list(rivals)
    size = 4 * math.prod(shape)
    _check_bytes((4 + 4 * len(rivals)) * size)  # x, dy and two outputs; a rival's copies and temporary arrays
    contestants, absent = batchnorm.contestants(shape, axis, way, rivals)
    return compare(
        title,
        {name: each.step for name, each in contestants.items()},
        seconds=seconds,
        rounds=rounds,
        after_round=after_round,
        times=times,
        absent={**(left_out or {}), **absent},
        moved=(3 if way == "backward" else 2) * size,
        shape=list(shape),
        axis=axis,
        way=way,
        threads=get_num_threads(),
    )
