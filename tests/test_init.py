"""Specification of fastopt.init: fans, distributions, layouts, seeds, signal through deep networks, refusals."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastopt import init

Array = NDArray[Any]
Fill = Callable[..., Array]

SCALED: list[Fill] = [init.xavier_uniform_, init.xavier_normal_, init.he_uniform_, init.he_normal_]
RANDOM: list[Fill] = [init.normal_, *SCALED]
EVERY: list[Fill] = [init.zeros_, *RANDOM]
DTYPES = [np.float32, np.float64]


def named(fill: Fill) -> str:
    return fill.__name__


# --- fans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((784, 256), (784, 256)),
        ((1, 5), (1, 5)),
        ((0, 5), (0, 5)),
        ((64, 3, 7), (21, 448)),
        ((64, 3, 7, 5), (3 * 35, 64 * 35)),
        ((8, 4, 3, 3, 3), (108, 216)),
        ([np.int64(3), 4], (3, 4)),
    ],
    ids=str,
)
def test_fans(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert init.fans(shape) == expected
    assert all(type(fan) is int for fan in init.fans(shape))


def test_fans_of_a_kernel_equal_torchs_and_of_a_matrix_those_of_its_transpose() -> None:
    torch = pytest.importorskip("torch", reason="torch.nn.init is the oracle of this test")
    fans_of_torch = torch.nn.init._calculate_fan_in_and_fan_out
    for shape in ((64, 3, 7, 7), (5, 2, 3), (8, 4, 3, 2, 2)):
        assert init.fans(shape) == fans_of_torch(torch.empty(shape))
    assert init.fans((20, 30)) == fans_of_torch(torch.empty(30, 20))  # torch's nn.Linear stores (out, in)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((), ValueError, r"at least two axes, .*got \(\); .*\(fan_in, fan_out\)"),
        ((5,), ValueError, r"at least two axes, .*got \(5,\)"),
        ((5, -1), ValueError, r"shape: must have axes >= 0, got \(5, -1\)"),
        (5, TypeError, r"shape: must be a sequence of ints .*got 5"),
        ((5, 2.0), TypeError, r"shape: must be a sequence of ints .*got \(5, 2.0\)"),
        (None, TypeError, r"shape: must be a sequence of ints"),
    ],
)
def test_fans_refuses(shape: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        init.fans(shape)


# --- distributions ----------------------------------------------------------------------------------------------------

# The standard deviation of each function, from the papers, for fan_in = 300 and fan_out = 500.
SPREADS: list[tuple[Fill, dict[str, float], float]] = [
    (init.normal_, {}, 0.01),
    (init.normal_, {"std": 0.7}, 0.7),
    (init.xavier_uniform_, {}, math.sqrt(2 / 800)),
    (init.xavier_uniform_, {"gain": 3.0}, 3 * math.sqrt(2 / 800)),
    (init.xavier_normal_, {}, math.sqrt(2 / 800)),
    (init.xavier_normal_, {"gain": 0.5}, 0.5 * math.sqrt(2 / 800)),
    (init.he_uniform_, {}, math.sqrt(2 / 300)),
    (init.he_uniform_, {"negative_slope": 0.2}, math.sqrt(2 / 1.04 / 300)),
    (init.he_normal_, {}, math.sqrt(2 / 300)),
    (init.he_normal_, {"negative_slope": 1.0}, math.sqrt(1 / 300)),
]


@pytest.mark.parametrize("shape", [(300, 500), (100, 60, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fill", "settings", "std"), SPREADS)
def test_moments_and_shape_of_the_distribution(
    fill: Fill, settings: dict[str, float], std: float, dtype: type, shape: tuple[int, ...]
) -> None:
    assert init.fans(shape) == (300, 500)
    w = fill(np.empty(shape, dtype), rng=1, **settings).astype(np.float64).ravel() / std
    # Five standard errors of the mean, the variance and the fourth moment for this number of draws.
    kurtosis, eighth = (1.8, 9.0) if "uniform" in fill.__name__ else (3.0, 105.0)
    assert abs(w.mean()) < 5 / math.sqrt(w.size)
    assert abs((w**2).mean() - 1) < 5 * math.sqrt((kurtosis - 1) / w.size)
    assert abs((w**4).mean() - kurtosis) < 5 * math.sqrt((eighth - kurtosis**2) / w.size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [init.xavier_uniform_, init.he_uniform_], ids=named)
def test_uniform_draws_approach_their_bound_and_never_exceed_it(fill: Fill, dtype: type) -> None:
    bound = dtype(math.sqrt(6 / (800 if fill is init.xavier_uniform_ else 300)))
    w = fill(np.empty((300, 500), dtype), rng=2)
    assert -bound <= w.min() < -0.999 * bound
    assert 0.999 * bound < w.max() <= bound


def test_normal_draws_around_the_mean() -> None:
    w = init.normal_(np.empty(100_000, np.float32), std=0.5, mean=-3.0, rng=0)
    assert w.mean() == pytest.approx(-3.0, abs=0.01)
    assert w.std() == pytest.approx(0.5, abs=0.01)
    assert (init.normal_(np.empty(5), std=0.0, mean=1.5) == 1.5).all()


def test_zeros() -> None:
    for w in (np.ones((3, 4), np.float32), np.ones(3), np.ones(()), np.ones((4, 6))[::2, ::3]):
        assert init.zeros_(w) is w
        assert (w == 0).all()


# --- in place, any layout ---------------------------------------------------------------------------------------------


def unaligned(shape: tuple[int, ...], dtype: Any) -> Array:
    count = math.prod(shape) * np.dtype(dtype).itemsize
    return np.zeros(count + 1, np.uint8)[1:].view(dtype).reshape(shape)


LAYOUTS: dict[str, Callable[[tuple[int, ...], Any], Array]] = {
    "C": lambda shape, dtype: np.zeros(shape, dtype),
    "Fortran": lambda shape, dtype: np.zeros(shape, dtype, order="F"),
    "columns": lambda shape, dtype: np.zeros((*shape[:-1], shape[-1] + 3), dtype)[..., 1:-2],
    "every second row": lambda shape, dtype: np.zeros((2 * shape[0], *shape[1:]), dtype)[::2],
    "backwards": lambda shape, dtype: np.zeros(shape, dtype)[::-1, ::-1],
    "unaligned": unaligned,
}


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (700, 300), (2, 131_073), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_gives_the_same_values_in_any_layout(layout: str, dtype: type, shape: tuple[int, ...]) -> None:
    for fill in (init.normal_, init.he_uniform_):
        w = LAYOUTS[layout](shape, dtype)
        assert fill(w, rng=3) is w
        np.testing.assert_array_equal(w, fill(np.empty(shape, dtype), rng=3))
        assert (w != 0).mean() > 0.99


@pytest.mark.parametrize("fill", EVERY, ids=named)
def test_only_the_elements_of_a_view_are_filled(fill: Fill) -> None:
    buffer = np.full((10, 12), 7.0, np.float32)
    fill(buffer[2:8:2, 3:9])
    inside = np.zeros(buffer.shape, bool)
    inside[2:8:2, 3:9] = True
    assert (buffer[inside] != 7.0).all()
    assert (buffer[~inside] == 7.0).all()


@given(
    shape=st.lists(st.integers(0, 7), min_size=2, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**64),
    fill=st.sampled_from(RANDOM),
    axes=st.randoms(),
)
def test_any_shape_and_transpose(shape: tuple[int, ...], dtype: type, seed: int, fill: Fill, axes: Any) -> None:
    order = list(range(len(shape)))
    axes.shuffle(order)
    w = np.full([shape[k] for k in order], np.nan, dtype).transpose(np.argsort(order))
    assert w.shape == shape
    assert fill(w, rng=seed) is w
    assert np.isfinite(w).all()
    np.testing.assert_array_equal(w, fill(np.empty(shape, dtype), rng=seed))


@pytest.mark.parametrize("fill", EVERY, ids=named)
def test_empty_arrays_are_accepted(fill: Fill) -> None:
    for shape in ((0, 5), (5, 0), (0, 0), (3, 0, 2)):
        w = np.empty(shape)
        assert fill(w) is w


@pytest.mark.parametrize("shape", [(), (1,), (5,)], ids=str)
def test_normal_accepts_any_number_of_axes(shape: tuple[int, ...]) -> None:
    w = np.full(shape, 9.0, np.float32)
    assert init.normal_(w, rng=0) is w
    assert (np.abs(w) < 1).all()


@pytest.mark.parametrize("fill", RANDOM, ids=named)
@pytest.mark.parametrize("transposed", [False, True])
def test_there_is_no_large_temporary_array(fill: Fill, transposed: bool) -> None:
    w = np.empty((2000, 1000), np.float32)  # 8 MB
    tracemalloc.start()
    fill(w.T if transposed else w, rng=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600_000 if transposed else peak < 50_000


def test_a_memory_mapped_array_is_filled(tmp_path: Any) -> None:
    w = np.memmap(tmp_path / "weights", np.float32, "w+", shape=(20, 30))
    assert init.he_normal_(w, rng=0) is w
    np.testing.assert_array_equal(w, init.he_normal_(np.empty((20, 30), np.float32), rng=0))


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", RANDOM, ids=named)
def test_rng(fill: Fill) -> None:
    def draw(rng: Any) -> Array:
        return fill(np.empty((20, 30)), rng=rng)

    assert (draw(5) == draw(5)).all()
    assert (draw(5) == draw(np.int64(5))).all()
    assert (draw(5) == draw(np.random.default_rng(5))).all()
    assert (draw(5) != draw(6)).any()
    assert (draw(None) != draw(None)).any()
    advanced = np.random.default_rng(5)
    assert (draw(advanced) != draw(advanced)).any()  # a generator advances, unlike a seed


@pytest.mark.parametrize(
    ("rng", "error", "message"),
    [
        (-1, ValueError, r"rng: must be a seed >= 0, got -1"),
        (1.5, TypeError, r"rng: must be None, an int seed or a numpy.random.Generator, got float"),
        ("seed", TypeError, r"rng: must be .*got str"),
        (True, TypeError, r"rng: must be .*got bool"),
        (np.random.RandomState(0), TypeError, r"rng: must be .*got RandomState; use numpy.random.default_rng\(seed\)"),
    ],
)
def test_a_bad_rng_is_refused_and_nothing_is_written(rng: Any, error: type[Exception], message: str) -> None:
    for fill in RANDOM:
        w = np.full((3, 4), 7.0)
        with pytest.raises(error, match=message):
            fill(w, rng=rng)
        assert (w == 7.0).all()


# --- purpose: signals through ten layers ------------------------------------------------------------------------------

WIDTH, DEPTH, SAMPLES = 512, 10, 256


def second_moments(fill: Callable[[Array, int], object], activation: Callable[[Array], Array], scale: float) -> Array:
    """Return the mean square of the input and of each layer's activations, averaged over a few networks."""
    moments = np.zeros(DEPTH + 1)
    for network in range(4):
        x = scale * np.random.default_rng(100 + network).standard_normal((SAMPLES, WIDTH))
        moments[0] += (x**2).mean() / 4
        for layer in range(DEPTH):
            w = np.empty((WIDTH, WIDTH))
            fill(w, 1000 * network + layer)
            x = activation(x @ w)
            moments[layer + 1] += (x**2).mean() / 4
    return moments


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def leaky_relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.2 * x)


# tanh is the identity only near zero: inputs of deviation 0.1 show the effect of the weights without saturation.
PRESERVED = {
    "tanh, xavier_normal_": (lambda w, seed: init.xavier_normal_(w, rng=seed), np.tanh, 0.1),
    "tanh, xavier_uniform_": (lambda w, seed: init.xavier_uniform_(w, rng=seed), np.tanh, 0.1),
    "relu, he_normal_": (lambda w, seed: init.he_normal_(w, rng=seed), relu, 1.0),
    "relu, he_uniform_": (lambda w, seed: init.he_uniform_(w, rng=seed), relu, 1.0),
    "leaky relu, he_normal_": (lambda w, seed: init.he_normal_(w, negative_slope=0.2, rng=seed), leaky_relu, 1.0),
}


@pytest.mark.parametrize("case", PRESERVED)
def test_the_signal_keeps_its_size_through_ten_layers(case: str) -> None:
    moments = second_moments(*PRESERVED[case])
    assert 0.7 < moments[-1] / moments[0] < 1.4, moments


@pytest.mark.parametrize("activation", [np.tanh, relu])
def test_the_signal_vanishes_with_a_fixed_small_spread(activation: Callable[[Array], Array]) -> None:
    moments = second_moments(lambda w, seed: init.normal_(w, rng=seed), activation, 1.0)
    assert moments[-1] < 1e-10 * moments[0]


def test_xavier_loses_half_of_the_signal_at_every_relu() -> None:
    moments = second_moments(lambda w, seed: init.xavier_normal_(w, rng=seed), relu, 1.0)
    assert moments[-1] / moments[0] == pytest.approx(0.5**DEPTH, rel=0.4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def read_only() -> Array:
    w = np.ones((3, 4))
    w.flags.writeable = False
    return w


@pytest.mark.parametrize("fill", EVERY, ids=named)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: [[1.0]],
            TypeError,
            r"w: must be a NumPy array, got list; pass np.empty",
        ),
        (lambda: np.float32(1), TypeError, r"w: must be a NumPy array, got float32"),
        (lambda: np.ones((3, 4), int), TypeError, r"w: must be float32 or float64 .*got int64; .*astype"),
        (lambda: np.ones((3, 4), object), TypeError, r"w: must be float32 or float64 .*got object"),
        (lambda: np.ones((3, 4), np.float16), TypeError, r"w: must be float32 or float64 .*got float16"),
        (lambda: np.ones((3, 4), complex), TypeError, r"w: must be float32 or float64 .*got complex128"),
        (lambda: np.ones((3, 4), np.dtype(float).newbyteorder()), TypeError, r"native byte order, got '[<>]f8'"),
        (read_only, ValueError, r"w: must be writeable, got a read-only array; pass w.copy\(\)"),
        (lambda: np.broadcast_to(np.ones(4), (3, 4)), ValueError, r"w: must be writeable"),
    ],
)
def test_arrays_that_cannot_be_filled_in_place_are_refused(
    fill: Fill, make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    w = make()
    before = np.array(w)
    with pytest.raises(error, match=message):
        fill(w)
    assert (np.array(w) == before).all()


@pytest.mark.parametrize("fill", SCALED, ids=named)
@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_weights_without_fans_are_refused(fill: Fill, shape: tuple[int, ...]) -> None:
    w = np.full(shape, 7.0)
    with pytest.raises(ValueError, match=r"w: must have at least two axes.*got shape .*zeros_ or normal_.*reshape"):
        fill(w)
    assert (w == 7.0).all()


@pytest.mark.parametrize(
    ("fill", "settings", "error", "message"),
    [
        (init.normal_, {"std": -1.0}, ValueError, r"std: must be a finite number >= 0, got -1.0"),
        (init.normal_, {"std": math.nan}, ValueError, r"std: must be a finite number >= 0, got nan"),
        (init.normal_, {"std": "1"}, TypeError, r"std: must be .*got '1'"),
        (init.normal_, {"std": True}, TypeError, r"std: must be .*got True"),
        (init.normal_, {"std": 10**400}, ValueError, r"std: must be a finite number"),
        (init.normal_, {"mean": math.inf}, ValueError, r"mean: must be a finite number, got inf"),
        (init.normal_, {"mean": None}, TypeError, r"mean: must be a finite number, got None"),
        (init.xavier_uniform_, {"gain": 0.0}, ValueError, r"gain: must be a finite number > 0, got 0.0"),
        (init.xavier_normal_, {"gain": math.inf}, ValueError, r"gain: must be a finite number > 0, got inf"),
        (init.xavier_normal_, {"gain": "relu"}, TypeError, r"gain: must be .*got 'relu'"),
        (
            init.he_uniform_,
            {"negative_slope": math.nan},
            ValueError,
            r"negative_slope: must be a finite number, got nan",
        ),
        (init.he_normal_, {"negative_slope": None}, TypeError, r"negative_slope: must be a finite number, got None"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(
    fill: Fill, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    w = np.full((3, 4), 7.0)
    with pytest.raises(error, match=message):
        fill(w, **settings)
    assert (w == 7.0).all()


def test_a_huge_slope_gives_a_tiny_spread() -> None:
    assert np.abs(init.he_normal_(np.empty((3, 4)), negative_slope=1e300, rng=0)).max() < 1e-298
