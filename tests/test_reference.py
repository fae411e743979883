"""Checks of the oracle itself: against torch.optim, closed forms, identities, and its in-place contract."""

from __future__ import annotations

import ast
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
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

# Every optimizer in every form, for the property tests below.
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("sgd", {"momentum": 0.9, "lr_inside": True}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3, "nesterov": True, "lr_inside": True}),
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
    ("rmsprop", {"momentum": 0.5, "lr_inside": True}),
    ("rmsprop", {"centered": True, "momentum": 0.5, "eps_inside": True, "eps": 1e-4}),
    ("adam", {}),
    ("adam", {"eps_inside": True}),
    ("adam", {"bias_correction": False}),
    ("adam", {"amsgrad": True}),
    ("adam", {"amsgrad": True, "bias_correction": False, "eps_inside": True}),
    ("adam", {"eps_hat": True}),
    ("adam", {"amsgrad": True, "eps_inside": True, "eps_hat": True}),
    ("adamw", {}),
    ("adamw", {"amsgrad": True, "eps_inside": True}),
    ("adamw", {"eps_hat": True}),
    ("lamb", {}),
    ("lamb", {"bias_correction": False}),
    ("nadam", {}),
    ("radam", {}),
    ("adamax", {}),
    ("adamax", {"eps_inside": False}),
    ("lion", {}),
    ("adabelief", {}),
    ("adan", {}),
    ("ademamix", {}),
    ("ademamix", {"warmup_steps": 10}),
    ("lars", {}),
    ("lars", {"nesterov": True}),
    ("novograd", {}),
    ("stable_adamw", {}),
    ("adafactor", {}),
    ("sophia", {}),
    ("yogi", {}),
    ("yogi", {"bias_correction": False, "initial_accumulator_value": 0.1}),
    ("rprop", {}),
    ("schedule_free_adamw", {}),
    ("schedule_free_adamw", {"warmup_steps": 10}),
    ("adopt", {}),
    ("adabound", {}),
    ("ftrl", {}),
    ("asgd", {"lambd": 0.0}),
    ("asgd", {"t0": 0.0, "lambd": 0.0}),
    ("prodigy", {"d0": 0.01}),
    ("mars", {}),
    ("adam_mini", {}),
    ("muon", {}),  # orthogonal if p has two axes
    ("muon", {"nesterov": False, "adjust_lr": "match_rms_adamw"}),
    ("muon", {"orthogonal": False}),
    ("shampoo", {"precondition": False}),  # matrices have their own tests below
    ("shampoo", {"precondition": False, "momentum": 0.9}),
    ("soap", {"precondition": False}),
]

# Optimizers that do not add weight_decay to the gradient, and optimizers that use norms over all of p.
OWN_DECAY = {
    "adamw",
    "lamb",
    "lion",
    "adabelief",
    "adan",
    "ademamix",
    "lars",
    "novograd",
    "stable_adamw",
    "adafactor",
    "sophia",
    "schedule_free_adamw",
    "muon",
    "soap",
    "prodigy",
    "mars",
    "adam_mini",
}
WHOLE_TENSOR = {"lamb", "lars", "novograd", "stable_adamw", "adafactor", "prodigy", "mars", "adam_mini"}
NUMBERS = {("novograd", "v"), ("adam_mini", "v"), ("prodigy", "d"), ("prodigy", "numerator")}
"""States that are one number."""


def shape_of_state(name: str, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name == "adafactor":
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        return (rows,) if key == "row_var" else (columns,)
    return () if (name, key) in NUMBERS else shape


def form_id(form: tuple[str, dict[str, Any]]) -> str:
    name, hyper = form
    return "-".join([name, *(f"{key}={value}" for key, value in hyper.items())])


every_form = pytest.mark.parametrize(("name", "hyper"), [pytest.param(*form, id=form_id(form)) for form in FORMS])


def run(name: str, p: Array, gradients: list[Array], **hyper: Any) -> tuple[Array, dict[str, Array]]:
    """Update a copy of p with these gradients; return the final parameter and state."""
    p = p.copy()
    state = init_state(name, p, **hyper)
    for t, g in enumerate(gradients, start=1):
        OPTIMIZERS[name](p, g, state, t, **hyper)
    return p, state


def data(seed: int, shape: tuple[int, ...] = (3, 5), steps: int = 20) -> tuple[Array, list[Array]]:
    """Return a parameter, and gradients whose magnitudes span five decades and whose signs change."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-4, 1, shape)
    return rng.normal(size=shape), [scale * rng.normal(size=shape) for _ in range(steps)]


# ------------------------------------------------------------------------------------------------- against torch.optim

SGD_STATES = {"velocity": "momentum_buffer"}
RMSPROP_STATES = {"square_avg": "square_avg", "grad_avg": "grad_avg", "buf": "momentum_buffer"}
ADAM_STATES = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}
ADAMAX_STATES = {"m": "exp_avg", "u": "exp_inf"}
RPROP_STATES = {"prev_grad": "prev", "step_size": "step_size"}
SAME_AS_TORCH: list[tuple[str, dict[str, Any], str, dict[str, Any], dict[str, str]]] = [
    # our name and options; torch's name and options (if they differ); our state: torch's state
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
    ("nadam", {}, "NAdam", {}, ADAM_STATES),
    ("nadam", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-2, "momentum_decay": 0.5}, "NAdam", {}, ADAM_STATES),
    ("radam", {}, "RAdam", {}, ADAM_STATES),
    ("radam", {"lr": 0.1, "betas": (0.8, 0.75), "eps": 1e-2}, "RAdam", {}, ADAM_STATES),
    ("radam", {"lr": 0.1, "betas": (0.8, 0.5)}, "RAdam", {}, ADAM_STATES),  # rho stays below 5
    ("adamax", {}, "Adamax", {}, ADAMAX_STATES),
    ("adamax", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-2}, "Adamax", {}, ADAMAX_STATES),
    ("rprop", {}, "Rprop", {}, RPROP_STATES),
    ("rprop", {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.05, 0.3)}, "Rprop", {}, RPROP_STATES),
    ("asgd", {}, "ASGD", {}, {"ax": "ax"}),
    ("asgd", {"lr": 0.1, "lambd": 0.5, "alpha": 0.5, "t0": 3.0}, "ASGD", {}, {"ax": "ax"}),
]
NOT_IN_TORCH = {
    *("lamb", "lion", "adabelief", "adan", "ademamix", "lars", "novograd", "stable_adamw", "yogi"),
    *("schedule_free_adamw", "adopt", "adabound", "ftrl", "prodigy", "mars", "adam_mini", "shampoo", "soap"),
    "sophia",
}


@pytest.fixture
def torch64() -> Iterator[Any]:
    """Return torch with default dtype float64: torch.optim.NAdam keeps the product of the mu in the default dtype."""
    torch = pytest.importorskip("torch", reason="compares with torch.optim, which this environment does not have")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch
    torch.set_default_dtype(default)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "hyper", "theirs", "extra", "states"),
    [pytest.param(*case, id=form_id(case[:2])) for case in SAME_AS_TORCH],
)
def test_parameters_and_states_equal_torchs(
    name: str,
    hyper: dict[str, Any],
    theirs: str,
    extra: dict[str, Any],
    states: dict[str, str],
    weight_decay: float,
    torch64: Any,
) -> None:
    torch = torch64
    p, gradients = data(seed=1)
    hyper = {**hyper, "weight_decay": weight_decay}
    state = init_state(name, p, **hyper)
    tensor = torch.tensor(p.copy(), requires_grad=True)
    l2_by_hand = theirs == "Rprop"  # torch's Rprop has no weight decay
    same = {key: value for key, value in hyper.items() if not (l2_by_hand and key == "weight_decay")}
    optimizer = getattr(torch.optim, theirs)([tensor], **same, **extra, foreach=False)

    for t, g in enumerate(gradients, start=1):
        OPTIMIZERS[name](p, g, state, t, **hyper)
        tensor.grad = torch.tensor(g) + (weight_decay * tensor.detach() if l2_by_hand else 0)
        optimizer.step()
        # atol only covers sums that cancel to almost zero: all relevant magnitudes are above 1e-9.
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=1e-12, atol=1e-16)
        assert set(state) <= set(states)
        for ours in state:
            np.testing.assert_allclose(
                state[ours], optimizer.state[tensor][states[ours]].numpy(), rtol=1e-12, atol=1e-20, err_msg=ours
            )


def test_the_comparison_covers_every_optimizer_of_torch() -> None:
    own = {"muon", "adafactor"}  # with tests of their own below
    assert {case[0] for case in SAME_AS_TORCH} == set(OPTIMIZERS) - NOT_IN_TORCH - own
    torch = pytest.importorskip("torch", reason="looks into torch.optim, which this environment does not have")
    theirs = {name.lower() for name in vars(torch.optim)}
    assert not {name for name in NOT_IN_TORCH if name.replace("_", "") in theirs}


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
        {"adjust_lr": "match_rms_adamw", "ns_steps": 3, "ns_coefficients": (1.5, -0.5, 0.0), "eps": 10.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("rounded", "tolerance"), [(False, 1e-11), (True, 0.25)], ids=["float64", "bfloat16"])
def test_muon_equals_torchs_except_for_its_bfloat16_loop(
    hyper: dict[str, Any],
    shape: tuple[int, int],
    rounded: bool,
    tolerance: float,
    torch64: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = torch64
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    if not rounded:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    p, gradients = data(seed=1, shape=shape)
    hyper = {"lr": 0.1, **hyper}
    state = init_state("muon", p, **hyper)
    tensor = torch.tensor(p.copy(), requires_grad=True)
    theirs = {"adjust_lr_fn" if key == "adjust_lr" else key: value for key, value in hyper.items()}
    optimizer = torch.optim.Muon([tensor], **theirs)
    for t, g in enumerate(gradients, start=1):
        before = p.copy()
        reference.muon(p, g, state, t, **hyper)
        tensor.grad = torch.tensor(g)
        optimizer.step()
        np.testing.assert_allclose(p, tensor.detach().numpy(), atol=tolerance * np.abs(p - before).max())
        np.testing.assert_allclose(state["m"], optimizer.state[tensor]["momentum_buffer"].numpy(), rtol=1e-11)
        tensor.data[...] = torch.tensor(p)  # compare one step, not the sum of all previous differences


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 1), (1, 6), (7,)])
@pytest.mark.parametrize(
    "hyper",
    [{}, {"lr": 0.5, "beta2_decay": -0.5, "clip_threshold": 1.25, "min_rms": 2.0, "weight_decay": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e-6], ids=["large", "of-the-size-of-eps"])
def test_adafactor_equals_torchs(shape: tuple[int, ...], hyper: dict[str, Any], scale: float, torch64: Any) -> None:
    torch = torch64
    p, gradients = data(seed=1, shape=shape)
    hyper = {"eps": 1e-9, "min_rms": 1e-3, "clip_threshold": 1.0, **hyper}
    gradients = [g * scale for g in gradients]
    state = init_state("adafactor", p, **hyper)
    tensor = torch.tensor(p.copy(), requires_grad=True)
    same = {name: value for name, value in hyper.items() if name in ("lr", "beta2_decay", "weight_decay")}
    optimizer = torch.optim.Adafactor(
        [tensor], eps=(hyper["eps"], hyper["min_rms"]), d=hyper["clip_threshold"], foreach=False, **same
    )
    for t, g in enumerate(gradients, start=1):
        reference.adafactor(p, g, state, t, **hyper)
        tensor.grad = torch.tensor(g)
        optimizer.step()
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=1e-12, atol=1e-16)
    theirs = optimizer.state[tensor]
    columns = theirs["col_var"] if len(shape) > 1 else theirs["variance"]
    np.testing.assert_allclose(state["col_var"], columns.numpy().reshape(-1), rtol=1e-12)
    if len(shape) > 1:
        np.testing.assert_allclose(state["row_var"], theirs["row_var"].numpy().reshape(-1), rtol=1e-12)


# ---------------------------------------------------------------------------------------- numbers computed by hand

# One parameter, two updates with the gradients 2 and -1, from p = 1; the hyperparameters allow a check on paper. Each
# row: name, hyperparameters, p after each update, the state after the second update.
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
    # v = -1, undamped ; v = -0.5 + 0.125
    ("sgd", {"lr": 0.5, "momentum": 0.5, "dampening": 0.75, "lr_inside": True}, (0.0, -0.375), {"velocity": -0.375}),
    # v = -1, step -0.5 - 1 ; v = -0.5 + 0.5, step 0 + 0.5
    ("sgd", {"lr": 0.5, "momentum": 0.5, "nesterov": True, "lr_inside": True}, (-0.5, 0.0), {"velocity": 0.0}),
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
    # L2 at the passed p, 1 and then -0.25: v = 0.5 (2 + 0.5) ; v = 0.3125 + 0.5 (-1 - 0.125)
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
    # b = 0.5 ; b = 0.125 - 0.25
    (
        "rmsprop",
        {"lr": 0.5, "alpha": 0.75, "eps": 1.0, "momentum": 0.25, "lr_inside": True},
        (0.5, 0.625),
        {"square_avg": 1.0, "buf": -0.125},
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
    # the same, v_max stays 2 and is corrected by 0.75 at the second update; the largest corrected moment would be 4.
    (
        "adam",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 0.0, "amsgrad": True},
        (0.5, 0.5 + 0.2 / R(8 / 3)),
        {"m": -0.375, "v": 1.5, "v_max": 2.0},
    ),
    # eps hat: 0.5 sqrt(1/2) / (3/4) 1.5 / (sqrt(2) + 1) ; 0.5 sqrt(3/4) / (15/16) 0.375 / (sqrt(1.5) + 1)
    (
        "adam",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "eps_hat": True},
        (1 - R(0.5) / (R(2) + 1), 1 - R(0.5) / (R(2) + 1) + 0.2 * R(0.75) / (R(1.5) + 1)),
        {"m": -0.375, "v": 1.5},
    ),
    # the same, v_max + eps = 2 + 2 at both
    (
        "adam",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 2.0, "eps_inside": True, "eps_hat": True, "amsgrad": True},
        (1 - R(0.5) / 2, 1 - R(0.5) / 2 + 0.1 * R(0.75)),
        {"m": -0.375, "v": 1.5, "v_max": 2.0},
    ),
    # decay 1 - 0.5 * 0.5, and the steps of Adam above
    (
        "adamw",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "weight_decay": 0.5},
        (0.75 - 1 / 3, 0.75 * (0.75 - 1 / 3) + 0.2 / (R(2) + 1)),
        {"m": -0.375, "v": 1.5},
    ),
    # the same with the steps of eps hat
    (
        "adamw",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "eps_hat": True, "weight_decay": 0.5},
        (0.75 - R(0.5) / (R(2) + 1), 0.75 * (0.75 - R(0.5) / (R(2) + 1)) + 0.2 * R(0.75) / (R(1.5) + 1)),
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
    # mu = 1/4 always. m = 1, v_hat = 4, m_bar = 2 + 1/4 / (15/16) ; m = 0, v_hat = 16/7, m_bar = -(3/4) / (15/16)
    (
        "nadam",
        {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1.0, "momentum_decay": 0.0},
        (1 - 17 / 45, 1 - 17 / 45 + 0.4 / (R(16 / 7) + 1)),
        {"m": 0.0, "v": 1.0},
    ),
    # 0.96^momentum_decay = 1/2, so mu = 3/8, 7/16, ... and mu_1 mu_2 = 21/128: m_bar = 2 + 56/107 ; -72/107
    (
        "nadam",
        {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1.0, "momentum_decay": math.log(0.5) / math.log(0.96)},
        (1 - 45 / 107, 1 - 45 / 107 + 36 / 107 / (R(16 / 7) + 1)),
        {"m": 0.0, "v": 1.0},
    ),
    # rho = 1 and then 5/3: m_hat = 2 ; m_hat = -0.4
    ("radam", {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0}, (0.0, 0.2), {"m": -0.375, "v": 1.5}),
    # m_hat = 2, u = 2 + 1 ; m_hat = -0.4, u = max(1.5, 1 + 1)
    (
        "adamax",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0},
        (2 / 3, 2 / 3 + 0.1),
        {"m": -0.375, "u": 2.0},
    ),
    # the same with u = 2, u + eps = 4 ; u = max(1, 1), u + eps = 3
    (
        "adamax",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 2.0, "eps_inside": False},
        (0.75, 0.75 + 0.2 / 3),
        {"m": -0.375, "u": 1.0},
    ),
    # decay 0.75; c = 1 ; c = 0.25 - 0.5, m = 0.5 and then 0.375 - 0.25
    ("lion", {"lr": 0.5, "betas": (0.5, 0.75), "weight_decay": 0.5}, (0.25, 0.6875), {"m": 0.125}),
    # m = 1.5, s = 0.125 + 1, s_hat = 2.25 ; g - m = -0.625, s = 0.5625 + 0.1953125 + 1, s_hat = s / 0.75
    (
        "adabelief",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0},
        (0.6, 0.6 + 0.2 / (R(2.34375) + 1)),
        {"m": -0.375, "s": 1.7578125},
    ),
    # m_hat = 2, n_hat = 4 ; d = -3, m = 0, v = -2.25, v_hat = -2.4, n = 0.75 + 0.25 (-1 - 0.75)^2, n_hat = 16/7 n
    (
        "adan",
        {"lr": 0.5, "betas": (0.5, 0.25, 0.75), "eps": 1.0, "weight_decay": 0.5},
        (8 / 15, (8 / 15 + 0.3 / (R(24.25 / 7) + 1)) / 1.25),
        {"m": 0.0, "v": -2.25, "n": 1.515625, "prev_grad": -1.0},
    ),
    # m1_hat = 2, m2 = 0.5, v_hat = 4 ; m1 = 0, m2 = 0.375 - 0.25, v_hat = 16/7
    (
        "ademamix",
        {"lr": 0.5, "betas": (0.5, 0.75, 0.75), "alpha": 2.0, "eps": 1.0},
        (0.5, 0.5 - 0.125 / (R(16 / 7) + 1)),
        {"m1": 0.0, "m2": 0.125, "v": 1.0},
    ),
    # half way from b1 = 2^-2 to b3 = 2^-1: q = 2^-(2 / 1.5), alpha = 1, m1_hat = 2, m2 = 2 (1 - q), v_hat = 4, and the
    # decay 0.75 ; the end of the warmup: m1_hat = -0.4, m2 = (1 - q) - 0.5, v_hat = 16/7
    (
        "ademamix",
        {"lr": 0.5, "betas": (0.25, 0.75, 0.5), "alpha": 2.0, "eps": 1.0, "warmup_steps": 2, "weight_decay": 0.5},
        (
            0.75 - (2 - 2 ** (-4 / 3)) / 3,
            0.75 * (0.75 - (2 - 2 ** (-4 / 3)) / 3) - (0.3 - 2 ** (-4 / 3)) / (R(16 / 7) + 1),
        ),
        {"m1": -0.375, "m2": 0.5 - 2 ** (-4 / 3), "v": 1.0},
    ),
    # ratio = 0.5 / 2 ; ratio = 0.375 / 1, v = 0.125 - 0.1875
    ("lars", {"lr": 0.5, "momentum": 0.5, "trust_coefficient": 0.5}, (0.75, 0.8125), {"velocity": -0.0625}),
    # the same, step 0.25 + 0.125 ; ratio = 0.3125 / 1, v = 0.125 - 0.15625, step -0.15625 - 0.015625
    (
        "lars",
        {"lr": 0.5, "momentum": 0.5, "trust_coefficient": 0.5, "nesterov": True},
        (0.625, 0.796875),
        {"velocity": -0.03125},
    ),
    # ratio = 0.5 / 4, d = 3/8, v = 3/16 ; p = 13/16, ratio = 13/32 / (45/16), d = -13/90 3/16, v = 3/32 - 13/960
    (
        "lars",
        {"lr": 0.5, "momentum": 0.5, "trust_coefficient": 0.5, "eps": 1.0, "weight_decay": 1.0},
        (13 / 16, 703 / 960),
        {"velocity": 77 / 960},
    ),
    # v = 4, m = 2/3 + 1/2 ; v = 3 + 0.25, m = 7/12 - 1 / (sqrt(v) + 1) + 5/24
    (
        "novograd",
        {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1.0, "weight_decay": 0.5},
        (5 / 12, 5 / 12 - 0.5 * (19 / 24 - 1 / (R(3.25) + 1))),
        {"m": 19 / 24 - 1 / (R(3.25) + 1), "v": 3.25},
    ),
    # b_t = 0 ; 0.25 * 0.75 / (1 - 1/16) = 1/5 and 0.75 * 0.25 / (1 - 9/16) = 3/7; g^2 <= v: lr is not bounded
    (
        "stable_adamw",
        {"lr": 0.5, "betas": (0.25, 0.75), "eps": 1.0, "weight_decay": 0.5},
        (5 / 12, 5 / 12 - 0.5 * (5 / 24 - 0.4 / (R(16 / 7) + 1))),
        {"m": -0.4, "v": 16 / 7},
    ),
    # b2 = 0, u = 1 ; b2 = 1/2, v = 2.5, and the rms of p is 0.5
    (
        "adafactor",
        {"lr": 0.5, "beta2_decay": -1.0},
        (0.5, 0.5 + 0.25 / R(2.5)),
        {"row_var": 2.5, "col_var": 2.5},
    ),
    # without a Hessian: the sign of m, and a decay of half
    ("sophia", {"lr": 0.5, "betas": (0.25, 0.75), "weight_decay": 0.5}, (0.25, 0.6875), {"m": -0.375, "v": 0.0}),
    # v decreases: 8 - 0.5 * 4, v_hat = 12 ; 6 - 0.5 * 1, v_hat = 5.5 / 0.75
    (
        "yogi",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "initial_accumulator_value": 8.0},
        (1 - 1 / (R(12) + 1), 1 - 1 / (R(12) + 1) + 0.2 / (R(22 / 3) + 1)),
        {"m": -0.375, "v": 5.5},
    ),
    # v increases to 0.5 * 4, and decreases by 0.5 * 1
    (
        "yogi",
        {
            "lr": 0.5,
            "betas": (0.25, 0.5),
            "eps": 1.0,
            "initial_accumulator_value": 0.0,
            "bias_correction": False,
        },
        (1 - 0.75 / (R(2) + 1), 1 - 0.75 / (R(2) + 1) + 0.1875 / (R(1.5) + 1)),
        {"m": -0.375, "v": 1.5},
    ),
    # step 0.25 ; after the sign change half the step size, but no step
    ("rprop", {"lr": 0.25, "etas": (0.5, 2.0)}, (0.75, 0.75), {"prev_grad": 0.0, "step_size": 0.125}),
    # L2: g = 2 + 4 ; g = -1 + 3, and twice 0.25 is above the largest
    (
        "rprop",
        {"lr": 0.25, "etas": (0.5, 2.0), "step_sizes": (1e-6, 0.375), "weight_decay": 4.0},
        (0.75, 0.375),
        {"prev_grad": 2.0, "step_size": 0.375},
    ),
    # s = 1/2, c = 1, z = x = 1 - 0.25 ; s^2 = 7/16, c = 7/11, z = 0.75 + D with D = sqrt(7) / 16, x = 0.75 + 7/11 D
    (
        "schedule_free_adamw",
        {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1.0},
        (0.75, 0.75 + 9 / 176 * R(7)),
        {"z": 0.75 + R(7) / 16, "v": 1.0},
    ),
    # s = 1/4, z = x = 1 - 0.125 (1 + 0.5) ; s^2 = 28/64 and 4/64 before, c = 7/8, d = -0.5 + 0.40625
    (
        "schedule_free_adamw",
        {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1.0, "warmup_steps": 2, "weight_decay": 0.5},
        (0.8125, 0.8125 + 45 / 4096 * R(7)),
        {"z": 0.8125 + 3 / 256 * R(7), "v": 1.0},
    ),
    # v = 4, and no step ; u = -1/2 is within 1, v = 3 + 0.25
    ("adopt", {"lr": 0.5, "betas": (0.5, 0.75)}, (1.0, 1.125), {"m": -0.25, "v": 3.25}),
    # L2: v = 2.5^2 ; u = -1/2 / 8, v = 3/4 6.25 + 1/4 0.25
    (
        "adopt",
        {"lr": 0.5, "betas": (0.5, 0.75), "eps": 8.0, "clip_exp": 3.0, "weight_decay": 0.5},
        (1.0, 1.015625),
        {"m": -0.03125, "v": 4.75},
    ),
    # m = 1, v = 1, eta = 1 / 2 sqrt(1/4) / (1/2) / 2 = 1/4 is below the lower bound of 1/3 (upper 3) ; m = 0
    (
        "adabound",
        {"lr": 0.5, "betas": (0.5, 0.75), "final_lr": 1.0, "gamma": 0.5, "eps": 1.0},
        (2 / 3, 2 / 3),
        {"m": 0.0, "v": 1.0},
    ),
    # L2: m = 15/8, v = 25/8, eta = 10 sqrt(1/2) / (3/4) / (sqrt(25/8) + 1) > 3/2 ; p = -29/16: m = 15/32 - 3/4 61/32,
    # v = 25/16 + (61/32)^2 / 2, the upper bound is 1
    (
        "adabound",
        {"lr": 10.0, "betas": (0.25, 0.5), "final_lr": 0.5, "gamma": 0.5, "eps": 1.0, "weight_decay": 0.5},
        (-29 / 16, -29 / 16 + 123 / 128),
        {"m": -123 / 128, "v": 25 / 16 + 3721 / 2048},
    ),
    # z = -1 at first. z = -1 + 1 - 2 1, n = 4, 2 / (1 + 2) ; z = -2 - 1/2 - (sqrt(5) - 2) 2/3, n = 5
    (
        "ftrl",
        {"lr": 0.5},
        (2 / 3, (2.5 + 2 / 3 * (R(5) - 2)) / (1 + R(5))),
        {"z": -2.5 - 2 / 3 * (R(5) - 2), "n": 5.0},
    ),
    # L2: g = 3, n = 16 + 9, z = -6 + 3/2 - 1, p = (5.5 - 1) / (2 + 5 + 2) ; g = -1/2, z = -5.5 - 1/4 - s / 2
    (
        "ftrl",
        {"lr": 0.5, "beta": 2.0, "l1": 2.0, "l2": 4.0, "initial_accumulator_value": 16.0, "weight_decay": 1.0},
        (0.5, (4.75 + (R(25.25) - 5) / 2) / (4 + R(25.25))),
        {"z": -5.75 - (R(25.25) - 5) / 2, "n": 25.25},
    ),
    # 1 - 1/4 - 1 ; eta = (1/2) / 4, p = -15/64 + 1/8, and not its average
    (
        "asgd",
        {"lr": 0.5, "lambd": 0.5, "alpha": math.log(4.0) / math.log(1.25)},
        (-0.25, -7 / 64),
        {"ax": -7 / 64},
    ),
    # m = 1/2, v = 15/16, s = 1, the step 1/2 (m / (sqrt(v) + 1/2) + 1/2) ; m = 0, r < 0: d stays, and p decays
    (
        "prodigy",
        {"betas": (0.5, 1 / 16), "eps": 1.0, "d0": 0.5, "weight_decay": 0.5},
        (0.75 - 0.25 / (R(15 / 16) + 0.5), 0.75 * (0.75 - 0.25 / (R(15 / 16) + 0.5))),
        {"m": 0.0, "v": 75 / 256, "s": -0.25, "p0": 1.0, "d": 0.5, "numerator": -0.125 - 0.125 / (R(15 / 16) + 0.5)},
    ),
    # c = 2 / 2: m = 3/4, v = 1/2 ; c = -1 + 1/2 (-1 - 2), and so -1: m = 3/16 - 3/4, v = 3/4
    (
        "mars",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "gamma": 1.5, "weight_decay": 0.5},
        (0.5, 0.375 + 0.15),
        {"m": -9 / 16, "v": 0.75, "prev_grad": -1.0},
    ),
    # a single number is its own mean: the numbers of AdamW
    (
        "adam_mini",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "weight_decay": 0.5},
        (0.75 - 1 / 3, 0.75 * (0.75 - 1 / 3) + 0.2 / (R(2) + 1)),
        {"m": -0.375, "v": 1.5},
    ),
    # one axis: the numbers of AdamW above. Matrices have their own test below.
    (
        "muon",
        {"adamw_lr": 0.5, "adamw_betas": (0.25, 0.5), "adamw_eps": 1.0, "weight_decay": 0.5},
        (0.75 - 1 / 3, 0.75 * (0.75 - 1 / 3) + 0.2 / (R(2) + 1)),
        {"m": -0.375, "v": 1.5},
    ),
    # one axis: m = 1, v = 4 ; m = 0.5 - 0.5, v = 5. Matrices have their own test below.
    ("shampoo", {"lr": 0.5, "momentum": 0.5, "eps": 5.0}, (5 / 6, 5 / 6), {"m": 0.0, "v": 5.0}),
    # one axis: Adam with eps_hat, whose m / (sqrt(v) + eps) is 1.5 / (R(2) + 1) ; -0.375 / (R(1.5) + 1), then the decay
    (
        "soap",
        {"lr": 0.5, "betas": (0.25, 0.5), "eps": 1.0, "weight_decay": 0.5},
        (
            0.75 * (1 - R(2) / (R(2) + 1) / 2),
            0.75 * (0.75 * (1 - R(2) / (R(2) + 1) / 2) + 0.1 * R(3) / (R(1.5) + 1)),
        ),
        {"m": -0.375, "v": 1.5},
    ),
]


@pytest.mark.parametrize(
    ("name", "hyper", "expected", "expected_state"),
    [pytest.param(*case, id=form_id(case[:2])) for case in BY_HAND],
)
def test_two_updates_give_the_numbers_computed_by_hand(
    name: str, hyper: dict[str, Any], expected: tuple[float, float], expected_state: dict[str, float]
) -> None:
    p = np.array([1.0])
    state = init_state(name, p, **hyper)
    for t, (gradient, want) in enumerate(zip((2.0, -1.0), expected, strict=True), start=1):
        OPTIMIZERS[name](p, np.array([gradient]), state, t, **hyper)
        assert p[0] == pytest.approx(want, rel=1e-14, abs=1e-15)
    assert {key: array.item() for key, array in state.items()} == pytest.approx(expected_state, rel=1e-14)


def test_the_numbers_by_hand_cover_every_optimizer_and_every_form() -> None:
    assert {case[0] for case in BY_HAND} == set(OPTIMIZERS)
    forms = {(case[0], case[1]["form"]) for case in BY_HAND if "form" in case[1]}
    assert {("momentum", "ema"), ("momentum", "lr_inside"), ("nesterov", "lookahead")} <= forms
    assert {case[0] for case in BY_HAND if case[1].get("eps_inside")} == {"adagrad", "rmsprop", "adam"}
    assert {case[0] for case in BY_HAND if case[1].get("eps_hat")} == {"adam", "adamw"}
    assert {case[0] for case in BY_HAND if case[1].get("lr_inside")} == {"sgd", "rmsprop"}


def test_lamb_on_a_vector_by_hand() -> None:
    # bias-corrected first step: m_hat = g, sqrt(v_hat) = |g|, so u = g / (|g| + eps) + wd p, here (1, -1) + p / 2.
    p = np.array([6.0, 8.0])
    reference.lamb(p, np.array([3.0, -5.0]), init_state("lamb", p), 1, lr=0.1, eps=0.0, weight_decay=0.5)
    u = np.array([4.0, 3.0])
    np.testing.assert_allclose(p, [6.0, 8.0] - 0.1 * (10 / 5) * u, rtol=1e-14)


def test_lars_and_novograd_on_a_vector_by_hand() -> None:
    # |p| = 10, |g| = 5: ratio = 0.5 10 / (5 + 0.5 10), d = ratio (g + 0.5 p)
    p = np.array([6.0, 8.0])
    g = np.array([3.0, -4.0])
    lars, _ = run("lars", p, [g], lr=0.1, trust_coefficient=0.5, weight_decay=0.5)
    np.testing.assert_allclose(lars, [6.0 - 0.1 * 0.5 * 6.0, 8.0], rtol=1e-14)
    # g / 5 + 0.5 p; v stays 25 at the second update
    novograd, state = run("novograd", p, [g, -g], lr=0.1, betas=(0.5, 0.25), eps=0.0, weight_decay=0.5)
    first = np.array([3.6, 3.2])
    second = first / 2 + [-0.6, 0.8] + 0.5 * (p - 0.1 * first)
    np.testing.assert_allclose(state["m"], second, rtol=1e-14)
    np.testing.assert_allclose(novograd, p - 0.1 * (first + second), rtol=1e-14)
    assert state["v"] == pytest.approx(25.0, rel=1e-14)


def test_stable_adamw_bounds_its_rate_by_hand() -> None:
    # b2_t = 3/7 at the second update: v = (3/7 + 4/7 49, 1), and the mean of g^2 / v is (343/199 + 1) / 2
    p = np.array([1.0, 2.0])
    after, state = run("stable_adamw", p, [np.ones(2), np.array([7.0, 1.0])], lr=0.1, betas=(0.0, 0.75), eps=0.0)
    np.testing.assert_allclose(state["v"], [199 / 7, 1.0], rtol=1e-14)
    first = p - 0.1 * (1.0 + 0.01 * p)
    second = first - 0.1 * math.sqrt(199 / 271) * (np.array([7 / math.sqrt(199 / 7), 1.0]) + 0.01 * first)
    np.testing.assert_allclose(after, second, rtol=1e-14)


def test_adopt_divides_by_the_gradients_before_and_clips_less_and_less() -> None:
    # b2 = 0: each gradient is divided by the one before. 4 / 1 is clipped to 1^0.5, -100 / 4 to -2^0.5, 90 / 100 is not
    p, state = run(
        "adopt", np.zeros(1), [np.array([g]) for g in (1.0, 4.0, -100.0, 90.0)], betas=(0.5, 0.0), clip_exp=0.5
    )
    m = [0.5, 0.25 - math.sqrt(0.5), 0.125 - math.sqrt(0.125) + 0.45]
    assert state["m"].tolist() == pytest.approx(m[-1:], rel=1e-14)
    assert p.tolist() == pytest.approx([-1e-3 * sum(m)], rel=1e-14)


def test_ftrl_is_adagrad_without_l1_for_any_schedule_and_sets_small_parameters_to_zero() -> None:
    p, gradients = data(seed=29)
    other = p.copy()
    states = init_state("ftrl", p), init_state("adagrad", p)
    for t, g in enumerate(gradients, start=1):
        reference.ftrl(p, g, states[0], t, lr=0.1 / t, beta=1e-2)
        reference.adagrad(other, g, states[1], t, lr=0.1 / t, eps=1e-2)
    np.testing.assert_allclose(p, other, rtol=1e-11)
    sparse, state = run("ftrl", np.zeros_like(p), gradients, l1=2.0)
    np.testing.assert_array_equal(sparse == 0, np.abs(state["z"]) <= 0.2)
    assert 0 < np.count_nonzero(sparse) < sparse.size


def test_prodigy_estimates_the_distance_from_how_far_it_has_gone() -> None:
    # Without averages every step is of d sign(g), and d becomes d_coef times the way so far: the ways are 1, 2 and 5
    # times d0, d is 1, 3 and 6 times d0, and is used one step later
    p, g = np.array([1.0, -2.0, 3.0]), np.array([4.0, -0.5, 1.0])
    after, state = run("prodigy", p, [g] * 3, betas=(0.0, 0.0), eps=0.0, d0=0.25, d_coef=3.0)
    np.testing.assert_allclose(after, p - 5 * 0.25 * np.sign(g), rtol=1e-14)
    assert state["d"] == pytest.approx(6 * 0.25, rel=1e-14)


def test_adam_mini_on_a_vector_by_hand() -> None:
    # the means are 25 and 4: v = 25/4, v_hat = 25 ; v = 75/16 + 1, v_hat = 91/7. m_hat = g ; m_hat = (m + 2 g) / 3
    p, first, second = np.zeros(2), np.array([7.0, -1.0]), np.array([-2.0, 2.0])
    after, state = run("adam_mini", p, [first, second], lr=0.5, betas=(0.5, 0.75), eps=1.0)
    np.testing.assert_allclose(after, -0.5 * first / 6 - 0.5 * (first + 2 * second) / 3 / (R(13) + 1), rtol=1e-14)
    assert state["v"] == pytest.approx(91 / 16, rel=1e-14)


def test_sophia_divides_by_the_mean_of_its_hessians_by_hand() -> None:
    p, state = np.array([0.0, 0.0]), init_state("sophia", np.zeros(2))
    hyper: dict[str, Any] = {"lr": 0.5, "betas": (0.5, 0.75), "gamma": 0.5, "eps": 0.25}
    reference.sophia(p, np.array([1.0, 2.0]), state, 1, hessian=np.array([16.0, -4.0]), **hyper)
    np.testing.assert_array_equal(state["v"], [4.0, -1.0])
    np.testing.assert_array_equal(p, [-0.125, -0.5])  # m = (0.5, 1), over (2, 0.25)
    reference.sophia(p, np.array([-1.5, -1.0]), state, 2, **hyper)
    np.testing.assert_array_equal(p, [0.0, -0.5])  # m = (-0.5, 0), and v as it was
    reference.sophia(p, np.array([0.5, -0.25]), state, 3, hessian=np.array([4.0, 3.0]), **hyper)
    np.testing.assert_array_equal(p, [0.0, -0.25])  # m = (0, -0.125), over (2, 0.25) of v = (4, 0)


def test_radam_starts_to_use_the_second_moment_at_its_eighth_update_with_b2_of_three_quarters() -> None:
    # A constant gradient has m_hat = g and sqrt(v_hat) = |g|: a step is lr g, then lr r sign(g). rho of the seventh
    # update is 4.84, which exceeds a bound of 4 but not of 5.
    b2 = Fraction(3, 4)
    rho_inf = 2 / (1 - b2) - 1
    rho = [rho_inf - 2 * t * b2**t / (1 - b2**t) for t in range(1, 9)]
    assert rho_inf == 7
    assert 4 < rho[6] < 5 < rho[7]
    r = math.sqrt((rho[7] - 4) * (rho[7] - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho[7]))
    p, state = np.array([1.0]), init_state("radam", np.ones(1))
    for t in range(1, 9):
        before = p.copy()
        reference.radam(p, np.array([-3.0]), state, t, lr=0.125, betas=(0.5, 0.75), eps=0.0)
        assert (p - before)[0] == pytest.approx(0.125 * (3.0 if t < 8 else r), rel=1e-12)


def test_ademamix_warms_up_along_the_half_life() -> None:
    # The half-life ln(1/2) / ln(b) of the slow average changes linearly from that of b1 to that of b3.
    b1, b3, warmup = 0.9, 0.999, 40
    for t in range(1, 50):
        state = init_state("ademamix", np.ones(1))
        reference.ademamix(np.ones(1), np.ones(1), state, t, betas=(b1, 0.99, b3), warmup_steps=warmup)
        half_life = [math.log(0.5) / math.log(b) for b in (b1, b3, 1 - state["m2"][0])]
        f = min(t / warmup, 1)
        assert half_life[2] == pytest.approx((1 - f) * half_life[0] + f * half_life[1], rel=1e-10)
    # A b3 below b1 is never exceeded.
    state = init_state("ademamix", np.ones(1))
    reference.ademamix(np.ones(1), np.ones(1), state, 1, betas=(0.9, 0.99, 0.5), warmup_steps=4)
    assert state["m2"].tolist() == [0.5]


def test_ademamix_mixes_in_alpha_of_the_slow_average() -> None:
    # With g = 0 and a slow average of 1, the numerator is b3 m2 alpha.
    for t in range(1, 12):
        p, state = np.zeros(1), {"m1": np.zeros(1), "m2": np.ones(1), "v": np.zeros(1)}
        reference.ademamix(p, np.zeros(1), state, t, lr=0.5, alpha=3.0, eps=2.0, warmup_steps=8)
        assert p[0] == pytest.approx(-0.5 * 3.0 * min(t / 8, 1) * state["m2"][0] / 2.0, rel=1e-12)


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_first_step_of_adam_is_lr_g_over_abs_g_plus_eps(eps: float) -> None:
    p, (g,) = data(seed=2, steps=1)
    after, _ = run("adam", p, [g], lr=0.1, eps=eps)
    np.testing.assert_allclose(after, p - 0.1 * g / (np.abs(g) + eps), rtol=1e-12)


def test_adam_from_its_moments_as_weighted_sums() -> None:
    # Paper, section 3: m_t = (1 - b1) sum_i b1^(t-i) g_i, and the same for v of g^2: this needs no recursion.
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

    # After a cut of lr, "heavy_ball" scales its whole velocity with the new lr, "lr_inside" keeps the old scale.
    inside, ball = (np.array([1.0]) for _ in range(2))
    inside_state, ball_state = init_state("momentum", inside, form="lr_inside"), init_state("momentum", ball)
    for t, lr in ((1, 1.0), (2, 0.0)):
        reference.momentum(inside, np.ones(1), inside_state, t, lr=lr, momentum=0.5, form="lr_inside")
        reference.momentum(ball, np.ones(1), ball_state, t, lr=lr, momentum=0.5)
    assert ball.tolist() == [0.0]
    assert inside.tolist() == [-0.5]


def test_reformulated_nesterov_follows_the_look_ahead_points() -> None:
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
    assert np.linalg.norm(p - theta) > 1e-3  # the two points differ


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


def test_dampening_has_no_effect_without_momentum() -> None:
    p, gradients = data(seed=10)
    np.testing.assert_array_equal(
        run("sgd", p, gradients, dampening=0.5, nesterov=True)[0], run("sgd", p, gradients)[0]
    )


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("sgd", {"momentum": 0.8, "dampening": 0.3}),
        ("sgd", {"momentum": 0.8, "nesterov": True}),
        ("rmsprop", {"momentum": 0.8, "centered": True, "eps": 1e-3}),
    ],
)
def test_lr_inside_of_sgd_and_rmsprop_matters_only_where_lr_changes(name: str, hyper: dict[str, Any]) -> None:
    p, gradients = data(seed=7)
    outside, outside_state = run(name, p, gradients, lr=0.1, weight_decay=0.1, **hyper)
    inside, inside_state = run(name, p, gradients, lr=0.1, weight_decay=0.1, lr_inside=True, **hyper)
    np.testing.assert_allclose(inside, outside, rtol=1e-11)
    key, sign = ("velocity", -1) if name == "sgd" else ("buf", 1)
    np.testing.assert_allclose(inside_state[key], sign * 0.1 * outside_state[key], rtol=1e-10)

    for lr_inside, moved in ((False, False), (True, True)):  # with lr = 0 the velocity continues only with lr_inside
        q, state = p.copy(), init_state(name, p, **hyper)
        OPTIMIZERS[name](q, gradients[0], state, 1, lr=0.1, lr_inside=lr_inside, **hyper)
        before = q.copy()
        OPTIMIZERS[name](q, gradients[1], state, 2, lr=0.0, lr_inside=lr_inside, **hyper)
        assert np.all(q != before) == moved


def test_lr_inside_without_momentum_changes_nothing() -> None:
    p, gradients = data(seed=7)
    for name in ("sgd", "rmsprop"):
        inside, state = run(name, p, gradients, lr_inside=True, weight_decay=0.1)
        np.testing.assert_array_equal(inside, run(name, p, gradients, weight_decay=0.1)[0])
        assert not {"velocity", "buf"} & state.keys()


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("eps_inside", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_eps_hat_is_eps_times_the_root_of_the_bias_correction(name: str, eps_inside: bool, amsgrad: bool) -> None:
    p, gradients = data(seed=12)
    hat = p.copy()
    form = {"eps_inside": eps_inside, "amsgrad": amsgrad, "betas": (0.8, 0.95), "weight_decay": 0.1, "lr": 0.1}
    states = [init_state(name, p, amsgrad=amsgrad) for _ in range(2)]
    for t, g in enumerate(gradients, start=1):
        factor = (1 - 0.95**t) if eps_inside else math.sqrt(1 - 0.95**t)
        OPTIMIZERS[name](p, g, states[0], t, eps=1e-2, **form)
        OPTIMIZERS[name](hat, g, states[1], t, eps=1e-2 * factor, eps_hat=True, **form)
    np.testing.assert_allclose(hat, p, rtol=1e-12)
    form["bias_correction"] = False
    np.testing.assert_array_equal(
        run(name, p, gradients, eps=1e-2, eps_hat=True, **form)[0], run(name, p, gradients, eps=1e-2, **form)[0]
    )


def test_without_eps_both_forms_of_adamax_are_the_same() -> None:
    p, gradients = data(seed=10)
    inside, _ = run("adamax", p, gradients, eps=0.0, lr=0.1, weight_decay=0.1)
    outside, _ = run("adamax", p, gradients, eps=0.0, lr=0.1, weight_decay=0.1, eps_inside=False)
    np.testing.assert_allclose(inside, outside, rtol=1e-14)


def test_without_its_slow_average_ademamix_is_adamw() -> None:
    p, gradients = data(seed=10)
    mix, state = run("ademamix", p, gradients, alpha=0.0, lr=0.1, weight_decay=0.1)
    adamw, adamw_state = run("adamw", p, gradients, lr=0.1, weight_decay=0.1)
    np.testing.assert_allclose(mix, adamw, rtol=1e-14)
    np.testing.assert_array_equal(state["m1"], adamw_state["m"])
    np.testing.assert_array_equal(state["v"], adamw_state["v"])


def test_adan_of_a_constant_gradient_is_adam() -> None:
    p, (g,) = data(seed=10, steps=1)
    adan, state = run("adan", p, [g] * 10, lr=0.1, eps=1e-3)
    np.testing.assert_allclose(adan, run("adam", p, [g] * 10, lr=0.1, eps=1e-3)[0], rtol=1e-12)
    assert not state["v"].any()
    np.testing.assert_array_equal(state["prev_grad"], g)


def test_the_first_difference_of_adan_is_zero_for_any_state() -> None:
    p, (g,) = data(seed=10, steps=1)
    state = init_state("adan", p)
    state["prev_grad"][...] = 100.0
    reference.adan(p, g, state, 1)
    assert not state["v"].any()


def test_adabelief_without_momentum_believes_every_gradient() -> None:
    # b1 = 0 gives m = g, so that s consists of eps only, and s_hat = eps / (1 - b2) at every update.
    p, gradients = data(seed=10)
    after, state = run("adabelief", p, gradients, lr=0.1, betas=(0.0, 0.75), eps=0.25)
    np.testing.assert_allclose(state["s"], 0.25 * (1 - 0.75**20) / (1 - 0.75), rtol=1e-14)
    np.testing.assert_allclose(after, p - 0.1 * sum(gradients) / 1.25, rtol=1e-12)


def test_the_second_moment_of_yogi_moves_by_a_share_of_the_squared_gradient_either_way() -> None:
    p, gradients = data(seed=10)
    state = init_state("yogi", p)
    for t, g in enumerate(gradients, start=1):
        before = state["v"].copy()
        reference.yogi(p, g, state, t, betas=(0.9, 0.75))
        np.testing.assert_allclose(np.abs(state["v"] - before), 0.25 * g**2, rtol=1e-9, atol=1e-15)
        np.testing.assert_array_equal(state["v"] > before, g**2 > before)
    first, _ = run("yogi", p, gradients[:1], initial_accumulator_value=0.0)
    np.testing.assert_allclose(first, run("adam", p, gradients[:1], lr=1e-2, eps=1e-3)[0], rtol=1e-14)


def test_l2_is_the_gradient_of_the_penalty_for_optimizers_without_decoupled_decay() -> None:
    for name, hyper in FORMS:
        if name in OWN_DECAY:
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


@pytest.mark.parametrize(
    ("name", "hyper", "lr"),
    [
        ("adamw", {"eps_hat": True}, "lr"),
        ("lion", {}, "lr"),
        ("adabelief", {}, "lr"),
        ("adam_mini", {}, "lr"),
        ("mars", {}, "lr"),
        ("ademamix", {"warmup_steps": 5}, "lr"),
        ("muon", {}, "lr"),
        ("muon", {"orthogonal": False}, "adamw_lr"),
    ],
)
def test_decoupled_decay_takes_a_fraction_of_the_parameter_and_then_the_step(
    name: str, hyper: dict[str, Any], lr: str
) -> None:
    p, gradients = data(seed=12)
    plain = p.copy()
    states = [init_state(name, p, **hyper) for _ in range(2)]
    for t, g in enumerate(gradients, start=1):
        plain *= 1 - 0.1 * 0.5
        OPTIMIZERS[name](plain, g, states[0], t, weight_decay=0.0, **{lr: 0.1}, **hyper)
        OPTIMIZERS[name](p, g, states[1], t, weight_decay=0.5, **{lr: 0.1}, **hyper)
    np.testing.assert_array_equal(p, plain)
    for key in states[0]:
        np.testing.assert_array_equal(states[0][key], states[1][key])


def test_adan_decays_after_its_step_as_a_proximal_method() -> None:
    p, gradients = data(seed=12)
    plain = p.copy()
    states = [init_state("adan", p) for _ in range(2)]
    for t, g in enumerate(gradients, start=1):
        reference.adan(plain, g, states[0], t, lr=0.1)
        plain /= 1 + 0.1 * 0.5
        reference.adan(p, g, states[1], t, lr=0.1, weight_decay=0.5)
    np.testing.assert_allclose(p, plain, rtol=1e-14)


def test_amsgrad_remembers_the_largest_gradient_and_adam_forgets_it() -> None:
    p = np.zeros(1)
    gradients = [np.array([100.0])] + [np.array([1.0])] * 50
    adam, _ = run("adam", p, gradients, lr=0.1, betas=(0.0, 0.5))
    amsgrad, state = run("adam", p, gradients, lr=0.1, betas=(0.0, 0.5), amsgrad=True)
    assert state["v_max"].tolist() == [5000.0]
    assert state["v"][0] == pytest.approx(1, rel=1e-3)
    assert adam[0] < -3 < amsgrad[0]


def test_centered_rmsprop_clamps_a_variance_that_rounding_made_negative() -> None:
    # A constant gradient has no variance, so only rounding decides the sign of v - a^2.
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
    p = np.full(4, 1e25, dtype=np.float32)  # its square exceeds the largest float32
    after, _ = run("lamb", p, [np.ones(4, np.float32)], lr=0.5, weight_decay=0.0)
    np.testing.assert_allclose(after, p / 2, rtol=1e-6)


@pytest.mark.parametrize("zero", ["parameter", "gradient"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_ratio_of_lars_is_one_where_the_parameter_or_the_gradient_is_zero(zero: str, nesterov: bool) -> None:
    p, (g,) = data(seed=18, steps=1)
    (p if zero == "parameter" else g)[...] = 0.0
    after, _ = run("lars", p, [g], lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.25)
    np.testing.assert_allclose(after, p - 0.1 * (1.5 if nesterov else 1) * (g + 0.25 * p), rtol=1e-14)


@given(seed=st.integers(0, 2**32 - 1), lr=st.floats(1e-3, 1.0), trust=st.floats(1e-3, 1.0))
@settings(max_examples=30, deadline=None)
def test_lars_without_momentum_moves_the_fraction_lr_trust_of_the_norm(seed: int, lr: float, trust: float) -> None:
    p, gradients = data(seed, steps=5)
    state = init_state("lars", p)
    for t, g in enumerate(gradients, start=1):
        before = p.copy()
        reference.lars(p, g, state, t, lr=lr, momentum=0.0, trust_coefficient=trust)
        assert np.linalg.norm(p - before) == pytest.approx(lr * trust * np.linalg.norm(before), rel=1e-9)


def test_norms_of_lars_do_not_overflow_in_float32() -> None:
    p = np.full(4, 1e25, dtype=np.float32)
    after, _ = run("lars", p, [np.full(4, 1e25, np.float32)], lr=0.5, trust_coefficient=1.0)
    np.testing.assert_allclose(after, p / 2, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ NovoGrad, Lion, Rprop


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_novograd_divides_by_the_average_of_the_norms_which_is_one_number(dtype: type[np.floating[Any]]) -> None:
    p, gradients = data(seed=19)
    p = p.astype(dtype)
    after, state = run("novograd", p, gradients, lr=0.1, betas=(0.0, 0.75), eps=0.0)
    v = sum(g**2 for g in gradients[0].flat)
    expected = p.astype(np.float64)
    for t, g in enumerate(gradients):
        v = v if t == 0 else 0.75 * v + 0.25 * math.fsum(x**2 for x in g.flat)
        expected = expected - 0.1 * g / math.sqrt(v)
    assert state["v"].shape == ()
    assert state["v"].dtype == dtype
    np.testing.assert_allclose(state["v"], v, rtol=1e-5 if dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(after, expected, rtol=1e-4 if dtype == np.float32 else 1e-12)


def test_a_parameter_of_novograd_whose_gradients_are_all_zero_stays_a_number() -> None:
    p = np.array([3.0, 4.0])
    after, state = run("novograd", p, [np.zeros(2)] * 3)
    np.testing.assert_array_equal(after, p)
    assert state["v"] == 0
    decayed, _ = run("novograd", p, [np.zeros(2)], lr=0.1, weight_decay=0.5)
    np.testing.assert_allclose(decayed, p * (1 - 0.1 * 0.5), rtol=1e-14)


def test_lion_moves_every_element_by_lr_or_not_at_all() -> None:
    p, gradients = data(seed=20, shape=(6,))
    for g in gradients:
        g[0] = 0.0
    state = init_state("lion", p)
    for t, g in enumerate(gradients, start=1):
        before, m = p.copy(), state["m"].copy()
        reference.lion(p, g, state, t, lr=0.25, betas=(0.75, 0.5))
        np.testing.assert_allclose(p - before, -0.25 * np.sign(3 * m + g), rtol=1e-12)
    assert before[0] == p[0]
    averages = np.average(gradients, axis=0, weights=[0.5 ** (20 - t) for t in range(1, 21)])
    np.testing.assert_allclose(state["m"], averages * (1 - 0.5**20), rtol=1e-12)


def test_rprop_uses_only_the_sign_of_the_gradient() -> None:
    p, gradients = data(seed=21)
    after, state = run("rprop", p, gradients, lr=0.1)
    signs, sign_state = run("rprop", p, [np.sign(g) for g in gradients], lr=0.1)
    np.testing.assert_array_equal(after, signs)
    np.testing.assert_array_equal(state["step_size"], sign_state["step_size"])


def test_step_sizes_of_rprop_grow_shrink_and_stay_within_their_bounds() -> None:
    p, state = np.zeros(1), init_state("rprop", np.zeros(1), lr=0.25)
    walk = []
    # up, up to the bound, at the bound, the sign changes, the one after a change counts as a first, down to the bound
    for t, g in enumerate([1.0, 2.0, 5.0, 5.0, -1.0, -1.0, 3.0, 3.0, -2.0, -2.0, 0.0, -2.0], start=1):
        before = p.copy()
        reference.rprop(p, np.array([g]), state, t, etas=(0.25, 2.0), step_sizes=(0.125, 0.75))
        walk.append((float((p - before)[0]), float(state["step_size"][0])))
    assert walk == [
        (-0.25, 0.25),
        (-0.5, 0.5),
        (-0.75, 0.75),
        (-0.75, 0.75),
        (0.0, 0.1875),
        (0.1875, 0.1875),
        (0.0, 0.125),
        (-0.125, 0.125),
        (0.0, 0.125),
        (0.125, 0.125),
        (0.0, 0.125),
        (0.125, 0.125),
    ]


# -------------------------------------------------------------------------------------------------- schedule-free AdamW


@pytest.mark.parametrize("warmup", [0, 4, 100])
def test_schedule_free_averages_the_points_z_by_their_squared_step_sizes(warmup: int) -> None:
    # Use the definition directly: z by AdamW without momentum, x the weighted mean of the z after the start, y between
    # the two. The gradient is that of a bowl, so that it depends on its point.
    p, _ = data(seed=22)
    b1, b2, lr, decay, eps = 0.8, 0.95, 0.1, 0.3, 1e-3
    betas = (b1, b2)
    y, state = p.copy(), init_state("schedule_free_adamw", p)
    np.testing.assert_allclose(reference.schedule_free_eval(y, state, betas=betas), p, rtol=1e-14)
    z, x, v = p.copy(), p.copy(), np.zeros_like(p)
    points, weights = [], []
    for t in range(1, 16):
        at = (1 - b1) * z + b1 * x
        g = 2 * at - 1
        step_size = lr * math.sqrt(1 - b2**t) * (min(1, t / warmup) if warmup else 1)
        v = b2 * v + (1 - b2) * g * g
        z = z - step_size * (g / (np.sqrt(v) + eps) + decay * at)
        points.append(z)
        weights.append(step_size**2)
        x = np.average(points, axis=0, weights=weights)

        reference.schedule_free_adamw(
            y, 2 * y - 1, state, t, lr=lr, betas=betas, eps=eps, warmup_steps=warmup, weight_decay=decay
        )
        np.testing.assert_allclose(y, (1 - b1) * z + b1 * x, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(state["z"], z, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(reference.schedule_free_eval(y, state, betas=betas), x, rtol=1e-10, atol=1e-13)


def test_schedule_free_without_x_in_between() -> None:
    # Putting x = (y - (1 - b1) z) / b1 into the new y leaves y = (1 - c) y + c z - (1 - b1 (1 - c)) gamma d, with z the
    # old one; the same for z alone is z - gamma d. The form a compiled rule can use.
    p, gradients = data(seed=23)
    b1, b2, lr = 0.8, 0.95, 0.1
    y, z = p.copy(), p.copy()
    state = init_state("schedule_free_adamw", p)
    total = 0.0
    for t, g in enumerate(gradients, start=1):
        reference.schedule_free_adamw(p, g, state, t, lr=lr, betas=(b1, b2), eps=1e-3, weight_decay=0.1)
        total += 1 - b2**t
        c = (1 - b2**t) / total
        step = lr * math.sqrt(1 - b2**t) * (g / (np.sqrt(state["v"]) + 1e-3) + 0.1 * y)
        y = (1 - c) * y + c * z - (1 - b1 * (1 - c)) * step
        z = z - step
        np.testing.assert_allclose(p, y, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(state["z"], z, rtol=1e-11, atol=1e-14)


def test_schedule_free_needs_a_first_beta_above_zero() -> None:
    p = np.ones(2)
    state = init_state("schedule_free_adamw", p)
    assert state["z"] is not p
    with pytest.raises(ValueError, match=r"betas: must have a first value above 0, got \(0.0, 0.999\)"):
        reference.schedule_free_adamw(p, np.ones(2), state, 1, betas=(0.0, 0.999))
    with pytest.raises(ValueError, match=r"betas: must have a first value above 0, got \(0.0, 0.999\)"):
        reference.schedule_free_eval(p, state, betas=(0.0, 0.999))
    with pytest.raises(ValueError, match=r"state: must have 'z'"):
        reference.schedule_free_eval(p, {"v": np.ones(2)})
    assert p.tolist() == state["z"].tolist() == [1.0, 1.0]
    assert state["v"].tolist() == [0.0, 0.0]


# ----------------------------------------------------------------------------------------------------------------- Muon

JORDAN = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_muon_changes_only_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    # U S V^T goes to U f(f(... S / |S|)) V^T with f(x) = a x + b x^3 + c x^5: no matrix product of the loop is used.
    p, (g,) = data(seed=24, shape=shape, steps=1)
    u, values, vt = np.linalg.svd(g, full_matrices=False)
    values = values / np.sqrt(np.sum(values**2))
    for _ in range(steps):
        values = JORDAN[0] * values + JORDAN[1] * values**3 + JORDAN[2] * values**5
    step = u @ np.diag(values) @ vt
    for adjust_lr, adjust in (
        ("original", math.sqrt(max(1, shape[0] / shape[1]))),
        ("match_rms_adamw", 0.2 * math.sqrt(max(shape))),
    ):
        after, state = run("muon", p, [g], lr=0.1, ns_steps=steps, adjust_lr=adjust_lr, weight_decay=0.5)
        np.testing.assert_allclose(state["v"], step, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(after, 0.95 * p - 0.1 * adjust * step, rtol=1e-10, atol=1e-13)


def test_muon_makes_the_momentum_nearly_orthogonal() -> None:
    p, gradients = data(seed=25, shape=(6, 9))
    gradients = [g / np.abs(g).max(axis=1, keepdims=True) for g in gradients]
    _, state = run("muon", p, gradients)
    assert np.all(np.abs(np.linalg.svd(state["v"], compute_uv=False) - 1) < 0.35)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_on_a_matrix_by_hand(nesterov: bool) -> None:
    # f(x) = x / 2 once, and eps = 20 above every norm: X = u / 40. lr adjust = 0.5 sqrt(4 / 1), decay 1 - 0.5 0.5.
    # m = 4 g_1 / 8 and u = 3/4 of g_1 with nesterov ; m = g_1 / 4 + g_2 / 2 and u = (g_2 + m) / 2
    p = np.array([[8.0], [-4.0], [0.0], [4.0]])
    hyper = {"lr": 0.5, "momentum": 0.5, "ns_steps": 1, "ns_coefficients": (0.5, 0.0, 0.0), "eps": 20.0}
    first, second = np.array([[8.0], [0.0], [4.0], [-8.0]]), np.array([[-8.0], [4.0], [0.0], [2.0]])
    after, state = run("muon", p, [first, second], nesterov=nesterov, weight_decay=0.5, **hyper)
    m = np.array([[-2.0], [2.0], [1.0], [-1.0]])
    u = np.array([[-5.0], [3.0], [0.5], [0.5]]) if nesterov else m
    np.testing.assert_allclose(state["m"], m, rtol=1e-14)
    np.testing.assert_allclose(state["v"], u / 40, rtol=1e-14)
    once = 0.75 * p - (0.75 if nesterov else 0.5) * first / 40
    np.testing.assert_allclose(after, 0.75 * once - u / 40, rtol=1e-14)


def test_muon_of_a_transposed_matrix_is_the_transposed_result() -> None:
    p, gradients = data(seed=26)
    wide, state = run("muon", p, gradients, adjust_lr="match_rms_adamw")
    tall, tall_state = run("muon", p.T, [g.T for g in gradients], adjust_lr="match_rms_adamw")
    np.testing.assert_allclose(tall.T, wide, rtol=1e-12)
    np.testing.assert_allclose(tall_state["v"].T, state["v"], rtol=1e-10)


@pytest.mark.parametrize(("shape", "orthogonal"), [((4,), None), ((2, 2, 3), None), ((), None), ((3, 5), False)])
def test_muon_without_orthogonalization_is_adamw(shape: tuple[int, ...], orthogonal: bool | None) -> None:
    p, gradients = data(seed=27, shape=shape)
    after, state = run("muon", p, gradients, lr=5.0, eps=7.0, weight_decay=0.3, orthogonal=orthogonal)
    adamw, adamw_state = run("adamw", p, gradients, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    np.testing.assert_array_equal(after, adamw)
    for key in state:
        np.testing.assert_array_equal(state[key], adamw_state[key])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_muon_of_an_empty_matrix(shape: tuple[int, int]) -> None:
    p, state = run("muon", np.ones(shape), [np.ones(shape)])
    assert p.shape == state["v"].shape == shape


def test_muon_of_a_zero_gradient_only_decays() -> None:
    p, _ = data(seed=28)
    after, state = run("muon", p, [np.zeros_like(p)], lr=0.1, weight_decay=0.5)
    np.testing.assert_array_equal(after, 0.95 * p)
    assert not state["v"].any()


@pytest.mark.parametrize(
    ("shape", "hyper", "message"),
    [
        ((2, 2), {"adjust_lr": "spectral"}, r"adjust_lr: must be one of 'original', 'match_rms_adamw', got 'spectral'"),
        ((4,), {"adjust_lr": "spectral"}, r"adjust_lr: must be one of .*, got 'spectral'"),
        ((4,), {"orthogonal": True}, r"p: must have two axes with orthogonal=True, got shape \(4,\)"),
        ((2, 1, 2), {"orthogonal": True}, r"p: must have two axes with orthogonal=True, got shape \(2, 1, 2\)"),
    ],
)
def test_muon_refuses_bad_arguments(shape: tuple[int, ...], hyper: dict[str, Any], message: str) -> None:
    p = np.ones(shape)
    state = init_state("muon", p)
    with pytest.raises(ValueError, match=message):
        reference.muon(p, np.ones(shape), state, 1, **hyper)
    assert np.all(p == 1)
    assert not state["m"].any()


# ---------------------------------------------------------------------------------------------------- Shampoo and SOAP


def test_shampoo_equals_pytorch_optimizers_on_a_matrix() -> None:
    # pytorch_optimizer 4.1.0 with torch 2.13.0: Shampoo(lr=0.1, weight_decay=0.1), whose matrix_eps is 1e-6.
    rng = np.random.default_rng(0)
    p, gradients = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) for _ in range(20)]
    after, state = run("shampoo", p, gradients, lr=0.1, weight_decay=0.1, eps=1e-6)
    golden = [
        [0.12382843266075484, -0.11280634051816608, 0.6301017885468853, 0.23433359734735257],
        [-0.46037330449348274, 0.1693823750391096, 1.34839835766014, 0.6390500622127092],
        [-0.6871615854228343, -1.2150231906231683, -0.45008706895488826, -0.05618271111795923],
    ]
    np.testing.assert_allclose(after, golden, rtol=1e-12, atol=1e-14)
    assert {key: array.shape for key, array in state.items() if key not in "mv"} == {
        **dict.fromkeys(("L", "L_root"), (3, 3)),
        **dict.fromkeys(("R", "R_root"), (4, 4)),
    }


def test_shampoo_averages_gradients_and_keeps_roots_by_hand() -> None:
    # (L + 1)^-0.5 m (R + 1)^-0.5 is m / (d + 1) for L = R = diag(d), with the roots of every other step.
    hyper = {"lr": 1.0, "momentum": 0.5, "eps": 1.0, "exponent": 0.5, "precondition_frequency": 2}
    gradients = [np.diag([1.0, 2.0]), np.diag([3.0, 0.0]), np.diag([1.0, 1.0])]
    after, state = run("shampoo", np.zeros((2, 2)), gradients, **hyper)
    steps = np.array([[0.5 / 2, 1.0 / 5], [1.75 / 2, 0.5 / 5], [1.375 / 12, 0.75 / 6]])
    np.testing.assert_allclose(after, -np.diag(steps.sum(axis=0)), rtol=1e-14)
    np.testing.assert_allclose(state["L"], np.diag([11.0, 5.0]), rtol=1e-14)
    with pytest.raises(ValueError, match=r"p: must have at least two axes with precondition=True, got shape \(2,\)"):
        run("shampoo", np.ones(2), [np.ones(2)], precondition=True)


GOLDEN_SOAP = {
    3: [
        [-0.3040644435516711, -0.3361313422875505, 0.8261346457386703, 0.09084211880835899],
        [-0.3415563622393017, -0.06988145797221589, 1.5818585756989774, -0.21380582065368423],
        [-0.94738144055314, -1.913288966021059, -0.6474466179118501, -0.009557460898526547],
        [-1.85596328770598, 0.249764622333855, -1.6090495144014643, -1.362815603340919],
    ],
    30: [
        [-0.14808853959490936, -0.4552492515053446, 0.8092279688840824, 0.14923753800906522],
        [-0.37956016381125823, -0.16514512782205204, 1.5408937376606389, -0.24249427064971957],
        [-0.9498696974650789, -1.8500836232100921, -0.6101351663447611, -0.01120314971153326],
        [-1.8961991073323596, 0.17006621497393798, -1.5783350427362313, -1.3743708840834201],
    ],
}
"""After the gradients of a generator of seed 0, by precondition_frequency."""


@pytest.mark.parametrize("frequency", GOLDEN_SOAP)
def test_soap_equals_pytorch_optimizers_on_a_square_matrix(frequency: int) -> None:
    # pytorch_optimizer 4.1.0 with torch 2.13.0: SOAP(lr=0.1). Its QR decompositions round to float32, which moves the
    # first result by 1e-7: they were kept in float64. Of a matrix that is not square, the first gradient leaves
    # eigenvectors of 0 undetermined, and with them the result.
    rng = np.random.default_rng(0)
    p, gradients = rng.normal(size=(4, 4)), [rng.normal(size=(4, 4)) for _ in range(21)]
    after, state = run("soap", p, gradients, lr=0.1, precondition_frequency=frequency)
    np.testing.assert_allclose(after, GOLDEN_SOAP[frequency], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(state["QL"].T @ state["QL"], np.eye(4), atol=1e-14)


def test_soap_equals_pytorch_optimizers_on_a_vector_but_for_the_update_that_it_leaves_out() -> None:
    rng = np.random.default_rng(0)
    p, gradients = rng.normal(size=3), [rng.normal(size=3) for _ in range(21)]
    after, _ = run("soap", p, gradients[1:], lr=0.1)
    np.testing.assert_allclose(after, [0.19603023779348341, -0.2243955539051173, 0.9866099306811489], rtol=1e-12)


# --------------------------------------------------------------------------------------------------------- convergence

# The bowl sum_i a_i (p_i - c_i)^2 / 2; lr falls linearly to 0, because the steps of sign-like methods do not shrink.
BOWL_LR = {
    "sgd": 0.1,
    "momentum": 0.1,
    "nesterov": 0.1,
    "adagrad": 1.0,
    "adadelta": 10.0,
    "rmsprop": 0.1,
    "lamb": 0.1,
    "lars": 10.0,
    "novograd": 0.02,
    "shampoo": 1.0,
    "ftrl": 2.0,
    "prodigy": 1.0,
}


@every_form
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_converges_on_a_quadratic_bowl(name: str, hyper: dict[str, Any], dtype: type[np.floating[Any]]) -> None:
    a = np.array([0.5, 1.0, 2.0, 3.0], dtype)
    c = np.array([1.0, -2.0, 3.0, -0.5], dtype)
    p = np.array([-1.0, 1.0, 0.5, 2.0], dtype)
    if name == "muon":
        a, c, p = (array.reshape(2, 2) for array in (a, c, p))
    state = init_state(name, p, **hyper)
    start = float(np.sum(a * (p - c) ** 2))
    for t in range(1, 501):
        lr = BOWL_LR.get(name, 0.2) * (1 - (t - 1) / 500)
        rates = {"lr": lr, "adamw_lr": lr} if name == "muon" else {"lr": lr}
        ahead = p - 0.9 * state["velocity"] if hyper.get("form") == "lookahead" else p
        OPTIMIZERS[name](p, a * (ahead - c), state, t, **hyper, weight_decay=0.0, **rates)
    assert float(np.sum(a * (p - c) ** 2)) < 1e-4 * start


# ---------------------------------------------------------------------------------------------------------- properties


@every_form
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (5, 3), (2, 3, 4)])
def test_updates_the_callers_arrays_and_only_reads_the_gradient(
    name: str, hyper: dict[str, Any], dtype: type[np.floating[Any]], shape: tuple[int, ...]
) -> None:
    p = np.ones(shape, dtype)
    gradients = [np.full(shape, g, dtype) for g in (-0.5, -0.75)]
    state = init_state(name, p, **hyper)
    view, arrays, shapes = p.view(), dict(state), {key: array.shape for key, array in state.items()}
    for t, g in enumerate(gradients, start=1):
        g.flags.writeable = False
        before = p.copy()
        hessian = {"hessian": g} if name == "sophia" else {}
        assert OPTIMIZERS[name](p, g, state, t, **hyper, **hessian, weight_decay=0.1) is None
        assert np.all(view == p)
        assert np.all(p != before) or (name, t) == ("adopt", 1)
    assert np.all(gradients[0] == -0.5)
    assert np.all(gradients[1] == -0.75)
    assert state.keys() == arrays.keys()
    for key, array in arrays.items():
        assert state[key] is array
        assert array.dtype == dtype
        assert array.shape == shapes[key] == shape_of_state(name, key, shape)
        assert np.all(array != 0) or p.size == 0, f"{key} is not used"
        assert not any(np.may_share_memory(array, other) for other in (p, *gradients))


class Narrow(np.ndarray[Any, np.dtype[np.float32]]):
    """A float32 array that fails as soon as a computation with it is not in float32."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        bare = [each.view(np.ndarray) if isinstance(each, Narrow) else each for each in inputs]
        out = kwargs.pop("out", ())
        if out:
            kwargs["out"] = tuple(each.view(np.ndarray) for each in out)
        # With out= a float64 operand is computed in float64 and then rounded: only the operands reveal it.
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


@pytest.mark.parametrize(("name", "hyper"), [form for form in FORMS if form[0] not in WHOLE_TENSOR])
def test_elements_are_independent(name: str, hyper: dict[str, Any]) -> None:
    p, gradients = data(seed=15, shape=(8,))
    whole, state = run(name, p, gradients, **hyper, weight_decay=0.1)
    for i in range(8):
        alone, state_alone = run(name, p[i : i + 1], [g[i : i + 1] for g in gradients], **hyper, weight_decay=0.1)
        assert alone[0] == whole[i]
        assert all(state_alone[key][0] == state[key][i] for key in state)


# Steps along the plain gradient (RAdam starts with them, AdaBound ends there), and Adadelta, which does not move
# without eps.
SCALE_MATTERS = {"sgd", "momentum", "nesterov", "adadelta", "radam", "adabound", "ftrl", "asgd", "mars"}


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-20, 20))
@settings(max_examples=20, deadline=None)
def test_without_eps_the_scale_of_the_gradient_does_not_matter(seed: int, power: int) -> None:
    # A power of two scales without rounding, so the steps are the same to the last bit.
    p, gradients = data(seed, steps=4)
    scaled = [g * 2.0**power for g in gradients]
    for name, hyper in FORMS:
        if name not in SCALE_MATTERS and "initial_accumulator_value" not in hyper:
            without = {"eps": 0.0, "adamw_eps": 0.0, "initial_accumulator_value": 0.0}
            takes = inspect.signature(OPTIMIZERS[name]).parameters
            hyper = {**hyper, **{key: value for key, value in without.items() if key in takes}}
            if hyper.get("centered"):
                # At the first step v - a^2 is (1 - alpha) alpha g^2, far from rounding to 0 and dividing by it.
                hyper["alpha"] = 0.5
            np.testing.assert_array_equal(
                run(name, p, gradients, **hyper)[0], run(name, p, scaled, **hyper)[0], err_msg=form_id((name, hyper))
            )


WITHOUT_GRADIENT = {("adabelief", "s"), ("adamax", "u"), ("ftrl", "z")}
"""States that eps moves, and one that begins where p is."""


@every_form
def test_a_gradient_of_zero_moves_nothing_from_the_state_at_the_start(name: str, hyper: dict[str, Any]) -> None:
    p, _ = data(seed=16)
    after, state = run(name, p, [np.zeros_like(p)] * 3, **hyper, weight_decay=0.0)
    if name == "schedule_free_adamw":
        np.testing.assert_allclose(after, p, rtol=1e-15)  # x and y are computed from each other
    else:
        np.testing.assert_array_equal(after, p)
    for key, array in init_state(name, p, **hyper).items():
        if (name, key) not in WITHOUT_GRADIENT:
            np.testing.assert_array_equal(state[key], array, err_msg=key)


@every_form
def test_a_nan_in_the_gradient_is_not_swallowed(name: str, hyper: dict[str, Any]) -> None:
    p, gradients = data(seed=17, steps=2)
    gradients[0][0, 0] = np.nan
    after, state = run(name, p, gradients, **hyper)
    if name == "adamax":
        assert np.isnan(state["u"]).sum() == 1  # the maximum of NaN and a number is NaN
    if name in WHOLE_TENSOR or (name == "muon" and hyper.get("orthogonal") is None):
        assert np.all(np.isnan(after))  # the norm is NaN, and a ratio of 1 does not hide it
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
def test_all_have_one_signature_and_documentation(name: str) -> None:
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
    "sgd": {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
        "lr_inside": False,
        "weight_decay": 0.0,
    },
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
        "lr_inside": False,
        "weight_decay": 0.0,
    },
    "adam": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "eps_inside": False,
        "eps_hat": False,
        "bias_correction": True,
        "amsgrad": False,
        "weight_decay": 0.0,
    },
    "adamw": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "eps_inside": False,
        "eps_hat": False,
        "bias_correction": True,
        "amsgrad": False,
        "weight_decay": 0.01,
    },
    "lamb": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True},
    "nadam": {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 4e-3, "weight_decay": 0.0},
    "radam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "eps_hat": True, "weight_decay": 0.0},
    "adamax": {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "eps_inside": True, "weight_decay": 0.0},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    "adabelief": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-16, "weight_decay": 0.0},
    "adan": {
        "lr": 1e-3,
        "betas": (0.98, 0.92, 0.99),
        "eps": 1e-8,
        "form": "paper",
        "eps_root": 0.0,
        "weight_decay": 0.0,
    },
    "ademamix": {
        "lr": 1e-3,
        "betas": (0.9, 0.999, 0.9999),
        "alpha": 2.0,
        "eps": 1e-8,
        "warmup_steps": 0,
        "weight_decay": 0.0,
    },
    "lars": {
        "lr": 0.1,
        "momentum": 0.9,
        "trust_coefficient": 1e-3,
        "eps": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
    },
    "novograd": {"lr": 1e-3, "betas": (0.95, 0.98), "eps": 1e-8, "weight_decay": 0.0},
    "sophia": {
        "lr": 1e-4,
        "betas": (0.96, 0.99),
        "gamma": 0.01,
        "eps": 1e-12,
        "weight_decay": 0.0,
        "hessian": None,
    },
    "stable_adamw": {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01},
    "adafactor": {
        "lr": 0.01,
        "beta2_decay": -0.8,
        "eps": 1e-30,
        "min_rms": 1e-3,
        "clip_threshold": 1.0,
        "weight_decay": 0.0,
    },
    "adopt": {"lr": 1e-3, "betas": (0.9, 0.9999), "eps": 1e-6, "clip_exp": 0.25, "weight_decay": 0.0},
    "adabound": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "final_lr": 0.1,
        "gamma": 1e-3,
        "eps": 1e-8,
        "weight_decay": 0.0,
    },
    "ftrl": {
        "lr": 0.1,
        "beta": 1.0,
        "l1": 0.0,
        "l2": 0.0,
        "initial_accumulator_value": 0.0,
        "weight_decay": 0.0,
    },
    "asgd": {"lr": 0.01, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6, "weight_decay": 0.0},
    "prodigy": {
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "d0": 1e-6,
        "d_coef": 1.0,
        "bias_correction": False,
        "safeguard_warmup": False,
        "weight_decay": 0.0,
    },
    "mars": {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "gamma": 0.025, "weight_decay": 0.0},
    "adam_mini": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "yogi": {
        "lr": 1e-2,
        "betas": (0.9, 0.999),
        "eps": 1e-3,
        "initial_accumulator_value": 1e-6,
        "bias_correction": True,
        "initial_momentum": 0.0,
        "weight_decay": 0.0,
    },
    "rprop": {"lr": 1e-2, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0), "weight_decay": 0.0},
    "schedule_free_adamw": {
        "lr": 2.5e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "warmup_steps": 0,
        "form": "paper",
        "weight_decay": 0.0,
    },
    "muon": {
        "lr": 1e-3,
        "momentum": 0.95,
        "nesterov": True,
        "ns_steps": 5,
        "ns_coefficients": (3.4445, -4.775, 2.0315),
        "eps": 1e-7,
        "adjust_lr": "original",
        "adamw_lr": 3e-4,
        "adamw_betas": (0.9, 0.95),
        "adamw_eps": 1e-8,
        "orthogonal": None,
        "weight_decay": 0.1,
    },
    "shampoo": {
        "lr": 0.1,
        "momentum": 0.0,
        "eps": 1e-4,
        "exponent": 0.25,
        "precondition_frequency": 1,
        "precondition": None,
        "weight_decay": 0.0,
    },
    "soap": {
        "lr": 3e-3,
        "betas": (0.95, 0.95),
        "eps": 1e-8,
        "shampoo_beta": 0.95,
        "precondition_frequency": 10,
        "precondition": None,
        "weight_decay": 0.01,
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_match_the_specification(name: str) -> None:
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
        ("nadam", {}, ["m", "v"]),
        ("radam", {}, ["m", "v"]),
        ("adamax", {}, ["m", "u"]),
        ("lion", {}, ["m"]),
        ("adabelief", {}, ["m", "s"]),
        ("adan", {}, ["m", "v", "n", "prev_grad"]),
        ("ademamix", {}, ["m1", "m2", "v"]),
        ("lars", {"momentum": 0.0}, ["velocity"]),
        ("yogi", {"initial_accumulator_value": 0.0}, ["m", "v"]),
        ("rprop", {"lr": 0.0}, ["prev_grad", "step_size"]),
        ("muon", {}, ["m", "v"]),
        ("muon", {"orthogonal": False}, ["m", "v"]),
        ("shampoo", {"precondition": False}, ["m", "v"]),
        ("soap", {"precondition": False}, ["m", "v"]),
    ],
)
def test_init_state_returns_the_states_that_the_hyperparameters_require(
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


def test_init_state_fills_states_with_nonzero_initial_values() -> None:
    assert init_state("adagrad", np.zeros(2), initial_accumulator_value=0.25)["sum_sq"].tolist() == [0.25, 0.25]
    yogi = init_state("yogi", np.zeros(2), initial_accumulator_value=0.25)
    assert (yogi["m"].tolist(), yogi["v"].tolist()) == ([0.0, 0.0], [0.25, 0.25])
    assert init_state("yogi", np.zeros(2))["v"].tolist() == [1e-6, 1e-6]
    rprop = init_state("rprop", np.zeros(2), lr=0.25)
    assert (rprop["prev_grad"].tolist(), rprop["step_size"].tolist()) == ([0.0, 0.0], [0.25, 0.25])


def test_init_state_of_schedule_free_copies_the_parameter() -> None:
    p = np.array([[1.0, 2.0]], np.float32)
    state = init_state("schedule_free_adamw", p)
    assert list(state) == ["z", "v"]
    assert state["z"].dtype == np.float32
    assert not np.may_share_memory(state["z"], p)
    assert (state["z"].tolist(), state["v"].tolist()) == ([[1.0, 2.0]], [[0.0, 0.0]])


def test_init_state_of_novograd_has_one_number_for_all_of_the_parameter() -> None:
    state = init_state("novograd", np.ones((2, 3), np.float32))
    assert list(state) == ["m", "v"]
    assert (state["m"].shape, state["v"].shape) == ((2, 3), ())
    assert state["m"].dtype == state["v"].dtype == np.float32
    assert not state["m"].any()
    assert state["v"] == 0


@pytest.mark.parametrize(
    ("name", "hyper", "error", "message"),
    [
        ("adamx", {}, ValueError, r"name: must be one of 'sgd', .*'lamb', .*got 'adamx'"),
        ("sgd", {"momentun": 0.9}, TypeError, r"hyperparameter of sgd: must be one of lr, momentum.*, got 'momentun'"),
        ("lamb", {"amsgrad": True}, TypeError, r"hyperparameter of lamb: must be .*, got 'amsgrad'"),
    ],
)
def test_init_state_refuses_unknown_names(
    name: str, hyper: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        init_state(name, np.ones(2), **hyper)


BAD_CALLS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("t of zero", {"t": 0}, ValueError, r"t: must be at least 1, got 0"),
    ("t of NumPy", {"t": np.int64(1)}, TypeError, r"t: must be a Python int, got .* of type int64"),
    ("t of float", {"t": 1.0}, TypeError, r"t: must be a Python int, got 1.0 of type float"),
    ("short g", {"g": np.ones(1)}, ValueError, r"g: must have the shape of p, \(4,\), got \(1,\)"),
    ("integer p", {"p": np.ones(4, int)}, TypeError, r"p: must be float32 or float64, got int64"),
    ("half p", {"p": np.ones(4, np.float16)}, TypeError, r"p: must be float32 or float64, got float16"),
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
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_a_missing_or_foreign_state_is_named_before_anything_is_written(
    name: str, hyper: dict[str, Any], shape: tuple[int, ...]
) -> None:
    p = np.ones(shape)
    for key, right in init_state(name, p, **hyper).items():
        missing, short, narrow = (init_state(name, p, **hyper) for _ in range(3))
        del missing[key]
        short[key] = np.zeros(2 if right.shape == (1,) else 1)
        narrow[key] = np.zeros(right.shape, np.float32)
        expected = rf"state '{key}': must be float64 of shape {re.escape(str(right.shape))} .*, got"
        for state, message in (
            (missing, rf"state: must have '{key}', got \["),
            (short, rf"{expected} float64 of shape {re.escape(str(short[key].shape))}"),
            (narrow, rf"{expected} float32 of shape {re.escape(str(right.shape))}"),
        ):
            before = {each: array.copy() for each, array in state.items()}
            with pytest.raises(ValueError, match=message):
                OPTIMIZERS[name](p, np.full(shape, 0.5), state, 1, **hyper)
            np.testing.assert_array_equal(p, np.ones(shape))
            for each, array in state.items():
                np.testing.assert_array_equal(array, before[each])


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_an_unknown_form_is_named(name: str) -> None:
    p = np.ones(2)
    with pytest.raises(ValueError, match=r"form: must be one of '.*, got 'classic'"):
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
def test_the_gradients_of_batchnorm_equal_central_differences(
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
        ({"training": False}, "running_mean and running_var: must be given with training=False"),
        ({"activation": "tanh"}, "activation: must be None or 'relu', got 'tanh'"),
    ],
)
def test_a_bad_call_of_batchnorm_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.batchnorm_forward(np.ones((2, 2)), **options)
