"""BatchNorm on the CPU: the launches. The three files beside this one cut an array and hold the loops.

A pass sums every tile, merges the sums of the blocks, and maps every tile to y or dx: each phase over all tiles, in the
order of memory. Where the groups fit into L2, all three run on one group, and then on the next.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from fastopt.kernels.contract import Array
from fastopt.kernels.cpu.batchnorm_loops import (
    Backward,
    Forward,
    OuterLoops,
    each_group,
    map_tiles,
    merge_channels,
    sum_tiles,
)
from fastopt.kernels.cpu.batchnorm_tile_loops import TileLoops
from fastopt.kernels.cpu.batchnorm_tiles import Plan, plan
from fastopt.kernels.driver import SERIAL_BELOW
from fastopt.kernels.threads import COMPILING, get_num_threads

GROUP_SIZE = 65_536
"""Most elements of a group for all of it to be summed, merged and mapped by one launch: with what is written it fits
L2."""

ACROSS_BELOW = 2**23
"""Bytes of x below which large maps, also, are cut into tiles that go over many samples, so that several samples of a
channel are summed together. Larger arrays do not fit the cache and are better read in the order of memory; so is the
backward pass."""


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
        self._passes: dict[tuple[bool, bool], _Pass] = {}

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
        weight: float | None,
        over: int,
        count: Array | None = None,
    ) -> tuple[Array, Array]:
        """Write y to `out` and, in training, record the batch; return what `backward` needs.

        To record a batch is to move the running statistics and to add 1 to `count`. A batch with a NaN or an infinity
        is not recorded, in any channel.

        x, residual, out : 1-D, (samples, channels, spatial) in memory.
        channelwise : (gamma, beta, running_mean, running_var), any of them None.
        weight : of the new batch in the running statistics; None for 1 / (count + 1), the average of all batches.
        count : an array of one number: how many batches were recorded.
        over : 0 or 1 where `out` is x or residual, -1 where it is neither.
        """
        channels = shape[1]
        gamma, beta, running_mean, running_var = channelwise
        cut = _plan(shape, across=training and x.nbytes < ACROSS_BELOW)
        one = self._pass(backward=False, training=training)
        if weight is None:
            weight = 0.0 if count is None else 1.0 / (float(count[0]) + 1.0)
        work = Forward(  # by position: 20 keywords take 0.7 us more
            x,
            x if residual is None else residual,
            out,
            cut.tiles,
            cut.counts,
            np.zeros((2, cut.counts.size if training else 0, channels)),
            np.empty((len(self._formulas.GradientMap._fields), channels), self._dtype),
            np.empty((2, channels)),
            self._filled(channels, 1.0) if gamma is None else gamma,
            self._filled(channels, 0.0) if beta is None else beta,
            self._filled(channels, 0.0) if running_mean is None else running_mean,
            self._filled(channels, 0.0) if running_var is None else running_var,
            np.empty((2, channels), self._dtype),
            np.zeros(1, np.bool_),
            eps,
            weight,
            one.sum_loop(),
            one.wide_sum_loop,
            one.map_loop(over),
            np.zeros(cut.groups, np.bool_),
        )
        by_group = _by_group(x.size, cut)  # asked once: the number of threads may change meanwhile
        one.run(work, cut, by_group)
        if np.count_nonzero(work.needs_wide):  # rare: of these channels only sums have been written yet
            one.run_with_wide_sums(work, cut, by_group)
        # Only now is it known whether any channel forbids it.
        if training and running_mean is not None and running_var is not None and not work.unrecordable[0]:
            running_mean[...], running_var[...] = work.new_running
            if count is not None:
                count += 1
        return work.coefficients, work.stats

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
        channels = shape[1]
        coefficients, stats = saved
        gamma, dgamma, dbeta = channelwise
        dx, dresidual = outputs
        cut = _plan(shape)
        one = self._pass(backward=True, training=training)
        work = Backward(
            x,
            dy,
            x if y is None else y,
            dx,
            dx if dresidual is None else dresidual,
            cut.tiles,
            cut.counts,
            np.zeros((2, cut.counts.size, channels)),
            coefficients,
            stats,
            self._filled(channels, 1.0) if gamma is None else gamma,
            dgamma,
            dbeta,
            one.sum_loop(),
            one.map_loop(over),
        )
        one.run(work, cut, _by_group(x.size, cut))

    def _filled(self, channels: int, value: float) -> Array:
        return np.full(channels, value, self._dtype)

    def _pass(self, *, backward: bool, training: bool) -> _Pass:
        key = (backward, training)
        found = self._passes.get(key)
        if found is None:
            with COMPILING:
                of_all_flags = (self._dtype, backward, training)
                if of_all_flags not in self._shared:
                    outer = OuterLoops(self._formulas, self._dtype, backward=backward, training=training)
                    self._shared[of_all_flags] = outer
                loops = TileLoops(self._formulas, self._dtype, self._flags, self._shared, backward=backward)
                found = _Pass(self._shared[of_all_flags], loops, summed=backward or training)
                self._passes[key] = found
        return found


class _Pass:
    """The loops of one direction, each compiled when it is first used, and how they are launched."""

    def __init__(self, outer: OuterLoops, loops: TileLoops, *, summed: bool):
        self._outer = outer
        self._loops = loops
        self._summed = summed
        self._sum_loop = 0
        self.wide_sum_loop = 0
        """The address of the sums in float64; 0 before they have been needed."""
        self._map_loops: dict[int, int] = {}

    def sum_loop(self) -> int:
        """The address of the sums of a tile; 0 where there are none."""
        if self._summed and self._sum_loop == 0:
            with COMPILING:
                self._sum_loop = self._loops.sums()
        return self._sum_loop

    def map_loop(self, over: int) -> int:
        """The address of the map of a tile."""
        address = self._map_loops.get(over)
        if address is None:
            with COMPILING:
                address = self._map_loops[over] = self._loops.map(over)
        return address

    def run(self, work: Any, cut: Plan, by_group: bool) -> None:
        """Run the phases over the whole array, or until a group needs sums in float64."""
        outer, size = self._outer, work.x.size
        tiles, channels = cut.tiles.shape[0], work.gamma.size
        if size == 0:
            outer(merge_channels).serial(work, 0, channels)
        elif by_group:
            outer(each_group).run(work, elements=size, units=cut.groups)
        else:
            if self._summed:
                outer(sum_tiles).run(work, elements=size, units=tiles)
                if isinstance(work, Forward) and np.count_nonzero(work.needs_wide):
                    return
            outer(merge_channels).serial(work, 0, channels)
            outer(map_tiles).run(work, elements=size, units=tiles, backwards=True)

    def run_with_wide_sums(self, work: Forward, cut: Plan, by_group: bool) -> None:
        """Run what `run` has left out, with sums in float64 where they are needed."""
        with COMPILING:
            self.wide_sum_loop = self._loops.sums(wide=True)
        work = work._replace(wide_sum_loop=self.wide_sum_loop)
        waiting = np.flatnonzero(work.needs_wide)
        work.needs_wide[:] = False
        if by_group:
            for group in waiting:
                self._outer(each_group).serial(work, group, group + 1)
        else:
            self.run(work, cut, by_group)


def _plan(shape: tuple[int, int, int], *, across: bool = False) -> Plan:
    """Cut an array. An empty one has coefficients and gradients as well: those of one block whose sums are 0."""
    samples, channels, spatial = shape
    return plan(max(1, samples), channels, max(1, spatial), across=across)


def _by_group(size: int, cut: Plan) -> bool:
    """Whether one group after the other is summed, merged and mapped; else each phase runs on all tiles."""
    return size < SERIAL_BELOW or (size <= GROUP_SIZE * cut.groups and cut.groups >= 2 * get_num_threads())
