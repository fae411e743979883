"""Closed forms of many zero-gradient steps at once, used by `Optimizer.step_rows`.

A closed form is a scalar function like a rule's, which ignores the gradient and whose coefficients stand for a number
of steps: the `age` of an element, the number of steps it has missed. A `History` records the steps and returns the
coefficients of every age from 0 to `MOST`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np

MOST = 1024
"""Maximum number of steps that an element may miss; then all elements catch up."""


class FormRule(Protocol):
    """What a closed form needs of a rule: see `fastopt.Rule`, which is one."""

    states: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    decoupled: bool
    owns_weight_decay: bool
    scalar: FunctionType
    prepare: Callable[..., Any]


class FormPoint(Protocol):
    """What a closed form needs of the hyperparameters at one step: see `fastopt.step.table.Point`, which is one."""

    @property
    def weight_decay(self) -> float:
        """The rate, as it is given."""

    @property
    def keep(self) -> float:
        """What decoupled weight decay multiplies p by."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `prepare` is given after t: the values of the rule's hyperparameters."""


class History(Protocol):
    """The steps since all elements were up to date, and their joint effect on an element."""

    scalar: Callable[..., Any]
    """``(p, g, *states, h) -> (p, *states)``; a moving average of the parameters is the last state."""
    hyper: type
    """The NamedTuple of the coefficients."""

    def append(self, t: int, point: FormPoint) -> None:
        """Record step number `t` with these hyperparameters."""

    def coefficients(self, ages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a line of coefficients for each age, and whether they are exact (to 1e-8 of the change of p)."""


@runtime_checkable
class Idle(Protocol):
    """The closed form of a rule: the effect of zero-gradient steps on an element."""

    def refusal(self, rule: FormRule, values: Mapping[str, Any], l2: bool) -> str | None:
        """Return the reason why these hyperparameters have no closed form, or None; some values may be callables.

        l2 : whether weight decay adds to the gradient.
        """

    def history(self, rule: FormRule, ema_weight: float | None) -> History:
        """Return an empty history. ema_weight : weight of new parameters in the moving average; None without one."""
