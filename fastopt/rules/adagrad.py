r"""Adagrad (Duchi, Hazan & Singer 2011, https://jmlr.org/papers/v12/duchi11a.html).

    s = s + g^2
    p = p - lr_t g / (sqrt(s) + eps)      lr_t = lr / (1 + (t - 1) lr_decay)

With ``eps_inside`` the denominator is sqrt(s + eps). State: sum_sq (s), in units of the gradient squared, at first
``initial_accumulator_value``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastopt.closed_forms.linear import Linear
from fastopt.optimizer import Optimizer
from fastopt.rule import POSITIVE_OR_ZERO, rule


class Hyper(NamedTuple):
    lr: float
    eps_in: float
    eps_out: float


def prepare(
    t: int, lr: float, lr_decay: float, eps: float, eps_inside: bool, initial_accumulator_value: float
) -> Hyper:
    eps_in, eps_out = (eps, 0.0) if eps_inside else (0.0, eps)
    return Hyper(lr / (1.0 + (t - 1) * lr_decay), eps_in, eps_out)


INITIAL = "initial_accumulator_value"
FRAMEWORK = {"eps": 1e-7, "eps_inside": True, INITIAL: 0.1}


@rule(prepare, domains={INITIAL: POSITIVE_OR_ZERO}, initial={"sum_sq": INITIAL}, idle=Linear())
def adagrad(p, g, sum_sq, h):
    sum_sq = sum_sq + g * g
    return p - h.lr * g / (math.sqrt(sum_sq + h.eps_in) + h.eps_out), sum_sq


class Adagrad(
    Optimizer,
    rules=(adagrad,),
    conventions={"torch": {}, "keras": {"lr": 1e-3, **FRAMEWORK, "decoupled_weight_decay": True}, "optax": FRAMEWORK},
):
    """Adagrad: each element's step shrinks with the sum of its squared gradients.

    Formula: ``s += g^2``; ``p -= lr / (1 + (t-1) lr_decay) g / (sqrt(s) + eps)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
        lr: learning rate, >= 0.
        lr_decay: >= 0; how fast lr falls with the number of updates.
        weight_decay: L2, >= 0.
        eps: >= 0, in units of the gradient (of its square with eps_inside).
        eps_inside: put eps inside the root: ``sqrt(s + eps)``.
        initial_accumulator_value: what s begins at, >= 0, in units of the gradient squared.
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
        params: Any,
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
