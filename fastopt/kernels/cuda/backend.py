"""The CUDA backend: memory, and the kernels made of the loops of this package.

The rules, and what surrounds them, are those of every backend, bound as device functions. Buffers are CuPy arrays; in
numba's simulator (NUMBA_ENABLE_CUDASIM=1), where there is no device, NumPy arrays stand for them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastopt.kernels import elements
from fastopt.kernels.bind import bind
from fastopt.kernels.contract import (
    BLOCK,
    CODED,
    FLOAT32,
    LEVEL,
    MASTER,
    N_LINE,
    N_STEP,
    N_TILE,
    SCALE_DOWN,
    SCALE_UP,
    STORED,
    Adder,
    Array,
    Chunk,
    Features,
    Kernel,
    KernelRule,
    StepHyper,
    Storage,
    SumsFunctions,
    Tiles,
    clip_coefficient,
    root_of_squares,
    sums_per_block,
)
from fastopt.kernels.cuda import simulated
from fastopt.kernels.cuda.decisions import PendingDecision, Slots, decide
from fastopt.kernels.cuda.elementwise import ElementwiseKernel, elementwise, hyperparameters, updated
from fastopt.kernels.cuda.kept import Kept
from fastopt.kernels.cuda.launcher import Chunks, Partials, PreparedKernel, SentTiles
from fastopt.kernels.cuda.lines import LinedKernel, LinedStage, fold, replacing, settled_at, terms_at, update_at
from fastopt.kernels.cuda.lines import settle as settle_lines
from fastopt.kernels.cuda.lines import sum_terms as sum_terms_of_lines
from fastopt.kernels.cuda.lines import total as total_lines
from fastopt.kernels.cuda.lines import update as update_tiles
from fastopt.kernels.cuda.memory import (
    UNPACKING,
    dithering,
    loop,
    looping,
    memory,
    opaque,
    packing,
    rounding,
    unpacking,
)
from fastopt.kernels.cuda.norms import (
    SquaresKernel,
    add,
    added,
    block_sums,
    leave_sums,
    squared,
    squared_again,
    squares,
    squares_again,
    sum_runs,
)
from fastopt.kernels.cuda.sums import (
    N_SPAN,
    PAIR,
    Span,
    Stage,
    SummedKernel,
    nothing,
    putting,
    settle,
    spread,
    sum_again,
    sum_terms,
    termed,
    total,
)
from fastopt.kernels.cuda.target import SIMULATED, THREADS, DriverFunction, cuda, device, teach, type_of
from fastopt.signals import deferred_signals

T = TypeVar("T")

HOST_TO_DEVICE, DEVICE_TO_HOST, ON_DEVICE = 1, 2, 3
"""Of cudaMemcpyKind."""

PARTS = (
    ("LOOP", loop),
    ("BLOCK_SUMS", block_sums),
    ("LEAVE_SUMS", leave_sums),
    ("FOLD", fold),
)
"""Functions that know which thread they run in, and that every kernel has its own of."""

# --- tables on the device ---------------------------------------------------------------------------------------------


def columns_of(lines: np.ndarray) -> Any:
    """A `Chunk` of arrays: the columns of a table of chunks, as views."""
    return Chunk(*lines.T)


def cut(chunks: np.ndarray) -> np.ndarray:
    """The same chunks in pieces of at most BLOCK elements: as many as a block of threads is to take at a time."""
    given = columns_of(chunks)
    pieces = -(-(given.stop - given.start) // BLOCK)
    lines = np.repeat(chunks, pieces, axis=0)
    number = np.arange(len(lines)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    made = columns_of(lines)
    made.start[...] += number * BLOCK
    made.stop[...] = np.minimum(made.start + BLOCK, made.stop)
    made.grad[...] += number * BLOCK
    made.block[...] += number
    return lines


def spans_of(lines: np.ndarray) -> np.ndarray:
    """A `Span` for each parameter of a table of chunks that was made with ``whole=True`` and then `cut`."""
    columns = columns_of(lines)
    first = np.flatnonzero(np.diff(columns.place, prepend=-1))
    last = np.append(first, len(lines))[1:] - 1
    blocks = columns.block[first], columns.block[last] + 1
    spans = Span(columns.place[first], columns.group[first], *blocks, columns.stop[last] - columns.start[first])
    return np.stack(spans, 1)


class SentTable(NamedTuple):
    """A table of hyperparameters on the device, and what sends its content there again."""

    place: Array
    to: int
    """The address of the place."""
    source: int
    """The address of the NumPy array ..."""
    size: int
    """... and its bytes."""


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
        self._chunks: Kept[Chunks] = Kept(64)
        self._tiles: Kept[SentTiles] = Kept(64)
        self._places: Kept[Array] = Kept(64)
        self._tables: Kept[SentTable] = Kept(64)
        self._constants: Kept[Array] = Kept(256)
        self._recorded: list[Any] = []
        self._slots: dict[int, Slots] = {}
        self._unused: dict[tuple[int, Any], Array] = {}
        self._typed: dict[Any, Any] = {}
        self._prepared: dict[tuple[Any, int], PreparedKernel] = {}
        self._most_blocks = 4 if SIMULATED else 0
        """In a launch; 0 for as many as suit the device."""

    def connect(self) -> CUDA:
        """Find a device, and CuPy to hold its memory. Raises RuntimeError, with the reason, where CUDA cannot work."""
        self._use(*_array_module())
        return self

    def _use(self, xp: Any, pinned: Callable[[int], np.ndarray]) -> None:
        """Hold memory by CuPy, or by what stands for it."""
        self.xp, self.pinned = xp, pinned
        self._array_type = xp.ndarray
        # Looked up once: a step asks for them a dozen times.
        self._current_device, self._current_stream = xp.cuda.runtime.getDevice, xp.cuda.get_current_stream
        self._copy_async = xp.cuda.runtime.memcpyAsync

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
        if SIMULATED:
            return self.empty(1, dtype)
        key = (self._current_device(), dtype)
        found = self._unused.get(key)
        if found is None:
            found = self._unused[key] = self.empty(1, dtype)
        return found

    def upload(self, array: Any) -> Array:
        """A copy of a NumPy array on the device; an array of the device as it is."""
        return self.xp.asarray(array)

    def table(self, table: Any) -> Array:
        """As `Asynchronous.table`; while launches are recorded, the place alone: its content is sent later."""
        if not isinstance(table, np.ndarray) or isinstance(table, self._array_type):
            return table
        stream = self._current_stream()
        sent = self._tables.find(table, self._current_device(), stream)
        if stream.is_capturing():
            if sent is None:
                raise RuntimeError("step() is captured before there was one: make one ordinary step like it first")
            return self.keep(sent.place)
        if sent is None:
            place = self.xp.empty(table.shape, table.dtype)
            made = SentTable(place, self.address(place), table.__array_interface__["data"][0], table.nbytes)
            sent = self._tables.add(table, made, self.xp)
        self._send(sent, stream)
        return sent.place

    def _send(self, sent: SentTable, stream: Any) -> None:
        """Copy a table to the device, as ``ndarray.set`` does, which spends ten times as long on its checks.

        The content is taken before this returns: the memory of a NumPy array is not pinned.
        """
        self._copy_async(sent.to, sent.source, sent.size, HOST_TO_DEVICE, stream.ptr)

    def keep(self, kept: T) -> T:
        """Arrays that are not given back while launches are recorded: what was recorded may be run at any time."""
        if self.capturing():
            self._recorded.append(kept)
        return kept

    def stream(self) -> Any:
        """CuPy's current stream."""
        return self._current_stream()

    def located(self, arrays: Sequence[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[int] | None:
        """The addresses of arrays; None where one has another shape or dtype, or gaps, or is not on this device."""
        device, of_type = self._current_device(), self._array_type
        found = []
        for array in arrays:
            if type(array) is not of_type or array.shape != shape or array.dtype != dtype:
                return None
            memory = array.data
            if memory.device_id != device or not array.flags.c_contiguous:
                return None
            found.append(memory.ptr)
        return found

    def capturing(self) -> bool:
        """As `fastopt.kernels.contract.Backend`."""
        return bool(self._current_stream().is_capturing())

    def places(self, places: np.ndarray) -> Array:
        """A table of places on the device, its lines one after the other; that of a table seen lately is kept.

        The NumPy array is made read-only: where an address changes, the caller passes a new array.
        """
        if isinstance(places, self.xp.ndarray):
            return places
        return self._sent(places, self._places)

    def constant(self, array: np.ndarray) -> Array:
        """The elements of a NumPy array on the device, where they are kept. The NumPy array is made read-only."""
        return self._sent(array, self._constants)

    def _sent(self, array: np.ndarray, kept: Kept[Array]) -> Array:
        stream = self._current_stream()
        found = kept.find(array, self._current_device(), stream)
        if found is None:
            self._check_recordable()
            array.flags.writeable = False
            found = kept.add(array, self.upload(array.reshape(-1)), self.xp)
        if stream.is_capturing():
            self.keep(found)
        return found

    def chunks(self, chunks: np.ndarray) -> Chunks:
        """A table of chunks on the device; that of a table seen lately is kept."""
        stream = self._current_stream()
        found = self._chunks.find(chunks, self._current_device(), stream)
        if found is None:
            self._check_recordable()
            found = self._chunks.add(chunks, self._chunks_of(chunks), self.xp)
        if stream.is_capturing():
            self.keep(found)
        return found

    def tiles(self, tiles: Tiles) -> SentTiles:
        """A table of tiles on the device, and those of its lines; those of a table seen lately are kept."""
        found = self._tiles.find(tiles.table, self._current_device(), self._current_stream())
        if found is None:
            self._check_recordable()
            lines = {over: (self.upload(table.reshape(-1)), len(table)) for over, table in tiles.lines.items()}
            made = SentTiles(self.upload(tiles.table.reshape(-1)), len(tiles.table), lines)
            found = self._tiles.add(tiles.table, made, self.xp)
        return self.keep(found)

    def _chunks_of(self, chunks: np.ndarray) -> Chunks:
        lines = cut(chunks)
        columns = columns_of(lines)
        by_place = lines.copy()
        columns_of(by_place).group[...] = columns.place
        spans = spans_of(lines)
        return Chunks(
            self.upload(lines.reshape(-1)),
            self.upload(by_place.reshape(-1)),
            len(lines),
            self.upload(spans.reshape(-1)),
            len(spans),
            spans[:, 0],
            int(columns.block[-1]) + 1 if len(lines) else 0,
            int(columns.place.max(initial=-1)) + 1,
            Partials(),
        )

    def partials(self, found: Chunks, width: int) -> tuple[Array, Array]:
        """Room for the partial sums of a norm over chunks, `width` of each block; and the same, a line for each block.

        The room of the norm before on the same stream is used again: what reads it was launched before.
        """
        stream, capturing = self._current_stream(), self.capturing()
        used_by, array, lines = found.partials.latest
        if used_by is not stream or capturing or lines.shape != (found.blocks, width):
            array = self.empty(width * found.blocks)
            lines = array.reshape(found.blocks, width)
            if not capturing:
                found.partials.latest = stream, array, lines
        return array, lines

    def _check_recordable(self) -> None:
        if self.capturing():
            raise RuntimeError(
                "a step or pass is captured before there was one like it on this device: make an ordinary one first"
            )

    def addresses(self, arrays: tuple[Array, ...]) -> tuple[int, ...]:
        """Where buffers of the current device begin."""
        device, found = self._current_device(), []
        for array in arrays:
            memory = array.data
            if memory.device_id != device:
                self._check_device(array)
            found.append(memory.ptr)
        return tuple(found)

    # --- kernels ------------------------------------------------------------------------------------------------------

    def kernel(
        self,
        rule: KernelRule,
        hyper: type,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], type] | None = None,
        storage: Storage | None = None,
    ) -> Kernel:
        """As `fastopt.kernels.contract.Backend`."""
        key = (rule, hyper, dtype, features, first, storage)
        if key not in self._kernels:
            self._kernels[key] = self._bind(rule, hyper, dtype, features, first, storage)
        kernel: Kernel = self._kernels[key]
        return kernel

    def norm(self, dtype: np.dtype[Any], features: Features, grads: str | None = None) -> SquaresKernel:
        """As `fastopt.kernels.contract.Backend`."""
        stored = grads or dtype.name
        key = ("norm", dtype, features, stored)
        if key not in self._kernels:
            constants = {**_of_dtype(dtype), **_of_format("G", stored, dtype)}
            constants |= elements.conditioning(dtype, features, device)
            measuring = {**constants, **looping(squared, constants, dtype, 1, in_order=True, formats=(stored,))}
            self._kernels[key] = SquaresKernel(
                self,
                self.compiled(squares, measuring, f"squares_{stored}"),
                self._measuring_again(dtype, constants, selects=False),
                sums_per_block(dtype),
            )
        kernel: SquaresKernel = self._kernels[key]
        return kernel

    def _measuring_again(self, dtype: np.dtype[Any], constants: dict[str, Any], *, selects: bool) -> Any:
        """`squares_again` of a kernel with these constants; None for a dtype whose squares stay in range."""
        if sums_per_block(dtype) == 2:
            return None
        constants = {**constants, "SELECTS": selects}
        constants |= looping(squared_again, constants, dtype, 1, in_order=True)
        return self.compiled(squares_again, constants, f"squares_again_{dtype.name}")

    def decide(
        self,
        table: Array,
        candidates: np.ndarray | None,
        partials: Array,
        factor: float,
        max_norm: float | None,
        skipped: tuple[Array, int] | None,
    ) -> PendingDecision:
        """As `fastopt.kernels.contract.Asynchronous`."""
        blocks, width = partials.shape
        key = ("decide", table.dtype, width, max_norm is not None, skipped is not None, candidates is not None)
        kernel = self._kernels.get(key)
        if kernel is None:
            columns = {name.upper(): StepHyper._fields.index(name) for name in ("coefficient", "proceeds")}
            flags = dict(zip(("CLIPS", "SKIPS", "CHOOSES"), key[3:], strict=True))
            constants = {"CLIP_COEFFICIENT": clip_coefficient, "WIDTH": width, **columns, **flags}
            kernel = self._kernels[key] = self.compiled(decide, constants, "decide")
        stream = self._current_stream()
        slots = self._slots_of(self._current_device())
        recorded = stream.is_capturing()
        slot = Slots(self).take(stream) if recorded else slots.take(stream)
        counted, known = (self.unused(np.int64), 0) if skipped is None else skipped
        possible = self.unused(table.dtype) if candidates is None else self.table(candidates)
        rows, columns = table.shape
        limit = 0.0 if max_norm is None else float(max_norm)
        norm = float(factor), limit
        self.launch(kernel, 1, partials, blocks, *norm, known, possible, rows, columns, counted, table, slot.result)
        if recorded:
            return PendingDecision(self, slot, None)
        slot.event.record(stream)
        return PendingDecision(self, slot, slots)

    def _slots_of(self, device: int) -> Slots:
        slots = self._slots.get(device)
        return self._slots.setdefault(device, Slots(self)) if slots is None else slots

    def move(self, to: Array, source: Array) -> None:
        """Copy an array of the current device to another one of the same size and dtype, on the current stream."""
        address = self.address
        self._copy_async(address(to), address(source), source.nbytes, ON_DEVICE, self._current_stream().ptr)

    def fetch(self, to: int, address: int, size: int) -> None:
        """Have bytes at an address of the device copied to pinned memory of the host, on the current stream."""
        self._copy_async(to, address, size, DEVICE_TO_HOST, self._current_stream().ptr)

    def add(
        self,
        places: Array,
        present: Array,
        overwrite: Array,
        weight: np.ndarray,
        chunks: Array,
        partials: Array,
        adder: Adder,
        dtype: np.dtype[Any],
        grads: str | None = None,
    ) -> None:
        """As `fastopt.kernels.contract.Backend`: a launch for what is added to, and one for what is overwritten."""
        found, where = self.chunks(chunks), self.places(places)
        with deferred_signals:
            for overwriting in (False, True):
                selected = present & (overwrite == overwriting)
                if selected.any():
                    kernel, again = self._adding(dtype, adder, overwriting, grads or dtype.name)
                    flags = self.upload(selected.astype(np.int64))
                    lines = (found.lines, found.length, partials)
                    self.launch(kernel, found.length, where, flags, float(weight[0]), *lines)
                    if again is not None:
                        self.launch(again, found.length, where, flags, self.unused(dtype), 0, *lines)
            weight[1] = 1

    def sum_rows(self, grads: Array, order: np.ndarray, starts: np.ndarray) -> Array:
        """As `fastopt.kernels.contract.Backend`."""
        key = ("sum_runs", grads.dtype)
        if key not in self._kernels:
            self._kernels[key] = self.compiled(sum_runs, {"ZERO": grads.dtype.type(0)}, f"sum_runs_{grads.dtype.name}")
        sums = self.empty((len(starts), grads.shape[1]), grads.dtype)
        ends = self.upload(np.append(starts, len(order)))
        numbers, runs, width = self.upload(order), len(starts), grads.shape[1]
        self.launch(self._kernels[key], runs, grads, numbers, ends, runs, width, sums)
        return sums

    def _adding(self, dtype: np.dtype[Any], adder: Adder, overwriting: bool, grads: str) -> Any:
        key = ("add", dtype, adder, overwriting, grads)
        if key not in self._kernels:
            features = Features(zero_nonfinite=adder.zero_nonfinite)
            constants = {
                **_of_dtype(dtype),
                **_of_format("G", grads, dtype),
                "MEASURE": adder.measure,
                "OVERWRITE": overwriting,
                "STEP": StepHyper(*[0.0] * N_STEP),  # not looked at: none of its features is on
                **elements.conditioning(dtype, features, device),
            }
            formats = (dtype.name, grads)
            adding = {**constants, **looping(added, constants, dtype, 2, in_order=adder.measure, formats=formats)}
            again = self._measuring_again(dtype, constants, selects=True)
            self._kernels[key] = self.compiled(add, adding, f"add_{grads}"), again if adder.measure else None
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
        rule: KernelRule,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        first: tuple[Callable[..., Any], Any] | None,
        storage: Storage | None,
    ) -> Kernel:
        teach()
        storage = storage or Storage(dtype.name, dtype.name, (dtype.name,) * (len(rule.states) + features.ema))
        # What numba infers for the host holds for the device; this needs no device.
        on_host = elements.scalar(bind(rule.scalar, {}, label=f"{rule.name}_{dtype}", scalar=elements.scalar))
        elements.check_rule(rule, on_host, hyper, dtype)
        compiled = device(bind(rule.scalar, {}, label=f"{rule.name}_{dtype}", scalar=device))
        constants, label = elements.surrounded(rule, compiled, hyper, dtype, features, first, device)
        constants |= {
            **_of_dtype(dtype),
            **_of_rows(hyper, None if first is None else first[1]),
            **_stored(storage, dtype),
        }
        if storage.keeps:
            constants["ELEMENT"] = bind(elements.kept_apart, constants, label="kept_apart", scalar=device)
        constants["HYPERPARAMETERS"] = bind(hyperparameters, constants, label="hyperparameters", scalar=device)
        if rule.lined:
            return self._bind_lines(rule, hyper, dtype, features, constants, label, storage)
        constants["READS_GRADIENT"] = features.zero_grad or not features.still
        constants["ALONE"] = constants["N_STATES"] == 0 and not storage.keeps
        codes = [k for k, form in enumerate(storage.states) if form in CODED]
        if codes:
            kernel = self._bind_codes(constants, storage, f"coded_{label}")
            return ElementwiseKernel(self, kernel, features.scattered, codes[0])
        formats = (storage.params, *storage.states, *[storage.grads] * constants["READS_GRADIENT"])
        buffers = len(formats)
        drawn = _drawn(storage, features)
        looped = looping(updated, constants, dtype, buffers, in_order=False, formats=formats, drawn=drawn)
        updating = {**constants, **looped}
        blocks = at_once(buffers, dtype)
        if features.gated and buffers == 4:  # the old values are kept until the new ones are written
            blocks = min(blocks, 3)
        if first is not None or features.still:  # closed forms have many hyperparameters
            blocks = 2
        kernel = self.compiled(elementwise, updating, label, blocks)
        update = ElementwiseKernel(self, kernel, features.scattered)
        if rule.sums:
            return self._bind_sums(rule, hyper, dtype, features, constants, label, update, storage)
        return update

    def _bind_codes(self, constants: dict[str, Any], storage: Storage, label: str) -> Any:
        """The kernel of a rule with states of 8 bits. constants : of the update."""
        from fastopt.kernels.cuda.coded import coded, functions_of  # loaded by those who use it

        names = _drawn(storage, Features(zero_grad=constants["ZERO_GRAD"]))
        constants = {
            **constants,
            **functions_of(storage, constants),
            "UPDATED": bind(updated, constants, label="updated", scalar=device),
            "OPAQUE": opaque(),
            "STOCHASTIC": storage.stochastic,
            "DITHERED": dithering(names, 1) if storage.stochastic else None,
        }
        return self.compiled(coded, constants, label)

    def _bind_sums(
        self,
        rule: KernelRule,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        constants: dict[str, Any],
        label: str,
        update: ElementwiseKernel,
        storage: Storage,
    ) -> SummedKernel:
        """constants, label : of the update."""
        stages: list[Stage] = []
        names = list(rule.numbers)
        for sums in rule.sums:
            (pairs, again), of_pairs = _pairs_of(sums, dtype), {**_of_dtype(dtype)}
            of_pairs["HYPERPARAMETERS"] = constants["HYPERPARAMETERS"]

            def passing(kernel: Any, pair: tuple[Any, ...], of_pairs: dict[str, Any] = of_pairs) -> Any:
                adding, of_pair = elements.of_terms(rule, pair, hyper, dtype, features, device)
                adding |= of_pairs
                adding = _of_kept(constants, adding)
                formats = (*_read_by_terms(storage, rule), storage.grads, storage.params)
                adding |= looping(termed, adding, dtype, len(formats), in_order=True, formats=formats)
                return self.compiled(kernel, adding, f"{kernel.__name__}_{of_pair}")

            found = elements.settling(rule, sums, hyper, device, PAIR * len(pairs) if again else None)
            n_values = found["N_RESULTS"] + found["N_NUMBERS"]
            load, store = memory(np.dtype(np.float64), 1, True)
            settling = {
                **constants,
                **found,
                "N_TOTALS": PAIR * max(1, len(pairs) + len(again)),
                "N_VALUES": n_values,
                "OWN_ROWS": bool(stages),
                "LOAD_NUMBERS": load,
                "STORE_NUMBERS": store,
                "UNPACK_SUMS": unpacking(PAIR * (len(pairs) + len(again))),
                "UNPACK_NUMBERS": unpacking(found["N_NUMBERS"]),
                "PACK_VALUES": packing(n_values),
                "PUT_RESULTS": putting(found["COLUMNS"][: found["N_RESULTS"]]),
            }
            stages.append(
                Stage(
                    tuple([passing(sum_terms, pair) for pair in pairs]),
                    tuple([(number, passing(sum_again, pair)) for number, pair in again]),
                    self.compiled(total, settling, f"total_{label}"),
                    self.compiled(settle, settling, f"settle_{label}"),
                    self.compiled(spread, settling, f"spread_{label}"),
                    n_values,
                    tuple([names.index(name) for name in sums.numbers]),
                    sums.over == "all",
                )
            )
        return SummedKernel(self, tuple(stages), update, len(rule.states), len(names), kept=bool(storage.keeps))

    def _bind_lines(
        self,
        rule: KernelRule,
        hyper: Any,
        dtype: np.dtype[Any],
        features: Features,
        constants: dict[str, Any],
        label: str,
        storage: Storage,
    ) -> LinedKernel:
        """constants, label : of the update."""
        fields: dict[str, tuple[int, ...]] = {"tensor": (), "row": (), "column": ()}
        """Of h, those that are settled so far."""
        load, store = memory(dtype, 1, True)
        load_numbers, store_numbers = memory(np.dtype(np.float64), 1, True)
        load_both, store_param = memory(dtype, 1, True, (storage.params, storage.grads))
        drawn, read = _drawn(storage, Features()), _read_by_terms(storage, rule)
        constants = {
            **constants,
            "LOAD_BOTH": load_both,
            "STORE_PARAM": store_param,
            "STORE_GRAD": memory(dtype, 1, True, (storage.grads,))[1],
            "DITHERED": dithering(drawn, 1) if drawn else None,
            "STOCHASTIC": bool(drawn),
            "STORE": store,
            "LOAD_NUMBERS": load_numbers,
            "STORE_NUMBERS": store_numbers,
            "UNPACK_TILE": unpacking(N_TILE),
            "UNPACK_LINE": unpacking(N_LINE),
        }

        def replaced() -> dict[str, Any]:
            return {f"OF_{level.upper()}": replacing(own, hyper, load, dtype.itemsize) for level, own in fields.items()}

        stages: list[LinedStage] = []
        names = list(rule.numbers)
        for sums in rule.sums:
            level, (of_terms, scaled) = LEVEL[sums.over], _pairs_of(sums, dtype)
            found = elements.settling(rule, sums, hyper, device, PAIR * len(of_terms) if scaled else None)
            of_terms += [pair for _, pair in scaled]
            same = () if level == "tensor" else fields[level]
            settling = {
                **constants,
                **found,
                **replaced(),
                "OF_LINE": replacing(same, hyper, load, dtype.itemsize),
                "N_TOTALS": PAIR * max(1, len(of_terms)),
                "UNPACK_SUMS": unpacking(PAIR * len(of_terms)),
                "BY_ROW": sums.over == "row",
                "BY_COLUMN": sums.over == "column",
            }
            settling["SETTLED_AT"] = bind(settled_at, settling, label="settled_at", scalar=device)
            pairs = []
            for pair in of_terms:
                adding, of_pair = elements.of_terms(rule, pair, hyper, dtype, features, device)
                adding = {**settling, **_of_kept(constants, adding), "N_BUFFERS": len(read)}
                adding["LOAD_STATES"], _ = memory(dtype, 1, True, read)
                adding["AT"] = bind(terms_at, adding, label="terms_at", scalar=device)
                pairs.append(self.compiled(sum_terms_of_lines, adding, f"sum_terms_of_lines_{of_pair}"))
            stages.append(
                LinedStage(
                    sums.over,
                    tuple(pairs),
                    self.compiled(total_lines, settling, f"total_lines_{label}"),
                    self.compiled(settle_lines, settling, f"settle_lines_{label}"),
                    len(sums.results),
                    tuple([names.index(name) for name in sums.numbers]),
                )
            )
            fields[level] += elements.fields_of(rule, sums, hyper)
        load_states, store_states = memory(dtype, 1, True, storage.states)
        updating = {**constants, **replaced(), "N_BUFFERS": len(storage.states)}
        updating |= {"LOAD_STATES": load_states, "STORE_STATES": store_states}
        updating["AT"] = bind(update_at, updating, label="update_at", scalar=device)
        update = self.compiled(update_tiles, updating, f"tiles_{label}")
        kept = bool(storage.keeps)
        return LinedKernel(self, tuple(stages), update, dtype, len(rule.states), len(names), kept=kept)

    def compiled(
        self, function: Callable[..., None], constants: dict[str, Any], label: str, blocks: int | None = None
    ) -> Any:
        """A kernel: a function bound to its constants. It is compiled at its first launch, which needs a device.

        blocks : how many are to fit on a multiprocessor at least, which limits the registers of a thread.
        """
        bound = bind(function, {**dict(PARTS), **constants}, label=label, scalar=device)
        # The simulator puts its own module in the place of `cuda` in the globals of a kernel while it runs: these
        # functions share them.
        for name, part in PARTS:
            own = FunctionType(part.__code__, bound.__globals__, name)
            bound.__globals__[name] = device(own)
        options = {} if SIMULATED or blocks is None else {"launch_bounds": (THREADS, blocks)}
        return cuda.jit(bound, **options)

    def launch(self, kernel: Any, blocks: int, *arguments: Any) -> None:
        """Run a kernel on CuPy's current stream. Its first launch decides of what type every argument is.

        An array is passed as the address of its first element: it has no gaps, and the kernel indexes it as 1-D.
        """
        if blocks == 0:
            return
        if SIMULATED:
            self._check_device(arguments[0])
            simulated.launch(partial(_simulated, kernel, min(blocks, self._most_blocks)), arguments)
            return
        device = self._current_device()
        prepared = self._prepared.get((kernel, device))
        if prepared is None:
            prepared = self._prepared[kernel, device] = self._prepare(kernel, arguments)
        words = [*arguments]
        for k in prepared.arrays:
            memory = words[k].data
            if memory.device_id != device:
                self._check_device(words[k])
            words[k] = memory.ptr
        for k in prepared.tuples:
            words[k : k + 1] = words[k]
        prepared.launch(min(blocks, self._most_blocks or prepared.most_blocks), self._current_stream().ptr, words)

    def _prepare(self, kernel: Any, arguments: tuple[Any, ...]) -> PreparedKernel:
        """A kernel on the current device, compiled for arguments of these types."""
        typed = self._typed.get(kernel)
        if typed is None:
            signature = tuple(type_of(argument) for argument in arguments)
            options = {"launch_bounds": kernel.targetoptions["launch_bounds"]}
            typed = self._typed[kernel] = cuda.jit(signature, **options)(kernel.py_func)
        arrays = [k for k, argument in enumerate(arguments) if isinstance(argument, self._array_type)]
        tuples = [k for k, argument in enumerate(arguments) if isinstance(argument, tuple)]
        words = [each for argument in arguments for each in (argument if isinstance(argument, tuple) else (argument,))]
        return PreparedKernel(DriverFunction(typed), words, arrays, tuples[::-1])

    def _check_device(self, array: Any) -> None:
        """Refuse to launch on the current device what works on another's arrays."""
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
        """As `fastopt.kernels.contract.Backend`: arrays of a device as they are, NumPy's uploaded.

        CuPy keeps a reference to the owner of the memory, and waits for the stream that an owner names. CuPy's
        `asarray` copies an array of another device to the current one. An update of the copy would be lost: CuPy's own
        arrays are returned as they are, and the caller checks their device; those of other libraries are refused.
        """
        if isinstance(leaf, self.xp.ndarray):
            return leaf
        if isinstance(leaf, np.ndarray):
            return self.upload(leaf)
        try:
            interface = getattr(leaf, "__cuda_array_interface__", None)
        except RuntimeError:  # torch's, of a tensor that requires grad
            return None
        if interface is None:
            return None
        torch = sys.modules.get("torch")
        if torch is not None and type(leaf).__module__.partition(".")[0] == "torch":  # it names no stream
            theirs, ours = torch.cuda.current_stream().cuda_stream, self.xp.cuda.get_current_stream().ptr
            if theirs != ours:
                raise ValueError(
                    f"the current stream of torch ({theirs:#x}) is not that of CuPy ({ours:#x}), on which kernels run: "
                    f"use `with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):`"
                )
        array = self.xp.asarray(leaf)
        if array.size and self.address(array) != interface["data"][0]:
            raise ValueError(
                f"must be on device {self.device}, the current one, got an array on another device; make that device "
                f"the current one by `with cupy.cuda.Device(...):`"
            )
        return array

    @property
    def device(self) -> int:
        """As `fastopt.kernels.contract.Backend`."""
        number: int = self._current_device()
        return number

    def device_of(self, array: Array) -> int:
        """As `fastopt.kernels.contract.Backend`."""
        number: int = array.device.id
        return number

    def copy(self, to: Array, source: Array) -> None:
        """As `fastopt.kernels.contract.Backend`."""
        if (
            type(source) is np.ndarray
            and (sent := self._tables.find(source, self._current_device(), self._current_stream())) is not None
            and sent.place is to
        ):
            self._send(sent, self._current_stream())
        elif (
            type(source) is np.ndarray
            and source.dtype == to.dtype
            and source.shape == to.shape
            and to.flags.c_contiguous
        ):
            to.set(source)
        else:
            to[...] = self.xp.asarray(source, to.dtype)

    def address(self, array: Array) -> int:
        """As `fastopt.kernels.contract.Backend`."""
        address: int = array.data.ptr
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


def _simulated(kernel: Any, grid: int, *arguments: Any) -> None:
    """Run a kernel in numba's simulator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of infinities and NaN
        kernel[grid, THREADS](*arguments)


def at_once(buffers: int, dtype: np.dtype[Any]) -> int:
    """How many blocks a multiprocessor is to have room for, where a loop reads that many buffers 16 bytes at a time.

    As many as all rules and features allow without spilling: 4 buffers fit into 64 registers a thread, 5 into 80, and 7
    (Adan with a moving average) need 94. At 256 threads, 48 to 64 KiB are then under way at once. By its data sheet, an
    H100 moves 17 KiB a multiprocessor in the 0.7 us that a read takes. More than 8 buffers, which no rule of
    ours has, may take all the registers that a thread can have.
    """
    if buffers > 8:
        return 1
    return max(2, min(4, 8 - buffers)) if dtype.itemsize == 4 else 2


def _pairs_of(sums: SumsFunctions, dtype: np.dtype[Any]) -> tuple[list[Any], list[tuple[int, Any]]]:
    """The terms in pairs, a norm's squared; in float64, each norm's number and scaled squares."""
    terms = [*sums.terms.values(), *[elements.squared(norm) for norm in sums.norms.values()]]
    pairs = [(*terms[first : first + PAIR], nothing)[:PAIR] for first in range(0, len(terms), PAIR)]
    if dtype.itemsize == 4:
        return pairs, []
    scaled = [tuple(elements.squared(norm, scale) for scale in (SCALE_UP, SCALE_DOWN)) for norm in sums.norms.values()]
    return pairs, list(enumerate(scaled, len(sums.terms)))


UNPACK_SPANS = {"UNPACK_SPAN": unpacking(N_SPAN)}


def _of_dtype(dtype: np.dtype[Any]) -> dict[str, Any]:
    """The constants of every kernel that reads chunks and places."""
    return {
        "DTYPE": dtype.type,
        "ITEMSIZE": dtype.itemsize,
        "WIDTH": sums_per_block(dtype),
        "ROOT_OF_SQUARES": root_of_squares,
        "UNPACK_STEP": unpacking(N_STEP),
        **UNPACKING,
    }


def _of_format(buffer: str, form: str, dtype: np.dtype[Any]) -> dict[str, int]:
    """The constants by which a kernel finds a number of a buffer, "P" or "G", of a format."""
    size = STORED[form].itemsize
    return {f"{buffer}_BYTES": size, f"{buffer}_SHIFT": int(size < dtype.itemsize)}


def _stored(storage: Storage, dtype: np.dtype[Any]) -> dict[str, Any]:
    """What a kernel needs to know of the formats of its buffers, besides those of the loads and stores."""
    of_kept = {"MASTER": storage.keeps == MASTER, "ROUNDED": rounding(storage.params) if storage.keeps else None}
    return {
        **of_kept,
        **_of_format("P", storage.params, dtype),
        **_of_format("G", storage.grads, dtype),
        "KEPT": bool(storage.keeps),
        "EXACT": bind(elements.exact, of_kept, label="exact", scalar=device) if storage.keeps else None,
    }


def _drawn(storage: Storage, features: Features) -> tuple[str, ...]:
    """Of the values of an element that are written, the formats to which they are rounded at random, if at all."""
    if not storage.stochastic:
        return ()
    from fastopt.kernels.formats import drawn

    return (*drawn(storage), *[FLOAT32] * features.zero_grad)


def _read_by_terms(storage: Storage, rule: KernelRule) -> tuple[str, ...]:
    """The formats of the buffers of states that terms of sums read: the rule's, and what is kept of the parameters."""
    return storage.states[: len(rule.states)] + (storage.states[-1:] if storage.keeps else ())


def _of_kept(constants: dict[str, Any], of_terms: dict[str, Any]) -> dict[str, Any]:
    """The constants of a kernel over terms, for the storage in those of the update."""
    names = ("KEPT", "EXACT", "P_BYTES", "P_SHIFT", "G_BYTES", "G_SHIFT")
    found = {**of_terms, **{name: constants[name] for name in names}}
    if constants["KEPT"]:
        found["ELEMENT"] = bind(elements.terms_of_kept, found, label="terms_of_kept", scalar=device)
    return found


def _of_rows(hyper: Any, first: Any) -> dict[str, Any]:
    """The constants by which `hyperparameters` reads a row of the table, and what else the kernels of a rule read."""
    n_hyper, n_first = len(hyper._fields), 0 if first is None else len(first._fields)
    return {
        "N_ROW": N_STEP + n_hyper + n_first,
        "UNPACK_HYPER": unpacking(n_hyper),
        "UNPACK_FIRST": unpacking(n_first),
        **UNPACK_SPANS,
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
        return simulated, simulated.empty_pinned
    reason = survey()["reason"]
    if reason is None:
        try:
            return import_module("cupy"), import_module("cupyx").empty_pinned
        except ImportError as error:
            reason = f"CuPy, which holds the buffers, cannot be imported ({error}); pip install 'fastopt[cuda13]'"
    raise RuntimeError(f"backend='cuda': {reason}; use backend='cpu'")
