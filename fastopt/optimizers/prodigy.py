"""`Prodigy`, the optimizer whose formulas stand in `fastopt.rules.prodigy`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.prodigy import prodigy


class Prodigy(Optimizer, rules=(prodigy,)):
    """Prodigy: AdamW that finds its learning rate, from how far the parameters have gone along the gradients.

    Formula: ``m = b1 m + (1-b1) d g``; ``v = b2 v + (1-b2) (d g)^2``; ``s = sqrt(b2) s + d^2/d0 lr g``;
    ``r = sqrt(b2) r + d^2/d0 lr sum(g (p0 - p))``; ``d' = max(d, d_coef r / sum(|s|))``;
    ``p -= d lr (m / (sqrt(v) + d' eps) + weight_decay p)``; ``d = d'``

    d, a number of all parameters together, begins at d0 and grows to the size of the distance to the solution:
    ``opt.states["d"]``. Leave lr at 1, or let a schedule take it from 1 to 0.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: a factor of d, >= 0; the same for all parameters.
        betas: decay rates (b1, b2) of m and v, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: >= 0; decoupled from the gradient, and multiplied by d lr.
        d0: the first d, > 0; in units of the parameter.
        d_coef: >= 0, a factor of the estimate of d; 0.5 to 2 are usual.
        bias_correction: multiply lr by ``sqrt(1-b2^t) / (1-b1^t)``, as in Adam.
        safeguard_warmup: leave lr out of s, so that a warm-up of lr does not make d too large.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Mishchenko & Defazio 2024, https://arxiv.org/abs/2306.06101, algorithm 4; the form of prodigyopt

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Prodigy({"w": np.array([3.0, -2.0])})
    >>> for _ in range(150):
    ...     _ = opt.step({"w": opt.params["w"].copy()})
    >>> abs(opt.params["w"]).round(1), opt.states["d"]["w"].round(1)
    (array([0., 0.]), np.float64(1.1))
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1.0,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        d0: Any = 1e-6,
        d_coef: Any = 1.0,
        *,
        bias_correction: bool = False,
        safeguard_warmup: bool = False,
        **options: Any,
    ):
        super().__init__(
            params,
            prodigy,
            lr=lr,
            betas=betas,
            eps=eps,
            d0=d0,
            d_coef=d_coef,
            bias_correction=bias_correction,
            safeguard_warmup=safeguard_warmup,
            weight_decay=weight_decay,
            **options,
        )
