"""Learning-rate schedules: pure functions of the step number, which is 0 at the first update.

Call a schedule once with its settings to get an object; call the object with a step to get a float:

    >>> from fastopt import schedules
    >>> lr = schedules.warmup(schedules.cosine(0.1, 0.0, steps=90), steps=9)
    >>> lr
    warmup(schedule=cosine(start=0.1, end=0.0, steps=90), steps=9)
    >>> [round(lr(t), 6) for t in (0, 4, 9, 54, 99, 500)]
    [0.01, 0.05, 0.1, 0.05, 0.0, 0.0]

A schedule holds only its settings: step 7 has the same value at every call and in any order of calls, so a run that
resumes at step `t` needs only `t`. Schedules are equal if their settings are equal. They can be hashed, copied and
pickled, and they are immutable (`dataclasses.replace` returns a changed copy). A schedule fits any hyperparameter, not
only the learning rate. Its values are >= 0, like all hyperparameters of this library.

The classes have lower-case names because they are called like functions, as `functools.partial` is.
"""

# ruff: noqa: N801

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from fastopt import scalars

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cyclical",
    "exponential",
    "inverse_time",
    "linear",
    "one_cycle",
    "piecewise",
    "polynomial",
    "sequence",
    "step_decay",
    "warmup",
]


class Schedule:
    """Base class of the schedules of this module; it checks the step and the settings.

    Call a schedule with `step`, an int >= 0 (also a NumPy integer), to get a float.
    A negative step raises ValueError; a step that is not an integer raises TypeError.
    Your own schedule needs no class: pass any function of the step.
    """

    __slots__ = ()

    def __call__(self, step: int) -> float:
        """Return the value at `step`, which is 0 at the first update."""
        if type(step) is not int or step < 0:
            step = _checked_step(step)
        return self._at(step)

    def _at(self, step: int) -> float:
        """Return the formula's value; `step` is already checked."""
        raise NotImplementedError

    # Each check below reads a field and either refuses it or stores it as a plain Python type, so that NumPy scalars
    # compare, print and pickle like Python numbers. The checks bypass `frozen`, but only during the construction.

    def _store(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse(self, kind: type[Exception], name: str, expected: str, found: object) -> Exception:
        return kind(f"{type(self).__name__}.{name}: must be {expected}, got {scalars.shown(found)}")

    def _checked_number(
        self,
        name: str,
        value: object,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
        below: float = math.inf,
    ) -> float:
        limits = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
        expected = "a finite number " + " and ".join(
            f"{sign} {limit:g}" for sign, limit in limits if math.isfinite(limit)
        )
        expected = expected.rstrip()
        number = scalars.number(f"{type(self).__name__}.{name}", value, expected)
        if not (math.isfinite(number) and at_least <= number <= at_most and above < number < below):
            raise self._refuse(ValueError, name, expected, value)
        return number

    def _number(self, name: str, **limits: float) -> None:
        self._store(name, self._checked_number(name, getattr(self, name), **limits))

    def _checked_count(self, name: str, value: object, at_least: int) -> int:
        expected = f"an int >= {at_least} (a number of steps)"
        return scalars.count(f"{type(self).__name__}.{name}", value, at_least, expected)

    def _count(self, name: str, at_least: int) -> None:
        self._store(name, self._checked_count(name, getattr(self, name), at_least))

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            raise self._refuse(ValueError, name, "one of " + ", ".join(map(repr, choices)), value)

    def _items(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if isinstance(value, str | bytes):
            raise self._refuse(TypeError, name, "a sequence such as a list or a tuple", value)
        try:
            return tuple(value)
        except TypeError:
            raise self._refuse(TypeError, name, "a sequence such as a list or a tuple", value) from None

    def _switch_steps(self, parts: str) -> None:
        """Check `boundaries`, the steps at which the next of `parts` (a field already stored as a tuple) begins."""
        steps = tuple(self._checked_count(f"boundaries[{i}]", b, 1) for i, b in enumerate(self._items("boundaries")))
        for i in range(1, len(steps)):
            if steps[i] <= steps[i - 1]:
                raise self._refuse(
                    ValueError, f"boundaries[{i}]", f"greater than boundaries[{i - 1}]={steps[i - 1]}", steps[i]
                )
        count = len(getattr(self, parts))
        if count != len(steps) + 1:
            raise ValueError(
                f"{type(self).__name__}.{parts}: must have one entry more than boundaries, one before the first "
                f"boundary and one from each boundary on, got {count} {parts} for {len(steps)} boundaries"
            )
        self._store("boundaries", steps)

    def _part(self, name: str, value: object) -> Callable[[int], float] | float:
        if callable(value) and not isinstance(value, type):
            return cast("Callable[[int], float]", value)
        if scalars.real(value) is None:
            raise self._refuse(
                TypeError, name, "a schedule constructed with its settings, a function of the step, or a number", value
            )
        return self._checked_number(name, value, at_least=0.0)


def _checked_step(step: object) -> int:
    return scalars.count("step", step, 0, "an int >= 0 (0 at the first update)")


# Both curves from `start` (fraction 0) to `end` (fraction 1) are weighted means, which reach both ends exactly and stay
# >= 0; start + (end - start) * fraction may miss `end` by a rounding error.


def _line(start: float, end: float, fraction: float) -> float:
    return (1.0 - fraction) * start + fraction * end


def _half_cosine(start: float, end: float, fraction: float) -> float:
    # (1 + cos x) / 2 = cos(x / 2)^2: the right side stays precise where the left side cancels.
    angle = 0.5 * math.pi * fraction
    return math.cos(angle) ** 2 * start + math.sin(angle) ** 2 * end


def _value(part: Callable[[int], float] | float, step: int) -> float:
    return scalars.number(f"schedule at step {step}", part(step)) if callable(part) else part


@dataclass(frozen=True, slots=True)
class constant(Schedule):
    """The same value at every step.

    Formula: ``f(t) = lr``

    Args:
        lr: the value; finite, >= 0.

    Raises:
        ValueError, TypeError: naming `lr` when it is out of range or not a number.

    >>> constant(0.1)(12345)
    0.1
    """

    lr: float

    def __post_init__(self) -> None:
        self._number("lr", at_least=0.0)

    def _at(self, step: int) -> float:
        return self.lr


@dataclass(frozen=True, slots=True)
class exponential(Schedule):
    """Exponential decay: the value shrinks by the same factor at every step.

    Formula: ``f(t) = lr exp(-k t)``

    Args:
        lr: the value at step 0; finite, >= 0.
        k: decay per step; finite, >= 0. To multiply by `gamma` at every step (torch's ExponentialLR) use
            `k=-math.log(gamma)`; to halve every `n` steps use `k=math.log(2) / n`.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or not a number.

    >>> schedule = exponential(0.1, k=0.01)
    >>> [round(schedule(t), 6) for t in (0, 100, 200)]
    [0.1, 0.036788, 0.013534]

    Source: the form of torch.optim.lr_scheduler.ExponentialLR, whose gamma is exp(-k).
    """

    lr: float
    k: float

    def __post_init__(self) -> None:
        self._number("lr", at_least=0.0)
        self._number("k", at_least=0.0)

    def _at(self, step: int) -> float:
        return self.lr * math.exp(-self.k * step)


@dataclass(frozen=True, slots=True)
class inverse_time(Schedule):
    """Decay as one over time, as Robbins & Monro (1951) require: the sum diverges, the sum of squares converges.

    Formula: ``f(t) = lr / (1 + k t)``

    Args:
        lr: the value at step 0; finite, >= 0.
        k: decay per step; finite, >= 0. The value has halved at step `1 / k`.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or not a number.

    >>> schedule = inverse_time(0.1, k=0.01)
    >>> [schedule(t) for t in (0, 100, 300)]
    [0.1, 0.05, 0.025]

    Source: Robbins & Monro 1951, https://doi.org/10.1214/aoms/1177729586
    """

    lr: float
    k: float

    def __post_init__(self) -> None:
        self._number("lr", at_least=0.0)
        self._number("k", at_least=0.0)

    def _at(self, step: int) -> float:
        return self.lr / (1.0 + self.k * step)


@dataclass(frozen=True, slots=True)
class cyclical(Schedule):
    """A triangular wave between two values: the cyclical learning rate.

    Formula: ``f(t) = low + (high - low) (1 - |2 (t mod period) / period - 1|) a(t)``, where the amplitude is ``a = 1``
    for "triangular", ``a = 2^-floor(t / period)`` (halved after each cycle) for "triangular2", and ``a = gamma^t`` for
    "exp_range"

    Args:
        low: the value at the start of every cycle; finite, >= 0.
        high: the value at step `period / 2`; finite, >= low. With an odd period the peak lies between two steps, and no
            step reaches it.
        period: the whole cycle, up and down, in steps; int >= 2. Smith's `stepsize` is half of it.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: factor per step for "exp_range", in (0, 1]; refused with the other modes.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong type.

    >>> schedule = cyclical(0.1, 0.5, period=4)
    >>> [round(schedule(t), 6) for t in range(6)]
    [0.1, 0.3, 0.5, 0.3, 0.1, 0.3]

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks" (WACV 2017, https://arxiv.org/abs/1506.01186),
    section 3.2.
    """

    low: float
    high: float
    period: int
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        self._number("low", at_least=0.0)
        self._number("high", at_least=self.low)
        self._count("period", at_least=2)
        self._choice("mode", ("triangular", "triangular2", "exp_range"))
        self._number("gamma", above=0.0, at_most=1.0)
        if self.mode != "exp_range" and self.gamma != 1.0:
            raise ValueError(
                f"cyclical.gamma: must be 1.0 with mode={self.mode!r}, got {self.gamma!r}; "
                "omit gamma or pass mode='exp_range'"
            )

    def _at(self, step: int) -> float:
        # Integer division keeps the phase exact at any step; the paper's floating-point form drifts.
        cycle, position = divmod(step, self.period)
        height = 1.0 - abs(2 * position / self.period - 1.0)
        if self.mode == "triangular2":
            height *= 0.5**cycle
        elif self.mode == "exp_range":
            height *= self.gamma**step
        return _line(self.low, self.high, height)


@dataclass(frozen=True, slots=True)
class step_decay(Schedule):
    """Multiply by a factor at regular intervals: a staircase (torch's StepLR).

    Formula: ``f(t) = lr factor^floor(t / every)``

    Args:
        lr: the value of the first stair; finite, >= 0.
        factor: ratio of each stair to the previous one, in (0, 1].
        every: length of a stair in steps; int >= 1. Step `every` is the first on the second stair.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong type.

    >>> schedule = step_decay(0.4, factor=0.5, every=30)
    >>> [schedule(t) for t in (0, 29, 30, 60)]
    [0.4, 0.4, 0.2, 0.1]

    Source: the form of torch.optim.lr_scheduler.StepLR.
    """

    lr: float
    factor: float
    every: int

    def __post_init__(self) -> None:
        self._number("lr", at_least=0.0)
        self._number("factor", above=0.0, at_most=1.0)
        self._count("every", at_least=1)

    def _at(self, step: int) -> float:
        return float(self.lr * self.factor ** (step // self.every))


@dataclass(frozen=True, slots=True)
class piecewise(Schedule):
    """A sequence of constants.

    Formula: ``f(t) = values[i]``, where ``i`` is the number of boundaries ``<= t``

    Args:
        boundaries: steps at which the value changes; strictly increasing ints >= 1. Step `boundaries[0]` is the first
            with `values[1]` (torch's MultiStepLR counts the same way).
        values: the constants, one more than there are boundaries; each finite, >= 0.

    Raises:
        ValueError, TypeError: naming the entry that is out of range, out of order or of the wrong type, or both
            lengths.

    >>> schedule = piecewise([100, 150], [0.1, 0.01, 0.001])
    >>> [schedule(t) for t in (0, 99, 100, 149, 150)]
    [0.1, 0.1, 0.01, 0.01, 0.001]
    """

    boundaries: Sequence[int]
    values: Sequence[float]

    def __post_init__(self) -> None:
        values = self._items("values")
        self._store(
            "values", tuple(self._checked_number(f"values[{i}]", v, at_least=0.0) for i, v in enumerate(values))
        )
        self._switch_steps("values")

    def _at(self, step: int) -> float:
        return self.values[bisect_right(self.boundaries, step)]


@dataclass(frozen=True, slots=True)
class linear(Schedule):
    """A straight line from one value to another; the last value persists.

    Formula: ``f(t) = start + (end - start) min(1, t / steps)``

    Args:
        start: the value at step 0; finite, >= 0.
        end: the value at step `steps` and all later steps; finite, >= 0. May be above `start`.
        steps: length of the line in steps; int >= 1.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong type.

    >>> schedule = linear(0.5, 0.1, steps=4)
    >>> [round(schedule(t), 6) for t in range(6)]
    [0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        self._number("start", at_least=0.0)
        self._number("end", at_least=0.0)
        self._count("steps", at_least=1)

    def _at(self, step: int) -> float:
        return _line(self.start, self.end, step / self.steps) if step < self.steps else self.end


@dataclass(frozen=True, slots=True)
class polynomial(Schedule):
    """A change from one value to another along a power of the remaining time.

    Formula: ``f(t) = end + (start - end) (1 - min(1, t / steps))^power``

    Args:
        start: the value at step 0; finite, >= 0.
        end: the value at step `steps` and all later steps; finite, >= 0. May be above `start`.
        steps: length of the curve in steps; int >= 1.
        power: exponent; finite, > 0. 1 gives a straight line; above 1 the change starts fast, below 1 it ends fast.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong type.

    >>> schedule = polynomial(0.5, 0.1, steps=4, power=2.0)
    >>> [round(schedule(t), 6) for t in range(6)]
    [0.5, 0.325, 0.2, 0.125, 0.1, 0.1]

    Source: the form of torch.optim.lr_scheduler.PolynomialLR, which has ``end = 0``.
    """

    start: float
    end: float
    steps: int
    power: float = 1.0

    def __post_init__(self) -> None:
        self._number("start", at_least=0.0)
        self._number("end", at_least=0.0)
        self._count("steps", at_least=1)
        self._number("power", above=0.0)

    def _at(self, step: int) -> float:
        return (
            float(_line(self.end, self.start, (1.0 - step / self.steps) ** self.power))
            if step < self.steps
            else self.end
        )


@dataclass(frozen=True, slots=True)
class cosine(Schedule):
    """Cosine annealing: half a cosine from one value to another; the last value persists.

    Formula: ``f(t) = end + 1/2 (start - end) (1 + cos(pi min(1, t / steps)))``

    Args:
        start: the value at step 0; finite, >= 0.
        end: the value at step `steps` and all later steps; finite, >= 0. May be above `start`.
        steps: length of the half wave in steps; int >= 1.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong type.

    >>> schedule = cosine(0.5, 0.1, steps=4)
    >>> [round(schedule(t), 6) for t in range(6)]
    [0.5, 0.441421, 0.3, 0.158579, 0.1, 0.1]

    The paper's warm restarts, each twice as long as the previous one, are a sequence:

    >>> restarts = sequence([cosine(0.5, 0.1, 4), cosine(0.5, 0.1, 8)], boundaries=[4])
    >>> [round(restarts(t), 6) for t in (0, 2, 4, 8, 12)]
    [0.5, 0.3, 0.5, 0.3, 0.1]

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (ICLR 2017,
    https://arxiv.org/abs/1608.03983), equation 5.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        self._number("start", at_least=0.0)
        self._number("end", at_least=0.0)
        self._count("steps", at_least=1)

    def _at(self, step: int) -> float:
        return _half_cosine(self.start, self.end, step / self.steps) if step < self.steps else self.end


@dataclass(frozen=True, slots=True)
class one_cycle(Schedule):
    """One rise to a high value and one long descent far below the initial value: the 1cycle policy.

    Formula: ``f(t) = A(low, high, t / p)`` for ``t <= p``, ``A(high, final, (t - p) / (e - p))`` for ``p < t < e``,
    ``final`` for ``t >= e``; ``low = high / div_factor``, ``final = low / final_div_factor``, the peak at
    ``p = max(0, pct_start steps - 1)``, the last step ``e = steps - 1``, and ``A`` half a cosine or a straight line

    `p` need not be a whole number: the peak may lie between two steps. If `p = 0`, the first step has the value `high`.
    The shape and the defaults equal those of torch's OneCycleLR.

    Args:
        high: the value at the peak; finite, >= 0.
        steps: length of the whole policy in steps; int >= 2. Step `steps - 1` and all later ones have the final value.
        pct_start: the warm-up's fraction of `steps`, in [0, 1); 0.3 means 30 %.
        div_factor: ratio of `high` to the initial value; finite, >= 1.
        final_div_factor: ratio of the initial value to the final value; finite, >= 1.
        anneal: "cosine" or "linear" (the paper's straight lines).

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong type.

    >>> schedule = one_cycle(1.0, steps=10, pct_start=0.5, anneal="linear")
    >>> [round(schedule(t), 6) for t in (0, 2, 4, 9)]
    [0.04, 0.52, 1.0, 4e-06]

    Source: Smith & Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates" (2017,
    https://arxiv.org/abs/1708.07120), section 3.
    """

    high: float
    steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        self._number("high", at_least=0.0)
        self._count("steps", at_least=2)
        self._number("pct_start", at_least=0.0, below=1.0)
        self._number("div_factor", at_least=1.0)
        self._number("final_div_factor", at_least=1.0)
        self._choice("anneal", ("cosine", "linear"))

    def _at(self, step: int) -> float:
        between = _half_cosine if self.anneal == "cosine" else _line
        low = self.high / self.div_factor
        final = low / self.final_div_factor
        peak = max(0.0, self.pct_start * self.steps - 1.0)
        last = self.steps - 1
        if step <= peak:
            return between(low, self.high, step / peak) if peak > 0.0 else self.high
        return between(self.high, final, (step - peak) / (last - peak)) if step < last else final


@dataclass(frozen=True, slots=True)
class warmup(Schedule):
    """A linear ramp up to the first value of another schedule, which then runs from its own start.

    Formula: ``f(t) = s(0) (t + 1) / (steps + 1)`` for ``t < steps``, ``s(t - steps)`` for ``t >= steps``

    The first step has ``s(0) / (steps + 1)`` instead of 0, which would waste the first update. The ramp rises by the
    same amount at every step, including the last, and step `steps` is the first with the full value. The wrapped
    schedule is delayed, not cut: `warmup(cosine(0.1, 0.0, 90), 10)` ends at step 100.

    Args:
        schedule: the schedule to ramp up to: one of this module's, any function of the step, or a number
            (finite, >= 0).
        steps: length of the ramp in steps; int >= 0. With 0 there is no ramp.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong type.

    >>> schedule = warmup(constant(0.5), steps=4)
    >>> [round(schedule(t), 6) for t in range(6)]
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]

    Source: gradual warm-up of Goyal et al., "Accurate, Large Minibatch SGD" (2017, https://arxiv.org/abs/1706.02677),
    section 2.2.
    """

    schedule: Callable[[int], float] | float
    steps: int

    def __post_init__(self) -> None:
        self._store("schedule", self._part("schedule", self.schedule))
        self._count("steps", at_least=0)

    def _at(self, step: int) -> float:
        if step < self.steps:
            return _value(self.schedule, 0) * (step + 1) / (self.steps + 1)
        return _value(self.schedule, step - self.steps)


@dataclass(frozen=True, slots=True)
class sequence(Schedule):
    """A sequence of schedules; each counts its steps from its own start.

    Formula: ``f(t) = schedules[i](t - b)``, where ``i`` is the number of boundaries ``<= t`` and ``b`` the last of
    them, or 0

    Args:
        schedules: the schedules in order: schedules of this module, functions of the step, or numbers (finite, >= 0).
        boundaries: steps at which the next schedule starts; strictly increasing ints >= 1, one fewer than the
            schedules.

    Raises:
        ValueError, TypeError: naming the entry that is out of range, out of order or of the wrong type, or both
            lengths.

    >>> schedule = sequence([linear(0.1, 0.5, 4), step_decay(0.5, 0.5, every=2)], boundaries=[4])
    >>> [round(schedule(t), 6) for t in range(8)]
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.25, 0.25]
    """

    schedules: Sequence[Callable[[int], float] | float]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        parts = self._items("schedules")
        self._store("schedules", tuple(self._part(f"schedules[{i}]", part) for i, part in enumerate(parts)))
        self._switch_steps("schedules")

    def _at(self, step: int) -> float:
        index = bisect_right(self.boundaries, step)
        return _value(self.schedules[index], step - (self.boundaries[index - 1] if index else 0))
