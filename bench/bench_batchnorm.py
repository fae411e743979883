"""BatchNorm forward and backward against the minimum of passes over memory, torch and plain NumPy."""

from __future__ import annotations

import math

import pytest

from fastopt.measure import compare_batchnorm

SHAPES = {
    "64x64x56x56": ((64, 64, 56, 56), 1),
    "128x16x32x32": ((128, 16, 32, 32), 1),
    "32x256x14x14": ((32, 256, 14, 14), 1),
    "32x512x7x7": ((32, 512, 7, 7), 1),
    "256x1024": ((256, 1024), 1),
    "64x56x56x64 channels last": ((64, 56, 56, 64), -1),
}
MOST_OF_NUMPY = 4_000_000
CASES = [(way, name) for name in SHAPES for way in ("forward", "backward")]
CASES += [("inference", "64x64x56x56"), ("inference", "32x256x14x14")]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_batchnorm(measure, way, name):
    shape, axis = SHAPES[name]
    small = math.prod(shape) <= MOST_OF_NUMPY
    measure(
        compare_batchnorm,
        f"{way} {name}" if way != "inference" else f"inference + ReLU {name}",
        shape,
        axis=axis,
        way=way,
        rivals=("torch", "numpy") if small else ("torch",),
        left_out={} if small else {"numpy": "left out at this size: it would take seconds a call"},
        seconds=1.2,
        size=math.prod(shape),
    )
