"""Shared by all formats: match arrays to parameters, check compatibility, and replace a state atomically."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import optree

from fastopt import scalars
from fastopt.hyper import WEIGHT_DECAY
from fastopt.optimizer import Optimizer
from fastopt.step.groups import LR_SCALE
from fastopt.step.ranks import Scattered

P = ParamSpec("P")
R = TypeVar("R")


def of_one_moment(function: Callable[Concatenate[Optimizer, P], R]) -> Callable[Concatenate[Optimizer, P], R]:
    """Have the steps of other threads wait while `function` reads or replaces the state of an optimizer."""

    @wraps(function)
    def waiting(opt: Optimizer, *args: P.args, **kwargs: P.kwargs) -> R:
        if not isinstance(opt, Optimizer):
            raise TypeError(f"opt: must be an Optimizer, got {type(opt).__name__}")
        if opt.members is not None:
            raise ValueError(
                f"opt: must be of one network, got a population of members={opt.members}, for which no other framework "
                f"has a form; use save() or state_dict()"
            )
        with opt._running.gate.take(function.__name__):
            opt._running.begin_together(function.__name__)
            return function(opt, *args, **kwargs)

    return waiting


# --- reading ----------------------------------------------------------------------------------------------------------


def array_from(value: Any, where: str, like: np.ndarray) -> np.ndarray:
    """Return `value` as a NumPy array without a copy; raise unless its dtype and shape equal those of `like`."""
    array = _read(value, where)
    if array.dtype != like.dtype:
        raise TypeError(
            f"{where}: must have the parameter's dtype, {like.dtype}, got {array.dtype}; convert it, or pack the "
            f"parameters with dtype={array.dtype.name!r}"
        )
    if array.shape != like.shape:
        raise ValueError(f"{where}: must have the parameter's shape, {like.shape}, got {array.shape}")
    return array


def number_from(value: Any, where: str) -> Any:
    """Return a hyperparameter as Python numbers: the item of a 0-d array or tensor, a tuple for a list or tuple."""
    if isinstance(value, list | tuple):
        return tuple(number_from(item, f"{where}[{k}]") for k, item in enumerate(value))
    if value is None or isinstance(value, str | bool | int | float):
        return value
    array = _read(value, where)
    if array.size != 1:
        raise ValueError(f"{where}: must be one number, got an array of shape {array.shape}")
    return array.reshape(()).item()


def count_from(value: Any, where: str) -> int:
    """Return a step count as an int; frameworks store an int, a float or a 0-d array."""
    number = number_from(value, where)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{where}: must be a whole number from 0, got {value!r}")
    if not (0 <= number < 2**63 and number == int(number)):
        raise ValueError(f"{where}: must be a whole number from 0, got {value!r}")
    return int(number)


def mapping_from(value: Any, where: str, what: str) -> Mapping[Any, Any]:
    """Return `value` if it is a dict; otherwise raise TypeError."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: must be {what}, got {type(value).__name__}")
    return value


def _read(value: Any, where: str) -> np.ndarray:
    scalars.refuse_masked(where, value)
    try:
        return np.asarray(value)
    except Exception as error:  # foreign arrays raise various errors: on a GPU, part of a graph, deleted
        raise TypeError(
            f"{where}: must be readable as a NumPy array, got an error ({error}); move it to the CPU and detach it"
        ) from None


def by_path(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by path, such as ``"bn.gamma"`` in `FlatParams.paths`; None is not a leaf."""
    children = fields_of(tree)
    if children is None and isinstance(tree, list | tuple):
        children = {str(k): child for k, child in enumerate(tree)}
    if children is None:
        return {} if tree is None else {path or "params": tree}
    leaves: dict[str, Any] = {}
    for name, child in children.items():
        leaves.update(by_path(child, f"{path}.{name}" if path else str(name)))
    return leaves


def fields_of(node: Any) -> dict[str, Any] | None:
    """Return the fields of a dict, NamedTuple or object by name; None for arrays, numbers, plain lists and tuples."""
    if isinstance(node, Mapping):
        return {str(name): value for name, value in node.items()}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return {name: getattr(node, name) for name in node._fields}
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if hasattr(node, "__array__") or isinstance(node, type) or callable(node) or not hasattr(node, "__dict__"):
        return None
    return dict(vars(node))


# --- matching parameters ----------------------------------------------------------------------------------------------


def order_of(opt: Optimizer, names: Any, what: str = "names") -> list[int]:
    """Return the indices of the parameters in the order of `names`, which must be the paths, each once."""
    paths = opt.flat.paths
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{what}: must be a list of the parameters' paths ({', '.join(paths)}), got {names!r}")
    number_of = {path: k for k, path in enumerate(paths)}
    order: dict[str, int] = {}
    for name in names:
        if not isinstance(name, str) or name not in number_of:
            raise ValueError(f"{what}: must be paths of parameters, {', '.join(paths)}, got {name!r}")
        if name in order:
            raise ValueError(f"{what}: must name every parameter once, got {name!r} twice")
        order[name] = number_of[name]
    lacking = [path for path in paths if path not in order]
    if lacking:
        raise ValueError(f"{what}: must name every parameter once, got no {lacking[0]!r}")
    return list(order.values())


def check_positions(opt: Optimizer, other: str) -> None:
    """Raise ValueError where a position does not tell parameters apart, in the order of `other`.

    Those are parameters of one shape whose order is that of a dict's sorted keys: `other` knows another one, and no
    shape would show the mistake.
    """
    last: dict[tuple[int, ...], int] = {}
    accessors, paths, shapes = opt.flat.treespec.accessors(), opt.flat.paths, opt.flat.shapes
    for k, shape in enumerate(shapes):
        before = last.get(shape)
        last[shape] = k
        if before is None:
            continue
        parting = next(b for a, b in zip(accessors[before], accessors[k], strict=False) if a != b)
        if isinstance(parting, optree.MappingEntry) and not issubclass(parting.type, OrderedDict):
            raise ValueError(
                f"names: must be the paths in the order of {other}, because {paths[before]!r} and {paths[k]!r} have "
                f"one shape, {shape}, and only sorted keys decide here which is the first, got None"
            )


def views_of(opt: Optimizer) -> dict[str, list[np.ndarray]]:
    """Return the arrays of the rule's states by name, one per parameter, not copied, after all rows caught up.

    Those of which several processes hold a part each are gathered: all of them call this.
    """
    arrays = opt.state.arrays
    return {
        name: [array.whole() if isinstance(array, Scattered) else array for array in arrays[name]]
        for name in opt.rule.states
    }


def values_of(opt: Optimizer) -> list[dict[str, Any]]:
    """Return the hyperparameters of each parameter at the next step, with schedules evaluated."""
    return opt.state.values


def given_values(opt: Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of each parameter as they were given: schedules as they are."""
    return [{**group.values, LR_SCALE: group.scale} for group in opt.state.groups]


def rule_of(opt: Optimizer) -> str:
    """Return the name of the rule; for a user's rule with its module, since the name may equal one of ours."""
    own = opt.rule.__module__.startswith("fastopt.rules.")
    return opt.rule.name if own else f"{opt.rule.__module__}.{opt.rule.name}"


# --- compatibility ----------------------------------------------------------------------------------------------------


class Demand(NamedTuple):
    """The value that the other framework requires of a hyperparameter, and the reason."""

    value: Any
    why: str


EPS_PLACES = ("eps_inside", "eps_hat")
"""Options for the place of eps; they have no effect with eps = 0."""


def check_forms(opt: Optimizer, other: str, demands: Mapping[str, Demand]) -> None:
    """Raise ValueError if a parameter has a hyperparameter that the form of `other` does not support."""
    for path, values in zip(opt.flat.paths, values_of(opt), strict=True):
        for name, demand in demands.items():
            moot = name in EPS_PLACES and values["eps"] == 0.0
            if name in values and values[name] != demand.value and not moot:
                raise ValueError(
                    f"{other}: {demand.why}; parameter {path!r} must have {name}={demand.value!r}, got {values[name]!r}"
                )


def check_same_for_all(opt: Optimizer, other: str) -> None:
    """Raise ValueError if hyperparameters differ between parameters, except a decoupled decay that is 0 for some."""
    values = given_values(opt)
    decays = {each[WEIGHT_DECAY] for each in values if each[WEIGHT_DECAY] != 0.0}
    for path, each in zip(opt.flat.paths, values, strict=True):
        for name in each:
            masked = name == WEIGHT_DECAY and opt.rule.decoupled and len(decays) <= 1
            if each[name] != values[0][name] and not masked:
                raise ValueError(
                    f"{other}: supports one {name} for all parameters, but {path!r} has {each[name]!r} and "
                    f"{opt.flat.paths[0]!r} has {values[0][name]!r} (overrides)"
                )


def check_one_count(opt: Optimizer, other: str) -> None:
    """Raise ValueError if a parameter has missed a step, for a format with one step count for all parameters."""
    for path, missed in zip(opt.flat.paths, opt.state.missed, strict=True):
        if missed:
            raise ValueError(
                f"{other}: has one step count for all parameters, but {path!r} had no gradient in {missed} of "
                f"{opt.step_count} steps here, and its bias correction uses its own count"
            )


def check_uphill(opt: Optimizer, other: str) -> None:
    """Raise ValueError for an optimizer that maximizes."""
    if opt.state.options.maximize:
        raise ValueError(f"{other}: has no maximize; negate the loss, and construct the optimizer without it")


def decays(opt: Optimizer) -> bool:
    """Whether weight decay has an effect, now or later through a schedule."""
    return opt.state.decays


def is_scheduled(opt: Optimizer, name: str) -> bool:
    """Whether the hyperparameter of parameters without an override is a schedule."""
    return callable(opt.state.hyper.get(name))


# --- replacing the state ----------------------------------------------------------------------------------------------


def put(
    opt: Optimizer,
    arrays: Mapping[str, Sequence[np.ndarray]],
    step: int,
    missed: Sequence[int],
    values: Sequence[Mapping[str, Any]] | None = None,
    first: int = 0,
) -> None:
    """Replace states (with copies), counts and hyperparameters by these checked ones; the rest stays.

    arrays : by state, one array per parameter. missed : number of updates without a gradient, per parameter. values :
    hyperparameters per parameter; those of parameter `first` become the optimizer's own, differing ones its overrides.
    """
    paths = opt.flat.paths
    state = opt.state_dict()
    state["step"] = step
    state["missed"] = {path: count for path, count in zip(paths, missed, strict=True) if count}
    state["state"].update({name: dict(zip(paths, views, strict=True)) for name, views in arrays.items()})
    if values is not None:
        for change in state["overrides"].values():
            change.pop(LR_SCALE, None)  # the rates that were read are what they are
        _set_hyperparameters(opt, state["hyper"], state["overrides"], values, first)
    opt.load_state_dict(state)


def _set_hyperparameters(
    opt: Optimizer,
    hyper: dict[str, Any],
    overrides: dict[str, dict[str, Any]],
    values: Sequence[Mapping[str, Any]],
    first: int,
) -> None:
    given = given_values(opt)
    for name in values[first]:
        now = [each[name] for each in given]
        free = [k for k, value in enumerate(now) if not callable(value)]  # a schedule stays
        if all(values[k][name] == now[k] for k in free):
            continue
        scheduled = is_scheduled(opt, name)
        if not scheduled:
            hyper[name] = values[first if first in free else free[0]][name]
        for k in free:
            change = overrides.setdefault(opt.flat.paths[k], {})
            if scheduled or values[k][name] != hyper[name]:
                change[name] = values[k][name]
            else:
                change.pop(name, None)


def missed_before(opt: Optimizer, step: int) -> list[int]:
    """Return the missed updates per parameter for a format without them: those of this optimizer if at this step."""
    return opt.state.missed if opt.step_count == step else [0] * len(opt.flat.paths)


def states_in(
    node: Any, where: str, is_state: Callable[[dict[str, Any]], bool]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parts of nested containers whose fields satisfy `is_state`, with the path of each."""
    fields = fields_of(node)
    if fields is not None and is_state(fields):
        yield where, fields
    elif fields is not None:
        for name, child in fields.items():
            yield from states_in(child, f"{where}.{name}", is_state)
    elif isinstance(node, list | tuple):
        for k, child in enumerate(node):
            yield from states_in(child, f"{where}[{k}]", is_state)
