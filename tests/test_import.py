"""What `import fastopt` loads and offers: nothing heavy, and every public name."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import run

import fastopt
from fastopt import optimizers, rules

HEAVY = ("numba.cuda", "cupy", "torch", "matplotlib", "typer", "rich", "sklearn", "pandas", "scipy", "safetensors")
MODULES = (
    "fastopt.rule",
    "fastopt.storage.flat",
    "fastopt.optimizer",
    "fastopt.schedules",
    "fastopt.init",
    "fastopt.batches",
    "fastopt.curvature",
    "fastopt.reference",
    "fastopt.bare",
    "fastopt.hyper",
    *(f"fastopt.rules.{module.name}" for module in pkgutil.iter_modules(rules.__path__)),
    *(f"fastopt.optimizers.{module.name}" for module in pkgutil.iter_modules(optimizers.__path__)),
)


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a fresh process holds after `import fastopt`."""
    report = (
        "import json, sys, threading, fastopt; "
        "print(json.dumps({'modules': sorted(sys.modules), 'threads': threading.active_count()}))"
    )
    finished = run("-c", report)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return json.loads(finished.stdout)


@pytest.mark.parametrize("name", HEAVY)
def test_import_loads_nothing_heavy(imported, name):
    assert name not in imported["modules"]


def test_import_loads_what_it_needs(imported):
    """The test of the test above, which a process that imported nothing would pass."""
    assert {"fastopt", "numpy", "optree", *MODULES} <= set(imported["modules"])


def test_import_starts_no_backend_and_no_thread(imported):
    assert not {"fastopt.kernels.cpu.backend", "fastopt.interop", "fastopt.checkpoint"} & set(imported["modules"])
    assert imported["threads"] == 1


# --- the public names -------------------------------------------------------------------------------------------------


def test_no_public_name_is_listed_twice():
    assert len(set(fastopt.__all__)) == len(fastopt.__all__)


def test_star_import_brings_the_public_names_and_nothing_else():
    namespace: dict[str, Any] = {}
    exec("from fastopt import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(fastopt.__all__)


def test_every_optimizer_is_public_under_its_name():
    for name, optimizer in fastopt.Optimizer.classes.items():
        if optimizer.__module__.startswith("fastopt."):
            assert getattr(fastopt, name) is optimizer
            assert name in fastopt.__all__
            assert issubclass(optimizer, fastopt.Optimizer)


def test_a_rule_and_its_file_may_share_a_name():
    assert isinstance(rules.adam, fastopt.Rule)
    assert isinstance(sys.modules["fastopt.rules.adam"], ModuleType)
    assert importlib.import_module("fastopt.rules.adam").adam is rules.adam is rules.ALL["adam"]
    for name, rule in rules.ALL.items():
        assert getattr(rules, name) is rule
        assert rule.name == name


def test_a_class_and_its_rules_stand_in_files_of_one_name():
    files = {module.name for module in pkgutil.iter_modules(rules.__path__)}
    assert files == {module.name for module in pkgutil.iter_modules(optimizers.__path__)}
    for name, optimizer in optimizers.ALL.items():
        file = optimizer.__module__.rpartition(".")[2]
        assert {rule.__module__ for rule in optimizer.rules} == {f"fastopt.rules.{file}"}, name
    assert {rule for optimizer in optimizers.ALL.values() for rule in optimizer.rules} == set(rules.ALL.values())


# --- who imports whom -------------------------------------------------------------------------------------------------

ARROWS = {
    "scalars.py": set(),
    "hyper.py": {"scalars"},
    "kernels/contract.py": set(),
    "source.py": set(),
    "closed_forms/*.py": {"closed_forms", "source"},
    "suggest.py": set(),
    "rule.py": {"scalars", "hyper", "closed_forms", "source", "suggest"},
    "wrap.py": {"hyper", "rule", "source"},
    "wrappers.py": {"hyper", "rule", "wrap"},
    "rules/*.py": {"rule", "rules", "hyper", "closed_forms"},
}
"""The mathematics, and what it may import of the package: no backend, and nothing that launches."""


@pytest.mark.parametrize("files", ARROWS)
def test_the_mathematics_imports_no_backend(files):
    """Not even in a function, or for a type checker."""
    package = Path(fastopt.__file__).parent
    paths = sorted(package.glob(files))
    assert paths
    for path in paths:
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [f"fastopt.{alias.name}" for alias in node.names] if node.module == "fastopt" else [node.module]
            found |= {name.split(".")[1] for name in names if name.startswith("fastopt.")}
        assert found <= ARROWS[files], path.name


def test_the_version_is_one():
    major, minor, patch = fastopt.__version__.split(".")
    assert (major + minor + patch).isdigit()
