"""The house: imports run one way, whether at the top of a module, inside a function or for types alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fastopt

ROOT = Path(fastopt.__file__).parent
FILES = {
    ".".join(("fastopt", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

FLOORS = [
    ("fastopt.cli", "fastopt.__main__"),
    ("fastopt.measure",),
    ("fastopt.torch",),
    ("fastopt",),
    ("fastopt.interop", "fastopt.distributed"),
    ("fastopt.optimizers", "fastopt.batchnorm", "fastopt.curvature", "fastopt.batches", "fastopt.scaling"),
    ("fastopt.optimizer", "fastopt.bare"),
    ("fastopt.checkpoint",),
    ("fastopt.state",),
    ("fastopt.step",),
    ("fastopt.storage",),
    ("fastopt.rules",),
    ("fastopt.rule", "fastopt.wrap", "fastopt.wrappers"),
    ("fastopt.closed_forms", "fastopt.hyper", "fastopt.math", "fastopt.random"),
    ("fastopt.kernels",),
    ("fastopt.kernels.contract", "fastopt.kernels.threads"),
    (
        "fastopt.schedules",
        "fastopt.init",
        "fastopt.reference",
        "fastopt.version",
        "fastopt.lazy",
        "fastopt.files",
        "fastopt.communicators",
    ),
    ("fastopt.scalars", "fastopt.signals", "fastopt.source", "fastopt.suggest", "fastopt.warned"),
]
"""From the top down: a module imports from its own floor and from those below, never from above."""


def imports_of(source: str, module: str, package: bool) -> Iterator[str]:
    """Every module of fastopt that a source names in an import statement."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "fastopt")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if package else module.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            if base.split(".")[0] == "fastopt":
                for name in node.names:
                    yield f"{base}.{name.name}" if f"{base}.{name.name}" in FILES else base


@cache
def graph() -> dict[str, set[str]]:
    return {
        module: set(imports_of(path.read_text(), module, path.name == "__init__.py")) - {module}
        for module, path in FILES.items()
    }


def circle_in(edges: dict[str, set[str]]) -> list[str] | None:
    """A circle of imports, or None."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(edges.get(module, ())):
            found = walk(other, [*path, module])
            if found:
                return found
        done.add(module)
        return None

    return next(filter(None, (walk(module, []) for module in sorted(edges))), None)


def floor_of(module: str) -> int:
    """The number of the floor, from the top: that of the longest name that the module begins with."""
    found = [
        (len(name), floor)
        for floor, names in enumerate(FLOORS)
        for name in names
        if module == name or (name != "fastopt" and module.startswith(f"{name}."))
    ]
    assert found, f"{module}: give it a floor"
    return max(found)[1]


def test_there_is_no_circle_of_imports():
    assert circle_in(graph()) is None


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_run_downwards(module):
    upwards = [other for other in graph()[module] if floor_of(other) < floor_of(module)]
    assert not upwards


def test_the_contract_imports_nothing_of_ours():
    assert graph()["fastopt.kernels.contract"] == set()


def test_rules_import_formulas_and_specifications_alone():
    allowed = (
        "fastopt.rules",
        "fastopt.rule",
        "fastopt.hyper",
        "fastopt.closed_forms",
        "fastopt.math",
        "fastopt.random",
    )
    for module, others in graph().items():
        if module.startswith("fastopt.rules"):
            assert all(other.startswith(allowed) for other in others), module


def test_the_reference_imports_nothing_of_ours():
    assert graph()["fastopt.reference"] == set()


def test_a_circle_is_found_wherever_the_import_stands():
    lazy = "def f():\n    from fastopt.optimizer import Optimizer\n"
    typed = "if TYPE_CHECKING:\n    from fastopt import optimizer\n"
    relative = "from .optimizer import Optimizer\n"
    for source in (lazy, typed, relative):
        assert "fastopt.optimizer" in set(imports_of(source, "fastopt.rule", package=False))
        edges = {**graph(), "fastopt.rule": {*graph()["fastopt.rule"], "fastopt.optimizer"}}
        assert circle_in(edges)
