r"""Schedule-Free AdamW (Defazio et al. 2024, https://arxiv.org/abs/2405.15682, algorithm 1).

    y = (1 - b1) z + b1 x                     the gradient g is taken at y, which is what the parameters hold
    v = b2 v + (1 - b2) g^2
    d = g / (sqrt(v) + eps) + weight_decay y
    z = z - gamma d                           gamma = lr s_t,  s_t = sqrt(1 - b2^t) min(1, t / warmup_steps)
    x = (1 - c) x + c z                       c = s_t^2 / (s_1^2 + ... + s_t^2)

x, the average to evaluate with, is not stored: it is (y - (1 - b1) z) / b1. States: z, in units of the parameter, at
first the parameter; v, of the gradient squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastopt.optimizer import Optimizer
from fastopt.rule import POSITIVE_OR_ZERO, rule

EARLY = 4096
"""Of so many steps after the warm-up the weights are added up one by one; of the rest by a formula, which would lose
digits in the first steps, where 1 - b2^t is small."""


class Hyper(NamedTuple):
    b2: float
    one_minus_b2: float
    eps: float
    weight_decay: float
    gamma: float
    towards_z: float
    back: float
    beyond: float  # from y to x, as a multiple of the way from z to y


def weight(t: int, b2: float, warmup_steps: float) -> float:
    return (1.0 - b2**t) * (min(1.0, t / warmup_steps) if warmup_steps else 1.0) ** 2


@lru_cache(maxsize=32)
def early_sums(b2: float, warmup_steps: float) -> np.ndarray:
    """The sums of the first 0, 1, 2, ... weights."""
    steps = range(1, math.ceil(warmup_steps) + EARLY)
    return np.cumsum([0.0, *(weight(t, b2, warmup_steps) for t in steps)])


def sum_of_weights(t: int, b2: float, warmup_steps: float) -> float:
    sums = early_sums(b2, warmup_steps)
    last = len(sums) - 1
    if t <= last:
        return float(sums[t])
    return float(sums[last]) + (t - last) - (b2 ** (last + 1) - b2 ** (t + 1)) / (1.0 - b2)


def prepare(
    t: int, lr: float, betas: tuple[float, float], eps: float, warmup_steps: float, weight_decay: float
) -> Hyper:
    b1, b2 = betas
    this = weight(t, b2, warmup_steps)
    gamma, c = lr * math.sqrt(this), this / sum_of_weights(t, b2, warmup_steps)
    return Hyper(
        b2, 1.0 - b2, eps, weight_decay, gamma, c, gamma * (1.0 - b1 * (1.0 - c)), 1.0 / b1 - 1.0 if b1 else 0.0
    )


@rule(prepare, domains={"warmup_steps": POSITIVE_OR_ZERO}, initial={"z": "p"})
def schedule_free_adamw(p, g, z, v, h):
    v = h.b2 * v + h.one_minus_b2 * g * g
    d = g / (math.sqrt(v) + h.eps) + h.weight_decay * p
    # The new y, of the new x and z, with x written as y and z: (1-b1) z' + b1 ((1-c) x + c z').
    return p + h.towards_z * (z - p) - h.back * d, z - h.gamma * d, v


@rule(prepare, domains={"warmup_steps": POSITIVE_OR_ZERO}, initial={"z": "p"})
def average(p, g, z, v, h):
    return p + h.beyond * (p - z), z, v


class ScheduleFreeAdamW(Optimizer, rules=(schedule_free_adamw,)):
    """Schedule-Free AdamW: no learning-rate schedule, but an average of the iterates, to be used for evaluation.

    Formula: g at ``y = (1-b1) z + b1 x``; ``v = b2 v + (1-b2) g^2``; ``d = g / (sqrt(v) + eps) + weight_decay y``;
    ``z -= gamma d``; ``x = (1-c) x + c z``

    ``opt.params`` hold y. Evaluate, and export the model, inside ``with opt.eval_params():``, where they hold x.

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
        lr: learning rate, >= 0, held constant: a schedule of lr does not enter the weights of the average.
        betas: (b1, b2): the weight of x in y, in (0, 1), and the decay rate of v, in [0, 1).
        eps: >= 0, in units of the gradient.
        weight_decay: decoupled, >= 0, at y.
        warmup_steps: >= 0; over how many steps gamma grows to lr.
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
        params: Any,
        lr: Any = 2.5e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        *,
        warmup_steps: Any = 0,
        **options: Any,
    ):
        if not callable(betas) and schedule_free_adamw.check("betas", betas)[0] == 0.0:
            raise ValueError(f"betas={betas!r}: expected b1 > 0, the weight of the average x in y")
        super().__init__(
            params,
            schedule_free_adamw,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            **options,
        )

    @contextmanager
    def eval_params(self) -> Iterator[Any]:
        """Hold the parameters at the average x inside a ``with`` block, and yield them.

        On leaving, also by an exception, the parameters are what they were, to the bit.

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
        with self._moved(average, "eval_params") as params:
            yield params
