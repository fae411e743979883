"""A block of threads in numba's CUDA simulator, one of which runs at a time, until it waits at a barrier or ends.

numba lets all of them run, and a further thread looks again and again whether they wait: most of the time goes there,
and two threads that ask for a shared array at the same time may get one each, so that sums of one of them are lost.
Between two barriers threads run in an order that is drawn, always the same: a result must not depend on it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel


class Thread(kernel.BlockThread):
    """As numba's, but that it waits for its turn."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.turn = threading.Lock()
        self.turn.acquire()

    def run(self) -> None:
        """Run the kernel, when it is this thread's turn."""
        self.turn.acquire()
        if not self.abort:
            super().run()
        self._manager.end(self)

    def syncthreads(self) -> None:
        """Wait at a barrier."""
        self._manager.wait(self)


class Block:
    """As numba's ``BlockManager``."""

    def __init__(self, f: Callable[..., None], grid_dim: Any, block_dim: Any, debug: bool):
        self._f = f
        self._grid_dim = grid_dim
        self._block_dim = block_dim  # read by numba's thread, as is `block_state`
        self._debug = debug
        self.block_state = np.zeros(block_dim, np.bool_)
        self._order = random.Random(0)
        self._due: list[Any] = []
        """The threads that have not run yet since the last barrier, the next one last."""
        self._waiting: list[Any] = []
        """Those that have come to the next one."""
        self._failed: Any = None
        """The first thread that raised an exception."""
        self._ended = threading.Lock()

    def run(self, grid_point: Any, *args: Any) -> None:
        """Run all threads of a block to their end; raise the first exception of one of them."""

        def target() -> None:
            self._f(*args)

        places = np.ndindex(*self._block_dim)
        threads = [Thread(target, self, grid_point, place, self._debug) for place in places]
        self._waiting = [*threads]
        self._ended.acquire()
        for thread in threads:
            thread.start()
        self._next()
        self._ended.acquire()
        for thread in threads:
            thread.join()
        if self._failed is not None:
            error, traceback = self._failed.exception
            raise error.with_traceback(traceback)

    def _next(self) -> None:
        """Let the next thread run; past the barrier, where all that have not ended have come to it."""
        if not self._due:
            self._due, self._waiting = self._waiting, []
            self._order.shuffle(self._due)
        if self._due:
            self._due.pop().turn.release()
        else:
            self._ended.release()

    def wait(self, thread: Any) -> None:
        """Wait at a barrier."""
        self._waiting.append(thread)
        self._next()
        thread.turn.acquire()
        if thread.abort:
            raise RuntimeError("another thread of the block has failed")

    def end(self, thread: Any) -> None:
        """Note that a thread has ended, and end the others where it has failed."""
        if thread.exception and self._failed is None:
            self._failed = thread
            for other in (*self._due, *self._waiting):
                other.abort = True
        self._next()


def take_turns() -> None:
    """Have numba's simulator run blocks in this way."""
    kernel.BlockManager = Block
