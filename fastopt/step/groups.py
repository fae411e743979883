"""Param groups: which parameters share hyperparameters, and how hyperparameters are changed between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.hyper import POSITIVE_OR_ZERO, WEIGHT_DECAY, Flag, differs, same
from fastopt.signals import deferred_signals
from fastopt.step.globs import Paths
from fastopt.step.matrices import fits, selects
from fastopt.step.table import Point

if TYPE_CHECKING:
    from fastopt.rule import Rule

LR_SCALE, FROZEN = "lr_scale", "frozen"
"""What an override may set besides the rule's hyperparameters: a factor of its learning rates, and no updates."""

RATES = ("lr", "adamw_lr")
"""The hyperparameters that `lr_scale` multiplies."""


MOST_UNIONS = 256
"""Sets of parameters whose groups are remembered."""


class ParamGroup:
    """Parameters that share hyperparameters and the number of updates they have had: one row of the table."""

    __slots__ = (
        *("changes", "dtype", "fixed", "frozen", "members", "missed", "networks", "rule", "scale", "scheduled"),
        "values",
    )

    def __init__(
        self,
        rule: Rule,
        dtype: Any,
        base: Mapping[str, Any],
        changes: Mapping[str, Any],
        missed: Any,
        networks: int | None = None,
    ):
        """networks : of a population, how many members it has."""
        self.rule = rule
        self.dtype = dtype
        self.networks = networks
        self.changes = dict(changes)
        """The hyperparameters that are not those of the optimizer, `lr_scale` and `frozen` among them."""
        self.missed = missed
        """How many steps were made without its parameters; in a population, an array with a number for each member."""
        self.members: list[int] = []
        self.inherit(base)

    def inherit(self, base: Mapping[str, Any]) -> None:
        """Take the hyperparameters of the optimizer, but for those that are set here."""
        values = {**base, **self.changes}
        self.scale: float = values.pop(LR_SCALE, 1.0)
        self.frozen: bool = values.pop(FROZEN, False)
        self.values = values
        self.scheduled = tuple([name for name, value in values.items() if callable(value)])
        self.fixed: Point | None = None

    def put(self, name: str, value: Any) -> None:
        """Take a new value of one hyperparameter."""
        self.fixed = None
        if name == LR_SCALE:
            self.scale = value
        elif name == FROZEN:
            self.frozen = value
        else:
            self.values[name] = value
            if callable(value) or name in self.scheduled:
                self.scheduled = tuple([each for each, held in self.values.items() if callable(held)])

    def at_step(self, step: int) -> dict[str, Any]:
        """The hyperparameters by name at `step` (0 at the first update), schedules evaluated and checked."""
        values = dict(self.values)
        for name in self.scheduled:
            where = f"at step {step}, schedule of "
            values[name] = self.rule.check(name, values[name](step), where, self.dtype, self.networks)
        if self.scale != 1.0:
            for name in RATES:
                if name in values:
                    values[name] = values[name] * self.scale
        return values

    def point(self, step: int) -> Point:
        """The same, arranged for the table."""
        if self.fixed is not None:
            return self.fixed
        point = Point.of(self.rule, self.at_step(step))
        if not self.scheduled:
            self.fixed = point
        return point

    @property
    def decays(self) -> bool:
        """Whether weights may decay."""
        return may_decay(self.values[WEIGHT_DECAY])


def may_decay(decay: Any) -> bool:
    """Whether weights may decay by a checked weight_decay."""
    return bool(callable(decay) or np.any(decay != 0.0))


class Groups:
    """The param groups of an optimizer."""

    def __init__(
        self,
        rule: Rule,
        dtype: Any,
        base: Mapping[str, Any],
        changes: Sequence[Mapping[str, Any]],
        missed: Sequence[Any],
        networks: int | None = None,
    ):
        """dtype : of the parameters. base : the optimizer's hyperparameters. changes : each parameter's that differ.

        missed : how many steps were made without each parameter. networks : of a population, how many members it has;
        `missed` then holds arrays of a number for each, or a number for all.
        """
        self.rule = rule
        self.dtype = dtype
        self.networks = networks
        self.base = dict(base)
        self.list: list[ParamGroup] = []
        self.of: list[int] = []
        """The number of each parameter's group."""
        self.version = 0
        """Counts the changes after which tables have to be laid out again."""
        self.changes_made = 0
        """Counts all changes, of values and of the updates that groups have missed."""
        self.decays = self.frozen = False
        """Whether weights of some group may decay; whether some group is frozen."""
        self._unions: dict[int, tuple[tuple[int, ...], list[ParamGroup]]] = {}
        self.regroup(changes, missed)

    def regroup(self, changes: Sequence[Mapping[str, Any]], missed: Sequence[Any]) -> None:
        """Give each parameter its group: one per distinct set of hyperparameters and number of missed updates."""
        self.list, self.of = [], []
        known: dict[tuple[Any, ...], int] = {}
        for k, (change, count) in enumerate(zip(changes, missed, strict=True)):
            held = count
            if self.networks is not None:
                count = np.broadcast_to(np.asarray(count, np.int64), (self.networks,))
                held = count.tobytes()
            key = (held, *((name, id(v) if callable(v) or differs(v) else v) for name, v in sorted(change.items())))
            number = known.get(key)
            if number is None:
                number = known[key] = len(self.list)
                self.list.append(self._group(change, count))
            self.of.append(number)
            self.list[number].members.append(k)
        self._structure_changed()

    def _group(self, changes: Mapping[str, Any], missed: Any) -> ParamGroup:
        return ParamGroup(self.rule, self.dtype, self.base, changes, missed, self.networks)

    def _structure_changed(self) -> None:
        self.version += 1
        self._unions.clear()
        self._values_changed()

    def _values_changed(self) -> None:
        self.changes_made += 1
        decays, frozen = any(group.decays for group in self.list), any(group.frozen for group in self.list)
        self.version += decays != self.decays
        self.decays, self.frozen = decays, frozen

    # --- what is set --------------------------------------------------------------------------------------------------

    def assign(self, name: str, value: Any) -> None:
        """Set a hyperparameter of the optimizer: of every group that has none of its own."""
        before = self.base[name]
        try:
            self._assign(name, value)
        except BaseException:  # of a signal's handler: deferring signals would double the time of `opt.lr = lr`
            with deferred_signals:
                self._assign(name, before)
            raise

    def _assign(self, name: str, value: Any) -> None:
        self.base[name] = value
        self.changes_made += 1
        for group in self.list:
            if name not in group.changes:
                group.put(name, value)
        if name == WEIGHT_DECAY:
            self._decay_changed(value)

    def override(self, members: tuple[int, ...], name: str, value: Any) -> None:
        """Set a hyperparameter of these parameters."""
        with deferred_signals:
            self.changes_made += 1
            for group in self._union(members):
                group.changes[name] = value
                group.put(name, value)
            if name == WEIGHT_DECAY:
                self._decay_changed(value)
            elif name == FROZEN:
                self._values_changed()

    def _decay_changed(self, value: Any) -> None:
        if may_decay(value) != self.decays:
            self._values_changed()

    def release(self, members: tuple[int, ...], name: str) -> None:
        """Let these parameters have the optimizer's hyperparameter of this name again."""
        with deferred_signals:
            for group in self._union(members):
                group.changes.pop(name, None)
                group.inherit(self.base)
            self._values_changed()

    def _union(self, members: tuple[int, ...]) -> list[ParamGroup]:
        """The groups that hold these parameters and no others, after splitting those that hold others as well."""
        found = self._unions.get(id(members))
        if found is None:
            self.split(members)
            if len(self._unions) == MOST_UNIONS:
                self._unions.clear()
            numbers = sorted({self.of[k] for k in members})
            found = self._unions[id(members)] = (members, [self.list[number] for number in numbers])
        return found[1]

    def split(self, members: Sequence[int]) -> None:
        """Split every group that holds some of these parameters and others as well."""
        chosen = set(members)
        split = False
        with deferred_signals:
            for number in sorted({self.of[k] for k in members}):
                group = self.list[number]
                others = [k for k in group.members if k not in chosen]
                if not others:
                    continue
                twin = self._group(group.changes, group.missed)
                twin.members = others
                group.members = [k for k in group.members if k in chosen]
                for k in others:
                    self.of[k] = len(self.list)
                self.list.append(twin)
                split = True
            if split:
                self._structure_changed()

    def miss(self, present: Sequence[bool] | None, skipped: np.ndarray | None = None) -> None:
        """Count a missed update of every parameter without a gradient; no group holds one with and one without.

        skipped : of a population, which members have missed the step.
        """
        self.changes_made += 1
        for group in self.list:
            if present is not None and not present[group.members[0]]:
                group.missed = group.missed + 1
            elif skipped is not None:
                group.missed = group.missed + skipped

    def copy_missed(self, source: Any, target: Any) -> None:
        """Let members of a population have missed as many steps as others."""
        self.changes_made += 1
        for group in self.list:
            missed = np.array(group.missed)
            missed[target] = missed[source]
            group.missed = missed

    # --- what is read -------------------------------------------------------------------------------------------------

    def given(self, name: str) -> list[Any]:
        """For each parameter a hyperparameter, schedules as they are."""
        return [self.list[number].values[name] for number in self.of]

    def values_of(self, k: int) -> dict[str, Any]:
        """The hyperparameters of parameter number `k`, schedules as they are."""
        return self.list[self.of[k]].values

    @property
    def changes(self) -> list[dict[str, Any]]:
        """For each parameter the hyperparameters that are not those of the optimizer."""
        return [self.list[number].changes for number in self.of]

    @property
    def missed(self) -> list[Any]:
        """For each parameter how many steps were made without it; in a population, an array of them."""
        return [self.list[number].missed for number in self.of]

    def match(self, paths: Sequence[str], glob: Any) -> tuple[int, ...]:
        """The parameters whose path matches; KeyError where none does."""
        if not isinstance(glob, str):
            raise TypeError(f"groups: must be given a glob on parameter paths, got {glob!r}")
        found = tuple(Paths(paths).matching(glob))
        if not found:
            raise KeyError(f"groups[{glob!r}]: must match a parameter; the paths are {', '.join(paths)}")
        return found


# --- overrides --------------------------------------------------------------------------------------------------------


def match_overrides(paths: Sequence[str], overrides: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each path the hyperparameters that `overrides` sets; of two globs that match, the later one wins.

    Raises ValueError for a glob that matches no path, TypeError where `overrides` is not a mapping of mappings.
    """
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides: must be a dict of glob -> hyperparameters, got {type(overrides).__name__}")
    found: list[dict[str, Any]] = [{} for _ in paths]
    among = Paths(paths)
    for glob, values in overrides.items():
        if not isinstance(glob, str) or not isinstance(values, Mapping):
            raise TypeError(f"overrides[{glob!r}]: must be a dict of hyperparameters under a glob on parameter paths")
        matches = among.matching(glob)
        if not matches:
            raise ValueError(f"overrides[{glob!r}]: must match a parameter; the paths are {', '.join(paths)}")
        for k in matches:
            found[k].update(values)
    return found


def check_change(
    rule: Rule, change: Mapping[str, Any], where: str, dtype: Any, step: int = 0, networks: int | None = None
) -> dict[str, Any]:
    """An override, checked: the rule's hyperparameters, `lr_scale` and `frozen`. networks : as for `Groups`.

    Raises TypeError or ValueError that begins with `where` and names the hyperparameter.
    """
    own = {name: value for name, value in change.items() if name not in (LR_SCALE, FROZEN)}
    checked = rule.check_all(own, where, step, dtype, networks)
    if LR_SCALE in change:
        if "lr" not in rule.names():
            raise TypeError(f"{where}{LR_SCALE}: rule {rule.name!r} has no lr to scale")
        checked[LR_SCALE] = POSITIVE_OR_ZERO.check(f"{where}{LR_SCALE}", change[LR_SCALE])
    if FROZEN in change:
        checked[FROZEN] = Flag().check(f"{where}{FROZEN}", change[FROZEN])
    return checked


def mark_matrices(rule: Rule, changes: Sequence[dict[str, Any]], shapes: Sequence[tuple[int, ...]]) -> None:
    """Have a rule that looks at whole matrices skip the parameters that are not matrices, unless a change says so."""
    for change, shape in zip(changes, shapes, strict=True):
        if rule.matrixwise is not None and not selects(rule.matrixwise, shape):
            change.setdefault(rule.matrixwise.chosen, False)
        for name in rule.for_matrices if len(shape) < 2 else ():
            change.setdefault(name, False)


def check_matrices(rule: Rule, chosen: Sequence[Any], paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse a parameter that is to be treated as a matrix and is not one. chosen : whether each of them is to be."""
    if rule.matrixwise is not None:
        for is_chosen, path, shape in zip(chosen, paths, shapes, strict=True):
            if is_chosen and not fits(rule.matrixwise, shape):
                least = "2-D" if rule.matrixwise.reshape is None else "at least 2-D"
                raise ValueError(
                    f"parameter {path!r}: must be {least}, got shape {shape}; set {rule.matrixwise.chosen}=False there"
                )


# --- the public face --------------------------------------------------------------------------------------------------


class GroupView:
    """Some parameters of an optimizer, whose hyperparameters can be read and set. Made by ``opt.groups[glob]``.

    Attributes:
        paths: of the parameters.
        lr, weight_decay, ...: every hyperparameter of the rule: a number or a schedule. Assign to set it, ``del`` to
            have the optimizer's again.
        lr_scale: what the learning rate, or its schedule, is multiplied by, >= 0.
        frozen: True keeps the parameters and their states as they are, whatever gradients are given.

    Raises:
        AttributeError: for a name that is not a hyperparameter of the rule, or one that differs among the parameters
            when it is read.

    >>> import numpy as np, fastopt
    >>> opt = fastopt.AdamW({"W": np.ones((2, 2)), "b": np.zeros(2)}, lr=0.1, weight_decay=0.01)
    >>> opt.groups["b"].weight_decay = 0.0
    >>> opt.groups["*"].lr_scale = 0.5
    >>> opt.groups["b"].weight_decay, opt.groups["W"].weight_decay, opt.groups["b"].paths
    (0.0, 0.01, ('b',))
    """

    __slots__ = ("_found", "_owner", "_paths")

    def __init__(self, owner: Any, members: tuple[int, ...]):
        _set_owner(self, owner)
        _set_paths(self, tuple([owner.flat.paths[k] for k in members]))
        _set_found(self, (owner.groups, members))

    @property
    def _members(self) -> tuple[int, ...]:
        """The numbers of the parameters, which change where others are added."""
        groups, members = self._found
        if groups is not self._owner.groups:
            paths = self._owner.flat.paths
            members = tuple([paths.index(path) for path in self._paths])
            _set_found(self, (self._owner.groups, members))
        return members

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the parameters."""
        return self._paths

    def __getattr__(self, name: str) -> Any:
        groups: Groups = self._owner.groups
        default = {LR_SCALE: 1.0, FROZEN: False}.get(name)
        if name not in self._owner.rule.names() and default is None:
            raise AttributeError(f"{name}: must be one of {', '.join(self._names())}")
        found: list[Any] = []
        for number in dict.fromkeys(groups.of[k] for k in self._members):
            group = groups.list[number]
            value = group.values[name] if default is None else group.changes.get(name, default)
            if not any(same(value, other) for other in found):
                found.append(value)
        if len(found) > 1:
            raise AttributeError(f"{name}: must be the same for all these parameters to be read, got {found}")
        return found[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._owner.names:
            raise AttributeError(f"{name}: must be one of {', '.join(self._names())}")
        self._owner.set_hyper(name, value, self._members)

    def __delattr__(self, name: str) -> None:
        if name not in self._owner.names:
            raise AttributeError(f"{name}: must be one of {', '.join(self._names())}")
        self._owner.release_hyper(name, self._members)

    def __dir__(self) -> list[str]:
        return ["paths", *self._names()]

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupView, (self._owner, self._members)

    def _names(self) -> tuple[str, ...]:
        return (*self._owner.rule.names(), LR_SCALE, FROZEN)

    def __repr__(self) -> str:
        shown = ", ".join(self.paths[:5]) + (", ..." if len(self._members) > 5 else "")
        return f"<{len(self._members)} parameters: {shown}>"


_set_owner = GroupView._owner.__set__  # type: ignore[attr-defined]
_set_paths = GroupView._paths.__set__  # type: ignore[attr-defined]
_set_found = GroupView._found.__set__  # type: ignore[attr-defined]


class GroupsView(Sequence[GroupView]):
    """The param groups of an optimizer: ``opt.groups[glob]``, or one after the other. See `Optimizer.groups`."""

    __slots__ = ("_by_glob", "_owner")

    def __init__(self, owner: Any):
        self._owner = owner
        self._by_glob: dict[str, tuple[Groups, GroupView]] = {}

    def __getitem__(self, key: Any) -> Any:
        owner = self._owner
        if isinstance(key, str):
            groups: Groups = owner.groups
            known = self._by_glob.get(key)
            if known is None or known[0] is not groups:
                if len(self._by_glob) >= MOST_UNIONS:
                    self._by_glob.clear()
                known = self._by_glob[key] = (groups, GroupView(owner, groups.match(owner.flat.paths, key)))
            return known[1]
        if isinstance(key, slice):
            return [GroupView(owner, tuple(group.members)) for group in owner.groups.list[key]]
        try:
            return GroupView(owner, tuple(owner.groups.list[key].members))
        except TypeError:
            raise TypeError(f"groups: must be given a glob on parameter paths, or a number, got {key!r}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupsView, (self._owner,)

    def __len__(self) -> int:
        return len(self._owner.groups.list)

    def __iter__(self) -> Iterator[GroupView]:
        return iter([self[number] for number in range(len(self))])

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self))}]"
