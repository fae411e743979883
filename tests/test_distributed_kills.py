"""Ranks that are killed while they train and save: the file always loads, and is that of one process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import HERE, LACKING, MPIEXEC
from scripts import ROOT, compiled

import fastopt
from fastopt.communicators import communicator_of

KILLS = 12
FILE = "run.safetensors"


def params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"W": rng.normal(size=(300, 50)).astype(np.float32), "b": np.zeros(50, np.float32)}


def gradients(step: int, rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((step, rank))
    return {name: rng.normal(size=array.shape).astype(np.float32) for name, array in params().items()}


def optimizer(comm: Any = None) -> fastopt.Optimizer:
    return fastopt.AdamW(params(), lr=0.01, max_norm=1.0, ema=0.9, comm=comm)


def train(world: Any) -> None:
    """What each rank runs: resume, then step and save until it is killed, or for so many steps."""
    folder, comm = Path(os.environ["RANKS_FOLDER"]), communicator_of(world)
    assert comm is not None
    opt = optimizer(world)
    if (folder / FILE).exists():
        opt.load(folder / FILE)
    last = opt.step_count + int(os.environ["RANKS_STEPS"])
    (folder / "pids" / str(os.getpid())).touch()
    while opt.step_count < last:
        opt.step(gradients(opt.step_count, comm.rank))
        opt.save(folder / FILE)


def started(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **compiled(), "FASTOPT_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent)])}
    environment |= {"RANKS_FOLDER": str(folder), "RANKS_STEPS": str(steps)}
    command = [
        str(MPIEXEC),
        "-n",
        "2",
        sys.executable,
        "-m",
        "mpi4py",
        str(HERE),
        "mpi",
        "2",
        "test_distributed_kills",
        "train",
    ]
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=output, stderr=output)


def wait_for(condition: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def have_ended(pids: list[int]) -> bool:
    return not any(map(is_running, pids))


@pytest.mark.skipif(bool(LACKING["mpi"]), reason=LACKING["mpi"])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_run_that_is_killed_goes_on_where_one_process_would(tmp_path):
    draw = random.Random(0)
    pids = tmp_path / "pids"
    pids.mkdir()
    alone, resumed = optimizer(), optimizer()

    def check() -> None:
        resumed.load(tmp_path / FILE)
        assert resumed.step_count >= alone.step_count
        while alone.step_count < resumed.step_count:
            for rank in range(2):
                alone.accumulate(gradients(alone.step_count, rank))
            alone.step()
        for name in alone.params:
            np.testing.assert_array_equal(resumed.params[name], alone.params[name])
            np.testing.assert_array_equal(resumed.ema[name], alone.ema[name])
            for state in ("m", "v"):
                np.testing.assert_array_equal(resumed.states[state][name], alone.states[state][name])

    process = None
    try:
        for number in range(KILLS):
            for pid in pids.iterdir():
                pid.unlink()
            process = started(tmp_path, 10**6)
            wait_for(lambda: len(list(pids.iterdir())) == 2, 60.0, "two ranks should have begun")
            ranks = sorted(int(pid.name) for pid in pids.iterdir())
            time.sleep(draw.uniform(0.0, 0.3))
            if number % 2:
                os.kill(ranks[number % 4 // 2], signal.SIGKILL)  # one rank, and MPI ends the other one
            else:
                os.killpg(process.pid, signal.SIGKILL)
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)
            process.wait(20.0)
            wait_for(partial(have_ended, ranks), 20.0, f"ranks {ranks} should have ended")
            if (tmp_path / FILE).exists():
                check()
        process = started(tmp_path, 3)
        assert process.wait(60.0) == 0, (tmp_path / "output").read_text()
        check()
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert alone.step_count > KILLS
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FILE, "output", "pids"])
