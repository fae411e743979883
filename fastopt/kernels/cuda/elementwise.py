"""The update of a rule whose every element stands alone: the kernel, and its launch."""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastopt.kernels.contract import N_CHUNK, N_PLACE, N_STEP, Array, Chunk, Place, StepHyper
from fastopt.kernels.cuda.launcher import Launcher
from fastopt.kernels.cuda.target import cuda

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

HYPER: type
"""The NamedTuple of the rule's hyperparameters."""
FIRST_HYPER: type
"""That of the update which is made before the rule's."""
ELEMENT: Callable[..., Any]
"""``element`` of elements.py, bound to the rule and the features."""
HYPERPARAMETERS: Callable[..., Any]
"""`hyperparameters`, bound to the same."""
LOOP: Callable[..., Any]
"""``loop`` of memory.py, with the element function `updated`."""
OPAQUE: Callable[..., Any]
"""``opaque`` of memory.py."""
UNPACK_PLACE: Callable[..., Any]
UNPACK_CHUNK: Callable[..., Any]
UNPACK_STEP: Callable[..., Any]
UNPACK_HYPER: Callable[..., Any]
UNPACK_FIRST: Callable[..., Any]
ZERO: Any
ITEMSIZE: int
P_BYTES: int
G_BYTES: int
"""Bytes of a number of p and g as they are stored ..."""
P_SHIFT: int
G_SHIFT: int
"""... and 1 where these are half of ITEMSIZE, as memory.py knows it."""
N_HYPER: int
"""How many fields HYPER has."""
N_ROW: int
"""How many columns the table of hyperparameters has."""
ALONE: bool
"""Whether ELEMENT returns p alone, not in a tuple."""
FIRST: bool
"""Whether another update is made before the rule's."""
READS_GRADIENT: bool
"""Whether the gradient is a buffer of the loop."""
ZERO_GRAD: bool

# --- the kernel -------------------------------------------------------------------------------------------------------
# A block of threads takes a chunk, then that a grid further. 1-D arrays come as bare addresses: an array costs a launch
# eight words to marshal, and a look at every index whether it is negative.


def hyperparameters(table, group):
    """The hyperparameters in a row of the table: those of the step, and those of the rule (and of a first update)."""
    row = group * N_ROW
    step = StepHyper(*UNPACK_STEP(table, row))
    own = HYPER(*UNPACK_HYPER(table, row + N_STEP))
    if FIRST:
        return step, (own, FIRST_HYPER(*UNPACK_FIRST(table, row + N_STEP + N_HYPER)))
    return step, own


def updated(values, context):
    """The element function of `elementwise`: of (p, *states, g), or (p, *states) where g is not read."""
    step, h = context
    if READS_GRADIENT:
        new = ELEMENT(step, values[0], values[-1], *values[1:-1], h)
    else:
        new = ELEMENT(step, values[0], ZERO, *values[1:], h)
    if ALONE:  # noqa: SIM108 a branch is pruned, an expression is not
        kept = (new,)
    else:
        kept = new
    if ZERO_GRAD:
        return (*kept, ZERO), ZERO, ZERO
    return kept, ZERO, ZERO


def elementwise(places, states, table, chunks, n):
    """Update n chunks by a rule whose every element stands alone.

    states : the addresses of the buffers of states.
    """
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
        first = OPAQUE(ITEMSIZE * (place.state + chunk.start))
        size = chunk.stop - chunk.start
        context = HYPERPARAMETERS(table, chunk.group)
        p = OPAQUE(place.p + P_BYTES * chunk.start - (first >> P_SHIFT))
        if READS_GRADIENT:
            g = OPAQUE(place.g + G_BYTES * chunk.grad - (first >> G_SHIFT))
            LOOP((p, *states, g), first, size, context, ZERO, ZERO)
        else:
            LOOP((p, *states), first, size, context, ZERO, ZERO)
        c += cuda.gridDim.x


# --- the launch -------------------------------------------------------------------------------------------------------


class ElementwiseKernel:
    """The update of one rule in one pass."""

    def __init__(self, backend: Launcher, kernel: Any, scattered: bool, codes: int | None = None):
        """scattered : tables are made for one launch, and not kept on the device.

        codes : which buffer of states is the first of codes, whose number the kernel is told; None where there is none.
        """
        self._backend = backend
        self._kernel = kernel
        self._scattered = scattered
        self._codes = codes

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        backend = self._backend
        if self._scattered:
            where = backend.upload(places)
            on_device, lines, count = backend.upload(table), backend.upload(chunks), len(chunks)
        else:
            found = backend.chunks(chunks)
            where, on_device = backend.places(places), backend.table(table)
            lines, count = found.lines, found.length
        addresses = backend.addresses(states)
        if self._codes is not None:
            addresses = (*addresses, int(states[self._codes].size))
        self.launch_on(where, addresses, on_device, lines, count)

    def launch_on(self, places: Array, states: tuple[int, ...], table: Array, lines: Array, count: int) -> None:
        """The same, with tables and `count` chunks that are on the device, the lines of each one after the other."""
        self._backend.launch(self._kernel, count, places, states, table, lines, count)
