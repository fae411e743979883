"""The door: one compiled pass over a list of NumPy arrays checks each array and returns its address.

In Python an address alone takes 1 us an array. The compiled pass reads the fields of the list and of its arrays from
memory, as C code does, and takes 5-50 ns an array for the address and all checks. It accepts the arrays that kernels
can use in place, and refuses every other leaf. `Door.examine` then converts a refused leaf or raises the error.

The pass relies on the layout of CPython's lists (``PyListObject``) and of NumPy's arrays and dtypes
(``PyArrayObject_fields``, ``PyArray_Descr``). Before the first use the layout is verified on a few arrays against what
Python reports of them. Where the layout differs (free-threaded and debug builds, 32 bits, other Pythons), a pass in
Python gives the same results.
"""

from __future__ import annotations

import ctypes
import math
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt import scalars
from fastopt.kernels.threads import COMPILING

if TYPE_CHECKING:  # `_compile` supplies them to the compiled pass: their module imports numba
    from fastopt.kernels.intrinsics import prefetch, read_int32, read_int64, write_int64

NONE = 0
"""The address of a leaf that is None. NumPy gives no array this address, not even an empty one."""

REFUSED = -1
"""The address of a leaf that Python has to look at."""

NOT_A_LIST, NOT_ADDRESSES = -1, -2
"""What the compiled pass returns for arguments that it cannot use."""

COUNT_BITS = 32
"""The compiled pass returns two counts in one integer: numba takes 0.1 us to make a tuple of Python's."""

COUNT_MASK = (1 << COUNT_BITS) - 1

# --- the layout of the objects, in bytes ------------------------------------------------------------------------------

HEAD = 16
"""Of every object: its reference count and its type."""

TYPE = 8
LIST_SIZE, LIST_ITEMS = 16, 24
DATA, NDIM, DIMENSIONS, STRIDES, BASE, DTYPE, FLAGS = 16, 24, 32, 40, 48, 56, 64
SCALAR_TYPE, KIND = 16, 24
"""Of a dtype: the type of its scalars; and one word of four bytes (kind, character, byte order, and flags that vary)
and the number of the dtype."""

KIND_MASK = ~(0xFF << 24) if sys.byteorder == "little" else ~(0xFF << 32)
"""The word without the flags. Arrays that were pickled or deep-copied have a dtype of their own, equal to NumPy's."""

C_CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400

# --- the header: what the pass compares with, as 64-bit words ---------------------------------------------------------

WORDS = 14
(
    COUNT,  # how many leaves
    LIST_TYPE,  # the addresses of list, np.ndarray and None
    ARRAY_TYPE,
    NONE_OBJECT,
    DTYPE_OBJECT,  # the address of the dtype; and what other objects of an equal dtype hold
    DTYPE_SCALAR_TYPE,
    DTYPE_KIND,
    INT64_SCALAR_TYPE,
    INT64_KIND,
    SHAPES,  # the address of a table: for each leaf its size in bytes, the flags that it must have, and its shape
    INTERVALS,  # how many intervals of memory are protected
    BEGINS,  # the addresses of tables of where the intervals begin and end
    ENDS,
    OWN,  # the address of a table of each leaf's own place in the protected memory, or 0
) = range(0, 8 * WORDS, 8)

AHEAD = 16
"""How many leaves before its turn a leaf is prefetched: 47 ns an array instead of 96 where no array is in the cache, as
after a backward pass (8: 54 ns, 32: 52 ns); 5 ns with and without it where all are."""


def read_arrays(leaves: int, header: int, addresses: int) -> int:
    """The compiled pass over `leaves`, a list, for a header and an array of addresses; all three by their address.

    Returns the number of leaves refused, shifted by COUNT_BITS, plus that of the leaves that are None.
    """
    count = read_int64(header + COUNT)
    array_type = read_int64(header + ARRAY_TYPE)
    if read_int64(leaves + TYPE) != read_int64(header + LIST_TYPE) or read_int64(leaves + LIST_SIZE) != count:
        return NOT_A_LIST
    if read_int64(addresses + TYPE) != array_type or read_int32(addresses + NDIM) != 1:
        return NOT_ADDRESSES
    usable = C_CONTIGUOUS | ALIGNED | WRITEABLE
    dtype = read_int64(addresses + DTYPE)
    if (
        read_int64(read_int64(addresses + DIMENSIONS)) != count
        or read_int32(addresses + FLAGS) & usable != usable
        or read_int64(dtype + SCALAR_TYPE) != read_int64(header + INT64_SCALAR_TYPE)
        or read_int64(dtype + KIND) & KIND_MASK != read_int64(header + INT64_KIND)
    ):
        return NOT_ADDRESSES

    none = read_int64(header + NONE_OBJECT)
    dtype_object = read_int64(header + DTYPE_OBJECT)
    dtype_scalar_type = read_int64(header + DTYPE_SCALAR_TYPE)
    dtype_kind = read_int64(header + DTYPE_KIND)
    intervals = read_int64(header + INTERVALS)
    begins = read_int64(header + BEGINS)
    ends = read_int64(header + ENDS)
    own = read_int64(header + OWN)

    expected = read_int64(header + SHAPES)
    item = read_int64(leaves + LIST_ITEMS)
    to = read_int64(addresses + DATA)
    refused = 0
    absent = 0
    for k in range(count):
        if k + AHEAD < count:
            prefetch(read_int64(item + 8 * (k + AHEAD)))
            later = read_int64(item + 8 * (k + AHEAD // 2))
            if read_int64(later + TYPE) == array_type:
                prefetch(read_int64(later + DIMENSIONS))
                prefetch(read_int64(later + DTYPE))
                prefetch(later + FLAGS)
        leaf = read_int64(item + 8 * k)
        size = read_int64(expected)
        needed = read_int64(expected + 8)
        ndim = read_int64(expected + 16)
        shape = expected + 24
        expected = shape + 8 * ndim
        address = REFUSED
        if leaf == none:
            address = NONE
            absent += 1
        elif (
            read_int64(leaf + TYPE) == array_type
            and read_int32(leaf + NDIM) == ndim
            and read_int32(leaf + FLAGS) & needed == needed
        ):
            dtype = read_int64(leaf + DTYPE)
            fits = dtype == dtype_object or (
                read_int64(dtype + SCALAR_TYPE) == dtype_scalar_type
                and read_int64(dtype + KIND) & KIND_MASK == dtype_kind
            )
            dimensions = read_int64(leaf + DIMENSIONS)
            for j in range(ndim):
                fits &= read_int64(dimensions + 8 * j) == read_int64(shape + 8 * j)
            begin = read_int64(leaf + DATA)
            if fits:
                address = begin
                if size > 0 and intervals > 0:
                    # The first interval that ends behind the beginning is the only one that can begin before the end.
                    first = 0
                    left = intervals
                    while left > 0:
                        half = left >> 1
                        behind = read_int64(ends + 8 * (first + half)) <= begin
                        first = first + half + 1 if behind else first
                        left = left - half - 1 if behind else half
                    overlaps = first < intervals and read_int64(begins + 8 * first) < begin + size
                    if overlaps and (own == 0 or read_int64(own + 8 * k) != begin):
                        address = REFUSED
        refused += address == REFUSED
        write_int64(to + 8 * k, address)
    return (refused << COUNT_BITS) | absent


class Protected(NamedTuple):
    """Memory that arrays must not overlap, as sorted intervals; and the address at which each array may lie anyway."""

    begins: np.ndarray
    ends: np.ndarray
    own: np.ndarray | None
    whose: str

    def check(self) -> None:
        """Refuse intervals that overlap or are not sorted."""
        begins, ends = self.begins, self.ends
        if begins.ndim != 1 or begins.shape != ends.shape:
            raise ValueError(f"begins, ends: must be 1-D and of one length, got shapes {begins.shape} and {ends.shape}")
        if (begins >= ends).any() or (begins[1:] < ends[:-1]).any():
            raise ValueError("begins, ends: must be sorted intervals that do not overlap, none of them empty")

    def overlaps(self, lows: Any, highs: Any) -> Any:
        """Whether memory from `lows` to `highs`, numbers or arrays of them, overlaps this memory."""
        if len(self.begins) == 0:
            return np.zeros(np.shape(lows), bool)
        first = np.searchsorted(self.ends, lows, side="right")
        begins = self.begins[np.minimum(first, len(self.begins) - 1)]
        return (lows < highs) & (first < len(self.begins)) & (begins < highs)


class Header(NamedTuple):
    """The words that the compiled pass reads, and the arrays whose addresses are among them."""

    address: int
    words: np.ndarray
    protected: Protected


class Patience:
    """How long Python makes the pass, so that the first steps of a process do not wait for the compiler."""

    left = 16_384
    """Arrays, of all doors. The pass in Python takes 1.5 us an array; the compiled one is compiled in 0.3 s."""


class Door:
    """Checks the arrays of a list in one compiled pass, and returns their addresses.

    Args:
        shapes: of the arrays, in the order of the list.
        dtype: of all arrays, in native byte order.
        writeable: True for parameters, which are updated in place: each must be writeable, and none is converted.
            False for gradients, which are only read. Or a sequence of both, one per array.
        patience: whether to use Python's pass at first, and compile the other one when that has taken as long.

    A copy of a door, also a pickled one, protects no memory: its owner has memory of its own.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: Any,
        *,
        writeable: bool | Sequence[bool] = False,
        patience: bool = True,
    ):
        self.shapes = tuple(tuple(shape) for shape in shapes)
        given = np.dtype(dtype)
        if not given.isnative:
            raise ValueError(f"dtype: must be in native byte order, got {scalars.dtype_name(given)}")
        self.dtype = np.dtype(given.type)  # the object that NumPy gives most arrays
        self.writeable = tuple([writeable] * len(self.shapes) if isinstance(writeable, bool) else writeable)
        sizes = [math.prod(shape) * self.dtype.itemsize for shape in self.shapes]
        self.sizes = np.array(sizes, np.int64)
        """Of the arrays, in bytes."""
        self._needed = [C_CONTIGUOUS | ALIGNED | (WRITEABLE if written else 0) for written in self.writeable]
        lines = (
            (size, needed, len(shape), *shape)
            for size, needed, shape in zip(sizes, self._needed, self.shapes, strict=True)
        )
        self._table = np.array([number for line in lines for number in line], np.int64)
        self._entry: Callable[[int, int, int], int] | None = None if patience else compiled_pass()
        self.protect((), ())

    def __reduce__(self) -> Any:
        return partial(Door, writeable=self.writeable), (self.shapes, self.dtype)

    def protect(self, begins: Any, ends: Any, *, own: Any = None, whose: str = "the parameters") -> None:
        """Refuse arrays that overlap this memory from now on, instead of the memory of an earlier call.

        Args:
            begins, ends: addresses; sorted intervals that do not overlap, as `intervals` returns them.
            own: for each array the one address at which it may lie all the same, such as that of its view of a buffer
                of gradients, or 0.
            whose: what lies in the memory, for errors.

        Raises:
            ValueError: the intervals overlap, are not sorted, or one of them is empty; another number of `own`.
        """
        protected = Protected(
            np.array(begins, np.int64),
            np.array(ends, np.int64),
            None if own is None else np.array(own, np.int64),
            whose,
        )
        protected.check()
        if protected.own is not None and protected.own.shape != self.sizes.shape:
            raise ValueError(f"own: must have shape {self.sizes.shape}, got {protected.own.shape}")
        words = np.array(
            [
                len(self.shapes),
                id(list),
                id(np.ndarray),
                id(None),
                *_identity(self.dtype),
                *_identity(INT64)[1:],
                address_of(self._table),
                len(protected.begins),
                address_of(protected.begins),
                address_of(protected.ends),
                0 if protected.own is None else address_of(protected.own),
            ],
            np.int64,
        )
        # One assignment: a call in another thread, or after an interrupt, finds the earlier memory or this one.
        self._header = Header(address_of(words), words, protected)

    def take(self, leaves: list[Any], addresses: np.ndarray) -> tuple[int, int]:
        """Check each leaf, and write its address.

        Args:
            leaves: a list of one leaf per shape. Another thread must not change it during the call.
            addresses: int64 of shape (number of leaves,), contiguous. Receives the address of each array; NONE for a
                None; REFUSED for a leaf that is not an array, exactly of NumPy's own type, of its shape and the dtype,
                C-contiguous, aligned, writeable where that is asked for, and outside of the protected memory. Empty
                arrays overlap nothing.

        Returns:
            How many leaves are refused, and how many are None.

        Raises:
            TypeError, ValueError: `leaves` or `addresses` is not of this form. No leaf raises an error.
        """
        entry = self._entry
        if entry is None:
            if Patience.left > 0 and not _compile.cache_info().currsize:
                Patience.left -= len(self.shapes)
                return self.take_in_python(leaves, addresses)
            entry = self._entry = compiled_pass()
            if entry is None:
                return self.take_in_python(leaves, addresses)
        header = self._header
        found = entry(id(leaves), header.address, id(addresses))
        if found < 0:
            return self.take_in_python(leaves, addresses)  # raises the error
        return found >> COUNT_BITS, found & COUNT_MASK

    def take_in_python(self, leaves: list[Any], addresses: np.ndarray) -> tuple[int, int]:
        """As `take`, without compiled code."""
        self._check_arguments(leaves, addresses)
        found = np.array(
            [self._address(*each) for each in zip(leaves, self.shapes, self._needed, strict=True)], np.int64
        )
        protected = self._header.protected
        overlaps = protected.overlaps(found, found + self.sizes)
        if protected.own is not None:
            overlaps &= found != protected.own
        addresses[...] = np.where(overlaps & (found > NONE), REFUSED, found)
        return int(np.count_nonzero(addresses == REFUSED)), int(np.count_nonzero(addresses == NONE))

    def _address(self, leaf: Any, shape: tuple[int, ...], needed: int) -> int:
        if leaf is None:
            return NONE
        if type(leaf) is not np.ndarray or leaf.shape != shape or leaf.flags.num & needed != needed:
            return REFUSED
        return address_of(leaf) if _same(leaf.dtype, self.dtype) else REFUSED

    def admit(self, leaves: list[Any], addresses: np.ndarray, paths: Sequence[str]) -> int:
        """Write the address of each leaf: by `take`, and by `examine` for the leaves that `take` refuses.

        Args:
            leaves, addresses: as for `take`. A converted array takes the place of its leaf in the list, which keeps it
                alive.
            paths: the names of the leaves, for errors.

        Returns:
            How many leaves are None.

        Raises:
            TypeError, ValueError: as `take` and `examine`.
        """
        refused, absent = self.take(leaves, addresses)
        if refused:
            for k in np.flatnonzero(addresses == REFUSED).tolist():
                leaves[k] = array = self.examine(k, leaves[k], paths[k])
                addresses[k] = address_of(array)
        return absent

    def examine(self, k: int, leaf: Any, path: str) -> np.ndarray:
        """Return an array whose address may be used for leaf k, which `take` refused.

        Raises:
            TypeError, ValueError: as `usable_array`; the leaf overlaps the protected memory.
        """
        written = self.writeable[k]
        what = f"{'parameter' if written else 'gradient'} {path!r}"
        array = usable_array(leaf, self.shapes[k], self.dtype, what, writeable=written)
        protected = self._header.protected
        within = len(protected.begins) > 0 and isinstance(leaf, np.ndarray) and protected.overlaps(*bounds_of(leaf))
        if within and protected.overlaps(*runs_of(leaf)).any():
            own = protected.own
            if own is None or not leaf.flags.c_contiguous or address_of(leaf) != own[k]:
                # Also where the leaf was converted: a gradient that lies in the parameters is a mistake.
                raise ValueError(f"{what}: must not overlap {protected.whose} in memory; pass a copy")
        return array

    def _check_arguments(self, leaves: Any, addresses: Any) -> None:
        """Raise the error of arguments that `take` cannot use."""
        count = len(self.shapes)
        if type(leaves) is not list:
            raise TypeError(f"leaves: must be a list, got {type(leaves).__name__}")
        if len(leaves) != count:
            raise ValueError(f"leaves: must have length {count}, got {len(leaves)}")
        if type(addresses) is not np.ndarray or not _same(addresses.dtype, INT64):
            raise TypeError(f"addresses: must be a NumPy array of int64, got {type(addresses).__name__}")
        usable = C_CONTIGUOUS | ALIGNED | WRITEABLE
        if addresses.shape != (count,) or addresses.flags.num & usable != usable:
            raise ValueError(f"addresses: must be contiguous and writeable of shape ({count},), got {addresses.shape}")


# --- the leaves that the pass refuses ---------------------------------------------------------------------------------


def usable_array(leaf: Any, shape: tuple[int, ...], dtype: np.dtype[Any], what: str, *, writeable: bool) -> np.ndarray:
    """Return an array of NumPy's own type, C-contiguous and aligned, in the place of a leaf.

    Return the leaf, or a view of it, where its memory can be used as it is. Otherwise, if the leaf is only to be read,
    return a copy: of an array of other strides, or of a number, of any dtype, for a parameter of shape ().

    Args:
        leaf: anything.
        shape, dtype: what it must have.
        what: such as "gradient 'W'", with which errors begin.
        writeable: the leaf is to be updated: it must be writeable, and is never copied.

    Raises:
        TypeError: the leaf is not an array, is masked, or has another dtype.
        ValueError: it has another shape; it would have to be copied to be updated; a number is out of range.
    """
    name = "param" if writeable else "grad"
    scalars.refuse_masked(what, leaf)
    array: np.ndarray
    if shape == () and not writeable and not (isinstance(leaf, np.ndarray) and leaf.dtype == dtype):
        number = number_array(leaf, dtype, what)
        if number is not None:
            return number
    if isinstance(leaf, np.ndarray):
        array = leaf if type(leaf) is np.ndarray else leaf.view(np.ndarray)
    elif isinstance(leaf, np.generic) and not writeable:  # of another dtype, or for another shape
        array = np.asarray(leaf)
    else:
        accepted = "" if writeable else " or None" if shape else ", number or None"
        raise TypeError(f"{what}: must be a NumPy array{accepted}, got {_type_name(leaf)}{remedy(leaf, name)}")
    if array.dtype != dtype:
        whose = "" if writeable else " as its parameter"
        raise TypeError(
            f"{what}: must have dtype {dtype}{whose}, got {scalars.dtype_name(array.dtype)}; "
            f"use {name}.astype({dtype.name!r})"
        )
    if array.shape != shape:
        whose = "" if writeable else " as its parameter"
        raise ValueError(f"{what}: must have shape {shape}{whose}, got {array.shape}")
    whole = array.flags.c_contiguous and array.flags.aligned
    if not writeable:
        return array if whole else np.array(array, dtype, order="C")
    if not array.flags.c_contiguous:
        raise ValueError(f"{what}: must be C-contiguous, got strides {array.strides}; use np.ascontiguousarray(param)")
    if not whole:
        raise ValueError(f"{what}: must be aligned, got address {address_of(array):#x}; use param.copy()")
    if not array.flags.num & WRITEABLE:
        raise ValueError(f"{what}: must be writeable, got a read-only array; use param.copy()")
    return array


def number_array(leaf: Any, dtype: np.dtype[Any], what: str) -> np.ndarray | None:
    """Return a number, as `scalars.real` defines it, as a 0-d array of this dtype; None for any other leaf.

    Infinite where the number is beyond the range of the dtype, as in any other arithmetic of the dtype; ValueError for
    an int beyond the range of floats.
    """
    number = scalars.real(leaf)
    if number is None:
        return None
    try:
        with np.errstate(over="ignore"):
            return np.array(float(number), dtype)
    except OverflowError:
        raise ValueError(f"{what}: must be in the range of {dtype.name}, got a larger int") from None


def _type_name(leaf: Any) -> str:
    kind = type(leaf)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def remedy(leaf: Any, name: str) -> str:
    """The end of an error about an array of another library: how NumPy can read it."""
    if not hasattr(type(leaf), "__array__"):
        return ""
    detach = ".detach()" if getattr(leaf, "requires_grad", False) else ""
    half = str(getattr(leaf, "dtype", "")).rpartition(".")[2]
    if half in ("bfloat16", "float16", "half"):
        return (
            f"; it is {half}: use {name}{detach}.float().numpy()"
            if hasattr(leaf, "float")
            else (f"; it is {half}: use np.asarray({name}, np.float32)")
        )
    if detach:
        return f"; it requires grad: use {name}.detach().numpy()"
    return f"; use np.asarray({name})"


# --- memory -----------------------------------------------------------------------------------------------------------


def address_of(array: np.ndarray) -> int:
    """Return the address of the first element."""
    address: int = array.__array_interface__["data"][0]
    return address


def bounds_of(array: Any, address: int | None = None) -> tuple[int, int]:
    """Return the addresses from and up to which an array of any strides lies; `address`: of an array of a device."""
    low = high = address_of(array) if address is None else address
    if array.size == 0:
        return low, high
    for count, stride in zip(array.shape, array.strides, strict=True):
        low += min(stride, 0) * (count - 1)
        high += max(stride, 0) * (count - 1)
    return low, high + array.itemsize


def described(array: Any, address: int) -> np.ndarray:
    """Return a NumPy array of the shape, strides and address of an array of a device, to compare and never to read."""
    interface = {"shape": array.shape, "strides": array.strides, "typestr": array.dtype.str, "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__={**interface, "data": (address, True)}))


def overlapping(addresses: np.ndarray, sizes: np.ndarray) -> tuple[int, int] | None:
    """Return the numbers of two arrays that share memory, the smaller one first, or None where no two do.

    Args:
        addresses: of the arrays, int64, as `Door.take` returns them; those of None and of refused leaves are skipped.
        sizes: of the arrays, in bytes. Empty arrays overlap nothing.
    """
    order, begins, ends = _sorted(addresses, sizes)
    (found,) = np.nonzero(begins[1:] < ends[:-1])
    if len(found) == 0:
        return None
    after = int(found[0]) + 1
    before = int(np.argmax(begins[:after] + sizes[order[:after]]))
    first, second = sorted((int(order[before]), int(order[after])))
    return first, second


FEW_PAIRS = 1_000
"""How many pairs of arrays that lie within each other's bounds are compared one by one, times the logarithm of how many
arrays there are."""

HARD = 100_000
"""The work of `np.shares_memory` (for two arrays of many strides a hard problem), beyond which runs are compared."""


def sharing(arrays: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """Return the numbers of two arrays of any strides that share memory, the smaller one first; None where no two do.

    Exact: ``a[::2]`` and ``a[1::2]`` share none. Arrays are sorted by their bounds. Where those of several overlap,
    pairs are compared by `np.shares_memory` or, where there are many pairs, the contiguous runs of all these arrays are
    sorted. So the time grows as n log n with the arrays, or with the runs of those that lie in each other's gaps.
    """
    bounds = np.array([bounds_of(array) for array in arrays], np.int64).reshape(-1, 2)
    order, begins, ends = _sorted(bounds[:, 0], bounds[:, 1] - bounds[:, 0])
    if len(order) == 0:
        return None
    (starts,) = np.nonzero(np.r_[True, begins[1:] >= ends[:-1]])
    for cluster in np.split(order, starts[1:]):
        if len(cluster) > 1:
            pair = _sharing_in([int(k) for k in cluster], arrays, bounds)
            if pair is not None:
                return min(pair), max(pair)
    return None


def _sharing_in(cluster: Sequence[int], arrays: Sequence[np.ndarray], bounds: np.ndarray) -> tuple[int, int] | None:
    """The same for arrays whose bounds overlap, sorted by where they begin."""
    left = FEW_PAIRS * len(cluster).bit_length()
    active: list[int] = []
    try:
        for k in cluster:
            active = [other for other in active if bounds[other, 1] > bounds[k, 0]]
            left -= len(active)
            if left < 0:
                return _runs_sharing(cluster, arrays)
            for other in active:
                if np.shares_memory(arrays[other], arrays[k], max_work=HARD):  # type: ignore[arg-type]
                    return other, k
            active.append(k)
    except np.exceptions.TooHardError:
        return _runs_sharing(cluster, arrays)
    return None


def _runs_sharing(numbers: Sequence[int], arrays: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """Two of these arrays that share memory, by the contiguous runs of all of them."""
    runs = [runs_of(arrays[k]) for k in numbers]
    begins, ends = (np.concatenate(each) for each in zip(*runs, strict=True))
    owners = np.repeat(np.array(numbers), [len(each) for each, _ in runs])
    pair = overlapping(begins, ends - begins)
    return None if pair is None else (int(owners[pair[0]]), int(owners[pair[1]]))


def runs_of(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The addresses from and up to which an array of any strides lies: sorted intervals, as few as possible."""
    if array.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    size = array.itemsize
    offsets = np.zeros(1, np.int64)
    for stride, count in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True)):
        if stride == size:
            size *= count
        else:
            offsets = (offsets + stride * np.arange(count if stride else 1)[:, None]).reshape(-1)
    begins = bounds_of(array)[0] + offsets
    return intervals(begins, np.full(len(begins), size))


def intervals(addresses: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the memory of arrays as `Door.protect` expects it: sorted intervals, as few as possible.

    Args:
        addresses, sizes: as for `overlapping`.
    """
    _, begins, ends = _sorted(addresses, sizes)
    if len(begins) == 0:
        return begins, ends
    apart = begins[1:] > ends[:-1]
    return begins[np.r_[True, apart]], ends[np.r_[apart, True]]


def _sorted(addresses: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort arrays that have memory by address: their numbers, begins, and the greatest of the ends so far."""
    (present,) = np.nonzero((addresses > NONE) & (sizes > 0))
    order = present[np.argsort(addresses[present], kind="stable")]
    begins = addresses[order]
    return order, begins, np.maximum.accumulate(begins + sizes[order])


# --- compiling the pass, and what it relies on ------------------------------------------------------------------------


def compiled_pass() -> Callable[[int, int, int], int] | None:
    """Return the compiled pass, or None where the layout of the objects is not the one it reads."""
    with COMPILING:
        return _compile()


@cache
def _compile() -> Callable[[int, int, int], int] | None:
    if not layout_is_known():
        return None
    from numba import types

    from fastopt.kernels import intrinsics
    from fastopt.kernels.bind import bind, compile_loop
    from fastopt.kernels.elements import scalar

    constants = {name: getattr(intrinsics, name) for name in ("prefetch", "read_int32", "read_int64", "write_int64")}
    bound = bind(read_arrays, constants, label="door", scalar=scalar)
    entry = compile_loop(bound, (types.int64,) * 3, nogil=False).entry
    return entry if passes_agree(entry) else None


def layout_is_known() -> bool:
    """Whether a few lists, arrays and dtypes have their fields where the compiled pass reads them."""
    if sys.implementation.name != "cpython" or struct.calcsize("P") != 8:
        return False
    if not getattr(sys, "_is_gil_enabled", lambda: True)():  # another thread could change a list during the pass
        return False
    if object.__basicsize__ != HEAD or list.__basicsize__ != LIST_ITEMS + 16:
        return False
    if np.ndarray.__basicsize__ < FLAGS + 4 or np.dtype.__basicsize__ < KIND + 8:
        return False
    return _list_is_known([]) and _list_is_known([None, 1, "a"]) and all(map(_array_is_known, _examples()))


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _number_at(address: int) -> int:
    return ctypes.c_int32.from_address(address).value


def _list_is_known(items: list[Any]) -> bool:
    if _word(id(items) + TYPE) != id(list) or _word(id(items) + LIST_SIZE) != len(items):
        return False
    return all(_word(_word(id(items) + LIST_ITEMS) + 8 * k) == id(item) for k, item in enumerate(items))


def _array_is_known(array: Any) -> bool:
    """Compare every field of an array, and follow its pointers last."""
    if not isinstance(array, np.ndarray):
        return True
    at = id(array)
    words = {TYPE: id(type(array)), DATA: address_of(array), DTYPE: id(array.dtype)}
    words[BASE] = 0 if array.base is None else id(array.base)
    if any(_word(at + field) != value for field, value in words.items()):
        return False
    if _number_at(at + NDIM) != array.ndim or _number_at(at + FLAGS) != array.flags.num:
        return False
    dimensions = _word(at + DIMENSIONS)
    if array.ndim > 0 and _word(at + STRIDES) != dimensions + 8 * array.ndim:  # one piece of memory holds both
        return False
    if [_word(dimensions + 8 * j) for j in range(2 * array.ndim)] != [*array.shape, *array.strides]:
        return False
    found = id(array.dtype), _word(id(array.dtype) + SCALAR_TYPE), _word(id(array.dtype) + KIND) & KIND_MASK
    return found == _identity(array.dtype)


def _examples() -> list[Any]:
    """Leaves of many kinds, nearly all of them of 3 elements or of none."""
    leaves: list[Any] = [None, 1.0, [1.0], np.zeros(3, np.int64), np.zeros(3, bool), np.float32(1.0)]
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        shapes: list[tuple[int, ...]] = [(), (3,), (3, 1), (1, 3), (0,), (0, 4), (1, 3, 1, 1), (2, 3)]
        leaves += [np.zeros(shape, dtype) for shape in shapes]
        vector = np.zeros(3, dtype)
        constant = np.zeros(3, dtype)
        constant.flags.writeable = False
        unaligned = np.zeros(3 * dtype.itemsize + 1, np.uint8)[1:].view(dtype)
        leaves += [vector[::-1], np.zeros((3, 2), dtype)[:, 0], np.zeros((3, 2), dtype).T, constant, unaligned]
        leaves += [np.broadcast_to(np.zeros(1, dtype), (3,)), np.zeros(3, dtype.newbyteorder())]
        leaves += [pickle.loads(pickle.dumps(vector)), vector.view(np.recarray)]
    return leaves


def passes_agree(entry: Callable[[int, int, int], int]) -> bool:
    """Whether the compiled pass and the pass in Python give the same results for a few lists."""
    leaves = _examples()
    arrays = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
    own_shapes = [leaf.shape if isinstance(leaf, np.ndarray) else (3,) for leaf in leaves]
    begins, ends = intervals(np.array([address_of(array) for array in arrays[::4]]), np.full(len(arrays[::4]), 1))
    found, expected = np.empty((2, len(leaves)), np.int64)
    for shapes in (own_shapes, [(3,)] * len(leaves)):
        for dtype in (np.float32, np.float64):
            for writeable in (False, True):
                door = Door(shapes, dtype, writeable=writeable)
                for bounds in (((), ()), (begins, ends)):
                    door.protect(*bounds)
                    refused, absent = door.take_in_python(leaves, expected)
                    packed = entry(id(leaves), door._header.address, id(found))
                    if packed != refused << COUNT_BITS | absent or not np.array_equal(found, expected):
                        return False
    return True


def _identity(dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """Return what the compiled pass compares of a dtype: its address, its SCALAR_TYPE and its KIND."""
    word = f"{dtype.kind}{dtype.char}{dtype.byteorder}\0".encode() + dtype.num.to_bytes(4, sys.byteorder)
    return id(dtype), id(dtype.type), int.from_bytes(word, sys.byteorder, signed=True)


def _same(a: np.dtype[Any], b: np.dtype[Any]) -> bool:
    """Whether two dtypes are the same for the compiled pass."""
    return a is b or _identity(a)[1:] == _identity(b)[1:]


INT64 = np.dtype(np.int64)
