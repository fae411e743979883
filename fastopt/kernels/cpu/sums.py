"""The update of a rule that sees sums over whole parameters: `fastopt.Sums`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    Cut,
    Place,
    in_range,
    rescaled,
)
from fastopt.kernels.cpu.elementwise import ElementwiseKernel
from fastopt.kernels.cpu.norms import blocks_of, summed
from fastopt.kernels.driver import Loop
from fastopt.kernels.intrinsics import (
    add_values,
    at_address,
    put_rounded,
    put_values,
    record,
    rooms_for,
    values_at,
    windows,
)
from fastopt.signals import deferred_signals

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

P_TYPE: Any
G_TYPE: Any
READ_GRAD: Callable[..., Any]
"""As in elementwise.py."""
READ_TERMS: Callable[..., Any]
OF_TERMS: Callable[..., Any]
"""As in lines.py."""
ELEMENT: Callable[..., Any]
"""``element`` of elements.py, bound to the terms and the features."""
HYPERPARAMETERS: Callable[..., Any]
"""``hyperparameters`` of elementwise.py, bound to the rule."""
SETTLED: Callable[..., Any]
"""``settled`` of elements.py, bound to `fastopt.Sums.settle`."""
SUM_BLOCK: Callable[..., Any]
"""`sum_block`, for the terms and for the squares of the norms."""
SUM_AGAIN: Callable[..., Any]
"""The same for these squares scaled up and down."""
ADDED: Callable[..., Any]
"""``adding`` of elements.py, or ``adding_scaled``."""
FINISHED: Callable[..., Any]
"""``finishing`` of elements.py."""
NUMBERS: Callable[..., Any]
"""The NamedTuple of the per-tensor states."""
NO_SUMS: tuple[float, ...]
"""A 0 for each value of ADDED."""
NOTHING_SETTLED: tuple[float, ...]
"""A 0 for each value that is settled."""
COLUMNS: tuple[int, ...]
"""Of the table: those of the results."""
ZERO: Any
FETCH: Callable[..., Any]
"""``fetching`` of intrinsics.py, for what the terms read."""
N_STATES: int
N_TERMS: int
"""How many terms and norms there are ..."""
N_NORMS: int
"""... how many of these, the last ones, are norms ..."""
N_TOTALS: int
"""... and how many numbers a line of partial sums has."""
WIDE: bool
"""Whether squares may leave the range of float64, so that blocks where they do are summed again, scaled."""
N_RESULTS: int
N_NUMBERS: int
OVER_ALL: bool
"""Whether the sums go over all parameters."""

GROUP, PLACE = Chunk._fields.index("group"), Chunk._fields.index("place")

RUN = 64
"""Elements whose terms are computed before they are added up: few, so that the processor begins with the next ones."""
ROOMS = rooms_for(RUN)
AHEAD = 1024
"""Elements ahead memory is asked for: between two runs it would not be."""

# --- the loops --------------------------------------------------------------------------------------------------------


def sum_block(step, p, g, states, h):
    """The sums over a block of elements.

    What is added up waits in the cache: a loop that adds up float64 computes half as many float32 at a time.
    """
    given = READ_TERMS((p, *states), 0)
    values = ROOMS(ELEMENT(step, given[0], READ_GRAD((g,), 0)[0], *given[1:], h))
    totals = ROOMS(NO_SUMS)
    for i in range(RUN):
        put_values(totals, i, NO_SUMS)
    for start in range(0, p.size, RUN):
        size = min(RUN, p.size - start)
        own_g, own = windows((g,), start, size), windows((p, *states), start, size)
        FETCH((p, g, *states), start + AHEAD, start + AHEAD + RUN)
        for i in range(size):
            given = READ_TERMS(own, i)
            put_rounded(values, i, ELEMENT(step, given[0], READ_GRAD(own_g, i)[0], *given[1:], h))
        for i in range(size):
            put_values(totals, i, add_values(values_at(totals, i), ADDED(values_at(values, i))))
    total = NO_SUMS
    for i in range(RUN):
        total = add_values(total, values_at(totals, i))
    return total


def sum_terms(places, states, table, chunks, partials, first, last):
    """Leave the sums of the terms of every block in a line of `partials`; backwards where `last` is the smaller."""
    backwards = last < first
    count = first - last if backwards else last - first
    for number in range(count):
        chunk = record(Chunk, chunks, (first - 1 - number if backwards else first + number) * N_CHUNK)
        place = record(Place, places, chunk.place * N_PLACE)
        step, h = HYPERPARAMETERS(table, chunk.group)
        block = chunk.block
        for start in range(chunk.start, chunk.stop, BLOCK):
            size = min(BLOCK, chunk.stop - start)
            p = at_address(P_TYPE, place.p, start, size)
            g = at_address(G_TYPE, place.g, chunk.grad + start - chunk.start, size)
            own = windows(OF_TERMS(states), place.state + start, size)
            totals = SUM_BLOCK(step, p, g, own, h)
            for k in range(N_TERMS):
                partials[block, k] = totals[k]
            if WIDE:
                right = True
                for k in range(N_TERMS - N_NORMS, N_TERMS):
                    right = right and in_range(totals[k])
                if right:
                    for k in range(N_NORMS):
                        total = totals[N_TERMS - N_NORMS + k]
                        partials[block, N_TERMS + 2 * k] = rescaled(total, SCALE_UP)
                        partials[block, N_TERMS + 2 * k + 1] = rescaled(total, SCALE_DOWN)
                else:
                    scaled = SUM_AGAIN(step, p, g, own, h)
                    for k in range(2 * N_NORMS):
                        partials[block, N_TERMS + k] = scaled[k]
            block += 1


def settle(places, chunks, partials, table, numbers, rows, own_rows):
    """Settle the sums of each parameter, or of all, and give each parameter a row of its own with the results in it.

    All are those of one network. numbers : the buffers of the per-tensor states.
    rows, own_rows : overwritten: a table with a row per parameter, and the chunks that point to it.
    """
    table[0, PROCEEDS] = ZERO
    found = np.empty(max(1, N_TOTALS))
    network = -1
    c = 0
    while c < chunks.shape[0]:
        chunk = record(Chunk, chunks, c * N_CHUNK)
        place = chunk.place
        own_network = record(Place, places, place * N_PLACE).network
        if own_network != network or not OVER_ALL:
            end = c
            size = 0
            for k in range(N_TOTALS):
                found[k] = 0.0
            while end < chunks.shape[0]:
                of_parameter = record(Chunk, chunks, end * N_CHUNK).place
                if OVER_ALL:
                    if record(Place, places, of_parameter * N_PLACE).network != own_network:
                        break
                elif of_parameter != place:
                    break
                begin = end
                for k in range(N_TOTALS):
                    total, _ = summed(chunks, begin, partials, k)
                    found[k] += total
                while end < chunks.shape[0] and record(Chunk, chunks, end * N_CHUNK).place == of_parameter:
                    piece = record(Chunk, chunks, end * N_CHUNK)
                    size += piece.stop - piece.start
                    end += 1
            _, h = HYPERPARAMETERS(table, chunk.group)
            if N_TERMS > 0:  # noqa: SIM108 a branch is pruned, an expression is not
                sums = FINISHED(found)
            else:
                sums = ()
            if N_NUMBERS > 0:  # noqa: SIM108
                old = NUMBERS(*values_at(numbers, place))
            else:
                old = ()
            new = add_values(NOTHING_SETTLED, SETTLED(sums, old, np.float64(size), h))
            if N_NUMBERS > 0:
                if OVER_ALL:  # those of parameters without a gradient as well: they stay the same for all
                    count = places.shape[0] // (record(Place, places, (places.shape[0] - 1) * N_PLACE).network + 1)
                    for k in range(own_network * count, (own_network + 1) * count):
                        put_values(numbers, k, new[N_RESULTS:])
                else:
                    put_values(numbers, place, new[N_RESULTS:])
            network = own_network
        for column in range(table.shape[1]):
            rows[place, column] = table[chunk.group, column]
        for k in range(N_RESULTS):
            rows[place, COLUMNS[k]] = new[k]
        while c < chunks.shape[0] and record(Chunk, chunks, c * N_CHUNK).place == place:
            for column in range(N_CHUNK):
                own_rows[c, column] = place if column == GROUP else chunks[c, column]
            c += 1


class Stage(NamedTuple):
    """A `fastopt.Sums`, compiled."""

    sum_terms: Loop | None
    """None where there is no term: what is settled then follows from the numbers alone."""
    settle: Callable[..., None]
    width: int
    """How many numbers a line of partial sums has."""
    numbers: tuple[int, ...]
    """Which of the rule's per-tensor states are its own."""


class SummedKernel:
    """The update of a rule whose h depends on sums: for each `Stage` one pass that adds, then the update."""

    def __init__(self, stages: tuple[Stage, ...], update: ElementwiseKernel, n_numbers: int):
        """n_numbers : how many of the last states are per-tensor states."""
        self._stages = stages
        self._update = update
        self._n_numbers = n_numbers

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        whole, gathered = chunks, None
        if type(chunks) is Cut:
            chunks, whole, gathered = chunks
        if whole.shape[0] == 0:
            return
        units = chunks.shape[0]
        own, update = len(states) - self._n_numbers, self._update
        states, numbers = states[:own], states[own:]
        with deferred_signals:
            for stage in self._stages:
                partials = np.empty((blocks_of(chunks), stage.width))
                if stage.sum_terms is not None:
                    update.backwards = not update.backwards
                    stage.sum_terms.run(
                        places,
                        states,
                        table,
                        chunks,
                        partials,
                        elements=elements,
                        units=units,
                        backwards=update.backwards,
                    )
                    if gathered is not None:
                        partials = gathered(partials)
                rows = np.empty((places.shape[0], table.shape[1]), table.dtype)
                own_rows = np.empty_like(whole)
                of_stage = tuple([numbers[k] for k in stage.numbers])
                stage.settle(places, whole, partials, table, of_stage, rows, own_rows)
                table, whole = rows, own_rows
                if gathered is None:
                    chunks = whole
                else:
                    chunks = chunks.copy()
                    chunks[:, GROUP] = chunks[:, PLACE]
            update.launch(places, states, table, chunks, elements)
