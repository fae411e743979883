"""BatchNorm forward and backward against a copy, a kernel that reads two arrays and writes one, torch and NumPy.

Run with ``pytest bench/bench_batchnorm.py --benchmark-enable -s``. The table at the end, and ``extra_info`` of the
JSON, hold microseconds per call and ratios; all of a line come from one interleaved run. The number of threads is
numba's (NUMBA_NUM_THREADS), and torch is given the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from interleaved import interleave

from fastopt.backends import get_backend
from fastopt.batchnorm import batchnorm_backward, batchnorm_forward

try:
    import torch
except ImportError:
    torch = None

SHAPES = {
    "64x64x56x56": ((64, 64, 56, 56), 1),
    "128x16x32x32": ((128, 16, 32, 32), 1),
    "32x256x14x14": ((32, 256, 14, 14), 1),
    "32x512x7x7": ((32, 512, 7, 7), 1),
    "256x1024": ((256, 1024), 1),
    "64x56x56x64 channels last": ((64, 56, 56, 64), -1),
}
CHUNK = 32_768
CALLS = 4
LINES: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    threads = get_backend("cpu").driver.threads()
    print(f"\n\nmicroseconds per call, {threads} threads; in brackets, how many times as long as fastopt")
    print("\n".join(LINES))


@numba.njit(parallel=True, error_model="numpy")
def copy(x, out):
    for c in numba.prange((x.size + CHUNK - 1) // CHUNK):
        a = x[c * CHUNK : (c + 1) * CHUNK]
        o = out[c * CHUNK : (c + 1) * CHUNK]
        for i in range(o.size):
            o[i] = a[i]


@numba.njit(parallel=True, error_model="numpy")
def two_reads(x, y, out):
    for c in numba.prange((x.size + CHUNK - 1) // CHUNK):
        a = x[c * CHUNK : (c + 1) * CHUNK]
        b = y[c * CHUNK : (c + 1) * CHUNK]
        o = out[c * CHUNK : (c + 1) * CHUNK]
        for i in range(o.size):
            o[i] = a[i] + b[i]


def compare(benchmark: Any, title: str, contestants: dict[str, Callable[[], object] | None]) -> None:
    present = {name: call for name, call in contestants.items() if call is not None}
    # Several calls in a row each: what the others left in the cache is nobody's merit.
    turns = {name: (lambda call=call: [call() for _ in range(CALLS)]) for name, call in present.items()}
    times = {name: seconds / CALLS for name, seconds in interleave(turns, 2.0).items()}
    ours = times["fastopt"]
    cells = [f"{name} {1e6 * t:9.1f} ({t / ours:5.2f}x)" for name, t in times.items()]
    LINES.append(f"{title:38s} " + "  ".join(cells) + ("" if torch else "  torch not installed"))
    benchmark.extra_info.update({"title": title, "us": {name: 1e6 * t for name, t in times.items()}})
    benchmark.pedantic(present["fastopt"], rounds=3, iterations=1)


def data(shape: tuple[int, ...], axis: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    channels = shape[axis]
    return {
        "x": rng.standard_normal(shape, np.float32),
        "dy": rng.standard_normal(shape, np.float32),
        "out": np.zeros(shape, np.float32),
        "gamma": rng.standard_normal(channels, np.float32),
        "beta": rng.standard_normal(channels, np.float32),
        "mean": np.zeros(channels, np.float32),
        "var": np.ones(channels, np.float32),
    }


def torch_layer(d: dict[str, np.ndarray], axis: int, *, relu: bool = False) -> tuple[Any, Any, Any]:
    """(forward, backward, y) of torch on the same memory layout."""
    torch.set_num_threads(get_backend("cpu").driver.threads())
    x = torch.from_numpy(d["x"].copy())
    dy = torch.from_numpy(d["dy"].copy())
    if axis == -1:  # the same bytes, seen as (N, C, H, W) in torch's channels_last format
        x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
    gamma, beta = (torch.from_numpy(d[name].copy()) for name in ("gamma", "beta"))
    mean, var = (torch.from_numpy(d[name].copy()) for name in ("mean", "var"))
    norm = torch.nn.functional.batch_norm

    def forward() -> Any:
        with torch.no_grad():
            y = norm(x, mean, var, gamma, beta, True, 0.1, 1e-5)
            return torch.relu_(y) if relu else y

    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    gamma.requires_grad_()
    beta.requires_grad_()
    y = norm(leaf, mean, var, gamma, beta, True, 0.1, 1e-5)
    if relu:
        y = torch.relu(y)

    def backward() -> Any:
        return torch.autograd.grad(y, (leaf, gamma, beta), dy, retain_graph=True)

    return forward, backward, y


def numpy_forward(d: dict[str, np.ndarray], axis: int) -> Callable[[], object]:
    x = d["x"]
    axes = tuple(k for k in range(x.ndim) if k != axis % x.ndim)
    along = [1] * x.ndim
    along[axis] = x.shape[axis]
    gamma, beta = d["gamma"].reshape(along), d["beta"].reshape(along)

    def forward() -> np.ndarray:
        mean = x.mean(axes, keepdims=True)
        return (x - mean) / np.sqrt(x.var(axes, keepdims=True) + np.float32(1e-5)) * gamma + beta

    return forward


@pytest.mark.parametrize("name", SHAPES)
def test_forward(benchmark, name):
    shape, axis = SHAPES[name]
    d = data(shape, axis)
    arguments = (d["x"], d["gamma"], d["beta"], d["mean"], d["var"])
    flat, out = d["x"].reshape(-1), np.zeros(d["x"].size, np.float32)
    compare(
        benchmark,
        f"forward {name}",
        {
            "fastopt": lambda: batchnorm_forward(*arguments, axis=axis, out=d["out"]),
            "copy": lambda: copy(flat, out),
            "torch": torch_layer(d, axis)[0] if torch else None,
            "numpy": numpy_forward(d, axis) if flat.size < 4_000_000 else None,
        },
    )


@pytest.mark.parametrize("name", SHAPES)
def test_backward(benchmark, name):
    shape, axis = SHAPES[name]
    d = data(shape, axis)
    _, saved = batchnorm_forward(d["x"], d["gamma"], d["beta"], axis=axis, out=d["out"])
    flat, dy, out = d["x"].reshape(-1), d["dy"].reshape(-1), np.zeros(d["x"].size, np.float32)
    x = saved._x

    def backward() -> object:
        saved.used, saved._x = False, x  # the forward pass is not part of what is timed
        return batchnorm_backward(d["dy"], saved, out=d["out"])

    compare(
        benchmark,
        f"backward {name}",
        {
            "fastopt": backward,
            "two reads": lambda: two_reads(flat, dy, out),
            "torch": torch_layer(d, axis)[1] if torch else None,
        },
    )


@pytest.mark.parametrize("name", ["64x64x56x56", "32x256x14x14"])
def test_inference_with_relu(benchmark, name):
    shape, axis = SHAPES[name]
    d = data(shape, axis)
    arguments = (d["x"], d["gamma"], d["beta"], d["mean"], d["var"])
    flat, out = d["x"].reshape(-1), np.zeros(d["x"].size, np.float32)
    theirs = None
    if torch:
        torch.set_num_threads(get_backend("cpu").driver.threads())
        x, *parameters = (torch.from_numpy(d[key]) for key in ("x", "mean", "var", "gamma", "beta"))

        def theirs() -> Any:
            with torch.no_grad():
                return torch.relu_(torch.nn.functional.batch_norm(x, *parameters, False))

    compare(
        benchmark,
        f"inference + ReLU {name}",
        {
            "fastopt": lambda: batchnorm_forward(
                *arguments, training=False, activation="relu", axis=axis, out=d["out"]
            ),
            "copy": lambda: copy(flat, out),
            "torch": theirs,
        },
    )
