"""States of 8 bits in NumPy: what the codes of fastopt/kernels/codes.py stand for, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt.kernels.contract import CODE_BASE, CODES, Backend
from fastopt.storage.layout import Layout

MOST_SIGNED, MOST_UNSIGNED = 127, 255


def unit_of(name: str) -> str:
    """The name under which the units of a state are kept."""
    return f"{name}.unit"


def numbers_of(dtype: Any) -> np.ndarray:
    """What each code from the smallest to the largest stands for, in units: float32.

    Args:
        dtype: int8 or uint8.

    >>> float(numbers_of("int8")[127 + 2]), float(numbers_of("uint8")[255])
    (4.0, 1.875)
    """
    if np.dtype(dtype) == np.int8:
        k = np.arange(-MOST_SIGNED, MOST_SIGNED + 1, dtype=np.float32)
        return k * np.abs(k)
    code = np.arange(MOST_UNSIGNED + 1)
    found = np.ldexp(1.0 + (code % 8) / 8.0, code // 8 - 31)
    found[0] = 0.0
    return found.astype(np.float32)


def decode(codes: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The numbers of codes, of any shape, with a unit for each `CODES` of them: float32.

    >>> import numpy as np
    >>> decode(np.array([-2, 3], np.int8), np.array([0.5], np.float32))
    array([-2. ,  4.5], dtype=float32)
    """
    first = -MOST_SIGNED if codes.dtype == np.int8 else 0
    numbers = numbers_of(codes.dtype)[codes.reshape(-1).astype(np.intp) - first]
    with np.errstate(invalid="ignore", over="ignore"):
        found: np.ndarray = numbers * np.repeat(units, CODES)[: codes.size]
    return found.reshape(codes.shape)


def encode(numbers: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The codes of numbers, of any shape, and their units: those that a kernel would write, to the nearest.

    Args:
        numbers: float32.
        dtype: int8 or uint8.

    >>> import numpy as np
    >>> codes, units = encode(np.array([0.25, -1.0], np.float32), "int8")
    >>> codes, decode(codes, units)
    (array([  64, -127], dtype=int8), array([ 0.2539525, -1.        ], dtype=float32))
    """
    kind, flat = np.dtype(dtype), np.asarray(numbers, np.float32).reshape(-1)
    padded = np.zeros(-(-flat.size // CODES) * CODES, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(-1, CODES)
    table = numbers_of(kind)
    with np.errstate(all="ignore"):
        units = np.abs(blocks).max(axis=1, initial=0.0) * np.float32(1.0 / table[-1])
        inverse = np.where(units > 0.0, np.float32(1.0) / units, np.float32(0.0))
        units = np.where(np.isinf(inverse), np.float32(0.0), units)
        share = np.abs(blocks) * np.where(np.isinf(inverse), np.float32(0.0), inverse)[:, None]
        share = np.where(share > 0.0, share, np.float32(0.0))
        if kind == np.int8:
            roots = np.minimum(np.floor(np.sqrt(share) + np.float32(0.5)), MOST_SIGNED)
            codes = np.where(np.signbit(blocks), -roots, roots)
        else:
            bits = share.view(np.int32)
            moved = (bits + ((bits >> 20) & 1) + 0x7FFFF) >> 20
            codes = np.where(blocks > 0.0, np.clip(moved - CODE_BASE, 1, MOST_UNSIGNED), 0)
    return codes.astype(kind).reshape(-1)[: flat.size].reshape(np.shape(numbers)), units


def fill(codes: np.ndarray, units: np.ndarray, number: Any) -> None:
    """Write the codes of one number.

    >>> import numpy as np
    >>> codes, units = np.zeros(3, np.uint8), np.zeros(1, np.float32)
    >>> fill(codes, units, 0.25)
    >>> decode(codes, units)
    array([0.25, 0.25, 0.25], dtype=float32)
    """
    largest = numbers_of(codes.dtype)[-1]
    codes[...] = np.sign(number) * np.iinfo(codes.dtype).max
    units[...] = abs(number) / largest


def coded_views(layout: Layout, codes: np.ndarray, units: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The parameters' parts of the buffers of a state of 8 bits: codes, and the unit of each block.

    A state without codes is a view of the other buffer, and has no units.
    """
    assert layout.states is not None
    own_codes, own_units = [], []
    for offset, size, shape in zip(layout.states, layout.sizes, layout.shapes, strict=True):
        if offset < layout.coded and size:
            first = offset // CODES
            own_codes.append(codes[offset : offset + size].reshape(shape))
            own_units.append(units[first : first - (-size // CODES)])
        else:
            first = offset - layout.coded + layout.coded // CODES
            own_codes.append(units[first : first + size].reshape(shape))
            own_units.append(units[:0])
    return own_codes, own_units


def decoded(arrays: Mapping[str, list[Any]], backend: Backend) -> dict[str, list[Any]]:
    """The states of an optimizer by name, those of 8 bits as copies: numbers, on the CPU read-only.

    Args:
        arrays: by name, an array for each parameter; of codes, also the units, under `unit_of` the name.
        backend: that of the arrays.
    """
    found = {}
    for name, own in arrays.items():
        units = arrays.get(unit_of(name))
        if units is not None:
            own = [_decoded(array, of_blocks, backend) for array, of_blocks in zip(own, units, strict=True)]
        found[name] = own
    return found


def _decoded(array: Any, units: Any, backend: Backend) -> Any:
    if array.dtype.kind not in "iu":
        made = array.copy()
    elif backend.device is None:
        made = decode(array, units)
    else:
        made = backend.empty(array.shape, np.dtype(np.float32))
        backend.copy(made, decode(backend.host(array), backend.host(units)))
    if backend.device is None:
        made.flags.writeable = False
    return made
