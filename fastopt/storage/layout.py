"""`Layout`: where each parameter's part of a buffer is, and the chunks that a kernel works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from fastopt.kernels.contract import ALIGNMENT, BLOCK, CODES, N_CHUNK, N_LINE, N_PLACE, N_TILE, Chunk, Tiles
from fastopt.lazy import lazy

MIN_CHUNK = 1024
MAX_CHUNK = 32_768
CHUNKS = 64
"""The elements of all parameters are cut into about CHUNKS chunks of MIN_CHUNK to MAX_CHUNK elements: enough of them to
share out evenly among threads, each long enough to hide the cost of starting a loop (10-20 ns)."""

TILE = 32_768
"""The most elements of a tile of a matrix ..."""
TILE_ROWS = 16
"""... which has as many rows, if there are, so that the partial sums of its columns are few beside its elements."""


PLACE, START, STOP, GRAD, LINE = (Chunk._fields.index(name) for name in ("place", "start", "stop", "grad", "block"))


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of a parameter of two axes or more: the first axis, and the others."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Layout:
    """Where each parameter is in a flat buffer. Pure arithmetic on Python ints: it allocates no buffer."""

    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    size: int
    states: tuple[int, ...] | None = None
    """Where each parameter is in buffers of states, where that is elsewhere: see `with_codes`."""
    coded: int = 0
    """How many elements of these buffers have codes: the first ones."""
    networks: int = 1
    """How many networks the parameters belong to: those of the first one come first, as many as of every other."""
    part: int = 0
    """Which part of the buffer this process updates, and holds the states of ..."""
    parts: int = 1
    """... of so many equal ones."""
    uncut: tuple[bool, ...] = ()
    """For each parameter whether it lies in one part; empty where all may be cut."""

    @classmethod
    def of(
        cls,
        shapes: Sequence[tuple[int, ...]],
        itemsize: int = 4,
        part: int = 0,
        parts: int = 1,
        uncut: Sequence[bool] = (),
    ) -> Layout:
        """Lay out parameters of these shapes, each on a 64-byte boundary; the gaps between them are padding.

        Several parts are whole numbers of `BLOCK`, and a parameter that does not lie in one of them begins at one: the
        blocks of its sums are those of a single part. uncut : for each parameter whether it must lie in one part.
        """
        step = ALIGNMENT // itemsize
        sizes = tuple(math.prod(shape) for shape in shapes)
        shapes = tuple(tuple(shape) for shape in shapes)
        total = sum(-(-size // step) * step for size in sizes)
        if parts == 1:
            return cls(shapes, sizes, _offsets(sizes, step, max(total, 1), ())[0], total)
        uncut = tuple(uncut)
        longest = max((size for size, whole in zip(sizes, uncut, strict=False) if whole), default=0)
        blocks = max(1, -(-total // (parts * BLOCK)), -(-longest // BLOCK))
        offsets, end = _offsets(sizes, step, blocks * BLOCK, uncut)
        while end > parts * blocks * BLOCK:
            blocks += 1 + (blocks // 256 if longest else 0)
            offsets, end = _offsets(sizes, step, blocks * BLOCK, uncut)
        return cls(shapes, sizes, offsets, parts * blocks * BLOCK, part=part, parts=parts, uncut=uncut)

    @property
    def start(self) -> int:
        """Where the part of this process begins ..."""
        return self.part * self.length

    @property
    def length(self) -> int:
        """... and how many elements it has."""
        return self.size // self.parts

    @lazy
    def held(self) -> tuple[slice, ...]:
        """For each parameter, the elements in the part of this process."""
        ends = [self.start - offset for offset in self.offsets]
        return tuple(
            slice(min(max(end, 0), size), min(max(end + self.length, 0), size))
            for end, size in zip(ends, self.sizes, strict=True)
        )

    @lazy
    def is_held(self) -> tuple[bool, ...]:
        """For each parameter whether this process has all of it in its part."""
        return tuple(own.stop - own.start == size for own, size in zip(self.held, self.sizes, strict=True))

    @lazy
    def is_cut(self) -> tuple[bool, ...]:
        """For each parameter whether it lies in several parts."""
        return tuple(
            size > 0 and offset // self.length != (offset + size - 1) // self.length
            for offset, size in zip(self.offsets, self.sizes, strict=True)
        )

    def cut(self, chunks: np.ndarray) -> np.ndarray:
        """The chunks of the part of this process, whose partial sums are numbered from 0.

        chunks : those of all parts; made with ``whole=True`` where partial sums are asked for.
        """
        origin = np.array(self.offsets, np.int64)[chunks[:, PLACE]]
        first = np.maximum(chunks[:, START], self.start - origin)
        last = np.minimum(chunks[:, STOP], self.start + self.length - origin)
        own = chunks.copy()
        own[:, GRAD] += first - chunks[:, START]
        own[:, LINE] += (first - chunks[:, START]) // BLOCK
        own[:, START], own[:, STOP] = first, last
        own = np.ascontiguousarray(own[first < last])
        own[:, LINE] -= own[:1, LINE]
        return own

    def blocks_by_part(self, chunks: np.ndarray) -> list[int]:
        """How many partial sums the chunks have in each part. chunks : made with ``whole=True``."""
        begin = np.array(self.offsets, np.int64)[chunks[:, PLACE]] + chunks[:, START]
        counts = -(-(chunks[:, STOP] - chunks[:, START]) // BLOCK)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        parts = (np.repeat(begin, counts) + BLOCK * within) // self.length
        return np.bincount(parts, minlength=self.parts).tolist()

    def split(self, members: int) -> Layout:
        """The layout of the parameters of each member of a population, the first axis of whose arrays these have."""
        shapes = tuple(shape[1:] for shape in self.shapes)
        sizes = tuple(size // members for size in self.sizes)
        offsets = tuple(
            offset + member * size
            for member in range(members)
            for offset, size in zip(self.offsets, sizes, strict=True)
        )
        return Layout(shapes * members, sizes * members, offsets, self.size, networks=members)

    def with_codes(self, large: Sequence[bool]) -> Layout:
        """The same, with the states of some parameters before the others, in whole blocks.

        large : for each parameter whether its states have codes.
        """
        end, offsets = 0, [0] * len(self.sizes)
        for k in sorted(range(len(self.sizes)), key=lambda k: not large[k]):
            offsets[k] = end
            step = CODES if large[k] else ALIGNMENT // 4
            end += -(-self.sizes[k] // step) * step
        coded = sum(-(-size // CODES) * CODES for size, own in zip(self.sizes, large, strict=True) if own)
        return replace(self, states=tuple(offsets), coded=coded)

    @property
    def size_of_states(self) -> int:
        """The elements of a buffer of states, including padding."""
        if self.states is None:
            return self.length
        ends = [end + -(-size // 16) * 16 for end, size in zip(self.states, self.sizes, strict=True)]
        return max(self.coded, *ends)

    @property
    def size_of_units(self) -> int:
        """The numbers of a buffer of units: one for each block of codes, and the states that have no codes."""
        return self.coded // CODES + self.size_of_states - self.coded

    def places(self, p: int | np.ndarray, g: int | np.ndarray) -> np.ndarray:
        """A table of `fastopt.kernels.contract.Place`: the addresses of parameters and gradients, and these offsets.

        Those of states are counted from the beginning of this process's part, also where a parameter begins before it.
        """
        table = np.empty((len(self.sizes), N_PLACE), np.int64)
        table[:, 0] = p
        table[:, 1] = g
        table[:, 2] = np.subtract(self.offsets, self.start) if self.states is None else self.states
        table[:, 3] = np.repeat(np.arange(self.networks), len(self.sizes) // self.networks)
        return table

    def neighbours(self, places: np.ndarray, itemsize: int) -> list[bool]:
        """For each parameter whether it follows the one before without a gap, as its gradient and its states do."""
        ends = places[:, :3] + np.array(self.sizes, np.int64)[:, None] * np.array([itemsize, itemsize, 1])
        return [False, *(places[1:, :3] == ends[:-1]).all(axis=1).tolist()]

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
        unit = BLOCK if whole else (CODES if self.coded else ALIGNMENT // 4)
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

    @lazy
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """The rows and columns of each parameter: those of a matrix, the first axis and the rest of one of more axes;
        one of fewer is a single row."""
        return tuple(
            as_matrix(shape) if len(shape) > 1 else (1, size)
            for shape, size in zip(self.shapes, self.sizes, strict=True)
        )

    @lazy
    def lines(self) -> dict[str, tuple[int, ...]]:
        """Where the rows, the columns and the parameters of each parameter begin among those of all; and their end."""
        rows, columns = zip(*self.matrices, strict=True) if self.matrices else ((), ())
        whole = tuple(range(len(self.sizes) + 1))
        return {
            "row": tuple(accumulate(rows, initial=0)),
            "column": tuple(accumulate(columns, initial=0)),
            "tensor": whole,
            "all": whole,
        }

    def tiles(self, groups: Sequence[int]) -> Tiles:
        """The work of one launch of a rule with sums over rows or columns: `groups` as for `chunks`.

        How a matrix is cut depends on its shape alone, and so do the bits of its sums.
        """
        tiles: list[tuple[int, ...]] = []
        lines: dict[str, list[tuple[int, ...]]] = {"row": [], "column": [], "tensor": [], "all": []}
        parts = {"row": 0, "column": 0}
        together = len(self.sizes) // self.networks
        of_network: dict[int, list[int]] = {}
        for place, ((rows, columns), size, group) in enumerate(zip(self.matrices, self.sizes, groups, strict=True)):
            if size == 0 or group < 0:
                continue
            first_row, first_column, first_tile = self.lines["row"][place], self.lines["column"][place], len(tiles)
            across = _pieces(columns, max(TILE // TILE_ROWS, TILE // min(rows, TILE)))
            down = _pieces(rows, max(1, TILE // across[0][1]))
            for row, height in down:
                lines["row"].append((first_row + row, height, columns, len(tiles), len(across), 1, group, place))
                for column, width in across:
                    line = (first_row + row, first_column + column, parts["row"], parts["column"])
                    tiles.append((place, row, height, column, width, columns, group, *line))
                    parts["row"] += height
                    parts["column"] += width
            for k, (column, width) in enumerate(across):
                stride = len(across)
                lines["column"].append(
                    (first_column + column, width, rows, first_tile + k, len(down), stride, group, place)
                )
            lines["tensor"].append((place, 1, size, first_tile, len(tiles) - first_tile, 1, group, place))
            of_network.setdefault(place // together, []).append(len(lines["tensor"]) - 1)
        for network, found in of_network.items():  # their tiles follow each other
            own = [lines["tensor"][k] for k in found]
            _, _, _, tile, _, _, group, place = own[0]
            size, count = (sum(line[column] for line in own) for column in (2, 4))
            lines["all"].append((network * together, 1, size, tile, count, 1, group, place))
        tables = {over: _table(of_kind, N_LINE) for over, of_kind in lines.items()}
        counts = {over: ends[-1] for over, ends in self.lines.items()}
        many = {**parts, "tensor": len(tiles), "all": len(tiles)}
        return Tiles(_table(tiles, N_TILE), tables, counts, many, together)

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


def _offsets(sizes: Sequence[int], step: int, length: int, uncut: Sequence[bool]) -> tuple[tuple[int, ...], int]:
    """Where parameters begin in parts of this length, and where the last one ends."""
    offsets, end = [], 0
    for k, size in enumerate(sizes):
        if size and end // length != (end + size - 1) // length:
            unit = length if uncut and uncut[k] else BLOCK
            end = -(-end // unit) * unit
        offsets.append(end)
        end += -(-size // step) * step
    return tuple(offsets), end


def _pieces(length: int, longest: int) -> list[tuple[int, int]]:
    """Cut a length into pieces of about one size: the beginning and the length of each."""
    count = -(-length // longest)
    even = -(-length // count)
    return [(start, min(even, length - start)) for start in range(0, length, even)]


def _table(lines: list[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(lines, np.int64).reshape(-1, width)
