"""Where torch's parameters and gradients are: the checks of tensors, and NumPy arrays over their memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastopt.torch.memory import device_of, memory_of

DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
HALF = (torch.bfloat16, torch.float16)
"""Those of 16 bits."""


def check_param(name: str, p: torch.Tensor) -> None:
    """Refuse a parameter that our kernels cannot update.

    Raises TypeError that names it: another dtype (complex, float8), device or layout, a wrapper of tensors;
    RuntimeError where it is on a CUDA device, and the CUDA backend cannot work.
    """
    if torch.nn.parameter.is_lazy(p):
        return  # it has its dtype and device from the first forward pass on
    device = device_of(p)
    if p.dtype not in (*DTYPES, *HALF):
        expected = "torch.float32, torch.float64, torch.bfloat16 or torch.float16"
        remedy = "use torch.optim for it, or model.float()"
        raise TypeError(f"{name}: must have dtype {expected}, got {p.dtype}; {remedy}")
    if device.type not in ("cpu", "cuda"):
        raise TypeError(
            f"{name}: must be on the CPU or a CUDA device, got a tensor on {device}; use torch.optim for it"
        )
    try:
        memory_of(device)
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: must be on the CPU where the CUDA backend cannot work, got a tensor on {device} ({error}); use "
            f"torch.optim for it"
        ) from None
    if p.layout is not torch.strided or torch.utils._python_dispatch.is_traceable_wrapper_subclass(p):
        found = p.layout if p.layout is not torch.strided else type(p).__name__
        raise TypeError(f"{name}: must be a dense tensor, got {found}; use torch.optim for it")
    if p.numel() and any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(
            f"{name}: must have memory of its own for every element, got an expanded tensor; use {name}.clone()"
        )


def rows_of(g: torch.Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """The numbers of the rows of a sparse gradient of a 2-D parameter, repeated ones included, and their gradients."""
    if g.layout is not torch.sparse_coo or g.sparse_dim() != 1 or g.dense_dim() != 1:
        return None
    return g._indices()[0].numpy(), g._values().detach().contiguous().numpy()


def dense_view(p: torch.Tensor) -> torch.Tensor | None:
    """A contiguous view of a tensor, its dimensions in the order of their strides; None where there is none."""
    own = p.detach()
    if own.data_ptr() % own.itemsize:
        return None
    if own.is_contiguous():
        return own
    order = sorted(range(own.ndim), key=lambda k: (own.stride(k), own.shape[k]), reverse=True)
    own = own.permute(order)
    return own if own.is_contiguous() else None


def same_strides(g: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether the elements of two tensors of one shape are in the same order in memory, without gaps."""
    return g.stride() == p.stride() or (g.is_contiguous() and p.is_contiguous())


class Arrays:
    """Gradients as NumPy arrays, for errors: made when somebody looks at them. Those of a device are copied then."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: list[torch.Tensor | None]):
        self._tensors = tensors

    def __iter__(self) -> Any:
        for tensor in self._tensors:
            if tensor is None:
                yield None
            else:
                own = tensor.detach().cpu()
                yield (own.float() if own.dtype in HALF else own).numpy()
