r"""Schedule-Free AdamW (Defazio et al. 2024, https://arxiv.org/abs/2405.15682, algorithm 1).

    y = (1 - b1) z + b1 x                     the parameters hold y, and g is the gradient at y
    v = b2 v + (1 - b2) g^2
    d = g / (sqrt(v) + eps) + weight_decay y
    z = z - gamma d                           gamma = lr s_t,  s_t = sqrt(1 - b2^t) min(1, t / warmup_steps)
    x = (1 - c) x + c z                       c = s_t^2 / (s_1^2 + ... + s_t^2)

With ``form="optax"`` and ``"keras"`` gamma has no bias correction, and d has: d = g / (sqrt(v / bc2) + eps) +
weight_decay y, bc2 = 1 - b2^t. optax has s_t = min(1, t / warmup_steps) in c, and min(1, (t - 1) / warmup_steps) in
gamma; Keras has c = 1 / t.

x, the average to evaluate with, is not stored: it is (y - (1 - b1) z) / b1. States: z, in units of the parameter, at
first the parameter; v, of the gradient squared.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastopt.hyper import DECAY_RATE, POSITIVE_OR_ZERO, Choice, Domain, Interval, Pair
from fastopt.rule import rule


class Hyper(NamedTuple):
    b2: float
    one_minus_b2: float
    eps: float
    weight_decay: float
    gamma: float
    towards_z: float
    back: float
    beyond: float  # from y to x, as a multiple of the way from z to y


def prepare(
    t: int, lr: float, betas: tuple[float, float], eps: float, warmup_steps: float, weight_decay: float, form: str
) -> Hyper:
    b1, b2 = betas
    if form == "paper":
        this = weight(t, b2, warmup_steps)
        gamma, c = lr * math.sqrt(this), this / sum_of_weights(t, b2, warmup_steps)
    else:
        root = math.sqrt(1.0 - b2**t)
        late = 1 if form == "optax" else 0  # optax's warm-up of z begins at 0, that of the weights at 1
        gamma = lr * root * (min(1.0, (t - late) / warmup_steps) if warmup_steps else 1.0)
        eps, weight_decay = root * eps, weight_decay / root
        averaged = warmup_steps if form == "optax" else 0.0
        c = weight(t, 0.0, averaged) / sum_of_weights(t, 0.0, averaged)
    return Hyper(
        b2, 1.0 - b2, eps, weight_decay, gamma, c, gamma * (1.0 - b1 * (1.0 - c)), 1.0 / b1 - 1.0 if b1 else 0.0
    )


DOMAINS: dict[str, Domain] = {
    "betas": Pair(Interval(0.0, 1.0, open=True, open_low=True), DECAY_RATE),  # b1 is the weight of x in y
    "warmup_steps": POSITIVE_OR_ZERO,
    "form": Choice(("paper", "optax", "keras")),
}


@rule(prepare, domains=DOMAINS, initial={"z": "p"}, evaluated_in="eval_params", nonnegative=("v",))
def schedule_free_adamw(p, g, z, v, h):
    v = h.b2 * v + h.one_minus_b2 * g * g
    d = g / (math.sqrt(v) + h.eps) + h.weight_decay * p
    # The new y, of the new x and z, with x written as y and z: (1-b1) z' + b1 ((1-c) x + c z').
    return p + h.towards_z * (z - p) - h.back * d, z - h.gamma * d, v


EARLY = 4096
"""The number of steps after the warm-up whose weights are added one by one. A formula gives the sum of the others; in
the first steps, where 1 - b2^t is small, it would lose digits."""


def sum_of_weights(t: int, b2: float, warmup_steps: float) -> float:
    sums = early_sums(b2, warmup_steps)
    last = len(sums) - 1
    if t <= last:
        return float(sums[t])
    return float(sums[last]) + (t - last) - (b2 ** (last + 1) - b2 ** (t + 1)) / (1.0 - b2)


@lru_cache(maxsize=32)
def early_sums(b2: float, warmup_steps: float) -> np.ndarray:
    """The sums of the first 0, 1, 2, ... weights."""
    steps = range(1, math.ceil(warmup_steps) + EARLY)
    return np.cumsum([0.0, *(weight(t, b2, warmup_steps) for t in steps)])


def weight(t: int, b2: float, warmup_steps: float) -> float:
    return (1.0 - b2**t) * (min(1.0, t / warmup_steps) if warmup_steps else 1.0) ** 2
