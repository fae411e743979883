"""What the formats share: whose array is whose, what may be taken over, and how it is put in place at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.optimizer import Optimizer
from fastopt.step.table import WEIGHT_DECAY

# --- what is read -----------------------------------------------------------------------------------------------------


def array_from(value: Any, where: str, like: np.ndarray) -> np.ndarray:
    """Anything that NumPy reads as an array, not copied; an error where its dtype or shape is not that of `like`."""
    array = _read(value, where)
    if array.dtype != like.dtype:
        raise TypeError(
            f"{where}: expected dtype {like.dtype} as the parameter's, found {array.dtype}; convert it, or pack the "
            f"parameters with dtype={array.dtype.name!r}"
        )
    if array.shape != like.shape:
        raise ValueError(f"{where}: expected shape {like.shape} as the parameter's, found {array.shape}")
    return array


def number_from(value: Any, where: str) -> Any:
    """A hyperparameter as Python numbers: of a 0-d array or tensor its item, of a list or tuple a tuple."""
    if isinstance(value, list | tuple):
        return tuple(number_from(item, f"{where}[{k}]") for k, item in enumerate(value))
    if value is None or isinstance(value, str | bool | int | float):
        return value
    array = _read(value, where)
    if array.size != 1:
        raise ValueError(f"{where}: expected one number, found an array of shape {array.shape}")
    return array.reshape(()).item()


def count_from(value: Any, where: str) -> int:
    """A count of steps, which frameworks keep as an int, a float or a 0-d array of either."""
    number = number_from(value, where)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{where}: expected a whole number from 0, found {value!r}")
    if not (0 <= number < 2**63 and number == int(number)):
        raise ValueError(f"{where}: expected a whole number from 0, found {value!r}")
    return int(number)


def mapping_from(value: Any, where: str, what: str) -> Mapping[Any, Any]:
    """`value`; TypeError where it is no dict."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: expected {what}, found {type(value).__name__}")
    return value


def _read(value: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # a foreign array may raise anything here: on a GPU, part of a graph, deleted
        raise TypeError(f"{where}: not readable as a NumPy array ({error}); move it to the CPU and detach it") from None


def by_path(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by path, ``"bn.gamma"`` as in `FlatParams.paths`; one of Nones has no leaf there."""
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
    """What a dict, NamedTuple or object holds, by name; None for arrays, numbers, and plain lists and tuples."""
    if isinstance(node, Mapping):
        return {str(name): value for name, value in node.items()}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return {name: getattr(node, name) for name in node._fields}
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if hasattr(node, "__array__") or isinstance(node, type) or callable(node) or not hasattr(node, "__dict__"):
        return None
    return dict(vars(node))


# --- whose it is ------------------------------------------------------------------------------------------------------


def order_of(opt: Optimizer, names: Any, what: str = "names") -> list[int]:
    """The numbers of the parameters in the order of `names`, which must be their paths, each once."""
    paths = opt.flat.paths
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{what}: expected a list of the parameters' paths ({', '.join(paths)}), found {names!r}")
    number_of = {path: k for k, path in enumerate(paths)}
    order: dict[str, int] = {}
    for name in names:
        if not isinstance(name, str) or name not in number_of:
            raise ValueError(f"{what}: {name!r} is no parameter; the paths are {', '.join(paths)}")
        if name in order:
            raise ValueError(f"{what}: {name!r} is there twice; name every parameter once")
        order[name] = number_of[name]
    lacking = [path for path in paths if path not in order]
    if lacking:
        raise ValueError(f"{what}: {lacking[0]!r} is missing; name every parameter once")
    return list(order.values())


def views_of(opt: Optimizer) -> dict[str, list[np.ndarray]]:
    """The arrays of the rule's states by name, all rows up to date: one for each parameter, no copies."""
    opt.flush_rows()
    views = opt._views()
    return {name: views[name] for name in opt.rule.states}


def values_of(opt: Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of each parameter at the next step, schedules evaluated."""
    return [opt._rows[row].at_step(opt.step_count) for row in opt._row_of]


def rule_of(opt: Optimizer) -> str:
    """The name of the rule; with its module if it is a user's own, which may have the name of one of ours."""
    own = opt.rule.__module__.startswith("fastopt.rules.")
    return opt.rule.name if own else f"{opt.rule.__module__}.{opt.rule.name}"


# --- whether it fits --------------------------------------------------------------------------------------------------


class Demand(NamedTuple):
    """What a hyperparameter must be for the other framework to have this form, and why."""

    value: Any
    why: str


EPS_PLACES = ("eps_inside", "eps_hat")
"""Options that tell where eps stands: with eps = 0 they make no difference."""


def check_forms(opt: Optimizer, other: str, demands: Mapping[str, Demand]) -> None:
    """ValueError where a hyperparameter of some parameter is not what the form of `other` takes."""
    for path, values in zip(opt.flat.paths, values_of(opt), strict=True):
        for name, demand in demands.items():
            moot = name in EPS_PLACES and values["eps"] == 0.0
            if name in values and values[name] != demand.value and not moot:
                raise ValueError(
                    f"{other}: {demand.why}; parameter {path!r} has {name}={values[name]!r} here, expected "
                    f"{demand.value!r}"
                )


def check_same_for_all(opt: Optimizer, other: str) -> None:
    """ValueError where hyperparameters differ between parameters; only the decoupled decay may be 0 for some."""
    values = [opt._values_of(k) for k in range(len(opt.flat.paths))]
    decays = {each[WEIGHT_DECAY] for each in values if each[WEIGHT_DECAY] != 0.0}
    for path, each in zip(opt.flat.paths, values, strict=True):
        for name in each:
            masked = name == WEIGHT_DECAY and opt.rule.decoupled and len(decays) <= 1
            if each[name] != values[0][name] and not masked:
                raise ValueError(
                    f"{other}: has one {name} for all parameters, but {path!r} has {each[name]!r} and "
                    f"{opt.flat.paths[0]!r} {values[0][name]!r} here (overrides)"
                )


def check_one_count(opt: Optimizer, other: str) -> None:
    """ValueError where a parameter has missed a step, in a format that counts steps once for all."""
    for path, missed in zip(opt.flat.paths, opt._missed, strict=True):
        if missed:
            raise ValueError(
                f"{other}: counts the steps once for all parameters, but {path!r} had no gradient in {missed} of "
                f"{opt.step_count} steps here, and corrects its bias by its own count"
            )


def check_uphill(opt: Optimizer, other: str) -> None:
    """ValueError for an optimizer that maximizes."""
    if opt._tail.maximize:
        raise ValueError(f"{other}: has no maximize; negate the loss, and construct the optimizer without it")


def decays(opt: Optimizer) -> bool:
    """Whether weight decay makes any difference, now or by a schedule."""
    return any(callable(value) or value != 0.0 for value in (row.values[WEIGHT_DECAY] for row in opt._rows))


def is_scheduled(opt: Optimizer, name: str) -> bool:
    """Whether the hyperparameter of parameters without an override is a schedule."""
    return callable(opt._values.get(name))


# --- how it is put in place -------------------------------------------------------------------------------------------


def put(
    opt: Optimizer,
    arrays: Mapping[str, Sequence[np.ndarray]],
    step: int,
    missed: Sequence[int],
    values: Sequence[Mapping[str, Any]] | None = None,
    first: int = 0,
) -> None:
    """Continue from copies of these states, and these counts and hyperparameters, all checked; the rest stays.

    arrays : by state, one for each parameter. missed : updates without a gradient, of each. values : hyperparameters of
    each; those of parameter number `first` become the optimizer's own, and what differs elsewhere its overrides.
    """
    paths = opt.flat.paths
    state = opt.state_dict()
    state["step"] = step
    state["missed"] = {path: count for path, count in zip(paths, missed, strict=True) if count}
    state["state"].update({name: dict(zip(paths, views, strict=True)) for name, views in arrays.items()})
    if values is not None:
        _settle(opt, state["hyper"], state["overrides"], values, first)
    opt.load_state_dict(state)


def _settle(
    opt: Optimizer,
    hyper: dict[str, Any],
    overrides: dict[str, dict[str, Any]],
    values: Sequence[Mapping[str, Any]],
    first: int,
) -> None:
    for name in values[first]:
        now = [opt._values_of(k)[name] for k in range(len(values))]
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
    """The updates that parameters have missed, where a format does not tell: those of a run that was at this step."""
    return list(opt._missed) if opt.step_count == step else [0] * len(opt.flat.paths)


def walk(node: Any, where: str, is_state: Callable[[dict[str, Any]], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts of nested containers that `is_state` knows by their fields, with the place of each."""
    fields = fields_of(node)
    if fields is not None and is_state(fields):
        yield where, fields
    elif fields is not None:
        for name, child in fields.items():
            yield from walk(child, f"{where}.{name}", is_state)
    elif isinstance(node, list | tuple):
        for k, child in enumerate(node):
            yield from walk(child, f"{where}[{k}]", is_state)
