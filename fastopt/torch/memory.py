"""`HostMemory` and `DeviceMemory`: arrays over torch's tensors and tensors over our arrays, on one device each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from fastopt.kernels import get_backend
from fastopt.kernels.contract import BFLOAT16
from fastopt.storage.formats import dtype_of


class HostMemory:
    """Memory of the CPU: NumPy arrays."""

    on_host = True
    device = torch.device("cpu")

    def array(self, tensor: torch.Tensor) -> Any:
        """An array over the memory of a contiguous tensor that requires no gradient, inside `current`."""
        if tensor.dtype is torch.bfloat16:  # which neither NumPy nor the interface of CUDA's arrays knows by name
            return self._array(tensor.view(torch.int16)).view(dtype_of(BFLOAT16, "parameters"))
        return self._array(tensor)

    def tensor(self, array: Any) -> torch.Tensor:
        """A tensor over the memory of an array of ours, which it keeps, inside `current`."""
        if array.dtype.name == BFLOAT16:
            return self._tensor(array.view(np.int16)).view(torch.bfloat16)
        return self._tensor(array)

    def _array(self, tensor: torch.Tensor) -> Any:
        """`array`, of dtypes that NumPy has."""
        return tensor.numpy()

    def _tensor(self, array: Any) -> torch.Tensor:
        """`tensor`, of dtypes that NumPy has."""
        return torch.from_numpy(array)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor that is not initialised; contiguous where no strides are given."""
        if strides is None:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=self.device)

    def current(self) -> AbstractContextManager[None]:
        """A block in which our kernels are ordered with torch's: this is where all work on arrays is done."""
        return NOTHING


NOTHING = nullcontext()


class DeviceMemory(HostMemory):
    """Memory of a CUDA device: CuPy arrays, and torch's current stream of this device.

    Raises RuntimeError, with the reason, where the CUDA backend cannot work.
    """

    on_host = False

    def __init__(self, device: torch.device):
        self.device = device
        self._xp = get_backend("cuda").xp  # type: ignore[attr-defined]
        self._streams: dict[int, Any] = {}

    def _array(self, tensor: torch.Tensor) -> Any:
        if tensor.numel() == 0:  # which has no address
            return self._xp.empty(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return self._xp.asarray(tensor)

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.as_tensor(array, device=self.device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """A block in which this device is the current one, and torch's current stream of it that of our kernels.

        So torch's work before and after needs no further order, and no tensor needs `record_stream`: what torch's
        allocator gives to later work on the same stream is read by our kernels before.

        Raises RuntimeError while torch captures a CUDA graph on this stream.
        """
        stream = self._stream(stream_of(self.device))
        with self._xp.cuda.Device(self.device.index), stream:
            if stream.is_capturing():
                raise RuntimeError(
                    f"step(): must not be captured in a CUDA graph, got a stream of {self.device} that is capturing; "
                    f"capture the passes alone, and call step() after each replay"
                )
            yield

    def _stream(self, pointer: int) -> Any:
        """CuPy's stream of this pointer: always the same object, by which the backend knows what follows what."""
        stream = self._streams.get(pointer)
        if stream is None:
            stream = self._streams[pointer] = self._xp.cuda.ExternalStream(pointer, self.device.index)
        return stream


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is."""
    return tensor.device


def stream_of(device: torch.device) -> int:
    """The pointer of torch's current stream of a CUDA device."""
    pointer: int = torch.cuda.current_stream(device).cuda_stream
    return pointer


def memory_of(device: torch.device) -> HostMemory:
    """The memory of the CPU or of a CUDA device. Raises RuntimeError as `DeviceMemory`."""
    found = _known.get(device)
    if found is None:
        found = _known[device] = DeviceMemory(device)
    return found


_known: dict[torch.device, HostMemory] = {torch.device("cpu"): HostMemory()}
