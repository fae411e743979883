r"""AdaBound (Luo, Xiong, Liu & Sun 2019, https://openreview.net/forum?id=Bkg3g2R9FX, algorithm 2).

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    lower = final_lr (1 - 1 / (gamma t + 1))
    upper = final_lr (1 + 1 / (gamma t))
    p = p - clip(lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps), lower, upper) m

The bias correction is that of the authors' code; the paper divides by sqrt(t). States: m, in units of the gradient, and
v, of its square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO, Interval
from fastopt.rule import rule
from fastopt.rules.rprop import within


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    step_size: float
    eps: float
    lower: float
    upper: float


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float, final_lr: float, gamma: float) -> Hyper:
    b1, b2 = betas
    step_size = lr * math.sqrt(1.0 - b2**t) / (1.0 - b1**t)
    lower = final_lr * (1.0 - 1.0 / (gamma * t + 1.0))
    upper = final_lr * (1.0 + 1.0 / (gamma * t))
    return Hyper(b1, 1.0 - b1, b2, 1.0 - b2, step_size, eps, lower, upper)


DOMAINS = {"final_lr": POSITIVE_OR_ZERO, "gamma": Interval(0.0, 1.0, open=True, open_low=True)}


@rule(prepare, domains=DOMAINS, nonnegative=("v",))
def adabound(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - within(h.step_size / (math.sqrt(v) + h.eps), h.lower, h.upper) * m, m, v
