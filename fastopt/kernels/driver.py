"""`Loop` runs a compiled loop on one thread or on several; `Driver` decides which threads run it.

The units of a loop (chunks, tiles, ...) are independent, so the bits do not depend on the thread that runs them. Every
thread always has the same range of units. Where the caller requests it, the thread goes through its range alternately
forwards and backwards: the next pass then begins with the data that are still in the cache. In one direction only, no
pass over a buffer a little larger than the cache finds any of its data there.
"""

# Compiled functions are typed by numba.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
from numba import prange, types
from numba.np.ufunc import parallel as numba_parallel

from fastopt.kernels.bind import bind, compile_loop
from fastopt.kernels.elements import scalar
from fastopt.kernels.intrinsics import caller_of, invoke, keep, spill
from fastopt.kernels.pool import JOB, Pool, Site, why_not
from fastopt.kernels.threads import COMPILING, get_num_threads
from fastopt.signals import deferred_signals

SERIAL_BELOW = 24_576
"""Elements. Below this a second thread that is awake does not make a step faster: see docs/tuning.md."""

SERIAL_BELOW_ELSEWHERE = 65_536
"""The same for threads that are not our own: a launch waits for OpenMP's threads, also while another process keeps
their core busy."""

MODES = ("pool", "numba", "executor")

CALL: Any


def do_units(arguments, first, last):
    """Run a loop on units [first, last). `arguments`: the address of the loop's own address and its other arguments."""
    CALL(arguments, first, last)


def hand_over(launch, control, site, task, loop, elements, units, threads, backwards, arguments):
    """Store arguments where every thread can read them, and call the function at `launch` to run the job."""
    stored = spill((loop, arguments))
    invoke(launch, (control, site, task, stored, elements, units, threads, backwards))
    keep(arguments)


def launch_with_numba(control, site, task, arguments, elements, units, threads, backwards):
    """Run a job on numba's threads: the counterpart of `pool.launch` where there is no pool."""
    for thread in prange(threads):
        first = units * thread // threads
        last = units * (thread + 1) // threads
        if backwards:
            invoke(task, (arguments, last, first))
        else:
            invoke(task, (arguments, first, last))


class Loop:
    """One loop bound to one rule.

    The last two arguments of the loop are (first, last). The loop goes over units[first:last], or backwards over
    units[last:first] where last is the smaller. Only loops that run with ``backwards=True`` must support the latter.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        constants: dict[str, Any],
        signature: tuple[Any, ...],
        *,
        label: str,
        fastmath: Any = False,
        check: Callable[[], None] | None = None,
    ):
        self.label = label
        self.signature = signature
        self.compiled = compile_loop(
            bind(function, constants, label=label, scalar=scalar),
            (*signature, types.int64, types.int64),
            fastmath=fastmath,
            check=check,
        )
        self.serial = self.compiled.entry
        self.address = self.compiled.address()
        self.sites: dict[int, Site] = {}
        """A `Site` for each bit length of the number of elements."""
        self.handover: tuple[Callable[..., None], int] | None = None

    def run(self, *arguments: Any, elements: int, units: int, backwards: bool = False) -> None:
        """Run on all units, on one thread or more, whichever is faster."""
        if elements >= SERIAL_BELOW and units > 1:
            DRIVER.run(self, arguments, elements, units, backwards)
        elif backwards:
            self.serial(*arguments, units, 0)
        else:
            self.serial(*arguments, 0, units)


class Driver:
    """Decides which threads run a loop. A process has one driver.

    ``pool``: native threads of our own (pool.py), where the system supports them.
    ``numba``: otherwise numba's threads, where its layer is omp or tbb and this process is not a forked child.
    ``executor``: in all other cases Python's threads, each on a range of the loop's units. With the workqueue layer,
    two threads that launch at the same time abort the process; with GNU OpenMP, a forked child that launches is killed.
    """

    def __init__(self) -> None:
        self.mode: str | None = None
        """One of `MODES`; None before the first job that is worth a second thread."""
        self.reason: str | None = None
        """Why there is no pool; None where there is one."""
        self.adaptive = True
        """Whether a job uses several threads only where that has been faster."""
        self._forked = False
        self._pool: Pool | None = None
        self._launch = 0
        self._kept: list[Any] = []  # compiled functions whose code is called by address
        self._handovers: dict[tuple[Any, ...], tuple[Callable[..., None], int]] = {}
        self._executor: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork_in_child)

    def _after_fork_in_child(self) -> None:
        """Forget the parent's threads: a forked child has none of them."""
        self._forked = True
        self._pool = None
        self._executor = None
        if self.mode == "numba":
            self.mode = "executor"

    def choose(self, mode: str | None = None) -> str:
        """Choose how loops run from now on, and return the mode.

        mode : one of `MODES`. It is used for every job of enough elements, even where it is slower. None chooses the
            best mode that works here, and uses several threads only where that has been faster.
        """
        with COMPILING:
            self.reason = why_not()
            self.adaptive = mode is None
            self.mode = mode or ("pool" if self.reason is None else self._choose_elsewhere())
            return self.mode

    def _choose_elsewhere(self) -> str:
        if self._forked:
            return "executor"
        try:
            numba_parallel._launch_threads()
            return "numba" if numba.threading_layer() in ("omp", "tbb") else "executor"
        except ValueError:  # no layer could be loaded, or the requested one is absent
            return "executor"

    def run(self, loop: Loop, arguments: tuple[Any, ...], elements: int, units: int, backwards: bool) -> None:
        """Run `loop` on all units."""
        threads = min(get_num_threads(), units)
        site = loop.sites.get(elements.bit_length())
        mode = self.mode or self.choose()
        if threads == 1 or (self.adaptive and (site is None or (mode != "pool" and elements < SERIAL_BELOW_ELSEWHERE))):
            if site is None:  # the first job runs alone: its data are cold, and many loops run only once
                loop.sites[elements.bit_length()] = Site()
            first, last = (units, 0) if backwards else (0, units)
            loop.serial(*arguments, first, last)
        elif mode == "executor":
            self._run_in_executor(loop, arguments, units, threads, backwards)
        else:
            entry, task = loop.handover or self._hand_over(loop)
            pool = self._pool
            if mode == "numba":
                launch, control = self._numba(), 0
            else:
                if pool is None or pool.asked < threads:
                    pool = self._pool_of(threads)
                launch, control = pool.launch, pool.control
            address = site.address if site is not None and self.adaptive else 0
            entry(launch, control, address, task, loop.address, elements, units, threads, backwards, arguments)

    def _pool_of(self, threads: int) -> Pool:
        with COMPILING:
            if self._pool is None:
                self._pool = Pool()
            if self._pool.asked < threads:
                self._pool.grow(threads)
            return self._pool

    def _numba(self) -> int:
        if self._launch == 0:
            with COMPILING:
                if self._launch == 0:
                    self._launch = self._compile(launch_with_numba, {}, JOB, parallel=True)
        return self._launch

    def _hand_over(self, loop: Loop) -> tuple[Callable[..., None], int]:
        """Return `hand_over`, compiled, and the address of the task: both are shared by all loops of this signature."""
        signature = loop.signature
        with COMPILING:
            if signature not in self._handovers:
                name = hashlib.sha256(repr(signature).encode()).hexdigest()[:16]
                task = self._compile(do_units, {"CALL": caller_of(signature)}, (types.int64,) * 3, label=name)
                kinds = (*(types.int64,) * 9, types.Tuple(signature))
                bound = bind(hand_over, {}, label=f"hand_over_{name}", scalar=scalar)
                self._handovers[signature] = (compile_loop(bound, kinds).entry, task)
            loop.handover = self._handovers[signature]
            return loop.handover

    def _compile(self, function: Any, constants: dict[str, Any], kinds: Any, *, label: str = "", **options: Any) -> int:
        bound = bind(function, constants, label=f"{function.__name__}_{label}", scalar=scalar)
        compiled = compile_loop(bound, kinds, **options)
        self._kept.append(compiled)
        return compiled.address()

    def _run_in_executor(
        self, loop: Loop, arguments: tuple[Any, ...], units: int, threads: int, backwards: bool
    ) -> None:
        edges = [units * k // threads for k in range(threads + 1)]
        ranges = [ends[::-1] if backwards else ends for ends in pairwise(edges)]
        with deferred_signals:
            submit = self._workers().submit
            futures: list[Future[None]] = [submit(loop.serial, *arguments, *ends) for ends in ranges[1:]]
            loop.serial(*arguments, *ranges[0])
            for future in futures:
                future.result()

    def _workers(self) -> ThreadPoolExecutor:
        if self._executor is None:
            with COMPILING:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(thread_name_prefix="fastopt")
        return self._executor


DRIVER = Driver()
