"""BatchNorm on CUDA: how an array is shared out among blocks of threads, the kernels, and the launches.

x is (samples, channels, spatial) in memory; channels-last is spatial = 1. A task of a block of threads is a slice of
the values of each channel of a tile. The lanes of a tile are its channels, as many as a cache line of values takes; the
threads of a lane take the values of its channel in turn. So a line is read by threads beside each other in any layout,
and one walk serves the sums as well as the map. A walk divides once, where it starts; then it adds.

Three launches a direction: the sums of every slice, the merge of the slices of every channel, the map. A thread sums
PIECE values in the dtype of the data, deviations from a value of the channel, and goes on in float64; so do the trees
over threads and slices. Where that value is so far out that the deviations would cancel, or where they overflow, a
block sums its slice again in float64 (`GUARD`). How an array is cut depends on its shape alone: the same bits always.

The map reads four elements before it writes one. A thread reads an element before it writes there, and no other thread
touches it, so that it may write over what it reads.
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
from fastopt.kernels.cuda.backend import (  # type: ignore[attr-defined] # `cuda` comes from the one file that imports it
    CUDA,
    SIMULATED,
    THREADS,
    cuda,
    device,
    unpacking,
)

LINE = THREADS // 8
"""Values that threads beside each other are to read from addresses beside each other: on a device a warp's."""

TASKS = 8 if SIMULATED else 1024
"""Most tasks, as many blocks as a large GPU runs at once; more only where there are more tiles than that."""

LEAST = 2 if SIMULATED else 8
"""Fewest values of a slice for each thread of a lane."""

PIECE = 8
"""Values that a thread sums in the dtype of the data. All are read before the first is added."""

GUARD = 16.0
"""How many times the sum of squares may exceed its part about the mean before float32 has lost too much."""

# --- the kernels ------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies. Arrays that a kernel may write to come last: what is the same
# array as one before has its last word in the simulator, which copies every argument back after a launch, in order.

ACC: Any
DTYPE: Any
TERMS: Any
HYPER: Any
UNPACK_CUT: Any
UNPACK_HYPER: Any
READS_A: Any
READS_Y: Any
BACKWARD: Any
OUTPUTS: Any
TRAINING: Any
GAMMA: Any
BETA: Any
TRACKED: Any
GUARDED: Any
LARGEST: Any
MAP: Any
MAPPED: Any
TREE: Any
TOTALS: Any
WIDE_TOTALS: Any
INVERSE_STD: Any
ROUNDING: Any
BLEND: Any
GRADIENT_COEFFICIENTS: Any


COEFFICIENTS = 7
"""In a line of the coefficients, a line for each channel: those of the map to y first, then what dx needs besides."""


class Cut(NamedTuple):
    """How an array is shared out."""

    channels: int
    spatial: int
    values: int
    """Of a channel."""
    lanes: int
    """Channels of a tile, a power of two; of the last one perhaps fewer are there."""
    groups: int
    """Threads of a lane."""
    tiles: int
    slices: int
    """Of each channel."""
    length: int
    """Values of a slice; the last one may be shorter."""
    jump: int
    """How far from a thread's value to its next one, `groups` values on, where it need not leave the sample ..."""
    rest: int
    """... how far on that is in the channel's part of a sample ..."""
    wrap: int
    """... and how much farther it is where that part has ended."""
    beside: int
    """Channels that a block merges at once."""


def place(cut, number, channel):
    """Where a value of a channel lies, and where in the channel's part of its sample."""
    sample = number // cut.spatial
    inside = number - sample * cut.spatial
    return (sample * cut.channels + channel) * cut.spatial + inside, inside


def after(cut, at, inside):
    """The `place` of a thread's next value."""
    at += cut.jump
    inside += cut.rest
    if inside >= cut.spatial:
        inside -= cut.spatial
        at += cut.wrap
    return at, inside


def merged(n, mean, squares, more, more_mean, more_squares):
    """(count, mean, sum of squares about it) of two sets of values together, by Chan's formula."""
    if more == 0.0:
        return n, mean, squares
    total = n + more
    delta = more_mean - mean
    return total, mean + delta * (more / total), squares + more_squares + delta * (n * more / total) * delta


def totals(x, a, y, cut, channel, number, last, spare, h):
    """The sums of the two TERMS over a thread's values of a channel, from `number` on. `spare` is where one lies."""
    s = float64(0.0)
    q = float64(0.0)
    at, inside = place(cut, number, channel)
    while number < last:
        s_piece = ACC(0.0)
        q_piece = ACC(0.0)
        for _ in range(PIECE):
            # Reads are unconditional, so that they can all be under way at once. No index is negative; for an unsigned
            # one that is not even looked at.
            k = uint64(at if number < last else spare)
            xv = ACC(x[k])
            av = xv
            yv = xv
            if READS_A:
                av = ACC(a[k])
            if READS_Y:
                yv = ACC(y[k])
            s_one, q_one = TERMS(xv, av, yv, h)
            if number < last:
                s_piece += s_one
                q_piece += q_one
            number += cut.groups
            at, inside = after(cut, at, inside)
        s += float64(s_piece)
        q += float64(q_piece)
    return s, q


def tree(left, right, s, q, lanes):
    """Leave the sums of s and q over the threads of each lane in the first elements of `left` and `right`."""
    left[cuda.threadIdx.x] = s
    right[cuda.threadIdx.x] = q
    cuda.syncthreads()
    width = cuda.blockDim.x // 2
    while width >= lanes:
        if cuda.threadIdx.x < width:
            left[cuda.threadIdx.x] += left[cuda.threadIdx.x + width]
            right[cuda.threadIdx.x] += right[cuda.threadIdx.x + width]
        cuda.syncthreads()
        width //= 2


def gather(x, a, y, cuts, coefficients, partials):
    """Sum every slice: (mean, sum of squares about it) of its values or, backward, (sum dy, sum dy xhat)."""
    of_s = cuda.shared.array(THREADS, float64)
    of_q = cuda.shared.array(THREADS, float64)
    cut = Cut(*UNPACK_CUT(cuts, 0))
    thread = cuda.threadIdx.x
    for task in range(cuda.blockIdx.x, cut.tiles * cut.slices, cuda.gridDim.x):
        channel = task % cut.tiles * cut.lanes + thread % cut.lanes
        there = channel < cut.channels
        own = min(channel, cut.channels - 1)
        part = task // cut.tiles
        at = 2 * (part * cut.channels + channel)
        first = part * cut.length
        end = min(first + cut.length, cut.values)
        last = end if there else first
        number = first + thread // cut.lanes
        spare, _ = place(cut, first, own)
        if BACKWARD:
            h = HYPER(*UNPACK_HYPER(coefficients, COEFFICIENTS * own))
            s, q = TOTALS(x, a, y, cut, own, number, last, spare, h)
            TREE(of_s, of_q, s, q, cut.lanes)
            if thread < cut.lanes and there:
                partials[at] = of_s[thread]
                partials[at + 1] = of_q[thread]
        else:
            shift = x[spare]
            s, q = TOTALS(x, a, y, cut, own, number, last, spare, HYPER(shift))
            TREE(of_s, of_q, s, q, cut.lanes)
            count = float64(end - first)
            if GUARDED:
                lacking = 0
                if thread < cut.lanes:
                    about_mean = of_q[thread] - of_s[thread] * (of_s[thread] / count)
                    if not (of_q[thread] <= GUARD * about_mean and of_q[thread] <= LARGEST):
                        lacking = 1
                if cuda.syncthreads_or(lacking):
                    s, q = WIDE_TOTALS(x, a, y, cut, own, number, last, spare, HYPER(float64(shift)))
                    TREE(of_s, of_q, s, q, cut.lanes)
            if thread < cut.lanes and there:
                mean = of_s[thread] / count
                about_mean = of_q[thread] - of_s[thread] * mean
                partials[at] = mean + float64(shift)
                partials[at + 1] = 0.0 if about_mean < 0.0 else about_mean
        # Until the next TREE a thread reads and writes only the element that is its own: no barrier is needed.


def finish_statistics(cuts, partials, gamma, beta, eps, weight, running_mean, running_var, coefficients, stats):
    """Merge the slices of every channel, in a fixed order; leave its statistics and coefficients."""
    counts = cuda.shared.array(THREADS, float64)
    means = cuda.shared.array(THREADS, float64)
    squares = cuda.shared.array(THREADS, float64)
    cut = Cut(*UNPACK_CUT(cuts, 0))
    thread = cuda.threadIdx.x
    for start in range(cuda.blockIdx.x * cut.beside, cut.channels, cuda.gridDim.x * cut.beside):
        channel = start + thread % cut.beside
        if TRAINING:
            own = min(channel, cut.channels - 1)
            n = float64(0.0)
            mean = float64(0.0)
            m2 = float64(0.0)
            for part in range(thread // cut.beside, cut.slices, THREADS // cut.beside):
                more = float64(min(cut.length, cut.values - part * cut.length))
                at = 2 * (part * cut.channels + own)
                n, mean, m2 = merged(n, mean, m2, more, partials[at], partials[at + 1])
            counts[thread] = n
            means[thread] = mean
            squares[thread] = m2
            cuda.syncthreads()
            width = THREADS // 2
            while width >= cut.beside:
                if thread < width:
                    counts[thread], means[thread], squares[thread] = merged(
                        counts[thread],
                        means[thread],
                        squares[thread],
                        counts[thread + width],
                        means[thread + width],
                        squares[thread + width],
                    )
                cuda.syncthreads()
                width //= 2
        if thread < cut.beside and channel < cut.channels:
            if TRAINING:
                mean = means[thread]
                var = squares[thread] / counts[thread]
                if TRACKED:
                    unbiased = squares[thread] / (counts[thread] - 1.0)
                    running_mean[channel] = BLEND(float64(running_mean[channel]), mean, weight, LARGEST)
                    running_var[channel] = BLEND(float64(running_var[channel]), unbiased, weight, LARGEST)
            else:
                mean = float64(running_mean[channel])
                var = float64(running_var[channel])
            inv_std = float64(INVERSE_STD(var, eps))
            center = DTYPE(mean)
            scale = inv_std
            shift = -ROUNDING(mean, float64(center), inv_std)
            if GAMMA:
                scale *= float64(gamma[channel])
                shift *= float64(gamma[channel])
            if BETA:
                shift += float64(beta[channel])
            line = COEFFICIENTS * channel
            coefficients[line] = center
            coefficients[line + 1] = scale
            coefficients[line + 2] = shift
            coefficients[line + 3] = inv_std
            stats[channel] = mean
            stats[cut.channels + channel] = inv_std


def finish_slopes(cuts, partials, gamma, stats, dgamma, dbeta, coefficients):
    """Add up the slices of every channel, in a fixed order; leave dgamma, dbeta and the coefficients of dx."""
    of_s = cuda.shared.array(THREADS, float64)
    of_q = cuda.shared.array(THREADS, float64)
    cut = Cut(*UNPACK_CUT(cuts, 0))
    thread = cuda.threadIdx.x
    for start in range(cuda.blockIdx.x * cut.beside, cut.channels, cuda.gridDim.x * cut.beside):
        channel = start + thread % cut.beside
        own = min(channel, cut.channels - 1)
        s = float64(0.0)
        q = float64(0.0)
        for part in range(thread // cut.beside, cut.slices, THREADS // cut.beside):
            at = 2 * (part * cut.channels + own)
            s += partials[at]
            q += partials[at + 1]
        TREE(of_s, of_q, s, q, cut.beside)
        if thread < cut.beside and channel < cut.channels:
            line = COEFFICIENTS * channel
            inv_std = stats[cut.channels + channel]
            lost = ROUNDING(stats[channel], float64(coefficients[line]), inv_std)
            sum_g = of_s[thread]
            sum_g_xhat = of_q[thread] - lost * sum_g
            weight = float64(1.0)
            if GAMMA:
                weight = float64(gamma[channel])
            slope, lean, offset = GRADIENT_COEFFICIENTS(sum_g, sum_g_xhat, float64(cut.values), weight, inv_std, lost)
            dgamma[channel] = sum_g_xhat
            dbeta[channel] = sum_g
            coefficients[line + 4] = slope
            coefficients[line + 5] = lean if TRAINING else 0.0  # constants have no gradient to send back
            coefficients[line + 6] = offset if TRAINING else 0.0


def mapped(x, a, y, k, h):
    """What belongs at k in the two outputs."""
    k = uint64(k)
    xv = x[k]
    av = xv
    yv = xv
    if READS_A:
        av = a[k]
    if READS_Y:
        yv = y[k]
    if BACKWARD:
        return MAP(xv, av, yv, h)
    value = MAP(xv, av, yv, h)
    return value, value


def spread(x, a, y, cuts, coefficients, out, other):
    """Map every element."""
    cut = Cut(*UNPACK_CUT(cuts, 0))
    for task in range(cuda.blockIdx.x, cut.tiles * cut.slices, cuda.gridDim.x):
        channel = task % cut.tiles * cut.lanes + cuda.threadIdx.x % cut.lanes
        if channel < cut.channels:
            h = HYPER(*UNPACK_HYPER(coefficients, COEFFICIENTS * channel))
            first = task // cut.tiles * cut.length
            last = min(first + cut.length, cut.values)
            number = first + cuda.threadIdx.x // cut.lanes
            k0, i0 = place(cut, number, channel)
            while number < last:
                k1, i1 = after(cut, k0, i0)
                k2, i2 = after(cut, k1, i1)
                k3, i3 = after(cut, k2, i2)
                more1 = number + cut.groups < last
                more2 = number + 2 * cut.groups < last
                more3 = number + 3 * cut.groups < last
                v0, w0 = MAPPED(x, a, y, k0, h)
                v1, w1 = MAPPED(x, a, y, k1 if more1 else k0, h)
                v2, w2 = MAPPED(x, a, y, k2 if more2 else k0, h)
                v3, w3 = MAPPED(x, a, y, k3 if more3 else k0, h)
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
                number += 4 * cut.groups
                k0, i0 = after(cut, k3, i3)


# --- how an array is shared out ---------------------------------------------------------------------------------------


def plan(samples: int, channels: int, spatial: int) -> Cut:
    """Share out an array of (samples, channels, spatial), none of them 0."""
    values = samples * spatial
    lanes = _power_of_two(min(channels, -(-LINE // spatial)))
    groups = THREADS // lanes
    tiles = -(-channels // lanes)
    slices = max(1, min(TASKS // tiles, values // (groups * LEAST)))
    length = -(-values // (slices * groups)) * groups
    slices = -(-values // length)
    return Cut(
        channels=channels,
        spatial=spatial,
        values=values,
        lanes=lanes,
        groups=groups,
        tiles=tiles,
        slices=slices,
        length=length,
        jump=groups // spatial * channels * spatial + groups % spatial,
        rest=groups % spatial,
        wrap=(channels - 1) * spatial,
        beside=THREADS // min(THREADS, _power_of_two(slices)),
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


# --- from the kernels to launches -------------------------------------------------------------------------------------


class BatchNormCUDA:
    """The BatchNorm of one dtype and one set of flags, forward and backward, in training or not."""

    def __init__(
        self,
        backend: CUDA,
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

        x, residual, out : 1-D, (samples, channels, spatial) in memory; in training not empty.
        channelwise : (gamma, beta, running_mean, running_var), any of them None.
        over : of no concern here.
        """
        backend, unused = self._backend, self._unused
        channels = shape[1]
        cut, cuts = self._cut(shape)
        coefficients = backend.xp.empty(channels * COEFFICIENTS, self._dtype)
        stats = backend.xp.empty(2 * channels, np.float64)
        gamma, beta, mean, var = channelwise
        partials = unused(np.float64)
        if training:
            partials = backend.xp.empty(2 * cut.slices * channels, np.float64)
            gather = self._gather(backward=False)
            backend.launch(gather, cut.tiles * cut.slices, x, unused(), unused(), cuts, coefficients, partials)
        backend.launch(
            self._finish(training, gamma=gamma is not None, beta=beta is not None, tracked=mean is not None),
            -(-channels // cut.beside),
            cuts,
            partials,
            unused() if gamma is None else gamma,
            unused() if beta is None else beta,
            eps,
            weight,
            unused() if mean is None else mean,
            unused() if var is None else var,
            coefficients,
            stats,
        )
        if x.size:
            streams = (x, unused() if residual is None else residual, unused())
            spread = self._spread(backward=False)
            backend.launch(spread, cut.tiles * cut.slices, *streams, cuts, coefficients, out, unused())
        return coefficients, stats.reshape(2, channels)

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
        over : of no concern here.
        """
        backend, unused = self._backend, self._unused
        cut, cuts = self._cut(shape)
        coefficients, stats = saved
        gamma, dgamma, dbeta = channelwise
        dx, other = outputs
        streams = (x, dy, unused() if y is None else y)
        # What is empty has gradients all the same: those of one slice whose sums are 0.
        partials = (backend.xp.empty if x.size else backend.xp.zeros)(2 * cut.slices * shape[1], np.float64)
        tasks = cut.tiles * cut.slices
        if x.size:
            backend.launch(self._gather(backward=True), tasks, *streams, cuts, coefficients, partials)
        backend.launch(
            self._finish_slopes(training, gamma=gamma is not None),
            -(-shape[1] // cut.beside),
            cuts,
            partials,
            unused() if gamma is None else gamma,
            stats.reshape(-1),
            dgamma,
            dbeta,
            coefficients,
        )
        if x.size:
            second = unused() if other is None else other
            backend.launch(self._spread(backward=True), tasks, *streams, cuts, coefficients, dx, second)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _unused(self, dtype: Any = None) -> Array:
        return self._backend.unused(self._dtype if dtype is None else dtype)

    def _cut(self, shape: tuple[int, int, int]) -> tuple[Cut, Array]:
        """How an array is shared out, and the same on the device, where that of a shape seen before still is."""
        cuts = self._shared.setdefault("cuts", {})
        if shape not in cuts:
            if len(cuts) >= 256:
                cuts.clear()
            samples, channels, spatial = shape
            cut = plan(max(1, samples), channels, max(1, spatial))
            cuts[shape] = cut, self._backend.upload(np.array(cut, np.int64))
        found: tuple[Cut, Array] = cuts[shape]
        return found

    # --- kernels ------------------------------------------------------------------------------------------------------

    def _gather(self, *, backward: bool) -> Any:
        flags = self._flags if backward else {}  # the sums of the statistics are the same for all
        formulas, kind = self._formulas, self._dtype.type
        constants = {
            **self._walk(backward=backward),
            "TERMS": formulas.slopes if backward else formulas.deviation,
            "HYPER": formulas.Moments if backward else formulas.Shift,
            "UNPACK_HYPER": unpacking(len(formulas.Moments._fields)),
            "GUARDED": self._dtype.itemsize < 8,  # where the data is float64 there is nothing wider to go to
            "LARGEST": float(np.finfo(self._dtype).max),
        }
        if not backward:
            constants |= {"READS_A": False, "READS_Y": False}
        return self._kernel(
            gather,
            ("backward" if backward else "forward", *flags.items()),
            constants,
            {"TOTALS": (totals, {"ACC": kind}), "WIDE_TOTALS": (totals, {"ACC": np.float64})},
        )

    def _finish(self, training: bool, *, gamma: bool, beta: bool, tracked: bool) -> Any:
        constants = {"TRAINING": training, "GAMMA": gamma, "BETA": beta, "TRACKED": tracked}
        return self._kernel(finish_statistics, tuple(constants.items()), {**constants, **self._channelwise()}, {})

    def _finish_slopes(self, training: bool, *, gamma: bool) -> Any:
        constants = {"TRAINING": training, "GAMMA": gamma}
        return self._kernel(finish_slopes, tuple(constants.items()), {**constants, **self._channelwise()}, {})

    def _spread(self, *, backward: bool) -> Any:
        formulas, flags = self._formulas, self._flags
        hyper = formulas.Slope if backward else formulas.Affine
        constants = {
            **self._walk(backward=backward),
            "MAP": formulas.gradient if backward else formulas.normalise,
            "HYPER": hyper,
            "UNPACK_HYPER": unpacking(len(hyper._fields)),
            "OUTPUTS": 2 if backward and flags["RELU"] and flags["RESIDUAL"] else 1,
        }
        key = ("backward" if backward else "forward", *flags.items())
        return self._kernel(spread, key, constants, {"MAPPED": (mapped, {})})

    def _walk(self, *, backward: bool) -> dict[str, Any]:
        """What the flags are to the loops over elements."""
        return {
            "BACKWARD": backward,
            "READS_A": backward or self._flags["RESIDUAL"],
            "READS_Y": backward and self._flags["RELU"] and self._flags["RESIDUAL"],
        }

    def _channelwise(self) -> dict[str, Any]:
        formulas = self._formulas
        return {
            "DTYPE": self._dtype.type,
            "LARGEST": float(np.finfo(self._dtype).max),
            "INVERSE_STD": formulas.inverse_std,
            "ROUNDING": formulas.rounding,
            "BLEND": formulas.blend,
            "GRADIENT_COEFFICIENTS": formulas.gradient_coefficients,
        }

    def _kernel(
        self,
        loop: Any,
        key: tuple[Any, ...],
        constants: dict[str, Any],
        inner: dict[str, tuple[Callable[..., Any], dict[str, Any]]],
    ) -> Any:
        """A kernel, bound once. inner : functions of its constants, and of their own, that it calls."""
        key = (loop.__name__, self._dtype, *key)
        kernel = self._shared.get(key)
        if kernel is None:
            scalars: dict[str, Any] = {**self._flags, "ZERO": self._dtype.type(0)}
            scalars["masked"] = _piece(self._formulas.masked, scalars)
            for name in ("TERMS", "MAP"):
                if name in constants:
                    constants[name] = _piece(constants[name], scalars)
            for name, (function, own) in inner.items():
                constants[name] = _piece(function, {**constants, **own})
            constants["UNPACK_CUT"] = unpacking(len(Cut._fields))
            kernel = self._backend.compiled(loop, constants, f"batchnorm_{loop.__name__}_{self._dtype.name}")
            # The simulator puts its own module in the place of `cuda` in the globals of a kernel: TREE shares them.
            names = kernel.py_func.__globals__
            names["TREE"] = device(FunctionType(tree.__code__, names, "tree"))
            self._shared[key] = kernel
        return kernel


def _piece(function: Any, constants: dict[str, Any]) -> FunctionType:
    return bind(function, constants, label=function.__name__, scalar=device)
