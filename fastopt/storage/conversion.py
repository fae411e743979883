"""`converted`: the arrays of a saved optimizer in the storage formats of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastopt.kernels.contract import MASTER, REST
from fastopt.storage.codes import decode, encode, unit_of

STORAGE = frozenset({"states", "master", "rounding", "compensated", "seed", "min_8bit_size"})
"""The options that say how numbers are stored: see `fastopt.Optimizer`."""

Arrays = Mapping[str, Mapping[str, np.ndarray]]


def converted(saved: Arrays, own: Arrays, paths: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return the saved numbers as arrays like those of an optimizer.

    Args:
        saved: by state, and "" for the parameters, an array for each path, in whatever format.
        own: the same of the optimizer.
        paths: of the parameters that are loaded.

    Raises:
        KeyError: a state of the optimizer was not saved. ValueError: one has another shape.
    """
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in own}
    for path in paths:
        exact = _exact(saved, path)
        for name, views in own.items():
            view = views[path]
            if name == "" or name == MASTER:
                numbers = exact
            elif name == REST:
                numbers = exact - _rounded(exact, own[""][path].dtype).astype(exact.dtype)
            elif name.endswith(unit_of("")) and name.removesuffix(unit_of("")) in own:
                continue  # with the codes
            else:
                numbers = _numbers(saved, name, path)
            if view.dtype.kind in "iu":
                found[name][path], found[unit_of(name)][path] = encode(numbers, view.dtype)
            else:
                found[name][path] = _rounded(numbers, view.dtype)
                if unit_of(name) in own:
                    found[unit_of(name)][path] = np.zeros(0, np.float32)
            if found[name][path].shape != view.shape:
                raise ValueError(
                    f"{name or 'parameter'} of {path!r}: must have shape {view.shape}, got {numbers.shape}"
                )
    return found


def _rounded(numbers: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return numbers.astype(dtype)


def _numbers(saved: Arrays, name: str, path: str) -> np.ndarray:
    """What was saved, decoded."""
    array = saved[name][path]
    if array.dtype.kind in "iu":
        return decode(array, saved[unit_of(name)][path])
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _exact(saved: Arrays, path: str) -> np.ndarray:
    """A parameter, with what was kept of it besides."""
    p = _numbers(saved, "", path)
    if MASTER in saved:
        master = saved[MASTER][path]
        known = _rounded(master, saved[""][path].dtype).astype(p.dtype) == p
        return np.where(known, master, p)
    return p + _numbers(saved, REST, path) if REST in saved else p
