"""Operations on the bits of floats, in NumPy: `fastopt.kernels.operations` has them as instructions of LLVM."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Format(NamedTuple):
    """The bits of a float."""

    unsigned: Any
    """The dtype of its bits."""
    stored: int
    """Bits of the significand, without the leading one."""
    bias: int
    """Of the exponent."""

    @property
    def width(self) -> int:
        """Bits of a number."""
        return 8 * np.dtype(self.unsigned).itemsize

    @property
    def one(self) -> int:
        """The bits of 1."""
        return self.bias << self.stored

    @property
    def large(self) -> int:
        """The bits of the power of two whose last place is 1."""
        return (self.bias + self.stored) << self.stored

    @property
    def root_half(self) -> int:
        """The bits of the square root of a half, rounded."""
        number = np.dtype(f"f{self.width // 8}").type(0.5**0.5)
        return int(number.view(self.unsigned))

    @property
    def low_half(self) -> int:
        """The bits that `high_half` clears: the square of what remains is exact."""
        return (1 << (self.stored + 2) // 2) - 1


FORMATS: dict[np.dtype[Any], Format] = {
    np.dtype(np.float32): Format(np.uint32, 23, 127),
    np.dtype(np.float64): Format(np.uint64, 52, 1023),
}

# --- operations on NumPy's arrays -------------------------------------------------------------------------------------


def _bits(x: Any) -> tuple[Any, Format]:
    form = FORMATS[x.dtype]
    return x.view(form.unsigned), form


def _float_of(bits: Any) -> Any:
    return bits.view(f"f{bits.dtype.itemsize}")


def split(x: Any) -> Any:
    """Return n and m with x = 2**n * m, m from the root of a half to that of 2; x must be positive and normal."""
    bits, form = _bits(x)
    of = form.unsigned
    moved = bits + of(form.one - form.root_half)
    n = _float_of((moved >> of(form.stored)) | of(form.large)) - x.dtype.type((1 << form.stored) + form.bias)
    return n, _float_of((moved & of((1 << form.stored) - 1)) + of(form.root_half))


def power_of_two(n: Any) -> Any:
    """Return 2**n for a float n that is whole, and the exponent of a normal number."""
    form = FORMATS[n.dtype]
    bits, _ = _bits(n + n.dtype.type(1.5 * 2**form.stored + form.bias))
    return _float_of(bits << form.unsigned(form.stored))


def high_half(x: Any) -> Any:
    """Return x without the lower half of its significand, so that products of such numbers are exact."""
    bits, form = _bits(x)
    return _float_of(bits & form.unsigned((1 << form.width) - 1 - form.low_half))


def polynomial(x: Any, coefficients: tuple[Any, ...]) -> Any:
    """Return coefficients[0] + coefficients[1] x + ..., by Estrin's scheme, whose sums do not wait for each other."""
    terms = list(coefficients)
    while len(terms) > 1:
        pairs = [low + high * x for low, high in zip(terms[::2], terms[1::2], strict=False)]
        terms = [*pairs, *terms[2 * len(pairs) :]]
        x = x * x
    return terms[0]


def unit(bits: Any, zero: Any) -> Any:
    """Return the number in [0, 1), of the dtype of `zero`, whose bits after the point are the first of 64 bits."""
    form = FORMATS[zero.dtype]
    word = (bits >> np.uint64(64 - form.stored)).astype(form.unsigned)
    return _float_of(word | form.unsigned(form.one)) - zero.dtype.type(1)


def counter(number: Any) -> Any:
    """Return an integer, or a float that is whole, as 64 bits."""
    number = np.asarray(number)
    if number.dtype.kind == "f":
        number = number.astype(np.int64)
    return number.astype(np.uint64)


PYTHON: dict[str, Any] = {
    "SPLIT": split,
    "POWER_OF_TWO": power_of_two,
    "HIGH_HALF": high_half,
    "POLYNOMIAL": polynomial,
    "UNIT": unit,
    "COUNTER": counter,
    "WHERE": np.where,
    "FLOOR": np.floor,
    "WITH_SIGN": np.copysign,
}
"""The operations, for plain Python."""
