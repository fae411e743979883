"""`ScheduleFreeAdamW`, the optimizer whose formulas stand in `fastopt.rules.schedule_free_adamw`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastopt.hyper import NONE
from fastopt.optimizer import Optimizer
from fastopt.rule import rule
from fastopt.rules.schedule_free_adamw import prepare, schedule_free_adamw


@rule(prepare)
def average(p, g, z, v, h):  # type: ignore[no-untyped-def]
    """Move p from y to the average x."""
    return p + h.beyond * (p - z), z, v


class ScheduleFreeAdamW(
    Optimizer,
    rules=(schedule_free_adamw,),
    conventions={"keras": {"form": "keras", "weight_decay": NONE}, "optax": {"form": "optax"}},
):
    """Schedule-Free AdamW: an average of the iterates, used for evaluation, replaces the learning-rate schedule.

    Formula: g at ``y = (1-b1) z + b1 x``; ``v = b2 v + (1-b2) g^2``; ``d = g / (sqrt(v) + eps) + weight_decay y``;
    ``z -= gamma d``; ``x = (1-c) x + c z``

    ``opt.params`` holds y. Evaluate and export the model inside ``with opt.eval_params():``, where it holds x.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0. Keep it constant: a schedule of lr does not change the weights of the average.
        betas: (b1, b2): the weight of x in y, in (0, 1), and the decay rate of v, in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: decoupled, >= 0, at y.
        warmup_steps: >= 0; the number of steps over which gamma grows to lr.
        form: ``"paper"``, ``"optax"`` or ``"keras"``: the latter two correct the bias of v, not gamma, and average with
            other weights; see `fastopt.rules.schedule_free_adamw`. Keras decays elsewhere, so that weight_decay must be
            0 with ``convention="keras"``.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range.

    Source: Defazio et al. 2024, https://arxiv.org/abs/2405.15682, algorithm 1

    >>> import numpy as np, fastopt
    >>> opt = fastopt.ScheduleFreeAdamW({"w": np.zeros(1)}, lr=0.1, betas=(0.5, 0.0))
    >>> for _ in range(2):
    ...     _ = opt.step({"w": np.array([5.0])})
    >>> with opt.eval_params() as params:
    ...     print(params["w"].round(4))
    [-0.15]
    >>> opt.params["w"].round(4)
    array([-0.175])
    """

    def __init__(
        self,
        params: Any = None,
        lr: Any = 2.5e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        *,
        warmup_steps: Any = 0,
        form: str = "paper",
        **options: Any,
    ):
        super().__init__(
            params,
            schedule_free_adamw,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            form=form,
            **options,
        )

    @contextmanager
    def eval_params(self) -> Iterator[Any]:
        """Hold the parameters at the average x inside a ``with`` block, and yield them.

        At the end of the block, also after an exception, the parameters are restored, to the bit.

        Raises:
            RuntimeError: inside another such block.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.ScheduleFreeAdamW({"w": np.zeros(1)}, lr=0.1, betas=(0.5, 0.0))
        >>> for _ in range(2):
        ...     _ = opt.step({"w": np.array([5.0])})
        >>> with opt.eval_params() as params:
        ...     print(params["w"].round(4))
        [-0.15]
        """
        with self._running.moved(average, "eval_params") as params:
            yield params
