"""Storage formats as dtypes of NumPy: what users pass and receive, and what kernels read."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt import scalars
from fastopt.kernels.contract import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, STORED

FORMATS = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)
"""Those of parameters and gradients."""
HALF = (BFLOAT16, FLOAT16)
"""Those of 16 bits."""


def dtype_of(name: str, what: str) -> np.dtype[Any]:
    """The dtype of arrays of a format.

    Args:
        name: one of `FORMATS`.
        what: what asks for it, for the error.

    Raises:
        TypeError: bfloat16 needs the package ml_dtypes, which is not installed.

    >>> dtype_of("float16", "dtype")
    dtype('float16')
    """
    if name != BFLOAT16:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{what}: must be float32, float64 or float16 where ml_dtypes is not installed, got 'bfloat16'; "
            f"pip install 'fastopt[formats]'"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def format_of(dtype: Any) -> str | None:
    """The format of arrays of a dtype; None for a dtype that no parameter can have.

    >>> import numpy as np
    >>> format_of(np.dtype("float16")), format_of(np.dtype("int64")), format_of(np.dtype(">f4"))
    ('float16', None, None)
    """
    name = scalars.dtype_name(dtype)
    return name if name in FORMATS else None


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which numbers of a dtype are computed: float32 for those of 16 bits, otherwise itself.

    >>> import numpy as np
    >>> compute_dtype(np.dtype("float16")), compute_dtype(np.dtype("float64"))
    (dtype('float32'), dtype('float64'))
    """
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def as_stored(array: np.ndarray) -> np.ndarray:
    """The same memory as kernels are given it: bits, where numbers have 16 of them.

    >>> import numpy as np
    >>> as_stored(np.ones(2, np.float16))
    array([15360, 15360], dtype=uint16)
    """
    return array.view(STORED[BFLOAT16]) if array.dtype.itemsize == 2 else array
