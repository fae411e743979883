"""Native threads that run compiled loops. They never use Python or its lock, and no job waits for a sleeping thread.

A job is a number of units (chunks of a buffer, tiles of an array). The units are divided into one range per thread,
and each range into shares. A thread runs the shares of its own range first, because its cache held them the last time,
and then shares of other ranges. The launching thread is thread 0. The other threads, the workers, spin for a while
after a job, and then sleep.

The protocol
------------
All words have 64 bits and lie in one block of memory that is never freed. All threads read and write them by
sequentially consistent atomics. Words that different threads write are on different cache lines.

LOCK       1 while a job runs, else 0. The launching thread takes LOCK by compare-and-swap, and releases it. A thread
           that finds LOCK taken runs its job alone.
EPOCH      The number of the newest job. The holder of LOCK writes it, after all words of the job.
TASK ... CPU  The job. The holder of LOCK writes them, before EPOCH.
PENDING    How many shares are not finished. The holder of LOCK sets it before EPOCH; a thread that has finished a share
           lowers it.
CLAIM[t]   How many shares of the range of thread t are not claimed, with the number of the job in the upper bits. The
           holder of LOCK sets it before EPOCH; a thread that claims the next share lowers it by compare-and-swap.
ASLEEP[t]  1 from when worker t is about to sleep until its wake is decided. Worker t sets it. Either the holder of LOCK
           clears it by compare-and-swap, and then posts SEMAPHORE[t]; or worker t itself clears it, and does not sleep.
ENDED, SPIN  When the last job ended, and how long workers spin. The holder of LOCK writes them.
SEEN_AT ... CROWDED  The measurements of `crowded`. Threads that launch at the same time may mix up the words, which
           costs only speed.

Every share runs exactly once: on the thread whose compare-and-swap lowered CLAIM. The job ends when PENDING is 0.
The launching thread claims shares until none is left, so a job needs no worker.

A worker cannot act on an old job. Its compare-and-swap of CLAIM succeeds only while the word holds the number of the
job that the worker has seen, and a share to claim. PENDING counts that share, so the job has not ended and cannot end
before the worker lowers PENDING. Until then nobody writes TASK ... CPU, and nobody frees what they point to. A worker
relies on these words only between its claim and its lowering of PENDING. A worker that the system stops anywhere else
delays nobody. (A worker reads THREADS and CPU earlier. With an old THREADS its claims fail; with an old CPU it moves to
another processor.) The number of a job has 48 bits: it repeats after nine years at a million jobs a second.

A worker cannot miss the wake for a new job. The worker sets ASLEEP and then reads EPOCH; the launching thread writes
EPOCH and then reads ASLEEP. So at least one of the two sees the other's write. If both do, one compare-and-swap of
ASLEEP succeeds: the worker's, which then continues; or the launching thread's, and the worker waits for the post that
follows. A late wake costs only the worker's help.

When the pool is used
---------------------
At each site (a loop at about one size) the launching thread compares the time of a job with the pool and alone
(`pays`, `judge`, `measure`). Gains add to a credit. After losses beyond the credit, jobs run alone for twenty times the
time lost. This measures the effect of the workers on the step, not on other code. So where other programs keep the
launching thread from its processor, the thread does not use the pool (`crowded`).

Signals are blocked in workers, so Python's handlers interrupt the same calls as without workers. A forked child has no
workers and makes its own pool. At the end of the process the workers sleep, or spin in memory that is never freed.
"""

# Compiled functions are typed by numba.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import ctypes
import platform
import struct
import sys
from functools import cache
from typing import Any

import numpy as np
from numba import types

from fastopt.kernels.bind import bind, compile_loop
from fastopt.kernels.elements import scalar
from fastopt.kernels.intrinsics import (
    add,
    arithmetic_modes,
    byte_at,
    clock,
    invoke,
    load,
    pause,
    replace,
    room_for,
    set_arithmetic_modes,
    store,
)
from fastopt.kernels.threads import MOST

SHORTEST_SPIN, LONGEST_SPIN = 5_000, 60_000
"""Nanoseconds for which a worker looks for another job before it sleeps: one and a half times the recent gap between
jobs where that gap was short, else the shortest time. Waking a worker takes 15-30 us, but a worker that spins between
matrix products slows them down."""

SHARE = 8_192
"""Elements of a share, at least and on average: 1-3 us of work. A claim takes 20-50 ns, and a call of BatchNorm's
loop, with its many arguments, 300 ns."""

MOST_SHARES = 8
"""The most shares of a range. The first is the largest, nearly a quarter of the range, the last a sixty-fourth."""

# --- the block of words -----------------------------------------------------------------------------------------------

LINE = 128
"""Bytes between words that different threads write: two cache lines, which some processors fetch together."""

LOCK = 0
EPOCH = LINE
PENDING = 2 * LINE
ENDED, SPIN = PENDING + 32, PENDING + 40
SEEN_AT, SEEN_DELAY, SEEN_BY, CROWDED = range(2 * LINE + 64, 2 * LINE + 96, 8)
TASK, ARGUMENTS, UNITS, SHARES, THREADS, BACKWARDS, MODES, CPU = range(3 * LINE, 3 * LINE + 64, 8)
SIGNALS = 4 * LINE
PATH = 6 * LINE
RANGES = 7 * LINE
"""The offset of the words of thread 0."""

CLAIM = 0
ASLEEP = LINE
SEMAPHORE = 2 * LINE
CONTROL, INDEX, IDENTIFIER = range(3 * LINE, 3 * LINE + 24, 8)
GIVEN, CHOSEN, PRESENT = range(4 * LINE, 7 * LINE, LINE)
"""Sets of processors: the allowed ones, those that the worker chose, and those that the system reports."""
PER_THREAD = 7 * LINE

LEFT_BITS = 16
LEFT = (1 << LEFT_BITS) - 1

sem_init = types.ExternalFunction("sem_init", types.int32(types.int64, types.int32, types.uint32))
sem_wait = types.ExternalFunction("sem_wait", types.int32(types.int64))
sem_post = types.ExternalFunction("sem_post", types.int32(types.int64))
sched_getcpu = types.ExternalFunction("sched_getcpu", types.int32())
sched_getaffinity = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, types.int64, types.int64))
sched_setaffinity = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())
sigfillset = types.ExternalFunction("sigfillset", types.int32(types.int64))
pthread_sigmask = types.ExternalFunction("pthread_sigmask", types.int32(types.int32, types.int64, types.int64))
pthread_create = types.ExternalFunction(
    "pthread_create", types.int32(types.int64, types.int64, types.int64, types.int64)
)
pthread_self = types.ExternalFunction("pthread_self", types.int64())
open_file = types.ExternalFunction("open", types.int32(types.int64, types.int32))
read_file = types.ExternalFunction("read", types.int64(types.int32, types.int64, types.int64))
close_file = types.ExternalFunction("close", types.int32(types.int32))
NEEDED = (
    "pthread_self",
    "open",
    "read",
    "close",
    "sem_init",
    "sem_wait",
    "sem_post",
    "sched_getcpu",
    "sched_getaffinity",
    "sched_setaffinity",
    "sched_yield",
    "sigfillset",
    "pthread_sigmask",
    "pthread_create",
    "clock_gettime",
)
SIG_BLOCK, SIG_SETMASK, O_CLOEXEC = 0, 2, 0x80000  # of Linux
SIGNAL_SET = 128  # bytes of sigset_t

# --- when the pool is used --------------------------------------------------------------------------------------------

LOOK_EVERY, LOOK_EVERY_CROWDED = 20_000_000, 100_000_000
"""Nanoseconds between two readings of the time the launching thread waited for a processor. A reading takes 5 us."""

CROWDED_ABOVE = 0.1
"""The share of waiting above which the thread does not use the pool: between the values of a quiet machine and of one
with a busy process, see docs/tuning.md."""

COUNT, ALONE, CREDIT, WAIT, FAILURES = range(0, 40, 8)
"""The words of a site: its number of jobs; nanoseconds of a job alone; nanoseconds that the pool has gained; jobs to
run alone before the next trial of the pool; consecutive failed trials."""

MEASURE_EVERY = 128
"""One of so many jobs runs alone, to measure the current time of a job alone. This costs 0.8 % of the gain."""

MOST_CREDIT = 12
"""The largest credit, in times of a job alone. It tolerates an occasional stall, but within some twenty jobs the pool
is off where it no longer pays."""

room = room_for(64)


@scalar
def words_of(control, thread):
    """Return the address of the words of a thread."""
    return control + RANGES + thread * PER_THREAD


@scalar
def do_share(control, of, share):
    """Run a share of the range of thread `of`, in the launching thread's modes of arithmetic."""
    modes = load(control + MODES)
    if arithmetic_modes() != modes:
        set_arithmetic_modes(modes)
    units, threads, shares = load(control + UNITS), load(control + THREADS), load(control + SHARES)
    first, last = units * of // threads, units * (of + 1) // threads
    size, k, all_of_it = last - first, shares - share, shares * shares
    left, left_then = size * k * k // all_of_it, size * (k - 1) * (k - 1) // all_of_it  # large shares first
    if load(control + BACKWARDS):
        begin, end = first + left, first + left_then
    else:
        begin, end = last - left, last - left_then
    if begin != end:
        invoke(load(control + TASK), (load(control + ARGUMENTS), begin, end))


@scalar
def work(control, thread, epoch):
    """Run shares of a job until none is left to claim."""
    threads = load(control + THREADS)
    if thread < threads:
        for k in range(threads):
            of = thread + k if thread + k < threads else thread + k - threads
            claim = words_of(control, of) + CLAIM
            while True:
                word = load(claim)
                left = word & LEFT
                if word >> LEFT_BITS != epoch or left == 0:
                    break
                if replace(claim, word, word - 1):
                    do_share(control, of, load(control + SHARES) - left)
                    add(control + PENDING, -1)


@scalar
def move_away(words, cpu):
    """Keep a worker off the processor `cpu`, if the worker may run on others.

    A waiting thread of BLAS or OpenMP makes the other processors look busy. The system then wakes a worker on the
    processor of the launching thread, which has to wait.
    """
    if sched_getaffinity(0, LINE, words + PRESENT) < 0:
        return
    elsewhere = False  # whether others have set the worker's affinity since its own last choice
    for at in range(0, LINE, 8):
        elsewhere |= load(words + PRESENT + at) != load(words + CHOSEN + at)
    left = 0
    for at in range(0, LINE, 8):
        if elsewhere:
            store(words + GIVEN + at, load(words + PRESENT + at))
        chosen = load(words + GIVEN + at)
        if at == cpu // 64 * 8:
            chosen &= ~(1 << (cpu & 63))
        store(words + CHOSEN + at, chosen)
        left |= chosen
    if left != 0:
        sched_setaffinity(0, LINE, words + CHOSEN)


def worker(words):
    """Run a worker; never return. `words` : the address of its words."""
    control, thread = load(words + CONTROL), load(words + INDEX)
    seen = 0
    since = clock()
    while True:
        epoch = load(control + EPOCH)
        if epoch != seen:
            seen = epoch
            cpu = load(control + CPU)
            if sched_getcpu() == cpu:
                move_away(words, cpu)
            work(control, thread, epoch)
            since = clock()
        elif clock() - since < load(control + SPIN):
            pause()
        else:
            store(words + ASLEEP, 1)
            if load(control + EPOCH) == seen or not replace(words + ASLEEP, 1, 0):
                while sem_wait(words + SEMAPHORE) != 0:
                    pass
            since = clock()


@scalar
def run_job(control, task, arguments, units, shares, threads, backwards):
    """Run a job with LOCK taken; return the time at which the launching thread found no more shares to claim."""
    epoch = load(control + EPOCH) + 1
    store(control + TASK, task)
    store(control + ARGUMENTS, arguments)
    store(control + UNITS, units)
    store(control + SHARES, shares)
    store(control + THREADS, threads)
    store(control + BACKWARDS, backwards)
    store(control + MODES, arithmetic_modes())
    store(control + CPU, sched_getcpu())
    store(control + PENDING, shares * threads)
    for thread in range(threads):
        store(words_of(control, thread) + CLAIM, (epoch << LEFT_BITS) + shares)
    store(control + EPOCH, epoch)
    for thread in range(1, threads):
        words = words_of(control, thread)
        if load(words + ASLEEP) == 1 and replace(words + ASLEEP, 1, 0):
            sem_post(words + SEMAPHORE)
    work(control, np.int64(0), epoch)  # the type that a worker passes, so that `work` is compiled once
    claimed = clock()
    while load(control + PENDING) != 0:
        if clock() - claimed < SHORTEST_SPIN:
            pause()
        else:
            sched_yield()
    return claimed


def launch(control, site, task, arguments, elements, units, threads, backwards):
    """Run a job: with the pool where that pays at this site, else on this thread alone. With site 0, use the pool."""
    # Conditions instead of min and max, here and below: numba takes 30 ms to compile each of these.
    shares = elements // threads // SHARE
    shares = shares if shares < MOST_SHARES else MOST_SHARES
    shares = shares if shares < units // threads else units // threads
    shares = shares if shares > 1 else 1
    begun = clock()
    if (site == 0 or (not crowded(control, begun) and pays(site))) and replace(control + LOCK, 0, 1):
        gap = begun - load(control + ENDED)
        spin = gap + gap // 2 if gap < LONGEST_SPIN else SHORTEST_SPIN
        less = load(control + SPIN) * 3 // 4  # it falls slowly
        spin = spin if spin > less else less
        spin = spin if spin > SHORTEST_SPIN else SHORTEST_SPIN
        store(control + SPIN, spin if spin < LONGEST_SPIN else LONGEST_SPIN)
        claimed = run_job(control, task, arguments, units, shares, threads, backwards)
        ended = clock()
        store(control + ENDED, ended)
        store(control + LOCK, 0)
        if site != 0:
            judge(site, claimed - begun, ended - claimed)
    else:
        if backwards:
            invoke(task, (arguments, units, 0))
        else:
            invoke(task, (arguments, 0, units))
        if site != 0:
            measure(site, clock() - begun)


@scalar
def crowded(control, now):
    """Return whether other programs keep this thread from a processor.

    On such a machine a woken worker displaces another thread, such as a BLAS thread that the next products need. Whole
    iterations become slower, although the steps themselves become faster: see docs/tuning.md.
    """
    elapsed = now - load(control + SEEN_AT)
    if elapsed > (LOOK_EVERY_CROWDED if load(control + CROWDED) else LOOK_EVERY):
        delay, thread = delay_of_this_thread(control + PATH), pthread_self()
        if thread == load(control + SEEN_BY):
            share = (delay - load(control + SEEN_DELAY)) / elapsed
            store(control + CROWDED, 1 if share > CROWDED_ABOVE else 0)
        store(control + SEEN_BY, thread)
        store(control + SEEN_DELAY, delay)
        store(control + SEEN_AT, now)
    return load(control + CROWDED) == 1


@scalar
def delay_of_this_thread(path):
    """Return for how many nanoseconds this thread waited for a processor; 0 where the system does not report it."""
    file = open_file(path, O_CLOEXEC)
    if file < 0:
        return 0
    text = room()
    size = read_file(file, text, 64)
    close_file(file)
    field = number = 0  # the file holds: time on a processor, time waiting for one, time slices
    for at in range(size):
        byte = byte_at(text + at)
        if byte == 32:
            field += 1
        elif field == 1:
            number = 10 * number + byte - 48
    return number


@scalar
def pays(site):
    """Count a job, and return whether to use the pool. Some jobs run alone, to measure the time of a job alone."""
    count = load(site + COUNT) + 1
    store(site + COUNT, count)
    return load(site + WAIT) == 0 and count > 3 and count & (count - 1) != 0 and count % MEASURE_EVERY != 0


@scalar
def judge(site, own, waited):
    """Decide from a job with the pool whether the next jobs use it.

    own, waited : nanoseconds in which the launching thread claimed shares, and then waited for the others.
    """
    # `own` counts up to one and a half times the job alone: beyond that the thread itself was not scheduled, which may
    # also happen without a pool. After a failure, a trial has two or three jobs, because the first wakes the workers.
    alone = load(site + ALONE)
    gain = alone - (own if own < alone + alone // 2 else alone + alone // 2) - waited
    credit = load(site + CREDIT) + gain
    credit = credit if credit < MOST_CREDIT * alone else MOST_CREDIT * alone
    if gain > 0:
        store(site + FAILURES, 0)
    if credit < 0:
        failures = load(site + FAILURES) + 1
        failures = failures if failures < 6 else 6
        store(site + FAILURES, failures)
        wait = (1 << failures) - 20 * credit // alone
        store(site + WAIT, wait if wait < 4096 else 4096)
        credit = alone
    store(site + CREDIT, credit)


@scalar
def measure(site, took):
    """Record the time of a job without the pool, and count down the jobs until the next trial of the pool."""
    alone = load(site + ALONE)
    if alone == 0:
        alone = took
        store(site + CREDIT, 4 * took)
    elif took < alone:
        alone += (took - alone) // 2
    else:
        alone += ((took if took < 2 * alone else 2 * alone) - alone) // 16
    store(site + ALONE, alone if alone > 0 else 1)
    wait = load(site + WAIT)
    if wait > 0:
        store(site + WAIT, wait - 1)


def start(control, function, already, threads):
    """Start workers until there are `threads` threads, or the system refuses more; return the number of threads."""
    signals = control + SIGNALS
    sigfillset(signals)
    pthread_sigmask(SIG_BLOCK, signals, signals + SIGNAL_SET)
    thread = already
    while thread < threads:
        words = words_of(control, thread)
        store(words + CONTROL, control)
        store(words + INDEX, thread)
        sem_init(words + SEMAPHORE, 0, 0)
        if pthread_create(words + IDENTIFIER, 0, function, words) != 0:
            break
        thread += 1
    pthread_sigmask(SIG_SETMASK, signals + SIGNAL_SET, 0)
    return thread


# --- from Python ------------------------------------------------------------------------------------------------------

JOB = (types.int64,) * 8
"""The types of the arguments of `launch`."""


class Site:
    """The jobs of one loop at about one size, and whether the pool pays for them."""

    def __init__(self) -> None:
        self.words = np.zeros(5, np.int64)
        self.address: int = self.words.ctypes.data


@cache
def why_not() -> str | None:
    """Return why this system does not support the pool; None if it does."""
    if sys.platform != "linux":
        return f"the pool of native threads requires Linux, got {sys.platform}"
    if platform.machine() not in ("x86_64", "aarch64") or struct.calcsize("P") != 8:
        return f"the pool of native threads requires 64-bit x86-64 or arm64, got {platform.machine()}"
    library = ctypes.CDLL(None)
    missing = [name for name in NEEDED if not hasattr(library, name)]
    return f"the C library lacks {', '.join(missing)}" if missing else None


@cache
def _compiled() -> dict[str, Any]:
    """Compile the functions that are called by address or from Python. Their code lives as long as the process."""
    # A function that is called by address needs no wrapper for Python; one that C does not call needs none for C.
    functions: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (launch, JOB, {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}),
        (worker, JOB[:1], {"no_cpython_wrapper": True}),
        (start, JOB[:4], {"no_cfunc_wrapper": True}),
    ]
    return {
        function.__name__: compile_loop(
            bind(function, {}, label=f"pool_{function.__name__}", scalar=scalar), kinds, **options
        )
        for function, kinds, options in functions
    }


class Pool:
    """Native threads and their block of words, which are never released."""

    def __init__(self) -> None:
        compiled = _compiled()
        self.launch = compiled["launch"].address()
        self._start = compiled["start"].entry
        self._worker = compiled["worker"].address(of_c=True)
        allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)(("calloc", ctypes.CDLL(None)))
        found = allocate(1, RANGES + MOST * PER_THREAD + LINE)
        if found is None:
            raise MemoryError("the words that threads share: must be allocated, got no memory")
        self.control = found + -found % LINE
        ctypes.memmove(self.control + PATH, b"/proc/thread-self/schedstat\0", 28)
        self.asked = 1
        """The largest number of threads requested so far, including the launching thread."""
        self._started = 1

    def grow(self, threads: int) -> None:
        """Start workers until there are `threads` threads, or the system refuses more."""
        self._started = self._start(self.control, self._worker, self._started, threads)
        self.asked = threads
