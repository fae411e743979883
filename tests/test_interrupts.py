"""Interrupts: a handler of a signal may raise at any moment, and each call is then made whole or not at all."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
from test_sums import lined, ruled

import fastopt
from fastopt.checkpoint import describe
from fastopt.kernels.contract import N_PLACE
from fastopt.kernels.driver import DRIVER
from fastopt.signals import deferred_signals

TRIES = int(os.environ.get("FASTOPT_TEST_INTERRUPTS", "20"))
"""Interrupts of each method in each mode. `FASTOPT_TEST_INTERRUPTS=300` takes some minutes."""

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
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How loops run."""
    before, adaptive = DRIVER.mode, DRIVER.adaptive
    if request.param == "serial":
        monkeypatch.setitem(SHAPES, "W", (30, 10))
    else:
        DRIVER.choose(request.param)
    fastopt.set_num_threads(1 if request.param == "serial" else 2)
    yield request.param
    fastopt.set_num_threads(None)
    DRIVER.mode, DRIVER.adaptive = before, adaptive


def interrupted_at(call: Callable[[], Any], moment: int) -> tuple[bool, bool]:
    """Make a call with a signal at one of the moments at which Python runs handlers, counted from 0.

    These are the beginning of each function in Python, and the end of each call of one in C.

    Returns whether there was such a moment, and whether the call raised.
    """
    left = moment

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        if event in ("call", "c_return"):
            left -= 1
            if left == -1:
                signal.raise_signal(signal.SIGALRM)

    try:
        try:
            sys.setprofile(profile)
            call()
        finally:
            sys.setprofile(None)
    except AlarmError:
        return True, True
    return left < 0, False


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


def kept(opt: fastopt.Optimizer) -> dict[str, Any]:
    """Everything that an optimizer keeps, to the bit."""
    pipeline = opt._running
    state, pending = opt.state, pipeline.pending
    arrays = {**state.arrays, "params": pipeline.flat.arrays, "grads": pipeline.flat.grad_arrays}
    if pending is not None:
        arrays["pending"] = [pending.present, pending.partials, pipeline.sums]
    return {
        **{name: [hash(view.tobytes()) for view in views] for name, views in arrays.items()},
        "step": state.step,
        "missed": state.missed,
        "nonfinite": state.nonfinite,
        "hyper": [dict(group.values) for group in state.groups],
        "base": state.hyper,
        "overrides": state.overrides,
        "held": pipeline.held,
        "weight": None if pending is None else pending.weight,
    }


SHAPES = {"W": (300, 100), "b": (7,), "E": (400, 10)}
"""Enough elements for several threads."""


def tree(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


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


def moved(opt: Opt) -> None:
    opt.update(tree(5), tree(2))


def raised_inside(opt: Opt) -> None:
    with opt.swap_ema() as params:
        for _ in range(10):
            np.dot(params["E"].T, params["E"])


def set_lr(opt: Opt) -> None:
    opt.lr = 0.5


def set_decay_of_some(opt: Opt) -> None:
    opt.groups["[Wb]"].weight_decay = 0.25


def release_decay_of_some(opt: Opt) -> None:
    del opt.groups["[Wb]"].weight_decay


def add(opt: Opt) -> None:
    if "new" not in opt.params:
        opt.add({"new": np.ones(5, np.float32)}, lr=0.5)


def adam(**options: Any) -> Opt:
    return fastopt.AdamW(tree(), **options)


METHODS: dict[str, tuple[Callable[[], Opt], Call, Call]] = {
    "step": (adam, nothing, step),
    "step with grads": (adam, nothing, step_with_grads),
    "step that clips": (lambda: adam(max_norm=0.5, nonfinite="skip", ema=0.9, zero_grad=True), nothing, step),
    "step that clips each": (lambda: adam(clip_norm_per_tensor=0.1, nonfinite="skip"), nothing, step),
    "step after a skipped one": (lambda: adam(nonfinite="skip"), infinite_step, step),
    "step that is skipped": (lambda: adam(nonfinite="skip"), nothing, infinite_step),
    "step that is skipped and zeroes": (
        lambda: adam(nonfinite="skip", zero_grad=True),
        lambda opt: (opt.accumulate(tree(3)), opt.accumulate({**tree(3), "b": np.full(7, np.nan, np.float32)})),
        step,
    ),
    "step without some": (adam, nothing, partial_step),
    "step after accumulate": (adam, lambda opt: (opt.accumulate(tree(2)), opt.accumulate(tree(3))), step),
    "step after accumulate of some": (adam, accumulate, step),
    "step of frozen groups": (lambda: adam(overrides={"b": {"frozen": True}}), nothing, step),
    "LAMB": (lambda: fastopt.LAMB(tree()), nothing, step),
    "LARS": (lambda: fastopt.LARS(tree(), max_norm=1.0), nothing, step_with_grads),
    "NovoGrad": (lambda: fastopt.NovoGrad(tree()), nothing, step),
    "sums": (lambda: fastopt.Optimizer(tree(), ruled), nothing, step),
    "sums over rows": (lambda: fastopt.Optimizer(tree(), lined), nothing, step),
    "Muon": (lambda: fastopt.Muon(tree(), overrides={"W": {"orthogonal": False}}), nothing, step),  # E alone is cheap
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
    "first step": (lambda: fastopt.ScheduleFreeAdamW(tree(), ema=0.9), lambda opt: opt.restart(), step),
    "swap_ema": (lambda: adam(ema=0.9), nothing, swap_ema),
    "inside swap_ema": (lambda: adam(ema=0.9), nothing, raised_inside),
    "eval_params": (lambda: fastopt.ScheduleFreeAdamW(tree()), nothing, eval_params),
    "lookahead": (lambda: fastopt.Nesterov(tree(), form="lookahead"), nothing, lookahead),
    "update of other arrays": (lambda: fastopt.Adam(tree(), copy=False), nothing, moved),
    "lr": (lambda: adam(lr=lambda t: 0.1, overrides={"b": {"weight_decay": 0.5}}), nothing, set_lr),
    "weight_decay of some": (adam, nothing, set_decay_of_some),
    "weight_decay released": (adam, set_decay_of_some, release_decay_of_some),
    "add": (lambda: adam(ema=0.9), nothing, add),
}
"""For each method the optimizer, calls before, and the call that is interrupted."""


class Trial:
    """A call that is interrupted on copies of one optimizer, and what it may leave behind."""

    def __init__(self, opt: Opt, before: Call, call: Call):
        self.opt, self.before, self.call = opt, before, call
        self.expected = {False: self._kept(nothing), True: self._kept(call)}
        twin = self.prepared()
        started = time.perf_counter()
        call(twin)
        self.seconds = time.perf_counter() - started

    def prepared(self) -> Opt:
        twin = copy.deepcopy(self.opt)
        self.before(twin)
        return twin

    def _kept(self, first: Call) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is kept after `first`, and after the call."""
        twin = self.prepared()
        first(twin)
        there = kept(twin)  # brings rows up to date, which changes the bits of what follows
        self.call(twin)
        return there, kept(twin)

    def check(self, twin: Opt, raised: bool) -> bool:
        """Check that the call was made or not, and that the next one works; return whether it was made."""
        there = kept(twin)
        made = there == self.expected[True][0]
        assert made or (raised and there == self.expected[False][0])
        self.call(twin)
        assert kept(twin) == self.expected[made][1]
        return made


def trial(method: str) -> Trial:
    make, before, call = METHODS[method]
    opt = with_gradients(make())
    opt.step()
    return Trial(with_gradients(opt), before, call)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a generator that is closed
@pytest.mark.parametrize(
    ("mode", "method"),
    [*(("serial", method) for method in METHODS), *(("executor", method) for method in ("step", "LAMB", "accumulate"))],
    indirect=["mode"],
)
def test_a_call_is_whole_or_not_made_whenever_a_handler_raises(mode, method):
    each = trial(method)
    for moment in count():
        twin = each.prepared()
        reached, raised = interrupted_at(lambda: each.call(twin), moment)  # noqa: B023 called here
        each.check(twin, raised)
        if not reached:
            break
    assert moment > 5


OF_EACH_LOOP = ("step that clips", "LAMB", "NovoGrad", "sums over rows", "Muon", "accumulate", "step_rows")
"""Methods that launch a loop of each kind, for the modes whose threads are not ours: what Python does is the same."""


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        *((mode, method) for mode in ("serial", "pool") for method in METHODS),
        *((mode, method) for mode in ("numba", "executor") for method in OF_EACH_LOOP),
    ],
    indirect=["mode"],
)
def test_a_call_is_whole_or_not_made_at_random_times(mode, method):
    each = trial(method)
    tries = interrupts = 0
    while tries < TRIES or interrupts == 0:  # on a busy machine a timer may be late
        twin = each.prepared()
        raised = interrupted(lambda: each.call(twin), random.uniform(0.0, 1.2 * each.seconds))  # noqa: B023 called here
        each.check(twin, raised)
        tries, interrupts = tries + 1, interrupts + raised


@pytest.mark.parametrize("method", ["load", "load_state_dict"])
def test_a_state_is_restored_whole_or_not_at_all(method, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "W", (30, 10))
    saved = with_gradients(adam(ema=0.9, nonfinite="skip", overrides={"b": {"lr": 0.5}}))
    for call in (step, partial_step, infinite_step):
        call(saved)
    path = tmp_path / "run.safetensors"
    saved.save(path)
    state = saved.state_dict()

    def restore(opt: Opt) -> None:
        opt.load(path) if method == "load" else opt.load_state_dict(state)

    opt = with_gradients(adam(ema=0.9, nonfinite="skip", lr=0.1))
    opt.step()
    each = Trial(opt, accumulate, restore)
    for moment in count():
        twin = each.prepared()
        reached, raised = interrupted_at(lambda: restore(twin), moment)  # noqa: B023 called here
        each.check(twin, raised)
        if not reached:
            break
    assert moment > 100


def test_a_file_is_the_old_or_the_new_one_and_nothing_else_is_left(tmp_path):
    opt = with_gradients(fastopt.Momentum(tree(), ema=0.9))
    lag(opt)
    path = tmp_path / "run.safetensors"
    opt.save(path, extra={"moment": -1})
    there = kept(opt)
    for moment in count():
        reached, raised = interrupted_at(lambda: opt.save(path, extra={"moment": moment}), moment)  # noqa: B023
        assert kept(opt) == there
        found = describe(path)["extra"]["moment"]
        assert found == moment or (raised and found == -1)
        assert list(tmp_path.iterdir()) == [path]
        if found == moment:
            opt.save(path, extra={"moment": -1})
        if not reached:
            break
    assert moment > 100


def test_other_arrays_are_taken_whole_or_not_at_all():
    for moment in count():
        own, buffer = tree(), np.zeros(34_007, np.float32)
        other = {"E": buffer[:4000].reshape(400, 10), "W": buffer[4000:34_000].reshape(300, 100), "b": buffer[34_000:]}
        flat = fastopt.pack(own, copy=False)
        assert flat.places.shape == (3, N_PLACE)
        assert sum(flat.neighbours) == 0
        reached, raised = interrupted_at(lambda: flat.replace(other), moment)  # noqa: B023 called here
        replaced = flat.params["W"] is other["W"]
        assert replaced or raised
        expected = other if replaced else own
        assert [array is expected[path] for path, array in zip(flat.paths, flat.arrays, strict=True)] == [True] * 3
        assert (flat.addresses == [expected[path].ctypes.data for path in flat.paths]).all()
        assert (flat.places[:, 0] == flat.addresses).all()
        assert sum(flat.neighbours) == (2 if replaced else 0)
        if not reached:
            break
    assert moment > 5


@pytest.mark.parametrize("context", ["eval_params", "swap_ema"])
def test_a_second_interrupt_does_not_keep_a_context_from_restoring(context, monkeypatch):
    opt = with_gradients(fastopt.ScheduleFreeAdamW(tree(), ema=0.9))
    opt.step()
    before, pipeline = kept(opt), opt._running
    put = pipeline.put_params

    def put_late(arrays: Any) -> None:
        if pipeline.held:
            signal.raise_signal(signal.SIGALRM)
        put(arrays)

    def hold() -> None:
        with getattr(opt, context)():
            signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(pipeline, "put_params", put_late)
    with pytest.raises(AlarmError):
        hold()
    assert kept(opt) == before


# --- deferred signals -------------------------------------------------------------------------------------------------


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in sorted(signal.valid_signals())]


def test_a_handler_runs_at_the_end_of_the_outermost_block():
    before, order = handlers(), []
    signal.signal(signal.SIGALRM, lambda number, frame: order.append((number, frame.f_code.co_name)))
    with deferred_signals:
        with deferred_signals:
            signal.raise_signal(signal.SIGALRM)
            order.append("inside")
        order.append("outside")
    name = test_a_handler_runs_at_the_end_of_the_outermost_block.__name__
    assert order == ["inside", "outside", (signal.SIGALRM, name)]
    signal.signal(signal.SIGALRM, raise_alarm)
    assert handlers() == before
    assert deferred_signals._held == {}


def test_an_error_of_the_block_is_the_context_of_an_interrupt():
    def fail(interrupted: bool) -> None:
        with deferred_signals:
            if interrupted:
                signal.raise_signal(signal.SIGALRM)
            raise ValueError("of the block")

    with pytest.raises(AlarmError) as raised:
        fail(True)
    assert type(raised.value.__context__) is ValueError
    with pytest.raises(ValueError, match="of the block"):
        fail(False)


def test_all_handlers_run_where_one_of_them_raises():
    ran = []

    def handle(number: int, frame: Any) -> None:
        ran.append(number)
        raise AlarmError

    def receive_all() -> None:
        with deferred_signals:
            for number in (*numbers, *numbers):  # as in the system, one that waits already is not counted
                signal.raise_signal(number)

    numbers = (signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        with pytest.raises(AlarmError):
            receive_all()
        assert sorted(ran) == sorted(numbers)
        assert [signal.getsignal(number) for number in numbers] == [handle] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_handler_that_the_block_sets_stays():
    def other(*_: Any) -> None:
        """Do nothing."""

    with deferred_signals:
        signal.signal(signal.SIGALRM, other)
    assert signal.getsignal(signal.SIGALRM) is other


def test_other_threads_defer_nothing():
    found = []

    def work() -> None:
        before = handlers()
        with deferred_signals:
            found.append(handlers() == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with deferred_signals:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGALRM) is not raise_alarm  # still deferred here
    assert found == [True, True]
    assert signal.getsignal(signal.SIGALRM) is raise_alarm


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("of_main", [True, False])
def test_a_forked_child_is_in_a_block_only_where_the_main_thread_forked(of_main):
    statuses = []

    def fork() -> None:
        process = os.fork()
        if process == 0:
            os._exit(signal.getsignal(signal.SIGALRM) is raise_alarm)
        statuses.append(os.waitpid(process, 0)[1])

    with deferred_signals:
        if of_main:
            fork()
        else:
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
    assert os.waitstatus_to_exitcode(statuses[0]) == (not of_main)


def test_no_moment_of_a_block_loses_a_handler_or_cuts_the_block_short():
    done = []

    def block() -> None:
        with deferred_signals:
            done.append("begun")
            done.append("done")

    for moment in count():
        done.clear()
        reached, raised = interrupted_at(block, moment)
        assert done in ([], ["begun", "done"])
        assert raised or done
        assert signal.getsignal(signal.SIGALRM) is raise_alarm
        assert deferred_signals._depth == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not reached:
            break
    assert moment > 5
