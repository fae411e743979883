r"""MARS (Yuan et al. 2024, https://arxiv.org/abs/2411.10438, algorithm 2: MARS-AdamW, approximate).

    c = g + gamma b1 / (1 - b1) (g - prev_grad)         g at the first update
    c = c / max(1, norm(c))                             the norm of each parameter tensor
    p = p - lr weight_decay p
    then Adam, of c instead of g

The loop around the rule applies the decay (``decoupled=True``). States: m and v, of no unit; prev_grad, in units of the
gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO
from fastopt.rule import Sums, rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    step_size: float
    eps: float
    correction: float
    bound: float  # 1 / max(1, norm(c)), filled in by the backend


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float, gamma: float) -> Hyper:
    b1, b2 = betas
    root = math.sqrt(1.0 - b2**t)
    step_size = lr * root / (1.0 - b1**t)
    correction = 0.0 if t == 1 else gamma * b1 / (1.0 - b1)
    return Hyper(b1, 1.0 - b1, b2, 1.0 - b2, step_size, eps * root, correction, 1.0)


def corrected(g, prev_grad, h):
    return g + h.correction * (g - prev_grad)


def square(p, g, m, v, prev_grad, h):
    c = corrected(g, prev_grad, h)
    return c * c


def bounded(sums, numbers, size, h):
    return 1.0 if sums.square <= 1.0 else 1.0 / math.sqrt(sums.square)


@rule(
    prepare,
    decoupled=True,
    domains={"gamma": POSITIVE_OR_ZERO},
    sums=Sums({"square": square}, bounded, results=("bound",)),
    nonnegative=("v",),
)
def mars(p, g, m, v, prev_grad, h):
    c = h.bound * corrected(g, prev_grad, h)
    m = h.b1 * m + h.one_minus_b1 * c
    v = h.b2 * v + h.one_minus_b2 * c * c
    return p - h.step_size * m / (math.sqrt(v) + h.eps), m, v, g
