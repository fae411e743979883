"""The loops of BatchNorm on the CPU that work on one tile: its sums, and its map to y or dx.

They are compiled once per dtype and set of flags, and called by address. batchnorm_tiles.py defines a tile.

Large maps are summed along the rows, in registers. Small maps are summed down the columns, several rows at a time, each
column with its own accumulator. So a row of 49 floats needs no loop of its own.

Sums are those of deviations from a value of the channel, in the dtype of the data. Where they have lost digits
(`sums_are_exact`), a tile is summed again in float64.
"""

# Scalar functions and loops are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from fastopt.kernels.bind import bind, compile_loop, inlined
from fastopt.kernels.contract import ALIGNMENT
from fastopt.kernels.cpu.batchnorm_tiles import LARGE_MAP, ROWS_AT_ONCE, SUM_LENGTH, Tile
from fastopt.kernels.elements import scalar
from fastopt.kernels.intrinsics import address, keep, window

MAP_BY_CHANNEL = 96
"""Bytes of a map, one and a half of the widest vectors, from which a tile is mapped channel by channel, with the
coefficients in registers. With shorter maps the coefficients are read for every element."""

PAGE = 4096
"""Bytes after which the addresses of loads and stores look alike to a processor."""

# --- what the loops are made of ---------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies.

ACC: Any
DTYPE: Any
TERMS: Any
ROW: Any
ROWS: Any
VIEWS: Any
FOUR_ROWS: Any
FOUR_TERMS: Any
TERMS_OF_ROW: Any
TERMS_OF_ROWS: Any
HYPER: Any
HYPER_AT: Any
N_COEFFICIENTS: Any
COEFFICIENTS: Any
EXPAND: Any
ADD_ROW: Any
ADD_ROWS: Any
ADD_ROW_TO_COLUMNS: Any
ADD_ROWS_TO_COLUMNS: Any
LENGTH: Any
WIDE: Any
ITEMSIZE: Any
DATA_ITEMSIZE: Any
SEVERAL_ROWS: Any
OVER: Any
OUTPUTS: Any
MAP: Any
MAP_ELEMENT: Any


@cache
def windows_of(count: int) -> Any:
    """An intrinsic ``windows(array, start, stride, size)``: a tuple of `count` views, `stride` elements apart."""

    @intrinsic
    def windows(typing_context, array, start, stride, size):
        one, build_one = window._defn(typing_context, array, start, size)

        def build(context, builder, signature, arguments):
            array, start, stride, size = arguments
            views = []
            for _ in range(count):
                views.append(build_one(context, builder, one, [array, start, size]))
                start = builder.add(start, stride)
            return context.make_tuple(builder, signature.return_type, views)

        kind = types.UniTuple(one.return_type, count)
        return kind(array, types.intp, types.intp, types.intp), build

    return windows


def expand(coefficients, pitch, channel, tile, expanded, apart):
    """Repeat each row of coefficients, from `channel` on, over the columns of a tile, in rows that are `apart`."""
    period = tile.channels * tile.spatial
    for k in range(expanded.size // apart):
        row = window(expanded, k * apart, tile.width)
        values = window(coefficients, k * pitch + channel, tile.channels)
        if tile.spatial == 1:
            for c in range(period):
                row[c] = values[c]
        else:
            for c in range(tile.channels):
                value = values[c]
                part = window(row, c * tile.spatial, tile.spatial)
                for i in range(part.size):
                    part[i] = value
        for start in range(period, tile.width, period):
            copy = window(row, start, period)
            for i in range(period):
                copy[i] = row[i]


def center_at(coefficients, k):
    """What the sums of a channel's statistics need, from views of the coefficients."""
    return HYPER(ACC(coefficients[0][k]))


def affine_at(coefficients, k):
    """What a channel's y needs."""
    return HYPER(coefficients[0][k], coefficients[1][k], coefficients[2][k])


def normaliser_at(coefficients, k):
    """What the sums of a channel's gradients need."""
    return HYPER(coefficients[0][k], coefficients[1][k], coefficients[2][k], coefficients[3][k])


def gradient_map_at(coefficients, k):
    """What a channel's dx needs."""
    return HYPER(
        coefficients[0][k],
        coefficients[1][k],
        coefficients[2][k],
        coefficients[3][k],
        coefficients[4][k],
        coefficients[5][k],
        coefficients[6][k],
    )


# --- the sums of a tile -----------------------------------------------------------------------------------------------
# A row is a tuple of views, one of each array that the sums read: (x,) forward, (x, dy, y) backward. Several rows are a
# tuple of such tuples.


def forward_row(arrays, first, stride, size):
    """A row of x."""
    return (window(arrays[0], first, size),)


def backward_row(arrays, first, stride, size):
    """A row of x, dy and y."""
    return window(arrays[0], first, size), window(arrays[1], first, size), window(arrays[2], first, size)


def four_rows(arrays, first, stride, size):
    """Four rows of a tile."""
    return (
        ROW(arrays, first, stride, size),
        ROW(arrays, first + stride, stride, size),
        ROW(arrays, first + 2 * stride, stride, size),
        ROW(arrays, first + 3 * stride, stride, size),
    )


def eight_rows(arrays, first, stride, size):
    """Eight rows of a tile."""
    return FOUR_ROWS(arrays, first, stride, size), FOUR_ROWS(arrays, first + 4 * stride, stride, size)


def forward_terms(row, j, h):
    """The two TERMS of column j of a row of x."""
    return TERMS(ACC(row[0][j]), h)


def backward_terms(row, j, h):
    """The two TERMS of column j of a row of x, dy and y."""
    return TERMS(row[0][j], row[1][j], row[2][j], h)


def four_terms(rows, j, h):
    """The sums of the two TERMS over column j of four rows."""
    s0, q0 = TERMS_OF_ROW(rows[0], j, h)
    s1, q1 = TERMS_OF_ROW(rows[1], j, h)
    s2, q2 = TERMS_OF_ROW(rows[2], j, h)
    s3, q3 = TERMS_OF_ROW(rows[3], j, h)
    return (s0 + s1) + (s2 + s3), (q0 + q1) + (q2 + q3)


def eight_terms(rows, j, h):
    """The sums of the two TERMS over column j of eight rows."""
    s0, q0 = FOUR_TERMS(rows[0], j, h)
    s1, q1 = FOUR_TERMS(rows[1], j, h)
    return s0 + s1, q0 + q1


def add_rows(arrays, tile, row, coefficients, s_totals, q_totals):
    """Add the TERMS over the values of each channel in ROWS, from number `row` on."""
    for c in range(tile.channels):
        h = HYPER_AT(coefficients, c)
        first = tile.start + row * tile.stride + c * tile.spatial
        for begin in range(0, tile.spatial, LENGTH):
            size = min(LENGTH, tile.spatial - begin)
            rows = ROWS(arrays, first + begin, tile.stride, size)
            s = ACC(0.0)
            q = ACC(0.0)
            for j in range(size):
                s_one, q_one = TERMS_OF_ROWS(rows, j, h)
                s += s_one
                q += q_one
            s_totals[c] += s
            q_totals[c] += q


def add_rows_to_columns(arrays, tile, first, size, columns, s, q):
    """Add the TERMS of ROWS, which begin at `first`, to the sums of the columns."""
    rows = ROWS(arrays, first, tile.stride, size)
    for j in range(size):
        s_one, q_one = TERMS_OF_ROWS(rows, j, HYPER_AT(columns, j))
        s[j] += s_one
        q[j] += q_one


def sum_columns(arrays, tile, coefficients, pitch, channel, s_totals, q_totals):
    """Leave the sums of the TERMS over the values of each channel of a tile of small maps.

    coefficients : `pitch` numbers of each coefficient, the first of them for the tile's channels from `channel` on.
    """
    width = tile.width
    spatial = tile.spatial
    # Half a page away from the rows, modulo pages: where the last 12 bits of two addresses are the same, a processor
    # lets a load wait for a store that is under way.
    page = PAGE // ITEMSIZE
    apart = -(-width // page) * page
    scratch = np.empty((2 + N_COEFFICIENTS) * apart + page, ACC)
    rows = (address(arrays[0]) + DATA_ITEMSIZE * tile.start) // ALIGNMENT * ALIGNMENT
    begin = (rows + PAGE // 2 - address(scratch)) % PAGE // ITEMSIZE
    s = window(scratch, begin, width)
    q = window(scratch, begin + apart, width)
    expanded = window(scratch, begin + 2 * apart, N_COEFFICIENTS * apart)
    EXPAND(coefficients, pitch, channel, tile, expanded, apart)
    columns = COEFFICIENTS(expanded, 0, apart, width)
    for j in range(width):
        s[j] = ACC(0.0)
        q[j] = ACC(0.0)
    first = tile.start
    row = 0
    if not WIDE:
        while row + 4 <= tile.rows:
            ADD_ROWS_TO_COLUMNS(arrays, tile, first, width, columns, s, q)
            first += 4 * tile.stride
            row += 4
    while row <= tile.rows:
        size = width if row < tile.rows else tile.rest
        ADD_ROW_TO_COLUMNS(arrays, tile, first, size, columns, s, q)
        first += tile.stride
        row += 1
    period = tile.channels * spatial
    for start in range(period, width, period):
        s_more = window(s, start, period)
        q_more = window(q, start, period)
        for i in range(period):
            s[i] += s_more[i]
            q[i] += q_more[i]
    if spatial == 1:
        for c in range(tile.channels):
            s_totals[c] = s[c]
            q_totals[c] = q[c]
    else:
        for c in range(tile.channels):
            s_map = window(s, c * spatial, spatial)
            q_map = window(q, c * spatial, spatial)
            s_total = 0.0
            q_total = 0.0
            for i in range(spatial):
                s_total += s_map[i]
                q_total += q_map[i]
            s_totals[c] = s_total
            q_totals[c] = q_total
    keep(scratch)


def sum_rows(arrays, tile, coefficients, pitch, channel, s_totals, q_totals):
    """The same for a tile of large maps."""
    for c in range(tile.channels):
        s_totals[c] = 0.0
        q_totals[c] = 0.0
    of_tile = COEFFICIENTS(coefficients, channel, pitch, tile.channels)
    row = 0
    if SEVERAL_ROWS:
        while row + ROWS_AT_ONCE <= tile.rows:
            ADD_ROWS(arrays, tile, row, of_tile, s_totals, q_totals)
            row += ROWS_AT_ONCE
    for k in range(row, tile.rows):
        ADD_ROW(arrays, tile, k, of_tile, s_totals, q_totals)


# --- the map of a tile ------------------------------------------------------------------------------------------------
# An array that is written over is read through the view that is written, or the vectoriser cannot see that an element
# is read before it is written.


def forward_views(inputs, outputs, first, size):
    """Views of x and the residual, and of y."""
    y = window(outputs[0], first, size)
    x = y if OVER == 0 else window(inputs[0], first, size)
    residual = y if OVER == 1 else window(inputs[1], first, size)
    return (x, residual), (y,)


def backward_views(inputs, outputs, first, size):
    """Views of x, dy and y, and of dx and the residual's gradient."""
    dx = window(outputs[0], first, size)
    x = dx if OVER == 0 else window(inputs[0], first, size)
    dy = dx if OVER == 1 else window(inputs[1], first, size)
    y = dx if OVER == 2 else window(inputs[2], first, size)
    return (x, dy, y), (dx, window(outputs[1], first, size))


def map_to_y(inputs, outputs, j, h):
    """Element j of y."""
    outputs[0][j] = MAP(inputs[0][j], inputs[1][j], h)


def map_to_gradients(inputs, outputs, j, h):
    """Element j of dx and, where there are two OUTPUTS, of the residual's gradient."""
    dx, dresidual = MAP(inputs[0][j], inputs[1][j], inputs[2][j], h)
    outputs[0][j] = dx
    if OUTPUTS == 2:
        outputs[1][j] = dresidual


def map_channels(inputs, outputs, tile, coefficients, pitch):
    """MAP_ELEMENT over a tile, channel by channel, with the coefficients in registers."""
    size = tile.spatial
    of_channels = COEFFICIENTS(coefficients, 0, pitch, pitch)
    for row in range(tile.rows + 1):
        c = tile.channel - 1
        for k in range((tile.width if row < tile.rows else tile.rest) // size):
            c = c + 1 if c + 1 < tile.channel + tile.channels else tile.channel
            h = HYPER_AT(of_channels, c)
            read, written = VIEWS(inputs, outputs, tile.start + row * tile.stride + k * size, size)
            for j in range(size):
                MAP_ELEMENT(read, written, j, h)


def map_columns(inputs, outputs, tile, coefficients, pitch):
    """MAP_ELEMENT over a tile, two rows at once: the coefficients of a column are read once for both."""
    width = tile.width
    if tile.channels == width:  # the coefficients lie as the columns do
        table = window(coefficients, 0, coefficients.size)
        begin = tile.channel
        step = pitch
    else:
        table = np.empty(N_COEFFICIENTS * width, DTYPE)
        EXPAND(coefficients, pitch, tile.channel, tile, table, width)
        begin = 0
        step = width
    columns = COEFFICIENTS(table, begin, step, width)
    row = 0
    while row + 2 <= tile.rows:
        first = tile.start + row * tile.stride
        read, written = VIEWS(inputs, outputs, first, width)
        read_too, written_too = VIEWS(inputs, outputs, first + tile.stride, width)
        for j in range(width):
            h = HYPER_AT(columns, j)
            MAP_ELEMENT(read, written, j, h)
            MAP_ELEMENT(read_too, written_too, j, h)
        row += 2
    while row <= tile.rows:
        size = width if row < tile.rows else tile.rest
        read, written = VIEWS(inputs, outputs, tile.start + row * tile.stride, size)
        for j in range(size):
            MAP_ELEMENT(read, written, j, HYPER_AT(columns, j))
        row += 1
    keep(table)


# --- from the functions above to compiled loops -----------------------------------------------------------------------


class ArrayTypes:
    """The numba types of the arrays of one dtype."""

    def __init__(self, dtype: np.dtype[Any]):
        self.vector = types.Array(numba.from_dtype(dtype), 1, "C")
        self.tile = types.NamedUniTuple(types.int64, len(Tile._fields), Tile)
        self.totals = types.Array(types.float64, 1, "C")


def part(function: Any, constants: dict[str, Any]) -> Any:
    """A part of a loop, inlined into it."""
    return inlined(bind(function, constants, label=function.__name__, scalar=inlined))


def _scalar(function: Any, constants: dict[str, Any]) -> Any:
    """A scalar function of its own, whose additions keep their order in a loop that may reorder its own."""
    return scalar(bind(function, constants, label=function.__name__, scalar=scalar))


def _contracted(function: Any, constants: dict[str, Any]) -> Any:
    """The same, whose products may be added without a rounding of their own, which takes half as many additions.

    Only for what is not computed a second time: with a rounding, the last bit would be another one.
    """
    bound = bind(function, constants, label=function.__name__, scalar=_contract)
    return _contract(bound)


def _contract(function: Any) -> Any:
    return njit(error_model="numpy", fastmath={"contract"}, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


class TileLoops:
    """The loops over a tile, of one direction, dtype and set of flags, and their addresses."""

    def __init__(
        self,
        formulas: Any,
        dtype: np.dtype[Any],
        flags: dict[str, bool],
        shared: dict[Any, Any],
        *,
        backward: bool,
    ):
        if ("expand", dtype) not in shared:
            shared["expand", dtype] = _scalar(expand, {})
        self._formulas = formulas
        self._dtype = dtype
        self._flags = flags
        self._shared = shared
        self._backward = backward
        self._way = "backward" if backward else "forward"
        self._types = ArrayTypes(dtype)

    def sums(self, spatial: int, *, wide: bool = False) -> int:
        """The address of the sums' loop, in the dtype or, `wide`, in float64: these read one row at a time."""
        accumulator = np.float64 if wide else self._dtype.type
        if self._backward:
            hyper, hyper_at, row = self._formulas.Normaliser, normaliser_at, backward_row
            terms, formula = backward_terms, self._formulas.gradient_terms
            compiled, compile_ = _scalar, scalar
        else:
            hyper, hyper_at, row = self._formulas.Center, center_at, forward_row
            terms, formula = forward_terms, self._formulas.deviation_terms
            compiled, compile_ = _contracted, _contract
        constants = {
            "ACC": accumulator,
            "N_COEFFICIENTS": len(hyper._fields),
            "COEFFICIENTS": windows_of(len(hyper._fields)),
            "EXPAND": self._shared["expand", self._dtype],
            "HYPER_AT": part(hyper_at, {"HYPER": hyper, "ACC": accumulator}),
        }
        of_one = compiled(terms, {"TERMS": self._element(formula, compile_), "ACC": accumulator})
        of_four = compiled(four_terms, {"TERMS_OF_ROW": of_one})
        one = {**constants, "ROWS": row, "TERMS_OF_ROWS": of_one, "LENGTH": SUM_LENGTH}
        four = part(four_rows, {"ROW": row})
        if spatial < LARGE_MAP:
            function: Any = sum_columns
            constants |= {
                "WIDE": wide,
                "ITEMSIZE": 8 if wide else self._dtype.itemsize,
                "DATA_ITEMSIZE": self._dtype.itemsize,
                "ADD_ROW_TO_COLUMNS": part(add_rows_to_columns, one),
                "ADD_ROWS_TO_COLUMNS": part(add_rows_to_columns, {**constants, "ROWS": four, "TERMS_OF_ROWS": of_four}),
            }
        else:
            function = sum_rows
            several = {
                **constants,
                "ROWS": part(eight_rows, {"FOUR_ROWS": four}),
                "TERMS_OF_ROWS": compiled(eight_terms, {"FOUR_TERMS": of_four}),
                "LENGTH": SUM_LENGTH // ROWS_AT_ONCE,
            }
            constants |= {
                "SEVERAL_ROWS": not wide and not self._backward,
                "ADD_ROW": part(add_rows, one),
                "ADD_ROWS": part(add_rows, several),
            }
        array_types = self._types
        arrays = types.UniTuple(array_types.vector, 3 if self._backward else 1)
        place = (array_types.vector, types.int64, types.int64)
        return self._compile(
            function,
            constants,
            (arrays, array_types.tile, *place, array_types.totals, array_types.totals),
            # Leave to reorder its additions, and those alone: TERMS are compiled for themselves. One compiled copy
            # serves every launch, so that the bits are the same in all.
            fastmath={"reassoc"} if self._backward else {"reassoc", "contract"},
        )

    def map(self, spatial: int, over: int) -> int:
        """The address of the map's loop that writes over its input of number `over`; -1: over none."""
        formulas, flags = self._formulas, self._flags
        if self._backward:
            hyper, hyper_at, arrays = formulas.GradientMap, gradient_map_at, (3, 2)
            views, element, formula = backward_views, map_to_gradients, formulas.gradient
        else:
            hyper, hyper_at, arrays = formulas.Affine, affine_at, (2, 1)
            views, element, formula = forward_views, map_to_y, formulas.normalise
        outputs = 2 if self._backward and flags["RELU"] and flags["RESIDUAL"] else 1
        constants = {
            "DTYPE": self._dtype.type,
            "N_COEFFICIENTS": len(hyper._fields),
            "COEFFICIENTS": windows_of(len(hyper._fields)),
            "EXPAND": self._shared["expand", self._dtype],
            "HYPER_AT": part(hyper_at, {"HYPER": hyper}),
            "VIEWS": part(views, {"OVER": over}),
            "MAP_ELEMENT": part(element, {"MAP": self._element(formula, inlined), "OUTPUTS": outputs}),
        }
        array_types = self._types
        read, written = (types.UniTuple(array_types.vector, count) for count in arrays)
        function = map_columns if spatial < MAP_BY_CHANNEL // self._dtype.itemsize else map_channels
        return self._compile(function, constants, (read, written, array_types.tile, array_types.vector, types.int64))

    def _element(self, formula: Any, compile_: Any) -> Any:
        """A formula of an element for these flags."""
        constants: dict[str, Any] = {**self._flags, "ZERO": self._dtype.type(0)}
        constants["masked"] = bind(self._formulas.masked, constants, label="masked", scalar=compile_)
        return compile_(bind(formula, constants, label=formula.__name__, scalar=compile_))

    def _compile(self, function: Any, constants: dict[str, Any], signature: tuple[Any, ...], **options: Any) -> int:
        bound = bind(
            function, constants, label=f"batchnorm_{self._way}{function.__name__}_{self._dtype.name}", scalar=inlined
        )
        compiled = self._shared.get(bound.__name__)  # the sums of the statistics are the same for all flags
        if compiled is None:
            compiled = self._shared[bound.__name__] = compile_loop(
                bound, signature, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options
            )
        return compiled.address()
