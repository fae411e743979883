r"""Sophia (Liu et al. 2023, https://arxiv.org/abs/2305.14342, algorithm 3).

    p = p - lr weight_decay p
    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) hessian             in steps that are given one; else v stays as it is
    p = p - lr clip(m / max(gamma v, eps), -1, 1)

States: hessian, the last estimate of the Hessian's diagonal that a step was given; m, in units of the gradient; v, in
units of the Hessian, those of the gradient divided by those of the parameter.
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO
from fastopt.rule import rule


class Hyper(NamedTuple):
    lr: float
    b1: float
    one_minus_b1: float
    b2: float  # 1 in a step without a Hessian
    one_minus_b2: float
    gamma: float
    eps: float
    one: float  # a literal 1.0 would be float64


def prepare(t: int, lr: float, betas: tuple[float, float], gamma: float, eps: float, hessian: bool) -> Hyper:
    b1, b2 = betas[0], betas[1] if hessian else 1.0
    return Hyper(lr, b1, 1.0 - b1, b2, 1.0 - b2, gamma, eps, 1.0)


@rule(prepare, extra=("hessian",), decoupled=True, domains={"gamma": POSITIVE_OR_ZERO})
def sophia(p, g, hessian, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * hessian
    curvature = h.gamma * v
    u = m / (h.eps if curvature < h.eps else curvature)  # in this form, so that a NaN stays one
    u = h.one if u > h.one else u
    return p - h.lr * (-h.one if u < -h.one else u), hessian, m, v
