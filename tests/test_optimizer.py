"""Optimizer: groups in one launch, missing gradients, schedules, gradient scale, state, look-ahead, a user's rule."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import PER_RULE, Case
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from fastopt import rules, schedules
from fastopt.kernels.contract import Chunk

SHAPES = {"b": (3,), "head": {"bias": (2,), "weight": (5, 2)}, "w": (17,)}
PATHS = ("b", "head.bias", "head.weight", "w")


def tree(rng: np.random.Generator, dtype: Any = np.float32, shapes: Any = None) -> Any:
    """A tree of normal numbers."""
    if isinstance(shapes, tuple):
        return rng.normal(size=shapes).astype(dtype)
    return {name: tree(rng, dtype, shape) for name, shape in (SHAPES if shapes is None else shapes).items()}


def by_path(tree: Any) -> dict[str, Any]:
    return {"b": tree["b"], "head.bias": tree["head"]["bias"], "head.weight": tree["head"]["weight"], "w": tree["w"]}


def bits(opt: fastopt.Optimizer) -> list[bytes]:
    """Every bit of the parameters and states."""
    return [leaf.tobytes() for each in (opt.params, *opt.states.values()) for leaf in by_path(each).values()]


def bits_of(opt: fastopt.Optimizer, path: str) -> list[bytes]:
    """Every bit of one parameter and its states."""
    return [by_path(each)[path].tobytes() for each in (opt.params, *opt.states.values())]


def by_factor(grads: Any, factor: float) -> Any:
    if isinstance(grads, dict):
        return {name: by_factor(each, factor) for name, each in grads.items()}
    return grads * np.float32(factor)


class Launches:
    """Counts the launches of the kernel that `opt` runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, opt: fastopt.Optimizer):
        self.count = 0
        self.chunks: Any = None
        kernel = type(opt._pipeline.plan.kernel(scaled=False))
        launch = kernel.launch

        def counted(this: Any, places: Any, states: Any, table: Any, chunks: Any, elements: int) -> None:
            self.count += 1
            self.chunks = [Chunk(*line) for line in chunks.tolist()]
            launch(this, places, states, table, chunks, elements)

        monkeypatch.setattr(kernel, "launch", counted)


# --- the step ---------------------------------------------------------------------------------------------------------


def test_step_says_which_step_it_was():
    rng = np.random.default_rng(0)
    opt = fastopt.Adam(tree(rng))
    assert opt.step_count == 0
    info = opt.step(tree(rng))
    assert (info.step, info.skipped, info.lr, info.clip_coefficient) == (1, False, 1e-3, 1.0)
    assert opt.step().step == 2
    assert opt.step_count == 2


def test_gradients_in_place_and_as_a_tree_are_the_same():
    rng = np.random.default_rng(1)
    params = tree(rng)
    in_place, as_tree = fastopt.Adam(params), fastopt.Adam(params)
    for _ in range(3):
        grads = tree(rng)
        for own, given_one in zip(by_path(in_place.grads).values(), by_path(grads).values(), strict=True):
            own[...] = given_one
        in_place.step()
        as_tree.step(grads)
        assert bits(in_place) == bits(as_tree)
        assert not as_tree.flat.grad.any()  # they were read where they are


def test_its_own_gradients_may_be_handed_over():
    rng = np.random.default_rng(2)
    params, grads = tree(rng), tree(rng)
    implicit, itself, rebuilt, mixed = (fastopt.Adam(params) for _ in range(4))
    for opt in (implicit, itself, rebuilt, mixed):
        for own, grad in zip(by_path(opt.grads).values(), by_path(grads).values(), strict=True):
            own[...] = grad
    implicit.step()
    itself.step(itself.grads)
    rebuilt.step(copy.copy(rebuilt.grads) | {"head": dict(rebuilt.grads["head"])})
    same_place = mixed.flat.grad[32:42].reshape(5, 2)
    mixed.step({**grads, "w": mixed.grads["w"], "head": {**grads["head"], "weight": same_place}})
    assert bits(implicit) == bits(itself) == bits(rebuilt) == bits(mixed)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def every_second(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=0)[::2]


@pytest.mark.parametrize(
    "form",
    [read_only, np.asfortranarray, every_second, lambda g: g[::-1].copy()[::-1], lambda g: g.view(np.memmap)],
    ids=["read-only", "fortran", "strided", "reversed", "subclass"],
)
def test_gradients_of_any_memory_order_are_welcome_and_only_read(form):
    rng = np.random.default_rng(3)
    params, grads = tree(rng), tree(rng)
    formed = {**{name: form(grads[name]) for name in "bw"}, "head": {k: form(g) for k, g in grads["head"].items()}}
    before = {path: g.tobytes() for path, g in by_path(formed).items()}
    plain, other = fastopt.Adam(params), fastopt.Adam(params)
    plain.step(grads)
    other.step(formed)
    assert bits(plain) == bits(other)
    assert {path: g.tobytes() for path, g in by_path(formed).items()} == before


def test_zero_grad():
    rng = np.random.default_rng(4)
    opt = fastopt.SGD(tree(rng))
    view = opt.grads["w"]
    view[...] = 1.0
    opt.step()
    assert view.all()
    opt.zero_grad()
    assert not opt.flat.grad.any()
    assert not view.any()
    assert opt.grads["w"] is view


def test_repr_shows_hyperparameters_size_and_step():
    opt = fastopt.SGD({"w": np.ones(3, np.float32)}, lr=0.5, weight_decay=schedules.constant(0.1))
    opt.step()
    assert repr(opt) == (
        "<SGD(lr=0.5, weight_decay=constant(lr=0.1)) of "
        "<FlatParams: 1 parameters, 3 elements of float32, on cpu>, step 1>"
    )


def test_optimizers_may_share_their_parameters():
    """The buffers are shared, and the states are each one's own: one after the other is one step of both."""
    rng = np.random.default_rng(5)
    params, grads = tree(rng, np.float64), tree(rng, np.float64)
    flat = fastopt.pack(params)
    first, second = fastopt.Adam(flat), fastopt.Momentum(flat, lr=0.1)
    assert first.flat is second.flat is flat
    assert first.params is second.params is flat.params
    first.step(grads)
    second.step(grads)
    alone = fastopt.Adam(params)
    alone.step(grads)
    assert bits_of(first, "w")[1:] == bits_of(alone, "w")[1:]
    assert flat.params["w"].tobytes() == (alone.params["w"] - 0.1 * grads["w"]).tobytes()


def test_optimizers_that_share_parameters_in_place_follow_them_to_other_arrays():
    """The arrays of before may be gone by then, and their addresses may be those of other objects."""
    rng = np.random.default_rng(5)
    base = np.zeros(32)
    shared = fastopt.pack([base[:16], base[16:]], copy=False)  # neighbours, which one chunk covers
    first, second = fastopt.SGD(shared, lr=1.0), fastopt.Momentum(shared, lr=1.0)
    for opt in (first, second):
        opt.step()
        opt.step([np.ones(16), np.ones(16)])
        opt.accumulate([np.ones(16), np.ones(16)])
        opt.zero_grad()
    before = base.copy()
    moved = [rng.normal(size=16) for _ in range(3)]
    kept = [array.copy() for array in moved]
    first.update([moved[2], moved[0]], [np.ones(16), np.ones(16)])
    assert second.params[0] is moved[2]
    second.states["velocity"][0][...] = second.states["velocity"][1][...] = 0.0
    second.step([np.ones(16), None])
    second.accumulate([None, np.ones(16)])
    second.step()
    second.grads[0], second.grads[1] = np.ones(16), np.ones(16)
    second.states["velocity"][0][...] = second.states["velocity"][1][...] = 0.0
    second.step()
    np.testing.assert_array_equal(base, before)
    np.testing.assert_array_equal(moved[0], kept[0] - 1.0 - 1.0 - 1.0)
    np.testing.assert_array_equal(moved[1], kept[1])
    np.testing.assert_array_equal(moved[2], kept[2] - 1.0 - 1.0 - 1.0)


def test_a_state_tree_is_made_of_views():
    rng = np.random.default_rng(6)
    opt = fastopt.Adam(tree(rng))
    assert list(opt.states) == ["m", "v"]
    opt.states["m"]["w"][...] = 2.0
    opt.step()
    assert opt.states["m"]["w"].tolist() == [np.float32(0.9) * np.float32(2.0)] * 17


@pytest.mark.parametrize("base", [fastopt.Adam, fastopt.AdamW, fastopt.LAMB, fastopt.SGD, fastopt.Nesterov])
def test_a_subclass_of_a_named_optimizer_is_that_optimizer(base):
    class Mine(base):
        """A user's: same rule, another default or method."""

    rng = np.random.default_rng(7)
    params, grads = tree(rng), tree(rng)
    mine, original = Mine(params, lr=0.5), base(params, lr=0.5)
    mine.step(grads)
    original.step(grads)
    assert bits(mine) == bits(original)
    assert "Mine" not in fastopt.Optimizer.classes


# --- grad_scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 1024, 2.0**-10, np.float32(65536.0)])
@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_a_power_of_two_as_grad_scale_changes_no_bit(name, scale):
    rng = np.random.default_rng(8)
    params = tree(rng)
    plain, scaled = getattr(fastopt, name)(params), getattr(fastopt, name)(params)
    for _ in range(3):
        grads = tree(rng)
        plain.step(grads)
        scaled.step(by_factor(grads, scale), grad_scale=scale)
        assert bits(plain) == bits(scaled)


@given(st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=25)
def test_grad_scale_multiplies_gradients_by_its_inverse(scale):
    rng = np.random.default_rng(9)
    p, g = rng.normal(size=(2, 33)).astype(np.float32)
    scaled, ready = fastopt.Adam([p], weight_decay=0.1), fastopt.Adam([p], weight_decay=0.1)
    kept = g.copy()
    scaled.step([g], grad_scale=scale)
    ready.step([g * np.float32(1.0 / scale)])
    assert scaled.flat.data.tobytes() == ready.flat.data.tobytes()
    assert g.tobytes() == kept.tobytes()  # only read
    assert not scaled.flat.grad.any()  # and not copied
    scaled.grads[0] = g
    scaled.step(grad_scale=scale)
    ready.step([g * np.float32(1.0 / scale)])
    assert scaled.flat.data.tobytes() == ready.flat.data.tobytes()
    assert scaled.grads[0].tobytes() == g.tobytes()  # only read


def test_a_step_without_grad_scale_forgets_the_last_one():
    rng = np.random.default_rng(10)
    params, grads = tree(rng), tree(rng)
    changing, plain = fastopt.SGD(params), fastopt.SGD(params)
    changing.step(by_factor(grads, 4.0), grad_scale=4.0)
    changing.step(grads)
    plain.step(grads)
    plain.step(grads)
    assert bits(changing) == bits(plain)


# --- overrides --------------------------------------------------------------------------------------------------------

OVERRIDES: dict[str, dict[str, Any]] = {
    "*": {"eps": 1e-6},
    "head.*": {"lr": 0.05, "betas": (0.5, 0.75)},
    "*b*": {"weight_decay": 0.5},
    "head.bias": {"lr": 0.2, "weight_decay": 0.0},
}
IN_FORCE: dict[str, dict[str, Any]] = {
    "b": {"eps": 1e-6, "weight_decay": 0.5},
    "head.bias": {"eps": 1e-6, "lr": 0.2, "betas": (0.5, 0.75), "weight_decay": 0.0},
    "head.weight": {"eps": 1e-6, "lr": 0.05, "betas": (0.5, 0.75)},
    "w": {"eps": 1e-6},
}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "LAMB"])
def test_overrides_equal_separate_optimizers_in_one_launch(monkeypatch, name):
    rng = np.random.default_rng(11)
    make = getattr(fastopt, name)
    params = tree(rng)
    opt = make(params, lr=0.1, overrides=OVERRIDES)
    alone = {path: make([p], **{"lr": 0.1, **IN_FORCE[path]}) for path, p in by_path(params).items()}
    grads = [tree(rng) for _ in range(4)]
    launches = Launches(monkeypatch, opt)
    for g in grads:
        opt.step(g)
    assert launches.count == 4
    monkeypatch.undo()
    for path, one in alone.items():
        for g in grads:
            one.step([by_path(g)[path]])
        expected = [each[0].tobytes() for each in (one.params, *one.states.values())]
        assert bits_of(opt, path) == expected, path


def test_a_hundred_groups_are_one_launch(monkeypatch):
    rng = np.random.default_rng(12)
    params = {f"p{k}": rng.normal(size=k + 1) for k in range(100)}
    opt = fastopt.SGD(params, overrides={f"p{k}": {"lr": 0.01 * k} for k in range(100)})
    launches = Launches(monkeypatch, opt)
    opt.step({name: np.ones_like(p) for name, p in params.items()})
    assert launches.count == 1
    assert sorted(chunk.group for chunk in launches.chunks) == list(range(100))
    for k, (name, p) in enumerate(params.items()):
        assert (opt.params[name] == p - 0.01 * k).all()


def test_parameters_of_the_same_hyperparameters_share_a_group(monkeypatch):
    opt = fastopt.SGD(list(np.ones((4, 16))), lr=0.1, overrides={"1": {"lr": 0.2}, "3": {"lr": 0.2}})
    launches = Launches(monkeypatch, opt)
    opt.step()
    assert len({chunk.group for chunk in launches.chunks}) == len(opt.groups) == 2


def test_an_override_that_equals_the_lr_of_the_optimizer_outlives_a_new_lr():
    """It is an override all the same, and so a group of its own."""
    opt = fastopt.SGD(list(np.ones((2, 16))), lr=0.5, overrides={"1": {"lr": 0.5}})
    assert len(opt.groups) == 2
    opt.lr = 0.25
    opt.step(list(np.ones((2, 16))))
    assert opt.params[0][0] == 0.75
    assert opt.params[1][0] == 0.5


def test_an_override_may_be_a_schedule_and_outlives_a_new_lr():
    rng = np.random.default_rng(13)
    params = tree(rng)
    opt = fastopt.SGD(params, lr=0.5, overrides={"w": {"lr": lambda step: 0.25 * step}})
    opt.zero_grad()
    for step in range(3):
        opt.lr = 0.5 / 2**step
        opt.step(by_factor(params, 1.0) if step else tree(rng))
    expected = fastopt.SGD({"w": params["w"]}, lr=0.0)
    for step in range(3):
        expected.lr = 0.25 * step
        expected.step({"w": params["w"]})
    assert opt.params["w"].tobytes() == expected.params["w"].tobytes()


# --- missing gradients ------------------------------------------------------------------------------------------------


def masked(grads: Any, present: tuple[bool, ...]) -> Any:
    """`grads`, with None for the paths that are not present."""
    kept = {path: g if here else None for (path, g), here in zip(by_path(grads).items(), present, strict=True)}
    return {"b": kept["b"], "head": {"bias": kept["head.bias"], "weight": kept["head.weight"]}, "w": kept["w"]}


STEPPED_APART = [
    ("Adam", {}),
    ("AdamW", {"amsgrad": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),  # whose first update of a parameter is another
    ("Adagrad", {"lr_decay": 0.5}),
    ("LAMB", {}),
]


@pytest.mark.parametrize(("name", "options"), STEPPED_APART)
@pytest.mark.parametrize("overrides", [{}, {"head.*": {"lr": 0.03}}], ids=["one group", "two groups"])
@settings(deadline=None, max_examples=10)
@given(masks=st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=7))
def test_a_parameter_without_gradient_is_as_if_it_were_not_stepped(name, options, overrides, masks):
    """Parameter, states and count of updates: each has its own, as if it had an optimizer to itself."""
    rng = np.random.default_rng(14)
    make = getattr(fastopt, name)
    params = tree(rng)
    opt = make(params, overrides=overrides, **options)
    alone = {
        path: make([p], **{**options, **(overrides.get("head.*", {}) if "head" in path else {})})
        for path, p in by_path(params).items()
    }
    for step, mask in enumerate(masks):
        grads = tree(rng)
        assert opt.step(masked(grads, mask)).step == step + 1
        for (path, one), here in zip(alone.items(), mask, strict=True):
            if here:
                one.step([by_path(grads)[path]])
            expected = [each[0].tobytes() for each in (one.params, *one.states.values())]
            assert bits_of(opt, path) == expected, (step, path)
    assert opt.state_dict()["missed"] == {
        path: misses
        for path, misses in zip(PATHS, np.sum(np.logical_not(masks), axis=0).tolist(), strict=True)
        if misses
    }
    assert len(opt._pipeline.groups.list) <= len(PATHS)


def test_missing_gradients_are_one_launch_too(monkeypatch):
    rng = np.random.default_rng(15)
    opt = fastopt.Adam(tree(rng), overrides={"w": {"lr": 0.1}})
    launches = Launches(monkeypatch, opt)
    masks = [(True, False, True, False), (False, True, True, True), (True,) * 4]
    for count, mask in enumerate(masks, 1):
        opt.step(masked(tree(rng), mask))
        assert launches.count == count
        assert [chunk.place for chunk in launches.chunks] == [k for k, here in enumerate(mask) if here]


def test_no_gradient_at_all_still_counts_as_a_step():
    rng = np.random.default_rng(16)
    opt = fastopt.Adam(tree(rng), lr=schedules.linear(0.1, 0.0, 10))
    opt.step(tree(rng))
    before = bits(opt), opt.flat.grad.tobytes()
    assert opt.step(masked(tree(rng), (False,) * 4)).step == 2
    assert (bits(opt), opt.flat.grad.tobytes()) == before
    assert opt.lr == pytest.approx(0.08)
    assert opt.state_dict()["missed"] == dict.fromkeys(PATHS, 1)


def test_gradients_that_are_passed_leave_the_buffer_as_it_is():
    rng = np.random.default_rng(17)
    opt = fastopt.SGD(tree(rng), zero_grad=True)
    opt.grads["w"][...] = 7.0
    grads = tree(rng)
    before = {path: grad.copy() for path, grad in by_path(grads).items()}
    opt.step(grads)
    opt.step(masked(grads, (True, True, True, False)))
    assert (opt.grads["w"] == 7.0).all()
    assert all((grad == before[path]).all() for path, grad in by_path(grads).items())


def test_schedules_follow_the_steps_and_not_a_parameters_own_updates():
    opt = fastopt.SGD({"a": np.zeros(1), "b": np.zeros(1)}, lr=lambda step: 10.0**step)
    one = np.ones(1)
    for grads in ({"a": one, "b": None}, {"a": one, "b": None}, {"a": one, "b": one}):
        opt.step(grads)
    assert opt.params["a"].tolist() == [-111.0]
    assert opt.params["b"].tolist() == [-100.0]


# --- schedules --------------------------------------------------------------------------------------------------------

BETAS = [(0.9, 0.99), (0.5, 0.9), (0.0, 0.75), (0.25, 0.5)]
SCHEDULED: list[tuple[str, dict[str, Any], dict[str, Callable[[int], Any]]]] = [
    ("Adam", {}, {"lr": lambda step: 0.1 / (step + 1)}),
    ("Adam", {}, {"betas": lambda step: BETAS[step]}),
    ("AdamW", {}, {"lr": schedules.cosine(0.1, 0.0, 4), "weight_decay": lambda step: 0.1 * step}),
    ("SGD", {}, {"momentum": lambda step: 0.2 * step}),
    ("RMSprop", {}, {"momentum": lambda step: 0.2 * step, "eps": lambda step: 10.0**-step}),
    ("LAMB", {}, {"betas": lambda step: BETAS[step], "weight_decay": lambda step: 0.1 * step}),
]


@pytest.mark.parametrize(("name", "fixed", "scheduled"), SCHEDULED, ids=[f"{n}-{'-'.join(s)}" for n, _, s in SCHEDULED])
def test_a_hyperparameter_may_be_a_function_of_the_step(name, fixed, scheduled):
    """Step 0 is the first update, whose t is 1."""
    rng = np.random.default_rng(18)
    p = rng.normal(size=19).astype(np.float32)
    opt = getattr(fastopt, name)([p], **fixed, **scheduled)
    states = [np.zeros_like(p) for _ in opt.rule.states]
    defaults = {key: value for key, value in opt._pipeline.groups.base.items() if key not in scheduled}
    for step in range(4):
        g = rng.normal(size=19).astype(np.float32)
        opt.step([g])
        opt.rule.update_(p, g, *states, t=step + 1, **defaults, **{key: f(step) for key, f in scheduled.items()})
        assert opt.params[0].tobytes() == p.tobytes()
        for state, expected in zip(opt.states.values(), states, strict=True):
            assert state[0].tobytes() == expected.tobytes()


def test_a_schedule_is_asked_once_a_step_and_tried_at_0():
    asked: list[int] = []

    def lr(step: int) -> float:
        asked.append(step)
        return 0.1

    opt = fastopt.SGD([np.ones(3)], lr=lr)
    assert set(asked) == {0}
    asked.clear()
    for _ in range(4):
        opt.step([np.ones(3)])
    assert asked == [0, 1, 2, 3]


def test_lr_reads_and_writes():
    opt = fastopt.SGD([np.zeros(1)], lr=0.5)
    assert opt.lr == 0.5
    opt.grads[0][...] = 1.0
    opt.step()
    opt.lr = 0.25
    assert opt.lr == 0.25
    opt.step()
    assert opt.params[0].tolist() == [-0.75]
    opt.lr = lambda step: 2.0 * step
    assert opt.lr == 4.0
    opt.step()
    assert opt.params[0].tolist() == [-4.75]
    assert opt.lr == 6.0
    opt.lr = np.float32(1.0)
    assert type(opt.lr) is float
    assert opt.step_count == 3


def test_a_new_lr_keeps_states_and_counts():
    rng = np.random.default_rng(19)
    params, grads = tree(rng), [tree(rng) for _ in range(6)]
    mask = (True, False, True, True)
    changed, scheduled = fastopt.Adam(params, lr=0.1), fastopt.Adam(params, lr=lambda step: 0.1 if step < 3 else 0.01)
    for step, g in enumerate(grads):
        if step == 3:
            changed.lr = 0.01
        for opt in (changed, scheduled):
            opt.step(masked(g, mask) if step in (1, 4) else g)
    assert bits(changed) == bits(scheduled)


def test_hyperparameters_without_an_lr_raise_for_lr():
    class Hyper(NamedTuple):
        rate: float

    def prepare(t: int, rate: float = 0.1) -> Hyper:
        return Hyper(rate)

    @fastopt.rule(prepare)
    def descent(p, g, h):
        return p - h.rate * g

    opt = fastopt.Optimizer([np.ones(2)], descent)
    with pytest.raises(AttributeError, match=r"^lr: rule 'descent' has no lr; it has rate, weight_decay"):
        _ = opt.lr
    with pytest.raises(AttributeError, match=r"^lr: rule 'descent' has no lr"):
        opt.lr = 0.1
    assert not hasattr(opt, "lr")


# --- state ------------------------------------------------------------------------------------------------------------


def run(opt: fastopt.Optimizer, steps: range) -> None:
    """Steps that depend on their number alone; every third without one of the gradients."""
    for step in steps:
        grads = tree(np.random.default_rng([20, step]))
        opt.step(masked(grads, (True, step % 3 != 1, True, True)))


@pytest.mark.parametrize("case", PER_RULE, ids=str)
def test_a_resumed_run_is_the_same_run(case: Case):
    params = tree(np.random.default_rng(20))
    overrides = {"head.weight": {"lr": 0.03}}  # a matrix: Muon's lr acts on no other
    whole = case.make(params, overrides=overrides)
    run(whole, range(8))

    first = case.make(params, overrides=overrides)
    run(first, range(5))
    saved = first.state_dict()
    described = json.loads(json.dumps({key: value for key, value in saved.items() if key != "state"}))  # plain data
    fresh = case.make(first.params, lr=0.7)
    fresh.load_state_dict({**described, "state": saved["state"]})
    assert fresh.step_count == 5
    assert repr(fresh) == repr(first)
    run(fresh, range(5, 8))
    assert bits(fresh) == bits(whole)
    assert fresh.state_dict()["missed"] == {"head.bias": 3}


def test_a_resumed_run_takes_its_schedules_from_the_construction():
    params = tree(np.random.default_rng(21))
    options: dict[str, Any] = {
        "lr": schedules.warmup(0.1, 4),
        "betas": lambda step: (0.9 - 0.1 * step, 0.99),
        "overrides": {"w": {"weight_decay": lambda step: 0.1 * step}},
    }
    whole, first = fastopt.AdamW(params, **options), fastopt.AdamW(params, **options)
    run(whole, range(8))
    run(first, range(5))
    saved = first.state_dict()
    assert saved["hyper"]["lr"] == {"schedule": repr(options["lr"])}
    fresh = fastopt.AdamW(first.params, **options)
    fresh.load_state_dict(saved)
    assert fresh.lr == first.lr
    run(fresh, range(5, 8))
    assert bits(fresh) == bits(whole)


def test_state_dict_is_a_copy_and_so_is_what_is_loaded():
    opt = fastopt.Adam(tree(np.random.default_rng(22)))
    run(opt, range(2))
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    run(opt, range(2, 4))
    assert saved["step"] == kept["step"] == 2
    for name, arrays in kept["state"].items():
        for path, array in arrays.items():
            assert saved["state"][name][path].tobytes() == array.tobytes()
            assert not np.shares_memory(saved["state"][name][path], opt.states[name]["w"])

    opt.load_state_dict(saved)
    for arrays in saved["state"].values():
        for array in arrays.values():
            array.fill(99.0)
    assert [state.tobytes() for state in by_path(opt.states["m"]).values()] == [
        state.tobytes() for state in kept["state"]["m"].values()
    ]


def test_state_dict_holds_what_a_resumed_run_needs():
    opt = fastopt.Adam({"w": np.ones(2), "b": np.ones(1)}, overrides={"b": {"lr": 0.5}})
    opt.step({"w": np.ones(2), "b": None})
    saved = opt.state_dict()
    assert {key: value for key, value in saved.items() if key != "state"} == {
        "format": 1,
        "rule": "adam",
        "step": 1,
        "missed": {"b": 1},
        "hyper": {
            "lr": 0.001,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "eps_inside": False,
            "bias_correction": True,
            "eps_hat": False,
            "weight_decay": 0.0,
        },
        "overrides": {"b": {"lr": 0.5}},
        "options": {
            "max_norm": None,
            "clip_norm_per_tensor": None,
            "clip_value": None,
            "nonfinite": "propagate",
            "ema": None,
            "zero_grad": False,
            "maximize": False,
            "grad_norm": False,
            "states": None,
            "master": None,
            "rounding": "nearest",
            "compensated": False,
            "seed": 0,
            "min_8bit_size": 4096,
            "decoupled_weight_decay": False,
            "members": None,
        },
        "ema": None,
        "nonfinite": {"consecutive": 0, "total": 0},
    }
    assert {name: list(arrays) for name, arrays in saved["state"].items()} == {"m": ["b", "w"], "v": ["b", "w"]}


# --- looking ahead ----------------------------------------------------------------------------------------------------


def lookahead(params: Any, **options: Any) -> fastopt.Nesterov:
    return fastopt.Nesterov(params, form="lookahead", **options)


def quadratic(p: np.ndarray) -> np.ndarray:
    """The gradient of a quadratic bowl whose axes are of different steepness."""
    return p * np.linspace(0.5, 2.0, p.size)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lookahead_matches_the_reference(weight_decay):
    p = np.random.default_rng(23).normal(size=37)
    opt = lookahead([p], lr=0.1, momentum=0.8, weight_decay=weight_decay)
    state = fastopt.reference.init_state("nesterov", p, form="lookahead")
    for t in range(1, 51):
        with opt.lookahead() as params:
            grads = [quadratic(params[0])]
        opt.step(grads)
        g = quadratic(p - 0.8 * state["velocity"])
        fastopt.reference.nesterov(p, g, state, t, lr=0.1, momentum=0.8, weight_decay=weight_decay, form="lookahead")
    np.testing.assert_allclose(opt.params[0], p, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(opt.states["velocity"][0], state["velocity"], rtol=1e-12, atol=1e-15)


def test_lookahead_and_reformulated_walk_the_same_path():
    p = np.random.default_rng(24).normal(size=37)
    ahead, reformulated = lookahead([p], lr=0.1), fastopt.Nesterov([p], lr=0.1)
    for _ in range(30):
        with ahead.lookahead() as params:
            np.testing.assert_allclose(params[0], reformulated.params[0], rtol=1e-10, atol=1e-13)
            grads = [quadratic(params[0])]
        ahead.step(grads)
        reformulated.step([quadratic(reformulated.params[0])])


def test_lookahead_follows_groups_and_schedules():
    one = np.ones(2)
    momentum = {"momentum": lambda step: 0.25 * step, "overrides": {"b": {"momentum": 0.5}}}
    opt = lookahead({"a": one, "b": one.copy()}, lr=0.5, **momentum)
    opt.step({"a": one, "b": one})
    assert opt.states["velocity"]["a"].tolist() == [0.5, 0.5]
    with opt.lookahead() as params:
        assert params["a"].tolist() == [0.5 - 0.25 * 0.5] * 2
        assert params["b"].tolist() == [0.5 - 0.5 * 0.5] * 2


def test_lookahead_restores_every_bit():
    rng = np.random.default_rng(25)
    opt = lookahead(tree(rng), lr=0.1)
    opt.step(tree(rng))
    before, grads = bits(opt), opt.flat.grad.tobytes()
    with opt.lookahead() as params:
        assert params is opt.params
        assert bits(opt)[: len(PATHS)] != before[: len(PATHS)]
        assert bits(opt)[len(PATHS) :] == before[len(PATHS) :]
        params["w"][...] = math.nan
    assert (bits(opt), opt.flat.grad.tobytes()) == (before, grads)
    with pytest.raises(KeyError, match="mine"), opt.lookahead():
        raise KeyError("mine")
    assert (bits(opt), opt.flat.grad.tobytes()) == (before, grads)
    opt.step()
    assert opt.step_count == 2


def test_inside_lookahead_nothing_else_may_move_the_parameters():
    rng = np.random.default_rng(26)
    opt = lookahead(tree(rng), lr=0.1)
    opt.step(tree(rng))
    before, saved = bits(opt), opt.state_dict()
    with opt.lookahead():
        held = bits(opt)
        with pytest.raises(RuntimeError, match=r"^step\(\) inside .*leave the block first"):
            opt.step(tree(rng))
        with pytest.raises(RuntimeError, match=r"^load_state_dict\(\) inside .*leave the block first"):
            opt.load_state_dict(saved)
        with pytest.raises(RuntimeError, match=r"^lookahead\(\) inside `with opt.lookahead\(\)`"), opt.lookahead():
            pass
        assert bits(opt) == held
    assert bits(opt) == before
    assert opt.step_count == 1


OUTSIDE = (
    r"^step\(\): gradients must be computed inside `with opt.lookahead\(\):`, which was not entered since the last "
    r"step; otherwise rule 'nesterov_lookahead' is another algorithm$"
)


def test_a_step_whose_gradients_were_not_looked_ahead_for_warns_once(tmp_path):
    grads = {"w": np.ones((2, 1))}
    steps: dict[str, Callable[[fastopt.Optimizer], Any]] = {
        "step": lambda opt: opt.step(grads),
        "own gradients": lambda opt: opt.step(),
        "accumulate": lambda opt: (opt.accumulate(grads), opt.step()),
        "rows": lambda opt: opt.step_rows({"w": (np.array([1]), np.ones((1, 1)))}),
        "update": lambda opt: opt.update(opt.params, grads),
    }
    for name, step in steps.items():
        opt = lookahead({"w": np.zeros((2, 1))}, lr=0.1, copy=name != "update", nonfinite="skip")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(opt)  # the velocity is 0: the look-ahead point is p
            for _ in range(2):
                with opt.lookahead():
                    pass
                with pytest.raises(ValueError, match="w"):
                    opt.step({"w": np.ones(3)})  # which is refused, and changes nothing
                assert opt.step({"w": np.full((2, 1), np.nan)}).skipped
                step(opt)
            opt.restart()
            step(opt)
            opt.save(tmp_path / "run.safetensors")
        before = opt.params["w"].tobytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=OUTSIDE):
                step(opt)
        assert (opt.params["w"].tobytes(), opt.step_count) == (before, 1)
        opt.zero_grad()
        with pytest.warns(UserWarning, match=OUTSIDE) as told:
            step(opt)
        assert [Path(each.filename).name for each in told] == [Path(__file__).name]
        assert opt.params["w"].tobytes() != before or name == "own gradients"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(opt)  # it has been said
        resumed = lookahead({"w": np.zeros((2, 1))}, lr=0.1, copy=name != "update")
        step(resumed)
        with resumed.lookahead():
            pass
        resumed.load(tmp_path / "run.safetensors", keep={"nonfinite"})  # after as many steps
        with pytest.warns(UserWarning, match=OUTSIDE):
            step(resumed)


def test_a_block_that_was_left_by_an_error_does_not_count_as_looked_ahead():
    opt = lookahead([np.zeros(2)], lr=0.1)
    opt.step([np.ones(2)])
    with pytest.raises(KeyError), opt.lookahead():
        raise KeyError
    with pytest.warns(UserWarning, match=OUTSIDE):
        opt.step([np.ones(2)])
    again = lookahead([np.zeros(2)], lr=0.1)
    again.step([np.ones(2)])
    with again.lookahead():
        pass
    again.restart()
    again.step([np.ones(2)])  # after as many steps as the block that belonged to the other run
    with pytest.warns(UserWarning, match=OUTSIDE):
        again.step([np.ones(2)])


@pytest.mark.parametrize("rule", [rules.nesterov_lookahead, rules.schedule_free_adamw], ids=lambda rule: rule.name)
def test_a_rule_whose_optimizer_has_a_context_that_this_one_lacks_warns(rule):
    context = rule.gradients_in or rule.evaluated_in
    with pytest.warns(
        UserWarning, match=rf"^rule '{rule.name}': must have an optimizer with the context {context}\(\)"
    ):
        opt = fastopt.Optimizer([np.ones(2)], rule)
    assert opt.step([np.ones(2)]).step == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in PER_RULE:
            case.make([np.ones((2, 2))])
    if rule.gradients_in:
        assert rule.decaying(True).gradients_in == "lookahead"


def test_the_reformulated_form_has_nothing_to_look_ahead_to():
    opt = fastopt.Nesterov([np.ones(2)])
    with (
        pytest.raises(TypeError, match=r"^lookahead\(\): form must be 'lookahead', got 'reformulated'"),
        opt.lookahead(),
    ):
        pass
    assert opt.step([np.ones(2)]).step == 1


def test_lookahead_at_which_the_schedule_goes_wrong_moves_nothing():
    opt = lookahead([np.ones(2)], momentum=lambda step: 0.5 if step == 0 else math.nan)
    opt.step([np.ones(2)])
    before = opt.flat.data.tobytes()
    with pytest.raises(ValueError, match=r"^at step 1, schedule of momentum: must be .*, got nan"), opt.lookahead():
        pass
    assert opt.flat.data.tobytes() == before
    with pytest.raises(
        ValueError, match=r"^at step 1, schedule of momentum: must be .*, got nan"
    ):  # and not: inside lookahead
        opt.step()


# --- a user's own rule ------------------------------------------------------------------------------------------------


class Hyper(NamedTuple):
    lr: float
    slope: float
    zero: float


def prepare(t: int, lr: float = 0.1, slope: float = 2.0) -> Hyper:
    return Hyper(lr / t, slope, 0.0)


def leaky(x, h):
    """A helper of the module that the rule below calls."""
    return x if x > h.zero else h.slope * x


def own_rule(power: int) -> fastopt.Rule:
    """A rule made inside a function: it closes over a number, a function and another rule of ours."""

    def raised(x):
        for _ in range(power - 1):
            x = x * x
        return x

    descent = rules.sgd

    @fastopt.rule(prepare, domains={"slope": fastopt.Interval(0.0, 10.0)})
    def own(p, g, memory, h):
        memory = raised(leaky(g, h)) + memory
        return descent(p, memory, h), memory

    return own


def test_a_users_own_rule_with_closures_helpers_and_our_rules():
    rng = np.random.default_rng(27)
    p = rng.normal(size=1003).astype(np.float32)
    opt = fastopt.Optimizer([p], own_rule(2), slope=0.5, weight_decay=0.25)
    memory = np.zeros_like(p)
    for t in range(1, 6):
        g = rng.normal(size=1003).astype(np.float32)
        opt.step([g])
        g = g + np.float32(0.25) * p
        leaked = np.where(g > 0, g, np.float32(0.5) * g)
        memory = leaked * leaked + memory
        p = p - np.float32(0.1 / t) * memory
        assert opt.params[0].tobytes() == p.tobytes()
        assert opt.states["memory"][0].tobytes() == memory.tobytes()
    assert repr(opt.rule) == "<rule own(p, g, memory, h)>"


def test_two_rules_of_one_source_and_other_closures_are_two_kernels():
    updated = []
    for power in (1, 2, 3):
        p, g, memory = np.zeros(5), np.full(5, 3.0), np.zeros(5)
        own_rule(power).update_(p, g, memory, lr=1.0)
        updated.append(p[0])
    assert updated == [-3.0, -9.0, -81.0]


def test_a_rule_is_still_the_plain_function():
    own = own_rule(2)
    h = own.prepare(2, lr=1.0)
    assert own(1.0, 3.0, 1.0, h) == (1.0 - 0.5 * 10.0, 10.0)
    assert own.scalar(1.0, -3.0, 0.0, h) == (1.0 - 0.5 * 36.0, 36.0)
    assert own.states == ("memory",)
    assert own.hyperparameters == ("lr", "slope")
    assert own.names() == ("lr", "slope", "weight_decay")
    assert own.defaults == {"lr": 0.1, "slope": 2.0}


def test_a_users_optimizer_class_with_defaults_in_its_signature(monkeypatch):
    monkeypatch.setattr(fastopt.Optimizer, "classes", dict(fastopt.Optimizer.classes))
    own = own_rule(1)

    class Own(fastopt.Optimizer, rules=(own,)):
        def __init__(self, params: Any, lr: Any = 0.5, slope: Any = 1.0, **options: Any):
            super().__init__(params, own, lr=lr, slope=slope, **options)

    opt = Own([np.ones(3)])
    opt.step([np.ones(3)])
    assert opt.params[0].tolist() == [0.5] * 3
    assert repr(opt).startswith("<Own(lr=0.5, slope=1.0, weight_decay=0.0)")
    assert fastopt.Optimizer.classes["Own"] is Own


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(fastopt.Optimizer.classes))
def test_a_deep_copy_goes_its_own_way_from_the_same_point(name):
    rng = np.random.default_rng(11)
    params, grads = tree(rng), tree(rng)
    opt = getattr(fastopt, name)(
        params, lr=fastopt.schedules.exponential(0.1, 0.1), overrides={"head.weight": {"lr": 0.5}}
    )
    opt.step({**grads, "w": None})
    twin = copy.deepcopy(opt)
    assert bits(twin) == bits(opt)
    assert not np.shares_memory(twin.flat.data, opt.flat.data)
    assert np.shares_memory(twin.params["w"], twin.flat.data)
    before = bits(opt)
    twin.step(grads)
    assert bits(opt) == before != bits(twin)
    opt.step(grads)
    assert bits(opt) == bits(twin)
    twin.step({**grads, "w": None})
    assert [each.state_dict()["missed"]["w"] for each in (opt, twin)] == [1, 2]
