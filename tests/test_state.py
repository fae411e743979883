"""States that begin at a parameter do so at its first update; `set_params` and `restart` begin them again."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import OF_EACH_KIND, PER_RULE, Case

import fastopt

SHAPES = {"a": (4, 3), "b": (5,), "m": (3, 3)}


def tree(seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def everything(opt: fastopt.Optimizer) -> dict[str, bytes]:
    """Every bit of the parameters, the states and the average."""
    trees = {"p": opt.params, **opt.states, "ema": opt.ema}
    return {f"{name}/{path}": each[path].tobytes() for name, each in trees.items() for path in each}


def pretrain(opt: fastopt.Optimizer, values: dict[str, np.ndarray]) -> None:
    for name, value in values.items():
        opt.params[name][...] = value


def at_once(opt: fastopt.Optimizer, tmp_path: Any) -> fastopt.Optimizer:
    return opt


def after_reading(opt: fastopt.Optimizer, tmp_path: Any) -> fastopt.Optimizer:
    with opt.swap_ema():
        pass
    assert (opt.state_dict()["step"], sorted(opt.ema)) == (0, sorted(SHAPES))
    assert sorted(opt.states) == sorted((*opt.rule.states, *opt.rule.numbers, *opt.rule.matrices))
    return opt


def after_a_copy(opt: fastopt.Optimizer, tmp_path: Any) -> fastopt.Optimizer:
    return copy.deepcopy(opt)


def after_a_file(opt: fastopt.Optimizer, tmp_path: Any) -> fastopt.Optimizer:
    opt.save(tmp_path / "run.safetensors")
    opt.load(tmp_path / "run.safetensors")
    return opt


def after_a_state(opt: fastopt.Optimizer, tmp_path: Any) -> fastopt.Optimizer:
    opt.load_state_dict(opt.state_dict())
    return opt


def after_a_skipped_step(opt: fastopt.Optimizer, tmp_path: Any) -> fastopt.Optimizer:
    assert opt.step({**tree(7), "b": np.full(5, np.nan)}).skipped
    return opt


def after_a_refused_step(opt: fastopt.Optimizer, tmp_path: Any) -> fastopt.Optimizer:
    with pytest.raises(ValueError, match="gradient 'b'"):
        opt.step({**tree(7), "b": np.ones(4)})
    return opt


def after_a_restart(opt: fastopt.Optimizer, tmp_path: Any) -> fastopt.Optimizer:
    opt.step(tree(8))
    opt.restart()
    return opt


BEFORE = (
    *(at_once, after_reading, after_a_copy, after_a_file, after_a_state),
    *(after_a_skipped_step, after_a_refused_step, after_a_restart),
)
MASKS = (("a", "m"), (), ("b",), ("a", "b", "m"))
"""Which parameters have a gradient in each step."""


BORN = [case for case in PER_RULE if "p" in case.rule.initial.values() and case not in OF_EACH_KIND]
"""Whose states begin at the parameters."""


@pytest.mark.parametrize("before", BEFORE, ids=lambda before: before.__name__)
@pytest.mark.parametrize("case", [*OF_EACH_KIND, *BORN], ids=str)
def test_states_and_the_average_begin_at_the_weights_that_were_written(case: Case, before, tmp_path):
    options = {"lr": 0.1, "ema": 0.75, "nonfinite": "skip"}
    expected = case.make(tree(1), **options)
    opt = before(case.make({name: np.zeros_like(p) for name, p in tree(1).items()}, **options), tmp_path)
    pretrain(opt, tree(1))
    assert opt.ema["a"].tobytes() == opt.params["a"].tobytes()
    for step, mask in enumerate(MASKS):
        if step == 2:  # b has had no update so far
            for each in (opt, expected):
                each.params["b"][...] = 5.0
            expected.ema["b"][...] = 5.0
            for name, value in case.rule.initial.items():
                if value == "p":
                    expected.states[name]["b"][...] = 5.0
        for each in (opt, expected):
            each.step({name: g if name in mask else None for name, g in tree(10 + step).items()})
    found, wanted = everything(opt), everything(expected)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_the_average_and_z_begin_at_the_first_step():
    opt = fastopt.SGD({"w": np.zeros(1)}, lr=0.1, ema=0.9)
    opt.params["w"][...] = 10.0
    opt.step({"w": np.zeros(1)})
    assert opt.ema["w"].tolist() == [10.0]
    free = fastopt.ScheduleFreeAdamW({"w": np.zeros(1)}, lr=0.1)
    free.params["w"][...] = 10.0
    with free.eval_params() as params:
        assert params["w"].tolist() == [10.0]
    free.step({"w": np.zeros(1)})
    assert (free.states["z"]["w"].tolist(), free.params["w"].tolist()) == ([10.0], [10.0])


def test_what_has_begun_does_not_begin_again(tmp_path):
    opt = fastopt.SGD({"w": np.zeros(1)}, lr=1.0, ema=0.5)
    opt.step({"w": np.full(1, -4.0)})
    opt.save(tmp_path / "run.safetensors")
    resumed = fastopt.SGD({"w": np.zeros(1)}, lr=1.0, ema=0.5)
    resumed.load(tmp_path / "run.safetensors")
    restored = fastopt.SGD({"w": np.full(1, 4.0)}, lr=1.0, ema=0.5)
    restored.load_state_dict(opt.state_dict())
    for each in (opt, resumed, restored, copy.deepcopy(opt)):
        each.params["w"][...] = 8.0
        assert each.ema["w"].tolist() == [2.0]
        each.step({"w": np.zeros(1)})
        assert each.ema["w"].tolist() == [5.0]


@pytest.mark.parametrize("before", [at_once, after_a_copy, after_a_file], ids=lambda before: before.__name__)
def test_what_the_caller_writes_into_a_state_is_kept(before, tmp_path):
    opt = fastopt.ScheduleFreeAdamW({"w": np.zeros(1), "x": np.zeros(1)}, lr=0.1, ema=0.5)
    opt.ema["w"] = np.full(1, 8.0)
    opt.states["z"]["x"][...] = 4.0
    opt = before(opt, tmp_path)
    opt.add({"a": np.zeros(1)})
    pretrain(opt, {name: np.full(1, 2.0) for name in ("a", "w", "x")})
    for _ in range(2):
        assert {path: float(e[0]) for path, e in opt.ema.items()} == {"a": 2.0, "w": 8.0, "x": 2.0}
        assert {path: float(z[0]) for path, z in opt.states["z"].items()} == {"a": 2.0, "w": 2.0, "x": 4.0}
    opt.step({name: np.zeros(1) for name in ("a", "w", "x")})
    assert {path: float(e[0]) for path, e in opt.ema.items()} == {"a": 2.0, "w": 5.0, "x": 3.0}
    assert {path: float(z[0]) for path, z in opt.states["z"].items()} == {"a": 2.0, "w": 2.0, "x": 4.0}


def test_a_state_that_was_shown_and_not_written_goes_on_following_the_parameters():
    opt = fastopt.SGD({"w": np.zeros(1)}, lr=1.0, ema=0.5)
    assert opt.ema["w"].tolist() == [0.0]
    opt.params["w"][...] = 1.0
    with opt.swap_ema() as average:
        assert average["w"].tolist() == [1.0]
    opt.params["w"][...] = 2.0
    opt.step({"w": np.zeros(1)})
    assert opt.ema["w"].tolist() == [2.0]


def test_a_run_that_goes_back_to_its_beginning_begins_at_the_weights_written_then():
    opt = fastopt.SGD({"w": np.zeros(1)}, lr=1.0, ema=0.5)
    beginning = opt.state_dict()
    for _ in range(3):
        opt.step({"w": np.ones(1)})
    opt.load_state_dict(beginning)
    opt.params["w"][...] = 4.0
    opt.step({"w": np.zeros(1)})
    assert opt.ema["w"].tolist() == [4.0]


def test_arrays_in_place_and_arrays_of_update_begin_where_they_are():
    own = {"w": np.zeros(2)}
    opt = fastopt.SGD(own, lr=1.0, ema=0.5, copy=False)
    own["w"][...] = 3.0
    opt.step({"w": np.zeros(2)})
    assert opt.ema["w"].tolist() == [3.0, 3.0]
    moved = fastopt.SGD(own, lr=1.0, ema=0.5, copy=False)
    moved.update({"w": np.full(2, 7.0)}, {"w": np.zeros(2)})
    assert moved.ema["w"].tolist() == [7.0, 7.0]


def test_rows_begin_at_the_first_row_wise_step():
    opt, dense = (fastopt.Momentum({"e": np.zeros((3, 2)), "w": np.zeros(2)}, lr=1.0, ema=0.5) for _ in range(2))
    for each in (opt, dense):
        each.params["e"][...] = 10.0
    g = np.zeros((3, 2))
    g[1] = 1.0
    opt.step_rows({"e": (np.array([1]), np.ones((1, 2)))})
    dense.step({"e": g, "w": None})
    for each in (opt, dense):
        each.params["w"][...] = 20.0  # which has had no update
    opt.step_rows({"e": (np.array([1]), np.ones((1, 2)))}, {"e": None, "w": np.zeros(2)})
    dense.step({"e": g, "w": np.zeros(2)})
    for path in ("e", "w"):
        np.testing.assert_allclose(opt.ema[path], dense.ema[path], rtol=1e-12)
    assert opt.ema["w"].tolist() == [20.0, 20.0]
    assert opt.ema["e"][0].tolist() == [10.0, 10.0]


def test_added_and_frozen_parameters_begin_at_their_own_first_update():
    opt = fastopt.SGD({"w": np.zeros(1), "x": np.zeros(1)}, lr=1.0, ema=0.5, overrides={"x": {"frozen": True}})
    grads = {"w": np.zeros(1), "x": np.zeros(1)}
    opt.step(grads)
    opt.add({"head": np.zeros(1)})
    opt.params["head"][...] = opt.params["x"][...] = opt.params["w"][...] = 6.0
    opt.groups["x"].frozen = False
    opt.step({**grads, "head": np.zeros(1)})
    assert {path: float(e[0]) for path, e in opt.ema.items()} == {"head": 6.0, "w": 3.0, "x": 6.0}


def test_states_that_begin_at_a_hyperparameter_follow_it_until_the_first_update():
    opt = fastopt.Rprop({"a": np.zeros(1), "b": np.zeros(1)}, lr=0.1)
    opt.lr = 0.5
    opt.groups["b"].lr = 0.25
    assert [float(opt.states["step_size"][path][0]) for path in "ab"] == [0.5, 0.25]
    del opt.groups["b"].lr
    assert [float(opt.states["step_size"][path][0]) for path in "ab"] == [0.5, 0.5]
    opt.groups["b"].lr_scale = 0.5
    assert [float(opt.states["step_size"][path][0]) for path in "ab"] == [0.5, 0.25]
    opt.step({"a": np.ones(1), "b": None})
    opt.lr = 0.125
    assert [float(opt.states["step_size"][path][0]) for path in "ab"] == [0.5, 0.0625]
    adagrad = fastopt.Adagrad({"a": np.zeros(1)}, lr=0.1)
    adagrad.states["sum_sq"]["a"][...] = 3.0
    adagrad.lr = 0.2  # at which no state begins
    assert adagrad.states["sum_sq"]["a"].tolist() == [3.0]
    adagrad.initial_accumulator_value = 0.75
    assert adagrad.states["sum_sq"]["a"].tolist() == [0.75]


# --- set_params and restart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"copy": False}], ids=["packed", "in place"])
@pytest.mark.parametrize("case", [*OF_EACH_KIND, *BORN], ids=str)
def test_set_params_moves_what_began_at_the_parameters_and_nothing_else(case: Case, options):
    opt = case.make(tree(1), lr=0.1, ema=0.75, **options)
    for seed in range(2):
        opt.step(tree(20 + seed))
    born = {name for name, value in case.rule.initial.items() if value == "p"}
    before, arrays = everything(opt), list(opt.flat.arrays)
    opt.set_params(tree(2))
    assert all(mine is theirs for mine, theirs in zip(opt.flat.arrays, arrays, strict=True))
    assert opt.step_count == 2
    after = everything(opt)
    for name, bits in after.items():
        kind, path = name.split("/")
        assert bits == (tree(2)[path].tobytes() if kind in {"p", "ema", *born} else before[name]), name


def test_set_params_converts_and_may_be_given_its_own_arrays():
    opt = fastopt.Momentum({"a": np.zeros(2), "b": np.ones(2)}, lr=1.0, ema=0.5)
    opt.set_params({"a": opt.params["b"], "b": opt.params["a"]})
    assert (opt.params["a"].tolist(), opt.params["b"].tolist()) == ([1.0, 1.0], [0.0, 0.0])
    opt.set_params({"a": np.full(2, 2.0, np.float32), "b": np.arange(4.0)[::2]})
    assert (opt.params["a"].tolist(), opt.ema["b"].tolist()) == ([2.0, 2.0], [0.0, 2.0])
    rows = fastopt.Momentum({"e": np.zeros((2, 1))}, lr=1.0, momentum=0.5)
    for row in range(2):  # the first row is now a step behind
        rows.step_rows({"e": (np.array([row]), np.ones((1, 1)))})
    rows.set_params({"e": np.full((2, 1), 9.0)})
    rows.flush_rows()
    assert rows.params["e"].ravel().tolist() == [9.0, 9.0]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"a": np.ones(2)}, ValueError, r"params: must have the structure of the parameters, got a tree without 'b'"),
        ({"a": np.ones(2), "b": np.ones(1)}, ValueError, r"parameter 'b': must have shape \(2,\), got \(1,\)"),
        ({"a": np.ones(2), "b": None}, TypeError, r"parameter 'b': must be a NumPy array, got NoneType"),
        ({"a": np.ones(2), "b": np.ones(2, int)}, TypeError, r"parameter 'b': must have dtype float32, float64"),
    ],
    ids=["structure", "shape", "None", "integers"],
)
def test_set_params_refuses_before_anything_is_changed(params, error, message):
    opt = fastopt.SGD({"a": np.zeros(2), "b": np.zeros(2)}, lr=1.0, ema=0.5)
    with pytest.raises(error, match=message):
        opt.set_params(params)
    assert not opt.flat.data.any()
    with opt.swap_ema():
        for method, given in (("set_params", (params,)), ("restart", ())):
            with pytest.raises(RuntimeError, match=rf"^{method}\(\) inside `with opt.swap_ema\(\)`"):
                getattr(opt, method)(*given)


@pytest.mark.parametrize("case", [*OF_EACH_KIND, *BORN], ids=str)
def test_restart_is_a_new_optimizer_at_the_same_parameters(case: Case):
    options = {"ema": 0.75, "nonfinite": "skip", "overrides": {"b": {"weight_decay": 0.25}}}
    lr = fastopt.schedules.inverse_time(0.1, 1.0)
    opt = case.make(tree(1), lr=lr, **options)
    opt.step(tree(3))
    opt.step({**tree(3), "a": None})
    opt.step({**tree(3), "a": np.full((4, 3), np.nan)})
    opt.accumulate(tree(3))
    opt.restart()
    new = case.make(opt.params, lr=lr, **options)
    assert (opt.step_count, opt.state.missed, opt.state.nonfinite) == (0, [0, 0, 0], (0, 0))
    for each in (opt, new):
        each.step(tree(4))
    assert everything(opt) == everything(new)


class Hyper(NamedTuple):
    lr: float


@fastopt.rule(lambda t, lr=0.5: Hyper(lr), initial={"anchor": "p", "count": 2.0})
def anchored(p, g, anchor, count, h):
    return anchor - h.lr * g, anchor, count


def test_a_rule_of_ones_own_begins_at_the_parameters_too():
    opt = fastopt.Optimizer({"w": np.zeros(1)}, anchored)
    opt.params["w"][...] = 8.0
    for _ in range(2):
        opt.step({"w": np.ones(1)})
    assert (opt.params["w"].tolist(), opt.states["anchor"]["w"].tolist()) == ([7.5], [8.0])
    opt.restart()
    assert (opt.states["anchor"]["w"].tolist(), opt.states["count"]["w"].tolist()) == ([7.5], [2.0])
