"""Steps of Adam on two processes with a thread each, against one process with two; and the cost of shorter messages.

The processes are of MPI (mpi4py and mpiexec). They are started once for a group, and wait for the name of a job on a
pipe, asleep, so that they do not disturb the other contestants. A call makes several steps, beside which the pipe is
short. ``exchange`` sums the gradients and sends the parameters, without a step; ``half a step`` is the step of one of
two parts, on one thread, without an exchange.

The file is also the program of the processes: ``python -m mpi4py bench_ranks.py SIZE STEPS``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if __name__ != "__main__":  # the processes need neither of them
    from groups import Group, by_name, each_contestant

import fastopt
from fastopt.kernels.cpu.wire import codec
from fastopt.measure import Result, compare
from fastopt.measure.limit import copy

CASES = {"1M": (2**20, 10), "30M": (30_000_000, 1)}
"""Parameters, and steps of a call."""
WAYS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {},
    "data parallel": {"shard": False},
    "order fixed": {"order": "fixed"},
    "ZeRO-1, bfloat16": {"wire": "bfloat16"},
    "ZeRO-1, int8": {"wire": "int8"},
}
"""Of the optimizer on two processes."""
EXCHANGE, HALF = "exchange", "half a step"
RANKS = 2
END = "end"


def arrays(size: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(0).standard_normal(size, dtype=np.float32)}


def step_of(size: int, **options: Any) -> Callable[[], Any]:
    opt, grads = fastopt.Adam(arrays(size), **options), arrays(size)
    return lambda: opt.step(grads)


# --- in one of the processes ------------------------------------------------------------------------------------------


def exchange_of(world: Any, size: int) -> Callable[[], Any]:
    comm = fastopt.distributed.communicator_of(world)
    assert comm is not None
    part = -(-size // RANKS)
    gradients, own, params = (np.ones(count, np.float32) for count in (RANKS * part, part, RANKS * part))

    def exchange() -> None:
        comm.reduce_scatter(gradients, own)
        comm.allgather(params[comm.rank * part : (comm.rank + 1) * part], params)

    return exchange


def serve(size: int, steps: int) -> None:
    """Do the jobs whose names come in lines; the first process reads them, and tells the other one."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        way: lambda options=options: step_of(size, comm=world, **options)  # type: ignore[misc]
        for way, options in WAYS.items()
    }
    makers[EXCHANGE] = lambda: exchange_of(world, size)
    names, made = [*makers, END], {}
    number = np.zeros(1, np.int64)
    while True:
        if world.rank == 0:
            number[0] = names.index(sys.stdin.readline().strip() or END)
        request = world.Ibcast(number)
        while not request.Test():  # a process that waits in MPI keeps its core busy
            time.sleep(2e-4)
        name = names[number[0]]
        if name == END:
            return
        if name not in made:
            made[name] = makers[name]()
        for _ in range(steps):
            made[name]()
        if world.rank == 0:
            print("done", flush=True)


# --- the groups -------------------------------------------------------------------------------------------------------


class Processes:
    """Those of MPI, which do what they are told."""

    def __init__(self, mpiexec: str, size: int, steps: int):
        program = [sys.executable, "-m", "mpi4py", str(Path(__file__).resolve()), str(size), str(steps)]
        environment = {**os.environ, "FASTOPT_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [mpiexec, "-n", str(RANKS), *program]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, job: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(job, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if line.strip() != "done":
            raise RuntimeError(f"{job}: the processes of MPI have ended")

    def end(self) -> None:
        if self._process.poll() is None:
            print(END, file=self._process.stdin, flush=True)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.communicate()  # which closes the pipes


def lacking() -> str:
    """Why there are no processes of MPI; "" where there are."""
    return "" if find_spec("mpi4py") and _mpiexec() else "mpi4py or mpiexec is not installed"


def _mpiexec() -> str | None:
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def group_of(name: str) -> Group:
    size, steps = CASES[name]

    def repeated(step: Callable[[], Any], threads: int) -> Callable[[], Any]:
        def call() -> None:
            fastopt.set_num_threads(threads)
            for _ in range(steps):
                step()
            fastopt.set_num_threads(None)

        return call

    def run(title: str, **how: Any) -> Result:
        whole = step_of(size)
        contestants = {"fastopt": repeated(whole, RANKS), "one thread": repeated(whole, 1)}
        contestants[HALF] = repeated(step_of(size // RANKS), 1)
        facts = {"parameters": size, "steps": steps, "ranks": RANKS}
        reason = lacking()
        jobs = (*WAYS, EXCHANGE)
        if reason:
            return compare(title, contestants, absent=dict.fromkeys(jobs, reason), **facts, **how)
        processes = Processes(str(_mpiexec()), size, steps)
        try:
            contestants |= {job: lambda job=job: processes.do(job) for job in jobs}  # type: ignore[misc]
            return compare(title, contestants, **facts, **how)
        finally:
            processes.end()

    seconds = 2.0 if size < 2**21 else 20.0
    return Group(f"Adam, 2 ranks, {name}", ("fastopt", "one thread", HALF, *WAYS, EXCHANGE), run, seconds, size)


def messages_of(name: str) -> Group:
    size = CASES[name][0]

    def run(title: str, **how: Any) -> Result:
        numbers = arrays(size)["w"]
        found, errors = np.empty_like(numbers), np.zeros_like(numbers)
        contestants: dict[str, Callable[[], Any]] = {}
        for kind, ours in (("int8", "fastopt"), ("bfloat16", "bfloat16, encode")):
            message = np.zeros(codec(kind).size_of(size), np.uint8)
            contestants[ours] = lambda kind=kind, to=message: codec(kind).encode(numbers, to, errors)  # type: ignore[misc]
            contestants[f"{kind}, add"] = lambda kind=kind, of=message: codec(kind).decode(of, found, add=True)  # type: ignore[misc]
        contestants["copy"] = lambda: copy(numbers, found)
        return compare(title, contestants, parameters=size, **how)

    contestants = ("fastopt", "int8, add", "bfloat16, encode", "bfloat16, add", "copy")
    return Group(f"messages, {name}", contestants, run, 0.6, size, title=f"encode int8, {name}")


if __name__ != "__main__":
    STEPS = by_name(group_of(name) for name in CASES)
    MESSAGES = by_name(messages_of(name) for name in CASES)

    @pytest.mark.parametrize(**each_contestant(STEPS))
    def test_step(measure, group, contestant):
        measure(STEPS[group], contestant)

    @pytest.mark.parametrize(**each_contestant(MESSAGES))
    def test_message(measure, group, contestant):
        measure(MESSAGES[group], contestant)

else:
    serve(int(sys.argv[1]), int(sys.argv[2]))
