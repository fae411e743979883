"""BatchNorm on the CPU: how an array is cut into tiles, the loops over a tile, and the launches.

x is (samples, channels, spatial) in memory; channels-last is spatial = 1. A tile is a matrix inside it, rows of equal
length at one stride, whose columns belong to one channel (large maps) or to several (small maps, channels-last).

Sums run down the columns, eight rows at a time: every column has its own accumulator, so that the vectoriser needs no
permission to reorder, the result is the same on any number of threads and in any kernel, and a row of 49 floats costs
no loop of its own. Measured on one Zen 4 core, float32 in cache, of the loop alone: 50-60 GB/s. Tried: accumulating in
float64, 20-23 GB/s (the conversions; and the widest type of a loop decides how many elements a vector holds); a
register sum along rows, 26-40 GB/s at rows of 196-1024 and 11 at 49.

A tile is short enough for float32 sums of deviations from a value of the channel; where that value is so far out that
they would cancel, or where they overflow, the tile is summed again in float64 (`GUARD`). Tiles are merged in float64.

y and dx are written in areas, which need not be the tiles: in the order of memory that is as fast as a copy, channel
after channel it takes 1.5-2 times as long.
"""

# Scalar functions and loops are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: F821
from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.unsafe.ndarray import to_fixed_tuple

from fastopt.backends import Array
from fastopt.backends.bind import bind
from fastopt.backends.cpu import SERIAL_BELOW, Driver, Loop, compile_loop, scalar

WIDTH = 1024
"""Columns of a tile, about: long enough to hide the start of a loop, short enough for two accumulators in L1."""

ROW = 512
"""Spatial size from which a tile holds one channel; below it several, side by side."""

PIECE = 4096
"""Most columns of a tile of one channel. Wide rows let the prefetcher run: 3.7 ms for 51 MB against 4.5 at 1024."""

LONG = 128
"""Spatial size from which y and dx are written map by map; below it, many channels at a time."""

TILE = 32_768
"""Elements of a tile, about: small enough to share few channels out among many threads."""

ROWS = (16, 64)
"""Least and most rows of a tile. The most bounds the number of float32 values that are added up: twice as
many, where rows are shortened to whole vectors."""

GROUP_ROWS = 8

VECTORS = 64
"""Elements that one turn of a vectorised loop takes at most: four AVX-512 registers of float32."""

GUARD = 16.0
"""How many times the sum of squares may exceed its part about the mean before float32 has lost too much."""

NEAR = 1 << 21
"""Bytes of a panel that are still in a cache when its second pass comes."""

FAR = 1 << 26
"""Bytes read and written of which nothing is left in the last cache for the second pass."""

# --- the loops --------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies.

ACC: Any
DTYPE: Any
TERMS: Any
HYPER: Any
N_COEFFICIENTS: Any
GROUP: Any
SINGLE: Any
EXPAND: Any
FOLD: Any
GUARDED: Any
MAP: Any
MAP_CHANNELS: Any
MAP_COLUMNS: Any
OUTPUTS: Any
GATHER: Any
FINISH: Any
TRAINING: Any
LARGEST: Any
LOOP: Any
WIDE: Any
N_TILE: Any
N_AREA: Any
INVERSE_STD: Any
ROUNDING: Any
BLEND: Any
GRADIENT_COEFFICIENTS: Any


class Tile(NamedTuple):
    """What one sum runs over, a line of `Plan.tiles`: runs of rows, whose columns belong to one or several channels."""

    start: int
    runs: int
    jump: int
    """From the start of a run to that of the next."""
    rows: int
    """Of a run."""
    stride: int
    width: int
    rest: int
    """Elements left after the last row of a run, shorter than a row."""
    channel: int
    channels: int
    spatial: int
    """Columns of a channel."""


class Area(NamedTuple):
    """What one task writes, a line of `Plan.areas`: rows of `channels` times `spatial` elements, over and over."""

    start: int
    rows: int
    stride: int
    width: int
    rest: int
    """Elements left after the last row, shorter than a row."""
    channel: int
    channels: int
    spatial: int


@intrinsic
def window(typing_context, array, start, size):
    """array[start : start + size] without bounds, negative indices or a reference count.

    The slices of a kernel with eight rows of three arrays compile in seconds; these in a fraction of one.
    """

    def build(context, builder, signature, arguments):
        kind = signature.args[0]
        source = context.make_array(kind)(context, builder, arguments[0])
        view = context.make_array(kind)(context, builder)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        populate_array(
            view,
            data=builder.gep(source.data, [arguments[1]]),
            shape=[arguments[2]],
            strides=[itemsize],
            itemsize=itemsize,
            meminfo=None,
        )
        return view._getvalue()

    return array(array, types.intp, types.intp), build


@intrinsic
def invoke(typing_context, address, arguments):
    """Call the compiled function at `address`, which returns nothing, with a tuple of arguments of its exact types.

    A function that calls another one by name gets a copy of its code, and optimises it once more: the loops over a tile
    would be compiled five times over, in the parallel kernel for the last time. By address they are compiled once, and
    what is around them once for all flags. The address is an argument, so that nothing in a cache file depends on it.
    """

    def build(context, builder, signature, values):
        kinds = tuple(signature.args[1])
        function = context.call_conv.get_function_type(types.none, kinds)
        pointer = builder.inttoptr(values[0], function.as_pointer())
        unpacked = [builder.extract_value(values[1], k) for k in range(len(kinds))]
        context.call_conv.call_function(builder, pointer, types.none, kinds, unpacked)
        return context.get_dummy_value()

    return types.none(types.int64, arguments), build


def group(x, a, y, first, stride, coefficients, s, q):
    """Add the TERMS of eight rows to the columns' sums."""
    w = s.size
    x0 = window(x, first, w)
    x1 = window(x, first + stride, w)
    x2 = window(x, first + 2 * stride, w)
    x3 = window(x, first + 3 * stride, w)
    x4 = window(x, first + 4 * stride, w)
    x5 = window(x, first + 5 * stride, w)
    x6 = window(x, first + 6 * stride, w)
    x7 = window(x, first + 7 * stride, w)
    a0 = window(a, first, w)
    a1 = window(a, first + stride, w)
    a2 = window(a, first + 2 * stride, w)
    a3 = window(a, first + 3 * stride, w)
    a4 = window(a, first + 4 * stride, w)
    a5 = window(a, first + 5 * stride, w)
    a6 = window(a, first + 6 * stride, w)
    a7 = window(a, first + 7 * stride, w)
    y0 = window(y, first, w)
    y1 = window(y, first + stride, w)
    y2 = window(y, first + 2 * stride, w)
    y3 = window(y, first + 3 * stride, w)
    y4 = window(y, first + 4 * stride, w)
    y5 = window(y, first + 5 * stride, w)
    y6 = window(y, first + 6 * stride, w)
    y7 = window(y, first + 7 * stride, w)
    # Coefficients as one view each: a tuple made of a column of a matrix is not vectorised.
    c0 = window(coefficients, 0, w)
    if N_COEFFICIENTS == 4:
        c1 = window(coefficients, w, w)
        c2 = window(coefficients, 2 * w, w)
        c3 = window(coefficients, 3 * w, w)
    for j in range(w):
        h = HYPER(c0[j]) if N_COEFFICIENTS == 1 else HYPER(c0[j], c1[j], c2[j], c3[j])
        s0, q0 = TERMS(x0[j], a0[j], y0[j], h)
        s1, q1 = TERMS(x1[j], a1[j], y1[j], h)
        s2, q2 = TERMS(x2[j], a2[j], y2[j], h)
        s3, q3 = TERMS(x3[j], a3[j], y3[j], h)
        s4, q4 = TERMS(x4[j], a4[j], y4[j], h)
        s5, q5 = TERMS(x5[j], a5[j], y5[j], h)
        s6, q6 = TERMS(x6[j], a6[j], y6[j], h)
        s7, q7 = TERMS(x7[j], a7[j], y7[j], h)
        s[j] += ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
        q[j] += ((q0 + q1) + (q2 + q3)) + ((q4 + q5) + (q6 + q7))


def single(x, a, y, first, size, coefficients, s, q):
    """Add the TERMS of one row to the columns' sums, in their dtype."""
    w = s.size
    xv = window(x, first, size)
    av = window(a, first, size)
    yv = window(y, first, size)
    c0 = window(coefficients, 0, w)
    if N_COEFFICIENTS == 4:
        c1 = window(coefficients, w, w)
        c2 = window(coefficients, 2 * w, w)
        c3 = window(coefficients, 3 * w, w)
    for j in range(size):
        h = HYPER(c0[j]) if N_COEFFICIENTS == 1 else HYPER(c0[j], c1[j], c2[j], c3[j])
        s0, q0 = TERMS(ACC(xv[j]), ACC(av[j]), ACC(yv[j]), h)
        s[j] += s0
        q[j] += q0


def expand(coefficients, channel, tile, expanded):
    """Repeat each row of coefficients, from `channel` on, over the columns of a tile."""
    period = tile.channels * tile.spatial
    for k in range(expanded.size // tile.width):
        row = window(expanded, k * tile.width, tile.width)
        if tile.spatial == 1:
            for c in range(period):
                row[c] = coefficients[k, channel + c]
        else:
            for c in range(tile.channels):
                value = coefficients[k, channel + c]
                part = window(row, c * tile.spatial, tile.spatial)
                for i in range(part.size):
                    part[i] = value
        for start in range(period, tile.width, period):
            copy = window(row, start, period)
            for i in range(period):
                copy[i] = row[i]


def fold(columns, tile, totals):
    """Add the columns up to one sum per channel, in float64. `columns` is spent."""
    period = tile.channels * tile.spatial
    for start in range(period, tile.width, period):
        more = window(columns, start, period)
        for i in range(period):
            columns[i] += more[i]
    if tile.spatial == 1:
        for c in range(period):
            totals[c] = columns[c]
        return
    for c in range(tile.channels):
        v = window(columns, c * tile.spatial, tile.spatial)
        # Four sums side by side: one alone waits four cycles for each addition.
        t0 = 0.0
        t1 = 0.0
        t2 = 0.0
        t3 = 0.0
        end = tile.spatial // 4 * 4
        for i in range(0, end, 4):
            t0 += v[i]
            t1 += v[i + 1]
            t2 += v[i + 2]
            t3 += v[i + 3]
        for i in range(end, tile.spatial):
            t0 += v[i]
        totals[c] = (t0 + t1) + (t2 + t3)


def sums(streams, tile, coefficients, channel, s_totals, q_totals):
    """Leave the sums of the two TERMS over the values of each channel of the tile."""
    x, a, y = streams
    expanded = np.empty(N_COEFFICIENTS * tile.width, ACC)
    EXPAND(coefficients, channel, tile, expanded)
    s = np.zeros(tile.width, ACC)
    q = np.zeros(tile.width, ACC)
    for run in range(tile.runs):
        first = tile.start + run * tile.jump
        row = 0
        if not WIDE:
            while row + GROUP_ROWS <= tile.rows:
                GROUP(x, a, y, first, tile.stride, expanded, s, q)
                first += GROUP_ROWS * tile.stride
                row += GROUP_ROWS
        while row < tile.rows:
            SINGLE(x, a, y, first, tile.width, expanded, s, q)
            first += tile.stride
            row += 1
        if tile.rest > 0:
            SINGLE(x, a, y, first, tile.rest, expanded, s, q)
    FOLD(s, tile, s_totals)
    FOLD(q, tile, q_totals)


def gather_statistics(entries, streams, tile, block, partials, coefficients):
    """partials[block, c] = (mean, sum of squares about it) of the values of each channel of the tile."""
    count = tile.runs * (tile.rows * tile.width + tile.rest) // tile.channels
    x = streams[0]
    shifts = np.empty((1, tile.channels), DTYPE)
    for c in range(tile.channels):
        shifts[0, c] = x[tile.start + c * tile.spatial]
    s = np.empty(tile.channels)
    q = np.empty(tile.channels)
    invoke(entries[SUMS], (streams, tile, shifts, np.int64(0), s, q))
    if GUARDED:
        precise = True
        for c in range(tile.channels):
            precise = precise and q[c] <= min(GUARD * (q[c] - s[c] * (s[c] / count)), LARGEST)
        if not precise:
            invoke(entries[WIDE_SUMS], (streams, tile, shifts, np.int64(0), s, q))
    for c in range(tile.channels):
        mean = s[c] / count
        squares = q[c] - s[c] * mean
        partials[block, tile.channel + c, 0] = mean + shifts[0, c]
        partials[block, tile.channel + c, 1] = 0.0 if squares < 0.0 else squares


def gather_slopes(entries, streams, tile, block, partials, coefficients):
    """partials[block, c] = (sum dy, sum dy xhat) over the values of each channel of the tile."""
    s = np.empty(tile.channels)
    q = np.empty(tile.channels)
    invoke(entries[SUMS], (streams, tile, coefficients, tile.channel, s, q))
    for c in range(tile.channels):
        partials[block, tile.channel + c, 0] = s[c]
        partials[block, tile.channel + c, 1] = q[c]


def finish_statistics(counts, first, last, partials, coefficients, channelwise, stats, scalars):
    """Merge the blocks of channels [first, last) in index order; leave their statistics and coefficients."""
    gamma, beta, running_mean, running_var = channelwise
    eps, weight = scalars[0], scalars[1]
    for c in range(first, last):
        if TRAINING:
            # Two passes over the blocks, about the first one's mean: no sum cancels, and blocks that agree merge to
            # exactly what they agree on.
            origin = partials[0, c, 0]
            total = 0.0
            shift = 0.0
            for b in range(partials.shape[0]):
                total += counts[b]
                shift += counts[b] * (partials[b, c, 0] - origin)
            mean = origin + shift / total
            squares = 0.0
            for b in range(partials.shape[0]):
                d = partials[b, c, 0] - mean
                squares += partials[b, c, 1] + counts[b] * d * d
            var = squares / total
            running_mean[c] = BLEND(np.float64(running_mean[c]), mean, weight, LARGEST)
            running_var[c] = BLEND(np.float64(running_var[c]), squares / (total - 1.0), weight, LARGEST)
        else:
            mean = np.float64(running_mean[c])
            var = np.float64(running_var[c])
        inv_std = INVERSE_STD(var, eps)
        center = DTYPE(mean)
        stats[0, c] = mean
        stats[1, c] = inv_std
        coefficients[0, c] = center
        coefficients[1, c] = gamma[c] * inv_std
        coefficients[2, c] = beta[c] - gamma[c] * ROUNDING(mean, np.float64(center), inv_std)
        coefficients[3, c] = inv_std


def finish_slopes(counts, first, last, partials, coefficients, channelwise, stats, scalars):
    """Merge the blocks of channels [first, last) in index order; leave dgamma, dbeta and the coefficients of dx."""
    gamma, dgamma, dbeta, _ = channelwise
    for c in range(first, last):
        total = 0.0
        sum_g = 0.0
        sum_g_xhat = 0.0
        for b in range(partials.shape[0]):
            total += counts[b]
            sum_g += partials[b, c, 0]
            sum_g_xhat += partials[b, c, 1]
        inv_std = stats[1, c]
        lost = ROUNDING(stats[0, c], np.float64(coefficients[0, c]), inv_std)
        sum_g_xhat -= lost * sum_g
        dgamma[c] = sum_g_xhat
        dbeta[c] = sum_g
        slope, lean, offset = GRADIENT_COEFFICIENTS(sum_g, sum_g_xhat, total, np.float64(gamma[c]), inv_std, lost)
        coefficients[4, c] = slope
        coefficients[5, c] = lean if TRAINING else 0.0  # constants have no gradient to send back
        coefficients[6, c] = offset if TRAINING else 0.0


def map_channels(streams, outputs, area, coefficients):
    """MAP over an area, one row of one channel after another."""
    x, a, y = streams
    out, other = outputs
    size = area.spatial
    for row in range(area.rows):
        for k in range(area.channels):
            first = area.start + row * area.stride + k * size
            xv = window(x, first, size)
            av = window(a, first, size)
            yv = window(y, first, size)
            ov = window(out, first, size)
            c = area.channel + k
            c0 = coefficients[0, c]
            c1 = coefficients[1, c]
            c2 = coefficients[2, c]
            if N_COEFFICIENTS == 3:
                h = HYPER(c0, c1, c2)
                for j in range(size):
                    ov[j] = MAP(xv[j], av[j], yv[j], h)
            else:
                h = HYPER(c0, c1, c2, coefficients[3, c], coefficients[4, c], coefficients[5, c], coefficients[6, c])
                if OUTPUTS == 1:
                    for j in range(size):
                        ov[j], _ = MAP(xv[j], av[j], yv[j], h)
                else:
                    tv = window(other, first, size)
                    for j in range(size):
                        ov[j], tv[j] = MAP(xv[j], av[j], yv[j], h)


def map_columns(streams, outputs, area, expanded, pitch, begin):
    """MAP over an area by whole rows; coefficient k of column j is expanded[begin + k * pitch + j]."""
    x, a, y = streams
    out, other = outputs
    width = area.width
    rows = area.rows + 1 if area.rest > 0 else area.rows
    c0 = window(expanded, begin, width)
    c1 = window(expanded, begin + pitch, width)
    c2 = window(expanded, begin + 2 * pitch, width)
    if N_COEFFICIENTS == 7:
        c3 = window(expanded, begin + 3 * pitch, width)
        c4 = window(expanded, begin + 4 * pitch, width)
        c5 = window(expanded, begin + 5 * pitch, width)
        c6 = window(expanded, begin + 6 * pitch, width)
    for row in range(rows):
        first = area.start + row * area.stride
        size = width if row < area.rows else area.rest
        xv = window(x, first, size)
        av = window(a, first, size)
        yv = window(y, first, size)
        ov = window(out, first, size)
        if N_COEFFICIENTS == 3:
            for j in range(size):
                ov[j] = MAP(xv[j], av[j], yv[j], HYPER(c0[j], c1[j], c2[j]))
        elif OUTPUTS == 1:
            for j in range(size):
                h = HYPER(c0[j], c1[j], c2[j], c3[j], c4[j], c5[j], c6[j])
                ov[j], _ = MAP(xv[j], av[j], yv[j], h)
        else:
            tv = window(other, first, size)
            for j in range(size):
                h = HYPER(c0[j], c1[j], c2[j], c3[j], c4[j], c5[j], c6[j])
                ov[j], tv[j] = MAP(xv[j], av[j], yv[j], h)


def spread(streams, outputs, area, coefficients):
    """MAP over an area."""
    # Tried: non-temporal stores by way of a row in L1. Out of cache the whole pass gained 0-10 % with panels and lost
    # 20 % in the order of memory; in cache it took 3-8 times as long.
    # One row at a time. Tried: four rows in one loop, eight streams for the prefetcher; slower in every layout, and by
    # half where rows are a multiple of 4 KiB apart (a load that seems to depend on an earlier store has to wait).
    if area.spatial >= LONG:
        MAP_CHANNELS(streams, outputs, area, coefficients)
    elif area.channels == area.width:  # the coefficients lie as the columns do
        pitch = coefficients.shape[1]
        MAP_COLUMNS(streams, outputs, area, coefficients.reshape(coefficients.size), pitch, area.channel)
    else:
        expanded = np.empty(N_COEFFICIENTS * area.width, DTYPE)
        EXPAND(coefficients, area.channel, area, expanded)
        MAP_COLUMNS(streams, outputs, area, expanded, area.width, 0)


SUMS, WIDE_SUMS, SPREAD = range(3)
"""Where in `entries` the addresses of the loops over a tile are."""

WHOLE, GATHERED, FINISHED, SPREADED = range(4)
"""Kinds of tasks: all of a panel (its sums, their merge and the map); or a tile's sums, the merge of all channels, the
map of an area."""


class Work(NamedTuple):
    """All that the loop over tasks works on. A flat tuple: numba's parallel loops take none within another."""

    entries: Any
    """Addresses, in the order of SUMS, WIDE_SUMS, SPREAD."""
    x: Any
    a: Any
    """The residual, or dy."""
    y: Any
    out: Any
    other: Any
    tiles: Any
    panels: Any
    areas: Any
    counts: Any
    partials: Any
    coefficients: Any
    gamma: Any
    first: Any
    """beta, or dgamma."""
    second: Any
    """The running mean, or dbeta."""
    third: Any
    """The running variance."""
    stats: Any
    scalars: Any


def work(tasks, w, first, last):
    """Do tasks[first:last], lines of (kind, number of the panel, tile or area)."""
    # One loop for all kinds: each of its own would be compiled with its own copy of everything it calls.
    streams = (w.x, w.a, w.y)
    outputs = (w.out, w.other)
    channelwise = (w.gamma, w.first, w.second, w.third)
    blocks = w.counts.size
    in_block = w.tiles.shape[0] // blocks
    for k in range(first, last):
        kind = tasks[k, 0]
        index = tasks[k, 1]
        first_block, last_block, first_tile, last_tile = 0, 0, 0, 0
        first_area, last_area = 0, 0
        channel, channels = 0, 0
        if kind == WHOLE:
            channel, channels = w.panels[index, 0], w.panels[index, 1]
            first_tile, last_tile = w.panels[index, 2], w.panels[index, 3]
            first_area, last_area = w.panels[index, 4], w.panels[index, 5]
            last_block = blocks
        elif kind == GATHERED:
            first_block = index // in_block
            last_block = first_block + 1
            first_tile = index % in_block
            last_tile = first_tile + 1
        elif kind == FINISHED:
            channels = w.coefficients.shape[1]
        else:
            first_area, last_area = index, index + 1
        for b in range(first_block, last_block):
            for t in range(first_tile, last_tile):
                tile = Tile(*to_fixed_tuple(w.tiles[b * in_block + t], N_TILE))
                GATHER(w.entries, streams, tile, b, w.partials, w.coefficients)
        if channels > 0:
            FINISH(w.counts, channel, channel + channels, w.partials, w.coefficients, channelwise, w.stats, w.scalars)
        for a in range(first_area, last_area):
            area = Area(*to_fixed_tuple(w.areas[a], N_AREA))
            invoke(w.entries[SPREAD], (streams, outputs, area, w.coefficients))


def over_tasks(tasks, w, _threads):
    """LOOP (work) on every task."""
    for k in prange(tasks.shape[0]):
        LOOP(tasks, w, k, k + 1)


# --- how an array is cut ----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How an array is cut. The tiles, and with them the bits, never depend on the threads or on `room`."""

    tiles: np.ndarray
    """int64, a `Tile` a line: block after block, in each tiles of the same channels in the same order."""
    counts: np.ndarray
    """float64: the values per channel in each block."""
    panels: np.ndarray
    """int64, a line (channel, channels, first tile of a block, last, first area, last) per panel."""
    areas: np.ndarray
    """int64, an `Area` a line: those of the panels, then those that follow each other in memory."""
    fits: bool
    """Whether a panel is no larger than `room`."""
    whole: np.ndarray
    """Tasks (kind, index) for one launch: both passes over each panel."""
    gathered: np.ndarray
    finished: np.ndarray
    spreaded: np.ndarray
    """Tasks for three launches: the sums of every tile, their merge, the map."""


@lru_cache(maxsize=256)
def plan(samples: int, channels: int, spatial: int, room: int) -> Plan:
    """Cut an array of (samples, channels, spatial), its panels at most `room` elements where that is possible."""
    if spatial >= ROW:
        blocks = _tiles_of_one_channel(samples, channels, spatial)
    elif channels * spatial <= WIDTH + WIDTH // 2:
        blocks = _tiles_of_whole_samples(samples, channels, spatial)
    else:
        blocks = _tiles_of_some_channels(samples, channels, spatial)
    block = blocks[0]
    row = channels * spatial
    beside = max(1, room // max(1, samples * block[0].channels * spatial))  # tiles of a block that make a panel
    panels = []
    areas: list[Area] = []
    for first in range(0, len(block), beside):
        part = block[first : first + beside]
        channel = part[0].channel
        count = sum(tile.channels for tile in part)
        begin = len(areas)
        if len(block) == 1 and spatial < LONG:
            areas += [_area_of(tiles[0]) for tiles in blocks]
        elif spatial >= LONG:
            areas.append(Area(channel * spatial, samples, row, count * spatial, 0, channel, count, spatial))
        else:
            for t in part:
                areas.append(Area(t.channel * spatial, samples, row, t.width, 0, t.channel, t.channels, spatial))
        panels.append((channel, count, first, first + len(part), begin, len(areas)))
    fits = samples * max(count for _, count, *_ in panels) * spatial <= room
    begin = len(areas)
    if spatial >= LONG:
        areas += _areas_in_a_row(samples, channels, spatial)
    else:
        areas += [_area_of(tile) for tiles in blocks for tile in tiles]
    return Plan(
        np.array([tile for tiles in blocks for tile in tiles], np.int64),
        np.array([t.runs * (t.rows * t.width + t.rest) // t.channels for t, *_ in blocks], np.float64),
        np.array(panels, np.int64),
        np.array(areas, np.int64),
        fits,
        _tasks(WHOLE, range(len(panels))),
        _tasks(GATHERED, range(len(blocks) * len(block))),
        _tasks(FINISHED, range(1)),
        # The last one first: it was read last, and is the likeliest to be in a cache.
        _tasks(SPREADED, range(len(areas) - 1, begin - 1, -1)),
    )


def _tiles_of_one_channel(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    row = channels * spatial
    blocks = []
    if samples >= GROUP_ROWS:  # a row is a sample
        pieces = -(-spatial // PIECE)
        edges = [spatial * k // pieces for k in range(pieces + 1)]
        rows = _rows(edges[1])
        for n in range(0, samples, rows):
            here = min(rows, samples - n)
            for left, right in pairwise(edges):
                width = right - left
                start = n * row + left
                blocks.append(
                    [Tile(start + c * spatial, 1, 0, here, row, width, 0, c, 1, width) for c in range(channels)]
                )
        return blocks
    # A run is a sample, or a piece of one, and its rows follow each other in memory. Tried for many samples, too:
    # slower by 40 %, perhaps because eight streams in a page or two hide each other from the prefetcher.
    pieces = -(-spatial // (WIDTH * ROWS[1]))
    edges = [spatial * k // pieces for k in range(pieces + 1)]
    rows = GROUP_ROWS * -(-edges[1] // (GROUP_ROWS * WIDTH))
    runs = max(1, min(TILE // spatial, ROWS[1] // rows))
    for n in range(0, samples, runs):
        here = min(runs, samples - n)
        for left, right in pairwise(edges):
            size = right - left
            width = size // rows
            width -= width % VECTORS if width >= VECTORS else 0  # the tail of a row goes element by element
            tile = Tile(n * row + left, here, row, size // width, width, width, size % width, 0, 1, width)
            blocks.append([tile._replace(start=tile.start + c * spatial, channel=c) for c in range(channels)])
    return blocks


def _tiles_of_whole_samples(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    """Several samples in a row, where they are short."""
    row = channels * spatial
    side = max(1, WIDTH // row)
    rows = _rows(side * row)
    blocks = []
    for n in range(0, samples, side * rows):
        here = min(side * rows, samples - n)
        beside = min(side, here)
        width = beside * row
        rest = here % beside * row
        blocks.append([Tile(n * row, 1, 0, here // beside, width, width, rest, 0, channels, spatial)])
    return blocks


def _tiles_of_some_channels(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    row = channels * spatial
    step = max(1, WIDTH // spatial)
    rows = _rows(step * spatial)
    blocks = []
    for n in range(0, samples, rows):
        block = []
        for c in range(0, channels, step):
            count = min(step, channels - c)
            here = min(rows, samples - n)
            block.append(Tile(n * row + c * spatial, 1, 0, here, row, count * spatial, 0, c, count, spatial))
        blocks.append(block)
    return blocks


def _areas_in_a_row(samples: int, channels: int, spatial: int) -> list[Area]:
    """Areas of contiguous memory, about TILE elements each."""
    row = channels * spatial
    areas = []
    if row <= TILE:
        step = TILE // row
        for n in range(0, samples, step):
            areas.append(Area(n * row, min(step, samples - n), row, row, 0, 0, channels, spatial))
    elif spatial <= TILE:
        step = TILE // spatial
        for n in range(samples):
            for c in range(0, channels, step):
                count = min(step, channels - c)
                areas.append(Area(n * row + c * spatial, 1, row, count * spatial, 0, c, count, spatial))
    else:
        pieces = -(-spatial // TILE)
        edges = [spatial * k // pieces for k in range(pieces + 1)]
        for n in range(samples):
            for c in range(channels):
                for left, right in pairwise(edges):
                    start = n * row + c * spatial + left
                    areas.append(Area(start, 1, row, right - left, 0, c, 1, right - left))
    return areas


def _area_of(tile: Tile) -> Area:
    """What a tile of one run covers."""
    return Area(tile.start, tile.rows, tile.stride, tile.width, tile.rest, tile.channel, tile.channels, tile.spatial)


def _tasks(kind: int, indices: range) -> np.ndarray:
    return np.array([(kind, index) for index in indices], np.int64).reshape(-1, 2)


def _rows(width: int) -> int:
    least, most = ROWS
    return min(max(TILE // width // GROUP_ROWS * GROUP_ROWS, least), most)


# --- from the loops to launches ---------------------------------------------------------------------------------------


class BatchNormCPU:
    """The compiled BatchNorm of one dtype and one set of flags, forward and backward, in training or not."""

    def __init__(
        self,
        formulas: ModuleType,
        dtype: np.dtype[Any],
        flags: dict[str, bool],
        driver: Driver,
        shared: dict[Any, Any],
    ):
        self._formulas = formulas
        self._dtype = dtype
        self._flags = flags
        self._driver = driver
        self._shared = shared
        self._passes: dict[tuple[bool, bool], _Passes] = {}
        self._tile_loops: dict[bool, TileLoops] = {}

    def forward(
        self,
        shape: tuple[int, int, int],
        x: Array,
        residual: Array | None,
        out: Array,
        channelwise: tuple[Array | None, ...],
        *,
        training: bool,
        eps: float,
        weight: float,
    ) -> tuple[Array, Array]:
        """Write y to `out` and, in training, the running statistics; return what `backward` needs.

        x, residual, out : 1-D, (samples, channels, spatial) in memory.
        channelwise : (gamma, beta, running_mean, running_var), any of them None.
        """
        channels = shape[1]
        gamma, beta, mean, var = channelwise
        coefficients = np.empty((7, channels), self._dtype)
        stats = np.empty((2, channels))
        spare = np.zeros((2, channels), self._dtype)
        known = (
            self._ones(channels) if gamma is None else gamma,
            np.zeros(channels, self._dtype) if beta is None else beta,
            spare[0] if mean is None else mean,
            spare[1] if var is None else var,
        )
        streams = (x, x if residual is None else residual, x)
        scalars = np.array([eps, weight])
        passes = self._passes_for(backward=False, training=training)
        passes.launch(shape, streams, (out, out), coefficients, known, stats, scalars)
        return coefficients, stats

    def backward(
        self,
        shape: tuple[int, int, int],
        x: Array,
        dy: Array,
        y: Array | None,
        outputs: tuple[Array, Array | None],
        channelwise: tuple[Array | None, Array, Array],
        saved: tuple[Array, Array],
        *,
        training: bool,
    ) -> None:
        """Write dx, dgamma, dbeta and, where `outputs` has room for it, the residual's gradient.

        channelwise : (gamma or None, dgamma, dbeta).
        saved : what `forward` returned; it is written to.
        """
        coefficients, stats = saved
        gamma, dgamma, dbeta = channelwise
        known = (self._ones(shape[1]) if gamma is None else gamma, dgamma, dbeta, dbeta)
        dx, other = outputs
        passes = self._passes_for(backward=True, training=training)
        passes.launch(
            shape,
            (x, dy, x if y is None else y),
            (dx, dx if other is None else other),
            coefficients,
            known,
            stats,
            np.zeros(2),
        )

    def _ones(self, channels: int) -> Array:
        return np.ones(channels, self._dtype)

    def _passes_for(self, *, backward: bool, training: bool) -> _Passes:
        key = (backward, training)
        passes = self._passes.get(key)
        if passes is None:
            with self._driver.lock:
                passes = self._passes.get(key)
                if passes is None:
                    passes = self._passes[key] = self._compile(backward, training)
        return passes

    def _compile(self, backward: bool, training: bool) -> _Passes:
        key = (self._dtype, backward, training)
        loop = self._shared.get(key)
        if loop is None:
            loop = work_loop(self._formulas, self._dtype, self._driver, backward=backward, training=training)
            self._shared[key] = loop
        if backward not in self._tile_loops:
            self._tile_loops[backward] = TileLoops(
                self._formulas, self._dtype, self._flags, self._shared, backward=backward
            )
        reads_y = backward and self._flags["RELU"] and self._flags["RESIDUAL"]
        return _Passes(
            loop, self._tile_loops[backward], self._driver, sums=backward or training, arrays=1 + backward + reads_y
        )


class Types:
    """The numba types of the arrays of one dtype."""

    def __init__(self, dtype: np.dtype[Any]):
        self.number = numba.from_dtype(dtype)
        self.vector = types.Array(self.number, 1, "C")
        self.streams = types.UniTuple(self.vector, 3)
        self.outputs = types.UniTuple(self.vector, 2)
        self.coefficients = types.Array(self.number, 2, "C")
        self.tile = types.NamedUniTuple(types.int64, len(Tile._fields), Tile)
        self.area = types.NamedUniTuple(types.int64, len(Area._fields), Area)
        self.integers = types.Array(types.int64, 2, "C")
        self.addresses = types.Array(types.int64, 1, "C")
        self.totals = types.Array(types.float64, 1, "C")
        self.stats = types.Array(types.float64, 2, "C")
        self.partials = types.Array(types.float64, 3, "C")


def work_loop(formulas: Any, dtype: np.dtype[Any], driver: Driver, *, backward: bool, training: bool) -> Loop:
    """What is around the loops over a tile, for every set of flags."""
    constants = {
        "DTYPE": dtype.type,
        "LARGEST": float(np.finfo(dtype).max),
        "TRAINING": training,
        "GUARDED": dtype.itemsize < 8,  # where the data is float64 there is nothing wider to go to
        "INVERSE_STD": formulas.inverse_std,
        "ROUNDING": formulas.rounding,
        "BLEND": formulas.blend,
        "GRADIENT_COEFFICIENTS": formulas.gradient_coefficients,
    }
    gather, finish = (gather_slopes, finish_slopes) if backward else (gather_statistics, finish_statistics)
    pieces = {
        "GATHER": _piece(gather, constants),
        "FINISH": _piece(finish, constants),
        "N_TILE": len(Tile._fields),
        "N_AREA": len(Area._fields),
    }
    kinds = Types(dtype)
    name = "_".join(["backward" if backward else "forward", "training" if training else "inference", dtype.name])
    everything = types.NamedTuple(
        (
            kinds.addresses,
            *[kinds.vector] * 5,
            *[kinds.integers] * 3,
            kinds.totals,
            kinds.partials,
            kinds.coefficients,
            *[kinds.vector] * 4,
            kinds.stats,
            kinds.totals,
        ),
        Work,
    )
    signature = (kinds.integers, everything)
    return Loop(work, pieces, signature, label=f"batchnorm_{name}", over=over_tasks, driver=driver)


class TileLoops:
    """The loops over a tile of one direction, dtype and set of flags, and their addresses."""

    def __init__(
        self,
        formulas: Any,
        dtype: np.dtype[Any],
        flags: dict[str, bool],
        shared: dict[Any, Any],
        *,
        backward: bool,
    ):
        self._kinds = Types(dtype)
        scalars: dict[str, Any] = {**flags, "ZERO": dtype.type(0)}
        scalars["masked"] = _piece(formulas.masked, scalars)
        summing: dict[str, Any] = {
            "N_COEFFICIENTS": 4 if backward else 1,
            "HYPER": formulas.Moments if backward else formulas.Shift,
            "TERMS": _piece(formulas.slopes if backward else formulas.deviation, scalars),
            "EXPAND": expand,
            "FOLD": fold,
        }
        mapping: dict[str, Any] = {
            "DTYPE": dtype.type,
            "N_COEFFICIENTS": 7 if backward else 3,
            "OUTPUTS": 2 if backward and flags["RELU"] and flags["RESIDUAL"] else 1,
            "HYPER": formulas.Slope if backward else formulas.Affine,
            "MAP": _piece(formulas.gradient if backward else formulas.normalise, scalars),
            "EXPAND": expand,
        }
        mapping["MAP_CHANNELS"] = _piece(map_channels, mapping)
        mapping["MAP_COLUMNS"] = _piece(map_columns, mapping)
        self._dtype = dtype
        self._summing = summing
        self._mapping = mapping
        self._wide = not backward and dtype.itemsize < 8
        self._shared = shared

    def entries(self, *, sums_too: bool) -> Array:
        """The addresses, in the order of SUMS, WIDE_SUMS, SPREAD; 0 for a loop that will not be called."""
        addresses = np.zeros(3, np.int64)
        if sums_too:
            addresses[SUMS] = self._sums(self._dtype.type)
            if self._wide:
                addresses[WIDE_SUMS] = self._sums(np.float64)
        kinds = self._kinds
        addresses[SPREAD] = self._compile(
            spread, self._mapping, (kinds.streams, kinds.outputs, kinds.area, kinds.coefficients)
        )
        return addresses

    def _sums(self, accumulator: Any) -> int:
        wide = accumulator != self._dtype.type
        constants = {**self._summing, "ACC": accumulator, "WIDE": wide}  # wide is rare: a row at a time will do
        constants["GROUP"] = _piece(group, constants)
        constants["SINGLE"] = _piece(single, constants)
        kinds = self._kinds
        return self._compile(
            sums, constants, (kinds.streams, kinds.tile, kinds.coefficients, types.int64, kinds.totals, kinds.totals)
        )

    def _compile(self, function: Any, constants: dict[str, Any], signature: tuple[Any, ...]) -> int:
        bound = bind(function, constants, label=f"batchnorm_{function.__name__}_{self._dtype.name}", scalar=scalar)
        dispatcher = self._shared.get(bound.__name__)  # the sums of the statistics are the same for all flags
        if dispatcher is None:
            dispatcher = self._shared[bound.__name__] = compile_loop(bound, signature)
        (compiled,) = dispatcher.overloads.values()
        address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        return address


def _piece(function: Any, constants: dict[str, Any]) -> FunctionType:
    return bind(function, constants, label=function.__name__, scalar=scalar)


class _Passes:
    """One direction: its loops over a tile, what is around them, and how they are launched."""

    def __init__(self, loop: Loop, loops: TileLoops, driver: Driver, *, sums: bool, arrays: int):
        self._loop = loop
        self._entries = loops.entries(sums_too=sums)
        self._driver = driver
        self._sums = sums
        self._arrays = arrays

    def launch(
        self,
        shape: tuple[int, int, int],
        streams: tuple[Array, ...],
        outputs: tuple[Array, ...],
        coefficients: Array,
        channelwise: tuple[Array, ...],
        stats: Array,
        scalars: Array,
    ) -> None:
        """Run the passes over the whole array."""
        size = streams[0].size
        samples, channels, spatial = shape
        # What is empty has coefficients and gradients all the same: those of one block whose sums are 0.
        cut = plan(max(1, samples), channels, max(1, spatial), NEAR // (streams[0].itemsize * self._arrays))
        partials = np.zeros((cut.counts.size if self._sums else 0, channels, 2))
        everything = Work._make(
            (
                self._entries,
                *streams,
                *outputs,
                cut.tiles,
                cut.panels,
                cut.areas,
                cut.counts,
                partials,
                coefficients,
                *channelwise,
                stats,
                scalars,
            )
        )
        run = self._loop.run
        if size == 0:
            self._loop.serial(cut.finished, everything, 0, 1)
            return
        if self._sums and self._in_one(size, size * streams[0].itemsize * (self._arrays + 1), cut, spatial):
            run(cut.whole, everything, elements=size, chunks=cut.whole.shape[0])
            return
        if self._sums:
            run(cut.gathered, everything, elements=size, chunks=cut.gathered.shape[0])
        self._loop.serial(cut.finished, everything, 0, 1)
        run(cut.spreaded, everything, elements=size, chunks=cut.spreaded.shape[0])

    def _in_one(self, size: int, moved: int, cut: Plan, spatial: int) -> bool:
        """Whether to go over the panels once, doing both passes on each, or over everything twice: the same bits."""
        if size < SERIAL_BELOW:
            return cut.fits
        # In a cache, two passes in the order of memory beat one that jumps from sample to sample with each panel.
        if not cut.fits or (moved < FAR and spatial >= LONG):
            return False
        threads = self._driver.threads()
        return threads == 1 or len(cut.panels) >= 4 * threads
