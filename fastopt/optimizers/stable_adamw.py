"""`StableAdamW`, the optimizer whose formulas stand in `fastopt.rules.stable_adamw`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.stable_adamw import stable_adamw


class StableAdamW(Optimizer, rules=(stable_adamw,)):
    """StableAdamW: AdamW whose learning rate falls, tensor by tensor, where gradients outgrow their average.

    Formula: ``m = b1_t m + (1-b1_t) g``; ``v = b2_t v + (1-b2_t) g^2``; ``rms = sqrt(mean(g^2 / max(v, eps^2)))``, a
    number per tensor; ``p -= lr / max(1, rms) (m / (sqrt(v) + eps) + weight_decay p)``

    The decay rates ``b_t = b (1 - b^(t-1)) / (1 - b^t)`` correct the bias of the averages. It needs no clipping by
    norm: a tensor whose gradients are suddenly larger than before makes a smaller step.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of m and v, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: >= 0; decoupled from the gradient, and multiplied by the bounded learning rate.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Wortsman et al. 2023, https://arxiv.org/abs/2304.13013, algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.StableAdamW({"w": np.zeros(2)}, lr=0.1, weight_decay=0.0)
    >>> _ = opt.step({"w": np.array([3.0, -4.0])})
    >>> opt.params["w"].round(4)
    array([-0.1,  0.1])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.99),
        eps: Any = 1e-6,
        weight_decay: Any = 0.01,
        **options: Any,
    ):
        super().__init__(params, stable_adamw, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
