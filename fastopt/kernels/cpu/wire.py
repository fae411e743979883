"""Numbers in fewer bytes, for messages between processes: `Codec` encodes float32 and decodes it."""

# Loops are typed by numba; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastopt.kernels import codes as codes_of_8_bits
from fastopt.kernels.bind import bind
from fastopt.kernels.contract import BFLOAT16, CODES, INT8, STORED, Array
from fastopt.kernels.driver import Loop
from fastopt.kernels.elements import bounds, scalar
from fastopt.kernels.formats import reading, writing
from fastopt.kernels.intrinsics import window
from fastopt.kernels.threads import COMPILING

ADDS: bool
"""Whether decoded numbers are added to what is there."""
READ: Callable[..., Any]
WRITE: Callable[..., Any]
NUMBER: Callable[..., Any]
CODE: Callable[..., Any]
SIZE_BITS: Callable[..., Any]
OF_BITS: Callable[..., Any]
LARGER: Callable[..., Any]
UNIT_OF_BLOCK: Callable[..., Any]
"""Of codes.py."""
ZERO: Any

# --- the loops: their units are blocks of CODES numbers ---------------------------------------------------------------


def encode_rounded(numbers, codes, first, last):
    """Round numbers to the format of codes."""
    start = first * CODES
    size = min(last * CODES, numbers.size) - start
    given = window(numbers, start, size)
    stored = window(codes, start, size)
    for i in range(size):
        WRITE((stored,), i, (given[i],))


def decode_rounded(codes, numbers, first, last):
    """Write what codes stand for, or add it."""
    start = first * CODES
    size = min(last * CODES, numbers.size) - start
    stored = window(codes, start, size)
    room = window(numbers, start, size)
    for i in range(size):
        value = READ((stored,), i)[0]
        room[i] = room[i] + value if ADDS else value


def encode_blocks(numbers, errors, codes, units, first, last):
    """Encode the sums of numbers and errors, and leave in `errors` what the codes do not hold of them."""
    for block in range(first, last):
        start = block * CODES
        size = min(CODES, numbers.size - start)
        given = window(numbers, start, size)
        room = window(errors, start, size)
        largest = np.int32(0)
        for i in range(size):
            room[i] = room[i] + given[i]
            largest = LARGER(largest, SIZE_BITS(room[i]))
        unit, inverse = UNIT_OF_BLOCK(largest)
        units[block] = unit
        stored = window(codes, start, size)
        for i in range(size):
            stored[i] = CODE(room[i], OF_BITS(SIZE_BITS(room[i])) * inverse, 0)
        if unit - unit == ZERO:
            for i in range(size):
                room[i] = room[i] - NUMBER(stored[i], unit)
        else:  # of NaN or infinity, which must not stay
            for i in range(size):
                room[i] = ZERO


def decode_blocks(codes, units, numbers, first, last):
    """Write what codes stand for, or add it."""
    for block in range(first, last):
        start = block * CODES
        size = min(CODES, numbers.size - start)
        stored = window(codes, start, size)
        room = window(numbers, start, size)
        unit = units[block]
        for i in range(size):
            value = NUMBER(stored[i], unit)
            room[i] = room[i] + value if ADDS else value


# --- what Python calls ------------------------------------------------------------------------------------------------

FLOATS = types.Array(types.float32, 1, "C")


class Codec:
    """The loops of one format: bfloat16, or int8 in blocks of `CODES` codes with a unit each, as states of 8 bits are.

    Args:
        name: ``"bfloat16"`` or ``"int8"``.
    """

    def __init__(self, name: str):
        self.name = name
        self.keeps_errors = name == INT8
        """Whether what the codes do not hold is kept, and added to the next numbers."""
        with COMPILING:
            if self.keeps_errors:
                parts = codes_of_8_bits.codec(INT8, 0, False, types, intrinsic)
                constants = {name.upper(): part for name, part in parts._asdict().items()}
                constants |= {**bounds(np.dtype(np.float32)), "ONE": np.float32(1)}
                constants["SHARE"] = np.float32(1.0 / codes_of_8_bits.MOST[INT8])
                unit = bind(codes_of_8_bits.unit_of_block, constants, label="unit_of_block", scalar=scalar)
                constants["UNIT_OF_BLOCK"] = unit
                codes = types.Array(types.int8, 1, "C")
                encode: Any = encode_blocks
                decode: Any = decode_blocks
                kinds: tuple[Any, ...] = (codes, FLOATS)
                of_encode = (FLOATS, FLOATS, *kinds)
            else:
                encode, decode = encode_rounded, decode_rounded
                kinds = (types.Array(types.uint16, 1, "C"),)
                constants = {"READ": reading((BFLOAT16,)), "WRITE": writing((BFLOAT16,), (False,))}
                of_encode = (FLOATS, *kinds)
            self._encode = Loop(encode, constants, of_encode, label=f"encode_{name}")
            self._decode, self._add = (
                Loop(decode, {**constants, "ADDS": adds}, (*kinds, FLOATS), label=f"decode_{name}_{adds}")
                for adds in (False, True)
            )

    def size_of(self, count: int) -> int:
        """The bytes of a message of so many numbers, a multiple of 4."""
        blocks = -(-count // CODES)
        return blocks * (CODES + 4) if self.keeps_errors else blocks * CODES * 2

    def encode(self, numbers: Array, message: Array, errors: Array | None) -> None:
        """Write the codes of numbers into a message.

        numbers : 1-D, float32.
        message : uint8, of `size_of` as many numbers, or of more.
        errors : float32, of the size of numbers, where `keeps_errors`: added to the numbers, and what is left of them.
        """
        if self.keeps_errors:
            self._run(self._encode, numbers, numbers, errors, *self._parts(message))
        else:
            self._run(self._encode, numbers, numbers, *self._parts(message))

    def decode(self, message: Array, numbers: Array, *, add: bool = False) -> None:
        """Write the numbers of a message, of as many as `message` has room for or fewer; or add them."""
        self._run(self._add if add else self._decode, numbers, *self._parts(message), numbers)

    def _run(self, loop: Loop, numbers: Array, *arguments: Array) -> None:
        if numbers.size:
            loop.run(*arguments, elements=numbers.size, units=-(-numbers.size // CODES))

    def _parts(self, message: Array) -> tuple[Array, ...]:
        if not self.keeps_errors:
            return (message.view(STORED[BFLOAT16]),)
        codes = message.size // (CODES + 4) * CODES
        return message[:codes].view(np.int8), message[codes:].view(np.float32)


@cache
def codec(name: str) -> Codec:
    """The `Codec` of a format.

    >>> import numpy as np
    >>> found, message = codec("bfloat16"), np.zeros(512, np.uint8)
    >>> numbers = np.array([1.0, 1.001, -3.0], np.float32)
    >>> found.encode(numbers, message, None)
    >>> found.decode(message, numbers)
    >>> numbers
    array([ 1.,  1., -3.], dtype=float32)
    """
    return Codec(name)
