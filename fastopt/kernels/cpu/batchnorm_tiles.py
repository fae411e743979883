"""How the CPU cuts an array for BatchNorm.

x is (samples, channels, spatial) in memory; channels-last is spatial = 1. Four words:

- map: the values of one channel in one sample, which follow each other in memory.
- tile: a matrix inside x, rows of equal length at one stride. One thread works on it at a time.
- block: tiles that hold the same samples and together all channels. A block has one partial sum per channel.
- group: the tiles of the same channels in all blocks.

A tile is short enough for float32 sums. Numbers behind the sizes are in docs/tuning.md.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

LARGE_MAP = 128
"""Spatial size from which a tile is summed channel by channel; below it, column by column."""

SUM_LENGTH = 2048
"""Most values of a channel that are summed in registers before they are added up in float64."""

COLUMNS = 1024
"""Columns of a tile of small maps, about: long enough to hide the start of a loop, short enough for two accumulators
in L1."""

FEW_COLUMNS = 64
"""Columns, about, where a sample is a whole number of vectors: the rows that are read together are then one stream to
the prefetcher."""

TILE_SIZE = 32_768
"""Elements of a tile, about: small enough to share few channels out among many threads. A tile of small maps has twice
as many, or more: see `_rows`."""

FEW_BLOCKS = 8
"""Blocks of small maps are not made shorter to have more than these: each costs as much as two or three rows."""

LEAST_ROWS, MOST_ROWS = 16, 256
"""Rows of a tile of small maps. The most bounds the number of float32 values that a column adds up."""

ROWS_AT_ONCE = 8
"""Rows of large maps that are summed together where one array is read."""

VECTOR = 16
"""Elements of the widest vector, AVX-512's of float32."""


class Tile(NamedTuple):
    """A line of `Plan.tiles`: rows of `channels` times `spatial` elements, over and over."""

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


class Plan(NamedTuple):
    """How an array is cut. The tiles, and with them the bits, never depend on the threads."""

    tiles: np.ndarray
    """int64, a `Tile` a line: block after block, and the groups of each block in the same order."""
    counts: np.ndarray
    """float64: the values per channel in each block."""
    groups: int
    """How many there are."""


@lru_cache(maxsize=256)
def plan(samples: int, channels: int, spatial: int, *, across: bool = False) -> Plan:
    """Cut an array of (samples, channels, spatial).

    across : whether large maps, also, are cut into tiles that go over many samples.
    """
    if spatial >= LARGE_MAP and not (across and spatial <= SUM_LENGTH):
        blocks = _contiguous_tiles(samples, channels, spatial)
    elif spatial < LARGE_MAP and channels * spatial <= COLUMNS + COLUMNS // 2:
        blocks = _tiles_of_whole_samples(samples, channels, spatial)
    else:
        blocks = _tiles_of_some_channels(samples, channels, spatial)
    return Plan(
        np.array([tile for tiles in blocks for tile in tiles], np.int64),
        np.array([(t.rows * t.width + t.rest) // t.channels for t, *_ in blocks], np.float64),
        len(blocks[0]),
    )


def _contiguous_tiles(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    row = channels * spatial
    if row <= TILE_SIZE:
        step = TILE_SIZE // row
        return [
            [Tile(n * row, min(step, samples - n), row, row, 0, 0, channels, spatial)] for n in range(0, samples, step)
        ]
    if spatial <= TILE_SIZE:
        groups = _edges(channels, min(channels, -(-row // TILE_SIZE)))
        return [
            [Tile(n * row + c * spatial, 1, row, (d - c) * spatial, 0, c, d - c, spatial) for c, d in groups]
            for n in range(samples)
        ]
    return [
        [Tile(n * row + c * spatial + i, 1, row, j - i, 0, c, 1, j - i) for c in range(channels)]
        for n in range(samples)
        for i, j in _edges(spatial, -(-spatial // TILE_SIZE))
    ]


def _tiles_of_whole_samples(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    """A row holds several samples, where these are short."""
    sample = channels * spatial
    per_row = max(1, (COLUMNS if sample % VECTOR else FEW_COLUMNS) // sample)
    rows = _rows(per_row * sample, samples // per_row)
    blocks = []
    for n in range(0, samples, per_row * rows):
        present = min(per_row * rows, samples - n)
        per_row_here = min(per_row, present)
        width = per_row_here * sample
        rest = present % per_row_here * sample
        blocks.append([Tile(n * sample, present // per_row_here, width, width, rest, 0, channels, spatial)])
    return blocks


def _tiles_of_some_channels(samples: int, channels: int, spatial: int) -> list[list[Tile]]:
    row = channels * spatial
    groups = _edges(channels, -(-channels // max(1, COLUMNS // spatial)))
    rows = _rows(groups[0][1] * spatial, samples)
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


def _rows(width: int, total: int) -> int:
    """Rows of a tile, of `total` rows of this width."""
    rows = max(2 * TILE_SIZE // width, total // FEW_BLOCKS) // ROWS_AT_ONCE * ROWS_AT_ONCE
    return min(max(rows, LEAST_ROWS), MOST_ROWS)
