"""Trees of arrays: flatten them, name their leaves, and hand out trees that cannot disagree with the optimizer.

The trees that an optimizer hands out (``opt.params``, ``opt.grads``) hold views of its buffers. Assigning to an item of
such a tree writes into the view, and what would replace a view or change the structure raises an error:

- dict, OrderedDict, defaultdict and list become `TreeDict`, `TreeOrderedDict`, `TreeDefaultDict` and `TreeList`. Items
  are read by the lookup of dict and list. ``tree.copy()``, `copy.copy` and ``tree | other`` give containers that are
  plain at every depth and hold the same views; `copy.deepcopy` and `pickle` give plain containers of copies. Where
  the optimizer is copied with the tree, these are its arrays, and also its containers if it comes first.
  ``dict(tree)`` and ``list(tree)`` make only the outermost container plain.
- Tuples, NamedTuples and frozen dataclasses are immutable, and hold such containers.
- Mutable dataclasses, deques and custom nodes stay as they are: `watched` finds them, `replaced` compares their leaves.

optree flattens the subclasses as nodes in every namespace, with the paths and the order of a plain tree, and rebuilds
them as plain containers. It treats plain and handed-out containers as different nodes, so that a function of several
trees needs one kind: pass ``opt.params.copy()`` beside a plain tree. The pytrees of jax and torch know no subclasses of
dict and list: pass ``opt.params.copy()`` to them also.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any, NamedTuple

import numpy as np
import optree

from fastopt import scalars
from fastopt.kernels import backend_of, check_device, get_backend

NAMESPACE = "fastopt"
"""The optree namespace in which fastopt registers plain dataclasses; optree's global registrations apply also."""

SHOWN = 8
"""The number of keys that an error lists."""
MOST_NAMED = 10
"""The number of missing keys, and of extra ones, that an error about another structure lists."""


# --- flattening -------------------------------------------------------------------------------------------------------


def flatten(tree: Any) -> tuple[list[Any], Any, tuple[str, ...]]:
    """Flatten a tree with optree; register plain dataclasses, which optree would treat as leaves.

    Args:
        tree: any tree. The containers of a tree that was handed out count as plain ones.

    Returns:
        A tuple of the list of leaves, the treespec, and the paths of the leaves.

    >>> flatten({"bn": {"gamma": 1.0}, "W": [2.0, 3.0]})[2]
    ('W.0', 'W.1', 'bn.gamma')
    """
    while True:
        leaves, treespec = optree.tree_flatten(tree, is_leaf=_is_handed_out, namespace=NAMESPACE)
        kinds = {type(leaf) for leaf in leaves}
        if not kinds.isdisjoint(HANDED_OUT):
            tree = plain(tree)
            continue
        closed = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if not closed:
            return leaves, treespec, tuple(map(path_of, treespec.accessors()))
        for kind in closed:
            _register_dataclass(kind)


def path_of(accessor: Any) -> str:
    """The path ``"bn.gamma"`` of an optree accessor; ``"params"`` for a tree that is one bare array."""
    names = [str(getattr(entry, "field", entry.entry)) for entry in accessor]
    return ".".join(names) or "params"


def plain(tree: Any) -> Any:
    """The same tree in plain containers, at every depth; its leaves are the same objects."""
    return optree.tree_map(_itself, tree, namespace=NAMESPACE)


def leaves_like(treespec: Any, tree: Any) -> list[Any]:
    """The parts of `tree` at the leaves of a treespec from `flatten`; None is kept where an array is missing.

    Args:
        treespec: as `flatten` returned it.
        tree: of plain or handed-out containers, or both. None in place of a subtree stands for None at each of its
            leaves.

    Returns:
        A list of the leaves, in the order of the treespec.

    Raises:
        TypeError, ValueError: the tree has another structure.
    """
    if _is_handed_out(tree):  # optree would refuse it with the values of all arrays in the error
        tree = plain(tree)
    try:
        leaves: list[Any] = treespec.flatten_up_to(tree)
    except (TypeError, ValueError):
        leaves = [None] * treespec.num_leaves
        if tree is None or not _spread(treespec.unflatten(range(len(leaves))), tree, leaves):
            raise
    return leaves


def _spread(node: Any, tree: Any, leaves: list[Any]) -> bool:
    """Write the parts of `tree` into `leaves`, at the numbers that are the leaves of `node`; whether it is like `node`.

    A subtree that is None leaves its own as they are.
    """
    if type(node) is int:
        leaves[node] = tree
        return True
    if tree is None or node is None:
        return tree is None
    kinds = {type(node), PLAIN.get(type(tree), type(tree))}
    parts, theirs = _parts(node) or [], {part.suffix: part.child for part in _parts(tree) or []}
    alike = (len(kinds) == 1 or kinds <= MAPPINGS) and {part.suffix for part in parts} == theirs.keys()
    return alike and all(_spread(part.child, theirs[part.suffix], leaves) for part in parts)


def difference(treespec: Any, tree: Any, what: str) -> str:
    """How a tree differs from the structure of a treespec, for an error: which keys are missing, and which are extra.

    Args:
        treespec: as `flatten` returned it.
        tree: of another structure.
        what: the code that reads the tree, such as ``grads``.

    Returns:
        What the tree is, to follow "got"; "" where no container differs in its kind or keys.

    >>> _, treespec, _ = flatten({"W": 0.0, "b": 0.0})
    >>> difference(treespec, {"dW": 1.0, "b": 2.0}, "grads")
    "a tree without 'W' and with 'dW' in excess; pass {'W': grads['dW'], ...}"
    """
    found = Difference([], [], [], [])
    found.compare(treespec.unflatten(range(treespec.num_leaves)), plain(tree), "", what)
    if found.kinds:
        return found.kinds[0]
    sides = (("without", found.missing, ""), ("with", found.extra, " in excess"))
    parts = [f"{side} {_quoted(names)}{end}" for side, names, end in sides if names]
    hint = f"; pass {{{', '.join(found.renamed[:2])}, ...}}" if found.renamed else ""
    return f"a tree {' and '.join(parts)}{hint}" if parts else ""


class Difference(NamedTuple):
    """What `difference` found."""

    missing: list[str]
    extra: list[str]
    """Paths of keys."""
    kinds: list[str]
    """Containers of another kind, in words."""
    renamed: list[str]
    """Items of a dict that turn keys such as ``dW`` into those of the parameters."""

    def compare(self, node: Any, tree: Any, path: str, code: str) -> None:
        """Compare a tree with a node whose leaves are ints. path : of both. code : what reads the tree."""
        if type(node) is int or node is None or tree is None:
            return
        parts, theirs = _parts(node) or [], _parts(tree)
        kinds = {type(node), type(tree)}
        if theirs is None or not (len(kinds) == 1 or kinds <= MAPPINGS):
            keys = f" with the keys {_quoted([str(part.key) for part in parts])}" if type(node) in MAPPINGS else ""
            place = f" at {path!r}, where the parameters have" if path else " instead of"
            self.kinds.append(f"{_kind(tree)}{place} {_kind(node)}{keys}")
            return
        own = {part.suffix: part for part in parts}
        given = {part.suffix: part for part in theirs}
        lost = [part for suffix, part in own.items() if suffix not in given]
        added = {part.key: part for suffix, part in given.items() if suffix not in own}
        self.missing.extend(_joined(path, part.key) for part in lost)
        self.extra.extend(_joined(path, key) for key in added)
        for part in lost:
            for name in (f"d{part.key}", f"{part.key}_grad", f"grad_{part.key}"):
                if name in added:
                    self.renamed.append(f"{part.key!r}: {code}[{name!r}]")
        for suffix, part in own.items():
            if suffix in given:
                inner = f"{code}[{part.key!r}]" if type(node) in MAPPINGS else f"{code}{suffix}"
                self.compare(part.child, given[suffix].child, _joined(path, part.key), inner)


def _joined(path: str, key: Any) -> str:
    """The path of a child, as `path_of` writes it. key : of a `Part`."""
    name = getattr(key, "field", getattr(key, "entry", key)) if isinstance(key, optree.PyTreeEntry) else key
    return f"{path}.{name}" if path else str(name)


def _quoted(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(repr, names[:MOST_NAMED])) + more


def _register_dataclass(kind: type) -> None:
    names = tuple(field.name for field in dataclasses.fields(kind))
    for field in dataclasses.fields(kind):
        if not field.init:
            raise TypeError(
                f"{kind.__name__}.{field.name}: must be a field with init=True to be part of a tree, got init=False; "
                f"register the class by optree.register_pytree_node to say what its parts are"
            )

    def flatten(instance: Any) -> tuple[tuple[Any, ...], None, tuple[str, ...]]:
        return tuple(getattr(instance, name) for name in names), None, names

    def unflatten(_: Any, children: Any) -> Any:
        return kind(**dict(zip(names, children, strict=True)))

    optree.register_pytree_node(kind, flatten, unflatten, path_entry_type=optree.GetAttrEntry, namespace=NAMESPACE)


def _itself(leaf: Any) -> Any:
    return leaf


# --- the containers that are handed out -------------------------------------------------------------------------------


def handed_out(treespec: Any, leaves: Iterable[Any], what: str) -> Any:
    """The tree to hand out: its containers write what is assigned to an item into the leaf.

    Args:
        treespec: as `flatten` returned it.
        leaves: an array for each leaf of the treespec, of NumPy or of the device.
        what: the name of the tree in errors, such as ``"opt.params"``.

    Returns:
        A tree whose leaves are the arrays given.

    >>> import numpy as np
    >>> _, treespec, _ = flatten({"w": 0, "bn": {"gamma": 0}})
    >>> leaf = np.zeros(2)
    >>> tree = handed_out(treespec, [np.ones(1), leaf], "opt.params")
    >>> tree["w"] = [1.0, 2.0]
    >>> leaf
    array([1., 2.])
    >>> tree["b"] = np.ones(1)
    Traceback (most recent call last):
    TypeError: opt.params["b"]: must be one of the keys "w", "bn", got a new key; create an optimizer to add parameters
    """
    leaves = list(leaves)
    return _handed_out(treespec.unflatten(leaves), what, set(map(id, leaves)))


def _handed_out(node: Any, code: str, leaves: set[int]) -> Any:
    """The node to hand out for a new one, which `code` reads; `leaves` are the ids of the leaves."""
    kind = type(node)
    if node is None or id(node) in leaves:
        return node
    if kind in MAPPINGS or kind in (list, deque):
        for key, child in node.items() if kind in MAPPINGS else enumerate(node):
            if id(child) not in leaves:
                node[key] = _handed_out(child, code + _item(key), leaves)
        return HANDED_OUT_AS[kind]._of(node, code) if kind in HANDED_OUT_AS else node
    accessors, children, treespec = optree.tree_flatten_with_accessor(
        node, is_leaf=lambda child: child is not node, namespace=NAMESPACE
    )
    made = [
        _handed_out(child, code + _suffix(accessor[0]), leaves)
        for accessor, child in zip(accessors, children, strict=True)
    ]
    return node if all(map(operator.is_, made, children)) else treespec.unflatten(made)


class _Mapping(dict[Any, Any]):
    """What the subclasses of dict share."""

    __slots__ = ()
    _code: str
    """The expression that reads this container, such as ``opt.params["bn"]``."""
    _keys: Keys | None
    """What optree keeps of the keys, once it has asked."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain container: libraries rebuild one by type(tree)(items)."""
        return PLAIN[cls](*args, **kwargs)

    fromkeys = dict.fromkeys

    def __setitem__(self, key: Any, value: Any) -> None:
        leaf = self.get(key)
        if leaf is None or not _copied(leaf, value):
            self._assign(((key, value),))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Assign to several items, or to none where one does not fit."""
        self._assign(dict(*args, **kwargs).items())

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The item of a key; an error where there is none."""
        self._check_key(key)
        return self[key]

    def _assign(self, items: Iterable[tuple[Any, Any]]) -> None:
        writes: list[Write] = []
        for key, value in items:
            self._check_key(key)
            writes += _writes(self[key], value, self._code + _item(key))
        _write(writes)

    def _check_key(self, key: Any) -> None:
        if key not in self:
            raise TypeError(
                f"{self._code}{_item(key)}: must be one of the keys {_listed(self)}, got a new key; create an "
                f"optimizer to add parameters"
            )

    def copy(self) -> Any:
        """A plain container, plain at every depth, of the same arrays."""
        return plain(self)

    __copy__ = copy

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __delitem__(self, key: Any) -> None:
        _refuse(self, "del", key)

    def pop(self, key: Any, *default: Any) -> Any:
        """Refused."""
        _refuse(self, "pop()", key)

    def popitem(self, last: bool = True) -> Any:
        """Refused."""
        _refuse(self, "popitem()")

    def clear(self) -> None:
        """Refused."""
        _refuse(self, "clear()")


class TreeDict(_Mapping):
    """A dict of a tree that was handed out."""

    __slots__ = ("_code", "_keys")

    @classmethod
    def _of(cls, items: dict[Any, Any], code: str) -> TreeDict:
        node: TreeDict = dict.__new__(cls)
        dict.update(node, items)
        node._keys = None
        node._code = code
        return node

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


class TreeOrderedDict(_Mapping, OrderedDict[Any, Any]):  # type: ignore[misc]
    """An OrderedDict of a tree that was handed out; optree flattens it in the order of its items."""

    __slots__ = ("_code",)

    @classmethod
    def _of(cls, items: OrderedDict[Any, Any], code: str) -> TreeOrderedDict:
        node: TreeOrderedDict = OrderedDict.__new__(cls)
        for key, value in items.items():
            OrderedDict.__setitem__(node, key, value)
        node._code = code
        return node

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (dict(self),)

    def __repr__(self) -> str:
        return repr(OrderedDict(self))

    def move_to_end(self, key: Any, last: bool = True) -> None:
        """Refused."""
        _refuse(self, "move_to_end()")


class TreeDefaultDict(_Mapping, defaultdict[Any, Any]):
    """A defaultdict of a tree that was handed out; reading a key that is missing raises KeyError."""

    __slots__ = ("_code", "_keys")

    @classmethod
    def _of(cls, items: defaultdict[Any, Any], code: str) -> TreeDefaultDict:
        node: TreeDefaultDict = defaultdict.__new__(cls)
        defaultdict.__init__(node, items.default_factory, items)
        node._keys = None
        node._code = code
        return node

    def __reduce_ex__(self, protocol: Any) -> Any:
        return defaultdict, (self.default_factory, dict(self))

    def __repr__(self) -> str:
        return repr(defaultdict(self.default_factory, self))

    def __missing__(self, key: Any) -> Any:
        raise KeyError(key)


class TreeList(list[Any]):
    """A list of a tree that was handed out."""

    __slots__ = ("_code",)
    _code: str

    def __new__(cls, *args: Any) -> Any:
        """A plain list: libraries rebuild one by type(tree)(items)."""
        return list(*args)

    @classmethod
    def _of(cls, items: list[Any], code: str) -> TreeList:
        node: TreeList = list.__new__(cls)
        list.extend(node, items)
        node._code = code
        return node

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(index, slice):
            if not -len(self) <= operator.index(index) < len(self):
                raise IndexError(
                    f"{self._code}[{index}]: must be an index in [{-len(self)}, {len(self)}), got {index}; create an "
                    f"optimizer to add parameters"
                )
            if not _copied(self[index], value):
                _write(_writes(self[index], value, f"{self._code}[{index}]"))
            return
        indices, values = range(len(self))[index], list(value)
        if len(values) != len(indices):
            raise TypeError(
                f"{self._code}: must keep its length, got {_count(len(values), 'item')} for {len(indices)}; use "
                f"{self._code}.copy() for a plain list"
            )
        writes: list[Write] = []
        for k, part in zip(indices, values, strict=True):
            writes += _writes(self[k], part, f"{self._code}[{k}]")
        _write(writes)

    def copy(self) -> Any:
        """A plain list, plain at every depth, of the same arrays."""
        return plain(self)

    __copy__ = copy

    def __add__(self, other: Any) -> Any:
        return self.copy() + other

    def __mul__(self, count: Any) -> Any:
        return self.copy() * count

    __rmul__ = __mul__

    def __delitem__(self, index: Any) -> None:
        _refuse(self, "del", *(() if isinstance(index, slice) else (index,)))

    def __iadd__(self, other: Any) -> Any:
        _refuse(self, "+=")

    def __imul__(self, count: Any) -> Any:
        _refuse(self, "*=")

    def append(self, value: Any) -> None:
        """Refused."""
        _refuse(self, "append()")

    def extend(self, values: Any) -> None:
        """Refused."""
        _refuse(self, "extend()")

    def insert(self, index: Any, value: Any) -> None:
        """Refused."""
        _refuse(self, "insert()")

    def pop(self, index: Any = -1) -> Any:
        """Refused."""
        _refuse(self, "pop()", index)

    def remove(self, value: Any) -> None:
        """Refused."""
        _refuse(self, "remove()")

    def clear(self) -> None:
        """Refused."""
        _refuse(self, "clear()")

    def sort(self, **how: Any) -> None:
        """Refused."""
        _refuse(self, "sort()")

    def reverse(self) -> None:
        """Refused."""
        _refuse(self, "reverse()")


PLAIN: dict[type, type] = {TreeDict: dict, TreeOrderedDict: OrderedDict, TreeDefaultDict: defaultdict, TreeList: list}
"""The plain type of each container that is handed out."""

HANDED_OUT = frozenset(PLAIN)
HANDED_OUT_AS: dict[type, Any] = {plain: kind for kind, plain in PLAIN.items()}

MAPPINGS = frozenset({dict, OrderedDict, defaultdict, TreeDict, TreeOrderedDict, TreeDefaultDict})
SEQUENCES = frozenset({list, tuple, deque, TreeList})


def _is_handed_out(node: Any) -> bool:
    return type(node) in HANDED_OUT


def _refuse(node: Any, change: str, *key: Any) -> Any:
    """Raise an error for a change of structure: of the item of a key, or of the whole container."""
    where = "".join((node._code, *map(_item, key)))
    must = "stay in the tree" if key else "keep its items and their order"
    raise TypeError(
        f"{where}: must {must}, got {change}; use {node._code}.copy() for a plain {PLAIN[type(node)].__name__}"
    )


# --- what optree sees -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a `TreeDict` or `TreeDefaultDict` in a treespec, which is equal for any order of the items."""

    keys: tuple[Any, ...]
    order: tuple[Any, ...] = dataclasses.field(compare=False)
    default_factory: Callable[[], Any] | None = None


def _flatten_dict(node: TreeDict | TreeDefaultDict) -> tuple[list[Any], Keys, tuple[Any, ...]]:
    found = node._keys
    if found is None:
        keys = tuple(optree.utils.total_order_sorted(node))
        found = node._keys = Keys(keys, tuple(node), getattr(node, "default_factory", None))
    return [node[key] for key in found.keys], found, found.keys


def _unflatten_dict(keys: Keys, children: Iterable[Any]) -> dict[Any, Any]:
    node = dict.fromkeys(keys.order)
    node.update(zip(keys.keys, children, strict=True))
    return node


def _unflatten_default_dict(keys: Keys, children: Iterable[Any]) -> defaultdict[Any, Any]:
    return defaultdict(keys.default_factory, _unflatten_dict(keys, children))


def _flatten_ordered_dict(node: TreeOrderedDict) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
    return list(node.values()), tuple(node), tuple(node)


def _unflatten_ordered_dict(keys: tuple[Any, ...], children: Iterable[Any]) -> OrderedDict[Any, Any]:
    return OrderedDict(zip(keys, children, strict=True))


def _flatten_list(node: TreeList) -> tuple[TreeList, None]:
    return node, None


def _unflatten_list(_: None, children: Iterable[Any]) -> list[Any]:
    return list(children)


def _register_globally() -> None:
    for kind, flatten, unflatten, entry in (
        (TreeDict, _flatten_dict, _unflatten_dict, optree.MappingEntry),
        (TreeOrderedDict, _flatten_ordered_dict, _unflatten_ordered_dict, optree.MappingEntry),
        (TreeDefaultDict, _flatten_dict, _unflatten_default_dict, optree.MappingEntry),
        (TreeList, _flatten_list, _unflatten_list, optree.SequenceEntry),
    ):
        # Every namespace falls back on the global one.
        everywhere = optree.registry.__GLOBAL_NAMESPACE
        optree.register_pytree_node(kind, flatten, unflatten, path_entry_type=entry, namespace=everywhere)


_register_globally()


# --- assigning --------------------------------------------------------------------------------------------------------


class Write(NamedTuple):
    """A copy to make, once everything has been checked."""

    leaf: Any
    array: Any


def _copied(leaf: Any, value: Any) -> bool:
    """Whether there is nothing to check, and nothing left to do: `value` is the leaf, or was copied into it."""
    if value is leaf:
        return True
    if type(leaf) is np.ndarray is type(value) and leaf.shape == value.shape and leaf.dtype == value.dtype:
        leaf[...] = value
        return True
    return False


def _writes(node: Any, value: Any, code: str) -> list[Write]:
    """The copies that assign `value` to the node that `code` reads; an error where it does not fit."""
    if value is node:
        return []
    parts = _parts(node)
    if parts is None:
        return [Write(node, _checked(node, value, code))]
    writes: list[Write] = []
    for part, child in zip(parts, _matched(node, parts, value, code), strict=True):
        writes += _writes(part.child, child, code + part.suffix)
    return writes


def _write(writes: list[Write]) -> None:
    """Make the copies. Of several, none reads what another has written."""
    if len(writes) > 1 or (writes and type(writes[0].leaf) is not np.ndarray):
        written = {id(array) for write in writes for array in (write.leaf, getattr(write.leaf, "base", None))}
        writes = [
            Write(leaf, array.copy() if array.base is not None or id(array) in written else array)
            for leaf, array in writes
        ]
    for leaf, array in writes:
        leaf[...] = array


def _checked(leaf: Any, value: Any, code: str) -> Any:
    """`value` as an array of the leaf's backend, dtype and shape; an error where it is not like the leaf."""
    scalars.refuse_masked(code, value)
    place = "cpu" if type(leaf) is np.ndarray else backend_of(leaf)
    if place == "cpu" and backend_of(value) != "cpu":
        raise TypeError(f"{code}: must be an array of the host, got {_kind(value)}; copy it to the host")
    backend = get_backend(place)
    array: Any
    try:
        array = backend.adopt(value)
        if array is None:
            array = backend.adopt(np.asarray(value))
    except Exception as error:  # of another library: what it raises when it refuses to convert is its own choice
        remedy = "pass tensor.detach()" if getattr(value, "requires_grad", False) else str(error)
        raise TypeError(f"{code}: must be an array of shape {leaf.shape}, got {_kind(value)}; {remedy}") from None
    if array.dtype == object:
        remedy = f"; assign 0.0 to {code}[...] to clear it" if value is None else ""
        raise TypeError(f"{code}: must be an array of shape {leaf.shape}, got {_kind(value)}{remedy}")
    if array.shape != leaf.shape:
        raise ValueError(
            f"{code}: must be of shape {leaf.shape}, got shape {array.shape}; assign to {code}[...] to broadcast"
        )
    check_device(code, array, backend, backend.device_of(leaf), "as its leaf")
    if array.dtype == leaf.dtype:
        return array
    if not np.can_cast(array.dtype, leaf.dtype, "same_kind"):
        raise TypeError(f"{code}: must be of a dtype that casts to {leaf.dtype}, got {array.dtype}; use astype")
    return array.astype(leaf.dtype)


# --- nodes ------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A child of a node."""

    key: Any
    """Of a mapping or a sequence; the entry of optree for any other node."""
    suffix: str
    """What reads the child, such as ``[0]`` or ``.gamma``."""
    child: Any


def _parts(node: Any) -> list[Part] | None:
    """The children of a node, in any order; None for a leaf."""
    kind = type(node)
    if kind is np.ndarray:
        return None
    if kind in MAPPINGS:
        return [Part(key, _item(key), child) for key, child in node.items()]
    if kind in SEQUENCES:
        return [Part(k, f"[{k}]", child) for k, child in enumerate(node)]
    accessors, children, _ = optree.tree_flatten_with_accessor(
        node, is_leaf=lambda child: child is not node, namespace=NAMESPACE
    )
    if accessors and not accessors[0]:
        return None
    return [Part(accessor[0], _suffix(accessor[0]), child) for accessor, child in zip(accessors, children, strict=True)]


def _matched(node: Any, parts: list[Part], value: Any, code: str) -> list[Any]:
    """The children of `value` that stand for those of a node; an error where it is not like the node."""
    kind = type(node)
    if kind in MAPPINGS:
        keys = [part.key for part in parts]
        if not isinstance(value, Mapping):
            raise TypeError(f"{code}: must be a mapping with the keys {_listed(keys)}, got {_kind(value)}")
        if value.keys() != set(keys):
            raise ValueError(f"{code}: must have the keys {_listed(keys)}, got {_listed(value)}")
        return [value[key] for key in keys]
    if kind in SEQUENCES:
        if not isinstance(value, list | tuple | deque):
            raise TypeError(f"{code}: must be a list or tuple of {_count(len(parts), 'item')}, got {_kind(value)}")
        if len(value) != len(parts):
            raise ValueError(f"{code}: must have {_count(len(parts), 'item')}, got {len(value)}")
        return list(value)
    if type(value) is not kind:
        raise TypeError(f"{code}: must be {_named(kind)}, got {_kind(value)}")
    found = _parts(value) or []
    if [part.suffix for part in found] != [part.suffix for part in parts]:
        expected = ", ".join(part.suffix for part in parts)
        raise ValueError(f"{code}: must have the parts {expected}, got {', '.join(part.suffix for part in found)}")
    return [part.child for part in found]


def containers(node: Any) -> Iterator[Any]:
    """The containers of a tree, from the outermost one inwards, in the order of their items."""
    parts = _parts(node)
    if parts is not None:
        yield node
        for part in parts:
            yield from containers(part.child)


def _item(key: Any) -> str:
    """What reads an item, in double quotes as code is written."""
    text = repr(key)
    return f'["{key}"]' if text == f"'{key}'" and '"' not in text else f"[{text}]"


def _suffix(entry: Any) -> str:
    code: str = entry.codify("")
    return _item(entry.entry) if isinstance(entry, optree.MappingEntry) else code


def _listed(keys: Iterable[Any]) -> str:
    names = [_item(key)[1:-1] for key in keys]
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join(names[:SHOWN] + more) or "(none)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _kind(value: Any) -> str:
    return _named(type(value))


def _named(kind: type) -> str:
    """A type, as errors call it."""
    name = PLAIN.get(kind, kind).__name__
    if kind is type(None):
        return "None"
    if name == "ndarray":
        return "a NumPy array" if kind is np.ndarray else f"a {kind.__module__.partition('.')[0]} array"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


# --- containers that stay as they are ---------------------------------------------------------------------------------


def watched(tree: Any) -> bool:
    """Whether a tree that was handed out holds a container in which a leaf can be replaced without an error.

    >>> from collections import deque
    >>> _, treespec, _ = flatten([deque([0, 0])])
    >>> watched(handed_out(treespec, [1.0, 2.0], "opt.params"))
    True
    """
    return not all(map(_is_fixed, containers(tree)))


def _is_fixed(node: Any) -> bool:
    return node is None or type(node) in HANDED_OUT or isinstance(node, tuple) or _is_frozen(node)


def _is_frozen(node: Any) -> bool:
    return bool(getattr(getattr(type(node), "__dataclass_params__", None), "frozen", False))


def replaced(tree: Any, leaves: Sequence[Any], paths: Sequence[str]) -> str | None:
    """The path of the first leaf of a tree that is not the one that was handed out; None where all are.

    Args:
        tree: as `handed_out` returned it.
        leaves: as they were given to `handed_out`.
        paths: of the leaves.

    >>> from collections import deque
    >>> _, treespec, paths = flatten([deque([0, 0])])
    >>> leaves = [1.0, 2.0]
    >>> tree = handed_out(treespec, leaves, "opt.params")
    >>> replaced(tree, leaves, paths)
    >>> tree[0][1] = 3.0
    >>> replaced(tree, leaves, paths)
    '0.1'
    """
    found = optree.tree_leaves(tree, namespace=NAMESPACE)
    if len(found) == len(leaves) and all(map(operator.is_, found, leaves)):
        return None
    ours = set(map(id, leaves))
    for k, (accessor, leaf) in enumerate(zip(optree.tree_accessors(tree, namespace=NAMESPACE), found, strict=True)):
        if id(leaf) not in ours:
            return path_of(accessor)
        if k == len(leaves) or leaf is not leaves[k]:
            return paths[k] if k < len(leaves) else path_of(accessor)
    return paths[len(found)]


# --- adopting ---------------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """A leaf to put into a container of the caller."""

    container: Any
    key: Any
    leaf: Any
    before: Any
    code: str


def adopt(params: Any, treespec: Any, leaves: Iterable[Any], what: str = "params") -> None:
    """Put the leaves into the caller's own containers, in the place of the caller's arrays.

    Args:
        params: a tree of the structure and the shapes of the parameters. Each leaf must stand in a mutable mapping, a
            list, or an object whose attribute can be set.
        treespec: as `flatten` returned it.
        leaves: an array for each leaf of the treespec. Their values are kept; the caller's arrays are not read.
        what: the name of the tree in errors.

    Raises:
        TypeError, ValueError: naming the part of the tree that does not fit, or that cannot be set. Nothing is changed.

    >>> import numpy as np
    >>> params = {"w": np.ones(2)}
    >>> _, treespec, _ = flatten(params)
    >>> view = np.zeros(2)
    >>> adopt(params, treespec, [view])
    >>> params["w"] is view
    True
    """
    node = treespec.unflatten(leaves)
    if treespec.is_leaf():
        raise TypeError(f"{what}: must be a container, got a bare array; use opt.params")
    moves = list(_moves(node, params, what))
    made: list[Move] = []
    try:
        for move in moves:
            made.append(move)
            _put(move, move.leaf)
        for move in moves:
            if _held(move) is not move.leaf:
                raise TypeError("it holds another object than the one that was set")
    except BaseException as error:
        for undone in reversed(made):
            _put_back(undone)
        if not isinstance(error, Exception):
            raise
        raise TypeError(
            f"{move.code}: must be settable, got {_named(type(move.container))} that refuses ({error}); use opt.params"
        ) from error


def _moves(node: Any, own: Any, code: str) -> Iterator[Move]:
    parts = _parts(node) or []
    for part, theirs in zip(parts, _matched(node, parts, own, code), strict=True):
        inner = code + part.suffix
        if _parts(part.child) is not None:
            yield from _moves(part.child, theirs, inner)
        elif theirs is not part.child:
            shape = getattr(theirs, "shape", None)
            if shape is None:
                raise TypeError(f"{inner}: must be an array of shape {part.child.shape}, got {_kind(theirs)}")
            if tuple(shape) != part.child.shape:
                raise ValueError(f"{inner}: must be of shape {part.child.shape}, got shape {tuple(shape)}")
            if _is_handed_out(own):
                raise TypeError(f"{inner}: must be in a container of your own, got {own._code}; use opt.params")
            if not _settable(own, part.key):
                raise TypeError(f"{inner}: must be in a mutable container, got {_named(type(own))}; use opt.params")
            yield Move(own, part.key, part.child, theirs, inner)


def _settable(own: Any, key: Any) -> bool:
    if isinstance(own, MutableMapping | MutableSequence):
        return True
    attribute = isinstance(key, optree.GetAttrEntry | optree.DataclassEntry) and key.name.isidentifier()
    return attribute and not isinstance(own, tuple) and not _is_frozen(own)


def _put(move: Move, array: Any) -> None:
    if isinstance(move.key, optree.GetAttrEntry | optree.DataclassEntry):
        setattr(move.container, move.key.name, array)
    else:
        move.container[_index(move.key)] = array


def _held(move: Move) -> Any:
    return move.key(move.container) if isinstance(move.key, optree.PyTreeEntry) else move.container[move.key]


def _index(key: Any) -> Any:
    return key.entry if isinstance(key, optree.PyTreeEntry) else key


def _put_back(move: Move) -> None:
    try:
        _put(move, move.before)
    except Exception:  # a container that refuses what it held before has refused the move also
        return
