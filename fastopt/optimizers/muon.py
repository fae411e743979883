"""`Muon`, the optimizer whose formulas stand in `fastopt.rules.muon`."""

from __future__ import annotations

from typing import Any

from fastopt.optimizer import Optimizer
from fastopt.rules.muon import muon


class Muon(Optimizer, rules=(muon,)):
    """Muon: matrices step along their momentum, with nearly equal singular values; AdamW updates the rest.

    Formula: ``m = momentum m + (1-momentum) g``; ``O = orthogonalized((1-momentum) g + momentum m)``;
    ``p -= lr sqrt(max(1, rows/columns)) O``; other parameters: AdamW

    Muon treats 2-D parameters as matrices, unless an override sets ``{"orthogonal": False}``: embeddings and the last
    layer learn better with AdamW.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate of the matrices, >= 0.
        momentum: decay rate of m, in [0, 1].
        weight_decay: decoupled, >= 0, in units of 1/lr, or of 1/adamw_lr.
        nesterov: False orthogonalizes m itself.
        ns_steps: the number of Newton-Schulz steps, a whole number in [1, 100).
        ns_coefficients: the coefficients (a, b, c) of a Newton-Schulz step.
        eps: >= 0; the smallest norm by which u is divided.
        adjust_lr: ``"original"`` (in torch also None), or ``"match_rms_adamw"`` for steps as large as AdamW's, with
            AdamW's lr.
        adamw_lr, adamw_betas, adamw_eps: lr, betas and eps of the other parameters, as for `AdamW`.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range; in an override, ``orthogonal=True`` for a parameter that is not 2-D, or a
            hyperparameter that cannot act on its parameter (``lr`` where AdamW updates it: use ``adamw_lr``).

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
        params: Any = None,
        lr: Any = 1e-3,
        momentum: Any = 0.95,
        weight_decay: Any = 0.1,
        nesterov: bool = True,
        *,
        ns_steps: Any = 5,
        ns_coefficients: Any = (3.4445, -4.775, 2.0315),
        eps: Any = 1e-7,
        adjust_lr: str | None = "original",
        adamw_lr: Any = 3e-4,
        adamw_betas: Any = (0.9, 0.95),
        adamw_eps: Any = 1e-8,
        **options: Any,
    ):
        super().__init__(
            params,
            muon,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            eps=eps,
            adjust_lr="original" if adjust_lr is None else adjust_lr,
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            weight_decay=weight_decay,
            **options,
        )
