"""numba's CUDA target: the only file that imports numba.cuda. The other files of this folder import it from here.

In numba's simulator (NUMBA_ENABLE_CUDASIM=1), where there is no device, a thread runs Python.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np

from fastopt.kernels.operations import operations
from fastopt.kernels.typed import KNOWN, Target, TypedFunction

if not hasattr(np, "row_stack"):  # numba-cuda 0.30 looks for it at its first compilation; NumPy 2.5 has it no more
    np.row_stack = np.vstack  # noqa: NPY201

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the deprecation of numba's own target, and NumPy's of what it imports
    from numba import config
    from numba import cuda as cuda  # for the other files

SIMULATED = bool(config.ENABLE_CUDASIM)

THREADS = 32 if SIMULATED else 256
"""In a block. Sums are of THREADS strided parts and then of a tree, so their bits depend on it; it is never changed."""


def device(function: FunctionType) -> Any:
    """Compile a scalar function for the device; never fastmath, which also flushes denormal numbers to zero on CUDA."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def extending() -> tuple[Any, Any]:
    """The module of numba's types, and the decorator of intrinsics. Not in the simulator, which has no intrinsics."""
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    return types, intrinsic


@cache
def teach() -> None:
    """Make the functions that have a form per dtype known to CUDA's compiler. The simulator runs them in Python."""
    if SIMULATED:
        return
    from numba.cuda.extending import overload

    types, intrinsic = extending()
    target = Target("cuda", operations(types, intrinsic), device, types)

    def teach_one(function: TypedFunction) -> None:
        @overload(function, jit_options={"fastmath": False, "forceinline": True}, strict=False)
        def chosen(*arguments: Any) -> Any:
            return function.chosen(target, arguments)

    for function in KNOWN:
        teach_one(function)


def type_of(argument: Any) -> Any:
    """The numba type of a kernel's argument: a 1-D array is the address of its first element, and has no gaps."""
    types, _ = extending()
    if isinstance(argument, tuple):
        return types.BaseTuple.from_types([type_of(item) for item in argument])
    if getattr(argument, "ndim", 0) == 0:
        return types.float64 if isinstance(argument, float) else types.int64
    number = getattr(types, argument.dtype.name)
    return types.CPointer(number) if argument.ndim == 1 else types.Array(number, argument.ndim, "C")
