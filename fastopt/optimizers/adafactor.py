"""`Adafactor`, the optimizer whose formulas stand in `fastopt.rules.adafactor`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.adafactor import adafactor


class Adafactor(Optimizer, rules=(adafactor,)):
    """Adafactor: a second moment in the memory of a row and a column, and steps relative to the size of p.

    Formula: ``b2 = 1 - t^beta2_decay``; ``row_var = b2 row_var + (1-b2) mean(g^2)`` over each row, ``col_var`` over
    each column; ``v = max(row_var col_var / max(mean(row_var), eps), eps^2)``; ``u = g / sqrt(v)``;
    ``p = (1 - lr weight_decay) p - min(lr, 1/sqrt(t)) max(min_rms, rms(p)) / max(1, rms(u) / clip_threshold) u``

    `rms` is the root of the mean square over a parameter. The rows of a parameter of more than two axes are those of
    ``p.reshape(p.shape[0], -1)``; one of fewer is a single row, and its v that of RMSprop: an override may set
    ``{"bound_mean": True}``, by which the mean of row_var is at least eps there as well. A matrix of 1000 x 1000 has
    2,000 numbers of states, Adam 2,000,000.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0: the largest step, relative to the rms of p.
        beta2_decay: <= 0, the exponent of t.
        eps: >= 0: v is at least eps^2 and 1.2e-38, and the mean of row_var at least eps.
        min_rms: >= 0, in units of p: the least scale of a step, for parameters that begin at 0.
        clip_threshold: > 0, no unit: the largest rms of u.
        weight_decay: >= 0; decoupled from the gradient.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    `torch.optim.Adafactor` computes the same for parameters of up to two axes, with its ``eps=(eps, min_rms)`` and
    ``d=clip_threshold``; its own default of eps is 1.2e-7 for float32. Of more axes it factors the last two.

    Source: Shazeer, Stern 2018, https://arxiv.org/abs/1804.04235

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adafactor({"W": np.ones((2, 2))}, lr=0.1)
    >>> _ = opt.step({"W": np.array([[1.0, -1.0], [2.0, -2.0]])})
    >>> opt.params["W"].round(4)
    array([[0.9, 1.1],
           [0.9, 1.1]])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 0.01,
        beta2_decay: Any = -0.8,
        eps: Any = 1e-30,
        min_rms: Any = 1e-3,
        clip_threshold: Any = 1.0,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            params,
            adafactor,
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            min_rms=min_rms,
            clip_threshold=clip_threshold,
            weight_decay=weight_decay,
            **options,
        )
