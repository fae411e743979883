"""The CPU backend: every loop, once; the kernels made of them; and the backend itself."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba import types
from numba.np.unsafe.ndarray import to_fixed_tuple

from fastopt.kernels.bind import bind, compile_loop, entry_of
from fastopt.kernels.contract import ALIGNMENT, BLOCK, Adder, Array, Features, Kernel, StepHyper
from fastopt.kernels.driver import Loop
from fastopt.kernels.elements import check_rule, conditioning, scalar, scaled_by, surrounded
from fastopt.kernels.intrinsics import at_address, fetch, window
from fastopt.kernels.threads import COMPILING, get_num_threads

if TYPE_CHECKING:
    from fastopt.kernels.cpu.batchnorm import BatchNormCPU
    from fastopt.rule import Rule

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


def elementwise(p, g, states, table, chunks, first, last):
    """Update chunks by a rule whose every element stands alone."""
    # In the cache a rule with a root and a division is bound by the divider. Adam on Zen 4, AVX-512 by hand, in L1: 4.4
    # ns for 16 elements; without the division 2.9, without the root 2.5, only moving the bytes 2.0. Tried there, the
    # same bits for 20M random normal numbers: dividing by rcp14, Newton steps and a correction, 5.0; the root by
    # rsqrt14 that way, 5.0; both, 6.8; dividing only every second vector that way, 4.2. Out of the cache it is bound by
    # memory. Tried at 30M: prefetching 0.5-8 KiB ahead, 15-30 % slower; threads that take chunks of 64 KiB by turns,
    # 15 % slower, of 1 MiB, no difference; buffers staggered by 1 KiB to 1 MiB, no difference.
    # One branch per number of states, all but one pruned. Tried: slicing, loading and storing the tuple of states by
    # functions folded over its length, which has no such branches: the same machine code, but 8x the compile time.
    backwards = last < first
    count = first - last if backwards else last - first
    for k in range(count):
        c = first - 1 - k if backwards else first + k
        if SCATTERED and k + AHEAD < count:
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


def apply(p, ratios, states, table, chunks, first, last):
    """Second pass of a layerwise rule: move p by the proposed update, scaled by its parameter's ratio."""
    backwards = last < first
    count = first - last if backwards else last - first
    for k in range(count):
        c = first - 1 - k if backwards else first + k
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


# --- from loops to kernels --------------------------------------------------------------------------------------------


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


class ElementwiseKernel:
    """The update of one rule in one pass."""

    def __init__(self, loop: Loop):
        self._loop = loop
        self._backwards = True

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, chunks: Array) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        self._backwards = not self._backwards  # two threads that race here lose a cache hit and nothing else
        self._loop.run(p, g, states, table, chunks, elements=p.size, units=chunks.shape[0], backwards=self._backwards)


class LayerwiseKernel:
    """The update of a rule that scales each parameter's step by norms: two passes and a merge between them."""

    def __init__(self, propose: Loop, merge: Callable[..., None], apply: Loop):
        self._propose = propose
        self._merge = merge
        self._apply = apply

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, chunks: Array) -> None:
        """As `fastopt.kernels.contract.Kernel`."""
        n = chunks.shape[0]
        if n == 0:
            return
        partials = np.empty((blocks_of(chunks), 2))
        ratios = np.empty(int(chunks[-1, 3]) + 1)
        self._propose.run(p, g, states, table, chunks, partials, elements=p.size, units=n)
        self._merge(chunks, partials, ratios)
        self._apply.run(p, ratios, states, table, chunks, elements=p.size, units=n, backwards=True)


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
        """As `fastopt.kernels.contract.Kernel`."""
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
        """As `fastopt.kernels.contract.NormKernel`."""
        partials = np.empty((blocks_of(chunks), 2))
        self._loop.run(g, table, chunks, partials, elements=g.size, units=chunks.shape[0])
        return partials


class CPU:
    """The CPU backend."""

    name = "cpu"
    asynchronous = False

    def __init__(self) -> None:
        get_num_threads()  # an environment variable that is wrong is refused here, and not in the middle of a step
        self._kernels: dict[tuple[Any, ...], Any] = {}
        self._batchnorm_loops: dict[Any, Any] = {}  # what BatchNorms of different flags have in common

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Array:
        """A 1-D buffer of zeros, aligned to `ALIGNMENT` bytes."""
        room = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
        skip = -room.ctypes.data % ALIGNMENT
        return room[skip : skip + size * dtype.itemsize].view(dtype)

    array_type: Any = np.ndarray

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """As `fastopt.kernels.contract.Backend`."""
        return np.empty(shape, dtype)

    def adopt(self, leaf: Any) -> Array | None:
        """As `fastopt.kernels.contract.Backend`: NumPy arrays as they are."""
        return leaf if isinstance(leaf, np.ndarray) else None

    def copy(self, to: Array, source: Array) -> None:
        """As `fastopt.kernels.contract.Backend`."""
        np.copyto(to, source, casting="same_kind")

    def host(self, array: Array) -> np.ndarray:
        """As `fastopt.kernels.contract.Backend`: the array itself."""
        found: np.ndarray = array
        return found

    overlap = staticmethod(np.may_share_memory)  # NumPy's own: it is asked twice for every gradient of a step

    device = None
    wide = 1  # unaligned loads of vectors cost next to nothing

    def device_of(self, array: Array) -> None:
        """As `fastopt.kernels.contract.Backend`."""

    def address(self, array: Array) -> int:
        """As `fastopt.kernels.contract.Backend`."""
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
        """As `fastopt.kernels.contract.Backend.add`."""
        ready = [None if array is None else np.require(array, requirements=["C", "A"]) for array in arrays]
        addresses = np.array([0 if array is None else self.address(array) for array in ready], np.int64)
        loop: Loop = self._once(("add", g.dtype, adder), lambda: self._compile_add(g.dtype, adder))
        weights = np.array([weight], g.dtype)
        loop.run(addresses, offsets, fresh, weights, g, chunks, partials, elements=g.size, units=chunks.shape[0])

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        kernel = self._kernels.get(key)
        if kernel is None:
            with COMPILING:
                kernel = self._kernels.get(key)
                if kernel is None:
                    kernel = self._kernels[key] = make()
        return kernel

    def sum_rows(self, grads: Array, order: Array, starts: Array) -> Array:
        """As `fastopt.kernels.contract.Backend`."""
        return np.add.reduceat(grads[order], starts, axis=0)

    def batchnorm(self, formulas: ModuleType, dtype: np.dtype[Any], *, relu: bool, residual: bool) -> BatchNormCPU:
        """The compiled BatchNorm of `dtype` by `formulas`, the scalar functions of fastopt.batchnorm."""

        def make() -> BatchNormCPU:
            from fastopt.kernels.cpu.batchnorm import BatchNormCPU  # loaded by those who use it

            flags = {"RELU": relu, "RESIDUAL": residual}
            return BatchNormCPU(formulas, dtype, flags, self._batchnorm_loops)

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
            arguments = (vector, vector, states, table, integers)
            kernel = ElementwiseKernel(Loop(elementwise, constants, arguments, label=label))
            if rule.scaling is None:
                return kernel
            numbered = rule.scaling.number is not None
            settling = {**constants, "SCALED": scaled_by(rule.scaling, features, scalar), "NUMBERED": numbered}
            return ScaledKernel(
                (self.norm(dtype, Features()), self.norm(dtype, features.of_norm())),
                entry_of(
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
                fastmath={"reassoc"},  # for the two sums alone: the rule keeps its own flags; 16x faster than in order
            ),
            entry_of(
                compile_loop(
                    bind(merge, {"RATIO": rule.layerwise.ratio}, label=f"merge_{label}", scalar=scalar),
                    (integers, partials, ratios),
                )
            ),
            Loop(
                apply,
                {**constants, "APPLY": rule.layerwise.apply, "EMA": features.ema},
                (vector, ratios, states, table, integers),
                label=f"apply_{label}",
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
            fastmath={"reassoc"},  # for the two sums alone: g + weight * more can be read in one way only
        )
