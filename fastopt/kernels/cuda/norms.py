"""The passes over gradients before an update: the sums of their squares, and the adding up of several gradients."""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float64

from fastopt.kernels.contract import (
    N_CHUNK,
    N_PLACE,
    SCALE_DOWN,
    SCALE_UP,
    Array,
    Chunk,
    Place,
    StepHyper,
    in_range,
    rescaled,
    scaled_square,
)
from fastopt.kernels.cuda.launcher import Chunks, Launcher
from fastopt.kernels.cuda.target import THREADS, cuda

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

DTYPE: Any
"""That of parameters and gradients."""
UNSCALED: Callable[..., Any]
"""``unscaled`` of elements.py, bound to the features."""
CONDITIONED: Callable[..., Any]
"""``conditioned`` of elements.py, bound to the features."""
LOOP: Callable[..., Any]
"""``loop`` of memory.py, with the element function of the kernel."""
BLOCK_SUMS: Callable[..., Any]
"""`block_sums`, as part of the kernel."""
LEAVE_SUMS: Callable[..., Any]
"""`leave_sums`, as part of the kernel."""
UNPACK_PLACE: Callable[..., Any]
UNPACK_CHUNK: Callable[..., Any]
UNPACK_STEP: Callable[..., Any]
ZERO: Any
ITEMSIZE: int
G_BYTES: int
"""Bytes of a number of a gradient as it is stored."""
MEASURE: bool
"""Whether sums of squares are taken of the new sums."""
OVERWRITE: bool
"""Whether the kernel does the sums that are overwritten, or those that are added to."""
STEP: StepHyper
WIDTH: int
"""`fastopt.kernels.contract.sums_per_block` of the dtype."""
SELECTS: bool
"""Whether only sums of selected parameters are measured, without a table."""

# --- sums over a block of threads -------------------------------------------------------------------------------------


def block_sums(left, right):
    """The sums of what the threads of a block have put into two arrays, in their first elements.

    A tree, so that the bits are the same every time.
    """
    cuda.syncthreads()
    width = cuda.blockDim.x // 2
    while width > 0:
        if cuda.threadIdx.x < width:
            left[cuda.threadIdx.x] += left[cuda.threadIdx.x + width]
            right[cuda.threadIdx.x] += right[cuda.threadIdx.x + width]
        cuda.syncthreads()
        width //= 2


def leave_sums(left, right, s, t, partials, at):
    """Leave the sums of s and t over a block of threads in the partial sums, from number `at` on."""
    left[cuda.threadIdx.x] = s
    right[cuda.threadIdx.x] = t
    BLOCK_SUMS(left, right)
    if cuda.threadIdx.x == 0:
        partials[at] = left[0]
        partials[at + 1] = right[0]
    cuda.syncthreads()


# --- the kernels ------------------------------------------------------------------------------------------------------


def squared(values, step):
    """The element function of `squares`, of (x,)."""
    x = float64(CONDITIONED(step, values[0]))
    u = UNSCALED(step, values[0])
    return (), x * x, u - u


def squares(places, table, columns, chunks, n, partials):
    """The sum of the squares of each block's gradients; and 0, or NaN where one of them is not finite."""
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, DTYPE)
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
        step = StepHyper(*UNPACK_STEP(table, chunk.group * columns))
        x = place.g + G_BYTES * chunk.grad
        s, bad = LOOP((x,), 0, chunk.stop - chunk.start, step, 0.0, ZERO)
        LEAVE_SUMS(total, marks, s, bad, partials, WIDTH * chunk.block)
        c += cuda.gridDim.x


def squared_again(values, step):
    """The element function of `squares_again`, of (x,)."""
    x = float64(CONDITIONED(step, values[0]))
    return (), scaled_square(x, SCALE_UP), scaled_square(x, SCALE_DOWN)


def squares_again(places, selected, table, columns, chunks, n, partials):
    """In float64, after the sums of squares: the sums of the squares scaled up, and scaled down.

    They are computed from the sums where these are in range: elements are read again only where squares are not.
    """
    above = cuda.shared.array(THREADS, float64)
    below = cuda.shared.array(THREADS, float64)
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        if selected[chunk.place if SELECTS else 0] != 0:
            place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
            if SELECTS:
                step = STEP
                x = place.p + ITEMSIZE * chunk.start
            else:
                step = StepHyper(*UNPACK_STEP(table, chunk.group * columns))
                x = place.g + ITEMSIZE * chunk.grad
            at = WIDTH * chunk.block
            total = partials[at]
            s, t = 0.0, 0.0
            if not in_range(total):
                s, t = LOOP((x,), 0, chunk.stop - chunk.start, step, s, t)
            elif cuda.threadIdx.x == 0:
                s, t = rescaled(total, SCALE_UP), rescaled(total, SCALE_DOWN)
            LEAVE_SUMS(above, below, s, t, partials, at + 2)
        c += cuda.gridDim.x


def added(values, factor):
    """The element function of `add`, of (sum, more)."""
    new = factor * values[1]
    if not OVERWRITE:
        new = values[0] + new
    if MEASURE:
        x = float64(CONDITIONED(STEP, new))
        return (new,), x * x, new - new
    return (new,), ZERO, ZERO


def add(places, selected, weight, chunks, n, partials):
    """Add to the sums of the selected parameters, or overwrite them: see `fastopt.kernels.contract.Backend.add`."""
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, DTYPE)
    factor = DTYPE(weight)
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        if selected[chunk.place] != 0:
            place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
            buffers = (place.p + ITEMSIZE * chunk.start, place.g + G_BYTES * chunk.start)
            if MEASURE:
                s, bad = LOOP(buffers, 0, chunk.stop - chunk.start, factor, 0.0, ZERO)
                LEAVE_SUMS(total, marks, s, bad, partials, WIDTH * chunk.block)
            else:
                LOOP(buffers, 0, chunk.stop - chunk.start, factor, ZERO, ZERO)
        c += cuda.gridDim.x


def sum_runs(grads, order, starts, runs, width, sums):
    """Leave in each row of `sums` the sum of a run of rows of `grads`, in the order of the run."""
    run = cuda.blockIdx.x
    while run < runs:
        column = cuda.threadIdx.x
        while column < width:
            s = ZERO
            for k in range(starts[run], starts[run + 1]):
                s += grads[order[k] * width + column]
            sums[run * width + column] = s
            column += cuda.blockDim.x
        run += cuda.gridDim.x


ALL = np.ones(1, np.int64)
"""What is selected where everything is."""

# --- the launch -------------------------------------------------------------------------------------------------------


class SquaresKernel:
    """The norm of gradients, and whether all of them are finite."""

    def __init__(self, backend: Launcher, kernel: Any, again: Any, width: int):
        """again : `squares_again`, or None. width : how many numbers a line of the partial sums has."""
        self._backend = backend
        self._kernel = kernel
        self._again = again
        self._width = width

    def launch(self, places: Array, table: Array, chunks: Array, elements: int) -> Array:
        """As `fastopt.kernels.contract.NormKernel`; the next launch over these chunks on the stream overwrites them."""
        backend = self._backend
        found = backend.chunks(chunks)
        partials, lines = backend.partials(found, self._width)
        self._launch(backend.places(places), backend.table(table), found, partials)
        return lines

    def launch_on(self, places: Array, table: Array, found: Chunks) -> Array:
        """The same, with tables that are on the device, where the sums stay as well, all in a row."""
        partials = self._backend.empty(self._width * found.blocks)
        self._launch(places, table, found, partials)
        return partials

    def _launch(self, places: Array, table: Array, found: Chunks, partials: Array) -> None:
        length, columns = found.length, table.shape[1]
        self._backend.launch(self._kernel, length, places, table, columns, found.lines, length, partials)
        self.launch_again(places, table, found, partials)

    def launch_again(self, places: Array, table: Array, found: Chunks, partials: Array) -> None:
        """Complete partial sums whose first two columns are known."""
        if self._again is not None:
            backend, columns = self._backend, table.shape[1]
            arguments = (places, backend.constant(ALL), table, columns, found.lines, found.length, partials)
            backend.launch(self._again, found.length, *arguments)
