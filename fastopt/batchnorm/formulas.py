"""The scalar pieces of BatchNorm: no loops, no arrays, no backend. A backend binds them into its own loops.

x a value, m values per channel, mean and var = sum (x - mean)^2 / m of the channel:

    inv_std = 1 / sqrt(var + eps)
    xhat    = (x - mean) inv_std
    y       = gamma xhat + beta                         [ + residual ] [ max(., 0) ]
    dbeta   = sum dy
    dgamma  = sum dy xhat                               dy: what arrives, where y > 0 if ReLU was fused
    dx      = gamma inv_std (dy - mean(dy) - xhat mean(dy xhat))

Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1; dx as in its section 3, terms gathered.

Per element all runs in the dtype of the data; per channel in float64. The mean is rounded to that dtype ("center")
before it is subtracted, and the rounding goes into the shift: y is as exact as if the mean had not been rounded, and in
a constant channel, whose mean is its value, y is exactly beta.

Upper-case names are constants of the kernel: the flags RELU and RESIDUAL, and ZERO of the dtype.
"""

# Scalar functions and loops are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: F821
from __future__ import annotations

import math
from typing import Any, NamedTuple

RELU: Any
RESIDUAL: Any
ZERO: Any


class Shift(NamedTuple):
    """What the sums of a channel's statistics need: any value near its values."""

    center: Any


class Affine(NamedTuple):
    """What a channel's y needs."""

    center: Any
    """The mean, rounded to the dtype of the data."""
    scale: Any
    """gamma inv_std"""
    shift: Any
    """beta, less what the rounding of the mean would add to y."""


class Moments(NamedTuple):
    """What the sums of a channel's gradients need: `Affine`, and inv_std."""

    center: Any
    scale: Any
    shift: Any
    inv_std: Any


class Slope(NamedTuple):
    """What a channel's dx needs: `Moments`, and dx = slope dy + lean xhat + offset."""

    center: Any
    scale: Any
    shift: Any
    inv_std: Any
    slope: Any
    lean: Any
    offset: Any


# --- per element ------------------------------------------------------------------------------------------------------


def deviation(x, _dy, _y, h):
    """The two terms whose sums give mean and variance. Squares of differences: E[x^2] - E[x]^2 would cancel."""
    d = x - h.center
    return d, d * d


def affine(x, h):
    """Gamma xhat + beta."""
    return (x - h.center) * h.scale + h.shift


def normalise(x, residual, _, h):
    """One value of y."""
    y = affine(x, h)
    if RESIDUAL:
        y = y + residual
    if RELU:
        y = ZERO if y < ZERO else y  # in this order, so that a NaN stays one
    return y


def masked(x, dy, y, h):
    """The gradient before the ReLU: dy where y > 0.

    Without a residual y is computed again from x, to the same bits, which reads one array less.
    """
    if RELU:
        if RESIDUAL:
            return ZERO if y <= ZERO else dy
        return ZERO if affine(x, h) <= ZERO else dy
    return dy


def slopes(x, dy, y, h):
    """The two terms whose sums give dbeta and dgamma. xhat first: dy (x - mean) would overflow where x is large."""
    g = masked(x, dy, y, h)
    return g, g * ((x - h.center) * h.inv_std)


def gradient(x, dy, y, h):
    """One value of dx, and of the residual's gradient."""
    g = masked(x, dy, y, h)
    return h.slope * g + h.lean * ((x - h.center) * h.inv_std) + h.offset, g


# --- per channel, in float64 ------------------------------------------------------------------------------------------


def inverse_std(var, eps):
    """1 / sqrt(var + eps)."""
    return 1.0 / math.sqrt(var + eps)


def rounding(mean, center, inv_std):
    """What was lost in xhat by subtracting `center` for `mean`."""
    return (mean - center) * inv_std


def blend(running, batch, weight, largest):
    """A running statistic after a batch; `largest`, where its dtype cannot hold it: infinity would stay for ever."""
    new = (1.0 - weight) * running + weight * batch
    return largest if new > largest else new


def gradient_coefficients(sum_g, sum_g_xhat, count, gamma, inv_std, lost):
    """(slope, lean, offset) of dx, whose xhat is too large by `lost`."""
    slope = gamma * inv_std
    lean = -slope * (sum_g_xhat / count)
    return slope, lean, -slope * (sum_g / count) - lean * lost
