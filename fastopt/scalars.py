"""What counts as a number, a count and a flag, wherever one is passed: the only code that decides it.

A number is anything 0-d and real: a float or int, a NumPy scalar, a 0-d array, or a 0-d tensor of another library.
Bools, strings, complex numbers and masked values are not numbers.
"""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

LONGEST = 200
"""The most characters of a refused value that an error shows."""

PLAIN = (float, int, bool, str, complex, type(None))


def unwrap(value: Any) -> Any:
    """Return the scalar that a 0-d array or tensor holds; any other value, and a masked one, as it is.

    >>> import numpy as np
    >>> unwrap(np.array(0.5)), unwrap([0.5])
    (0.5, [0.5])
    """
    if type(value) in PLAIN or is_masked(value):
        return value
    try:
        if getattr(value, "shape", None) != ():
            return value
        if hasattr(value, "item"):
            return value.item()
        return value.__array__().item()  # a variable of Keras
    except Exception:  # of another library: not readable as a scalar
        return value


def real(value: Any) -> float | int | None:
    """Return a real number as a float, or as an int where it is one; None for any other value.

    >>> import numpy as np
    >>> real(np.float32(0.5)), real(np.array(3)), real(True), real("0.5"), real(np.array([0.5]))
    (0.5, 3, None, None, None)
    """
    value = unwrap(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a fraction beyond the range of floats
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def number(name: str, value: Any, expected: str = "a number") -> float:
    """Return a real number as a float, infinite where it is an int beyond the range of floats; TypeError for others.

    >>> number("lr", "0.1")
    Traceback (most recent call last):
    TypeError: lr: must be a number, got '0.1' (str)
    """
    found = real(value)
    if found is None:
        raise TypeError(f"{name}: must be {expected}, got {shown(value)}")
    try:
        return float(found)
    except OverflowError:
        return math.inf if found > 0 else -math.inf


def count(name: str, value: Any, least: int, expected: str = "") -> int:
    """Return an integer from `least` as an int; TypeError for what is not an integer, ValueError for a smaller one.

    >>> count("iterations", 0, 1)
    Traceback (most recent call last):
    ValueError: iterations: must be an int >= 1, got 0
    """
    found = real(value)
    expected = expected or f"an int >= {least}"
    if not isinstance(found, int):
        raise TypeError(f"{name}: must be {expected}, got {shown(value)}")
    if found < least:
        raise ValueError(f"{name}: must be {expected}, got {found}")
    return found


def flag(name: str, value: Any) -> bool:
    """Return a bool of Python, of NumPy or in a 0-d array as a bool; TypeError for any other value.

    >>> flag("training", "no")
    Traceback (most recent call last):
    TypeError: training: must be True or False, got 'no' (str)
    """
    found = unwrap(value)
    if not isinstance(found, bool):
        raise TypeError(f"{name}: must be True or False, got {shown(value)}")
    return found


def is_masked(value: Any) -> bool:
    """Whether a value is a masked array. Loads no numpy.ma: a process forked meanwhile would wait for it forever."""
    return isinstance(value, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ()))


def refuse_masked(name: str, value: Any) -> None:
    """Raise TypeError for a masked array, whose mask would be lost."""
    if is_masked(value):
        raise TypeError(f"{name}: must be an array without a mask, got a masked array; use .filled(0)")


def shown(value: Any) -> str:
    """A refused value for an error: what it is, where its repr does not tell.

    >>> shown(True), shown(1j), shown(0.5), shown([1, 2])
    ('True (bool)', '1j (complex)', '0.5', '[1, 2]')
    """
    if is_masked(value):
        return "a masked array"
    try:
        shape = getattr(value, "shape", None)
        if shape is not None and shape != ():
            return f"an array of shape {tuple(shape)}"
    except Exception:  # of another library
        return type(value).__name__
    held = unwrap(value)
    kind = f" ({type(held).__name__})" if isinstance(held, bool | str | bytes | complex) else ""
    text = " ".join(f"{value!r}".split())
    return f"{text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}{kind}"


def dtype_name(dtype: Any) -> str:
    """The name of a NumPy dtype for an error: float16, bfloat16, bool, str; with its byte order where it is not native.

    >>> import numpy as np
    >>> dtype_name(np.dtype("<f2")), dtype_name(np.dtype("U3")), dtype_name(np.dtype(">f4"))
    ('float16', 'str', "'>f4'")
    """
    if not dtype.isnative:
        return repr(dtype.str)
    return {"U": "str", "S": "bytes"}.get(dtype.kind, str(dtype.name))


def check_eps(name: str, eps: Any, dtype: Any) -> None:
    """Refuse an eps that is not 0 and becomes 0 in the dtype that is computed in: it would no longer bound a quotient.

    >>> import numpy as np
    >>> check_eps("eps", 1e-60, np.dtype(np.float32))
    Traceback (most recent call last):
    ValueError: eps: must not become 0 in float32, got 1e-60; use a number >= 1e-38, or 0
    """
    if eps != 0.0 and dtype.type(eps) == 0.0:
        least = "1e-38" if dtype.itemsize == 4 else "1e-308"
        raise ValueError(f"{name}: must not become 0 in {dtype.name}, got {eps!r}; use a number >= {least}, or 0")
