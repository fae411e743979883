"""Parity with torch.optim in float32: parameters and states within 4 ulp of the magnitude at every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import CASES, SIZES, Case, gradients

import fastopt

torch = pytest.importorskip("torch", reason="torch is not installed: it is the oracle of these tests (CI installs it)")

STATE_NAMES = {
    "velocity": "momentum_buffer",
    "sum_sq": "sum",
    "m": "exp_avg",
    "v": "exp_avg_sq",
    "v_max": "max_exp_avg_sq",
    "square_avg": "square_avg",
    "acc_delta": "acc_delta",
    "grad_avg": "grad_avg",
    "buf": "momentum_buffer",
    "u": "exp_inf",
    "prev_grad": "prev",
    "step_size": "step_size",
    "ax": "ax",
}
PARITY = [  # Rprop has no weight decay in torch
    pytest.param(case, weight_decay, id=f"{case}-decay={weight_decay}")
    for case in CASES
    if case.torch
    for weight_decay in ((0.0,) if case.torch == "Rprop" else (0.0, 0.1))
]
ULP = 4
TINY = 1e-30
SQUARES = ("v", "v_max", "sum_sq", "square_avg")


def torch_optimizer(case: Case, param: Any, **more: Any) -> Any:
    options = {**(case.options if case.torch_options is None else case.torch_options), **more}
    return getattr(torch.optim, case.torch)([param], **options)


def ulps(found: np.ndarray, expected: np.ndarray, magnitude: np.ndarray) -> float:
    """The largest difference, in units of the last place of the largest number that entered the computation."""
    largest = np.maximum(np.abs(expected), magnitude).astype(np.float32)
    return float(np.max(np.abs(found.astype(np.float64) - expected) / np.spacing(largest), initial=0.0))


def without_cancellation(
    case: Case, states: dict[str, np.ndarray], p: np.ndarray, g: np.ndarray, t: int, weight_decay: float
) -> dict[str, np.ndarray]:
    """The step on absolute values in float64: each result is then the sum of the magnitudes that were added up."""
    oracle = case.oracle(p.astype(np.float64), weight_decay=weight_decay)
    for name, state in states.items():
        oracle.state[name][...] = np.abs(state)
    oracle.t = t - 1
    oracle.step(g.astype(np.float64))
    return {"step": np.abs(oracle.p - p), **oracle.state}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("case", "weight_decay"), PARITY)
def test_a_step_is_torchs_to_4_ulp(case, size, weight_decay):
    rng = np.random.default_rng(8)
    start = rng.normal(size=size).astype(np.float32)
    mine = case.make({"w": start}, weight_decay=weight_decay)
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    theirs = torch_optimizer(case, param, **({} if case.torch == "Rprop" else {"weight_decay": weight_decay}))
    for step in range(10):
        g = gradients(rng, size, np.float32)
        before = mine.params["w"].copy()
        states = {name: tree["w"].copy() for name, tree in mine.states.items()}
        mine.step({"w": g})
        param.grad = torch.from_numpy(g.copy())
        theirs.step()

        magnitudes = without_cancellation(case, states, np.abs(before), np.abs(g), step + 1, weight_decay)
        # g + weight_decay p may cancel; what is left carries the rounding of what went in, into the whole step.
        loss = (np.abs(g) + weight_decay * np.abs(before)) / np.maximum(np.abs(g + weight_decay * before), TINY)
        for name, tree in mine.states.items():
            state = theirs.state[param][STATE_NAMES[name]].numpy()
            magnitude = np.maximum(np.abs(state) * loss, magnitudes[name])
            if name == "ax":  # an average of numbers that may cancel
                magnitude = np.max([magnitude, np.abs(before), np.abs(param.detach().numpy())], axis=0)
            # A square doubles the error of its root: that of the decayed gradient, which torch adds up with an FMA, and
            # in acc_delta that of two roots, a quotient and a product.
            bound = {"acc_delta": 3 * ULP}.get(name, 2 * ULP if name in SQUARES and weight_decay else ULP)
            assert ulps(tree["w"], state, magnitude) <= bound, f"{name} at step {step}"
        expected = param.detach().numpy()
        # The step is a chain of some ten roundings on each side: where it outweighs p, it is allowed twice the ulps.
        moved = 2.0 * np.maximum(np.abs(expected - before) * loss, magnitudes["step"])
        assert ulps(mine.params["w"], expected, np.maximum(np.abs(before), moved)) <= ULP, f"params at step {step}"

        # Start the next step from the same numbers, so that differences do not add up.
        mine.params["w"][...] = expected
        for name, tree in mine.states.items():
            tree["w"][...] = theirs.state[param][STATE_NAMES[name]].numpy()


def test_a_parameter_without_gradient_keeps_its_own_step_count_as_in_torch():
    rng = np.random.default_rng(9)
    start = rng.normal(size=(2, 5)).astype(np.float32)
    mine = fastopt.Adam({"a": start[0], "b": start[1]})
    a, b = (torch.nn.Parameter(torch.from_numpy(row.copy())) for row in start)
    theirs = torch.optim.Adam([a, b])
    for step in range(8):
        g = rng.normal(size=(2, 5)).astype(np.float32)
        missing = step in (0, 3, 4)
        mine.step({"a": g[0], "b": None if missing else g[1]})
        a.grad = torch.from_numpy(g[0].copy())
        b.grad = None if missing else torch.from_numpy(g[1].copy())
        theirs.step()
    np.testing.assert_allclose(mine.params["a"], a.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(mine.params["b"], b.detach().numpy(), rtol=1e-6)
