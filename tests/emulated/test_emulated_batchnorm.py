"""BatchNorm's kernels, as a GPU gets them, against the reference, in both layouts, both ways."""

from __future__ import annotations

from typing import Any

import emulator  # noqa: F401 skips this file where it cannot work
import numpy as np
import pytest

import fastopt
from fastopt import reference
from fastopt.kernels.cuda.batchnorm import plan

LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "two values": ((2, 1), 1),
    "N,C": ((33, 5), 1),
    "N,C wide": ((5, 37), 1),
    "N,C long": ((4099, 3), 1),
    "one sample": ((1, 2, 1000), 1),
    "4097": ((1, 1, 4097), 1),
    "N,C,H,W": ((3, 5, 7, 7), 1),
    "N,C,H,W large": ((5, 3, 31, 33), 1),
    "channels last": ((5, 7, 3, 33), -1),
    "channels last, large": ((4, 33, 31, 3), -1),
}
MODES = {"forwards": (False, False), "backwards": (False, True), "contracted": (True, False)}
TOLERANCES = {np.float32: 1e-5, np.float64: 1e-10}
"""Those of tests/test_cuda_batchnorm.py, relative to the largest number of an array."""


def made(shape: tuple[int, ...], axis: int, dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
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


def on_device(
    backend: Any, arrays: dict[str, np.ndarray], axis: int, relu: bool, *, training: bool = True, over: bool = False
) -> dict[str, np.ndarray]:
    """All that both passes leave. With relu there is a residual, too.

    over : y is written over the residual, and dx over dy.
    """
    a = {name: backend.adopt(array) for name, array in arrays.items()}
    dy, residual = a.pop("dy"), a.pop("residual")
    options = {"activation": "relu", "residual": residual} if relu else {}
    out, dx = (residual if relu else None, dy) if over else (None, None)
    y, saved = fastopt.batchnorm_forward(**a, **options, axis=axis, training=training, out=out)
    found = {"y": y, "running_mean": a["running_mean"], "running_var": a["running_var"]}
    found |= {"mean": saved.mean, "inv_std": saved.inv_std}
    found = {name: backend.host(array) for name, array in found.items()}  # before anything is written over
    grads = fastopt.batchnorm_backward(dy, saved, out=dx)._asdict()
    return {**found, **{name: backend.host(array) for name, array in grads.items() if array is not None}}


def expected_of(arrays: dict[str, np.ndarray], axis: int, relu: bool, training: bool = True) -> dict[str, np.ndarray]:
    """The same from the reference, in float64."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    dy, residual = a.pop("dy"), a.pop("residual")
    options = {"activation": "relu", "residual": residual} if relu else {}
    y, cache = reference.batchnorm_forward(**a, **options, axis=axis, training=training)
    grads = reference.batchnorm_backward(dy, cache)
    if not relu:
        grads.pop("dresidual", None)
    kept = {name: a[name] for name in ("running_mean", "running_var")}
    return {"y": y, **kept, "mean": cache["mean"], "inv_std": cache["inv_std"], **grads}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        scale = float(np.abs(array).max(initial=0.0))
        scale = max(1.0, scale) if name in ("y", "dx") else scale
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol * scale, err_msg=name)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu and residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_both_passes_are_the_references_in_every_layout(training, relu, dtype, backend):
    for shape, axis in LAYOUTS.values():
        arrays, found = made(shape, axis, dtype), {}
        for mode, (backend.contracted, backend.backwards) in MODES.items():
            found[mode] = on_device(backend, arrays, axis, relu, training=training)
            assert_close(found[mode], expected_of(arrays, axis, relu, training), TOLERANCES[dtype])
        assert_same(found["backwards"], found["forwards"])
        backend.contracted = False
        assert_same(on_device(backend, arrays, axis, relu, training=training, over=training), found["forwards"])


def test_a_batch_with_an_infinity_moves_no_running_statistics(backend):
    for shape, axis in LAYOUTS.values():
        arrays = made(shape, axis, np.float32)
        arrays["x"].reshape(-1)[-1] = np.inf
        found = on_device(backend, arrays, axis, True)
        assert_same(found, {name: arrays[name] for name in ("running_mean", "running_var")})


def test_no_value_has_no_sums(backend):
    for shape in ((0, 3), (2, 3, 0)):
        found = on_device(backend, made(shape, 1, np.float32), 1, False, training=False)
        assert found["dgamma"].tolist() == found["dbeta"].tolist() == [0.0] * 3


def test_layouts_have_several_slices_and_tiles_and_some_that_are_not_full():
    cuts = []
    for shape, axis in LAYOUTS.values():
        of_samples = shape[:-1] if axis == -1 else shape[:1]
        cuts.append(plan(int(np.prod(of_samples)), shape[axis], 1 if axis == -1 else int(np.prod(shape[2:]))))
    for single in (True, False):
        assert any(cut.slices > 1 and (cut.tile_channels == 1) == single for cut in cuts)
        assert any(cut.slices == 1 and (cut.spatial == 1) == single for cut in cuts)
    assert any(cut.slices > 1 and cut.slices * cut.length > cut.values for cut in cuts)
    assert any(cut.tiles > 1 and cut.channels % cut.tile_channels for cut in cuts)
