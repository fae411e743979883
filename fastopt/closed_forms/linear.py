"""Closed form of rules that are linear in p and their states at zero gradient: many steps are one matrix product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from fastopt.closed_forms import MOST, FormPoint, FormRule
from fastopt.source import written

NAMES = "pabcdefijklmnoqrstuvwxyz"
"""A letter for p and for each state; g and h have a meaning in a rule."""


@cache
def written_out(size: int) -> tuple[FunctionType, Any]:
    """Return the linear map of p and size - 1 states, a scalar function, and the NamedTuple of its coefficients."""
    names = NAMES[:size]
    rows = (" + ".join(f"h.{row}_{column} * {column}" for column in names) for row in names)
    fields = [(f"{row}_{column}", float) for row in names for column in names]
    function = written(f"linear{size}", ["p", "g", *names[1:], "h"], [f"return {', '.join(rows)}"], {}, __name__)
    return function, NamedTuple(f"Linear{size}", fields)


class Linear:
    """The closed form of a rule that maps p and its states linearly at g = 0: many steps are one matrix product.

    The matrix of a step is computed by applying the rule to unit vectors.

    Args:
        with_l2: whether the rule is also linear for ``g = weight_decay p``.

    >>> import numpy as np, fastopt
    >>> from typing import NamedTuple
    >>> class Hyper(NamedTuple):
    ...     lr: float
    >>> @fastopt.rule(lambda t, lr: Hyper(lr), idle=fastopt.Linear(with_l2=True))
    ... def descent(p, g, h):
    ...     return p - h.lr * g
    >>> opt = fastopt.Optimizer({"rows": np.ones((3, 1))}, descent, lr=0.5)
    >>> _ = opt.step_rows({"rows": (np.array([1]), np.array([[4.0]]))})
    >>> opt.params["rows"].ravel()
    array([ 1., -1.,  1.])
    """

    def __init__(self, *, with_l2: bool = False):
        self.with_l2 = with_l2

    def refusal(self, rule: FormRule, values: Mapping[str, Any], l2: bool) -> str | None:
        """As `Idle`."""
        if l2 and not self.with_l2:
            return "with weight_decay every element has a gradient (use decoupled_weight_decay=True)"
        return None

    def history(self, rule: FormRule, ema_weight: float | None) -> LinearHistory:
        """As `Idle`."""
        return LinearHistory(rule, ema_weight)


class LinearHistory:
    """As `History`."""

    scalar: Callable[..., Any]
    hyper: type

    def __init__(self, rule: FormRule, ema_weight: float | None):
        self._rule = rule
        self._ema_weight = ema_weight
        size = 1 + len(rule.states) + (ema_weight is not None)
        self.scalar, self.hyper = written_out(size)
        self._products = np.zeros((MOST + 1, size, size))
        self._products[0] = np.eye(size)
        self._steps = 0

    def append(self, t: int, point: FormPoint) -> None:
        """As `History`."""
        products, n = self._products, self._steps + 1
        with np.errstate(over="ignore", invalid="ignore"):  # `coefficients` tells which products are no numbers
            products[1 : n + 1] = self._matrix(t, point) @ products[:n]
        self._steps = n

    def _matrix(self, t: int, point: FormPoint) -> np.ndarray:
        rule, size = self._rule, self._products.shape[1]
        h = rule.prepare(t, *point.arguments)
        decays = point.weight_decay if not rule.decoupled and not rule.owns_weight_decay else 0.0
        matrix = np.zeros((size, size))
        inner = 1 + len(rule.states)
        for column in range(inner):
            unit = [float(column == row) for row in range(inner)]
            p = point.keep * unit[0]
            new = rule.scalar(p, decays * unit[0], *unit[1:], h)
            matrix[:inner, column] = new
        if self._ema_weight is not None:
            matrix[inner, :inner] = self._ema_weight * matrix[0, :inner]
            matrix[inner, inner] = 1.0 - self._ema_weight
        return matrix

    def coefficients(self, ages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `History`."""
        lines = self._products[ages].reshape(ages.size, -1)
        return lines, np.isfinite(lines).all(1)
