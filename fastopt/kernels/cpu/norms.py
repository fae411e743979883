"""The passes over gradients before an update: the sums of their squares, and the adding up of several gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastopt.kernels.contract import (
    BLOCK,
    N_CHUNK,
    N_PLACE,
    SCALE_DOWN,
    SCALE_UP,
    Array,
    Chunk,
    Cut,
    Place,
    StepHyper,
    in_range,
    rescaled,
    scaled_square,
    sums_per_block,
)
from fastopt.kernels.driver import Loop
from fastopt.kernels.intrinsics import at_address, record

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

DTYPE: Any
"""What is computed in, and what accumulated gradients are stored as."""
G_TYPE: Any
"""What gradients are stored as."""
READ: Callable[..., Any]
"""``reading`` of formats.py, for what is measured ..."""
READ_GRAD: Callable[..., Any]
"""... and for a gradient."""
UNSCALED: Callable[..., Any]
"""``unscaled`` of elements.py, bound to the features."""
CONDITIONED: Callable[..., Any]
"""``conditioned`` of elements.py, bound to the features."""
ZERO: Any
APART: bool
"""Whether a second sum has to find what is not finite."""
MEASURE: bool
"""Whether the new sums are measured."""
MEASURE_BLOCK: Callable[..., Any]
"""`measure_block`, bound to the constants above, and inlined."""
STEP: StepHyper
WIDE: bool
"""Whether squares may leave the range of float64, so that blocks where they do are summed again, scaled."""

# --- the loops --------------------------------------------------------------------------------------------------------


def measure_block(step, x, partials, block):
    """The sum of the squares of the elements of a block; and 0, or NaN where one of them is not finite."""
    # float64: squares of float32 are exact in it, and neither 1e30 nor 1e-30 leaves its range.
    total = 0.0
    bad = ZERO
    for i in range(x.size):
        element = READ((x,), i)[0]
        value = np.float64(CONDITIONED(step, element))
        total += value * value
        if APART:
            bad += UNSCALED(step, element) - UNSCALED(step, element)
    partials[block, 0] = total
    partials[block, 1] = bad if APART else total - total
    if WIDE:
        up, down = rescaled(total, SCALE_UP), rescaled(total, SCALE_DOWN)
        if not in_range(total):
            up = 0.0
            down = 0.0
            for i in range(x.size):
                value = np.float64(CONDITIONED(step, READ((x,), i)[0]))
                up += scaled_square(value, SCALE_UP)
                down += scaled_square(value, SCALE_DOWN)
        partials[block, 2] = up
        partials[block, 3] = down


def squares(places, table, chunks, partials, first, last):
    """Measure each block of gradients."""
    for c in range(first, last):
        chunk = record(Chunk, chunks, c * N_CHUNK)
        place = record(Place, places, chunk.place * N_PLACE)
        step = record(StepHyper, table, chunk.group * table.shape[1])
        block = chunk.block
        for start in range(chunk.start, chunk.stop, BLOCK):
            size = min(BLOCK, chunk.stop - start)
            x = at_address(G_TYPE, place.g, chunk.grad + start - chunk.start, size)
            MEASURE_BLOCK(step, x, partials, block)
            block += 1


def add(places, present, overwrite, weight, chunks, partials, first, last):
    """Add weight times an array to a sum, and measure what the sum is then: see `fastopt.kernels.contract.Backend`."""
    weight[1] = DTYPE(1)
    for c in range(first, last):
        chunk = record(Chunk, chunks, c * N_CHUNK)
        if present[chunk.place]:
            place = record(Place, places, chunk.place * N_PLACE)
            block = chunk.block
            for start in range(chunk.start, chunk.stop, BLOCK):
                size = min(BLOCK, chunk.stop - start)
                total = at_address(DTYPE, place.p, start, size)
                more = (at_address(G_TYPE, place.g, start, size),)
                if overwrite[chunk.place]:
                    for i in range(size):
                        total[i] = weight[0] * READ_GRAD(more, i)[0]
                else:
                    for i in range(size):
                        total[i] = total[i] + weight[0] * READ_GRAD(more, i)[0]
                if MEASURE:  # in a loop of its own: the block is in L1
                    MEASURE_BLOCK(STEP, total, partials, block)
                block += 1


def summed(chunks, c, partials, column):
    """The sum of a column of partial sums over the parameter whose first chunk is c, in index order; and its end."""
    place = record(Chunk, chunks, c * N_CHUNK).place
    total = 0.0
    while c < chunks.shape[0]:
        chunk = record(Chunk, chunks, c * N_CHUNK)
        if chunk.place != place:
            break
        for block in range(chunk.block, chunk.block + (chunk.stop - chunk.start + BLOCK - 1) // BLOCK):
            total += partials[block, column]
        c += 1
    return total, c


def blocks_of(chunks: Array) -> int:
    """The number of blocks of a table of chunks that ends with its last block."""
    if chunks.shape[0] == 0:
        return 0
    _, start, stop, _, _, block = chunks[-1].tolist()  # a `Chunk`, whose making takes as long as all this
    return int(block - (start - stop) // BLOCK)


class SquaresKernel:
    """The norm of gradients, and whether all of them are finite."""

    def __init__(self, loop: Loop, dtype: np.dtype[Any]):
        self._loop = loop
        self._width = sums_per_block(dtype)

    def launch(self, places: Array, table: Array, chunks: Array, elements: int) -> Array:
        """As `fastopt.kernels.contract.NormKernel`."""
        if type(chunks) is Cut:
            return chunks.gathered(self.launch(places, table, chunks.own, elements))
        partials = np.empty((blocks_of(chunks), self._width))
        self._loop.run(places, table, chunks, partials, elements=elements, units=chunks.shape[0])
        return partials
