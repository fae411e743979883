"""Convert states to and from optax (``optax.adam(...).init(params)`` and later states), without importing jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.hyper import WEIGHT_DECAY
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
    of_one_moment,
    put,
    rule_of,
    states_in,
    views_of,
)
from fastopt.optimizer import Optimizer

# --- optax's forms ----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A transformation of a chain with array states: the name of its state, and our states by its fields."""

    name: str
    fields: Mapping[str, str]
    counts: bool = False
    sign: float = 1.0
    """Sign between optax's states and ours: a transformation after the learning rate accumulates descent steps."""


class Form(NamedTuple):
    """An optimizer: its name, and the transformations before and after the learning rate."""

    optimizer: str
    before: Part | None
    after: Part | None = None
    ends_with_slot: bool = False
    """Whether the chain has an entry after the learning rate."""


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
    "rmsprop": Form("rmsprop", SQUARES, ends_with_slot=True),
    "rmsprop_centered": Form("rmsprop", CENTERED, ends_with_slot=True),
    "rmsprop_momentum": Form("rmsprop", SQUARES, BUFFER, ends_with_slot=True),
    "rmsprop_centered_momentum": Form("rmsprop", CENTERED, BUFFER, ends_with_slot=True),
    "adam": Form("adam", MOMENTS),
    "adamw": Form("adamw", MOMENTS),
}

WHY_NOT = {
    "amsgrad": "optax.amsgrad keeps the largest bias-corrected nu, but this rule the largest uncorrected one",
    "adamw_amsgrad": "optax.amsgrad keeps the largest bias-corrected nu, but this rule the largest uncorrected one",
    "nesterov_lookahead": "optax has only Nesterov's reformulated form",
    "nadam": "optax.nadam does not have the momentum schedule of this rule",
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
"""Fields that identify a state with arrays per parameter, including states that are refused."""


def _form_of(opt: Optimizer) -> Form:
    """Return the form; raise ValueError if optax has no equal form."""
    form = FORMS.get(rule_of(opt))
    if form is None:
        why = WHY_NOT.get(opt.rule.name, f"the supported formats are those of {', '.join(DEMANDS)}")
        raise ValueError(f"optax: no optimizer computes the same as rule {rule_of(opt)!r}: {why}")
    if form.optimizer in ("adam", "adamw"):
        form = form._replace(optimizer="adamw" if opt.rule.decoupled else "adam")
    other = f"optax.{form.optimizer}"
    check_forms(opt, other, DEMANDS[form.optimizer])
    check_uphill(opt, other)
    if form.optimizer != "adamw" and opt.rule.decoupled and decays(opt):
        raise ValueError(f"{other}: has no decoupled weight decay; in optax only adamw has it")
    check_same_for_all(opt, other)
    return form


# --- to optax ---------------------------------------------------------------------------------------------------------


@of_one_moment
def to_optax_state(opt: Optimizer) -> tuple[Any, ...]:
    """Return the optimizer's state as optax stores it, with tuples and dicts instead of optax's NamedTuples.

    SGD, Momentum (heavy_ball) and Nesterov (reformulated) become optax.sgd; Adagrad, RMSprop, Adam and AdamW become the
    optax optimizers of the same name, in the form of ``convention="optax"``. L2 weight decay is, in optax,
    ``chain(add_decayed_weights(weight_decay), sgd(lr))``, and the result is the state of that chain; AdamW may exclude
    parameters from the decay (``mask``). If lr or weight_decay is a schedule here, it must be a schedule in optax.

    Args:
        opt: the optimizer. It is not changed, and shares no memory with the result.

    Returns:
        The state in optax's order, with NumPy arrays as leaves: trees of parameters have the structure of
        ``opt.params``, ``count`` is an int32. An ``EmptyState()`` is an empty tuple.

    Raises:
        ValueError: a form that optax does not have; the message gives the reason.

    >>> import numpy as np, fastopt
    >>> from fastopt.interop import to_optax_state
    >>> opt = fastopt.Adam({"w": np.ones(2)}, convention="optax")
    >>> _ = opt.step({"w": np.ones(2)})
    >>> to_optax_state(opt)
    ({'count': array(1, dtype=int32), 'mu': {'w': array([0.1, 0.1])}, 'nu': {'w': array([0.001, 0.001])}}, ())

    To convert it to a state of optax::

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
    if form.ends_with_slot:
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


# --- from optax -------------------------------------------------------------------------------------------------------


@of_one_moment
def from_optax_state(opt: Optimizer, state: Any, step: int | None = None) -> None:
    """Continue a run of optax: replace the states and the step count by those of optax.

    An optax state holds no hyperparameters: construct the optimizer with those of the run, most easily with
    ``convention="optax"``. The parameters and their moving average do not change. Other parts of a chain (clipping,
    masks, injected hyperparameters) are ignored.

    Args:
        opt: an optimizer of the same form (see `to_optax_state`). It is unchanged after an error.
        state: the state that ``tx.init`` or ``tx.update`` returned, or the same in plain tuples and dicts. States are
            identified by their fields, trees of parameters by their paths. Arrays are copied; pass anything that
            ``np.asarray`` reads, in the dtype of the parameters.
        step: number of steps made, from 0, for states without a count: rmsprop, adagrad and sgd without a schedule.
            None means the count of a schedule, or else the present ``step_count``.

    Raises:
        TypeError, ValueError: a state of another form, other paths, shapes, dtypes or counts; the message names them.

    >>> import numpy as np, fastopt
    >>> from fastopt.interop import from_optax_state
    >>> opt = fastopt.SGD({"w": np.ones(2)}, lr=0.1, momentum=0.9)
    >>> from_optax_state(opt, ({"trace": {"w": np.array([3.0, 4.0])}}, ()), step=7)
    >>> opt.states["velocity"]["w"], opt.step_count
    (array([3., 4.]), 7)
    """
    form = _form_of(opt)
    parts = [part for part in (form.before, form.after) if part is not None]
    found = list(states_in(state, "state", lambda fields: bool(FIELDS & set(fields)) or set(fields) == {"count"}))
    kept = [(where, fields) for where, fields in found if set(fields) != {"count"}]
    expected = [{*part.fields, *(["count"] if part.counts else [])} for part in parts]
    if [set(fields) for _, fields in kept] != expected:
        raise ValueError(
            f"state: must be of optax.{form.optimizer}, as this optimizer ({opt.rule.name}) is, and have "
            + _listed([(part.name, sorted(fields)) for part, fields in zip(parts, expected, strict=True)])
            + ", got "
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
        raise ValueError(f"step: must be {count} as in {where}, got {given!r}; omit step")
    return count


def _leaves(opt: Optimizer, tree: Any, where: str, sign: float) -> list[np.ndarray]:
    leaves = by_path(tree)
    paths = opt.flat.paths
    for path in (*paths, *leaves):
        if path not in leaves or path not in paths:
            raise ValueError(
                f"{where}: must have an array for each of {', '.join(paths)} and no other, got "
                f"{', '.join(leaves) or 'none'}; {path!r} is {'missing' if path in paths else 'unknown'}"
            )
    views = opt.flat.arrays
    return [
        _signed(array_from(leaves[path], f"{where} of {path!r}", view), sign)
        for path, view in zip(paths, views, strict=True)
    ]
