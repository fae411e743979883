"""`NovoGrad`, the optimizer whose formulas stand in `fastopt.rules.novograd`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.novograd import novograd


class NovoGrad(Optimizer, rules=(novograd,), conventions={"optax": {"betas": (0.9, 0.25), "eps": 1e-6}}):
    """NovoGrad: momentum of gradients, each divided by a running mean of its tensor's norm. One state, not two.

    Formula: ``v = b2 v + (1-b2) norm(g)^2``, a number per tensor; ``m = b1 m + g / (sqrt(v) + eps) + weight_decay p``;
    ``p -= lr m``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of m and v, each in [0, 1).
        eps: >= 0, in units of the gradient's norm.
        weight_decay: >= 0; passes through the momentum.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Ginsburg et al. 2019, https://arxiv.org/abs/1905.11286, algorithm 1

    >>> import numpy as np, fastopt
    >>> opt = fastopt.NovoGrad({"w": np.zeros(2)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([3.0, 4.0])})
    >>> opt.params["w"].round(4), opt.states["v"]["w"]
    (array([-0.06, -0.08]), array(25.))
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.95, 0.98),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, novograd, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
