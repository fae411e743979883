"""The update of a rule that sees sums over whole parameters: `fastopt.Sums`."""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import float64

from fastopt.kernels.contract import (
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
)
from fastopt.kernels.cuda.elementwise import ElementwiseKernel
from fastopt.kernels.cuda.launcher import Launcher
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

ELEMENT: Callable[..., Any]
"""``element`` of elements.py, bound to two terms and the features."""
FINISHED: Callable[..., Any]
"""``finishing`` of elements.py."""
HYPERPARAMETERS: Callable[..., Any]
"""``hyperparameters`` of elementwise.py, bound to the rule."""
SETTLED: Callable[..., Any]
"""``settled`` of elements.py, bound to `fastopt.Sums.settle`."""
NUMBERS: Callable[..., Any]
"""The NamedTuple of the per-tensor states."""
PUT_RESULTS: Callable[..., Any]
"""`putting`, for the columns of the results."""
LOOP: Callable[..., Any]
"""``loop`` of memory.py, with the element function of the kernel."""
OPAQUE: Callable[..., Any]
"""``opaque`` of memory.py."""
LEAVE_SUMS: Callable[..., Any]
"""``leave_sums`` of norms.py, as part of the kernel."""
LOAD_NUMBERS: Callable[..., Any]
STORE_NUMBERS: Callable[..., Any]
"""``memory`` of memory.py, of one float64 in each buffer of per-tensor states."""
UNPACK_PLACE: Callable[..., Any]
UNPACK_CHUNK: Callable[..., Any]
UNPACK_SPAN: Callable[..., Any]
UNPACK_SUMS: Callable[..., Any]
UNPACK_NUMBERS: Callable[..., Any]
PACK_VALUES: Callable[..., Any]
ZERO: Any
ITEMSIZE: int
P_BYTES: int
P_SHIFT: int
G_BYTES: int
G_SHIFT: int
"""As in elementwise.py."""
N_ROW: int
"""How many columns the table of hyperparameters has."""
N_TERMS: int
"""How many terms and norms there are."""
N_TOTALS: int
"""How many sums a parameter has: those of all terms and norms, of a 0 where their number is odd, and of squares scaled
up and down for each norm of float64."""
N_VALUES: int
"""How many values are settled ..."""
N_RESULTS: int
"""... and how many of these, the first ones, are results; the others are numbers."""
N_NUMBERS: int
GATED: bool
OVER_ALL: bool
"""Whether the sums go over all parameters."""
OWN_ROWS: bool
"""Whether the table has a row per parameter, not per group."""

NUMBER_BYTES = 8
NETWORK = Place._fields.index("network")
PAIR = 2
"""A kernel adds up two terms."""

# --- the kernels ------------------------------------------------------------------------------------------------------


def nothing(*arguments):
    """The second term of a pair where there is none."""
    return 0.0


def termed(values, context):
    """The element function of `sum_terms`, of (*states, g, p)."""
    step, h = context
    found = ELEMENT(step, values[-1], values[-2], *values[:-2], h)
    return (), float64(found[0]), float64(found[1])


def sum_terms(places, states, table, chunks, n, partials):
    """Leave the sums of two terms over every chunk in a line of `partials`.

    states : the addresses of the rule's buffers of states.
    """
    left = cuda.shared.array(THREADS, float64)
    right = cuda.shared.array(THREADS, float64)
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
        first = OPAQUE(ITEMSIZE * (place.state + chunk.start))
        p = OPAQUE(place.p + P_BYTES * chunk.start - (first >> P_SHIFT))
        g = OPAQUE(place.g + G_BYTES * chunk.grad - (first >> G_SHIFT))
        s, t = LOOP((*states, g, p), first, chunk.stop - chunk.start, HYPERPARAMETERS(table, chunk.group), 0.0, 0.0)
        LEAVE_SUMS(left, right, s, t, partials, PAIR * chunk.block)
        c += cuda.gridDim.x


def sum_again(places, states, table, chunks, n, known, column, partials):
    """In float64, after `sum_terms`: the sums of the squares of what a norm is of, scaled up, and scaled down.

    They are computed from the sums where these are in range: elements are read again only where squares are not.
    ELEMENT gives the two scaled squares.

    known, column : the partial sums, and which of a pair is that of the squares.
    """
    above = cuda.shared.array(THREADS, float64)
    below = cuda.shared.array(THREADS, float64)
    c = cuda.blockIdx.x
    while c < n:
        chunk = Chunk(*UNPACK_CHUNK(chunks, N_CHUNK * c))
        squares = known[PAIR * chunk.block + column]
        s, t = 0.0, 0.0
        if cuda.threadIdx.x == 0:
            s, t = rescaled(squares, SCALE_UP), rescaled(squares, SCALE_DOWN)
        if not in_range(squares):
            place = Place(*UNPACK_PLACE(places, N_PLACE * chunk.place))
            first = OPAQUE(ITEMSIZE * (place.state + chunk.start))
            p = OPAQUE(place.p + P_BYTES * chunk.start - (first >> P_SHIFT))
            g = OPAQUE(place.g + G_BYTES * chunk.grad - (first >> G_SHIFT))
            s, t = LOOP((*states, g, p), first, chunk.stop - chunk.start, HYPERPARAMETERS(table, chunk.group), 0.0, 0.0)
        LEAVE_SUMS(above, below, s, t, partials, PAIR * chunk.block)
        c += cuda.gridDim.x


def total(spans, n, together, partials, column, totals):
    """Add up the sums of the chunks of every parameter, or of all of a network in one block.

    n : how many such sums there are. together : how many spans each of them is of.
    """
    left = cuda.shared.array(THREADS, float64)
    right = cuda.shared.array(THREADS, float64)
    for k in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        span = Span(*UNPACK_SPAN(spans, N_SPAN * together * k))
        end = span.end
        if OVER_ALL:
            end = Span(*UNPACK_SPAN(spans, N_SPAN * (together * k + together - 1))).end
        s = 0.0
        t = 0.0
        for block in range(span.block + cuda.threadIdx.x, end, cuda.blockDim.x):
            s += partials[PAIR * block]
            t += partials[PAIR * block + 1]
        LEAVE_SUMS(left, right, s, t, totals, N_TOTALS * k + column)


def settle(spans, n, together, totals, table, numbers, values):
    """Settle the sums of each parameter, or of all: leave a line of new values, the results and then the numbers.

    n, together : as for `total`. numbers : the addresses of the buffers of per-tensor states.
    """
    k = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    while k < n:
        span = Span(*UNPACK_SPAN(spans, N_SPAN * together * k))
        size = span.size
        if OVER_ALL:
            for other in range(1, together):
                size += Span(*UNPACK_SPAN(spans, N_SPAN * (together * k + other))).size
        _, h = HYPERPARAMETERS(table, span.place if OWN_ROWS else span.group)
        if N_TERMS > 0:  # noqa: SIM108
            sums = FINISHED(UNPACK_SUMS(totals, N_TOTALS * k))
        else:
            sums = ()
        if N_NUMBERS > 0:  # noqa: SIM108
            old = NUMBERS(*LOAD_NUMBERS(numbers, NUMBER_BYTES * span.place)[0])
        else:
            old = ()
        PACK_VALUES(values, N_VALUES * k, SETTLED(sums, old, float64(size), h))
        k += cuda.gridDim.x * cuda.blockDim.x


def spread(spans, n, together, count, table, values, numbers, rows):
    """Give each parameter a row of its own with the results in it, and write the numbers, unless the step is skipped.

    n : how many spans there are. together : as for `total`. count : how many parameters a network has. rows :
    overwritten: a table with a row per parameter.
    """
    every = cuda.gridDim.x * cuda.blockDim.x
    k = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    while k < n:
        span = Span(*UNPACK_SPAN(spans, N_SPAN * k))
        row = N_ROW * (span.place if OWN_ROWS else span.group)
        line = N_VALUES * (k // together)
        for column in range(N_ROW):
            rows[N_ROW * span.place + column] = table[row + column]
        PUT_RESULTS(rows, N_ROW * span.place, values, line)
        if N_NUMBERS > 0 and not OVER_ALL and (not GATED or table[row + PROCEEDS] != ZERO):
            STORE_NUMBERS(numbers, NUMBER_BYTES * span.place, (UNPACK_NUMBERS(values, line + N_RESULTS),))
        k += every
    if N_NUMBERS > 0 and OVER_ALL:  # parameters without a gradient have the same numbers
        k = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        while k < n // together * count:
            network = k // count
            span = Span(*UNPACK_SPAN(spans, N_SPAN * together * network))
            row = N_ROW * (span.place if OWN_ROWS else span.group)
            if not GATED or table[row + PROCEEDS] != ZERO:
                place = span.place - span.place % count + k % count
                new = UNPACK_NUMBERS(values, N_VALUES * network + N_RESULTS)
                STORE_NUMBERS(numbers, NUMBER_BYTES * place, (new,))
            k += every


def putting(columns):
    """A function ``(rows, row, values, line)`` that writes the first values of a line to these columns of a row."""
    if not columns:
        return _put_nothing
    *others, last = columns
    before, at = putting(others), len(others)

    def put(rows, row, values, line):
        before(rows, row, values, line)
        rows[row + last] = values[line + at]

    return put


def _put_nothing(rows, row, values, line):
    return None


# --- the launches -----------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A `fastopt.Sums`, compiled."""

    pairs: tuple[Any, ...]
    """`sum_terms`, for each pair of terms and norms."""
    again: tuple[tuple[int, Any], ...]
    """`sum_again`, for each norm of float64, with its number among the terms."""
    total: Any
    settle: Any
    spread: Any
    values: int
    """How many values are settled."""
    numbers: tuple[int, ...]
    """Which of the rule's per-tensor states are its own."""
    over_all: bool


class SummedKernel:
    """The update of a rule whose h depends on sums: for each `Stage` passes that add, then the update."""

    def __init__(
        self,
        backend: Launcher,
        stages: tuple[Stage, ...],
        update: ElementwiseKernel,
        n_states: int,
        n_numbers: int,
        *,
        kept: bool,
    ):
        """n_states, n_numbers : how many of the first states are the rule's, and of the last ones per-tensor states.

        kept : whether the one before these holds what is kept of the parameters, which terms read.
        """
        self._backend = backend
        self._stages = stages
        self._update = update
        self._n_states = n_states
        self._n_numbers = n_numbers
        self._kept = kept

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        backend = self._backend
        found = backend.chunks(chunks)
        if found.blocks == 0:
            return
        where, on_device = backend.places(places), backend.table(table)
        columns, flat, lines = on_device.shape[1], on_device.reshape(-1), found.lines
        buffers = backend.addresses(states)
        end = len(states) - self._n_numbers
        own, numbers = buffers[: self._n_states], buffers[end:]
        if self._kept:
            own = (*own, buffers[end - 1])
        spans, n = found.spans, found.spanned
        count = len(places) // (int(places[-1, NETWORK]) + 1)
        for stage in self._stages:
            of_stage = tuple([numbers[k] for k in stage.numbers])
            totals = backend.empty(PAIR * max(1, len(stage.pairs) + len(stage.again)) * found.parameters)
            partials = [backend.empty(PAIR * found.blocks) for _ in (*stage.pairs, *stage.again)]
            for kernel, made in zip(stage.pairs, partials, strict=False):
                backend.launch(kernel, found.length, where, own, flat, lines, found.length, made)
            for (number, kernel), made in zip(stage.again, partials[len(stage.pairs) :], strict=True):
                known = partials[number // PAIR], number % PAIR
                backend.launch(kernel, found.length, where, own, flat, lines, found.length, *known, made)
            summed = len(np.unique(found.places // count)) if stage.over_all else n
            together = n // summed
            for number, made in enumerate(partials):
                backend.launch(stage.total, summed, spans, summed, together, made, PAIR * number, totals)
            values = backend.empty(stage.values * n)
            rows = backend.empty(found.parameters * columns, on_device.dtype)
            blocks = -(-summed // THREADS)
            backend.launch(stage.settle, blocks, spans, summed, together, totals, flat, of_stage, values)
            widest = -(-max(n, summed * count) // THREADS)
            backend.launch(stage.spread, widest, spans, n, together, count, flat, values, of_stage, rows)
            flat, lines = rows, found.by_place
        self._update.launch_on(where, buffers[:end], flat, lines, found.length)
