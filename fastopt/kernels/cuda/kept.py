"""`Kept`: what was sent to a device once, for launches on any of its streams."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Entry(Generic[T]):
    """What was made of an array of the host on one device."""

    __slots__ = ("array", "device", "event", "made", "shared", "stream")

    def __init__(self, array: np.ndarray, made: T, device: int, stream: int, event: Any):
        self.array = array  # whose id is otherwise given to another array
        self.made = made
        self.device = device
        self.stream = stream  # the one on which it was sent
        self.event: Any = event  # after it was sent; None once the event is known to be done
        self.shared = False  # whether another stream has used it


class Kept(Generic[T]):
    """What was made on devices of arrays of the host that are passed again and again: of those used last.

    It is sent on the stream that is current when it is made, without waiting. A launch on another stream must not read
    it earlier: `find` orders the current stream after the sending. Memory of a device is given back to the stream that
    it was allocated for, which knows nothing of the other streams: `add` waits for the device before it lets go of what
    several streams have used.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: OrderedDict[tuple[int, int], Entry[T]] = OrderedDict()
        self._latest: Entry[T] | None = None
        """The one that was last added or found, which most launches find again."""

    def find(self, array: np.ndarray, device: int, stream: Any) -> T | None:
        """Return what was made of this array on a device, ready for a stream of the device."""
        entry = self._latest
        if entry is None or entry.array is not array or entry.device != device:
            key = (device, id(array))
            entry = self._found.get(key)
            if entry is None:
                return None
            self._found.move_to_end(key)
            self._latest = entry
        if entry.stream != stream.ptr:
            entry.shared = True
            if entry.event is not None:
                self._order(entry, stream)
        return entry.made

    @staticmethod
    def _order(entry: Entry[T], stream: Any) -> None:
        if entry.event.done:
            entry.event = None
        elif stream.is_capturing():  # a graph cannot wait for what is not in it
            entry.event.synchronize()
            entry.event = None
        else:
            stream.wait_event(entry.event)

    def add(self, array: np.ndarray, made: T, xp: Any) -> T:
        """Keep what was just made of an array, on the current device and stream."""
        device, stream = xp.cuda.runtime.getDevice(), xp.cuda.get_current_stream()
        event = xp.cuda.Event(disable_timing=True)
        event.record(stream)
        self._latest = self._found[device, id(array)] = Entry(array, made, device, stream.ptr, event)
        if len(self._found) > self._most:
            (device, _), oldest = self._found.popitem(last=False)
            if oldest.shared:
                with xp.cuda.Device(device) as held:
                    held.synchronize()
        return made
