"""`Communicator`: what an engine has to offer so that several processes can train one model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

Array = Any

OPERATIONS = ("sum", "max")
"""What `Communicator.allreduce` can do."""


class CommunicatorError(RuntimeError):
    """Another rank has refused, or is gone.

    Args:
        message: says which one, where that is known.

    >>> import fastopt
    >>> raise fastopt.distributed.CommunicatorError("rank 1 has refused")
    Traceback (most recent call last):
    fastopt.communicators.protocol.CommunicatorError: rank 1 has refused
    """

    def __init__(self, message: str):
        super().__init__(message)


@runtime_checkable
class Communicator(Protocol):
    """The processes that train one model: `size` of them, and this one is number `rank`.

    Every process calls the same methods in the same order. All arrays are contiguous ones of the backend (of NumPy on
    the CPU, of CuPy on a device), of dtype float32, float64, int64 or uint8, and of the same size on every rank.

    >>> import numpy as np, fastopt
    >>> def mean_of_ranks(comm):
    ...     found = np.array([float(comm.rank)])
    ...     comm.allreduce(found)
    ...     return float(found[0]) / comm.size
    >>> fastopt.distributed.run_threads(3, mean_of_ranks)
    [1.0, 1.0, 1.0]
    """

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def allreduce(self, array: Array, op: str = "sum") -> None:
        """Write the sum, or the maximum, of the arrays of all ranks into the array of every rank.

        Args:
            array: of any shape, also one of NumPy where the backend has others; overwritten.
            op: ``"sum"``, in an order of the engine's choice, which is the same on every rank; or ``"max"``.

        >>> import numpy as np, fastopt
        >>> def greatest(comm):
        ...     found = np.array([comm.rank, -comm.rank])
        ...     comm.allreduce(found, "max")
        ...     return found
        >>> fastopt.distributed.run_threads(2, greatest)
        [array([1, 0]), array([1, 0])]
        """

    def reduce_scatter(self, whole: Array, own: Array) -> None:
        """Write part number `rank` of the sum of the arrays of all ranks into `own`.

        Args:
            whole: of any shape, `size` times as long as `own`.
            own: of any shape; overwritten; no part of `whole`.

        >>> import numpy as np, fastopt
        >>> def scattered(comm):
        ...     own = np.empty(1)
        ...     comm.reduce_scatter(np.array([1.0, 2.0]), own)
        ...     return own
        >>> fastopt.distributed.run_threads(2, scattered)
        [array([2.]), array([4.])]
        """

    def allgather(self, own: Array, whole: Array) -> None:
        """Write the arrays of all ranks, in their order, into `whole`.

        Args:
            own: of any shape; may be part number `rank` of `whole`, and no other part of it.
            whole: of any shape, `size` times as long as `own`; overwritten.

        >>> import numpy as np, fastopt
        >>> def gathered(comm):
        ...     whole = np.empty(2)
        ...     comm.allgather(np.array([0.5 + comm.rank]), whole)
        ...     return whole
        >>> fastopt.distributed.run_threads(2, gathered)
        [array([0.5, 1.5]), array([0.5, 1.5])]
        """

    def alltoall(self, sent: Array, received: Array) -> None:
        """Write part number `rank` of what each rank sends, in the order of ranks, into `received`.

        Args:
            sent: of any shape: `size` equal parts, one for each rank.
            received: of the shape of `sent`, and apart from it; overwritten.

        >>> import numpy as np, fastopt
        >>> def swapped(comm):
        ...     received = np.empty(2)
        ...     comm.alltoall(10.0 * comm.rank + np.array([0.0, 1.0]), received)
        ...     return received
        >>> fastopt.distributed.run_threads(2, swapped)
        [array([ 0., 10.]), array([ 1., 11.])]
        """

    def abort(self) -> None:
        """End what the other ranks are waiting for, after an error that they cannot know of.

        MPI ends all processes; the other engines raise an error in those that wait.

        >>> import fastopt
        >>> fastopt.distributed.run_threads(1, lambda comm: comm.abort())
        [None]
        """
