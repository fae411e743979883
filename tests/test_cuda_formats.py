"""States of 16 bits on a device: the CPU's bits, in numba's simulator."""

from __future__ import annotations

import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING

import fastopt
from fastopt.kernels.cuda.target import SIMULATED

if not SIMULATED:
    pytest.skip("needs NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

SIZES = {"a": 1, "b": 7, "d": 33}


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in SIZES.items()}


@pytest.mark.parametrize(
    ("name", "states"), [("Adam", "bfloat16"), ("Adam", "float16"), ("LAMB", {"m": "bfloat16"})], ids=str
)
@pytest.mark.filterwarnings("ignore:states")
def test_the_bits_are_those_of_the_cpu(name, states):
    """Elementwise and with sums, which read the states as well; with every option."""
    for options in ({}, EVERYTHING):
        here = BY_NAME[name].make(tree(0), states=states, **options)
        there = BY_NAME[name].make(tree(0), states=states, backend="cuda", **options)
        for t in range(3):
            grads = tree(10 + t)
            if t == 1:
                grads["d"] = None
            here.step(grads)
            there.step({key: None if g is None else there._pipeline.backend.upload(g) for key, g in grads.items()})
        host = there._pipeline.backend.host
        for key in SIZES:
            assert host(there.params[key]).tobytes() == here.params[key].tobytes()
        for state, arrays in here.state.arrays.items():
            for mine, theirs in zip(arrays, there.state.arrays[state], strict=True):
                assert host(theirs).dtype == mine.dtype
                assert host(theirs).tobytes() == mine.tobytes(), state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastopt.Adam({"w": np.ones(8, np.float32)}, backend="cuda", states="int8"), "got states of 8 bits"),
        (
            lambda: fastopt.Adam(
                {"w": np.ones(8, np.float32)}, backend="cuda", states="bfloat16", rounding="stochastic"
            ),
            "got rounding='stochastic'",
        ),
    ],
)
def test_other_formats_are_refused_on_a_device(make, message):
    with pytest.raises(ValueError, match=f"states: must be 'bfloat16' or 'float16'.*{message}"):
        make()


def test_parameters_of_16_bits_are_refused_on_a_device():
    with pytest.raises(TypeError, match=r"parameter 'w': must be float32 or float64 on a device, got float16"):
        fastopt.Adam({"w": np.ones(8, np.float16)}, backend="cuda")
