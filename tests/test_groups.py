"""Hyperparameters that are set, overridden, scaled, frozen and released between steps; parameters that are added."""

from __future__ import annotations

import copy
import fnmatch
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, PER_RULE
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastopt
from fastopt import schedules
from fastopt.step import globs, plan
from fastopt.step.groups import match_overrides

PATHS = ("head.bias", "head.weight", "w")


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"head": {"bias": rng.normal(size=3), "weight": rng.normal(size=(3, 4))}, "w": rng.normal(size=17)}


def bits(opt: fastopt.Optimizer) -> list[bytes]:
    state = opt.state
    return [np.asarray(array).tobytes() for arrays in (opt.flat.arrays, *state.arrays.values()) for array in arrays]


# --- the values of all ------------------------------------------------------------------------------------------------


WHOLE = ("ns_steps", "precondition_frequency", "warmup_steps")


@pytest.mark.parametrize("case", PER_RULE, ids=str)
def test_every_number_can_be_read_and_set_between_steps(case):
    """As if the optimizer had been built with it: the states go on."""
    opt = case.make(tree())
    base = opt.state.hyper
    for name, value in base.items():
        if isinstance(value, float) and not isinstance(value, bool):
            new = value / 2.0 if name not in WHOLE else value + 1.0
            assert getattr(opt, name) == value
            setattr(opt, name, new)
            assert getattr(opt, name) == new
            assert opt.state.hyper[name] == new
    built = case.make(tree(), **{name: value for name, value in opt.state.hyper.items() if name != "form"})
    if not opt.rule.initial:  # states may begin at a hyperparameter
        for each in (opt, built):
            each.step(tree(1))
        assert bits(opt) == bits(built)


def test_a_new_value_acts_from_the_next_step_on_and_lays_out_nothing():
    opt = fastopt.SGD({"w": np.zeros(1)}, lr=1.0, momentum=0.5)
    laid_out = opt._pipeline.plan
    opt.step({"w": np.ones(1)})
    opt.lr = 0.5
    opt.momentum = 0.0
    opt.step({"w": np.ones(1)})
    assert opt.params["w"] == -1.5  # the velocity was dropped
    assert opt._pipeline.plan is laid_out


def test_weight_decay_may_begin_and_end():
    for decoupled in (False, True):
        opt = fastopt.SGD({"w": np.ones(1)}, lr=0.5, decoupled_weight_decay=decoupled)
        opt.weight_decay = 0.5
        opt.step({"w": np.zeros(1)})
        assert opt.params["w"] == 0.75
        opt.weight_decay = schedules.constant(0.0)
        opt.step({"w": np.zeros(1)})
        assert opt.params["w"] == 0.75
        opt.weight_decay = 0.0
        opt.step({"w": np.zeros(1)})
        assert opt.params["w"] == 0.75


def test_attributes_that_do_not_exist_are_refused():
    opt = fastopt.AdamW({"w": np.ones(2)})
    for name in ("weight_dacay", "max_norm", "lr_schedule", "grad"):
        with pytest.raises(AttributeError, match=f"{name}: must be a hyperparameter of rule 'adamw'"):
            setattr(opt, name, 0.1)
        with pytest.raises(AttributeError, match=name):
            getattr(opt, name)
    before = opt.state.hyper
    for name, bad in (("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", "small"), ("lr", lambda step: -1.0)):
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(opt, name, bad)
    assert opt.state.hyper == before


def test_a_subclass_may_declare_attributes_of_its_own():
    class Mine(fastopt.SGD):
        history: list[float]

        def __init__(self, params: Any, **options: Any):
            super().__init__(params, **options)
            self.history = []

    opt = Mine({"w": np.ones(1)}, lr=0.5)
    opt.history.append(opt.lr)
    assert copy.deepcopy(opt).history == [0.5]


# --- the values of some -----------------------------------------------------------------------------------------------


def test_groups_read_set_and_release():
    opt = fastopt.AdamW(tree(), lr=0.1, weight_decay=0.01, overrides={"head.bias": {"weight_decay": 0.0}})
    assert len(opt.groups) == 2
    assert opt.groups["*bias"].paths == ("head.bias",)
    assert opt.groups["*bias"].weight_decay == 0.0
    opt.groups["head.*"].lr = 0.5
    assert (opt.groups["head.weight"].lr, opt.groups["w"].lr, opt.lr) == (0.5, 0.1, 0.1)
    opt.lr = 0.2  # of those without an lr of their own
    assert (opt.groups["head.weight"].lr, opt.groups["w"].lr) == (0.5, 0.2)
    del opt.groups["head.*"].lr
    assert opt.groups["*"].lr == 0.2
    with pytest.raises(AttributeError, match="weight_decay: must be the same for all"):
        _ = opt.groups["*"].weight_decay
    assert {group.paths for group in opt.groups} == {("head.bias",), ("head.weight",), ("w",)}  # once split, apart
    assert [group.paths for group in opt.groups[:1]] == [opt.groups[0].paths]
    assert "head.bias" in repr(opt.groups["*bias"])


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB", "NovoGrad"])
def test_groups_set_late_equal_overrides_given_early(name):
    make = getattr(fastopt, name)
    early = make(tree(), lr=0.1, overrides={"head.*": {"lr": 0.05}, "w": {"weight_decay": 0.5}})
    late = make(tree(), lr=0.7)
    late.groups["head.*"].lr = 0.05
    late.groups["w"].weight_decay = 0.5
    late.lr = 0.1
    for seed in range(1, 4):
        for opt in (early, late):
            opt.step(tree(seed))
    assert bits(early) == bits(late)
    assert early.state_dict()["overrides"] == late.state_dict()["overrides"]


def test_a_scale_multiplies_the_rate_and_its_schedule():
    rate = schedules.cosine(0.1, 0.0, 4)
    scaled = fastopt.SGD(tree(), lr=rate, overrides={"head.*": {"lr_scale": 0.5}})
    for step in range(4):
        before = {path: np.array(p) for path, p in zip(scaled.flat.paths, scaled.flat.arrays, strict=True)}
        scaled.step({"head": {"bias": np.ones(3), "weight": np.ones((3, 4))}, "w": np.ones(17)})
        np.testing.assert_allclose(before["w"] - scaled.params["w"], rate(step), atol=1e-15)
        np.testing.assert_allclose(before["head.bias"] - scaled.params["head"]["bias"], 0.5 * rate(step), atol=1e-15)
    assert scaled.groups["w"].lr_scale == 1.0
    scaled.groups["head.*"].lr_scale = 0.0
    assert scaled.groups["head.*"].lr_scale == 0.0
    for bad in (-1.0, "half", float("nan")):
        with pytest.raises((TypeError, ValueError), match="lr_scale"):
            scaled.groups["w"].lr_scale = bad


def test_frozen_parameters_stay_as_they_are_and_thaw():
    opt = fastopt.Adam(tree(), lr=0.1, ema=0.9, max_norm=1.0, overrides={"head.*": {"frozen": True}})
    alone = fastopt.Adam({"w": tree()["w"]}, lr=0.1, ema=0.9, max_norm=1.0)
    for seed in (1, 2):
        info = opt.step(tree(seed))
        expected = alone.step({"w": tree(seed)["w"]})
        assert info.grad_norm == expected.grad_norm  # of the gradients that are used
    assert opt.params["head"]["bias"].tobytes() == tree()["head"]["bias"].tobytes()
    assert not opt.states["m"]["head"]["weight"].any()
    assert opt.params["w"].tobytes() == alone.params["w"].tobytes()
    opt.groups["head.bias"].frozen = False
    opt.step(tree(3))
    assert (opt.params["head"]["bias"] != tree()["head"]["bias"]).all()
    assert opt.params["head"]["weight"].tobytes() == tree()["head"]["weight"].tobytes()
    assert opt.state_dict()["missed"] == {"head.bias": 2, "head.weight": 3}
    opt.groups["*"].frozen = False
    opt.step(tree(4))
    assert (opt.params["head"]["weight"] != tree()["head"]["weight"]).all()


@pytest.mark.parametrize("clipping", ["max_norm", "clip_norm_per_tensor"])
def test_accumulated_gradients_of_frozen_parameters_are_not_measured(clipping):
    options = {clipping: 1.0, "nonfinite": "raise"}
    opt, alone = fastopt.SGD(tree(), lr=1.0, **options), fastopt.SGD({"w": tree()["w"]}, lr=1.0, **options)
    opt.groups["head.*"].frozen = True
    grads = {"head": {"bias": np.full(3, np.nan), "weight": np.full((3, 4), 100.0)}, "w": np.ones(17)}
    opt.accumulate(grads)
    alone.accumulate({"w": np.ones(17)})
    info, expected = opt.step(), alone.step()
    assert (info.grad_norm, info.clip_coefficient) == (expected.grad_norm, expected.clip_coefficient)
    np.testing.assert_array_equal(opt.params["w"], alone.params["w"])


def test_overrides_of_all_kinds_survive_a_checkpoint(tmp_path):
    opt = fastopt.AdamW(tree(), overrides={"head.*": {"lr_scale": 0.5}})
    opt.groups["w"].frozen = True
    opt.groups["head.bias"].weight_decay = 0.25
    opt.step(tree(1))
    opt.save(tmp_path / "run.safetensors")
    resumed = fastopt.AdamW(tree())
    resumed.load(tmp_path / "run.safetensors")
    for each in (opt, resumed):
        each.step(tree(2))
    assert bits(opt) == bits(resumed)
    assert opt.state_dict()["overrides"] == resumed.state_dict()["overrides"]


BAD_GROUPS: list[tuple[Any, str, Any, str]] = [
    ("head.*", "wd", 0.1, "wd: must be one of lr"),
    ("head.*", "lr", -1.0, "lr: must be a number in"),
    ("head.*", "betas", 0.9, "betas: must be 2 numbers"),
    ("head.*", "frozen", 1, "frozen: must be True or False"),
]


@pytest.mark.parametrize(("glob", "name", "value", "message"), BAD_GROUPS)
def test_bad_values_are_refused_and_change_nothing(glob, name, value, message):
    opt = fastopt.Adam(tree())
    before = opt.state_dict()["overrides"], opt.state.hyper
    with pytest.raises((AttributeError, TypeError, ValueError), match=message):
        setattr(opt.groups[glob], name, value)
    assert (opt.state_dict()["overrides"], opt.state.hyper) == before


def test_globs_that_match_nothing_and_other_keys_are_refused():
    opt = fastopt.Adam(tree())
    with pytest.raises(KeyError, match=r"groups\['nothing\*'\]: must match a parameter; the paths are head.bias"):
        _ = opt.groups["nothing*"]
    with pytest.raises(TypeError, match="groups: must be given a glob"):
        _ = opt.groups[1.5]
    with pytest.raises(IndexError):
        _ = opt.groups[7]


def test_an_exact_path_is_not_a_glob():
    paths = ("layers0.w", "layers[0].w", "layers[1].w", "*.w")
    lrs = dict(zip(paths, (1.0, 2.0, 3.0, 4.0), strict=True))
    for late in (False, True):
        opt = fastopt.SGD(
            {path: np.zeros(1) for path in paths},
            lr=0.0,
            overrides=None if late else {path: {"lr": lr} for path, lr in lrs.items()},
        )
        if late:
            for path, lr in lrs.items():
                opt.groups[path].lr = lr
        opt.step({path: np.ones(1) for path in paths})
        assert {path: -opt.params[path][0] for path in paths} == lrs
    opt.groups["layers[[]?].w"].lr = 7.0  # a glob as before
    assert [opt.groups[path].lr for path in paths] == [1.0, 7.0, 7.0, 4.0]


def test_a_rate_of_the_other_half_of_muon_is_refused():
    opt = fastopt.Muon(tree())
    with pytest.raises(ValueError, match=r"w: lr: must be absent where orthogonal=False, got 0.1; use adamw_lr"):
        opt.groups["w"].lr = 0.1
    with pytest.raises(ValueError, match=r"head.weight: adamw_lr: must be absent where orthogonal=True"):
        opt.groups["head.weight"].adamw_lr = 0.1
    with pytest.raises(ValueError, match=r"parameter 'w': must be 2-D, got shape \(17,\); set orthogonal=False there"):
        opt.groups["w"].orthogonal = True
    with pytest.raises(ValueError, match=r"parameter 'head.bias': must be 2-D"):
        del opt.groups["head.bias"].orthogonal
    opt.groups["w"].adamw_lr = 0.1
    opt.groups["*"].lr_scale = 0.5  # acts on both
    assert opt.state.groups[2].at_step(0)["adamw_lr"] == 0.05
    assert opt.state.groups[1].at_step(0)["lr"] == opt.lr / 2.0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["set", "group", "release", "scale", "freeze", "thaw", "step", "mask"]),
            st.sampled_from(["*", "head.*", "*.bias", "w"]),
            st.floats(0.01, 1.0),
        ),
        max_size=12,
    )
)
def test_any_sequence_of_changes_equals_an_optimizer_per_parameter(changes):
    """Each parameter goes on as if it were alone and had been told only what concerns it."""
    opt = fastopt.Adam(tree(), lr=0.1)
    alone = {path: fastopt.Adam([p], lr=0.1) for path, p in zip(opt.flat.paths, opt.flat.arrays, strict=True)}
    frozen: set[str] = set()
    own: set[str] = set()
    for number, (what, glob, value) in enumerate(changes):
        paths = opt.groups[glob].paths
        if what == "set":
            opt.lr = value
            for path, one in alone.items():
                if path not in own:
                    one.lr = value
        elif what == "group":
            opt.groups[glob].lr = value
            own |= set(paths)
            for path in paths:
                alone[path].lr = value
        elif what == "release":
            del opt.groups[glob].lr
            own -= set(paths)
            for path in paths:
                alone[path].lr = opt.lr
        elif what == "scale":
            opt.groups[glob].lr_scale = value
            for path in paths:
                alone[path].groups["*"].lr_scale = value
        elif what in ("freeze", "thaw"):
            opt.groups[glob].frozen = what == "freeze"
            frozen = frozen | set(paths) if what == "freeze" else frozen - set(paths)
        else:
            grads = tree(number)
            if what == "mask":
                grads["head"]["bias"] = None
            opt.step(grads)
            given = {"head.bias": grads["head"]["bias"], "head.weight": grads["head"]["weight"], "w": grads["w"]}
            for path, one in alone.items():
                if path not in frozen and given[path] is not None:
                    one.step([given[path]])
    for (path, one), p in zip(alone.items(), opt.flat.arrays, strict=True):
        assert one.params[0].tobytes() == p.tobytes(), path


# --- many groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "LAMB", "Muon", "NAdam", "NovoGrad-weight_decay=0.1", "SGD-lr=0.1"])
def test_many_groups_have_the_bits_that_python_gives(name, monkeypatch):
    """What is compiled of each rule is compared with Python in test_prepare.py."""
    case = BY_NAME[name]
    rng = np.random.default_rng(0)
    params = {f"p{k}": rng.normal(size=(2, 3)).astype(np.float32) for k in range(12)}
    rate = "lr" if "lr" in case.rule.names() else case.rule.names()[0]
    overrides: dict[str, Any] = {f"p{k}": {rate: 0.01 * (k + 1)} for k in range(8)}
    overrides["p9"] = {"weight_decay": 0.25}
    overrides["p10"] = {rate: lambda step: 0.1 / (step + 1)}
    optimizers = []
    for many in (10**6, 2):
        monkeypatch.setattr(plan, "MANY", many)
        opt = case.make(params, overrides=overrides)
        grads = np.random.default_rng(1)
        for step in range(4):
            given: dict[str, Any] = {name: grads.normal(size=p.shape).astype(p.dtype) for name, p in params.items()}
            if step == 1:
                given["p3"] = None
            if step == 2:
                opt.groups["p[0-4]"].weight_decay = 0.125
            opt.step(given)
        optimizers.append(opt)
    assert bits(optimizers[0]) == bits(optimizers[1])


def test_many_groups_that_leave_the_range_are_refused_and_change_nothing(monkeypatch):
    monkeypatch.setattr(plan, "MANY", 2)
    params = {f"p{k}": np.ones(3, np.float32) for k in range(4)}
    opt = fastopt.Adam(params, overrides={f"p{k}": {"lr": 0.1 * (k + 1)} for k in range(4)})
    opt.step(params)
    before = bits(opt)
    opt.groups["p2"].lr = 1e300
    with pytest.raises(ValueError, match="hyperparameters of rule 'adam' at step 2: must be in the range of float32"):
        opt.step(params)
    assert bits(opt) == before
    opt.groups["p2"].lr = 0.5
    opt.step(params)


# --- parameters that are added ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "LAMB", "NovoGrad", "ScheduleFreeAdamW", "Muon"])
def test_added_parameters_go_on_as_if_they_were_alone(name, copies):
    make = getattr(fastopt, name)
    first, second = {"m": np.ones((2, 3)), "w": np.ones(5)}, {"a": np.full(4, 2.0), "z": np.full((3, 2), 3.0)}
    grads = {path: 0.1 * np.arange(1.0, p.size + 1).reshape(p.shape) for path, p in {**first, **second}.items()}
    opt = make({path: p.copy() for path, p in first.items()}, ema=0.9, copy=copies)
    before = dict(opt.params)
    both = [make({path: p.copy() for path, p in part.items()}, ema=0.9) for part in (first, second)]
    opt.step({path: grads[path] for path in first})
    both[0].step({path: grads[path] for path in first})
    opt.add(second)
    for _ in range(2):
        opt.step(grads)
        for one, part in zip(both, (first, second), strict=True):
            one.step({path: grads[path] for path in part})
    for one in both:
        for path, p in one.params.items():
            assert opt.params[path].tobytes() == p.tobytes(), path
            assert opt.ema[path].tobytes() == one.ema[path].tobytes()
    assert all(opt.params[path] is p for path, p in before.items())  # what was handed out is still what is used
    assert opt.state_dict()["missed"] == {"a": 1, "z": 1}
    opt.grads["a"] = grads["a"]
    opt.step()
    assert (second["a"] != 2.0).all() == (not copies)


def test_parameters_are_added_after_some_were_accumulated():
    opt = fastopt.SGD({"w": np.zeros(2)}, lr=1.0)
    opt.accumulate({"w": np.ones(2)})
    opt.step()
    opt.add({"a": np.zeros(40)})
    for _ in range(2):
        opt.accumulate({"w": np.ones(2), "a": np.full(40, 2.0)})
    opt.step()
    np.testing.assert_array_equal(opt.params["w"], -2.0)
    np.testing.assert_array_equal(opt.params["a"], -2.0)


def test_an_optimizer_with_added_parameters_is_like_any_other(tmp_path):
    opt = fastopt.Adam({"w": np.ones(3)}, lr=0.1)
    opt.grads["w"] = np.ones(3)
    opt.step()
    opt.add({"a": np.ones((2, 2))}, lr=0.5, weight_decay=0.1)
    assert (opt.groups["a"].lr, opt.groups["w"].lr) == (0.5, 0.1)
    opt.accumulate({"w": np.ones(3), "a": np.ones((2, 2))})
    opt.step()
    twin = copy.deepcopy(opt)
    opt.save(tmp_path / "run.safetensors")
    resumed = fastopt.Adam({"w": np.ones(3), "a": np.ones((2, 2))})
    resumed.load(tmp_path / "run.safetensors")
    for each in (opt, twin, resumed):
        each.step_rows({"a": (np.array([1]), np.ones((1, 2)))}) if each.groups["a"].weight_decay == 0 else each.step(
            {"w": np.ones(3), "a": np.ones((2, 2))}
        )
    assert bits(opt) == bits(twin) == bits(resumed)


BAD_ADDITIONS: list[tuple[Any, dict[str, Any], str]] = [
    ({"w": np.ones(2)}, {}, r"params\['w'\]: must be a new key"),
    ([np.ones(2)], {}, "params: must be a dict to add to a dict"),
    ({"a": np.ones(2, np.float32)}, {}, "params: must have dtype float64"),
    ({"a": np.ones(2)}, {"lr": -1.0}, "a: lr: must be"),
    ({"a": np.ones(2)}, {"rate": 1.0}, "rate"),
    ({"a": "text"}, {}, "parameter 'a'"),
]


@pytest.mark.parametrize(("params", "hyper", "message"), BAD_ADDITIONS)
def test_bad_additions_are_refused_and_change_nothing(params, hyper, message):
    opt = fastopt.Adam({"w": np.ones(3)}, lr=0.1)
    opt.step({"w": np.ones(3)})
    before = bits(opt), opt.flat.paths, len(opt.groups)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.add(params, **hyper)
    assert (bits(opt), opt.flat.paths, len(opt.groups)) == before
    opt.step({"w": np.ones(3)})


# --- trees that cannot lie --------------------------------------------------------------------------------------------


def test_what_is_assigned_to_an_item_is_what_the_optimizer_uses():
    opt = fastopt.SGD({"w": np.zeros(2), "bn": {"gamma": np.ones(3)}}, lr=1.0)
    opt.grads["w"] = np.array([1.0, 2.0])
    opt.grads["bn"]["gamma"] += 1.0
    opt.step()
    assert opt.params["w"].tolist() == [-1.0, -2.0]
    assert opt.params["bn"]["gamma"].tolist() == [0.0, 0.0, 0.0]
    opt.params["w"] = np.full(2, 7.0)
    assert opt.flat.data[opt.flat.offsets[1] : opt.flat.offsets[1] + 2].tolist() == [7.0, 7.0]
    adam = fastopt.Adam({"w": np.zeros(2)}, ema=0.9)
    adam.states["m"]["w"] = np.ones(2)
    adam.ema["w"] = np.full(2, 3.0)
    assert adam.state.arrays["m"][0].tolist() == [1.0, 1.0]
    assert adam.state.arrays["ema"][0].tolist() == [3.0, 3.0]
    with pytest.raises(TypeError):
        adam.states["m"] = {}  # type: ignore[index]


def test_a_leaf_that_is_replaced_where_nobody_can_refuse_it_is_found_at_the_next_step(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Layer:
        weight: Any

    opt = fastopt.SGD({"first": Layer(np.zeros(2))}, lr=1.0)
    opt.grads["first"].weight[...] = 1.0
    opt.step()
    kept = opt.params["first"].weight
    opt.params["first"].weight = np.ones(2)
    for call in (opt.step, opt.state_dict, lambda: opt.save(tmp_path / "run.safetensors")):
        with pytest.raises(ValueError, match=r"opt.params: 'first.weight' must be the array that the optimizer handed"):
            call()
    opt.params["first"].weight = kept
    opt.grads["first"].weight = np.ones(2)
    with pytest.raises(ValueError, match=r"opt.grads: 'first.weight' must be the array"):
        opt.step()


def test_adopted_parameters_are_the_callers_own_names_for_them():
    params = {"w": np.zeros(2), "layers": [{"b": np.ones(1)}]}
    opt = fastopt.SGD(params, lr=1.0)
    opt.adopt(params)
    opt.step({"w": np.ones(2), "layers": [{"b": np.ones(1)}]})
    assert params["w"].tolist() == [-1.0, -1.0]
    assert params["layers"][0]["b"] is opt.params["layers"][0]["b"]
    with pytest.raises((TypeError, ValueError)):
        opt.adopt({"w": np.zeros(3), "layers": [{"b": np.ones(1)}]})


# --- globs ------------------------------------------------------------------------------------------------------------


def one_by_one(paths: list[str], glob: str) -> list[int]:
    """The numbers of the paths that a glob matches, tried on each."""
    return [paths.index(glob)] if glob in paths else [k for k, p in enumerate(paths) if fnmatch.fnmatchcase(p, glob)]


LETTERS = st.sampled_from("aab..1[]!-?*\n\0é")
PATH = st.text(st.sampled_from("aab..1[]\n\0é"), max_size=9)
GLOB = st.text(LETTERS, max_size=7) | st.tuples(PATH, st.sampled_from("*?["), PATH).map("".join)


@settings(deadline=None, max_examples=400)
@given(st.lists(PATH, min_size=1, max_size=12, unique=True), st.lists(GLOB, max_size=24, unique=True))
@example(["aba", "ab"], ["ab*ba", "*b*b*", "ab*b*a"])  # pieces that overlap
@example(["ab", "aab"], ["a[ab]", "a[!b]b", "[a]b", "a?b*", "a[ab]?"])
def test_many_globs_match_what_each_of_them_matches(paths, names):
    """Also those that are tried before there is an index, and those that match nothing."""
    many = globs.Paths(paths)
    for tried in (0, globs.FEW):
        for glob in names:
            many._tried = tried
            assert many.matching(glob) == one_by_one(paths, glob), glob


@settings(deadline=None, max_examples=200)
@given(st.lists(PATH, min_size=1, max_size=12, unique=True), st.lists(GLOB, max_size=24, unique=True))
def test_of_many_overrides_the_later_wins_and_one_that_matches_nothing_is_refused(paths, names):
    overrides = {glob: {"lr": k, ("even" if k % 2 == 0 else "odd"): k} for k, glob in enumerate(names)}
    matched = {glob: one_by_one(paths, glob) for glob in names}
    nowhere = [glob for glob in names if not matched[glob]]
    if nowhere:
        with pytest.raises(ValueError, match="must match a parameter") as found:
            match_overrides(paths, overrides)
        assert str(found.value).startswith(f"overrides[{nowhere[0]!r}]: ")
    expected: list[dict[str, Any]] = [{} for _ in paths]
    overrides = {glob: values for glob, values in overrides.items() if matched[glob]}
    for glob, values in overrides.items():
        for k in matched[glob]:
            expected[k].update(values)
    assert match_overrides(paths, overrides) == expected


@pytest.mark.parametrize("form", ["block{}.*", "*.block{}.*", "*block{}.bias", "*.block{}.[bw]*", "net.block{}.w?"])
def test_a_glob_of_thousands_is_tried_on_few_paths(form, monkeypatch):
    paths = [f"net.block{k:04d}.{name}" for k in range(2000) for name in ("wq", "wk", "wv", "bias")]
    tried = 0
    made = globs.matcher

    def counting(glob):
        matches = made(glob)

        def count(path):
            nonlocal tried
            tried += 1
            return matches(path)

        return count

    monkeypatch.setattr(globs, "matcher", counting)
    among = globs.Paths(paths)
    names = [form.format(f"{k:04d}") for k in range(2000)]
    found = [among.matching(glob if form[0] == "*" else f"*{glob}") for glob in names]
    assert all(1 <= len(numbers) <= 4 for numbers in found)
    assert tried <= globs.FEW * len(paths) + 64 * len(names)  # of 16 million
