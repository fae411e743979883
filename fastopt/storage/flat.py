"""`pack` lays a tree of arrays out in one aligned buffer: offsets, views, chunks, and the checks at the door."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import optree

from fastopt.kernels import get_backend, place_of
from fastopt.kernels.contract import ALIGNMENT, BLOCK, Backend

NAMESPACE = "fastopt"
"""The optree namespace in which fastopt registers plain dataclasses; optree's global registrations are seen too."""

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

MIN_CHUNK = 1024
MAX_CHUNK = 32_768
CHUNKS = 64
"""A buffer is cut into about CHUNKS pieces of MIN_CHUNK to MAX_CHUNK elements: enough of them to share out evenly among
threads, each long enough to hide the cost of starting a loop (10-20 ns)."""


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat buffer. Pure arithmetic on Python ints: it allocates nothing."""

    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], itemsize: int = 4) -> Layout:
        """Lay out parameters of these shapes, each on a 64-byte boundary; the gaps between them are padding."""
        step = ALIGNMENT // itemsize
        sizes = tuple(math.prod(shape) for shape in shapes)
        offsets = []
        end = 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // step) * step
        return cls(tuple(tuple(shape) for shape in shapes), sizes, tuple(offsets), end)

    def chunks(self, rows: Sequence[int], *, layerwise: bool = False, longest: int | None = None) -> np.ndarray:
        """The work of one launch: an int64 array with a line (start, stop, row, param, block) per chunk.

        Args:
            rows: for each parameter the row of its hyperparameters in the table, or -1 to leave it out.
            layerwise: chunks then end with their parameter, are whole numbers of `BLOCK`, and `block` numbers their
                first partial sum. Otherwise neighbours of one row are joined where no padding lies between them.
            longest: the length of the longest chunk; chosen from the size where it is None.

        No chunk covers padding, so padding stays zero whatever the rule.
        """
        if longest is None:
            longest = min(max(self.size // CHUNKS, MIN_CHUNK), MAX_CHUNK)
        unit = BLOCK if layerwise else ALIGNMENT // 4
        longest = max(unit, longest // unit * unit)
        lines: list[tuple[int, int, int, int, int]] = []
        block = 0
        for start, stop, row, param in self._runs(rows, join=not layerwise):
            pieces = -(-(stop - start) // longest)
            piece = -(-(stop - start) // (pieces * unit)) * unit
            for first in range(start, stop, piece):
                last = min(first + piece, stop)
                lines.append((first, last, row, param, block))
                block += -(-(last - first) // BLOCK)
        return np.array(lines, np.int64).reshape(-1, 5)

    def _runs(self, rows: Sequence[int], join: bool) -> list[tuple[int, int, int, int]]:
        runs: list[tuple[int, int, int, int]] = []
        for param, (offset, size, row) in enumerate(zip(self.offsets, self.sizes, rows, strict=True)):
            if size == 0 or row < 0:
                continue
            if join and runs and runs[-1][1] == offset and runs[-1][2] == row:
                runs[-1] = (runs[-1][0], offset + size, row, runs[-1][3])
            else:
                runs.append((offset, offset + size, row, param))
        return runs


class FlatParams:
    """A tree of parameters, and one of their gradients, whose leaves are views of two flat buffers. Made by `pack`.

    Attributes:
        params, grads: trees of the structure given to `pack`; writing to a leaf writes to the buffer.
        data, grad: the 1-D buffers. Every parameter starts on a 64-byte boundary; the padding between is zero.
        paths: the parameters' names, such as ``"bn.gamma"``, in buffer order.
        shapes, offsets: of each parameter, in elements.
        size: elements of the buffer, padding included.
        dtype, backend: float32 or float64; ``"cpu"``.
    """

    def __init__(
        self, leaves: Sequence[np.ndarray], paths: Sequence[str], treespec: Any, dtype: np.dtype[Any], backend: str
    ):
        self._backend = get_backend(backend)
        self.layout = Layout.of([leaf.shape for leaf in leaves], dtype.itemsize)
        self.paths = tuple(paths)
        self.dtype = dtype
        self.backend = backend
        self.treespec = treespec
        self.data = self.new_buffer()
        self.grad = self.new_buffer()
        self._device = self._backend.device_of(self.data)
        views = self.views(self.data)
        for view, leaf in zip(views, leaves, strict=True):
            self._backend.copy(view, leaf)
        self.params = self.tree(views)
        self._grad_views = self.views(self.grad)
        self.grads = self.tree(self._grad_views)

    # What these are the class tells, under Attributes.
    shapes = property(lambda self: self.layout.shapes)
    offsets = property(lambda self: self.layout.offsets)
    size = property(lambda self: self.layout.size)

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatParams:
        """A copy with buffers of its own, whose leaves are views of them."""
        twin = FlatParams(self.views(self.data), self.paths, self.treespec, self.dtype, self.backend)
        memo[id(self)] = twin
        twin.grad[...] = self.grad
        return twin

    def __repr__(self) -> str:
        count = sum(self.layout.sizes)
        return f"<FlatParams: {len(self.paths)} parameters, {count:,} elements of {self.dtype}, on {self.backend}>"

    def new_buffer(self) -> np.ndarray:
        """Another buffer of zeros with this layout, for a state.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"w": np.ones(3)}).new_buffer()
        array([0., 0., 0., 0., 0., 0., 0., 0.])
        """
        return self._backend.zeros(self.layout.size, self.dtype)

    def new_numbers(self) -> np.ndarray:
        """A buffer of one zero for each parameter, in float64: a sum of squares leaves the range of float32.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"w": np.ones(3), "b": np.ones(1)}).new_numbers()
        array([0., 0.])
        """
        return self._backend.zeros(len(self.paths), np.dtype(np.float64))

    def views(self, buffer: np.ndarray) -> list[np.ndarray]:
        """The parameters' parts of a buffer.

        Args:
            buffer: 1-D, of `size` elements, such as `data` or what `new_buffer` returned.

        Returns:
            A list of views of it in the parameters' shapes, in the order of `paths`.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2), "b": np.zeros(1)})
        >>> flat.paths, flat.views(flat.data)
        (('b', 'w'), [array([0.]), array([1., 1.])])
        """
        layout = self.layout
        return [
            buffer[offset : offset + size].reshape(shape)
            for offset, size, shape in zip(layout.offsets, layout.sizes, layout.shapes, strict=True)
        ]

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Put leaves into the structure of the parameters.

        Args:
            leaves: anything, one for each parameter, in the order of `paths`.

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
            Its number, an int from 0.

        Raises:
            ValueError: there is no such path, or the parameter is not 2-D.

        >>> import numpy as np, fastopt
        >>> fastopt.pack({"W": np.ones((2, 3)), "b": np.ones(3)}).matrix("W")
        0
        """
        if path not in self.paths:
            raise ValueError(f"{path!r} is no parameter; the paths are {', '.join(self.paths)}")
        k = self.paths.index(path)
        if len(self.shapes[k]) != 2:
            raise ValueError(f"parameter {path!r}: expected 2-D for row-wise steps, found shape {self.shapes[k]}")
        return k

    def check_grads(self, grads: Any) -> list[Any]:
        """Hold a tree of gradients against the parameters.

        Args:
            grads: a tree like `params`, of arrays of the shapes and the dtype of the parameters, or None.

        Returns:
            A list of its leaves, an array or None for each parameter.

        Raises:
            TypeError, ValueError: naming the path: another structure, type, dtype or shape, an array that overlaps the
                buffers.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2), "b": np.zeros(1)})
        >>> flat.check_grads({"w": np.array([1.0, 2.0]), "b": None})
        [None, array([1., 2.])]
        """
        leaves = self._leaves_like(grads)
        kind, overlap, device = self._backend.array_type, self._backend.overlap, self._device
        leaf: Any
        for k, (path, view, leaf) in enumerate(zip(self.paths, self._grad_views, leaves, strict=True)):
            if leaf is None or leaf is view:
                continue
            if type(leaf) is not kind or leaf.dtype != self.dtype or leaf.shape != view.shape:
                leaf = leaves[k] = self._check_gradient(path, leaf, view)
            if device is not None:
                _check_device(f"gradient {path!r}", leaf, self._backend, device, "its parameter on device")
            if overlap(leaf, self.grad) and not self._same_memory(leaf, view):
                raise ValueError(
                    f"gradient {path!r} overlaps the gradient buffer in another place than its own: pass a copy, "
                    f"or write into opt.grads and call step() without gradients"
                )
            if overlap(leaf, self.data):
                raise ValueError(f"gradient {path!r} overlaps the parameters: pass a copy")
        return leaves

    def copy_grads(self, leaves: Sequence[Any]) -> None:
        """Copy gradients into `grad`.

        Args:
            leaves: what `check_grads` returned; the place of a None is left as it is.

        >>> import numpy as np, fastopt
        >>> flat = fastopt.pack({"w": np.ones(2), "b": np.zeros(1)})
        >>> flat.copy_grads(flat.check_grads({"w": np.array([1.0, 2.0]), "b": None}))
        >>> flat.grads["w"]
        array([1., 2.])
        """
        for view, leaf in zip(self._grad_views, leaves, strict=True):
            if leaf is not None and leaf is not view:
                view[...] = leaf

    def _same_memory(self, a: Any, b: Any) -> bool:
        return self._backend.address(a) == self._backend.address(b) and bool(a.strides == b.strides)

    def _check_gradient(self, path: str, leaf: Any, view: Any) -> Any:
        """A gradient as an array of the backend; an error where it is none, or not like the parameter."""
        array: Any = leaf if isinstance(leaf, self._backend.array_type) else None
        if array is None and not isinstance(leaf, np.ndarray):
            array = _adopted(f"gradient {path!r}", leaf, self._backend)  # another library's, that lies where it should
        if array is None:
            raise TypeError(
                f"gradient {path!r}: expected {named(self._backend.array_type)} or None, found {named(type(leaf))}"
                f"{_hint(leaf)}"
            )
        if array.dtype != view.dtype:
            raise TypeError(
                f"gradient {path!r}: expected dtype {view.dtype.str!r} as the parameter's, found {array.dtype.str!r}; "
                f"use grad.astype({view.dtype.name!r})"
            )
        if array.shape != view.shape:
            raise ValueError(f"gradient {path!r}: expected shape {view.shape} as the parameter's, found {array.shape}")
        return array

    def _leaves_like(self, tree: Any) -> list[Any]:
        try:
            leaves: list[Any] = self.treespec.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise ValueError(f"grads: not the structure of the parameters ({', '.join(self.paths)}): {error}") from None
        return leaves


def _adopted(name: str, array: Any, backend: Backend) -> Any:
    """`array` as one of the backend, None where it is none; an error that begins with `name`."""
    try:
        return backend.adopt(array)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _hint(array: Any) -> str:
    return "; it requires grad: pass tensor.detach()" if getattr(array, "requires_grad", False) else ""


def _check_device(name: str, array: Any, backend: Backend, expected: int | None, whose: str) -> None:
    found = backend.device_of(array)
    if found != expected:
        raise ValueError(
            f"{name}: is on device {found}, and {whose} {expected}; bring all arrays to one device, and make it the "
            f"current one by `with cupy.cuda.Device({found}):`"
        )


def named(kind: type) -> str:
    """A kind of array, as errors call it."""
    return "a NumPy array" if kind is np.ndarray else f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def pack(params: Any, *, backend: str = "auto", dtype: Any = None) -> FlatParams:
    """Copy a tree of arrays into one flat buffer and return it with trees of views on it.

    Args:
        params: any tree (dict, list, tuple, NamedTuple, dataclass, whatever optree knows) whose leaves are NumPy arrays
            of one dtype, float32 or float64. Empty and 0-d arrays are welcome.
        backend: ``"cpu"``, ``"cuda"``, or ``"auto"``: the one that the arrays live on.
        dtype: float32 or float64 to convert to; None keeps the arrays' own.

    Returns:
        `FlatParams`.

    Raises:
        TypeError, ValueError: naming the parameter's path: a leaf that is no array, another dtype (integer, complex,
            object, mixed), a tree without arrays, two parameters of one path.
        RuntimeError: the backend cannot work here.

    >>> import numpy as np, fastopt
    >>> flat = fastopt.pack({"W": np.ones((2, 3)), "bn": {"gamma": np.ones(3)}})
    >>> flat.paths, flat.offsets, flat.size
    (('W', 'bn.gamma'), (0, 8), 16)
    >>> flat.params["W"][0, 0] = 5.0
    >>> float(flat.data[0])
    5.0
    """
    leaves, treespec = _flatten(params)
    paths = [_path(accessor) for accessor in treespec.accessors()]
    if not leaves:
        raise ValueError("params: the tree holds no arrays; expected at least one parameter")
    doubled = sorted({path for path, following in pairwise(sorted(paths)) if path == following})
    if doubled:
        raise ValueError(f"parameter {doubled[0]!r}: two parameters have this path; rename one of their keys")
    first_use: dict[int, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if first_use.setdefault(id(leaf), path) != path:
            raise ValueError(
                f"parameters {first_use[id(leaf)]!r} and {path!r} are one and the same array, and would no longer be "
                f"after packing: keep it in the tree once, or pass a copy"
            )
    try:
        wanted = None if dtype is None else np.dtype(dtype)
    except TypeError:
        wanted = np.dtype(object)
    if wanted is not None and wanted not in DTYPES:
        raise TypeError(f"dtype={dtype!r}: expected float32 or float64")
    if backend == "auto":
        backend = "cuda" if "cuda" in map(place_of, leaves) else "cpu"
    memory = get_backend(backend)
    leaves = [_check_leaf(path, leaf, memory, wanted) for path, leaf in zip(paths, leaves, strict=True)]
    found = wanted or leaves[0].dtype
    for path, leaf in zip(paths, leaves, strict=True):
        if wanted is None and leaf.dtype != found:
            raise TypeError(
                f"parameter {path!r} is {leaf.dtype} but {paths[0]!r} is {found}: all parameters need one dtype; "
                f"convert them, or pass dtype= to convert all"
            )
    return FlatParams(leaves, paths, treespec, np.dtype(found), backend)


def _check_leaf(path: str, given: Any, memory: Backend, wanted: np.dtype[Any] | None) -> Any:
    leaf = _adopted(f"parameter {path!r}", given, memory)
    if leaf is None:
        of_device = place_of(given) == "cuda"
        hint = "; backend='cuda' takes arrays of a GPU" if of_device and memory.name == "cpu" else ""
        raise TypeError(
            f"parameter {path!r}: expected a NumPy array, found {type(given).__name__}; use np.asarray(...), "
            f"or for a torch tensor on the CPU tensor.numpy(){hint}{_hint(given) if of_device else ''}"
        )
    _check_device(f"parameter {path!r}", leaf, memory, memory.device, "the current device is")
    if leaf.dtype in DTYPES or (wanted is not None and leaf.dtype.kind == "f" and leaf.dtype.isnative):
        return leaf
    raise TypeError(
        f"parameter {path!r}: expected float32 or float64 in native byte order, found dtype {leaf.dtype.str!r}; "
        f"convert it with astype"
    )


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    """Flatten with optree; a plain dataclass, which optree takes for a leaf, is registered and opened."""
    while True:
        leaves, treespec = optree.tree_flatten(tree, namespace=NAMESPACE)
        closed = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
        if not closed:
            return leaves, treespec
        for kind in closed:
            _register_dataclass(kind)


def _register_dataclass(kind: type) -> None:
    names = tuple(field.name for field in dataclasses.fields(kind) if field.init)

    def flatten(instance: Any) -> tuple[tuple[Any, ...], None, tuple[str, ...]]:
        return tuple(getattr(instance, name) for name in names), None, names

    def unflatten(_: Any, children: Any) -> Any:
        return kind(**dict(zip(names, children, strict=True)))

    optree.register_pytree_node(kind, flatten, unflatten, path_entry_type=optree.GetAttrEntry, namespace=NAMESPACE)


def _path(accessor: Any) -> str:
    """ "bn.gamma" of an optree accessor; "params" for a tree that is one bare array."""
    names = [str(getattr(entry, "field", entry.entry)) for entry in accessor]
    return ".".join(names) or "params"


def match_overrides(paths: Sequence[str], overrides: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each path the hyperparameters that `overrides` sets; of two globs that match, the later one wins.

    Raises ValueError for a glob that matches no path, TypeError where `overrides` is not a mapping of mappings.
    """
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides: expected a dict of glob -> hyperparameters, found {type(overrides).__name__}")
    found: list[dict[str, Any]] = [{} for _ in paths]
    for glob, values in overrides.items():
        if not isinstance(glob, str) or not isinstance(values, Mapping):
            raise TypeError(f"overrides[{glob!r}]: expected a dict of hyperparameters under a glob on parameter paths")
        matches = [k for k, path in enumerate(paths) if fnmatch.fnmatchcase(path, glob)]
        if not matches:
            raise ValueError(f"overrides[{glob!r}] matches no parameter; the paths are {', '.join(paths)}")
        for k in matches:
            found[k].update(values)
    return found


def check_vectors(given: Mapping[str, Any], *, read_only: str) -> tuple[Backend, list[Any]]:
    """The backend of bare arrays, and the arrays as its own; an error where a kernel would compute garbage on them.

    All must be of one place (NumPy's, or of the current device), 1-D, contiguous, aligned, native float32 or float64 of
    one dtype and length, and none may overlap another; all but the one called `read_only` must be writeable.
    """
    names = list(given)
    places = {name: place_of(array) for name, array in given.items()}
    place = "cuda" if "cuda" in places.values() else "cpu"
    backend = get_backend(place)
    arrays: dict[str, Any] = {}
    for name, array in given.items():
        if places[name] != place and isinstance(array, np.ndarray):
            other = next(other for other in names if places[other] == place)
            raise TypeError(
                f"{name} is a NumPy array, and {other}, {named(type(given[other]))}, is on a device: pass all arrays "
                f"on the CPU, or all on one device"
            )
        own = array if isinstance(array, np.ndarray) else _adopted(name, array, backend)
        if own is None or places[name] != place:
            expected = "NumPy array" if place == "cpu" else "array of the device"
            raise TypeError(f"{name}: expected a 1-D {expected}, found {type(array).__name__}{_hint(array)}")
        arrays[name] = own
    first = arrays[names[0]]
    for name, array in arrays.items():
        if array.dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected float32 or float64 in native byte order, found dtype {array.dtype.str!r}; "
                f"convert it with astype"
            )
        if array.ndim != 1:
            raise ValueError(f"{name}: expected a 1-D array, found shape {array.shape}; pass a view by reshape(-1)")
        if array.dtype != first.dtype:
            raise TypeError(f"{name}: expected dtype {first.dtype} as that of {names[0]}, found {array.dtype}")
        if array.size != first.size:
            raise ValueError(f"{name}: expected {first.size} elements as in {names[0]}, found {array.size}")
        if not array.flags.c_contiguous:
            raise ValueError(
                f"{name}: expected a contiguous array, found strides {array.strides}; pass a contiguous one"
            )
        if backend.address(array) % array.itemsize:
            raise ValueError(f"{name}: expected an aligned array; its address is no multiple of {array.itemsize} bytes")
        if name != read_only and not _writeable(given[name]):
            raise ValueError(f"{name}: is read-only, and would be written in place; pass a writeable array")
        _check_device(name, array, backend, backend.device, "the current device is")
    if first.size > 0:
        begins = sorted((backend.address(array), name) for name, array in arrays.items())
        for (begin, name), (following, other) in pairwise(begins):
            if begin + first.nbytes > following:
                raise ValueError(f"{name} and {other} overlap in memory; pass arrays that share none")
    return backend, list(arrays.values())


def _writeable(array: Any) -> bool:
    flags = getattr(array, "flags", None)  # CuPy's have no such flag: all of its arrays are
    if hasattr(flags, "c_contiguous"):
        return bool(getattr(flags, "writeable", True))
    return not array.__cuda_array_interface__["data"][1]
