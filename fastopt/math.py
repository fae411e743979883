"""exp, log, tanh and pow for rules: numba compiles them into the rule's loop, where LLVM vectorises them.

Those of the module ``math`` call the C library once per number, which no loop can vectorise.

Each function reduces its argument to a short interval by operations on the bits of the number, evaluates a polynomial
there, and chooses results without branches. Errors are below 2 units in the last place (ulp), over the whole range:
denormal numbers, infinities and signed zeros included, NaN as IEEE 754 has it. There is no fused multiply-add, so that
the bits are the same on every processor, with any number of threads, and in NumPy; on CUDA multiplications and
additions may be fused.

Arguments are numbers or arrays of any shape. The result has the dtype of the floats among them, float32 or float64;
float64 where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastopt.kernels.bits import FORMATS
from fastopt.kernels.typed import typed

__all__ = ["exp", "log", "pow", "tanh"]

# --- what `typed` supplies --------------------------------------------------------------------------------------------

NUMBER: Any
SPLIT: Callable[..., Any]
POWER_OF_TWO: Callable[..., Any]
HIGH_HALF: Callable[..., Any]
POLYNOMIAL: Callable[..., Any]
WHERE: Callable[..., Any]
FLOOR: Callable[..., Any]
WITH_SIGN: Callable[..., Any]

ZERO: Any
HALF: Any
ONE: Any
TWO: Any
THREE: Any
INFINITY: Any
NAN: Any
SMALLEST_NORMAL: Any
LIFT: Any
"""A power of two that makes denormal numbers normal."""
LIFTED: Any
"""Its exponent."""
WHOLE: Any
"""What rounds a number to a whole one where it is added and subtracted."""
LOG2_E: Any
LN2: Any
LN2_HIGH: Any
"""ln 2 with so few bits that its product with an exponent is exact."""
LN2_LOW: Any
EXP: Any
"""(e**r - 1 - r) / r**2."""
LARGEST_EXP: Any
"""Above this, e**x is infinite."""
SMALLEST_EXP: Any
"""Below this, e**x is 0."""
LOG: Any
"""(2 atanh(s) / s - 2) / s**2, in powers of s**2."""
TANH_ABOVE: Any
TANH_BELOW: Any
"""(tanh(x) / x - 1) / x**2, in powers of x**2: the numerator and the denominator."""
SMALL_TANH: Any
"""The largest argument of that fraction."""
LARGEST_TANH: Any
"""Above this, tanh(x) is 1."""
POW: Any
"""(3 atanh(s) / s - 3 - s**2) / s**4, in powers of s**2."""
LOG2_SCALE: Any
"""2 / (3 ln 2)."""
LOG2_SCALE_HIGH: Any
LOG2_SCALE_LOW: Any
LARGEST_POWER: Any
"""Powers above this are 0, 1 or infinite."""
LARGEST_POW: Any
"""Above this, 2**x is infinite; below its negative, 0."""

# --- constants --------------------------------------------------------------------------------------------------------
# The polynomials interpolate at Chebyshev's nodes, which comes close to the smallest largest error. They were computed
# to 60 digits and rounded to the dtype.

CONSTANTS: dict[Any, dict[str, Any]] = {
    np.float32: {
        "LN2_HIGH": 0.693145751953125,  # 15 bits, as exponents have 8
        "LN2_LOW": 1.4286068203094173e-06,
        "EXP": (
            0.5, 0.1666666716337204, 0.04166646674275398, 0.00833331048488617, 0.0013933649752289057,
            0.00019890991097781807,
        ),
        "LARGEST_EXP": 89.5,
        "SMALLEST_EXP": -104.5,
        "LOG": (0.6666666865348816, 0.4000012278556824, 0.2855081558227539, 0.23330582678318024),
        "TANH_ABOVE": (-0.3333333432674408, -0.014772993512451649),
        "TANH_BELOW": (1.0, 0.4443189799785614, 0.015822887420654297),
        "LARGEST_TANH": 10.0,
        "POW": (0.6000002026557922, 0.42843353748321533, 0.34572356939315796),
        "LOG2_SCALE_HIGH": 0.961669921875,  # 12 bits, as the factor has 12
        "LOG2_SCALE_LOW": 0.0001267720509756049,
        "LARGEST_POWER": 2.0**34,
        "LARGEST_POW": 160.0,
    },
    np.float64: {
        "LN2_HIGH": 0.6931471805592082,  # 40 bits, as exponents have 11
        "LN2_LOW": 7.371002565167799e-13,
        "EXP": (
            0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333326136, 0.0013888888888883748,
            0.00019841269874820627, 2.4801587325547743e-05, 2.7557255400206422e-06, 2.75572736431103e-07,
            2.5105217004720745e-08, 2.0914686968086876e-09,
        ),
        "LARGEST_EXP": 710.5,
        "SMALLEST_EXP": -746.0,
        "LOG": (
            0.666666666666667, 0.39999999999899444, 0.2857142862600327, 0.22222211130259878, 0.18182889455674947,
            0.15331710618210773, 0.14616585424888623,
        ),
        "TANH_ABOVE": (-0.3333333333333333, -0.020498799708498872, -0.0001991780435861287),
        "TANH_BELOW": (1.0, 0.4614963991254931, 0.02329133187629886, 0.0002065337374875025),
        "LARGEST_TANH": 20.0,
        "POW": (
            0.6, 0.4285714285714405, 0.3333333333248383, 0.272727275030892, 0.23076892443777647, 0.20002207040770967,
            0.1755935450923681, 0.17584767935814777,
        ),
        "LOG2_SCALE_HIGH": 0.9617966860532761,  # 26 bits, as the factor has 26
        "LOG2_SCALE_LOW": 7.872699542894897e-09,
        "LARGEST_POWER": 2.0**64,
        "LARGEST_POW": 1100.0,
    },
}  # fmt: skip


def _constants(dtype: np.dtype[Any]) -> dict[str, Any]:
    """Return all constants as numbers of a dtype."""
    form = FORMATS[dtype]
    numbers = {
        "ZERO": 0.0,
        "HALF": 0.5,
        "ONE": 1.0,
        "TWO": 2.0,
        "THREE": 3.0,
        "INFINITY": math.inf,
        "NAN": math.nan,
        "SMALLEST_NORMAL": 2.0 ** (1 - form.bias),
        "LIFT": 2.0 ** (form.stored + 2),
        "LIFTED": form.stored + 2,
        "WHOLE": 1.5 * 2.0**form.stored,
        "LN2": math.log(2.0),
        "LOG2_E": 1.0 / math.log(2.0),
        "LOG2_SCALE": 2.0 / (3.0 * math.log(2.0)),
        "SMALL_TANH": 0.625,
        **CONSTANTS[dtype.type],
    }
    cast = dtype.type
    return {name: tuple(map(cast, v)) if isinstance(v, tuple) else cast(v) for name, v in numbers.items()}


BY_DTYPE = {dtype: _constants(dtype) for dtype in FORMATS}

# --- parts of the formulas --------------------------------------------------------------------------------------------


def rounded(x: Any) -> Any:
    """Return x rounded to a whole number, for abs(x) below a quarter of the largest such number."""
    return (x + WHOLE) - WHOLE


def short_exp(r: Any) -> Any:
    """Return e**r for abs(r) up to ln(2) / 2, and a little more."""
    return ONE + (r + r * r * POLYNOMIAL(r, EXP))


def scaled(x: Any, n: Any) -> Any:
    """Return 2**n * x, with one rounding where that is a denormal number."""
    first = ROUNDED(n * HALF)
    return x * POWER_OF_TWO(first) * POWER_OF_TWO(n - first)


def binary(x: Any) -> Any:
    """Return n and m with x = 2**n * m, m from the root of a half to that of 2; x must be positive and finite."""
    denormal = x < SMALLEST_NORMAL
    n, m = SPLIT(WHERE(denormal, x * LIFT, x))
    return n - WHERE(denormal, LIFTED, ZERO), m


ROUNDED: Callable[..., Any]
SHORT_EXP: Callable[..., Any]
SCALED: Callable[..., Any]
BINARY: Callable[..., Any]

# --- the functions ----------------------------------------------------------------------------------------------------


@typed(BY_DTYPE, ROUNDED=rounded, SHORT_EXP=short_exp, SCALED=scaled)
def exp(x: Any) -> Any:
    """Return e**x, within 1 ulp.

    Formula: ``e**x = 2**n e**r`` with ``n = round(x / ln 2)`` and ``r = x - n ln 2``.

    Args:
        x: a number, or an array of any shape, in [-inf, inf].

    Returns:
        A number in [0, inf], or an array like x.

    Raises:
        TypeError: x must be float32, float64 or an integer.

    Source: W. J. Cody and W. Waite, Software Manual for the Elementary Functions, Prentice Hall, 1980, for the
    reduction of the argument.

    >>> import numpy as np, fastopt
    >>> fastopt.math.exp(np.array([-np.inf, 0.0, 1.0, 1000.0]))
    array([0.        , 1.        , 2.71828183,        inf])
    """
    x = NUMBER(x)
    x = WHERE(x > LARGEST_EXP, LARGEST_EXP, x)  # in this form, so that NaN stays NaN
    x = WHERE(x < SMALLEST_EXP, SMALLEST_EXP, x)
    n = ROUNDED(x * LOG2_E)
    return SCALED(SHORT_EXP((x - n * LN2_HIGH) - n * LN2_LOW), n)


@typed(BY_DTYPE, BINARY=binary)
def log(x: Any) -> Any:
    """Return the natural logarithm of x, within 1 ulp.

    Formula: ``ln x = n ln 2 + 2 atanh(s)`` with ``x = 2**n m``, m in [sqrt(1/2), sqrt(2)), and
    ``s = (m - 1) / (m + 1)``.

    Args:
        x: a number, or an array of any shape, in [-inf, inf]; NaN results below 0, -inf at both zeros.

    Returns:
        A number in [-inf, inf], or an array like x.

    Raises:
        TypeError: x must be float32, float64 or an integer.

    Source: J.-M. Muller, Elementary Functions: Algorithms and Implementation, 3rd ed., Birkhaeuser, 2016, section 11.4.

    >>> import numpy as np, fastopt
    >>> fastopt.math.log(np.array([0.0, 1.0, 10.0, np.inf]))
    array([      -inf, 0.        , 2.30258509,        inf])
    """
    x = NUMBER(x)
    n, m = BINARY(x)
    f = m - ONE
    s = f / (f + TWO)
    z = s * s
    square = HALF * f * f
    rest = s * (square + z * POLYNOMIAL(z, LOG))
    result = n * LN2_HIGH - ((square - (rest + n * LN2_LOW)) - f)
    result = WHERE(x < INFINITY, result, x)
    return WHERE(x > ZERO, result, WHERE(x == ZERO, -INFINITY, NAN))


@typed(BY_DTYPE, ROUNDED=rounded, SHORT_EXP=short_exp)
def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent of x, within 2 ulp.

    Formula: ``1 - 2 / (e**(2 abs(x)) + 1)`` with the sign of x; where abs(x) is at most 0.625, x times a quotient of
    polynomials of x**2.

    Args:
        x: a number, or an array of any shape, in [-inf, inf].

    Returns:
        A number in [-1, 1], or an array like x.

    Raises:
        TypeError: x must be float32, float64 or an integer.

    Source: W. J. Cody and W. Waite, Software Manual for the Elementary Functions, Prentice Hall, 1980.

    >>> import numpy as np, fastopt
    >>> fastopt.math.tanh(np.array([-np.inf, 0.0, 1.0]))
    array([-1.        ,  0.        ,  0.76159416])
    """
    x = NUMBER(x)
    size = abs(x)
    size = WHERE(size > LARGEST_TANH, LARGEST_TANH, size)
    twice = size + size
    n = ROUNDED(twice * LOG2_E)
    power = SHORT_EXP((twice - n * LN2_HIGH) - n * LN2_LOW) * POWER_OF_TWO(n)
    small = size <= SMALL_TANH
    z = size * size
    above = WHERE(small, size * z * POLYNOMIAL(z, TANH_ABOVE), -TWO)
    below = WHERE(small, POLYNOMIAL(z, TANH_BELOW), power + ONE)
    return WITH_SIGN(WHERE(small, size, ONE) + above / below, x)


@typed(BY_DTYPE, ROUNDED=rounded, SHORT_EXP=short_exp, SCALED=scaled, BINARY=binary)
def pow(x: Any, y: Any) -> Any:  # noqa: A001 the field's word
    """Return x**y, within 2 ulp, with the special cases of IEEE 754.

    Formula: ``2**(y log2(abs(x)))``, the logarithm and the product as unevaluated sums of two numbers; for negative x
    the result has the sign of ``(-1)**y``, and is NaN where y is not whole.

    Args:
        x: a number, or an array of any shape, in [-inf, inf].
        y: a number in [-inf, inf], or an array whose shape broadcasts with that of x.

    Returns:
        A number in [-inf, inf], or an array. 1 for ``y = 0`` and for ``x = 1``, whatever the other is.

    Raises:
        TypeError: x and y must be float32, float64 or integers.

    Source: J.-M. Muller et al., Handbook of Floating-Point Arithmetic, 2nd ed., Birkhaeuser, 2018, chapters 4 and 10.

    >>> import numpy as np, fastopt
    >>> fastopt.math.pow(np.array([4.0, -2.0, 0.0]), np.array([0.5, 3.0, -1.0]))
    array([ 2., -8., inf])
    """
    x = NUMBER(x)
    y = NUMBER(y)
    size = abs(x)
    n, m = BINARY(size)
    # s = (m - 1) / (m + 1), as s_high + s_low: a product of two high halves is exact.
    f = m - ONE
    divisor = m + ONE
    divisor_high = HIGH_HALF(divisor)
    divisor_low = m - (divisor_high - ONE)
    inverse = ONE / divisor
    s_high = HIGH_HALF(f * inverse)
    s_low = ((f - s_high * divisor_high) - s_high * divisor_low) * inverse
    s = s_high + s_low
    # log2(m) = LOG2_SCALE s (3 + s**2 + ...)
    z = s * s
    square = s_high * s_high
    rest = z * z * POLYNOMIAL(z, POW) + s_low * (s_high + s)
    factor_high = HIGH_HALF((THREE + square) + rest)
    factor_low = rest - ((factor_high - THREE) - square)
    product = s_high * factor_high
    product_low = s_low * factor_high + factor_low * s
    log_high = HIGH_HALF(product + product_low)
    log_low = product_low - (log_high - product)
    scaled_high = LOG2_SCALE_HIGH * log_high
    scaled_low = LOG2_SCALE_LOW * log_high + log_low * LOG2_SCALE
    high = HIGH_HALF((scaled_high + scaled_low) + n)
    low = scaled_low - ((high - n) - scaled_high)
    # y log2(x), with a y for which nothing overflows
    power = WHERE(y > LARGEST_POWER, LARGEST_POWER, y)
    power = WHERE(power < -LARGEST_POWER, -LARGEST_POWER, power)
    power_high = HIGH_HALF(power)
    exponent_low = (power - power_high) * high + power * low
    exponent = power_high * high
    large = abs(exponent) > LARGEST_POW
    exponent = WHERE(large, WITH_SIGN(LARGEST_POW, exponent), exponent)
    exponent_low = WHERE(large, ZERO, exponent_low)
    n = ROUNDED(exponent + exponent_low)
    result = SCALED(SHORT_EXP(((exponent - n) + exponent_low) * LN2), n)
    # what IEEE 754 asks for
    special = (size == ZERO) | (size == INFINITY) | (abs(y) == INFINITY)
    limit = WHERE(size == ONE, ONE, WHERE((size > ONE) == (y > ZERO), INFINITY, ZERO))
    result = WHERE(special, limit, result)
    half = y * HALF
    fraction = FLOOR(y) != y
    odd = (FLOOR(half) != half) & (FLOOR(y) == y)
    result = WHERE(odd, WITH_SIGN(result, x), result)
    result = WHERE((x < ZERO) & (size < INFINITY) & fraction, NAN, result)
    result = WHERE((x != x) | (y != y), NAN, result)
    return WHERE((y == ZERO) | (x == ONE), ONE, result)
