"""`AdamW`, the optimizer whose formulas stand in `fastopt.rules.adamw`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizers.adam import KERAS, Adam
from fastopt.rules.adamw import adamw, adamw_amsgrad


class AdamW(
    Adam,
    rules=(adamw, adamw_amsgrad),
    conventions={"torch": {}, "keras": {**KERAS, "weight_decay": 0.004}, "optax": {"weight_decay": 1e-4}},
):
    """AdamW: Adam whose weight decay shrinks the parameters directly, instead of passing through the moments.

    Formula: ``p *= 1 - lr weight_decay``, then Adam

    Args:
        weight_decay: decoupled, >= 0, in units of 1/lr.
        params, lr, betas, eps, amsgrad, eps_inside, bias_correction, eps_hat, **options: as for `Adam`.

    Raises:
        ValueError: a number out of range.

    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2

    >>> import numpy as np, fastopt
    >>> opt = fastopt.AdamW({"w": np.ones(1)}, lr=0.1, weight_decay=0.5)
    >>> _ = opt.step({"w": np.zeros(1)})
    >>> opt.params["w"]
    array([0.95])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.01,
        amsgrad: bool = False,
        *,
        eps_inside: bool = False,
        bias_correction: bool = True,
        eps_hat: bool = False,
        **options: Any,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            eps_inside=eps_inside,
            bias_correction=bias_correction,
            eps_hat=eps_hat,
            **options,
        )
