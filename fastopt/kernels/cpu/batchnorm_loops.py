"""The loops of BatchNorm on the CPU around those of batchnorm_tile_loops.py, which they call by address.

They go over tiles or groups, which batchnorm_tiles.py defines, and merge the sums of the blocks in float64. One
compiled copy serves all flags.

What Python passes are addresses: of the addresses of the arrays, as the door (fastopt/storage/door.py) leaves them, and
of the words that are the same for all arrays of a shape. An array as an argument costs 0.1 us.
"""

# Scalar functions and loops are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numba import types

from fastopt.kernels.bind import bind, compile_loop, inlined
from fastopt.kernels.contract import REFUSED
from fastopt.kernels.cpu.batchnorm_tile_loops import part
from fastopt.kernels.cpu.batchnorm_tiles import Tile
from fastopt.kernels.driver import Loop
from fastopt.kernels.intrinsics import at_address, invoke, keep, record, window
from fastopt.kernels.threads import COMPILING

# --- the loops --------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies.

DTYPE: Any
ITEMSIZE: Any
ZERO: Any
ONE: Any
N_TILE: Any
ARRAYS: Any
N_ARRAYS: Any
N_FIXED: Any
ARRAYS_AT: Any
FIXED_AT: Any
WORKSPACE_AT: Any
WHOLE: Any
CHANNELWISE: Any
COUNT_OF: Any
OVERLAP: Any
WAITING: Any
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
NEAR: Any
ROUNDING: Any
SQUARES_ABOUT: Any
SUMS_ARE_EXACT: Any
UNBIASED_VARIANCE: Any
VARIANCE: Any


class ForwardArrays(NamedTuple):
    """The addresses of the arrays of a forward pass, in the order of the list at the door; 0 for None."""

    x: Any
    residual: Any
    y: Any
    gamma: Any
    beta: Any
    running_mean: Any
    running_var: Any
    workspace: Any


class BackwardArrays(NamedTuple):
    """The same of a backward pass. The workspace is that of its forward pass."""

    x: Any
    dy: Any
    y: Any
    dx: Any
    dresidual: Any
    dgamma: Any
    dbeta: Any
    workspace: Any


class Fixed(NamedTuple):
    """What is the same for all passes over arrays of one shape."""

    tiles: Any
    """The address of `Plan.tiles`; and of its counts."""
    counts: Any
    tile_count: Any
    blocks: Any
    groups: Any
    channels: Any
    size: Any
    """Of x, in elements."""
    sum_loop: Any
    """The address of the sums of a tile; 0 where nothing is summed."""
    wide_sum_loop: Any
    """The same in float64; 0 where that is not compiled."""


class Workspace(NamedTuple):
    """The parts of a workspace, which a forward pass leaves for its backward pass.

    The first ones are where they are whatever the plan, because the two passes may cut an array in different ways.
    """

    stats: Any
    """float64, (2, channels): mean and inv_std."""
    coefficients: Any
    """(7, channels), in the dtype of x: the fields of `formulas.GradientMap`. Forward leaves the first four."""
    gamma: Any
    """A copy, in the dtype: an optimizer may step before the backward pass. 1 where there is none."""
    new_running: Any
    """(2, channels), in the dtype: the running mean and variance after this batch."""
    unrecordable: Any
    """int64, one: whether a channel's statistics must not enter the running ones."""
    waiting: Any
    """int64, one per group: whether it waits for the sums in float64 to be compiled."""
    partials: Any
    """float64, (2, blocks, channels): mean, and sum of squares about it; or sum g, and sum g xhat."""


VECTORS = 10
"""Rows of the workspace in the dtype of x."""


def workspace_size(channels: int, blocks: int, groups: int, itemsize: int) -> int:
    """The bytes of a workspace."""
    return channels * (16 + VECTORS * itemsize) + 8 * (1 + groups + 2 * blocks * channels)


def stats_of(workspace: np.ndarray, channels: int) -> np.ndarray:
    """`Workspace.stats` of a workspace, of shape (2, channels)."""
    return workspace.view(np.uint8)[: 16 * channels].view(np.float64).reshape(2, channels)


def waiting_of(workspace: np.ndarray, channels: int, groups: int) -> np.ndarray:
    """`Workspace.waiting` of a workspace."""
    first = channels * (16 + VECTORS * workspace.itemsize) + 8
    return workspace.view(np.uint8)[first : first + 8 * groups].view(np.int64)


def workspace_at(address, fixed):
    """The workspace at an address."""
    channels = fixed.channels
    vectors = address + 16 * channels
    words = vectors + VECTORS * ITEMSIZE * channels
    return Workspace(
        at_address(np.float64, address, 0, 2 * channels),
        at_address(DTYPE, vectors, 0, 7 * channels),
        at_address(DTYPE, vectors, 7 * channels, channels),
        at_address(DTYPE, vectors, 8 * channels, 2 * channels),
        at_address(np.int64, words, 0, 1),
        at_address(np.int64, words, 1, fixed.groups),
        at_address(np.float64, words, 1 + fixed.groups, 2 * fixed.blocks * channels),
    )


def arrays_at(address):
    """The addresses of the arrays of a pass."""
    return record(ARRAYS, at_address(np.int64, address, 0, N_ARRAYS), 0)


def fixed_at(address):
    """What is fixed for a shape."""
    return record(Fixed, at_address(np.int64, address, 0, N_FIXED), 0)


def tile_at(fixed, t):
    """Line t of `Plan.tiles`."""
    return record(Tile, at_address(np.int64, fixed.tiles, t * N_TILE, N_TILE), 0)


def whole(address, fixed):
    """An array like x."""
    return at_address(DTYPE, address, 0, fixed.size)


def channelwise(address, first, channels):
    """A part of an array of one number per channel."""
    return at_address(DTYPE, address, first, channels)


def count_of(fixed, block):
    """The number of values per channel in a block."""
    return at_address(np.float64, fixed.counts, block, 1)[0]


# --- before and after -------------------------------------------------------------------------------------------------


def overlap(a, a_size, b, b_size):
    """Whether arrays of these addresses and sizes share memory; 0 is the address of None."""
    return (a != 0) & (b != 0) & (a_size > 0) & (b_size > 0) & (a < b + b_size * ITEMSIZE) & (b < a + a_size * ITEMSIZE)


def begin_forward(arrays_address, fixed_address):
    """Compare the arrays, and the running statistics where they are read; see `REFUSED`."""
    arrays = ARRAYS_AT(arrays_address)
    fixed = FIXED_AT(fixed_address)
    size = fixed.size
    channels = fixed.channels
    workspace = WORKSPACE_AT(arrays.workspace, fixed)
    for k in range(fixed.groups):
        workspace.waiting[k] = 0
    workspace.unrecordable[0] = 0
    over = -1
    if OVERLAP(arrays.y, size, arrays.x, size):
        if TRAINING or arrays.y != arrays.x:
            return REFUSED
        over = 0
    if OVERLAP(arrays.y, size, arrays.residual, size):
        if arrays.y != arrays.residual:
            return REFUSED
        over = 1
    mean, var = arrays.running_mean, arrays.running_var
    for vector in (arrays.gamma, arrays.beta, mean, var):
        if OVERLAP(arrays.y, size, vector, channels):
            return REFUSED
    if TRAINING:
        clash = OVERLAP(mean, channels, var, channels)
        for vector in (arrays.gamma, arrays.beta):
            clash |= OVERLAP(mean, channels, vector, channels) | OVERLAP(var, channels, vector, channels)
        if clash:
            return REFUSED
    else:
        means = CHANNELWISE(mean, 0, channels)
        variances = CHANNELWISE(var, 0, channels)
        for c in range(channels):
            if not ((means[c] - means[c] == ZERO) & (variances[c] - variances[c] == ZERO) & (variances[c] >= ZERO)):
                return REFUSED
    return over


def begin_backward(arrays_address, fixed_address):
    """Compare the arrays; see `REFUSED`."""
    arrays = ARRAYS_AT(arrays_address)
    fixed = FIXED_AT(fixed_address)
    size = fixed.size
    channels = fixed.channels
    over = -1
    for number, array in enumerate((arrays.x, arrays.dy, arrays.y)):
        if OVERLAP(arrays.dx, size, array, size):
            if arrays.dx != array:
                return REFUSED
            over = number
    clash = OVERLAP(arrays.dgamma, channels, arrays.dbeta, channels)
    for array in (arrays.x, arrays.dy, arrays.y, arrays.dx):
        clash |= OVERLAP(arrays.dgamma, channels, array, size) | OVERLAP(arrays.dbeta, channels, array, size)
    return REFUSED if clash else over


def finish_forward(arrays_address, fixed_address):
    """Record the batch; return the number of groups that wait for sums in float64, or -1 for an unrecordable batch."""
    arrays = ARRAYS_AT(arrays_address)
    fixed = FIXED_AT(fixed_address)
    workspace = WORKSPACE_AT(arrays.workspace, fixed)
    count = WAITING(fixed, workspace)
    if count > 0:
        return count
    if workspace.unrecordable[0] != 0:
        return -1
    if arrays.running_mean != 0:
        channels = fixed.channels
        mean = CHANNELWISE(arrays.running_mean, 0, channels)
        var = CHANNELWISE(arrays.running_var, 0, channels)
        for c in range(channels):
            mean[c] = workspace.new_running[c]
            var[c] = workspace.new_running[channels + c]
    return 0


# --- tiles ------------------------------------------------------------------------------------------------------------


def forward_sum_tile(arrays, fixed, workspace, t):
    """Leave the moments of each channel of tile t in `partials`; return False where that needs sums in float64."""
    tile = TILE_AT(fixed, t)
    share = 1.0 / ((tile.rows * tile.width + tile.rest) // tile.channels)
    x = WHOLE(arrays.x, fixed)
    centers = np.empty(tile.channels, DTYPE)
    apart = tile.rows // 4 * tile.stride if tile.rows >= 4 else tile.spatial // 4
    size = tile.channels * tile.spatial
    x0 = window(x, tile.start, size)
    x1 = window(x, tile.start + apart, size)
    x2 = window(x, tile.start + 2 * apart, size)
    x3 = window(x, tile.start + 3 * apart, size)
    if tile.spatial == 1:  # a loop of its own, which can be vectorised
        for c in range(size):
            centers[c] = NEAR(np.float64(x0[c]), np.float64(x1[c]), np.float64(x2[c]), np.float64(x3[c]))
    else:
        for c in range(tile.channels):
            k = c * tile.spatial
            centers[c] = NEAR(np.float64(x0[k]), np.float64(x1[k]), np.float64(x2[k]), np.float64(x3[k]))
    s = np.empty(tile.channels)
    q = np.empty(tile.channels)
    arguments = ((x,), tile, centers, tile.channels, np.int64(0), s, q)
    invoke(fixed.sum_loop, arguments)
    if GUARDED:
        exact = 0
        for c in range(tile.channels):
            exact += SUMS_ARE_EXACT(s[c], q[c], share, LARGEST)
        if exact < tile.channels:
            if fixed.wide_sum_loop == 0:
                workspace.waiting[t % fixed.groups] = 1
                return False
            invoke(fixed.wide_sum_loop, arguments)
    block = t // fixed.groups
    means = window(workspace.partials, block * fixed.channels + tile.channel, tile.channels)
    squares = window(workspace.partials, (fixed.blocks + block) * fixed.channels + tile.channel, tile.channels)
    for c in range(tile.channels):
        means[c], squares[c] = MOMENTS(s[c], q[c], share, centers[c])
    return True


def backward_sum_tile(arrays, fixed, workspace, t):
    """Leave the sums of the gradients of each channel of tile t in `partials`; return True."""
    tile = TILE_AT(fixed, t)
    block = t // fixed.groups
    s = window(workspace.partials, block * fixed.channels + tile.channel, tile.channels)
    q = window(workspace.partials, (fixed.blocks + block) * fixed.channels + tile.channel, tile.channels)
    read = (WHOLE(arrays.x, fixed), WHOLE(arrays.dy, fixed), WHOLE(arrays.y if arrays.y != 0 else arrays.x, fixed))
    invoke(fixed.sum_loop, (read, tile, workspace.coefficients, fixed.channels, tile.channel, s, q))
    return True


def forward_map_tile(arrays, fixed, workspace, map_loop, t):
    """Map tile t to y."""
    read = (WHOLE(arrays.x, fixed), WHOLE(arrays.residual if arrays.residual != 0 else arrays.x, fixed))
    written = (WHOLE(arrays.y, fixed),)
    invoke(map_loop, (read, written, TILE_AT(fixed, t), workspace.coefficients, fixed.channels))


def backward_map_tile(arrays, fixed, workspace, map_loop, t):
    """Map tile t to dx."""
    read = (WHOLE(arrays.x, fixed), WHOLE(arrays.dy, fixed), WHOLE(arrays.y if arrays.y != 0 else arrays.x, fixed))
    written = (
        WHOLE(arrays.dx, fixed),
        WHOLE(arrays.dresidual if arrays.dresidual != 0 else arrays.dx, fixed),
    )
    invoke(map_loop, (read, written, TILE_AT(fixed, t), workspace.coefficients, fixed.channels))


# The merges go over the channels in their inner loops, with few arrays in each, so that these are vectorised.


def merge_statistics(arrays, fixed, workspace, eps, momentum, first, channels):
    """Merge the blocks in index order; leave statistics and coefficients of `channels` channels from `first` on."""
    blocks, pitch = fixed.blocks, fixed.channels
    means = window(workspace.stats, first, channels)
    inv_stds = window(workspace.stats, pitch + first, channels)
    gamma = window(workspace.gamma, first, channels)
    beta = np.empty(channels, DTYPE)
    if arrays.gamma != 0:
        given = CHANNELWISE(arrays.gamma, first, channels)
        for c in range(channels):
            gamma[c] = given[c]
    else:
        for c in range(channels):
            gamma[c] = ONE
    if arrays.beta != 0:
        given = CHANNELWISE(arrays.beta, first, channels)
        for c in range(channels):
            beta[c] = given[c]
    else:
        for c in range(channels):
            beta[c] = ZERO
    running_mean = CHANNELWISE(arrays.running_mean, first, channels)
    running_var = CHANNELWISE(arrays.running_var, first, channels)
    if TRAINING:
        # Two passes over the blocks, about the first one's mean: no sum cancels, and blocks that agree merge to
        # exactly what they agree on.
        total = 0.0
        for b in range(blocks):
            total += COUNT_OF(fixed, b)
        origin = window(workspace.partials, first, channels)
        squares = np.empty(channels)
        for c in range(channels):
            means[c] = 0.0
            squares[c] = 0.0
        for b in range(1, blocks):
            count = COUNT_OF(fixed, b)
            block_means = window(workspace.partials, b * pitch + first, channels)
            for c in range(channels):
                means[c] += count * (block_means[c] - origin[c])
        for c in range(channels):
            means[c] = origin[c] + means[c] / total
        for b in range(blocks):
            count = COUNT_OF(fixed, b)
            block_means = window(workspace.partials, b * pitch + first, channels)
            block_squares = window(workspace.partials, (blocks + b) * pitch + first, channels)
            for c in range(channels):
                squares[c] += SQUARES_ABOUT(means[c], count, block_means[c], block_squares[c])
        recordable = 0
        for c in range(channels):
            recordable += IS_RECORDABLE(means[c], squares[c])
        if recordable < channels:
            workspace.unrecordable[0] = 1
        if arrays.running_mean != 0:
            new_mean = window(workspace.new_running, first, channels)
            new_var = window(workspace.new_running, pitch + first, channels)
            for c in range(channels):
                new_mean[c] = BLEND(np.float64(running_mean[c]), means[c], momentum, LARGEST)
            for c in range(channels):
                unbiased = UNBIASED_VARIANCE(squares[c], total)
                new_var[c] = BLEND(np.float64(running_var[c]), unbiased, momentum, LARGEST)
        for c in range(channels):
            inv_stds[c] = INVERSE_STD(VARIANCE(squares[c], total), eps)
        keep(squares)
    else:
        for c in range(channels):
            means[c] = running_mean[c]
            inv_stds[c] = INVERSE_STD(np.float64(running_var[c]), eps)
    centers = window(workspace.coefficients, first, channels)
    scales = window(workspace.coefficients, pitch + first, channels)
    shifts = window(workspace.coefficients, 2 * pitch + first, channels)
    rounded_inv_stds = window(workspace.coefficients, 3 * pitch + first, channels)
    for c in range(channels):
        centers[c] = means[c]
        rounded_inv_stds[c] = inv_stds[c]
    for c in range(channels):
        center = np.float64(centers[c])
        scales[c], shifts[c] = AFFINE_COEFFICIENTS(means[c], center, inv_stds[c], gamma[c], beta[c])
    keep(beta)


def merge_gradients(arrays, fixed, workspace, eps, momentum, first, channels):
    """Merge the blocks in index order; leave dgamma, dbeta and the coefficients of dx of `channels` channels."""
    blocks, pitch = fixed.blocks, fixed.channels
    sums_g = np.empty(channels)
    sums_g_xhat = np.empty(channels)
    for c in range(channels):
        sums_g[c] = 0.0
        sums_g_xhat[c] = 0.0
    total = 0.0
    for b in range(blocks):
        total += COUNT_OF(fixed, b)
        s = window(workspace.partials, b * pitch + first, channels)
        q = window(workspace.partials, (blocks + b) * pitch + first, channels)
        for c in range(channels):
            sums_g[c] += s[c]
            sums_g_xhat[c] += q[c]
    gamma = window(workspace.gamma, first, channels)
    dgamma = CHANNELWISE(arrays.dgamma, first, channels)
    dbeta = CHANNELWISE(arrays.dbeta, first, channels)
    means = window(workspace.stats, first, channels)
    inv_stds = window(workspace.stats, pitch + first, channels)
    centers = window(workspace.coefficients, first, channels)
    dy_scales = window(workspace.coefficients, 4 * pitch + first, channels)
    xhat_scales = window(workspace.coefficients, 5 * pitch + first, channels)
    offsets = window(workspace.coefficients, 6 * pitch + first, channels)
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
    keep(sums_g)
    keep(sums_g_xhat)


def waiting(fixed, workspace):
    """How many groups wait for sums in float64."""
    count = 0
    if GUARDED and SUMMED:
        for k in range(fixed.groups):
            count += workspace.waiting[k]
    return count


# --- the loops --------------------------------------------------------------------------------------------------------
# Their arguments are those of `LOOP`.


def sum_tiles(arrays_address, fixed_address, map_loop, eps, momentum, first, last):
    """Sum tiles [first, last)."""
    arrays = ARRAYS_AT(arrays_address)
    fixed = FIXED_AT(fixed_address)
    workspace = WORKSPACE_AT(arrays.workspace, fixed)
    for t in range(first, last):
        SUM_TILE(arrays, fixed, workspace, t)


def merge_channels(arrays_address, fixed_address, map_loop, eps, momentum, first, last):
    """Merge the sums of channels [first, last), unless some are missing."""
    arrays = ARRAYS_AT(arrays_address)
    fixed = FIXED_AT(fixed_address)
    workspace = WORKSPACE_AT(arrays.workspace, fixed)
    if not WAITING(fixed, workspace):
        MERGE(arrays, fixed, workspace, eps, momentum, first, last - first)


def map_tiles(arrays_address, fixed_address, map_loop, eps, momentum, first, last):
    """Map tiles [last, first), the last one first: read last, it is the likeliest to be in a cache."""
    arrays = ARRAYS_AT(arrays_address)
    fixed = FIXED_AT(fixed_address)
    workspace = WORKSPACE_AT(arrays.workspace, fixed)
    if not WAITING(fixed, workspace):
        for t in range(first - 1, last - 1, -1):
            MAP_TILE(arrays, fixed, workspace, map_loop, t)


def each_group(arrays_address, fixed_address, map_loop, eps, momentum, first, last):
    """Sum, merge and map each of the groups [first, last), while it is in a cache."""
    arrays = ARRAYS_AT(arrays_address)
    fixed = FIXED_AT(fixed_address)
    workspace = WORKSPACE_AT(arrays.workspace, fixed)
    tiles, groups = fixed.tile_count, fixed.groups
    for group in range(first, last):
        complete = True
        if SUMMED:
            for t in range(group, tiles, groups):
                complete &= SUM_TILE(arrays, fixed, workspace, t)
        if complete:
            tile = TILE_AT(fixed, group)
            MERGE(arrays, fixed, workspace, eps, momentum, tile.channel, tile.channels)
            for t in range(tiles - groups + group, -1, -groups):
                MAP_TILE(arrays, fixed, workspace, map_loop, t)


LOOP = (types.int64, types.int64, types.int64, types.float64, types.float64)
"""The types of the arguments of the loops: the address of the addresses of the arrays, that of `Fixed`, that of the map
of a tile; eps, and the weight of the batch in the running statistics."""

ENDS = (types.int64, types.int64)
"""The same of what runs before and after."""


# --- from the functions above to compiled loops -----------------------------------------------------------------------


class OuterLoops:
    """The loops around the loops over a tile, of one direction, for all flags; each compiled when it is first used."""

    def __init__(self, formulas: ModuleType, dtype: np.dtype[Any], *, backward: bool, training: bool):
        kind = BackwardArrays if backward else ForwardArrays
        memory = {"DTYPE": dtype.type, "ITEMSIZE": dtype.itemsize, "ZERO": dtype.type(0), "ONE": dtype.type(1)}
        tile = part(tile_at, {"N_TILE": len(Tile._fields)})
        vector = part(channelwise, memory)
        constants = {
            **{name.upper(): getattr(formulas, name) for name in FORMULAS},
            **memory,
            "LARGEST": float(np.finfo(dtype).max),
            "TRAINING": training,
            "GUARDED": dtype.itemsize < 8,  # where the data is float64 there is nothing wider to go to
            "TILE_AT": tile,
            "WHOLE": part(whole, memory),
            "CHANNELWISE": vector,
            "COUNT_OF": part(count_of, {}),
        }
        self.backward, self.training = backward, training
        self._name = f"{'training' if training else 'inference'}_{dtype.name}"
        self._way = "backward" if backward else "forward"
        self._constants = {
            **memory,
            "ARRAYS_AT": part(arrays_at, {"ARRAYS": kind, "N_ARRAYS": len(kind._fields)}),
            "FIXED_AT": part(fixed_at, {"N_FIXED": len(Fixed._fields)}),
            "WORKSPACE_AT": part(workspace_at, memory),
            "CHANNELWISE": vector,
            "TILE_AT": tile,
            "OVERLAP": part(overlap, memory),
            "WAITING": part(waiting, {"GUARDED": dtype.itemsize < 8, "SUMMED": training and not backward}),
            "TRAINING": training,
            "SUMMED": backward or training,
            "SUM_TILE": part(backward_sum_tile if backward else forward_sum_tile, constants),
            "MERGE": part(merge_gradients if backward else merge_statistics, constants),
            "MAP_TILE": part(backward_map_tile if backward else forward_map_tile, constants),
        }
        self._loops: dict[Any, Loop] = {}
        self.begin = self._end(begin_backward if backward else begin_forward)
        self.finish = self._end(finish_forward) if training and not backward else None

    def _end(self, function: Any) -> Any:
        """What runs before or after, compiled."""
        constants = {name: self._constants[name] for name in OF_ENDS}
        bound = bind(function, constants, label=f"batchnorm_{function.__name__}_{self._name}", scalar=inlined)
        return compile_loop(bound, ENDS).entry

    def __call__(self, function: Any) -> Loop:
        """One of `sum_tiles`, `merge_channels`, `map_tiles` and `each_group`, compiled."""
        loop = self._loops.get(function)
        if loop is None:
            with COMPILING:
                loop = self._loops.get(function)
                if loop is None:
                    label = f"batchnorm_{function.__name__}_{self._way}_{self._name}"
                    loop = self._loops[function] = Loop(function, self._constants, LOOP, label=label)
        return loop


OF_ENDS = (
    *("ARRAYS_AT", "FIXED_AT", "WORKSPACE_AT", "CHANNELWISE", "OVERLAP", "WAITING"),
    *("DTYPE", "ITEMSIZE", "ZERO", "TRAINING"),
)
"""The constants of what runs before and after the loops."""

FORMULAS = (
    "affine_coefficients",
    "blend",
    "gamma_gradient",
    "gradient_coefficients",
    "inverse_std",
    "is_recordable",
    "moments",
    "near",
    "rounding",
    "squares_about",
    "sums_are_exact",
    "unbiased_variance",
    "variance",
)
"""The functions of a channel."""
