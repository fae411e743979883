"""Storage formats on a device: the CPU's bits, in numba's simulator, or on a GPU with ``--gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING

import fastopt
from fastopt.kernels.contract import CODES
from fastopt.kernels.cuda.target import SIMULATED

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZES = {"a": (1,), "b": (7,), "d": (33,), "W": (5, 8)}
LARGE = {"coded": (CODES + 1,), "plain": (20,)}
"""The first has codes, by `min_8bit_size`."""
ALL = {"states": "bfloat16", "rounding": "stochastic"}
WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("Adam", "float32", {"states": "bfloat16"}),
    ("Adam", "float32", {"states": "float16"}),
    ("Adam", "bfloat16", {}),
    ("Adam", "bfloat16", {"compensated": True}),
    ("Adam", "float16", {"master": False, "rounding": "stochastic", "states": "float16"}),
    ("AdamW", "bfloat16", ALL),
    ("AdamW", "bfloat16", {**ALL, "master": True}),
    ("SGD-lr=0.1", "bfloat16", {}),
    ("SGD-lr=0.1", "float16", {"master": False}),
    ("LAMB", "float32", {"states": {"m": "bfloat16"}}),
    ("LAMB", "bfloat16", {}),
    ("LAMB", "bfloat16", ALL),
]


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu", default=False):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")
    return


def tree(shapes: dict[str, tuple[int, ...]], dtype: Any, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def both(
    name: str, kind: str, options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Steps here and on the device, one of them with a missing gradient, the last with some added up: what they leave.

    By name, every parameter and state of the CPU and of the device.
    """
    dtype = BFLOAT16 if kind == "bfloat16" else np.dtype(kind)

    def made(backend: str) -> fastopt.Optimizer:
        flat = fastopt.pack(tree(shapes, dtype, 0), backend=backend)
        return BY_NAME[name].make(flat, **options)

    here, there = made("cpu"), made("cuda")
    backend = there._pipeline.backend
    for t in range(4):
        grads = tree(shapes, dtype, 10 + t)
        if t == 1:
            grads[next(iter(shapes))] = None
        on_device = {key: None if g is None else backend.upload(g) for key, g in grads.items()}
        if t == 3:
            for optimizer, given in ((here, grads), (there, on_device)):
                optimizer.accumulate(given)
                optimizer.accumulate(given, weight=0.5)
                optimizer.step()
        else:
            here.step(grads)
            there.step(on_device)
    for key in shapes:
        yield key, here.params[key], backend.host(there.params[key])
    for state, arrays in here.state.arrays.items():
        for path, mine, theirs in zip(here.flat.paths, arrays, there.state.arrays[state], strict=True):
            yield f"{state} of {path}", mine, backend.host(theirs)


def assert_same_bits(*args: Any) -> None:
    for what, mine, theirs in both(*args):
        assert theirs.dtype == mine.dtype
        assert theirs.tobytes() == mine.tobytes(), what


@pytest.mark.parametrize(("name", "dtype", "options"), WAYS, ids=str)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.filterwarnings("ignore:states", "ignore:parameters of")
def test_the_bits_are_those_of_the_cpu(name, dtype, options, everything):
    """Elementwise, and with sums over parameters, which read the states as well."""
    assert_same_bits(name, dtype, {**options, **(EVERYTHING if everything else {})}, SIZES)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"compensated": True, **EVERYTHING}),
        ("float16", {"rounding": "stochastic", **EVERYTHING}),
    ],
    ids=["master", "compensated-everything", "stochastic-everything"],
)
def test_rules_of_rows_and_columns_agree_with_the_cpu(dtype, options):
    """Their sums are added up in another order, so that now and then a number is rounded to its other neighbour."""
    apart = 0
    for what, mine, theirs in both("Adafactor-weight_decay=0.1", dtype, options, SIZES):
        ulp = {"float32": 1e-6, "float16": 2.0**-9, "bfloat16": 2.0**-6}.get(mine.dtype.name, 1e-12)
        mine, theirs = (array.astype(np.float64) for array in (mine, theirs))
        if not what.startswith("rest"):  # what is left of another rounding is another number
            np.testing.assert_allclose(theirs, mine, rtol=ulp, atol=1e-7, err_msg=what)
            apart += int(((theirs != mine) & (ulp > 1e-6)).sum())
    assert apart <= 4


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("Adam", "float32", {"states": "int8"}),
        ("Adam", "float32", {"states": {"m": "int8"}}),
        ("Adam", "float32", {"states": {"m": "bfloat16", "v": "int8"}, "rounding": "stochastic"}),
        ("AdamW", "bfloat16", {"states": "int8", "rounding": "stochastic"}),
        ("Momentum", "float16", {"states": "int8"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.filterwarnings("ignore:states", "ignore:parameters of")
def test_so_are_those_of_8_bits(name, dtype, options, everything):
    more = {"min_8bit_size": 100, **(EVERYTHING if everything else {})}
    assert_same_bits(name, dtype, {**options, **more}, LARGE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 1e-45], ids=str)
def test_blocks_of_numbers_without_codes_are_those_of_the_cpu(bad):
    found = []
    for place in ("cpu", "cuda"):
        flat = fastopt.pack({"w": np.ones(2 * CODES, np.float32)}, backend=place)
        opt = fastopt.Adam(flat, states="int8", min_8bit_size=100)
        grads = np.zeros(2 * CODES, np.float32)
        grads[3] = bad
        opt.step({"w": opt._pipeline.backend.upload(grads) if place == "cuda" else grads})
        host = opt._pipeline.backend.host
        found.append([np.asarray(host(array)).tobytes() for arrays in opt.state.arrays.values() for array in arrays])
    assert found[0] == found[1]
