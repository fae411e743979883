r"""Adamax (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 2).

    m = b1 m + (1 - b1) g
    u = max(b2 u, |g| + eps)        p = p - lr / bc1 m / u              bc1 = 1 - b1^t
    u = max(b2 u, |g|)              p = p - lr / bc1 m / (u + eps)      with eps_inside=False

Adam in the infinity norm. States: m and u, in units of the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt.rule import rule


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    step_size: float
    eps_in: float
    eps_out: float


def prepare(t: int, lr: float, betas: tuple[float, float], eps: float, eps_inside: bool) -> Hyper:
    b1, b2 = betas
    eps_in, eps_out = (eps, 0.0) if eps_inside else (0.0, eps)
    return Hyper(b1, 1.0 - b1, b2, lr / (1.0 - b1**t), eps_in, eps_out)


@rule(prepare, nonnegative=("u",))
def adamax(p, g, m, u, h):
    m = h.b1 * m + h.one_minus_b1 * g
    decayed, new = h.b2 * u, abs(g) + h.eps_in
    u = decayed if decayed > new else new
    return p - h.step_size * m / (u + h.eps_out), m, u
