"""`Pipeline`: the steps of one optimizer. A step is: plan, check, decide, launch, commit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastopt.hyper import EMA, POSITIVE_OR_ZERO
from fastopt.kernels import get_backend
from fastopt.kernels.contract import BLOCK, PROCEEDS, REST, Adder, Cut, Decision, Features, sums_per_block
from fastopt.rule import Rule, check_acting
from fastopt.signals import deferred_signals
from fastopt.step.born import Born
from fastopt.step.device import MOST_IN_FLIGHT, Candidates, DeviceSteps, Recorded
from fastopt.step.gate import Gate, through_gate
from fastopt.step.groups import FROZEN, LR_SCALE, Groups, check_change, check_matrices, mark_matrices
from fastopt.step.info import StepInfo
from fastopt.step.inputs import Inputs
from fastopt.step.matrices import Matrices, chosen_by
from fastopt.step.norms import Pending, counted, norm_of, norms_of, norms_of_members
from fastopt.step.options import REDUCTION, StepOptions
from fastopt.step.plan import Plan
from fastopt.step.rows import RowSteps, check_indices, one_run
from fastopt.step.storage import Memory, StateFormats
from fastopt.step.table import is_normal
from fastopt.storage.codes import coded_views, fill, unit_of
from fastopt.storage.flat import FlatParams
from fastopt.storage.formats import as_stored
from fastopt.storage.intake import ALONE, Intake, Taken
from fastopt.storage.trees import replaced, watched
from fastopt.warned import warn_caller

NOTHING: Mapping[str, list[Any]] = {}
"""The further inputs of most steps."""


class Pipeline:
    """The parameters, states, param groups and plan of one optimizer, and what makes its steps.

    Args:
        rule: checked, with the weight decay that it is to have.
        flat: the parameters.
        options: what surrounds the rule in a step.
        base: all hyperparameters of the rule, checked.
        changes: for each parameter those that differ, checked.
    """

    _make_plan: Callable[..., Plan] = Plan

    def __init__(
        self,
        rule: Rule,
        flat: FlatParams,
        options: StepOptions,
        base: Mapping[str, Any],
        changes: Sequence[Mapping[str, Any]],
    ):
        self.rule = rule
        self.formats = StateFormats.of(rule, flat, options)
        flat = self.formats.laid_out(flat)
        self.names = frozenset((*rule.names(), LR_SCALE, FROZEN))
        """What can be set for some parameters."""
        self.flat = flat
        self.options = options
        self.sign, self.measures, self.size = options.sign, options.measures, flat.size
        self.backend = get_backend(flat.backend)
        self.device: DeviceSteps | None = None
        if self.backend.asynchronous:
            self.device = DeviceSteps(self.backend, rule, options, flat.members)  # type: ignore[arg-type]
        for name, value in base.items():
            if not callable(value):  # the first plan evaluates schedules
                rule.check(name, value, dtype=flat.compute, members=flat.members)
        self.groups = Groups(rule, flat.compute, base, changes, [0] * len(flat.paths), flat.members)
        self._check_matrices(self.groups)
        self.steps = 0
        """How many were made; on a device, how many were launched."""
        self.nonfinite: tuple[Any, Any] = self._no_steps()
        """Steps in a row, and in all, whose gradients were not finite; of each member of a population."""
        self.pending: Pending | None = None
        self.sums: Any = None
        """The buffer of accumulated gradients, made when it is first needed."""
        self.held = ""
        """The name of the context that holds the parameters elsewhere."""
        self.gate = Gate()
        self.takes_more = bool(rule.extra or rule.inputs)
        """Whether a step is given more than gradients."""
        self.several = self.takes_more or rule.matrixwise is not None or flat.members is not None
        """Whether a step writes more than by one launch, or counts for each member."""
        self.gradients_in = rule.gradients_in
        """The context in which gradients are computed; None also after a warning."""
        self.entered_at = -1
        """The number of steps made when that context was last entered; -1 where it was not since a restart."""
        self.plan = self._planned()
        self.born = Born(rule, options)
        self._make_states()
        self._initialise(range(len(flat.paths)))
        self._collect_buffers()

    @property
    def advice(self) -> list[str]:
        """What is allowed here and seldom works, for warnings."""
        return self.formats.advice(self.rule)

    def _no_steps(self) -> tuple[Any, Any]:
        """`nonfinite` at the beginning."""
        members = self.flat.members
        return (0, 0) if members is None else (np.zeros(members, np.int64), np.zeros(members, np.int64))

    def _check_matrices(self, groups: Groups, flat: FlatParams | None = None) -> None:
        """Refuse groups by which a parameter would be treated as a matrix that is not one."""
        if self.rule.matrixwise is not None:
            flat = self.flat if flat is None else flat
            check_matrices(self.rule, groups.given(self.rule.matrixwise.chosen), flat.paths, flat.member_shapes)

    def _make_states(self) -> None:
        """Make buffers of zeros."""
        flat = self.flat
        formats = self.formats
        self.states = tuple(self._new_state(name) for name in self.rule.states)
        self.units = tuple(self.backend.zeros(flat.layout.size_of_units, flat.compute) for _ in formats.coded)
        """Of states of 8 bits: the unit of every block of codes."""
        self.numbers = tuple(flat.new_numbers(over) for over in self.rule.over.values())
        self.average: Any = None if self.options.ema is None else flat.new_state(formats.dtype(EMA))
        self.kept: Any = flat.new_state(formats.dtype(formats.keeps)) if formats.keeps else None
        """What is kept of parameters of 16 bits besides: see `StateFormats`."""
        self.matrices = Matrices(self.rule, flat, self._chosen())

    def _new_state(self, name: str) -> Any:
        """A buffer of zeros for a state."""
        dtype = self.formats.dtype(name)
        if name in self.formats.coded:
            return self.backend.zeros(self.flat.layout.coded, dtype)
        return self.flat.new_state(dtype)

    def _chosen(self) -> tuple[bool, ...]:
        """For each parameter whether it is treated as a matrix, where the rule keeps matrices."""
        whole = self.rule.matrixwise
        return () if whole is None or not whole.matrices else chosen_by(self.groups.given(whole.chosen))

    def fit_matrices(self) -> Matrices:
        """Have matrices of the parameters that are treated as such, as the groups are now, and of no others."""
        chosen = self._chosen()
        if chosen != self.matrices.chosen:
            self.matrices = self.matrices.fitted(chosen)
        return self.matrices

    def _initialise(self, parameters: Sequence[int]) -> None:
        """Give states that do not begin at 0 their first values."""
        views = self.views()
        for name, value in self.rule.initial.items():
            if name not in self.born.names:
                for k in parameters:
                    group = self.groups.list[self.groups.of[k]]
                    first = group.at_step(self.steps)[value] if isinstance(value, str) else value
                    if isinstance(first, np.ndarray):  # of a number for each member
                        first = self.backend.adopt(first.reshape(-1, *[1] * (views[name][k].ndim - 1)))
                    if views[name][k].dtype.kind in "iu":
                        fill(views[name][k], views[unit_of(name)][k], first)
                    else:
                        views[name][k][...] = first
        self.born.begin(self.flat, views, parameters)

    def _without_updates(self) -> list[int]:
        """The parameters that have had no update yet."""
        if self.options.skips:
            self.collect()  # a device may have skipped every step so far
        if self.flat.members is not None:
            return [k for k, missed in enumerate(self.groups.missed) if (missed == self.steps).all()]
        return [k for k, missed in enumerate(self.groups.missed) if missed == self.steps]

    def begin(self, present: Sequence[bool] | None = None, *, show: bool = False) -> None:
        """Let states begin at the parameters that have had no update yet, which may have been written since.

        present : the parameters that are about to be updated; None: all. show : the states are about to be handed out.
        """
        if self.born.waiting and not self.held:
            self.born.waiting = found = self._without_updates()
            if present is not None:
                found = [k for k in found if present[k]]
            if found:
                self.born.begin(self.flat, self.views(), found, show=show)

    def keep_written(self) -> None:
        """After a load, keep states that are elsewhere than the parameters at which they would begin."""
        if self.born.waiting:
            self.born.keep_written(self.flat, self.views(), self._without_updates())

    def kernel_buffers(self, *, ema: bool = True) -> tuple[Any, ...]:
        """The buffers as kernels are given them: those of `StateFormats.storage`, then the rule's numbers."""
        further = [buffer for buffer in (self.average if ema else None, self.kept) if buffer is not None]
        return (*map(as_stored, (*self.states, *further)), *self.units, *self.numbers)

    def _collect_buffers(self) -> None:
        self.born.wait(len(self.flat.paths))
        self.buffers = self.kernel_buffers()
        self._locate()
        averages = () if self.average is None else (self.average,)
        self.rows = RowSteps(self.rule, self.flat, (*self.states, *averages), self.options.ema)
        self.clocks = self.rows.clocks  # of the parameters some of whose rows are behind
        self.watched = watched(self.flat.params)
        """Whether the trees of parameters and gradients have containers that cannot refuse another leaf."""

    def resume(self, counts: Sequence[int], changes: Sequence[Mapping[str, Any]], beginning: Sequence[int]) -> None:
        """Continue with these counts of updates and hyperparameters, one per parameter, and states as they are.

        counts : how many updates each parameter has had. changes : its hyperparameters that differ from those of the
        optimizer, checked. beginning : the parameters whose states have their first values.
        """
        self.collect()
        with deferred_signals:
            self.steps = max(counts, default=0)
            self.groups.regroup(changes, [self.steps - count for count in counts])
            self.fit_matrices()
            self.born.shown.clear()
            self.born.wait(len(counts))
            self._initialise(beginning)

    def hold_states_in(self, buffers: Sequence[np.ndarray]) -> None:
        """Use these buffers from now on, with the values that they hold.

        buffers : those of the rule's states, the average, what is kept of the parameters besides: 1-D, contiguous,
            aligned and writeable, of the sizes and dtypes of those that there are.
        """
        count = len(self.rule.states)
        self.states, further = tuple(buffers[:count]), list(buffers[count:])
        if self.average is not None:
            self.average = further.pop(0)
        if self.kept is not None:
            self.kept = further.pop(0)
        self._collect_buffers()

    def _locate(self) -> None:
        """Take the addresses of the parameters, which may have moved: see `FlatParams.replace`."""
        addresses = self.flat.addresses
        self.places_of_params = self.flat.places_of(addresses, addresses)
        """For kernels that read no gradients."""
        self._sums_at: tuple[np.ndarray, list[Any]] | None = None
        self.intake = Intake(self.flat, self.backend, self.buffers)
        self.plan.forget_chunks()
        self.addresses = addresses  # at the end: an interrupt before has all of it made again

    def _planned(self) -> Plan:
        gated = self.device is not None and self.device.gated
        return self._make_plan(
            *(self.rule, self.flat, self.options, self.groups, self.backend, self.formats), step=self.steps, gated=gated
        )

    def check_trees(self) -> None:
        """Refuse to go on with a leaf in a tree that was handed out which is not the one that the optimizer uses."""
        if not self.watched:
            return
        flat = self.flat
        given = [("opt.params", flat.params, flat.arrays)]
        if "grads" in flat.__dict__:  # it was asked for
            given.append(("opt.grads", flat.grads, flat.grad_arrays))
        for name, tree, leaves in given:
            path = replaced(tree, leaves, flat.paths)
            if path is not None:
                raise ValueError(
                    f"{name}: {path!r} must be the array that the optimizer handed out, got another one; write into "
                    f"the array, as in array[...] = value"
                )

    def current_plan(self) -> Plan:
        """The plan for the groups, and the parameters where they are."""
        if self.addresses is not self.flat.addresses:
            self._locate()
        if self.plan.version != self.groups.version:
            self.plan = self._planned()
        return self.plan

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(
        self,
        grads: Any,
        grad_scale: float,
        reduction: str,
        extra: Any = None,
        loss: Any = None,
        *,
        deferred: bool = False,
    ) -> StepInfo:
        """Make a step: see `Optimizer.step`. deferred : signals are."""
        if self.held:
            self.refuse_while_held("step")
        if self.gradients_in:
            self._check_context()
        if self.watched:
            self.check_trees()
        if self.clocks:
            self.flush_rows()
        device = self.device
        if device is not None:
            device.check_place(self.flat.device)  # before a buffer of gradients is made
            if device.in_flight or device.collected:
                if not deferred:
                    with deferred_signals:  # one block for the results and the step: a block takes 4 us
                        return self.step(grads, grad_scale, reduction, extra, loss, deferred=True)
                self.collect(MOST_IN_FLIGHT)
        plan = self.plan
        if plan.version != self.groups.version or self.addresses is not self.flat.addresses:
            plan = self.current_plan()
        pending = self.pending
        if reduction != "mean":
            REDUCTION.check("reduction", reduction)
        if type(grad_scale) is float and grad_scale == 1.0 and pending is None:
            unscale = self.sign
        else:
            divisor = (pending.weight or 1.0) if pending is not None and reduction == "mean" else 1.0
            unscale = self.sign * plan.table.unscale(grad_scale, divisor)
        # Check.
        kept = present = None
        beside = ALONE
        own = type(grads) is not Taken if device is not None else grads is None and pending is None
        if grads is None:
            if pending is None:
                places = self.flat.places
            else:
                places, kept = self._places_of_sums()
                present = None if pending.present.all() else pending.present.tolist()
        elif pending is not None:
            self.refuse_two(grads)
        else:
            taken = grads if type(grads) is Taken else self.intake.take(grads)
            places, present, kept, beside = taken
        if self.groups.frozen:
            present = self._without_frozen(present)
        capturing = False
        if device is not None:
            capturing = device.backend.capturing()
            if capturing:
                device.check_capture(self.rule, present is not None or pending is not None)
                if self.born.waiting and self._without_updates():
                    raise RuntimeError(
                        "step() is captured before states have begun at the parameters: make an ordinary step first"
                    )
        rows: Sequence[int] = plan.of
        moving: np.ndarray | None = None
        if present is not None:
            rows = self._rows_of(present)
            plan = self.plan
        further = NOTHING
        if extra is not None or loss is not None or self.takes_more:
            plan.table.inputs, further = Inputs.checked(self.rule, self.flat, extra, loss, present)
        if self.born.waiting:
            self.begin(present)
        if device is not None:
            return self._step_on_device(
                device, plan, places, present, rows, unscale, kept, further, own=own, beside=beside, capturing=capturing
            )
        plan.write_table(self.groups, self.steps + 1, unscale)
        norm, coefficient, nonfinite = None, 1.0, self.nonfinite
        if self.measures:
            norm, coefficient, proceeds, nonfinite = self.decide(
                plan, places, rows, unscale, present, kept, own=own, beside=beside
            )
            if proceeds is not True:
                rows, moving = self._moving(plan, present, proceeds, own=own)
                if moving is None:
                    return self._info(norm, skipped=True)
                plan = self.plan
        # Launch.
        if own and unscale == self.sign:
            kernel = plan.usual
        else:
            kernel = plan.kernel(scaled=unscale != 1.0, own=own, summed=pending is not None)
        chunks = plan.joined if own and rows is plan.of else plan.chunks(rows, apart=not own)
        table = plan.table.array
        if self.several or present is not None:
            with deferred_signals:
                self._put(further)
                self._transform(plan, places, rows, table, scaled=unscale != 1.0)
                kernel.launch(places, self.buffers, table, chunks, self.size)
                return self.commit(present, norm, coefficient, nonfinite, moving, zero=own)
        # Without a call between launch and commit, Python runs no handler of a signal there.
        try:
            kernel.launch(places, self.buffers, table, chunks, self.size)
        except BaseException:  # of a handler: the kernel has run, or has not begun
            if table[0, PROCEEDS] == 0.0:
                self.steps, self.pending, self.nonfinite = self.steps + 1, None, nonfinite
            raise
        self.steps, self.pending, self.nonfinite = self.steps + 1, None, nonfinite
        return StepInfo(self.steps, self.groups.base.get("lr"), norm, coefficient, False, nonfinite)

    @through_gate
    def step_weighted(
        self, grads: Any, grad_scale: float, reduction: str, extra: Any, loss: Any, weight: float
    ) -> StepInfo:
        """Make a step of gradients with a weight: of one micro-batch, which is accumulated."""
        self.refuse_two(grads, weight)
        steps = self.steps
        self.accumulate(self.flat.grads if grads is None else grads, weight)
        try:
            return self.step(None, grad_scale, reduction, extra, loss)
        finally:
            if self.steps == steps:
                self.pending = None
            if grads is None and self.options.zero_grad:
                self.flat.zero_grad()

    def refuse_two(self, grads: Any, weight: float | None = None) -> None:
        """Raise ValueError where there are gradients, or a weight, besides those that have been accumulated."""
        if self.pending is not None and (grads is not None or weight is not None):
            name = "weight" if grads is None else "grads"
            raise ValueError(
                f"{name}: must be None while accumulated gradients are waiting; call step() without {name}, or "
                f"zero_grad() to drop them"
            )

    @through_gate
    def update(self, params: Any, grads: Any, grad_scale: float, extra: Any, loss: Any) -> StepInfo:
        """Make a step of other arrays: see `Optimizer.update`."""
        steps, before = self.steps, self.flat.arrays
        try:
            self.replace(params)
            return self.step(grads, grad_scale, "mean", extra, loss)
        except BaseException:
            if self.flat.arrays is not before and self.steps == steps:
                self.replace(self.flat.tree(before))
            raise

    def decide(
        self,
        plan: Plan,
        places: np.ndarray,
        rows: Sequence[int],
        unscale: float,
        present: list[bool] | None,
        grads: Any,
        *,
        own: bool,
        beside: tuple[float, bool] = ALONE,
    ) -> tuple[Any, Any, Any, tuple[Any, Any]]:
        """Measure the gradients, and decide what their norm decides.

        own : whether the gradients are in opt.grads. grads : those that are not, for errors. beside : `Taken.beside`.

        Returns the norm, the coefficient of clipping, which is written into the table, whether there is a step, and
        what `nonfinite` is after it; in a population, all of them are arrays, with one for each member.
        """
        partials, chunks, factor = self._partials(plan, places, rows, unscale, apart=not own)
        if self.flat.members is not None:
            return self._decided_of_members(plan, partials, chunks, factor, unscale, present, grads)
        return self._decided(plan, [(partials, chunks)], factor, unscale, present, grads, own=own, beside=beside)

    def _decided(
        self,
        plan: Plan,
        parts: Sequence[tuple[Any, np.ndarray]],
        factor: float,
        unscale: float,
        present: list[bool] | None,
        grads: Any,
        *,
        own: bool,
        beside: tuple[float, bool] = ALONE,
    ) -> tuple[float, float, bool, tuple[int, int]]:
        """The same from partial sums, each with its chunks, and a factor of the norm that is not in them."""
        found = [(self.backend.host(partials), chunks) for partials, chunks in parts]
        norm, finite = norm_of([partials for partials, _ in found])
        norm *= factor
        if beside is not ALONE:
            norm, finite = math.hypot(norm, beside[0]), finite and beside[1]
        if not self._proceeds(finite, present, grads, unscale, own=own):
            return norm, 1.0, False, self.nonfinite
        coefficient = self.options.coefficient(norm)
        if self.options.clip_norm_per_tensor is None:
            plan.table.clip(coefficient)
        else:
            coefficients = np.ones(len(plan.of))
            for partials, chunks in found:
                own_rows, norms = norms_of(partials, chunks)
                coefficients[own_rows] = self.options.coefficients(factor * norms)
            plan.table.clip(coefficients)
            coefficient = float(coefficients.min())
        return norm, coefficient, True, self._counted(finite)

    def _decided_of_members(
        self,
        plan: Plan,
        partials: Any,
        chunks: np.ndarray,
        factor: float,
        unscale: float,
        present: list[bool] | None,
        grads: Any,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[Any, Any]]:
        """What the norm of each member of a population decides about it."""
        members = self.flat.members
        assert members is not None
        found = self.backend.host(partials)
        norms, finite = norms_of_members(found, members)
        norms *= factor
        self._refuse_nonfinite(bool(finite.all()), present, grads, unscale)
        moving = finite if self.options.skips else np.ones(members, np.bool_)
        if self.options.clip_norm_per_tensor is None:
            coefficients = np.where(moving, self.options.coefficients_of_members(norms), 1.0)
            plan.table.clip(np.tile(coefficients, len(self.groups.list)))
        else:
            by_row = np.ones(len(plan.of))
            own_rows, of_parameters = norms_of(found, chunks)
            by_row[own_rows] = self.options.coefficients(factor * of_parameters)
            plan.table.clip(by_row)
            coefficients = np.where(moving, by_row.reshape(members, -1).min(axis=1), 1.0)
        return norms, coefficients, moving, self._counted(finite)

    def _moving(
        self, plan: Plan, present: list[bool] | None, proceeds: Any, *, own: bool
    ) -> tuple[Sequence[int], np.ndarray | None]:
        """The rows of what is updated, and which members of a population are; None where nothing is.

        proceeds : False where a network is not updated; of each member in a population whether it is.
        """
        if self.flat.members is None:
            return plan.of, None
        if not proceeds.any():
            self._skip(finite=proceeds, own=own)
            return plan.of, None
        if proceeds.all() and present is None:
            return plan.of, proceeds
        return self._rows_of(present, proceeds), proceeds

    def measure(self, taken: Taken) -> tuple[float, bool]:
        """The norm of these gradients, and whether all of them are finite: `Taken.beside` of another pipeline."""
        self.collect()
        plan = self.current_plan()
        rows: Sequence[int] = plan.of
        if taken.present is not None:
            rows = self._rows_of(taken.present)
            plan = self.plan
        plan.write_table(self.groups, self.steps + 1, self.sign)
        partials, _, factor = self._partials(plan, taken.places, rows, self.sign, apart=True)
        norm, finite = norm_of([self.backend.host(partials)])
        return norm * factor, finite

    def commit(
        self,
        present: Sequence[bool] | None,
        norm: float | None = None,
        coefficient: float = 1.0,
        nonfinite: tuple[int, int] | None = None,
        moving: np.ndarray | None = None,
        *,
        zero: bool = False,
    ) -> StepInfo:
        """Count the step that was launched, with signals deferred since before the launch.

        present : which parameters had a gradient; None: all. nonfinite : the counters after the step; None: as before.
        moving : of a population, which members were updated; None: all. zero : whether ``zero_grad=`` is about the
        gradients of the others.
        """
        accumulated = self.pending is not None
        self.steps += 1
        self.pending = None
        self.nonfinite = self.nonfinite if nonfinite is None else nonfinite
        skipped: Any = False
        if moving is not None and not moving.all():
            skipped = ~moving
            if zero and not accumulated and self.options.zero_grad:
                for grad in self.flat.grad_arrays:
                    grad[self.backend.adopt(skipped)] = 0
        if present is not None or skipped is not False:
            self.groups.miss(present, None if skipped is False else skipped)
        return self._info(norm, coefficient, skipped)

    def _step_on_device(
        self,
        device: DeviceSteps,
        plan: Plan,
        places: np.ndarray,
        present: list[bool] | None,
        rows: Sequence[int],
        unscale: float,
        grads: Any,
        further: Mapping[str, list[Any]],
        *,
        own: bool,
        beside: tuple[float, bool],
        capturing: bool,
    ) -> StepInfo:
        """From the table of hyperparameters on, where the device decides. own, beside : as for `decide`."""
        decides = device.decides and (present is None or not self.options.skips) and beside is ALONE
        if device.in_flight and not decides:
            self.collect()
        candidates = None
        if device.in_flight and self.options.skips:
            candidates = self._candidates(plan, unscale)
        elif not capturing:
            device.candidates = None
            plan.write_table(self.groups, self.steps + 1, unscale)
        norm, coefficient, decision, nonfinite = None, 1.0, None, self.nonfinite
        moving: np.ndarray | None = None
        scaled = unscale != 1.0
        with deferred_signals:  # a device that decides counts skipped steps
            table = device.backend.table(plan.table.array)
            if self.measures and decides:
                partials, _, factor = self._partials(plan, places, rows, unscale, apart=not own, table=table)
                decision = device.decide(table, candidates, partials, factor)
            elif self.measures:
                norm, coefficient, proceeds, nonfinite = self.decide(
                    plan, places, rows, unscale, present, grads, own=own, beside=beside
                )
                if proceeds is not True:
                    rows, moving = self._moving(plan, present, proceeds, own=own)
                    if moving is None:
                        return self._info(norm, skipped=True)
                table = plan.table.array
            self._put(further)
            self._transform(plan, places, rows, table, scaled=scaled)
            kernel = plan.kernel(scaled=scaled, own=own, summed=self.pending is not None)
            chunks = plan.chunks(rows, apart=not own)
            kernel.launch(places, self.buffers, table, chunks, self.size)
            if capturing:
                device.recorded = Recorded(table, rows, scaled, decision)
                return self._info(norm, coefficient)
            info = self.commit(present, norm, coefficient, nonfinite, moving, zero=own)
            return info if decision is None else self._in_flight(info, decision)

    @through_gate
    def replay(self, grad_scale: float) -> StepInfo:
        """Count a captured step that is about to be replayed: see `Optimizer.prepare_replay`."""
        self.refuse_while_held("prepare_replay")
        device = self.device
        if device is None or device.recorded is None:
            raise RuntimeError("prepare_replay(): no step() was captured in a CUDA graph")
        recorded, plan = device.recorded, self.current_plan()
        unscale = self.sign * plan.table.unscale(grad_scale)
        if unscale != self.sign and not recorded.scaled:
            raise ValueError(
                f"grad_scale: must be 1 as in the captured step, got {grad_scale!r}; capture a step with another one"
            )
        if plan.table.array.shape != recorded.table.shape or plan.of != recorded.rows:
            raise RuntimeError("prepare_replay(): the groups are not those of the captured step: capture it again")
        plan.write_table(self.groups, self.steps + 1, unscale)
        # A table that was sent and not counted is sent again: nothing need be deferred. Then one line counts.
        self.backend.copy(recorded.table, plan.table.array)
        self.steps, self.pending = self.steps + 1, None
        info = self._info()
        return info if recorded.decision is None else self._in_flight(info, recorded.decision)

    def _candidates(self, plan: Plan, unscale: float) -> np.ndarray:
        """The table of the next step for each number of steps in flight that the device may have skipped.

        All but the first are those of the step before: to change a hyperparameter waits for the steps in flight.
        """
        device, step = self.device, self.steps + 1
        assert device is not None
        before, known = device.candidates, 0
        if (
            before is not None
            and before.version == plan.version
            and before.unscale == unscale
            and before.step == step - 1
        ):
            tables, known = before.tables, len(device.in_flight)
            tables[1:] = tables[:-1]
        else:
            tables = np.empty((MOST_IN_FLIGHT + 1, *plan.table.array.shape), plan.table.array.dtype)
        for skipped in range(len(device.in_flight) - known, -1, -1):  # the most likely one remains
            plan.write_table(self.groups, step - skipped, unscale)
            tables[skipped] = plan.table.array
        device.candidates = Candidates(plan.version, unscale, step, tables)
        return tables

    def _without_frozen(self, present: list[bool] | None) -> list[bool]:
        moving = [not self.groups.list[number].frozen for number in self.groups.of]
        return moving if present is None else [here and free for here, free in zip(present, moving, strict=True)]

    def _rows_of(self, present: list[bool] | None, moving: np.ndarray | None = None) -> Sequence[int]:
        """The rows of the table of the parameters that are present, after splitting every group of which some are.

        present : None: all. moving : of a population, the members that are; None: all.
        """
        if self.flat.members is None:
            assert present is not None
            mask = tuple(present)
        else:
            here = np.ones(len(self.flat.paths), np.bool_) if present is None else np.array(present)
            each = np.ones(self.flat.members, np.bool_) if moving is None else moving
            mask = tuple((each[:, None] & here).reshape(-1).tolist())
        rows = self.plan.rows.get(mask)
        if rows is None:
            if present is not None:
                self.groups.split([k for k, here in enumerate(present) if here])
            rows = self.current_plan().keep_rows(mask)
        return rows

    def _partials(
        self,
        plan: Plan,
        places: np.ndarray,
        rows: Sequence[int],
        unscale: float,
        *,
        apart: bool = False,
        table: Any = None,
    ) -> tuple[Any, np.ndarray, float]:
        """The partial sums of the squares of the gradients, their chunks, and a factor of the norm not in them."""
        if self.pending is not None and self.options.clip_value is None and not self.groups.frozen:
            return self.pending.partials, plan.blocks, abs(unscale)
        kernel = plan.norm_kernel(scaled=unscale != 1.0, summed=self.pending is not None)
        chunks = plan.chunks(rows, whole=True, apart=apart)
        table = plan.table.array if table is None else table
        return kernel.launch(places, table, chunks, self.size), chunks, 1.0

    def _put(self, further: Mapping[str, list[Any]]) -> None:
        """Copy the further inputs of a step into the states that take them, for the parameters that have them."""
        for name, leaves in further.items():
            views = self.flat.state_views(self.states[self.rule.states.index(name)])
            whole = [own if leaf is None else leaf for own, leaf in zip(self.flat.arrays, leaves, strict=True)]
            for view, leaf, array in zip(views, leaves, self.flat.held(whole), strict=True):
                if leaf is not None:
                    self.backend.copy(view, array)

    def _transform(self, plan: Plan, places: np.ndarray, rows: Sequence[int], table: Any, *, scaled: bool) -> None:
        """Turn the gradients of matrices into the directions of their update, where the rule treats any as such."""
        whole = self.rule.matrixwise
        if whole is None:
            return
        by_group = [group.at_step(self.steps) for group in self.groups.list]
        values = [by_group[number] for number in self.groups.of]
        count, members = len(values), self.flat.members
        chosen = tuple([row >= 0 and bool(values[place % count][whole.chosen]) for place, row in enumerate(rows)])
        matrices = self.fit_matrices()
        kernel = plan.direction_kernel(scaled=scaled)
        kernel.launch(places, self.states, table, plan.dense_chunks(chosen, rows), self.size)
        views = {
            name: self.flat.state_views(buffer)
            for name, buffer in zip(self.rule.states, self.states, strict=True)
            if name == whole.state or name in self.rule.handed
        }
        for place, here in enumerate(chosen):
            if here:
                member, k = divmod(place, count)
                t = self.steps + 1 - self.groups.list[self.groups.of[k]].missed
                if members is None:
                    matrices.transform(k, views, t, values[k])
                else:
                    matrices.transform(k, views, int(t[member]), values[k], member)

    def _proceeds(self, finite: bool, present: Sequence[bool] | None, grads: Any, unscale: float, *, own: bool) -> bool:
        """Whether to make the step.

        grads : a gradient per parameter, for the error; None: those in opt.grads. own : they are in opt.grads.
        """
        if self.options.nonfinite == "propagate":
            return True
        self._refuse_nonfinite(finite, present, grads, unscale)
        if finite or not self.options.skips:
            return True
        self._skip(finite=finite, own=own)
        return False

    def _refuse_nonfinite(self, finite: bool, present: Sequence[bool] | None, grads: Any, unscale: float) -> None:
        """Raise FloatingPointError where gradients must be finite and are not. grads : as for `_proceeds`."""
        if not finite and self.options.nonfinite == "raise":
            factor = self.flat.compute.type(unscale)
            found = self.flat.grad_arrays if grads is None else grads
            with np.errstate(over="ignore", invalid="ignore"):
                for k, grad in enumerate(found):
                    if (present is None or present[k]) and grad is not None and not np.isfinite(factor * grad).all():
                        self.refuse_gradient(k)

    def refuse_gradient(self, k: int) -> None:
        """Raise FloatingPointError for the gradient of parameter number k."""
        raise FloatingPointError(
            f"gradient {self.flat.paths[k]!r} holds NaN or infinity; nothing was updated. nonfinite='skip' would skip "
            f"such steps"
        )

    def _skip(self, *, finite: Any, own: bool = True) -> None:
        """Count a step that is skipped. own : whether the gradients are in opt.grads."""
        with deferred_signals:
            self.nonfinite = self._counted(finite)
            if own and self.pending is None and self.options.zero_grad:
                self.flat.zero_grad()
            self.pending = None

    def _counted(self, finite: Any) -> tuple[Any, Any]:
        """What `nonfinite` is after a step whose gradients are finite or not."""
        return self.nonfinite if self.options.nonfinite == "propagate" else counted(self.nonfinite, finite=finite)

    def _info(self, norm: Any = None, coefficient: Any = 1.0, skipped: Any = False) -> StepInfo:
        members = self.flat.members
        if members is not None:
            coefficient, skipped = np.ones(members) * coefficient, np.zeros(members, np.bool_) | skipped
        return StepInfo(self.steps, self.groups.base.get("lr"), norm, coefficient, skipped, self.nonfinite)

    # --- steps in flight on a device ----------------------------------------------------------------------------------

    def _in_flight(self, info: StepInfo, decision: Decision) -> StepInfo:
        """The info of the step just launched, whose results are fetched from the device when they are read."""
        assert self.device is not None
        if self.options.waits:
            self.device.launched(info, decision, self.nonfinite)
        else:
            step, nonfinite = self.steps, self.nonfinite
            info.await_results(lambda pending: pending.complete(*decision.read()[:2], step, False, nonfinite))
        return info

    def collect(self, most: int = 0) -> None:
        """Take the results of steps in flight; wait until at most `most` of them are still in flight."""
        device = self.device
        if device is None:
            return
        with deferred_signals:
            device.collect(most)
            if device.collected:
                self.steps -= device.skipped
                self.nonfinite = device.nonfinite
                device.collected, device.skipped = False, 0

    # --- gradients that are accumulated -------------------------------------------------------------------------------

    @through_gate
    def accumulate(self, grads: Any, weight: float) -> None:
        """Add gradients to those of the next step: see `Optimizer.accumulate`."""
        self.refuse_while_held("accumulate")
        if self.device is not None:
            self.device.check_place(self.flat.device)
        number = self.checked_weight(weight)
        given = self.intake.take_to_add(grads)
        self.add_up(given, self.present_of(given, number), number)

    def checked_weight(self, weight: Any) -> float:
        """The weight of gradients as a float; TypeError or ValueError where it is out of range."""
        number: float = POSITIVE_OR_ZERO.check("weight", weight)
        if number != 0.0 and not is_normal(number, self.flat.compute):
            raise ValueError(f"weight: must be in the range of {self.flat.compute}, got {weight!r}")
        return number

    def present_of(self, given: Taken, weight: float) -> np.ndarray:
        """For each parameter whether gradients of this weight have one."""
        present = np.ones(len(self.flat.paths), np.bool_) if given.present is None else np.array(given.present)
        return present & (weight != 0.0)  # 0 times NaN, the mean over no samples, is no part of the sum

    @property
    def adder(self) -> Adder:
        """What is done besides, where gradients are added up."""
        return Adder(self.measures and self.options.clip_value is None, self.options.nonfinite == "zero")

    def new_pending(self) -> Pending:
        """No gradients yet."""
        flat = self.flat
        blocks = sum(-(-size // BLOCK) for size in flat.split.sizes)
        width = sums_per_block(flat.compute)
        partials = self.backend.zeros(width * blocks, np.dtype(np.float64)).reshape(blocks, width)
        return Pending(len(flat.paths), partials)

    def add_up(self, given: Taken, present: np.ndarray, weight: float) -> None:
        """Add gradients that were checked to those of the next step. present : as `present_of` returned it."""
        flat, plan = self.flat, self.current_plan()
        places = flat.split.places(self._places_of_sums()[0][:, 1], given.places[:, 1])
        pending = self.new_pending() if self.pending is None else self.pending
        chunks, factor = plan.blocks, np.array([weight, 0.0], flat.compute)
        overwrite, partials = ~pending.present, pending.partials
        each, written = (np.tile(mask, flat.members or 1) for mask in (present, overwrite))
        try:
            self.backend.add(
                *(places, each, written, factor, chunks, partials, self.adder, flat.compute), self.formats.params
            )
        finally:  # also after an exception of a signal's handler, as in `step`
            if factor[1] != 0.0:
                pending.present |= present
                pending.weight += weight
                self.pending = pending

    def _places_of_sums(self) -> tuple[np.ndarray, list[Any]]:
        """Where accumulated gradients are, and views of them: in a buffer apart from opt.grads, which is the user's."""
        flat = self.flat
        if self.sums is None:
            self.sums = flat.new_buffer(flat.compute)
        if self._sums_at is None:
            views = flat.views(self.sums)
            self._sums_at = flat.places_of(flat.addresses, flat.addresses_of(views)), views
        return self._sums_at

    def zero_grad(self) -> None:
        """Zero opt.grads, and drop what was accumulated."""
        if self.pending is None:
            self.flat.zero_grad()
        else:
            with deferred_signals:
                self.flat.zero_grad()
                self.pending = None

    # --- rows ---------------------------------------------------------------------------------------------------------

    @through_gate
    def step_rows(
        self, rows: Mapping[str, tuple[Any, np.ndarray]], grads: Any = None, grad_scale: float = 1.0
    ) -> StepInfo:
        """Make a step in which only some rows have a gradient: see `Optimizer.step_rows`."""
        self.refuse_while_held("step_rows")
        self._refuse_members("step_rows")
        if not self.formats.plain:
            raise ValueError(
                "step_rows(): must have parameters and states of float32 or float64, got 16 bits; use step()"
            )
        if self.gradients_in:
            self._check_context()
        if self.device is not None:
            self.device.check_place(self.flat.device)
        if self.pending is not None:
            raise ValueError("step_rows(): accumulated gradients are waiting; call step(), or zero_grad() to drop them")
        plan = self.current_plan()
        touched = self.rows.check(rows, self.groups.values_of)
        unscale = self.sign * plan.table.unscale(grad_scale)
        own = self.device is not None
        places, leaves = self.places_of_params, [None] * len(self.flat.paths)
        if grads is not None:
            places, _, kept, _ = grads if type(grads) is Taken else self.intake.take(grads)
            leaves = list(kept)
        for k in touched:
            if leaves[k] is not None:
                path = self.flat.paths[k]
                raise ValueError(f"grads: must be None for {path!r}, which is in rows as well")
            if self.groups.list[self.groups.of[k]].frozen:
                raise ValueError(f"rows[{self.flat.paths[k]!r}]: must not be frozen; set frozen=False before")
        for k in touched:
            self.rows.start_clock(k, plan)
        dense = [leaf is not None for leaf in leaves]
        if self.groups.frozen:
            dense = self._without_frozen(dense)
        present = [here or k in touched for k, here in enumerate(dense)]
        mapped = plan.of if all(present) else self._rows_of(present)
        plan = self.plan
        self.collect()
        if self.born.waiting:
            self.begin(present)
        plan.write_table(self.groups, self.steps + 1, unscale)
        chunks = plan.dense_chunks(tuple(dense), mapped)
        norm, coefficient, nonfinite = None, 1.0, self.nonfinite
        table = plan.table.array
        if self.measures:
            measure = plan.norm_kernel(scaled=unscale != 1.0)
            parts = [(measure.launch(places, table, chunks, self.size), chunks)]
            for k, (_, g) in touched.items():
                run, run_chunks = one_run(self.backend.address(g), g.size, mapped[k])
                parts.append((measure.launch(run, table, run_chunks, g.size), run_chunks))
            found = [touched[k][1] if k in touched else leaf for k, leaf in enumerate(leaves)]
            norm, coefficient, proceeds, nonfinite = self._decided(plan, parts, 1.0, unscale, present, found, own=own)
            if not proceeds:
                return self._info(norm, skipped=True)
        with deferred_signals:
            if len(chunks):
                kernel = plan.kernel(scaled=unscale != 1.0, own=own)
                kernel.launch(places, self.buffers, table, chunks, self.size)
            for k, (indices, row_grads) in touched.items():
                group, line = self.groups.list[self.groups.of[k]], table[mapped[k]]
                flags = {**self.options.flags, "unscale": unscale != 1.0, "zero_grad": False}
                self.rows.update(k, indices, row_grads, line, flags, plan)
                self.clocks[k].tick(indices, line.copy(), self.steps + 1 - group.missed, group.point(self.steps))
            return self.commit(None if all(present) else present, norm, coefficient, nonfinite)

    @through_gate
    def read_rows(self, path: str, indices: Any) -> np.ndarray:
        """Rows of a parameter, brought up to date: see `Optimizer.read_rows`."""
        self.refuse_while_held("read_rows")
        self._refuse_members("read_rows")
        k = self.flat.matrix(path)
        found = check_indices("indices", indices, self.flat.shapes[k][0], self.backend)
        if k in self.clocks:
            self.rows.catch_up(k, np.unique(found), self.current_plan())
        rows: np.ndarray = self.flat.arrays[k][self.backend.adopt(found)]
        return rows

    def _refuse_members(self, what: str) -> None:
        if self.flat.members is not None:
            raise ValueError(f"{what}(): must be of one network, got a population of members={self.flat.members}")

    def flush_rows(self) -> None:
        """Bring every row up to date that row-wise steps have left behind."""
        self.collect()
        for k in list(self.clocks):
            self.rows.stop(k, self.plan)

    # --- hyperparameters ----------------------------------------------------------------------------------------------

    def set_hyper(self, name: str, value: Any, members: tuple[int, ...] | None = None) -> None:
        """Set a hyperparameter of the optimizer, or of some of its parameters.

        Raises TypeError or ValueError where the value is out of range; nothing is changed then.
        """
        if self.clocks and name != "lr":
            self.flush_rows()
        elif self.device is not None:
            self.collect()
        if name in (LR_SCALE, FROZEN):
            checked = check_change(self.rule, {name: value}, "", self.flat.compute)[name]
        elif callable(value):
            checked = self.rule.check_all(
                {name: value}, step=self.steps, dtype=self.flat.compute, members=self.flat.members
            )[name]
        else:
            checked = self.rule.check(name, value, dtype=self.flat.compute, members=self.flat.members)
        whole = self.rule.matrixwise
        if whole is not None and name == whole.chosen:
            self._refuse_matrices(checked, members)
        if members is None:
            self.groups.assign(name, checked)
        else:
            if whole is not None:
                changes = self.groups.changes
                paths = [self.flat.paths[k] for k in members]
                check_acting(whole, paths, [{**changes[k], name: checked} for k in members], self.groups.base)
            self._override(members, name, checked)
        self._begin_again(name)
        if whole is not None and name == whole.chosen:
            self.fit_matrices()

    @through_gate
    def _override(self, members: tuple[int, ...], name: str, value: Any) -> None:
        """Set a checked hyperparameter of some parameters, which may split groups."""
        self.groups.override(members, name, value)

    def _begin_again(self, name: str) -> None:
        """After a change of a hyperparameter, let states that begin at it begin again, before the first update."""
        if self.rule.initial and (name == LR_SCALE or name in self.rule.initial.values()):
            self._initialise(self._without_updates())

    def _refuse_matrices(self, chosen: Any, members: Sequence[int] | None) -> None:
        """Refuse to treat these parameters as matrices where one is not; None: those without a choice of their own."""
        assert self.rule.matrixwise is not None
        name = self.rule.matrixwise.chosen
        numbers = (
            [k for k, change in enumerate(self.groups.changes) if name not in change] if members is None else members
        )
        paths, shapes = [self.flat.paths[k] for k in numbers], [self.flat.member_shapes[k] for k in numbers]
        check_matrices(self.rule, [chosen] * len(paths), paths, shapes)

    @through_gate
    def release_hyper(self, name: str, members: tuple[int, ...]) -> None:
        """Let some parameters have the optimizer's hyperparameter again."""
        if self.rule.matrixwise is not None and name == self.rule.matrixwise.chosen:
            self._refuse_matrices(self.groups.base[name], members)
        self.flush_rows()
        self.groups.release(members, name)
        self._begin_again(name)
        self.fit_matrices()

    @through_gate
    def add(self, params: Any, hyper: Mapping[str, Any]) -> None:
        """Add parameters, with states as at the beginning: see `Optimizer.add`."""
        self.refuse_while_held("add")
        if self.pending is not None:
            raise RuntimeError("add(): accumulated gradients are waiting; call step(), or zero_grad() to drop them")
        self.flush_rows()
        before, old, old_numbers = self.flat, self.views(), {path: k for k, path in enumerate(self.flat.paths)}
        flat = before.extended(params, (*self.buffers, *before.grad_buffers) if before.in_place else ())
        flat = self.formats.laid_out(flat)
        added = [k for k, path in enumerate(flat.paths) if path not in old_numbers]
        changes, missed = self.groups.changes, self.groups.missed
        new_changes = [changes[old_numbers[path]] if path in old_numbers else dict(hyper) for path in flat.paths]
        mark_matrices(self.rule, [new_changes[k] for k in added], [flat.member_shapes[k] for k in added])
        for k in added:
            new_changes[k] = check_change(
                self.rule, new_changes[k], f"{flat.paths[k]}: ", flat.compute, self.steps, flat.members
            )
        if self.rule.matrixwise is not None:
            check_acting(self.rule.matrixwise, flat.paths, new_changes, self.groups.base)
        groups = Groups(
            self.rule,
            flat.compute,
            self.groups.base,
            new_changes,
            [missed[old_numbers[path]] if path in old_numbers else self.steps for path in flat.paths],
            flat.members,
        )
        self._check_matrices(groups, flat)
        groups.version = self.groups.version + 1
        saved = dict(self.__dict__)
        try:
            self.flat, self.groups, self.size, self.sums = flat, groups, flat.size, None
            self.plan = self._planned()
            self._make_states()
            for name, views in self.views().items():
                for path, view in zip(flat.paths, views, strict=True):
                    if path in old_numbers:
                        view[...] = old[name][old_numbers[path]]
            self._initialise(added)
            self._collect_buffers()
        except BaseException:
            self.__dict__.update(saved)
            raise

    # --- several processes: see `fastopt.step.together` ---------------------------------------------------------------

    writes = True
    """Whether this process writes files."""

    def spread(self) -> None:
        """Send the parameters that this process has written to the others."""

    def refuse_parts(self, what: str) -> None:
        """Raise RuntimeError where this process holds the states of a part of the parameters only."""

    def begin_together(self, call: str) -> None:
        """Raise on every process where not all of them call this."""

    @contextmanager
    def together(self, call: str) -> Iterator[list[tuple[str, bytes]]]:
        """A block that raises on every process where it raises on one."""
        yield []

    # --- parameters held elsewhere ------------------------------------------------------------------------------------

    def refuse_while_held(self, what: str) -> None:
        """Raise RuntimeError inside a ``with`` block that holds the parameters elsewhere."""
        if self.held:
            raise RuntimeError(
                f"{what}() inside `with opt.{self.held}()`: leave the block first, it restores the parameters"
            )

    @contextmanager
    def moved(self, shift: Rule, context: str) -> Iterator[Any]:
        """Hold the parameters where `shift`, a rule of the same states and hyperparameters, moves them.

        context : the method that does so.
        """
        self.refuse_while_held(context)
        if self.device is not None:
            self.device.check_place(self.flat.device)
        self.collect()
        plan = self.current_plan()
        plan.write_table(self.groups, self.steps + 1, 1.0)
        kernel = plan.moved_kernel(shift)
        chunks = plan.chunks(plan.of, whole=True)
        own = chunks.own if type(chunks) is Cut else chunks
        arguments = self.places_of_params, self.kernel_buffers(ema=False), plan.table.array, own, self.size

        def move() -> None:
            kernel.launch(*arguments)
            self.spread()

        with self.elsewhere(context, move):
            yield self.flat.params

    @contextmanager
    def at_average(self, context: str) -> Iterator[Any]:
        """Hold the parameters at their moving average. context : the method that does so."""

        def move() -> None:
            views = self.flat.state_views(self.average)
            for own, view in zip(self.flat.held(self.flat.arrays), views, strict=True):
                self.backend.copy(own, view)
            self.spread()

        with self.elsewhere(context, move):
            yield self.flat.params

    @contextmanager
    def ascended(self, rho: float, grads: Any, context: str) -> Iterator[Any]:
        """Hold the parameters a step of length rho further along the gradients: see `Optimizer.ascent`."""
        self.refuse_while_held(context)
        if self.formats.keeps or self.flat.compute != self.flat.dtype:
            raise ValueError(f"{context}(): must have parameters of float32 or float64, got {self.flat.dtype}")
        if self.pending is not None:
            raise RuntimeError(f"{context}(): gradients have been accumulated; step() or zero_grad() first")
        if self.device is not None:
            self.device.check_place(self.flat.device)
        self.collect()
        flat, plan = self.flat, self.current_plan()
        taken = Taken(flat.places, None, None) if grads is None else self.intake.take(grads)
        present = self._without_frozen(taken.present) if self.groups.frozen else taken.present
        here = np.ones(len(flat.paths), np.bool_) if present is None else np.array(present)
        here = np.tile(here, flat.members or 1)
        rows = [row if own else -1 for row, own in zip(plan.of, here.tolist(), strict=True)]
        chunks = plan.chunks(rows, whole=True, apart=True)
        measuring = self.backend.norm(flat.compute, Features())
        partials = self.backend.host(measuring.launch(taken.places, plan.table.array, chunks, self.size))
        if flat.members is not None:
            norms, _ = norms_of_members(partials, flat.members)
            weights = np.array([self._length(rho, norm) for norm in norms.tolist()], flat.compute)
            with self.elsewhere(context, lambda: self._move_members(weights, taken, present)):
                yield flat.params
            return
        norm, _ = norm_of([partials])
        factor, none = np.array([self._length(rho, norm), 0.0], flat.compute), np.zeros(len(here), np.bool_)
        unused = self.backend.empty((1, sums_per_block(flat.compute)), np.dtype(np.float64))
        arguments = taken.places, here, none, factor, chunks, unused, Adder(False, False), flat.compute
        with self.elsewhere(context, lambda: self.backend.add(*arguments)):
            yield flat.params

    def _length(self, rho: float, norm: float) -> float:
        """What gradients of this norm are multiplied by, to go a way of length rho."""
        weight = self.sign * rho / norm if norm != 0.0 else 0.0
        return 0.0 if abs(weight) > np.finfo(self.flat.compute).max else weight

    def _move_members(self, weights: np.ndarray, taken: Taken, present: Sequence[bool] | None) -> None:
        """Add to the parameters of each member of a population its own multiple of their gradients."""
        in_buffer = taken.kept is None or self.device is not None
        leaves = self.flat.grad_arrays if in_buffer else list(taken.kept)
        for k, (array, grad) in enumerate(zip(self.flat.arrays, leaves, strict=True)):
            if present is None or present[k]:
                array += self.backend.adopt(weights.reshape(-1, *[1] * (array.ndim - 1))) * grad

    @contextmanager
    def elsewhere(self, context: str, move: Callable[[], None]) -> Iterator[None]:
        """Move the parameters by `move`, and restore them at the end of the block.

        Where a handler of a signal raises just as the block is entered or left, before a line of this function runs,
        Python does not come back to it: the parameters are restored when the exception is dropped, and with it the
        generator.
        """
        with self.gate.take(context):
            self.refuse_while_held(context)
            self.flush_rows()
            self.begin()
            backup = [array.copy() for array in self._parameters()]
        try:
            try:
                with deferred_signals:
                    self.held = context
                    move()
                yield
                if context == self.gradients_in:
                    self.entered_at = self.steps
            finally:
                self._put_back(backup)
        finally:
            if self.held:  # an interrupt came before its signal was deferred
                self._put_back(backup)

    def _put_back(self, backup: Sequence[Any]) -> None:
        with deferred_signals:
            for own, array in zip(self._parameters(), backup, strict=True):
                self.backend.copy(own, array)
            self.held = ""

    def _parameters(self) -> list[Any]:
        """The arrays that hold the parameters: with what is kept of them besides."""
        return [*self.flat.arrays, *(() if self.kept is None else (self.kept,))]

    def _check_context(self) -> None:
        """Warn once where the context of the gradients was not entered since the last step."""
        if 0 < self.steps != self.entered_at:  # in the first step the velocity is 0: both are one
            warn_caller(
                f"step(): gradients must be computed inside `with opt.{self.gradients_in}():`, which was not entered "
                f"since the last step; otherwise rule {self.rule.name!r} is another algorithm"
            )
            self.gradients_in = None

    def put_params(self, arrays: Sequence[Any]) -> None:
        """Write values into the parameters."""
        for own, array in zip(self.flat.arrays, arrays, strict=True):
            self.backend.copy(own, array)

    def set_params(self, params: Any) -> None:
        """Write values into the parameters: see `Optimizer.set_params`."""
        self.refuse_while_held("set_params")
        arrays = self.flat.check_values(params)
        with self.gate.take("set_params"), deferred_signals:
            self.flush_rows()
            self.put_params(arrays)
            if self.formats.keeps == REST:  # MASTER is not used where its rounding is not the parameter
                self.kept.fill(0)
            self.born.shown.clear()
            self.born.begin(self.flat, self.views(), range(len(arrays)))

    def restart(self) -> None:
        """Begin again from the parameters as they are: see `Optimizer.restart`."""
        self.refuse_while_held("restart")
        with self.gate.take("restart"), deferred_signals:
            self.flush_rows()
            for buffer in self.buffers:
                buffer.fill(0)
            self.matrices.clear()
            self.steps, self.nonfinite, self.pending, self.entered_at = 0, self._no_steps(), None, -1
            self.groups.regroup(self.groups.changes, [0] * len(self.flat.paths))
            self.born.shown.clear()
            self._initialise(range(len(self.flat.paths)))
            self._collect_buffers()
            if self.device is not None:
                self.device.recorded = None

    # --- populations --------------------------------------------------------------------------------------------------

    @through_gate
    def copy_member(self, source: Any, target: Any) -> None:
        """Let members continue as copies of others: see `Optimizer.copy_member`. source, target : arrays of indices."""
        self.refuse_while_held("copy_member")
        self.collect()
        arrays = [array for own in self.views().values() for array in own]
        with deferred_signals:
            there, here = self.backend.adopt(source), self.backend.adopt(target)
            for array in (*self.flat.arrays, *arrays):
                array[here] = array[there]
            self.groups.copy_missed(source, target)

    @property
    def nbytes(self) -> Memory:
        """What is held: see `Optimizer.nbytes`."""
        flat = self.flat
        arrays = self.fit_matrices().arrays.values()
        return Memory(
            sum(buffer.nbytes for buffer in flat._buffers or flat.arrays),
            sum(buffer.nbytes for buffer in flat.grad_buffers),
            sum(buffer.nbytes for buffer in (*self.buffers, *[array for own in arrays for array in own])),
            0 if self.sums is None else self.sums.nbytes,
        )

    # --- state --------------------------------------------------------------------------------------------------------

    def views(self) -> dict[str, list[Any]]:
        """What is kept for each parameter, by name: the rule's states and matrices, and the average."""
        buffers = dict(zip(self.rule.states, self.states, strict=True))
        if self.average is not None:
            buffers[EMA] = self.average
        if self.kept is not None:
            buffers[self.formats.keeps] = self.kept
        coded = dict(zip(self.formats.coded, self.units, strict=True))
        views = {name: self.flat.state_views(own) for name, own in buffers.items() if name not in coded}
        for name, units in coded.items():
            views[name], views[unit_of(name)] = coded_views(self.flat.layout, buffers[name], units)
        for (name, over), numbers in zip(self.rule.over.items(), self.numbers, strict=True):
            views[name] = self.flat.number_views(numbers, over)
        return views | self.fit_matrices().arrays

    def shown(self) -> dict[str, list[Any]]:
        """The same, for who reads the state as a whole."""
        return self.views()

    def replace(self, params: Any) -> bool:
        """Update other arrays from now on: see `FlatParams.replace`."""
        if self.clocks:
            self.flush_rows()
        self.refuse_while_held("update")
        own = (*self.buffers, *self.flat.grad_buffers)
        return self.flat.replace(params, own)

    def restore(self, arrays: Mapping[str, Sequence[Any]], steps: int, nonfinite: tuple[int, int]) -> None:
        """Continue from copies of these arrays, which are those of `views` by name and parameter.

        Signals must be deferred until the groups are restored as well.
        """
        for name, views in self.views().items():
            for view, array in zip(views, self._own_of(name, arrays[name]), strict=True):
                self.backend.copy(view, array)
        self.steps = steps
        self.entered_at = -1
        self.nonfinite = nonfinite
        self.pending = None
        self.born.shown.clear()
        self.born.wait(len(self.flat.paths))
        if self.device is not None:
            self.device.recorded = None

    def _own_of(self, name: str, arrays: Sequence[Any]) -> Sequence[Any]:
        """Of arrays that are to be restored, what this process holds."""
        return arrays

    def matrices_for(self, values: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> Matrices:
        """The matrices that there are with other hyperparameters: see `Matrices.fitted_to`."""
        return self.matrices.fitted_to(values, changes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        """A pipeline at the same point, on memory of its own; the rule and schedules are shared."""
        with self.gate.take("copy.deepcopy"):
            return self._copied(memo)

    def _copied(self, memo: dict[int, Any]) -> Pipeline:
        self.refuse_while_held("deepcopy")
        self.flush_rows()
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.gate = Gate()
        twin.flat = self.formats.laid_out(copy.deepcopy(self.flat, memo))
        twin._make_states()
        for own, copied in zip(self.buffers, twin.kernel_buffers(), strict=True):
            copied[...] = own
        for name, matrices in self.fit_matrices().arrays.items():
            for own, copied in zip(matrices, twin.matrices.arrays[name], strict=True):
                copied[...] = own
        twin.groups = Groups(
            *(self.rule, self.flat.compute, self.groups.base, self.groups.changes, self.groups.missed),
            self.flat.members,
        )
        twin.pending = copy.deepcopy(self.pending, memo)
        twin.born = copy.deepcopy(self.born)
        if self.sums is not None:
            twin.sums = twin.flat.new_buffer(twin.flat.compute)
            twin.sums[...] = self.sums
        if self.device is not None:
            twin.device = DeviceSteps(self.device.backend, self.rule, self.options, self.flat.members)
        twin.plan = twin._planned()
        twin._collect_buffers()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: everything but plan, kernels and addresses, which another process makes again."""
        with self.gate.take("pickle"):
            self.refuse_while_held("pickle")
            self.flush_rows()
            groups = self.groups
            return {
                "made": (self.rule, self.flat, self.options, groups.base, groups.changes),
                "missed": groups.missed,
                "restored": (self.views(), self.steps, self.nonfinite),
                "sums": self.sums,
                "rest": {name: getattr(self, name) for name in ("pending", "born", "gradients_in", "entered_at")},
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["made"])  # type: ignore[misc]
        self.groups.regroup(self.groups.changes, state["missed"])
        self.restore(*state["restored"])
        if state["sums"] is not None:
            self.sums = self.flat.new_buffer(self.flat.compute)
            self.backend.copy(self.sums, state["sums"])
        self.__dict__.update(state["rest"])
