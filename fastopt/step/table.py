"""`Table` turns hyperparameters into the numbers that a kernel reads: one row per group, in the compute dtype."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt.kernels.contract import StepHyper

if TYPE_CHECKING:
    from fastopt.rule import Rule

EMA = "ema"
"""The name of the moving average of the parameters among the arrays of an optimizer."""
WEIGHT_DECAY = "weight_decay"
UNSCALE, CLIP_VALUE, COEFFICIENT = (StepHyper._fields.index(name) for name in ("unscale", "clip_value", "coefficient"))


def is_normal(number: float, dtype: np.dtype[Any]) -> bool:
    """Whether a positive number is in the range of `dtype`, and not below its normal numbers."""
    return float(np.finfo(dtype).tiny) <= number <= float(np.finfo(dtype).max)


class Point(NamedTuple):
    """Hyperparameters at one step, arranged for `Table.write`: what the loop applies, and what `prepare` is given."""

    weight_decay: float
    keep: float
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, rule: Rule, values: Mapping[str, Any]) -> Point:
        """Arrange a complete set of the rule's hyperparameters."""
        decay = values[WEIGHT_DECAY]
        keep = 1.0 - values["lr"] * decay if rule.decoupled else 1.0
        return cls(decay, keep, tuple(values[name] for name in rule.hyperparameters))


def hyper_of(rule: Rule, point: Point) -> Any:
    """The NamedTuple that the rule's `prepare` returns; TypeError where it is none."""
    prepared = rule.prepare(1, *point.arguments)
    if not isinstance(prepared, tuple) or not hasattr(prepared, "_fields"):
        raise TypeError(f"prepare of rule {rule.name!r} must return a NamedTuple, found {type(prepared).__name__}")
    return type(prepared)


class Table:
    """The rows of hyperparameters of one rule. This is the one place where host float64 becomes the compute dtype."""

    def __init__(
        self,
        rule: Rule,
        hyper: Any,
        dtype: np.dtype[Any],
        rows: int = 1,
        *,
        clip_value: float | None = None,
        ema: float | None = None,
    ):
        """`hyper`: the NamedTuple that `prepare` returns, as `hyper_of` tells."""
        self.rule = rule
        self._clip_value = 0.0 if clip_value is None else clip_value
        self._fresh = 0.0 if ema is None else 1.0 - ema
        for name, value, number in (
            ("clip_value", clip_value, self._clip_value),
            ("ema", ema, self._fresh),
        ):
            if value is not None and not is_normal(number, dtype):
                raise ValueError(f"{name}={value!r}: out of the range of {dtype}")
        width = len(StepHyper._fields) + len(hyper._fields)
        self.array = np.zeros((rows, width), dtype)
        row = struct.Struct(f"={width}{'f' if dtype.itemsize == 4 else 'd'}")
        self._pack_into = row.pack_into
        self._rows = self.array.data
        self._stride = row.size

    def write(self, row: int, t: int, point: Point, unscale: float) -> None:
        """Write what update number `t` with these hyperparameters needs into `row`.

        Raises ValueError where a number is not finite in the compute dtype; the row is then as it was.
        """
        decay, keep, arguments = point
        prepared = self.rule.prepare(t, *arguments)
        try:
            if not isfinite(keep + sum(prepared)):
                raise OverflowError
            self._pack_into(
                self._rows, row * self._stride, unscale, self._clip_value, 1.0, decay, keep, self._fresh, 1.0, *prepared
            )
        except OverflowError:
            raise ValueError(
                f"hyperparameters of rule {self.rule.name!r} at step {t} leave the range of {self.array.dtype}: "
                f"weight_decay={decay}, {prepared}"
            ) from None

    def condition(self, unscale: float) -> None:
        """Write what a measuring launch needs, and nothing else."""
        self.array[:, UNSCALE] = unscale
        self.array[:, CLIP_VALUE] = self._clip_value

    def clip(self, coefficient: float) -> None:
        """Multiply all gradients by `coefficient` in the next launch."""
        self.array[:, COEFFICIENT] = coefficient

    def unscale(self, grad_scale: Any, divisor: float = 1.0) -> float:
        """1 / (grad_scale divisor); an error unless it is a positive finite number in the compute dtype."""
        if not isinstance(grad_scale, Real | np.floating) or isinstance(grad_scale, bool):
            raise TypeError(f"grad_scale={grad_scale!r}: expected a positive finite number")
        number = float(grad_scale)
        if isfinite(number) and number > 0.0 and is_normal(1.0 / (number * divisor), self.array.dtype):
            return 1.0 / (number * divisor)
        raise ValueError(
            f"grad_scale={grad_scale!r}: expected a positive finite number whose inverse is one in {self.array.dtype}"
        )
