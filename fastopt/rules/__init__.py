"""The optimizers, one file each. A file dropped in here is found: its rules become ``fastopt.rules.<name>``.

``ALL`` maps a rule's name to the Rule. A rule and its file may share a name (``fastopt.rules.adam``): the name then
means the rule, so that ``fastopt.rules.adam.update_(p, g, m, v, t=3)`` reads as it should.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from fastopt.optimizer import Optimizer as _Optimizer
from fastopt.rule import Rule

ALL: dict[str, Rule] = {}

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
for _optimizer in _Optimizer.classes.values():
    if _optimizer.__module__.startswith(__name__ + "."):
        ALL.update({rule.name: rule for rule in _optimizer.rules})
globals().update(ALL)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Rule: ...
