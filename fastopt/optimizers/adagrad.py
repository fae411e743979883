"""`Adagrad`, the optimizer whose formulas stand in `fastopt.rules.adagrad`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adagrad import INITIAL, adagrad

FRAMEWORK = {"eps": 1e-7, "eps_inside": True, INITIAL: 0.1}


class Adagrad(
    Optimizer,
    rules=(adagrad,),
    conventions={"torch": {}, "keras": {"lr": 1e-3, **FRAMEWORK, "decoupled_weight_decay": True}, "optax": FRAMEWORK},
):
    """Adagrad: each element's step shrinks with the sum of its squared gradients.

    Formula: ``s += g^2``; ``p -= lr / (1 + (t-1) lr_decay) g / (sqrt(s) + eps)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        lr_decay: >= 0; the rate at which lr falls with the number of updates.
        weight_decay: L2, >= 0.
        eps: >= 0, in units of the gradient (of its square with eps_inside).
        eps_inside: put eps inside the root: ``sqrt(s + eps)``.
        initial_accumulator_value: the initial s, >= 0, in units of the gradient squared.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Duchi, Hazan & Singer 2011, https://jmlr.org/papers/v12/duchi11a.html, eq. 1 (diagonal)

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adagrad({"w": np.zeros(1)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([5.0])})
    >>> opt.params["w"].round(6)
    array([-0.1])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 0.01,
        lr_decay: Any = 0.0,
        weight_decay: Any = 0.0,
        eps: Any = 1e-10,
        *,
        eps_inside: bool = False,
        initial_accumulator_value: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            params,
            adagrad,
            lr=lr,
            lr_decay=lr_decay,
            eps=eps,
            eps_inside=eps_inside,
            initial_accumulator_value=initial_accumulator_value,
            weight_decay=weight_decay,
            **options,
        )
