r"""Momentum (Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5), in the three forms that textbooks use.

    heavy_ball   v = momentum v + g                  p = p - lr v
    ema          v = momentum v + (1 - momentum) g   p = p - lr v
    lr_inside    v = momentum v - lr g               p = p + v

The forms differ in where lr and 1 - momentum stand, which `prepare` settles: the rule is one. State: velocity, in units
of the gradient (heavy_ball, ema) or of the parameter (lr_inside).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.optimizer import Optimizer
from fastopt.rule import Choice, rule

FORMS = ("heavy_ball", "ema", "lr_inside")


class Hyper(NamedTuple):
    momentum: float
    weight: float  # of the gradient in the velocity
    rate: float  # of the velocity in the parameter


def prepare(t: int, lr: float, momentum: float, form: str) -> Hyper:
    if form == "heavy_ball":
        return Hyper(momentum, 1.0, lr)
    if form == "ema":
        return Hyper(momentum, 1.0 - momentum, lr)
    return Hyper(momentum, -lr, -1.0)


@rule(prepare, domains={"form": Choice(FORMS)}, idle=Linear(with_l2=True))
def momentum(p, g, velocity, h):
    velocity = h.momentum * velocity + h.weight * g
    return p - h.rate * velocity, velocity


class Momentum(
    Optimizer,
    rules=(momentum,),
    conventions={"torch": {"lr": 1e-3}, "keras": {"form": "lr_inside", "decoupled_weight_decay": True}, "optax": {}},
):
    """Momentum, in one of three forms.

    Formula: heavy_ball: ``v = momentum v + g``, ``p -= lr v``; ema: ``v = momentum v + (1 - momentum) g``,
    ``p -= lr v``; lr_inside: ``v = momentum v - lr g``, ``p += v``

    For a constant lr heavy_ball and lr_inside take the same path, and so does ema with ``lr / (1 - momentum)``; under a
    schedule lr_inside keeps the old lr in what the velocity has gathered.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
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
        params: Any,
        lr: Any = 0.01,
        momentum: Any = 0.9,
        form: str = "heavy_ball",
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            params, self.rules[0], lr=lr, momentum=momentum, form=form, weight_decay=weight_decay, **options
        )
