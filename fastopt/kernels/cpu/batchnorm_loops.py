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
from fastopt.kernels.intrinsics import address, at_address, invoke, keep, pointer, record, window
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
COEFFICIENTS: Any
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
    """The addresses of the parts of a workspace, which a forward pass leaves for its backward pass.

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


def partials_of(workspace: np.ndarray, channels: int, blocks: int, groups: int) -> np.ndarray:
    """`Workspace.partials` of a workspace, of shape (2, blocks, channels)."""
    first = channels * (16 + VECTORS * workspace.itemsize) + 8 * (1 + groups)
    size = 8 * 2 * blocks * channels
    return workspace.view(np.uint8)[first : first + size].view(np.float64).reshape(2, blocks, channels)


def workspace_at(where, fixed):
    """The addresses of the parts of the workspace at an address."""
    channels = fixed.channels
    vectors = where + 16 * channels
    words = vectors + VECTORS * ITEMSIZE * channels
    return Workspace(
        where,
        vectors,
        vectors + 7 * ITEMSIZE * channels,
        vectors + 8 * ITEMSIZE * channels,
        words,
        words + 8,
        words + 8 + 8 * fixed.groups,
    )


def arrays_at(where):
    """The addresses of the arrays of a pass."""
    return record(ARRAYS, at_address(np.int64, where, 0, N_ARRAYS), 0)


def fixed_at(where):
    """What is fixed for a shape."""
    return record(Fixed, at_address(np.int64, where, 0, N_FIXED), 0)


def tile_at(fixed, t):
    """Line t of `Plan.tiles`."""
    return record(Tile, at_address(np.int64, fixed.tiles, t * N_TILE, N_TILE), 0)


def whole(where, fixed):
    """An array like x."""
    return at_address(DTYPE, where, 0, fixed.size)


def coefficients_of(workspace, fixed):
    """The coefficients of a workspace."""
    return at_address(DTYPE, workspace.coefficients, 0, 7 * fixed.channels)


def count_of(fixed, block):
    """The number of values per channel in a block."""
    return pointer(np.float64, fixed.counts, block)[0]


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
    words = pointer(np.int64, workspace.unrecordable, 0)
    for k in range(1 + fixed.groups):
        words[k] = 0
    over = -1
    if OVERLAP(arrays.y, size, arrays.x, size):
        if TRAINING or arrays.y != arrays.x:
            return REFUSED
        over = 0
    if OVERLAP(arrays.y, size, arrays.residual, size):
        if arrays.y != arrays.residual:
            return REFUSED
        over = 1 if over < 0 else over
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
        means = pointer(DTYPE, mean, 0)
        variances = pointer(DTYPE, var, 0)
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
    if pointer(np.int64, workspace.unrecordable, 0)[0] != 0:
        return -1
    if arrays.running_mean != 0:
        channels = fixed.channels
        mean = pointer(DTYPE, arrays.running_mean, 0)
        var = pointer(DTYPE, arrays.running_var, 0)
        new_mean = pointer(DTYPE, workspace.new_running, 0)
        new_var = pointer(DTYPE, workspace.new_running, channels)
        for c in range(channels):
            mean[c] = new_mean[c]
            var[c] = new_var[c]
    return 0


# --- tiles ------------------------------------------------------------------------------------------------------------


def forward_sum_tile(arrays, fixed, workspace, t):
    """Leave the moments of each channel of tile t in `partials`; return False where that needs sums in float64."""
    tile = TILE_AT(fixed, t)
    share = 1.0 / ((tile.rows * tile.width + tile.rest) // tile.channels)
    x = WHOLE(arrays.x, fixed)
    centers = np.empty(tile.channels, DTYPE)
    sums = np.empty(2 * tile.channels)
    s = window(sums, 0, tile.channels)
    q = window(sums, tile.channels, tile.channels)
    step = tile.rows // 4 * tile.stride if tile.rows >= 4 else tile.spatial // 4
    center = pointer(DTYPE, address(centers), 0)
    x0 = pointer(DTYPE, arrays.x, tile.start)
    x1 = pointer(DTYPE, arrays.x, tile.start + step)
    x2 = pointer(DTYPE, arrays.x, tile.start + 2 * step)
    x3 = pointer(DTYPE, arrays.x, tile.start + 3 * step)
    if tile.spatial == 1:  # a loop of its own, which can be vectorised
        for c in range(tile.channels):
            center[c] = NEAR(np.float64(x0[c]), np.float64(x1[c]), np.float64(x2[c]), np.float64(x3[c]))
    else:
        for c in range(tile.channels):
            k = c * tile.spatial
            center[c] = NEAR(np.float64(x0[k]), np.float64(x1[k]), np.float64(x2[k]), np.float64(x3[k]))
    arguments = ((x,), tile, centers, tile.channels, np.int64(0), s, q)
    invoke(fixed.sum_loop, arguments)
    s_of = pointer(np.float64, address(sums), 0)
    q_of = pointer(np.float64, address(sums), tile.channels)
    if GUARDED:
        exact = 0
        for c in range(tile.channels):
            exact += SUMS_ARE_EXACT(s_of[c], q_of[c], share, LARGEST)
        if exact < tile.channels:
            if fixed.wide_sum_loop == 0:
                pointer(np.int64, workspace.waiting, t % fixed.groups)[0] = 1
                return False
            invoke(fixed.wide_sum_loop, arguments)
    block = t // fixed.groups
    means = pointer(np.float64, workspace.partials, block * fixed.channels + tile.channel)
    squares = pointer(np.float64, workspace.partials, (fixed.blocks + block) * fixed.channels + tile.channel)
    for c in range(tile.channels):
        means[c], squares[c] = MOMENTS(s_of[c], q_of[c], share, center[c])
    keep(centers)
    keep(sums)
    return True


def backward_sum_tile(arrays, fixed, workspace, t):
    """Leave the sums of the gradients of each channel of tile t in `partials`; return True."""
    tile = TILE_AT(fixed, t)
    block = t // fixed.groups
    first = block * fixed.channels + tile.channel
    s = at_address(np.float64, workspace.partials, first, tile.channels)
    q = at_address(np.float64, workspace.partials, first + fixed.blocks * fixed.channels, tile.channels)
    read = (WHOLE(arrays.x, fixed), WHOLE(arrays.dy, fixed), WHOLE(arrays.y if arrays.y != 0 else arrays.x, fixed))
    invoke(fixed.sum_loop, (read, tile, COEFFICIENTS(workspace, fixed), fixed.channels, tile.channel, s, q))
    return True


def forward_map_tile(arrays, fixed, workspace, map_loop, t):
    """Map tile t to y."""
    read = (WHOLE(arrays.x, fixed), WHOLE(arrays.residual if arrays.residual != 0 else arrays.x, fixed))
    written = (WHOLE(arrays.y, fixed),)
    invoke(map_loop, (read, written, TILE_AT(fixed, t), COEFFICIENTS(workspace, fixed), fixed.channels))


def backward_map_tile(arrays, fixed, workspace, map_loop, t):
    """Map tile t to dx."""
    read = (WHOLE(arrays.x, fixed), WHOLE(arrays.dy, fixed), WHOLE(arrays.y if arrays.y != 0 else arrays.x, fixed))
    written = (
        WHOLE(arrays.dx, fixed),
        WHOLE(arrays.dresidual if arrays.dresidual != 0 else arrays.dx, fixed),
    )
    invoke(map_loop, (read, written, TILE_AT(fixed, t), COEFFICIENTS(workspace, fixed), fixed.channels))


# The merges go over the channels in their inner loops, with few arrays in each, so that these are vectorised.


def merge_statistics(arrays, fixed, workspace, eps, momentum, first, channels):
    """Merge the blocks in index order; leave statistics and coefficients of `channels` channels from `first` on."""
    blocks, pitch = fixed.blocks, fixed.channels
    means = pointer(np.float64, workspace.stats, first)
    inv_stds = pointer(np.float64, workspace.stats, pitch + first)
    centers = pointer(DTYPE, workspace.coefficients, first)
    scales = pointer(DTYPE, workspace.coefficients, pitch + first)
    shifts = pointer(DTYPE, workspace.coefficients, 2 * pitch + first)
    rounded_inv_stds = pointer(DTYPE, workspace.coefficients, 3 * pitch + first)
    running_mean = pointer(DTYPE, arrays.running_mean, first)
    running_var = pointer(DTYPE, arrays.running_var, first)
    if TRAINING:
        # Two passes over the blocks, about the first one's mean: no sum cancels, and blocks that agree merge to
        # exactly what they agree on.
        total = 0.0
        for b in range(blocks):
            total += COUNT_OF(fixed, b)
        origin = pointer(np.float64, workspace.partials, first)
        squares = inv_stds  # until these are known
        for c in range(channels):
            means[c] = 0.0
            squares[c] = 0.0
        for b in range(1, blocks):
            count = COUNT_OF(fixed, b)
            block_means = pointer(np.float64, workspace.partials, b * pitch + first)
            for c in range(channels):
                means[c] += count * (block_means[c] - origin[c])
        for c in range(channels):
            means[c] = origin[c] + means[c] / total
        for b in range(blocks):
            count = COUNT_OF(fixed, b)
            block_means = pointer(np.float64, workspace.partials, b * pitch + first)
            block_squares = pointer(np.float64, workspace.partials, (blocks + b) * pitch + first)
            for c in range(channels):
                squares[c] += SQUARES_ABOUT(means[c], count, block_means[c], block_squares[c])
        recordable = 0
        for c in range(channels):
            recordable += IS_RECORDABLE(means[c], squares[c])
        if recordable < channels:
            pointer(np.int64, workspace.unrecordable, 0)[0] = 1
        if arrays.running_mean != 0:
            new_mean = pointer(DTYPE, workspace.new_running, first)
            new_var = pointer(DTYPE, workspace.new_running, pitch + first)
            for c in range(channels):
                new_mean[c] = BLEND(np.float64(running_mean[c]), means[c], momentum, LARGEST)
                unbiased = UNBIASED_VARIANCE(squares[c], total)
                new_var[c] = BLEND(np.float64(running_var[c]), unbiased, momentum, LARGEST)
        for c in range(channels):
            inv_stds[c] = INVERSE_STD(VARIANCE(squares[c], total), eps)
    else:
        for c in range(channels):
            means[c] = running_mean[c]
            inv_stds[c] = INVERSE_STD(np.float64(running_var[c]), eps)
    gamma = pointer(DTYPE, workspace.gamma, first)
    given_gamma = pointer(DTYPE, arrays.gamma if arrays.gamma != 0 else workspace.gamma, first)
    given_beta = pointer(DTYPE, arrays.beta if arrays.beta != 0 else workspace.gamma, first)
    for c in range(channels):
        gamma[c] = given_gamma[c] if arrays.gamma != 0 else ONE
        shifts[c] = given_beta[c] if arrays.beta != 0 else ZERO
    for c in range(channels):
        centers[c] = means[c]
        rounded_inv_stds[c] = inv_stds[c]
    for c in range(channels):
        center = np.float64(centers[c])
        scales[c], shifts[c] = AFFINE_COEFFICIENTS(means[c], center, inv_stds[c], gamma[c], shifts[c])


def merge_gradients(arrays, fixed, workspace, eps, momentum, first, channels):
    """Merge the blocks in index order; leave dgamma, dbeta and the coefficients of dx of `channels` channels."""
    blocks, pitch = fixed.blocks, fixed.channels
    # The sums of all blocks take the place of those of the first one.
    sums_g = pointer(np.float64, workspace.partials, first)
    sums_g_xhat = pointer(np.float64, workspace.partials, blocks * pitch + first)
    total = COUNT_OF(fixed, 0)
    for b in range(1, blocks):
        total += COUNT_OF(fixed, b)
        s = pointer(np.float64, workspace.partials, b * pitch + first)
        q = pointer(np.float64, workspace.partials, (blocks + b) * pitch + first)
        for c in range(channels):
            sums_g[c] += s[c]
            sums_g_xhat[c] += q[c]
    gamma = pointer(DTYPE, workspace.gamma, first)
    dgamma = pointer(DTYPE, arrays.dgamma, first)
    dbeta = pointer(DTYPE, arrays.dbeta, first)
    means = pointer(np.float64, workspace.stats, first)
    inv_stds = pointer(np.float64, workspace.stats, pitch + first)
    centers = pointer(DTYPE, workspace.coefficients, first)
    dy_scales = pointer(DTYPE, workspace.coefficients, 4 * pitch + first)
    xhat_scales = pointer(DTYPE, workspace.coefficients, 5 * pitch + first)
    offsets = pointer(DTYPE, workspace.coefficients, 6 * pitch + first)
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


def waiting(fixed, workspace):
    """How many groups wait for sums in float64."""
    count = 0
    if GUARDED and SUMMED:
        groups = pointer(np.int64, workspace.waiting, 0)
        for k in range(fixed.groups):
            count += groups[k]
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
        constants = {
            **{name.upper(): getattr(formulas, name) for name in FORMULAS},
            **memory,
            "LARGEST": float(np.finfo(dtype).max),
            "TRAINING": training,
            "GUARDED": dtype.itemsize < 8,  # where the data is float64 there is nothing wider to go to
            "TILE_AT": tile,
            "WHOLE": part(whole, memory),
            "COEFFICIENTS": part(coefficients_of, memory),
            "COUNT_OF": part(count_of, {}),
        }
        self.backward, self.training = backward, training
        self.summed = backward or training
        """Whether there are sums at all."""
        self._name = f"{'training' if training else 'inference'}_{dtype.name}"
        self._way = "backward" if backward else "forward"
        self._constants = {
            **memory,
            "ARRAYS_AT": part(arrays_at, {"ARRAYS": kind, "N_ARRAYS": len(kind._fields)}),
            "FIXED_AT": part(fixed_at, {"N_FIXED": len(Fixed._fields)}),
            "WORKSPACE_AT": part(workspace_at, memory),
            "TILE_AT": tile,
            "OVERLAP": part(overlap, memory),
            "WAITING": part(waiting, {"GUARDED": dtype.itemsize < 8, "SUMMED": training and not backward}),
            "TRAINING": training,
            "SUMMED": self.summed,
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
    *("ARRAYS_AT", "FIXED_AT", "WORKSPACE_AT", "OVERLAP", "WAITING"),
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
