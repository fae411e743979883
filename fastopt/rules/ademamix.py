r"""AdEMAMix (Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137, algorithm 1).

    p = p - lr weight_decay p
    m1 = b1 m1 + (1 - b1) g
    m2 = b3 m2 + (1 - b3) g
    v  = b2 v + (1 - b2) g^2
    p = p - lr (m1 / bc1 + alpha m2) / (sqrt(v / bc2) + eps)      bc1 = 1 - b1^t, bc2 = 1 - b2^t

In the first T = ``warmup_steps`` steps alpha is t/T of its final value, and b3 grows from b1 so that the half-life of
m2 grows linearly: b3_t = exp(ln b1 ln b3 / ((1 - t/T) ln b3 + t/T ln b1)). States: m1 and m2, in units of the gradient;
v, of its square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO, Interval
from fastopt.rule import rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    b3: float
    one_minus_b3: float
    fast: float
    slow: float
    eps: float


def prepare(
    t: int, lr: float, betas: tuple[float, float, float], alpha: float, eps: float, warmup_steps: float
) -> Hyper:
    b1, b2, b3 = betas
    if t < warmup_steps:
        alpha, b3 = alpha * (t / warmup_steps), warmed_up(t / warmup_steps, b1, b3)
    root = math.sqrt(1.0 - b2**t)
    return Hyper(b1, 1.0 - b1, b2, 1.0 - b2, b3, 1.0 - b3, lr * root / (1.0 - b1**t), lr * root * alpha, root * eps)


DOMAINS = {
    "betas": Interval(0.0, 1.0, open=True, length=3),
    "alpha": POSITIVE_OR_ZERO,
    "warmup_steps": POSITIVE_OR_ZERO,
}


@rule(prepare, decoupled=True, domains=DOMAINS, nonnegative=("v",))
def ademamix(p, g, m1, m2, v, h):
    m1 = h.b1 * m1 + h.one_minus_b1 * g
    m2 = h.b3 * m2 + h.one_minus_b3 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - (h.fast * m1 + h.slow * m2) / (math.sqrt(v) + h.eps), m1, m2, v


def warmed_up(done: float, b1: float, b3: float) -> float:
    """b3_t, where `done` is t/T."""
    if not 0.0 < b1 < b3:
        return b3
    log_b1, log_b3 = math.log(b1), math.log(b3)
    return min(math.exp(log_b1 * log_b3 / ((1.0 - done) * log_b3 + done * log_b1)), b3)
