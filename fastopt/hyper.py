"""What a hyperparameter may be: intervals, flags and choices, and the ranges of the field's usual names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastopt import scalars

WEIGHT_DECAY = "weight_decay"
EPS = ("eps", "adamw_eps", "eps_root")
"""What bounds a quotient, so that it must not become 0 in the dtype that is computed in."""

LOSS = "loss"
"""The argument of `prepare` that is the loss which a step is given."""
EMA = "ema"
"""The name of the moving average of the parameters among the arrays of an optimizer."""


@dataclass(frozen=True)
class Interval:
    """A finite number in [low, high], or in [low, high) with `open`; with `length`, a tuple of such numbers.

    Args:
        low, high: the ends, finite or -inf, inf.
        open: whether `high` itself is out of range.
        length: the number of numbers, from 1; None for a number that is not in a tuple.
        open_low: whether `low` itself is out of range.
        whole: whether the number must be a whole one.

    >>> from fastopt import Interval
    >>> str(Interval(0.0, 1.0, open=True, length=2))
    '2 numbers, each in [0, 1)'
    """

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    length: int | None = None
    open_low: bool = False
    whole: bool = False

    def __str__(self) -> str:
        if (self.low, self.high) == (-math.inf, math.inf):
            return f"{self.length} finite numbers" if self.length else "a finite number"
        low = "(" if self.open_low or self.low == -math.inf else "["
        high = ")" if self.open or self.high == math.inf else "]"
        among = f"in {low}{self.low:g}, {self.high:g}{high}"
        if self.length:
            return f"{self.length} numbers, each {among}"
        if self.low == self.high:
            return f"{self.low:g}"
        return f"a {'whole ' if self.whole else ''}number {among}"

    def check(self, name: str, value: Any) -> Any:
        """Return a value that is in the interval; refuse others.

        Args:
            name: the hyperparameter, for the message.
            value: anything 0-d and real: a number, a NumPy scalar, a 0-d array or tensor; or a sequence or 1-D array of
                `length` such numbers.

        Returns:
            `value` as a float, or a tuple of floats.

        Raises:
            TypeError, ValueError: naming `name`: the value must be a number, finite and in range, or `length` numbers.

        >>> from fastopt import Interval
        >>> Interval(0.0).check("lr", 1)
        1.0
        """
        plain = not (self.open_low or self.whole)
        quick = plain and type(value) is float and self.length is None
        if quick and -math.inf < value < self.high and value >= self.low:
            return value
        if self.length is not None:
            listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
            if scalars.is_masked(value) or not (listed or getattr(value, "ndim", 0) == 1) or len(value) != self.length:
                raise TypeError(f"{name}: must be {self}, got {scalars.shown(value)}")
            if plain and type(value) is tuple:
                for item in value:
                    if type(item) is not float or not -math.inf < item < self.high or item < self.low:
                        break
                else:
                    return value
            one = replace(self, length=None)
            return tuple(one.check(f"{name}[{k}]", item) for k, item in enumerate(value))
        number = scalars.number(name, value, str(self))
        inside = math.isfinite(number) and self.low <= number <= self.high
        at_end = (self.open and number == self.high) or (self.open_low and number == self.low)
        if not inside or at_end or (self.whole and number % 1.0):
            raise ValueError(f"{name}: must be {self}, got {value!r}")
        return number


@dataclass(frozen=True)
class Pair:
    """Two numbers, each in an interval of its own.

    Args:
        first, second: the interval of each.
        ascending: whether the first number must be at most the second.

    >>> str(Pair(Interval(0.0, 1.0, open=True), Interval(1.0), ascending=True))
    '2 numbers, one in [0, 1) and one in [1, inf), in ascending order'
    """

    first: Interval
    second: Interval
    ascending: bool = False

    length = 2

    def __str__(self) -> str:
        ranges = " and ".join(str(each).replace("a number", "one") for each in (self.first, self.second))
        return f"2 numbers, {ranges}{', in ascending order' if self.ascending else ''}"

    def check(self, name: str, value: Any) -> tuple[float, float]:
        """Return two numbers that are in the intervals; refuse others.

        Args:
            name: the hyperparameter, for the message.
            value: a sequence of two numbers, or a 1-D array of them.

        Returns:
            `value` as a tuple of floats.

        Raises:
            TypeError, ValueError: naming `name`: the value must be two numbers, finite and in range.

        >>> Pair(Interval(0.0), Interval(0.0), ascending=True).check("step_sizes", (1, 0.5))
        Traceback (most recent call last):
        ValueError: step_sizes: must be 2 numbers, one in [0, inf) and one in [0, inf), in ascending order, got (1, 0.5)
        """
        one, other = Interval(length=2).check(name, value)
        one, other = self.first.check(f"{name}[0]", one), self.second.check(f"{name}[1]", other)
        if self.ascending and one > other:
            raise ValueError(f"{name}: must be {self}, got {value!r}")
        return one, other


@dataclass(frozen=True)
class Flag:
    """True or False.

    >>> from fastopt import Flag, rule
    >>> decorator = rule(lambda t, lr, nesterov=True: None, domains={"nesterov": Flag()})
    """

    def check(self, name: str, value: Any) -> bool:
        """Return a flag; refuse other values.

        Args:
            name: the hyperparameter, for the message.
            value: a bool of Python or NumPy, or a 0-d array of one.

        Returns:
            `value` as a bool.

        Raises:
            TypeError: naming `name`: the value must be a bool.

        >>> from fastopt import Flag
        >>> Flag().check("nesterov", True)
        True
        """
        return scalars.flag(name, value)


@dataclass(frozen=True)
class Choice:
    """One of a few names.

    Args:
        names: the allowed names.

    >>> from fastopt import Choice
    >>> Choice(("ema", "heavy_ball")).check("form", "ema")
    'ema'
    """

    names: tuple[str, ...]

    def check(self, name: str, value: Any) -> str:
        """Return one of the names; refuse other values.

        Args:
            name: the hyperparameter, for the message.
            value: a str.

        Returns:
            `value`.

        Raises:
            ValueError: naming `name`: the value must be one of the names.

        >>> from fastopt import Choice
        >>> Choice(("ema", "heavy_ball")).check("form", "nesterov")
        Traceback (most recent call last):
            ...
        ValueError: form: must be one of 'ema', 'heavy_ball', got 'nesterov'
        """
        if not isinstance(value, str) or value not in self.names:
            raise ValueError(f"{name}: must be one of {', '.join(map(repr, self.names))}, got {value!r}")
        return value


Domain = Interval | Pair | Flag | Choice

POSITIVE_OR_ZERO = Interval(0.0)
DECAY_RATE = Interval(0.0, 1.0, open=True)
NONE = Interval(0.0, 0.0)
"""The range of what must be absent: 0 alone."""
DOMAINS: dict[str, Domain] = {
    "lr": POSITIVE_OR_ZERO,
    "weight_decay": POSITIVE_OR_ZERO,
    "lr_decay": POSITIVE_OR_ZERO,
    "eps": POSITIVE_OR_ZERO,
    "eps_root": POSITIVE_OR_ZERO,
    "betas": Interval(0.0, 1.0, open=True, length=2),
    "rho": DECAY_RATE,
    "alpha": DECAY_RATE,
    "momentum": Interval(0.0, 1.0),
    "dampening": Interval(0.0, 1.0),
    "eps_inside": Flag(),
    "bias_correction": Flag(),
    "eps_hat": Flag(),
}
"""The ranges of the usual names. A rule can narrow them, or add names of its own, with ``domains=``."""
