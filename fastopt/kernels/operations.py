"""The operations of `fastopt.kernels.bits` as instructions of LLVM, with the same bits, for any compiler of numba."""

# Intrinsics are typed by numba.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from fastopt.kernels.bits import FORMATS, Format


def _form_of(value: Any) -> tuple[Any, Format]:
    form = FORMATS[np.dtype("f4" if isinstance(value.type, ir.FloatType) else "f8")]
    return ir.IntType(form.width), form


def emit_split(builder: Any, x: Any) -> tuple[Any, Any]:
    """Emit `split`."""
    word, form = _form_of(x)
    moved = builder.add(builder.bitcast(x, word), word(form.one - form.root_half))
    exponent = builder.or_(builder.lshr(moved, word(form.stored)), word(form.large))
    n = builder.fsub(builder.bitcast(exponent, x.type), x.type((1 << form.stored) + form.bias))
    m = builder.add(builder.and_(moved, word((1 << form.stored) - 1)), word(form.root_half))
    return n, builder.bitcast(m, x.type)


def emit_power_of_two(builder: Any, n: Any) -> Any:
    """Emit `power_of_two`."""
    word, form = _form_of(n)
    moved = builder.fadd(n, n.type(1.5 * 2**form.stored + form.bias))
    return builder.bitcast(builder.shl(builder.bitcast(moved, word), word(form.stored)), n.type)


def emit_high_half(builder: Any, x: Any) -> Any:
    """Emit `high_half`."""
    word, form = _form_of(x)
    return builder.bitcast(builder.and_(builder.bitcast(x, word), word(~form.low_half)), x.type)


def emit_polynomial(builder: Any, x: Any, coefficients: list[Any]) -> Any:
    """Emit `polynomial`."""
    terms = list(coefficients)
    while len(terms) > 1:
        pairs = [builder.fadd(low, builder.fmul(high, x)) for low, high in zip(terms[::2], terms[1::2], strict=False)]
        terms = [*pairs, *terms[2 * len(pairs) :]]
        x = builder.fmul(x, x)
    return terms[0]


def emit_unit(builder: Any, bits: Any, zero: Any) -> Any:
    """Emit `unit`."""
    word, form = _form_of(zero)
    first = builder.lshr(bits, bits.type(64 - form.stored))
    if form.width < 64:
        first = builder.trunc(first, word)
    number = builder.bitcast(builder.or_(first, word(form.one)), zero.type)
    return builder.fsub(number, zero.type(1))


def emit_with_sign(builder: Any, x: Any, sign: Any) -> Any:
    """Emit copysign."""
    word, form = _form_of(x)
    top = 1 << (form.width - 1)
    size = builder.and_(builder.bitcast(x, word), word(top - 1))
    return builder.bitcast(builder.or_(size, builder.and_(builder.bitcast(sign, word), word(top))), x.type)


def emit_floor(builder: Any, x: Any) -> Any:
    """Emit the rounding towards minus infinity."""
    return builder.call(builder.module.declare_intrinsic("llvm.floor", [x.type]), [x])


def choose(condition, yes, no):
    """Return `yes` where the condition holds, and `no` elsewhere: both are computed, so nothing branches."""
    return yes if condition else no


def whole(number):
    """As `counter`."""
    return np.uint64(np.int64(number))


def operations(types: Any, intrinsic: Callable[..., Any]) -> dict[str, Any]:
    """Return the operations for a compiler, given its module of types and its decorator of intrinsics."""

    @intrinsic
    def split_compiled(typing_context, x):
        def build(context, builder, signature, values):
            return context.make_tuple(builder, signature.return_type, emit_split(builder, values[0]))

        return types.UniTuple(x, 2)(x), build

    @intrinsic
    def power_of_two_compiled(typing_context, n):
        def build(context, builder, signature, values):
            return emit_power_of_two(builder, values[0])

        return n(n), build

    @intrinsic
    def high_half_compiled(typing_context, x):
        def build(context, builder, signature, values):
            return emit_high_half(builder, values[0])

        return x(x), build

    @intrinsic
    def polynomial_compiled(typing_context, x, coefficients):
        def build(context, builder, signature, values):
            each = [builder.extract_value(values[1], k) for k in range(len(signature.args[1]))]
            return emit_polynomial(builder, values[0], each)

        return x(x, coefficients), build

    @intrinsic
    def unit_compiled(typing_context, bits, zero):
        def build(context, builder, signature, values):
            return emit_unit(builder, *values)

        return zero(bits, zero), build

    @intrinsic
    def with_sign_compiled(typing_context, x, sign):
        def build(context, builder, signature, values):
            return emit_with_sign(builder, *values)

        return x(x, x), build

    @intrinsic
    def floor_compiled(typing_context, x):
        def build(context, builder, signature, values):
            return emit_floor(builder, values[0])

        return x(x), build

    return {
        "SPLIT": split_compiled,
        "POWER_OF_TWO": power_of_two_compiled,
        "HIGH_HALF": high_half_compiled,
        "POLYNOMIAL": polynomial_compiled,
        "UNIT": unit_compiled,
        "COUNTER": whole,
        "WHERE": choose,
        "FLOOR": floor_compiled,
        "WITH_SIGN": with_sign_compiled,
    }
