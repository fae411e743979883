r"""ADOPT (Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853, algorithm 2).

    v = g^2                                                   at the first update, which does nothing else
    m = b1 m + (1 - b1) clip(g / max(sqrt(v), eps), c_t)      v of the update before; c_t = (t - 1)^clip_exp
    p = p - lr m
    v = b2 v + (1 - b2) g^2

States: m, of no unit; v, in units of the gradient squared.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO
from fastopt.rule import rule
from fastopt.rules.rprop import within


class Hyper(NamedTuple):
    lr: float
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    eps: float
    largest: float


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float, clip_exp: float) -> Hyper:
    b1, b2 = betas
    if t == 1:  # clipped to 0
        return Hyper(lr, b1, 1.0 - b1, 0.0, 1.0, eps, 0.0)
    return Hyper(lr, b1, 1.0 - b1, b2, 1.0 - b2, eps, float(t - 1) ** clip_exp)


@rule(prepare, domains={"clip_exp": POSITIVE_OR_ZERO}, nonnegative=("v",))
def adopt(p, g, m, v, h):
    root = math.sqrt(v)
    u = g / (h.eps if root < h.eps else root)
    m = h.b1 * m + h.one_minus_b1 * within(u, -h.largest, h.largest)
    return p - h.lr * m, m, h.b2 * v + h.one_minus_b2 * g * g
