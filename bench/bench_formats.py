"""One step of AdamW with parameters, gradients and states in 16 and 8 bits, beside float32 and what torch does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from groups import Group, by_name, each_contestant

import fastopt
from fastopt.measure import Result, compare

CASES = {"1M": 2**20, "30M": 30_000_000}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fastopt": ("float32", {}),
    "bfloat16 states": ("float32", {"states": "bfloat16"}),
    "float16 states": ("float32", {"states": "float16"}),
    "8-bit states": ("float32", {"states": "int8"}),
    "bfloat16, master": ("bfloat16", {}),
    "bfloat16, stochastic": ("bfloat16", {"states": "bfloat16", "rounding": "stochastic"}),
    "bfloat16, compensated": ("bfloat16", {"states": "bfloat16", "compensated": True}),
    "bfloat16, 8-bit states": ("bfloat16", {"states": "int8", "rounding": "stochastic"}),
}
"""The dtype of parameters and gradients, and the arguments of the optimizer; `fastopt` is all in float32."""
TORCH = "torch foreach bfloat16"


def step_of(size: int, dtype: str, options: dict[str, Any]) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    flat = fastopt.pack({"w": rng.standard_normal(size, dtype=np.float32)}, dtype=dtype)
    opt = fastopt.AdamW(flat, lr=1e-3, **options)
    grads = {"w": rng.standard_normal(size, dtype=np.float32).astype(flat.dtype)}
    return lambda: opt.step(grads)


def of_torch(size: int) -> Callable[[], Any]:
    torch = import_module("torch")
    torch.set_num_threads(fastopt.get_num_threads())
    w = torch.nn.Parameter(torch.randn(size).to(torch.bfloat16))
    w.grad = torch.randn(size).to(torch.bfloat16)
    return torch.optim.AdamW([w], lr=1e-3, foreach=True).step  # type: ignore[no-any-return]


def group_of(name: str) -> Group:
    size = CASES[name]

    def run(title: str, **how: Any) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contestants = {way: step_of(size, *of_way) for way, of_way in WAYS.items()}
        absent = {}
        if find_spec("torch") is None:
            absent[TORCH] = "torch is not installed"
        else:
            contestants[TORCH] = of_torch(size)
        return compare(title, contestants, absent=absent, parameters=size, states=2, dtype="float32", **how)

    return Group(f"AdamW, formats, {name}", (*WAYS, TORCH), run, 1.0 if size < 2**21 else 10.0, size)


GROUPS = by_name(group_of(name) for name in CASES)


@pytest.mark.parametrize(**each_contestant(GROUPS))
def test_formats(measure, group, contestant):
    measure(GROUPS[group], contestant)
