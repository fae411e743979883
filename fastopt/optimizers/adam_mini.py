"""`AdamMini`, the optimizer whose formulas stand in `fastopt.rules.adam_mini`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adam_mini import adam_mini


class AdamMini(Optimizer, rules=(adam_mini,)):
    """Adam-mini: AdamW with one second moment per parameter tensor, which halves the memory of the states.

    Formula: ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) mean(g^2)``, a number per tensor;
    ``p -= lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p)``

    The paper's blocks are smaller in a transformer: a head of a query or key, a row of another matrix. Give each such
    block as a parameter of its own to have them.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of m and v, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: >= 0; decoupled from the gradient.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2406.16793, algorithm 1

    >>> import numpy as np, fastopt
    >>> opt = fastopt.AdamMini({"w": np.zeros(2), "b": np.zeros(1)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([7.0, -1.0]), "b": np.array([9.0])})  # roots of the means: 5 and 9
    >>> opt.params["w"].round(4), opt.params["b"].round(4)
    (array([-0.14,  0.02]), array([-0.1]))
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, adam_mini, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
