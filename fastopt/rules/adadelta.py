r"""Adadelta (Zeiler 2012, https://arxiv.org/abs/1212.5701, algorithm 1).

    s = rho s + (1 - rho) g^2
    d = sqrt((r + eps) / (s + eps)) g
    p = p - lr d
    r = rho r + (1 - rho) d^2

States: square_avg (s), in units of the gradient squared; acc_delta (r), of the parameter squared.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.rule import rule


class Hyper(NamedTuple):
    lr: float
    rho: float
    one_minus_rho: float
    eps: float


def prepare(t: int, lr: float, rho: float, eps: float) -> Hyper:
    return Hyper(lr, rho, 1.0 - rho, eps)


@rule(prepare, idle=Linear(), nonnegative=("square_avg", "acc_delta"))
def adadelta(p, g, square_avg, acc_delta, h):
    square_avg = h.rho * square_avg + h.one_minus_rho * g * g
    # Two roots, not the root of the quotient: with eps = 1e-6 and a gradient of 1e-30 the quotient loses every bit.
    delta = math.sqrt(acc_delta + h.eps) / math.sqrt(square_avg + h.eps) * g
    acc_delta = h.rho * acc_delta + h.one_minus_rho * delta * delta
    return p - h.lr * delta, square_avg, acc_delta
