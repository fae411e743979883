r"""AdaBelief (Zhuang et al. 2020, https://arxiv.org/abs/2010.07468, algorithm 2).

    p = p - lr weight_decay p
    m = b1 m + (1 - b1) g
    s = b2 s + (1 - b2) (g - m)^2 + eps
    p = p - lr (m / bc1) / (sqrt(s / bc2) + eps)      bc1 = 1 - b1^t, bc2 = 1 - b2^t

States: m, in units of the gradient; s, of its square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.rule import rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    step_size: float
    eps_in: float
    eps_out: float


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float) -> Hyper:
    b1, b2 = betas
    root = math.sqrt(1.0 - b2**t)
    return Hyper(b1, 1.0 - b1, b2, 1.0 - b2, lr * root / (1.0 - b1**t), eps, root * eps)


@rule(prepare, decoupled=True, nonnegative=("s",))
def adabelief(p, g, m, s, h):
    m = h.b1 * m + h.one_minus_b1 * g
    surprise = g - m
    s = h.b2 * s + h.one_minus_b2 * surprise * surprise + h.eps_in
    return p - h.step_size * m / (math.sqrt(s) + h.eps_out), m, s
