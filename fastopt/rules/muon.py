r"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices, AdamW for other parameters.

    p = p - lr weight_decay p
    m = momentum m + (1 - momentum) g
    u = (1 - momentum) g + momentum m             u = m without nesterov
    O = nearly the orthogonal matrix nearest to u (its singular values are between 0.7 and 1.2), by ns_steps of
        X = a X + (b X X^T + c (X X^T)^2) X,      from X = u / norm(u)
    p = p - lr s O                                s = sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns))

States: m, in units of the gradient; v, which holds s O of a matrix, and Adam's v of other parameters.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastopt.hyper import Choice, Domain, Flag, Interval
from fastopt.rule import Matrixwise, rule
from fastopt.rules.adam import adam
from fastopt.rules.adam import prepare as prepare_adam


class Hyper(NamedTuple):
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    step_size: float
    eps_in: float
    eps_out: float
    keep: float  # decoupled weight decay
    orthogonal: float  # 1 for a matrix, 0 where AdamW updates
    momentum: float
    one_minus_momentum: float
    g_weight: float  # in u
    m_weight: float
    zero: float  # a literal 0.0 would be float64


def prepare(
    t: int,
    lr: float,
    momentum: float,
    nesterov: bool,
    ns_steps: float,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    adjust_lr: str,
    adamw_lr: float,
    adamw_betas: tuple[float, float],
    adamw_eps: float,
    weight_decay: float,
    orthogonal: bool = True,
) -> Hyper:
    h = prepare_adam(t, adamw_lr, adamw_betas, adamw_eps, eps_inside=False, bias_correction=True)
    return Hyper(
        b1=h.b1,
        one_minus_b1=h.one_minus_b1,
        b2=h.b2,
        one_minus_b2=h.one_minus_b2,
        step_size=lr if orthogonal else h.step_size,
        eps_in=h.eps_in,
        eps_out=h.eps_out,
        keep=1.0 - (lr if orthogonal else adamw_lr) * weight_decay,
        orthogonal=float(orthogonal),
        momentum=momentum,
        one_minus_momentum=1.0 - momentum,
        g_weight=1.0 - momentum if nesterov else 0.0,
        m_weight=momentum if nesterov else 1.0,
        zero=0.0,
    )


DOMAINS: dict[str, Domain] = {
    "nesterov": Flag(),
    "ns_steps": Interval(1.0, 100.0, open=True, whole=True),
    "ns_coefficients": Interval(length=3),
    "adjust_lr": Choice(("original", "match_rms_adamw")),
    "orthogonal": Flag(),
    "adamw_lr": Interval(0.0),
    "adamw_betas": Interval(0.0, 1.0, open=True, length=2),
    "adamw_eps": Interval(0.0),
}


@rule(prepare, domains=DOMAINS)
def direction(p, g, m, v, h):
    m = h.momentum * m + h.one_minus_momentum * g
    return p, m, h.g_weight * g + h.m_weight * m


def orthogonalize(
    u: Any,
    ns_steps: float,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    adjust_lr: str,
    **other: Any,
) -> None:
    """Replace the matrix u by s O, in place, with products of matrices only."""
    rows, columns = u.shape
    if u.size == 0:
        return
    a, b, c = ns_coefficients
    wide = u.astype(np.float64)
    # An exact factor: squares overflow in float32 beyond 1e19, and in float64 beyond 1e154.
    scale = 2.0 ** (math.frexp(float(abs(wide).max()))[1] - 1)
    norm = scale * math.sqrt(float(((wide / scale) ** 2).sum()))
    X = u / max(norm, eps) if rows <= columns else u.T / max(norm, eps)
    for _ in range(int(ns_steps)):
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    s = math.sqrt(max(1.0, rows / columns)) if adjust_lr == "original" else 0.2 * math.sqrt(max(rows, columns))
    u[...] = s * (X if rows <= columns else X.T)


MATRICES = Matrixwise(
    direction,
    "v",
    orthogonalize,
    chosen="orthogonal",
    matrix_only=("lr", "momentum", "nesterov", "ns_steps", "ns_coefficients", "eps", "adjust_lr"),
    other_only=("adamw_lr", "adamw_betas", "adamw_eps"),
)


@rule(prepare, matrixwise=MATRICES, domains=DOMAINS)
def muon(p, g, m, v, h):
    p = h.keep * p
    if h.orthogonal > h.zero:
        return p - h.step_size * v, m, v
    # |v| is v, but for a matrix that was orthogonalized before: then steps are small until v is that of gradients.
    return adam(p, g, m, math.fabs(v), h)
