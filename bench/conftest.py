"""Shared by the benchmarks: measuring and storing a case, and the final tables.

    pytest bench --benchmark-only                       everything, in ten minutes on two cores
    pytest bench --benchmark-only --scale 0.1 --most 1e6   a trial

The columns of pytest-benchmark show the duration of each case. The interleaved measurements with their spread are in
the tables below and in the ``extra_info`` of ``--benchmark-json=FILE``.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastopt
from fastopt.measure import RIVALS, Result, machine

FOLDER = Path(__file__).resolve().parent
RESULTS = pytest.StashKey[dict[str, list[Result]]]()
LOAD = pytest.StashKey[float]()
ROUNDS = 4
PACKAGES = ("numba", "numpy", "jax", *sorted({rival.package for rival in RIVALS.values()} - {"numpy"}))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastopt")
    group.addoption("--scale", type=float, default=1.0, metavar="FACTOR", help="factor on the seconds of every case")
    group.addoption("--most", type=float, default=1e9, metavar="N", help="skip cases with more parameters")


def pytest_configure(config: pytest.Config) -> None:
    machine.keep_freed_memory()
    config.stash[RESULTS] = {}
    config.stash[LOAD] = os.getloadavg()[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.filterwarnings("default"))  # a rival's warning must not fail a case


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Result]:
    """Return ``measure(function, *arguments, seconds=..., size=...)``, which stores the Result of the function.

    `measure` passes scaled seconds and rounds to the function. It skips a case that needs more than the free memory, or
    has more parameters than ``--most``.
    """
    scale, most = request.config.getoption("--scale"), request.config.getoption("--most")

    def measure(function: Callable[..., Result], *arguments: Any, seconds: float, size: int = 0, **more: Any) -> Result:
        if size > most:
            pytest.skip(f"{size} parameters, but --most is {most:g}")
        more |= {"seconds": scale * seconds, "rounds": max(2, min(ROUNDS, round(scale * ROUNDS)))}
        try:
            result = benchmark.pedantic(function, args=arguments, kwargs=more, rounds=1, iterations=1)
        except MemoryError as error:
            pytest.skip(f"too little memory: {error}")
        benchmark.extra_info.update(result.record())
        request.config.stash[RESULTS].setdefault(request.path.stem, []).append(result)
        return result

    return measure


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
