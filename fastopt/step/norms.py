"""The norm of gradients from its partial sums, and the gradients that are accumulated for the next step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastopt.kernels.contract import Chunk, in_range, root_of_squares

GROUP, LINE = Chunk._fields.index("group"), Chunk._fields.index("block")


def norm_of(partials: list[np.ndarray]) -> tuple[float, bool]:
    """The norm of the gradients of which these are the partial sums, and whether all of them are finite."""
    mark = _summed(partials, 1)
    if partials and partials[0].shape[1] == 2:  # of float32
        return math.sqrt(_summed(partials, 0)), mark == 0.0
    with np.errstate(over="ignore"):
        total = _summed(partials, 0)
        if in_range(total):
            return math.sqrt(total), mark == 0.0
        return root_of_squares(total, _summed(partials, 2), _summed(partials, 3)), mark == 0.0


FEW = 32
"""Numbers that are added up one after the other: NumPy takes ten times as long to add up so few in pairs."""


def _summed(partials: list[np.ndarray], column: int) -> float:
    """The sum of a column, in an order that depends on its length only."""
    total = 0.0
    for part in partials:
        numbers = part[:, column]
        if len(numbers) < FEW:
            of_part = 0.0
            for number in numbers.tolist():  # not by sum(), which is compensated from Python 3.12 on
                of_part += number
        else:
            of_part = float(numbers.sum())
        total += of_part
    return total


def norms_of_members(partials: np.ndarray, members: int) -> tuple[np.ndarray, np.ndarray]:
    """The norm of the gradients of each member of a population, and whether all of them are finite.

    partials : of as many lines for each member, those of the first member first. Each norm has the bits of `norm_of`.
    """
    lines = partials.reshape(members, -1, partials.shape[1])

    def summed(column: int) -> np.ndarray:
        numbers = np.ascontiguousarray(lines[:, :, column])
        if numbers.shape[1] >= FEW:
            return np.asarray(numbers.sum(axis=1))
        total = np.zeros(members)
        for of_block in numbers.T:
            total += of_block
        return total

    with np.errstate(over="ignore", invalid="ignore"):
        sums = summed(0)
        norms = np.sqrt(sums)
        if lines.shape[2] > 2:  # of float64
            unfit = np.flatnonzero(~in_range(sums))
            if len(unfit):
                up, down = summed(2), summed(3)
                for member in unfit.tolist():
                    norms[member] = root_of_squares(sums[member], up[member], down[member])
        return norms, summed(1) == 0.0


def norms_of(partials: np.ndarray, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of the table of each parameter, which is its own, and the norm of its gradient.

    chunks : those of which these are the partial sums.
    """
    first = np.flatnonzero(np.diff(chunks[:, GROUP], prepend=-1))
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.add.reduceat(partials[:, :4], chunks[first, LINE], axis=0)
        norms = np.sqrt(sums[:, 0])
        if sums.shape[1] > 2:  # of float64
            for k in np.flatnonzero(~in_range(sums[:, 0])).tolist():
                norms[k] = root_of_squares(sums[k, 0], sums[k, 2], sums[k, 3])
    return chunks[first, GROUP], norms


def counted(nonfinite: tuple[Any, Any], *, finite: Any) -> tuple[Any, Any]:
    """The steps in a row, and in all, whose gradients were not finite, after one more step.

    finite : whether they are in this one; in a population, an array, as are the numbers then.
    """
    consecutive, total = nonfinite
    if isinstance(finite, np.ndarray):
        return np.where(finite, 0, consecutive + 1), total + ~finite
    return (0, total) if finite else (consecutive + 1, total + 1)


class Pending:
    """Gradients that are accumulated for the next step."""

    __slots__ = ("partials", "present", "weight")

    def __init__(self, parameters: int, partials: Any):
        """partials : zeros, a line per block."""
        self.weight = 0.0
        self.present = np.zeros(parameters, np.bool_)
        self.partials = partials
        """Of the sums, as `fastopt.kernels.contract.Backend.add` leaves them."""
