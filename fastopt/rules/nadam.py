r"""NAdam (Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ).

    mu_t = b1 (1 - 0.96^(t momentum_decay) / 2)        P_t = mu_1 mu_2 ... mu_t
    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    p = p - lr ((1 - mu_t) / (1 - P_t) g + mu_{t+1} / (1 - P_{t+1}) m) / (sqrt(v / bc2) + eps)      bc2 = 1 - b2^t

Adam along the momentum of the next step. States: m, in units of the gradient; v, of its square.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO
from fastopt.rule import rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    g_weight: float
    m_weight: float
    eps: float


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float, momentum_decay: float) -> Hyper:
    b1, b2 = betas
    root = math.sqrt(1.0 - b2**t)
    g_weight = (1.0 - mu(t, b1, momentum_decay)) / (1.0 - product(t, b1, momentum_decay))
    m_weight = mu(t + 1, b1, momentum_decay) / (1.0 - product(t + 1, b1, momentum_decay))
    return Hyper(b1, 1.0 - b1, b2, 1.0 - b2, lr * root * g_weight, lr * root * m_weight, root * eps)


@rule(prepare, domains={"momentum_decay": POSITIVE_OR_ZERO}, nonnegative=("v",))
def nadam(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - (h.g_weight * g + h.m_weight * m) / (math.sqrt(v) + h.eps), m, v


def product(t: int, b1: float, momentum_decay: float) -> float:
    known = products(b1, momentum_decay)
    while len(known) <= t and known[-1] > 1e-20:
        known.append(known[-1] * mu(len(known), b1, momentum_decay))
    return known[t] if t < len(known) else 0.0


@lru_cache(maxsize=32)
def products(b1: float, momentum_decay: float) -> list[float]:
    """Return P_0, P_1, ...: a list that `product` extends, until P no longer changes 1 - P."""
    return [1.0]


def mu(t: int, b1: float, momentum_decay: float) -> float:
    return b1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay))
