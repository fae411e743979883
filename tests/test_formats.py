"""Storage formats: every rule computes in float32 what it is given decoded, and what it returns is rounded once."""

from __future__ import annotations

import copy
import pickle
import platform
import re
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from cases import OF_EACH_KIND, PER_RULE

import fastopt
from fastopt.kernels.contract import BFLOAT16 as BF
from fastopt.kernels.contract import FLOAT16 as F16
from fastopt.kernels.contract import Features, Storage
from fastopt.kernels.cpu.backend import CPU
from fastopt.step.table import Point, hyper_of
from fastopt.storage.codes import decode, numbers_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZES = (0, 1, 7, 15, 16, 17, 33, 1000)
EVERYTHING = {"max_norm": 0.5, "clip_value": 0.5, "nonfinite": "zero", "ema": 0.9, "maximize": True}
WAYS = (
    ("float32", {"states": "bfloat16"}),
    ("float32", {"states": "float16"}),
    ("bfloat16", {}),
    ("bfloat16", {"states": "bfloat16", "master": False}),
    ("float16", {"states": "float16", "master": False}),
    ("bfloat16", {"states": "bfloat16", "compensated": True}),
    ("float16", {"compensated": True}),
)
"""The format of the parameters, and the options."""
WHOLE = [case for case in PER_RULE if case.rule.matrixwise is None]
KINDS = [case for case in OF_EACH_KIND if case.rule.name in ("adam", "lamb", "adafactor")]
COMBINED = [(case, WAYS[k % len(WAYS)], True) for k, case in enumerate(WHOLE)]
"""Every rule in one of these ways, with all step options."""
COMBINED += [(case, way, False) for case in KINDS for way in (WAYS if case.rule.name == "adam" else WAYS[1:6:2])]


def tree(dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {f"p{n}": rng.standard_normal(n) for n in SIZES}
    arrays["W"] = rng.standard_normal((33, 40)) * np.exp(rng.standard_normal((33, 40)) * 2)
    return {name: array.astype(np.float32).astype(dtype) for name, array in arrays.items()}


def made(case, dtype: str, options: dict, **more) -> fastopt.Optimizer:
    options = {**options}
    if not case.rule.states:
        options.pop("states", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rounding to the nearest without help
        return case.make(fastopt.pack(tree(dtype), dtype=dtype), **options, **more)


def wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float32) if array.dtype.itemsize == 2 else array


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def put(twin: fastopt.Optimizer, opt: fastopt.Optimizer) -> None:
    """Give a float32 optimizer the decoded parameters and states of one of other formats."""
    arrays, own = opt.state.arrays, twin.state.arrays
    for k, path in enumerate(opt.flat.paths):
        exact = wide(opt.params[path])
        if "master" in arrays:  # not where another parameter was written since
            with np.errstate(over="ignore"):
                known = arrays["master"][k].astype(opt.flat.dtype) == opt.params[path]
            exact = np.where(known, arrays["master"][k], exact)
        if "rest" in arrays:
            exact = exact + wide(arrays["rest"][k])
        twin.params[path][...] = exact
    for name, views in own.items():
        for mine, theirs in zip(views, arrays[name], strict=True):
            mine[...] = wide(theirs)


@np.errstate(over="ignore", invalid="ignore")
def check_against(twin: fastopt.Optimizer, opt: fastopt.Optimizer, what: str) -> None:
    """Every number of an optimizer is the rounding of the same number of a float32 optimizer."""
    arrays, own = opt.state.arrays, twin.state.arrays
    for k, path in enumerate(opt.flat.paths):
        exact = twin.params[path]
        assert bits(opt.params[path]) == bits(exact.astype(opt.flat.dtype)), f"{what}: {path}"
        if "master" in arrays:
            assert bits(arrays["master"][k]) == bits(exact), f"{what}: master of {path}"
        if "rest" in arrays:
            rest = (exact - wide(exact.astype(opt.flat.dtype))).astype(opt.flat.dtype)
            assert bits(arrays["rest"][k]) == bits(rest), f"{what}: rest of {path}"
        for name in own:
            assert bits(arrays[name][k]) == bits(own[name][k].astype(arrays[name][k].dtype)), f"{what}: {name} {path}"


@pytest.mark.parametrize(("case", "way", "everything"), COMBINED, ids=str)
def test_a_step_is_that_of_float32_rounded(case, way, everything):
    """Of the decoded numbers, bit for bit; with accumulated gradients, and where one is missing, as well."""
    dtype, options = way
    more = EVERYTHING if everything else {}
    opt = made(case, dtype, options, **more)
    twin = case.make(tree("float32"), **more)
    loss = {"loss": 0.5} if case.rule.inputs and not case.rule.extra else {}
    for t in range(3):
        grads = tree(dtype, seed=10 + t)
        if t == 1:
            grads["p17"] = None
        exact = {name: None if g is None else wide(g) for name, g in grads.items()}
        opt.states, twin.states  # noqa: B018 states that begin at the parameters do
        put(twin, opt)
        for optimizer, given in ((opt, grads), (twin, exact)):
            if t == 2 and not everything:
                optimizer.accumulate(given)
                optimizer.accumulate(given, weight=0.5)
                info = optimizer.step(**loss)
            else:
                info = optimizer.step(given, **loss)
        assert not info.skipped
        check_against(twin, opt, f"step {t}")
        for buffer in opt._pipeline.buffers:
            if buffer.size == opt.flat.size:
                padding = np.ones(buffer.size, bool)
                for offset, size in zip(opt.flat.offsets, opt.flat.layout.sizes, strict=True):
                    padding[offset : offset + size] = False
                assert not buffer[padding].any(), "padding"


# --- threads, chunks --------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = fastopt.get_num_threads()
    yield fastopt.set_num_threads
    fastopt.set_num_threads(before)


CODED = {"states": "int8", "rounding": "stochastic"}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("bfloat16", {"rounding": "stochastic", "states": "bfloat16"}), ("float32", CODED), ("float16", {**CODED})],
    ids=["bfloat16", "int8", "float16-int8"],
)
def test_the_bits_do_not_depend_on_threads_or_chunks(dtype, options, threads, monkeypatch):
    shapes = {"a": 70_001, "b": 300, "c": 5000, "d": 5120}
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(size).astype(np.float32).astype(dtype) for name, size in shapes.items()}
    grads = [{name: rng.standard_normal(size).astype(dtype) for name, size in shapes.items()} for _ in range(3)]

    def run() -> list[bytes]:
        opt = fastopt.AdamW(fastopt.pack(start, dtype=dtype), lr=0.01, **options)
        for g in grads:
            opt.step(g)
        for name, own in opt.grads.items():
            own[...] = grads[0][name]
        opt.step()  # neighbours are one piece of work
        return [bits(buffer) for buffer in (*opt.flat.arrays, *opt._pipeline.buffers)]

    threads(1)
    expected = run()
    threads(2)
    monkeypatch.setattr("fastopt.storage.layout.CHUNKS", 1)  # as long as they may be, instead of one block each
    assert run() == expected


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_parameters_beside_a_master_are_its_rounding_to_the_nearest(kind):
    rng = np.random.default_rng(0)
    flat = fastopt.pack({"w": rng.standard_normal(1000).astype(kind)})
    opt = fastopt.Adam(flat, states="bfloat16", rounding="stochastic", master=True)
    for _ in range(5):
        opt.step({"w": rng.standard_normal(1000).astype(kind)})
        np.testing.assert_array_equal(opt._pipeline.kept[:1000].astype(kind), opt.params["w"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", [1.0 + 0.3 / 256, -1.0 - 0.3 / 2048, 3.1e-6, -7.7e-8, 0.0, 1000.3])
def test_stochastic_rounding_is_right_on_average(dtype, target):
    """Over 10,000 elements of one step, over steps and over seeds: the mean is the number, within 4 deviations."""
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(np.float16)
    below, above = around(np.float32(target), kind)
    count = 10_000
    for seed in (0, 1, 12345):
        opt = fastopt.SGD(
            fastopt.pack({"w": np.zeros(count, kind)}), lr=1.0, rounding="stochastic", seed=seed, master=False
        )
        # The gradient is of the format, too: the step is lr times it.
        opt.lr = abs(float(np.float32(target))) or 1.0
        grad = np.full(count, -np.sign(target), kind)
        found = []
        for _ in range(3):
            opt.set_params({"w": np.zeros(count, kind)})
            opt.step({"w": grad})
            found.append(opt.params["w"].astype(np.float64))
        values = np.concatenate(found)
        assert set(values.tolist()) <= {below, above}
        if above > below:
            share = (float(np.float32(target)) - below) / (above - below)
            deviation = (share * (1.0 - share) / values.size) ** 0.5
            assert abs((values == above).mean() - share) <= 4.0 * deviation
            assert len({bits(array) for array in found}) == 3  # another step draws anew


def around(number: np.float32, kind: np.dtype) -> tuple[float, float]:
    """The numbers of a format on both sides of a number."""
    with np.errstate(invalid="ignore"):
        grid = np.arange(2**16, dtype=np.uint16).view(kind).astype(np.float64)
    grid = grid[np.isfinite(grid)]
    return float(grid[grid <= number].max()), float(grid[grid >= number].min())


def test_second_moments_in_float16_are_advised_against():
    with pytest.warns(UserWarning, match="states: v: float16 ends at 6e-8") as caught:
        fastopt.Adam({"w": W32}, states="float16")
    assert caught[0].filename == __file__
    fastopt.Adam({"w": W32}, states={"m": "float16"})


def test_small_updates_vanish_without_help_and_count_with_it():
    """1,000 steps of a hundredth of the last place of 1 in bfloat16."""
    grads = {"w": np.full(64, 1.0, BFLOAT16)}
    moved = {}
    for name, options in {
        "nearest": {"master": False},
        "master": {"master": True},
        "compensated": {"compensated": True},
        "stochastic": {"rounding": "stochastic"},
    }.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt = fastopt.SGD(fastopt.pack({"w": np.ones(64, BFLOAT16)}), lr=2.0**-14, **options)
        assert [str(each.message)[:20] for each in caught] == (["parameters of bfloat"] if name == "nearest" else [])
        for _ in range(1000):
            opt.step(grads)
        moved[name] = float(1.0 - opt.params["w"].astype(np.float32).mean())
    exact = 1000 * 2.0**-14
    assert moved["nearest"] == 0.0
    assert moved["master"] == pytest.approx(exact, rel=0.05)  # the last place of 0.94 is a fifteenth of it
    assert moved["compensated"] == pytest.approx(exact, rel=0.05)
    assert moved["stochastic"] == pytest.approx(exact, rel=0.2)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def encoded(numbers: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The codes and units of numbers, one after the other: as the page of the format says, and not as kernels do it."""
    codes, units = [], []
    table = numbers_of(kind).astype(np.float64)
    for start in range(0, numbers.size, 256):
        block = numbers[start : start + 256]
        unit = np.abs(block).max() * np.float32(1.0 / table[-1])
        units.append(unit)
        with np.errstate(invalid="ignore"):
            inverse = np.float32(1.0) / unit if unit > 0 else np.float32(0.0)
        share = np.abs(block) * inverse
        if kind == "int8":
            roots = np.minimum(np.floor(np.sqrt(share) + np.float32(0.5)), 127)
            codes.append((np.sign(block) * roots).astype(np.int8))
        else:
            places = np.abs(share.astype(np.float64)[:, None] - table[None, :])
            nearest = places.argmin(axis=1)  # of two, the smaller one
            later = np.minimum(nearest + 1, 255)
            tie = places[np.arange(block.size), nearest] == places[np.arange(block.size), later]
            nearest = np.where(tie & (nearest % 2 == 1), later, nearest)
            codes.append(np.where(block > 0, np.maximum(nearest, 1), 0).astype(np.uint8))
    return np.concatenate(codes), np.array(units, np.float32)


ELEMENTWISE = [case for case in WHOLE if not case.rule.sums and case.rule.states and not case.rule.extra]


@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_a_step_with_codes_is_that_of_float32_encoded(case):
    """Of the decoded numbers, for parameters of whole and of broken blocks; small ones stay float32."""
    rng = np.random.default_rng(1)
    sizes = {"a": 4096, "b": 5003, "small": 100, "edge": 4095}
    start = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    formats = {name: "int8" for name in case.rule.states if case.rule.initial.get(name) != "p"}
    opt, twin = case.make(start, states=formats), case.make(start)
    for t in range(3):
        grads = {
            name: (rng.standard_normal(size) * np.exp(2 * rng.standard_normal(size))).astype(np.float32)
            for name, size in sizes.items()
        }
        for name in case.rule.states:
            for path in sizes:
                twin.states[name][path][...] = opt.states[name][path]
                twin.params[path][...] = opt.params[path]
        opt.step(grads)
        twin.step(grads)
        arrays = opt.state.arrays
        for path in sizes:
            assert bits(opt.params[path]) == bits(twin.params[path]), (t, path)
        for name in formats:
            kind = "uint8" if name in case.rule.nonnegative else "int8"
            for k, path in enumerate(opt.flat.paths):
                exact = twin.states[name][path]
                if sizes[path] < 4096:
                    assert bits(arrays[name][k]) == bits(exact)
                    continue
                codes, units = encoded(exact, kind)
                assert bits(arrays[f"{name}.unit"][k]) == bits(units), (t, name, path)
                assert (arrays[name][k] == codes).all(), (t, name, path)
                assert (opt.states[name][path] == decode(codes, units)).all()


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_states_declared_nonnegative_are_and_no_others(case):
    """A state that is never below 0 has codes for that, and a state that is has not."""
    rule = case.rule
    opt, rng = case.make({"w": rng_normal(0, (20, 30)).astype(np.float64)}), np.random.default_rng(2)
    lowest = dict.fromkeys(rule.states, 0.0)
    loss = {"loss": 0.5} if "loss" in rule.inputs else {}
    for _ in range(12):
        grads = {"w": rng.standard_normal((20, 30)) * 10.0 ** rng.integers(-3, 3)}
        extra = {"extra": {name: {"w": rng.standard_normal((20, 30))} for name in rule.extra}} if rule.extra else {}
        opt.step(grads, **loss, **extra)
        for name in rule.states:
            lowest[name] = min(lowest[name], float(opt.states[name]["w"].min()))
    assert {name for name, value in lowest.items() if value >= 0.0} == set(rule.nonnegative)


@pytest.mark.parametrize("size", [4095, 4096, 4097, 5003, 70_001])
def test_a_parameter_alone_has_room_for_its_last_block(size):
    opt = fastopt.Adam({"w": np.zeros(size, np.float32)}, states="int8")
    opt.step({"w": np.linspace(-1.0, 1.0, size, dtype=np.float32)})
    assert opt.states["m"]["w"] == pytest.approx(np.linspace(-0.1, 0.1, size), abs=1.5e-3)
    assert opt.nbytes.states >= (2 * size if size >= 4096 else 8 * size)


def rng_normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_is_not_finite_stays_in_its_block(rounding):
    size = 4096
    opt = fastopt.Adam({"w": np.zeros(size, np.float32)}, states="int8", rounding=rounding)
    grad = np.full(size, 0.5, np.float32)
    grad[300], grad[1000], grad[2000] = np.nan, np.inf, 1e-42
    opt.step({"w": grad})
    finite = np.isfinite(opt.states["m"]["w"]).reshape(-1, 256).all(axis=1)
    assert finite.tolist() == [k not in (1, 3) for k in range(16)]
    assert np.isfinite(opt.params["w"].reshape(-1, 256)[finite]).all()
    opt.step({"w": np.zeros(size, np.float32)})  # zero gradients in a block of NaN
    assert np.isfinite(opt.params["w"].reshape(-1, 256)[finite]).all()


def test_a_second_moment_that_is_not_zero_never_becomes_zero():
    size = 4096
    opt = fastopt.Adam({"w": np.zeros(size, np.float32)}, states="int8", eps=0.0)
    grad = np.full(size, 1e-12, np.float32)
    grad[::256] = 1.0
    opt.step({"w": grad})
    v = opt.states["v"]["w"].reshape(-1, 256)
    assert (v > 0.0).all()
    assert (v[:, 1:] <= v[:, :1] * 2.0**-31).all()  # the smallest that there is
    assert np.isfinite(opt.params["w"]).all()


def test_numbers_beyond_float16_become_infinite_and_denormals_stay():
    opt = fastopt.SGD(fastopt.pack({"w": np.zeros(3, np.float16)}), lr=1.0)
    opt.step({"w": np.array([-6e4, 6e-8, 1.0], np.float16)})
    assert opt.params["w"].tolist() == [np.float16(6e4), -np.float16(6e-8), -1.0]
    opt.step({"w": np.array([-6e4, 0.0, np.nan], np.float16)})
    assert opt.params["w"][0] == np.inf
    assert np.isnan(opt.params["w"][2])
    opt.step({"w": np.array([1.2e4, 0.0, 0.0], np.float16)})
    assert float(opt.state.arrays["master"][0][0]) == pytest.approx(1.08e5, rel=1e-3)  # the copy has not overflowed


# --- copies, files, what is written from outside ----------------------------------------------------------------------

ALL_WAYS = [*WAYS, ("float32", {"states": "int8"}), ("bfloat16", {"rounding": "stochastic", "states": "int8"})]


def trained(dtype: str, options: dict, steps: int = 3, **more) -> fastopt.Optimizer:
    rng = np.random.default_rng(3)
    start = {"W": rng.standard_normal((80, 60)).astype(np.float32), "b": np.ones(7, np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = fastopt.Adam(fastopt.pack(start, dtype=dtype), lr=0.01, ema=0.9, **options, **more)
    for t in range(steps):
        opt.step(gradients(opt, t))
    return opt


def gradients(opt: fastopt.Optimizer, t: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + t)
    return {name: rng.standard_normal(own.shape).astype(opt.flat.dtype) for name, own in opt.params.items()}


def everything_of(opt: fastopt.Optimizer) -> list[bytes]:
    return [bits(array) for array in (*opt.flat.arrays, *[each for own in opt.state.arrays.values() for each in own])]


@pytest.mark.parametrize(("dtype", "options"), ALL_WAYS, ids=str)
def test_copies_and_files_continue_bit_for_bit(dtype, options, tmp_path):
    opt = trained(dtype, options)
    opt.save(tmp_path / "run.safetensors")
    loaded, from_dict = trained(dtype, options, steps=0), trained(dtype, options, steps=0)
    loaded.load(tmp_path / "run.safetensors")
    from_dict.set_params(opt.params)
    from_dict.load_state_dict(opt.state_dict())
    twins = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), loaded]
    if "compensated" not in options:  # what rounding left is no part of a state without parameters
        twins.append(from_dict)
    for t in range(3, 5):
        for each in (opt, *twins):
            each.step(gradients(opt, t))
    for each in twins:
        assert everything_of(each) == everything_of(opt)


@pytest.mark.parametrize("options", [{}, {"compensated": True}, {"rounding": "stochastic"}], ids=str)
def test_a_parameter_that_is_written_is_what_the_next_step_begins_at(options):
    opt = trained("bfloat16", options)
    opt.params["W"][...] = 4.0
    opt.lr = 2.0**-20
    opt.step(gradients(opt, 9))
    assert np.abs(opt.params["W"].astype(np.float32) - 4.0).max() <= 2.0**-6


@pytest.mark.parametrize("options", [{}, {"compensated": True}], ids=str)
def test_parameters_that_were_held_elsewhere_come_back_exactly(options):
    opt = trained("bfloat16", options)
    before = everything_of(opt)
    with opt.swap_ema() as params:
        assert bits(params["W"]) == bits(opt.ema["W"].astype(BFLOAT16))
    assert everything_of(opt) == before
    ahead = fastopt.Nesterov(fastopt.pack({"w": np.ones(33, BFLOAT16)}), form="lookahead", ema=0.9, **options)
    for _ in range(2):
        with ahead.lookahead() as params:
            g = {"w": (params["w"].astype(np.float32) * 0.3).astype(BFLOAT16)}
        ahead.step(g)
    before = everything_of(ahead)
    with ahead.lookahead() as params:
        assert bits(params["w"]) != before[0]
    assert everything_of(ahead) == before


def test_uint16_is_taken_for_bits_where_it_is_said():
    numbers = np.array([1.5, -2.0], BFLOAT16)
    flat = fastopt.pack({"w": numbers.view(np.uint16)}, dtype="bfloat16")
    assert flat.params["w"].tolist() == [1.5, -2.0]
    with pytest.raises(TypeError, match=r"parameter 'w': must have dtype .* got uint16; use .*dtype='bfloat16'"):
        fastopt.pack({"w": numbers.view(np.uint16)})


# --- bad input --------------------------------------------------------------------------------------------------------

W32, W64, W16 = (np.ones((4, 4), dtype) for dtype in (np.float32, np.float64, np.float16))
BAD = {
    "unknown": (lambda: fastopt.Adam({"w": W32}, states="fp8"), ValueError, "states: must be one of .*got 'fp8'"),
    "no text": (lambda: fastopt.Adam({"w": W32}, states=8), TypeError, r"states: must be one of .*got 8 \(int\)"),
    "of one": (lambda: fastopt.Adam({"w": W32}, states={"m": "int4"}), ValueError, "states: m: must be .*'int4'"),
    "no state": (lambda: fastopt.Adam({"w": W32}, states={"u": "int8"}), ValueError, "states: must name states of"),
    "float64": (lambda: fastopt.Adam({"w": W64}, states="bfloat16"), ValueError, "states: must be None for .*float64"),
    "master": (lambda: fastopt.Adam({"w": W64}, master=True), ValueError, "master: must be False .*float64"),
    "master 32": (lambda: fastopt.Adam({"w": W32}, master=True), ValueError, "master: must be False .*float32"),
    "rounding": (lambda: fastopt.Adam({"w": W32}, rounding="up"), ValueError, "rounding: must be .*got 'up'"),
    "nothing to round": (
        lambda: fastopt.Adam({"w": W32}, rounding="stochastic"),
        ValueError,
        "rounding: must be 'nearest' where no buffer",
    ),
    "both": (
        lambda: fastopt.Adam({"w": W16}, master=True, compensated=True),
        ValueError,
        "compensated: must be False together with master",
    ),
    "both kinds": (
        lambda: fastopt.Adam({"w": W16}, rounding="stochastic", compensated=True),
        ValueError,
        "compensated: must be False together with rounding",
    ),
    "seed": (lambda: fastopt.Adam({"w": W16}, seed=-1), ValueError, "seed: must be an int >= 0, got -1"),
    "size of codes": (
        lambda: fastopt.Adam({"w": W32}, states="int8", min_8bit_size=-1),
        ValueError,
        "min_8bit_size: must be an int from 0, or a dict .* got -1",
    ),
    "size of codes by glob": (
        lambda: fastopt.Adam({"w": W32}, states="int8", min_8bit_size={"w": 2.5}),
        TypeError,
        r"min_8bit_size\['w'\]: must be .*, got 2.5",
    ),
    "no glob": (
        lambda: fastopt.Adam({"w": W32}, states="int8", min_8bit_size={3: 4}),
        TypeError,
        "min_8bit_size: must be .* got the key 3",
    ),
    "glob of nothing": (
        lambda: fastopt.Adam({"w": W32}, states="int8", min_8bit_size={"v*": 4}),
        ValueError,
        r"min_8bit_size\['v\*'\]: must match a parameter; the paths are w",
    ),
    "sums": (lambda: fastopt.LAMB({"w": W32}, states="int8"), ValueError, "states: m: must not be 'int8'.*sums"),
    "matrices": (lambda: fastopt.Muon({"w": W32}, states="bfloat16"), ValueError, "states: must be None, .*'muon'"),
    "members": (
        lambda: fastopt.Adam({"w": W32}, states="int8", members=4),
        ValueError,
        "states: m: must not be 'int8', because .*members",
    ),
    "int8 parameters": (lambda: fastopt.pack({"w": W32}, dtype="int8"), TypeError, "dtype: must be .*got 'int8'"),
    "mixed": (
        lambda: fastopt.Adam({"w": W32, "v": W16}),
        TypeError,
        "must have dtype float16 as|must have dtype float",
    ),
    "gradient": (
        lambda: fastopt.Adam({"w": W16}).step({"w": W32}),
        TypeError,
        "gradient 'w': must have dtype float16 .*got float32",
    ),
    "rows": (
        lambda: fastopt.Adam({"w": W16}).step_rows({"w": (np.array([0]), W16[:1])}),
        ValueError,
        r"step_rows\(\): must have parameters and states of float32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        make()


def test_another_format_is_not_loaded_unasked(tmp_path):
    trained("float32", {"states": "bfloat16"}).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"states: .*|must be saved with states=None"):
        trained("float32", {}).load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("there", ALL_WAYS, ids=str)
@pytest.mark.parametrize("here", ALL_WAYS, ids=str)
def test_another_format_is_converted_where_it_is_asked_for(there, here, tmp_path):
    """Every number is the rounding of the saved one."""
    saved, opt = trained(*there), trained(*here, steps=0)
    saved.save(tmp_path / "a.safetensors")
    opt.load(tmp_path / "a.safetensors", convert=True)
    assert opt.step_count == 3
    before, after = saved.state.arrays, opt.state.arrays
    for k, path in enumerate(opt.flat.paths):
        exact = wide(saved.params[path])
        if "master" in before:
            exact = before["master"][k]
        if "rest" in before:
            exact = exact + wide(before["rest"][k])
        assert bits(opt.params[path]) == bits(exact.astype(opt.flat.dtype))
        if "master" in after:
            assert bits(after["master"][k]) == bits(exact)
        if "rest" in after:
            left = exact - wide(opt.params[path])
            assert bits(after["rest"][k]) == bits(left.astype(opt.flat.dtype))
        for name in ("m", "v"):
            numbers = wide(saved.states[name][path])
            if after[name][k].dtype.kind in "iu":
                codes, units = encoded(numbers.reshape(-1), after[name][k].dtype.name)
                assert (codes == after[name][k].reshape(-1)).all()
                assert bits(units) == bits(after[f"{name}.unit"][k])
            else:
                with np.errstate(over="ignore"):
                    assert bits(after[name][k]) == bits(numbers.astype(after[name][k].dtype))
    opt.step(gradients(opt, 5))


def test_a_process_that_has_not_seen_bfloat16_converts_it(tmp_path):
    trained("bfloat16", {"states": "bfloat16"}).save(tmp_path / "a.safetensors")
    code = f"""
import numpy as np, fastopt
opt = fastopt.Adam({{"W": np.zeros((80, 60), np.float32), "b": np.zeros(7, np.float32)}}, lr=0.01, ema=0.9)
opt.load({str(tmp_path / "a.safetensors")!r}, convert=True)
print(opt.step_count, float(opt.params["b"][0]) > 0.5)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["3", "True"]


def test_float64_is_converted_as_well(tmp_path):
    start = {"w": np.linspace(0.1, 1.0, 50)}
    opt = fastopt.Adam(start)
    opt.step({"w": np.full(50, 0.3)})
    opt.save(tmp_path / "a.safetensors")
    half = fastopt.Adam(fastopt.pack(start, dtype="float32"))
    with pytest.raises(ValueError, match=r"must hold float32 parameters.*or load with convert=True"):
        half.load(tmp_path / "a.safetensors")
    half.load(tmp_path / "a.safetensors", convert=True)
    assert bits(half.params["w"]) == bits(opt.params["w"].astype(np.float32))
    with pytest.raises(ValueError, match="convert: must be False with strict=False"):
        half.load(tmp_path / "a.safetensors", convert=True, strict=False)


# --- memory, loss scaling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "options"), ALL_WAYS, ids=str)
def test_bytes_are_those_of_the_buffers(dtype, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = fastopt.Adam(fastopt.pack({"w": np.zeros(2**16, np.float32)}, dtype=dtype), **options)
    found, formats = opt.nbytes, opt._pipeline.formats
    assert found.states == 2**16 * formats.bytes_per_element
    assert found.parameters == 2**16 * opt.flat.dtype.itemsize
    assert found.gradients == 0
    assert found.scratch == 0
    opt.accumulate({"w": np.ones(2**16, opt.flat.dtype)})
    assert opt.nbytes.scratch == 4 * 2**16
    assert opt.nbytes.total == sum(opt.nbytes)


def test_the_loss_scale_grows_and_backs_off_and_leaves_the_update_as_it_is():
    scaler = fastopt.LossScaler(init_scale=8.0, growth_interval=2)
    opt = fastopt.SGD(fastopt.pack({"w": np.ones(3, np.float16)}), lr=0.5, nonfinite="skip")
    scales = []
    for t in range(6):
        grad = np.full(3, scaler.scale, np.float16)
        if t == 3:
            grad[1] = np.inf
        info = scaler.step(opt, {"w": grad})
        assert bool(info.skipped) == (t == 3)
        scales.append(scaler.scale)
    assert scales == [8.0, 16.0, 16.0, 8.0, 8.0, 16.0]
    assert opt.params["w"].tolist() == [1.0 - 5 * 0.5] * 3
    twin = fastopt.LossScaler()
    twin.load_state_dict(scaler.state_dict())
    assert (twin.scale, twin.growth_tracker, twin.growth_interval) == (16.0, 0, 2)
    with pytest.raises(ValueError, match=r"state: must have .*, got no scale"):
        twin.load_state_dict({})
    with pytest.raises(ValueError, match="optimizer: must have nonfinite='skip', got nonfinite='propagate'"):
        scaler.step(fastopt.SGD({"w": W32}), {"w": W32})
    with pytest.raises(ValueError, match=r"backoff_factor: must be .*< 1, got 2"):
        fastopt.LossScaler(backoff_factor=2)


def test_the_loss_scale_stays_where_its_inverse_is_normal():
    scaler = fastopt.LossScaler(init_scale=2.0**126, growth_interval=1)
    scaler.update(skipped=False)
    assert scaler.scale == 2.0**126


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_nan_of_any_bits_stays_one(dtype):
    """Rounding its bits could make it infinite, or zero."""
    patterns = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001, 0x7FC00000, 0x7F80FFFF], np.uint32)
    for options in ({"states": dtype}, {"states": dtype, "rounding": "stochastic"}):
        opt = fastopt.Momentum({"w": np.zeros(48, np.float32)}, **options)
        opt.step({"w": np.resize(patterns, 48).view(np.float32)})
        assert np.isnan(opt.states["velocity"]["w"].astype(np.float32)).all()


@pytest.mark.parametrize("states", ["bfloat16", "int8", {"m": "int8", "v": "bfloat16"}], ids=str)
def test_numbers_of_one_element_are_drawn_apart(states):
    """m and v, p and both: what is rounded up in one says nothing about the others."""
    count = 20_480
    opt = fastopt.Adam(
        fastopt.pack({"w": np.ones(count, BFLOAT16)}), lr=0.3, betas=(0.7, 0.7), rounding="stochastic", states=states
    )
    grad = np.full(count, 0.7001, BFLOAT16)
    grad[::256] = 8.0
    opt.step({"w": grad})
    others = np.arange(count) % 256 > 0
    up = [array["w"].astype(np.float64)[others] for array in (opt.params, opt.states["m"], opt.states["v"])]
    up = [array - array.mean() for array in up]
    for k in range(3):
        assert up[k].std() > 0.0
        for j in range(k):
            correlation = float((up[k] * up[j]).mean() / (up[k].std() * up[j].std()))
            assert abs(correlation) < 4.0 / count**0.5


def test_codes_are_right_on_average():
    """Over the elements of a block whose largest number stands in the last one, and over steps."""
    size, found = 4096, {"m": [], "v": []}
    grad = np.full(size, 0.37, np.float32)
    grad[255::256] = 10.0
    for seed in range(40):
        opt = fastopt.Adam({"w": np.zeros(size, np.float32)}, states="int8", rounding="stochastic", seed=seed)
        opt.step({"w": grad})
        for name, arrays in found.items():
            arrays.append(opt.states[name]["w"].reshape(-1, 256)[:, :255].astype(np.float64).reshape(-1))
    for name, exact in (("m", 0.1 * 0.37), ("v", 0.001 * 0.37**2)):
        values = np.concatenate(found[name])
        assert len(set(values.round(9).tolist())) == 2
        assert values.mean() == pytest.approx(exact, abs=4.0 * values.std() / values.size**0.5, rel=1e-4)
        assert len({array.tobytes() for array in found[name]}) == 40
        blocks = found[name][0].reshape(-1, 255)
        assert len({block.tobytes() for block in blocks}) == len(blocks)  # no block draws as another does


SHAPES = {"b": (300,), "emb.in": (40, 128), "emb.out": (20, 128), "w": (5000,)}


@pytest.mark.parametrize(
    ("sizes", "coded"),
    [
        (4096, ["emb.in", "w"]),
        (0, [*SHAPES]),
        (301, ["emb.in", "emb.out", "w"]),
        (10**9, []),
        ({"emb*": 10**9}, ["w"]),
        ({"emb*": 10**9, "emb.in": 1, "b": 300}, ["b", "emb.in", "w"]),
    ],
    ids=str,
)
def test_which_parameters_have_codes_can_be_chosen(sizes, coded):
    """The others have the states of float32, to the bit."""
    rng = np.random.default_rng(0)
    start, *grads = [{k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()} for _ in range(3)]
    opt, plain = fastopt.Adam(start, states="int8", min_8bit_size=sizes), fastopt.Adam(start)
    for g in grads:
        opt.step(g)
        plain.step(g)
    for name, kind in (("m", np.int8), ("v", np.uint8)):
        for path, array, exact in zip(opt.flat.paths, opt.state.arrays[name], plain.state.arrays[name], strict=True):
            assert array.dtype == (kind if path in coded else np.float32), path
            assert path in coded or bits(array) == bits(exact)
    for path in {*SHAPES} - {*coded}:
        assert bits(opt.params[path]) == bits(plain.params[path])


def test_a_file_of_other_sizes_says_so_and_is_converted(tmp_path):
    rng = np.random.default_rng(0)
    start = {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
    opt = fastopt.Adam(start, states="int8", min_8bit_size={"emb*": 10**9})
    opt.step(start)
    opt.save(tmp_path / "run")
    other = fastopt.Adam(start, states="int8")
    with pytest.raises(ValueError, match=r"must be saved with min_8bit_size=4096, as this optimizer, got .*'emb\*'"):
        other.load(tmp_path / "run")
    other.load(tmp_path / "run", convert=True)
    assert bits(other.params["emb.in"]) == bits(opt.params["emb.in"])
    np.testing.assert_allclose(other.states["m"]["emb.in"], opt.states["m"]["emb.in"], atol=0.01 * 0.5)
    same = fastopt.Adam(start, states="int8", min_8bit_size={"emb*": 10**9})
    same.load(tmp_path / "run")
    for mine, theirs in zip(same._pipeline.buffers, opt._pipeline.buffers, strict=True):
        assert bits(mine) == bits(theirs)


def test_set_params_forgets_what_rounding_had_left():
    opt = fastopt.SGD(fastopt.pack({"w": np.ones(4, BFLOAT16)}), lr=2.0**-10, compensated=True)
    opt.step({"w": np.ones(4, BFLOAT16)})
    assert opt.state.arrays["rest"][0].astype(np.float32).all()
    opt.set_params({"w": np.full(4, 2.0**-12, BFLOAT16)})
    assert not opt.state.arrays["rest"][0].astype(np.float32).any()


CONVERSIONS = re.compile(r"\b(vpmov[sz]x[bw]d|vpackus[dw][wb]|vpmovd[bw]|vpermt2[bw]|vcvtph2ps|vcvtps2ph|vpshufb)\b")
"""Of vectors of 16 and 8 bits, on x86-64 with AVX2 or AVX-512."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of instructions of x86-64")
def test_float32_pays_nothing_and_formats_are_vectorised(monkeypatch):
    """The loop over float32 has none of the conversions, and those of formats are of whole vectors."""
    monkeypatch.setattr("fastopt.kernels.cache.load", lambda name: None)  # only compiled code can be shown
    monkeypatch.setattr("fastopt.kernels.cache.save", lambda name, result: False)
    backend, rule = CPU(), fastopt.rules.adamw
    point = Point.of(rule, rule.complete({"lr": 1e-3}))
    found = {}
    for name, states in {
        "float32": None,
        "bfloat16": (BF, BF),
        "float16": (F16, F16),
        "int8": ("int8", "uint8"),
    }.items():
        storage = None if states is None else Storage("float32", "float32", states)
        kernel = backend.kernel(rule, hyper_of(rule, point), np.dtype(np.float32), Features(), None, storage)
        text = kernel._loop.compiled.assembly()
        found[name] = set(CONVERSIONS.findall(text))
        assert "vsqrtps" in text
    assert found["float32"] == set()
    assert "vpmovzxwd" in found["bfloat16"]
    assert found["bfloat16"] & {"vpackusdw", "vpmovdw", "vpermt2w"}
    assert {"vcvtph2ps", "vcvtps2ph"} <= found["float16"]
    assert found["int8"]
