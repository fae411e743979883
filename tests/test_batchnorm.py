"""BatchNorm: parity with the reference and torch, gradients, numerics, threads, and life in an optimizer's buffer.

The file is also the script that one of its tests runs in a process of its own: ``python test_batchnorm.py drivers``
prints one JSON object a line.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import compiled, run

import fastopt
from fastopt import reference
from fastopt.batchnorm import BatchNorm, batchnorm_backward, batchnorm_forward, fold_batchnorm, functional
from fastopt.kernels import get_backend
from fastopt.kernels.cpu import batchnorm as cpu_batchnorm
from fastopt.kernels.cpu import batchnorm_tiles as tiles
from fastopt.kernels.driver import DRIVER

# Every way to cut an array: rows of whole samples and pieces of them, several channels side by side, one channel per
# tile over the samples and inside them; primes, one channel, one position, and the sizes beside a SIMD register.
LAYOUTS = {
    "two values": ((2, 1), 1),
    "N,C": ((8, 3), 1),
    "N,C prime": ((31, 17), 1),
    "N,C wide": ((37, 1601), 1),
    "N,C long": ((2003, 3), 1),
    "1x1": ((2, 5, 1, 1), 1),
    "N,C,L": ((7, 3, 15), 1),
    "L of 16": ((9, 2, 16), 1),
    "L of 17": ((9, 2, 17), 1),
    "7x7": ((40, 50, 7, 7), 1),
    "14x14": ((9, 13, 14, 14), 1),
    "3-D": ((3, 4, 3, 5, 7), 1),
    "maps": ((9, 4, 25, 29), 1),
    "large maps": ((19, 2, 41, 43), 1),
    "huge maps": ((2, 3, 71, 73), 1),
    "one sample": ((1, 2, 50, 101), 1),
    "channels last": ((6, 7, 8, 5), -1),
    "channels last, one": ((129, 1), -1),
    "channels last, long": ((5, 40, 33, 6), -1),
}
FLAGS = [(None, False), ("relu", False), (None, True), ("relu", True)]
every_layout = pytest.mark.parametrize(("shape", "axis"), [pytest.param(*v, id=k) for k, v in LAYOUTS.items()])
every_flag = pytest.mark.parametrize(("activation", "residual"), FLAGS)


def case(shape: tuple[int, ...], axis: int, dtype: Any = np.float64, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    arrays = {
        "x": rng.normal(2.0, 3.0, shape),
        "gamma": rng.normal(size=channels),
        "beta": rng.normal(size=channels),
        "running_mean": rng.normal(size=channels),
        "running_var": rng.uniform(0.5, 2.0, channels),
        "residual": rng.normal(size=shape),
        "dy": rng.normal(size=shape),
    }
    return {name: array.astype(dtype) for name, array in arrays.items()}


def both(
    arrays: dict[str, np.ndarray], *, axis: int, activation: str | None, residual: bool, training: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that a forward and a backward pass leave: ours, and the reference's on the same numbers in float64."""
    results = []
    for forward in (batchnorm_forward, reference.batchnorm_forward):
        kind = arrays["x"].dtype if forward is batchnorm_forward else np.float64
        a = {name: array.astype(kind) for name, array in arrays.items()}
        dy, extra = a.pop("dy"), a.pop("residual")
        y, saved = forward(
            **a, axis=axis, activation=activation, residual=extra if residual else None, training=training
        )
        found = {"y": y, "running_mean": a["running_mean"], "running_var": a["running_var"]}
        if forward is batchnorm_forward:
            grads = batchnorm_backward(dy, saved)._asdict()
        else:
            grads = reference.batchnorm_backward(dy, saved)
            grads["dresidual"] = grads["dresidual"] if residual else None
        results.append({**found, **grads})
    return results[0], results[1]


def assert_close(found: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    """Each array within rtol of its own largest number: a sum or difference of such numbers can be as wrong as that."""
    for name, array in expected.items():
        if array is None:
            assert found[name] is None
            continue
        scale = max(1.0, float(np.abs(array).max())) if name in ("y", "dx") else float(np.abs(array).max())
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * scale, err_msg=name)


# --- parity -----------------------------------------------------------------------------------------------------------


ALL_FLAGS_OF = ("two values", "N,C", "N,C wide", "channels last")
"""Layouts with every combination of flags; the others have none and both."""


@pytest.mark.parametrize(
    ("shape", "axis", "activation", "residual"),
    [
        pytest.param(*layout, activation, residual, id=f"{name}-{activation}-{residual}")
        for name, layout in LAYOUTS.items()
        for activation, residual in FLAGS
        if name in ALL_FLAGS_OF or bool(activation) == residual
    ],
)
def test_float64_is_the_reference_to_1e_10(shape, axis, activation, residual):
    ours, theirs = both(case(shape, axis), axis=axis, activation=activation, residual=residual)
    assert_close(ours, theirs, rtol=1e-10)


@every_layout
def test_float32_is_the_reference_to_its_rounding(shape, axis):
    ours, theirs = both(case(shape, axis, np.float32), axis=axis, activation=None, residual=False)
    assert all(array.dtype == np.float32 for array in ours.values() if array is not None)
    assert_close(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(("activation", "residual"), [(None, False), ("relu", True)])
@pytest.mark.parametrize("name", ["N,C", "7x7", "huge maps", "channels last"])
def test_inference_and_its_gradients_are_the_references(name, activation, residual):
    shape, axis = LAYOUTS[name]
    arrays = case(shape, axis)
    ours, theirs = both(arrays, axis=axis, activation=activation, residual=residual, training=False)
    assert_close(ours, theirs, rtol=1e-10)
    np.testing.assert_array_equal(ours["running_mean"], arrays["running_mean"])
    np.testing.assert_array_equal(ours["running_var"], arrays["running_var"])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple),
    axis=st.sampled_from([1, -1]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_the_references(shape, axis, seed):
    if int(np.prod(shape)) // shape[axis] < 2:
        shape = (2, *shape[1:]) if axis == 1 or len(shape) > 2 else (2, shape[1])
    ours, theirs = both(case(shape, axis, seed=seed), axis=axis, activation="relu", residual=False)
    assert_close(ours, theirs, rtol=1e-9)


@every_flag
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((2, 2, 3), 1), ((2, 2, 1, 2), 1), ((3, 2, 2), -1)])
def test_gradients_are_central_differences(shape, axis, training, activation, residual):
    arrays = case(shape, axis, seed=3)
    dy = arrays.pop("dy")
    if not residual:
        del arrays["residual"]

    def forward(changed):
        a = {name: array.copy() for name, array in {**arrays, **changed}.items()}
        return batchnorm_forward(**a, axis=axis, activation=activation, training=training)

    _, saved = forward({})
    grads = batchnorm_backward(dy, saved)._asdict()
    for name in ("x", "gamma", "beta", *(["residual"] if residual else [])):
        expected = np.empty(arrays[name].shape)
        for index in np.ndindex(expected.shape):
            losses = []
            for step in (1e-6, -1e-6):
                moved = arrays[name].copy()
                moved[index] += step
                losses.append(float((forward({name: moved})[0] * dy).sum()))
            expected[index] = (losses[0] - losses[1]) / 2e-6
        np.testing.assert_allclose(grads["d" + name], expected, rtol=1e-6, atol=1e-7, err_msg=name)


TORCH = [
    pytest.param(shape, axis, activation, residual, dtype, id=f"{name}-{activation}-{residual}-{dtype.__name__}")
    for name, dtype, (activation, residual) in (
        ("N,C", np.float32, (None, False)),
        ("7x7", np.float32, (None, False)),
        ("14x14", np.float32, ("relu", True)),
        ("maps", np.float32, (None, False)),
        ("channels last", np.float32, (None, False)),
        ("huge maps", np.float64, ("relu", False)),
        ("N,C,L", np.float64, (None, True)),
    )
    for shape, axis in [LAYOUTS[name]]
]


@pytest.mark.parametrize(("shape", "axis", "activation", "residual", "dtype"), TORCH)
def test_ten_batches_are_torchs(shape, axis, activation, residual, dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed: it is the oracle of this test")
    rng = np.random.default_rng(5)
    channels = shape[axis]
    rtol = 2e-5 if dtype == np.float32 else 1e-10
    ours = BatchNorm(channels, momentum=0.3, axis=axis, activation=activation, dtype=dtype)
    theirs = torch.nn.BatchNorm1d(channels, momentum=0.3, dtype=getattr(torch, np.dtype(dtype).name))
    for name, param in (("gamma", theirs.weight), ("beta", theirs.bias)):
        ours.params[name][:] = rng.normal(size=channels)
        param.data.copy_(torch.from_numpy(ours.params[name]))

    def theirs_of(x: Any, extra: Any) -> Any:
        flat = x.movedim(axis, 1).reshape(x.shape[0], channels, -1) if axis == 1 else x.reshape(-1, channels)
        y = theirs(flat).reshape(x.movedim(axis, 1).shape if axis == 1 else x.shape)
        y = y if extra is None else y + extra
        return torch.relu(y) if activation else y

    for batch in range(10):
        x, dy, more = (rng.normal(1.0, 2.0, shape).astype(dtype) for _ in range(3))
        tx, tr = (torch.from_numpy(array.copy()).requires_grad_() for array in (x, more))
        y = theirs_of(tx, tr if residual else None)
        theirs.zero_grad()
        y.backward(torch.from_numpy(dy))
        ours_y = ours.forward(x, residual=more if residual else None)
        # A y of a rounding error on either side of 0 lets dy through on one side only: leave it out of the comparison.
        assert np.count_nonzero((ours_y > 0) != (y.detach().numpy() > 0)) == 0
        dx = ours.backward(dy)
        dx, dresidual = dx if residual else (dx, None)
        found = {"y": ours_y, "dx": dx, "dgamma": ours.grads["gamma"], "dbeta": ours.grads["beta"]}
        expected = {
            "y": y.detach().numpy(),
            "dx": tx.grad.numpy(),
            "dgamma": theirs.weight.grad.numpy(),
            "dbeta": theirs.bias.grad.numpy(),
        }
        assert_close(found, expected, rtol)
        if residual:
            np.testing.assert_array_equal(dresidual, tr.grad.numpy())
        np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), rtol, rtol, err_msg=str(batch))
        np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), rtol, err_msg=str(batch))
    theirs.eval()
    with torch.no_grad():
        expected = theirs_of(torch.from_numpy(x), torch.from_numpy(more) if residual else None).numpy()
    found = ours.forward(x, training=False, residual=more if residual else None)
    assert_close({"y": found}, {"y": expected}, rtol)


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 2, 56, 56), (100_352, 2), (2048, 2, 7, 7), (2, 2, 224, 224)])
def test_the_variance_of_float32_data_far_from_zero(shape):
    x = np.random.default_rng(0).normal(1e4, 1.0, shape).astype(np.float32)
    axes = tuple(k for k in range(x.ndim) if k != 1)
    mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    y, saved = batchnorm_forward(x, None, None, mean, var, momentum=1.0)
    m = x.size // 2
    assert m == 100_352
    exact = x.astype(np.float64).var(axes)
    np.testing.assert_allclose(var, exact * m / (m - 1), rtol=1e-6)
    np.testing.assert_allclose(saved.mean, x.astype(np.float64).mean(axes), rtol=1e-11)
    expected, _ = reference.batchnorm_forward(x.astype(np.float64))
    np.testing.assert_allclose(y, expected, atol=1e-5)  # the rounding of the mean to float32 alone would be 5e-4


@pytest.mark.parametrize("shape", [(4096, 2), (64, 2, 8, 8), (2, 2, 45, 47)])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("mean", [1e4, -3e5])
def test_the_gradients_of_float32_data_far_from_zero(shape, activation, mean):
    """The mean has another float32 than its float64; what that changes in x - mean is made up for there too."""
    rng = np.random.default_rng(4)
    x = rng.normal(mean, 1.0, shape).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    gamma, beta = np.float32([1.5, -0.5]), np.float32([0.25, 0.5])
    _, saved = batchnorm_forward(x, gamma, beta, activation=activation)
    found = batchnorm_backward(dy, saved)
    exact = [array.astype(np.float64) for array in (x, gamma, beta)]
    _, cache = reference.batchnorm_forward(*exact, activation=activation)
    expected = reference.batchnorm_backward(dy.astype(np.float64), cache)
    m = x.size // 2
    for name, size in (("dx", 1), ("dgamma", m), ("dbeta", m)):
        np.testing.assert_allclose(getattr(found, name) / size, expected[name] / size, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(64, 3), (40, 30, 7, 7), (16, 2, 40, 40), (2, 1, 90, 90)])
@pytest.mark.parametrize("outlier", [1e3, 1e6, -1e12])
def test_an_outlier_where_the_sums_start_costs_no_digits(shape, outlier):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    x[0] = outlier  # the first sample, whose values are what deviations are taken from
    axes = tuple(k for k in range(x.ndim) if k != 1)
    _, saved = batchnorm_forward(x)
    np.testing.assert_allclose(saved.inv_std, 1 / np.sqrt(x.astype(np.float64).var(axes) + 1e-5), rtol=5e-6)


@pytest.mark.parametrize("shape", [(64, 3), (40, 30, 7, 7), (16, 2, 40, 40), (2, 1, 90, 90)])
def test_data_of_size_1e30_stays_finite(shape):
    unit = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    dy = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    results = []
    for scale in (1.0, 1e30):
        x = unit * np.float32(scale)
        mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
        y, saved = batchnorm_forward(x, None, None, mean, var, eps=1e-12)
        grads = batchnorm_backward(dy, saved)
        assert np.isfinite(mean).all()
        assert np.isfinite(var).all()
        results.append((y, grads.dx * np.float32(scale)))
    for small, large in zip(*results, strict=True):
        np.testing.assert_allclose(large, small, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 3e7, 1e30])
def test_a_constant_channel_gives_exactly_beta(value, dtype):
    for shape, axis in LAYOUTS.values():
        arrays = case(shape, axis, dtype)
        x = np.full(shape, value, dtype)
        y, saved = batchnorm_forward(x, arrays["gamma"], arrays["beta"], axis=axis)
        along = [1] * x.ndim
        along[axis] = -1
        np.testing.assert_array_equal(y, np.broadcast_to(arrays["beta"].reshape(along), shape))
        np.testing.assert_array_equal(saved.mean, x.reshape(-1)[0])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_not_a_number_stays_in_its_channel_and_is_seen(activation):
    x = np.random.default_rng(0).normal(size=(20, 3, 30)).astype(np.float32)
    x[3, 1, 7] = np.nan
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    y, _ = batchnorm_forward(x, None, None, mean, var, activation=activation)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()


@every_layout
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_with_one_bad_value_is_not_recorded(shape, axis, bad, dtype):
    a = case(shape, axis, dtype)
    for at in (0, a["x"].size // 2, a["x"].size - 1):
        x, mean, var = a["x"].copy(), a["running_mean"].copy(), a["running_var"].copy()
        x.reshape(-1)[at] = bad
        y, _ = batchnorm_forward(x, a["gamma"], a["beta"], mean, var, axis=axis)
        assert np.isnan(y).any()
        np.testing.assert_array_equal(mean, a["running_mean"])
        np.testing.assert_array_equal(var, a["running_var"])
    batchnorm_forward(a["x"], a["gamma"], a["beta"], mean, var, axis=axis)
    assert (mean != a["running_mean"]).all()
    assert (var != a["running_var"]).all()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("nonfinite", ["skip", "raise", "zero"])
def test_a_layer_in_an_optimizer_survives_a_bad_batch(nonfinite, momentum, tmp_path):
    def network() -> tuple[fastopt.Optimizer, BatchNorm]:
        bn = BatchNorm(3, momentum=momentum, dtype=np.float64)
        opt = fastopt.SGD({"W": np.ones((4, 3)), "bn": bn.state}, lr=0.1, nonfinite=nonfinite, ema=0.5)
        bn.attach(opt.params["bn"], opt.grads["bn"])
        return opt, bn

    def train(opt: fastopt.Optimizer, bn: BatchNorm, x: np.ndarray) -> None:
        opt.grads["W"][...] = x.T @ bn.backward(bn.forward(x @ opt.params["W"]) - 1)
        opt.step()

    opt, bn = network()
    rng = np.random.default_rng(0)
    for _ in range(2):
        train(opt, bn, rng.normal(size=(8, 4)))
    kept = bn.state_dict()
    bad = rng.normal(size=(8, 4))
    bad[5, 2] = np.nan
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError):
            train(opt, bn, bad)
    else:
        train(opt, bn, bad)
    assert bn.num_batches_tracked == 2
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(bn.state_dict()[name], kept[name])
        assert np.isfinite(opt.ema["bn"][name]).all()
    bn.load_state_dict(bn.state_dict())
    opt.save(tmp_path / "run.safetensors")
    other, twin = network()
    other.load(tmp_path / "run.safetensors")
    if momentum is None:
        assert twin.num_batches_tracked == 2
    good = rng.normal(size=(8, 4))
    for each, layer in ((opt, bn), (other, twin)):
        train(each, layer, good)
    np.testing.assert_array_equal(twin.running_var, bn.running_var)
    np.testing.assert_array_equal(other.flat.data, opt.flat.data)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_running_statistics_stay_finite_where_the_variance_does_not(dtype):
    mean, var = np.zeros(1, dtype), np.ones(1, dtype)
    largest = np.finfo(dtype).max
    batchnorm_forward(np.array([[largest / 8], [largest / 4]], dtype), None, None, mean, var, momentum=1.0)
    if dtype == np.float32:  # the statistics are float64
        np.testing.assert_allclose(mean, 3 / 16 * largest, rtol=1e-6)
        np.testing.assert_array_equal(var, largest)
    else:
        np.testing.assert_array_equal([mean[0], var[0]], [0.0, 1.0])


# --- tiles and threads ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(samples=st.integers(1, 300), channels=st.integers(1, 60), spatial=st.integers(1, 5000), across=st.booleans())
def test_tiles_hold_every_element_once_under_its_channel(samples, channels, spatial, across):
    if samples * channels * spatial > 2_000_000:
        samples = max(1, 2_000_000 // (channels * spatial))
    plan = tiles.plan(samples, channels, spatial, across=across)
    of = np.broadcast_to(np.arange(channels)[None, :, None], (samples, channels, spatial)).reshape(-1)
    seen = np.zeros(of.size, np.int8)
    in_block = len(plan.tiles) // len(plan.counts)
    for number, line in enumerate(plan.tiles):
        t = tiles.Tile(*line.tolist())
        assert 0 < t.rows <= tiles.MOST_ROWS
        assert 0 <= t.rest < t.width < 2 * tiles.TILE_SIZE
        if t.spatial >= tiles.LARGE_MAP:  # these are summed channel by channel, one sample a row
            assert (t.width, t.rest) == (t.channels * t.spatial, 0)
        columns = t.channel + np.arange(t.width) // t.spatial % t.channels
        for row in range(t.rows + 1):
            size = t.width if row < t.rows else t.rest
            first = t.start + row * t.stride
            seen[first : first + size] += 1
            assert (of[first : first + size] == columns[:size]).all()
        assert (t.rows * t.width + t.rest) // t.channels == plan.counts[number // in_block]
        if number % in_block:  # the blocks' tiles are of the same channels in the same order
            assert t.channel == plan.tiles[number - 1, 5] + plan.tiles[number - 1, 6]
        else:
            assert t.channel == 0
    assert (seen == 1).all()
    assert plan.counts.sum() == samples * spatial


LATER = [  # whether gamma and beta are given, activation, training, what y is written over, dtype
    (True, None, True, "new", np.float32),
    (False, None, True, "out", np.float32),
    (True, "relu", True, "new", np.float32),
    (True, "relu", True, "residual", np.float32),
    (True, None, True, "residual", np.float32),
    (True, None, False, "x", np.float32),
    (False, "relu", False, "x", np.float32),
    (True, "relu", False, "residual", np.float32),
    (True, "relu", True, "out", np.float64),
    (False, None, False, "new", np.float64),
]


@pytest.mark.parametrize(
    ("shape", "axis", "given", "activation", "training", "over", "dtype"),
    [
        *(((17, 33), 1, *later) for later in LATER),
        *(
            (shape, axis, *later)
            for shape, axis in (((5, 3, 4, 6), 1), ((3, 4, 20, 11), 1), ((4, 6, 5), -1))
            for later in (LATER[0], LATER[2], LATER[8], LATER[9])  # what is written over is checked for any shape alike
        ),
    ],
)
def test_a_later_pass_is_checked_by_compiled_code_and_has_the_same_bits(
    shape, axis, given, activation, training, over, dtype, monkeypatch
):
    def both_passes() -> list[np.ndarray]:
        arrays = case(shape, axis, dtype)
        dy, residual = arrays.pop("dy"), arrays.pop("residual")
        if not given:
            arrays["gamma"] = arrays["beta"] = None
        if over in ("residual", "out"):
            arrays["residual"] = residual
        out = {"new": None, "out": np.empty_like(residual), "residual": residual, "x": arrays["x"]}[over]
        y, saved = batchnorm_forward(**arrays, training=training, activation=activation, axis=axis, out=out)
        assert out is None or y is out
        found = [y, saved.mean, saved.inv_std, arrays["running_mean"], arrays["running_var"]]
        if over != "x":
            found += [grad for grad in batchnorm_backward(dy, saved) if grad is not None]
        return [array.copy() for array in found]

    functional.KINDS.clear()
    first = both_passes()
    monkeypatch.setattr(functional, "_check_x", None)
    monkeypatch.setattr(functional, "check_like", None)
    for _ in range(2):
        for array, expected in zip(both_passes(), first, strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 12, 13)])
@pytest.mark.parametrize("residual", [None, 0.0])
def test_a_relu_passes_no_gradient_where_y_is_zero(shape, residual):
    """As in a constant channel without a shift: y is exactly 0 there, and so is the derivative that everyone uses."""
    x = np.full(shape, 3.0, np.float32)
    given = None if residual is None else np.full(shape, residual, np.float32)
    ones, zeros = np.ones(5, np.float32), np.zeros(5, np.float32)
    y, saved = batchnorm_forward(x, ones, zeros, activation="relu", residual=given)
    assert not y.any()
    grads = batchnorm_backward(np.ones(shape, np.float32), saved)
    assert not grads.dx.any()
    assert not grads.dgamma.any()
    assert not grads.dbeta.any()
    assert grads.dresidual is None or not grads.dresidual.any()


def test_shapes_are_forgotten_one_day():
    """Their tables, too: a program may see thousands of shapes."""
    functional.KINDS.clear()
    for samples in range(2, 2 * functional.MOST_KINDS + 10):
        for _ in range(2):
            batchnorm_forward(np.ones((samples, 1), np.float32))
    assert len(functional.KINDS) <= functional.MOST_KINDS


DRIVERS = (("pool", 1), ("pool", 2), ("pool", 3), ("pool", 4), ("pool", 7), ("numba", 2), ("executor", 3))
SHARED = [((40, 50, 7, 7), 1), ((16, 3, 56, 56), 1), ((2, 3, 128, 128), 1), ((300, 1000), 1), ((9000, 11), -1)]
SHARED += [((37, 200, 7, 7), 1), ((21, 60, 18, 18), 1)]  # group by group of channels, all in one launch


def digest(shape: tuple[int, ...], axis: int) -> str:
    arrays = case(shape, axis, np.float32)
    dy, residual = arrays.pop("dy"), arrays.pop("residual")
    y, saved = batchnorm_forward(**arrays, residual=residual, activation="relu", axis=axis)
    grads = batchnorm_backward(dy, saved)
    found = hashlib.sha256(y)
    for array in (*grads, arrays["running_mean"], arrays["running_var"]):
        found.update(array)
    return found.hexdigest()


def report_drivers() -> None:
    for shape, axis in SHARED:
        for mode, threads in DRIVERS:
            DRIVER.choose(mode)
            fastopt.set_num_threads(threads)
            print(json.dumps({"key": [shape, axis], "how": [mode, threads], "digest": digest(shape, axis)}))


def test_every_driver_gives_the_same_bits():
    finished = run(__file__, "drivers", timeout=240, **compiled())
    assert finished.returncode == 0, finished.stderr
    found: dict[str, dict[str, list[Any]]] = {}
    for line in map(json.loads, finished.stdout.splitlines()):
        found.setdefault(str(line["key"]), {}).setdefault(line["digest"], []).append(line["how"])
    assert len(found) == len(SHARED)
    for key, digests in found.items():
        assert sum(map(len, digests.values())) == len(DRIVERS)
        assert len(digests) == 1, f"{key}: {digests}"


@pytest.mark.parametrize("shape", [(37, 200, 7, 7), (21, 60, 18, 18)])
def test_group_by_group_and_phase_by_phase_give_the_same_bits(shape, monkeypatch):
    together = digest(shape, 1)
    monkeypatch.setattr(cpu_batchnorm, "GROUP_SIZE", 0)
    assert digest(shape, 1) == together


@pytest.mark.parametrize("group_size", [0, cpu_batchnorm.GROUP_SIZE])
@pytest.mark.parametrize("shape", [(37, 200, 7, 7), (21, 60, 18, 18)])
def test_groups_that_wait_for_the_sums_in_float64_are_made_up_for_once(shape, group_size, monkeypatch):
    """In a few channels deviations are taken from an outlier; what is done for the others is not done again."""
    monkeypatch.setattr(cpu_batchnorm, "GROUP_SIZE", group_size)
    backend = get_backend("cpu")
    monkeypatch.setattr(backend, "_kernels", {})  # nothing in float64 has been called for yet
    a = case(shape, 1, np.float32)
    a["x"][0, [3, 4, 55]] = 1e6
    y, _ = batchnorm_forward(a["x"], a["gamma"], a["beta"], a["running_mean"], a["running_var"])
    b = {name: array.astype(np.float64) for name, array in case(shape, 1, np.float32).items()}
    b["x"][0, [3, 4, 55]] = 1e6
    expected, _ = reference.batchnorm_forward(b["x"], b["gamma"], b["beta"], b["running_mean"], b["running_var"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(a["running_mean"], b["running_mean"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a["running_var"], b["running_var"], rtol=1e-5)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["N,C", "7x7", "huge maps"])
def test_inference_in_place_and_into_the_residual(name):
    shape, axis = LAYOUTS[name]
    a = case(shape, axis)
    statistics = (a["gamma"], a["beta"], a["running_mean"], a["running_var"])
    expected, _ = batchnorm_forward(a["x"], *statistics, training=False, residual=a["residual"], activation="relu")
    for target in ("x", "residual"):
        x, residual = a["x"].copy(), a["residual"].copy()
        out = x if target == "x" else residual
        y, _ = batchnorm_forward(x, *statistics, training=False, residual=residual, activation="relu", out=out)
        assert y is out
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("name", "target", "activation", "residual"),
    [  # pairs of a loop, of what it writes over, and of flags
        ("N,C", "dy", None, False),
        ("N,C", "x", "relu", True),
        ("7x7", "dy", "relu", True),
        ("7x7", "x", None, False),
        ("huge maps", "dy", "relu", True),
        ("huge maps", "x", None, False),
        ("huge maps", "new", "relu", False),
    ],
)
def test_backward_may_overwrite_what_it_read(name, target, activation, residual):
    shape, axis = LAYOUTS[name]
    results = []
    for given_out in (False, True):
        a = case(shape, axis)
        extra = a["residual"] if residual else None
        y, saved = batchnorm_forward(
            a["x"], a["gamma"], a["beta"], residual=extra, activation=activation, out=extra if given_out else None
        )
        out = {"dy": a["dy"], "x": a["x"], "new": np.full(shape, np.nan)}[target] if given_out else None
        grads = batchnorm_backward(a["dy"], saved, out=out)
        assert out is None or grads.dx is out
        results.append([y, *(grad for grad in grads if grad is not None)])
    assert len(results[0]) == 4 + residual
    for alone, over in zip(*results, strict=True):
        np.testing.assert_array_equal(alone, over)


STRIDED = {
    "Fortran order": np.asfortranarray,
    "channels last in memory": lambda x: np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1),
    "every second row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "inside of padding": lambda x: np.pad(x, ((0, 0), (0, 0), (1, 1), (2, 2)))[:, :, 1:-1, 2:-2],
    "backwards": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
}


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("training", [True, False])
@every_flag
def test_strided_arrays_give_the_bits_of_their_copies(strided, training, activation, residual):
    arrays = case((6, 3, 4, 5), 1, np.float32)
    whole = {name: arrays[name] for name in ("x", "residual", "dy") if name != "residual" or residual}
    given = {name: strided(array) for name, array in whole.items()}
    assert not any(array.flags.c_contiguous for array in given.values())
    kept = {name: array.tobytes() for name, array in given.items()}
    found = []
    for some in (whole, given):
        bn = BatchNorm(3, activation=activation)
        for _ in range(2):  # the second pass is checked by compiled code
            y = bn.forward(some["x"], training, residual=some.get("residual"))
            grads = bn.backward(some["dy"])
        parts = [y, *(grads if residual else [grads]), bn.running_mean, bn.running_var, *bn.grads.values()]
        assert all(part.flags.c_contiguous for part in parts if part is not some["dy"])
        found.append([part.tobytes() for part in parts])
    assert found[0] == found[1]
    assert {name: array.tobytes() for name, array in given.items()} == kept


def test_a_strided_x_may_change_before_the_backward_pass_and_out_may_lie_beside_it():
    arrays = case((6, 3, 4, 5), 1, np.float32)
    whole = np.repeat(arrays["x"], 2, axis=0)
    y, saved = batchnorm_forward(arrays["x"])
    expected = batchnorm_backward(arrays["dy"], saved)
    out = np.empty_like(y)
    found, saved = batchnorm_forward(whole[::2], out=out)
    whole[...] = 0.0
    assert found is out
    assert found.tobytes() == y.tobytes()
    dx = np.empty_like(y)
    grads = batchnorm_backward(np.asfortranarray(arrays["dy"]), saved, out=dx)
    assert grads.dx is dx
    assert dx.tobytes() == expected.dx.tobytes()


def test_a_broadcast_gradient_is_copied():
    x = case((6, 3, 4, 5), 1, np.float32)["x"]
    y, saved = batchnorm_forward(x)
    twin = saved.twin()
    ones = batchnorm_backward(np.ones_like(y), twin)
    spread = batchnorm_backward(np.broadcast_to(np.float32(1.0), y.shape), saved)
    assert spread.dx.tobytes() == ones.dx.tobytes()


def test_inputs_are_not_written_to():
    a = case((9, 4, 25, 29), 1)
    copies = {name: array.copy() for name, array in a.items()}
    for name in ("x", "gamma", "beta", "residual", "dy"):
        a[name].flags.writeable = False
    _, saved = batchnorm_forward(
        a["x"], a["gamma"], a["beta"], a["running_mean"], a["running_var"], residual=a["residual"], activation="relu"
    )
    batchnorm_backward(a["dy"], saved)
    for name in ("x", "gamma", "beta", "residual", "dy"):
        np.testing.assert_array_equal(a[name], copies[name])


# --- the layer --------------------------------------------------------------------------------------------------------


def batches(count: int = 4, shape: tuple[int, ...] = (6, 3, 5), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(k, 1.0 + k, shape) for k in range(count)]


def test_momentum_none_averages_all_batches():
    bn = BatchNorm(3, momentum=None, dtype=np.float64)
    xs = batches()
    for x in xs:
        bn.forward(x)
        bn.forward(np.ones_like(x), training=False)  # which counts as no batch
    assert bn.num_batches_tracked == len(xs)
    np.testing.assert_allclose(bn.running_mean, np.mean([x.mean((0, 2)) for x in xs], 0), rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, np.mean([x.var((0, 2)) * 30 / 29 for x in xs], 0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_count_of_momentum_none_is_kept_with_the_parameters(dtype, tmp_path):
    def network() -> tuple[fastopt.Optimizer, BatchNorm]:
        bn = BatchNorm(3, momentum=None, dtype=dtype)
        opt = fastopt.SGD({"bn": bn.state}, lr=0.1)
        bn.attach(opt.params["bn"], opt.grads["bn"])
        return opt, bn

    opt, bn = network()
    assert set(opt.params["bn"]) == {"beta", "gamma", "running_count", "running_mean", "running_var"}
    first, second, third = (x.astype(dtype) for x in batches(3))
    for x in (first, second):
        bn.forward(x)
        bn.backward(np.ones_like(x))
        opt.step()
    opt.save(tmp_path / "run.safetensors")
    other, twin = network()
    other.load(tmp_path / "run.safetensors")
    assert twin.num_batches_tracked == bn.num_batches_tracked == 2
    for layer in (bn, twin):
        layer.forward(third)
        np.testing.assert_allclose(layer.running_mean, np.mean(batches(3), (0, 1, 3)), rtol=1e-6, atol=1e-6)
    assert "running_count" not in BatchNorm(3).state
    assert "running_count" not in BatchNorm(3, momentum=None, track_running_stats=False).state


@pytest.mark.parametrize("given", ["views", "copies", "tree"])
def test_the_gradients_of_an_attached_layer_are_accumulated(given):
    bn = BatchNorm(1, dtype=np.float64)
    opt = fastopt.SGD({"bn": bn.params}, lr=1.0)
    bn.attach(opt.params["bn"], opt.grads["bn"])
    for dbeta in (4.0, 40.0):
        bn.forward(np.array([[1.0], [2.0]]))
        bn.backward(np.full((2, 1), dbeta / 2))
        if given == "tree":
            opt.accumulate(opt.grads)
        else:
            opt.accumulate({"bn": {k: g if given == "views" else g.copy() for k, g in opt.grads["bn"].items()}})
    opt.step(reduction="sum")
    np.testing.assert_allclose(opt.params["bn"]["beta"], -44.0)


def test_the_count_may_be_set():
    bn = BatchNorm(3, momentum=None, dtype=np.float64)
    bn.num_batches_tracked = 3
    (x,) = batches(1)
    bn.forward(x)
    np.testing.assert_allclose(bn.running_mean, x.mean((0, 2)) / 4, rtol=1e-12)
    for bad in (-1, 1.0, True, "3"):
        with pytest.raises((TypeError, ValueError), match="num_batches_tracked: must be an int >= 0, got"):
            bn.num_batches_tracked = bad
    assert bn.num_batches_tracked == 4


def test_without_running_statistics_inference_uses_the_batchs():
    bn = BatchNorm(3, track_running_stats=False, dtype=np.float64)
    assert bn.running_mean is None
    assert bn.running_var is None
    for x in batches():
        np.testing.assert_array_equal(bn.forward(x, training=False), bn.forward(x))
    assert bn.num_batches_tracked == 0


def test_without_affine_there_is_nothing_to_train():
    bn = BatchNorm(3, affine=False, dtype=np.float64)
    assert bn.params == {}
    assert bn.grads == {}
    (x,) = batches(1)
    np.testing.assert_array_equal(bn.forward(x), batchnorm_forward(x)[0])
    expected = batchnorm_backward(np.ones_like(x), batchnorm_forward(x)[1])
    assert expected.dgamma is None
    assert expected.dbeta is None
    np.testing.assert_array_equal(bn.backward(np.ones_like(x)), expected.dx)


def test_gamma_without_beta():
    a = case((8, 3), 1)
    y, saved = batchnorm_forward(a["x"], a["gamma"])
    expected, cache = reference.batchnorm_forward(a["x"], a["gamma"])
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    grads = batchnorm_backward(a["dy"], saved)
    np.testing.assert_allclose(grads.dgamma, reference.batchnorm_backward(a["dy"], cache)["dgamma"], rtol=1e-12)
    assert grads.dbeta is None


def test_gamma_and_beta_train_in_the_optimizers_buffer():
    rng = np.random.default_rng(0)
    bn = BatchNorm(3, dtype=np.float64)
    opt = fastopt.SGD({"W": rng.normal(size=(4, 3)), "bn": bn.params}, lr=0.1)
    bn.attach(opt.params["bn"], opt.grads["bn"])
    assert np.shares_memory(bn.params["gamma"], opt.flat.data)
    assert np.shares_memory(bn.grads["beta"], opt.flat.grad)
    x, target = rng.normal(size=(64, 4)), rng.normal(3.0, 2.0, (64, 3))
    losses = []
    for _ in range(60):
        y = bn.forward(x @ opt.params["W"])
        losses.append(((y - target) ** 2).mean())
        dz = bn.backward(2 * (y - target) / len(x))
        opt.grads["W"][...] = x.T @ dz
        opt.step()
    assert losses[-1] < 0.5 * losses[0]
    assert np.abs(opt.params["bn"]["beta"] - target.mean(0)).max() < 0.1
    assert opt.params["bn"]["gamma"] is bn.params["gamma"]


def test_running_statistics_live_in_the_optimizers_buffer_and_are_saved_with_it(tmp_path):
    def network(seed: int) -> tuple[fastopt.Optimizer, BatchNorm]:
        bn = BatchNorm(3, dtype=np.float64)
        weight = np.random.default_rng(seed).normal(size=(4, 3))
        keep = {"*.running_*": {"weight_decay": 0.0}}
        opt = fastopt.SGD({"W": weight, "bn": bn.state}, lr=0.1, weight_decay=0.1, overrides=keep)
        bn.attach(opt.params["bn"], opt.grads["bn"])
        return opt, bn

    def train(opt: fastopt.Optimizer, bn: BatchNorm, seed: int) -> np.ndarray:
        x = np.random.default_rng(seed).normal(2.0, 3.0, (8, 4))
        z = x @ opt.params["W"]
        opt.grads["W"][...] = x.T @ bn.backward(bn.forward(z) - 1)
        opt.step()
        return z

    opt, bn = network(1)
    alone = BatchNorm(3, dtype=np.float64)
    for seed in range(3):
        alone.forward(train(opt, bn, seed))
        np.testing.assert_array_equal(bn.running_mean, alone.running_mean)  # the steps have left them alone
        np.testing.assert_array_equal(bn.running_var, alone.running_var)
    assert opt.flat.paths == ("W", "bn.beta", "bn.gamma", "bn.running_mean", "bn.running_var")
    assert not opt.grads["bn"]["running_mean"].any()
    assert not opt.grads["bn"]["running_var"].any()
    assert set(bn.params) == set(bn.grads) == {"gamma", "beta"}

    opt.save(tmp_path / "x")
    other, other_bn = network(2)
    other.load(tmp_path / "x")
    for seed in (3, 4):
        train(opt, bn, seed)
        train(other, other_bn, seed)
    np.testing.assert_array_equal(other.flat.data, opt.flat.data)
    np.testing.assert_array_equal(other_bn.running_var, bn.running_var)


def test_a_step_between_forward_and_backward_does_not_change_the_gradients():
    a = case((8, 3), 1)
    results = []
    for meddle in (False, True):
        gamma, beta = a["gamma"].copy(), a["beta"].copy()
        _, saved = batchnorm_forward(a["x"], gamma, beta, activation="relu")
        if meddle:
            gamma += 1.0
            beta -= 1.0
        results.append(batchnorm_backward(a["dy"], saved))
    for left, right in zip(*(grads[:3] for grads in results), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3), None), ((3, 4, 2, 2), None), ((2, 2, 4, 3), -1)])
def test_a_folded_layer_does_what_the_two_did(shape, axis, bias):
    rng = np.random.default_rng(1)
    weight, b = rng.normal(size=shape), rng.normal(size=3) if bias else None
    bn = BatchNorm(3, dtype=np.float64)
    for x in batches():
        bn.forward(x)
    for param in bn.params.values():
        param[:] = rng.normal(size=3)
    folded, shift = fold_batchnorm(weight, b, bn, axis=axis)
    assert folded.dtype == shift.dtype == np.float64
    # One output position of any such layer is a dense layer on the inputs it sees.
    out = len(shape) - 1 if axis == -1 or len(shape) == 2 else 0
    flat, flat_folded = (np.moveaxis(w, out, -1).reshape(-1, 3) for w in (weight, folded))
    x = rng.normal(size=(10, flat.shape[0]))
    expected = bn.forward(x @ flat + (0.0 if b is None else b), training=False)
    np.testing.assert_allclose(x @ flat_folded + shift, expected, rtol=1e-12, atol=1e-12)


# The layer by torch's name, its options, and the axis that fold_batchnorm needs.
FOLDED = {
    "Linear": ("Linear", (6, 6), {}, {"axis": 0}),
    "conv": ("Conv2d", (3, 6, (3, 2)), {}, {}),
    "square conv": ("Conv1d", (6, 6, 3), {}, {"axis": 0}),
    "grouped": ("Conv2d", (4, 6, 3), {"groups": 2}, {}),
    "grouped, told": ("Conv1d", (6, 6, 2), {"groups": 2}, {"groups": 2, "axis": 0}),
    "depthwise": ("Conv1d", (6, 6, 3), {"groups": 6}, {}),
    "transposed": ("ConvTranspose2d", (4, 6, 3), {}, {"axis": 1}),
    "square transposed": ("ConvTranspose1d", (6, 6, 4), {}, {"axis": 1}),
    "transposed, grouped": ("ConvTranspose2d", (4, 6, 3), {"groups": 2}, {"axis": 1, "groups": 2}),
    "square transposed, grouped": ("ConvTranspose1d", (6, 6, 2), {"groups": 3}, {"axis": -2, "groups": 3}),
    "transposed, depthwise": ("ConvTranspose1d", (6, 6, 4), {"groups": 6}, {"axis": 1, "groups": 6}),
}


@pytest.mark.parametrize(("kind", "sizes", "options", "told"), FOLDED.values(), ids=FOLDED)
def test_every_layer_of_torch_is_folded(kind, sizes, options, told):
    torch = pytest.importorskip("torch", reason="torch is not installed: it is the oracle of this test")
    layer = getattr(torch.nn, kind)(*sizes, **options).double()
    shape = (2, sizes[0], 5, 6, 7)[: layer.weight.ndim if "onv" in kind else 2]
    rng = np.random.default_rng(0)
    bn = BatchNorm(6, dtype=np.float64)
    x = torch.from_numpy(rng.normal(size=shape))
    with torch.no_grad():
        y = layer(x).numpy()
        bn.forward(np.ascontiguousarray(y))
        for param in bn.params.values():
            param[:] = rng.normal(size=6)
        expected = bn.forward(np.ascontiguousarray(y), training=False)
        weight, bias = fold_batchnorm(layer.weight.numpy(), layer.bias.numpy(), bn, **told)
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
        np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_a_depthwise_kernel_of_keras_is_folded():
    rng = np.random.default_rng(0)
    bn = BatchNorm(6, dtype=np.float64)
    bn.running_var[:] = rng.uniform(1.0, 2.0, 6)
    kernel = rng.normal(size=(3, 4, 2, 3))  # two channels, three outputs of each
    found, _ = fold_batchnorm(kernel, None, bn, axis=-1, groups=2)
    expected, _ = fold_batchnorm(kernel.transpose(2, 3, 0, 1).reshape(6, 1, 3, 4), None, bn)
    np.testing.assert_array_equal(found.transpose(2, 3, 0, 1).reshape(6, 1, 3, 4), expected)


@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 3), 1), ((3, 3, 5), 1), ((3, 8, 3), 1), ((3, 5, 5, 3), 1), ((6, 2, 5), 3)], ids=str
)
def test_an_axis_that_is_not_certain_must_be_given(shape, groups):
    channels = 6 if groups > 1 else 3
    bn = BatchNorm(channels)
    weight = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=r"axis: must be given for a weight of shape \(.*\), whose axes \d and"):
        fold_batchnorm(weight, None, bn, groups=groups)
    fold_batchnorm(weight, None, bn, axis=0, groups=groups)
    fold_batchnorm(np.ones((1, 1), np.float32), None, BatchNorm(1))  # the same along either axis


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_are_no_statistics_are_refused(name, bad):
    bn = BatchNorm(3)
    getattr(bn, name)[1] = bad
    calls = (
        lambda: fold_batchnorm(np.ones((4, 3), np.float32), None, bn),
        lambda: bn.forward(np.ones((4, 3), np.float32), training=False),
    )
    for call in calls:
        if name == "running_mean" and bad == -0.5:
            call()
            continue
        with pytest.raises(ValueError, match=rf"{name}: must be (finite|>= 0), got {bad}"):
            call()


def test_state_goes_from_one_layer_to_another():
    bn, other = BatchNorm(3, momentum=None, dtype=np.float64), BatchNorm(3, momentum=None, dtype=np.float64)
    first, *rest = batches()
    bn.forward(first)
    state = bn.state_dict()
    other.load_state_dict(state)
    for x in rest:
        np.testing.assert_array_equal(bn.forward(x), other.forward(x))
    np.testing.assert_array_equal(bn.running_var, other.running_var)
    assert other.num_batches_tracked == len(rest) + 1
    assert state["num_batches_tracked"] == 1  # a copy, not the layer's own arrays
    np.testing.assert_allclose(state["running_mean"], first.mean((0, 2)), rtol=1e-12)
    assert "4 batches seen" in repr(other)


if __name__ == "__main__" and sys.argv[1:] == ["drivers"]:
    report_drivers()


def test_calling_a_layer_is_its_forward_pass():
    x, residual = (np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32) for seed in (0, 1))
    called, passed = (BatchNorm(3, activation="relu") for _ in range(2))
    for training in (True, False):
        y = called(x, training, residual=residual)
        assert y.tobytes() == passed.forward(x, training=training, residual=residual).tobytes()
    assert called.running_mean.tobytes() == passed.running_mean.tobytes()
