"""The update of a rule that sees sums over rows or columns: `fastopt.Sums`. See kernels/cpu/lines.py."""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import float64

from fastopt.kernels.contract import LEVEL, N_LINE, N_PLACE, N_TILE, Array, Line, Place, Tile, Tiles
from fastopt.kernels.cuda.launcher import Launcher
from fastopt.kernels.cuda.sums import NUMBER_BYTES, PAIR
from fastopt.kernels.cuda.target import THREADS, cuda

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

ELEMENT: Callable[..., Any]
"""``element`` of elements.py, bound to the rule, or to two terms, and the features."""
HYPERPARAMETERS: Callable[..., Any]
"""``hyperparameters`` of elementwise.py, bound to the rule."""
SETTLED: Callable[..., Any]
"""``settled`` of elements.py, bound to `fastopt.Sums.settle`."""
FINISHED: Callable[..., Any]
"""``finishing`` of elements.py."""
NUMBERS: Callable[..., Any]
"""The NamedTuple of the numbers."""
OF_TENSOR: Callable[..., Any]
OF_ROW: Callable[..., Any]
OF_COLUMN: Callable[..., Any]
"""``(h, arrays, i)``: h with what was settled so far for parameter, row or column i. `arrays` are addresses."""
OF_LINE: Callable[..., Any]
"""The one of these that belongs to what is settled."""
AT: Callable[..., Any]
"""`terms_at` or `update_at`."""
SETTLED_AT: Callable[..., Any]
"""`settled_at`."""
FOLD: Callable[..., Any]
"""`fold`, as part of the kernel."""
LEAVE_SUMS: Callable[..., Any]
"""``leave_sums`` of norms.py, as part of the kernel."""
LOAD_BOTH: Callable[..., Any]
STORE_PARAM: Callable[..., Any]
STORE_GRAD: Callable[..., Any]
LOAD_STATES: Callable[..., Any]
STORE_STATES: Callable[..., Any]
STORE: Callable[..., Any]
"""``memory`` of memory.py: of one element of p and g, of p, of g, of the buffers of states, and of those of results."""
DITHERED: Callable[..., Any]
STOCHASTIC: bool
"""As in memory.py."""
LOAD_NUMBERS: Callable[..., Any]
STORE_NUMBERS: Callable[..., Any]
"""The same, of one float64 in each buffer of numbers."""
UNPACK_PLACE: Callable[..., Any]
UNPACK_TILE: Callable[..., Any]
UNPACK_LINE: Callable[..., Any]
UNPACK_SUMS: Callable[..., Any]
ZERO: Any
ITEMSIZE: int
N_BUFFERS: int
"""How many buffers of states the kernel reads."""
N_TERMS: int
N_TOTALS: int
"""How many sums a line has, as in sums.py."""
N_RESULTS: int
N_NUMBERS: int
BY_ROW: bool
BY_COLUMN: bool
OVER_ALL: bool
"""What the sums go over: rows, columns or all parameters; or else each parameter."""
GATED: bool
ZERO_GRAD: bool

# --- an element -------------------------------------------------------------------------------------------------------


def terms_at(tile, place, states, step, h, of_rows, of_columns, row, column):
    """Two terms of the element in a row and a column of a tile."""
    i = ITEMSIZE * ((tile.row + row) * tile.columns + tile.column + column)
    own = OF_COLUMN(OF_ROW(h, of_rows, tile.row_line + row), of_columns, tile.column_line + column)
    p, g = LOAD_BOTH((place.p, place.g), i)[0]
    if N_BUFFERS > 0:
        found = ELEMENT(step, p, g, *LOAD_STATES(states, i + ITEMSIZE * place.state)[0], own)
    else:
        found = ELEMENT(step, p, g, own)
    return float64(found[0]), float64(found[1])


def update_at(tile, place, states, step, h, of_rows, of_columns, row, column):
    """Update the element in a row and a column of a tile."""
    i = ITEMSIZE * ((tile.row + row) * tile.columns + tile.column + column)
    own = OF_COLUMN(OF_ROW(h, of_rows, tile.row_line + row), of_columns, tile.column_line + column)
    p, g = LOAD_BOTH((place.p, place.g), i)[0]
    of_states = i + ITEMSIZE * place.state
    if N_BUFFERS > 0:  # noqa: SIM108
        new = ELEMENT(step, p, g, *LOAD_STATES(states, of_states)[0], own)
    else:
        new = (ELEMENT(step, p, g, own),)
    if STOCHASTIC:
        new = DITHERED((new,), step.noise, of_states // ITEMSIZE)[0]
    STORE_PARAM((place.p,), i, ((new[0],),))
    if N_BUFFERS > 0:
        STORE_STATES(states, of_states, (new[1:],))
    if ZERO_GRAD:
        STORE_GRAD((place.g,), i, ((ZERO,),))


# --- the kernels ------------------------------------------------------------------------------------------------------
# A block of threads takes a tile, its threads in rows of `across`, a power of 2.


def fold(left, right, number, count, stride):
    """Add up, in two arrays, what `count` threads (a power of 2), `stride` apart, have put there.

    A tree, so that the bits are the same every time. number : that of this thread among them.
    """
    cuda.syncthreads()
    half = count // 2
    while half > 0:
        if number < half:
            left[cuda.threadIdx.x] += left[cuda.threadIdx.x + half * stride]
            right[cuda.threadIdx.x] += right[cuda.threadIdx.x + half * stride]
        cuda.syncthreads()
        half //= 2


def sum_terms(places, states, table, tiles, n, of_tensors, of_rows, of_columns, partials):
    """Leave the sums of two terms over what is in a tile of every row, or column, or over the whole tile.

    states : the addresses of the rule's buffers of states. of_tensors, of_rows, of_columns : those of what was settled.
    """
    left = cuda.shared.array(THREADS, float64)
    right = cuda.shared.array(THREADS, float64)
    k = cuda.blockIdx.x
    while k < n:
        tile = Tile(*UNPACK_TILE(tiles, N_TILE * k))
        place = Place(*UNPACK_PLACE(places, N_PLACE * tile.place))
        step, h = HYPERPARAMETERS(table, tile.group)
        h = OF_TENSOR(h, of_tensors, tile.place)
        across = 1
        while across < tile.width and across < cuda.blockDim.x:
            across *= 2
        down = cuda.blockDim.x // across
        i = cuda.threadIdx.x // across
        j = cuda.threadIdx.x % across
        s = 0.0
        t = 0.0
        if BY_COLUMN:
            for first in range(0, tile.width, across):
                s = 0.0
                t = 0.0
                if first + j < tile.width:
                    for row in range(i, tile.rows, down):
                        more, others = AT(tile, place, states, step, h, of_rows, of_columns, row, first + j)
                        s += more
                        t += others
                left[cuda.threadIdx.x] = s
                right[cuda.threadIdx.x] = t
                FOLD(left, right, i, down, across)
                if i == 0 and first + j < tile.width:
                    partials[PAIR * (tile.column_part + first + j)] = left[j]
                    partials[PAIR * (tile.column_part + first + j) + 1] = right[j]
                cuda.syncthreads()
        else:
            for first in range(0, tile.rows, down):
                if BY_ROW:
                    s = 0.0
                    t = 0.0
                if first + i < tile.rows:
                    for column in range(j, tile.width, across):
                        more, others = AT(tile, place, states, step, h, of_rows, of_columns, first + i, column)
                        s += more
                        t += others
                if BY_ROW:
                    left[cuda.threadIdx.x] = s
                    right[cuda.threadIdx.x] = t
                    FOLD(left, right, j, across, 1)
                    if j == 0 and first + i < tile.rows:
                        partials[PAIR * (tile.row_part + first + i)] = left[cuda.threadIdx.x]
                        partials[PAIR * (tile.row_part + first + i) + 1] = right[cuda.threadIdx.x]
                    cuda.syncthreads()
            if not BY_ROW:
                LEAVE_SUMS(left, right, s, t, partials, PAIR * k)
        k += cuda.gridDim.x


def total(tiles, lines, n, partials, pair, totals):
    """Add up the sums of the tiles, in their order: for every row, column or parameter, or for all."""
    left = cuda.shared.array(THREADS, float64)
    right = cuda.shared.array(THREADS, float64)
    for k in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        line = Line(*UNPACK_LINE(lines, N_LINE * k))
        if BY_ROW or BY_COLUMN:
            for i in range(cuda.threadIdx.x, line.length, cuda.blockDim.x):
                s = 0.0
                t = 0.0
                for other in range(line.tiles):
                    tile = Tile(*UNPACK_TILE(tiles, N_TILE * (line.tile + other * line.stride)))
                    if BY_ROW:  # noqa: SIM108
                        part = tile.row_part + i
                    else:
                        part = tile.column_part + i
                    s += partials[PAIR * part]
                    t += partials[PAIR * part + 1]
                totals[N_TOTALS * (line.first + i) + pair] = s
                totals[N_TOTALS * (line.first + i) + pair + 1] = t
        else:
            s = 0.0
            t = 0.0
            for other in range(cuda.threadIdx.x, line.tiles, cuda.blockDim.x):
                number = line.tile + other * line.stride
                s += partials[PAIR * number]
                t += partials[PAIR * number + 1]
            LEAVE_SUMS(left, right, s, t, totals, N_TOTALS * line.first + pair)


def settled_at(index, line, totals, h, of_lines, numbers):
    """What is settled for a row, column or parameter, or for all."""
    if N_TERMS > 0:  # noqa: SIM108
        sums = FINISHED(UNPACK_SUMS(totals, N_TOTALS * index))
    else:
        sums = ()
    if N_NUMBERS > 0:  # noqa: SIM108
        old = NUMBERS(*LOAD_NUMBERS(numbers, NUMBER_BYTES * index)[0])
    else:
        old = ()
    return SETTLED(sums, old, float64(line.size), OF_LINE(h, of_lines, index))


def settle(lines, n, totals, table, of_tensors, of_lines, numbers, results, together):
    """Settle the sums: write the results, and the numbers unless the step is skipped.

    numbers, results : the addresses of their buffers. together : how many parameters a network has.
    """
    for k in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        line = Line(*UNPACK_LINE(lines, N_LINE * k))
        step, h = HYPERPARAMETERS(table, line.group)
        h = OF_TENSOR(h, of_tensors, line.place)
        stop = line.length
        if OVER_ALL:  # a line for each network: parameters without a gradient have the same numbers
            new = SETTLED_AT(line.first, line, totals, h, of_lines, numbers)
            stop = together
            cuda.syncthreads()
        for i in range(cuda.threadIdx.x, stop, cuda.blockDim.x):
            index = line.first + i
            if not OVER_ALL:
                new = SETTLED_AT(index, line, totals, h, of_lines, numbers)
            if N_RESULTS > 0:
                STORE(results, ITEMSIZE * index, (new[:N_RESULTS],))
            if N_NUMBERS > 0 and (not GATED or step.proceeds != ZERO):
                STORE_NUMBERS(numbers, NUMBER_BYTES * index, (new[N_RESULTS:],))


def update(places, states, table, tiles, n, of_tensors, of_rows, of_columns):
    """Update tiles by a rule that reads what was settled for its parameter, row and column in h."""
    k = cuda.blockIdx.x
    while k < n:
        tile = Tile(*UNPACK_TILE(tiles, N_TILE * k))
        place = Place(*UNPACK_PLACE(places, N_PLACE * tile.place))
        step, h = HYPERPARAMETERS(table, tile.group)
        h = OF_TENSOR(h, of_tensors, tile.place)
        for element in range(cuda.threadIdx.x, tile.rows * tile.width, cuda.blockDim.x):
            row = element // tile.width
            AT(tile, place, states, step, h, of_rows, of_columns, row, element - row * tile.width)
        k += cuda.gridDim.x


# --- what is settled, in h --------------------------------------------------------------------------------------------


def replacing(fields: tuple[int, ...], hyper: type, load: Callable[..., Any], itemsize: int) -> Callable[..., Any]:
    """A function ``(h, arrays, i)``: h, these fields of which are the elements i of arrays at addresses."""
    if not fields:
        return _unchanged
    put = _putting(fields)

    def replaced(h, arrays, i):
        return hyper(*put(h, load(arrays, itemsize * i)[0]))

    return replaced


def _unchanged(h, arrays, i):
    return h


def _putting(fields: tuple[int, ...]) -> Callable[..., Any]:
    """A function ``(values, new)``: the tuple of values, with these fields taken from `new`."""
    if not fields:
        return _as_it_is
    *others, last = fields
    before, at, after = _putting(tuple(others)), len(others), last + 1

    def put(values, new):
        found = before(values, new)
        return (*found[:last], new[at], *found[after:])

    return put


def _as_it_is(values, new):
    return values


# --- the launches -----------------------------------------------------------------------------------------------------


class LinedStage(NamedTuple):
    """A `fastopt.Sums`, compiled for a rule that is lined."""

    over: str
    pairs: tuple[Any, ...]
    """`sum_terms`, for each pair of terms and norms, and in float64 of scaled squares for each norm."""
    total: Any
    settle: Any
    results: int
    """How many."""
    numbers: tuple[int, ...]
    """Which of the rule's numbers are its own."""


class LinedKernel:
    """The update of a rule whose h depends on sums over rows or columns: for each stage passes that add, then it."""

    def __init__(
        self,
        backend: Launcher,
        stages: tuple[LinedStage, ...],
        update: Any,
        dtype: Any,
        n_states: int,
        n_numbers: int,
        *,
        kept: bool,
    ):
        """n_states, n_numbers : how many of the first states are the rule's, and of the last ones numbers.

        kept : as for `SummedKernel`.
        """
        self._backend = backend
        self._stages = stages
        self._update = update
        self._dtype = dtype
        self._n_states = n_states
        self._n_numbers = n_numbers
        self._kept = kept

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Tiles, elements: int) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        backend = self._backend
        if len(chunks.table) == 0:
            return
        tiles = backend.tiles(chunks)
        where, flat = backend.places(places), backend.table(table).reshape(-1)
        buffers = backend.addresses(states)
        end = len(states) - self._n_numbers
        own, numbers = buffers[: self._n_states], buffers[end:]
        if self._kept:
            own = (*own, buffers[end - 1])
        found: dict[str, tuple[Array, ...]] = {"tensor": (), "row": (), "column": ()}
        n = tiles.length

        def settled() -> list[tuple[int, ...]]:
            return [backend.addresses(arrays) for arrays in found.values()]

        for stage in self._stages:
            over, level = stage.over, LEVEL[stage.over]
            lines, of_lines = tiles.lines[over]
            count = chunks.counts[over]
            totals = backend.empty(PAIR * max(1, len(stage.pairs)) * count)
            for number, kernel in enumerate(stage.pairs):
                partials = backend.empty(PAIR * chunks.parts[over])
                backend.launch(kernel, n, where, own, flat, tiles.table, n, *settled(), partials)
                backend.launch(stage.total, of_lines, tiles.table, lines, of_lines, partials, PAIR * number, totals)
            results = tuple([backend.empty(count, self._dtype) for _ in range(stage.results)])
            before = (
                backend.addresses(found["tensor"]),
                backend.addresses(() if level == "tensor" else found[level]),
            )
            of_stage = tuple([numbers[k] for k in stage.numbers])
            written = backend.addresses(results)
            words = totals, flat, *before, of_stage, written, chunks.together
            backend.launch(stage.settle, of_lines, lines, of_lines, *words)
            found[level] += results
        backend.launch(self._update, n, where, buffers[:end], flat, tiles.table, n, *settled())
