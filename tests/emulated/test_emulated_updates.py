"""The kernels of every rule, as a GPU gets them: the CPU's bits without contraction, and close to them with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import emulator  # noqa: F401 skips this file where it cannot work
import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING, MANY_STATES, PER_RULE, WRAPPED, Case

import fastopt

SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 1000, 4097, 9001)
"""Around the 16 bytes of a load, the threads of a block, and the elements of a chunk (4,096)."""
DTYPES = (np.float32, np.float64)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
MODES = {"forwards": (False, False), "backwards": (False, True), "contracted": (True, False)}
"""Contraction, and the order of threads."""
OVERRIDES = {"p4": {"lr": 0.03125}, "p1000": {"weight_decay": 0.25}, "p4097": {"lr": 0.0625}}
"""Param groups."""
OF_EACH_KIND = ("AdamW", "LAMB", "NovoGrad-weight_decay=0.1", "StableAdamW-weight_decay=0.1", "Muon")
"""An elementwise rule, three of sums, with two norms, one and none, and a matrixwise one."""


class Left(NamedTuple):
    """What steps leave."""

    steps: list[dict[str, np.ndarray]]
    """Arrays by name, after each step."""
    infos: list[tuple[Any, ...]]


def tree(seed: int, dtype: Any, least: int = 2, *, nudged: bool = False) -> dict[str, np.ndarray]:
    """Multiples of 1/16 from `least` / 16 to 15/16: sums of their squares are exact, in any order.

    nudged : each number is the one above or below it, at random.
    """
    rng = np.random.default_rng(seed)
    shapes = {f"p{size}": (size,) for size in SIZES} | {"matrix": (5, 7)}
    made = {
        path: (rng.choice([-1, 1], shape) * rng.integers(least, 16, shape) / 16).astype(dtype)
        for path, shape in shapes.items()
    }
    if nudged:
        made = {path: np.nextafter(p, rng.choice([-1, 1], p.shape).astype(dtype)) for path, p in made.items()}
    return made


def at_odd_addresses(backend: Any, params: dict[str, np.ndarray]) -> dict[str, Any]:
    """Copies of parameters in arrays of their own, each ending where its array ends."""
    gaps = {path: k % 4 for k, path in enumerate(params)}
    whole = {path: np.concatenate([np.zeros(gaps[path], p.dtype), p.reshape(-1)]) for path, p in params.items()}
    return {path: backend.adopt(whole[path])[gaps[path] :].reshape(p.shape) for path, p in params.items()}


def stepped(
    case: Case, place: Any, dtype: Any, *, steps: int = 2, in_place: bool = False, nudged: bool = False, **options: Any
) -> Left:
    """What steps of a case leave. place : a backend, or "cpu". nudged : of gradients that differ by an ulp."""
    on_device, params = place != "cpu", tree(0, dtype)
    if in_place:
        opt = case.make(at_odd_addresses(place, params), copy=False, **options)
    else:
        opt = case.make(params, backend="cuda" if on_device else "cpu", **options)
    left, infos = [], []
    for step in range(steps):
        # Halved below; a tenth of p cancels none of them.
        grads: dict[str, Any] = tree(step + 1, dtype, least=4, nudged=nudged)
        if options.get("nonfinite") == "zero" or (options.get("nonfinite") == "skip" and step == 1):
            grads["p1000"][7] = np.inf
        if on_device:
            grads = at_odd_addresses(place, grads)
        if options.get("max_norm") and step == 2:
            opt.accumulate(grads, weight=0.5)
            opt.accumulate({**grads, "p33": None})
            infos.append(opt.step(grad_scale=2.0))
        else:
            infos.append(opt.step(grads, grad_scale=2.0))
        named = {"p": opt.params, **opt.states, **({"ema": opt.ema} if options.get("ema") else {})}
        if options.get("zero_grad"):
            named["g"] = opt.grads
        left.append(copied(place, named))
    return Left(left, [(info.step, info.skipped, info.grad_norm) for info in infos])


def copied(place: Any, named: dict[str, Any]) -> dict[str, np.ndarray]:
    """Copies of all leaves on the host, by name and path."""
    host = np.copy if place == "cpu" else place.host
    return {f"{name}/{path}": host(leaf) for name, leaves in named.items() for path, leaf in leaves.items()}


def in_modes(backend: Any, case: Case, dtype: Any, **options: Any) -> dict[str, Left]:
    """What is left in each of the modes, where nothing depends on the order of threads."""
    found = {}
    for mode, (backend.contracted, backend.backwards) in MODES.items():
        found[mode] = stepped(case, backend, dtype, **options)
    assert_same(found["backwards"], found["forwards"])
    return found


def assert_same(found: Left, expected: Left, steps: int | None = None) -> None:
    """The same bits, after each of the first `steps`."""
    different = []
    for k, (here, there) in enumerate(zip(found.steps, expected.steps, strict=True)):
        assert here.keys() == there.keys()
        if steps is None or k < steps:
            different += [(k, name) for name, array in there.items() if here[name].tobytes() != array.tobytes()]
    assert different == []
    if steps is None:
        assert found.infos == expected.infos


CANCELLED = {"numerator": 64.0}
"""Sums of products of either sign, whose rounding is that of larger numbers: by how much."""


def assert_close(found: Left, expected: Left, nudged: Left | None = None) -> None:
    """Within 4 ulp of the largest number that an array has held so far, after each step.

    Not of its largest number now: a new value is a sum of the old one and of something else, and where these cancel,
    the roundings of both remain. What was added is at most the old value and the new one together.

    nudged : what is left of gradients that differ by an ulp. By 4 times as much as that moves an array of the same
    dtype it may differ as well.
    """
    largest: dict[str, Any] = {}
    for k, arrays in enumerate(expected.steps):
        for name, array in arrays.items():
            largest[name] = np.maximum(np.abs(array).max(initial=0.0), largest.get(name, 0.0)).astype(array.dtype)
            allowed = 4.0 * float(np.spacing(largest[name])) * CANCELLED.get(name.partition("/")[0], 1.0)
            if nudged is not None:
                allowed += 4.0 * distance(nudged.steps[k][name], array)
            assert distance(found.steps[k][name], array) <= allowed, (k, name)
    assert [info[:2] for info in found.infos] == [info[:2] for info in expected.infos]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))


def exact_steps(case: Case, dtype: Any) -> int | None:
    """After how many steps the CPU's bits are to be those of a GPU without contraction; None: after all.

    A GPU adds up sums in another order. Those of the squares of the first parameters and of all gradients here are
    exact, but those of updated parameters (LARS) and of what else a rule sums are not. What a rule computes from them
    is that of the CPU to the last places of float64, which float32 does not show.
    """
    if dtype is np.float32:
        return None
    if case.optimizer in ("LARS", "NovoGrad"):
        return 1 if case.optimizer == "LARS" else None
    return 0 if case.rule.sums else None


def assert_like_cpu(case: Case, dtype: Any, found: dict[str, Left], **options: Any) -> None:
    """The CPU's bits without contraction, and close to them with it, which leaves out roundings of products.

    The products of matrices that make Muon's direction multiply what that changes: by how much is seen by computing the
    direction of other gradients.
    """
    cpu = stepped(case, "cpu", dtype, **options)
    exact = exact_steps(case, dtype)
    assert_same(found["forwards"], cpu, exact)
    if exact is not None:
        assert_close(found["forwards"], cpu)
    nudged = None if case.rule.matrixwise is None else stepped(case, "cpu", dtype, nudged=True, **options)
    assert_close(found["contracted"], cpu, nudged)


@by_dtype
@pytest.mark.parametrize("case", [*PER_RULE, MANY_STATES, *WRAPPED], ids=lambda case: case.rule.name)
def test_every_rule_is_that_of_the_cpu_wherever_parameters_are(case, dtype, backend):
    found = in_modes(backend, case, dtype)
    assert_like_cpu(case, dtype, found)
    backend.contracted = False
    assert_same(stepped(case, backend, dtype, in_place=True), found["forwards"])


@by_dtype
@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_so_is_one_of_each_kind_with_every_flag(name, nonfinite, dtype, backend):
    """Param groups, a step that is skipped on the device, accumulated gradients."""
    case, options = BY_NAME[name], {**EVERYTHING, "zero_grad": True, "steps": 3, "nonfinite": nonfinite}
    if name != "Muon":
        options["overrides"] = OVERRIDES
    found = in_modes(backend, case, dtype, **options)
    assert [info[1] for info in found["forwards"].infos] == [False, nonfinite == "skip", False]
    assert_like_cpu(case, dtype, found, **options)


def rowwise(place: Any, dtype: Any, name: str, options: dict[str, Any]) -> Left:
    """What is left of steps on rows, some of them repeated, and of the catching up of the others."""
    rng = np.random.default_rng(0)
    begin = {"table": rng.integers(2, 16, (37, 5)) / 16, "bias": rng.integers(2, 16, 7) / 16}
    opt = getattr(fastopt, name)({path: p.astype(dtype) for path, p in begin.items()}, **options)
    for _ in range(4):
        indices, row_grads = rng.integers(0, 37, 9), (rng.integers(-15, 16, (9, 5)) / 16).astype(dtype)
        bias = (rng.integers(2, 16, 7) / 16).astype(dtype)
        if place != "cpu":
            row_grads, bias = place.adopt(row_grads), place.adopt(bias)
        opt.step_rows({"table": (indices, row_grads)}, {"table": None, "bias": bias})
    opt.flush_rows()
    named = {"p": opt.params, **opt.states, **({"ema": opt.ema} if "ema" in options else {})}
    return Left([copied(place, named)], [])


@by_dtype
@pytest.mark.parametrize("name", ["Adam", "Momentum"])
def test_rows_that_were_missed_catch_up_by_closed_forms(name, dtype, backend):
    options = {"lr": 0.0625, "max_norm": 1.0, **({"ema": 0.9} if name == "Adam" else {})}
    cpu = rowwise("cpu", dtype, name, {**options, "backend": "cpu"})
    found = {}
    for mode, (backend.contracted, backend.backwards) in MODES.items():
        found[mode] = rowwise(backend, dtype, name, {**options, "backend": "cuda"})
    assert_same(found["backwards"], found["forwards"])
    assert_same(found["forwards"], cpu)
    assert_close(found["contracted"], cpu)


@pytest.mark.parametrize("scale", [2.0**600, 2.0**-600, 1.0])
def test_norms_of_float64_are_exact_beyond_the_range_of_squares(scale, backend):
    params = {"a": np.ones(4097), "b": np.ones((3, 40)), "empty": np.ones(0)}
    grads = {path: np.zeros(p.shape) for path, p in params.items()}
    grads["a"][[0, 4096]], grads["b"][2, 39] = 2.0 * scale, -1.0 * scale
    for backend.backwards in (False, True):
        infos, left = [], []
        for place, given in (("cuda", {path: backend.adopt(g) for path, g in grads.items()}), ("cpu", grads)):
            opt = fastopt.SGD(params, lr=0.5, max_norm=1.0, backend=place)
            infos.append(opt.step(given))
            opt.accumulate(given)
            opt.accumulate({**given, "b": None})
            infos.append(opt.step(reduction="sum"))
            left.append([backend.host(opt.params[path]) if place == "cuda" else opt.params[path] for path in params])
        norms = [info.grad_norm for info in infos]
        assert norms[:2] == norms[2:]
        assert norms[0] == 3.0 * scale
        assert [p.tobytes() for p in left[0]] == [p.tobytes() for p in left[1]]
