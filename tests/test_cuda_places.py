"""The CUDA kernels on arrays wherever they are: in numba's simulator, or on a GPU with ``--gpu``.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_places.py
"""

from __future__ import annotations

import ast
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import pytest
from numba import float64

import fastopt
from fastopt.kernels import get_backend
from fastopt.kernels.contract import BLOCK, Adder, Chunk, Features, Place, StepHyper, sums_per_block
from fastopt.kernels.cuda.target import THREADS
from fastopt.kernels.cuda.target import cuda as numba_cuda
from fastopt.rule import Rule
from fastopt.step.features import features_of
from fastopt.storage.layout import Layout

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
simulator_only = pytest.mark.skipif(not SIMULATED, reason="looks at what the simulator refuses")
DTYPES = (np.float32, np.float64)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
SIZES = (0, 1, 15, 16, 17, 33)
GROUPS = (0, 1, 0, 1, 0, 1)
GUARD = 7.25
"""What is between parameters that are in one array, and stays there."""
MANY: dict[str, bool] = dict.fromkeys(
    ("unscale", "zero_nonfinite", "clip_value", "clip_norm", "ema", "gated", "zero_grad"), True
)
OF_EACH_KIND = ("sgd", "adam", "lamb", "novograd")
"""No state, an elementwise rule, and two with norms."""
OTHERS = ("momentum", "amsgrad", "adan", "lars", "adam_mini", "stable_adamw", "mars", "prodigy", "adafactor")
"""The other numbers of states; norms without a number; sums of each tensor, of all, of rows and columns."""


def rules_of_the_library() -> dict[str, Rule]:
    """Those of the optimizers, and those that they run beside them: Muon's direction, Nesterov's look-ahead."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastopt.rules.")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Rule)]
    return {rule.name: rule for rule in found}


RULES = rules_of_the_library()


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


def cuda() -> Any:
    return get_backend("cuda")


# --- arrays, in the two ways that parameters come ---------------------------------------------------------------------


class Placed(NamedTuple):
    """Vectors in one array of a backend."""

    backend: Any
    array: Any
    first: tuple[int, ...]
    """The number of the first element of each."""

    @classmethod
    def of(cls, backend: Any, vectors: list[np.ndarray], gaps: tuple[int, ...] | None = None) -> Placed:
        """Packed as `Layout` does; or after so many elements each."""
        dtype = vectors[0].dtype
        if gaps is None:
            layout = layout_of(dtype, [vector.size for vector in vectors])
            first, size = layout.offsets, layout.size
        else:
            ends = np.cumsum([gap + vector.size for gap, vector in zip(gaps, vectors, strict=True)])
            first = tuple(int(end) - vector.size for end, vector in zip(ends, vectors, strict=True))
            size = int(ends[-1]) + 3
        whole = np.full(size, GUARD, dtype)
        for start, vector in zip(first, vectors, strict=True):
            whole[start : start + vector.size] = vector
        placed = backend.zeros(size, dtype)
        backend.copy(placed, whole)
        return cls(backend, placed, first)

    @property
    def addresses(self) -> np.ndarray:
        return self.backend.address(self.array) + np.array(self.first) * self.array.dtype.itemsize

    def vectors(self, sizes: tuple[int, ...] = SIZES) -> list[np.ndarray]:
        """What is there now; nothing was written beside it."""
        found = self.backend.host(self.array)
        taken = np.zeros(len(found), bool)
        for start, size in zip(self.first, sizes, strict=True):
            taken[start : start + size] = True
        assert (found[~taken] == GUARD).all()
        return [found[start : start + size] for start, size in zip(self.first, sizes, strict=True)]


def layout_of(dtype: Any, sizes: Any = SIZES) -> Layout:
    return Layout.of([(size,) for size in sizes], np.dtype(dtype).itemsize)


def numbers(rng: np.random.Generator, dtype: Any, low: float = -1.0) -> list[np.ndarray]:
    return [rng.uniform(low, 1.0, size).astype(dtype) for size in SIZES]


def table_of(rng: np.random.Generator, hyper: Any, dtype: Any, **step: float) -> np.ndarray:
    """Two rows of the table of hyperparameters."""
    usual = {
        "unscale": 0.5,
        "clip_value": 0.4,
        "coefficient": 0.7,
        "weight_decay": 0.1,
        "keep": 0.95,
        "ema_weight": 0.3,
        "proceeds": 1.0,
        "noise": 0.0,
    }
    of_step = StepHyper(**{**usual, **step})
    return np.array([[*of_step, *rng.uniform(0.1, 0.9, len(hyper._fields))] for _ in range(2)], dtype)


def hyper_of(rule: Rule) -> Any:
    return get_type_hints(rule.prepare)["return"]


ODD = ((1, 3, 2, 5, 1, 6), (3, 1, 6, 1, 2, 5))
"""The gaps before parameters, and before their gradients: all remainders of 16 bytes, equal and unequal ones."""
PLACEMENTS = {"packed": (None, None), "odd": ODD, "alike": (ODD[0], ODD[0]), "gradients": (None, ODD[1])}


def updated(backend: Any, rule: Rule, features: Features, dtype: Any, gaps: Any, **step: float) -> list[np.ndarray]:
    """What an update leaves of p, g, the states and the per-tensor states."""
    rng = np.random.default_rng(0)
    hyper = hyper_of(rule)
    table = table_of(rng, hyper, dtype, **step)
    begin = [numbers(rng, dtype), numbers(rng, dtype)]
    if features.zero_nonfinite:
        begin[1][4][3] = np.nan
    p, g = (Placed.of(backend, vectors, gap) for vectors, gap in zip(begin, gaps, strict=True))
    states = [Placed.of(backend, numbers(rng, dtype, 0.1)) for _ in range(len(rule.states) + features.ema)]
    layout = layout_of(dtype)
    counts = [layout.lines[over][-1] for over in rule.over.values()]
    kept = [backend.zeros(count, np.dtype(np.float64)) for count in counts]
    for array, count in zip(kept, counts, strict=True):
        backend.copy(array, rng.uniform(0.1, 1.0, count))
    kernel = backend.kernel(rule, hyper, np.dtype(dtype), features)
    places = layout.places(p.addresses, g.addresses)
    chunks = layout.tiles(GROUPS) if rule.lined else layout.chunks(GROUPS, whole=rule.whole)
    kernel.launch(places, (*[state.array for state in states], *kept), table, chunks, sum(SIZES))
    return [*(vector for placed in (p, g, *states) for vector in placed.vectors()), *map(backend.host, kept)]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [array.tobytes() for array in found] == [array.tobytes() for array in expected]


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "everything", "dtype"),
    [
        *[(name, everything, dtype) for name in OF_EACH_KIND for everything in (False, True) for dtype in DTYPES],
        *[(name, True, np.float32) for name in OTHERS],
    ],
    ids=lambda value: {True: "everything", False: "plain"}.get(value) or getattr(value, "__name__", value),
)
def test_an_update_has_the_same_bits_wherever_arrays_are(name, everything, dtype):
    rule = RULES[name]
    features = features_of(rule, decays=True, **MANY) if everything else Features()
    packed, *others = (updated(cuda(), rule, features, dtype, gaps) for gaps in PLACEMENTS.values())
    for found in others[: None if name in OF_EACH_KIND else 1]:
        assert_same(found, packed)


@by_dtype
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_it_is_that_of_the_cpu(name, everything, dtype):
    rule = RULES[name]
    features = features_of(rule, decays=True, **MANY) if everything else Features()
    ours = updated(cuda(), rule, features, dtype, ODD)
    cpu = updated(get_backend("cpu"), rule, replace(features, gated=False), dtype, ODD)  # where the host decides
    for found, expected in zip(ours, cpu, strict=True):
        np.testing.assert_allclose(found, expected, rtol=8 * np.finfo(dtype).eps, atol=np.finfo(dtype).eps)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_step_that_does_not_proceed_leaves_all_but_gradients_as_they_are(name):
    rule = RULES[name]
    features = features_of(rule, decays=True, gated=True)
    before, after = (updated(cuda(), rule, features, np.float32, ODD, proceeds=proceeds) for proceeds in (1.0, 0.0))
    states = len(SIZES) * (2 + len(rule.states))
    rng = np.random.default_rng(0)
    table_of(rng, hyper_of(rule), np.float32)
    begin = [*numbers(rng, np.float32), *numbers(rng, np.float32)]
    begin += [vector for _ in rule.states for vector in numbers(rng, np.float32, 0.1)]
    begin += [rng.uniform(0.1, 1.0, len(SIZES)) for _ in rule.numbers]
    assert_same(after[:states], begin[:states])
    assert [array.tobytes() for array in before] != [array.tobytes() for array in after]
    for found, expected in zip(after[states:], begin[states:], strict=True):
        assert found[1:].tobytes() == expected[1:].tobytes()  # but of the parameter without elements


@by_dtype
def test_chunks_in_the_middle_of_parameters_and_rows_whose_gradients_are_elsewhere(dtype):
    """Adam on single rows of an embedding: a row's gradient is a row of another array."""
    width, taken = 5, (3, 0, 6)
    rng = np.random.default_rng(1)
    hyper = hyper_of(RULES["adam"])
    table = table_of(rng, hyper, dtype)
    p, m, v = (rng.uniform(0.1, 1.0, 7 * width).astype(dtype) for _ in range(3))
    g = rng.uniform(0.1, 1.0, len(taken) * width).astype(dtype)
    rows = [Chunk(0, width * row, width * (row + 1), width * k, 0, 0) for k, row in enumerate(taken)]
    results = []
    for backend, scattered in ((get_backend("cpu"), False), (cuda(), False), (cuda(), True)):
        arrays = [Placed.of(backend, [array], (1,)) for array in (p, g, m, v)]
        places = np.array([Place(int(arrays[0].addresses[0]), int(arrays[1].addresses[0]), 1, 0)], np.int64)
        kernel = backend.kernel(RULES["adam"], hyper, np.dtype(dtype), Features(scattered=scattered))
        kernel.launch(places, tuple(each.array for each in arrays[2:]), table, np.array(rows, np.int64), 15)
        results.append([vector for each in arrays for vector in each.vectors((each.array.size - 4,))])
    left = np.setdiff1d(np.arange(7), taken)
    for found in results[1:]:
        for array, expected, before in zip(found, results[0], (p, g, m, v), strict=True):
            np.testing.assert_allclose(array, expected, rtol=8 * np.finfo(dtype).eps)
            if array.size == p.size:
                assert_same([array.reshape(7, width)[left]], [before.reshape(7, width)[left]])


def test_gradients_that_count_as_zero_have_no_address():
    rule = RULES["adam"]
    rng = np.random.default_rng(2)
    p, m, v = (Placed.of(cuda(), numbers(rng, np.float32, 0.1)) for _ in range(3))
    layout = layout_of(np.float32)
    kernel = cuda().kernel(rule, hyper_of(rule), np.dtype(np.float32), Features(still=True))
    table = table_of(rng, hyper_of(rule), np.float32)
    before = m.vectors()
    kernel.launch(layout.places(p.addresses, 0), (m.array, v.array), table, layout.chunks(GROUPS), sum(SIZES))
    assert all((abs(after) < abs(old)).all() for old, after in zip(before, m.vectors(), strict=True))


@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_parameters_of_several_blocks_and_chunks_of_several_parameters(name):
    """Neighbours are one chunk for Adam; for LAMB a block of sums ends inside a parameter."""
    rule = RULES[name]
    sizes = (64, BLOCK + 48, 16)
    rng = np.random.default_rng(3)
    table = table_of(rng, hyper_of(rule), np.float32)
    begin = [[rng.uniform(0.1, 1.0, size).astype(np.float32) for size in sizes] for _ in range(4)]
    layout = layout_of(np.float32, sizes)
    found = []
    for backend, gaps in ((get_backend("cpu"), None), (cuda(), None), (cuda(), (1, 2, 3))):
        p, g, m, v = (Placed.of(backend, vectors, gaps if k < 2 else None) for k, vectors in enumerate(begin))
        places = layout.places(p.addresses, g.addresses)
        neighbours = layout.neighbours(places, 4)
        assert any(neighbours) == (gaps is None)
        chunks = layout.chunks((0, 0, 0), neighbours=neighbours, whole=rule.whole, longest=2 * BLOCK)
        assert (len(chunks) == 1) == (gaps is None and name == "adam")
        kernel = backend.kernel(rule, hyper_of(rule), np.dtype(np.float32), Features())
        kernel.launch(places, (m.array, v.array), table, chunks, layout.size)
        found.append([vector for each in (p, g, m, v) for vector in each.vectors(sizes)])
    assert_same(found[1], found[2])
    for ours, cpu in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(ours, cpu, rtol=2e-6, atol=1e-7)


# --- norms and sums ---------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_partial_sums_have_the_same_bits_wherever_arrays_are(everything, dtype):
    features = Features(unscale=everything, zero_nonfinite=everything, clip_value=everything)
    layout = layout_of(dtype)
    chunks = layout.chunks(GROUPS, whole=True)
    rng = np.random.default_rng(4)
    table = table_of(rng, StepHyper, dtype)[:, : len(StepHyper._fields)].copy()
    vectors, others = numbers(rng, dtype), numbers(rng, dtype)
    vectors[3][2] = np.inf
    found = []
    for gaps in (None, *ODD):
        here, elsewhere = Placed.of(cuda(), vectors, gaps), Placed.of(cuda(), others)
        kernel = cuda().norm(np.dtype(dtype), features)
        places = layout.places(elsewhere.addresses, here.addresses)
        found.append(cuda().host(kernel.launch(places, table, chunks, layout.size)))
    assert_same(found[1:], [found[0]] * 2)
    assert np.isnan(found[0][:, 1]).tolist() == [False, False, True, False, False]
    scale = 0.5 if everything else 1.0
    conditioned = [np.clip(np.where(np.isinf(x) & everything, 0, scale * x), -1, 1) for x in vectors if x.size]
    if everything:
        limit = table[0, 1]
        expected = [(np.clip(x, -limit, limit).astype(np.float64) ** 2).sum() for x in conditioned]
        np.testing.assert_allclose(found[0][:, 0], expected, rtol=1e-6)


@by_dtype
@pytest.mark.parametrize("measure", [False, True])
def test_sums_of_gradients_have_the_same_bits_wherever_arrays_are(measure, dtype, monkeypatch):
    adder = Adder(measure=measure, zero_nonfinite=True)
    layout = layout_of(dtype)
    chunks = layout.chunks((0,) * len(SIZES), whole=True)
    present, overwrite = np.array([1, 1, 0, 1, 1, 1], bool), np.array([0, 1, 1, 0, 0, 1], bool)
    rng = np.random.default_rng(5)
    sums, more = numbers(rng, dtype), numbers(rng, dtype)
    sums[1][:] = np.nan  # overwritten
    expected = [
        (0 if overwrite[k] else s) + dtype(0.3) * m if present[k] else s
        for k, (s, m) in enumerate(zip(sums, more, strict=True))
    ]
    launches: list[int] = []
    launch = cuda().launch
    monkeypatch.setattr(cuda(), "launch", lambda *arguments: launches.append(0) or launch(*arguments))
    partials = []
    for gaps in PLACEMENTS.values():
        total, source = (Placed.of(cuda(), vectors, gap) for vectors, gap in zip((sums, more), gaps, strict=True))
        places = layout.places(total.addresses, source.addresses)
        left = cuda().adopt(np.full((len(chunks), sums_per_block(np.dtype(dtype))), -1.0))
        launches.clear()
        weight = np.array([0.3, 0.0], dtype)
        cuda().add(places, present, overwrite, weight, chunks, left, adder, np.dtype(dtype))
        assert weight[1] == 1.0  # made
        assert len(launches) == (4 if measure and dtype is np.float64 else 2)  # blocks beyond the squares once more
        for found, wanted in zip(total.vectors(), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0 if SIMULATED else 4 * np.finfo(dtype).eps)
        assert_same(source.vectors(), more)
        partials.append(cuda().host(left))
        if measure:  # as those of a pass over the sums
            norm = cuda().norm(np.dtype(dtype), Features(zero_nonfinite=True))
            table = np.ones((1, len(StepHyper._fields)), dtype)
            again = cuda().host(norm.launch(layout.places(0, total.addresses), table, chunks, layout.size))
            assert_same([partials[-1][[0, 2, 3, 4], :4]], [again[[0, 2, 3, 4], :4]])  # the other two: of other passes
    assert_same(partials[1:], partials[:1] * 3)
    assert (partials[0][1] == -1.0).all()
    assert (partials[0][[0, 2, 3, 4], :4] != -1.0).all() == measure


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_of_places_is_uploaded_once_and_changed_by_passing_another_array(monkeypatch):
    layout = layout_of(np.float32, (8,))
    first, second = (Placed.of(cuda(), [np.ones(8, np.float32)], (gap,)) for gap in (0, 3))
    g = Placed.of(cuda(), [np.ones(8, np.float32)])
    rule = RULES["sgd"]
    kernel = cuda().kernel(rule, hyper_of(rule), np.dtype(np.float32), Features())
    table = np.full((1, len(StepHyper._fields) + len(hyper_of(rule)._fields)), 0.5, np.float32)
    places, chunks = layout.places(first.addresses, g.addresses), layout.chunks([0])
    given: list[int] = []
    upload = cuda().upload
    monkeypatch.setattr(cuda(), "upload", lambda array: given.append(id(array.base)) or upload(array))
    for _ in range(2):
        kernel.launch(places, (), table, chunks, 8)
    assert given.count(id(places)) == 1
    with pytest.raises(ValueError, match="read-only"):
        places[0, 0] = 0
    moved = layout.places(second.addresses, g.addresses)
    kernel.launch(moved, (), table, chunks, 8)
    assert first.vectors((8,))[0].tolist() == [0.0] * 8
    assert second.vectors((8,))[0].tolist() == [0.5] * 8


@simulator_only
def test_what_was_never_uploaded_cannot_be_captured():
    stream = cuda().xp.cuda.get_current_stream()
    stream.begin_capture()
    try:
        for call in (cuda().places, cuda().chunks):
            with pytest.raises(RuntimeError, match="on this device: make an ordinary one first"):
                call(np.zeros((1, 6), np.int64))
    finally:
        stream.end_capture()


# --- what the simulator refuses ---------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    from fastopt.kernels.cuda import simulated

    return simulated.memory(np.dtype(np.float32), 4, True)


@simulator_only
def test_only_arrays_that_are_alive_are_read(memory):
    load, store = memory
    single, _ = simulated_memory(1)
    array = cuda().zeros(8, np.dtype(np.float32))
    array[4:8] = 2.0
    start = cuda().address(array)
    assert load((start, start + 16), 0) == ((0.0, 2.0),) * 4
    store((start,), 16, ((1.0,), (2.0,), (3.0,), (4.0,)))
    assert cuda().host(array).tolist() == [0.0] * 4 + [1.0, 2.0, 3.0, 4.0]
    assert single((start,), 28) == ((4.0,),)
    for bad, at in ((load, 32), (load, 4), (single, 32), (single, -4), (single, 2)):
        with pytest.raises(IndexError, match=r"not in the memory of any array|must be a multiple"):
            bad((start,), at)
    part = array[5:7]
    del array
    assert single((cuda().address(part),), 0) == ((2.0,),)
    del part
    with pytest.raises(IndexError, match="not in the memory of any array"):
        load((start,), 0)


def simulated_memory(width: int) -> Any:
    from fastopt.kernels.cuda import simulated

    return simulated.memory(np.dtype(np.float32), width, True)


@simulator_only
def test_arrays_however_they_are_made_are_known():
    load, _ = simulated_memory(1)
    xp = cuda().xp
    base = xp.asarray(np.arange(6.0, dtype=np.float32))
    whole = np.arange(6.0, dtype=np.float32)

    class Foreign:
        __cuda_array_interface__ = whole.__array_interface__

    made = [base.copy(), base + base, base[[1, 2]], xp.exp(base), base.reshape(2, 3).T.ravel(), base.astype("f4")]
    made += [base[2:], base[3], xp.ascontiguousarray(base[::2]), cuda().adopt(Foreign()), xp.array(base)]
    for array in made:
        assert load((cuda().address(array),), 0)[0][0] == cuda().host(array).reshape(-1)[0]


@simulator_only
def test_the_threads_of_a_block_share_an_array_that_all_of_them_make_at_once(monkeypatch):
    made = np.empty

    def slowly(shape: Any, dtype: Any) -> np.ndarray:
        time.sleep(0.01)
        return made(shape, dtype)

    found = []

    def kernel() -> None:
        numbers = numba_cuda.shared.array(THREADS, float64)
        found.append(numbers)
        found.append(numba_cuda.shared.array(THREADS, float64))

    launch = numba_cuda.jit(kernel)[1, THREADS]
    monkeypatch.setattr(np, "empty", slowly)
    launch()
    assert len(found) == 2 * THREADS
    assert len({id(array) for array in found}) == 2, "an array of each line"


def launched(kernel: Any, *args: Any) -> None:
    numba_cuda.jit(kernel)[1, THREADS](*args)


@simulator_only
def test_threads_meet_at_a_barrier_and_a_missing_one_is_noticed():
    """Between two barriers they run in an order that is drawn: a neighbour's number may not be there yet."""

    def shifted(found: np.ndarray, meet: bool) -> None:
        numbers = numba_cuda.shared.array(THREADS, float64)
        k = numba_cuda.threadIdx.x
        numbers[k] = -1.0
        numba_cuda.syncthreads()
        numbers[k] = k
        if meet:
            numba_cuda.syncthreads()
        found[k] = numbers[(k + 1) % THREADS]

    for meet in (True, False):
        found = np.zeros(THREADS)
        launched(shifted, found, meet)
        expected = np.roll(np.arange(THREADS, dtype=float), -1)
        assert np.array_equal(found, expected) == meet


@simulator_only
def test_threads_that_have_ended_are_not_waited_for_and_one_that_fails_ends_the_others():
    def halves(count: np.ndarray, fails: bool) -> None:
        k = numba_cuda.threadIdx.x
        while k < THREADS:  # each time, those in the upper half end
            numba_cuda.syncthreads()
            if fails and k == 5:
                raise ValueError("the fifth")
            count[numba_cuda.threadIdx.x] += 1
            k = 2 * k + 1

    count = np.zeros(THREADS)
    launched(halves, count, False)
    assert count.tolist() == [np.ceil(np.log2((THREADS + 1) / (k + 1))) for k in range(THREADS)]
    with pytest.raises(ValueError, match="the fifth"):
        launched(halves, np.zeros(THREADS), True)


@simulator_only
def test_a_kernel_that_reaches_beyond_an_array_fails_and_so_does_one_on_another_device():
    rule = RULES["sgd"]
    kernel = cuda().kernel(rule, hyper_of(rule), np.dtype(np.float32), Features())
    table = np.ones((1, len(StepHyper._fields) + len(hyper_of(rule)._fields)), np.float32)
    p, g = (cuda().zeros(8, np.dtype(np.float32)) for _ in range(2))
    places = np.array([Place(cuda().address(p), cuda().address(g), 0, 0)], np.int64)
    kernel.launch(places, (), table, np.array([Chunk(0, 0, 8, 0, 0, 0)], np.int64), 8)
    with pytest.raises(IndexError, match="not in the memory of any array"):
        kernel.launch(places, (), table, np.array([Chunk(0, 0, 9, 0, 0, 0)], np.int64), 9)
    with cuda().xp.cuda.Device(1), pytest.raises(IndexError, match="is on device 0, and a kernel of 1 uses it"):
        kernel.launch(places.copy(), (), table.copy(), np.array([Chunk(0, 0, 8, 0, 0, 0)], np.int64), 8)
    with cuda().xp.cuda.Device(1), pytest.raises(ValueError, match="the arrays are on device 0, and the current"):
        kernel.launch(places.copy(), (p,), table, np.array([Chunk(0, 0, 8, 0, 0, 0)], np.int64), 8)


# --- the package ------------------------------------------------------------------------------------------------------


def test_two_files_import_numba_cuda_and_both_backends_have_the_same_files():
    folder = Path(fastopt.__file__).parent
    importing = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(name == "numba.cuda" or name.startswith("numba.cuda.") for name in names):
                importing.add(path.relative_to(folder).as_posix())
    assert importing == {"kernels/cuda/block.py", "kernels/cuda/target.py"}  # the first in the simulator
    of_cpu, of_cuda = ({path.name for path in (folder / "kernels" / name).glob("*.py")} for name in ("cpu", "cuda"))
    of_batchnorm = {name for name in of_cpu if name.startswith("batchnorm_")}  # its loops share nothing with a device's
    assert of_cpu - of_batchnorm - {"wire.py"} <= of_cuda  # messages between processes are of the host
