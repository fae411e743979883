"""`Gate`: while one thread saves, loads or copies an optimizer, the steps of other threads wait, and the reverse."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LOOK_EVERY = 1e-4  # seconds


class Gate:
    """The gate of one optimizer.

    A step sets `stepping` and then reads `taken`; `take` sets `taken` and then reads `stepping`. So at least one of two
    threads sees the other one. A lock around every step would take three times as long as these two attributes.
    """

    __slots__ = ("_lock", "_process", "stepping", "taken")

    def __init__(self) -> None:
        self.stepping = 0
        """The thread that makes a step; 0: none."""
        self.taken = False
        """Whether a thread uses the state as a whole."""
        self._lock = threading.RLock()
        self._process = os.getpid()

    def _own_lock(self) -> threading.RLock:
        """Return the lock; in a forked process another one, because the thread that held the first may not be there."""
        if self._process != os.getpid():
            self._lock, self._process, self.taken = threading.RLock(), os.getpid(), False
        return self._lock

    def wait(self) -> None:
        """Let a step wait until the thread that has taken the gate is done, unless that thread is its own."""
        thread, self.stepping = self.stepping, 0
        with self._own_lock():
            self.stepping = thread

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Keep the steps of other threads out of the block, which uses the state as a whole.

        Raises RuntimeError inside a step of this thread, from a schedule or a signal handler: the step is half done.
        """
        thread = threading.get_ident()
        if self.stepping == thread:
            raise RuntimeError(f"{what}(): must be called outside a step, got a call within one; call it afterwards")
        with self._own_lock():
            outer = self.taken
            self.taken = True
            try:
                while self.stepping in sys._current_frames():  # a thread that is there, unlike after a fork
                    time.sleep(LOOK_EVERY)
                yield
            finally:
                self.taken = outer

    def __deepcopy__(self, memo: object) -> Gate:
        return Gate()

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return Gate, ()


def through_gate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Have a method of an object with a `gate` count as a step: see `Gate`."""

    @wraps(method)
    def passing(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        gate, thread = self.gate, threading.get_ident()
        outer, gate.stepping = gate.stepping, thread
        try:
            if gate.taken and outer != thread:  # a step that is half done goes on
                gate.wait()
            return method(self, *args, **kwargs)
        finally:
            gate.stepping = outer

    return passing
