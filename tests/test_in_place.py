"""Parameters that stay in their own arrays, and gradients that are read where they are: the bits of packed ones."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING, PER_RULE, Case, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from fastopt.storage.flat import FlatParams

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (15,), (16,), (17,), (3, 5), (5000,))


def tree(rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {f"w{k}": rng.normal(size=shape).astype(dtype) for k, shape in enumerate(SHAPES)}


def grads_of(rng: np.random.Generator, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: gradients(rng, p.size, p.dtype).reshape(p.shape) for name, p in params.items()}


def bits(opt: fastopt.Optimizer) -> list[bytes]:
    """Every bit of parameters, states and average."""
    state = opt.state
    return [np.asarray(array).tobytes() for arrays in (opt.flat.arrays, *state.arrays.values()) for array in arrays]


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["no flags", "all flags"])
@pytest.mark.parametrize("case", PER_RULE, ids=str)
def test_every_rule_has_the_same_bits_packed_and_in_place(case, options):
    assert_same_bits(case, np.float32, options)


@pytest.mark.parametrize("name", ["Adam", "LAMB", "NovoGrad-weight_decay=0.1", "StableAdamW-weight_decay=0.1"])
def test_the_same_in_float64(name):
    assert_same_bits(BY_NAME[name], np.float64, EVERYTHING)


def assert_same_bits(case: Case, dtype: Any, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    params = tree(rng, dtype)
    mine = {name: p.copy() for name, p in params.items()}
    packed, in_place = case.make(params, **options), case.make(mine, copy=False, **options)
    for step in range(3):
        grads: dict[str, Any] = grads_of(rng, params)
        if step == 1:
            grads["w4"] = None
        infos = [opt.step(grads, grad_scale=2.0 if options else 1.0) for opt in (packed, in_place)]
        assert infos[0].grad_norm == infos[1].grad_norm
    assert bits(packed) == bits(in_place)
    for name, p in mine.items():  # the caller's own arrays
        assert p.tobytes() == packed.params[name].tobytes()
        assert in_place.params[name] is p


def placed(rng: np.random.Generator, draw: Any, values: np.ndarray) -> np.ndarray:
    """These values in an array of their own, in a part of a larger one at any aligned address, or in a memmap."""
    kind = draw(st.sampled_from(["own", "part", "memmap"]))
    if kind == "own":
        return values.copy()
    if kind == "memmap" and values.size:
        from tempfile import TemporaryFile

        with TemporaryFile() as file:
            mapped = np.memmap(file, values.dtype, "w+", shape=values.shape)
        mapped[...] = values
        return mapped
    before = draw(st.integers(0, 17))
    larger = rng.normal(size=before + values.size + 3).astype(values.dtype)
    part = larger[before : before + values.size].reshape(values.shape)
    part[...] = values
    return part


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    sizes=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 4096, 4097]), min_size=1, max_size=6),
    name=st.sampled_from(["SGD-lr=0.1", "Adam", "LAMB", "NovoGrad-weight_decay=0.1"]),
    dtype=st.sampled_from([np.float32, np.float64]),
    flags=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_placement_has_the_same_bits_and_touches_nothing_else(data, sizes, name, dtype, flags, seed):
    rng = np.random.default_rng(seed)
    options = EVERYTHING if flags else {}
    params = {f"w{k}": rng.normal(size=size).astype(dtype) for k, size in enumerate(sizes)}
    own = {path: placed(rng, data.draw, p) for path, p in params.items()}
    around = [p.base.copy() if isinstance(p.base, np.ndarray) and p.base.ndim == 1 else None for p in own.values()]
    packed, in_place = BY_NAME[name].make(params, **options), BY_NAME[name].make(own, copy=False, **options)
    for _ in range(2):
        grads = grads_of(rng, params)
        theirs = {path: placed(rng, data.draw, g) for path, g in grads.items()}
        packed.step(grads)
        in_place.step(theirs)
        assert all((theirs[path] == g).all() for path, g in grads.items())  # they are only read
    assert bits(packed) == bits(in_place)
    for p, old in zip(own.values(), around, strict=True):
        if old is not None and not isinstance(p, np.memmap):
            start = (p.__array_interface__["data"][0] - p.base.__array_interface__["data"][0]) // p.itemsize
            outside = np.ones(old.size, bool)
            outside[start : start + p.size] = False
            assert (p.base[outside] == old[outside]).all()


def test_views_of_one_larger_array_are_parameters_of_their_own():
    whole = np.arange(100.0)
    opt = fastopt.SGD({"a": whole[:16], "b": whole[16:40].reshape(4, 6), "c": whole[50:]}, lr=1.0, copy=False)
    opt.step({"a": np.ones(16), "b": np.ones((4, 6)), "c": np.ones(50)})
    expected = np.arange(100.0) - 1.0
    expected[40:50] += 1.0
    assert (whole == expected).all()


# --- everything else that an optimizer does ---------------------------------------------------------------------------


def pair(name: str = "Adam", **options: Any) -> tuple[fastopt.Optimizer, fastopt.Optimizer, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    params = {"e": rng.normal(size=(6, 4)), "w": rng.normal(size=17)}
    mine = {path: p.copy() for path, p in params.items()}
    make = getattr(fastopt, name)
    return make(params, **options), make(mine, copy=False, **options), mine


def test_rows_accumulation_the_average_and_the_own_buffer():
    packed, in_place, mine = pair("AdamW", ema=0.9, max_norm=1.0, lr=0.1)
    rng = np.random.default_rng(4)
    for _ in range(5):
        rows, w = (np.array([1, 4, 1]), rng.normal(size=(3, 4))), rng.normal(size=17)
        full = {"e": rng.normal(size=(6, 4)), "w": w}
        for opt in (packed, in_place):
            opt.step_rows({"e": rows}, {"e": None, "w": w})
            opt.accumulate(full)
            opt.accumulate(full, weight=2.0)
            opt.step()
            opt.grads["w"][...] = w
            opt.step()
    assert bits(packed) == bits(in_place)
    assert (packed.read_rows("e", [4]) == in_place.read_rows("e", [4])).all()
    with packed.swap_ema() as theirs, in_place.swap_ema() as ours:
        assert all((theirs[path] == ours[path]).all() for path in mine)
        assert ours["w"] is mine["w"]
    assert bits(packed) == bits(in_place)


def test_lookahead_schedule_free_and_matrices():
    for name, options, context in (
        ("Nesterov", {"form": "lookahead"}, "lookahead"),
        ("ScheduleFreeAdamW", {}, "eval_params"),
        ("Muon", {}, None),
    ):
        packed, in_place, _ = pair(name, **options)
        for _ in range(3):
            for opt in (packed, in_place):
                if context is not None:
                    with getattr(opt, context)() as params:
                        grads = {path: 2.0 * p for path, p in params.items()}
                else:
                    grads = {path: np.array(p) for path, p in opt.params.items()}
                opt.step(grads)
        assert bits(packed) == bits(in_place), name


def test_a_checkpoint_goes_from_one_to_the_other(tmp_path):
    packed, in_place, mine = pair(ema=0.9)
    for opt in (packed, in_place):
        opt.step({path: np.ones_like(p) for path, p in mine.items()})
    in_place.save(tmp_path / "run.safetensors")
    fresh, _, _ = pair(ema=0.9)
    fresh.load(tmp_path / "run.safetensors")
    assert bits(fresh) == bits(packed)
    packed.step()
    packed.save(tmp_path / "next.safetensors")
    in_place.load(tmp_path / "next.safetensors")
    assert bits(in_place) == bits(packed)
    assert in_place.params["w"] is mine["w"]


def test_a_copy_has_arrays_of_its_own():
    _, in_place, mine = pair()
    twin = copy.deepcopy(in_place)
    twin.step({path: np.ones_like(p) for path, p in mine.items()})
    assert in_place.step_count == 0
    assert not any(np.shares_memory(twin.params[path], p) for path, p in mine.items())


def test_pack_may_leave_arrays_where_they_are():
    mine = {"w": np.ones(3), "b": np.zeros(1)}
    flat = fastopt.pack(mine, copy=False)
    assert isinstance(flat, FlatParams)
    assert flat.in_place
    assert flat.params["w"] is mine["w"]
    with pytest.raises(AttributeError, match="data: the parameters must be in one buffer, got 0 buffers"):
        _ = flat.data
    fastopt.SGD(flat, lr=1.0).step({"w": np.ones(3), "b": np.ones(1)})
    assert mine["w"].tolist() == [0.0, 0.0, 0.0]
    assert "in place" in repr(flat)


# --- update(params, grads) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PER_RULE, ids=str)
def test_update_is_the_tutorials_loop_for_every_rule(case: Case):
    rng = np.random.default_rng(6)
    params = {"W1": rng.normal(size=(4, 3)), "b1": rng.normal(size=3)}
    packed = case.make(params)
    opt = case.make(None)
    assert opt.step_count == 0
    for _ in range(3):
        grads = grads_of(rng, params)
        packed.step(grads)
        assert opt.update(params, grads).step == packed.step_count
    assert bits(packed) == bits(opt)
    assert all((params[path] == packed.params[path]).all() for path in params)


def test_update_takes_other_arrays_like_the_first_ones():
    opt, packed = fastopt.Adam(lr=0.1), fastopt.Adam({"w": np.ones(3)}, lr=0.1)
    params = {"w": np.ones(3)}
    for step in range(4):
        grads = {"w": np.full(3, step + 1.0)}
        opt.update(params, grads)
        packed.step(grads)
        assert (params["w"] == packed.params["w"]).all()
        assert opt.params["w"] is params["w"]
        params = {"w": params["w"].copy()}  # as a trainer does that makes new arrays


def test_the_classic_classes_are_replaced_by_one_import():
    class SGD:
        """As tutorials write it."""

        def __init__(self, lr: float = 0.01):
            self.lr = lr

        def update(self, params: dict[str, np.ndarray], grads: dict[str, np.ndarray]) -> None:
            for key in params:
                params[key] -= self.lr * grads[key]

    theirs, ours = {"W": np.ones((2, 2)), "b": np.zeros(2)}, {"W": np.ones((2, 2)), "b": np.zeros(2)}
    for optimizer, params in ((SGD(lr=0.1), theirs), (fastopt.SGD(lr=0.1), ours)):
        for _ in range(3):
            optimizer.update(params, {"W": params["W"] * 2.0, "b": params["b"] + 1.0})
    assert all((theirs[path] == ours[path]).all() for path in theirs)


def test_without_parameters_an_optimizer_says_what_it_needs():
    opt = fastopt.Adam(lr=0.1)
    for call in (opt.step, opt.zero_grad, opt.state_dict, lambda: opt.params, lambda: opt.groups):
        with pytest.raises(RuntimeError, match=r"no parameters yet: pass them at construction, or call update"):
            call()
    assert "no parameters yet" in repr(opt)
    opt.lr = 0.5
    assert opt.lr == 0.5
    params = {"w": np.zeros(1)}
    opt.update(params, {"w": np.ones(1)})
    assert params["w"].round(6) == -0.5
    assert copy.deepcopy(fastopt.Adam(lr=0.1)).lr == 0.1


BAD_UPDATES: list[tuple[str, Any, str]] = [
    ("another structure", {"w": np.ones(3)}, "params: must have the structure of the parameters"),
    ("another shape", {"w": np.ones(4), "b": np.ones(1)}, r"parameter 'w': must have shape \(3,\)"),
    ("another dtype", {"w": np.ones(3, np.float32), "b": np.ones(1)}, "parameter 'w': must have dtype float64"),
    ("strided", {"w": np.ones(6)[::2], "b": np.ones(1)}, "parameter 'w': must be C-contiguous"),
    ("no array", {"w": [1.0, 2.0, 3.0], "b": np.ones(1)}, "params: must have the structure|parameter 'w': must be"),
    ("None", {"w": None, "b": np.ones(1)}, "parameter 'w': must be"),
    ("tied", dict.fromkeys(["w", "b"], np.ones(3)), "must"),
]


@pytest.mark.parametrize(("name", "params", "message"), BAD_UPDATES)
def test_bad_updates_are_refused_and_change_nothing(name, params, message):
    opt = fastopt.Adam(lr=0.1)
    good = {"w": np.ones(3), "b": np.ones(1)}
    grads = {"w": np.ones(3), "b": np.ones(1)}
    opt.update(good, grads)
    before = bits(opt)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.update(params, grads)
    with pytest.raises(ValueError, match="gradient 'w': must have shape"):
        opt.update({"w": np.ones(3), "b": np.ones(1)}, {"w": np.ones(4), "b": np.ones(1)})
    for own in (opt.states["m"], opt.grads):
        with pytest.raises(ValueError, match="must not overlap in memory"):
            opt.update(own, grads)
    assert opt.params["w"] is good["w"]
    assert bits(opt) == before
    assert opt.step_count == 1
    opt.update(good, grads)


def test_an_optimizer_of_packed_parameters_refuses_update():
    with pytest.raises(RuntimeError, match=r"update\(\): this optimizer has packed parameters of its own"):
        fastopt.SGD({"w": np.ones(2)}).update({"w": np.ones(2)}, {"w": np.ones(2)})


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def unaligned(size: int) -> np.ndarray:
    return np.zeros(8 * size + 1, np.uint8)[1:].view(np.float64)


SHARED = np.ones(10)
BAD_PARAMS: list[tuple[str, dict[str, Any], str]] = [
    ("strided", {"w": np.ones((4, 4))[:, 0]}, "parameter 'w': must be C-contiguous, got strides"),
    ("reversed", {"w": np.ones(4)[::-1]}, "parameter 'w': must be C-contiguous"),
    ("Fortran", {"w": np.ones((4, 4), order="F")}, "parameter 'w': must be C-contiguous"),
    ("read-only", {"w": read_only(np.ones(3))}, "parameter 'w': must be writeable"),
    ("unaligned", {"w": unaligned(3)}, "parameter 'w': must be aligned"),
    ("overlapping", {"a": SHARED[:6], "b": SHARED[5:]}, "parameters 'a' and 'b': must not overlap in memory"),
    ("tied", {"a": SHARED, "b": SHARED}, "parameters 'a' and 'b': must be two arrays"),
    ("a view of the same", {"a": SHARED, "b": SHARED[:]}, "parameters 'a' and 'b': must not overlap in memory"),
    ("mixed", {"a": np.ones(2), "b": np.ones(2, np.float32)}, "parameter 'b': must have dtype float64"),
    ("integers", {"w": np.ones(2, np.int64)}, "parameter 'w'"),
    ("masked", {"w": np.ma.ones(3)}, "parameter 'w': must be an array without a mask"),
    ("a list", {"w": 1.0}, "parameter 'w'"),
]


@pytest.mark.parametrize(("name", "params", "message"), BAD_PARAMS)
def test_parameters_that_cannot_be_updated_in_place_are_refused(name, params, message):
    for make in (lambda: fastopt.SGD(params, copy=False), lambda: fastopt.pack(params, copy=False)):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


# --- gradients where they are -----------------------------------------------------------------------------------------

GRADS: list[tuple[str, Any]] = [
    ("strided", np.arange(24.0).reshape(4, 6)[:, ::2]),
    ("Fortran", np.asfortranarray(np.arange(12.0).reshape(4, 3))),
    ("reversed", np.arange(12.0).reshape(4, 3)[::-1]),
    ("unaligned", np.frombuffer(b"\0" + np.arange(12.0).tobytes(), np.uint8)[1:].view(np.float64).reshape(4, 3)),
    ("read-only", read_only(np.arange(12.0).reshape(4, 3))),
    ("matrix", np.arange(12.0).reshape(4, 3).view(np.recarray)),
    ("broadcast", np.broadcast_to(np.arange(3.0), (4, 3))),
]


@pytest.mark.parametrize("grad", [each[1] for each in GRADS], ids=[each[0] for each in GRADS])
@pytest.mark.parametrize("accumulated", [False, True])
def test_gradients_that_cannot_be_read_in_place_are_converted(grad, accumulated):
    plain, other = (fastopt.Adam({"w": np.ones((4, 3)), "s": np.array(1.0)}, max_norm=1.0) for _ in range(2))
    usual = {"w": np.array(grad, order="C", copy=True), "s": np.array(2.0)}
    for opt, grads in ((plain, usual), (other, {"w": grad, "s": np.float64(2.0)})):
        if accumulated:
            opt.accumulate(grads)
            opt.step()
        else:
            opt.step(grads)
    assert bits(plain) == bits(other)


@pytest.mark.parametrize("scalar", [2.0, 2, np.float64(2.0), np.array(2.0)])
def test_a_number_is_the_gradient_of_a_number(scalar):
    opt = fastopt.SGD({"s": np.array(1.0)}, lr=0.25)
    opt.step({"s": scalar})
    assert opt.params["s"] == 0.5


def test_masked_gradients_and_other_numbers_are_refused():
    opt = fastopt.SGD({"w": np.ones(3)})
    for bad in (np.ma.ones(3), 1.0, True, np.float64(1.0), [1.0, 2.0, 3.0], np.ones(3, np.float32)):
        with pytest.raises((TypeError, ValueError)):
            opt.step({"w": bad})
    assert opt.step_count == 0


def test_gradients_may_lie_in_the_own_buffer_and_not_in_parameters_or_states():
    rng = np.random.default_rng(8)
    opt, plain = fastopt.Adam({"a": np.ones(16), "b": np.ones(16)}), fastopt.Adam({"a": np.ones(16), "b": np.ones(16)})
    values = rng.normal(size=16)
    opt.grads["a"][...] = values
    opt.step({"a": opt.grads["a"], "b": opt.grads["a"]})  # two may be one and the same: they are only read
    plain.step({"a": values, "b": values})
    assert bits(opt) == bits(plain)
    for bad in (opt.params["a"], opt.params["b"], opt.states["m"]["a"], opt.flat.data[1:17]):
        with pytest.raises(ValueError, match="gradient 'a': must not overlap the parameters and states"):
            opt.step({"a": bad, "b": None})
        with pytest.raises(ValueError, match="gradient 'a': must not overlap the parameters and states"):
            opt.accumulate({"a": bad, "b": None})
    for each, grad in ((opt, opt.grads["a"]), (plain, values)):
        each.accumulate({"a": grad, "b": grad})
        each.step()
    assert bits(opt) == bits(plain)


def test_a_step_without_gradients_of_its_own_makes_no_buffer():
    opt = fastopt.Adam({"w": np.ones(1000)})
    opt.step({"w": np.ones(1000)})
    assert opt.flat.grad_buffers == []
    opt.step()
    assert len(opt.flat.grad_buffers) == 1
    assert math.isclose(opt.params["w"][0], opt.params["w"][-1])


def test_accumulating_makes_one_buffer_and_keeps_it():
    opt = fastopt.Adam({"w": np.ones(1000)})
    kept = []
    for _ in range(3):
        opt.accumulate({"w": np.ones(1000)})
        opt.step()
        kept.append(opt._pipeline.sums)
    assert kept[0] is kept[1] is kept[2]
    assert opt.flat.grad_buffers == []


def test_an_optimizer_gives_its_memory_back_when_it_is_dropped():
    """It is in no circle of references, which would keep it until the garbage collector runs."""
    gc.collect()
    gc.disable()
    try:
        for copies in (True, False):
            opt = fastopt.Adam({"e": np.ones((4, 2)), "w": np.ones(3)}, ema=0.9, max_norm=1.0, copy=copies)
            opt.step_rows({"e": (np.array([1]), np.ones((1, 2)))})
            opt.accumulate({"e": np.ones((4, 2)), "w": np.ones(3)})
            opt.step()
            opt.groups["w"].lr = 0.5
            _ = opt.grads, opt.states, opt.ema
            memory = weakref.ref(opt._pipeline), weakref.ref(opt.flat), weakref.ref(opt)
            del opt
            assert [each() for each in memory] == [None, None, None]
    finally:
        gc.enable()
