"""`Launcher`: what the kernels of this folder need of the backend that launches them; `PreparedKernel`, a launch."""

from __future__ import annotations

import ctypes
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from fastopt.kernels.contract import Array, Tiles
from fastopt.kernels.cuda.target import DriverFunction

T = TypeVar("T")


class Room:
    """Arrays that launches use, and the stream and device of the last of these launches."""

    __slots__ = ("arrays", "device", "stream")

    def __init__(self, arrays: tuple[Array, ...], device: int, stream: Any):
        self.arrays = arrays
        self.device = device
        self.stream = stream
        """Held, so that none that is made later is taken for it. None where a graph may use the arrays at any time."""


class Rooms:
    """Arrays of the same sizes for launches. Whoever launches takes a room, and puts it back.

    The next launches on the same stream may use the room at once, because they follow.
    """

    def __init__(self, backend: Launcher, *sizes: tuple[int, Any]):
        """sizes : the size and dtype of each of the arrays."""
        self._backend = backend
        self._sizes = sizes
        self._free: deque[Room] = deque(maxlen=MOST_ROOMS)

    def take(self) -> Room:
        """Return a room for launches on the current stream."""
        backend, free = self._backend, self._free
        device, stream = backend.device, backend.stream()
        if stream.is_capturing():
            return Room(self._made(), device, None)
        for _ in range(len(free)):
            try:
                room = free.popleft()
            except IndexError:  # another thread has just taken it
                break
            if room.stream is stream and room.device == device:
                return room
            free.append(room)
        return Room(self._made(), device, stream)

    def _made(self) -> tuple[Array, ...]:
        return tuple([self._backend.empty(size, dtype) for size, dtype in self._sizes])

    def put_back(self, room: Room) -> None:
        """Take a room back, whose last launch was on the stream that it names."""
        if room.stream is not None:
            self._free.append(room)


MOST_ROOMS = 64
"""Of one size, that are kept."""


class Partials:
    """Where the partial sums of a norm are, for one stream after the other: each is read before the next is taken."""

    __slots__ = ("latest",)

    def __init__(self) -> None:
        self.latest: tuple[Any, Array, Array] = (None, None, None)
        """The stream that used them last, which is held, so that none that is made later is taken for it; where they
        are, and the same with a line for each block."""


class Chunks(NamedTuple):
    """A table of chunks on the device, its lines one after the other."""

    lines: Array
    by_place: Array
    """The same with the number of the parameter for that of the group."""
    length: int
    """How many lines."""
    spans: Array
    """A `Span` for each parameter that is there ..."""
    spanned: int
    """... and how many these are."""
    places: np.ndarray
    """The number of the parameter of each, on the host."""
    blocks: int
    parameters: int
    """One more than the number of the last one."""
    partials: Partials


class SentTiles(NamedTuple):
    """`fastopt.kernels.contract.Tiles` on the device."""

    table: Array
    """Its lines one after the other."""
    length: int
    """How many."""
    lines: dict[str, tuple[Array, int]]
    """By `SumsFunctions.over`: the same of the tables of `Line`."""


class PreparedKernel:
    """A kernel that was compiled for the types of its arguments and loaded on a device, with room for the arguments."""

    def __init__(self, function: DriverFunction, words: Sequence[Any], arrays: Sequence[int], tuples: Sequence[int]):
        """words : the arguments of a launch, as those of `launch`. arrays, tuples : which of its arguments are such."""
        self.most_blocks = function.most_blocks
        self.arrays = arrays
        self.tuples = tuples
        self._launch = function.launch
        self._pack = struct.Struct("=" + "".join("d" if isinstance(word, float) else "q" for word in words)).pack_into
        self._size = len(words)
        self._rooms: list[tuple[Any, int, Any]] = []
        """For the arguments of a launch each: a launch takes one, and puts it back, so that threads can launch at the
        same time."""

    def launch(self, blocks: int, stream: int, words: Sequence[Any]) -> None:
        """Launch on a stream. words : numbers of 8 bytes: an int for each address and integer, and floats."""
        try:
            room = self._rooms.pop()
        except IndexError:  # the first launch, or other threads have all of them
            room = self._new_room()
        numbers, addresses, _ = room
        self._pack(numbers, 0, *words)
        self._launch(blocks, stream, addresses)
        self._rooms.append(room)

    def _new_room(self) -> tuple[Any, int, Any]:
        numbers = (ctypes.c_int64 * self._size)()
        first = ctypes.addressof(numbers)
        addresses = (ctypes.c_void_p * self._size)(*[first + 8 * k for k in range(self._size)])
        return numbers, ctypes.addressof(addresses), addresses


class Launcher(Protocol):
    """See `fastopt.kernels.cuda.backend.CUDA`, which is one, and documents these methods."""

    xp: Any
    pinned: Callable[[int], np.ndarray]

    @property
    def device(self) -> int: ...  # noqa: D102

    def stream(self) -> Any: ...  # noqa: D102

    def empty(self, shape: Any, dtype: Any = ...) -> Array: ...  # noqa: D102

    def unused(self, dtype: Any) -> Array: ...  # noqa: D102

    def upload(self, array: Any) -> Array: ...  # noqa: D102

    def keep(self, kept: T) -> T: ...  # noqa: D102

    def constant(self, array: np.ndarray) -> Array: ...  # noqa: D102

    def table(self, table: Any) -> Array: ...  # noqa: D102

    def places(self, places: np.ndarray) -> Array: ...  # noqa: D102

    def chunks(self, chunks: np.ndarray) -> Chunks: ...  # noqa: D102

    def partials(self, found: Chunks, width: int) -> tuple[Array, Array]: ...  # noqa: D102

    def tiles(self, tiles: Tiles) -> SentTiles: ...  # noqa: D102

    def addresses(self, arrays: tuple[Array, ...]) -> tuple[int, ...]: ...  # noqa: D102

    def address(self, array: Array) -> int: ...  # noqa: D102

    def move(self, to: Array, source: Array) -> None: ...  # noqa: D102

    def fetch(self, to: int, address: int, size: int) -> None: ...  # noqa: D102

    def host(self, array: Array) -> np.ndarray: ...  # noqa: D102

    def compiled(  # noqa: D102
        self, function: Callable[..., None], constants: dict[str, Any], label: str, blocks: int | None = None
    ) -> Any: ...

    def launch(self, kernel: Any, blocks: int, *arguments: Any) -> None: ...  # noqa: D102
