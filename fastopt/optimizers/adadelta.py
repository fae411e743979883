"""`Adadelta`, the optimizer whose formulas stand in `fastopt.rules.adadelta`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adadelta import adadelta


class Adadelta(
    Optimizer,
    rules=(adadelta,),
    conventions={
        "torch": {},
        "keras": {"lr": 1e-3, "rho": 0.95, "eps": 1e-7, "decoupled_weight_decay": True},
        "optax": {},
    },
):
    """Adadelta: two running averages give steps in the units of the parameter, without a learning rate.

    Formula: ``s = rho s + (1-rho) g^2``; ``d = sqrt((r+eps)/(s+eps)) g``; ``p -= lr d``; ``r = rho r + (1-rho) d^2``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: factor of the step, >= 0; 1 in the paper.
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
        params: Any = None,
        lr: Any = 1.0,
        rho: Any = 0.9,
        eps: Any = 1e-6,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, adadelta, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, **options)
