r"""SOAP (Vyas et al. 2024, https://arxiv.org/abs/2409.11321, algorithm 3): Adam in the eigenbases of Shampoo's L and R.

    G = QL^T g QR
    m = b1 m + (1 - b1) G
    S = b2 S + (1 - b2) G^2
    p = p - lr sqrt(1 - b2^k) / (1 - b1^k) QL (m / (sqrt(S) + eps)) QR^T          k = t - 1
    p = (1 - lr weight_decay) p
    L = shampoo_beta L + (1 - shampoo_beta) g g^T,    R = shampoo_beta R + (1 - shampoo_beta) g^T g

The first update only makes L and R, and QL and QR of their eigenvectors, as the authors' code does. Where k is a
multiple of precondition_frequency, the columns of QL are put into the order of falling diagonals of QL^T L QL, and the
rows of S with them; then QL is the orthogonal factor of L QL. QR and the columns of S likewise. m is turned into the
new bases: to keep it there takes two products of matrices a step less than to keep it in the basis of p.

Other parameters are updated by Adam, with eps as above, and with the decay after the step.

States: m, in units of the gradient; v, of its square: of a matrix m^2 between its steps, so that steps without the
matrices can follow; S, L and R, of its square; QL and QR.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastopt.hyper import Domain, Flag, Interval
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
    precondition: float  # 1 for a matrix, 0 where Adam updates
    zero: float  # a literal 0.0 would be float64


def prepare(
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    shampoo_beta: float,
    precondition_frequency: float,
    weight_decay: float,
    precondition: bool = True,
) -> Hyper:
    first = precondition and t == 1
    k = t - 1 if precondition and t > 1 else t
    h = prepare_adam(k, lr, betas, eps, eps_inside=False, bias_correction=True, eps_hat=True)
    return Hyper(
        b1=h.b1,
        one_minus_b1=h.one_minus_b1,
        b2=h.b2,
        one_minus_b2=h.one_minus_b2,
        step_size=h.step_size,
        eps_in=h.eps_in,
        eps_out=h.eps_out,
        keep=1.0 if first else 1.0 - lr * weight_decay,
        precondition=float(precondition),
        zero=0.0,
    )


DOMAINS: dict[str, Domain] = {
    "shampoo_beta": Interval(0.0, 1.0, open=True),
    "precondition_frequency": Interval(1.0, open=True, whole=True),
    "precondition": Flag(),
}


@rule(prepare, domains=DOMAINS)
def direction(p, g, m, v, h):
    return p, m, g


def eigenvectors(matrix: Any) -> Any:
    """Those of a symmetric matrix without negative eigenvalues, the largest first; NaN where it is not finite."""
    if not math.isfinite(float(matrix.trace())):  # no element is larger than the largest on the diagonal
        return matrix * math.nan
    return np.linalg.eigh(matrix)[1][:, ::-1]


def improved(matrix: Any, Q: Any) -> tuple[Any, Any]:
    """Eigenvectors after a step of power iteration from Q, and which column of Q each came from."""
    product = matrix @ Q
    order = (Q * product).sum(axis=0).argsort()[::-1]
    return np.linalg.qr(product[:, order])[0], order


def adam_in_eigenbases(
    g: Any,
    m: Any,
    S: Any,
    L: Any,
    R: Any,
    QL: Any,
    QR: Any,
    t: int,
    betas: tuple[float, float],
    eps: float,
    shampoo_beta: float,
    precondition_frequency: float,
    **other: Any,
) -> None:
    """Replace the matrix g by QL (m / (sqrt(S) + eps)) QR^T, in place."""
    if g.size == 0:
        return
    products = (g @ g.T, g.T @ g)
    # A matrix that was not preconditioned before has no bases yet, at whatever t.
    begins = t == 1 or not QL[0].any()
    if not begins:
        b1, b2 = betas
        turned = QL.T @ g @ QR
        m *= b1
        scaled = (1.0 - b1) * turned
        m += scaled
        turned *= turned
        turned *= 1.0 - b2
        S *= b2
        S += turned
        np.sqrt(S, out=turned)
        turned += eps
        np.divide(m, turned, out=turned)
        np.matmul(QL @ turned, QR.T, out=g)
    for matrix, product in zip((L, R), products, strict=True):
        matrix *= shampoo_beta
        product *= 1.0 - shampoo_beta
        matrix += product
    if begins:
        QL[...] = eigenvectors(L)
        QR[...] = eigenvectors(R)
        m.fill(0)  # of Adam, in another basis: S would be too small for it
        g.fill(0)
    elif (t - 1) % precondition_frequency == 0:
        new_QL, rows = improved(L, QL)
        new_QR, columns = improved(R, QR)
        S[...] = S[rows][:, columns]
        m[...] = new_QL.T @ (QL @ m @ QR.T) @ new_QR
        QL[...] = new_QL
        QR[...] = new_QR


MATRICES = Matrixwise(
    direction,
    "v",
    adam_in_eigenbases,
    chosen="precondition",
    matrix_only=("shampoo_beta", "precondition_frequency"),
    matrices={
        "S": ("rows", "columns"),
        "L": ("rows", "rows"),
        "R": ("columns", "columns"),
        "QL": ("rows", "rows"),
        "QR": ("columns", "columns"),
    },
    reshape="first_axis",
    largest=10_000,
)


@rule(prepare, matrixwise=MATRICES, domains=DOMAINS)
def soap(p, g, m, v, h):
    if h.precondition > h.zero:
        return h.keep * (p - h.step_size * v), m, m * m
    p, m, v = adam(p, g, m, v, h)
    return h.keep * p, m, v
