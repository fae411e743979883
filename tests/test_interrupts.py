"""Interrupts: a handler of a signal may raise at any moment, and each call is then made whole or not at all."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt.kernels.driver import DRIVER

TRIES = int(os.environ.get("FASTOPT_TEST_INTERRUPTS", "60"))
"""Interrupts of each method in each mode. `FASTOPT_TEST_INTERRUPTS=1000` runs the long version."""

MODES = ("serial", "pool", "numba", "executor")

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")


class AlarmError(BaseException):
    """What the handler raises: as KeyboardInterrupt, no Exception."""


def raise_alarm(*_: Any) -> None:
    raise AlarmError


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, raise_alarm)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """How loops run."""
    before, adaptive = DRIVER.mode, DRIVER.adaptive
    if request.param != "serial":
        DRIVER.choose(request.param)
    fastopt.set_num_threads(1 if request.param == "serial" else 2)
    yield request.param
    fastopt.set_num_threads(None)
    DRIVER.mode, DRIVER.adaptive = before, adaptive


def interrupted(call: Callable[[], Any], seconds: float) -> bool:
    """Make a call that a signal reaches after `seconds`; return whether the call raised."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except AlarmError:
        return True
    return False


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept(opt: fastopt.Optimizer) -> bytes:
    """Everything that an optimizer keeps, to the bit."""
    pipeline = opt._running
    state, pending = opt.state, pipeline.pending
    values = [
        {name: [view.tobytes() for view in views] for name, views in state.arrays.items()},
        [array.tobytes() for array in pipeline.flat.arrays],
        [array.tobytes() for array in pipeline.flat.grad_arrays],
        (state.step, state.missed, state.nonfinite, state.hyper, state.overrides, pipeline.held),
        None if pending is None else (pending.weight, pending.present.tobytes(), pending.partials.tobytes()),
    ]
    return pickle.dumps(values)


def tree(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"W": (300, 100), "b": (7,), "E": (400, 10)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def with_gradients(opt: fastopt.Optimizer) -> fastopt.Optimizer:
    for name, grad in tree(1).items():
        opt.grads[name] = grad
    return opt


Opt = fastopt.Optimizer
Call = Callable[[Opt], Any]


def step(opt: Opt) -> None:
    opt.step()


def step_with_grads(opt: Opt) -> None:
    opt.step(tree(2))


def partial_step(opt: Opt) -> None:
    opt.step({**tree(2), "b": None})


def infinite_step(opt: Opt) -> None:
    opt.step({**tree(2), "b": np.full(7, np.inf, np.float32)})


def accumulate(opt: Opt) -> None:
    opt.accumulate({**tree(3), "b": None}, weight=2.0)


def zero_grad(opt: Opt) -> None:
    opt.zero_grad()


ROWS = {"E": (np.arange(0, 400, 3), np.full((134, 10), 0.5, np.float32))}


def step_rows(opt: Opt) -> None:
    opt.step_rows(ROWS, {**tree(2), "E": None})


def lag(opt: Opt) -> None:
    """Leave rows behind."""
    opt.step_rows({"E": (np.array([5, 9]), np.ones((2, 10), np.float32))})


def flush_rows(opt: Opt) -> None:
    opt.flush_rows()


def read_rows(opt: Opt) -> None:
    opt.read_rows("E", np.arange(100))


def swap_ema(opt: Opt) -> None:
    with opt.swap_ema():
        pass


def eval_params(opt: Opt) -> None:
    with opt.eval_params():
        pass


def lookahead(opt: Opt) -> None:
    with opt.lookahead():
        pass


def nothing(opt: Opt) -> None:
    pass


def adam(**options: Any) -> Opt:
    return fastopt.AdamW(tree(), **options)


METHODS: dict[str, tuple[Callable[[], Opt], Call, Call]] = {
    "step": (adam, nothing, step),
    "step with grads": (adam, nothing, step_with_grads),
    "step that clips": (lambda: adam(max_norm=0.5, nonfinite="skip", ema=0.9, zero_grad=True), nothing, step),
    "step after a skipped one": (lambda: adam(nonfinite="skip"), infinite_step, step),
    "step that is skipped": (lambda: adam(nonfinite="skip"), nothing, infinite_step),
    "step that is skipped and zeroes": (
        lambda: adam(nonfinite="skip", zero_grad=True),
        lambda opt: (opt.accumulate(tree(3)), opt.accumulate({**tree(3), "b": np.full(7, np.nan, np.float32)})),
        step,
    ),
    "step without some": (adam, nothing, partial_step),
    "step after accumulate": (adam, lambda opt: (accumulate(opt), accumulate(opt)), step),
    "step of frozen groups": (lambda: adam(overrides={"b": {"frozen": True}}), nothing, step),
    "LAMB": (lambda: fastopt.LAMB(tree()), nothing, step),
    "LARS": (lambda: fastopt.LARS(tree(), max_norm=1.0), nothing, step_with_grads),
    "NovoGrad": (lambda: fastopt.NovoGrad(tree()), nothing, step),
    "Muon": (lambda: fastopt.Muon(tree()), nothing, step),
    "accumulate": (lambda: adam(max_norm=1.0), nothing, accumulate),
    "accumulate more": (lambda: adam(max_norm=1.0), accumulate, accumulate),
    "zero_grad": (adam, accumulate, zero_grad),
    "step_rows": (lambda: fastopt.Momentum(tree(), ema=0.9), lag, step_rows),
    "step_rows that clips": (lambda: fastopt.SGD(tree(), max_norm=0.1, nonfinite="raise"), lag, step_rows),
    "step_rows by single steps": (lambda: fastopt.Adam(tree()), lag, step_rows),
    "step of rows behind": (lambda: fastopt.Momentum(tree()), lag, step),
    "flush_rows": (lambda: fastopt.Momentum(tree()), lag, flush_rows),
    "read_rows": (lambda: fastopt.Adam(tree()), lag, read_rows),
    "set_params": (lambda: adam(ema=0.9), nothing, lambda opt: opt.set_params(tree(5))),
    "restart": (lambda: fastopt.ScheduleFreeAdamW(tree()), step, lambda opt: opt.restart()),
    "swap_ema": (lambda: adam(ema=0.9), nothing, swap_ema),
    "eval_params": (lambda: fastopt.ScheduleFreeAdamW(tree()), nothing, eval_params),
    "lookahead": (lambda: fastopt.Nesterov(tree(), form="lookahead"), nothing, lookahead),
}
"""For each method the optimizer, calls before, and the call that is interrupted."""


def interrupt(opt: Opt, before: Call, call: Call, tries: int) -> Counter[str]:
    """Interrupt a call at random times, and look at what is left; count the outcomes."""

    def prepared() -> Opt:
        twin = copy.deepcopy(opt)
        before(twin)
        return twin

    def calls(first: Call) -> tuple[bytes, bytes, float]:
        """What is kept after a first call and after another; and how long that takes."""
        twin = prepared()
        first(twin)
        there = kept(twin)  # brings rows up to date, which changes the bits of what follows
        started = time.perf_counter()
        call(twin)
        return there, kept(twin), time.perf_counter() - started

    expected = {False: calls(nothing), True: calls(call)}
    longest = 1.2 * expected[True][2]
    outcomes: Counter[str] = Counter()
    while outcomes["tries"] < tries or not outcomes["raised"]:
        outcomes["tries"] += 1
        twin = prepared()
        raised = interrupted(lambda: call(twin), random.uniform(0.0, longest))  # noqa: B023 called here
        outcomes["raised"] += raised
        there = kept(twin)
        made = there == expected[True][0]
        assert made or (raised and there == expected[False][0])
        outcomes["made"] += raised and made
        call(twin)
        assert kept(twin) == expected[made][1]
    return outcomes


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_call_is_made_whole_or_not_at_all(mode, method):
    make, before, call = METHODS[method]
    opt = with_gradients(make())
    opt.step()
    with_gradients(opt)
    outcomes = interrupt(opt, before, call, TRIES)
    assert outcomes["raised"] > 0
