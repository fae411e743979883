"""Communicators: what several processes that train one model exchange arrays by; and an adapter for each engine."""

from __future__ import annotations

import sys
from typing import Any

from fastopt.communicators.protocol import OPERATIONS as OPERATIONS
from fastopt.communicators.protocol import Communicator as Communicator
from fastopt.communicators.protocol import CommunicatorError as CommunicatorError
from fastopt.communicators.threads import ThreadCommunicator as ThreadCommunicator
from fastopt.communicators.threads import run_threads as run_threads


def communicator_of(comm: Any) -> Communicator | None:
    """Return the `Communicator` for what a user passes as ``comm=``.

    Args:
        comm: a communicator of mpi4py, a process group of torch.distributed, an ``NcclCommunicator`` of CuPy, an object
            with the methods of `Communicator`, or None.

    Returns:
        A `Communicator`; None for None. No engine is imported that is not loaded already.

    Raises:
        TypeError: it is something else.
        ValueError: this process does not belong to it, or it is an intercommunicator of MPI.

    >>> import fastopt
    >>> fastopt.distributed.communicator_of(None)
    >>> fastopt.distributed.run_threads(2, lambda comm: fastopt.distributed.communicator_of(comm) is comm)
    [True, True]
    """
    if comm is None:
        return None
    origins = {(kind.__module__, kind.__name__) for kind in type(comm).__mro__}
    if ("mpi4py.MPI", "Comm") in origins:
        from fastopt.communicators.mpi import MPICommunicator

        return MPICommunicator(comm)
    if ("cupy_backends.cuda.libs.nccl", "NcclCommunicator") in origins:
        from fastopt.communicators.nccl import NCCLCommunicator

        return NCCLCommunicator(comm)
    torch = sys.modules.get("torch.distributed")
    if torch is not None and torch.is_available() and isinstance(comm, torch.ProcessGroup):
        from fastopt.communicators.process_group import ProcessGroupCommunicator

        return ProcessGroupCommunicator(comm)
    if isinstance(comm, Communicator):  # after torch's, which have methods of the same names and other arguments
        return comm
    raise TypeError(
        f"comm: must be a communicator of mpi4py, a process group of torch.distributed, an NcclCommunicator of CuPy, "
        f"or have the methods of fastopt.distributed.Communicator, got {type(comm).__name__}"
    )
