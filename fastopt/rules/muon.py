r"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices, AdamW for the rest.

    p = p - lr weight_decay p
    m = momentum m + (1 - momentum) g
    u = (1 - momentum) g + momentum m             u = m without nesterov
    O = the orthogonal matrix nearest to u, but for singular values between about 0.7 and 1.2, by ns_steps of
        X = a X + (b X X^T + c (X X^T)^2) X,      from X = u / norm(u)
    p = p - lr s O                                s = sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns))

States: m, in units of the gradient; v, which holds s O of a matrix, and Adam's v of the rest.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastopt.optimizer import Optimizer
from fastopt.rule import Choice, Domain, Flag, Interval, Matrixwise, rule
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
    keep: float
    orthogonal: float
    momentum: float
    fresh: float
    of_g: float
    of_m: float
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
    of_adam = prepare_adam(t, adamw_lr, adamw_betas, adamw_eps, False, True)
    if orthogonal:
        of_adam = of_adam._replace(step_size=lr)
    keep = 1.0 - (lr if orthogonal else adamw_lr) * weight_decay
    fresh = 1.0 - momentum
    of_g, of_m = (fresh, momentum) if nesterov else (0.0, 1.0)
    return Hyper(*of_adam, keep, float(orthogonal), momentum, fresh, of_g, of_m, 0.0)


DOMAINS: dict[str, Domain] = {
    "nesterov": Flag(),
    "ns_steps": Interval(1.0, 100.0),
    "ns_coefficients": Interval(length=3),
    "adjust_lr": Choice(("original", "match_rms_adamw")),
    "orthogonal": Flag(),
    "adamw_lr": Interval(0.0),
    "adamw_betas": Interval(0.0, 1.0, open=True, length=2),
    "adamw_eps": Interval(0.0),
}


@rule(prepare, domains=DOMAINS)
def direction(p, g, m, v, h):
    m = h.momentum * m + h.fresh * g
    return p, m, h.of_g * g + h.of_m * m


def orthogonalize(
    u: Any,
    ns_steps: float,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    adjust_lr: str,
    **other: Any,
) -> None:
    """Make of the matrix u the nearest orthogonal one, nearly, times s: in place, by products of matrices alone."""
    rows, columns = u.shape
    if u.size == 0:
        return
    a, b, c = ns_coefficients
    norm = math.sqrt(float((u.astype(np.float64) ** 2).sum()))  # that of float32 overflows beyond 1e19
    X = u / max(norm, eps) if rows <= columns else u.T / max(norm, eps)
    for _ in range(int(ns_steps)):
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    s = math.sqrt(max(1.0, rows / columns)) if adjust_lr == "original" else 0.2 * math.sqrt(max(rows, columns))
    u[...] = s * (X if rows <= columns else X.T)


@rule(prepare, matrixwise=Matrixwise(direction, "v", orthogonalize, "orthogonal"), domains=DOMAINS)
def muon(p, g, m, v, h):
    p = h.keep * p
    if h.orthogonal > h.zero:
        return p - h.step_size * v, m, v
    return adam(p, g, m, v, h)


class Muon(Optimizer, rules=(muon,)):
    """Muon: matrices step along their momentum with all singular values made nearly equal; AdamW does the rest.

    Formula: ``m = momentum m + (1-momentum) g``; ``O = orthogonalized((1-momentum) g + momentum m)``;
    ``p -= lr sqrt(max(1, rows/columns)) O``; other parameters: AdamW

    Matrices are the 2-D parameters, but for those whose override says ``{"orthogonal": False}``: embeddings and the
    last layer learn better by AdamW.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
        lr: learning rate of the matrices, >= 0.
        momentum: decay rate of m, in [0, 1].
        weight_decay: decoupled, >= 0, in units of 1/lr, or of 1/adamw_lr.
        nesterov: False orthogonalizes m itself.
        ns_steps: how many Newton-Schulz steps, from 1.
        ns_coefficients: their (a, b, c).
        eps: >= 0; the least norm that u is divided by.
        adjust_lr: ``"original"``, or ``"match_rms_adamw"`` for steps as large as AdamW's, so that its lr will do.
        adamw_lr, adamw_betas, adamw_eps: lr, betas and eps of the other parameters, as for `AdamW`.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range; ``orthogonal=True`` in an override of a parameter that is no matrix.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/

    >>> import numpy as np, fastopt
    >>> exact = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 20}
    >>> opt = fastopt.Muon({"W": np.zeros((2, 2)), "b": np.zeros(2)}, lr=0.1, **exact)
    >>> _ = opt.step({"W": np.array([[0.0, 5.0], [3.0, 0.0]]), "b": np.ones(2)})
    >>> opt.params["W"].round(4)
    array([[ 0. , -0.1],
           [-0.1,  0. ]])
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: Any = 0.95,
        weight_decay: Any = 0.1,
        nesterov: bool = True,
        *,
        ns_steps: Any = 5,
        ns_coefficients: Any = (3.4445, -4.775, 2.0315),
        eps: Any = 1e-7,
        adjust_lr: str = "original",
        adamw_lr: Any = 3e-4,
        adamw_betas: Any = (0.9, 0.95),
        adamw_eps: Any = 1e-8,
        **options: Any,
    ):
        if DOMAINS["ns_steps"].check("ns_steps", ns_steps) % 1.0:
            raise ValueError(f"ns_steps={ns_steps!r}: expected a whole number from 1")
        super().__init__(
            params,
            muon,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            eps=eps,
            adjust_lr=adjust_lr,
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            weight_decay=weight_decay,
            **options,
        )
