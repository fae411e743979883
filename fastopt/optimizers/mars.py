"""`MARS`, the optimizer whose formulas stand in `fastopt.rules.mars`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.mars import mars


class MARS(Optimizer, rules=(mars,)):
    """MARS: AdamW of gradients whose variance the difference to the gradient before reduces.

    Formula: ``c = g + gamma b1 / (1-b1) (g - prev_grad)``; ``c /= max(1, norm(c))``, tensor by tensor;
    ``m = b1 m + (1-b1) c``; ``v = b2 v + (1-b2) c^2``; ``p -= lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p)``

    The first update has ``c = g``, as in timm. All parameters are treated alike; the authors' code has AdamW for
    parameters of one axis.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates (b1, b2) of m and v, each in [0, 1).
        eps: >= 0, of no unit, as c.
        weight_decay: >= 0; decoupled from the gradient.
        gamma: >= 0, the weight of the correction.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Yuan et al. 2024, https://arxiv.org/abs/2411.10438, algorithm 2; the form of timm

    >>> import numpy as np, fastopt
    >>> opt = fastopt.MARS({"w": np.zeros(2)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([3.0, -4.0])})
    >>> opt.params["w"].round(4), opt.states["m"]["w"].round(4)  # c is (0.6, -0.8)
    (array([-0.1,  0.1]), array([ 0.06, -0.08]))
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 3e-3,
        betas: Any = (0.9, 0.99),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        gamma: Any = 0.025,
        **options: Any,
    ):
        super().__init__(params, mars, lr=lr, betas=betas, eps=eps, gamma=gamma, weight_decay=weight_decay, **options)
