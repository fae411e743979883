"""What a hyperparameter may be: intervals, flags and choices, and the ranges of the field's usual names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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


# --- of a population --------------------------------------------------------------------------------------------------


def check_each(domain: Domain, name: str, value: Any, members: int) -> Any:
    """Return a hyperparameter of a population; refuse others.

    Args:
        domain: its range.
        name: the hyperparameter, for the message.
        value: what `domain.check` takes, the same for all members; or, in place of each number, an array or a sequence
            of one for each member. Several numbers may also be an array with a line for each member.
        members: how many there are.

    Returns:
        What `domain.check` returns, with a read-only array of float64 in place of each number that differs.

    Raises:
        TypeError, ValueError: naming `name`, and the member whose number is refused.

    >>> check_each(Interval(0.0, length=2), "betas", (0.9, [0.5, 0.7, 0.6]), 3)
    (0.9, array([0.5, 0.7, 0.6]))
    >>> check_each(Interval(0.0), "lr", [1.0, -1.0], 2)
    Traceback (most recent call last):
    ValueError: lr[1]: must be a number in [0, inf), got -1.0
    """
    if not isinstance(domain, Interval | Pair):
        return domain.check(name, value)
    length = domain.length
    if isinstance(domain, Interval) and length is None:
        numbers = _column(name, value, members)
        if numbers is None:
            return domain.check(name, value)
        _check_column(domain, name, numbers)
        return numbers
    items = value.T if isinstance(value, np.ndarray) and value.shape == (members, length) else value
    listed = isinstance(items, Sequence | np.ndarray) and not isinstance(items, str | bytes)
    if not listed or len(items) != length:
        return domain.check(name, value)  # which raises the error
    found = [_column(f"{name}[{k}]", item, members) for k, item in enumerate(items)]
    if all(column is None for column in found):
        return domain.check(name, value)
    if isinstance(domain, Interval) and not domain.whole:
        one = replace(domain, length=None)
        numbers_or_columns = []
        for k, (column, item) in enumerate(zip(found, items, strict=True)):
            if column is None:
                numbers_or_columns.append(one.check(f"{name}[{k}]", item))
            else:
                _check_column(one, f"{name}[{k}]", column)
                numbers_or_columns.append(column)
        return tuple(numbers_or_columns)
    for member in range(members):
        line = tuple([item if column is None else column[member] for column, item in zip(found, items, strict=True)])
        domain.check(f"{name} of member {member}", line)
    return tuple([float(item) if column is None else column for column, item in zip(found, items, strict=True)])


def _column(name: str, value: Any, members: int) -> np.ndarray | None:
    """An array of a number for each member; None for what is one number, or none."""
    if isinstance(value, float | str | bytes) or scalars.real(value) is not None or not hasattr(value, "__len__"):
        return None
    scalars.refuse_masked(name, value)
    try:
        array = np.asarray(value)
    except Exception:  # of another library
        array = np.empty(0, object)
    if array.dtype.kind not in "fiu" or array.shape != (members,):
        raise TypeError(
            f"{name}: must be a number, or an array of one for each of {members} members, got {scalars.shown(value)}"
        )
    found = array.astype(np.float64)
    found.flags.writeable = False
    return found


def _check_column(domain: Interval, name: str, numbers: np.ndarray) -> None:
    """Refuse numbers that are not in an interval: none is where the extremes are not."""
    extremes = range(len(numbers)) if domain.whole else (int(numbers.argmin()), int(numbers.argmax()))
    for member in extremes:
        domain.check(f"{name}[{member}]", float(numbers[member]))


def of_member(value: Any, member: int) -> Any:
    """Return what a checked hyperparameter is for one member of a population.

    >>> import numpy as np
    >>> of_member((0.9, np.array([0.5, 0.7])), 1)
    (0.9, 0.7)
    """
    if isinstance(value, np.ndarray):
        return float(value[member])
    return tuple([of_member(item, member) for item in value]) if isinstance(value, tuple) else value


def differs(value: Any) -> bool:
    """Return whether a checked hyperparameter is not the same for all members of a population.

    >>> import numpy as np
    >>> differs(np.zeros(2)), differs((0.9, np.zeros(2))), differs(0.9)
    (True, True, False)
    """
    return isinstance(value, np.ndarray) or (isinstance(value, tuple) and any(map(differs, value)))


def same(value: Any, other: Any) -> bool:
    """Return whether two checked hyperparameters are the same.

    >>> import numpy as np
    >>> same((0.9, np.ones(2)), (0.9, np.ones(2))), same(0.9, np.ones(2)), same("ema", "ema")
    (True, False, True)
    """
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return all(map(same, value, other))
    if isinstance(value, np.ndarray) or isinstance(other, np.ndarray):
        return type(value) is type(other) and bool(np.array_equal(value, other))
    return value is other or bool(value == other)


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
