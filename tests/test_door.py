"""The door: leaves that are accepted, converted and refused; and that the compiled pass and the one in Python agree."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import sys
import time
import weakref
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import run

from fastopt.storage import door as module
from fastopt.storage.door import (
    NONE,
    REFUSED,
    Door,
    address_of,
    bounds_of,
    intervals,
    overlapping,
    runs_of,
    sharing,
    usable_array,
)

F4, F8 = np.dtype(np.float32), np.dtype(np.float64)
PASSES = ("compiled", "python")
SHAPE = (2, 3)


class Subclass(np.ndarray):
    pass


@pytest.fixture(params=PASSES)
def each_pass(request, monkeypatch):
    """Runs a test with the compiled pass, which must be there, and with the one in Python."""
    if request.param == "python":
        monkeypatch.setattr(module, "compiled_pass", lambda: None)
    else:
        assert module.compiled_pass() is not None
    return request.param


def taken(door: Door, leaves: list[Any]) -> tuple[list[int], tuple[int, int]]:
    addresses = np.full(len(leaves), 77, np.int64)
    counts = door.take(leaves, addresses)
    assert counts == (np.count_nonzero(addresses == REFUSED), np.count_nonzero(addresses == NONE))
    return addresses.tolist(), counts


def accepts(leaf: Any, shape: tuple[int, ...] = SHAPE, dtype: Any = F4, **options: Any) -> bool:
    """Whether a door accepts a leaf, between two that it accepts."""
    around = np.zeros(shape, dtype)
    addresses, _ = taken(Door([shape] * 3, dtype, **options), [around, leaf, around])
    assert addresses[0] == addresses[2] == address_of(around)
    assert addresses[1] in (REFUSED, address_of(leaf) if isinstance(leaf, np.ndarray) else REFUSED)
    return addresses[1] != REFUSED


def unaligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    memory = np.zeros(math.prod(shape) * dtype.itemsize + 1, np.uint8)
    return memory[1:].view(dtype).reshape(shape)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled pass from the first call on."""
    monkeypatch.setattr(module.Patience, "left", 0)


# --- what the passes accept -------------------------------------------------------------------------------------------

SHAPES = [(), (3,), (0,), (2, 3), (0, 3), (3, 0), (1, 1), (2, 1, 3, 1, 2), (1,) * 32, (2,) * 10]


@pytest.mark.usefixtures("each_pass")
@pytest.mark.parametrize("dtype", [F4, F8, np.dtype(np.float16), np.dtype(np.int64)], ids=str)
def test_arrays_of_all_shapes(dtype):
    arrays: list[Any] = [np.zeros(shape, dtype) for shape in SHAPES]
    for writeable in (False, True):
        addresses, counts = taken(Door(SHAPES, dtype, writeable=writeable), arrays)
        assert counts == (0, 0)
        assert addresses == [address_of(array) for array in arrays]
    arrays[1] = arrays[4] = None
    addresses, counts = taken(Door(SHAPES, dtype), arrays)
    assert counts == (0, 2)
    assert addresses == [NONE if array is None else address_of(array) for array in arrays]
    shifted = [*arrays[1:], arrays[0]]
    addresses, counts = taken(Door(SHAPES, dtype), shifted)
    assert counts == (len(SHAPES) - 2, 2)
    assert addresses == [NONE if array is None else REFUSED for array in shifted]


@pytest.mark.usefixtures("each_pass")
def test_no_leaves_and_a_thousand():
    assert taken(Door([], F4), []) == ([], (0, 0))
    arrays: list[Any] = [np.zeros((4, 16), F4) for _ in range(1000)]
    door = Door([(4, 16)] * 1000, F4)
    assert taken(door, arrays) == ([address_of(array) for array in arrays], (0, 0))
    for k in (0, 15, 16, 17, 983, 984, 999):
        arrays[k] = None if k % 2 else 1.0
    addresses, counts = taken(door, arrays)
    assert counts == (3, 4)
    assert [k for k in range(1000) if addresses[k] == REFUSED] == [0, 16, 984]
    assert [k for k in range(1000) if addresses[k] == NONE] == [15, 17, 983, 999]


def dtype_of_its_own() -> np.dtype[Any]:
    return np.dtype("f4", metadata={"unit": "m"})


ACCEPTED = {
    "an array": lambda: np.zeros(SHAPE, F4),
    "a view": lambda: np.zeros((4, 3), F4)[1:3],
    "one of a buffer": lambda: np.zeros(100, F4)[3:9].reshape(SHAPE),
    "unpickled": lambda: pickle.loads(pickle.dumps(np.zeros(SHAPE, F4))),
    "deep-copied": lambda: copy.deepcopy(np.zeros(SHAPE, F4)),
    "a dtype with metadata": lambda: np.zeros(SHAPE, dtype_of_its_own()),
}
REFUSED_LEAVES = {
    "a list": lambda: [[1.0] * 3] * 2,
    "a tuple": lambda: (),
    "a number": lambda: 1.0,
    "a string": lambda: "a",
    "an object": object,
    "a type": lambda: np.ndarray,
    "a scalar": lambda: np.float32(1.0),
    "a subclass": lambda: np.zeros(SHAPE, F4).view(Subclass),
    "a record array": lambda: np.zeros(SHAPE, F4).view(np.recarray),
    "a masked array": lambda: np.ma.zeros(SHAPE, F4),
    "float64": lambda: np.zeros(SHAPE, F8),
    "int32": lambda: np.zeros(SHAPE, np.int32),
    "uint32": lambda: np.zeros(SHAPE, np.uint32),
    "objects": lambda: np.zeros(SHAPE, object),
    "strings": lambda: np.zeros(SHAPE, "U1"),
    "records": lambda: np.zeros(SHAPE, [("x", "f4")]),
    "times": lambda: np.zeros(SHAPE, "m8[s]"),
    "swapped bytes": lambda: np.zeros(SHAPE, F4.newbyteorder()),
    "the transposed shape": lambda: np.zeros((3, 2), F4),
    "one dimension": lambda: np.zeros(6, F4),
    "three dimensions": lambda: np.zeros((2, 3, 1), F4),
    "no dimension": lambda: np.zeros((), F4),
    "empty": lambda: np.zeros((2, 0), F4),
    "Fortran order": lambda: np.zeros(SHAPE, F4, order="F"),
    "reversed": lambda: np.zeros(SHAPE, F4)[::-1],
    "every other": lambda: np.zeros((2, 6), F4)[:, ::2],
    "broadcast": lambda: np.broadcast_to(np.zeros(3, F4), SHAPE),
    "unaligned": lambda: unaligned(SHAPE, F4),
}


@pytest.mark.usefixtures("each_pass")
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in ACCEPTED.items()])
def test_accepted(make):
    assert accepts(make())
    assert accepts(make(), writeable=True)
    assert accepts(read_only(make()))
    assert not accepts(read_only(make()), writeable=True)
    assert not accepts(make(), dtype=F8)


@pytest.mark.usefixtures("each_pass")
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in REFUSED_LEAVES.items()])
def test_refused(make):
    assert not accepts(make())
    assert not accepts(make(), writeable=True)


@pytest.mark.usefixtures("each_pass")
@pytest.mark.parametrize("order", ["C", "F"])
def test_strides_of_one_element_or_none_do_not_matter(order):
    assert accepts(np.zeros((1, 5), F4, order=order)[:, ::-1][:, ::-1], (1, 5))
    assert accepts(np.zeros((5, 7), F4, order=order)[::5, ::7], (1, 1))
    assert accepts(np.zeros((5, 7), F4, order=order)[5:, ::2], (0, 4))


@pytest.mark.usefixtures("each_pass")
def test_the_dtype_of_the_door_may_be_any_object_of_it():
    for given_dtype in (F4, "f4", np.float32, pickle.loads(pickle.dumps(np.zeros(1, F4))).dtype, dtype_of_its_own()):
        assert accepts(np.zeros(SHAPE, F4), dtype=given_dtype)
    with pytest.raises(ValueError, match=r"^dtype: must be in native byte order, got '[<>]f4'$"):
        Door([SHAPE], F4.newbyteorder())


@pytest.mark.usefixtures("each_pass")
def test_nothing_is_held_or_released():
    leaves = [np.zeros(SHAPE, F4), None, object(), np.zeros(SHAPE, F8)]
    addresses = np.empty(4, np.int64)
    door = Door([SHAPE] * 4, F4)
    door.take(leaves, addresses)
    counted = [*leaves, leaves, addresses]
    before = [sys.getrefcount(item) for item in counted]
    for _ in range(100):
        door.take(leaves, addresses)
    after = [sys.getrefcount(item) for item in counted]
    assert [b - a for a, b in zip(after, before, strict=True)][::2] == [0, 0, 0]
    assert before[3:] == after[3:]


# --- arguments --------------------------------------------------------------------------------------------------------


class ListSubclass(list):
    pass


@pytest.mark.usefixtures("each_pass")
@pytest.mark.parametrize(
    ("leaves", "error", "message"),
    [
        ((None, None), TypeError, r"^leaves: must be a list, got tuple$"),
        (ListSubclass([None, None]), TypeError, r"^leaves: must be a list, got ListSubclass$"),
        (None, TypeError, r"^leaves: must be a list, got NoneType$"),
        (2, TypeError, r"^leaves: must be a list, got int$"),
        (np.zeros(2), TypeError, r"^leaves: must be a list, got ndarray$"),
        ([], ValueError, r"^leaves: must have length 2, got 0$"),
        ([None] * 3, ValueError, r"^leaves: must have length 2, got 3$"),
    ],
)
def test_leaves_are_a_list_of_the_length(leaves, error, message):
    with pytest.raises(error, match=message):
        Door([SHAPE] * 2, F4).take(leaves, np.empty(2, np.int64))


@pytest.mark.usefixtures("each_pass")
@pytest.mark.parametrize(
    ("addresses", "error"),
    [
        ([0, 0], TypeError),
        (None, TypeError),
        (0, TypeError),
        (np.zeros(2, np.int64).view(Subclass), TypeError),
        (np.zeros(2, np.float64), TypeError),
        (np.zeros(2, np.uint64), TypeError),
        (np.zeros(2, np.int32), TypeError),
        (np.zeros(2, np.dtype(np.int64).newbyteorder()), TypeError),
        (np.zeros((), np.int64), ValueError),
        (np.zeros(1, np.int64), ValueError),
        (np.zeros(3, np.int64), ValueError),
        (np.zeros((2, 1), np.int64), ValueError),
        (np.zeros(4, np.int64)[::2], ValueError),
        (unaligned((2,), np.int64), ValueError),
        (read_only(np.zeros(2, np.int64)), ValueError),
    ],
)
def test_addresses_can_be_written(addresses, error):
    with pytest.raises(error, match=r"^addresses: must be "):
        Door([SHAPE] * 2, F4).take([None] * 2, addresses)
    assert np.all(np.asarray(addresses) == addresses)


# --- protected memory -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_pass")
def test_memory_that_no_array_may_overlap():
    buffer = np.zeros(100, F4)
    start = address_of(buffer)
    door = Door([(10,), (10,), (0,)], F4)
    door.protect([start + 4 * 30, start + 4 * 60], [start + 4 * 40, start + 4 * 61])
    for first in range(91):
        for second in (0, 50, first):
            empty = np.ndarray((0,), F4, buffer, 4 * 35)
            assert address_of(empty) == start + 4 * 35
            leaves = [buffer[first : first + 10], buffer[second : second + 10], empty]
            addresses, _ = taken(door, leaves)
            wrong = [20 < k < 40 or 50 < k < 61 for k in (first, second)]
            expected = [REFUSED if bad else start + 4 * k for bad, k in zip(wrong, (first, second), strict=True)]
            assert addresses == [*expected, address_of(empty)]
    door.protect((), ())
    assert taken(door, [buffer[30:40], buffer[60:70], None])[1] == (0, 1)
    door.protect([0], [2**62])
    assert taken(door, [None, buffer[60:70], empty]) == ([NONE, REFUSED, address_of(empty)], (1, 1))


@pytest.mark.usefixtures("each_pass")
def test_an_array_in_its_own_place():
    buffer = np.zeros(20, F4)
    views = [buffer[:6].reshape(SHAPE), buffer[6:12].reshape(SHAPE), buffer[12:18].reshape(SHAPE)]
    door = Door([SHAPE] * 3, F4)
    own = [address_of(views[0]), address_of(views[1]), 0]
    door.protect([address_of(buffer)], [address_of(buffer) + buffer.nbytes], own=own)
    assert taken(door, views) == ([*own[:2], REFUSED], (1, 0))
    assert taken(door, [views[1], views[0], None]) == ([REFUSED, REFUSED, NONE], (2, 1))
    assert taken(door, [buffer[1:7].reshape(SHAPE), views[1].copy(), None])[1] == (1, 1)


@pytest.mark.parametrize(
    ("begins", "ends", "own"),
    [
        ([8], [8], None),
        ([8], [4], None),
        ([0, 4], [8, 12], None),
        ([8, 0], [12, 4], None),
        ([0], [4, 8], None),
        (0, 4, None),
        ([[0]], [[4]], None),
        ([0], [4], [0, 0]),
        ([0], [4], 0),
    ],
)
def test_protected_memory_is_sorted_intervals(begins, ends, own):
    door = Door([SHAPE], F4)
    buffer = np.zeros(SHAPE, F4)
    door.protect(*intervals(np.array([address_of(buffer)]), np.array([buffer.nbytes])))
    with pytest.raises(ValueError, match=r"^(begins, ends|own): must "):
        door.protect(begins, ends, own=own)
    assert taken(door, [buffer]) == ([REFUSED], (1, 0))  # the earlier memory


@pytest.mark.usefixtures("each_pass")
def test_the_door_keeps_what_it_reads():
    door = Door([SHAPE] * 3, F4)
    buffer = np.zeros(SHAPE, F4)
    begins, ends = (np.array([address_of(buffer) + shift]) for shift in (0, buffer.nbytes))
    own = np.zeros(3, np.int64)
    door.protect(begins, ends, own=own)
    begins += 10**6
    ends[:] = 1
    own[0] = address_of(buffer)
    del begins, ends, own
    gc.collect()
    rubbish = [np.full(size, -1, np.int64) for size in range(1, 200)]
    assert taken(door, [buffer, buffer.copy(), None])[0][::2] == [REFUSED, NONE]
    assert len(rubbish) == 199


@pytest.mark.usefixtures("each_pass")
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda door: pickle.loads(pickle.dumps(door))])
def test_a_copy_of_a_door_protects_nothing(again):
    buffer = np.zeros(SHAPE, F4)
    door = Door([SHAPE, ()], F4, writeable=True)
    door.protect([address_of(buffer)], [address_of(buffer) + buffer.nbytes])
    leaves = [buffer, np.zeros((), F4)]
    assert taken(door, leaves)[1] == (1, 0)
    twin = again(door)
    assert (twin.shapes, twin.dtype, twin.writeable) == (door.shapes, door.dtype, door.writeable)
    del door
    gc.collect()
    assert taken(twin, leaves) == ([address_of(leaf) for leaf in leaves], (0, 0))


def test_a_door_is_in_no_reference_cycle():
    door = Door([SHAPE], F4)
    door.take([None], np.empty(1, np.int64))
    gone = weakref.ref(door)
    gc.disable()
    try:
        del door
        assert gone() is None
    finally:
        gc.enable()


# --- both passes ------------------------------------------------------------------------------------------------------

BUFFER = np.zeros(400, np.uint8)
BUFFER = BUFFER[-address_of(BUFFER) % 16 :][:320]
KINDS = [*ACCEPTED.values(), *REFUSED_LEAVES.values()]


@st.composite
def leaves_of(draw: st.DrawFn, dtype: np.dtype[Any]) -> Any:
    if draw(st.booleans()):
        return draw(st.sampled_from([*KINDS, lambda: None]))()
    shape = draw(st.sampled_from([(), (2,), (0,), SHAPE, (3, 2), (2, 1, 3)]))
    kind = draw(st.sampled_from([dtype, dtype, dtype, F4, F8, np.dtype(np.int32), dtype.newbyteorder()]))
    size = math.prod(shape) * kind.itemsize
    start = draw(st.integers(0, (len(BUFFER) - size) // 4)) * 4 + draw(st.sampled_from([0, 0, 0, 0, 1]))
    start = min(start, len(BUFFER) - size)
    array = np.ndarray(shape, kind, BUFFER, start)
    if draw(st.integers(0, 5)) == 0:
        array = array[..., ::-1] if array.ndim else array
    if draw(st.integers(0, 5)) == 0:
        array = array.T
    if draw(st.integers(0, 5)) == 0:
        array = read_only(array[...])
    return array


@st.composite
def cases(draw: st.DrawFn) -> tuple[Door, list[Any]]:
    dtype = draw(st.sampled_from([F4, F8]))
    leaves = draw(st.lists(leaves_of(dtype), max_size=40))
    shapes = [
        leaf.shape
        if isinstance(leaf, np.ndarray) and draw(st.integers(0, 7))
        else draw(st.sampled_from([(), (2,), SHAPE]))
        for leaf in leaves
    ]
    door = Door(
        shapes,
        dtype,
        writeable=draw(st.booleans() | st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes))),
    )
    cuts = sorted(draw(st.sets(st.integers(0, len(BUFFER)), max_size=20)))
    pairs = [(a, b) for a, b in pairwise(cuts) if draw(st.booleans())]
    start = address_of(BUFFER)
    own = None
    if draw(st.booleans()):
        own = [address_of(leaf) if isinstance(leaf, np.ndarray) and draw(st.booleans()) else 0 for leaf in leaves]
    door.protect([start + a for a, _ in pairs], [start + b for _, b in pairs], own=own)
    return door, leaves


@settings(max_examples=400, deadline=None)
@given(cases())
def test_both_passes_agree(case):
    door, leaves = case
    compiled, python = np.empty((2, len(leaves)), np.int64)
    assert door.take(leaves, compiled) == door.take_in_python(leaves, python)
    assert compiled.tolist() == python.tolist()
    header = door._header.protected
    for k, leaf in enumerate(leaves):
        if compiled[k] > 0:
            assert leaf.shape == door.shapes[k]
            assert leaf.dtype == door.dtype
            assert leaf.flags.carray if door.writeable[k] else leaf.flags.c_contiguous and leaf.flags.aligned
            low, high = bounds_of(leaf)
            hits = any(b < high and low < e for b, e in zip(header.begins, header.ends, strict=True)) and low < high
            assert compiled[k] == low
            assert not hits or header.own[k] == low


# --- the layout of the objects ----------------------------------------------------------------------------------------


@pytest.fixture
def _compiled_again():
    module._compile.cache_clear()
    yield
    module._compile.cache_clear()


def test_the_layout_is_known_here():
    assert module.layout_is_known()
    assert module.passes_agree(module.compiled_pass())


@pytest.mark.parametrize("name", ["TYPE", "LIST_SIZE", "DATA", "NDIM", "BASE", "DTYPE", "FLAGS", "SCALAR_TYPE", "KIND"])
def test_another_layout(name, monkeypatch):
    monkeypatch.setattr(module, name, 8 if name == "BASE" else 0)
    assert not module.layout_is_known()


@pytest.mark.usefixtures("_compiled_again")
@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (module.sys, "_is_gil_enabled", lambda: False),
        (module.struct, "calcsize", lambda _: 4),
        (module, "HEAD", 32),
        (module, "LIST_ITEMS", 32),
        (module, "passes_agree", lambda _: False),
    ],
)
def test_on_another_python(owner, name, value, monkeypatch):
    monkeypatch.setattr(owner, name, value, raising=False)
    assert module.compiled_pass() is None
    door = Door([SHAPE] * 2, F4)
    array = np.zeros(SHAPE, F4)
    assert taken(door, [array, 1.0]) == ([address_of(array), REFUSED], (1, 0))
    assert door._entry is None


def test_a_pass_that_finds_something_else_is_not_used():
    right = module.compiled_pass()
    assert not module.passes_agree(lambda leaves, header, addresses: right(leaves, header, addresses) + 1)
    assert not module.passes_agree(lambda leaves, header, addresses: 0)


def test_the_lock_of_python_is_held(monkeypatch):
    """Else another thread could change the list during the pass."""
    from fastopt.kernels import bind

    options = []
    compile_loop = bind.compile_loop
    monkeypatch.setattr(
        bind, "compile_loop", lambda *args, **kwargs: options.append(kwargs) or compile_loop(*args, **kwargs)
    )
    module._compile.__wrapped__()
    assert options == [{"nogil": False}]


def test_the_module_imports_no_numba_and_its_pass_is_kept_on_disk(tmp_path):
    script = f"""
import os, sys
os.environ["FASTOPT_CACHE_DIR"] = {str(tmp_path / "kernels")!r}
from fastopt.storage import door
assert "numba" not in sys.modules
import numpy as np
made = door.Door([(3,)], np.float32)
assert "numba" not in sys.modules
door.Patience.left = 0
assert made.take([np.zeros(3)], np.empty(1, np.int64)) == (1, 0)
assert made._entry is not None
"""
    for _ in range(2):
        finished = run("-c", script)
        assert finished.returncode == 0, finished.stderr
    assert len(list(Path(tmp_path / "kernels").glob("door-*.kernel"))) == 1


# --- leaves that Python looks at --------------------------------------------------------------------------------------


def values(shape: tuple[int, ...] = SHAPE, dtype: Any = F4) -> np.ndarray:
    return np.arange(1, math.prod(shape) + 1).astype(dtype).reshape(shape)


def usable(
    leaf: Any, shape: tuple[int, ...] = SHAPE, dtype: np.dtype[Any] = F4, *, writeable: bool = False
) -> np.ndarray:
    array = usable_array(leaf, shape, dtype, "gradient 'W'", writeable=writeable)
    assert type(array) is np.ndarray
    assert accepts(array, shape, dtype, writeable=writeable) or not array.flags.writeable
    return array


def at_odd_address(array: np.ndarray) -> np.ndarray:
    moved = unaligned(array.shape, array.dtype)
    moved[...] = array
    return moved


COPIED = {
    "Fortran order": lambda: np.asfortranarray(values()),
    "transposed": lambda: values((3, 2)).T,
    "reversed": lambda: values()[::-1, ::-1],
    "every other": lambda: values((2, 6))[:, ::2],
    "broadcast": lambda: np.broadcast_to(np.float32(2.0), SHAPE),
    "unaligned": lambda: at_odd_address(values()),
    "a strided subclass": lambda: values((3, 2)).view(Subclass).T,
    "read-only and strided": lambda: read_only(values((3, 2))).T,
}
IN_PLACE = {
    "a subclass": lambda: values().view(Subclass),
    "a record array": lambda: values().view(np.recarray),
    "metadata": lambda: values().astype(dtype_of_its_own()),
    "an array": values,
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in COPIED.items()])
def test_gradients_that_are_copied(make):
    leaf = make()
    array = usable(leaf)
    assert np.array_equal(array, leaf)
    assert not np.shares_memory(array, leaf)
    with pytest.raises(ValueError, match=r"^gradient 'W': must be (C-contiguous, got strides|aligned, got address)"):
        usable(leaf, writeable=True)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in IN_PLACE.items()])
def test_arrays_that_are_used_where_they_are(make):
    leaf = make()
    for writeable in (False, True):
        assert address_of(usable(leaf, writeable=writeable)) == address_of(leaf)
    leaf.flags.writeable = False
    assert address_of(usable(leaf)) == address_of(leaf)
    with pytest.raises(ValueError, match=r"^gradient 'W': must be writeable, got a read-only array; use param\.copy"):
        usable(leaf, writeable=True)


def test_a_file_is_used_where_it_is(tmp_path):
    file = np.memmap(tmp_path / "W", F4, "w+", shape=SHAPE)
    file[...] = values()
    array = usable(file, writeable=True)
    assert address_of(array) == address_of(file)
    del file
    gc.collect()
    assert np.array_equal(array, values())


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_numbers_for_a_parameter_without_dimensions(dtype):
    for number in (1.5, 2, -0.0, math.inf, math.nan, 1e-320, dtype.type(0.1), 10**30):
        array = usable(number, (), dtype)
        assert array.dtype == dtype
        assert array.tobytes() == np.array(number, dtype).tobytes()
    assert usable(1e300, (), F4) == math.inf
    with pytest.raises(ValueError, match=r"^gradient 'W': must be in the range of float32, got a larger int$"):
        usable(10**400, (), F4)


T, V = TypeError, ValueError
WRONG = [
    (lambda: np.ma.zeros(SHAPE, F4), T, r"must be an array without a mask, got a masked array; use \.filled\(0\)$"),
    (lambda: [1.0], T, r"must be a NumPy array or None, got list$"),
    (lambda: 1.0, T, r"must be a NumPy array or None, got float$"),
    (lambda: 1, T, r"must be a NumPy array or None, got int$"),
    (lambda: True, T, r"must be a NumPy array or None, got bool$"),
    (lambda: "W", T, r"must be a NumPy array or None, got str$"),
    (lambda: Subclass, T, r"must be a NumPy array or None, got type"),
    (object, T, r"must be a NumPy array or None, got object$"),
    (lambda: np.float32(1.0), V, r"must have shape \(2, 3\) as its parameter, got \(\)$"),
    (
        lambda: np.float64(1.0),
        T,
        r"must have dtype float32 as its parameter, got float64; use grad\.astype\('f",
    ),
    (
        lambda: values(dtype=F8),
        T,
        r"must have dtype float32 as its parameter, got float64; use grad\.astype\('f",
    ),
    (lambda: values(dtype=">f4"), T, r"must have dtype float32 as its parameter, got '>f4'; use grad\.astype"),
    (lambda: values(dtype=np.int32), T, r"must have dtype float32 as its parameter, got int32; use grad\.astype"),
    (lambda: values().astype(object), T, r"must have dtype float32 as its parameter, got object; use grad\.astype"),
    (lambda: values((3, 2)), V, r"must have shape \(2, 3\) as its parameter, got \(3, 2\)$"),
    (lambda: values((6,)), V, r"must have shape \(2, 3\) as its parameter, got \(6,\)$"),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG)
def test_gradients_that_are_refused(make, error, message):
    with pytest.raises(error, match=f"^gradient 'W': {message}"):
        usable(make())


@pytest.mark.parametrize("number", [True, np.True_, 1j, "1", np.ma.masked, np.complex64(1.0), None])
def test_what_is_no_number_for_a_parameter_without_dimensions(number):
    with pytest.raises(TypeError, match=r"^gradient 'W': must "):
        usable(number, ())


@pytest.mark.parametrize("number", [1.0, 1, np.float32(1.0), None])
def test_parameters_are_arrays(number):
    with pytest.raises(TypeError, match=r"^gradient 'W': must be a NumPy array, got "):
        usable(number, (), writeable=True)
    with pytest.raises(TypeError, match=r"must have dtype float32, got float64; use param\.astype\('float32'\)$"):
        usable(values(dtype=F8), writeable=True)
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\), got \(6,\)$"):
        usable(values((6,)), writeable=True)


def test_arrays_of_other_libraries():
    class Other:
        def __array__(self) -> np.ndarray:
            return values()

    class Tensor(Other):
        requires_grad = True

    with pytest.raises(TypeError, match=r"got test_door\.Other; use np\.asarray\(grad\)$"):
        usable(Other())
    with pytest.raises(TypeError, match=r"got test_door\.Tensor; it requires grad: use grad\.detach\(\)\.numpy\(\)$"):
        usable(Tensor())


# --- take and examine together ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_pass")
def test_admit():
    leaves: list[Any] = [values(), values((3, 2)).T, None, values().view(Subclass), 2.5, np.float32(3.5)]
    before = list(leaves)
    addresses = np.empty(6, np.int64)
    door = Door([SHAPE] * 4 + [(), ()], F4)
    assert door.admit(leaves, addresses, "abcdef") == 1
    assert leaves[0] is before[0]
    assert leaves[2] is None
    assert addresses.tolist() == [NONE if leaf is None else address_of(leaf) for leaf in leaves]
    assert addresses[3] == address_of(before[3])
    assert [leaf.tolist() for leaf in (leaves[1], *leaves[4:])] == [before[1].tolist(), 2.5, 3.5]
    assert taken(door, leaves)[1] == (0, 1)
    leaves[4] = values()
    with pytest.raises(ValueError, match=r"^gradient 'e': must have shape \(\) as its parameter, got \(2, 3\)$"):
        door.admit(leaves, addresses, "abcdef")
    with pytest.raises(TypeError, match=r"^parameter 'f': must be a NumPy array, got float$"):
        Door([SHAPE], F4, writeable=True).admit([1.5], np.empty(1, np.int64), "f")


@pytest.mark.usefixtures("each_pass")
def test_admit_in_protected_memory():
    params = values((3, 3))
    grads = values((3, 3))
    door = Door([(3, 3)], F4)
    both = intervals(np.array([address_of(params), address_of(grads)]), np.array([36, 36]))
    door.protect(*both, own=[address_of(grads)], whose="the buffers")
    message = r"^gradient 'W': must not overlap the buffers in memory; pass a copy$"
    addresses = np.empty(1, np.int64)
    for leaf in (params, params.T, params[::-1], params.view(Subclass), grads.T, grads[::-1], grads[:, ::-1]):
        with pytest.raises(ValueError, match=message):
            door.admit([leaf], addresses, ["W"])
    for leaf in (grads, grads.view(Subclass), grads[...], read_only(grads[...])):
        assert door.admit([leaf], addresses, ["W"]) == 0
        assert addresses.tolist() == [address_of(grads)]
    door.protect(*both)
    with pytest.raises(ValueError, match=r"must not overlap the parameters in memory"):
        door.admit([grads], addresses, ["W"])
    door = Door([(0, 3)], F4)
    door.protect(*both)
    assert door.admit([params[1:1].view(Subclass)], addresses, ["W"]) == 0


# --- memory -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-1, 60), st.integers(0, 8)), max_size=12))
def test_overlapping_and_intervals(arrays):
    addresses = np.array([a for a, _ in arrays], np.int64)
    sizes = np.array([size for _, size in arrays], np.int64)
    parts = [set(range(a, a + size)) if a > 0 else set() for a, size in arrays]
    pairs = [(i, j) for i, j in combinations(range(len(arrays)), 2) if parts[i] & parts[j]]
    found = overlapping(addresses, sizes)
    assert found in pairs if pairs else found is None
    begins, ends = intervals(addresses, sizes)
    covered = [set(range(b, e)) for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]
    assert set().union(*covered) == set().union(*parts)
    assert (begins < ends).all()
    assert (ends[:-1] < begins[1:]).all()  # those that touch are one
    Door([], F4).protect(begins, ends)


@given(st.data())
def test_bounds(data):
    array: Any = np.zeros((4, 5, 6), F4)
    for axis, size in enumerate(array.shape):
        cut = data.draw(st.slices(size))
        array = array[(slice(None),) * axis + (cut,)]
    array = array.transpose(data.draw(st.permutations(range(3))))
    numpy_bounds = (np.lib.array_utils if hasattr(np.lib, "array_utils") else np).byte_bounds(array)
    low, high = bounds_of(array)
    if array.size:
        assert (low, high) == numpy_bounds
    else:
        assert low == high


def a_view(data: Any, of: np.ndarray) -> np.ndarray:
    """A view of any strides, some of whose elements may be one and the same."""
    view: Any = of.transpose(data.draw(st.permutations(range(of.ndim))))
    for axis, size in enumerate(view.shape):
        view = view[(slice(None),) * axis + (data.draw(st.slices(size)),)]
    if data.draw(st.booleans()):
        view = np.broadcast_to(view, (2, *view.shape))
    return view


@given(data=st.data())
@pytest.mark.parametrize("limits", [{}, {"FEW_PAIRS": 0}, {"HARD": 1}], ids=str)
def test_views_share_memory_only_where_their_elements_do(data, limits):
    whole = np.zeros((4, 5, 6), data.draw(st.sampled_from([F4, F8])))
    arrays = [a_view(data, whole) for _ in range(data.draw(st.integers(0, 6)))]
    pairs = [(i, j) for i, j in combinations(range(len(arrays)), 2) if np.shares_memory(arrays[i], arrays[j])]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(module, name, value)
        found = sharing(arrays)
    assert found in pairs if pairs else found is None
    for array in arrays:
        begins, ends = runs_of(array)
        bytes_of: set[int] = set()
        for element in np.ndindex(array.shape):
            first = address_of(array) + sum(k * stride for k, stride in zip(element, array.strides, strict=True))
            bytes_of.update(range(first, first + array.itemsize))
        assert set().union(*map(range, begins.tolist(), ends.tolist())) == bytes_of
        assert (ends[:-1] < begins[1:]).all()


def test_thousands_of_interleaved_views_are_compared_in_no_time():
    """Each lies in the gaps of all others: 12 million pairs."""
    whole = np.zeros((50, 5_000), F4)
    columns = [whole[:, k] for k in range(5_000)]
    start = time.perf_counter()
    assert sharing(columns) is None
    assert sharing([*columns, whole[10, 4_000:4_001]]) == (4_000, 5_000)
    assert sharing([np.zeros(4_000_000, F4)[k::2] for k in (0, 1)]) is None
    assert time.perf_counter() - start < 5.0


def test_python_makes_the_first_passes_of_a_process(monkeypatch):
    monkeypatch.setattr(module.Patience, "left", 7)
    monkeypatch.setattr(module, "_compile", cache(lambda: None))
    door, addresses = Door([(2,), (3,)], np.float32), np.zeros(2, np.int64)
    calls = []
    monkeypatch.setattr(module, "compiled_pass", lambda: calls.append(1))
    for _ in range(6):
        assert door.take([None, None], addresses) == (0, 2)
    assert len(calls) == 2  # after 8 arrays
