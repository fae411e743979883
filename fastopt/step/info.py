"""`StepInfo`: what a step did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastopt import scalars


class StepInfo:
    """What a step did. On a device, reading a result that depends on the gradients waits for the step.

    In a population, `skipped`, `grad_norm`, `clip_coefficient`, the counters of steps with gradients that are not
    finite, and an `lr` that differs are arrays with a number for each member.

    >>> import numpy as np, fastopt
    >>> opt = fastopt.SGD({"w": np.zeros(2)}, lr=0.5, max_norm=1.0)
    >>> info = opt.step({"w": np.array([3.0, 4.0])})
    >>> info.step, info.grad_norm, round(info.clip_coefficient, 3), info.lr
    (1, 5.0, 0.2, 0.5)
    """

    __slots__ = ("_coefficient", "_lr", "_nonfinite", "_norm", "_pending", "_skipped", "_step")

    def __init__(
        self,
        step: int,
        lr: Any,
        norm: Any = None,
        clip_coefficient: Any = 1.0,
        skipped: Any = False,
        nonfinite: tuple[Any, Any] = (0, 0),
    ):
        """lr : a number, a schedule, or None. In a population, an array may take the place of each number."""
        self._step = step
        self._lr = lr
        self._norm = norm
        self._coefficient = clip_coefficient
        self._skipped = skipped
        self._nonfinite = nonfinite
        self._pending: Callable[[StepInfo], None] | None = None

    def await_results(self, fetch: Callable[[StepInfo], None]) -> None:
        """Have a function called when a result is read.

        Args:
            fetch: a function of this object that waits for the device and calls `complete`.

        >>> from fastopt.step.info import StepInfo
        >>> info = StepInfo(1, 0.5)
        >>> info.await_results(lambda info: info.complete(5.0, 0.2, 1, False, (0, 0)))
        >>> info.grad_norm
        5.0
        """
        self._pending = fetch

    def complete(
        self, norm: float, clip_coefficient: float, step: int, skipped: bool, nonfinite: tuple[int, int]
    ) -> None:
        """Take the results that were not known when the step was launched.

        Args:
            norm: of the gradients, >= 0; NaN or infinite where they are.
            clip_coefficient: in [0, 1], or NaN.
            step: how many updates were made, this one included.
            skipped: whether this one was skipped.
            nonfinite: steps in a row, and in all, whose gradients were not finite.

        >>> from fastopt.step.info import StepInfo
        >>> info = StepInfo(4, 0.5)
        >>> info.complete(float("inf"), 1.0, 3, True, (1, 2))
        >>> info.step, info.skipped, info.nonfinite_total
        (3, True, 2)
        """
        self._norm, self._coefficient = norm, clip_coefficient
        self._step, self._skipped, self._nonfinite = step, skipped, nonfinite
        self._pending = None

    @property
    def launched_as(self) -> int:
        """The number of updates, this one included, as it was known at the launch."""
        return self._step

    def _known(self) -> StepInfo:
        """This, after waiting for the results that are pending."""
        if self._pending is not None:
            self._pending(self)
        return self

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """What is copied and pickled: the results, after waiting for them."""
        self._known()
        return None, {name: getattr(self, name) for name in self.__slots__}

    @property
    def step(self) -> int:
        """The number of updates made so far, this one included."""
        return self._known()._step

    @property
    def skipped(self) -> Any:
        """Whether it changed nothing (``nonfinite="skip"``)."""
        return self._known()._skipped

    @property
    def nonfinite_consecutive(self) -> Any:
        """How many steps in a row, this one included, found gradients that are NaN or infinite.

        Steps are counted where ``nonfinite`` is ``"skip"`` or ``"zero"``.
        """
        return self._known()._nonfinite[0]

    @property
    def nonfinite_total(self) -> Any:
        """The same of all steps."""
        return self._known()._nonfinite[1]

    @property
    def lr(self) -> Any:
        """The learning rate of this step (of parameters without an override); None for a rule that has none."""
        skipped = bool(np.all(self.skipped))
        lr = self._lr(self.step if skipped else self.step - 1) if callable(self._lr) else self._lr
        if getattr(lr, "ndim", 0) == 1:
            return np.asarray(lr, np.float64)
        return None if lr is None else float(scalars.unwrap(lr))

    @property
    def grad_norm(self) -> Any:
        """The global norm of the gradients, in their own units, after ``clip_value`` and before ``max_norm``.

        None where the step did not need it: the gradients may have been overwritten since. ``grad_norm=True`` of the
        optimizer measures it in every step.
        """
        return self._known()._norm

    @property
    def clip_coefficient(self) -> Any:
        """What clipping by norm multiplied the gradients by; 1 where nothing was clipped.

        With ``clip_norm_per_tensor`` each gradient has a coefficient of its own: this is the smallest, or NaN.
        """
        return self._known()._coefficient

    def __repr__(self) -> str:
        shown = [f"step={self.step}"]
        if isinstance(self.skipped, np.ndarray):
            return f"StepInfo({shown[0]}, skipped={int(self.skipped.sum())} of {len(self.skipped)} members)"
        if self._norm is not None:
            shown.append(f"grad_norm={self._norm:.6g}")
        if self.clip_coefficient != 1.0:
            shown.append(f"clip_coefficient={self.clip_coefficient:.6g}")
        if self.nonfinite_total:
            shown.append(f"nonfinite_consecutive={self.nonfinite_consecutive}")
            shown.append(f"nonfinite_total={self.nonfinite_total}")
        return f"StepInfo({', '.join([*shown, f'skipped={self.skipped}'])})"
