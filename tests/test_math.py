"""exp, log, tanh, pow and uniform for rules: how exact, in which dtype, the same bits everywhere, vectorised."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import mpmath
import numba
import numpy as np
import pytest
from cases import DTYPES, MATHEMATICS, OfMathematics, prepare_mathematics

import fastopt
from fastopt.kernels import typed
from fastopt.kernels.bind import bind
from fastopt.kernels.contract import Features
from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.elements import scalar
from fastopt.math import exp as renamed
from fastopt.random import philox

FUNCTIONS = {"exp": mpmath.exp, "log": mpmath.log, "tanh": mpmath.tanh, "pow": mpmath.power}
MOST_ULPS = {"exp": 1.0, "log": 1.0, "tanh": 1.5, "pow": 1.2}
"""Of the true value. The docstrings promise 1, 1, 2 and 2."""
SPECIAL = [0.0, 1.0, math.inf, 2.0, 0.5, 3.0, 2.5, 5e-324, 1e-45, 1e308, 3e38, 2.0**53, 2.0**53 - 1, 2.0**24 - 1]
SPECIAL += [1.0 + 2.0**-52, 1.0 - 2.0**-53, 1.0 + 2.0**-23, 1.0 - 2.0**-24, 709.78, 745.2, 88.7, 103.9, 0.625, 20.0]
SPECIAL = [*SPECIAL, *(-number for number in SPECIAL), math.nan]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def numbers(rng: np.random.Generator, size: int, dtype: Any) -> np.ndarray:
    """Of every exponent, denormal numbers among them, and of both signs."""
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    found = rng.integers(0, np.iinfo(bits).max, size, bits, endpoint=True).view(dtype)
    return np.where(np.isfinite(found), found, dtype(1))


def arguments(name: str, dtype: Any, size: int = 1000) -> list[tuple[np.ndarray, ...]]:
    """Where a function is tested: over its whole range, and where it is hard."""
    rng = np.random.default_rng(len(name) + np.dtype(dtype).itemsize)
    low, high = (-104.5, 88.8) if dtype == np.float32 else (-746.0, 709.9)
    near_one = (1 + rng.normal(size=size) * 10.0 ** rng.uniform(-8, -0.3, size)).clip(0.01).astype(dtype)
    small = (rng.normal(size=size) * 10.0 ** rng.uniform(-6, 1, size)).astype(dtype)
    if name == "exp":
        return [(rng.uniform(low, high, size).astype(dtype),), (small,), (numbers(rng, size, dtype),)]
    if name == "log":
        return [(abs(numbers(rng, size, dtype)),), (near_one,), (rng.uniform(0.5, 2, size).astype(dtype),)]
    if name == "tanh":
        return [(rng.uniform(-1.5, 1.5, size).astype(dtype),), (small,), (numbers(rng, size, dtype),)]
    found: list[tuple[np.ndarray, ...]] = [(abs(small) + dtype(1e-3), rng.uniform(-3, 3, size).astype(dtype))]
    for x in (abs(numbers(rng, size, dtype)), near_one, abs(small)):
        x = x[(x != 1) & (x > 0)]
        with np.errstate(over="ignore"):
            y = (rng.uniform(low, high, x.size) / np.log(x.astype(np.float64))).astype(dtype)
        found.append((x[np.isfinite(y)], y[np.isfinite(y)]))
    whole = rng.integers(-9, 10, size).astype(dtype)
    found.append((rng.normal(size=size).astype(dtype), np.where(whole == 0, dtype(1), whole)))
    return found


def ulps(found: np.ndarray, exact: list[Any]) -> np.ndarray:
    """The distance from the true values in units in the last place: of the smallest normal number below it."""
    info = np.finfo(found.dtype)
    errors = []
    for number, true in zip(map(float, found), exact, strict=True):
        if not math.isfinite(number):  # right where the true value rounds to it
            largest = mpmath.mpf(float(info.max)) * (1 + mpmath.mpf(2) ** (-info.nmant - 2))
            errors.append(0.0 if abs(true) >= largest and (true > 0) == (number > 0) else math.inf)
            continue
        exponent = int(mpmath.floor(mpmath.log(abs(true), 2))) if true else info.minexp
        unit = mpmath.mpf(2) ** (max(exponent, int(info.minexp)) - info.nmant)
        errors.append(float(abs(mpmath.mpf(number) - true) / unit))
    return np.array(errors)


def true_values(name: str, given: tuple[np.ndarray, ...]) -> list[Any]:
    with mpmath.workprec(160):
        return [FUNCTIONS[name](*[mpmath.mpf(float(x)) for x in each]) for each in zip(*given, strict=True)]


def same_bits(found: Any, expected: Any) -> bool:
    """Also the sign of 0; every NaN is as good as another."""
    found, expected = np.asarray(found), np.asarray(expected)
    equal = (found == expected) & (np.signbit(found) == np.signbit(expected)) | np.isnan(found) & np.isnan(expected)
    return found.dtype == expected.dtype and found.shape == expected.shape and bool(equal.all())


# --- how exact --------------------------------------------------------------------------------------------------------


@every_dtype
@every_function
def test_errors_are_about_one_unit_in_the_last_place_over_the_whole_range(name, dtype):
    for given in arguments(name, dtype):
        assert ulps(getattr(fastopt.math, name)(*given), true_values(name, given)).max() <= MOST_ULPS[name]


@every_dtype
@every_function
def test_fused_multiplications_and_additions_as_on_cuda_cost_no_exactness(name, dtype):
    contracted = numba.njit(fastmath={"contract"}, error_model="numpy")
    target = typed.on_cpu()._replace(name="contracted", scalar=contracted)
    function = contracted(getattr(fastopt.math, name).form(dtype, target))
    for given in arguments(name, dtype, 300):
        found = np.array([function(*each) for each in zip(*given, strict=True)], dtype)
        assert ulps(found, true_values(name, given)).max() <= MOST_ULPS[name]


@every_dtype
@every_function
def test_zeros_infinities_nan_and_the_ends_of_the_range_are_those_of_ieee_754(name, dtype):
    """As in the C library, which NumPy asks."""
    with np.errstate(all="ignore"):
        given = [np.array(SPECIAL).astype(dtype)]
        if name == "pow":
            given = [part.reshape(-1) for part in np.meshgrid(given[0], given[0])]
        expected = {"pow": np.power}.get(name, getattr(np, name, None))(*given)
        found = getattr(fastopt.math, name)(*given)
        close = np.isfinite(expected) & (np.abs(found - expected) <= 2 * np.spacing(np.abs(expected)))
        close &= np.signbit(found) == np.signbit(expected)
    assert same_bits(found[~close], expected[~close])


# --- the same bits everywhere -----------------------------------------------------------------------------------------


def gradient(name: str, dtype: Any, size: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    if name == "uniform_of":
        return rng.integers(-(2**20), 2**20, size).astype(dtype)
    g = (rng.normal(size=size) * 10.0 ** rng.uniform(-2, 2, size)).astype(dtype)
    g[: len(SPECIAL)] = np.array(SPECIAL[:size]).astype(dtype)
    return abs(g) if name in ("log_of", "pow_of", "power_of") else g


def in_numpy(name: str, p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The rule as plain Python, on whole arrays."""
    hyper = OfMathematics(*map(p.dtype.type, prepare_mathematics(1)))
    return MATHEMATICS[name](p, g, hyper)


@every_dtype
@pytest.mark.parametrize("name", MATHEMATICS)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_rule_has_the_bits_of_the_same_rule_in_numpy_with_any_number_of_threads(name, dtype):
    before = fastopt.get_num_threads()
    p = abs(np.random.default_rng(0).normal(size=200_003)).astype(dtype)
    g = gradient(name, dtype, p.size)
    expected = in_numpy(name, p, g)
    assert expected.dtype == dtype
    try:
        for threads in sorted({1, before}):
            fastopt.set_num_threads(threads)
            for size in (p.size, 61):  # of no vector's width
                opt = fastopt.Optimizer({"w": p[:size]}, MATHEMATICS[name])
                opt.step({"w": g[:size]})
                assert same_bits(opt.params["w"], expected[:size])
    finally:
        fastopt.set_num_threads(before)


@every_dtype
@pytest.mark.parametrize("name", MATHEMATICS)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_number_and_a_compiled_function_have_the_bits_of_an_array(name, dtype):
    p = abs(np.random.default_rng(1).normal(size=70)).astype(dtype)
    g = gradient(name, dtype, p.size)
    expected = in_numpy(name, p, g)
    assert same_bits([in_numpy(name, *each) for each in zip(p, g, strict=True)], expected)

    rule = numba.njit(error_model="numpy")(MATHEMATICS[name].scalar)
    hyper = OfMathematics(*map(dtype, prepare_mathematics(1)))
    assert same_bits(np.array([rule(*each, hyper) for each in zip(p, g, strict=True)], dtype), expected)


def of_its_module(p, g, h):
    return fastopt.math.exp(g)


def of_its_name(p, g, h):
    return renamed(g)


def through_another(p, g, h):
    return of_its_name(p, g, h)


@pytest.mark.parametrize("function", [of_its_module, of_its_name, through_another])
def test_a_rule_reaches_a_function_by_any_name(function):
    rule = fastopt.rule(prepare_mathematics)(function)
    opt = fastopt.Optimizer({"w": np.zeros(3, np.float32)}, rule)
    opt.step({"w": np.array([0, 1, -1], np.float32)})
    assert same_bits(opt.params["w"], fastopt.math.exp(np.array([0, 1, -1], np.float32)))


# --- dtypes and what is refused ---------------------------------------------------------------------------------------


def test_the_result_has_the_dtype_of_the_floats():
    assert fastopt.math.exp(np.float32(1)).dtype == np.float32
    assert fastopt.math.exp(1).dtype == fastopt.math.exp(1.0).dtype == np.float64
    assert fastopt.math.pow(np.float32(2), 3).dtype == np.float32
    assert fastopt.math.pow(np.ones(2, np.float32), np.arange(2)).dtype == np.float32
    assert fastopt.math.pow(np.ones(2, np.float32), np.ones(2)).dtype == np.float64
    assert fastopt.math.pow(np.ones((3, 1)), np.ones(2)).shape == (3, 2)
    assert fastopt.math.log(np.ones((0, 4), np.float32)).shape == (0, 4)


def test_compiled_functions_follow_the_same_rule():
    @numba.njit
    def power(x, y):
        return fastopt.math.pow(x, y)

    assert [power(np.float32(3), 2), power(3, 2), power(True, 0.5)] == [9.0, 9.0, 1.0]
    kinds = [(numba.float32, numba.int64), (numba.int64, numba.int64), (numba.float32, numba.float64)]
    for kind in kinds:
        power.compile(kind)
    returned = [power.overloads[kind] for kind in kinds]
    assert [each.signature.return_type for each in returned] == [numba.float32, numba.float64, numba.float64]


def test_half_and_complex_numbers_are_refused():
    with pytest.raises(TypeError, match=r"^tanh: must be given float32, float64 or integers, got float16$"):
        fastopt.math.tanh(np.ones(2, np.float16))
    with pytest.raises(TypeError, match=r"^exp: must be given float32, float64 or integers, got complex128$"):
        fastopt.math.exp(1j)
    with pytest.raises(numba.TypingError, match="complex128"):
        numba.njit(of_its_name)(1j, 1j, None)


def test_a_literal_exponent_that_promotes_a_rule_is_refused():
    @fastopt.rule(prepare_mathematics)
    def literal(p, g, h):
        return fastopt.math.pow(p, 0.5)

    with pytest.raises(TypeError, match="must return float32, got p as float64"):
        fastopt.Optimizer({"w": np.ones(2, np.float32)}, literal)


def test_a_function_is_copied_and_pickled_by_its_name():
    for function in (fastopt.math.exp, fastopt.uniform):
        assert copy.deepcopy(function) is function
        assert pickle.loads(pickle.dumps(function)) is function
    assert repr(fastopt.uniform) == "<function fastopt.random.uniform>"


# --- machine code -----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("name", MATHEMATICS)
def test_a_rule_that_calls_a_function_is_vectorised(name, dtype, compiled_anew):
    kernel = cpu.CPU().kernel(MATHEMATICS[name], OfMathematics, np.dtype(dtype), Features())
    assembly = kernel._loop.compiled.assembly()
    letter, lanes = {4: ("s", "4s"), 8: ("d", "2d")}[np.dtype(dtype).itemsize]
    several = (
        r"^\tv?pmuludq\t|^\tumull2?\s" if name == "uniform_of" else rf"^\tv?mulp{letter}\t|^\tfmul\s+v\d+\.{lanes}"
    )
    assert len(re.findall(several, assembly, re.MULTILINE)) >= 8
    assert not re.search(r"(call|bl)\w*\s.*\b(exp|log|tanh|pow|floor)f?\b", assembly)


def test_the_name_of_a_kernel_depends_on_the_formula_and_on_its_constants(monkeypatch):
    def named() -> str:
        return bind(of_its_name, {}, label="r", scalar=scalar).__name__

    def other(x):
        return NUMBER(x)  # noqa: F821 what `typed` supplies

    first = named()
    assert named() == first
    constants = {dtype: {**values, "LN2_LOW": dtype.type(0)} for dtype, values in fastopt.math.BY_DTYPE.items()}
    functions = [(other, fastopt.math.BY_DTYPE), (renamed._function, constants)]
    for formula, its_constants in functions:
        changed = typed.TypedFunction(formula, its_constants, renamed._parts)
        typed.KNOWN.remove(changed)
        monkeypatch.setitem(globals(), "renamed", changed)
        assert named() != first


# --- random numbers ---------------------------------------------------------------------------------------------------

WORD = 0xFFFFFFFF
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
"""Of philox4x32-10, in the file kat_vectors of the authors' library, Random123 1.14."""


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert tuple(map(int, philox(*map(np.uint64, (*counter, *key))))) == expected


def chi_squared(counts: np.ndarray) -> float:
    """In standard deviations from what is expected of uniform counts."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (float(((counts - expected) ** 2).sum() / expected) - freedom) / math.sqrt(2 * freedom)


STREAMS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "indices": lambda n: (7, np.arange(n)),
    "seeds": lambda n: (np.arange(n), 7),
    "both": lambda n: (np.arange(n), np.arange(n)),
    "far": lambda n: (2**62 + 1, -(2**62) + np.arange(n) * 2**32),
}


@every_dtype
@pytest.mark.parametrize("stream", STREAMS)
def test_numbers_are_uniform_and_neighbours_are_independent(stream, dtype):
    n = 1 << 18
    seed, index = STREAMS[stream](n)
    if dtype == np.float32 and stream != "far":  # which no float32 holds
        seed = np.asarray(seed, np.float32)
    u = fastopt.uniform(seed, index)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(chi_squared(np.bincount((u * 1024).astype(int), minlength=1024))) < 5
    for lag in (1, 2, 64):
        pairs = (u[:-lag] * 32).astype(int) * 32 + (u[lag:] * 32).astype(int)
        assert abs(chi_squared(np.bincount(pairs, minlength=1024))) < 5
        correlation = float(np.mean((u[:-lag] - 0.5) * (u[lag:] - 0.5), dtype=np.float64)) * 12
        assert abs(correlation) * math.sqrt(n) < 5


def test_every_bit_of_a_number_is_set_half_of_the_time():
    for seed, bits in ((7, 52), (np.float32(7), 23)):
        u = fastopt.uniform(seed, np.arange(20_000)).astype(np.float64)
        word = (u * 2.0**bits).astype(np.uint64)
        assert (word.astype(np.float64) == u * 2.0**bits).all()
        shares = [float(((word >> np.uint64(k)) & np.uint64(1)).mean()) for k in range(bits)]
        assert np.abs(np.array(shares) - 0.5).max() < 5 * 0.5 / math.sqrt(20_000)


def test_seeds_and_indices_are_integers_of_any_kind():
    expected = fastopt.uniform(7, 3)
    for kind in (np.int8, np.uint8, np.int64, np.uint64, np.float64):
        assert fastopt.uniform(kind(7), kind(3)) == expected
    assert fastopt.uniform(-1, 0) == fastopt.uniform(2**64 - 1, 0) != fastopt.uniform(1, 0)
    assert fastopt.uniform(np.array([[7], [8]]), np.arange(4)).shape == (2, 4)
    far = 2**32 * np.arange(2)  # the upper halves count
    assert len({*fastopt.uniform(7 + far, 3), *fastopt.uniform(7, 3 + far)}) == 3


def test_a_state_can_hold_the_index_of_each_element():
    """What docs/rules.md advises, as a rule is not told which element it updates."""

    @fastopt.rule(prepare_mathematics)
    def noisy(p, g, index, h):
        return p - g + fastopt.uniform(h.seed, index), index

    opt = fastopt.Optimizer({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}, noisy)
    first = 0
    for leaf in opt.states["index"].values():
        leaf[...] = np.arange(first, first + leaf.size).reshape(leaf.shape)
        first += leaf.size
    opt.step({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)})
    found = np.concatenate([leaf.reshape(-1) for leaf in opt.params.values()])
    assert same_bits(found, fastopt.uniform(np.float32(7), np.arange(10)))
