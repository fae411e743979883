"""`RMSprop`, the optimizer whose formulas stand in `fastopt.rules.rmsprop`."""

from __future__ import annotations

from typing import Any

from fastopt.hyper import Flag
from fastopt.optimizer import Optimizer
from fastopt.rules.rmsprop import rmsprop, rmsprop_centered, rmsprop_centered_momentum, rmsprop_momentum


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
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
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
        params: Any = None,
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
