r"""Adan (Xie et al. 2022, https://arxiv.org/abs/2208.06677, algorithm 1, bias-corrected as in its authors' code).

    d = g - g_before                               0 at the first step
    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) d
    n = b3 n + (1 - b3) (g + b2 d)^2
    p = p - lr (m / bc1 + b2 v / bc2) / (sqrt(n / bc3) + eps)      bc_k = 1 - b_k^t
    p = p / (1 + lr weight_decay)

With ``form="optax"``, which takes 1 - b2 for the paper's 1 - b2, a decay rate:

    n = b3 n + (1 - b3) (g + (1 - b2) d)^2
    p = p - lr ((m / bc1 + (1 - b2) v / bc2) / (sqrt(n / bc3 + eps_root) + eps) + weight_decay p)

The betas are decay rates: 1 minus those of the paper. States: m, v and prev_grad, in units of the gradient; n, of its
square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import Choice, Interval
from fastopt.rule import rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    b3: float
    one_minus_b3: float
    known: float  # 1 where there is a gradient before this one, else 0
    m_weight: float
    v_weight: float
    eps_in: float
    eps_out: float
    ahead: float  # the weight of d in the gradient that is expected next
    keep_before: float
    keep: float


def prepare(
    t: int,
    lr: float,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    form: str,
    eps_root: float,
) -> Hyper:
    b1, b2, b3 = betas
    root = math.sqrt(1.0 - b3**t)
    known = 0.0 if t == 1 else 1.0
    ahead = b2 if form == "paper" else 1.0 - b2
    m_weight, v_weight = lr * root / (1.0 - b1**t), lr * root * ahead / (1.0 - b2**t)
    keep_before = 1.0 if form == "paper" else 1.0 - lr * weight_decay
    keep = 1.0 / (1.0 + lr * weight_decay) if form == "paper" else 1.0
    return Hyper(
        b1,
        1.0 - b1,
        b2,
        1.0 - b2,
        b3,
        1.0 - b3,
        known,
        m_weight,
        v_weight,
        root * root * eps_root,
        root * eps,
        ahead,
        keep_before,
        keep,
    )


FORMS = ("paper", "optax")


@rule(prepare, domains={"betas": Interval(0.0, 1.0, open=True, length=3), "form": Choice(FORMS)}, nonnegative=("n",))
def adan(p, g, m, v, n, prev_grad, h):
    difference = h.known * (g - prev_grad)
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * difference
    expected = g + h.ahead * difference
    n = h.b3 * n + h.one_minus_b3 * expected * expected
    step = (h.m_weight * m + h.v_weight * v) / (math.sqrt(n + h.eps_in) + h.eps_out)
    return h.keep * (h.keep_before * p - step), m, v, n, g
