"""Ranks that are threads of one process, for tests: `run_threads`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from fastopt import scalars
from fastopt.communicators.protocol import OPERATIONS, CommunicatorError

Result = TypeVar("Result")


class _Meeting:
    """Where the threads of one run meet."""

    def __init__(self, size: int, timeout: float):
        self.size = size
        self.calls: list[Any] = [None] * size
        """What each has passed to its latest call."""
        self._timeout = timeout
        self._changed = threading.Condition()
        self._waiting = 0
        self._met = 0
        """How often all have met."""
        self._ended = False

    def wait(self) -> None:
        """Wait until all are here. Where all were, it does not matter that one of them has ended since."""
        with self._changed:
            before = self._met
            self._waiting += 1
            if self._waiting == self.size and not self._ended:
                self._waiting, self._met = 0, before + 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._met > before or self._ended, self._timeout)
            if self._met == before:
                self._ended = True
                self._changed.notify_all()
                raise CommunicatorError("another rank has ended, or did not come: see its error")

    def end(self) -> None:
        """Have those that wait, and those to come, raise an error."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class ThreadCommunicator:
    """A `Communicator` among threads, as `run_threads` passes it: sums are made in the order of ranks.

    Args:
        rank: the number of this thread, from 0.
        meeting: what the threads have in common.

    >>> import fastopt
    >>> fastopt.distributed.run_threads(2, lambda comm: (comm.rank, comm.size))
    [(0, 2), (1, 2)]
    """

    def __init__(self, rank: int, meeting: _Meeting):
        self._rank = rank
        self._meeting = meeting

    @property
    def rank(self) -> int:
        """As `Communicator`."""
        return self._rank

    @property
    def size(self) -> int:
        """As `Communicator`."""
        return self._meeting.size

    def allreduce(self, array: Any, op: str = "sum") -> None:
        """As `Communicator`."""
        _check_operation(op)
        found = [each.copy() for each in self._exchanged(f"allreduce({op})", array)]
        self._meeting.wait()  # before anybody writes
        _reduced(found, op, array)

    def reduce_scatter(self, whole: Any, own: Any) -> None:
        """As `Communicator`."""
        _check_parts(whole, own, self.size)
        parts = [self._part(each, self._rank) for each in self._exchanged("reduce_scatter", whole)]
        _reduced(parts, "sum", own.reshape(-1))
        self._meeting.wait()  # until everybody has read

    def allgather(self, own: Any, whole: Any) -> None:
        """As `Communicator`."""
        _check_parts(whole, own, self.size)
        for rank, part in enumerate(self._exchanged("allgather", own)):
            here = self._part(whole, rank)
            if rank != self._rank or type(here) is not np.ndarray or not np.shares_memory(part, here):
                here[...] = part.reshape(-1)
        self._meeting.wait()

    def alltoall(self, sent: Any, received: Any) -> None:
        """As `Communicator`."""
        if sent.shape != received.shape or sent.dtype != received.dtype:
            raise ValueError(f"received: must have shape {sent.shape} and dtype {sent.dtype}, as what is sent")
        for rank, each in enumerate(self._exchanged("alltoall", sent)):
            self._part(received, rank)[...] = self._part(each, self._rank)
        self._meeting.wait()

    def abort(self) -> None:
        """As `Communicator`."""
        self._meeting.end()

    def _part(self, whole: Any, rank: int) -> Any:
        size = whole.size // self.size
        return whole.reshape(-1)[rank * size : (rank + 1) * size]

    def _exchanged(self, call: str, array: Any) -> list[Any]:
        """The arrays that all ranks have passed to this call."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{call}: must be given contiguous arrays, got strides {array.strides}")
        calls = self._meeting.calls
        calls[self._rank] = (call, array)
        self._meeting.wait()
        expected = (call, array.shape, array.dtype)
        for rank, (other, theirs) in enumerate(calls):
            if (other, theirs.shape, theirs.dtype) != expected:
                raise CommunicatorError(  # on every rank
                    f"rank {rank}: must call {call} of shape {array.shape} and dtype {array.dtype}, as rank "
                    f"{self._rank}, got {other} of {theirs.shape} and {theirs.dtype}"
                )
        return [theirs for _, theirs in calls]


def _check_operation(op: str) -> None:
    if op not in OPERATIONS:
        raise ValueError(f"op: must be one of {', '.join(map(repr, OPERATIONS))}, got {op!r}")


def _check_parts(whole: Any, own: Any, size: int) -> None:
    if whole.size != size * own.size or whole.dtype != own.dtype:
        raise ValueError(
            f"whole: must be {size} times as long as the own part, of its dtype, got {whole.size} of {whole.dtype} for "
            f"{own.size} of {own.dtype}"
        )


def _reduced(arrays: list[Any], op: str, out: Any) -> None:
    out[...] = arrays[0]
    for array in arrays[1:]:
        if op == "sum":
            out += array
        else:
            np.maximum(out, array, out=out)


def run_threads(size: int, function: Callable[..., Result], *args: Any, timeout: float = 60.0) -> list[Result]:
    """Run ``function(comm, *args)`` on as many threads, whose `comm` is a `Communicator` among them. For tests.

    Args:
        size: how many ranks, an int from 1.
        function: what each of them calls.
        *args: passed on to the function.
        timeout: > 0, seconds after which a rank no longer waits for the others.

    Returns:
        What the function returned, in a list by rank.

    Raises:
        TypeError, ValueError: a `size` or `timeout` that is out of range.
        Exception: what a rank has raised. The others, which would wait for it, end with `CommunicatorError`.

    >>> import fastopt
    >>> fastopt.distributed.run_threads(3, lambda comm, factor: factor * comm.rank, 10)
    [0, 10, 20]
    """
    meeting = _Meeting(scalars.count("size", size, 1), scalars.number("timeout", timeout, "a number > 0"))
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        comm = ThreadCommunicator(rank, meeting)
        try:
            results[rank] = function(comm, *args)
        except BaseException as error:
            errors[rank] = error
            comm.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [error for error in errors if error is not None]
    for error in sorted(raised, key=lambda error: isinstance(error, CommunicatorError)):
        raise error
    return results
