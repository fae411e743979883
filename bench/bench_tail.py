"""A step with all options (unscale, clip by norm, AdamW, moving average, zero the gradients) against torch's sequence.

Before each sample every contestant rewrites its gradients, outside the timed part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from groups import Group, by_name, each_contestant
from tail import DECAY, EMA, LR, MAX_NORM, SCALE, torch_sequence

import fastopt
from fastopt.measure import Result, compare

try:
    import torch
except ImportError:
    torch = None

SIZES = {"1k": 1_000, "100k": 100_000, "1M": 1_000_000, "30M": 30_000_000}
TENSORS = 20
MISSING = {} if torch else {"torch": "torch is not installed"}


class Tail(NamedTuple):
    """A contestant that makes the whole step."""

    step: Callable[[], object]
    write: Callable[[], object]
    """Write the gradients to where the step reads them."""
    params: Callable[[], list[np.ndarray]]


def ours(gradient: np.ndarray, **options: Any) -> Tail:
    pieces = np.split(gradient, TENSORS)
    params = [np.ones(len(piece), np.float32) for piece in pieces]
    optimizer = fastopt.AdamW(params, lr=LR, weight_decay=DECAY, **options)
    views = optimizer.flat.views(optimizer.flat.grad)

    def write() -> None:
        for view, piece in zip(views, pieces, strict=True):
            view[...] = piece

    write()
    scale = SCALE if options else 1.0
    return Tail(lambda: optimizer.step(grad_scale=scale), write, lambda: optimizer.params)


def torchs(gradient: np.ndarray) -> Tail:
    torch.set_num_threads(fastopt.get_num_threads())
    step, write, params = torch_sequence(torch, torch.from_numpy(gradient).split(len(gradient) // TENSORS))
    write()
    return Tail(step, write, lambda: [param.numpy() for param in params])


def whole_step(size: str) -> Group:
    n = SIZES[size]

    def run(title: str, **how: Any) -> Result:
        gradient = np.random.default_rng(0).standard_normal(n, np.float32)
        tails = {
            "fastopt": ours(gradient, max_norm=MAX_NORM, ema=EMA, zero_grad=True),
            "no clipping": ours(gradient, ema=EMA, zero_grad=True),
            "plain step": ours(gradient),
        }
        if torch:
            tails["torch"] = torchs(gradient)
        steps, writes = ({name: getattr(tail, what) for name, tail in tails.items()} for what in ("step", "write"))
        return compare(title, steps, before=writes, absent=MISSING, parameters=n, **how)

    contestants = ("fastopt", "no clipping", "plain step", "torch")
    heading = f"unscale, clip, AdamW, EMA, zero_grad {size}"
    return Group(heading, contestants, run, 2.0 if size == "30M" else 1.0, n, f"tail {size}")


def accumulation(size: str) -> Group:
    n = SIZES[size]

    def run(title: str, **how: Any) -> Result:
        optimizer = fastopt.AdamW({"w": np.ones(n, np.float32)}, max_norm=MAX_NORM)
        plain = fastopt.AdamW({"w": np.ones(n, np.float32)})
        gradient = np.random.default_rng(0).standard_normal(n, np.float32)
        theirs = np.zeros(n, np.float32)
        optimizer.accumulate({"w": gradient})
        plain.accumulate({"w": gradient})
        contestants = {
            "fastopt": lambda: optimizer.accumulate({"w": gradient}, 0.5),
            "not measured": lambda: plain.accumulate({"w": gradient}, 0.5),
            "numpy": lambda: np.add(theirs, 0.5 * gradient, out=theirs),
        }
        return compare(title, contestants, parameters=n, **how)

    return Group(f"accumulate {size}", ("fastopt", "not measured", "numpy"), run, 0.7, n)


def of_rows(share: float, rows: int = 1_000_000) -> Group:
    """Return row-wise and dense steps of Adam on (rows, 64), where a share of the rows has a gradient."""
    columns = 64

    def run(title: str, **how: Any) -> Result:
        rng = np.random.default_rng(0)
        params = {"embedding": rng.standard_normal((rows, columns), np.float32)}
        dense, rowwise = fastopt.Adam(params), fastopt.Adam(params)
        for optimizer in (dense, rowwise):
            optimizer.grads["embedding"][...] = params["embedding"]
            optimizer.step()
            # Far from the first steps, where Adam makes missed steps one at a time.
            optimizer.load_state_dict({**optimizer.state_dict(), "step": 2000})
        count = int(share * rows)
        batches = [rng.choice(rows, count, replace=False) for _ in range(256)]
        grads = rng.standard_normal((count, columns), np.float32)
        turn = iter(range(10**9))

        def step_rows() -> None:
            rowwise.step_rows({"embedding": (batches[next(turn) % len(batches)], grads)})

        for _ in range(200):  # mix the ages of the rows
            step_rows()
        return compare(title, {"fastopt": step_rows, "dense step": dense.step}, **how)

    title = f"{share:.1%} of {rows:,} rows of 64"
    return Group(f"Adam on {title}", ("fastopt", "dense step"), run, 2.0, rows * columns, title)


TAILS = by_name(whole_step(size) for size in SIZES)
ACCUMULATIONS = by_name(accumulation(size) for size in SIZES)
ROWS = by_name(of_rows(share) for share in (0.01, 0.001))


@pytest.mark.parametrize(**each_contestant(TAILS))
def test_tail(measure, group, contestant):
    measure(TAILS[group], contestant)


@pytest.mark.parametrize(**each_contestant(ACCUMULATIONS))
def test_accumulate(measure, group, contestant):
    measure(ACCUMULATIONS[group], contestant)


@pytest.mark.parametrize(**each_contestant(ROWS))
def test_rows(measure, group, contestant):
    measure(ROWS[group], contestant)
