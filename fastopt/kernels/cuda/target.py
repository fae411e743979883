"""numba's CUDA target, which the other files of this folder import from here.

In numba's simulator (NUMBA_ENABLE_CUDASIM=1), where there is no device, a thread runs Python.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
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
if SIMULATED:
    from fastopt.kernels.cuda.block import take_turns

    take_turns()

BLOCKS_PER_SM = 8
"""Blocks of a launch for each multiprocessor, at most."""

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
    """The numba type of a kernel's argument: an array is the address of its first element, and has no gaps."""
    types, _ = extending()
    if isinstance(argument, tuple):
        return types.BaseTuple.from_types([type_of(item) for item in argument])
    if getattr(argument, "ndim", 0) == 0:
        return types.float64 if isinstance(argument, float) else types.int64
    return types.CPointer(getattr(types, argument.dtype.name))


class DriverFunction:
    """A kernel as the driver launches it, on the device that was current when it was loaded.

    numba's own launch is not used: it makes an object of every argument, every time. All arguments have 8 bytes, and a
    tuple is passed as its items.
    """

    def __init__(self, typed: Any):
        """typed : a kernel that numba has compiled for the types of its arguments."""
        driver = import_module("cuda.bindings.driver")
        (compiled,) = typed.overloads.values()
        self._kept = typed  # with the module that the function is in
        self._function = driver.CUfunction(int(compiled._codelibrary.get_cufunc().handle))
        self._streams: dict[int, Any] = {}
        self._driver = driver
        self._launch = driver.cuLaunchKernel
        self.most_blocks = BLOCKS_PER_SM * cuda.get_current_device().MULTIPROCESSOR_COUNT

    def launch(self, blocks: int, stream: int, arguments: int) -> None:
        """Launch on a stream; RuntimeError if that fails. arguments : where the addresses of the arguments are."""
        on = self._streams.get(stream)
        if on is None:
            on = self._streams[stream] = self._driver.CUstream(stream)
        (code,) = self._launch(self._function, blocks, 1, 1, THREADS, 1, 1, 0, on, arguments, 0)
        if code != 0:
            raise RuntimeError(f"the driver refused to launch a kernel: {code!r}")
