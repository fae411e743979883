"""`fold_batchnorm`: a BatchNorm as part of the layer before it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt import scalars
from fastopt.batchnorm import formulas
from fastopt.batchnorm.functional import DTYPES, check_like, check_statistics
from fastopt.batchnorm.layer import BatchNorm
from fastopt.kernels import backend_of, get_backend


def fold_batchnorm(
    weight: np.ndarray, bias: np.ndarray | None, bn: BatchNorm, *, axis: int | None = None, groups: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Fold `bn` into the dense or convolution layer before it, for inference, and return that layer's weight and bias.

    Formula: ``weight' = weight gamma / sqrt(running_var + eps)`` along the output channels,
    ``bias' = (bias - running_mean) gamma / sqrt(running_var + eps) + beta``

    The activation of `bn` is not folded: apply it after the layer.

    Args:
        weight: float32 or float64, of shape (fan_in, fan_out) of a dense layer, or (C_out, C_in, ...) of a convolution,
            or with the output channels on another `axis`.
        bias: shape (C_out,), dtype of weight; None for a layer without one.
        bn: the BatchNorm that follows it, with running statistics.
        axis: axis of the output channels in `weight`: 0 of torch's Linear, 1 of its transposed convolutions
            (C_in, C_out / groups, ...), -1 of Keras' kernels. None is the last of a 2-D weight and the first of any
            other; it is refused where another axis is as long, as in a square layer.
        groups: of a layer whose `axis` has only the output channels of one group, C_out / groups, and the axis before
            it all input channels, group after group: a transposed convolution with groups, or Keras' depthwise kernel
            (..., C_in, multiplier), whose groups are the input channels. No effect where `axis` has all of them, as in
            an ordinary convolution with groups.

    Returns:
        (weight, bias): new arrays of the dtype of `weight`, computed in float64.

    Raises:
        TypeError, ValueError: naming the argument: a dtype or shape other than above, a number of channels other than
            that of `bn`, an `axis` that is not given and not certain, running statistics that are missing, negative or
            not finite.
        RuntimeError: the arrays of `bn` are on a device that cannot be used here.

    Source: Jacob et al. 2017, https://arxiv.org/abs/1712.05877, section 3.2.

    >>> import numpy as np
    >>> from fastopt.batchnorm import BatchNorm, fold_batchnorm
    >>> bn = BatchNorm(2, eps=1e-12, dtype=np.float64)
    >>> bn.running_mean[:] = [1.0, 2.0]; bn.running_var[:] = [4.0, 0.25]
    >>> weight, bias = fold_batchnorm(np.ones((3, 2)), None, bn)
    >>> weight[0].round(6), bias.round(6)
    (array([0.5, 2. ]), array([-0.5, -4. ]))
    """
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn: must be a BatchNorm, got {type(bn).__name__}")
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        raise ValueError("bn: must have running statistics, got a layer with track_running_stats=False")
    scalars.refuse_masked("weight", weight)
    if not isinstance(weight, np.ndarray):
        raise TypeError(f"weight: must be a NumPy array, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight: must be float32 or float64, got dtype {scalars.dtype_name(weight.dtype)}; use astype")
    if weight.ndim < 2:
        raise ValueError(f"weight: must have at least 2 dimensions, got shape {weight.shape}")
    channels = mean.size
    axis, grouped = _axis_of(weight.shape, channels, axis, groups)
    if bias is not None:
        check_like("bias", bias, (channels,), weight.dtype, get_backend("cpu"))
    known = {
        name: get_backend(backend_of(array)).host(array).astype(np.float64)
        for name, array in (*bn.params.items(), ("mean", mean), ("var", var))
    }
    check_statistics("bn.running_mean", known["mean"], "bn.running_var", known["var"])
    ones, zeros = np.ones(channels), np.zeros(channels)
    columns = {
        "bias": zeros if bias is None else bias,
        "mean": known["mean"],
        "var": known["var"],
        "gamma": known.get("gamma", ones),
        "beta": known.get("beta", zeros),
    }
    channelwise = zip(*(column.tolist() for column in columns.values()), strict=True)
    folded = [_fold_channel(**dict(zip(columns, numbers, strict=True)), eps=bn.eps) for numbers in channelwise]
    scale, new_bias = np.array(folded).T
    along = [1] * weight.ndim
    along[axis] = weight.shape[axis]
    if grouped:  # input channel i has the output channels of its group
        along[axis - 1] = weight.shape[axis - 1]
        scale = scale.reshape(groups, -1).repeat(weight.shape[axis - 1] // groups, axis=0)
    return (weight * scale.reshape(along)).astype(weight.dtype), new_bias.astype(weight.dtype)


def _axis_of(shape: tuple[int, ...], channels: int, axis: Any, groups: Any) -> tuple[int, bool]:
    """Return the axis of the output channels, from 0, and whether it has only those of one group."""
    groups = scalars.count("groups", groups, 1)
    fitting = [k for k in range(len(shape)) if shape[k] == channels]
    fitting_grouped = [k for k in range(1, len(shape)) if shape[k] * groups == channels and shape[k - 1] % groups == 0]
    if axis is None:
        chosen = len(shape) - 1 if len(shape) == 2 else 0
        others = {*fitting, *fitting_grouped} - {chosen}
        if chosen in fitting and others and channels > 1:
            raise ValueError(
                f"axis: must be given for a weight of shape {shape}, whose axes {chosen} and {min(others)} both fit "
                f"the {channels} channels of bn, got None"
            )
    else:
        expected = f"an axis of weight, whose shape is {shape}"
        axis = scalars.count("axis", axis, -len(shape), expected)
        if axis >= len(shape):
            raise ValueError(f"axis: must be {expected}, got {axis}")
        chosen = axis % len(shape)
    if chosen not in fitting and (axis is None or chosen not in fitting_grouped):
        raise ValueError(
            f"weight: must have {channels} output channels, as bn has, got {shape[chosen]} (axis {chosen} of {shape}); "
            f"pass their axis as axis=, and groups= of a transposed convolution"
        )
    return chosen, chosen not in fitting


def _fold_channel(bias: float, mean: float, var: float, gamma: float, beta: float, eps: float) -> tuple[float, float]:
    """The scale of a channel's weights, and its new bias: what BatchNorm makes of the old one."""
    inv_std = formulas.inverse_std(var, eps)
    h = formulas.Affine(mean, *formulas.affine_coefficients(mean, mean, inv_std, gamma, beta))
    return h.scale, formulas.affine(bias, h)
