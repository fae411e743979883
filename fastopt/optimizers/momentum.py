"""`Momentum`, the optimizer whose formulas stand in `fastopt.rules.momentum`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.momentum import momentum


class Momentum(
    Optimizer,
    rules=(momentum,),
    conventions={"torch": {"lr": 1e-3}, "keras": {"form": "lr_inside", "decoupled_weight_decay": True}, "optax": {}},
):
    """Momentum, in one of three forms.

    Formula: heavy_ball: ``v = momentum v + g``, ``p -= lr v``; ema: ``v = momentum v + (1 - momentum) g``,
    ``p -= lr v``; lr_inside: ``v = momentum v - lr g``, ``p += v``

    With a constant lr, heavy_ball and lr_inside follow the same path, and so does ema with ``lr / (1 - momentum)``.
    Under a schedule, the velocity of lr_inside holds gradients that were multiplied by earlier values of lr.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        momentum: decay rate of the velocity, in [0, 1].
        form: ``"heavy_ball"``, ``"ema"`` or ``"lr_inside"``.
        weight_decay: L2, >= 0.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range or an unknown form.

    Source: Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Momentum({"w": np.zeros(1)}, lr=1.0, momentum=0.5, form="ema")
    >>> _ = opt.step({"w": np.array([2.0])})
    >>> opt.params["w"]
    array([-1.])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 0.01,
        momentum: Any = 0.9,
        form: str = "heavy_ball",
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            params, self.rules[0], lr=lr, momentum=momentum, form=form, weight_decay=weight_decay, **options
        )
