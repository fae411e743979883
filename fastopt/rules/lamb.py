r"""LAMB (You et al. 2020, https://arxiv.org/abs/1904.00962, version 3, algorithm 2).

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    u = (m / bc1) / (sqrt(v / bc2) + eps) + weight_decay p
    p = p - lr norm(p) / norm(u) u      norms over each parameter tensor; the ratio is 1 where either norm is 0

States: m, in units of the gradient; v, of its square.
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
    scale: float
    eps: float
    weight_decay: float
    ratio: float  # filled in by the backend, from norms


def prepare(
    t: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, bias_correction: bool
) -> Hyper:
    b1, b2 = betas
    bc1, bc2 = (1.0 - b1**t, 1.0 - b2**t) if bias_correction else (1.0, 1.0)
    root = math.sqrt(bc2)
    return Hyper(lr, b1, 1.0 - b1, b2, 1.0 - b2, root / bc1, root * eps, weight_decay, 1.0)


def moments(g, m, v, h):
    return h.b1 * m + h.one_minus_b1 * g, h.b2 * v + h.one_minus_b2 * g * g


def direction(p, m, v, h):
    return h.scale * m / (math.sqrt(v) + h.eps) + h.weight_decay * p


def parameter(p, g, m, v, h):
    return p


def proposed(p, g, m, v, h):
    m, v = moments(g, m, v, h)
    return direction(p, m, v, h)


def trust_ratio(sums, numbers, size, h):
    return sums.p / sums.u if sums.p > 0.0 and sums.u > 0.0 else 1.0


@rule(
    prepare,
    sums=Sums(settle=trust_ratio, results=("ratio",), norms={"p": parameter, "u": proposed}),
    nonnegative=("v",),
)
def lamb(p, g, m, v, h):
    m, v = moments(g, m, v, h)
    return p - h.lr * h.ratio * direction(p, m, v, h), m, v
