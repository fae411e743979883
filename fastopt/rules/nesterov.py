r"""Nesterov's accelerated gradient (Nesterov 1983; Sutskever et al. 2013, http://proceedings.mlr.press/v28/sutskever13.html).

    lookahead       g taken at p - momentum v;  v = momentum v + lr g   p = p - v
    reformulated    v = momentum v + g          p = p - lr (g + momentum v)

The reformulated parameters are the look-ahead points of the other form, so the gradient is taken where the parameters
are (Bengio et al. 2012, https://arxiv.org/abs/1212.0901, eq. 7). State: velocity, in units of the gradient
(reformulated) or of the parameter (lookahead).
"""

from __future__ import annotations

from fastopt.closed_forms.linear import Linear
from fastopt.rule import rule
from fastopt.rules.momentum import Hyper
from fastopt.rules.momentum import momentum as momentum_rule


def prepare(t: int, lr: float, momentum: float) -> Hyper:
    return Hyper(momentum, 1.0, lr)


def prepare_lookahead(t: int, lr: float, momentum: float) -> Hyper:
    return Hyper(momentum, lr, 1.0)


@rule(prepare, idle=Linear(with_l2=True))
def nesterov(p, g, velocity, h):
    velocity = h.momentum * velocity + h.weight * g
    return p - h.rate * (h.weight * g + h.momentum * velocity), velocity


@rule(prepare_lookahead, idle=Linear(with_l2=True), gradients_in="lookahead")
def nesterov_lookahead(p, g, velocity, h):
    return momentum_rule(p, g, velocity, h)
