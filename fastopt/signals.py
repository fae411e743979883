"""`deferred_signals`: a block that no handler of a signal cuts short, such as that of Ctrl-C.

Python runs the handlers of signals in the main thread, between two instructions, and a handler may raise: Ctrl-C raises
KeyboardInterrupt. What belongs together, such as the launches of a step and its counter, stands in such a block.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # the functions of `signal`, which turns numbers into enums there and back: 10 times as slow
import os
import threading
from itertools import compress
from typing import Any

NUMBERS = sorted(map(int, _signal.valid_signals()))


class DeferredSignals:
    """Runs the handlers of the signals that arrive inside a ``with`` block at its end. Blocks may be nested.

    Only handlers in Python are deferred, and only in the main thread: Python runs no others. A block takes 4 us.
    """

    def __init__(self) -> None:
        self._depth = 0
        """The number of blocks that the main thread is in."""
        self._thread = 0
        """The main thread, when it was last in a block."""
        self._handlers: dict[int, Any] = {}
        """The handlers that were replaced, by the numbers of their signals."""
        self._replaced: list[int] = []
        """The signals whose handlers are replaced now."""
        self._held: dict[int, Any] = {}
        """The signals that have arrived, and the frames in which they did."""
        self._hold = self._hold_or_handle  # one bound method, which is compared
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork_in_child)

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            self._depth += 1
            if self._depth == 1:
                self._thread = threading.get_ident()
                self._replace()
        except BaseException:  # of the handler of a signal that is not deferred yet
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        if self._depth > 1:
            self._depth -= 1
            return
        try:
            self._put_back()
        finally:
            self._depth = 0
            self._handle_held()

    def _replace(self) -> None:
        found = map(_signal.getsignal, NUMBERS)
        for number in compress(NUMBERS, map(callable, found)):
            handler = _signal.getsignal(number)
            if handler != self._hold:
                self._handlers[number] = handler
            self._replaced.append(number)
            _signal.signal(number, self._hold)

    def _put_back(self) -> None:
        try:
            while self._replaced:
                number = self._replaced[-1]
                if _signal.getsignal(number) == self._hold:  # the block has set no other
                    _signal.signal(number, self._handlers[number])
                self._replaced.pop()
        finally:
            if self._replaced:  # the handler of a signal that is back has raised
                self._put_back()

    def _hold_or_handle(self, number: int, frame: Any) -> None:
        if self._depth:
            self._held[number] = frame
        else:
            self._handlers[number](number, frame)

    def _handle_held(self) -> None:
        if self._held:
            number, frame = self._held.popitem()
            try:
                self._handlers[number](number, frame)
            finally:
                self._handle_held()

    def _after_fork_in_child(self) -> None:
        """Leave the block that another thread was in."""
        if self._depth and threading.get_ident() != self._thread:
            self._depth = 0
            self._held.clear()
            self._put_back()


deferred_signals = DeferredSignals()
