r"""Shampoo (Gupta et al. 2018, https://arxiv.org/abs/1802.09568, algorithm 1) for matrices, AdaGrad for the others.

    g = g + weight_decay p
    m = momentum m + (1 - momentum) g
    L = L + g g^T                                 R = R + g^T g
    p = p - lr (L + eps I)^-exponent m (R + eps I)^-exponent

The roots are those of an earlier step where precondition_frequency > 1. The paper has exponent = 1/4 and no momentum,
and begins with L = eps I, which is the same. A parameter that is not preconditioned has the paper's form for one axis,
restricted to the diagonal: v = v + g^2, p = p - lr m / sqrt(v + eps).

States: m, in units of the gradient; v, of its square: of a matrix m^2 between its steps, so that steps without the
matrices can follow; L and R, of its square; L_root and R_root.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastopt.hyper import Domain, Flag, Interval
from fastopt.rule import Matrixwise, rule


class Hyper(NamedTuple):
    lr: float
    momentum: float
    one_minus_momentum: float
    weight_decay: float
    eps: float
    precondition: float  # 1 for a matrix, 0 where AdaGrad updates
    zero: float  # a literal 0.0 would be float64


def prepare(
    t: int,
    lr: float,
    momentum: float,
    eps: float,
    exponent: float,
    precondition_frequency: float,
    weight_decay: float,
    precondition: bool = True,
) -> Hyper:
    return Hyper(lr, momentum, 1.0 - momentum, weight_decay, eps, float(precondition), 0.0)


DOMAINS: dict[str, Domain] = {
    "eps": Interval(0.0, open_low=True),
    "exponent": Interval(0.0, 1.0, open_low=True),
    "precondition_frequency": Interval(1.0, open=True, whole=True),
    "precondition": Flag(),
}


@rule(prepare, domains=DOMAINS)
def direction(p, g, m, v, h):
    g = g + h.weight_decay * p
    return p, h.momentum * m + h.one_minus_momentum * g, g


def inverse_root(matrix: Any, eps: float, exponent: float) -> Any:
    """(matrix + eps I)^-exponent of a symmetric matrix without negative eigenvalues; NaN where it is not finite."""
    if not math.isfinite(float(matrix.trace())):  # no element is larger than the largest on the diagonal
        return matrix * math.nan
    values, vectors = np.linalg.eigh(matrix)
    values = values.clip(0.0)  # rounding makes some of them negative
    values += eps
    values **= -exponent
    return (vectors * values) @ vectors.T


def precondition(
    g: Any,
    m: Any,
    L: Any,
    R: Any,
    L_root: Any,
    R_root: Any,
    t: int,
    eps: float,
    exponent: float,
    precondition_frequency: float,
    **other: Any,
) -> None:
    """Replace the matrix g by L_root m R_root, in place."""
    if g.size == 0:
        return
    L += g @ g.T
    R += g.T @ g
    # A matrix that was not preconditioned before has no roots yet, at whatever t.
    if (t - 1) % precondition_frequency == 0 or not L_root[0].any():
        L_root[...] = inverse_root(L, eps, exponent)
        R_root[...] = inverse_root(R, eps, exponent)
    np.matmul(L_root @ m, R_root, out=g)


MATRICES = Matrixwise(
    direction,
    "v",
    precondition,
    chosen="precondition",
    matrix_only=("exponent", "precondition_frequency"),
    matrices={
        "L": ("rows", "rows"),
        "R": ("columns", "columns"),
        "L_root": ("rows", "rows"),
        "R_root": ("columns", "columns"),
    },
    reshape="first_axis",
    largest=10_000,
)


@rule(prepare, matrixwise=MATRICES, domains=DOMAINS)
def shampoo(p, g, m, v, h):
    if h.precondition > h.zero:
        return p - h.lr * v, m, m * m
    g = g + h.weight_decay * p
    m = h.momentum * m + h.one_minus_momentum * g
    v = v + g * g
    return p - h.lr * m / math.sqrt(v + h.eps), m, v
