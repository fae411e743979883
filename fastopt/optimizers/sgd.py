"""`SGD`, the optimizer whose formulas stand in `fastopt.rules.sgd`."""

from __future__ import annotations

from typing import Any

from fastopt import scalars
from fastopt.hyper import Flag
from fastopt.optimizer import Optimizer
from fastopt.rules.sgd import sgd, sgd_momentum, sgd_nesterov


class SGD(
    Optimizer,
    rules=(sgd, sgd_momentum, sgd_nesterov),
    conventions={"torch": {}, "keras": {"lr": 0.01, "lr_inside": True, "decoupled_weight_decay": True}, "optax": {}},
):
    """Stochastic gradient descent, with momentum in torch's form.

    Formula: ``p -= lr g``; momentum: ``v = momentum v + (1 - dampening) g``, ``p -= lr v``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        momentum: decay rate of the velocity, in [0, 1]; 0 keeps no state.
        dampening: in [0, 1]; the part of the gradient that the velocity leaves out after the first step.
        nesterov: step along ``g + momentum v`` instead of v; needs momentum > 0 (not with lr_inside) and no dampening.
        weight_decay: L2, >= 0: ``g += weight_decay p`` first.
        lr_inside: put lr inside the velocity, as Keras does: ``v = momentum v - lr g``, ``p += v``.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range, or nesterov without momentum or with dampening.

    Source: Robbins & Monro 1951, https://doi.org/10.1214/aoms/1177729586; the form of torch.optim.SGD

    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD({"w": np.ones(2)}, lr=0.5)
    >>> _ = opt.step({"w": np.array([1.0, -1.0])})
    >>> opt.params["w"]
    array([0.5, 1.5])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        momentum: Any = 0.0,
        dampening: Any = 0.0,
        nesterov: bool = False,
        weight_decay: Any = 0.0,
        *,
        lr_inside: bool = False,
        **options: Any,
    ):
        lr_inside = Flag().check("lr_inside", lr_inside)
        plain = scalars.real(momentum) == 0.0
        # Keras' nesterov without momentum is plain descent.
        if Flag().check("nesterov", nesterov) and ((plain and not lr_inside) or scalars.real(dampening) != 0.0):
            raise ValueError(
                f"nesterov: must be False unless momentum > 0 and dampening = 0, got momentum={momentum!r}, "
                f"dampening={dampening!r}"
            )
        hyper = {"lr": lr, "weight_decay": weight_decay}
        if plain:
            super().__init__(params, sgd, **hyper, **options)
        else:
            chosen = sgd_nesterov if nesterov else sgd_momentum
            hyper |= {"momentum": momentum, "dampening": dampening, "lr_inside": lr_inside}
            super().__init__(params, chosen, **hyper, **options)
