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

from fastopt.closed_forms import Idle
from fastopt.kernels.contract import Features
from fastopt.step.table import EMA, WEIGHT_DECAY, Point, Table, hyper_of
from fastopt.storage.flat import Layout, check_vectors

MISSING = inspect.Parameter.empty

# --- what a hyperparameter may be -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A finite number in [low, high], or in [low, high) where `open` is set; with `length`, a tuple of them.

    Args:
        low, high: the ends, finite or -inf, inf.
        open: whether `high` itself is out of range.
        length: how many numbers, from 1; None for a single one that is no tuple.

    >>> from fastopt import Interval
    >>> str(Interval(0.0, 1.0, open=True, length=2))
    '2 numbers, each in [0, 1)'
    """

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    length: int | None = None

    def __str__(self) -> str:
        high = ")" if self.open or self.high == math.inf else "]"
        one = f"in [{self.low:g}, {self.high:g}{high}" if self.low > -math.inf else "finite"
        return f"{self.length} numbers, each {one}" if self.length else f"a number {one}"

    def check(self, name: str, value: Any) -> Any:
        """Refuse a value that is not in here.

        Args:
            name: of the hyperparameter, for the message.
            value: a number of Python or NumPy, or a sequence of `length` numbers.

        Returns:
            `value` as a float, or a tuple of floats.

        Raises:
            TypeError, ValueError: naming `name`: no number, not finite, out of range, or not `length` of them.

        >>> from fastopt import Interval
        >>> Interval(0.0).check("lr", 1)
        1.0
        """
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
    """True or False.

    >>> from fastopt import Flag, rule
    >>> decorator = rule(lambda t, lr, nesterov=True: None, domains={"nesterov": Flag()})
    """

    def check(self, name: str, value: Any) -> bool:
        """Refuse what is no bool.

        Args:
            name: of the hyperparameter, for the message.
            value: a bool of Python or NumPy.

        Returns:
            `value` as a bool.

        Raises:
            TypeError: naming `name`, where it is no bool.

        >>> from fastopt import Flag
        >>> Flag().check("nesterov", True)
        True
        """
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name}={value!r}: expected True or False")
        return bool(value)


@dataclass(frozen=True)
class Choice:
    """One of a few names.

    Args:
        names: those that are allowed.

    >>> from fastopt import Choice
    >>> Choice(("ema", "heavy_ball")).check("form", "ema")
    'ema'
    """

    names: tuple[str, ...]

    def check(self, name: str, value: Any) -> str:
        """Refuse what is none of the names.

        Args:
            name: of the hyperparameter, for the message.
            value: a str.

        Returns:
            `value`.

        Raises:
            ValueError: naming `name`, where it is none of the names.

        >>> from fastopt import Choice
        >>> Choice(("ema", "heavy_ball")).check("form", "nesterov")
        Traceback (most recent call last):
            ...
        ValueError: form='nesterov': expected one of 'ema', 'heavy_ball'
        """
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

    Args:
        ratio: ``ratio(norm_p, norm_u)``, a number, taken once per parameter in float64.
        apply: ``apply(p, *states, ratio, h)``, which returns the new p. u is not kept: it makes it anew of the states.

    >>> import numpy as np, fastopt
    >>> from typing import NamedTuple
    >>> class Hyper(NamedTuple):
    ...     lr: float
    >>> def ratio(norm_p, norm_u):
    ...     return norm_p / norm_u if norm_u > 0.0 else 1.0
    >>> def apply(p, u, ratio, h):
    ...     return p - h.lr * ratio * u
    >>> @fastopt.rule(lambda t, lr: Hyper(lr), layerwise=fastopt.Layerwise(ratio, apply))
    ... def relative_descent(p, g, u, h):
    ...     return g, g
    >>> opt = fastopt.Optimizer({"w": np.array([3.0, 4.0])}, relative_descent, lr=0.1)
    >>> _ = opt.step({"w": np.array([0.0, 8.0])})  # a step of a tenth of the norm of w
    >>> opt.params["w"]
    array([3. , 3.5])
    """

    ratio: Callable[..., Any]
    apply: Callable[..., Any]


@dataclass(frozen=True)
class Scaling:
    """How a rule uses norms of whole parameters that are known before its update: they decide about its scale.

    Args:
        scale: ``scale(norm_p, norm_g, h)``, taken once per parameter in float64; it takes the place of the last field
            of h. With `number` it is ``scale(norm_p, norm_g, number, h)`` and returns the scale and the new number.
        number: the name of a state that is one number per parameter, in float64, and begins at 0; None for none.

    >>> import numpy as np, fastopt
    >>> from typing import NamedTuple
    >>> class Hyper(NamedTuple):
    ...     lr: float
    ...     scale: float
    >>> def prepare(t, lr, weight_decay=0.0):
    ...     return Hyper(lr, 0.0)
    >>> def per_norm(norm_p, norm_g, h):
    ...     return 1.0 / norm_g if norm_g > 0.0 else 0.0
    >>> @fastopt.rule(prepare, scaling=fastopt.Scaling(per_norm))
    ... def normalized_descent(p, g, h):
    ...     return p - h.lr * h.scale * g
    >>> opt = fastopt.Optimizer({"w": np.zeros(2)}, normalized_descent, lr=0.5)
    >>> _ = opt.step({"w": np.array([3.0, -4.0])})
    >>> opt.params["w"].round(12)
    array([-0.3,  0.4])
    """

    scale: Callable[..., Any]
    number: str | None = None


@dataclass(frozen=True)
class Matrixwise:
    """How a rule uses whole matrices: what it steps along is made of them by linear algebra, before its update.

    Args:
        direction: a rule of the same states and hyperparameters, which is run first and leaves something in `state`.
        state: the name of that state.
        transform: ``transform(array, **hyperparameters)`` makes of a 2-D array of that state, in place, what the update
            then reads.
        chosen: the name of the hyperparameter that tells for which parameters this is done: it is true for 2-D ones
            unless an override says otherwise.

    >>> import numpy as np, fastopt
    >>> from typing import NamedTuple
    >>> class Hyper(NamedTuple):
    ...     lr: float
    >>> def prepare(t, lr, centred=True, weight_decay=0.0):
    ...     return Hyper(lr)
    >>> @fastopt.rule(prepare)
    ... def keep(p, g, u, h):
    ...     return p, g
    >>> def centre(u, **hyperparameters):
    ...     u -= u.mean(axis=0)
    >>> @fastopt.rule(prepare, matrixwise=fastopt.Matrixwise(keep, "u", centre, "centred"))
    ... def centred_descent(p, g, u, h):
    ...     return p - h.lr * u, u
    >>> opt = fastopt.Optimizer({"W": np.zeros((2, 2))}, centred_descent, lr=1.0)
    >>> _ = opt.step({"W": np.array([[1.0, 0.0], [3.0, 0.0]])})
    >>> opt.params["W"]
    array([[ 1.,  0.],
           [-1.,  0.]])
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
        """Every hyperparameter that the rule accepts: its own, and weight_decay, which the loop handles for all.

        >>> import fastopt
        >>> fastopt.rules.momentum.names()
        ('lr', 'momentum', 'form', 'weight_decay')
        """
        return self.hyperparameters if self.owns_weight_decay else (*self.hyperparameters, WEIGHT_DECAY)

    def check(self, name: str, value: Any, where: str = "") -> Any:
        """Refuse a hyperparameter that is out of range.

        Args:
            name: of the hyperparameter.
            value: a number, flag or name; no schedule, see `check_all`.
            where: what the message begins with.

        Returns:
            `value` in the form that `prepare` expects.

        Raises:
            TypeError, ValueError: naming the hyperparameter, what was found and what was expected.

        >>> import fastopt
        >>> fastopt.rules.adam.check("betas", [0.9, 0.99])
        (0.9, 0.99)
        """
        domain = self._domains.get(name)
        if domain is None:
            domain = Flag() if isinstance(self.defaults.get(name), bool) else Interval()
        return domain.check(where + name, value)

    def check_all(self, values: Mapping[str, Any], where: str = "", step: int = 0) -> dict[str, Any]:
        """Refuse hyperparameters that the rule does not have, or that are out of range.

        Args:
            values: by name: what `check` takes, or schedules.
            where: what messages begin with.
            step: the next one, an int from 0, at which schedules are tried.

        Returns:
            A dict of `values` as `check` returns them; a schedule stays one.

        Raises:
            TypeError, ValueError: naming the hyperparameter.

        >>> import fastopt
        >>> fastopt.rules.sgd.check_all({"lr": 1})
        {'lr': 1.0}
        """
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
        """The given hyperparameters, and the defaults of the rest.

        Args:
            given: hyperparameters by name.

        Returns:
            A dict of all of them, in the order of `names`.

        Raises:
            TypeError: naming one that is unknown, or has no default.

        >>> import fastopt
        >>> fastopt.rules.momentum.complete({"lr": 0.5})
        {'lr': 0.5, 'momentum': 0.9, 'form': 'heavy_ball', 'weight_decay': 0.0}
        """
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
        """The flags of the kernel that runs this rule.

        Args:
            decays: whether some parameter decays its weights.
            **flags: of `fastopt.kernels.contract.Features`, other than those of weight decay.

        Returns:
            A `fastopt.kernels.contract.Features`.

        >>> import fastopt
        >>> found = fastopt.rules.sgd.features(decays=True)
        >>> found.l2, found.decoupled
        (True, False)
        """
        by_loop = decays and not self.owns_weight_decay
        return Features(**flags, l2=by_loop and not self.decoupled, decoupled=by_loop and self.decoupled)

    def decaying(self, decoupled: bool) -> Rule:
        """This rule with decoupled weight decay, or with L2.

        Args:
            decoupled: True for ``p *= 1 - lr weight_decay``, False for ``g += weight_decay p``.

        Returns:
            A `Rule`: this one, or its twin.

        Raises:
            TypeError: it decays weights in a way of its own.

        >>> import fastopt
        >>> fastopt.rules.sgd.decaying(True).decoupled
        True
        """
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
            grad_scale: what the loss was multiplied by, a positive finite number; the gradient is divided by it.
            **hyper: the rule's hyperparameters, numbers (not schedules); the defaults of its optimizer for the rest.

        A layerwise rule (LAMB) takes the arrays as one parameter; a matrixwise one (Muon) does not take them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is written.
            RuntimeError: the arrays are on a device, and the CUDA backend cannot work here.

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
