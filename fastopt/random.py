"""Random numbers of a counter: a function of a seed and an index, without a state, and so the same for any threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastopt.kernels.bits import FORMATS
from fastopt.kernels.typed import typed

__all__ = ["uniform"]

COUNTER: Callable[..., Any]
UNIT: Callable[..., Any]
PHILOX: Callable[..., Any]
ZERO: Any

ROUNDS = 10
WORD = np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)
NONE = np.uint64(0)
FIRST_FACTOR = np.uint64(0xD2511F53)
SECOND_FACTOR = np.uint64(0xCD9E8D57)
FIRST_STEP = np.uint64(0x9E3779B9)
SECOND_STEP = np.uint64(0xBB67AE85)


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Return the four words of Philox4x32-10 for a counter of four words and a key of two; each word is a uint64."""
    for _ in range(ROUNDS):
        first = FIRST_FACTOR * c0
        second = SECOND_FACTOR * c2
        c0 = (second >> WORD) ^ c1 ^ k0
        c1 = second & LOW
        c2 = (first >> WORD) ^ c3 ^ k1
        c3 = first & LOW
        k0 = (k0 + FIRST_STEP) & LOW
        k1 = (k1 + SECOND_STEP) & LOW
    return c0, c1, c2, c3


@typed({dtype: {"ZERO": dtype.type(0)} for dtype in FORMATS}, PHILOX=philox)
def uniform(seed: Any, index: Any) -> Any:
    """Return a random number that is uniform in [0, 1) and a function of seed and index alone.

    Formula: Philox4x32-10 with the 64 bits of the seed as key and those of the index as counter; the first 23 of its
    bits (float32), or 52 (float64), are those after the point.

    Args:
        seed: an integer, as 64 bits, or a float that is whole, in [-2**63, 2**63); or an array of any shape.
        index: the same, for the number's place in the sequence of this seed; an array whose shape broadcasts with that
            of seed.

    Returns:
        A number, or an array, of the dtype of the floats among the arguments: float64 where both are integers.

    Raises:
        TypeError: floats must be float32 or float64.

    Source: J. K. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC'11,
    https://doi.org/10.1145/2063384.2063405.

    >>> import numpy as np, fastopt
    >>> fastopt.uniform(7, np.arange(3)).round(6)
    array([0.954597, 0.40696 , 0.006075])
    """
    key = COUNTER(seed)
    place = COUNTER(index)
    first, second, _, _ = PHILOX(place & LOW, place >> WORD, NONE, NONE, key & LOW, key >> WORD)
    return UNIT((first << WORD) | second, ZERO)
