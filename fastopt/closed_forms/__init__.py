"""What rules do to elements without gradients, over many steps at once: the closed forms behind `Optimizer.step_rows`.

A form is a scalar update like a rule, whose gradient is not read, and whose coefficients stand for a number of steps
(the `age` of an element: how many it has missed). A `History` follows the steps and knows the coefficients of every age
from 0 to `MOST`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from fastopt.rule import Rule
    from fastopt.step.table import Point

MOST = 1024
"""The most steps that an element may miss before all are brought up to date."""


class History(Protocol):
    """The steps that were made since all elements were up to date, and what all of them do to an element at once."""

    scalar: Callable[..., Any]
    """``(p, g, *states, h) -> (p, *states)``; a moving average of the parameters is the last of the states."""
    hyper: type
    """The NamedTuple of its coefficients."""

    def append(self, t: int, point: Point) -> None:
        """One more step was made, number `t`, with these hyperparameters."""

    def coefficients(self, ages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A line of coefficients for each age, and whether they are exact (to 1e-8, relative to the change of p)."""


class Idle(Protocol):
    """How a rule acts on elements without gradients."""

    def refusal(self, rule: Rule, values: Mapping[str, Any], l2: bool) -> str | None:
        """Why there is no closed form with these hyperparameters, of which some may be callables; None if there is one.

        l2 : whether weight decay adds to the gradient.
        """

    def history(self, rule: Rule, fresh: float | None) -> History:
        """A history of no steps. fresh : the weight of new parameters in their moving average; None without one."""
