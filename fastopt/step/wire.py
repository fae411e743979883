"""`Wire`: gradients that are added up over ranks in fewer bytes than they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.communicators import Communicator
from fastopt.hyper import Choice
from fastopt.kernels.contract import CODES, Array

if TYPE_CHECKING:
    from fastopt.kernels.cpu.wire import Codec

WINDOW = 2**24
"""Elements that are exchanged at a time: messages are short beside the gradients."""


class Wire:
    """Sums over ranks, whose messages are encoded: each rank adds up a part, in the order of ranks, in float32.

    With ``"int8"`` each rank keeps what its messages have not held, and adds it to the next ones (error feedback): of
    its gradients, and of the part of the sum that it sends to the others.

    Args:
        name: of the format, ``"bfloat16"`` or ``"int8"``.
        comm: the ranks.
    """

    def __init__(self, name: str, comm: Communicator):
        self.name = name
        self._comm = comm
        self._errors: dict[str, np.ndarray] = {}
        """Of gradients, and of sums, what was not sent yet; each made when it is first needed."""

    @property
    def codec(self) -> Codec:
        """Encodes messages and decodes them."""
        from fastopt.kernels.cpu.wire import codec  # loaded by those who use it

        return codec(self.name)

    @property
    def nbytes(self) -> int:
        """The bytes of what is kept from step to step."""
        return sum(errors.nbytes for errors in self._errors.values())

    def __deepcopy__(self, memo: object) -> Wire:
        twin = Wire(self.name, self._comm)
        twin._errors = {what: errors.copy() for what, errors in self._errors.items()}
        return twin

    def forget(self) -> None:
        """Drop what was not sent yet, which is of other parameters."""
        self._errors.clear()

    def add_up(self, array: Array, own: Array | None = None, *, window: int = WINDOW) -> None:
        """Replace the arrays of all ranks by their sum; or write this rank's part of it into `own`.

        Args:
            array: 1-D, float32; the same size on every rank.
            own: 1-D, float32; as long as `array` divided by the number of ranks.
            window: elements that are exchanged at a time.
        """
        comm, format_ = self._comm, self.codec
        size = comm.size
        part = -(-array.size // size) if own is None else own.size
        width = min(-(-part // CODES), max(1, window // size // CODES)) * CODES
        sent, received = (np.zeros((size, format_.size_of(width)), np.uint8) for _ in range(2))
        errors = self._kept("gradients", array.size)
        total = np.empty(width, np.float32)
        for first in range(0, part, width):
            pieces = [
                slice(min(start, array.size), min(start + width, (rank + 1) * part, array.size))
                for rank, start in enumerate(range(first, first + size * part, part))
            ]
            for message, piece in zip(sent, pieces, strict=True):
                format_.encode(array[piece], message, errors[piece])
            comm.alltoall(sent, received)
            mine = pieces[comm.rank]
            count = mine.stop - mine.start
            for rank, message in enumerate(received):
                format_.decode(message, total[:count], add=rank > 0)
            if own is not None:
                own[first : first + count] = total[:count]
                continue
            of_sums = self._kept("sums", part)[first : first + count]
            format_.encode(total[:count], sent[comm.rank], of_sums)
            comm.allgather(sent[comm.rank].copy(), received)
            for message, piece in zip(received, pieces, strict=True):
                format_.decode(message, array[piece])

    def _kept(self, what: str, size: int) -> np.ndarray:
        """The errors of gradients or sums; an array without elements where none are kept."""
        if not self.codec.keeps_errors:
            return np.zeros(0, np.float32)
        errors = self._errors.get(what)
        if errors is None or errors.size != size:
            errors = self._errors[what] = np.zeros(size, np.float32)
        return errors


WIRE = Choice(("bfloat16", "int8"))
"""The formats of messages."""


def checked_wire(wire: Any, comm: Any) -> str | None:
    """The format that an option names; None for None.

    Raises:
        TypeError, ValueError: it is something else, or there is no communicator.
    """
    if wire is None:
        return None
    name = WIRE.check("wire", wire)
    if comm is None:
        raise ValueError(f"wire: must be None without comm=, got {wire!r}")
    return name
