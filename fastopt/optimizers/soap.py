"""`SOAP`, the optimizer whose formulas stand in `fastopt.rules.soap`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.soap import soap


class SOAP(Optimizer, rules=(soap,)):
    """SOAP: Adam on matrices in the eigenbases of Shampoo's averages of products of the gradient; Adam for others.

    Formula: ``G = QL^T g QR``; ``m = b1 m + (1-b1) G``; ``S = b2 S + (1-b2) G^2``;
    ``p -= lr sqrt(1-b2^k)/(1-b1^k) QL (m / (sqrt(S) + eps)) QR^T``, k = t-1; ``p *= 1 - lr weight_decay``;
    ``L = shampoo_beta L + (1-shampoo_beta) g g^T``, R likewise of g^T g; QL and QR: eigenvectors of L and R

    Parameters of two and more dimensions are preconditioned, as matrices of ``shape[0]`` rows, unless they have more
    than 10,000 rows or columns; ``overrides={"embedding": {"precondition": False}}`` leaves one out. The first update
    of a matrix only makes its bases. S, L, R, QL and QR are states: 2 rows^2 + 2 columns^2 + rows columns numbers
    besides m and v.

    The results are those of ``pytorch_optimizer`` 4.1 and of the authors' code, but for the rounding to float32 there.
    There, shampoo_beta is betas[1] unless it is given, the first update of vectors is left out as well, the kernel of a
    convolution has a basis for each axis, and a matrix with one side beyond 10,000 has one for the other side.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        betas: decay rates of m and S, each in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: decoupled, >= 0, in units of 1/lr.
        shampoo_beta: decay rate of L and R, in [0, 1).
        precondition_frequency: the number of steps after which the bases are improved, a whole number >= 1.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range; in an override, ``precondition=True`` for a vector, or ``shampoo_beta`` where
            the parameter is not preconditioned.

    Source: Vyas et al. 2024, https://arxiv.org/abs/2409.11321, algorithm 3

    >>> import numpy as np, fastopt
    >>> opt = fastopt.SOAP({"W": np.zeros((2, 2))}, lr=0.1)
    >>> for _ in range(2):
    ...     _ = opt.step({"W": np.array([[0.0, 5.0], [3.0, 0.0]])})
    >>> opt.params["W"].round(4)
    array([[ 0.    , -0.0999],
           [-0.0999,  0.    ]])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 3e-3,
        betas: Any = (0.95, 0.95),
        eps: Any = 1e-8,
        weight_decay: Any = 0.01,
        *,
        shampoo_beta: Any = 0.95,
        precondition_frequency: Any = 10,
        **options: Any,
    ):
        super().__init__(
            params,
            soap,
            lr=lr,
            betas=betas,
            eps=eps,
            shampoo_beta=shampoo_beta,
            precondition_frequency=precondition_frequency,
            weight_decay=weight_decay,
            **options,
        )
