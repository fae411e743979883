"""Scalar functions that a step applies around its rule. Every backend binds them for its own target.

`bind` supplies the upper-case names as constants.
"""

from __future__ import annotations

import dis
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import njit, types

from fastopt.kernels.bind import bind, scalar_of
from fastopt.kernels.contract import (
    N_STEP,
    SCALE_DOWN,
    SCALE_UP,
    Features,
    KernelRule,
    SumsFunctions,
    root_of_squares,
    scaled_square,
)
from fastopt.source import written

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
ELEMENT: Any
MASTER: Any
ROUNDED: Any
EXACT: Any


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


def exact(p, kept):
    """Return a parameter that is stored in 16 bits, with what is kept of it besides: see `Storage.keeps`."""
    if MASTER:  # also where somebody has written another p since, as before the first step
        return kept if ROUNDED(kept) == p else p
    return p + kept


def kept_apart(step, p, g, *rest):
    """Update one element of a parameter that is stored in 16 bits."""
    new = ELEMENT(step, EXACT(p, rest[-2]), g, *rest[:-2], rest[-1])
    if N_STATES == 0:
        new = (new,)
    if MASTER:
        return (*new, new[0])
    rounded = ROUNDED(new[0])
    return (rounded, *new[1:], new[0] - rounded)


def terms_of_kept(step, p, g, *rest):
    """Return the terms of an element of a parameter that is stored in 16 bits."""
    return ELEMENT(step, EXACT(p, rest[-2]), g, *rest[:-2], rest[-1])


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
    names = ("p", *rule.states)
    where = f"rule {rule.name!r} on {dtype}:"
    returned = returned_dtypes(compiled, len(names) + 1, hyper, dtype, where)
    check_returns(rule, names, returned, dtype, lambda: promotion_in(compiled, len(names) + 1, hyper, dtype))
    for sums in rule.sums:
        check_sums(rule, sums, hyper, dtype)


def returned_dtypes(compiled: Any, arguments: int, hyper: Any, dtype: np.dtype[Any], where: str) -> list[str] | str:
    """Return the numba type, or list of types, that a scalar function of `arguments` numbers and h returns, by name."""
    returned = returned_type(compiled, signature_of(arguments, hyper, dtype), hyper, where)
    return [str(kind) for kind in returned] if isinstance(returned, types.BaseTuple) else str(returned)


def promotion_in(compiled: Any, arguments: int, hyper: Any, dtype: np.dtype[Any]) -> str:
    """Return which line of a function, compiled for these arguments, leaves the dtype; see `explain.promotion`."""
    from fastopt.kernels.explain import promotion

    return promotion(compiled, signature_of(arguments, hyper, dtype), numba.from_dtype(dtype))


def signature_of(arguments: int, hyper: Any, dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """Return the numba types of `arguments` numbers and h."""
    number = numba.from_dtype(dtype)
    return (*[number] * arguments, record_type(hyper, number))


def returned_type(compiled: Any, signature: tuple[Any, ...], hyper: Any, where: str) -> Any:
    """Return the numba type that a scalar function returns for arguments of these types.

    Raises TypeError, which begins with `where`, where numba does not compile the function.
    """
    try:
        compiled.compile(signature)
    except Exception as error:  # numba and its passes fail with errors of many types
        from fastopt.kernels.explain import refusal

        raise TypeError(f"{where} {refusal(compiled, hyper, error)}") from error
    return compiled.overloads[signature].signature.return_type


def record_type(kind: Any, number: Any) -> Any:
    """Return the numba type of a NamedTuple of numbers, and that of the empty tuple for one without fields."""
    fields = len(kind._fields)
    return types.NamedUniTuple(number, fields, kind) if fields else types.Tuple(())


def check_returns(
    rule: KernelRule,
    names: tuple[str, ...],
    returned: list[str] | str,
    dtype: np.dtype[Any],
    explained: Callable[[], str],
) -> None:
    """Check what a rule returns against `names`, the values that its signature requires.

    explained : gives the end of the error about a value of another dtype.

    A literal (``1 - b1``) turns float32 into float64, which is three times slower and has no other symptom.
    """
    found = [returned] if isinstance(returned, str) else returned
    if isinstance(returned, str) != (len(names) == 1) or len(found) != len(names):
        what = "one value" if isinstance(returned, str) else f"a tuple of {len(found)}"
        expected = "p alone, not in a tuple" if len(names) == 1 else f"the tuple ({', '.join(names)})"
        raise TypeError(f"rule {rule.name!r}: must return {expected}, as its signature requires, got {what}")
    wrong = [f"{name} as {kind}" for name, kind in zip(names, found, strict=True) if kind != dtype.name]
    if wrong:
        raise TypeError(f"rule {rule.name!r} on {dtype}: must return {dtype}, got {', '.join(wrong)}{explained()}")


def records_of(sums: SumsFunctions) -> tuple[Any, Any]:
    """Return the NamedTuples that ``settle`` takes: of the sums, and of the numbers."""
    return namedtuple("Sums", (*sums.terms, *sums.norms)), namedtuple("Numbers", sums.numbers)


def check_sums(rule: KernelRule, sums: SumsFunctions, hyper: Any, dtype: np.dtype[Any]) -> None:
    """Check what the functions of sums return; raise TypeError where it is not what is declared."""
    where = f"rule {rule.name!r}: sums:"
    for kind, functions in (("terms", sums.terms), ("norms", sums.norms)):
        for name, term in functions.items():
            compiled = scalar(bind(term, {}, label=f"{rule.name}_{dtype}_{name}", scalar=scalar))
            found = returned_dtypes(compiled, len(rule.states) + 2, hyper, dtype, f"{where} {kind}[{name!r}]")
            if not isinstance(found, str) or found == "none":
                what = found if isinstance(found, str) else f"a tuple of {len(found)}"
                raise TypeError(f"{where} {kind}[{name!r}] must return a number, got {what}")
    of_sums, of_numbers = (record_type(kind, types.float64) for kind in records_of(sums))
    compiled = scalar(bind(sums.settle, {}, label=f"{rule.name}_{dtype}_settle", scalar=scalar))
    h = record_type(hyper, numba.from_dtype(dtype))
    returned = returned_type(compiled, (of_sums, of_numbers, types.float64, h), hyper, f"{where} settle")
    names = (*map(str, sums.results), *sums.numbers)
    kinds = list(returned) if isinstance(returned, types.BaseTuple) else [returned]
    if any(not isinstance(kind, types.Number | types.Boolean) for kind in kinds):
        kinds = [str(kind) for kind in kinds]
        raise TypeError(f"{where} settle must return {len(names)} numbers ({', '.join(names)}), got {', '.join(kinds)}")
    if len(kinds) != len(names) or (len(names) == 1) == isinstance(returned, types.BaseTuple):
        expected = "one number alone, not in a tuple" if len(names) == 1 else f"a tuple of {len(names)} numbers"
        what = f"a tuple of {len(kinds)}" if isinstance(returned, types.BaseTuple) else "one number"
        raise TypeError(f"{where} settle must return {expected} ({', '.join(names)}), got {what}")


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
    rule: KernelRule, sums: SumsFunctions, hyper: Any, scalar: Callable[[FunctionType], Any], scaled: int | None
) -> dict[str, Any]:
    """Return the constants by which a kernel settles sums: `settled`, compiled by `scalar`, and what is around it.

    scaled : as for `finishing`.
    """
    of_sums, of_numbers = records_of(sums)
    count = len(sums.results) + len(sums.numbers)
    constants = {"SETTLE": sums.settle, "N_SETTLED": count}
    return {
        "SETTLED": bind(settled, constants, label="settled", scalar=scalar),
        "FINISHED": finishing(sums, of_sums, scaled),
        "N_TERMS": len(of_sums._fields),
        "N_RESULTS": len(sums.results),
        "N_NUMBERS": len(sums.numbers),
        "NUMBERS": of_numbers,
        "COLUMNS": tuple(N_STEP + field for field in fields_of(rule, sums, hyper)) or (0,),
        "OVER_ALL": sums.over == "all",
    }


def fields_of(rule: KernelRule, sums: SumsFunctions, hyper: Any) -> tuple[int, ...]:
    """Return the numbers of the fields of h that sums give; raise TypeError where there are no such fields."""
    found, names = [], hyper._fields
    for field in sums.results:
        if field not in names and field not in range(-len(names), len(names)):
            raise TypeError(
                f"rule {rule.name!r}: sums: results must be fields of {hyper.__name__} ({', '.join(names)}), got "
                f"{field!r}"
            )
        found.append(range(len(names))[field] if isinstance(field, int) else names.index(field))
    return tuple(found)


# --- norms of any scalar function: what of an element is added up, and what is made of the sums -----------------------


def square(value):
    """Return the square in float64, where that of a float32 is exact, and neither 1e30 nor 1e-30 leaves the range."""
    wide = np.float64(value)
    return wide * wide


def root(total):
    """Return the root, in the simulator of CUDA as well as a float64: a Python float is weaker than a float32."""
    return np.float64(math.sqrt(total))


def root_in_range(total, up, down):
    """Return `root_of_squares` as a float64."""
    return np.float64(root_of_squares(total, up, down))


def reads_of(terms: tuple[Callable[..., Any], ...]) -> tuple[int, ...]:
    """Return which arguments before h some term mentions: it can read no others."""
    found = set()
    for term in terms:
        plain = scalar_of(term)
        assert plain is not None
        code = plain.__code__
        arguments = code.co_varnames[: code.co_argcount - 1]
        for each in dis.get_instructions(code):
            if "LOAD_FAST" in each.opname:
                names = each.argval if isinstance(each.argval, tuple) else (each.argval,)  # newer Pythons load two
                found |= {arguments.index(name) for name in names if name in arguments}
    return tuple(sorted(found))


def squared(term: Callable[..., Any], *scales: float) -> Callable[..., Any]:
    """Return the term whose sum is that of the squares of a term, scaled by a number where one is given."""
    if scales:
        (scale,) = scales

        def of_scaled(*arguments):
            return scaled_square(term(*arguments), scale)

        return of_scaled

    def of_squares(*arguments):
        return square(term(*arguments))

    return of_squares


def adding(sums: SumsFunctions) -> FunctionType:
    """Return the function ``(values)`` of the terms and norms of an element: the tuple of what is added up."""
    count = len(sums.terms)
    found = [f"values[{k}]" for k in range(count)]
    found += [f"SQUARE(values[{count + k}])" for k in range(len(sums.norms))]
    return written("adding", ["values"], [f"return ({', '.join(found)},)"], {"SQUARE": square}, __name__)


def adding_scaled(sums: SumsFunctions) -> FunctionType:
    """Return the same of the norms alone: for each the square of the value scaled up, and that of it scaled down."""
    first, constants = len(sums.terms), {"SQUARE": scaled_square, "UP": SCALE_UP, "DOWN": SCALE_DOWN}
    values = [f"values[{k}]" for k in range(first, first + len(sums.norms))]
    found = [f"SQUARE({value}, UP), SQUARE({value}, DOWN)" for value in values]
    return written("adding_scaled", ["values"], [f"return ({', '.join(found)},)"], constants, __name__)


def finishing(sums: SumsFunctions, of_sums: Any, scaled: int | None) -> FunctionType:
    """Return the function ``(totals)`` that returns the record of the sums.

    totals : an array or tuple of the sums of the terms, then those of the squares of the norms.
    scaled : where in `totals` those of the scaled squares begin, in float64 where there are norms; else None.
    """
    first = len(sums.terms)
    found = [f"totals[{k}]" for k in range(first)]
    for k in range(len(sums.norms)):
        if scaled is None:
            found.append(f"ROOT(totals[{first + k}])")
        else:
            found.append(f"OF_ALL(totals[{first + k}], totals[{scaled + 2 * k}], totals[{scaled + 2 * k + 1}])")
    constants = {"SUMS": of_sums, "ROOT": root, "OF_ALL": root_in_range}
    return written("finished", ["totals"], [f"return SUMS({', '.join(found)})"], constants, __name__)


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
    flags = {name.upper(): getattr(features, name) for name in ("clip_norm", "l2", "decoupled", "ema")}
    label = "_".join([rule.name, dtype.name, *(name for name, on in vars(features).items() if on)])
    constants = {
        "RULE": compiled_rule,
        "HYPER": hyper,
        "N_STATES": len(rule.states) + features.ema,
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
