"""What the norm of the gradients decides about a step, on the device: the kernel, and its result until it is read."""

# Kernels are typed by numba, for every dtype; `bind` supplies the upper-case constants.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numba import float64

from fastopt.kernels.contract import Array, in_range, root_of_squares
from fastopt.kernels.cuda.launcher import Launcher
from fastopt.kernels.cuda.target import THREADS, cuda

# --- what `bind` supplies ---------------------------------------------------------------------------------------------

CLIP_COEFFICIENT: Callable[..., Any]
"""`fastopt.kernels.contract.clip_coefficient`."""
BLOCK_SUMS: Callable[..., Any]
"""``block_sums`` of norms.py, as part of the kernel."""
WIDTH: int
"""`fastopt.kernels.contract.sums_per_block` of the dtype."""
CLIPS: bool
"""Whether gradients are clipped by norm."""
SKIPS: bool
"""Whether a step is skipped where not all gradients are finite."""
CHOOSES: bool
"""Whether the table is one of several candidates."""
COEFFICIENT: int
"""The column of `StepHyper.coefficient`."""
PROCEEDS: int
"""The column of `StepHyper.proceeds`."""

# --- the kernel -------------------------------------------------------------------------------------------------------


def decide(partials, blocks, factor, max_norm, known, candidates, rows, columns, skipped, table, result):
    """Leave in `result` the norm of gradients, the coefficient that clips them, and whether all are finite; and put
    into the table what follows from it. One block.

    With SKIPS, `skipped` is how many steps were skipped; with CHOOSES, the table is the candidate for that number.
    """
    total = cuda.shared.array(THREADS, float64)
    marks = cuda.shared.array(THREADS, float64)
    s = 0.0
    bad = 0.0
    for block in range(cuda.threadIdx.x, blocks, cuda.blockDim.x):
        s += partials[WIDTH * block]
        bad += partials[WIDTH * block + 1]
    total[cuda.threadIdx.x] = s
    marks[cuda.threadIdx.x] = bad
    BLOCK_SUMS(total, marks)
    squares = total[0]
    norm = factor * math.sqrt(squares)
    finite = 1.0 if marks[0] == 0.0 else 0.0
    if WIDTH > 2:
        cuda.syncthreads()
        if not in_range(squares):
            s = 0.0
            bad = 0.0
            for block in range(cuda.threadIdx.x, blocks, cuda.blockDim.x):
                s += partials[WIDTH * block + 2]
                bad += partials[WIDTH * block + 3]
            total[cuda.threadIdx.x] = s
            marks[cuda.threadIdx.x] = bad
            BLOCK_SUMS(total, marks)
            norm = factor * root_of_squares(squares, total[0], marks[0])
    coefficient = 1.0
    if CLIPS:
        coefficient = CLIP_COEFFICIENT(norm, max_norm)
    behind = 0
    if SKIPS:
        behind = skipped[0] - known
    for row in range(cuda.threadIdx.x, rows, cuda.blockDim.x):
        if CHOOSES:
            for column in range(columns):
                table[row * columns + column] = candidates[(behind * rows + row) * columns + column]
        table[row * columns + COEFFICIENT] = coefficient
        if SKIPS:
            table[row * columns + PROCEEDS] = finite
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        result[0] = norm
        result[1] = coefficient
        result[2] = finite
        if SKIPS and finite == 0.0:
            skipped[0] += 1


# --- the result -------------------------------------------------------------------------------------------------------


class Slot:
    """Where a decision is left on the device, and where it arrives at the host."""

    __slots__ = ("address", "event", "numbers", "result", "stream", "to")

    def __init__(self, result: Array, address: int, event: Any):
        self.result = result
        """The norm, the coefficient, and whether all gradients are finite."""
        self.address = address
        self.event = event
        """After the last of the launches and copies that use the slot."""
        self.stream: Any = None
        """On which these are. It is held, so that none that is made later is taken for it."""
        self.numbers: np.ndarray | None = None
        """Pinned memory for the same numbers, made when they are first sent ..."""
        self.to = 0
        """... and its address."""


class Slots:
    """The slots of one device. They are used again, and their memory is never given back.

    CuPy gives pinned memory to others as soon as its array is let go, and knows nothing of a copy that is still to be
    made. A slot whose decision is forgotten before the copy comes back here. It serves the stream that it served last,
    where all follows what is still to be done, and others after its event.
    """

    def __init__(self, backend: Launcher) -> None:
        self._backend = backend
        self._free: deque[Slot] = deque()

    def take(self, stream: Any) -> Slot:
        """Return a slot for the current stream, which nothing that is still to be done on another one will use."""
        slot = None
        with suppress(IndexError):  # there is none, or another thread has just taken it
            slot = self._free.popleft()
            if slot.stream is not stream and not slot.event.done:
                self._free.append(slot)
                slot = None
        if slot is None:
            backend = self._backend
            result = backend.empty(3)
            slot = Slot(result, backend.address(result), backend.xp.cuda.Event(disable_timing=True))
        slot.stream = stream
        return slot

    def put_back(self, slot: Slot) -> None:
        """Take a slot back; what uses it may still be to be done."""
        self._free.append(slot)


class PendingDecision:
    """As `fastopt.kernels.contract.Decision`."""

    def __init__(self, backend: Launcher, slot: Slot, slots: Slots | None):
        """slots : where the slot comes back to; None: nowhere, because a graph may write to it at any time."""
        self._backend = backend
        self._slot = slot
        self._slots = slots
        self._sent = False

    def __del__(self) -> None:
        if self._slots is not None:
            self._slots.put_back(self._slot)

    def send(self) -> None:
        """As `fastopt.kernels.contract.Decision`: a copy to pinned memory, and an event after it."""
        slot = self._slot
        if slot.numbers is None:
            slot.numbers = self._backend.pinned(3)
            slot.to = slot.numbers.__array_interface__["data"][0]
        self._backend.fetch(slot.to, slot.address, slot.numbers.nbytes)
        slot.event.record(slot.stream)
        self._sent = True

    @property
    def arrived(self) -> bool:
        """As `fastopt.kernels.contract.Decision`."""
        return self._sent and bool(self._slot.event.done)

    def read(self) -> tuple[float, float, bool]:
        """As `fastopt.kernels.contract.Decision`."""
        self._slot.event.synchronize()  # on whichever stream: it need not be the current one
        if self._sent and self._slot.numbers is not None:
            found = self._slot.numbers
        else:
            found = self._backend.host(self._slot.result)
        norm, coefficient, finite = found.tolist()
        return norm, coefficient, finite == 1.0
