"""`Table` turns hyperparameters into the numbers that a kernel reads: rows of param groups, in the compute dtype."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt import scalars
from fastopt.hyper import WEIGHT_DECAY, of_member
from fastopt.kernels.contract import N_STEP, StepHyper

if TYPE_CHECKING:
    from fastopt.rule import Rule

UNSCALE, COEFFICIENT, KEEP, WEIGHT_DECAY_COLUMN = (
    StepHyper._fields.index(name) for name in ("unscale", "coefficient", "keep", "weight_decay")
)


def is_normal(number: float, dtype: np.dtype[Any]) -> bool:
    """Return whether a positive number is in the range of the normal numbers of `dtype`."""
    return float(np.finfo(dtype).tiny) <= number <= float(np.finfo(dtype).max)


class Point(NamedTuple):
    """Hyperparameters at one step, arranged for `Table.write`: those of the loop, and the arguments of `prepare`.

    In a population, an array takes the place of a number that differs among the members.
    """

    weight_decay: Any
    keep: Any
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, rule: Rule, values: Mapping[str, Any]) -> Point:
        """Arrange a complete set of the rule's hyperparameters."""
        decay = values[WEIGHT_DECAY]
        keep = 1.0 - values["lr"] * decay if rule.decoupled else 1.0
        return cls(decay, keep, tuple(values[name] for name in rule.hyperparameters))

    def of_member(self, member: int) -> Point:
        """Those of one member of a population."""
        return Point(*of_member(tuple(self), member))


def hyper_of(rule: Rule, point: Point) -> Any:
    """Return the type of NamedTuple that the rule's `prepare` returns; raise TypeError for any other type."""
    prepared = rule.prepared(1, point.of_member(0).arguments, rule.sample_inputs)
    if not isinstance(prepared, tuple) or not hasattr(prepared, "_fields"):
        raise TypeError(f"prepare of rule {rule.name!r}: must return a NamedTuple, got {type(prepared).__name__}")
    return type(prepared)


class Table:
    """The rows of hyperparameters of one rule. Only here, float64 of the host becomes the compute dtype."""

    def __init__(
        self,
        rule: Rule,
        hyper: Any,
        dtype: np.dtype[Any],
        rows: int = 1,
        *,
        clip_value: float | None = None,
        ema: float | None = None,
        of: Sequence[int] | None = None,
    ):
        """Make a table of zeros.

        hyper : the type of NamedTuple that `prepare` returns, from `hyper_of`. rows : the number of param groups.
        of : the group of each parameter, which then has a row of its own; None: a row per group.
        """
        self.rule = rule
        self.inputs = rule.sample_inputs
        """What `prepare` is told of the further inputs of a step, by name."""
        self._prepare = rule.prepared if self.inputs else rule.prepare
        self._clip_value = 0.0 if clip_value is None else clip_value
        self._ema_weight = 0.0 if ema is None else 1.0 - ema
        for name, value, number in (
            ("clip_value", clip_value, self._clip_value),
            ("ema", ema, self._ema_weight),
        ):
            if value is not None and not is_normal(number, dtype):
                raise ValueError(f"{name}: must be in the range of {dtype}, got {value!r}")
        width = len(StepHyper._fields) + len(hyper._fields)
        self.by_group = np.zeros((rows, width), dtype)
        self.array = self.by_group if of is None else np.zeros((len(of), width), dtype)
        """What kernels read."""
        self._of = np.arange(rows) if of is None else np.array(of)
        row = struct.Struct(f"={width}{'f' if dtype.itemsize == 4 else 'd'}")
        self._pack_into = row.pack_into
        self._rows = self.by_group.data
        self._stride = row.size

    def write(self, row: int, t: int, point: Point, unscale: float) -> None:
        """Write the numbers of update `t` with these hyperparameters into the row of a group.

        Raises ValueError where a number is not finite in the compute dtype; the row is then unchanged.
        """
        decay, keep, arguments = point
        prepared = self._prepare(t, *arguments) if not self.inputs else self._prepare(t, arguments, self.inputs)
        try:
            if not isfinite(keep + sum(prepared)):
                raise OverflowError
            self._pack_into(
                self._rows,
                row * self._stride,
                unscale,
                self._clip_value,
                1.0,
                decay,
                keep,
                self._ema_weight,
                1.0,
                0.0,
                *prepared,
            )
        except OverflowError:
            raise ValueError(
                f"hyperparameters of rule {self.rule.name!r} at step {t}: must be in the range of {self.array.dtype}, "
                f"got weight_decay={decay}, {prepared}"
            ) from None

    def heads(self, points: Sequence[Point], members: int | None = None) -> np.ndarray:
        """Return the fields of `StepHyper` for rows of these hyperparameters: a line each, in the compute dtype.

        members : of a population, each of which has a line for each of `points`.
        """
        heads = np.empty((len(points), members or 1, N_STEP))
        heads[:] = (1.0, self._clip_value, 1.0, 0.0, 0.0, self._ema_weight, 1.0, 0.0)
        if members is None:
            heads[:, 0, WEIGHT_DECAY_COLUMN] = [point.weight_decay for point in points]
            heads[:, 0, KEEP] = [point.keep for point in points]
        else:
            for own, point in zip(heads, points, strict=True):
                own[:, WEIGHT_DECAY_COLUMN], own[:, KEEP] = point.weight_decay, point.keep
        with np.errstate(over="ignore"):  # of numbers that leave the range of the dtype
            return heads.reshape(-1, N_STEP).astype(self.by_group.dtype)

    def write_heads(self, heads: np.ndarray, unscale: float) -> None:
        """Write these fields of all groups."""
        self.by_group[:, :N_STEP] = heads
        self.by_group[:, UNSCALE] = unscale

    def spread(self) -> None:
        """Copy the rows of the groups into those of their parameters."""
        np.take(self.by_group, self._of, axis=0, out=self.array)

    def clip(self, coefficient: float | np.ndarray) -> None:
        """Multiply gradients by `coefficient` in the next launch: one for all, or one for each row."""
        self.array[:, COEFFICIENT] = coefficient

    def unscale(self, grad_scale: Any, divisor: float = 1.0) -> float:
        """Return 1 / (grad_scale divisor); raise an error unless it is a positive normal number of the dtype."""
        number = scalars.number("grad_scale", grad_scale, "a positive finite number")
        if isfinite(number) and number > 0.0 and is_normal(1.0 / (number * divisor), self.array.dtype):
            return 1.0 / (number * divisor)
        raise ValueError(
            f"grad_scale: must be a positive finite number whose inverse is a normal number of {self.array.dtype}, got "
            f"{grad_scale!r}"
        )
