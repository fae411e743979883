"""The named optimizers, one file each. A new file is found: its class becomes ``fastopt.<Name>``.

``ALL`` maps a class's name to the class. A rule has the defaults of the signature of its class.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from fastopt.optimizer import Optimizer

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")

ALL: dict[str, type[Optimizer]] = {
    name: optimizer for name, optimizer in Optimizer.classes.items() if optimizer.__module__.startswith(f"{__name__}.")
}
