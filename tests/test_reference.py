"""The oracle checked on its own: against torch.optim, closed forms, identities, and its in-place contract."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastopt import reference
from fastopt.reference import OPTIMIZERS, init_state

Array = npt.NDArray[Any]

# Every optimizer in every form: what the properties below run over.
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("momentum", {"form": "heavy_ball"}),
    ("momentum", {"form": "ema"}),
    ("momentum", {"form": "lr_inside"}),
    ("nesterov", {"form": "reformulated"}),
    ("nesterov", {"form": "lookahead"}),
    ("adagrad", {}),
    ("adagrad", {"eps_inside": True, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    ("adadelta", {}),
    ("rmsprop", {}),
    ("rmsprop", {"eps_inside": True}),
    ("rmsprop", {"centered": True}),
    ("rmsprop", {"momentum": 0.5}),
    ("rmsprop", {"centered": True, "momentum": 0.5, "eps_inside": True, "eps": 1e-4}),
    ("adam", {}),
    ("adam", {"eps_inside": True}),
    ("adam", {"bias_correction": False}),
    ("adam", {"amsgrad": True}),
    ("adam", {"amsgrad": True, "bias_correction": False, "eps_inside": True}),
    ("adamw", {}),
    ("adamw", {"amsgrad": True, "eps_inside": True}),
    ("lamb", {}),
    ("lamb", {"bias_correction": False}),
]


def form_id(form: tuple[str, dict[str, Any]]) -> str:
    name, hyper = form
    return "-".join([name, *(f"{key}={value}" for key, value in hyper.items())])


every_form = pytest.mark.parametrize(("name", "hyper"), [pytest.param(*form, id=form_id(form)) for form in FORMS])


def run(name: str, p: Array, gradients: list[Array], **hyper: Any) -> tuple[Array, dict[str, Array]]:
    """Updates of a copy of p with these gradients; returns the parameter and the state at the end."""
    p = p.copy()
    state = init_state(name, p, **hyper)
    for t, g in enumerate(gradients, start=1):
        OPTIMIZERS[name](p, g, state, t, **hyper)
    return p, state


def data(seed: int, shape: tuple[int, ...] = (3, 5), steps: int = 20) -> tuple[Array, list[Array]]:
    """A parameter and gradients whose magnitudes span five decades and whose signs change."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-4, 1, shape)
    return rng.normal(size=shape), [scale * rng.normal(size=shape) for _ in range(steps)]


# ------------------------------------------------------------------------------------------------- against torch.optim

SGD_STATES = {"velocity": "momentum_buffer"}
RMSPROP_STATES = {"square_avg": "square_avg", "grad_avg": "grad_avg", "buf": "momentum_buffer"}
ADAM_STATES = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}
SAME_AS_TORCH: list[tuple[str, dict[str, Any], str, dict[str, Any], dict[str, str]]] = [
    # ours, with; torch's, with (where it differs from ours); our state: torch's state
    ("sgd", {"lr": 0.05}, "SGD", {}, {}),
    ("sgd", {"lr": 0.05, "momentum": 0.9}, "SGD", {}, SGD_STATES),
    ("sgd", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}, "SGD", {}, SGD_STATES),
    ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True}, "SGD", {}, SGD_STATES),
    ("momentum", {"lr": 0.05, "momentum": 0.8}, "SGD", {}, SGD_STATES),
    ("nesterov", {"lr": 0.05, "momentum": 0.8}, "SGD", {"nesterov": True}, SGD_STATES),
    ("adagrad", {}, "Adagrad", {}, {"sum_sq": "sum"}),
    (
        "adagrad",
        {"lr": 0.1, "lr_decay": 0.2, "eps": 1e-2, "initial_accumulator_value": 0.5},
        "Adagrad",
        {},
        {"sum_sq": "sum"},
    ),
    ("adadelta", {}, "Adadelta", {}, {"square_avg": "square_avg", "acc_delta": "acc_delta"}),
    (
        "adadelta",
        {"lr": 0.5, "rho": 0.8, "eps": 1e-3},
        "Adadelta",
        {},
        {"square_avg": "square_avg", "acc_delta": "acc_delta"},
    ),
    ("rmsprop", {}, "RMSprop", {}, RMSPROP_STATES),
    ("rmsprop", {"lr": 0.1, "alpha": 0.9, "eps": 1e-2}, "RMSprop", {}, RMSPROP_STATES),
    ("rmsprop", {"centered": True, "alpha": 0.9}, "RMSprop", {}, RMSPROP_STATES),
    ("rmsprop", {"momentum": 0.7}, "RMSprop", {}, RMSPROP_STATES),
    ("rmsprop", {"centered": True, "momentum": 0.7, "alpha": 0.9}, "RMSprop", {}, RMSPROP_STATES),
    ("adam", {}, "Adam", {}, ADAM_STATES),
    ("adam", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-2}, "Adam", {}, ADAM_STATES),
    ("adam", {"amsgrad": True, "betas": (0.8, 0.7), "lr": 0.1}, "Adam", {}, ADAM_STATES),
    ("adamw", {}, "AdamW", {}, ADAM_STATES),
    ("adamw", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-2}, "AdamW", {}, ADAM_STATES),
    ("adamw", {"amsgrad": True, "betas": (0.8, 0.7), "lr": 0.1}, "AdamW", {}, ADAM_STATES),
]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "hyper", "theirs", "extra", "states"),
    [pytest.param(*case, id=form_id(case[:2])) for case in SAME_AS_TORCH],
)
def test_parameters_and_states_equal_those_of_torch(
    name: str,
    hyper: dict[str, Any],
    theirs: str,
    extra: dict[str, Any],
    states: dict[str, str],
    weight_decay: float,
) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch.optim, which this environment does not have")
    p, gradients = data(seed=1)
    hyper = {**hyper, "weight_decay": weight_decay}
    state = init_state(name, p, **hyper)
    tensor = torch.tensor(p.copy(), requires_grad=True)
    optimizer = getattr(torch.optim, theirs)([tensor], **hyper, **extra, foreach=False)

    for t, g in enumerate(gradients, start=1):
        OPTIMIZERS[name](p, g, state, t, **hyper)
        tensor.grad = torch.tensor(g)
        optimizer.step()
        # atol only covers sums that cancel to near zero: all magnitudes of interest here are above 1e-9.
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=1e-12, atol=1e-16)
        assert set(state) <= set(states)
        for ours in state:
            np.testing.assert_allclose(
                state[ours], optimizer.state[tensor][states[ours]].numpy(), rtol=1e-12, atol=1e-20, err_msg=ours
            )


def test_the_comparison_with_torch_covers_every_optimizer_torch_has() -> None:
    assert {case[0] for case in SAME_AS_TORCH} == set(OPTIMIZERS) - {"lamb"}  # torch has no LAMB


# ---------------------------------------------------------------------------------------- numbers worked out by hand

# One parameter, two updates with the gradients 2 and -1, from p = 1; all hyperparameters are such that the numbers can
# be followed on paper. Each row: name, hyperparameters, p after each update, the state after the second.
R = math.sqrt
BY_HAND: list[tuple[str, dict[str, Any], tuple[float, float], dict[str, float]]] = [
    # 1 - 0.5 * 2 ; 0 + 0.5 * 1
    ("sgd", {"lr": 0.5}, (0.0, 0.5), {}),
    # L2: g = 2 + 0.5 * 1 ; g = -1 + 0.5 * -0.25
    ("sgd", {"lr": 0.5, "weight_decay": 0.5}, (-0.25, 0.3125), {}),
    # v = 2, undamped ; v = 1 + 0.25 * -1
    ("sgd", {"lr": 0.5, "momentum": 0.5, "dampening": 0.75}, (0.0, -0.375), {"velocity": 0.75}),
    # 1 - 0.5 * (2 + 1) ; v = 1 - 1 = 0
    ("sgd", {"lr": 0.5, "momentum": 0.5, "nesterov": True}, (-0.5, 0.0), {"velocity": 0.0}),
    # v = 2 ; v = 0.5 - 1
    ("momentum", {"lr": 0.5, "momentum": 0.25}, (0.0, 0.25), {"velocity": -0.5}),
    # v = 1.5 ; v = 0.375 - 0.75
    ("momentum", {"lr": 0.5, "momentum": 0.25, "form": "ema"}, (0.25, 0.4375), {"velocity": -0.375}),
    # v = -1 ; v = -0.25 + 0.5
    ("momentum", {"lr": 0.5, "momentum": 0.25, "form": "lr_inside"}, (0.0, 0.25), {"velocity": 0.25}),
    # v = 2, step 0.5 (2 + 0.5) ; v = -0.5, step 0.5 (-1 - 0.125)
    ("nesterov", {"lr": 0.5, "momentum": 0.25}, (-0.25, 0.3125), {"velocity": -0.5}),
    # v = 1 ; v = 0.25 - 0.5
    ("nesterov", {"lr": 0.5, "momentum": 0.25, "form": "lookahead"}, (0.0, 0.25), {"velocity": -0.25}),
    # L2 at the p handed over, 1 and then -0.25: v = 0.5 (2 + 0.5) ; v = 0.3125 + 0.5 (-1 - 0.125)
    (
        "nesterov",
        {"lr": 0.5, "momentum": 0.25, "form": "lookahead", "weight_decay": 0.5},
        (-0.25, 0.0),
        {"velocity": -0.25},
    ),
    # s = 4 ; s = 5, lr = 0.5 / 2
    ("adagrad", {"lr": 0.5, "lr_decay": 1.0, "eps": 1.0}, (2 / 3, 2 / 3 + 0.25 / (R(5) + 1)), {"sum_sq": 5.0}),
    # s = 5 + 4, s + eps = 16 ; s = 10, s + eps = 17
    (
        "adagrad",
        {"lr": 0.5, "eps": 7.0, "eps_inside": True, "initial_accumulator_value": 5.0},
        (0.75, 0.75 + 0.5 / R(17)),
        {"sum_sq": 10.0},
    ),
    # s = 1, d = sqrt(3 / 4) 2, r = 0.75 ; s = 0.75 + 0.25, d = -sqrt(3.75 / 4), r = 0.5625 + 0.25 * 0.9375
    (
        "adadelta",
        {"lr": 0.5, "rho": 0.75, "eps": 3.0},
        (1 - R(0.75), 1 - R(0.75) + 0.5 * R(0.9375)),
        {"square_avg": 1.0, "acc_delta": 0.796875},
    ),
    # v = 1 ; v = 0.75 + 0.25
    ("rmsprop", {"lr": 0.5, "alpha": 0.75, "eps": 1.0}, (0.5, 0.75), {"square_avg": 1.0}),
    ("rmsprop", {"lr": 0.5, "alpha": 0.75, "eps": 3.0, "eps_inside": True}, (0.5, 0.75), {"square_avg": 1.0}),
    # v = 1, a = 0.5, w = 0.75 ; v = 1, a = 0.375 - 0.25, w = 1 - 1/64
    (
        "rmsprop",
        {"lr": 0.5, "alpha": 0.75, "eps": 0.0, "centered": True},
        (1 - 1 / R(0.75), 1 - 1 / R(0.75) + 0.5 / R(63 / 64)),
        {"square_avg": 1.0, "grad_avg": 0.125},
    ),
    # the same with eps in the root: w + eps = 1 ; w + eps = 1.25 - 1/64. b = 2 ; b = 0.5 - 1 / root
    (
        "rmsprop",
        {"lr": 0.5, "alpha": 0.75, "eps": 0.25, "centered": True, "eps_inside": True, "momentum": 0.25},
        (0.0, -0.25 + 0.5 / R(79 / 64)),
        {"square_avg": 1.0, "grad_avg": 0.125, "buf": 0.5 - 1 / R(79 / 64)},
    ),
    # g / d = 1 ; b = 0.25 - 0.5
    (
        "rmsprop",
        {"lr": 0.5, "alpha": 0.75, "eps": 1.0, "momentum": 0.25},
        (0.5, 0.625),
        {"square_avg": 1.0, "buf": -0.25},
    ),
    # m = 1, v = 1, m_hat = 2, v_hat = 4 ; m = 0, v = 1
    ("adam", {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1.0}, (2 / 3, 2 / 3), {"m": 0.0, "v": 1.0}),
    # m = 1.5, v = 2 ; m = 0.375 - 0.75, m_hat = m / (1 - 1/16), v = 1.5, v_hat = 1.5 / 0.75
    (
        "adam",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0},
        (2 / 3, 2 / 3 + 0.2 / (R(2) + 1)),
        {"m": -0.375, "v": 1.5},
    ),
    # the same, v_hat + eps = 4 + 5 ; 2 + 5
    (
        "adam",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 5.0, "eps_inside": True},
        (2 / 3, 2 / 3 + 0.2 / R(7)),
        {"m": -0.375, "v": 1.5},
    ),
    # the same, m_hat = m and v_hat = v
    (
        "adam",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 2.0, "eps_inside": True, "bias_correction": False},
        (0.625, 0.625 + 0.1875 / R(3.5)),
        {"m": -0.375, "v": 1.5},
    ),
    # the same, v_max stays 2 and is corrected by 0.75 at the second update. A maximum of the corrected would be 4.
    (
        "adam",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 0.0, "amsgrad": True},
        (0.5, 0.5 + 0.2 / R(8 / 3)),
        {"m": -0.375, "v": 1.5, "v_max": 2.0},
    ),
    # decay 1 - 0.5 * 0.5, and the steps of Adam above
    (
        "adamw",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "weight_decay": 0.5},
        (0.75 - 1 / 3, 0.75 * (0.75 - 1 / 3) + 0.2 / (R(2) + 1)),
        {"m": -0.375, "v": 1.5},
    ),
    # For a single number ratio u is |p| with the sign of u: u = 2 / 3 + 0.5 ; u = -0.4 / (sqrt 2 + 1) + 0.25 > 0
    (
        "lamb",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "weight_decay": 0.5},
        (0.5, 0.25),
        {"m": -0.375, "v": 1.5},
    ),
    # ... and without the decay, u < 0 at the second
    ("lamb", {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "weight_decay": 0.0}, (0.5, 0.75), {"m": -0.375, "v": 1.5}),
]


@pytest.mark.parametrize(
    ("name", "hyper", "expected", "expected_state"),
    [pytest.param(*case, id=form_id(case[:2])) for case in BY_HAND],
)
def test_two_updates_give_the_numbers_worked_out_by_hand(
    name: str, hyper: dict[str, Any], expected: tuple[float, float], expected_state: dict[str, float]
) -> None:
    p = np.array([1.0])
    state = init_state(name, p, **hyper)
    for t, (gradient, want) in enumerate(zip((2.0, -1.0), expected, strict=True), start=1):
        OPTIMIZERS[name](p, np.array([gradient]), state, t, **hyper)
        assert p[0] == pytest.approx(want, rel=1e-14, abs=1e-15)
    assert {key: array[0] for key, array in state.items()} == pytest.approx(expected_state, rel=1e-14)


def test_the_numbers_by_hand_cover_every_optimizer_and_every_form() -> None:
    assert {case[0] for case in BY_HAND} == set(OPTIMIZERS)
    forms = {(case[0], case[1]["form"]) for case in BY_HAND if "form" in case[1]}
    assert {("momentum", "ema"), ("momentum", "lr_inside"), ("nesterov", "lookahead")} <= forms
    assert {case[0] for case in BY_HAND if case[1].get("eps_inside")} == {"adagrad", "rmsprop", "adam"}


def test_lamb_on_a_vector_by_hand() -> None:
    # bias-corrected first step: m_hat = g, sqrt(v_hat) = |g|, so u = g / (|g| + eps) + wd p, here (1, -1) + p / 2.
    p = np.array([6.0, 8.0])
    reference.lamb(p, np.array([3.0, -5.0]), init_state("lamb", p), 1, lr=0.1, eps=0.0, weight_decay=0.5)
    u = np.array([4.0, 3.0])
    np.testing.assert_allclose(p, [6.0, 8.0] - 0.1 * (10 / 5) * u, rtol=1e-14)


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_first_step_of_adam_is_lr_g_over_abs_g_plus_eps(eps: float) -> None:
    p, (g,) = data(seed=2, steps=1)
    after, _ = run("adam", p, [g], lr=0.1, eps=eps)
    np.testing.assert_allclose(after, p - 0.1 * g / (np.abs(g) + eps), rtol=1e-12)


def test_adam_from_its_moments_as_weighted_sums() -> None:
    # Paper, section 3: m_t = (1 - b1) sum_i b1^(t-i) g_i, and the same for v of g^2: no recursion to get wrong.
    p, gradients = data(seed=3, steps=12)
    b1, b2, lr, eps = 0.8, 0.95, 0.1, 1e-3
    expected = p.copy()
    for t in range(1, 13):
        m_hat = np.average(gradients[:t], axis=0, weights=[b1 ** (t - i) for i in range(1, t + 1)])
        v_hat = np.average(np.square(gradients[:t]), axis=0, weights=[b2 ** (t - i) for i in range(1, t + 1)])
        expected = expected - lr * m_hat / np.sqrt(v_hat + eps)
    after, _ = run("adam", p, gradients, lr=lr, betas=(b1, b2), eps=eps, eps_inside=True)
    np.testing.assert_allclose(after, expected, rtol=1e-12)


def test_lamb_from_its_moments_as_weighted_sums() -> None:
    p, gradients = data(seed=4, steps=12)
    b1, b2, lr, eps, decay = 0.8, 0.95, 0.1, 1e-3, 0.3
    expected = p.copy()
    for t in range(1, 13):
        m_hat = np.average(gradients[:t], axis=0, weights=[b1 ** (t - i) for i in range(1, t + 1)])
        v_hat = np.average(np.square(gradients[:t]), axis=0, weights=[b2 ** (t - i) for i in range(1, t + 1)])
        u = m_hat / (np.sqrt(v_hat) + eps) + decay * expected
        expected = expected - lr * math.hypot(*expected.flat) * u / math.hypot(*u.flat)
    after, _ = run("lamb", p, gradients, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    np.testing.assert_allclose(after, expected, rtol=1e-12)


# ------------------------------------------------------------------------------------------- identities between forms


def test_ema_is_heavy_ball_with_lr_times_one_minus_momentum() -> None:
    p, gradients = data(seed=5)
    ema, ema_state = run("momentum", p, gradients, form="ema", lr=0.1, momentum=0.8, weight_decay=0.1)
    ball, ball_state = run("momentum", p, gradients, lr=0.1 * (1 - 0.8), momentum=0.8, weight_decay=0.1)
    np.testing.assert_allclose(ema, ball, rtol=1e-12)
    np.testing.assert_allclose(ema_state["velocity"], (1 - 0.8) * ball_state["velocity"], rtol=1e-11)


def test_ema_differs_from_the_dampening_of_sgd_by_its_first_step_alone() -> None:
    p, gradients = data(seed=6)
    gradients[0] = np.zeros_like(p)  # then v = g and v = (1 - momentum) g are the same first step
    ema, _ = run("momentum", p, gradients, form="ema", lr=0.1, momentum=0.8)
    damped, _ = run("sgd", p, gradients, lr=0.1, momentum=0.8, dampening=1 - (1 - 0.8))
    np.testing.assert_allclose(ema, damped, rtol=1e-12)
    first, _ = run("sgd", p, gradients[1:2], lr=0.1, momentum=0.8, dampening=0.8)
    np.testing.assert_array_equal(first, p - 0.1 * gradients[1])


def test_lr_inside_is_heavy_ball_while_lr_is_constant_and_only_then() -> None:
    p, gradients = data(seed=7)

    def walk(form: str, lr_of: Callable[[int], float]) -> Array:
        q = p.copy()
        state = init_state("momentum", q, form=form)
        for t, g in enumerate(gradients, start=1):
            reference.momentum(q, g, state, t, form=form, lr=lr_of(t), weight_decay=0.1)
        return q

    np.testing.assert_allclose(walk("lr_inside", lambda t: 0.1), walk("heavy_ball", lambda t: 0.1), rtol=1e-11)

    # After the cut of lr, "heavy_ball" takes its whole velocity with the new lr, "lr_inside" goes on with the old.
    inside, ball = (np.array([1.0]) for _ in range(2))
    inside_state, ball_state = init_state("momentum", inside, form="lr_inside"), init_state("momentum", ball)
    for t, lr in ((1, 1.0), (2, 0.0)):
        reference.momentum(inside, np.ones(1), inside_state, t, lr=lr, momentum=0.5, form="lr_inside")
        reference.momentum(ball, np.ones(1), ball_state, t, lr=lr, momentum=0.5)
    assert ball.tolist() == [0.0]
    assert inside.tolist() == [-0.5]


def test_reformulated_nesterov_walks_along_the_look_ahead_points() -> None:
    # Let theta = p - mu v, the look-ahead point. With v' = mu v + lr g(theta) and p' = p - v' it goes to
    # theta' = p' - mu v' = theta - lr g - mu v', and v = lr w turns that into theta - lr (g + mu w'): the reformulated.
    rng = np.random.default_rng(8)
    a = rng.normal(size=(6, 6))
    curvature, lr, mu = a @ a.T / 6 + np.eye(6), 0.05, 0.9
    theta = rng.normal(size=6)
    p = theta.copy()  # v = 0: the first look-ahead point is p itself
    w, v = init_state("nesterov", theta), init_state("nesterov", p, form="lookahead")
    for t in range(1, 31):
        reference.nesterov(theta, curvature @ theta, w, t, lr=lr, momentum=mu)
        ahead = p - mu * v["velocity"]
        reference.nesterov(p, curvature @ ahead, v, t, lr=lr, momentum=mu, form="lookahead")
        np.testing.assert_allclose(p - mu * v["velocity"], theta, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(v["velocity"], lr * w["velocity"], rtol=1e-12, atol=1e-14)
    assert np.linalg.norm(p - theta) > 1e-3  # the two are not the same point


@pytest.mark.parametrize(
    ("name", "hyper"),
    [("momentum", {"form": "heavy_ball"}), ("momentum", {"form": "ema"}), ("nesterov", {"form": "reformulated"})]
    + [("sgd", {"momentum": m, "dampening": 0.5}) for m in (0.0, 1e-300)],
)
def test_without_momentum_all_are_plain_gradient_descent(name: str, hyper: dict[str, Any]) -> None:
    p, gradients = data(seed=9)
    hyper = {"momentum": 0.0, **hyper}
    plain, _ = run("sgd", p, gradients[:1], lr=0.1, weight_decay=0.2)
    after, _ = run(name, p, gradients[:1], lr=0.1, weight_decay=0.2, **hyper)
    np.testing.assert_allclose(after, plain, rtol=1e-14)


def test_dampening_is_without_effect_when_there_is_no_momentum() -> None:
    p, gradients = data(seed=10)
    np.testing.assert_array_equal(
        run("sgd", p, gradients, dampening=0.5, nesterov=True)[0], run("sgd", p, gradients)[0]
    )


def test_l2_is_the_gradient_of_the_penalty_on_all_but_adamw_and_lamb() -> None:
    for name, hyper in FORMS:
        if name in ("adamw", "lamb"):
            continue
        p, gradients = data(seed=11)
        decayed = p.copy()
        states = [init_state(name, p, **hyper) for _ in range(2)]
        for t, g in enumerate(gradients, start=1):
            OPTIMIZERS[name](p, g + 0.3 * p, states[0], t, **hyper)
            OPTIMIZERS[name](decayed, g, states[1], t, weight_decay=0.3, **hyper)
        np.testing.assert_array_equal(p, decayed, err_msg=form_id((name, hyper)))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_decays_apart_from_the_moments(amsgrad: bool) -> None:
    p, gradients = data(seed=12)
    plain = p.copy()
    plain_state = init_state("adam", p, amsgrad=amsgrad)
    state = init_state("adamw", p, amsgrad=amsgrad)
    for t, g in enumerate(gradients, start=1):
        plain *= 1 - 0.1 * 0.5
        reference.adam(plain, g, plain_state, t, lr=0.1, amsgrad=amsgrad)
        reference.adamw(p, g, state, t, lr=0.1, weight_decay=0.5, amsgrad=amsgrad)
    np.testing.assert_array_equal(p, plain)
    for name in state:
        np.testing.assert_array_equal(state[name], plain_state[name])


def test_amsgrad_remembers_the_largest_gradient_and_adam_forgets_it() -> None:
    p = np.zeros(1)
    gradients = [np.array([100.0])] + [np.array([1.0])] * 50
    adam, _ = run("adam", p, gradients, lr=0.1, betas=(0.0, 0.5))
    amsgrad, state = run("adam", p, gradients, lr=0.1, betas=(0.0, 0.5), amsgrad=True)
    assert state["v_max"].tolist() == [5000.0]
    assert state["v"][0] == pytest.approx(1, rel=1e-3)
    assert adam[0] < -3 < amsgrad[0]


def test_centered_rmsprop_clamps_a_variance_that_rounding_made_negative() -> None:
    # The same gradient again and again has no variance, so rounding alone decides the sign of v - a^2.
    p = np.linspace(1, 2, 1000, dtype=np.float32)
    g = np.linspace(0.1, 1000, 1000, dtype=np.float32)
    state = init_state("rmsprop", p, centered=True)
    for t in range(1, 401):
        reference.rmsprop(p, g, state, t, centered=True, alpha=0.9, eps=1e3)
    assert np.any(state["square_avg"] < state["grad_avg"] ** 2), "no element tests the clamp"
    assert np.all(np.isfinite(p))


# -------------------------------------------------------------------------------------------------- LAMB's trust ratio


def test_trust_ratio_is_one_where_the_parameter_is_zero() -> None:
    g = np.array([4.0, -2.0, 0.5])
    after, _ = run("lamb", np.zeros(3), [g], lr=0.1, eps=0.0)
    np.testing.assert_allclose(after, -0.1 * np.sign(g), rtol=1e-14)


def test_trust_ratio_is_one_where_the_update_is_zero() -> None:
    p = np.array([3.0, 4.0])
    after, state = run("lamb", p, [np.zeros(2)], lr=0.1, weight_decay=0.0)
    np.testing.assert_array_equal(after, p)  # 5 / 0 would have made it NaN
    assert not np.any(state["m"])
    assert not np.any(state["v"])


@given(seed=st.integers(0, 2**32 - 1), lr=st.floats(1e-3, 1.0), decay=st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_lamb_moves_the_fraction_lr_of_the_norm_of_the_parameter(seed: int, lr: float, decay: float) -> None:
    p, gradients = data(seed, steps=5)
    state = init_state("lamb", p)
    for t, g in enumerate(gradients, start=1):
        before = p.copy()
        reference.lamb(p, g, state, t, lr=lr, weight_decay=decay)
        assert np.linalg.norm(p - before) == pytest.approx(lr * np.linalg.norm(before), rel=1e-9)


def test_norms_of_lamb_do_not_overflow_in_float32() -> None:
    p = np.full(4, 1e25, dtype=np.float32)  # the square of which is above the largest float32
    after, _ = run("lamb", p, [np.ones(4, np.float32)], lr=0.5, weight_decay=0.0)
    np.testing.assert_allclose(after, p / 2, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------- convergence

# The bowl sum_i a_i (p_i - c_i)^2 / 2; lr falls linearly to 0, as the steps of sign-like methods do not on their own.
BOWL_LR = {"sgd": 0.1, "momentum": 0.1, "nesterov": 0.1, "adagrad": 1.0, "adadelta": 10.0, "rmsprop": 0.1, "lamb": 0.1}


@every_form
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_converges_on_a_quadratic_bowl(name: str, hyper: dict[str, Any], dtype: type[np.floating[Any]]) -> None:
    a = np.array([0.5, 1.0, 2.0, 3.0], dtype)
    c = np.array([1.0, -2.0, 3.0, -0.5], dtype)
    p = np.array([-1.0, 1.0, 0.5, 2.0], dtype)
    decay = {"weight_decay": 0.0} if name in ("adamw", "lamb") else {}  # their default would move the minimum
    state = init_state(name, p, **hyper)
    start = float(np.sum(a * (p - c) ** 2))
    for t in range(1, 501):
        lr = BOWL_LR.get(name, 0.2) * (1 - (t - 1) / 500)
        ahead = p - 0.9 * state["velocity"] if hyper.get("form") == "lookahead" else p
        OPTIMIZERS[name](p, a * (ahead - c), state, t, **hyper, **decay, lr=lr)
    assert float(np.sum(a * (p - c) ** 2)) < 1e-4 * start


# ---------------------------------------------------------------------------------------------------------- properties


@every_form
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3, 4)])
def test_updates_the_callers_arrays_and_only_reads_the_gradient(
    name: str, hyper: dict[str, Any], dtype: type[np.floating[Any]], shape: tuple[int, ...]
) -> None:
    p = np.ones(shape, dtype)
    g = np.full(shape, -0.5, dtype)
    g.flags.writeable = False
    state = init_state(name, p, **hyper)
    view, arrays = p.view(), dict(state)
    for t in (1, 2):
        before = p.copy()
        assert OPTIMIZERS[name](p, g, state, t, **hyper, weight_decay=0.1) is None
        assert np.all(view == p)
        assert np.all(p != before)
    assert np.all(g == -0.5)
    assert state.keys() == arrays.keys()
    for key, array in arrays.items():
        assert state[key] is array
        assert array.dtype == dtype
        assert array.shape == shape
        assert np.all(array != 0), f"{key} is not used"
        assert not np.may_share_memory(array, g)
        assert not np.may_share_memory(array, p)


class Narrow(np.ndarray[Any, np.dtype[np.float32]]):
    """A float32 array that fails as soon as anything computed with it is not float32."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        bare = [each.view(np.ndarray) if isinstance(each, Narrow) else each for each in inputs]
        out = kwargs.pop("out", ())
        if out:
            kwargs["out"] = tuple(each.view(np.ndarray) for each in out)
        # With out= a float64 operand is computed in float64 and then rounded: only the operands tell.
        for each in bare:
            assert not isinstance(each, np.ndarray | np.generic) or each.dtype == np.float32, f"{ufunc}: {each.dtype}"
        result = getattr(ufunc, method)(*bare, **kwargs)
        assert result.dtype in (np.float32, np.bool_), f"{ufunc} gave {result.dtype}"
        return out[0] if out else result.view(Narrow)


@every_form
def test_float32_is_computed_in_float32(name: str, hyper: dict[str, Any]) -> None:
    p64, gradients = data(seed=13, steps=3)
    p = p64.astype(np.float32).view(Narrow)
    state = {key: array.view(Narrow) for key, array in init_state(name, np.asarray(p), **hyper).items()}
    with pytest.raises(AssertionError, match="float64"):
        p * np.float64(2)  # the guard itself works
    for t, g in enumerate(gradients, start=1):
        OPTIMIZERS[name](p, g.astype(np.float32).view(Narrow), state, t, **hyper, weight_decay=0.1)
    wide, _ = run(name, p64.astype(np.float32).astype(np.float64), gradients, **hyper, weight_decay=0.1)
    np.testing.assert_allclose(np.asarray(p), wide, rtol=1e-4, atol=1e-6)


def test_a_gradient_of_another_dtype_is_rounded_to_that_of_the_parameter() -> None:
    p, (g,) = data(seed=14, steps=1)
    p = p.astype(np.float32)
    np.testing.assert_array_equal(run("adam", p, [g])[0], run("adam", p, [g.astype(np.float32)])[0])


@pytest.mark.parametrize(("name", "hyper"), [form for form in FORMS if form[0] != "lamb"])
def test_elements_do_not_see_each_other(name: str, hyper: dict[str, Any]) -> None:
    p, gradients = data(seed=15, shape=(8,))
    whole, state = run(name, p, gradients, **hyper, weight_decay=0.1)
    for i in range(8):
        alone, state_alone = run(name, p[i : i + 1], [g[i : i + 1] for g in gradients], **hyper, weight_decay=0.1)
        assert alone[0] == whole[i]
        assert all(state_alone[key][0] == state[key][i] for key in state)


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-20, 20))
@settings(max_examples=20, deadline=None)
def test_without_eps_the_scale_of_the_gradient_does_not_matter(seed: int, power: int) -> None:
    # A power of two scales without rounding, so the steps are the same to the last bit.
    p, gradients = data(seed, steps=4)
    scaled = [g * 2.0**power for g in gradients]
    for name, hyper in FORMS:
        if name in ("adagrad", "rmsprop", "adam", "adamw", "lamb") and "initial_accumulator_value" not in hyper:
            hyper = {**hyper, "eps": 0.0}
            if hyper.get("centered"):
                # At the first step v - a^2 is (1 - alpha) alpha g^2, far from rounding to 0 and dividing by it.
                hyper["alpha"] = 0.5
            np.testing.assert_array_equal(
                run(name, p, gradients, **hyper)[0], run(name, p, scaled, **hyper)[0], err_msg=form_id((name, hyper))
            )


@every_form
def test_a_gradient_of_zero_moves_nothing_from_a_zero_state(name: str, hyper: dict[str, Any]) -> None:
    p, _ = data(seed=16)
    after, state = run(name, p, [np.zeros_like(p)] * 3, **hyper, weight_decay=0.0)
    np.testing.assert_array_equal(after, p)
    assert all(np.all(array == hyper.get("initial_accumulator_value", 0.0)) for array in state.values())


@every_form
def test_a_nan_in_the_gradient_is_not_swallowed(name: str, hyper: dict[str, Any]) -> None:
    p, gradients = data(seed=17, steps=2)
    gradients[0][0, 0] = np.nan
    after, _ = run(name, p, gradients, **hyper)
    if name == "lamb":
        assert np.all(np.isnan(after))  # the norm of the update is NaN, and no ratio of 1 hides it
    else:
        assert np.isnan(after[0, 0])
        assert np.isnan(after).sum() == 1


# ----------------------------------------------------------------------------------------------- the interface, errors


def test_the_module_stands_alone() -> None:
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= {"numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_are_called_alike_and_documented(name: str) -> None:
    function = OPTIMIZERS[name]
    assert function is getattr(reference, name)
    parameters = list(inspect.signature(function).parameters.values())
    assert [each.name for each in parameters[:4]] == ["p", "g", "state", "t"]
    assert all(each.kind is each.KEYWORD_ONLY and each.default is not each.empty for each in parameters[4:])
    assert {"lr", "weight_decay"} <= {each.name for each in parameters[4:]}
    text = inspect.getdoc(function) or ""
    assert "Source:" in text
    assert ">>>" in text
    assert not [each.name for each in parameters[4:] if each.name not in text and each.name != "form"]


DEFAULTS = {
    "sgd": {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    "momentum": {"lr": 0.01, "momentum": 0.9, "form": "heavy_ball", "weight_decay": 0.0},
    "nesterov": {"lr": 0.01, "momentum": 0.9, "form": "reformulated", "weight_decay": 0.0},
    "adagrad": {
        "lr": 0.01,
        "lr_decay": 0.0,
        "eps": 1e-10,
        "eps_inside": False,
        "initial_accumulator_value": 0.0,
        "weight_decay": 0.0,
    },
    "adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0},
    "rmsprop": {
        "lr": 0.01,
        "alpha": 0.99,
        "eps": 1e-8,
        "momentum": 0.0,
        "centered": False,
        "eps_inside": False,
        "weight_decay": 0.0,
    },
    "adam": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "eps_inside": False,
        "bias_correction": True,
        "amsgrad": False,
        "weight_decay": 0.0,
    },
    "adamw": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "eps_inside": False,
        "bias_correction": True,
        "amsgrad": False,
        "weight_decay": 0.01,
    },
    "lamb": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_are_those_of_the_specification(name: str) -> None:
    parameters = list(inspect.signature(OPTIMIZERS[name]).parameters.values())[4:]
    assert {each.name: each.default for each in parameters} == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "hyper", "states"),
    [
        ("sgd", {}, []),
        ("sgd", {"momentum": 0.9}, ["velocity"]),
        ("momentum", {}, ["velocity"]),
        ("nesterov", {"form": "lookahead"}, ["velocity"]),
        ("adagrad", {}, ["sum_sq"]),
        ("adadelta", {}, ["square_avg", "acc_delta"]),
        ("rmsprop", {}, ["square_avg"]),
        ("rmsprop", {"centered": True}, ["square_avg", "grad_avg"]),
        ("rmsprop", {"momentum": 0.9}, ["square_avg", "buf"]),
        ("rmsprop", {"centered": True, "momentum": 0.9}, ["square_avg", "grad_avg", "buf"]),
        ("adam", {}, ["m", "v"]),
        ("adam", {"amsgrad": True}, ["m", "v", "v_max"]),
        ("adamw", {}, ["m", "v"]),
        ("adamw", {"amsgrad": True}, ["m", "v", "v_max"]),
        ("lamb", {}, ["m", "v"]),
    ],
)
def test_init_state_makes_the_states_the_hyperparameters_call_for(
    name: str, hyper: dict[str, Any], states: list[str]
) -> None:
    p = np.ones((2, 3), np.float32)
    state = init_state(name, p, **hyper)
    assert list(state) == states
    for array in state.values():
        assert array.dtype == np.float32
        assert array.shape == (2, 3)
        assert not array.any()
    assert len({id(array) for array in state.values()}) == len(states)


def test_init_state_fills_the_accumulator_of_adagrad() -> None:
    assert init_state("adagrad", np.zeros(2), initial_accumulator_value=0.25)["sum_sq"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "hyper", "error", "message"),
    [
        ("adamx", {}, ValueError, r"name is 'adamx', expected one of 'sgd', .*'lamb'"),
        ("sgd", {"momentun": 0.9}, TypeError, r"sgd has no hyperparameter 'momentun', expected some of lr, momentum"),
        ("lamb", {"amsgrad": True}, TypeError, r"lamb has no hyperparameter 'amsgrad'"),
    ],
)
def test_init_state_names_what_it_does_not_know(
    name: str, hyper: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        init_state(name, np.ones(2), **hyper)


BAD_CALLS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("t of zero", {"t": 0}, ValueError, r"t is 0, expected at least 1"),
    ("t of NumPy", {"t": np.int64(1)}, TypeError, r"t is .* of type int64, expected a Python int"),
    ("t of float", {"t": 1.0}, TypeError, r"t is 1.0 of type float, expected a Python int"),
    ("short g", {"g": np.ones(1)}, ValueError, r"g has shape \(1,\), expected the shape of p, \(4,\)"),
    ("integer p", {"p": np.ones(4, int)}, TypeError, r"p has dtype int64, expected float32 or float64"),
    ("half p", {"p": np.ones(4, np.float16)}, TypeError, r"p has dtype float16, expected float32 or float64"),
]


@every_form
@pytest.mark.parametrize(("bad", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in BAD_CALLS])
def test_a_bad_call_is_refused_before_anything_is_written(
    name: str, hyper: dict[str, Any], bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    state = init_state(name, np.ones(4), **hyper)
    arrays = {"p": np.ones(4), "g": np.full(4, 0.5), "t": 1, **bad}
    before = {key: array.copy() for key, array in state.items()}
    p_before = arrays["p"].copy()
    with pytest.raises(error, match=message):
        OPTIMIZERS[name](arrays["p"], arrays["g"], state, arrays["t"], **hyper)
    np.testing.assert_array_equal(arrays["p"], p_before)
    for key, array in state.items():
        np.testing.assert_array_equal(array, before[key])


@every_form
def test_a_missing_or_foreign_state_is_named_before_anything_is_written(name: str, hyper: dict[str, Any]) -> None:
    p = np.ones(4)
    for key in init_state(name, p, **hyper):
        missing, short, narrow = (init_state(name, p, **hyper) for _ in range(3))
        del missing[key]
        short[key] = np.zeros(1)
        narrow[key] = np.zeros(4, np.float32)
        for state, message in (
            (missing, rf"state has no '{key}' \(found \["),
            (short, rf"state '{key}' is float64 of shape \(1,\), expected float64 of shape \(4,\)"),
            (narrow, rf"state '{key}' is float32 of shape \(4,\), expected float64"),
        ):
            before = {each: array.copy() for each, array in state.items()}
            with pytest.raises(ValueError, match=message):
                OPTIMIZERS[name](p, np.full(4, 0.5), state, 1, **hyper)
            np.testing.assert_array_equal(p, np.ones(4))
            for each, array in state.items():
                np.testing.assert_array_equal(array, before[each])


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_an_unknown_form_is_named(name: str) -> None:
    p = np.ones(2)
    with pytest.raises(ValueError, match=r"form is 'classic', expected one of '"):
        OPTIMIZERS[name](p, p.copy(), init_state(name, p), 1, form="classic")
    assert p.tolist() == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------------------ BatchNorm

BATCHNORMS = [
    pytest.param((4, 3), 1, id="N,C"),
    pytest.param((3, 2, 5), 1, id="N,C,L"),
    pytest.param((2, 3, 2, 2), 1, id="N,C,H,W"),
    pytest.param((2, 2, 1, 2, 3), 1, id="N,C,D,H,W"),
    pytest.param((2, 3, 2, 4), -1, id="channels last"),
]


def batchnorm_case(shape: tuple[int, ...], axis: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    return {
        "x": rng.normal(2.0, 3.0, shape),
        "gamma": rng.normal(size=channels),
        "beta": rng.normal(size=channels),
        "residual": rng.normal(size=shape),
        "running_mean": rng.normal(size=channels),
        "running_var": rng.uniform(0.5, 2.0, channels),
        "dy": rng.normal(size=shape),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "axis"), BATCHNORMS)
def test_the_gradients_of_batchnorm_are_those_of_its_central_differences(
    shape: tuple[int, ...], axis: int, activation: str | None, training: bool
) -> None:
    case = batchnorm_case(shape, axis)
    dy = case.pop("dy")

    def loss(**changed: Array) -> float:
        arrays = {name: array.copy() for name, array in {**case, **changed}.items()}
        y, _ = reference.batchnorm_forward(**arrays, axis=axis, activation=activation, training=training)
        return float((y * dy).sum())

    statistics = {name: case[name].copy() for name in ("running_mean", "running_var")}
    _, cache = reference.batchnorm_forward(
        **{**case, **statistics}, axis=axis, activation=activation, training=training
    )
    found = reference.batchnorm_backward(dy, cache)
    for name in ("x", "gamma", "beta", "residual"):
        expected = np.empty(case[name].shape)
        for index in np.ndindex(case[name].shape):
            step = np.zeros(case[name].shape)
            step[index] = 1e-6
            up, down = loss(**{name: case[name] + step}), loss(**{name: case[name] - step})
            expected[index] = (up - down) / 2e-6
        np.testing.assert_allclose(found["d" + name], expected, rtol=1e-6, atol=1e-7)


def test_batchnorm_normalises_and_records() -> None:
    x = np.array([[1.0, 0.0], [3.0, 4.0], [5.0, 2.0]])
    mean, var = np.zeros(2), np.ones(2)
    y, _ = reference.batchnorm_forward(x, None, None, mean, var, momentum=0.5, eps=1e-30)
    np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-15)
    np.testing.assert_allclose((y**2).mean(0), 1.0, rtol=1e-15)
    np.testing.assert_allclose(mean, [1.5, 1.0])
    np.testing.assert_allclose(var, [2.5, 2.5])  # (1 + 4) / 2: the unbiased variance
    again, _ = reference.batchnorm_forward(x, None, None, mean, var, training=False, eps=1e-30)
    np.testing.assert_allclose(again, (x - [1.5, 1.0]) / np.sqrt(2.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": False}, "running_mean and running_var are needed"),
        ({"activation": "tanh"}, "activation is 'tanh', expected None or 'relu'"),
    ],
)
def test_a_bad_call_of_batchnorm_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.batchnorm_forward(np.ones((2, 2)), **options)
