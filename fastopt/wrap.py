"""`wrap` makes a Rule of another one and of what is done before and after it, as Lookahead and Cautious do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

from fastopt.hyper import WEIGHT_DECAY, Domain
from fastopt.rule import Join, Matrixwise, Rule, Sums, checked_domains, several_names, several_sums
from fastopt.source import written

BEFORE, AFTER = ("p", "g"), ("p", "new_p", "g")
"""The first arguments of `before`, and of `after`."""
RESERVED = (*AFTER, "h")
"""The names of arguments, which a state of one's own must not have."""
MISSING = inspect.Parameter.empty


def wrap(
    rule: Rule,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    states: Sequence[str] = (),
    prepare: Callable[..., Any] | None = None,
    initial: Mapping[str, float | str] | None = None,
    domains: Mapping[str, Domain] | None = None,
    sums: Sums | Sequence[Sums] = (),
    for_matrices: Sequence[str] = (),
    name: str | None = None,
) -> Rule:
    """Return a rule that does something before another rule's update of an element, and something after it.

    Both are compiled into the one loop of the rule. Their arguments are named by what they are, as those of a rule:
    between the first ones and h stand the states that the function reads, of its own and of the rule, in any order.

    Args:
        rule: a `Rule`, one of `fastopt.rules` or your own; it may be wrapped itself.
        before: ``before(p, g, ..., h)``, which returns the g that the rule is given.
        after: ``after(p, new_p, g, ..., h)``: `p` before the rule and `new_p` after it, `g` as it was before `before`,
            states of the rule after it. It returns the new p, and the new states of its own with it:
            ``(p, *states)``. Without an `after`, `before` returns them: ``(g, *states)``.
        states: the names of states of its own, for example ``("slow",)``. They follow those of the rule.
        prepare: ``prepare(t, ...) -> NamedTuple``, as for `rule`, of the fields that `before` and `after` need in h,
            beside those of the rule, which are there as well. Its arguments are further hyperparameters; one without a
            default that has the name of one of the rule, as lr, is that one. None for none.
        initial: initial values of states of its own, as for `rule`.
        domains: ranges of hyperparameters of its own, as for `rule`.
        sums: `Sums` of its own. A term has the arguments of `before`, ``term(p, g, ..., h)``, and the states before the
            update, or those of `after`, ``term(p, new_p, g, ..., h)``, whose pass runs the rule once more. They are
            settled in their order, and those of the rule in front of the first that sees a `new_p`: so the terms of
            the rule are given the g that `before` makes of what was settled earlier.
        for_matrices: flags of its own that are False by default for parameters of fewer than two axes, as for `rule`.
        name: the name of the new rule; None for that of `after` (or `before`) and the rule, as ``lookahead_adam``.

    What the loop does around a rule, it does around the wrapped one: the p of `before` has decayed already where weight
    decay is decoupled, and g contains it where it is not. The wrapped rule keeps hyperparameters, defaults, states and
    kind of the rule, but no closed form: `Optimizer.step_rows` refuses it. What a rule sums (LAMB's norms), it sums of
    the g that it is given. `sums` are not for matrixwise rules (Muon).

    Returns:
        A `Rule`. Assign it to a global of its name, or leave the pickling to its parts, which then are globals.

    Raises:
        TypeError: naming the argument: a signature, a name, or what the kind of the rule does not allow.

    >>> import numpy as np, fastopt
    >>> from typing import NamedTuple
    >>> class Lookahead(NamedTuple):
    ...     pulls: float
    ...     pull: float
    >>> def every(t, k=5, alpha=0.5):
    ...     return Lookahead(float(t % k == 0), alpha)
    >>> def lookahead(p, new_p, g, slow, h):
    ...     if h.pulls > 0:
    ...         slow = slow + h.pull * (new_p - slow)
    ...         return slow, slow
    ...     return new_p, slow
    >>> lookahead_sgd = fastopt.wrap(
    ...     fastopt.rules.sgd, after=lookahead, states=("slow",), prepare=every, initial={"slow": "p"}
    ... )
    >>> opt = fastopt.Optimizer({"w": np.ones(1)}, lookahead_sgd, lr=0.25, k=2)
    >>> for _ in range(2):
    ...     _ = opt.step({"w": np.ones(1)})
    >>> lookahead_sgd, opt.params["w"]
    (<rule lookahead_sgd(p, g, slow, h)>, array([0.75]))
    """
    parts = Parts.checked(rule, before, after, several_names("wrap: states", states), sums)
    scalar = parts.after or parts.before
    assert scalar is not None
    own = {} if prepare is None else _parameters_of_prepare(prepare)
    if WEIGHT_DECAY in own and not rule.owns_weight_decay:
        raise TypeError(
            f"wrap: prepare: must not take {WEIGHT_DECAY}, which the loop applies for rule {rule.name!r}, got "
            f"({', '.join(('t', *own))})"
        )
    both = [key for key, default in own.items() if key in rule.names() and default is not MISSING]
    if both:
        raise TypeError(
            f"wrap: prepare: {both[0]}: must have no default, to be that of rule {rule.name!r}, or another name, got "
            f"{both[0]}={own[both[0]]!r}"
        )
    for_matrices = several_names("wrap: for_matrices", for_matrices)
    others = [flag for flag in for_matrices if flag not in own]
    if others:
        raise TypeError(f"wrap: for_matrices: must name arguments of prepare ({', '.join(own)}), got {others[0]!r}")
    if not isinstance(initial, Mapping | None):
        raise TypeError(f"wrap: initial: must be a dict of state -> initial value, got {initial!r}")
    unknown = [state for state in initial or () if state not in parts.own]
    if unknown:
        raise TypeError(f"wrap: initial: must name states of its own ({', '.join(parts.own)}), got {unknown[0]!r}")
    if name is None:
        name = f"{scalar.__name__ if scalar.__name__.isidentifier() else 'wrapped'}_{rule.name}"
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"wrap: name: must be the name of a variable, or None, got {name!r}")
    composed = Composed(rule, parts, name, scalar.__module__)
    together = composed.prepare(prepare, own)
    made = Rule(
        composed.update(),
        together,
        decoupled=rule.decoupled,
        matrixwise=composed.matrixwise(together),
        sums=composed.sums(),
        domains={**rule._domains, **checked_domains("wrap", domains)},
        initial={**rule.initial, **(initial or {})},
        extra=rule.extra,
        for_matrices=(*rule.for_matrices, *for_matrices),
        nonnegative=rule.nonnegative,
        gradients_in=rule.gradients_in,
        evaluated_in=rule.evaluated_in,
    )
    made.__doc__ = f"The rule {rule.name}, wrapped."
    made.defaults = {**{key: value for key, value in own.items() if value is not MISSING}, **rule.defaults}
    options: dict[str, Any] = {
        "before": before,
        "after": after,
        "states": parts.own,
        "prepare": prepare,
        "initial": initial,
        "domains": domains,
        "sums": sums,
        "for_matrices": for_matrices,
        "name": name,
    }
    made._made_by = (_again, (rule, options))
    return made


def _again(rule: Rule, options: dict[str, Any]) -> Rule:
    """Return the wrapped rule that was pickled."""
    return wrap(rule, **options)


def _parameters_of_prepare(prepare: Callable[..., Any]) -> dict[str, Any]:
    """Return the hyperparameters of a `prepare`, each with its default, or MISSING."""
    if not callable(prepare):
        raise TypeError(f"wrap: prepare: must be a function (t, ...) or None, got {prepare!r}")
    parameters = inspect.signature(prepare).parameters
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
    if not plain or next(iter(parameters), None) != "t":
        raise TypeError(
            f"wrap: prepare: must take the step number t first, then hyperparameters, got {inspect.signature(prepare)}"
        )
    return {key: parameter.default for key, parameter in parameters.items() if key != "t"}


def _reads(what: str, function: Any, known: Sequence[str], *firsts: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return which of `firsts` the parameters of a function ``(*first, *states, h)`` begin with, and its states."""
    expected = " or ".join(f"({', '.join((*first, '...', 'h'))})" for first in firsts)
    if not isinstance(function, FunctionType):
        raise TypeError(f"wrap: {what}: must be a plain function {expected}, got {function!r}")
    signature = inspect.signature(function)
    names = tuple(signature.parameters)
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in signature.parameters.values())
    for first in firsts:
        read = names[len(first) : -1]
        if plain and (*first, *read, "h") == names and set(read) <= set(known):
            return first, read
    raise TypeError(
        f"wrap: {what}: must have the signature {expected}, with states for the dots "
        f"({', '.join(known) or 'there are none'}), got {signature}"
    )


class Parts(NamedTuple):
    """What a rule is wrapped in, checked."""

    before: FunctionType | None
    after: FunctionType | None
    own: tuple[str, ...]
    """The names of its states."""
    sums: tuple[Sums, ...]

    @classmethod
    def checked(cls, rule: Any, before: Any, after: Any, own: tuple[str, ...], sums: Any) -> Parts:
        """Refuse what does not fit the rule."""
        if not isinstance(rule, Rule):
            raise TypeError(f"wrap: rule: must be a Rule, as fastopt.rules.adam, got {rule!r}")
        if before is None and after is None:
            raise TypeError("wrap: before: must be a function where after is None, got None")
        for what, function, first in (("before", before, BEFORE), ("after", after, AFTER)):
            if not isinstance(function, FunctionType | None):
                expected = _call("", *first, "...", "h")
                raise TypeError(f"wrap: {what}: must be a plain function {expected} or None, got {function!r}")
        sums = several_sums("wrap", sums)
        if sums and rule.matrixwise is not None:
            raise TypeError(f"wrap: sums: must be none for the matrixwise rule {rule.name!r}, got {len(sums)}")
        for state in own:
            if not isinstance(state, str) or not state.isidentifier() or state in (*RESERVED, *rule.states):
                raise TypeError(
                    f"wrap: states: must be names other than {', '.join((*RESERVED, *rule.states))}, got {state!r}"
                )
        return cls(before, after, own, sums)


class Composed:
    """The functions of a wrapped rule, written out: numba inlines those that they call."""

    def __init__(self, rule: Rule, parts: Parts, name: str, module: str):
        self.rule = rule
        self.parts = parts
        self.name = name
        self.module = module
        self.known = (*rule.states, *parts.own)
        self.of_before = () if parts.before is None else _reads("before", parts.before, self.known, BEFORE)[1]
        self.of_after = () if parts.after is None else _reads("after", parts.after, self.known, AFTER)[1]

    def write(self, name: str, lines: Sequence[str], **constants: Any) -> FunctionType:
        """Return a function of the arguments of the wrapped rule."""
        functions = {"RULE": self.rule, "BEFORE": self.parts.before, "AFTER": self.parts.after}
        return written(name, ("p", "g", *self.known, "h"), lines, {**functions, **constants}, self.module)

    def given(self) -> list[str]:
        """The lines that leave in `given_` the g of the rule."""
        if self.parts.before is None:
            return ["given_ = g"]
        call = _call("BEFORE", *BEFORE, *self.of_before, "h")
        if self.parts.own and self.parts.after is None:
            return [f"kept_ = {call}", "given_ = kept_[0]"]
        return [f"given_ = {call}"]

    def proposed(self) -> list[str]:
        """The lines that leave in `proposed_` the new p of the rule, and in its states the new ones."""
        states = self.rule.states
        return [*self.given(), f"{', '.join(('proposed_', *states))} = {_call('RULE', 'p', 'given_', *states, 'h')}"]

    def update(self) -> FunctionType:
        """The scalar function."""
        lines, states = self.proposed(), self.rule.states
        first = "proposed_"
        if self.parts.after is not None:
            lines.append(f"kept_ = {_call('AFTER', 'p', 'proposed_', 'g', *self.of_after, 'h')}")
            first = "kept_[0]" if self.parts.own else "kept_"
        if self.parts.own:  # whatever their number, so that it is checked as that of any rule
            lines.append(f"return ({', '.join((first, *states))},) + kept_[1:]")
        else:
            lines.append(f"return {', '.join((first, *states))}")
        return self.write(self.name, lines)

    def prepare(self, own: Callable[..., Any] | None, hyperparameters: Mapping[str, Any]) -> Callable[..., Any]:
        """The `prepare` of the rule, or that together with its own."""
        if own is None:
            return self.rule.prepare
        of_rule = (*self.rule.hyperparameters, *self.rule.inputs)
        parameters = ["t", *dict.fromkeys((*of_rule, *hyperparameters))]
        named = [f"{name}={name}" for name in of_rule]
        line = f"return JOIN({_call('OWN', 't', *hyperparameters)}, {_call('OF_RULE', 't', *named)})"
        constants = {"JOIN": Join(self.name, self.rule.name), "OWN": own, "OF_RULE": self.rule.prepare}
        return written(f"prepare_{self.name}", parameters, [line], constants, self.module)

    def matrixwise(self, prepare: Callable[..., Any]) -> Matrixwise | None:
        """Of a matrixwise rule the same, whose direction leaves the states of the wrapper as they are."""
        kind = self.rule.matrixwise
        if kind is None:
            return None
        states, transform = self.rule.states, kind.transform
        lines = [
            *self.given(),
            f"{', '.join(('p', *states))} = {_call('DIRECTION', 'p', 'given_', *states, 'h')}",
            f"return {', '.join(('p', *self.known))}",
        ]
        direction = Rule(self.write(f"direction_of_{self.name}", lines, DIRECTION=kind.direction), prepare)
        known = {*self.rule.hyperparameters, *self.rule.handed}

        def of_rule(*arrays: Any, **keywords: Any) -> None:
            """Call the transform with what the rule gives it, and nothing else."""
            transform(*arrays, **{name: value for name, value in keywords.items() if name in known})

        return replace(kind, direction=direction, transform=of_rule)

    def sums(self) -> list[Sums]:
        """Those of the wrapper, and those of the rule in front of the first one that sees a new p."""

        def of_rule(term: Callable[..., Any], name: str) -> FunctionType:
            lines = [*self.given(), f"return {_call('TERM', 'p', 'given_', *self.rule.states, 'h')}"]
            return self.write(name, lines, TERM=term)

        others = []
        for sums in self.rule.sums:
            terms = {name: of_rule(term, name) for name, term in sums.terms.items()}
            norms = {name: of_rule(term, name) for name, term in sums.norms.items()}
            others.append(replace(sums, terms=terms, norms=norms))
        own: list[Sums] = []
        place = len(self.parts.sums)
        for sums in self.parts.sums:
            made: dict[str, dict[str, FunctionType]] = {"terms": {}, "norms": {}}
            for kind, of_kind in made.items():
                for name, term in getattr(sums, kind).items():
                    first, read = _reads(f"sums: {kind}[{name!r}]", term, self.known, BEFORE, AFTER)
                    lines, given = ([], BEFORE) if first is BEFORE else (self.proposed(), ("p", "proposed_", "g"))
                    of_kind[name] = self.write(name, [*lines, f"return {_call('TERM', *given, *read, 'h')}"], TERM=term)
                    if first is AFTER:
                        place = min(place, len(own))
            own.append(replace(sums, terms=made["terms"], norms=made["norms"]))
        return [*own[:place], *others, *own[place:]]


def _call(function: str, *arguments: str) -> str:
    return f"{function}({', '.join(arguments)})"
