"""The CPU backend: memory, and the kernels made of the loops of this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba import types

from fastopt.kernels.bind import bind, compile_loop, inlined
from fastopt.kernels.contract import (
    ALIGNMENT,
    CODED,
    FLOAT32,
    LEVEL,
    MASTER,
    N_STEP,
    REST,
    STORED,
    Adder,
    Array,
    Features,
    Kernel,
    KernelRule,
    StepHyper,
    Storage,
)
from fastopt.kernels.cpu.coded import coded, functions_of
from fastopt.kernels.cpu.elementwise import ElementwiseKernel, elementwise, hyperparameters
from fastopt.kernels.cpu.lines import LinedKernel, LinedStage, sum_tile
from fastopt.kernels.cpu.lines import settle as settle_lines
from fastopt.kernels.cpu.lines import sum_terms as sum_terms_of_lines
from fastopt.kernels.cpu.lines import update as update_tiles
from fastopt.kernels.cpu.norms import SquaresKernel, add, measure_block, squares
from fastopt.kernels.cpu.sums import Stage, SummedKernel, settle, sum_block, sum_terms
from fastopt.kernels.driver import Loop
from fastopt.kernels.elements import (
    adding,
    adding_scaled,
    check_rule,
    conditioning,
    exact,
    fields_of,
    kept_apart,
    of_terms,
    reads_of,
    scalar,
    settling,
    surrounded,
    terms_of_kept,
)
from fastopt.kernels.formats import dithering, drawn, reading, rounding, stored_type, writing
from fastopt.kernels.intrinsics import fetching, replacing
from fastopt.kernels.threads import COMPILING, get_num_threads
from fastopt.source import written

if TYPE_CHECKING:
    from fastopt.kernels.cpu.batchnorm import BatchNormCPU

INTEGERS = types.Array(types.int64, 2, "C")
"""The tables of places and of chunks."""
PARTIALS = types.Array(types.float64, 2, "C")
PER_TENSOR = types.Array(types.float64, 1, "C")
FLAGS = types.Array(types.boolean, 1, "C")


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

    def device_of(self, array: Array) -> None:
        """As `fastopt.kernels.contract.Backend`."""

    def address(self, array: Array) -> int:
        """As `fastopt.kernels.contract.Backend`."""
        address: int = array.__array_interface__["data"][0]
        return address

    def kernel(
        self,
        rule: KernelRule,
        hyper: type,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], type] | None = None,
        storage: Storage | None = None,
    ) -> Kernel:
        """The compiled update of `rule`, whose `prepare` returns the NamedTuple `hyper`, on buffers of `dtype`.

        Raises TypeError where the rule's arithmetic leaves `dtype` or its return does not match its states.
        """
        key = (rule, hyper, dtype, features, first, storage)
        kernel: Kernel = self._once(key, lambda: self._compile(*key))
        return kernel

    def norm(self, dtype: np.dtype[Any], features: Features, grads: str | None = None) -> SquaresKernel:
        """The pass over gradients of `dtype` that measures them."""
        key = (dtype, features, grads or dtype.name)
        kernel: SquaresKernel = self._once(("norm", *key), lambda: self._compile_norm(*key))
        return kernel

    def add(
        self,
        places: Array,
        present: Array,
        overwrite: Array,
        weight: Array,
        chunks: Array,
        partials: Array,
        adder: Adder,
        dtype: np.dtype[Any],
        grads: str | None = None,
    ) -> None:
        """As `fastopt.kernels.contract.Backend.add`."""
        key = (dtype, adder, grads or dtype.name)
        loop: Loop = self._once(("add", *key), lambda: self._compile_add(*key))
        elements = int(chunks[:, 2].sum() - chunks[:, 1].sum())
        loop.run(places, present, overwrite, weight, chunks, partials, elements=elements, units=chunks.shape[0])

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
        rule: KernelRule,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], type] | None,
        storage: Storage | None,
    ) -> Kernel:
        if numba.config.DISABLE_JIT:
            raise RuntimeError("NUMBA_DISABLE_JIT is set: fastopt has no interpreted kernels; unset it")
        compiled_rule = scalar(bind(rule.scalar, {}, label=f"{rule.name}_{dtype}", scalar=scalar))
        # Before any loop is compiled around it, and kept on disk; a loop that is there was checked. The rule itself is
        # not kept: its signature holds the user's NamedTuple, which another process does not recognise if it cannot
        # import it.
        check = cache(lambda: check_rule(rule, compiled_rule, hyper, dtype))
        return self._bind_loops(rule, compiled_rule, hyper, dtype, features, first, storage, check)

    def _bind_loops(
        self,
        rule: KernelRule,
        compiled_rule: Any,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], Any] | None,
        storage: Storage | None,
        check: Callable[[], None],
    ) -> ElementwiseKernel | SummedKernel | LinedKernel:
        storage = storage or Storage(dtype.name, dtype.name, (dtype.name,) * (len(rule.states) + features.ema))
        table = types.Array(numba.from_dtype(dtype), 2, "C")
        scales = [dtype.name for name in storage.states if name in CODED]
        states = types.Tuple([types.Array(stored_type(name), 1, "C") for name in (*storage.states, *scales)])
        arguments = (INTEGERS, states, table, INTEGERS)

        constants, label = surrounded(rule, compiled_rule, hyper, dtype, features, first, scalar)
        constants |= {"SCATTERED": features.scattered, **_stored(storage, len(rule.states))}
        if storage.keeps:
            constants["ELEMENT"] = bind(kept_apart, constants, label="kept_apart", scalar=scalar)
        constants["HYPERPARAMETERS"] = bind(hyperparameters, constants, label="hyperparameters", scalar=scalar)

        if rule.lined:
            return self._bind_lines(rule, hyper, dtype, features, constants, arguments, label, check)
        function: Callable[..., Any] = elementwise
        if scales:
            function, constants, label = coded, {**constants, **functions_of(storage, constants)}, f"coded_{label}"
        kernel = ElementwiseKernel(Loop(function, constants, arguments, label=label, check=check))
        if rule.sums:
            return self._bind_sums(rule, hyper, dtype, features, constants, arguments, label, check, kernel)
        return kernel

    def _bind_sums(
        self,
        rule: KernelRule,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        constants: dict[str, Any],
        arguments: tuple[Any, ...],
        label: str,
        check: Callable[[], None],
        update: ElementwiseKernel,
    ) -> SummedKernel:
        """constants, arguments, label : of the update."""
        table = arguments[2]
        stages = []
        names = list(rule.numbers)
        for sums in rule.sums:
            terms, norms = (*sums.terms.values(), *sums.norms.values()), len(sums.norms)
            wide = norms > 0 and dtype.itemsize == 8
            width = len(terms) + (2 * norms if wide else 0)
            of_settle = {**constants, **settling(rule, sums, hyper, scalar, len(terms) if wide else None)}
            of_settle |= {"NOTHING_SETTLED": (0.0,) * (len(sums.results) + len(sums.numbers)), "N_TOTALS": width}
            loop = None
            if terms:
                of_sums, of_label = of_terms(rule, terms, hyper, dtype, features, scalar)
                of_sums = _of_kept(constants, of_sums) | {
                    "HYPERPARAMETERS": constants["HYPERPARAMETERS"],
                    "N_TERMS": len(terms),
                    "N_NORMS": norms,
                    "WIDE": wide,
                    "FETCH": fetching(reads_of(terms)),
                }
                of_sums |= {
                    "SUM_BLOCK": _adding(sum_block, of_sums, adding(sums), len(terms)),
                    "SUM_AGAIN": _adding(sum_block, of_sums, adding_scaled(sums), 2 * norms) if wide else None,
                }
                loop = Loop(sum_terms, of_sums, (*arguments, PARTIALS), label=f"sum_terms_{of_label}", check=check)
            of_numbers = types.UniTuple(PER_TENSOR, len(sums.numbers)) if sums.numbers else types.Tuple(())
            bound = bind(settle, of_settle, label=f"settle_{label}", scalar=scalar)
            stages.append(
                Stage(
                    loop,
                    compile_loop(
                        bound, (INTEGERS, INTEGERS, PARTIALS, table, of_numbers, table, INTEGERS), check=check
                    ).entry,
                    width,
                    tuple([names.index(name) for name in sums.numbers]),
                )
            )
        return SummedKernel(tuple(stages), update, len(names))

    def _bind_lines(
        self,
        rule: KernelRule,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        constants: dict[str, Any],
        arguments: tuple[Any, ...],
        label: str,
        check: Callable[[], None],
    ) -> LinedKernel:
        """constants, arguments, label : of the update."""
        table = arguments[2]
        vector = types.Array(numba.from_dtype(dtype), 1, "C")
        fields: dict[str, tuple[int, ...]] = {"tensor": (), "row": (), "column": ()}
        """Of h, those that are settled so far."""
        stages = []
        names = list(rule.numbers)
        for sums in rule.sums:
            level, terms, norms = LEVEL[sums.over], (*sums.terms.values(), *sums.norms.values()), len(sums.norms)
            wide = norms > 0 and dtype.itemsize == 8
            width = len(terms) + (2 * norms if wide else 0)
            of_stage = {
                **constants,
                **settling(rule, sums, hyper, scalar, len(terms) if wide else None),
                **_replaced(fields),
                "OF_LINE": replacing(() if level == "tensor" else fields[level]),
                "NOTHING_SETTLED": (0.0,) * (len(sums.results) + len(sums.numbers)),
                "BY_ROW": sums.over == "row",
                "BY_COLUMN": sums.over == "column",
            }
            parts, found = _tuple(PER_TENSOR, width), [_tuple(vector, len(each)) for each in fields.values()]
            loop = None
            if terms:
                of_sums, of_label = of_terms(rule, terms, hyper, dtype, features, scalar)
                of_sums = {**of_stage, **_of_kept(constants, of_sums), "N_NORMS": norms, "WIDE": wide}
                loop = Loop(
                    sum_terms_of_lines,
                    {
                        **of_sums,
                        "SUM_TILE": _adding(sum_tile, of_sums, adding(sums), len(terms)),
                        "SUM_AGAIN": _adding(sum_tile, of_sums, adding_scaled(sums), 2 * norms) if wide else None,
                    },
                    (*arguments, *found, parts),
                    label=f"sum_terms_of_lines_{of_label}",
                    check=check,
                )
            same = _tuple(vector, 0 if level == "tensor" else len(fields[level]))
            settle_arguments = (INTEGERS, INTEGERS, table, parts, parts, found[0], same)
            stages.append(
                LinedStage(
                    sums.over,
                    loop,
                    Loop(
                        settle_lines,
                        of_stage,
                        (*settle_arguments, _tuple(PER_TENSOR, len(sums.numbers)), _tuple(vector, len(sums.results))),
                        label=f"settle_lines_{label}",
                        check=check,
                    ),
                    width,
                    len(sums.results),
                    tuple([names.index(name) for name in sums.numbers]),
                )
            )
            fields[level] += fields_of(rule, sums, hyper)
        found = [_tuple(vector, len(each)) for each in fields.values()]
        loop = Loop(
            update_tiles, {**constants, **_replaced(fields)}, (*arguments, *found), label=f"tiles_{label}", check=check
        )
        return LinedKernel(tuple(stages), loop, dtype, len(names))

    def _compile_norm(self, dtype: np.dtype[Any], features: Features, grads: str) -> SquaresKernel:
        # A sum of squares of float32 is itself finite just where they are; otherwise a second sum has to find out.
        apart = features.zero_nonfinite or features.clip_value or dtype.itemsize == 8
        measure = self._measure(dtype, features, grads, apart=apart)
        return SquaresKernel(
            Loop(
                squares,
                {"G_TYPE": STORED[grads].type, "MEASURE_BLOCK": measure},
                (INTEGERS, types.Array(numba.from_dtype(dtype), 2, "C"), INTEGERS, PARTIALS),
                label=f"squares_{grads}",
                fastmath={"reassoc", "contract"},  # for the sums alone
            ),
            dtype,
        )

    def _measure(self, dtype: np.dtype[Any], features: Features, stored: str, *, apart: bool) -> Any:
        """`measure_block`, to be inlined into a loop.

        stored : the format of what is measured. apart : whether what is not finite is summed apart.
        """
        constants = {"APART": apart, "WIDE": dtype.itemsize == 8, **conditioning(dtype, features, scalar)}
        constants["READ"] = reading((stored,))
        return inlined(bind(measure_block, constants, label="measure_block", scalar=scalar))

    def _compile_add(self, dtype: np.dtype[Any], adder: Adder, grads: str) -> Loop:
        features = Features(zero_nonfinite=adder.zero_nonfinite)
        return Loop(
            add,
            {
                "DTYPE": dtype.type,
                "G_TYPE": STORED[grads].type,
                "READ_GRAD": reading((grads,)),
                "MEASURE": adder.measure,
                "MEASURE_BLOCK": self._measure(dtype, features, dtype.name, apart=True),
                "STEP": StepHyper(*[0.0] * N_STEP),  # not looked at: none of its features is on
            },
            (INTEGERS, FLAGS, FLAGS, types.Array(numba.from_dtype(dtype), 1, "C"), INTEGERS, PARTIALS),
            label=f"add_{grads}",
            fastmath={"reassoc"},  # for the two sums alone: g + weight * more can be read in one way only
        )


def _stored(storage: Storage, count: int) -> dict[str, Any]:
    """What a loop reads and writes buffers by. count : how many states the rule has."""
    in_room = [FLOAT32 if name in CODED else name for name in storage.states]
    formats = (storage.params, *in_room)
    own = [f"states[{k}]" for k in range(count)]
    own += [f"states[{len(storage.states) - 1}]"] if storage.keeps else []
    of_terms = ", ".join([*own, ""]) if own else ""
    kept = storage.states[-1:] if storage.keeps else ()
    p_is_exact = storage.keeps == REST or (storage.stochastic and storage.keeps != MASTER)
    of_kept = {"MASTER": storage.keeps == MASTER, "ROUNDED": rounding(storage.params) if storage.keeps else None}
    return {
        **of_kept,
        "P_TYPE": STORED[storage.params].type,
        "G_TYPE": STORED[storage.grads].type,
        "READ": reading(formats),
        "READ_GRAD": reading((storage.grads,)),
        "READ_TERMS": reading((storage.params, *in_room[:count], *kept)),
        "OF_TERMS": written("of_terms", ["states"], [f"return ({of_terms})"], {}, __name__),
        "WRITE": writing(formats, (p_is_exact, *[storage.stochastic] * len(in_room))),
        "STOCHASTIC": storage.stochastic,
        "DITHERED": dithering(drawn(storage)) if storage.stochastic else None,
        "KEPT": bool(storage.keeps),
        "EXACT": bind(exact, of_kept, label="exact", scalar=scalar) if storage.keeps else None,
    }


def _of_kept(constants: dict[str, Any], of_sums: dict[str, Any]) -> dict[str, Any]:
    """The constants of a loop over terms, for the storage in those of the update."""
    found = {**constants, **of_sums}
    if constants["KEPT"]:
        found["ELEMENT"] = bind(terms_of_kept, found, label="terms_of_kept", scalar=scalar)
    return found


def _adding(summing: Callable[..., Any], of_sums: dict[str, Any], added: FunctionType, count: int) -> Any:
    """`sum_block` or `sum_tile` that adds up so many values."""
    constants = {**of_sums, "ADDED": added, "NO_SUMS": (0.0,) * count}
    return scalar(bind(summing, constants, label=summing.__name__, scalar=scalar))


def _tuple(kind: Any, count: int) -> Any:
    """The type of a tuple of arrays."""
    return types.UniTuple(kind, count) if count else types.Tuple(())


def _replaced(fields: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What puts into h what was settled for a parameter, a row and a column."""
    return {f"OF_{level.upper()}": replacing(own) for level, own in fields.items()}
