"""The update of a rule with states of 8 bits: blocks of codes are decoded into the cache, updated, and encoded again.

A block has 256 codes and one number, its unit.

- Signed codes k from -127 to 127 stand for k |k| unit: the steps between numbers grow with their size.
- Unsigned codes k from 0 to 255 are floats of 5 bits of exponent and 3 of significand: 0, or unit times a number
  from 2**-31 to 1.875. What is not 0 becomes at least the smallest of them: a quotient by its root stays bounded.

The unit is such that the largest number of the block has the largest code. NaN and infinity make a block NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastopt.kernels.bind import bind
from fastopt.kernels.contract import CODE_BASE, CODES, INT8, N_CHUNK, N_PLACE, PROCEEDS, UINT8, Chunk, Place, Storage
from fastopt.kernels.elements import MAX_STATES, scalar
from fastopt.kernels.formats import emit_counted, emit_mixed
from fastopt.kernels.intrinsics import at_address, record, rooms_for, window
from fastopt.source import written

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

P_TYPE: Any
G_TYPE: Any
READ: Callable[..., Any]
READ_GRAD: Callable[..., Any]
WRITE: Callable[..., Any]
DITHERED: Callable[..., Any]
STOCHASTIC: bool
ELEMENT: Callable[..., Any]
HYPERPARAMETERS: Callable[..., Any]
ZERO: Any
LARGEST: Any
ZERO_GRAD: bool
"""As in elementwise.py."""
NUMBERS: tuple[Any, ...]
"""A number for each coded state."""
OPENED: Callable[..., Any]
CLOSED: Callable[..., Any]
BUFFERS: Callable[..., Any]
"""What `functions_of` returns."""
NOISE: Callable[..., Any]
NOISY: bool
"""Whether codes are rounded at random."""
CODE: Callable[..., Any]
NUMBER: Callable[..., Any]
SHARE: Any
"""The unit of a block whose largest number is 1."""

ROOMS = rooms_for(CODES)
LARGEST_SIGNED = 127.0 * 127.0
LARGEST_UNSIGNED = 1.875

# --- one number -------------------------------------------------------------------------------------------------------
# With these the loops over a block are vectorised: integers of 32 bits, no branch, no table.

FLOAT, INT32 = ir.FloatType(), ir.IntType(32)


@intrinsic
def size_bits(typing_context, number):
    """Return the bits of the magnitude of a float32, as an int32: they are in the order of the magnitudes."""

    def build(context, builder, signature, arguments):
        return builder.and_(builder.bitcast(arguments[0], INT32), INT32(0x7FFFFFFF))

    return types.int32(number), build


@intrinsic
def of_bits(typing_context, bits):
    """Return the float32 of these bits."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), build


@intrinsic
def larger(typing_context, a, b):
    """Return the larger of two int32."""

    def build(context, builder, signature, arguments):
        return builder.select(builder.icmp_signed(">", *arguments), *arguments)

    return types.int32(types.int32, types.int32), build


@cache
def noise(place: int) -> Any:
    """Return an intrinsic ``(seed, index)``: 32 random bits, as an int32, for a whole number below 2**24 and an index.

    place : of the state among those with codes, each of which draws for itself, apart from numbers of 16 bits.
    """

    @intrinsic
    def noise_at(typing_context, seed, index):
        def build(context, builder, signature, arguments):
            seed, index = arguments
            return emit_mixed(builder, emit_counted(builder, seed, index, MAX_STATES + place))

        return types.int32(seed, types.int64), build

    return noise_at


@intrinsic
def signed_number(typing_context, code, unit):
    """Return the number of a signed code."""

    def build(context, builder, signature, arguments):
        code = builder.sitofp(builder.sext(arguments[0], INT32), FLOAT)
        size = builder.bitcast(builder.and_(builder.bitcast(code, INT32), INT32(0x7FFFFFFF)), FLOAT)
        return builder.fmul(builder.fmul(code, size), arguments[1])

    return types.float32(types.int8, types.float32), build


@intrinsic
def unsigned_number(typing_context, code, unit):
    """Return the number of an unsigned code."""

    def build(context, builder, signature, arguments):
        code = builder.zext(arguments[0], INT32)
        number = builder.bitcast(builder.shl(builder.add(code, INT32(CODE_BASE)), INT32(20)), FLOAT)
        number = builder.select(builder.icmp_signed("==", code, INT32(0)), FLOAT(0.0), number)
        return builder.fmul(number, arguments[1])

    return types.float32(types.uint8, types.float32), build


def _without_nan(builder: Any, share: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", share, FLOAT(0.0)), share, FLOAT(0.0))


@cache
def signed_code(random: bool) -> Any:
    """Return an intrinsic ``(number, share, noise)``: the code of a number, `share` being its magnitude in units.

    random : whether `noise`, 32 random bits, decides between the two codes next to it; otherwise the next one by the
        roots is taken.
    """

    @intrinsic
    def code_of(typing_context, number, share, noise):
        def build(context, builder, signature, arguments):
            number, share, noise = arguments
            share = _without_nan(builder, share)
            root = builder.call(builder.module.declare_intrinsic("llvm.sqrt", [FLOAT]), [share])
            if random:  # k where the share is between k**2 and (k + 1)**2, or k + 1 in proportion
                code = builder.fptosi(root, INT32)
                k = builder.sitofp(code, FLOAT)
                over = builder.fsub(share, builder.fmul(k, k))
                width = builder.fadd(builder.fadd(k, k), FLOAT(1.0))
                drawn = builder.fmul(builder.sitofp(builder.lshr(noise, INT32(8)), FLOAT), FLOAT(2.0**-24))
                more = builder.fcmp_ordered("<", builder.fmul(drawn, width), over)
                code = builder.add(code, builder.zext(more, INT32))
            else:
                code = builder.fptosi(builder.fadd(root, FLOAT(0.5)), INT32)
            code = builder.select(builder.icmp_signed(">", code, INT32(127)), INT32(127), code)
            below = builder.icmp_signed("<", builder.bitcast(number, INT32), INT32(0))
            return builder.trunc(builder.select(below, builder.neg(code), code), ir.IntType(8))

        return types.int8(number, share, noise), build

    return code_of


@cache
def unsigned_code(random: bool) -> Any:
    """Return the same for unsigned codes, of which a number below 0 has 0."""

    @intrinsic
    def code_of(typing_context, number, share, noise):
        def build(context, builder, signature, arguments):
            number, share, noise = arguments
            positive = builder.fcmp_ordered(">", number, FLOAT(0.0))
            bits = builder.bitcast(_without_nan(builder, share), INT32)
            if random:
                moved = builder.add(bits, builder.lshr(noise, INT32(12)))
            else:
                odd = builder.and_(builder.lshr(bits, INT32(20)), INT32(1))
                moved = builder.add(bits, builder.add(odd, INT32(0x7FFFF)))
            code = builder.sub(builder.lshr(moved, INT32(20)), INT32(CODE_BASE))
            code = builder.select(builder.icmp_signed(">", code, INT32(255)), INT32(255), code)
            code = builder.select(builder.icmp_signed("<", code, INT32(1)), INT32(1), code)
            return builder.trunc(builder.select(positive, code, INT32(0)), ir.IntType(8))

        return types.uint8(number, share, noise), build

    return code_of


# --- one block --------------------------------------------------------------------------------------------------------


def opened(codes, units, room, first, size):
    """Decode `size` states from an offset on into a room."""
    if first < codes.size:
        stored = window(codes, first, size)
        unit = units[first // CODES]
        for i in range(size):
            room[i] = NUMBER(stored[i], unit)
    else:
        stored = window(units, first - codes.size + codes.size // CODES, size)
        for i in range(size):
            room[i] = stored[i]


def closed(codes, units, room, first, size, seed):
    """Encode what is in a room."""
    if first < codes.size:
        largest = np.int32(0)
        for i in range(size):
            largest = larger(largest, size_bits(room[i]))
        unit = of_bits(largest) * SHARE
        inverse = ZERO
        if unit > ZERO:
            inverse = units.dtype.type(1) / unit
            if inverse > LARGEST:  # of a unit that is not normal
                unit = ZERO
                inverse = ZERO
        units[first // CODES] = unit
        stored = window(codes, first, size)
        for i in range(size):
            share = of_bits(size_bits(room[i])) * inverse
            if NOISY:
                stored[i] = CODE(room[i], share, NOISE(seed, first + i))
            else:
                stored[i] = CODE(room[i], share, 0)
    else:
        stored = window(units, first - codes.size + codes.size // CODES, size)
        for i in range(size):
            stored[i] = room[i]


KINDS = {
    INT8: (signed_number, signed_code, LARGEST_SIGNED),
    UINT8: (unsigned_number, unsigned_code, LARGEST_UNSIGNED),
}


def functions_of(storage: Storage, constants: dict[str, Any]) -> dict[str, Any]:
    """Return OPENED and CLOSED, which go over all coded states of a block, and BUFFERS, the buffers of its loop.

    They take ``(states, rooms, first, size)``; CLOSED then the number from which noise is made, and BUFFERS first p.
    """
    coded = [k for k, name in enumerate(storage.states) if name in KINDS]
    opening, closing, functions = [], [], {"WINDOW": window}
    buffers = ["p"]
    for place, k in enumerate(coded):
        number, code, largest = KINDS[storage.states[k]]
        own = {**constants, "NUMBER": number, "NOISY": storage.stochastic, "CODE": code(storage.stochastic)}
        own |= {"SHARE": np.float32(1.0 / largest), "NOISE": noise(place)}
        functions[f"OPEN_{place}"] = bind(opened, own, label="opened", scalar=scalar)
        functions[f"CLOSE_{place}"] = bind(closed, own, label="closed", scalar=scalar)
        arguments = f"states[{k}], states[{len(storage.states) + place}], rooms[{place}], first, size"
        opening.append(f"OPEN_{place}({arguments})")
        closing.append(f"CLOSE_{place}({arguments}, seed)")
    for k in range(len(storage.states)):
        buffers.append(f"rooms[{coded.index(k)}]" if k in coded else f"WINDOW(states[{k}], first, size)")
    names = ["states", "rooms", "first", "size"]
    made = {
        "OPENED": written("opened_all", names, [*opening, "return None"], functions, __name__),
        "CLOSED": written("closed_all", [*names, "seed"], [*closing, "return None"], functions, __name__),
        "BUFFERS": written("buffers", ["p", *names], [f"return ({', '.join(buffers)},)"], functions, __name__),
    }
    return {**made, "NUMBERS": (np.float32(0),) * len(coded)}


# --- the loop ---------------------------------------------------------------------------------------------------------


def coded(places, states, table, chunks, first, last):
    """Update chunks by a rule whose every element stands alone; backwards where `last` is the smaller."""
    table[0, PROCEEDS] = ZERO
    rooms = ROOMS(NUMBERS)
    backwards = last < first
    count = first - last if backwards else last - first
    for k in range(count):
        chunk = record(Chunk, chunks, (first - 1 - k if backwards else first + k) * N_CHUNK)
        place = record(Place, places, chunk.place * N_PLACE)
        step, h = HYPERPARAMETERS(table, chunk.group)
        for start in range(chunk.start, chunk.stop, CODES):
            size = min(CODES, chunk.stop - start)
            at = place.state + start
            p = at_address(P_TYPE, place.p, start, size)
            g = (at_address(G_TYPE, place.g, chunk.grad + start - chunk.start, size),)
            OPENED(states, rooms, at, size)
            updated = BUFFERS(p, states, rooms, at, size)
            for i in range(size):
                values = READ(updated, i)
                new = ELEMENT(step, values[0], READ_GRAD(g, i)[0], *values[1:], h)
                if STOCHASTIC:
                    WRITE(updated, i, DITHERED(new, step.noise, at + i))
                else:
                    WRITE(updated, i, new)
                if ZERO_GRAD:
                    g[0][i] = G_TYPE(0)
            CLOSED(states, rooms, at, size, step.noise)
