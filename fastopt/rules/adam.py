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
from typing import NamedTuple

from fastopt.closed_forms.adam import ADAM, AMSGRAD
from fastopt.rule import rule


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


@rule(prepare, idle=ADAM, nonnegative=("v",))
def adam(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - h.step_size * m / (math.sqrt(v + h.eps_in) + h.eps_out), m, v


@rule(prepare, idle=AMSGRAD, nonnegative=("v", "v_max"))
def amsgrad(p, g, m, v, v_max, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    v_max = v_max if v_max > v else v
    return p - h.step_size * m / (math.sqrt(v_max + h.eps_in) + h.eps_out), m, v, v_max
