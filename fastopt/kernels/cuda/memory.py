"""How a kernel reaches memory: records of tables, loads and stores at addresses, the loop over elements of a chunk."""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fastopt.kernels.bind import bind
from fastopt.kernels.contract import N_CHUNK, N_PLACE, STORED
from fastopt.kernels.cuda import simulated
from fastopt.kernels.cuda.target import SIMULATED, cuda, device, extending

WIDE_BYTES = 16
"""What a thread reads or writes at a time where all addresses of a chunk are multiples of it."""

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

ELEMENTS: Callable[..., Any]
"""What becomes of several elements: see `several`."""
LOAD: Callable[..., Any]
STORE: Callable[..., Any]
STOCHASTIC: bool
"""Whether numbers of 16 bits are rounded at random ..."""
DITHERED: Callable[..., Any]
"""... by `dithering`."""
ITEMSIZE: int
IN_ORDER: bool
"""Whether sums are taken, whose bits depend on which elements a thread takes: not on where these are."""
ADDRESS_BITS: Callable[..., Any]
"""`bits_of`, for the buffers of the loop."""
VECTORS: Callable[..., Any]
"""`strided`, WIDE_BYTES at a time, in one access."""
SPLIT: Callable[..., Any]
"""`strided`, WIDE_BYTES at a time, with an access for each element."""
SINGLES: Callable[..., Any]
"""`strided`, an element at a time."""

# --- the loop ---------------------------------------------------------------------------------------------------------
# Loops are `while`: over `range`, numba divides for the number of rounds.


def strided(buffers, i, stop, stride, context, s, t):
    """The elements at i that LOAD takes at a time, then those a stride further; their sums are added to s and t."""
    while i < stop:
        new, more, others = ELEMENTS(LOAD(buffers, i), context)
        if STOCHASTIC:
            new = DITHERED(new, context[0].noise, i // ITEMSIZE)
        STORE(buffers, i, new)
        s += more
        t += others
        i += stride
    return s, t


def loop(buffers, first, size, context, s, t):
    """A thread's share of `size` elements of every buffer, which begin at the byte `first` of it.

    buffers : addresses. `first` is one for all, so that of buffers whose addresses are arguments of the kernel no
        register holds an address. context : what the element function takes besides an element of each buffer.
    s, t : what the sums of the elements are added to.
    """
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x  # and not THREADS: a loop of a constant stride is unrolled, and takes more registers
    aligned = ADDRESS_BITS(first, buffers) & (WIDE_BYTES - 1) == 0
    stop = first + ITEMSIZE * size
    middle = first + (ITEMSIZE * size & -WIDE_BYTES)
    if IN_ORDER:
        if aligned:
            s, t = VECTORS(buffers, first + WIDE_BYTES * thread, middle, WIDE_BYTES * threads, context, s, t)
        else:
            s, t = SPLIT(buffers, first + WIDE_BYTES * thread, middle, WIDE_BYTES * threads, context, s, t)
        return SINGLES(buffers, middle + ITEMSIZE * thread, stop, ITEMSIZE * threads, context, s, t)
    if not aligned:
        middle = first
    # In this order, because `stop` takes two registers.
    s, t = SINGLES(buffers, middle + ITEMSIZE * thread, stop, ITEMSIZE * threads, context, s, t)
    return VECTORS(buffers, first + WIDE_BYTES * thread, middle, WIDE_BYTES * threads, context, s, t)


def looping(
    element: Callable[..., Any],
    constants: dict[str, Any],
    dtype: np.dtype[Any],
    buffers: int,
    *,
    in_order: bool,
    formats: tuple[str, ...] = (),
    drawn: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What a kernel needs to call `loop`: the loops over elements of `buffers` buffers of a dtype.

    element : the element function, ``(values, context) -> (new, s, t)``, bound here to the constants. `values` has an
        element of each buffer; `new` is written back to the first buffers, as many as it has values.
    in_order : as IN_ORDER. formats : as for `memory`. drawn : of the values that are written, the formats to which they
        are rounded at random; none where they are rounded to the nearest.
    """
    bound = bind(element, constants, label=element.__name__, scalar=device)
    vector = WIDE_BYTES // dtype.itemsize
    found: dict[str, Any] = {
        "IN_ORDER": in_order,
        "ADDRESS_BITS": bits_of(buffers),
        "WIDE_BYTES": WIDE_BYTES,
        "OPAQUE": opaque(),
    }
    for name, width, at_once in (("VECTORS", vector, True), ("SPLIT", vector, False), ("SINGLES", 1, True)):
        load, store = memory(dtype, width, at_once, formats)
        own = {"LOAD": load, "STORE": store, "ELEMENTS": several(width, bound), "ITEMSIZE": dtype.itemsize}
        own |= {"STOCHASTIC": bool(drawn), "DITHERED": dithering(drawn, width) if drawn else None}
        found[name] = bind(strided, own, label=f"{element.__name__}_{name.lower()}", scalar=device)
    return found


def several(size: int, element: Callable[..., Any]) -> Callable[..., Any]:
    """An element function for `size` elements, each a tuple: the tuple of what each leaves, and their sums."""
    if size == 1:

        def one(elements, context):
            new, s, t = element(elements[0], context)
            return (new,), s, t

        return one
    half = size // 2
    left, right = several(half, element), several(size - half, element)

    def both(elements, context):
        new, s, t = left(elements[:half], context)
        more, more_s, more_t = right(elements[half:], context)
        return new + more, s + more_s, t + more_t

    return both


# --- records and tuples -----------------------------------------------------------------------------------------------


def unpacking(size: int) -> Callable[..., tuple[Any, ...]]:
    """A function ``(numbers, first)`` that returns the tuple of `size` numbers from the first on."""
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


def packing(size: int) -> Callable[..., None]:
    """A function ``(numbers, first, values)`` that writes a tuple of `size` values to the numbers from the first on."""
    if size == 1:
        return _pack_one
    half = size // 2
    left, right = packing(half), packing(size - half)

    def pack(numbers, first, values):
        left(numbers, first, values[:half])
        right(numbers, first + half, values[half:])

    return pack


def _pack_one(numbers, first, values):
    numbers[first] = values[0]


UNPACKING = {"UNPACK_PLACE": unpacking(N_PLACE), "UNPACK_CHUNK": unpacking(N_CHUNK)}
"""For the kernels that read records of both tables."""


def _same(number):
    return number


@cache
def opaque() -> Any:
    """A function that returns its int64 as it is, without the compiler's knowing.

    What the two loops need of an address is then one number, not all the numbers of the records that it was made of.
    """
    if SIMULATED:
        return _same
    from llvmlite import ir

    types, intrinsic = extending()

    @intrinsic
    def hidden(typing_context, number):
        def build(context, builder, signature, arguments):
            word = arguments[0].type
            move = ir.InlineAsm(ir.FunctionType(word, [word]), "mov.b64 $0, $1;", "=l,l")
            return builder.call(move, arguments)

        return types.int64(types.int64), build

    return hidden


@cache
def bits_of(size: int) -> Callable[..., Any]:
    """A function of a number and a tuple of `size` numbers that returns the bits which are set in any of them.

    It goes from one to the next, so that no register holds the bits of those that are arguments of the kernel.
    """
    hidden = opaque()
    if size == 0:
        return _same_bits
    others = bits_of(size - 1)

    def bits(number, numbers):
        return others(hidden(number | numbers[0]), numbers[1:])

    return bits


def _same_bits(number, numbers):
    return number


# --- storage formats --------------------------------------------------------------------------------------------------


@cache
def rounding(name: str) -> Callable[..., Any]:
    """``rounding`` of formats.py, for the device."""
    if SIMULATED:
        return simulated.rounding(name)
    from fastopt.kernels import formats

    return formats.rounding(name, extending()[1])


@cache
def dithering(names: tuple[str, ...], width: int) -> Callable[..., Any]:
    """A function ``(elements, seed, index)`` for `width` elements, each a tuple: ``dithering`` of formats.py of each.

    index : that of the first; the others follow it.
    """
    if SIMULATED:
        return simulated.dithering(names)
    from llvmlite import ir

    from fastopt.kernels.formats import emit_draws

    _, intrinsic = extending()

    @intrinsic
    def dithered(typing_context, elements, seed, index):
        def build(context, builder, signature, arguments):
            given, seed, index = arguments
            made = []
            for k in range(width):
                element, at = builder.extract_value(given, k), builder.add(index, ir.Constant(index.type, k))
                numbers = [builder.extract_value(element, place) for place in range(len(names))]
                drawn = emit_draws(builder, names, numbers, seed, at)
                made.append(context.make_tuple(builder, elements[k], drawn))
            return context.make_tuple(builder, signature.return_type, made)

        return elements(elements, seed, index), build

    return dithered


def codec(form: str, place: int, random: bool) -> Any:
    """``codec`` of codes.py, for the device."""
    if SIMULATED:
        return simulated.codec(form, place, random)
    from fastopt.kernels import codes

    return codes.codec(form, place, random, *extending())


# --- loads and stores -------------------------------------------------------------------------------------------------


def memory(dtype: np.dtype[Any], width: int, at_once: bool, formats: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """LOAD and STORE of the `width` elements at byte i of the buffers that begin at a tuple of addresses.

    formats : those of the buffers, where some are not of the dtype. One of 16 bits begins so that the elements are at
        byte i / 2 of it, and is decoded and rounded in registers.

    LOAD returns a tuple for each element, with a value of each buffer. STORE takes the like, and writes to as many
    buffers as the tuples are long.

    at_once : in one access of width * itemsize bytes, of which every address is then a multiple.
    """
    if SIMULATED:
        return simulated.memory(dtype, width, at_once, formats)
    return _intrinsics(dtype, width, at_once, formats)


@cache
def _intrinsics(dtype: np.dtype[Any], width: int, at_once: bool, formats: tuple[str, ...]) -> tuple[Any, Any]:
    """`memory` on a device."""
    from llvmlite import ir

    from fastopt.kernels.formats import emit_decoded, emit_encoded

    types, intrinsic = extending()
    number = getattr(types, dtype.name)

    def format_of(k):
        return formats[k] if formats else dtype.name

    def alignment(k):
        itemsize = STORED[format_of(k)].itemsize
        return width * itemsize if at_once else itemsize

    def pointers(context, builder, addresses, i, count):
        """Where the elements of the first buffers are, as vectors in global memory."""
        for k in range(count):
            half = STORED[format_of(k)].itemsize == 2
            stored = ir.IntType(16) if half else context.get_data_type(number)
            vector = ir.VectorType(stored, width)
            offset = builder.ashr(i, ir.Constant(i.type, 1)) if half else i
            address = builder.add(builder.extract_value(addresses, k), offset)
            yield builder.inttoptr(address, vector.as_pointer(addrspace=1)), vector

    def index(k):
        return ir.Constant(ir.IntType(32), k)

    @intrinsic
    def load(typing_context, addresses, i):
        def build(context, builder, signature, arguments):
            where, i = arguments
            found = [
                builder.load(pointer, align=alignment(buffer))
                for buffer, (pointer, _) in enumerate(pointers(context, builder, where, i, addresses.count))
            ]
            elements = [
                [
                    emit_decoded(builder, format_of(buffer), builder.extract_element(vector, index(k)))
                    for buffer, vector in enumerate(found)
                ]
                for k in range(width)
            ]
            made = [context.make_tuple(builder, signature.return_type.dtype, element) for element in elements]
            return context.make_tuple(builder, signature.return_type, made)

        element = types.UniTuple(number, addresses.count)
        return types.UniTuple(element, width)(addresses, types.int64), build

    @intrinsic
    def store(typing_context, addresses, i, elements):
        def build(context, builder, signature, arguments):
            where, i, given = arguments
            for buffer, (pointer, vector) in enumerate(pointers(context, builder, where, i, len(elements[0]))):
                value = ir.Constant(vector, ir.Undefined)
                for k in range(width):
                    one = builder.extract_value(builder.extract_value(given, k), buffer)
                    one = context.cast(builder, one, elements[k][buffer], number)
                    one = emit_encoded(builder, format_of(buffer), one)
                    value = builder.insert_element(value, one, index(k))
                builder.store(value, pointer, align=alignment(buffer))
            return context.get_dummy_value()

        return types.void(addresses, types.int64, elements), build

    return load, store
