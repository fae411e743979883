r"""Stochastic gradient descent (Robbins & Monro 1951, https://doi.org/10.1214/aoms/1177729586).

    p = p - lr g

With momentum, in torch's form: v = momentum v + (1 - dampening) g, from v = g at the first step, and p = p - lr v;
with ``nesterov`` p = p - lr (g + momentum v). With ``lr_inside``, v = momentum v - lr (1 - dampening) g and p = p + v,
or p = p + momentum v - lr g. State: velocity, in units of the gradient (lr_inside: of the parameter).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.optimizer import Optimizer
from fastopt.rule import Flag, rule
from fastopt.rules.momentum import Hyper as MomentumHyper
from fastopt.rules.momentum import momentum as momentum_rule
from fastopt.rules.nesterov import nesterov as nesterov_rule


class Hyper(NamedTuple):
    lr: float


def prepare(t: int, lr: float) -> Hyper:
    return Hyper(lr)


def prepare_momentum(t: int, lr: float, momentum: float, dampening: float, lr_inside: bool) -> MomentumHyper:
    # The first velocity is the gradient itself, not a dampened one.
    weight = 1.0 if t == 1 else 1.0 - dampening
    return MomentumHyper(momentum, -lr * weight, -1.0) if lr_inside else MomentumHyper(momentum, weight, lr)


@rule(prepare, idle=Linear(with_l2=True))
def sgd(p, g, h):
    return p - h.lr * g


@rule(prepare_momentum, idle=Linear(with_l2=True))
def sgd_momentum(p, g, velocity, h):
    return momentum_rule(p, g, velocity, h)


@rule(prepare_momentum, idle=Linear(with_l2=True))
def sgd_nesterov(p, g, velocity, h):
    return nesterov_rule(p, g, velocity, h)


class SGD(
    Optimizer,
    rules=(sgd, sgd_momentum, sgd_nesterov),
    conventions={"torch": {}, "keras": {"lr": 0.01, "lr_inside": True, "decoupled_weight_decay": True}, "optax": {}},
):
    """Stochastic gradient descent, with momentum in torch's form.

    Formula: ``p -= lr g``; momentum: ``v = momentum v + (1 - dampening) g``, ``p -= lr v``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
        lr: learning rate, >= 0.
        momentum: decay rate of the velocity, in [0, 1]; 0 keeps no state.
        dampening: in [0, 1]; how much of the gradient the velocity leaves out after the first step.
        nesterov: step along ``g + momentum v`` instead of v; needs momentum > 0 and no dampening.
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
        params: Any,
        lr: Any = 1e-3,
        momentum: Any = 0.0,
        dampening: Any = 0.0,
        nesterov: bool = False,
        weight_decay: Any = 0.0,
        *,
        lr_inside: bool = False,
        **options: Any,
    ):
        if Flag().check("nesterov", nesterov) and (momentum == 0.0 or dampening != 0.0):
            raise ValueError(
                f"nesterov=True needs momentum > 0 and dampening = 0; found momentum={momentum!r}, "
                f"dampening={dampening!r}"
            )
        hyper = {"lr": lr, "weight_decay": weight_decay}
        lr_inside = Flag().check("lr_inside", lr_inside)
        if momentum == 0.0:
            super().__init__(params, sgd, **hyper, **options)
        else:
            chosen = sgd_nesterov if nesterov else sgd_momentum
            hyper |= {"momentum": momentum, "dampening": dampening, "lr_inside": lr_inside}
            super().__init__(params, chosen, **hyper, **options)
