"""Storage formats, decoded and rounded in registers of compiled CUDA kernels, run on the CPU: the CPU's bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import BY_NAME
from test_emulated_updates import assert_same, stepped

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
ALL = {"rounding": "stochastic", "states": "bfloat16"}
WAYS: list[tuple[str, Any, dict[str, Any]]] = [
    ("Adam", np.float32, {"states": "bfloat16"}),
    ("Adam", np.float32, {"states": "float16"}),
    ("AdamW", BFLOAT16, {"max_norm": 0.5, "ema": 0.9}),
    ("AdamW", BFLOAT16, {**ALL, "zero_grad": True}),
    ("AdamW", FLOAT16, {"rounding": "stochastic"}),
    ("SGD-lr=0.1", BFLOAT16, {"compensated": True}),
    ("LAMB", BFLOAT16, {}),
    ("Adafactor-weight_decay=0.1", BFLOAT16, {"rounding": "stochastic"}),
]


@pytest.mark.parametrize(("name", "dtype", "options"), WAYS, ids=str)
@pytest.mark.filterwarnings("ignore:states", "ignore:parameters of")
def test_numbers_of_16_bits_have_the_bits_of_the_cpu(name, dtype, options, backend):
    backend.contracted = False
    found, expected = (stepped(BY_NAME[name], place, dtype, **options) for place in (backend, "cpu"))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (np.float32, {"states": "int8"}),
        (BFLOAT16, {"states": {"m": "int8", "v": "bfloat16"}, "rounding": "stochastic", "zero_grad": True}),
        (BFLOAT16, {"states": "int8", "rounding": "stochastic", "ema": 0.9}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:states")
def test_codes_of_8_bits_have_the_bits_of_the_cpu(dtype, options, backend):
    """In parameters of 4,097 and of 9,001 elements; the others are too small for codes."""
    backend.contracted = False
    found, expected = (stepped(BY_NAME["AdamW"], place, dtype, **options) for place in (backend, "cpu"))
    assert_same(found, expected)
