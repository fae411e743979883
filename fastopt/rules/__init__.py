"""The rules of the optimizers, one file each. A new file is found: its rules become ``fastopt.rules.<name>``.

``ALL`` maps a rule's name to the Rule. A rule and its file may share a name (``fastopt.rules.adam``): the name then
means the rule, so that ``fastopt.rules.adam.update_(p, g, m, v, t=3)`` reads as it should.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from fastopt.rule import Rule

ALL: dict[str, Rule] = {}


def _rules_of(module: str) -> dict[str, Rule]:
    """Import a module; return the rules it makes, by name, without the directions of its matrixwise rules."""
    found = [value for value in vars(import_module(module)).values() if isinstance(value, Rule)]
    directions = [rule.matrixwise.direction for rule in found if rule.matrixwise is not None]
    return {rule.name: rule for rule in found if rule.__module__ == module and rule not in directions}


for _module in sorted(module.name for module in iter_modules(__path__)):
    ALL |= _rules_of(f"{__name__}.{_module}")
globals().update(ALL)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Rule: ...
