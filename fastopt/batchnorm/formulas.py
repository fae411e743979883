"""The scalar functions of BatchNorm: no loops, no arrays, no backend. A backend binds them into its own loops.

x is a value, m the number of values per channel, mean and var = sum (x - mean)^2 / m the statistics of the channel:

    inv_std = 1 / sqrt(var + eps)
    xhat    = (x - mean) inv_std
    y       = gamma xhat + beta                         [ + residual ] [ max(., 0) ]
    dbeta   = sum g
    dgamma  = sum g xhat                                g = dy, or 0 where y <= 0 if ReLU was fused
    dx      = gamma inv_std (g - mean(g) - xhat mean(g xhat))

Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1; dx as in its section 3, terms gathered.

Functions of an element compute in the dtype of the data, functions of a channel in float64. The mean is rounded to the
dtype of the data ("center") before it is subtracted, and the shift makes up for the rounding. So y is as exact as with
the unrounded mean, and in a constant channel, whose mean is its value, y is exactly beta.

Every formula stands here once: the loops of both backends and `fold_batchnorm` call it. A function of an element may
use the upper-case constants of the kernel: the flags RELU and RESIDUAL, and ZERO of the dtype. A function of a channel
uses none of these, and is plain Python.
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

GUARD = 16.0
"""How many times the sum of squared deviations from a value may exceed the sum of squares about the mean before float32
has lost too many digits."""


class Center(NamedTuple):
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


class Normaliser(NamedTuple):
    """What the sums of a channel's gradients need: `Affine`, and inv_std."""

    center: Any
    scale: Any
    shift: Any
    inv_std: Any


class GradientMap(NamedTuple):
    """What a channel's dx needs: `Normaliser`, and dx = dy_scale g + xhat_scale xhat + offset."""

    center: Any
    scale: Any
    shift: Any
    inv_std: Any
    dy_scale: Any
    xhat_scale: Any
    offset: Any


# --- per element ------------------------------------------------------------------------------------------------------


def deviation_terms(x, h):
    """The two terms whose sums give mean and variance. Squares of differences: E[x^2] - E[x]^2 would cancel."""
    d = x - h.center
    return d, d * d


def affine(x, h):
    """Gamma xhat + beta."""
    return (x - h.center) * h.scale + h.shift


def normalise(x, residual, h):
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


def gradient_terms(x, dy, y, h):
    """The two terms whose sums give dbeta and dgamma. xhat first: dy (x - mean) would overflow where x is large."""
    g = masked(x, dy, y, h)
    return g, g * ((x - h.center) * h.inv_std)


def gradient(x, dy, y, h):
    """One value of dx, and of the residual's gradient."""
    g = masked(x, dy, y, h)
    return h.dy_scale * g + h.xhat_scale * ((x - h.center) * h.inv_std) + h.offset, g


# --- per channel, in float64: statistics ------------------------------------------------------------------------------


def near(a, b, c, d):
    """A value near those of a channel, from four of them. One of them alone may be an outlier, far from the others."""
    return (0.25 * a + 0.25 * b) + (0.25 * c + 0.25 * d)


# `share` is 1 / m: there are many sums, and a division takes as long as ten multiplications.


def squares_about_mean(s, q, share):
    """The sum of squares about the mean of values whose sum is s and whose sum of squares is q."""
    return q - s * (s * share)


def sums_are_exact(s, q, share, largest):
    """Whether sums of float32 deviations have lost few digits; `largest`: the largest number of that dtype."""
    return (q <= GUARD * squares_about_mean(s, q, share)) & (q <= largest)


def moments(s, q, share, center):
    """(mean, sum of squares about it) of values, from the sums of the `deviation_terms` from `center`."""
    squares = squares_about_mean(s, q, share)
    return s * share + center, 0.0 if squares < 0.0 else squares


def merge_moments(n, mean, squares, more, more_mean, more_squares):
    """(count, mean, sum of squares about it) of two sets of values together, by Chan's formula."""
    if more == 0.0:
        return n, mean, squares
    total = n + more
    delta = more_mean - mean
    return total, mean + delta * (more / total), squares + more_squares + delta * (n * more / total) * delta


def squares_about(center, count, mean, squares):
    """The sum of squares about `center` of values whose moments are `mean` and `squares`."""
    delta = mean - center
    return squares + count * delta * delta


def variance(squares, count):
    """The variance that normalises a batch."""
    return squares / count


def unbiased_variance(squares, count):
    """The variance of a batch that the running statistics record."""
    return squares / (count - 1.0)


def is_recordable(mean, var):
    """Whether the statistics of a batch may enter the running ones, where an infinity or a NaN would stay for ever."""
    return (mean - mean == 0.0) & (var - var == 0.0)


def blend(running, batch, momentum, largest):
    """A running statistic after a batch; at most `largest`: float64 holds a variance that the dtype may not."""
    new = (1.0 - momentum) * running + momentum * batch
    return largest if new > largest else new


# --- per channel, in float64: coefficients ----------------------------------------------------------------------------


def inverse_std(var, eps):
    """1 / sqrt(var + eps)."""
    return 1.0 / math.sqrt(var + eps)


def rounding(mean, center, inv_std):
    """How much too large xhat is, because `center` and not `mean` is subtracted."""
    return (mean - center) * inv_std


def affine_coefficients(mean, center, inv_std, gamma, beta):
    """(scale, shift) of y."""
    return gamma * inv_std, beta - gamma * rounding(mean, center, inv_std)


def gamma_gradient(sum_g, sum_g_xhat, lost):
    """Dgamma, from the sums of the `gradient_terms`, whose xhat is too large by `lost`, the `rounding`."""
    return sum_g_xhat - lost * sum_g


def gradient_coefficients(sum_g, dgamma, count, gamma, inv_std, lost, training):
    """(dy_scale, xhat_scale, offset) of dx, whose xhat is too large by `lost`, the `rounding`.

    Without `training` the statistics are constants, which send no gradient back.
    """
    dy_scale = gamma * inv_std
    if not training:
        return dy_scale, 0.0, 0.0
    xhat_scale = -dy_scale * (dgamma / count)
    return dy_scale, xhat_scale, -dy_scale * (sum_g / count) - xhat_scale * lost
