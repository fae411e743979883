"""`AdaBound`, the optimizer whose formulas stand in `fastopt.rules.adabound`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adabound import adabound


class AdaBound(Optimizer, rules=(adabound,)):
    """AdaBound: Adam whose step size per element is kept between bounds that close in on that of SGD.

    Formula: ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) g^2``; ``p -= clip(lr sqrt(1-b2^t) / (1-b1^t) /
    (sqrt(v) + eps), lower, upper) m`` with ``lower = final_lr (1 - 1 / (gamma t + 1))`` and ``upper = final_lr (1 + 1 /
    (gamma t))``

    The authors' code scales final_lr by a schedule of lr; here each has its own: pass a schedule for final_lr as well.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate of the beginning, that of Adam, >= 0.
        betas: decay rates (b1, b2) of m and v, each in [0, 1).
        final_lr: learning rate of the end, that of SGD, >= 0; in units of the parameter per gradient.
        gamma: how fast the bounds close in, in (0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: L2, >= 0.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Luo et al. 2019, https://openreview.net/forum?id=Bkg3g2R9FX, algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.AdaBound({"w": np.zeros(3)}, lr=0.1, betas=(0.5, 0.999), final_lr=1.0, gamma=0.5)
    >>> _ = opt.step({"w": np.array([0.01, 0.2, 30.0])})  # the bounds are 1/3 and 3; 20, 1 and 1/150 before
    >>> opt.params["w"].round(4)
    array([-0.015, -0.1  , -5.   ])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        final_lr: Any = 0.1,
        gamma: Any = 1e-3,
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            params,
            adabound,
            lr=lr,
            betas=betas,
            eps=eps,
            final_lr=final_lr,
            gamma=gamma,
            weight_decay=weight_decay,
            **options,
        )
