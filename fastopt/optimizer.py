"""`Optimizer`: where a rule, a flat buffer and a backend meet. Groups, step() and state."""

from __future__ import annotations

import copy
import inspect
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastopt.kernels import get_backend
from fastopt.kernels.contract import BLOCK, Adder, Asynchronous, Features, Kernel, NormKernel, Verdict
from fastopt.rule import Flag, Matrixwise, Rule
from fastopt.state import STATE_FORMAT, Snapshot, plain
from fastopt.step.options import REDUCTION, Pending, StepInfo, Tail, norm_of, positive
from fastopt.step.rows import RowSteps, check_indices, one_run
from fastopt.step.table import EMA, WEIGHT_DECAY, Point, Table, hyper_of, is_normal
from fastopt.storage.flat import FlatParams, match_overrides, pack

MOST_AWAITED = 8
"""Steps whose outcome is not known here while a device still works on them; then the first of them is waited for."""


class Recorded(NamedTuple):
    """A step that was captured in a CUDA graph."""

    table: Any
    """Where its hyperparameters are, on the device."""
    rows: list[int]
    scaled: bool
    verdict: Verdict | None


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
        return self.fixed if self.fixed is not None else Point.of(self.rule, self.at_step(step))

    def at_step(self, step: int) -> dict[str, Any]:
        """The same by name."""
        values = dict(self.values)
        for name in self.scheduled:
            values[name] = self.rule.check(name, values[name](step), f"at step {step}, schedule of ")
        return values


class Optimizer:
    """Updates a tree of parameters in place by a rule: one launch, whatever the number of tensors and groups.

    Args:
        params: a tree of NumPy arrays (float32 or float64), which is copied into one flat buffer, or a `FlatParams`,
            which is used as it is. Work with ``opt.params`` from then on: the same tree, whose leaves are views of the
            buffer.
        rule: a `Rule`, made by `fastopt.rule`. The named optimizers (`fastopt.Adam`, ...) bring their own.
        backend: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        overrides: ``{glob on parameter paths: {hyperparameter: value}}``; of two globs that match, the later one wins.
        max_norm: > 0. Gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``, `norm` being the global one of
            all that this step is given.
        clip_value: > 0. Every element of a gradient is moved into [-clip_value, clip_value], before its norm is taken.
        nonfinite: what to do about gradients that are NaN or infinite: ``"propagate"`` them, ``"skip"`` the step, count
            such elements as ``"zero"``, or ``"raise"`` FloatingPointError with the path of the first parameter that has
            one. `StepInfo` counts them.
        ema: decay rate, in (0, 1), of a moving average of the parameters: ``opt.ema``, which begins at the parameters
            and after every step moves towards them, ``e += (1 - ema) (p - e)``.
        zero_grad: set ``opt.grads`` to 0 in the pass that reads them; after a step that was skipped, too.
        maximize: go uphill.
        decoupled_weight_decay: whether ``weight_decay`` shrinks the parameters (``p *= 1 - lr weight_decay``) or is
            added to the gradient (L2); None leaves it to the rule.
        convention: of the named optimizers: ``"torch"``, ``"keras"`` or ``"optax"`` for the form and the defaults that
            the optimizer has there, for what is not given: where eps and lr stand, at what states begin, which weight
            decay. `conventions` of the class tells which it has.
        **hyper: the rule's hyperparameters, and ``weight_decay``. Each is a number or a callable of the step number
            (0 at the first update) that returns one.

    All of it is one launch, after one more over the gradients where their norm is asked for (`max_norm`, or `nonfinite`
    other than ``"propagate"``). The order: unscale, zero what is not finite, clip by value, clip by norm, decay, the
    rule, average, zero.

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
            cls.__init__ = _conventional(cls.__init__)  # type: ignore[method-assign]
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
        max_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        ema: float | None = None,
        zero_grad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool | None = None,
        **hyper: Any,
    ):
        if not isinstance(rule, Rule):
            raise TypeError(f"rule: expected a Rule, made by @fastopt.rule(prepare), found {type(rule).__name__}")
        self._tail = Tail.checked(max_norm, clip_value, nonfinite, ema, zero_grad, maximize)
        self._sign, self._measures = self._tail.sign, self._tail.measures
        if decoupled_weight_decay is not None:
            rule = rule.decaying(Flag().check("decoupled_weight_decay", decoupled_weight_decay))
        self.rule = rule
        self._values = rule.check_all(rule.complete(hyper))
        if isinstance(params, FlatParams):
            if backend not in ("auto", params.backend):
                raise ValueError(f"backend={backend!r}: the parameters were packed for {params.backend!r}")
            self.flat = params
        else:
            self.flat = pack(params, backend=backend)
        self._backend = get_backend(self.flat.backend)
        self._device: Asynchronous | None = self._backend if self._backend.asynchronous else None  # type: ignore[assignment]
        # Whether the device decides what the gradients' norm decides; a product of matrices it cannot leave out.
        self._late = self._device is not None and self._measures and nonfinite != "raise"
        self._late = self._late and not (self._tail.skips and rule.matrixwise is not None)
        changes = match_overrides(self.flat.paths, overrides or {})
        if rule.matrixwise is not None:
            for change, shape in zip(changes, self.flat.shapes, strict=True):
                if len(shape) != 2:
                    change.setdefault(rule.matrixwise.chosen, False)
        self._changes = [
            rule.check_all(change, f"overrides: {path}: ")
            for path, change in zip(self.flat.paths, changes, strict=True)
        ]
        self._states = tuple(self.flat.new_buffer() for _ in rule.states)
        self._numbers = tuple(self.flat.new_numbers() for _ in rule.numbers)
        self._step_count = 0
        self._missed = [0] * len(self.flat.paths)
        # The rows and `unscale` of the step whose gradients are there.
        self._last: tuple[list[int], float] | None = None
        self._nonfinite = (0, 0)  # steps in a row, and in all, whose gradients were not finite
        self._awaited: deque[tuple[StepInfo, Verdict]] = deque()  # counted as made; a device may have left them out
        self._left_out = 0  # how many steps a device has, as far as is known here
        self._recorded: Recorded | None = None
        self._pending: Pending | None = None
        self._held = ""  # the name of the context that holds the parameters elsewhere
        self._build_rows()
        self._average: np.ndarray | None = None
        if self._tail.ema is not None:
            self._average = self.flat.new_buffer()
            self._average[...] = self.flat.data
        if rule.matrixwise is not None:
            self._check_matrices(rule.matrixwise.chosen)
        # How many steps the device has left out, counted there.
        self._skips = self._backend.zeros(1, np.dtype(np.int64)) if self._late and self._tail.skips else None
        self._begin_states()
        self._begin_rows()

    def _begin_states(self) -> None:
        if not self.rule.initial:
            return
        views, params = self._views(), self.flat.views(self.flat.data)
        for name, value in self.rule.initial.items():
            for k, view in enumerate(views[name]):
                if value == "p":
                    view[...] = params[k]
                else:
                    row = self._rows[self._row_of[k]]
                    view[...] = row.at_step(0)[value] if isinstance(value, str) else value

    def _begin_rows(self) -> None:
        averages = () if self._average is None else (self._average,)
        self._buffers = (*self._states, *averages, *self._numbers)
        self._row_steps = RowSteps(self.rule, self.flat, self._buffers, self._tail.ema, self._row_kernel)
        self._clocks = self._row_steps.clocks  # of the parameters some of whose rows are behind

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
        self._settle()
        return self._step_count

    @property
    def states(self) -> dict[str, Any]:
        """The rule's state buffers by name, each as a tree of views."""
        self.flush_rows()
        return {name: self.flat.tree(views) for name, views in self._views().items() if name != EMA}

    @property
    def ema(self) -> Any:
        """The moving average of the parameters, a tree of views; AttributeError unless ``ema=`` asked for one."""
        if self._average is None:
            raise AttributeError("ema: this optimizer keeps no average of its parameters; construct it with ema=0.999")
        self.flush_rows()
        return self.flat.tree(self.flat.views(self._average))

    @property
    def lr(self) -> float:
        """The learning rate of the next step (of parameters without an override); assign a number or a schedule.

        Raises:
            AttributeError: the rule has no ``lr``.
            TypeError, ValueError: what is assigned is out of range.
        """
        if "lr" not in self._values:
            raise AttributeError(f"rule {self.rule.name!r} has no lr; it has {', '.join(self.rule.names())}")
        self._settle()
        value = self._values["lr"]
        return float(value(self._step_count)) if callable(value) else float(value)

    @lr.setter
    def lr(self, value: Any) -> None:
        if "lr" not in self._values:
            raise AttributeError(f"rule {self.rule.name!r} has no lr; it has {', '.join(self.rule.names())}")
        self._values = {**self._values, **self.rule.check_all({"lr": value}, step=self.step_count)}
        self._build_rows()

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        """An independent optimizer at the same point, on buffers of its own; rule and schedules are shared."""
        self.flush_rows()
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.flat = copy.deepcopy(self.flat, memo)
        twin._states = tuple(twin.flat.new_buffer() for _ in self._states)
        twin._numbers = tuple(twin.flat.new_numbers() for _ in self._numbers)
        mine, theirs = (*self._states, *self._numbers), (*twin._states, *twin._numbers)
        for own, copied in zip(mine, theirs, strict=True):
            copied[...] = own
        if self._average is not None:
            twin._average = twin.flat.new_buffer()
            twin._average[...] = self._average
        twin._begin_rows()
        twin._missed = list(self._missed)
        twin._awaited, twin._left_out, twin._recorded = deque(), 0, None
        twin._skips = None if self._skips is None else self._backend.zeros(1, self._skips.dtype)
        twin._pending = copy.deepcopy(self._pending, memo)
        twin._build_rows()
        return twin

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"<{type(self).__name__}({values}) of {self.flat!r}, step {self.step_count}>"

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, grads: Any = None, grad_scale: float = 1.0, reduction: str = "mean") -> StepInfo:
        """Update every parameter and state in place, in one launch, or two where the gradients' norm is asked for.

        Args:
            grads: a tree of arrays in the structure, shapes and dtype of the parameters, copied into ``opt.grads``.
                None (the default) uses what is in ``opt.grads``. A None in the tree leaves that parameter, its state,
                its average and its count of updates untouched (as torch does).
            grad_scale: what the loss was multiplied by, a positive finite number; gradients are multiplied by its
                inverse.
            reduction: ``"mean"`` or ``"sum"`` of what `accumulate` was given; the mean is the sum divided by the sum of
                the weights. Without `accumulate` it has no effect.

        Returns:
            `StepInfo`.

        Raises:
            TypeError, ValueError: naming the parameter's path or the hyperparameter, before anything is changed.
            FloatingPointError: a gradient is NaN or infinite, and ``nonfinite="raise"``; nothing was updated.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere (`swap_ema`).

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.zeros(2), "b": np.zeros(1)}, lr=0.5)
        >>> opt.grads["w"][...] = [1.0, -1.0]
        >>> _ = opt.step()  # what was written into opt.grads
        >>> _ = opt.step({"w": np.array([1.0, 1.0]), "b": None})  # or a tree, in which None stands for no gradient
        >>> opt.params["w"], opt.step_count
        (array([-1.,  0.]), 2)
        """
        if self._held:
            self._refuse_while_held("step")
        if self._clocks:
            self.flush_rows()
        if self._awaited:
            self._settle(MOST_AWAITED)
        pending = self._pending
        if reduction != "mean":
            REDUCTION.check("reduction", reduction)
        if pending is not None and grads is not None:
            raise ValueError(
                "grads: accumulated gradients are waiting; call step() without grads, or zero_grad() to drop them"
            )
        if type(grad_scale) is float and grad_scale == 1.0 and pending is None:
            unscale = self._sign
        else:
            divisor = pending.weight if pending is not None and reduction == "mean" else 1.0
            unscale = self._sign * self._table.unscale(grad_scale, divisor)
        present = None
        if grads is not None:
            leaves = self.flat.check_grads(grads)
            if any(leaf is None for leaf in leaves):
                present = [leaf is not None for leaf in leaves]
        elif pending is not None and not pending.present.all():
            present = pending.present.tolist()
        device = self._device
        capturing = device is not None and device.capturing()
        if capturing:
            self._check_capture(present is not None or pending is not None)
        if present is None:
            rows, chunks = self._row_of, self._chunks
        else:
            rows = self._rows_of(present)
            chunks = self._chunks_of(rows)
        late = self._late and (present is None or not self._tail.skips)
        if self._awaited and not late:
            self._settle()
        candidates = None
        if self._awaited and self._tail.skips:
            candidates = self._candidates(unscale)
        elif not capturing:
            self._write_table(unscale)
        if grads is not None:
            self.flat.copy_grads(leaves)
        norm, coefficient, verdict = None, 1.0, None
        table = self._table.array if device is None else device.table(self._table.array)
        if self._measures:
            partials, factor = self._partials(rows, pending, unscale, table)
            if late:
                verdict = self._judged(table, candidates, partials, factor)
            else:
                norm, finite = self._norm_of([partials], factor)
                if not self._proceeds(finite, rows, unscale):
                    return self._info(norm, skipped=True)
                coefficient = self._tail.coefficient(norm)
                self._table.clip(coefficient)
                table = self._table.array
        if self.rule.matrixwise is not None:
            self._transform(self.rule.matrixwise, rows, table, scaled=unscale != 1.0)
        kernel = self._kernel if unscale == self._sign else self._kernel_for(scaled=True)
        kernel.launch(self.flat.data, self.flat.grad, self._buffers, table, chunks)
        if capturing:
            self._recorded = Recorded(table, rows, unscale != self._sign, verdict)
            return self._info(norm, coefficient)
        self._step_count += 1
        self._pending = None
        self._last = (rows, unscale)
        if present is not None:
            self._miss(present)
        return self._info(norm, coefficient) if verdict is None else self._info_of(verdict)

    def prepare_replay(self, grad_scale: float = 1.0) -> StepInfo:
        """Count a step and send its hyperparameters to the device, before each replay of a captured ``step()``.

        A CUDA graph records launches and their addresses, and not the numbers that move from step to step: lr and its
        schedule, Adam's bias correction. Those are kept at one address, and this writes them there. Make one ordinary
        step first, on the same stream, then capture ``step()`` (which counts nothing then), alone or together with the
        forward and the backward pass that write into ``opt.grads``.

        Args:
            grad_scale: as for `step`; other than 1 only where the captured step had a `grad_scale` other than 1.

        Returns:
            `StepInfo`; read what it tells of gradients after the replay and before the next.

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
        self._refuse_while_held("prepare_replay")
        recorded = self._recorded
        if recorded is None:
            raise RuntimeError("prepare_replay(): no step() was captured in a CUDA graph")
        unscale = self._sign * self._table.unscale(grad_scale)
        if unscale != self._sign and not recorded.scaled:
            raise ValueError(
                f"grad_scale={grad_scale!r}: the captured step had none; capture it with a grad_scale other than 1"
            )
        if self._table.array.shape != recorded.table.shape or self._row_of != recorded.rows:
            raise RuntimeError("prepare_replay(): the groups are not those of the captured step: capture it again")
        self._write_table(unscale)
        self._backend.copy(recorded.table, self._table.array)
        self._step_count += 1
        self._last = (self._row_of, unscale)
        return self._info() if recorded.verdict is None else self._info_of(recorded.verdict)

    def _check_capture(self, partial: bool) -> None:
        """Refuse to capture a step which the host decides about; partial: of gradients that are None or accumulated."""
        if self._tail.waits:
            raise ValueError(
                f"nonfinite={self._tail.nonfinite!r}: such a step cannot be captured in a CUDA graph, because the host "
                f"counts it; use 'propagate'"
            )
        if self.rule.matrixwise is not None:
            raise TypeError(f"rule {self.rule.name!r}: its products of matrices cannot be captured in a CUDA graph")
        if partial:
            raise ValueError(
                "grads: a step with accumulated gradients, or with None, cannot be captured in a CUDA graph"
            )

    def _judged(self, table: Any, candidates: np.ndarray | None, partials: Any, factor: float) -> Verdict:
        """Have the device decide what the norm decides."""
        assert self._device is not None
        skipped = None if self._skips is None else (self._skips, self._left_out)
        return self._device.judged(table, candidates, partials, factor, self._tail.max_norm, skipped)

    def _settle(self, most: int = 0) -> None:
        """Take in what a device has told of the steps before; wait until at most `most` of them are unknown."""
        while self._awaited and (len(self._awaited) > most or self._awaited[0][1].arrived):
            info, verdict = self._awaited.popleft()
            norm, coefficient, finite = verdict.read()
            skipped = self._count(finite)
            self._step_count -= skipped
            self._left_out += skipped
            coefficient = 1.0 if skipped else coefficient  # nothing was clipped
            info._tell(norm, coefficient, self._step_count - len(self._awaited), skipped, self._nonfinite)

    def accumulate(self, grads: Any, weight: float = 1.0) -> None:
        """Add the gradients of a micro-batch to what the next ``step()`` will use.

        The first after a step begins anew, whatever is in ``opt.grads``. Where the step needs the norm of the sum it is
        taken in the same pass, so that clipping costs none of its own.

        Args:
            grads: as for `step`. A parameter whose gradient was None every time is left out of the step.
            weight: a positive finite number that these gradients are multiplied by, such as the number of samples.

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
        self._refuse_while_held("accumulate")
        number = positive("weight", weight)
        if not is_normal(number, self.flat.dtype):
            raise ValueError(f"weight={weight!r}: out of the range of {self.flat.dtype}")
        leaves = self.flat.check_grads(grads)
        for path, leaf in zip(self.flat.paths, leaves, strict=True):
            if leaf is not None and self._backend.overlap(leaf, self.flat.grad):
                raise ValueError(f"gradient {path!r} overlaps opt.grads, where the sum is kept: pass a copy")
        pending = self._pending
        if pending is None:
            blocks = sum(-(-size // BLOCK) for size in self.flat.layout.sizes)
            partials = self._backend.zeros(2 * blocks, np.dtype(np.float64)).reshape(blocks, 2)
            pending = Pending(len(leaves), partials)
        self._backend.add(
            self.flat.grad,
            leaves,
            np.array(self.flat.offsets, np.int64),
            ~pending.present,
            number,
            self._chunks_of(self._row_of, whole=True),
            pending.partials,
            Adder(self._measures and self._tail.clip_value is None, self._tail.nonfinite == "zero"),
        )
        pending.present |= [leaf is not None for leaf in leaves]
        pending.weight += number
        self._pending = pending

    # --- rows ---------------------------------------------------------------------------------------------------------

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
        self._refuse_while_held("step_rows")
        if self._pending is not None:
            raise ValueError("step_rows(): accumulated gradients are waiting; call step(), or zero_grad() to drop them")
        touched = self._row_steps.check(rows, self._values_of)
        unscale = self._sign * self._table.unscale(grad_scale)
        leaves = [None] * len(self.flat.paths) if grads is None else self.flat.check_grads(grads)
        for k in touched:
            if leaves[k] is not None:
                path = self.flat.paths[k]
                raise ValueError(f"grads: holds a gradient for {path!r}, which is in rows, too; put None in its place")
        for k in touched:
            self._row_steps.wind(k)
        present = [leaf is not None or k in touched for k, leaf in enumerate(leaves)]
        mapped = self._row_of if all(present) else self._rows_of(present)
        self._settle()
        self._write_table(unscale)
        self.flat.copy_grads(leaves)
        chunks = self._dense_chunks(tuple(leaf is not None for leaf in leaves), mapped)
        norm, coefficient = None, 1.0
        if self._measures:
            parts = [(self.flat.grad, chunks)]
            parts += [(g.reshape(-1), one_run(g.size, mapped[k])) for k, (_, g) in touched.items()]
            table = self._table.array
            norm, finite = self._norm_of([self._measured(grad, part, unscale, table) for grad, part in parts])
            if not self._proceeds(finite, mapped, unscale, {k: g for k, (_, g) in touched.items()}):
                return self._info(norm, skipped=True)
            coefficient = self._tail.coefficient(norm)
            self._table.clip(coefficient)
        if len(chunks):
            kernel = self._kernel if unscale == self._sign else self._kernel_for(scaled=True)
            kernel.launch(self.flat.data, self.flat.grad, self._buffers, self._table.array, chunks)
        for k, (indices, row_grads) in touched.items():
            row, line = self._rows[mapped[k]], self._table.array[mapped[k]]
            flags = {**self._tail.flags, "unscale": unscale != 1.0, "zero_grad": False}
            self._row_steps.update(k, indices, row_grads, line, flags)
            self._clocks[k].tick(indices, line.copy(), self._step_count + 1 - row.lag, row.at(self._step_count))
        self._step_count += 1
        self._last = None  # opt.grads does not hold what this step used
        if not all(present):
            self._miss(present)
        return self._info(norm, coefficient)

    def read_rows(self, path: str, indices: Any) -> np.ndarray:
        """A copy of rows of a parameter, after they were brought up to date: what a forward pass looks up.

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
        self._refuse_while_held("read_rows")
        k = self.flat.matrix(path)
        found = check_indices("indices", indices, self.flat.shapes[k][0], self._backend)
        if k in self._clocks:
            self._row_steps.catch_up(k, np.unique(found))
        rows: np.ndarray = self.flat.views(self.flat.data)[k][self._backend.adopt(found)]
        return rows

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
        self._settle()
        for k in list(self._clocks):
            self._row_steps.stop(k)

    def _values_of(self, k: int) -> dict[str, Any]:
        """The hyperparameters of parameter number `k`."""
        return self._rows[self._row_of[k]].values

    def _row_kernel(self, flags: Mapping[str, bool], first: tuple[Any, type] | None) -> Kernel:
        features = self.rule.features(decays=self._decays, scattered=True, **flags)
        return self._backend.kernel(self.rule, self._hyper, self.flat.dtype, features, first)

    def _dense_chunks(self, dense: tuple[bool, ...], rows: list[int]) -> np.ndarray:
        """The chunks (whole ones) of some of the parameters: those that have an ordinary gradient, or are matrices."""
        key = (id(rows), dense)
        found = self._dense_tables.get(key)
        if found is None:
            only = [row if here else -1 for row, here in zip(rows, dense, strict=True)]
            found = self._dense_tables[key] = (rows, self.flat.layout.chunks(only, layerwise=True))
        return found[1]

    def zero_grad(self) -> None:
        """Set ``opt.grads`` to zero, and forget what was accumulated.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.SGD({"w": np.ones(1)})
        >>> opt.grads["w"] += 2.0
        >>> opt.zero_grad()
        >>> opt.grads["w"]
        array([0.])
        """
        self.flat.grad.fill(0)
        self._pending = self._last = None

    def _refuse_while_held(self, what: str) -> None:
        if self._held:
            raise RuntimeError(
                f"{what}() inside `with opt.{self._held}()`: leave the block first, it restores the parameters"
            )

    def _partials(self, rows: list[int], pending: Pending | None, unscale: float, table: Any) -> tuple[Any, float]:
        """The partial sums of the squares of the gradients, and what the norm has to be multiplied by yet."""
        if pending is not None and self._tail.clip_value is None:
            return pending.partials, abs(unscale)
        return self._measured(self.flat.grad, self._chunks_of(rows, whole=True), unscale, table), 1.0

    def _measured(self, grad: Any, chunks: np.ndarray, unscale: float, table: Any) -> Any:
        """The partial sums of what is in a buffer, of which these are the chunks (whole ones)."""
        return self._norm_kernel_for(scaled=unscale != 1.0).launch(grad, table, chunks)

    def _norm_of(self, partials: list[Any], factor: float = 1.0) -> tuple[float, bool]:
        """The norm of gradients, and whether all of them are finite."""
        norm, finite = norm_of([self._backend.host(part) for part in partials])
        return factor * norm, finite

    def _norm_after(self, step: int) -> float | None:
        """The norm of what is in ``opt.grads`` after the step of this number; None if it is gone."""
        if step != self._step_count or self._tail.zero_grad or self._pending is not None or self._last is None:
            return None
        rows, unscale = self._last
        self._table.condition(unscale)
        # Any row will do: the table may have been laid out anew, and what a norm needs is the same in all.
        chunks = self.flat.layout.chunks([min(row, 0) for row in rows], layerwise=True)
        return self._norm_of([self._measured(self.flat.grad, chunks, unscale, self._table.array)])[0]

    def _proceeds(
        self, finite: bool, rows: list[int], unscale: float, touched: Mapping[int, np.ndarray] | None = None
    ) -> bool:
        """Whether to make the step, the gradients being finite or not; those of rows are `touched`, by parameter."""
        nonfinite = self._tail.nonfinite
        if nonfinite == "propagate":
            return True
        if not finite and nonfinite == "raise":
            factor = self.flat.dtype.type(unscale)
            with np.errstate(over="ignore", invalid="ignore"):
                for k, view in enumerate(self.flat.views(self.flat.grad)):
                    given = touched[k] if touched is not None and k in touched else view
                    if rows[k] >= 0 and not np.isfinite(factor * given).all():
                        raise FloatingPointError(
                            f"gradient {self.flat.paths[k]!r} holds NaN or infinity; nothing was updated. "
                            f"nonfinite='skip' would leave such steps out"
                        )
        if self._count(finite):
            self._pending = None
            if self._tail.zero_grad:
                self.flat.grad.fill(0)
            return False
        return True

    def _count(self, finite: bool) -> bool:
        """Count a step whose gradients are finite or not; whether it is left out."""
        consecutive, total = self._nonfinite
        self._nonfinite = (0, total) if finite else (consecutive + 1, total + 1)
        return not finite and self._tail.skips

    def _info(self, norm: float | None = None, coefficient: float = 1.0, skipped: bool = False) -> StepInfo:
        lr = self._values.get("lr")
        return StepInfo(self._step_count, lr, self._norm_after, norm, coefficient, skipped, self._nonfinite)

    def _info_of(self, verdict: Verdict) -> StepInfo:
        """What a device knows of the step just launched, to be fetched when it is read."""
        info = self._info()
        if self._tail.waits:
            verdict.send()
            self._awaited.append((info, verdict))
            info._fetch = lambda told: self._settle()
        else:
            step, nonfinite = self._step_count, self._nonfinite
            info._fetch = lambda told: told._tell(*verdict.read()[:2], step, False, nonfinite)
        return info

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
        self._kernels: dict[bool, Kernel] = {}
        self._norm_kernels: dict[bool, NormKernel] = {}
        self._kernel = self._kernel_for(scaled=self._tail.maximize)

    def _lay_out_rows(self) -> None:
        self._table = Table(
            self.rule,
            self._hyper,
            self.flat.dtype,
            len(self._rows),
            clip_value=self._tail.clip_value,
            ema=self._tail.ema,
        )
        self._rows_present: dict[tuple[bool, ...], list[int]] = {}
        self._chunk_tables: dict[tuple[int, bool], tuple[list[int], np.ndarray]] = {}
        self._dense_tables: dict[tuple[int, tuple[bool, ...]], tuple[list[int], np.ndarray]] = {}
        self._chunks: np.ndarray = self._chunks_of(self._row_of)

    def _candidates(self, unscale: float) -> np.ndarray:
        """The table of the next step for each number of steps that a device may have left out, and as yet not told."""
        tables = np.empty((len(self._awaited) + 1, *self._table.array.shape), self._table.array.dtype)
        for left_out, table in reversed(list(enumerate(tables))):  # the likeliest remains
            self._write_table(unscale, left_out)
            table[...] = self._table.array
        return tables

    def _write_table(self, unscale: float, left_out: int = 0) -> None:
        """Fill the table for the next step, so many of those that are counted not having been made."""
        t = self._step_count + 1 - left_out
        write = self._table.write
        for index, row in enumerate(self._rows):
            write(index, t - row.lag, row.fixed or row.at(t - 1), unscale)

    def _kernel_for(self, scaled: bool) -> Kernel:
        kernel = self._kernels.get(scaled)
        if kernel is None:
            gated = self._late and self._tail.skips
            features = self.rule.features(decays=self._decays, unscale=scaled, gated=gated, **self._tail.flags)
            kernel = self._kernels[scaled] = self._backend.kernel(self.rule, self._hyper, self.flat.dtype, features)
        return kernel

    def _transform(self, whole: Matrixwise, rows: list[int], table: Any, scaled: bool) -> None:
        """Make of the gradients of matrices what the update steps along."""
        values = [row.at_step(self._step_count) for row in self._rows]
        chosen = [row if row >= 0 and values[row][whole.chosen] else -1 for row in rows]
        features = Features(unscale=scaled, **self._tail.conditioning, clip_norm=self._tail.max_norm is not None)
        kernel = self._backend.kernel(whole.direction, self._hyper, self.flat.dtype, features)
        chunks = self._dense_chunks(tuple(row >= 0 for row in chosen), rows)
        kernel.launch(self.flat.data, self.flat.grad, self._states, table, chunks)
        views = self.flat.views(self._states[self.rule.states.index(whole.state)])
        for k, row in enumerate(chosen):
            if row >= 0:
                whole.transform(views[k], **values[row])

    def _check_matrices(self, chosen: str) -> None:
        for k, (path, shape) in enumerate(zip(self.flat.paths, self.flat.shapes, strict=True)):
            if self._values_of(k)[chosen] and len(shape) != 2:
                raise ValueError(f"{chosen}: parameter {path!r} is no matrix but of shape {shape}; set it False there")

    def _norm_kernel_for(self, scaled: bool) -> NormKernel:
        kernel = self._norm_kernels.get(scaled)
        if kernel is None:
            features = Features(unscale=scaled, **self._tail.conditioning)
            kernel = self._backend.norm(self.flat.dtype, features)
            self._norm_kernels[scaled] = kernel
        return kernel

    def _chunks_of(self, rows: list[int], whole: bool = False) -> np.ndarray:
        """The chunks of parameters of these rows; `whole`: no chunk holds parts of two parameters."""
        key = (id(rows), whole)
        found = self._chunk_tables.get(key)
        if found is None:  # the list is kept, so that its id is not given to another
            layerwise = whole or self.rule.whole
            found = self._chunk_tables[key] = (rows, self.flat.layout.chunks(rows, layerwise=layerwise))
        return found[1]

    def _rows_of(self, present: list[bool]) -> list[int]:
        """The rows of the parameters that have a gradient, after splitting every row that only some of them share."""
        mask = tuple(present)
        rows = self._rows_present.get(mask)
        if rows is None:
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
            rows = [row if here else -1 for row, here in zip(self._row_of, mask, strict=True)]
            self._rows_present[mask] = rows
        return rows

    def _miss(self, present: list[bool]) -> None:
        """Count a missed update for every parameter without a gradient: its own step number stays behind."""
        for k, here in enumerate(present):
            if not here:
                self._missed[k] += 1
        for row in {self._row_of[k] for k, here in enumerate(present) if not here}:
            self._rows[row].lag += 1

    @contextmanager
    def _moved(self, shift: Rule, context: str) -> Iterator[Any]:
        """Hold the parameters where `shift`, a rule of the same states and hyperparameters, moves them.

        context : the method that does so.
        """
        self._refuse_while_held(context)
        self._settle()
        self._write_table(1.0)
        kernel = self._backend.kernel(shift, self._hyper, self.flat.dtype, Features())
        with self._elsewhere(context):
            kernel.launch(self.flat.data, self.flat.grad, self._states, self._table.array, self._chunks)
            yield self.params

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
        self._refuse_while_held("swap_ema")
        if self._average is None:
            raise RuntimeError("swap_ema(): this optimizer keeps no average; construct it with ema=0.999")
        with self._elsewhere("swap_ema"):
            self.flat.data[...] = self._average
            yield self.params

    @contextmanager
    def _elsewhere(self, context: str) -> Iterator[None]:
        self.flush_rows()
        backup = self.flat.data.copy()
        self._held = context
        try:
            yield
        finally:
            self.flat.data[...] = backup
            self._held = ""

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters that a resumed run needs, as plain data and copies of the state arrays.

        Keys: ``format``, ``rule``, ``step``, ``missed`` (updates without a gradient, by path), ``hyper`` and
        ``overrides`` (by path; a schedule is kept as its repr: it is a function of the step, and is given again at
        construction), ``state`` (by state name, then path), ``ema`` (by path; None where no average is kept) and
        ``nonfinite`` (the counters of `StepInfo`). Gradients that are being accumulated are not part of it.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Adam({"w": np.ones(2)})
        >>> sorted(opt.state_dict()["state"])
        ['m', 'v']
        """
        self.flush_rows()
        arrays = {
            name: dict(zip(self.flat.paths, (self._backend.host(view).copy() for view in views), strict=True))
            for name, views in self._views().items()
        }
        return {
            "format": STATE_FORMAT,
            "rule": self.rule.name,
            **self._described(),
            "state": {name: paths for name, paths in arrays.items() if name != EMA},
            "ema": arrays.get(EMA),
        }

    def _described(self) -> dict[str, Any]:
        """What of the state is no array."""
        paths, (consecutive, total) = self.flat.paths, self._nonfinite
        return {
            "step": self._step_count,
            "missed": {path: count for path, count in zip(paths, self._missed, strict=True) if count},
            "hyper": plain(self._values),
            "overrides": {path: plain(change) for path, change in zip(paths, self._changes, strict=True) if change},
            "nonfinite": {"consecutive": consecutive, "total": total},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the optimizer that gave `state` stopped: states, step count, hyperparameters.

        Args:
            state: what `state_dict` returned.

        Raises:
            TypeError, ValueError: that says what differs (another rule, other paths, shapes or dtype, a newer format, a
                schedule that is not given here); the optimizer is then unchanged.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Adam({"w": np.ones(2)})
        >>> _ = opt.step({"w": np.ones(2)})
        >>> resumed = fastopt.Adam({"w": opt.params["w"]})
        >>> resumed.load_state_dict(opt.state_dict())
        >>> resumed.step_count
        1
        """
        self._refuse_while_held("load_state_dict")
        self._restore(Snapshot.of(state, self.rule, self.flat.paths, self._views(), self._values, self._changes))

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write the parameters and everything else that a resumed run needs to one file, a safetensors one.

        The file is complete at every moment: a temporary one beside it (``.<name>.<random>.tmp``) takes its place once
        it is on the disk. A killed process may leave such a file behind, which may be deleted. The mode of the old file
        is kept, and a symbolic link stays one. Arrays are not copied for it.

        The keys are ``"W"`` for a parameter, ``"m/W"`` for a state, ``"ema/W"`` for the average. Gradients that are
        being accumulated are not part of it. `fastopt.checkpoint.describe` tells what a file holds.

        Args:
            path: of the file; ``.safetensors`` is the usual ending.
            extra: more to keep, as JSON holds it (finite numbers, text, lists, dicts), which `load` returns: how far
                the data were read, what the losses were. A tuple comes back as a list.

        Raises:
            TypeError, ValueError: an `extra` that is no JSON, two arrays that would have one key, a path that names
                something else than a file.
            OSError: it could not be written; what was there before still is.
            RuntimeError: inside a ``with`` block that holds the parameters elsewhere.

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
        from fastopt import checkpoint  # and safetensors, which only those need who save

        self._refuse_while_held("save")
        self.flush_rows()
        checkpoint.save(self, path, extra)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Continue from a file that `save` wrote: parameters, states, average, step count and hyperparameters.

        All of it is read and checked, to the last bit, before anything is changed.

        Args:
            path: of the file.

        Returns:
            The `extra` that `save` was given; without one, an empty dict.

        Raises:
            ValueError, TypeError: the file is no checkpoint, is damaged, or is of a newer format; or it is of another
                optimizer, which is named with what differs: rule, paths, shapes, dtype, the options ``ema``,
                ``maximize`` and ``decoupled_weight_decay``, a schedule that is not given here. Other options are those
                of this optimizer. It is then unchanged.
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

        self._refuse_while_held("load")
        return checkpoint.load(self, path)

    def _restore(self, snapshot: Snapshot) -> None:
        self.flush_rows()  # the parameters are not part of the state, and keep what their rows have missed
        for name, views in self._views().items():
            for view, array in zip(views, snapshot.arrays[name], strict=True):
                self._backend.copy(view, array)
        self._step_count = snapshot.step
        self._missed = snapshot.missed
        self._values = snapshot.values
        self._changes = snapshot.changes
        self._nonfinite = snapshot.nonfinite
        self._pending = self._last = self._recorded = None
        self._build_rows()

    def _views(self) -> dict[str, list[np.ndarray]]:
        """What the optimizer keeps for each parameter, by name: the rule's states, and the average."""
        buffers = dict(zip(self.rule.states, self._states, strict=True))
        if self._average is not None:
            buffers[EMA] = self._average
        views = {name: self.flat.views(buffer) for name, buffer in buffers.items()}
        for name, numbers in zip(self.rule.numbers, self._numbers, strict=True):
            views[name] = [numbers[k : k + 1].reshape(()) for k in range(numbers.size)]
        return views


def _conventional(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor `init` of a named optimizer with ``convention=``: other defaults for what is not given."""
    signature = inspect.signature(init)

    @wraps(init)
    def constructor(self: Optimizer, *args: Any, convention: str | None = None, **kwargs: Any) -> None:
        if convention is not None:
            known = type(self).conventions
            if convention not in known:
                raise ValueError(
                    f"convention={convention!r}: {type(self).__name__} has {', '.join(map(repr, known)) or 'none'}"
                )
            given = {**signature.bind_partial(self, *args, **kwargs).arguments, **kwargs}
            kwargs = {**{name: value for name, value in known[convention].items() if name not in given}, **kwargs}
        init(self, *args, **kwargs)

    return constructor
