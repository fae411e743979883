r"""StableAdamW (Wortsman et al. 2023, https://arxiv.org/abs/2304.13013, algorithm 2).

    b1_t = b1 (1 - b1^(t-1)) / (1 - b1^t)       likewise b2_t: the bias is corrected in the decay rates
    m = b1_t m + (1 - b1_t) g
    v = b2_t v + (1 - b2_t) g^2
    rms = sqrt(mean(g^2 / max(v, eps^2)))       over each parameter tensor: how far v lags behind
    lr_t = lr / max(1, rms)
    p = p - lr_t (m / (sqrt(v) + eps) + weight_decay p)

States: m, in units of the gradient, and v, of its square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.rule import Sums, rule


class Hyper(NamedTuple):
    lr: float
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    eps: float
    eps_squared: float
    weight_decay: float
    bound: float  # 1 / max(1, rms), filled in by the backend


def corrected(b, t):
    return b * (1.0 - b ** (t - 1)) / (1.0 - b**t)


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Hyper:
    b1, b2 = corrected(betas[0], t), corrected(betas[1], t)
    return Hyper(lr, b1, 1.0 - b1, b2, 1.0 - b2, eps, eps * eps, weight_decay, 1.0)


def second_moment(g, v, h):
    return h.b2 * v + h.one_minus_b2 * (g * g)


def excess(p, g, m, v, h):
    """How much larger the square of g is than its average."""
    new_v = second_moment(g, v, h)
    average = h.eps_squared if new_v < h.eps_squared else new_v  # in this form, so that a NaN stays one
    return g * g / average if average > 0.0 else new_v


def bounded(sums, numbers, size, h):
    mean = sums.excess / size
    return 1.0 if mean <= 1.0 else 1.0 / math.sqrt(mean)


@rule(prepare, sums=Sums({"excess": excess}, bounded, results=("bound",)), nonnegative=("v",))
def stable_adamw(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = second_moment(g, v, h)
    return p - h.lr * h.bound * (m / (math.sqrt(v) + h.eps) + h.weight_decay * p), m, v
