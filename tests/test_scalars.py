"""Numbers, counts and flags: one meaning wherever one is passed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt import init, schedules
from fastopt.batchnorm import batchnorm_forward
from fastopt.scalars import count, flag, number, real, shown

W = np.ones((2, 3))
X = np.arange(12.0).reshape(4, 3)

try:
    import torch
except ModuleNotFoundError:
    torch = None  # too large for the test extra; CI installs it for a second run


class Variable:
    """As those of Keras: 0-d, readable as an array, without `item`."""

    shape = ()

    def __array__(self) -> np.ndarray:
        return np.array(0.25)

    def __repr__(self) -> str:  # the same in all processes of pytest-xdist
        return "Variable"


QUARTERS = [
    0.25,
    np.float32(0.25),
    np.float64(0.25),
    np.float16(0.25),
    np.longdouble(0.25),
    np.array(0.25),
    np.array(0.25, np.float32),
    np.where(np.array(True), 0.25, 1.0),
    Fraction(1, 4),
    Variable(),
]
ONES = [1, np.int8(1), np.uint64(1), np.array(1)]
NO_NUMBERS = [
    (True, "True (bool)"),
    (np.True_, "np.True_ (bool)"),
    (np.array(True), "array(True) (bool)"),
    ("0.25", "'0.25' (str)"),
    (np.str_("0.25"), "np.str_('0.25') (str)"),
    (b"1", "b'1' (bytes)"),
    (0.25j, "0.25j (complex)"),
    (np.complex64(1.0), "np.complex64(1+0j) (complex)"),
    (None, "None"),
    ([0.25], "[0.25]"),
    (np.array([0.25]), "an array of shape (1,)"),
    (np.ma.masked, "a masked array"),
    (np.ma.array(0.25), "a masked array"),
]
if torch is not None:
    QUARTERS += [
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.bfloat16),
        torch.tensor(0.25, requires_grad=True),
    ]
    ONES += [torch.tensor(1)]
    NO_NUMBERS += [
        (torch.tensor(True), "tensor(True) (bool)"),
        (torch.tensor(1j), "tensor(0.+1.j) (complex)"),
        (torch.ones(1), "an array of shape (1,)"),
    ]


def sgd(**options: Any) -> fastopt.Optimizer:
    return fastopt.SGD({"w": np.ones(2)}, **{"lr": 0.1, **options})


def stepped(**how: Any) -> Any:
    opt = sgd()
    opt.step({"w": np.ones(2)}, **how)
    return opt.params["w"].tolist()


def accumulated(weight: Any) -> Any:
    opt = sgd()
    opt.accumulate({"w": np.ones(2)}, weight=weight)
    opt.step(reduction="sum")
    return opt.params["w"].tolist()


def updated(**hyper: Any) -> Any:
    p = np.ones(2)
    fastopt.rules.sgd.update_(p, np.ones(2), **hyper)
    return p.tolist()


def assigned(lr: Any) -> float:
    opt = sgd()
    opt.lr = lr
    opt.groups["w"].weight_decay = lr
    return opt.lr + opt.groups["w"].weight_decay


def scheduled(lr: Any) -> Any:
    opt = sgd(lr=lambda step: lr)
    return opt.step({"w": np.ones(2)}).lr, opt.lr, opt.params["w"].tolist()


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "lr": lambda x: sgd(lr=x).lr,
    "betas": lambda x: fastopt.Adam([W], betas=(x, x)).betas,
    "override": lambda x: [group.lr for group in sgd(overrides={"w": {"lr": x, "lr_scale": x}}).groups],
    "assigned": assigned,
    "scheduled": scheduled,
    "max_norm": lambda x: stepped(grad_scale=1.0) and sgd(max_norm=x).step({"w": np.ones(2)}).clip_coefficient,
    "clip_norm_per_tensor": lambda x: sgd(clip_norm_per_tensor=x).step({"w": np.ones(2)}).clip_coefficient,
    "ema": lambda x: sgd(ema=x).ema["w"].tolist(),
    "grad_scale": lambda x: stepped(grad_scale=x),
    "weight": accumulated,
    "update_": lambda x: updated(lr=x, grad_scale=x),
    "schedule": lambda x: schedules.constant(x),
    "schedules' parts": lambda x: schedules.sequence((x, lambda step: x), (3,))(4),
    "batchnorm's eps": lambda x: batchnorm_forward(X, eps=x)[0].tolist(),
    "batchnorm's momentum": lambda x: batchnorm_forward(X, None, None, *np.ones((2, 3)), momentum=x)[0].tolist(),
    "a layer's": lambda x: repr(fastopt.BatchNorm(3, momentum=x, eps=x)),
    "init": lambda x: init.normal_(np.empty((2, 3)), std=x, rng=0).tolist(),
}


@pytest.mark.parametrize("where", NUMBERS)
def test_what_is_0_d_and_real_is_a_number_everywhere(where):
    expected = NUMBERS[where](0.25)
    for value in QUARTERS:
        assert NUMBERS[where](value) == expected, repr(value)


@pytest.mark.parametrize("where", NUMBERS)
@pytest.mark.parametrize(("value", "named"), NO_NUMBERS)
def test_what_is_no_number_is_named_everywhere(where, value, named):
    if value is None and where in ("max_norm", "clip_norm_per_tensor", "ema", "a layer's", "batchnorm's momentum"):
        return  # means something there
    with pytest.raises(TypeError) as refused:
        NUMBERS[where](value)
    assert named in str(refused.value)


@pytest.mark.parametrize("value", [*QUARTERS[1:], np.array(0.25), 0.25], ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_number_is_the_gradient_of_a_0_d_parameter(value, dtype):
    opt = fastopt.SGD({"s": np.zeros((), dtype), "w": np.zeros(1, dtype)}, lr=1.0)
    opt.step({"s": value, "w": np.zeros(1, dtype)})
    opt.accumulate({"s": value, "w": None}, weight=2.0)
    opt.step(reduction="sum")
    assert opt.params["s"] == -0.75
    assert opt.params["s"].dtype == dtype


# --- counts and flags -------------------------------------------------------------------------------------------------

COUNTS: dict[str, Callable[[Any], Any]] = {
    "t": lambda x: updated(t=x),
    "step of a schedule": lambda x: schedules.linear(0.0, 1.0, 2)(x),
    "steps of a schedule": lambda x: schedules.linear(0.0, 1.0, x),
    "batch_size": lambda x: fastopt.minibatches(X, batch_size=x).batch_size,
    "seed": lambda x: init.normal_(np.empty(3), rng=x).tolist(),
    "fans": lambda x: init.fans((x, x)),
    "num_features": lambda x: fastopt.BatchNorm(x).num_features,
    "axis": lambda x: fastopt.BatchNorm(3, axis=x).axis,
    "axis of a call": lambda x: batchnorm_forward(X, axis=x)[0].tolist(),
    "axis to fold": lambda x: fastopt.fold_batchnorm(np.ones((2, 3)), None, fastopt.BatchNorm(3, dtype=float), axis=x)[
        0
    ].tolist(),
    "iterations": lambda x: fastopt.curvature.dominant_eigenvalue(
        lambda p: {"w": 2.0 * p["w"]}, {"w": np.ones(2)}, iterations=x, rng=0
    ),
    "num_batches_tracked": lambda x: setattr(fastopt.BatchNorm(1), "num_batches_tracked", x),
}


@pytest.mark.parametrize("where", COUNTS)
def test_integers_are_counts_everywhere(where):
    expected = COUNTS[where](1)
    for value in ONES:
        assert COUNTS[where](value) == expected, repr(value)


@pytest.mark.parametrize("where", COUNTS)
@pytest.mark.parametrize("value", [True, np.True_, np.array(True), 1.0, np.float32(1.0), "1", 1j, [1], np.ones(1, int)])
def test_other_values_are_no_counts_anywhere(where, value):
    with pytest.raises((TypeError, ValueError), match=r"must be|fold_batchnorm"):
        COUNTS[where](value)


FLAGS: dict[str, Callable[[Any], Any]] = {
    "eps_inside": lambda x: fastopt.Adam([W], eps_inside=x).eps_inside,
    "scheduled": lambda x: fastopt.Adam([W], bias_correction=lambda step: x).bias_correction,
    "frozen": lambda x: sgd(overrides={"w": {"frozen": x}}).groups["w"].frozen,
    "copy": lambda x: sgd(copy=x).flat.in_place,
    "maximize": lambda x: repr(sgd(maximize=x).step({"w": np.ones(2)})),
    "training": lambda x: batchnorm_forward(X, None, None, *np.ones((2, 3)), training=x)[0].tolist(),
    "a layer's training": lambda x: fastopt.BatchNorm(3, dtype=np.float64).forward(X, x).tolist(),
    "affine": lambda x: fastopt.BatchNorm(3, affine=x).affine,
    "track_running_stats": lambda x: fastopt.BatchNorm(3, track_running_stats=x).track_running_stats,
    "shuffle": lambda x: repr(fastopt.minibatches(X, batch_size=2, shuffle=x)),
}


@pytest.mark.parametrize("where", FLAGS)
def test_bools_are_flags_everywhere(where):
    for wanted in (True, False):
        expected = FLAGS[where](wanted)
        for value in (np.bool_(wanted), np.array(wanted), *([] if torch is None else [torch.tensor(wanted)])):
            assert FLAGS[where](value) == expected, repr(value)


@pytest.mark.parametrize("where", FLAGS)
@pytest.mark.parametrize("value", ["no", "", 1, 0.0, np.array([True]), np.array(1), [True]])
def test_other_values_are_no_flags_anywhere(where, value):
    with pytest.raises(TypeError, match=r"must be True or False, got "):
        FLAGS[where](value)


def test_what_a_part_of_a_schedule_returns_is_a_number():
    for wrong in ("0.5", True, [0.5], None):
        schedule = schedules.sequence((0.1, lambda step, wrong=wrong: wrong), (3,))
        with pytest.raises(TypeError, match=r"^schedule at step 1: must be a number, got "):
            schedule(4)


def test_numbers_beyond_floats_are_infinite():
    assert number("x", 10**400) == math.inf
    assert number("x", -(10**400)) == -math.inf
    assert real(Fraction(-(10**400), 3)) == -math.inf


def test_what_cannot_be_read_is_refused():
    class Traced:
        shape = ()

        def item(self) -> float:
            raise RuntimeError("not here")

        def __repr__(self) -> str:
            return "Traced"

    for check in (number, lambda name, value: count(name, value, 0), flag):
        with pytest.raises(TypeError, match=r"^x: must be .*, got Traced$"):
            check("x", Traced())
    assert shown(np.ones((2, 3))) == "an array of shape (2, 3)"


# --- eps --------------------------------------------------------------------------------------------------------------

EPS = [
    lambda dtype, eps: fastopt.Adam({"w": np.ones(1, dtype)}, eps=eps),
    lambda dtype, eps: fastopt.Adam(eps=eps).update({"w": np.ones(1, dtype)}, {"w": np.ones(1, dtype)}),
    lambda dtype, eps: fastopt.RMSprop({"w": np.ones(1, dtype)}, eps=eps),
    lambda dtype, eps: fastopt.Muon({"b": np.ones(1, dtype)}, adamw_eps=eps),
    lambda dtype, eps: fastopt.Adam({"w": np.ones(1, dtype)}, overrides={"w": {"eps": eps}}),
    lambda dtype, eps: fastopt.Adam({"w": np.ones(1, dtype)}, eps=lambda step: eps),
    lambda dtype, eps: setattr(fastopt.Adam({"w": np.ones(1, dtype)}), "eps", eps),
    lambda dtype, eps: setattr(fastopt.Adam({"w": np.ones(1, dtype)}).groups["w"], "eps", eps),
    lambda dtype, eps: fastopt.Adam({"w": np.ones(1, dtype)}).add({"b": np.ones(1, dtype)}, eps=eps),
    lambda dtype, eps: loaded(dtype, eps),
    lambda dtype, eps: fastopt.rules.adam.update_(*np.ones((4, 2), dtype), eps=eps),
    lambda dtype, eps: fastopt.BatchNorm(1, eps=eps, dtype=dtype),
    lambda dtype, eps: batchnorm_forward(X.astype(dtype), eps=eps),
]


def loaded(dtype: Any, eps: float) -> None:
    opt = fastopt.Adam({"w": np.ones(1, dtype)})
    state = opt.state_dict()
    state["hyper"]["eps"] = eps
    opt.load_state_dict(state)


@pytest.mark.parametrize("give", EPS)
def test_an_eps_that_becomes_0_is_refused_wherever_it_is_given(give):
    with pytest.raises(ValueError, match=r"eps: must not become 0 in float32, got 1e-60; use a number >= 1e-38"):
        give(np.float32, 1e-60)
    give(np.float32, 1e-30)
    give(np.float64, 1e-60)


def test_a_schedule_of_eps_is_checked_at_every_step():
    opt = fastopt.Adam({"w": np.ones(1, np.float32)}, eps=lambda step: 1e-8 if step < 2 else 1e-60)
    grads = {"w": np.ones(1, np.float32)}
    for _ in range(2):
        opt.step(grads)
    before = opt.params["w"].tobytes()
    with pytest.raises(ValueError, match=r"^at step 2, schedule of eps: must not become 0 in float32"):
        opt.step(grads)
    assert (opt.params["w"].tobytes(), opt.step_count) == (before, 2)


# --- masks ------------------------------------------------------------------------------------------------------------

MASKED: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda x: fastopt.SGD({"w": x}),
    "gradient": lambda x: fastopt.SGD({"w": W}).step({"w": x}),
    "accumulated": lambda x: fastopt.SGD({"w": W}).accumulate({"w": x}),
    "assigned": lambda x: fastopt.SGD({"w": W}).params.__setitem__("w", x),
    "0-d": lambda x: fastopt.SGD({"s": np.ones(())}).step({"s": x[:1, 0].reshape(())}),
    "row gradients": lambda x: fastopt.SGD({"w": W}).step_rows({"w": ([0, 1], x)}),
    "row numbers": lambda x: fastopt.SGD({"w": W}).read_rows("w", x[0].astype(int)),
    "bare p": lambda x: fastopt.rules.sgd.update_(x[0], np.ones(3)),
    "bare g": lambda x: fastopt.rules.sgd.update_(np.ones(3), x[0]),
    "x": lambda x: batchnorm_forward(x),
    "gamma": lambda x: batchnorm_forward(X, x[0], np.ones(3)),
    "residual": lambda x: batchnorm_forward(W, residual=x),
    "layer": lambda x: fastopt.BatchNorm(3, dtype=np.float64).forward(x),
    "folded": lambda x: fastopt.fold_batchnorm(x, None, fastopt.BatchNorm(3), axis=-1),
    "batches": lambda x: fastopt.minibatches(x),
    "weights": lambda x: init.normal_(x),
    "lr": lambda x: fastopt.SGD([W], lr=x[:1, 0].reshape(())),
    "betas": lambda x: fastopt.Adam([W], betas=x[0, :2] * 0.5),
    "state": lambda x: with_state(x),
    "torch's state": lambda x: fastopt.interop.core.array_from(x, "exp_avg", W),
}


def with_state(x: Any) -> None:
    opt = fastopt.Adam({"w": W})
    state = opt.state_dict()
    state["state"]["m"]["w"] = x
    opt.load_state_dict(state)


@pytest.mark.parametrize("where", MASKED)
@pytest.mark.parametrize("mask", [True, False])
def test_masked_arrays_are_refused_everywhere(where, mask):
    with pytest.raises(TypeError, match=r"a masked array|got masked"):
        MASKED[where](np.ma.array(np.ones((2, 3)), mask=np.full((2, 3), mask)))


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.ones(3, int), r"got int64; use \w+\.astype\('float32'\)"),
        (np.ones(3, bool), "got bool"),
        (np.array(["a"] * 3), "got str"),
        (np.ones(3, complex), "got complex128"),
        (np.array([None] * 3), "got object"),
    ],
)
def test_arrays_of_other_dtypes_are_named(array, named):
    for give in (
        lambda: fastopt.SGD({"w": array}),
        lambda: fastopt.SGD({"w": np.ones(3, np.float32)}).step({"w": array}),
        lambda: fastopt.rules.sgd.update_(array, array.copy()),
    ):
        with pytest.raises(TypeError, match=named):
            give()


@pytest.mark.skipif(torch is None, reason="torch is not installed: it has these tensors")
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_tensors_are_named_with_a_remedy_that_works(name):
    tensor = torch.ones(3, dtype=getattr(torch, name), requires_grad=True)
    with pytest.raises(TypeError, match=rf"it is {name}: use param\.detach\(\)\.float\(\)\.numpy\(\)$"):
        fastopt.SGD({"w": tensor})
    opt = fastopt.SGD({"w": tensor.detach().float().numpy()})
    with pytest.raises(TypeError, match=rf"it is {name}: use grad\.detach\(\)\.float\(\)\.numpy\(\)$"):
        opt.step({"w": tensor})


# --- trees ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Part:
    w: Any
    b: Any


@pytest.mark.parametrize("make", [fastopt.SGD, lambda p, **how: fastopt.SGD(p, **how, copy=False)])
def test_none_stands_for_a_whole_subtree(make):
    def tree() -> dict[str, Any]:
        return {"a": {"x": np.zeros(2), "y": [np.zeros(1), (np.zeros(1), np.zeros(1))]}, "p": Part(*np.zeros((2, 1)))}

    one = np.ones(1)
    given = {"a": {"x": np.ones(2), "y": None}, "p": None}, {"a": None, "p": Part(one, one)}
    spelled = (
        {"a": {"x": np.ones(2), "y": [None, (None, None)]}, "p": Part(None, None)},
        {"a": {"x": None, "y": [None, (None, None)]}, "p": Part(one, one)},
    )
    opt, twin = make(tree(), lr=1.0), make(tree(), lr=1.0)
    for short, long in zip(given, spelled, strict=True):
        opt.step(short)
        twin.step(long)
        opt.accumulate(short)
        twin.accumulate(long)
        opt.step()
        twin.step()
    assert [array.tolist() for array in opt.flat.arrays] == [array.tolist() for array in twin.flat.arrays]
    assert opt.state_dict()["missed"] == twin.state_dict()["missed"] == {
        "a.x": 2, "a.y.0": 4, "a.y.1.0": 4, "a.y.1.1": 4, "p.w": 2, "p.b": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^grads: must have the structure of the parameters"):
        opt.step({"a": {"x": None}, "p": None})
    with pytest.raises(TypeError, match=r"^parameter 'a\.x': must be a NumPy array, got None$"):
        fastopt.SGD(tree(), copy=False).update({"a": None, "p": Part(one, one.copy())}, given[0])


def test_a_field_that_would_be_dropped_is_refused():
    @dataclasses.dataclass
    class Layer:
        w: Any
        b: Any = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.b = np.zeros(1)

    with pytest.raises(TypeError, match=r"^Layer\.b: must be a field with init=True to be part of a tree, got init=F"):
        fastopt.SGD({"layer": Layer(np.ones(2))})


# --- a micro-batch without weight -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"nonfinite": "raise"}])
def test_a_micro_batch_without_weight_is_as_if_it_had_no_gradients(reduction, options):
    opt, twin = (fastopt.Adam({"b": np.ones(2), "w": np.ones(3)}, **options) for _ in range(2))
    nothing = {"b": np.full(2, np.nan), "w": np.full(3, np.inf)}
    some = {"b": np.array([1.0, 2.0]), "w": None}
    opt.accumulate(nothing, weight=0)
    opt.accumulate(some, weight=2.0)
    opt.accumulate(nothing, weight=0.0)
    twin.accumulate(some, weight=2.0)
    for each in (opt, twin):
        each.step(reduction=reduction)
    assert opt.flat.data.tobytes() == twin.flat.data.tobytes()
    before = opt.flat.data.tobytes()
    opt.accumulate(nothing, weight=0)
    assert opt.step(reduction=reduction).step == 2  # as where each gradient is None
    assert opt.flat.data.tobytes() == before
    assert opt.state_dict()["missed"] == {"b": 1, "w": 2}
    with pytest.raises(TypeError, match=r"^gradient 'w': must be"):
        opt.accumulate({"b": None, "w": "1"}, weight=0)
