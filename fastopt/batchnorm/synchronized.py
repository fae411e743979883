"""`Exchange`: what ranks add up in one pass over the parts that each has of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastopt.batchnorm import formulas
from fastopt.communicators import Communicator, CommunicatorError

FAILED, FORWARD, BACKWARD = 0.0, 1.0, 2.0
CALLS = {FORWARD: "forward", BACKWARD: "backward"}


class Exchange:
    """One exchange of sums among the ranks of a communicator, in which each of them learns of the errors of others.

    Args:
        comm: the ranks; each has a part of the batch, which may be empty.
        channels: how many, the same on every rank.
        call: FORWARD or BACKWARD.
    """

    def __init__(self, comm: Communicator, channels: int, call: float):
        self._comm = comm
        self._channels = channels
        self._call = call
        self._made = False

    @contextmanager
    def shared(self) -> Iterator[Exchange]:
        """A block that makes the exchange; where it raises an error before that, the others raise one as well."""
        try:
            yield self
        except BaseException:
            if not self._made:
                self._gather(FAILED, 0.0, np.zeros((2, self._channels)))
            raise

    def statistics(self, counts: np.ndarray, partials: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the count of values per channel, and the moments, of the parts of all ranks together.

        Args:
            counts: of each block of this rank's part, values per channel.
            partials: float64, (2, blocks, channels): the mean of each block, and the sum of squares about it.

        Raises:
            ValueError: there are fewer than two values per channel.
        """
        count, *own = merged(counts, partials.swapaxes(0, 1))
        total, *moments = merged(*self._gathered(count, np.stack(own)))
        if total < 2.0:
            raise ValueError(
                f"x: must have at least 2 values per channel in training, on all ranks together, got {total:.0f}; use "
                f"a larger batch, or training=False"
            )
        return total, np.stack(moments)

    def sums(self, counts: np.ndarray, partials: np.ndarray) -> tuple[float, np.ndarray]:
        """The same of sums, added up in the order of blocks and of ranks. partials : the sums of each block."""
        found, everyone = self._gathered(float(counts.sum()), np.add.reduce(partials, axis=1))
        return float(found.sum()), np.add.reduce(everyone, axis=0)

    def _gathered(self, count: float, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The counts and numbers of all ranks."""
        self._made = True
        calls, counts, everyone = self._gather(self._call, count, numbers)
        name = CALLS[self._call]
        for rank, call in enumerate(calls.tolist()):
            if call == FAILED:
                raise CommunicatorError(f"{name}(): rank {rank} has raised an error, see there; nothing was changed")
            if call != self._call:
                raise CommunicatorError(
                    f"{name}(): must be called by every rank at the same time, got {CALLS[call]}() by rank {rank}"
                )
        return counts, everyone

    def _gather(self, call: float, count: float, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own = np.concatenate([[call, count], numbers.reshape(-1)])
        everyone = np.empty((self._comm.size, own.size))
        self._comm.allgather(own, everyone)
        return everyone[:, 0], everyone[:, 1], everyone[:, 2:].reshape(-1, *numbers.shape)


def merged(counts: np.ndarray, moments: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return count, mean and sum of squares about it of several sets of values together, merged in their order.

    Args:
        counts: of each set, values per channel; may be 0.
        moments: of each set, its mean of every channel, and its sum of squares about that.
    """
    found: tuple[float, Any, Any] = (0.0, *np.zeros_like(moments[0]))
    for count, (mean, squares) in zip(counts, moments, strict=True):
        with np.errstate(invalid="ignore", over="ignore"):  # of data that are not finite
            found = formulas.merge_moments(*found, count, mean, squares)
    total, mean, squares = found
    return float(total), mean, squares
