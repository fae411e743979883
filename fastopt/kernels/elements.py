"""What surrounds a rule in a step: scalar functions, written once and bound by every backend for its own target.

Upper-case names are constants that `bind` supplies.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba import njit, types

from fastopt.kernels.bind import bind
from fastopt.kernels.contract import Features, StepHyper

if TYPE_CHECKING:
    from fastopt.rule import Rule, Scaling

MAX_STATES = 4
"""Of a rule; the moving average of the parameters makes one more."""

RULE: Any
N_STATES: Any
STILL: Any
UNSCALE: Any
ZERO_NONFINITE: Any
CLIP_VALUE: Any
CLIP_NORM: Any
L2: Any
DECOUPLED: Any
EMA: Any
FIRST: Any
GATED: Any
BEFORE: Any
UPDATE: Any
ZERO: Any
LARGEST: Any
UNSCALED: Any
CONDITIONED: Any
AVERAGED: Any
SCALE: Any


def unscaled(step, g):
    """A gradient in its own units."""
    return step.unscale * g if UNSCALE else g


def conditioned(step, g):
    """A gradient, but for the clipping by norm: what the norm is of."""
    if STILL:
        return ZERO
    g = UNSCALED(step, g)
    if ZERO_NONFINITE:
        g = g if abs(g) <= LARGEST else ZERO
    if CLIP_VALUE:  # in this form, so that a NaN stays one
        g = step.clip_value if g > step.clip_value else g
        g = -step.clip_value if g < -step.clip_value else g
    return g


def averaged(step, p, average):
    """The moving average of p, moved towards it."""
    return average + step.fresh * (p - average)


def update(step, p, g, *rest):
    """What surrounds the rule, and the rule. `rest` is its states, the average, its hyperparameters."""
    g = CONDITIONED(step, g)
    if CLIP_NORM:
        g = step.coefficient * g
    if L2:
        g = g + step.weight_decay * p
    if DECOUPLED:
        p = step.keep * p
    if EMA:
        if N_STATES == 1:  # the average alone: the rule has no state, and returns p
            p = RULE(p, g, rest[-1])
            return p, AVERAGED(step, p, rest[0])
        new = RULE(p, g, *rest[:-2], rest[-1])
        return (*new, AVERAGED(step, new[0], rest[-2]))
    return RULE(p, g, *rest)


def element(step, p, g, *rest):
    """One element: the update, after another one where there is a first."""
    # Written back as it is, and not left out of the loop: steps that are left out are rare, and need not be fast.
    if GATED and step.proceeds == ZERO:
        return p if N_STATES == 0 else (p, *rest[:-1])
    if FIRST:
        h, h_first = rest[-1]
        if N_STATES == 0:
            return UPDATE(step, BEFORE(p, g, h_first), g, h)
        new = BEFORE(p, g, *rest[:-1], h_first)
        return UPDATE(step, new[0], g, *new[1:], h)
    return UPDATE(step, p, g, *rest)


def bounds(dtype: np.dtype[Any]) -> dict[str, Any]:
    """Constants in the dtype: a literal would be a float64, and halve the elements of a vector."""
    return {"ZERO": dtype.type(0), "LARGEST": np.finfo(dtype).max}


def conditioning(dtype: np.dtype[Any], features: Features, scalar: Callable[[FunctionType], Any]) -> dict[str, Any]:
    """`unscaled` and `conditioned` for these features, compiled by `scalar`, and the constants they need."""
    constants = {
        "STILL": features.still,
        "UNSCALE": features.unscale,
        "ZERO_NONFINITE": features.zero_nonfinite,
        "CLIP_VALUE": features.clip_value,
        **bounds(dtype),
    }
    constants["UNSCALED"] = bind(unscaled, constants, label="unscaled", scalar=scalar)
    constants["CONDITIONED"] = bind(conditioned, constants, label="conditioned", scalar=scalar)
    return constants


def scalar(function: Callable[..., Any]) -> Any:
    """Compile a scalar function: never fastmath, so that the result is bit-identical to NumPy doing the same.

    error_model="numpy" on the rule itself, not only on the loop: the default model puts a branch on every division
    (7x slower) and raises in mid-loop, leaving the buffer half updated.
    """
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def check_rule(rule: Rule, compiled: Any, hyper: Any, dtype: np.dtype[Any]) -> None:
    """Hold a rule, compiled by `scalar`, against what its signature asks for; TypeError where it does not fit."""
    if len(rule.states) > MAX_STATES:
        raise TypeError(f"rule {rule.name!r} has {len(rule.states)} states; at most {MAX_STATES} are supported")
    names = ("p", *rule.states)
    check_returns(rule, names, returned_dtypes(compiled, len(names) + 1, hyper, dtype), dtype)
    if rule.layerwise is not None:
        compiled_apply = scalar(bind(rule.layerwise.apply, {}, label=f"{rule.name}_{dtype}_apply", scalar=scalar))
        check_returns(rule, ("p",), returned_dtypes(compiled_apply, len(names) + 1, hyper, dtype), dtype)


def returned_dtypes(compiled: Any, arguments: int, hyper: Any, dtype: np.dtype[Any]) -> list[str] | str:
    """The numba types that a scalar function of `arguments` numbers and h returns: a list for a tuple, else a name."""
    number = numba.from_dtype(dtype)
    signature = (*[number] * arguments, types.NamedUniTuple(number, len(hyper._fields), hyper))
    compiled.compile(signature)
    returned = compiled.overloads[signature].signature.return_type
    return [str(kind) for kind in returned] if isinstance(returned, types.BaseTuple) else str(returned)


def check_returns(rule: Rule, names: tuple[str, ...], returned: list[str] | str, dtype: np.dtype[Any]) -> None:
    """Hold what a rule returns against `names`, the values that its signature asks for.

    A literal (``1 - b1``) turns float32 into float64: three times slower, and no other sign of it.
    """
    found = [returned] if isinstance(returned, str) else returned
    if isinstance(returned, str) != (len(names) == 1) or len(found) != len(names):
        what = "one value" if isinstance(returned, str) else f"a tuple of {len(found)}"
        expected = "p alone, not in a tuple" if len(names) == 1 else f"the tuple ({', '.join(names)})"
        raise TypeError(f"rule {rule.name!r} returns {what}; its signature asks for {expected}")
    wrong = [f"{name} as {kind}" for name, kind in zip(names, found, strict=True) if kind != dtype.name]
    if wrong:
        raise TypeError(
            f"rule {rule.name!r} on {dtype} returns {', '.join(wrong)}. An arithmetic literal promotes float32 to "
            f"float64: compute the constant in `prepare` and read it from h"
        )


def scaled(step, norm_p, norm_g, *rest):
    """A parameter's scale, of the norm of its clipped gradient. `rest` is its number, if it has one, and h."""
    if CLIP_NORM:
        norm_g = step.coefficient * norm_g
    return SCALE(norm_p, norm_g, *rest)


def scaled_by(scaling: Scaling, features: Features, scalar: Callable[[FunctionType], Any]) -> Any:
    """`scaled` for a rule's scaling, compiled by `scalar`."""
    constants = {"SCALE": scaling.scale, "CLIP_NORM": features.clip_norm}
    return bind(scaled, constants, label="scaled", scalar=scalar)


def surrounded(
    rule: Rule,
    compiled_rule: Any,
    hyper: Any,
    dtype: np.dtype[Any],
    features: Features,
    first: tuple[Callable[..., Any], Any] | None,
    scalar: Callable[[FunctionType], Any],
) -> tuple[dict[str, Any], str]:
    """`element` for a rule and these features, and what the loops around it need; and a name for the kernel.

    `scalar` is the target's way to compile a scalar function, as for `bind`; the rest is as for `Backend.kernel`.
    """
    # A layerwise rule averages in its second pass, where p is known; the average is then no state of the first.
    ema_now = features.ema and rule.layerwise is None
    flags = {"CLIP_NORM": features.clip_norm, "L2": features.l2, "DECOUPLED": features.decoupled, "EMA": ema_now}
    label = "_".join([rule.name, dtype.name, *(name for name, on in vars(features).items() if on)])
    constants = {
        "RULE": compiled_rule,
        "HYPER": hyper,
        "N_STATES": len(rule.states) + ema_now,
        "N_STEP": len(StepHyper._fields),
        "N_HYPER": len(hyper._fields),
        **bounds(dtype),
        "ZERO_GRAD": features.zero_grad,
        "AVERAGED": averaged,
        "FIRST": first is not None,
        "GATED": features.gated,
    }
    surroundings = {**constants, **flags, **conditioning(dtype, features, scalar)}
    if first is not None:
        constants |= {"BEFORE": first[0], "FIRST_HYPER": first[1], "N_FIRST": len(first[1]._fields)}
        label += f"_after_{first[0].__name__}"
    constants["UPDATE"] = bind(update, surroundings, label="update", scalar=scalar)
    constants["ELEMENT"] = bind(element, constants, label="element", scalar=scalar)
    return constants, label
