"""`pack` and `FlatParams`: a tree of parameters, in one aligned buffer or in the caller's arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import optree

from fastopt import scalars
from fastopt.kernels import backend_of, check_device, get_backend
from fastopt.kernels.contract import BFLOAT16, Backend
from fastopt.lazy import lazy
from fastopt.signals import deferred_signals
from fastopt.storage.door import (
    Door,
    Protected,
    bounds_of,
    described,
    intervals,
    number_array,
    overlapping,
    remedy,
    runs_of,
    sharing,
    usable_array,
)
from fastopt.storage.formats import FORMATS, compute_dtype, dtype_of, format_of
from fastopt.storage.layout import Layout
from fastopt.storage.trees import containers, difference, flatten, handed_out, leaves_like, plain

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


class FlatParams:
    """A tree of parameters and a tree of their gradients. Made by `pack`.

    By default, the leaves of `params` are views of one flat buffer. With ``copy=False`` they are the caller's own
    arrays. The leaves of `grads` are always views of a buffer of this object.

    Attributes:
        params, grads: trees of the structure given to `pack`; writing to a leaf writes to what the optimizer uses.
        arrays: the leaves of `params`, in the order of `paths`.
        data, grad: the 1-D buffers. Every parameter starts on a 64-byte boundary; the padding between is zero. With
            ``copy=False`` there is no `data`.
        in_place: whether the parameters are in the caller's own arrays (``copy=False``).
        paths: the parameters' names, such as ``"bn.gamma"``, in buffer order.
        shapes, offsets: the shape of each parameter, and its offset in a buffer, in elements.
        size: the elements of a buffer, including padding.
        dtype, backend: float32, float64, float16 or bfloat16; ``"cpu"`` or ``"cuda"``.
        compute: the dtype in which updates are computed: float32 for parameters of 16 bits, otherwise `dtype`.
        device: the number of the device on which the arrays are; None on the CPU.
        members: of a population, the number of networks, which is the length of the first axis of every array; None for
            one network.
        layout: where each array is in a buffer.
        split: the same of each parameter of each member, those of the first member first; `layout` for one network.
    """

    def __init__(
        self,
        leaves: Sequence[Any],
        paths: Sequence[str],
        treespec: Any,
        dtype: np.dtype[Any],
        backend: str,
        *,
        copy: bool = True,
        members: int | None = None,
        part: int = 0,
        parts: int = 1,
        uncut: Sequence[bool] = (),
    ):
        self._backend = get_backend(backend)
        self.layout = Layout.of([leaf.shape for leaf in leaves], dtype.itemsize, part, parts, uncut)
        self.members = members
        self.split = self.layout if members is None else self.layout.split(members)
        self.paths = tuple(paths)
        self.dtype = dtype
        self.compute = compute_dtype(dtype)
        self.backend = backend
        self.treespec = treespec
        self.in_place = not copy
        self._grad_arrays: list[Any] | None = None
        self.grad_buffers: list[Any] = []
        self.arrays = list(leaves)
        self._buffers: list[Any] = []
        if copy:
            buffer = self.new_buffer()
            self._buffers = [buffer]
            self.arrays = self.views(buffer)
            for view, leaf in zip(self.arrays, leaves, strict=True):
                self._backend.copy(view, leaf)
        self.device = self._backend.device_of(self.arrays[0])
        self.params = handed_out(treespec, self.arrays, "opt.params")
        self.addresses = self.addresses_of(self.arrays)
        self._door_of_params: Door | None = None

    # Documented in the class docstring.
    shapes = property(lambda self: self.layout.shapes)
    offsets = property(lambda self: self.layout.offsets)
    size = property(lambda self: self.layout.size)

    @property
    def member_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each parameter of one network."""
        return self.split.shapes[: len(self.paths)]

    @property
    def data(self) -> Any:
        """The buffer of the parameters; AttributeError where they are in the caller's arrays or in several buffers."""
        if len(self._buffers) != 1:
            found = f"{len(self._buffers)} buffers"
            raise AttributeError(f"data: the parameters must be in one buffer, got {found}; use `arrays` or `params`")
        return self._buffers[0]

    @property
    def grad_arrays(self) -> list[Any]:
        """The leaves of `grads`, in the order of `paths`; their buffer is made on first access."""
        if self._grad_arrays is None:
            buffer = self.new_buffer()
            self.grad_buffers = [buffer]
            self._grad_arrays = self.views(buffer)
        return self._grad_arrays

    @property
    def grad(self) -> Any:
        """The buffer of gradients, zeros at first; AttributeError where there are several (`Optimizer.add`)."""
        self.grad_arrays  # noqa: B018 makes the buffer
        if len(self.grad_buffers) > 1:
            raise AttributeError("grad: the gradients must be in one buffer, got several, after add(); use `grads`")
        return self.grad_buffers[0]

    @lazy
    def grads(self) -> Any:
        """The gradients as a tree of views of their buffer."""
        return handed_out(self.treespec, self.grad_arrays, "opt.grads")

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatParams:
        """Return a copy with its own arrays; arrays and containers handed out are copied as those of the copy."""
        leaves = [array.copy() for array in self.arrays] if self.in_place else self.arrays
        twin = self._like(leaves, copy=not self.in_place)
        if self._grad_arrays is not None:
            for view, array in zip(twin.grad_arrays, self._grad_arrays, strict=True):
                view[...] = array
        twin = twin._using([memo.get(id(array)) for array in self.arrays], self._copied_grads(memo))
        memo[id(self)] = twin
        pairs = [(self.arrays, twin.arrays), (containers(self.params), containers(twin.params))]
        if self._grad_arrays is not None:
            pairs += [(self.grad_arrays, twin.grad_arrays), (containers(self.grads), containers(twin.grads))]
        for mine, theirs in pairs:
            memo.update({id(own): copied for own, copied in zip(mine, theirs, strict=True)})
        return twin

    def _like(self, leaves: Sequence[Any], *, copy: bool) -> FlatParams:
        """These parameters with other leaves."""
        layout = self.layout
        return FlatParams(
            *(leaves, self.paths, self.treespec, self.dtype, self.backend),
            copy=copy,
            members=self.members,
            part=layout.part,
            parts=layout.parts,
            uncut=layout.uncut,
        )

    def _copied_grads(self, memo: Mapping[int, Any]) -> list[Any]:
        return [memo.get(id(array)) for array in self._grad_arrays or ()]

    def _using(self, params: Sequence[Any], grads: Sequence[Any]) -> FlatParams:
        """Return these parameters in the arrays that are given, where one is given: copies that were made before."""
        if all(array is None for array in (*params, *grads)):
            return self
        leaves = [own if given is None else given for own, given in zip(self.arrays, params, strict=True)]
        twin = self._like(leaves, copy=False)
        twin.in_place = self.in_place
        twin._buffers = [*self._buffers, *filter(_is_given, params)] if self._buffers else []
        if self._grad_arrays is not None:
            twin._grad_arrays = [
                own if given is None else given for own, given in zip(self._grad_arrays, grads, strict=True)
            ]
            twin.grad_buffers = [*self.grad_buffers, *filter(_is_given, grads)]
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arrays one by one, so that what else was pickled with them shares them afterwards."""
        grads = None if self._grad_arrays is None else list(self._grad_arrays)
        return _unpickled, (plain(self.params), grads, self.backend, self.in_place, self.members)

    def extended(self, params: Any, apart_from: Sequence[Any] = ()) -> FlatParams:
        """Return these parameters together with others, which get a buffer of their own or stay in their arrays.

        Args:
            params: a dict of trees to add to a dict, or a list of trees to add to a list.
            apart_from: a list of buffers of the backend that the arrays must not overlap where they stay in place.

        Returns:
            A `FlatParams` that shares its arrays with this one.

        Raises:
            TypeError, ValueError: as `pack`; a key that is there already, parameters that are not in a dict or list,
                arrays that overlap those that are there.
            RuntimeError: as `pack`.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2)})
        >>> flat.extended({"b": np.zeros(1)}).paths
        ('b', 'w')
        """
        others = pack(params, backend=self.backend, copy=not self.in_place, members=self.members)
        if others.dtype != self.dtype:
            raise TypeError(f"params: must have dtype {self.dtype} as the other parameters, got {others.dtype}")
        merged = _merged(plain(self.params), plain(others.params))
        leaves, treespec, paths = flatten(merged)
        given = flatten(_merged(plain(self.params), plain(params)))[0]
        _refuse_sharing([*given, *apart_from], self._backend, (*paths, *_own(apart_from)))
        twin = FlatParams(leaves, paths, treespec, self.dtype, self.backend, copy=False, members=self.members)
        twin.in_place = self.in_place
        twin._buffers = [*self._buffers, *others._buffers]
        grads = _merged(plain(self.grads), plain(others.grads))
        twin._grad_arrays = flatten(grads)[0]
        twin.grad_buffers = [*self.grad_buffers, *others.grad_buffers]
        return twin

    def __repr__(self) -> str:
        count = sum(self.layout.sizes)
        where = f"{self.backend}, in place" if self.in_place else self.backend
        where += "" if self.members is None else f", of {self.members} networks"
        return f"<FlatParams: {len(self.paths)} parameters, {count:,} elements of {self.dtype}, on {where}>"

    def new_buffer(self, dtype: Any = None) -> np.ndarray:
        """Return a new buffer of zeros with this layout, for a state.

        Args:
            dtype: of its elements; None for that of the parameters.

        Returns:
            A 1-D buffer of the backend.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"w": np.ones(3)}).new_buffer()
        array([0., 0., 0., 0., 0., 0., 0., 0.])
        """
        return self._backend.zeros(self.layout.size, self.dtype if dtype is None else np.dtype(dtype))

    def with_codes(self, large: Sequence[bool]) -> FlatParams:
        """Return these parameters, with room for codes in buffers of states.

        Args:
            large: for each parameter whether its states have codes.

        Returns:
            A `FlatParams` that shares its arrays with this one.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"b": np.ones(3), "w": np.ones(5000)}).with_codes([False, True])
        >>> flat.layout.states, flat.layout.coded
        ((5120, 0), 5120)
        """
        twin = FlatParams.__new__(FlatParams)  # copy.copy goes by what is pickled: NumPy arrays
        twin.__dict__.update(self.__dict__)
        twin.layout = twin.split = self.layout.with_codes(large)
        for name in ("places", "neighbours"):
            twin.__dict__.pop(name, None)
        return twin

    def new_state(self, dtype: Any = None) -> np.ndarray:
        """Return a new buffer of zeros for a state.

        Args:
            dtype: of its elements; None for that of the parameters.

        Returns:
            A 1-D buffer of the backend.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"w": np.ones(3)}).new_state(np.float32).dtype
        dtype('float32')
        """
        return self._backend.zeros(self.layout.size_of_states, self.dtype if dtype is None else np.dtype(dtype))

    def state_views(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Return the parameters' parts of a buffer of a state.

        Args:
            buffer: 1-D, as `new_state` returned it.

        Returns:
            A list of views of the buffer in the parameters' shapes, in the order of `paths`; where this process holds
            the states of a part only, they are 1-D, of the elements in it.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2), "b": np.zeros(1)})
        >>> [view.shape for view in flat.state_views(flat.new_state())]
        [(1,), (2,)]
        """
        layout = self.layout
        if layout.parts > 1:
            return [
                buffer[offset + own.start - layout.start : offset + own.stop - layout.start]
                if own.start < own.stop
                else buffer[:0]
                for offset, own in zip(layout.offsets, layout.held, strict=True)
            ]
        return self._parts_of(buffer, layout.states or layout.offsets)

    def held(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """The elements of arrays like the parameters of which this process holds the states.

        Args:
            arrays: a list in the order of `paths`, of contiguous arrays of any dtype.

        Returns:
            `arrays`; where this process holds the states of a part only, a list of 1-D views of the elements in it.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2)})
        >>> flat.held(flat.arrays) is flat.arrays
        True
        """
        if self.layout.parts == 1:
            return arrays
        return [array.reshape(-1)[own] for array, own in zip(arrays, self.layout.held, strict=True)]

    def _parts_of(self, buffer: np.ndarray, offsets: Sequence[int]) -> list[np.ndarray]:
        return [
            buffer[offset : offset + size].reshape(shape)
            for offset, size, shape in zip(offsets, self.layout.sizes, self.layout.shapes, strict=True)
        ]

    def new_numbers(self, over: str = "tensor") -> np.ndarray:
        """Return a buffer of zeros in float64: a sum of squares may leave the range of float32.

        Args:
            over: of what there is a number each, as in `fastopt.Sums`: ``"tensor"``, ``"row"``, ``"column"``,
                ``"all"``.

        Returns:
            A 1-D buffer; with ``"all"`` it has the same number for each parameter.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones((3, 4)), "b": np.ones(2)})
        >>> flat.new_numbers().size, flat.new_numbers("row").size, flat.new_numbers("column").size
        (2, 4, 6)
        """
        return self._backend.zeros(self.split.lines[over][-1], np.dtype(np.float64))

    def number_views(self, buffer: np.ndarray, over: str = "tensor") -> list[np.ndarray]:
        """Return the parameters' parts of a buffer of numbers.

        Args:
            buffer: 1-D, of float64, as `new_numbers` returned it.
            over: as it was given to that.

        Returns:
            A list of views of the buffer, in the order of `paths`: 1-D for rows or columns, otherwise 0-D; with an axis
            for members before these in a population.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones((3, 4)), "b": np.ones(2)})
        >>> [view.shape for view in flat.number_views(flat.new_numbers("row"), "row")]
        [(1,), (3,)]
        """
        count = len(self.paths)
        of_lines = over in ("row", "column")
        if self.members is not None:  # those of a member follow each other
            buffer = buffer.reshape(self.members, -1)
        views = [buffer[..., start:stop] for start, stop in pairwise(self.split.lines[over][: count + 1])]
        return views if of_lines else [view.reshape(view.shape[:-1]) for view in views]

    def views(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Return the parameters' parts of a buffer.

        Args:
            buffer: 1-D, of `size` elements, such as `data` or what `new_buffer` returned.

        Returns:
            A list of views of the buffer in the parameters' shapes, in the order of `paths`.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2), "b": np.zeros(1)})
        >>> flat.paths, flat.views(flat.data)
        (('b', 'w'), [array([0.]), array([1., 1.])])
        """
        return self._parts_of(buffer, self.layout.offsets)

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Put leaves into the structure of the parameters.

        Args:
            leaves: any objects, one per parameter, in the order of `paths`.

        Returns:
            A tree like `params`.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"w": np.ones(2), "b": np.zeros(1)}).tree([0.0, 0.1])
        {'w': 0.1, 'b': 0.0}
        """
        return optree.tree_unflatten(self.treespec, leaves)

    def matrix(self, path: Any) -> int:
        """Find a 2-D parameter.

        Args:
            path: one of `paths`.

        Returns:
            The index of the parameter in `paths`.

        Raises:
            ValueError: `path` is not one of `paths`, or the parameter is not 2-D.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"W": np.ones((2, 3)), "b": np.ones(3)}).matrix("W")
        0
        """
        if path not in self.paths:
            raise ValueError(f"{path!r}: must be the path of a parameter; the paths are {', '.join(self.paths)}")
        k = self.paths.index(path)
        if len(self.shapes[k]) != 2:
            raise ValueError(f"parameter {path!r}: must be 2-D for row-wise steps, got shape {self.shapes[k]}")
        return k

    # --- what the kernels read ----------------------------------------------------------------------------------------

    def addresses_of(self, arrays: Sequence[Any]) -> np.ndarray:
        """The addresses of arrays, int64.

        Args:
            arrays: a list of arrays of the backend, of any shapes.

        Returns:
            A NumPy array of shape (len(arrays),).

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(3), "b": np.ones(1)})
        >>> flat.addresses_of(flat.arrays) - flat.addresses_of([flat.data])
        array([ 0, 64])
        """
        return np.array([self._backend.address(array) for array in arrays], np.int64)

    def each(self, addresses: np.ndarray) -> np.ndarray:
        """The addresses of what belongs to each parameter of each member.

        Args:
            addresses: int64, of arrays like the parameters.

        Returns:
            An array in the order of `split`; `addresses` for one network.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones((2, 3)), "b": np.ones(2)}, members=2)
        >>> flat.each(np.array([0, 1000]))
        array([   0, 1000,    8, 1024])
        """
        return addresses if self.members is None else (addresses + self._member_offsets).reshape(-1)

    @lazy
    def _member_offsets(self) -> np.ndarray:
        """For each member and parameter, how many bytes of the array come before what belongs to them."""
        strides = np.array(self.split.sizes[: len(self.paths)], np.int64) * self.dtype.itemsize
        found: np.ndarray = np.arange(self.members or 1)[:, None] * strides
        return found

    def places_of(self, params: np.ndarray, grads: np.ndarray) -> np.ndarray:
        """The table of `fastopt.kernels.contract.Place` for parameters and gradients at these addresses.

        Args:
            params, grads: int64, of shape (len(paths),), of arrays in the order of `paths`.

        Returns:
            An array of int64 with a line for each parameter, of each member.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones((2, 3)), "b": np.ones(2)}, members=2)
        >>> flat.places_of(np.array([0, 1000]), np.array([0, 0]))[:, 0]
        array([   0, 1000,    8, 1024])
        """
        return self.split.places(self.each(params), self.each(grads))

    @lazy
    def places(self) -> np.ndarray:
        """A line of `fastopt.kernels.contract.Place` per parameter, for the gradients in `grad`."""
        return self.places_of(self.addresses, self.addresses_of(self.grad_arrays))

    @lazy
    def neighbours(self) -> list[bool]:
        """For each parameter, whether it follows the one before without a gap, in `places`."""
        return self.split.neighbours(self.places, self.dtype.itemsize)

    def replace(self, params: Any, apart_from: Sequence[Any] = ()) -> bool:
        """Update other arrays from now on, of the same structure, shapes and dtype; only where they stay in place.

        Args:
            params: a tree like that given to `pack`.
            apart_from: a list of buffers of the backend, of any shape, that the arrays must not overlap.

        Returns:
            Whether the new arrays are at other addresses than the old ones.

        Raises:
            TypeError, ValueError: naming the path: an array that `pack` refuses, or another structure or shape.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.zeros(2)}, copy=False)
        >>> other = {"w": np.ones(2)}
        >>> flat.replace(other), flat.replace(other)
        (True, False)
        >>> flat.params["w"] is other["w"]
        True
        """
        leaves = self.leaves_like(params, "params")
        arrays = list(leaves)
        if self.device is None:
            addresses = np.empty(len(self.paths), np.int64)
            if self._door_of_params is None:
                self._door_of_params = Door(self.layout.shapes, self.dtype, writeable=True)
            if self._door_of_params.admit(arrays, addresses, self.paths):
                k = next(k for k, array in enumerate(arrays) if array is None)
                raise TypeError(f"parameter {self.paths[k]!r}: must be a NumPy array, got None")
        else:
            arrays = [
                _check_leaf(path, leaf, self._backend, None) for path, leaf in zip(self.paths, leaves, strict=True)
            ]
            for path, shape, array in zip(self.paths, self.shapes, arrays, strict=True):
                if (array.shape, array.dtype) != (shape, self.dtype):
                    raise ValueError(
                        f"parameter {path!r}: must have shape {shape} and dtype {self.dtype}, got {array.shape} and "
                        f"{array.dtype}"
                    )
            _check_updatable(self.paths, leaves, arrays, self._backend)
            leaves, addresses = arrays, self.addresses_of(arrays)
        if (addresses == self.addresses).all():
            return False
        sizes = np.array([array.nbytes for array in (*arrays, *apart_from)], np.int64)
        pair = overlapping(np.concatenate([addresses, self.addresses_of(apart_from)]), sizes)
        if pair is not None:
            raise _tied(pair, (*self.paths, *_own(apart_from)))
        params = handed_out(self.treespec, leaves, "opt.params")
        with deferred_signals:
            self.arrays, self.addresses, self.params = leaves, addresses, params
            for name in ("places", "neighbours", "_memory"):
                self.__dict__.pop(name, None)
        return True

    def zero_grad(self) -> None:
        """Set `grad` to zero.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2)})
        >>> flat.grads["w"] = np.ones(2)
        >>> flat.zero_grad()
        >>> flat.grads["w"]
        array([0., 0.])
        """
        for buffer in self.grad_buffers:
            buffer.fill(0)

    def check_grads(self, grads: Any) -> list[Any]:
        """Check a tree of gradients against the parameters.

        Args:
            grads: a tree like `params`, of arrays of the shapes and the dtype of the parameters, or None.

        Returns:
            A list of the leaves, an array or None for each parameter.

        Raises:
            TypeError, ValueError: another structure, type, dtype or shape; or an array that overlaps the parameters, or
                the part of the gradient buffer that belongs to another parameter. The error names the path.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2), "b": np.zeros(1)})
        >>> flat.check_grads({"w": np.array([1.0, 2.0]), "b": None})
        [None, array([1., 2.])]
        """
        leaves = self.leaves_like(grads)
        kind, device = self._backend.array_type, self.device
        given = list(leaves)  # also where an array is converted: one that lies in the parameters is a mistake
        bounds = np.zeros((len(leaves), 2), np.int64)
        leaf: Any
        for k, (path, view, leaf) in enumerate(zip(self.paths, self.grad_arrays, leaves, strict=True)):
            if leaf is None or leaf is view:
                continue
            if device is None:
                leaves[k] = usable_array(leaf, view.shape, self.dtype, f"gradient {path!r}", writeable=False)
                leaf = given[k] = leaf if isinstance(leaf, np.ndarray) else leaves[k]
            elif type(leaf) is not kind or leaf.dtype != self.dtype or leaf.shape != view.shape:
                leaf = leaves[k] = given[k] = self._check_like(f"gradient {path!r}", leaf, view)
            if device is not None:
                check_device(f"gradient {path!r}", leaf, self._backend, device, "as its parameter")
            bounds[k] = bounds_of(leaf, self._backend.address(leaf))
        params, sums = self._memory
        lows, highs = bounds.T
        for k in np.flatnonzero(params.overlaps(lows, highs) | sums.overlaps(lows, highs)).tolist():
            path, leaf = self.paths[k], given[k]
            runs = runs_of(leaf if device is None else described(leaf, self._backend.address(leaf)))
            if sums.overlaps(*runs).any() and not self._same_memory(leaf, self.grad_arrays[k]):
                raise ValueError(
                    f"gradient {path!r}: must not overlap the gradient buffer in another place than its own; pass a "
                    f"copy, or write into opt.grads and call step() without gradients"
                )
            if params.overlaps(*runs).any():
                raise ValueError(f"gradient {path!r}: must not overlap the parameters in memory; pass a copy")
        return leaves

    def check_values(self, params: Any) -> list[Any]:
        """Check a tree of values that are to be written into the parameters.

        Args:
            params: a tree like `params`, of arrays of the same shapes and of a floating dtype.

        Returns:
            A list of arrays of the backend, which share no memory with the parameters.

        Raises:
            TypeError, ValueError: another structure, type or shape. The error names the path.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"w": np.ones(2)}).check_values({"w": np.zeros(2, np.float32)})
        [array([0., 0.], dtype=float32)]
        """
        found = []
        for path, own, leaf in zip(self.paths, self.arrays, self.leaves_like(params, "params"), strict=True):
            array = _check_leaf(path, leaf, self._backend, self.dtype)
            if array.shape != own.shape:
                raise ValueError(f"parameter {path!r}: must have shape {own.shape}, got {array.shape}")
            found.append(
                array.copy()
                if any(self._backend.overlap(array, each) for each in self._buffers or self.arrays)
                else array
            )
        return found

    @lazy
    def _memory(self) -> tuple[Protected, Protected]:
        """The memory of the parameters, and of the buffers of gradients."""

        def protected(arrays: Sequence[Any], whose: str) -> Protected:
            sizes = np.array([array.nbytes for array in arrays], np.int64)
            return Protected(*intervals(self.addresses_of(arrays), sizes), None, whose)

        return protected(self._buffers or self.arrays, "the parameters"), protected(self.grad_buffers, "opt.grads")

    def copy_grads(self, leaves: Sequence[Any]) -> None:
        """Copy gradients into `grad`.

        Args:
            leaves: the list that `check_grads` returned. The gradient of a None does not change.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2), "b": np.zeros(1)})
        >>> flat.copy_grads(flat.check_grads({"w": np.array([1.0, 2.0]), "b": None}))
        >>> flat.grads["w"]
        array([1., 2.])
        """
        for view, leaf in zip(self.grad_arrays, leaves, strict=True):
            if leaf is not None and leaf is not view:
                view[...] = leaf

    def _same_memory(self, a: Any, b: Any) -> bool:
        return self._backend.address(a) == self._backend.address(b) and bool(a.strides == b.strides)

    def check_extra(self, tree: Any, what: str) -> list[Any]:
        """Check a tree of values that are to be copied: arrays like the parameters, or None.

        Args:
            tree: as for `check_grads`; its arrays may overlap any others.
            what: the name of the tree in errors.

        Returns:
            A list of the leaves, an array of the backend or None for each parameter.

        Raises:
            TypeError, ValueError: another structure, type, dtype, shape or device, by the path.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"w": np.ones(2)}).check_extra({"w": np.array([1.0, 2.0])}, "extra['hessian']")
        [array([1., 2.])]
        """
        leaves = self.leaves_like(tree, what)
        for k, (path, view, leaf) in enumerate(zip(self.paths, self.arrays, leaves, strict=True)):
            name = f"{what}: {path!r}"
            if leaf is not None and self.device is None:
                leaves[k] = usable_array(leaf, view.shape, self.dtype, name, writeable=False)
            elif leaf is not None:
                leaves[k] = self._check_like(name, leaf, view)
                check_device(name, leaves[k], self._backend, self.device, "as its parameter")
        return leaves

    def _check_like(self, what: str, leaf: Any, view: Any) -> Any:
        """Return a leaf as an array of the backend; raise an error if it does not match the parameter."""
        array: Any = leaf if isinstance(leaf, self._backend.array_type) else None
        if view.shape == () and (array is None or array.dtype != self.dtype):
            number = number_array(leaf, self.dtype, what)
            if number is not None:
                return self._backend.adopt(number)
        if array is None and not isinstance(leaf, np.ndarray):
            array = _adopted(what, leaf, self._backend)  # an array of another library on the same backend
        if array is None:
            raise TypeError(
                f"{what}: must be {named(self._backend.array_type)} or None, got {named(type(leaf))}{_hint(leaf)}"
            )
        if array.dtype != view.dtype:
            raise TypeError(
                f"{what}: must have dtype {view.dtype} as its parameter, got "
                f"{scalars.dtype_name(array.dtype)}; use grad.astype({view.dtype.name!r})"
            )
        if array.shape != view.shape:
            raise ValueError(f"{what}: must have shape {view.shape} as its parameter, got {array.shape}")
        return array

    def leaves_like(self, tree: Any, what: str = "grads") -> list[Any]:
        """The leaves of a tree like `params`.

        Args:
            tree: of the structure of the parameters; None in the place of a parameter is a leaf.
            what: the name of the tree in the error.

        Returns:
            A list of the leaves as they are, in the order of `paths`.

        Raises:
            ValueError: the tree has another structure.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"w": np.ones(3), "b": np.ones(1)}).leaves_like({"b": None, "w": "anything"})
        [None, 'anything']
        """
        if "grads" in self.__dict__ and tree is self.grads:
            return list(self.grad_arrays)
        try:
            return leaves_like(self.treespec, tree)
        except (ValueError, TypeError) as error:
            found = difference(self.treespec, tree, what)
            if not found:  # of a registered class: optree's words, without the arrays themselves
                found = re.sub(r"; \w+: .*", "", str(error), flags=re.DOTALL)[:500]
            raise ValueError(f"{what}: must have the structure of the parameters, got {found}") from None


def _is_given(array: Any) -> bool:
    return array is not None


def _unpickled(
    params: Any, grads: list[Any] | None, backend: str, in_place: bool, members: int | None = None
) -> FlatParams:
    """Return pickled parameters in the arrays that were unpickled, or in copies where these cannot be written."""
    leaves, treespec, paths = flatten(params)
    leaves = [_updatable(leaf) for leaf in leaves]
    flat = FlatParams(leaves, paths, treespec, leaves[0].dtype, backend, copy=False, members=members)
    flat.in_place = in_place
    if grads is not None:
        flat._grad_arrays = [_updatable(array) for array in grads]
        flat.grad_buffers = list(flat._grad_arrays)
    return flat


def _updatable(array: Any) -> Any:
    """Return an array, or a copy of one that cannot be updated where it is: a read-only memory map, as of joblib."""
    if not isinstance(array, np.ndarray):
        return array
    usable = type(array) is np.ndarray and array.flags.c_contiguous and array.flags.aligned and array.flags.writeable
    return array if usable else np.array(array, order="C")


def _merged(tree: Any, more: Any) -> Any:
    """Return two dicts, or two lists, as one."""
    if isinstance(tree, dict) and isinstance(more, dict):
        for key in more:
            if key in tree:
                raise ValueError(f"params[{key!r}]: must be a new key, got one that exists already")
        return {**tree, **more}
    if isinstance(tree, list) and isinstance(more, list):
        return [*tree, *more]
    raise TypeError(
        f"params: must be a dict to add to a dict, or a list to add to a list, got {type(more).__name__} for "
        f"{type(tree).__name__}"
    )


def _adopted(name: str, array: Any, backend: Backend) -> Any:
    """Return `array` as an array of the backend, or None; errors begin with `name`."""
    try:
        return backend.adopt(array)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _hint(array: Any) -> str:
    return "; it requires grad: pass tensor.detach()" if getattr(array, "requires_grad", False) else ""


def named(kind: type) -> str:
    """Return the name of a type of array, for errors."""
    return "a NumPy array" if kind is np.ndarray else f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def pack(
    params: Any, *, backend: str = "auto", dtype: Any = None, copy: bool = True, members: int | None = None
) -> FlatParams:
    """Copy a tree of arrays into one flat buffer; or, with ``copy=False``, use its arrays in place.

    Args:
        params: any tree (dict, list, tuple, NamedTuple, dataclass, any type known to optree) whose leaves are NumPy
            arrays of one dtype: float32, float64, float16, or bfloat16 of the package ml_dtypes. Arrays may be empty or
            0-d. No two may share memory.
        backend: ``"cpu"``, ``"cuda"``, or ``"auto"``, the backend of the arrays.
        dtype: what to convert to, as a dtype or by its name; None keeps the arrays' dtype. With ``"bfloat16"``, arrays
            of uint16 are taken for the bits of such numbers.
        copy: False keeps the parameters in the given arrays, which are then updated in place. They must be
            C-contiguous, aligned and writeable.
        members: of a population, the number of networks, from 1: the length of the first axis of every array.

    Returns:
        `FlatParams`.

    Raises:
        TypeError, ValueError: a leaf that is not an array, another dtype (integer, complex, object, mixed), a tree
            without arrays, two parameters of one path, two that share memory (tied weights, views of one array); with
            ``copy=False``, an array that cannot be updated in place; with `members`, one of another length. The error
            names the path of the parameter.
        RuntimeError: the backend cannot work here.

    >>> import numpy as np, fastopt
    >>> flat = fastopt.pack({"W": np.ones((2, 3)), "bn": {"gamma": np.ones(3)}})
    >>> flat.paths, flat.offsets, flat.size
    (('W', 'bn.gamma'), (0, 8), 16)
    >>> flat.params["W"][0, 0] = 5.0
    >>> float(flat.data[0])
    5.0
    """
    return packed(params, backend=backend, dtype=dtype, copy=copy, members=members)


def packed(
    params: Any,
    *,
    backend: str = "auto",
    dtype: Any = None,
    copy: bool = True,
    members: int | None = None,
    part: int = 0,
    parts: int = 1,
    uncut: Callable[[Sequence[str], Sequence[tuple[int, ...]]], Sequence[bool]] | None = None,
) -> FlatParams:
    """As `pack`.

    part, parts : which part of the buffer this process updates, of how many equal ones. uncut : called with the paths
    and shapes; returns for each parameter whether it must lie in one part.
    """
    leaves, treespec, paths = flatten(params)
    if not leaves:
        raise ValueError("params: must hold at least one array, got a tree without any")
    doubled = sorted({path for path, following in pairwise(sorted(paths)) if path == following})
    if doubled:
        raise ValueError(f"parameter {doubled[0]!r}: must have a path of its own, got two of this path; rename one key")
    first_use: dict[int, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if first_use.setdefault(id(leaf), path) != path:
            raise ValueError(
                f"parameters {first_use[id(leaf)]!r} and {path!r}: must be two arrays, got one and the same (tied); "
                f"keep it in the tree once, or pass a copy"
            )
    wanted = None if dtype is None else _wanted(dtype)
    if backend == "auto":
        backend = "cuda" if "cuda" in map(backend_of, leaves) else "cpu"
    memory = get_backend(backend)
    arrays = [_check_leaf(path, leaf, memory, wanted) for path, leaf in zip(paths, leaves, strict=True)]
    _refuse_sharing(leaves, memory, paths)
    found = arrays[0].dtype if wanted is None else wanted
    for path, leaf in zip(paths, arrays, strict=True):
        if leaf.dtype != found and (wanted is None or not copy):
            raise TypeError(
                f"parameter {path!r}: must have dtype {found} as {paths[0]!r}, got {leaf.dtype}; convert it, or pass "
                f"dtype= to convert all"
                if copy
                else f"parameter {path!r}: must have dtype {found}, got {leaf.dtype}; with copy=False nothing is "
                f"converted"
            )
    if not copy:
        _check_updatable(paths, leaves, arrays, memory)
    members = check_members(members)
    if members is not None:
        for path, leaf in zip(paths, arrays, strict=True):
            if leaf.shape[:1] != (members,):
                raise ValueError(
                    f"parameter {path!r}: must have a first axis of length members={members}, got shape {leaf.shape}; "
                    f"stack the networks with np.stack"
                )
    whole = () if uncut is None or parts == 1 else uncut(paths, [leaf.shape for leaf in arrays])
    return FlatParams(
        *(arrays, paths, treespec, np.dtype(found), backend),
        copy=copy,
        members=members,
        part=part,
        parts=parts,
        uncut=whole,
    )


def _wanted(dtype: Any) -> np.dtype[Any]:
    """The dtype that parameters are to have."""
    if isinstance(dtype, str) and dtype in FORMATS:
        return dtype_of(dtype, "dtype")
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if format_of(found) is None:
        raise TypeError(f"dtype: must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {dtype!r}")
    return found


def check_members(members: Any) -> int | None:
    """Return the number of networks of a population, or None; refuse others."""
    if members is None:
        return None
    return scalars.count("members", members, 1, "the number of networks, an int from 1, or None")


def _check_updatable(paths: Sequence[str], given: Sequence[Any], arrays: Sequence[Any], memory: Backend) -> None:
    """Refuse arrays that cannot be updated where they are. arrays : what was given, as arrays of the backend."""
    for path, leaf, array in zip(paths, given, arrays, strict=True):
        if memory.name == "cpu":
            usable_array(array, array.shape, array.dtype, f"parameter {path!r}", writeable=True)
        elif backend_of(leaf) != memory.name:
            raise TypeError(
                f"parameter {path!r}: must be an array of the device to be updated in place, got {named(type(leaf))}"
            )
        elif not array.flags.c_contiguous:
            raise ValueError(f"parameter {path!r}: must be C-contiguous, got strides {array.strides}")


def _refuse_sharing(arrays: Sequence[Any], memory: Backend, paths: Sequence[str]) -> None:
    """Refuse parameters of any strides that share memory."""
    hosted: list[np.ndarray] = []
    for array in arrays:
        if backend_of(array) != "cpu":
            own: Any = memory.adopt(array)
            array = described(own, memory.address(own))
        hosted.append(array)
    pair = sharing(hosted)
    if pair is not None:
        raise _tied(pair, paths)


def _tied(pair: tuple[int, int], paths: Sequence[str]) -> ValueError:
    return ValueError(
        f"parameters {paths[pair[0]]!r} and {paths[pair[1]]!r}: must not overlap in memory (tied weights, or views of "
        f"one array); keep one of them in the tree, or pass a copy of the other"
    )


def _own(buffers: Sequence[Any]) -> list[str]:
    return [f"the optimizer's own buffer {k}" for k in range(len(buffers))]


def _check_leaf(path: str, given: Any, memory: Backend, wanted: np.dtype[Any] | None) -> Any:
    scalars.refuse_masked(f"parameter {path!r}", given)
    leaf = _adopted(f"parameter {path!r}", given, memory)
    if leaf is None:
        if backend_of(given) == "cuda":
            hint = "; backend='cuda' takes arrays of a GPU" if memory.name == "cpu" else ""
            hint += _hint(given)
        else:
            hint = remedy(given, "param") or "; use np.asarray(param)"
        raise TypeError(f"parameter {path!r}: must be a NumPy array, got {type(given).__name__}{hint}")
    check_device(f"parameter {path!r}", leaf, memory, memory.device, "the current one")
    found = scalars.dtype_name(leaf.dtype)
    if wanted is not None and found == "uint16" and scalars.dtype_name(wanted) == BFLOAT16:
        return leaf.view(wanted)
    floating = leaf.dtype.kind == "f" or found == BFLOAT16
    if format_of(leaf.dtype) is not None or (wanted is not None and floating and leaf.dtype.isnative):
        return leaf
    hint = "param.astype('float32')"
    if found == "uint16":
        hint = f"{hint}, or fastopt.pack(params, dtype='bfloat16') where it holds the bits of such numbers"
    raise TypeError(
        f"parameter {path!r}: must have dtype float32, float64, float16 or bfloat16 in native byte order, got {found}; "
        f"use {hint}"
    )


def check_vectors(given: Mapping[str, Any], *, read_only: str) -> tuple[Backend, list[Any]]:
    """Return the backend of bare arrays, and the arrays as its own; raise an error for arrays that a kernel cannot use.

    All arrays must be NumPy arrays or on the current device, 1-D, contiguous, aligned, of one length and one dtype:
    native float32 or float64. See `check_apart` for overlaps. All but the one called `read_only` must be writeable.
    """
    names = list(given)
    places = {name: backend_of(array) for name, array in given.items()}
    place = "cuda" if "cuda" in places.values() else "cpu"
    backend = get_backend(place)
    arrays: dict[str, Any] = {}
    for name, array in given.items():
        scalars.refuse_masked(name, array)
        if places[name] != place and isinstance(array, np.ndarray):
            other = next(other for other in names if places[other] == place)
            raise TypeError(
                f"{name}: must be on a device, as {other} ({named(type(given[other]))}) is, got a NumPy array; pass "
                f"all arrays on the CPU, or all on one device"
            )
        own = array if isinstance(array, np.ndarray) else _adopted(name, array, backend)
        if own is None or places[name] != place:
            expected = "NumPy array" if place == "cpu" else "array of the device"
            raise TypeError(f"{name}: must be a 1-D {expected}, got {type(array).__name__}{_hint(array)}")
        arrays[name] = own
    first = arrays[names[0]]
    for name, array in arrays.items():
        if array.dtype not in DTYPES:
            raise TypeError(
                f"{name}: must have dtype float32 or float64 in native byte order, got "
                f"{scalars.dtype_name(array.dtype)}; use {name}.astype('float32')"
            )
        if array.ndim != 1:
            raise ValueError(f"{name}: must be 1-D, got shape {array.shape}; pass a view by reshape(-1)")
        if array.dtype != first.dtype:
            raise TypeError(f"{name}: must have dtype {first.dtype} as {names[0]}, got {array.dtype}")
        if array.size != first.size:
            raise ValueError(f"{name}: must have {first.size} elements as {names[0]}, got {array.size}")
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: must be contiguous, got strides {array.strides}; pass a contiguous array")
        if backend.address(array) % array.itemsize:
            raise ValueError(
                f"{name}: must be aligned to {array.itemsize} bytes, got address {backend.address(array):#x}"
            )
        if name != read_only and not _writeable(given[name]):
            raise ValueError(f"{name}: must be writeable, to be updated in place, got a read-only array")
        check_device(name, array, backend, backend.device, "the current one")
    return backend, list(arrays.values())


def check_apart(arrays: Mapping[str, Any], backend: Backend) -> None:
    """Refuse contiguous arrays of the backend that share memory, by their names."""
    names = list(arrays)
    addresses = np.array([backend.address(array) for array in arrays.values()], np.int64)
    pair = overlapping(addresses, np.array([array.nbytes for array in arrays.values()], np.int64))
    if pair is not None:
        raise ValueError(
            f"{names[pair[0]]} and {names[pair[1]]}: must not overlap in memory; pass arrays that share none"
        )


def _writeable(array: Any) -> bool:
    flags = getattr(array, "flags", None)  # CuPy's arrays have no such flag: all are writeable
    if hasattr(flags, "c_contiguous"):
        return bool(getattr(flags, "writeable", True))
    return not array.__cuda_array_interface__["data"][1]
