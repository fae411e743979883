"""`Lion`, the optimizer whose formulas stand in `fastopt.rules.lion`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.lion import lion


class Lion(
    Optimizer,
    rules=(lion,),
    conventions={"keras": {"lr": 1e-3}, "optax": {"weight_decay": 1e-3}},
):
    """Lion: a step of the same size in every element, along the sign of an interpolated momentum.

    Formula: ``p *= 1 - lr weight_decay``; ``p -= lr sign(b1 m + (1-b1) g)``; ``m = b2 m + (1-b2) g``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0; the size of the step in each element. A third to a tenth of Adam's.
        betas: (b1, b2), each in [0, 1): the weight of m in the direction, and the decay rate of m.
        weight_decay: decoupled, >= 0, in units of 1/lr.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Lion({"w": np.zeros(3)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([-5.0, 0.0, 1e-9])})
    >>> opt.params["w"]
    array([ 0.1,  0. , -0.1])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, lion, lr=lr, betas=betas, weight_decay=weight_decay, **options)
