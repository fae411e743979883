"""`rule` turns a scalar update into a Rule: the mathematics of one optimizer, its hyperparameters and their ranges.

A rule is a plain function on scalars. Its signature is its specification: first ``p, g``, last ``h``; the names between
are its state buffers, which start at zero. It returns the new p and the new states.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from types import FunctionType
from typing import Any

import numpy as np

from fastopt.backends import Features
from fastopt.flat import Layout, check_vectors
from fastopt.idle import Idle
from fastopt.table import EMA, WEIGHT_DECAY, Point, Table, hyper_of

MISSING = inspect.Parameter.empty

# --- what a hyperparameter may be -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A finite number in [low, high], or in [low, high) where `open` is set; with `length`, a tuple of them."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    length: int | None = None

    def __str__(self) -> str:
        high = ")" if self.open or self.high == math.inf else "]"
        one = f"in [{self.low:g}, {self.high:g}{high}" if self.low > -math.inf else "finite"
        return f"{self.length} numbers, each {one}" if self.length else f"a number {one}"

    def check(self, name: str, value: Any) -> Any:
        """`value` as float (or a tuple of floats); TypeError or ValueError, naming `name`, where it is not in here."""
        if self.length is not None:
            if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or len(value) != self.length:
                raise TypeError(f"{name}={value!r}: expected {self}")
            one = Interval(self.low, self.high, self.open)
            return tuple(one.check(f"{name}[{k}]", item) for k, item in enumerate(value))
        if not isinstance(value, Real | np.floating | np.integer) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected {self}, found {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:  # an int beyond the floats
            number = math.inf
        if not (math.isfinite(number) and self.low <= number <= self.high) or (self.open and number == self.high):
            raise ValueError(f"{name}={value!r}: expected {self}")
        return number


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def check(self, name: str, value: Any) -> bool:
        """`value`; TypeError, naming `name`, where it is no bool."""
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name}={value!r}: expected True or False")
        return bool(value)


@dataclass(frozen=True)
class Choice:
    """One of a few names."""

    names: tuple[str, ...]

    def check(self, name: str, value: Any) -> str:
        """`value`; ValueError, naming `name`, where it is none of the names."""
        if not isinstance(value, str) or value not in self.names:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, self.names))}")
        return value


Domain = Interval | Flag | Choice

POSITIVE_OR_ZERO = Interval(0.0)
DECAY_RATE = Interval(0.0, 1.0, open=True)
DOMAINS: dict[str, Domain] = {
    "lr": POSITIVE_OR_ZERO,
    "weight_decay": POSITIVE_OR_ZERO,
    "lr_decay": POSITIVE_OR_ZERO,
    "eps": POSITIVE_OR_ZERO,
    "betas": Interval(0.0, 1.0, open=True, length=2),
    "rho": DECAY_RATE,
    "alpha": DECAY_RATE,
    "momentum": Interval(0.0, 1.0),
    "dampening": Interval(0.0, 1.0),
    "eps_inside": Flag(),
    "bias_correction": Flag(),
}
"""The ranges of the field's usual names. A rule may narrow them or add its own with ``domains=``."""

# --- the rule ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layerwise:
    """How a rule uses norms of whole parameters: the first value it returns is then a proposed update u, not the new p.

    ``ratio(norm_p, norm_u)`` is taken once per parameter, in float64; ``apply(p, *states, ratio, h)`` is the new p.
    """

    ratio: Callable[..., Any]
    apply: Callable[..., Any]


@dataclass(frozen=True)
class Scaling:
    """How a rule uses norms of whole parameters that are known before its update: they decide about its scale.

    ``scale(norm_p, norm_g, h)`` is taken once per parameter, in float64, and takes the place of the last field of h.
    With `number`, the name of a state that is one number per parameter and begins at 0, it is
    ``scale(norm_p, norm_g, number, h)``, which returns the scale and the new number.
    """

    scale: Callable[..., Any]
    number: str | None = None


@dataclass(frozen=True)
class Matrixwise:
    """How a rule uses whole matrices: what it steps along is made of them by linear algebra, before its update.

    Of the parameters whose hyperparameter `chosen` is true, as it is of 2-D ones unless an override says otherwise:
    ``direction``, a rule of the same states and hyperparameters, is run first, and leaves something in `state`;
    ``transform(array, **hyperparameters)`` makes of that, in place, what the update then reads.
    """

    direction: Rule
    state: str
    transform: Callable[..., None]
    chosen: str


LAYERWISE_STATES = (1, 2)
"""The numbers of states for which the backends have layerwise loops."""


class Rule:
    """A scalar update with its hyperparameters. Made by `rule`; call it like the plain function that it is.

    Attributes:
        name, states: the function's name, and the names of its state buffers.
        scalar: the plain Python function.
        prepare: ``prepare(t, **hyperparameters) -> NamedTuple``, run on the host once a step in float64.
        hyperparameters: the names that `prepare` takes.
        defaults: those that have a default.
        decoupled: whether ``weight_decay`` shrinks p directly (AdamW) instead of being added to the gradient (L2).
        layerwise, scaling, matrixwise: a `Layerwise`, `Scaling` or `Matrixwise`; all None for a rule whose every
            element stands alone.
        initial: what its states begin at, where that is not 0: a number, the name of a hyperparameter, or ``"p"``.
        idle: what many steps do to an element without gradients, as `fastopt.idle.Idle`; None where there is no closed
            form, and thus no `Optimizer.step_rows`.
    """

    def __init__(
        self,
        function: FunctionType,
        prepare: Callable[..., Any],
        *,
        decoupled: bool = False,
        layerwise: Layerwise | None = None,
        scaling: Scaling | None = None,
        matrixwise: Matrixwise | None = None,
        domains: Mapping[str, Domain] | None = None,
        initial: Mapping[str, float | str] | None = None,
        idle: Idle | None = None,
    ):
        names = _positional(function, "rule")
        if len(names) < 3 or names[:2] != ["p", "g"] or names[-1] != "h":
            raise TypeError(
                f"rule {function.__name__!r} has the signature ({', '.join(names)}): expected (p, g, *states, h), "
                f"for example (p, g, m, v, h)"
            )
        prepared = _positional(prepare, "prepare")
        if not prepared or prepared[0] != "t":
            raise TypeError(f"prepare of rule {function.__name__!r} must take the step number t first, then its own")
        self.scalar = function
        self.name = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__name__ = self.__qualname__ = function.__name__
        self.states = tuple(names[2:-1])
        self.prepare = prepare
        self.decoupled = decoupled
        self.layerwise = layerwise
        self.scaling = scaling
        self.matrixwise = matrixwise
        self.initial = dict(initial or {})
        self.idle = idle
        self.hyperparameters = tuple(prepared[1:])
        self.defaults: dict[str, Any] = {
            name: parameter.default
            for name, parameter in inspect.signature(prepare).parameters.items()
            if parameter.default is not MISSING
        }
        self.owns_weight_decay = WEIGHT_DECAY in self.hyperparameters
        if decoupled and ("lr" not in self.hyperparameters or self.owns_weight_decay):
            raise TypeError(f"rule {self.name!r}: decoupled=True needs `lr`, and no `weight_decay`, in prepare")
        if layerwise is not None and (decoupled or len(self.states) not in LAYERWISE_STATES):
            raise TypeError(
                f"rule {self.name!r}: a layerwise rule has one of {LAYERWISE_STATES} states and does its own weight "
                f"decay; found {len(self.states)} states, decoupled={decoupled}"
            )
        if matrixwise is not None and not self.owns_weight_decay:
            raise TypeError(f"rule {self.name!r}: a matrixwise rule does its own weight decay: prepare must take it")
        if scaling is not None and (layerwise is not None or decoupled or not self.owns_weight_decay):
            raise TypeError(f"rule {self.name!r}: a scaling rule is not layerwise, and does its own weight decay")
        kept = (*self.states, *self.numbers)
        if EMA in kept or len(set(kept)) != len(kept):
            raise TypeError(
                f"rule {self.name!r}: the states are {', '.join(kept)}: none may be {EMA!r}, or there twice"
            )
        for state, value in self.initial.items():
            if state not in self.states or (isinstance(value, str) and value not in ("p", *self.hyperparameters)):
                raise TypeError(
                    f"rule {self.name!r}: initial[{state!r}]={value!r}: expected a state ({', '.join(self.states)}), "
                    f"and a number, 'p' or a hyperparameter ({', '.join(self.hyperparameters)})"
                )
        self._domains = {**DOMAINS, **(domains or {})}
        self._twin: Rule | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Run the plain scalar function: so one rule can be written in terms of another."""
        return self.scalar(*arguments)

    def __repr__(self) -> str:
        return f"<rule {self.name}({', '.join(('p', 'g', *self.states, 'h'))})>"

    @property
    def numbers(self) -> tuple[str, ...]:
        """The states that are one number per parameter."""
        return () if self.scaling is None or self.scaling.number is None else (self.scaling.number,)

    @property
    def whole(self) -> bool:
        """Whether it looks at norms of whole parameters."""
        return self.layerwise is not None or self.scaling is not None

    def names(self) -> tuple[str, ...]:
        """Every hyperparameter that the rule accepts: its own, and weight_decay, which the loop handles for all."""
        return self.hyperparameters if self.owns_weight_decay else (*self.hyperparameters, WEIGHT_DECAY)

    def check(self, name: str, value: Any, where: str = "") -> Any:
        """`value` in the form `prepare` expects; an error that names the hyperparameter where it is out of range."""
        domain = self._domains.get(name)
        if domain is None:
            domain = Flag() if isinstance(self.defaults.get(name), bool) else Interval()
        return domain.check(where + name, value)

    def check_all(self, values: Mapping[str, Any], where: str = "", step: int = 0) -> dict[str, Any]:
        """`values` as `check` returns them; a schedule stays one, and is tried at `step`, the next one."""
        for name in values:
            if name not in self.names():
                raise TypeError(
                    f"{where}{name}: {self.name!r} has no such hyperparameter; it has {', '.join(self.names())}"
                )
        checked = {}
        for name, value in values.items():
            if callable(value):
                self.check(name, value(step), f"{where}at step {step}, schedule of ")
                checked[name] = value
            else:
                checked[name] = self.check(name, value, where)
        return checked

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given hyperparameters and the defaults of the rest; TypeError for one that is unknown or missing."""
        unknown = [name for name in given if name not in self.names()]
        if unknown:
            raise TypeError(
                f"{unknown[0]}={given[unknown[0]]!r}: rule {self.name!r} has no such hyperparameter; "
                f"it has {', '.join(self.names())}"
            )
        values = {WEIGHT_DECAY: 0.0, **self.defaults, **given}
        missing = [name for name in self.names() if name not in values]
        if missing:
            raise TypeError(f"{missing[0]}: rule {self.name!r} has no default for it; give {missing[0]}=")
        return {name: values[name] for name in self.names()}

    def features(self, *, decays: bool, **flags: bool) -> Features:
        """The kernel's flags: these, and those of weight decay where some group decays its weights (`decays`)."""
        by_loop = decays and not self.owns_weight_decay
        return Features(**flags, l2=by_loop and not self.decoupled, decoupled=by_loop and self.decoupled)

    def decaying(self, decoupled: bool) -> Rule:
        """This rule with decoupled weight decay, or with L2; TypeError where it decays weights in a way of its own."""
        if decoupled == self.decoupled:
            return self
        if self.owns_weight_decay:
            raise TypeError(
                f"decoupled_weight_decay={decoupled}: rule {self.name!r} decays weights in a way of its own; leave it "
                f"out"
            )
        if self._twin is None:
            self._twin = Rule(
                self.scalar,
                self.prepare,
                decoupled=decoupled,
                domains=self._domains,
                initial=self.initial,
                idle=self.idle,
            )
            self._twin.defaults = self.defaults
            self._twin._twin = self
        return self._twin

    def update_(self, p: Any, g: Any, *states: Any, t: int = 1, grad_scale: float = 1.0, **hyper: Any) -> None:
        """Update bare 1-D arrays in place, by the kernel that an Optimizer would use.

        Args:
            p, g, *states: 1-D contiguous arrays of one length and dtype (float32 or float64), none overlapping
                another: parameter, gradient (only read) and the rule's states, in the order of `Rule.states`, which
                begin as `Rule.initial` tells. A state that is one number per parameter (NovoGrad's v) comes last, as an
                array of one float64. NumPy arrays, or all on the current CUDA device: CuPy's, torch's
                (``tensor.detach()``), or any with ``__cuda_array_interface__``. The kernel runs on CuPy's current
                stream. torch must be on the same one; outside of its default stream, that takes
                ``with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):``.
            t: the number of this update, from 1.
            grad_scale: what the loss was multiplied by; the gradient is divided by it.
            **hyper: the rule's hyperparameters, numbers (not schedules); the defaults of its optimizer for the rest.

        Raises TypeError or ValueError, naming the argument, before anything is written. A layerwise rule (LAMB) takes
        the arrays as one parameter; a matrixwise one (Muon) does not take them.

        >>> import numpy as np, fastopt
        >>> p, m, v = np.ones(3), np.zeros(3), np.zeros(3)
        >>> fastopt.rules.adam.update_(p, np.array([1.0, -2.0, 0.0]), m, v, t=1, lr=0.1)
        >>> p.round(6)
        array([0.9, 1.1, 1. ])
        """
        kept = (*self.states, *self.numbers)
        if len(states) != len(kept):
            raise TypeError(
                f"rule {self.name!r} has {len(kept)} states ({', '.join(kept) or 'none'}); "
                f"found {len(states)} arrays after p and g"
            )
        if self.matrixwise is not None:
            raise TypeError(f"rule {self.name!r} looks at matrices, and not at bare 1-D arrays: use its optimizer")
        count = len(self.states)
        named = dict(zip(("p", "g", *self.states), (p, g, *states[:count]), strict=True))
        backend, vectors = check_vectors(named, read_only="g")
        numbers = []
        for name, given in zip(self.numbers, states[count:], strict=True):
            place, (number,) = check_vectors({name: given}, read_only="")
            if place is not backend:
                raise TypeError(f"{name} is on {place.name!r}, and p on {backend.name!r}: pass all arrays in one place")
            if number.dtype != np.float64 or number.size != 1:
                raise TypeError(f"{name}: expected 1 number of float64, found {number.size} of {number.dtype}")
            numbers.append(number)
        if not isinstance(t, Integral) or isinstance(t, bool) or t < 1:
            raise ValueError(f"t={t!r}: expected the number of this update, an int from 1")
        values = self.complete(hyper)
        values = {name: self.check(name, value) for name, value in values.items()}
        point = Point.of(self, values)
        hyper_type = hyper_of(self, point)
        size, dtype = vectors[0].size, vectors[0].dtype
        table = Table(self, hyper_type, dtype)
        unscale = table.unscale(grad_scale)
        table.write(0, int(t), point, unscale)
        unaligned = any(backend.address(array) % backend.wide for array in vectors)
        scattered = unaligned and not self.whole
        features = self.features(decays=values[WEIGHT_DECAY] != 0.0, unscale=unscale != 1.0, scattered=scattered)
        kernel = backend.kernel(self, hyper_type, dtype, features)
        # The loops of a rule with norms have no scattered form: they are given copies.
        used = [array.copy() for array in vectors] if unaligned and self.whole else vectors
        kernel.launch(
            used[0], used[1], (*used[2:], *numbers), table.array, _whole(size, self.whole, scattered, backend.device)
        )
        for array, new in zip(vectors, used, strict=True):
            if array is not new and array is not vectors[1]:
                backend.copy(array, new)


def rule(
    prepare: Callable[..., Any],
    *,
    decoupled: bool = False,
    layerwise: Layerwise | None = None,
    scaling: Scaling | None = None,
    matrixwise: Matrixwise | None = None,
    domains: Mapping[str, Domain] | None = None,
    initial: Mapping[str, float | str] | None = None,
    idle: Idle | None = None,
) -> Callable[[Callable[..., Any]], Rule]:
    r"""Make a Rule of a scalar function: the decorator with which optimizers are written.

    Args:
        prepare: function ``(t, ...) -> NamedTuple of floats``. `t` is the number of the update, from 1; the names after
            it are the hyperparameters, with their defaults. It runs on the host once a step, in float64: powers such as
            ``beta**t`` and differences such as ``1 - beta`` belong there. Its fields are read from `h` in the rule.
        decoupled: whether weight_decay shrinks p (``p *= 1 - lr*weight_decay``) instead of being added to the gradient.
        layerwise, scaling, matrixwise: see `Layerwise`, `Scaling`, `Matrixwise`.
        domains: ranges of hyperparameters that the field has no usual name for, as ``{"mu": Interval(0, 1)}``.
        initial: what states begin at that do not begin at 0, by name: a number, the name of a hyperparameter (its value
            at the first step), or ``"p"`` for the parameter itself.
        idle: what the rule does where there is no gradient, over many steps at once, for `Optimizer.step_rows`:
            ``fastopt.Linear()`` where p and the states are then mapped linearly.

    Returns:
        A decorator for a function ``(p, g, *states, h)`` that returns the new p (alone, where there is no state) or the
        tuple ``(p, *states)``. Use ``math`` functions, comparisons and arithmetic; no literals in arithmetic, which
        would promote float32 to float64 (refused when the kernel is compiled).

    Raises:
        TypeError: where the signature is not ``(p, g, *states, h)``.

    >>> import numpy as np, fastopt
    >>> from typing import NamedTuple
    >>> class Hyper(NamedTuple):
    ...     lr: float
    >>> def prepare(t, lr=0.1):
    ...     return Hyper(lr)
    >>> @fastopt.rule(prepare)
    ... def sign_descent(p, g, h):
    ...     return p - math.copysign(h.lr, g)
    >>> opt = fastopt.Optimizer({"w": np.ones(2)}, sign_descent)
    >>> _ = opt.step({"w": np.array([3.0, -3.0])})
    >>> opt.params["w"]
    array([0.9, 1.1])
    """

    def decorate(function: Callable[..., Any]) -> Rule:
        if not isinstance(function, FunctionType):
            raise TypeError(f"@rule: expected a plain function (p, g, *states, h), found {function!r}")
        return Rule(
            function,
            prepare,
            decoupled=decoupled,
            layerwise=layerwise,
            scaling=scaling,
            matrixwise=matrixwise,
            domains=domains,
            initial=initial,
            idle=idle,
        )

    return decorate


def _positional(function: Callable[..., Any], what: str) -> list[str]:
    name = getattr(function, "__name__", repr(function))
    parameters = list(inspect.signature(function).parameters.values())
    for parameter in parameters:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise TypeError(f"{what} {name!r}: {parameter} is not a plain positional parameter")
    return [parameter.name for parameter in parameters]


@lru_cache(maxsize=64)
def _whole(size: int, layerwise: bool, scattered: bool, device: int | None) -> np.ndarray:
    """One parameter. Each device has its own, of which it keeps a copy."""
    chunks = Layout.of([(size,)]).chunks([0], layerwise=layerwise)
    if scattered:
        chunks[:, 4] = chunks[:, 0]  # the gradient is where the parameter is
    return chunks
