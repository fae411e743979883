"""What stands for CuPy in numba's CUDA simulator: arrays that do not mix with NumPy's, as those of a device do not.

They are NumPy arrays underneath, so what works here need not work on a device; but what forgets where an array lives
fails here, as it would there. There are as many devices and streams as are asked for; what is sent to a stream is done
as late as CUDA allows. Kernels read and write at addresses: what lies outside the arrays that are alive is refused, as
compute-sanitizer would.
"""

from __future__ import annotations

import ctypes
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fastopt.kernels.codes import Codec
from fastopt.kernels.contract import BFLOAT16, CODE_BASE, INT8
from fastopt.kernels.elements import MAX_STATES

# --- memory -----------------------------------------------------------------------------------------------------------


class Allocation(NamedTuple):
    """The memory of an array that is alive."""

    start: int
    end: int
    device: int
    numbers: dict[np.dtype[Any], np.ndarray]
    """The same memory as numbers of several dtypes."""

    def as_numbers(self, dtype: np.dtype[Any]) -> np.ndarray:
        """As many numbers of a dtype as are in it, the first at the first multiple of their size."""
        found = self.numbers.get(dtype)
        if found is None:
            skipped = -self.start % dtype.itemsize
            room = (self.end - self.start - skipped) // dtype.itemsize * dtype.itemsize
            memory = (ctypes.c_uint8 * room).from_address(self.start + skipped)
            found = self.numbers[dtype] = np.frombuffer(memoryview(memory), dtype)
        return found


class Memory:
    """The memory of all arrays of the devices that are alive, by address."""

    def __init__(self) -> None:
        self._found: dict[int, Allocation] = {}
        self._sorted: tuple[list[int], list[Allocation]] | None = None

    def add(self, owner: np.ndarray, device: int) -> None:
        """Note the memory of an array until the array is let go. Memory that is known already stays as it is."""
        if owner.size == 0:
            return
        start = end = owner.__array_interface__["data"][0]
        for length, stride in zip(owner.shape, owner.strides, strict=True):
            start += min(0, stride) * (length - 1)
            end += max(0, stride) * (length - 1)
        end += owner.itemsize
        if self.find(start) is not None:
            return
        self._found[start] = Allocation(start, end, device, {})
        self._sorted = None
        weakref.finalize(owner, self._forget, start).atexit = False

    def _forget(self, start: int) -> None:
        del self._found[start]
        self._sorted = None

    def find(self, address: int) -> Allocation | None:
        """What an address lies in."""
        in_order = self._sorted  # an array may be let go, and _sorted with it, in the middle of this
        if in_order is None:
            starts = sorted(self._found)
            in_order = self._sorted = starts, [self._found[start] for start in starts]
        starts, allocations = in_order
        for k in range(bisect_right(starts, address) - 1, -1, -1):  # the first, but where one lies within another
            if address < allocations[k].end:
                return allocations[k]
        return None

    def numbers_at(self, address: int, dtype: np.dtype[Any], count: int, alignment: int) -> tuple[np.ndarray, int]:
        """An array, and the number of the element that is at an address; IndexError where a device would fault."""
        found = self.find(address)
        if found is None or address + count * dtype.itemsize > found.end:
            raise IndexError(f"{count} of {dtype} at {address:#x} are not in the memory of any array")
        if found.device != cuda.Device.current:
            raise IndexError(f"{address:#x} is on device {found.device}, and a kernel of {cuda.Device.current} uses it")
        if address % alignment:
            raise IndexError(f"{count} of {dtype} at {address:#x}, which must be a multiple of {alignment}")
        return found.as_numbers(dtype), (address - found.start) // dtype.itemsize


MEMORY = Memory()


def _dtype_of(form: str) -> np.dtype[Any]:
    """NumPy's dtype of a storage format."""
    if form == BFLOAT16:
        import ml_dtypes  # which those have who use the format

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(form)


def memory(
    dtype: np.dtype[Any], width: int, at_once: bool, formats: tuple[str, ...] = ()
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """As ``memory`` of memory.py, for threads that run Python."""

    def numbers_of(addresses: tuple[int, ...], i: int) -> Iterator[np.ndarray]:
        """The numbers at byte i of each buffer."""
        for k, address in enumerate(addresses):
            stored = _dtype_of(formats[k]) if formats else dtype
            offset = i // 2 if stored.itemsize == 2 else i
            alignment = stored.itemsize * (width if at_once else 1)
            numbers, first = MEMORY.numbers_at(int(address + offset), stored, width, alignment)
            yield numbers[first : first + width]

    def load(addresses: tuple[int, ...], i: int) -> tuple[tuple[Any, ...], ...]:
        values = [tuple(numbers.astype(dtype, copy=False)) for numbers in numbers_of(addresses, i)]
        return tuple(zip(*values, strict=True))

    def store(addresses: tuple[int, ...], i: int, elements: tuple[tuple[Any, ...], ...]) -> None:
        written = tuple(zip(*elements, strict=True))
        with np.errstate(over="ignore"):
            for numbers, values in zip(numbers_of(addresses[: len(written)], i), written, strict=True):
                numbers[...] = np.array(values, dtype) if formats else values

    return load, store


# --- storage formats: what intrinsics do on a device ------------------------------------------------------------------

WORD = 0xFFFFFFFF


def rounding(name: str) -> Callable[..., Any]:
    """As ``rounding`` of memory.py."""
    stored = _dtype_of(name)

    def rounded(number: Any) -> Any:
        return np.float32(np.float32(number).astype(stored))

    return rounded


def _bits(number: Any) -> int:
    return int(np.float32(number).view(np.uint32))


def _of_bits(bits: int) -> Any:
    return np.uint32(bits).view(np.float32)


def _mixed(word: int) -> int:
    """As ``emit_mixed`` of formats.py."""
    word ^= word >> 16
    word = word * 0x7FEB352D & WORD
    word ^= word >> 15
    word = word * 0x846CA68B & WORD
    return word ^ word >> 16


def _counted(seed: Any, index: Any, draw: int) -> int:
    """As ``emit_counted`` of formats.py, mixed."""
    word = int(index) * 0x9E3779B9 & WORD ^ _mixed(int(seed))
    return _mixed(word + draw & WORD)


def _dithered(name: str, number: Any, noise: int) -> Any:
    """As ``emit_dithered`` of formats.py."""
    bits = _bits(number)
    if bits & 0x7F800000 == 0x7F800000:
        return number
    if name == BFLOAT16:
        return _of_bits(bits + noise & 0xFFFF0000)
    if bits & 0x7FFFFFFF < 0x38800000:
        steps = np.floor(abs(np.float32(number)) * np.float32(2.0**24) + np.float32(noise * 2.0**-16))
        return np.copysign(steps * np.float32(2.0**-24), number)
    return _of_bits(bits + (noise >> 3) & 0xFFFFE000)


def dithering(names: tuple[str, ...]) -> Callable[..., Any]:
    """As ``dithering`` of memory.py."""
    drawn = [k for k, name in enumerate(names) if _dtype_of(name).itemsize == 2]

    def one(element: tuple[Any, ...], seed: Any, index: Any) -> tuple[Any, ...]:
        found = list(element)
        for count, k in enumerate(drawn):
            word = _counted(seed, index, count // 2)
            found[k] = _dithered(names[k], found[k], word >> 16 if count % 2 else word & 0xFFFF)
        return tuple(found)

    def dithered(elements: tuple[Any, ...], seed: Any, index: Any) -> tuple[Any, ...]:
        return tuple([one(element, seed, int(index) + k) for k, element in enumerate(elements)])

    return dithered


def codec(form: str, place: int, random: bool) -> Codec:
    """As ``codec`` of codes.py."""

    def signed_number(code: Any, unit: Any) -> Any:
        k = np.float32(code)
        return k * abs(k) * unit

    def unsigned_number(code: Any, unit: Any) -> Any:
        return (_of_bits(int(code) + CODE_BASE << 20) if code else np.float32(0)) * unit

    def signed_code(number: Any, share: Any, noise: int) -> Any:
        root = np.sqrt(share if share > 0 else np.float32(0))
        if random:
            code = int(root)
            k = np.float32(code)
            code += int(np.float32((noise >> 8) * 2.0**-24) * (k + k + np.float32(1)) < share - k * k)
        else:
            code = int(root + np.float32(0.5))
        return np.int8(-min(code, 127) if np.signbit(number) else min(code, 127))

    def unsigned_code(number: Any, share: Any, noise: int) -> Any:
        if not number > 0:
            return np.uint8(0)
        bits = _bits(share) if share > 0 else 0
        bits += noise >> 12 if random else (bits >> 20 & 1) + 0x7FFFF
        return np.uint8(min(max((bits >> 20) - CODE_BASE, 1), 255))

    def size_bits(number: Any) -> Any:
        return np.int32(_bits(number) & 0x7FFFFFFF)

    return Codec(
        signed_number if form == INT8 else unsigned_number,
        signed_code if form == INT8 else unsigned_code,
        lambda seed, index: _counted(seed, index, MAX_STATES + place),
        size_bits,
        _of_bits,
        max,
    )


# --- arrays -----------------------------------------------------------------------------------------------------------

DECOMPOSITIONS = (np.linalg.eigh, np.linalg.qr)
"""The functions of matrices that rules use, and that CuPy has."""


class Pointer(NamedTuple):
    """As CuPy's ``MemoryPointer``."""

    ptr: int
    device_id: int


class ndarray(np.ndarray):  # noqa: N801 CuPy's name
    """An array "on the device"."""

    _device_id: int

    def __array_finalize__(self, source: Any) -> None:
        """A view lives where its memory does, and all else on the current device."""
        self._device_id = source._device_id if isinstance(source, ndarray) else cuda.Device.current
        if not isinstance(source, ndarray) and not self.flags.owndata and self.size:
            known = MEMORY.find(self.__array_interface__["data"][0])
            self._device_id = self._device_id if known is None else known.device
        if self.flags.owndata:
            MEMORY.add(self, self._device_id)
        elif not isinstance(source, ndarray):
            owner = self if source is None else source
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            MEMORY.add(owner, self._device_id)

    @property
    def device(self) -> cuda.Device:  # type: ignore[override]
        """Where it lives."""
        return cuda.Device(self._device_id)

    @property
    def data(self) -> Pointer:  # type: ignore[override]
        """Where its memory begins."""
        return Pointer(self.__array_interface__["data"][0], self._device_id)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """By which libraries know an array of a device."""
        found: dict[str, Any] = _unwrapped(self).__array_interface__
        return found

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """NumPy's functions are not for arrays on a device, except for those in whose place CuPy's are called."""
        if func not in DECOMPOSITIONS or kwargs:
            raise TypeError(f"numpy.{func.__name__} was given an array of the (simulated) device")
        return tuple([_there(part) for part in func(*map(_bare, args))])

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        """Arithmetic, among themselves and with numbers."""
        operands = [_bare(operand) for operand in inputs]
        if out is not None:
            kwargs["out"] = tuple(_bare(array) for array in out)
        result = getattr(ufunc, method)(*operands, **kwargs)
        if out is not None:
            return out[0] if len(out) == 1 else out
        return _there(result)

    def __getitem__(self, key: Any) -> Any:
        """A part, which is an array even where it is one element: it stays on the device until it is asked for."""
        return _there(super().__getitem__(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        """Only numbers and arrays of the device can be assigned, which is done when its turn comes."""
        here, there = self.view(np.ndarray), _checked(value)
        cuda.get_current_stream().submit(lambda: here.__setitem__(key, there))

    def copy(self, order: Any = "C") -> ndarray:
        """As CuPy's, after the work of the current stream."""
        cuda.get_current_stream().synchronize()
        return super().copy(order)

    def fill(self, value: Any) -> None:
        """As CuPy's, after the work of the current stream."""
        cuda.get_current_stream().synchronize()
        super().fill(value)

    def set(self, source: np.ndarray) -> None:
        """As CuPy's: a copy of a NumPy array, whose content is taken now, and arrives when its turn comes."""
        if cuda.get_current_stream().is_capturing():
            raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")
        content, here = source.copy(), self.view(np.ndarray)
        cuda.get_current_stream().submit(lambda: np.copyto(here, content))

    def get(self, out: np.ndarray, blocking: bool = True) -> np.ndarray:
        """As CuPy's: it writes to an address, and does not keep the memory there."""
        here, address = self.view(np.ndarray), out.__array_interface__["data"][0]
        stream = cuda.get_current_stream()

        def copy() -> None:
            ctypes.memmove(address, here.tobytes(), here.nbytes)

        stream.submit(copy)
        if blocking:
            stream.synchronize()
        return out


STREAMS: weakref.WeakValueDictionary[int, cuda.Stream] = weakref.WeakValueDictionary()
"""By pointer: the streams that are there."""


class cuda:  # noqa: N801 CuPy's name
    """What of ``cupy.cuda`` is used: devices, streams, and events."""

    recorded: ClassVar[list[Callable[[], None]]] = []
    """The work of the last capture."""

    class Event:
        """Done only once it is waited for, so that tests go the ways of what is not yet there."""

        done = False

        def __init__(self, disable_timing: bool = False):
            self.seconds = 0.0
            self._stream: cuda.Stream | None = None

        def record(self, stream: cuda.Stream | None = None) -> None:
            """Note the stream and the time."""
            self._stream = cuda.get_current_stream() if stream is None else stream
            self.seconds = perf_counter()
            self.done = False

        def synchronize(self) -> None:
            """Wait."""
            if self._stream is not None:
                self._stream.synchronize()
            self.done = True

    class Stream:
        """A stream whose work is done as late as CUDA allows: when somebody waits for the stream.

        Launches and copies between host and device are its work. All else on arrays is done when it is called, after
        the work of the current stream.
        """

        def __init__(self, non_blocking: bool = False):
            self.ptr = id(self)
            STREAMS[self.ptr] = self
            self._waiting: list[Callable[[], None]] = []
            self._captured: list[Callable[[], None]] | None = None
            self._outer: list[cuda.Stream] = []

        def __enter__(self) -> cuda.Stream:
            self._outer.append(cuda._stream)
            cuda._stream = self
            return self

        def __exit__(self, *_: Any) -> None:
            cuda._stream = self._outer.pop()

        def submit(self, work: Callable[[], None]) -> None:
            """Do some work later; or record it."""
            (self._waiting if self._captured is None else self._captured).append(work)

        def synchronize(self) -> None:
            """Do all the work."""
            while self._waiting:
                self._waiting.pop(0)()

        def wait_event(self, event: cuda.Event) -> None:
            """Do the work before the event, and that of the same stream after it, before the work that follows here."""
            self.submit(event.synchronize)

        def is_capturing(self) -> bool:
            """Whether work is recorded."""
            return self._captured is not None

        def begin_capture(self) -> None:
            """Record the work that follows."""
            cuda.recorded.clear()
            self._captured = cuda.recorded

        def end_capture(self) -> Graph:
            """What was recorded."""
            work, self._captured = self._captured, None
            assert work is not None
            return Graph(list(work))

    class NullStream(Stream):
        """The stream that is current from the start. It does its work at once."""

        def __init__(self) -> None:
            super().__init__()
            self.ptr = 0
            STREAMS[0] = self

        def submit(self, work: Callable[[], None]) -> None:
            """Do some work, or record it."""
            super().submit(work)
            self.synchronize()

    @staticmethod
    def ExternalStream(ptr: int, device_id: int = -1) -> cuda.Stream:  # noqa: N802 CuPy's name
        """The stream that has this pointer. (CuPy makes another object of it.)"""
        return STREAMS[ptr]

    class runtime:  # noqa: N801 CuPy's name
        """What of CUDA's runtime is called directly."""

        @staticmethod
        def getDevice() -> int:  # noqa: N802 CuPy's name
            """The number of the current device."""
            return cuda.Device.current

        @staticmethod
        def memcpyAsync(to: int, source: int, size: int, kind: int, stream: int) -> None:  # noqa: N802 CuPy's name
            """A copy from the host (kind 1), taken now, to its pinned memory (2) or on a device (3)."""
            there = to if kind == 1 else source
            found = MEMORY.find(there)
            if found is None or there + size > found.end or found.device != cuda.Device.current:
                raise IndexError(f"{size} bytes at {there:#x} are not in the memory of any array of the current device")
            assert stream == cuda._stream.ptr, "the stream is another one than the current one"
            content = ctypes.string_at(source, size) if kind == 1 else None

            def copy() -> None:
                ctypes.memmove(to, ctypes.string_at(source, size) if content is None else content, size)

            cuda._stream.submit(copy)

    class Device:
        """``Device(1).id`` is 1, ``Device().id`` that of the current one, which ``with Device(1):`` makes it."""

        current = 0

        def __init__(self, number: int | None = None):
            self.id = cuda.Device.current if number is None else number
            self._outer: list[int] = []

        def __enter__(self) -> cuda.Device:
            self._outer.append(cuda.Device.current)
            cuda.Device.current = self.id
            return self

        def __exit__(self, *_: Any) -> None:
            cuda.Device.current = self._outer.pop()

        def synchronize(self) -> None:
            """Do the work of the current stream."""
            cuda._stream.synchronize()

    _stream: ClassVar[Stream] = NullStream()

    @classmethod
    def get_current_stream(cls) -> Stream:
        """As CuPy's."""
        return cls._stream

    @staticmethod
    def get_elapsed_time(start: cuda.Event, end: cuda.Event) -> float:
        """As CuPy's, in milliseconds."""
        return 1e3 * (end.seconds - start.seconds)


class Graph:
    """Recorded launches. It knows addresses, and does not keep the memory there."""

    def __init__(self, launches: list[Callable[[], None]]):
        self._launches = launches

    def launch(self) -> None:
        """Run them."""
        for launch in self._launches:
            cuda.get_current_stream().submit(launch)


class Argument(NamedTuple):
    """An array as a launch knows it: its elements, one after the other."""

    address: int
    dtype: np.dtype[Any]
    size: int

    @classmethod
    def of(cls, value: Any) -> Any:
        """An argument of a kernel: arrays by their address, all else as it is."""
        if not isinstance(value, ndarray):
            return value
        return cls(value.__array_interface__["data"][0], value.dtype, value.size)

    def array(self) -> np.ndarray:
        """The memory, as a kernel uses it; IndexError where a device would fault."""
        if self.size == 0:
            return np.empty(0, self.dtype)
        numbers, first = MEMORY.numbers_at(self.address, self.dtype, self.size, self.dtype.itemsize)
        return numbers[first : first + self.size]


def launch(kernel: Callable[..., None], arguments: Sequence[Any]) -> None:
    """Run a kernel when it is the turn of its launch on the current stream.

    Until then the arrays are kept: CuPy's pool gives memory that was let go to work that follows on the same stream.
    """
    stream = cuda.get_current_stream()
    known = [Argument.of(argument) for argument in arguments]
    kept = () if stream.is_capturing() else tuple(arguments)

    def run(_kept: Sequence[Any] = kept) -> None:
        kernel(*[each.array() if isinstance(each, Argument) else each for each in known])

    stream.submit(run)


def _there(result: Any) -> Any:
    return np.asarray(result).view(ndarray) if isinstance(result, np.ndarray | np.generic) else result


def _bare(value: Any) -> Any:
    """An operand of arithmetic, after the work of the current stream."""
    cuda.get_current_stream().synchronize()
    return _checked(value)


def _checked(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value.view(np.ndarray)
    if isinstance(value, np.ndarray) and value.ndim > 0:
        raise TypeError("a NumPy array meets one of the (simulated) device: upload it")
    return value


class _Owned:
    """The memory of another library's array, which is kept."""

    def __init__(self, owner: Any):
        self.owner = owner
        found = owner.__cuda_array_interface__
        self.__array_interface__ = {**found, "data": (found["data"][0], False), "version": 3}  # CuPy's can be written


def _unwrapped(source: Any) -> Any:
    if isinstance(source, ndarray):
        return source.view(np.ndarray)
    return np.asarray(_Owned(source)) if hasattr(source, "__cuda_array_interface__") else source


def _copied(source: Any) -> Any:
    """An array whose content is about to be copied, on the current stream."""
    cuda.get_current_stream().synchronize()
    return _unwrapped(source)


class _Pinned:
    """Memory of the host that is handed out again when its array is let go, as CuPy's pool does."""

    def __init__(self) -> None:
        self._free: dict[int, list[bytearray]] = {}

    def empty(self, size: int) -> np.ndarray:
        """As ``cupyx.empty_pinned``."""
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else bytearray(8 * size)
        found = np.frombuffer(memory, np.float64)
        weakref.finalize(found, free.append, memory).atexit = False
        return found


empty_pinned = _Pinned().empty

# --- functions --------------------------------------------------------------------------------------------------------


def zeros(shape: Any, dtype: Any = np.float64) -> ndarray:
    """As CuPy's."""
    return np.zeros(shape, dtype).view(ndarray)


def empty(shape: Any, dtype: Any = np.float64) -> ndarray:
    """As CuPy's."""
    return np.empty(shape, dtype).view(ndarray)


def arange(stop: int) -> ndarray:
    """As CuPy's."""
    return np.arange(stop).view(ndarray)


def array(source: Any, dtype: Any = None) -> ndarray:
    """A copy of a NumPy array, which arrives when its turn comes, or of one of the device."""
    if hasattr(source, "__cuda_array_interface__"):
        return np.array(_copied(source), dtype).view(ndarray)
    content = np.array(source, dtype)
    made = empty(content.shape, content.dtype)
    made.view(np.ndarray).reshape(-1).view(np.uint8)[...] = 0xC7  # what is there before
    made.set(content)
    return made


def asarray(source: Any, dtype: Any = None) -> ndarray:
    """`source` itself, or a view of another library's array, where it is of this dtype and on the current device.

    Otherwise a copy on the current device, as CuPy makes one.
    """
    if not hasattr(source, "__cuda_array_interface__"):
        return array(source, dtype)
    found = source if isinstance(source, ndarray) else _unwrapped(source).view(ndarray)
    return found if dtype in (None, found.dtype) and found.device.id == cuda.Device.current else array(found, dtype)


def ascontiguousarray(source: ndarray) -> ndarray:
    """As CuPy's."""
    return np.ascontiguousarray(_copied(source)).view(ndarray)


def asnumpy(source: ndarray) -> np.ndarray:
    """A NumPy copy."""
    return np.array(_copied(source))


def copyto(to: ndarray, source: ndarray) -> None:
    """As CuPy's."""
    to[...] = source


def may_share_memory(a: ndarray, b: ndarray) -> bool:
    """As CuPy's."""
    return bool(np.may_share_memory(_unwrapped(a), _unwrapped(b)))


def _for_the_device(ufunc: np.ufunc) -> Callable[..., Any]:
    def function(*operands: Any, out: ndarray | None = None) -> Any:
        given = {} if out is None else {"out": (out,)}
        return empty(0).__array_ufunc__(ufunc, "__call__", *operands, **given)

    return function


exp, log, sqrt, maximum, matmul = map(_for_the_device, (np.exp, np.log, np.sqrt, np.maximum, np.matmul))
