"""One step of every optimizer, from 1,000 to 30 million parameters, against the memory limit and all rivals."""

from __future__ import annotations

import math
from typing import Any

import pytest
from groups import Group, by_name, each_contestant, of_step

import fastopt
from fastopt.measure import RIVALS, Result, Work, compare_step

SIZES = {"1k": 1_000, "10k": 10_000, "100k": 100_000, "1M": 1_000_000, "4M": 4_000_000, "30M": 30_000_000}
SECONDS = {"1k": 0.2, "10k": 0.2, "100k": 0.2, "1M": 0.4, "4M": 0.3, "30M": 0.7}
DTYPES = ("float32", "float64")
FEW = ("torch fused",)
LEFT_OUT = dict.fromkeys(RIVALS.keys() - set(FEW), "left out at this size: Adam stands for all")
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in fastopt.Optimizer.classes}
CASES |= {"Adam amsgrad": ("Adam", {"amsgrad": True}), "RMSprop centered": ("RMSprop", {"centered": True})}
CASES |= {"Muon vectors": ("Muon", {})}
MATRICES = {"1k": (32, 32), "100k": (316, 316), "1M": (1000, 1000)}  # Muon orthogonalizes matrices


def title_of(name: str, size: str, dtype: str) -> str:
    return f"{name} {size}" + ("" if dtype == "float32" else f" {dtype}")


def group_of(name: str, size: str, dtype: str) -> Group:
    """Return the group of an optimizer: Adam with all rivals at every size, the others with few of them above 1M."""
    optimizer, options = CASES[name]
    shape = MATRICES[size] if name == "Muon" else (SIZES[size],)
    limit = name != "Muon"  # Muon's time is that of its matrix products
    few = name != "Adam" and SIZES[size] > SIZES["1M"]
    rivals, left_out = (FEW, LEFT_OUT) if few else (tuple(RIVALS), {})

    def run(title: str, **how: Any) -> Result:
        work = Work(optimizer, (shape,), dtype, options)  # a new one for each run, because it keeps its gradients
        return compare_step(title, work, rivals, limit=limit, left_out=left_out, **how)

    seconds = (3 if name == "Adam" else 1) * SECONDS[size]
    contestants = of_step(optimizer, rivals, limit)
    title = title_of(name, size, dtype)
    return Group(f"{name} {size} {dtype}", contestants, run, seconds, math.prod(shape), title)


GROUPS = by_name(
    [
        *(group_of("Adam", size, dtype) for size in SIZES for dtype in DTYPES),
        *(
            group_of(name, size, dtype)
            for name in CASES
            for dtype, sizes in (("float32", ("1k", "100k", "1M", "4M", "30M")), ("float64", ("1k", "1M", "30M")))
            for size in sizes
            if name != "Adam" and (name != "Muon" or size in MATRICES)
        ),
    ]
)


@pytest.mark.parametrize(**each_contestant(GROUPS))
def test_step(measure, group, contestant):
    measure(GROUPS[group], contestant)
