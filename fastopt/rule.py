"""`rule` turns a scalar update into a Rule: the mathematics of one optimizer, and its hyperparameters.

A rule is a plain function of scalars. Its signature is its specification: first ``p, g``, last ``h``; the names between
are its state buffers, which begin at zero. It returns the new p and the new states.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt import scalars, suggest
from fastopt.closed_forms import Idle
from fastopt.hyper import DOMAINS, EMA, EPS, LOSS, WEIGHT_DECAY, Domain, Flag, Interval, check_each
from fastopt.source import written

MISSING = inspect.Parameter.empty
OVER = ("tensor", "row", "column", "all")
"""What `Sums` may go over."""
SETTLED = ("sums", "numbers", "size", "h")
"""What `Sums.settle` takes."""


class _Ratio(NamedTuple):
    """What a layerwise rule has in h besides the fields of its own."""

    ratio_of_norms: float


(RATIO,) = _Ratio._fields
NOT_PLAIN = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


@dataclass(frozen=True)
class Sums:
    """Sums and norms of whole parameters, known before the update, give some of the rule's hyperparameters.

    Args:
        terms: ``{"name": term}``, each a scalar function ``term(p, g, *states, h)`` of an element before its update. It
            is computed in the dtype, and added up in float64. It is given the p and g that the rule is given: clipped,
            and with weight decay where the loop applies it.
        settle: ``settle(sums, numbers, size, h)``, computed in float64: `sums` and `numbers` have a field for each
            name, `size` is the number of elements. It returns the tuple of the values of `results`, then the new
            `numbers`; a single value alone, not in a tuple.
        results: the names of the fields of h which those values replace, or their positions, -1 that of the last: for
            the elements of that parameter, row or column.
        numbers: the names of states of one float64 per parameter, row or column, which begin at 0. Several `Sums` of a
            rule over the same may share one.
        over: ``"tensor"``: sums over each parameter, settled once for each; ``"row"`` and ``"column"``: over each row
            and each column of a parameter; ``"all"``: over all parameters of the step, settled once, by the h of the
            first one. The numbers are then the same for all parameters. A parameter of more than two axes is the matrix
            ``p.reshape(p.shape[0], -1)``; one of fewer than two is a single row. In a population these are the
            parameters of one member: all are those of its network.
        norms: ``{"name": function}``, as `terms`. Their sums are the norms, ``sqrt(sum(function(...)**2))``, right
            wherever they are in the range of the dtype, whether or not the squares are.

    Each `Sums` with terms or norms reads what these use once more before the update. Sums are those of fixed blocks (of
    4096 elements, or of pieces of a matrix), added in their order: the same bits for any number of threads.

    Raises:
        TypeError: functions of another signature, or names that are not names.

    >>> import numpy as np, fastopt
    >>> from typing import NamedTuple
    >>> class Hyper(NamedTuple):
    ...     lr: float
    ...     factor: float
    >>> def prepare(t, lr):
    ...     return Hyper(lr, 1.0)
    >>> def square(p, g, h):
    ...     return g * g
    >>> def settle(sums, numbers, size, h):
    ...     rms = (sums.square / size) ** 0.5
    ...     return 1.0 / max(1.0, rms)
    >>> @fastopt.rule(prepare, sums=fastopt.Sums({"square": square}, settle, results=("factor",)))
    ... def descent_of_bounded_rms(p, g, h):
    ...     return p - h.lr * h.factor * g
    >>> opt = fastopt.Optimizer({"w": np.zeros(2), "b": np.zeros(1)}, descent_of_bounded_rms, lr=1.0)
    >>> _ = opt.step({"w": np.array([30.0, 40.0]), "b": np.array([0.5])})
    >>> opt.params["w"].round(3), opt.params["b"]
    (array([-0.849, -1.131]), array([-0.5]))
    """

    terms: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    settle: Callable[..., Any] = None  # type: ignore[assignment]  # a default because `terms` has one; None is refused
    results: tuple[str | int, ...] = ()
    numbers: tuple[str, ...] = ()
    over: str = "tensor"
    norms: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("terms", "norms"):
            functions = getattr(self, name)
            if not isinstance(functions, Mapping):
                raise TypeError(f"Sums: {name}: must be a dict of name -> term(p, g, *states, h), got {functions!r}")
        several_names("Sums: terms", (*self.terms, *self.norms), tuple)
        several_names("Sums: numbers", self.numbers, tuple)
        by_name = self.results
        if isinstance(by_name, tuple):
            by_name = tuple([each for each in by_name if type(each) is not int])
        several_names("Sums: results", by_name, tuple)
        if not self.results and not self.numbers:
            raise TypeError("Sums: results: must name what settle gives, or numbers must, got neither")
        if self.over not in OVER:
            raise TypeError(f"Sums: over: must be {', '.join(map(repr, OVER[:-1]))} or {OVER[-1]!r}, got {self.over!r}")
        _check_call("Sums: settle", self.settle, SETTLED)

    def __hash__(self) -> int:
        functions = tuple(self.terms.items()), tuple(self.norms.items())
        return hash((functions, self.settle, self.results, self.numbers, self.over))


@dataclass(frozen=True)
class Layerwise:
    """Norms of whole parameters scale the update: the first value that the rule returns is a proposed update u, not p.

    It is short for `Sums` with the norms of p and u, which run the rule once more before the update.

    Args:
        ratio: ``ratio(norm_p, norm_u)``, a number, computed once per parameter in float64; or
            ``ratio(norm_p, norm_u, size, h)``, `size` being the number of elements.
        apply: ``apply(p, *states, ratio, h)``, which returns the new p; or ``apply(p, g, *states, ratio, h)``. u is not
            stored: `apply` computes it again from the new states.
        direction: ``direction(p, *states, h)``, which returned u from the new states, is no longer needed.

    Raises:
        TypeError: `ratio` must take two or four arguments; a rule refuses an `apply` or a `direction` that does not fit
            it.

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
    direction: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        _check_call("Layerwise: ratio", self.ratio, ("norm_p", "norm_u"), longer=("norm_p", "norm_u", "size", "h"))

    def _around(
        self, function: FunctionType, prepare: Callable[..., Any], states: tuple[str, ...]
    ) -> tuple[FunctionType, Callable[..., Any], Sums]:
        """Return what a rule is then whose scalar function returns u: its scalar function, its prepare and its sums."""
        where, names = f"rule {function.__name__!r}: layerwise", ("p", "g", *states, "h")
        _check_call(f"{where}: apply", self.apply, ("p", *states, "ratio", "h"), longer=(*names[:-1], "ratio", "h"))
        if self.direction is not None:
            _check_call(f"{where}: direction", self.direction, ("p", *states, "h"))

        def made(name: str, parameters: Sequence[str], *lines: str) -> FunctionType:
            constants = {"RULE": function, "APPLY": self.apply, "RATIO": self.ratio}
            return written(name, parameters, lines, constants, function.__module__)

        first, new = ("", ()) if not states else ("[0]", [f"new_[{k}]" for k in range(1, len(states) + 1)])
        g = () if _takes(self.apply, len(states) + 3) else ("g",)
        moved = f"APPLY({', '.join(('p', *g, *new, f'h.{RATIO}', 'h'))})"
        update = made(
            function.__name__,
            names,
            f"new_ = RULE({', '.join(names)})",
            f"return ({moved},) + new_[1:]" if states else f"return {moved}",
        )
        more = "" if _takes(self.ratio, 2) else ", size, h"
        settle = made("ratio", SETTLED, f"return RATIO(sums.p, sums.u{more})")
        proposed = made("proposed", names, f"return RULE({', '.join(names)}){first}")
        norms = {"p": made("parameter", names, "return p"), "u": proposed}
        return update, _with_ratio(prepare, function.__name__), Sums(settle=settle, results=(RATIO,), norms=norms)


@dataclass(frozen=True)
class Scaling:
    """Norms of whole parameters, known before the update, give the scale of the update.

    It is short for `Sums` with the norms of p and g.

    Args:
        scale: ``scale(norm_p, norm_g, h)``, computed once per parameter in float64; the result replaces the last field
            of h. With `number`, ``scale(norm_p, norm_g, number, h)`` returns the scale and the new number, or numbers.
            It may also take the number of elements: ``scale(norm_p, norm_g, size, number, h)``.
        number: the name of a per-tensor state: one float64 per parameter, which begins at 0; a tuple of names for
            several; None for none.

    Raises:
        TypeError: `number` must be a name, names or None, and `scale` must take the arguments above.

    >>> import numpy as np, fastopt
    >>> from typing import NamedTuple
    >>> class Hyper(NamedTuple):
    ...     lr: float
    ...     scale: float
    >>> def prepare(t, lr):
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
    number: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        named = isinstance(self.number, str | tuple | None)
        if not named or not all(isinstance(each, str) and each.isidentifier() for each in self.numbers):
            raise TypeError(f"Scaling: number: must be a name, a tuple of names, or None, got {self.number!r}")
        names = ("norm_p", "norm_g", *self.numbers, "h")
        _check_call("Scaling: scale", self.scale, names, longer=(*names[:2], "size", *names[2:]))

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the per-tensor states."""
        return () if self.number is None else (self.number,) if isinstance(self.number, str) else self.number

    def _sums(self, function: FunctionType, states: tuple[str, ...]) -> Sums:
        """Return the sums of a rule of this scalar function and these states."""
        numbers = [f"numbers[{k}]" for k in range(len(self.numbers))]
        size = () if _takes(self.scale, 3 + len(numbers)) else ("size",)
        settle = written(
            "scale",
            SETTLED,
            [f"return SCALE({', '.join(('sums.p', 'sums.g', *size, *numbers, 'h'))})"],
            {"SCALE": self.scale},
            function.__module__,
        )
        names = ("p", "g", *states, "h")
        norms = {name: written(name, names, [f"return {name}"], {}, function.__module__) for name in ("p", "g")}
        return Sums(settle=settle, results=(-1,), numbers=self.numbers, norms=norms)


@dataclass(frozen=True)
class Matrixwise:
    """Linear algebra on whole matrices gives the direction of the update.

    Args:
        direction: a rule with the same states and hyperparameters. It runs first, and writes `state`.
        state: the name of that state.
        transform: ``transform(array, **keywords)`` transforms a 2-D array of that state in place, for the update to
            read. The keywords are the hyperparameters, `matrices`, and those of the following that the signature of
            `transform` has, or all where it ends in ``**keywords``: the other states by name, as 2-D arrays; ``t``, the
            number of this update of the parameter, an int from 1; ``path``, of the parameter; and ``seed``, an int in
            [0, 2^32) that is made of these two: the same on every machine. States and matrices may be written. It must
            not raise: the step is then not counted, but what it has written stays.
        chosen: the name of the hyperparameter, a flag, that selects the parameters: by default it is True for 2-D
            parameters and False for the others; overrides can change it.
        matrix_only, other_only: the names of hyperparameters that act only where the flag is True, and only where it is
            False. An override that cannot act is refused.
        matrices: further states of the parameters that are selected: ``{"name": (rows, columns)}``, each side
            ``"rows"`` or ``"columns"`` of the parameter, or a whole number. They begin at 0, in the parameter's dtype,
            and are saved and copied as states are, at their own size; they are (0, 0) where the flag is False, which
            also forgets them.
        reshape: ``"first_axis"`` treats a parameter of more than two dimensions, such as the kernel of a convolution,
            as a matrix of ``shape[0]`` rows, which is then selected by default as well; None leaves it out.
        largest: parameters with more rows or columns than this are not selected by default; None for no limit.

    Raises:
        TypeError: names that are not names, or that two things have; sides of another kind. A rule refuses a
            `transform` that cannot take what it is given.

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
    matrix_only: tuple[str, ...] = ()
    other_only: tuple[str, ...] = ()
    matrices: Mapping[str, tuple[str | int, str | int]] = field(default_factory=dict)
    reshape: str | None = None
    largest: int | None = None

    def __post_init__(self) -> None:
        if self.reshape not in (None, "first_axis"):
            raise TypeError(f"Matrixwise: reshape: must be None or 'first_axis', got {self.reshape!r}")
        for name in ("matrix_only", "other_only"):
            several_names(f"Matrixwise: {name}", getattr(self, name))
        if self.largest is not None and not _is_count(self.largest):
            raise TypeError(f"Matrixwise: largest: must be an int from 0, or None, got {self.largest!r}")
        if not isinstance(self.matrices, Mapping):
            raise TypeError(f"Matrixwise: matrices: must be a dict of name -> (rows, columns), got {self.matrices!r}")
        for name, shape in self.matrices.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise TypeError(f"Matrixwise: matrices: must have names of variables as keys, got {name!r}")
            sides = shape if isinstance(shape, tuple) else ()
            if len(sides) != 2 or not all(side in ("rows", "columns") or _is_count(side) for side in sides):
                raise TypeError(
                    f"Matrixwise: matrices[{name!r}]: must be a pair of 'rows', 'columns' or ints from 0, got {shape!r}"
                )

    def __hash__(self) -> int:
        matrices = tuple(self.matrices.items())
        return hash((self.direction, self.state, self.transform, self.chosen, matrices, self.reshape, self.largest))


class Rule:
    """A scalar update with its hyperparameters. Made by `rule`; call it like the plain function that it is.

    Attributes:
        name, states: the function's name, and the names of its state buffers.
        scalar: the scalar function, in plain Python.
        prepare: ``prepare(t, **hyperparameters) -> NamedTuple``, run on the host once per step in float64.
        hyperparameters: the names of the arguments of `prepare` after t.
        defaults: the default values, by name.
        decoupled: whether ``weight_decay`` shrinks p directly (AdamW) instead of being added to the gradient (L2).
        matrixwise: a `Matrixwise`; None for none.
        sums: the tuple of its `Sums`, among them what a `Layerwise` or `Scaling` is short for. With none of these, the
            rule updates each element on its own.
        initial: the initial values of states that do not begin at 0: a number, the name of a hyperparameter, or
            ``"p"``.
        extra: the names of the states that a step is given.
        for_matrices: the names of flags that are False by default for parameters of fewer than two axes.
        nonnegative: the names of states that are never below 0.
        inputs: the names of the arguments of `prepare` that are none of the hyperparameters: whether one of `extra` is
            given, and the loss.
        idle: the closed form of many zero-gradient steps, a `fastopt.closed_forms.Idle`; None for none, which rules out
            `Optimizer.step_rows`.
        gradients_in, evaluated_in: the names of the context managers of the optimizer inside which gradients are
            computed (``"lookahead"``), and inside which the parameters are evaluated (``"eval_params"``); None where
            the parameters serve as they are.
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
        sums: Sums | Sequence[Sums] = (),
        domains: Mapping[str, Domain] | None = None,
        initial: Mapping[str, float | str] | None = None,
        extra: Sequence[str] = (),
        for_matrices: Sequence[str] = (),
        nonnegative: Sequence[str] = (),
        idle: Idle | None = None,
        gradients_in: str | None = None,
        evaluated_in: str | None = None,
    ):
        stages = {"layerwise": (layerwise, Layerwise), "scaling": (scaling, Scaling)}
        for name, (stage, kind) in {**stages, "matrixwise": (matrixwise, Matrixwise)}.items():
            if stage is not None and not isinstance(stage, kind):
                raise TypeError(f"rule {function.__name__!r}: {name}: must be a {kind.__name__} or None, got {stage!r}")
        names = list(_parameters(function, "rule"))
        if len(names) < 3 or names[:2] != ["p", "g"] or names[-1] != "h":
            raise TypeError(
                f"rule {function.__name__!r}: must have the signature (p, g, *states, h), for example (p, g, m, v, h), "
                f"got ({', '.join(names)})"
            )
        states = tuple(names[2:-1])
        made = list(several_sums(f"rule {function.__name__!r}", sums))
        prepared = _parameters(prepare, "prepare")
        if next(iter(prepared), None) != "t":
            raise TypeError(
                f"prepare of rule {function.__name__!r}: must take the step number t first, then hyperparameters, got "
                f"({', '.join(prepared)})"
            )
        if scaling is not None:
            made.append(scaling._sums(function, states))
        self.scalar, self.prepare = function, prepare
        if layerwise is not None:
            self.scalar, self.prepare, of_layers = layerwise._around(function, prepare, states)
            made.append(of_layers)
        self.name = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__name__ = self.__qualname__ = function.__name__
        self.states = states
        self.decoupled = decoupled
        self.matrixwise = matrixwise
        self.sums = tuple(made)
        if not isinstance(initial, Mapping | None):
            raise TypeError(f"rule {self.name!r}: initial: must be a dict of state -> initial value, got {initial!r}")
        self.initial = dict(initial or {})
        if idle is not None and (isinstance(idle, type) or not isinstance(idle, Idle)):
            raise TypeError(
                f"rule {self.name!r}: idle: must be a closed form, as fastopt.Linear(), or None, got {idle!r}"
            )
        self.idle = idle
        self.gradients_in = gradients_in
        self.evaluated_in = evaluated_in
        self.extra = several_names(f"rule {self.name!r}: extra", extra)
        for name in self.extra:
            if name not in self.states:
                raise TypeError(f"rule {self.name!r}: extra: must name states ({', '.join(self.states)}), got {name!r}")
        arguments = tuple(prepared)[1:]
        self.inputs = tuple([name for name in arguments if name in self.extra or name == LOSS])
        if idle is not None and (self.extra or self.inputs):
            raise TypeError(f"rule {self.name!r}: idle: must be None for a rule of further inputs, got {idle!r}")
        self.hyperparameters = tuple([name for name in arguments if name not in self.inputs])
        self.defaults: dict[str, Any] = {
            name: prepared[name] for name in self.hyperparameters if prepared[name] is not MISSING
        }
        self.for_matrices = several_names(f"rule {self.name!r}: for_matrices", for_matrices)
        for name in self.for_matrices:
            if name not in self.hyperparameters:
                raise TypeError(
                    f"rule {self.name!r}: for_matrices: must name hyperparameters ({', '.join(self.hyperparameters)}), "
                    f"got {name!r}"
                )
        self.nonnegative = several_names(f"rule {self.name!r}: nonnegative", nonnegative)
        for name in self.nonnegative:
            if name not in self.states:
                raise TypeError(
                    f"rule {self.name!r}: nonnegative: must name states ({', '.join(self.states)}), got {name!r}"
                )
        self.owns_weight_decay = WEIGHT_DECAY in self.hyperparameters
        if decoupled and ("lr" not in self.hyperparameters or self.owns_weight_decay):
            raise TypeError(
                f"rule {self.name!r}: prepare must take lr, and not weight_decay, with decoupled=True, got "
                f"({', '.join(prepared)})"
            )
        if matrixwise is not None and not self.owns_weight_decay:
            raise TypeError(
                f"rule {self.name!r}: prepare must take weight_decay for a matrixwise rule, which applies its own, got "
                f"({', '.join(prepared)})"
            )
        unknown = [] if matrixwise is None else [*matrixwise.matrix_only, *matrixwise.other_only, matrixwise.chosen]
        unknown = [name for name in unknown if name not in self.hyperparameters]
        if unknown:
            raise TypeError(
                f"rule {self.name!r}: matrixwise: must name hyperparameters ({', '.join(self.hyperparameters)}), got "
                f"{unknown[0]!r}"
            )
        self._check_sums(names)
        self.handed: frozenset[str] = frozenset()
        """What the transform of a matrixwise rule is given besides the hyperparameters, by name."""
        if matrixwise is not None:
            self._check_matrixwise(matrixwise)
        kept = (*self.states, *self.numbers, *self.matrices)
        if EMA in kept or len(set(kept)) != len(kept):
            raise TypeError(
                f"rule {self.name!r}: names of states must differ from {EMA!r} and each other, got {', '.join(kept)}"
            )
        for state, value in self.initial.items():
            if state not in self.states:
                raise TypeError(
                    f"rule {self.name!r}: initial: must name states ({', '.join(self.states)}), got {state!r}"
                )
            where, expected = f"rule {self.name!r}: initial[{state!r}]", "a number, 'p' or a hyperparameter"
            expected += f" ({', '.join(self.hyperparameters)})"
            if isinstance(value, str) and value not in ("p", *self.hyperparameters):
                raise TypeError(f"{where}: must be {expected}, got {value!r}")
            if not isinstance(value, str):
                scalars.number(where, value, expected)
        self._domains = {**DOMAINS, **checked_domains(f"rule {self.name!r}", domains)}
        self._twin: Rule | None = None
        self._plain: Rule | None = None
        """The rule whose twin this is."""
        self._made_by: tuple[Any, ...] | None = None
        """Of a rule that is made of others: what pickles it where it is no global."""

    def _check_matrixwise(self, matrixwise: Matrixwise) -> None:
        """Refuse a transform that cannot be called as it would be, and note what it is given."""
        where, transform = f"rule {self.name!r}: matrixwise", matrixwise.transform
        if matrixwise.state not in self.states:
            raise TypeError(
                f"{where}: state: must be one of the rule's states ({', '.join(self.states)}), got {matrixwise.state!r}"
            )
        if not callable(transform):
            raise TypeError(f"{where}: transform: must be a function (array, **keywords), got {transform!r}")
        first, taken = _keywords(transform)
        beside = ["t", "path", "seed", *[name for name in self.states if name != matrixwise.state]]
        handed = [*self.matrices, *[name for name in beside if taken is None or name in taken]]
        for name in handed:
            if name == first or name in self.hyperparameters or (*beside, *self.matrices).count(name) > 1:
                raise TypeError(
                    f"{where}: names of states, matrices and hyperparameters must differ from each other, from 't', "
                    f"'path' and 'seed', and from the first parameter of transform, got {name!r} twice; rename one"
                )
        _check_call(f"{where}: transform", transform, ("array",), (*self.hyperparameters, *handed))
        self.handed = frozenset(handed)
        if not isinstance(matrixwise.direction, Rule) or len(matrixwise.direction.states) != len(self.states):
            raise TypeError(
                f"{where}: direction: must be a rule with the states {', '.join(self.states)}, got "
                f"{matrixwise.direction!r}"
            )

    def _check_sums(self, names: list[str]) -> None:
        """Refuse sums that do not fit the rule, whose function has parameters of these names."""
        others = [kind for kind in ("matrixwise", "idle") if getattr(self, kind) is not None]
        if self.sums and others:
            raise TypeError(f"rule {self.name!r}: {others[0]}: must be None for a rule with sums")
        over: dict[str, str] = {}
        for sums in self.sums:
            for name in sums.numbers:
                if over.setdefault(name, sums.over) != sums.over:
                    raise TypeError(
                        f"rule {self.name!r}: sums: number {name!r}: must be settled over the same by all, got "
                        f"{over[name]!r} and {sums.over!r}"
                    )
            for kind, functions in (("terms", sums.terms), ("norms", sums.norms)):
                for name, term in functions.items():
                    _check_call(f"rule {self.name!r}: sums: {kind}[{name!r}]", term, names)

    def __call__(self, *arguments: Any) -> Any:
        """Run the scalar function, so that one rule can be written in terms of another."""
        return self.scalar(*arguments)

    def __copy__(self) -> Rule:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Rule:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle the rule by its name, as functions are pickled."""
        if self._plain is not None:
            return Rule.decaying, (self._plain, self.decoupled)
        if getattr(sys.modules.get(self.__module__), self.__name__, None) is not self:
            if self._made_by is not None:
                return self._made_by
            raise pickle.PicklingError(
                f"rule {self.name!r}: must be a global of its module ({self.__module__}) under its own name to be "
                f"pickled, got another or none there; define it at the top of a module that can be imported"
            )
        return self.__name__

    def __repr__(self) -> str:
        return f"<rule {self.name}({', '.join(('p', 'g', *self.states, 'h'))})>"

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of states of one number per parameter, row or column."""
        return tuple(self.over)

    @property
    def over(self) -> dict[str, str]:
        """By the name of such a state: of what it has a number each, as `Sums.over`."""
        return {name: sums.over for sums in self.sums for name in sums.numbers}

    @property
    def lined(self) -> bool:
        """Whether the rule uses sums over rows or columns."""
        return any(sums.over in ("row", "column") for sums in self.sums)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of state matrices, whose shapes are made of the rows and columns of a parameter."""
        return () if self.matrixwise is None else tuple(self.matrixwise.matrices)

    @property
    def sample_inputs(self) -> dict[str, Any]:
        """What `prepare` may be told of the further inputs of a step, by name, where there is no step."""
        return {name: 1.0 if name == LOSS else False for name in self.inputs}

    def prepared(self, t: int, arguments: Sequence[Any], inputs: Mapping[str, Any]) -> Any:
        """Return what `prepare` returns.

        Args:
            t: the number of the update, from 1.
            arguments: the hyperparameters, in the order of `hyperparameters`.
            inputs: what it is told of the further inputs of the step, by name; empty for most rules.

        Returns:
            A NamedTuple of numbers.

        >>> import fastopt
        >>> fastopt.rules.sgd.prepared(1, (0.5,), {})
        Hyper(lr=0.5)
        """
        if not self.inputs:
            return self.prepare(t, *arguments)
        return self.prepare(t, **dict(zip(self.hyperparameters, arguments, strict=True)), **inputs)

    @property
    def whole(self) -> bool:
        """Whether the rule uses sums over whole parameters, such as norms."""
        return bool(self.sums)

    def names(self) -> tuple[str, ...]:
        """Return the names of all hyperparameters: the rule's own, and weight_decay, which the loop applies.

        >>> import fastopt
        >>> fastopt.rules.momentum.names()
        ('lr', 'momentum', 'form', 'weight_decay')
        """
        return self.hyperparameters if self.owns_weight_decay else (*self.hyperparameters, WEIGHT_DECAY)

    def check(self, name: str, value: Any, where: str = "", dtype: Any = None, members: int | None = None) -> Any:
        """Return a hyperparameter that is in range; refuse others.

        Args:
            name: the hyperparameter.
            value: a number, flag or name. `check_all` also accepts schedules.
            where: the beginning of the message.
            dtype: the dtype that is computed in, in which an eps other than 0 must not be 0; None where it is not known
                yet.
            members: of a population, whose hyperparameters may be arrays; None for one network.

        Returns:
            `value` in the form that `prepare` expects; in a population, an array is in place of a number that differs.

        Raises:
            TypeError, ValueError: naming the hyperparameter, what it must be, and the value.

        >>> import fastopt
        >>> fastopt.rules.adam.check("betas", [0.9, 0.99])
        (0.9, 0.99)
        """
        domain = self._domains.get(name)
        if domain is None:
            domain = Flag() if isinstance(self.defaults.get(name), bool) else Interval()
        if members is None:
            checked = domain.check(where + name, value)
        else:
            checked = check_each(domain, where + name, value, members)
        if dtype is not None and name in EPS:
            for number in set(checked.tolist()) if isinstance(checked, np.ndarray) else (checked,):
                scalars.check_eps(where + name, number, dtype)
        return checked

    def check_all(
        self,
        values: Mapping[str, Any],
        where: str = "",
        step: int = 0,
        dtype: Any = None,
        members: int | None = None,
    ) -> dict[str, Any]:
        """Return hyperparameters that the rule has and that are in range; refuse others.

        Args:
            values: by name: values that `check` accepts, or schedules.
            where: the beginning of messages.
            step: the next step, an int from 0, at which schedules are evaluated.
            dtype, members: as for `check`.

        Returns:
            A dict of `values` as `check` returns them; schedules stay as they are.

        Raises:
            TypeError, ValueError: naming the hyperparameter.

        >>> import fastopt
        >>> fastopt.rules.sgd.check_all({"lr": 1})
        {'lr': 1.0}
        """
        for name, value in values.items():
            if name not in self.names():
                raise TypeError(f"{where}{self._unknown(name, value)}")
        checked = {}
        for name, value in values.items():
            if callable(value):
                self.check(name, value(step), f"{where}at step {step}, schedule of ", dtype, members)
                checked[name] = value
            else:
                checked[name] = self.check(name, value, where, dtype, members)
        return checked

    def complete(self, given: Mapping[str, Any], also: Iterable[str] = ()) -> dict[str, Any]:
        """Return the given hyperparameters, and the defaults of the others.

        Args:
            given: hyperparameters by name.
            also: other arguments of the caller, which an unknown name may have been meant to be.

        Returns:
            A dict of all hyperparameters, in the order of `names`.

        Raises:
            TypeError: naming a hyperparameter that is unknown, or has no default.

        >>> import fastopt
        >>> fastopt.rules.momentum.complete({"lr": 0.5})
        {'lr': 0.5, 'momentum': 0.9, 'form': 'heavy_ball', 'weight_decay': 0.0}
        """
        unknown = [name for name in given if name not in self.names()]
        if unknown:
            raise TypeError(self._unknown(unknown[0], given[unknown[0]], also))
        values = {WEIGHT_DECAY: 0.0, **self.defaults, **given}
        missing = [name for name in self.names() if name not in values]
        if missing:
            raise TypeError(f"{missing[0]}: must be given, rule {self.name!r} has no default; pass {missing[0]}=")
        return {name: values[name] for name in self.names()}

    def _unknown(self, name: str, value: Any, also: Iterable[str] = ()) -> str:
        """Return the message for a hyperparameter that the rule does not have. also : as for `complete`."""
        expected = f"a hyperparameter of {self.name!r} ({', '.join(self.names())})"
        meant = suggest.argument(name, [*self.names(), *also])
        hint = ""
        if meant is not None:
            number, before = scalars.real(value), self.defaults.get(meant)
            spelled = "" if number is None else f"{number!r}"
            if number is not None and isinstance(before, tuple) and name[-1:].isdigit():  # one of betas
                spelled = str(tuple([number if k == int(name[-1]) else item for k, item in enumerate(before, 1)]))
            hint = f"; did you mean {meant}={spelled}?"
        return f"{name}: must be {expected}, got {name}={scalars.shown(value)}{hint}"

    def decaying(self, decoupled: bool) -> Rule:
        """Return this rule with decoupled weight decay, or with L2.

        Args:
            decoupled: True for ``p *= 1 - lr weight_decay``, False for ``g += weight_decay p``.

        Returns:
            A `Rule`: this one, or its twin.

        Raises:
            TypeError: the rule applies its own weight decay.

        >>> import fastopt
        >>> fastopt.rules.sgd.decaying(True).decoupled
        True
        """
        if decoupled == self.decoupled:
            return self
        if self.owns_weight_decay:
            raise TypeError(
                f"decoupled_weight_decay: must be None for rule {self.name!r}, which applies its own weight decay, got "
                f"{decoupled}"
            )
        if self._twin is None:
            self._twin = Rule(
                self.scalar,
                self.prepare,
                decoupled=decoupled,
                sums=self.sums,
                domains=self._domains,
                initial=self.initial,
                extra=self.extra,
                for_matrices=self.for_matrices,
                nonnegative=self.nonnegative,
                idle=self.idle,
                gradients_in=self.gradients_in,
                evaluated_in=self.evaluated_in,
            )
            self._twin.defaults = self.defaults
            self._twin._twin = self._twin._plain = self
        return self._twin

    if TYPE_CHECKING:  # attached by `fastopt.bare`: a rule launches nothing

        def update_(self, p: Any, g: Any, *states: Any, t: int = 1, grad_scale: float = 1.0, **hyper: Any) -> None:
            """Update 1-D arrays in place: see `fastopt.bare.update_`."""


def rule(
    prepare: Callable[..., Any],
    *,
    decoupled: bool = False,
    layerwise: Layerwise | None = None,
    scaling: Scaling | None = None,
    matrixwise: Matrixwise | None = None,
    sums: Sums | Sequence[Sums] = (),
    domains: Mapping[str, Domain] | None = None,
    initial: Mapping[str, float | str] | None = None,
    extra: Sequence[str] = (),
    for_matrices: Sequence[str] = (),
    nonnegative: Sequence[str] = (),
    idle: Idle | None = None,
    gradients_in: str | None = None,
    evaluated_in: str | None = None,
) -> Callable[[Callable[..., Any]], Rule]:
    r"""Return a decorator that turns a scalar function into a Rule.

    Args:
        prepare: function ``(t, ...) -> NamedTuple of floats``. `t` is the number of the update, from 1; the names after
            it are the hyperparameters, with their defaults. It runs on the host once per step, in float64: powers such
            as ``beta**t`` and differences such as ``1 - beta`` belong here. The rule reads the fields from `h`.
        decoupled: whether weight_decay shrinks p (``p *= 1 - lr*weight_decay``) instead of being added to the gradient.
        layerwise, scaling, matrixwise: see `Layerwise`, `Scaling`, `Matrixwise`.
        sums: see `Sums`; several of them are settled one after the other, and each finds in h what those before it
            gave.
        domains: ranges of hyperparameters whose names are not among the usual ones, as ``{"mu": Interval(0, 1)}``.
        initial: initial values of states that do not begin at 0, by name: a number, the name of a hyperparameter (its
            value at the first step), or ``"p"`` for the parameter itself, as it is at its first update.
        extra: the names of states that the step is given, as ``("hessian",)``: ``step(grads, extra={"hessian": tree})``
            writes them before the update. The rule returns them as the others. Where `prepare` has an argument of that
            name, it is told whether this step has it (a bool), and a step may leave it out: the state then holds the
            last one. An argument ``loss`` of `prepare` is the number in ``step(grads, loss=number)``.
        for_matrices: the names of hyperparameters, flags such as ``("centralize",)``, that are False by default for a
            parameter of fewer than two axes; overrides can change that.
        nonnegative: the names of states that are never below 0, such as second moments ``("v",)``. With
            ``states="int8"`` they have codes of a wider range, in which what is not 0 does not become 0.
        idle: the closed form of many zero-gradient steps, for `Optimizer.step_rows`: ``fastopt.Linear()`` for a rule
            that maps p and the states linearly where the gradient is 0.
        gradients_in, evaluated_in: for a rule whose gradients are taken, or whose parameters are evaluated, elsewhere
            than at p: the name of a method of its optimizer, a context manager that holds the parameters there. A
            step without the first warns, and so does an optimizer without such a method.

    Returns:
        A decorator for a function ``(p, g, *states, h)`` of up to 13 states that returns the tuple ``(p, *states)`` of
        new values, or p alone if there is no state. Use ``math`` functions, comparisons and arithmetic, but no literals
        in arithmetic: they would promote float32 to float64 (refused when the kernel is compiled).

    Raises:
        TypeError: the signature must be ``(p, g, *states, h)``; or the options contradict each other.

    >>> import math
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

    if isinstance(prepare, FunctionType) and prepare.__code__.co_varnames[:2] == ("p", "g"):
        raise TypeError(
            f"rule: must be given prepare(t, ...), as in @fastopt.rule(prepare), got the scalar function "
            f"{prepare.__name__}{inspect.signature(prepare)}; write prepare in parentheses"
        )
    if not callable(prepare):
        raise TypeError(f"rule: must be given prepare(t, ...), as in @fastopt.rule(prepare), got {prepare!r}")

    def decorate(function: Callable[..., Any]) -> Rule:
        if not isinstance(function, FunctionType):
            raise TypeError(f"@rule: must decorate a plain function (p, g, *states, h), got {function!r}")
        return Rule(
            function,
            prepare,
            decoupled=decoupled,
            layerwise=layerwise,
            scaling=scaling,
            matrixwise=matrixwise,
            sums=sums,
            domains=domains,
            initial=initial,
            extra=extra,
            for_matrices=for_matrices,
            nonnegative=nonnegative,
            idle=idle,
            gradients_in=gradients_in,
            evaluated_in=evaluated_in,
        )

    return decorate


class Join:
    """Makes one NamedTuple of two. The fields of the rule come last, for backends fill in some of these."""

    def __init__(self, name: str, rule: str):
        self._name = name
        self._rule = rule
        self._kinds: dict[tuple[type, type], Any] = {}

    def __call__(self, own: Any, of_rule: Any) -> Any:
        """Return the fields of both."""
        kind = self._kinds.get((type(own), type(of_rule)))
        if kind is None:
            kind = self._kinds.setdefault((type(own), type(of_rule)), self._join(own, of_rule))
        return kind(*own, *of_rule)

    def _join(self, own: Any, of_rule: Any) -> Any:
        for prepared in (own, of_rule):
            if not isinstance(prepared, tuple) or not hasattr(prepared, "_fields"):
                raise TypeError(
                    f"prepare of rule {self._name!r}: must return a NamedTuple, got {type(prepared).__name__}"
                )
        both = [field for field in own._fields if field in of_rule._fields]
        if both:
            raise TypeError(
                f"prepare of rule {self._name!r}: must return fields other than those of rule {self._rule!r} "
                f"({', '.join(of_rule._fields)}), got {both[0]!r}; rename it"
            )
        return NamedTuple("Hyper", [(field, float) for field in (*own._fields, *of_rule._fields)])


def check_acting(
    matrixwise: Matrixwise, paths: Sequence[str], overrides: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
) -> None:
    """Refuse overrides of a matrixwise rule that cannot act on their parameter.

    Args:
        matrixwise: of the rule.
        paths: the path of each parameter, for the message.
        overrides: for each parameter, its own hyperparameters by name.
        values: the hyperparameters of parameters without overrides.

    Raises:
        ValueError: naming path, hyperparameter and remedy.
    """
    chosen = matrixwise.chosen
    for path, change in zip(paths, overrides, strict=True):
        matrix = change.get(chosen, values[chosen])
        if callable(matrix):  # a schedule: both kinds of hyperparameters act, each in its steps
            continue
        acting, idle = matrixwise.matrix_only, matrixwise.other_only
        if not matrix:
            acting, idle = idle, acting
        for name in idle:
            if name in change:
                twins = [other for other in acting if other.endswith(f"_{name}") or name.endswith(f"_{other}")]
                remedy = f"use {twins[0]}" if twins else f"it acts only where {chosen}={not matrix}"
                raise ValueError(
                    f"overrides: {path}: {name}: must be absent where {chosen}={bool(matrix)}, got {change[name]!r}; "
                    f"{remedy}"
                )


def several_names(what: str, names: Any, kind: Any = Sequence) -> tuple[str, ...]:
    """Return different names of variables as a tuple; refuse others, and a single name, whose letters they would be."""
    found: tuple[Any, ...] = tuple(names) if isinstance(names, kind) and not isinstance(names, str) else (None,)
    if not all(isinstance(each, str) and each.isidentifier() for each in found) or len(set(found)) != len(found):
        raise TypeError(f"{what}: must be different names of variables, as ('scale',), got {names!r}")
    return found


def several_sums(where: str, sums: Any) -> tuple[Sums, ...]:
    """Return one `Sums`, or several, as a tuple; refuse others."""
    found = tuple(sums) if isinstance(sums, Sequence) else (sums,)
    for each in found:
        if not isinstance(each, Sums):
            raise TypeError(f"{where}: sums: must be a Sums or several, got {each!r}")
    return found


def checked_domains(where: str, domains: Any) -> Mapping[str, Domain]:
    """Return the ranges of hyperparameters; refuse others."""
    if not isinstance(domains, Mapping | None):
        raise TypeError(f"{where}: domains: must be a dict of hyperparameter -> range, got {domains!r}")
    for name, domain in (domains or {}).items():
        if not isinstance(domain, Domain):
            raise TypeError(f"{where}: domains[{name!r}]: must be a range, as fastopt.Interval(0, 1), got {domain!r}")
    return domains or {}


def _with_ratio(prepare: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a `prepare` with the field RATIO."""
    join = Join(name, name)

    @wraps(prepare)
    def prepared(t: int, *arguments: Any, **inputs: Any) -> Any:
        return join(_Ratio(1.0), prepare(t, *arguments, **inputs))

    return prepared


def _takes(function: Any, count: int) -> bool:
    """Return whether a function can be called with so many arguments, as far as is known."""
    try:
        inspect.signature(getattr(function, "scalar", function)).bind(*[None] * count)
    except ValueError:  # of some functions written in C
        return True
    except TypeError:
        return False
    return True


def _check_call(
    what: str, function: Any, names: Sequence[str], keywords: Sequence[str] = (), longer: Sequence[str] = ()
) -> None:
    """Refuse what cannot be called with so many arguments, and with these keywords; `longer` are others that may be."""
    expected = f"({', '.join((*names, *(['**hyperparameters'] if keywords else [])))})"
    if longer and callable(function) and _takes(function, len(longer)):
        return
    if not callable(function):
        raise TypeError(f"{what}: must be a function {expected}, got {function!r}")
    try:
        signature = inspect.signature(getattr(function, "scalar", function))
    except ValueError:  # of some functions written in C
        return
    try:
        signature.bind(*names, **dict.fromkeys(keywords))
    except TypeError:
        raise TypeError(f"{what}: must have the signature {expected}, got {signature}") from None


def _keywords(function: Callable[..., Any]) -> tuple[str, frozenset[str] | None]:
    """Return the name of the first parameter, and those of the others; None in their place where any are taken."""
    try:
        first, *others = inspect.signature(function).parameters.values()
    except ValueError:  # of some functions written in C
        return "", frozenset()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in others):
        return first.name, None
    return first.name, frozenset(parameter.name for parameter in others)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parameters(function: Callable[..., Any], what: str) -> dict[str, Any]:
    """Return the parameters of a function by name, each with its default, or MISSING."""
    if isinstance(function, FunctionType) and not function.__dict__:  # 10 times as fast as inspect, 66 times at import
        code = function.__code__
        if not (code.co_flags & NOT_PLAIN or code.co_kwonlyargcount or code.co_posonlyargcount):
            names, defaults = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
            without = len(names) - len(defaults)
            return dict(zip(names, (*[MISSING] * without, *defaults), strict=True))
    name = getattr(function, "__name__", repr(function))
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # of some functions written in C
        raise TypeError(f"{what} {name!r}: must be a function of Python, got {function!r}") from None
    for parameter in parameters:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise TypeError(f"{what} {name!r}: parameters must be plain positional ones, got {parameter}")
    return {parameter.name: parameter.default for parameter in parameters}
