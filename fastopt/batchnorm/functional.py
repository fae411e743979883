"""`batchnorm_forward`, `batchnorm_backward`, `fold_batchnorm`: every check at the door, then the backend's kernels."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt.batchnorm import formulas
from fastopt.kernels import get_backend, place_of
from fastopt.kernels.contract import Backend

if TYPE_CHECKING:
    from fastopt.batchnorm.layer import BatchNorm

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
AXES = (1, -1)
ACTIVATIONS = (None, "relu")


class BatchNormGrads(NamedTuple):
    """The gradients that `batchnorm_backward` returns.

    Attributes:
        dx: in the shape of x.
        dgamma, dbeta: of shape (C,); None where there was no gamma, no beta.
        dresidual: in the shape of x; None where there was no residual; `dy` itself, not a copy, where no ReLU came
            after the addition.
    """

    dx: np.ndarray
    dgamma: np.ndarray | None
    dbeta: np.ndarray | None
    dresidual: np.ndarray | None


class Saved:
    """What `batchnorm_backward` needs of a forward pass; good for one backward pass.

    Attributes:
        mean, inv_std: float64, of shape (C,): the statistics the forward pass normalised with.
        shape, dtype: of x.
        training: whether they were those of the batch.
        used: whether a backward pass was made.
    """

    __slots__ = (
        "_activation",
        "_axis",
        "_backend",
        "_beta",
        "_coefficients",
        "_gamma",
        "_kernel",
        "_residual",
        "_stats",
        "_x",
        "_y",
        "dtype",
        "inv_std",
        "mean",
        "shape",
        "training",
        "used",
    )

    def __init__(
        self,
        backend: Backend,
        kernel: Any,
        x: np.ndarray,
        y: np.ndarray,
        gamma: np.ndarray | None,
        beta: np.ndarray | None,
        coefficients: Any,
        stats: Any,
        *,
        axis: int,
        activation: str | None,
        residual: bool,
        training: bool,
        lost: bool,
    ):
        self.shape = x.shape
        self.dtype = x.dtype
        self.training = training
        self.used = False
        self._backend = backend
        self._kernel = kernel
        self._x: np.ndarray | None = None if lost else x
        self._y: np.ndarray | None = y if residual and activation else None
        self._gamma = None if gamma is None else gamma.copy()  # an optimizer may step before the backward pass
        self._beta = beta is not None
        self._coefficients = coefficients
        self._stats = stats
        self.mean, self.inv_std = stats
        self._axis = axis
        self._activation = activation
        self._residual = residual

    def __repr__(self) -> str:
        state = "used" if self.used else "not used yet"
        return f"<Saved: BatchNorm of {self.dtype} {self.shape}, training={self.training}, {state}>"

    def _spend(self) -> None:
        self.used = True
        self._x = self._y = None


def batchnorm_forward(
    x: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    running_mean: np.ndarray | None = None,
    running_var: np.ndarray | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    residual: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, Saved]:
    """Normalise every channel of x to mean 0 and variance 1, then scale and shift it.

    Formula: ``y = gamma (x - mean) / sqrt(var + eps) + beta``, then ``+ residual``, then ``max(y, 0)`` for
    ``activation="relu"``

    In training mean and var are those of the batch, over all axes but the channels' (var divided by m, the number of
    values per channel), and the running statistics move: ``running = (1 - momentum) running + momentum batch``, with
    the batch's unbiased variance (divided by m - 1). Otherwise mean and var are the running statistics. One pass
    over memory for the sums and one for y, where a channel fits in a cache; the same bits for any number of threads.

    Args:
        x: float32 or float64, C-contiguous, of shape (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), or (N, ..., C)
            with ``axis=-1``. It is kept, not copied, for the backward pass: leave it as it is until then.
        gamma, beta: shape (C,), dtype of x; None for 1 and 0. [y]
        running_mean, running_var: shape (C,), dtype of x, written in place in training; both or neither. A variance
            that the dtype cannot hold is kept as its largest number. [x], [x]^2
        training: whether to use, and record, the batch's statistics.
        momentum: weight of the new batch in the running statistics, in [0, 1].
        eps: > 0. [x]^2
        axis: 1 or -1: where the channels are.
        activation: None or ``"relu"``.
        residual: added before the activation; shape and dtype of x.
        out: array to write y to; shape and dtype of x. It may be `residual`. It may be x where training is False,
            and there is then no way back through it; in training the backward pass needs x.

    Returns:
        (y, saved): y, and what `batchnorm_backward` takes.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written: another dtype, shape, memory order or
            range than above, fewer than two values per channel in training, running statistics missing or negative
            where they are needed, arrays that overlap.
        RuntimeError: the arrays lie on a device that cannot be used here.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1.

    >>> import numpy as np
    >>> from fastopt.batchnorm import batchnorm_backward, batchnorm_forward
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
    >>> y, saved = batchnorm_forward(x, np.array([2.0, 1.0]), np.array([0.0, 5.0]), eps=1e-12)
    >>> y.round(6)
    array([[-2.,  5.],
           [ 2.,  5.]])
    >>> batchnorm_backward(np.array([[1.0, 1.0], [0.0, 0.0]]), saved).dgamma.round(6)
    array([-1.,  0.])
    """
    shape = _check_x(x, axis)
    channels = shape[1]
    backend = get_backend(place_of(x))
    for name, array in (("gamma", gamma), ("beta", beta)):
        _check_channelwise(name, array, x, channels, backend)
    if (running_mean is None) != (running_var is None):
        missing, there = ("running_var", "running_mean") if running_var is None else ("running_mean", "running_var")
        raise ValueError(f"{missing}: is None but {there} is not; pass both, or neither")
    _check_channelwise("running_mean", running_mean, x, channels, backend, written=training)
    _check_channelwise("running_var", running_var, x, channels, backend, written=training)
    check_options(eps=eps, activation=activation)
    check_momentum(momentum)
    count = shape[0] * shape[2]
    if training:
        if count < 2:
            raise ValueError(
                f"x: shape {x.shape} holds {count} value{'s' * (count != 1)} per channel; in training at least 2 are "
                f"needed, for a variance; use a larger batch, or training=False"
            )
        if running_mean is not None and running_var is not None and backend.overlap(running_mean, running_var):
            raise ValueError("running_mean and running_var overlap in memory; pass arrays that share none")
    elif running_mean is None or running_var is None:
        raise ValueError(
            "running_mean: is None; with training=False the running statistics normalise x; pass them, or training=True"
        )
    elif backend.name == "cpu" and not (running_var >= 0.0).all():  # a device would have to be waited for
        raise ValueError("running_var: holds a negative number or NaN; a variance is >= 0")
    if residual is not None:
        _check_like("residual", residual, x.shape, x.dtype, backend)
    over = -1
    if out is None:
        out = backend.empty(x.shape, x.dtype)
    else:
        _check_like("out", out, x.shape, x.dtype, backend, written=True)
        if _check_same_or_apart("out", out, "x", x, backend):
            over = 0
        if training and over == 0:
            raise ValueError(
                "out: is x, which the backward pass of training needs; pass another array (residual may be "
                "overwritten), or training=False"
            )
        if residual is not None and _check_same_or_apart("out", out, "residual", residual, backend):
            over = 1
        for name, array in (
            ("gamma", gamma),
            ("beta", beta),
            ("running_mean", running_mean),
            ("running_var", running_var),
        ):
            if array is not None and backend.overlap(out, array):
                raise ValueError(f"out and {name} overlap in memory; pass an array that shares none with it")

    kernel = backend.batchnorm(formulas, x.dtype, relu=activation is not None, residual=residual is not None)
    coefficients, stats = kernel.forward(
        shape,
        x.reshape(-1),
        None if residual is None else residual.reshape(-1),
        out.reshape(-1),
        (gamma, beta, running_mean, running_var),
        training=training,
        eps=float(eps),
        weight=float(momentum),
        over=over,
    )
    saved = Saved(
        backend,
        kernel,
        x,
        out,
        gamma,
        beta,
        coefficients,
        stats,
        axis=axis,
        activation=activation,
        residual=residual is not None,
        training=training,
        lost=over == 0,
    )
    return out, saved


def batchnorm_backward(
    dy: np.ndarray,
    saved: Saved,
    *,
    out: np.ndarray | None = None,
    dgamma: np.ndarray | None = None,
    dbeta: np.ndarray | None = None,
) -> BatchNormGrads:
    """The gradients of `batchnorm_forward`.

    Formula: with dy zero where a fused ReLU left y <= 0 and m values per channel, ``dbeta = sum dy``,
    ``dgamma = sum dy xhat``, ``dx = gamma inv_std (dy - dbeta / m - xhat dgamma / m)``, ``dresidual = dy``; where the
    forward pass had training=False, mean and variance are constants and ``dx = gamma inv_std dy``

    No mask is stored: y > 0 is computed again from x, to the same bits, or read from y where there was a residual
    (leave y as it is until then).

    Args:
        dy: gradient of the loss with respect to y; shape and dtype of x, C-contiguous.
        saved: what `batchnorm_forward` returned; it is good for one call.
        out: array to write dx to; shape and dtype of x. It may be dy or x.
        dgamma, dbeta: arrays of shape (C,) to write those gradients to (not added to what is there).

    Returns:
        `BatchNormGrads` (dx, dgamma, dbeta, dresidual).

    Raises:
        TypeError, ValueError: naming the argument, before anything is written: another dtype, shape or memory order
            than x had, arrays that overlap, a destination for a gradient that there is not, x overwritten by the
            forward pass.
        RuntimeError: `saved` was used before.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3.

    >>> import numpy as np
    >>> from fastopt.batchnorm import batchnorm_backward, batchnorm_forward
    >>> y, saved = batchnorm_forward(np.array([[0.0], [1.0], [2.0]]), activation="relu")
    >>> grads = batchnorm_backward(np.ones((3, 1)), saved)
    >>> bool(abs(grads.dx.sum()) < 1e-12), grads.dgamma is None
    (True, True)
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected what batchnorm_forward returned, found {type(saved).__name__}")
    if saved.used:
        raise RuntimeError("saved: backward was called with it before; call batchnorm_forward again")
    x = saved._x
    if x is None:
        raise ValueError(
            "saved: the forward pass wrote y over x (out=x), which the backward pass needs; call batchnorm_forward "
            "with another out"
        )
    backend = saved._backend
    _check_like("dy", dy, saved.shape, saved.dtype, backend)
    y = saved._y
    over = -1
    if out is not None:
        _check_like("out", out, saved.shape, saved.dtype, backend, written=True)
        for number, (name, array) in enumerate((("x", x), ("dy", dy), ("y", y))):
            if array is not None and _check_same_or_apart("out", out, name, array, backend):
                over = number
    channels = saved.mean.size
    sums = []
    for name, array, present in (("dgamma", dgamma, saved._gamma is not None), ("dbeta", dbeta, saved._beta)):
        if array is None:
            sums.append(backend.empty((channels,), saved.dtype))
            continue
        if not present:
            raise ValueError(f"{name}: the forward pass had no {name[1:]}; leave it out")
        _check_channelwise(name, array, x, channels, backend, written=True)
        for other_name, other in (("dy", dy), ("x", x), ("y", y), ("out", out), *zip(("dgamma",), sums, strict=False)):
            if other is not None and backend.overlap(array, other):
                raise ValueError(f"{name} and {other_name} overlap in memory; pass an array that shares none with it")
        sums.append(array)

    dresidual = None
    masked = saved._residual and saved._activation is not None
    if masked:
        dresidual = backend.empty(saved.shape, saved.dtype)
    elif saved._residual:
        dresidual = dy.copy() if out is not None and backend.overlap(out, dy) else dy
    if out is None:
        out = backend.empty(saved.shape, saved.dtype)
    saved._kernel.backward(
        _view(saved.shape, saved._axis),
        x.reshape(-1),
        dy.reshape(-1),
        None if y is None else y.reshape(-1),
        (out.reshape(-1), dresidual.reshape(-1) if masked and dresidual is not None else None),
        (saved._gamma, *sums),
        (saved._coefficients, saved._stats),
        training=saved.training,
        over=over,
    )
    has_gamma, has_beta = saved._gamma is not None, saved._beta
    saved._spend()
    return BatchNormGrads(out, sums[0] if has_gamma else None, sums[1] if has_beta else None, dresidual)


def fold_batchnorm(
    weight: np.ndarray, bias: np.ndarray | None, bn: BatchNorm, *, axis: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The weight and bias of one layer that does what a dense or convolution layer and `bn` after it do in inference.

    Formula: ``weight' = weight gamma / sqrt(running_var + eps)`` along the output channels,
    ``bias' = (bias - running_mean) gamma / sqrt(running_var + eps) + beta``

    An activation of `bn` is not part of the result: apply it after the folded layer.

    Args:
        weight: float32 or float64, of shape (fan_in, fan_out) of a dense layer, or (C_out, C_in, ...) of a convolution.
        bias: shape (C_out,), dtype of weight; None for a layer without one.
        bn: the BatchNorm that follows it, with running statistics.
        axis: of the output channels in `weight`; None is the last of a 2-D weight and the first of any other.

    Returns:
        (weight, bias): new arrays of the dtype of `weight`, computed in float64.

    Raises:
        TypeError, ValueError: naming the argument: a dtype or shape other than above, another number of channels than
            `bn` has, a `bn` without running statistics.
        RuntimeError: those lie on a device that cannot be used here.

    Source: Jacob et al. 2017, https://arxiv.org/abs/1712.05877, section 3.2.

    >>> import numpy as np
    >>> from fastopt.batchnorm import BatchNorm, fold_batchnorm
    >>> bn = BatchNorm(2, eps=1e-12, dtype=np.float64)
    >>> bn.running_mean[:] = [1.0, 2.0]; bn.running_var[:] = [4.0, 0.25]
    >>> weight, bias = fold_batchnorm(np.ones((3, 2)), None, bn)
    >>> weight[0].round(6), bias.round(6)
    (array([0.5, 2. ]), array([-0.5, -4. ]))
    """
    if not all(hasattr(bn, name) for name in ("params", "running_mean", "running_var", "eps")):
        raise TypeError(f"bn: expected a BatchNorm, found {type(bn).__name__}")
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        raise ValueError("bn: has no running statistics (track_running_stats=False), so there is nothing to fold")
    if not isinstance(weight, np.ndarray):
        raise TypeError(f"weight: expected a NumPy array, found {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight: expected float32 or float64, found dtype {weight.dtype.str!r}; use astype")
    if weight.ndim < 2:
        raise ValueError(f"weight: expected at least 2 dimensions, found shape {weight.shape}")
    if axis is None:
        axis = -1 if weight.ndim == 2 else 0
    if not isinstance(axis, int) or not -weight.ndim <= axis < weight.ndim:
        raise ValueError(f"axis={axis!r}: expected an axis of weight, whose shape is {weight.shape}")
    channels = mean.size
    if weight.shape[axis] != channels:
        raise ValueError(
            f"weight: has {weight.shape[axis]} output channels (axis {axis} of {weight.shape}), but bn has {channels}; "
            f"name their axis with axis="
        )
    if bias is not None:
        _check_like("bias", bias, (channels,), weight.dtype, get_backend("cpu"))
    known = {
        name: get_backend(place_of(array)).host(array)
        for name, array in (*bn.params.items(), ("mean", mean), ("var", var))
    }
    ones, zeros = np.ones(channels), np.zeros(channels)
    scale = known.get("gamma", ones).astype(np.float64) / np.sqrt(known["var"].astype(np.float64) + bn.eps)
    shift = (zeros if bias is None else bias) - known["mean"].astype(np.float64)
    along = [1] * weight.ndim
    along[axis] = channels
    return (
        (weight * scale.reshape(along)).astype(weight.dtype),
        (shift * scale + known.get("beta", zeros)).astype(weight.dtype),
    )


# --- the checks -------------------------------------------------------------------------------------------------------


def check_options(*, eps: float, activation: str | None) -> None:
    """Refuse options out of their range."""
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps={eps!r}: expected a number, found {type(eps).__name__}")
    if not (math.isfinite(eps) and eps > 0.0):
        raise ValueError(f"eps={eps!r}: expected a finite number > 0; without it a constant channel divides by zero")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected None or 'relu'")


def check_momentum(momentum: float) -> None:
    """Refuse a weight of the new batch that is none."""
    if momentum is None:
        raise ValueError(
            "momentum=None: the average over all batches needs their number, which the layer BatchNorm(momentum=None) "
            "counts; here pass 1 / (batches seen, this one included)"
        )
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise TypeError(f"momentum={momentum!r}: expected a number, found {type(momentum).__name__}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum={momentum!r}: expected a number in [0, 1], the weight of the new batch")


def check_axis(axis: int) -> None:
    """Refuse an axis that is neither of the two layouts."""
    if isinstance(axis, bool) or axis not in AXES:
        raise ValueError(f"axis={axis!r}: expected 1 for (N, C, ...) or -1 for (N, ..., C)")


def _check_x(x: Any, axis: int) -> tuple[int, int, int]:
    check_axis(axis)
    if not isinstance(x, get_backend(place_of(x)).array_type):
        raise TypeError(f"x: expected a NumPy array, found {type(x).__name__}; use np.asarray(x)")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"x: expected float32 or float64 in native byte order, found dtype {x.dtype.str!r}; convert it with astype"
        )
    if x.ndim < 2:
        layout = "(N, C) or (N, C, ...)" if axis == 1 else "(N, ..., C)"
        raise ValueError(f"x: expected shape {layout}, found shape {x.shape}")
    _check_memory("x", x)
    view = _view(x.shape, axis)
    if view[1] == 0:
        raise ValueError(f"x: expected at least one channel, found shape {x.shape} with axis={axis}")
    return view


def _view(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(samples, channels, spatial) as which the array lies in memory."""
    if axis == -1:
        return math.prod(shape[:-1]), shape[-1], 1
    return shape[0], shape[1], math.prod(shape[2:])


def _check_memory(name: str, array: np.ndarray, written: bool = False) -> None:
    flags = array.flags
    if not flags.c_contiguous:
        hint = "np.ascontiguousarray(" + name + ")"
        if name == "x":
            hint += "; data that is channels-last in memory is taken as it is, as (N, ..., C) with axis=-1"
        raise ValueError(f"{name}: expected a C-contiguous array, found strides {array.strides}; use {hint}")
    if not getattr(flags, "aligned", True):  # CuPy's always are
        raise ValueError(
            f"{name}: expected an aligned array; its address is no multiple of {array.itemsize} bytes; pass a copy"
        )
    if written and not getattr(flags, "writeable", True):
        raise ValueError(f"{name}: is read-only, and would be written to; pass a writeable array")


def _check_like(
    name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype[Any], backend: Backend, written: bool = False
) -> None:
    _check_place(name, array, backend)
    if array.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype.str!r}, found {array.dtype.str!r}; convert it with astype")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {array.shape}")
    _check_memory(name, array, written)


def _check_place(name: str, array: Any, backend: Backend, none: str = "") -> None:
    """Refuse what is no array of this backend."""
    if not isinstance(array, backend.array_type):
        expected = "a NumPy array" if backend.name == "cpu" else "an array of the device, as x is,"
        raise TypeError(f"{name}: expected {expected}{none}, found {type(array).__name__}")


def _check_channelwise(
    name: str, array: Any, x: np.ndarray, channels: int, backend: Backend, written: bool = False
) -> None:
    if array is None:
        return
    _check_place(name, array, backend, " or None")
    if array.dtype != x.dtype:
        raise TypeError(
            f"{name}: expected dtype {x.dtype.str!r} as that of x, found {array.dtype.str!r}; convert it with astype"
        )
    if array.shape != (channels,):
        raise ValueError(
            f"{name}: expected shape ({channels},), one number per channel of x {x.shape}, found {array.shape}"
        )
    _check_memory(name, array, written)


def _check_same_or_apart(name: str, array: Any, other_name: str, other: Any, backend: Backend) -> bool:
    """Whether two arrays of one shape are the same memory; ValueError where they share some of it only."""
    if not backend.overlap(array, other):
        return False
    if backend.address(array) != backend.address(other):
        raise ValueError(
            f"{name} and {other_name} overlap in memory without being the same array; pass an array that shares none "
            f"with it"
        )
    return True
