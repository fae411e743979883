"""Shared by the benchmarks: measuring a group of contestants, the plugin's defaults, and the table of ratios.

    pytest bench --benchmark-only                       everything, in ten minutes on two cores
    pytest bench --benchmark-only --scale 0.1 --most 1e6   a trial
    pytest bench --benchmark-only -k 'Adam and 1M' --benchmark-histogram

Every contestant is a benchmark of pytest-benchmark, in a group of those that take turns, with a round per turn. Rows
are in the order of the contestants (unless ``--benchmark-sort`` is given), in microseconds. The ratios within the
rounds are in the table below those of the plugin; with the facts of the run they are in the ``extra_info`` of a
group's first benchmark in ``--benchmark-json=FILE``.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from groups import Group

import fastopt
from fastopt.measure import RIVALS, Result, machine

FOLDER = Path(__file__).resolve().parent
RESULTS = pytest.StashKey[dict[str, list[Result]]]()
LOAD = pytest.StashKey[float]()
ROUNDS = 4
COLUMNS = ["min", "median", "mean", "stddev", "rounds"]
"""Default of ``--benchmark-columns``: a benchmark has one iteration, and 120 characters hold no more columns."""
PACKAGES = ("numba", "numpy", "jax", *sorted({rival.package for rival in RIVALS.values()} - {"numpy"}))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastopt")
    group.addoption("--scale", type=float, default=1.0, metavar="FACTOR", help="factor on the seconds of every case")
    group.addoption("--most", type=float, default=1e9, metavar="N", help="skip cases with more parameters")


def pytest_configure(config: pytest.Config) -> None:
    machine.keep_freed_memory()
    config.stash[RESULTS] = {}
    config.stash[MEASURED] = {}
    config.stash[LOAD] = os.getloadavg()[0]
    if not any(str(argument).startswith("--benchmark-sort") for argument in config.invocation_params.args):
        config.option.benchmark_sort = "name"  # see RowName
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = COLUMNS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.filterwarnings("default"))  # a rival's warning must not fail a case


class Measured(NamedTuple):
    """A measured group."""

    result: Result
    times: dict[str, list[float]]
    """Seconds per call in every round, by contestant."""


MEASURED = pytest.StashKey[dict[tuple[str, str], "Measured | str"]]()
"""The measured groups by file and name; a string is the reason why a group has no times."""


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Group, str], None]:
    """Return ``measure(group, contestant)``, which hands a contestant's times to the plugin.

    The first benchmark of a group measures the whole group, and stores its Result. A contestant that cannot take part
    is skipped, and so is a group that needs more than the free memory or has more parameters than ``--most``.
    """
    scale, most = request.config.getoption("--scale"), request.config.getoption("--most")
    known = request.config.stash[MEASURED]

    def measure(group: Group, contestant: str) -> None:
        if group.size > most:
            pytest.skip(f"{group.size} parameters, but --most is {most:g}")
        key = (request.path.stem, group.name)
        if key not in known:
            known[key] = "its group could not be measured: see the error of the first benchmark"
            known[key] = found = measured(group, scale if benchmark.enabled else 0.0)
            if isinstance(found, Measured):
                benchmark.extra_info["result"] = found.result.record()
                request.config.stash[RESULTS].setdefault(request.path.stem, []).append(found.result)
        found = known[key]
        if isinstance(found, str):
            pytest.skip(found)
        if contestant not in found.times:
            pytest.skip(found.result.absent[contestant])
        request.node.get_closest_marker("benchmark").kwargs["timer"].load(found.times[contestant])
        benchmark.pedantic(lambda: None, rounds=len(found.times[contestant]))

    return measure


def measured(group: Group, scale: float) -> Measured | str:
    """Return the times of a group, or the reason why the memory is too small for it."""
    times: dict[str, list[float]] = {}
    rounds = max(2, min(ROUNDS, round(scale * ROUNDS)))
    try:
        result = group.run(group.title or group.name, seconds=scale * group.seconds, rounds=rounds, times=times)
    except MemoryError as error:
        return f"too little memory: {error}"
    if not times.keys() == result.seconds.keys() <= set(group.contestants):
        raise ValueError(f"contestants of {group.name!r}: must be {group.contestants}, got {list(result.seconds)}")
    return Measured(result, times)


# --- the plugin's table -----------------------------------------------------------------------------------------------


class RowName(str):
    """The name of a row; rows sort by the place of their contestant."""

    place = 0

    def __lt__(self, other: str) -> bool:
        return self.place < getattr(other, "place", 0)


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(benchmarks: list[Any], group_by: str) -> Generator[None, Any, Any]:
    """Name each row after its contestant, because the heading names the group."""
    groups = yield
    if group_by == "group":
        places = {
            fullname: place for place, fullname in enumerate(dict.fromkeys(row["fullname"] for row in benchmarks))
        }
        for _, rows in groups:
            for row in rows:
                row["name"] = RowName((row["params"] or {}).get("contestant", row["name"]))
                row["name"].place = places[row["fullname"]]
    return groups


def pytest_benchmark_scale_unit(config: pytest.Config, unit: str) -> tuple[str, float] | None:
    """Show times in microseconds, unless ``--benchmark-time-unit`` is given."""
    return ("u", 1e6) if unit == "seconds" and config.getoption("benchmark_time_unit") is None else None


# --- our table --------------------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)  # below the plugin's tables
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    absent: dict[str, None] = {}
    for name, results in config.stash[RESULTS].items():
        terminalreporter.section(f"{name}: microseconds per call; in brackets, as a multiple of fastopt's")
        for result in results:
            terminalreporter.write_line(line_of(result))
            absent |= dict.fromkeys(reason for reason in result.absent.values() if "not installed" in reason)
    for reason in absent:
        terminalreporter.write_line(reason)


def line_of(result: Result) -> str:
    cells = [
        f"{name} {1e6 * spread.median:,.1f}" + (f" ({result.times(name):.2f}x)" if k else "")
        for k, (name, spread) in enumerate(result.seconds.items())
    ]
    return f"{result.title:32s} " + "  ".join(cells)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the facts about the run; `report.py --store` stores these, and none that the plugin collects."""
    versions = {"fastopt": fastopt.__version__, **{name: machine.version_of(name) for name in PACKAGES}}
    output_json["fastopt"] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "threads": fastopt.get_num_threads(),
        "load": round(config.stash[LOAD], 2),
        "scale": config.getoption("--scale"),
        "versions": {name: version for name, version in versions.items() if version is not None},
    }
