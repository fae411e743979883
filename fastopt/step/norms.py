"""The norm of gradients from its partial sums, and the gradients that are accumulated for the next step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def norm_of(partials: list[np.ndarray]) -> tuple[float, bool]:
    """The norm of the gradients of which these are the partial sums, and whether all of them are finite."""
    # One column at a time: NumPy adds up a column of its own in pairs, in an order that depends on its length only.
    total = sum(float(part[:, 0].sum()) for part in partials)
    mark = sum(float(part[:, 1].sum()) for part in partials)
    return math.sqrt(total), mark == 0.0


class Pending:
    """Gradients that are accumulated for the next step."""

    __slots__ = ("partials", "present", "weight")

    def __init__(self, parameters: int, partials: Any):
        """partials : zeros, a line per block."""
        self.weight = 0.0
        self.present = np.zeros(parameters, np.bool_)
        self.partials = partials
        """Of the sums, as `fastopt.kernels.contract.Backend.add` leaves them."""
