r"""Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1; AMSGrad: Reddi et al. 2018).

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    p = p - lr (m / bc1) / (sqrt(v / bc2) + eps)      bc1 = 1 - b1^t, bc2 = 1 - b2^t

With ``eps_inside`` the denominator is sqrt(v / bc2 + eps). With ``eps_hat`` eps is added to the uncorrected root, as in
the last formula before section 2.1: p = p - lr sqrt(bc2) / bc1 m / (sqrt(v) + eps). AMSGrad divides by the largest v so
far (before correction, as torch does). States: m, in units of the gradient; v and v_max, of its square.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastopt.closed_forms.adam import ADAM, AMSGRAD
from fastopt.optimizer import Optimizer
from fastopt.rule import Flag, rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    step_size: float
    eps_in: float
    eps_out: float


def prepare(
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    eps_inside: bool,
    bias_correction: bool,
    eps_hat: bool = False,
) -> Hyper:
    b1, b2 = betas
    # (m/bc1) / (sqrt(v/bc2) + eps) = (sqrt(bc2)/bc1) m / (sqrt(v) + sqrt(bc2) eps): the corrections move out of the
    # kernel, and into step_size and eps. Inside the root, sqrt(v/bc2 + eps) = sqrt(v + bc2 eps) / sqrt(bc2).
    bc1, bc2 = (1.0 - b1**t, 1.0 - b2**t) if bias_correction else (1.0, 1.0)
    root = math.sqrt(bc2)
    corrected = 1.0 if eps_hat else root
    eps_in, eps_out = (corrected**2 * eps, 0.0) if eps_inside else (0.0, corrected * eps)
    return Hyper(b1, 1.0 - b1, b2, 1.0 - b2, lr * root / bc1, eps_in, eps_out)


KERAS = {"eps": 1e-7, "eps_hat": True, "decoupled_weight_decay": True}


@rule(prepare, idle=ADAM)
def adam(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - h.step_size * m / (math.sqrt(v + h.eps_in) + h.eps_out), m, v


@rule(prepare, idle=AMSGRAD)
def amsgrad(p, g, m, v, v_max, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    v_max = v_max if v_max > v else v
    return p - h.step_size * m / (math.sqrt(v_max + h.eps_in) + h.eps_out), m, v, v_max


class Adam(Optimizer, rules=(adam, amsgrad), conventions={"torch": {}, "keras": KERAS, "optax": {}}):
    """Adam: steps along a running mean of the gradient, divided by the root of one of its square.

    Formula: ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) g^2``; ``p -= lr (m/bc1) / (sqrt(v/bc2) + eps)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
        lr: learning rate, >= 0; about the size of a step in each element.
        betas: decay rates (b1, b2) of the two means, each in [0, 1).
        eps: >= 0, in units of the gradient (of its square with eps_inside).
        weight_decay: L2, >= 0: ``g += weight_decay p`` first. For the decoupled form use `AdamW`.
        amsgrad: divide by the root of the largest v so far, before its correction, as torch and Keras do; optax takes
            the largest after it.
        eps_inside: put eps inside the root: ``sqrt(v/bc2 + eps)``.
        bias_correction: False takes bc1 = bc2 = 1.
        eps_hat: add eps to the uncorrected root, as Keras does: ``p -= lr sqrt(bc2)/bc1 m / (sqrt(v) + eps)``.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1; AMSGrad: Reddi et al. 2018,
    https://openreview.net/forum?id=ryQu7f-RZ

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adam({"w": np.zeros(2)}, lr=0.1)
    >>> _ = opt.step({"w": np.array([1e-3, -1e3])})
    >>> opt.params["w"].round(4)
    array([-0.1,  0.1])
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        amsgrad: bool = False,
        *,
        eps_inside: bool = False,
        bias_correction: bool = True,
        eps_hat: bool = False,
        **options: Any,
    ):
        plain, with_max = self.rules
        super().__init__(
            params,
            with_max if Flag().check("amsgrad", amsgrad) else plain,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            eps_inside=eps_inside,
            bias_correction=bias_correction,
            eps_hat=eps_hat,
            **options,
        )
