"""Scalar functions with a form per dtype: one name, which Python, a rule and any function compiled by numba can call.

A form is the same formula, bound to constants of its dtype and to the operations of its target, so that no literal
promotes float32 to float64. numba is imported when the first form is bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from fastopt.kernels.bits import FORMATS, PYTHON

KNOWN: list[TypedFunction] = []
"""All functions of this kind. A backend with a compiler of its own makes them known to it."""


class Target(NamedTuple):
    """What runs a form."""

    name: str
    operations: Mapping[str, Any]
    """The operations of `fastopt.kernels.bits`, by their upper-case names."""
    scalar: Callable[..., Any]
    """What compiles the functions that a form calls, as for `bind`."""
    types: Any = None
    """numba's module of types for this target."""


IN_PYTHON = Target("python", PYTHON, lambda function: function)


@functools.cache
def on_cpu() -> Target:
    """The target of numba's own compiler."""
    from numba import types
    from numba.extending import intrinsic

    from fastopt.kernels.elements import scalar
    from fastopt.kernels.operations import operations

    return Target("cpu", operations(types, intrinsic), scalar, types)


class TypedFunction:
    """A scalar function with a form per dtype. Made by `typed`; called with numbers, arrays, or in a compiled function.

    Its numbers are computed in the dtype of the floats among its arguments, or in float64 where there are none.
    """

    def __init__(self, function: FunctionType, constants: Mapping[Any, Mapping[str, Any]], parts: Mapping[str, Any]):
        functools.update_wrapper(self, function)
        self.__name__ = function.__name__
        self._function = function
        self._constants = {np.dtype(dtype): values for dtype, values in constants.items()}
        self._parts = parts
        self._forms: dict[Any, FunctionType] = {}
        self._is_known = False
        KNOWN.append(self)

    def form(self, dtype: Any, target: Target) -> FunctionType:
        """Return the form for a dtype and a target."""
        from fastopt.kernels.bind import bind

        key = (np.dtype(dtype), target.name)
        if key not in self._forms:
            constants = {**target.operations, **self._constants[key[0]], "NUMBER": key[0].type}
            for name, part in self._parts.items():
                constants[name] = bind(part, constants, label=part.__name__, scalar=target.scalar)
            label = f"{self.__name__}_{key[0].name}"
            self._forms[key] = bind(self._function, constants, label=label, scalar=target.scalar)
        return self._forms[key]

    def chosen(self, target: Target, arguments: tuple[Any, ...]) -> FunctionType | None:
        """Return the form for arguments of these numba types; None where one of them is not a real number."""
        types = target.types
        if not all(isinstance(kind, types.Float | types.Integer | types.Boolean) for kind in arguments):
            return None
        widths = {kind.bitwidth for kind in arguments if isinstance(kind, types.Float)} or {64}
        if not widths <= {32, 64}:
            return None
        return self.form(np.dtype(f"f{max(widths) // 8}"), target)

    @property
    def _numba_type_(self) -> None:
        """Make the function known to numba, which asks for this attribute when it first meets the function.

        The type that numba uses is the one registered here. None makes it look there; and it is None for every
        compiler, because that of CUDA has types of its own.
        """
        if self._is_known:
            return
        self._is_known = True
        from numba.core.registry import cpu_target
        from numba.extending import overload

        from fastopt.kernels.elements import SCALAR_OPTIONS

        @overload(self, jit_options=SCALAR_OPTIONS, strict=False)
        def chosen(*arguments: Any) -> Any:
            return self.chosen(on_cpu(), arguments)

        cpu_target.typing_context.refresh()
        cpu_target.target_context.refresh()

    @property
    def digest(self) -> str:
        """What decides about the machine code of all forms."""
        return ",".join(self.form(dtype, on_cpu()).__name__ for dtype in self._constants)

    def __call__(self, *arguments: Any) -> Any:
        """Compute the function of numbers or arrays, in NumPy and with the same bits as a compiled function."""
        kinds = [np.asarray(each).dtype for each in arguments]
        own = [each.dtype for each in arguments if getattr(getattr(each, "dtype", None), "kind", "") == "f"]
        wrong = [kind for kind in kinds if kind.kind not in "iub" and kind not in FORMATS]
        if wrong:
            raise TypeError(f"{self.__name__}: must be given float32, float64 or integers, got {wrong[0]}")
        dtype = np.result_type(*own) if own else np.dtype(np.float64)
        with np.errstate(all="ignore"):
            result = self.form(dtype, IN_PYTHON)(*arguments)
        return result[()]

    def __repr__(self) -> str:
        return f"<function {self.__module__}.{self.__name__}>"

    def __reduce__(self) -> str:
        return self.__name__


def typed(
    constants: Mapping[Any, Mapping[str, Any]], **parts: Callable[..., Any]
) -> Callable[[Callable[..., Any]], TypedFunction]:
    """Return a decorator that makes a `TypedFunction` of a formula.

    constants : for each dtype the upper-case names that the formula reads, besides the operations and NUMBER, the
        dtype's type. Their numbers are of the dtype.
    parts : functions of the same names that the formula calls, each of which may call those before it.
    """

    def decorate(function: Any) -> TypedFunction:
        return TypedFunction(function, constants, parts)

    return decorate
