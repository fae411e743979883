"""The performance bars in one table; `python bench/report.py --bars` shows which of them the stored results clear.

All bars are medians of ratios within the rounds of one interleaved run, except the few that are times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from results import Stored

from fastopt.measure import Result

Results = Mapping[str, Stored]


class Bar(NamedTuple):
    """A required value of a measurement."""

    work: str
    demand: str
    """Name of the measured number."""
    least: bool
    """Whether the bar is a minimum; otherwise it is a maximum."""
    bar: float
    measured: Callable[[Results], float]
    """Return the measured number; raise KeyError if it was not measured."""

    def holds(self, value: float) -> bool:
        """Whether `value` clears the bar."""
        return value >= self.bar if self.least else value <= self.bar


def times(file: str, title: str, name: str) -> Callable[[Results], float]:
    """Return a function for a contestant's time as a multiple of fastopt's."""

    def measured(stored: Results) -> float:
        found = stored[file].results[title].times(name)
        if found is None:
            raise KeyError(name)
        return found

    return measured


def seconds(file: str, title: str, unit: float = 1.0) -> Callable[[Results], float]:
    return lambda stored: stored[file].results[title].ours.median / unit


def best_rival(file: str, title: str) -> Callable[[Results], float]:
    def measured(stored: Results) -> float:
        result = stored[file].results[title]
        return min(result.times(name) or 0.0 for name in result.seconds if name not in ("fastopt", "limit"))

    return measured


def over(title: str, name: str) -> Callable[[Results], float]:
    """Return a function for fastopt's time in company as a multiple of a contestant's."""
    against = times("company", title, name)
    return lambda stored: 1.0 / against(stored)


def worst_of_the_others(stored: Results) -> float:
    """Return the lowest share of its limit among optimizers other than Adam, at 30M in float32."""

    def is_meant(result: Result) -> bool:
        facts = result.facts
        large = facts["parameters"] == 30_000_000 and facts["dtype"] == "float32"
        return large and not result.title.startswith("Adam 30M") and "limit" in result.seconds

    shares = [result.times("limit") or 0.0 for result in stored["step"].results.values() if is_meant(result)]
    if not shares:
        raise KeyError("30M")
    return min(shares)


SHARE = "the limit's time over ours"
OVER = {name: f"the time of {name} over ours" for name in ("torch fused", "torch", "deepspeed", "numpy")}
MAPS = ("64x64x56x56", "32x256x14x14", "32x512x7x7", "128x16x32x32")
SMALL_MATRICES = ("32x64", "64x128", "128x256")
LARGE_MATRICES = ("256x512", "256x1024", "1024x1024", "4096x256")

BARS = (
    Bar("Adam 1k", "microseconds, all Python included", False, 8.0, seconds("step", "Adam 1k", 1e-6)),
    Bar("Adam 1k", "the time of the best rival over ours", True, 2.0, best_rival("step", "Adam 1k")),
    *(
        Bar(f"Adam {size}", text, True, bar, times("step", f"Adam {size}", name))
        for size in ("100k", "1M")
        for text, bar, name in (
            (OVER["torch fused"], 2.0, "torch fused"),
            (OVER["deepspeed"], 1.3, "deepspeed"),
            (SHARE, 0.75, "limit"),
        )
    ),
    # From 4M on, torch's fused kernel is at the memory's limit as well: only the share of the limit is required.
    Bar("Adam 4M", SHARE, True, 0.92, times("step", "Adam 4M", "limit")),
    Bar("Adam 30M", SHARE, True, 0.92, times("step", "Adam 30M", "limit")),
    Bar("Adam 30M", OVER["numpy"], True, 15.0, times("step", "Adam 30M", "numpy")),
    Bar("every other optimizer, 30M", SHARE, True, 0.90, worst_of_the_others),
    Bar("1000 tensors of 64", OVER["torch fused"], True, 100.0, times("many_tensors", "Adam 1000 x 64", "torch fused")),
    Bar(
        "1000 tensors of 64, 501 groups",
        OVER["torch fused"],
        True,
        10.0,
        times("many_tensors", "Adam 1000 x 64, 501 groups", "torch fused"),
    ),
    Bar("the tail of a step, 1M", OVER["torch"], True, 2.2, times("tail", "tail 1M", "torch")),
    Bar("the tail of a step, 30M", OVER["torch"], True, 1.5, times("tail", "tail 30M", "torch")),
    *(
        Bar(f"BatchNorm forward {shape}", OVER["torch"], True, 5.0, times("batchnorm", f"forward {shape}", "torch"))
        for shape in MAPS
    ),
    *(
        Bar(
            f"BatchNorm forward {shape}",
            "the time of a copy over ours",
            True,
            0.4 if shape.endswith("7x7") else 0.6,
            times("batchnorm", f"forward {shape}", "limit"),
        )
        for shape in MAPS
    ),
    *(
        Bar(f"BatchNorm backward {shape}", OVER["torch"], True, 1.5, times("batchnorm", f"backward {shape}", "torch"))
        for shape in MAPS
    ),
    *(
        Bar(
            f"BatchNorm backward {shape}",
            "the time of two reads and a write over ours",
            True,
            0.6,
            times("batchnorm", f"backward {shape}", "limit"),
        )
        for shape in MAPS
    ),
    *(
        Bar(f"BatchNorm {way} {shape}", OVER["torch"], True, bar, times("batchnorm", f"{way} {shape}", "torch"))
        for way in ("forward", "backward")
        for shapes, bar in ((SMALL_MATRICES, 1.5), (LARGE_MATRICES, 2.0))
        for shape in shapes
    ),
    *(
        Bar(f"BatchNorm {way} {shape}", text, True, 0.5, times("batchnorm", f"{way} {shape}", "limit"))
        for way, text in (
            ("forward", "the time of a copy over ours"),
            ("backward", "the time of two reads and a write over ours"),
        )
        for shape in LARGE_MATRICES[1:]
    ),
    *(
        Bar(title, "the iteration's time over that on one thread", False, bar, over(title, "one thread"))
        for title, bar in (
            ("X@W; X@W; Adam 100k", 1.02),
            ("X@W; X@W; Adam 300k", 1.02),
            ("X@W; X@W; Adam 1M", 0.92),
            *(
                (f"X@W; X@W; {work}, beside {busy} busy", 1.1)
                for work in ("Adam 100k", "Adam 300k", "Adam 1M", "BatchNorm 32x256x14x14")
                for busy in (1, 2, 4)
            ),
        )
    ),
    *(
        Bar(f"{work}, alone", "our time over that on OpenMP's threads", False, 1.05, over(f"{work}, alone", "OpenMP"))
        for work in ("Adam 100k", "Adam 1M", "Adam 4M", "Adam 30M", "BatchNorm 32x256x14x14")
    ),
    *(
        Bar(f"{case}, {threads}", OVER[name], True, bar, times("torch", f"{case}, {threads}", name))
        for threads in ("1 thread", "2 threads")
        for case, name, bar in (
            ("actor-critic of 8 tensors", "torch fused", 1.15),
            ("actor-critic of 8 tensors", "torch", 1.5),
            ("MLP of 100 tensors", "torch fused", 1.15),
            ("MLP of 100 tensors", "torch", 1.5),
            ("transformer of 999 tensors", "torch fused", 1.08),
            ("transformer of 999 tensors", "torch", 1.5),
            ("CNN with BatchNorm", "torch fused", 1.2),
        )
    ),
    *(
        Bar(f"step of {case}, 1 thread", OVER["torch"], True, 1.0, times("torch", f"step of {case}, 1 thread", "torch"))
        for case in ("1 tensor of 10", "10,000 tensors of 10", "1 tensor of 30M")
    ),
    Bar(
        "import fastopt", "seconds over importing numba", False, 0.15, seconds("startup", "import fastopt, over numba")
    ),
    Bar(
        "first step of a new process",
        "seconds, nothing cached",
        False,
        1.0,
        seconds("startup", "first step of a process"),
    ),
)


def table(stored: Results) -> str:
    """Return a table of every bar, the measured number, and whether the bar holds."""
    lines = ["| work | measure | bar | measured | holds |", "|---|---|---:|---:|---|"]
    for bar in BARS:
        asked = f"{'>=' if bar.least else '<='} {bar.bar:g}"
        try:
            value = bar.measured(stored)
        except KeyError:
            lines.append(f"| {bar.work} | {bar.demand} | {asked} | not measured |  |")
        else:
            lines.append(
                f"| {bar.work} | {bar.demand} | {asked} | {value:.3g} | {'yes' if bar.holds(value) else 'NO'} |"
            )
    return "\n".join(lines)
