"""The memory limit of this machine: kernels that move the same bytes and compute almost nothing.

`limit_of` returns a twin of an optimizer that reads and writes buffers of the same sizes in the same loop, with one
multiply-add per value; the twin of a rule with sums reads as much before. `copy` and `add` are the passes
that BatchNorm needs at least: forward reads one array and writes one, backward reads two and writes one.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from fastopt import Optimizer, Rule, Sums, rule
from fastopt.kernels.driver import Loop
from fastopt.kernels.elements import reads_of
from fastopt.kernels.intrinsics import window
from fastopt.source import written

CHUNK = 32_768


class _Hyper(NamedTuple):
    """Hyperparameters of the limit's kernels."""

    keep: float


def _prepare(t: int) -> _Hyper:
    return _Hyper(0.5)


def _half(sums, numbers, size, h):
    return h.keep


@cache
def limit_rule(states: int, passes: tuple[tuple[int, ...], ...] = ()) -> Rule:
    """Return a rule of so many states whose every value is one multiply-add, after passes that read so much.

    Args:
        states: how many.
        passes: for each pass before the update the arrays that it adds up: 0 for p, 1 for g, then the states.
    """
    names = ["p", "g", *[f"s{k}" for k in range(states)], "h"]
    new = ", ".join(f"h.keep * {name} + g" for name in names if name not in ("g", "h"))
    sums = []
    for read in passes:
        added = written("added", names, [f"return {' + '.join(names[k] for k in read)}"], {}, __name__)
        sums.append(Sums({"added": added}, _half, results=("keep",)))
    return rule(_prepare, sums=sums)(written(f"limit_{states}", names, [f"return {new}"], {}, __name__))


def passes_of(of: Rule) -> tuple[tuple[int, ...], ...]:
    """Return for each pass of a rule before its update the arrays that it reads, as in `limit_rule`."""
    found = [reads_of((*sums.terms.values(), *sums.norms.values())) for sums in of.sums]
    return tuple(read for read in found if read)


def limit_of(optimizer: Optimizer) -> Optimizer:
    """Return a twin of an optimizer, with the same layout and the same gradients, that only moves the bytes.

    The twin's step reads and writes buffers of the same sizes in the same loops, with one multiply-add per value; the
    twin of a rule with sums adds up what these read. The twin has no step options (clipping, averaging, zeroing).

    Args:
        optimizer: any optimizer. For one that multiplies matrices (Muon) the twin only moves the bytes of the update.

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
    twins = limit_rule(len(optimizer.rule.states), passes_of(optimizer.rule))
    flat = optimizer.flat
    twin = Optimizer([np.zeros_like(leaf) for leaf in flat.views(flat.data)], twins)
    twin.flat.grad[:] = flat.grad
    return twin


def bytes_of(optimizer: Optimizer) -> int:
    """Return the number of bytes that a step of `optimizer` reads and writes, without clipping, averaging or zeroing.

    One pass reads p, g and the states and writes p and the states. Before it, a rule with sums reads what these are of.

    Args:
        optimizer: any optimizer; for one that multiplies matrices (Muon) only the update counts.

    Returns:
        The number of bytes, without the padding of the buffers.

    >>> import numpy as np, fastopt
    >>> bytes_of(fastopt.Adam({"w": np.zeros(1000, np.float32)}))
    28000
    """
    passes = 3 + 2 * len(optimizer.rule.states) + sum(map(len, passes_of(optimizer.rule)))
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
