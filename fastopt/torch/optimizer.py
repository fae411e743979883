"""`Optimizer`: a `torch.optim.Optimizer` whose steps are ours. Tensors stay where they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from operator import is_, itemgetter
from typing import Any, ClassVar

import torch
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import fastopt
from fastopt.kernels.contract import INT8
from fastopt.step.info import StepInfo
from fastopt.step.options import StepOptions
from fastopt.torch.memory import device_of, memory_of
from fastopt.torch.parameters import HALF, check_param
from fastopt.torch.part import DevicePart, Member, Part, StaleError, increment_version
from fastopt.torch.signatures import ALSO, IMPLEMENTATION, OPTIONS, documented, full_signature
from fastopt.torch.states import Mark, States

NAMES = {"m": "exp_avg", "v": "exp_avg_sq", "velocity": "momentum_buffer"}
"""What torch calls such states, for optimizers that torch has not."""


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer that makes its steps by one of our rules, in one launch, on the tensors where they are.

    The named ones (`fastopt.torch.Adam`, ...) have torch's arguments and states; `fastopt.torch.from_rule` makes one of
    a rule of your own. All else is as in `torch.optim.Optimizer`: param groups, schedulers, hooks, closures,
    ``state_dict()``, which torch's class of the same name loads, as this one loads torch's.

    Args:
        params: an iterable of float32 or float64 tensors on the CPU or on CUDA devices, of named ones, or of dicts of
            param groups.
        *args, **kwargs: those of the optimizer; and, for all param groups together, ``max_norm``,
            ``clip_norm_per_tensor``, ``clip_value``, ``nonfinite``, ``ema`` and ``grad_norm`` as for
            `fastopt.Optimizer`. ``foreach`` and ``fused`` have no effect.

    Attributes:
        info: a `fastopt.StepInfo` of the last step, with the norm of the gradients where an option needs it; None
            before the first one.

    Raises:
        TypeError, ValueError: naming the argument or the parameter: a hyperparameter out of range, ``capturable`` or
            ``differentiable``; complex parameters, sparse ones, those of other devices.
        RuntimeError: a parameter is on a CUDA device, and the CUDA backend cannot work here.

    >>> import torch, fastopt.torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> opt = fastopt.torch.SGD([w], lr=0.5, max_norm=1.0)
    >>> w.square().sum().backward()
    >>> opt.step()
    >>> w.data, opt.info.grad_norm
    (tensor([ 2.7000, -3.6000]), 10.0)
    """

    ours: ClassVar[Callable[..., fastopt.Optimizer]]
    """Makes our optimizer of a tree of arrays."""
    theirs: ClassVar[type[torch.optim.Optimizer] | None] = None
    """The class of torch that has the same arguments and states."""
    names: ClassVar[Mapping[str, str]] = NAMES
    """Torch's name of each state, by ours."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Our name of an argument that torch calls otherwise."""
    counts: ClassVar[bool] = True
    """Whether torch's state has a `step`."""
    sparse: ClassVar[bool] = False
    """Whether torch's class takes sparse gradients."""
    _signature: ClassVar[inspect.Signature]
    info: StepInfo | None

    def __init_subclass__(
        cls,
        ours: Callable[..., fastopt.Optimizer] | None = None,
        theirs: type[torch.optim.Optimizer] | None = None,
        names: Mapping[str, str] | None = None,
        renamed: Mapping[str, str] | None = None,
        counts: bool = True,
        **kwargs: Any,
    ):
        super().__init_subclass__(**kwargs)
        if ours is None:
            return
        cls.ours, cls.theirs, cls.counts = staticmethod(ours), theirs, counts
        cls.names, cls.renamed = NAMES if names is None else names, renamed or {}
        cls._signature = inspect.signature(ours)
        shown = full_signature(ours, theirs)
        if cls.__doc__ is not None:  # as it is with python -OO
            cls.__doc__ = documented(cls.__doc__, shown, ours, cls.renamed)

        def constructor(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
            super(cls, self).__init__(params, *args, **kwargs)

        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = shown.replace(parameters=[first, *shown.parameters.values()])
        constructor.__signature__ = signature  # type: ignore[attr-defined]
        constructor.__name__, constructor.__qualname__ = "__init__", f"{cls.__qualname__}.__init__"
        cls.__init__ = constructor  # type: ignore[method-assign]

    def __init__(self, params: Any, *args: Any, **kwargs: Any):
        if not hasattr(self, "ours"):
            raise TypeError("Optimizer: must be a named one, or of from_rule(rule), got the base class")
        options = {name: kwargs.pop(name, getattr(StepOptions, name)) for name in OPTIONS}
        self._forget()
        _leave_to_python()
        super().__init__(params, {**self._defaults(args, kwargs), **options})

    def _defaults(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of torch's class, checked by torch, or those of ours."""
        if self.theirs is not None:
            parameter = torch.zeros(1, 1, device="cpu", requires_grad=True)
            return self.theirs([parameter], *args, **kwargs).defaults
        bound = self._signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        found = dict(bound.arguments)
        found.pop("params")
        more = found.pop("options", {})
        for name in more:
            if name not in ALSO:
                raise TypeError(
                    f"{name}: must be an argument of {type(self).__name__} ({', '.join([*found, *ALSO, *OPTIONS])}), "
                    f"got {name}={more[name]!r}"
                )
        return {**found, "maximize": False, **more}

    # --- what torch keeps, and what is made of it ---------------------------------------------------------------------

    def _forget(self) -> None:
        """Have the parts made again in the next step."""
        self._parts: list[Part] | None = None
        self._shares = True
        self.info = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group: see `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: a dict of ``params`` and of hyperparameters that differ from the optimizer's.

        Raises:
            TypeError, ValueError, RuntimeError: as the constructor, also as torch's. The optimizer is then as it was.

        >>> import torch, fastopt.torch
        >>> opt = fastopt.torch.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> opt.add_param_group({"params": torch.zeros(3, requires_grad=True), "lr": 0.01})
        >>> [group["lr"] for group in opt.param_groups]
        [0.1, 0.01]
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._checked(group)
            for i, p in enumerate(group["params"]):
                self._check_param(self._name(len(self.param_groups) - 1, i), p)
            self._options()
        except BaseException:
            self.param_groups.pop()
            raise
        self._start(group)
        self._forget()

    def _start(self, group: dict[str, Any]) -> None:
        """Make the states of a new param group that torch makes before the first step: none."""

    def _name(self, group: int, i: int) -> str:
        """The name of a parameter in errors."""
        names = self.param_groups[group].get("param_names")
        return f"param_groups[{group}]['params'][{i}]" if names is None else str(names[i])

    def _checked(self, group: Mapping[str, Any]) -> fastopt.Optimizer:
        """Our optimizer with the hyperparameters of a param group, which are checked, and without parameters."""
        for name in ("capturable", "differentiable"):
            if group.get(name):
                why = "a step is not recorded in a graph" if name == "capturable" else "a step has no gradient"
                raise ValueError(f"{name}: must be False, because {why}, got True; use torch.optim for it")
        return self.ours(None, **self._arguments(group))

    def _arguments(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of our optimizer that a param group of torch holds."""
        return {
            self.renamed.get(name, name): _number(group[name])
            for name in self.defaults
            if name not in IMPLEMENTATION and name not in OPTIONS and name in group
        }

    @classmethod  # a part that held the optimizer would keep it alive until the garbage collector runs
    def _numbered(cls, name: str, shape: torch.Size, number: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """How ``state[p]`` shows a number per tensor, row or column: see `Part`."""
        return cls.names.get(name, name), number

    def _check_param(self, name: str, p: torch.Tensor) -> None:
        """Refuse a parameter that this optimizer cannot update. Raises as `check_param`."""
        check_param(name, p)

    def _options(self) -> dict[str, Any]:
        """What surrounds the rule in a step; ValueError where param groups differ."""
        found = {name: self.param_groups[0][name] for name in OPTIONS}
        for k, group in enumerate(self.param_groups):
            for name, value in found.items():
                if group[name] != value:
                    raise ValueError(
                        f"{name}: must be the same in all param groups, got {value!r} in group 0 and {group[name]!r} "
                        f"in group {k}"
                    )
        StepOptions.checked(**found)
        states = found["states"]
        if INT8 in (states.values() if isinstance(states, dict) else (states,)):
            raise ValueError("states: must be 'bfloat16' or 'float16' here, whose states are tensors, got 'int8'")
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = self.state
        return {**super().__getstate__(), "state": state.plain() if isinstance(state, States) else state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # one that torch's class has saved lacks our names
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups, in the form of torch: see `torch.optim.Optimizer.state_dict`.

        The tensors are those of ``opt.state``, not copies.

        >>> import torch, fastopt.torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> opt = fastopt.torch.Adam([w])
        >>> w.sum().backward()
        >>> opt.step()
        >>> opt.state_dict()["state"][0]["exp_avg"]
        tensor([0.1000, 0.1000])
        """
        found = super().state_dict()
        states = found["state"]
        found["state"] = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in states.items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the optimizer that gave `state_dict`, ours or torch's, stopped. Tensors are copied.

        Args:
            state_dict: what ``state_dict()`` of this class, or of torch's of the same name, returned.

        Raises:
            TypeError, ValueError: it does not fit, in the number or size of groups, the names or shapes of states, the
                hyperparameters. The optimizer is then as it was.
            RuntimeError: as the constructor.

        >>> import torch, fastopt.torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> w.sum().backward()
        >>> theirs, opt = torch.optim.Adam([w]), fastopt.torch.Adam([w])
        >>> theirs.step()
        >>> opt.load_state_dict(theirs.state_dict())
        >>> opt.state[w]["step"], opt.state[w]["exp_avg"]
        (tensor(1.), tensor([0.1000, 0.1000]))
        """
        before = dict(self.__dict__)
        try:
            super().load_state_dict(state_dict)
            self._take_exactly(state_dict)
            self._shares = False
            self._rebuilt()
        except BaseException:
            self.__dict__.update(before)
            raise

    def _take_exactly(self, state_dict: dict[str, Any]) -> None:
        """Take states of parameters of 16 bits as they were saved: torch has rounded them to the parameters' dtype."""
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(mine["params"], saved["params"], strict=True):
                if p.dtype not in HALF:
                    continue
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        self.state[p][name] = value.detach().clone()

    # --- parts --------------------------------------------------------------------------------------------------------

    @torch.inference_mode(mode=False)  # states that are made in a step inside it can be changed outside
    def _rebuilt(self) -> list[Part]:
        """Make the parts: our optimizers of the parameters as they are, with the states as they are."""
        if not isinstance(self.state, States):
            self.__dict__["state"] = States(self.state, Mark())
        options = self._options()
        groups = self.param_groups
        made = [self._checked(group) for group in groups]
        members: dict[tuple[Any, ...], list[Member]] = {}
        seen: set[int] = set()
        for number, (group, own) in enumerate(zip(groups, made, strict=True)):
            for i, p in enumerate(group["params"]):
                if id(p) not in seen:  # a parameter that is there twice is one
                    seen.add(id(p))
                    name = self._name(number, i)
                    self._check_param(name, p)
                    key = (own.rule, p.dtype, bool(group.get("maximize")), device_of(p))
                    members.setdefault(key, []).append(Member(p, number, name))
        values = [{name: getattr(own, name) for name in own.rule.names()} for own in made]
        parts = []
        for own_members in members.values():
            arguments, rule = (
                {**self._arguments(groups[own_members[0].group]), **options},
                made[own_members[0].group].rule,
            )
            memory = memory_of(device_of(own_members[0].param))
            if own_members[0].param.dtype not in HALF:  # which keeps nothing besides
                arguments |= {"master": None, "compensated": False}
                if options["states"] is None:
                    arguments["rounding"] = "nearest"
            parts.append(
                (Part if memory.on_host else DevicePart)(
                    own_members,
                    memory,
                    partial(self.ours, copy=False, **arguments),
                    values,
                    self.state,  # type: ignore[arg-type]
                    self.names,
                    numbered=self._numbered,
                    counts=self.counts,
                    shares=self._shares,
                    sparse=self.sparse,
                    by_matrix=rule.matrixwise is not None or rule.lined,
                )
            )
        self._shares = True
        self._parts = parts
        self._measures = parts[0].pipeline.measures if parts else False
        if self._measures and len(parts) > 1:  # which measure each other's gradients, and no rows
            for part in parts:
                part.by_rows = False
        self._keys = itemgetter(*[name for name in self.defaults if name not in IMPLEMENTATION])
        self._key_names = [name for name in self.defaults if name not in IMPLEMENTATION]
        self._known = [tuple(map(_number, self._keys(group))) for group in groups]
        self._lists = [list(group["params"]) for group in groups]
        self._rules = [own.rule for own in made]
        self._state_of_parts = self.state
        self.state.mark.changed = False  # type: ignore[attr-defined]
        return parts

    def _current(self) -> list[Part]:
        """The parts, for the param groups and states as they are now."""
        parts = self._parts
        if (
            parts is None
            or self.state is not self._state_of_parts
            or self.state.mark.changed  # type: ignore[attr-defined]
            or len(self.param_groups) != len(self._lists)
        ):
            return self._rebuilt()
        for k, (group, params) in enumerate(zip(self.param_groups, self._lists, strict=True)):
            own = group["params"]
            if len(own) != len(params) or not all(map(is_, own, params)):
                return self._rebuilt()
            key = self._keys(group)
            if key != self._known[k]:  # a number in a tensor is compared as well
                key = tuple(map(_number, key))
                if key != self._known[k] and not self._set(k, key):
                    return self._rebuilt()
        for part in parts:
            if part.moved():
                return self._rebuilt()
            part.recount()
        return parts

    def _set(self, k: int, key: tuple[Any, ...]) -> bool:
        """Take new hyperparameters of a param group; return whether that was possible without new parts."""
        group, rule = self.param_groups[k], self._rules[k]
        changed = [
            (self.renamed.get(name, name), value, before)
            for name, value, before in zip(self._key_names, key, self._known[k], strict=True)
            if value != before
        ]
        names = rule.names()
        for name, value, before in changed:
            # What becomes 0 or is no longer 0, a flag and a word may select another rule: momentum, amsgrad, form.
            selects = isinstance(value, bool | str) or (value != 0) != (before != 0)
            if name not in names or (selects and self._checked(group).rule is not rule):
                return False
        for name, value, _ in changed:
            for part in self._parts or ():
                if k in part.members_of:
                    part.set_hyper(name, value, k)
        self._known[k] = key
        return True

    # --- the step -----------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Make a step with the gradients that are there."""
        name = type(self).__name__
        try:
            parts = self._current()
            taken = [part.take(name) for part in parts]
        except StaleError:
            parts = self._rebuilt()
            taken = [part.take(name) for part in parts]
        if len(parts) == 1:
            if taken[0].present is None or any(taken[0].present) or parts[0].rows:
                self.info = parts[0].advance(taken[0])
            return
        found = [
            (part, own)
            for part, own in zip(parts, taken, strict=True)
            if own.present is None or any(own.present) or part.rows
        ]
        if not self._measures:
            for part, own in found:
                self.info = part.advance(own)
            return
        # The norm is that of all parts. A part whose gradients are not finite raises the error, before others change.
        measured = [part.measure(own) for part, own in found]
        for k in sorted(range(len(found)), key=lambda k: measured[k][1]):
            others = [own for j, own in enumerate(measured) if j != k]
            beside = math.hypot(*[norm for norm, _ in others]), all(finite for _, finite in others)
            part, own = found[k]
            self.info = part.advance(own, beside)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients. One without a gradient stays as it is.

        Args:
            closure: called first, with gradients enabled: it computes the loss and the gradients.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: a hyperparameter was set out of range, a parameter or state replaced by another kind.
            RuntimeError: a gradient is sparse, other than for SGD and Adagrad, as in torch; it is on another device
                than its parameter; torch captures a CUDA graph on the current stream of a parameter's device.
            FloatingPointError: with ``nonfinite="raise"``. Nothing was updated.

        >>> import torch, fastopt.torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> opt = fastopt.torch.SGD([w], lr=0.5)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = w.sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)
        tensor(2., grad_fn=<SumBackward0>)
        >>> w
        tensor([0.5000, 0.5000], requires_grad=True)
        """
        if (
            closure is not None
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler_enabled()
        ):
            return _observed(self) if closure is None else _observed(self, closure)
        _untraced(self)
        return None

    step.hooked = True  # type: ignore[attr-defined] # torch would wrap it, for hooks and profilers that are seldom there
    step._torchdynamo_disable = True  # type: ignore[attr-defined] # torch.compile breaks its graph here

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let no parameter have a gradient: see `torch.optim.Optimizer.zero_grad`.

        Args:
            set_to_none: False writes zeros into the gradients instead.

        >>> import torch, fastopt.torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> opt = fastopt.torch.SGD([w])
        >>> w.sum().backward()
        >>> opt.zero_grad()
        >>> w.grad is None
        True
        """
        if not set_to_none or profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    # --- what torch has not -------------------------------------------------------------------------------------------

    @contextmanager
    def _held(self, context: str) -> Iterator[None]:
        """Hold the parameters of all parts elsewhere, inside a context of our optimizers."""
        parts = self._current()
        for part in parts:
            part.refuse_shadows(context)
        try:
            with ExitStack() as stack:
                for part in parts:
                    stack.enter_context(part.hold(context))
                yield
        finally:
            for part in parts:
                increment_version(part.params)

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Hold the parameters at their moving average (``ema=``), to evaluate; they are restored after the block.

        Raises:
            RuntimeError: no average is kept, or inside another such block.
            TypeError, ValueError: as `step`.

        >>> import torch, fastopt.torch
        >>> w = torch.zeros(1, requires_grad=True)
        >>> opt = fastopt.torch.SGD([w], lr=1.0, ema=0.75)
        >>> w.grad = torch.tensor([-4.0])
        >>> opt.step()
        >>> with opt.swap_ema():
        ...     print(w.data)
        tensor([1.])
        >>> w.data
        tensor([4.])
        """
        with self._held("swap_ema"):
            yield

    def share_memory(self) -> None:
        """Move the states to shared memory, for processes that train together, as ``model.share_memory()`` does.

        Raises:
            TypeError, ValueError: as `step`.
            RuntimeError: a parameter is on a CUDA device. Nothing was moved.

        >>> import torch, fastopt.torch
        >>> w = torch.zeros(2, requires_grad=True)
        >>> opt = fastopt.torch.Adam([w])
        >>> opt.share_memory()
        >>> opt.state[w]["exp_avg"].is_shared()
        True
        """
        parts = self._current()
        for part in parts:
            part.check_shareable()
        for part in parts:
            part.share_memory()
        self._rebuilt()


def _closed(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    """A step that torch's hooks and profiler observe."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    _untraced(self)
    return loss


def _untraced(self: Optimizer) -> None:
    """A step whose functions torch.compile does not compile."""
    tracer = set_eval_frame(None)
    try:
        self._advance()
    finally:
        set_eval_frame(tracer)


@cache
def _leave_to_python() -> None:
    """Have torch.compile leave the functions of a step to Python, up to `_untraced`, which leaves the others."""
    from torch._dynamo.eval_frame import skip_code  # torch has imported it for the first optimizer

    for function in (Optimizer.step, _closed, _untraced):
        skip_code(function.__code__)


_observed = torch.optim.Optimizer.profile_hook_step(_closed)
profiler_enabled = torch._C._autograd._profiler_enabled


def _number(value: Any) -> Any:
    """A hyperparameter without tensors."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(map(_number, value)) if isinstance(value, tuple | list) else value
