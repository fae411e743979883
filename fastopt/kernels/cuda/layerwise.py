"""The updates of rules that look at norms of whole parameters: LAMB and LARS before their step, NovoGrad for its v."""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
    in_range,
    rescaled,
    scaled_square,
    sums_per_block,
)
from fastopt.kernels.cuda.elementwise import ElementwiseKernel
from fastopt.kernels.cuda.launcher import Launcher
from fastopt.kernels.cuda.norms import SquaresKernel
from fastopt.kernels.cuda.target import THREADS, cuda


class Span(NamedTuple):
    """The partial sums of one parameter: a line of the table of spans, of int64."""

    place: int
    """The number of the parameter."""
    group: int
    """As `Chunk.group`."""
    block: int
    """The number of its first partial sum."""
    end: int
    """The number after its last one."""
    size: int
    """The number of its elements."""


N_SPAN = len(Span._fields)

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
LOOP: Callable[..., Any]
"""``loop`` of memory.py, with the element function of the kernel."""
OPAQUE: Callable[..., Any]
"""``opaque`` of memory.py."""
BLOCK_SUMS: Callable[..., Any]
"""``block_sums`` of norms.py, as part of the kernel."""
LEAVE_SUMS: Callable[..., Any]
"""``leave_sums`` of norms.py, as part of the kernel."""
SPAN_SUMS: Callable[..., Any]
"""`span_sums`, as part of the kernel."""
NORMS: Callable[..., Any]
"""`norms`, as part of the kernel."""
ROOT_OF_SQUARES: Callable[..., Any]
"""`fastopt.kernels.contract.root_of_squares`."""
UNPACK_PLACE: Callable[..., Any]
UNPACK_CHUNK: Callable[..., Any]
UNPACK_SPAN: Callable[..., Any]
ZERO: Any
ITEMSIZE: int
N_ROW: int
"""How many columns the table of hyperparameters has."""
EMA: bool
GATED: bool
WIDTH: int
"""`fastopt.kernels.contract.sums_per_block` of the dtype."""
DIRECTED: bool
"""Whether the rule has a DIRECTION."""
DIRECTION: Callable[..., Any]
"""`Layerwise.direction` of the rule."""
NUMBERED: bool
"""Whether the rule has a per-tensor state."""
ZERO_GRAD: bool

# --- the kernels ------------------------------------------------------------------------------------------------------


def proposed(values, context):
    """The element function of `propose`, of (*states, g, p)."""
    step, h = context
    new = ELEMENT(step, values[-1], values[-2], *values[:-2], h)
    x = float64(values[-1])
    u = float64(new[0])
    if ZERO_GRAD:
        return (*new[1:], ZERO), x * x, u * u
    return new[1:], x * x, u * u


def propose(places, states, table, chunks, n, partials):
    """First pass of a layerwise rule: update the states, and sum the squares of p and of the proposed update u.

    states : the addresses of the buffers of states, without the average.
    """
    of_p = cuda.shared.array(THREADS, float64)
    of_u = cuda.shared.array(THREADS, float64)
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
        first = OPAQUE(ITEMSIZE * (place.state + chunk.start))
        p = OPAQUE(place.p + ITEMSIZE * chunk.start - first)
        g = OPAQUE(place.g + ITEMSIZE * chunk.grad - first)
        pp, uu = LOOP((*states, g, p), first, chunk.stop - chunk.start, HYPERPARAMETERS(table, chunk.group), 0.0, 0.0)
        LEAVE_SUMS(of_p, of_u, pp, uu, partials, WIDTH * chunk.block)
        c += cuda.gridDim.x


def proposed_again(values, context):
    """The element function of `propose_again`, of (*states, p)."""
    _, h = context
    u = DIRECTION(values[-1], *values[:-1], h)
    return (), scaled_square(u, SCALE_UP), scaled_square(u, SCALE_DOWN)


def propose_again(places, states, table, chunks, n, partials):
    """In float64, after `propose`: the sums of the squares of u scaled up, and scaled down, as `squares_again`."""
    above = cuda.shared.array(THREADS, float64)
    below = cuda.shared.array(THREADS, float64)
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        at = WIDTH * chunk.block
        total = partials[at + 1]
        s, t = 0.0, 0.0
        if cuda.threadIdx.x == 0:
            s, t = rescaled(total, SCALE_UP), rescaled(total, SCALE_DOWN)
        if DIRECTED and not in_range(total):
            place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
            first = OPAQUE(ITEMSIZE * (place.state + chunk.start))
            p = OPAQUE(place.p + ITEMSIZE * chunk.start - first)
            h = HYPERPARAMETERS(table, chunk.group)
            s, t = LOOP((*states, p), first, chunk.stop - chunk.start, h, 0.0, 0.0)
        LEAVE_SUMS(above, below, s, t, partials, at + 4)
        c += cuda.gridDim.x


def span_sums(span, left, left_column, right, right_column, of_left, of_right):
    """The sums of a column of each of two arrays of partial sums over a span, in of_left[0] and of_right[0]."""
    s = 0.0
    t = 0.0
    for block in range(span.block + cuda.threadIdx.x, span.end, cuda.blockDim.x):
        s += left[WIDTH * block + left_column]
        t += right[WIDTH * block + right_column]
    of_left[cuda.threadIdx.x] = s
    of_right[cuda.threadIdx.x] = t
    BLOCK_SUMS(of_left, of_right)


def norms(span, left, left_column, right, right_column, of_left, of_right):
    """The norms over a span, from a column of sums of squares of each of two arrays of partial sums."""
    SPAN_SUMS(span, left, left_column, right, right_column, of_left, of_right)
    s, t = of_left[0], of_right[0]
    cuda.syncthreads()
    norm_left, norm_right = math.sqrt(s), math.sqrt(t)
    if WIDTH > 2:
        column = 2 + 2 * left_column
        SPAN_SUMS(span, left, column, left, column + 1, of_left, of_right)
        norm_left = ROOT_OF_SQUARES(s, of_left[0], of_right[0])
        cuda.syncthreads()
        column = 2 + 2 * right_column
        SPAN_SUMS(span, right, column, right, column + 1, of_left, of_right)
        norm_right = ROOT_OF_SQUARES(t, of_left[0], of_right[0])
        cuda.syncthreads()
    return float64(norm_left), float64(norm_right)  # in the simulator math.sqrt returns a Python float, which is weaker


def merge(spans, n, partials, ratios):
    """Leave the trust ratio of each parameter in ratios[parameter]."""
    of_p = cuda.shared.array(THREADS, float64)
    of_u = cuda.shared.array(THREADS, float64)
    for k in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        span = Span(*UNPACK_SPAN(spans, N_SPAN * k))
        norm_p, norm_u = NORMS(span, partials, 0, partials, 1, of_p, of_u)
        if cuda.threadIdx.x == 0:
            ratios[span.place] = RATIO(norm_p, norm_u)


def scale(spans, n, table, pp, gg, per_tensor, rows):
    """Take the scale of each parameter, and give the parameter a row of its own with that scale in it.

    pp, gg : the partial sums of the squares of p and of g.
    rows : overwritten: a table with a row per parameter.
    """
    of_p = cuda.shared.array(THREADS, float64)
    of_g = cuda.shared.array(THREADS, float64)
    for k in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        span = Span(*UNPACK_SPAN(spans, N_SPAN * k))
        norm_p, norm_g = NORMS(span, pp, 0, gg, 0, of_p, of_g)
        if cuda.threadIdx.x == 0:
            row = span.place * N_ROW
            for column in range(N_ROW):
                rows[row + column] = table[span.group * N_ROW + column]
            step, h = HYPERPARAMETERS(table, span.group)
            if NUMBERED:
                before = per_tensor[span.place]
                rows[row + N_ROW - 1], after = SCALED(step, norm_p, norm_g, before, h)
                if GATED:
                    after = before if step.proceeds == ZERO else after
                per_tensor[span.place] = after
            else:
                rows[row + N_ROW - 1] = SCALED(step, norm_p, norm_g, h)


def applied(values, context):
    """The element function of `apply`: of (p, *states), or (p, average, *states)."""
    (step, h), ratio = context
    if GATED and step.proceeds == ZERO:
        return (values[:2] if EMA else values[:1]), ZERO, ZERO
    if EMA:
        p = APPLY(values[0], *values[2:], ratio, h)
        return (p, AVERAGED(step, p, values[1])), ZERO, ZERO
    return (APPLY(*values, ratio, h),), ZERO, ZERO


def apply(places, ratios, states, table, chunks, n):
    """Second pass of a layerwise rule: move p by the proposed update, scaled by its parameter's ratio.

    states : the addresses of the average, if there is one, and of the buffers of states.
    """
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
        first = OPAQUE(ITEMSIZE * (place.state + chunk.start))
        p = OPAQUE(place.p + ITEMSIZE * chunk.start - first)
        context = (HYPERPARAMETERS(table, chunk.group), DTYPE(ratios[chunk.place]))
        LOOP((p, *states), first, chunk.stop - chunk.start, context, ZERO, ZERO)
        c += cuda.gridDim.x


# --- the launches -----------------------------------------------------------------------------------------------------


class LayerwiseKernel:
    """The update of a rule that scales each parameter's step by norms: two passes and a merge between them."""

    def __init__(
        self,
        backend: Launcher,
        n_states: int,
        propose: Any,
        again: tuple[SquaresKernel, Any] | None,
        merge: Any,
        apply: Any,
    ):
        """again : in float64, what completes the partial sums: those of p, and those of u."""
        self._backend = backend
        self._again = again
        self._n_states = n_states
        self._propose = propose
        self._merge = merge
        self._apply = apply

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        backend = self._backend
        found = backend.chunks(chunks)
        if found.blocks == 0:
            return
        addresses = backend.addresses(states)
        own, average = addresses[: self._n_states], addresses[self._n_states :]
        where, on_device = backend.places(places), backend.table(table)
        width = sums_per_block(on_device.dtype)
        partials = backend.empty(width * found.blocks)
        ratios = backend.empty(found.parameters)
        backend.launch(self._propose, found.length, where, own, on_device, found.lines, found.length, partials)
        if self._again is not None:
            of_p, of_u = self._again
            of_p.launch_again(where, on_device, found, partials)
            backend.launch(of_u, found.length, where, own, on_device, found.lines, found.length, partials)
        backend.launch(self._merge, found.spanned, found.spans, found.spanned, partials, ratios)
        both = (*average, *own)
        backend.launch(self._apply, found.length, where, ratios, both, on_device, found.lines, found.length)


class ScaledKernel:
    """The update of a rule whose h depends on norms: one pass over p and one over g, then the update."""

    def __init__(
        self,
        backend: Launcher,
        norms: tuple[SquaresKernel, SquaresKernel],
        scale: Any,
        update: ElementwiseKernel,
        numbered: bool,
    ):
        """norms : of p, and of g. numbered : whether the last of the states is the rule's per-tensor state."""
        self._backend = backend
        self._of_p, self._of_g = norms
        self._scale = scale
        self._update = update
        self._numbered = numbered

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        backend = self._backend
        found = backend.chunks(chunks)
        if found.blocks == 0:
            return
        where, on_device = backend.places(places), backend.table(table)
        columns = on_device.shape[1]
        pp = self._of_p.launch_on(where, on_device, found)
        gg = self._of_g.launch_on(where, on_device, found)
        rows = backend.empty(found.parameters * columns, on_device.dtype)
        states, per_tensor = (states[:-1], states[-1]) if self._numbered else (states, backend.unused(np.float64))
        addresses = backend.addresses(states)
        backend.launch(self._scale, found.spanned, found.spans, found.spanned, on_device, pp, gg, per_tensor, rows)
        self._update.launch_on(where, addresses, rows, found.by_place, found.length)
