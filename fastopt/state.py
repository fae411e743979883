"""`OptimizerState`, the state of an optimizer; `fit`, which prepares a saved state for another one; and `Snapshot`, a
saved state that was checked against an optimizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from fastopt import scalars
from fastopt.hyper import EMA, differs
from fastopt.kernels import get_backend
from fastopt.rule import Rule
from fastopt.step.groups import FROZEN, LR_SCALE, ParamGroup, check_change
from fastopt.step.matrices import shape_in
from fastopt.step.options import StepOptions
from fastopt.step.ranks import Scattered
from fastopt.step.table import Table, hyper_of
from fastopt.storage.flat import FlatParams

STATE_FORMAT = 1
"""The format of `Optimizer.state_dict`, see its docstring."""

FREE = ("zero_grad", "grad_norm")
"""The options that leave the update as it is: a continued run may have others."""

DECOUPLED = "decoupled_weight_decay"
MEMBERS = "members"
NO_PLACE = "has no place in this optimizer"


class OptimizerState(NamedTuple):
    """The state of an optimizer, from `Optimizer.state`. Checkpoints and other frameworks read it."""

    rule: Rule
    flat: FlatParams
    options: StepOptions
    step: int
    """The number of updates made."""
    missed: list[Any]
    """For each parameter, the number of updates made without a gradient of the parameter; in a population, an array."""
    hyper: dict[str, Any]
    """The hyperparameters of parameters without an override; schedules are not evaluated."""
    overrides: list[dict[str, Any]]
    """For each parameter, the hyperparameters that differ."""
    groups: list[ParamGroup]
    """For each parameter, its param group."""
    nonfinite: tuple[Any, Any]
    """The number of steps whose gradients were not finite: the latest consecutive ones, and all; or arrays of them."""
    arrays: dict[str, list[Any]]
    """By state, and ``"ema"``: an array of the backend for each parameter, which are views, not copies; or a
    `fastopt.step.ranks.Scattered`."""

    @property
    def values(self) -> list[dict[str, Any]]:
        """For each parameter, all hyperparameters at the next step, with schedules evaluated."""
        return [group.at_step(self.step) for group in self.groups]

    @property
    def decays(self) -> bool:
        """Whether any weights decay, now or by a schedule."""
        return any(group.decays for group in self.groups)

    def expecting(self, state: Mapping[str, Any], keep: Collection[str] = ()) -> OptimizerState:
        """Return this with the shapes of matrices that a saved state must have: of the parameters chosen there.

        state : of the form of `Optimizer.state_dict`. keep : names of hyperparameters that stay as they are here.
        """
        rule, whole = self.rule, self.rule.matrixwise
        if whole is None or not rule.matrices or whole.chosen in keep or state["rule"] != rule.name:
            return self
        base, arrays = state["hyper"].get(whole.chosen, self.hyper[whole.chosen]), dict(self.arrays)
        for k, path in enumerate(self.flat.paths):
            change = state["overrides"].get(path)
            flag = change.get(whole.chosen, base) if isinstance(change, Mapping) else base
            for name in rule.matrices:
                shape = shape_in(self.flat, rule, name, k, chosen=bool(flag))
                if shape != arrays[name][k].shape:
                    zeros = np.broadcast_to(np.zeros((), self.flat.compute), shape)
                    arrays[name] = [*arrays[name][:k], zeros, *arrays[name][k + 1 :]]
        return self._replace(arrays=arrays)

    def described(self) -> dict[str, Any]:
        """Return everything except the arrays, as plain data."""
        paths, (consecutive, total) = self.flat.paths, map(data, self.nonfinite)
        return {
            "step": self.step,
            "missed": {path: data(count) for path, count in zip(paths, self.missed, strict=True) if np.any(count)},
            "hyper": plain(self.hyper),
            "overrides": {path: plain(change) for path, change in zip(paths, self.overrides, strict=True) if change},
            "nonfinite": {"consecutive": consecutive, "total": total},
            "options": {**asdict(self.options), DECOUPLED: self.rule.decoupled, MEMBERS: self.flat.members},
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data and copies of the arrays: see `Optimizer.state_dict`."""
        host = get_backend(self.flat.backend).host

        def copied(array: Any) -> np.ndarray:
            return array.whole() if isinstance(array, Scattered) else host(array).copy()

        arrays = {
            name: dict(zip(self.flat.paths, map(copied, views), strict=True)) for name, views in self.arrays.items()
        }
        return {
            "format": STATE_FORMAT,
            "rule": self.rule.name,
            **self.described(),
            "state": {name: paths for name, paths in arrays.items() if name != EMA},
            "ema": arrays.get(EMA),
        }


LATER = ("eps_hat", "eps_root", "form", "initial_momentum")
"""Hyperparameters that states of older versions may lack: what they choose was then the default."""


class Snapshot(NamedTuple):
    """A saved state that fits an optimizer, so that restoring it cannot fail."""

    step: int
    missed: list[Any]
    values: dict[str, Any]
    changes: list[dict[str, Any]]
    arrays: dict[str, list[np.ndarray]]
    nonfinite: tuple[Any, Any]

    @classmethod
    def of(cls, state: Any, here: OptimizerState) -> Snapshot:
        """Check a state from `Optimizer.state_dict` against the optimizer that will continue from it.

        Raises TypeError or ValueError that names the difference.
        """
        rule, paths, values, changes = here.rule, here.flat.paths, here.hyper, here.overrides
        _check_form(state)
        views = here.expecting(state).arrays
        if state["format"] != STATE_FORMAT:
            raise ValueError(
                f"state: format: must be {STATE_FORMAT} in this version of fastopt, got {state['format']!r}"
            )
        if state["rule"] != rule.name:
            raise ValueError(f"state: rule: must be {rule.name!r}, as in this optimizer, got {state['rule']!r}")
        step = _count(state["step"], "step")
        members = here.flat.members
        missed = {path: _counts(count, f"missed[{path!r}]", members) for path, count in state["missed"].items()}
        overrides = state["overrides"]
        for what, named in (("missed", missed), ("overrides", overrides)):
            unknown = [path for path in named if path not in paths]
            if unknown:
                raise ValueError(
                    f"state: {what}: must name parameters, got {unknown[0]!r}; the paths are {', '.join(paths)}"
                )
        late = [path for path, count in missed.items() if np.any(count > step)]
        if late:
            raise ValueError(f"state: missed[{late[0]!r}]: must be at most step={step}, got {np.max(missed[late[0]])}")
        restored = _values_from(here, state["hyper"], values, "hyper: ", step)
        for name in LATER:
            if name in rule.defaults:
                restored.setdefault(name, rule.defaults[name])
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
                _each(_counts(counters["consecutive"], "nonfinite['consecutive']", members), members),
                _each(_counts(counters["total"], "nonfinite['total']", members), members),
            ),
        )


# --- a saved state that is to continue in this optimizer --------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What `Optimizer.load` and `Optimizer.load_state_dict` loaded, and what they did not, with the reasons.

    Arrays have the names of a checkpoint: ``"W"`` for a parameter, ``"m/W"`` for a state, ``"ema/W"`` for the average.

    Attributes:
        loaded: the names of the arrays that were loaded.
        missing: by name, why an array of this optimizer was not loaded.
        unexpected: by name, why a saved array was not used.
        kept: by name, why a hyperparameter or option of this optimizer differs from the saved one.
        extra: what `Optimizer.save` was given.

    >>> import numpy as np, fastopt
    >>> small, large = (fastopt.SGD({"w": np.zeros(n)}, lr=1.0, momentum=0.9) for n in (2, 3))
    >>> large.load_state_dict(small.state_dict(), strict=False).missing
    {'velocity/w': 'shape (2,) was saved, not (3,)'}
    """

    loaded: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    unexpected: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        notes = {"missing": self.missing, "unexpected": self.unexpected, "kept": self.kept}
        listed = [f"; {what}: {', '.join(map(str, names))}" for what, names in notes.items() if names]
        return f"<loaded {len(self.loaded)} arrays{''.join(listed)}>"


def check_keep(keep: Any, here: OptimizerState) -> frozenset[str]:
    """Return the names in `keep`; TypeError or ValueError unless all are hyperparameters or options."""
    if isinstance(keep, str) or not isinstance(keep, Collection) or not all(isinstance(name, str) for name in keep):
        raise TypeError(f"keep: must be a set of names, such as {{'lr'}}, got {keep!r}")
    known = (*here.hyper, LR_SCALE, FROZEN, *(name for name in here.described()["options"] if name not in FREE))
    for name in keep:
        if name not in known:
            raise ValueError(f"keep: must name hyperparameters or options ({', '.join(known)}), got {name!r}")
    return frozenset(keep)


def other_options(stored: Mapping[str, Any], here: OptimizerState, keep: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each option that changes the run and differs from the stored one, with an error.

    keep : those that may differ. Only the decay of the average can be kept: whether there is one is structure.
    """
    for name, mine in here.described()["options"].items():
        theirs = stored.get(name, stored.get("decoupled") if name == DECOUPLED else getattr(StepOptions, name, None))
        structure = name == EMA and None in (mine, theirs)
        if name in FREE or mine == theirs or (name in keep and not structure):
            continue
        remedy = "load with strict=False" if structure else f"keep this one with keep={{{name!r}}}"
        yield (
            name,
            f"must be saved with {name}={mine!r}, as this optimizer, got {name}={theirs!r}; construct the optimizer "
            f"with the same, or {remedy}",
        )


def fit(
    state: Any,
    here: OptimizerState,
    *,
    strict: bool,
    keep: Collection[str],
    params: Mapping[str, np.ndarray] | None = None,
) -> tuple[Mapping[str, Any], LoadReport]:
    """Return a saved state with what this optimizer keeps in it, for `Snapshot.of`, and a report.

    Args:
        state: from `Optimizer.state_dict`.
        here: the optimizer that will continue from the state.
        strict: whether options and schedules must be the same; else arrays and hyperparameters that do not fit are
            replaced by those that are here.
        keep: the names of hyperparameters and options that stay as they are here, as `check_keep` returned them.
        params: the saved parameters that fit, by path, if these are loaded as well.

    Raises TypeError or ValueError that names the difference.
    """
    _check_form(state)
    paths = here.flat.paths
    kept: dict[str, str] = {}
    stored = state.get("options")  # the states of older versions hold none
    if stored is not None:
        if not isinstance(stored, Mapping):
            raise TypeError(f"state: options: must be a dict, got {type(stored).__name__}")
        for name, wrong in other_options(stored, here, keep):
            if strict:
                raise ValueError(f"state: {wrong}")
            kept[name] = f"{stored.get(name)!r} was saved"
    hyper, overrides = dict(state["hyper"]), {path: dict(change) for path, change in state["overrides"].items()}
    own, changes = plain(here.hyper), dict(zip(paths, map(plain, here.overrides), strict=True))
    for name in keep:
        if name in own:
            hyper[name] = own[name]
        for change in overrides.values():
            change.pop(name, None)
        for path, change in changes.items():
            if name in change:
                overrides.setdefault(path, {})[name] = change[name]
    fitted: dict[str, Any] = {**state, "hyper": hyper, "overrides": overrides}
    if strict:
        return fitted, LoadReport(tuple(f"{name}/{path}" for name in here.arrays for path in paths))
    other = "" if state["rule"] == here.rule.name else f"of rule {state['rule']!r}, not {here.rule.name!r}"
    if any(isinstance(array, Scattered) for views in here.arrays.values() for array in views):
        raise ValueError("strict: must be True where processes hold a part of the states each, got False")
    fitted["missed"], held, report = _fit_arrays(state, here, other, params)
    fitted |= {"state": {name: held[name] for name in held if name != EMA}, EMA: held.get(EMA)}
    if other:
        kept["rule"] = f"the saved hyperparameters are {other}"
        fitted |= {"rule": here.rule.name, "hyper": own, "overrides": changes}
    else:
        fitted["hyper"] = {**own, **_fit_values(hyper, own, here.hyper, "", kept)}
        fitted["overrides"] = changes | {
            path: _fit_values(overrides.get(path, {}), changes[path], {**here.hyper, **change}, f"{path}: ", kept)
            for path, change in zip(paths, here.overrides, strict=True)
            if (params is None or path in params)
            and not any(f"{name}/{path}" in report.missing for name in here.arrays if name != EMA)
        }
    for name in here.rule.matrices:  # those of this optimizer, where the saved flag is another one
        for path, own in zip(paths, here.expecting(fitted).arrays[name], strict=True):
            if held[name][path].shape != own.shape:
                held[name][path] = own
    return fitted, replace(report, kept=kept)


def _fit_arrays(
    state: Mapping[str, Any], here: OptimizerState, other: str, params: Mapping[str, np.ndarray] | None
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]], LoadReport]:
    """Return missed updates and states of the saved parameters that fit, and this optimizer's of all others.

    A parameter has all its states from one of the two: an `m` of a thousand updates beside a `v` of none would make
    steps that are far too long. other : how the rule differs, if it does.
    """
    paths, step = here.flat.paths, _count(state["step"], "step")
    saved = {name: arrays for name, arrays in {**state["state"], EMA: state.get(EMA)}.items() if arrays is not None}
    for name, arrays in saved.items():
        if not isinstance(arrays, Mapping):
            raise TypeError(f"state: {name}: must be a dict, as from state_dict(), got {type(arrays).__name__}")
    names = [name for name in here.arrays if name != EMA]
    foreign = other if set(names) != set(state["state"]) else ""
    host, expected = get_backend(here.flat.backend).host, here.expecting(state).arrays
    missed: dict[str, Any] = {}
    held: dict[str, dict[str, np.ndarray]] = {name: {} for name in here.arrays}
    loaded: dict[str, None] = {}
    missing: dict[str, str] = {}
    for k, path in enumerate(paths):
        lost = "its parameter was not loaded" if params is not None and path not in params else ""
        wrong = {
            name: misfit(saved.get(name, {}).get(path), views[k]) or lost or (foreign if name != EMA else "")
            for name, views in expected.items()
        }
        partial = "the other states of its parameter do not fit" if any(map(wrong.get, names)) else ""
        for name, views in here.arrays.items():
            reason = wrong[name] or (partial if name != EMA else "")
            if not reason:
                held[name][path] = saved[name][path]
                loaded[f"{name}/{path}"] = None
                continue
            missing[f"{name}/{path}"] = reason
            begins_at_params = name == EMA or here.rule.initial.get(name) == "p"
            held[name][path] = params[path] if begins_at_params and params and path in params else host(views[k])
        # Where its states begin here, its count of updates does so, too.
        count = state["missed"].get(path, 0)
        if partial:
            count = np.maximum(0, step - (here.step - np.asarray(here.missed[k]))).tolist()
        if np.any(count):
            missed[path] = count
    unexpected = {
        f"{name}/{path}": foreign if foreign and name != EMA else NO_PLACE
        for name, arrays in saved.items()
        for path in arrays
        if f"{name}/{path}" not in loaded and f"{name}/{path}" not in missing
    }
    return missed, held, LoadReport(tuple(loaded), missing, unexpected)


def _fit_values(
    stored: Mapping[str, Any], own: Mapping[str, Any], present: Mapping[str, Any], where: str, kept: dict[str, str]
) -> dict[str, Any]:
    """Return the stored hyperparameters; where one does not fit, this optimizer's, and a note about it in `kept`.

    own : this optimizer's, as data. present : those that act, with their schedules.
    """
    values = {}
    for name, value in stored.items():
        saved = value.get("schedule") if isinstance(value, Mapping) else repr(value)
        if name not in present and name not in (LR_SCALE, FROZEN):
            kept[f"{where}{name}"] = f"{saved} was saved, and the rule has no such hyperparameter"
        elif _other_schedule(name, value, present.get(name)):
            kept[f"{where}{name}"] = f"{saved} was saved"
            if name in own:
                values[name] = own[name]
        else:
            values[name] = value
    return values


def misfit(array: Any, own: Any) -> str:
    """Return why an array cannot take the place of another one; "" where it can."""
    if array is None:
        return "none was saved"
    if not isinstance(array, np.ndarray):
        return f"{type(array).__name__} was saved, not an array"
    if array.shape != own.shape:
        return f"shape {array.shape} was saved, not {own.shape}"
    return "" if array.dtype == own.dtype else f"{array.dtype} was saved, not {own.dtype}"


def _check_form(state: Any) -> None:
    """Raise TypeError unless a state has the form of what `Optimizer.state_dict` returns."""
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


def try_step(here: OptimizerState, snapshot: Snapshot) -> None:
    """Raise the error that the next step with these hyperparameters would raise, before they are restored."""
    for change, missed in zip(snapshot.changes, snapshot.missed, strict=True):
        members = here.flat.members
        group = ParamGroup(here.rule, here.flat.compute, snapshot.values, change, missed, members)
        point = group.point(snapshot.step)
        table = Table(here.rule, hyper_of(here.rule, point), here.flat.compute)
        for member, count in enumerate(np.broadcast_to(missed, (members or 1,)).tolist()):
            table.write(0, snapshot.step + 1 - count, point.of_member(member), 1.0)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters as data: a schedule becomes its repr, an array a list."""
    return {name: {"schedule": repr(value)} if callable(value) else data(value) for name, value in values.items()}


def data(value: Any) -> Any:
    """Return a value with lists in place of arrays, and of tuples that hold some."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [data(item) for item in value] if differs(value) else value


def _values_from(
    here: OptimizerState, stored: Mapping[str, Any], present: Mapping[str, Any], where: str, step: int
) -> dict[str, Any]:
    values = {}
    for name, value in stored.items():
        wrong = _other_schedule(name, value, present.get(name))
        if wrong:
            raise ValueError(f"state: {where}{wrong}")
        values[name] = present[name] if isinstance(value, Mapping) else value
    return check_change(here.rule, values, f"state: {where}", here.flat.compute, step, here.flat.members)


def _other_schedule(name: str, stored: Any, present: Any) -> str:
    """Return an error where a stored value, or the repr of a schedule, does not fit the value here; else ""."""
    keep = f"or keep this one with keep={{{name!r}}}"
    if isinstance(stored, Mapping):
        text = stored.get("schedule")
        if not callable(present):
            return (
                f"{name}: must be a schedule in this optimizer, as in the saved one ({text}), got {present!r}; "
                f"construct it with the schedule, {keep}"
            )
        # A function has an address in its repr, which differs in every process.
        if not isinstance(text, str) or ADDRESS.sub("", text) != ADDRESS.sub("", repr(present)):
            return (
                f"{name}: must be the schedule {text} in this optimizer, as in the saved one, got {present!r}; "
                f"construct it with the saved schedule, {keep}"
            )
    elif callable(present):
        return (
            f"{name}: must be {stored!r} in this optimizer, as in the saved one, got a schedule; construct it with "
            f"{name}={stored!r}, {keep}"
        )
    return ""


ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


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


def _counts(value: Any, name: str, members: int | None) -> Any:
    """A count; or an array of them, for the members of a population, from a list."""
    if members is None or not isinstance(value, list):
        return _count(value, name)
    if len(value) != members:
        raise ValueError(f"state: {name}: must be an int for each of {members} members, got {len(value)}")
    return np.array([_count(each, f"{name}[{member}]") for member, each in enumerate(value)], np.int64)


def _each(count: Any, members: int | None) -> Any:
    return count if members is None else np.broadcast_to(np.asarray(count, np.int64), (members,)).copy()
