"""What tests share: a folder of compiled kernels, kept where FASTOPT_CACHE_DIR names one, and the choice of a GPU."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

MODES = ("pool", "numba", "executor")

QUICK = (
    "test_bad_input",
    "test_batches",
    "test_door",
    "test_flat",
    "test_groups",
    "test_house",
    "test_import",
    "test_optimizer",
    "test_rows",
    "test_rule_kinds",
    "test_schedules",
    "test_trees",
)
"""The files of ``pytest -m quick``: what a change of the step or of the storage breaks first."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests of the CUDA backend on a GPU")
    parser.addoption("--driver", choices=MODES, help="run every loop that is worth more than one thread in this way")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is compiled, and before pytest-xdist starts its workers, which inherit the variable."""
    if not os.environ.get("FASTOPT_CACHE_DIR"):
        folder = tempfile.mkdtemp(prefix="fastopt-kernels-")
        os.environ["FASTOPT_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(Path(folder), ignore_errors=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let each worker run neighbouring tests, which share kernels, and take some from the other one when it is done."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in QUICK:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True, scope="module")
def _lasting() -> None:
    """Let the garbage collector look past what lives as long as the run: thousands of tests, and compiled kernels."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _rarely_collected() -> None:
    """Collect garbage after 50,000 new objects, not 700: a tenth of the time of compiling went to the collector."""
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def _driver(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--driver"):
        from fastopt.kernels.driver import DRIVER

        DRIVER.choose(request.config.getoption("--driver"))


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at machine code as text, which a kernel from the disk does not have."""
    monkeypatch.setenv("FASTOPT_CACHE_DIR", "0")
