"""`BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`: torch's modules, whose passes are ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.nn.functional import batch_norm

from fastopt.batchnorm.functional import LEAST_QUICK_EPS, Kind, check_statistics, kind_of
from fastopt.torch.parameters import DTYPES
from fastopt.torch.part import increment_version

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors whose memory is where they say. Others go to torch's functions."""


def _arranged(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x, or a view or copy of it, in C order; and the axis of its channels there: 1, or -1 for channels last."""
    if x.is_contiguous():
        return x, 1
    last = x.movedim(1, -1)
    return (last, -1) if last.is_contiguous() else (x.contiguous(), 1)


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor. NumPy asks for huge pages from 4 MiB on, which torch does not."""
    if x.numel() * x.itemsize < HUGE:
        return torch.empty_like(x, requires_grad=False)
    return torch.from_numpy(np.empty(x.shape, DTYPES[x.dtype]))


HUGE = 1 << 22


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Pass:
    """A forward pass: what its backward pass needs, other than the tensors that autograd keeps."""

    __slots__ = ("axis", "eps", "kind", "statistics", "workspace", "y")

    def __init__(self, y: torch.Tensor, kind: Kind, axis: int, eps: float, workspace: np.ndarray):
        self.y: torch.Tensor | None = y
        self.kind, self.axis, self.eps, self.workspace = kind, axis, eps, workspace
        self.statistics: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        """The running mean and variance that it normalised with; None in training."""

    def backward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...] | None:
        """The gradients of x, weight and bias; None where our kernels cannot take the tensors."""
        if dy.is_neg():
            dy = dy.resolve_neg()
        axis, kind = self.axis, self.kind
        if axis == 1:
            x, dy = x.contiguous(), dy.contiguous()
        else:
            x, dy = x.movedim(1, -1).contiguous(), dy.movedim(1, -1).contiguous()
        try:
            at, dy_at = x.data_ptr(), dy.data_ptr()
        except RuntimeError:  # of several gradients in one tensor (is_grads_batched)
            return None
        dx = _empty_like(x)
        dgamma, dbeta = x.new_empty(kind.view[1]), x.new_empty(kind.view[1])
        # A graph that is kept may come here again at the same time, in another thread, and passes write to a workspace.
        workspace = self.workspace.copy() if graph_is_kept() else self.workspace
        places = at, dy_at, 0, dx.data_ptr(), 0, dgamma.data_ptr(), dbeta.data_ptr()
        if not kind.quick(backward=True).backward_at(places, workspace):
            return None
        return (
            dx if axis == 1 else dx.movedim(-1, 1),
            None if weight is None else dgamma,
            None if bias is None else dbeta,
        )


def graph_is_kept() -> bool:
    """Whether the graph of the backward pass that is made may be used again."""
    return True


graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", graph_is_kept)


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
        y, made.y = made.y, None  # which holds `ctx`
        ctx.made = made
        ctx.save_for_backward(x, weight, bias)  # and have autograd see that somebody has overwritten them
        assert y is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of x, weight and bias."""
        (dy,) = grads
        made: Pass = ctx.made
        x, weight, bias = ctx.saved_tensors
        if not torch.is_grad_enabled() and not transforming():
            ours = made.backward(x, weight, bias, dy)
            if ours is not None:
                return *ours, None
        # With create_graph=True, by functions of torch, which know their own derivatives.
        in_graph = torch.is_grad_enabled()
        inputs = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
        with torch.enable_grad():
            mean, var = made.statistics
            y = batch_norm(x, mean, var, weight, bias, made.kind.training, 0.0, made.eps)
            y = y if made.kind.activation is None else y.relu()
            found = iter(torch.autograd.grad(y, inputs, dy, create_graph=in_graph))
        return *[next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias)], None


apply = super(torch.autograd.Function, Normalise).apply
"""What `Normalise.apply` calls in the end; the rest of it is for the transforms of `torch.func`, in 6 us."""

transforming = torch._C._are_functorch_transforms_active


def _observed() -> bool:
    """Whether torch compiles, traces, transforms or records what is called: then its own functions have to be."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or transforming()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def _held(module: Any, held: dict[str, Any], name: str) -> Any:
    """A parameter or buffer, which is an attribute of another kind where it is parametrized or was replaced."""
    try:
        return held[name]
    except KeyError:
        return getattr(module, name)


def _normalised(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The output of a module; None where our kernels cannot take the tensors."""
    own = module.__dict__
    parameters, buffers = own["_parameters"], own["_buffers"]
    weight = _held(module, parameters, "weight")
    bias = _held(module, parameters, "bias")
    mean = _held(module, buffers, "running_mean")
    var = _held(module, buffers, "running_var")
    tracked = _held(module, buffers, "num_batches_tracked")
    eps, momentum = float(module.eps), module.momentum
    dtype = x.dtype
    if dtype not in DTYPES or type(x) not in PLAIN or not x.is_cpu or x.is_neg() or x.ndim < 2:
        return None
    module._check_input_dim(x)
    shape = x.shape
    size, channels = x.numel(), shape[1]
    training = module.training or mean is None
    for vector in (weight, bias, mean, var):
        if vector is not None and not (
            vector.dtype is dtype
            and type(vector) in PLAIN
            and vector.is_cpu
            and vector.ndim == 1
            and vector.numel() == channels
            and vector.is_contiguous()
        ):
            return None
    if momentum is None:  # the average over all batches
        momentum = 0.0 if tracked is None else 1.0 / (tracked.item() + 1.0)
    if (
        size < (2 * channels if training else 1)
        or (weight is None) != (bias is None)
        or (mean is None) != (var is None)
        or not (LEAST_QUICK_EPS < eps < float("inf") and 0.0 <= momentum <= 1.0)
    ):
        return None
    arranged, axis = (x, 1) if x.is_contiguous() else _arranged(x)
    y = _empty_like(arranged)
    records = module.training and mean is not None
    count = np.zeros(1) if records else None
    statistics = (mean, var) if records or not training else (None, None)
    try:
        places = (arranged.data_ptr(), 0, y.data_ptr(), *map(_address, (weight, bias, *statistics)))
    except RuntimeError:  # of a tensor without memory
        return None
    if any(place % dtype.itemsize for place in places):
        return None
    relu, affine = module.relu, weight is not None
    kind = kind_of(arranged.shape, DTYPES[dtype], axis=axis, relu=relu, gamma=affine, beta=affine, training=training)
    workspace = kind.quick(backward=False).forward_at(places, eps, float(momentum), count)
    if workspace is None:
        if not training:
            check_statistics("running_mean", mean.detach().numpy(), "running_var", var.detach().numpy())
        return None
    y = y if axis == 1 else y.movedim(-1, 1)
    if count is not None:
        increment_version((mean, var))
        if count[0] and tracked is not None:
            tracked.add_(1)
    if not torch.is_grad_enabled() or not (
        x.requires_grad or (affine and (weight.requires_grad or bias.requires_grad))
    ):
        return y
    made = Pass(y, kind, axis, eps, workspace)
    if not training:
        made.statistics = mean.detach().clone(), var.detach().clone()
    found: torch.Tensor = apply(x, weight, bias, made)
    return found


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
        y = None if _observed() else _normalised(self, input)
        if y is not None:
            return y
        y = super().forward(input)  # type: ignore[misc]
        return y.relu() if self.relu else y

    def extra_repr(self) -> str:
        """The arguments, for repr."""
        return f"{super().extra_repr()}{', relu=True' if self.relu else ''}"  # type: ignore[misc]


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
