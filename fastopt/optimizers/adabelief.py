"""`AdaBelief`, the optimizer whose formulas stand in `fastopt.rules.adabelief`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adabelief import adabelief


class AdaBelief(Optimizer, rules=(adabelief,), conventions={"optax": {}}):
    """AdaBelief: Adam that divides by the deviation of the gradient from its running mean.

    Formula: ``m = b1 m + (1-b1) g``; ``s = b2 s + (1-b2) (g-m)^2 + eps``; ``p -= lr (m/bc1) / (sqrt(s/bc2) + eps)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of m and s, each in [0, 1).
        eps: >= 0; added to s, in units of the gradient squared, and to its root.
        weight_decay: decoupled, >= 0, in units of 1/lr.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Zhuang et al. 2020, https://arxiv.org/abs/2010.07468, algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.AdaBelief({"w": np.zeros(1)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([5.0])})
    >>> opt.params["w"].round(4)
    array([-0.1111])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-16,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, adabelief, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
