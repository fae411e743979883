"""The CUDA backend against the CPU's, over all rules and flags: in numba's simulator, or on a GPU with ``--gpu``.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda.py
"""

from __future__ import annotations

import copy
import gc
import os
import random
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING, MANY_STATES, MATHEMATICS, PER_RULE, WRAPPED, Case, gradients
from test_inputs import sophia
from test_sums import centred, lined, of_chunks, of_tiles, prodigy, ruled

import fastopt
from fastopt.communicators import run_threads
from fastopt.kernels import get_backend
from fastopt.kernels.contract import BLOCK
from fastopt.step.together import RankPipeline
from fastopt.storage import layout
from fastopt.storage.flat import packed

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
BOUND = 4 if SIMULATED else 6
"""In ulp, after one of a few steps. A GPU rounds a product and a sum once. So emulated, Adadelta's mean of the squares
of its steps, which has twice their relative error, was up to 5 away, and RMSprop's parameters up to 4.5."""
SIZES = {"a": (150,), "b": (3, 4), "empty": (0, 2), "number": ()}


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


@pytest.fixture
def own_stream() -> Iterator[Any]:
    """The current stream is one that can be captured, which the legacy stream cannot."""
    with get_backend("cuda").xp.cuda.Stream(non_blocking=True) as stream:
        yield stream


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No result arrives before it is waited for: a GPU may be so fast that the host finds all of them there."""
    monkeypatch.setattr("fastopt.kernels.cuda.decisions.PendingDecision.arrived", False)


def tree(seed: int, dtype: Any = np.float32, sizes: dict[str, tuple[int, ...]] = SIZES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in sizes.items()}


def grads_of(params: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: gradients(rng, p.size, p.dtype).reshape(p.shape) for name, p in params.items()}


def uploaded(grads: Any) -> Any:
    backend = get_backend("cuda")
    return {name: None if g is None else backend.adopt(g) for name, g in grads.items()}


def host(leaf: Any) -> np.ndarray:
    return get_backend("cuda").host(leaf)


def ulps(found: np.ndarray, expected: np.ndarray, magnitude: np.ndarray) -> float:
    largest = np.maximum(np.abs(expected), magnitude).astype(expected.dtype)
    return float(np.max(np.abs(found.astype(np.float64) - expected) / np.spacing(largest), initial=0.0))


def assert_close(cuda: fastopt.Optimizer, cpu: fastopt.Optimizer, before: dict[str, np.ndarray], bound: float) -> None:
    """Within `bound` ulp of the larger of a parameter and its step: a GPU rounds a product and a sum once."""
    for path, expected in cpu.params.items():
        magnitude = np.maximum(np.abs(before[path]), 2.0 * np.abs(expected - before[path]))
        assert ulps(host(cuda.params[path]), expected, magnitude) <= bound, path
    for name, leaves in cpu.states.items():
        for path, expected in leaves.items():
            expected = expected.astype(np.float32)  # a number per tensor is float64, but of float32 hyperparameters
            scale = np.full(expected.shape, np.abs(expected).max(initial=0.0), expected.dtype)
            assert ulps(host(cuda.states[name][path]), expected, scale) <= bound, (name, path)


@pytest.mark.parametrize("case", [*PER_RULE, MANY_STATES, *WRAPPED], ids=str)
def test_every_rule_with_every_flag_is_that_of_the_cpu(case: Case):
    params = tree(0)
    ours, cpu = (case.make(params, backend=name, zero_grad=True, **EVERYTHING) for name in ("cuda", "cpu"))
    for step in range(2):
        before = {path: leaf.copy() for path, leaf in cpu.params.items()}
        grads = {**grads_of(params, step), "number": None if step == 1 else np.array(0.5, np.float32)}
        grads["a"][step] = np.nan  # counts as zero
        told = [opt.step(g, grad_scale=8.0) for opt, g in ((ours, uploaded(grads)), (cpu, grads))]
        assert told[0].grad_norm == pytest.approx(told[1].grad_norm, rel=1e-12)
        assert told[0].nonfinite_total == told[1].nonfinite_total == step + 1
        assert_close(ours, cpu, before, BOUND)
        for path, expected in cpu.ema.items():
            magnitude = np.maximum(np.abs(before[path]), np.abs(cpu.params[path]))  # which may cancel in their average
            assert ulps(host(ours.ema[path]), expected, magnitude) <= BOUND, path
        assert not host(ours.flat.grad).any()


@pytest.mark.parametrize(
    ("name", "nonfinite", "dtype"),
    [
        ("SGD", "propagate", np.float32),
        ("SGD", "skip", np.float64),
        ("LAMB", "raise", np.float32),
        ("NovoGrad", "skip", np.float64),
        ("Muon", "skip", np.float32),
    ],
)
def test_each_gradient_is_clipped_by_its_own_norm(name, nonfinite, dtype):
    params = tree(3, dtype, {**SIZES, "long": (BLOCK // 8, 9)} if name == "SGD" else SIZES)
    overrides = {"b": {"lr": 0.5}} if name != "Muon" else {}
    options = {"clip_norm_per_tensor": 0.75, "nonfinite": nonfinite, "overrides": overrides, "ema": 0.5, "lr": 0.1}
    ours, cpu = (getattr(fastopt, name)(params, backend=place, **options) for place in ("cuda", "cpu"))
    for step in range(4):
        grads = {**grads_of(params, step), "number": None if step == 1 else np.array(0.5, dtype)}
        if step == 2 and nonfinite == "skip":
            grads["a"][3] = np.inf
        told = []
        for opt, given in ((ours, uploaded(grads)), (cpu, grads)):
            if step == 3:
                opt.accumulate(given, weight=0.5)
                opt.accumulate(given)
            told.append(opt.step(None if step == 3 else given, grad_scale=2.0))
        assert told[0].skipped == told[1].skipped == (step == 2 and nonfinite == "skip")
        assert told[0].grad_norm == pytest.approx(told[1].grad_norm, rel=1e-12)
        assert told[0].clip_coefficient == pytest.approx(told[1].clip_coefficient, rel=1e-12)
    if name == "SGD":
        g = np.ones((2, 9), dtype)
        for opt, given in ((ours, get_backend("cuda").adopt(g)), (cpu, g)):
            assert opt.step_rows({"long": (np.array([3, 5]), given)}).clip_coefficient == pytest.approx(0.75 / 18**0.5)
    tolerance = {"rtol": 2e-5, "atol": 1e-7} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-14}
    for path, expected in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), expected, **tolerance)
        np.testing.assert_allclose(host(ours.ema[path]), cpu.ema[path], **tolerance)


@pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in ("Adam", "LAMB", "NovoGrad-weight_decay=0.1", "Muon")], ids=str
)
def test_double_precision_and_groups(case: Case):
    params = tree(1, np.float64)
    overrides = {"b": {"lr": 0.5}, "a": {"weight_decay": 0.25}}
    ours, cpu = (case.make(params, backend=name, overrides=overrides) for name in ("cuda", "cpu"))
    for step in range(3):
        grads = grads_of(params, step)
        ours.step(uploaded(grads))
        cpu.step(grads)
    for path, expected in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), expected, rtol=1e-13, atol=1e-15)


def test_matrices_of_a_rule_stay_on_the_device_and_resume(tmp_path):
    params = tree(4, np.float64, {"W": (4, 4), "conv": (3, 2, 2), "b": (5,)})
    opt, cpu = (
        fastopt.SOAP(params, lr=0.1, precondition_frequency=2, nonfinite="skip", backend=name)
        for name in ("cuda", "cpu")
    )
    for step in range(5):
        grads = grads_of(params, step)
        if step == 3:
            grads["b"][1] = np.nan
        told = [each.step(given) for each, given in ((opt, uploaded(grads)), (cpu, grads))]
        assert told[0].skipped == told[1].skipped == (step == 3)
    assert isinstance(opt.states["QL"]["conv"], get_backend("cuda").array_type)
    for name, leaves in cpu.states.items():
        for path, expected in leaves.items():
            np.testing.assert_allclose(host(opt.states[name][path]), expected, rtol=1e-10, atol=1e-12)
    opt.save(tmp_path / "x")
    loaded = fastopt.SOAP(params, lr=0.5, nonfinite="skip", backend="cuda")
    loaded.load(tmp_path / "x")
    for each in (opt, copied := copy.deepcopy(opt), loaded):
        each.groups["conv"].precondition = False
        each.step(uploaded(grads_of(params, 5)))
        assert host(each.states["QL"]["conv"]).shape == (0, 0)
    for path in params:
        assert host(opt.params[path]).tobytes() == host(copied.params[path]).tobytes()
        assert host(opt.params[path]).tobytes() == host(loaded.params[path]).tobytes()
    opt.restart()
    assert not host(opt.states["L"]["W"]).any()


@pytest.mark.parametrize("name", ["LAMB", "NovoGrad", "StableAdamW"])
def test_norms_over_several_blocks(name):
    params = tree(2, sizes={"long": (BLOCK + 700,), "short": (5,)})
    ours, cpu = (getattr(fastopt, name)(params, lr=0.1, backend=backend) for backend in ("cuda", "cpu"))
    grads = grads_of(params, 0)
    ours.step(uploaded(grads))
    cpu.step(grads)
    for path, expected in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Adam", np.float32), ("Adam", np.float64), ("LAMB", np.float32)],
    ids=["Adam-float32", "Adam-float64", "LAMB"],
)
def test_elements_left_over_and_more_chunks_than_blocks(name, dtype):
    """From no whole 16 bytes to more than all threads of a block take at once, each with every remainder."""
    sizes = {str(size): (size,) for size in (*range(1, 6), *range(127, 132))}
    params = tree(9, dtype, sizes)
    ours, cpu = (getattr(fastopt, name)(params, lr=0.1, backend=backend, max_norm=1.0) for backend in ("cuda", "cpu"))
    for step in range(2):
        grads = grads_of(params, step)
        for opt, given in ((ours, uploaded(grads)), (cpu, grads)):
            opt.accumulate(given)
            opt.accumulate(given, weight=0.5)
        told = ours.step(), cpu.step()
        assert told[0].grad_norm == pytest.approx(told[1].grad_norm, rel=1e-12)
    tolerance = {"rtol": 2e-6, "atol": 1e-7} if dtype == np.float32 else {"rtol": 1e-13, "atol": 1e-15}
    for path, expected in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), expected, **tolerance)
    taken = np.concatenate([host(leaf) for leaf in ours.params.values()])
    assert np.count_nonzero(host(ours.flat.data)) == np.count_nonzero(taken), "padding stays zero"


def test_gradients_written_in_place_and_accumulated():
    params = tree(3)
    ours, cpu = (fastopt.Adam(params, backend=name, max_norm=0.1) for name in ("cuda", "cpu"))
    first, second = grads_of(params, 0), grads_of(params, 1)
    for path, leaf in ours.grads.items():
        get_backend("cuda").copy(leaf, first[path])
    ours.step()
    cpu.step(first)
    for weight, grads in ((2.0, first), (1.0, {**second, "b": None})):
        ours.accumulate(uploaded(grads), weight=weight)
        cpu.accumulate(grads, weight=weight)
    told = ours.step(), cpu.step()
    assert told[0].grad_norm == pytest.approx(told[1].grad_norm, rel=1e-12)
    for path, expected in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("magnitude", [1e200, 1e-170, 1e-315])
@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}], ids=str)
def test_the_norm_of_float64_gradients_is_right_over_its_whole_range(magnitude, options):
    opt = fastopt.SGD(
        {"e": np.zeros((3, 40)), "w": np.zeros(5), "no": np.zeros(3)}, backend="cuda", max_norm=1e-3, **options
    )
    grads = {"e": np.zeros((3, 40)), "w": np.zeros(5), "no": None}
    grads["e"][2, 5], grads["w"][-1] = 3.0 * magnitude, -4.0 * magnitude
    rows = get_backend("cuda").adopt(grads["e"])
    for _ in range(2):  # what is left of before in a buffer is not counted
        found = [opt.step(uploaded(grads))]
        opt.accumulate(uploaded({**grads, "w": None}))
        opt.accumulate(uploaded({**grads, "e": None}))
        found.append(opt.step(reduction="sum"))
        opt.accumulate(uploaded({"e": None, "w": grads["w"], "no": np.full(3, magnitude)}))
        opt.zero_grad()
        opt.accumulate(uploaded(grads))
        found.append(opt.step())
        found.append(opt.step_rows({"e": (np.arange(3), rows)}, uploaded({**grads, "e": None})))
        for k, info in enumerate(found):
            rtol = 1e-14 if magnitude > 1e-310 else 1e-7
            np.testing.assert_allclose(info.grad_norm, 5.0 * magnitude, rtol=rtol, err_msg=str(k))
            assert not info.skipped
    assert opt.step(uploaded({"e": np.zeros((3, 40)), "w": np.zeros(5), "no": np.zeros(3)})).grad_norm == 0.0


@pytest.mark.parametrize(("p_scale", "g_scale"), [(1e200, 1.0), (1e-170, 1.0), (1.0, 1e200), (1.0, 1e-170)])
@pytest.mark.parametrize("name", ["LARS", "LAMB", "NovoGrad"])
def test_rules_that_look_at_norms_are_the_cpus_beyond_the_squares(name, p_scale, g_scale):
    if g_scale > 1.0 and name != "LARS":
        pytest.skip("their v is a square, which float64 does not hold")
    rng = np.random.default_rng(0)
    params = {path: p_scale * rng.normal(size=size) for path, size in (("a", 5), ("b", 133))}
    ours, cpu = (getattr(fastopt, name)(params, backend=backend, weight_decay=0.1) for backend in ("cuda", "cpu"))
    for _ in range(2):
        grads = {path: g_scale * rng.normal(size=p.size) for path, p in params.items()}
        ours.step(uploaded(grads))
        cpu.step(grads)
    for path, expected in cpu.params.items():
        largest = np.abs(expected).max()
        np.testing.assert_allclose(host(ours.params[path]) / largest, expected / largest, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"clip_norm_per_tensor": 1.0}], ids=str)
def test_a_step_without_any_gradient_has_norm_0(options):
    opt = fastopt.SGD({"e": np.ones((4, 2)), "w": np.ones(3)}, lr=1.0, backend="cuda", **options)
    info = opt.step({"e": None, "w": None})
    assert (info.step, info.grad_norm, info.clip_coefficient) == (1, 0.0, 1.0)
    rows = get_backend("cuda").adopt(np.array([[3.0, 4.0]]))
    assert opt.step_rows({"e": (np.array([1]), rows)}).grad_norm == 5.0
    np.testing.assert_allclose(host(opt.params["e"])[1], [0.4, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(host(opt.params["w"]), np.ones(3))


def test_a_step_does_not_wait_for_the_norm(monkeypatch):
    params, backend = tree(8), get_backend("cuda")
    ours, cpu = (fastopt.AdamW(params, backend=name, max_norm=0.1, ema=0.9) for name in ("cuda", "cpu"))
    grads = grads_of(params, 0)
    there, reading = uploaded(grads), backend.host
    monkeypatch.setattr(backend, "host", lambda array: pytest.fail("waited for the device"))
    first = ours.step(there, grad_scale=4.0)
    ours.accumulate(there)
    ours.accumulate(there, weight=2.0)
    second = ours.step()
    monkeypatch.setattr(backend, "host", reading)
    told = [cpu.step(grads, grad_scale=4.0)]
    cpu.accumulate(grads)
    cpu.accumulate(grads, weight=2.0)
    told.append(cpu.step())
    for info, expected in zip((first, second), told, strict=True):
        assert info.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)
        assert info.clip_coefficient == pytest.approx(expected.clip_coefficient, rel=1e-12)
    for path, expected in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "made", [ruled, prodigy, centred, lined], ids=["each", "all", "all, and their size", "rows and columns"]
)
def test_sums_settled_one_after_the_other_and_numbers_of_each_and_of_all(made, monkeypatch):
    """Three terms, which are two passes; a stage without any; parameters without gradient; and a skipped step."""
    monkeypatch.setattr(layout, "TILE", 2400)
    params = tree(5, np.float64, {"long": (BLOCK + 700,), "b": (3, 4), "empty": (0,), "absent": (5,), "cut": (16, 160)})
    options = {"max_norm": 0.5, "ema": 0.9, "zero_grad": True, "nonfinite": "skip", "overrides": {"b": {"lr": 0.5}}}
    ours, cpu = (fastopt.Optimizer(params, made, backend=backend, **options) for backend in ("cuda", "cpu"))
    for step in range(4):
        grads = grads_of(params, step)
        if step == 2:  # the device decides, and the host where some gradient is absent
            grads["b"] = np.full((3, 4), np.nan)
        if step == 3:
            grads["absent"] = None
        given = {path: None if g is None else uploaded({path: g})[path] for path, g in grads.items()}
        assert ours.step(given).skipped == cpu.step(grads).skipped == (step == 2)
    for path, expected in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), expected, rtol=1e-11, atol=1e-14, err_msg=path)
        np.testing.assert_allclose(host(ours.ema[path]), cpu.ema[path], rtol=1e-11, atol=1e-14, err_msg=path)
        for number in made.numbers:
            found, wanted = host(ours.states[number][path]), cpu.states[number][path]
            np.testing.assert_allclose(found, wanted, rtol=1e-12, err_msg=f"{number} of {path}")


@pytest.mark.parametrize(("of_p", "of_g"), [(1.0, 1.0), (1e200, 1e190), (1e-200, 1e190)], ids=["1", "large", "both"])
@pytest.mark.parametrize("made", [of_chunks, of_tiles], ids=["chunks", "tiles"])
def test_norms_of_any_function_are_the_cpus_beyond_the_squares(made, of_p, of_g):
    rng = np.random.default_rng(0)
    shapes = {"a": (70,), "b": (3, 4), "empty": (0,)}
    params, grads = ({path: of * rng.normal(size=shape) for path, shape in shapes.items()} for of in (of_p, of_g))
    ours, cpu = (fastopt.Optimizer(params, made, backend=backend) for backend in ("cuda", "cpu"))
    ours.step(uploaded(grads))
    cpu.step(grads)
    for path, expected in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_way_up_the_loss_is_that_of_the_cpu_and_is_gone_after_it(dtype):
    params = tree(6, dtype)
    ours, cpu = (fastopt.Adam(params, backend=backend, max_norm=0.5, nonfinite="skip") for backend in ("cuda", "cpu"))
    for step in range(2):
        grads = {**grads_of(params, step), "b": None}
        given = {path: None if g is None else uploaded({path: g})[path] for path, g in grads.items()}
        before = host(ours.flat.data).tobytes()
        with ours.ascent(0.5, given) as there, cpu.ascent(0.5, grads) as expected:
            for path, leaf in expected.items():
                np.testing.assert_allclose(host(there[path]), leaf, rtol=1e-6 if dtype == np.float32 else 1e-13)
        assert host(ours.flat.data).tobytes() == before
        ours.step(given)
        cpu.step(grads)


@pytest.mark.parametrize("kind", ["Adam", "LAMB", "NovoGrad", "LARS", "StableAdamW"])
def test_a_skipped_step_changes_nothing(kind):
    def everything() -> list[bytes]:
        numbers = [host(array) for state in opt.states.values() for array in state.values()]
        return [host(array).tobytes() for array in (opt.flat.data, *opt._pipeline.buffers, *numbers)]

    opt = getattr(fastopt, kind)(tree(4), backend="cuda", nonfinite="skip", ema=0.9)
    opt.step(uploaded(grads_of(tree(4), 0)))
    before = everything()
    bad = {**grads_of(tree(4), 1), "b": np.full((3, 4), np.inf, np.float32)}
    info = opt.step(uploaded(bad))
    assert (info.skipped, info.step, info.nonfinite_total) == (True, 1, 1)
    assert everything() == before
    raising = fastopt.Adam(tree(4), backend="cuda", nonfinite="raise")
    with pytest.raises(FloatingPointError, match="gradient 'b' holds NaN or infinity"):
        raising.step(uploaded(bad))


class AlarmError(BaseException):
    """What a signal's handler raises."""


def interrupted(call: Callable[[], Any], seconds: float) -> bool:
    def handle(*_: Any) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, handle)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except AlarmError:
        return True
    finally:
        signal.signal(signal.SIGALRM, before)
    return False


def kept(opt: fastopt.Optimizer) -> tuple[Any, ...]:
    pending = opt._running.pending
    sums = None if pending is None else (pending.weight, pending.present.tobytes(), host(pending.partials).tobytes())
    buffers = [host(buffer).tobytes() for buffer in (opt.flat.data, *opt._running.buffers)]
    return opt.step_count, opt._running.nonfinite, opt._running.groups.missed, buffers, sums


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.parametrize("what", ["step", "skip", "partial", "LAMB", "accumulate", "eval_params"])
def test_an_interrupted_call_is_launched_whole_or_not_at_all(what):
    grads = grads_of(tree(4), 1)
    if what == "skip":
        grads["b"] = np.full((3, 4), np.inf, np.float32)
    given = uploaded({**grads, "b": None} if what == "partial" else grads)
    options = {"max_norm": 0.5, "nonfinite": "skip"} if what != "LAMB" else {}
    kind = {"LAMB": fastopt.LAMB, "eval_params": fastopt.ScheduleFreeAdamW}.get(what, fastopt.Adam)
    opt = kind(tree(4), backend="cuda", **options)
    opt.step(uploaded(grads_of(tree(4), 0)))

    def call(opt: fastopt.Optimizer) -> None:
        if what == "eval_params":
            with opt.eval_params():
                pass
        else:
            (opt.accumulate if what == "accumulate" else opt.step)(given)

    twin = copy.deepcopy(opt)
    call(twin)
    expected = kept(opt), kept(twin)
    twin = copy.deepcopy(opt)
    started = time.perf_counter()
    call(twin)
    longest = 1.2 * (time.perf_counter() - started)
    for _ in range(8):
        twin = copy.deepcopy(opt)
        raised = interrupted(lambda: call(twin), random.uniform(1e-5, longest))  # noqa: B023 called here
        there = kept(twin)
        assert there == expected[1] or (raised and there == expected[0])
        assert not twin._running.held


def test_contexts_copies_states_and_checkpoints(tmp_path):
    params = tree(5)
    opt = fastopt.ScheduleFreeAdamW(params, lr=0.1, backend="cuda", ema=0.5)
    cpu = fastopt.ScheduleFreeAdamW(params, lr=0.1, ema=0.5)
    for step in range(2):
        opt.step(uploaded(grads_of(params, step)))
        cpu.step(grads_of(params, step))
    for context in ("eval_params", "swap_ema"):
        with getattr(opt, context)() as there, getattr(cpu, context)() as expected:
            np.testing.assert_allclose(host(there["a"]), expected["a"], rtol=1e-5, atol=1e-7)
    twin = copy.deepcopy(opt)
    saved = opt.state_dict()
    assert all(type(array) is np.ndarray for array in saved["state"]["z"].values())
    opt.save(tmp_path / "run.safetensors")
    resumed = fastopt.ScheduleFreeAdamW(tree(6), lr=0.1, backend="cuda", ema=0.5)
    resumed.load(tmp_path / "run.safetensors")
    elsewhere = fastopt.ScheduleFreeAdamW(tree(6), lr=0.1, ema=0.5)
    elsewhere.load(tmp_path / "run.safetensors")  # a checkpoint does not tell where it was made
    grads = grads_of(params, 9)
    for each in (opt, twin, resumed):
        each.step(uploaded(grads))
    elsewhere.step(grads)
    assert host(opt.flat.data).tobytes() == host(twin.flat.data).tobytes() == host(resumed.flat.data).tobytes()
    np.testing.assert_allclose(elsewhere.params["a"], host(opt.params["a"]), rtol=1e-6, atol=1e-8)


def test_states_begin_at_the_weights_that_were_written_before_the_first_step():
    params, wanted = tree(5), tree(6)
    opt = fastopt.ScheduleFreeAdamW(params, lr=0.1, backend="cuda", ema=0.5, nonfinite="skip")
    expected = fastopt.ScheduleFreeAdamW(wanted, lr=0.1, backend="cuda", ema=0.5, nonfinite="skip")
    opt.step(uploaded({**grads_of(params, 1), "number": np.array(np.nan, np.float32)}))  # skipped, on the device
    for path, leaf in opt.params.items():
        get_backend("cuda").copy(leaf, wanted[path])
    assert host(opt.ema["a"]).tobytes() == wanted["a"].tobytes()
    for seed in range(2):
        for each in (opt, expected):
            each.step(uploaded({**grads_of(params, seed), "b": None}))
    for each in (opt, expected):
        each.set_params(tree(7))
        each.step(uploaded(grads_of(params, 3)))
    assert opt.step_count == 3
    assert host(opt.flat.data).tobytes() == host(expected.flat.data).tobytes()
    for found, like in ((opt.ema, expected.ema), (opt.states["z"], expected.states["z"])):
        for path in SIZES:
            assert host(found[path]).tobytes() == host(like[path]).tobytes(), path
    opt.restart()
    assert opt.step_count == 0
    assert not any(host(leaf).any() for leaf in opt.states["v"].values())
    assert host(opt.states["z"]["a"]).tobytes() == host(opt.params["a"]).tobytes()


def test_what_fits_is_loaded_as_on_the_cpu(tmp_path):
    params = tree(5)
    saved = fastopt.Adam(params, lr=0.1)
    saved.step(grads_of(params, 1))
    saved.save(tmp_path / "x")
    head = np.ones(3, np.float32)
    opt, cpu = (
        fastopt.Adam({**tree(6), "head": head}, lr=0.2, backend=backend, ema=0.5) for backend in ("cuda", "cpu")
    )
    for one in (opt, cpu):
        report = one.load(tmp_path / "x", strict=False, keep={"lr"})
        assert set(report.missing) == {"head", "m/head", "v/head", *(f"ema/{path}" for path in one.params)}
        assert (one.lr, one.step_count) == (0.2, 1)
    for path in cpu.params:
        np.testing.assert_array_equal(host(opt.params[path]), cpu.params[path])
        np.testing.assert_array_equal(host(opt.ema[path]), cpu.params[path])
        np.testing.assert_array_equal(host(opt.states["m"][path]), cpu.states["m"][path])
    grads = {**grads_of(params, 2), "head": head}
    opt.step(uploaded(grads))
    cpu.step(grads)
    np.testing.assert_allclose(host(opt.flat.data), cpu.flat.data, rtol=1e-5, atol=1e-7)


def test_arrays_of_another_place_are_refused():
    params = tree(7)
    ours, cpu = fastopt.Adam(params, backend="cuda"), fastopt.Adam(params)
    with pytest.raises(TypeError, match=r"gradient 'a': must be \w+\.ndarray or None, got a NumPy array"):
        ours.step(grads_of(params, 0))
    assert ours.step_count == 0
    if not SIMULATED:
        with pytest.raises(TypeError, match="gradient 'a': must be a NumPy array"):
            cpu.step(uploaded(grads_of(params, 0)))


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB", "NovoGrad"])
@pytest.mark.usefixtures("behind")
def test_the_device_decides_about_gradients_that_are_not_finite_and_nobody_waits(name, nonfinite):
    params, backend = tree(20), get_backend("cuda")
    options = {"nonfinite": nonfinite, "max_norm": 0.5, "ema": 0.75, "zero_grad": True}
    schedule = fastopt.schedules.exponential(0.1, 0.05)
    ours, cpu = (getattr(fastopt, name)(params, lr=schedule, backend=place, **options) for place in ("cuda", "cpu"))
    ours.step(uploaded(grads_of(params, 0)))
    cpu.step(grads_of(params, 0))
    batches = [grads_of(params, seed) for seed in range(1, 8)]
    for bad in (1, 2, 4):
        batches[bad]["a"][7] = [np.nan, np.inf, -np.inf][bad % 3]
    if nonfinite == "skip":
        assert ours.step_count == 1  # or else the second step would ask whether the average has begun, and then no more
    there = [uploaded(grads) for grads in batches]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "host", lambda array: pytest.fail("waited for the device"))
        patch.setattr(
            "fastopt.kernels.cuda.decisions.PendingDecision.read", lambda pending: pytest.fail("waited for the device")
        )
        infos = [ours.step(grads, grad_scale=2.0) for grads in there]
    expected = [cpu.step(grads, grad_scale=2.0) for grads in batches]
    for info, told in zip(infos, expected, strict=True):
        assert (info.step, info.skipped, info.lr) == (told.step, told.skipped, told.lr)
        assert info.nonfinite_consecutive == told.nonfinite_consecutive
        assert info.nonfinite_total == told.nonfinite_total
        assert info.grad_norm == pytest.approx(told.grad_norm, rel=1e-12, nan_ok=True)
        assert info.clip_coefficient == pytest.approx(told.clip_coefficient, rel=1e-12, nan_ok=True)
    assert ours.step_count == cpu.step_count == (5 if nonfinite == "skip" else 8)
    assert ours.lr == cpu.lr
    for path, value in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), value, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(host(ours.ema[path]), cpu.ema[path], rtol=2e-5, atol=1e-7)
    assert not host(ours.flat.grad).any()


def test_the_host_waits_for_the_first_of_many_unknown_steps():
    params = tree(21)
    ours, cpu = (fastopt.Adam(params, lr=0.1, backend=place, nonfinite="skip") for place in ("cuda", "cpu"))
    for step in range(30):
        grads = grads_of(params, step)
        if step % 3 == 0:
            grads["b"][0, 0] = np.inf
        ours.step(uploaded(grads))
        cpu.step(grads)
        assert len(ours._pipeline.device.in_flight) <= 9
    assert ours.step_count == cpu.step_count == 20
    assert ours.state_dict()["nonfinite"] == cpu.state_dict()["nonfinite"]
    for path, value in cpu.params.items():
        np.testing.assert_allclose(host(ours.params[path]), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"nonfinite": "zero"}, {"grad_norm": True}], ids=str)
def test_results_outlive_the_optimizer_and_do_not_hold_it(options):
    params = tree(26)
    ours, cpu = (fastopt.Adam(params, lr=0.1, backend=place, **options) for place in ("cuda", "cpu"))
    bad = {**grads_of(params, 1), "number": np.array(np.nan, np.float32)}
    pairs = []
    for grads in (grads_of(params, 0), {**bad, "a": None}, bad, bad, grads_of(params, 2), bad):
        pairs.append((ours.step(uploaded(grads)), cpu.step(grads)))
    assert pairs[3][0].step == pairs[3][1].step  # which takes the results of the steps up to this one
    pairs.append((ours.step(uploaded(grads_of(params, 3))), cpu.step(grads_of(params, 3))))
    pipeline = ours._pipeline
    parts = [weakref.ref(each) for each in (ours, pipeline, pipeline.flat, pipeline.plan, *pipeline.flat.arrays)]
    gc.collect()
    gc.disable()
    try:
        del ours, pipeline
        assert [part() for part in parts if part() is not None] == []
    finally:
        gc.enable()
    for info, told in reversed(pairs):
        assert (info.step, info.skipped) == (told.step, told.skipped)
        assert (info.nonfinite_consecutive, info.nonfinite_total) == (told.nonfinite_consecutive, told.nonfinite_total)
        assert info.grad_norm == pytest.approx(told.grad_norm, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("layer_first", [False, True])
def test_a_deep_copy_keeps_the_tie_to_a_layer(layer_first):
    bn = fastopt.BatchNorm(2, backend="cuda")
    opt = fastopt.SGD({"bn": bn.state}, lr=1.0)
    bn.attach(opt.params["bn"], opt.grads["bn"])
    kept = [bn, opt.params, opt] if layer_first else [opt, opt.params, bn]
    twins = copy.deepcopy(kept)
    layer, params, twin = twins if layer_first else twins[::-1]
    layer.forward(get_backend("cuda").adopt(np.array([[0.0, 1.0], [2.0, 5.0]], np.float32)))
    layer.backward(get_backend("cuda").adopt(np.ones((2, 2), np.float32)))
    twin.step()
    assert host(params["bn"]["beta"]).tolist() == host(layer.params["beta"]).tolist() == [-2.0, -2.0]
    assert host(twin.params["bn"]["running_mean"]).round(6).tolist() == pytest.approx([0.1, 0.3])
    assert not host(opt.params["bn"]["beta"]).any()
    assert copy.deepcopy(layer)._backend is layer._backend


@pytest.mark.parametrize(
    "spoil",
    [
        lambda opt: copy.deepcopy(opt),
        lambda opt: opt.load_state_dict(opt.state_dict()),
        lambda opt: setattr(opt, "lr", 0.05),
        lambda opt: opt.step({**uploaded(grads_of(tree(22), 5)), "a": None}),
    ],
    ids=["deepcopy", "load_state_dict", "lr", "None"],
)
@pytest.mark.usefixtures("behind")
def test_what_needs_the_count_of_steps_waits_for_it(spoil):
    params = tree(22)
    opt = fastopt.Adam(params, lr=0.1, backend="cuda", nonfinite="skip")
    bad = {**grads_of(params, 1), "number": np.array(np.nan, np.float32)}
    for grads in (grads_of(params, 0), bad, grads_of(params, 2)):
        opt.step(uploaded(grads))
    assert len(opt._pipeline.device.in_flight) == 3
    twin = spoil(opt)
    assert not opt._pipeline.device.in_flight
    assert opt.step_count in (2, 3)
    if isinstance(twin, fastopt.Optimizer):
        for each in (opt, twin):
            each.step(uploaded(bad))
            each.step(uploaded(grads_of(params, 3)))
        assert host(opt.flat.data).tobytes() == host(twin.flat.data).tobytes()
        assert opt.step_count == twin.step_count == 3


@pytest.mark.parametrize("case", [BY_NAME[name] for name in ("Adam", "LAMB", "NovoGrad-weight_decay=0.1")], ids=str)
def test_a_captured_step_is_replayed_with_the_numbers_of_each_step(case, own_stream):
    """In the simulator launches are recorded as they would be by CuPy's stream."""
    params, schedule = tree(23), fastopt.schedules.exponential(0.1, 0.2)
    options = {"lr": schedule, "max_norm": 0.5, "zero_grad": True, "overrides": {"b": {"weight_decay": 0.1}}}
    ours, cpu = (case.make(params, backend=place, **options) for place in ("cuda", "cpu"))
    backend, stream = get_backend("cuda"), own_stream
    for each, grads in ((ours, uploaded(grads_of(params, 0))), (cpu, grads_of(params, 0))):
        each.step(grads, grad_scale=2.0)
    before = host(ours.flat.data).tobytes()
    stream.begin_capture()
    ours.step(grad_scale=2.0)
    graph = stream.end_capture()
    assert (ours.step_count, host(ours.flat.data).tobytes()) == (1, before)
    for step in range(1, 5):
        if step == 3:
            ours.lr = cpu.lr = 0.025
        grads = grads_of(params, step)
        for path, leaf in ours.grads.items():
            backend.copy(leaf, grads[path])
        info = ours.prepare_replay(grad_scale=4.0)
        graph.launch()
        told = cpu.step(grads, grad_scale=4.0)
        assert (info.step, info.lr) == (told.step, told.lr)
        assert info.grad_norm == pytest.approx(told.grad_norm, rel=1e-12)
        assert info.clip_coefficient == pytest.approx(told.clip_coefficient, rel=1e-12)
        for path, value in cpu.params.items():
            np.testing.assert_allclose(host(ours.params[path]), value, rtol=2e-5, atol=1e-7)
    assert ours.step_count == cpu.step_count == 5


def test_what_cannot_be_captured_or_replayed_is_refused(own_stream):
    params, stream = tree(24), own_stream
    plain = fastopt.Adam(params, backend="cuda")
    with pytest.raises(RuntimeError, match="no step\\(\\) was captured"):
        plain.prepare_replay()

    def captured(opt: fastopt.Optimizer, *args: Any) -> None:
        stream.begin_capture()
        try:
            opt.step(*args)
        finally:
            stream.end_capture()

    with pytest.raises(RuntimeError, match="make one ordinary step like it first"):
        captured(plain)
    plain.step()
    with pytest.raises(ValueError, match="with None, cannot be captured"):
        captured(plain, {**uploaded(grads_of(params, 0)), "a": None})
    captured(plain)
    with pytest.raises(ValueError, match=r"grad_scale: must be 1 as in the captured step, got 2\.0"):
        plain.prepare_replay(grad_scale=2.0)
    plain.step({**uploaded(grads_of(params, 0)), "a": None})
    with pytest.raises(RuntimeError, match="capture it again"):
        plain.prepare_replay()
    skipping = fastopt.Adam(params, backend="cuda", nonfinite="skip")
    skipping.step()
    with pytest.raises(ValueError, match="nonfinite: must be 'propagate' for a step that is captured in a CUDA graph"):
        captured(skipping)
    each = fastopt.Adam(params, backend="cuda", clip_norm_per_tensor=1.0)
    each.step()
    with pytest.raises(ValueError, match="clip_norm_per_tensor: must be None for a step that is captured"):
        captured(each)
    muon = fastopt.Muon(params, backend="cuda")
    muon.step()
    with pytest.raises(TypeError, match="cannot be captured"):
        captured(muon)
    averaging = fastopt.Adam(params, backend="cuda", ema=0.5)
    averaging.step()
    captured(averaging)
    averaging.restart()
    with pytest.raises(RuntimeError, match="before states have begun at the parameters: make an ordinary step first"):
        captured(averaging)
    with pytest.raises(RuntimeError, match="no step\\(\\) was captured"):
        averaging.prepare_replay()
    on_host = fastopt.Adam(params)
    on_host.step()
    with pytest.raises(RuntimeError, match="no step\\(\\) was captured"):
        on_host.prepare_replay()


def test_a_step_takes_further_trees_of_the_device():
    """In some steps, one of which is skipped, whole; what cannot be recorded is refused."""
    params = tree(0)
    options: dict[str, Any] = {"lr": 0.05, "nonfinite": "skip"}
    ours, cpu = (fastopt.Optimizer(params, sophia, backend=place, **options) for place in ("cuda", "cpu"))
    for step in range(4):
        before = {path: leaf.copy() for path, leaf in cpu.params.items()}
        grads = grads_of(params, step)
        grads["a"][3] = np.nan if step == 2 else 1.0
        extra = None if step == 1 else grads_of(params, 10 + step)
        given = [None if extra is None else {"hessian": found(extra)} for found in (uploaded, dict)]
        told = ours.step(uploaded(grads), extra=given[0])
        assert told.skipped == cpu.step(grads, extra=given[1]).skipped == (step == 2)
        assert_close(ours, cpu, before, BOUND)
    with pytest.raises(TypeError, match=r"^extra\['hessian'\]: 'a': must be \w+\.ndarray or None, got a NumPy"):
        ours.step(uploaded(grads), extra={"hessian": grads})


@pytest.mark.parametrize("name", ["Adam", "Momentum", "RMSprop", "SGD"])
def test_rows_are_stepped_as_on_the_cpu(name):
    sizes = {"table": (23, 5), "bias": (7,)}
    params = tree(25, sizes=sizes)
    options: dict[str, Any] = {"lr": 0.05, "ema": 0.9, "max_norm": 1.0, "nonfinite": "skip"}
    ours, cpu = (getattr(fastopt, name)(params, backend=place, **options) for place in ("cuda", "cpu"))
    rng = np.random.default_rng(0)
    adopt = get_backend("cuda").adopt
    for step in range(6):
        indices = rng.integers(0, 23, 9)  # some repeated
        row_grads = rng.standard_normal((9, 5), np.float32)
        if step == 3:
            row_grads[2, 2] = np.nan
        dense = {"table": None, "bias": rng.standard_normal(7, np.float32)}
        told = cpu.step_rows({"table": (indices, row_grads)}, dense)
        info = ours.step_rows({"table": (adopt(indices) if step % 2 else indices, adopt(row_grads))}, uploaded(dense))
        assert (
            (info.step, info.skipped)
            == (told.step, told.skipped)
            == ((3, True) if step == 3 else (step + (step < 3), False))
        )
        assert info.grad_norm == pytest.approx(told.grad_norm, rel=1e-6, nan_ok=True)
        np.testing.assert_allclose(
            host(ours.read_rows("table", [0, 5, 22])), cpu.read_rows("table", [0, 5, 22]), rtol=1e-5, atol=1e-7
        )
    for path, value in cpu.ema.items():
        np.testing.assert_allclose(host(ours.ema[path]), value, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(host(ours.params[path]), cpu.params[path], rtol=1e-5, atol=1e-7)
    with pytest.raises(
        TypeError, match=r"rows\['table'\]: row_grads: must be \w+\.ndarray of row gradients, got a NumPy"
    ):
        ours.step_rows({"table": (np.array([1]), np.ones((1, 5), np.float32))})


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["no flags", "all flags"])
@pytest.mark.parametrize("name", ["SGD-lr=0.1", "Adam", "LAMB", "NovoGrad-weight_decay=0.1"])
def test_parameters_stay_where_they_are(name, options):
    params, xp = tree(30), get_backend("cuda").xp
    whole = xp.zeros(sum(p.size for p in params.values()) + 3 * len(params), np.float32)
    mine, start = {}, 1  # of odd addresses, in one larger array
    for path, p in params.items():
        mine[path] = whole[start : start + p.size].reshape(p.shape)
        mine[path][...] = xp.asarray(p)
        start += p.size + 3
    packed = BY_NAME[name].make(params, backend="cuda", **options)
    in_place = BY_NAME[name].make(mine, copy=False, **options)
    given = BY_NAME[name].make(None, **options)
    theirs = {path: xp.asarray(p).copy() for path, p in params.items()}
    for step in range(2):
        grads = uploaded(grads_of(params, step))
        packed.step(grads)
        in_place.step(grads)
        given.update(theirs, grads)
    for path in params:
        assert host(packed.params[path]).tobytes() == host(mine[path]).tobytes() == host(theirs[path]).tobytes(), path
    assert in_place.flat.backend == "cuda"
    with pytest.raises(TypeError, match="must be an array of the device to be updated in place"):
        fastopt.pack(params, backend="cuda", copy=False)
    with pytest.raises(TypeError, match="must be an array of the device to be updated in place"):
        given.update(params, grads)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["engine", "fixed"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}], ids=str)
def test_a_rank_makes_the_step_of_accumulated_gradients(order, options):
    """One rank: the simulator runs one kernel at a time."""
    params = tree(0)

    def train(comm):
        opt = fastopt.Adam(params, backend="cuda", comm=comm, shard=False, order=order, **options)
        other = fastopt.Adam(params, backend="cuda", **options)
        for step in range(3):
            grads = uploaded(grads_of(params, step) | ({"b": None} if step == 1 else {}))
            info = opt.step(grads, weight=2.0)
            other.accumulate(grads, 2.0)
            assert info.grad_norm == other.step().grad_norm
            for path in params:
                assert host(opt.params[path]).tobytes() == host(other.params[path]).tobytes()
        with pytest.raises(ValueError, match=r"^shard: must be False, because the kernels of the CUDA backend"):
            RankPipeline(
                opt.rule, packed(params, backend="cuda", parts=2), opt._options, opt._base, [{}] * 4, opt._ranks
            )

    run_threads(1, train)


# --- functions for rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", MATHEMATICS)
def test_functions_for_rules_are_those_of_the_cpu(name, dtype):
    rng = np.random.default_rng(0)
    p = (rng.normal(size=150) ** 2).astype(dtype)
    g = (10.0 * rng.normal(size=150)).astype(dtype)
    g[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40]
    if name == "uniform_of":
        g = np.arange(150).astype(dtype)
    ours, cpu = (fastopt.Optimizer({"w": p}, MATHEMATICS[name], backend=place) for place in ("cuda", "cpu"))
    ours.step(uploaded({"w": g}))
    cpu.step({"w": g})
    found, expected = host(ours.params["w"]), cpu.params["w"]
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    allowed = 0 if SIMULATED or name == "uniform_of" else 2  # a GPU rounds a product and a sum once
    assert ulps(found[finite], expected[finite], np.zeros(finite.sum(), dtype)) <= allowed
