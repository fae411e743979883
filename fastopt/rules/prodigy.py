r"""Prodigy (Mishchenko & Defazio 2024, https://arxiv.org/abs/2306.06101, algorithm 4, and section 5).

    b3 = sqrt(b2);   c = 1, or sqrt(1 - b2^t) / (1 - b1^t) with bias_correction
    r = b3 r + d^2 / d0 lr c sum(g (p0 - p))      sums over all parameters; p0 is where they began
    m = b1 m + (1 - b1) d g
    v = b2 v + (1 - b2) d^2 g^2
    s = b3 s + d^2 / d0 lr c g
    d' = max(d, d_coef r / sum(|s|))
    p = p - d lr c (m / (sqrt(v) + d' eps) + weight_decay p)
    d = d'                                        d0 at first

d estimates the distance to the solution, and is the learning rate. With ``safeguard_warmup`` s has no factor of lr c.
States: m, v, s (of the units of the gradient, times those of d) and p0; numbers of all parameters: d and numerator (r).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO, Flag, Interval
from fastopt.rule import Sums, rule


class Hyper(NamedTuple):
    rate: float  # lr c
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    b3: float
    weight: float  # of the gradient in s, without d^2 / d0
    eps: float
    weight_decay: float
    d0: float
    d_coef: float
    d: float  # filled in by the backend, and the following
    relative: float  # d / d0
    next_d: float


def prepare(
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    d0: float,
    d_coef: float,
    bias_correction: bool,
    safeguard_warmup: bool,
    weight_decay: float,
) -> Hyper:
    b1, b2 = betas
    rate = lr * math.sqrt(1.0 - b2**t) / (1.0 - b1**t) if bias_correction else lr
    weight = 1.0 if safeguard_warmup else rate
    b3 = math.sqrt(b2)
    return Hyper(rate, b1, 1.0 - b1, b2, 1.0 - b2, b3, weight, eps, weight_decay, d0, d_coef, d0, 1.0, d0)


def present(sums, numbers, size, h):
    d = numbers.d if numbers.d > 0.0 else h.d0
    return d, d / h.d0, d


def towards_the_start(p, g, m, v, s, p0, h):
    return g * (p0 - p)


def accumulated(g, s, h):
    return h.b3 * s + h.relative * (h.d * h.weight) * g


def magnitude(p, g, m, v, s, p0, h):
    return abs(accumulated(g, s, h))


def estimate(sums, numbers, size, h):
    numerator = h.b3 * numbers.numerator + h.relative * h.d * h.rate * sums.towards
    found = h.d if sums.magnitude == 0.0 else h.d_coef * numerator / sums.magnitude
    d = h.d if found <= h.d else found
    return d, d, numerator


@rule(
    prepare,
    domains={
        "d0": Interval(0.0, open_low=True),
        "d_coef": POSITIVE_OR_ZERO,
        "bias_correction": Flag(),
        "safeguard_warmup": Flag(),
    },
    initial={"p0": "p"},
    sums=(
        Sums({}, present, results=("d", "relative"), numbers=("d",), over="all"),
        Sums(
            {"towards": towards_the_start, "magnitude": magnitude},
            estimate,
            results=("next_d",),
            numbers=("d", "numerator"),
            over="all",
        ),
    ),
    nonnegative=("v",),
)
def prodigy(p, g, m, v, s, p0, h):
    m = h.b1 * m + h.one_minus_b1 * (h.d * g)
    v = h.b2 * v + h.one_minus_b2 * (h.d * g) * (h.d * g)
    step = m / (math.sqrt(v) + h.next_d * h.eps) + h.weight_decay * p
    return p - h.d * h.rate * step, m, v, accumulated(g, s, h), p0
