"""`fastopt.curvature`: known spectra, a dense Hessian of the digits network, bit-exact restored parameters."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from fastopt.cli import data
from fastopt.cli.network import backward, new_layers
from fastopt.curvature import dominant_eigenvalue

DTYPES = (np.float32, np.float64)
TOLERANCE = 2e-5


def symmetric(eigenvalues, seed=0):
    """Return a dense matrix with this spectrum."""
    n = len(eigenvalues)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return Q * np.asarray(eigenvalues, float) @ Q.T


class Quadratic:
    """The gradient ``A (w - centre)`` of parameters in two arrays of a tree; it counts its calls."""

    def __init__(self, A, dtype=np.float64, centre=0.0):
        self.A, self.dtype, self.centre, self.calls = A, dtype, centre, 0

    def params(self, seed=1, scale=1.0):
        w = scale * np.random.default_rng(seed).normal(size=len(self.A))
        return self.tree(w)

    def tree(self, w):
        return {"W": w[:6].reshape(2, 3).astype(self.dtype), "b": [w[6:].astype(self.dtype)]}

    def __call__(self, tree):
        self.calls += 1
        w = np.concatenate([tree["W"].ravel(), tree["b"][0]]).astype(np.float64)
        return self.tree(self.A @ (w - self.centre))


# --- known spectra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [5.0, -5.0, 1e-6, 1e6])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_the_eigenvalue_of_a_quadratic_equals_that_of_its_matrix(dtype, largest, scale):
    spectrum = largest * np.array([1.0, -0.5, 0.4, 0.3, 0.2, -0.2, 0.1, 0.1, 0.0])
    grad = Quadratic(symmetric(spectrum), dtype)
    found = dominant_eigenvalue(grad, grad.params(scale=scale), rng=0)
    assert type(found) is float
    assert found == pytest.approx(largest, rel=TOLERANCE)
    assert grad.calls == 40


@settings(deadline=None, max_examples=60)
@given(
    spectrum=st.lists(st.floats(-0.8, 0.8), min_size=7, max_size=20),
    largest=st.sampled_from([1.0, -1.0]),
    seed=st.integers(0, 2**32),
)
def test_the_largest_magnitude_is_found(spectrum, largest, seed):
    grad = Quadratic(symmetric([largest, *spectrum], seed))
    assert dominant_eigenvalue(grad, grad.params(seed), 60, rng=seed) == pytest.approx(largest, rel=1e-4)


def test_the_error_falls_with_the_iterations_at_the_known_rate():
    grad = Quadratic(symmetric([1.0, *[0.9] * 8]))
    errors = [1.0 - dominant_eigenvalue(grad, grad.params(), k, rng=3) for k in range(1, 40)]
    assert min(errors) > 0.0  # a Rayleigh quotient never exceeds the largest eigenvalue
    ratios = [after / before for before, after in pairwise(errors[15:30])]
    np.testing.assert_allclose(ratios, 0.9**2, rtol=0.02)


def test_the_first_estimate_is_the_rayleigh_quotient_of_the_start_vector():
    A = symmetric([3.0, -1.0, 2.0, 0.5, 0.5, 0.2, 1.0])
    grad = Quadratic(A)
    v = np.random.default_rng(11).standard_normal(7)  # drawn leaf by leaf from one stream
    assert dominant_eigenvalue(grad, grad.params(), 1, rng=11) == pytest.approx(v @ A @ v / (v @ v), rel=1e-5)


def test_the_start_vector_is_zero_in_the_padding():
    """Each parameter has 3 elements in a line of 16: a start in the padding would lower the first estimate."""
    tree = {name: np.ones(3, np.float32) for name in "abcd"}
    assert dominant_eigenvalue(lambda p: {k: 2.0 * v for k, v in p.items()}, tree, 1, rng=0) == pytest.approx(2.0, 1e-5)


def test_the_curvature_depends_on_the_given_point():
    def grad(tree):  # of sum(w^4) / 12
        return [tree[0] ** 3 / 3]

    for w in (0.5, 2.0):
        assert dominant_eigenvalue(grad, [np.array([w, 0.1])], rng=0) == pytest.approx(w**2, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_gradient_has_no_curvature(dtype):
    slope = np.linspace(-1, 1, 5).astype(dtype)
    assert dominant_eigenvalue(lambda p: [slope.copy()], [np.ones(5, dtype)], rng=0) == 0.0


@pytest.mark.parametrize("slope", [1e3, 1e5, 1e7, 1e9, -1e10])
@pytest.mark.parametrize("eigenvalue", [7.0, -7.0])
def test_large_gradients_do_not_hide_the_curvature_in_float64(slope, eigenvalue):
    curvatures = eigenvalue * np.array([1.0, 0.5, -0.25])
    found = dominant_eigenvalue(lambda p: [slope + curvatures * p[0]], [np.ones(3)], rng=0)
    assert found == pytest.approx(eigenvalue, rel=2e-3)


@settings(deadline=None, max_examples=30)
@given(power=st.floats(-3.0, 25.0), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_large_gradients_give_the_curvature_or_an_error(power, dtype, seed):
    slope = dtype(10.0**power)
    curvatures = np.array([7.0, -3.0, 1.0, 0.0], dtype)
    with suppress(ValueError):
        found = dominant_eigenvalue(lambda p: [slope + curvatures * p[0]], [np.ones(4, dtype)], rng=seed)
        assert found == pytest.approx(7.0, rel=0.02)
        return
    assert power > (3.0 if dtype == np.float32 else 11.0)


def test_curvature_that_is_lost_in_the_rounding_of_the_gradients_is_an_error():
    for slope in (np.float32(1e7), np.float64(1e16), np.float64(1e20)):
        params = [np.ones(3, slope.dtype)]
        with pytest.raises(ValueError, match="its rounding not to hide the curvature, got gradients of norm"):
            dominant_eigenvalue(lambda p, slope=slope: [slope + 7 * p[0]], params, rng=0)


def test_large_parameters_have_a_curvature():
    found = dominant_eigenvalue(lambda p: [np.array([1e-3, 2e-3]) * p[0]], [np.array([3e200, 4e200])], 60, rng=0)
    assert found == pytest.approx(2e-3, rel=1e-4)


def test_a_longer_step_is_kept_for_the_next_iterations():
    calls = 0

    def grad(tree):
        nonlocal calls
        calls += 1
        return [1e7 + 7.0 * tree[0]]

    dominant_eigenvalue(grad, [np.ones(3)], 10, rng=0)
    assert 20 < calls <= 28


def test_a_missing_gradient_counts_as_zero():
    tree = {"used": np.ones(3), "unused": np.ones(2)}
    assert dominant_eigenvalue(lambda p: {"used": 4.0 * p["used"], "unused": None}, tree, rng=0) == pytest.approx(
        4.0, rel=1e-5
    )


def test_gradient_descent_with_2_over_lambda_is_the_edge():
    spectrum = [4.0, 1.0, 0.5, 0.5, 0.3, 0.2, 0.1]
    grad = Quadratic(symmetric(spectrum))
    edge = 2.0 / dominant_eigenvalue(grad, grad.params(), 60, rng=0)
    for lr, grows in ((0.98 * edge, False), (1.02 * edge, True)):
        opt = fastopt.SGD(grad.params(), lr=lr)
        before = np.linalg.norm(opt.flat.data)
        for _ in range(300):
            opt.step(grad(opt.params))
        assert (np.linalg.norm(opt.flat.data) > before) == grows


# --- the digits network -----------------------------------------------------------------------------------------------


def dense_hessian(grad, flat):
    """Return the Hessian by central differences of float64 gradients, a column per parameter (zeros for padding)."""
    h = 1e-6
    columns = []
    for k in range(flat.size):
        kept = flat.data[k]
        flat.data[k] = kept + h
        above = np.concatenate([g.ravel() for layer in grad(flat.params) for g in layer[:2]])
        flat.data[k] = kept - h
        below = np.concatenate([g.ravel() for layer in grad(flat.params) for g in layer[:2]])
        flat.data[k] = kept
        columns.append((above - below) / (2 * h))
    real = np.zeros(flat.size)
    for part in flat.views(real):
        part[...] = 1.0
    H = np.array(columns)[real > 0]
    return (H + H.T) / 2


def digits_network(hidden, dtype, rows=None):
    """Return the network's parameters in a flat buffer, and the gradient of its loss over the training rows."""
    digits = data.load("digits", np.random.default_rng(0))
    x, labels = digits.x_train[:rows].astype(dtype), digits.y_train[:rows]
    flat = fastopt.pack(
        new_layers([64, *hidden, 10], fastopt.init.he_normal_, np.random.default_rng(1), np.float64), dtype=dtype
    )

    def grad(layers):
        backward(layers, x, labels, out=flat.grads)
        return flat.grads

    return flat, grad


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_the_digits_network_has_the_largest_eigenvalue_of_its_dense_hessian(hidden):
    flat, grad = digits_network(hidden, np.float64)
    eigenvalues = np.linalg.eigvalsh(dense_hessian(grad, flat))
    largest = eigenvalues[np.argmax(abs(eigenvalues))]
    assert largest > 0.9
    assert dominant_eigenvalue(grad, flat, 60, rng=0) == pytest.approx(largest, rel=1e-4)
    assert 0.97 * largest < dominant_eigenvalue(grad, flat, rng=0) <= largest * (1 + 1e-5)
    if not hidden:  # without kinks float32 finds it as well
        flat, grad = digits_network(hidden, np.float32)
        assert dominant_eigenvalue(grad, flat, 60, rng=0) == pytest.approx(largest, rel=2e-3)


def test_float32_agrees_with_float64_on_the_network_of_the_command():
    found = []
    for dtype in DTYPES:
        flat, grad = digits_network((128, 32), dtype, rows=500)
        found.append(dominant_eigenvalue(grad, flat, rng=0))
    # The longer difference steps in float32 cross ReLU kinks, hence the tolerance.
    assert found[0] == pytest.approx(found[1], rel=0.1)


# --- restored parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_restored_bit_for_bit_and_grad_sees_them_move(dtype):
    opt = fastopt.Momentum({"w": np.array([0.1, -0.0, 3e30, 1e-30], dtype)}, lr=0.5)
    before = opt.flat.data.tobytes()
    seen = []

    def grad(tree):
        assert tree is opt.params
        seen.append(opt.params["w"].copy())
        return {"w": 2 * tree["w"]}

    dominant_eigenvalue(grad, opt.flat, 3, rng=0)
    assert opt.flat.data.tobytes() == before
    assert len(seen) == 6
    assert not any(np.array_equal(w, opt.params["w"]) for w in seen)


def test_the_callers_arrays_are_only_read():
    tree = {"w": np.linspace(-1, 1, 7)}
    tree["w"].flags.writeable = False
    given = []

    def grad(moved):
        given.append(moved)
        return {"w": 3 * moved["w"]}

    assert dominant_eigenvalue(grad, tree, rng=0) == pytest.approx(3.0, rel=1e-5)
    assert not any(np.shares_memory(moved["w"], tree["w"]) for moved in given)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_parameters_are_restored_after_an_error(calls):
    flat = fastopt.pack([np.arange(5.0)])
    left = calls

    def grad(tree):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return [tree[0] * 2]

    with pytest.raises(KeyboardInterrupt):
        dominant_eigenvalue(grad, flat, rng=0)
    np.testing.assert_array_equal(flat.data[:5], np.arange(5.0))


def test_parameters_that_stay_where_they_are():
    grad = Quadratic(symmetric([1.0, 4.0, -7.0, 2.0, 0.5, 3.0, 1.0, 2.0]))
    params = grad.params()
    flat = fastopt.pack(params, copy=False)
    before = [array.copy() for array in flat.arrays]
    expected = dominant_eigenvalue(grad, fastopt.pack(params), 5, rng=0)
    assert dominant_eigenvalue(grad, flat, 5, rng=0) == expected
    for array, kept in zip(flat.arrays, before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_structures_match_those_of_pack():
    class Pair(NamedTuple):
        a: np.ndarray
        b: np.ndarray

    def grad(pair):
        assert type(pair) is Pair
        return Pair(2.0 * pair.a, 5.0 * pair.b)

    assert dominant_eigenvalue(grad, Pair(np.ones(2), np.ones((2, 2))), rng=0) == pytest.approx(5.0, rel=1e-5)
    assert dominant_eigenvalue(lambda w: 3.0 * w, np.ones(4), rng=0) == pytest.approx(3.0, rel=1e-5)


def test_one_seed_has_one_result():
    grad = Quadratic(symmetric([1.0, 0.99, 0.98, 0.97, 0.9, 0.9, 0.9]))
    first, same, other, generated = (
        dominant_eigenvalue(grad, grad.params(), 3, rng=rng) for rng in (0, 0, 1, np.random.default_rng(0))
    )
    assert first == same == generated != other


# --- bad input --------------------------------------------------------------------------------------------------------

ONES = {"w": np.ones(3)}


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"grad": None}, TypeError, "grad: must be a function of the parameters, got NoneType"),
        ({"iterations": 0}, ValueError, "iterations: must be an int >= 1, got 0"),
        ({"iterations": 2.0}, TypeError, "iterations: must be an int >= 1, got 2"),
        ({"iterations": True}, TypeError, "iterations: must be an int >= 1, got True"),
        ({"rng": -1}, ValueError, "rng: must be a seed >= 0, got -1"),
        ({"rng": "0"}, TypeError, "rng: must be None, an int seed"),
        ({"params": {}}, ValueError, "params: must hold at least one array"),
        ({"params": {"w": np.ones((0, 3))}}, ValueError, "params: must have at least one element, got none"),
        ({"params": {"w": np.ones(3, int)}}, TypeError, "parameter 'w': must have dtype float32, float64"),
        (
            {"params": {"w": np.array([1.0, math.nan, 0.0])}},
            ValueError,
            "parameter 'w': must be finite, got NaN or inf",
        ),
        ({"grad": lambda p: {"w": p["w"] * math.inf}}, ValueError, "gradient 'w': must be finite near .* iteration 1,"),
        ({"grad": lambda p: {"w": np.ones(4)}}, ValueError, r"gradient 'w': must have shape \(3,\)"),
        ({"grad": lambda p: {"w": np.ones(3, np.float32)}}, TypeError, "gradient 'w': must have dtype"),
        (
            {"grad": lambda p: {"w": 1.0}},
            TypeError,
            "gradient 'w': must be a NumPy array or None, got float",
        ),
        ({"grad": lambda p: {"v": np.ones(3)}}, ValueError, r"got a tree without 'w' and with 'v' in excess"),
        ({"grad": lambda p: p}, ValueError, "^gradient 'w': must not overlap the parameters in memory; pass a copy"),
    ],
)
def test_bad_input_is_named(changed, kind, message):
    arguments = {"grad": lambda p: {"w": 2 * p["w"]}, "params": ONES, "iterations": 3, "rng": 0, **changed}
    with pytest.raises(kind, match=message):
        dominant_eigenvalue(**arguments)


def test_a_gradient_that_becomes_nan_is_named_with_its_iteration():
    calls = 0

    def grad(tree):
        nonlocal calls
        calls += 1
        return {"w": tree["w"] * (math.nan if calls == 4 else 1.0)}

    with pytest.raises(ValueError, match="gradient 'w': must be finite near the given point, in iteration 2, got NaN"):
        dominant_eigenvalue(grad, ONES, rng=0)
