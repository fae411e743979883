"""What a step is given besides gradients: `step(grads, extra={"hessian": tree}, loss=number)`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import gradients

import fastopt
from fastopt.wrappers import lookahead

SHAPES = {"a": (150,), "m": (6, 5), "empty": (0, 2), "number": ()}


def tree(seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: gradients(rng, math.prod(shape), dtype).reshape(shape) for path, shape in SHAPES.items()}


# --- Sophia: a Hessian in every k-th step -----------------------------------------------------------------------------


class SophiaHyper(NamedTuple):
    lr: float
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    gamma: float
    eps: float
    one: float


def prepare_sophia(t, hessian, lr=0.01, betas=(0.96, 0.99), gamma=0.01, eps=1e-12):
    b1, b2 = betas if hessian else (betas[0], 1.0)  # without a Hessian its average stays as it is
    return SophiaHyper(lr, b1, 1.0 - b1, b2, 1.0 - b2, gamma, eps, 1.0)


@fastopt.rule(prepare_sophia, extra=("hessian",), decoupled=True)
def sophia(p, g, hessian, m, v, h):
    """Liu et al. 2023, https://arxiv.org/abs/2305.14342, algorithm 3."""
    m = h.b1 * m + h.one_minus_b1 * g
    v = h.b2 * v + h.one_minus_b2 * hessian
    u = m / max(h.gamma * v, h.eps)
    u = h.one if u > h.one else u
    u = -h.one if u < -h.one else u
    return p - h.lr * u, hessian, m, v


def sophia_in_numpy(p, all_grads, all_hessians, absent=()):
    p = {path: leaf.copy() for path, leaf in p.items()}
    m, v = ({path: np.zeros_like(leaf) for path, leaf in p.items()} for _ in range(2))
    for step, (grads, hessians) in enumerate(zip(all_grads, all_hessians, strict=True)):
        for path, g in grads.items():
            if (step, path) in absent:
                continue
            m[path] = 0.96 * m[path] + 0.04 * g
            if hessians is not None:
                v[path] = 0.99 * v[path] + 0.01 * hessians[path]
            p[path] *= 1.0 - 0.05 * 0.1
            p[path] -= 0.05 * np.clip(m[path] / np.maximum(0.01 * v[path], 1e-12), -1.0, 1.0)
    return p, v


HESSIANS = [tree(50 + step) if step % 3 == 0 else None for step in range(20)]
GRADS = [tree(step) for step in range(20)]
ABSENT = ((6, "a"),)
"""A parameter without gradient in a step with a Hessian."""


def given(step: int) -> dict[str, Any]:
    hessians = HESSIANS[step]
    extra = None if hessians is None else {path: None if (step, path) in ABSENT else h for path, h in hessians.items()}
    return {"extra": {"hessian": extra}} if step % 2 or extra is not None else {}


def grads_of(step: int) -> dict[str, Any]:
    return {path: None if (step, path) in ABSENT else g for path, g in GRADS[step].items()}


@pytest.mark.parametrize("kind", ["own", "wrapped", "of the library"])
def test_sophia_takes_a_hessian_in_every_third_step(kind, tmp_path):
    """In a wrapped rule as well; a run that was loaded between two of them, and a copy, go on with the same bits."""
    rule = {"own": sophia, "wrapped": lookahead(sophia)}.get(kind, fastopt.rules.ALL["sophia"])
    start, hyper = (
        tree(99),
        {"lr": 0.05, "weight_decay": 0.1, **({"lookahead_alpha": 1.0} if kind == "wrapped" else {})},
    )
    opt = fastopt.Optimizer(start, rule, **hyper)
    others = []
    for step in range(20):
        if step == 8:
            opt.save(tmp_path / "run")
            loaded = fastopt.Optimizer(tree(98), rule, **hyper)
            loaded.load(tmp_path / "run")
            others = [loaded, copy.deepcopy(opt)]
        for each in (opt, *others):
            each.step(grads_of(step), **given(step))
    p, v = sophia_in_numpy(start, GRADS, HESSIANS, ABSENT)
    for path, leaf in p.items():
        np.testing.assert_allclose(opt.params[path], leaf, rtol=1e-12, atol=1e-14, err_msg=path)
        np.testing.assert_allclose(opt.states["v"][path], v[path], rtol=1e-12, err_msg=path)
    for each in others:
        assert each.flat.data.tobytes() == opt.flat.data.tobytes()
        assert all(a.tobytes() == b.tobytes() for a, b in zip(each._pipeline.states, opt._pipeline.states, strict=True))
    assert opt.states["hessian"]["m"].tobytes() == HESSIANS[18]["m"].tobytes()
    assert sophia.names() == ("lr", "betas", "gamma", "eps", "weight_decay")
    assert (sophia.extra, sophia.inputs) == (("hessian",), ("hessian",))


def test_a_skipped_step_leaves_the_inputs_as_they_were():
    opt = fastopt.Optimizer(tree(0), sophia, nonfinite="skip", weight_decay=0.1)
    opt.step(tree(1), extra={"hessian": tree(2)})
    before = [array.tobytes() for array in (opt.flat.data, *opt._pipeline.states)]
    bad = {**tree(1), "a": np.full(150, np.nan)}
    assert opt.step(bad, extra={"hessian": tree(3)}).skipped
    assert [array.tobytes() for array in (opt.flat.data, *opt._pipeline.states)] == before


def test_bare_arrays_and_the_loop_over_a_dictionary_take_them_too():
    p = {"w": np.ones(5)}
    g, hessian, m, v = np.arange(1.0, 6.0), np.full(5, 2.0), np.zeros(5), np.zeros(5)
    opt, bare = fastopt.Optimizer(None, sophia, lr=0.5), p["w"].copy()
    opt.update(p, {"w": g}, extra={"hessian": {"w": hessian}})
    sophia.update_(bare, g, hessian, m, v, t=1, lr=0.5)
    assert bare.tobytes() == p["w"].tobytes()
    opt.update(p, {"w": g})
    sophia.update_(bare, g, np.full(5, 7.0), m, v, t=2, lr=0.5, hessian=False)
    assert bare.tobytes() == p["w"].tobytes()


# --- the loss, and an input that every step must have -----------------------------------------------------------------


class PolyakHyper(NamedTuple):
    rate: float
    zero: float


def prepare_polyak(t, loss, lr=1.0, least=0.0):
    return PolyakHyper(lr * (loss - least), 0.0)


def squares(p, g, weights, h):
    return g * g


@fastopt.rule(prepare_polyak, extra=("weights",))
def polyak(p, g, weights, h):
    """A step of Polyak's size for each element, which the caller weights."""
    return p - h.rate * weights * g / (g * g), weights


def test_the_loss_and_a_tree_that_every_step_has():
    """In groups so many that `prepare` would be compiled for other rules."""
    params = {f"w{k}": np.full(2, 1.0 + k) for k in range(70)}
    rates = {path: {"lr": 0.5 + k} for k, path in enumerate(params)}
    opt = fastopt.Optimizer(params, polyak, overrides=rates)
    for loss in (4.0, np.float32(2.0)):
        before = {path: leaf.copy() for path, leaf in opt.params.items()}
        opt.step(dict.fromkeys(params, np.array([2.0, -4.0])), loss=loss, extra={"weights": params})
        for k, path in enumerate(params):
            expected = before[path] - (0.5 + k) * float(loss) * params[path] / np.array([2.0, -4.0])
            np.testing.assert_allclose(opt.params[path], expected, rtol=1e-14)


P = {"w": np.ones(3), "b": np.ones(2)}
WEIGHTS: dict[str, Any] = {"w": np.ones(3), "b": np.ones(2)}
STEPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tree": ({"loss": 1.0}, TypeError, r"extra: must hold 'weights', which rule 'polyak' takes in every step"),
    "no loss": ({"extra": {"weights": WEIGHTS}}, TypeError, r"loss: must be a number, which rule 'polyak' takes"),
    "a NaN": ({"extra": {"weights": WEIGHTS}, "loss": np.nan}, ValueError, r"loss: must be a finite number, got nan"),
    "no dict": (
        {"extra": [WEIGHTS], "loss": 1.0},
        TypeError,
        r"extra: must be a dict of name -> tree, or None",
    ),
    "another name": (
        {"extra": {"weights": WEIGHTS, "hessian": WEIGHTS}, "loss": 1.0},
        TypeError,
        r"extra: must hold inputs that rule 'polyak' takes \(weights\), got 'hessian'",
    ),
    "another structure": (
        {"extra": {"weights": {"w": np.ones(3)}}, "loss": 1.0},
        ValueError,
        r"extra\['weights'\]: must have the structure of the parameters, got a tree without 'b'",
    ),
    "another shape": (
        {"extra": {"weights": {**WEIGHTS, "b": np.ones(3)}}, "loss": 1.0},
        ValueError,
        r"extra\['weights'\]: 'b': must have shape \(2,\) as its parameter, got \(3,\)",
    ),
    "another dtype": (
        {"extra": {"weights": {**WEIGHTS, "b": np.ones(2, np.float32)}}, "loss": 1.0},
        TypeError,
        r"extra\['weights'\]: 'b': must have dtype float64 as its parameter, got float32",
    ),
    "None beside a gradient": (
        {"extra": {"weights": {**WEIGHTS, "b": None}}, "loss": 1.0},
        ValueError,
        r"extra\['weights'\]: 'b': must be an array where the gradient is one, got None",
    ),
    "None beside one of some gradients": (
        {"grads": {**P, "w": None}, "extra": {"weights": {"w": None, "b": None}}, "loss": 1.0},
        ValueError,
        r"extra\['weights'\]: 'b': must be an array where the gradient is one, got None",
    ),
}


@pytest.mark.parametrize("what", STEPS)
def test_wrong_inputs_are_refused_before_anything_is_changed(what):
    options, error, message = STEPS[what]
    opt = fastopt.Optimizer(P, polyak)
    with pytest.raises(error, match=f"^{message}"):
        opt.step(**{"grads": P, **options})
    assert opt.step_count == 0
    assert all(not leaf.any() for leaf in opt.states["weights"].values())
    assert all((leaf == 1.0).all() for leaf in opt.params.values())


def test_a_rule_that_takes_none_refuses_them():
    opt = fastopt.Adam(P)
    with pytest.raises(TypeError, match=r"^extra: must hold inputs that rule 'adam' takes \(none\), got 'hessian'$"):
        opt.step(P, extra={"hessian": P})
    with pytest.raises(TypeError, match=r"^loss: must be None for rule 'adam', whose prepare takes none, got 1\.0$"):
        opt.step(P, loss=1.0)


DECLARED: dict[str, tuple[Callable[[], Any], str]] = {
    "no state": (
        lambda: fastopt.rule(prepare_sophia, extra=("curvature",))(sophia.scalar),
        r"rule 'sophia': extra: must name states \(hessian, m, v\), got 'curvature'",
    ),
    "a closed form": (
        lambda: fastopt.rule(prepare_sophia, extra=("hessian",), idle=fastopt.Linear())(sophia.scalar),
        r"rule 'sophia': idle: must be None for a rule of further inputs",
    ),
}


@pytest.mark.parametrize("what", DECLARED)
def test_what_makes_no_sense_is_refused_when_it_is_declared(what):
    action, message = DECLARED[what]
    with pytest.raises(TypeError, match=f"^{message}"):
        action()
