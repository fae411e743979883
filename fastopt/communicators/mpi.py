"""`MPICommunicator`: ranks that are processes of MPI, by mpi4py."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import numpy as np


class MPICommunicator:
    """A `Communicator` on one of mpi4py. Arrays of a device need an MPI that was built for CUDA.

    Args:
        comm: an intracommunicator of mpi4py, such as ``MPI.COMM_WORLD``.

    Raises:
        ValueError: it is an intercommunicator, or ``MPI.COMM_NULL``.

    >>> import fastopt
    >>> fastopt.distributed.communicator_of(None)  # MPICommunicator(MPI.COMM_WORLD) for MPI.COMM_WORLD
    """

    def __init__(self, comm: Any):
        from mpi4py import MPI  # loaded already, by the caller: the import calls MPI_Init

        if comm == MPI.COMM_NULL or comm.Is_inter():
            raise ValueError(f"comm: must be an intracommunicator that this process belongs to, got {comm}")
        self._comm = comm
        self._in_place = MPI.IN_PLACE
        self._operations = {"sum": MPI.SUM, "max": MPI.MAX}
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def allreduce(self, array: Any, op: str = "sum") -> None:
        """As `Communicator`."""
        self._comm.Allreduce(self._in_place, _ready(array), op=self._operations[op])

    def reduce_scatter(self, whole: Any, own: Any) -> None:
        """As `Communicator`."""
        self._comm.Reduce_scatter_block(_ready(whole), own)

    def allgather(self, own: Any, whole: Any) -> None:
        """As `Communicator`."""
        part = whole.reshape(-1)[self.rank * own.size : (self.rank + 1) * own.size]
        if _address(part) != _address(own):
            part[...] = own.reshape(-1)
        self._comm.Allgather(self._in_place, _ready(whole))

    def alltoall(self, sent: Any, received: Any) -> None:
        """As `Communicator`."""
        self._comm.Alltoall(_ready(sent), received)

    def abort(self) -> None:
        """As `Communicator`; an error that is being handled is printed before, as nobody will after."""
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
            sys.stderr.flush()
        self._comm.Abort(1)


def _address(array: Any) -> int:
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


def _ready(array: Any) -> Any:
    """An array whose content has been computed: MPI knows nothing of streams."""
    if not isinstance(array, np.ndarray):
        import cupy

        cupy.cuda.get_current_stream().synchronize()
    return array
