r"""RMSprop (Tieleman & Hinton 2012, lecture 6e; centered: Graves 2013, https://arxiv.org/abs/1308.0850, eq. 38-45).

    v = alpha v + (1 - alpha) g^2
    p = p - lr g / (sqrt(v) + eps)

With ``eps_inside`` the denominator is sqrt(v + eps). Centered, v is replaced under the root by the variance v - a^2,
where a = alpha a + (1 - alpha) g. With momentum, b = momentum b + g / denominator and p = p - lr b; with ``lr_inside``,
b = momentum b + lr g / denominator and p = p - b. States: square_avg (v), in units of the gradient squared; grad_avg
(a), of the gradient; buf (b), of none (lr_inside: of the parameter).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.optimizer import Optimizer
from fastopt.rule import Flag, rule


class Hyper(NamedTuple):
    lr: float
    alpha: float
    one_minus_alpha: float
    eps_in: float
    eps_out: float
    momentum: float
    weight: float  # of the normalized gradient in buf
    zero: float  # a literal 0.0 would be float64


def prepare(t: int, lr: float, alpha: float, eps: float, eps_inside: bool) -> Hyper:
    return prepare_momentum(t, lr, alpha, eps, eps_inside, 0.0, False)


def prepare_momentum(
    t: int, lr: float, alpha: float, eps: float, eps_inside: bool, momentum: float, lr_inside: bool
) -> Hyper:
    eps_in, eps_out = (eps, 0.0) if eps_inside else (0.0, eps)
    weight, rate = (lr, 1.0) if lr_inside else (1.0, lr)
    return Hyper(rate, alpha, 1.0 - alpha, eps_in, eps_out, momentum, weight, 0.0)


def mean_square(g, square_avg, h):
    return h.alpha * square_avg + h.one_minus_alpha * g * g


def mean(g, grad_avg, h):
    return h.alpha * grad_avg + h.one_minus_alpha * g


def variance(square_avg, grad_avg, h):
    # In exact arithmetic never below zero; rounded, it is when the gradient hardly changes.
    difference = square_avg - grad_avg * grad_avg
    return difference if difference > h.zero else h.zero


def normalized(g, second_moment, h):
    return g / (math.sqrt(second_moment + h.eps_in) + h.eps_out)


@rule(prepare, idle=Linear())
def rmsprop(p, g, square_avg, h):
    square_avg = mean_square(g, square_avg, h)
    return p - h.lr * normalized(g, square_avg, h), square_avg


@rule(prepare, idle=Linear())
def rmsprop_centered(p, g, square_avg, grad_avg, h):
    square_avg = mean_square(g, square_avg, h)
    grad_avg = mean(g, grad_avg, h)
    return p - h.lr * normalized(g, variance(square_avg, grad_avg, h), h), square_avg, grad_avg


@rule(prepare_momentum, idle=Linear())
def rmsprop_momentum(p, g, square_avg, buf, h):
    square_avg = mean_square(g, square_avg, h)
    buf = h.momentum * buf + h.weight * normalized(g, square_avg, h)
    return p - h.lr * buf, square_avg, buf


@rule(prepare_momentum, idle=Linear())
def rmsprop_centered_momentum(p, g, square_avg, grad_avg, buf, h):
    square_avg = mean_square(g, square_avg, h)
    grad_avg = mean(g, grad_avg, h)
    buf = h.momentum * buf + h.weight * normalized(g, variance(square_avg, grad_avg, h), h)
    return p - h.lr * buf, square_avg, grad_avg, buf


class RMSprop(
    Optimizer,
    rules=(rmsprop, rmsprop_centered, rmsprop_momentum, rmsprop_centered_momentum),
    conventions={
        "torch": {},
        "keras": {
            "lr": 1e-3,
            "alpha": 0.9,
            "eps": 1e-7,
            "eps_inside": True,
            "lr_inside": True,
            "decoupled_weight_decay": True,
        },
        "optax": {"alpha": 0.9, "eps_inside": True, "lr_inside": True},
    },
):
    """RMSprop: each element's step is divided by the root of a running mean of its squared gradients.

    Formula: ``v = alpha v + (1-alpha) g^2``; ``p -= lr g / (sqrt(v) + eps)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
        lr: learning rate, >= 0.
        alpha: decay rate of the running means, in [0, 1).
        eps: >= 0, in units of the gradient (of its square with eps_inside).
        weight_decay: L2, >= 0.
        momentum: in [0, 1]; not 0: ``b = momentum b + g/(sqrt(v)+eps)``, ``p -= lr b``.
        centered: divide by the root of the variance ``v - a^2`` (clamped at 0), ``a = alpha a + (1-alpha) g``.
        eps_inside: put eps inside the root: ``sqrt(v + eps)``.
        lr_inside: with momentum: put lr inside b, ``b = momentum b + lr g/(sqrt(v)+eps)``, ``p -= b``.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Tieleman & Hinton 2012, lecture 6e; centered: Graves 2013, https://arxiv.org/abs/1308.0850, eq. 38-45

    >>> import numpy as np, fastopt
    >>> opt = fastopt.RMSprop({"w": np.zeros(1)}, lr=0.1, alpha=0.75)
    >>> _ = opt.step({"w": np.array([4.0])})
    >>> opt.params["w"].round(6)
    array([-0.2])
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 0.01,
        alpha: Any = 0.99,
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        momentum: Any = 0.0,
        centered: bool = False,
        *,
        eps_inside: bool = False,
        lr_inside: bool = False,
        **options: Any,
    ):
        hyper = {"lr": lr, "alpha": alpha, "eps": eps, "eps_inside": eps_inside, "weight_decay": weight_decay}
        centered, lr_inside = Flag().check("centered", centered), Flag().check("lr_inside", lr_inside)
        if momentum == 0.0:
            super().__init__(params, rmsprop_centered if centered else rmsprop, **hyper, **options)
        else:
            chosen = rmsprop_centered_momentum if centered else rmsprop_momentum
            super().__init__(params, chosen, momentum=momentum, lr_inside=lr_inside, **hyper, **options)
