"""Properties of every rule: what it computes, in which dtype, to how many bits; and faults planted in the rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, CASES, DTYPES, SIZES, Case, gradients

import fastopt
from fastopt import rules
from fastopt.kernels import elements
from fastopt.kernels.bind import bind
from fastopt.kernels.contract import Chunk
from fastopt.rules import adam as adam_rule

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_size = pytest.mark.parametrize("size", SIZES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def test_every_rule_has_a_case():
    assert {case.rule.name for case in CASES} == set(rules.ALL)
    assert {case.optimizer for case in CASES} == set(fastopt.Optimizer.classes)
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("rule", rules.ALL.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtype", [*DTYPES], ids=lambda dtype: dtype.__name__)
def test_a_compiled_rule_returns_the_dtype_it_was_given(rule, dtype):
    values = rule.complete({})
    hyper = type(rule.prepared(1, [values[name] for name in rule.hyperparameters], rule.sample_inputs))
    compiled = elements.scalar(bind(rule.scalar, {}, label="r", scalar=elements.scalar))
    returned = elements.returned_dtypes(compiled, 2 + len(rule.states), hyper, np.dtype(dtype), "")
    name = np.dtype(dtype).name
    assert returned == ([name] * (1 + len(rule.states)) if rule.states else name)


# --- against the reference --------------------------------------------------------------------------------------------


def assert_float64_parity(optimizer: fastopt.Optimizer, oracle: Any, steps: int = 100, seed: int = 0) -> None:
    """Parameters and states equal to the reference's to 1e-12 after `steps` steps, gradients of every magnitude."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        g = gradients(rng, oracle.p.size, np.float64)
        optimizer.step({"w": g})
        oracle.step(g)
    np.testing.assert_allclose(optimizer.params["w"], oracle.p, rtol=1e-12, atol=1e-14, err_msg="params")
    for name, expected in oracle.state.items():
        if name in optimizer.rule.numbers and not oracle.p.size:
            continue  # which nothing settles
        scale = float(np.max(np.abs(expected), initial=0.0))
        np.testing.assert_allclose(
            optimizer.states[name]["w"], expected, rtol=1e-12, atol=1e-15 * scale, err_msg=f"state {name}"
        )


@every_case
@every_size
def test_float64_equals_the_reference(case, size):
    start = np.random.default_rng(1).normal(size=size)
    assert_float64_parity(case.make({"w": start}), case.oracle(start), steps=100 if size < 10_000 else 5)


@every_case
def test_float32_stays_close_to_the_reference(case):
    rng = np.random.default_rng(2)
    start = rng.normal(size=1000).astype(np.float32)
    optimizer, oracle = case.make({"w": start}), case.oracle(start.astype(np.float64))
    for _ in range(20):
        g = rng.normal(size=1000).astype(np.float32)
        optimizer.step({"w": g})
        oracle.step(g.astype(np.float64))
    np.testing.assert_allclose(optimizer.params["w"], oracle.p, rtol=1e-4, atol=1e-4)


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


@every_case
def test_two_dimensions_and_several_parameters_change_nothing(case):
    rng = np.random.default_rng(3)
    tree = {
        "a": rng.normal(size=(13, 5)),
        "b": [rng.normal(size=()), rng.normal(size=(0, 4))],
        "c": rng.normal(size=17),
    }
    optimizer = case.make(tree)
    leaves = [tree["a"], *tree["b"], tree["c"]]
    together = any(sums.over == "all" for sums in case.rule.sums)
    oracles = [case.oracle(leaf) for leaf in ([joined(leaves)] if together else leaves)]
    for _ in range(5):
        grads = [gradients(rng, leaf.size, np.float64).reshape(leaf.shape) for leaf in leaves]
        optimizer.step({"a": grads[0], "b": grads[1:3], "c": grads[3]})
        for oracle, g in zip(oracles, [joined(grads)] if together else grads, strict=True):
            oracle.step(g)
    found = [optimizer.params["a"], *optimizer.params["b"], optimizer.params["c"]]
    for array, oracle in zip([joined(found)] if together else found, oracles, strict=True):
        np.testing.assert_allclose(array, oracle.p, rtol=1e-12, atol=1e-14)


# --- bit for bit ------------------------------------------------------------------------------------------------------


def on_arrays(function: FunctionType) -> FunctionType:
    """The same scalar function, to be called on whole arrays: math.sqrt and comparisons become NumPy's."""
    found = {
        name: on_arrays(getattr(value, "scalar", value))
        for name, value in function.__globals__.items()
        if name in function.__code__.co_names
        and isinstance(getattr(value, "scalar", value), FunctionType)
        and getattr(value, "scalar", value) is not function
    }
    return FunctionType(function.__code__, {**function.__globals__, **found, "math": np}, function.__name__)


def numpy_rule(rule: fastopt.Rule) -> Callable[..., Any]:
    """The rule on whole arrays; one number after another where it has a conditional, which arrays cannot answer."""
    function = on_arrays(rule.scalar)

    def apply(*arguments: Any) -> Any:
        *arrays, h = arguments
        if any(array.size == 0 for array in arrays):
            return tuple(arrays[:1] + arrays[2:]) if rule.states else arrays[0]
        with np.errstate(under="ignore"), suppress(ValueError):  # "the truth value of an array is ambiguous"
            return function(*arguments)
        columns = zip(*(function(*numbers, h) for numbers in zip(*arrays, strict=True)), strict=True)
        return tuple(np.array(column, arrays[0].dtype) for column in columns)

    return apply


def sample(size: int) -> np.ndarray:
    """Some elements of a long vector: its ends, both sides of where chunks may meet, and others."""
    if size <= 1000:
        return np.arange(size)
    near = (np.arange(0, size, 2**14)[:, None] + np.arange(-2, 3)).ravel()
    return np.unique(
        np.concatenate([near[(near >= 0) & (near < size)], np.arange(0, size, 331), np.arange(size - 40, size)])
    )


@pytest.mark.parametrize("case", [case for case in CASES if not case.rule.whole], ids=str)
@every_dtype
@every_size
def test_the_kernel_has_the_bits_of_numpy_doing_the_same(case, dtype, size):
    rng = np.random.default_rng(4)
    p = rng.normal(size=size).astype(dtype)
    optimizer = case.make({"w": p})
    rule = optimizer.rule
    some = sample(size)
    states = [state[some] for state in case.begin(p)]
    p = p[some]
    function = numpy_rule(rule)
    for t in range(1, 6):
        g = gradients(rng, size, dtype)
        optimizer.step({"w": g})
        values = optimizer._pipeline.groups.values_of(0)
        prepared = rule.prepared(t, [values[name] for name in rule.hyperparameters], rule.sample_inputs)
        h = type(prepared)(*map(dtype, prepared))
        decay = dtype(0.0 if rule.owns_weight_decay else values["weight_decay"])
        g = g[some]
        if rule.decoupled:
            new = function(dtype(1.0 - values["lr"] * values["weight_decay"]) * p, g, *states, h)
        else:
            new = function(p, g + decay * p if decay else g, *states, h)
        p, *states = new if rule.states else (new,)
        assert p.dtype == dtype
    assert optimizer.params["w"][some].tobytes() == p.tobytes()
    for name, state in zip(rule.states, states, strict=True):
        assert optimizer.states[name]["w"][some].tobytes() == state.tobytes(), name


@pytest.mark.parametrize("case", [case for case in CASES if case.rule.matrixwise is None], ids=str)
@every_dtype
def test_update_of_bare_arrays_is_the_step_of_the_optimizer(case, dtype):
    rng = np.random.default_rng(5)
    for size in SIZES:
        p = rng.normal(size=size).astype(dtype)
        optimizer = case.make({"w": p})
        rule = optimizer.rule
        states = case.begin(p)
        hyper = {name: value for name, value in case.options.items() if name in rule.names()}
        for t in (1, 2, 3):
            g = gradients(rng, size, dtype)
            optimizer.step({"w": g})
            rule.update_(p, g, *states, t=t, **hyper)
        assert p.tobytes() == optimizer.params["w"].tobytes()
        for name, state in zip((*rule.states, *rule.numbers), states, strict=True):
            assert state.tobytes() == optimizer.states[name]["w"].tobytes()


# --- what an optimizer is for -----------------------------------------------------------------------------------------


@every_case
def test_converges_on_a_quadratic(case):
    target = np.array([3.0, -2.0, 0.5, 1.0])
    curvature = np.array([1.0, 2.0, 0.5, 4.0])
    schedule_free = case.optimizer == "ScheduleFreeAdamW"
    # A rule that divides by the gradient's size takes steps of about lr however near it is: lr has to fall.
    lr = case.lr if schedule_free else fastopt.schedules.inverse_time(case.lr, 0.02)
    rates = {"lr": lr, "adamw_lr": lr} if case.optimizer == "Muon" else {"lr": lr}
    optimizer = case.make({"w": np.full(4, 10.0)}, **rates, weight_decay=0.0)
    distance = [float(np.linalg.norm(optimizer.params["w"] - target))]
    for _ in range(3000):
        if case.options.get("form") == "lookahead":
            with optimizer.lookahead() as params:
                grads = {"w": curvature * (params["w"] - target)}
        else:
            grads = {"w": curvature * (optimizer.params["w"] - target)}
        optimizer.step(grads)
        distance.append(float(np.linalg.norm(optimizer.params["w"] - target)))
    if schedule_free:
        with optimizer.eval_params() as params:
            distance.append(float(np.linalg.norm(params["w"] - target)))
    assert min(distance) < 0.02 * distance[0]
    assert distance[-1] < 0.05 * distance[0]


# --- the layerwise rule -----------------------------------------------------------------------------------------------


@every_dtype
def test_lamb_takes_the_ratio_of_each_tensor_on_its_own(dtype):
    rng = np.random.default_rng(6)
    tree = {name: (scale * rng.normal(size=size)).astype(dtype) for name, scale, size in
            (("small", 1e-3, 5), ("large", 100.0, 70_001), ("zero", 0.0, 300), ("empty", 1.0, 0))}  # fmt: skip
    optimizer = fastopt.LAMB(tree, lr=0.1, weight_decay=0.0)
    optimizer.step({name: rng.choice([-1.0, 1.0], leaf.size).astype(dtype) for name, leaf in tree.items()})
    for name in ("small", "large"):
        moved = np.linalg.norm(optimizer.params[name].astype(np.float64) - tree[name])
        assert moved == pytest.approx(0.1 * np.linalg.norm(tree[name].astype(np.float64)), rel=1e-4)
    # Where the parameter is zero the ratio is 1: the step is lr times Adam's direction, here lr in every element.
    np.testing.assert_allclose(np.abs(optimizer.params["zero"]), 0.1, rtol=1e-4)


def test_lamb_norms_neither_overflow_nor_underflow_in_float32():
    for scale in (1e30, 1e-30):
        start = np.full(1000, scale, np.float32)
        optimizer = fastopt.LAMB({"w": start}, lr=0.1, weight_decay=0.0)
        optimizer.step({"w": np.ones(1000, np.float32)})
        np.testing.assert_allclose(optimizer.params["w"], 0.9 * start, rtol=1e-5)


# --- tests of the tests -----------------------------------------------------------------------------------------------
# Ten faults in Adam, of the kind that real libraries have shipped. Each must fail the parity check above.

Hyper = type(adam_rule.prepare(1, 1e-3, (0.9, 0.999), 1e-8, False, True))


def faulty_prepare(change: Callable[[int, Any], Any]) -> fastopt.Rule:
    def prepare(t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        return change(t, adam_rule.prepare(t, lr, betas, eps, False, True))

    return fastopt.rule(prepare)(adam_rule.scalar)


def good_prepare(t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
    return adam_rule.prepare(t, lr, betas, eps, False, True)


@fastopt.rule(good_prepare)
def faithful(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - h.step_size * m / (math.sqrt(v + h.eps_in) + h.eps_out), m, v


@fastopt.rule(good_prepare)
def eps_inside_the_root(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - h.step_size * m / math.sqrt(v + h.eps_out), m, v


@fastopt.rule(good_prepare)
def second_moment_with_b1(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b1 * g * g
    return p - h.step_size * m / (math.sqrt(v + h.eps_in) + h.eps_out), m, v


@fastopt.rule(good_prepare)
def step_with_the_old_moment(p, g, m, v, h):
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - h.step_size * m / (math.sqrt(v + h.eps_in) + h.eps_out), h.b1 * m + h.one_minus_b1 * g, v


@fastopt.rule(good_prepare)
def small_gradients_flushed(p, g, m, v, h):
    g = g if abs(g) > h.eps_out else h.eps_in
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - h.step_size * m / (math.sqrt(v + h.eps_in) + h.eps_out), m, v


@fastopt.rule(good_prepare)
def states_swapped(p, g, m, v, h):
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * g * g
    return p - h.step_size * m / (math.sqrt(v + h.eps_in) + h.eps_out), v, m


MUTANTS = {
    "eps inside the root": eps_inside_the_root,
    "v decays with b1": second_moment_with_b1,
    "step with the old m": step_with_the_old_moment,
    "small gradients flushed to zero": small_gradients_flushed,
    "states swapped on return": states_swapped,
    "t one too small": fastopt.rule(lambda t, lr=1e-3: good_prepare(t + 1, lr))(adam_rule.scalar),
    "no bias correction of v": faulty_prepare(lambda t, h: h._replace(step_size=1e-3 / (1 - 0.9**t), eps_out=1e-8)),
    "eps not scaled with the correction": faulty_prepare(lambda t, h: h._replace(eps_out=1e-8)),
    "1 - b2 taken in float32": faulty_prepare(
        lambda t, h: h._replace(one_minus_b2=float(np.float32(1) - np.float32(0.999)))
    ),
}


def test_the_parity_check_accepts_a_faithful_adam():
    start = np.random.default_rng(7).normal(size=100)
    assert_float64_parity(fastopt.Optimizer({"w": start}, faithful), BY_NAME["Adam"].oracle(start))


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_parity_check_catches(fault):
    start = np.random.default_rng(7).normal(size=100)
    with pytest.raises(AssertionError, match=r"params|state"):
        assert_float64_parity(fastopt.Optimizer({"w": start}, MUTANTS[fault]), BY_NAME["Adam"].oracle(start))


@pytest.mark.parametrize(("first", "last"), [(0, 16), (96, 100), (1, 100)], ids=["no SIMD block", "no tail", "not 0"])
def test_the_parity_check_catches_a_loop_that_leaves_elements_out(first, last, monkeypatch):
    start = np.random.default_rng(7).normal(size=100)
    optimizer = fastopt.Adam({"w": start})
    plan = optimizer._pipeline.plan
    assert plan.chunks(plan.of).tolist() == [list(Chunk(place=0, start=0, stop=100, grad=0, group=0, block=0))]
    kept = [[0, 0, first, 0, 0, 0], [0, last, 100, last, 0, 0]]
    monkeypatch.setattr(plan, "chunks", lambda *_, **__: np.array(kept, np.int64))
    with pytest.raises(AssertionError, match=r"params|state"):
        assert_float64_parity(optimizer, BY_NAME["Adam"].oracle(start))


def test_the_parity_check_catches_a_forgotten_weight_decay():
    start = np.random.default_rng(7).normal(size=100)
    case: Case = BY_NAME["AdamW"]
    with pytest.raises(AssertionError, match="params"):
        assert_float64_parity(case.make({"w": start}, weight_decay=0.0), case.oracle(start))


@pytest.mark.parametrize("case", [case for case in CASES if not case.rule.whole], ids=str)
@every_dtype
def test_a_nan_reaches_exactly_its_own_element(case, dtype):
    """Also those of a rule that looks only at signs. Never nnan or ninf: they break isnan without a sign."""
    optimizer = case.make({"w": np.ones(100, dtype)})
    g = np.ones(100, dtype)
    optimizer.step({"w": g})
    g[[37, 99]] = np.nan
    optimizer.step({"w": g})
    assert np.flatnonzero(np.isnan(optimizer.params["w"])).tolist() == [37, 99]


def test_the_loops_have_no_fastmath_on_the_rule():
    assert elements.scalar(adam_rule.scalar).targetoptions.get("fastmath") in (None, False)
