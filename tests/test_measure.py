"""fastopt.measure: turns and spreads on a fake clock, limits that move the right bytes, rivals with equal results."""

from __future__ import annotations

import doctest
import gc
import importlib
import json
import math
import platform
import subprocess
import sys

import numpy as np
import pytest

import fastopt
from fastopt.measure import RIVALS, Result, Spread, Work, batchnorm, bytes_of, compare, comparison, interleave, limit_of
from fastopt.measure import machine as machine_facts
from fastopt.measure.interleaved import SAMPLE, SAMPLES, SLOW, WARM
from fastopt.measure.rivals import OPTAX, SKLEARN, THINC, TORCH, enter, of_fastopt

MODULES = ("interleaved", "limit", "machine", "rivals", "comparison", "batchnorm")


@pytest.mark.parametrize("name", MODULES)
def test_examples_pass(name):
    failed, tried = doctest.testmod(importlib.import_module(f"fastopt.measure.{name}"))
    assert failed == 0
    assert tried or name == "machine"


# --- the timer --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while a contestant works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contestant(self, name: str, *costs: float):
        """Return a contestant whose calls take `costs`, one after the other; the last cost repeats."""
        left = list(costs)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_contestants_take_turns_and_every_second_round_reverses_the_order():
    clock = Clock()
    contestants = {name: clock.contestant(name, 2 * SLOW) for name in "abc"}
    interleave(contestants, seconds=0.0, rounds=4, clock=clock)
    assert "".join(clock.calls) == "aabbcc" + "abc" + "cba" + "abc" + "cba"


def test_a_fast_call_warms_up_and_then_fills_its_samples():
    clock = Clock()
    spread = interleave({"a": clock.contestant("a", 1e-5)}, seconds=0.0, rounds=1, clock=clock)["a"]
    assert spread.median == pytest.approx(1e-5)
    assert len(clock.calls) == pytest.approx(2 + (WARM + SAMPLES * SAMPLE) / 1e-5, abs=2)


def test_median_and_percentiles_match_the_samples():
    clock = Clock()
    samples = [0.3, 0.1, 0.2, 0.9, 0.4, 0.5, 0.6, 0.8, 0.7, 1.0]
    found = interleave({"a": clock.contestant("a", 9.0, 9.0, *samples)}, seconds=0.0, rounds=10, clock=clock)["a"]
    assert found == Spread(*(pytest.approx(np.percentile(samples, q)) for q in (50, 10, 90)), 10, 1.0)


def test_the_fastest_sample_of_a_turn_counts():
    clock = Clock()
    costs = [1.1e-3, 1.1e-3, *[1.1e-3] * 4, 2e-3, 9e-3]  # two before the rounds, four to warm up; 9 ms end the turn
    found = interleave({"a": clock.contestant("a", *costs, 1e-3)}, seconds=0.0, rounds=1, clock=clock)["a"]
    assert (found.median, len(clock.calls)) == (pytest.approx(2e-3), 8)


def test_the_ratio_is_the_median_of_the_ratios_within_a_round():
    clock = Clock()
    a, b = [9.0, 9.0, 1.0, 2.0, 4.0], [9.0, 9.0, 3.0, 4.0, 40.0]  # ratios 3, 2 and 10; the ratio of the medians is 2
    calls = {"a": clock.contestant("a", *a), "b": clock.contestant("b", *b)}
    found = interleave(calls, seconds=0.0, rounds=3, clock=clock)
    assert (found["a"].ratio, found["b"].ratio) == (1.0, pytest.approx(3.0))


def test_visits_add_up_and_an_interrupted_round_stores_nothing():
    clock, times = Clock(), {}

    def visit(*costs: float):
        calls = {"a": clock.contestant("a", 1.0), "b": clock.contestant("b", *costs)}
        return interleave(calls, seconds=0.0, rounds=2, times=times, clock=clock)

    assert visit(2.0)["b"].rounds == 2
    assert visit(4.0)["b"].ratio == pytest.approx(3.0)
    assert times == {"a": [1.0] * 4, "b": [2.0, 2.0, 4.0, 4.0]}

    def interrupt() -> None:
        clock.now += 1.0
        if len(clock.calls) > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": clock.contestant("a", 1.0), "b": interrupt}, 1e9, times=times, clock=clock)
    assert len(times["a"]) == len(times["b"]) > 4


def test_a_drift_of_the_machine_does_not_change_the_ratio():
    clock = Clock()

    def slower_and_slower(cost: float):
        def call() -> None:
            clock.now += cost * (1.0 + clock.now / 20.0)  # three times slower after 40 s

        return call

    spreads = interleave({"a": slower_and_slower(0.1), "b": slower_and_slower(0.2)}, seconds=40.0, clock=clock)
    assert spreads["a"].high / spreads["a"].low > 1.5
    assert spreads["b"].ratio == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(("seconds", "rounds", "expected"), [(0.0, 3, 3), (10.0, 3, 10), (10.0, 12, 12)])
def test_seconds_and_rounds_are_both_minimums(seconds, rounds, expected):
    clock, ticks = Clock(), []
    found = interleave(
        {"a": clock.contestant("a", 1.0)}, seconds, rounds, after_round=lambda: ticks.append(clock.now), clock=clock
    )
    assert found["a"].rounds == len(ticks) == expected


def test_the_preparation_of_a_sample_is_not_timed():
    clock = Clock()
    found = interleave(
        {"a": clock.contestant("a", 0.25), "b": clock.contestant("b", 0.5)},
        seconds=0.0,
        rounds=2,
        before={"b": clock.contestant("before b", 7.0)},
        clock=clock,
    )
    assert (found["a"].median, found["b"].median) == (0.25, 0.5)
    for k, name in enumerate(clock.calls):
        assert name != "b" or clock.calls[k - 1] == "before b"


def test_garbage_collection_pauses_during_the_timing():
    seen = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, seconds=0.0, rounds=1)
    assert seen[0] is True
    assert seen[-1] is False
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, seconds=0.0)
    assert gc.isenabled()


# --- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arrays"),
    [("SGD", 3), ("Momentum", 5), ("Adam", 7), ("Adan", 11), ("LAMB", 11), ("LARS", 7), ("NovoGrad", 6)],
)
def test_bytes_match_the_arrays_read_and_written(name, arrays):
    for dtype in (np.float32, np.float64):
        optimizer = getattr(fastopt, name)({"w": np.zeros((10, 10), dtype)})
        assert bytes_of(optimizer) == arrays * 100 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adam", "AdEMAMix", "Adan", "LAMB", "LARS", "NovoGrad"])
def test_the_limit_touches_every_buffer_of_the_optimizer(name):
    optimizer = getattr(fastopt, name)([np.ones(5000, np.float32), np.ones(7, np.float32)])
    optimizer.flat.grad[:] = 1.0
    limit = limit_of(optimizer)
    assert bytes_of(limit) == bytes_of(optimizer)
    assert limit.flat.shapes == optimizer.flat.shapes
    before = [optimizer.flat.data.copy(), *(state.copy() for state in limit._pipeline.states)]
    limit.step()
    limit.step()
    for array, old in zip((limit.flat.data, *limit._pipeline.states), before, strict=True):
        assert np.count_nonzero(array != old) >= 5007
    np.testing.assert_array_equal(optimizer.flat.data, before[0])  # the limit has its own buffers


def test_the_kernels_of_batchnorms_limit():
    from fastopt.measure import limit

    x, y, out = np.arange(100_001.0), np.ones(100_001), np.zeros(100_001)
    limit.copy(x, out)
    np.testing.assert_array_equal(out, x)
    limit.add(x, y, out)
    np.testing.assert_array_equal(out, x + 1)


# --- the rivals compute the same --------------------------------------------------------------------------------------

SHAPES = ((30, 7), (50,), (1,))
OPTIONS = [
    ("Adam", {"amsgrad": True}),
    ("Adam", {"lr": 0.1, "betas": (0.5, 0.75)}),
    ("AdamW", {"weight_decay": 0.3}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"centered": True}),
    ("Lion", {"weight_decay": 0.3}),
]
OF_CLASS = {"SOAP": {"eps": 0.1}}
"""SOAP divides the rounding of gradients that leave eigenvectors undetermined by its own size, but for eps."""
WORKS = [
    *(Work(name, SHAPES, options=OF_CLASS.get(name, {})) for name in fastopt.Optimizer.classes),
    *(Work(name, SHAPES, options=options) for name, options in OPTIONS),
    Work("Adam", SHAPES, "float64"),
    Work("Adam", SHAPES, groups=3),
    Work("SGD", SHAPES, groups=2),
]


def name_of(work: Work) -> str:
    return "-".join([work.optimizer, work.dtype, *map(str, work.options), *(["groups"] if work.groups > 1 else [])])


def entered(work: Work, rival: str):
    pytest.importorskip(RIVALS[rival].imports, reason=f"{rival}, the rival, is not installed")
    contestants, absent = enter(work, [rival])
    if absent:
        # The reason names the rival; NumPy takes part in all of these.
        assert rival != "numpy"
        assert set(absent) == {rival}
        assert absent[rival].split()[0].lower() in (rival.split()[0], "scikit-learn", "optax", "deepspeed", "thinc")
        pytest.skip(absent[rival])
    return contestants[rival]


TAKES_PART = {
    "numpy": tuple(fastopt.Optimizer.classes),
    "torch fused": RIVALS["torch fused"].optimizers,
    "torch": tuple(TORCH),
    "optax": tuple(OPTAX),
    "thinc": THINC,
    "scikit-learn": SKLEARN,
}
"""Without DeepSpeed, which would compile for half a minute."""
PAIRS = [
    pytest.param(work, rival, id=f"{name_of(work)}-{rival}")
    for rival, names in TAKES_PART.items()
    for work in WORKS
    if work.optimizer in names
]


@pytest.mark.parametrize(("work", "rival"), PAIRS)
def test_a_rival_computes_the_same_as_fastopt(work, rival):
    theirs, ours = entered(work, rival), of_fastopt(work)
    for _ in range(6):
        ours.step()
        if theirs.before is not None:
            theirs.before()
        theirs.step()
    expected, start = ours.params(), work.start()
    moved = max(np.max(np.abs(after - before)) for after, before in zip(expected, start, strict=True))
    rounding = 8 * max(np.spacing(np.max(np.abs(before))) for before in start)
    assert moved > 100 * rounding
    for found, after in zip(theirs.params(), expected, strict=True):
        assert found.shape == after.shape
        np.testing.assert_allclose(found, after, rtol=0, atol=3e-4 * moved + rounding)


def test_the_table_lists_only_existing_optimizers():
    assert set().union(*TAKES_PART.values()) <= set(fastopt.Optimizer.classes)
    assert TAKES_PART.keys() | {"deepspeed"} == RIVALS.keys()


@pytest.mark.parametrize("rival", TAKES_PART)
def test_the_table_knows_which_optimizers_a_rival_has(rival):
    pytest.importorskip(RIVALS[rival].imports, reason=f"{rival}, the rival, is not installed")
    for name in fastopt.Optimizer.classes:
        reason = enter(Work(name, ((3, 2),)), [rival])[1].get(rival, "")
        lacks = f"has no {name} that" in reason or "has no fused" in reason
        assert RIVALS[rival].makes(name) != lacks, (name, reason)


@pytest.mark.parametrize(
    ("work", "rival", "reason"),
    [
        (Work("Lion", ((3,),)), "scikit-learn", "scikit-learn has no Lion that computes the same"),
        (Work("Adam", ((3,),), options={"amsgrad": True}), "scikit-learn", "scikit-learn has no amsgrad=True"),
        (Work("Adam", ((3,), (4,)), groups=2), "scikit-learn", "scikit-learn has one learning rate for all parameters"),
        (
            Work("Adam", ((3,),), options={"eps": 1e-3}),
            "scikit-learn",
            "scikit-learn adds eps to the uncorrected root, which makes a difference with eps=0.001",
        ),
        (Work("Nesterov", ((3,),), options={"form": "lookahead"}), "scikit-learn", "has no form=lookahead"),
    ],
)
def test_an_absent_rival_has_a_reason(work, rival, reason):
    assert enter(work, [rival]) == ({}, {rival: reason})


def test_a_missing_package_is_named(monkeypatch):
    for module in {rival.imports for rival in RIVALS.values()} - {"numpy"}:
        monkeypatch.setitem(sys.modules, module, None)
    contestants, absent = enter(Work("Adam", ((3,),)))
    assert list(contestants) == ["numpy"]
    packages = {"torch fused": "torch", "torch": "torch", "optax": "optax", "deepspeed": "deepspeed"}
    packages |= {"thinc": "thinc", "scikit-learn": "scikit-learn"}
    assert absent == {name: f"{package} is not installed" for name, package in packages.items()}


@pytest.mark.parametrize("rival", batchnorm.RIVALS)
@pytest.mark.parametrize("way", batchnorm.WAYS)
@pytest.mark.parametrize(("shape", "axis"), [((16, 5), 1), ((4, 3, 6, 5), 1), ((4, 6, 5, 3), -1)])
def test_rivals_in_batchnorm_compute_the_same(rival, way, shape, axis):
    pytest.importorskip(rival, reason=f"{rival}, the rival, is not installed")
    found, absent = batchnorm.contestants(shape, axis, way, [rival])
    assert absent == {}
    for contestant in found.values():
        contestant.step()
    np.testing.assert_allclose(found[rival].params()[0], found["fastopt"].params()[0], rtol=1e-4, atol=2e-5)
    assert np.any(found["fastopt"].params()[0])


def test_a_step_with_all_options_equals_torchs_sequence():
    bench_tail = importlib.import_module("bench_tail")
    if bench_tail.torch is None:
        pytest.skip("torch, the rival, is not installed")
    gradient = 100 * np.random.default_rng(0).standard_normal(1000, np.float32)
    ours = bench_tail.ours(gradient, max_norm=bench_tail.MAX_NORM, ema=bench_tail.EMA, zero_grad=True)
    theirs = bench_tail.torchs(gradient)
    for _ in range(5):
        for contestant in (ours, theirs):
            contestant.write()
            contestant.step()
    for found, expected in zip(ours.params(), theirs.params(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# --- results ----------------------------------------------------------------------------------------------------------

RESULT = Result(
    "Adam 1k",
    {
        "fastopt": Spread(2e-6, 1e-6, 3e-6, 9, 1.0),
        "limit": Spread(1e-6, 1e-6, 1e-6, 9, 0.5),
        "numpy": Spread(1e-5, 9e-6, 2e-5, 9, 5.0),
    },
    {"torch": "torch is not installed"},
    28_000,
    {"parameters": 1000},
)


def test_a_result_has_ratios_and_bandwidth():
    assert (RESULT.times("numpy"), RESULT.times("limit"), RESULT.times("torch")) == (pytest.approx(5.0), 0.5, None)
    assert RESULT.bandwidth() == pytest.approx(14.0)
    assert RESULT.bandwidth("numpy") == pytest.approx(2.8)
    assert RESULT._replace(bytes=None).bandwidth() is None


def test_a_result_survives_json():
    assert Result.of(json.loads(json.dumps(RESULT.record()))) == RESULT


def test_a_comparison_keeps_its_facts():
    result = compare("x", {"a": lambda: None}, seconds=0.0, rounds=1, absent={"b": "why"}, moved=8, parameters=2)
    assert (result.title, result.absent, result.bytes, result.facts) == ("x", {"b": "why"}, 8, {"parameters": 2})


PAGES = """
import resource
import numpy as np
from fastopt.measure import machine
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def take():
    before = faults()
    for _ in range(20):
        np.ones(7_000_000, np.float32)  # 28 MB
    return faults() - before
take()
kept = machine.keep_freed_memory()
take()
print(kept, take() < 200)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) needs glibc")
def test_freed_memory_is_kept_for_the_next_array():
    finished = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["True", "True"]


def test_a_library_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(machine_facts.ctypes, "CDLL", lambda name: object())
    assert machine_facts.keep_freed_memory() is False


def test_batchnorm_that_does_not_fit_raises_before_allocating(monkeypatch):
    monkeypatch.setattr(machine_facts, "free_memory", lambda: 10**9)
    with pytest.raises(MemoryError, match=r"needs 1\.6 GB of memory, and 1\.0 GB are free"):
        comparison.compare_batchnorm("x", (2**13, 2**12), rivals=iter(["numpy", "torch"]), seconds=1.0)


def test_too_little_memory_raises_before_allocating(monkeypatch):
    monkeypatch.setattr(machine_facts, "free_memory", lambda: 10**9)
    work = Work("Adam", ((10**9,),))
    with pytest.raises(MemoryError, match=r"needs 80\.0 GB of memory, and 1\.0 GB are free"):
        comparison.compare_step("x", work, ["numpy"], seconds=1.0)
    comparison.check_memory(Work("Adam", ((1000,),)), 9)
    monkeypatch.setattr(machine_facts, "free_memory", lambda: None)
    comparison.check_memory(work, 9)  # unknown free memory does not raise


# --- the machine ------------------------------------------------------------------------------------------------------


def test_a_description_is_json_and_identifies_nobody():
    facts = machine_facts.describe()
    assert set(facts) == {"cpu", "architecture", "system", "cores", "memory_bytes", "caches"}
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert json.loads(json.dumps(facts)) == facts


def test_a_shared_cache_is_counted_once(tmp_path, monkeypatch):
    for cpu in range(4):
        for index, (kind, level, size, shared) in enumerate(
            [
                ("Data", 1, "32K", f"{cpu}"),
                ("Instruction", 1, "32K", f"{cpu}"),
                ("Unified", 2, "1024K", f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"),
                ("Unified", 3, "32M", "0-3"),
            ]
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("type", kind), ("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(machine_facts, "CPUS", tmp_path)
    monkeypatch.setattr(machine_facts.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine_facts.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert machine_facts.caches() == [(1, 2**15, 4), (2, 2**20, 2), (3, 2**25, 1)]


def test_unreported_caches_are_an_empty_list(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_facts, "CPUS", tmp_path)
    monkeypatch.setattr(machine_facts.platform, "system", lambda: "Linux")
    assert machine_facts.caches() == []


@pytest.mark.parametrize(("limit", "expected"), [("max", 4096 * 1000), ("1000000", 999_000)])
def test_free_memory_is_the_smallest_reported_number(tmp_path, monkeypatch, limit, expected):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(machine_facts, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine_facts, "CONTROL_GROUP", tmp_path)
    assert machine_facts.free_memory() == expected
    monkeypatch.setattr(machine_facts, "memory", lambda: math.inf)
    assert machine_facts.free_memory() == expected
