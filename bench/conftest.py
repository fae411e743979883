"""What the benchmarks share: how a case is measured and kept, and the tables at the end.

    pytest bench --benchmark-only                       everything, in ten minutes on two cores
    pytest bench --benchmark-only --scale 0.1 --most 1e6   a trial

The columns of pytest-benchmark itself tell how long each case took to measure. What was measured, by turns and with
its spread, stands in the tables below them and in the ``extra_info`` of ``--benchmark-json=FILE``.
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
    group.addoption("--scale", type=float, default=1.0, metavar="FACTOR", help="times the seconds of every case")
    group.addoption("--most", type=float, default=1e9, metavar="N", help="leave out cases of more parameters")


def pytest_configure(config: pytest.Config) -> None:
    machine.keep_freed_memory()
    config.stash[RESULTS] = {}
    config.stash[LOAD] = os.getloadavg()[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.filterwarnings("default"))  # a rival's warning is no error of ours


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Result]:
    """``measure(function, *arguments, seconds=..., size=...)`` keeps the Result that the function returns.

    The function is given its share of the seconds, and the rounds; a case that needs more memory than is free is
    skipped, and so is one of more parameters than ``--most``.
    """
    scale, most = request.config.getoption("--scale"), request.config.getoption("--most")

    def measure(function: Callable[..., Result], *arguments: Any, seconds: float, size: int = 0, **more: Any) -> Result:
        if size > most:
            pytest.skip(f"{size} parameters, and --most is {most:g}")
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
        terminalreporter.section(f"{name}: microseconds per call; in brackets, how many times as long as fastopt")
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
    """What a reader has to know of the run; `report.py --store` keeps this, and nothing that the plugin found out."""
    versions = {"fastopt": fastopt.__version__, **{name: machine.version_of(name) for name in PACKAGES}}
    output_json["fastopt"] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "threads": fastopt.get_num_threads(),
        "load": round(config.stash[LOAD], 2),
        "scale": config.getoption("--scale"),
        "versions": {name: version for name, version in versions.items() if version is not None},
    }
