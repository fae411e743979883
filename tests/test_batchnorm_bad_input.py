"""BatchNorm refuses bad input by name, with the remedy, and changes nothing: running statistics included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastopt.batchnorm import BatchNorm, batchnorm_backward, batchnorm_forward, fold_batchnorm, functional

SHAPE = (4, 3, 2, 2)
C = 3
Call = Callable[[dict[str, Any]], Any]


def good() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=SHAPE).astype(np.float32),
        "gamma": np.full(C, 2.0, np.float32),
        "beta": np.full(C, 1.0, np.float32),
        "running_mean": np.full(C, 0.5, np.float32),
        "running_var": np.full(C, 1.5, np.float32),
    }


@pytest.fixture(autouse=True, params=["first", "later"])
def _call(request):
    """A first call is checked in Python, and a later one by compiled code, which leaves what it refuses to Python."""
    functional.KINDS.clear()
    if request.param == "later":
        for options in ({}, {"residual": np.zeros(SHAPE, np.float32)}, {"training": False}, {"gamma": None}):
            for activation in (None, "relu"):
                arguments = {**good(), **options, "activation": activation}
                x = arguments["x"]
                for _ in range(2):
                    batchnorm_backward(x, batchnorm_forward(**arguments)[1])
        assert len(functional.KINDS) == 8


def misaligned(shape: tuple[int, ...]) -> np.ndarray:
    room = np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)
    return room[1:].view(np.float32).reshape(shape)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


LONG = np.zeros(2 * 48, np.float32)

FORWARD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    # what is wrong, arguments in place of the good ones, error, message
    ("list", {"x": [[1.0]]}, TypeError, r"x: must be a NumPy array, got list; use np\.asarray"),
    ("integers", {"x": np.ones(SHAPE, int)}, TypeError, r"x: must be float32 or float64 .* got dtype int64"),
    ("half", {"x": np.ones(SHAPE, np.float16)}, TypeError, r"x: must be float32 or float64 .*float16"),
    ("big-endian", {"x": np.ones(SHAPE, ">f4")}, TypeError, r"x: .* native byte order, got dtype '>f4'"),
    ("no channels", {"x": np.ones(3, np.float32)}, ValueError, r"x: must have shape \(N, C\) or .*, got \(3,\)"),
    ("0-d", {"x": np.array(1.0, np.float32), "axis": -1}, ValueError, r"x: must have shape \(N, \.\.\., C\)"),
    ("empty channels", {"x": np.ones((4, 0), np.float32)}, ValueError, r"x: must have at least one channel"),
    (
        "strided out",
        {"out": np.ones((8, 3, 2, 2), np.float32)[::2]},
        ValueError,
        r"out: must be C-contiguous, got strides .*; use np\.ascontiguousarray\(out\)",
    ),
    (
        "strided x as out",
        {"x": LONG.reshape(8, 3, 2, 2)[::2], "out": LONG.reshape(8, 3, 2, 2)[::2]},
        ValueError,
        r"out: must be C-contiguous",
    ),
    (
        "short gamma of a strided x",
        {"x": np.ones((8, 3, 2, 2), np.float32)[::2], "gamma": np.ones(2, np.float32)},
        ValueError,
        r"gamma: must have shape \(3,\)",
    ),
    ("strided half", {"x": np.ones((8, 3, 2, 2), np.float16)[::2]}, TypeError, r"x: must be float32 or float64"),
    ("strided residual", {"residual": np.ones((8, 3), np.float32)[::2]}, ValueError, r"residual: must have shape"),
    ("misaligned", {"x": misaligned(SHAPE)}, ValueError, r"x: must be aligned, got an address"),
    ("axis 2", {"axis": 2}, ValueError, r"axis: must be 1 for \(N, C, \.\.\.\) or -1 for \(N, \.\.\., C\), got 2"),
    ("axis True", {"axis": True}, ValueError, r"axis: must be 1 .*, got True"),
    (
        "one value",
        {"x": np.ones((1, 3), np.float32)},
        ValueError,
        r"x: must have at least 2 values per channel in training, got 1 \(shape \(1, 3\)\)",
    ),
    (
        "no value",
        {"x": np.ones((0, 3), np.float32)},
        ValueError,
        r"x: must have at least 2 values .* got 0 \(shape \(0, 3\)\)",
    ),
    ("eps zero", {"eps": 0.0}, ValueError, r"eps: must be a finite number > 0, got 0\.0"),
    ("eps negative", {"eps": -1e-5}, ValueError, r"eps: must be a finite number > 0, got -1e-05"),
    ("eps NaN", {"eps": float("nan")}, ValueError, r"eps: must be a finite number > 0, got nan"),
    ("eps text", {"eps": "1e-5"}, TypeError, r"eps: must be a finite number > 0, got '1e-5'"),
    ("momentum high", {"momentum": 1.1}, ValueError, r"momentum: must be a number in \[0, 1\], got 1\.1"),
    ("momentum NaN", {"momentum": float("nan")}, ValueError, r"momentum: must be a number in \[0, 1\], got nan"),
    ("momentum None", {"momentum": None}, ValueError, r"momentum: must be .* got None; .* BatchNorm\(momentum=None\)"),
    ("momentum text", {"momentum": "0.1"}, TypeError, r"momentum: must be a number in \[0, 1\], got '0\.1'"),
    ("activation", {"activation": "tanh"}, ValueError, r"activation: must be None or 'relu', got 'tanh'"),
    ("short gamma", {"gamma": np.ones(2, np.float32)}, ValueError, r"gamma: must have shape \(3,\), .* got \(2,\)"),
    ("2-D beta", {"beta": np.ones((1, 3), np.float32)}, ValueError, r"beta: must have shape \(3,\), .* got \(1, 3\)"),
    ("double gamma", {"gamma": np.ones(3)}, TypeError, r"gamma: must be of dtype float32, as x is, got float64"),
    ("list beta", {"beta": [0.0] * 3}, TypeError, r"beta: must be a NumPy array or None, got list"),
    ("strided gamma", {"gamma": np.ones(6, np.float32)[::2]}, ValueError, r"gamma: must be C-contiguous"),
    (
        "long running_mean",
        {"running_mean": np.ones(4, np.float32)},
        ValueError,
        r"running_mean: must have shape \(3,\), one number per channel of x \(4, 3, 2, 2\), got \(4,\)",
    ),
    ("double running_var", {"running_var": np.ones(3)}, TypeError, r"running_var: must be of dtype float32"),
    (
        "read-only var",
        {"running_var": read_only(np.ones(3, np.float32))},
        ValueError,
        r"running_var: must be writeable, got a read-only array",
    ),
    (
        "one statistic",
        {"running_var": None},
        ValueError,
        r"running_var: must be an array, as running_mean is, got None",
    ),
    (
        "other statistic",
        {"running_mean": None},
        ValueError,
        r"running_mean: must be an array, as running_var is, got None",
    ),
    (
        "shared statistics",
        {"running_mean": LONG[:3], "running_var": LONG[2:5]},
        ValueError,
        r"running_var: must share no memory with running_mean",
    ),
    *[
        (
            f"{name} in {other}",
            {name: LONG[:3], other: LONG[2:5]},
            ValueError,
            rf"{other}: must share no memory with {name}, got an array that overlaps it",
        )
        for name in ("gamma", "beta")
        for other in ("running_mean", "running_var")
    ],
    (
        "inference without statistics",
        {"training": False, "running_mean": None, "running_var": None},
        ValueError,
        r"running_mean: must be an array with training=False, got None",
    ),
    (
        "negative variance",
        {"training": False, "running_var": np.array([1.0, -1.0, 1.0], np.float32)},
        ValueError,
        r"running_var: must be >= 0, got -1\.0",
    ),
    *[
        (
            f"{name} {value}",
            {"training": False, name: np.array([1.0, value, 1.0], np.float32)},
            ValueError,
            rf"{name}: must be finite, got {value}",
        )
        for name in ("running_mean", "running_var")
        for value in (np.inf, np.nan)
    ],
    (
        "short residual",
        {"residual": np.ones((4, 3), np.float32)},
        ValueError,
        r"residual: must have shape \(4, 3, 2, 2\)",
    ),
    ("double residual", {"residual": np.ones(SHAPE)}, TypeError, r"residual: must be of dtype float32, got float64"),
    ("list out", {"out": []}, TypeError, r"out: must be a NumPy array, got list"),
    ("short out", {"out": np.ones((4, 3, 2, 1), np.float32)}, ValueError, r"out: must have shape \(4, 3, 2, 2\)"),
    (
        "read-only out",
        {"out": read_only(np.ones(SHAPE, np.float32))},
        ValueError,
        r"out: must be writeable, got a read-only array",
    ),
    (
        "half of x as out",
        {"x": LONG[:48].reshape(SHAPE), "out": LONG[1:49].reshape(SHAPE)},
        ValueError,
        r"out: must be x or share no memory with it",
    ),
    (
        "half of the residual as out",
        {"residual": LONG[:48].reshape(SHAPE), "out": LONG[1:49].reshape(SHAPE)},
        ValueError,
        r"out: must be residual or share no memory with it",
    ),
    *[
        (
            f"{name} in out",
            {name: LONG[:3], "out": LONG[:48].reshape(SHAPE)},
            ValueError,
            rf"out: must share no memory with {name}, got an array that overlaps it; pass another",
        )
        for name in ("gamma", "beta", "running_mean", "running_var")
    ],
    (
        "in place in training",
        {"x": LONG[:48].reshape(SHAPE), "out": LONG[:48].reshape(SHAPE)},
        ValueError,
        r"out: must not be x in training, whose backward pass needs x",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in FORWARD])
def test_a_bad_forward_call_is_refused_and_changes_nothing(change, error, message):
    arguments = {**good(), **change}
    before = {name: np.copy(value) for name, value in arguments.items() if isinstance(value, np.ndarray)}
    with pytest.raises(error, match=message):
        batchnorm_forward(**arguments)
    for name, array in before.items():
        np.testing.assert_array_equal(arguments[name], array, err_msg=name)


def test_inference_takes_one_value_and_none():
    for samples in (0, 1):
        arguments = {**good(), "x": np.ones((samples, 3), np.float32)}
        y, _ = batchnorm_forward(**arguments, training=False)
        assert y.shape == (samples, 3)
        np.testing.assert_allclose(y, 2.0 * 0.5 / np.sqrt(1.5 + 1e-5) + 1.0, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0)])
def test_the_gradients_of_nothing_are_zero(shape):
    y, saved = batchnorm_forward(**{**good(), "x": np.ones(shape, np.float32)}, training=False)
    grads = batchnorm_backward(y, saved)
    assert grads.dx.shape == shape
    for grad in (grads.dgamma, grads.dbeta):
        np.testing.assert_array_equal(grad, np.zeros(C))


DY = np.ones(SHAPE, np.float32)
BACKWARD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("list", {"dy": [1.0]}, TypeError, r"dy: must be a NumPy array, got list"),
    (
        "another shape",
        {"dy": np.ones((4, 3), np.float32)},
        ValueError,
        r"dy: must have shape \(4, 3, 2, 2\), got \(4, 3\)",
    ),
    ("double", {"dy": np.ones(SHAPE)}, TypeError, r"dy: must be of dtype float32, got float64"),
    ("strided out", {"out": np.ones((8, 3, 2, 2), np.float32)[::2]}, ValueError, r"out: must be C-contiguous"),
    ("strided of another shape", {"dy": np.ones((8, 3), np.float32)[::2]}, ValueError, r"dy: must have shape"),
    ("short out", {"out": np.ones(3, np.float32)}, ValueError, r"out: must have shape \(4, 3, 2, 2\)"),
    (
        "read-only out",
        {"out": read_only(np.ones(SHAPE, np.float32))},
        ValueError,
        r"out: must be writeable, got a read-only array",
    ),
    (
        "half of dy as out",
        {"dy": LONG[:48].reshape(SHAPE), "out": LONG[1:49].reshape(SHAPE)},
        ValueError,
        r"out: must be dy or share no memory with it",
    ),
    ("short dgamma", {"dgamma": np.ones(2, np.float32)}, ValueError, r"dgamma: must have shape \(3,\)"),
    ("double dbeta", {"dbeta": np.ones(3)}, TypeError, r"dbeta: must be of dtype float32"),
    (
        "read-only dgamma",
        {"dgamma": read_only(np.ones(3, np.float32))},
        ValueError,
        r"dgamma: must be writeable, got a read-only array",
    ),
    (
        "one array for both",
        {"dgamma": LONG[:3], "dbeta": LONG[:3]},
        ValueError,
        r"dbeta: must share no memory with dgamma",
    ),
    *[
        (
            f"{name} in {whole}",
            {"dy": DY, whole: LONG[:48].reshape(SHAPE), name: LONG[:3]},
            ValueError,
            rf"{name}: must share no memory with {whole}",
        )
        for name in ("dgamma", "dbeta")
        for whole in ("dy", "out")
    ],
    ("not saved", {"saved": "y"}, TypeError, r"saved: must be what batchnorm_forward returned, got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in BACKWARD])
def test_a_bad_backward_call_is_refused_and_may_be_made_again(change, error, message):
    _, saved = batchnorm_forward(**good())
    arguments = {"dy": DY, "saved": saved, **change}
    before = {name: np.copy(value) for name, value in arguments.items() if isinstance(value, np.ndarray)}
    with pytest.raises(error, match=message):
        batchnorm_backward(**arguments)
    for name, array in before.items():
        np.testing.assert_array_equal(arguments[name], array, err_msg=name)
    assert not saved.used
    batchnorm_backward(DY, saved)
    assert saved.used


def test_backward_twice_is_refused():
    _, saved = batchnorm_forward(**good())
    batchnorm_backward(DY, saved)
    with pytest.raises(RuntimeError, match=r"saved: must be good for one backward pass, got one that was used; call"):
        batchnorm_backward(DY, saved)


@pytest.mark.parametrize("doubled", [False, True])
def test_backward_after_in_place_inference_is_refused(doubled):
    """Also where x is the residual, too, and y is written over both."""
    arguments = good()
    arguments["residual"] = arguments["x"] if doubled else None
    _, saved = batchnorm_forward(**arguments, training=False, out=arguments["x"])
    with pytest.raises(
        ValueError, match=r"saved: must be of a forward pass that kept x, got one that wrote y over x \(out=x\)"
    ):
        batchnorm_backward(DY, saved)


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_a_destination_without_a_gradient_is_refused(name):
    arguments = {**good(), name: None}
    _, saved = batchnorm_forward(**arguments)
    with pytest.raises(ValueError, match=rf"d{name}: must be None where the forward pass had no {name}, got an array"):
        batchnorm_backward(DY, saved, **{"d" + name: np.ones(C, np.float32)})


# --- the layer --------------------------------------------------------------------------------------------------------

LAYER: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("float features", (3.0,), {}, TypeError, r"num_features: must be an int >= 1, got 3\.0"),
    ("bool features", (True,), {}, TypeError, r"num_features: must be an int >= 1, got True"),
    ("no features", (0,), {}, ValueError, r"num_features: must be an int >= 1, got 0"),
    ("momentum", (3,), {"momentum": -0.1}, ValueError, r"momentum: must be a number in \[0, 1\], got -0\.1"),
    ("eps", (3,), {"eps": 0}, ValueError, r"eps: must be a finite number > 0, got 0"),
    ("axis", (3,), {"axis": 0}, ValueError, r"axis: must be 1 .*, got 0"),
    ("activation", (3,), {"activation": "gelu"}, ValueError, r"activation: must be None or 'relu', got 'gelu'"),
    ("dtype", (3,), {"dtype": np.float16}, TypeError, r"dtype: must be float32 or float64, got .*float16"),
    ("backend", (3,), {"backend": "tpu"}, ValueError, r"backend: must be one of 'cpu', 'cuda', got 'tpu'"),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in LAYER]
)
def test_a_bad_layer_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(*arguments, **options)


def test_a_refused_forward_pass_leaves_the_layer_as_it_was():
    bn = BatchNorm(3, momentum=None)
    bn.forward(good()["x"])
    mean, var = bn.running_mean.copy(), bn.running_var.copy()
    for x, error, message in (
        (np.ones((1, 3), np.float32), ValueError, r"x: must have at least 2 values per channel in training, got 1"),
        (
            np.ones((4, 2), np.float32),
            ValueError,
            r"x: must have 3 channels \(num_features\) on axis 1, got .*\(4, 2\)",
        ),
        (np.ones((4, 3)), TypeError, r"x: must be of dtype float32, as the layer is, got float64"),
        ([[1.0, 2.0, 3.0]], TypeError, r"x: must be a NumPy array, got list"),
    ):
        with pytest.raises(error, match=message):
            bn.forward(x)
    np.testing.assert_array_equal(bn.running_mean, mean)
    np.testing.assert_array_equal(bn.running_var, var)
    assert bn.num_batches_tracked == 1
    bn.backward(DY)  # of the pass that was made


def test_backward_needs_a_forward_pass_each():
    bn = BatchNorm(3)
    message = r"backward: must follow a forward pass, got none since the last backward pass; call forward first"
    with pytest.raises(RuntimeError, match=message):
        bn.backward(DY)
    bn.forward(good()["x"])
    with pytest.raises(ValueError, match=r"dy: must have shape"):
        bn.backward(DY[0])
    bn.backward(DY)
    with pytest.raises(RuntimeError, match=message):
        bn.backward(DY)


def pair(dtype: Any = np.float32, shape: tuple[int, ...] = (3,)) -> dict[str, np.ndarray]:
    return {"gamma": np.ones(shape, dtype), "beta": np.zeros(shape, dtype)}


ONE = pair()
ATTACH: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("no dict", [1.0], pair(), ValueError, r"params: must be a dict with the keys \['beta', 'gamma'\], got list"),
    ("a key short", {"gamma": np.ones(3)}, pair(), ValueError, r"params: must be a dict with the keys"),
    ("double", pair(np.float64), pair(), TypeError, r"params\['gamma'\]: must be of dtype float32, got float64"),
    ("short", pair(), pair(shape=(2,)), ValueError, r"grads\['gamma'\]: must have shape \(3,\), got \(2,\)"),
    (
        "read-only",
        pair(),
        {**pair(), "beta": read_only(np.ones(3, np.float32))},
        ValueError,
        r"grads\['beta'\]: must be writeable, got a read-only array",
    ),
    ("the same twice", ONE, ONE, ValueError, r"^params\['(\w+)'\] and grads\['\1'\]: must not overlap in mem"),
    ("half of one", {"gamma": LONG[:3], "beta": LONG[2:5]}, pair(), ValueError, r"^params\['gamma'\] and params\['bet"),
    ("one gradient", pair(), dict.fromkeys(ONE, LONG[:3]), ValueError, r"^grads\['gamma'\] and grads\['beta'\]: must"),
    (
        "crossed",
        {**pair(), "gamma": LONG[:3]},
        {**pair(), "beta": LONG[:3]},
        ValueError,
        r"^params\['gamma'\] and grads\['beta'\]: must not overlap in memory; pass arrays that share none",
    ),
]


@pytest.mark.parametrize(
    ("params", "grads", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in ATTACH]
)
def test_bad_arrays_are_not_attached(params, grads, error, message):
    bn = BatchNorm(3)
    own = (bn.params, bn.grads)
    with pytest.raises(error, match=message):
        bn.attach(params, grads)
    assert (bn.params, bn.grads) == own


def test_a_state_is_attached_whole_or_not_at_all():
    bn = BatchNorm(3)
    own = bn.state
    grads = {name: np.zeros(3, np.float32) for name in own}
    both = r"\['beta', 'gamma', 'running_mean', 'running_var'\]"
    with pytest.raises(ValueError, match=rf"grads: must be a dict with the keys {both}, got \['beta', 'gamma'\]"):
        bn.attach(own, bn.grads)
    with pytest.raises(ValueError, match=rf"params: must be .* \['beta', 'gamma'\], got .*; or pass {both} in both"):
        bn.attach({**pair(), "running_mean": np.zeros(3, np.float32)}, grads)
    with pytest.raises(TypeError, match=r"params\['running_var'\]: must be of dtype float32, got float64"):
        bn.attach({**own, "running_var": np.ones(3)}, grads)
    with pytest.raises(ValueError, match=r"^params\['running_var'\] and grads\['running_var'\]: must not overlap"):
        bn.attach(own, {**grads, "running_var": own["running_var"]})
    with pytest.raises(ValueError, match=r"^params\['gamma'\] and running_mean: must not overlap in memory"):
        bn.attach({**pair(), "gamma": own["running_mean"]}, pair())
    assert all(bn.state[name] is own[name] for name in own)
    assert set(BatchNorm(3, track_running_stats=False).state) == {"gamma", "beta"}
    statistics = BatchNorm(3, affine=False).state
    assert set(statistics) == {"running_mean", "running_var"}
    bn = BatchNorm(3, affine=False)
    bn.attach(statistics, {name: np.zeros(3, np.float32) for name in statistics})
    assert bn.running_var is statistics["running_var"]


def state(**changed: Any) -> dict[str, Any]:
    return {**BatchNorm(3).state_dict(), **changed}


STATES: list[tuple[str, Any, type[Exception], str]] = [
    ("list", [], TypeError, r"state: must be what state_dict\(\) returned"),
    ("a key more", state(gamma=1), TypeError, r"state: must be what state_dict\(\) returned"),
    ("newer", state(format=2), ValueError, r"state\['format'\]: must be 1, got 2; use a newer fastopt"),
    (
        "count",
        state(num_batches_tracked=-1),
        ValueError,
        r"state\['num_batches_tracked'\]: must be an int >= 0, got -1",
    ),
    (
        "untracked",
        state(running_var=None),
        ValueError,
        r"state\['running_var'\]: must be an array, as in the layer, got None",
    ),
    (
        "short",
        state(running_mean=np.ones(2, np.float32)),
        ValueError,
        r"state\['running_mean'\]: must have shape \(3,\), got \(2,\)",
    ),
    ("double", state(running_mean=np.ones(3)), TypeError, r"state\['running_mean'\]: must be of dtype float32"),
    (
        "infinite",
        state(running_mean=np.full(3, np.inf, np.float32)),
        ValueError,
        r"state\['running_mean'\]: must be finite, got inf",
    ),
    (
        "negative",
        state(running_var=np.full(3, -1, np.float32)),
        ValueError,
        r"state\['running_var'\]: must be >= 0, got -1\.0",
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in STATES])
def test_a_bad_state_is_refused_and_changes_nothing(bad, error, message):
    bn = BatchNorm(3)
    bn.forward(good()["x"])
    before = bn.state_dict()
    with pytest.raises(error, match=message):
        bn.load_state_dict(bad)
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_state_with_statistics_is_refused_by_a_layer_without():
    with pytest.raises(ValueError, match=r"state\['running_mean'\]: must be None, as in the layer, got an array"):
        BatchNorm(3, track_running_stats=False).load_state_dict(state())


WEIGHT = np.ones((4, 3))
FOLD: list[tuple[str, Call, type[Exception], str]] = [
    ("no layer", lambda o: fold_batchnorm(WEIGHT, None, "bn"), TypeError, r"bn: must be a BatchNorm, got str"),
    (
        "no statistics",
        lambda o: fold_batchnorm(WEIGHT, None, BatchNorm(3, track_running_stats=False)),
        ValueError,
        r"bn: must have running statistics",
    ),
    (
        "list",
        lambda o: fold_batchnorm([[1.0]], None, o["bn"]),
        TypeError,
        r"weight: must be a NumPy array, got list",
    ),
    (
        "integers",
        lambda o: fold_batchnorm(np.ones((4, 3), int), None, o["bn"]),
        TypeError,
        r"weight: must be float32 or float64, got dtype int64",
    ),
    (
        "1-D",
        lambda o: fold_batchnorm(np.ones(3), None, o["bn"]),
        ValueError,
        r"weight: must have at least 2 dimensions",
    ),
    (
        "another width",
        lambda o: fold_batchnorm(np.ones((3, 4)), None, o["bn"]),
        ValueError,
        r"weight: must have 3 output channels, as bn has, got 4 \(axis 1 of \(3, 4\)\); pass their axis as axis=",
    ),
    (
        "axis",
        lambda o: fold_batchnorm(WEIGHT, None, o["bn"], axis=2),
        ValueError,
        r"axis: must be an axis of weight, whose shape is \(4, 3\), got 2",
    ),
    (
        "axis of groups",
        lambda o: fold_batchnorm(np.ones((4, 1, 2)), None, o["bn"], axis=1, groups=3),
        ValueError,
        r"weight: must have 3 output channels, as bn has, got 1 \(axis 1 of \(4, 1, 2\)\)",
    ),
    (
        "axis True",
        lambda o: fold_batchnorm(WEIGHT, None, o["bn"], axis=True),
        TypeError,
        r"axis: must be an axis of weight, whose shape is \(4, 3\), got True",
    ),
    ("groups", lambda o: fold_batchnorm(WEIGHT, None, o["bn"], groups=0), ValueError, r"groups: must be an int >= 1"),
    (
        "bias",
        lambda o: fold_batchnorm(WEIGHT, np.ones(4), o["bn"]),
        ValueError,
        r"bias: must have shape \(3,\), got \(4,\)",
    ),
]


def test_a_negative_running_variance_is_not_folded():
    bn = BatchNorm(3)
    bn.running_var[1] = -0.5
    with pytest.raises(ValueError, match=r"bn\.running_var: must be >= 0, got -0\.5"):
        fold_batchnorm(WEIGHT, None, bn)


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in FOLD])
def test_a_bad_fold_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call({"bn": BatchNorm(3)})
