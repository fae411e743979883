"""`LossScaler`: a dynamic scale of the loss, so that gradients of 16 bits neither vanish nor overflow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastopt import scalars
from fastopt.hyper import Flag
from fastopt.optimizer import Optimizer
from fastopt.step.info import StepInfo

FIELDS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "growth_tracker")


class LossScaler:
    r"""Multiplies the loss by a scale that grows while gradients are finite, and shrinks when they are not.

    Gradients below 6e-8 are 0 in float16. Compute those of ``scaler.scale * loss`` and pass them to `step`: the
    optimizer divides them by the scale in float32, in the pass that updates, and skips the step where one is not
    finite. Then

        scale = scale * backoff_factor         after a step that was skipped
        scale = scale * growth_factor          after growth_interval steps in a row that were not

    bfloat16 has the range of float32: it needs no scale.

    Args:
        init_scale: the first scale, a positive finite number.
        growth_factor: > 1.
        backoff_factor: in (0, 1).
        growth_interval: an int from 1.
        enabled: False leaves the scale at 1.

    Attributes:
        scale: what to multiply the loss by.

    Raises:
        TypeError, ValueError: naming the argument that is out of range.

    The rule is that of ``torch.amp.GradScaler`` (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

    >>> import numpy as np, fastopt
    >>> params = fastopt.pack({"w": np.ones(2, np.float16)})
    >>> opt = fastopt.SGD(params, lr=0.5, nonfinite="skip")
    >>> scaler = fastopt.LossScaler(init_scale=1024.0)
    >>> scaler.step(opt, {"w": np.array([1024.0, -2048.0], np.float16)})
    StepInfo(step=1, grad_norm=2.23607, skipped=False)
    >>> opt.params["w"]
    array([0.5, 2. ], dtype=float16)
    >>> scaler.step(opt, {"w": np.array([np.inf, 0.0], np.float16)}).skipped, scaler.scale
    (True, 512.0)
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        self.enabled = Flag().check("enabled", enabled)
        self.scale = _within("init_scale", init_scale, 0.0, math.inf) if self.enabled else 1.0
        self.growth_factor = _within("growth_factor", growth_factor, 1.0, math.inf)
        self.backoff_factor = _within("backoff_factor", backoff_factor, 0.0, 1.0)
        self.growth_interval = scalars.count("growth_interval", growth_interval, 1)
        self.growth_tracker = 0
        """Steps in a row that were not skipped, since the scale last changed."""

    def step(self, optimizer: Optimizer, grads: Any = None, **options: Any) -> StepInfo:
        """Make a step with gradients of the scaled loss, and adjust the scale.

        Args:
            optimizer: an `Optimizer` with ``nonfinite="skip"``.
            grads: as for `Optimizer.step`.
            **options: others of `Optimizer.step`.

        Returns:
            Its `StepInfo`.

        Raises:
            TypeError, ValueError: the optimizer does not skip steps, or is a population, whose members share a loss
                scale; and as `Optimizer.step`.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.ones(1, np.float32)}, lr=1.0, nonfinite="skip")
        >>> fastopt.LossScaler(init_scale=4.0).step(opt, {"w": np.array([2.0], np.float32)}).step
        1
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: must be a fastopt.Optimizer, got {type(optimizer).__name__}")
        if not optimizer._options.skips and self.enabled:
            raise ValueError(f"optimizer: must have nonfinite='skip', got nonfinite={optimizer._options.nonfinite!r}")
        if optimizer.members is not None:
            raise ValueError(f"optimizer: must be of one network, got members={optimizer.members}")
        info = optimizer.step(grads, grad_scale=self.scale, **options)
        self.update(skipped=bool(info.skipped))
        return info

    def update(self, *, skipped: bool) -> None:
        """Adjust the scale after a step: for those who pass ``grad_scale=scaler.scale`` themselves.

        Args:
            skipped: whether the step was.

        >>> scaler = LossScaler(init_scale=8.0, growth_interval=2)
        >>> for _ in range(2):
        ...     scaler.update(skipped=False)
        >>> scaler.scale
        16.0
        """
        if not self.enabled:
            return
        if skipped:
            self.scale, self.growth_tracker = self.scale * self.backoff_factor, 0
            return
        self.growth_tracker += 1
        if self.growth_tracker == self.growth_interval:
            grown = self.scale * self.growth_factor
            if 1.0 / grown >= SMALLEST:
                self.scale = grown
            self.growth_tracker = 0

    def state_dict(self) -> dict[str, Any]:
        """The scale and what it follows from, as numbers: for `Optimizer.save`'s ``extra``.

        >>> LossScaler(init_scale=4.0).state_dict()["scale"]
        4.0
        """
        return {name: getattr(self, name) for name in FIELDS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Args:
            state: a mapping of numbers, by name.

        Raises:
            TypeError, ValueError: naming the entry that is missing or out of range. The scaler is then as it was.

        >>> scaler = LossScaler()
        >>> scaler.load_state_dict(LossScaler(init_scale=4.0).state_dict())
        >>> scaler.scale
        4.0
        """
        missing = [name for name in FIELDS if name not in state]
        if missing:
            raise ValueError(f"state: must have {', '.join(FIELDS)}, got no {missing[0]}")
        twin = LossScaler(*[state[name] for name in FIELDS[:-1]])
        twin.growth_tracker = scalars.count("growth_tracker", state["growth_tracker"], 0)
        twin.enabled = self.enabled
        self.__dict__.update(twin.__dict__)

    def __repr__(self) -> str:
        return f"<LossScaler: {self.scale:g}>"


SMALLEST = 2.0**-126
"""The inverse of a scale is a normal number of float32."""


def _within(name: str, value: Any, low: float, high: float) -> float:
    number = scalars.number(name, value)
    if not low < number < high:
        upper = "" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{name}: must be a finite number > {low:g}{upper}, got {value!r}")
    return number
