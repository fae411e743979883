"""`Snapshot`: the state of an optimizer as plain data, held against the optimizer that is to continue from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from fastopt.rule import Rule
from fastopt.step.table import EMA

STATE_FORMAT = 1
"""Of `Optimizer.state_dict`, whose docstring tells what it holds."""


class Snapshot(NamedTuple):
    """A state that fits an optimizer: nothing can go wrong any more when it is put in place."""

    step: int
    missed: list[int]
    values: dict[str, Any]
    changes: list[dict[str, Any]]
    arrays: dict[str, list[np.ndarray]]
    nonfinite: tuple[int, int]

    @classmethod
    def of(
        cls,
        state: Any,
        rule: Rule,
        paths: Sequence[str],
        views: Mapping[str, Sequence[np.ndarray]],
        values: Mapping[str, Any],
        changes: Sequence[Mapping[str, Any]],
    ) -> Snapshot:
        """What `state`, as `Optimizer.state_dict` returned it, means to an optimizer.

        views : its own arrays by name, one for each path. values, changes : its hyperparameters, and those of each path
            that differ.

        Raises TypeError or ValueError that says what differs.
        """
        keys = ("format", "rule", "step", "missed", "hyper", "overrides", "state")
        if not isinstance(state, Mapping) or not set(keys) <= set(state):
            raise TypeError(f"state: expected what state_dict() returned, a dict of {', '.join(keys)}")
        for key in ("missed", "hyper", "overrides", "state"):
            if not isinstance(state[key], Mapping):
                raise TypeError(f"state: {key!r} must be a dict, as state_dict() returned it")
        if not all(isinstance(change, Mapping) for change in state["overrides"].values()):
            raise TypeError("state: 'overrides' must hold a dict for each path, as state_dict() returned it")
        if state["format"] != STATE_FORMAT:
            raise ValueError(f"state: format {state['format']!r}; this version of fastopt reads format {STATE_FORMAT}")
        if state["rule"] != rule.name:
            raise ValueError(f"state: of rule {state['rule']!r}, but this optimizer runs rule {rule.name!r}")
        step = _count(state["step"], "step")
        missed = {path: _count(count, f"missed[{path!r}]") for path, count in state["missed"].items()}
        overrides = state["overrides"]
        for what, named in (("missed", missed), ("overrides", overrides)):
            unknown = [path for path in named if path not in paths]
            if unknown:
                raise ValueError(f"state: {what} names {unknown[0]!r}; the paths are {', '.join(paths)}")
        late = [path for path, count in missed.items() if count > step]
        if late:
            raise ValueError(f"state: missed[{late[0]!r}] is {missed[late[0]]}, more than the {step} steps made")
        restored = _values_from(rule, state["hyper"], values, "hyper: ", step)
        if set(restored) != set(values):
            raise ValueError(f"state: hyper lacks {', '.join(sorted(set(values) - set(restored)))}")
        average = state.get(EMA)  # absent from the states of older versions, as are the counters
        if (average is None) != (EMA not in views):
            there, here = ("no average", "one") if average is None else ("an average (ema)", "none")
            raise ValueError(f"state: holds {there} of the parameters, but this optimizer keeps {here}")
        arrays = {
            name: _arrays_from(state if name == EMA else state["state"], name, paths, own)
            for name, own in views.items()
        }
        counters = state.get("nonfinite", {"consecutive": 0, "total": 0})
        if not isinstance(counters, Mapping) or set(counters) != {"consecutive", "total"}:
            raise TypeError("state: 'nonfinite' must hold 'consecutive' and 'total', as state_dict() returned it")
        return cls(
            step,
            [missed.get(path, 0) for path in paths],
            restored,
            [
                _values_from(rule, overrides.get(path, {}), {**values, **change}, f"overrides of {path!r}: ", step)
                for path, change in zip(paths, changes, strict=True)
            ],
            arrays,
            (
                _count(counters["consecutive"], "nonfinite['consecutive']"),
                _count(counters["total"], "nonfinite['total']"),
            ),
        )


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as data: of a schedule its repr."""
    return {name: {"schedule": repr(value)} if callable(value) else value for name, value in values.items()}


def _values_from(
    rule: Rule, stored: Mapping[str, Any], present: Mapping[str, Any], where: str, step: int
) -> dict[str, Any]:
    values = {}
    for name, value in stored.items():
        if isinstance(value, Mapping):
            if not callable(present.get(name)):
                raise ValueError(
                    f"state: {where}{name} was the schedule {value.get('schedule')}; give {name}= a schedule here"
                )
            value = present[name]
        elif callable(present.get(name)):
            raise ValueError(
                f"state: {where}{name} was {value!r}, but is a schedule here; construct the optimizer with "
                f"{name}={value!r}, and assign the schedule after loading"
            )
        values[name] = value
    return rule.check_all(values, f"state: {where}", step)


def _arrays_from(
    stored: Mapping[str, Any], name: str, paths: Sequence[str], own: Sequence[np.ndarray]
) -> list[np.ndarray]:
    if not isinstance(stored.get(name), Mapping) or set(stored[name]) != set(paths):
        raise ValueError(f"state: {name!r} must hold an array for each of {', '.join(paths)}")
    arrays = []
    for path, view in zip(paths, own, strict=True):
        array = stored[name][path]
        if not isinstance(array, np.ndarray) or array.dtype != view.dtype or array.shape != view.shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"state: {name}[{path!r}]: expected {view.dtype} {view.shape}, found {found}")
        arrays.append(array)
    return arrays


def _count(value: Any, name: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"state: {name} is {value!r}; expected an int from 0")
    return int(value)
