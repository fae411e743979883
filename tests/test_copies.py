"""Copies: deep copies keep what belongs together, pickles go on in other processes, and what cannot be is refused."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import EVERYTHING, OF_EACH_KIND, Case

import fastopt
from fastopt import rules, schedules
from fastopt.batchnorm import Saved
from fastopt.kernels import get_backend
from fastopt.state import OptimizerState


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def by_an_old_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing, protocol=2))


COPIES: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, by_pickle, by_an_old_pickle)
copied = pytest.mark.parametrize("again", COPIES, ids=lambda again: again.__name__)


def tree(seed: int, dtype: Any = np.float64) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 3), "b": (5,), "number": (), "empty": (0, 2)}
    leaves = {k: np.asarray(rng.normal(size=s)).astype(dtype) for k, s in {"m": (3, 3), **shapes}.items()}
    return {"m": leaves.pop("m"), "n": leaves}


def everything(opt: fastopt.Optimizer) -> dict[str, bytes]:
    state = opt.state
    arrays = {**state.arrays, "p": opt.flat.arrays, "g": opt.flat.grad_arrays}
    return {
        f"{name}/{path}": array.tobytes()
        for name, views in arrays.items()
        for path, array in zip(opt.flat.paths, views, strict=True)
    } | {"described": repr(state.described()).encode()}


# --- the same run goes on ---------------------------------------------------------------------------------------------


@copied
@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_every_optimizer_goes_on_from_the_same_point(case: Case, again):
    of = partial(tree, dtype=np.float32)
    lr = schedules.warmup(schedules.cosine(0.1, 0.0, steps=20), steps=3)
    opt = case.make(of(0), lr=lr, overrides={"n.b": {"lr_scale": 0.5}}, **EVERYTHING)
    opt.groups["n.a"].weight_decay = 0.25
    opt.step(of(1))
    opt.step({**of(2), "m": None})
    opt.accumulate(of(3), weight=2.0)
    twin = again(opt)
    assert type(twin) is type(opt)
    assert everything(twin) == everything(opt)
    assert not any(map(np.shares_memory, twin.flat.arrays, opt.flat.arrays))
    assert twin.rule is opt.rule
    before = everything(opt)
    for _ in range(2):
        twin.accumulate(of(4))
        twin.step()
        twin.step({**of(5), "n": {**of(5)["n"], "a": None}})
    assert everything(opt) == before != everything(twin)
    for _ in range(2):
        opt.accumulate(of(4))
        opt.step()
        opt.step({**of(5), "n": {**of(5)["n"], "a": None}})
    assert everything(twin) == everything(opt)
    assert twin.groups["n.a"].weight_decay == 0.25
    assert again(twin).step_count == twin.step_count == 6


@copied
@pytest.mark.parametrize("in_place", [False, True], ids=["packed", "in place"])
def test_rows_that_are_behind_added_parameters_and_frozen_ones_are_copied(again, in_place):
    opt = fastopt.Adam({"e": np.ones((6, 2)), "w": np.ones(3)}, lr=0.1, ema=0.5, copy=not in_place)
    opt.add({"head": np.ones(2)}, lr=0.5)
    opt.groups["w"].frozen = True
    for row in range(3):
        opt.step_rows({"e": (np.array([row]), np.ones((1, 2)))}, {"e": None, "w": np.ones(3), "head": np.ones(2)})
    twin = again(opt)
    assert twin.flat.in_place == in_place
    for each in (opt, twin):
        each.add({"more": np.zeros(2)})
        each.groups["w"].frozen = False
        each.step_rows({"e": (np.array([4]), np.ones((1, 2)))})
        each.step({"e": np.ones((6, 2)), "w": np.ones(3), "head": np.ones(2), "more": np.ones(2)})
        each.zero_grad()
        each.restart()
        each.step({"e": np.ones((6, 2)), "w": np.ones(3), "head": None, "more": np.ones(2)})
    assert everything(twin) == everything(opt)


@copied
def test_an_optimizer_without_parameters_and_one_before_its_first_step_are_copied(again):
    twin = again(fastopt.Adam(lr=0.25, nonfinite="skip"))
    assert (twin.lr, twin.step_count) == (0.25, 0)
    params = {"w": np.ones(2)}
    assert twin.update(params, {"w": np.full(2, np.nan)}).skipped
    opt = fastopt.ScheduleFreeAdamW({"w": np.zeros(1), "x": np.zeros(1)}, ema=0.5)
    opt.ema["x"][...] = 3.0  # which is kept
    twin = again(opt)
    twin.params["w"][...] = 5.0  # at which z and the average begin
    twin.step({"w": np.zeros(1), "x": np.zeros(1)})
    assert (twin.ema["w"].tolist(), twin.states["z"]["w"].tolist(), twin.ema["x"].tolist()) == ([5.0], [5.0], [1.5])
    assert opt.ema["w"].tolist() == [0.0]
    for _ in range(2):
        twin.step({"w": np.zeros(1), "x": np.zeros(1)})
    opt.params["w"][...] = 6.0  # where this one has not begun
    opt.step({"w": np.zeros(1), "x": np.zeros(1)})
    assert (opt.ema["w"].tolist(), opt.states["z"]["w"].tolist()) == ([6.0], [6.0])


class Mine(fastopt.SGD):
    history: list[float]

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        self.history = []


@copied
def test_what_a_subclass_keeps_is_copied_with_it(again):
    opt = Mine({"w": np.ones(1)}, lr=0.5)
    twin = again(opt)
    twin.history.append(1.0)
    assert (opt.history, twin.history) == ([], [1.0])


# --- what belongs together --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layer:
    W: Any
    b: Any


class Trainer:
    """Keeps the optimizer, what it handed out, and a layer attached to it, in some order."""

    def __init__(self, order: tuple[str, ...], in_place: bool):
        bn = fastopt.BatchNorm(2, dtype=np.float64)
        params = {"layer": Layer(np.ones((3, 2)), np.zeros(2)), "list": [np.ones(4)], "bn": bn.state}
        opt = fastopt.SGD(params, lr=1.0, copy=not in_place, ema=0.5)
        bn.attach(opt.params["bn"], opt.grads["bn"])
        for name in order:
            setattr(
                self,
                name,
                {
                    "opt": opt,
                    "bn": bn,
                    "params": opt.params,
                    "layer": opt.params["layer"],
                    "leaf": opt.params["list"][0],
                    "grads": opt.grads,
                    "flat": opt.flat,
                    "head": opt.groups["list.*"],
                    "groups": opt.groups,
                }[name],
            )


NAMES = ("opt", "bn", "params", "layer", "leaf", "grads", "flat", "head", "groups")
ORDERS = (NAMES, NAMES[::-1], ("bn", "leaf", "opt", "groups", "head", "flat", "grads", "layer", "params"))


@copied
@pytest.mark.parametrize("in_place", [False, True], ids=["packed", "in place"])
@pytest.mark.parametrize("order", ORDERS, ids=["optimizer first", "optimizer last", "between"])
def test_copies_keep_the_tie_between_the_optimizer_and_the_arrays_handed_out(order, in_place, again):
    trainer: Any = Trainer(order, in_place)
    trainer.opt.step({"layer": Layer(None, None), "list": [np.ones(4)], "bn": dict.fromkeys(trainer.params["bn"])})
    twin: Any = again(trainer)
    before = everything(trainer.opt)
    opt = twin.opt
    assert twin.flat is opt.flat
    shared = {
        "layer.W": (twin.layer.W, twin.params["layer"].W),
        "layer.b": (twin.layer.b,),
        "list.0": (twin.leaf, twin.params["list"][0]),
        **{f"bn.{name}": (array, twin.params["bn"][name]) for name, array in twin.bn.state.items()},
    }
    for path, own, grad in zip(opt.flat.paths, opt.flat.arrays, opt.flat.grad_arrays, strict=True):
        assert all(each is own for each in shared[path]), path
        assert not np.shares_memory(own, trainer.opt.flat.arrays[0])
        if path in ("bn.gamma", "bn.beta"):
            assert twin.bn.grads[path[3:]] is grad is twin.grads["bn"][path[3:]]
    twin.bn.forward(np.array([[0.0, 1.0], [2.0, 5.0]]))
    twin.bn.backward(np.ones((2, 2)))
    twin.grads["layer"].W[...] = 1.0
    twin.leaf[...] = 7.0
    twin.head.frozen = True
    opt.step()
    assert twin.params["bn"]["beta"].tolist() == twin.bn.params["beta"].tolist() == [-2.0, -2.0]
    assert twin.params["layer"].W.tolist() == np.zeros((3, 2)).tolist()
    assert opt.params["list"][0].tolist() == [7.0] * 4
    assert opt.params["bn"]["running_mean"].round(12).tolist() == [0.1, 0.3]
    assert {group.frozen for group in twin.groups if "list.0" in group.paths} == {True}
    assert everything(trainer.opt) == before
    assert not trainer.head.frozen
    next_one = again(twin)
    next_one.opt.zero_grad()
    assert twin.grads["layer"].W.tolist() == np.ones((3, 2)).tolist()
    assert everything(next_one.opt).keys() == before.keys()


def test_a_deep_copy_hands_out_containers_that_write_into_its_arrays():
    opt = fastopt.SGD({"w": np.zeros(1), "n": [np.zeros(1)]}, lr=1.0)
    twin, params, inner, buffer = copy.deepcopy((opt, opt.params, opt.params["n"], opt.flat))
    params["w"] = np.full(1, 3.0)
    inner[0] = np.full(1, 4.0)
    assert (twin.params["w"].tolist(), twin.params["n"][0].tolist()) == ([3.0], [4.0])
    assert params is twin.params
    assert buffer is twin.flat
    assert twin.flat.data.max() == 4.0  # one buffer, as before
    with pytest.raises(TypeError, match=r'opt.params\["new"\]: must be one of the keys'):
        params["new"] = np.zeros(1)
    one, two = copy.deepcopy([opt, fastopt.SGD(opt.params)])
    one.step({"w": np.ones(1), "n": [np.ones(1)]})
    assert two.params["w"].tolist() == [0.0]


def test_arrays_that_cannot_be_written_are_copied_when_they_are_unpickled():
    opt = fastopt.Adam({"w": np.ones(3)}, lr=0.1)
    opt.step({"w": np.ones(3)})
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(opt, protocol=5, buffer_callback=buffers.append)
    assert buffers
    read_only = [memoryview(bytes(buffer.raw())) for buffer in buffers]  # as joblib's memory maps are
    twin = pickle.loads(data, buffers=read_only)
    assert all(array.flags.writeable for array in (*twin.flat.arrays, *twin.flat.grad_arrays))
    for each in (opt, twin):
        each.step({"w": np.ones(3)})
        each.zero_grad()
    assert everything(twin) == everything(opt)


# --- inside a block that holds the parameters elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "make"),
    [
        ("swap_ema", lambda: fastopt.SGD({"w": np.ones(1)}, ema=0.5)),
        ("eval_params", lambda: fastopt.ScheduleFreeAdamW({"w": np.ones(1)})),
        ("lookahead", lambda: fastopt.Nesterov({"w": np.ones(1)}, form="lookahead")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inside_a_context_a_copy_is_refused(context, make):
    opt = make()
    opt.step({"w": np.ones(1)})
    with getattr(opt, context)():
        for again, what in zip(COPIES, ("deepcopy", "pickle", "pickle"), strict=True):
            with pytest.raises(
                RuntimeError, match=rf"^{what}\(\) inside `with opt.{context}\(\)`: leave the block first"
            ):
                again({"opt": opt})
    for again in COPIES:
        with getattr(again(opt), context)():
            pass


# --- everything public ------------------------------------------------------------------------------------------------


class Hyper(NamedTuple):
    lr: float


def prepare(t: int, lr: float = 0.5) -> Hyper:
    return Hyper(lr)


@fastopt.rule(prepare)
def descent(p, g, h):
    return p - h.lr * g


def one_epoch() -> Any:
    return fastopt.minibatches(np.arange(6.0), batch_size=4, rng=0)


PUBLIC: dict[str, Callable[[], Any]] = {
    "BatchNorm": lambda: fastopt.BatchNorm(2, momentum=None, axis=-1, activation="relu"),
    "BatchNorm without arrays": lambda: fastopt.BatchNorm(2, affine=False, track_running_stats=False),
    "Choice": lambda: fastopt.Choice(("a", "b")),
    "Flag": lambda: fastopt.Flag(),
    "FlatParams": lambda: fastopt.pack({"w": np.ones(2, np.float32)}),
    "Interval": lambda: fastopt.Interval(0.0, 1.0),
    "Linear": lambda: fastopt.Linear(with_l2=True),
    "minibatches": one_epoch,
    "StepInfo": lambda: fastopt.SGD({"w": np.ones(2)}, lr=0.5, grad_norm=True).step({"w": np.ones(2)}),
    "OptimizerState": lambda: fastopt.Adam({"w": np.ones(2)}).state,
    "Layerwise": lambda: fastopt.Layerwise(max, min),
    "Scaling": lambda: fastopt.Scaling(max),
    "Sums": lambda: rules.lamb.sums[0],
    "Matrixwise": lambda: rules.muon.matrixwise,
    "backend": lambda: get_backend("cpu"),
    "groups": lambda: fastopt.Adam({"w": np.ones(2)}).groups,
    "group": lambda: fastopt.Adam({"w": np.ones(2)}).groups["w"],
    **{name: lambda rule=rule: rule for name, rule in rules.ALL.items()},
}


@copied
@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_copied(name, again):
    thing = PUBLIC[name]()
    twin = again(thing)
    assert type(twin) is type(thing)
    if not isinstance(thing, OptimizerState):
        shown = (repr(thing), repr(twin))
        assert shown[0] == shown[1] or " object at 0x" in shown[0] or "<function" in shown[0]
    if isinstance(thing, fastopt.Rule) or name == "backend":
        assert twin is thing
    assert copy.copy(thing) is not None


@copied
def test_a_batchnorm_goes_on_between_its_passes_too(again):
    x = np.random.default_rng(0).normal(size=(6, 3))
    bn = fastopt.BatchNorm(3, activation="relu", dtype=np.float64)
    bn.forward(x)
    bn.backward(np.ones_like(x))
    bn.forward(2.0 * x, residual=x)
    twin = again(bn)
    for mine, theirs in zip(bn.backward(x), twin.backward(x), strict=True):
        assert mine.tobytes() == theirs.tobytes()
    assert bn.grads["gamma"].tobytes() == twin.grads["gamma"].tobytes()
    before = bn.running_mean.copy()
    assert twin.forward(x).tobytes() == copy.deepcopy(bn).forward(x).tobytes()
    assert bn.running_mean.tobytes() == before.tobytes()
    _, saved = fastopt.batchnorm_forward(x, activation="relu")
    assert isinstance(again(saved), Saved)
    assert fastopt.batchnorm_backward(x, again(saved)).dx.tobytes() == fastopt.batchnorm_backward(x, saved).dx.tobytes()


def test_rules_are_pickled_by_name():
    for rule in (*rules.ALL.values(), descent):
        assert by_pickle(rule) is copy.deepcopy(rule) is copy.copy(rule) is rule
        if not rule.owns_weight_decay and "lr" in rule.names():
            other = rule.decaying(not rule.decoupled)
            assert by_pickle(other) is copy.deepcopy(other) is other
    assert by_pickle(fastopt.SGD({"w": np.ones(1)}, decoupled_weight_decay=True)).rule is rules.sgd.decaying(True)
    assert by_pickle(fastopt.Optimizer({"w": np.ones(1)}, descent)).rule is descent

    @fastopt.rule(prepare)
    def inner(p, g, h):
        return p - h.lr * g

    opt = fastopt.Optimizer({"w": np.ones(1)}, inner)
    for thing, name in ((inner, "inner"), (opt, "inner"), (fastopt.rule(prepare)(descent.scalar), "descent")):
        message = rf"^rule '{name}': must be a global of its module \(test_copies\) under its own name to be pickled"
        with pytest.raises(pickle.PicklingError, match=message):
            pickle.dumps(thing)
    assert copy.deepcopy(opt).rule is inner


# --- other processes --------------------------------------------------------------------------------------------------


def trained(opt: fastopt.Optimizer, bn: fastopt.BatchNorm, steps: int) -> tuple[fastopt.Optimizer, fastopt.BatchNorm]:
    """Some steps of an optimizer with a layer attached to it, in another process."""
    for step in range(steps):
        x = np.random.default_rng(step).normal(size=(8, 2))
        bn.backward(bn.forward(x))
        opt.step()
    return opt, bn


def stepped(opt: fastopt.Optimizer, grads: Any) -> fastopt.Optimizer:
    opt.step(grads)
    return opt


def attached() -> tuple[fastopt.Optimizer, fastopt.BatchNorm]:
    bn = fastopt.BatchNorm(2, dtype=np.float64)
    opt = fastopt.Adam({"bn": bn.params}, lr=schedules.exponential(0.1, 0.1), ema=0.5)
    bn.attach(opt.params["bn"], opt.grads["bn"])
    return trained(opt, bn, 2)


def test_a_process_that_was_spawned_goes_on_with_what_it_was_sent():
    opt, bn = attached()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        there, layer = pool.submit(trained, opt, bn, 3).result(timeout=300)
    assert opt.step_count == 2
    trained(opt, bn, 3)
    assert everything(there) == everything(opt)
    assert layer.params["gamma"] is there.params["bn"]["gamma"]
    assert layer.running_var.tobytes() == bn.running_var.tobytes()


def test_joblib_sends_and_returns_optimizers():
    joblib = pytest.importorskip("joblib")
    opt, bn = attached()
    results = joblib.Parallel(n_jobs=2)(joblib.delayed(trained)(opt, bn, steps) for steps in (1, 3))
    assert [there.step_count for there, _ in results] == [3, 5]
    trained(opt, bn, 3)
    assert everything(results[1][0]) == everything(opt)
    assert results[1][1].params["beta"] is results[1][0].params["bn"]["beta"]
    # Larger arrays reach the workers as read-only memory maps, which an optimizer copies.
    grads = {"bn": {name: np.ones(2) for name in ("beta", "gamma")}}
    (mapped,) = joblib.Parallel(n_jobs=2, max_nbytes=1)([joblib.delayed(stepped)(opt, grads)])
    assert everything(mapped) == everything(stepped(opt, grads))
