"""`Table` turns hyperparameters into the numbers that a kernel reads: one row per group, in the compute dtype."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.backends import Features, StepHyper

if TYPE_CHECKING:
    from fastopt.rule import Rule

WEIGHT_DECAY = "weight_decay"


class Table:
    """The rows of hyperparameters of one rule. This is the one place where host float64 becomes the compute dtype."""

    def __init__(self, rule: Rule, values: Mapping[str, Any], dtype: np.dtype[Any], rows: int = 1):
        """`values`: any complete set of the rule's hyperparameters; tells which NamedTuple `prepare` returns."""
        prepared = rule.prepare(1, *(values[name] for name in rule.hyperparameters))
        if not isinstance(prepared, tuple) or not hasattr(prepared, "_fields"):
            raise TypeError(f"prepare of rule {rule.name!r} must return a NamedTuple, found {type(prepared).__name__}")
        self.rule = rule
        self.hyper = type(prepared)
        width = len(StepHyper._fields) + len(self.hyper._fields)
        self.array = np.zeros((rows, width), dtype)
        row = struct.Struct(f"={width}{'f' if dtype.itemsize == 4 else 'd'}")
        self._pack_into = row.pack_into
        self._rows = self.array.data
        self._stride = row.size

    def write(self, row: int, t: int, values: Mapping[str, Any], unscale: float) -> None:
        """Write what update number `t` with these hyperparameters needs into `row`.

        Raises ValueError where a number is not finite in the compute dtype; the row is then as it was.
        """
        rule = self.rule
        prepared = rule.prepare(t, *[values[name] for name in rule.hyperparameters])
        decay = values[WEIGHT_DECAY]
        keep = 1.0 - values["lr"] * decay if rule.decoupled else 1.0
        try:
            if not math.isfinite(sum(prepared)):
                raise OverflowError
            self._pack_into(self._rows, row * self._stride, unscale, decay, keep, *prepared)
        except OverflowError:
            raise ValueError(
                f"hyperparameters of rule {rule.name!r} at step {t} leave the range of {self.array.dtype}: {prepared}"
            ) from None

    def features(self, *, decays: bool, unscale: bool) -> Features:
        """The kernel's flags where some group decays its weights (`decays`) and gradients are scaled (`unscale`)."""
        by_loop = decays and not self.rule.owns_weight_decay
        return Features(
            unscale=unscale, l2=by_loop and not self.rule.decoupled, decoupled=by_loop and self.rule.decoupled
        )


def check_grad_scale(grad_scale: Any) -> float:
    """`grad_scale` as a float; an error where it is not finite and positive."""
    if not isinstance(grad_scale, Real | np.floating) or isinstance(grad_scale, bool):
        raise TypeError(f"grad_scale={grad_scale!r}: expected a positive finite number")
    number = float(grad_scale)
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"grad_scale={grad_scale!r}: expected a positive finite number")
    return number
