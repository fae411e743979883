"""Intrinsics that numba lacks: views without a reference count, calls by address, atomics, a clock, machine modes."""

# Intrinsics are typed by numba.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from fastopt.kernels.contract import ALIGNMENT
from fastopt.source import written

WORD = ir.IntType(64)
BYTE = ir.IntType(8)
INT32 = ir.IntType(32)
MACHINE = platform.machine()
"""Selects the machine instructions below. Only x86_64 and aarch64 have any."""

# --- views ------------------------------------------------------------------------------------------------------------


@intrinsic
def window(typing_context, array, start, size):
    """Return array.reshape(-1)[start : start + size] of a C-contiguous array, without bounds or a reference count.

    The view does not keep the array alive: its owner must. The reference count of a slice would be atomic, and threads
    would contend for it: 100 ns for a chunk of 64 elements. Many slices also take seconds to compile, windows a
    fraction of a second.
    """

    def build(context, builder, signature, arguments):
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        data = builder.gep(source.data, [arguments[1]])
        return _view(context, builder, signature.return_type, data, arguments[2])

    return types.Array(array.dtype, 1, "C")(array, types.intp, types.intp), build


@intrinsic
def windows(typing_context, arrays, start, size):
    """Return the tuple of `window` of every array of a tuple."""
    made = types.Tuple([types.Array(array.dtype, 1, "C") for array in arrays])

    def build(context, builder, signature, arguments):
        views = []
        for k, kind in enumerate(signature.args[0]):
            source = context.make_array(kind)(context, builder, builder.extract_value(arguments[0], k))
            data = builder.gep(source.data, [arguments[1]])
            views.append(_view(context, builder, made[k], data, arguments[2]))
        return context.make_tuple(builder, signature.return_type, views)

    return made(arrays, types.intp, types.intp), build


def _view(context: Any, builder: Any, kind: Any, data: Any, size: Any) -> Any:
    """Return a 1-D contiguous array of `size` elements at the pointer `data`."""
    from numba.np.arrayobj import populate_array  # 20 ms, which a process whose kernels are on disk does not need

    view = context.make_array(kind)(context, builder)
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    populate_array(view, data=data, shape=[size], strides=[itemsize], itemsize=itemsize, meminfo=None)
    return view._getvalue()


@intrinsic
def values_at(typing_context, arrays, i):
    """Return the tuple of the elements i of a tuple of 1-D contiguous arrays, without checking bounds or sign."""
    made = types.Tuple([array.dtype for array in arrays])

    def build(context, builder, signature, arguments):
        values = []
        for k, kind in enumerate(signature.args[0]):
            view = context.make_array(kind)(context, builder, builder.extract_value(arguments[0], k))
            values.append(context.unpack_value(builder, kind.dtype, builder.gep(view.data, [arguments[1]])))
        return context.make_tuple(builder, signature.return_type, values)

    return made(arrays, types.intp), build


@intrinsic
def put_values(typing_context, arrays, i, values):
    """Store a tuple of values, or a single value, as the elements i of a tuple of 1-D contiguous arrays."""

    def build(context, builder, signature, arguments):
        several = isinstance(signature.args[2], types.BaseTuple)
        for k, kind in enumerate(signature.args[0]):
            value = builder.extract_value(arguments[2], k) if several else arguments[2]
            _put(context, builder, kind, builder.extract_value(arguments[0], k), arguments[1], value)
        return context.get_dummy_value()

    found = list(values) if isinstance(values, types.BaseTuple) else [values]
    if found != [array.dtype for array in arrays]:
        raise TypingError(f"values: must be one of the dtype of each of {arrays}, got {values}")
    return types.none(arrays, types.intp, values), build


@intrinsic
def put_rounded(typing_context, arrays, i, values):
    """Store the first numbers of a tuple, rounded, as the elements i of a tuple of 1-D contiguous arrays."""

    def build(context, builder, signature, arguments):
        for k, kind in enumerate(signature.args[0]):
            value = context.cast(builder, builder.extract_value(arguments[2], k), values[k], kind.dtype)
            _put(context, builder, kind, builder.extract_value(arguments[0], k), arguments[1], value)
        return context.get_dummy_value()

    return types.none(arrays, types.intp, values), build


def _put(context: Any, builder: Any, kind: Any, array: Any, index: Any, value: Any) -> None:
    """Store a value as an element of an array of this type."""
    view = context.make_array(kind)(context, builder, array)
    context.pack_value(builder, kind.dtype, value, builder.gep(view.data, [index]))


def rooms_for(size: int) -> Any:
    """Return an intrinsic ``rooms(values)``: a 1-D array of `size` elements of the type of each value of a tuple.

    They are in its caller's frame, valid until that returns.
    """

    @intrinsic
    def rooms(typing_context, values):
        made = types.Tuple([types.Array(types.unliteral(kind), 1, "C") for kind in values])

        def build(context, builder, signature, arguments):
            length = context.get_constant(types.intp, size)
            views = []
            for kind in made:
                data = cgutils.alloca_once(builder, context.get_data_type(kind.dtype), length)
                views.append(_view(context, builder, kind, data, length))
            return context.make_tuple(builder, signature.return_type, views)

        return made(values), build

    return rooms


@intrinsic
def add_values(typing_context, totals, values):
    """Return the tuple of sums of two tuples of numbers, in float64; a loop that adds may change the order of these.

    Only these additions: how the values are computed is not touched.
    """
    if len(totals) != len(values) or not all(isinstance(kind, types.Number | types.Boolean) for kind in values):
        raise TypingError(f"values: must be {len(totals)} numbers, got {values}")
    made = types.UniTuple(types.float64, len(totals))

    def build(context, builder, signature, arguments):
        found = []
        for k, kind in enumerate(signature.args[1]):
            value = context.cast(builder, builder.extract_value(arguments[1], k), kind, types.float64)
            found.append(builder.fadd(builder.extract_value(arguments[0], k), value, flags=("reassoc",)))
        return context.make_tuple(builder, made, found)

    return made(totals, values), build


@intrinsic
def record(typing_context, kind, array, first):
    """Return the elements of a contiguous array from index `first` on as a NamedTuple of the class `kind`."""
    size = len(kind.instance_class._fields)
    made = types.NamedUniTuple(array.dtype, size, kind.instance_class)

    def build(context, builder, signature, arguments):
        source = context.make_array(signature.args[1])(context, builder, arguments[1])
        values = []
        for k in range(size):
            place = builder.gep(source.data, [builder.add(arguments[2], arguments[2].type(k))])
            values.append(context.unpack_value(builder, array.dtype, place))
        return context.make_tuple(builder, signature.return_type, values)

    return made(kind, array, types.intp), build


def replacing(fields: tuple[int, ...]) -> Any:
    """Return an intrinsic ``(values, arrays, i)``: a tuple, these fields of which are the elements i of `arrays`."""

    @intrinsic
    def replaced(typing_context, values, arrays, i):
        def build(context, builder, signature, arguments):
            found = arguments[0]
            for k, field in enumerate(fields):
                kind = signature.args[1][k]
                view = context.make_array(kind)(context, builder, builder.extract_value(arguments[1], k))
                value = context.unpack_value(builder, kind.dtype, builder.gep(view.data, [arguments[2]]))
                found = builder.insert_value(found, value, field)
            return found

        return values(values, arrays, types.intp), build

    return replaced


@intrinsic
def at_address(typing_context, dtype, address, start, size):
    """Return a 1-D array of `dtype` on the memory that begins `start` elements after `address`."""
    made = types.Array(dtype.dtype, 1, "C")

    def build(context, builder, signature, arguments):
        number = context.get_data_type(made.dtype)
        base = builder.inttoptr(arguments[1], number.as_pointer())
        return _view(context, builder, made, builder.gep(base, [arguments[2]]), arguments[3])

    return made(dtype, types.int64, types.int64, types.int64), build


@intrinsic
def pointer(typing_context, dtype, address, start):
    """Return a pointer to element `start` of the elements of `dtype` at an address; it can do ``pointer[i]`` alone.

    numba compiles it faster than an array.
    """

    def build(context, builder, signature, arguments):
        number = context.get_data_type(dtype.dtype)
        return builder.gep(builder.inttoptr(arguments[1], number.as_pointer()), [arguments[2]])

    return types.CPointer(dtype.dtype)(dtype, types.int64, types.int64), build


@intrinsic
def address(typing_context, array):
    """Return the address of the first element of a contiguous array."""

    def build(context, builder, signature, arguments):
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(source.data, WORD)

    return types.int64(array), build


@intrinsic
def fetch(typing_context, array, start, stop):
    """Prefetch array[start:stop] into the cache."""

    def build(context, builder, signature, arguments):
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte = BYTE.as_pointer()
        flag = INT32
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        start, stop = arguments[1:]
        line = ALIGNMENT // context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        with cgutils.for_range_slice(builder, start, stop, start.type(line)) as (index, _):
            address = builder.bitcast(builder.gep(source.data, [index]), byte)
            builder.call(prefetch, [address, flag(1), flag(3), flag(1)])  # to be written, kept, data
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), build


def fetching(numbers: tuple[int, ...]) -> Any:
    """Return a function ``(arrays, start, stop)`` that prefetches a part of those arrays of a tuple."""
    lines = [f"FETCH(arrays[{k}], start, stop)" for k in numbers]
    return written("fetching", ["arrays", "start", "stop"], [*lines, "return None"], {"FETCH": fetch}, __name__)


@intrinsic
def keep(typing_context, array):
    """Keep the array, and thus its windows, alive until this point."""

    def build(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.none(array), build


# --- calls ------------------------------------------------------------------------------------------------------------


@intrinsic
def invoke(typing_context, address, arguments):
    """Call the compiled function at `address`, which returns nothing, with a tuple of arguments of its exact types.

    A function that calls another one by name gets a copy of its code and optimises that again, so a loop would be
    compiled once per caller. A loop that is called by address is compiled once, and its caller once for all flags. The
    address is an argument, so nothing in a cache file depends on it.
    """

    def build(context, builder, signature, values):
        kinds = tuple(signature.args[1])
        unpacked = [builder.extract_value(values[1], k) for k in range(len(kinds))]
        _call(context, builder, values[0], kinds, unpacked)
        return context.get_dummy_value()

    return types.none(types.int64, arguments), build


def _call(context: Any, builder: Any, address: Any, kinds: tuple[Any, ...], values: list[Any]) -> None:
    function = context.call_conv.get_function_type(types.none, kinds)
    pointer = builder.inttoptr(address, function.as_pointer())
    context.call_conv.call_function(builder, pointer, types.none, kinds, values)


@intrinsic
def spill(typing_context, value):
    """Store a value in this function's frame and return its address, which is valid until the function returns."""

    def build(context, builder, signature, values):
        slot = cgutils.alloca_once(builder, values[0].type)
        builder.store(values[0], slot)
        return builder.ptrtoint(slot, WORD)

    return types.int64(value), build


def caller_of(signature: tuple[Any, ...]) -> Any:
    """Return an intrinsic ``call(address, first, last)`` of functions of `signature`, first, last that return nothing.

    `address` is the address at which `spill` stored a pair: the function's address and the tuple of its other
    arguments.
    """
    stored = types.Tuple((types.int64, types.Tuple(signature)))
    kinds = (*signature, types.int64, types.int64)

    @intrinsic
    def call(typing_context, address, first, last):
        def build(context, builder, _, values):
            slot = builder.inttoptr(values[0], context.get_value_type(stored).as_pointer())
            pair = builder.load(slot)
            arguments = builder.extract_value(pair, 1)
            unpacked = [builder.extract_value(arguments, k) for k in range(len(signature))]
            _call(context, builder, builder.extract_value(pair, 0), kinds, [*unpacked, *values[1:]])
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64), build

    return call


# --- words that threads share -----------------------------------------------------------------------------------------
# All operations are sequentially consistent: every thread sees them in one order.


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic
def load(typing_context, address):
    """Return the 64-bit word at an address."""

    def build(context, builder, signature, values):
        return builder.load_atomic(_word(builder, values[0]), "seq_cst", 8)

    return types.int64(types.int64), build


@intrinsic
def store(typing_context, address, value):
    """Write the 64-bit word at an address."""

    def build(context, builder, signature, values):
        builder.store_atomic(values[1], _word(builder, values[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), build


@intrinsic
def add(typing_context, address, amount):
    """Add to the 64-bit word at an address, and return its old value."""

    def build(context, builder, signature, values):
        return builder.atomic_rmw("add", _word(builder, values[0]), values[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


@intrinsic
def replace(typing_context, address, expected, value):
    """Write `value` to the 64-bit word at an address if the word equals `expected`; return whether it did."""

    def build(context, builder, signature, values):
        found = builder.cmpxchg(_word(builder, values[0]), values[1], values[2], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), build


@intrinsic
def pause(typing_context):
    """Hint to the processor that this thread is waiting in a loop."""

    def build(context, builder, signature, values):
        emit_pause(builder, MACHINE)
        return context.get_dummy_value()

    return types.none(), build


def emit_pause(builder: Any, machine: str) -> None:
    """Emit the instruction that hints that a thread is waiting in a loop."""
    if machine == "x86_64":
        _instruction(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
    elif machine == "aarch64":
        _instruction(builder, "llvm.aarch64.hint", ir.VoidType(), [INT32(1)])  # yield


def _instruction(builder: Any, name: str, result: Any, operands: list[Any]) -> Any:
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


# --- words of this thread ---------------------------------------------------------------------------------------------


@intrinsic
def read_int64(typing_context, address):
    """Return the int64 at an address."""

    def build(context, builder, signature, values):
        return builder.load(_word(builder, values[0]))

    return types.int64(types.int64), build


@intrinsic
def read_int32(typing_context, address):
    """Return the int32 at an address, as an int64."""

    def build(context, builder, signature, values):
        return builder.sext(builder.load(builder.inttoptr(values[0], INT32.as_pointer())), WORD)

    return types.int64(types.int64), build


@intrinsic
def write_int64(typing_context, address, value):
    """Write the int64 at an address."""

    def build(context, builder, signature, values):
        builder.store(values[1], _word(builder, values[0]))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), build


@intrinsic
def prefetch(typing_context, address):
    """Prefetch the cache line at an address. The address need not be valid."""

    def build(context, builder, signature, values):
        byte = BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        arguments = [builder.inttoptr(values[0], byte), INT32(0), INT32(3), INT32(1)]  # to be read, kept, data
        builder.call(function, arguments)
        return context.get_dummy_value()

    return types.none(types.int64), build


# --- the modes of floating-point arithmetic ---------------------------------------------------------------------------
# The rounding of a thread, and whether it flushes denormal numbers to zero (`torch.set_flush_denormal`). x86-64: MXCSR,
# whose lowest six bits are not modes but flags of past exceptions; arm64: FPCR.

EXCEPTION_FLAGS = 0x3F


@intrinsic
def arithmetic_modes(typing_context):
    """Return the modes of this thread; 0 on an unknown architecture."""

    def build(context, builder, signature, values):
        return emit_modes(builder, MACHINE)

    return types.int64(), build


def emit_modes(builder: Any, machine: str) -> Any:
    """Emit the reading of a thread's modes; return their value."""
    if machine == "x86_64":
        slot = cgutils.alloca_once(builder, INT32)
        _instruction(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [builder.bitcast(slot, BYTE.as_pointer())])
        return builder.zext(builder.and_(builder.load(slot), INT32(~EXCEPTION_FLAGS)), WORD)
    if machine == "aarch64":
        return _instruction(builder, "llvm.aarch64.get.fpcr", WORD, [])
    return WORD(0)


@intrinsic
def set_arithmetic_modes(typing_context, modes):
    """Set the modes of this thread to a value that `arithmetic_modes` returned."""

    def build(context, builder, signature, values):
        emit_set_modes(builder, MACHINE, values[0])
        return context.get_dummy_value()

    return types.none(types.int64), build


def emit_set_modes(builder: Any, machine: str, modes: Any) -> None:
    """Emit the setting of a thread's modes."""
    if machine == "x86_64":
        slot = cgutils.alloca_once(builder, INT32)
        builder.store(builder.trunc(modes, INT32), slot)
        _instruction(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [builder.bitcast(slot, BYTE.as_pointer())])
    elif machine == "aarch64":
        _instruction(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [modes])


# --- bytes ------------------------------------------------------------------------------------------------------------


def room_for(size: int) -> Any:
    """Return an intrinsic ``room()``: the address of `size` bytes in its caller's frame, valid until that returns."""

    @intrinsic
    def room(typing_context):
        def build(context, builder, signature, values):
            return builder.ptrtoint(cgutils.alloca_once(builder, BYTE, size), WORD)

        return types.int64(), build

    return room


@intrinsic
def byte_at(typing_context, address):
    """Return the byte at an address, from 0 to 255."""

    def build(context, builder, signature, values):
        return builder.zext(builder.load(builder.inttoptr(values[0], BYTE.as_pointer())), WORD)

    return types.int64(types.int64), build


# --- the C library ----------------------------------------------------------------------------------------------------


@intrinsic
def clock(typing_context):
    """Return the nanoseconds of the monotonic clock of POSIX."""

    def build(context, builder, signature, values):
        time = cgutils.alloca_once(builder, WORD, 2)
        _instruction(builder, "clock_gettime", INT32, [INT32(1), time])  # 1: CLOCK_MONOTONIC of Linux
        seconds, nanoseconds = (builder.load(builder.gep(time, [INT32(k)])) for k in range(2))
        return builder.add(builder.mul(seconds, WORD(10**9)), nanoseconds)

    return types.int64(), build
