"""`ADOPT`, the optimizer whose formulas stand in `fastopt.rules.adopt`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adopt import adopt


class ADOPT(Optimizer, rules=(adopt,)):
    """ADOPT: Adam that divides by the average of the gradients before this one, and converges with any b2.

    Formula: ``v = g^2`` at the first update; then ``m = b1 m + (1-b1) clip(g / max(sqrt(v), eps), c_t)``;
    ``p -= lr m``; ``v = b2 v + (1-b2) g^2``

    The first update only measures the gradient. The others clip to ``c_t = (t-1)^clip_exp``, which bounds the first
    steps, where v has seen few gradients.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of m and v, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: L2, >= 0; with ``decoupled_weight_decay=True`` it shrinks p instead, as in AdamW.
        clip_exp: >= 0, the exponent of the bound c_t. The paper and its authors' code have 1/4, timm 1/3.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853, algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.ADOPT({"w": np.zeros(2)}, lr=0.1, betas=(0.5, 0.9999))
    >>> for _ in range(3):
    ...     _ = opt.step({"w": np.array([3.0, -4.0])})
    >>> opt.params["w"].round(4)
    array([-0.125,  0.125])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.9999),
        eps: Any = 1e-6,
        weight_decay: Any = 0.0,
        *,
        clip_exp: Any = 0.25,
        **options: Any,
    ):
        super().__init__(
            params, adopt, lr=lr, betas=betas, eps=eps, clip_exp=clip_exp, weight_decay=weight_decay, **options
        )
