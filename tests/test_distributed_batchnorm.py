"""BatchNorm over ranks: each has a part of the batch, and all normalise by the statistics of the whole one.

A check is a function of a communicator, as in test_distributed.py.
"""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from ranks import LACKING, launch
from test_distributed import communicator, same_on_all

import fastopt
from fastopt.batchnorm.synchronized import merged
from fastopt.communicators import CommunicatorError, run_threads

BATCHES: dict[str, tuple[tuple[int, ...], int, float]] = {
    "columns": ((1100, 130), 1, 0.0),
    "small maps": ((9, 5, 7, 7), 1, 1e4),
    "large maps": ((6, 3, 41, 43), 1, 1e4),
    "channels last": ((11, 6, 5), -1, -3.0),
}
"""Shape, axis and mean of a batch."""


def cuts(rows: int, size: int) -> dict[str, list[int]]:
    """Ways to cut rows into parts: where they begin and end."""
    even = [rows * rank // size for rank in range(size + 1)]
    found = {"even": even, "one row": [0, *range(1, size), rows]}
    if size > 1:
        found["an empty one first"] = [0, 0, *[rows * rank // (size - 1) for rank in range(1, size)]]
        found["an empty one last"] = [*[rows * rank // (size - 1) for rank in range(size)], rows]
    return found


def data(name: str, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, residual and dy of a batch."""
    shape, _, mean = BATCHES[name]
    rng = np.random.default_rng(0)
    x, residual, dy = rng.normal(mean, 2.0, shape), rng.normal(size=shape), rng.normal(size=shape)
    return x.astype(dtype), residual.astype(dtype), dy.astype(dtype)


def layer(axis: int, dtype: Any, channels: int, world: Any = None, **options: Any) -> fastopt.BatchNorm:
    bn = fastopt.BatchNorm(channels, axis=axis, dtype=dtype, comm=world, **options)
    rng = np.random.default_rng(7)
    for array in bn.params.values():
        array[...] = rng.normal(size=channels)
    return bn


def gathered(world: Any, own: np.ndarray, edges: list[int]) -> np.ndarray:
    """The parts of all ranks, one after the other."""
    comm = communicator(world)
    most = max(stop - start for start, stop in pairwise(edges))
    padded = np.zeros((most, *own.shape[1:]), own.dtype)
    padded[: len(own)] = own
    everyone = np.empty((comm.size, *padded.shape), own.dtype)
    comm.allgather(padded, everyone)
    sizes = np.diff(edges)
    return np.concatenate([part[:size] for part, size in zip(everyone, sizes, strict=True)])


def added_up(world: Any, array: np.ndarray) -> np.ndarray:
    total = array.copy()
    communicator(world).allreduce(total)
    return total


def agrees(world: Any, name: str, dtype: Any, edges: list[int], activation: str | None, residual: bool) -> None:
    comm = communicator(world)
    _, axis, mean = BATCHES[name]
    x, extra, dy = data(name, dtype)
    channels = x.shape[axis]
    alone = layer(axis, dtype, channels, activation=activation)
    y = alone.forward(x, residual=extra if residual else None)
    dx = alone.backward(dy)
    bn = layer(axis, dtype, channels, world, activation=activation)
    own = slice(edges[comm.rank], edges[comm.rank + 1])
    found_y = bn.forward(x[own], residual=extra[own] if residual else None)
    found_dx = bn.backward(dy[own])
    if residual:
        dx, found_dx = dx[0], found_dx[0]
    # x - mean has lost the digits of mean
    tight = 1e-12 if dtype == np.float64 else 1e-5
    loose = 300 * tight if mean > 100.0 else tight
    scale = float(np.abs(dx).max())
    np.testing.assert_allclose(gathered(world, found_y, edges), y, rtol=loose, atol=loose)
    np.testing.assert_allclose(gathered(world, found_dx, edges), dx, rtol=loose, atol=loose * scale)
    for key, array in alone.grads.items():
        scale = float(np.abs(array).max())
        np.testing.assert_allclose(added_up(world, bn.grads[key]), array, rtol=loose, atol=loose * scale)
    np.testing.assert_allclose(bn.running_mean, alone.running_mean, rtol=tight, atol=tight)
    np.testing.assert_allclose(bn.running_var, alone.running_var, rtol=tight)
    assert same_on_all(world, bn.running_mean.tobytes() + bn.running_var.tobytes())
    assert bn.num_batches_tracked == 1


# --- checks: what each rank runs --------------------------------------------------------------------------------------


def check_parts_of_a_batch(world: Any) -> None:
    for name, (shape, *_) in BATCHES.items():
        for kind, edges in cuts(shape[0], communicator(world).size).items():
            for dtype in (np.float64, np.float32) if kind == "one row" or name == "columns" else (np.float32,):
                agrees(world, name, dtype, edges, "relu", False)
    agrees(world, "columns", np.float32, cuts(1100, communicator(world).size)["even"], "relu", True)
    agrees(world, "columns", np.float32, cuts(1100, communicator(world).size)["even"], None, False)


def check_gradients_are_central_differences(world: Any) -> None:
    """Of the sum of the losses of all ranks, by what one of them has."""
    comm = communicator(world)
    rng = np.random.default_rng(comm.rank)
    x, weights = rng.normal(size=(3 + comm.rank, 2)), rng.normal(size=(3 + comm.rank, 2))
    bn = layer(1, np.float64, 2, world, track_running_stats=False)

    def loss() -> float:
        y = bn.forward(x)
        return float(added_up(world, np.array([(weights * np.tanh(y)).sum()]))[0])

    y = bn.forward(x)
    dx = bn.backward(weights * (1.0 - np.tanh(y) ** 2))
    total = {key: added_up(world, array) for key, array in bn.grads.items()}
    step = 1e-6
    for rank in range(comm.size):
        for place in np.ndindex(3 + rank, 2):
            differences = []
            for sign in (1.0, -1.0):
                if comm.rank == rank:
                    kept, x[place] = x[place], x[place] + sign * step
                differences.append(loss())
                if comm.rank == rank:
                    x[place] = kept
            if comm.rank == rank:
                assert dx[place] == pytest.approx((differences[0] - differences[1]) / (2 * step), rel=1e-6, abs=1e-8)
    for key, array in bn.params.items():
        for place in range(2):
            differences = []
            for sign in (1.0, -1.0):
                kept, array[place] = array[place], array[place] + sign * step
                differences.append(loss())
                array[place] = kept
            expected = (differences[0] - differences[1]) / (2 * step)
            assert total[key][place] == pytest.approx(expected, rel=1e-6, abs=1e-8)


def check_runs_and_evaluation(world: Any) -> None:
    """The average over all batches; evaluation by one rank alone waits for nobody."""
    comm = communicator(world)
    bn, alone = layer(1, np.float32, 3, world, momentum=None), layer(1, np.float32, 3, momentum=None)
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(5 * comm.size, 3)).astype(np.float32)
        own = x[comm.rank :: comm.size]
        if seed == 2:
            x[-1, 0] = np.nan  # a bad value on one rank: no rank records the batch
        bn.forward(x[comm.rank :: comm.size])
        alone.forward(x)
    assert bn.num_batches_tracked == alone.num_batches_tracked == 3
    np.testing.assert_allclose(bn.running_var, alone.running_var, rtol=1e-5)
    assert same_on_all(world, bn.running_mean.tobytes() + bn.running_var.tobytes())
    if comm.rank == 0:
        bn.load_state_dict(alone.state_dict())
        np.testing.assert_array_equal(bn.forward(own, training=False), alone.forward(own, training=False))
        np.testing.assert_array_equal(bn.backward(own), alone.backward(own))


def check_an_optimizer_trains_it(world: Any) -> None:
    """gamma, beta and the weights before them, from parts of different sizes: as one process from the whole batch."""
    comm = communicator(world)
    rows = 4 * comm.size + 1
    edges = cuts(rows, comm.size)["one row"]

    def train(part: slice, comm: Any = None, **options: Any) -> np.ndarray:
        bn = fastopt.BatchNorm(4, dtype=np.float64, comm=comm)
        rng = np.random.default_rng(0)
        opt = fastopt.SGD({"W": rng.normal(size=(3, 4)), "bn": bn.params}, lr=0.1, comm=comm, **options)
        bn.attach(opt.params["bn"], opt.grads["bn"])
        for _ in range(5):
            x, wanted = rng.normal(size=(rows, 3))[part], rng.normal(size=(rows, 4))[part]
            y = bn.forward(x @ opt.params["W"])
            opt.grads["W"][...] = x.T @ bn.backward((y - wanted) / rows)
            opt.step(reduction="sum")
        return np.concatenate([opt.params["W"].ravel(), *opt.params["bn"].values(), bn.running_mean, bn.running_var])

    expected = train(slice(None))
    for shard in (False, True):
        found = train(slice(edges[comm.rank], edges[comm.rank + 1]), world, shard=shard)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        assert same_on_all(world, found.tobytes())


def check_errors_of_one_rank(world: Any) -> None:
    comm = communicator(world)
    last = comm.rank == comm.size - 1
    if comm.size == 1:
        return

    def failed(call: str) -> str:
        return rf"^{call}\(\): rank {comm.size - 1} has raised an error, see there; nothing was changed$"

    bn = layer(1, np.float32, 2, world)
    before = bn.running_mean.copy(), bn.running_var.copy()
    x = np.ones((3, 2), np.float32)
    x[0] = comm.rank
    for bad in (x.astype(np.float64), x[:, :1], np.ones(2, np.float32)):
        error, match = ((TypeError, ValueError), "x:") if last else (CommunicatorError, failed("forward"))
        with pytest.raises(error, match=match):
            bn.forward(bad if last else x)
    with pytest.raises(ValueError, match=r"^x: must have at least 2 values per channel in training, on all ranks"):
        bn.forward(x[: 1 if last else 0])
    np.testing.assert_array_equal(bn.running_mean, before[0])
    np.testing.assert_array_equal(bn.running_var, before[1])
    assert bn.num_batches_tracked == 0
    bn.forward(x)
    with pytest.raises(ValueError if last else CommunicatorError, match="dy:" if last else failed("backward")):
        bn.backward(x[:1] if last else x)
    with pytest.raises(CommunicatorError, match=r"^(forward|backward)\(\): must be called by every rank at the same"):
        bn.forward(x) if last else bn.backward(x)


def check_layers_that_differ(world: Any) -> None:
    comm = communicator(world)
    if comm.size == 1:
        return
    last = comm.rank == comm.size - 1
    what = r"^BatchNorm\(\): num_features and options must be the same on every rank, got others"
    for options in ({"eps": 1e-3}, {"dtype": np.float64}, {"activation": "relu"}):
        with pytest.raises(CommunicatorError, match=what):
            fastopt.BatchNorm(2, comm=world, **(options if last else {}))  # type: ignore[arg-type]
    with pytest.raises(CommunicatorError, match=what):
        fastopt.BatchNorm(3 if last else 2, comm=world)
    with pytest.raises(ValueError if last else CommunicatorError, match=r"eps: must|BatchNorm\(\): rank \d has raised"):
        fastopt.BatchNorm(2, eps=-1.0 if last else 1e-5, comm=world)


CHECKS = {name: thing for name, thing in globals().items() if name.startswith("check_")}


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_threads(name, size):
    run_threads(size, CHECKS[name], timeout=60.0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.skipif(bool(LACKING["mpi"]), reason=LACKING["mpi"])
def test_processes_of_mpi(size):
    launch("mpi", size, "test_distributed_batchnorm")


@pytest.mark.skipif(bool(LACKING["gloo"]), reason=LACKING["gloo"])
def test_processes_of_gloo():
    launch("gloo", 2, "test_distributed_batchnorm")


@pytest.mark.parametrize("sets", [1, 2, 7])
def test_moments_are_merged_as_those_of_all_values(sets):
    rng = np.random.default_rng(sets)
    values = [rng.normal(1e8, 1.0, (count, 3)) for count in (0, *rng.integers(0, 5, sets).tolist(), 4)]
    moments = [
        (part.mean(0), ((part - part.mean(0)) ** 2).sum(0)) if len(part) else np.full((2, 3), np.nan) for part in values
    ]
    total, mean, squares = merged(np.array([len(part) for part in values]), np.array(moments))
    everything = np.concatenate(values)
    assert total == len(everything)
    np.testing.assert_allclose(mean, everything.mean(0), rtol=1e-15)
    np.testing.assert_allclose(squares, ((everything - everything.mean(0)) ** 2).sum(0), rtol=1e-6)


def test_sums_that_need_float64_are_made_up_for():
    """float32 sums of a first value far from the others lose digits: the sums of a tile are then made in float64."""
    x = np.random.default_rng(0).normal(size=(40, 3, 5)).astype(np.float32)
    x[0] = 1e6
    alone = layer(1, np.float32, 3)
    y = alone.forward(x)

    def part(comm):
        bn = layer(1, np.float32, 3, comm)
        found = bn.forward(x[comm.rank :: 2])
        np.testing.assert_allclose(found, y[comm.rank :: 2], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(bn.running_var, alone.running_var, rtol=1e-6)

    run_threads(2, part)


def test_a_copy_has_the_ranks_and_a_pickle_is_refused():
    def use(comm):
        bn = layer(1, np.float64, 2, comm)
        twin = copy.deepcopy(bn)
        twin.forward(np.full((2, 2), float(comm.rank)))
        assert bn.num_batches_tracked == 0
        assert twin.running_mean.tolist() == [0.05, 0.05]
        with pytest.raises(TypeError, match=r"^comm: must be None to pickle an optimizer or a layer"):
            pickle.dumps(bn)

    run_threads(2, use)


def test_what_is_no_communicator_is_refused():
    with pytest.raises(TypeError, match=r"^comm: must be a communicator of mpi4py"):
        fastopt.BatchNorm(2, comm=3)


def test_a_device_is_refused(monkeypatch):
    """Whether a GPU is here or not: the backend is asked for its name alone."""
    real = fastopt.batchnorm.layer.get_backend

    class Device:
        name = "cuda"

        def __getattr__(self, name):
            return getattr(real("cpu"), name)

    monkeypatch.setattr("fastopt.batchnorm.layer.get_backend", lambda name: Device())
    with pytest.raises(ValueError, match=r"^comm: must be None with backend='cuda', whose kernels exchange no sums"):
        run_threads(1, lambda comm: fastopt.BatchNorm(2, backend="cuda", comm=comm))
