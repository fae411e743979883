"""Mini-batches: arrays cut along their first axis, in a new random order in every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastopt import scalars
from fastopt.init import generator
from fastopt.kernels import backend_of, check_device, get_backend

__all__ = ["Minibatches", "minibatches"]

Array = NDArray[Any]
Batch = TypeVar("Batch", covariant=True)


@overload
def minibatches(
    X: ArrayLike,
    y: None = None,
    *,
    batch_size: int | Literal["full"] = ...,
    rng: int | np.random.Generator | None = ...,
    shuffle: bool = ...,
    drop_last: bool = ...,
    part: tuple[int, int] | None = ...,
) -> Minibatches[Array]: ...
@overload
def minibatches(
    X: ArrayLike,
    y: ArrayLike,
    *,
    batch_size: int | Literal["full"] = ...,
    rng: int | np.random.Generator | None = ...,
    shuffle: bool = ...,
    drop_last: bool = ...,
    part: tuple[int, int] | None = ...,
) -> Minibatches[tuple[Array, Array]]: ...
@overload
def minibatches(
    X: ArrayLike,
    y: ArrayLike,
    *more: ArrayLike,
    batch_size: int | Literal["full"] = ...,
    rng: int | np.random.Generator | None = ...,
    shuffle: bool = ...,
    drop_last: bool = ...,
    part: tuple[int, int] | None = ...,
) -> Minibatches[tuple[Array, ...]]: ...
def minibatches(
    X: ArrayLike,
    y: ArrayLike | None = None,
    *more: ArrayLike,
    batch_size: int | Literal["full"] = 64,
    rng: int | np.random.Generator | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    part: tuple[int, int] | None = None,
) -> Minibatches[Any]:
    """Cut arrays into mini-batches along their first axis, reshuffled in every epoch.

    An epoch visits each row once: batch `i` holds rows `order[i * batch_size : (i + 1) * batch_size]` of every array,
    where `order` is a new permutation in each epoch. Iterate over the returned object once per epoch; its `len` is the
    number of batches per epoch:

    >>> import numpy as np
    >>> X, y = np.arange(10.0).reshape(5, 2), np.arange(5)
    >>> batches = minibatches(X, y, batch_size=2, rng=0)
    >>> len(batches)
    3
    >>> for xb, yb in batches:
    ...     print(xb.shape, yb.shape, bool((xb[:, 0] == 2 * yb).all()))
    (2, 2) (2,) True
    (2, 2) (2,) True
    (1, 2) (1,) True

    The arrays are neither copied nor shuffled: an epoch costs one permutation of the row numbers (8 bytes per row), and
    each batch is gathered on demand. Memory-mapped arrays are read batch by batch. Arrays on a CUDA device stay there:
    the order is drawn on the host, and rows are gathered on the device.

    Args:
        X: array of shape (N, ...), any dtype. Lists and other array-likes are converted once. Or an array on a CUDA
            device (CuPy's, torch's); then all arrays must be on the device, and the batches are CuPy arrays.
        y: a second array of shape (N, ...), usually the labels. Without `y` the batches are plain arrays, with `y`
            tuples.
        *more: further arrays of shape (N, ...), such as sample weights; the tuples have one entry per array.
        batch_size: rows in a batch; int >= 1. Above N there is a single batch of N rows. "full" means all rows in
            their own order, without shuffling, because a sum over all rows does not depend on their order.
        rng: None (fresh entropy), an int seed >= 0, or a numpy.random.Generator, which every epoch advances. A seed
            fixes the whole series of epochs: two objects with the same seed give the same batches, epoch by epoch.
        shuffle: False keeps the rows in their own order, in every epoch.
        drop_last: drop the last batch of an epoch if it is short, so that all batches have `batch_size` rows.
        part: (rank, size) of one of several processes, 0 <= rank < size: of each batch of `batch_size` rows it gets a
            part, about 1 / size of them. All processes have the same number of batches. Some parts of a short batch may
            have fewer rows, or none: pass ``weight=len(xb)`` to `Optimizer.step`. `rng` must then be a seed, or a
            Generator in the same state on every process.

    Yields (at every iteration):
        Batches of `batch_size` rows; the last one is shorter if N is not a multiple. Shuffled batches are new arrays
        that you may keep and change. Unshuffled batches (shuffle=False or batch_size="full") are views: writing into
        them writes into X.

    Raises:
        ValueError: an array without a first axis, arrays of different length (the message names them), batch_size < 1,
            or drop_last=True with fewer rows than one batch, which would silently train on nothing; a part that does
            not exist, or one of batches in an order of its own. Arrays without rows are allowed and give no batches.
        TypeError: an argument of the wrong type, a masked array, whose mask would be lost, or a mix of arrays on a
            device and on the host.
        RuntimeError: the arrays are on a device, and the CUDA backend cannot work here.
    """
    if y is None and more:
        raise TypeError("y: must be an array if more arrays follow, got None; omit None: minibatches(X, weights)")
    given = {"X": X} if y is None else {"X": X, "y": y, **{f"more[{i}]": array for i, array in enumerate(more)}}
    arrays = {name: _as_rows(name, array) for name, array in given.items()}
    places = {name: backend_of(array) for name, array in arrays.items()}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {place!r}" for name, place in places.items())
        raise TypeError(f"arrays: must all be on one backend, got {found}; move all of them to the device, or none")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} with {rows}" for name, rows in lengths.items())
        raise ValueError(f"arrays: must all have the same number of rows (length of the first axis), got {found}")
    for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
        scalars.flag(name, flag)

    rows = lengths["X"]
    size = _checked_batch_size(batch_size, rows)
    if drop_last and 0 < rows < size:
        raise ValueError(
            f"batch_size: must be at most the number of rows, {rows}, with drop_last=True, got {size}; "
            "pass drop_last=False or a smaller batch_size"
        )
    source = generator(rng)  # check `rng` even if no draw needs it
    shuffled = shuffle and not isinstance(batch_size, str)
    if part is not None:
        part = _checked_part(part)
        if rng is None and shuffled:
            raise ValueError("rng: must be a seed with part=, so that all parts are of the same batches, got None")
    stop = rows - rows % size if drop_last else rows
    return Minibatches(tuple(arrays.values()), size, stop, source if shuffled else None, part)


class Minibatches(Generic[Batch]):
    """The batches of an epoch, new at every `iter`; returned by `minibatches`, which documents it.

    Each `iter` draws its permutation immediately, so epochs may overlap, and abandoning an epoch does not change the
    next one. `len` is the number of batches in an epoch.

    Attributes:
        batch_size: rows in a batch; the number of all rows for "full" and for larger batch sizes.

    >>> import numpy as np
    >>> batches = minibatches(np.arange(5), batch_size=2, shuffle=False)
    >>> batches, [batch.tolist() for batch in batches]
    (<Minibatches of (5,), in order: 3 batches of 2>, [[0, 1], [2, 3], [4]])
    """

    __slots__ = ("_arrays", "_part", "_rng", "_stop", "batch_size")

    def __init__(
        self,
        arrays: tuple[Array, ...],
        batch_size: int,
        stop: int,
        rng: np.random.Generator | None,
        part: tuple[int, int] | None = None,
    ) -> None:
        self._arrays = arrays
        self._part = part
        self.batch_size = batch_size
        self._stop = stop
        self._rng = rng

    def __len__(self) -> int:
        return -(-self._stop // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = None if self._rng is None else self._rng.permutation(len(self._arrays[0]))
        if order is not None and backend_of(self._arrays[0]) == "cuda":
            order = get_backend("cuda").adopt(order)  # copy the whole order once, not per batch
        return self._epoch(order)

    def _epoch(self, order: NDArray[np.intp] | None) -> Iterator[Any]:
        # Keep the loop free of helpers: a call costs as much as gathering a small batch.
        size, several = self.batch_size, len(self._arrays) > 1
        sources = [(array, order is not None and _gathers_by_take(array)) for array in self._arrays]
        first, first_by_take = sources[0]
        part, last = self._part, self._stop
        for start in range(0, last, size):
            begin, end = start, start + size
            if part is not None:
                rank, parts = part
                count = min(size, last - start)
                begin, end = start + count * rank // parts, start + count * (rank + 1) // parts
            rows: Any = slice(begin, end) if order is None else order[begin:end]
            if several:
                yield tuple([array.take(rows, 0) if by_take else array[rows] for array, by_take in sources])
            else:
                yield first.take(rows, 0) if first_by_take else first[rows]

    def __repr__(self) -> str:
        order = "in order" if self._rng is None else "shuffled"
        shapes = ", ".join(str(array.shape) for array in self._arrays)
        part = "" if self._part is None else ", part {} of {}".format(*self._part)
        return f"<Minibatches of {shapes}, {order}: {len(self)} batches of {self.batch_size}{part}>"


def _gathers_by_take(array: Array) -> bool:
    """Whether `array.take(rows, 0)` copies rows to a new array faster than `array[rows]`.

    `take` copies each row of two or more axes with one memmove; for one axis NumPy's indexing has its own fast path.
    """
    if backend_of(array) == "cuda":
        return True
    # `take` copies an array that is not contiguous and aligned: the whole array, for each batch.
    return array.ndim > 1 and array.flags.c_contiguous and array.flags.aligned


def _as_rows(name: str, array: ArrayLike) -> Array:
    if scalars.is_masked(array):
        raise TypeError(
            f"{name}: must be an array without a mask, got a masked array; "
            f"pass {name}.filled(value), and the mask as a further array"
        )
    backend = get_backend("cuda") if backend_of(array) == "cuda" else None
    try:
        rows: Any = np.asarray(array) if backend is None else backend.adopt(array)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{name}: must be an array whose first axis counts the rows, got {type(array).__name__}: {error}"
        ) from error
    if rows is None:
        raise TypeError(f"{name}: must be an array without a gradient, got {type(array).__name__}; use detach()")
    if backend is not None:
        check_device(name, rows, backend, backend.device, "the current one")
    if rows.ndim == 0:
        hint = "; pass the batch size by name: batch_size=64" if isinstance(array, int | str) else ""
        raise ValueError(
            f"{name}: must have a first axis that counts the rows, got {type(array).__name__} without axes{hint}"
        )
    return rows


def _checked_part(part: object) -> tuple[int, int]:
    if not isinstance(part, tuple) or len(part) != 2:
        raise TypeError(f"part: must be a tuple (rank, size), got {part!r}")
    size = scalars.count("part: size", part[1], 1)
    rank = scalars.count("part: rank", part[0], 0)
    if rank >= size:
        raise ValueError(f"part: must have a rank below its size {size}, got {rank}")
    return rank, size


def _checked_batch_size(batch_size: object, rows: int) -> int:
    if isinstance(batch_size, str):
        if batch_size == "full":
            return max(rows, 1)
        raise ValueError(f"batch_size: must be an int >= 1 or 'full', got {batch_size!r}")
    return scalars.count("batch_size", batch_size, 1, "an int >= 1 or 'full'")
