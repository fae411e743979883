"""The updates of rules that look at norms of whole parameters: LAMB and LARS before their step, NovoGrad for its v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastopt.kernels.contract import (
    BLOCK,
    N_CHUNK,
    N_PLACE,
    PROCEEDS,
    SCALE_DOWN,
    SCALE_UP,
    Array,
    Chunk,
    Place,
    in_range,
    rescaled,
    scaled_square,
    sums_per_block,
)
from fastopt.kernels.cpu.elementwise import ElementwiseKernel
from fastopt.kernels.cpu.norms import SquaresKernel, blocks_of, norm_of
from fastopt.kernels.driver import Loop
from fastopt.kernels.intrinsics import at_address, put_values, record, values_at, window, windows
from fastopt.signals import deferred_signals

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

DTYPE: Any
"""That of parameters, gradients and states."""
ELEMENT: Callable[..., Any]
"""``element`` of elements.py, bound to the rule and the features."""
HYPERPARAMETERS: Callable[..., Any]
"""``hyperparameters`` of elementwise.py, bound to the rule."""
APPLY: Callable[..., Any]
"""`Layerwise.apply` of the rule."""
RATIO: Callable[..., Any]
"""`Layerwise.ratio` of the rule."""
SCALED: Callable[..., Any]
"""``scaled`` of elements.py, bound to the rule's `Scaling`."""
AVERAGED: Callable[..., Any]
"""``averaged`` of elements.py."""
ZERO: Any
N_STATES: int
"""How many buffers of states the rule has."""
EMA: bool
NUMBERED: bool
"""Whether the rule has a per-tensor state."""
ZERO_GRAD: bool
WIDE: bool
"""Whether squares may leave the range of float64, so that blocks where they do are summed again, scaled."""
DIRECTED: bool
"""Whether the rule has a DIRECTION."""
DIRECTION: Callable[..., Any]
"""`Layerwise.direction` of the rule."""

GROUP = Chunk._fields.index("group")

# --- the loops --------------------------------------------------------------------------------------------------------


def propose(places, states, table, chunks, partials, first, last):
    """First pass of a layerwise rule: update the states, and sum the squares of p and of the proposed update u.

    u itself is not stored: the second pass computes it again from the new states, which reads no more memory than a
    buffer for u would.
    """
    table[0, PROCEEDS] = ZERO
    for c in range(first, last):
        chunk = record(Chunk, chunks, c * N_CHUNK)
        place = record(Place, places, chunk.place * N_PLACE)
        step, h = HYPERPARAMETERS(table, chunk.group)
        block = chunk.block
        for start in range(chunk.start, chunk.stop, BLOCK):
            size = min(BLOCK, chunk.stop - start)
            p = at_address(DTYPE, place.p, start, size)
            g = at_address(DTYPE, place.g, chunk.grad + start - chunk.start, size)
            own = windows(states[:N_STATES], place.state + start, size)
            # float64: squares of float32 are exact in it, and neither 1e30 nor 1e-30 leaves its range.
            pp = 0.0
            uu = 0.0
            for i in range(size):
                new = ELEMENT(step, p[i], g[i], *values_at(own, i), h)
                put_values(own, i, new[1:])
                if ZERO_GRAD:
                    g[i] = ZERO
                pp += np.float64(p[i]) * np.float64(p[i])
                uu += np.float64(new[0]) * np.float64(new[0])
            partials[block, 0] = pp
            partials[block, 1] = uu
            if WIDE:
                pp_up, pp_down = rescaled(pp, SCALE_UP), rescaled(pp, SCALE_DOWN)
                uu_up, uu_down = rescaled(uu, SCALE_UP), rescaled(uu, SCALE_DOWN)
                if not in_range(pp):
                    pp_up = 0.0
                    pp_down = 0.0
                    for i in range(size):
                        pp_up += scaled_square(p[i], SCALE_UP)
                        pp_down += scaled_square(p[i], SCALE_DOWN)
                if DIRECTED and not in_range(uu):
                    uu_up = 0.0
                    uu_down = 0.0
                    for i in range(size):
                        u = DIRECTION(p[i], *values_at(own, i), h)
                        uu_up += scaled_square(u, SCALE_UP)
                        uu_down += scaled_square(u, SCALE_DOWN)
                partials[block, 2] = pp_up
                partials[block, 3] = pp_down
                partials[block, 4] = uu_up
                partials[block, 5] = uu_down
            block += 1


def merge(chunks, partials, ratios):
    """Leave the trust ratio of each parameter in ratios[parameter]."""
    c = 0
    while c < chunks.shape[0]:
        place = record(Chunk, chunks, c * N_CHUNK).place
        norm_p, end = norm_of(chunks, c, partials, 0)
        norm_u, _ = norm_of(chunks, c, partials, 1)
        ratios[place] = RATIO(norm_p, norm_u)
        c = end


def scale(chunks, table, pp, gg, per_tensor, rows, own_rows):
    """Take the scale of each parameter, and give the parameter a row of its own with that scale in it.

    pp, gg : the partial sums of the squares of p and of g.
    rows, own_rows : overwritten: a table with a row per parameter, and the chunks that point to it.
    """
    table[0, PROCEEDS] = ZERO
    width = table.shape[1]
    c = 0
    while c < chunks.shape[0]:
        chunk = record(Chunk, chunks, c * N_CHUNK)
        place = chunk.place
        norm_p, _ = norm_of(chunks, c, pp, 0)
        norm_g, end = norm_of(chunks, c, gg, 0)
        for column in range(width):
            rows[place, column] = table[chunk.group, column]
        step, h = HYPERPARAMETERS(table, chunk.group)
        if NUMBERED:
            rows[place, width - 1], per_tensor[place] = SCALED(step, norm_p, norm_g, per_tensor[place], h)
        else:
            rows[place, width - 1] = SCALED(step, norm_p, norm_g, h)
        while c < end:
            for column in range(N_CHUNK):
                own_rows[c, column] = place if column == GROUP else chunks[c, column]
            c += 1


def apply(places, ratios, states, table, chunks, first, last):
    """Second pass of a layerwise rule: move p by the proposed update, scaled by its parameter's ratio."""
    backwards = last < first
    count = first - last if backwards else last - first
    for k in range(count):
        chunk = record(Chunk, chunks, (first - 1 - k if backwards else first + k) * N_CHUNK)
        place = record(Place, places, chunk.place * N_PLACE)
        step, h = HYPERPARAMETERS(table, chunk.group)
        ratio = DTYPE(ratios[chunk.place])
        size = chunk.stop - chunk.start
        p = at_address(DTYPE, place.p, chunk.start, size)
        own = windows(states[:N_STATES], place.state + chunk.start, size)
        if EMA:
            average = window(states[N_STATES], place.state + chunk.start, size)
        for i in range(size):
            p[i] = APPLY(p[i], *values_at(own, i), ratio, h)
            if EMA:
                average[i] = AVERAGED(step, p[i], average[i])


class LayerwiseKernel:
    """The update of a rule that scales each parameter's step by norms: two passes and a merge between them."""

    def __init__(self, propose: Loop, merge: Callable[..., None], apply: Loop, dtype: np.dtype[Any]):
        self._propose = propose
        self._merge = merge
        self._apply = apply
        self._width = sums_per_block(dtype)

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        n = chunks.shape[0]
        if n == 0:
            return
        partials = np.empty((blocks_of(chunks), self._width))
        ratios = np.empty(places.shape[0])
        with deferred_signals:
            self._propose.run(places, states, table, chunks, partials, elements=elements, units=n)
            self._merge(chunks, partials, ratios)
            self._apply.run(places, ratios, states, table, chunks, elements=elements, units=n, backwards=True)


class ScaledKernel:
    """The update of a rule whose h depends on norms: one pass over p and one over g, then the update."""

    def __init__(
        self,
        norms: tuple[SquaresKernel, SquaresKernel],
        scale: Callable[..., None],
        update: ElementwiseKernel,
        numbered: bool,
    ):
        """norms : of p, and of g. numbered : whether the last of the states is the rule's per-tensor state."""
        self._of_p, self._of_g = norms
        self._scale = scale
        self._update = update
        self._numbered = numbered

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        if chunks.shape[0] == 0:
            return
        states, per_tensor = (states[:-1], states[-1]) if self._numbered else (states, np.empty(0))
        pp = self._of_p.launch(places, table, chunks, elements)
        gg = self._of_g.launch(places, table, chunks, elements)
        rows = np.empty((places.shape[0], table.shape[1]), table.dtype)
        own_rows = np.empty_like(chunks)
        with deferred_signals:
            self._scale(chunks, table, pp, gg, per_tensor, rows, own_rows)
            self._update.launch(places, states, rows, own_rows, elements)
