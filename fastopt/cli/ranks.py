"""``fastopt train`` on several processes: how they are started, and how one of them learns that it is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

OF_MPIEXEC = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
"""Variables in which the starters of MPICH and of Open MPI leave the number of processes."""

OF_GLOO = "FASTOPT_RANK"
"""That in which `start` leaves ``rank/size/file`` for a process of torch.distributed."""

THREADS = ("FASTOPT_NUM_THREADS", "OMP_NUM_THREADS")

LACKING = (
    "needs mpi4py and an MPI, or torch, to start processes, got neither; pip install 'fastopt[mpi]' mpich, or "
    "pip install 'fastopt[torch]'"
)


def world() -> Any:
    """Return the communicator of this process, if it is one of several; else None.

    Raises:
        ValueError: mpiexec has started several processes, and mpi4py is not installed.
    """
    given = os.environ.get(OF_GLOO)
    if given is not None:
        import torch

        rank, size, store = given.split("/", 2)
        where: dict[str, Any] = {"rank": int(rank), "world_size": int(size), "init_method": f"file://{store}"}
        torch.distributed.init_process_group("gloo", **where)
        return torch.distributed.group.WORLD
    sizes = [os.environ[name] for name in OF_MPIEXEC if name in os.environ]
    if not any(size.isdecimal() and int(size) > 1 for size in sizes):
        return None
    if importlib.util.find_spec("mpi4py") is None:
        raise ValueError(f"needs mpi4py, because mpiexec has started {sizes[0]} processes; pip install 'fastopt[mpi]'")
    from mpi4py import MPI

    return MPI.COMM_WORLD


def start(size: int, arguments: Sequence[str]) -> int:
    """Run ``fastopt`` with these arguments on several processes; return the exit code of the first that has failed.

    Raises:
        ValueError: nothing is installed by which processes could be started.
    """
    threads = str(max(1, (os.cpu_count() or 1) // size))
    environment = {**dict.fromkeys(THREADS, threads), **os.environ}
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is not None and importlib.util.find_spec("mpi4py") is not None:
        # mpi4py's own runner ends all processes where one has raised an error; otherwise the others wait for ever.
        command = [mpiexec, "-n", str(size), sys.executable, "-m", "mpi4py", "-m", "fastopt", *arguments]
        return subprocess.call(command, env=environment)
    if importlib.util.find_spec("torch") is None:
        raise ValueError(LACKING)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastopt", *arguments]
        of_ranks = [{**environment, OF_GLOO: f"{rank}/{size}/{folder}/store"} for rank in range(size)]
        processes = [subprocess.Popen(command, env=of_rank) for of_rank in of_ranks]
        try:
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                time.sleep(0.05)
        finally:  # the others wait for one that has failed
            for process in processes:
                process.kill()
                process.wait()
    return next((code for code in codes if code), 0)


def given_arguments(ctx: typer.Context, without: str) -> list[str]:
    """Return the command and its options as they were given, without one of them."""
    found = [str(ctx.command.name)]
    for option in ctx.command.params:
        name = str(option.name)
        if name == without or getattr(ctx.get_parameter_source(name), "name", "") != "COMMANDLINE":
            continue
        value = ctx.params[name]
        for each in value if isinstance(value, list | tuple) else [value]:
            found += [option.opts[0]] if each is True else [option.opts[0], str(each)]
    return found
