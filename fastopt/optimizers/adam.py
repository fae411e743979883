"""`Adam`, the optimizer whose formulas stand in `fastopt.rules.adam`."""

from __future__ import annotations

from typing import Any

from fastopt.hyper import Flag
from fastopt.optimizer import Optimizer
from fastopt.rules.adam import adam, amsgrad

KERAS = {"eps": 1e-7, "eps_hat": True, "decoupled_weight_decay": True}


class Adam(Optimizer, rules=(adam, amsgrad), conventions={"torch": {}, "keras": KERAS, "optax": {}}):
    """Adam: steps along a running mean of the gradient, divided by the root of a running mean of its square.

    Formula: ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) g^2``; ``p -= lr (m/bc1) / (sqrt(v/bc2) + eps)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0; about the size of a step in each element.
        betas: decay rates (b1, b2) of the two means, each in [0, 1).
        eps: >= 0, in units of the gradient (of its square with eps_inside).
        weight_decay: L2, >= 0: ``g += weight_decay p`` first. For the decoupled form use `AdamW`.
        amsgrad: divide by the root of the largest v so far, before its bias correction, as torch and Keras do; optax
            uses the largest after the correction.
        eps_inside: put eps inside the root: ``sqrt(v/bc2 + eps)``.
        bias_correction: False sets bc1 = bc2 = 1.
        eps_hat: add eps to the uncorrected root, as Keras does: ``p -= lr sqrt(bc2)/bc1 m / (sqrt(v) + eps)``.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1; AMSGrad: Reddi et al. 2018,
    https://openreview.net/forum?id=ryQu7f-RZ

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adam({"w": np.zeros(2)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([1e-3, -1e3])})
    >>> opt.params["w"].round(4)
    array([-0.1,  0.1])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        amsgrad: bool = False,
        *,
        eps_inside: bool = False,
        bias_correction: bool = True,
        eps_hat: bool = False,
        **options: Any,
    ):
        plain, with_max = self.rules
        super().__init__(
            params,
            with_max if Flag().check("amsgrad", amsgrad) else plain,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            eps_inside=eps_inside,
            bias_correction=bias_correction,
            eps_hat=eps_hat,
            **options,
        )
