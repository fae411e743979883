"""`Layout`: where each parameter's part of a buffer is, and the chunks that a kernel works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastopt.kernels.contract import ALIGNMENT, BLOCK, N_CHUNK, N_PLACE

MIN_CHUNK = 1024
MAX_CHUNK = 32_768
CHUNKS = 64
"""The elements of all parameters are cut into about CHUNKS chunks of MIN_CHUNK to MAX_CHUNK elements: enough of them to
share out evenly among threads, each long enough to hide the cost of starting a loop (10-20 ns)."""


@dataclass(frozen=True)
class Layout:
    """Where each parameter is in a flat buffer. Pure arithmetic on Python ints: it allocates no buffer."""

    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], itemsize: int = 4) -> Layout:
        """Lay out parameters of these shapes, each on a 64-byte boundary; the gaps between them are padding."""
        step = ALIGNMENT // itemsize
        sizes = tuple(math.prod(shape) for shape in shapes)
        offsets = []
        end = 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // step) * step
        return cls(tuple(tuple(shape) for shape in shapes), sizes, tuple(offsets), end)

    def places(self, p: int | np.ndarray, g: int | np.ndarray) -> np.ndarray:
        """A table of `fastopt.kernels.contract.Place`: the addresses of parameters and gradients, and these offsets."""
        table = np.empty((len(self.sizes), N_PLACE), np.int64)
        table[:, 0] = p
        table[:, 1] = g
        table[:, 2] = self.offsets
        return table

    def neighbours(self, places: np.ndarray, itemsize: int) -> list[bool]:
        """For each parameter whether it follows the one before without a gap, as its gradient and its states do."""
        ends = places + np.array(self.sizes, np.int64)[:, None] * np.array([itemsize, itemsize, 1])
        return [False, *(places[1:] == ends[:-1]).all(axis=1).tolist()]

    def chunks(
        self,
        groups: Sequence[int],
        *,
        neighbours: Sequence[bool] | None = None,
        whole: bool = False,
        longest: int | None = None,
    ) -> np.ndarray:
        """The work of one launch: a line of `fastopt.kernels.contract.Chunk` each.

        Args:
            groups: for each parameter the row of its hyperparameters in the table, or -1 to skip it.
            neighbours: what the method of that name returns: neighbours of one group are joined. None joins none.
            whole: chunks end with their parameter, and are whole numbers of `BLOCK` but for the last of a parameter.
            longest: the length of the longest chunk; chosen from the size where it is None.

        No chunk covers padding, so padding stays zero whatever the rule.
        """
        if longest is None:
            longest = min(max(self.size // CHUNKS, MIN_CHUNK), MAX_CHUNK)
        unit = BLOCK if whole else ALIGNMENT // 4
        longest = max(unit, longest // unit * unit)
        lines: list[tuple[int, int, int, int, int, int]] = []
        block = 0
        for place, size, group in self._runs(groups, None if whole else neighbours):
            count = -(-size // longest)
            length = -(-size // (count * unit)) * unit
            for start in range(0, size, length):
                stop = min(start + length, size)
                lines.append((place, start, stop, start, group, block))
                block += -(-(stop - start) // BLOCK)
        return np.array(lines, np.int64).reshape(-1, N_CHUNK)

    def _runs(self, groups: Sequence[int], neighbours: Sequence[bool] | None) -> list[tuple[int, int, int]]:
        """The parameters that are not empty and not skipped, neighbours of one group joined: place, size, group."""
        runs: list[tuple[int, int, int]] = []
        end = -1  # of the last run, in parameters
        for k, (size, group) in enumerate(zip(self.sizes, groups, strict=True)):
            if size == 0 or group < 0:
                continue
            if neighbours is not None and neighbours[k] and end == k and runs[-1][2] == group:
                place, length, _ = runs[-1]
                runs[-1] = (place, length + size, group)
            else:
                runs.append((k, size, group))
            end = k + 1
        return runs
