"""BatchNorm of images and of matrices against the minimum of passes over memory, torch and plain NumPy."""

from __future__ import annotations

import math
from functools import partial

import pytest
from groups import Group, by_name, each_contestant

from fastopt.measure import compare_batchnorm

DENSE = ((32, 64), (64, 128), (128, 256), (256, 512), (256, 1024), (1024, 1024), (4096, 256))
"""The matrices (N, C) between the layers of dense networks."""

SHAPES = {
    "64x64x56x56": ((64, 64, 56, 56), 1),
    "128x16x32x32": ((128, 16, 32, 32), 1),
    "32x256x14x14": ((32, 256, 14, 14), 1),
    "32x512x7x7": ((32, 512, 7, 7), 1),
    "64x56x56x64 channels last": ((64, 56, 56, 64), -1),
    **{"x".join(map(str, shape)): (shape, 1) for shape in DENSE},
}
MOST_OF_NUMPY = 4_000_000
CASES = [(way, name) for name in SHAPES for way in ("forward", "backward")]
CASES += [("inference", "64x64x56x56"), ("inference", "32x256x14x14")]


def group_of(way: str, name: str) -> Group:
    shape, axis = SHAPES[name]
    small = math.prod(shape) <= MOST_OF_NUMPY
    rivals = ("torch", "numpy") if small else ("torch",)
    left_out = {} if small else {"numpy": "left out at this size: it would take seconds a call"}
    run = partial(compare_batchnorm, shape=shape, axis=axis, way=way, rivals=rivals, left_out=left_out)
    title = f"{way} {name}" if way != "inference" else f"inference + ReLU {name}"
    seconds = 0.6 if len(shape) == 2 else 1.2
    return Group(f"BatchNorm {title}", ("fastopt", "limit", *rivals), run, seconds, math.prod(shape), title)


GROUPS = by_name(group_of(way, name) for way, name in CASES)


@pytest.mark.parametrize(**each_contestant(GROUPS))
def test_batchnorm(measure, group, contestant):
    measure(GROUPS[group], contestant)
