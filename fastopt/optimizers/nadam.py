"""`NAdam`, the optimizer whose formulas stand in `fastopt.rules.nadam`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.nadam import nadam


class NAdam(
    Optimizer,
    rules=(nadam,),
    conventions={
        "torch": {},
        "keras": {"lr": 1e-3, "eps": 1e-7, "momentum_decay": 1.0, "decoupled_weight_decay": True},
    },
):
    """NAdam: Adam with Nesterov's look-ahead, along the momentum of the next step.

    Formula: ``mu_t = b1 (1 - 0.96^(t momentum_decay)/2)``; ``m``, ``v`` as Adam;
    ``p -= lr ((1-mu_t)/(1-P_t) g + mu_{t+1}/(1-P_{t+1}) m) / (sqrt(v/bc2) + eps)``, ``P_t = mu_1 ... mu_t``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of the two means, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: L2, >= 0; with ``decoupled_weight_decay=True`` as in AdamW.
        momentum_decay: >= 0; the rate at which mu rises from b1/2 to b1.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ; the form of torch.optim.NAdam

    >>> import numpy as np, fastopt
    >>> opt = fastopt.NAdam({"w": np.zeros(1)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([5.0])})
    >>> opt.params["w"].round(4)
    array([-0.1056])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 2e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        momentum_decay: Any = 4e-3,
        **options: Any,
    ):
        super().__init__(
            params,
            nadam,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            **options,
        )
