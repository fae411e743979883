"""Trees that are handed out: what is assigned to an item is written into the array, or an error says so."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import sys
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from fastopt.storage.trees import (
    HANDED_OUT,
    NAMESPACE,
    PLAIN,
    TreeDefaultDict,
    TreeDict,
    TreeList,
    TreeOrderedDict,
    adopt,
    flatten,
    handed_out,
    leaves_like,
    plain,
    replaced,
    watched,
)


class Norm(NamedTuple):
    gamma: Any
    beta: Any


@dataclasses.dataclass
class Dense:
    weight: Any
    bias: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    first: Any
    second: Any


@optree.dataclasses.dataclass(namespace=NAMESPACE)
class Registered:
    weight: Any
    name: str = optree.dataclasses.field(default="r", pytree_node=False)


class Bag:
    """A node that only optree's registry can open."""

    def __init__(self, *parts: Any):
        self.parts = parts


optree.register_pytree_node(
    Bag,
    lambda bag: (bag.parts, None, [f"part{k}" for k in range(len(bag.parts))]),
    lambda _, parts: Bag(*parts),
    namespace=NAMESPACE,
)


def a(*shape: int) -> np.ndarray:
    return np.arange(1.0, 1.0 + np.prod(shape, dtype=int)).reshape(shape)


class Handed(NamedTuple):
    tree: Any
    leaves: list[np.ndarray]
    treespec: Any
    paths: tuple[str, ...]


def hand_out(tree: Any, dtype: Any = np.float64) -> Handed:
    """A tree of zeros, parts of one buffer, as an optimizer hands it out."""
    leaves, treespec, paths = flatten(tree)
    buffer = np.zeros(sum(leaf.size for leaf in leaves), dtype)
    views, start = [], 0
    for leaf in leaves:
        views.append(buffer[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return Handed(handed_out(treespec, views, "opt.params"), views, treespec, paths)


def nodes(tree: Any) -> Iterator[Any]:
    """All nodes of a tree, leaves included."""
    yield tree
    _, children, _ = optree.tree_flatten_with_accessor(tree, is_leaf=lambda node: node is not tree, namespace=NAMESPACE)
    if not (len(children) == 1 and children[0] is tree):
        for child in children:
            yield from nodes(child)


def leaves_of(tree: Any, namespace: str = NAMESPACE) -> list[np.ndarray]:
    return optree.tree_leaves(tree, namespace=namespace)


def bits(leaves: list[np.ndarray]) -> list[bytes]:
    return [leaf.tobytes() for leaf in leaves]


def is_plain(tree: Any) -> bool:
    return not any(type(node) in HANDED_OUT for node in nodes(tree))


# --- random trees -----------------------------------------------------------------------------------------------------

SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (0,)])


def containers(child: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(child, max_size=3)
    tables = st.dictionaries(st.text("abc\"'. ", max_size=2) | st.integers(0, 3), child, max_size=3)
    return st.one_of(
        tables,
        tables.map(OrderedDict),
        tables.map(lambda table: defaultdict(list, table)),
        items,
        items.map(tuple),
        items.map(deque),
        items.map(lambda parts: Bag(*parts)),
        st.builds(Norm, child, child),
        st.builds(Dense, child, child),
        st.builds(Frozen, child, child),
        st.builds(Registered, child),
    )


trees = st.recursive(SHAPES.map(lambda shape: a(*shape)) | st.none(), containers, max_leaves=12)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_a_tree_that_is_handed_out_has_the_leaves_and_the_containers_of_the_plain_one(tree):
    handed = hand_out(tree)
    assert all(x is y for x, y in zip(leaves_of(handed.tree), handed.leaves, strict=True))
    for ours, theirs in zip(nodes(handed.tree), nodes(tree), strict=True):
        assert isinstance(ours, type(theirs))
        assert PLAIN.get(type(ours), type(ours)) is type(theirs)
        assert type(theirs) not in PLAIN.values() or type(ours) in HANDED_OUT
        if isinstance(theirs, dict):
            assert list(ours) == list(theirs)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_it_is_flattened_like_the_plain_one(tree):
    handed = hand_out(tree)
    leaves, treespec, paths = flatten(handed.tree)
    assert (treespec, paths) == (handed.treespec, handed.paths)
    assert all(x is y for x, y in zip(leaves, handed.leaves, strict=True))
    ours = [accessor.path for accessor in optree.tree_accessors(handed.tree, namespace=NAMESPACE)]
    assert ours == [accessor.path for accessor in optree.tree_accessors(tree, namespace=NAMESPACE)]
    # optree's global namespace treats dataclasses as leaves, in both
    assert optree.tree_paths(handed.tree) == optree.tree_paths(tree)
    doubled = optree.tree_map(lambda leaf: 2 * leaf, handed.tree, namespace=NAMESPACE)
    assert is_plain(doubled)
    assert flatten(doubled)[1] == handed.treespec
    for x, y in zip(leaves_like(handed.treespec, handed.tree), handed.leaves, strict=True):
        assert x is y


@given(trees, st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_assigned_to_an_item_is_written_into_the_array(tree, data):
    handed = hand_out(tree)
    values, _, _ = flatten(tree)
    writable = [node for node in nodes(handed.tree) if type(node) in HANDED_OUT]
    for node in writable:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            node[key] = optree.tree_map(lambda leaf: leaf + 1.0, plain(node[key]), namespace=NAMESPACE)
    below = {id(leaf) for node in writable for leaf in leaves_of(node)}
    depth = {id(leaf): sum(id(leaf) in map(id, leaves_of(node)) for node in writable) for leaf in handed.leaves}
    for leaf in handed.leaves:
        assert (leaf == depth[id(leaf)]).all()
    assert all(x is y for x, y in zip(leaves_of(handed.tree), handed.leaves, strict=True))
    if writable:
        node = data.draw(st.sampled_from(writable))
        if len(node):
            key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
            where = {id(leaf): value for leaf, value in zip(handed.leaves, values, strict=True)}
            node[key] = optree.tree_map(lambda leaf: where[id(leaf)], plain(node[key]), namespace=NAMESPACE)
            for leaf in leaves_of(node[key]):
                assert (leaf == where[id(leaf)]).all()
                assert id(leaf) in below


@given(trees)
@settings(max_examples=100, deadline=None)
def test_copies_are_plain_and_independent(tree):
    handed = hand_out(tree)
    before = bits(handed.leaves)
    for twin in (copy.deepcopy(handed.tree), pickle.loads(pickle.dumps(handed.tree))):
        assert is_plain(twin)
        assert flatten(twin)[1] == handed.treespec
        for leaf in leaves_of(twin):
            assert not any(np.shares_memory(leaf, own) for own in handed.leaves)
            leaf += 1.0
    assert bits(handed.leaves) == before
    for node in nodes(handed.tree):
        if type(node) in HANDED_OUT:
            for twin in (node.copy(), copy.copy(node)):
                assert is_plain(twin)
                assert type(twin) is PLAIN[type(node)]
                assert all(x is y for x, y in zip(leaves_of(twin), leaves_of(node), strict=True))


@given(trees)
@settings(max_examples=100, deadline=None)
def test_the_structure_cannot_change(tree):
    handed = hand_out(tree)
    for node in list(nodes(handed.tree)):
        for change in CHANGES.get(type(node), ()):
            before = list(node.items()) if isinstance(node, dict) else list(node)
            with pytest.raises(TypeError, match=r"^opt\.params.*: must .*; (use|create) "):
                CHANGES[type(node)][change](node)
            after = list(node.items()) if isinstance(node, dict) else list(node)
            assert len(after) == len(before)
            assert all(x is y or (x[0] == y[0] and x[1] is y[1]) for x, y in zip(after, before, strict=True))


def _in_place(name: str, *arguments: Any) -> Callable[[Any], Any]:
    return lambda node: getattr(node, name)(*arguments)


OF_DICTS = {
    "a new key": _in_place("__setitem__", "new", 1.0),
    "del": _in_place("__delitem__", "new"),
    "pop": _in_place("pop", "new", None),
    "popitem": _in_place("popitem"),
    "clear": _in_place("clear"),
    "setdefault": _in_place("setdefault", "new", 1.0),
    "update": _in_place("update", {"new": 1.0}),
    "update by name": lambda node: node.update(new=1.0),
    "|=": _in_place("__ior__", {"new": 1.0}),
}
OF_LISTS = {
    "del": _in_place("__delitem__", 0),
    "del slice": lambda node: node.__delitem__(slice(None)),
    "append": _in_place("append", 1.0),
    "extend": _in_place("extend", [1.0]),
    "insert": _in_place("insert", 0, 1.0),
    "pop": _in_place("pop"),
    "remove": _in_place("remove", 1.0),
    "clear": _in_place("clear"),
    "sort": lambda node: node.sort(key=len),
    "reverse": _in_place("reverse"),
    "+=": _in_place("__iadd__", [1.0]),
    "*=": _in_place("__imul__", 2),
    "longer slice": lambda node: node.__setitem__(slice(0, 0), [1.0]),
}
CHANGES: dict[type, dict[str, Callable[[Any], Any]]] = {
    TreeDict: OF_DICTS,
    TreeDefaultDict: OF_DICTS,
    TreeOrderedDict: {**OF_DICTS, "move_to_end": _in_place("move_to_end", "new")},
    TreeList: OF_LISTS,
}


@given(trees)
@settings(max_examples=150, deadline=None)
def test_views_are_put_into_the_callers_own_tree_or_it_stays_as_it_was(tree):
    handed = hand_out(tree)
    before = leaves_of(tree)
    immutable = {
        id(child)
        for node in nodes(tree)
        if isinstance(node, tuple | Bag | Frozen)
        for child in (
            node.parts if isinstance(node, Bag) else vars(node).values() if isinstance(node, Frozen) else node
        )
    }
    fits = not isinstance(tree, np.ndarray) and not any(id(leaf) in immutable for leaf in before)
    if fits:
        adopt(tree, handed.treespec, handed.leaves)
        assert all(x is y for x, y in zip(leaves_of(tree), handed.leaves, strict=True))
        adopt(tree, handed.treespec, handed.leaves)
    else:
        with pytest.raises(TypeError, match=r"^params.*; use opt\.params$"):
            adopt(tree, handed.treespec, handed.leaves)
        assert all(x is y for x, y in zip(leaves_of(tree), before, strict=True))
    assert flatten(tree)[2] == handed.paths


# --- assigning --------------------------------------------------------------------------------------------------------


def small() -> Handed:
    return hand_out({"w": a(2), "s": a(), "bn": {"gamma": a(3), "beta": a(3)}, "layers": [a(2), (a(1), [a(2)])]}, "f4")


def test_augmented_assignment_is_the_arrays_own():
    tree, leaves, _, _ = small()
    tree["w"] += 1.0
    tree["s"] -= 2.0
    tree["layers"][0] *= 3.0
    tree["layers"][1][1][0] += [1.0, 2.0]
    assert tree["w"].tolist() == [1.0, 1.0]
    assert tree["s"] == -2.0
    assert tree["layers"][1][1][0].tolist() == [1.0, 2.0]
    assert all(x is y for x, y in zip(leaves_of(tree), leaves, strict=True))


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        (1.0, 2.0),
        np.array([1, 2]),
        np.array([1.0, 2.0]),
        np.array([1.0, 2.0], "f2"),
        np.array([1.0, 2.0], ">f4"),
        np.array([9.0, 1.0, 9.0, 2.0])[1::2],
    ],
    ids=repr,
)
def test_whatever_casts_to_the_leaf_is_copied(value):
    tree = small().tree
    leaf = tree["w"]
    tree["w"] = value
    assert tree["w"] is leaf
    assert leaf.dtype == np.float32
    assert leaf.tolist() == [1.0, 2.0]


def test_numbers_are_written_into_0d_leaves():
    tree = small().tree
    for value in (1, 2.5, np.float64(3.0), np.array(4.0), True):
        tree["s"] = value
        assert tree["s"].shape == ()
        assert tree["s"] == value


def test_an_inner_node_is_assigned_leaf_by_leaf():
    tree, leaves, _, _ = small()
    tree["bn"] = {"beta": [1, 2, 3], "gamma": np.ones(3)}
    tree["layers"] = ([5, 6], [[7.0], ([8, 9],)])
    tree["layers"][1][1][:] = [[10, 11]]
    assert [leaf.tolist() for leaf in leaves] == [[1, 2, 3], [1, 1, 1], [5, 6], [7], [10, 11], 0, [0, 0]]
    tree["bn"] = MappingProxyType({"beta": np.zeros(3), "gamma": np.zeros(3)})
    assert not tree["bn"]["beta"].any()
    tree["bn"] |= {"gamma": np.full(3, 4.0)}
    tree["bn"].update(beta=np.full(3, 5.0))
    tree |= {"s": 6.0}
    assert [leaf.tolist() for leaf in leaves[:2]] == [[5, 5, 5], [4, 4, 4]]
    assert tree["s"] == 6.0
    assert tree.setdefault("s", 0.0) is tree["s"]
    assert isinstance(tree, TreeDict)
    assert all(x is y for x, y in zip(leaves_of(tree), leaves, strict=True))


def test_several_leaves_are_read_before_any_is_written():
    tree = hand_out({"a": a(2), "b": a(2), "c": a(4)}).tree
    tree.update(a=[1, 2], b=[3, 4])
    tree.update(a=tree["b"], b=tree["a"])
    assert (tree["a"].tolist(), tree["b"].tolist()) == ([3, 4], [1, 2])
    tree.update(a=tree["b"][::-1], b=tree["a"][::-1])
    assert (tree["a"].tolist(), tree["b"].tolist()) == ([2, 1], [4, 3])
    tree["a"] = tree["a"][::-1]
    assert tree["a"].tolist() == [1, 2]


def test_nodes_of_other_types_are_assigned_from_their_own_kind():
    tree, _, _, _ = hand_out([Norm(a(1), a(1)), Dense(a(1), None), deque([a(1)]), Bag(a(1))])
    tree[0] = Norm([1.0], [2.0])
    tree[1] = Dense([3.0])
    tree[2] = [[4.0]]
    tree[3] = Bag([5.0])
    assert [leaf.item() for leaf in leaves_of(tree)] == [1, 2, 3, 4, 5]


class Odd:
    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("use odd.numpy()")


class Tensor(Odd):
    requires_grad = True


KEPT = 'opt.params["w"]: must be an array of shape (2,), got'


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (
            lambda t: t.__setitem__("w", np.ones(3)),
            ValueError,
            'opt.params["w"]: must be of shape (2,), got shape (3,); assign to opt.params["w"][...] to broadcast',
        ),
        (
            lambda t: t.__setitem__("w", 0.0),
            ValueError,
            'opt.params["w"]: must be of shape (2,), got shape (); assign to opt.params["w"][...] to broadcast',
        ),
        (
            lambda t: t.__setitem__("w", np.ones(2, complex)),
            TypeError,
            'opt.params["w"]: must be of a dtype that casts to float32, got complex128; use astype',
        ),
        (
            lambda t: t.__setitem__("w", ["x", "y"]),
            TypeError,
            'opt.params["w"]: must be of a dtype that casts to float32, got <U1; use astype',
        ),
        (
            lambda t: t.__setitem__("w", None),
            TypeError,
            f'{KEPT} None; assign 0.0 to opt.params["w"][...] to clear it',
        ),
        (lambda t: t.__setitem__("w", {}), TypeError, f"{KEPT} a dict"),
        (lambda t: t.__setitem__("w", t["bn"]), TypeError, f"{KEPT} a dict"),
        (lambda t: t.__setitem__("w", object()), TypeError, f"{KEPT} an object"),
        (lambda t: t.__setitem__("w", Odd()), TypeError, f"{KEPT} an Odd; use odd.numpy()"),
        (lambda t: t.__setitem__("w", Tensor()), TypeError, f"{KEPT} a Tensor; pass tensor.detach()"),
        (
            lambda t: t["layers"][1][1].__setitem__(0, a(3)),
            ValueError,
            'opt.params["layers"][1][1][0]: must be of shape (2,), got shape (3,); assign to '
            'opt.params["layers"][1][1][0][...] to broadcast',
        ),
        (
            lambda t: t["layers"].__setitem__(-3, a(2)),
            IndexError,
            'opt.params["layers"][-3]: must be an index in [-2, 2), got -3; create an optimizer to add parameters',
        ),
        (
            lambda t: t["layers"].__setitem__(slice(None), [1.0]),
            TypeError,
            'opt.params["layers"]: must keep its length, got 1 item for 2; use opt.params["layers"].copy() for a plain '
            "list",
        ),
        (
            lambda t: t["bn"].__setitem__("mean", a(3)),
            TypeError,
            'opt.params["bn"]["mean"]: must be one of the keys "gamma", "beta", got a new key; create an optimizer to '
            "add parameters",
        ),
        (
            lambda t: t.__setitem__("bn", a(3)),
            TypeError,
            'opt.params["bn"]: must be a mapping with the keys "gamma", "beta", got a NumPy array',
        ),
        (
            lambda t: t.__setitem__("bn", {"gamma": a(3)}),
            ValueError,
            'opt.params["bn"]: must have the keys "gamma", "beta", got "gamma"',
        ),
        (
            lambda t: t.__setitem__("bn", {}),
            ValueError,
            'opt.params["bn"]: must have the keys "gamma", "beta", got (none)',
        ),
        (
            lambda t: t.__setitem__("layers", a(2, 2)),
            TypeError,
            'opt.params["layers"]: must be a list or tuple of 2 items, got a NumPy array',
        ),
        (
            lambda t: t.__setitem__("layers", [a(2)]),
            ValueError,
            'opt.params["layers"]: must have 2 items, got 1',
        ),
        (
            lambda t: t["layers"].__setitem__(1, (a(1), [None])),
            TypeError,
            'opt.params["layers"][1][1][0]: must be an array of shape (2,), got None; assign 0.0 to '
            'opt.params["layers"][1][1][0][...] to clear it',
        ),
        (
            lambda t: t.__delitem__("w"),
            TypeError,
            'opt.params["w"]: must stay in the tree, got del; use opt.params.copy() for a plain dict',
        ),
        (
            lambda t: t["bn"].pop("beta"),
            TypeError,
            'opt.params["bn"]["beta"]: must stay in the tree, got pop(); use opt.params["bn"].copy() for a plain dict',
        ),
        (
            lambda t: t["layers"].append(a(2)),
            TypeError,
            'opt.params["layers"]: must keep its items and their order, got append(); use opt.params["layers"].copy() '
            "for a plain list",
        ),
        (
            lambda t: t.clear(),
            TypeError,
            "opt.params: must keep its items and their order, got clear(); use opt.params.copy() for a plain dict",
        ),
    ],
)
def test_errors_name_the_item_and_the_remedy_and_nothing_is_written(change, kind, said):
    tree, leaves, _, _ = small()
    with pytest.raises(kind) as caught:
        change(tree)
    assert str(caught.value) == said
    assert not any(leaf.any() for leaf in leaves)


@pytest.mark.parametrize(
    ("tree", "value", "said"),
    [
        ([Norm(a(1), a(1))], (a(1), a(1)), "opt.params[0]: must be a Norm, got a tuple"),
        ([Dense(a(1))], {"weight": a(1)}, "opt.params[0]: must be a Dense, got a dict"),
        ([Dense(a(1))], Dense(a(2)), "opt.params[0].weight: must be of shape (1,), got shape (2,)"),
        ([Dense(a(1))], Dense(a(1), a(1)), "opt.params[0].bias: must be None, got a NumPy array"),
        ([Bag(a(1))], Bag(), "opt.params[0]: must have the parts [<flat index 'part0'>], got "),
        ([{0: {None: a(1)}}], {0: {None: a(2)}}, "opt.params[0][0][None]: must be of shape (1,), got shape (2,)"),
    ],
)
def test_errors_in_nodes_of_other_types(tree, value, said):
    tree = hand_out(tree).tree
    with pytest.raises((TypeError, ValueError)) as caught:
        tree[0] = value
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(w=a(2), s=a(2)),
        lambda t: t.update(w=a(2), new=a(2)),
        lambda t: t.__setitem__("bn", {"gamma": a(3), "beta": None}),
        lambda t: t["layers"].__setitem__(slice(None), [a(2), (a(1), a(2))]),
        lambda t: t.__ior__({"w": a(2), "bn": 1.0}),
    ],
)
def test_of_several_items_all_are_assigned_or_none(change):
    tree, leaves, _, _ = small()
    with pytest.raises((TypeError, ValueError)):
        change(tree)
    assert not any(leaf.any() for leaf in leaves)


def test_many_keys_are_not_all_listed():
    tree = hand_out({f"w{k}": a(1) for k in range(20)}).tree
    with pytest.raises(TypeError, match=r'one of the keys "w0", .*, "w7", and 12 more, got a new key'):
        tree["w"] = a(1)


# --- good citizens ----------------------------------------------------------------------------------------------------


def test_they_read_like_dict_and_list():
    tree = small().tree
    assert repr(tree) == repr(tree.copy())
    assert isinstance(tree, dict)
    assert isinstance(tree["layers"], list)
    assert list(dict(**tree)) == ["w", "s", "bn", "layers"]
    assert tree.keys() == {"w", "s", "bn", "layers"}
    assert json.dumps(tree, default=np.ndarray.tolist) == json.dumps(tree.copy(), default=np.ndarray.tolist)
    assert "__getitem__" not in {name for kind in (*HANDED_OUT, *TreeDict.__mro__[1:2]) for name in vars(kind)}
    with pytest.raises(KeyError):
        tree["new"]


def test_ordered_and_default_dicts_stay_so():
    tree, leaves, _, _ = hand_out([OrderedDict(b=a(1), a=a(2)), defaultdict(list, b=a(1), a=a(2))])
    ordered, default = tree
    assert list(ordered) == ["b", "a"]
    assert repr(ordered).startswith("OrderedDict(")
    assert repr(default).startswith("defaultdict(<class 'list'>, {'b'")
    assert [leaf.shape for leaf in leaves] == [(1,), (2,), (2,), (1,)]
    with pytest.raises(KeyError):
        default["new"]
    assert set(default) == {"a", "b"}
    for twin in (default.copy(), copy.deepcopy(default), pickle.loads(pickle.dumps(default))):
        assert twin["new"] == []
    assert list(pickle.loads(pickle.dumps(ordered))) == ["b", "a"]


def test_sums_are_plain():
    tree = small().tree
    own = tree["layers"]
    for made in (
        tree | {"new": 1},
        {"new": 1} | tree,
        own.__add__([1]),
        own * 2,
        2 * own,
        own[:1],
        dict(tree),
        list(own),
    ):
        assert type(made) in (dict, list)
    assert is_plain(tree | {"new": 1})
    assert list({"new": 1} | tree) == ["new", "w", "s", "bn", "layers"]
    assert type(TreeDict.fromkeys("ab")) is dict


@pytest.mark.parametrize(("kind", "expected"), PLAIN.items())
def test_their_types_make_plain_containers(kind, expected):
    assert type(kind()) is expected
    if expected is not defaultdict:
        assert type(kind([("a", 1)])) is expected


@pytest.mark.parametrize("namespace", ["", NAMESPACE, "another"])
def test_optree_sees_their_leaves_in_every_namespace(namespace):
    tree, leaves, _, _ = hand_out({"z": a(1), "a": [a(2), {"c": a(1), "b": a(1)}]})
    assert all(x is y for x, y in zip(leaves_of(tree, namespace), leaves, strict=True))
    assert optree.tree_paths(tree, namespace=namespace) == [("a", 0), ("a", 1, "b"), ("a", 1, "c"), ("z",)]
    mapped = optree.tree_map(lambda p, g: p + g + 1.0, tree, tree, namespace=namespace)
    assert is_plain(mapped)
    assert list(mapped) == ["z", "a"]
    assert all(x is y for x, y in zip(leaves_of(tree.copy(), namespace), leaves, strict=True))
    assert optree.tree_map(lambda p, g: p.shape, mapped, tree.copy(), namespace=namespace)["z"] == (1,)


def test_the_order_of_the_items_does_not_distinguish_two_trees():
    x, y = hand_out({"a": a(1), "b": a(1)}).tree, hand_out({"b": a(1), "a": a(1)}).tree
    assert optree.tree_structure(x) == optree.tree_structure(y)
    assert list(optree.tree_map(lambda p, _: p, y, x)) == ["b", "a"]


def test_pack_and_step_take_trees_that_were_handed_out():
    tree, leaves, _, paths = small()
    tree["w"] = [1.0, 2.0]
    flat = fastopt.pack(plain(tree))
    assert flat.paths == paths
    assert [view.tolist() for view in flat.views(flat.data)] == [leaf.tolist() for leaf in leaves]


def test_leaves_like_keeps_none_and_refuses_another_structure():
    tree, leaves, treespec, _ = small()
    grads = {**tree, "w": None, "bn": {"gamma": 1, "beta": tree["bn"]["beta"]}}
    assert leaves_like(treespec, grads)[-1] is None
    assert leaves_like(treespec, grads)[0] is leaves[0]
    for wrong in ({"w": tree["w"]}, {**tree, "new": 1.0}, tree["layers"]):
        with pytest.raises(ValueError, match=r"[Ee]xpected"):
            leaves_like(treespec, wrong)


def test_a_bare_array_is_handed_out_as_it_is():
    tree, leaves, _, paths = hand_out(a(2))
    assert tree is leaves[0]
    assert paths == ("params",)
    assert not watched(tree)


def test_a_deep_tree_is_handed_out():
    tree: Any = a(1)
    for _ in range(100):
        tree = [tree]
    handed = hand_out(tree)
    handed.tree[0] = [copy.deepcopy(handed.tree[0][0])]
    assert leaves_of(handed.tree)[0] is handed.leaves[0]


# --- containers that stay as they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"a": [a(1), (a(1), Norm(a(1), None))], "b": OrderedDict(c=a(1)), "d": defaultdict(list, e=a(1))}, False),
        ([Frozen(a(1), {"a": a(1)})], False),
        (a(1), False),
        ([Dense(a(1))], True),
        ({"a": (deque([a(1)]),)}, True),
        ([Bag(a(1))], True),
        (Frozen(a(1), Registered(a(1))), True),
    ],
)
def test_trees_in_which_a_leaf_can_be_replaced_are_watched(tree, expected):
    assert watched(hand_out(tree).tree) is expected


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda t: None, None),
        (lambda t: setattr(t["d"], "weight", a(2)), "d.weight"),
        (lambda t: setattr(t["d"], "weight", None), "d.weight"),
        (lambda t: setattr(t["d"], "bias", a(2)), "d.bias"),
        (lambda t: setattr(t["d"], "bias", Dense(a(2))), "d.bias.weight"),
        (lambda t: t["q"].append(a(1)), "q.2"),
        (lambda t: t["q"].pop(), "q.1"),
        (lambda t: t["q"].rotate(), "q.0"),
        (lambda t: setattr(t["d"], "weight", t["d"].weight), None),
        (lambda t: t.__setitem__("w", a(1)), None),
    ],
)
def test_a_leaf_that_was_replaced_is_found(change, path):
    tree, leaves, _, paths = hand_out({"d": Dense(a(2)), "q": deque([a(1), a(1)]), "w": a(1)})
    change(tree)
    assert replaced(tree, leaves, paths) == path


def test_the_last_leaf_that_is_gone_is_found():
    tree, leaves, _, paths = hand_out([a(1), deque([a(1)])])
    tree[1].clear()
    assert replaced(tree, leaves, paths) == "1.0"


# --- adopting ---------------------------------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("w",)

    def __init__(self, w: Any):
        self.w = w


class ReadOnly(Slotted):
    """An object whose attribute cannot be set, which is seen only when it is tried."""

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "w"):
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)


for kind in (Slotted, ReadOnly):
    optree.register_pytree_node(
        kind,
        lambda node: ((node.w,), None, ("w",)),
        lambda _, children, kind=kind: kind(*children),
        path_entry_type=optree.GetAttrEntry,
        namespace=NAMESPACE,
    )


class Deaf(dict):
    """A mapping that does not keep what it is given."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, np.array(value))


def test_adopt_puts_views_into_every_mutable_container():
    layers = [a(2), a(1)]
    own = {
        "d": Dense(a(2), {"b": a(1)}),
        "l": layers,
        "t": ({"x": a(1)}, None),
        "s": Slotted(a(3)),
        "r": Registered(a(1)),
    }
    handed = hand_out(own)
    adopt(own, handed.treespec, handed.leaves)
    assert all(x is y for x, y in zip(leaves_of(own), handed.leaves, strict=True))
    assert own["l"] is layers
    own["d"].weight[...] = 7.0
    assert handed.tree["d"].weight.tolist() == [7.0, 7.0]


def test_adopt_takes_any_mapping_for_a_dict_and_any_array_for_an_array():
    class Lookalike:
        shape = (2,)

    handed = hand_out({"w": a(2), "b": [a(1)]})
    own = UserDict(w=Lookalike(), b=deque([a(1)]))
    adopt(own, handed.treespec, handed.leaves)
    assert own["w"] is handed.tree["w"]
    assert own["b"][0] is handed.tree["b"][0]


@pytest.mark.parametrize(
    ("packed", "own", "said"),
    [
        ({"a": a(1), "w": a(2)}, {"a": a(1), "w": a(3)}, 'params["w"]: must be of shape (2,), got shape (3,)'),
        ({"a": a(1), "w": a(2)}, {"a": a(1), "w": None}, 'params["w"]: must be an array of shape (2,), got None'),
        ({"a": a(1), "w": a(2)}, {"a": a(1)}, 'params: must have the keys "a", "w", got "a"'),
        ({"a": a(1), "w": a(2)}, [a(1), a(2)], 'params: must be a mapping with the keys "a", "w", got a list'),
        (
            {"a": a(1), "t": (a(2),)},
            {"a": a(1), "t": (a(2),)},
            'params["t"][0]: must be in a mutable container, got a tuple; use opt.params',
        ),
        (
            [a(1), Norm(a(2), a(1))],
            [a(1), Norm(a(2), a(1))],
            "params[1].gamma: must be in a mutable container, got a Norm; use opt.params",
        ),
        (
            [a(1), Frozen(a(2), None)],
            [a(1), Frozen(a(2), None)],
            "params[1].first: must be in a mutable container, got a Frozen; use opt.params",
        ),
        (
            [a(1), {"a": a(1)}],
            [a(1), MappingProxyType({"a": a(1)})],
            'params[1]["a"]: must be in a mutable container, got a mappingproxy; use opt.params',
        ),
        (
            [a(1), Bag(a(1))],
            [a(1), Bag(a(1))],
            "params[1][<flat index 'part0'>]: must be in a mutable container, got a Bag; use opt.params",
        ),
        (
            [a(1), ReadOnly(a(1))],
            [a(1), ReadOnly(a(1))],
            "params[1].w: must be settable, got a ReadOnly that refuses (w is read-only); use opt.params",
        ),
        (
            [a(1), {"a": a(1)}],
            [a(1), Deaf(a=a(1))],
            'params[1]["a"]: must be settable, got a Deaf that refuses (it holds another object than the one that was '
            "set); use opt.params",
        ),
        (a(1), a(1), "params: must be a container, got a bare array; use opt.params"),
        (
            [a(1), {"a": a(1)}],
            [a(1), small().tree["bn"]["gamma"]],
            'params[1]: must be a mapping with the keys "a", got a NumPy array',
        ),
        (
            [a(1), {"gamma": a(3), "beta": a(3)}],
            [a(1), small().tree["bn"]],
            'params[1]["gamma"]: must be in a container of your own, got opt.params["bn"]; use opt.params',
        ),
    ],
)
def test_adopt_changes_nothing_where_something_does_not_fit(packed, own, said):
    handed = hand_out(packed)
    before = list(nodes(own))
    with pytest.raises((TypeError, ValueError)) as caught:
        adopt(own, handed.treespec, handed.leaves)
    assert str(caught.value) == said
    if not isinstance(own[1] if isinstance(own, list) else None, Deaf):
        assert all(x is y for x, y in zip(nodes(own), before, strict=True))


def test_a_container_that_stands_twice_in_the_callers_tree_is_left_as_it_was():
    handed = hand_out({"a": {"w": a(1)}, "b": {"w": a(1)}})
    array = a(1)
    shared = {"w": array}
    with pytest.raises(TypeError, match="holds another object"):
        adopt({"a": shared, "b": shared}, handed.treespec, handed.leaves)
    assert shared["w"] is array


def test_an_interrupt_while_adopting_is_undone():
    class Interrupted(dict):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            if key == "b" and not value.any():
                raise KeyboardInterrupt

    handed = hand_out({"a": a(1), "b": a(1)})
    own = Interrupted(a=a(1), b=a(1))
    before = dict(own)
    with pytest.raises(KeyboardInterrupt):
        adopt(own, handed.treespec, handed.leaves)
    assert own["a"] is before["a"]
    assert own["b"] is before["b"]


def test_the_containers_that_are_handed_out_are_freed_at_once():
    """No reference leads from a container to its tree, or the buffers would wait for the garbage collector."""
    tree, leaves, _, _ = hand_out({"a": {"b": [a(2)]}})
    leaf = leaves.pop()
    held = sys.getrefcount(leaf)
    del tree
    assert sys.getrefcount(leaf) < held
