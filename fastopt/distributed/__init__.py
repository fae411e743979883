"""Training on several processes: what they exchange arrays by. Pass one of these as ``comm=`` to an optimizer."""

from __future__ import annotations

from fastopt.communicators import Communicator, CommunicatorError, communicator_of, run_threads

__all__ = ["Communicator", "CommunicatorError", "communicator_of", "run_threads"]
