"""`Sophia`, the optimizer whose formulas stand in `fastopt.rules.sophia`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.sophia import sophia


class Sophia(Optimizer, rules=(sophia,)):
    """Sophia: momentum over a running mean of the Hessian's diagonal, with steps of lr at most.

    Formula: ``p *= 1 - lr weight_decay``; ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) hessian`` in steps with one;
    ``p -= lr clip(m / max(gamma v, eps), -1, 1)``

    Give an estimate of the Hessian's diagonal to every tenth step or so, ``opt.step(grads, extra={"hessian": tree})``;
    the other steps go on with the mean so far. Two estimates are usual: ``u * Hu`` for random signs u (Hutchinson's),
    and the number of samples times the square of the mean gradient for labels drawn from the model itself
    (Gauss-Newton-Bartlett). Without any, the step is lr along the sign of m.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0; the largest step of an element.
        betas: (b1, b2), each in [0, 1): decay rates of m, and of v.
        gamma: >= 0: a larger one leaves fewer steps clipped; 0.01 suits Hutchinson's estimate, 0.05 the other.
        eps: the least that m is divided by, >= 0, in units of the gradient over those of lr.
        weight_decay: decoupled, >= 0, in units of 1/lr.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Liu et al. 2023, https://arxiv.org/abs/2305.14342, algorithm 3

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Sophia({"w": np.zeros(2)}, lr=0.1, betas=(0.0, 0.0), gamma=0.5)
    >>> g = np.array([1.0, 1.0])
    >>> _ = opt.step({"w": g}, extra={"hessian": {"w": np.array([8.0, 1.0])}})
    >>> _ = opt.step({"w": g})
    >>> opt.params["w"]
    array([-0.05, -0.2 ])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-4,
        betas: Any = (0.96, 0.99),
        gamma: Any = 0.01,
        eps: Any = 1e-12,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, sophia, lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay, **options)
