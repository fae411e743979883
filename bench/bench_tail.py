"""The tail of a step (unscale, clip by norm, AdamW, moving average, zero the gradients) against torch's sequence.

Run with ``pytest bench/bench_tail.py --benchmark-enable -s``. All of a line come from one interleaved run; gradients
are written anew before each sample, for every contestant, outside of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from interleaved import interleave

import fastopt
from fastopt.backends import get_backend

try:
    import torch
except ImportError:
    torch = None

SIZES = {"1k": 1_000, "100k": 100_000, "1M": 1_000_000, "30M": 30_000_000}
TENSORS = 20
SCALE, MAX_NORM, EMA, LR, DECAY = 1024.0, 1.0, 0.999, 1e-3, 0.01
LINES: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n\nmicroseconds per call; in brackets, how many times as long as the first\n" + "\n".join(LINES))


def compare(
    benchmark: Any,
    title: str,
    contestants: dict[str, Callable[[], object]],
    seconds: float,
    before: dict[str, Callable[[], object]] | None = None,
) -> None:
    times = interleave(contestants, seconds, before=before)
    ours = next(iter(times.values()))
    cells = [f"{name} {1e6 * t:10.1f} ({t / ours:6.2f}x)" for name, t in times.items()]
    LINES.append(f"{title:32s} " + "  ".join(cells))
    benchmark.extra_info.update({"title": title, "us": {name: 1e6 * t for name, t in times.items()}})
    benchmark.pedantic(next(iter(contestants.values())), rounds=3, iterations=1)


def torch_sequence(shapes: list[int], gradient: np.ndarray) -> tuple[Callable[[], object], Callable[[], object]]:
    """(the sequence, what writes the gradients)."""
    torch.set_num_threads(get_backend("cpu").driver.threads())
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(size)) for size in shapes])
    params = list(model.parameters())
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA))
    pieces = torch.from_numpy(gradient).split(shapes)

    def write() -> None:
        for param, piece in zip(params, pieces, strict=True):
            param.grad.copy_(piece)

    def step() -> None:
        torch._foreach_mul_([param.grad for param in params], 1.0 / SCALE)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        average.update_parameters(model)
        optimizer.zero_grad(set_to_none=False)

    return step, write


@pytest.mark.parametrize("size", SIZES)
def test_tail(benchmark, size):
    shapes = [SIZES[size] // TENSORS] * TENSORS
    gradient = np.random.default_rng(0).standard_normal(SIZES[size], np.float32)

    def made(**options: Any) -> tuple[fastopt.Optimizer, Callable[[], object]]:
        params = {f"w{k}": np.ones(n, np.float32) for k, n in enumerate(shapes)}
        optimizer = fastopt.AdamW(params, lr=LR, weight_decay=DECAY, **options)
        views = optimizer.flat.views(optimizer.flat.grad)
        pieces = np.split(gradient, TENSORS)

        def write() -> None:
            for view, piece in zip(views, pieces, strict=True):
                view[...] = piece

        return optimizer, write

    whole, write_whole = made(max_norm=MAX_NORM, ema=EMA, zero_grad=True)
    one_pass, write_one = made(ema=EMA, zero_grad=True)
    plain, write_plain = made()
    contestants: dict[str, Callable[[], object]] = {
        "fastopt": lambda: whole.step(grad_scale=SCALE),
        "no clipping": lambda: one_pass.step(grad_scale=SCALE),
        "plain step": lambda: plain.step(),
    }
    before = {"fastopt": write_whole, "no clipping": write_one, "plain step": write_plain}
    if torch:
        contestants["torch"], before["torch"] = torch_sequence(shapes, gradient)
    title = f"tail {size}" + ("" if torch else " (torch not installed)")
    compare(benchmark, title, contestants, 3.0 if size == "30M" else 1.0, before)


@pytest.mark.parametrize("size", SIZES)
def test_accumulate(benchmark, size):
    n = SIZES[size]
    optimizer = fastopt.AdamW({"w": np.ones(n, np.float32)}, max_norm=MAX_NORM)
    plain = fastopt.AdamW({"w": np.ones(n, np.float32)})
    gradient = np.random.default_rng(0).standard_normal(n, np.float32)
    theirs = np.zeros(n, np.float32)
    optimizer.accumulate({"w": gradient})
    plain.accumulate({"w": gradient})
    compare(
        benchmark,
        f"accumulate {size}",
        {
            "fastopt, measured": lambda: optimizer.accumulate({"w": gradient}, 0.5),
            "not measured": lambda: plain.accumulate({"w": gradient}, 0.5),
            "numpy": lambda: np.add(theirs, 0.5 * gradient, out=theirs),
        },
        1.0,
    )


@pytest.mark.parametrize("share", [0.01, 0.001])
def test_rows(benchmark, share):
    """Adam on (1,000,000, 64), a share of whose rows has a gradient: row-wise against dense steps."""
    rows, columns = 1_000_000, 64
    rng = np.random.default_rng(0)
    params = {"embedding": rng.standard_normal((rows, columns), np.float32)}
    dense, rowwise = fastopt.Adam(params), fastopt.Adam(params)
    for optimizer in (dense, rowwise):
        optimizer.grads["embedding"][...] = params["embedding"]
        optimizer.step()
        optimizer._step_count = 2000  # far from the first steps, in which Adam makes missed steps one by one
    count = int(share * rows)
    batches = [rng.choice(rows, count, replace=False) for _ in range(256)]
    grads = rng.standard_normal((count, columns), np.float32)
    turn = iter(range(10**9))

    def step_rows() -> None:
        rowwise.step_rows({"embedding": (batches[next(turn) % len(batches)], grads)})

    for _ in range(200):  # the ages of the rows are then mixed
        step_rows()
    contestants: dict[str, Callable[[], object]] = {"step_rows": step_rows, "dense step": dense.step}
    compare(benchmark, f"{share:.1%} of 1,000,000 rows of 64", contestants, 3.0)
