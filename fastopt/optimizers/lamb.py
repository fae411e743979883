"""`LAMB`, the optimizer whose formulas stand in `fastopt.rules.lamb`."""

from __future__ import annotations

from typing import Any

from fastopt.hyper import NONE
from fastopt.optimizer import Optimizer
from fastopt.rules.lamb import lamb


class LAMB(
    Optimizer,
    rules=(lamb,),
    conventions={"keras": {"eps": 1e-7, "weight_decay": NONE}, "optax": {"weight_decay": 0.0}},
):
    """LAMB: Adam's direction, scaled for each parameter tensor to the size of that tensor. For very large batches.

    Formula: ``u = (m/bc1) / (sqrt(v/bc2) + eps) + weight_decay p``; ``p -= lr norm(p)/norm(u) u``, norms per tensor

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0; the size of a step relative to the tensor's norm.
        betas: decay rates (b1, b2) of the two means, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: >= 0; added to the direction before the norm is computed. Keras decays apart from the direction,
            so that it must be 0 with ``convention="keras"``.
        bias_correction: False sets bc1 = bc2 = 1.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: You et al. 2020, https://arxiv.org/abs/1904.00962v3, algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.LAMB({"w": np.full(4, 3.0)}, lr=0.1, weight_decay=0.0)
    >>> _ = opt.step({"w": np.full(4, 7.0)})
    >>> opt.params["w"].round(4)
    array([2.7, 2.7, 2.7, 2.7])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-6,
        weight_decay: Any = 0.01,
        *,
        bias_correction: bool = True,
        **options: Any,
    ):
        super().__init__(
            params,
            self.rules[0],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            **options,
        )
