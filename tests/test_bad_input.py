"""Every refusal: the error names what was wrong and what must be given, and nothing has changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from numba.core.errors import NumbaError

import fastopt
from fastopt import rules
from fastopt.hyper import Interval
from fastopt.rule import rule
from fastopt.scalars import dtype_name

N = 64
T, V = TypeError, ValueError  # so that a row of a table is a line


def refused(rows: list[tuple[Any, ...]]) -> Any:
    """Parametrise by rows (id, how to go wrong, error, message)."""
    return pytest.mark.parametrize(
        ("wrong", "error", "message"), [pytest.param(*row[1:], id=row[0].replace(" ", "_")) for row in rows]
    )


# --- bare arrays ------------------------------------------------------------------------------------------------------


def vectors(dtype: Any = np.float64) -> dict[str, Any]:
    """What `rules.adam.update_` takes, each array with some space around it."""
    rng = np.random.default_rng(0)
    return {name: rng.uniform(1.0, 2.0, 3 * N).astype(dtype)[N : 2 * N] for name in ("p", "g", "m", "v")}


def misaligned() -> np.ndarray:
    array = np.ones(8 * N + 8, np.uint8)[1 : 8 * N + 1].view(np.float64)
    assert not array.flags.aligned
    return array


def locked(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def overlapping() -> dict[str, np.ndarray]:
    whole = np.ones(2 * N)
    return {"m": whole[:N], "v": whole[N - 1 : 2 * N - 1]}


TYPES = [
    (
        f"{name} {kind}",
        {name: np.ones(N, kind)},
        T,
        rf"^{name}: must have dtype float32 or float64.*, got {re.escape(dtype_name(np.dtype(kind)))}",
    )
    for name in ("p", "g", "v")
    for kind in (np.int64, np.float16, np.longdouble, np.complex64, np.bool_, object, ">f8", ">f4")
]
NOT_ARRAYS = [
    (f"{name} {type(value).__name__}", {name: value}, T, rf"^{name}: must be a 1-D NumPy array, got ")
    for name in ("p", "g", "m")
    for value in ([1.0] * N, None, 1.0, memoryview(np.ones(N)), np.float64(1.0))
]
BARE = [
    *TYPES,
    *NOT_ARRAYS,
    ("p short", {"p": np.ones(N - 1)}, V, r"^g: must have 63 elements as p, got 64"),
    ("g short", {"g": np.ones(N - 1)}, V, r"^g: must have 64 elements as p, got 63"),
    ("m long", {"m": np.ones(N + 1)}, V, r"^m: must have 64 elements as p, got 65"),
    ("v empty", {"v": np.ones(0)}, V, r"^v: must have 64 elements as p, got 0"),
    ("p 2-D", {"p": np.ones((8, 8))}, V, r"^p: must be 1-D, got shape \(8, 8\).*reshape\(-1\)"),
    ("g 2-D", {"g": np.ones((8, 8))}, V, r"^g: must be 1-D, got shape \(8, 8\)"),
    ("g one row", {"g": np.ones((1, N))}, V, r"^g: must be 1-D, got shape \(1, 64\)"),
    ("m 0-d", {"m": np.ones(())}, V, r"^m: must be 1-D, got shape \(\)"),
    ("p strided", {"p": np.ones(2 * N)[::2]}, V, r"^p: must be contiguous, got strides \(16,\)"),
    ("g reversed", {"g": np.ones(N)[::-1]}, V, r"^g: must be contiguous, got strides \(-8,\)"),
    ("g broadcast", {"g": np.broadcast_to(1.0, N)}, V, r"^g: must be contiguous, got strides \(0,\)"),
    ("v column", {"v": np.ones((N, 2))[:, 0]}, V, r"^v: must be contiguous, got strides"),
    ("p locked", {"p": locked(np.ones(N))}, V, r"^p: must be writeable, .* got a read-only array"),
    ("v locked", {"v": locked(np.ones(N))}, V, r"^v: must be writeable, .* got a read-only array"),
    ("p misaligned", {"p": misaligned()}, V, r"^p: must be aligned to 8 bytes, got address 0x"),
    ("g misaligned", {"g": misaligned()}, V, r"^g: must be aligned to 8 bytes"),
    ("g of another dtype", {"g": np.ones(N, np.float32)}, T, r"^g: must have dtype float64 as p, got float32"),
    ("v of another dtype", {"v": np.ones(N, np.float32)}, T, r"^v: must have dtype float64 as p, got float32"),
    ("states overlap", overlapping(), V, r"^m and v: must not overlap in memory"),
    ("lr negative", {"lr": -0.1}, V, r"^lr: must be a number in \[0, inf\), got -0\.1"),
    ("lr nan", {"lr": math.nan}, V, r"^lr: must be a number in \[0, inf\), got nan"),
    ("lr a schedule", {"lr": lambda t: 0.1}, T, r"^lr: must be a number.*, got <function"),
    ("betas one", {"betas": (0.9, 1.0)}, V, r"^betas\[1\]: must be a number in \[0, 1\), got 1\.0"),
    ("unknown hyper", {"learning_rate": 0.1}, T, r"^learning_rate: must be a hyperparameter of 'adam' \(lr, "),
    *[
        (f"t {t!r}", {"t": t}, V if t in (0, -1) else T, r"^t: must be the number of this update, an int from 1, got ")
        for t in (0, -1, True, 1.5, 1.0, math.nan, "1", None)
    ],
    *[
        (f"grad_scale {scale!r}", {"grad_scale": scale}, V, r"^grad_scale: must be a positive finite number.* got")
        for scale in (0.0, 0, -1.0, math.nan, math.inf, -math.inf)
    ],
    *[
        (f"grad_scale {scale!r}", {"grad_scale": scale}, T, r"^grad_scale: must be a positive finite number.* got")
        for scale in ("x", None, True, 1j, [1.0])
    ],
]


@refused(BARE)
def test_bare_arrays(wrong, error, message):
    arguments = {**vectors(), **wrong}
    arrays = [value for value in arguments.values() if isinstance(value, np.ndarray)]
    before = [array.tobytes() for array in arrays]
    p, g, m, v = (arguments.pop(name) for name in ("p", "g", "m", "v"))
    with pytest.raises(error, match=message):
        rules.adam.update_(p, g, m, v, **arguments)
    assert [array.tobytes() for array in arrays] == before


SAME = [(one, other) for one in "pgmv" for other in "pgmv" if one < other]


@pytest.mark.parametrize(("one", "other"), SAME)
@pytest.mark.parametrize("shift", [0, 1, N - 1, -1, 1 - N])
def test_bare_arrays_that_overlap(one, other, shift):
    whole = np.linspace(1.0, 2.0, 3 * N)
    arrays = {**vectors(), one: whole[N : 2 * N], other: whole[N + shift : 2 * N + shift]}
    before = [array.tobytes() for array in arrays.values()]
    with pytest.raises(ValueError, match=rf"^({one} and {other}|{other} and {one}): must not overlap in memory"):
        rules.adam.update_(*arrays.values())
    assert [array.tobytes() for array in arrays.values()] == before


def test_bare_arrays_that_touch_are_welcome():
    whole = np.linspace(1.0, 2.0, 4 * N)
    apart = [part.copy() for part in np.split(whole, 4)]
    rules.adam.update_(*np.split(whole, 4), t=2)
    rules.adam.update_(*apart, t=2)
    assert whole.tobytes() == np.concatenate(apart).tobytes()


def test_a_read_only_gradient_is_welcome():
    arrays = vectors()
    arrays["g"].flags.writeable = False
    before = arrays["p"].copy()
    rules.adam.update_(*arrays.values())
    assert (arrays["p"] != before).all()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_or_too_many_states(count):
    p, g = np.ones(N), np.ones(N)
    with pytest.raises(
        TypeError, match=rf"^rule 'adam': must be given 2 states \(m, v\) after p and g, got {count} arrays"
    ):
        rules.adam.update_(p, g, *(np.zeros(N) for _ in range(count)))
    with pytest.raises(TypeError, match=r"^rule 'sgd': must be given 0 states \(none\) after p and g, got 2 arrays"):
        rules.sgd.update_(p, g, np.zeros(N), np.zeros(N))
    assert (p == 1.0).all()


def test_a_grad_scale_whose_inverse_is_not_finite():
    """1/5e-324 is inf, and the gradient times inf is no gradient."""
    arrays = vectors()
    before = [array.tobytes() for array in arrays.values()]
    with pytest.raises(ValueError, match="grad_scale"):
        rules.adam.update_(*arrays.values(), grad_scale=5e-324)
    assert [array.tobytes() for array in arrays.values()] == before


# --- construction -----------------------------------------------------------------------------------------------------

W = np.ones((2, 3))


class Pair(NamedTuple):
    weight: Any
    bias: Any


def adam(params: Any = None, **options: Any) -> fastopt.Optimizer:
    return fastopt.Adam({"w": W, "b": np.zeros(3)} if params is None else params, **options)


def leaf(value: Any) -> Callable[[], Any]:
    return lambda: adam({"ok": W, "layer": [{"bad": value}]})


TREES = [
    *[
        (f"leaf {type(value).__name__}", leaf(value), T, r"^parameter 'layer\.0\.bad': must be a NumPy array, got ")
        for value in (1.0, "w", object(), np.float64(1.0), memoryview(W), (x for x in ()))
    ],
    *[
        (
            f"leaf {kind}",
            leaf(np.ones(3, kind)),
            T,
            rf"^parameter 'layer\.0\.bad': must have dtype float32, .*, got {re.escape(dtype_name(np.dtype(kind)))}",
        )
        for kind in (
            np.int32,
            np.uint8,
            np.bool_,
            np.longdouble,
            np.complex128,
            object,
            "U3",
            ">f4",
            ">f8",
            "M8[s]",
        )
    ],
    (
        "mixed",
        lambda: adam({"a": W, "b": {"c": np.ones(3, np.float32)}}),
        T,
        r"^parameter 'b\.c': must have dtype float64 as 'a', got fl",
    ),
    ("no arrays", lambda: adam({}), V, r"^params: must hold at least one array, got"),
    ("only None", lambda: adam({"a": None, "b": []}), V, r"^params: must hold at least one array, got"),
    ("None", lambda: fastopt.pack(None), V, r"^params: must hold at least one array, got a tree without any"),
    ("masked", lambda: adam([np.ma.ones(3)]), T, r"^parameter '0': must be an array without a mask, got .*filled\(0\)"),
    ("one path twice", lambda: adam({"a.b": W, "a": {"b": W}}), V, r"^parameter 'a\.b': must have a path of its own"),
    ("one path by type", lambda: adam([{1: W}, {"1": W, 1: W}]), V, r"^parameter '1\.1': must have a path of its own"),
    ("dtype int", lambda: fastopt.pack({"w": W}, dtype=np.int32), T, r"^dtype: must be float32, .* or float16, got"),
    ("dtype of 8 bits", lambda: fastopt.pack({"w": W}, dtype="int8"), T, r"^dtype: must be .*, got 'int8'"),
    ("dtype big-endian", lambda: fastopt.pack({"w": W}, dtype=">f4"), T, r"^dtype: must be .*, got '>f4'"),
    (
        "dtype of ints",
        lambda: fastopt.pack([np.ones(2, int)], dtype="f4"),
        T,
        r"^parameter '0': must have dtype float32",
    ),
    ("dtype of complex", lambda: fastopt.pack([1j * W], dtype="f4"), T, r"^parameter '0': must have dtype float32"),
    ("backend unknown", lambda: adam(backend="gpu"), V, r"^backend: must be one of 'cpu', 'cuda', got 'gpu'"),
    ("backend of a wrong type", lambda: adam(backend=3), V, r"^backend: must be one of .*, got 3"),
    ("backend cuda", lambda: adam(backend="cuda"), RuntimeError, r"^backend='cuda': .*use backend='cpu'"),
    (
        "backend of a pack",
        lambda: adam(fastopt.pack([W]), backend="cuda"),
        V,
        r"^backend: must be 'cpu', of .* got 'cuda'",
    ),
]

ZERO_UP = r"must be a number in \[0, inf\)"
BELOW_ONE = r"must be a number in \[0, 1\)"
UP_TO_ONE = r"must be a number in \[0, 1\]"
PAIR = r"must be 2 numbers, each in \[0, 1\)"
NUMBERS = [
    (
        "threshold of 0",
        lambda: fastopt.Adafactor({"w": W}, clip_threshold=0.0),
        V,
        r"^clip_threshold: must be .*\(0, inf",
    ),
    *[
        (
            f"{name} {value}",
            lambda name=name, value=value: adam(**{name: value}),
            V,
            rf"^{name}: {ZERO_UP}, got {value}",
        )
        for name in ("lr", "eps", "weight_decay")
        for value in (-1e-9, -1, math.nan, math.inf, -math.inf)
    ],
    *[
        (
            f"{name} {value!r}",
            lambda name=name, value=value: adam(**{name: value}),
            T,
            rf"^{name}: {ZERO_UP}, got ",
        )
        for name in ("lr", "eps", "weight_decay")
        for value in ("x", None, True, np.True_, [0.1], 1j, np.array([0.1]), np.ma.masked, np.array(True))
    ],
    ("lr beyond floats", lambda: adam(lr=10**400), V, r"^lr: must be .*, got 1000"),
    ("betas one", lambda: adam(betas=(0.9, 1.0)), V, rf"^betas\[1\]: {BELOW_ONE}, got 1\.0"),
    ("betas negative", lambda: adam(betas=(-0.1, 0.9)), V, rf"^betas\[0\]: {BELOW_ONE}, got -0\.1"),
    ("betas nan", lambda: adam(betas=(math.nan, 0.9)), V, rf"^betas\[0\]: {BELOW_ONE}, got nan"),
    ("betas text", lambda: adam(betas=("a", 0.9)), T, rf"^betas\[0\]: {BELOW_ONE}, got 'a'"),
    ("betas bool", lambda: adam(betas=(False, 0.9)), T, rf"^betas\[0\]: {BELOW_ONE}, got False"),
    ("betas short", lambda: adam(betas=(0.9,)), T, rf"^betas: {PAIR}, got \(0\.9,\)"),
    ("betas long", lambda: adam(betas=(0.9, 0.9, 0.9)), T, rf"^betas: {PAIR}, got "),
    ("betas number", lambda: adam(betas=0.9), T, rf"^betas: {PAIR}, got 0\.9"),
    ("betas two letters", lambda: adam(betas="ab"), T, rf"^betas: {PAIR}, got 'ab'"),
    ("betas set", lambda: adam(betas={0.9, 0.5}), T, rf"^betas: {PAIR}, got "),
    ("eps_inside number", lambda: adam(eps_inside=1), T, r"^eps_inside: must be True or False, got 1"),
    (
        "bias_correction text",
        lambda: adam(bias_correction="no"),
        T,
        r"^bias_correction: must be True or False, got 'no'",
    ),
    ("rho one", lambda: fastopt.Adadelta([W], rho=1.0), V, rf"^rho: {BELOW_ONE}, got 1\.0"),
    ("alpha one", lambda: fastopt.RMSprop([W], alpha=1.0), V, rf"^alpha: {BELOW_ONE}, got 1\.0"),
    ("lr_decay", lambda: fastopt.Adagrad([W], lr_decay=-1.0), V, rf"^lr_decay: {ZERO_UP}, got -1\.0"),
    ("momentum high", lambda: fastopt.SGD([W], momentum=1.1), V, rf"^momentum: {UP_TO_ONE}, got 1\.1"),
    ("momentum negative", lambda: fastopt.Nesterov([W], momentum=-0.1), V, rf"^momentum: {UP_TO_ONE}, got -0\.1"),
    ("momentum nan", lambda: fastopt.RMSprop([W], momentum=math.nan), V, rf"^momentum: {UP_TO_ONE}, got nan"),
    ("dampening", lambda: fastopt.SGD([W], momentum=0.9, dampening=2.0), V, rf"^dampening: {UP_TO_ONE}, got 2\.0"),
    ("form", lambda: fastopt.Momentum([W], form="heavy"), V, r"^form: must be one of 'heavy_ball',.*, got 'heavy'"),
    ("form none", lambda: fastopt.Momentum([W], form=None), V, r"^form: must be one of 'heavy_ball'.*, got None"),
    ("nesterov form", lambda: fastopt.Nesterov([W], form="torch"), V, r"^form: must be one of 'ref.*, got 'torch'"),
    ("nesterov alone", lambda: fastopt.SGD([W], nesterov=True), V, r"^nesterov: must be False unless momentum > 0"),
    (
        "nesterov with dampening",
        lambda: fastopt.SGD([W], nesterov=True, momentum=0.9, dampening=0.1),
        V,
        r"^nesterov: must be False unless .* dampening = 0, got momentum=0\.9, dampening=0\.1",
    ),
    (
        "unknown",
        lambda: adam(learning_rate=0.1),
        T,
        r"^learning_rate: must be a hyperparameter of 'adam' \(lr, .*, got learning_rate=0\.1; did you mean lr=0\.1\?$",
    ),
    *[
        (
            f"of elsewhere {name}",
            lambda name=name, value=value: adam(**{name: value}),
            T,
            rf"^{name}: must be a hyperparameter of 'adam' .*, got {name}=.*; did you mean {re.escape(meant)}\?$",
        )
        for name, value, meant in (
            ("alpha", 0.1, "lr=0.1"),
            ("beta1", 0.8, "betas=(0.8, 0.999)"),
            ("beta_2", 0.99, "betas=(0.9, 0.99)"),
            ("b1", 0.8, "betas=(0.8, 0.999)"),
            ("b2", None, "betas="),
            ("epsilon", 1e-7, "eps=1e-07"),
            ("clipnorm", 1.0, "clip_norm_per_tensor=1.0"),
            ("global_clipnorm", 1, "max_norm=1"),
            ("decay", 0.1, "weight_decay=0.1"),
            ("wieght_decay", 0.1, "weight_decay=0.1"),
            ("max_nrom", 1.0, "max_norm=1.0"),
            ("LR", 0.1, "lr=0.1"),
            ("amsgard", True, "amsgrad="),
        )
    ],
    ("rho of torch", lambda: fastopt.RMSprop([W], rho=0.9), T, r"^rho: .*; did you mean alpha=0\.9\?$"),
    ("like nothing", lambda: adam(hyperdrive=1), T, r"^hyperdrive: must be .*, got hyperdrive=1$"),
    ("an array", lambda: adam(extra_=np.ones((200, 3))), T, r"^extra_: .*, got extra_=an array of shape \(200, 3\)$"),
    (
        "of another rule",
        lambda: fastopt.Optimizer([W], rules.sgd, momentum=0.9),
        T,
        r"^momentum: must be a hyperparameter of 'sgd' \(lr, weight_decay\), got momentum=0\.9",
    ),
    ("rule a class", lambda: fastopt.Optimizer([W], fastopt.Adam), T, r"^rule: must be a Rule, made by @fast"),
    ("rule a function", lambda: fastopt.Optimizer([W], lambda p, g, h: p), T, r"^rule: must be a Rule.* got function"),
    ("rule a name", lambda: fastopt.Optimizer([W], "adam"), T, r"^rule: must be a Rule.*got str"),
]

SCHEDULES = [
    ("nan at 0", lambda: adam(lr=lambda t: math.nan), V, rf"^at step 0, schedule of lr: {ZERO_UP}, got nan"),
    ("negative at 0", lambda: adam(lr=lambda t: t - 1.0), V, rf"^at step 0, schedule of lr: {ZERO_UP}, got -1\.0"),
    ("None at 0", lambda: adam(lr=lambda t: None), T, rf"^at step 0, schedule of lr: {ZERO_UP}, got None"),
    ("betas at 0", lambda: adam(betas=lambda t: 0.9), T, rf"^at step 0, schedule of betas: {PAIR}, got 0\.9"),
    ("in an override", lambda: adam(overrides={"w": {"lr": lambda t: -1.0}}), V, r"^overrides: w: at step 0, sched"),
]

OVERRIDES = [
    (
        "unknown key",
        {"w": {"learning_rate": 0.1}},
        T,
        r"^overrides: w: learning_rate: must be a hyperparameter of 'adam' \(lr, .*; did you mean lr=0\.1\?$",
    ),
    ("matches nothing", {"*.bias": {"lr": 0.1}}, V, r"^overrides\['\*\.bias'\]: must match a .*; the paths are b, w"),
    ("other case", {"W": {"lr": 0.1}}, V, r"^overrides\['W'\]: must match a parameter"),
    ("out of range", {"w": {"lr": -1.0}}, V, r"^overrides: w: lr: must be a number in \[0, inf\), got -1\.0"),
    ("of a wrong type", {"w": {"lr": "x"}}, T, r"^overrides: w: lr: must be a number.*, got 'x'"),
    ("second glob", {"*": {}, "b": {"eps": math.inf}}, V, r"^overrides: b: eps: must be a number.*, got inf"),
    ("betas", {"b": {"betas": (0.9, 1.0)}}, V, r"^overrides: b: betas\[1\]: must be .*, got 1\.0"),
    ("number under a glob", {"w": 0.1}, T, r"^overrides\['w'\]: must be a dict of hyperparameters"),
    ("glob no text", {3: {"lr": 0.1}}, T, r"^overrides\[3\]: must be a dict of hyperparameters under a glob"),
    ("list", [("w", {"lr": 0.1})], T, r"^overrides: must be a dict of glob -> hyperparameters, got list"),
    ("text", "w", T, r"^overrides: must be a dict of glob -> hyperparameters, got str"),
]


@refused(TREES + NUMBERS + SCHEDULES)
def test_construction(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


@refused(OVERRIDES)
def test_overrides(wrong, error, message):
    with pytest.raises(error, match=message):
        adam(overrides=wrong)


def test_a_refused_construction_leaves_a_shared_buffer_alone():
    flat = fastopt.pack({"w": W})
    flat.grads["w"][...] = 3.0
    before = flat.data.tobytes(), flat.grad.tobytes()
    with pytest.raises(ValueError, match=r"^lr: must be .*, got -1\.0"):
        fastopt.Adam(flat, lr=-1.0)
    assert (flat.data.tobytes(), flat.grad.tobytes()) == before


# --- the step ---------------------------------------------------------------------------------------------------------

SHAPES = {"b": (3,), "layer": {"w": (2, 3)}}


def tree(value: float, dtype: Any = np.float32) -> dict[str, Any]:
    return {"b": np.full(3, value, dtype), "layer": {"w": np.full((2, 3), value, dtype)}}


def trained(**options: Any) -> fastopt.Optimizer:
    """An optimizer with two groups, two steps and a missed update behind it."""
    opt = fastopt.Adam(tree(1.0), **{"lr": 0.1, "overrides": {"b": {"weight_decay": 0.1}}, **options})
    opt.step(tree(0.5))
    opt.step({"b": None, "layer": {"w": np.ones((2, 3), np.float32)}})
    return opt


def everything(opt: fastopt.Optimizer) -> Any:
    """All that a refusal must leave as it is, to the bit."""
    saved = opt.state_dict()
    states = {
        name: {path: array.tobytes() for path, array in arrays.items()} for name, arrays in saved.pop("state").items()
    }
    return opt.flat.data.tobytes(), opt.flat.grad.tobytes(), states, opt.step_count, repr(opt), saved


def assert_refuses(
    make: Callable[[], fastopt.Optimizer],
    action: Callable[[fastopt.Optimizer], Any],
    error: type[Exception],
    message: str,
) -> None:
    """`action` is refused, nothing has changed, and the optimizer goes on like its twin, to which nothing happened."""
    opt, twin = make(), make()
    before = everything(opt)
    with pytest.raises(error, match=message):
        action(opt)
    assert everything(opt) == before
    for one in (opt, twin):
        one.step(tree(0.25))
    assert opt.flat.data.tobytes() == twin.flat.data.tobytes()
    assert opt.step_count == twin.step_count == 3


def put(value: Any) -> dict[str, Any]:
    """Gradients of which the first is good, and would be written, and the last is `value`."""
    return {"b": np.full(3, 9.0, np.float32), "layer": {"w": value}}


GRADIENTS = [
    (
        "list",
        lambda opt: [np.ones(3, np.float32)],
        V,
        r"^grads: must have the structure of the parameters, got a list instead of a dict with the keys 'b', 'layer'$",
    ),
    ("bare array", lambda opt: np.ones(9, np.float32), V, r"^grads: must have .*, got a NumPy array instead of a dict"),
    ("empty", lambda opt: {}, V, r"^grads: must have the structure .*, got a tree without 'b', 'layer'$"),
    ("missing key", lambda opt: {"b": np.ones(3, np.float32)}, V, r"^grads: .*, got a tree without 'layer'$"),
    ("missing deep key", lambda opt: {**tree(9.0), "layer": {}}, V, r"^grads: .*, got a tree without 'layer\.w'$"),
    ("one more key", lambda opt: {**tree(9.0), "c": W}, V, r"^grads: .*, got a tree with 'c' in excess$"),
    (
        "other deep key",
        lambda opt: {**tree(9.0), "layer": {"w_grad": W}},
        V,
        r"without 'layer\.w' and with 'layer\.w_grad' in excess; pass {'w': grads\['layer'\]\['w_grad'\], ...}$",
    ),
    (
        "keys with d",
        lambda opt: {"db": np.ones(3), "dlayer": tree(9.0)["layer"]},
        V,
        r"without 'b', 'layer' and with 'db', 'dlayer' in excess; pass {'b': grads\['db'\], 'layer': grads\[",
    ),
    ("list below", lambda opt: {**tree(9.0), "layer": [W]}, V, r"a list at 'layer', where the parameters have a dict"),
    ("an object", lambda opt: object(), V, r"^grads: must have the structure .*, got an object instead of a dict"),
    ("a number", lambda opt: 1.0, V, r"^grads: must have the structure .*, got a float instead of a dict"),
    *[
        (
            f"leaf {type(value).__name__}",
            lambda opt, value=value: put(value),
            T,
            r"^gradient 'layer\.w': must be a NumPy array or None, got ",
        )
        for value in (1.0, True, [[1.0] * 3] * 2, "w", {"w": W}, memoryview(W))
    ],
    *[
        (
            f"shape {shape}",
            lambda opt, shape=shape: put(np.ones(shape, np.float32)),
            V,
            r"^gradient 'layer\.w': must have shape \(2, 3\) as its parameter, got \(",
        )
        for shape in ((3, 2), (6,), (1, 3), (2, 3, 1), (), (0,))
    ],
    *[
        (
            f"dtype {dtype}",
            lambda opt, dtype=dtype: put(np.ones((2, 3), dtype)),
            T,
            rf"^gradient 'layer\.w': must have dtype float32 as .*, got {dtype_name(np.dtype(dtype))}; use grad",
        )
        for dtype in (np.float64, np.float16, np.int32, np.complex64, object, ">f4")
    ],
    ("scalar", lambda opt: put(np.float32(1.0)), V, r"^gradient 'layer\.w': must have shape \(2, 3\) .* got \(\)"),
    ("masked", lambda opt: put(np.ma.ones((2, 3), np.float32)), T, r"^gradient 'layer\.w': must be .* without a mask"),
    (
        "parameter",
        lambda opt: put(opt.params["layer"]["w"]),
        V,
        r"^gradient 'layer\.w': must not overlap the parameters",
    ),
    ("parameters", lambda opt: opt.params, V, r"^gradient 'b': must not overlap the parameters and states"),
    ("state", lambda opt: put(opt.states["v"]["layer"]["w"]), V, r"^gradient 'layer\.w': must not overlap the param"),
    ("states", lambda opt: opt.states["m"], V, r"^gradient 'b': must not overlap the parameters and states"),
    (
        "part of the parameters",
        lambda opt: put(opt.flat.data[:6].reshape(2, 3)),
        V,
        r"^gradient 'layer\.w': must not overlap the param",
    ),
    (
        "reversed parameter",
        lambda opt: put(opt.params["layer"]["w"][::-1]),
        V,
        r"^gradient 'layer\.w': must not overlap the param",
    ),
]


@refused(GRADIENTS)
def test_gradients(wrong, error, message):
    assert_refuses(trained, lambda opt: opt.step(wrong(opt)), error, message)


@pytest.mark.parametrize("norm", [{}, {"max_norm": 1.0}], ids=["one pass", "two passes"])
@pytest.mark.parametrize(
    "part",
    [
        lambda buffer: buffer[:6].reshape(2, 3),
        lambda buffer: buffer[1:7].reshape(2, 3),
        lambda buffer: buffer[5::-1].reshape(2, 3),
        lambda buffer: np.lib.stride_tricks.as_strided(buffer, (2, 3), (0, 4)),
    ],
    ids=["elsewhere", "shifted", "reversed", "repeated"],
)
def test_gradients_may_lie_anywhere_in_the_buffer_of_gradients(part, norm):
    """They are read where they are, and nothing writes there: what they overlap does not matter."""
    opt, twin = trained(**norm), trained(**norm)
    opt.flat.grad[...] = np.linspace(-1.0, 1.0, opt.flat.size)
    before = opt.flat.grad.tobytes()
    grads = {"b": opt.flat.grad[2:5], "layer": {"w": part(opt.flat.grad)}}
    twin.step({"b": grads["b"].copy(), "layer": {"w": grads["layer"]["w"].copy()}})
    opt.step(grads)
    assert opt.flat.grad.tobytes() == before
    assert everything(opt)[2:] == everything(twin)[2:]
    assert opt.flat.data.tobytes() == twin.flat.data.tobytes()


@pytest.mark.parametrize("value", [1.5, 2, np.float32(1.5), np.float64(1.5), np.array(1.5), np.array(2)], ids=repr)
def test_a_number_is_a_gradient_of_a_0_d_parameter(value):
    opt = fastopt.SGD({"s": np.ones((), np.float32)}, lr=1.0)
    opt.step({"s": value})
    assert opt.params["s"] == 1.0 - value


@refused(
    [
        ("bool", True, T, r"^gradient 's': must be a NumPy array, number or None, got bool"),
        ("complex", 1j, T, r"^gradient 's': must be a NumPy array, number or None, got complex"),
        ("text", "1", T, r"^gradient 's': must be a NumPy array, number or None, got str"),
        ("array of bools", np.array(True), T, r"^gradient 's': must have dtype float32 as its parameter, got bool"),
        ("complex array", np.array(1j), T, r"^gradient 's': must have dtype float32 as its parameter, got complex128"),
        ("beyond floats", 10**400, V, r"^gradient 's': must be in the range of float32, got a larger int"),
        ("1-D", np.ones(1, np.float32), V, r"^gradient 's': must have shape \(\) as its parameter, got \(1,\)"),
    ]
)
def test_gradients_of_a_0_d_parameter(wrong, error, message):
    opt = fastopt.SGD({"s": np.ones((), np.float32)}, lr=1.0)
    with pytest.raises(error, match=message):
        opt.step({"s": wrong})
    assert (opt.params["s"], opt.step_count) == (1.0, 0)


SCALES = [
    (repr(scale), scale, error, r"^grad_scale: must be a positive finite number.* got")
    for error, scales in ((V, (0, 0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324)), (T, ("x", None, 1j, [2.0])))
    for scale in scales
]


@refused(SCALES)
def test_grad_scale(wrong, error, message):
    assert_refuses(trained, lambda opt: opt.step(tree(9.0), grad_scale=wrong), error, message)


class Breaking:
    """A schedule: 0.1, but `value` at step 2, the third update, until the user has mended what it reads."""

    def __init__(self, value: Any):
        self.value = value
        self.broken = False

    def __call__(self, step: int) -> Any:
        return self.value if self.broken and step == 2 else 0.1

    def during(self, action: Callable[[fastopt.Optimizer], Any]) -> Callable[[fastopt.Optimizer], None]:
        def broken_action(opt: fastopt.Optimizer) -> None:
            self.broken = True
            try:
                action(opt)
            finally:
                self.broken = False

        return broken_action


FAILING = [
    ("nan", math.nan, V, rf"^at step 2, schedule of lr: {ZERO_UP}, got nan"),
    ("negative", -1.0, V, rf"^at step 2, schedule of lr: {ZERO_UP}, got -1\.0"),
    ("infinite", math.inf, V, rf"^at step 2, schedule of lr: {ZERO_UP}, got inf"),
    ("None", None, T, rf"^at step 2, schedule of lr: {ZERO_UP}, got None"),
    ("beyond float32", 1e40, V, r"^hyperparameters of rule 'adam' at step \d: must be in the range of float32, got"),
]


@refused(FAILING)
def test_a_schedule_that_goes_wrong_later(wrong, error, message):
    lr = Breaking(wrong)
    assert_refuses(lambda: trained(lr=lr), lr.during(lambda opt: opt.step()), error, message)


@refused(FAILING)
def test_a_schedule_that_goes_wrong_later_leaves_even_the_gradients(wrong, error, message):
    lr = Breaking(wrong)
    assert_refuses(lambda: trained(lr=lr), lr.during(lambda opt: opt.step(tree(9.0))), error, message)


@refused(FAILING)
def test_a_schedule_that_goes_wrong_as_a_gradient_is_missing_for_the_first_time(wrong, error, message):
    lr = Breaking(wrong)
    without_b = {**tree(0.5), "b": None}
    assert_refuses(lambda: twice(lr=lr), lr.during(lambda opt: opt.step(without_b)), error, message)


def twice(**options: Any) -> fastopt.Optimizer:
    opt = fastopt.Adam(tree(1.0), **options)
    opt.step(tree(0.5))
    opt.step(tree(0.5))
    return opt


def test_a_schedule_that_raises():
    def lr(step: int) -> float:
        if step == 2 and not mended:
            raise KeyError("the user's own")
        return 0.1

    mended: list[int] = []
    opt = trained(lr=lr)
    before = everything(opt)
    with pytest.raises(KeyError, match="the user's own"):
        opt.step()
    assert everything(opt) == before
    mended.append(1)
    assert opt.step().step == 3


@refused(
    [
        ("negative", -1.0, V, rf"^lr: {ZERO_UP}, got -1\.0"),
        ("nan", math.nan, V, rf"^lr: {ZERO_UP}, got nan"),
        ("text", "0.1", T, rf"^lr: {ZERO_UP}, got '0\.1'"),
        ("bool", True, T, rf"^lr: {ZERO_UP}, got True"),
        ("schedule", lambda step: math.nan, V, r"^at step 2, schedule of lr: must be .*, got nan"),
        (
            "bad at this step",
            lambda step: 0.1 if step == 0 else math.nan,
            V,
            r"^at step 2, schedule of lr: must be .*, got nan",
        ),
    ]
)
def test_assigning_lr(wrong, error, message):
    assert_refuses(trained, lambda opt: setattr(opt, "lr", wrong), error, message)


@pytest.mark.parametrize("name", ["step_count", "params", "grads", "states", "state", "ema", "groups", "flat"])
def test_what_cannot_be_assigned(name):
    assert_refuses(trained, lambda opt: setattr(opt, name, 3), AttributeError, name)


@pytest.mark.parametrize("name", ["max_norm", "clip_value", "zero_grad_", "Lr", "beta", "momentum", "_states"])
def test_attributes_that_do_not_exist(name):
    """A typing error must not pass for a new hyperparameter."""
    message = (
        rf"^{name}: must be a hyperparameter of rule 'adam' \(lr, betas, eps, .*weight_decay\), to be set; options"
    )
    assert_refuses(trained, lambda opt: setattr(opt, name, 0.5), AttributeError, message)
    assert_refuses(trained, lambda opt: getattr(opt, name), AttributeError, rf"^{name}: Adam has no such attribute")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("apply_gradients", "opt.step(grads)"),
        ("zero_grad_", "opt.zero_grad()"),
        ("parameters", "opt.params"),
        ("param_groups", "opt.groups"),
        ("learning_rate", "opt.lr"),
        ("beta1", "opt.betas"),
        ("iterations", "opt.step_count"),
        ("step_cuont", "opt.step_count"),
        ("acumulate", "opt.accumulate"),
    ],
)
def test_attributes_of_other_libraries(name, ours):
    with pytest.raises(AttributeError, match=rf"^{name}: Adam has no such attribute; use {re.escape(ours)}$"):
        getattr(adam(), name)
    with pytest.raises(AttributeError, match=rf"^{name}: must be a hyperparameter.*; use {re.escape(ours)}$"):
        setattr(adam(), name, 0.5)


@pytest.mark.parametrize("name", ["_repr_html_", "__array__", "flux"])
def test_attributes_that_resemble_nothing(name):
    assert not hasattr(adam(), name)
    with pytest.raises(AttributeError, match=rf"^{name}: Adam has no such attribute$"):
        getattr(adam(), name)


def test_a_tree_in_the_place_of_grad_scale_is_not_printed_whole():
    params, grads = ({f"layer{k}": np.ones(100) for k in range(100)} for _ in range(2))
    with pytest.raises(TypeError, match=r"^grad_scale: must be a positive finite number, got {.* \.\.\.$") as caught:
        fastopt.Adam().update(params, grads, {"state": params})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("more", [(), (None,), ({},)], ids=["optax", "None", "a state"])
def test_a_step_of_parameters_and_gradients(more):
    message = r"^step: must be given gradients alone, .*; parameters are given to the constructor, or in opt\.update"
    assert_refuses(trained, lambda opt: opt.step(opt.params, tree(9.0), *more), TypeError, message)
    assert_refuses(trained, lambda opt: opt.step(tree(9.0), np.ones(3)), TypeError, message)


HYPERS = [
    ("betas", "betas", (0.9, 1.0), V, rf"^betas\[1\]: {BELOW_ONE}"),
    ("betas number", "betas", 0.9, T, rf"^betas: {PAIR}"),
    ("eps text", "eps", "x", T, rf"^eps: {ZERO_UP}"),
    ("eps_inside", "eps_inside", 1, T, r"^eps_inside: must be True or False, got 1"),
    ("weight_decay", "weight_decay", -1.0, V, rf"^weight_decay: {ZERO_UP}"),
    ("schedule", "weight_decay", lambda step: -1.0, V, r"^at step 2, schedule of weight_decay: must be .*, got -1\.0"),
]


@pytest.mark.parametrize(("name", "wrong", "error", "message"), [row[1:] for row in HYPERS], ids=[r[0] for r in HYPERS])
def test_assigning_hyperparameters(name, wrong, error, message):
    assert_refuses(trained, lambda opt: setattr(opt, name, wrong), error, message)
    assert_refuses(trained, lambda opt: setattr(opt.groups["layer.*"], name, wrong), error, message)


NAMES = r"lr, betas, eps, .*, weight_decay, lr_scale, frozen"
GROUPS = [
    ("no such path", lambda g: g["x"], KeyError, r"groups\['x'\]: must match a parameter; the paths are b, layer\.w"),
    ("number as glob", lambda g: g[None], T, r"^groups: must be given a glob on parameter paths, .* got None"),
    ("beyond the last", lambda g: g[2], IndexError, "index out of range"),
    ("read unknown", lambda g: g["b"].mu, AttributeError, rf"^mu: must be one of {NAMES}"),
    ("set unknown", lambda g: setattr(g["b"], "mu", 1.0), AttributeError, rf"^mu: must be one of {NAMES}"),
    ("del unknown", lambda g: delattr(g["b"], "mu"), AttributeError, rf"^mu: must be one of {NAMES}"),
    ("set paths", lambda g: setattr(g["b"], "paths", ()), AttributeError, rf"^paths: must be one of {NAMES}"),
    ("set option", lambda g: setattr(g["b"], "max_norm", 1.0), AttributeError, r"^max_norm: must be one of"),
    ("lr", lambda g: setattr(g["b"], "lr", -1.0), V, rf"^lr: {ZERO_UP}"),
    ("lr_scale", lambda g: setattr(g["b"], "lr_scale", -1.0), V, rf"^lr_scale: {ZERO_UP}"),
    ("lr_scale nan", lambda g: setattr(g["*"], "lr_scale", math.nan), V, rf"^lr_scale: {ZERO_UP}"),
    ("lr_scale schedule", lambda g: setattr(g["*"], "lr_scale", lambda step: 1.0), T, rf"^lr_scale: {ZERO_UP}"),
    ("frozen", lambda g: setattr(g["b"], "frozen", 1), T, r"^frozen: must be True or False, got 1"),
    (
        "differs",
        lambda g: g["*"].weight_decay,
        AttributeError,
        r"^weight_decay: must be the same .* got \[0\.1, 0\.0\]",
    ),
]


@refused(GROUPS)
def test_groups(wrong, error, message):
    assert_refuses(trained, lambda opt: wrong(opt.groups), error, message)


def test_a_rule_without_lr_has_none_to_scale():
    @rule(no_lr)
    def descent(p, g, h):
        return p - h.lr * g

    opt = fastopt.Optimizer({"w": np.ones(3)}, descent)
    with pytest.raises(TypeError, match=r"^lr_scale: rule 'descent' has no lr to scale"):
        opt.groups["w"].lr_scale = 0.5
    with pytest.raises(TypeError, match=r"^overrides: w: lr_scale: rule 'descent' has no lr to scale"):
        fastopt.Optimizer({"w": np.ones(3)}, descent, overrides={"w": {"lr_scale": 0.5}})


# --- parameters that stay where they are ------------------------------------------------------------------------------

WHOLE = np.ones(16)


def unaligned() -> np.ndarray:
    return misaligned()[:6].reshape(2, 3)


UNUSABLE = [
    ("strided", lambda: np.ones((2, 6))[:, ::2], V, r"must be C-contiguous, got strides \(48, 16\); use np\.ascont"),
    ("reversed", lambda: np.ones((2, 3))[::-1], V, r"must be C-contiguous, got strides \(-24, 8\)"),
    ("fortran", lambda: np.asfortranarray(W), V, r"must be C-contiguous, got strides \(8, 16\)"),
    ("broadcast", lambda: np.broadcast_to(1.0, (2, 3)), V, r"must be C-contiguous, got strides \(0, 0\)"),
    ("read-only", lambda: locked(W), V, r"must be writeable, got a read-only array; use param\.copy\(\)"),
    ("unaligned", unaligned, V, r"must be aligned, got address 0x[0-9a-f]+; use param\.copy\(\)"),
    ("masked", lambda: np.ma.ones((2, 3)), T, r"must be an array without a mask, got a masked array"),
]


@refused(UNUSABLE)
def test_arrays_that_cannot_be_updated_where_they_are(wrong, error, message):
    message = rf"^parameter 'w': {message}"
    params = {"b": np.ones(3), "w": wrong()}
    with pytest.raises(error, match=message):
        fastopt.Adam(params, copy=False)
    opt = fastopt.Adam()
    with pytest.raises(error, match=message):
        opt.update(params, {"b": np.ones(3), "w": W})
    assert (params["b"] == 1.0).all()
    assert opt.update({"b": np.ones(3)}, {"b": np.ones(3)}).step == 1  # it was still without parameters


TOGETHER = [
    ("overlap", lambda: {"b": WHOLE[5:8], "w": WHOLE[:6]}, V, r"^parameters 'b' and 'w': must not overlap in memory"),
    ("same memory", lambda: {"b": WHOLE[:6], "w": WHOLE[:6]}, V, r"^parameters 'b' and 'w': must not overlap in mem"),
    ("inside", lambda: {"b": WHOLE, "c": np.ones(2), "w": WHOLE[3:4]}, V, r"^parameters 'b' and 'w': must not overlap"),
    ("tied", lambda: dict.fromkeys("bw", WHOLE), V, r"^parameters 'b' and 'w': must be two arrays, got one and the sa"),
    ("mixed", lambda: {"b": WHOLE, "w": np.ones(3, np.float32)}, T, r"^parameter 'w': must have dtype float64, got f"),
    ("nothing", dict, V, r"^params: must hold at least one array"),
    ("integers", lambda: {"w": np.ones(3, int)}, T, r"^parameter 'w': .*float32, float64, float16 or bfloat16.*int64"),
]


@refused(TOGETHER)
def test_trees_that_cannot_be_updated_where_they_are(wrong, error, message):
    with pytest.raises(error, match=message):
        fastopt.SGD(wrong(), copy=False)
    with pytest.raises(error, match=message):
        fastopt.SGD().update(wrong(), wrong())


def test_a_dtype_for_arrays_that_stay_where_they_are():
    with pytest.raises(
        TypeError, match=r"^parameter '0': must have dtype float32, got float64; with copy=False nothing"
    ):
        fastopt.pack([W], dtype=np.float32, copy=False)
    for wrong in (1, None, "no"):
        with pytest.raises(TypeError, match=r"^copy: must be True or False"):
            fastopt.Adam([W], copy=wrong)


def of_the_caller() -> dict[str, Any]:
    return {"b": np.ones(3), "w": np.ones((2, 3))}


UPDATES = [
    ("list", lambda: [np.ones(3), W.copy()], V, r"^params: must have .*, got a list instead of a dict with the k"),
    ("missing", lambda: {"b": np.ones(3)}, V, r"^params: must have the structure of the parameters"),
    ("one more", lambda: {**of_the_caller(), "c": W.copy()}, V, r"^params: must have the structure of the parameters"),
    ("None", lambda: None, V, r"^params: must have the structure of the parameters"),
    ("None inside", lambda: {**of_the_caller(), "w": None}, T, r"^parameter 'w': must be a NumPy array, got None"),
    ("None first", lambda: {**of_the_caller(), "b": None}, T, r"^parameter 'b': must be a NumPy array, got None"),
    ("leaf list", lambda: {**of_the_caller(), "b": [1.0] * 3}, T, r"^parameter 'b': must be a NumPy array, got list"),
    ("shape", lambda: {**of_the_caller(), "w": np.ones((3, 2))}, V, r"^parameter 'w': must have shape \(2, 3\), got"),
    (
        "dtype",
        lambda: {**of_the_caller(), "w": W.astype("f4")},
        T,
        r"^parameter 'w': must have dtype float64, got float32",
    ),
    ("overlap", lambda: {"b": WHOLE[5:8], "w": WHOLE[:6].reshape(2, 3)}, V, r"^parameters 'b' and 'w': must not ov"),
    *[
        (name, lambda make=make: {**of_the_caller(), "w": make()}, error, rf"^parameter 'w': {message}")
        for name, make, error, message in UNUSABLE
    ],
]


@refused(UPDATES)
def test_later_updates(wrong, error, message):
    opt, params = fastopt.Adam(), of_the_caller()
    opt.update(params, of_the_caller())
    before = [array.tobytes() for array in (*params.values(), *opt.states["m"].values())]
    with pytest.raises(error, match=message):
        opt.update(wrong(), of_the_caller())
    assert [array.tobytes() for array in (*params.values(), *opt.states["m"].values())] == before
    assert opt.step_count == 1
    assert opt.params["w"] is params["w"]
    assert opt.update(params, of_the_caller()).step == 2


def test_updates_by_gradients_that_lie_in_the_parameters():
    opt, params = fastopt.Adam(), of_the_caller()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^gradient 'b': must not overlap the parameters and states"):
            opt.update(params, params)
        assert opt.step_count == 0
    opt.update(params, of_the_caller())
    moved = of_the_caller()
    with pytest.raises(ValueError, match=r"^gradient 'w': must not overlap the parameters and states"):
        opt.update(moved, {**of_the_caller(), "w": moved["w"]})
    assert opt.update(moved, params).step == 2  # those of before are any other arrays by now


def test_an_optimizer_without_parameters():
    opt = fastopt.Adam(overrides={"b": {"lr": 0.5}})
    for read in (
        lambda: opt.params,
        lambda: opt.grads,
        lambda: opt.flat,
        lambda: opt.states,
        lambda: opt.state_dict(),
        lambda: opt.groups,
        lambda: opt.step(),
        lambda: opt.accumulate({"b": np.ones(3)}),
        lambda: opt.zero_grad(),
    ):
        with pytest.raises(RuntimeError, match=r"^this optimizer has no parameters yet: pass them at construction, or"):
            read()
    assert (opt.step_count, opt.lr) == (0, 1e-3)
    with pytest.raises(ValueError, match=r"^lr: must be"):
        opt.lr = -1.0
    with pytest.raises(ValueError, match=r"^overrides\['b'\]: must match a parameter; the paths are w"):
        opt.update({"w": np.ones(3)}, {"w": np.ones(3)})
    opt.lr = 0.25
    opt.update({"b": np.ones(3), "w": np.ones(3)}, {"b": np.ones(3), "w": np.ones(3)})
    assert (opt.lr, opt.groups["b"].lr, opt.step_count) == (0.25, 0.5, 1)


def test_an_optimizer_that_has_packed_its_parameters_updates_no_others():
    opt = fastopt.SGD({"w": np.ones(3)}, lr=1.0)
    with pytest.raises(RuntimeError, match=r"^update\(\): this optimizer has packed parameters of its own; call step"):
        opt.update({"w": np.ones(3)}, {"w": np.ones(3)})
    assert (opt.params["w"] == 1.0).all()


# --- numbers out of range ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "hyper",
    [{"lr": 1e308, "weight_decay": 1e308}, {"lr": 1e200, "weight_decay": 1e200}, {"weight_decay": 1e308, "lr": 100.0}],
)
def test_a_decoupled_decay_that_is_not_finite(hyper, dtype):
    """1 - lr*weight_decay is -inf: as far out of range as an lr of inf."""
    opt = fastopt.AdamW({"w": np.ones(3, dtype)}, **hyper)
    with pytest.raises(ValueError, match=r"rule 'adamw' at step 1: must be in the range"):
        opt.step({"w": np.zeros(3, dtype)})
    assert (opt.params["w"] == 1.0).all()
    assert opt.step_count == 0


# --- loading ----------------------------------------------------------------------------------------------------------


def donor() -> dict[str, Any]:
    opt = fastopt.Adam(tree(2.0), lr=0.3, overrides={"b": {"weight_decay": 0.2}})
    for _ in range(5):
        opt.step(tree(0.5))
    opt.step({"b": None, "layer": {"w": np.ones((2, 3), np.float32)}})
    return opt.state_dict()


def changed(*keys: Any, to: Any) -> Callable[[], Any]:
    """A saved state with one entry, found by `keys`, set to something else."""

    def make() -> Any:
        state = inner = donor()
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return state

    return make


def without(*keys: Any) -> Callable[[], Any]:
    def make() -> Any:
        state = inner = donor()
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return state

    return make


SCHEDULE = {"schedule": "cosine(...)"}
STATES = [
    *[
        (
            f"a {type(value).__name__}",
            lambda value=value: value,
            T,
            r"^state: must be what state_dict\(\) returned, .*, got ",
        )
        for value in (None, 3, "state", [("format", 1)], {}, {"format": 1})
    ],
    *[
        (f"no {key}", without(key), T, r"^state: must be what state_dict\(\) returned, .*, got ")
        for key in ("format", "rule", "step", "hyper", "state")
    ],
    ("newer format", changed("format", to=2), V, r"^state: format: must be 1 in this version of fastopt, got 2"),
    ("format of text", changed("format", to="1"), V, r"^state: format: must be 1 .*, got '1'"),
    ("another rule", lambda: fastopt.SGD(tree(1.0)).state_dict(), V, r"^state: rule: must be 'adam', .*, got 'sgd'"),
    (
        "another form",
        lambda: fastopt.Adam(tree(1.0), amsgrad=True).state_dict(),
        V,
        r"^state: rule: must be 'adam', .* got 'amsgrad'",
    ),
    *[
        (
            f"step {value!r}",
            changed("step", to=value),
            V if value == -1 else T,
            r"^state: step: must be an int from 0, got ",
        )
        for value in (-1, 1.5, True, "5", None)
    ],
    ("step before missed", changed("step", to=0), V, r"^state: missed\['b'\]: must be at most step=0, got 1"),
    ("missed negative", changed("missed", "b", to=-1), V, r"^state: missed\['b'\]: must be an int from 0, got -1"),
    (
        "missed path",
        changed("missed", "c", to=1),
        V,
        r"^state: missed: must name parameters, got 'c'; the paths are b, layer\.w",
    ),
    ("missed None", changed("missed", to=None), T, r"^state: missed: must be a dict, .*, got NoneType"),
    ("hyper None", changed("hyper", to=None), T, r"^state: hyper: must be a dict, .*, got NoneType"),
    ("hyper lacks", without("hyper", "eps"), V, r"^state: hyper: must hold all hyperparameters, got no eps"),
    ("hyper unknown", changed("hyper", "mu", to=0.9), T, r"^state: hyper: mu: must be a hyperparameter of 'adam'"),
    ("hyper out of range", changed("hyper", "lr", to=-1.0), V, r"^state: hyper: lr: must be .*, got -1\.0"),
    ("hyper of text", changed("hyper", "eps", to="x"), T, r"^state: hyper: eps: must be .*, got 'x'"),
    ("hyper betas", changed("hyper", "betas", to=[0.9]), T, r"^state: hyper: betas: must be .*, got \[0\.9\]"),
    (
        "schedule not here",
        changed("hyper", "lr", to=SCHEDULE),
        V,
        r"^state: hyper: lr: must be a schedule in this .* \(cosine\(\.\.\.\)\), got 0\.1; construct",
    ),
    (
        "overrides path",
        changed("overrides", "c", to={}),
        V,
        r"^state: overrides: must name parameters, got 'c'; the paths are",
    ),
    (
        "overrides unknown",
        changed("overrides", "b", "mu", to=0.9),
        T,
        r"^state: overrides of 'b': mu: must be a hyperparameter of 'adam'",
    ),
    (
        "overrides value",
        changed("overrides", "b", "lr", to=-1.0),
        V,
        r"^state: overrides of 'b': lr: must be .*, got -1\.0",
    ),
    (
        "overrides schedule",
        changed("overrides", "b", "lr", to=SCHEDULE),
        V,
        r"^state: overrides of 'b': lr: must be a sch",
    ),
    ("overrides None", changed("overrides", to=None), T, r"^state: overrides: must be a dict, .*, got NoneType"),
    ("overrides number", changed("overrides", "b", to=3), T, r"^state: overrides of 'b': must be a dict, got int"),
    ("state None", changed("state", to=None), T, r"^state: state: must be a dict, .*, got NoneType"),
    ("state lacks v", without("state", "v"), V, r"^state: v: must hold an array for each of b, layer\.w, got NoneType"),
    ("state v None", changed("state", "v", to=None), V, r"^state: v: must hold an array for each of"),
    ("state lacks path", without("state", "v", "b"), V, r"^state: v: must hold an array for each of b, layer\.w"),
    ("state other path", changed("state", "v", "c", to=np.ones(3)), V, r"^state: v: must hold an array for each of"),
    (
        "state shape",
        changed("state", "v", "layer.w", to=np.ones((3, 2), np.float32)),
        V,
        r"^state: v\['layer\.w'\]: must be float32 \(2, 3\), got float32 \(3, 2\)",
    ),
    (
        "state dtype",
        changed("state", "v", "layer.w", to=np.ones((2, 3))),
        V,
        r"^state: v\['layer\.w'\]: must be float32 .*, got float64",
    ),
    (
        "state big-endian",
        changed("state", "v", "b", to=np.ones(3, ">f4")),
        V,
        r"^state: v\['b'\]: must be float32 \(3,\), got >f4",
    ),
    (
        "state list",
        changed("state", "v", "b", to=[1.0] * 3),
        V,
        r"^state: v\['b'\]: must be float32 \(3,\), got list",
    ),
    (
        "other paths",
        lambda: fastopt.Adam({"b": np.ones(3, np.float32), "w": np.ones((2, 3), np.float32)}).state_dict(),
        V,
        r"^state: m: must hold an array for each of b, layer\.w",
    ),
]


@refused(STATES)
def test_load_state_dict(wrong, error, message):
    assert_refuses(trained, lambda opt: opt.load_state_dict(wrong()), error, message)


def test_loading_a_number_where_a_schedule_is():
    message = r"^state: hyper: lr: must be 0\.3 in this optimizer, .*, got a schedule; construct it with lr=0\.3"
    assert_refuses(lambda: trained(lr=lambda step: 0.1), lambda opt: opt.load_state_dict(donor()), V, message)


def test_loading_a_step_at_which_the_schedule_here_goes_wrong():
    def make() -> fastopt.Optimizer:
        return trained(lr=lambda step: 0.1 if step < 4 else math.nan)

    state = changed("hyper", "lr", to={"schedule": repr(make().groups[0].lr)})
    assert_refuses(make, lambda opt: opt.load_state_dict(state()), V, r"at step 6, schedule of lr: must be .*, got nan")


def test_the_good_state_that_the_bad_ones_are_made_of_loads():
    opt = trained()
    opt.load_state_dict(donor())
    assert (opt.step_count, opt.lr) == (6, 0.3)


# --- writing a rule ---------------------------------------------------------------------------------------------------


class Hyper(NamedTuple):
    lr: float


def prepare(t: int, lr: float = 0.1) -> Hyper:
    return Hyper(lr)


def star(p, g, *rest):
    return p


def keyword(p, g, *, h):
    return p


SIGNATURES = [
    ("no h", lambda p, g: p, r"must have the signature \(p, g, \*states, h\), .*, got \(p, g\)"),
    ("h not last", lambda p, g, h, m: p, r"must have the signature .*, got \(p, g, h, m\)"),
    ("other names", lambda w, dw, h: w, r"must have the signature .*, got \(w, dw, h\)"),
    ("g first", lambda g, p, h: p, r"must have the signature .*, got \(g, p, h\)"),
    ("nothing", lambda: 0, r"must have the signature .*, got \(\)"),
    ("star", star, r"^rule 'star': parameters must be plain positional ones, got \*rest"),
    ("keyword", keyword, r"^rule 'keyword': parameters must be plain positional ones, got h"),
    ("class", Hyper, r"^@rule: must decorate a plain function \(p, g, \*states, h\), got <class"),
    ("number", 3, r"^@rule: must decorate a plain function .*, got 3"),
    ("rule", rules.sgd, r"^@rule: must decorate a plain function .*, got <rule sgd\(p, g, h\)>"),
]


@refused([(name, function, T, message) for name, function, message in SIGNATURES])
def test_signatures_of_rules(wrong, error, message):
    with pytest.raises(error, match=message):
        rule(prepare)(wrong)


def decaying(t: int, lr: float = 0.1, weight_decay: float = 0.0) -> Hyper:
    return Hyper(lr)


def one_state(p, g, m, h):
    return p, m


def declared(**options: Any) -> Callable[[], Any]:
    """The declaration of a rule of one state; of a prepare that takes weight_decay for what needs one."""
    return lambda: rule(prepare if "layerwise" in options else decaying, **options)(one_state)


def in_layers(ratio: Any, apply: Any = one_state, direction: Any = None) -> Callable[[], Any]:
    return lambda: declared(layerwise=fastopt.Layerwise(ratio, apply, direction))()


def by_scale(*arguments: Any) -> Callable[[], Any]:
    return lambda: declared(scaling=fastopt.Scaling(*arguments))()


def transformed(transform: Any) -> Callable[[], Any]:
    return declared(matrixwise=fastopt.Matrixwise(rules.momentum, "m", transform, "lr"))


NAMES = r"must be different names of variables, as \('scale',\)"
AT_DECLARATION = [
    (
        "a callable as initial",
        declared(initial={"m": abs}),
        r"^rule 'one_state': initial\['m'\]: must be a number, 'p' or a hyperparameter \(lr, weight_decay\), "
        r"got <built-in function abs>",
    ),
    ("a list of states", declared(initial=["m"]), r"^rule 'one_state': initial: must be a dict of state .*, got \['m'"),
    (
        "two numbers",
        by_scale(lambda norm_p, norm_g, v, h: (1.0, v), ["v", "u"]),
        r"^Scaling: number: must be a name, a tuple of names, or None, got \['v', 'u'\]$",
    ),
    (
        "scale",
        by_scale(lambda p, g: 1.0),
        r"^Scaling: scale: must have the signature \(norm_p, norm_g, h\), got \(p, g\)$",
    ),
    (
        "scale with a number",
        by_scale(lambda p, g, h: 1.0, "v"),
        r"^Scaling: scale: must have the signature \(norm_p, norm_g, v, h\), got \(p, g, h\)$",
    ),
    ("ratio", in_layers(lambda p: 1.0), r"^Layerwise: ratio: must have the signature \(norm_p, norm_u\), got \(p\)$"),
    ("no ratio", in_layers(None), r"^Layerwise: ratio: must be a function \(norm_p, norm_u\), got None$"),
    (
        "apply",
        in_layers(lambda p, u: 1.0, lambda p, ratio, h: p),
        r"^rule 'one_state': layerwise: apply: must have the signature \(p, m, ratio, h\), got \(p, ratio, h\)$",
    ),
    (
        "direction",
        in_layers(lambda p, u: 1.0, one_state, lambda p, h: p),
        r"^rule 'one_state': layerwise: direction: must have the signature \(p, m, h\), got \(p, h\)$",
    ),
    (
        "transform",
        transformed(lambda u: None),
        r"^rule 'one_state': matrixwise: transform: must have the signature \(array, \*\*hyperparameters\), got \(u\)$",
    ),
    (
        "a function as scaling",
        declared(scaling=abs),
        r"^rule 'one_state': scaling: must be a Scaling or None, got <built",
    ),
    (
        "a class as layerwise",
        declared(layerwise=fastopt.Layerwise),
        r"^rule 'one_state': layerwise: must be a Layerwise or None, got <class",
    ),
    ("a letter as state", declared(extra="m"), rf"^rule 'one_state': extra: {NAMES}, got 'm'$"),
    ("a letter as flag", declared(for_matrices="lr"), rf"^rule 'one_state': for_matrices: {NAMES}, got 'lr'$"),
    (
        "an unknown flag",
        declared(for_matrices=("mu",)),
        r"^rule 'one_state': for_matrices: must name hyperparameters \(lr, weight_decay\), got 'mu'$",
    ),
    (
        "a letter as hyperparameter",
        lambda: fastopt.Matrixwise(rules.momentum, "m", lambda u: None, "lr", matrix_only="lr"),
        rf"^Matrixwise: matrix_only: {NAMES}, got 'lr'$",
    ),
    ("no sums", declared(sums=None), r"^rule 'one_state': sums: must be a Sums or several, got None$"),
    (
        "a term that is none",
        declared(sums=fastopt.Sums({"of_g": 5}, lambda sums, numbers, size, h: 1.0, ("lr",))),
        r"^rule 'one_state': sums: terms\['of_g'\]: must be a function \(p, g, m, h\), got 5$",
    ),
    (
        "a list of terms",
        lambda: fastopt.Sums([one_state], lambda sums, numbers, size, h: 1.0, ("lr",)),
        r"^Sums: terms: must be a dict of name -> term\(p, g, \*states, h\), got \[<function one_state",
    ),
    (
        "no settle",
        lambda: fastopt.Sums({"of_g": one_state}, None, ("lr",)),
        r"^Sums: settle: must be a function \(sums, numbers, size, h\), got None$",
    ),
    (
        "a number of no name",
        by_scale(lambda p, g, v, h: (1.0, v), "no name"),
        r"^Scaling: number: must be a name, a tuple of names, or None, got 'no name'$",
    ),
    (
        "a pair as range",
        declared(domains={"lr": (0, 1)}),
        r"^rule 'one_state': domains\['lr'\]: must be a range, as fastopt\.Interval\(0, 1\), got \(0, 1\)$",
    ),
    (
        "a list of ranges",
        declared(domains=["lr"]),
        r"^rule 'one_state': domains: must be a dict of hyperparameter -> range, got \['lr'\]$",
    ),
    (
        "a class as closed form",
        declared(idle=fastopt.Linear),
        r"^rule 'one_state': idle: must be a closed form, as fastopt\.Linear\(\), or None, got <class",
    ),
    ("no prepare", lambda: rule(None), r"^rule: must be given prepare\(t, \.\.\.\), .*, got None$"),
    ("prepare in C", lambda: rule(max)(one_state), r"^prepare 'max': must be a function of Python, got <built-in"),
    (
        "no parentheses",
        lambda: rule(one_state),
        r"^rule: must be given prepare\(t, \.\.\.\), as in @fastopt\.rule\(prepare\), got the scalar function "
        r"one_state\(p, g, m, h\)",
    ),
]


@refused([(name, wrong, T, message) for name, wrong, message in AT_DECLARATION])
def test_rules_are_refused_when_they_are_declared(wrong, error, message):
    with pytest.raises(error, match=message) as found:
        wrong()
    assert "\n" not in str(found.value)


def test_functions_of_the_right_arity_are_declared():
    declared(initial={"m": np.float32(1)})()
    in_layers(lambda *norms: 1.0, lambda p, m, ratio, h, more=0: p, lambda p, m, h: m)()
    by_scale(max)()  # numba finds out
    transformed(lambda u, lr, weight_decay: None)()


def without_t(lr: float) -> Hyper:
    return Hyper(lr)


def with_star(t: int, **hyper: float) -> Hyper:
    return Hyper(0.1)


def no_lr(t: int, rate: float = 0.1) -> Hyper:
    return Hyper(rate)


def own_decay(t: int, lr: float, weight_decay: float) -> Hyper:
    return Hyper(lr)


PREPARES = [
    ("no t", without_t, {}, r"^prepare of rule 'descent': must take the step number t first"),
    ("nothing", lambda: Hyper(0.1), {}, r"^prepare of rule 'descent': must take the step number t first"),
    ("star", with_star, {}, r"^prepare 'with_star': parameters must be plain positional ones, got \*\*hyper"),
    ("decoupled without lr", no_lr, {"decoupled": True}, r"^rule 'descent': prepare must take lr, .*, got \(t, rate\)"),
    (
        "decoupled with its own",
        own_decay,
        {"decoupled": True},
        r"^rule 'descent': prepare must take lr, and not weight_decay, .*, got \(t, lr, weight_decay\)",
    ),
]


@pytest.mark.parametrize(("function", "options", "message"), [pytest.param(*row[1:], id=row[0]) for row in PREPARES])
def test_signatures_of_prepare(function, options, message):
    def descent(p, g, h):
        return p - h.lr * g

    with pytest.raises(TypeError, match=message):
        rule(function, **options)(descent)


def literal(p, g, h):
    return p - 0.5 * h.lr * g


def literal_state(p, g, m, h):
    return p - h.lr * g, m + 1.0


def hidden_literal(x, h):
    return x * 2.0


def calls_a_literal(p, g, h):
    return p - h.lr * hidden_literal(g, h)


TAU = 0.5


def global_literal(p, g, h):
    return p - TAU * h.lr * g


def branch_literal(p, g, h):
    step = 0.0
    if g > 0.5:
        step = g
    return p - step


def looped_literal(p, g, h):
    for _ in range(2):
        p = p / 3
    return p


def clips(p, g, h):
    return p - h.lr * np.clip(g, p, p)


def clipped(x, h):
    return np.clip(x, h.lr, h.lr)


def calls_what_clips(p, g, h):
    return p - clipped(g, h)


def selects(p, g, h):
    return np.where(g, p, g)


def averages(p, g, h):
    return p - np.median(g)


def of_no_name(p, g, h):
    return p - h.lr * undefined_here(g)  # noqa: F821


def of_no_local_name(p, g, h):
    scaled = h.lr * g
    return scaled - scalde  # noqa: F821


def of_no_module_name(p, g, h):
    return p - np.klip(g, p, p)


def of_no_field(p, g, h):
    return p - h.lrr * g


def of_a_method(p, g, h):
    return p - g.clip(p)


def of_wrong_arity(p, g, h):
    return p - hidden_literal(g, h, h)


def of_text(p, g, h):
    return p + "a"


def of_a_builtin(p, g, h):
    return p - sorted(g)


def of_an_import(p, g, h):
    import math

    return p - math.exp(g)


def wide_state(p, g, m, h):
    return p - h.lr * g, np.float64(m)


def forgets_a_state(p, g, m, v, h):
    return p - h.lr * g, m


def forgets_all_states(p, g, m, h):
    return p - h.lr * g


def one_too_many(p, g, m, h):
    return p - h.lr * g, m, m


def alone_in_a_tuple(p, g, h):
    return (p - h.lr * g,)


def returns_nothing(p, g, h):
    p -= h.lr * g


def endless(p, g, h):
    return endless(p, g, h)


def ping(p, g, h):
    return pong(p, g, h)


def pong(p, g, h):
    return ping(p, g, h)


def fourteen_states(p, g, a, b, c, d, e, i, j, k, l, m, n, o, q, r, h):  # noqa: E741
    return p - h.lr * g, a, b, c, d, e, i, j, k, l, m, n, o, q, r


BODIES = [
    (
        literal,
        r"^rule 'literal' on float32: must return float32, got p as float64; the literal 0\.5 in line \d+ of "
        r"test_bad_input\.py \(`return p - 0\.5 \* h\.lr \* g`\) promotes float32 to float64: compute the constant in",
    ),
    (literal_state, r"must return float32, got m as float64; the literal 1\.0 in line \d+ .*`return p - .* m \+ 1\.0`"),
    (calls_a_literal, r"got p as float64; the literal 2\.0 in line \d+ of test_bad_input\.py \(`return x \* 2\.0`\)"),
    (global_literal, r"got p as float64; the literal TAU = 0\.5 in line \d+ .*`return p - TAU \* h\.lr \* g`"),
    (branch_literal, r"got p as float64; the literal 0\.0 in line \d+ .*`step = 0\.0`"),
    (looped_literal, r"got p as float64; the literal 3 in line \d+ .*`p = p / 3`"),
    (
        wide_state,
        r"^rule 'wide_state' on float32: must return float32, got m as float64; line \d+ of test_bad_input\.py "
        r"\(`return p - h\.lr \* g, np\.float64\(m\)`\) leaves float32$",
    ),
    (selects, r"^rule 'selects' on float32: must return float32, got p as array.*; line \d+ .* leaves float32$"),
    (
        clips,
        r"^rule 'clips' on float32: must call what numba compiles for numbers, got clip\(float32, float32, float32\) "
        r"in line \d+ of test_bad_input\.py \(`return p - h\.lr \* np\.clip\(g, p, p\)`\); write min\(max\(x, low\), "
        r"high\)$",
    ),
    (calls_what_clips, r"got clip\(float32, .*\) in line \d+ .*\(`return np\.clip\(x, h\.lr, h\.lr\)`\); write min"),
    (averages, r"must call what numba compiles .*, got median\(float32\) in line \d+ .*; declare it by fastopt\.Sums"),
    (
        of_no_name,
        r"must use names that are defined, got 'undefined_here' in line \d+ .*`return p - h\.lr \* undefined_h",
    ),
    (of_no_local_name, r"must use names that are defined, got 'scalde' in line \d+ .*`return scaled - scalde"),
    (
        of_no_module_name,
        r"must use names that are defined, got numpy\.klip in line \d+ .*`return p - np\.klip\(g, p, p\)`",
    ),
    (of_no_field, r"must read fields of Hyper \(lr\), got h\.lrr in line \d+ .*; did you mean h\.lr\?$"),
    (
        of_a_method,
        r"must use numbers as numbers, got the attribute \.clip of float32 in line \d+ .*`return p - g\.clip",
    ),
    (
        of_wrong_arity,  # numba 0.60 does not say which function
        r"must call functions with their arguments, \(x, h\), got 3 in line \d+ .*`return p - hidden_l"
        r"|must be compiled by numba, got TypeError: too many positional arguments",
    ),
    (
        of_text,
        r"must call what numba compiles for numbers, got add\(float32, .*\) in line \d+ .*\(`return p \+ \"a\"`\)",
    ),
    (
        of_a_builtin,
        r"^rule 'of_a_builtin' on float32: must be compiled by numba, got AssertionError: .* in line \d+ of t",
    ),
    (
        of_an_import,
        r"^rule 'of_an_import' on float32: must be compiled by numba, got Unsupported\w+: .* in line \d+ of",
    ),
    (forgets_a_state, r"^rule 'forgets_a_state': must return the tuple \(p, m, v\), .*, got a tuple of 2"),
    (forgets_all_states, r"^rule 'forgets_all_states': must return the tuple \(p, m\), as .*, got one value"),
    (
        one_too_many,
        r"^rule 'one_too_many': must return the tuple \(p, m\), as its signature requires, got a tuple of 3",
    ),
    (
        alone_in_a_tuple,
        r"^rule 'alone_in_a_tuple': must return p alone, not in a tuple, as .*, got a tuple of 1",
    ),
    (returns_nothing, r"^rule 'returns_nothing' on .*: must return .*, got p as none; end it with return$"),
    (endless, r"^scalar function 'endless': must not be recursive, got a self-call"),
    (ping, r"^scalar function '(ping|pong)': must not be recursive"),
    (fourteen_states, r"^rule 'fourteen_states': must have at most 13 states, got 14"),
]


@pytest.mark.parametrize(("function", "message"), [pytest.param(*row, id=row[0].__name__) for row in BODIES])
def test_bodies_of_rules(function, message):
    """What only the compiler can see is refused at construction, and by update_ before it writes."""
    made = rule(prepare)(function)
    arrays = [np.ones(5, np.float32) for _ in range(2 + len(made.states))]
    with pytest.raises(TypeError, match=message):
        made.update_(*arrays)
    assert all((array == 1.0).all() for array in arrays)
    with pytest.raises(TypeError, match=message):
        fastopt.Optimizer({"w": np.ones(5, np.float32)}, made)


def test_an_error_that_numba_writes_in_bold_is_read_as_well(monkeypatch):
    """It does so wherever colorama is installed."""
    plain = NumbaError.__str__
    bold = "\x1b[1m\\g<0>\x1b[0m"
    monkeypatch.setattr(NumbaError, "__str__", lambda error: re.sub(r"(?m)^.+$", bold, plain(error)))
    with pytest.raises(TypeError, match=r"must read fields of Hyper \(lr\), got h\.lrr in line \d+ .*mean h\.lr"):
        fastopt.Optimizer({"w": np.ones(3, np.float32)}, rule(prepare)(of_no_field))


def clamps(p, g, h):
    return p - h.lr * min(max(g, p), p)


def test_an_error_of_numba_is_one_line_and_what_it_recommends_works():
    with pytest.raises(TypeError) as caught:
        fastopt.Optimizer({"w": np.ones(3, np.float32)}, rule(prepare)(clips))
    assert "\n" not in str(caught.value)
    assert str(caught.value.__cause__).count("\n") > 20
    opt = fastopt.Optimizer({"w": np.ones(3, np.float32)}, rule(prepare)(clamps), lr=0.5)
    opt.step({"w": np.full(3, 9.0, np.float32)})
    assert (opt.params["w"] == 0.5).all()


def test_an_error_in_a_term_or_in_settle_names_it():
    def term(p, g, h):
        return np.clip(g, p, p)

    def settle(sums, numbers, size, h):
        return sums.q + h.lrr

    for terms, message in (
        ({"q": term}, r"^rule 'descent': sums: terms\['q'\] must call what numba .*`return np\.clip\(g, p, p\)`"),
        (
            {"q": lambda p, g, h: p},
            r"^rule 'descent': sums: settle must read fields of Hyper \(lr\), got h\.lrr in line",
        ),
    ):

        @rule(prepare, sums=fastopt.Sums(terms=terms, settle=settle, results=("lr",)))
        def descent(p, g, h):
            return p - h.lr * g

        with pytest.raises(TypeError, match=message):
            fastopt.Optimizer({"w": np.ones(3, np.float32)}, descent)


def plain_tuple(t: int, lr: float = 0.1) -> Any:
    return (lr,)


def number(t: int, lr: float = 0.1) -> Any:
    return lr


def dictionary(t: int, lr: float = 0.1) -> Any:
    return {"lr": lr}


@pytest.mark.parametrize(("function", "found"), [(plain_tuple, "tuple"), (number, "float"), (dictionary, "dict")])
def test_prepare_must_return_a_named_tuple(function, found):
    @rule(function)
    def descent(p, g, h):
        return p - h.lr * g

    message = rf"^prepare of rule 'descent': must return a NamedTuple, got {found}"
    with pytest.raises(TypeError, match=message):
        descent.update_(np.ones(3), np.ones(3))
    with pytest.raises(TypeError, match=message):
        fastopt.Optimizer([np.ones(3)], descent)


def test_a_hyperparameter_without_a_default_must_be_given():
    def needs(t: int, rate: float) -> Hyper:
        return Hyper(rate)

    @rule(needs)
    def needy(p, g, h):
        return p - h.lr * g

    with pytest.raises(TypeError, match=r"^rate: must be given, rule 'needy' has no default; pass rate="):
        fastopt.Optimizer([np.ones(3)], needy)
    with pytest.raises(TypeError, match=r"^rate: must be given, rule 'needy' has no default"):
        needy.update_(np.ones(3), np.ones(3))


def test_a_rule_keeps_its_hyperparameters_in_its_own_domains():
    def warm(t: int, lr: float = 0.1, heat: float = 0.5) -> Hyper:
        return Hyper(lr * heat)

    @rule(warm, domains={"heat": Interval(0.0, 1.0), "lr": Interval(0.0, 0.2, open=True)})
    def warmed(p, g, h):
        return p - h.lr * g

    with pytest.raises(ValueError, match=r"^heat: must be a number in \[0, 1\], got 2\.0"):
        fastopt.Optimizer([np.ones(3)], warmed, heat=2.0)
    with pytest.raises(ValueError, match=r"^lr: must be a number in \[0, 0\.2\), got 0\.2"):
        fastopt.Optimizer([np.ones(3)], warmed, lr=0.2)


def refusal(action: Callable[[], Any]) -> str | None:
    """The message of the TypeError that `action` raises, or None."""
    try:
        action()
    except TypeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_a_layerwise_rule_of_any_number_of_states_works(count):
    states = [f"s{k}" for k in range(count)]
    source = f"def move({', '.join(['p', *states, 'ratio', 'h'])}):\n    return p - h.lr * ratio\n"
    source += f"def descent({', '.join(['p', 'g', *states, 'h'])}):\n    return {', '.join(['g', *states])}\n"
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    arrays = [np.ones(5) for _ in range(2 + count)]
    layerwise = fastopt.Layerwise(lambda norm_p, norm_u: 2.0, namespace["move"])
    rule(prepare, layerwise=layerwise)(namespace["descent"]).update_(*arrays, lr=0.25)
    assert arrays[0].tolist() == [0.5] * 5


def test_decoupled_decay_of_a_layerwise_rule_works_or_is_refused():
    def move(p, m, ratio, h):
        return p - h.lr * ratio * m

    def descent(p, g, m, h):
        return g, g

    p = np.ones(5)

    def update() -> None:
        layerwise = fastopt.Layerwise(lambda norm_p, norm_u: 2.0, move)
        made = rule(prepare, layerwise=layerwise, decoupled=True)(descent)
        made.update_(p, np.ones(5), np.zeros(5), lr=0.25, weight_decay=1.0)

    message = refusal(update)
    if message is None:
        assert p.tolist() == [0.75 - 0.5] * 5
    else:
        assert "decoupled" in message
        assert p.tolist() == [1.0] * 5


# --- what a user's test run found last --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {"amsgrad": "no"}),
        ("AdamW", {"amsgrad": 1}),
        ("RMSprop", {"centered": "no"}),
        ("SGD", {"momentum": 0.9, "nesterov": "no"}),
    ],
)
def test_a_flag_is_true_or_false(name, options):
    flag = list(options)[-1]
    with pytest.raises(TypeError, match=rf"^{flag}: must be True or False, got "):
        getattr(fastopt, name)({"w": np.ones(3)}, **options)


def test_one_array_under_two_paths():
    shared = np.ones(3)
    with pytest.raises(ValueError, match=r"^parameters 'a' and 'b': must be two arrays, got one and the same \(tied\)"):
        fastopt.pack({"a": shared, "b": shared})


COMPLEX = np.ones(6, complex)
VIEWS = {
    "the same memory": (WHOLE[:], WHOLE[:]),
    "a part": (WHOLE, WHOLE[2:4]),
    "an end": (WHOLE[:4], WHOLE[3:]),
    "its transpose": (WHOLE[:6].reshape(2, 3), WHOLE[:6].reshape(2, 3).T),
    "every other element": (WHOLE[::2], WHOLE[4::4]),
    "backwards": (WHOLE[:5], WHOLE[::-2]),
    "rows and a column": (WHOLE[:6].reshape(2, 3)[::2], WHOLE[:6].reshape(2, 3)[:, 1]),
}
APART = {
    "interleaved": (WHOLE[::2], WHOLE[1::2]),
    "columns": (WHOLE[:6].reshape(2, 3)[:, 0], WHOLE[:6].reshape(2, 3)[:, 2]),
    "halves of complex numbers": (COMPLEX.real, COMPLEX.imag),
    "neighbours": (WHOLE[:3], WHOLE[3:]),
    "nothing": (WHOLE, WHOLE[2:2]),
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_two_views_of_one_array_are_refused_by_address(views):
    one, other = views
    tied = {"a": one, "c": np.ones(2), "layer": [other]}
    message = (
        r"^parameters 'a' and 'layer\.0': must not overlap in memory .*; keep one of them in the tree, or pass a copy"
    )
    for make in (fastopt.pack, fastopt.Adam, lambda tree: fastopt.pack(tree, dtype=np.float32)):
        with pytest.raises(ValueError, match=message):
            make(tied)
    opt = fastopt.SGD({"a": np.ones(3)})
    with pytest.raises(ValueError, match=r"^parameters 'b' and 'c': must not overlap in memory"):
        opt.add({"b": one, "c": other})
    assert opt.flat.paths == ("a",)


@pytest.mark.parametrize("views", APART.values(), ids=APART)
def test_views_that_share_no_element_are_not_refused(views):
    one, other = views
    flat = fastopt.pack({"a": one, "b": other})
    assert [array.tolist() for array in flat.arrays] == [one.tolist(), other.tolist()]
    opt = fastopt.SGD({"a": np.ones(3)})
    opt.add({"b": one, "c": other})


@pytest.mark.parametrize("copies", [True, False])
def test_what_is_added_must_not_lie_in_what_is_there(copies):
    own = {"a": np.ones((4, 4)), "b": np.ones(3)}
    opt = fastopt.Adam(own, copy=copies)
    for more in (opt.params["a"], opt.params["a"][1:3], opt.params["b"][:2]):
        path = "b" if more.ndim == 1 else "a"
        with pytest.raises(ValueError, match=rf"^parameters '{path}' and 'c': must not overlap in memory"):
            opt.add({"c": more})
    if not copies:
        for more in (opt.states["m"]["a"], opt.grads["b"]):
            with pytest.raises(
                ValueError, match=r"^parameters 'c' and \"the optimizer's own buffer \d\": must not overl"
            ):
                opt.add({"c": more})
    assert opt.flat.paths == ("a", "b")
    opt.add({"c": own["a"] if copies else np.ones(2)})  # packed parameters are copies


def test_a_gradient_in_the_gaps_of_parameters_is_not_refused():
    whole = np.zeros((5, 4))
    whole[1::2] = 1.0
    opt = fastopt.SGD({"a": whole[0:1], "b": whole[2:3], "c": np.zeros((2, 4))}, lr=1.0, copy=False)
    opt.step({"a": None, "b": None, "c": whole[1::2]})
    assert (opt.params["c"] == -1.0).all()
    opt.accumulate({"a": None, "b": None, "c": whole[1::2]})
    opt.zero_grad()
    assert opt.flat.check_grads({"a": None, "b": None, "c": whole[1::2]})[2].tolist() == [[1.0] * 4] * 2
    for grad in (whole[:2], whole[2:4], whole[::3]):
        for take in (opt.step, opt.accumulate, opt.flat.check_grads):
            with pytest.raises(ValueError, match=r"^gradient 'c': must not overlap"):
                take({"a": None, "b": None, "c": grad})


@pytest.mark.parametrize(("v", "named"), [("p", "p and v"), ("g", "g and v"), ("m", "m and v")])
def test_a_number_of_a_rule_is_no_part_of_its_arrays(v, named):
    arrays = dict(zip("pgm", np.ones((3, 4)), strict=True))
    arrays = {name: array.copy() for name, array in arrays.items()}
    with pytest.raises(ValueError, match=rf"^{named}: must not overlap in memory"):
        rules.novograd.update_(*arrays.values(), arrays[v][:1])
    assert all((array == 1.0).all() for array in arrays.values())


def test_a_dtype_that_is_none():
    with pytest.raises(TypeError, match=r"^dtype: must be float32, float64, bfloat16 or float16, got 'nonsense'"):
        fastopt.pack({"a": np.ones(3)}, dtype="nonsense")


def test_true_is_no_grad_scale():
    opt = fastopt.SGD({"w": np.ones(3)})
    with pytest.raises(TypeError, match=r"^grad_scale: must be a positive finite number, got True"):
        opt.step(grad_scale=True)
    assert opt.step_count == 0


def test_a_literal_in_apply_of_a_layerwise_rule():
    def apply(p, m, ratio, h):
        return p - 0.5 * m

    @fastopt.rule(prepare, layerwise=fastopt.Layerwise(lambda norm_p, norm_u: 1.0, apply))
    def literal(p, g, m, h):
        return g, g

    with pytest.raises(TypeError, match=r"got p as float64; the literal 0\.5 in line \d+ .*`return p - 0\.5 \* m`"):
        fastopt.Optimizer({"w": np.ones(3, np.float32)}, literal)
