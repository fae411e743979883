"""Storage formats: every rule computes in float32 what it is given decoded, and what it returns is rounded once."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
from cases import OF_EACH_KIND, PER_RULE

import fastopt

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALF = (BFLOAT16, np.dtype(np.float16))
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
