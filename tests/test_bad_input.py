"""Every refusal: the error names what was wrong and says what was expected, and nothing has changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt
from fastopt import rules
from fastopt.rule import Interval, rule

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
    (f"{name} {kind}", {name: np.ones(N, kind)}, T, rf"^{name}: expected float32 or float64.*{np.dtype(kind).str!r}")
    for name in ("p", "g", "v")
    for kind in (np.int64, np.float16, np.longdouble, np.complex64, np.bool_, object, ">f8", ">f4")
]
NOT_ARRAYS = [
    (f"{name} {type(value).__name__}", {name: value}, T, rf"^{name}: expected a 1-D NumPy array, found ")
    for name in ("p", "g", "m")
    for value in ([1.0] * N, None, 1.0, memoryview(np.ones(N)), np.float64(1.0))
]
BARE = [
    *TYPES,
    *NOT_ARRAYS,
    ("p short", {"p": np.ones(N - 1)}, V, r"^g: expected 63 elements as in p, found 64"),
    ("g short", {"g": np.ones(N - 1)}, V, r"^g: expected 64 elements as in p, found 63"),
    ("m long", {"m": np.ones(N + 1)}, V, r"^m: expected 64 elements as in p, found 65"),
    ("v empty", {"v": np.ones(0)}, V, r"^v: expected 64 elements as in p, found 0"),
    ("p 2-D", {"p": np.ones((8, 8))}, V, r"^p: expected a 1-D array, found shape \(8, 8\).*reshape\(-1\)"),
    ("g 2-D", {"g": np.ones((8, 8))}, V, r"^g: expected a 1-D array, found shape \(8, 8\)"),
    ("g one row", {"g": np.ones((1, N))}, V, r"^g: expected a 1-D array, found shape \(1, 64\)"),
    ("m 0-d", {"m": np.ones(())}, V, r"^m: expected a 1-D array, found shape \(\)"),
    ("p strided", {"p": np.ones(2 * N)[::2]}, V, r"^p: expected a contiguous array, found strides \(16,\)"),
    ("g reversed", {"g": np.ones(N)[::-1]}, V, r"^g: expected a contiguous array, found strides \(-8,\)"),
    ("g broadcast", {"g": np.broadcast_to(1.0, N)}, V, r"^g: expected a contiguous .* strides \(0,\)"),
    ("v column", {"v": np.ones((N, 2))[:, 0]}, V, r"^v: expected a contiguous array, found strides"),
    ("p locked", {"p": locked(np.ones(N))}, V, r"^p: is read-only"),
    ("v locked", {"v": locked(np.ones(N))}, V, r"^v: is read-only"),
    ("p misaligned", {"p": misaligned()}, V, r"^p: expected an aligned array.*multiple of 8 bytes"),
    ("g misaligned", {"g": misaligned()}, V, r"^g: expected an aligned array"),
    ("g of another dtype", {"g": np.ones(N, np.float32)}, T, r"^g: expected dtype float64 as .* p, found float32"),
    ("v of another dtype", {"v": np.ones(N, np.float32)}, T, r"^v: expected dtype float64 as .* p, found float32"),
    ("states overlap", overlapping(), V, r"^m and v overlap in memory"),
    ("lr negative", {"lr": -0.1}, V, r"^lr=-0\.1: expected a number in \[0, inf\)"),
    ("lr nan", {"lr": math.nan}, V, r"^lr=nan: expected a number in \[0, inf\)"),
    ("lr a schedule", {"lr": lambda t: 0.1}, T, r"^lr=<function.*expected a number.*found function"),
    ("betas one", {"betas": (0.9, 1.0)}, V, r"^betas\[1\]=1\.0: expected a number in \[0, 1\)"),
    ("unknown hyper", {"learning_rate": 0.1}, T, r"^learning_rate=0\.1: rule 'adam' has no such .* it has lr, "),
    *[
        (f"t {t!r}", {"t": t}, V, r"^t=.*: expected the number of this update, an int from 1")
        for t in (0, -1, True, 1.5, 1.0, math.nan, "1", None)
    ],
    *[
        (f"grad_scale {scale!r}", {"grad_scale": scale}, V, r"^grad_scale=.*: expected a positive finite number")
        for scale in (0.0, 0, -1.0, math.nan, math.inf, -math.inf)
    ],
    *[
        (f"grad_scale {scale!r}", {"grad_scale": scale}, T, r"^grad_scale=.*: expected a positive finite number")
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
    with pytest.raises(ValueError, match=rf"^({one} and {other}|{other} and {one}) overlap in memory"):
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
    with pytest.raises(TypeError, match=rf"^rule 'adam' has 2 states \(m, v\); found {count} arrays after p and g"):
        rules.adam.update_(p, g, *(np.zeros(N) for _ in range(count)))
    with pytest.raises(TypeError, match=r"^rule 'sgd' has 0 states \(none\); found 2 arrays after p and g"):
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
        (f"leaf {type(value).__name__}", leaf(value), T, r"^parameter 'layer\.0\.bad': expected a NumPy array, found ")
        for value in (1.0, "w", object(), np.float64(1.0), memoryview(W), (x for x in ()))
    ],
    *[
        (
            f"leaf {kind}",
            leaf(np.ones(3, kind)),
            T,
            rf"^parameter 'layer\.0\.bad': expected float32 or .*, found dtype '{re.escape(np.dtype(kind).str)}'",
        )
        for kind in (
            np.int32,
            np.uint8,
            np.bool_,
            np.float16,
            np.longdouble,
            np.complex128,
            object,
            "U3",
            ">f4",
            ">f8",
            "M8[s]",
        )
    ],
    ("mixed", lambda: adam({"a": W, "b": {"c": np.ones(3, np.float32)}}), T, r"^parameter 'b\.c' is float32 but"),
    ("no arrays", lambda: adam({}), V, r"^params: the tree holds no arrays"),
    ("only None", lambda: adam({"a": None, "b": []}), V, r"^params: the tree holds no arrays"),
    ("None", lambda: fastopt.Adam(None), V, r"^params: the tree holds no arrays"),
    ("one path twice", lambda: adam({"a.b": W, "a": {"b": W}}), V, r"^parameter 'a\.b': two parameters"),
    ("one path by type", lambda: adam([{1: W}, {"1": W, 1: W}]), V, r"^parameter '1\.1': two parameters"),
    ("dtype int", lambda: fastopt.pack({"w": W}, dtype=np.int32), T, r"^dtype=.*: expected float32 or float64"),
    ("dtype half", lambda: fastopt.pack({"w": W}, dtype="float16"), T, r"^dtype='float16': expected float32 or"),
    ("dtype big-endian", lambda: fastopt.pack({"w": W}, dtype=">f4"), T, r"^dtype='>f4': expected float32 or"),
    ("dtype of ints", lambda: fastopt.pack([np.ones(2, int)], dtype="f4"), T, r"^parameter '0': expected float32"),
    ("dtype of complex", lambda: fastopt.pack([1j * W], dtype="f4"), T, r"^parameter '0': expected float32"),
    ("backend unknown", lambda: adam(backend="gpu"), V, r"^backend='gpu': expected one of 'cpu', 'cuda'"),
    ("backend of a wrong type", lambda: adam(backend=3), V, r"^backend=3: expected one of"),
    ("backend cuda", lambda: adam(backend="cuda"), RuntimeError, r"^backend='cuda': .*use backend='cpu'"),
    ("backend of a pack", lambda: adam(fastopt.pack([W]), backend="cuda"), V, r"^backend='cuda': .*packed for"),
]

ZERO_UP = r"expected a number in \[0, inf\)"
BELOW_ONE = r"expected a number in \[0, 1\)"
UP_TO_ONE = r"expected a number in \[0, 1\]"
PAIR = r"expected 2 numbers, each in \[0, 1\)"
NUMBERS = [
    *[
        (f"{name} {value}", lambda name=name, value=value: adam(**{name: value}), V, rf"^{name}={value}: {ZERO_UP}")
        for name in ("lr", "eps", "weight_decay")
        for value in (-1e-9, -1, math.nan, math.inf, -math.inf)
    ],
    *[
        (
            f"{name} {value!r}",
            lambda name=name, value=value: adam(**{name: value}),
            T,
            rf"^{name}=.*: {ZERO_UP}, found ",
        )
        for name in ("lr", "eps", "weight_decay")
        for value in ("x", None, True, np.True_, [0.1], 1j, np.array(0.1))
    ],
    ("lr beyond floats", lambda: adam(lr=10**400), V, r"^lr=1000"),
    ("betas one", lambda: adam(betas=(0.9, 1.0)), V, rf"^betas\[1\]=1\.0: {BELOW_ONE}"),
    ("betas negative", lambda: adam(betas=(-0.1, 0.9)), V, rf"^betas\[0\]=-0\.1: {BELOW_ONE}"),
    ("betas nan", lambda: adam(betas=(math.nan, 0.9)), V, rf"^betas\[0\]=nan: {BELOW_ONE}"),
    ("betas text", lambda: adam(betas=("a", 0.9)), T, rf"^betas\[0\]='a': {BELOW_ONE}"),
    ("betas bool", lambda: adam(betas=(False, 0.9)), T, rf"^betas\[0\]=False: {BELOW_ONE}"),
    ("betas short", lambda: adam(betas=(0.9,)), T, rf"^betas=\(0\.9,\): {PAIR}"),
    ("betas long", lambda: adam(betas=(0.9, 0.9, 0.9)), T, rf"^betas=.*: {PAIR}"),
    ("betas number", lambda: adam(betas=0.9), T, rf"^betas=0\.9: {PAIR}"),
    ("betas two letters", lambda: adam(betas="ab"), T, rf"^betas='ab': {PAIR}"),
    ("betas set", lambda: adam(betas={0.9, 0.5}), T, rf"^betas=.*: {PAIR}"),
    ("eps_inside number", lambda: adam(eps_inside=1), T, r"^eps_inside=1: expected True or False"),
    ("bias_correction text", lambda: adam(bias_correction="no"), T, r"^bias_correction='no': expected True or False"),
    ("rho one", lambda: fastopt.Adadelta([W], rho=1.0), V, rf"^rho=1\.0: {BELOW_ONE}"),
    ("alpha one", lambda: fastopt.RMSprop([W], alpha=1.0), V, rf"^alpha=1\.0: {BELOW_ONE}"),
    ("lr_decay", lambda: fastopt.Adagrad([W], lr_decay=-1.0), V, rf"^lr_decay=-1\.0: {ZERO_UP}"),
    ("momentum high", lambda: fastopt.SGD([W], momentum=1.1), V, rf"^momentum=1\.1: {UP_TO_ONE}"),
    ("momentum negative", lambda: fastopt.Nesterov([W], momentum=-0.1), V, rf"^momentum=-0\.1: {UP_TO_ONE}"),
    ("momentum nan", lambda: fastopt.RMSprop([W], momentum=math.nan), V, rf"^momentum=nan: {UP_TO_ONE}"),
    ("dampening", lambda: fastopt.SGD([W], momentum=0.9, dampening=2.0), V, rf"^dampening=2\.0: {UP_TO_ONE}"),
    ("form", lambda: fastopt.Momentum([W], form="heavy"), V, r"^form='heavy': expected one of 'heavy_ball',"),
    ("form none", lambda: fastopt.Momentum([W], form=None), V, r"^form=None: expected one of 'heavy_ball'"),
    ("nesterov form", lambda: fastopt.Nesterov([W], form="torch"), V, r"^form='torch': expected one of 'ref"),
    ("nesterov alone", lambda: fastopt.SGD([W], nesterov=True), V, r"^nesterov=True needs momentum > 0"),
    (
        "nesterov with dampening",
        lambda: fastopt.SGD([W], nesterov=True, momentum=0.9, dampening=0.1),
        V,
        r"^nesterov=True needs .* dampening = 0; found momentum=0\.9, dampening=0\.1",
    ),
    (
        "unknown",
        lambda: adam(learning_rate=0.1),
        T,
        r"^learning_rate=0\.1: rule 'adam' has no such hyperparameter; it has lr",
    ),
    (
        "of another rule",
        lambda: fastopt.Optimizer([W], rules.sgd, momentum=0.9),
        T,
        r"^momentum=0\.9: rule 'sgd' has no",
    ),
    ("rule a class", lambda: fastopt.Optimizer([W], fastopt.Adam), T, r"^rule: expected a Rule, made by @fast"),
    ("rule a function", lambda: fastopt.Optimizer([W], lambda p, g, h: p), T, r"^rule: expected a Rule.* function"),
    ("rule a name", lambda: fastopt.Optimizer([W], "adam"), T, r"^rule: expected a Rule.*found str"),
]

SCHEDULES = [
    ("nan at 0", lambda: adam(lr=lambda t: math.nan), V, rf"^at step 0, schedule of lr=nan: {ZERO_UP}"),
    ("negative at 0", lambda: adam(lr=lambda t: t - 1.0), V, rf"^at step 0, schedule of lr=-1\.0: {ZERO_UP}"),
    ("None at 0", lambda: adam(lr=lambda t: None), T, rf"^at step 0, schedule of lr=None: {ZERO_UP}"),
    ("betas at 0", lambda: adam(betas=lambda t: 0.9), T, rf"^at step 0, schedule of betas=0\.9: {PAIR}"),
    ("in an override", lambda: adam(overrides={"w": {"lr": lambda t: -1.0}}), V, r"^overrides: w: at step 0, sched"),
]

OVERRIDES = [
    (
        "unknown key",
        {"w": {"learning_rate": 0.1}},
        T,
        r"^overrides: w: learning_rate: 'adam' has no such .*; it has lr,",
    ),
    ("matches nothing", {"*.bias": {"lr": 0.1}}, V, r"^overrides\['\*\.bias'\] matches no .*; the paths are b, w"),
    ("other case", {"W": {"lr": 0.1}}, V, r"^overrides\['W'\] matches no parameter"),
    ("out of range", {"w": {"lr": -1.0}}, V, r"^overrides: w: lr=-1\.0: expected a number in \[0, inf\)"),
    ("of a wrong type", {"w": {"lr": "x"}}, T, r"^overrides: w: lr='x': expected a number"),
    ("second glob", {"*": {}, "b": {"eps": math.inf}}, V, r"^overrides: b: eps=inf: expected a number"),
    ("betas", {"b": {"betas": (0.9, 1.0)}}, V, r"^overrides: b: betas\[1\]=1\.0: expected"),
    ("number under a glob", {"w": 0.1}, T, r"^overrides\['w'\]: expected a dict of hyperparameters"),
    ("glob no text", {3: {"lr": 0.1}}, T, r"^overrides\[3\]: expected a dict of hyperparameters under a glob"),
    ("list", [("w", {"lr": 0.1})], T, r"^overrides: expected a dict of glob -> hyperparameters, found list"),
    ("text", "w", T, r"^overrides: expected a dict of glob -> hyperparameters, found str"),
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
    with pytest.raises(ValueError, match=r"^lr=-1\.0"):
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


def half_of_the_buffer(opt: fastopt.Optimizer) -> Any:
    return put(opt.flat.grad[:6].reshape(2, 3))


GRADIENTS = [
    ("list", lambda opt: [np.ones(3, np.float32)], V, r"^grads: not the structure of the parameters \(b, layer\.w\)"),
    ("bare array", lambda opt: np.ones(9, np.float32), V, r"^grads: not the structure of the parameters"),
    ("empty", lambda opt: {}, V, r"^grads: not the structure of the parameters"),
    ("missing key", lambda opt: {"b": np.ones(3, np.float32)}, V, r"^grads: not the structure"),
    ("missing deep key", lambda opt: {**tree(9.0), "layer": {}}, V, r"^grads: not the structure"),
    ("one more key", lambda opt: {**tree(9.0), "c": np.ones(3, np.float32)}, V, r"^grads: not the structure"),
    ("an object", lambda opt: object(), V, r"^grads: not the structure"),
    ("a number", lambda opt: 1.0, V, r"^grads: not the structure"),
    *[
        (
            f"leaf {type(value).__name__}",
            lambda opt, value=value: put(value),
            T,
            r"^gradient 'layer\.w': expected a NumPy array or None, found ",
        )
        for value in (1.0, [[1.0] * 3] * 2, "w", np.float32(1.0), {"w": W}, memoryview(W))
    ],
    *[
        (
            f"shape {shape}",
            lambda opt, shape=shape: put(np.ones(shape, np.float32)),
            V,
            r"^gradient 'layer\.w': expected shape \(2, 3\) as the parameter's, found \(",
        )
        for shape in ((3, 2), (6,), (1, 3), (2, 3, 1), (), (0,))
    ],
    *[
        (
            f"dtype {dtype}",
            lambda opt, dtype=dtype: put(np.ones((2, 3), dtype)),
            T,
            rf"^gradient 'layer\.w': expected dtype '<f4' as .*, found {np.dtype(dtype).str!r}; use grad\.astype",
        )
        for dtype in (np.float64, np.float16, np.int32, np.complex64, object, ">f4")
    ],
    ("parameter", lambda opt: put(opt.params["layer"]["w"]), V, r"^gradient 'layer\.w' overlaps the parameters"),
    ("parameters", lambda opt: opt.params, V, r"^gradient 'b' overlaps the parameters"),
    (
        "part of the parameters",
        lambda opt: put(opt.flat.data[:6].reshape(2, 3)),
        V,
        r"^gradient 'layer\.w' overlaps the param",
    ),
    ("elsewhere in grads", half_of_the_buffer, V, r"^gradient 'layer\.w' overlaps the gradient buffer in another"),
    (
        "transposed grads",
        lambda opt: put(opt.grads["layer"]["w"][::-1]),
        V,
        r"^gradient 'layer\.w' overlaps the gradient buffer",
    ),
]


@refused(GRADIENTS)
def test_gradients(wrong, error, message):
    assert_refuses(trained, lambda opt: opt.step(wrong(opt)), error, message)


SCALES = [
    (repr(scale), scale, error, r"^grad_scale=.*: expected a positive finite number")
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
    ("nan", math.nan, V, rf"^at step 2, schedule of lr=nan: {ZERO_UP}"),
    ("negative", -1.0, V, rf"^at step 2, schedule of lr=-1\.0: {ZERO_UP}"),
    ("infinite", math.inf, V, rf"^at step 2, schedule of lr=inf: {ZERO_UP}"),
    ("None", None, T, rf"^at step 2, schedule of lr=None: {ZERO_UP}"),
    ("beyond float32", 1e40, V, r"^hyperparameters of rule 'adam' at step \d leave the range of float32"),
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
        ("negative", -1.0, V, rf"^lr=-1\.0: {ZERO_UP}"),
        ("nan", math.nan, V, rf"^lr=nan: {ZERO_UP}"),
        ("text", "0.1", T, rf"^lr='0\.1': {ZERO_UP}"),
        ("bool", True, T, rf"^lr=True: {ZERO_UP}"),
        ("schedule", lambda step: math.nan, V, r"^at step 2, schedule of lr=nan"),
        ("bad at this step", lambda step: 0.1 if step == 0 else math.nan, V, r"^at step 2, schedule of lr=nan"),
    ]
)
def test_assigning_lr(wrong, error, message):
    assert_refuses(trained, lambda opt: setattr(opt, "lr", wrong), error, message)


@pytest.mark.parametrize("name", ["step_count", "params", "grads", "states"])
def test_what_cannot_be_assigned(name):
    assert_refuses(trained, lambda opt: setattr(opt, name, 3), AttributeError, name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "hyper",
    [{"lr": 1e308, "weight_decay": 1e308}, {"lr": 1e200, "weight_decay": 1e200}, {"weight_decay": 1e308, "lr": 100.0}],
)
def test_a_decoupled_decay_that_is_not_finite(hyper, dtype):
    """1 - lr*weight_decay is -inf: as far out of range as an lr of inf."""
    opt = fastopt.AdamW({"w": np.ones(3, dtype)}, **hyper)
    with pytest.raises(ValueError, match=r"rule 'adamw' at step 1 leave the range"):
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
        (f"a {type(value).__name__}", lambda value=value: value, T, r"^state: expected what state_dict\(\) returned")
        for value in (None, 3, "state", [("format", 1)], {}, {"format": 1})
    ],
    *[
        (f"no {key}", without(key), T, r"^state: expected what state_dict\(\) returned")
        for key in ("format", "rule", "step", "hyper", "state")
    ],
    ("newer format", changed("format", to=2), V, r"^state: format 2; this version of fastopt reads format 1"),
    ("format of text", changed("format", to="1"), V, r"^state: format '1'"),
    ("another rule", lambda: fastopt.SGD(tree(1.0)).state_dict(), V, r"^state: of rule 'sgd', but .* rule 'adam'"),
    ("another form", lambda: fastopt.Adam(tree(1.0), amsgrad=True).state_dict(), V, r"^state: of rule 'amsgrad'"),
    *[
        (f"step {value!r}", changed("step", to=value), V, r"^state: step is .*; expected an int from 0")
        for value in (-1, 1.5, True, "5", None)
    ],
    ("step before missed", changed("step", to=0), V, r"^state: missed\['b'\] is 1, more than the 0 steps made"),
    ("missed negative", changed("missed", "b", to=-1), V, r"^state: missed\['b'\] is -1; expected an int from 0"),
    ("missed path", changed("missed", "c", to=1), V, r"^state: missed names 'c'; the paths are b, layer\.w"),
    ("missed None", changed("missed", to=None), (T, V), r"^state: .*missed"),
    ("hyper None", changed("hyper", to=None), (T, V), r"^state: .*hyper"),
    ("hyper lacks", without("hyper", "eps"), V, r"^state: hyper lacks eps"),
    ("hyper unknown", changed("hyper", "mu", to=0.9), T, r"^state: hyper: mu: 'adam' has no such hyperparameter"),
    ("hyper out of range", changed("hyper", "lr", to=-1.0), V, r"^state: hyper: lr=-1\.0: expected"),
    ("hyper of text", changed("hyper", "eps", to="x"), T, r"^state: hyper: eps='x': expected"),
    ("hyper betas", changed("hyper", "betas", to=[0.9]), T, r"^state: hyper: betas=\[0\.9\]: expected"),
    (
        "schedule not here",
        changed("hyper", "lr", to=SCHEDULE),
        V,
        r"^state: hyper: lr was the schedule cosine\(\.\.\.\); give lr= a",
    ),
    ("overrides path", changed("overrides", "c", to={}), V, r"^state: overrides names 'c'; the paths are"),
    ("overrides unknown", changed("overrides", "b", "mu", to=0.9), T, r"^state: overrides of 'b': mu: 'adam' has"),
    ("overrides value", changed("overrides", "b", "lr", to=-1.0), V, r"^state: overrides of 'b': lr=-1\.0"),
    ("overrides schedule", changed("overrides", "b", "lr", to=SCHEDULE), V, r"^state: overrides of 'b': lr was the"),
    ("overrides None", changed("overrides", to=None), (T, V), r"^state: .*overrides"),
    ("overrides number", changed("overrides", "b", to=3), (T, V), r"^state: .*overrides"),
    ("state None", changed("state", to=None), (T, V), r"^state: .*'?state|^state: 'm'"),
    ("state lacks v", without("state", "v"), V, r"^state: 'v' must hold an array for each of b, layer\.w"),
    ("state v None", changed("state", "v", to=None), (T, V), r"^state: 'v' must hold an array for each of"),
    ("state lacks path", without("state", "v", "b"), V, r"^state: 'v' must hold an array for each of b, layer\.w"),
    ("state other path", changed("state", "v", "c", to=np.ones(3)), V, r"^state: 'v' must hold an array for each of"),
    (
        "state shape",
        changed("state", "v", "layer.w", to=np.ones((3, 2), np.float32)),
        V,
        r"^state: v\['layer\.w'\]: expected float32 \(2, 3\), found float32 \(3, 2\)",
    ),
    (
        "state dtype",
        changed("state", "v", "layer.w", to=np.ones((2, 3))),
        V,
        r"^state: v\['layer\.w'\]: expected float32 .*, found float64",
    ),
    (
        "state big-endian",
        changed("state", "v", "b", to=np.ones(3, ">f4")),
        V,
        r"^state: v\['b'\]: expected float32 \(3,\), found >f4",
    ),
    (
        "state list",
        changed("state", "v", "b", to=[1.0] * 3),
        V,
        r"^state: v\['b'\]: expected float32 \(3,\), found list",
    ),
    (
        "other paths",
        lambda: fastopt.Adam({"b": np.ones(3, np.float32), "w": np.ones((2, 3), np.float32)}).state_dict(),
        V,
        r"^state: 'm' must hold an array for each of b, layer\.w",
    ),
]


@refused(STATES)
def test_load_state_dict(wrong, error, message):
    assert_refuses(trained, lambda opt: opt.load_state_dict(wrong()), error, message)


def test_loading_a_number_where_a_schedule_is():
    message = r"^state: hyper: lr was 0\.3, but is a schedule here; construct the optimizer with lr=0\.3"
    assert_refuses(lambda: trained(lr=lambda step: 0.1), lambda opt: opt.load_state_dict(donor()), V, message)


def test_loading_a_step_at_which_the_schedule_here_goes_wrong():
    def make() -> fastopt.Optimizer:
        return trained(lr=lambda step: 0.1 if step < 4 else math.nan)

    state = changed("hyper", "lr", to=SCHEDULE)
    assert_refuses(make, lambda opt: opt.load_state_dict(state()), V, r"at step 6, schedule of lr=nan")


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
    ("no h", lambda p, g: p, r"has the signature \(p, g\): expected \(p, g, \*states, h\)"),
    ("h not last", lambda p, g, h, m: p, r"has the signature \(p, g, h, m\): expected"),
    ("other names", lambda w, dw, h: w, r"has the signature \(w, dw, h\): expected"),
    ("g first", lambda g, p, h: p, r"has the signature \(g, p, h\): expected"),
    ("nothing", lambda: 0, r"has the signature \(\): expected"),
    ("star", star, r"^rule 'star': \*rest is not a plain positional parameter"),
    ("keyword", keyword, r"^rule 'keyword': h is not a plain positional parameter"),
    ("class", Hyper, r"^@rule: expected a plain function \(p, g, \*states, h\), found <class"),
    ("number", 3, r"^@rule: expected a plain function .*, found 3"),
    ("rule", rules.sgd, r"^@rule: expected a plain function .*, found <rule sgd\(p, g, h\)>"),
]


@refused([(name, function, T, message) for name, function, message in SIGNATURES])
def test_signatures_of_rules(wrong, error, message):
    with pytest.raises(error, match=message):
        rule(prepare)(wrong)


def without_t(lr: float) -> Hyper:
    return Hyper(lr)


def with_star(t: int, **hyper: float) -> Hyper:
    return Hyper(0.1)


def no_lr(t: int, rate: float = 0.1) -> Hyper:
    return Hyper(rate)


def own_decay(t: int, lr: float, weight_decay: float) -> Hyper:
    return Hyper(lr)


PREPARES = [
    ("no t", without_t, {}, r"^prepare of rule 'descent' must take the step number t first"),
    ("nothing", lambda: Hyper(0.1), {}, r"^prepare of rule 'descent' must take the step number t first"),
    ("star", with_star, {}, r"^prepare 'with_star': \*\*hyper.* is not a plain positional parameter"),
    ("decoupled without lr", no_lr, {"decoupled": True}, r"^rule 'descent': decoupled=True needs `lr`"),
    (
        "decoupled with its own",
        own_decay,
        {"decoupled": True},
        r"^rule 'descent': decoupled=True needs `lr`, and no `weight_decay`",
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


def five_states(p, g, a, b, c, d, e, h):
    return p - h.lr * g, a, b, c, d, e


BODIES = [
    (literal, r"^rule 'literal' on float32 returns p as float64\. An arithmetic literal promotes"),
    (literal_state, r"^rule 'literal_state' on float32 returns m as float64"),
    (calls_a_literal, r"^rule 'calls_a_literal' on float32 returns p as float64"),
    (wide_state, r"^rule 'wide_state' on float32 returns m as float64"),
    (forgets_a_state, r"^rule 'forgets_a_state' returns a tuple of 2; its signature asks for the tuple \(p, m, v\)"),
    (forgets_all_states, r"^rule 'forgets_all_states' returns one value; its signature asks for the tuple \(p, m\)"),
    (one_too_many, r"^rule 'one_too_many' returns a tuple of 3; its signature asks for the tuple \(p, m\)"),
    (
        alone_in_a_tuple,
        r"^rule 'alone_in_a_tuple' returns a tuple of 1; its signature asks for p alone, not in a tuple",
    ),
    (returns_nothing, r"^rule 'returns_nothing' .*returns p as none"),
    (endless, r"^scalar function 'endless' calls itself: recursion cannot be bound"),
    (ping, r"^scalar function '(ping|pong)' calls itself"),
    (five_states, r"^rule 'five_states' has 5 states; at most 4 are supported"),
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

    message = rf"^prepare of rule 'descent' must return a NamedTuple, found {found}"
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

    with pytest.raises(TypeError, match=r"^rate: rule 'needy' has no default for it; give rate="):
        fastopt.Optimizer([np.ones(3)], needy)
    with pytest.raises(TypeError, match=r"^rate: rule 'needy' has no default for it"):
        needy.update_(np.ones(3), np.ones(3))


def test_a_rule_keeps_its_hyperparameters_in_its_own_domains():
    def warm(t: int, lr: float = 0.1, heat: float = 0.5) -> Hyper:
        return Hyper(lr * heat)

    @rule(warm, domains={"heat": Interval(0.0, 1.0), "lr": Interval(0.0, 0.2, open=True)})
    def warmed(p, g, h):
        return p - h.lr * g

    with pytest.raises(ValueError, match=r"^heat=2\.0: expected a number in \[0, 1\]"):
        fastopt.Optimizer([np.ones(3)], warmed, heat=2.0)
    with pytest.raises(ValueError, match=r"^lr=0\.2: expected a number in \[0, 0\.2\)"):
        fastopt.Optimizer([np.ones(3)], warmed, lr=0.2)


def refusal(action: Callable[[], Any]) -> str | None:
    """The message of the TypeError that `action` raises, or None."""
    try:
        action()
    except TypeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("count", range(5))
def test_a_layerwise_rule_of_any_number_of_states_works_or_is_refused(count):
    """Silence is the one thing it must not answer with."""
    states = [f"s{k}" for k in range(count)]
    source = f"def move({', '.join(['p', *states, 'ratio', 'h'])}):\n    return p - h.lr * ratio\n"
    source += f"def descent({', '.join(['p', 'g', *states, 'h'])}):\n    return {', '.join(['g', *states])}\n"
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    arrays = [np.ones(5) for _ in range(2 + count)]

    def update() -> None:
        layerwise = fastopt.Layerwise(lambda norm_p, norm_u: 2.0, namespace["move"])
        rule(prepare, layerwise=layerwise)(namespace["descent"]).update_(*arrays, lr=0.25)

    message = refusal(update)
    if message is None:
        assert arrays[0].tolist() == [0.5] * 5
    else:
        assert "states" in message
        assert arrays[0].tolist() == [1.0] * 5


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
    with pytest.raises(TypeError, match=rf"^{flag}=.*: expected True or False"):
        getattr(fastopt, name)({"w": np.ones(3)}, **options)


def test_one_array_under_two_paths():
    shared = np.ones(3)
    with pytest.raises(ValueError, match=r"^parameters 'a' and 'b' are one and the same array"):
        fastopt.pack({"a": shared, "b": shared})


def test_a_dtype_that_is_none():
    with pytest.raises(TypeError, match=r"^dtype='nonsense': expected float32 or float64"):
        fastopt.pack({"a": np.ones(3)}, dtype="nonsense")


def test_true_is_no_grad_scale():
    opt = fastopt.SGD({"w": np.ones(3)})
    with pytest.raises(TypeError, match=r"^grad_scale=True"):
        opt.step(grad_scale=True)
    assert opt.step_count == 0


def test_a_literal_in_apply_of_a_layerwise_rule():
    def apply(p, m, ratio, h):
        return p - 0.5 * m

    @fastopt.rule(prepare, layerwise=fastopt.Layerwise(lambda norm_p, norm_u: 1.0, apply))
    def literal(p, g, m, h):
        return g, g

    with pytest.raises(TypeError, match=r"'literal' on float32 returns p as float64"):
        fastopt.Optimizer({"w": np.ones(3, np.float32)}, literal)
