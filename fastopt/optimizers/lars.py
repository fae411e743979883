"""`LARS`, the optimizer whose formulas stand in `fastopt.rules.lars`."""

from __future__ import annotations

from typing import Any

from fastopt.hyper import NONE
from fastopt.optimizer import Optimizer
from fastopt.rules.lars import lars


class LARS(Optimizer, rules=(lars,), conventions={"optax": {"weight_decay": NONE}}):
    """LARS: momentum, with the gradient of each tensor scaled to the size of that tensor. For large batches.

    Formula: ``d = lr trust_coefficient norm(p) / (norm(g) + weight_decay norm(p)) (g + weight_decay p)``, norms per
    tensor; ``v = momentum v + d``; ``p -= v``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        momentum: decay rate of the velocity, in [0, 1].
        weight_decay: >= 0; part of the ratio, and of the step that the ratio scales. optax takes another norm with it,
            so that it must be 0 with ``convention="optax"``.
        trust_coefficient: >= 0; the size of a step relative to that of the tensor, at lr = 1.
        eps: >= 0, in units of the gradient's norm.
        nesterov: step along ``d + momentum v`` instead of v.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: You, Gitman & Ginsburg 2017, https://arxiv.org/abs/1708.03888, algorithm 1

    >>> import numpy as np, fastopt
    >>> opt = fastopt.LARS({"w": np.full(4, 3.0)}, lr=100.0)
    >>> _ = opt.step({"w": np.full(4, 7.0)})
    >>> opt.params["w"].round(4)
    array([2.7, 2.7, 2.7, 2.7])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 0.1,
        momentum: Any = 0.9,
        weight_decay: Any = 0.0,
        trust_coefficient: Any = 1e-3,
        *,
        eps: Any = 0.0,
        nesterov: bool = False,
        **options: Any,
    ):
        super().__init__(
            params,
            lars,
            lr=lr,
            momentum=momentum,
            trust_coefficient=trust_coefficient,
            eps=eps,
            nesterov=nesterov,
            weight_decay=weight_decay,
            **options,
        )
