"""Memory: what is dropped is freed without the garbage collector, and nothing grows with the number of steps."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import EVERYTHING, OF_EACH_KIND, Case

import fastopt

PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.ones(5, np.float32)}


def params() -> dict[str, np.ndarray]:
    return {name: p.copy() for name, p in PARAMS.items()}


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def parts_of(opt: fastopt.Optimizer) -> list[weakref.ref[Any]]:
    """The optimizer and what is large in it."""
    pipeline = opt._pipeline
    buffers = [*pipeline.buffers, *pipeline.flat.arrays, *pipeline.flat.grad_buffers]
    return [weakref.ref(each) for each in (opt, pipeline, pipeline.flat, pipeline.plan, *buffers)]


# --- what is dropped is freed -----------------------------------------------------------------------------------------


def stepped(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    opt.step(PARAMS)
    opt.grads["w"][...] = 1.0
    opt.step()
    return opt


def with_missing_gradients(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    opt.step({**PARAMS, "w": None})
    opt.step({**PARAMS, "b": None})
    return opt


def accumulated(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    opt.accumulate(PARAMS)
    opt.step()
    opt.accumulate(PARAMS)
    return opt


def with_groups(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    opt.groups["w"].lr_scale = 0.5
    assert len(list(opt.groups)) == 2
    opt.step(PARAMS)
    return opt


def inside_contexts(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    opt.step(PARAMS)
    with opt.swap_ema(), pytest.raises(RuntimeError):
        opt.step(PARAMS)
    for context in ("lookahead", "eval_params"):
        if context in (opt.rule.gradients_in, opt.rule.evaluated_in):
            with getattr(opt, context)():
                pass
    return opt


def refused(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    with pytest.raises(ValueError, match="gradient 'b'"):
        opt.step({**PARAMS, "b": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match="must have the structure"):
        opt.step({"w": PARAMS["w"]})
    return opt


def read(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    opt.step(PARAMS)
    assert opt.states is not None
    assert opt.ema is not None
    assert repr(opt)
    assert opt.state_dict()["step"] == 1
    return opt


def from_a_file(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    opt.save(path / "run.safetensors")
    opt.load(path / "run.safetensors")
    return opt


def copied(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    return copy.deepcopy(opt)


def unpickled(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    return pickle.loads(pickle.dumps(opt))


def extended(opt: fastopt.Optimizer, path: Any) -> fastopt.Optimizer:
    opt.step(PARAMS)
    more = np.ones(3, np.float32)
    opt.add({"more": more})
    opt.step({**PARAMS, "more": more})
    opt.restart()
    opt.set_params({**PARAMS, "more": more})
    return opt


USES: tuple[Callable[..., fastopt.Optimizer], ...] = (
    *(stepped, with_missing_gradients, accumulated, with_groups, inside_contexts, refused),
    *(read, from_a_file, copied, unpickled, extended),
)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_an_optimizer_is_freed_when_it_is_dropped(case: Case, use, tmp_path):
    opt = use(case.make(params(), **EVERYTHING), tmp_path)
    parts = parts_of(opt)
    del opt
    assert [part() for part in parts if part() is not None] == []


def test_an_optimizer_of_rows_one_in_place_and_one_of_many_groups_are_freed():
    rows = fastopt.Adam(params(), ema=0.5)
    rows.step_rows({"w": (np.array([1]), np.ones((1, 2), np.float32))})
    rows.step_rows({"w": (np.array([0]), np.ones((1, 2), np.float32))})
    moved = fastopt.SGD(ema=0.5)
    for _ in range(2):
        moved.update(params(), PARAMS)
    many = fastopt.Adam([np.ones(2) for _ in range(80)], overrides={str(k): {"lr": 0.1 + k} for k in range(80)})
    many.step([np.ones(2) for _ in range(80)])
    failed = fastopt.SGD()
    with pytest.raises(ValueError, match="gradient 'w'"):
        failed.update(params(), {**PARAMS, "w": np.ones(3, np.float32)})
    parts = [*parts_of(rows), *parts_of(moved), *parts_of(many), weakref.ref(failed)]
    del rows, moved, many, failed
    assert [part() for part in parts if part() is not None] == []


def test_what_a_step_returned_does_not_hold_the_optimizer():
    opt = fastopt.Adam(params(), lr=fastopt.schedules.exponential(0.1, 0.1), **{**EVERYTHING, "nonfinite": "skip"})
    infos = [opt.step(PARAMS), opt.step({**PARAMS, "b": np.full(5, np.nan, np.float32)}), opt.step(PARAMS)]
    parts = parts_of(opt)
    del opt
    assert [part() for part in parts if part() is not None] == []
    assert [info.step for info in infos] == [1, 1, 2]


def trained_layer() -> tuple[fastopt.Optimizer, fastopt.BatchNorm]:
    bn = fastopt.BatchNorm(2, dtype=np.float64)
    opt = fastopt.SGD({"bn": bn.state})
    bn.attach(opt.params["bn"], opt.grads["bn"])
    bn.backward(bn.forward(np.array([[1.0, 2.0], [3.0, 5.0]])))
    bn.forward(np.ones((2, 2)))
    return opt, bn


def test_a_batchnorm_is_freed_with_its_optimizer():
    trained_layer()  # compiles, which leaves cycles of numba's that hold what it was called with
    opt, bn = trained_layer()
    parts = [*parts_of(opt), weakref.ref(bn), weakref.ref(bn._saved._state)]
    del opt, bn
    assert [part() for part in parts if part() is not None] == []


# --- nothing grows ----------------------------------------------------------------------------------------------------


def growth(use: Callable[[int], Any], warm: int, more: int) -> int:
    """How many more blocks of memory Python holds after `more` uses than after the first `warm` ones."""
    for k in range(warm):
        use(k)
    gc.collect()
    before = sys.getallocatedblocks()
    for k in range(warm, warm + more):
        use(k)
    gc.collect()
    return sys.getallocatedblocks() - before


MOST = 5_000
"""Blocks: what is kept of 128 masks, and no more."""


def masked(rng: np.random.Generator, grads: list[np.ndarray]) -> list[np.ndarray | None]:
    return [g if here else None for g, here in zip(grads, rng.random(len(grads)) < 0.5, strict=True)]


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0, "ema": 0.9}], ids=["plain", "measured"])
def test_nothing_grows_with_the_masks_of_gradients(options):
    grads = [np.ones(4) for _ in range(40)]
    opt, rng = fastopt.Adam(grads, **options), np.random.default_rng(0)
    assert growth(lambda k: opt.step(masked(rng, grads)), 400, 5_000) < MOST
    expected = np.mean([opt.step_count - missed for missed in opt.state.missed])
    assert abs(expected - 2700) < 150


@pytest.mark.parametrize("how", ["accumulate", "rows", "rows of all", "matrices", "frozen"])
def test_nothing_grows_with_the_masks_of_other_steps(how):
    grads, rng = [np.ones((3, 2)) for _ in range(24)], np.random.default_rng(0)
    opt = fastopt.Muon(grads) if how == "matrices" else fastopt.Momentum(grads, lr=1e-3)

    def step(k: int) -> None:
        given = masked(rng, grads)
        if how == "accumulate":
            opt.accumulate(given)
            opt.accumulate(masked(rng, grads))
            opt.step()
        elif how.startswith("rows"):
            given = grads if how == "rows of all" else given
            touched = [str(k) for k in range(24) if rng.random() < 0.1] or ["0"]
            rows = {path: (np.array([1]), np.ones((1, 2))) for path in touched}
            opt.step_rows(rows, [None if str(k) in touched else g for k, g in enumerate(given)])
        elif how == "frozen":
            opt.groups[f"{rng.integers(24)}"].frozen = bool(rng.random() < 0.5)
            opt.step(grads)
        else:
            opt.step(given)

        if k % 200 == 0:
            opt.flush_rows()

    assert growth(step, 601, 2_000) < MOST


def test_masks_that_come_again_are_kept_and_those_that_were_forgotten_are_right():
    grads = [np.ones(2) for _ in range(12)]
    opt, rng = fastopt.SGD(grads, lr=1.0), np.random.default_rng(0)
    counts = np.zeros(12)
    masks = rng.random((600, 12)) < 0.5
    for mask in (*masks, *masks):
        opt.step([g if here else None for g, here in zip(grads, mask, strict=True)])
        counts += mask
    assert [p.tolist() for p in opt.params] == [[1.0 - count] * 2 for count in counts]
    plan = opt._pipeline.plan
    assert len(plan.rows) <= 128
    kept = len(plan.rows)
    for _ in range(3):
        opt.step([g if here else None for g, here in zip(grads, masks[-1], strict=True)])
    assert (len(plan.rows), opt._pipeline.plan is plan) == (kept, True)


def test_nothing_grows_with_shapes_of_batches_with_bare_updates_or_with_hyperparameters():
    bn, opt = fastopt.BatchNorm(3, activation="relu"), fastopt.Adam(params())
    moving = fastopt.SGD()

    def use(k: int) -> None:
        bn.backward(bn.forward(np.ones((2 + k, 3), np.float32)))
        bn.backward(bn.forward(np.ones((2, 3, 1 + k % 30, 1 + k // 30), np.float32)))
        fastopt.rules.adam.update_(np.ones(1 + k), np.ones(1 + k), np.zeros(1 + k), np.zeros(1 + k), t=1 + k, lr=0.1)
        opt.lr = opt.groups["w"].lr = 0.1 + 1e-6 * k
        opt.step(PARAMS)
        moving.update(params(), PARAMS)
        own = fastopt.Adam({"w": np.ones(1 + k)})
        own.step({"w": np.ones(1 + k)})

    assert growth(use, 256, 256) < 2_000  # shapes are forgotten every 128 uses


def test_nothing_grows_with_the_globs_of_groups():
    opt = fastopt.SGD({f"layer{k}": np.ones(1) for k in range(10)})
    for k in range(3_000):
        opt.groups[f"layer[{k % 10}{k}]"].lr = 0.5
        opt.groups[0].lr = 0.25 + k
    assert len(opt.groups._by_glob) <= 256
    assert len(opt._pipeline.groups._unions) <= 256
