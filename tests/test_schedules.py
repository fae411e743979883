"""Specification of fastopt.schedules: formulas, shapes, joins, value semantics, refusals, and torch's schedulers."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastopt import schedules
from fastopt.schedules import (
    Schedule,
    constant,
    cosine,
    cyclical,
    exponential,
    inverse_time,
    linear,
    one_cycle,
    piecewise,
    polynomial,
    sequence,
    step_decay,
    warmup,
)


def square_root(step: int) -> float:
    """A user-defined schedule: any function of the step (at module level, so that it can be pickled)."""
    return 1.0 / math.sqrt(step + 1)


EXAMPLES: list[Schedule] = [
    constant(0.1),
    exponential(0.1, 0.05),
    inverse_time(0.1, 0.05),
    cyclical(0.01, 0.1, 8),
    cyclical(0.01, 0.1, 7, mode="triangular2"),
    cyclical(0.01, 0.1, 8, mode="exp_range", gamma=0.99),
    step_decay(0.1, 0.5, 10),
    piecewise([5, 9], [0.1, 0.2, 0.05]),
    linear(0.1, 0.0, 20),
    polynomial(0.1, 0.01, 20, power=2.0),
    cosine(0.1, 0.001, 20),
    one_cycle(0.1, 30),
    one_cycle(0.1, 30, pct_start=0.45, anneal="linear"),
    warmup(cosine(0.1, 0.0, 20), 5),
    warmup(square_root, 5),
    sequence([linear(0.0, 0.1, 5), 0.1, cosine(0.1, 0.0, 9)], [5, 10]),
]
every_schedule = pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda schedule: repr(schedule).split(" at 0x")[0])

rates = st.floats(0.0, 10.0)
lengths = st.integers(1, 1000)
steps_taken = st.integers(0, 10**9)


def values(schedule: Callable[[int], float], count: int) -> list[float]:
    return [schedule(t) for t in range(count)]


# --- all schedules ----------------------------------------------------------------------------------------------------


def test_every_public_schedule_has_an_example_here() -> None:
    made = {type(schedule).__name__ for schedule in EXAMPLES}
    assert made == set(schedules.__all__) - {"Schedule"}


@every_schedule
def test_returns_finite_non_negative_floats_and_depends_only_on_the_step(schedule: Schedule) -> None:
    forward = values(schedule, 100)
    assert all(type(value) is float and math.isfinite(value) and value >= 0.0 for value in forward)
    assert [schedule(t) for t in reversed(range(100))] == forward[::-1]
    assert type(schedule(10**12)) is float


@every_schedule
def test_is_a_value(schedule: Schedule) -> None:
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), dataclasses.replace(schedule)):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert values(twin, 30) == values(schedule, 30)
    field = dataclasses.fields(schedule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 0.5)
    with pytest.raises((AttributeError, TypeError)):  # slots: no new attributes
        schedule.counter = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("schedule", [s for s in EXAMPLES if s != warmup(square_root, 5)], ids=repr)
def test_repr_is_the_call_that_makes_it(schedule: Schedule) -> None:
    assert eval(repr(schedule), vars(schedules)) == schedule


def test_different_settings_or_different_kinds_are_not_equal() -> None:
    assert constant(0.1) != constant(0.2)
    assert linear(0.1, 0.0, 10) != cosine(0.1, 0.0, 10)
    assert len(set(EXAMPLES)) == len(EXAMPLES)


def test_settings_given_as_numpy_scalars_or_lists_become_plain_python_values() -> None:
    assert repr(step_decay(np.float64(0.5), np.float32(0.5), np.int64(3))) == "step_decay(lr=0.5, factor=0.5, every=3)"  # type: ignore[arg-type]
    assert piecewise([3], [1, 2]) == piecewise((3,), (1.0, 2.0)) == piecewise(np.array([3]), np.array([1.0, 2.0]))  # type: ignore[arg-type]
    assert type(constant(1).lr) is float


@every_schedule
@pytest.mark.parametrize("integer", [np.int64(7), np.uint8(7)], ids=["int64", "uint8"])
def test_numpy_integers_are_steps(schedule: Schedule, integer: int) -> None:
    assert schedule(integer) == schedule(7)
    assert type(schedule(integer)) is float


@every_schedule
def test_a_bad_step_is_refused(schedule: Schedule) -> None:
    for negative in (-1, np.int64(-3)):
        with pytest.raises(ValueError, match=r"step: must be an int >= 0 .*got .*-[13]"):
            schedule(negative)  # type: ignore[arg-type]
    for wrong in (1.0, "1", None, True, np.float64(2), np.bool_(True)):
        with pytest.raises(TypeError, match="step: must be an int"):
            schedule(wrong)  # type: ignore[arg-type]


# --- formulas ---------------------------------------------------------------------------------------------------------


@given(lr=rates, k=st.floats(0.0, 5.0), t=steps_taken)
def test_decays_equal_their_formulas(lr: float, k: float, t: int) -> None:
    assert constant(lr)(t) == lr
    assert exponential(lr, k)(t) == lr * math.exp(-k * t)
    assert inverse_time(lr, k)(t) == lr / (1 + k * t)


@given(lr=rates, factor=st.floats(0.01, 1.0), every=lengths)
def test_step_decay_changes_at_multiples_of_every_and_only_there(lr: float, factor: float, every: int) -> None:
    schedule = step_decay(lr, factor, every)
    for stair in range(4):
        assert (
            schedule(stair * every) == schedule((stair + 1) * every - 1) == pytest.approx(lr * factor**stair, rel=1e-14)
        )


@given(start=rates, end=rates, steps=lengths, power=st.floats(0.1, 5.0))
def test_annealing_begins_at_start_ends_at_end_and_is_monotone(
    start: float, end: float, steps: int, power: float
) -> None:
    for schedule in (linear(start, end, steps), polynomial(start, end, steps, power), cosine(start, end, steps)):
        assert schedule(0) == start
        assert schedule(steps) == schedule(steps + 1) == schedule(10**12) == end
        taken = np.array(values(schedule, min(steps, 200) + 1))
        assert (np.diff(taken) * np.sign(end - start) >= -1e-14).all()
        assert taken.min() >= min(start, end) - 1e-14
        assert taken.max() <= max(start, end) + 1e-14


def test_annealing_half_way() -> None:
    assert linear(0.5, 0.1, 10)(5) == pytest.approx(0.3)
    assert cosine(0.5, 0.1, 10)(5) == pytest.approx(0.3)
    assert polynomial(0.5, 0.1, 10, power=3.0)(5) == pytest.approx(0.1 + 0.4 / 8)


@given(start=rates, end=rates, steps=lengths, t=st.integers(0, 2000))
def test_polynomial_of_power_one_is_a_line(start: float, end: float, steps: int, t: int) -> None:
    assert polynomial(start, end, steps)(t) == pytest.approx(linear(start, end, steps)(t), rel=1e-9, abs=1e-12)


def smith(t: int, low: float, high: float, stepsize: float, mode: str, gamma: float) -> float:
    """Return the cyclical rate of the paper's section 3.2; `stepsize` is half a cycle."""
    cycle = math.floor(1 + t / (2 * stepsize))
    x = abs(t / stepsize - 2 * cycle + 1)
    scale = {"triangular": 1.0, "triangular2": 1 / 2 ** (cycle - 1), "exp_range": gamma**t}[mode]
    return low + (high - low) * max(0.0, 1 - x) * scale


@given(
    low=rates,
    rise=rates,
    period=st.integers(2, 200),
    mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
    t=st.integers(0, 3000),
)
def test_cyclical_equals_smiths_formula(low: float, rise: float, period: int, mode: str, t: int) -> None:
    gamma = 0.999 if mode == "exp_range" else 1.0
    schedule = cyclical(low, low + rise, period, mode=mode, gamma=gamma)  # type: ignore[arg-type]
    assert schedule(t) == pytest.approx(smith(t, low, low + rise, period / 2, mode, gamma), rel=1e-9, abs=1e-9)


def test_cyclical_is_low_at_the_start_of_a_cycle_high_in_its_middle_and_does_not_drift() -> None:
    schedule = cyclical(0.25, 1.0, 10)
    for cycle in (0, 1, 7, 10**15):
        assert [schedule(10 * cycle + t) for t in (0, 5)] == [0.25, 1.0]
    halved = cyclical(0.0, 1.0, 10, mode="triangular2")
    assert [halved(t) for t in (5, 15, 25)] == [1.0, 0.5, 0.25]
    assert cyclical(0.25, 1.0, 10, mode="triangular2")(10**6) == 0.25
    fading = cyclical(0.0, 1.0, 10, mode="exp_range", gamma=0.5)
    assert [fading(t) for t in (5, 15)] == [0.5**5, 0.5**15]


def test_odd_period_is_symmetric_and_misses_the_peak() -> None:
    assert values(cyclical(0.0, 1.0, 5), 6) == pytest.approx([0.0, 0.4, 0.8, 0.8, 0.4, 0.0])


def test_piecewise_changes_at_the_boundary_itself() -> None:
    schedule = piecewise([2, 5], [0.3, 0.2, 0.1])
    assert values(schedule, 7) == [0.3, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1]
    assert piecewise([], [0.3])(9) == 0.3


def test_one_cycle_rises_to_the_peak_and_falls_below_its_beginning() -> None:
    schedule = one_cycle(1.0, 100, pct_start=0.3, div_factor=20.0, final_div_factor=50.0)
    taken = values(schedule, 100)
    assert taken[0] == 1 / 20
    assert taken[29] == max(taken) == 1.0
    assert taken[99] == schedule(10**6) == 1 / 20 / 50
    assert taken[:30] == sorted(taken[:30])
    assert taken[29:] == sorted(taken[29:], reverse=True)


@given(
    steps=st.integers(2, 300),
    pct_start=st.floats(0.0, 1.0, exclude_max=True),
    anneal=st.sampled_from(["cosine", "linear"]),
)
def test_one_cycle_stays_between_its_ends_for_any_lengths(steps: int, pct_start: float, anneal: str) -> None:
    schedule = one_cycle(1.0, steps, pct_start=pct_start, anneal=anneal)  # type: ignore[arg-type]
    taken = values(schedule, steps + 3)
    assert min(taken) >= 4e-6 * (1 - 1e-9)
    assert max(taken) <= 1.0 + 1e-12
    if steps - 1 > pct_start * steps - 1:
        assert taken[-1] == pytest.approx(4e-6)


def test_one_cycle_without_warm_up_begins_at_the_peak() -> None:
    assert one_cycle(0.5, 10, pct_start=0.0)(0) == 0.5
    assert values(one_cycle(0.5, 2, pct_start=0.0, div_factor=1.0, final_div_factor=5.0), 3) == [0.5, 0.1, 0.1]


# --- wrapping ---------------------------------------------------------------------------------------------------------


@given(lr=st.floats(1e-6, 10.0), steps=st.integers(0, 500))
def test_warmup_never_begins_at_zero_climbs_evenly_and_then_runs_the_schedule_from_its_beginning(
    lr: float, steps: int
) -> None:
    wrapped = cosine(lr, 0.0, 50)
    schedule = warmup(wrapped, steps)
    assert schedule(0) == pytest.approx(lr / (steps + 1))
    assert np.diff(values(schedule, steps + 1)) == pytest.approx(np.full(steps, lr / (steps + 1)), rel=1e-6)
    assert [schedule(steps + t) for t in range(60)] == values(wrapped, 60)


def test_warmup_accepts_numbers_and_functions() -> None:
    assert values(warmup(0.5, 4), 6) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert values(warmup(square_root, 1), 4) == pytest.approx([0.5, 1.0, 1 / math.sqrt(2), 1 / math.sqrt(3)])
    assert type(warmup(lambda t: np.float32(1), 3)(7)) is float


def test_sequence_counts_steps_from_the_start_of_each_schedule() -> None:
    schedule = sequence([linear(0.0, 1.0, 4), 2.0, exponential(1.0, 0.5)], [4, 6])
    assert values(schedule, 9) == [0.0, 0.25, 0.5, 0.75, 2.0, 2.0, 1.0, math.exp(-0.5), math.exp(-1.0)]
    assert sequence([0.3], [])(5) == 0.3


@given(values_=st.lists(rates, min_size=1, max_size=6), gaps=st.lists(st.integers(1, 20), min_size=5, max_size=5))
def test_sequence_of_constants_is_piecewise(values_: list[float], gaps: list[int]) -> None:
    boundaries = [int(b) for b in np.cumsum(gaps)][: len(values_) - 1]
    assert values(sequence(values_, boundaries), 110) == values(piecewise(boundaries, values_), 110)


@given(steps=st.integers(1, 50))
def test_warmup_is_a_sequence_of_a_line_and_the_schedule(steps: int) -> None:
    wrapped = inverse_time(0.5, 0.1)
    ramp = linear(0.5 / (steps + 1), 0.5, steps)
    assert values(warmup(wrapped, steps), 80) == pytest.approx(values(sequence([ramp, wrapped], [steps]), 80))


# --- refusals ---------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: constant(-0.1), ValueError, r"constant.lr: must be a finite number >= 0, got -0.1"),
        (lambda: constant(NAN), ValueError, r"constant.lr: must be a finite number >= 0, got nan"),
        (lambda: constant(INF), ValueError, r"lr: must be a finite number"),
        (lambda: constant(10**400), ValueError, r"lr: must be a finite number"),
        (lambda: constant("0.1"), TypeError, r"lr: must be a finite number >= 0, got '0.1'"),
        (lambda: constant(True), TypeError, r"lr: must be .* got True"),
        (lambda: constant(None), TypeError, r"lr: must be .* got None"),
        (lambda: constant(1j), TypeError, r"lr: must be .* got 1j"),
        (lambda: exponential(0.1, -1), ValueError, r"exponential.k: must be a finite number >= 0, got -1"),
        (lambda: exponential(-0.1, 1), ValueError, r"exponential.lr: must be"),
        (lambda: inverse_time(0.1, NAN), ValueError, r"inverse_time.k: must be"),
        (lambda: inverse_time(INF, 1), ValueError, r"inverse_time.lr: must be"),
        (lambda: cyclical(-1, 1, 4), ValueError, r"cyclical.low: must be a finite number >= 0"),
        (lambda: cyclical(0.5, 0.1, 4), ValueError, r"cyclical.high: must be a finite number >= 0.5, got 0.1"),
        (lambda: cyclical(0.1, 0.5, 1), ValueError, r"cyclical.period: must be an int >= 2 .*got 1"),
        (lambda: cyclical(0.1, 0.5, 4.0), TypeError, r"cyclical.period: must be an int >= 2 .*got 4.0"),
        (
            lambda: cyclical(0.1, 0.5, 4, mode="square"),
            ValueError,
            r"mode: must be one of 'triangular', .*got 'square'",
        ),
        (lambda: cyclical(0.1, 0.5, 4, mode=None), ValueError, r"mode: must be one of"),
        (
            lambda: cyclical(0.1, 0.5, 4, mode="exp_range", gamma=0),
            ValueError,
            r"gamma: must be .*> 0 and <= 1, got 0",
        ),
        (lambda: cyclical(0.1, 0.5, 4, mode="exp_range", gamma=1.01), ValueError, r"gamma: must be"),
        (
            lambda: cyclical(0.1, 0.5, 4, gamma=0.9),
            ValueError,
            r"gamma: must be 1.0 with mode='triang.*got 0.9; omit gamma",
        ),
        (lambda: step_decay(0.1, 0.0, 5), ValueError, r"step_decay.factor: must be .*> 0"),
        (lambda: step_decay(0.1, 1.5, 5), ValueError, r"step_decay.factor: must be .*<= 1"),
        (lambda: step_decay(0.1, 0.5, 0), ValueError, r"step_decay.every: must be an int >= 1"),
        (
            lambda: piecewise([5], [0.1]),
            ValueError,
            r"piecewise.values: must have one entry more .*1 values for 1 bound",
        ),
        (lambda: piecewise([5, 5], [1, 2, 3]), ValueError, r"boundaries\[1\]: must be greater than boundaries\[0\]=5"),
        (lambda: piecewise([0], [1, 2]), ValueError, r"boundaries\[0\]: must be an int >= 1 .*got 0"),
        (lambda: piecewise([2.5], [1, 2]), TypeError, r"boundaries\[0\]: must be an int"),
        (lambda: piecewise(5, [1, 2]), TypeError, r"boundaries: must be a sequence .*got 5"),
        (lambda: piecewise([5], "12"), TypeError, r"values: must be a sequence .*got '12'"),
        (lambda: piecewise([5], [1, -2]), ValueError, r"values\[1\]: must be a finite number >= 0, got -2"),
        (lambda: linear(-1, 0, 5), ValueError, r"linear.start: must be"),
        (lambda: linear(1, NAN, 5), ValueError, r"linear.end: must be"),
        (lambda: linear(1, 0, 0), ValueError, r"linear.steps: must be an int >= 1"),
        (lambda: linear(1, 0, True), TypeError, r"linear.steps: must be an int"),
        (lambda: polynomial(-1, 0, 5), ValueError, r"polynomial.start: must be"),
        (lambda: polynomial(1, -1, 5), ValueError, r"polynomial.end: must be"),
        (lambda: polynomial(1, 0, -5), ValueError, r"polynomial.steps: must be"),
        (lambda: polynomial(1, 0, 5, power=0), ValueError, r"polynomial.power: must be a finite number > 0"),
        (lambda: cosine(NAN, 0, 5), ValueError, r"cosine.start: must be"),
        (lambda: cosine(1, INF, 5), ValueError, r"cosine.end: must be"),
        (lambda: cosine(1, 0, 5.5), TypeError, r"cosine.steps: must be"),
        (lambda: one_cycle(-1, 5), ValueError, r"one_cycle.high: must be"),
        (lambda: one_cycle(1, 1), ValueError, r"one_cycle.steps: must be an int >= 2"),
        (
            lambda: one_cycle(1, 5, pct_start=1.0),
            ValueError,
            r"pct_start: must be a finite number >= 0 and < 1, got 1.0",
        ),
        (lambda: one_cycle(1, 5, pct_start=-0.1), ValueError, r"pct_start: must be"),
        (lambda: one_cycle(1, 5, div_factor=0.5), ValueError, r"one_cycle.div_factor: must be a finite number >= 1"),
        (lambda: one_cycle(1, 5, final_div_factor=0), ValueError, r"one_cycle.final_div_factor: must be"),
        (lambda: one_cycle(1, 5, anneal="cos"), ValueError, r"anneal: must be one of 'cosine', 'linear', got 'cos'"),
        (lambda: warmup(0.1, -1), ValueError, r"warmup.steps: must be an int >= 0"),
        (lambda: warmup(-0.1, 5), ValueError, r"warmup.schedule: must be a finite number >= 0"),
        (lambda: warmup("cosine", 5), TypeError, r"warmup.schedule: must be a schedule .*got 'cosine'"),
        (lambda: warmup(cosine, 5), TypeError, r"warmup.schedule: must be a schedule constructed with its settings"),
        (
            lambda: sequence([0.1, 0.2], []),
            ValueError,
            r"sequence.schedules: must have one entry more .*2 schedules for 0",
        ),
        (lambda: sequence([], []), ValueError, r"sequence.schedules: must have one entry more"),
        (lambda: sequence([0.1, None], [3]), TypeError, r"sequence.schedules\[1\]: must be a schedule .*got None"),
        (lambda: sequence(0.1, [3]), TypeError, r"sequence.schedules: must be a sequence"),
        (lambda: sequence([0.1, 0.2], [-3]), ValueError, r"sequence.boundaries\[0\]: must be"),
        (lambda: sequence([0.1, 0.2, 0.3], [7, 3]), ValueError, r"boundaries\[1\]: must be greater than .*=7, got 3"),
    ],
)
def test_bad_settings_are_refused_by_name(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_bare_schedule_has_no_formula() -> None:
    with pytest.raises(NotImplementedError):
        Schedule()(0)


# --- torch's schedulers -----------------------------------------------------------------------------------------------

COUNT = 60


def in_torch(lr: float, make: Callable[..., object]) -> list[float]:
    """Return a torch scheduler's learning rates at steps 0, 1, 2, ... for an optimizer with learning rate `lr`."""
    torch = pytest.importorskip("torch", reason="torch.optim.lr_scheduler is the oracle of this test")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    taken = []
    for _ in range(COUNT):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]
    return taken


def one_cycle_of_torch(**settings: object) -> Callable[..., object]:
    return lambda lrs, opt: lrs.OneCycleLR(opt, max_lr=0.5, total_steps=COUNT + 1, **settings)


def cyclic_of_torch(**settings: object) -> Callable[..., object]:
    return lambda lrs, opt: lrs.CyclicLR(opt, 0.1, 0.5, step_size_up=7, cycle_momentum=False, **settings)


@pytest.mark.parametrize(
    ("schedule", "lr", "make"),
    [
        (constant(0.5), 0.5, lambda lrs, opt: lrs.ConstantLR(opt, factor=1.0)),
        (exponential(0.5, -math.log(0.95)), 0.5, lambda lrs, opt: lrs.ExponentialLR(opt, 0.95)),
        (inverse_time(0.5, 0.1), 0.5, lambda lrs, opt: lrs.LambdaLR(opt, lambda t: 1 / (1 + 0.1 * t))),
        (cyclical(0.1, 0.5, 14), 0.1, cyclic_of_torch()),
        (cyclical(0.1, 0.5, 14, mode="triangular2"), 0.1, cyclic_of_torch(mode="triangular2")),
        (cyclical(0.1, 0.5, 14, mode="exp_range", gamma=0.97), 0.1, cyclic_of_torch(mode="exp_range", gamma=0.97)),
        (step_decay(0.5, 0.3, 7), 0.5, lambda lrs, opt: lrs.StepLR(opt, 7, 0.3)),
        (piecewise([9, 30], [0.5, 0.05, 0.005]), 0.5, lambda lrs, opt: lrs.MultiStepLR(opt, [9, 30])),
        (linear(0.1, 0.4, 20), 0.5, lambda lrs, opt: lrs.LinearLR(opt, 0.2, 0.8, total_iters=20)),
        (polynomial(0.5, 0.0, 40, power=2.5), 0.5, lambda lrs, opt: lrs.PolynomialLR(opt, 40, 2.5)),
        (cosine(0.5, 0.01, COUNT), 0.5, lambda lrs, opt: lrs.CosineAnnealingLR(opt, COUNT, 0.01)),
        (
            sequence([cosine(0.5, 0.01, 10), cosine(0.5, 0.01, 20), cosine(0.5, 0.01, 40)], [10, 30]),
            0.5,
            lambda lrs, opt: lrs.CosineAnnealingWarmRestarts(opt, T_0=10, T_mult=2, eta_min=0.01),
        ),
        (one_cycle(0.5, COUNT + 1), 0.5, one_cycle_of_torch()),
        (
            one_cycle(0.5, COUNT + 1, pct_start=0.45, div_factor=10.0, final_div_factor=100.0, anneal="linear"),
            0.5,
            one_cycle_of_torch(pct_start=0.45, div_factor=10.0, final_div_factor=100.0, anneal_strategy="linear"),
        ),
        (
            warmup(cosine(0.5, 0.0, 50), 9),
            0.5,
            lambda lrs, opt: lrs.SequentialLR(
                opt, [lrs.LinearLR(opt, 0.1, 1.0, total_iters=9), lrs.CosineAnnealingLR(opt, 50)], milestones=[9]
            ),
        ),
        (
            sequence([exponential(0.5, -math.log(0.9)), 0.5, step_decay(0.5, 0.1, 5)], [10, 20]),
            0.5,
            lambda lrs, opt: lrs.SequentialLR(
                opt,
                [lrs.ExponentialLR(opt, 0.9), lrs.ConstantLR(opt, factor=1.0), lrs.StepLR(opt, 5, 0.1)],
                milestones=[10, 20],
            ),
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, Schedule) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_agrees_with_torch(schedule: Schedule, lr: float, make: Callable[..., object]) -> None:
    assert values(schedule, COUNT) == pytest.approx(in_torch(lr, make), rel=1e-9, abs=1e-12)
