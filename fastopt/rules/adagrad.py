r"""Adagrad (Duchi, Hazan & Singer 2011, https://jmlr.org/papers/v12/duchi11a.html).

    s = s + g^2
    p = p - lr_t g / (sqrt(s) + eps)      lr_t = lr / (1 + (t - 1) lr_decay)

With ``eps_inside`` the denominator is sqrt(s + eps). State: sum_sq (s), in units of the gradient squared, at first
``initial_accumulator_value``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.hyper import POSITIVE_OR_ZERO
from fastopt.rule import rule


class Hyper(NamedTuple):
    lr: float
    eps_in: float
    eps_out: float


def prepare(
    t: int, lr: float, lr_decay: float, eps: float, eps_inside: bool, initial_accumulator_value: float
) -> Hyper:
    eps_in, eps_out = (eps, 0.0) if eps_inside else (0.0, eps)
    return Hyper(lr / (1.0 + (t - 1) * lr_decay), eps_in, eps_out)


INITIAL = "initial_accumulator_value"


@rule(prepare, domains={INITIAL: POSITIVE_OR_ZERO}, initial={"sum_sq": INITIAL}, idle=Linear(), nonnegative=("sum_sq",))
def adagrad(p, g, sum_sq, h):
    sum_sq = sum_sq + g * g
    return p - h.lr * g / (math.sqrt(sum_sq + h.eps_in) + h.eps_out), sum_sq
