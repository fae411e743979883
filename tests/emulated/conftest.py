"""The emulated backend in the place of the CUDA backend, for every test of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastopt import kernels

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.emulator)


def launches(config: pytest.Config) -> dict[bool, int]:
    """How many launches there were, by contraction: those of the workers, and of this process."""
    return config.stash.setdefault(LAUNCHES, {False: 0, True: 0})


LAUNCHES = pytest.StashKey[dict[bool, int]]()


@pytest.fixture(scope="session")
def kept(pytestconfig: pytest.Config) -> Any:
    """One backend for all tests, so that every kernel is compiled once."""
    from emulator import LAUNCHES as COUNTED
    from emulator import Emulated

    yield Emulated()
    counted = {contracted: COUNTED[contracted] for contracted in (False, True)}
    if hasattr(pytestconfig, "workeroutput"):
        pytestconfig.workeroutput["launches"] = [counted[False], counted[True]]
    else:
        pytestconfig.stash[LAUNCHES] = counted


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for contracted, more in enumerate(getattr(node, "workeroutput", {}).get("launches", ())):
        launches(node.config)[bool(contracted)] += more


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = launches(config)
    if any(found.values()):
        terminalreporter.write_line(f"emulated launches: {found[False]} without contraction, {found[True]} with it")


@pytest.fixture
def backend(kept: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulated backend, without contraction: so its results are to be the CPU's, bit for bit."""
    monkeypatch.setitem(kernels._made, "cuda", kept)
    kept.contracted = kept.backwards = False
    return kept
