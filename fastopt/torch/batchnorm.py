"""`BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`: torch's modules, whose passes are ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastopt.batchnorm.functional import batchnorm_backward, forward_pass
from fastopt.torch.parameters import DTYPES
from fastopt.torch.part import increment_version


def _arranged(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x, or a view or copy of it, in C order; and the axis of its channels there: 1, or -1 for channels last."""
    if x.is_contiguous():
        return x, 1
    last = x.movedim(1, -1)
    return (last, -1) if last.is_contiguous() else (x.contiguous(), 1)


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()


class Pass:
    """A forward pass: what it computes with, and what its backward pass needs."""

    def __init__(self, module: Any, x: torch.Tensor, training: bool):
        self.training, self.relu, self.eps = training, module.relu, float(module.eps)
        records = module.training and module.running_mean is not None
        mean: Any
        var: Any
        mean, var = (module.running_mean, module.running_var) if records or not training else (None, None)
        tracked, momentum = module.num_batches_tracked, module.momentum
        if momentum is None:  # the average over all batches
            momentum = 0.0 if tracked is None else 1.0 / (tracked.item() + 1.0)
        count = np.zeros(1)
        arranged, self.axis = _arranged(x)
        y, self.saved = forward_pass(
            _array(arranged),
            _array(module.weight),
            _array(module.bias),
            _array(mean),
            _array(var),
            training=training,
            momentum=float(momentum),
            eps=self.eps,
            axis=self.axis,
            activation="relu" if self.relu else None,
            residual=None,
            out=None,
            count=count,
        )
        self.statistics = (None, None) if training else (mean.clone(), var.clone())
        self.y = torch.from_numpy(y) if self.axis == 1 else torch.from_numpy(y).movedim(-1, 1)
        if records:
            increment_version((mean, var))
            if count[0] and tracked is not None:
                tracked.add_(1)

    def backward(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The gradients of x, weight and bias."""
        arranged = (dy if self.axis == 1 else dy.movedim(1, -1)).contiguous()
        grads = batchnorm_backward(_array(arranged), self.saved.twin())  # a graph that is kept comes here again
        dx = torch.from_numpy(grads.dx)
        dgamma, dbeta = (None if grad is None else torch.from_numpy(grad) for grad in (grads.dgamma, grads.dbeta))
        return (dx if self.axis == 1 else dx.movedim(-1, 1)), dgamma, dbeta


class Normalise(torch.autograd.Function):
    """The pair of passes, for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        made: Pass,
    ) -> torch.Tensor:
        """Return y. made : the pass, which was made before."""
        ctx.made = made
        ctx.save_for_backward(x, weight, bias)  # and have autograd see that somebody has overwritten them
        return made.y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of x, weight and bias."""
        (dy,) = grads
        made: Pass = ctx.made
        x, weight, bias = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *made.backward(dy), None
        # With create_graph=True, by functions of torch, which know their own derivatives.
        mean, var = made.statistics
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, made.training, 0.0, made.eps)
        inputs = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(y.relu() if made.relu else y, inputs, dy, create_graph=True))
        return *[next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias)], None


class Fast:
    """What the three modules share: a forward pass by our kernels where they can make it, else by torch's."""

    relu = False

    def __init__(self, *args: Any, relu: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(relu, bool):
            raise TypeError(f"relu: must be True or False, got {relu!r}")
        self.relu = relu

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 torch's name of the argument
        """Normalise a batch: see `torch.nn.BatchNorm2d`.

        Args:
            input: of shape (N, C) or (N, C, ...); contiguous, channels last, or of any other strides, which are copied.

        Returns:
            A tensor of the same shape.
        """
        module: Any = self
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or not _fits(module, input):
            y: torch.Tensor = super().forward(input)  # type: ignore[misc]
            return y.relu() if self.relu else y
        module._check_input_dim(input)
        training = module.training or module.running_mean is None
        with torch.no_grad():
            made = Pass(module, input, training)
        weight, bias = module.weight, module.bias
        if not torch.is_grad_enabled() or not (
            input.requires_grad or (weight is not None and (weight.requires_grad or bias.requires_grad))
        ):
            return made.y
        found: torch.Tensor = Normalise.apply(input, weight, bias, made)
        return found

    def extra_repr(self) -> str:
        """The arguments, for repr."""
        return f"{super().extra_repr()}{', relu=True' if self.relu else ''}"  # type: ignore[misc]


def _fits(module: Any, x: torch.Tensor) -> bool:
    """Whether our kernels can make a pass over these tensors: of the CPU, dense, of one dtype, float32 or float64."""
    tensors = (x, module.weight, module.bias, module.running_mean, module.running_var)
    dtype = x.dtype
    return (
        dtype in DTYPES
        and 1e-30 < module.eps < float("inf")
        and (module.weight is None) == (module.bias is None)
        and all(t is None or (t.dtype is dtype and t.is_cpu and t.layout is torch.strided) for t in tensors)
        and all(t is None or t.is_contiguous() for t in tensors[1:])
        and not x.is_neg()
        and not torch.utils._python_dispatch.is_traceable_wrapper_subclass(x)
    )


class BatchNorm1d(Fast, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` by our kernels; its state and its gradients are torch's.

    Formula: ``y = weight (x - mean) / sqrt(var + eps) + bias``, then ``max(y, 0)`` with ``relu=True``

    Args:
        *args, **kwargs: those of `torch.nn.BatchNorm1d`.
        relu: whether a ReLU follows, in the same pass.

    A batch with a NaN or an infinity does not move the running statistics, and is not counted. Tensors that our kernels
    cannot take (bfloat16, of a GPU), and modules under `torch.compile`, go to torch's.

    Raises:
        TypeError: `relu` is not a flag.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167

    >>> import torch, fastopt.torch
    >>> bn = fastopt.torch.BatchNorm1d(2, relu=True)
    >>> bn(torch.tensor([[1.0, 10.0], [3.0, 12.0]]))
    tensor([[0.0000, 0.0000],
            [1.0000, 1.0000]], grad_fn=<NormaliseBackward>)
    >>> bn.running_mean
    tensor([0.2000, 1.1000])
    """


class BatchNorm2d(Fast, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` by our kernels: see `BatchNorm1d`.

    Formula: ``y = weight (x - mean) / sqrt(var + eps) + bias``, then ``max(y, 0)`` with ``relu=True``

    Args:
        *args, **kwargs: those of `torch.nn.BatchNorm2d`.
        relu: whether a ReLU follows, in the same pass.

    Raises:
        TypeError: `relu` is not a flag.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167

    >>> import torch, fastopt.torch
    >>> fastopt.torch.BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).abs().max().item()
    0.0
    """


class BatchNorm3d(Fast, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` by our kernels: see `BatchNorm1d`.

    Formula: ``y = weight (x - mean) / sqrt(var + eps) + bias``, then ``max(y, 0)`` with ``relu=True``

    Args:
        *args, **kwargs: those of `torch.nn.BatchNorm3d`.
        relu: whether a ReLU follows, in the same pass.

    Raises:
        TypeError: `relu` is not a flag.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167

    >>> import torch, fastopt.torch
    >>> fastopt.torch.BatchNorm3d(3)(torch.ones(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """


OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}


def convert_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Have the BatchNorm modules of a model make their passes by our kernels, in place.

    The modules stay the objects that they are, with their parameters, buffers and hooks: an optimizer goes on, and
    ``state_dict()`` is the same. Subclasses of torch's modules, such as `torch.nn.SyncBatchNorm`, are left alone.

    Args:
        model: any module; also a BatchNorm itself.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.

    >>> import torch, fastopt.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> type(fastopt.torch.convert_batchnorm(model)[1]).__module__
    'fastopt.torch.batchnorm'
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        ours = OURS.get(type(module))
        if ours is not None:
            module.__class__ = ours
    return model
