"""Row-wise steps: equal to dense steps whose other gradients are zero, whatever the rule; what is refused, and when."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, CASES, Case

import fastopt
from fastopt.closed_forms import MOST
from fastopt.kernels import get_backend
from fastopt.kernels.cpu import backend as cpu
from fastopt.step import rows as row_module

ROWS, COLUMNS = 40, 7
WITH_FORM = [case for case in CASES if case.rule.idle is not None]


def has_form(case: Case) -> bool:
    decays = case.options.get("weight_decay", 0.0) != 0.0
    linear = case.optimizer in ("SGD", "Momentum", "Nesterov")
    l2 = decays and case.optimizer != "AdamW" and not linear
    return not l2 and not (case.optimizer.startswith("Adam") and case.options.get("eps_inside"))


def params_of(dtype: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"e": rng.normal(size=(ROWS, COLUMNS)).astype(dtype), "w": rng.normal(size=5).astype(dtype)}


def touch(rng: np.random.Generator, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indices, row gradients, the dense gradient they stand for). The upper rows are rarely touched, some never."""
    count = rng.integers(0, 4)
    indices = rng.integers(0, ROWS // 2 if rng.random() < 0.97 else ROWS - 2, count)
    grads = (rng.normal(size=(count, COLUMNS)) * 10.0 ** rng.uniform(-4, 0)).astype(dtype)
    dense = np.zeros((ROWS, COLUMNS), dtype)
    np.add.at(dense, indices, grads)
    return indices, grads, dense


def assert_equal(
    rowwise: fastopt.Optimizer, dense: fastopt.Optimizer, rtol: float, atol: float, *, exact: bool = True
) -> None:
    """exact : whether what has no rows is equal to the bit; not where a norm is that of rows, in another order."""
    same = np.testing.assert_array_equal if exact else partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    assert rowwise.step_count == dense.step_count
    states, expected = rowwise.states, dense.states  # brings all rows up to date
    for name, state in expected.items():
        scale = float(np.abs(state["e"]).max(initial=0.0))
        np.testing.assert_allclose(states[name]["e"], state["e"], rtol=rtol, atol=atol * scale, err_msg=name)
        same(states[name]["w"], state["w"], err_msg=name)
    np.testing.assert_allclose(rowwise.params["e"], dense.params["e"], rtol=rtol, atol=atol)
    same(rowwise.params["w"], dense.params["w"])
    if dense._pipeline.average is not None:
        np.testing.assert_allclose(rowwise.ema["e"], dense.ema["e"], rtol=rtol, atol=atol)


def run_both(
    rowwise: fastopt.Optimizer, dense: fastopt.Optimizer, steps: int, dtype: Any = np.float64, seed: int = 0
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        indices, grads, whole = touch(rng, dtype)
        others = rng.normal(size=5).astype(dtype)
        rowwise.step_rows({"e": (indices, grads)}, {"e": None, "w": others})
        dense.step({"e": whole, "w": others})


FORMS = [case for case in WITH_FORM if has_form(case)]


OF_EACH_FORM = (
    "SGD-lr=0.1",
    "Momentum-form=ema-weight_decay=0.1",
    "RMSprop-momentum=0.9-centered=True-eps_inside=True-eps=0.0001",
    "Adam",
    "AdamW-amsgrad=True-betas=(0.9, 0.9)",
)
"""Linear with no, one and three states, with weight decay and without; and Adam's, each with a moving average."""


@pytest.mark.parametrize(
    ("case", "ema"), [*((case, None) for case in FORMS), *((BY_NAME[name], 0.9) for name in OF_EACH_FORM)], ids=str
)
def test_rowwise_steps_equal_dense_ones_for_every_rule(case, ema):
    rowwise, dense = case.make(params_of(), ema=ema), case.make(params_of(), ema=ema)
    for seed in range(2):  # the second time with clocks that begin anew
        run_both(rowwise, dense, 60, seed=seed)
        assert_equal(rowwise, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "ema"),
    [({}, None), ({"amsgrad": True}, None), ({"amsgrad": True}, 0.99), ({"weight_decay": 0.1}, 0.99)],
)
def test_adams_closed_form(options, ema, monkeypatch):
    """After some hundreds of steps no step is made twice: one launch for all ages, and one for the update."""
    make = fastopt.AdamW
    lr = fastopt.schedules.cosine(1e-2, 1e-4, 2000)
    rowwise, dense = make(params_of(), lr=lr, ema=ema, **options), make(params_of(), lr=lr, ema=ema, **options)
    rng = np.random.default_rng(0)
    for _ in range(600):
        grads = {"e": rng.normal(size=(ROWS, COLUMNS)), "w": rng.normal(size=5)}
        rowwise.step(grads)
        dense.step(grads)
    launches = []
    run_loop = cpu.Loop.run
    with monkeypatch.context() as patch:
        patch.setattr(cpu.Loop, "run", lambda self, *a, **k: (launches.append(self.label), run_loop(self, *a, **k)))
        for _ in range(300):
            indices, grads, whole = touch(rng)
            others = rng.normal(size=5)
            launches.clear()
            rowwise.step_rows({"e": (indices, grads)}, {"e": None, "w": others})
            assert len(launches) <= 3, launches  # catch up, write the gradients, update
            dense.step({"e": whole, "w": others})
    assert_equal(rowwise, dense, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", [fastopt.Momentum, fastopt.Adam, fastopt.Adagrad])
def test_float32_is_as_close_as_its_rounding_allows(case):
    rowwise, dense = case(params_of(np.float32), lr=0.01), case(params_of(np.float32), lr=0.01)
    run_both(rowwise, dense, 200, np.float32)
    assert_equal(rowwise, dense, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("clipping", ["max_norm", "clip_norm_per_tensor"])
def test_all_flags_hold_for_rows(clipping):
    options = {clipping: 0.5, "clip_value": 0.3, "zero_grad": True, "ema": 0.9, "maximize": True, "nonfinite": "skip"}
    overrides = {"w": {"lr": 0.5}}
    rowwise = fastopt.AdamW(params_of(), overrides=overrides, **options)
    dense = fastopt.AdamW(params_of(), overrides=overrides, **options)
    rng = np.random.default_rng(0)
    for _ in range(50):
        indices, grads, whole = touch(rng)
        others = rng.normal(size=5)
        info = rowwise.step_rows({"e": (indices, grads)}, {"e": None, "w": others}, grad_scale=2.0)
        expected = dense.step({"e": whole, "w": others}, grad_scale=2.0)
        assert info.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)
        assert info.clip_coefficient == pytest.approx(expected.clip_coefficient, rel=1e-12)
        assert not rowwise.flat.grad.any()
    assert_equal(rowwise, dense, rtol=1e-9, atol=1e-12, exact=False)


def test_rows_read_are_up_to_date():
    rowwise, dense = fastopt.Adam(params_of()), fastopt.Adam(params_of())
    for seed in range(20):
        run_both(rowwise, dense, 3, seed=seed)
        indices = np.array([3, 30, 3, 39])
        np.testing.assert_allclose(rowwise.read_rows("e", indices), dense.params["e"][indices], rtol=1e-9, atol=1e-12)
    read = rowwise.read_rows("e", [0])
    read[:] = 0.0
    assert rowwise.params["e"][0].all()  # a copy


def test_updates_that_were_missed_as_a_whole_count_for_rows_too():
    """A parameter's own step number is that of its bias corrections, with rows as without."""
    rowwise, dense = fastopt.Adam(params_of()), fastopt.Adam(params_of())
    for opt in (rowwise, dense):
        for _ in range(50):
            opt.step({"e": None, "w": np.ones(5)})
    run_both(rowwise, dense, 40)
    assert_equal(rowwise, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("behind", [3, 4, 5, 8, 9])
def test_no_row_is_lost_between_two_launches(behind, monkeypatch):
    monkeypatch.setattr(row_module, "ROWS_AT_ONCE", 4)
    params = {"e": np.zeros((1 + behind, COLUMNS)), "w": np.zeros(5)}
    rowwise, dense = fastopt.Momentum(params, lr=0.1), fastopt.Momentum(params, lr=0.1)
    first = {"e": np.ones((1 + behind, COLUMNS)), "w": np.ones(5)}
    rowwise.step(first)
    dense.step(first)
    rowwise.step_rows({"e": ([0], np.zeros((1, COLUMNS)))})
    dense.step({"e": np.zeros_like(first["e"]), "w": None})
    rowwise.flush_rows()
    assert_equal(rowwise, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_steps_whose_product_no_number_holds_are_made_one_by_one():
    """400 steps that each multiply by -9: their product overflows, in float64; a parameter at 0 stays there."""
    params = {"e": np.zeros((3, 2)), "w": np.zeros(5)}
    options = {"lr": 10.0, "weight_decay": 1.0, "decoupled_weight_decay": True}
    rowwise, dense = fastopt.SGD(params, **options), fastopt.SGD(params, **options)
    for _ in range(400):
        rowwise.step_rows({"e": ([0], np.zeros((1, 2)))})
        dense.step({"e": np.zeros((3, 2)), "w": None})
    rowwise.flush_rows()
    np.testing.assert_array_equal(rowwise.params["e"], dense.params["e"])
    assert not rowwise.params["e"].any()


def test_the_norm_of_rows_is_unknown_unless_it_is_measured():
    opt = fastopt.SGD(params_of())
    grads = {"e": np.ones((ROWS, COLUMNS)), "w": np.ones(5)}
    opt.step(grads)
    assert opt.step_rows({"e": ([1], np.ones((1, COLUMNS)))}).grad_norm is None
    told = fastopt.SGD(params_of(), grad_norm=True)
    told.step(grads)
    info = told.step_rows({"e": ([1, 1], np.ones((2, COLUMNS)))})
    assert info.grad_norm == pytest.approx(2.0 * COLUMNS**0.5)


def test_clocks_begin_anew_before_their_tables_end():
    rowwise, dense = fastopt.Momentum(params_of(), lr=0.1), fastopt.Momentum(params_of(), lr=0.1)
    run_both(rowwise, dense, MOST + 50)
    assert rowwise._pipeline.clocks[0].now == 50
    assert_equal(rowwise, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "look",
    [
        lambda opt: opt.step({"e": np.zeros((ROWS, COLUMNS)), "w": np.zeros(5)}),
        lambda opt: opt.state_dict(),
        lambda opt: opt.ema,
        lambda opt: opt.states,
        lambda opt: copy.deepcopy(opt),
        lambda opt: opt.flush_rows(),
        lambda opt: opt.load_state_dict(fastopt.Momentum(params_of(), ema=0.9).state_dict()),
        lambda opt: opt.swap_ema().__enter__(),
    ],
    ids=["step", "state_dict", "ema", "states", "deepcopy", "flush_rows", "load_state_dict", "swap_ema"],
)
def test_whatever_sees_all_rows_brings_them_up_to_date(look):
    opt = fastopt.Momentum(params_of(), lr=0.1, ema=0.9)
    run_both(opt, fastopt.Momentum(params_of(), lr=0.1, ema=0.9), 10)
    assert opt._pipeline.clocks
    look(opt)
    assert not opt._pipeline.clocks


def test_parameters_that_are_not_named_are_left_out():
    opt = fastopt.Adam(params_of())
    before = opt.params["w"].copy()
    info = opt.step_rows({"e": (np.array([1]), np.ones((1, COLUMNS)))})
    assert info.step == 1
    np.testing.assert_array_equal(opt.params["w"], before)
    assert opt.state_dict()["missed"] == {"w": 1}
    opt.step_rows({"e": (np.zeros(0, np.int64), np.zeros((0, COLUMNS)))})
    assert opt.step_count == 2


@pytest.mark.parametrize("clipping", ["max_norm", "clip_norm_per_tensor"])
def test_two_parameters_with_rows_of_their_own(clipping):
    params = {"a": np.ones((5, 3)), "b": np.ones((6, 2))}
    rowwise, dense = (fastopt.Momentum(params, lr=0.1, **{clipping: 1.0}) for _ in range(2))
    for k in range(5):
        rows = {name: (np.array([k % 5]), np.full((1, params[name].shape[1]), 2.0)) for name in params}
        rowwise.step_rows(rows)
        grads = {name: np.zeros_like(p) for name, p in params.items()}
        for name, (indices, g) in rows.items():
            grads[name][indices] = g
        dense.step(grads)
    rowwise.flush_rows()
    for name in params:
        np.testing.assert_allclose(rowwise.params[name], dense.params[name], rtol=1e-12)


@pytest.mark.parametrize("order", ["C", "F"])
def test_repeated_rows_are_summed(order):
    opt = fastopt.SGD({"e": np.zeros((4, 2))}, lr=1.0)
    grads = np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], order=order)
    opt.step_rows({"e": (np.array([2, 0, 2, 2], np.uint8), grads)})
    np.testing.assert_array_equal(opt.params["e"], [[-3.0, -4.0], [0.0, 0.0], [-13.0, -16.0], [0.0, 0.0]])


def test_the_parameters_themselves_may_be_their_gradients():
    opt = fastopt.SGD({"e": np.arange(8.0).reshape(4, 2)}, lr=1.0)
    opt.step_rows({"e": (np.array([1, 2, 3]), opt.params["e"][:3])})
    np.testing.assert_array_equal(opt.params["e"], [[0.0, 1.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]])


def test_a_skipped_step_of_rows_changes_nothing():
    rowwise, dense = fastopt.Adam(params_of(), nonfinite="skip"), fastopt.Adam(params_of(), nonfinite="skip")
    run_both(rowwise, dense, 5)
    bad = np.full((1, COLUMNS), np.nan)
    assert rowwise.step_rows({"e": (np.array([3]), bad)}, {"e": None, "w": np.ones(5)}).skipped
    run_both(rowwise, dense, 5, seed=1)
    assert_equal(rowwise, dense, rtol=1e-9, atol=1e-12)
    loud = fastopt.Adam(params_of(), nonfinite="raise")
    loud.grads["e"][0] = np.inf  # of a row that is not touched
    loud.step_rows({"e": (np.array([3]), np.ones((1, COLUMNS)))})
    with pytest.raises(FloatingPointError, match="gradient 'e' holds NaN"):
        loud.step_rows({"e": (np.array([3]), bad)})
    assert loud.step_count == 1


def test_a_users_rule_may_say_that_it_is_linear():
    from typing import NamedTuple

    class Hyper(NamedTuple):
        mu: float
        lr: float

    def prepare(t, lr=0.1, mu=0.9):
        return Hyper(mu, lr / t)

    @fastopt.rule(prepare, idle=fastopt.Linear(with_l2=True))
    def mine(p, g, velocity, h):
        velocity = h.mu * velocity + g
        return p - h.lr * velocity, velocity

    rowwise, dense = (fastopt.Optimizer(params_of(), mine, weight_decay=0.01) for _ in range(2))
    run_both(rowwise, dense, 50)
    assert_equal(rowwise, dense, rtol=1e-9, atol=1e-12)


# --- bad input --------------------------------------------------------------------------------------------------------

ONE = np.ones((1, COLUMNS))
BAD_ROWS: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, r"rows: must be a dict \{path: \(indices, row_grads\)\} that is not empty, got NoneType"),
    ({}, TypeError, r"rows: must be a dict .* that is not empty, got an empty one"),
    ({"x": ([0], ONE)}, ValueError, r"'x': must be the path of a parameter; the paths are e, w"),
    ({"w": ([0], ONE)}, ValueError, r"parameter 'w': must be 2-D for row-wise steps, got shape \(5,\)"),
    ({"e": ONE}, TypeError, r"rows\['e'\]: must be \(indices, row_grads\), got ndarray"),
    ({"e": ([ROWS], ONE)}, ValueError, r"rows\['e'\]: indices: must be row numbers from 0 to 39, got 40"),
    ({"e": ([-1], ONE)}, ValueError, r"rows\['e'\]: indices: must be row numbers from 0 to 39, got -1"),
    ({"e": ([0.0], ONE)}, TypeError, r"rows\['e'\]: indices: must be integers, got dtype float64"),
    ({"e": ([True], ONE)}, TypeError, r"rows\['e'\]: indices: must be integers, got"),
    ({"e": ([[0]], ONE)}, ValueError, r"rows\['e'\]: indices: must be a 1-D array"),
    ({"e": ([0, 1], ONE)}, ValueError, r"rows\['e'\]: row_grads: must have shape \(2, 7\), a row for each index, got"),
    ({"e": ([0], ONE[0])}, ValueError, r"rows\['e'\]: row_grads: must have shape \(1, 7\)"),
    ({"e": ([0], ONE[:, :3])}, ValueError, r"rows\['e'\]: row_grads: must have shape"),
    ({"e": ([0], ONE.astype(np.float32))}, TypeError, r"rows\['e'\]: row_grads: must have dtype float64"),
    ({"e": ([0], ONE.tolist())}, TypeError, r"rows\['e'\]: row_grads: must be a NumPy array"),
]


@pytest.mark.parametrize(("rows", "error", "match"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_are_refused_and_change_nothing(rows, error, match):
    opt = fastopt.Adam(params_of())
    run_both(opt, fastopt.Adam(params_of()), 3)
    before = [buffer.tobytes() for buffer in (opt.flat.data, opt.flat.grad, *opt._pipeline.buffers)]
    with pytest.raises(error, match=match):
        opt.step_rows(rows)
    assert [buffer.tobytes() for buffer in (opt.flat.data, opt.flat.grad, *opt._pipeline.buffers)] == before
    assert opt.step_count == 3


def test_bad_calls_are_refused():
    opt = fastopt.Adam(params_of())
    rows = {"e": ([0], ONE)}
    for scale in (0, math.nan, -1.0):
        with pytest.raises(ValueError, match="grad_scale"):
            opt.step_rows(rows, grad_scale=scale)
    with pytest.raises(ValueError, match=r"^grads: must be None for 'e', which is in rows as well"):
        opt.step_rows(rows, params_of())
    with pytest.raises(ValueError, match=r"^grads: must have the structure of the parameters, got a list instead"):
        opt.step_rows(rows, [1])
    with pytest.raises(ValueError, match="'x': must be the path of a parameter"):
        opt.read_rows("x", [0])
    with pytest.raises(ValueError, match="indices: must be row numbers from 0 to 39, got 40"):
        opt.read_rows("e", [40])
    assert opt.step_count == 0
    opt.accumulate({"e": None, "w": np.ones(5)})
    with pytest.raises(ValueError, match="accumulated gradients are waiting"):
        opt.step_rows(rows)


NO_FORM: list[tuple[Any, str]] = [
    (lambda p: fastopt.LAMB(p), r"must have a rule with a closed form .* got 'lamb'; use step\(\)"),
    (lambda p: fastopt.Adam(p, weight_decay=0.1), r"with weight_decay every element has a gradient \(use AdamW"),
    (lambda p: fastopt.Adagrad(p, weight_decay=0.1), r"with weight_decay every element has a gradient"),
    (lambda p: fastopt.Adam(p, eps=0.0), r"eps=0 divides 0 by 0"),
    (lambda p: fastopt.Adam(p, eps_inside=True), r"for eps outside the root"),
    (lambda p: fastopt.Adam(p, betas=lambda t: (0.9, 0.99)), r"betas is a schedule"),
    (lambda p: fastopt.Adam(p, overrides={"e": {"weight_decay": 0.1}}), r"rows\['e'\]: must have a closed form"),
]


@pytest.mark.parametrize(("make", "match"), NO_FORM, ids=range(len(NO_FORM)))
def test_the_error_names_the_reason_why_there_is_no_closed_form(make, match):
    opt = make(params_of())
    with pytest.raises((TypeError, ValueError), match=match):
        opt.step_rows({"e": ([0], ONE)})
    assert opt.step_count == 0


def test_sums_of_repeated_rows():
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 50, 300)
    grads = rng.normal(size=(300, 3))
    once, sums = row_module.summed(indices, grads, np.empty(50, np.int32), get_backend("cpu"))
    expected = np.zeros((50, 3))
    np.add.at(expected, indices, grads)
    np.testing.assert_array_equal(once, np.unique(indices))
    np.testing.assert_allclose(sums, expected[once], rtol=1e-12)
