"""`Rprop`, the optimizer whose formulas stand in `fastopt.rules.rprop`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.rprop import rprop


class Rprop(Optimizer, rules=(rprop,), conventions={"torch": {}}):
    """Rprop: each element has its own step size, which grows while the gradient keeps its sign. For full batches.

    Formula: ``s *= eta_plus`` where the sign of g stays, ``s *= eta_minus`` and ``g = 0`` where it changes;
    ``p -= s sign(g)``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: the initial step size of every element, >= 0.
        etas: (eta_minus, eta_plus), in (0, 1) and > 1.
        step_sizes: the smallest and the largest step size, 0 <= smallest <= largest.
        weight_decay: L2, >= 0.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623; the variant of torch.optim.Rprop

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Rprop({"w": np.zeros(1)}, lr=0.1)
    >>> for g in (5.0, 1e-3):
    ...     _ = opt.step({"w": np.array([g])})
    >>> opt.params["w"].round(4)
    array([-0.22])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-2,
        etas: Any = (0.5, 1.2),
        step_sizes: Any = (1e-6, 50.0),
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(params, rprop, lr=lr, etas=etas, step_sizes=step_sizes, weight_decay=weight_decay, **options)
