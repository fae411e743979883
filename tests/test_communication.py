"""bench/communication.py: its model counts the bytes that ranks send, and the page shows its numbers."""

from __future__ import annotations

from typing import Any

import communication
import numpy as np
import pytest

import fastopt
from fastopt.communicators import run_threads

SIZE = 2**18
OPTIONS: dict[str, dict[str, Any]] = {
    "ZeRO-1, or data parallel": {},
    'the same, `order="fixed"`': {"order": "fixed"},
    'ZeRO-1, `wire="bfloat16"`': {"wire": "bfloat16"},
    'ZeRO-1, `wire="int8"`': {"wire": "int8"},
    'data parallel, `wire="bfloat16"`': {"wire": "bfloat16", "shard": False},
    'data parallel, `wire="int8"`': {"wire": "int8", "shard": False},
    'ZeRO-1, bfloat16 parameters, `wire="int8"`': {"wire": "int8", "dtype": "bfloat16"},
    "LocalSGD, every 50": {"every": 50},
    'LocalSGD, every 500, `wire="int8"`, `shard=False`': {"every": 500, "wire": "int8", "shard": False},
}
METHODS = {method.name: method for method in communication.METHODS}


class Counted:
    """A communicator that counts the bytes a rank has to send, by engines that send no byte twice."""

    def __init__(self, comm: Any):
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.sent = 0.0

    def _count(self, nbytes: float) -> None:
        self.sent += nbytes * (self.size - 1) / self.size

    def allreduce(self, array: Any, op: str = "sum") -> None:
        self._count(2 * array.nbytes)
        self._comm.allreduce(array, op)

    def reduce_scatter(self, whole: Any, own: Any) -> None:
        self._count(whole.nbytes)
        self._comm.reduce_scatter(whole, own)

    def allgather(self, own: Any, whole: Any) -> None:
        self._count(whole.nbytes)
        self._comm.allgather(own, whole)

    def alltoall(self, sent: Any, received: Any) -> None:
        self._count(sent.nbytes)
        self._comm.alltoall(sent, received)

    def abort(self) -> None:
        self._comm.abort()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [2, 4])
def test_a_step_sends_the_bytes_of_the_model(name, size):
    options = dict(OPTIONS[name])
    every, dtype = options.pop("every", 0), options.pop("dtype", "float32")

    def count(world):
        comm = Counted(world)
        params = {"w": np.ones(SIZE, np.float32)}
        if every:
            inner = fastopt.SGD(params, lr=0.1)
            opt = fastopt.distributed.LocalSGD(
                inner, outer=fastopt.SGD(params, lr=1.0, comm=comm, **options), every=every
            )
            comm.sent = 0.0
            for _ in range(every):
                opt.step({"w": params["w"]})
            return comm.sent / every
        opt = fastopt.SGD(params if dtype == "float32" else {"w": params["w"].astype(BFLOAT16)}, comm=comm, **options)
        comm.sent = 0.0
        opt.step({"w": params["w"].astype(opt.flat.dtype)})
        return comm.sent

    method = METHODS[name]
    for sent in run_threads(size, count):
        assert sent == pytest.approx(SIZE * method.sent / method.every * (size - 1) / size, rel=0.01)


BFLOAT16 = fastopt.storage.formats.dtype_of("bfloat16", "test")


def test_every_method_is_counted():
    assert list(OPTIONS) == list(METHODS)


def test_the_page_and_the_picture_are_of_this_model():
    page = communication.PAGE.read_text(encoding="utf-8")
    assert f"\n{communication.table_of_bytes()}\n" in page
    assert f"\n{communication.table_of_times()}\n" in page
    assert communication.digest() in communication.PICTURE.read_text(encoding="utf-8")


def test_the_time_is_that_of_messages_and_bytes():
    method = communication.Method("", 8.0, lambda ranks: 10.0, 5)
    network = communication.Network("", 0.5, 1e9)
    expected = (10 * 0.5 + communication.PARAMETERS * 8 * 0.75 / 1e9) / 5
    assert communication.seconds(method, network, 4) == pytest.approx(expected)
