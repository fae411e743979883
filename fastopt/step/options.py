"""What surrounds the rule in a step: the options of it, gradients that are being accumulated, and what a step tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt.kernels.contract import clip_coefficient
from fastopt.rule import Choice, Flag, Interval

NONFINITE = Choice(("propagate", "skip", "zero", "raise"))
REDUCTION = Choice(("mean", "sum"))


def positive(name: str, value: Any, below: float = math.inf) -> float:
    """`value` as float; an error that names it unless it is a finite number in (0, below)."""
    number: float = Interval().check(name, value)
    if not 0.0 < number < below:
        raise ValueError(f"{name}={value!r}: expected a number > 0" + (f" and < {below:g}" if below < math.inf else ""))
    return number


@dataclass(frozen=True)
class Tail:
    """The options of a step that are no rule's: see `Optimizer`, whose arguments these are."""

    max_norm: float | None = None
    clip_value: float | None = None
    nonfinite: str = "propagate"
    ema: float | None = None
    zero_grad: bool = False
    maximize: bool = False

    @classmethod
    def checked(cls, max_norm: Any, clip_value: Any, nonfinite: Any, ema: Any, zero_grad: Any, maximize: Any) -> Tail:
        """A Tail of these options; TypeError or ValueError, naming the option, where one is out of range."""
        return cls(
            None if max_norm is None else positive("max_norm", max_norm),
            None if clip_value is None else positive("clip_value", clip_value),
            NONFINITE.check("nonfinite", nonfinite),
            None if ema is None else positive("ema", ema, below=1.0),
            Flag().check("zero_grad", zero_grad),
            Flag().check("maximize", maximize),
        )

    @property
    def measures(self) -> bool:
        """Whether a step needs a pass over the gradients before its update."""
        return self.max_norm is not None or self.waits

    @property
    def waits(self) -> bool:
        """Whether it matters if the gradients are finite."""
        return self.nonfinite != "propagate"

    @property
    def skips(self) -> bool:
        """Whether gradients that are not finite leave the step out."""
        return self.nonfinite == "skip"

    @property
    def sign(self) -> float:
        """What gradients are multiplied by to go downhill."""
        return -1.0 if self.maximize else 1.0

    @property
    def conditioning(self) -> dict[str, bool]:
        """The kernel's flags that decide of what the norm is."""
        return {"zero_nonfinite": self.nonfinite == "zero", "clip_value": self.clip_value is not None}

    @property
    def flags(self) -> dict[str, bool]:
        """The kernel's flags that these options set."""
        return {
            **self.conditioning,
            "clip_norm": self.max_norm is not None,
            "ema": self.ema is not None,
            "zero_grad": self.zero_grad,
        }

    def coefficient(self, norm: float) -> float:
        """What clipping by norm multiplies gradients of this norm by; NaN for NaN."""
        return 1.0 if self.max_norm is None else float(clip_coefficient(norm, self.max_norm))


def norm_of(partials: list[np.ndarray]) -> tuple[float, bool]:
    """The norm of the gradients whose partial sums these are, and whether all of them are finite."""
    # One column at a time: NumPy adds up a column of its own in pairs, in an order that depends on its length only.
    total = sum(float(part[:, 0].sum()) for part in partials)
    mark = sum(float(part[:, 1].sum()) for part in partials)
    return math.sqrt(total), mark == 0.0


class Pending:
    """Gradients that are being accumulated for the next step."""

    __slots__ = ("partials", "present", "weight")

    def __init__(self, parameters: int, partials: Any):
        """partials : zeros, a line for each block."""
        self.weight = 0.0
        self.present = np.zeros(parameters, np.bool_)
        self.partials = partials
        """Of the sums, as `fastopt.kernels.contract.Backend.add` leaves them."""


class StepInfo:
    """What a step did. On a device, reading it waits for the step where its gradients decide about the answer.

    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD({"w": np.zeros(2)}, lr=0.5, max_norm=1.0)
    >>> info = opt.step({"w": np.array([3.0, 4.0])})
    >>> info.step, info.grad_norm, round(info.clip_coefficient, 3), info.lr
    (1, 5.0, 0.2, 0.5)
    """

    __slots__ = ("_coefficient", "_fetch", "_measure", "_nonfinite", "_norm", "_schedule", "_skipped", "_step")

    def __init__(
        self,
        step: int,
        schedule: Any,
        measure: Callable[[int], float | None],
        norm: float | None = None,
        clip_coefficient: float = 1.0,
        skipped: bool = False,
        nonfinite: tuple[int, int] = (0, 0),
    ):
        self._step = step
        self._schedule = schedule
        self._measure = measure
        self._norm = norm
        self._coefficient = clip_coefficient
        self._fetch: Callable[[StepInfo], None] | None = None
        """Waits for what a device has not yet told, and hands it over by `_tell`."""
        self._skipped = skipped
        self._nonfinite = nonfinite

    def _tell(self, norm: float, clip_coefficient: float, step: int, skipped: bool, nonfinite: tuple[int, int]) -> None:
        """All that was not known when the step was launched."""
        self._norm, self._coefficient = norm, clip_coefficient
        self._step, self._skipped, self._nonfinite = step, skipped, nonfinite
        self._fetch = None

    def _told(self) -> StepInfo:
        """This, with nothing unknown in it."""
        if self._fetch is not None:
            self._fetch(self)
        return self

    @property
    def step(self) -> int:
        """The number of updates made so far, this one included."""
        return self._told()._step

    @property
    def skipped(self) -> bool:
        """Whether it changed nothing (``nonfinite="skip"``)."""
        return self._told()._skipped

    @property
    def nonfinite_consecutive(self) -> int:
        """How many steps in a row, this one included, found gradients that are NaN or infinite.

        Steps are counted where ``nonfinite`` is ``"skip"`` or ``"zero"``.
        """
        return self._told()._nonfinite[0]

    @property
    def nonfinite_total(self) -> int:
        """The same of all steps."""
        return self._told()._nonfinite[1]

    @property
    def lr(self) -> float | None:
        """The learning rate of this step (of parameters without an override); None for a rule that has none."""
        if callable(self._schedule):
            return float(self._schedule(self.step if self.skipped else self.step - 1))
        return None if self._schedule is None else float(self._schedule)

    @property
    def grad_norm(self) -> float | None:
        """The global norm of the gradients, in their own units, after ``clip_value`` and before ``max_norm``.

        Where the step needed none it takes a pass over ``opt.grads`` when it is read; None if they are not there any
        more: the next step was made, or ``zero_grad=True``.
        """
        if self._told()._norm is None:
            self._norm = self._measure(self._step)
        return self._norm

    @property
    def clip_coefficient(self) -> float:
        """What clipping by norm multiplied the gradients by; 1 where nothing was clipped."""
        return self._told()._coefficient

    def __repr__(self) -> str:
        told = [f"step={self.step}"]
        if self._norm is not None:
            told.append(f"grad_norm={self._norm:.6g}")
        if self.clip_coefficient != 1.0:
            told.append(f"clip_coefficient={self.clip_coefficient:.6g}")
        if self.nonfinite_total:
            told.append(f"nonfinite_consecutive={self.nonfinite_consecutive}")
            told.append(f"nonfinite_total={self.nonfinite_total}")
        return f"StepInfo({', '.join([*told, f'skipped={self.skipped}'])})"
