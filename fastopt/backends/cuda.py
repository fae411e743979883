"""The CUDA backend: the loops as grid-stride kernels. The only file that imports numba.cuda.

The rules, and what surrounds them, are those of every backend, bound as device functions. Buffers are CuPy arrays; in
numba's simulator (NUMBA_ENABLE_CUDASIM=1), where there is no device, NumPy arrays stand for them.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

if not hasattr(np, "row_stack"):  # numba-cuda 0.30 looks for it at its first compilation; NumPy 2.5 has it no more
    np.row_stack = np.vstack  # noqa: NPY201

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the deprecation of numba's own target, and NumPy's of what it imports
    from numba import config, cuda, float64, uint64

from fastopt.backends import (
    BLOCK,
    Adder,
    Array,
    Features,
    Kernel,
    StepHyper,
    clip_coefficient,
    elements,
    simulated,
)
from fastopt.backends.bind import bind

if TYPE_CHECKING:
    from fastopt.rule import Rule

T = TypeVar("T")

SIMULATED = bool(config.ENABLE_CUDASIM)
THREADS = 32 if SIMULATED else 256
"""In a block. Sums are of THREADS strided parts and then of a tree, so their bits depend on it; it is never changed."""
BLOCKS_PER_SM = 8

# --- the loops --------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies. A block of threads takes a chunk, then that a grid further.
#
# Counters are unsigned, and loops are `while`: over `range`, numba divides for the number of rounds and looks at every
# index whether it is negative. Adam's inner loop has 61 machine instructions instead of 99, 42 registers instead of 50
# (cc 9.0). An uint64 that meets an int64 becomes a float64: both are converted first.

ELEMENT: Any
APPLY: Any
RATIO: Any
SCALED: Any
HYPER: Any
FIRST: Any
FIRST_HYPER: Any
UNPACK_STEP: Any
UNPACK_HYPER: Any
UNPACK_FIRST: Any
N_STATES: Any
N_STEP: Any
N_HYPER: Any
SCATTERED: Any
ZERO_GRAD: Any
ZERO: Any
EMA: Any
AVERAGED: Any
CONDITIONED: Any
UNSCALED: Any
NUMBERED: Any
MEASURE: Any
FRESH: Any
STEP: Any
DTYPE: Any
SUMS: Any
SPAN_SUMS: Any
CLIP_COEFFICIENT: Any
CLIPS: Any
SKIPS: Any
CHOOSES: Any
COEFFICIENT: Any
PROCEEDS: Any
GATED: Any


def elementwise(p, g, a, b, c3, d, e, table, chunks):
    """Update every chunk by a rule whose every element stands alone. Of the states only the first N_STATES are used."""
    c = uint64(cuda.blockIdx.x)
    n = uint64(chunks.shape[0])
    while c < n:
        i = uint64(chunks[c, 0]) + uint64(cuda.threadIdx.x)
        stop = uint64(chunks[c, 1])
        j = uint64(chunks[c, 4]) + uint64(cuda.threadIdx.x)  # where the gradient is, if scattered
        stride = uint64(cuda.blockDim.x)
        row = chunks[c, 2]
        step = StepHyper(*UNPACK_STEP(table, row, 0))
        own = HYPER(*UNPACK_HYPER(table, row, N_STEP))
        if FIRST:  # noqa: SIM108 a branch is pruned, an expression is not
            h = (own, FIRST_HYPER(*UNPACK_FIRST(table, row, N_STEP + N_HYPER)))
        else:
            h = own
        while i < stop:
            at = j if SCATTERED else i
            if N_STATES == 0:
                p[i] = ELEMENT(step, p[i], g[at], h)
            elif N_STATES == 1:
                p[i], a[i] = ELEMENT(step, p[i], g[at], a[i], h)
            elif N_STATES == 2:
                p[i], a[i], b[i] = ELEMENT(step, p[i], g[at], a[i], b[i], h)
            elif N_STATES == 3:
                p[i], a[i], b[i], c3[i] = ELEMENT(step, p[i], g[at], a[i], b[i], c3[i], h)
            elif N_STATES == 4:
                p[i], a[i], b[i], c3[i], d[i] = ELEMENT(step, p[i], g[at], a[i], b[i], c3[i], d[i], h)
            else:
                p[i], a[i], b[i], c3[i], d[i], e[i] = ELEMENT(step, p[i], g[at], a[i], b[i], c3[i], d[i], e[i], h)
            if ZERO_GRAD:
                g[at] = ZERO
            i += stride
            j += stride
        c += uint64(cuda.gridDim.x)


def block_sums(left, right):
    """The sums of what the threads of a block have put into two arrays, in their first elements.

    A tree, so that the bits are the same every time.
    """
    cuda.syncthreads()
    width = cuda.blockDim.x // 2
    while width > 0:
        if cuda.threadIdx.x < width:
            left[cuda.threadIdx.x] += left[cuda.threadIdx.x + width]
            right[cuda.threadIdx.x] += right[cuda.threadIdx.x + width]
        cuda.syncthreads()
        width //= 2


def squares(g, table, chunks, partials):
    """The sum of the squares of each block's gradients; and 0, or NaN where one of them is not finite."""
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, DTYPE)
    c = uint64(cuda.blockIdx.x)
    n = uint64(chunks.shape[0])
    while c < n:
        i = uint64(chunks[c, 0]) + uint64(cuda.threadIdx.x)
        stop = uint64(chunks[c, 1])
        step = StepHyper(*UNPACK_STEP(table, chunks[c, 2], 0))
        s = 0.0
        bad = ZERO
        while i < stop:
            given = g[i]
            x = float64(CONDITIONED(step, given))
            s += x * x
            u = UNSCALED(step, given)
            bad += u - u
            i += uint64(cuda.blockDim.x)
        total[cuda.threadIdx.x] = s
        marks[cuda.threadIdx.x] = bad
        SUMS(total, marks)
        if cuda.threadIdx.x == 0:
            partials[chunks[c, 4], 0] = total[0]
            partials[chunks[c, 4], 1] = marks[0]
        cuda.syncthreads()
        c += uint64(cuda.gridDim.x)


def add(more, offset, weight, g, chunks, partials):
    """Add weight times `more` to its parameter's part of g, and measure what is there then."""
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, DTYPE)
    factor = weight[0]
    c = uint64(cuda.blockIdx.x)
    n = uint64(chunks.shape[0])
    while c < n:
        i = uint64(chunks[c, 0]) + uint64(cuda.threadIdx.x)
        stop = uint64(chunks[c, 1])
        k = uint64(chunks[c, 0] - offset) + uint64(cuda.threadIdx.x)
        s = 0.0
        bad = ZERO
        while i < stop:
            new = factor * more[k]
            if not FRESH:
                new = g[i] + new
            g[i] = new
            if MEASURE:
                x = float64(CONDITIONED(STEP, new))
                s += x * x
                bad += new - new
            i += uint64(cuda.blockDim.x)
            k += uint64(cuda.blockDim.x)
        if MEASURE:
            total[cuda.threadIdx.x] = s
            marks[cuda.threadIdx.x] = bad
            SUMS(total, marks)
            if cuda.threadIdx.x == 0:
                partials[chunks[c, 4], 0] = total[0]
                partials[chunks[c, 4], 1] = marks[0]
            cuda.syncthreads()
        c += uint64(cuda.gridDim.x)


def propose(p, g, a, b, table, chunks, partials):
    """First pass of a layerwise rule: update the states, and sum the squares of p and of the proposed update u."""
    of_p = cuda.shared.array(THREADS, float64)
    of_u = cuda.shared.array(THREADS, float64)
    c = uint64(cuda.blockIdx.x)
    n = uint64(chunks.shape[0])
    while c < n:
        i = uint64(chunks[c, 0]) + uint64(cuda.threadIdx.x)
        stop = uint64(chunks[c, 1])
        row = chunks[c, 2]
        step = StepHyper(*UNPACK_STEP(table, row, 0))
        h = HYPER(*UNPACK_HYPER(table, row, N_STEP))
        pp = 0.0
        uu = 0.0
        while i < stop:
            x = p[i]
            if N_STATES == 1:
                u, a[i] = ELEMENT(step, x, g[i], a[i], h)
            else:
                u, a[i], b[i] = ELEMENT(step, x, g[i], a[i], b[i], h)
            if ZERO_GRAD:
                g[i] = ZERO
            pp += float64(x) * float64(x)
            uu += float64(u) * float64(u)
            i += uint64(cuda.blockDim.x)
        of_p[cuda.threadIdx.x] = pp
        of_u[cuda.threadIdx.x] = uu
        SUMS(of_p, of_u)
        if cuda.threadIdx.x == 0:
            partials[chunks[c, 4], 0] = of_p[0]
            partials[chunks[c, 4], 1] = of_u[0]
        cuda.syncthreads()
        c += uint64(cuda.gridDim.x)


def span_sums(spans, k, left, left_column, right, right_column, of_left, of_right):
    """The sums of a parameter's partial sums, in of_left[0] and of_right[0]."""
    s = 0.0
    t = 0.0
    for block in range(spans[k, 2] + cuda.threadIdx.x, spans[k, 3], cuda.blockDim.x):
        s += left[block, left_column]
        t += right[block, right_column]
    of_left[cuda.threadIdx.x] = s
    of_right[cuda.threadIdx.x] = t
    SUMS(of_left, of_right)


def merge(spans, partials, ratios):
    """Leave the trust ratio of each parameter in ratios[param]."""
    of_p = cuda.shared.array(THREADS, float64)
    of_u = cuda.shared.array(THREADS, float64)
    for k in range(cuda.blockIdx.x, spans.shape[0], cuda.gridDim.x):
        SPAN_SUMS(spans, k, partials, 0, partials, 1, of_p, of_u)
        if cuda.threadIdx.x == 0:
            ratios[spans[k, 0]] = RATIO(math.sqrt(of_p[0]), math.sqrt(of_u[0]))
        cuda.syncthreads()


def settle(spans, table, pp, gg, numbers, rows):
    """Take the scale of each parameter, and give it a row of its own with that scale in it."""
    of_p = cuda.shared.array(THREADS, float64)
    of_g = cuda.shared.array(THREADS, float64)
    for k in range(cuda.blockIdx.x, spans.shape[0], cuda.gridDim.x):
        SPAN_SUMS(spans, k, pp, 0, gg, 0, of_p, of_g)
        if cuda.threadIdx.x == 0:
            param = spans[k, 0]
            row = spans[k, 1]
            number = 0.0
            if NUMBERED:
                number = numbers[param]
            for column in range(table.shape[1]):
                rows[param, column] = table[row, column]
            step = StepHyper(*UNPACK_STEP(table, row, 0))
            h = HYPER(*UNPACK_HYPER(table, row, N_STEP))
            norm_p = float64(math.sqrt(of_p[0]))  # in the simulator math.sqrt returns a Python float, which is weaker
            norm_g = float64(math.sqrt(of_g[0]))
            if NUMBERED:
                rows[param, table.shape[1] - 1], number = SCALED(step, norm_p, norm_g, number, h)
                if GATED:
                    number = numbers[param] if step.proceeds == ZERO else number
                numbers[param] = number
            else:
                rows[param, table.shape[1] - 1] = SCALED(step, norm_p, norm_g, h)
        cuda.syncthreads()


def judge(partials, factor, max_norm, known, candidates, skipped, table, told):
    """Leave in `told` the norm of gradients, the coefficient that clips them, and whether all are finite; and put into
    the table what follows from it. One block.

    With SKIPS, `skipped` is how many steps were left out; with CHOOSES, the table is the candidate for that number.
    """
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, float64)
    s = 0.0
    bad = 0.0
    for block in range(cuda.threadIdx.x, partials.shape[0], cuda.blockDim.x):
        s += partials[block, 0]
        bad += partials[block, 1]
    total[cuda.threadIdx.x] = s
    marks[cuda.threadIdx.x] = bad
    SUMS(total, marks)
    norm = factor * math.sqrt(total[0])
    finite = 1.0 if marks[0] == 0.0 else 0.0
    coefficient = 1.0
    if CLIPS:
        coefficient = CLIP_COEFFICIENT(norm, max_norm)
    behind = 0
    if SKIPS:
        behind = skipped[0] - known
    for row in range(cuda.threadIdx.x, table.shape[0], cuda.blockDim.x):
        if CHOOSES:
            for column in range(table.shape[1]):
                table[row, column] = candidates[behind, row, column]
        table[row, COEFFICIENT] = coefficient
        if SKIPS:
            table[row, PROCEEDS] = finite
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        told[0] = norm
        told[1] = coefficient
        told[2] = finite
        if SKIPS and finite == 0.0:
            skipped[0] += 1


def gather(grads, order, starts, sums):
    """Leave in each row of `sums` the sum of a run of rows of `grads`, in the order of the run."""
    run = uint64(cuda.blockIdx.x)
    n = uint64(sums.shape[0])
    while run < n:
        column = uint64(cuda.threadIdx.x)
        while column < uint64(sums.shape[1]):
            s = ZERO
            for k in range(starts[run], starts[run + uint64(1)]):
                s += grads[order[k], column]
            sums[run, column] = s
            column += uint64(cuda.blockDim.x)
        run += uint64(cuda.gridDim.x)


def apply(p, ratios, a, b, e, table, chunks):
    """Second pass of a layerwise rule: move p by the proposed update, scaled by its parameter's ratio."""
    c = uint64(cuda.blockIdx.x)
    n = uint64(chunks.shape[0])
    while c < n:
        i = uint64(chunks[c, 0]) + uint64(cuda.threadIdx.x)
        stop = uint64(chunks[c, 1])
        row = chunks[c, 2]
        step = StepHyper(*UNPACK_STEP(table, row, 0))
        h = HYPER(*UNPACK_HYPER(table, row, N_STEP))
        ratio = DTYPE(ratios[chunks[c, 3]])
        if GATED:
            stop = i if step.proceeds == ZERO else stop
        while i < stop:
            if N_STATES == 1:
                p[i] = APPLY(p[i], a[i], ratio, h)
            else:
                p[i] = APPLY(p[i], a[i], b[i], ratio, h)
            if EMA:
                e[i] = AVERAGED(step, p[i], e[i])
            i += uint64(cuda.blockDim.x)
        c += uint64(cuda.gridDim.x)


# --- from a loop to a kernel ------------------------------------------------------------------------------------------


def device(function: FunctionType) -> Any:
    """Compile a scalar function for the device; never fastmath, which is flush-to-zero, too, on CUDA."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def unpacking(size: int) -> Callable[..., tuple[Any, ...]]:
    """A function ``(table, row, first)`` that returns `size` numbers of a row as a tuple."""
    if size == 0:
        return _none
    if size == 1:
        return _one
    half = size // 2
    left, right = unpacking(half), unpacking(size - half)

    def unpack(table, row, first):
        return left(table, row, first) + right(table, row, first + half)

    return unpack


def _none(table, row, first):
    return ()


def _one(table, row, first):
    return (table[row, first],)


class Chunks(NamedTuple):
    """A table of chunks on the device."""

    lines: Array
    by_param: Array
    """The same with the parameter for the row of the table."""
    spans: Array
    """A line (parameter, row, first block, end) for each parameter."""
    blocks: int
    parameters: int
    """One more than the number of the last one."""


def cut(chunks: np.ndarray) -> np.ndarray:
    """The same chunks in pieces of at most BLOCK elements: as many as a block of threads is to take at once."""
    pieces = -(-(chunks[:, 1] - chunks[:, 0]) // BLOCK)
    lines = np.repeat(chunks, pieces, axis=0)
    number = np.arange(len(lines)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    lines[:, 0] += number * BLOCK
    lines[:, 1] = np.minimum(lines[:, 0] + BLOCK, lines[:, 1])
    lines[:, 4] += number
    return lines


def spans_of(lines: np.ndarray) -> np.ndarray:
    """The parameters of chunks that were made with ``layerwise=True``, and where their blocks are."""
    first = np.flatnonzero(np.diff(lines[:, 3], prepend=-1))
    last = np.append(first[1:], len(lines)) - 1
    return np.stack([lines[first, 3], lines[first, 2], lines[first, 4], lines[last, 4] + 1], 1)


class Lately(Generic[T]):
    """What was made of arrays of the host that are given again and again, by the array: the latest 64."""

    def __init__(self) -> None:
        self._found: OrderedDict[int, tuple[np.ndarray, T]] = OrderedDict()

    def find(self, array: np.ndarray) -> T | None:
        """What was made of this array."""
        found = self._found.get(id(array))
        if found is None:
            return None
        self._found.move_to_end(id(array))
        return found[1]

    def add(self, array: np.ndarray, made: T) -> T:
        """Keep what was made of an array; and the array, whose id is else given to another."""
        self._found[id(array)] = (array, made)
        if len(self._found) > 64:
            self._found.popitem(last=False)
        return made


class Told:
    """As `fastopt.backends.Verdict`."""

    def __init__(self, backend: CUDA, told: Array):
        self._backend = backend
        self._told = told
        self._event: Any = None
        self._sent: Any = None

    def send(self) -> None:
        """As `fastopt.backends.Verdict`: a copy to pinned memory, and an event after it."""
        xp = self._backend.xp
        self._sent = self._backend.pinned(3)
        self._told.get(out=self._sent, blocking=False)
        self._event = xp.cuda.Event(disable_timing=True)
        self._event.record()

    @property
    def arrived(self) -> bool:
        """As `fastopt.backends.Verdict`."""
        return self._event is not None and bool(self._event.done)

    def read(self) -> tuple[float, float, bool]:
        """As `fastopt.backends.Verdict`."""
        if self._event is None:
            found = self._backend.host(self._told)
        else:
            self._event.synchronize()
            found = self._sent
        norm, coefficient, finite = found.tolist()
        return norm, coefficient, finite == 1.0


class CUDA:
    """The CUDA backend."""

    name = "cuda"
    asynchronous = True

    xp: Any
    """CuPy, or what stands for it in the simulator."""
    pinned: Callable[[int], np.ndarray]
    """An array on the host to which a device can write at any time."""

    def __init__(self) -> None:
        """No device need be there before `connect`: kernels can be bound, and compiled to PTX, without one."""
        self._kernels: dict[tuple[Any, ...], Any] = {}
        self._chunks: Lately[Chunks] = Lately()
        self._tables: Lately[Array] = Lately()
        self._recorded: list[Any] = []
        self._configured: dict[tuple[Any, ...], Any] = {}
        self._most_blocks = 4

    def connect(self) -> CUDA:
        """Find a device, and CuPy to hold its memory. Raises RuntimeError, with the reason, where CUDA cannot work."""
        self.xp, self.pinned = _array_module()
        if not SIMULATED:
            self._most_blocks = BLOCKS_PER_SM * cuda.get_current_device().MULTIPROCESSOR_COUNT
        return self

    # --- memory -------------------------------------------------------------------------------------------------------

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Array:
        """A 1-D buffer of zeros; CuPy aligns to 512 bytes."""
        return self.xp.zeros(size, dtype)

    def empty(self, shape: Any, dtype: Any = np.float64) -> Array:
        """As `fastopt.backends.Backend`."""
        return self.keep(self.xp.empty(shape, dtype))

    def unused(self, dtype: Any) -> Array:
        """What is passed for an array that a kernel does not look at. (The simulator copies all back after a launch, so
        that it must be none that is passed twice.)"""
        return self.empty(1, dtype)

    def upload(self, array: Any) -> Array:
        """A copy of a NumPy array on the device; an array that is there already as it is."""
        return self.xp.asarray(array)

    def table(self, table: Any) -> Array:
        """As `fastopt.backends.Backend`; while launches are recorded, the place alone: its content is sent later."""
        if not isinstance(table, np.ndarray) or isinstance(table, self.xp.ndarray):
            return table
        place = self._tables.find(table)
        if self.capturing():
            if place is None:
                raise RuntimeError("step() is captured before there was one: make one ordinary step like it first")
            return self.keep(place)
        if place is None:
            place = self._tables.add(table, self.xp.empty(table.shape, table.dtype))
        place[...] = self.upload(table)
        return place

    def keep(self, array: Array) -> Array:
        """An array that is not given back while launches are recorded: what was recorded may be run at any time."""
        if self.capturing():
            self._recorded.append(array)
        return array

    def capturing(self) -> bool:
        """As `fastopt.backends.Backend`."""
        return bool(self.xp.cuda.get_current_stream().is_capturing())

    def chunks(self, chunks: np.ndarray) -> Chunks:
        """A table of chunks on the device; that of a table seen lately is kept."""
        found = self._chunks.find(chunks)
        if found is not None:
            return self.keep(found)
        if self.capturing():
            raise RuntimeError("step() is captured before there was one like it: make an ordinary step first")
        lines = cut(chunks)
        by_param = lines.copy()
        by_param[:, 2] = lines[:, 3]
        made = Chunks(
            self.upload(lines),
            self.upload(by_param),
            self.upload(spans_of(lines)),
            int(lines[-1, 4]) + 1 if len(lines) else 0,
            int(lines[:, 3].max(initial=-1)) + 1,
        )
        return self._chunks.add(chunks, made)

    # --- kernels ------------------------------------------------------------------------------------------------------

    def kernel(
        self,
        rule: Rule,
        hyper: type,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], type] | None = None,
    ) -> Kernel:
        """As `fastopt.backends.Backend`."""
        key = (rule, hyper, dtype, features, first)
        if key not in self._kernels:
            self._kernels[key] = self._bind(rule, hyper, dtype, features, first)
        kernel: Kernel = self._kernels[key]
        return kernel

    def norm(self, dtype: np.dtype[Any], features: Features) -> SquaresKernel:
        """As `fastopt.backends.Backend`."""
        key = ("norm", dtype, features)
        if key not in self._kernels:
            constants = {"DTYPE": dtype.type, **_unpackings(0, 0), **elements.conditioning(dtype, features, device)}
            self._kernels[key] = SquaresKernel(self, self.compiled(squares, constants, f"squares_{dtype.name}"))
        kernel: SquaresKernel = self._kernels[key]
        return kernel

    def judged(
        self,
        table: Array,
        candidates: np.ndarray | None,
        partials: Array,
        factor: float,
        max_norm: float | None,
        skipped: tuple[Array, int] | None,
    ) -> Told:
        """As `fastopt.backends.Backend`."""
        flags = {"CLIPS": max_norm is not None, "SKIPS": skipped is not None, "CHOOSES": candidates is not None}
        key = ("judge", table.dtype, *flags.values())
        if key not in self._kernels:
            columns = {name.upper(): StepHyper._fields.index(name) for name in ("coefficient", "proceeds")}
            constants = {"CLIP_COEFFICIENT": clip_coefficient, **columns, **flags}
            self._kernels[key] = self.compiled(judge, constants, "judge")
        told = self.empty(3)
        counted, known = (self.unused(np.int64), 0) if skipped is None else skipped
        possible = self.empty((1, 1, 1), table.dtype) if candidates is None else self.upload(candidates)
        limit = 0.0 if max_norm is None else float(max_norm)
        self.launch(self._kernels[key], 1, partials, float(factor), limit, known, possible, counted, table, told)
        return Told(self, told)

    def add(
        self,
        g: Array,
        arrays: list[Array | None],
        offsets: Array,
        fresh: Array,
        weight: float,
        chunks: np.ndarray,
        partials: Array,
        adder: Adder,
    ) -> None:
        """As `fastopt.backends.Backend`; a launch for each array."""
        weights = self.upload(np.array([weight], g.dtype))
        for param, array in enumerate(arrays):
            own = chunks[chunks[:, 3] == param]
            if array is None or len(own) == 0:
                continue
            kernel = self._adding(g.dtype, adder, bool(fresh[param]))
            more = self.xp.ascontiguousarray(array).reshape(-1)
            lines = self.upload(cut(own))
            self.launch(kernel, len(lines), more, int(offsets[param]), weights, g, lines, partials)

    def sum_rows(self, grads: Array, order: np.ndarray, starts: np.ndarray) -> Array:
        """As `fastopt.backends.Backend`."""
        key = ("gather", grads.dtype)
        if key not in self._kernels:
            self._kernels[key] = self.compiled(gather, {"ZERO": grads.dtype.type(0)}, f"gather_{grads.dtype.name}")
        sums = self.empty((len(starts), grads.shape[1]), grads.dtype)
        ends = self.upload(np.append(starts, len(order)))
        self.launch(self._kernels[key], len(starts), grads, self.upload(order), ends, sums)
        return sums

    def _adding(self, dtype: np.dtype[Any], adder: Adder, fresh: bool) -> Any:
        key = ("add", dtype, adder, fresh)
        if key not in self._kernels:
            features = Features(zero_nonfinite=adder.zero_nonfinite)
            constants = {
                "DTYPE": dtype.type,
                "MEASURE": adder.measure,
                "FRESH": fresh,
                "STEP": StepHyper(*[0.0] * len(StepHyper._fields)),  # not looked at: none of its features is on
                **elements.conditioning(dtype, features, device),
            }
            self._kernels[key] = self.compiled(add, constants, f"add_{dtype.name}")
        return self._kernels[key]

    def batchnorm(self, formulas: ModuleType, dtype: np.dtype[Any], *, relu: bool, residual: bool) -> Any:
        """As `fastopt.backends.Backend`."""
        from fastopt.backends.cuda_batchnorm import BatchNormCUDA  # loaded by those who use it

        key = ("batchnorm", dtype, relu, residual)
        if key not in self._kernels:
            shared = self._kernels.setdefault(("batchnorm",), {})  # what BatchNorms of different flags have in common
            flags = {"RELU": relu, "RESIDUAL": residual}
            self._kernels[key] = BatchNormCUDA(self, formulas, dtype, flags, shared)
        return self._kernels[key]

    def _bind(
        self,
        rule: Rule,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], Any] | None,
    ) -> Kernel:
        # What numba infers for the host holds for the device; this needs no device.
        on_host = elements.scalar(bind(rule.scalar, {}, label=f"{rule.name}_{dtype}", scalar=elements.scalar))
        elements.check_rule(rule, on_host, hyper, dtype)
        compiled = device(bind(rule.scalar, {}, label=f"{rule.name}_{dtype}", scalar=device))
        constants, label = elements.surrounded(rule, compiled, hyper, dtype, features, first, device)
        constants |= _unpackings(len(hyper._fields), 0 if first is None else len(first[1]._fields))
        constants |= {"DTYPE": dtype.type, "SCATTERED": features.scattered}
        n_states = len(rule.states)
        if rule.layerwise is not None:
            return LayerwiseKernel(
                self,
                n_states,
                self.compiled(propose, constants, f"propose_{label}"),
                self.compiled(merge, {"RATIO": rule.layerwise.ratio}, f"merge_{label}"),
                self.compiled(
                    apply, {**constants, "APPLY": rule.layerwise.apply, "EMA": features.ema}, f"apply_{label}"
                ),
            )
        update = ElementwiseKernel(self, self.compiled(elementwise, constants, label), features.scattered)
        if rule.scaling is None:
            return update
        numbered = rule.scaling.number is not None
        settling = {
            **constants,
            "SCALED": elements.scaled_by(rule.scaling, features, device),
            "NUMBERED": numbered,
        }
        norms = (self.norm(dtype, Features()), self.norm(dtype, features.of_norm()))
        return ScaledKernel(self, norms, self.compiled(settle, settling, f"settle_{label}"), update, numbered)

    def compiled(self, loop: Callable[..., None], constants: dict[str, Any], label: str) -> Any:
        """A loop bound to its constants, to be compiled at its first launch: before that no device need be there."""
        bound = bind(loop, constants, label=label, scalar=device)
        # The simulator puts its own module in the place of `cuda` in the globals of a kernel while it runs: these
        # functions share them.
        for name, helper in (("SUMS", block_sums), ("SPAN_SUMS", span_sums)):
            shared = FunctionType(helper.__code__, bound.__globals__, name)
            bound.__globals__[name] = device(shared)
        return cuda.jit(bound)

    def launch(self, kernel: Any, blocks: int, *arguments: Any) -> None:
        """Run a kernel on CuPy's current stream."""
        if blocks == 0:
            return
        grid = min(blocks, self._most_blocks)
        if SIMULATED:
            if self.capturing():
                simulated.cuda.recorded.append(partial(self.launch, kernel, blocks, *arguments))
                return
            bare = [a.view(np.ndarray) if isinstance(a, simulated.ndarray) else a for a in arguments]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy's, of infinities and NaN
                kernel[grid, THREADS](*bare)
            return
        stream = self.xp.cuda.get_current_stream().ptr
        key = (kernel, grid, stream)
        configured = self._configured.get(key)
        if configured is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the grid is small
                configured = self._configured[key] = kernel[grid, THREADS, cuda.external_stream(stream)]
        # Converted here, because numba would wait for CuPy's stream, on which the kernel is launched anyway.
        configured(*[cuda.as_cuda_array(a, sync=False) if isinstance(a, self.xp.ndarray) else a for a in arguments])

    def host(self, array: Array) -> np.ndarray:
        """A NumPy copy of an array on the device; waits for it."""
        found: np.ndarray = self.xp.asnumpy(array)
        return found

    def adopt(self, leaf: Any) -> Array | None:
        """As `fastopt.backends.Backend`: arrays of the device as they are, NumPy's uploaded."""
        if isinstance(leaf, np.ndarray | self.xp.ndarray) or hasattr(leaf, "__cuda_array_interface__"):
            return self.xp.asarray(leaf)
        return None

    def copy(self, to: Array, source: Array) -> None:
        """As `fastopt.backends.Backend`."""
        to[...] = self.xp.asarray(source, to.dtype)

    def address(self, array: Array) -> int:
        """As `fastopt.backends.Backend`."""
        address: int = array.__cuda_array_interface__["data"][0]
        return address

    @property
    def overlap(self) -> Callable[[Array, Array], bool]:
        """As `fastopt.backends.Backend`."""
        share: Callable[[Array, Array], bool] = self.xp.may_share_memory
        return share

    @property
    def array_type(self) -> Any:
        """As `fastopt.backends.Backend`."""
        return self.xp.ndarray


def _unpackings(n_hyper: int, n_first: int) -> dict[str, Any]:
    return {
        "N_STEP": len(StepHyper._fields),
        "UNPACK_STEP": unpacking(len(StepHyper._fields)),
        "UNPACK_HYPER": unpacking(n_hyper),
        "UNPACK_FIRST": unpacking(n_first),
    }


def _array_module() -> tuple[ModuleType, Callable[[int], np.ndarray]]:
    """CuPy, and how it allocates pinned memory."""
    if SIMULATED:
        return simulated, np.empty
    if not cuda.is_available():
        raise RuntimeError(
            "backend='cuda': numba finds no CUDA device and driver here; `fastopt info` tells more; use backend='cpu'"
        )
    try:
        import cupy
        import cupyx
    except ImportError:
        raise RuntimeError(
            "backend='cuda': CuPy, which holds the buffers, is not installed; pip install 'fastopt[cuda13]'"
        ) from None
    return cupy, cupyx.empty_pinned


class ElementwiseKernel:
    """The update of one rule in one pass."""

    def __init__(self, backend: CUDA, kernel: Any, scattered: bool):
        self._backend = backend
        self._kernel = kernel
        self._scattered = scattered

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: np.ndarray, chunks: np.ndarray) -> None:
        """As `fastopt.backends.Kernel`."""
        backend = self._backend
        if self._scattered:  # made for this one launch
            self.launch_on(p, g, states, backend.upload(table), backend.upload(chunks))
        else:
            self.launch_on(p, g, states, backend.table(table), backend.chunks(chunks).lines)

    def launch_on(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, lines: Array) -> None:
        """The same, with a table and chunks that are on the device."""
        unused = [self._backend.unused(p.dtype)] * (elements.MAX_STATES + 1 - len(states))
        self._backend.launch(self._kernel, lines.shape[0], p, g, *states, *unused, table, lines)


class LayerwiseKernel:
    """The update of a rule that scales each parameter's step by norms: two passes and a merge between them."""

    def __init__(self, backend: CUDA, n_states: int, propose: Any, merge: Any, apply: Any):
        self._backend = backend
        self._n_states = n_states
        self._propose = propose
        self._merge = merge
        self._apply = apply

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: np.ndarray, chunks: np.ndarray) -> None:
        """As `fastopt.backends.Kernel`."""
        backend = self._backend
        found = backend.chunks(chunks)
        if found.blocks == 0:
            return
        unused = backend.unused(p.dtype)
        own = states[: self._n_states]
        a, b = (*own, unused) if len(own) == 1 else own
        e = states[self._n_states] if len(states) > self._n_states else unused
        on_device = backend.table(table)
        partials = backend.empty((found.blocks, 2))
        ratios = backend.empty(found.parameters)
        backend.launch(self._propose, len(found.lines), p, g, a, b, on_device, found.lines, partials)
        backend.launch(self._merge, len(found.spans), found.spans, partials, ratios)
        backend.launch(self._apply, len(found.lines), p, ratios, a, b, e, on_device, found.lines)


class ScaledKernel:
    """The update of a rule whose h depends on norms: one pass over p and one over g, then the update."""

    def __init__(
        self,
        backend: CUDA,
        norms: tuple[SquaresKernel, SquaresKernel],
        settle: Any,
        update: ElementwiseKernel,
        numbered: bool,
    ):
        """norms : of p, and of g. numbered : whether the last of the states is the rule's number per parameter."""
        self._backend = backend
        self._of_p, self._of_g = norms
        self._settle = settle
        self._update = update
        self._numbered = numbered

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: np.ndarray, chunks: np.ndarray) -> None:
        """As `fastopt.backends.Kernel`."""
        backend = self._backend
        found = backend.chunks(chunks)
        if found.blocks == 0:
            return
        on_device = backend.table(table)
        pp = self._of_p.launch_on(p, on_device, found)
        gg = self._of_g.launch_on(g, on_device, found)
        rows = backend.empty((found.parameters, table.shape[1]), table.dtype)
        states, numbers = (states[:-1], states[-1]) if self._numbered else (states, backend.unused(np.float64))
        backend.launch(self._settle, len(found.spans), found.spans, on_device, pp, gg, numbers, rows)
        self._update.launch_on(p, g, states, rows, found.by_param)


class SquaresKernel:
    """The norm of gradients, and whether all of them are finite."""

    def __init__(self, backend: CUDA, kernel: Any):
        self._backend = backend
        self._kernel = kernel

    def launch(self, g: Array, table: np.ndarray, chunks: np.ndarray) -> Array:
        """As `fastopt.backends.NormKernel`."""
        return self.launch_on(g, self._backend.table(table), self._backend.chunks(chunks))

    def launch_on(self, g: Array, table: Array, found: Chunks) -> Array:
        """The same, with a table that is on the device, where the sums stay, too."""
        partials = self._backend.empty((found.blocks, 2))
        self._backend.launch(self._kernel, len(found.lines), g, table, found.lines, partials)
        return partials
