"""`DeviceSteps`: steps on a device, which decides by the gradients while the host goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt.kernels.contract import Asynchronous, Decision
from fastopt.signals import deferred_signals
from fastopt.step.info import StepInfo
from fastopt.step.norms import counted
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


class Candidates(NamedTuple):
    """The tables of hyperparameters for the steps that the next step may be."""

    version: int
    """`Plan.version`. The plan itself would keep the arrays: results outlive them."""
    unscale: float
    step: int
    """The number of the next step, where none in flight is skipped."""
    tables: np.ndarray
    """The tables of that step and of those before it."""


class DeviceSteps:
    """What an optimizer on a device keeps besides: steps in flight, how many were skipped, and a captured step."""

    def __init__(self, backend: Asynchronous, rule: Rule, options: StepOptions, members: int | None = None):
        """members : of a population, about each of which the host decides."""
        self.backend = backend
        # The device decides what the norm of all gradients decides, unless the host has to raise, or a product of
        # matrices or a copy of further inputs is skipped. By the norms of single ones the host decides, and waits.
        self.decides = options.measures and options.nonfinite != "raise" and options.clip_norm_per_tensor is None
        self.decides = self.decides and members is None
        by_host = rule.matrixwise is not None or rule.extra or rule.inputs
        self.decides = self.decides and not (options.skips and by_host)
        self.gated = self.decides and options.skips
        self.options = options
        self.in_flight: deque[tuple[StepInfo, Decision, int]] = deque()
        """Counted as made; the device may have skipped them. With the skips that were known at their launch."""
        self.known_skips = 0
        self.nonfinite = (0, 0)
        self.collected, self.skipped = False, 0
        """Whether results have arrived that the pipeline has not counted yet, and how many of the steps were skipped. A
        `StepInfo` fetches them from here: it outlives the optimizer, and must not hold its arrays."""
        self.skips = backend.zeros(1, np.dtype(np.int64)) if self.gated else None
        """How many steps the device has skipped, counted there."""
        self.recorded: Recorded | None = None
        self.candidates: Candidates | None = None
        """Of the step that was launched last; None where no step was in flight then."""

    def launched(self, info: StepInfo, decision: Decision, nonfinite: tuple[int, int]) -> None:
        """Send for the results of the step just launched, which are taken when they are read."""
        if not self.in_flight:
            self.nonfinite = nonfinite
        decision.send()
        self.in_flight.append((info, decision, self.known_skips))
        info.await_results(lambda pending: self.collect())

    def collect(self, most: int = 0) -> None:
        """Take the results of steps in flight; wait until at most `most` of them are still in flight."""
        while self.in_flight and (len(self.in_flight) > most or self.in_flight[0][1].arrived):
            with deferred_signals:
                info, decision, known = self.in_flight.popleft()
                norm, coefficient, finite = decision.read()
                self.nonfinite = counted(self.nonfinite, finite=finite)
                skip = not finite and self.options.skips
                self.collected = True
                self.skipped += skip
                self.known_skips += skip
                coefficient = 1.0 if skip else coefficient  # nothing was clipped
                step = info.launched_as - (self.known_skips - known)
                info.complete(norm, coefficient, step, skip, self.nonfinite)

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
        if self.options.clip_norm_per_tensor is not None:
            raise ValueError(
                f"clip_norm_per_tensor: must be None for a step that is captured in a CUDA graph, because the host "
                f"computes the coefficients; got {self.options.clip_norm_per_tensor!r}"
            )
        if rule.extra or rule.inputs:
            raise TypeError(f"rule {rule.name!r}: its further inputs cannot be captured in a CUDA graph")
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
