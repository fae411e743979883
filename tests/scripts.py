"""Run a Python file in a separate process: threads, forks, imports and caches are properties of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import fastopt

ROOT = Path(fastopt.__file__).parents[1]
SETTINGS = (
    "FASTOPT_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMBA_THREADING_LAYER",
)  # set by the test, never inherited


def on_terminal(*arguments: str | Path) -> tuple[str, str]:
    """Run ``python -m fastopt *arguments``; return its output to a terminal (standard error) and to standard output."""
    import pty  # POSIX only

    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "fastopt", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # raised by Linux when the other side has closed
                break
            if not piece:
                break
            shown += piece
        out = process.communicate(timeout=60)[0]
    os.close(ours)
    return shown.decode(), out.decode()


def compiled() -> dict[str, str]:
    """For `run`: where the tests keep compiled kernels, for a process that need not compile its own."""
    return {"FASTOPT_CACHE_DIR": os.environ["FASTOPT_CACHE_DIR"]}


def run(*arguments: str | Path, timeout: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` with this environment on top of ours; kill it and its children after `timeout`.

    Kernels are compiled anew, and not kept, unless the environment says where: see `compiled`.
    """
    # Drop pytest-xdist's variables: a pytest in the child would believe that it runs in a worker.
    kept = [name for name in os.environ if name not in SETTINGS and not name.startswith("PYTEST_")]
    inherited = {name: os.environ[name] for name in kept}
    path = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        env={**inherited, "PYTHONPATH": path, "FASTOPT_CACHE_DIR": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a separate process group, so that its children can be killed with it
    )
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        out, error = process.communicate()
        error += f"\nkilled: it ran longer than {timeout:g} s"
    return subprocess.CompletedProcess(command, process.returncode, out, error)
