"""`AdEMAMix`, the optimizer whose formulas stand in `fastopt.rules.ademamix`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.ademamix import ademamix


class AdEMAMix(Optimizer, rules=(ademamix,), conventions={"optax": {"alpha": 5.0}}):
    """AdEMAMix: AdamW with a second, much slower momentum, which averages over thousands of gradients.

    Formula: ``m1 = b1 m1 + (1-b1) g``; ``m2 = b3 m2 + (1-b3) g``; ``v = b2 v + (1-b2) g^2``;
    ``p -= lr (m1/bc1 + alpha m2) / (sqrt(v/bc2) + eps)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2, b3) of m1, v and m2, each in [0, 1).
        alpha: weight of the slow momentum, >= 0; 4 to 10 in the paper.
        eps: >= 0, in units of the gradient.
        weight_decay: decoupled, >= 0, in units of 1/lr.
        warmup_steps: >= 0; the number of steps over which alpha and b3 rise to their values (in the paper all).
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137, algorithm 1

    >>> import numpy as np, fastopt
    >>> opt = fastopt.AdEMAMix({"w": np.zeros(1)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([5.0])})
    >>> opt.params["w"].round(4)
    array([-0.1])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: Any = 2.0,
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        *,
        warmup_steps: Any = 0,
        **options: Any,
    ):
        super().__init__(
            params,
            ademamix,
            lr=lr,
            betas=betas,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            **options,
        )
