"""BatchNorm on the CPU: the passes. The three files beside this one cut an array and hold the loops.

A pass sums every tile, merges the sums of the blocks, and maps every tile to y or dx: each phase over all tiles, in the
order of memory. Where the groups fit into L2, all three run on one group, and then on the next.

What does not depend on the data, and not on where it is, is prepared once per shape. Then a pass is a few calls of
compiled code, which get the addresses of the arrays.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastopt.kernels.contract import REFUSED, Array, SumsOfRanks
from fastopt.kernels.cpu.batchnorm_loops import (
    BackwardArrays,
    Fixed,
    OuterLoops,
    each_group,
    map_tiles,
    merge_channels,
    partials_of,
    stats_of,
    sum_tiles,
    waiting_of,
    workspace_size,
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

MOST_SHAPES = 256
"""Shapes that are remembered for each dtype and set of flags."""


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
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def prepared(self, view: tuple[int, int, int], *, backward: bool, training: bool) -> Prepared:
        """What is prepared for arrays that are (samples, channels, spatial) in memory."""
        key = (*view, backward, training)
        found = self._prepared.get(key)
        if found is None:
            with COMPILING:
                if len(self._prepared) >= MOST_SHAPES:
                    self._prepared.clear()
                found = self._prepared[key] = Prepared(view, self._pass(backward, training), self._dtype)
        return found

    def statistics(self, state: Array, channels: int) -> tuple[Array, Array]:
        """The mean and inv_std of every channel, float64, of what `forward` returned."""
        mean, inv_std = stats_of(state, channels)
        return mean, inv_std

    def forward(
        self,
        view: tuple[int, int, int],
        x: Array,
        residual: Array | None,
        out: Array,
        channelwise: tuple[Array | None, ...],
        *,
        training: bool,
        eps: float,
        weight: float | None,
        count: Array | None = None,
        ranks: SumsOfRanks | None = None,
    ) -> Array:
        """Write y to `out` and, in training, record the batch; return what `backward` needs.

        To record a batch is to move the running statistics and to add 1 to `count`. A batch with a NaN or an infinity
        is not recorded, in any channel.

        x, residual, out : of one shape, contiguous, (samples, channels, spatial) in memory.
        channelwise : (gamma, beta, running_mean, running_var), any of them None.
        weight : of the new batch in the running statistics; None for 1 / (count + 1), the average of all batches.
        count : an array of one number: how many batches were recorded.
        ranks : in training, adds up the sums of all ranks, each of which has a part of the batch.
        """
        prepared = self.prepared(view, backward=False, training=training)
        state = prepared.workspace()
        addresses = _addresses_of(x, residual, out, *channelwise, state)
        found = prepared.forward(addresses.ctypes.data, state, eps, weight, count, ranks)
        assert found != REFUSED  # the caller has checked the arrays
        return state

    def backward(
        self,
        view: tuple[int, int, int],
        x: Array,
        dy: Array,
        y: Array | None,
        outputs: tuple[Array, Array | None],
        channelwise: tuple[Array, Array],
        state: Array,
        *,
        training: bool,
        ranks: SumsOfRanks | None = None,
    ) -> None:
        """Write dx, dgamma, dbeta and, where `outputs` has room for it, the residual's gradient.

        channelwise : (dgamma, dbeta).
        state : what `forward` returned; it is written to.
        ranks : as in `forward`; dgamma and dbeta are the sums of this rank's part all the same.
        """
        prepared = self.prepared(view, backward=True, training=training)
        addresses = _addresses_of(x, dy, y, *outputs, *channelwise, state)
        if ranks is None:
            done = prepared.backward(addresses.ctypes.data)
        else:
            done = prepared.backward_with(ranks, addresses, state)
        assert done  # as in `forward`

    def _pass(self, backward: bool, training: bool) -> _Pass:
        key = (backward, training)
        found = self._passes.get(key)
        if found is None:
            of_all_flags = (self._dtype, backward, training)
            if of_all_flags not in self._shared:
                outer = OuterLoops(self._formulas, self._dtype, backward=backward, training=training)
                self._shared[of_all_flags] = outer
            loops = TileLoops(self._formulas, self._dtype, self._flags, self._shared, backward=backward)
            found = self._passes[key] = _Pass(self._shared[of_all_flags], loops)
        return found


class _Pass(NamedTuple):
    """The loops of one direction, in training or not."""

    outer: OuterLoops
    loops: TileLoops


class Prepared:
    """A pass over arrays of one shape, forward or backward, with or without training."""

    def __init__(self, view: tuple[int, int, int], one: _Pass, dtype: np.dtype[Any]):
        outer = one.outer
        self._one = one
        self._dtype = dtype
        self._spatial = max(1, view[2])
        self._channels = view[1]
        self._size = view[0] * view[1] * view[2]
        plans = _plan(view, across=outer.training and self._size * dtype.itemsize < ACROSS_BELOW), _plan(view)
        self._cut = cut = plans[outer.backward]
        self._tiles = cut.tiles.shape[0]
        sizes = [workspace_size(self._channels, each.counts.size, each.groups, dtype.itemsize) for each in plans]
        self._items = -(-max(sizes) // dtype.itemsize)
        self._begin, self._finish = outer.begin, outer.finish
        self._fixed = np.array(
            Fixed(
                tiles=cut.tiles.ctypes.data,
                counts=cut.counts.ctypes.data,
                tile_count=self._tiles,
                blocks=cut.counts.size,
                groups=cut.groups,
                channels=self._channels,
                size=self._size,
                sum_loop=one.loops.sums(self._spatial) if outer.summed else 0,
                wide_sum_loop=0,
            ),
            np.int64,
        )
        self._fixed_address = self._fixed.ctypes.data
        self._map_loops: dict[int, int] = {}
        alone = self._size > 0 and (self._size < SERIAL_BELOW or self._tiles == 1)
        self._serial: Any = outer(each_group).serial if alone else None
        """Runs everything in one call; None where several threads may share the work."""

    def arrays(self, shape: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[bool]]:
        """The shapes of the arrays of `ForwardArrays` or `BackwardArrays`, and which of them are written."""
        outer, vector = self._one.outer, (self._channels,)
        if outer.backward:
            return [*(shape,) * 5, *(vector,) * 2, (self._items,)], [*(False,) * 3, *(True,) * 5]
        written = [False, False, True, False, False, outer.training, outer.training, True]
        return [*(shape,) * 3, *(vector,) * 4, (self._items,)], written

    def workspace(self) -> Array:
        """A new workspace. That of a forward pass serves its backward pass as well."""
        return (np.empty if self._size else np.zeros)(self._items, self._dtype)

    def forward(
        self,
        arrays: int,
        workspace: Array,
        eps: float,
        weight: float | None,
        count: Array | None,
        ranks: SumsOfRanks | None = None,
    ) -> int:
        """Make a pass over the arrays whose addresses are at `arrays`, unless `begin` refuses one; return what it says.

        weight, count, ranks : as for `BatchNormCPU.forward`; `count` must be None where there are no running
            statistics.
        """
        fixed = self._fixed_address
        begun: int = self._begin(arrays, fixed)
        if begun == REFUSED:
            return REFUSED
        if weight is None:
            weight = 0.0 if count is None else 1.0 / (float(count[0]) + 1.0)
        arguments = (arrays, fixed, self._map_loops.get(begun) or self._map_loop(begun), eps, weight)
        by_group = self._run(arguments) if ranks is None else self._run_with(ranks, workspace, arguments)
        if self._finish is not None:
            found = self._finish(arrays, fixed)
            if found > 0:  # rare, and once per shape
                self._run_with_wide_sums(workspace, arguments, by_group)
                found = self._finish(arrays, fixed)
            if found == 0 and count is not None:
                count[0] += 1
        return begun

    def backward(self, arrays: int) -> bool:
        """The same of a backward pass; return whether it was made."""
        begun = self._begin(arrays, self._fixed_address)
        if begun == REFUSED:
            return False
        map_loop = self._map_loops.get(begun) or self._map_loop(begun)
        self._run((arrays, self._fixed_address, map_loop, 0.0, 0.0))
        return True

    def backward_with(self, ranks: SumsOfRanks, addresses: Array, workspace: Array) -> bool:
        """As `backward`, with the sums of all ranks for dx.

        addresses : of the arrays, as `backward` reads them.
        workspace : of the forward pass.
        """
        arrays = addresses.ctypes.data
        begun = self._begin(arrays, self._fixed_address)
        if begun == REFUSED:
            return False
        arguments = (arrays, self._fixed_address, self._map_loops.get(begun) or self._map_loop(begun), 0.0, 0.0)
        self._sum(arguments)
        count, sums = ranks.sums(*self._sums_of_blocks(workspace))
        merge = self._one.outer(merge_channels).serial
        merge(*arguments, 0, self._channels)  # dgamma and dbeta, of this rank alone
        unread = np.empty((2, self._channels), self._dtype)
        of_gamma, of_beta = (vector.ctypes.data for vector in unread)
        others = np.array(BackwardArrays(*addresses.tolist())._replace(dgamma=of_gamma, dbeta=of_beta), np.int64)
        self._merge_one((others.ctypes.data, *arguments[1:]), workspace, count, sums)
        self._map(arguments)
        return True

    def _run_with(self, ranks: SumsOfRanks, workspace: Array, arguments: tuple[Any, ...]) -> bool:
        """Run all phases of a forward pass, with the sums of all ranks; return False, as nothing is missing."""
        self._sum(arguments)
        waiting = waiting_of(workspace, self._channels, self._cut.groups)
        if waiting.any():
            self._compile_wide_sums()
            waiting[:] = 0
            self._sum(arguments)
        count, moments = ranks.statistics(*self._sums_of_blocks(workspace))
        self._merge_one(arguments, workspace, count, moments)
        self._map(arguments)
        return False

    def _sums_of_blocks(self, workspace: Array) -> tuple[Array, Array]:
        """The values per channel of each block, and its partial sums."""
        partials = partials_of(workspace, self._channels, self._cut.counts.size, self._cut.groups)
        if self._size > 0:
            return self._cut.counts, partials
        partials[...] = 0.0
        return np.zeros_like(self._cut.counts), partials

    def _merge_one(self, arguments: tuple[Any, ...], workspace: Array, count: float, sums: Array) -> None:
        """Merge the sums of all ranks as those of one block."""
        partials_of(workspace, self._channels, 1, self._cut.groups)[:, 0] = sums
        counts, fixed = np.array([count]), self._fixed.copy()
        fixed[BLOCKS], fixed[COUNTS] = 1, counts.ctypes.data
        arrays, _, *more = arguments
        self._one.outer(merge_channels).serial(arrays, fixed.ctypes.data, *more, 0, self._channels)

    def _sum(self, arguments: tuple[Any, ...]) -> None:
        if self._size > 0:
            self._one.outer(sum_tiles).run(*arguments, elements=self._size, units=self._tiles)

    def _map(self, arguments: tuple[Any, ...]) -> None:
        if self._size > 0:
            self._one.outer(map_tiles).run(*arguments, elements=self._size, units=self._tiles, backwards=True)

    def _map_loop(self, over: int) -> int:
        """The address of the map of a tile."""
        with COMPILING:
            address = self._map_loops[over] = self._one.loops.map(self._spatial, over)
        return address

    def _run(self, arguments: tuple[Any, ...]) -> bool:
        """Run all phases, or until sums in float64 are missing; return whether this was done group by group."""
        groups, size = self._cut.groups, self._size
        if self._serial is not None:
            self._serial(*arguments, 0, groups)
            return True
        outer, threads = self._one.outer, get_num_threads()
        if threads == 1 and groups == 1 and size > 0:
            outer(each_group).serial(*arguments, 0, 1)
            return True
        if size <= GROUP_SIZE * groups and groups >= 2 * threads and size > 0:
            outer(each_group).run(*arguments, elements=size, units=groups)
            return True
        if outer.summed:
            self._sum(arguments)
        outer(merge_channels).serial(*arguments, 0, self._channels)
        self._map(arguments)
        return False

    def _run_with_wide_sums(self, workspace: Array, arguments: tuple[Any, ...], by_group: bool) -> None:
        """Run what `_run` has left out, with sums in float64 where they are needed."""
        self._compile_wide_sums()
        waiting = waiting_of(workspace, self._channels, self._cut.groups)
        groups = np.flatnonzero(waiting).tolist()
        waiting[:] = 0
        if by_group:
            for group in groups:
                self._one.outer(each_group).serial(*arguments, group, group + 1)
        else:
            self._run(arguments)

    def _compile_wide_sums(self) -> None:
        with COMPILING:
            self._fixed[WIDE_SUM_LOOP] = self._one.loops.sums(self._spatial, wide=True)


def _addresses_of(*arrays: Array | None) -> Array:
    """The addresses of arrays, and 0 for None."""
    return np.array([0 if array is None else array.ctypes.data for array in arrays], np.int64)


def _plan(view: tuple[int, int, int], *, across: bool = False) -> Plan:
    """Cut an array. An empty one has coefficients and gradients as well: those of one block whose sums are 0."""
    samples, channels, spatial = view
    return plan(max(1, samples), channels, max(1, spatial), across=across)


WIDE_SUM_LOOP, BLOCKS, COUNTS = (Fixed._fields.index(name) for name in ("wide_sum_loop", "blocks", "counts"))
