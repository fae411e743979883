"""The public API is what api.txt lists: every public name, and the signature of what can be called.

A change of it is a change for users, and belongs into CHANGELOG.md. Then write the list again:

    python tests/test_api.py
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from test_docstrings import modules

import fastopt

STORED = Path(__file__).with_name("api.txt")


def signature_of(thing: Any) -> str:
    """The parameters and their defaults, without annotations, which versions of Python spell differently."""
    try:
        signature = inspect.signature(thing)
    except ValueError:  # a class of C
        return "(...)"
    parameters = [
        parameter.replace(annotation=parameter.empty, default=Shown.of(parameter.default))
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


class Shown:
    """A default whose repr is the same in every process."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text

    @classmethod
    def of(cls, default: Any) -> Any:
        if default is inspect.Parameter.empty:
            return default
        if isinstance(default, type | FunctionType):
            return cls(f"{default.__module__}.{default.__qualname__}")
        text = repr(default)
        return cls(type(default).__qualname__ if " at 0x" in text else text)


def lines_of(path: str, thing: Any) -> Iterator[str]:
    """What the list has about one name: a line, and one for each public member of a class."""
    if isinstance(thing, ModuleType):
        yield f"{path}: module"
    elif inspect.isclass(thing):
        yield f"{path}{signature_of(thing)}"
        for name, member in vars(thing).items():
            if name.startswith("_"):
                continue
            if isinstance(member, property):
                yield f"{path}.{name}: {'attribute' if member.fset else 'read-only attribute'}"
            elif isinstance(member, FunctionType | classmethod | staticmethod):
                yield f"{path}.{name}{signature_of(getattr(thing, name))}"
    elif isinstance(thing, FunctionType) or hasattr(thing, "__wrapped__"):
        yield f"{path}{signature_of(thing)}"
    elif isinstance(thing, fastopt.Rule):
        yield f"{path}: rule({', '.join(('p', 'g', *thing.states, 'h'))}) of {', '.join(thing.names())}"
    else:
        yield f"{path}: {type(thing).__name__}"


def api() -> list[str]:
    """The lines of the list. A name that stands in several modules is described under its shortest path."""
    paths = {}
    for module in modules():
        for name in fastopt.rules.ALL if module is fastopt.rules else getattr(module, "__all__", ()):
            paths[f"{module.__name__}.{name}"] = getattr(module, name)
    shortest: dict[int, str] = {}
    for path in sorted(paths, key=lambda path: (len(path), path)):
        shortest.setdefault(id(paths[path]), path)
    lines: list[str] = []
    for path, thing in paths.items():
        home = shortest[id(thing)]
        lines += lines_of(path, thing) if home == path else [f"{path} = {home}"]
    return sorted(lines)


def without_optional(lines: list[str]) -> list[str]:
    """The lines about modules that can be imported here."""
    if importlib.util.find_spec("torch") is not None:
        return lines
    return [line for line in lines if not line.startswith("fastopt.torch.")]


def test_the_public_api_is_the_one_that_is_stored():
    stored, found = without_optional(STORED.read_text(encoding="utf-8").splitlines()), api()
    gone, new = sorted(set(stored) - set(found)), sorted(set(found) - set(stored))
    assert not gone + new, "\n".join(
        ["the public API changed; run: python tests/test_api.py", *(f"- {line}" for line in gone)]
        + [f"+ {line}" for line in new]
    )
    assert stored == found


def test_the_list_names_what_users_meet():
    lines = STORED.read_text(encoding="utf-8").splitlines()
    adam = "fastopt.Adam(params=None, lr=0.001, betas=(0.9, 0.999), eps=1e-08,"
    assert sum(line.startswith(adam) for line in lines) == 1
    assert "fastopt.Optimizer.lr: attribute" in lines
    assert "fastopt.Optimizer.params: read-only attribute" in lines
    assert "fastopt.schedules: module" in lines
    assert "fastopt.rules.sgd: rule(p, g, h) of lr, weight_decay" in lines
    assert not [line for line in lines if " at 0x" in line]


@pytest.mark.parametrize("change", ["a new argument", "another default", "a name less"])
def test_a_change_of_a_signature_is_seen(monkeypatch, change):
    before = api()
    if change == "a name less":
        monkeypatch.setattr(fastopt, "__all__", [name for name in fastopt.__all__ if name != "pack"])
    else:
        after = (lambda params, new=None: None) if change == "a new argument" else (lambda params, *, copy=False: None)
        after.__qualname__ = after.__name__ = "pack"
        monkeypatch.setattr(fastopt, "pack", after)
    assert api() != before


if __name__ == "__main__":
    STORED.write_text("\n".join(api()) + "\n", encoding="utf-8")
