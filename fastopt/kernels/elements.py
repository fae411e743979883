"""Scalar functions that a step applies around its rule. Every backend binds them for its own target.

`bind` supplies the upper-case names as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import njit, types

from fastopt.kernels.bind import bind
from fastopt.kernels.contract import Features, KernelRule, ScalingFunctions

MAX_STATES = 4
"""The most states of a rule. The moving average of the parameters adds one."""
LAYERWISE_STATES = (1, 2)
"""The numbers of states for which loops of layerwise rules exist."""

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
    """Return a gradient times `StepHyper.unscale`."""
    return step.unscale * g if UNSCALE else g


def conditioned(step, g):
    """Return a gradient before clipping by norm: the value of which the norm is taken."""
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
    """Return the moving average of p, moved towards p."""
    return average + step.ema_weight * (p - average)


def update(step, p, g, *rest):
    """Apply the rule and the options of the step. `rest`: the states, the average, the hyperparameters."""
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
    """Update one element. With FIRST, apply the update BEFORE first."""
    # A skipped step writes every element back unchanged: skipped steps are rare and need not be fast.
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
    """Return constants in the dtype: a literal would be a float64, and halve the number of elements in a vector."""
    return {"ZERO": dtype.type(0), "LARGEST": np.finfo(dtype).max}


def conditioning(dtype: np.dtype[Any], features: Features, scalar: Callable[[FunctionType], Any]) -> dict[str, Any]:
    """Return `unscaled` and `conditioned` for these features, compiled by `scalar`, and the constants they need."""
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
    """Compile a scalar function, never with fastmath: the result has the bits of the same arithmetic in NumPy.

    The rule itself has error_model="numpy", not only the loop: the default model puts a branch on every division (7x
    slower) and raises in the middle of the loop, which leaves the buffer half updated.
    """
    # Said, not left out: numba would have it inherit the fastmath of the loop in which it is first compiled.
    return njit(error_model="numpy", fastmath=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def check_rule(rule: KernelRule, compiled: Any, hyper: Any, dtype: np.dtype[Any]) -> None:
    """Check a rule, compiled by `scalar`, against its signature; raise TypeError where it does not fit."""
    if len(rule.states) > MAX_STATES:
        raise TypeError(f"rule {rule.name!r}: must have at most {MAX_STATES} states, got {len(rule.states)}")
    if rule.layerwise is not None and len(rule.states) not in LAYERWISE_STATES:
        raise TypeError(
            f"rule {rule.name!r}: a layerwise rule must have {' or '.join(map(str, LAYERWISE_STATES))} states, got "
            f"{len(rule.states)}"
        )
    names = ("p", *rule.states)
    check_returns(rule, names, returned_dtypes(compiled, len(names) + 1, hyper, dtype), dtype)
    if rule.layerwise is not None:
        compiled_apply = scalar(bind(rule.layerwise.apply, {}, label=f"{rule.name}_{dtype}_apply", scalar=scalar))
        check_returns(rule, ("p",), returned_dtypes(compiled_apply, len(names) + 1, hyper, dtype), dtype)


def returned_dtypes(compiled: Any, arguments: int, hyper: Any, dtype: np.dtype[Any]) -> list[str] | str:
    """Return the numba type, or list of types, that a scalar function of `arguments` numbers and h returns, by name."""
    number = numba.from_dtype(dtype)
    signature = (*[number] * arguments, types.NamedUniTuple(number, len(hyper._fields), hyper))
    compiled.compile(signature)
    returned = compiled.overloads[signature].signature.return_type
    return [str(kind) for kind in returned] if isinstance(returned, types.BaseTuple) else str(returned)


def check_returns(rule: KernelRule, names: tuple[str, ...], returned: list[str] | str, dtype: np.dtype[Any]) -> None:
    """Check what a rule returns against `names`, the values that its signature requires.

    A literal (``1 - b1``) turns float32 into float64, which is three times slower and has no other symptom.
    """
    found = [returned] if isinstance(returned, str) else returned
    if isinstance(returned, str) != (len(names) == 1) or len(found) != len(names):
        what = "one value" if isinstance(returned, str) else f"a tuple of {len(found)}"
        expected = "p alone, not in a tuple" if len(names) == 1 else f"the tuple ({', '.join(names)})"
        raise TypeError(f"rule {rule.name!r}: must return {expected}, as its signature requires, got {what}")
    wrong = [f"{name} as {kind}" for name, kind in zip(names, found, strict=True) if kind != dtype.name]
    if wrong:
        raise TypeError(
            f"rule {rule.name!r} on {dtype}: must return {dtype}, got {', '.join(wrong)}; an arithmetic literal "
            f"promotes float32 to float64: compute the constant in `prepare` and read it from h"
        )


def scaled(step, norm_p, norm_g, *rest):
    """Return a parameter's scale, given the norms of p and g. `rest`: the per-tensor state, if any, and h."""
    if CLIP_NORM:
        norm_g = step.coefficient * norm_g
    return SCALE(norm_p, norm_g, *rest)


def scaled_by(scaling: ScalingFunctions, features: Features, scalar: Callable[[FunctionType], Any]) -> Any:
    """Return `scaled` for a rule's scaling, compiled by `scalar`."""
    constants = {"SCALE": scaling.scale, "CLIP_NORM": features.clip_norm}
    return bind(scaled, constants, label="scaled", scalar=scalar)


def surrounded(
    rule: KernelRule,
    compiled_rule: Any,
    hyper: Any,
    dtype: np.dtype[Any],
    features: Features,
    first: tuple[Callable[..., Any], Any] | None,
    scalar: Callable[[FunctionType], Any],
) -> tuple[dict[str, Any], str]:
    """Return the constants of a loop (ELEMENT for a rule and these features, and what it needs) and a kernel's name.

    `scalar` compiles a scalar function for the target, as for `bind`; the other arguments are as for `Backend.kernel`.
    """
    # A layerwise rule averages in its second pass, where p is known; its first pass does not use the average.
    ema_now = features.ema and rule.layerwise is None
    flags = {"CLIP_NORM": features.clip_norm, "L2": features.l2, "DECOUPLED": features.decoupled, "EMA": ema_now}
    label = "_".join([rule.name, dtype.name, *(name for name, on in vars(features).items() if on)])
    constants = {
        "RULE": compiled_rule,
        "HYPER": hyper,
        "N_STATES": len(rule.states) + ema_now,
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
