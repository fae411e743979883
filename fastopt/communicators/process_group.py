"""`ProcessGroupCommunicator`: ranks of torch.distributed, by gloo on the CPU and NCCL on devices."""

from __future__ import annotations

from typing import Any

import numpy as np


class ProcessGroupCommunicator:
    """A `Communicator` on a process group of torch.distributed.

    Args:
        group: as ``torch.distributed.new_group`` returns it, or ``torch.distributed.group.WORLD``.

    Raises:
        ValueError: this process does not belong to it.

    >>> import fastopt
    >>> fastopt.distributed.communicator_of(None)  # ProcessGroupCommunicator(group.WORLD) for group.WORLD
    """

    def __init__(self, group: Any):
        import torch

        self._torch: Any = torch
        self._to: Any = torch.distributed
        self._group = group
        self._operations = {"sum": self._to.ReduceOp.SUM, "max": self._to.ReduceOp.MAX}
        self._on_device = self._to.get_backend(group) == "nccl"
        self.rank: int = self._to.get_rank(group)
        self.size: int = self._to.get_world_size(group)
        if self.rank < 0:
            raise ValueError("comm: must be a process group that this process belongs to, got another one")

    def allreduce(self, array: Any, op: str = "sum") -> None:
        """As `Communicator`; with NCCL, an array of NumPy goes to the device and back."""
        tensor = self._tensor(array)
        there = tensor.cuda() if self._on_device and isinstance(array, np.ndarray) else tensor
        self._to.all_reduce(there, op=self._operations[op], group=self._group)
        if there is not tensor:
            tensor.copy_(there)

    def reduce_scatter(self, whole: Any, own: Any) -> None:
        """As `Communicator`."""
        self._to.reduce_scatter_tensor(self._tensor(own), self._tensor(whole), group=self._group)

    def allgather(self, own: Any, whole: Any) -> None:
        """As `Communicator`."""
        self._to.all_gather_into_tensor(self._tensor(whole), self._tensor(own), group=self._group)

    def alltoall(self, sent: Any, received: Any) -> None:
        """As `Communicator`."""
        self._to.all_to_all_single(self._tensor(received), self._tensor(sent), group=self._group)

    def abort(self) -> None:
        """As `Communicator`: the connections are closed, at which the other ranks raise an error."""
        self._to.destroy_process_group(self._group)

    def _tensor(self, array: Any) -> Any:
        """The tensor of one axis over the same memory."""
        flat = array.reshape(-1)
        return self._torch.from_numpy(flat) if isinstance(flat, np.ndarray) else self._torch.from_dlpack(flat)
