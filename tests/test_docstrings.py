"""Every public name is documented in full, and every example in a docstring is true.

Public is what stands in the `__all__` of a module of the package, and of the classes among it the methods and
properties without an underscore. The names of a module beneath ``__all__`` are the house's own: ruff sees to their
first line. What is demanded:

- of everything: a first paragraph of one line; no directives or roles, which a terminal and the site show as they are;
- of functions, methods, and classes that users construct: every argument by its name, an array with its shape, a number
  with its range; `Returns` or `Yields` where there are arguments and something comes back; each kind of error that it
  can raise, by what the code says, itself and through what it calls of the package; an example;
- of a class that another function makes for the user (`MADE_BY`): its public attributes by their names; an example at
  the class or at that function;
- of a property: no more than the line and its errors;
- of mathematics (optimizers, schedules, initialisation, BatchNorm, the reference): its formula and its source, save
  for what has no source (`NO_SOURCE`); of an optimizer also the units of its states, which the module of its rules may
  tell.

The docstring of a module may tell what all of its functions share: `fastopt.reference` does so. A method may be told by
its protocol: "As `Idle`.".
"""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import importlib.util
import inspect
import linecache
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

import fastopt

MADE_BY = {
    "BatchNormGrads": "batchnorm_backward",
    "Communicator": "run_threads",
    "FlatParams": "pack",
    "Minibatches": "minibatches",
    "Rule": "rule",
    "Saved": "batchnorm_forward",
    "Schedule": "constant",
    "StepInfo": "step",
}
"""Classes that users meet and do not construct, and what makes them."""

NO_SOURCE = {
    "constant": "a number",
    "linear": "a line",
    "piecewise": "a table of numbers",
    "sequence": "other schedules, one after the other",
    "fans": "a definition",
    "zeros_": "a number",
    "normal_": "draws of a distribution",
}
"""Mathematics that nobody need be cited for."""

MATHEMATICS = (
    "fastopt.optimizers.",
    "fastopt.schedules",
    "fastopt.init",
    "fastopt.batchnorm",
    "fastopt.curvature",
    "fastopt.reference",
)

NOT_MATHEMATICS = ("init_state",)

ARRAYS = re.compile(r"shape|1-D|2-D|\btrees?\b|like \w|dict of|array of|any number of axes")
RANGES = re.compile(r"\d|finite|positive|number of|no unit|in updates|\[[pglxy]\]|[Aa]s (in|of|for) `")


class Public(NamedTuple):
    """A public name, and where it stands."""

    path: str
    thing: Any
    module: ModuleType
    owner: type | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def modules() -> Iterator[ModuleType]:
    """Those of the package that can be imported here, without the command line."""
    yield fastopt
    left_out = ["fastopt.cli", "fastopt.kernels.cuda.backend", "fastopt.__main__"]
    if importlib.util.find_spec("torch") is None:
        left_out.append("fastopt.torch")
    for found in pkgutil.walk_packages(fastopt.__path__, "fastopt.", onerror=lambda name: None):
        if not found.name.startswith(tuple(left_out)):
            importlib.import_module(found.name)
            yield sys.modules[found.name]  # not an attribute: fastopt.rules.adam is the rule


def public(module: ModuleType) -> Iterator[Public]:
    """What a module offers, and the methods of its classes."""
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if isinstance(thing, ModuleType) or not callable(thing):
            continue
        yield Public(f"{module.__name__}.{name}", thing, sys.modules[thing.__module__])
        if inspect.isclass(thing):
            for method, member in vars(thing).items():
                member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                if not method.startswith("_") and isinstance(member, FunctionType | property):
                    yield Public(f"{module.__name__}.{name}.{method}", member, sys.modules[thing.__module__], thing)


def listed() -> dict[str, Public]:
    """Every public name, once: under the shortest of its paths."""
    found: dict[int, Public] = {}
    for module in modules():
        for name in public(module):
            if id(name.thing) not in found or len(name.path) < len(found[id(name.thing)].path):
                found[id(name.thing)] = name
    return {name.path: name for name in sorted(found.values(), key=lambda name: name.path)}


# --- what code can raise ----------------------------------------------------------------------------------------------


def errors(function: Any, owner: type | None, package: str, seen: set[Any] | None = None) -> set[str]:
    """The names of the exceptions in the `raise` statements of a function, and of all it calls of the package."""
    seen = set() if seen is None else seen
    function = inspect.unwrap(getattr(function, "fget", function))
    if not isinstance(function, FunctionType) or function in seen or not function.__module__.startswith(package):
        return set()
    if function.__code__.co_filename.startswith("<"):  # written by @dataclass or NamedTuple
        return set()
    seen.add(function)
    found = set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and isinstance(getattr(builtins, raised.id, None), type):
                found.add(raised.id)
        elif isinstance(node, ast.Call) and ast.unparse(node) != "get_backend('cpu')":  # which cannot fail
            for callee, its_owner in resolve(node.func, function, owner):
                found |= errors(callee, its_owner, package, seen)
    return found


def resolve(node: ast.expr, function: FunctionType, owner: type | None) -> list[tuple[Any, type | None]]:
    """What an expression that is called stands for, and the class it belongs to; nothing where that is not plain."""
    if isinstance(node, ast.Name):
        thing = function.__globals__.get(node.id)
        if inspect.isclass(thing):
            return [(getattr(thing, name), thing) for name in ("__init__", "__post_init__") if name in vars(thing)]
        return [(thing, None)]
    if not isinstance(node, ast.Attribute):
        return []
    on = node.value
    if isinstance(on, ast.Name) and on.id in ("self", "cls") and owner is not None:
        return [(inspect.getattr_static(owner, node.attr, None), owner)]
    if isinstance(on, ast.Call) and isinstance(on.func, ast.Name):
        if on.func.id == "super" and owner is not None:
            defined = next((k for k in owner.__mro__ if function.__name__ in vars(k)), owner)
            return [(getattr(super(defined, owner), node.attr, None), defined.__mro__[1])]
        on = on.func
    if isinstance(on, ast.Name):
        thing = function.__globals__.get(on.id)
        kind = thing if inspect.isclass(thing) or isinstance(thing, ModuleType) else type(thing)
        member = inspect.getattr_static(kind, node.attr, None)
        return [(getattr(member, "__func__", member), kind if inspect.isclass(kind) else None)]
    return []


# --- what a docstring lacks -------------------------------------------------------------------------------------------


def lacks(name: Public, package: str = "fastopt") -> list[str]:
    """What the docstring of a public name does not tell."""
    thing, module = name.thing, name.module.__name__
    doc = inspect.cleandoc(thing.__doc__ or "")
    if isinstance(thing, property) and not doc and named(name.name, name.owner.__doc__ or ""):
        return []  # told under the class's Attributes
    if not doc or (inspect.isclass(thing) and doc.startswith(f"{name.name}(")):  # which @dataclass writes
        return ["a docstring"]
    if re.fullmatch(r"As `\w+`\.", doc):
        return []
    shared = ""
    if module == "fastopt.reference":
        shared = inspect.cleandoc(name.module.__doc__ or "")
    elif "**options" in doc:
        shared = inspect.cleandoc(fastopt.Optimizer.__doc__ or "")
    missing = []
    if "\n" in doc.split("\n\n")[0] or not doc.split("\n")[0].endswith((".", ":")):
        missing.append("a first paragraph of one line that ends with a full stop")
    if inspect.isclass(thing) and name.name in MADE_BY:
        return missing + [f"attribute {one}" for one in attributes(thing) if not named(one, doc)]
    if re.search(r"^ *\.\. \w+::|:\w+:`", doc, flags=re.MULTILINE):
        missing.append("plain text in the place of reStructuredText")
    if not isinstance(thing, property):
        missing += arguments(name, doc, shared)
        if ">>>" not in doc:
            missing.append("an example (>>>)")
    words = re.findall(r"\b[A-Z]\w*Error\b", doc + shared)
    told = tuple(getattr(builtins, word) for word in words if hasattr(builtins, word))
    missing += [f"that it raises {kind}" for kind in sorted(raised(name, package)) if not isa(kind, told)]
    if name.owner is None and module.startswith(MATHEMATICS) and name.name not in NOT_MATHEMATICS:
        if not re.search(r"^Formula:|^ {4,}\S.* = ", doc, flags=re.MULTILINE):
            missing.append("a formula")
        if module.startswith("fastopt.optimizers.") and "unit" not in doc + documented_rules(thing):
            missing.append("units")
        if not re.search(r"^Source:", doc, flags=re.MULTILINE) and name.name not in NO_SOURCE:
            missing.append("a source")
    return missing


def documented_rules(optimizer: type[fastopt.Optimizer]) -> str:
    """The docstrings of the modules in which the rules of a named optimizer stand."""
    return "".join(sys.modules[rule.__module__].__doc__ or "" for rule in optimizer.rules)


def arguments(name: Public, doc: str, shared: str) -> list[str]:
    """The arguments that are not told, and whether what is returned is not."""
    missing = []
    signature = inspect.signature(name.thing)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    for parameter in parameters:
        text = passage(parameter.name, doc) or passage(parameter.name, shared)
        if not text and name.module.__name__ == "fastopt.reference" and named(parameter.name, doc):
            text = doc  # which tells it in a sentence
        kind = inspect.formatannotation(parameter.annotation)
        if not text:
            missing.append(f"argument {parameter.name}")
        elif re.search(r"\b(ndarray|Array|NDArray|Weights)\b", kind):
            missing += [] if ARRAYS.search(text) else [f"the shape of {parameter.name}"]
        elif isinstance(parameter.default, float) or re.fullmatch(r"(float|int)( \| None)?", kind):
            missing += [] if RANGES.search(text) else [f"the range of {parameter.name}"]
    nothing = inspect.isclass(name.thing) or signature.return_annotation in (None, "None")
    if parameters and not nothing and not re.search(r"(^|\. )(Returns|Yields)\b", doc, flags=re.MULTILINE):
        missing.append("what it returns (Returns:)")
    return missing


def raised(name: Public, package: str) -> set[str]:
    """The names of the exceptions that a call can raise."""
    if not inspect.isclass(name.thing):
        return errors(name.thing, name.owner, package)
    found = (errors(getattr(name.thing, one, None), name.thing, package) for one in ("__init__", "__post_init__"))
    return set().union(*found)


def isa(kind: str, told: tuple[type, ...]) -> bool:
    return issubclass(getattr(builtins, kind), told)


def named(word: str, doc: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}\b", doc) is not None


def passage(word: str, doc: str) -> str:
    """What a docstring says of an argument in its entry under `Args`, or in a list."""
    one = re.escape(word)
    entry = rf"^(?: {{4}}(?:[\w*]+, )*\**{one}(?:, [\w*]+)*:|- ``{one}``) .*(?:\n {{5,}}.*)*"
    found = re.search(entry, doc, flags=re.MULTILINE)
    return found.group() if found else ""


def attributes(kind: type) -> list[str]:
    """The public attributes that the class itself lists."""
    names = [*getattr(kind, "_fields", ()), *getattr(kind, "__slots__", ())]
    return [name for name in names if not name.startswith("_")]


NAMES = listed()


@pytest.mark.parametrize("path", NAMES)
def test_every_public_name_is_documented_in_full(path):
    assert lacks(NAMES[path]) == []


def test_the_tables_of_this_file_name_what_there_is():
    known = {name.name for name in NAMES.values()}
    assert {*MADE_BY, *MADE_BY.values(), *NO_SOURCE, *NOT_MATHEMATICS} <= known
    assert {type(name.thing) for name in NAMES.values()} >= {type, FunctionType, property}


# --- examples ---------------------------------------------------------------------------------------------------------

EXAMPLES = [
    example
    for module in modules()
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__)
    if example.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_are_true(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(example, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)


def test_the_examples_of_all_public_names_are_among_those_that_run():
    run = {id(inspect.unwrap(found)) for example in EXAMPLES for found in [lookup(example)] if found is not None}
    shown = {path: name.thing for path, name in NAMES.items() if ">>>" in (name.thing.__doc__ or "")}
    assert [path for path, thing in shown.items() if id(inspect.unwrap(getattr(thing, "fget", thing))) not in run] == []


def lookup(example: doctest.DocTest) -> Any:
    """The object whose docstring an example stands in; None for that of a module."""
    module = next(m for m in sorted(sys.modules, key=len, reverse=True) if f"{example.name}.".startswith(f"{m}."))
    thing: Any = sys.modules[module]
    for part in example.name[len(module) + 1 :].split(".") if example.name != module else ():
        thing = inspect.getattr_static(thing, part)
        thing = getattr(thing, "__func__", getattr(thing, "fget", thing))
    return thing


# --- the test of the test ---------------------------------------------------------------------------------------------

FULL = '''
"""A module."""
from numpy import ndarray

__all__ = ["scale", "Layer"]

def _check(factor):
    if factor <= 0:
        raise ValueError("factor")

def scale(x: ndarray, factor: float = 2.0) -> ndarray:
    """Multiply an array.

    Formula: ``y = factor x``

    Args:
        x: shape (N,).
        factor: > 0.

    Returns:
        A new array.

    Raises:
        ValueError: factor <= 0.

    Source: Euclid, book V.

    >>> 1 + 1
    2
    """
    _check(factor)
    return factor * x

class Layer:
    """A layer.

    Formula: ``y = w x``

    Args:
        width: from 1.

    Raises:
        TypeError: no int.

    Source: Euclid, book V.

    >>> Layer(1).width
    1
    """

    def __init__(self, width: int):
        self._set(width)

    def _set(self, width):
        if type(width) is not int:
            raise TypeError("width")
        self.width = width

    @property
    def norm(self) -> float:
        """The norm."""
        return 1.0
'''

FAULTS = {
    "a docstring": ('"""The norm."""', "pass"),
    "a first paragraph of one line that ends with a full stop": ('"""Multiply an array.\n', '"""Multiply an array\n'),
    "argument x": ("        x: shape (N,).\n", ""),
    "argument width": ("        width: from 1.\n", ""),
    "the shape of x": ("x: shape (N,).", "x: what is scaled."),
    "the range of factor": ("factor: > 0.", "factor: what it is scaled by."),
    "the range of width": ("width: from 1.", "width: how wide."),
    "what it returns (Returns:)": ("    Returns:\n        A new array.\n", ""),
    "that it raises ValueError": ("    Raises:\n        ValueError: factor <= 0.\n", ""),
    "that it raises TypeError": ("        TypeError: no int.", "        KeyError: no int."),
    "an example (>>>)": ("    >>> 1 + 1\n    2\n", ""),
    "plain text in the place of reStructuredText": ("``y = factor x``", ":math:`y = a x`"),
    "a formula": ("    Formula: ``y = w x``\n", ""),
    "a source": ("    Source: Euclid, book V.\n\n    >>> Layer", "    >>> Layer"),
}


def lacking_in(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the names of a module of this source lack, as those of a module of mathematics."""
    (tmp_path / "planted.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    monkeypatch.setattr(f"{__name__}.MATHEMATICS", ("planted",))
    linecache.clearcache()
    return [one for name in public(importlib.import_module("planted")) for one in lacks(name, "planted")]


def test_a_module_that_lacks_nothing_passes(tmp_path, monkeypatch):
    assert lacking_in(FULL, tmp_path, monkeypatch) == []


@pytest.mark.parametrize("lacking", FAULTS)
def test_what_a_docstring_lacks_is_found(lacking, tmp_path, monkeypatch):
    before, after = FAULTS[lacking]
    assert FULL.count(before) == 1
    assert lacking_in(FULL.replace(before, after), tmp_path, monkeypatch) == [lacking]
