"""Groups of contestants, each contestant a benchmark of pytest-benchmark.

Only contestants that take turns are comparable. The first benchmark of a group that runs therefore measures all
contestants, and every benchmark of the group hands its samples to the plugin with a timer that replays them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import pytest

from fastopt.measure import RIVALS, Result


class Run(Protocol):
    """The measurement of a group: return its Result, and add the times of every round to `times`, by contestant."""

    def __call__(self, title: str, *, seconds: float, rounds: int, times: dict[str, list[float]]) -> Result: ...


class Group(NamedTuple):
    """Contestants that take turns."""

    name: str
    """Heading of the plugin's table."""
    contestants: tuple[str, ...]
    """Fastopt first. A contestant that cannot take part is skipped; the Result has the reason."""
    run: Run
    """Make the arrays, measure, and free the arrays."""
    seconds: float
    size: int = 0
    """Number of parameters, for ``--most``."""
    title: str = ""
    """Title of the Result; "" means the name."""


class Replay:
    """A timer that replays samples: between two calls of each pair, the time of the next sample passes."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._calls = 0

    def load(self, samples: list[float]) -> None:
        """Replay `samples` from the first."""
        self.samples, self._calls = samples, 0

    def __call__(self) -> float:
        sample, is_end = divmod(self._calls, 2)
        self._calls += 1
        return self.samples[sample] if is_end else 0.0

    def __str__(self) -> str:
        return "replay of interleaved samples"


def by_name(groups: Iterable[Group]) -> dict[str, Group]:
    """Return the groups by name; names must differ."""
    found: dict[str, Group] = {}
    for group in groups:
        if group.name in found:
            raise ValueError(f"groups: names must differ, got {group.name!r} twice")
        found[group.name] = group
    return found


def each_contestant(groups: Mapping[str, Group]) -> dict[str, Any]:
    """Return the arguments of `pytest.mark.parametrize` that make a benchmark of each contestant of each group."""
    return {
        "argnames": ("group", "contestant"),
        "argvalues": [
            pytest.param(
                group.name,
                contestant,
                id=f"{_id(group.name)}-{_id(contestant)}",
                marks=pytest.mark.benchmark(group=group.name, timer=Replay()),
            )
            for group in groups.values()
            for contestant in group.contestants
        ],
    }


def of_step(optimizer: str, rivals: Iterable[str], limit: bool = True) -> tuple[str, ...]:
    """Return the contestants of `compare_step`: fastopt, its limit, and the rivals that have the optimizer."""
    return ("fastopt", *(["limit"] if limit else []), *(name for name in rivals if RIVALS[name].makes(optimizer)))


def _id(name: str) -> str:
    """Return `name` as a part of a test id that ``-k`` can contain."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")
