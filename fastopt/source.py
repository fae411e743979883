"""`written`: a scalar function from its source, where the number of its arguments is known only when it is made.

A loop over a tuple of numbers, or one function inside another for each of them, takes numba longer to compile than the
same formula written out, and LLVM does not vectorise all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any


def written(
    name: str, parameters: Sequence[str], lines: Sequence[str], constants: Mapping[str, Any], module: str
) -> FunctionType:
    """Return the function of this name and these parameters, whose body are these lines.

    Args:
        name: that of the function.
        parameters: their names, in order.
        lines: the body, without indentation of its own.
        constants: what the body reads besides its parameters, by name.
        module: the name of the module that the function belongs to.

    >>> written("twice", ["x"], ["return two * x"], {"two": 2}, "__main__")(3)
    6
    """
    source = "\n    ".join((f"def {name}({', '.join(parameters)}):", *lines))
    namespace = {"__name__": module, **constants}
    exec(compile(source, f"<{name} of {module}>", "exec"), namespace)
    function: FunctionType = namespace[name]
    return function
