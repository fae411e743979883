"""`FTRL`, the optimizer whose formulas stand in `fastopt.rules.ftrl`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.ftrl import ftrl


class FTRL(Optimizer, rules=(ftrl,)):
    """FTRL-Proximal: Adagrad with an l1 term, which keeps parameters at exactly 0.

    Formula: ``z += lr g - (sqrt(n + g^2) - sqrt(n)) p``; ``n += g^2``; ``p = 0`` where ``|z| <= lr l1``, else
    ``p = (sign(z) lr l1 - z) / (beta + sqrt(n) + lr l2)``

    z begins where it holds p: at 0 for parameters that begin at 0, as in the paper. From then on p follows from z and
    n: a value written into a parameter between steps is lost in the next one. Decay by l2; ``weight_decay`` acts on g.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        beta: >= 0, in units of the gradient; it bounds the first steps. Keras has 0.
        l1: >= 0, the weight of ``|p|`` in the sum of all losses; in units of the gradient.
        l2: >= 0, the weight of ``p^2 / 2`` in the sum of all losses; in units of the gradient per parameter. Keras
            counts half of it.
        initial_accumulator_value: the initial n, >= 0, in units of the gradient squared. Keras has 0.1.
        weight_decay: L2, >= 0.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: McMahan et al. 2013, https://doi.org/10.1145/2487575.2488200, algorithm 1

    >>> import numpy as np, fastopt
    >>> opt = fastopt.FTRL({"w": np.zeros(3)}, lr=1.0, beta=1.0, l1=0.5)
    >>> _ = opt.step({"w": np.array([3.0, -1.5, 0.25])})
    >>> opt.params["w"]
    array([-0.625,  0.4  ,  0.   ])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 0.1,
        beta: Any = 1.0,
        l1: Any = 0.0,
        l2: Any = 0.0,
        weight_decay: Any = 0.0,
        *,
        initial_accumulator_value: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            params,
            ftrl,
            lr=lr,
            beta=beta,
            l1=l1,
            l2=l2,
            initial_accumulator_value=initial_accumulator_value,
            weight_decay=weight_decay,
            **options,
        )
