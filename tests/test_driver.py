"""Threads and forks: the same bits whoever computes them, and no process that dies or hangs.

The file is also the script that its tests run in processes of their own: ``python test_driver.py drivers`` and
``python test_driver.py scenarios pool|omp|workqueue`` print one JSON object a line.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
from scripts import compiled, run

import fastopt
from fastopt.kernels import driver, pool
from fastopt.kernels.driver import DRIVER
from fastopt.kernels.threads import using
from fastopt.storage import layout as layout_module
from fastopt.storage.layout import Layout

BELOW = (100, 33)  # what is worth one thread, and more, whatever the threads
ABOVE = (driver.SERIAL_BELOW_ELSEWHERE // 2 + 4001, driver.SERIAL_BELOW_ELSEWHERE // 2 + 13_627)
LARGE = (1, 7, 4097, 65_537, 100_003, 33, 50_001)  # 219,679 elements, none a multiple of a vector or a block
assert sum(LARGE) > driver.SERIAL_BELOW_ELSEWHERE

needs_pool = pytest.mark.skipif(pool.why_not() is not None, reason=str(pool.why_not()))


def train(name: str, sizes: tuple[int, ...], dtype: Any = np.float32, steps: int = 3, seed: int = 0) -> str:
    """A digest of every bit of the parameters and states after `steps` steps."""
    rng = np.random.default_rng(seed)
    opt = getattr(fastopt, name)(
        {f"p{k}": rng.normal(size=size).astype(dtype) for k, size in enumerate(sizes)}, lr=0.01
    )
    noise = rng.normal(size=opt.flat.size).astype(dtype)
    for _ in range(steps):
        for grad, param in zip(opt.grads.values(), opt.params.values(), strict=True):
            grad[...] = param + noise[: grad.size]
        opt.step()
    digest = hashlib.sha256(opt.flat.data)
    for tree in opt.states.values():
        for leaf in tree.values():
            digest.update(leaf)
    return digest.hexdigest()


# --- the same bits from every driver and any number of threads --------------------------------------------------------

POOLS = [("pool", threads) for threads in (2, 3, 4, 7) if pool.why_not() is None]
DRIVERS = (("serial", 1), ("numba", 2), ("numba", 3), ("executor", 2), ("executor", 3), *POOLS)
TRAINED = [(name, dtype) for name in ("Adam", "LAMB") for dtype in ("float32", "float64")]


def jobs_of_the_pool() -> int:
    """How many jobs the pool of this process has run."""
    return 0 if DRIVER._pool is None else ctypes.c_int64.from_address(DRIVER._pool.control + pool.EPOCH).value


def report_drivers() -> None:
    """Train under every driver; say which of them really ran."""
    calls = dict.fromkeys(("numba", "executor"), 0)

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls[kind] += 1
            return function(*arguments, **keywords)

        return call

    DRIVER._numba = counted("numba", DRIVER._numba)
    DRIVER._run_in_executor = counted("executor", DRIVER._run_in_executor)
    for name, dtype in TRAINED:
        for mode, threads in DRIVERS:
            DRIVER.choose("executor" if mode == "serial" else mode)
            fastopt.set_num_threads(threads)
            before = {**calls, "pool": jobs_of_the_pool()}
            digest = train(name, LARGE, dtype)
            after = {**calls, "pool": jobs_of_the_pool()}
            ran = {kind: after[kind] - before[kind] for kind in after if after[kind] != before[kind]}
            print(json.dumps({"key": [name, dtype, mode, threads], "digest": digest, "ran": ran}), flush=True)


@pytest.fixture(scope="module")
def driven() -> dict[tuple[Any, ...], dict[str, Any]]:
    finished = run(__file__, "drivers", NUMBA_NUM_THREADS="4", timeout=120.0, **compiled())
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    return {tuple(line["key"]): line for line in lines}


@pytest.mark.parametrize(("name", "dtype"), TRAINED)
def test_every_driver_and_thread_count_gives_the_same_bits(driven, name, dtype):
    digests = {key[2:]: line["digest"] for key, line in driven.items() if key[:2] == (name, dtype)}
    assert set(digests) == set(DRIVERS)
    assert digests == dict.fromkeys(DRIVERS, digests["serial", 1])


@pytest.mark.parametrize(("name", "launches"), [("Adam", 3), ("LAMB", 6)])  # a layerwise step is two loops
def test_the_driver_asked_for_is_the_one_that_ran(driven, name, launches):
    for key, line in driven.items():
        if key[0] == name:
            assert line["ran"] == ({} if key[2] == "serial" else {key[2]: launches}), key


def test_optimizers_dtypes_and_seeds_have_different_digests():
    # The test of the tests above: a digest that ignored its input would pass them all.
    digests = {train("Adam", BELOW, dtype, seed=seed) for dtype in ("float32", "float64") for seed in (0, 1)}
    assert len(digests) == 4


# --- the same bits for any chunks -------------------------------------------------------------------------------------


@pytest.fixture
def shared_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every loop runs on three threads, however small it is."""
    monkeypatch.setattr(driver, "SERIAL_BELOW", 0)
    before = DRIVER.mode, DRIVER.adaptive
    DRIVER.choose("executor" if pool.why_not() else "pool")
    with using(3):
        yield
    DRIVER.mode, DRIVER.adaptive = before


@pytest.mark.parametrize("name", ["Adam", "LAMB"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_chunk_length_gives_the_same_bits(shared_out, monkeypatch, name, dtype):
    digests = {}
    for longest in (10**9, 1, 16, 17, 100, 4096, 5000, 8192):
        monkeypatch.setattr(layout_module, "MIN_CHUNK", longest)
        monkeypatch.setattr(layout_module, "MAX_CHUNK", longest)
        digests[longest] = train(name, (30_011, 1, 12_289, 4096, 7), dtype, steps=2)
    assert digests == dict.fromkeys(digests, digests[10**9])


def test_the_chunk_length_is_what_the_test_above_sets(monkeypatch):
    layout = Layout.of([(100_000,)])
    default = len(layout.chunks([0]))
    for longest in (16, 4096, 10**9):
        monkeypatch.setattr(layout_module, "MIN_CHUNK", longest)
        monkeypatch.setattr(layout_module, "MAX_CHUNK", longest)
        assert len(layout.chunks([0])) == -(-100_000 // longest) != default


@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_packing_changes_no_bit(shared_out, name):
    """A parameter gets from the packed step what it gets alone: sums start with it, wherever it lies in the buffer."""
    rng = np.random.default_rng(6)
    rule = getattr(fastopt.rules, name)
    params = {f"p{k}": rng.normal(size=size) for k, size in enumerate((5, 30_011, 17, 9000))}
    opt = fastopt.Optimizer(params, rule)
    alone = {path: [p.copy(), *(np.zeros_like(p) for _ in rule.states)] for path, p in params.items()}
    for t in (1, 2, 3):
        grads = {path: rng.normal(size=p.shape) for path, p in params.items()}
        opt.step(grads)
        for path, (p, *states) in alone.items():
            rule.update_(p, grads[path], *states, t=t)
    for path, (p, *states) in alone.items():
        assert opt.params[path].tobytes() == p.tobytes(), path
        for state, expected in zip(rule.states, states, strict=True):
            assert opt.states[state][path].tobytes() == expected.tobytes(), (path, state)


# --- what the driver leaves alone -------------------------------------------------------------------------------------


def test_a_small_buffer_never_reaches_the_driver(monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("the driver was asked to run a loop that is not worth it")

    monkeypatch.setattr(DRIVER, "run", refuse)
    opt = fastopt.SGD({"w": np.ones(driver.SERIAL_BELOW - 16), "b": np.ones(3)}, lr=0.5)
    opt.step({"w": np.ones(driver.SERIAL_BELOW - 16), "b": np.ones(3)})
    assert (opt.params["w"] == 0.5).all()
    larger = fastopt.SGD({"w": np.ones(driver.SERIAL_BELOW)}, lr=0.5)
    with pytest.raises(AssertionError, match="the driver was asked"):
        larger.step({"w": np.ones(driver.SERIAL_BELOW)})


STARTS = """
import os, threading
import numpy as np, fastopt
from numba.np.ufunc import parallel

def threads():
    return len(os.listdir("/proc/self/task"))

small, large = (fastopt.SGD([np.ones(n), np.ones(7)], lr=0.5) for n in (1000, 100_000))
before = threads()
for _ in range(5):
    small.step()
print("after small steps", threads() - before)
fastopt.set_num_threads(1)
for _ in range(5):
    large.step()
print("on one thread", threads() - before)
fastopt.set_num_threads(3)
large.step()
large.step()
print("on three", threads() - before)
print("numba's layer", parallel._is_initialized, "threads of Python", threading.active_count())
"""


@needs_pool
def test_nothing_is_started_before_a_job_is_worth_a_second_thread(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STARTS)
    finished = run(script)
    assert finished.stdout.splitlines() == [
        "after small steps 0",
        "on one thread 0",
        "on three 2",
        "numba's layer False threads of Python 1",
    ], finished.stderr


def test_a_threading_layer_that_is_not_installed_costs_threads_and_nothing_else(tmp_path):
    # numba then raises ValueError wherever it is asked for threads. (With tbb installed there is nothing to survive.)
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np, fastopt\n"
        "from fastopt.kernels import driver\n"
        "driver.why_not = lambda: 'not here'\n"
        "opt = fastopt.SGD([np.ones(100_000), np.ones(7)], lr=0.25)\n"
        "for _ in range(2):\n"
        "    opt.step([np.ones(100_000), np.ones(7)])\n"
        "print(all((p == 0.5).all() for p in opt.params), driver.DRIVER.mode, driver.DRIVER.reason)\n"
    )
    finished = run(script, NUMBA_THREADING_LAYER="tbb", NUMBA_NUM_THREADS="4")
    assert (finished.returncode, finished.stdout.strip()) == (0, "True executor not here"), finished.stderr


# --- threads at once, and forks ---------------------------------------------------------------------------------------

TRAININGS = [("Adam", ABOVE), ("Adam", BELOW), ("LAMB", ABOVE)]


def train_all(steps: int = 3) -> list[str]:
    return [train(name, sizes, steps=steps) for name, sizes in TRAININGS]


def serially(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` on this thread alone."""
    with using(1):
        return function(*arguments)


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Each job on a thread of its own, all released at once; what they returned, or raised."""
    results: list[Any] = [None] * len(jobs)
    gate = threading.Barrier(len(jobs))

    def work(k: int) -> None:
        gate.wait()
        try:
            results[k] = jobs[k]()
        except BaseException as error:
            results[k] = repr(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_child(job: Callable[[], Any]) -> Any:
    """`job` in a forked child: what it returned as JSON, with the child's exit code where that is not 0."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(30)  # a child that hangs dies of it, and is seen by its exit code
            os.write(writer, json.dumps(job()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(text) if code == 0 else f"exit code {code}"


def mode() -> str | None:
    return DRIVER.mode


def mode_of_a_child() -> str:
    return "pool" if ASKED == "pool" else "executor"


def send_trained(pipe: Any) -> None:
    signal.alarm(30)
    pipe.send(train("Adam", ABOVE))


def by_multiprocessing(method: str) -> list[Any]:
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_trained, args=(sender,))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = "nothing"
    process.join()
    return [result, process.exitcode]


ASKED = sys.argv[2] if __name__ == "__main__" and len(sys.argv) > 2 else "pool"
"""Whose threads the scenarios run on: ours, or those of one of numba's layers, as where there is no pool."""

# Each returns (found, expected). They run in this order in one process, which is still fresh in `compile_at_once`.

forked_early: list[Any] = []
"""What a child returned that was forked before this process compiled or ran anything."""


def compile_at_once() -> tuple[Any, Any]:
    return in_threads(train_all, train_all), [serially(train_all)] * 2


def fork_before_the_first_step() -> tuple[Any, Any]:
    return forked_early, [serially(train, "SGD", ABOVE)]


def driver_chosen() -> tuple[Any, Any]:
    return mode(), {"pool": "pool", "omp": "numba", "workqueue": "executor"}[ASKED]


def step_at_once() -> tuple[Any, Any]:
    kinds = [("Adam", ABOVE), ("Adam", ABOVE), ("LAMB", ABOVE), ("Adam", BELOW)]
    found = in_threads(*[lambda kind=kind: train(*kind, steps=200) for kind in kinds])
    return found, [serially(train, *kind, np.float32, 200) for kind in kinds]


def fork_after_a_step() -> tuple[Any, Any]:
    return in_child(lambda: [train_all(), mode()]), [serially(train_all), mode_of_a_child()]


def fork_and_parent_both_go_on() -> tuple[Any, Any]:
    return [in_child(train_all), train_all(), in_child(train_all), train_all()], [serially(train_all)] * 4


def fork_in_a_fork() -> tuple[Any, Any]:
    found = in_child(lambda: [train_all(), in_child(lambda: [train_all(), mode()]), train_all()])
    expected = serially(train_all)
    return found, [expected, [expected, mode_of_a_child()], expected]


def threads_in_a_fork() -> tuple[Any, Any]:
    return in_child(lambda: in_threads(train_all, train_all)), [serially(train_all)] * 2


def compile_in_a_fork() -> tuple[Any, Any]:
    found = in_child(lambda: train("Momentum", ABOVE))
    return found, serially(train, "Momentum", ABOVE)


def fork_while_a_thread_steps() -> tuple[Any, Any]:
    stop = threading.Event()
    stepped: list[str] = []

    def step() -> None:
        while not stop.is_set():
            stepped.append(train("Adam", ABOVE))

    thread = threading.Thread(target=step)
    thread.start()
    forked = []
    for _ in range(8):
        time.sleep(0.003)
        forked.append(in_child(train_all))
    stop.set()
    thread.join()
    expected = serially(train_all)
    return [forked, sorted(set(stepped))], [[expected] * 8, [expected[0]]]


def fork_while_a_thread_compiles() -> tuple[Any, Any]:
    # The thread holds our lock and numba's. The child must inherit neither, and must be able to compile.
    thread = threading.Thread(target=lambda: [train(name, ABOVE) for name in ("RMSprop", "Adagrad", "Yogi")])
    thread.start()
    forked = []
    while len(forked) < 3 and thread.is_alive():
        time.sleep(0.02)
        forked.append(in_child(lambda: [train_all(), train("Adadelta", ABOVE)]))
    thread.join()
    return forked, [[serially(train_all), serially(train, "Adadelta", ABOVE)]] * max(1, len(forked))


def fork_while_a_user_compiles() -> tuple[Any, Any]:
    # numba's lock alone, which a child needs for the loops that it has not compiled yet.
    def compile_functions() -> None:
        for number in range(12):
            numba.njit(lambda x: np.sort(x)[number:] + x.mean())(np.ones(20))  # noqa: B023 - called here

    thread = threading.Thread(target=compile_functions)
    thread.start()
    time.sleep(0.05)
    forked = in_child(lambda: train("Adamax", ABOVE))
    compiled_meanwhile = thread.is_alive()
    thread.join()
    return [forked, compiled_meanwhile], [serially(train, "Adamax", ABOVE), True]


def threads_counted_in_a_fork() -> tuple[Any, Any]:
    numba.set_num_threads(1)  # starts numba's threads, which a child does not have
    found = in_child(lambda: [fastopt.set_num_threads(None), fastopt.get_num_threads()])
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    with using(5):
        return [found, in_child(fastopt.get_num_threads)], [[None, 1], 5]


def multiprocessing_fork() -> tuple[Any, Any]:
    return by_multiprocessing("fork"), [serially(train, "Adam", ABOVE), 0]


def multiprocessing_spawn() -> tuple[Any, Any]:
    return by_multiprocessing("spawn"), [serially(train, "Adam", ABOVE), 0]


SCENARIOS = (
    compile_at_once,
    fork_before_the_first_step,
    driver_chosen,
    step_at_once,
    fork_after_a_step,
    fork_and_parent_both_go_on,
    fork_in_a_fork,
    threads_in_a_fork,
    compile_in_a_fork,
    fork_while_a_thread_steps,
    fork_while_a_thread_compiles,
    fork_while_a_user_compiles,
    threads_counted_in_a_fork,
    multiprocessing_fork,
    multiprocessing_spawn,
)


def report_scenarios() -> None:
    if ASKED != "pool":
        driver.why_not = lambda: "for a test"
    fastopt.set_num_threads(4)
    DRIVER.choose("pool" if ASKED == "pool" else None)
    if hasattr(os, "fork"):
        forked_early.append(in_child(lambda: train("SGD", ABOVE)))
    kept = os.environ["FASTOPT_CACHE_DIR"]
    for scenario in SCENARIOS:
        if "fork" in scenario.__name__ and not hasattr(os, "fork"):
            continue
        anew = ASKED == "pool" and "compile" in scenario.__name__  # and loads nothing
        os.environ["FASTOPT_CACHE_DIR"] = "0" if anew else kept
        found, expected = scenario()
        print(json.dumps({"scenario": scenario.__name__, "found": str(found), "expected": str(expected)}), flush=True)


@pytest.fixture(scope="module", params=[pytest.param("pool", marks=needs_pool), "omp", "workqueue"])
def process(request) -> Any:
    environment = {"NUMBA_THREADING_LAYER": "default" if request.param == "pool" else request.param, **compiled()}
    return run(__file__, "scenarios", request.param, NUMBA_NUM_THREADS="4", timeout=180.0, **environment)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_nothing_dies_hangs_or_differs(process, scenario):
    if "fork" in scenario and not hasattr(os, "fork"):
        pytest.skip("this system has no os.fork")
    results = {line["scenario"]: line for line in map(json.loads, process.stdout.splitlines())}
    reached = scenario in results
    assert reached, f"the process ended with {process.returncode} before or in this scenario: {process.stderr[-2000:]}"
    assert results[scenario]["found"] == results[scenario]["expected"]


def test_a_process_with_threads_and_forks_behind_it_exits_cleanly(process):
    assert process.returncode == 0, process.stderr[-2000:]


if __name__ == "__main__":
    {"drivers": report_drivers, "scenarios": report_scenarios}[sys.argv[1]]()
