"""An optimizer that fastopt does not have, written from a paper: a scalar function, and its check in NumPy.

    python examples/own_rule.py

Aggregated momentum (Lucas et al. 2018, https://arxiv.org/abs/1804.00325) keeps three velocities with different
momentum and follows their mean: the fast ones damp the swings of the slow one. One sees (1) that the compiled kernel
has the bits of the same formula in NumPy, (2) the loss on a narrow valley after 300 steps, where momentum 0.99 alone
still swings, and (3) that schedules, clipping, weight decay and checkpoints work with it, as with any rule.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fastopt


class Hyper(NamedTuple):
    """What the rule reads. The kernel holds these numbers in the dtype of the parameters."""

    mu0: float
    mu1: float
    mu2: float
    share: float


def prepare(t: int, lr: float = 0.01, mu0: float = 0.0, mu1: float = 0.9, mu2: float = 0.99) -> Hyper:
    """Compute once per step, in float64, what does not depend on the element; t counts from 1."""
    return Hyper(mu0, mu1, mu2, lr / 3)


@fastopt.rule(prepare)
def aggregated(p, g, v0, v1, v2, h):  # type: ignore[no-untyped-def]
    """Update one parameter p by its gradient g; v0, v1 and v2 are states, which begin at 0."""
    v0 = h.mu0 * v0 + g
    v1 = h.mu1 * v1 + g
    v2 = h.mu2 * v2 + g
    return p - h.share * (v0 + v1 + v2), v0, v1, v2


CURVATURES = np.geomspace(1e-3, 1.0, 50)
"""Of the valley: a thousand times as steep across as along."""


def loss(p: np.ndarray) -> float:
    """Return the height over the valley's floor."""
    return float(0.5 * (CURVATURES * p * p).sum())


def check() -> None:
    """Compare the kernel with the formula in NumPy."""
    opt = fastopt.Optimizer({"w": np.ones(50)}, aggregated, lr=0.1)
    p, v = np.ones(50), np.zeros((3, 50))
    for t in range(1, 101):
        g = CURVATURES * p
        opt.step({"w": g})
        h = prepare(t, lr=0.1)
        for k, mu in enumerate((h.mu0, h.mu1, h.mu2)):
            v[k] = mu * v[k] + g
        p = p - h.share * (v[0] + v[1] + v[2])
    print("the bits of NumPy:", bool((opt.params["w"] == p).all()))


def compare() -> None:
    """Descend into the valley."""
    optimizers = {
        "momentum 0.9": fastopt.Momentum({"w": np.ones(50)}, lr=0.1, momentum=0.9),
        "momentum 0.99": fastopt.Momentum({"w": np.ones(50)}, lr=0.1, momentum=0.99),
        "aggregated": fastopt.Optimizer({"w": np.ones(50)}, aggregated, lr=0.1),
    }
    for name, opt in optimizers.items():
        for _ in range(300):
            opt.step({"w": CURVATURES * opt.params["w"]})
        print(f"{name:14} loss after 300 steps {loss(opt.params['w']):.1e}")


def resume() -> None:
    """Stop in the middle of a run and go on from a file."""
    options = {"lr": fastopt.schedules.cosine(0.1, 0.0, steps=100), "max_norm": 1.0, "weight_decay": 1e-4}
    whole, first, second = (fastopt.Optimizer({"w": np.ones(50)}, aggregated, **options) for _ in range(3))
    for _ in range(100):
        whole.step({"w": CURVATURES * whole.params["w"]})
    for _ in range(50):
        first.step({"w": CURVATURES * first.params["w"]})
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "run.safetensors")
        second.load(Path(folder) / "run.safetensors")
    for _ in range(50):
        second.step({"w": CURVATURES * second.params["w"]})
    print("resumed as if it had not stopped:", bool((second.params["w"] == whole.params["w"]).all()))


if __name__ == "__main__":
    check()
    compare()
    resume()
