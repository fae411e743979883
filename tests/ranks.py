"""Run checks on several ranks: threads of this process, processes of MPI, or processes of torch.distributed by gloo.

A check is a function of a communicator, whose name begins with ``check_``. `launch` runs all checks of a test module
in one launch, because to start MPI and import fastopt takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts import ROOT, compiled, run

HERE = Path(__file__).resolve()
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
LACKING = {
    "mpi": "" if importlib.util.find_spec("mpi4py") and MPIEXEC else "needs mpi4py and an MPI, as of pip install mpich",
    "gloo": "" if importlib.util.find_spec("torch") else "needs torch",
}
"""By engine: why it cannot run here; "" where it can."""


def checks_of(module: ModuleType) -> dict[str, Callable[[Any], None]]:
    return {name: thing for name, thing in vars(module).items() if name.startswith("check_")}


def launch(engine: str, size: int, module: str, *names: str, timeout: float = 120.0) -> str:
    """Run checks of a test module on as many processes; return what they printed, once none has failed.

    names : of the checks; none: all.
    """
    path = os.pathsep.join([str(ROOT), str(HERE.parent)])
    environment = {**compiled(), "FASTOPT_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    starter = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    own = [str(size), module, *names]
    if engine == "mpi":
        command = ["-c", starter, str(MPIEXEC), "-n", str(size), sys.executable, "-m", "mpi4py", str(HERE), "mpi", *own]
    else:
        command = [str(HERE), "start", engine, *own]
    done = run(*command, timeout=timeout, **environment)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("every check passed") == size, output
    return output


def start(engine: str, size: str, *more: str) -> int:
    """Start the processes of torch.distributed; return 1 where one has failed, after the end of all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE), engine, size, *more, f"store={folder}/store"]
        processes = [subprocess.Popen([*command, f"rank={rank}"]) for rank in range(int(size))]
        while None in (codes := [process.poll() for process in processes]):
            if any(codes):  # the others wait for one that has failed
                for process in processes:
                    process.kill()
            time.sleep(0.05)
    return int(any(codes))


@contextmanager
def communicator(engine: str, size: int, options: dict[str, str]) -> Iterator[Any]:
    """The world of this process, as users have it."""
    if engine == "mpi":
        from mpi4py import MPI

        assert MPI.COMM_WORLD.size == size
        yield MPI.COMM_WORLD
        return
    import torch

    where = {"rank": int(options["rank"]), "world_size": size, "init_method": f"file://{options['store']}"}
    torch.distributed.init_process_group("gloo", **where)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def main(engine: str, size: str, module: str, *more: str) -> None:
    """In one of the processes: run the checks."""
    options = dict(each.split("=", 1) for each in more if "=" in each)
    names = [each for each in more if "=" not in each]
    found = importlib.import_module(module)
    with communicator(engine, int(size), options) as world:
        for name in names or checks_of(found):
            getattr(found, name)(world)
    print("every check passed", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "start":
        sys.exit(start(*sys.argv[2:]))
    main(*sys.argv[1:])
