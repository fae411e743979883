"""`Optimizer`: where a rule, a flat buffer and a backend meet. Groups, step() and state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastopt.backends import Kernel, get_backend
from fastopt.flat import FlatParams, match_overrides, pack
from fastopt.rule import Rule
from fastopt.table import WEIGHT_DECAY, Point, Table, hyper_of

STATE_FORMAT = 1


class StepInfo(NamedTuple):
    """What a step did."""

    step: int
    """The number of updates made so far, this one included."""
    grad_norm: float | None = None
    """The global norm of the gradients, where one was asked for."""
    skipped: bool = False
    """Whether the step changed nothing."""


class Row:
    """One row of the table: the parameters that share hyperparameters and the number of updates they have had."""

    __slots__ = ("fixed", "lag", "rule", "scheduled", "values")

    def __init__(self, rule: Rule, values: dict[str, Any], lag: int):
        self.rule = rule
        self.values = values
        self.lag = lag
        self.scheduled = tuple(name for name, value in values.items() if callable(value))
        self.fixed = None if self.scheduled else Point.of(rule, values)

    def at(self, step: int) -> Point:
        """The hyperparameters at `step` (0 at the first update), schedules evaluated and checked."""
        if self.fixed is not None:
            return self.fixed
        values = dict(self.values)
        for name in self.scheduled:
            values[name] = self.rule.check(name, values[name](step), f"at step {step}, schedule of ")
        return Point.of(self.rule, values)


class Optimizer:
    """Updates a tree of parameters in place by a rule: one launch, whatever the number of tensors and groups.

    Args:
        params: a tree of NumPy arrays (float32 or float64), which is copied into one flat buffer, or a `FlatParams`,
            which is used as it is. Work with ``opt.params`` from then on: the same tree, whose leaves are views of the
            buffer.
        rule: a `Rule`, made by `fastopt.rule`. The named optimizers (`fastopt.Adam`, ...) bring their own.
        backend: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        overrides: ``{glob on parameter paths: {hyperparameter: value}}``; of two globs that match, the later one wins.
        **hyper: the rule's hyperparameters, and ``weight_decay``. Each is a number or a callable of the step number
            (0 at the first update) that returns one.

    Raises:
        TypeError, ValueError: naming the parameter or hyperparameter: a tree that `pack` refuses, a hyperparameter that
        is unknown, not finite or out of range, a glob that matches nothing.

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adam({"w": np.ones(2), "b": np.zeros(1)}, lr=0.1, overrides={"b": {"lr": 0.01}})
    >>> opt.step({"w": np.array([1.0, -1.0]), "b": np.array([2.0])})
    StepInfo(step=1, grad_norm=None, skipped=False)
    >>> opt.params["w"].round(4), opt.params["b"].round(4)
    (array([0.9, 1.1]), array([-0.01]))
    """

    classes: ClassVar[dict[str, type[Optimizer]]] = {}
    """The named optimizers, by name."""

    def __init_subclass__(cls, rules: tuple[Rule, ...] = (), **kwargs: Any):
        """A subclass names the rules it chooses from; their defaults are those of its signature, written only there."""
        super().__init_subclass__(**kwargs)
        if rules:
            Optimizer.classes[cls.__name__] = cls
            for name, parameter in inspect.signature(cls.__init__).parameters.items():
                for rule in rules:
                    if name in rule.names() and parameter.default is not parameter.empty:
                        rule.defaults.setdefault(name, parameter.default)
            cls.rules = rules

    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(
        self,
        params: Any,
        rule: Rule,
        *,
        backend: str = "auto",
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        **hyper: Any,
    ):
        if not isinstance(rule, Rule):
            raise TypeError(f"rule: expected a Rule, made by @fastopt.rule(prepare), found {type(rule).__name__}")
        self.rule = rule
        self._values = _checked(rule, rule.complete(hyper))
        if isinstance(params, FlatParams):
            if backend not in ("auto", params.backend):
                raise ValueError(f"backend={backend!r}: the parameters were packed for {params.backend!r}")
            self.flat = params
        else:
            self.flat = pack(params, backend=backend)
        changes = match_overrides(self.flat.paths, overrides or {})
        self._changes = [
            _checked(rule, change, f"overrides: {path}: ")
            for path, change in zip(self.flat.paths, changes, strict=True)
        ]
        self._states = tuple(self.flat.new_buffer() for _ in rule.states)
        self._step_count = 0
        self._missed = [0] * len(self.flat.paths)
        self._held = False
        self._build_rows()

    # --- what a user reads --------------------------------------------------------------------------------------------

    @property
    def params(self) -> Any:
        """The parameters: the tree given at construction, its leaves views of the flat buffer."""
        return self.flat.params

    @property
    def grads(self) -> Any:
        """The gradients: a tree of views. Write into them and call ``step()``, or pass a tree to ``step(grads)``."""
        return self.flat.grads

    @property
    def step_count(self) -> int:
        """How many updates were made."""
        return self._step_count

    @property
    def states(self) -> dict[str, Any]:
        """The rule's state buffers by name, each as a tree of views."""
        return {
            name: self.flat.tree(self.flat.views(buffer))
            for name, buffer in zip(self.rule.states, self._states, strict=True)
        }

    @property
    def lr(self) -> float:
        """The learning rate of the next step (of parameters without an override); assign a number or a schedule."""
        if "lr" not in self._values:
            raise AttributeError(f"rule {self.rule.name!r} has no lr; it has {', '.join(self.rule.names())}")
        value = self._values["lr"]
        return float(value(self._step_count)) if callable(value) else float(value)

    @lr.setter
    def lr(self, value: Any) -> None:
        if "lr" not in self._values:
            raise AttributeError(f"rule {self.rule.name!r} has no lr; it has {', '.join(self.rule.names())}")
        self._values = {**self._values, **_checked(self.rule, {"lr": value}, step=self._step_count)}
        self._build_rows()

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        """An independent optimizer at the same point, on buffers of its own; rule and schedules are shared."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.flat = copy.deepcopy(self.flat, memo)
        twin._states = tuple(twin.flat.new_buffer() for _ in self._states)
        for mine, theirs in zip(self._states, twin._states, strict=True):
            np.copyto(theirs, mine)
        twin._missed = list(self._missed)
        twin._build_rows()
        return twin

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"<{type(self).__name__}({values}) of {self.flat!r}, step {self._step_count}>"

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, grads: Any = None, grad_scale: float = 1.0) -> StepInfo:
        """Update every parameter and state in place, in one launch.

        Args:
            grads: a tree of arrays in the structure, shapes and dtype of the parameters, copied into ``opt.grads``.
                None (the default) uses what is in ``opt.grads``. A None in the tree leaves that parameter, its state
                and its count of updates untouched (as torch does).
            grad_scale: what the loss was multiplied by, a positive finite number; gradients are multiplied by its
                inverse.

        Returns:
            `StepInfo`.

        Raises:
            TypeError, ValueError: naming the parameter's path or the hyperparameter, before anything is changed.
        """
        if self._held:
            raise RuntimeError(
                "step() inside `with opt.lookahead()`: leave the block first, it restores the parameters"
            )
        unscale = 1.0 if type(grad_scale) is float and grad_scale == 1.0 else self._table.unscale(grad_scale)
        chunks, present = self._chunks, None
        if grads is not None:
            leaves = self.flat.check_grads(grads)
            if any(leaf is None for leaf in leaves):
                present = [leaf is not None for leaf in leaves]
                chunks = self._chunks_without(present)
        self._write_table(unscale)
        if grads is not None:
            self.flat.copy_grads(leaves)
        kernel = self._kernel if unscale == 1.0 else self._kernel_for(unscale=True)
        kernel.launch(self.flat.data, self.flat.grad, self._states, self._table.array, chunks)
        self._step_count += 1
        if present is not None:
            self._miss(present)
        return StepInfo(self._step_count)

    def zero_grad(self) -> None:
        """Set ``opt.grads`` to zero."""
        self.flat.grad.fill(0)

    # --- groups -------------------------------------------------------------------------------------------------------

    def _build_rows(self) -> None:
        """Give every parameter its row: one per distinct set of hyperparameters and count of missed updates."""
        self._rows: list[Row] = []
        self._row_of: list[int] = []
        known: dict[tuple[Any, ...], int] = {}
        for change, missed in zip(self._changes, self._missed, strict=True):
            values = {**self._values, **change}
            key = (missed, *(id(value) if callable(value) else value for value in values.values()))
            if key not in known:
                known[key] = len(self._rows)
                self._rows.append(Row(self.rule, values, missed))
            self._row_of.append(known[key])
        self._hyper = hyper_of(self.rule, self._rows[0].at(self._step_count))
        self._decays = any(row.values[WEIGHT_DECAY] != 0.0 for row in self._rows)
        self._lay_out_rows()
        self._kernel = self._kernel_for(unscale=False)

    def _lay_out_rows(self) -> None:
        self._table = Table(self.rule, self._hyper, self.flat.dtype, len(self._rows))
        self._chunks = self._chunks_of(self._row_of)
        self._chunks_present: dict[tuple[bool, ...], np.ndarray] = {}

    def _write_table(self, unscale: float) -> None:
        t = self._step_count + 1
        write = self._table.write
        for index, row in enumerate(self._rows):
            write(index, t - row.lag, row.fixed or row.at(t - 1), unscale)

    def _kernel_for(self, unscale: bool) -> Kernel:
        features = self.rule.features(decays=self._decays, unscale=unscale)
        return get_backend(self.flat.backend).kernel(self.rule, self._hyper, self.flat.dtype, features)

    def _chunks_of(self, rows: list[int]) -> np.ndarray:
        return self.flat.layout.chunks(rows, layerwise=self.rule.layerwise is not None)

    def _chunks_without(self, present: list[bool]) -> np.ndarray:
        """The chunks of the parameters that have a gradient, after splitting every row that only some of them share."""
        mask = tuple(present)
        chunks = self._chunks_present.get(mask)
        if chunks is None:
            twins: dict[int, int] = {}
            mixed = {self._row_of[k] for k, here in enumerate(mask) if here}
            mixed &= {self._row_of[k] for k, here in enumerate(mask) if not here}
            for k, here in enumerate(mask):
                row = self._row_of[k]
                if row in mixed and not here:
                    if row not in twins:
                        twins[row] = len(self._rows)
                        self._rows.append(Row(self.rule, self._rows[row].values, self._rows[row].lag))
                    self._row_of[k] = twins[row]
            if twins:
                self._lay_out_rows()
            chunks = self._chunks_of([row if here else -1 for row, here in zip(self._row_of, mask, strict=True)])
            self._chunks_present[mask] = chunks
        return chunks

    def _miss(self, present: list[bool]) -> None:
        """Count a missed update for every parameter without a gradient: its own step number stays behind."""
        for k, here in enumerate(present):
            if not here:
                self._missed[k] += 1
        for row in {self._row_of[k] for k, here in enumerate(present) if not here}:
            self._rows[row].lag += 1

    @contextmanager
    def _moved(self, shift: Rule) -> Iterator[Any]:
        """Hold the parameters where `shift`, a rule of the same states and hyperparameters, moves them."""
        if self._held:
            raise RuntimeError("lookahead() inside lookahead(): the parameters are at the look-ahead point already")
        backup = self.flat.data.copy()
        self._write_table(1.0)
        features = shift.features(decays=False, unscale=False)
        kernel = get_backend(self.flat.backend).kernel(shift, self._hyper, self.flat.dtype, features)
        self._held = True
        try:
            kernel.launch(self.flat.data, self.flat.grad, self._states, self._table.array, self._chunks)
            yield self.params
        finally:
            np.copyto(self.flat.data, backup)
            self._held = False

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters that a resumed run needs, as plain data and copies of the state arrays.

        Keys: ``format``, ``rule``, ``step``, ``missed`` (updates without a gradient, by path), ``hyper`` and
        ``overrides`` (by path; a schedule is kept as its repr: it is a function of the step, and is given again at
        construction), ``state`` (by state name, then path).

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Adam({"w": np.ones(2)})
        >>> sorted(opt.state_dict()["state"])
        ['m', 'v']
        """
        return {
            "format": STATE_FORMAT,
            "rule": self.rule.name,
            "step": self._step_count,
            "missed": {path: count for path, count in zip(self.flat.paths, self._missed, strict=True) if count},
            "hyper": _plain(self._values),
            "overrides": {
                path: _plain(change) for path, change in zip(self.flat.paths, self._changes, strict=True) if change
            },
            "state": {
                name: {path: view.copy() for path, view in zip(self.flat.paths, self.flat.views(buffer), strict=True)}
                for name, buffer in zip(self.rule.states, self._states, strict=True)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the optimizer that gave `state` stopped: states, step count, hyperparameters.

        Raises:
            TypeError, ValueError: that says what differs (another rule, other paths, shapes or dtype, a newer format, a
            schedule that is not given here); the optimizer is then unchanged.
        """
        if self._held:
            raise RuntimeError("load_state_dict() inside `with opt.lookahead()`: leave the block first")
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
        if state["rule"] != self.rule.name:
            raise ValueError(f"state: of rule {state['rule']!r}, but this optimizer runs rule {self.rule.name!r}")
        step = _count(state["step"], "step")
        missed = {path: _count(count, f"missed[{path!r}]") for path, count in state["missed"].items()}
        overrides = state["overrides"]
        for what, named in (("missed", missed), ("overrides", overrides)):
            unknown = [path for path in named if path not in self.flat.paths]
            if unknown:
                raise ValueError(f"state: {what} names {unknown[0]!r}; the paths are {', '.join(self.flat.paths)}")
        late = [path for path, count in missed.items() if count > step]
        if late:
            raise ValueError(f"state: missed[{late[0]!r}] is {missed[late[0]]}, more than the {step} steps made")
        values = self._values_from(state["hyper"], self._values, "hyper: ", step)
        if set(values) != set(self._values):
            raise ValueError(f"state: hyper lacks {', '.join(sorted(set(self._values) - set(values)))}")
        changes = [
            self._values_from(overrides.get(path, {}), {**self._values, **change}, f"overrides of {path!r}: ", step)
            for path, change in zip(self.flat.paths, self._changes, strict=True)
        ]
        copies = [self._state_from(state["state"], name) for name in self.rule.states]

        for buffer, arrays in zip(self._states, copies, strict=True):
            for view, array in zip(self.flat.views(buffer), arrays, strict=True):
                np.copyto(view, array)
        self._step_count = step
        self._missed = [missed.get(path, 0) for path in self.flat.paths]
        self._values = values
        self._changes = changes
        self._build_rows()

    def _values_from(
        self, stored: Mapping[str, Any], present: Mapping[str, Any], where: str, step: int
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
        return _checked(self.rule, values, f"state: {where}", step)

    def _state_from(self, stored: Mapping[str, Any], name: str) -> list[np.ndarray]:
        if not isinstance(stored.get(name), Mapping) or set(stored[name]) != set(self.flat.paths):
            raise ValueError(f"state: {name!r} must hold an array for each of {', '.join(self.flat.paths)}")
        arrays = []
        for path, shape in zip(self.flat.paths, self.flat.shapes, strict=True):
            array = stored[name][path]
            if not isinstance(array, np.ndarray) or array.dtype != self.flat.dtype or array.shape != shape:
                found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                raise ValueError(f"state: {name}[{path!r}]: expected {self.flat.dtype} {shape}, found {found}")
            arrays.append(array)
        return arrays


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"schedule": repr(value)} if callable(value) else value for name, value in values.items()}


def _count(value: Any, name: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"state: {name} is {value!r}; expected an int from 0")
    return int(value)


def _checked(rule: Rule, values: Mapping[str, Any], where: str = "", step: int = 0) -> dict[str, Any]:
    """Hyperparameters in the form `prepare` expects; a schedule is tried at `step`, the next one."""
    for name in values:
        if name not in rule.names():
            raise TypeError(
                f"{where}{name}: {rule.name!r} has no such hyperparameter; it has {', '.join(rule.names())}"
            )
    checked = {}
    for name, value in values.items():
        if callable(value):
            rule.check(name, value(step), f"{where}at step {step}, schedule of ")
            checked[name] = value
        else:
            checked[name] = rule.check(name, value, where)
    return checked
