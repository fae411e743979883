r"""Adam-mini (Zhang et al. 2024, https://arxiv.org/abs/2406.16793, algorithm 1), a block being a parameter tensor.

    p = p - lr weight_decay p
    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) mean(g^2)               one number per parameter tensor
    p = p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

The loop around the rule applies the decay (``decoupled=True``). States: m, in units of the gradient; v, of its square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.rule import Sums, rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    root: float  # sqrt(1 - b2^t)
    eps: float
    step_size: float  # divided by the root of v by the backend


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float) -> Hyper:
    b1, b2 = betas
    return Hyper(b1, 1.0 - b1, b2, 1.0 - b2, math.sqrt(1.0 - b2**t), eps, lr / (1.0 - b1**t))


def square(p, g, m, h):
    return g * g


def divided(sums, numbers, size, h):
    v = h.b2 * numbers.v + h.one_minus_b2 * sums.square / size
    divisor = math.sqrt(v) / h.root + h.eps
    return h.step_size / divisor if divisor != 0.0 else h.step_size, v


@rule(prepare, decoupled=True, sums=Sums({"square": square}, divided, results=("step_size",), numbers=("v",)))
def adam_mini(p, g, m, h):
    m = h.b1 * m + h.one_minus_b1 * g
    return p - h.step_size * m, m
