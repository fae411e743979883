"""How a loop is run: alone, or shared out among threads; and the driver that decides which threads these are.

Units of a loop (chunks, tiles, ...) stand alone, so the bits do not depend on who does them. Every thread has one range
of units, always the same, and goes through it forwards and backwards alternately where the caller asks for that: what
it touched last is still in the cache when the next pass begins there. In one direction only, a buffer a little larger
than the cache finds nothing there, ever. Measured: Adam on 4M float32 (64 MB of buffers, 32 MB of cache) 1.97 -> 1.51
ms; no difference at 1M and at 30M.
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

from fastopt.kernels.bind import address_of, bind, compile_loop, entry_of
from fastopt.kernels.elements import scalar
from fastopt.kernels.intrinsics import caller_of, invoke, keep, spill
from fastopt.kernels.pool import JOB, Pool, Site, why_not
from fastopt.kernels.threads import COMPILING, get_num_threads

SERIAL_BELOW = 24_576
"""Elements. Below this a second thread is not worth asking for. A step of Adam on 16,384, 24,576, 32,768 and 65,536
elements took 4.5, 5.4, 6.3 and 11.4 us on one thread and 5.0, 5.3, 5.9 and 7.8 us on two that were awake (Zen 5)."""

SERIAL_BELOW_ELSEWHERE = 65_536
"""The same where the threads are not our own. OpenMP's are waited for: where another process keeps a core busy, a
launch took 7-8 ms on two cores instead of 9-20 us on one thread. Small networks are spared that."""

MODES = ("pool", "numba", "executor")

CALL: Any


def do_units(arguments, first, last):
    """Run a loop on units [first, last). `arguments`: where the loop's address and its other arguments are stored."""
    CALL(arguments, first, last)


def hand_over(launch, control, site, task, loop, elements, units, threads, backwards, arguments):
    """Store arguments where every thread can read them, and have the function at `launch` run the job."""
    stored = spill((loop, arguments))
    invoke(launch, (control, site, task, stored, elements, units, threads, backwards))
    keep(arguments)


def launch_with_numba(control, site, task, arguments, elements, units, threads, backwards):
    """Run a job on numba's threads: what `pool.launch` does, elsewhere."""
    for thread in prange(threads):
        first = units * thread // threads
        last = units * (thread + 1) // threads
        if backwards:
            invoke(task, (arguments, last, first))
        else:
            invoke(task, (arguments, first, last))


class Loop:
    """One loop bound to one rule.

    The loop goes over units[first:last] for its last two arguments (first, last), or backwards over units[last:first]
    where last is the smaller, which only loops have to know that are run with ``backwards=True``.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        constants: dict[str, Any],
        signature: tuple[Any, ...],
        *,
        label: str,
        fastmath: Any = False,
    ):
        self.label = label
        self.signature = signature
        self.dispatcher = compile_loop(
            bind(function, constants, label=label, scalar=scalar),
            (*signature, types.int64, types.int64),
            fastmath=fastmath,
        )
        # The compiled entry itself: our arguments have one type for life, and numba's dispatch on types costs 0.3 us
        # of the 1 us that a call on 1,000 elements takes.
        self.serial = entry_of(self.dispatcher)
        self.address = address_of(self.dispatcher)
        self.sites: dict[int, Site] = {}
        """By the number of bits of the number of elements."""
        self.handover: tuple[Callable[..., None], int] | None = None

    def run(self, *arguments: Any, elements: int, units: int, backwards: bool = False) -> None:
        """Run on all units, on as many threads as are worth it."""
        if elements >= SERIAL_BELOW and units > 1:
            DRIVER.run(self, arguments, elements, units, backwards)
        elif backwards:
            self.serial(*arguments, units, 0)
        else:
            self.serial(*arguments, 0, units)


class Driver:
    """Decides which threads run a loop; there is one in a process.

    ``pool``: native threads of our own (pool.py), where the system has what they need.
    ``numba``: elsewhere, numba's threads, where its layer is omp or tbb and this process is not a forked child.
    ``executor``: in all other cases, the loop on ranges of its units in Python's threads. With the workqueue layer two
    threads that launch at once abort the process; with GNU OpenMP a forked child that launches is killed.
    """

    def __init__(self) -> None:
        self.mode: str | None = None
        """One of `MODES`; None before the first job that is worth a second thread."""
        self.reason: str | None = None
        """Why there is no pool."""
        self.adaptive = True
        """Whether a job uses more than one thread only where that has been faster."""
        self._forked = False
        self._pool: Pool | None = None
        self._launch = 0
        self._kept: list[Any] = []  # dispatchers, whose code is called by address
        self._handovers: dict[tuple[Any, ...], tuple[Callable[..., None], int]] = {}
        self._executor: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork_in_child)

    def _after_fork_in_child(self) -> None:
        """Forget the parent's threads: none of them is here."""
        self._forked = True
        self._pool = None
        self._executor = None
        if self.mode == "numba":
            self.mode = "executor"

    def choose(self, mode: str | None = None) -> str:
        """Choose how loops are run from now on, and return it.

        mode : one of `MODES`, for every job of enough elements, whether that is faster or not. None: the best one that
            works here, and the pool only where it is faster.
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
        except ValueError:  # no layer could be loaded, or the one asked for is not there
            return "executor"

    def run(self, loop: Loop, arguments: tuple[Any, ...], elements: int, units: int, backwards: bool) -> None:
        """Run `loop` on all units."""
        threads = min(get_num_threads(), units)
        site = loop.sites.get(elements.bit_length())
        mode = self.mode or self.choose()
        if threads == 1 or (self.adaptive and (site is None or (mode != "pool" and elements < SERIAL_BELOW_ELSEWHERE))):
            if site is None:  # the first job is done alone: its data is cold, and many loops are run once
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
        """What hands a loop's arguments over, and the address of its task: the same for all loops of this signature."""
        signature = loop.signature
        with COMPILING:
            if signature not in self._handovers:
                name = hashlib.sha256(repr(signature).encode()).hexdigest()[:16]
                task = self._compile(do_units, {"CALL": caller_of(signature)}, (types.int64,) * 3, label=name)
                kinds = (*(types.int64,) * 9, types.Tuple(signature))
                bound = bind(hand_over, {}, label=f"hand_over_{name}", scalar=scalar)
                self._handovers[signature] = (entry_of(compile_loop(bound, kinds)), task)
            loop.handover = self._handovers[signature]
            return loop.handover

    def _compile(self, function: Any, constants: dict[str, Any], kinds: Any, *, label: str = "", **options: Any) -> int:
        bound = bind(function, constants, label=f"{function.__name__}_{label}", scalar=scalar)
        dispatcher = compile_loop(bound, kinds, **options)
        self._kept.append(dispatcher)
        return address_of(dispatcher)

    def _run_in_executor(
        self, loop: Loop, arguments: tuple[Any, ...], units: int, threads: int, backwards: bool
    ) -> None:
        edges = [units * k // threads for k in range(threads + 1)]
        ranges = [ends[::-1] if backwards else ends for ends in pairwise(edges)]
        futures: list[Future[None]] = [self._workers().submit(loop.serial, *arguments, *ends) for ends in ranges[1:]]
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
