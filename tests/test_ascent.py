"""`Optimizer.ascent`: the point further up the loss at which sharpness-aware minimisation takes its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import OF_EACH_KIND

import fastopt

SIZES = {"a": 70_001, "b": 7, "empty": 0}


def tree(seed: int, dtype: type = np.float64, factor: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: (factor * rng.normal(size=size)).astype(dtype) for path, size in SIZES.items()}


def norm(grads: dict[str, np.ndarray]) -> float:
    """math.hypot leaves no range."""
    return math.hypot(*np.concatenate([g.ravel() for g in grads.values()]).astype(np.float64).tolist())


def bits(opt: fastopt.Optimizer) -> list[bytes]:
    return [buffer.tobytes() for buffer in (opt.flat.data, *opt._pipeline.buffers)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e25])
def test_the_way_has_length_rho_along_all_gradients_together(dtype, factor):
    params, grads = tree(1, dtype), tree(2, dtype, factor)
    opt = fastopt.SGD(params, lr=0.1)
    before = bits(opt)
    with opt.ascent(0.5, grads) as there:
        moved = {path: leaf - params[path] for path, leaf in there.items()}
        for path, way in moved.items():
            expected = 0.5 / norm(grads) * grads[path].astype(np.float64)
            np.testing.assert_allclose(way, expected, rtol=1e-12, atol=1e-6 if dtype == np.float32 else 1e-15)
    assert bits(opt) == before


def test_sam_is_what_the_paper_says():
    """Down f(w) = sum of a_i w_i^4 by SGD with momentum, against the algorithm in NumPy."""
    a, w = np.array([1.0, 0.25, 2.0]), np.array([1.0, -2.0, 0.5])
    opt = fastopt.Momentum({"w": w}, lr=0.01)
    v = np.zeros(3)
    for _ in range(20):
        with opt.ascent(0.05, {"w": 4.0 * a * opt.params["w"] ** 3}) as params:
            grads = {"w": 4.0 * a * params["w"] ** 3}
        opt.step(grads)
        g = 4.0 * a * w**3
        v = 0.9 * v + 4.0 * a * (w + 0.05 * g / np.linalg.norm(g)) ** 3
        w = w - 0.01 * v
    np.testing.assert_allclose(opt.params["w"], w, rtol=1e-13)


@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_a_rule_of_each_kind_goes_on_after_it_as_if_nothing_had_been(case):
    there_and_back, plain = case.make(tree(3)), case.make(tree(3))
    for seed in (4, 5):
        with there_and_back.ascent(0.1, tree(seed)):
            pass
        there_and_back.step(tree(seed))
        plain.step(tree(seed))
    assert bits(there_and_back) == bits(plain)


def test_the_buffer_of_gradients_is_used_where_none_are_given_and_maximizing_goes_down():
    opt = fastopt.SGD({"w": np.array([1.0, 1.0])}, lr=0.1, maximize=True, max_norm=1e-3, clip_value=1e-3)
    opt.grads["w"][...] = [3.0, 4.0]
    with opt.ascent(1.0) as params:
        np.testing.assert_allclose(params["w"], [0.4, 0.2], rtol=1e-14)
    assert opt.grads["w"].tolist() == [3.0, 4.0]


def test_parameters_without_gradient_and_frozen_ones_stay_and_are_in_no_norm():
    opt = fastopt.SGD({"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(1)}, overrides={"b": {"frozen": True}})
    with opt.ascent(0.5, {"a": np.array([3.0, -4.0]), "b": np.full(2, 100.0), "c": None}) as params:
        np.testing.assert_allclose(params["a"], [0.3, -0.4], rtol=1e-15)
        assert params["b"].tolist() == [0.0, 0.0]
        assert params["c"].tolist() == [0.0]


@pytest.mark.parametrize("g", [0.0, 5e-324])
def test_where_the_gradient_has_no_direction_the_parameters_stay(g):
    opt = fastopt.SGD({"w": np.ones(3)})
    with opt.ascent(0.5, {"w": np.full(3, g)}) as params:
        assert params["w"].tolist() == [1.0] * 3


def test_a_nan_is_seen_inside_and_gone_outside():
    opt = fastopt.SGD({"w": np.ones(3), "b": np.ones(1)})
    before = bits(opt)
    with opt.ascent(0.5, {"w": np.array([1.0, np.nan, 1.0]), "b": np.ones(1)}) as params:
        assert np.isnan(params["w"]).all()
        assert np.isnan(params["b"]).all()
    assert bits(opt) == before


def test_what_cannot_be_is_refused_and_an_exception_inside_restores():
    opt, grads = fastopt.SGD({"w": np.ones(3)}), {"w": np.ones(3)}
    before = bits(opt)
    with pytest.raises(ValueError, match=r"^rho: must be a number in \[0, inf\), got -1"), opt.ascent(-1):
        pass
    with pytest.raises(ValueError, match="gradient 'w': must"), opt.ascent(1.0, {"w": np.ones(2)}):
        pass
    with pytest.raises(RuntimeError, match=r"step\(\) inside `with opt.ascent\(\)`"), opt.ascent(1.0, grads):
        opt.step(grads)
    inside = pytest.raises(RuntimeError, match=r"ascent\(\) inside `with opt.ascent\(\)`")
    with inside, opt.ascent(1.0, grads), opt.ascent(1.0, grads):
        pass
    assert bits(opt) == before
    opt.accumulate(grads)
    with pytest.raises(RuntimeError, match=r"ascent\(\): gradients have been accumulated"), opt.ascent(1.0):
        pass
