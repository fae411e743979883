"""The CPU backend: every loop, once; how a loop becomes a kernel; and the driver that decides on which threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.ufunc import parallel as numba_parallel
from numba.np.unsafe.ndarray import to_fixed_tuple

from fastopt.backends import ALIGNMENT, BLOCK, Adder, Array, Features, Kernel, StepHyper
from fastopt.backends.bind import bind, cache_directory, keep_on_disk
from fastopt.backends.elements import check_rule, conditioning, scalar, scaled_by, surrounded

if TYPE_CHECKING:
    from fastopt.backends.cpu_batchnorm import BatchNormCPU
    from fastopt.rule import Rule

SERIAL_BELOW = 65_536
"""Elements. Below this a second thread is not worth waking. On an idle machine it would be from about 20k elements on
(a parallel launch costs 3-6 us), at a gain of at most 8 us. But where another process keeps a core busy, a launch waits
for the worker's turn: 7-8 ms on two cores instead of 9-20 us on one thread. Small networks are spared that."""

# --- the loops --------------------------------------------------------------------------------------------------------
# Upper-case names are constants that `bind` supplies. Loops run over chunks and, inside, over views: indexing the whole
# array with start + i is 7-15x slower, because numba's wrap-around of negative indices stops the vectoriser.

APPLY: Any
RATIO: Any
SCALED: Any
NUMBERED: Any
DTYPE: Any
ELEMENT: Any
HYPER: Any
N_STATES: Any
N_STEP: Any
N_HYPER: Any
EMA: Any
ZERO_GRAD: Any
SCATTERED: Any
FIRST: Any
FIRST_HYPER: Any
N_FIRST: Any
ZERO: Any
UNSCALED: Any
CONDITIONED: Any
AVERAGED: Any
MEASURE: Any
APART: Any
STEP: Any
LOOP: Any


def elementwise(p, g, states, table, chunks, backwards, first, last):
    """Update chunks[first:last] by a rule whose every element stands alone."""
    # In the cache a rule with a root and a division is bound by the divider. Adam on Zen 4, AVX-512 by hand, in L1: 4.4
    # ns for 16 elements; without the division 2.9, without the root 2.5, only moving the bytes 2.0. Tried there, the
    # same bits for 20M random normal numbers: dividing by rcp14, Newton steps and a correction, 5.0; the root by
    # rsqrt14 that way, 5.0; both, 6.8; dividing only every second vector that way, 4.2. Out of the cache it is bound by
    # memory. Tried at 30M: prefetching 0.5-8 KiB ahead, 15-30 % slower; threads that take chunks of 64 KiB by turns,
    # 15 % slower, of 1 MiB, no difference; buffers staggered by 1 KiB to 1 MiB, no difference.
    # One branch per number of states, all but one pruned. Tried: slicing, loading and storing the tuple of states by
    # functions folded over its length, which has no such branches: the same machine code, but 8x the compile time.
    for k in range(last - first):
        c = last - 1 - k if backwards else first + k
        if SCATTERED and k + AHEAD < last - first:
            to_come = c - AHEAD if backwards else c + AHEAD
            fetch(p, chunks[to_come, 0], chunks[to_come, 1])
            if N_STATES > 0:  # an empty tuple has no type to go over
                for state in states:
                    fetch(state, chunks[to_come, 0], chunks[to_come, 1])
        start = chunks[c, 0]
        stop = chunks[c, 1]
        row = chunks[c, 2] * table.shape[1]
        step = StepHyper(*to_fixed_tuple(window(table, row, N_STEP), N_STEP))
        own = HYPER(*to_fixed_tuple(window(table, row + N_STEP, N_HYPER), N_HYPER))
        if FIRST:
            h = (own, FIRST_HYPER(*to_fixed_tuple(window(table, row + N_STEP + N_HYPER, N_FIRST), N_FIRST)))
        else:
            h = own
        pc = window(p, start, stop - start)
        gc = window(g, chunks[c, 4] if SCATTERED else start, stop - start)
        if N_STATES == 0:
            for i in range(pc.size):
                pc[i] = ELEMENT(step, pc[i], gc[i], h)
                if ZERO_GRAD:
                    gc[i] = ZERO
        elif N_STATES == 1:
            a = window(states[0], start, stop - start)
            for i in range(pc.size):
                pc[i], a[i] = ELEMENT(step, pc[i], gc[i], a[i], h)
                if ZERO_GRAD:
                    gc[i] = ZERO
        elif N_STATES == 2:
            a = window(states[0], start, stop - start)
            b = window(states[1], start, stop - start)
            for i in range(pc.size):
                pc[i], a[i], b[i] = ELEMENT(step, pc[i], gc[i], a[i], b[i], h)
                if ZERO_GRAD:
                    gc[i] = ZERO
        elif N_STATES == 3:
            a = window(states[0], start, stop - start)
            b = window(states[1], start, stop - start)
            c3 = window(states[2], start, stop - start)
            for i in range(pc.size):
                pc[i], a[i], b[i], c3[i] = ELEMENT(step, pc[i], gc[i], a[i], b[i], c3[i], h)
                if ZERO_GRAD:
                    gc[i] = ZERO
        elif N_STATES == 4:
            a = window(states[0], start, stop - start)
            b = window(states[1], start, stop - start)
            c3 = window(states[2], start, stop - start)
            d = window(states[3], start, stop - start)
            for i in range(pc.size):
                pc[i], a[i], b[i], c3[i], d[i] = ELEMENT(step, pc[i], gc[i], a[i], b[i], c3[i], d[i], h)
                if ZERO_GRAD:
                    gc[i] = ZERO
        elif N_STATES == 5:
            a = window(states[0], start, stop - start)
            b = window(states[1], start, stop - start)
            c3 = window(states[2], start, stop - start)
            d = window(states[3], start, stop - start)
            e = window(states[4], start, stop - start)
            for i in range(pc.size):
                pc[i], a[i], b[i], c3[i], d[i], e[i] = ELEMENT(step, pc[i], gc[i], a[i], b[i], c3[i], d[i], e[i], h)
                if ZERO_GRAD:
                    gc[i] = ZERO


AHEAD = 4
"""How many scattered chunks ahead memory is asked for."""


def propose(p, g, states, table, chunks, partials, first, last):
    """First pass of a layerwise rule: update the states, and sum the squares of p and of the proposed update u.

    u itself is not stored: the second pass computes it again from the new states, which reads no more memory than a
    buffer for u would.
    """
    for c in range(first, last):
        row = chunks[c, 2] * table.shape[1]
        step = StepHyper(*to_fixed_tuple(window(table, row, N_STEP), N_STEP))
        h = HYPER(*to_fixed_tuple(window(table, row + N_STEP, N_HYPER), N_HYPER))
        block = chunks[c, 4]
        for start in range(chunks[c, 0], chunks[c, 1], BLOCK):
            stop = min(start + BLOCK, chunks[c, 1])
            pc = window(p, start, stop - start)
            gc = window(g, start, stop - start)
            # float64: squares of float32 are exact in it, and neither 1e30 nor 1e-30 leaves its range.
            pp = 0.0
            uu = 0.0
            if N_STATES == 1:
                a = window(states[0], start, stop - start)
                for i in range(pc.size):
                    u, a[i] = ELEMENT(step, pc[i], gc[i], a[i], h)
                    if ZERO_GRAD:
                        gc[i] = ZERO
                    pp += np.float64(pc[i]) * np.float64(pc[i])
                    uu += np.float64(u) * np.float64(u)
            elif N_STATES == 2:
                a = window(states[0], start, stop - start)
                b = window(states[1], start, stop - start)
                for i in range(pc.size):
                    u, a[i], b[i] = ELEMENT(step, pc[i], gc[i], a[i], b[i], h)
                    if ZERO_GRAD:
                        gc[i] = ZERO
                    pp += np.float64(pc[i]) * np.float64(pc[i])
                    uu += np.float64(u) * np.float64(u)
            partials[block, 0] = pp
            partials[block, 1] = uu
            block += 1


def merge(chunks, partials, ratios):
    """Add the partial sums of each parameter in index order and leave its trust ratio in ratios[param]."""
    c = 0
    while c < chunks.shape[0]:
        param = chunks[c, 3]
        pp = 0.0
        uu = 0.0
        while c < chunks.shape[0] and chunks[c, 3] == param:
            for block in range(chunks[c, 4], chunks[c, 4] + (chunks[c, 1] - chunks[c, 0] + BLOCK - 1) // BLOCK):
                pp += partials[block, 0]
                uu += partials[block, 1]
            c += 1
        ratios[param] = RATIO(np.sqrt(pp), np.sqrt(uu))


def settle(chunks, table, pp, gg, numbers, rows, lines):
    """Take the scale of each parameter, and give it a row of its own with that scale in it.

    pp, gg : the partial sums of the squares of p and of g.
    rows, lines : overwritten: a table with a row per parameter, and the chunks that point to it.
    """
    width = table.shape[1]
    c = 0
    while c < chunks.shape[0]:
        param = chunks[c, 3]
        row = chunks[c, 2]
        norm_p = 0.0
        norm_g = 0.0
        while c < chunks.shape[0] and chunks[c, 3] == param:
            for block in range(chunks[c, 4], chunks[c, 4] + (chunks[c, 1] - chunks[c, 0] + BLOCK - 1) // BLOCK):
                norm_p += pp[block, 0]
                norm_g += gg[block, 0]
            for column in range(chunks.shape[1]):
                lines[c, column] = param if column == 2 else chunks[c, column]
            c += 1
        for column in range(width):
            rows[param, column] = table[row, column]
        step = StepHyper(*to_fixed_tuple(window(table, row * width, N_STEP), N_STEP))
        h = HYPER(*to_fixed_tuple(window(table, row * width + N_STEP, N_HYPER), N_HYPER))
        norm_p = np.sqrt(norm_p)
        norm_g = np.sqrt(norm_g)
        if NUMBERED:
            rows[param, width - 1], numbers[param] = SCALED(step, norm_p, norm_g, numbers[param], h)
        else:
            rows[param, width - 1] = SCALED(step, norm_p, norm_g, h)


def apply(p, ratios, states, table, chunks, backwards, first, last):
    """Second pass of a layerwise rule: move p by the proposed update, scaled by its parameter's ratio."""
    for k in range(last - first):
        c = last - 1 - k if backwards else first + k
        start = chunks[c, 0]
        stop = chunks[c, 1]
        row = chunks[c, 2] * table.shape[1]
        step = StepHyper(*to_fixed_tuple(window(table, row, N_STEP), N_STEP))
        h = HYPER(*to_fixed_tuple(window(table, row + N_STEP, N_HYPER), N_HYPER))
        ratio = DTYPE(ratios[chunks[c, 3]])
        pc = window(p, start, stop - start)
        if EMA:
            e = window(states[N_STATES], start, stop - start)
        if N_STATES == 1:
            a = window(states[0], start, stop - start)
            for i in range(pc.size):
                pc[i] = APPLY(pc[i], a[i], ratio, h)
                if EMA:
                    e[i] = AVERAGED(step, pc[i], e[i])
        elif N_STATES == 2:
            a = window(states[0], start, stop - start)
            b = window(states[1], start, stop - start)
            for i in range(pc.size):
                pc[i] = APPLY(pc[i], a[i], b[i], ratio, h)
                if EMA:
                    e[i] = AVERAGED(step, pc[i], e[i])


def squares(g, table, chunks, partials, first, last):
    """The sum of the squares of each block's gradients; and 0, or NaN where one of them is not finite."""
    # float64: squares of float32 are exact in it, and neither 1e30 nor 1e-30 leaves its range. One Zen 4 core, in
    # cache: 62 GB/s; counting what is not finite 30, a float32 sum of g - g beside it 38.
    for c in range(first, last):
        step = StepHyper(*to_fixed_tuple(window(table, chunks[c, 2] * table.shape[1], N_STEP), N_STEP))
        block = chunks[c, 4]
        for start in range(chunks[c, 0], chunks[c, 1], BLOCK):
            gc = window(g, start, min(BLOCK, chunks[c, 1] - start))
            total = 0.0
            bad = ZERO
            for i in range(gc.size):
                x = np.float64(CONDITIONED(step, gc[i]))
                total += x * x
                if APART:
                    bad += UNSCALED(step, gc[i]) - UNSCALED(step, gc[i])
            partials[block, 0] = total
            partials[block, 1] = bad if APART else total - total
            block += 1


def add(addresses, offsets, fresh, weight, g, chunks, partials, first, last):
    """Add weight times the array at each address to its parameter's part of g, and measure what is there then."""
    for c in range(first, last):
        param = chunks[c, 3]
        if addresses[param] != 0:
            block = chunks[c, 4]
            for start in range(chunks[c, 0], chunks[c, 1], BLOCK):
                stop = min(start + BLOCK, chunks[c, 1])
                gc = window(g, start, stop - start)
                more = at_address(g, addresses[param], start - offsets[param], stop - start)
                if fresh[param]:
                    for i in range(gc.size):
                        gc[i] = weight[0] * more[i]
                else:
                    for i in range(gc.size):
                        gc[i] = gc[i] + weight[0] * more[i]
                if MEASURE:  # in a loop of its own: the block is in L1
                    total = 0.0
                    bad = ZERO
                    for i in range(gc.size):
                        x = np.float64(CONDITIONED(STEP, gc[i]))
                        total += x * x
                        bad += gc[i] - gc[i]
                    partials[block, 0] = total
                    partials[block, 1] = bad
                block += 1


# Chunks stand alone, so the bits do not depend on how they are shared out. Every thread has one run of chunks, always
# the same, and goes through it forwards and backwards by turns: what it touched last is still in the cache when the
# next pass begins there. In one direction only, a buffer a little larger than the cache finds nothing there, ever.
# Measured: Adam on 4M float32 (64 MB of buffers, 32 MB of cache) 1.97 -> 1.51 ms; no difference at 1M and at 30M.


def over_chunks(a, b, states, table, chunks, backwards, threads):
    """LOOP (elementwise or apply) on every chunk."""
    n = chunks.shape[0]
    for thread in prange(threads):
        LOOP(a, b, states, table, chunks, backwards, n * thread // threads, n * (thread + 1) // threads)


def over_chunks_with_partials(p, g, states, table, chunks, partials, threads):
    """LOOP (propose) on every chunk."""
    n = chunks.shape[0]
    for thread in prange(threads):
        LOOP(p, g, states, table, chunks, partials, n * thread // threads, n * (thread + 1) // threads)


def over_chunks_of_gradients(g, table, chunks, partials, threads):
    """LOOP (squares) on every chunk."""
    n = chunks.shape[0]
    for thread in prange(threads):
        LOOP(g, table, chunks, partials, n * thread // threads, n * (thread + 1) // threads)


def over_chunks_to_add(addresses, offsets, fresh, weight, g, chunks, partials, threads):
    """LOOP (add) on every chunk."""
    n = chunks.shape[0]
    for thread in prange(threads):
        LOOP(addresses, offsets, fresh, weight, g, chunks, partials, n * thread // threads, n * (thread + 1) // threads)


# --- from a loop to a kernel ------------------------------------------------------------------------------------------


@intrinsic
def window(typing_context, array, start, size):
    """array.reshape(-1)[start : start + size] of a C-contiguous array, without bounds or a reference count.

    It does not keep the array alive: its owner has to. The reference count of a slice is an atomic one, for which
    threads queue: 100 ns for a chunk of 64 elements. And a kernel of many slices compiles in seconds, one of these in a
    fraction.
    """

    def build(context, builder, signature, arguments):
        kind = signature.args[0]
        source = context.make_array(kind)(context, builder, arguments[0])
        view = context.make_array(signature.return_type)(context, builder)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        populate_array(
            view,
            data=builder.gep(source.data, [arguments[1]]),
            shape=[arguments[2]],
            strides=[itemsize],
            itemsize=itemsize,
            meminfo=None,
        )
        return view._getvalue()

    return types.Array(array.dtype, 1, "C")(array, types.intp, types.intp), build


@intrinsic
def at_address(typing_context, like, address, start, size):
    """A 1-D array, of the dtype of `like`, on the memory that begins `start` elements after `address`."""

    def build(context, builder, signature, arguments):
        kind = signature.args[0]
        view = context.make_array(kind)(context, builder)
        number = context.get_data_type(kind.dtype)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(number))
        base = builder.inttoptr(arguments[1], number.as_pointer())
        data = builder.gep(base, [arguments[2]])
        populate_array(view, data=data, shape=[arguments[3]], strides=[itemsize], itemsize=itemsize, meminfo=None)
        return view._getvalue()

    return like(like, types.int64, types.int64, types.int64), build


@intrinsic
def fetch(typing_context, array, start, stop):
    """Ask for array[start:stop] to be brought into the cache."""

    def build(context, builder, signature, arguments):
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte = ir.IntType(8).as_pointer()
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        start, stop = arguments[1:]
        line = ALIGNMENT // context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        with cgutils.for_range_slice(builder, start, stop, start.type(line)) as (index, _):
            address = builder.bitcast(builder.gep(source.data, [index]), byte)
            builder.call(prefetch, [address, flag(1), flag(3), flag(1)])  # to be written, kept, data
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), build


class Kinds:
    """The numba types of the arrays that the loops over buffers of one dtype take."""

    def __init__(self, dtype: np.dtype[Any]):
        number = numba.from_dtype(dtype)
        self.vector = types.Array(number, 1, "C")
        self.table = types.Array(number, 2, "C")
        self.integers = types.Array(types.int64, 2, "C")
        self.partials = types.Array(types.float64, 2, "C")


def blocks_of(chunks: Array) -> int:
    """The number of blocks of a table of chunks that ends with its last block."""
    if chunks.shape[0] == 0:
        return 0
    start, stop, _, _, block = chunks[-1].tolist()
    return int(block) - (start - stop) // BLOCK


class Loop:
    """One loop bound to one rule: its serial kernel, and its parallel kernel from the first time it is worth having."""

    def __init__(
        self,
        function: Callable[..., Any],
        constants: dict[str, Any],
        signature: tuple[Any, ...],
        *,
        label: str,
        over: Callable[..., None],
        driver: Driver,
        fastmath: Any = False,
    ):
        self._label = label
        self._over = over
        self._signature = signature
        self._driver = driver
        self._dispatcher = compile_loop(
            bind(function, constants, label=label, scalar=scalar),
            (*signature, types.int64, types.int64),
            fastmath=fastmath,
        )
        # The compiled entry itself: our arguments have one type for life, and numba's dispatch on types costs 0.3 us
        # of the 1 us that a call on 1,000 elements takes.
        self.serial = _entry(self._dispatcher)
        self._parallel: Callable[..., None] | None = None

    def parallel(self, *arguments: Any, threads: int) -> None:
        """Run on every chunk with numba's threads."""
        if self._parallel is None:
            with self._driver.lock:
                if self._parallel is None:
                    bound = bind(self._over, {"LOOP": self._dispatcher}, label=f"parallel_{self._label}", scalar=scalar)
                    self._parallel = _entry(compile_loop(bound, (*self._signature, types.int64), parallel=True))
        self._parallel(*arguments, threads)  # asking for their number inside would keep the kernel off the disk

    def run(self, *arguments: Any, elements: int, chunks: int) -> None:
        """Run on every chunk, with as many threads as are worth it."""
        if elements < SERIAL_BELOW or chunks < 2:
            self.serial(*arguments, 0, chunks)
        else:
            self._driver.run(self, arguments, chunks)


def compile_loop(function: FunctionType, signature: tuple[Any, ...], **options: Any) -> Any:
    """Compile for exactly one signature; keep it on disk where FASTOPT_CACHE_DIR says so."""
    dispatcher = njit(error_model="numpy", nogil=True, **options)(function)
    directory = cache_directory()
    if directory is not None:
        keep_on_disk(dispatcher, directory)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


def _entry(dispatcher: Any) -> Callable[..., None]:
    (compiled,) = dispatcher.overloads.values()
    entry: Callable[..., None] = compiled.entry_point
    return entry


class ElementwiseKernel:
    """The update of one rule in one pass."""

    def __init__(self, loop: Loop):
        self._loop = loop
        self._backwards = 1

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, chunks: Array) -> None:
        """As `fastopt.backends.Kernel`."""
        self._backwards = 1 - self._backwards  # two threads that race here lose a cache hit and nothing else
        self._loop.run(p, g, states, table, chunks, self._backwards, elements=p.size, chunks=chunks.shape[0])


class LayerwiseKernel:
    """The update of a rule that scales each parameter's step by norms: two passes and a merge between them."""

    def __init__(self, propose: Loop, merge: Callable[..., None], apply: Loop):
        self._propose = propose
        self._merge = merge
        self._apply = apply

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, chunks: Array) -> None:
        """As `fastopt.backends.Kernel`."""
        n = chunks.shape[0]
        if n == 0:
            return
        partials = np.empty((blocks_of(chunks), 2))
        ratios = np.empty(int(chunks[-1, 3]) + 1)
        self._propose.run(p, g, states, table, chunks, partials, elements=p.size, chunks=n)
        self._merge(chunks, partials, ratios)
        self._apply.run(p, ratios, states, table, chunks, 1, elements=p.size, chunks=n)  # backwards: see over_chunks


class ScaledKernel:
    """The update of a rule whose h depends on norms: one pass over p and one over g, then the update."""

    def __init__(
        self,
        norms: tuple[SquaresKernel, SquaresKernel],
        settle: Callable[..., None],
        update: ElementwiseKernel,
        numbered: bool,
    ):
        """norms : of p, and of g. numbered : whether the last of the states is the rule's number per parameter."""
        self._of_p, self._of_g = norms
        self._settle = settle
        self._update = update
        self._numbered = numbered

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, chunks: Array) -> None:
        """As `fastopt.backends.Kernel`."""
        if chunks.shape[0] == 0:
            return
        states, numbers = (states[:-1], states[-1]) if self._numbered else (states, np.empty(0))
        pp = self._of_p.launch(p, table, chunks)
        gg = self._of_g.launch(g, table, chunks)
        rows = np.empty((int(chunks[-1, 3]) + 1, table.shape[1]), table.dtype)
        lines = np.empty_like(chunks)
        self._settle(chunks, table, pp, gg, numbers, rows, lines)
        self._update.launch(p, g, states, rows, lines)


class SquaresKernel:
    """The norm of gradients, and whether all of them are finite."""

    def __init__(self, loop: Loop):
        self._loop = loop

    def launch(self, g: Array, table: Array, chunks: Array) -> Array:
        """As `fastopt.backends.NormKernel`."""
        partials = np.empty((blocks_of(chunks), 2))
        self._loop.run(g, table, chunks, partials, elements=g.size, chunks=chunks.shape[0])
        return partials


class CPU:
    """The CPU backend."""

    name = "cpu"
    asynchronous = False

    def __init__(self) -> None:
        self.driver = Driver()
        self._kernels: dict[tuple[Any, ...], Any] = {}
        self._batchnorm_loops: dict[Any, Any] = {}  # what BatchNorms of different flags have in common

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Array:
        """A 1-D buffer of zeros, aligned to `ALIGNMENT` bytes."""
        room = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
        skip = -room.ctypes.data % ALIGNMENT
        return room[skip : skip + size * dtype.itemsize].view(dtype)

    array_type: Any = np.ndarray

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """As `fastopt.backends.Backend`."""
        return np.empty(shape, dtype)

    def adopt(self, leaf: Any) -> Array | None:
        """As `fastopt.backends.Backend`: NumPy arrays as they are."""
        return leaf if isinstance(leaf, np.ndarray) else None

    def copy(self, to: Array, source: Array) -> None:
        """As `fastopt.backends.Backend`."""
        np.copyto(to, source, casting="same_kind")

    def host(self, array: Array) -> np.ndarray:
        """As `fastopt.backends.Backend`: the array itself."""
        found: np.ndarray = array
        return found

    overlap = staticmethod(np.may_share_memory)  # NumPy's own: it is asked twice for every gradient of a step

    device = None
    wide = 1  # unaligned loads of vectors cost next to nothing

    def device_of(self, array: Array) -> None:
        """As `fastopt.backends.Backend`."""

    def address(self, array: Array) -> int:
        """As `fastopt.backends.Backend`."""
        address: int = array.__array_interface__["data"][0]
        return address

    def kernel(
        self,
        rule: Rule,
        hyper: type,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], type] | None = None,
    ) -> Kernel:
        """The compiled update of `rule`, whose `prepare` returns the NamedTuple `hyper`, on buffers of `dtype`.

        Raises TypeError where the rule's arithmetic leaves `dtype` or its return does not match its states.
        """
        key = (rule, hyper, dtype, features, first)
        kernel: Kernel = self._once(key, lambda: self._compile(*key))
        return kernel

    def norm(self, dtype: np.dtype[Any], features: Features) -> SquaresKernel:
        """The pass over gradients of `dtype` that measures them."""
        kernel: SquaresKernel = self._once(("norm", dtype, features), lambda: self._compile_norm(dtype, features))
        return kernel

    def add(
        self,
        g: Array,
        arrays: list[Array | None],
        offsets: Array,
        fresh: Array,
        weight: float,
        chunks: Array,
        partials: Array,
        adder: Adder,
    ) -> None:
        """As `fastopt.backends.Backend.add`."""
        ready = [None if array is None else np.require(array, requirements=["C", "A"]) for array in arrays]
        addresses = np.array([0 if array is None else self.address(array) for array in ready], np.int64)
        loop: Loop = self._once(("add", g.dtype, adder), lambda: self._compile_add(g.dtype, adder))
        weights = np.array([weight], g.dtype)
        loop.run(addresses, offsets, fresh, weights, g, chunks, partials, elements=g.size, chunks=chunks.shape[0])

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        kernel = self._kernels.get(key)
        if kernel is None:
            with self.driver.lock:
                kernel = self._kernels.get(key)
                if kernel is None:
                    kernel = self._kernels[key] = make()
        return kernel

    def sum_rows(self, grads: Array, order: Array, starts: Array) -> Array:
        """As `fastopt.backends.Backend`."""
        return np.add.reduceat(grads[order], starts, axis=0)

    def batchnorm(self, formulas: ModuleType, dtype: np.dtype[Any], *, relu: bool, residual: bool) -> BatchNormCPU:
        """The compiled BatchNorm of `dtype` by `formulas`, the scalar functions of fastopt.batchnorm."""

        def make() -> BatchNormCPU:
            from fastopt.backends.cpu_batchnorm import BatchNormCPU  # loaded by those who use it

            flags = {"RELU": relu, "RESIDUAL": residual}
            return BatchNormCPU(formulas, dtype, flags, self.driver, self._batchnorm_loops)

        batchnorm: BatchNormCPU = self._once(("batchnorm", dtype, relu, residual), make)
        return batchnorm

    def _compile(
        self,
        rule: Rule,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], type] | None,
    ) -> Kernel:
        if numba.config.DISABLE_JIT:
            raise RuntimeError("NUMBA_DISABLE_JIT is set: fastopt has no interpreted kernels; unset it")
        compiled_rule = scalar(bind(rule.scalar, {}, label=f"{rule.name}_{dtype}", scalar=scalar))
        # Before any loop is compiled around it, and kept on disk. The rule itself is not kept: its signature holds the
        # user's NamedTuple, which another process does not recognise if it cannot import it.
        check_rule(rule, compiled_rule, hyper, dtype)
        return self._bind_loops(rule, compiled_rule, hyper, dtype, features, first)

    def _bind_loops(
        self,
        rule: Rule,
        compiled_rule: Any,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], Any] | None,
    ) -> ElementwiseKernel | LayerwiseKernel | ScaledKernel:
        kinds = Kinds(dtype)
        vector, integers, table, partials = kinds.vector, kinds.integers, kinds.table, kinds.partials
        buffers = len(rule.states) + features.ema
        states = types.UniTuple(vector, buffers) if buffers else types.Tuple(())
        ratios = types.Array(types.float64, 1, "C")  # a number per parameter

        constants, label = surrounded(rule, compiled_rule, hyper, dtype, features, first, scalar)
        constants |= {"DTYPE": dtype.type, "SCATTERED": features.scattered}

        if rule.layerwise is None:
            arguments = (vector, vector, states, table, integers, types.int64)
            kernel = ElementwiseKernel(
                Loop(elementwise, constants, arguments, label=label, over=over_chunks, driver=self.driver)
            )
            if rule.scaling is None:
                return kernel
            numbered = rule.scaling.number is not None
            settling = {**constants, "SCALED": scaled_by(rule.scaling, features, scalar), "NUMBERED": numbered}
            return ScaledKernel(
                (self.norm(dtype, Features()), self.norm(dtype, features.of_norm())),
                _entry(
                    compile_loop(
                        bind(settle, settling, label=f"settle_{label}", scalar=scalar),
                        (integers, table, partials, partials, ratios, table, integers),
                    )
                ),
                kernel,
                numbered,
            )
        return LayerwiseKernel(
            Loop(
                propose,
                constants,
                (vector, vector, states, table, integers, partials),
                label=f"propose_{label}",
                over=over_chunks_with_partials,
                driver=self.driver,
                fastmath={"reassoc"},  # for the two sums alone: the rule keeps its own flags; 16x faster than in order
            ),
            _entry(
                compile_loop(
                    bind(merge, {"RATIO": rule.layerwise.ratio}, label=f"merge_{label}", scalar=scalar),
                    (integers, partials, ratios),
                )
            ),
            Loop(
                apply,
                {**constants, "APPLY": rule.layerwise.apply, "EMA": features.ema},
                (vector, ratios, states, table, integers, types.int64),
                label=f"apply_{label}",
                over=over_chunks,
                driver=self.driver,
            ),
        )

    def _compile_norm(self, dtype: np.dtype[Any], features: Features) -> SquaresKernel:
        kinds = Kinds(dtype)
        # A sum of squares of float32 is itself finite just where they are; otherwise a second sum has to tell.
        apart = features.zero_nonfinite or features.clip_value or dtype.itemsize == 8
        return SquaresKernel(
            Loop(
                squares,
                {"N_STEP": len(StepHyper._fields), "APART": apart, **conditioning(dtype, features, scalar)},
                (kinds.vector, kinds.table, kinds.integers, kinds.partials),
                label=f"squares_{dtype.name}",
                over=over_chunks_of_gradients,
                driver=self.driver,
                fastmath={"reassoc", "contract"},  # for the two sums alone
            )
        )

    def _compile_add(self, dtype: np.dtype[Any], adder: Adder) -> Loop:
        kinds = Kinds(dtype)
        fresh = types.Array(types.boolean, 1, "C")
        addresses = types.Array(types.int64, 1, "C")
        return Loop(
            add,
            {
                "MEASURE": adder.measure,
                "STEP": StepHyper(*[0.0] * len(StepHyper._fields)),  # not looked at: none of its features is on
                **conditioning(dtype, Features(zero_nonfinite=adder.zero_nonfinite), scalar),
            },
            (addresses, addresses, fresh, kinds.vector, kinds.vector, kinds.integers, kinds.partials),
            label=f"add_{dtype.name}",
            over=over_chunks_to_add,
            driver=self.driver,
            fastmath={"reassoc"},  # for the two sums alone: g + weight * more can be read in one way only
        )


# --- the driver -------------------------------------------------------------------------------------------------------


class Driver:
    """Decides which threads run a loop.

    ``parallel``: numba's own threads, where its layer is omp or tbb and this process is not a forked child.
    ``pool``: the serial kernel on slices of the chunk table in a thread pool. With the workqueue layer two threads that
    launch at once abort the process; with GNU OpenMP a forked child that launches is killed.

    numba's thread count is only read, never set: setting it would change torch's where both share one OpenMP.
    """

    def __init__(self) -> None:
        self.mode: str | None = None  # found out at the first loop that is worth more than one thread
        self.lock = threading.RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1
        self._ask_numba = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """Nothing of the parent's threads survives in a child: neither a pool, nor the holder of a lock."""
        self.mode = "pool"
        self.lock = threading.RLock()
        self._pool = None
        self._ask_numba = False  # to ask would start the threading layer

    def threads(self) -> int:
        """How many threads a loop may use: numba's own count, which NUMBA_NUM_THREADS and set_num_threads govern."""
        if self._ask_numba:
            self._threads = numba.get_num_threads()
        elif self._threads == 1:
            self._threads = numba.config.NUMBA_NUM_THREADS
        return self._threads

    def _choose(self) -> str:
        try:
            numba_parallel._launch_threads()
            layer = numba.threading_layer()
        except ValueError:  # no layer could be loaded, or the one asked for is not there
            layer = "none"
            self._ask_numba = False
        self.mode = "parallel" if layer in ("omp", "tbb") else "pool"
        return self.mode

    def run(self, loop: Loop, arguments: tuple[Any, ...], chunks: int) -> None:
        """Run `loop` on chunks 0 to `chunks`."""
        mode = self.mode or self._choose()
        threads = min(self.threads(), chunks)
        if threads == 1:
            loop.serial(*arguments, 0, chunks)
        elif mode == "parallel":
            loop.parallel(*arguments, threads=threads)
        else:
            self._run_in_pool(loop, arguments, chunks, threads)

    def _run_in_pool(self, loop: Loop, arguments: tuple[Any, ...], chunks: int, threads: int) -> None:
        edges = [chunks * k // threads for k in range(threads + 1)]
        futures: list[Future[None]] = []
        for first, last in pairwise(edges[1:]):
            futures.append(self._workers().submit(loop.serial, *arguments, first, last))
        loop.serial(*arguments, edges[0], edges[1])
        for future in futures:
            future.result()

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            with self.lock:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(
                        max(1, numba.config.NUMBA_NUM_THREADS - 1), thread_name_prefix="fastopt"
                    )
        return self._pool
