"""The CUDA backend: the loops as grid-stride kernels. The only file that imports numba.cuda.

The rules, and what surrounds them, are those of every backend, bound as device functions. Buffers are CuPy arrays; in
numba's simulator (NUMBA_ENABLE_CUDASIM=1), where there is no device, NumPy arrays stand for them.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

if not hasattr(np, "row_stack"):  # numba-cuda 0.30 looks for it at its first compilation; NumPy 2.5 has it no more
    np.row_stack = np.vstack  # noqa: NPY201

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the deprecation of numba's own target, and NumPy's of what it imports
    from numba import config, cuda, float64

from fastopt.kernels import elements
from fastopt.kernels.bind import bind
from fastopt.kernels.contract import BLOCK, Adder, Array, Features, Kernel, StepHyper, clip_coefficient
from fastopt.kernels.cuda import simulated

if TYPE_CHECKING:
    from fastopt.rule import Rule

T = TypeVar("T")

SIMULATED = bool(config.ENABLE_CUDASIM)
THREADS = 32 if SIMULATED else 256
"""In a block. Sums are of THREADS strided parts and then of a tree, so their bits depend on it; it is never changed."""
BLOCKS_PER_SM = 8

# --- the loops --------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies. A block of threads takes a chunk, then that a grid further. What
# becomes of an element is told by a scalar function, the LANE of the kernel; `walk` is the way over elements for all.
#
# 1-D arrays come as bare addresses: an array costs a launch eight words to marshal, and a look at every index whether
# it is negative. Loops are `while`: over `range`, numba divides for the number of rounds.

ELEMENT: Any
APPLY: Any
RATIO: Any
SCALED: Any
HYPER: Any
FIRST: Any
FIRST_HYPER: Any
UNPACK_CHUNK: Any
UNPACK_STEP: Any
UNPACK_HYPER: Any
UNPACK_FIRST: Any
N_STATES: Any
N_STEP: Any
N_HYPER: Any
N_ROW: Any
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
VECTOR: Any
LOAD: Any
STORE: Any
LANES: Any
WIDE: Any
NARROW: Any
WALK: Any
ROW: Any
SUMS: Any
SPAN_SUMS: Any
LEAVE: Any
CLIP_COEFFICIENT: Any
CLIPS: Any
SKIPS: Any
CHOOSES: Any
COEFFICIENT: Any
PROCEEDS: Any
GATED: Any


def stretch(buffers, i, j, stop, stride, told, s, t):
    """Every `stride`-th element from i on, or as many beside each other as LOAD takes: j is i in the last buffer."""
    while i < stop:
        new, more, others = LANES(LOAD(buffers, i, j), told)
        STORE(buffers, i, j, new)
        s += more
        t += others
        i += stride
        j += stride
    return s, t


def walk(buffers, start, stop, j, told, s, t):
    """A thread's share of a chunk: VECTOR elements at a time, and what is left one by one; the sums s and t, too."""
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x  # and not THREADS: a loop of a constant stride is unrolled, and takes more registers
    whole = stop & -VECTOR  # start is a multiple of VECTOR
    ahead = VECTOR * thread
    s, t = WIDE(buffers, start + ahead, j + ahead, whole, VECTOR * threads, told, s, t)
    if VECTOR > 1:
        s, t = NARROW(buffers, whole + thread, whole - start + j + thread, stop, threads, told, s, t)
    return s, t


def row_of(table, row):
    """What a row of the table tells: (step, h)."""
    at = row * N_ROW
    step = StepHyper(*UNPACK_STEP(table, at))
    own = HYPER(*UNPACK_HYPER(table, at + N_STEP))
    if FIRST:
        return step, (own, FIRST_HYPER(*UNPACK_FIRST(table, at + N_STEP + N_HYPER)))
    return step, own


def updated(values, told):
    """The LANE of `elementwise`: of (p, *states, g) to what is written, from the first on, and nothing to be summed."""
    step, h = told
    new = ELEMENT(step, values[0], values[-1], *values[1:-1], h)
    if N_STATES == 0:  # noqa: SIM108 a branch is pruned, an expression is not
        kept = (new,)
    else:
        kept = new
    if ZERO_GRAD:
        return (*kept, ZERO), ZERO, ZERO
    return kept, ZERO, ZERO


def elementwise(buffers, table, chunks, n):
    """Update every chunk by a rule whose every element stands alone. buffers : (p, *states, g)."""
    c = cuda.blockIdx.x
    while c < n:
        start, stop, row, _, of_gradient = UNPACK_CHUNK(chunks, 5 * c)
        j = of_gradient if SCATTERED else start
        WALK(buffers, start, stop, j, ROW(table, row), ZERO, ZERO)
        c += cuda.gridDim.x


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


def leave(left, right, s, t, partials, block):
    """Leave the sums of s and t over a block of threads in its line of the partial sums."""
    left[cuda.threadIdx.x] = s
    right[cuda.threadIdx.x] = t
    SUMS(left, right)
    if cuda.threadIdx.x == 0:
        partials[2 * block] = left[0]
        partials[2 * block + 1] = right[0]
    cuda.syncthreads()


def squared(values, step):
    """The LANE of `squares`, of (g,)."""
    x = float64(CONDITIONED(step, values[0]))
    u = UNSCALED(step, values[0])
    return (), x * x, u - u


def squares(buffers, table, columns, chunks, n, partials):
    """The sum of the squares of each block's gradients; and 0, or NaN where one of them is not finite."""
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, DTYPE)
    c = cuda.blockIdx.x
    while c < n:
        start, stop, row, _, block = UNPACK_CHUNK(chunks, 5 * c)
        step = StepHyper(*UNPACK_STEP(table, row * columns))
        s, bad = WALK(buffers, start, stop, start, step, 0.0, ZERO)
        LEAVE(total, marks, s, bad, partials, block)
        c += cuda.gridDim.x


def added(values, factor):
    """The LANE of `add`, of (g, more)."""
    new = factor * values[1]
    if not FRESH:
        new = values[0] + new
    if MEASURE:
        x = float64(CONDITIONED(STEP, new))
        return (new,), x * x, new - new
    return (new,), ZERO, ZERO


def add(buffers, offset, weight, chunks, n, partials):
    """Add weight times `more` to its parameter's part of g, and measure what is there then. buffers : (g, more)."""
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, DTYPE)
    factor = weight[0]
    c = cuda.blockIdx.x
    while c < n:
        start, stop, _, _, block = UNPACK_CHUNK(chunks, 5 * c)
        if MEASURE:
            s, bad = WALK(buffers, start, stop, start - offset, factor, 0.0, ZERO)
            LEAVE(total, marks, s, bad, partials, block)
        else:
            WALK(buffers, start, stop, start - offset, factor, ZERO, ZERO)
        c += cuda.gridDim.x


def proposed(values, told):
    """The LANE of `propose`, of (*states, g, p)."""
    step, h = told
    new = ELEMENT(step, values[-1], values[-2], *values[:-2], h)
    x = float64(values[-1])
    u = float64(new[0])
    if ZERO_GRAD:
        return (*new[1:], ZERO), x * x, u * u
    return new[1:], x * x, u * u


def propose(buffers, table, chunks, n, partials):
    """First pass of a layerwise rule: update the states, and sum the squares of p and of the proposed update u.

    buffers : (*states, g, p).
    """
    of_p = cuda.shared.array(THREADS, float64)
    of_u = cuda.shared.array(THREADS, float64)
    c = cuda.blockIdx.x
    while c < n:
        start, stop, row, _, block = UNPACK_CHUNK(chunks, 5 * c)
        pp, uu = WALK(buffers, start, stop, start, ROW(table, row), 0.0, 0.0)
        LEAVE(of_p, of_u, pp, uu, partials, block)
        c += cuda.gridDim.x


def span_sums(spans, k, left, left_column, right, right_column, of_left, of_right):
    """The sums of a parameter's partial sums, in of_left[0] and of_right[0]."""
    s = 0.0
    t = 0.0
    for block in range(spans[4 * k + 2] + cuda.threadIdx.x, spans[4 * k + 3], cuda.blockDim.x):
        s += left[2 * block + left_column]
        t += right[2 * block + right_column]
    of_left[cuda.threadIdx.x] = s
    of_right[cuda.threadIdx.x] = t
    SUMS(of_left, of_right)


def merge(spans, n, partials, ratios):
    """Leave the trust ratio of each parameter in ratios[param]."""
    of_p = cuda.shared.array(THREADS, float64)
    of_u = cuda.shared.array(THREADS, float64)
    for k in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        SPAN_SUMS(spans, k, partials, 0, partials, 1, of_p, of_u)
        if cuda.threadIdx.x == 0:
            ratios[spans[4 * k]] = RATIO(math.sqrt(of_p[0]), math.sqrt(of_u[0]))
        cuda.syncthreads()


def settle(spans, n, table, pp, gg, numbers, rows):
    """Take the scale of each parameter, and give it a row of its own with that scale in it."""
    of_p = cuda.shared.array(THREADS, float64)
    of_g = cuda.shared.array(THREADS, float64)
    for k in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        SPAN_SUMS(spans, k, pp, 0, gg, 0, of_p, of_g)
        if cuda.threadIdx.x == 0:
            param = spans[4 * k]
            row = spans[4 * k + 1]
            number = 0.0
            if NUMBERED:
                number = numbers[param]
            for column in range(N_ROW):
                rows[param * N_ROW + column] = table[row * N_ROW + column]
            step, h = ROW(table, row)
            norm_p = float64(math.sqrt(of_p[0]))  # in the simulator math.sqrt returns a Python float, which is weaker
            norm_g = float64(math.sqrt(of_g[0]))
            scale = param * N_ROW + N_ROW - 1
            if NUMBERED:
                rows[scale], number = SCALED(step, norm_p, norm_g, number, h)
                if GATED:
                    number = numbers[param] if step.proceeds == ZERO else number
                numbers[param] = number
            else:
                rows[scale] = SCALED(step, norm_p, norm_g, h)
        cuda.syncthreads()


def judge(partials, blocks, factor, max_norm, known, candidates, rows, columns, skipped, table, told):
    """Leave in `told` the norm of gradients, the coefficient that clips them, and whether all are finite; and put into
    the table what follows from it. One block.

    With SKIPS, `skipped` is how many steps were left out; with CHOOSES, the table is the candidate for that number.
    """
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, float64)
    s = 0.0
    bad = 0.0
    for block in range(cuda.threadIdx.x, blocks, cuda.blockDim.x):
        s += partials[2 * block]
        bad += partials[2 * block + 1]
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
    for row in range(cuda.threadIdx.x, rows, cuda.blockDim.x):
        if CHOOSES:
            for column in range(columns):
                table[row * columns + column] = candidates[(behind * rows + row) * columns + column]
        table[row * columns + COEFFICIENT] = coefficient
        if SKIPS:
            table[row * columns + PROCEEDS] = finite
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        told[0] = norm
        told[1] = coefficient
        told[2] = finite
        if SKIPS and finite == 0.0:
            skipped[0] += 1


def sum_runs(grads, order, starts, runs, width, sums):
    """Leave in each row of `sums` the sum of a run of rows of `grads`, in the order of the run."""
    run = cuda.blockIdx.x
    while run < runs:
        column = cuda.threadIdx.x
        while column < width:
            s = ZERO
            for k in range(starts[run], starts[run + 1]):
                s += grads[order[k] * width + column]
            sums[run * width + column] = s
            column += cuda.blockDim.x
        run += cuda.gridDim.x


def applied(values, told):
    """The LANE of `apply`: of (p, *states), or (p, average, *states), to what is written."""
    (step, h), ratio = told
    if GATED and step.proceeds == ZERO:
        return (values[:2] if EMA else values[:1]), ZERO, ZERO
    if EMA:
        p = APPLY(values[0], *values[2:], ratio, h)
        return (p, AVERAGED(step, p, values[1])), ZERO, ZERO
    return (APPLY(*values, ratio, h),), ZERO, ZERO


def apply(buffers, ratios, table, chunks, n):
    """Second pass of a layerwise rule: move p by the proposed update, scaled by its parameter's ratio.

    buffers : (p, *states), or (p, average, *states).
    """
    c = cuda.blockIdx.x
    while c < n:
        start, stop, row, param, _ = UNPACK_CHUNK(chunks, 5 * c)
        WALK(buffers, start, stop, start, (ROW(table, row), DTYPE(ratios[param])), ZERO, ZERO)
        c += cuda.gridDim.x


# --- from a loop to a kernel ------------------------------------------------------------------------------------------


def device(function: FunctionType) -> Any:
    """Compile a scalar function for the device; never fastmath, which is flush-to-zero, too, on CUDA."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def unpacking(size: int) -> Callable[..., tuple[Any, ...]]:
    """A function ``(numbers, first)`` that returns `size` numbers beside each other as a tuple."""
    if size == 0:
        return _none
    if size == 1:
        return _one
    half = size // 2
    left, right = unpacking(half), unpacking(size - half)

    def unpack(numbers, first):
        return left(numbers, first) + right(numbers, first + half)

    return unpack


def _none(numbers, first):
    return ()


def _one(numbers, first):
    return (numbers[first],)


def lanes_of(size: int, lane: Callable[..., Any]) -> Callable[..., Any]:
    """LANES: a LANE for each of `size` elements. What they write, an element's in a tuple, and the sums of the rest."""
    if size == 1:

        def one(lanes, told):
            new, s, t = lane(lanes[0], told)
            return (new,), s, t

        return one
    half = size // 2
    left, right = lanes_of(half, lane), lanes_of(size - half, lane)

    def several(lanes, told):
        new, s, t = left(lanes[:half], told)
        more, more_s, more_t = right(lanes[half:], told)
        return new + more, s + more_s, t + more_t

    return several


def memory(width: int) -> tuple[Any, Any]:
    """LOAD, which takes `width` elements at i, a multiple of width, from every buffer; and STORE.

    Their lanes are tuples, of an element of each buffer; STORE writes to as many buffers as they are long. The last
    buffer is taken at j instead of i.
    """
    if SIMULATED:

        def load(buffers, i, j):
            at = [i] * (len(buffers) - 1) + [j]
            if any(first % width for first in at):
                raise IndexError(f"elements {at}: a device would refuse to read {width} there at once")
            return tuple(tuple(b[first + k] for b, first in zip(buffers, at, strict=True)) for k in range(width))

        def store(buffers, i, j, lanes):
            at = [i] * (len(buffers) - 1) + [j]
            for k, lane in enumerate(lanes):
                for value, b, first in zip(lane, buffers, at, strict=False):
                    b[first + k] = value

        return load, store
    return _intrinsics(width)


@cache
def _intrinsics(width: int) -> tuple[Any, Any]:
    """`memory` on a device: one instruction for a buffer, whatever the width."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    def pointers(context, builder, signature, arguments):
        """Where each buffer's elements are, as a vector; and how it is aligned."""
        kind = signature.args[0]
        vector = ir.VectorType(context.get_data_type(kind.dtype.dtype), width)
        for k in range(kind.count):
            place = builder.gep(builder.extract_value(arguments[0], k), [arguments[2 if k == kind.count - 1 else 1]])
            yield builder.bitcast(place, vector.as_pointer()), vector

    def lane_of(k):
        return ir.Constant(ir.IntType(32), k)

    @intrinsic
    def load(typing_context, buffers, i, j):
        def build(context, builder, signature, arguments):
            number = context.get_data_type(buffers.dtype.dtype)
            align = width * context.get_abi_sizeof(number)
            found = [builder.load(place, align=align) for place, _ in pointers(context, builder, signature, arguments)]
            lanes = [[builder.extract_element(vector, lane_of(k)) for vector in found] for k in range(width)]
            made = [context.make_tuple(builder, signature.return_type.dtype, lane) for lane in lanes]
            return context.make_tuple(builder, signature.return_type, made)

        lane = types.UniTuple(buffers.dtype.dtype, buffers.count)
        return types.UniTuple(lane, width)(buffers, types.int64, types.int64), build

    @intrinsic
    def store(typing_context, buffers, i, j, lanes):
        def build(context, builder, signature, arguments):
            align = width * context.get_abi_sizeof(context.get_data_type(buffers.dtype.dtype))
            places = list(pointers(context, builder, signature, arguments))
            for of_buffer, (place, vector) in enumerate(places[: len(lanes[0])]):
                value = ir.Constant(vector, ir.Undefined)
                for k in range(width):
                    lane = builder.extract_value(arguments[3], k)
                    number = context.cast(
                        builder, builder.extract_value(lane, of_buffer), lanes[k][of_buffer], buffers.dtype.dtype
                    )
                    value = builder.insert_element(value, number, lane_of(k))
                builder.store(value, place, align=align)
            return context.get_dummy_value()

        return types.void(buffers, types.int64, types.int64, lanes), build

    return load, store


def walking(
    lane: Callable[..., Any], constants: dict[str, Any], dtype: np.dtype[Any], *, wide: bool = True
) -> dict[str, Any]:
    """What a loop needs to `walk`: its LANE, bound to these constants, over buffers of a dtype.

    wide : 16 bytes at a time, which takes buffers and chunks that begin at multiples of 16 bytes.
    """
    vector = 16 // dtype.itemsize if wide else 1
    bound = bind(lane, constants, label=lane.__name__, scalar=device)
    found: dict[str, Any] = {"VECTOR": vector}
    for name, width in (("WIDE", vector), ("NARROW", 1)):
        load, store = memory(width)
        own = {"LOAD": load, "STORE": store, "LANES": lanes_of(width, bound)}
        found[name] = bind(stretch, own, label=f"{lane.__name__}_{width}", scalar=device)
    return found


class Chunks(NamedTuple):
    """A table of chunks on the device, its lines one after the other."""

    lines: Array
    by_param: Array
    """The same with the parameter for the row of the table."""
    length: int
    """How many lines."""
    spans: Array
    """A line (parameter, row, first block, end) for each parameter that is there ..."""
    spanned: int
    """... and how many these are."""
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
    """As `fastopt.kernels.contract.Verdict`."""

    def __init__(self, backend: CUDA, told: Array):
        self._backend = backend
        self._told = told
        self._event: Any = None
        self._sent: Any = None

    def send(self) -> None:
        """As `fastopt.kernels.contract.Verdict`: a copy to pinned memory, and an event after it."""
        xp = self._backend.xp
        self._sent = self._backend.pinned(3)
        self._told.get(out=self._sent, blocking=False)
        self._event = xp.cuda.Event(disable_timing=True)
        self._event.record()

    @property
    def arrived(self) -> bool:
        """As `fastopt.kernels.contract.Verdict`."""
        return self._event is not None and bool(self._event.done)

    def read(self) -> tuple[float, float, bool]:
        """As `fastopt.kernels.contract.Verdict`."""
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
    wide = 16

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
        self._typed: dict[Any, Any] = {}
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
        """As `fastopt.kernels.contract.Backend`."""
        return self.keep(self.xp.empty(shape, dtype))

    def unused(self, dtype: Any) -> Array:
        """What is passed for an array that a kernel does not look at. (The simulator copies all back after a launch, so
        that it must be none that is passed twice.)"""
        return self.empty(1, dtype)

    def upload(self, array: Any) -> Array:
        """A copy of a NumPy array on the device; an array that is there already as it is."""
        return self.xp.asarray(array)

    def table(self, table: Any) -> Array:
        """As `Asynchronous.table`; while launches are recorded, the place alone: its content is sent later."""
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
        """As `fastopt.kernels.contract.Backend`."""
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
        spans = spans_of(lines)
        made = Chunks(
            self.upload(lines.reshape(-1)),
            self.upload(by_param.reshape(-1)),
            len(lines),
            self.upload(spans.reshape(-1)),
            len(spans),
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
        """As `fastopt.kernels.contract.Backend`."""
        key = (rule, hyper, dtype, features, first)
        if key not in self._kernels:
            self._kernels[key] = self._bind(rule, hyper, dtype, features, first)
        kernel: Kernel = self._kernels[key]
        return kernel

    def norm(self, dtype: np.dtype[Any], features: Features) -> SquaresKernel:
        """As `fastopt.kernels.contract.Backend`."""
        key = ("norm", dtype, features)
        if key not in self._kernels:
            constants = {"DTYPE": dtype.type, **_unpackings(0, 0), **elements.conditioning(dtype, features, device)}
            constants |= walking(squared, constants, dtype)
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
        """As `fastopt.kernels.contract.Backend`."""
        flags = {"CLIPS": max_norm is not None, "SKIPS": skipped is not None, "CHOOSES": candidates is not None}
        key = ("judge", table.dtype, *flags.values())
        if key not in self._kernels:
            columns = {name.upper(): StepHyper._fields.index(name) for name in ("coefficient", "proceeds")}
            constants = {"CLIP_COEFFICIENT": clip_coefficient, **columns, **flags}
            self._kernels[key] = self.compiled(judge, constants, "judge")
        told = self.empty(3)
        counted, known = (self.unused(np.int64), 0) if skipped is None else skipped
        possible = self.unused(table.dtype) if candidates is None else self.upload(candidates.reshape(-1))
        blocks, (rows, columns) = len(partials), table.shape
        limit = 0.0 if max_norm is None else float(max_norm)
        sums, place = partials.reshape(-1), table.reshape(-1)
        kernel, norm = self._kernels[key], (float(factor), limit)
        self.launch(kernel, 1, sums, blocks, *norm, known, possible, rows, columns, counted, place, told)
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
        """As `fastopt.kernels.contract.Backend`; a launch for each array."""
        weights = self.upload(np.array([weight], g.dtype))
        for param, array in enumerate(arrays):
            own = chunks[chunks[:, 3] == param]
            if array is None or len(own) == 0:
                continue
            kernel = self._adding(g.dtype, adder, bool(fresh[param]))
            more = self.xp.ascontiguousarray(array).reshape(-1)
            lines = cut(own)
            on_device = self.upload(lines.reshape(-1))
            n = len(lines)
            self.launch(kernel, n, (g, more), int(offsets[param]), weights, on_device, n, partials.reshape(-1))

    def sum_rows(self, grads: Array, order: np.ndarray, starts: np.ndarray) -> Array:
        """As `fastopt.kernels.contract.Backend`."""
        key = ("sum_runs", grads.dtype)
        if key not in self._kernels:
            self._kernels[key] = self.compiled(sum_runs, {"ZERO": grads.dtype.type(0)}, f"sum_runs_{grads.dtype.name}")
        sums = self.empty((len(starts), grads.shape[1]), grads.dtype)
        ends = self.upload(np.append(starts, len(order)))
        numbers, runs, width = self.upload(order), len(starts), grads.shape[1]
        flat = sums.reshape(-1)
        self.launch(self._kernels[key], runs, grads.reshape(-1), numbers, ends, runs, width, flat)
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
            constants |= _unpackings(0, 0)
            constants |= walking(added, constants, dtype, wide=False)  # what is added may begin anywhere
            self._kernels[key] = self.compiled(add, constants, f"add_{dtype.name}")
        return self._kernels[key]

    def batchnorm(self, formulas: ModuleType, dtype: np.dtype[Any], *, relu: bool, residual: bool) -> Any:
        """As `fastopt.kernels.contract.Backend`."""
        from fastopt.kernels.cuda.batchnorm import BatchNormCUDA  # loaded by those who use it

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
        constants["ROW"] = bind(row_of, constants, label="row_of", scalar=device)
        buffers = 2 + constants["N_STATES"]
        if rule.layerwise is not None:
            proposing = {**constants, **walking(proposed, constants, dtype)}
            applying = {**constants, "APPLY": rule.layerwise.apply, "EMA": features.ema}
            applying |= walking(applied, applying, dtype)
            return LayerwiseKernel(
                self,
                len(rule.states),
                self.compiled(propose, proposing, f"propose_{label}", at_once(buffers + 1, dtype)),  # and sums
                self.compiled(merge, {"RATIO": rule.layerwise.ratio}, f"merge_{label}"),
                self.compiled(apply, applying, f"apply_{label}", at_once(buffers, dtype)),
            )
        wide = not features.scattered  # rows begin anywhere
        updating = {**constants, **walking(updated, constants, dtype, wide=wide)}
        blocks = at_once(buffers, dtype) if wide else None
        update = ElementwiseKernel(self, self.compiled(elementwise, updating, label, blocks), features.scattered)
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

    def compiled(
        self, loop: Callable[..., None], constants: dict[str, Any], label: str, blocks: int | None = None
    ) -> Any:
        """A loop bound to its constants, to be compiled at its first launch: before that no device need be there.

        blocks : how many are to fit on a multiprocessor at least, which limits the registers of a thread.
        """
        bound = bind(loop, constants, label=label, scalar=device)
        # The simulator puts its own module in the place of `cuda` in the globals of a kernel while it runs: these
        # functions share them.
        for name, helper in (("WALK", walk), ("SUMS", block_sums), ("SPAN_SUMS", span_sums), ("LEAVE", leave)):
            shared = FunctionType(helper.__code__, bound.__globals__, name)
            bound.__globals__[name] = device(shared)
        options = {} if SIMULATED or blocks is None else {"launch_bounds": (THREADS, blocks)}
        return cuda.jit(bound, **options)

    def launch(self, kernel: Any, blocks: int, *arguments: Any) -> None:
        """Run a kernel on CuPy's current stream. Its first launch decides of what type every argument is."""
        if blocks == 0:
            return
        self._check_device(arguments[0])
        grid = min(blocks, self._most_blocks)
        given = [self._given(argument) for argument in arguments]
        if SIMULATED:
            if self.capturing():
                simulated.cuda.recorded.append(partial(self.launch, kernel, blocks, *arguments))
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy's, of infinities and NaN
                kernel[grid, THREADS](*given)
            return
        stream = self.xp.cuda.get_current_stream().ptr
        key = (kernel, grid, stream)
        configured = self._configured.get(key)
        if configured is None:
            typed = self._typed.get(kernel)
            if typed is None:
                signature = tuple(type_of(argument) for argument in arguments)
                options = {"launch_bounds": kernel.targetoptions["launch_bounds"]}
                typed = self._typed[kernel] = cuda.jit(signature, **options)(kernel.py_func)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the grid is small
                configured = self._configured[key] = typed[grid, THREADS, cuda.external_stream(stream)]
        configured(*given)

    def _given(self, argument: Any) -> Any:
        """What numba is given for an argument: see `type_of`."""
        if isinstance(argument, tuple):
            return tuple([self._given(item) for item in argument])
        if not isinstance(argument, self.xp.ndarray):
            return argument
        if SIMULATED:
            return argument.view(np.ndarray)
        if argument.ndim == 1:
            return argument.data.ptr
        # Converted here, because numba would wait for CuPy's stream, on which the kernel is launched anyway.
        return cuda.as_cuda_array(argument, sync=False)

    def _check_device(self, argument: Any) -> None:
        """Refuse to launch on the current device what works on another's arrays; the first argument tells."""
        array = argument[0] if isinstance(argument, tuple) else argument
        if isinstance(array, self.xp.ndarray) and self.device_of(array) != self.device:
            found = self.device_of(array)
            raise ValueError(
                f"the arrays are on device {found}, and the current device is {self.device}: work with them in "
                f"`with cupy.cuda.Device({found}):`"
            )

    def host(self, array: Array) -> np.ndarray:
        """A NumPy copy of an array on the device; waits for it."""
        found: np.ndarray = self.xp.asnumpy(array)
        return found

    def adopt(self, leaf: Any) -> Array | None:
        """As `fastopt.kernels.contract.Backend`: arrays of the device as they are, NumPy's uploaded.

        CuPy keeps a reference to the owner of the memory, and waits for the stream that an owner names.
        """
        if isinstance(leaf, np.ndarray | self.xp.ndarray):
            return self.xp.asarray(leaf)
        try:
            if not hasattr(leaf, "__cuda_array_interface__"):
                return None
        except RuntimeError:  # torch's, of a tensor that requires grad
            return None
        torch = sys.modules.get("torch")
        if torch is not None and type(leaf).__module__.partition(".")[0] == "torch":  # it names no stream
            theirs, ours = torch.cuda.current_stream().cuda_stream, self.xp.cuda.get_current_stream().ptr
            if theirs != ours:
                raise ValueError(
                    f"the current stream of torch ({theirs:#x}) is not that of CuPy ({ours:#x}), on which kernels run: "
                    f"use `with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):`"
                )
        return self.xp.asarray(leaf)

    @property
    def device(self) -> int:
        """As `fastopt.kernels.contract.Backend`."""
        number: int = self.xp.cuda.Device().id
        return number

    def device_of(self, array: Array) -> int:
        """As `fastopt.kernels.contract.Backend`."""
        number: int = array.device.id
        return number

    def copy(self, to: Array, source: Array) -> None:
        """As `fastopt.kernels.contract.Backend`."""
        to[...] = self.xp.asarray(source, to.dtype)

    def address(self, array: Array) -> int:
        """As `fastopt.kernels.contract.Backend`."""
        address: int = array.__cuda_array_interface__["data"][0]
        return address

    @property
    def overlap(self) -> Callable[[Array, Array], bool]:
        """As `fastopt.kernels.contract.Backend`."""
        share: Callable[[Array, Array], bool] = self.xp.may_share_memory
        return share

    @property
    def array_type(self) -> Any:
        """As `fastopt.kernels.contract.Backend`."""
        return self.xp.ndarray


def at_once(buffers: int, dtype: np.dtype[Any]) -> int:
    """How many blocks a multiprocessor is to have room for, where a loop reads that many buffers 16 bytes at a time.

    As many as all rules and features allow without spilling: 4 buffers fit into 64 registers a thread, 5 into 80, and 7
    (Adan with a moving average) need 94. At 256 threads, 48 to 64 KiB are then under way at once. By its data sheet, an
    H100 moves 17 KiB a multiprocessor in the 0.7 us that a read takes.
    """
    return max(2, min(4, 8 - buffers)) if dtype.itemsize == 4 else 2


def type_of(argument: Any) -> Any:
    """The numba type of a kernel's argument: a 1-D array is the address of its first element, and has no gaps."""
    from numba.cuda import types

    if isinstance(argument, tuple):
        return types.BaseTuple.from_types([type_of(item) for item in argument])
    if getattr(argument, "ndim", 0) == 0:
        return types.float64 if isinstance(argument, float) else types.int64
    number = getattr(types, argument.dtype.name)
    return types.CPointer(number) if argument.ndim == 1 else types.Array(number, argument.ndim, "C")


def _unpackings(n_hyper: int, n_first: int) -> dict[str, Any]:
    n_step = len(StepHyper._fields)
    return {
        "N_STEP": n_step,
        "N_ROW": n_step + n_hyper + n_first,
        "UNPACK_CHUNK": unpacking(5),
        "UNPACK_STEP": unpacking(n_step),
        "UNPACK_HYPER": unpacking(n_hyper),
        "UNPACK_FIRST": unpacking(n_first),
    }


def survey() -> dict[str, Any]:
    """What numba finds of CUDA: whether it can work, or is simulated, its devices, and the reason why it cannot work.

    Raises nothing: whatever goes wrong in there, and much can, is a reason.
    """
    found: dict[str, Any] = {"available": SIMULATED, "simulator": SIMULATED, "devices": [], "reason": None}
    if SIMULATED:
        return found
    try:
        found["devices"] = [_described(each) for each in cuda.list_devices()]
        found["available"] = bool(cuda.is_available())
    except Exception as error:
        words = " ".join(str(error).split()).rstrip(" .:")
        found["reason"] = f"numba finds no CUDA driver here ({words or type(error).__name__})"
        return found
    if not found["devices"]:
        found["reason"] = "numba finds no CUDA device here"
    elif not found["available"]:
        found["reason"] = "numba does not find NVIDIA's compilers; pip install 'fastopt[cuda13]'"
    elif find_spec("numba_cuda") is None:
        found["reason"] = "numba-cuda is not installed; pip install 'fastopt[cuda13]'"
    return found


def _described(found: Any) -> dict[str, Any]:
    name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
    return {"name": name, "compute_capability": ".".join(map(str, found.compute_capability))}


def _array_module() -> tuple[ModuleType, Callable[[int], np.ndarray]]:
    """CuPy, and how it allocates pinned memory; RuntimeError with the reason where CUDA cannot work."""
    if SIMULATED:
        return simulated, np.empty
    reason = survey()["reason"]
    if reason is None:
        try:
            return import_module("cupy"), import_module("cupyx").empty_pinned
        except ImportError as error:
            reason = f"CuPy, which holds the buffers, cannot be imported ({error}); pip install 'fastopt[cuda13]'"
    raise RuntimeError(f"backend='cuda': {reason}; use backend='cpu'")


class ElementwiseKernel:
    """The update of one rule in one pass."""

    def __init__(self, backend: CUDA, kernel: Any, scattered: bool):
        self._backend = backend
        self._kernel = kernel
        self._scattered = scattered

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: np.ndarray, chunks: np.ndarray) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        backend = self._backend
        if self._scattered:  # made for this one launch
            on_device, lines, count = backend.upload(table), backend.upload(chunks.reshape(-1)), len(chunks)
        else:
            found = backend.chunks(chunks)
            on_device, lines, count = backend.table(table), found.lines, found.length
        self.launch_on(p, g, states, on_device.reshape(-1), lines, count)

    def launch_on(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, lines: Array, count: int) -> None:
        """The same, with a table and `count` chunks that are on the device, the lines of both one after the other."""
        self._backend.launch(self._kernel, count, (p, *states, g), table, lines, count)


class LayerwiseKernel:
    """The update of a rule that scales each parameter's step by norms: two passes and a merge between them."""

    def __init__(self, backend: CUDA, n_states: int, propose: Any, merge: Any, apply: Any):
        self._backend = backend
        self._n_states = n_states
        self._propose = propose
        self._merge = merge
        self._apply = apply

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: np.ndarray, chunks: np.ndarray) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        backend = self._backend
        found = backend.chunks(chunks)
        if found.blocks == 0:
            return
        own, average = states[: self._n_states], states[self._n_states :]
        on_device = backend.table(table).reshape(-1)
        partials = backend.empty(2 * found.blocks)
        ratios = backend.empty(found.parameters)
        backend.launch(self._propose, found.length, (*own, g, p), on_device, found.lines, found.length, partials)
        backend.launch(self._merge, found.spanned, found.spans, found.spanned, partials, ratios)
        backend.launch(self._apply, found.length, (p, *average, *own), ratios, on_device, found.lines, found.length)


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
        """As `fastopt.kernels.contract.Kernel`."""
        backend = self._backend
        found = backend.chunks(chunks)
        if found.blocks == 0:
            return
        on_device = backend.table(table)
        columns = on_device.shape[1]
        pp = self._of_p.launch_on(p, on_device, found)
        gg = self._of_g.launch_on(g, on_device, found)
        rows = backend.empty(found.parameters * columns, on_device.dtype)
        states, numbers = (states[:-1], states[-1]) if self._numbered else (states, backend.unused(np.float64))
        backend.launch(
            self._settle, found.spanned, found.spans, found.spanned, on_device.reshape(-1), pp, gg, numbers, rows
        )
        self._update.launch_on(p, g, states, rows, found.by_param, found.length)


class SquaresKernel:
    """The norm of gradients, and whether all of them are finite."""

    def __init__(self, backend: CUDA, kernel: Any):
        self._backend = backend
        self._kernel = kernel

    def launch(self, g: Array, table: np.ndarray, chunks: np.ndarray) -> Array:
        """As `fastopt.kernels.contract.NormKernel`."""
        backend = self._backend
        return self.launch_on(g, backend.table(table), backend.chunks(chunks)).reshape(-1, 2)

    def launch_on(self, g: Array, table: Array, found: Chunks) -> Array:
        """The same, with a table that is on the device, where the sums stay, too: all in a row."""
        backend, columns = self._backend, table.shape[1]
        partials = backend.empty(2 * found.blocks)
        backend.launch(
            self._kernel, found.length, (g,), table.reshape(-1), columns, found.lines, found.length, partials
        )
        return partials
