"""Scalar functions that a step applies around its rule. Every backend binds them for its own target.

`bind` supplies the upper-case names as constants.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import njit, types

from fastopt.kernels.bind import bind
from fastopt.kernels.contract import N_STEP, Features, KernelRule, ScalingFunctions, SumsFunctions

MAX_STATES = 13
"""The most states of a rule. LLVM vectorises a loop over at most 16 buffers, because it compares their addresses in
pairs; p, g and the moving average are three of them."""

RULE: Any
N_STATES: Any
STILL: Any
UNSCALE: Any
SETTLE: Any
N_SETTLED: Any
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


SCALAR_OPTIONS = {
    "error_model": "numpy",
    "fastmath": False,
    "forceinline": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""How numba compiles a scalar function: see `scalar`."""


def scalar(function: Callable[..., Any]) -> Any:
    """Compile a scalar function, never with fastmath: the result has the bits of the same arithmetic in NumPy.

    The rule itself has error_model="numpy", not only the loop: the default model puts a branch on every division (7x
    slower) and raises in the middle of the loop, which leaves the buffer half updated. It is always inlined: LLVM would
    call a long one, and a loop that calls is not vectorised.
    """
    # Said, not left out: numba would have it inherit the fastmath of the loop in which it is first compiled.
    return njit(**SCALAR_OPTIONS)(function)


def check_rule(rule: KernelRule, compiled: Any, hyper: Any, dtype: np.dtype[Any]) -> None:
    """Check a rule, compiled by `scalar`, against its signature; raise TypeError where it does not fit."""
    if len(rule.states) > MAX_STATES:
        raise TypeError(f"rule {rule.name!r}: must have at most {MAX_STATES} states, got {len(rule.states)}")
    if rule.layerwise is not None and not rule.states:
        raise TypeError(
            f"rule {rule.name!r}: a layerwise rule must have states, from which `apply` computes its update, got none"
        )
    names = ("p", *rule.states)
    check_returns(rule, names, returned_dtypes(compiled, len(names) + 1, hyper, dtype), dtype)
    if rule.layerwise is not None:
        compiled_apply = scalar(bind(rule.layerwise.apply, {}, label=f"{rule.name}_{dtype}_apply", scalar=scalar))
        check_returns(rule, ("p",), returned_dtypes(compiled_apply, len(names) + 1, hyper, dtype), dtype)
    for sums in rule.sums:
        check_sums(rule, sums, hyper, dtype)


def returned_dtypes(compiled: Any, arguments: int, hyper: Any, dtype: np.dtype[Any]) -> list[str] | str:
    """Return the numba type, or list of types, that a scalar function of `arguments` numbers and h returns, by name."""
    number = numba.from_dtype(dtype)
    returned = returned_type(compiled, (*[number] * arguments, record_type(hyper, number)))
    return [str(kind) for kind in returned] if isinstance(returned, types.BaseTuple) else str(returned)


def returned_type(compiled: Any, signature: tuple[Any, ...]) -> Any:
    """Return the numba type that a scalar function returns for arguments of these types."""
    compiled.compile(signature)
    return compiled.overloads[signature].signature.return_type


def record_type(kind: Any, number: Any) -> Any:
    """Return the numba type of a NamedTuple of numbers, and that of the empty tuple for one without fields."""
    fields = len(kind._fields)
    return types.NamedUniTuple(number, fields, kind) if fields else types.Tuple(())


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


def records_of(sums: SumsFunctions) -> tuple[Any, Any]:
    """Return the NamedTuples that ``settle`` takes: of the sums, and of the numbers."""
    return namedtuple("Sums", tuple(sums.terms)), namedtuple("Numbers", sums.numbers)


def check_sums(rule: KernelRule, sums: SumsFunctions, hyper: Any, dtype: np.dtype[Any]) -> None:
    """Check what the functions of sums return; raise TypeError where it is not what is declared."""
    where = f"rule {rule.name!r}: sums:"
    for name, term in sums.terms.items():
        compiled = scalar(bind(term, {}, label=f"{rule.name}_{dtype}_{name}", scalar=scalar))
        found = returned_dtypes(compiled, len(rule.states) + 2, hyper, dtype)
        if not isinstance(found, str) or found == "none":
            what = found if isinstance(found, str) else f"a tuple of {len(found)}"
            raise TypeError(f"{where} terms[{name!r}] must return a number, got {what}")
    of_sums, of_numbers = (record_type(kind, types.float64) for kind in records_of(sums))
    compiled = scalar(bind(sums.settle, {}, label=f"{rule.name}_{dtype}_settle", scalar=scalar))
    h = record_type(hyper, numba.from_dtype(dtype))
    returned = returned_type(compiled, (of_sums, of_numbers, types.float64, h))
    names = (*sums.results, *sums.numbers)
    kinds = list(returned) if isinstance(returned, types.BaseTuple) else [returned]
    if any(not isinstance(kind, types.Number | types.Boolean) for kind in kinds):
        kinds = [str(kind) for kind in kinds]
        raise TypeError(f"{where} settle must return {len(names)} numbers ({', '.join(names)}), got {', '.join(kinds)}")
    if len(kinds) != len(names) or (len(names) == 1) == isinstance(returned, types.BaseTuple):
        expected = "one number alone, not in a tuple" if len(names) == 1 else f"a tuple of {len(names)} numbers"
        what = f"a tuple of {len(kinds)}" if isinstance(returned, types.BaseTuple) else "one number"
        raise TypeError(f"{where} settle must return {expected} ({', '.join(names)}), got {what}")


def scaled(step, norm_p, norm_g, *rest):
    """Return a parameter's scale, given the norms of p and g. `rest`: the per-tensor state, if any, and h."""
    if CLIP_NORM:
        norm_g = step.coefficient * norm_g
    return SCALE(norm_p, norm_g, *rest)


def scaled_by(scaling: ScalingFunctions, features: Features, scalar: Callable[[FunctionType], Any]) -> Any:
    """Return `scaled` for a rule's scaling, compiled by `scalar`."""
    constants = {"SCALE": scaling.scale, "CLIP_NORM": features.clip_norm}
    return bind(scaled, constants, label="scaled", scalar=scalar)


def collected(functions: tuple[Callable[..., Any], ...]) -> Callable[..., tuple[Any, ...]]:
    """Return a scalar function that returns the tuple of what several scalar functions return."""
    if len(functions) == 1:
        function = functions[0]

        def one(*arguments):
            return (function(*arguments),)

        return one
    half = len(functions) // 2
    left, right = collected(functions[:half]), collected(functions[half:])

    def both(*arguments):
        return left(*arguments) + right(*arguments)

    return both


def settled(sums, numbers, size, h):
    """Return what SETTLE returns as a tuple."""
    if N_SETTLED == 1:
        return (SETTLE(sums, numbers, size, h),)
    return SETTLE(sums, numbers, size, h)


def settling(
    rule: KernelRule, sums: SumsFunctions, hyper: Any, scalar: Callable[[FunctionType], Any]
) -> dict[str, Any]:
    """Return the constants by which a kernel settles sums: `settled`, compiled by `scalar`, and what is around it."""
    unknown = [name for name in sums.results if name not in hyper._fields]
    if unknown:
        raise TypeError(
            f"rule {rule.name!r}: sums: results must be fields of {hyper.__name__} ({', '.join(hyper._fields)}), got "
            f"{unknown[0]!r}"
        )
    of_sums, of_numbers = records_of(sums)
    count = len(sums.results) + len(sums.numbers)
    constants = {"SETTLE": sums.settle, "N_SETTLED": count}
    return {
        "SETTLED": bind(settled, constants, label="settled", scalar=scalar),
        "N_TERMS": len(sums.terms),
        "N_RESULTS": len(sums.results),
        "N_NUMBERS": len(sums.numbers),
        "SUMS": of_sums,
        "NUMBERS": of_numbers,
        "COLUMNS": tuple(N_STEP + hyper._fields.index(name) for name in sums.results) or (0,),
        "OVER_ALL": sums.over == "all",
    }


def of_terms(
    rule: KernelRule,
    terms: tuple[Callable[..., Any], ...],
    hyper: Any,
    dtype: np.dtype[Any],
    features: Features,
    scalar: Callable[[FunctionType], Any],
) -> tuple[dict[str, Any], str]:
    """Return `surrounded` whose ELEMENT returns the tuple of several terms of an element, instead of a rule's values.

    A term is given what the rule is given: p and g after the options that come before the rule.
    """
    bound = scalar(bind(collected(terms), {}, label=f"terms_of_{rule.name}_{dtype}", scalar=scalar))
    before = replace(features, ema=False, gated=False, zero_grad=False, scattered=False)
    return surrounded(rule, bound, hyper, dtype, before, None, scalar)


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
