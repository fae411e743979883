"""`Ranks`: the processes that make the steps of one optimizer, what they agree on, and how they add up gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from fastopt.communicators import Communicator, CommunicatorError
from fastopt.hyper import Choice
from fastopt.kernels.contract import Array, Backend

ORDER = Choice(("engine", "fixed"))

COMPARED = 4
"""How many things can be compared besides the name of the call."""
WORD = 8
"""Bytes of the hash of each of them."""
NUMBERS = 2
"""How many numbers of a rank all others learn."""

WINDOW = 2**20
"""Elements that are added up in the order of ranks, or gathered, at a time."""

Same = Sequence[tuple[str, bytes]]
"""What must be the same on every rank: what it is called in errors, and its content."""


class Votes(NamedTuple):
    """What a vote has found."""

    numbers: list[list[float]]
    """By rank: the numbers that it has given."""
    mask: np.ndarray
    """Of each parameter: whether any rank has marked it."""


class Ranks:
    """The processes of one optimizer.

    Args:
        comm: how they exchange arrays.
        order: ``"fixed"`` adds up gradients in the order of ranks; ``"engine"`` leaves the order to the engine.
        shard: whether each updates a part of the parameters.
        wire: the format in which gradients are sent; None for that in which they are added up.
    """

    def __init__(self, comm: Communicator, order: str = "engine", *, shard: bool = True, wire: str | None = None):
        self.comm = comm
        self.order = order
        self.wire = wire
        self.rank, self.size = comm.rank, comm.size
        self.part, self.parts = (self.rank, self.size) if shard else (0, 1)
        """Which part of the parameters this rank updates, of how many."""
        self.parameters = 0
        """How many the optimizer has; 0 while it is being made."""

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            "comm: must be None to pickle an optimizer or a layer, got one, whose ranks are this run's; use save()"
        )

    def vote(
        self,
        call: str,
        error: BaseException | None = None,
        same: Same = (),
        numbers: Sequence[float] = (0.0,) * NUMBERS,
        mask: np.ndarray | None = None,
    ) -> Votes:
        """Let every rank learn whether all can do what is called, and do the same. Every rank must call this.

        Args:
            call: what is called.
            error: why this rank cannot.
            same: what must be the same on every rank.
            numbers: of this rank, for all.
            mask: of bool, one per parameter, for all; None for none.

        Raises:
            CommunicatorError: another rank has an error, or something is not the same. The rank with an error raises
                that one.
        """
        compared = [("", call.encode()), *same, *[("", b"")] * (COMPARED - len(same))]
        words = np.frombuffer(
            b"".join([blake2b(content, digest_size=WORD).digest() for _, content in compared]), np.uint8
        )
        failed = np.zeros(self.size, np.uint8)
        failed[self.rank] = error is not None
        given = np.zeros((self.size, NUMBERS))
        given[self.rank] = numbers
        marked = np.zeros(self.parameters, np.uint8) if mask is None else mask.view(np.uint8)
        # Where all have the same word, the greatest of its bytes are the least ones as well.
        parts = [failed, given.view(np.uint8).reshape(-1), words, ~words, marked]
        ballot = np.concatenate(parts)
        self.comm.allreduce(ballot, "max")
        failed, given_bytes, high, low, marked = np.split(ballot, np.cumsum([part.size for part in parts])[:-1])
        if error is not None:
            raise error
        if failed.any():
            rank = int(np.flatnonzero(failed)[0])
            raise CommunicatorError(f"{call}(): rank {rank} has raised an error, see there; nothing was changed")
        differ = np.flatnonzero((high != ~low).reshape(-1, WORD).any(axis=1)).tolist()
        if differ and differ[0] == 0:
            raise CommunicatorError(f"{call}(): must be called by every rank at the same time, got another call by one")
        if differ:
            raise CommunicatorError(
                f"{call}(): {compared[differ[0]][0]} must be the same on every rank, got others; nothing was changed"
            )
        return Votes(given_bytes.copy().view(np.float64).reshape(-1, NUMBERS).tolist(), marked.astype(np.bool_))

    @contextmanager
    def together(self, call: str) -> Iterator[list[tuple[str, bytes]]]:
        """A block that every rank runs, and that raises on all where it raises on one. Yields a list for `Same`."""
        same: list[tuple[str, bytes]] = []
        error = None
        try:
            yield same
        except BaseException as raised:
            error = raised
        self.vote(call, error, same)

    @contextmanager
    def committed(self) -> Iterator[None]:
        """A block in which the others wait for this rank: where it raises, they are ended.

        FloatingPointError is of the gradients of all, and is raised by all.
        """
        try:
            yield
        except FloatingPointError:
            raise
        except BaseException:
            self.comm.abort()
            raise

    def add_up(self, array: Array, backend: Backend) -> None:
        """Replace the arrays of all ranks by their sum."""
        if self.order == "engine":
            self.comm.allreduce(array)
        else:
            self._add_up_in_order(array, backend, None)

    def add_up_parts(self, array: Array, own: Array, backend: Backend) -> None:
        """Write this rank's part of the sum of the arrays of all ranks into `own`."""
        if self.order == "engine":
            self.comm.reduce_scatter(array, own)
        else:
            self._add_up_in_order(array, backend, own)

    def spread(self, array: Array) -> None:
        """Let every rank have the parts of all: of each rank the part that is its own."""
        whole = array.view(np.uint8)
        part = whole.size // self.size
        self.comm.allgather(whole[self.rank * part : (self.rank + 1) * part], whole)

    def gathered(self, lines: np.ndarray, counts: Sequence[int] | None = None) -> np.ndarray:
        """The lines of all ranks, in their order. counts : how many each rank has; None for as many as this one."""
        counts = [len(lines)] * self.size if counts is None else counts
        most = max(counts)
        own = np.zeros((most, lines.shape[1]), lines.dtype)
        own[: len(lines)] = lines
        everyone = np.empty((self.size, *own.shape), own.dtype)
        if own.size:
            self.comm.allgather(own, everyone)  # of equal parts, as some engines demand
        return np.concatenate([of_rank[:count] for of_rank, count in zip(everyone, counts, strict=True)])

    def _add_up_in_order(self, array: Array, backend: Backend, own: Array | None) -> None:
        """The same in the order of ranks. own : takes this rank's part of the sum; None: `array` takes all of it.

        A window of each part goes to the rank whose part it is, which adds up what it got.
        """
        part = -(-array.size // self.size)
        width = min(part, max(1, WINDOW // self.size))
        sent, received = (backend.zeros(self.size * width, array.dtype).reshape(self.size, width) for _ in range(2))
        for first in range(0, part, width):
            pieces = [
                slice(min(start, array.size), min(start + width, rank * part + part, array.size))
                for rank, start in enumerate(range(first, first + self.size * part, part))
            ]
            for line, piece in zip(sent, pieces, strict=True):
                line[: piece.stop - piece.start] = array[piece]
            self.comm.alltoall(sent, received)
            total = received[0]
            for line in received[1:]:
                total += line
            if own is None:
                self.comm.allgather(total, sent)
                for line, piece in zip(sent, pieces, strict=True):
                    array[piece] = line[: piece.stop - piece.start]
            else:
                count = min(width, part - first)
                own[first : first + count] = total[:count]


class Scattered:
    """A state of one parameter, whose elements lie on several ranks. It has the attributes of an array.

    Args:
        own: 1-D: the elements on this rank.
        first: which element of the state is its first one.
        shape: that of the parameter.
        ranks: those that have the others.
    """

    def __init__(self, own: np.ndarray, first: int, shape: tuple[int, ...], ranks: Ranks):
        self._own = own
        self._first = first
        self._ranks = ranks
        self.shape, self.dtype = shape, own.dtype
        self.ndim, self.size, self.itemsize = len(shape), math.prod(shape), own.itemsize
        self.nbytes = self.size * own.itemsize

    @property
    def count(self) -> int:
        """How many windows there are."""
        return -(-self.size // WINDOW)

    def windows(self) -> Iterator[np.ndarray]:
        """All elements in order, a window at a time. Every rank goes through all windows."""
        last = self._first + self._own.size
        for start in range(0, self.size, WINDOW):
            window = np.zeros(min(WINDOW, self.size - start), self.dtype)
            begin, end = max(start, self._first), min(start + window.size, last)
            if begin < end:
                window[begin - start : end - start] = self._own[begin - self._first : end - self._first]
            self._ranks.comm.allreduce(window.view(np.uint8), "max")  # the bytes of the others are 0
            yield window

    def whole(self) -> np.ndarray:
        """All elements. Every rank calls this."""
        pieces = [*self.windows(), np.empty(0, self.dtype)]
        found: np.ndarray = np.concatenate(pieces).reshape(self.shape)
        return found


def in_order(numbers: Sequence[float]) -> float:
    """The sum of numbers, added one after the other: `sum` is compensated from Python 3.12 on."""
    total = 0.0
    for number in numbers:
        total += number
    return total
