"""The memory limit of this machine: kernels that move the same bytes and compute almost nothing.

`limit_of` returns a twin of an optimizer that reads and writes buffers of the same sizes in the same loop, with one
multiply-add per value; the twin of a rule with norms has the same passes and norms. `copy` and `add` are the passes
that BatchNorm needs at least: forward reads one array and writes one, backward reads two and writes one.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from fastopt import Layerwise, Optimizer, Rule, Scaling, rule
from fastopt.kernels.driver import Loop
from fastopt.kernels.intrinsics import window
from fastopt.source import written

CHUNK = 32_768


class _Hyper(NamedTuple):
    """Hyperparameters of the limit's kernels."""

    keep: float


def _prepare(t: int) -> _Hyper:
    return _Hyper(0.5)


@cache
def limit_elementwise(states: int) -> Rule:
    """Return a rule of so many states whose every value is one multiply-add."""
    names = [f"s{k}" for k in range(states)]
    new = ", ".join(f"h.keep * {name} + g" for name in ("p", *names))
    return rule(_prepare)(written(f"limit_{states}", ["p", "g", *names, "h"], [f"return {new}"], {}, __name__))


def _one(norm_p, norm_u):
    return 1.0


def _move(p, a, b, ratio, h):
    return ratio * p + a + b


@rule(_prepare, layerwise=Layerwise(_one, _move))
def limit_layerwise(p, g, a, b, h):
    return p + g, h.keep * a + g, h.keep * b + g


class _Scaled(NamedTuple):
    """Hyperparameters with the column that receives the norms of a step."""

    keep: float
    scale: float


def _prepare_scaled(t: int, weight_decay: float = 0.0) -> _Scaled:
    return _Scaled(0.5, 1.0)


def _half(norm_p, norm_g, h):
    return h.keep


@rule(_prepare_scaled, scaling=Scaling(_half))
def limit_scaling(p, g, a, h):
    return h.scale * p + g, h.scale * a + g


def limit_of(optimizer: Optimizer) -> Optimizer:
    """Return a twin of an optimizer, with the same layout and the same gradients, that only moves the bytes.

    The twin's step reads and writes buffers of the same sizes in the same loop, with one multiply-add per value; the
    twin of a rule with norms also computes the norms. The twin has no step options (clipping, averaging, zeroing).

    Args:
        optimizer: any optimizer. For one that multiplies matrices (Muon) or takes
            sums (StableAdamW) the twin only moves the bytes of the update.

    Returns:
        An `Optimizer`, whose parameters are 0.

    Raises:
        TypeError, ValueError, RuntimeError: as for `Optimizer`, about the parameters of `optimizer`.

    >>> import numpy as np, fastopt
    >>> adam = fastopt.Adam({"w": np.zeros(1000, np.float32)})
    >>> twin = limit_of(adam)
    >>> _ = twin.step()
    >>> bytes_of(twin) == bytes_of(adam)
    True
    """
    if optimizer.rule.layerwise is not None:
        twins = limit_layerwise
    elif optimizer.rule.scaling is not None:
        twins = limit_scaling
    else:
        twins = limit_elementwise(len(optimizer.rule.states))
    flat = optimizer.flat
    twin = Optimizer([np.zeros_like(leaf) for leaf in flat.views(flat.data)], twins)
    twin.flat.grad[:] = flat.grad
    return twin


def bytes_of(optimizer: Optimizer) -> int:
    """Return the number of bytes that a step of `optimizer` reads and writes, without clipping, averaging or zeroing.

    One pass reads p, g and the states and writes p and the states. A rule with trust ratios makes a second pass over p
    and the states to apply the ratios; a rule that scales by norms first reads p and g in an additional pass.

    Args:
        optimizer: any optimizer; for one that multiplies matrices (Muon) only the update counts.

    Returns:
        The number of bytes, without the padding of the buffers.

    >>> import numpy as np, fastopt
    >>> bytes_of(fastopt.Adam({"w": np.zeros(1000, np.float32)}))
    28000
    """
    states = len(optimizer.rule.states)
    if optimizer.rule.layerwise is not None:
        passes = 2 + 2 * states + 2 + states
    else:
        passes = 3 + 2 * states + (2 if optimizer.rule.scaling is not None else 0)
    return passes * sum(leaf.nbytes for leaf in optimizer.flat.views(optimizer.flat.data))


def copy_chunks(x, out, first, last):
    for c in range(first, last):
        o = window(out, c * CHUNK, min(CHUNK, out.size - c * CHUNK))
        a = window(x, c * CHUNK, o.size)
        for i in range(o.size):
            o[i] = a[i]


def add_chunks(x, y, out, first, last):
    for c in range(first, last):
        o = window(out, c * CHUNK, min(CHUNK, out.size - c * CHUNK))
        a = window(x, c * CHUNK, o.size)
        b = window(y, c * CHUNK, o.size)
        for i in range(o.size):
            o[i] = a[i] + b[i]


@cache
def _loop(function: Any, dtype: str, arrays: int) -> Loop:
    vector = types.Array(numba.from_dtype(np.dtype(dtype)), 1, "C")
    return Loop(function, {"CHUNK": CHUNK}, (vector,) * arrays, label=f"{function.__name__}_{dtype}")


def copy(x: np.ndarray, out: np.ndarray) -> None:
    """Read one array and write one: ``out = x``, both 1-D, contiguous and of one size and dtype."""
    _loop(copy_chunks, x.dtype.name, 2).run(x, out, elements=x.size, units=-(-x.size // CHUNK))


def add(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    """Read two arrays and write one: ``out = x + y``, all 1-D, contiguous and of one size and dtype."""
    _loop(add_chunks, x.dtype.name, 3).run(x, y, out, elements=x.size, units=-(-x.size // CHUNK))
