r"""Yogi (Zaheer et al. 2018, https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization, alg. 2).

    m = b1 m + (1 - b1) g
    v = v - (1 - b2) sign(v - g^2) g^2
    p = p - lr (m / bc1) / (sqrt(v / bc2) + eps)      bc1 = 1 - b1^t, bc2 = 1 - b2^t

The paper has no bias correction (``bias_correction=False``). States: m, in units of the gradient, at first
``initial_momentum``; v, of its square, at first ``initial_accumulator_value``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO
from fastopt.rule import rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    one_minus_b2: float
    step_size: float
    eps: float


def prepare(
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    initial_accumulator_value: float,
    bias_correction: bool,
    initial_momentum: float,
) -> Hyper:
    b1, b2 = betas
    bc1, bc2 = (1.0 - b1**t, 1.0 - b2**t) if bias_correction else (1.0, 1.0)
    root = math.sqrt(bc2)
    return Hyper(b1, 1.0 - b1, 1.0 - b2, lr * root / bc1, root * eps)


INITIAL = "initial_accumulator_value"


@rule(prepare, domains={INITIAL: POSITIVE_OR_ZERO}, initial={"m": "initial_momentum", "v": INITIAL}, nonnegative=("v",))
def yogi(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    square = g * g
    change = h.one_minus_b2 * square
    v = v - change if v > square else (v + change if v < square else v)
    return p - h.step_size * m / (math.sqrt(v) + h.eps), m, v
