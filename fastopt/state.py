"""`OptimizerState`, the state of an optimizer, and `Snapshot`, a saved state that was checked against an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt import scalars
from fastopt.hyper import EMA
from fastopt.kernels import get_backend
from fastopt.rule import Rule
from fastopt.step.groups import ParamGroup, check_change
from fastopt.step.options import StepOptions
from fastopt.step.table import Table, hyper_of
from fastopt.storage.flat import FlatParams

STATE_FORMAT = 1
"""The format of `Optimizer.state_dict`, see its docstring."""


class OptimizerState(NamedTuple):
    """The state of an optimizer, from `Optimizer.state`. Checkpoints and other frameworks read it."""

    rule: Rule
    flat: FlatParams
    options: StepOptions
    step: int
    """The number of updates made."""
    missed: list[int]
    """For each parameter, the number of updates made without a gradient of the parameter."""
    hyper: dict[str, Any]
    """The hyperparameters of parameters without an override; schedules are not evaluated."""
    overrides: list[dict[str, Any]]
    """For each parameter, the hyperparameters that differ."""
    groups: list[ParamGroup]
    """For each parameter, its param group."""
    nonfinite: tuple[int, int]
    """The number of steps whose gradients were not finite: the latest consecutive ones, and all."""
    arrays: dict[str, list[Any]]
    """By state, and ``"ema"``: an array of the backend for each parameter. They are views, not copies."""

    @property
    def values(self) -> list[dict[str, Any]]:
        """For each parameter, all hyperparameters at the next step, with schedules evaluated."""
        return [group.at_step(self.step) for group in self.groups]

    @property
    def decays(self) -> bool:
        """Whether any weights decay, now or by a schedule."""
        return any(group.decays for group in self.groups)

    def described(self) -> dict[str, Any]:
        """Return everything except the arrays, as plain data."""
        paths, (consecutive, total) = self.flat.paths, self.nonfinite
        return {
            "step": self.step,
            "missed": {path: count for path, count in zip(paths, self.missed, strict=True) if count},
            "hyper": plain(self.hyper),
            "overrides": {path: plain(change) for path, change in zip(paths, self.overrides, strict=True) if change},
            "nonfinite": {"consecutive": consecutive, "total": total},
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data and copies of the arrays: see `Optimizer.state_dict`."""
        host = get_backend(self.flat.backend).host
        arrays = {
            name: dict(zip(self.flat.paths, (host(array).copy() for array in views), strict=True))
            for name, views in self.arrays.items()
        }
        return {
            "format": STATE_FORMAT,
            "rule": self.rule.name,
            **self.described(),
            "state": {name: paths for name, paths in arrays.items() if name != EMA},
            "ema": arrays.get(EMA),
        }


class Snapshot(NamedTuple):
    """A saved state that fits an optimizer, so that restoring it cannot fail."""

    step: int
    missed: list[int]
    values: dict[str, Any]
    changes: list[dict[str, Any]]
    arrays: dict[str, list[np.ndarray]]
    nonfinite: tuple[int, int]

    @classmethod
    def of(cls, state: Any, here: OptimizerState) -> Snapshot:
        """Check a state from `Optimizer.state_dict` against the optimizer that will continue from it.

        Raises TypeError or ValueError that names the difference.
        """
        rule, paths, views, values, changes = here.rule, here.flat.paths, here.arrays, here.hyper, here.overrides
        keys = ("format", "rule", "step", "missed", "hyper", "overrides", "state")
        if not isinstance(state, Mapping) or not set(keys) <= set(state):
            got = "another dict" if isinstance(state, Mapping) else type(state).__name__
            raise TypeError(f"state: must be what state_dict() returned, a dict of {', '.join(keys)}, got {got}")
        for key in ("missed", "hyper", "overrides", "state"):
            if not isinstance(state[key], Mapping):
                raise TypeError(f"state: {key}: must be a dict, as from state_dict(), got {type(state[key]).__name__}")
        for path, change in state["overrides"].items():
            if not isinstance(change, Mapping):
                raise TypeError(f"state: overrides of {path!r}: must be a dict, got {type(change).__name__}")
        if state["format"] != STATE_FORMAT:
            raise ValueError(
                f"state: format: must be {STATE_FORMAT} in this version of fastopt, got {state['format']!r}"
            )
        if state["rule"] != rule.name:
            raise ValueError(f"state: rule: must be {rule.name!r}, as in this optimizer, got {state['rule']!r}")
        step = _count(state["step"], "step")
        missed = {path: _count(count, f"missed[{path!r}]") for path, count in state["missed"].items()}
        overrides = state["overrides"]
        for what, named in (("missed", missed), ("overrides", overrides)):
            unknown = [path for path in named if path not in paths]
            if unknown:
                raise ValueError(
                    f"state: {what}: must name parameters, got {unknown[0]!r}; the paths are {', '.join(paths)}"
                )
        late = [path for path, count in missed.items() if count > step]
        if late:
            raise ValueError(f"state: missed[{late[0]!r}]: must be at most step={step}, got {missed[late[0]]}")
        restored = _values_from(here, state["hyper"], values, "hyper: ", step)
        if set(restored) != set(values):
            lacking = ", ".join(sorted(set(values) - set(restored)))
            raise ValueError(f"state: hyper: must hold all hyperparameters, got no {lacking}")
        average = state.get(EMA)  # the states of older versions hold neither the average nor the counters
        if (average is None) != (EMA not in views):
            raise ValueError(
                "state: ema: must hold the average of the parameters, which this optimizer keeps, got None"
                if average is None
                else "state: ema: must be None, as this optimizer keeps no average of the parameters, got an average"
            )
        arrays = {
            name: _arrays_from(state if name == EMA else state["state"], name, paths, own)
            for name, own in views.items()
        }
        counters = state.get("nonfinite", {"consecutive": 0, "total": 0})
        if not isinstance(counters, Mapping) or set(counters) != {"consecutive", "total"}:
            raise TypeError(f"state: nonfinite: must be a dict of 'consecutive' and 'total', got {counters!r}"[:500])
        return cls(
            step,
            [missed.get(path, 0) for path in paths],
            restored,
            [
                _values_from(here, overrides.get(path, {}), {**values, **change}, f"overrides of {path!r}: ", step)
                for path, change in zip(paths, changes, strict=True)
            ],
            arrays,
            (
                _count(counters["consecutive"], "nonfinite['consecutive']"),
                _count(counters["total"], "nonfinite['total']"),
            ),
        )


def try_step(here: OptimizerState, snapshot: Snapshot) -> None:
    """Raise the error that the next step with these hyperparameters would raise, before they are restored."""
    for change, missed in zip(snapshot.changes, snapshot.missed, strict=True):
        point = ParamGroup(here.rule, here.flat.dtype, snapshot.values, change, missed).point(snapshot.step)
        table = Table(here.rule, hyper_of(here.rule, point), here.flat.dtype)
        table.write(0, snapshot.step + 1 - missed, point, 1.0)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters as data: a schedule becomes its repr."""
    return {name: {"schedule": repr(value)} if callable(value) else value for name, value in values.items()}


def _values_from(
    here: OptimizerState, stored: Mapping[str, Any], present: Mapping[str, Any], where: str, step: int
) -> dict[str, Any]:
    values = {}
    for name, value in stored.items():
        if isinstance(value, Mapping):
            if not callable(present.get(name)):
                raise ValueError(
                    f"state: {where}{name}: must be a schedule in this optimizer, as in the saved one "
                    f"({value.get('schedule')}), got {present.get(name)!r}; construct it with the schedule"
                )
            value = present[name]
        elif callable(present.get(name)):
            raise ValueError(
                f"state: {where}{name}: must be {value!r} in this optimizer, as in the saved one, got a schedule; "
                f"construct it with {name}={value!r}, and assign the schedule after loading"
            )
        values[name] = value
    return check_change(here.rule, values, f"state: {where}", here.flat.dtype, step)


def _arrays_from(
    stored: Mapping[str, Any], name: str, paths: Sequence[str], own: Sequence[np.ndarray]
) -> list[np.ndarray]:
    if not isinstance(stored.get(name), Mapping) or set(stored[name]) != set(paths):
        held = stored.get(name)
        got = f"arrays for {list(held)}" if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(f"state: {name}: must hold an array for each of {', '.join(paths)}, got {got}")
    arrays = []
    for path, view in zip(paths, own, strict=True):
        array = stored[name][path]
        scalars.refuse_masked(f"state: {name}[{path!r}]", array)
        if not isinstance(array, np.ndarray) or array.dtype != view.dtype or array.shape != view.shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"state: {name}[{path!r}]: must be {view.dtype} {view.shape}, got {found}")
        arrays.append(array)
    return arrays


def _count(value: Any, name: str) -> int:
    return scalars.count(f"state: {name}", value, 0, "an int from 0")
