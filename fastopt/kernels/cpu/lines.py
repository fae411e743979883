"""The update of a rule that sees sums over rows or columns: `fastopt.Sums`.

All of its sums, those over whole parameters as well, are taken tile by tile. What is settled is an array for each
result, with a value for each row, column or parameter. A loop over elements finds them in the rule's hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastopt.kernels.contract import (
    LEVEL,
    N_LINE,
    N_PLACE,
    N_TILE,
    PROCEEDS,
    SCALE_DOWN,
    SCALE_UP,
    Array,
    Line,
    Place,
    Tile,
    Tiles,
    in_range,
    rescaled,
)
from fastopt.kernels.driver import Loop
from fastopt.kernels.intrinsics import add_values, at_address, put_rounded, put_values, record, values_at, windows
from fastopt.signals import deferred_signals

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

P_TYPE: Any
G_TYPE: Any
READ: Callable[..., Any]
READ_GRAD: Callable[..., Any]
WRITE: Callable[..., Any]
DITHERED: Callable[..., Any]
STOCHASTIC: bool
"""As in elementwise.py."""
READ_TERMS: Callable[..., Any]
"""``reading`` of formats.py, for a parameter and the states that terms are given."""
OF_TERMS: Callable[..., Any]
"""Of the tuple of all buffers: those states."""
ELEMENT: Callable[..., Any]
"""``element`` of elements.py, bound to the rule, or to the terms, and the features."""
HYPERPARAMETERS: Callable[..., Any]
"""``hyperparameters`` of elementwise.py, bound to the rule."""
SETTLED: Callable[..., Any]
"""``settled`` of elements.py, bound to `fastopt.Sums.settle`."""
SUM_TILE: Callable[..., Any]
"""`sum_tile`, for the terms and for the squares of the norms."""
SUM_AGAIN: Callable[..., Any]
"""The same for these squares scaled up and down."""
ADDED: Callable[..., Any]
"""``adding`` of elements.py, or ``adding_scaled``."""
FINISHED: Callable[..., Any]
"""``finishing`` of elements.py."""
NUMBERS: Callable[..., Any]
"""The NamedTuple of the numbers."""
OF_TENSOR: Callable[..., Any]
OF_ROW: Callable[..., Any]
OF_COLUMN: Callable[..., Any]
"""``(h, arrays, i)``: h with what was settled so far for parameter, row or column i."""
OF_LINE: Callable[..., Any]
"""The one of these that belongs to what is settled."""
NO_SUMS: tuple[float, ...]
"""A 0 for each value of ADDED."""
NOTHING_SETTLED: tuple[float, ...]
"""A 0 for each value that is settled."""
ZERO: Any
N_STATES: int
N_TERMS: int
"""How many terms and norms there are ..."""
N_NORMS: int
"""... and how many of these, the last ones, are norms."""
WIDE: bool
"""Whether squares may leave the range of float64, so that tiles where they do are summed again, scaled."""
N_RESULTS: int
N_NUMBERS: int
BY_ROW: bool
BY_COLUMN: bool
"""Whether the sums go over rows, over columns; or else over parameters, or all of them."""
ZERO_GRAD: bool

# --- the loops --------------------------------------------------------------------------------------------------------


def sum_tile(step, h, tile, place, states, of_rows, columns, parts):
    """Leave the sums over what is in a tile of every row, or column, or over the whole tile, in `parts`."""
    by_column = windows(parts, tile.column_part, tile.width)
    if BY_COLUMN:
        for j in range(tile.width):
            put_values(by_column, j, NO_SUMS)
    totals = NO_SUMS
    for row in range(tile.rows):
        start = (tile.row + row) * tile.columns + tile.column
        p = at_address(P_TYPE, place.p, start, tile.width)
        g = (at_address(G_TYPE, place.g, start, tile.width),)
        own = (p, *windows(OF_TERMS(states), place.state + start, tile.width))
        of_row = OF_ROW(h, of_rows, tile.row_line + row)
        if BY_COLUMN:
            for j in range(tile.width):
                values = READ_TERMS(own, j)
                own_h = OF_COLUMN(of_row, columns, j)
                terms = ADDED(ELEMENT(step, values[0], READ_GRAD(g, j)[0], *values[1:], own_h))
                put_values(by_column, j, add_values(values_at(by_column, j), terms))
        else:
            if BY_ROW:
                totals = NO_SUMS
            for j in range(tile.width):
                values = READ_TERMS(own, j)
                own_h = OF_COLUMN(of_row, columns, j)
                terms = ADDED(ELEMENT(step, values[0], READ_GRAD(g, j)[0], *values[1:], own_h))
                totals = add_values(totals, terms)
            if BY_ROW:
                put_values(parts, tile.row_part + row, totals)
    return totals


def sum_terms(places, states, table, tiles, of_tensors, of_rows, of_columns, parts, first, last):
    """Leave the sums of the terms over what is in a tile of every row, or column, or over the whole tile, in `parts`.

    of_tensors, of_rows, of_columns : tuples of arrays: what was settled so far.
    parts : an array for each term and norm; where squares leave the range of float64, then two for each norm.
    """
    for k in range(first, last):
        tile = record(Tile, tiles, k * N_TILE)
        place = record(Place, places, tile.place * N_PLACE)
        step, h = HYPERPARAMETERS(table, tile.group)
        h = OF_TENSOR(h, of_tensors, tile.place)
        columns = windows(of_columns, tile.column_line, tile.width)
        if BY_ROW:
            part, count = tile.row_part, tile.rows
        elif BY_COLUMN:
            part, count = tile.column_part, tile.width
        else:
            part, count = k, 1
        totals = SUM_TILE(step, h, tile, place, states, of_rows, columns, parts[:N_TERMS])
        if not BY_ROW and not BY_COLUMN:
            put_values(parts[:N_TERMS], k, totals)
        if WIDE:
            right = True
            for norm in range(N_NORMS):
                squares = parts[N_TERMS - N_NORMS + norm]
                for i in range(part, part + count):
                    right = right and in_range(squares[i])
                    parts[N_TERMS + 2 * norm][i] = rescaled(squares[i], SCALE_UP)
                    parts[N_TERMS + 2 * norm + 1][i] = rescaled(squares[i], SCALE_DOWN)
            if not right:
                scaled = SUM_AGAIN(step, h, tile, place, states, of_rows, columns, parts[N_TERMS:])
                if not BY_ROW and not BY_COLUMN:
                    put_values(parts[N_TERMS:], k, scaled)


def settle(tiles, lines, table, parts, sums, of_tensors, of_lines, numbers, results, first, last):
    """Add up the partial sums of every row, column or parameter, or of all, in the order of the tiles; settle them.

    sums : arrays as those of `parts`, overwritten.
    of_lines : what was settled so far for the same rows or columns.
    numbers, results : their arrays.
    """
    for k in range(first, last):
        line = record(Line, lines, k * N_LINE)
        _, h = HYPERPARAMETERS(table, line.group)
        h = OF_TENSOR(h, of_tensors, line.place)
        totals = windows(sums, line.first, line.length)
        if N_TERMS > 0:
            for other in range(line.tiles):
                number = line.tile + other * line.stride
                tile = record(Tile, tiles, number * N_TILE)
                if BY_ROW:
                    part = tile.row_part
                elif BY_COLUMN:
                    part = tile.column_part
                else:
                    part = number
                more = windows(parts, part, line.length)
                if line.tiles == 1:
                    totals = more
                elif other == 0:
                    for i in range(line.length):
                        put_values(totals, i, values_at(more, i))
                else:
                    for i in range(line.length):
                        put_values(totals, i, add_values(values_at(totals, i), values_at(more, i)))
        own_numbers, own_results = windows(numbers, line.first, line.length), windows(results, line.first, line.length)
        for i in range(line.length):
            if N_TERMS > 0:  # noqa: SIM108 a branch is pruned, an expression is not
                found = FINISHED(values_at(totals, i))
            else:
                found = ()
            if N_NUMBERS > 0:  # noqa: SIM108
                old = NUMBERS(*values_at(own_numbers, i))
            else:
                old = ()
            own_h = OF_LINE(h, of_lines, line.first + i)
            new = add_values(NOTHING_SETTLED, SETTLED(found, old, np.float64(line.size), own_h))
            put_rounded(own_results, i, new)
            if N_NUMBERS > 0:
                put_values(own_numbers, i, new[N_RESULTS:])


def update(places, states, table, tiles, of_tensors, of_rows, of_columns, first, last):
    """Update tiles by a rule that reads what was settled for its parameter, row and column in h."""
    for k in range(first, last):
        tile = record(Tile, tiles, k * N_TILE)
        place = record(Place, places, tile.place * N_PLACE)
        step, h = HYPERPARAMETERS(table, tile.group)
        h = OF_TENSOR(h, of_tensors, tile.place)
        columns = windows(of_columns, tile.column_line, tile.width)
        for row in range(tile.rows):
            start = (tile.row + row) * tile.columns + tile.column
            p = at_address(P_TYPE, place.p, start, tile.width)
            g = (at_address(G_TYPE, place.g, start, tile.width),)
            updated = (p, *windows(states, place.state + start, tile.width))
            of_row = OF_ROW(h, of_rows, tile.row_line + row)
            for j in range(tile.width):
                values = READ(updated, j)
                own_h = OF_COLUMN(of_row, columns, j)
                new = ELEMENT(step, values[0], READ_GRAD(g, j)[0], *values[1:], own_h)
                if STOCHASTIC:
                    WRITE(updated, j, DITHERED(new, step.noise, place.state + start + j))
                else:
                    WRITE(updated, j, new)
                if ZERO_GRAD:
                    g[0][j] = G_TYPE(0)


# --- the launches -----------------------------------------------------------------------------------------------------


class LinedStage(NamedTuple):
    """A `fastopt.Sums`, compiled for a rule that is lined."""

    over: str
    sum_terms: Loop | None
    """None where there is no term: what is settled then follows from the numbers alone."""
    settle: Loop
    sums: int
    """How many partial sums there are of each row, column or parameter."""
    results: int
    """How many."""
    numbers: tuple[int, ...]
    """Which of the rule's numbers are its own."""


class LinedKernel:
    """The update of a rule whose h depends on sums over rows or columns: for each stage a pass, then the update."""

    def __init__(self, stages: tuple[LinedStage, ...], update: Loop, dtype: np.dtype[Any], n_numbers: int):
        """n_numbers : how many of the last states are numbers."""
        self._stages = stages
        self._update = update
        self._dtype = dtype
        self._n_numbers = n_numbers

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Tiles, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        tiles = chunks.table
        units = tiles.shape[0]
        if units == 0:
            return
        end = len(states) - self._n_numbers
        own, numbers = states[:end], states[end:]
        found: dict[str, tuple[Array, ...]] = {"tensor": (), "row": (), "column": ()}
        with deferred_signals:
            table[0, PROCEEDS] = 0.0
            for stage in self._stages:
                over, level = stage.over, LEVEL[stage.over]
                parts = tuple([np.empty(chunks.parts[over]) for _ in range(stage.sums)])
                if stage.sum_terms is not None:
                    stage.sum_terms.run(
                        places, own, table, tiles, *found.values(), parts, elements=elements, units=units
                    )
                count, lines = chunks.counts[over], chunks.lines[over]
                sums = tuple([np.empty(count) for _ in range(stage.sums)])
                results = tuple([np.empty(count, self._dtype) for _ in range(stage.results)])
                of_stage = tuple([numbers[k] for k in stage.numbers])
                before = (found["tensor"], found[level] if level != "tensor" else ())
                stage.settle.run(
                    tiles, lines, table, parts, sums, *before, of_stage, results, elements=count, units=lines.shape[0]
                )
                if over == "all":  # parameters without a gradient have the same numbers
                    moving = lines[:, 0] // chunks.together
                    for values in (*results, *of_stage):
                        by_network = values.reshape(-1, chunks.together)
                        by_network[moving, 1:] = by_network[moving, :1]
                found[level] += results
            self._update.run(places, own, table, tiles, *found.values(), elements=elements, units=units)
