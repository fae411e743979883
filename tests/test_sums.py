"""Rules that see sums over whole parameters: `fastopt.Sums`.

The rules here are written as a user would write them, and compared with the same formulas in NumPy.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt
from fastopt.kernels.contract import BLOCK
from fastopt.kernels.driver import DRIVER
from fastopt.storage.layout import TILE

SHAPES = {
    "a": (130 * BLOCK + 1,),
    "b": (5,),
    "c": (BLOCK,),
    "d": (BLOCK + 1,),
    "empty": (0, 3),
    "hollow": (3, 0),
    "kernel": (6, 5, 3, 2),
    "matrix": (40, 5000),
    "one": (),
    "tall": (TILE + 1, 2),
    "wide": (2, TILE + 1),
}
"""The first in chunks of several blocks. The last ones are cut into tiles: rows, columns and both."""


def tree(rng: np.random.Generator, dtype: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(rng.normal(size=shape)).astype(dtype) for path, shape in SHAPES.items()}


# --- Prodigy: sums over all parameters, and numbers that persist ------------------------------------------------------


class ProdigyHyper(NamedTuple):
    lr: float
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    b3: float
    eps: float
    d0: float
    inverse_d0: float
    d: float  # both are filled in
    new_d: float


def prepare_prodigy(t, lr=1.0, betas=(0.9, 0.999), eps=1e-8, d0=1e-6):
    b1, b2 = betas
    correction = math.sqrt(1.0 - b2**t) / (1.0 - b1**t)
    return ProdigyHyper(
        lr * correction, b1, 1.0 - b1, b2, 1.0 - b2, math.sqrt(b2), eps, d0, 1.0 / d0, d0, d0
    )  # fmt: skip


def present_d(sums, numbers, size, h):
    d = numbers.d if numbers.d > 0.0 else h.d0
    return d, d


def towards_the_start(p, g, m, v, s, p0, h):
    return h.lr * g * (p0 - p)


def new_s(g, s, h):
    return h.b3 * s + h.d * h.inverse_d0 * (h.d * h.lr) * g


def magnitude(p, g, m, v, s, p0, h):
    return abs(new_s(g, s, h))


def next_d(sums, numbers, size, h):
    weighted = h.b3 * numbers.weighted + h.d * h.inverse_d0 * h.d * sums.towards
    estimate = weighted / sums.magnitude if sums.magnitude > 0.0 else numbers.d
    d = max(numbers.d, estimate)
    return d, weighted, d


@fastopt.rule(
    prepare_prodigy,
    initial={"p0": "p"},
    sums=(
        fastopt.Sums({}, present_d, results=("d",), numbers=("d",), over="all"),
        fastopt.Sums(
            {"towards": towards_the_start, "magnitude": magnitude},
            next_d,
            results=("new_d",),
            numbers=("weighted", "d"),
            over="all",
        ),
    ),
)
def prodigy(p, g, m, v, s, p0, h):
    m = h.b1 * m + h.one_minus_b1 * (h.d * g)
    v = h.b2 * v + h.one_minus_b2 * (h.d * g) * (h.d * g)
    return p - h.d * h.lr * m / (math.sqrt(v) + h.new_d * h.eps), m, v, new_s(g, s, h), p0


def prodigy_in_numpy(params, all_grads, lr=1.0, betas=(0.9, 0.999), eps=1e-8, d0=1e-6):
    b1, b2 = betas
    b3 = math.sqrt(b2)
    p = {path: leaf.astype(np.float64) for path, leaf in params.items()}
    p0 = {path: leaf.copy() for path, leaf in p.items()}
    m, v, s = ({path: np.zeros_like(leaf) for path, leaf in p.items()} for _ in range(3))
    d, weighted = d0, 0.0
    for t, grads in enumerate(all_grads, 1):
        correction = math.sqrt(1.0 - b2**t) / (1.0 - b1**t)
        step = d * lr * correction
        weighted = b3 * weighted + d / d0 * step * sum(float((g * (p0[k] - p[k])).sum()) for k, g in grads.items())
        for path, g in grads.items():
            m[path] = b1 * m[path] + (1.0 - b1) * d * g
            v[path] = b2 * v[path] + (1.0 - b2) * (d * g) ** 2
            s[path] = b3 * s[path] + d / d0 * step * g
        new_d = max(d, weighted / sum(float(np.abs(s[path]).sum()) for path in grads))
        for path in grads:
            p[path] = p[path] - step * m[path] / (np.sqrt(v[path]) + new_d * eps)
        d = new_d
    return p, d


PRODIGY_START = {"w": np.array([0.5, -2.0, 1.0]), "b": np.array([3.0])}
PRODIGY_CURVES = {"w": np.array([1.0, 0.5, 2.0]), "b": np.array([0.25])}


def bowl(opt: fastopt.Optimizer, steps: int) -> list[dict[str, np.ndarray]]:
    """Make steps down a bowl; return the gradients."""
    made = []
    for _ in range(steps):
        made.append({path: curve * opt.params[path] for path, curve in PRODIGY_CURVES.items()})
        opt.step(made[-1])
    return made


OPTAX = {
    20: ([0.4982915223964841, -1.9982917368904207, 0.9982916649309516], [2.998291760968285], 0.0008989307040021144),
    60: ([0.07213416995219867, 0.288071783197199, -0.1703695393475597], [0.07192495580485359], 0.4977366455487417),
}
"""What optax.contrib.prodigy(1.0, betas=(0.9, 0.999)) of optax 0.2.8 (jax 0.10.2, float64) gives after so many steps
down this bowl: w, b and its estimate of d."""


@pytest.mark.parametrize("steps", OPTAX)
def test_a_prodigy_of_ones_own_computes_what_optax_computes(steps):
    opt = fastopt.Optimizer(PRODIGY_START, prodigy)
    grads = bowl(opt, steps)
    w, b, d = OPTAX[steps]
    np.testing.assert_allclose(opt.params["w"], w, rtol=1e-12)
    np.testing.assert_allclose(opt.params["b"], b, rtol=1e-12)
    assert float(opt.states["d"]["w"]) == float(opt.states["d"]["b"]) == pytest.approx(d, rel=1e-12)
    p, _ = prodigy_in_numpy(PRODIGY_START, grads)
    np.testing.assert_allclose(opt.params["w"], p["w"], rtol=1e-12)


def test_sums_over_all_parameters_of_many_blocks_are_those_of_numpy():
    rng = np.random.default_rng(0)
    params = tree(rng, np.float64)
    opt = fastopt.Optimizer(params, prodigy, d0=1e-2)
    grads = []
    for _ in range(5):  # always towards 0, so that d grows
        grads.append({path: leaf.copy() for path, leaf in opt.params.items()})
        opt.step(grads[-1])
    expected, d = prodigy_in_numpy(params, grads, d0=1e-2)
    assert d > 0.011
    for path, leaf in expected.items():
        np.testing.assert_allclose(opt.params[path], leaf, rtol=1e-12, atol=1e-14, err_msg=path)
        assert float(opt.states["d"][path]) == pytest.approx(d, rel=1e-12)


@pytest.mark.parametrize("absent", PRODIGY_START)
def test_a_parameter_without_gradient_is_in_no_sum_and_has_the_numbers_of_all(absent):
    (present,) = PRODIGY_START.keys() - {absent}
    opt = fastopt.Optimizer(PRODIGY_START, prodigy, d0=0.1)
    alone = fastopt.Optimizer({present: PRODIGY_START[present]}, prodigy, d0=0.1)
    for _ in range(4):
        g = PRODIGY_CURVES[present] * alone.params[present]
        opt.step({present: g, absent: None})
        alone.step({present: g})
    assert opt.params[present].tobytes() == alone.params[present].tobytes()
    assert opt.params[absent].tobytes() == PRODIGY_START[absent].tobytes()
    for number in ("d", "weighted"):
        values = {float(opt.states[number][path]) for path in (present, absent)}
        assert values == {float(alone.states[number][present])}
        assert values != {0.0}


class CentredHyper(NamedTuple):
    lr: float
    mean: float


def prepare_centred(t, lr=0.1):
    return CentredHyper(lr, 0.0)


def gradient(p, g, h):
    return g


def mean(sums, numbers, size, h):
    return sums.gradient / size


@fastopt.rule(prepare_centred, sums=fastopt.Sums({"gradient": gradient}, mean, results=("mean",), over="all"))
def centred(p, g, h):
    return p - h.lr * (g - h.mean)


def test_the_size_of_all_is_that_of_the_parameters_with_a_gradient():
    opt = fastopt.Optimizer({"a": np.zeros(3), "b": np.zeros(2), "c": np.zeros(5)}, centred, lr=1.0)
    opt.step({"a": np.array([1.0, 2.0, 3.0]), "b": None, "c": np.full(5, 10.0)})
    assert opt.params["a"].tolist() == [6.0, 5.0, 4.0]  # the mean is 56 / 8
    assert opt.params["c"].tolist() == [-3.0] * 5


# --- sums over each parameter: all that a rule can be given -----------------------------------------------------------


class Hyper(NamedTuple):
    lr: float
    rms: float
    count: float
    late: float


def prepare(t: int, lr: float = 0.1) -> Hyper:
    return Hyper(lr, 1.0, 0.0, 0.0)


def square(p, g, m, h):
    return g * g


def product(p, g, m, h):
    return p * m


def momentum(p, g, m, h):
    return m


def of_three(sums, numbers, size, h):
    """Three sums, two results, and a number of its own."""
    return math.sqrt(sums.square / size) + abs(sums.product) + abs(sums.momentum), numbers.steps, numbers.steps + size


def after_it(p, g, m, h):
    """Of what was settled before."""
    return g * h.rms


def late(sums, numbers, size, h):
    return sums.after / (size + h.count)


def descent(p, g, m, h):
    m = m + g
    return p - h.lr * (g + h.late * m) / h.rms, m


three = fastopt.Sums(
    {"square": square, "product": product, "momentum": momentum}, of_three, ("rms", "count"), ("steps",)
)
ruled = fastopt.rule(prepare, sums=(three, fastopt.Sums({"after": after_it}, late, ("late",))))(descent)


class InNumpy:
    """The same on one array in float64."""

    def __init__(self, p: np.ndarray):
        self.p, self.m, self.steps = p.astype(np.float64), np.zeros(p.shape), 0.0

    def step(self, g: np.ndarray, lr: float = 0.1) -> None:
        rms = math.sqrt((g * g).sum() / g.size) + abs((self.p * self.m).sum()) + abs(self.m.sum())
        late = (g * rms).sum() / (g.size + self.steps)
        self.steps += g.size
        self.m = self.m + g
        self.p = self.p - lr * (g + late * self.m) / rms


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_each_tensor_settled_one_after_the_other(dtype):
    rng = np.random.default_rng(1)
    params = tree(rng, dtype)
    opt = fastopt.Optimizer(params, ruled)
    oracles = {path: InNumpy(leaf) for path, leaf in params.items() if leaf.size}
    for _ in range(4):
        grads = tree(rng, dtype)
        opt.step(grads)
        for path, oracle in oracles.items():
            oracle.step(grads[path].astype(np.float64))
    rtol = 1e-11 if dtype == np.float64 else 2e-4
    for path, oracle in oracles.items():
        np.testing.assert_allclose(opt.params[path], oracle.p, rtol=rtol, atol=rtol, err_msg=path)
        assert float(opt.states["steps"][path]) == 4.0 * params[path].size
    assert float(opt.states["steps"]["empty"]) == 0.0


def test_terms_see_what_the_rule_sees():
    """The gradient scaled, clipped and decayed; p decayed: as if the caller had done it."""
    rng = np.random.default_rng(2)
    params = {"w": rng.normal(size=300), "b": rng.normal(size=7)}
    for decoupled in (False, True):
        options: dict[str, Any] = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
        opt = fastopt.Optimizer(params, ruled, max_norm=0.5, maximize=True, clip_value=0.4, ema=0.9, **options)
        oracles = {path: InNumpy(leaf) for path, leaf in params.items()}
        average = {path: leaf.copy() for path, leaf in params.items()}
        for _ in range(3):
            grads = {path: rng.normal(size=leaf.shape) for path, leaf in params.items()}
            info = opt.step(grads, grad_scale=2.0)
            for path, oracle in oracles.items():
                g = info.clip_coefficient * np.clip(-grads[path] / 2.0, -0.4, 0.4)
                if decoupled:
                    oracle.p = oracle.p * (1.0 - 0.1 * 0.1)
                oracle.step(g if decoupled else g + 0.1 * oracle.p)
                average[path] += (1.0 - 0.9) * (oracle.p - average[path])
        for path, oracle in oracles.items():
            np.testing.assert_allclose(opt.params[path], oracle.p, rtol=1e-11, err_msg=path)
            np.testing.assert_allclose(opt.ema[path], average[path], rtol=1e-11, err_msg=path)


# --- norms ------------------------------------------------------------------------------------------------------------


class NormHyper(NamedTuple):
    lr: float
    tensor: float
    all: float
    row: float
    column: float


def prepare_norms(t: int, lr: float = 1.0) -> NormHyper:
    return NormHyper(lr, 0.0, 0.0, 0.0, 0.0)


def parameter(p, g, h):
    return p


def of_gradient(p, g, h):
    return g


def counted(p, g, h):
    return h.lr


def of_norms(sums, numbers, size, h):
    """The sum is that of as many ones as there are elements."""
    return (sums.p / sums.g) * (sums.count / size)


def normed(*over: str) -> tuple[fastopt.Sums, ...]:
    norms = {"p": parameter, "g": of_gradient}
    return tuple([fastopt.Sums({"count": counted}, of_norms, (each,), over=each, norms=norms) for each in over])


def ratios(p, g, h):
    return h.tensor + h.all + h.row + h.column


of_chunks = fastopt.rule(prepare_norms, sums=normed("tensor", "all"))(ratios)
of_tiles = fastopt.rule(prepare_norms, sums=normed("tensor", "all", "row", "column"))(ratios)
of_columns = fastopt.rule(prepare_norms, sums=normed("column"))(ratios)

EXTREMES = {
    "usual": (1.0, 1.0, np.float32),
    "large in float32": (1e25, 1e20, np.float32),
    "small in float32": (1e-25, 1e-30, np.float32),
    "usual in float64": (1.0, 1.0, np.float64),
    "large": (1e250, 1e200, np.float64),
    "small": (1e-250, 1e-200, np.float64),
    "both": (1e180, 1e-180, np.float64),
}


@pytest.mark.parametrize(("of_p", "of_g", "dtype"), EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("by", ["chunks", "tiles"])
def test_norms_are_right_whether_or_not_their_squares_are(by, of_p, of_g, dtype):
    """Of each tensor, of all, of rows and of columns; their quotient is written to every element."""
    rng = np.random.default_rng(5)
    params = {path: np.asarray(of_p * leaf).astype(dtype) for path, leaf in tree(rng, np.float64).items()}
    grads = {path: np.asarray(of_g * leaf).astype(dtype) for path, leaf in tree(rng, np.float64).items()}
    opt = fastopt.Optimizer(params, of_chunks if by == "chunks" else of_tiles)
    opt.step(grads)

    def norms(tree: dict[str, np.ndarray], scale: float) -> tuple[dict[str, np.ndarray], float]:
        squares = {path: (leaf.astype(np.longdouble) / scale) ** 2 for path, leaf in tree.items()}
        found = {}
        for path, each in squares.items():
            matrix = each.reshape(each.shape[0], math.prod(each.shape[1:])) if each.ndim > 1 else each.reshape(1, -1)
            lines = (matrix.sum(axis=1, keepdims=True), matrix.sum(axis=0, keepdims=True))
            of_lines = [np.broadcast_to(np.sqrt(line), matrix.shape).reshape(each.shape) for line in lines]
            found[path] = np.stack([np.full(each.shape, np.sqrt(each.sum())), *of_lines])
        return found, np.sqrt(sum(each.sum() for each in squares.values()))

    (p, all_p), (g, all_g) = norms(params, of_p), norms(grads, of_g)
    for path, leaf in opt.params.items():
        quotients = p[path] / g[path]
        expected = all_p / all_g + (quotients[0] if by == "chunks" else quotients.sum(axis=0))
        with np.errstate(over="ignore"):
            expected = (expected * np.longdouble(of_p / of_g)).astype(dtype)
        rtol = 1e-13 if dtype == np.float64 else 1e-6
        np.testing.assert_allclose(leaf, expected, rtol=rtol, err_msg=path)


def test_norms_are_right_of_blocks_and_columns_of_different_magnitudes():
    """The sum of each block is in range, that of all is not; and a column is beside one whose squares overflow."""
    for made, norms in ((of_chunks, 2.0), (of_tiles, 4.0)):
        opt = fastopt.Optimizer({"w": np.full(4 * BLOCK, 1.2e152)}, made)
        opt.step({"w": np.ones(4 * BLOCK)})
        np.testing.assert_allclose(opt.params["w"], norms * 1.2e152, rtol=1e-13)
    columns = np.array([[1.0, 1e200], [1.0, 1e200]])
    opt = fastopt.Optimizer({"w": columns}, of_columns)
    opt.step({"w": np.ones((2, 2))})
    np.testing.assert_allclose(opt.params["w"], columns, rtol=1e-13)


def test_the_bits_of_norms_are_the_same_for_any_threads(monkeypatch):
    rng = np.random.default_rng(6)
    params, grads = tree(rng, np.float32), tree(rng, np.float32)
    found = set()
    for threads in (1, 2, 3):
        monkeypatch.setattr("fastopt.kernels.driver.get_num_threads", lambda threads=threads: threads)
        DRIVER.choose("pool" if threads > 1 else None)
        for name in ("LAMB", "LARS"):
            opt = getattr(fastopt, name)(params)
            for _ in range(3):
                opt.step(grads)
            found.add((name, opt.flat.data.tobytes()))
    DRIVER.choose()
    assert len(found) == 2


def test_a_norm_of_what_is_not_finite_is_not_either():
    for bad in (np.inf, np.nan):
        for dtype in (np.float32, np.float64):
            opt = fastopt.Optimizer({"w": np.ones((2, 3), dtype), "b": np.ones(2, dtype)}, of_tiles)
            opt.step({"w": np.array([[1, bad, 1], [1, 1, 1]], dtype), "b": np.ones(2, dtype)})
            np.testing.assert_array_equal(opt.params["b"], [3.0, 3.0] if bad == np.inf else [bad, bad])


# --- what is short for norms: Layerwise and Scaling -------------------------------------------------------------------


class PlainHyper(NamedTuple):
    lr: float


def prepare_plain(t: int, lr: float = 0.5) -> PlainHyper:
    return PlainHyper(lr)


def test_a_layerwise_rule_may_have_no_state_and_be_given_g_the_size_and_h():
    def clipped_ratio(norm_p, norm_u, size, h):
        return min(norm_p / norm_u, 10.0) + size + h.lr

    def move(p, g, ratio, h):
        return p - h.lr * ratio * g

    def twice(p, g, h):
        return g + g

    made = fastopt.rule(prepare_plain, layerwise=fastopt.Layerwise(clipped_ratio, move))(twice)
    opt = fastopt.Optimizer({"a": np.array([3.0, 4.0]), "b": np.full(4, 1e3)}, made, lr=0.5)
    opt.step({"a": np.array([0.0, 1.0]), "b": np.ones(4)})
    np.testing.assert_allclose(opt.params["a"], [3.0, 4.0 - 0.5 * (2.5 + 2.0 + 0.5)])
    np.testing.assert_allclose(opt.params["b"], np.full(4, 1e3 - 0.5 * (10.0 + 4.0 + 0.5)))


def test_decoupled_weight_decay_of_a_layerwise_rule_is_that_of_the_loop():
    """Also where the optimizer is told so: the norms are then those of what has decayed."""

    def ratio(norm_p, norm_u):
        return norm_p / norm_u

    def move(p, m, ratio, h):
        return p - h.lr * ratio * m

    def descent(p, g, m, h):
        return g, g

    for decoupled in (False, True):
        layerwise = fastopt.Layerwise(ratio, move)
        made = fastopt.rule(prepare_plain, layerwise=layerwise, decoupled=decoupled)(descent)
        told = {} if decoupled else {"decoupled_weight_decay": True}
        opt = fastopt.Optimizer({"w": np.array([3.0, 4.0])}, made, lr=0.5, weight_decay=1.0, **told)
        opt.step({"w": np.array([0.0, 7.0])})
        np.testing.assert_allclose(opt.params["w"], [1.5, 2.0 - 0.5 * 2.5])


class ScaledHyper(NamedTuple):
    lr: float
    scale: float


def test_scaling_may_have_several_numbers_and_be_given_the_size():
    def scale(norm_p, norm_g, size, seen, largest, h):
        return 1.0 / (norm_g * size), seen + norm_g, max(largest, norm_g)

    def descent(p, g, h):
        return p - h.lr * h.scale * g

    def prepare(t, lr=1.0):
        return ScaledHyper(lr, 0.0)

    made = fastopt.rule(prepare, scaling=fastopt.Scaling(scale, ("seen", "largest")))(descent)
    opt = fastopt.Optimizer({"w": np.zeros(2)}, made)
    for factor in (2.0, 1.0):
        opt.step({"w": factor * np.array([3.0, 4.0])})
    np.testing.assert_allclose(opt.params["w"], [-0.6, -0.8])
    assert {name: float(opt.states[name]["w"]) for name in made.numbers} == {"seen": 15.0, "largest": 10.0}


def test_positions_of_results_that_are_not_there_are_refused():
    made = fastopt.rule(prepare_plain, sums=fastopt.Sums({"gradient": of_gradient}, mean, (-2,)))(counted)
    with pytest.raises(TypeError, match=r"results must be fields of PlainHyper \(lr\), got -2"):
        fastopt.Optimizer({"w": np.ones(2)}, made)
    with pytest.raises(TypeError, match=r"^Sums: settle: must be a function \(sums, numbers, size, h\), got None"):
        fastopt.Sums({"g": of_gradient}, results=("lr",))
    with pytest.raises(TypeError, match=r"^Sums: terms: must be different names"):
        fastopt.Sums({"g": of_gradient}, mean, ("lr",), norms={"g": of_gradient})


# --- sums over rows and columns ---------------------------------------------------------------------------------------


class LinedHyper(NamedTuple):
    lr: float
    row: float
    column: float
    share: float
    mean: float
    total: float


def prepare_lined(t: int, lr: float = 0.1) -> LinedHyper:
    return LinedHyper(lr, 0.0, 0.0, 0.0, 0.0, 0.0)


def of_a_row(sums, numbers, size, h):
    return math.sqrt(sums.square / size), numbers.row_seen + sums.square


def share_of_a_row(sums, numbers, size, h):
    """Of what was settled before for the same row."""
    return (sums.product + sums.momentum + sums.square) / (size * (1.0 + h.row))


def after_the_row(p, g, m, h):
    return abs(g * h.row) + h.share * h.share


def of_a_column(sums, numbers, size, h):
    seen = numbers.column_seen + sums.after / size
    return math.sqrt(seen), seen


def after_the_column(p, g, m, h):
    return h.column * abs(p)


def of_a_tensor(sums, numbers, size, h):
    return sums.after / size, numbers.tensor_seen + size


def magnitude_of_all(p, g, m, h):
    return abs(g) * h.mean


def of_all(sums, numbers, size, h):
    return sums.magnitude / size + numbers.all_seen, numbers.all_seen + 1.0


@fastopt.rule(
    prepare_lined,
    sums=(
        fastopt.Sums({"square": square}, of_a_row, ("row",), ("row_seen",), over="row"),
        fastopt.Sums(
            {"product": product, "momentum": momentum, "square": square}, share_of_a_row, ("share",), over="row"
        ),
        fastopt.Sums({"after": after_the_row}, of_a_column, ("column",), ("column_seen",), over="column"),
        fastopt.Sums({"after": after_the_column}, of_a_tensor, ("mean",), ("tensor_seen",)),
        fastopt.Sums({"magnitude": magnitude_of_all}, of_all, ("total",), ("all_seen",), over="all"),
    ),
)
def lined(p, g, m, h):
    m = m + g
    return p - h.lr * (g + h.mean * m) / (h.row + h.column + h.total), m


class LinedInNumpy:
    """The same on a tree in float64, whose parameters have hyperparameters of their own."""

    def __init__(self, params: dict[str, np.ndarray], lr: dict[str, float] | None = None):
        self.p = {path: leaf.astype(np.float64) for path, leaf in params.items() if leaf.size}
        self.m = {path: np.zeros(leaf.shape) for path, leaf in self.p.items()}
        self.seen: dict[str, list[Any]] = {path: [0.0, 0.0, 0.0] for path in self.p}
        self.all_seen = 0.0
        self.lr = lr or {}

    def step(self, grads: dict[str, np.ndarray]) -> None:
        found, magnitude, size = {}, 0.0, 0
        for path, p in self.p.items():
            shape = (p.shape[0], -1) if p.ndim > 1 else (1, -1)
            p2, g, m = p.reshape(shape), grads[path].astype(np.float64).reshape(shape), self.m[path].reshape(shape)
            seen = self.seen[path]
            row = np.sqrt((g * g).mean(axis=1, keepdims=True))
            share = (p2 * m + m + g * g).mean(axis=1, keepdims=True) / (1.0 + row)
            seen[0] = seen[0] + (g * g).sum(axis=1)
            seen[1] = seen[1] + (np.abs(g * row) + share**2).mean(axis=0)
            seen[2] += g.size
            column = np.sqrt(seen[1])
            mean = (column * np.abs(p2)).mean()
            magnitude += (np.abs(g) * mean).sum()
            size += g.size
            found[path] = g, row, column, mean
        total = magnitude / size + self.all_seen
        self.all_seen += 1.0
        for path, (g, row, column, mean) in found.items():
            p = self.p[path]
            self.m[path] = self.m[path] + g.reshape(p.shape)
            change = (g + mean * self.m[path].reshape(g.shape)) / (row + column + total)
            self.p[path] = p - self.lr.get(path, 0.1) * change.reshape(p.shape)


def check_lined(opt: fastopt.Optimizer, oracle: LinedInNumpy, rtol: float) -> None:
    for path, expected in oracle.p.items():
        np.testing.assert_allclose(opt.params[path], expected, rtol=rtol, atol=rtol, err_msg=path)
        for name, seen in zip(("row_seen", "column_seen", "tensor_seen"), oracle.seen[path], strict=True):
            np.testing.assert_allclose(opt.states[name][path], seen, rtol=rtol, err_msg=f"{name} of {path}")
        assert float(opt.states["all_seen"][path]) == oracle.all_seen


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_over_rows_columns_tensors_and_all_settled_one_after_the_other(dtype):
    rng = np.random.default_rng(8)
    params = tree(rng, dtype)
    opt = fastopt.Optimizer(params, lined, overrides={"matrix": {"lr": 0.5}})
    oracle = LinedInNumpy(params, {"matrix": 0.5})
    for _ in range(3):
        grads = tree(rng, dtype)
        opt.step(grads)
        oracle.step(grads)
    check_lined(opt, oracle, 1e-11 if dtype == np.float64 else 2e-4)
    shapes = {path: (opt.states["row_seen"][path].shape, opt.states["column_seen"][path].shape) for path in params}
    assert shapes["kernel"] == ((6,), (30,))
    assert shapes["matrix"] == ((40,), (5000,))
    assert shapes["b"] == ((1,), (5,))
    assert shapes["one"] == ((1,), (1,))
    assert shapes["hollow"] == ((3,), (0,))


def test_rows_and_columns_see_what_the_rule_sees():
    """As above: the gradient scaled and clipped; and the average, which follows."""
    rng = np.random.default_rng(9)
    params = {"w": rng.normal(size=(9, 7)), "b": rng.normal(size=7)}
    opt = fastopt.Optimizer(params, lined, max_norm=0.5, maximize=True, clip_value=0.4, ema=0.9, zero_grad=True)
    oracle, average = LinedInNumpy(params), {path: leaf.copy() for path, leaf in params.items()}
    for _ in range(3):
        grads = {path: rng.normal(size=leaf.shape) for path, leaf in params.items()}
        for path, leaf in grads.items():
            opt.grads[path][...] = leaf
        info = opt.step(grad_scale=2.0)
        assert not any(leaf.any() for leaf in opt.grads.values())
        oracle.step({path: info.clip_coefficient * np.clip(-g / 2.0, -0.4, 0.4) for path, g in grads.items()})
        for path, leaf in oracle.p.items():
            average[path] += (1.0 - 0.9) * (leaf - average[path])
    check_lined(opt, oracle, 1e-11)
    for path, leaf in average.items():
        np.testing.assert_allclose(opt.ema[path], leaf, rtol=1e-11)


def test_a_matrix_without_gradient_keeps_its_rows_and_columns():
    params = {"w": np.ones((2, 3)), "u": np.ones((2, 3))}
    opt = fastopt.Optimizer(params, lined)
    opt.step({"w": np.ones((2, 3)), "u": None})
    assert opt.states["row_seen"]["w"].tolist() == [3.0, 3.0]
    assert not opt.states["row_seen"]["u"].any()
    assert not opt.states["column_seen"]["u"].any()
    assert float(opt.states["tensor_seen"]["u"]) == 0.0
    assert float(opt.states["all_seen"]["u"]) == float(opt.states["all_seen"]["w"]) == 1.0


def test_bare_arrays_are_one_row():
    p, g, m = np.ones(6), np.arange(6.0), np.zeros(6)
    rows, columns, tensor, of_all = np.zeros(1), np.zeros(6), np.zeros(1), np.zeros(1)
    oracle = LinedInNumpy({"p": p})
    lined.update_(p, g, m, rows, columns, tensor, of_all)
    oracle.step({"p": g})
    np.testing.assert_allclose(p, oracle.p["p"], rtol=1e-14)
    np.testing.assert_allclose(columns, oracle.seen["p"][1], rtol=1e-14)
    with pytest.raises(TypeError, match="column_seen: must be 6 numbers of float64, got 1 of float64"):
        lined.update_(p, g, m, rows, np.zeros(1), tensor, of_all)


def everything(opt: fastopt.Optimizer) -> list[bytes]:
    return [buffer.tobytes() for buffer in (opt.flat.data, *opt._pipeline.buffers)]


@pytest.mark.parametrize("made", [ruled, prodigy, lined], ids=lambda rule: rule.name)
def test_the_bits_are_the_same_for_any_number_of_threads_and_in_place(made):
    found = []
    before = fastopt.get_num_threads()
    try:
        for threads in (1, 2):
            for copied in (True, False):
                fastopt.set_num_threads(threads)
                opt = fastopt.Optimizer(tree(np.random.default_rng(3), np.float32), made, copy=copied)
                rng = np.random.default_rng(4)
                for _ in range(3):
                    opt.step(tree(rng, np.float32))
                found.append([leaf.tobytes() for leaf in opt.params.values()])
    finally:
        fastopt.set_num_threads(before)
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("made", [ruled, prodigy, lined], ids=lambda rule: rule.name)
def test_a_copy_and_a_resumed_run_go_on_to_the_same_bits(made, tmp_path):
    rng = np.random.default_rng(5)
    opt = fastopt.Optimizer(tree(rng, np.float32), made)
    opt.step(tree(rng, np.float32))
    opt.save(tmp_path / "run.safetensors")
    other = copy.deepcopy(opt)
    resumed = fastopt.Optimizer(tree(rng, np.float32), made)
    resumed.load(tmp_path / "run.safetensors")
    for _ in range(2):
        grads = tree(rng, np.float32)
        for each in (opt, other, resumed):
            each.step(grads)
    assert everything(opt) == everything(other) == everything(resumed)


@pytest.mark.parametrize("made", [ruled, prodigy, lined], ids=lambda rule: rule.name)
def test_a_skipped_step_leaves_the_numbers(made):
    rng = np.random.default_rng(6)
    opt = fastopt.Optimizer(tree(rng, np.float32), made, nonfinite="skip")
    opt.step(tree(rng, np.float32))
    before = everything(opt)
    grads = tree(rng, np.float32)
    grads["a"][-1] = np.nan
    assert opt.step(grads).skipped
    assert everything(opt) == before


def test_param_groups_settle_by_their_own_hyperparameters():
    rng = np.random.default_rng(7)
    params = {"w": rng.normal(size=50), "b": rng.normal(size=9)}
    opt = fastopt.Optimizer(params, ruled, overrides={"b": {"lr": 0.5}})
    oracles = {path: InNumpy(leaf) for path, leaf in params.items()}
    for _ in range(3):
        grads = {path: rng.normal(size=leaf.shape) for path, leaf in params.items()}
        opt.step(grads)
        for path, oracle in oracles.items():
            oracle.step(grads[path], lr=0.5 if path == "b" else 0.1)
    for path, oracle in oracles.items():
        np.testing.assert_allclose(opt.params[path], oracle.p, rtol=1e-12)


def test_bare_arrays_have_a_number_each():
    p, g, m, steps = np.ones(6), np.arange(6.0), np.zeros(6), np.zeros(1)
    oracle = InNumpy(p)
    ruled.update_(p, g, m, steps)
    oracle.step(g)
    np.testing.assert_allclose(p, oracle.p, rtol=1e-14)
    assert steps[0] == 6.0


# --- what cannot be ---------------------------------------------------------------------------------------------------


def two(sums, numbers, size, h):
    return sums.square, size


def one(sums, numbers, size, h):
    return sums.square


def nothing(sums, numbers, size, h):
    return None


WRONG_SUMS = [
    ({"terms": {"not a name": square}}, r"Sums: terms: must be different names of variables.*got \('not a name',\)"),
    ({"results": "rms"}, r"Sums: results: must be different names of variables, as \('scale',\), got 'rms'"),
    ({"numbers": ("d", "d")}, r"Sums: numbers: must be different names.*got \('d', 'd'\)"),
    ({"results": ()}, r"Sums: results: must name what settle gives, or numbers must, got neither"),
    ({"over": "rows"}, r"Sums: over: must be 'tensor', 'row', 'column' or 'all', got 'rows'"),
    (
        {"settle": lambda sums, h: 1.0},
        r"Sums: settle: must have the signature \(sums, numbers, size, h\), got ",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_SUMS, ids=["terms", "result", "twice", "none", "row", "settle"])
def test_sums_that_make_no_sense_are_refused_when_they_are_declared(wrong, message):
    right: dict[str, Any] = {"terms": {"square": square}, "settle": of_three, "results": ("rms",)}
    with pytest.raises(TypeError, match=f"^{message}"):
        fastopt.Sums(**{**right, **wrong})


def test_sums_that_do_not_fit_their_rule_are_refused_when_it_is_declared():
    def of_g(g, h):
        return g

    sums = fastopt.Sums({"of_g": of_g}, of_three, ("rms",))
    with pytest.raises(TypeError, match=r"terms\['of_g'\]: must have the signature \(p, g, m, h\), got \(g, h\)"):
        fastopt.rule(prepare, sums=sums)(descent)
    with pytest.raises(TypeError, match=r"rule 'descent': sums: must be a Sums or several, got 'rms'"):
        fastopt.rule(prepare, sums=["rms"])(descent)
    with pytest.raises(TypeError, match=r"rule 'descent': idle: must be None for a rule with sums"):
        fastopt.rule(prepare, sums=three, idle=fastopt.Linear())(descent)


def of_no_type(p, g, m, h):
    return None


SETTLED_OTHERWISE = {
    "no field": (square, one, ("scale",), r"results must be fields of Hyper \(lr.*got 'scale'"),
    "two values": (square, two, ("rms",), r"settle must return one number alone.* \(rms\), got a tuple of 2"),
    "nothing": (square, nothing, ("rms",), r"settle must return 1 numbers \(rms\), got none"),
    "a term of no type": (of_no_type, two, ("rms", "late"), r"terms\['square'\] must return a number, got none"),
}


@pytest.mark.parametrize("name", SETTLED_OTHERWISE)
def test_sums_that_settle_otherwise_are_refused_before_they_run(name):
    term, settle, results, message = SETTLED_OTHERWISE[name]
    made = fastopt.rule(prepare, sums=fastopt.Sums({"square": term}, settle, results))(descent)
    with pytest.raises(TypeError, match=f"rule 'descent': sums: {message}"):
        fastopt.Optimizer({"w": np.ones(3)}, made).step({"w": np.ones(3)})
