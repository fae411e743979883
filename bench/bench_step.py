"""One step of every optimizer, from 1,000 to 30 million parameters, against the memory limit and all rivals."""

from __future__ import annotations

from typing import Any

import pytest

import fastopt
from fastopt.measure import RIVALS, Work, compare_step

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_adam(measure, size, dtype):
    """Compare all rivals at every size."""
    work = Work("Adam", ((SIZES[size],),), dtype)
    measure(compare_step, title_of("Adam", size, dtype), work, seconds=3 * SECONDS[size], size=work.size)


OTHERS = [
    (name, size, dtype)
    for name in CASES
    for dtype, sizes in (("float32", ("1k", "100k", "1M", "4M", "30M")), ("float64", ("1k", "1M", "30M")))
    for size in sizes
    if name != "Adam" and (name != "Muon" or size in MATRICES)
]


@pytest.mark.parametrize(("name", "size", "dtype"), OTHERS)
def test_other(measure, name, size, dtype):
    """Compare all rivals up to 1M; above, only the limit and torch's fused kernels."""
    optimizer, options = CASES[name]
    work = Work(optimizer, (MATRICES[size] if name == "Muon" else (SIZES[size],),), dtype, options)
    few = SIZES[size] > SIZES["1M"]
    measure(
        compare_step,
        title_of(name, size, dtype),
        work,
        FEW if few else tuple(RIVALS),
        seconds=SECONDS[size],
        size=work.size,
        limit=name != "Muon",  # Muon's time is that of its matrix products
        left_out=LEFT_OUT if few else {},
    )
