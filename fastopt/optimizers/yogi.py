"""`Yogi`, the optimizer whose formulas stand in `fastopt.rules.yogi`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.yogi import yogi


class Yogi(Optimizer, rules=(yogi,), conventions={"optax": {"initial_momentum": 1e-6}}):
    """Yogi: Adam whose second moment moves towards g^2 by an amount that depends only on g.

    Formula: ``m = b1 m + (1-b1) g``; ``v -= (1-b2) sign(v - g^2) g^2``; ``p -= lr (m/bc1) / (sqrt(v/bc2) + eps)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: (b1, b2), each in [0, 1): decay rate of m, and 1 minus the weight of g^2 in v.
        eps: >= 0, in units of the gradient.
        weight_decay: L2, >= 0.
        initial_accumulator_value: the initial v, >= 0, in units of the gradient squared.
        bias_correction: False, as in the paper, sets bc1 = bc2 = 1.
        initial_momentum: the initial m, in units of the gradient; 1e-6 in optax.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Zaheer et al. 2018, https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization,
    algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Yogi({"w": np.zeros(1)}, lr=0.1, initial_accumulator_value=0.0)
    >>> _ = opt.step({"w": np.array([5.0])})
    >>> opt.params["w"].round(4)
    array([-0.1])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-2,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-3,
        weight_decay: Any = 0.0,
        *,
        initial_accumulator_value: Any = 1e-6,
        bias_correction: bool = True,
        initial_momentum: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            params,
            yogi,
            lr=lr,
            betas=betas,
            eps=eps,
            initial_accumulator_value=initial_accumulator_value,
            bias_correction=bias_correction,
            initial_momentum=initial_momentum,
            weight_decay=weight_decay,
            **options,
        )
