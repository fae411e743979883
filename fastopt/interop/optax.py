"""States of optax's optimizers (``optax.adam(...).init(params)`` and what follows): both ways, without jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.interop.core import (
    Demand,
    array_from,
    by_path,
    check_forms,
    check_one_count,
    check_same_for_all,
    check_uphill,
    count_from,
    decays,
    is_scheduled,
    missed_before,
    put,
    rule_of,
    views_of,
    walk,
)
from fastopt.optimizer import Optimizer
from fastopt.step.table import WEIGHT_DECAY

# --- optax's forms ----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One transformation of a chain that keeps arrays: the name of its state, and our states by its fields."""

    name: str
    fields: Mapping[str, str]
    counts: bool = False
    sign: float = 1.0
    """By which our states differ: where the learning rate comes before, what optax gathers is the way down."""


class Form(NamedTuple):
    """An optimizer: its name, and what stands before and after the transformation by the learning rate."""

    optimizer: str
    before: Part | None
    after: Part | None = None
    tail: bool = False
    """Whether there is a place after the learning rate."""


VELOCITY = Part("TraceState", {"trace": "velocity"})
MOMENTS = Part("ScaleByAdamState", {"mu": "m", "nu": "v"}, counts=True)
SQUARES = Part("ScaleByRmsState", {"nu": "square_avg"})
CENTERED = Part("ScaleByRStdDevState", {"mu": "grad_avg", "nu": "square_avg"})
BUFFER = Part("TraceState", {"trace": "buf"}, sign=-1.0)

FORMS = {
    "sgd": Form("sgd", None),
    "sgd_momentum": Form("sgd", VELOCITY),
    "sgd_nesterov": Form("sgd", VELOCITY),
    "momentum": Form("sgd", VELOCITY),
    "nesterov": Form("sgd", VELOCITY),
    "adagrad": Form("adagrad", Part("ScaleByRssState", {"sum_of_squares": "sum_sq"})),
    "rmsprop": Form("rmsprop", SQUARES, tail=True),
    "rmsprop_centered": Form("rmsprop", CENTERED, tail=True),
    "rmsprop_momentum": Form("rmsprop", SQUARES, BUFFER, tail=True),
    "rmsprop_centered_momentum": Form("rmsprop", CENTERED, BUFFER, tail=True),
    "adam": Form("adam", MOMENTS),
    "adamw": Form("adamw", MOMENTS),
}

WHY_NOT = {
    "amsgrad": "optax.amsgrad keeps the largest bias-corrected nu, and this rule the largest uncorrected one",
    "adamw_amsgrad": "optax.amsgrad keeps the largest bias-corrected nu, and this rule the largest uncorrected one",
    "nesterov_lookahead": "optax has Nesterov's reformulated form only",
    "nadam": "optax.nadam is without the momentum schedule of this rule",
}

DEMANDS = {
    "sgd": {
        "form": Demand("heavy_ball", "its trace is v = momentum v + g, p -= lr v"),
        "lr_inside": Demand(False, "has lr outside the trace"),
        "dampening": Demand(0.0, "has no dampening"),
    },
    "adagrad": {
        "eps_inside": Demand(True, "has eps under the root"),
        "lr_decay": Demand(0.0, "has no lr_decay; use a schedule for lr"),
    },
    "rmsprop": {"lr_inside": Demand(True, "has lr inside the trace")},
    "adam": {
        "eps_hat": Demand(False, "adds eps to the corrected root"),
        "bias_correction": Demand(True, "always corrects the bias"),
    },
}
DEMANDS["adamw"] = DEMANDS["adam"]

FIELDS = {"mu", "nu", "trace", "sum_of_squares", "nu_max", "e_g", "e_x"}
"""Fields by which a state that keeps arrays for parameters is known, also of those that are refused."""


def _form_of(opt: Optimizer) -> Form:
    """The form; ValueError where optax has none that is the same."""
    form = FORMS.get(rule_of(opt))
    if form is None:
        why = WHY_NOT.get(opt.rule.name, f"the formats that are known are those of {', '.join(DEMANDS)}")
        raise ValueError(f"optax: no optimizer computes what rule {rule_of(opt)!r} does: {why}")
    if form.optimizer in ("adam", "adamw"):
        form = form._replace(optimizer="adamw" if opt.rule.decoupled else "adam")
    other = f"optax.{form.optimizer}"
    check_forms(opt, other, DEMANDS[form.optimizer])
    check_uphill(opt, other)
    if form.optimizer != "adamw" and opt.rule.decoupled and decays(opt):
        raise ValueError(f"{other}: has no decoupled weight decay, which in optax is adamw's")
    check_same_for_all(opt, other)
    return form


# --- there ------------------------------------------------------------------------------------------------------------


def to_optax_state(opt: Optimizer) -> tuple[Any, ...]:
    """The state of an optimizer as the optimizer of optax keeps it: tuples and dicts in place of its NamedTuples.

    The optimizer: SGD, Momentum (heavy_ball) and Nesterov (reformulated) are optax.sgd; Adagrad, RMSprop, Adam and
    AdamW those of their names, as ``convention="optax"`` sets them. Weight decay in the gradient (L2) is, in optax,
    ``chain(add_decayed_weights(weight_decay), sgd(lr))``, and the state one of that chain; AdamW may leave parameters
    out of the decay (``mask``). Where lr or weight_decay is a schedule it must be one there, too.

    Args:
        opt: the optimizer. It is not changed, and shares no memory with the result.

    Returns:
        The state, its leaves NumPy arrays, in optax's order: the trees of parameters in it are of the structure of
        ``opt.params``, ``count`` is an int32. An ``EmptyState()`` is an empty tuple.

    Raises:
        ValueError: a form that optax does not have; it says which and why.

    >>> import numpy as np, fastopt
    >>> from fastopt.interop import to_optax_state
    >>> opt = fastopt.Adam({"w": np.ones(2)}, convention="optax")
    >>> _ = opt.step({"w": np.ones(2)})
    >>> to_optax_state(opt)
    ({'count': array(1, dtype=int32), 'mu': {'w': array([0.1, 0.1])}, 'nu': {'w': array([0.001, 0.001])}}, ())

    As a state of optax::

        state = jax.tree.unflatten(jax.tree.structure(tx.init(params)), jax.tree.leaves(to_optax_state(opt)))
    """
    form = _form_of(opt)
    count = {"count": np.array(opt.step_count, np.int32)}
    rate = count if is_scheduled(opt, "lr") else ()
    decay = count if is_scheduled(opt, WEIGHT_DECAY) else ()
    chain = [_state(opt, form, form.before)]
    if form.optimizer == "adamw":
        chain.append(decay)
    chain.append(rate)
    if form.tail:
        chain.append(_state(opt, form, form.after))
    if form.optimizer != "adamw" and decays(opt):
        return (decay, tuple(chain))
    return tuple(chain)


def _state(opt: Optimizer, form: Form, part: Part | None) -> Any:
    if part is None:
        return ()
    state: dict[str, Any] = {}
    if part.counts:
        check_one_count(opt, f"optax.{form.optimizer}")
        state["count"] = np.array(opt.step_count, np.int32)
    views = views_of(opt)
    for theirs, ours in part.fields.items():
        state[theirs] = opt.flat.tree([_signed(view, part.sign) for view in views[ours]])
    return state


def _signed(array: np.ndarray, sign: float) -> np.ndarray:
    return np.negative(array) if sign < 0.0 else array.copy()


# --- and back ---------------------------------------------------------------------------------------------------------


def from_optax_state(opt: Optimizer, state: Any, step: int | None = None) -> None:
    """Continue a run of optax: its states and its count of steps take the place of those here.

    optax keeps no hyperparameters in its state: construct the optimizer with those of the run, which ``convention=
    "optax"`` makes easy. The parameters, and the moving average of them, stay as they are. Whatever else a chain holds
    (clipping, masks, injected hyperparameters) is looked through.

    Args:
        opt: an optimizer of the same form (see `to_optax_state`), of which nothing is changed if anything is wrong.
        state: what ``tx.init`` or ``tx.update`` returned, or the same in plain tuples and dicts. States are known by
            their fields, trees of parameters by their paths; arrays are copied, and may be anything that ``np.asarray``
            reads, in the dtype of the parameters.
        step: how many steps were made, from 0, for what counts none: rmsprop, adagrad and sgd without a schedule. None:
            what a schedule has counted, else ``step_count`` as it is.

    Raises:
        TypeError, ValueError: that say where and what: a state of another form, other paths, shapes, dtypes or counts.

    >>> import numpy as np, fastopt
    >>> from fastopt.interop import from_optax_state
    >>> opt = fastopt.SGD({"w": np.ones(2)}, lr=0.1, momentum=0.9)
    >>> from_optax_state(opt, ({"trace": {"w": np.array([3.0, 4.0])}}, ()), step=7)
    >>> opt.states["velocity"]["w"], opt.step_count
    (array([3., 4.]), 7)
    """
    form = _form_of(opt)
    parts = [part for part in (form.before, form.after) if part is not None]
    found = list(walk(state, "state", lambda fields: bool(FIELDS & set(fields)) or set(fields) == {"count"}))
    kept = [(where, fields) for where, fields in found if set(fields) != {"count"}]
    expected = [{*part.fields, *(["count"] if part.counts else [])} for part in parts]
    if [set(fields) for _, fields in kept] != expected:
        raise ValueError(
            f"state: of optax.{form.optimizer}, as this optimizer ({opt.rule.name}) is, "
            + _listed([(part.name, sorted(fields)) for part, fields in zip(parts, expected, strict=True)])
            + " was expected, and found "
            + _listed([(where, sorted(fields)) for where, fields in kept])
        )
    arrays: dict[str, list[np.ndarray]] = {}
    counted: list[tuple[str, Any]] = []
    for part, (where, fields) in zip(parts, kept, strict=True):
        if part.counts:
            counted.append((f"{where}.count", fields["count"]))
        for theirs, ours in part.fields.items():
            arrays[ours] = _leaves(opt, fields[theirs], f"{where}.{theirs}", part.sign)
    per_parameter = bool(counted)
    counted = counted or [(f"{where}.count", fields["count"]) for where, fields in found if set(fields) == {"count"}]
    steps = _steps(opt, counted, step)
    put(opt, arrays, steps, [0] * len(opt.flat.paths) if per_parameter else missed_before(opt, steps))


def _listed(states: Sequence[tuple[str, Sequence[str]]]) -> str:
    return " and ".join(f"{name} with {', '.join(fields)}" for name, fields in states) or "no state with arrays"


def _steps(opt: Optimizer, counted: Sequence[tuple[str, Any]], given: int | None) -> int:
    asked = None if given is None else count_from(given, "step")
    if not counted:
        return opt.step_count if asked is None else asked
    where, value = counted[0]
    count = count_from(value, where)
    if asked is not None and asked != count:
        raise ValueError(f"step={given!r}: {where} is {count}; leave step= out")
    return count


def _leaves(opt: Optimizer, tree: Any, where: str, sign: float) -> list[np.ndarray]:
    leaves = by_path(tree)
    paths = opt.flat.paths
    for path in (*paths, *leaves):
        if path not in leaves or path not in paths:
            raise ValueError(
                f"{where}: {'has no array for' if path in paths else 'has an array for'} {path!r}; the parameters are "
                f"{', '.join(paths)}, and it holds {', '.join(leaves) or 'none'}"
            )
    views = opt.flat.views(opt.flat.data)
    return [
        _signed(array_from(leaves[path], f"{where} of {path!r}", view), sign)
        for path, view in zip(paths, views, strict=True)
    ]
