"""`StepOptions`: what surrounds the rule in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt import scalars
from fastopt.hyper import Choice, Flag, Interval
from fastopt.kernels.contract import clip_coefficient, rescaling

MIN_8BIT_SIZE = 4096
"""The smallest parameters whose states have codes of 8 bits: biases and the gains of norms are few and matter."""
ROUNDING = Choice(("nearest", "stochastic"))
NONFINITE = Choice(("propagate", "skip", "zero", "raise"))
REDUCTION = Choice(("mean", "sum"))


def positive(name: str, value: Any, below: float = math.inf) -> float:
    """`value` as float; an error that names it unless it is a finite number in (0, below)."""
    number: float = Interval().check(name, value)
    if not 0.0 < number < below:
        expected = "a number > 0" + (f" and < {below:g}" if below < math.inf else "")
        raise ValueError(f"{name}: must be {expected}, got {value!r}")
    return number


def _sizes(given: Any) -> int | dict[str, int]:
    """`min_8bit_size`, checked."""
    expected = "an int from 0, or a dict of such by globs of parameter paths"
    if not isinstance(given, Mapping):
        return scalars.count("min_8bit_size", given, 0, expected)
    for glob in given:
        if not isinstance(glob, str):
            raise TypeError(f"min_8bit_size: must be {expected}, got the key {glob!r}")
    return {glob: scalars.count(f"min_8bit_size[{glob!r}]", size, 0, expected) for glob, size in given.items()}


@dataclass(frozen=True)
class StepOptions:
    """The options of a step that do not belong to the rule. They are arguments of `Optimizer`, and documented there."""

    max_norm: float | None = None
    clip_norm_per_tensor: float | None = None
    clip_value: float | None = None
    nonfinite: str = "propagate"
    ema: float | None = None
    zero_grad: bool = False
    maximize: bool = False
    grad_norm: bool = False
    states: str | Mapping[str, str] | None = None
    master: bool | None = None
    rounding: str = "nearest"
    compensated: bool = False
    seed: int = 0
    min_8bit_size: int | Mapping[str, int] = MIN_8BIT_SIZE

    @classmethod
    def checked(
        cls,
        max_norm: Any = None,
        clip_norm_per_tensor: Any = None,
        clip_value: Any = None,
        nonfinite: Any = "propagate",
        ema: Any = None,
        zero_grad: Any = False,
        maximize: Any = False,
        grad_norm: Any = False,
        states: Any = None,
        master: Any = None,
        rounding: Any = "nearest",
        compensated: Any = False,
        seed: Any = 0,
        min_8bit_size: Any = MIN_8BIT_SIZE,
    ) -> StepOptions:
        """These options, checked; TypeError or ValueError, naming the option, where one is out of range."""
        if max_norm is not None and clip_norm_per_tensor is not None:
            raise ValueError(
                f"clip_norm_per_tensor: must be None together with max_norm={max_norm!r}, got "
                f"{clip_norm_per_tensor!r}; choose one of them"
            )
        return cls(
            None if max_norm is None else positive("max_norm", max_norm),
            None if clip_norm_per_tensor is None else positive("clip_norm_per_tensor", clip_norm_per_tensor),
            None if clip_value is None else positive("clip_value", clip_value),
            NONFINITE.check("nonfinite", nonfinite),
            None if ema is None else positive("ema", ema, below=1.0),
            Flag().check("zero_grad", zero_grad),
            Flag().check("maximize", maximize),
            Flag().check("grad_norm", grad_norm),
            dict(states) if isinstance(states, Mapping) else states,
            None if master is None else Flag().check("master", master),
            ROUNDING.check("rounding", rounding),
            Flag().check("compensated", compensated),
            scalars.count("seed", seed, 0),
            _sizes(min_8bit_size),
        )

    @property
    def stochastic(self) -> bool:
        """Whether numbers of 16 bits are rounded at random."""
        return self.rounding == "stochastic"

    @property
    def measures(self) -> bool:
        """Whether a step needs a pass over the gradients before its update."""
        return self.clips or self.grad_norm or self.waits

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped by norm: by that of all of them, or each by its own."""
        return self.max_norm is not None or self.clip_norm_per_tensor is not None

    @property
    def waits(self) -> bool:
        """Whether the step depends on the gradients being finite."""
        return self.nonfinite != "propagate"

    @property
    def skips(self) -> bool:
        """Whether a step whose gradients are not finite is skipped."""
        return self.nonfinite == "skip"

    @property
    def sign(self) -> float:
        """The factor of gradients: -1 where the objective is maximised."""
        return -1.0 if self.maximize else 1.0

    @property
    def conditioning(self) -> dict[str, bool]:
        """The kernel's flags that change the gradients before their norm is taken."""
        return {"zero_nonfinite": self.nonfinite == "zero", "clip_value": self.clip_value is not None}

    @property
    def flags(self) -> dict[str, bool]:
        """The kernel's flags that these options set."""
        return {
            **self.conditioning,
            "clip_norm": self.clips,
            "ema": self.ema is not None,
            "zero_grad": self.zero_grad,
        }

    def coefficient(self, norm: float) -> float:
        """What clipping by norm multiplies gradients of this norm by; NaN for NaN."""
        return 1.0 if self.max_norm is None else float(clip_coefficient(norm, self.max_norm))

    def coefficients_of_members(self, norms: np.ndarray) -> np.ndarray:
        """The same for the norm of each member of a population."""
        if self.max_norm is None:
            return np.ones_like(norms)
        return np.minimum(rescaling(norms, self.max_norm), 1.0)

    def coefficients(self, norms: np.ndarray) -> np.ndarray:
        """What clipping by norm multiplies each of the gradients of these norms by, in Keras' form; NaN for NaN."""
        limit = self.clip_norm_per_tensor
        return np.ones_like(norms) if limit is None else np.asarray(limit / np.maximum(norms, limit))
