r"""LARS (You, Gitman & Ginsburg 2017, https://arxiv.org/abs/1708.03888, algorithm 1).

    ratio = trust_coefficient norm(p) / (norm(g) + weight_decay norm(p) + eps)      1 where norm(p) or norm(g) is 0
    d = lr ratio (g + weight_decay p)
    v = momentum v + d
    p = p - v                        with nesterov: p = p - (d + momentum v)

Norms over each parameter tensor. State: velocity (v), in units of the parameter.
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO, Flag
from fastopt.rule import Sums, rule


class Hyper(NamedTuple):
    lr: float
    momentum: float
    weight_decay: float
    trust_coefficient: float
    eps: float
    d_weight: float
    velocity_weight: float
    ratio: float  # filled in by the backend, from norms


def prepare(
    t: int, lr: float, momentum: float, trust_coefficient: float, eps: float, nesterov: bool, weight_decay: float
) -> Hyper:
    d_weight, velocity_weight = (1.0, momentum) if nesterov else (0.0, 1.0)
    return Hyper(lr, momentum, weight_decay, trust_coefficient, eps, d_weight, velocity_weight, 1.0)


def parameter(p, g, velocity, h):
    return p


def gradient(p, g, velocity, h):
    return g


def trust_ratio(sums, numbers, size, h):
    if sums.p > 0.0 and sums.g > 0.0:
        return h.trust_coefficient * sums.p / (sums.g + h.weight_decay * sums.p + h.eps)
    return 1.0


@rule(
    prepare,
    sums=Sums(settle=trust_ratio, results=("ratio",), norms={"p": parameter, "g": gradient}),
    domains={"trust_coefficient": POSITIVE_OR_ZERO, "nesterov": Flag()},
)
def lars(p, g, velocity, h):
    d = h.lr * h.ratio * (g + h.weight_decay * p)
    velocity = h.momentum * velocity + d
    return p - (h.d_weight * d + h.velocity_weight * velocity), velocity
