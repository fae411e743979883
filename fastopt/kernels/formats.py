"""Storage formats: how a number of the compute dtype is held in memory, and the instructions that convert it.

A loop reads and writes buffers by what `reading` and `writing` return. The rule never sees the format: it is given
float32, and what it returns is rounded to the nearest number of the format, ties to even, as NumPy and torch round.
"""

# Intrinsics are typed by numba.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastopt.kernels.contract import BFLOAT16, FLOAT16, FLOAT32, MASTER, STORED, Storage
from fastopt.kernels.intrinsics import put_values, values_at

FLOAT, HALF = ir.FloatType(), ir.HalfType()
INT32, INT16 = ir.IntType(32), ir.IntType(16)
NAN = 0x7FC00000
"""The bits of the NaN that every NaN becomes: rounding the bits of another one could make it a number."""


def emit_decoded(builder: Any, name: str, stored: Any) -> Any:
    """Emit the conversion of a stored number to the compute dtype, which is exact."""
    if name == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(stored, INT32), INT32(16)), FLOAT)
    if name == FLOAT16:
        return builder.fpext(builder.bitcast(stored, HALF), FLOAT)
    return stored


def emit_encoded(builder: Any, name: str, number: Any, *, exact: bool = False) -> Any:
    """Emit the rounding of a number to a format, as it is stored there. exact : the number is one of the format."""
    if name == BFLOAT16 and exact:
        return builder.trunc(builder.lshr(builder.bitcast(number, INT32), INT32(16)), INT16)
    if name == BFLOAT16:
        bits = builder.select(builder.fcmp_unordered("uno", number, number), INT32(NAN), builder.bitcast(number, INT32))
        odd = builder.and_(builder.lshr(bits, INT32(16)), INT32(1))
        return builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, INT32(0x7FFF))), INT32(16)), INT16)
    if name == FLOAT16:
        return builder.bitcast(builder.fptrunc(number, HALF), INT16)
    return number


def stored_type(name: str) -> Any:
    """Return the numba type of a stored number."""
    return types.Array(getattr(types, STORED[name].name), 1, "C").dtype


def _plain(names: tuple[str, ...]) -> bool:
    return not {BFLOAT16, FLOAT16} & {*names}


@cache
def reading(names: tuple[str, ...]) -> Callable[..., Any]:
    """Return an intrinsic ``(arrays, i)``: the tuple of the elements i of 1-D arrays of these formats, decoded."""
    if _plain(names):
        return values_at

    @intrinsic
    def decoded_at(typing_context, arrays, i):
        def build(context, builder, signature, arguments):
            values = []
            for k, (kind, name) in enumerate(zip(signature.args[0], names, strict=True)):
                view = context.make_array(kind)(context, builder, builder.extract_value(arguments[0], k))
                values.append(emit_decoded(builder, name, builder.load(builder.gep(view.data, [arguments[1]]))))
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(types.float32, len(names))(arrays, types.intp), build

    return decoded_at


@cache
def writing(names: tuple[str, ...], exact: tuple[bool, ...]) -> Callable[..., Any]:
    """Return an intrinsic ``(arrays, i, values)`` that stores a tuple of values, or one, rounded to these formats.

    exact : for each whether its values are numbers of the format already.
    """
    if _plain(names):
        return put_values

    @intrinsic
    def put_encoded(typing_context, arrays, i, values):
        def build(context, builder, signature, arguments):
            several = isinstance(signature.args[2], types.BaseTuple)
            for k, (kind, name) in enumerate(zip(signature.args[0], names, strict=True)):
                view = context.make_array(kind)(context, builder, builder.extract_value(arguments[0], k))
                value = builder.extract_value(arguments[2], k) if several else arguments[2]
                stored = emit_encoded(builder, name, value, exact=exact[k])
                builder.store(stored, builder.gep(view.data, [arguments[1]]))
            return context.get_dummy_value()

        return types.none(arrays, types.intp, values), build

    return put_encoded


@cache
def rounding(name: str, intrinsic: Callable[..., Any] = intrinsic) -> Callable[..., Any]:
    """Return an intrinsic ``(number)``: the number rounded to a format, in the compute dtype again.

    intrinsic : what makes it one of the compiler that is to know it.
    """

    @intrinsic
    def rounded_to(typing_context, number):
        def build(context, builder, signature, arguments):
            return emit_decoded(builder, name, emit_encoded(builder, name, arguments[0]))

        return number(number), build

    return rounded_to


# --- stochastic rounding ----------------------------------------------------------------------------------------------


def emit_mixed(builder: Any, word: Any) -> Any:
    """Emit a mixing of 32 bits by two multiplications, after which every bit depends on every bit.

    The constants are those of Christopher Wellons' search for the least bias (https://nullprogram.com/blog/2018/07/31/).
    """
    word = builder.xor(word, builder.lshr(word, INT32(16)))
    word = builder.mul(word, INT32(0x7FEB352D))
    word = builder.xor(word, builder.lshr(word, INT32(15)))
    word = builder.mul(word, INT32(0x846CA68B))
    return builder.xor(word, builder.lshr(word, INT32(16)))


def emit_counted(builder: Any, seed: Any, index: Any, draw: int) -> Any:
    """Emit what is to be mixed for a draw: of the number of a step, in a float, of an index, and of others there."""
    word = builder.mul(builder.trunc(index, INT32), INT32(0x9E3779B9))
    word = builder.xor(word, emit_mixed(builder, builder.fptoui(seed, INT32)))
    return builder.add(word, INT32(draw))


def emit_dithered(builder: Any, name: str, number: Any, noise: Any) -> Any:
    """Emit the rounding of a number to a neighbour in a format, to the one above in proportion to how near it is.

    noise : 16 random bits, in an int32. The result is in the compute dtype. NaN and infinity stay as they are.
    """
    bits = builder.bitcast(number, INT32)
    size = builder.and_(bits, INT32(0x7FFFFFFF))
    if name == BFLOAT16:
        moved = builder.and_(builder.add(bits, noise), INT32(-0x10000))
    else:  # 13 bits less where the number is normal in float16; below, multiples of 2**-24
        moved = builder.and_(builder.add(bits, builder.lshr(noise, INT32(3))), INT32(-0x2000))
        unit = builder.fmul(builder.uitofp(noise, FLOAT), FLOAT(2.0**-16))
        steps = builder.fadd(builder.fmul(builder.bitcast(size, FLOAT), FLOAT(2.0**24)), unit)
        whole = builder.sitofp(builder.fptosi(steps, INT32), FLOAT)  # CUDA's compiler knows no llvm.floor
        small = builder.bitcast(builder.fmul(whole, FLOAT(2.0**-24)), INT32)
        small = builder.or_(small, builder.and_(bits, INT32(-0x80000000)))
        moved = builder.select(builder.icmp_unsigned("<", size, INT32(0x38800000)), small, moved)
    finite = builder.icmp_unsigned("<", size, INT32(0x7F800000))
    return builder.bitcast(builder.select(finite, moved, bits), FLOAT)


def drawn(storage: Storage) -> tuple[str, ...]:
    """Return the formats to which p and the states are rounded at random; the compute dtype's where they are not.

    Where there is a MASTER, p is its rounding to the nearest, and no draw of its own. 8 bits are drawn as codes.
    """
    params = FLOAT32 if storage.keeps == MASTER else storage.params
    return params, *[name if name in (BFLOAT16, FLOAT16) else FLOAT32 for name in storage.states]


def emit_draws(builder: Any, names: tuple[str, ...], values: list[Any], seed: Any, index: Any) -> list[Any]:
    """Emit the rounding at random of the numbers of one element, those of 16-bit formats, by their place."""
    found, count = [], 0
    for name, value in zip(names, values, strict=True):
        if name in (BFLOAT16, FLOAT16):
            mixed = emit_mixed(builder, emit_counted(builder, seed, index, count // 2))
            noise = builder.lshr(mixed, INT32(16)) if count % 2 else builder.and_(mixed, INT32(0xFFFF))
            value = emit_dithered(builder, name, value, noise)
            count += 1
        found.append(value)
    return found


@cache
def dithering(names: tuple[str, ...]) -> Callable[..., Any]:
    """Return an intrinsic ``(values, seed, index)``: the tuple of values, those of 16-bit formats rounded at random.

    The random bits depend on the number `seed` (a whole one below 2**24), on `index` and on the place in the tuple, and
    on nothing else. A value alone is taken for a tuple of one.
    """

    @intrinsic
    def dithered(typing_context, values, seed, index):
        several = isinstance(values, types.BaseTuple)

        def build(context, builder, signature, arguments):
            given, seed, index = arguments
            numbers = [builder.extract_value(given, k) for k in range(len(names))] if several else [given]
            found = emit_draws(builder, names, numbers, seed, index)
            return context.make_tuple(builder, signature.return_type, found) if several else found[0]

        return values(values, seed, index), build

    return dithered
