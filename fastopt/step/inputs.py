"""`Inputs`: what a step is given besides gradients, for rules that take more: further trees, and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from fastopt import scalars
from fastopt.hyper import LOSS
from fastopt.storage.flat import FlatParams

if TYPE_CHECKING:
    from fastopt.rule import Rule


class Inputs(NamedTuple):
    """Those of one step, checked."""

    values: dict[str, Any]
    """For `Rule.prepared`: whether an optional tree is given, and the loss."""
    leaves: dict[str, list[Any]]
    """By the name of the state that takes it: a leaf, or None, for each parameter."""

    @classmethod
    def checked(cls, rule: Rule, flat: FlatParams, extra: Any, loss: Any, present: Sequence[bool] | None) -> Inputs:
        """Return those of a step; raise TypeError or ValueError where they are not what the rule takes.

        extra, loss : as for `Optimizer.step`. present : the parameters that have a gradient; None: all.
        """
        if extra is not None and not isinstance(extra, Mapping):
            raise TypeError(f"extra: must be a dict of name -> tree, or None, got {type(extra).__name__}")
        given = {name: tree for name, tree in (extra or {}).items() if tree is not None}
        values = check_inputs(rule, given, loss)
        leaves = {}
        for name, tree in given.items():
            what = f"extra[{name!r}]"
            leaves[name] = flat.check_extra(tree, what)
            for k, leaf in enumerate(leaves[name]):
                if leaf is None and (present is None or present[k]):
                    raise ValueError(f"{what}: {flat.paths[k]!r}: must be an array where the gradient is one, got None")
        return cls(values, leaves)


def check_inputs(rule: Rule, given: Mapping[str, Any], loss: Any) -> dict[str, Any]:
    """Return what `prepare` is told of the inputs of a step: given, by name, and the loss."""
    names = ", ".join(rule.extra) or "none"
    for name in given:
        if name not in rule.extra:
            raise TypeError(f"extra: must hold inputs that rule {rule.name!r} takes ({names}), got {name!r}")
    for name in rule.extra:
        if name not in given and name not in rule.inputs:
            raise TypeError(f"extra: must hold {name!r}, which rule {rule.name!r} takes in every step, got none")
    values: dict[str, Any] = {name: name in given for name in rule.inputs if name != LOSS}
    if LOSS in rule.inputs:
        if loss is None:
            raise TypeError(f"{LOSS}: must be a number, which rule {rule.name!r} takes in every step, got None")
        values[LOSS] = scalars.number(LOSS, loss, "a finite number")
        if not isfinite(values[LOSS]):
            raise ValueError(f"{LOSS}: must be a finite number, got {loss!r}")
    elif loss is not None:
        raise TypeError(f"{LOSS}: must be None for rule {rule.name!r}, whose prepare takes none, got {loss!r}")
    return values
