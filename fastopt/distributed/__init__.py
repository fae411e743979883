"""Training on several processes: what is passed as ``comm=`` to an optimizer or a BatchNorm, and `LocalSGD`."""

from __future__ import annotations

from fastopt.communicators import Communicator, CommunicatorError, communicator_of, run_threads
from fastopt.distributed.local_sgd import LocalSGD

__all__ = ["Communicator", "CommunicatorError", "LocalSGD", "communicator_of", "run_threads"]
