"""`NCCLCommunicator`: ranks that have a GPU each, by NCCL as CuPy offers it. It has not been run on several GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np


class NCCLCommunicator:
    """A `Communicator` on an ``NcclCommunicator`` of CuPy, for arrays of a device, on CuPy's current stream.

    Args:
        comm: ``cupy.cuda.nccl.NcclCommunicator(size, id, rank)``.

    >>> import fastopt
    >>> fastopt.distributed.communicator_of(None)  # NCCLCommunicator(comm) for an NcclCommunicator
    """

    def __init__(self, comm: Any):
        import cupy
        from cupy.cuda import nccl

        self._comm = comm
        self._cupy = cupy
        self._nccl = nccl
        self._stream = cupy.cuda.get_current_stream
        self._types = {name: getattr(nccl, f"NCCL_{name.upper()}") for name in ("float32", "float64", "int64", "uint8")}
        self._operations = {"sum": nccl.NCCL_SUM, "max": nccl.NCCL_MAX}
        self.rank: int = comm.rank_id()
        self.size: int = comm.size()

    def allreduce(self, array: Any, op: str = "sum") -> None:
        """As `Communicator`; an array of NumPy goes to the device and back."""
        there = self._cupy.asarray(array) if isinstance(array, np.ndarray) else array
        address, operation = there.data.ptr, self._operations[op]
        self._comm.allReduce(address, address, there.size, self._type(there), operation, self._stream().ptr)
        if there is not array:
            array[...] = there.get()

    def reduce_scatter(self, whole: Any, own: Any) -> None:
        """As `Communicator`."""
        operation = self._operations["sum"]
        self._comm.reduceScatter(whole.data.ptr, own.data.ptr, own.size, self._type(own), operation, self._stream().ptr)

    def allgather(self, own: Any, whole: Any) -> None:
        """As `Communicator`."""
        self._comm.allGather(own.data.ptr, whole.data.ptr, own.size, self._type(own), self._stream().ptr)

    def alltoall(self, sent: Any, received: Any) -> None:
        """As `Communicator`."""
        count, kind, stream = sent.size // self.size, self._type(sent), self._stream().ptr
        stride = count * sent.itemsize
        self._nccl.groupStart()
        for other in range(self.size):
            self._comm.send(sent.data.ptr + other * stride, count, kind, other, stream)
            self._comm.recv(received.data.ptr + other * stride, count, kind, other, stream)
        self._nccl.groupEnd()

    def abort(self) -> None:
        """As `Communicator`."""
        self._comm.abort()

    def _type(self, array: Any) -> Any:
        return self._types[array.dtype.name]
