"""`Shampoo`, the optimizer whose formulas stand in `fastopt.rules.shampoo`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.shampoo import shampoo


class Shampoo(Optimizer, rules=(shampoo,)):
    """Shampoo: matrices step along their gradient, divided by roots of the sums of its products; AdaGrad for others.

    Formula: ``L += g g^T``; ``R += g^T g``; ``m = momentum m + (1-momentum) g``;
    ``p -= lr (L + eps I)^(-1/4) m (R + eps I)^(-1/4)``; other parameters: ``v += g^2``; ``p -= lr m / sqrt(v + eps)``

    Parameters of two and more dimensions are preconditioned, as matrices of ``shape[0]`` rows, unless they have more
    than 10,000 rows or columns; ``overrides={"embedding": {"precondition": False}}`` leaves one out. L, R and their
    roots are states: 2 rows^2 + 2 columns^2 numbers besides m and v.

    This is the form of the paper, and of ``pytorch_optimizer`` 4.1 with ``momentum=0`` and ``eps=1e-6``. There a
    momentum mixes earlier steps into the gradient; here it averages gradients, and L and R are those of the gradient
    itself. ``torch_optimizer`` has the exponent 1/2, and its R is that of the gradient after L.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        momentum: decay rate of m, in [0, 1]; 0 steps along the gradient.
        weight_decay: L2, added to the gradient, >= 0.
        eps: > 0, in units of the squared gradient.
        exponent: of the inverse roots, in (0, 1]; 1/4 is the paper's.
        precondition_frequency: the number of steps after which the roots are computed again, a whole number >= 1.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range; in an override, ``precondition=True`` for a vector, or ``exponent`` where the
            parameter is not preconditioned.

    Source: Gupta et al. 2018, https://arxiv.org/abs/1802.09568

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Shampoo({"W": np.zeros((2, 2))}, lr=0.1, eps=1e-12)
    >>> _ = opt.step({"W": np.array([[0.0, 5.0], [3.0, 0.0]])})
    >>> opt.params["W"].round(4)
    array([[ 0. , -0.1],
           [-0.1,  0. ]])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 0.1,
        momentum: Any = 0.0,
        weight_decay: Any = 0.0,
        *,
        eps: Any = 1e-4,
        exponent: Any = 0.25,
        precondition_frequency: Any = 1,
        **options: Any,
    ):
        super().__init__(
            params,
            shampoo,
            lr=lr,
            momentum=momentum,
            eps=eps,
            exponent=exponent,
            precondition_frequency=precondition_frequency,
            weight_decay=weight_decay,
            **options,
        )
