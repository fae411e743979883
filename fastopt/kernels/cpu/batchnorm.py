"""BatchNorm on the CPU: how an array is cut into tiles, the loops over a tile, and the launches.

x is (samples, channels, spatial) in memory; channels-last is spatial = 1. A tile is a matrix inside it, rows of equal
length at one stride. Both passes, the sums and the map, go over the tiles in the order of memory; or, where the tiles
of the same channels fit into L2 together, over those first, and then over the next.

Large maps are summed along the rows, in registers: one Zen 4 core reads 64-71 GB/s from L3 that way, 39 from memory;
14x14 maps 40 row by row and 60 eight rows at a time. Small maps are summed down the columns, eight rows at a time,
every column with an accumulator of its own, so that a row of 49 floats costs no loop of its own: 39-57 GB/s from L3,
18-30 from memory. Tried:
- columns for large maps, too: 52-55 and 18 GB/s;
- for 7x7 maps, channel by channel in registers instead of columns: 1, 4, 8 and 16 rows at a time 21-30, 42, 35 and 47
  GB/s, columns 45 (every column costs 0.8 ns for its coefficients and for the last sum, whatever the rows);
- both passes on a panel of channels that fits L2, before the next panel, where x does not fit the cache: it jumps from
  sample to sample, where two sequential reads are faster (64x64x56x56 on two threads, 4.4 ms against 3.8);
- prefetching the next rows, to L1 or L2: slower by 10-30 %;
- accumulating in float64: 20-23 GB/s (the conversions, and the widest type of a loop decides how many elements a
  vector holds).

A tile is short enough for float32 sums of deviations from a value of the channel; where that value is so far out that
they would cancel, or where they overflow, the tile is summed again in float64 (`GUARD`). Tiles are merged in float64.
"""

# Scalar functions and loops are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.np.unsafe.ndarray import to_fixed_tuple

from fastopt.kernels.bind import address_of, bind, compile_loop
from fastopt.kernels.contract import Array
from fastopt.kernels.driver import SERIAL_BELOW, Loop
from fastopt.kernels.elements import scalar
from fastopt.kernels.intrinsics import invoke, keep, window
from fastopt.kernels.threads import COMPILING, get_num_threads

LONG = 128
"""Spatial size from which a tile is summed channel by channel; below it, many channels at a time."""

RUN = 96
"""Bytes of a channel, one and a half of the widest vectors, from which a tile is mapped channel by channel, with the
coefficients in registers. Shorter ones are mapped with a coefficient read for every element: for 7x7 in float32 that
took 1.2 times as long forward and 1.5 backward, in float64 1.7 and 1.9; for 3x4 it takes half as long."""

PIECE = 2048
"""Most values of a channel that are summed in registers before they are added up in float64."""

WIDTH = 1024
"""Columns of a tile of small maps, about: long enough to hide the start of a loop, short enough for two accumulators
in L1."""

NARROW = 64
"""Columns, about, where the rows are whole vectors: rows at once are then one stream to the prefetcher."""

TILE = 32_768
"""Elements of a tile, about: small enough to share few channels out among many threads."""

PANEL = 65_536
"""Most elements of a group of channels for all of it to be summed, merged and mapped at once, by one launch: with what
is written it fits L2. 32x512x7x7 on two threads: 125 -> 113 us forward, 165 -> 153 backward."""

ACROSS = 2**23
"""Bytes of x below which large maps, too, are cut into tiles that go over many samples, so that eight samples of a
channel are summed at a time: 32x256x14x14 on two threads 203 -> 169 us, 32x64x28x28 176 -> 164. What does not fit the
cache is better read in the order of memory (64x256x14x14 took 1.2 times as long, 128x256x14x14 1.5 times), and so is
backward, with four samples at a time (1.1-1.2 times) or eight (1.4)."""

SOME_ROWS = (16, 256)
"""Least and most rows of a tile of small maps. The most bounds the number of float32 values that a column adds up."""

GROUP_ROWS = 8
"""Rows that are summed at a time; four where two streams are read: with sixteen, 256x1024 took 1.15 times as long."""

VECTOR = 16
"""Elements of the widest vector, AVX-512's of float32."""

GUARD = 16.0
"""How many times the sum of squares may exceed its part about the mean before float32 has lost too much."""

# --- the loops --------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies.

ACC: Any
DTYPE: Any
TERMS: Any
AT_ONCE: Any
ROWS: Any
TERMS_OF_ROWS: Any
FOUR_ROWS: Any
FOUR_TERMS: Any
HYPER: Any
N_COEFFICIENTS: Any
EXPAND: Any
GUARDED: Any
MAP: Any
SHORTEST: Any
OUTPUTS: Any
OVER: Any
SUMMED: Any
GATHER: Any
FINISH: Any
TRAINING: Any
LARGEST: Any
WIDE: Any
N_TILE: Any
INVERSE_STD: Any
ROUNDING: Any
BLEND: Any
GRADIENT_COEFFICIENTS: Any


class Tile(NamedTuple):
    """What one task works on, a line of `Plan.tiles`: rows of `channels` times `spatial` elements, over and over."""

    start: int
    rows: int
    stride: int
    width: int
    rest: int
    """Elements left after the last row, shorter than a row."""
    channel: int
    """The first."""
    channels: int
    spatial: int
    """Elements of a channel that follow each other."""


def expand(coefficients, channel, tile, expanded):
    """Repeat each row of coefficients, from `channel` on, over the columns of a tile."""
    period = tile.channels * tile.spatial
    for k in range(expanded.size // tile.width):
        row = window(expanded, k * tile.width, tile.width)
        values = window(coefficients, k * coefficients.shape[1] + channel, tile.channels)
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


def four_rows(stream, first, stride, size):
    """Views of four rows of a tile."""
    return (
        window(stream, first, size),
        window(stream, first + stride, size),
        window(stream, first + 2 * stride, size),
        window(stream, first + 3 * stride, size),
    )


def rows_of_x(streams, first, stride, size):
    """Views of eight rows of x, in the place of all streams: statistics are of x alone."""
    x = FOUR_ROWS(streams[0], first, stride, size), FOUR_ROWS(streams[0], first + 4 * stride, stride, size)
    return x, x, x


def rows_of_all(streams, first, stride, size):
    """Views of four rows of every stream."""
    x, a, y = streams
    return FOUR_ROWS(x, first, stride, size), FOUR_ROWS(a, first, stride, size), FOUR_ROWS(y, first, stride, size)


def four_terms(x, a, y, j, h):
    """The sums of the two TERMS over column j of four rows."""
    s0, q0 = TERMS(x[0][j], a[0][j], y[0][j], h)
    s1, q1 = TERMS(x[1][j], a[1][j], y[1][j], h)
    s2, q2 = TERMS(x[2][j], a[2][j], y[2][j], h)
    s3, q3 = TERMS(x[3][j], a[3][j], y[3][j], h)
    return (s0 + s1) + (s2 + s3), (q0 + q1) + (q2 + q3)


def eight_terms(x, a, y, j, h):
    """The sums of the two TERMS over column j of eight rows."""
    s0, q0 = FOUR_TERMS(x[0], a[0], y[0], j, h)
    s1, q1 = FOUR_TERMS(x[1], a[1], y[1], j, h)
    return s0 + s1, q0 + q1


def sums(streams, tile, coefficients, channel, s_totals, q_totals):
    """Leave the sums of the two TERMS over the values of each channel of the tile."""
    # Compiled with leave to reorder its additions, and those alone: TERMS are compiled for themselves. One compiled
    # copy serves every launch, so that the bits are the same in all.
    x, a, y = streams
    spatial = tile.spatial
    if spatial >= LONG:
        for c in range(tile.channels):
            s_totals[c] = 0.0
            q_totals[c] = 0.0
        done = 0
        if not WIDE and N_COEFFICIENTS == 1:
            while done + AT_ONCE <= tile.rows:
                for c in range(tile.channels):
                    h = HYPER(coefficients[0, channel + c])
                    first = tile.start + done * tile.stride + c * spatial
                    for begin in range(0, spatial, PIECE // AT_ONCE):
                        size = min(PIECE // AT_ONCE, spatial - begin)
                        xs, ds, ys = ROWS(streams, first + begin, tile.stride, size)
                        s_piece = ACC(0.0)
                        q_piece = ACC(0.0)
                        for j in range(size):
                            s0, q0 = TERMS_OF_ROWS(xs, ds, ys, j, h)
                            s_piece += s0
                            q_piece += q0
                        s_totals[c] += s_piece
                        q_totals[c] += q_piece
                done += AT_ONCE
        for row in range(done, tile.rows):
            for c in range(tile.channels):
                k = channel + c
                c0 = ACC(coefficients[0, k])
                if N_COEFFICIENTS == 1:
                    h = HYPER(c0)
                else:
                    h = HYPER(c0, ACC(coefficients[1, k]), ACC(coefficients[2, k]), ACC(coefficients[3, k]))
                first = tile.start + row * tile.stride + c * spatial
                for begin in range(0, spatial, PIECE):
                    size = min(PIECE, spatial - begin)
                    xv = window(x, first + begin, size)
                    av = window(a, first + begin, size)
                    yv = window(y, first + begin, size)
                    s_piece = ACC(0.0)
                    q_piece = ACC(0.0)
                    for j in range(size):
                        s0, q0 = TERMS(ACC(xv[j]), ACC(av[j]), ACC(yv[j]), h)
                        s_piece += s0
                        q_piece += q0
                    s_totals[c] += s_piece
                    q_totals[c] += q_piece
        return
    width = tile.width
    expanded = np.empty(N_COEFFICIENTS * width, ACC)
    EXPAND(coefficients, channel, tile, expanded)
    # Coefficients as one view each: a tuple made of a column of a matrix is not vectorised.
    c0 = window(expanded, 0, width)
    if N_COEFFICIENTS == 4:
        c1 = window(expanded, width, width)
        c2 = window(expanded, 2 * width, width)
        c3 = window(expanded, 3 * width, width)
    s = np.empty(width, ACC)
    q = np.empty(width, ACC)
    for j in range(width):
        s[j] = ACC(0.0)
        q[j] = ACC(0.0)
    first = tile.start
    stride = tile.stride
    row = 0
    if not WIDE:
        while row + AT_ONCE <= tile.rows:
            xs, ds, ys = ROWS(streams, first, stride, width)
            for j in range(width):
                h = HYPER(c0[j]) if N_COEFFICIENTS == 1 else HYPER(c0[j], c1[j], c2[j], c3[j])
                s0, q0 = TERMS_OF_ROWS(xs, ds, ys, j, h)
                s[j] += s0
                q[j] += q0
            first += AT_ONCE * stride
            row += AT_ONCE
    while row <= tile.rows:
        size = width if row < tile.rows else tile.rest
        xv = window(x, first, size)
        av = window(a, first, size)
        yv = window(y, first, size)
        for j in range(size):
            h = HYPER(c0[j]) if N_COEFFICIENTS == 1 else HYPER(c0[j], c1[j], c2[j], c3[j])
            s0, q0 = TERMS(ACC(xv[j]), ACC(av[j]), ACC(yv[j]), h)
            s[j] += s0
            q[j] += q0
        first += stride
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
            sv = window(s, c * spatial, spatial)
            qv = window(q, c * spatial, spatial)
            s_total = 0.0
            q_total = 0.0
            for i in range(spatial):
                s_total += sv[i]
                q_total += qv[i]
            s_totals[c] = s_total
            q_totals[c] = q_total
    keep(expanded)
    keep(s)
    keep(q)


def gather_statistics(entries, streams, tile, block, partials, coefficients):
    """partials[:, block] = (mean, sum of squares about it) of the values of each channel of the tile.

    Return whether it was done: not where the sums are called for in float64, and those are not compiled.
    """
    count = (tile.rows * tile.width + tile.rest) // tile.channels
    x = streams[0]
    shifts = np.empty((1, tile.channels), DTYPE)
    for c in range(tile.channels):
        shifts[0, c] = x[tile.start + c * tile.spatial]
    s = np.empty(tile.channels)
    q = np.empty(tile.channels)
    invoke(entries[SUMS], (streams, tile, shifts, np.int64(0), s, q))
    if GUARDED:
        precise = 0
        for c in range(tile.channels):
            about_mean = q[c] - s[c] * (s[c] / count)
            precise += (q[c] <= GUARD * about_mean) & (q[c] <= LARGEST)
        if precise < tile.channels:
            if entries[WIDE_SUMS] == 0:
                return False
            invoke(entries[WIDE_SUMS], (streams, tile, shifts, np.int64(0), s, q))
    blocks, channels = partials.shape[1], partials.shape[2]
    means = window(partials, block * channels + tile.channel, tile.channels)
    squares = window(partials, (blocks + block) * channels + tile.channel, tile.channels)
    for c in range(tile.channels):
        mean = s[c] / count
        about_mean = q[c] - s[c] * mean
        means[c] = mean + shifts[0, c]
        squares[c] = 0.0 if about_mean < 0.0 else about_mean
    return True


def gather_slopes(entries, streams, tile, block, partials, coefficients):
    """partials[:, block] = (sum dy, sum dy xhat) over the values of each channel of the tile; always done."""
    blocks, channels = partials.shape[1], partials.shape[2]
    s = window(partials, block * channels + tile.channel, tile.channels)
    q = window(partials, (blocks + block) * channels + tile.channel, tile.channels)
    invoke(entries[SUMS], (streams, tile, coefficients, tile.channel, s, q))
    return True


def finish_statistics(counts, partials, coefficients, channelwise, stats, scalars, first, channels):
    """Merge the blocks in index order; leave the statistics and coefficients of `channels` channels from `first` on."""
    gamma = window(channelwise[0], first, channels)
    beta = window(channelwise[1], first, channels)
    running_mean = window(channelwise[2], first, channels)
    running_var = window(channelwise[3], first, channels)
    eps, weight = scalars[EPS], scalars[WEIGHT]
    pitch = stats.shape[1]
    means = window(stats, first, channels)
    inv_stds = window(stats, pitch + first, channels)
    # Loops over the channels inside, and few arrays in each, so that they are vectorised.
    if TRAINING:
        # Two passes over the blocks, about the first one's mean: no sum cancels, and blocks that agree merge to
        # exactly what they agree on.
        total = 0.0
        for b in range(counts.size):
            total += counts[b]
        origin = window(partials, first, channels)
        squares = np.empty(channels)
        for c in range(channels):
            means[c] = 0.0
            squares[c] = 0.0
        for b in range(counts.size):
            block_means = window(partials, b * pitch + first, channels)
            for c in range(channels):
                means[c] += counts[b] * (block_means[c] - origin[c])
        for c in range(channels):
            means[c] = origin[c] + means[c] / total
        for b in range(counts.size):
            block_means = window(partials, b * pitch + first, channels)
            block_squares = window(partials, (counts.size + b) * pitch + first, channels)
            for c in range(channels):
                d = block_means[c] - means[c]
                squares[c] += block_squares[c] + counts[b] * d * d
        for c in range(channels):
            running_mean[c] = BLEND(np.float64(running_mean[c]), means[c], weight, LARGEST)
        for c in range(channels):
            running_var[c] = BLEND(np.float64(running_var[c]), squares[c] / (total - 1.0), weight, LARGEST)
        for c in range(channels):
            inv_stds[c] = INVERSE_STD(squares[c] / total, eps)
    else:
        for c in range(channels):
            means[c] = running_mean[c]
            inv_stds[c] = INVERSE_STD(np.float64(running_var[c]), eps)
    centers = window(coefficients, first, channels)
    scales = window(coefficients, pitch + first, channels)
    offsets = window(coefficients, 2 * pitch + first, channels)
    kept = window(coefficients, 3 * pitch + first, channels)
    for c in range(channels):
        centers[c] = means[c]
        kept[c] = inv_stds[c]
    for c in range(channels):
        scales[c] = gamma[c] * inv_stds[c]
        offsets[c] = beta[c] - gamma[c] * ROUNDING(means[c], np.float64(centers[c]), inv_stds[c])


def finish_slopes(counts, partials, coefficients, channelwise, stats, scalars, first, channels):
    """Merge the blocks in index order; leave dgamma, dbeta and the coefficients of dx of `channels` channels."""
    gamma = window(channelwise[0], first, channels)
    dgamma = window(channelwise[1], first, channels)
    dbeta = window(channelwise[2], first, channels)
    pitch = stats.shape[1]
    total = 0.0
    sums_g = np.empty(channels)
    sums_g_xhat = np.empty(channels)
    for c in range(channels):
        sums_g[c] = 0.0
        sums_g_xhat[c] = 0.0
    for b in range(counts.size):
        total += counts[b]
        s = window(partials, b * pitch + first, channels)
        q = window(partials, (counts.size + b) * pitch + first, channels)
        for c in range(channels):
            sums_g[c] += s[c]
            sums_g_xhat[c] += q[c]
    means = window(stats, first, channels)
    inv_stds = window(stats, pitch + first, channels)
    centers = window(coefficients, first, channels)
    slopes = window(coefficients, 4 * pitch + first, channels)
    leans = window(coefficients, 5 * pitch + first, channels)
    offsets = window(coefficients, 6 * pitch + first, channels)
    for c in range(channels):
        lost = ROUNDING(means[c], np.float64(centers[c]), inv_stds[c])
        sums_g_xhat[c] -= lost * sums_g[c]
        dgamma[c] = sums_g_xhat[c]
        dbeta[c] = sums_g[c]
    for c in range(channels):
        lost = ROUNDING(means[c], np.float64(centers[c]), inv_stds[c])
        slope, lean, offset = GRADIENT_COEFFICIENTS(
            sums_g[c], sums_g_xhat[c], total, np.float64(gamma[c]), inv_stds[c], lost
        )
        slopes[c] = slope
        leans[c] = lean if TRAINING else 0.0  # constants have no gradient to send back
        offsets[c] = offset if TRAINING else 0.0


def spread(streams, outputs, tile, coefficients):
    """MAP over a tile."""
    # Tried: non-temporal stores by way of a row in L1. Out of cache they lost 20 %; in cache it took 3-8 times as long.
    # What is written over goes by one name, or the vectoriser cannot see that an element is read before it is written:
    # 2.5-4 times as slow.
    # One row at a time. Tried: four rows in one loop, eight streams for the prefetcher; slower in every layout, and by
    # half where rows are a multiple of 4 KiB apart (a load that seems to depend on an earlier store has to wait).
    x, a, y = streams
    out, other = outputs
    if tile.spatial >= SHORTEST:
        size = tile.spatial
        for row in range(tile.rows + 1):
            c = tile.channel - 1
            for k in range((tile.width if row < tile.rows else tile.rest) // size):
                c = c + 1 if c + 1 < tile.channel + tile.channels else tile.channel
                first = tile.start + row * tile.stride + k * size
                ov = window(out, first, size)
                xv = ov if OVER == 0 else window(x, first, size)
                av = ov if OVER == 1 else window(a, first, size)
                yv = ov if OVER == 2 else window(y, first, size)
                if N_COEFFICIENTS == 3:
                    h = HYPER(coefficients[0, c], coefficients[1, c], coefficients[2, c])
                    for j in range(size):
                        ov[j] = MAP(xv[j], av[j], yv[j], h)
                else:
                    h = HYPER(
                        coefficients[0, c],
                        coefficients[1, c],
                        coefficients[2, c],
                        coefficients[3, c],
                        coefficients[4, c],
                        coefficients[5, c],
                        coefficients[6, c],
                    )
                    if OUTPUTS == 1:
                        for j in range(size):
                            ov[j], _ = MAP(xv[j], av[j], yv[j], h)
                    else:
                        tv = window(other, first, size)
                        for j in range(size):
                            ov[j], tv[j] = MAP(xv[j], av[j], yv[j], h)
        return
    width = tile.width
    if tile.channels == width:  # the coefficients lie as the columns do
        table = window(coefficients, 0, coefficients.size)
        begin = tile.channel
        pitch = coefficients.shape[1]
    else:
        table = np.empty(N_COEFFICIENTS * width, DTYPE)
        EXPAND(coefficients, tile.channel, tile, table)
        begin = 0
        pitch = width
    c0 = window(table, begin, width)
    c1 = window(table, begin + pitch, width)
    c2 = window(table, begin + 2 * pitch, width)
    if N_COEFFICIENTS == 7:
        c3 = window(table, begin + 3 * pitch, width)
        c4 = window(table, begin + 4 * pitch, width)
        c5 = window(table, begin + 5 * pitch, width)
        c6 = window(table, begin + 6 * pitch, width)
    for row in range(tile.rows + 1):
        first = tile.start + row * tile.stride
        size = width if row < tile.rows else tile.rest
        ov = window(out, first, size)
        xv = ov if OVER == 0 else window(x, first, size)
        av = ov if OVER == 1 else window(a, first, size)
        yv = ov if OVER == 2 else window(y, first, size)
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
    keep(table)


SUMS, WIDE_SUMS, SPREAD = range(3)
"""Where in `entries` the addresses of the loops over a tile are."""

EPS, WEIGHT, LATE = range(3)
"""Where in `scalars` a number is; that of LATE is 1 where any group of channels is late: to ask all
of them takes 2-4 us."""

GATHERED, FINISHED, SPREADED, PANELS = range(4)
"""Phases: the sums of tiles; the merge of all channels; the map of tiles; all three on one group of channels."""


class Work(NamedTuple):
    """All that the loop over tiles works on."""

    entries: Any
    """Addresses, in the order of SUMS, WIDE_SUMS, SPREAD."""
    x: Any
    a: Any
    """The residual, or dy."""
    y: Any
    out: Any
    other: Any
    tiles: Any
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
    late: Any
    """int64, a number per group of channels: 1 where it waits for the sums in float64 to be compiled."""


def work(phase, w, first, last):
    """Do one phase: PANELS on groups [first, last) of channels, any other on tiles [first, last)."""
    # One loop for all phases: each of its own would be compiled with its own copy of everything it calls.
    streams = (w.x, w.a, w.y)
    outputs = (w.out, w.other)
    groups = w.late.size
    for unit in range(first, last) if phase == PANELS else range(1):
        if phase == PANELS:
            begin, step, tiles = unit, groups, w.counts.size
        else:
            begin, step, tiles = min(first, last), 1, abs(last - first)
        late = False
        if SUMMED and phase in (GATHERED, PANELS):
            for k in range(tiles):
                t = begin + k * step
                tile = Tile(*to_fixed_tuple(w.tiles[t], N_TILE))
                if not GATHER(w.entries, streams, tile, t // groups, w.partials, w.coefficients):
                    late = True
                    w.late[t % groups] = 1
                    w.scalars[LATE] = 1.0
        if phase in (FINISHED, PANELS) and not late:
            channel, channels = 0, w.gamma.size
            if phase == PANELS:
                tile = Tile(*to_fixed_tuple(w.tiles[unit], N_TILE))
                channel, channels = tile.channel, tile.channels
            channelwise = (w.gamma, w.first, w.second, w.third)
            FINISH(w.counts, w.partials, w.coefficients, channelwise, w.stats, w.scalars, channel, channels)
        if phase in (SPREADED, PANELS) and not late:
            for k in range(tiles - 1, -1, -1):  # the last one first: read last, it is the likeliest to be in a cache
                tile = Tile(*to_fixed_tuple(w.tiles[begin + k * step], N_TILE))
                invoke(w.entries[SPREAD], (streams, outputs, tile, w.coefficients))


# --- how an array is cut ----------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How an array is cut. The tiles, and with them the bits, never depend on the threads."""

    tiles: np.ndarray
    """int64, a `Tile` a line: block after block, in each tiles of the same channels in the same order."""
    counts: np.ndarray
    """float64: the values per channel in each block."""


@lru_cache(maxsize=256)
def plan(samples: int, channels: int, spatial: int, *, across: bool = False) -> Plan:
    """Cut an array of (samples, channels, spatial); `across`: large maps into tiles that go over many samples, too."""
    if spatial >= LONG and not (across and spatial <= PIECE):
        blocks = _tiles_in_a_row(samples, channels, spatial)
    elif spatial < LONG and channels * spatial <= WIDTH + WIDTH // 2:
        blocks = _tiles_of_whole_samples(samples, channels, spatial)
    else:
        blocks = _tiles_of_some_channels(samples, channels, spatial)
    return Plan(
        np.array([tile for tiles in blocks for tile in tiles], np.int64),
        np.array([(t.rows * t.width + t.rest) // t.channels for t, *_ in blocks], np.float64),
    )


def _tiles_in_a_row(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    """Tiles of contiguous memory."""
    row = channels * spatial
    if row <= TILE:
        step = TILE // row
        return [
            [Tile(n * row, min(step, samples - n), row, row, 0, 0, channels, spatial)] for n in range(0, samples, step)
        ]
    if spatial <= TILE:
        groups = _edges(channels, min(channels, -(-row // TILE)))
        return [
            [Tile(n * row + c * spatial, 1, row, (d - c) * spatial, 0, c, d - c, spatial) for c, d in groups]
            for n in range(samples)
        ]
    return [
        [Tile(n * row + c * spatial + i, 1, row, j - i, 0, c, 1, j - i) for c in range(channels)]
        for n in range(samples)
        for i, j in _edges(spatial, -(-spatial // TILE))
    ]


def _tiles_of_whole_samples(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    """Several samples in a row, where they are short."""
    row = channels * spatial
    side = max(1, (WIDTH if row % VECTOR else NARROW) // row)
    rows = _rows(side * row)
    blocks = []
    for n in range(0, samples, side * rows):
        here = min(side * rows, samples - n)
        beside = min(side, here)
        width = beside * row
        blocks.append([Tile(n * row, here // beside, width, width, here % beside * row, 0, channels, spatial)])
    return blocks


def _tiles_of_some_channels(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    row = channels * spatial
    groups = _edges(channels, -(-channels // max(1, WIDTH // spatial)))
    rows = _rows(groups[0][1] * spatial)
    return [
        [
            Tile(n * row + c * spatial, min(rows, samples - n), row, (d - c) * spatial, 0, c, d - c, spatial)
            for c, d in groups
        ]
        for n in range(0, samples, rows)
    ]


def _edges(size: int, parts: int) -> list[tuple[int, int]]:
    """[start, stop) of parts of about the same size."""
    return list(pairwise(size * k // parts for k in range(parts + 1)))


def _rows(width: int) -> int:
    least, most = SOME_ROWS
    return min(max(TILE // width // GROUP_ROWS * GROUP_ROWS, least), most)


# --- from the loops to launches ---------------------------------------------------------------------------------------


class BatchNormCPU:
    """The compiled BatchNorm of one dtype and one set of flags, forward and backward, in training or not."""

    def __init__(
        self,
        formulas: ModuleType,
        dtype: np.dtype[Any],
        flags: dict[str, bool],
        shared: dict[Any, Any],
    ):
        self._formulas = formulas
        self._dtype = dtype
        self._flags = flags
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
        over: int,
    ) -> tuple[Array, Array]:
        """Write y to `out` and, in training, the running statistics; return what `backward` needs.

        x, residual, out : 1-D, (samples, channels, spatial) in memory.
        channelwise : (gamma, beta, running_mean, running_var), any of them None.
        over : 0 or 1 where `out` is x or residual, -1 where it is neither.
        """
        channels = shape[1]
        gamma, beta, mean, var = channelwise
        coefficients = np.empty((7, channels), self._dtype)
        stats = np.empty((2, channels))
        known = (
            self._ones(channels) if gamma is None else gamma,
            self._zeros(channels) if beta is None else beta,
            self._zeros(channels) if mean is None else mean,
            self._zeros(channels) if var is None else var,
        )
        streams = (x, x if residual is None else residual, x)
        scalars = np.array([eps, weight, 0.0])
        passes = self._passes_for(backward=False, training=training)
        passes.launch(shape, streams, (out, out), coefficients, known, stats, scalars, over)
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
        over: int,
    ) -> None:
        """Write dx, dgamma, dbeta and, where `outputs` has room for it, the residual's gradient.

        channelwise : (gamma or None, dgamma, dbeta).
        saved : what `forward` returned; it is written to.
        over : 0, 1 or 2 where dx is written over x, dy or y, -1 where it is over none of them.
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
            np.zeros(3),
            over,
        )

    def _ones(self, channels: int) -> Array:
        return np.ones(channels, self._dtype)

    def _zeros(self, channels: int) -> Array:
        return np.zeros(channels, self._dtype)

    def _passes_for(self, *, backward: bool, training: bool) -> _Passes:
        key = (backward, training)
        passes = self._passes.get(key)
        if passes is None:
            with COMPILING:
                passes = self._passes.get(key)
                if passes is None:
                    passes = self._passes[key] = self._compile(backward, training)
        return passes

    def _compile(self, backward: bool, training: bool) -> _Passes:
        key = (self._dtype, backward, training)
        loop = self._shared.get(key)
        if loop is None:
            loop = work_loop(self._formulas, self._dtype, backward=backward, training=training)
            self._shared[key] = loop
        if backward not in self._tile_loops:
            self._tile_loops[backward] = TileLoops(
                self._formulas, self._dtype, self._flags, self._shared, backward=backward
            )
        across = training and not backward
        return _Passes(loop, self._tile_loops[backward], across=across, sums=backward or training)


class Types:
    """The numba types of the arrays of one dtype."""

    def __init__(self, dtype: np.dtype[Any]):
        self.number = numba.from_dtype(dtype)
        self.vector = types.Array(self.number, 1, "C")
        self.streams = types.UniTuple(self.vector, 3)
        self.outputs = types.UniTuple(self.vector, 2)
        self.coefficients = types.Array(self.number, 2, "C")
        self.tile = types.NamedUniTuple(types.int64, len(Tile._fields), Tile)
        self.integers = types.Array(types.int64, 2, "C")
        self.addresses = types.Array(types.int64, 1, "C")
        self.totals = types.Array(types.float64, 1, "C")
        self.stats = types.Array(types.float64, 2, "C")
        self.partials = types.Array(types.float64, 3, "C")


def work_loop(formulas: Any, dtype: np.dtype[Any], *, backward: bool, training: bool) -> Loop:
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
        "SUMMED": backward or training,
    }
    kinds = Types(dtype)
    name = "_".join(["backward" if backward else "forward", "training" if training else "inference", dtype.name])
    everything = types.NamedTuple(
        (
            kinds.addresses,
            *[kinds.vector] * 5,
            kinds.integers,
            kinds.totals,
            kinds.partials,
            kinds.coefficients,
            *[kinds.vector] * 4,
            kinds.stats,
            kinds.totals,
            kinds.addresses,
        ),
        Work,
    )
    signature = (types.int64, everything)
    return Loop(work, pieces, signature, label=f"batchnorm_{name}")


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
        if ("expand", dtype) not in shared:
            shared["expand", dtype] = scalar(bind(expand, {}, label=f"expand_{dtype}", scalar=scalar))
        scalars: dict[str, Any] = {**flags, "ZERO": dtype.type(0)}
        scalars["masked"] = _piece(formulas.masked, scalars)
        terms = _piece(formulas.slopes if backward else formulas.deviation, scalars)
        four = _piece(four_terms, {"TERMS": terms})
        summing: dict[str, Any] = {
            "N_COEFFICIENTS": 4 if backward else 1,
            "HYPER": formulas.Moments if backward else formulas.Shift,
            "TERMS": terms,
            "AT_ONCE": GROUP_ROWS // 2 if backward else GROUP_ROWS,
            "ROWS": _piece(rows_of_all if backward else rows_of_x, {"FOUR_ROWS": four_rows}),
            "TERMS_OF_ROWS": four if backward else _piece(eight_terms, {"FOUR_TERMS": four}),
            "EXPAND": shared["expand", dtype],
        }
        mapping: dict[str, Any] = {
            "DTYPE": dtype.type,
            "SHORTEST": RUN // dtype.itemsize,
            "N_COEFFICIENTS": 7 if backward else 3,
            "OUTPUTS": 2 if backward and flags["RELU"] and flags["RESIDUAL"] else 1,
            "HYPER": formulas.Slope if backward else formulas.Affine,
            "MAP": _piece(formulas.gradient if backward else formulas.normalise, scalars),
            "EXPAND": shared["expand", dtype],
        }
        self._dtype = dtype
        self._summing = summing
        self._mapping = mapping
        self._shared = shared

    def spread(self, over: int) -> int:
        """The address of the map's loop that writes `out` over the stream of number `over`; -1: over none."""
        kinds = self._kinds
        constants = {**self._mapping, "OVER": over}
        return self._compile(spread, constants, (kinds.streams, kinds.outputs, kinds.tile, kinds.coefficients))

    def sums(self, *, wide: bool) -> int:
        """The address of the sums' loop, in the dtype or in float64."""
        accumulator = np.float64 if wide else self._dtype.type
        constants = {**self._summing, "ACC": accumulator, "WIDE": wide}  # wide is rare: a row at a time will do
        kinds = self._kinds
        signature = (kinds.streams, kinds.tile, kinds.coefficients, types.int64, kinds.totals, kinds.totals)
        return self._compile(sums, constants, signature, fastmath={"reassoc"})

    def _compile(self, function: Any, constants: dict[str, Any], signature: tuple[Any, ...], **options: Any) -> int:
        bound = bind(function, constants, label=f"batchnorm_{function.__name__}_{self._dtype.name}", scalar=scalar)
        dispatcher = self._shared.get(bound.__name__)  # the sums of the statistics are the same for all flags
        if dispatcher is None:
            dispatcher = self._shared[bound.__name__] = compile_loop(bound, signature, **options)
        return address_of(dispatcher)


def _piece(function: Any, constants: dict[str, Any]) -> FunctionType:
    return bind(function, constants, label=function.__name__, scalar=scalar)


class _Passes:
    """One direction: its loops over a tile, what is around them, and how they are launched."""

    def __init__(self, loop: Loop, loops: TileLoops, *, across: bool, sums: bool):
        self._loop = loop
        self._loops = loops
        self._entries: dict[int, Array] = {}
        self._across = across
        self._sums = sums

    def launch(
        self,
        shape: tuple[int, int, int],
        streams: tuple[Array, ...],
        outputs: tuple[Array, ...],
        coefficients: Array,
        channelwise: tuple[Array, ...],
        stats: Array,
        scalars: Array,
        over: int,
    ) -> None:
        """Run the phases over the whole array."""
        size = streams[0].size
        samples, channels, spatial = shape
        # What is empty has coefficients and gradients all the same: those of one block whose sums are 0.
        across = self._across and streams[0].nbytes < ACROSS
        cut = plan(max(1, samples), channels, max(1, spatial), across=across)
        partials = np.zeros((2, cut.counts.size if self._sums else 0, channels))
        entries = self._entries.get(over)
        if entries is None:
            with COMPILING:
                entries = self._entries[over] = self._compile(over)
        everything = Work._make(
            (
                entries,
                *streams,
                *outputs,
                cut.tiles,
                cut.counts,
                partials,
                coefficients,
                *channelwise,
                stats,
                scalars,
                np.zeros(cut.tiles.shape[0] // cut.counts.size, np.int64),
            )
        )
        by_panels = self._by_panels(everything, size)  # asked once: the number of threads may change meanwhile
        self._run(everything, size, by_panels)
        if scalars[LATE]:
            # Rare, and seconds to compile; of these channels nothing but sums has been written yet.
            with COMPILING:
                entries[WIDE_SUMS] = self._loops.sums(wide=True)
            late = np.flatnonzero(everything.late)
            everything.late[:] = 0
            scalars[LATE] = 0.0
            if by_panels:
                for group in late:
                    self._loop.serial(PANELS, everything, group, group + 1)
            else:
                self._run(everything, size, by_panels)

    def _compile(self, over: int) -> Array:
        entries = np.zeros(3, np.int64)
        entries[SPREAD] = self._loops.spread(over)
        if self._sums:
            entries[SUMS] = self._loops.sums(wide=False)
        return entries

    def _run(self, everything: Work, size: int, by_panels: bool) -> None:
        tiles = everything.tiles.shape[0]
        if size == 0:
            self._loop.serial(FINISHED, everything, 0, tiles)
        elif by_panels:
            self._loop.run(PANELS, everything, elements=size, units=everything.late.size)
        else:
            if self._sums:
                self._loop.run(GATHERED, everything, elements=size, units=tiles)
                if everything.scalars[LATE]:
                    return
            self._loop.serial(FINISHED, everything, 0, tiles)
            self._loop.run(SPREADED, everything, elements=size, units=tiles, backwards=True)

    def _by_panels(self, everything: Work, size: int) -> bool:
        """Whether one group of channels after the other is summed, merged and mapped; else each phase on all tiles."""
        groups = everything.late.size
        return size < SERIAL_BELOW or (size <= PANEL * groups and groups >= 2 * get_num_threads())
