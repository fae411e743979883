"""In-place weight initialisation: constants and random draws, written into existing arrays.

    >>> import numpy as np
    >>> from fastopt import init
    >>> W = init.he_normal_(np.empty((784, 256), np.float32), rng=0)   # 784 inputs, 256 outputs
    >>> b = init.zeros_(np.empty(256, np.float32))

Each function fills its array argument and returns it. Pass a writeable NumPy array of float32 or float64, of any memory
layout. Views and transposes work: `init.he_normal_(opt.params["W1"])` writes directly into the optimizer's buffer.
Values are drawn in the array's own dtype. `rng=` is None (fresh entropy), an int seed, or a `numpy.random.Generator`,
which is advanced; the same seed gives the same values for the same shape and dtype, in any memory layout.

Shapes follow the convention of `fans`: (fan_in, fan_out) for matrices and (out_channels, in_channels, *spatial) for
convolution kernels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastopt import scalars

__all__ = ["fans", "he_normal_", "he_uniform_", "normal_", "xavier_normal_", "xavier_uniform_", "zeros_"]

Weights = TypeVar("Weights", bound=NDArray[np.floating[Any]])

# Elements per draw for an array that the generator cannot fill directly: 256 KiB of float32 fit into the L2 cache.
BLOCK = 65536


class _Sampler(Protocol):
    """The common signature of `Generator.standard_normal` and `Generator.random`."""

    def __call__(self, size: Any = ..., dtype: Any = ..., out: Any = ...) -> Any: ...


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a weight array: the number of inputs per output, and of outputs per input.

    Formula: of ``(n_in, n_out)``: ``fan_in = n_in``, ``fan_out = n_out``; of ``(c_out, c_in, k1, k2, ...)``:
    ``fan_in = c_in k1 k2 ...``, ``fan_out = c_out k1 k2 ...``

    Args:
        shape: two ints, (fan_in, fan_out), for a matrix used as `x @ W`; three or more, (out_channels, in_channels,
            *spatial), for a convolution kernel. Pass a matrix stored as (out, in), as in torch, as `W.T`.

    Returns:
        (fan_in, fan_out), as ints >= 0; 0 only if an axis of `shape` is 0.

    Raises:
        ValueError: `shape` has fewer than two axes, or a negative one.
        TypeError: `shape` is not a sequence of ints.

    >>> fans((784, 256))
    (784, 256)
    >>> fans((64, 3, 7, 7))
    (147, 3136)
    """
    try:
        sizes = tuple(scalars.count(f"shape[{axis}]", n, -sys.maxsize) for axis, n in enumerate(shape))
    except TypeError:
        raise TypeError(f"shape: must be a sequence of ints such as (784, 256), got {shape!r}") from None
    if any(n < 0 for n in sizes):
        raise ValueError(f"shape: must have axes >= 0, got {sizes}")
    if len(sizes) < 2:
        raise ValueError(
            f"shape: must have at least two axes, a fan-in and a fan-out, got {sizes}; "
            "give a matrix stored as a vector the shape (fan_in, fan_out)"
        )
    if len(sizes) == 2:
        return sizes[0], sizes[1]
    window = math.prod(sizes[2:])
    return sizes[1] * window, sizes[0] * window


def zeros_(w: Weights) -> Weights:
    """Fill with zeros: the usual initial value of biases and BatchNorm's beta; hidden weights would all stay equal.

    Formula: ``w = 0``

    Args:
        w: float32 or float64 array of any shape and layout; filled in place.

    Returns:
        `w` itself.

    Raises:
        TypeError: `w` is not a NumPy array, or not of float32 or float64.
        ValueError: `w` is read-only.

    >>> zeros_(np.ones(3))
    array([0., 0., 0.])
    """
    _check_weights(w)
    w[...] = 0.0
    return w


def normal_(w: Weights, std: float = 0.01, mean: float = 0.0, rng: int | np.random.Generator | None = None) -> Weights:
    """Fill with normal draws of a given standard deviation.

    Formula: ``w ~ N(mean, std^2)``

    A fixed `std` suits one or two layers (embeddings, logistic regression). In many layers the activations vanish or
    explode, because the required deviation depends on the width: use `xavier_normal_` or `he_normal_` there.

    Args:
        w: float32 or float64 array of any shape and layout; filled in place.
        std: standard deviation; finite, >= 0.
        mean: mean; finite.
        rng: None, an int seed >= 0, or a numpy.random.Generator.

    Returns:
        `w` itself.

    Raises:
        TypeError: `w` is not a NumPy array of float32 or float64, or another argument is of the wrong type.
        ValueError: `w` is read-only, or another argument is out of range. `w` is unchanged.

    >>> w = normal_(np.empty((1000, 100), np.float32), std=0.5, rng=0)
    >>> print(w.dtype, round(float(w.std()), 2))
    float32 0.5
    """
    _check_weights(w)
    return _draw_normal(w, _number("std", std, at_least=0.0), _number("mean", mean), generator(rng))


def xavier_uniform_(w: Weights, gain: float = 1.0, rng: int | np.random.Generator | None = None) -> Weights:
    """Fill with uniform draws whose variance suits tanh and linear layers (Xavier, or Glorot, initialisation).

    Formula: ``w ~ U[-a, a]``, ``a = gain sqrt(6 / (fan_in + fan_out))``

    The variance ``2 / (fan_in + fan_out)`` is a compromise: ``1 / fan_in`` preserves the variance of the activations in
    the forward pass, ``1 / fan_out`` that of the gradients in the backward pass.

    Args:
        w: float32 or float64 array of at least two axes (see `fans`); any layout; filled in place.
        gain: factor on the deviation; finite, > 0. 1 for linear and sigmoid layers; usually 5/3 for deep tanh networks.
        rng: None, an int seed >= 0, or a numpy.random.Generator.

    Returns:
        `w` itself.

    Raises:
        TypeError: `w` is not a NumPy array of float32 or float64, or another argument is of the wrong type.
        ValueError: `w` has fewer than two axes or is read-only, or another argument is out of range. `w` is unchanged.

    >>> w = xavier_uniform_(np.empty((100, 50)), rng=0)
    >>> bool(abs(w).max() <= (6 / 150) ** 0.5)
    True

    Source: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (AISTATS 2010),
    equation 16.
    """
    std = _xavier_std(w, gain)
    return _draw_uniform(w, math.sqrt(3.0) * std, generator(rng))


def xavier_normal_(w: Weights, gain: float = 1.0, rng: int | np.random.Generator | None = None) -> Weights:
    """Fill with normal draws whose variance suits tanh and linear layers (Xavier, or Glorot, initialisation).

    Formula: ``w ~ N(0, s^2)``, ``s = gain sqrt(2 / (fan_in + fan_out))``

    Args:
        w: float32 or float64 array of at least two axes (see `fans`); any layout; filled in place.
        gain: factor on the deviation; finite, > 0. 1 for linear and sigmoid layers; usually 5/3 for deep tanh networks.
        rng: None, an int seed >= 0, or a numpy.random.Generator.

    Returns:
        `w` itself.

    Raises:
        TypeError: `w` is not a NumPy array of float32 or float64, or another argument is of the wrong type.
        ValueError: `w` has fewer than two axes or is read-only, or another argument is out of range. `w` is unchanged.

    >>> w = xavier_normal_(np.empty((300, 500)), rng=0)
    >>> round(float(w.std()), 3)
    0.05

    Source: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (AISTATS 2010),
    equation 12.
    """
    std = _xavier_std(w, gain)
    return _draw_normal(w, std, 0.0, generator(rng))


def he_uniform_(w: Weights, negative_slope: float = 0.0, rng: int | np.random.Generator | None = None) -> Weights:
    """Fill with uniform draws whose variance suits ReLU layers (He, Kaiming or MSRA initialisation).

    Formula: ``w ~ U[-a, a]``, ``a = sqrt(3) s``, ``s = sqrt(2 / ((1 + negative_slope^2) fan_in))``

    Args:
        w: float32 or float64 array of at least two axes (see `fans`); any layout; filled in place.
        negative_slope: slope of the activation below 0; finite. 0 for ReLU (a gain of sqrt(2)), 0.01 for the usual
            leaky ReLU, 1 without an activation.
        rng: None, an int seed >= 0, or a numpy.random.Generator.

    Returns:
        `w` itself.

    Raises:
        TypeError: `w` is not a NumPy array of float32 or float64, or another argument is of the wrong type.
        ValueError: `w` has fewer than two axes or is read-only, or another argument is out of range. `w` is unchanged.

    >>> w = he_uniform_(np.empty((600, 50)), rng=0)
    >>> bool(abs(w).max() <= 0.1)
    True

    Source: He et al., "Delving Deep into Rectifiers" (ICCV 2015, https://arxiv.org/abs/1502.01852),
    equations 10 and 15.
    """
    std = _he_std(w, negative_slope)
    return _draw_uniform(w, math.sqrt(3.0) * std, generator(rng))


def he_normal_(w: Weights, negative_slope: float = 0.0, rng: int | np.random.Generator | None = None) -> Weights:
    """Fill with normal draws whose variance suits ReLU layers (He, Kaiming or MSRA initialisation).

    Formula: ``w ~ N(0, s^2)``, ``s = sqrt(2 / ((1 + negative_slope^2) fan_in))``

    A ReLU drops half of the second moment of a centred input; twice the variance of a linear layer compensates for it.

    Args:
        w: float32 or float64 array of at least two axes (see `fans`); any layout; filled in place.
        negative_slope: slope of the activation below 0; finite. 0 for ReLU (a gain of sqrt(2)), 0.01 for the usual
            leaky ReLU, 1 without an activation.
        rng: None, an int seed >= 0, or a numpy.random.Generator.

    Returns:
        `w` itself.

    Raises:
        TypeError: `w` is not a NumPy array of float32 or float64, or another argument is of the wrong type.
        ValueError: `w` has fewer than two axes or is read-only, or another argument is out of range. `w` is unchanged.

    >>> w = he_normal_(np.empty((800, 500)), rng=0)
    >>> round(float(w.std()), 3)
    0.05

    Source: He et al., "Delving Deep into Rectifiers" (ICCV 2015, https://arxiv.org/abs/1502.01852),
    equations 10 and 15.
    """
    std = _he_std(w, negative_slope)
    return _draw_normal(w, std, 0.0, generator(rng))


def generator(rng: int | np.random.Generator | None) -> np.random.Generator:
    """Return the generator of an `rng=` argument: None is fresh entropy, an int a seed, a Generator is used unchanged.

    Raises:
        TypeError: `rng` has another type, such as numpy.random.RandomState, whose streams differ.
        ValueError: a negative seed.
    """
    if rng is None or isinstance(rng, np.random.Generator):
        return np.random.default_rng(rng)
    if not isinstance(scalars.real(rng), int):
        raise TypeError(
            f"rng: must be None, an int seed or a numpy.random.Generator, got {type(rng).__name__}; "
            "use numpy.random.default_rng(seed)"
        )
    return np.random.default_rng(scalars.count("rng", rng, 0, "a seed >= 0"))


def _xavier_std(w: NDArray[Any], gain: float) -> float:
    """Return Glorot & Bengio's standard deviation; also check the arguments of both Xavier functions."""
    _check_weights(w)
    factor = _number("gain", gain, above=0.0)
    fan_in, fan_out = _fans_of(w)
    return factor * math.sqrt(2.0 / (fan_in + fan_out)) if w.size else 0.0


def _he_std(w: NDArray[Any], negative_slope: float) -> float:
    """Return He et al.'s standard deviation; also check the arguments of both He functions."""
    _check_weights(w)
    slope = _number("negative_slope", negative_slope)
    fan_in, _ = _fans_of(w)
    # Use hypot and two roots instead of 1 + slope**2, which overflows for a huge slope.
    return math.sqrt(2.0) / math.hypot(1.0, slope) / math.sqrt(fan_in) if w.size else 0.0


def _fans_of(w: NDArray[Any]) -> tuple[int, int]:
    if w.ndim < 2:
        raise ValueError(
            "w: must have at least two axes, (fan_in, fan_out) or (out_channels, in_channels, *spatial), got shape "
            f"{w.shape}; fill biases with zeros_ or normal_, or pass a view with two axes: w.reshape(fan_in, fan_out)"
        )
    return fans(w.shape)


def _check_weights(w: object) -> None:
    scalars.refuse_masked("w", w)
    if not isinstance(w, np.ndarray):
        raise TypeError(f"w: must be a NumPy array, got {type(w).__name__}; pass np.empty(shape, np.float32)")
    if w.dtype != np.float32 and w.dtype != np.float64:
        raise TypeError(
            f"w: must be float32 or float64 in native byte order, got {scalars.dtype_name(w.dtype)}; "
            "convert it with w.astype(np.float32)"
        )
    if not w.flags.writeable:
        raise ValueError("w: must be writeable, got a read-only array; pass w.copy() and keep the returned array")


def _number(name: str, value: object, at_least: float = -math.inf, above: float = -math.inf) -> float:
    expected = "a finite number" + (
        f" >= {at_least:g}" if at_least > -math.inf else f" > {above:g}" if above > -math.inf else ""
    )
    number = scalars.number(name, value, expected)
    if not (math.isfinite(number) and number >= at_least and number > above):
        raise ValueError(f"{name}: must be {expected}, got {value!r}")
    return number


def _draw_normal(w: Weights, std: float, mean: float, rng: np.random.Generator) -> Weights:
    return _draw(w, rng.standard_normal, std, mean)


def _draw_uniform(w: Weights, bound: float, rng: np.random.Generator) -> Weights:
    return _draw(w, rng.random, 2.0 * bound, -bound)


def _draw(w: Weights, sampler: _Sampler, scale: float, shift: float) -> Weights:
    """Fill `w`, in index order, with `scale * draw + shift`."""
    if w.flags.c_contiguous and w.flags.aligned:
        _scale(sampler(dtype=w.dtype, out=w), scale, shift)
    else:
        # The generator would fill a Fortran-ordered array in memory order, so that a transposed weight would get other
        # values from the same seed.
        for block in _blocks(w):
            block[...] = _scale(sampler(size=block.shape, dtype=w.dtype), scale, shift)
    return w


def _scale(w: Weights, scale: float, shift: float) -> Weights:
    np.multiply(w, scale, out=w)
    if shift:
        np.add(w, shift, out=w)
    return w


def _blocks(w: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield views that cover `w` in index order, of at most BLOCK elements each."""
    if w.size <= BLOCK:
        yield w
        return
    row = w.size // len(w)
    if row > BLOCK:
        for i in range(len(w)):
            yield from _blocks(w[i])
        return
    rows = BLOCK // row
    for start in range(0, len(w), rows):
        yield w[start : start + rows]
