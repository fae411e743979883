r"""RAdam (Liu et al. 2020, https://arxiv.org/abs/1908.03265, algorithm 2).

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    rho_max = 2 / (1 - b2) - 1        rho = rho_max - 2 t b2^t / bc2        bc1 = 1 - b1^t, bc2 = 1 - b2^t
    p = p - lr r (m / bc1) sqrt(bc2) / (sqrt(v) + eps)        where rho > 5
    p = p - lr m / bc1                                        in the first steps
    r = sqrt((rho - 4) (rho - 2) rho_max / ((rho_max - 4) (rho_max - 2) rho))

With ``eps_hat=False`` eps is added to the corrected root, sqrt(v / bc2), as in optax. While v averages over too few
gradients, the step is that of momentum; the bound is 4 in the paper, 5 in torch. States: m, in units of the gradient;
v, of its square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.rule import rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    plain: float
    adaptive: float
    eps: float


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float, eps_hat: bool) -> Hyper:
    b1, b2 = betas
    bc1, bc2 = 1.0 - b1**t, 1.0 - b2**t
    rho_max = 2.0 / (1.0 - b2) - 1.0
    rho = rho_max - 2.0 * t * b2**t / bc2
    if rho > 5.0:
        r = math.sqrt((rho - 4.0) * (rho - 2.0) * rho_max / ((rho_max - 4.0) * (rho_max - 2.0) * rho))
        plain, adaptive = 0.0, lr * r * math.sqrt(bc2) / bc1
        eps = eps if eps_hat else math.sqrt(bc2) * eps
    else:
        plain, adaptive, eps = lr / bc1, 0.0, 1.0  # any eps > 0 avoids 0 / 0
    return Hyper(b1, 1.0 - b1, b2, 1.0 - b2, plain, adaptive, eps)


@rule(prepare, nonnegative=("v",))
def radam(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - (h.plain * m + h.adaptive * m / (math.sqrt(v) + h.eps)), m, v
