r"""NovoGrad (Ginsburg et al. 2019, https://arxiv.org/abs/1905.11286, algorithm 1).

    v = b2 v + (1 - b2) norm(g)^2               one number per parameter tensor; norm(g)^2 at the first step
    m = b1 m + (g / (sqrt(v) + eps) + weight_decay p)
    p = p - lr m

States: m, of no unit; v, in units of the gradient squared.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.rule import Sums, rule


class Hyper(NamedTuple):
    lr: float
    b1: float
    b2: float
    one_minus_b2: float
    eps: float
    weight_decay: float
    inverse: float  # 1 / (sqrt(v) + eps), filled in by the backend, from norms


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Hyper:
    b1, b2 = betas
    kept, weight = (0.0, 1.0) if t == 1 else (b2, 1.0 - b2)
    return Hyper(lr, b1, kept, weight, eps, weight_decay, 1.0)


def gradient(p, g, m, h):
    return g


def second_moment(sums, numbers, size, h):
    v = h.b2 * numbers.v + h.one_minus_b2 * sums.g * sums.g
    root = math.sqrt(v) + h.eps
    return 1.0 / root if root > 0.0 else 1.0, v


@rule(prepare, sums=Sums(settle=second_moment, results=("inverse",), numbers=("v",), norms={"g": gradient}))
def novograd(p, g, m, h):
    m = h.b1 * m + (h.inverse * g + h.weight_decay * p)
    return p - h.lr * m, m
