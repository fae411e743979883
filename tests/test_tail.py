"""The step in one pass: every flag against separate NumPy passes, norms, NaNs, averages, accumulated gradients."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import pickle
import re
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, CASES, DTYPES, EVERYTHING, OF_EACH_KIND, PER_RULE, Case, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import compiled, run

import fastopt
from fastopt.kernels import elements
from fastopt.kernels.contract import BLOCK, Features
from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.driver import DRIVER

FLAGS: dict[str, dict[str, Any]] = {
    "max_norm": {"max_norm": 0.5},
    "clip_norm_per_tensor": {"clip_norm_per_tensor": 0.5},
    "clip_value": {"clip_value": 0.01},
    "zero": {"nonfinite": "zero"},
    "skip": {"nonfinite": "skip"},
    "ema": {"ema": 0.9},
    "zero_grad": {"zero_grad": True},
    "maximize": {"maximize": True},
}
EXCLUDED = ({"zero", "skip"}, {"max_norm", "clip_norm_per_tensor"})
PER_TENSOR = {"clip_norm_per_tensor": 0.5, **{name: EVERYTHING[name] for name in EVERYTHING if name != "max_norm"}}
"""As EVERYTHING, with whose kernels; but each gradient is clipped by its own norm."""
BY_STATES = [BY_NAME[name] for name in ("SGD-lr=0.1", "Momentum", "LAMB")] + [
    case for case in CASES if case.optimizer == "Adam" and "amsgrad" in case.options
]
SCALE = 8.0


def start(dtype: Any, sizes: tuple[int, ...] = (1000, 3, 17)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {f"w{k}": rng.normal(size=size).astype(dtype) for k, size in enumerate(sizes)}


def grads_like(rng: np.random.Generator, params: dict[str, np.ndarray], bad: float | None = None) -> Any:
    grads = {name: gradients(rng, p.size, p.dtype) for name, p in params.items()}
    if bad is not None:
        for g in grads.values():
            g[:: max(1, g.size // 3)] = bad
    return grads


def norm_of(grads: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))


def in_passes(grads: Any, scale: float, options: dict[str, Any]) -> Any:
    """What the rule is to be given but for clipping by norm, made by one NumPy pass after another."""
    out = {}
    for name, grad in grads.items():
        g = grad * grad.dtype.type(1.0 / scale)
        if options.get("maximize"):
            g = -g
        if options.get("nonfinite") == "zero":
            g = np.where(np.isfinite(g), g, grad.dtype.type(0))
        if "clip_value" in options:
            g = np.clip(g, -options["clip_value"], options["clip_value"], dtype=g.dtype)
        out[name] = g
    return out


def clipped_each(grads: Any, limit: float) -> Any:
    """Gradients clipped by their own norms, in Keras' form."""
    return {name: g * g.dtype.type(limit / max(limit, norm_of({name: g}))) for name, g in grads.items()}


def equal(left: Any, right: Any, rtol: float = 0.0) -> None:
    for name in right:
        np.testing.assert_allclose(left[name], right[name], rtol, err_msg=name)


def assert_as_separate_passes(case: Case, dtype: Any, options: dict[str, Any], scale: float, steps: int = 3) -> None:
    params = start(dtype)
    fused, plain = case.make(params, **options), case.make(params)
    owned = case.make(params, **options)  # its gradients are written into its own buffer
    average = {name: p.copy() for name, p in params.items()}
    # A scale is of the norm of clipped gradients, which is a product here and there a norm of rounded products.
    rtol = 1e-6 if case.optimizer in ("LARS", "NovoGrad") else 0.0
    limit = options.get("clip_norm_per_tensor")
    if limit is not None and dtype == np.float64:
        rtol = max(rtol, 1e-13)  # the norm of a gradient is not known from outside to the last bit
    rng = np.random.default_rng(0)
    bad = np.nan if options.get("nonfinite") == "zero" else None
    for _ in range(steps):
        grads = grads_like(rng, params, bad)
        info = fused.step(grads, grad_scale=scale)
        for name, grad in grads.items():
            owned.grads[name] = grad
        owned.step(grad_scale=scale)
        passed = in_passes(grads, scale, options)
        if limit is not None:
            norms = [norm_of({name: g}) for name, g in passed.items()]
            assert info.grad_norm == pytest.approx(norm_of(passed), rel=1e-12)
            assert info.clip_coefficient == pytest.approx(limit / max(limit, *norms), rel=1e-12)
            passed = clipped_each(passed, limit)
        elif "max_norm" in options or "nonfinite" in options:
            norm = norm_of(passed)
            assert info.grad_norm == pytest.approx(norm, rel=1e-12)
            expected = min(1.0, options.get("max_norm", math.inf) / (norm + 1e-6))
            assert info.clip_coefficient == pytest.approx(expected, rel=1e-12)
            passed = {name: g * g.dtype.type(info.clip_coefficient) for name, g in passed.items()}
        plain.step(passed)
        equal(fused.params, plain.params, rtol)
        for name, state in plain.states.items():
            equal(fused.states[name], state, rtol)
        if "ema" in options:
            fresh = np.dtype(dtype).type(1.0 - options["ema"])
            average = {name: e + fresh * (plain.params[name] - e) for name, e in average.items()}
            equal(fused.ema, average, rtol)
        equal(fused.grads, {name: np.zeros_like(g) for name, g in grads.items()})  # they were read where they are
        equal(owned.grads, {name: np.zeros_like(g) if options.get("zero_grad") else g for name, g in grads.items()})
        assert contents(owned) == contents(fused)


@pytest.mark.parametrize("options", [EVERYTHING, PER_TENSOR], ids=["", "each"])
@pytest.mark.parametrize("case", PER_RULE, ids=str)
def test_all_flags_at_once_equal_separate_passes_for_every_rule(case, options):
    assert_as_separate_passes(case, np.float32, options, SCALE)


@pytest.mark.parametrize("options", [EVERYTHING, PER_TENSOR], ids=["", "each"])
@pytest.mark.parametrize("case", BY_STATES, ids=str)
def test_all_flags_at_once_in_float64(case, options):
    assert_as_separate_passes(case, np.float64, options, SCALE)


@pytest.mark.parametrize(
    ("case", "flag"),
    [
        (case, flag)
        for case in BY_STATES
        for flag in FLAGS
        if case.optimizer == "Momentum" or flag in ("ema", "zero_grad")  # which are buffers beside the states
    ],
    ids=str,
)
def test_each_flag_alone_equals_a_separate_pass(case, flag):
    assert_as_separate_passes(case, np.float32, FLAGS[flag], 1.0)


PAIRS = [{**FLAGS[a], **FLAGS[b]} for a, b in itertools.combinations(FLAGS, 2) if {a, b} not in EXCLUDED][::3]


@pytest.mark.parametrize("options", PAIRS, ids=lambda options: "+".join(options))
def test_pairs_of_flags_equal_separate_passes(options):
    assert_as_separate_passes(BY_NAME["Momentum"], np.float32, options, SCALE, steps=2)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "AdamW"])
def test_every_rule_decays_weights_in_both_ways(name, decoupled):
    make = getattr(fastopt, name)
    params = start(np.float32)
    opt = make(params, lr=0.1, weight_decay=0.25, decoupled_weight_decay=decoupled)
    plain = make(params, lr=0.1, weight_decay=0.0)
    rng = np.random.default_rng(3)
    for _ in range(3):
        grads = grads_like(rng, params)
        if decoupled:
            plain.flat.data[...] *= np.float32(1.0 - 0.1 * 0.25)
            plain.step(grads)
        else:
            plain.step({path: g + np.float32(0.25) * plain.params[path] for path, g in grads.items()})
        opt.step(grads)
        equal(opt.params, plain.params)


def test_a_rule_that_decays_in_a_way_of_its_own_cannot_be_told_another():
    with pytest.raises(TypeError, match=r"decoupled_weight_decay: must be None for rule 'lamb'.*, got True"):
        fastopt.LAMB({"w": np.ones(3)}, decoupled_weight_decay=True)
    with pytest.raises(TypeError, match="decoupled_weight_decay: must be True or False, got 1"):
        fastopt.Adam({"w": np.ones(3)}, decoupled_weight_decay=1)


# --- launches and machine code ----------------------------------------------------------------------------------------


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched: list[str] = []
    run_loop = cpu.Loop.run

    def counted(self: Any, *arguments: Any, **keywords: Any) -> None:
        launched.append(self.label)
        run_loop(self, *arguments, **keywords)

    monkeypatch.setattr(cpu.Loop, "run", counted)
    return launched


def test_any_combination_is_one_norm_pass_and_one_update(monkeypatch):
    params = start(np.float32, (1000, 3, 17, 1, 5000))
    overrides = {"w1": {"lr": 0.5}, "w2": {"weight_decay": 0.0}}
    whole = fastopt.AdamW(params, weight_decay=0.1, overrides=overrides, **EVERYTHING)
    each = fastopt.AdamW(params, weight_decay=0.1, overrides=overrides, **PER_TENSOR)
    no_norm = fastopt.AdamW(params, ema=0.9, zero_grad=True, clip_value=1.0, maximize=True)
    grads = grads_like(np.random.default_rng(0), params)
    for opt, step, expected in (
        (whole, lambda opt: opt.step(grads, grad_scale=4.0), 2),
        (each, lambda opt: opt.step(grads, grad_scale=4.0), 2),
        (no_norm, lambda opt: opt.step(grads, grad_scale=4.0), 1),
    ):
        step(opt)
        launched = count_launches(monkeypatch)
        step(opt)
        monkeypatch.undo()
        assert len(launched) == expected, launched
    clipped = fastopt.AdamW(params, max_norm=1.0)
    clipped.accumulate(grads)
    launched = count_launches(monkeypatch)
    clipped.accumulate(grads)
    clipped.step()
    assert len(launched) == 2, launched  # the norm was taken by the last accumulate


def bare_element(step, p, g, *rest):
    return RULE(p, g, *rest)  # noqa: F821


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_flags_that_are_off_are_not_in_the_machine_code(dtype, monkeypatch, compiled_anew):
    rule = fastopt.rules.adam
    hyper = type(rule.prepare(1, 1e-3, (0.9, 0.999), 1e-8, False, True))
    counts = []
    for element in (elements.element, bare_element):
        monkeypatch.setattr(elements, "element", element)
        kernel = cpu.CPU().kernel(rule, hyper, np.dtype(dtype), Features())
        assembly = kernel._loop.compiled.assembly()
        counts.append(Counter(re.findall(r"^\t([a-z]\w*)", assembly, flags=re.MULTILINE)))
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 50


def test_the_update_is_vectorised_with_every_flag_on(compiled_anew):
    rule = fastopt.rules.adamw
    hyper = type(rule.prepare(1, 1e-3, (0.9, 0.999), 1e-8, False, True))
    features = Features(**dict.fromkeys(vars(Features()), True) | {"l2": False})
    kernel = cpu.CPU().kernel(rule, hyper, np.dtype(np.float32), features)
    assembly = kernel._loop.compiled.assembly()
    assert re.search(r"sqrtps|fsqrt\s+v\d+\.4s", assembly)


# --- the same bits whatever the threads -------------------------------------------------------------------------------


DRIVERS = (("pool", 1), ("pool", 2), ("pool", 3), ("pool", 4), ("pool", 7), ("numba", 2), ("executor", 3))


def report_drivers() -> None:
    params = start(np.float32, (100_003, 17, 200_000))
    for name, clipping in itertools.product(("AdamW", "LAMB", "NovoGrad"), ("max_norm", "clip_norm_per_tensor")):
        for mode, threads in DRIVERS:
            DRIVER.choose(mode)
            fastopt.set_num_threads(threads)
            options = {clipping: 0.5, "ema": 0.9, "zero_grad": True, "nonfinite": "skip"}
            opt = getattr(fastopt, name)(params, **options)
            rng = np.random.default_rng(0)
            opt.step(grads_like(rng, params))
            for _ in range(3):
                opt.accumulate(grads_like(rng, params), weight=0.5)
            info = opt.step()
            digest = hashlib.sha256(repr((info.grad_norm, info.clip_coefficient)).encode())
            for buffer in (opt.flat.data, opt.flat.grad, *opt._pipeline.buffers):
                digest.update(buffer)
            print(json.dumps([f"{name} {clipping}", [mode, threads], digest.hexdigest()]))


def test_every_driver_gives_the_same_bits():
    finished = run(__file__, "drivers", timeout=240, **compiled())
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(lines) == 6 * len(DRIVERS)
    for name in {name for name, _, _ in lines}:
        assert len({digest for rule, _, digest in lines if rule == name}) == 1, lines


@pytest.mark.parametrize("longest", [BLOCK, 3 * BLOCK, 10**6])
def test_the_norm_does_not_depend_on_how_chunks_are_cut(longest, monkeypatch):
    params = start(np.float32, (50_000, 3, 4096, 4097))
    grads = grads_like(np.random.default_rng(0), params)
    expected = fastopt.SGD(params, max_norm=1.0).step(grads).grad_norm
    each = fastopt.SGD(params, lr=1.0, clip_norm_per_tensor=1.0)
    each.step(grads)
    chunks = type(fastopt.SGD(params).flat.layout).chunks
    monkeypatch.setattr(
        type(fastopt.SGD(params).flat.layout),
        "chunks",
        lambda self, groups, **options: chunks(self, groups, **options, longest=longest),
    )
    assert fastopt.SGD(params, max_norm=1.0).step(grads).grad_norm == expected
    other = fastopt.SGD(params, lr=1.0, clip_norm_per_tensor=1.0)
    other.step(grads)
    equal(other.params, each.params)


# --- norms of float64 beyond the squares that it holds ----------------------------------------------------------------

MAGNITUDES = (1e200, 4e307 / 5, 1e-170, 1e-300, 1e-315)


def ways_of_a_step(opt: fastopt.Optimizer, grads: Any) -> Any:
    """Gradients of "e" (a matrix) and "w", in each way that a step can have them; yields StepInfo."""
    yield opt.step(grads)
    for name, g in grads.items():
        opt.grads[name][...] = g
    yield opt.step()
    opt.accumulate({"e": grads["e"], "w": None})
    opt.accumulate({"e": None, "w": grads["w"]})
    yield opt.step(reduction="sum")
    opt.accumulate(grads)
    yield opt.step(reduction="sum")
    yield opt.step_rows({"e": (np.arange(len(grads["e"])), grads["e"])}, {"e": None, "w": grads["w"]})


@pytest.mark.parametrize("options", [{}, {"clip_value": 1e308}, {"nonfinite": "zero"}], ids=str)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_the_norm_of_float64_gradients_is_right_over_its_whole_range(magnitude, options):
    params = {"e": np.zeros((40, 128)), "w": np.zeros(BLOCK + 3)}  # more than a block each, so that blocks differ
    opt = fastopt.SGD(params, lr=1.0, max_norm=1.0 if magnitude > 1.0 else None, grad_norm=True, **options)
    grads = {name: np.zeros(p.shape) for name, p in params.items()}
    grads["e"][39, 5], grads["w"][-1] = 3.0 * magnitude, -4.0 * magnitude
    rtol = 1e-14 if magnitude > 1e-310 else 1e-7
    for k, info in enumerate(ways_of_a_step(opt, grads)):
        np.testing.assert_allclose(info.grad_norm, 5.0 * magnitude, rtol=rtol, err_msg=str(k))
        opt.flush_rows()
        moved = 1.0 if magnitude > 1.0 else 5.0 * magnitude
        np.testing.assert_allclose(opt.params["e"][39, 5], -0.6 * moved * (k + 1), rtol=1e-6)
        np.testing.assert_allclose(opt.params["w"][-1], 0.8 * moved * (k + 1), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"clip_value": 1e308}, {"nonfinite": "zero"}], ids=str)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_each_float64_gradient_is_clipped_over_the_whole_range(magnitude, options):
    opt = fastopt.SGD(
        {"e": np.zeros((40, 128)), "w": np.zeros(BLOCK + 3)}, lr=1.0, clip_norm_per_tensor=2.0 * magnitude, **options
    )
    grads = {name: np.zeros(p.shape) for name, p in opt.params.items()}
    grads["e"][39, 5], grads["w"][-1] = magnitude, -4.0 * magnitude
    rtol = 1e-14 if magnitude > 1e-310 else 1e-7
    for k, info in enumerate(ways_of_a_step(opt, grads)):
        assert info.clip_coefficient == pytest.approx(0.5, rel=rtol), k
        opt.flush_rows()
        np.testing.assert_allclose(opt.params["e"][39, 5], -magnitude * (k + 1), rtol=rtol)
        np.testing.assert_allclose(opt.params["w"][-1], 2.0 * magnitude * (k + 1), rtol=rtol)


# --- clipping of each gradient by its own norm ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, np.float32) for case in OF_EACH_KIND if case.optimizer != "Adafactor"),  # one rule of sums is enough
        *((case, np.float64) for case in OF_EACH_KIND if case.optimizer in ("SGD", "LAMB", "Muon")),  # whose sums scale
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_each_gradient_is_clipped_in_every_way_of_a_step(case, dtype):
    rng = np.random.default_rng(4)
    params = {"e": rng.normal(size=(40, 110)).astype(dtype), "w": rng.normal(size=3).astype(dtype)}
    each, plain = case.make(params, clip_norm_per_tensor=0.5), case.make(params)
    grads = {name: rng.normal(size=p.shape).astype(dtype) for name, p in params.items()}
    passed = clipped_each(grads, 0.5)
    ways = ways_of_a_step(each, grads)
    for _ in range(5 if case.rule.idle is not None and case.options.get("weight_decay", 0.0) == 0.0 else 4):
        next(ways)
        plain.step(passed)
    for name, p in plain.params.items():  # Muon's products of matrices amplify rounding
        np.testing.assert_allclose(each.params[name], p, rtol=2e-4 if dtype == np.float32 else 1e-10, atol=1e-6)


def test_param_groups_and_missing_gradients_keep_their_clipping():
    """More groups than Python prepares one by one, a schedule, a frozen parameter, and one that is added."""
    rng = np.random.default_rng(2)
    params = {f"w{k:02}": rng.normal(size=k % 5) for k in range(80)}
    overrides: dict[str, Any] = {name: {"lr": 0.01 * (k + 1)} for k, name in enumerate(params) if k % 8}
    overrides["w02"] = {"lr": fastopt.schedules.linear(0.1, 0.2, 5)}
    overrides["w03"] = {"frozen": True}
    clips: dict[str, Any] = {"clip_norm_per_tensor": 0.7}
    each, plain, in_place = (
        fastopt.AdamW(given, overrides=overrides, ema=0.5, **options)
        for given, options in ((params, clips), (params, {}), (None, clips))
    )
    own = {name: p.copy() for name, p in params.items()}
    for step in range(6):
        grads = {name: rng.normal(size=p.size) for name, p in plain.params.items()}
        passed: dict[str, Any] = clipped_each(grads, 0.7)
        for name in [name for k, name in enumerate(grads) if (k + step) % 7 == 0]:
            grads[name] = passed[name] = None
        there = [name for name, g in grads.items() if g is not None and name != "w03"]
        expected = min(0.7 / max(0.7, norm_of({name: grads[name]})) for name in there)
        doubled = {name: None if g is None else 2.0 * g for name, g in grads.items()}
        assert each.step(doubled, grad_scale=2.0).clip_coefficient == pytest.approx(expected, rel=1e-12)
        plain.step(passed)
        if step < 4:
            in_place.update(own, grads)
            equal(own, plain.params, 1e-12)
        if step == 2:
            each.groups["w0*"].lr_scale = plain.groups["w0*"].lr_scale = in_place.groups["w0*"].lr_scale = 0.5
        if step == 3:
            for opt in (each, plain):
                opt.add({"w80": np.ones(3)}, lr=0.25)
    equal(each.params, plain.params, 1e-12)
    equal(each.ema, plain.ema, 1e-12)
    assert len(each.groups) > 64


@pytest.mark.parametrize("clipping", ["max_norm", "clip_norm_per_tensor"])
def test_the_gradients_of_matrices_are_clipped_before_their_momentum(clipping):
    rng = np.random.default_rng(0)
    params = {"W": rng.normal(size=(4, 3))}
    opt, plain = fastopt.Muon(params, lr=0.1, **{clipping: 1.0}), fastopt.Muon(params, lr=0.1)
    for size in (50.0, 0.01, 3.0):
        grads = {"W": size * rng.normal(size=(4, 3))}
        opt.step(grads)
        plain.step(clipped_each(grads, 1.0))
        equal(opt.params, plain.params, 1e-5)


@pytest.mark.parametrize("options", [{}, {"clip_value": 0.1}], ids="+".join)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_each_accumulated_gradient_is_clipped_in_its_own_units(reduction, options):
    params = start(np.float64, (1000, 3, 0, 5000))
    each, plain = (fastopt.SGD(params, lr=1.0, **more) for more in ({"clip_norm_per_tensor": 0.25, **options}, {}))
    rng = np.random.default_rng(0)
    grads = [grads_like(rng, params) for _ in range(2)]
    grads[0]["w0"] = grads[1]["w0"] = grads[0]["w1"] = None
    for batch in grads:
        each.accumulate(batch, weight=2.0)
    divisor = 3.0 * (4.0 if reduction == "mean" else 1.0)
    total = {name: sum(2.0 * g[name] for g in grads if g[name] is not None) / divisor for name in ("w1", "w2", "w3")}
    each.step(grad_scale=3.0, reduction=reduction)
    plain.step({"w0": None, **clipped_each(in_passes(total, 1.0, options), 0.25)})
    equal(each.params, plain.params, 1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_does_not_reach_the_others(bad):
    opt = fastopt.SGD({"a": np.ones(2), "b": np.ones(2), "no": np.ones(0)}, lr=1.0, clip_norm_per_tensor=1.0)
    info = opt.step({"a": np.array([bad, 1.0]), "b": np.array([3.0, 4.0]), "no": np.ones(0)})
    assert np.isnan(info.clip_coefficient) if np.isnan(bad) else info.clip_coefficient == 0.0
    np.testing.assert_allclose(opt.params["b"], [0.4, 0.2], rtol=1e-15)
    assert np.isnan(opt.params["a"][0])
    assert opt.step({"a": None, "b": None, "no": None}).clip_coefficient == 1.0
    assert opt.step({"a": None, "b": np.zeros(2), "no": None}).clip_coefficient == 1.0


def test_a_copy_clips_each_gradient_as_well():
    rng = np.random.default_rng(0)
    params = start(np.float32)
    opt = fastopt.Adam(params, clip_norm_per_tensor=0.5, overrides={"w1": {"lr": 0.5}})
    opt.step(grads_like(rng, params))
    twins = (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)))
    grads = grads_like(rng, params)
    for each in twins:
        each.step(grads)
        equal(each.params, opt.params)
        equal(each.states["v"], opt.states["v"])


@given(power=st.integers(-1000, 990), zero=st.integers(0, 2), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_power_of_2_in_the_gradients_is_one_in_their_norm(power, zero, seed):
    rng = np.random.default_rng(seed)
    grads = {name: rng.normal(size=size) for name, size in (("a", 3), ("b", 5000), ("c", 1))}
    grads["abc"[zero]][:] = 0.0
    opt = fastopt.SGD({name: np.zeros(g.size) for name, g in grads.items()}, lr=0.0, grad_norm=True)
    plain = opt.step(grads).grad_norm
    scaled = opt.step({name: 2.0**power * g for name, g in grads.items()}).grad_norm
    np.testing.assert_allclose(scaled, 2.0**power * plain, rtol=1e-13)


def test_blocks_of_all_magnitudes_are_added_up():
    opt = fastopt.SGD({"w": np.zeros(4 * BLOCK), "b": np.zeros(2)}, lr=0.0, grad_norm=True)
    many = np.full(4 * BLOCK, 1.2e152)  # only the sum of all blocks overflows
    assert opt.step({"w": many, "b": np.array([1e-300, 0.0])}).grad_norm == pytest.approx(1.2e152 * 128, rel=1e-14)
    many[:BLOCK] = 3e200
    expected = 3e200 * 64
    assert opt.step({"w": many, "b": np.array([1.0, 1e180])}).grad_norm == pytest.approx(expected, rel=1e-14)
    assert opt.step({"w": 0.0 * many, "b": np.zeros(2)}).grad_norm == 0.0
    for large in (1e200, 1e-200):  # what counts is the gradient after grad_scale
        info = opt.step({"w": 0.0 * many, "b": np.array([3.0, 4.0]) * large}, grad_scale=0.5)
        np.testing.assert_allclose(info.grad_norm, 10.0 * large, rtol=1e-14)
    for bad in (np.inf, np.nan):
        found = opt.step({"w": many, "b": np.array([bad, 1.0])}).grad_norm
        assert not np.isfinite(found)


@pytest.mark.parametrize("magnitude", [1e200, 1e-170])
def test_a_norm_beyond_the_squares_has_the_same_bits_for_any_threads(magnitude, monkeypatch):
    size = 40 * BLOCK + 17
    grads = {"w": magnitude * np.random.default_rng(0).normal(size=size), "b": np.array([magnitude])}
    found = set()
    for threads in (1, 2, 3):
        for mode in ("pool", "executor"):
            monkeypatch.setattr("fastopt.kernels.driver.get_num_threads", lambda threads=threads: threads)
            DRIVER.choose(mode)
            opt = fastopt.SGD({"w": np.zeros(size), "b": np.zeros(1)}, lr=0.0, grad_norm=True)
            found |= {opt.step(grads).grad_norm.hex() for _ in range(3)}
            opt.accumulate(grads)
            found.add(opt.step().grad_norm.hex())
    DRIVER.choose()
    assert len(found) == 1


EXTREMES = {"large p": (1e200, 1.0), "small p": (1e-170, 1.0), "large g": (1.0, 1e200), "small g": (1.0, 1e-170)}


@pytest.mark.parametrize(("p_scale", "g_scale"), EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.optimizer in ("LARS", "LAMB", "NovoGrad", "Muon")], ids=str
)
def test_rules_that_look_at_norms_are_the_references_beyond_the_squares(case, p_scale, g_scale):
    if g_scale > 1.0 and case.optimizer in ("LAMB", "NovoGrad"):
        pytest.skip("their v is a square, which float64 does not hold")
    rng = np.random.default_rng(0)
    shape = (3, 4) if case.optimizer == "Muon" else (BLOCK + 5,)
    p, grads = p_scale * rng.normal(size=shape), g_scale * rng.normal(size=(3, *shape))
    opt, oracle = case.make({"w": p}), case.oracle(p)
    for g in grads:
        opt.step({"w": g})
        oracle.step(g)
    largest = np.abs(oracle.p).max()
    np.testing.assert_allclose(opt.params["w"] / largest, oracle.p / largest, rtol=1e-9, atol=1e-12)
    assert g_scale < p_scale or (opt.params["w"] != p).any()


# --- properties -------------------------------------------------------------------------------------------------------

PATTERNS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "zeros": lambda rng, n: np.zeros(n),
    "denormal": lambda rng, n: rng.choice([1e-42, -1e-44, 0.0], n),
    "1e30": lambda rng, n: 1e30 * rng.normal(size=n),
    "1e-30": lambda rng, n: 1e-30 * rng.normal(size=n),
    "nan": lambda rng, n: np.where(rng.random(n) < 0.5, np.nan, 1.0),
    "inf": lambda rng, n: np.where(rng.random(n) < 0.5, -np.inf, 1.0),
    "none": lambda rng, n: None,
}
COMBINATIONS: list[dict[str, Any]] = [
    {"nonfinite": "skip"},
    {"nonfinite": "skip", "max_norm": 1e-3, "ema": 0.9},
    {"nonfinite": "zero", "max_norm": 10.0, "ema": 0.5, "zero_grad": True},
    {"nonfinite": "skip", "clip_value": 1.0, "max_norm": 1.0},
    {"nonfinite": "raise", "max_norm": 1.0},
]


def contents(opt: fastopt.Optimizer) -> list[bytes]:
    return [buffer.tobytes() for buffer in (opt.flat.data, *opt._pipeline.buffers)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 15, 16, 17, 100, 5000]), min_size=1, max_size=5),
    patterns=st.lists(st.sampled_from(sorted(PATTERNS)), min_size=5, max_size=5),
    options=st.sampled_from(COMBINATIONS),
    scale=st.sampled_from([1024.0, 1e-3]),
    override=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_invariants_of_any_step(sizes, patterns, options, scale, override, seed):
    rng = np.random.default_rng(seed)
    params = start(np.float32, tuple(sizes))
    overrides = {"w0": {"lr": 0.5, "weight_decay": 0.1}} if override else None
    opt = fastopt.SGD(params, lr=0.1, momentum=0.9, overrides=overrides, **options)
    opt.step({name: np.ones_like(p) for name, p in params.items()})
    grads = {}
    for (name, p), pattern in zip(params.items(), patterns, strict=False):
        g = PATTERNS[pattern](rng, p.size)
        grads[name] = None if g is None else g.astype(np.float32)
    before, steps = contents(opt), opt.step_count
    given_ones = {name: g for name, g in grads.items() if g is not None}
    with np.errstate(over="ignore"):
        scaled = {name: g * np.float32(1.0 / scale) for name, g in given_ones.items()}
        passed = in_passes(given_ones, scale, options)
    finite = all(np.isfinite(g).all() for g in scaled.values())
    if not finite and options["nonfinite"] == "raise":
        first = next(name for name, g in scaled.items() if not np.isfinite(g).all())
        with pytest.raises(FloatingPointError, match=rf"^gradient '{first}' holds NaN or infinity"):
            opt.step(grads, grad_scale=scale)
        assert contents(opt) == before
        assert opt.step_count == steps
        return
    info = opt.step(grads, grad_scale=scale)
    assert info.skipped == (not finite and options["nonfinite"] == "skip")
    assert info.nonfinite_total == info.nonfinite_consecutive == (0 if finite else 1)
    if info.skipped:
        assert contents(opt) == before
        assert info.step == opt.step_count == steps
    else:
        assert opt.step_count == steps + 1
        norm = norm_of(passed)
        assert info.grad_norm == pytest.approx(norm, rel=1e-6, abs=1e-60)
        assert 0.0 <= info.clip_coefficient <= 1.0
        assert info.clip_coefficient * norm <= options.get("max_norm", math.inf) * (1 + 1e-6)
        for name, g in grads.items():
            if g is None:
                np.testing.assert_array_equal(
                    opt.params[name], np.frombuffer(before[0], np.float32)[slice_of(opt, name)]
                )
    if options.get("zero_grad"):
        assert not any(opt.grads[name].any() for name, g in grads.items() if g is not None)
    inside = np.zeros(opt.flat.size, bool)
    for path in opt.flat.paths:
        inside[slice_of(opt, path)] = True
    for buffer in (opt.flat.data, opt.flat.grad, *opt._pipeline.buffers):
        assert not buffer[~inside].any()


def slice_of(opt: fastopt.Optimizer, path: str) -> slice:
    k = opt.flat.paths.index(path)
    return slice(opt.flat.offsets[k], opt.flat.offsets[k] + opt.flat.layout.sizes[k])


# --- not finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_that_are_not_finite_are_counted(dtype):
    opt = fastopt.Adam({"w": np.ones(3, dtype)}, nonfinite="skip")
    good, bad = {"w": np.ones(3, dtype)}, {"w": np.array([1.0, np.inf, 1.0], dtype)}
    infos = [opt.step(g) for g in (good, bad, bad, good, bad)]
    assert [info.skipped for info in infos] == [False, True, True, False, True]
    assert [info.step for info in infos] == [1, 1, 1, 2, 2]
    assert [(i.nonfinite_consecutive, i.nonfinite_total) for i in infos] == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3)]
    other = fastopt.Adam({"w": np.ones(3, dtype)}, nonfinite="skip")
    other.load_state_dict(opt.state_dict())
    assert other.step(bad).nonfinite_total == 4
    assert "nonfinite_total=4" in repr(other.step(good))


def test_clipping_by_value_does_not_hide_infinity():
    for nonfinite in ("skip", "raise"):
        opt = fastopt.SGD({"a": np.ones(3), "b": np.ones(2)}, clip_value=1.0, nonfinite=nonfinite)
        grads = {"a": np.ones(3), "b": np.array([np.inf, 0.0])}
        if nonfinite == "skip":
            assert opt.step(grads).skipped
        else:
            with pytest.raises(FloatingPointError, match="gradient 'b'"):
                opt.step(grads)
        assert opt.step_count == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_finite_is_zeroed_before_values_are_clipped(dtype):
    """An infinite gradient is left out, not clipped; the largest finite one is clipped, not left out."""
    largest = np.finfo(dtype).max
    opt = fastopt.SGD({"w": np.zeros(6, dtype)}, lr=1.0, clip_value=0.5, nonfinite="zero")
    opt.step({"w": np.array([np.inf, -np.inf, np.nan, largest, -largest, 0.25], dtype)})
    np.testing.assert_array_equal(opt.params["w"], [0.0, 0.0, 0.0, -0.5, 0.5, -0.25])
    bare = fastopt.SGD({"w": np.zeros(5, dtype)}, lr=1.0, nonfinite="zero")
    bare.step({"w": np.array([np.inf, -np.inf, np.nan, largest, -largest], dtype)})
    np.testing.assert_array_equal(bare.params["w"], [0.0, 0.0, 0.0, -largest, largest])


def test_without_a_policy_nan_spreads_as_in_numpy():
    opt = fastopt.SGD({"a": np.ones(3), "b": np.ones(2)}, lr=1.0, max_norm=1.0)
    info = opt.step({"a": np.array([np.nan, 1.0, 1.0]), "b": np.ones(2)})
    assert math.isnan(info.grad_norm)
    assert math.isnan(info.clip_coefficient)
    assert np.isnan(opt.flat.data[[0, 1, 2, 8, 9]]).all()
    infinite = fastopt.SGD({"a": np.ones(3)}, lr=1.0, max_norm=1.0)
    assert infinite.step({"a": np.array([np.inf, 1.0, 1.0])}).clip_coefficient == 0.0
    np.testing.assert_array_equal(infinite.params["a"], [np.nan, 1.0, 1.0])


def test_a_skipped_step_zeroes_the_gradients_where_every_step_does():
    opt = fastopt.SGD({"w": np.ones(3)}, nonfinite="skip", zero_grad=True)
    opt.grads["w"][:] = np.nan
    assert opt.step().skipped
    assert not opt.grads["w"].any()


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_gradients_that_are_passed_are_not_zeroed_nor_is_the_buffer_that_was_not_read(value):
    """Whether the step is made or skipped."""
    opt = fastopt.SGD({"w": np.ones(3), "e": np.ones((2, 2))}, nonfinite="skip", zero_grad=True)
    grads = {"w": np.full(3, value), "e": None}
    opt.grads["w"][:] = opt.grads["e"][:] = 7.0
    assert opt.step(grads).skipped == math.isnan(value)
    assert opt.step_rows({"e": ([0], np.ones((1, 2)))}, grads).skipped == math.isnan(value)
    np.testing.assert_array_equal(grads["w"], [value] * 3)
    assert (opt.grads["w"] == 7.0).all()
    assert (opt.grads["e"] == 7.0).all()
    opt.grads["w"][:] = value
    assert opt.step(opt.grads).skipped == math.isnan(value)
    np.testing.assert_array_equal(opt.grads["w"], [value] * 3)


def test_float64_squares_that_overflow_are_not_taken_for_infinite_gradients():
    opt = fastopt.SGD({"w": np.ones(3)}, nonfinite="skip")
    info = opt.step({"w": np.full(3, 1e200)})
    assert not info.skipped


@pytest.mark.parametrize(
    "options", [{"clip_value": 1e18, "max_norm": 1e30}, {"clip_value": 1e30, "max_norm": 1.0}], ids=str
)
@pytest.mark.parametrize("case", PER_RULE[::3], ids=str)
def test_clipping_keeps_every_state_finite_where_the_square_of_a_gradient_is_not(case, options):
    """One of the two clips nothing: so they are compiled as in other tests."""
    opt = case.make({"w": np.ones((2, 3), np.float32)}, **{**EVERYTHING, **options})
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(4, 2, 3)).astype(np.float32)
    grads[1, 0, 1] = 1e21
    for grad in grads:
        before = opt.params["w"].copy()
        opt.step({"w": grad})
    for name, state in opt.states.items():
        assert np.isfinite(state["w"]).all(), name
    assert np.isfinite(opt.params["w"]).all()
    assert (opt.params["w"] != before).any()


def test_nonfinite_does_not_look_at_states():
    """As docs/numerics.md says."""
    opt = fastopt.Adam({"w": np.ones(2, np.float32)}, nonfinite="raise")
    opt.step({"w": np.array([1e21, 1.0], np.float32)})
    assert np.isinf(opt.states["v"]["w"][0])
    before = opt.params["w"].copy()
    opt.step({"w": np.ones(2, np.float32)})
    np.testing.assert_array_equal(opt.params["w"] == before, [True, False])


# --- what a step returns ----------------------------------------------------------------------------------------------


def test_the_norm_is_measured_where_it_is_asked_for_and_otherwise_unknown(monkeypatch):
    """The caller may overwrite gradients as soon as the step is made: a norm of them read later would be another."""
    params = start(np.float32)
    grads = grads_like(np.random.default_rng(0), params)
    lr = fastopt.schedules.inverse_time(0.5, 1.0)
    silent, told = fastopt.Adam(params, lr=lr), fastopt.Adam(params, lr=lr, grad_norm=True)
    launched = count_launches(monkeypatch)
    info = silent.step(grads, grad_scale=2.0)
    assert (info.lr, info.grad_norm, len(launched)) == (0.5, None, 1)
    info = told.step(grads, grad_scale=2.0)
    assert len(launched) == 3
    following = told.step({**grads, "w0": None})
    for grad in grads.values():
        grad[...] = 99.0
    grads = grads_like(np.random.default_rng(0), params)
    assert info.grad_norm == pytest.approx(norm_of(grads) / 2, rel=1e-6)
    assert following.grad_norm == pytest.approx(norm_of({**grads, "w0": np.zeros(1)}), rel=1e-6)
    assert (following.lr, following.clip_coefficient) == (0.25, 1.0)


def test_a_skipped_step_tells_the_rate_that_it_would_have_had():
    opt = fastopt.SGD({"w": np.ones(2)}, lr=fastopt.schedules.inverse_time(1.0, 1.0), nonfinite="skip")
    good, bad = {"w": np.ones(2)}, {"w": np.full(2, np.nan)}
    infos = [opt.step(grads) for grads in (good, bad, bad, good)]
    assert [info.skipped for info in infos] == [False, True, True, False]
    assert [info.lr for info in infos] == [1.0, 0.5, 0.5, 0.5]


def test_a_rule_without_lr_has_no_lr_to_tell():
    assert fastopt.Adadelta({"w": np.ones(2)}).step({"w": np.ones(2)}).lr == 1.0


# --- the average ------------------------------------------------------------------------------------------------------


def test_the_average_begins_at_the_parameters_and_is_swapped_in_and_out():
    params = {"w": np.array([1.0, 2.0]), "b": {"c": np.zeros(1)}}
    opt = fastopt.SGD(params, lr=1.0, ema=0.75)
    np.testing.assert_array_equal(opt.ema["w"], params["w"])
    opt.step({"w": np.array([-4.0, 4.0]), "b": {"c": np.ones(1)}})
    np.testing.assert_array_equal(opt.ema["w"], [2.0, 1.0])
    with opt.swap_ema() as averaged:
        np.testing.assert_array_equal(averaged["w"], [2.0, 1.0])
        assert averaged is opt.params
        for call in (lambda: opt.step(), lambda: opt.accumulate(params), lambda: opt.load_state_dict({})):
            with pytest.raises(RuntimeError, match=r"inside `with opt.swap_ema\(\)`: leave the block first"):
                call()
    np.testing.assert_array_equal(opt.params["w"], [5.0, -2.0])
    with pytest.raises(ZeroDivisionError), opt.swap_ema():
        1 / 0  # noqa: B018
    np.testing.assert_array_equal(opt.params["w"], [5.0, -2.0])


def test_the_average_is_part_of_the_state_and_of_copies():
    rng = np.random.default_rng(0)
    params = start(np.float32)
    opt = fastopt.Adam(params, ema=0.9)
    opt.step(grads_like(rng, params))
    twin = copy.deepcopy(opt)
    resumed = fastopt.Adam(opt.params, ema=0.9)
    resumed.load_state_dict(opt.state_dict())
    grads = grads_like(rng, params)
    for each in (opt, twin, resumed):
        each.step(grads)
    assert contents(opt) == contents(twin) == contents(resumed)
    assert not np.shares_memory(opt._pipeline.average, twin._pipeline.average)
    plain = fastopt.Adam(params)
    with pytest.raises(ValueError, match=r"state: must be saved with ema=None, as this optimizer, got ema=0.9"):
        plain.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"state: must be saved with ema=0.9, as this optimizer, got ema=None"):
        opt.load_state_dict(plain.state_dict())
    with pytest.raises(AttributeError, match=r"construct it with ema=0.999"):
        plain.ema  # noqa: B018
    with pytest.raises(RuntimeError, match=r"construct it with ema=0.999"), plain.swap_ema():
        pass


# --- accumulated gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"grad_norm": True}, {"max_norm": 0.5}, {"max_norm": 0.5, "clip_value": 0.1}], ids="+".join
)
def test_accumulated_gradients_equal_separate_passes(options, reduction, dtype):
    params = start(dtype, (1000, 3, 17, 0, 5000))
    opt, plain = fastopt.Adam(params, **options), fastopt.Adam(params, **options)
    rng = np.random.default_rng(0)
    for _ in range(2):
        total: Any = None
        opt.flat.grad.fill(7)  # not part of the sum, and left alone
        for weight in (1.0, 0.5, 3.0):
            grads = grads_like(rng, params)
            opt.accumulate(grads, weight)
            more = {name: g * g.dtype.type(weight) for name, g in grads.items()}
            total = more if total is None else {name: total[name] + more[name] for name in more}
        info = opt.step(grad_scale=2.0, reduction=reduction)
        assert (opt.flat.grad == 7).all()
        expected = plain.step(total, grad_scale=2.0 * (4.5 if reduction == "mean" else 1.0))
        if options:
            assert info.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        else:
            assert info.grad_norm is expected.grad_norm is None
        if "max_norm" not in options:
            equal(opt.params, plain.params)
        for name, p in opt.params.items():
            np.testing.assert_allclose(p, plain.params[name], rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_in_any_micro_batch_are_left_out():
    params = {"a": np.ones(3), "b": np.ones(3), "c": np.ones(3)}
    opt = fastopt.Momentum(params, lr=1.0, max_norm=1e6)
    one = np.ones(3)
    opt.step({"a": one, "b": one, "c": one})
    before = opt.params["c"].copy()
    opt.accumulate({"a": one, "b": None, "c": None})
    opt.accumulate({"a": one, "b": 2 * one, "c": None})
    info = opt.step(reduction="sum")
    np.testing.assert_array_equal(opt.params["c"], before)
    np.testing.assert_array_equal(opt.states["velocity"]["a"], 2.9 * one)
    np.testing.assert_array_equal(opt.states["velocity"]["b"], 2.9 * one)
    assert info.grad_norm == pytest.approx(math.sqrt(24))
    opt.accumulate({"a": one, "b": None, "c": None})  # begins anew
    assert opt.step().grad_norm == pytest.approx(math.sqrt(3))


def test_accumulated_nans_are_found_without_another_pass():
    opt = fastopt.SGD({"w": np.ones(3)}, nonfinite="skip")
    opt.accumulate({"w": np.array([1.0, np.nan, 1.0])})
    opt.accumulate({"w": np.ones(3)})
    assert opt.step().skipped
    opt.accumulate({"w": np.ones(3)})  # begins anew
    assert not opt.step().skipped
    zero = fastopt.SGD({"w": np.ones(3)}, lr=1.0, nonfinite="zero")
    zero.accumulate({"w": np.array([1.0, np.nan, 1.0])})
    info = zero.step()
    assert info.grad_norm == pytest.approx(math.sqrt(2))
    np.testing.assert_array_equal(zero.params["w"], [0.0, 1.0, 0.0])


def test_gradients_written_into_opt_grads_are_accumulated_from_there():
    opt, plain = (fastopt.SGD({"w": np.zeros(3), "b": np.zeros(1)}, lr=1.0, max_norm=1e6) for _ in range(2))
    first, second = ({"w": np.arange(3.0) + k, "b": np.full(1, 5.0 * k)} for k in (1, 2))
    for grads in (first, second):
        for name, grad in grads.items():
            opt.grads[name][...] = grad
        opt.accumulate(opt.grads)
        opt.grads["w"] += 100.0  # too late
    opt.grads["b"][...] = np.nan
    info = opt.step(reduction="sum")
    expected = plain.step({name: first[name] + second[name] for name in first})
    equal(opt.params, plain.params)
    assert info.grad_norm == pytest.approx(expected.grad_norm)


def test_two_optimizers_of_one_buffer_accumulate_apart():
    flat = fastopt.pack({"w": np.zeros(2)})
    first, second = fastopt.SGD(flat, lr=1.0), fastopt.SGD(flat, lr=1.0)
    first.accumulate({"w": np.array([1.0, 0.0])})
    second.accumulate({"w": np.array([0.0, 4.0])})
    first.step()
    np.testing.assert_array_equal(flat.params["w"], [-1.0, 0.0])
    second.step()
    np.testing.assert_array_equal(flat.params["w"], [-1.0, -4.0])


def test_what_was_accumulated_is_part_of_a_copy():
    opt = fastopt.SGD({"w": np.zeros(2)}, lr=1.0)
    opt.accumulate({"w": np.array([1.0, 2.0])})
    twin = copy.deepcopy(opt)
    opt.accumulate({"w": np.array([3.0, 4.0])})
    twin.step()
    opt.step()
    np.testing.assert_array_equal(twin.params["w"], [-1.0, -2.0])
    np.testing.assert_array_equal(opt.params["w"], [-2.0, -3.0])


def test_zero_grad_drops_what_was_accumulated():
    opt = fastopt.SGD({"w": np.ones(3)}, lr=1.0)
    opt.accumulate({"w": np.ones(3)}, weight=5.0)
    opt.zero_grad()
    opt.accumulate({"w": np.ones(3)})
    opt.step()
    np.testing.assert_array_equal(opt.params["w"], np.zeros(3))


def test_a_strided_gradient_is_added_from_a_copy():
    opt = fastopt.SGD({"w": np.zeros((2, 3))}, lr=1.0)
    opt.accumulate({"w": np.arange(6.0).reshape(3, 2).T})
    opt.step()
    np.testing.assert_array_equal(opt.params["w"], -np.arange(6.0).reshape(3, 2).T)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"max_norm": 0}, ValueError, r"^max_norm: must be a number > 0, got 0$"),
    ({"max_norm": -1.0}, ValueError, r"^max_norm: must be a number > 0, got -1.0$"),
    ({"max_norm": math.nan}, ValueError, r"max_norm: must be a finite number.*, got nan"),
    ({"max_norm": math.inf}, ValueError, r"max_norm: must be a finite number.*, got inf"),
    ({"max_norm": "1"}, TypeError, r"max_norm: must be a finite number.*, got '1'"),
    ({"max_norm": True}, TypeError, r"max_norm: must be a finite number, got True"),
    ({"clip_norm_per_tensor": 0}, ValueError, r"^clip_norm_per_tensor: must be a number > 0, got 0$"),
    ({"clip_norm_per_tensor": math.nan}, ValueError, r"clip_norm_per_tensor: must be a finite number.*, got nan"),
    ({"clip_norm_per_tensor": True}, TypeError, r"clip_norm_per_tensor: must be a finite number, got True"),
    (
        {"clip_norm_per_tensor": 1.0, "max_norm": 2.0},
        ValueError,
        r"^clip_norm_per_tensor: must be None together with max_norm=2.0, got 1.0; choose one of them$",
    ),
    ({"clip_value": 0.0}, ValueError, r"^clip_value: must be a number > 0, got 0.0$"),
    ({"clip_value": 1e39}, ValueError, r"clip_value: must be in the range of float32, got 1e\+39"),
    ({"clip_value": math.nan}, ValueError, r"clip_value: must be a finite number, got nan"),
    ({"ema": 0}, ValueError, r"^ema: must be a number > 0 and < 1, got 0$"),
    ({"ema": 1.0}, ValueError, r"^ema: must be a number > 0 and < 1, got 1.0$"),
    ({"ema": 2}, ValueError, r"^ema: must be a number > 0 and < 1, got 2$"),
    ({"ema": math.nan}, ValueError, r"ema: must be a finite number, got nan"),
    (
        {"nonfinite": "ignore"},
        ValueError,
        r"nonfinite: must be one of 'propagate', 'skip', 'zero', 'raise', got 'ignore'",
    ),
    ({"nonfinite": None}, ValueError, r"nonfinite: must be one of.*, got None"),
    ({"zero_grad": 1}, TypeError, r"zero_grad: must be True or False, got 1"),
    ({"maximize": "no"}, TypeError, r"maximize: must be True or False, got 'no'"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD_OPTIONS, ids=lambda value: str(value)[:30])
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        fastopt.Adam({"w": np.ones(3, np.float32)}, **options)


GOOD = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
BAD_CALLS = [
    (
        lambda opt: opt.accumulate({"a": GOOD["a"]}),
        ValueError,
        r"^grads: must have the structure of the parameters, got a tree without 'b'$",
    ),
    (lambda opt: opt.accumulate([1, 2]), ValueError, r"^grads: must have the structure .* a list instead of a dict"),
    (
        lambda opt: opt.accumulate({**GOOD, "b": np.ones(3, np.float32)}),
        ValueError,
        r"^gradient 'b': must have shape \(2,\) as its parameter",
    ),
    (
        lambda opt: opt.accumulate({**GOOD, "b": np.ones(2)}),
        TypeError,
        r"^gradient 'b': must have dtype float32 as its parameter",
    ),
    (lambda opt: opt.accumulate({**GOOD, "b": [1.0, 2.0]}), TypeError, r"^gradient 'b': must be .*, got list"),
    (
        lambda opt: opt.accumulate({**GOOD, "b": "b"}),
        TypeError,
        r"^gradient 'b': must be a NumPy array or None, got str",
    ),
    (lambda opt: opt.accumulate({**GOOD, "b": np.ma.ones(2)}), TypeError, r"^gradient 'b': must be .* without a mask"),
    (lambda opt: opt.accumulate(opt.params), ValueError, r"^gradient 'a': must not overlap .*parameters and states"),
    (
        lambda opt: opt.accumulate(opt.states["m"]),
        ValueError,
        r"^gradient 'a': must not overlap .*parameters and states",
    ),
    (lambda opt: opt.accumulate(opt.ema), ValueError, r"^gradient 'a': must not overlap .*parameters and states"),
    (lambda opt: opt.accumulate(GOOD, weight=-1), ValueError, r"^weight: must be a number in \[0, inf\), got -1$"),
    (lambda opt: opt.accumulate(GOOD, weight=math.nan), ValueError, r"weight: must be a number in \[0, inf\), got nan"),
    (
        lambda opt: opt.accumulate(GOOD, weight=1e39),
        ValueError,
        r"^weight: must be in the range of float32, got 1e\+39$",
    ),
    (lambda opt: opt.accumulate(GOOD, weight=math.nan), ValueError, r"weight: must be a number in \[0, inf\), got nan"),
    (
        lambda opt: opt.step(GOOD),
        ValueError,
        r"^grads: must be None while accumulated gradients are waiting; call step\(\) ",
    ),
    (lambda opt: opt.step(reduction="max"), ValueError, r"reduction: must be one of 'mean', 'sum'.*, got 'max'"),
    (lambda opt: opt.step(grad_scale=0), ValueError, r"grad_scale: must be a positive finite number .*, got 0"),
    (lambda opt: opt.step(grad_scale=math.nan), ValueError, r"grad_scale: must be a positive finite .*, got nan"),
    (lambda opt: opt.step(grad_scale=math.inf), ValueError, r"grad_scale: must be a positive finite .*, got inf"),
    (
        lambda opt: opt.step(grad_scale=1e-39),
        ValueError,
        r"grad_scale: must be .* a normal number of float32, got 1e-39",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_are_refused_and_change_nothing(call, error, match):
    opt = fastopt.Adam(GOOD, max_norm=1.0, ema=0.9)
    opt.step(GOOD)
    opt.accumulate(GOOD, weight=2.0)
    before = [*contents(opt), opt._pipeline.sums.tobytes()]
    with pytest.raises(error, match=match):
        call(opt)
    assert [*contents(opt), opt._pipeline.sums.tobytes()] == before
    assert opt.step_count == 1
    opt.accumulate(GOOD, weight=2.0)
    assert not opt.grads["a"].any()
    np.testing.assert_array_equal(opt.flat.views(opt._pipeline.sums)[0], 4 * GOOD["a"])
    assert opt.step().grad_norm == pytest.approx(math.sqrt(5), rel=1e-6)


BAD_STATES = [
    ({"nonfinite": None}, TypeError, r"state: nonfinite: must be a dict of 'consecutive' and 'total', got None"),
    (
        {"nonfinite": {"consecutive": -1, "total": 0}},
        ValueError,
        r"state: nonfinite\['consecutive'\]: must be an int from 0, got -1",
    ),
    ({"ema": {}}, ValueError, r"state: ema: must hold an array for each of a, b, got"),
    ({"ema": {"a": np.ones(3), "b": np.ones(2)}}, ValueError, r"state: ema\['a'\]: must be float32"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD_STATES, ids=range(len(BAD_STATES)))
def test_bad_states_are_refused_and_change_nothing(change, error, match):
    opt = fastopt.Adam(GOOD, ema=0.9)
    state = opt.state_dict()
    opt.step(GOOD)
    before = contents(opt)
    with pytest.raises(error, match=match):
        opt.load_state_dict({**state, **change})
    assert contents(opt) == before
    assert opt.step_count == 1


def test_a_state_of_before_there_were_averages_is_read():
    opt = fastopt.Adam(GOOD)
    state = opt.state_dict()
    del state["ema"], state["nonfinite"]
    twin = fastopt.Adam(GOOD)
    twin.step(GOOD)
    twin.load_state_dict(state)
    twin.flat.data[...] = opt.flat.data  # which are no part of the state
    assert twin.step_count == 0
    for each in (opt, twin):
        each.step(GOOD)
    assert contents(twin) == contents(opt)


if __name__ == "__main__" and sys.argv[1:] == ["drivers"]:
    report_drivers()
