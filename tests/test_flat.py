"""pack: trees to one aligned buffer and back, the chunks that a kernel works on, and offsets beyond 32 bits."""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections import OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
from cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st

import fastopt
from fastopt import rules
from fastopt.kernels.contract import ALIGNMENT, BLOCK, Chunk, Place
from fastopt.step.groups import match_overrides
from fastopt.storage.layout import Layout
from fastopt.storage.trees import NAMESPACE

# --- trees ------------------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    gamma: Any
    beta: Any


@dataclasses.dataclass
class Dense:
    weight: Any
    bias: Any = None


@dataclasses.dataclass(frozen=True)
class Model:
    first: Dense
    norm: Norm
    rest: tuple[Any, ...] = ()


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


@optree.dataclasses.dataclass(namespace=NAMESPACE)
class Registered:
    weight: Any
    name: str = optree.dataclasses.field(default="r", pytree_node=False)


def a(*shape: int) -> np.ndarray:
    return np.full(shape, float(math.prod(shape)))


TREES = [
    (a(3), ("params",)),
    ({"b": a(2), "a": a(3)}, ("a", "b")),
    (OrderedDict(b=a(2), a=a(3)), ("b", "a")),
    (defaultdict(list, b=a(2)), ("b",)),
    ([a(2), a(3)], ("0", "1")),
    ((a(2), [a(3)]), ("0", "1.0")),
    (deque([a(2), a(3)]), ("0", "1")),
    ({1: a(2), 0: a(3)}, ("0", "1")),
    (Norm(a(3), a(3)), ("gamma", "beta")),
    (Dense(a(2, 3), a(3)), ("weight", "bias")),
    (Dense(a(2, 3)), ("weight",)),
    ({"w": a(2), "none": None, "empty": [], "b": a(1)}, ("b", "w")),
    (
        Model(Dense(a(2, 3), a(3)), Norm(a(3), a(3)), (Dense(a(1)), None)),
        ("first.weight", "first.bias", "norm.gamma", "norm.beta", "rest.0.weight"),
    ),
    ({"layers": [{"W": a(2, 2), "b": a(2)}, {"W": a(2, 1)}]}, ("layers.0.W", "layers.0.b", "layers.1.W")),
    ({"bag": Bag(a(2), {"x": a(1)})}, ("bag.part0", "bag.part1.x")),
    ([Registered(a(2), "left"), Registered(a(3), "right")], ("0.weight", "1.weight")),
]
every_tree = pytest.mark.parametrize(("tree", "paths"), TREES, ids=[",".join(paths) for _, paths in TREES])


def leaves_of(tree: Any) -> list[np.ndarray]:
    return optree.tree_leaves(tree, namespace=NAMESPACE)


@every_tree
def test_any_tree_comes_back_in_its_own_types(tree, paths):
    flat = fastopt.pack(tree)
    assert flat.paths == paths
    leaves = [leaf.copy() for leaf in leaves_of(tree)]
    for packed in (flat.params, flat.grads):
        plain = optree.tree_map(lambda leaf: leaf, packed, namespace=NAMESPACE)
        assert optree.tree_structure(plain, namespace=NAMESPACE) == optree.tree_structure(tree, namespace=NAMESPACE)
        assert isinstance(packed, type(tree))
    for leaf, param, grad in zip(leaves, leaves_of(flat.params), leaves_of(flat.grads), strict=True):
        assert param.dtype == grad.dtype == leaf.dtype
        assert param.shape == grad.shape == leaf.shape
        assert (param == leaf).all()
        assert (grad == 0.0).all()


@every_tree
def test_any_tree_can_be_stepped_and_its_gradients_handed_over_in_it(tree, paths):
    opt = fastopt.SGD(tree, lr=0.5)
    grads = optree.tree_map(np.ones_like, tree, namespace=NAMESPACE)
    opt.step(grads)
    for before, after in zip(leaves_of(tree), leaves_of(opt.params), strict=True):
        assert (after == before - 0.5).all()


def test_what_is_no_array_stays_where_it_was_in_a_registered_node():
    assert fastopt.pack(Registered(a(2), "left")).params.name == "left"
    assert fastopt.pack({"a": None, "b": a(2)}).params["a"] is None


def test_attributes_describe_the_layout():
    flat = fastopt.pack({"W": a(2, 3), "b": a(3), "s": a()})
    assert flat.paths == ("W", "b", "s")
    assert flat.shapes == ((2, 3), (3,), ())
    assert flat.offsets == (0, 8, 16)
    assert flat.size == flat.data.size == flat.grad.size == 24
    assert (flat.dtype, flat.backend) == (np.float64, "cpu")
    assert repr(flat) == "<FlatParams: 3 parameters, 10 elements of float64, on cpu>"


# --- memory -----------------------------------------------------------------------------------------------------------

SHAPES = [(), (0,), (0, 3), (1,), (7,), (16,), (17,), (3, 0), (5, 5), (1000,), (2, 3, 4)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_parameter_starts_on_a_64_byte_boundary(dtype):
    flat = fastopt.pack([np.ones(shape, dtype) for shape in SHAPES])
    for buffer in (flat.data, flat.grad, flat.new_buffer()):
        assert buffer.dtype == dtype
        assert buffer.ctypes.data % ALIGNMENT == 0
    assert ALIGNMENT == 64
    for tree in (flat.params, flat.grads):
        for leaf, offset in zip(tree, flat.offsets, strict=True):
            assert leaf.flags.c_contiguous
            assert leaf.flags.writeable
            assert offset * leaf.itemsize % ALIGNMENT == 0
            if leaf.size:
                assert leaf.ctypes.data % ALIGNMENT == 0


def test_leaves_are_views_both_ways():
    flat = fastopt.pack({"W": a(2, 3), "b": a(3)})
    for tree, buffer in ((flat.params, flat.data), (flat.grads, flat.grad)):
        for leaf in tree.values():
            assert np.shares_memory(leaf, buffer)
        tree["W"][1, 2] = 42.0
        assert buffer[5] == 42.0
        buffer[8] = -1.0
        assert tree["b"][0] == -1.0
    assert not np.shares_memory(flat.data, flat.grad)
    assert flat.params is flat.params
    assert flat.grads is flat.grads


def test_the_users_arrays_are_copied_and_never_written():
    original = {"W": a(2, 3), "frozen": a(4)}
    original["frozen"].flags.writeable = False
    before = {name: array.copy() for name, array in original.items()}
    opt = fastopt.Adam(original)
    opt.step({"W": a(2, 3), "frozen": a(4)})
    for name, array in original.items():
        assert (array == before[name]).all()
        assert not np.shares_memory(array, opt.flat.data)
        assert (opt.params[name] != array).all()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4).T,
        np.arange(24.0).reshape(4, 6)[::2, ::-1],
        np.broadcast_to(2.0, (3, 4)),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
    ids=["transposed", "strided", "broadcast", "fortran"],
)
def test_arrays_of_any_memory_order_are_packed(array):
    flat = fastopt.pack([array])
    assert (flat.params[0] == array).all()
    assert (flat.data[: array.size] == array.ravel()).all()


@pytest.mark.parametrize(
    ("source", "dtype"), [(s, d) for s in ("f2", "f4", "f8", "g") for d in ("float32", np.float64)]
)
def test_dtype_converts(source, dtype):
    array = np.linspace(-1.0, 1.0, 7).astype(source)
    flat = fastopt.pack({"w": array}, dtype=dtype)
    assert flat.dtype == flat.params["w"].dtype == np.dtype(dtype)
    assert (flat.params["w"] == array.astype(dtype)).all()


def test_dtype_converts_a_mixture():
    flat = fastopt.pack([np.ones(3, np.float32), np.full(3, 1 / 3)], dtype=np.float32)
    assert flat.params[1].tolist() == [np.float32(1 / 3)] * 3


def test_empty_and_0_d_parameters_step_along():
    opt = fastopt.Adam({"none": np.ones((0, 3)), "w": np.ones(2), "scalar": np.ones(())}, lr=0.5)
    opt.step({"none": np.ones((0, 3)), "w": np.ones(2), "scalar": np.ones(())})
    assert opt.params["none"].shape == (0, 3)
    assert opt.params["scalar"].shape == ()
    assert opt.params["scalar"] == opt.params["w"][0] == pytest.approx(0.5)
    empty = fastopt.Adam([np.ones(0)])
    empty.step([np.ones(0)])
    assert (empty.step_count, empty.flat.size) == (1, 0)


def one_case_per_rule() -> list[Case]:
    found: dict[str, Case] = {}
    for case in CASES:
        found.setdefault(case.rule.name, case)
    return list(found.values())


@pytest.mark.parametrize("case", one_case_per_rule(), ids=str)
def test_padding_is_zero_and_stays_zero(case):
    """Even without eps, where a step on zeros is 0/0, and with weight decay."""
    options = {"weight_decay": 0.1}
    if "eps" in case.rule.names() and case.rule.matrixwise is None:  # singular matrices
        options["eps"] = 0.0
    shapes = [(3,), (), (17,), (0,), (4, 5)]
    opt = case.make([np.ones(shape, np.float32) for shape in shapes], **options)
    padding = np.ones(opt.flat.size, bool)
    for view in opt.flat.views(padding):
        view[...] = False
    assert padding.sum() == 13 + 15 + 15 + 12
    # Garbage in the gradient's padding must not reach the parameters.
    opt.flat.grad[padding] = 7.0
    for step in range(3):
        for grad in opt.grads:
            grad[...] = 1.0 + step
        opt.step()
    for buffer in (opt.flat.data, *opt._pipeline.states):
        assert (buffer[padding] == 0.0).all()
        assert np.isfinite(buffer).all()
    # Adadelta without eps never starts to move, but its states do.
    changed = [opt.flat.data[~padding] != 1.0, *(state[~padding] != 0.0 for state in opt._pipeline.states)]
    assert any(each.all() for each in changed)


# --- layouts and chunks -----------------------------------------------------------------------------------------------

vectors = st.integers(0, 3 * BLOCK).map(lambda size: (size,))
shapes = st.lists(vectors | st.sampled_from([(), (0, 3), (2, 3), (64, 64)]), min_size=1, max_size=6)


@given(shapes, st.sampled_from([4, 8]))
def test_layout_invariants(shapes, itemsize):
    layout = Layout.of(shapes, itemsize)
    assert layout.sizes == tuple(math.prod(shape) for shape in shapes)
    ends = [offset + size for offset, size in zip(layout.offsets, layout.sizes, strict=True)]
    for end, following in zip(ends, [*layout.offsets[1:], layout.size], strict=True):
        assert 0 <= (following - end) * itemsize < ALIGNMENT  # one after the other, with less than a line between
    assert all(offset * itemsize % ALIGNMENT == 0 for offset in (*layout.offsets, layout.size))


def own_neighbours(layout: Layout, itemsize: int) -> list[bool]:
    """Of parameters and gradients that are packed into one buffer each."""
    at = np.array(layout.offsets, np.int64) * itemsize
    return layout.neighbours(layout.places(at, at), itemsize)


@given(shapes, st.integers(0, 2**40), st.integers(0, 2**40))
def test_places_are_the_addresses_and_the_offsets(shapes, p, g):
    layout = Layout.of(shapes)
    at = np.arange(len(shapes)) + p
    places = layout.places(at, g)
    assert places.dtype == np.int64
    assert places.flags.c_contiguous
    assert [Place(*line) for line in places.tolist()] == [
        Place(p + k, g, offset, 0) for k, offset in enumerate(layout.offsets)
    ]


@given(st.data(), shapes, st.sampled_from([4, 8]))
def test_neighbours_follow_each_other_in_parameters_gradients_and_states(data, shapes, itemsize):
    layout = Layout.of(shapes, itemsize)
    columns = []
    for _ in range(2):  # parameters and gradients, with a gap, an overlap or nothing before each
        gaps = data.draw(st.lists(st.sampled_from([0, 0, 0, 4, -4]), min_size=len(shapes), max_size=len(shapes)))
        at = 4096
        column = []
        for gap, size in zip(gaps, layout.sizes, strict=True):
            column.append(at + gap)
            at += gap + size * itemsize
        columns.append(column)
    places = layout.places(*(np.array(column, np.int64) for column in columns))
    found = layout.neighbours(places, itemsize)
    assert found == [False] + [
        all(column[k] == column[k - 1] + layout.sizes[k - 1] * itemsize for column in columns)
        and layout.offsets[k] == layout.offsets[k - 1] + layout.sizes[k - 1]
        for k in range(1, len(shapes))
    ]


@settings(deadline=None)
@given(st.data(), shapes, st.sampled_from([4, 8]), st.booleans(), st.none() | st.integers(1, 20_000))
def test_chunk_invariants(data, shapes, itemsize, whole, longest):
    layout = Layout.of(shapes, itemsize)
    groups = data.draw(st.lists(st.integers(-1, 2), min_size=len(shapes), max_size=len(shapes)))
    neighbours = data.draw(
        st.none() | st.just(own_neighbours(layout, itemsize)) | st.tuples(*[st.booleans()] * len(shapes)).map(list)
    )
    chunks = layout.chunks(groups, neighbours=neighbours, whole=whole, longest=longest)
    assert chunks.dtype == np.int64
    assert chunks.shape[1:] == (len(Chunk._fields),)
    assert chunks.flags.c_contiguous

    # The elements of all parameters are numbered one after the other, as if there were no gaps.
    first = [sum(layout.sizes[:k]) for k in range(len(shapes))]
    owner = np.repeat(np.arange(len(shapes)), layout.sizes)
    found = np.full(len(owner), -1)
    end = block = 0
    for chunk in map(Chunk._make, chunks.tolist()):
        start, stop = first[chunk.place] + chunk.start, first[chunk.place] + chunk.stop
        assert end <= start < stop  # in order, none empty, no overlap
        assert chunk.start >= 0
        assert chunk.grad == chunk.start
        assert groups[chunk.place] == chunk.group
        members = range(chunk.place, int(owner[stop - 1]) + 1)
        if whole or neighbours is None:
            assert list(members) == [chunk.place]  # what is not joined ends with its parameter
        for k in members[1:]:
            assert neighbours[k]
            assert layout.sizes[k] > 0
            assert groups[k] == chunk.group
        unit = BLOCK if whole else 16
        assert chunk.start % unit == 0  # partial sums do not depend on the chunks; vector loads start on a line
        if longest is not None:
            assert stop - start <= max(longest, unit)
        assert chunk.block == block
        block += -(-(stop - start) // BLOCK)
        found[start:stop] = chunk.group
        end = stop
    assert found.tolist() == np.repeat(groups, layout.sizes).tolist()  # every element once, those of group -1 never


@settings(deadline=None)
@given(st.data(), shapes, st.integers(1, 20_000))
def test_partial_sums_do_not_depend_on_the_length_of_chunks(data, shapes, longest):
    layout = Layout.of(shapes)
    groups = data.draw(st.lists(st.integers(-1, 2), min_size=len(shapes), max_size=len(shapes)))

    def blocks(longest: int | None) -> list[tuple[int, int, int, int]]:
        found = []
        for chunk in map(Chunk._make, layout.chunks(groups, whole=True, longest=longest).tolist()):
            for k, start in enumerate(range(chunk.start, chunk.stop, BLOCK)):
                found.append((chunk.block + k, chunk.place, start, min(start + BLOCK, chunk.stop)))
        return found

    assert blocks(longest) == blocks(None)


def test_a_chunk_goes_on_into_neighbours_of_its_group():
    layout = Layout.of([(16,), (32,), (5,), (16,)])
    neighbours = own_neighbours(layout, 4)
    assert neighbours == [False, True, True, False]

    def found(groups: list[int], **how: Any) -> list[tuple[int, int, int, int]]:
        chunks = list(map(Chunk._make, layout.chunks(groups, **how).tolist()))
        assert all(chunk.grad == chunk.start for chunk in chunks)
        assert [chunk.block for chunk in chunks] == list(range(len(chunks)))
        return [(chunk.place, chunk.start, chunk.stop, chunk.group) for chunk in chunks]

    assert found([0, 0, 0, 0], neighbours=neighbours) == [(0, 0, 53, 0), (3, 0, 16, 0)]
    assert found([0, 1, 1, 1], neighbours=neighbours) == [(0, 0, 16, 0), (1, 0, 37, 1), (3, 0, 16, 1)]
    assert found([0, -1, 0, 0], neighbours=neighbours) == [(0, 0, 16, 0), (2, 0, 5, 0), (3, 0, 16, 0)]
    alone = [(0, 0, 16, 0), (1, 0, 32, 0), (2, 0, 5, 0), (3, 0, 16, 0)]
    assert found([0, 0, 0, 0]) == alone
    assert found([0, 0, 0, 0], neighbours=neighbours, whole=True) == alone


def test_an_empty_parameter_is_in_no_chunk():
    layout = Layout.of([(16,), (0,), (16,)])
    chunks = layout.chunks([0, 0, 0], neighbours=own_neighbours(layout, 4))
    assert chunks[:, :3].tolist() == [[0, 0, 16], [2, 0, 16]]


def test_packed_parameters_are_neighbours_and_those_of_the_caller_where_they_are():
    flat = fastopt.pack([np.ones(8), np.ones(8), np.ones(3), np.ones(8)])
    assert flat.neighbours == [False, True, True, False]
    base = np.ones(24)
    assert fastopt.pack([base[:8], base[8:16], base[16:]], copy=False).neighbours == [False, True, True]
    assert fastopt.pack([base[8:16], base[:8], base[16:]], copy=False).neighbours == [False] * 3


def test_nothing_to_do_is_an_empty_table():
    for layout, groups in ((Layout.of([(0,)]), [0]), (Layout.of([(5,), (6,)]), [-1, -1])):
        for whole in (False, True):
            assert layout.chunks(groups, whole=whole).shape == (0, len(Chunk._fields))
            assert layout.chunks(groups, whole=whole).dtype == np.int64


def test_a_group_for_every_parameter_is_needed():
    with pytest.raises(ValueError, match="zip"):
        Layout.of([(5,), (6,)]).chunks([0])


# --- beyond 32 bits ---------------------------------------------------------------------------------------------------

HUGE = [(2**31 - 1,), (3,), (2**31 + 5,), (3, 2**30), (2**20, 2**13 + 1), (7,)]


@pytest.mark.parametrize("itemsize", [4, 8])
def test_offsets_beyond_32_bits_are_exact(itemsize):
    layout = Layout.of(HUGE, itemsize)
    step = ALIGNMENT // itemsize
    assert layout.size > 2**33
    end = 0
    for shape, size, offset in zip(HUGE, layout.sizes, layout.offsets, strict=True):
        assert type(size) is type(offset) is int
        assert size == math.prod(shape)
        assert offset == end
        end = (end + size + step - 1) // step * step
    assert layout.size == end
    vast = Layout.of([(2**40, 2**40), (1,)], itemsize)  # beyond 64 bits too: no array, no overflow
    assert vast.offsets == (0, 2**80)


@pytest.mark.parametrize(("longest", "whole"), [(None, False), (2**28, False), (2**31 + 1, False), (2**24, True)])
def test_chunks_beyond_32_bits_cover_every_parameter_once(longest, whole):
    layout = Layout.of(HUGE)
    chunks = layout.chunks([0, 1, 0, 1, 0, -1], whole=whole, longest=longest)
    assert chunks.dtype == np.int64
    of = Chunk(*chunks.T)
    assert (of.start < of.stop).all()
    assert (of.grad == of.start).all()
    assert (np.diff(of.place) >= 0).all()
    for k, size in enumerate(layout.sizes):
        own = of.place == k
        if k == 5:
            assert not own.any()
            continue
        assert of.start[own][0] == 0
        assert of.stop[own][-1] == size
        assert (of.stop[own][:-1] == of.start[own][1:]).all()
        assert (of.group[own] == k % 2).all()
    assert int((of.stop - of.start).sum()) == sum(layout.sizes[:5])
    lengths = (of.stop - of.start + BLOCK - 1) // BLOCK
    assert (of.block[1:] == np.cumsum(lengths)[:-1]).all()


def test_a_joined_run_beyond_32_bits_counts_from_its_first_parameter():
    layout = Layout.of([(2**31,), (2**32,), (5,)])
    neighbours = own_neighbours(layout, 4)
    assert neighbours == [False, True, True]
    of = Chunk(*layout.chunks([0, 0, 0], neighbours=neighbours, longest=2**30).T)
    assert not of.place.any()
    assert of.start[0] == 0
    assert (of.stop[:-1] == of.start[1:]).all()
    assert of.stop[-1] == sum(layout.sizes)


def sparse(size: int, dtype: Any) -> np.ndarray:
    """`size` elements of address space, of which only what is touched takes memory."""
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, size * np.dtype(dtype).itemsize, flags=flags)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        pytest.skip(f"no {size * np.dtype(dtype).itemsize:,} bytes of unreserved address space here: {error}")
    return np.frombuffer(memory, dtype)


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_kernels_reach_elements_beyond_32_bits(name):
    rule = getattr(rules, name)
    near = 4 * BLOCK + 11
    far = 2**31 + 2 * BLOCK
    rng = np.random.default_rng(8)
    values = rng.normal(size=(2, near)).astype(np.float32)

    buffers = [sparse(far + near, np.float32) for _ in range(2 + len(rule.states))]
    for buffer, some in zip(buffers, values, strict=False):
        buffer[far:] = some
    alone = [*values.copy(), *np.zeros((len(rule.states), near), np.float32)]
    rule.update_(*alone, t=1)

    opt = fastopt.Optimizer([np.ones(1, np.float32)], rule)  # for its kernel, and its table as of the first step
    plan = opt._pipeline.plan
    plan.write_table(opt._pipeline.groups, 1, 1.0)
    chunks = np.array([Chunk(0, far, far + near, far, 0, 0)], np.int64)
    p, g, *states = buffers
    places = np.array([Place(p.ctypes.data, g.ctypes.data, 0, 0)], np.int64)
    plan.kernel(scaled=False).launch(places, tuple(states), plan.table.array, chunks, near)
    for buffer, expected in zip(buffers, alone, strict=True):
        assert buffer[far:].tobytes() == expected.tobytes()
        assert not buffer[: 2 * BLOCK].any()  # where an index cut to 32 bits would have written
        assert not buffer[far - BLOCK : far].any()
    assert (alone[0] != values[0]).mean() > 0.9


# --- globs ------------------------------------------------------------------------------------------------------------


def test_globs():
    paths = ("head.bias", "head.weight", "layers.0.bias", "layers.10.bias")
    assert match_overrides(paths, {}) == [{}, {}, {}, {}]
    assert match_overrides(paths, {"*.bias": {"lr": 1}, "layers.*": {"lr": 2, "eps": 3}}) == [
        {"lr": 1},
        {},
        {"lr": 2, "eps": 3},
        {"lr": 2, "eps": 3},
    ]
    assert match_overrides(paths, {"layers.?.bias": {"lr": 1}}) == [{}, {}, {"lr": 1}, {}]
    assert match_overrides(paths, {"layers.[01]*": {"lr": 1}, "*": {"eps": 2}})[2:] == [{"lr": 1, "eps": 2}] * 2
