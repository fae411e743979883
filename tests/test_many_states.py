"""Rules of many states: whatever is done for two of them is done for thirteen, and as fast."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
from cases import EVERYTHING, MANY_STATES, CaseOfRule, aggregated
from test_rows import assert_equal, params_of, run_both
from test_tail import assert_as_separate_passes

import fastopt
from fastopt.kernels.contract import Features
from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.elements import MAX_STATES

SIX = CaseOfRule("aggregated", of=aggregated(6))
SHAPES = {"w": (40, 7), "b": (5,), "empty": (0,), "number": ()}


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: np.asarray(rng.normal(size=shape)) for path, shape in SHAPES.items()}


def bits(opt: fastopt.Optimizer) -> dict[str, bytes]:
    trees = {"p": opt.params, **opt.states}
    return {f"{name}/{path}": leaf.tobytes() for name, found in trees.items() for path, leaf in found.items()}


@pytest.mark.parametrize("count", [6, MAX_STATES])
def test_many_velocities_are_those_of_numpy(count, tmp_path):
    """Twenty steps; a run that was loaded in the middle, and a copy, go on with the same bits."""
    made = aggregated(count)
    opt = fastopt.Optimizer(tree(0), made, lr=0.05)
    p, b = tree(0), 1.0 - 0.8 ** np.arange(count)
    v = {path: np.zeros((count, *leaf.shape)) for path, leaf in p.items()}
    for step in range(20):
        if step == 7:
            opt.save(tmp_path / "run")
            loaded, copied = fastopt.Optimizer(tree(1), made, lr=0.05), copy.deepcopy(opt)
            loaded.load(tmp_path / "run")
        grads = tree(100 + step)
        opt.step(grads)
        if step >= 7:
            loaded.step(grads)
            copied.step(grads)
        for path, g in grads.items():
            v[path] = (b * v[path].T).T + g
            p[path] = p[path] - 0.05 / count * v[path].sum(0)
    for path, expected in p.items():
        np.testing.assert_allclose(opt.params[path], expected, rtol=1e-12, atol=1e-13, err_msg=path)
        for k in range(count):
            np.testing.assert_allclose(opt.states[f"v{k}"][path], v[path][k], rtol=1e-12, atol=1e-13)
    assert bits(opt) == bits(loaded) == bits(copied)


def test_all_flags_at_once_equal_separate_passes():
    assert_as_separate_passes(MANY_STATES, np.float32, EVERYTHING, 8.0)


def test_rowwise_steps_equal_dense_ones():
    """The average counts as a seventh state of the closed form."""
    made: dict[str, Any] = {"ema": 0.9, "lr": 0.02}
    rowwise, dense = SIX.make(params_of(), **made), SIX.make(params_of(), **made)
    run_both(rowwise, dense, 40)
    assert_equal(rowwise, dense, rtol=1e-9, atol=1e-12)


def test_the_most_states_with_every_buffer_in_the_loop_are_vectorised(compiled_anew):
    rule = MANY_STATES.rule
    features = Features(unscale=True, clip_norm=True, l2=True, ema=True, zero_grad=True)
    kernel: Any = cpu.CPU().kernel(rule, type(rule.prepare(1)), np.dtype(np.float32), features)
    assembly = kernel._loop.compiled.assembly()
    assert len(re.findall(r"^\tv?mulps\t|^\tfmul\s+v\d+\.4s", assembly, re.MULTILINE)) >= MAX_STATES
