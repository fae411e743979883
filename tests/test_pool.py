"""The pool of native threads: the same bits, no hang, no thread that writes when a step is over, and when it pays.

The file is also the script that its tests run in processes of their own: ``python test_pool.py stress SECONDS`` and
``python test_pool.py scenario NAME``.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import faulthandler
import gc
import hashlib
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING, OF_EACH_KIND, Case, gradients
from llvmlite import binding, ir
from numba import types
from scripts import compiled, run

import fastopt
from fastopt.kernels import driver, intrinsics, pool
from fastopt.kernels.bind import bind, compile_loop
from fastopt.kernels.driver import DRIVER
from fastopt.kernels.elements import scalar
from fastopt.kernels.pool import ALONE, COUNT, CREDIT, EPOCH, FAILURES, LOCK, WAIT
from fastopt.kernels.threads import processors, using

pytestmark = pytest.mark.skipif(pool.why_not() is not None, reason=str(pool.why_not()))

SECONDS = float(os.environ.get("FASTOPT_STRESS_SECONDS", "5"))
"""For the stress test; CI takes more."""


def word(at: int) -> ctypes.c_int64:
    """A word of the pool of this process."""
    assert DRIVER._pool is not None
    return ctypes.c_int64.from_address(DRIVER._pool.control + at)


@pytest.fixture
def every_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every job runs on the pool, however small it is."""
    monkeypatch.setattr(driver, "SERIAL_BELOW", 0)
    before = DRIVER.mode, DRIVER.adaptive
    DRIVER.choose("pool")
    with using(2):
        yield
    DRIVER.mode, DRIVER.adaptive = before


def digest_of(opt: fastopt.Optimizer, *more: Any) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for buffer in (opt.flat.data, opt.flat.grad, *opt._pipeline.buffers):
        digest.update(buffer)
    return digest.hexdigest()


# --- the same bits ----------------------------------------------------------------------------------------------------

SIZES = {"a": (7001,), "b": (33, 65), "empty": (0, 2), "number": (), "c": (4096,)}


def steps_of(case: Case, options: dict[str, Any]) -> str:
    """A digest after steps of every kind: dense, accumulated, without one gradient, and of some rows."""
    rng = np.random.default_rng(0)
    params = {name: np.asarray(rng.normal(size=shape)).astype(np.float32) for name, shape in SIZES.items()}
    opt = case.make(params, **options)

    def grads() -> dict[str, Any]:
        return {name: gradients(rng, p.size, p.dtype).reshape(p.shape) for name, p in params.items()}

    told = [opt.step(grads()).grad_norm, opt.step({**grads(), "b": None}).grad_norm]
    opt.accumulate(grads())
    opt.accumulate(grads(), weight=0.5)
    told.append(opt.step().grad_norm)
    with suppress(TypeError, ValueError):  # a rule, or a form of it, that has no closed form
        opt.step_rows({"b": (np.array([3, 0, 3]), gradients(rng, 3 * 65, np.float32).reshape(3, 65))})
        opt.step(grads())
    return digest_of(opt, told, opt.step_count)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}{name}")
        for case in (*OF_EACH_KIND, BY_NAME["Prodigy-d0=0.01-weight_decay=0.1"])  # whose sums are over all parameters
        for name, options in (("", {}), ("-everything", EVERYTHING))
        if options or case.optimizer in ("SGD", "Adam", "LAMB", "NovoGrad")
    ],
)
def test_every_rule_and_flag_has_the_bits_of_one_thread(every_job, case, options):
    if options and case.optimizer == "Muon":
        options = {name: value for name, value in options.items() if name != "nonfinite"}
    with using(1):
        expected = steps_of(case, options)
    for threads in (2, 3, 7):
        with using(threads):
            before = word(EPOCH).value if DRIVER._pool else 0
            assert steps_of(case, options) == expected, threads
            assert word(EPOCH).value > before  # the pool has run them


FLUSH = 0x8040  # of MXCSR: denormal results and operands count as 0


@pytest.mark.skipif(intrinsics.MACHINE != "x86_64", reason="the bits of the modes are those of x86-64")
def test_workers_compute_in_the_modes_of_the_thread_that_launches(every_job):
    """As with torch.set_flush_denormal: whether denormal numbers count as 0 must not depend on who has which chunk."""
    modes = compile_loop(bind(lambda: arithmetic_modes(), {}, label="modes", scalar=scalar), ()).entry
    set_modes = compile_loop(
        bind(lambda m: set_arithmetic_modes(m), {}, label="set_modes", scalar=scalar), (types.int64,)
    ).entry

    size = 1_000_000  # so long a job that a worker wakes and takes a part of it
    opt = fastopt.SGD({"w": np.zeros(size, np.float32)}, lr=1e-3)
    denormal = np.full(size, 1e-39, np.float32)  # made here: no thread that flushes could make them
    before = modes()

    def denormals_left(mode: int) -> int:
        np.copyto(opt.params["w"], denormal)
        np.copyto(opt.grads["w"], denormal)
        set_modes(mode)
        try:
            opt.step()
        finally:
            set_modes(before)
        return int(np.count_nonzero(opt.params["w"].view(np.int32)))

    for _ in range(20):
        with using(3):
            assert denormals_left(before) == size
            assert denormals_left(before | FLUSH) == 0
            assert denormals_left(before) == size


arithmetic_modes = intrinsics.arithmetic_modes
set_arithmetic_modes = intrinsics.set_arithmetic_modes


@pytest.mark.parametrize(
    ("machine", "target", "instructions"),
    [
        ("aarch64", "aarch64-unknown-linux-gnu", ("yield", "FPCR")),
        ("x86_64", "x86_64-unknown-linux-gnu", ("pause", "stmxcsr", "ldmxcsr")),
        ("riscv64", "x86_64-unknown-linux-gnu", ("ret",)),
    ],
)
def test_the_instructions_of_each_machine_compile_for_it(machine, target, instructions):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        described = binding.Target.from_triple(target)
    except RuntimeError:
        pytest.skip(f"this LLVM has no target for {machine}")
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.IntType(64), []), "everything")
    builder = ir.IRBuilder(function.append_basic_block())
    intrinsics.emit_pause(builder, machine)
    modes = intrinsics.emit_modes(builder, machine)
    intrinsics.emit_set_modes(builder, machine, builder.or_(modes, ir.IntType(64)(1)))
    builder.ret(modes)
    parsed = binding.parse_assembly(f'target triple = "{target}"\n{module}')
    assembly = described.create_target_machine().emit_assembly(parsed)
    for instruction in instructions:
        assert instruction.lower() in assembly.lower()


# --- whether it pays --------------------------------------------------------------------------------------------------


@cache
def policy() -> tuple[Callable[..., Any], ...]:
    """`pays`, `judge` and `measure`, compiled for themselves."""
    arguments = {pool.pays: 1, pool.judge: 3, pool.measure: 2}
    return tuple(
        compile_loop(bind(f.py_func, {}, label=f"test_{f.__name__}", scalar=scalar), (types.int64,) * count).entry
        for f, count in arguments.items()
    )


class Place:
    """A site, and jobs that take a given time."""

    def __init__(self, alone: int):
        self.site = pool.Site()
        self.pays, self.judge, self.measure = policy()
        self.alone = alone
        self.time = 0
        """Of all jobs so far."""
        self.jobs = self.pooled = 0

    def __getitem__(self, at: int) -> int:
        return int(self.site.words[at // 8])

    def run(self, own: int, waited: int = 0) -> bool:
        """A job that takes `self.alone` alone, or `own` and a wait for others; whether it had the pool."""
        self.jobs += 1
        if self.pays(self.site.address):
            self.judge(self.site.address, own, waited)
            self.time += own + waited
            self.pooled += 1
            return True
        self.measure(self.site.address, self.alone)
        self.time += self.alone
        return False


def test_a_pool_that_is_faster_is_used_but_for_the_jobs_that_measure():
    place = Place(alone=20_000)
    for _ in range(10_000):
        place.run(own=11_000)
    assert place[WAIT] == place[FAILURES] == 0
    assert place[ALONE] == 20_000
    assert place[COUNT] == 10_000
    assert place.pooled >= 9_900


def test_a_pool_that_never_helps_is_tried_seldom():
    place = Place(alone=20_000)
    for _ in range(10_000):
        place.run(own=24_000)  # the workers were woken, and came too late
    assert place.pooled < 1_300
    assert place.time < 1.025 * 10_000 * 20_000


def test_a_stall_now_and_then_is_no_reason_to_give_up():
    place = Place(alone=20_000)
    for _ in range(100):
        place.run(own=11_000)
    for _ in range(100):
        place.run(own=11_000, waited=200_000)
        for _ in range(100):
            place.run(own=11_000)
    assert place.pooled > 9_800


@pytest.mark.parametrize("alone", [3_000, 20_000, 200_000, 10_000_000])
@pytest.mark.parametrize("often", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("stall", [100_000, 4_000_000, 20_000_000])
def test_stragglers_cost_little_however_often_they_are_and_however_long(alone, often, stall):
    """On a busy machine a share may wait for the turn of its thread. In the long run that costs 15 % at most."""
    rng = np.random.default_rng(0)
    place = Place(alone)
    jobs = 60_000
    for stalls in rng.random(jobs) < often:
        place.run(own=alone // 2 + 500, waited=stall if stalls else 0)
    beginning = 32 * alone + 20 * stall
    assert place.time <= 1.15 * jobs * alone + beginning


def test_a_machine_that_becomes_quiet_gets_its_threads_back():
    place = Place(alone=20_000)
    for _ in range(3_000):
        place.run(own=20_000, waited=10_000_000)
    assert place.pooled < 30
    for _ in range(4_100):  # the longest wait
        place.run(own=11_000)
    before = place.pooled
    for _ in range(1_000):
        place.run(own=11_000)
    assert place.pooled - before > 980


def test_what_one_thread_takes_is_measured_again_when_it_changes():
    place = Place(alone=100_000)
    for _ in range(200):
        place.run(own=60_000)
    place.alone = 40_000  # the data is in a cache now
    for _ in range(2_000):
        place.run(own=60_000)
    assert place[ALONE] < 42_000
    assert place[FAILURES] == 6
    place.alone = 100_000
    for _ in range(3_000):
        place.run(own=60_000)
    assert place[ALONE] > 90_000
    assert place[WAIT] == 0


def test_a_job_that_its_thread_was_kept_from_is_not_held_against_the_pool():
    # The launching thread itself was not scheduled for 10 ms, as it might have been without a pool.
    place = Place(alone=20_000)
    for _ in range(300):
        place.run(own=11_000)
    before = place[CREDIT]
    while not place.run(own=10_000_000):
        pass
    assert place[CREDIT] >= before - 10_000
    assert place[WAIT] == 0


@pytest.mark.parametrize(
    ("text", "delay"),
    [(b"123456 789 12\n", 789), (b"5 98765432101234 1", 98_765_432_101_234), (b"0 0 0\n", 0), (b"", 0), (None, 0)],
)
def test_the_delay_of_a_thread_is_the_second_number_of_schedstat(tmp_path, text, delay):
    path = tmp_path / "schedstat"
    if text is not None:
        path.write_bytes(text)
    name = ctypes.create_string_buffer(bytes(path))
    read = compile_loop(bind(pool.delay_of_this_thread.py_func, {}, label="delay", scalar=scalar), (types.int64,)).entry
    files = len(list(Path("/proc/self/fd").iterdir()))
    assert read(ctypes.addressof(name)) == delay
    assert len(list(Path("/proc/self/fd").iterdir())) == files


def test_a_thread_that_waits_for_its_processor_is_crowded(tmp_path, monkeypatch):
    """The share of the time that has passed, of the same thread, asked every 20 ms, or 100 while it is crowded."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "schedstat"
    block = ctypes.create_string_buffer(pool.RANGES)
    control = ctypes.addressof(block)
    ctypes.memmove(control + pool.PATH, bytes(path.relative_to(Path.cwd())) + b"\0", len("schedstat") + 1)
    crowded = compile_loop(bind(pool.crowded.py_func, {}, label="crowded", scalar=scalar), (types.int64,) * 2).entry

    def asked(now: float, delay: float) -> bool:
        path.write_text(f"1 {int(1e9 * delay)} 1\n")
        return crowded(control, int(1e9 * now))

    assert not asked(10.0, 5.0)  # nothing to compare with
    assert not asked(11.0, 5.05)
    assert asked(12.0, 5.55)
    assert asked(12.09, 5.55)  # too soon to look again
    assert not asked(12.5, 5.56)
    assert not asked(12.519, 5.58)  # too soon, too
    assert asked(12.521, 5.58)
    assert not asked(12.8, 5.58)
    assert asked(13.5, 6.0)
    with_thread = threading.Thread(target=lambda: asked(14.5, 1.0))  # the time of another thread does not count
    with_thread.start()
    with_thread.join()
    assert asked(15.5, 1.0)
    assert not asked(16.5, 1.01)


BUSY_STEPS = """
import ctypes, time
import numpy as np, fastopt
from fastopt.kernels import pool
from fastopt.kernels.driver import DRIVER
from fastopt.kernels.threads import processors
from fastopt.measure.company import busy_processes

opt = fastopt.Adam({"w": np.ones(1_000_000, np.float32)})
jobs, steps = [], 0
with busy_processes(3 * processors()):
    for _ in range(3):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            opt.step()
            steps += 1
        jobs.append(ctypes.c_int64.from_address(DRIVER._pool.control + pool.EPOCH).value if DRIVER._pool else 0)
print(jobs[1] - jobs[0], jobs[2] - jobs[1], steps)
"""


def test_beside_busy_processes_workers_are_left_asleep(tmp_path):
    if len(Path("/proc/thread-self/schedstat").read_text().split()) != 3 or processors() > 16:
        pytest.skip("Linux does not tell here how long threads wait, or there are too many processors to keep busy")
    script = tmp_path / "script.py"
    script.write_text(BUSY_STEPS)
    finished = run(script, FASTOPT_NUM_THREADS="2", **compiled())
    first, second, steps = map(int, finished.stdout.split())
    assert first + second < 0.1 * steps, finished.stdout + finished.stderr


def test_the_first_job_of_a_loop_is_done_alone_and_later_ones_as_it_pays(monkeypatch):
    monkeypatch.setattr(DRIVER, "adaptive", True)
    monkeypatch.setattr(DRIVER, "mode", "pool")
    with using(2):
        opt = fastopt.SGD({"w": np.ones(50_003, np.float32)}, momentum=0.123)
        loop = opt._pipeline.plan.kernel(scaled=False)._loop
        loop.sites.clear()
        opt.step()
        (site,) = loop.sites.values()
        assert not site.words.any()
        if DRIVER._pool is not None:  # of tests before: it may have seen a busy machine
            word(pool.CROWDED).value, word(pool.SEEN_AT).value = 0, time.monotonic_ns()
        opt.step()
        assert site.words[COUNT // 8] == 1
        assert site.words[ALONE // 8] > 0


# --- the rare ways ----------------------------------------------------------------------------------------------------


def test_a_job_that_finds_the_pool_taken_is_done_alone(every_job):
    opt = fastopt.SGD({"w": np.ones(50_000)}, lr=0.5)
    opt.grads["w"][...] = 1.0
    opt.step()
    word(LOCK).value = 1
    try:
        before = word(EPOCH).value
        opt.step()
        assert word(EPOCH).value == before
    finally:
        word(LOCK).value = 0
    opt.step()
    assert word(EPOCH).value == before + 1
    assert (opt.params["w"] == -0.5).all()


def test_no_job_is_lost_where_no_worker_comes(every_job):
    """The launching thread claims every share itself, whatever the other threads do."""
    other = pool.Pool()  # of which no worker has been started
    opt = fastopt.SGD({"w": np.ones(100_000)}, lr=0.5)
    opt.grads["w"][...] = 1.0
    opt.step()
    ours, DRIVER._pool = DRIVER._pool, other
    other.asked = 7
    try:
        with using(7):
            opt.step()
    finally:
        DRIVER._pool = ours
    assert ctypes.c_int64.from_address(other.control + EPOCH).value == 1
    assert (opt.params["w"] == 0.0).all()


# --- scenarios, each in a process of its own --------------------------------------------------------------------------


def native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def stepped(opt: fastopt.Optimizer, steps: int = 30) -> bool:
    """Whether steps do what they should."""
    expected = opt.params["w"][0] - 0.5 * steps
    for _ in range(steps):
        opt.step()
    return bool((opt.params["w"] == expected).all())


def simple(size: int = 200_000) -> fastopt.Optimizer:
    opt = fastopt.SGD({"w": np.zeros(size)}, lr=0.5)
    opt.grads["w"][...] = 1.0
    return opt


def step_after_the_main_thread_has_ended() -> None:
    opt = simple()
    opt.step()
    main = threading.current_thread()

    def later() -> None:
        main.join()
        print("ok" if stepped(opt) else "wrong", flush=True)

    threading.Thread(target=later).start()


def first_step_after_the_main_thread_has_ended() -> None:
    opt, main = simple(), threading.current_thread()

    def later() -> None:
        main.join()
        print("ok" if stepped(opt) else "wrong", flush=True)

    threading.Thread(target=later).start()


def step_in_an_exit_handler() -> None:
    opt = simple()
    opt.step()
    atexit.register(lambda: print("ok" if stepped(opt) else "wrong", flush=True))


def exit_while_workers_sleep() -> None:
    opt = simple()
    print("ok" if stepped(opt) else "wrong", flush=True)
    time.sleep(0.05)


def exit_while_workers_spin() -> None:
    opt = simple()
    print("ok" if stepped(opt) else "wrong", flush=True)
    opt.step()


def exit_while_workers_work() -> None:
    opt = simple(20_000_000)
    opt.step()

    def for_ever() -> None:
        while True:
            opt.step()

    threading.Thread(target=for_ever, daemon=True).start()
    time.sleep(0.2)
    print("ok", flush=True)


def leave_at_once() -> None:
    exit_while_workers_work()
    os._exit(0)


def many_optimizers() -> None:
    simple().step()
    gc.collect()
    threads, before = native_threads(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(200):
        opt = simple(100_000 + number)
        assert stepped(opt, 5)
        del opt
        if number % 20 == 0:
            gc.collect()
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print("ok" if native_threads() <= threads + 2 and more < 50_000 else f"{more} KiB", flush=True)


def threads_that_the_system_refuses() -> None:
    opt = simple()
    assert stepped(opt)
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, most))  # room for about 30 stacks
    fastopt.set_num_threads(200)
    assert stepped(opt)
    count = native_threads()
    assert 2 < count < 150, count
    assert stepped(opt)
    print("ok" if native_threads() == count else "it tries again and again", flush=True)


def step_until_interrupted(opt: fastopt.Optimizer, seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    while True:
        opt.step()


def interrupts() -> None:
    """A handler that raises, at any moment of a step: when the step has raised, nobody writes any more."""
    opt = fastopt.AdamW({"w": np.zeros(300_000, np.float32)}, max_norm=1.0)
    opt.grads["w"][...] = 1.0
    opt.step()

    def handler(*_: Any) -> None:
        raise InterruptedError

    signal.signal(signal.SIGALRM, handler)
    for _ in range(300):
        with pytest.raises(InterruptedError):
            step_until_interrupted(opt, random.uniform(1e-5, 2e-3))
        there = opt.flat.data.copy()
        time.sleep(1e-4)
        assert (opt.flat.data == there).all()
    print("ok" if np.isfinite(opt.flat.data).all() else "wrong", flush=True)


def torch_before() -> None:
    torch = pytest.importorskip("torch")
    with_torch(torch)


def torch_after() -> None:
    assert stepped(simple())
    torch = pytest.importorskip("torch")
    with_torch(torch)


def with_torch(torch: Any) -> None:
    """Steps of ours between passes of torch, each with its own threads."""
    opt = simple()
    x, w = torch.randn(256, 256), torch.randn(256, 256, requires_grad=True)
    for _ in range(20):
        (x @ w).square().mean().backward()
        assert stepped(opt, 2)
    torch.set_num_threads(1)
    fastopt.set_num_threads(None)
    assert fastopt.get_num_threads() == 1
    print("ok", flush=True)


def workers_of_a_data_loader() -> None:
    torch = pytest.importorskip("torch")
    opt = simple()
    assert stepped(opt)

    class Steps(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return 8

        def __getitem__(self, number: int) -> int:
            return int(stepped(copy.deepcopy(opt), 20) and stepped(simple(50_000 + number), 20))

    loader = torch.utils.data.DataLoader(Steps(), num_workers=2, multiprocessing_context="fork", timeout=60)
    found = []
    for batch in loader:
        found += batch.tolist()
        assert stepped(opt, 3)
    print("ok" if found == [1] * 8 else f"{found}", flush=True)


def fork_with_every_thread_busy() -> None:
    """Children of a process in which two threads step all the time, one of them with the pool."""
    stop = threading.Event()
    wrong: list[str] = []

    def step(size: int) -> None:
        opt = simple(size)
        while not stop.is_set():
            if not stepped(opt, 50):
                wrong.append("a thread")

    threads = [threading.Thread(target=step, args=(size,)) for size in (100_000, 250_000)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if stepped(simple(), 20) else 3)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            wrong.append("a child")
    stop.set()
    for thread in threads:
        thread.join()
    print("ok" if not wrong else f"wrong: {wrong}", flush=True)


SCENARIOS: tuple[Callable[[], None], ...] = (
    step_after_the_main_thread_has_ended,
    first_step_after_the_main_thread_has_ended,
    step_in_an_exit_handler,
    exit_while_workers_sleep,
    exit_while_workers_spin,
    exit_while_workers_work,
    leave_at_once,
    many_optimizers,
    threads_that_the_system_refuses,
    interrupts,
    torch_before,
    torch_after,
    workers_of_a_data_loader,
    fork_with_every_thread_busy,
)


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_scenario(name):
    if name in ("torch_before", "torch_after", "workers_of_a_data_loader"):
        pytest.importorskip("torch")
    finished = run(__file__, "scenario", name, timeout=120.0, FASTOPT_NUM_THREADS="3", **compiled())
    assert (finished.returncode, finished.stdout) == (0, "ok\n"), finished.stderr[-2000:]


# --- stress -----------------------------------------------------------------------------------------------------------

KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SGD", {}),
    ("Adam", {}),
    ("AdamW", {"max_norm": 0.5, "ema": 0.9}),
    ("LAMB", {}),
    ("NovoGrad", {}),
    ("StableAdamW", {}),
)


def train(kind: int, size: int, steps: int) -> str:
    name, options = KINDS[kind]
    rng = np.random.default_rng(size)
    opt = getattr(fastopt, name)({"a": rng.normal(size=size), "b": rng.normal(size=(7, 13))}, lr=0.01, **options)
    for _ in range(steps):
        opt.grads["a"][...] = opt.params["a"] - 1.0
        opt.grads["b"][...] = opt.params["b"]
        opt.step()
    return digest_of(opt)


def normalise(size: int) -> str:
    rng = np.random.default_rng(size)
    x = rng.normal(size=(8, 16, size // 1024, 8))
    y, saved = fastopt.batchnorm_forward(x, np.ones(16), np.zeros(16))
    dx, *_ = fastopt.batchnorm_backward(x, saved)
    return hashlib.sha256(y.tobytes() + dx.tobytes()).hexdigest()


@cache
def expected(kind: int, size: int, steps: int) -> str:
    with using(1):
        return normalise(size) if kind == len(KINDS) else train(kind, size, steps)


JOBS = [(kind, size, 3) for kind in range(len(KINDS) + 1) for size in (1_500, 9_001, 30_000, 150_000)]


def stress(seconds: float) -> None:
    """Short jobs of all kinds from three Python threads, with forks, collections and interrupts. Prints what it did."""
    faulthandler.dump_traceback_later(seconds + 60.0, exit=True)  # the watchdog
    for job in JOBS:
        expected(*job)
    done = {"jobs": 0, "interrupts": 0, "forks": 0}
    wrong: list[Any] = []
    driver.SERIAL_BELOW = 0
    fastopt.set_num_threads(4)
    end = time.monotonic() + seconds
    lock = threading.Lock()

    def check(job: tuple[int, int, int]) -> None:
        found = normalise(job[1]) if job[0] == len(KINDS) else train(*job)
        if found != expected(*job):
            wrong.append((job, os.getpid()))
        with lock:
            done["jobs"] += 1

    def go_on(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            check(rng.choice(JOBS))
            if rng.random() < 0.02:
                gc.collect()

    def handler(*_: Any) -> None:
        raise InterruptedError

    signal.signal(signal.SIGALRM, handler)
    threads = [threading.Thread(target=go_on, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    rng = random.Random(99)
    while time.monotonic() < end:
        what = rng.random()
        DRIVER.choose(rng.choice(["pool", "pool", None]))
        fastopt.set_num_threads(rng.choice([2, 3, 4, 7]))
        if what < 0.1:
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                for job in rng.sample(JOBS, 3):
                    check(job)
                os._exit(1 if wrong else 0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            done["forks"] += 1
            if code != 0:
                wrong.append(("a child's exit code", code))
        elif what < 0.5:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
                check(rng.choice(JOBS))
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            except InterruptedError:
                done["interrupts"] += 1
        else:
            check(rng.choice(JOBS))
    for thread in threads:
        thread.join()
    print(f"wrong {wrong}; {done}; jobs of the pool {word(EPOCH).value}", flush=True)


def test_stress():
    finished = run(__file__, "stress", str(SECONDS), timeout=SECONDS + 120.0, **compiled())
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.startswith("wrong [];"), finished.stdout
    jobs = int(finished.stdout.split()[-1])
    assert jobs > 5 * SECONDS  # that the pool was at work; how often depends on what else the machine does


if __name__ == "__main__":
    if sys.argv[1] == "stress":
        stress(float(sys.argv[2]))
    else:
        DRIVER.choose("pool")
        {scenario.__name__: scenario for scenario in SCENARIOS}[sys.argv[2]]()
