"""Specification of fastopt.batches: every row once per epoch, paired arrays, seeds, views, memory, refusals."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastopt.batches import Minibatches, minibatches

Array = NDArray[Any]


def numbered(rows: int) -> tuple[Array, Array]:
    """Return features and labels in which every row encodes its number."""
    y = np.arange(rows)
    return y[:, None] * 10.0 + np.arange(3), y


def epoch_order(batches: Minibatches[Any]) -> list[int]:
    """Return the row numbers in the order of one epoch, read from the labels (the second array)."""
    return [int(n) for batch in batches for n in batch[1]]


# --- properties -------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(0, 200),
    batch_size=st.integers(1, 250) | st.just("full"),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
    epochs=st.integers(1, 3),
)
def test_every_epoch_visits_each_row_once_in_batches_of_the_requested_size(
    rows: int, batch_size: Any, seed: int, shuffle: bool, epochs: int
) -> None:
    X, y = numbered(rows)
    X_before, y_before = X.copy(), y.copy()
    batches = minibatches(X, y, batch_size=batch_size, rng=seed, shuffle=shuffle)
    size = max(rows, 1) if batch_size == "full" else batch_size
    for _ in range(epochs):
        seen = list(batches)
        assert len(seen) == len(batches) == math.ceil(rows / size)
        assert [len(yb) for _, yb in seen] == [size] * (rows // size) + ([rows % size] if rows % size else [])
        for xb, yb in seen:
            assert (xb == yb[:, None] * 10.0 + np.arange(3)).all()  # x and y stay paired
            assert (xb.dtype, yb.dtype) == (X.dtype, y.dtype)
        assert sorted(int(n) for _, yb in seen for n in yb) == list(range(rows))
    assert np.array_equal(X, X_before)
    assert np.array_equal(y, y_before)


@given(rows=st.integers(1, 100), batch_size=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_drop_last_drops_the_short_batch_and_nothing_else(rows: int, batch_size: int, seed: int) -> None:
    batch_size = min(batch_size, rows)
    whole = list(minibatches(*numbered(rows), batch_size=batch_size, rng=seed))
    cut = minibatches(*numbered(rows), batch_size=batch_size, rng=seed, drop_last=True)
    seen = list(cut)
    assert len(cut) == len(seen) == rows // batch_size
    for (_, expected), (_, found) in zip(whole, seen, strict=False):
        assert len(found) == batch_size
        assert (expected == found).all()
    unshuffled = list(minibatches(np.arange(rows), batch_size=batch_size, shuffle=False, drop_last=True))
    assert [len(batch) for batch in unshuffled] == [batch_size] * (rows // batch_size)


@given(rows=st.integers(30, 200), batch_size=st.integers(1, 64), seed=st.integers(0, 2**32))
def test_epochs_differ_and_a_seed_fixes_their_series(rows: int, batch_size: int, seed: int) -> None:
    first = minibatches(*numbered(rows), batch_size=batch_size, rng=seed)
    again = minibatches(*numbered(rows), batch_size=batch_size, rng=seed)
    generated = minibatches(*numbered(rows), batch_size=batch_size, rng=np.random.default_rng(seed))
    orders = [epoch_order(first) for _ in range(4)]
    assert len({tuple(order) for order in orders}) == 4  # 30! orders: two equal ones are a bug, not chance
    assert list(range(rows)) not in orders
    assert [epoch_order(again) for _ in range(4)] == orders
    assert [epoch_order(generated) for _ in range(4)] == orders


@given(rows=st.integers(1, 60), seed=st.integers(0, 2**32), sizes=st.lists(st.integers(1, 70), min_size=2, max_size=2))
def test_the_batch_size_cuts_the_order_and_does_not_change_it(rows: int, seed: int, sizes: list[int]) -> None:
    one, other = (epoch_order(minibatches(*numbered(rows), batch_size=size, rng=seed)) for size in sizes)
    assert one == other


@given(
    rows=st.integers(0, 40),
    tail=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(["f4", "f8", "i8", "u1", "?", "c8", ">f4", "U3", "M8[s]", "O", "f4,i2"]),
    layout=st.sampled_from(["C", "F", "every second", "backwards", "inner columns", "unaligned"]),
    batch_size=st.integers(1, 45),
    seed=st.integers(0, 2**32),
)
def test_any_dtype_shape_and_layout_equals_indexing(
    rows: int, tail: list[int], dtype: str, layout: str, batch_size: int, seed: int
) -> None:
    plain = np.random.default_rng(seed).integers(0, 100, (rows, *tail)).astype(dtype)
    X = relaid(plain, layout)
    order = np.random.default_rng(seed).permutation(rows)
    expected = [plain[order[start : start + batch_size]] for start in range(0, rows, batch_size)]
    found = list(minibatches(X, batch_size=batch_size, rng=seed))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is np.ndarray
        assert one.dtype == plain.dtype
        assert not np.shares_memory(one, X)
        np.testing.assert_array_equal(one, other)


def relaid(plain: Array, layout: str) -> Array:
    """Return the same values in another memory layout."""
    if layout == "F":
        return np.asfortranarray(plain)
    if layout == "every second":
        wide = np.zeros((2 * len(plain), *plain.shape[1:]), plain.dtype)
        wide[::2] = plain
        return wide[::2]
    if layout == "backwards":
        return plain[::-1].copy()[::-1]
    if layout == "inner columns" and plain.ndim > 1:
        wide = np.zeros((*plain.shape[:-1], plain.shape[-1] + 2), plain.dtype)
        wide[..., 1:-1] = plain
        return wide[..., 1:-1]
    if layout == "unaligned" and plain.size and not plain.dtype.hasobject:
        return np.frombuffer(b"\0" + plain.tobytes(), np.uint8)[1:].view(plain.dtype).reshape(plain.shape)
    return plain


# --- batches ----------------------------------------------------------------------------------------------------------


def test_one_array_yields_arrays_several_yield_tuples() -> None:
    X, y = numbered(10)
    weights = np.linspace(0, 1, 10)
    assert all(type(batch) is np.ndarray for batch in minibatches(X, rng=0))
    assert [type(batch) for batch in minibatches(X, y=y, rng=0)] == [tuple]
    assert [len(batch) for batch in minibatches(X, y, weights, y * 2, rng=0)] == [4]
    for xb, yb, wb, doubled in minibatches(X, y, weights, y * 2, batch_size=3, rng=0):
        assert (xb[:, 0] == 10 * yb).all()
        assert (wb == weights[yb]).all()
        assert (doubled == 2 * yb).all()


@pytest.mark.parametrize("batch_size", [3, 100])
def test_the_caller_may_keep_and_change_shuffled_batches(batch_size: int) -> None:
    X, y = numbered(10)
    X_before = X.copy()
    kept = list(minibatches(X, y, batch_size=batch_size, rng=0))
    copies = [(xb.copy(), yb.copy()) for xb, yb in kept]
    for (xb, yb), (xc, yc) in zip(kept, copies, strict=True):  # later batches do not reuse earlier memory
        assert (xb == xc).all()
        assert (yb == yc).all()
        xb[...] = -1
        assert xb.flags.c_contiguous
    assert np.array_equal(X, X_before)


@pytest.mark.parametrize("settings", [{"shuffle": False, "batch_size": 4}, {"batch_size": "full"}], ids=str)
def test_unshuffled_batches_are_views_in_order(settings: dict[str, Any]) -> None:
    X, y = numbered(10)
    batches = minibatches(X, y, **settings)
    for _ in range(2):
        assert epoch_order(batches) == list(range(10))
    for xb, yb in batches:
        assert np.shares_memory(xb, X)
        assert np.shares_memory(yb, y)


def test_full_draws_nothing_from_the_generator() -> None:
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    list(minibatches(np.arange(10), batch_size="full", rng=rng))
    list(minibatches(np.arange(10), shuffle=False, rng=rng))
    assert rng.bit_generator.state == state


def test_without_a_seed_two_objects_differ() -> None:
    assert epoch_order(minibatches(*numbered(50))) != epoch_order(minibatches(*numbered(50)))


def test_epochs_may_overlap_and_be_abandoned() -> None:
    plain = minibatches(*numbered(40), batch_size=7, rng=0)
    orders = [epoch_order(plain) for _ in range(3)]
    mixed = minibatches(*numbered(40), batch_size=7, rng=0)
    abandoned = iter(mixed)
    next(abandoned)
    side_by_side = [iter(mixed), iter(mixed)]
    batches = list(itertools.zip_longest(*side_by_side))
    assert [[int(n) for pair in batches for n in pair[k][1]] for k in (0, 1)] == orders[1:]


def test_the_defaults() -> None:
    batches = minibatches(np.arange(130))
    assert [len(batch) for batch in batches] == [64, 64, 2]
    assert repr(batches) == "<Minibatches of (130,), shuffled: 3 batches of 64>"
    assert repr(minibatches(*numbered(5), shuffle=False)) == "<Minibatches of (5, 3), (5,), in order: 1 batches of 64>"


def test_numpy_numbers_and_huge_batch_sizes() -> None:
    assert len(minibatches(np.arange(10), batch_size=np.int32(3), rng=np.int64(4))) == 4  # type: ignore[arg-type]
    (batch,) = minibatches(np.arange(10), batch_size=10**30, rng=0)
    assert sorted(batch) == list(range(10))


def test_later_changes_of_the_data_appear_in_the_batches() -> None:
    X = np.zeros((4, 2))
    batches = minibatches(X, batch_size=2, rng=0)
    X += 1
    assert all((batch == 1).all() for batch in batches)


@pytest.mark.parametrize("settings", [{}, {"shuffle": False}, {"batch_size": "full"}, {"drop_last": True}], ids=str)
def test_no_rows_give_no_batches(settings: dict[str, Any]) -> None:
    batches = minibatches(np.empty((0, 3)), np.empty(0), **settings)
    assert len(batches) == 0
    assert list(batches) == []


def test_lists_and_other_libraries_arrays_are_accepted() -> None:
    assert sorted(int(n) for batch in minibatches([1, 2, 3], batch_size=2) for n in batch) == [1, 2, 3]
    torch = pytest.importorskip("torch", reason="a torch tensor is the foreign array of this test")
    X = torch.arange(6.0).reshape(3, 2)
    (batch,) = minibatches(X, shuffle=False)
    assert type(batch) is np.ndarray
    batch[0, 0] = 9.0
    assert X[0, 0] == 9.0  # the batch is a view


# --- memory and imports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["C", "F", "every second", "inner columns"])
def test_an_epoch_never_copies_the_data(layout: str) -> None:
    X = relaid(np.zeros((20_000, 50), np.float32), layout)  # 4 MB; its permutation takes 0.16 MB, a batch 0.02 MB
    batches = minibatches(X, batch_size=100, rng=0)
    tracemalloc.start()
    for _batch in batches:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_a_memory_mapped_array_is_read_batch_by_batch_into_plain_arrays(tmp_path: Any) -> None:
    X, _ = numbered(20)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    seen = list(minibatches(mapped, batch_size=6, rng=0))
    assert all(type(batch) is np.ndarray and batch.flags.writeable for batch in seen)
    assert (np.sort(np.concatenate(seen), axis=0) == X).all()


def test_batches_need_no_numba() -> None:
    """The modules for data, weights and schedules import no heavy package; run without the package's own import."""
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('fastopt'); package.__path__ = sys.argv[1:]; sys.modules['fastopt'] = package\n"
        "import fastopt.batches, fastopt.init, fastopt.schedules\n"
        "print([name for name in ('numba', 'torch', 'scipy') if name in sys.modules])\n"
    )
    folder = sys.modules["fastopt.batches"].__file__.rpartition("/")[0]  # type: ignore[union-attr]
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.strip() == "[]", run.stderr


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("options", [{"rng": 3}, {"shuffle": False}], ids=str)
def test_the_parts_of_a_batch_are_the_batch(parts, drop_last, options):
    X, y = np.arange(46.0).reshape(23, 2), np.arange(23)
    arguments = {"batch_size": 5, "drop_last": drop_last, **options}
    whole = minibatches(X, y, **arguments)
    each = [minibatches(X, y, part=(rank, parts), **arguments) for rank in range(parts)]
    assert {len(own) for own in each} == {len(whole)}
    for _ in range(2):
        for (xb, yb), *pieces in zip(whole, *each, strict=True):
            np.testing.assert_array_equal(np.concatenate([piece[0] for piece in pieces]), xb)
            np.testing.assert_array_equal(np.concatenate([piece[1] for piece in pieces]), yb)
            sizes = [len(piece[1]) for piece in pieces]
            assert max(sizes) - min(sizes) <= 1
    assert repr(each[0]).endswith(f"batches of 5, part 0 of {parts}>")


# --- refusals ---------------------------------------------------------------------------------------------------------

X10, Y10 = np.zeros((10, 3)), np.zeros(10)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: minibatches(X10, np.zeros(9)),
            ValueError,
            r"arrays: must .* same number of rows .*got X with 10, y with 9",
        ),
        (
            lambda: minibatches(X10, Y10, Y10, np.zeros(3)),
            ValueError,
            r"X with 10, y with 10, more\[0\] with 10, more\[1\] with 3",
        ),
        (lambda: minibatches(np.float64(3)), ValueError, r"X: must have a first axis .*got float64 without axes"),
        (lambda: minibatches(X10, 64), ValueError, r"y: must have a first axis .*got int .*batch_size=64"),
        (lambda: minibatches(X10, Y10, 64), ValueError, r"more\[0\]: must have a first axis .*batch_size=64"),
        (lambda: minibatches(X10, {"a": Y10}), ValueError, r"y: must have a first axis .*got dict"),
        (lambda: minibatches([[1.0], [1.0, 2.0]]), ValueError, r"X: must be an array whose first axis .*got list"),
        (lambda: minibatches(None), ValueError, r"X: must have a first axis .*got NoneType"),
        (lambda: minibatches(X10, None, Y10), TypeError, r"y: must be an array if more arrays follow, got None"),
        (
            lambda: minibatches(X10, np.ma.masked_array(Y10)),
            TypeError,
            r"y: must be an array without a mask, got a masked array; .*y.filled",
        ),
        (lambda: minibatches(X10, batch_size=0), ValueError, r"batch_size: must be an int >= 1 or 'full', got 0"),
        (lambda: minibatches(X10, batch_size=-5), ValueError, r"batch_size: must be .*got -5"),
        (lambda: minibatches(X10, batch_size=3.0), TypeError, r"batch_size: must be .*got 3.0"),
        (lambda: minibatches(X10, batch_size=True), TypeError, r"batch_size: must be .*got True"),
        (lambda: minibatches(X10, batch_size=None), TypeError, r"batch_size: must be .*got None"),
        (
            lambda: minibatches(X10, batch_size="all"),
            ValueError,
            r"batch_size: must be an int >= 1 or 'full', got 'all'",
        ),
        (
            lambda: minibatches(X10, drop_last=True),
            ValueError,
            r"batch_size: must be at most the number of rows, 10, with drop_last=True, got 64; pass",
        ),
        (lambda: minibatches(X10, drop_last=1), TypeError, r"drop_last: must be True or False, got 1"),
        (lambda: minibatches(X10, shuffle="yes"), TypeError, r"shuffle: must be True or False, got 'yes'"),
        (lambda: minibatches(X10, rng=-1), ValueError, r"rng: must be a seed >= 0, got -1"),
        (lambda: minibatches(X10, rng="0"), TypeError, r"rng: must be None, an int seed or a numpy.random.Generator"),
        (lambda: minibatches(X10, rng=0.5, shuffle=False), TypeError, r"rng: must be None"),
        (lambda: minibatches(X10, rng=0, part=1), TypeError, r"part: must be a tuple \(rank, size\), got 1"),
        (lambda: minibatches(X10, rng=0, part=(2, 2)), ValueError, r"part: must have a rank below its size 2, got 2"),
        (lambda: minibatches(X10, rng=0, part=(-1, 2)), ValueError, r"part: rank: must be an int >= 0, got -1"),
        (lambda: minibatches(X10, rng=0, part=(0, 0)), ValueError, r"part: size: must be an int >= 1, got 0"),
        (lambda: minibatches(X10, part=(0, 2)), ValueError, r"rng: must be a seed with part=, .*got None"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
