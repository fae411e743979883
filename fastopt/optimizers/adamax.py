"""`Adamax`, the optimizer whose formulas stand in `fastopt.rules.adamax`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adamax import adamax


class Adamax(
    Optimizer,
    rules=(adamax,),
    conventions={
        "torch": {},
        "keras": {"lr": 1e-3, "eps": 1e-7, "eps_inside": False, "decoupled_weight_decay": True},
        "optax": {},
    },
):
    """Adamax: Adam that divides by the largest recent gradient instead of the root of a mean of squares.

    Formula: ``m = b1 m + (1-b1) g``; ``u = max(b2 u, |g| + eps)``; ``p -= lr/bc1 m/u``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of m and of u, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: L2, >= 0.
        eps_inside: False adds eps outside the maximum, as Keras does: ``u = max(b2 u, |g|)``,
            ``p -= lr/bc1 m/(u + eps)``.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 2; eps as in torch.optim.Adamax

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adamax({"w": np.zeros(1)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([-5.0])})
    >>> opt.params["w"].round(4)
    array([0.1])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 2e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        *,
        eps_inside: bool = True,
        **options: Any,
    ):
        super().__init__(
            params,
            adamax,
            lr=lr,
            betas=betas,
            eps=eps,
            eps_inside=eps_inside,
            weight_decay=weight_decay,
            **options,
        )
