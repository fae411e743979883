"""What stands for CuPy in numba's CUDA simulator: arrays that do not mix with NumPy's, as those of a device do not.

They are NumPy arrays underneath, so what works here need not work on a device; but what forgets where an array lives
fails here, as it would there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np


class ndarray(np.ndarray):  # noqa: N801 CuPy's name
    """An array "on the device"."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """By which libraries know an array of a device."""
        found: dict[str, Any] = _unwrapped(self).__array_interface__
        return found

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """NumPy's functions are not for arrays on a device."""
        raise TypeError(f"numpy.{func.__name__} was given an array of the (simulated) device")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        """Arithmetic, among themselves and with numbers."""
        operands = [_bare(operand) for operand in inputs]
        if out is not None:
            kwargs["out"] = tuple(_bare(array) for array in out)
        result = getattr(ufunc, method)(*operands, **kwargs)
        if out is not None:
            return out[0] if len(out) == 1 else out
        return result.view(ndarray) if isinstance(result, np.ndarray) else result

    def __setitem__(self, key: Any, value: Any) -> None:
        """Only numbers and arrays of the device can be assigned."""
        _bare(self)[key] = _bare(value)

    def get(self, out: np.ndarray, blocking: bool = True) -> np.ndarray:
        """As CuPy's."""
        out[...] = _unwrapped(self)
        return out


class cuda:  # noqa: N801 CuPy's name
    """What of ``cupy.cuda`` is used: the current stream, and events."""

    recorded: ClassVar[list[Callable[[], None]]] = []
    """The launches of the last capture."""

    class Event:
        """Done only once it is waited for, so that tests go the ways of what is not yet there."""

        done = False

        def __init__(self, disable_timing: bool = False):
            pass

        def record(self) -> None:
            """Nothing is asynchronous here."""

        def synchronize(self) -> None:
            """Wait."""
            self.done = True

    class Stream:
        """The only one."""

        capturing = False

        def is_capturing(self) -> bool:
            """Whether launches are recorded."""
            return self.capturing

        def begin_capture(self) -> None:
            """Record launches from now on."""
            cuda.recorded.clear()
            self.capturing = True

        def end_capture(self) -> Graph:
            """What was recorded."""
            self.capturing = False
            return Graph(list(cuda.recorded))

    _stream = Stream()

    @classmethod
    def get_current_stream(cls) -> Stream:
        """As CuPy's."""
        return cls._stream


class Graph:
    """Recorded launches."""

    def __init__(self, launches: list[Callable[[], None]]):
        self._launches = launches

    def launch(self) -> None:
        """Run them."""
        for launch in self._launches:
            launch()


def _bare(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value.view(np.ndarray)
    if isinstance(value, np.ndarray) and value.ndim > 0:
        raise TypeError("a NumPy array meets one of the (simulated) device: upload it")
    return value


def zeros(shape: Any, dtype: Any = np.float64) -> ndarray:
    """As CuPy's."""
    return np.zeros(shape, dtype).view(ndarray)


def empty(shape: Any, dtype: Any = np.float64) -> ndarray:
    """As CuPy's."""
    return np.empty(shape, dtype).view(ndarray)


def array(source: Any, dtype: Any = None) -> ndarray:
    """A copy of a NumPy array, or of one of the device."""
    return np.array(_unwrapped(source), dtype).view(ndarray)


def asarray(source: Any, dtype: Any = None) -> ndarray:
    """`source` itself where it is of the device and of this dtype, else a copy."""
    if isinstance(source, ndarray) and dtype in (None, source.dtype):
        return source
    return array(source, dtype)


def ascontiguousarray(source: ndarray) -> ndarray:
    """As CuPy's."""
    return np.ascontiguousarray(_unwrapped(source)).view(ndarray)


def asnumpy(source: ndarray) -> np.ndarray:
    """A NumPy copy."""
    return np.array(_unwrapped(source))


def may_share_memory(a: ndarray, b: ndarray) -> bool:
    """As CuPy's."""
    return bool(np.may_share_memory(_unwrapped(a), _unwrapped(b)))


def _unwrapped(source: Any) -> Any:
    return source.view(np.ndarray) if isinstance(source, ndarray) else source
