"""`Adan`, the optimizer whose formulas stand in `fastopt.rules.adan`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adan import adan


class Adan(Optimizer, rules=(adan,), conventions={"optax": {"form": "optax", "eps_root": 1e-8}}):
    """Adan: Adam with Nesterov momentum, estimated from the differences of successive gradients.

    Formula: ``d = g - g_before``; ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) d``; ``n = b3 n + (1-b3) (g + b2 d)^2``;
    ``p -= lr (m/bc1 + b2 v/bc2) / (sqrt(n/bc3) + eps)``; ``p /= 1 + lr weight_decay``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2, b3) of m, v and n, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: proximal, >= 0, in units of 1/lr; with ``form="optax"`` decoupled, as in AdamW.
        form: ``"paper"``, or ``"optax"``, which weights the differences by ``1 - b2`` where the paper has b2.
        eps_root: >= 0, added to ``n/bc3`` under the root.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Xie et al. 2022, https://arxiv.org/abs/2208.06677, algorithm 1

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adan({"w": np.zeros(1)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([5.0])})
    >>> opt.params["w"].round(4)
    array([-0.1])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.98, 0.92, 0.99),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        *,
        form: str = "paper",
        eps_root: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            params,
            adan,
            lr=lr,
            betas=betas,
            eps=eps,
            form=form,
            eps_root=eps_root,
            weight_decay=weight_decay,
            **options,
        )
