"""Mini-batches: arrays cut along their first axis, in a new random order every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastopt.init import generator
from fastopt.kernels import get_backend, place_of

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
) -> Minibatches[tuple[Array, ...]]: ...
def minibatches(
    X: ArrayLike,
    y: ArrayLike | None = None,
    *more: ArrayLike,
    batch_size: int | Literal["full"] = 64,
    rng: int | np.random.Generator | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Minibatches[Any]:
    """Cut arrays into mini-batches along their first axis, reshuffled at every epoch.

    An epoch visits each row once: batch `i` holds rows `order[i * batch_size : (i + 1) * batch_size]` of every array,
    where `order` is a permutation drawn anew for each epoch. What is returned is iterated once per epoch, and its `len`
    is the number of batches in one:

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

    The arrays are not copied, and no shuffled copy of them is ever made: an epoch costs one permutation of the row
    numbers (8 bytes per row) and each batch is gathered when it is asked for. Memory-mapped arrays are read batch by
    batch. Arrays of a CUDA device stay there: the order is drawn as ever, and rows are gathered on the device.

    Args:
        X: array of shape (N, ...), any dtype. Lists and whatever else NumPy can read are converted once, here. Or an
            array of a CUDA device (CuPy's, torch's); all of them, then, and the batches are CuPy's.
        y: a second array of shape (N, ...), usually the labels. Without it the batches are plain arrays, with it they
            are tuples.
        *more: further arrays of shape (N, ...), such as sample weights; the tuples are then as long as there are
            arrays.
        batch_size: rows in a batch; int >= 1. Above N there is a single batch of N rows. "full" stands for all rows in
            their own order, without shuffling, since a sum over all of them is the same in any order.
        rng: None (fresh entropy), an int seed >= 0, or a numpy.random.Generator, which every epoch advances. A seed
            fixes the whole series of epochs: two objects made with the same seed give the same batches, epoch by epoch.
        shuffle: False keeps the rows in their own order, in every epoch.
        drop_last: leave out the last batch of an epoch when it is short, so that all have `batch_size` rows.

    Yields (at every iteration):
        Batches of `batch_size` rows, the last one shorter where N is not a multiple. Shuffled batches are fresh arrays,
        yours to keep and to change. Unshuffled ones (shuffle=False or batch_size="full") are views: no copy is made,
        and writing into them writes into X.

    Raises:
        ValueError: an array without a first axis, arrays of different length (the message names them), batch_size < 1,
            or drop_last=True with fewer rows than one batch, which would silently train on nothing. No rows at all are
            fine: no batches.
        TypeError: an argument of the wrong type, a masked array, whose mask would be lost, or arrays of which only
            some are on a device.
        RuntimeError: the arrays are on a device, and the CUDA backend cannot work here.
    """
    if y is None and more:
        raise TypeError(
            "y must be an array when more arrays follow it, found None; leave None out: minibatches(X, weights)"
        )
    given = {"X": X} if y is None else {"X": X, "y": y, **{f"more[{i}]": array for i, array in enumerate(more)}}
    arrays = {name: _as_rows(name, array) for name, array in given.items()}
    places = {name: place_of(array) for name, array in arrays.items()}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} is on {place!r}" for name, place in places.items())
        raise TypeError(f"all arrays must be in one place, found: {found}; bring all to the device, or none")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {rows}" for name, rows in lengths.items())
        raise ValueError(f"all arrays must have the same number of rows (length of the first axis), found: {found}")
    for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, found {flag!r}")

    rows = lengths["X"]
    size = _checked_batch_size(batch_size, rows)
    if drop_last and 0 < rows < size:
        raise ValueError(
            f"drop_last=True with batch_size={size} leaves no batch at all: there are only {rows} rows; "
            "pass drop_last=False or a smaller batch_size"
        )
    source = generator(rng)  # checked even where it is not needed
    shuffled = shuffle and not isinstance(batch_size, str)
    return Minibatches(
        tuple(arrays.values()), size, rows - rows % size if drop_last else rows, source if shuffled else None
    )


class Minibatches(Generic[Batch]):
    """An epoch's batches, afresh at every `iter`; made by `minibatches`, which documents it.

    Each `iter` draws its permutation at once, so epochs may also be run side by side, and giving one up half way
    changes nothing for the next. `len` is the number of batches in an epoch.

    Attributes:
        batch_size: rows in a batch; the number of all rows where "full" was asked for, or more than there are.

    >>> import numpy as np
    >>> batches = minibatches(np.arange(5), batch_size=2, shuffle=False)
    >>> batches, [batch.tolist() for batch in batches]
    (<Minibatches of (5,), in order: 3 batches of 2>, [[0, 1], [2, 3], [4]])
    """

    __slots__ = ("_arrays", "_rng", "_stop", "batch_size")

    def __init__(self, arrays: tuple[Array, ...], batch_size: int, stop: int, rng: np.random.Generator | None) -> None:
        self._arrays = arrays
        self.batch_size = batch_size
        self._stop = stop
        self._rng = rng

    def __len__(self) -> int:
        return -(-self._stop // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = None if self._rng is None else self._rng.permutation(len(self._arrays[0]))
        if order is not None and place_of(self._arrays[0]) == "cuda":
            order = get_backend("cuda").adopt(order)  # once, and not part by part
        return self._epoch(order)

    def _epoch(self, order: NDArray[np.intp] | None) -> Iterator[Any]:
        # Everything is spelled out in the loop: a call of a helper, or of a bound method in its place, costs as much as
        # gathering a small batch (a chain of `map` over `slice` was 1.3 x slower for batches of one row).
        size, several = self.batch_size, len(self._arrays) > 1
        sources = [(array, order is not None and _gathers_by_take(array)) for array in self._arrays]
        first, first_by_take = sources[0]
        for start in range(0, self._stop, size):
            rows: Any = slice(start, start + size) if order is None else order[start : start + size]
            if several:
                yield tuple([array.take(rows, 0) if by_take else array[rows] for array, by_take in sources])
            else:
                yield first.take(rows, 0) if first_by_take else first[rows]

    def __repr__(self) -> str:
        order = "in order" if self._rng is None else "shuffled"
        shapes = ", ".join(str(array.shape) for array in self._arrays)
        return f"<Minibatches of {shapes}, {order}: {len(self)} batches of {self.batch_size}>"


def _gathers_by_take(array: Array) -> bool:
    """Whether `array.take(rows, 0)` is the quickest way to copy those rows to a fresh array; if not, `array[rows]` is.

    The choice is never slower than `array[rows]`. Measured on one Zen 4 core with NumPy 2.4 (rows of a shuffled order,
    batches of 1, 32, 256 and 4096, four dtypes, arrays of up to 128 MiB): time against `array[rows]` in alternating
    runs, best and worst case. `bench/bench_minibatches.py` measures it again; for its batches of 96 MiB a quarter of a
    second is short (0.98 after 200 alternations, up to 1.05 after 15).

        elements in a row                     1            10           64           784          3072
        array.take(rows, 0)                   0.41 - 0.80  0.30 - 0.46  0.31 - 0.67  0.49 - 0.96  0.56 - 0.99
        np.take(array, rows, axis=0)          0.77 - 1.34  0.31 - 1.22  0.59 - 1.22  0.89 - 1.21  0.95 - 1.11
        array.take(rows, 0, np.empty, "clip") 0.66 - 0.99  0.30 - 0.92  0.59 - 0.91  0.68 - 0.95  0.95 - 1.00
        an njit loop, copying row by row      1.02 - 1.21  0.44 - 0.96  0.57 - 0.97  0.94 - 1.00  0.98 - 1.04
        array.take(rows, 0), array of 1 axis  0.86 - 1.50
        the same statement twice (the noise)  0.98 - 1.06

    So `take`, which copies each row with one memmove, for arrays of two or more axes, and indexing for those of one,
    where NumPy has a path of its own. No kernel: it gains nothing on `take` and would cost the import of numba and a
    compilation. mode="clip" and mode="wrap", which skip the check of the bounds, are no faster than the default.
    """
    if place_of(array) == "cuda":
        return True
    # Of an array that is not contiguous and aligned `take` first makes a copy that is: all of the data, at each batch.
    return array.ndim > 1 and array.flags.c_contiguous and array.flags.aligned


def _as_rows(name: str, array: ArrayLike) -> Array:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array, whose mask would be lost; "
            f"pass {name}.filled(value), and the mask as a further array"
        )
    on_device = place_of(array) == "cuda"
    try:
        rows: Any = get_backend("cuda").adopt(array) if on_device else np.asarray(array)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{name} must be an array whose first axis counts the rows, found {type(array).__name__}: {error}"
        ) from error
    if rows is None:
        raise TypeError(f"{name} must be an array without a gradient, found {type(array).__name__}; use detach()")
    if rows.ndim == 0:
        hint = "; the size of a batch is passed by name: batch_size=64" if isinstance(array, int | str) else ""
        raise ValueError(
            f"{name} must have a first axis that counts the rows, found {type(array).__name__} without any axis{hint}"
        )
    return rows


def _checked_batch_size(batch_size: object, rows: int) -> int:
    if isinstance(batch_size, str):
        if batch_size == "full":
            return max(rows, 1)
        raise ValueError(f"batch_size must be an int >= 1 or 'full', found {batch_size!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise TypeError(f"batch_size must be an int >= 1 or 'full', found {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be an int >= 1 or 'full', found {int(batch_size)}")
    return int(batch_size)
