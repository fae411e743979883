"""BatchNorm on CUDA: how an array is shared out among blocks of threads, the kernels, and the launches.

x is (samples, channels, spatial) in memory; channels-last is spatial = 1. Three words:

- tile: channels that follow each other, as many as a cache line of values takes. The threads of a block are shared out
  among the channels of a tile, and those of one channel take its values in turn. So threads beside each other read
  addresses beside each other in any layout, and one loop serves the sums as well as the map. The loop divides once,
  where it starts; then it adds.
- slice: consecutive values of each channel of a tile.
- task: what a block of threads works on at a time, one slice of one tile.

A direction has three launches: the sums of every slice, the merge of the slices of every channel, the map. With running
statistics the forward pass has a fourth, which records the batch, or not, when all channels are known. A thread
sums VALUES_AT_ONCE values in the dtype of the data, deviations from a value of the channel, and goes on in float64; so
do the trees over threads and slices. Where the sums have lost digits (`sums_are_exact`), a block sums its slice again
in float64. How an array is cut depends on its shape alone: the same bits always.

The map reads four elements before it writes one. A thread reads an element before it writes there, and no other thread
touches the element, so that the map may write over what it reads.
"""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from numba import float64, uint64

from fastopt.kernels.bind import bind
from fastopt.kernels.contract import Array
from fastopt.kernels.cuda.launcher import Launcher, Room, Rooms
from fastopt.kernels.cuda.memory import unpacking
from fastopt.kernels.cuda.target import SIMULATED, THREADS, cuda, device

COALESCED = THREADS // 8
"""Values that threads beside each other are to read from addresses beside each other: on a device those of a warp."""

MOST_TASKS = 8 if SIMULATED else 1024
"""As many blocks as a large GPU runs at the same time; there are more tasks only where there are more tiles."""

LEAST_VALUES = 2 if SIMULATED else 8
"""Fewest values of a slice for each thread of a channel."""

MOST_CUTS = 256
"""Shapes whose cut is kept."""

VALUES_AT_ONCE = 8
"""Values that a thread sums in the dtype of the data. All are read before the first is added."""

# --- the kernels ------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies. Arrays that a kernel may write to come last: the simulator copies
# every argument back after a launch, in order, so that an array that is passed twice keeps its last copy.

ACC: Any
DTYPE: Any
TERMS: Any
TERMS_AT: Any
HYPER: Any
UNPACK_CUT: Any
UNPACK_HYPER: Any
N_COEFFICIENTS: Any
RESIDUAL: Any
READS_Y: Any
OUTPUTS: Any
TRAINING: Any
GAMMA: Any
BETA: Any
AVERAGED: Any
COUNTED: Any
GUARDED: Any
LARGEST: Any
MAP: Any
MAP_AT: Any
TREE: Any
THREAD_SUMS: Any
WIDE_THREAD_SUMS: Any
AFFINE_COEFFICIENTS: Any
BLEND: Any
GAMMA_GRADIENT: Any
GRADIENT_COEFFICIENTS: Any
INVERSE_STD: Any
IS_RECORDABLE: Any
MERGE_MOMENTS: Any
MOMENTS: Any
ROUNDING: Any
SUMS_ARE_EXACT: Any
UNBIASED_VARIANCE: Any
VARIANCE: Any


class Cut(NamedTuple):
    """How an array is shared out."""

    channels: int
    spatial: int
    values: int
    """Of a channel."""
    tile_channels: int
    """Channels of a tile, a power of two; the last tile may have fewer."""
    threads: int
    """Threads of a channel of a tile."""
    tiles: int
    slices: int
    """Of each channel."""
    length: int
    """Values of a slice; the last one may be shorter."""
    stride: int
    """How far from a thread's value to its next one, `threads` values on, where that need not leave the sample ..."""
    map_stride: int
    """... how far on that is in the channel's part of a sample ..."""
    wrap: int
    """... and how much farther it is where that part has ended."""
    merged_channels: int
    """Channels that a block merges at a time."""


class Slice(NamedTuple):
    """A thread's part of a task."""

    exists: bool
    """Whether the thread has a channel: the last tile may have fewer."""
    channel: int
    """Of the thread; the last channel where it has none."""
    values: int
    """Values of a channel in the slice."""
    number: int
    """Number of the thread's first value ..."""
    last: int
    """... and the number where its values have ended: the first of the slice where it has no channel."""
    spare: int
    """Where some value of the channel in the slice lies."""
    partial: int
    """Where the sums of the slice are in `partials`."""


def slice_of(cut, task, thread):
    """What a thread does of a task."""
    own = task % cut.tiles * cut.tile_channels + thread % cut.tile_channels
    part = task // cut.tiles
    first = part * cut.length
    end = min(first + cut.length, cut.values)
    exists = own < cut.channels
    channel = min(own, cut.channels - 1)
    number = first + thread // cut.tile_channels
    spare, _ = locate(cut, first, channel)
    partial = 2 * (part * cut.channels + channel)
    return Slice(exists, channel, end - first, number, end if exists else first, spare, partial)


def locate(cut, number, channel):
    """Where a value of a channel lies, and where in the channel's part of its sample."""
    sample = number // cut.spatial
    inside = number - sample * cut.spatial
    return (sample * cut.channels + channel) * cut.spatial + inside, inside


def advance(cut, at, inside):
    """The location of a thread's next value."""
    at += cut.stride
    inside += cut.map_stride
    if inside >= cut.spatial:
        inside -= cut.spatial
        at += cut.wrap
    return at, inside


def forward_terms_at(x, _dy, _y, k, h):
    """The two TERMS of element k of x."""
    return TERMS(ACC(x[k]), h)


def backward_terms_at(x, dy, y, k, h):
    """The two TERMS of element k of x, dy and y."""
    value = x[k]
    return TERMS(value, dy[k], y[k] if READS_Y else value, h)


def thread_sums(x, dy, y, cut, part, h):
    """The sums of the two TERMS over a thread's values of a `Slice`."""
    s = float64(0.0)
    q = float64(0.0)
    number, last = part.number, part.last
    at, inside = locate(cut, number, part.channel)
    while number < last:
        s_some = ACC(0.0)
        q_some = ACC(0.0)
        for _ in range(VALUES_AT_ONCE):
            # Reads are unconditional, so that all of them can be under way together. No index is negative; with an
            # unsigned one numba does not check that.
            s_one, q_one = TERMS_AT(x, dy, y, uint64(at if number < last else part.spare), h)
            if number < last:
                s_some += s_one
                q_some += q_one
            number += cut.threads
            at, inside = advance(cut, at, inside)
        s += float64(s_some)
        q += float64(q_some)
    return s, q


def tree(left, right, s, q, channels):
    """Leave the sums of s and q over the threads of each channel in the first elements of `left` and `right`."""
    left[cuda.threadIdx.x] = s
    right[cuda.threadIdx.x] = q
    cuda.syncthreads()
    width = cuda.blockDim.x // 2
    while width >= channels:
        if cuda.threadIdx.x < width:
            left[cuda.threadIdx.x] += left[cuda.threadIdx.x + width]
            right[cuda.threadIdx.x] += right[cuda.threadIdx.x + width]
        cuda.syncthreads()
        width //= 2


# Until the next TREE a thread reads and writes only its own element of shared memory, so that the loops over tasks need
# no barrier. Every kernel begins alike: numba declares shared memory in the kernel itself.


def forward_sums(x, cuts, partials):
    """Leave (mean, sum of squares about it) of every slice."""
    sums = cuda.shared.array(THREADS, float64)
    squares = cuda.shared.array(THREADS, float64)
    cut = Cut(*UNPACK_CUT(cuts, 0))
    thread = cuda.threadIdx.x
    for task in range(cuda.blockIdx.x, cut.tiles * cut.slices, cuda.gridDim.x):
        part = slice_of(cut, task, thread)
        center = x[part.spare]
        s, q = THREAD_SUMS(x, x, x, cut, part, HYPER(center))
        TREE(sums, squares, s, q, cut.tile_channels)
        share = 1.0 / float64(part.values)
        if GUARDED:
            inexact = 0
            if thread < cut.tile_channels and not SUMS_ARE_EXACT(sums[thread], squares[thread], share, LARGEST):
                inexact = 1
            if cuda.syncthreads_or(inexact):
                h = HYPER(float64(center))
                s, q = WIDE_THREAD_SUMS(x, x, x, cut, part, h)
                TREE(sums, squares, s, q, cut.tile_channels)
        if thread < cut.tile_channels and part.exists:
            mean, about_mean = MOMENTS(sums[thread], squares[thread], share, float64(center))
            partials[part.partial] = mean
            partials[part.partial + 1] = about_mean


def backward_sums(x, dy, y, cuts, coefficients, partials):
    """Leave (sum g, sum g xhat) of every slice."""
    sums_g = cuda.shared.array(THREADS, float64)
    sums_g_xhat = cuda.shared.array(THREADS, float64)
    cut = Cut(*UNPACK_CUT(cuts, 0))
    thread = cuda.threadIdx.x
    for task in range(cuda.blockIdx.x, cut.tiles * cut.slices, cuda.gridDim.x):
        part = slice_of(cut, task, thread)
        h = HYPER(*UNPACK_HYPER(coefficients, N_COEFFICIENTS * part.channel))
        s, q = THREAD_SUMS(x, dy, y, cut, part, h)
        TREE(sums_g, sums_g_xhat, s, q, cut.tile_channels)
        if thread < cut.tile_channels and part.exists:
            partials[part.partial] = sums_g[thread]
            partials[part.partial + 1] = sums_g_xhat[thread]


def merge_statistics(cuts, partials, gamma, beta, eps, running_mean, running_var, coefficients, stats):
    """Merge the slices of every channel, in a fixed order; leave its statistics and coefficients.

    stats : the mean and inv_std of every channel and, in training, the unbiased variance.
    """
    counts = cuda.shared.array(THREADS, float64)
    means = cuda.shared.array(THREADS, float64)
    squares = cuda.shared.array(THREADS, float64)
    cut = Cut(*UNPACK_CUT(cuts, 0))
    thread = cuda.threadIdx.x
    for start in range(cuda.blockIdx.x * cut.merged_channels, cut.channels, cuda.gridDim.x * cut.merged_channels):
        channel = start + thread % cut.merged_channels
        if TRAINING:
            own = min(channel, cut.channels - 1)
            n = float64(0.0)
            mean = float64(0.0)
            m2 = float64(0.0)
            for part in range(thread // cut.merged_channels, cut.slices, THREADS // cut.merged_channels):
                more = float64(min(cut.length, cut.values - part * cut.length))
                at = 2 * (part * cut.channels + own)
                n, mean, m2 = MERGE_MOMENTS(n, mean, m2, more, partials[at], partials[at + 1])
            counts[thread] = n
            means[thread] = mean
            squares[thread] = m2
            cuda.syncthreads()
            width = THREADS // 2
            while width >= cut.merged_channels:
                if thread < width:
                    counts[thread], means[thread], squares[thread] = MERGE_MOMENTS(
                        counts[thread],
                        means[thread],
                        squares[thread],
                        counts[thread + width],
                        means[thread + width],
                        squares[thread + width],
                    )
                cuda.syncthreads()
                width //= 2
        if thread < cut.merged_channels and channel < cut.channels:
            if TRAINING:
                mean = means[thread]
                var = VARIANCE(squares[thread], counts[thread])
                stats[2 * cut.channels + channel] = UNBIASED_VARIANCE(squares[thread], counts[thread])
            else:
                mean = float64(running_mean[channel])
                var = float64(running_var[channel])
            inv_std = float64(INVERSE_STD(var, eps))
            center = DTYPE(mean)
            weight = float64(gamma[channel]) if GAMMA else float64(1.0)
            bias = float64(beta[channel]) if BETA else float64(-0.0)  # adding -0.0 keeps the sign of a zero
            scale, shift = AFFINE_COEFFICIENTS(mean, float64(center), inv_std, weight, bias)
            line = N_COEFFICIENTS * channel
            coefficients[line] = center
            coefficients[line + 1] = scale
            coefficients[line + 2] = shift
            coefficients[line + 3] = inv_std
            stats[channel] = mean
            stats[cut.channels + channel] = inv_std


def record(cuts, stats, momentum, running_mean, running_var, count):
    """Move the running statistics by the batch of these `stats`, unless a channel of it forbids that. One block."""
    cut = Cut(*UNPACK_CUT(cuts, 0))
    thread = cuda.threadIdx.x
    unrecordable = 0
    for channel in range(thread, cut.channels, THREADS):
        if not IS_RECORDABLE(stats[channel], stats[2 * cut.channels + channel]):
            unrecordable = 1
    if not cuda.syncthreads_or(unrecordable):
        weight = momentum
        if AVERAGED:
            weight = 1.0 / (float64(count[0]) + 1.0)
        for channel in range(thread, cut.channels, THREADS):
            mean, var = float64(running_mean[channel]), float64(running_var[channel])
            running_mean[channel] = BLEND(mean, stats[channel], weight, LARGEST)
            running_var[channel] = BLEND(var, stats[2 * cut.channels + channel], weight, LARGEST)
        cuda.syncthreads()
        if COUNTED and thread == 0:
            count[0] += 1


def merge_gradients(cuts, partials, gamma, stats, dgamma, dbeta, coefficients):
    """Add up the slices of every channel, in a fixed order; leave dgamma, dbeta and the coefficients of dx."""
    sums_g = cuda.shared.array(THREADS, float64)
    sums_g_xhat = cuda.shared.array(THREADS, float64)
    cut = Cut(*UNPACK_CUT(cuts, 0))
    thread = cuda.threadIdx.x
    for start in range(cuda.blockIdx.x * cut.merged_channels, cut.channels, cuda.gridDim.x * cut.merged_channels):
        channel = start + thread % cut.merged_channels
        own = min(channel, cut.channels - 1)
        s = float64(0.0)
        q = float64(0.0)
        for part in range(thread // cut.merged_channels, cut.slices, THREADS // cut.merged_channels):
            at = 2 * (part * cut.channels + own)
            s += partials[at]
            q += partials[at + 1]
        TREE(sums_g, sums_g_xhat, s, q, cut.merged_channels)
        if thread < cut.merged_channels and channel < cut.channels:
            line = N_COEFFICIENTS * channel
            inv_std = stats[cut.channels + channel]
            lost = ROUNDING(stats[channel], float64(coefficients[line]), inv_std)
            sum_g = sums_g[thread]
            sum_g_xhat = GAMMA_GRADIENT(sum_g, sums_g_xhat[thread], lost)
            weight = float64(gamma[channel]) if GAMMA else float64(1.0)
            dy_scale, xhat_scale, offset = GRADIENT_COEFFICIENTS(
                sum_g, sum_g_xhat, float64(cut.values), weight, inv_std, lost, TRAINING
            )
            dgamma[channel] = sum_g_xhat
            dbeta[channel] = sum_g
            coefficients[line + 4] = dy_scale
            coefficients[line + 5] = xhat_scale
            coefficients[line + 6] = offset


def y_at(x, residual, _y, k, h):
    """Element k of y, twice: as for two outputs."""
    k = uint64(k)
    value = x[k]
    y = MAP(value, residual[k] if RESIDUAL else value, h)
    return y, y


def gradients_at(x, dy, y, k, h):
    """Element k of dx, and of the residual's gradient."""
    k = uint64(k)
    value = x[k]
    return MAP(value, dy[k], y[k] if READS_Y else value, h)


def map_slices(x, a, y, cuts, coefficients, out, other):
    """MAP_AT for every element. `a` is the residual, or dy; `out` is y, or dx, and `other` the residual's gradient."""
    cut = Cut(*UNPACK_CUT(cuts, 0))
    for task in range(cuda.blockIdx.x, cut.tiles * cut.slices, cuda.gridDim.x):
        part = slice_of(cut, task, cuda.threadIdx.x)
        if part.exists:
            h = HYPER(*UNPACK_HYPER(coefficients, N_COEFFICIENTS * part.channel))
            number, last = part.number, part.last
            k0, i0 = locate(cut, number, part.channel)
            while number < last:
                k1, i1 = advance(cut, k0, i0)
                k2, i2 = advance(cut, k1, i1)
                k3, i3 = advance(cut, k2, i2)
                more1 = number + cut.threads < last
                more2 = number + 2 * cut.threads < last
                more3 = number + 3 * cut.threads < last
                v0, w0 = MAP_AT(x, a, y, k0, h)
                v1, w1 = MAP_AT(x, a, y, k1 if more1 else k0, h)
                v2, w2 = MAP_AT(x, a, y, k2 if more2 else k0, h)
                v3, w3 = MAP_AT(x, a, y, k3 if more3 else k0, h)
                out[uint64(k0)] = v0
                if more1:
                    out[uint64(k1)] = v1
                if more2:
                    out[uint64(k2)] = v2
                if more3:
                    out[uint64(k3)] = v3
                if OUTPUTS == 2:
                    other[uint64(k0)] = w0
                    if more1:
                        other[uint64(k1)] = w1
                    if more2:
                        other[uint64(k2)] = w2
                    if more3:
                        other[uint64(k3)] = w3
                number += 4 * cut.threads
                k0, i0 = advance(cut, k3, i3)


# --- how an array is shared out ---------------------------------------------------------------------------------------


def plan(samples: int, channels: int, spatial: int) -> Cut:
    """Share out an array of (samples, channels, spatial), none of them 0."""
    values = samples * spatial
    tile_channels = _power_of_two(min(channels, -(-COALESCED // spatial)))
    threads = THREADS // tile_channels
    tiles = -(-channels // tile_channels)
    slices = max(1, min(MOST_TASKS // tiles, values // (threads * LEAST_VALUES)))
    length = -(-values // (slices * threads)) * threads
    slices = -(-values // length)
    return Cut(
        channels=channels,
        spatial=spatial,
        values=values,
        tile_channels=tile_channels,
        threads=threads,
        tiles=tiles,
        slices=slices,
        length=length,
        stride=threads // spatial * channels * spatial + threads % spatial,
        map_stride=threads % spatial,
        wrap=(channels - 1) * spatial,
        merged_channels=THREADS // min(THREADS, _power_of_two(slices)),
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


# --- from the kernels to launches -------------------------------------------------------------------------------------


class State:
    """What a forward pass leaves for a backward pass, in a room that goes back when this is let go."""

    __slots__ = ("_rooms", "coefficients", "gamma", "room", "stats")

    def __init__(self, room: Room, rooms: Rooms | None, *, gamma: bool):
        """rooms : where the room comes from; None: it is of this object alone."""
        self.room = room
        self._rooms = rooms
        self.coefficients, self.stats, own = room.arrays
        self.gamma = own if gamma else None
        """A copy, because an optimizer may step before the backward pass."""

    def __del__(self) -> None:
        if self._rooms is not None:
            self._rooms.put_back(self.room)

    def show(self) -> Array:
        """Return the statistics, which the caller may keep."""
        self._rooms = None
        return self.stats

    def copy(self) -> State:
        """Return the same in memory of its own."""
        return _alone(tuple([array.copy() for array in self.room.arrays]), self.gamma is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _alone, (self.room.arrays, self.gamma is not None)


def _alone(arrays: tuple[Array, ...], gamma: bool) -> State:
    return State(Room(arrays, 0, None), None, gamma=gamma)


class Prepared(NamedTuple):
    """What the passes over arrays of one shape have in common."""

    cut: np.ndarray
    """The `Cut`."""
    tasks: int
    merging: int
    """Blocks that merge slices."""
    states: Rooms
    partials: Rooms


class BatchNormCUDA:
    """The BatchNorm of one dtype and one set of flags, forward and backward, in training or not."""

    def __init__(
        self,
        backend: Launcher,
        formulas: ModuleType,
        dtype: np.dtype[Any],
        flags: dict[str, bool],
        shared: dict[Any, Any],
    ):
        self._backend = backend
        self._formulas = formulas
        self._dtype = dtype
        self._flags = flags
        self._shared = shared
        self._coefficients = len(formulas.GradientMap._fields)  # of a channel: first those of y, then those of dx
        self._kernels: dict[Any, Any] = {}
        """Those of the passes, by what the caller passes."""

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
        count: Array | None = None,
    ) -> State:
        """Write y to `out` and, in training, record the batch; return what `backward` needs.

        As on the CPU; in training x is not empty.
        """
        backend, unused, launch = self._backend, self._unused, self._backend.launch
        gamma, beta, mean, var = channelwise
        numbers, tasks, merging, states, rooms = self._prepared(shape)
        counted = None if count is None else count.dtype
        key = ("forward", training, gamma is None, beta is None, weight is None, counted)
        kernels = self._kernels.get(key)
        if kernels is None:
            kernels = self._kernels[key] = (
                self._forward_sums() if training else None,
                self._merge_statistics(training, gamma=gamma is not None, beta=beta is not None),
                self._record(averaged=weight is None, count=counted),
                self._map(backward=False),
            )
        sums, merge, recording, mapping = kernels
        cuts = backend.constant(numbers)
        state = State(states.take(), states, gamma=gamma is not None)
        coefficients, stats = state.coefficients, state.stats
        room = rooms.take() if training else None
        partials = unused(np.float64)
        if room is not None:
            (partials,) = room.arrays
            launch(sums, tasks, x, cuts, partials)
        launch(
            merge,
            merging,
            cuts,
            partials,
            unused() if gamma is None else gamma,
            unused() if beta is None else beta,
            eps,
            unused() if mean is None else mean,
            unused() if var is None else var,
            coefficients,
            stats,
        )
        if room is not None:
            rooms.put_back(room)
        if training and mean is not None and var is not None:
            moved = 0.0 if weight is None else weight
            launch(recording, 1, cuts, stats, moved, mean, var, unused() if count is None else count)
        if x.size:
            arrays = (x, unused() if residual is None else residual, unused())
            launch(mapping, tasks, *arrays, cuts, coefficients, out, unused())
        if gamma is not None:
            backend.move(state.gamma, gamma)
        return state

    def statistics(self, state: State, channels: int) -> tuple[Array, Array]:
        """The mean and inv_std of every channel, float64, of what `forward` returned."""
        mean, inv_std = state.show()[: 2 * channels].reshape(2, channels)
        return mean, inv_std

    def backward(
        self,
        shape: tuple[int, int, int],
        x: Array,
        dy: Array,
        y: Array | None,
        outputs: tuple[Array, Array | None],
        channelwise: tuple[Array, Array],
        state: State,
        *,
        training: bool,
    ) -> None:
        """Write dx, dgamma, dbeta and, where `outputs` has room for it, the residual's gradient.

        channelwise : (dgamma, dbeta).
        state : what `forward` returned; it is written to.
        """
        backend, unused, launch = self._backend, self._unused, self._backend.launch
        coefficients, gamma = state.coefficients, state.gamma
        dgamma, dbeta = channelwise
        dx, dresidual = outputs
        numbers, tasks, merging, _, rooms = self._prepared(shape)
        key = ("backward", training, gamma is None)
        kernels = self._kernels.get(key)
        if kernels is None:
            merge = self._merge_gradients(training, gamma=gamma is not None)
            kernels = self._kernels[key] = self._backward_sums(), merge, self._map(backward=True)
        sums, merge, mapping = kernels
        cuts = backend.constant(numbers)
        stream = backend.stream()
        if stream.is_capturing():
            backend.keep(state).room.stream = None
        elif state.room.stream is not None:  # else a graph uses it
            state.room.stream = stream
        room = rooms.take()
        (partials,) = room.arrays
        arrays = (x, dy, unused() if y is None else y)
        if x.size:
            launch(sums, tasks, *arrays, cuts, coefficients, partials)
        else:  # an empty array has gradients as well: those of one slice whose sums are 0
            partials.fill(0)
        given = unused() if gamma is None else gamma
        launch(merge, merging, cuts, partials, given, state.stats, dgamma, dbeta, coefficients)
        rooms.put_back(room)
        if x.size:
            launch(mapping, tasks, *arrays, cuts, coefficients, dx, unused() if dresidual is None else dresidual)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _unused(self, dtype: Any = None) -> Array:
        return self._backend.unused(self._dtype if dtype is None else dtype)

    def _prepared(self, shape: tuple[int, int, int]) -> Prepared:
        """How an array is shared out, the same for the device, and what launches need for it."""
        prepared: dict[Any, Prepared] = self._shared.setdefault(("prepared", self._dtype), {})
        found = prepared.get(shape)
        if found is None:
            if len(prepared) >= MOST_CUTS:
                prepared.clear()
            samples, channels, spatial = shape
            cut, backend, dtype = plan(max(1, samples), channels, max(1, spatial)), self._backend, self._dtype
            found = prepared[shape] = Prepared(
                np.array(cut, np.int64),
                cut.tiles * cut.slices,
                -(-channels // cut.merged_channels),
                Rooms(backend, (channels * self._coefficients, dtype), (3 * channels, np.float64), (channels, dtype)),
                Rooms(backend, (2 * cut.slices * channels, np.float64)),
            )
        return found

    # --- kernels ------------------------------------------------------------------------------------------------------

    def _forward_sums(self) -> Any:
        formulas = self._formulas
        terms = {"TERMS": formulas.deviation_terms, "TERMS_AT": forward_terms_at}
        return self._kernel(
            forward_sums,
            (),  # the same for all flags
            lambda: {
                "HYPER": formulas.Center,
                "MOMENTS": formulas.moments,
                "SUMS_ARE_EXACT": formulas.sums_are_exact,
                "GUARDED": self._dtype.itemsize < 8,  # where the data is float64 there is nothing wider to go to
                "LARGEST": float(np.finfo(self._dtype).max),
                "THREAD_SUMS": self._part(thread_sums, {**terms, "ACC": self._dtype.type}),
                "WIDE_THREAD_SUMS": self._part(thread_sums, {**terms, "ACC": np.float64}),
            },
        )

    def _backward_sums(self) -> Any:
        hyper = self._formulas.Normaliser
        terms = {"TERMS": self._formulas.gradient_terms, "TERMS_AT": backward_terms_at, "READS_Y": self._reads_y}
        return self._kernel(
            backward_sums,
            tuple(self._flags.items()),
            lambda: {
                "HYPER": hyper,
                "UNPACK_HYPER": unpacking(len(hyper._fields)),
                "THREAD_SUMS": self._part(thread_sums, {**terms, "ACC": self._dtype.type}),
            },
        )

    def _merge_statistics(self, training: bool, *, gamma: bool, beta: bool) -> Any:
        formulas = self._formulas
        flags = {"TRAINING": training, "GAMMA": gamma, "BETA": beta}
        return self._kernel(
            merge_statistics,
            tuple(flags.items()),
            lambda: {
                **flags,
                "DTYPE": self._dtype.type,
                "AFFINE_COEFFICIENTS": formulas.affine_coefficients,
                "INVERSE_STD": formulas.inverse_std,
                "MERGE_MOMENTS": formulas.merge_moments,
                "UNBIASED_VARIANCE": formulas.unbiased_variance,
                "VARIANCE": formulas.variance,
            },
        )

    def _record(self, *, averaged: bool, count: np.dtype[Any] | None) -> Any:
        formulas, flags = self._formulas, {"AVERAGED": averaged, "COUNTED": count is not None}
        return self._kernel(
            record,
            (averaged, count),
            lambda: {
                **flags,
                "LARGEST": float(np.finfo(self._dtype).max),
                "BLEND": formulas.blend,
                "IS_RECORDABLE": formulas.is_recordable,
            },
        )

    def _merge_gradients(self, training: bool, *, gamma: bool) -> Any:
        formulas = self._formulas
        flags = {"TRAINING": training, "GAMMA": gamma}
        return self._kernel(
            merge_gradients,
            tuple(flags.items()),
            lambda: {
                **flags,
                "GAMMA_GRADIENT": formulas.gamma_gradient,
                "GRADIENT_COEFFICIENTS": formulas.gradient_coefficients,
                "ROUNDING": formulas.rounding,
            },
        )

    def _map(self, *, backward: bool) -> Any:
        formulas, flags = self._formulas, self._flags
        hyper = formulas.GradientMap if backward else formulas.Affine
        at = gradients_at if backward else y_at
        constants = {"MAP": formulas.gradient if backward else formulas.normalise, "READS_Y": self._reads_y}
        return self._kernel(
            map_slices,
            ("backward" if backward else "forward", *flags.items()),
            lambda: {
                "HYPER": hyper,
                "UNPACK_HYPER": unpacking(len(hyper._fields)),
                "OUTPUTS": 2 if backward and self._reads_y else 1,
                "MAP_AT": self._part(at, {**constants, "RESIDUAL": flags["RESIDUAL"]}),
            },
        )

    @property
    def _reads_y(self) -> bool:
        """Whether the backward pass reads y, and writes the residual's gradient."""
        return self._flags["RELU"] and self._flags["RESIDUAL"]

    def _part(self, function: Callable[..., Any], constants: dict[str, Any]) -> FunctionType:
        """A device function of these constants; the formulas of an element among them are bound to the flags."""
        flags: dict[str, Any] = {**self._flags, "ZERO": self._dtype.type(0)}
        flags["masked"] = _bound(self._formulas.masked, flags)
        constants = dict(constants)
        for name in ("TERMS", "MAP"):
            if name in constants:
                constants[name] = _bound(constants[name], flags)
        if "TERMS_AT" in constants:
            constants["TERMS_AT"] = _bound(constants["TERMS_AT"], constants)
        return _bound(function, constants)

    def _kernel(self, loop: Callable[..., None], key: tuple[Any, ...], make: Callable[[], dict[str, Any]]) -> Any:
        """A kernel, bound once to the constants that `make` returns."""
        key = (loop.__name__, self._dtype, *key)
        kernel = self._shared.get(key)
        if kernel is None:
            constants = {"UNPACK_CUT": unpacking(len(Cut._fields)), "N_COEFFICIENTS": self._coefficients, **make()}
            kernel = self._backend.compiled(loop, constants, f"batchnorm_{loop.__name__}_{self._dtype.name}")
            # The simulator puts its own module in the place of `cuda` in the globals of a kernel: TREE shares them.
            names = kernel.py_func.__globals__
            names["TREE"] = device(FunctionType(tree.__code__, names, "tree"))
            self._shared[key] = kernel
        return kernel


def _bound(function: Callable[..., Any], constants: dict[str, Any]) -> FunctionType:
    return bind(function, constants, label=function.__name__, scalar=device)
