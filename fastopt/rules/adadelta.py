r"""Adadelta (Zeiler 2012, https://arxiv.org/abs/1212.5701, algorithm 1).

    s = rho s + (1 - rho) g^2
    d = sqrt((r + eps) / (s + eps)) g
    p = p - lr d
    r = rho r + (1 - rho) d^2

States: square_avg (s), in units of the gradient squared; acc_delta (r), of the parameter squared.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.optimizer import Optimizer
from fastopt.rule import rule


class Hyper(NamedTuple):
    lr: float
    rho: float
    one_minus_rho: float
    eps: float


def prepare(t: int, lr: float, rho: float, eps: float) -> Hyper:
    return Hyper(lr, rho, 1.0 - rho, eps)


@rule(prepare, idle=Linear())
def adadelta(p, g, square_avg, acc_delta, h):
    square_avg = h.rho * square_avg + h.one_minus_rho * g * g
    # Two roots, not the root of the quotient: with eps = 1e-6 and a gradient of 1e-30 the quotient loses every bit.
    delta = math.sqrt(acc_delta + h.eps) / math.sqrt(square_avg + h.eps) * g
    acc_delta = h.rho * acc_delta + h.one_minus_rho * delta * delta
    return p - h.lr * delta, square_avg, acc_delta


class Adadelta(
    Optimizer,
    rules=(adadelta,),
    conventions={
        "torch": {},
        "keras": {"lr": 1e-3, "rho": 0.95, "eps": 1e-7, "decoupled_weight_decay": True},
        "optax": {},
    },
):
    """Adadelta: steps in the units of the parameter, from two running averages and no learning rate of its own.

    Formula: ``s = rho s + (1-rho) g^2``; ``d = sqrt((r+eps)/(s+eps)) g``; ``p -= lr d``; ``r = rho r + (1-rho) d^2``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
        lr: factor on the step, >= 0; 1 is the paper's.
        rho: decay rate of both averages, in [0, 1).
        eps: >= 0, in units of the gradient squared.
        weight_decay: L2, >= 0.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Zeiler 2012, https://arxiv.org/abs/1212.5701, algorithm 1

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adadelta({"w": np.zeros(1)})
    >>> _ = opt.step({"w": np.array([1.0])})
    >>> opt.params["w"].round(6)
    array([-0.003162])
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        rho: Any = 0.9,
        eps: Any = 1e-6,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, adadelta, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, **options)
