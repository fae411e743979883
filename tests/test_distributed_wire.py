"""Gradients in fewer bytes: what messages hold, what is kept for the next ones, and that all ranks stay the same.

A check is a function of a communicator, as in test_distributed.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME
from ranks import LACKING, launch
from test_distributed import assert_same, communicator, content, gradients, same_on_all, tree

import fastopt
from fastopt.communicators import CommunicatorError, run_threads
from fastopt.kernels.contract import CODES
from fastopt.kernels.cpu.wire import codec
from fastopt.step.wire import Wire
from fastopt.storage.codes import decode, encode
from fastopt.storage.formats import dtype_of

FORMATS = ("bfloat16", "int8")
STEP = {"bfloat16": 2.0**-8, "int8": 1.0 / 127}
"""The largest error of a message, of the largest number of its block."""


def numbers(rank: int, size: int) -> np.ndarray:
    rng = np.random.default_rng((rank, size))
    return (rng.normal(size=size) * 10.0 ** rng.integers(-3, 3, size)).astype(np.float32)


# --- checks: what each rank runs --------------------------------------------------------------------------------------


def check_sums(world: Any) -> None:
    """Of any size; a part for each rank, or all of it for all."""
    comm = communicator(world)
    for name in FORMATS:
        for size in (1, 7, CODES * comm.size, 5 * CODES + 3, 9001):
            each = [numbers(rank, size) for rank in range(comm.size)]
            exact = np.sum(each, axis=0, dtype=np.float64)
            largest = sum(float(np.abs(array).max()) for array in each)
            array = each[comm.rank].copy()
            Wire(name, comm).add_up(array)
            assert np.abs(array - exact).max() <= 2 * STEP[name] * largest
            assert same_on_all(world, array.tobytes())
            length = -(-size // comm.size)
            array = np.zeros(comm.size * length, np.float32)
            array[:size] = each[comm.rank]
            own = np.full(length, np.nan, np.float32)
            Wire(name, comm).add_up(array, own)
            padded = np.zeros(comm.size * length)
            padded[:size] = exact
            part = padded[comm.rank * length : (comm.rank + 1) * length]
            assert np.abs(own - part).max() <= STEP[name] * largest
            np.testing.assert_array_equal(array[:size], each[comm.rank])


def check_a_window_is_not_seen(world: Any) -> None:
    """Blocks are of the part, wherever it is cut into messages."""
    comm = communicator(world)
    given = numbers(comm.rank, 40 * CODES * comm.size)
    for name in FORMATS:
        found = []
        for window in (2**20, 3 * CODES * comm.size):
            array, wire = given.copy(), Wire(name, comm)
            for _ in range(2):
                array[...] = given
                wire.add_up(array, window=window)
            found.append(array)
        np.testing.assert_array_equal(found[0], found[1])


def check_what_was_not_sent_is_sent_later(world: Any) -> None:
    """The sum over steps of what arrives is that of what was given, but for the last step's errors."""
    comm = communicator(world)
    each = [numbers(rank, 3000) for rank in range(comm.size)]
    exact = np.sum(each, axis=0, dtype=np.float64)
    largest = sum(float(np.abs(array).max()) for array in each)
    for sharded in (False, True):
        wire, total = Wire("int8", comm), 0.0
        own = np.empty(3000 // comm.size, np.float32) if sharded else None
        for _ in range(50):
            array = each[comm.rank].copy()
            wire.add_up(array, own)
            total = total + (array if own is None else own).astype(np.float64)
        part = exact if own is None else exact.reshape(comm.size, -1)[comm.rank]
        assert np.abs(total / 50 - part).max() <= 3 * STEP["int8"] * largest / 50


def check_training(world: Any) -> None:
    """All ranks have the same parameters; they are near those of exact sums."""
    comm = communicator(world)
    for wire in FORMATS:
        for case in ("Adam", "LAMB", "SGD-lr=0.1"):
            found = []
            for shard, kind in ((False, wire), (True, wire), (False, None)):
                opt = BY_NAME[case].make(tree(), comm=world, shard=shard, wire=kind, max_norm=1.0)
                for step in range(12):
                    opt.step(gradients(step, comm.rank, opt.params))
                data = b"".join(array.tobytes() for array in opt.flat.arrays)
                assert same_on_all(world, data)
                found.append(np.concatenate([array.ravel() for array in opt.flat.arrays]))
            began = np.concatenate([array.ravel() for array in tree().values()])
            way = np.linalg.norm(found[2] - began)
            for params in found[:2]:
                assert np.linalg.norm(params - found[2]) < 0.1 * way


def check_a_gradient_that_is_not_finite(world: Any) -> None:
    comm = communicator(world)
    for wire in FORMATS:
        for shard in (False, True):
            opt = BY_NAME["Adam"].make(tree(), comm=world, shard=shard, wire=wire, nonfinite="skip")
            opt.step(gradients(0, comm.rank, opt.params))
            before = content(opt)
            bad = gradients(0, comm.rank, opt.params)
            if comm.rank == comm.size - 1:
                bad["w"][0, 0] = np.nan
                bad["a"][3, 3] = -np.inf
            assert opt.step(bad).skipped
            assert_same({**content(opt), "step": before["step"]}, before)
            for step in (0, 3):
                grads = {**gradients(0, comm.rank, opt.params), "w": None}  # beside what was a NaN
                assert opt.step(grads).skipped is False, step
                assert all(np.isfinite(array).all() for array in opt.flat.arrays)


CHECKS: dict[str, Callable[[Any], None]] = {
    name: thing for name, thing in globals().items() if name.startswith("check_")
}


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_threads(name, size):
    run_threads(size, CHECKS[name], timeout=60.0)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, marks=pytest.mark.skipif(bool(LACKING[engine]), reason=LACKING[engine]))
        for engine in ("mpi", "gloo")
    ],
)
def test_processes(engine):
    launch(engine, 2, "test_distributed_wire")


@pytest.mark.parametrize("size", [1, 15, 16, 17, CODES - 1, CODES, CODES + 1, 100 * CODES + 5])
def test_messages_hold_what_numpy_rounds_to(size):
    given = numbers(0, size)
    given[size // 2] = 0.0
    for name in FORMATS:
        format_ = codec(name)
        message, errors = np.zeros(format_.size_of(size), np.uint8), np.zeros(size, np.float32)
        format_.encode(given, message, errors)
        found = np.ones(size, np.float32)
        format_.decode(message, found)
        if name == "int8":
            expected = decode(*encode(given, "int8"))
            np.testing.assert_array_equal(errors, given - expected)
        else:
            expected = given.astype(dtype_of("bfloat16", "test")).astype(np.float32)
        np.testing.assert_array_equal(found, expected)
        format_.decode(message, found, add=True)
        np.testing.assert_array_equal(found, 2 * expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_arrives_and_leaves_no_error(bad):
    given = numbers(0, 3 * CODES)
    given[CODES + 5] = bad
    format_ = codec("int8")
    message, errors = np.zeros(format_.size_of(given.size), np.uint8), np.zeros(given.size, np.float32)
    found = np.empty_like(given)
    format_.encode(given, message, errors)
    format_.decode(message, found)
    blocks = np.isfinite(found).reshape(3, CODES)
    assert blocks[[0, 2]].all()
    assert not blocks[1].any()
    assert np.isfinite(errors).all()
    assert (errors.reshape(3, CODES)[1] == 0).all()


def test_messages_are_as_short_as_said():
    assert codec("bfloat16").size_of(1000 * CODES) == 2 * 1000 * CODES
    assert codec("int8").size_of(1000 * CODES) == 1000 * (CODES + 4)


def test_a_copy_keeps_its_own_errors_and_a_load_drops_them(tmp_path):
    def train(comm):
        opt = BY_NAME["Adam"].make(tree(), comm=comm, wire="int8")
        opt.step(gradients(0, comm.rank, opt.params))
        empty = BY_NAME["Adam"].make(tree(), comm=comm).nbytes.scratch
        assert opt.nbytes.scratch >= empty + 4 * opt.flat.layout.size
        opt.save(tmp_path / "x")
        twin = copy.deepcopy(opt)
        for each in (opt, twin):
            each.step(gradients(3, comm.rank, each.params))
        assert_same(content(twin), content(opt))
        resumed = BY_NAME["Adam"].make(tree(), comm=comm, wire="int8")
        for each in (opt, resumed):
            each.load(tmp_path / "x")
            each.step(gradients(3, comm.rank, each.params))
        assert_same(content(resumed), content(opt))
        assert content(resumed) != content(twin)  # which had something left from its first step

    run_threads(2, train)


def test_a_restart_drops_what_was_not_sent():
    def train(comm):
        opt, new = (BY_NAME["Adam"].make(tree(), comm=comm, wire="int8") for _ in range(2))
        opt.step(gradients(0, comm.rank, opt.params))
        opt.set_params(tree())
        opt.restart()
        for each in (opt, new):
            each.step(gradients(3, comm.rank, each.params))
        assert_same(content(opt), content(new))

    run_threads(2, train)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"wire": "int4"}, "wire: must be one of 'bfloat16', 'int8'"),
        ({"wire": 8}, "wire: must be"),
        (
            {"params": {"w": np.zeros(3)}},
            "wire: must be None unless gradients are added up in float32 on the CPU, got fl",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, text):
    given = {"params": {"w": np.zeros(3, np.float32)}, "wire": "int8", **options}
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(text)):
        run_threads(1, lambda comm: fastopt.SGD(given["params"], comm=comm, wire=given["wire"]))


def test_without_ranks_there_is_no_wire():
    with pytest.raises(ValueError, match=r"^wire: must be None without comm=, got 'int8'$"):
        fastopt.SGD({"w": np.zeros(3, np.float32)}, wire="int8")


def test_ranks_have_the_same_wire():
    def make(comm):
        with pytest.raises(CommunicatorError, match=r"^SGD\(\): rule and options must be the same on every rank"):
            fastopt.SGD({"w": np.zeros(3, np.float32)}, comm=comm, wire=FORMATS[comm.rank])

    run_threads(2, make)
