"""`ASGD`, the optimizer whose formulas stand in `fastopt.rules.asgd`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.asgd import asgd


class ASGD(Optimizer, rules=(asgd,), conventions={"torch": {}}):
    """ASGD: stochastic gradient descent that averages the parameters it has passed.

    Formula: ``eta = lr / (1 + lambd lr (t-1))^alpha``; ``p = (1 - lambd eta) p - eta g``;
    ``ax += (p - ax) / max(1, t - 1 - t0)``

    The average is ``opt.states["ax"]``: of all p after update t0, and p itself before that. It is what should be
    evaluated; `ema` is an average that forgets. A new lr counts at once, in torch one step later.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: the learning rate at first, >= 0.
        lambd: decay of p and of the learning rate, >= 0.
        alpha: the power with which the learning rate falls, >= 0.
        t0: the number of updates after which the average begins, >= 0.
        weight_decay: L2, >= 0.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; the form of torch.optim.ASGD

    >>> import numpy as np, fastopt
    >>> opt = fastopt.ASGD({"w": np.zeros(1)}, lr=0.5, lambd=0.0, t0=0)
    >>> for g in (8.0, -4.0, 2.0):
    ...     _ = opt.step({"w": np.array([g])})
    >>> opt.params["w"], opt.states["ax"]["w"]  # at -4, -2 and -3; of the last two
    (array([-3.]), array([-2.5]))
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 0.01,
        lambd: Any = 1e-4,
        alpha: Any = 0.75,
        t0: Any = 1e6,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, asgd, lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay, **options)
