"""`DeviceSteps`: steps on a device, which decides by the gradients while the host goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt.kernels.contract import Asynchronous, Decision
from fastopt.step.info import StepInfo
from fastopt.step.options import StepOptions

if TYPE_CHECKING:
    from fastopt.rule import Rule

MOST_IN_FLIGHT = 8
"""Steps whose results the host does not know yet; then it waits for the first of them."""


class Recorded(NamedTuple):
    """A step that was captured in a CUDA graph."""

    table: Any
    """Where its hyperparameters are, on the device."""
    rows: Sequence[int]
    scaled: bool
    decision: Decision | None


class DeviceSteps:
    """What an optimizer on a device keeps besides: steps in flight, how many were skipped, and a captured step."""

    def __init__(self, backend: Asynchronous, rule: Rule, options: StepOptions):
        self.backend = backend
        # The device decides what the norm decides, unless the host has to raise, or a product of matrices is skipped.
        self.decides = options.measures and options.nonfinite != "raise"
        self.decides = self.decides and not (options.skips and rule.matrixwise is not None)
        self.gated = self.decides and options.skips
        self.options = options
        self.in_flight: deque[tuple[StepInfo, Decision]] = deque()
        """Counted as made; the device may have skipped them."""
        self.known_skips = 0
        self.skips = backend.zeros(1, np.dtype(np.int64)) if self.gated else None
        """How many steps the device has skipped, counted there."""
        self.recorded: Recorded | None = None

    def check_place(self, number: int | None) -> None:
        """Refuse to work on arrays of another device than the current one."""
        if self.backend.device != number:
            raise ValueError(
                f"the arrays are on device {number}, and the current device is {self.backend.device}: work with them "
                f"in `with cupy.cuda.Device({number}):`"
            )

    def check_capture(self, rule: Rule, partial: bool) -> None:
        """Refuse to capture a step that the host decides about; partial: of gradients that are None or accumulated."""
        if self.options.waits:
            raise ValueError(
                f"nonfinite: must be 'propagate' for a step that is captured in a CUDA graph, because the host counts "
                f"such steps; got {self.options.nonfinite!r}"
            )
        if rule.matrixwise is not None:
            raise TypeError(f"rule {rule.name!r}: its products of matrices cannot be captured in a CUDA graph")
        if partial:
            raise ValueError(
                "grads: a step with accumulated gradients, or with None, cannot be captured in a CUDA graph"
            )

    def decide(self, table: Any, candidates: np.ndarray | None, partials: Any, factor: float) -> Decision:
        """Have the device decide what the norm decides."""
        skipped = None if self.skips is None else (self.skips, self.known_skips)
        return self.backend.decide(table, candidates, partials, factor, self.options.max_norm, skipped)
