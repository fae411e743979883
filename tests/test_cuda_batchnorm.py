"""BatchNorm on CUDA against the reference and the CPU: in numba's simulator, or on a GPU with ``--gpu``.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_batchnorm.py
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from fastopt import reference
from fastopt.batchnorm import formulas
from fastopt.kernels import get_backend

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"

# One and several channels a tile, the last one not full; one and several slices; lanes along the samples and inside.
LAYOUTS = {
    "two values": ((2, 1), 1),
    "N,C": ((8, 3), 1),
    "N,C prime": ((37, 5), 1),
    "N,C wide": ((5, 37), 1),
    "N,C long": ((83, 2), 1),
    "1x1": ((2, 5, 1, 1), 1),
    "L of 2": ((11, 3, 2), 1),
    "L of 5": ((7, 3, 5), 1),
    "7x7": ((3, 2, 7, 7), 1),
    "one sample": ((1, 1, 9, 15), 1),
    "channels last": ((5, 5, 2, 7), -1),
    "channels last, one": ((97, 1), -1),
}
if not SIMULATED:
    LAYOUTS |= {
        "large": ((64, 8, 56, 56), 1),
        "deep": ((32, 513, 7, 7), 1),
        "wide": ((4099, 515), 1),
        "one channel": ((1_000_003, 1), 1),
        "large, last": ((16, 29, 31, 67), -1),
    }
every_layout = pytest.mark.parametrize(("shape", "axis"), [pytest.param(*v, id=k) for k, v in LAYOUTS.items()])
FLAGS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu", default=False):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


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


def kernel_of(dtype: Any, relu: bool, residual: bool, backend: str = "cuda") -> Any:
    return get_backend(backend).batchnorm(formulas, np.dtype(dtype), relu=relu, residual=residual)


def fresh(relu: bool = False, residual: bool = False, dtype: Any = np.float32) -> Any:
    """One whose kernels are bound anew."""
    from fastopt.kernels.cuda.batchnorm import BatchNormCUDA

    flags = {"RELU": relu, "RESIDUAL": residual}
    return BatchNormCUDA(get_backend("cuda"), formulas, np.dtype(dtype), flags, {})


def view(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    if axis == -1:
        return int(np.prod(shape[:-1])), shape[-1], 1
    return shape[0], shape[1], int(np.prod(shape[2:]))


def ours(
    arrays: dict[str, np.ndarray | None],
    *,
    axis: int,
    relu: bool = False,
    residual: bool = False,
    training: bool = True,
    backend: str = "cuda",
    kernel: Any = None,
    eps: float = 1e-5,
    weight: float | None = 0.1,
    count: Any = None,
    y_over: str | None = None,
    dx_over: str | None = None,
    backward: bool = True,
) -> dict[str, np.ndarray | None]:
    """All that a forward and a backward pass leave, as NumPy arrays."""
    place = get_backend(backend)

    def upload(array: np.ndarray) -> Any:
        mine = place.zeros(array.size, array.dtype)
        place.copy(mine, array.reshape(-1))
        return mine

    x = arrays["x"]
    assert x is not None
    a = {name: None if array is None else upload(array) for name, array in arrays.items()}
    kernel = kernel_of(x.dtype, relu, residual, backend) if kernel is None else kernel
    channels = x.shape[axis]
    shape = view(x.shape, axis)
    y = a[y_over] if y_over else upload(np.full(x.size, np.nan, x.dtype))
    extra = a["residual"] if residual else None
    saved = kernel.forward(
        shape,
        a["x"],
        extra,
        y,
        (a["gamma"], a["beta"], a["running_mean"], a["running_var"]),
        training=training,
        eps=eps,
        weight=weight,
        count=count,
    )
    mean, inv_std = kernel.statistics(saved, channels)
    found = {"y": y, "running_mean": a["running_mean"], "running_var": a["running_var"], "mean": mean}
    found = {name: None if array is None else place.host(array).copy() for name, array in found.items()}
    found["inv_std"] = place.host(inv_std).copy()
    if backward:
        a["y"] = y
        dx = a[dx_over] if dx_over else upload(np.full(x.size, np.nan, x.dtype))
        other = upload(np.full(x.size, np.nan, x.dtype)) if relu and residual else None
        dgamma, dbeta = (upload(np.full(channels, np.nan, x.dtype)) for _ in range(2))
        kernel.backward(
            shape,
            a["x"],
            a["dy"],
            y if relu and residual else None,
            (dx, other),
            (dgamma, dbeta),
            saved,
            training=training,
        )
        found |= {"dx": place.host(dx), "dgamma": place.host(dgamma), "dbeta": place.host(dbeta)}
        found["dresidual"] = None if other is None else place.host(other)
    return {
        name: array.reshape(x.shape) if array is not None and name in ("y", "dx", "dresidual") else array
        for name, array in found.items()
    }


def theirs(
    arrays: dict[str, np.ndarray], *, axis: int, relu: bool = False, residual: bool = False, training: bool = True
) -> dict[str, np.ndarray]:
    """The same from the reference, in float64."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    dy, extra = a.pop("dy"), a.pop("residual")
    y, cache = reference.batchnorm_forward(
        **a, axis=axis, activation="relu" if relu else None, residual=extra if residual else None, training=training
    )
    grads = reference.batchnorm_backward(dy, cache)
    if not (relu and residual):
        del grads["dresidual"]
    statistics = {name: a[name] for name in ("running_mean", "running_var")}
    return {"y": y, **statistics, "mean": cache["mean"], "inv_std": cache["inv_std"], **grads}


def assert_close(found: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    """Each array within rtol of its own largest number: a sum or difference of such numbers can be as wrong as that."""
    for name, array in expected.items():
        scale = float(np.abs(array).max(initial=0.0))
        scale = max(1.0, scale) if name in ("y", "dx") else scale
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * scale, err_msg=name)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "relu", "residual"),
    [(name, *flags) for name in LAYOUTS for flags in (FLAGS if name in ("N,C prime", "7x7") else FLAGS[-1:])],
)
def test_float64_is_the_reference_to_1e_10(name, relu, residual):
    shape, axis = LAYOUTS[name]
    arrays = case(shape, axis)
    options = {"axis": axis, "relu": relu, "residual": residual}
    assert_close(ours(arrays, **options), theirs(arrays, **options), rtol=1e-10)


@every_layout
def test_float32_is_the_reference_to_its_rounding(shape, axis):
    arrays = case(shape, axis, np.float32)
    found = ours(arrays, axis=axis)
    for name, array in found.items():
        assert array is None or array.dtype == (np.float64 if name in ("mean", "inv_std") else np.float32)
    assert_close(found, theirs(arrays, axis=axis), rtol=1e-5)


@pytest.mark.parametrize(("relu", "residual"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", ["N,C", "7x7", "channels last"])
def test_inference_and_its_gradients_are_the_references(name, relu, residual):
    shape, axis = LAYOUTS[name]
    arrays = case(shape, axis)
    options = {"axis": axis, "relu": relu, "residual": residual, "training": False}
    found = ours(arrays, **options)
    assert_close(found, theirs(arrays, **options), rtol=1e-10)
    np.testing.assert_array_equal(found["running_mean"], arrays["running_mean"])
    np.testing.assert_array_equal(found["running_var"], arrays["running_var"])


@pytest.mark.parametrize("name", ["N,C prime", "L of 2", "7x7", "channels last"])
def test_float32_is_the_cpus(name):
    shape, axis = LAYOUTS[name]
    arrays = case(shape, axis, np.float32, seed=1)
    found, expected = (ours(arrays, axis=axis, relu=True, residual=True, backend=b) for b in ("cuda", "cpu"))
    assert found.keys() == expected.keys()
    for kind in (found, expected):
        np.testing.assert_array_equal(kind["dresidual"], np.where(kind["y"] > 0, arrays["dy"], 0))
    assert_close(found, expected, rtol=2e-6)


@pytest.mark.parametrize("absent", [("gamma", "beta"), ("gamma",), ("beta",), ("running_mean", "running_var")])
def test_what_is_none_is_1_or_0_or_nowhere(absent):
    arrays = case((9, 3, 4), 1)
    expected = {**arrays, "gamma": np.ones(3), "beta": np.zeros(3)}
    expected = {name: expected[name] if name in absent else array for name, array in arrays.items()}
    found = ours({name: None if name in absent else array for name, array in arrays.items()}, axis=1, relu=True)
    wanted = theirs(expected, axis=1, relu=True)
    assert_close(found, {name: array for name, array in wanted.items() if name not in absent}, rtol=1e-10)
    assert all(found[name] is None for name in absent if name.startswith("running"))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_nothing_is_normalised_to_nothing(shape):
    found = ours(case(shape, 1), axis=1, relu=True, training=False)
    for name in ("y", "dx"):
        assert found[name].shape == shape
    for name in ("dgamma", "dbeta"):
        np.testing.assert_array_equal(found[name], np.zeros(3))


# --- numerics ---------------------------------------------------------------------------------------------------------


def far_from_zero() -> np.ndarray:
    return np.random.default_rng(0).normal(1e4, 1.0, (1000, 2)).astype(np.float32)


def variance_error(x: np.ndarray, kernel: Any) -> float:
    """The largest relative error of the running variance after a batch whose weight is 1."""
    channels = x.shape[1]
    arrays = {"x": x, "gamma": None, "beta": None}
    running = {"running_mean": np.zeros(channels, x.dtype), "running_var": np.ones(channels, x.dtype)}
    found = ours({**arrays, **running}, axis=1, weight=1.0, kernel=kernel, backward=False)
    axes = tuple(k for k in range(x.ndim) if k != 1)
    exact = x.astype(np.float64).var(axes, ddof=1)
    return float(np.abs(found["running_var"] / exact - 1.0).max())


def test_the_variance_of_float32_data_far_from_zero():
    x = far_from_zero()
    assert variance_error(x, kernel_of(np.float32, False, False)) < 1e-6
    arrays = {**dict.fromkeys(("gamma", "beta", "running_mean", "running_var")), "x": x}
    found = ours(arrays, axis=1, backward=False)
    np.testing.assert_allclose(found["mean"], x.astype(np.float64).mean(0), rtol=1e-11)
    expected, _ = reference.batchnorm_forward(x.astype(np.float64))
    np.testing.assert_allclose(found["y"], expected, atol=1e-5)  # rounding the mean to float32 alone would be 5e-4


def with_outliers(outlier: float) -> np.ndarray:
    from fastopt.kernels.cuda.target import THREADS

    # The same numbers, so that roundings add up; and as many for each thread on a GPU, whose blocks have more threads:
    # four equal numbers add up exactly.
    x = np.full((31 * THREADS + 8, 1), 0.3, np.float32)
    x[0] = outlier  # the first value, which deviations are taken from
    return x


@pytest.mark.parametrize("outlier", [1e3, 1e6, -1e12])
def test_an_outlier_where_the_sums_start_costs_no_digits(outlier, monkeypatch):
    monkeypatch.setattr(
        "fastopt.kernels.cuda.batchnorm.MOST_TASKS", 1
    )  # the more values in a slice, the more it would cost
    assert variance_error(with_outliers(outlier), fresh()) < 1e-6


def test_data_of_size_1e30_stays_finite():
    arrays = case((24, 3), 1, np.float32, seed=2)
    small, large = (
        ours({**arrays, "x": arrays["x"] * np.float32(scale)}, axis=1, eps=1e-12, weight=1.0) for scale in (1.0, 1e30)
    )
    assert np.isfinite(large["running_mean"]).all()
    assert (large["running_var"] == np.finfo(np.float32).max).all()
    np.testing.assert_allclose(large["y"], small["y"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(large["dx"] * np.float32(1e30), small["dx"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.1, -1234.567, 1e30])
@pytest.mark.parametrize("name", ["N,C long", "7x7", "channels last"])
def test_a_constant_channel_gives_exactly_beta(name, value, dtype):
    shape, axis = LAYOUTS[name]
    arrays = {**case(shape, axis, dtype), "x": np.full(shape, value, dtype)}
    with np.errstate(over="ignore"):
        found = ours({**arrays, "running_mean": None, "running_var": None}, axis=axis, backward=False)
    along = [1] * len(shape)
    along[axis] = -1
    np.testing.assert_array_equal(found["y"], np.broadcast_to(arrays["beta"].reshape(along), shape))
    np.testing.assert_array_equal(found["mean"], arrays["x"].reshape(-1)[0])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_stays_in_its_channel_and_is_seen(bad, relu):
    arrays = case((20, 3, 4), 1, np.float32)
    arrays["x"][3, 1, 2] = bad
    found = ours(arrays, axis=1, relu=relu, backward=False)
    assert np.isnan(found["y"][:, 1]).all()
    assert np.isfinite(found["y"][:, [0, 2]]).all()


@every_layout
def test_a_batch_with_one_bad_value_is_not_recorded(shape, axis):
    device = get_backend("cuda")
    for dtype, bad in ((np.float32, np.nan), (np.float64, np.inf)):
        arrays = case(shape, axis, dtype)
        good = arrays["x"].copy()
        count = device.zeros(1, np.dtype(dtype))
        for at in (0, good.size - 1):
            arrays["x"] = good.copy()
            arrays["x"].reshape(-1)[at] = bad
            found = ours(arrays, axis=axis, backward=False, count=count, weight=None)
            assert np.isnan(found["y"]).any()
            for name in ("running_mean", "running_var"):
                np.testing.assert_array_equal(found[name], arrays[name])
        assert device.host(count)[0] == 0
        arrays["x"] = good
        found = ours(arrays, axis=axis, backward=False, count=count, weight=None)
        along = tuple(k for k in range(len(shape)) if k != axis % len(shape))
        np.testing.assert_allclose(found["running_mean"], good.mean(along), rtol=1e-4, atol=1e-5)
        assert device.host(count)[0] == 1


@pytest.mark.parametrize("name", ["N,C long", "7x7", "channels last", *list(LAYOUTS)[12:]])
def test_the_mask_of_the_gradients_is_that_of_y(name):
    shape, axis = LAYOUTS[name]
    arrays = case(shape, axis, np.float32, seed=4)
    arrays["dy"][...] = 1.0
    found = ours(arrays, axis=axis, relu=True)
    axes = tuple(k for k in range(len(shape)) if k != axis % len(shape))
    np.testing.assert_array_equal(found["dbeta"], np.count_nonzero(found["y"] > 0, axis=axes))


# --- blocks and memory ------------------------------------------------------------------------------------------------


def visits(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """How often every element is visited, and by which channel: what the loops of the sums and the map do."""
    from fastopt.kernels.cuda.batchnorm import advance, locate, plan

    cut = plan(*shape)
    seen, channels = np.zeros((2, np.prod(shape)), np.int64)
    assert cut.tile_channels * cut.threads == len(
        {(t % cut.tile_channels, t // cut.tile_channels) for t in range(cut.tile_channels * cut.threads)}
    )
    for task in range(cut.tiles * cut.slices):
        first = task // cut.tiles * cut.length
        last = min(first + cut.length, cut.values)
        assert first < last
        for thread in range(cut.tile_channels * cut.threads):
            channel = task % cut.tiles * cut.tile_channels + thread % cut.tile_channels
            number = first + thread // cut.tile_channels
            at, inside = locate(cut, number, channel)
            while channel < cut.channels and number < last:
                seen[at] += 1
                channels[at] = channel
                number += cut.threads
                at, inside = advance(cut, at, inside)
    return seen, channels


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 60),
    channels=st.integers(1, 40),
    spatial=st.integers(1, 400),
    constants=st.sampled_from([(32, 4, 8, 1), (256, 32, 1024, 8), (64, 8, 20, 2)]),
)
def test_every_element_is_visited_once_under_its_channel(samples, channels, spatial, constants):
    if samples * channels * spatial > 20_000:
        samples = max(1, 20_000 // (channels * spatial))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("THREADS", "COALESCED", "MOST_TASKS", "LEAST_VALUES"), constants, strict=True):
            patch.setattr(f"fastopt.kernels.cuda.batchnorm.{name}", value)
        seen, found = visits((samples, channels, spatial))
    assert (seen == 1).all()
    expected = np.broadcast_to(np.arange(channels)[None, :, None], (samples, channels, spatial)).reshape(-1)
    np.testing.assert_array_equal(found, expected)


def test_statistics_that_were_read_are_not_written_by_the_next_pass():
    place = get_backend("cuda")
    x = place.adopt(case((8, 3), 1)["x"])
    for _ in range(2):
        _, saved = fastopt.batchnorm_forward(x)
        mean, inv_std = saved.mean, saved.inv_std
        expected = place.host(mean).tolist(), place.host(inv_std).tolist()
        del saved
        fastopt.batchnorm_forward(x * 3.0)
        assert (place.host(mean).tolist(), place.host(inv_std).tolist()) == expected


def test_a_twin_serves_another_backward_pass():
    place = get_backend("cuda")
    arrays = {name: place.adopt(array) for name, array in case((8, 3), 1).items()}
    _, saved = fastopt.batchnorm_forward(arrays["x"], arrays["gamma"])
    twin = saved.twin()
    found = [fastopt.batchnorm_backward(arrays["dy"], each) for each in (saved, twin)]
    for first, second in zip(found[0][:2], found[1][:2], strict=True):
        assert place.host(first).tobytes() == place.host(second).tobytes()


def test_layouts_have_several_slices_and_tiles_that_are_not_full():
    from fastopt.kernels.cuda.batchnorm import plan

    cuts = [plan(*view(shape, axis)) for shape, axis in LAYOUTS.values()]
    assert any(cut.slices > 1 and cut.tile_channels > 1 for cut in cuts)
    assert any(cut.slices > 1 and cut.tile_channels == 1 for cut in cuts)
    assert any(cut.slices * cut.length > cut.values and cut.slices > 1 for cut in cuts)
    assert any(cut.tiles > 1 and cut.channels % cut.tile_channels for cut in cuts)


@pytest.mark.parametrize("name", ["N,C long", "L of 5"])
def test_any_number_of_blocks_at_once_gives_the_same_bits(name, monkeypatch):
    shape, axis = LAYOUTS[name]
    results = []
    for blocks in (1, 4, 4):
        monkeypatch.setattr(get_backend("cuda"), "_most_blocks", blocks)
        found = ours(case(shape, axis, np.float32), axis=axis, relu=True, residual=True)
        results.append({name: array.tobytes() for name, array in found.items()})
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("training", [False, True])
def test_y_may_be_written_over_what_was_read(training):
    shape, axis = LAYOUTS["L of 5"]
    options = {"axis": axis, "relu": True, "residual": True, "training": training, "backward": False}
    expected = ours(case(shape, axis), **options)
    for target in ("residual",) if training else ("residual", "x"):
        np.testing.assert_array_equal(ours(case(shape, axis), **options, y_over=target)["y"], expected["y"])


@pytest.mark.parametrize("target", ["x", "dy", "y"])
def test_dx_may_be_written_over_what_was_read(target):
    shape, axis = LAYOUTS["L of 5"]
    options = {"axis": axis, "relu": True, "residual": True}
    expected = ours(case(shape, axis), **options)
    found = ours(case(shape, axis), **options, dx_over=target)
    for key in ("y", "dx", "dgamma", "dbeta", "dresidual"):
        np.testing.assert_array_equal(found[key], expected[key])


# --- planted faults: the tests above would see them -------------------------------------------------------------------


def without_the_distance_of_the_means(n, mean, squares, more, more_mean, more_squares):
    if more == 0.0:
        return n, mean, squares
    return n + more, mean + (more_mean - mean) * (more / (n + more)), squares + more_squares


def test_faults_are_found(monkeypatch):
    assert variance_error(far_from_zero(), fresh()) < 1e-6
    with monkeypatch.context() as patch:
        patch.setattr("fastopt.kernels.cuda.batchnorm.MOST_TASKS", 1)
        patch.setattr("fastopt.batchnorm.formulas.GUARD", np.inf)
        assert variance_error(with_outliers(1e6), fresh()) > 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(
            "fastopt.kernels.cuda.batchnorm.LEAST_VALUES", 1
        )  # so that there are several slices on a GPU, too
        patch.setattr("fastopt.batchnorm.formulas.merge_moments", without_the_distance_of_the_means)
        assert variance_error(far_from_zero(), fresh()) > 1e-5


# --- the public functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
def test_the_layer_on_the_device_is_the_layer_on_the_cpu(axis):
    rng = np.random.default_rng(11)
    shape = (4, 3, 5) if axis == 1 else (4, 5, 3)
    device = get_backend("cuda")
    layers = {name: fastopt.BatchNorm(3, axis=axis, activation="relu", backend=name) for name in ("cuda", "cpu")}
    tree = {"W": np.ones((2, 3), np.float32)}
    opts = {}
    for name, bn in layers.items():
        opts[name] = fastopt.SGD({**tree, "bn": bn.state}, lr=0.1, backend=name)
        bn.attach(opts[name].params["bn"], opts[name].grads["bn"])
    for _ in range(2):
        x, residual, dy = rng.normal(size=(3, *shape)).astype(np.float32)
        there = [device.adopt(array) for array in (x, residual, dy)]
        y = layers["cuda"].forward(there[0], residual=there[1])
        expected = layers["cpu"].forward(x, residual=residual)
        np.testing.assert_allclose(device.host(y), expected, rtol=2e-6, atol=2e-6)
        dx, dresidual = layers["cuda"].backward(there[2])
        expected_dx, expected_dresidual = layers["cpu"].backward(dy)
        np.testing.assert_allclose(device.host(dx), expected_dx, rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(device.host(dresidual), expected_dresidual)
        for opt in opts.values():
            opt.step()
    for key, expected in opts["cpu"].params["bn"].items():
        np.testing.assert_allclose(device.host(opts["cuda"].params["bn"][key]), expected, rtol=1e-5, atol=1e-6)
    x = rng.normal(size=shape).astype(np.float32)
    y = layers["cuda"].forward(device.adopt(x), training=False)
    np.testing.assert_allclose(device.host(y), layers["cpu"].forward(x, training=False), rtol=1e-5, atol=1e-6)
    saved = layers["cuda"].state_dict()
    assert type(saved["running_mean"]) is np.ndarray
    layers["cuda"].load_state_dict(saved)
    weight = np.ones((2, 3), np.float32)
    for found, expected in zip(
        fastopt.fold_batchnorm(weight, None, layers["cuda"]),
        fastopt.fold_batchnorm(weight, None, layers["cpu"]),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_layer_on_the_device_does_not_record_a_bad_batch(momentum):
    device = get_backend("cuda")
    layers = {name: fastopt.BatchNorm(3, momentum=momentum, backend=name) for name in ("cuda", "cpu")}
    for name, bn in layers.items():
        opt = fastopt.SGD({"bn": bn.state}, lr=0.1, backend=name)
        bn.attach(opt.params["bn"], opt.grads["bn"])
    good, bad = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    bad[4, 1] = np.nan
    for x in (good, bad, 3 * good):
        layers["cuda"].forward(device.adopt(x))
        layers["cpu"].forward(x)
    assert layers["cuda"].num_batches_tracked == layers["cpu"].num_batches_tracked == 2
    for name in ("running_mean", "running_var"):
        found, expected = (layers[place].state_dict()[name] for place in ("cuda", "cpu"))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_gradients_of_an_attached_layer_are_accumulated():
    device = get_backend("cuda")
    bn = fastopt.BatchNorm(1, backend="cuda")
    opt = fastopt.SGD({"bn": bn.params}, lr=1.0, backend="cuda", max_norm=1e6)
    bn.attach(opt.params["bn"], opt.grads["bn"])
    for dbeta in (4.0, 40.0):
        bn.forward(device.adopt(np.array([[1.0], [2.0]], np.float32)))
        bn.backward(device.adopt(np.full((2, 1), dbeta / 2, np.float32)))
        opt.accumulate(opt.grads)
    opt.step(reduction="sum")
    np.testing.assert_allclose(device.host(opt.params["bn"]["beta"]), -44.0)


def test_arrays_of_two_places_are_refused():
    x = get_backend("cuda").adopt(np.ones((4, 3), np.float32))
    with pytest.raises(TypeError, match="gamma: must be an array of the device, as x is, or None, got ndarray"):
        fastopt.batchnorm_forward(x, np.ones(3, np.float32))
    with pytest.raises(TypeError, match="x: must be an array of the device"):
        fastopt.BatchNorm(3, backend="cuda").forward(np.ones((4, 3), np.float32))
