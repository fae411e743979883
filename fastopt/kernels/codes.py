"""Codes of 8 bits: how a number of a block is coded, and decoded, in instructions for the compiler of any backend.

A block has 256 codes and one number, its unit.

- Signed codes k from -127 to 127 stand for k |k| unit: the steps between numbers grow with their size.
- Unsigned codes k from 0 to 255 are floats of 5 bits of exponent and 3 of significand: 0, or unit times a number
  from 2**-31 to 1.875. What is not 0 becomes at least the smallest of them: a quotient by its root stays bounded.

The unit is such that the largest number of the block has the largest code. NaN and infinity make a block NaN.
"""

# Intrinsics are typed by numba.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir

from fastopt.kernels.contract import CODE_BASE, INT8, UINT8
from fastopt.kernels.elements import MAX_STATES
from fastopt.kernels.formats import emit_counted, emit_mixed

FLOAT, INT32 = ir.FloatType(), ir.IntType(32)
SIZE = INT32(0x7FFFFFFF)
"""The bits of a magnitude."""

MOST = {INT8: 127.0 * 127.0, UINT8: 1.875}
"""The number of the largest code, in units."""

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

OF_BITS: Callable[..., Any]
"""Of `Codec`."""
SHARE: Any
"""The unit of a block whose largest number is 1."""
ZERO: Any
ONE: Any
LARGEST: Any
"""Of the compute dtype."""


def unit_of_block(largest):
    """Return the unit of a block, from the bits of the magnitude of its largest number, and 1 / unit; 0 and 0 for 0."""
    unit = OF_BITS(largest) * SHARE
    inverse = ZERO
    if unit > ZERO:
        inverse = ONE / unit
        if inverse > LARGEST:  # of a unit that is not normal
            unit = ZERO
            inverse = ZERO
    return unit, inverse


# --- one number -------------------------------------------------------------------------------------------------------


class Codec(NamedTuple):
    """What a kernel needs of the codes of a state: integers of 32 bits, no branch and no table."""

    number: Callable[..., Any]
    """``(code, unit)``: the number of a code."""
    code: Callable[..., Any]
    """``(number, share, noise)``: the code of a number, `share` being its magnitude in units."""
    noise: Callable[..., Any]
    """``(seed, index)``: 32 random bits, as an int32, for a whole number below 2**24 and an index."""
    size_bits: Callable[..., Any]
    """``(number)``: the bits of the magnitude of a float32, as an int32: they are in the order of the magnitudes."""
    of_bits: Callable[..., Any]
    """``(bits)``: the float32 of these bits."""
    larger: Callable[..., Any]
    """``(a, b)``: the larger of two int32."""


def emit_signed_number(builder: Any, code: Any, unit: Any) -> Any:
    """Emit the decoding of a signed code."""
    code = builder.sitofp(builder.sext(code, INT32), FLOAT)
    size = builder.bitcast(builder.and_(builder.bitcast(code, INT32), SIZE), FLOAT)
    return builder.fmul(builder.fmul(code, size), unit)


def emit_unsigned_number(builder: Any, code: Any, unit: Any) -> Any:
    """Emit the decoding of an unsigned code."""
    code = builder.zext(code, INT32)
    number = builder.bitcast(builder.shl(builder.add(code, INT32(CODE_BASE)), INT32(20)), FLOAT)
    number = builder.select(builder.icmp_signed("==", code, INT32(0)), FLOAT(0.0), number)
    return builder.fmul(number, unit)


def _without_nan(builder: Any, share: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", share, FLOAT(0.0)), share, FLOAT(0.0))


def emit_signed_code(builder: Any, number: Any, share: Any, noise: Any) -> Any:
    """Emit the coding of a number by a signed code.

    noise : 32 random bits, which decide between the two codes next to it; None for the next one by the roots.
    """
    share = _without_nan(builder, share)
    root = builder.call(builder.module.declare_intrinsic("llvm.sqrt", [FLOAT]), [share])
    if noise is None:
        code = builder.fptosi(builder.fadd(root, FLOAT(0.5)), INT32)
    else:  # k where the share is between k**2 and (k + 1)**2, or k + 1 in proportion
        code = builder.fptosi(root, INT32)
        k = builder.sitofp(code, FLOAT)
        over = builder.fsub(share, builder.fmul(k, k))
        width = builder.fadd(builder.fadd(k, k), FLOAT(1.0))
        drawn = builder.fmul(builder.sitofp(builder.lshr(noise, INT32(8)), FLOAT), FLOAT(2.0**-24))
        more = builder.fcmp_ordered("<", builder.fmul(drawn, width), over)
        code = builder.add(code, builder.zext(more, INT32))
    code = builder.select(builder.icmp_signed(">", code, INT32(127)), INT32(127), code)
    below = builder.icmp_signed("<", builder.bitcast(number, INT32), INT32(0))
    return builder.trunc(builder.select(below, builder.neg(code), code), ir.IntType(8))


def emit_unsigned_code(builder: Any, number: Any, share: Any, noise: Any) -> Any:
    """Emit the same by an unsigned code, of which a number below 0 has 0."""
    positive = builder.fcmp_ordered(">", number, FLOAT(0.0))
    bits = builder.bitcast(_without_nan(builder, share), INT32)
    if noise is None:
        odd = builder.and_(builder.lshr(bits, INT32(20)), INT32(1))
        moved = builder.add(bits, builder.add(odd, INT32(0x7FFFF)))
    else:
        moved = builder.add(bits, builder.lshr(noise, INT32(12)))
    code = builder.sub(builder.lshr(moved, INT32(20)), INT32(CODE_BASE))
    code = builder.select(builder.icmp_signed(">", code, INT32(255)), INT32(255), code)
    code = builder.select(builder.icmp_signed("<", code, INT32(1)), INT32(1), code)
    return builder.trunc(builder.select(positive, code, INT32(0)), ir.IntType(8))


@cache
def codec(form: str, place: int, random: bool, types: Any, intrinsic: Callable[..., Any]) -> Codec:
    """Return the `Codec` of a state.

    form : INT8 or UINT8. place : of the state among those with codes, each of which draws for itself, apart from
    numbers of 16 bits. random : whether noise decides. types, intrinsic : of the compiler that is to know it.
    """
    stored = getattr(types, form)
    emit_number, emit_code = EMIT[form]
    number, bits = types.float32, types.int32

    @intrinsic
    def number_of(typing_context, code, unit):
        def build(context, builder, signature, arguments):
            return emit_number(builder, *arguments)

        return number(stored, number), build

    @intrinsic
    def code_of(typing_context, number, share, noise):
        def build(context, builder, signature, arguments):
            number, share, noise = arguments
            return emit_code(builder, number, share, noise if random else None)

        return stored(number, share, noise), build

    @intrinsic
    def noise_at(typing_context, seed, index):
        def build(context, builder, signature, arguments):
            return emit_mixed(builder, emit_counted(builder, arguments[0], arguments[1], MAX_STATES + place))

        return bits(seed, types.int64), build

    @intrinsic
    def size_bits(typing_context, number):
        def build(context, builder, signature, arguments):
            return builder.and_(builder.bitcast(arguments[0], INT32), SIZE)

        return bits(number), build

    @intrinsic
    def of_bits(typing_context, bits):
        def build(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], FLOAT)

        return number(types.int32), build

    @intrinsic
    def larger(typing_context, a, b):
        def build(context, builder, signature, arguments):
            return builder.select(builder.icmp_signed(">", *arguments), *arguments)

        return bits(bits, bits), build

    return Codec(number_of, code_of, noise_at, size_bits, of_bits, larger)


EMIT = {INT8: (emit_signed_number, emit_signed_code), UINT8: (emit_unsigned_number, emit_unsigned_code)}
