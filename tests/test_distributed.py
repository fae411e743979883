"""Several ranks make the steps of one process, to the bit; where one cannot, all raise, and nothing is changed.

A check is a function of a communicator. Threads run each as a test of its own; MPI and gloo run them all in one launch.
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, OF_EACH_KIND, PER_RULE, WRAPPED, Case
from ranks import LACKING, launch

import fastopt
from fastopt.communicators import communicator_of, run_threads
from fastopt.distributed import CommunicatorError

KINDS = tuple(case for case in OF_EACH_KIND if case.optimizer != "Sophia")
ALL = {str(case): case for case in (*PER_RULE, *WRAPPED)}
EVERYTHING: dict[str, Any] = {"max_norm": 0.5, "clip_value": 0.5, "nonfinite": "zero", "ema": 0.9, "maximize": True}


def tree(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Parameters of which a boundary cuts some, among them one that is 0-d and one that is empty."""
    rng = np.random.default_rng(0)
    shapes = {"a": (300, 37), "b": (97,), "c": (5, 2, 3), "s": (), "empty": (0, 3), "w": (131, 97)}
    return {name: np.asarray(rng.normal(size=shape), dtype=dtype) for name, shape in shapes.items()}


def gradients(step: int, rank: int, params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The gradients of a rank: of all magnitudes; some are None on one rank, some on all."""
    rng = np.random.default_rng((step, rank))
    scale = 10.0 ** rng.integers(-4, 3)
    found: dict[str, Any] = {
        name: np.asarray(scale * rng.normal(size=array.shape), dtype=array.dtype) for name, array in params.items()
    }
    if step % 2:
        found["b"][:5] = -0.0
    if step % 3 == 1 and rank == 0:
        found["w"] = None
    if step % 3 == 2:
        found["b"] = None
    return found


def alone(case: Case, size: int, steps: int, **options: Any) -> fastopt.Optimizer:
    """One process that accumulates the gradients of all ranks."""
    opt = case.make(tree(), **options)
    for step in range(steps):
        for rank in range(size):
            opt.accumulate(gradients(step, rank, opt.params))
        opt.step()
    return opt


def together(world: Any, case: Case, steps: int, **options: Any) -> fastopt.Optimizer:
    """The same by ranks."""
    opt = case.make(tree(), comm=world, **options)
    for step in range(steps):
        opt.step(gradients(step, world.rank, opt.params))
    return opt


def content(opt: fastopt.Optimizer) -> dict[str, bytes]:
    """All bits of an optimizer, by name."""
    found = {f"p/{path}": array.tobytes() for path, array in zip(opt.flat.paths, opt.flat.arrays, strict=True)}
    state = opt.state_dict()
    for name, arrays in {**state["state"], "ema": state["ema"] or {}}.items():
        found.update({f"{name}/{path}": array.tobytes() for path, array in arrays.items()})
    return found | {"step": str(state["step"]).encode(), "missed": repr(state["missed"]).encode()}


def assert_same(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    assert [name for name in expected if found.get(name) != expected[name]] == []
    assert found.keys() == expected.keys()


def order_of(world: Any) -> str:
    """The order in which ranks add up as one process does: two numbers have one sum, in whatever order."""
    return "engine" if world.size <= 2 else "fixed"


SHARDS = (False,)


# --- checks: what each rank runs --------------------------------------------------------------------------------------


def check_rules(world: Any) -> None:
    for case in ALL.values():
        for shard in SHARDS:
            check_rule(world, case, shard)


def check_rule(world: Any, case: Case, shard: bool, **options: Any) -> None:
    expected = content(alone(case, world.size, 4, **options))
    found = content(together(world, case, 4, shard=shard, order=order_of(world), **options))
    assert_same(found, expected)


def check_flags(world: Any) -> None:
    for case in KINDS:
        for shard in SHARDS:
            check_rule(world, case, shard, **EVERYTHING)
    for options in (
        {"max_norm": 0.5, "nonfinite": "skip"},
        {"clip_norm_per_tensor": 0.1},
        {"grad_norm": True, "overrides": {"b": {"lr": 0.02}, "w": {"frozen": True}}},
        {"lr": fastopt.schedules.cosine(0.1, 0.0, steps=10), "overrides": {"a": {"lr_scale": 0.5}}},
    ):
        for shard in SHARDS:
            check_rule(world, BY_NAME["Adam"], shard, **options)
            check_rule(world, BY_NAME["LAMB"], shard, **options)


def check_the_order_of_the_engine(world: Any) -> None:
    case = BY_NAME["Adam"]
    expected = alone(case, world.size, 100, max_norm=1.0)
    for shard in SHARDS:
        opt = together(world, case, 100, max_norm=1.0, shard=shard)
        for own, array in zip(opt.flat.arrays, expected.flat.arrays, strict=True):
            np.testing.assert_allclose(own, array, rtol=1e-3, atol=1e-4)
        crc = zlib.crc32(b"".join(content(opt).values()))
        found = np.zeros(world.size, np.int64)
        communicator_of(world).allgather(np.array([crc]), found)
        assert set(found.tolist()) == {crc}


CHECKS = {name: thing for name, thing in globals().items() if name.startswith("check_") and name != "check_rule"}
