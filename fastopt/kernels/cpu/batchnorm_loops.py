"""The loops of BatchNorm on the CPU around those of batchnorm_tile_loops.py, which they call by address.

They go over tiles or groups, which batchnorm_tiles.py defines, and merge the sums of the blocks in float64. One
compiled copy serves all flags.
"""

# Scalar functions and loops are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.np.unsafe.ndarray import to_fixed_tuple

from fastopt.kernels.cpu.batchnorm_tile_loops import ArrayTypes, part
from fastopt.kernels.cpu.batchnorm_tiles import Tile
from fastopt.kernels.driver import Loop
from fastopt.kernels.intrinsics import invoke, window
from fastopt.kernels.threads import COMPILING

# --- the loops --------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies.

DTYPE: Any
N_TILE: Any
TILE_AT: Any
SUMMED: Any
SUM_TILE: Any
MERGE: Any
MAP_TILE: Any
GUARDED: Any
LARGEST: Any
TRAINING: Any
AFFINE_COEFFICIENTS: Any
BLEND: Any
GAMMA_GRADIENT: Any
GRADIENT_COEFFICIENTS: Any
INVERSE_STD: Any
IS_RECORDABLE: Any
MOMENTS: Any
ROUNDING: Any
SQUARES_ABOUT: Any
SUMS_ARE_EXACT: Any
UNBIASED_VARIANCE: Any
VARIANCE: Any


class Forward(NamedTuple):
    """What the loops of a forward pass work on."""

    x: Any
    residual: Any
    y: Any
    tiles: Any
    counts: Any
    partials: Any
    """float64, (2, blocks, channels): mean, and sum of squares about it."""
    coefficients: Any
    """(7, channels), in the dtype of x: the fields of `formulas.GradientMap`. Forward leaves the first four."""
    stats: Any
    """float64, (2, channels): mean and inv_std."""
    gamma: Any
    beta: Any
    running_mean: Any
    running_var: Any
    new_running: Any
    """(2, channels), in the dtype of x: the running mean and variance after this batch."""
    unrecordable: Any
    """bool, one: whether a channel's statistics must not enter the running ones."""
    eps: Any
    momentum: Any
    sum_loop: Any
    """The address of `forward_sums`."""
    wide_sum_loop: Any
    """The address of the same in float64; 0 where that is not compiled."""
    map_loop: Any
    """The address of `map_tile`."""
    needs_wide: Any
    """bool, one per group: whether it waits for the sums in float64 to be compiled."""


class Backward(NamedTuple):
    """What the loops of a backward pass work on; names as in `Forward`."""

    x: Any
    dy: Any
    y: Any
    dx: Any
    dresidual: Any
    tiles: Any
    counts: Any
    partials: Any
    """float64, (2, blocks, channels): sum g, sum g xhat."""
    coefficients: Any
    stats: Any
    gamma: Any
    dgamma: Any
    dbeta: Any
    sum_loop: Any
    map_loop: Any


def tile_at(tiles, t):
    """Line t of `Plan.tiles`."""
    return Tile(*to_fixed_tuple(tiles[t], N_TILE))


def forward_sum_tile(work, t):
    """Leave the moments of each channel of tile t in `partials`; return False where that needs sums in float64."""
    tile = TILE_AT(work.tiles, t)
    count = (tile.rows * tile.width + tile.rest) // tile.channels
    centers = np.empty((1, tile.channels), DTYPE)
    for c in range(tile.channels):
        centers[0, c] = work.x[tile.start + c * tile.spatial]
    s = np.empty(tile.channels)
    q = np.empty(tile.channels)
    arrays = (work.x,)
    invoke(work.sum_loop, (arrays, tile, centers, s, q))
    if GUARDED:
        exact = 0
        for c in range(tile.channels):
            exact += SUMS_ARE_EXACT(s[c], q[c], count, LARGEST)
        if exact < tile.channels:
            if work.wide_sum_loop == 0:
                work.needs_wide[t % work.needs_wide.size] = True
                return False
            invoke(work.wide_sum_loop, (arrays, tile, centers, s, q))
    blocks, channels = work.counts.size, work.gamma.size
    block = t // work.needs_wide.size
    means = window(work.partials, block * channels + tile.channel, tile.channels)
    squares = window(work.partials, (blocks + block) * channels + tile.channel, tile.channels)
    for c in range(tile.channels):
        means[c], squares[c] = MOMENTS(s[c], q[c], count, centers[0, c])
    return True


def backward_sum_tile(work, t):
    """Leave the sums of the gradients of each channel of tile t in `partials`; return True."""
    tile = TILE_AT(work.tiles, t)
    blocks, channels = work.counts.size, work.gamma.size
    block = t // (work.tiles.shape[0] // blocks)
    s = window(work.partials, block * channels + tile.channel, tile.channels)
    q = window(work.partials, (blocks + block) * channels + tile.channel, tile.channels)
    invoke(work.sum_loop, ((work.x, work.dy, work.y), tile, work.coefficients, s, q))
    return True


def forward_map_tile(work, t):
    """Map tile t to y."""
    tile = TILE_AT(work.tiles, t)
    invoke(work.map_loop, ((work.x, work.residual), (work.y,), tile, work.coefficients))


def backward_map_tile(work, t):
    """Map tile t to dx."""
    tile = TILE_AT(work.tiles, t)
    invoke(work.map_loop, ((work.x, work.dy, work.y), (work.dx, work.dresidual), tile, work.coefficients))


# The merges go over the channels in their inner loops, with few arrays in each, so that these are vectorised.


def merge_statistics(work, first, channels):
    """Merge the blocks in index order; leave statistics and coefficients of `channels` channels from `first` on."""
    blocks, pitch = work.counts.size, work.gamma.size
    means = window(work.stats, first, channels)
    inv_stds = window(work.stats, pitch + first, channels)
    running_mean = window(work.running_mean, first, channels)
    running_var = window(work.running_var, first, channels)
    if TRAINING:
        # Two passes over the blocks, about the first one's mean: no sum cancels, and blocks that agree merge to
        # exactly what they agree on.
        total = 0.0
        for b in range(blocks):
            total += work.counts[b]
        origin = window(work.partials, first, channels)
        squares = np.empty(channels)
        for c in range(channels):
            means[c] = 0.0
            squares[c] = 0.0
        for b in range(blocks):
            block_means = window(work.partials, b * pitch + first, channels)
            for c in range(channels):
                means[c] += work.counts[b] * (block_means[c] - origin[c])
        for c in range(channels):
            means[c] = origin[c] + means[c] / total
        for b in range(blocks):
            block_means = window(work.partials, b * pitch + first, channels)
            block_squares = window(work.partials, (blocks + b) * pitch + first, channels)
            for c in range(channels):
                squares[c] += SQUARES_ABOUT(means[c], work.counts[b], block_means[c], block_squares[c])
        new_mean = window(work.new_running, first, channels)
        new_var = window(work.new_running, pitch + first, channels)
        recordable = 0
        for c in range(channels):
            recordable += IS_RECORDABLE(means[c], squares[c])
        if recordable < channels:
            work.unrecordable[0] = True
        for c in range(channels):
            new_mean[c] = BLEND(np.float64(running_mean[c]), means[c], work.momentum, LARGEST)
        for c in range(channels):
            unbiased = UNBIASED_VARIANCE(squares[c], total)
            new_var[c] = BLEND(np.float64(running_var[c]), unbiased, work.momentum, LARGEST)
        for c in range(channels):
            inv_stds[c] = INVERSE_STD(VARIANCE(squares[c], total), work.eps)
    else:
        for c in range(channels):
            means[c] = running_mean[c]
            inv_stds[c] = INVERSE_STD(np.float64(running_var[c]), work.eps)
    gamma = window(work.gamma, first, channels)
    beta = window(work.beta, first, channels)
    centers = window(work.coefficients, first, channels)
    scales = window(work.coefficients, pitch + first, channels)
    shifts = window(work.coefficients, 2 * pitch + first, channels)
    rounded_inv_stds = window(work.coefficients, 3 * pitch + first, channels)
    for c in range(channels):
        centers[c] = means[c]
        rounded_inv_stds[c] = inv_stds[c]
    for c in range(channels):
        center = np.float64(centers[c])
        scales[c], shifts[c] = AFFINE_COEFFICIENTS(means[c], center, inv_stds[c], gamma[c], beta[c])


def merge_gradients(work, first, channels):
    """Merge the blocks in index order; leave dgamma, dbeta and the coefficients of dx of `channels` channels."""
    blocks, pitch = work.counts.size, work.gamma.size
    sums_g = np.empty(channels)
    sums_g_xhat = np.empty(channels)
    for c in range(channels):
        sums_g[c] = 0.0
        sums_g_xhat[c] = 0.0
    total = 0.0
    for b in range(blocks):
        total += work.counts[b]
        s = window(work.partials, b * pitch + first, channels)
        q = window(work.partials, (blocks + b) * pitch + first, channels)
        for c in range(channels):
            sums_g[c] += s[c]
            sums_g_xhat[c] += q[c]
    gamma = window(work.gamma, first, channels)
    dgamma = window(work.dgamma, first, channels)
    dbeta = window(work.dbeta, first, channels)
    means = window(work.stats, first, channels)
    inv_stds = window(work.stats, pitch + first, channels)
    centers = window(work.coefficients, first, channels)
    dy_scales = window(work.coefficients, 4 * pitch + first, channels)
    xhat_scales = window(work.coefficients, 5 * pitch + first, channels)
    offsets = window(work.coefficients, 6 * pitch + first, channels)
    for c in range(channels):
        lost = ROUNDING(means[c], np.float64(centers[c]), inv_stds[c])
        sums_g_xhat[c] = GAMMA_GRADIENT(sums_g[c], sums_g_xhat[c], lost)
        dgamma[c] = sums_g_xhat[c]
        dbeta[c] = sums_g[c]
    for c in range(channels):
        lost = ROUNDING(means[c], np.float64(centers[c]), inv_stds[c])
        dy_scales[c], xhat_scales[c], offsets[c] = GRADIENT_COEFFICIENTS(
            sums_g[c], sums_g_xhat[c], total, np.float64(gamma[c]), inv_stds[c], lost, TRAINING
        )


def sum_tiles(work, first, last):
    """Sum tiles [first, last)."""
    for t in range(first, last):
        SUM_TILE(work, t)


def merge_channels(work, first, last):
    """Merge the sums of channels [first, last)."""
    MERGE(work, first, last - first)


def map_tiles(work, first, last):
    """Map tiles [last, first), the last one first: read last, it is the likeliest to be in a cache."""
    for t in range(first - 1, last - 1, -1):
        MAP_TILE(work, t)


def each_group(work, first, last):
    """Sum, merge and map each of the groups [first, last), while it is in a cache."""
    tiles, groups = work.tiles.shape[0], work.tiles.shape[0] // work.counts.size
    for group in range(first, last):
        complete = True
        if SUMMED:
            for t in range(group, tiles, groups):
                complete &= SUM_TILE(work, t)
        if complete:
            tile = TILE_AT(work.tiles, group)
            MERGE(work, tile.channel, tile.channels)
            for t in range(tiles - groups + group, -1, -groups):
                MAP_TILE(work, t)


# --- from the functions above to compiled loops -----------------------------------------------------------------------


def _type_of(work: type, dtype: np.dtype[Any]) -> Any:
    """The numba type of a `Forward` or a `Backward`."""
    array_types = ArrayTypes(dtype)
    special = {
        "tiles": types.Array(types.int64, 2, "C"),
        "counts": array_types.totals,
        "partials": types.Array(types.float64, 3, "C"),
        "coefficients": array_types.coefficients,
        "stats": types.Array(types.float64, 2, "C"),
        "new_running": array_types.coefficients,
        **dict.fromkeys(("needs_wide", "unrecordable"), types.Array(types.boolean, 1, "C")),
        **dict.fromkeys(("eps", "momentum"), types.float64),
        **dict.fromkeys(("sum_loop", "wide_sum_loop", "map_loop"), types.int64),
    }
    fields: tuple[str, ...] = work._fields  # type: ignore[attr-defined]
    return types.NamedTuple([special.get(name, array_types.vector) for name in fields], work)


def _constants_of(formulas: ModuleType, dtype: np.dtype[Any], *, training: bool) -> dict[str, Any]:
    names = (
        "affine_coefficients",
        "blend",
        "gamma_gradient",
        "gradient_coefficients",
        "inverse_std",
        "is_recordable",
        "moments",
        "rounding",
        "squares_about",
        "sums_are_exact",
        "unbiased_variance",
        "variance",
    )
    return {
        **{name.upper(): getattr(formulas, name) for name in names},
        "DTYPE": dtype.type,
        "LARGEST": float(np.finfo(dtype).max),
        "TRAINING": training,
        "GUARDED": dtype.itemsize < 8,  # where the data is float64 there is nothing wider to go to
        "TILE_AT": part(tile_at, {"N_TILE": len(Tile._fields)}),
    }


class OuterLoops:
    """The loops around the loops over a tile, of one direction, for all flags; each compiled when it is first used."""

    def __init__(self, formulas: ModuleType, dtype: np.dtype[Any], *, backward: bool, training: bool):
        constants = _constants_of(formulas, dtype, training=training)
        direction, work = ("backward", Backward) if backward else ("forward", Forward)
        self._name = "_".join([direction, "training" if training else "inference", dtype.name])
        self._signature = (_type_of(work, dtype),)
        self._constants = {
            "SUMMED": backward or training,
            "SUM_TILE": part(backward_sum_tile if backward else forward_sum_tile, constants),
            "MERGE": part(merge_gradients if backward else merge_statistics, constants),
            "MAP_TILE": part(backward_map_tile if backward else forward_map_tile, constants),
            "TILE_AT": constants["TILE_AT"],
        }
        self._loops: dict[Any, Loop] = {}

    def __call__(self, function: Any) -> Loop:
        """One of `sum_tiles`, `merge_channels`, `map_tiles` and `each_group`, compiled."""
        loop = self._loops.get(function)
        if loop is None:
            with COMPILING:
                loop = self._loops.get(function)
                if loop is None:
                    label = f"batchnorm_{function.__name__}_{self._name}"
                    loop = self._loops[function] = Loop(function, self._constants, self._signature, label=label)
        return loop
