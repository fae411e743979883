r"""Momentum (Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5), in the three forms that textbooks use.

    heavy_ball   v = momentum v + g                  p = p - lr v
    ema          v = momentum v + (1 - momentum) g   p = p - lr v
    lr_inside    v = momentum v - lr g               p = p + v

The forms differ in the place of lr and 1 - momentum: `prepare` handles the difference, and all share one rule. State:
velocity, in units of the gradient (heavy_ball, ema) or of the parameter (lr_inside).
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.hyper import Choice
from fastopt.rule import rule

FORMS = ("heavy_ball", "ema", "lr_inside")


class Hyper(NamedTuple):
    momentum: float
    weight: float  # of the gradient in the velocity
    rate: float  # of the velocity in the parameter


def prepare(t: int, lr: float, momentum: float, form: str) -> Hyper:
    if form == "heavy_ball":
        return Hyper(momentum, 1.0, lr)
    if form == "ema":
        return Hyper(momentum, 1.0 - momentum, lr)
    return Hyper(momentum, -lr, -1.0)


@rule(prepare, domains={"form": Choice(FORMS)}, idle=Linear(with_l2=True))
def momentum(p, g, velocity, h):
    velocity = h.momentum * velocity + h.weight * g
    return p - h.rate * velocity, velocity
