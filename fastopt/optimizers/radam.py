"""`RAdam`, the optimizer whose formulas stand in `fastopt.rules.radam`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.radam import radam


class RAdam(Optimizer, rules=(radam,), conventions={"torch": {}, "optax": {"eps_hat": False}}):
    """RAdam: Adam that begins with plain momentum, until the second moment averages over enough gradients.

    Formula: ``m``, ``v`` as Adam; ``p -= lr r (m/bc1) sqrt(bc2) / (sqrt(v) + eps)``, or ``p -= lr m/bc1`` while the
    variance of r is not yet finite

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of the two means, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: L2, >= 0; with ``decoupled_weight_decay=True`` as in AdamW.
        eps_hat: False adds eps to the corrected root, as optax does: ``sqrt(v/bc2) + eps``.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Liu et al. 2020, https://arxiv.org/abs/1908.03265, algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.RAdam({"w": np.zeros(1)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([5.0])})
    >>> opt.params["w"].round(4)
    array([-0.5])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        *,
        eps_hat: bool = True,
        **options: Any,
    ):
        super().__init__(
            params, radam, lr=lr, betas=betas, eps=eps, eps_hat=eps_hat, weight_decay=weight_decay, **options
        )
