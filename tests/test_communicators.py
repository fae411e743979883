"""Communicators: every engine computes the same, and what is passed as ``comm=`` is recognised or refused."""

from __future__ import annotations

import re
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ranks import LACKING, launch

from fastopt.communicators import OPERATIONS, Communicator, CommunicatorError, communicator_of, run_threads

DTYPES = (np.float32, np.float64, np.int64, np.uint8)
ENGINES = [
    pytest.param(engine, size, marks=pytest.mark.skipif(bool(LACKING[engine]), reason=LACKING[engine]))
    for engine, size in (("mpi", 2), ("mpi", 3), ("gloo", 2))
]


def numbers(rank: int, size: int, dtype: Any) -> np.ndarray:
    """The numbers of a rank: small whole ones, whose sums are exact in any order."""
    return np.random.default_rng(rank).integers(0, 20, size).astype(dtype)


def communicator(world: Any) -> Communicator:
    comm = communicator_of(world)
    assert comm is not None
    return comm


# --- checks: what each rank runs --------------------------------------------------------------------------------------


def check_reductions(world: Any) -> None:
    comm = communicator(world)
    for dtype in DTYPES:
        for size in (1, 5, 5000):
            given = [numbers(rank, size * comm.size, dtype) for rank in range(comm.size)]
            for op, expected in (("sum", np.sum(given, axis=0)), ("max", np.max(given, axis=0))):
                found = given[comm.rank].copy()
                comm.allreduce(found, op)
                np.testing.assert_array_equal(found, expected)
            kept, own = given[comm.rank].copy(), np.empty((1, size), dtype)
            comm.reduce_scatter(kept, own)
            np.testing.assert_array_equal(own[0], np.sum(given, axis=0).reshape(comm.size, -1)[comm.rank])
            np.testing.assert_array_equal(kept, given[comm.rank])


def check_exchanges(world: Any) -> None:
    comm = communicator(world)
    for dtype in DTYPES:
        for size in (1, 5, 5000):
            given = np.array([numbers(rank, size, dtype) for rank in range(comm.size)])
            whole = np.zeros((comm.size, size, 1), dtype)
            comm.allgather(given[comm.rank].reshape(size, 1), whole)
            np.testing.assert_array_equal(whole[..., 0], given)
            whole = np.zeros((comm.size, size), dtype)
            comm.allgather(given[comm.rank].copy(), whole)
            np.testing.assert_array_equal(whole, given)
            whole[...] = 0
            whole[comm.rank] = given[comm.rank]
            comm.allgather(whole[comm.rank], whole)  # where it is already
            np.testing.assert_array_equal(whole, given)
            sent = np.array([numbers(10 * comm.rank + other, size, dtype) for other in range(comm.size)])
            received = np.zeros_like(sent)
            comm.alltoall(sent, received)
            expected = [numbers(10 * other + comm.rank, size, dtype) for other in range(comm.size)]
            np.testing.assert_array_equal(received, expected)


def check_sums_are_the_same_on_all_ranks(world: Any) -> None:
    comm = communicator(world)
    found = np.random.default_rng(comm.rank).normal(size=10_007).astype(np.float32)
    comm.allreduce(found)
    everyone = np.empty((comm.size, found.size), np.float32)
    comm.allgather(found, everyone)
    assert (everyone == found).all()


CHECKS = {name: thing for name, thing in globals().items() if name.startswith("check_")}


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_threads(name, size):
    run_threads(size, CHECKS[name], timeout=20.0)


@pytest.mark.parametrize(("engine", "size"), ENGINES)
def test_processes(engine, size):
    launch(engine, size, "test_communicators")


def test_what_is_no_communicator_is_refused():
    assert communicator_of(None) is None
    for wrong in (2, "world", object()):
        with pytest.raises(TypeError, match=f"^comm: must be a communicator of mpi4py.* got {type(wrong).__name__}$"):
            communicator_of(wrong)


def test_an_object_with_the_methods_is_one():
    class Alone:
        rank, size = 0, 1

        def allreduce(self, array, op="sum"): ...

        def reduce_scatter(self, whole, own): ...

        def allgather(self, own, whole): ...

        def alltoall(self, sent, received): ...

        def abort(self): ...

    own = Alone()
    assert communicator_of(own) is own
    del Alone.alltoall
    with pytest.raises(TypeError, match=r"^comm: must be"):
        communicator_of(own)


@pytest.mark.skipif(bool(LACKING["mpi"]), reason=LACKING["mpi"])
def test_communicators_of_mpi_that_cannot_be_used_are_refused():
    launch("mpi", 1, "test_communicators", "refuse_null")


def refuse_null(world: Any) -> None:
    from mpi4py import MPI

    with pytest.raises(ValueError, match=r"^comm: must be an intracommunicator that this process belongs to, got"):
        communicator_of(MPI.COMM_NULL)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_return_what_the_function_did():
    assert run_threads(3, lambda comm, factor: factor * comm.rank, 2) == [0, 2, 4]
    assert run_threads(1, lambda comm: (comm.rank, comm.size)) == [(0, 1)]
    assert threading.active_count() == 1 or not any("run" in thread.name for thread in threading.enumerate())


def test_an_error_of_one_thread_ends_all():
    seen = []

    def fail(comm):
        if comm.rank == 1:
            raise KeyError("rank 1 is out of data")
        try:
            comm.allreduce(np.zeros(3))
        except CommunicatorError as error:
            seen.append(str(error))
            raise

    with pytest.raises(KeyError, match="rank 1 is out of data"):
        run_threads(3, fail)
    assert seen == ["another rank has ended, or did not come: see its error"] * 2


def test_a_thread_that_does_not_come_is_not_waited_for_for_ever():
    with pytest.raises(CommunicatorError, match="did not come"):
        run_threads(2, lambda comm: comm.rank == 0 or comm.allreduce(np.zeros(1)), timeout=0.1)


def test_threads_that_call_different_things_are_told():
    def differ(comm):
        if comm.rank == 0:
            comm.allreduce(np.zeros(3))
        else:
            comm.allreduce(np.zeros(4, np.float32))

    wanted = re.escape("must call allreduce(sum) of shape ")
    with pytest.raises(CommunicatorError, match=wanted):
        run_threads(2, differ)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda comm: comm.allreduce(np.zeros(2), "min"), f"op: must be one of {', '.join(map(repr, OPERATIONS))}"),
        (lambda comm: comm.allreduce(np.zeros((4, 4))[:, 0]), "allreduce(sum): must be given contiguous arrays"),
        (lambda comm: comm.allgather(np.zeros(2), np.zeros(3)), "whole: must be 2 times as long as the own part"),
        (lambda comm: comm.reduce_scatter(np.zeros(3), np.zeros(2)), "whole: must be 2 times as long as the own part"),
        (lambda comm: comm.alltoall(np.zeros(4), np.zeros(2)), "received: must have shape (4,)"),
    ],
)
def test_threads_refuse_what_no_engine_takes(call, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        run_threads(2, call)


@pytest.mark.parametrize(("size", "timeout"), [(0, 1.0), (1.5, 1.0), (2, "long")])
def test_threads_are_some_number(size, timeout):
    with pytest.raises((TypeError, ValueError), match=r"^(size|timeout): must be"):
        run_threads(size, lambda comm: None, timeout=timeout)


# --- NCCL, without a GPU ----------------------------------------------------------------------------------------------


class Calls:
    """Stands for CuPy's NcclCommunicator: it keeps the calls."""

    def __init__(self):
        self.made = []

    def rank_id(self):
        return 1

    def size(self):
        return 2

    def __getattr__(self, name):
        return lambda *arguments: self.made.append((name, *arguments))


Calls.__module__, Calls.__name__ = "cupy_backends.cuda.libs.nccl", "NcclCommunicator"


def on_device(dtype, size, address):
    return SimpleNamespace(
        data=SimpleNamespace(ptr=address), dtype=np.dtype(dtype), size=size, itemsize=dtype().itemsize
    )


def test_nccl_is_called_with_addresses_counts_and_types(monkeypatch):
    comm, stream = Calls(), SimpleNamespace(ptr=77)
    names = {f"NCCL_{name}": name for name in ("FLOAT32", "FLOAT64", "INT64", "UINT8", "SUM", "MAX")}
    group = {name: lambda name=name: comm.made.append((name,)) for name in ("groupStart", "groupEnd")}
    nccl = SimpleNamespace(**names, **group)
    cuda = SimpleNamespace(nccl=nccl, get_current_stream=lambda: stream)
    sent = on_device(np.int64, 2, 600)
    sent.get = lambda: np.array([5, 7])
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, asarray=lambda array: sent))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    own = communicator_of(comm)
    assert (own.rank, own.size) == (1, 2)
    whole, part, other = on_device(np.float32, 6, 1000), on_device(np.float32, 3, 2000), on_device(np.float32, 6, 3000)
    own.allreduce(on_device(np.uint8, 6, 500), "max")
    numbers = np.array([1, 2])
    own.allreduce(numbers)  # which goes to the device and back
    assert numbers.tolist() == [5, 7]
    own.reduce_scatter(whole, part)
    own.allgather(part, whole)
    own.alltoall(whole, other)
    own.abort()
    assert comm.made == [
        ("allReduce", 500, 500, 6, "UINT8", "MAX", 77),
        ("allReduce", 600, 600, 2, "INT64", "SUM", 77),
        ("reduceScatter", 1000, 2000, 3, "FLOAT32", "SUM", 77),
        ("allGather", 2000, 1000, 3, "FLOAT32", 77),
        ("groupStart",),
        ("send", 1000, 3, "FLOAT32", 0, 77),
        ("recv", 3000, 3, "FLOAT32", 0, 77),
        ("send", 1012, 3, "FLOAT32", 1, 77),
        ("recv", 3012, 3, "FLOAT32", 1, 77),
        ("groupEnd",),
        ("abort",),
    ]
