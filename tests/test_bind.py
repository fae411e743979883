"""bind: a loop and a rule become one function, named by a digest of all that went into it; and the cache on disk."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from scripts import run

import fastopt
from fastopt.kernels.bind import bind
from fastopt.kernels.elements import scalar

# --- the digest -------------------------------------------------------------------------------------------------------

SOURCE = """
import math
import numba
import numpy as np
from types import SimpleNamespace

SCALE = 2.0
TABLE = np.array([1.0, 2.0])
PAIR = (1.0, 2.0)
KIND = numba.float32
xp = math
unused = 1.0

def inner(x):
    return x * 3.0

def helper(x, factor=4.0):
    return factor * inner(x)

@numba.njit
def compiled_inner(x):
    return x + SCALE_OF_COMPILED

SCALE_OF_COMPILED = 5.0

@numba.njit(fastmath=False)
def compiled(x):
    return compiled_inner(x) * 6.0

def make(number, function):
    def closed(x):
        return function(x) * number
    return closed

closed = make(7.0, inner)

def rule(p, g, h):
    p = p * 8.0 + 0.0
    return helper(p) + SCALE * xp.sqrt(g) + compiled(g) + closed(g) + TABLE[0] + PAIR[0] + KIND(g)
"""

EDITS = [
    ("a literal of the rule", "8.0", "8.5"),
    ("the sign of a zero", "+ 0.0", "+ -0.0"),
    ("the type of a literal", "8.0 + ", "8 + "),
    ("an operator", "helper(p) + SCALE", "helper(p) - SCALE"),
    ("a name", "xp.sqrt", "xp.exp"),
    ("the order of the arguments", "rule(p, g, h)", "rule(g, p, h)"),
    ("a constant of the module", "SCALE = 2.0", "SCALE = 2.5"),
    ("a global array", "np.array([1.0, 2.0])", "np.array([1.0, 2.5])"),
    ("the dtype of a global array", "np.array([1.0, 2.0])", "np.array([1.0, 2.0], np.float32)"),
    ("a global tuple", "PAIR = (1.0, 2.0)", "PAIR = (1.0, 2.5)"),
    ("a helper", "return factor * inner", "return -factor * inner"),
    ("a helper of a helper", "x * 3.0", "x * 3.5"),
    ("a default of a helper", "factor=4.0", "factor=4.5"),
    ("a closed-over number", "make(7.0", "make(7.5"),
    ("a closed-over function", "make(7.0, inner)", "make(7.0, lambda x: x)"),
    ("the body of a closure", "function(x) * number", "function(x) / number"),
    ("the module behind a name", "xp = math", "xp = np"),
    ("a compiled function", "compiled_inner(x) * 6.0", "compiled_inner(x) * 6.5"),
    ("what a compiled function calls", "x + SCALE_OF", "x - SCALE_OF"),
    ("a constant of a compiled function", "SCALE_OF_COMPILED = 5.0", "SCALE_OF_COMPILED = 5.5"),
    ("the options of a compiled function", "fastmath=False", "fastmath=True"),
    ("a numba type", "KIND = numba.float32", "KIND = numba.float64"),
]


def name_of(source: str) -> str:
    namespace: dict[str, Any] = {"__name__": "users_module"}
    exec(source, namespace)
    return bind(namespace["rule"], {}, label="label", scalar=lambda function: function).__name__


@pytest.mark.parametrize(("before", "after"), [pytest.param(*edit[1:], id=edit[0].replace(" ", "_")) for edit in EDITS])
def test_an_edit_of_anything_that_goes_in_changes_the_digest(before, after):
    assert SOURCE.count(before) == 1
    assert name_of(SOURCE.replace(before, after)) != name_of(SOURCE)


def test_a_constant_of_an_imported_module_changes_the_digest():
    def name(scale: float) -> str:
        imported = ModuleType("imported")
        imported.scale = scale

        def rule(p, g, h):
            return p * imported.scale

        return bind(rule, {}, label="label", scalar=lambda function: function).__name__

    assert name(1.0) == name(1.0)
    assert name(1.0) != name(2.0)


def test_the_digest_of_one_source_is_always_the_same():
    assert name_of(SOURCE) == name_of(SOURCE)
    for before, after in (("unused = 1.0", "unused = 2.0"), ("def inner(x):", "def inner(x):  # a comment")):
        assert name_of(SOURCE.replace(before, after)) == name_of(SOURCE)


def test_the_digest_is_the_same_in_another_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_bind\n")
    with script.open("a") as file:
        file.write("print(test_bind.name_of(test_bind.SOURCE))\n")
    finished = run(script, PYTHONHASHSEED="12345")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == [name_of(SOURCE)]


# --- what is bound ----------------------------------------------------------------------------------------------------


def loop(x):
    """A loop as in cpu.py: it mentions globals that nobody has defined."""
    if FLAG:  # noqa: F821
        x = RULE(x)  # noqa: F821
    return x + OFFSET  # noqa: F821


def double(x):
    return x + x


def bound(scalar: Any = lambda function: function, **constants: Any) -> FunctionType:
    return bind(loop, {"FLAG": True, "RULE": double, "OFFSET": 1.0, **constants}, label="loop", scalar=scalar)


def test_a_bound_function_computes_with_its_constants_and_leaves_the_loop_alone():
    assert bound()(3.0) == 7.0
    assert bound(FLAG=False)(3.0) == 4.0
    assert bound(OFFSET=0.0)(3.0) == 6.0
    assert not {"FLAG", "RULE", "OFFSET"} & set(globals())
    with pytest.raises(NameError):
        loop(3.0)


def test_different_flags_constants_rules_and_labels_have_different_names():
    names = [
        bound().__name__,
        bound(FLAG=False).__name__,
        bound(OFFSET=2.0).__name__,
        bound(OFFSET=1).__name__,
        bound(RULE=lambda x: x - x).__name__,
        bind(
            loop, {"FLAG": True, "RULE": double, "OFFSET": 1.0}, label="other", scalar=lambda function: function
        ).__name__,
    ]
    assert len(set(names)) == len(names)
    assert names[0] == bound().__name__
    assert names[0].startswith("loop_")
    assert bound().__qualname__ == names[0]


def test_every_scalar_function_is_compiled_once():
    compiled: list[str] = []

    def scalar(function: FunctionType) -> FunctionType:
        compiled.append(function.__name__.rpartition("_")[0])
        return function

    def base(x):
        return double(x)

    def left(x):
        return base(x) + double(x)

    def both(x):
        return left(x) + base(x)

    assert bound(scalar, RULE=both)(1.0) == 7.0
    assert sorted(compiled) == ["base", "both", "double", "left"]


def test_a_rule_stands_for_its_scalar_function():
    def with_rule(p, g, h):
        return fastopt_sgd(p, g, h)

    fastopt_sgd = fastopt.rules.sgd
    compiled: list[FunctionType] = []

    def scalar(function: FunctionType) -> FunctionType:
        compiled.append(function)
        return function

    bind(with_rule, {}, label="r", scalar=scalar)
    assert [function.__code__ for function in compiled] == [fastopt.rules.sgd.scalar.__code__]


def test_a_rule_and_a_function_are_found_under_any_name_and_behind_modules():
    """fastopt.rules.adam is not a global of the function, nor is it called adam everywhere."""
    renamed, in_a_closure, whole = fastopt.rules.momentum, fastopt.rules, ModuleType("whole")
    whole.part, whole.count = ModuleType("part"), 2.0
    whole.part.doubled = lambda x: x + x
    whole.part.momentum = fastopt.rules.momentum

    def momentum(p, g, v, h):
        p, v = fastopt.rules.momentum(p, g, v, h)
        p, v = renamed(p, g, v, h)
        p, v = in_a_closure.momentum(p, g, v, h)
        rule = whole.part.momentum
        p, v = rule(p, g, v, h)
        return whole.part.doubled(p) * whole.count + fastopt.math.exp(p) + math.sqrt(v) + np.float64(v), v

    h = fastopt.rules.momentum.prepare(1, 0.1, 0.9, "heavy_ball")
    compiled = scalar(bind(momentum, {}, label="m", scalar=scalar))
    called = numba.njit(lambda p, g, v, h: compiled(p, g, v, h))
    assert called(3.0, 4.0, 5.0, h) == momentum(3.0, 4.0, 5.0, h)
    name = bind(momentum, {}, label="m", scalar=scalar).__name__
    whole.part.doubled = lambda x: x * x
    assert bind(momentum, {}, label="m", scalar=scalar).__name__ != name


def test_an_attribute_named_like_a_global_is_not_that_global():
    """``h.double`` is a hyperparameter, whatever function the module calls double."""
    compiled: list[FunctionType] = []

    def reads(p, h):
        return p * h.double

    bind(reads, {}, label="reads", scalar=compiled.append)
    assert compiled == []


def test_disabled_jit_is_refused_with_the_reason(monkeypatch):
    @fastopt.rule(lambda t, lr=0.1: fastopt.rules.sgd.prepare(t, lr))
    def descent(p, g, h):
        return p - h.lr * g

    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    with pytest.raises(RuntimeError, match=r"^NUMBA_DISABLE_JIT is set"):
        descent.update_(np.ones(3), np.ones(3))


# --- the names that bind supplies -------------------------------------------------------------------------------------

LOOPS = sorted((Path(fastopt.__file__).parent / "kernels").rglob("*.py"))


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_upper_case_name_is_declared_in_its_file(path):
    """So that an editor finds its definition: with a type, and a docstring where the name does not say it all."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        declared |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        declared |= {node.name} if isinstance(node, ast.ClassDef | ast.FunctionDef) else set()
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    local = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert {name for name in read if name.isupper()} <= declared | local


def test_a_constant_that_is_not_supplied_is_named():
    def loop(x):
        return x + OFFSET  # noqa: F821

    with pytest.raises(TypeError, match=r"loop reads OFFSET: must be declared in its module"):
        bind(loop, {}, label="loop", scalar=scalar)
    assert bind(loop, {"OFFSET": 1}, label="loop", scalar=scalar)(1) == 2
