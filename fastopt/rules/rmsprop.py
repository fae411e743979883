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
from typing import NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.rule import rule


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


@rule(prepare, idle=Linear(), nonnegative=("square_avg",))
def rmsprop(p, g, square_avg, h):
    square_avg = mean_square(g, square_avg, h)
    return p - h.lr * normalized(g, square_avg, h), square_avg


@rule(prepare, idle=Linear(), nonnegative=("square_avg",))
def rmsprop_centered(p, g, square_avg, grad_avg, h):
    square_avg = mean_square(g, square_avg, h)
    grad_avg = mean(g, grad_avg, h)
    return p - h.lr * normalized(g, variance(square_avg, grad_avg, h), h), square_avg, grad_avg


@rule(prepare_momentum, idle=Linear(), nonnegative=("square_avg",))
def rmsprop_momentum(p, g, square_avg, buf, h):
    square_avg = mean_square(g, square_avg, h)
    buf = h.momentum * buf + h.weight * normalized(g, square_avg, h)
    return p - h.lr * buf, square_avg, buf


@rule(prepare_momentum, idle=Linear(), nonnegative=("square_avg",))
def rmsprop_centered_momentum(p, g, square_avg, grad_avg, buf, h):
    square_avg = mean_square(g, square_avg, h)
    grad_avg = mean(g, grad_avg, h)
    buf = h.momentum * buf + h.weight * normalized(g, variance(square_avg, grad_avg, h), h)
    return p - h.lr * buf, square_avg, grad_avg, buf


def mean_square(g, square_avg, h):
    return h.alpha * square_avg + h.one_minus_alpha * g * g


def mean(g, grad_avg, h):
    return h.alpha * grad_avg + h.one_minus_alpha * g


def variance(square_avg, grad_avg, h):
    # Rounding makes it negative where the gradient hardly changes.
    difference = square_avg - grad_avg * grad_avg
    return difference if difference > h.zero else h.zero


def normalized(g, second_moment, h):
    return g / (math.sqrt(second_moment + h.eps_in) + h.eps_out)
