r"""Stochastic gradient descent (Robbins & Monro 1951, https://doi.org/10.1214/aoms/1177729586).

    p = p - lr g

With momentum, in torch's form: v = momentum v + (1 - dampening) g, from v = g at the first step, and p = p - lr v;
with ``nesterov`` p = p - lr (g + momentum v). With ``lr_inside``, v = momentum v - lr (1 - dampening) g and p = p + v,
or p = p + momentum v - lr g. State: velocity, in units of the gradient (lr_inside: of the parameter).
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.hyper import NONE
from fastopt.rule import rule
from fastopt.rules.momentum import Hyper as MomentumHyper
from fastopt.rules.momentum import momentum as momentum_rule
from fastopt.rules.nesterov import nesterov as nesterov_rule


class Hyper(NamedTuple):
    lr: float


def prepare(t: int, lr: float) -> Hyper:
    return Hyper(lr)


def prepare_momentum(t: int, lr: float, momentum: float, dampening: float, lr_inside: bool) -> MomentumHyper:
    # The first velocity is the gradient itself, not a dampened one.
    weight = 1.0 if t == 1 else 1.0 - dampening
    return MomentumHyper(momentum, -lr * weight, -1.0) if lr_inside else MomentumHyper(momentum, weight, lr)


@rule(prepare, idle=Linear(with_l2=True))
def sgd(p, g, h):
    return p - h.lr * g


@rule(prepare_momentum, idle=Linear(with_l2=True))
def sgd_momentum(p, g, velocity, h):
    return momentum_rule(p, g, velocity, h)


@rule(prepare_momentum, domains={"dampening": NONE}, idle=Linear(with_l2=True))
def sgd_nesterov(p, g, velocity, h):
    return nesterov_rule(p, g, velocity, h)
