"""Convert states to and from ``torch.optim.Optimizer.state_dict()`` (torch 2), without importing torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from fastopt.interop.core import (
    Demand,
    array_from,
    check_forms,
    check_positions,
    count_from,
    decays,
    mapping_from,
    missed_before,
    number_from,
    of_one_moment,
    order_of,
    put,
    rule_of,
    values_of,
    views_of,
)
from fastopt.optimizer import Optimizer
from fastopt.rules.nadam import product

# --- torch's forms ----------------------------------------------------------------------------------------------------

KEYS = {
    "SGD": "lr momentum dampening weight_decay nesterov maximize foreach differentiable fused",
    "Adagrad": "lr lr_decay eps weight_decay initial_accumulator_value foreach maximize differentiable fused",
    "Adadelta": "lr rho eps weight_decay maximize capturable foreach differentiable",
    "RMSprop": "lr momentum alpha eps centered weight_decay capturable foreach maximize differentiable",
    "Adam": "lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused decoupled_weight_decay",
    "NAdam": "lr betas eps weight_decay momentum_decay decoupled_weight_decay maximize foreach capturable "
    "differentiable",
    "RAdam": "lr betas eps weight_decay maximize foreach capturable decoupled_weight_decay differentiable",
    "Adamax": "lr betas eps weight_decay foreach maximize differentiable capturable",
}
"""Keys of a param group of each class, in torch's order. AdamW has the keys of Adam."""

IMPLEMENTATION = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
"""Options of torch that select an implementation, not a result."""

FLAGS = ("nesterov", "amsgrad", "centered", "decoupled_weight_decay")
"""Boolean options that select the form of an optimizer."""

MARKS = set(" ".join(KEYS.values()).split()) | {"etas", "lambd", "alpha", "t0", "max_iter", "ns_steps", "beta2_decay"}
"""Keys that belong to certain classes. Other keys (``initial_lr``, a name) come from a scheduler or the user."""

FREE = {*IMPLEMENTATION, "decoupled_weight_decay", "maximize"}
"""Keys that groups of older versions may lack."""


class Form(NamedTuple):
    """The form of a rule in torch: its class, its states by our names, and the flags that are on."""

    optimizer: str
    states: Mapping[str, str]
    flags: tuple[str, ...] = ()


VELOCITY = {"velocity": "momentum_buffer"}
SQUARES, MEAN, BUFFER = {"square_avg": "square_avg"}, {"grad_avg": "grad_avg"}, {"buf": "momentum_buffer"}
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
LARGEST = {**MOMENTS, "v_max": "max_exp_avg_sq"}

FORMS = {
    "sgd": Form("SGD", {}),
    "sgd_momentum": Form("SGD", VELOCITY),
    "sgd_nesterov": Form("SGD", VELOCITY, ("nesterov",)),
    "momentum": Form("SGD", VELOCITY),
    "nesterov": Form("SGD", VELOCITY, ("nesterov",)),
    "adagrad": Form("Adagrad", {"sum_sq": "sum"}),
    "adadelta": Form("Adadelta", {"square_avg": "square_avg", "acc_delta": "acc_delta"}),
    "rmsprop": Form("RMSprop", SQUARES),
    "rmsprop_centered": Form("RMSprop", {**SQUARES, **MEAN}, ("centered",)),
    "rmsprop_momentum": Form("RMSprop", {**SQUARES, **BUFFER}),
    "rmsprop_centered_momentum": Form("RMSprop", {**SQUARES, **BUFFER, **MEAN}, ("centered",)),
    "adam": Form("Adam", MOMENTS),
    "amsgrad": Form("Adam", LARGEST, ("amsgrad",)),
    "adamw": Form("Adam", MOMENTS),
    "adamw_amsgrad": Form("Adam", LARGEST, ("amsgrad",)),
    "nadam": Form("NAdam", MOMENTS),
    "radam": Form("RAdam", MOMENTS),
    "adamax": Form("Adamax", {"m": "exp_avg", "u": "exp_inf"}),
}

OUTSIDE = Demand(False, "adds eps to the root, not under it")
DEMANDS = {
    "SGD": {
        "form": Demand("heavy_ball", "its velocity is v = momentum v + g, p -= lr v"),
        "lr_inside": Demand(False, "has lr outside the velocity"),
    },
    "Adagrad": {"eps_inside": OUTSIDE},
    "RMSprop": {"eps_inside": OUTSIDE, "lr_inside": Demand(False, "has lr outside the momentum buffer")},
    "Adam": {
        "eps_inside": OUTSIDE,
        "eps_hat": Demand(False, "adds eps to the corrected root"),
        "bias_correction": Demand(True, "always corrects the bias"),
    },
    "RAdam": {"eps_hat": Demand(True, "adds eps to the uncorrected root")},
    "Adamax": {"eps_inside": Demand(True, "has eps inside the maximum")},
}


def _form_of(opt: Optimizer) -> tuple[Form, str]:
    """Return the form, and its qualified class name for messages; raise ValueError if torch has no such form."""
    form = FORMS.get(rule_of(opt))
    if form is None:
        hint = "; its Nesterov is form='reformulated'" if opt.rule.name == "nesterov_lookahead" else ""
        raise ValueError(
            f"torch.optim: no optimizer computes the same as rule {rule_of(opt)!r}{hint}; the supported formats are "
            f"those of {', '.join(KEYS)} and AdamW"
        )
    name = f"torch.optim.{'AdamW' if form.optimizer == 'Adam' and opt.rule.decoupled else form.optimizer}"
    check_forms(opt, name, DEMANDS.get(form.optimizer, {}))
    if opt.rule.decoupled and "decoupled_weight_decay" not in KEYS[form.optimizer] and decays(opt):
        raise ValueError(f"{name}: has no decoupled weight decay; construct the optimizer with L2, or without decay")
    if form.states and "velocity" in opt.rule.states:
        for path, values in zip(opt.flat.paths, values_of(opt), strict=True):
            if values["momentum"] == 0.0 and values.get("dampening", 0.0) != 0.0:
                raise ValueError(
                    f"{name}: ignores dampening if momentum is 0; parameter {path!r} must have dampening=0, got "
                    f"{values['dampening']}"
                )
    return form, name


# --- to torch ---------------------------------------------------------------------------------------------------------


@of_one_moment
def to_torch_state(opt: Optimizer, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the optimizer's state in the form of ``torch.optim.Optimizer.state_dict()``, with NumPy arrays.

    SGD, Momentum (heavy_ball) and Nesterov (reformulated) become torch's SGD; Adagrad, Adadelta, RMSprop, Adam, AdamW,
    NAdam, RAdam and Adamax become the torch classes of the same name. Parameters that share hyperparameters form a
    group, ordered by the first of its members in `names`; torch's optimizer must have the same groups. A schedule is
    replaced by its present value.

    Args:
        opt: the optimizer. It is not changed, and shares no memory with the result.
        names: the paths of all parameters in torch's order; None for that of ``opt.flat.paths``, which sorts the keys
            of a dict and may differ from torch's.

    Returns:
        ``{"state": {index: {name: array}}, "param_groups": [...]}``. A parameter that never had a gradient has no
        state. Gradient clipping and the moving average of the parameters are not included.

    Raises:
        TypeError, ValueError: `names` that are not the paths, or a form that torch does not have.

    >>> import numpy as np, fastopt
    >>> from fastopt.interop import to_torch_state
    >>> opt = fastopt.Adam({"w": np.ones(2), "b": np.zeros(1)})
    >>> _ = opt.step({"w": np.ones(2), "b": None})
    >>> state = to_torch_state(opt, names=["w", "b"])
    >>> state["state"]
    {0: {'step': array(1., dtype=float32), 'exp_avg': array([0.1, 0.1]), 'exp_avg_sq': array([0.001, 0.001])}}
    >>> state["param_groups"][0]["params"], state["param_groups"][0]["lr"]
    ([0, 1], 0.001)

    To convert the arrays to tensors for torch::

        state["state"] = {
            k: {name: torch.as_tensor(array) for name, array in arrays.items()} for k, arrays in state["state"].items()
        }
        optimizer.load_state_dict(state)
    """
    form, _ = _form_of(opt)
    order = order_of(opt, opt.flat.paths if names is None else names)
    values = values_of(opt)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for index, k in enumerate(order):
        key = tuple(values[k].values())
        if key not in groups:
            groups[key] = {"param_names": [], **_group(opt, form, values[k]), "params": []}
        groups[key]["params"].append(index)
        groups[key]["param_names"].append(opt.flat.paths[k])
    views = views_of(opt)
    states = [_state(opt, form, k, values[k], views) for k in order]
    return {
        "state": {index: state for index, state in enumerate(states) if state},
        "param_groups": list(groups.values()),
    }


def _group(opt: Optimizer, form: Form, values: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        "momentum": 0.0,
        "dampening": 0.0,
        **dict.fromkeys(FLAGS, False),
        **dict.fromkeys(form.flags, True),
        **IMPLEMENTATION,
        **values,
        "decoupled_weight_decay": opt.rule.decoupled,
        "maximize": opt.state.options.maximize,
    }
    return {key: known[key] for key in KEYS[form.optimizer].split()}


def _state(
    opt: Optimizer, form: Form, k: int, values: Mapping[str, Any], views: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, np.ndarray]:
    count = opt.step_count - opt.state.missed[k]
    if not form.states or (count == 0 and form.optimizer != "Adagrad"):  # torch's Adagrad has its states from the start
        return {}
    state = {}
    if form.optimizer != "SGD":
        state["step"] = np.array(count, np.float32)
    if form.optimizer == "NAdam":
        state["mu_product"] = np.array(product(count, values["betas"][0], values["momentum_decay"]), np.float32)
    return {**state, **{theirs: views[ours][k].copy() for ours, theirs in form.states.items()}}


# --- from torch -------------------------------------------------------------------------------------------------------


@of_one_moment
def from_torch_state(
    opt: Optimizer, state_dict: Mapping[str, Any], names: Sequence[str] | None = None, step: int | None = None
) -> None:
    """Continue a run of ``torch.optim``: replace the states, step counts and hyperparameters by those of torch.

    The first group's hyperparameters become the optimizer's own, and differing ones of other groups become overrides. A
    schedule of this optimizer stays. The parameters and their moving average are not part of the state and do not
    change.

    Args:
        opt: an optimizer of the same form (see `to_torch_state`). It is unchanged after an error.
        state_dict: the result of ``state_dict()`` of torch's optimizer. Its arrays are copied: CPU tensors, NumPy
            arrays, or anything that ``np.asarray`` reads, in the dtype of the parameters.
        names: the paths of the parameters in torch's order, that of its groups one after another. None means torch's
            own names (``param_names``) if the state has them, or else the order of ``opt.flat.paths``, which sorts the
            keys of a dict; that is refused where two parameters of one shape are in the order of sorted keys.
        step: number of steps made, from 0, for schedules and ``step_count``; None means the largest count of a
            parameter. torch's SGD has no counts: None then keeps ``step_count``, or sets it to 1 if it is 0 and there
            are velocities, because dampening depends on whether a parameter had its first step.

    Raises:
        TypeError, ValueError: a state of another class or form (amsgrad, centered, nesterov, momentum, decoupled decay,
            maximize), other shapes, dtypes, names or counts, or a number out of range; the message names them.

    >>> import numpy as np, fastopt
    >>> from fastopt.interop import from_torch_state, to_torch_state
    >>> opt = fastopt.SGD({"w": np.ones(2)}, momentum=0.9)
    >>> _ = opt.step({"w": np.ones(2)})
    >>> twin = fastopt.SGD({"w": opt.params["w"]}, momentum=0.5)
    >>> from_torch_state(twin, to_torch_state(opt))
    >>> twin.states["velocity"]["w"], twin.step_count, twin
    (array([1., 1.]), 1, <SGD(lr=0.001, momentum=0.9, dampening=0.0, ...)
    """
    form, name = _form_of(opt)
    root = mapping_from(state_dict, "state_dict", "a dict of 'state' and 'param_groups'")
    if "state" not in root or "param_groups" not in root:
        raise ValueError(f"state_dict: must have 'state' and 'param_groups', got {', '.join(map(repr, root))}")
    groups = _groups_of(root["param_groups"])
    positions_matter = bool(form.states) or len(groups) > 1
    number_of = _numbers(opt, groups, names, positions_matter)
    values: list[dict[str, Any]] = [{} for _ in opt.flat.paths]
    for g, group in enumerate(groups):
        found = _hyper_of(opt, form, name, group, f"state_dict['param_groups'][{g}]")
        for index in group["params"]:
            values[number_of[index]] = found
    _check_momentum(opt, form, name, values)
    states = _states_of(opt, form, root["state"], number_of, values)
    step, missed = _counts(opt, form, states, step)
    arrays = {
        ours: [
            state[theirs] if theirs in state else _initial(opt, ours, k, values[k]) for k, state in enumerate(states)
        ]
        for ours, theirs in form.states.items()
    }
    put(opt, arrays, step, missed, values, number_of[groups[0]["params"][0]])


def _groups_of(found: Any) -> list[Mapping[str, Any]]:
    where = "state_dict['param_groups']"
    if not isinstance(found, list | tuple) or not found:
        raise TypeError(f"{where}: must be a list of at least one group, got {found!r}"[:500])
    groups = [mapping_from(group, f"{where}[{g}]", "a dict") for g, group in enumerate(found)]
    for g, group in enumerate(groups):
        if not isinstance(group.get("params"), list | tuple) or not group["params"]:
            raise ValueError(f"{where}[{g}]['params']: must be a list of indices, got {group.get('params')!r}")
    return groups


def _numbers(
    opt: Optimizer, groups: Sequence[Mapping[str, Any]], names: Sequence[str] | None, positions_matter: bool
) -> dict[Any, int]:
    """Return the index of the parameter here by torch's index."""
    paths = opt.flat.paths
    indices = list(chain.from_iterable(group["params"] for group in groups))
    if not all(type(index) is int for index in indices) or sorted(indices) != list(range(len(indices))):
        raise ValueError(
            f"state_dict['param_groups']: must have the indices 0, 1, ... in 'params', each once, got {indices}"
        )
    if len(indices) != len(paths):
        raise ValueError(
            f"state_dict['param_groups']: must hold {len(paths)} parameters, {', '.join(paths)}, got {len(indices)}"
        )
    if names is not None:
        return dict(enumerate(order_of(opt, names)))
    if not any("param_names" in group for group in groups):
        if positions_matter:
            check_positions(opt, "torch")
        return {index: index for index in indices}
    kept: list[str] = []
    for g, group in enumerate(groups):
        own = group.get("param_names")
        if not isinstance(own, list | tuple) or len(own) != len(group["params"]):
            raise ValueError(
                f"state_dict['param_groups'][{g}]['param_names']: must have a name for each of {group['params']}, got "
                f"{own!r}; give names="
            )
        kept += own
    order = order_of(opt, kept, "param_names of state_dict['param_groups'] (names= replaces them)")
    return dict(zip(indices, order, strict=True))


def _hyper_of(opt: Optimizer, form: Form, name: str, group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the group's hyperparameters that the rule has; raise ValueError for another class or form."""
    own = set(KEYS[form.optimizer].split())
    foreign = sorted((MARKS - own) & set(group))
    lacking = sorted(own - FREE - set(group))
    if foreign or lacking:
        others = [other for other, keys in KEYS.items() if _fits(set(keys.split()), group)]
        raise ValueError(
            f"{where}: must be of {name}, as this optimizer is, got a group that "
            + " and ".join(f"{verb} {', '.join(keys)}" for verb, keys in (("has", foreign), ("lacks", lacking)) if keys)
            + (f"; it may be of torch.optim.{' or '.join(others)}" if others else "")
        )
    here = {flag: flag in form.flags for flag in FLAGS}
    here |= {"decoupled_weight_decay": opt.rule.decoupled, "maximize": opt.state.options.maximize}
    without_momentum = "momentum" in group and number_from(group["momentum"], f"{where}['momentum']") == 0.0
    for flag, expected in here.items():
        # Nesterov has no effect without momentum; older versions of AdamW do not store decoupled_weight_decay.
        unknown = flag == "decoupled_weight_decay" and flag not in group
        if flag not in own or (flag == "nesterov" and without_momentum) or unknown:
            continue
        flagged = bool(number_from(group.get(flag, False), f"{where}[{flag!r}]"))
        if flagged != expected:
            raise ValueError(
                f"{where}[{flag!r}]: must be {expected}, as in this optimizer, got {flagged}; construct the optimizer "
                f"with {flag}={flagged}"
            )
    values = {}
    for key in opt.rule.names():
        if key in own:
            values[key] = opt.rule.check(key, number_from(group[key], f"{where}[{key!r}]"), f"{where}: ")
    if without_momentum and "dampening" in values:
        values["dampening"] = 0.0  # torch ignores dampening without momentum
    for key in ("momentum", "dampening"):
        if key not in own or key in values:
            continue
        if number_from(group[key], f"{where}[{key!r}]") != 0.0 and not without_momentum:
            raise ValueError(
                f"{where}[{key!r}]: must be 0, because this optimizer has no {key}, got {group[key]!r}; construct "
                f"fastopt.{form.optimizer}(..., {key}={group[key]!r})"
            )
    return values


def _fits(keys: set[str], group: Mapping[str, Any]) -> bool:
    return keys - FREE <= set(group) and not (MARKS - keys) & set(group)


def _check_momentum(opt: Optimizer, form: Form, name: str, values: Sequence[Mapping[str, Any]]) -> None:
    if "momentum" in opt.rule.hyperparameters and all(each["momentum"] == 0.0 for each in values):
        raise ValueError(
            f"state_dict['param_groups']: must have momentum in a group of {name}, as this optimizer has, got 0 in "
            f"every group; construct fastopt.{form.optimizer}(..., momentum=0)"
        )


def _states_of(
    opt: Optimizer, form: Form, found: Any, number_of: Mapping[Any, int], values: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the checked states of each parameter by torch's names; empty for one that never had a gradient."""
    views = opt.flat.arrays
    states: list[dict[str, Any]] = [{} for _ in views]
    for index, entry in mapping_from(found, "state_dict['state']", "a dict by index").items():
        where = f"state_dict['state'][{index!r}]"
        if index not in number_of:
            raise ValueError(f"{where}: must have an index of a parameter, 0 to {len(number_of) - 1}, got {index!r}")
        k = number_of[index]
        where += f" (parameter {opt.flat.paths[k]!r})"
        given = {key: value for key, value in mapping_from(entry, where, "a dict by name").items() if value is not None}
        if not given:
            continue
        counts = () if form.optimizer == "SGD" else ("step",)
        extra = ("mu_product",) if form.optimizer == "NAdam" else ()
        unknown = [key for key in given if key not in (*form.states.values(), *counts, *extra)]
        if unknown:
            raise ValueError(
                f"{where}: must hold the states of this optimizer ({opt.rule.name}), "
                f"{', '.join((*counts, *form.states.values())) or 'none'}, got {unknown[0]!r}"
            )
        # torch keeps no velocity for a group without momentum.
        optional = "momentum_buffer" if values[k].get("momentum") == 0.0 else None
        lacking = [key for key in (*counts, *form.states.values()) if key not in given and key != optional]
        if lacking:
            raise ValueError(f"{where}: must have {lacking[0]!r}, got {', '.join(map(repr, given))}")
        for key in given:
            if key == "step":
                states[k][key] = count_from(given[key], f"{where}[{key!r}]")
            elif key != "mu_product":
                states[k][key] = array_from(given[key], f"{where}[{key!r}]", views[k])
        if "mu_product" in given:
            check_product(given["mu_product"], states[k]["step"], values[k], f"{where}['mu_product']")
    return states


def check_product(found: Any, count: int, values: Mapping[str, Any], where: str) -> None:
    """Refuse a product of NAdam's momenta that does not follow from the count and the hyperparameters."""
    # torch accumulates the product in float32; here it follows from the count. The formula uses 1 - product, so
    # rounding does not matter, but other hyperparameters do.
    number = number_from(found, where)
    expected = product(count, values["betas"][0], values["momentum_decay"])
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number - expected) <= 1e-5:
        raise ValueError(
            f"{where}: must be {expected:.7g} after {count} steps with betas={values['betas']} and "
            f"momentum_decay={values['momentum_decay']}, got {number!r}; a run that changed these cannot be continued "
            f"here"
        )


def _counts(
    opt: Optimizer, form: Form, states: Sequence[Mapping[str, Any]], given: int | None
) -> tuple[int, list[int]]:
    """Return the number of steps, and the number that each parameter has missed."""
    asked = None if given is None else count_from(given, "step")
    if form.optimizer == "SGD":
        moving = [bool(state) for state in states]
        step = asked if asked is not None else max(opt.step_count, int(any(moving)))
        if step < int(any(moving)):
            raise ValueError(f"step: must be at least 1, because state_dict has velocities, got {given!r}")
        kept = missed_before(opt, step) if asked is None else [0] * len(states)
        if not form.states:
            return step, kept
        return step, [min(kept[k], step - 1) if moving[k] else step for k in range(len(states))]
    counts = [int(state.get("step", 0)) for state in states]
    step = max(counts) if asked is None else asked
    if step < max(counts):
        raise ValueError(f"step: must be at least {max(counts)}, the largest count in state_dict, got {given!r}")
    return step, [step - count for count in counts]


def _initial(opt: Optimizer, name: str, k: int, values: Mapping[str, Any]) -> np.ndarray:
    """Return the initial array of a state."""
    value = opt.rule.initial.get(name, 0.0)
    return np.full(opt.flat.shapes[k], values[value] if isinstance(value, str) else value, opt.flat.dtype)
