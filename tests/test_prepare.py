"""CompiledPrepare: the bits of Python's `prepare` for many param groups, and Python wherever they could differ."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import run

import fastopt
from fastopt.hyper import Choice, Flag, Interval, Pair
from fastopt.kernels.contract import StepHyper
from fastopt.rule import Rule
from fastopt.rules import ALL
from fastopt.step import prepare as module
from fastopt.step.prepare import CompiledPrepare, arguments_of, form_of, numbers_of
from fastopt.step.table import Point, Table, hyper_of

N_STEP = len(StepHyper._fields)
IN_PYTHON = {"nadam", "schedule_free_adamw", "sophia"}
"""Rules whose `prepare` remembers sums over all steps, in a list or an array that is filled when it is needed, and one
that is told what a step is given."""

IN_DOUBLE = ("adam", "momentum", "muon")
every_rule = pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        *[(rule, np.float32) for rule in ALL.values() if rule.name not in IN_PYTHON],
        *[(ALL[name], np.float64) for name in IN_DOUBLE],  # the dtype only decides how the results are written
    ],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)


def values_of(rule: Rule, **more: Any) -> dict[str, Any]:
    return {name: rule.check(name, value) for name, value in rule.complete(more).items()}


def compiled(rule: Rule, dtype: Any, point: Point) -> CompiledPrepare | None:
    return CompiledPrepare.of(rule, hyper_of(rule, point), np.dtype(dtype), point.arguments)


def forms(rule: Rule) -> list[dict[str, Any]]:
    """Hyperparameters that cover every flag and every name: the usual ones, and then all of them changed together."""
    usual, others = values_of(rule), {}
    for name, value in usual.items():
        domain = rule._domains.get(name) or (Flag() if isinstance(value, bool) else Interval())
        words = {Flag: (True, False), Choice: getattr(domain, "names", ())}.get(type(domain), ())
        if left := [word for word in words if word != value]:
            others[name] = left
    most = max(map(len, others.values()), default=0)
    return [usual, *({**usual, **{name: left[k % len(left)] for name, left in others.items()}} for k in range(most))]


def number_in(domain: Interval) -> Any:
    """Powers of ten, as people choose them, and the whole range."""
    low, high = max(domain.low, -1e6), min(domain.high, 1e6)
    wide = st.floats(low, high, exclude_max=domain.open, exclude_min=domain.open_low)
    usual = st.floats(-12.0, 0.0).map(lambda e: min(max(10.0**e, low), high))
    near_one = usual.map(lambda x: 1.0 - x).filter(lambda x: low <= x < high)
    number = st.one_of(wide, near_one, *([] if domain.open else [usual]))
    if domain.whole:
        return st.integers(int(low), int(high) - domain.open).map(float)
    return number.filter(lambda x: x > low) if domain.open_low else number


@st.composite
def random_values(draw: Any, rule: Rule, base: dict[str, Any]) -> dict[str, Any]:
    """`base` with other numbers, each in the range that the rule allows."""
    values = dict(base)
    for name, value in base.items():
        if isinstance(value, bool | str) or not draw(st.booleans()):
            continue
        domain = rule._domains.get(name, Interval())
        if isinstance(domain, Pair):
            numbers = [draw(number_in(each)) for each in (domain.first, domain.second)]
            values[name] = tuple(sorted(numbers) if domain.ascending else numbers)
        else:
            number = number_in(domain)
            values[name] = draw(st.tuples(*[number] * domain.length) if domain.length else number)
    return values


def by_python(rule: Rule, dtype: Any, rows: int, points: list[Point], ts: list[int]) -> tuple[np.ndarray, int]:
    """The table that `Table.write` gives, and the first index where it raises, or -1."""
    table = Table(rule, hyper_of(rule, points[0]), np.dtype(dtype), rows)
    k = -1
    try:
        for k, (t, point) in enumerate(zip(ts, points, strict=True)):
            table.write(k, t, point, 1.0)
    except (ArithmeticError, ValueError):
        return table.array, k
    return table.array, -1


steps = st.one_of(st.integers(1, 20), st.integers(1, 10**6))


@every_rule
def test_the_bits_of_table_write(rule, dtype):
    cases = []
    for values in forms(rule):
        point = Point.of(rule, values)
        found = compiled(rule, dtype, point)
        assert found is not None
        cases.append((values, found))

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data):
        values, found = data.draw(st.sampled_from(cases))
        groups = data.draw(st.lists(st.tuples(steps, random_values(rule, values)), min_size=1, max_size=6))
        ts = [t for t, _ in groups]
        points = [Point.of(rule, chosen) for _, chosen in groups]
        assert {form_of(point.arguments) for point in points} == {found.form}
        expected, refused = by_python(rule, dtype, len(points), points, ts)
        table = np.zeros_like(expected)
        numbers = np.array([numbers_of(point.arguments) for point in points]).reshape(len(points), -1)
        index = found.fill(table, np.arange(len(points)), np.array(ts), numbers)
        written = len(points) if index < 0 else index
        assert table[:written, N_STEP:].tobytes() == expected[:written, N_STEP:].tobytes()
        assert not table[written:].any()
        assert not table[:, :N_STEP].any()
        # Python refuses what the compiled function refuses, but for what depends on weight decay alone.
        assert index == refused or (refused >= 0 and (index < 0 or refused < index)), values

    check()


@every_rule
def test_many_steps_with_usual_numbers(rule, dtype):
    """Fixed, so that every run compares the same 2,000 rows of every rule."""
    rng = np.random.default_rng(0)
    ts = [*range(1, 1001), *rng.integers(1, 10**6, 998).tolist(), 10**6, 2**40]
    point = Point.of(rule, values_of(rule))
    found = compiled(rule, dtype, point)
    assert found is not None
    first = np.array(numbers_of(point.arguments))
    numbers = np.ascontiguousarray(first * rng.uniform(0.9, 1.0, (len(ts), first.size)))
    points = [point._replace(arguments=arguments_of(found.form, line.tolist())) for line in numbers]
    expected, refused = by_python(rule, dtype, len(ts), points, ts)
    assert refused == -1
    rows = rng.permutation(len(ts))
    table = np.zeros_like(expected)
    assert found.fill(table, rows, np.array(ts), numbers) == -1
    assert table[rows, N_STEP:].tobytes() == expected[:, N_STEP:].tobytes()


def test_rules_that_stay_in_python():
    for name in IN_PYTHON:
        assert compiled(ALL[name], np.float64, Point.of(ALL[name], values_of(ALL[name]))) is None


# --- where Python decides ---------------------------------------------------------------------------------------------


class Two(NamedTuple):
    a: float
    b: float


def rule_of(prepare: Any) -> Rule:
    @fastopt.rule(prepare)
    def descent(p, g, h):
        return p - h.a * g

    return descent


def fill_one(prepare: Any, *arguments: Any, t: int = 3, dtype: Any = np.float64, like: Any = None) -> Any:
    """The two numbers, or None where the row is left to Python. Compiled for `like`, which Python can compute."""
    found = CompiledPrepare.of(rule_of(prepare), Two, np.dtype(dtype), arguments if like is None else like)
    assert found is not None
    table = np.full((1, N_STEP + 2), 7.0, dtype)
    line = np.array([numbers_of(arguments)])
    if found.fill(table, np.zeros(1, np.int64), np.array([t]), line) == 0:
        assert (table == 7.0).all()
        return None
    return tuple(table[0, N_STEP:].tolist())


@pytest.mark.parametrize(
    ("prepare", "bad"),
    [
        (lambda t, x: Two(min(1.0, t / x), 0.0), 0.0),
        (lambda t, x: Two(min(1.0, 1.0 / math.sqrt(x)), 0.0), -1.0),
        (lambda t, x: Two(max(0.0, math.log(x)), 0.0), 0.0),
        (lambda t, x: Two(1.0 / math.exp(x), 0.0), 1e4),
        (lambda t, x: Two(1.0 / (1.0 + x**t), 0.0), 1e200),
        (lambda t, x: Two(1.0 / (1.0 + x**-t), 0.0), 0.0),
        (lambda t, x: Two(min(0.0, x**0.5), 0.0), -1.0),
    ],
    ids=["division", "sqrt", "log", "exp", "power", "power of 0", "complex power"],
)
def test_errors_that_a_finite_result_would_hide(prepare, bad):
    with pytest.raises((ArithmeticError, ValueError, TypeError)):
        prepare(3, bad)
    assert fill_one(prepare, bad, like=(0.5,)) is None
    assert fill_one(prepare, 0.5) == tuple(prepare(3, 0.5))


def test_a_number_out_of_the_range_of_the_dtype():
    def prepare(t, x):
        return Two(x, 0.0)

    assert fill_one(prepare, 1e39, like=(1.0,), dtype=np.float32) is None
    assert fill_one(prepare, 1e39) == (1e39, 0.0)
    assert fill_one(prepare, math.inf, like=(1.0,)) is None
    assert fill_one(prepare, math.nan, like=(1.0,)) is None
    largest = float(np.finfo(np.float32).max)
    assert fill_one(prepare, largest, dtype=np.float32) == (largest, 0.0)
    # Half a unit above: rounds to infinity. Just below it: to the largest number.
    half = largest + 2.0**103
    assert fill_one(prepare, half, like=(1.0,), dtype=np.float32) is None
    assert fill_one(prepare, math.nextafter(half, 0.0), dtype=np.float32) == (largest, 0.0)


def test_the_first_index_is_returned_and_the_rows_before_it_are_written():
    found = CompiledPrepare.of(rule_of(lambda t, x: Two(t / x, x)), Two, np.dtype(np.float64), (1.0,))
    assert found is not None
    table = np.zeros((4, N_STEP + 2))
    numbers = np.array([[1.0], [2.0], [0.0], [0.0]])
    assert found.fill(table, np.array([3, 2, 1, 0]), np.array([1, 2, 3, 4]), numbers) == 2
    assert table[:, N_STEP:].tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [1.0, 1.0]]


def test_squares_are_powers_and_the_smaller_zero_is_pythons():
    rng = np.random.default_rng(0)
    for x in rng.uniform(0.0, 10.0, 2000).tolist():
        assert fill_one(power_of_two_and_three, x) == (x**2, x**3)
    for x, y in ((0.0, -0.0), (-0.0, 0.0)):
        a, b = fill_one(lambda t, x, y: Two(min(x, y), max(x, y)), x, y)
        assert (math.copysign(1.0, a), math.copysign(1.0, b)) == (math.copysign(1.0, x),) * 2


def power_of_two_and_three(t, x):
    return Two(x**2, x**3)


SCALES = np.array([1.0, 2.0])


class Counter:
    count = 0.0


COUNTER = Counter()


@pytest.mark.parametrize(
    "prepare",
    [
        lambda t, x: Two(sum([x for _ in range(t)]), x),
        lambda t, x: Two(float(np.exp(x)), x),
        lambda t, x: Two(SCALES[0] * x, x),
        lambda t, x: Two(COUNTER.count, x),
        lambda t, x: Two(x * (t % 2), x),
        lambda t, x: Two(x * (t // 2), x),
        lambda t, x: Two(x * int(x), x),
        lambda t, x: Two(t**3 * x, x),
        lambda t, x: Two(math.gamma(x), x),
        lambda t, x: Two((lambda y: y**2)(x), x),
        lambda t, x: Two(round(x, 2), x),
        lambda t, x: Two(sorted((x, 1.0))[0], x),
        lambda t, x: Two(math.comb(3, 2) * x, x),
    ],
)
def test_what_is_not_plain_arithmetic_stays_in_python(prepare):
    assert CompiledPrepare.of(rule_of(prepare), Two, np.dtype(np.float64), (0.7,)) is None


def test_a_loop_stays_in_python():
    def prepare(t, x):
        total = 0.0
        while total < t:
            total += 1.0
        return Two(total, x)

    assert CompiledPrepare.of(rule_of(prepare), Two, np.dtype(np.float64), (0.7,)) is None


def test_a_result_that_differs_from_pythons_is_not_used():
    def prepare(t, x):
        return Two(t * t * t * t * t, x)  # exact in Python

    assert CompiledPrepare.of(rule_of(prepare), Two, np.dtype(np.float64), (0.7,)) is None


def test_functions_of_the_file_names_and_closures_are_followed():
    factor = 0.3

    def prepare(t, x, betas, on, name):
        a, b = power_of_two_and_three(t, x * factor)
        if on and name == "left":
            return Two(a + betas[1], pow(b, 0.5))
        return Two(math.pow(a, betas[0]), math.inf if name == "none" else b)

    arguments = [(0.7, (0.9, 0.99), on, name) for on in (True, False) for name in ("left", "right")]
    for chosen in arguments:
        assert fill_one(prepare, *chosen) == tuple(prepare(3, *chosen))


# --- forms ------------------------------------------------------------------------------------------------------------


def test_forms_and_numbers():
    arguments = (1.0, (2.0, 3.0), True, "ema", ())
    form, numbers = form_of(arguments), numbers_of(arguments)
    assert numbers == [1.0, 2.0, 3.0]
    assert form is not None
    assert arguments_of(form, numbers) == arguments
    assert form_of((1.5, (0.0, 0.0), True, "ema", ())) == form
    for other in (
        (1.0, (2.0,), True, "ema", ()),
        (1.0, (2.0, 3.0), False, "ema", ()),
        (1.0, (2.0, 3.0), True, "x", ()),
    ):
        assert form_of(other) != form
    assert form_of((1.0, 2)) is None
    assert form_of(([1.0],)) is None


def test_no_arguments():
    assert fill_one(lambda t: Two(t, 0.5**t), t=4) == (4.0, 0.0625)


def test_one_compilation_for_optimizers_of_one_form():
    rules = (ALL["adam"], ALL["amsgrad"])
    first, second = (compiled(rule, np.float32, Point.of(rule, values_of(rule))) for rule in rules)
    assert first is not None
    assert second is not None
    assert first._entry is second._entry


def test_without_the_functions_of_the_c_library(monkeypatch):
    monkeypatch.setattr(module, "find_functions", lambda: False)
    module.compiled_fill.cache_clear()
    assert CompiledPrepare.of(rule_of(lambda t, x: Two(x, x)), Two, np.dtype(np.float64), (0.7,)) is None


SCRIPT = """
import numpy as np
from fastopt.rules import ALL
from fastopt.step.prepare import CompiledPrepare, N_STEP
from fastopt.step.table import Point, hyper_of
rule = ALL["momentum"]
for form in ("heavy_ball", "ema", "lr_inside"):
    point = Point.of(rule, rule.complete({"lr": 0.5, "momentum": 0.75, "form": form}))
    found = CompiledPrepare.of(rule, hyper_of(rule, point), np.dtype("float32"), point.arguments)
    table = np.zeros((1, N_STEP + 3), np.float32)
    assert found.fill(table, np.zeros(1, np.int64), np.ones(1, np.int64), np.array([[0.5, 0.75]])) == -1
    print(table[0, N_STEP:].tolist())
"""


def test_the_cache_on_disk_distinguishes_forms(tmp_path):
    tmp_path.chmod(0o700)
    for _ in range(2):
        done = run("-c", SCRIPT, FASTOPT_CACHE_DIR=str(tmp_path))
        assert done.stdout == "[0.75, 1.0, 0.5]\n[0.75, 0.25, 0.5]\n[0.75, -0.5, -1.0]\n", done.stderr
        assert len(list(tmp_path.glob("*.kernel"))) == 3
