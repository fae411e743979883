"""`Optimizer`: what people call. It checks its arguments, and leaves the step to the pipeline."""

from __future__ import annotations

import copy
import inspect
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from threading import get_ident
from types import MappingProxyType
from typing import Any, ClassVar, Literal, overload

import numpy as np

from fastopt import scalars, suggest
from fastopt.communicators import communicator_of
from fastopt.hyper import EMA, POSITIVE_OR_ZERO, Flag, Interval, differs
from fastopt.rule import Rule, check_acting
from fastopt.signals import deferred_signals
from fastopt.state import LoadReport, OptimizerState, Snapshot, check_keep, fit
from fastopt.step.groups import GroupsView, check_change, mark_matrices, match_overrides
from fastopt.step.info import StepInfo
from fastopt.step.matrices import chosen_by
from fastopt.step.options import MIN_8BIT_SIZE, StepOptions
from fastopt.step.pipeline import Pipeline
from fastopt.step.population import HyperView
from fastopt.step.ranks import ORDER, Ranks
from fastopt.step.rows import check_indices
from fastopt.step.storage import Memory
from fastopt.step.together import RankPipeline
from fastopt.step.wire import checked_wire
from fastopt.storage.codes import decoded
from fastopt.storage.flat import FlatParams, check_members, packed
from fastopt.storage.trees import adopt, handed_out
from fastopt.warned import warn_caller

SHARED = frozenset({"rule", "_base", "_overrides", "_ranks"})
"""Attributes that hold rules or schedules, which a deep copy shares."""


class Optimizer:
    """Updates a tree of parameters in place by a rule: one launch, whatever the number of tensors and groups.

    Args:
        params: a tree of NumPy arrays (float32, float64, float16, or bfloat16 of ml_dtypes), which is copied into one
            flat buffer, or a `FlatParams`, which is used as it is. Work with ``opt.params`` from then on: the same
            tree, whose leaves are views of the buffer. None leaves the parameters to the first call of `update`.
        rule: a `Rule`, made by `fastopt.rule`. The named optimizers (`fastopt.Adam`, ...) bring their own.
        backend: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        copy: False leaves the parameters in their own arrays, which are updated in place: C-contiguous, aligned and
            writeable ones that do not overlap.
        overrides: ``{glob on parameter paths: {hyperparameter: value}}``; of two globs that match, the later one wins.
            A path is that parameter alone, also where it has brackets.
            Besides the rule's hyperparameters, ``lr_scale`` multiplies the learning rate, or its schedule, and
            ``frozen=True`` keeps parameters as they are.
        max_norm: > 0. Gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``, `norm` being the global one of
            all that this step is given.
        clip_norm_per_tensor: > 0. Each parameter's gradient is multiplied by ``c / max(norm, c)``, `norm` being that of
            this gradient and c the option: Keras' ``clipnorm``. Not together with `max_norm`. On a GPU, each step waits
            for the norms, and cannot be captured in a CUDA graph.
        clip_value: > 0. Every element of a gradient is moved into [-clip_value, clip_value], before its norm is taken.
        nonfinite: what to do about gradients that are NaN or infinite: ``"propagate"`` them, ``"skip"`` the step, count
            such elements as ``"zero"``, or ``"raise"`` FloatingPointError with the path of the first parameter that has
            one. `StepInfo` counts them. States are not looked at, which would cost a pass over them: a finite
            gradient of 1e21 in float32 overflows Adam's v, and the parameter stands still; `clip_value` or `max_norm`
            prevents that.
        ema: decay rate, in (0, 1), of a moving average of the parameters: ``opt.ema``, which begins at each parameter
            as it is at its first update, and after every step moves towards them, ``e += (1 - ema) (p - e)``.
        zero_grad: set ``opt.grads`` to 0 in the pass that reads them; also after a step that was skipped. Gradients
            that are passed to `step` are not written.
        maximize: go uphill.
        grad_norm: measure the norm of the gradients in every step, for `StepInfo.grad_norm`.
        states: in which format the states are stored, which are computed in float32: ``"bfloat16"``, ``"float16"`` or
            ``"int8"``, or a dict of these by the names of states, as ``{"m": "int8", "v": "bfloat16"}``; None for the
            dtype that is computed in. ``"int8"`` has blocks of 256 codes with a float32 unit; the states of parameters
            below `min_8bit_size` stay float32.
        master: for parameters of 16 bits, whether a state holds them in float32 as well, and p is its rounding; None
            for True, unless one of the next two is asked for.
        rounding: ``"nearest"``, or ``"stochastic"``: numbers of 16 and 8 bits are rounded up or down at random, in
            proportion to how near they are, so that small updates count on average. What is drawn depends on `seed`,
            the step and the element alone, for any number of threads.
        compensated: for parameters of 16 bits, whether a second number of 16 bits holds what their rounding leaves.
        seed: of ``rounding="stochastic"``, an int from 0.
        min_8bit_size: elements of the smallest parameters whose states have codes of 8 bits; or a dict of such numbers
            by globs of paths, as ``{"embedding.*": 10**9}`` for none of these, where others have the default.
        members: of a population, how many independent networks the arrays hold along their first axis. Each is updated
            as by an optimizer of its own, to the bit: norms, clipping, skipped steps and the sums of rules are its
            own, and every number among the hyperparameters may be an array with one for each member, as
            ``lr=rates, betas=(0.9, array)``; a schedule may return such an array. See `hyper`, `copy_member`. Schedules
            follow the steps of the population. `step_rows` is not for populations.
        decoupled_weight_decay: whether ``weight_decay`` shrinks the parameters (``p *= 1 - lr weight_decay``) or is
            added to the gradient (L2); None leaves it to the rule.
        convention: of the named optimizers: ``"torch"``, ``"keras"`` or ``"optax"`` for the form and the defaults that
            the optimizer has there, for what is not given: where eps and lr stand, at what states begin, which weight
            decay. `conventions` of the class lists the ones it has. Clipping is no part of it: Keras' ``clipnorm`` is
            `clip_norm_per_tensor` here, its ``global_clipnorm`` is `max_norm`, and its ``clipvalue`` is `clip_value`.
        comm: of a run on several processes, their communicator: one of mpi4py, a process group of torch.distributed, or
            any `fastopt.distributed.Communicator`. Every process constructs the optimizer with the same parameters and
            options, and calls the same methods; a step is that of the mean of their gradients, as if one process had
            accumulated them. An error on one is an error on all: see `fastopt.distributed`.
        shard: with `comm`, whether each process updates a part of the parameters, and holds the states of that part
            alone (ZeRO-1); False for data parallelism, in which each holds all. Populations, states of 8 bits,
            ``rounding="stochastic"``, ``copy=False`` and devices need False. Parameters that a rule treats as matrices
            (Muon), or sums by rows or columns (Adafactor), are not cut: such rules suit a few processes.
        order: with `comm`, in which order gradients are added up: ``"engine"`` leaves it to the communicator;
            ``"fixed"`` is that of the ranks, so that N processes compute what one computes from N micro-batches, to the
            bit.
        wire: with `comm`, the format in which gradients are sent: None for float32 or float64, ``"bfloat16"``, a half
            of float32's bytes, or ``"int8"``, a quarter: blocks of 256 codes with a unit each. Each process then keeps
            what its codes have not held, in float32, and adds it to the next gradients (error feedback); it is no part
            of a checkpoint. Sums are made in float32 in the order of ranks; parameters are sent as they are. On the CPU
            and for gradients that are added up in float32. With ``"int8"`` a NaN is one of a whole block, for
            `nonfinite`.
        **hyper: the rule's hyperparameters, and ``weight_decay``. Each is a number or a callable of the step number
            (0 at the first update) that returns one.

    All of it is one launch, after one more over the gradients where their norm is asked for (`max_norm`,
    `clip_norm_per_tensor`, `grad_norm`, or `nonfinite` other than ``"propagate"``). The order: unscale, zero what is
    not finite, clip by value, clip by norm, decay, the rule, average, zero.

    Raises:
        TypeError, ValueError: naming the parameter, hyperparameter or option: a tree that `pack` refuses, a
            hyperparameter that is unknown, not finite or out of range, a glob that matches nothing.
        RuntimeError: the backend cannot work here.

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Adam({"w": np.ones(2), "b": np.zeros(1)}, lr=0.1, overrides={"b": {"lr": 0.01}})
    >>> opt.step({"w": np.array([1.0, -1.0]), "b": np.array([2.0])})
    StepInfo(step=1, skipped=False)
    >>> opt.params["w"].round(4), opt.params["b"].round(4)
    (array([0.9, 1.1]), array([-0.01]))
    """

    classes: ClassVar[dict[str, type[Optimizer]]] = {}
    """The named optimizers, by name."""

    conventions: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The frameworks whose conventions a named optimizer can follow, and the arguments that stand for each."""

    def __init_subclass__(
        cls, rules: tuple[Rule, ...] = (), conventions: Mapping[str, Mapping[str, Any]] | None = None, **kwargs: Any
    ):
        """A subclass names the rules it chooses from; their defaults are those of its signature, written only there."""
        super().__init_subclass__(**kwargs)
        if rules:
            cls.conventions = conventions or {}
            signature = inspect.signature(cls.__init__)
            cls._arguments = tuple(
                name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD
            )[1:]
            cls.__init__ = _conventional(cls.__init__, signature)  # type: ignore[method-assign]
            Optimizer.classes[cls.__name__] = cls
            for name, parameter in signature.parameters.items():
                for rule in rules:
                    if name in rule.names() and parameter.default is not parameter.empty:
                        rule.defaults.setdefault(name, parameter.default)
            cls.rules = rules

    rules: ClassVar[tuple[Rule, ...]] = ()
    _arguments: ClassVar[tuple[str, ...]] = ("params", "rule")
    """Arguments of the constructor besides the options of every optimizer."""

    rule: Rule
    _members: int | None
    _pipeline: Pipeline | None
    _ranks: Ranks | None

    def __init__(
        self,
        params: Any,
        rule: Rule,
        *,
        backend: str = "auto",
        copy: bool = True,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        max_norm: float | None = None,
        clip_norm_per_tensor: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        ema: float | None = None,
        zero_grad: bool = False,
        maximize: bool = False,
        grad_norm: bool = False,
        states: str | Mapping[str, str] | None = None,
        master: bool | None = None,
        rounding: str = "nearest",
        compensated: bool = False,
        seed: int = 0,
        min_8bit_size: int | Mapping[str, int] = MIN_8BIT_SIZE,
        decoupled_weight_decay: bool | None = None,
        members: int | None = None,
        comm: Any = None,
        shard: bool = True,
        order: str = "engine",
        wire: str | None = None,
        **hyper: Any,
    ):
        if not isinstance(rule, Rule):
            raise TypeError(f"rule: must be a Rule, made by @fastopt.rule(prepare), got {type(rule).__name__}")
        if decoupled_weight_decay is not None:
            rule = rule.decaying(Flag().check("decoupled_weight_decay", decoupled_weight_decay))
        members = params.members if members is None and isinstance(params, FlatParams) else check_members(members)
        own: dict[str, Any] = {
            "rule": rule,
            "_members": members,
            "_names": frozenset(name for name in rule.names() if name == "lr" or not hasattr(type(self), name)),
            "_options": StepOptions.checked(
                *(max_norm, clip_norm_per_tensor, clip_value, nonfinite, ema, zero_grad, maximize, grad_norm),
                *(states, master, rounding, compensated, seed, min_8bit_size),
            ),
            "_base": rule.check_all(rule.complete(hyper, also=(*self._arguments, *OPTIONS)), members=members),
            "_overrides": overrides or {},
            "_backend": backend,
            "_ranks": _ranks_of(
                comm, Flag().check("shard", shard), ORDER.check("order", order), checked_wire(wire, comm)
            ),
            "_pipeline": None,
        }
        self.__dict__.update(own)
        for context in (rule.gradients_in, rule.evaluated_in):
            if context is not None and not hasattr(type(self), context):
                warnings.warn(
                    f"rule {rule.name!r}: must have an optimizer with the context {context}(), got "
                    f"{type(self).__name__}; use the optimizer of that rule",
                    stacklevel=2,
                )
        copies = Flag().check("copy", copy)
        if params is not None:
            self._begin(params, copies)

    def _begin(self, params: Any, copies: bool) -> Pipeline:
        """Take the parameters, and make the states."""
        ranks = self._ranks
        if ranks is None:
            self._pipeline = self._made(params, copies)
            return self._pipeline
        ranks.parameters = 0
        with ranks.together(type(self).__name__) as same:
            pipeline = self._made(params, copies)
            same.extend(pipeline.identity)
        ranks.parameters = len(pipeline.flat.paths)
        self._pipeline = pipeline
        return pipeline

    def _made(self, params: Any, copies: bool) -> Any:
        """The pipeline of these parameters."""
        if isinstance(params, FlatParams):
            if self._backend not in ("auto", params.backend):
                raise ValueError(
                    f"backend: must be {params.backend!r}, of the packed parameters, got {self._backend!r}"
                )
            flat = params
            parts = 1 if self._ranks is None else self._ranks.parts
            if flat.layout.parts != parts:
                raise ValueError(
                    f"params: must be packed in {parts} parts, got {flat.layout.parts}; pass the tree of arrays, which "
                    f"is packed here, or shard=False"
                )
            if flat.members != self._members:
                raise ValueError(f"members: must be {flat.members}, of the packed parameters, got {self._members}")
        else:
            part, parts = (0, 1) if self._ranks is None else (self._ranks.part, self._ranks.parts)
            if parts > 1 and not copies:
                raise ValueError(
                    "shard: must be False with copy=False and in update(), because all parts are gathered in one "
                    "buffer, got True"
                )
            where = {"backend": self._backend, "copy": copies, "members": self._members}
            flat = packed(params, **where, part=part, parts=parts, uncut=self._uncut)
        rule, changes = self.rule, match_overrides(flat.paths, self._overrides)
        mark_matrices(rule, changes, flat.member_shapes)
        checked = [
            check_change(rule, change, f"overrides: {path}: ", flat.compute, networks=flat.members)
            for path, change in zip(flat.paths, changes, strict=True)
        ]
        if rule.matrixwise is not None:
            check_acting(rule.matrixwise, flat.paths, checked, self._base)
        made = rule, flat, self._options, self._base, checked
        pipeline = Pipeline(*made) if self._ranks is None else RankPipeline(*made, self._ranks)
        for advice in pipeline.advice:
            warn_caller(advice)
        return pipeline

    def _uncut(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[bool]:
        """For each parameter whether processes must not share it: the rule looks at whole matrices, or their lines."""
        rule, whole = self.rule, self.rule.matrixwise
        if whole is None:
            return [rule.lined] * len(paths)
        changes = match_overrides(paths, self._overrides)
        mark_matrices(rule, changes, shapes)
        return list(chosen_by([change.get(whole.chosen, self._base[whole.chosen]) for change in changes]))

    # --- attributes: hyperparameters are alive, and what does not exist is refused ------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_names", ()):
            value = self._hyper[name]
            return self.rule.check(name, value(self.step_count), members=self._members) if callable(value) else value
        if hasattr(type(self), name):  # a property raised it
            return object.__getattribute__(self, name)
        raise AttributeError(f"{name}: {type(self).__name__} has no such attribute{self._meant(name)}")

    def _meant(self, name: str) -> str:
        """The end of an error about an attribute that does not exist: what to use instead, where that is known."""
        if name.startswith("_"):
            return ""
        here = [*self.__dict__.get("_names", ()), *(each for each in dir(type(self)) if not each.startswith("_"))]
        meant = suggest.attribute(name, here)
        return f"; use {meant}" if meant else ""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_names", ()):
            self._set_hyper(name, value)
        elif hasattr(type(self), name) or any(name in inspect.get_annotations(kind) for kind in type(self).__mro__):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(
                f"{name}: must be a hyperparameter of rule {self.rule.name!r} ({', '.join(self.rule.names())}), to be "
                f"set; options such as max_norm are given at construction{self._meant(name)}"
            )

    def _set_hyper(self, name: str, value: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.set_hyper(name, value)
        else:
            self._base.update(self.rule.check_all({name: value}, members=self._members))

    @property
    def lr(self) -> Any:
        """The learning rate of the next step (of parameters without an override); assign a number or a schedule.

        Every other hyperparameter can be read and assigned likewise: ``opt.weight_decay = 0.01``.

        Raises:
            AttributeError: the rule has no ``lr``.
            TypeError, ValueError: what is assigned is out of range.
        """
        if "lr" not in self._names:
            raise AttributeError(f"lr: rule {self.rule.name!r} has no lr; it has {', '.join(self.rule.names())}")
        value = self._hyper["lr"]
        value = value(self.step_count) if callable(value) else value
        return value if differs(value) else scalars.number("lr", value)

    @lr.setter
    def lr(self, value: Any) -> None:
        self.lr  # noqa: B018 raises: `__setattr__` sets the lr of a rule that has one

    @property
    def _hyper(self) -> dict[str, Any]:
        """The hyperparameters of parameters without an override."""
        return self._base if self._pipeline is None else self._pipeline.groups.base

    @property
    def hyper(self) -> HyperView:
        """The hyperparameters by name, of parameters without an override: read them, and set them.

        In a population each is an array, with a number (or a line of several) for each member, whose items can be set:
        ``opt.hyper["lr"][3] *= 0.5``. One that is not a number, or is a schedule, is as it was given.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.zeros((3, 2))}, lr=[0.1, 0.2, 0.3], members=3)
        >>> opt.hyper["lr"][[0, 2]] = 1.0
        >>> opt.hyper["lr"]
        PerMember([1. , 0.2, 1. ])
        >>> _ = opt.step({"w": np.ones((3, 2))})
        >>> opt.params["w"]
        array([[-1. , -1. ],
               [-0.2, -0.2],
               [-1. , -1. ]])
        """
        return HyperView(self.rule, lambda: self._hyper, self._set_hyper, self._members)

    @property
    def members(self) -> int | None:
        """How many networks a population has; None for one network."""
        return self._members

    @property
    def groups(self) -> GroupsView:
        """The param groups: read and set hyperparameters of some parameters by a glob on their paths.

        ``opt.groups["*.bias"].weight_decay = 0.0`` sets, ``del opt.groups["*.bias"].weight_decay`` takes back;
        ``lr_scale`` and ``frozen`` as in `overrides`. ``for group in opt.groups`` goes over those there are.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"W": np.ones((2, 2)), "b": np.zeros(2)}, lr=1.0)
        >>> opt.groups["b"].frozen = True
        >>> _ = opt.step({"W": np.ones((2, 2)), "b": np.ones(2)})
        >>> opt.params["b"], len(opt.groups)
        (array([0., 0.]), 2)
        """
        view = self.__dict__.get("_groups")
        if view is None:
            view = self.__dict__["_groups"] = GroupsView(self._running)
        return view

    # --- what a user reads --------------------------------------------------------------------------------------------

    @property
    def _running(self) -> Pipeline:
        """The pipeline; RuntimeError before there are parameters."""
        if self._pipeline is None:
            raise RuntimeError(
                "this optimizer has no parameters yet: pass them at construction, or call update(params, grads)"
            )
        return self._pipeline

    @property
    def flat(self) -> FlatParams:
        """The parameters as `pack` laid them out: paths, shapes, buffers."""
        return self._running.flat

    @property
    def params(self) -> Any:
        """The parameters: the tree given at construction, its leaves views of the flat buffer, or the caller's arrays.

        Assigning to an item writes into the leaf: ``opt.params["w"] = new``.
        """
        return self.flat.params

    @property
    def grads(self) -> Any:
        """The gradients: a tree of views. Write into them and call ``step()``, or pass a tree to ``step(grads)``."""
        return self.flat.grads

    @property
    def step_count(self) -> int:
        """How many updates were made."""
        pipeline = self._pipeline
        if pipeline is None:
            return 0
        pipeline.collect()
        return pipeline.steps

    @property
    def states(self) -> Mapping[str, Any]:
        """The rule's states by name, each as a tree of views. Assigning to an item writes into the view.

        States of 8 bits are copies, decoded, and on the CPU read-only.

        Raises:
            RuntimeError: there are no parameters yet, or several processes hold a part of the states each:
                `state_dict` gathers them.
        """
        self._running.refuse_parts("states")
        arrays = decoded(self.state.arrays, self._running.backend)
        names = (*self.rule.states, *self.rule.numbers, *self.rule.matrices)
        trees = {name: handed_out(self.flat.treespec, arrays[name], f"opt.states[{name!r}]") for name in names}
        return MappingProxyType(trees)

    @property
    def nbytes(self) -> Memory:
        """What this optimizer holds, in bytes: ``parameters``, ``gradients``, ``states``, ``scratch`` and ``total``.

        >>> import numpy as np, fastopt
        >>> params = {"w": np.zeros(2**20, np.float32)}
        >>> fastopt.Adam(params).nbytes.states / 2**20, fastopt.Adam(params, states="bfloat16").nbytes.states / 2**20
        (8.0, 4.0)
        """
        return self._running.nbytes

    @property
    def ema(self) -> Any:
        """The moving average of the parameters, a tree of views; AttributeError unless ``ema=`` asked for one.

        Raises:
            AttributeError: no average is kept.
            RuntimeError: there are no parameters yet, or several processes hold a part of the average each:
                `state_dict` gathers it, and `swap_ema` uses it.
        """
        self._running.refuse_parts("ema")
        arrays = self.state.arrays
        if EMA not in arrays:
            raise AttributeError("ema: this optimizer keeps no average of its parameters; construct it with ema=0.999")
        return handed_out(self.flat.treespec, arrays[EMA], "opt.ema")

    @property
    def state(self) -> OptimizerState:
        """Everything that a resumed run needs, typed; its arrays are views. For those who write formats."""
        pipeline = self._running
        pipeline.check_trees()
        self.flush_rows()
        pipeline.begin(show=True)
        groups = pipeline.groups
        return OptimizerState(
            self.rule,
            pipeline.flat,
            pipeline.options,
            pipeline.steps,
            groups.missed,
            dict(groups.base),
            [dict(change) for change in groups.changes],
            [groups.list[number] for number in groups.of],
            pipeline.nonfinite,
            pipeline.shown(),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_groups"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        """An independent optimizer at the same point, on memory of its own; rule and schedules are shared."""
        twin = memo[id(self)] = copy.copy(self)
        own = twin.__dict__
        own["_base"] = dict(self._base)
        own.update({name: copy.deepcopy(value, memo) for name, value in own.items() if name not in SHARED})
        return twin

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._hyper.items())
        of = "no parameters yet" if self._pipeline is None else f"{self.flat!r}, step {self.step_count}"
        return f"<{type(self).__name__}({values}) of {of}>"

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        grads: Any = None,
        grad_scale: float = 1.0,
        reduction: str = "mean",
        *,
        extra: Mapping[str, Any] | None = None,
        loss: float | None = None,
        weight: float | None = None,
    ) -> StepInfo:
        """Update every parameter and state in place, in one launch, or two where the gradients' norm is asked for.

        Args:
            grads: a tree of arrays in the structure, shapes and dtype of the parameters. On the CPU they are read where
                they are, and ``opt.grads`` is not written; arrays that cannot be read in place (strided ones, Fortran
                order) are converted. A number of any kind (0.5, a NumPy scalar, a 0-d tensor) is the gradient of a 0-d
                parameter. None (the default) uses what `accumulate` was given since the last step, or else what is in
                ``opt.grads``. A None in the tree, in place of an array or of a whole subtree, leaves those parameters,
                their states, averages and counts of updates untouched (as torch does).
            grad_scale: what the loss was multiplied by, a positive finite number; gradients are multiplied by its
                inverse.
            reduction: ``"mean"`` or ``"sum"`` of what `accumulate` was given; the mean is the sum divided by the sum of
                the weights. Without `accumulate` it has no effect.
            extra: further trees, by the names that the rule was declared with (``rule(..., extra=("hessian",))``), like
                `grads`: arrays where the gradient is one. They are used as they are: not unscaled, clipped or decayed.
                A rule whose `prepare` has an argument of the name goes without it where it is left out.
            loss: a finite number, for a rule whose `prepare` has the argument ``loss``; None for others.
            weight: a finite number >= 0 that these gradients are multiplied by, such as the number of samples; None for
                1. With `comm`, the mean is that of the gradients of all processes by their weights, and 0 is for one
                that has no batch: its gradients are not read, and may all be None.

        With `comm`, every process calls this. `extra` must be the same on all, `loss` becomes the mean.

        Returns:
            `StepInfo`.

        Raises:
            TypeError, ValueError: naming the parameter's path or the hyperparameter, before anything is changed.
            FloatingPointError: a gradient is NaN or infinite, and ``nonfinite="raise"``; nothing was updated.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere (`swap_ema`). With `comm`,
                `CommunicatorError`: another process has raised an error, or differs in hyperparameters or the number of
                updates; nothing was updated.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.zeros(2), "b": np.zeros(1)}, lr=0.5)
        >>> opt.grads["w"][...] = [1.0, -1.0]
        >>> _ = opt.step()  # what was written into opt.grads
        >>> _ = opt.step({"w": np.array([1.0, 1.0]), "b": None})  # or a tree, in which None stands for no gradient
        >>> opt.params["w"], opt.step_count
        (array([-1.,  0.]), 2)
        """
        pipeline = self._pipeline or self._running
        gate = pipeline.gate
        gate.stepping = get_ident()
        try:
            if gate.taken:
                gate.wait()
            if weight is None:
                return pipeline.step(grads, grad_scale, reduction, extra, loss)
            return pipeline.step_weighted(grads, grad_scale, reduction, extra, loss, weight)
        except (TypeError, ValueError):
            if _is_tree(grad_scale):
                raise TypeError(
                    "step: must be given gradients alone, as in opt.step(grads), got a second tree in the place of "
                    "grad_scale; parameters are given to the constructor, or in opt.update(params, grads)"
                ) from None
            raise
        finally:
            gate.stepping = 0

    def update(
        self,
        params: Any,
        grads: Any,
        grad_scale: float = 1.0,
        *,
        extra: Mapping[str, Any] | None = None,
        loss: float | None = None,
    ) -> StepInfo:
        """Update parameters that the caller owns, in place, by these gradients. Nothing is copied.

        The first call fixes the structure, shapes and dtype, and makes the states; later calls may bring other arrays
        like these. For an optimizer that was made without parameters, or with ``copy=False``.

        Args:
            params: a tree of C-contiguous, aligned, writeable arrays that do not overlap.
            grads: as for `step`.
            grad_scale, extra, loss: as for `step`.

        Returns:
            `StepInfo`.

        Raises:
            TypeError, ValueError: naming the parameter's path, before anything is changed.
            FloatingPointError, RuntimeError: as for `step`; this optimizer has packed its own parameters.

        >>> import numpy as np, fastopt
        >>> params = {"W1": np.ones((2, 3)), "b1": np.zeros(3)}
        >>> opt = fastopt.SGD(lr=0.5)
        >>> _ = opt.update(params, {"W1": np.ones((2, 3)), "b1": np.ones(3)})
        >>> params["b1"]
        array([-0.5, -0.5, -0.5])
        """
        pipeline = self._pipeline
        if pipeline is None:
            pipeline = self._begin(params, copies=False)
            try:
                return pipeline.step(grads, grad_scale, "mean", extra, loss)
            except BaseException:
                if pipeline.steps == 0:
                    self._pipeline = None  # the next first call may bring another structure
                raise
        if not pipeline.flat.in_place:
            raise RuntimeError(
                "update(): this optimizer has packed parameters of its own; call step(grads), or construct it without "
                "parameters, or with copy=False"
            )
        return pipeline.update(params, grads, grad_scale, extra, loss)

    def prepare_replay(self, grad_scale: float = 1.0) -> StepInfo:
        """Count a step and send its hyperparameters to the device, before each replay of a captured ``step()``.

        A CUDA graph records launches and their addresses, and not the numbers that move from step to step: lr and its
        schedule, Adam's bias correction. Those are kept at one address, and this writes them there. Make one ordinary
        step first, on the same stream, then capture ``step()`` (which counts nothing then), alone or together with the
        forward and the backward pass that write into ``opt.grads``.

        Args:
            grad_scale: as for `step`; other than 1 only where the captured step had a `grad_scale` other than 1.

        Returns:
            `StepInfo`; read its results about gradients after the replay and before the next one.

        Raises:
            RuntimeError: nothing was captured, or the groups are not those of then: capture it again.
            ValueError: a `grad_scale` that is out of range, or that the captured step does not take.

        Steps with gradients that are None, accumulated ones, ``nonfinite=`` other than ``"propagate"`` and Muon cannot
        be captured. With CuPy::

            opt.step()
            stream.begin_capture()
            backward(opt.params, x, y, out=opt.grads)
            opt.step()
            graph = stream.end_capture()
            for batch in batches:
                x[...], y[...] = batch
                opt.prepare_replay()
                graph.launch(stream)

        On the CPU nothing can be captured:

        >>> import numpy as np, fastopt
        >>> fastopt.SGD({"w": np.zeros(2)}).prepare_replay()
        Traceback (most recent call last):
        RuntimeError: prepare_replay(): no step() was captured in a CUDA graph
        """
        return self._running.replay(grad_scale)

    def accumulate(self, grads: Any, weight: float = 1.0) -> None:
        """Add the gradients of a micro-batch to what the next ``step()`` will use.

        The sum is kept apart from ``opt.grads``, which may be among these gradients and be written again for the next
        micro-batch, as the backward pass of an attached `BatchNorm` does. Where the step needs the norm of the sum, it
        is measured in the same pass, so that clipping costs no pass of its own.

        Args:
            grads: as for `step`. The step skips a parameter whose gradient was None every time.
            weight: a finite number >= 0 that these gradients are multiplied by, such as the number of samples. With 0
                they are checked and not read, as if each of them were None.

        Raises:
            TypeError, ValueError: naming the parameter's path or the argument, before anything is changed.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.zeros(1)}, lr=1.0)
        >>> opt.accumulate({"w": np.array([1.0])}, weight=3)
        >>> opt.accumulate({"w": np.array([5.0])})
        >>> _ = opt.step()
        >>> opt.params["w"]
        array([-2.])
        """
        self._running.accumulate(grads, weight)

    def step_rows(
        self, rows: Mapping[str, tuple[Any, np.ndarray]], grads: Any = None, grad_scale: float = 1.0
    ) -> StepInfo:
        """Make a step in which only some rows of some parameters have a gradient, at a cost proportional to those rows.

        The result is that of `step` with zero gradients in all other rows: a row that is touched again is first brought
        up to date, by a closed form of all the steps it has missed. `read_rows` gives rows that are up to date;
        ``opt.params`` holds those that were not touched as they were last, until `flush_rows`, which `step`, `ema`,
        `states` and `state_dict` call.

        Adam's form is not exact in its first hundreds of steps, nor for betas such as (0.9, 0.95): the steps that a row
        has missed are then made one by one, at a cost proportional to their number.

        Args:
            rows: ``{path: (indices, row_grads)}`` for 2-D parameters: 1-D integers in [0, number of rows), repeated
                ones being summed, and an array of shape (len(indices), columns), dtype of the parameter.
            grads: gradients of the other parameters, as for `step`, None in place of those in `rows`. Without it the
                others are left untouched.
            grad_scale: a positive finite number, as for `step`.

        With `comm` and ``shard=False``, every process passes rows of its own (some may have none, arrays of length 0),
        and the step is that of the rows of all, one process after the other, divided by the number of processes.

        Returns:
            `StepInfo`.

        Raises:
            TypeError, ValueError: naming the path or argument, before anything is changed; also where the rule, with
                these hyperparameters, has no closed form.
            FloatingPointError, RuntimeError: as for `step`.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Momentum({"embedding": np.zeros((4, 2))}, lr=1.0, momentum=0.5)
        >>> _ = opt.step_rows({"embedding": (np.array([2]), np.array([[1.0, -1.0]]))})
        >>> _ = opt.step_rows({"embedding": (np.array([0]), np.array([[1.0, 1.0]]))})
        >>> opt.read_rows("embedding", np.array([2, 3]))
        array([[-1.5,  1.5],
               [ 0. ,  0. ]])
        """
        return self._running.step_rows(rows, grads, grad_scale)

    def read_rows(self, path: str, indices: Any) -> np.ndarray:
        """A copy of rows of a parameter, after they were brought up to date: what a forward pass looks up.

        With `comm`, every process calls this, with indices of its own.

        Args:
            path: of a 2-D parameter.
            indices: 1-D integers in [0, number of rows), in any order, repeated ones included.

        Returns:
            An array of shape (len(indices), columns).

        Raises:
            TypeError, ValueError: naming the argument: an unknown path, indices as `step_rows` refuses them.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"embedding": np.arange(6.0).reshape(3, 2)}, lr=1.0)
        >>> opt.read_rows("embedding", [2, 0])
        array([[4., 5.],
               [0., 1.]])
        """
        return self._running.read_rows(path, indices)

    def flush_rows(self) -> None:
        """Bring every row up to date that `step_rows` has left behind.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Momentum({"embedding": np.zeros((2, 1))}, lr=1.0, momentum=0.5)
        >>> _ = opt.step_rows({"embedding": (np.array([0]), np.array([[1.0]]))})
        >>> _ = opt.step_rows({"embedding": (np.array([1]), np.array([[1.0]]))})
        >>> opt.flush_rows()  # row 0 makes the second step, along its velocity
        >>> opt.params["embedding"].ravel()
        array([-1.5, -1. ])
        """
        with self._running.gate.take("flush_rows"):
            self._running.flush_rows()

    def zero_grad(self) -> None:
        """Set ``opt.grads`` to zero, and forget what was accumulated.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.ones(1)})
        >>> opt.grads["w"] += 2.0
        >>> opt.zero_grad()
        >>> opt.grads["w"]
        array([0.])
        """
        self._running.zero_grad()

    @contextmanager
    def swap_ema(self) -> Iterator[Any]:
        """Hold the parameters at their moving average, to evaluate with it; they are restored at the end of the block.

        Raises:
            RuntimeError: no average is kept (``ema=``), or inside another such block.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.zeros(1)}, lr=1.0, ema=0.75)
        >>> _ = opt.step({"w": np.array([-4.0])})
        >>> with opt.swap_ema() as params:
        ...     print(params["w"])
        [1.]
        >>> opt.params["w"]
        array([4.])
        """
        pipeline = self._running
        pipeline.refuse_while_held("swap_ema")
        if pipeline.average is None:
            raise RuntimeError("swap_ema(): this optimizer keeps no average; construct it with ema=0.999")
        with pipeline.at_average("swap_ema") as params:
            yield params

    @contextmanager
    def ascent(self, rho: Any = 0.05, grads: Any = None) -> Iterator[Any]:
        r"""Hold the parameters further up the loss inside a ``with`` block, for sharpness-aware minimisation (SAM).

        The parameters are at ``p + rho g / norm(g)``, with the norm over all gradients. Compute the gradients there,
        and step with them after the block. At its end, also after an exception, the parameters are restored, to the
        bit.

        Args:
            rho: the length of the way, >= 0, in units of the parameters.
            grads: the gradients at the parameters, as for `step`; None for those in ``opt.grads``. Options of the step
                such as clipping do not change them; with ``maximize=True`` the way is downwards.

        Returns:
            A context manager, which yields ``opt.params``.

        Raises:
            TypeError, ValueError: naming rho or the path of a gradient.
            RuntimeError: gradients have been accumulated; inside another such block.

        A parameter without a gradient, or a frozen one, stays where it is; so do all where the norm is 0, or so small
        that its inverse leaves the range of the dtype.

        Source: Foret et al. 2021, https://arxiv.org/abs/2010.01412, algorithm 1

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.array([3.0, -4.0])}, lr=0.1)
        >>> with opt.ascent(0.5, {"w": opt.params["w"].copy()}) as params:
        ...     print(params["w"])
        ...     grads = {"w": params["w"].copy()}
        [ 3.3 -4.4]
        >>> _ = opt.step(grads)
        >>> opt.params["w"]
        array([ 2.67, -3.56])
        """
        with self._running.ascended(POSITIVE_OR_ZERO.check("rho", rho), grads, "ascent") as params:
            yield params

    def adopt(self, params: Any) -> None:
        """Put the views of the parameters into the caller's own containers, in place of the arrays there.

        Args:
            params: a tree of dicts, lists or objects like that given at construction.

        Raises:
            TypeError, ValueError: another structure or shape, or a container that is immutable; nothing is changed.

        >>> import numpy as np, fastopt
        >>> params = {"w": np.zeros(2)}
        >>> opt = fastopt.SGD(params, lr=1.0)
        >>> opt.adopt(params)
        >>> _ = opt.step({"w": np.ones(2)})
        >>> params["w"]
        array([-1., -1.])
        """
        adopt(params, self.flat.treespec, self.flat.arrays)

    def add(self, params: Any, **hyper: Any) -> None:
        """Add parameters, with states as at the beginning and hyperparameters of their own.

        Their count of updates begins at 0. Those that are there go on as they are, in the same arrays.

        Args:
            params: a dict of new keys where the parameters are a dict, a list where they are a list; copied or used in
                place as those are.
            **hyper: the hyperparameters that differ from those of the optimizer, as in `overrides`.

        Raises:
            TypeError, ValueError: naming the path or hyperparameter; nothing is changed then.
            RuntimeError: gradients have been accumulated; inside a ``with`` block that holds the parameters elsewhere.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.zeros(1)}, lr=1.0)
        >>> opt.add({"head": np.zeros(2)}, lr=0.5)
        >>> _ = opt.step({"w": np.ones(1), "head": np.ones(2)})
        >>> opt.params["w"], opt.params["head"]
        (array([-1.]), array([-0.5, -0.5]))
        """
        self._running.add(params, hyper)

    def set_params(self, params: Any) -> None:
        """Write values into the parameters, such as pretrained weights, and let the average begin there again.

        So do states that begin at the parameters (schedule-free's z). All other states, and the count of steps, stay:
        see `restart`. Before the first step, writing into the arrays has the same effect.

        Args:
            params: a tree of arrays in the structure and shapes of the parameters, of dtype float16, float32 or
                float64; another dtype than theirs is converted.

        Raises:
            TypeError, ValueError: naming the parameter's path, before anything is changed.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.zeros(1)}, lr=1.0, ema=0.5)
        >>> _ = opt.step({"w": np.ones(1)})
        >>> opt.set_params({"w": np.array([10.0])})
        >>> _ = opt.step({"w": np.array([4.0])})
        >>> opt.params["w"], opt.ema["w"]
        (array([6.]), array([8.]))
        """
        self._running.set_params(params)

    def restart(self) -> None:
        """Begin again from the parameters as they are: states, average and counters are as at construction.

        Hyperparameters stay, and schedules begin at step 0. Gradients that were accumulated are dropped.

        Raises:
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Adam({"w": np.zeros(1)}, lr=0.5)
        >>> _ = opt.step({"w": np.ones(1)})
        >>> opt.restart()
        >>> opt.step_count, opt.states["m"]["w"], opt.params["w"].round(6)
        (0, array([0.]), array([-0.5]))
        """
        self._running.restart()

    def copy_member(self, source: Any, target: Any) -> None:
        """Let members of a population go on as copies of others: parameters, states, average, number of updates.

        Their hyperparameters stay: set them by `hyper`. So do the counters of `StepInfo`.

        Args:
            source: the index of a member, from 0, or 1-D integers.
            target: the same, of the members that are written: as many, each once; or several for one source.

        Raises:
            TypeError, ValueError: naming the argument; nothing is changed then.
            RuntimeError: not a population; inside a ``with`` block that holds the parameters elsewhere.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Adam({"w": np.array([[1.0], [2.0], [3.0]])}, lr=[0.1, 0.2, 0.3], members=3)
        >>> opt.copy_member(2, [0, 1])
        >>> opt.params["w"].ravel(), opt.hyper["lr"][1]
        (array([3., 3., 3.]), 0.2)
        """
        running = self._running
        if self._members is None:
            raise RuntimeError("copy_member(): must be of a population, constructed with members=, got one network")
        sources, targets = (
            check_indices(name, np.atleast_1d(given) if np.ndim(given) == 0 else given, self._members, running.backend)
            for name, given in (("source", source), ("target", target))
        )
        if len(sources) not in (1, len(targets)):
            raise ValueError(f"source: must be one member, or {len(targets)} as target, got {len(sources)}")
        if len(np.unique(targets)) != len(targets):
            raise ValueError("target: must name each member once, got one twice")
        running.copy_member(np.broadcast_to(sources, targets.shape), targets)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters that a resumed run needs, as plain data and copies of the state arrays.

        Keys: ``format``, ``rule``, ``options``, ``step``, ``missed`` (updates without a gradient, by path), ``hyper``
        and ``overrides`` (by path; a schedule is kept as its repr: it is a function of the step, and is given again at
        construction), ``state`` (by state name, then path), ``ema`` (by path; None where no average is kept) and
        ``nonfinite`` (the counters of `StepInfo`). Gradients that are being accumulated are not part of it. Where
        several processes hold a part of the states each, all of them call this, and it gathers the states.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Adam({"w": np.ones(2)})
        >>> sorted(opt.state_dict()["state"])
        ['m', 'v']
        """
        with self._running.gate.take("state_dict"):
            self._running.begin_together("state_dict")
            return self.state.as_dict()

    def load_state_dict(
        self, state: Mapping[str, Any], *, strict: bool = True, keep: Collection[str] = ()
    ) -> LoadReport:
        """Continue where the optimizer that gave `state` stopped: states, step count, hyperparameters.

        Args:
            state: what `state_dict` returned.
            strict, keep: as for `load`. The parameters are not part of `state`, and stay as they are.

        Returns:
            `LoadReport`: which arrays were loaded.

        Raises:
            TypeError, ValueError: that says what differs (another rule, other paths, shapes or dtype, a newer format,
                another option or schedule, as for `load`); the optimizer is then unchanged.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Adam({"w": np.ones(2)})
        >>> _ = opt.step({"w": np.ones(2)})
        >>> resumed = fastopt.Adam({"w": opt.params["w"]})
        >>> resumed.load_state_dict(opt.state_dict())
        <loaded 2 arrays>
        >>> resumed.step_count
        1
        """
        pipeline = self._running
        with pipeline.gate.take("load_state_dict"):
            with pipeline.together("load_state_dict"):
                pipeline.refuse_while_held("load_state_dict")
                here = self.state
                fitted, report = fit(state, here, strict=strict, keep=check_keep(keep, here))
                snapshot = Snapshot.of(fitted, here)
            self.restore(snapshot)
        return report

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a state that was checked against this optimizer: see `load_state_dict`.

        Args:
            snapshot: as `Snapshot.of` returned it.

        >>> import numpy as np, fastopt
        >>> from fastopt.state import Snapshot
        >>> opt = fastopt.Adam({"w": np.ones(2)})
        >>> snapshot = Snapshot.of(opt.state_dict(), opt.state)
        >>> _ = opt.step({"w": np.ones(2)})
        >>> opt.restore(snapshot)
        >>> opt.step_count, opt.states["m"]["w"]
        (0, array([0., 0.]))
        """
        pipeline = self._running
        with pipeline.gate.take("restore"), deferred_signals:
            pipeline.flush_rows()  # the parameters are not part of the state, and keep what their rows have missed
            matrices = pipeline.matrices_for(snapshot.values, snapshot.changes)  # takes memory, and may fail
            pipeline.groups.base = dict(snapshot.values)
            pipeline.groups.regroup(snapshot.changes, snapshot.missed)
            pipeline.matrices = matrices
            pipeline.restore(snapshot.arrays, snapshot.step, snapshot.nonfinite)

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write the parameters and everything else that a resumed run needs to one file, a safetensors one.

        The file is complete at every moment: a temporary one beside it (``.<name>.<random>.tmp``) takes its place once
        it is on the disk and was read back. A killed process may leave such a file behind, which the next save removes.
        The mode of the old file is kept, and a symbolic link stays one. With `comm`, every process calls this, and the
        first one writes: the file is that of one process, and any number of processes loads it.

        Arrays are not copied: steps in other threads wait until the file is written. To go on meanwhile, save a copy,
        ``copy.deepcopy(opt)``, in the other thread.

        The keys are ``"W"`` for a parameter, ``"m/W"`` for a state, ``"ema/W"`` for the average. Gradients that are
        being accumulated are not part of it. `fastopt.checkpoint.describe` shows what a file holds.

        Args:
            path: of the file; ``.safetensors`` is the usual ending.
            extra: more to keep, as JSON holds it (finite numbers, text, lists, dicts), which `load` returns: how far
                the data were read, what the losses were. A tuple comes back as a list.

        Raises:
            TypeError, ValueError: an `extra` that is no JSON, two arrays that would have one key, a path that names
                something else than a file.
            OSError: it could not be written; what was there before still is.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere; within a step (from a schedule or
                a signal handler); or the arrays changed meanwhile, because another thread writes into them.

        >>> import pathlib, tempfile
        >>> import numpy as np, fastopt
        >>> opt = fastopt.Adam({"w": np.ones(1)}, lr=0.5)
        >>> _ = opt.step({"w": np.ones(1)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "run.safetensors"
        ...     opt.save(path, extra={"epoch": 1})
        ...     resumed = fastopt.Adam({"w": np.zeros(1)})
        ...     resumed.load(path)
        {'epoch': 1}
        >>> resumed.params["w"].round(6), resumed.step_count, resumed.lr
        (array([0.5]), 1, 0.5)
        """
        from fastopt import checkpoint  # and safetensors, which is loaded by those who save

        pipeline = self._running
        with pipeline.gate.take("save"):
            pipeline.begin_together("save")
            with pipeline.together("save"):
                pipeline.refuse_while_held("save")
                checkpoint.save(self.state, type(self).__name__, path, extra, writes=pipeline.writes)

    @overload
    def load(
        self,
        path: str | os.PathLike[str],
        *,
        strict: Literal[True] = True,
        keep: Collection[str] = (),
        convert: bool = False,
    ) -> dict[str, Any]: ...

    @overload
    def load(
        self,
        path: str | os.PathLike[str],
        *,
        strict: Literal[False],
        keep: Collection[str] = (),
        convert: bool = False,
    ) -> LoadReport: ...

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        strict: bool = True,
        keep: Collection[str] = (),
        convert: bool = False,
    ) -> dict[str, Any] | LoadReport:
        """Continue from a file that `save` wrote: parameters, states, average, step count and hyperparameters.

        All of it is read and checked, to the last bit, before anything is changed. With `comm`, every process calls
        this, and keeps its part of the states.

        Args:
            path: of the file.
            strict: False loads what fits, and leaves the rest of this optimizer as it is. A parameter is loaded where
                its path and shape are in the file. Its states are loaded where all of them are there; else they and its
                count of updates are as here, but an average, or a state that begins at the parameters, begins at the
                loaded ones. From another rule no hyperparameters are loaded, and states where both rules have the same
                names of states (Adam and AdamW: ``m``, ``v``).
            keep: the names of hyperparameters and options that stay as they are here, such as ``{"lr"}``.
            convert: True loads parameters and states of other storage formats, rounded to the formats of this
                optimizer: from float32 to ``states="int8"``, say, or from bfloat16 with its copy in float32 to float32.
                Only with ``strict=True``.

        Returns:
            The `extra` that `save` was given; without one, an empty dict. With ``strict=False`` a `LoadReport`, which
            says what was loaded and what was not, and has the `extra` as an attribute.

        Raises:
            ValueError, TypeError: the file is no checkpoint, is damaged, or is of a newer format; or it is of another
                optimizer, which is named with what differs: rule, paths, shapes, dtype, an option that changes the run
                (all but ``zero_grad`` and ``grad_norm``), a schedule with other parameters; `keep` names something
                else. With ``strict=False``: another dtype, or no parameter that fits. It is then unchanged.
            OSError: the file cannot be read.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere.

        >>> import pathlib, tempfile
        >>> import numpy as np, fastopt
        >>> opt = fastopt.Lion({"w": np.full(2, 7.0)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "run.safetensors"
        ...     opt.save(path)
        ...     resumed = fastopt.Lion({"w": np.zeros(2)})
        ...     resumed.load(path)
        {}
        >>> resumed.params["w"]
        array([7., 7.])
        """
        from fastopt import checkpoint

        pipeline = self._running
        with pipeline.gate.take("load"):
            with pipeline.together("load") as same:
                pipeline.refuse_while_held("load")
                convert = Flag().check("convert", convert)
                if convert and not strict:
                    raise ValueError("convert: must be False with strict=False, got True")
                kind = type(self).__name__
                found = checkpoint.load(self.state, kind, path, strict=strict, keep=keep, convert=convert)
                same.append(("the file", found.digest.encode()))
            with deferred_signals:
                self.restore(found.snapshot)
                pipeline.put_params(found.params)
                pipeline.keep_written()
        return dict(found.report.extra) if strict else found.report


OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(Optimizer.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)
"""The options that every optimizer has."""


def _ranks_of(comm: Any, shard: bool, order: str, wire: str | None) -> Ranks | None:
    """The ranks of a communicator; None without one."""
    found = communicator_of(comm)
    return None if found is None else Ranks(found, order, shard=shard, wire=wire)


def _is_tree(value: Any) -> bool:
    """Whether a value is a tree of arrays, not a number."""
    if isinstance(value, list | tuple):
        return any(map(_is_tree, value))
    return isinstance(value, Mapping) or math.prod(getattr(value, "shape", None) or ()) > 1


def _conventional(init: Callable[..., None], signature: inspect.Signature) -> Callable[..., None]:
    """The constructor `init` of a named optimizer with ``convention=``: other defaults for what is not given."""

    @wraps(init)
    def constructor(self: Optimizer, *args: Any, convention: str | None = None, **kwargs: Any) -> None:
        if convention is not None:
            known = type(self).conventions
            if convention not in known:
                raise ValueError(
                    f"convention={convention!r}: {type(self).__name__} has {', '.join(map(repr, known)) or 'none'}"
                )
            given = {**signature.bind_partial(self, *args, **kwargs).arguments, **kwargs}
            for name, value in known[convention].items():
                if isinstance(value, Interval):  # the framework's form is another one outside of this range
                    value.check(f"{name} with convention={convention!r}", given.get(name, value.low))
            kwargs = {
                **{
                    name: getattr(value, "low", value) for name, value in known[convention].items() if name not in given
                },
                **kwargs,
            }
        init(self, *args, **kwargs)

    return constructor
