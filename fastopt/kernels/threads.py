"""The number of threads that a step may use; and the lock held during compilation, which delays forks."""

from __future__ import annotations

import operator
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

VARIABLE = "FASTOPT_NUM_THREADS"

MOST = 256
"""The largest number of threads."""

CONTROL_GROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")

REFRESH = 1.0
"""Seconds after which the processors of this process are counted again, because schedulers change them."""

COMPILING = threading.RLock()
"""Held by the thread that imports a backend or compiles for it."""

_chosen: int | None = None
_chosen_by = ""
_asked = False  # whether the environment variable has been read
_counted: tuple[float, int] = (-1.0, 1)  # the time until which the count is valid, and the count of processors


def set_num_threads(count: int | None) -> None:
    """Set how many threads a step may use, in this process and in those forked from it later.

    A step on fewer than 24,576 elements always runs on the calling thread. Larger steps use more threads only where
    that has been faster. The results have the same bits for any number of threads.

    Args:
        count: from 1 to 256; it may exceed the number of processors. None restores the default, see `get_num_threads`.

    Raises:
        TypeError: `count` is not a whole number.
        ValueError: `count` is out of range.

    >>> import fastopt
    >>> fastopt.set_num_threads(1)
    >>> fastopt.get_num_threads()
    1
    >>> fastopt.set_num_threads(None)
    """
    global _chosen, _chosen_by, _asked
    if count is not None:
        try:
            count = operator.index(count)
        except TypeError:
            raise TypeError(f"count: must be a whole number from 1 to {MOST}, or None, got {count!r}") from None
        if not 1 <= count <= MOST:
            raise ValueError(f"count: must be from 1 to {MOST}, got {count}")
    _chosen, _chosen_by, _asked = count, "fastopt.set_num_threads", True


@contextmanager
def using(count: int | None) -> Iterator[None]:
    """Set the number of threads inside a ``with`` block; None does not change the number."""
    global _chosen, _chosen_by
    get_num_threads()  # reads the environment variable
    before = _chosen, _chosen_by
    try:
        if count is not None:
            set_num_threads(count)
        yield
    finally:
        _chosen, _chosen_by = before


def get_num_threads() -> int:
    """Return how many threads a step may use.

    The number is the one given to `set_num_threads`, or else the environment variable ``FASTOPT_NUM_THREADS``. Without
    both it is the smallest of: numba's number (``NUMBA_NUM_THREADS``, `numba.set_num_threads`), torch's number where
    torch is loaded (`torch.set_num_threads`), and the number of processors that this process may use, by its affinity
    and by the quota of its control group, rounded up.

    Returns:
        A number from 1 to 256.

    Raises:
        ValueError: ``FASTOPT_NUM_THREADS`` is not a whole number from 1 to 256.

    >>> import fastopt
    >>> fastopt.get_num_threads() >= 1
    True
    """
    global _chosen, _chosen_by, _asked
    if not _asked:
        _chosen, _chosen_by, _asked = _of_environment(), VARIABLE, True
    return _chosen or min(_limits())


def source() -> str:
    """Return what determined the number of threads, for `fastopt info`."""
    count = get_num_threads()
    if _chosen is not None:
        return _chosen_by
    return ("the processors of this process", "numba", "torch")[_limits().index(count)]


def _limits() -> list[int]:
    """Return the limits of the default number of threads: processors, numba's number and, where loaded, torch's."""
    global _counted
    now = time.monotonic()
    if now >= _counted[0]:
        _counted = (now + REFRESH, min(processors(), MOST))
    # Reading numba's number starts its threads. Before they start, the number cannot have changed.
    modules: dict[str, Any] = sys.modules
    parallel = modules.get("numba.np.ufunc.parallel")
    if parallel is not None and parallel._is_initialized:
        numbas = parallel._get_num_threads()
    else:
        numbas = (modules.get("numba") or import_module("numba")).config.NUMBA_NUM_THREADS
    torch = modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):  # not while it is being imported
        return [_counted[1], numbas, torch.get_num_threads()]
    return [_counted[1], numbas]


def _of_environment() -> int | None:
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    if not text.strip().isdecimal() or not 1 <= int(text) <= MOST:
        raise ValueError(f"{VARIABLE}: must be a whole number from 1 to {MOST}, got {text!r}")
    return int(text)


def processors() -> int:
    """Return how many processors this process may use at a time, by its affinity and by its quota, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota in _quotas():
        count = min(count, max(1, -(-quota[0] // quota[1])))
    return count


def _quotas() -> list[tuple[int, int]]:
    """Return (quota, period) in microseconds, for this process' control groups and for their parents."""
    found = []
    try:
        groups = [line.split(":", 2) for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if controllers == "":
            root, names = CONTROL_GROUP, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, names = CONTROL_GROUP / controllers, ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        inside = Path(path.lstrip("/"))
        for folder in (root / inside, *(root / parent for parent in inside.parents)):
            with suppress(OSError, ValueError):  # no such folder in this container, or not a number: "max"
                quota, period = map(int, " ".join((folder / name).read_text("utf-8") for name in names).split())
                if quota > 0:  # -1: none
                    found.append((quota, period))
    return found


# --- forks ------------------------------------------------------------------------------------------------------------
# A child has one thread, and would wait for ever for a lock that another thread of its parent held: our lock, numba's,
# or the lock of a module that was being imported.

_numbas_locks: list[Any] = []


def _before_fork() -> None:
    COMPILING.acquire()
    numbas = getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", None)
    if numbas is not None:
        numbas.acquire()
    _numbas_locks.append(numbas)


def _after_fork() -> None:
    numbas = _numbas_locks.pop()
    if numbas is not None:
        numbas.release()
    COMPILING.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
