"""The update of a rule whose every element stands alone: the loop, and the kernel around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastopt.kernels.contract import N_CHUNK, N_PLACE, N_STEP, PROCEEDS, Array, Chunk, Place, StepHyper
from fastopt.kernels.driver import Loop
from fastopt.kernels.intrinsics import at_address, fetch, record, windows

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

P_TYPE: Any
G_TYPE: Any
"""What parameters and gradients are stored as."""
READ: Callable[..., Any]
READ_GRAD: Callable[..., Any]
WRITE: Callable[..., Any]
"""``reading`` and ``writing`` of formats.py: for a parameter and its states; for a gradient alone."""
DITHERED: Callable[..., Any]
"""``dithering`` of formats.py, for the same as WRITE."""
STOCHASTIC: bool
"""Whether what is written is rounded at random."""
HYPER: type
"""The NamedTuple of the rule's hyperparameters."""
FIRST_HYPER: type
"""That of the update which is made before the rule's."""
ELEMENT: Callable[..., Any]
"""``element`` of elements.py, bound to the rule and the features."""
HYPERPARAMETERS: Callable[..., Any]
"""`hyperparameters`, bound to the same."""
ZERO: Any
N_HYPER: int
"""How many fields HYPER has."""
N_STATES: int
"""How many buffers of states the rule has, and the average."""
FIRST: bool
"""Whether another update is made before the rule's."""
SCATTERED: bool
ZERO_GRAD: bool

AHEAD = 4
"""How many scattered chunks ahead memory is asked for."""

# --- the loop ---------------------------------------------------------------------------------------------------------
# Loops run over chunks and, inside, over views: indexing the whole array with start + i is 7-15x slower, because
# numba's wrap-around of negative indices stops the vectoriser.


def hyperparameters(table, group):
    """The hyperparameters in a row of the table: those of the step, and those of the rule (and of a first update)."""
    row = group * table.shape[1]
    step = record(StepHyper, table, row)
    own = record(HYPER, table, row + N_STEP)
    if FIRST:
        return step, (own, record(FIRST_HYPER, table, row + N_STEP + N_HYPER))
    return step, own


def elementwise(places, states, table, chunks, first, last):
    """Update chunks by a rule whose every element stands alone; backwards where `last` is the smaller."""
    table[0, PROCEEDS] = ZERO
    backwards = last < first
    count = first - last if backwards else last - first
    for k in range(count):
        c = first - 1 - k if backwards else first + k
        if SCATTERED and k + AHEAD < count:
            to_come = record(Chunk, chunks, (c - AHEAD if backwards else c + AHEAD) * N_CHUNK)
            its_place = record(Place, places, to_come.place * N_PLACE)
            size = to_come.stop - to_come.start
            fetch(at_address(P_TYPE, its_place.p, to_come.start, size), 0, size)
            if N_STATES > 0:  # an empty tuple has no type to go over
                for state in states:
                    fetch(state, its_place.state + to_come.start, its_place.state + to_come.stop)
        chunk = record(Chunk, chunks, c * N_CHUNK)
        place = record(Place, places, chunk.place * N_PLACE)
        step, h = HYPERPARAMETERS(table, chunk.group)
        size = chunk.stop - chunk.start
        p = at_address(P_TYPE, place.p, chunk.start, size)
        g = (at_address(G_TYPE, place.g, chunk.grad, size),)
        start = place.state + chunk.start
        updated = (p, *windows(states, start, size))
        for i in range(size):
            values = READ(updated, i)
            new = ELEMENT(step, values[0], READ_GRAD(g, i)[0], *values[1:], h)
            if STOCHASTIC:
                WRITE(updated, i, DITHERED(new, step.noise, start + i))
            else:
                WRITE(updated, i, new)
            if ZERO_GRAD:
                g[0][i] = G_TYPE(0)


class ElementwiseKernel:
    """The update of one rule in one pass."""

    def __init__(self, loop: Loop):
        self._loop = loop
        self.backwards = True
        """The direction of the last pass: the next one begins where it ended, with data that are still in the cache."""

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        self.backwards = not self.backwards  # two threads that race here lose a cache hit and nothing else
        self._loop.run(
            places, states, table, chunks, elements=elements, units=chunks.shape[0], backwards=self.backwards
        )
