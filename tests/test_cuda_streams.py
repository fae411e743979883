"""Several streams and devices, late copies, memory that is used again: what the CUDA backend keeps, and for whom.

In numba's simulator a stream does its work when somebody waits for it, a graph knows addresses alone, memory of the
host that is pinned goes back to a pool, and a kernel that uses memory of another device, or of no array, raises an
error: see `fastopt/kernels/cuda/simulated.py`.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_streams.py
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt import rules
from fastopt.kernels import get_backend

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
simulator_only = pytest.mark.skipif(not SIMULATED, reason="a second device, or a pool, is simulated")


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


def xp() -> Any:
    return get_backend("cuda").xp


def stream() -> Any:
    """A stream that the legacy stream does not wait for."""
    return xp().cuda.Stream(non_blocking=True)


def host(array: Any) -> np.ndarray:
    return get_backend("cuda").host(array)


def uploaded(array: np.ndarray) -> Any:
    return get_backend("cuda").adopt(array)


# --- streams ----------------------------------------------------------------------------------------------------------


def bare_update(size: int) -> Callable[[], Any]:
    """An update of arrays of its own; the chunks are those of every update of this size."""
    arrays = [uploaded(np.ones(size, np.float32)) for _ in range(4)]

    def call() -> Any:
        rules.adam.update_(*arrays, t=1, lr=0.5)
        return arrays[0]

    return call


def forward_pass(size: int) -> Callable[[], Any]:
    x = uploaded(np.arange(2.0 * size).reshape(size, 2))
    return lambda: fastopt.batchnorm_forward(x)[0]


def clipped_norm(size: int) -> Callable[[], Any]:
    """A norm of float64 gradients, which are summed again where their squares may have left the range."""
    opt = fastopt.SGD({"w": np.zeros(size)}, lr=1.0, backend="cuda", max_norm=1.0)
    grads = {"w": uploaded(np.full(size, 1e200))}

    def call() -> Any:
        opt.step(grads)
        return opt.params["w"]

    return call


@pytest.mark.parametrize("make", [bare_update, forward_pass, clipped_norm])
def test_what_was_sent_on_one_stream_is_there_before_another_reads_it(make):
    size = {bare_update: 77, forward_pass: 19, clipped_norm: 7}[make]
    first, second = stream(), stream()
    calls = []
    for each in (first, second):
        with each:
            calls.append(make(size))
            each.synchronize()
    with first:
        one = calls[0]()  # sends a table, of which nobody knows yet whether it has arrived
    with second:
        other = calls[1]()
        second.synchronize()
        found = host(other)
    with first:
        first.synchronize()
        expected = host(one)
    np.testing.assert_array_equal(found, expected)


@simulator_only
def test_memory_that_several_streams_have_used_is_let_go_when_the_device_has_done_its_work(monkeypatch):
    from fastopt.kernels.cuda.kept import Kept

    waited: list[int] = []
    monkeypatch.setattr(xp().cuda.Device, "synchronize", lambda device: waited.append(device.id), raising=False)
    kept: Kept[str] = Kept(2)
    arrays = [np.zeros(1) for _ in range(4)]

    def found(array: np.ndarray) -> str | None:
        return kept.find(array, 0, xp().cuda.get_current_stream())

    kept.add(arrays[0], "0", xp())
    kept.add(arrays[1], "1", xp())
    with stream():
        assert found(arrays[1]) == "1"
    assert found(arrays[0]) == "0"
    kept.add(arrays[2], "2", xp())
    assert waited == [0]
    kept.add(arrays[3], "3", xp())
    assert waited == [0]
    assert [found(array) for array in arrays] == [None, None, "2", "3"]


@simulator_only
def test_a_room_is_used_again_by_its_stream_alone():
    from fastopt.kernels.cuda.launcher import Rooms

    rooms, on, other = Rooms(get_backend("cuda"), (3, np.float64)), stream(), stream()
    with on:
        room = rooms.take()
        rooms.put_back(room)
    with other:
        another = rooms.take()
        assert another is not room
        rooms.put_back(another)
    with on, xp().cuda.Device(1):
        assert rooms.take() not in (room, another)
    with on:
        assert rooms.take() is room
        assert rooms.take() not in (room, another)


# --- devices ----------------------------------------------------------------------------------------------------------


@simulator_only
@pytest.mark.parametrize("make", [bare_update, forward_pass, clipped_norm])
def test_each_device_has_tables_of_its_own(make):
    results = []
    for number in (1, 0, 1):
        with xp().cuda.Device(number):
            results.append(host(make(23)()).tobytes())
    assert results[0] == results[1] == results[2]


# --- graphs -----------------------------------------------------------------------------------------------------------


def captured(calls: Callable[[], Any]) -> Any:
    """A graph of what `calls` launches, after it was called once; then all memory that is free is taken by others."""
    calls()
    on = xp().cuda.get_current_stream()
    on.synchronize()
    on.begin_capture()
    try:
        calls()
    finally:
        graph = on.end_capture()
    gc.collect()
    return graph


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_a_captured_batchnorm_keeps_what_its_graph_writes_to(options):
    rng = np.random.default_rng(0)
    with stream() as on:
        x, dy, gamma, beta = (uploaded(rng.normal(size=shape)) for shape in ((40, 3), (40, 3), 3, 3))
        mean, var = uploaded(np.zeros(3)), uploaded(np.ones(3))
        y, dx, dgamma, dbeta = (uploaded(np.zeros(shape)) for shape in ((40, 3), (40, 3), 3, 3))

        def passes() -> None:
            _, saved = fastopt.batchnorm_forward(x, gamma, beta, mean, var, out=y, **options)
            fastopt.batchnorm_backward(dy, saved, out=dx, dgamma=dgamma, dbeta=dbeta)

        graph = captured(passes)
        expected = [host(array) for array in (y, dx, dgamma, dbeta)]
        others = [xp().zeros(size) + 7.0 for size in (3, 6, 9, 18, 21, 24, 64, 128, 512) for _ in range(4)]
        for replay in range(2):
            for array in (y, dx, dgamma, dbeta):
                array.fill(0)
            graph.launch()
            on.synchronize()
            for array, wanted in zip((y, dx, dgamma, dbeta), expected, strict=True):
                np.testing.assert_array_equal(host(array), wanted, err_msg=str(replay))
        assert all((host(array) == 7.0).all() for array in others), "a replay has written to memory of others"


def test_a_captured_forward_pass_keeps_its_memory_from_later_ones():
    rng = np.random.default_rng(0)
    x, other, dy = (uploaded(rng.normal(size=(40, 3))) for _ in range(3))
    with stream() as on:
        y = uploaded(np.zeros((40, 3)))
        graph = captured(lambda: fastopt.batchnorm_forward(x, out=y))
        expected = host(fastopt.batchnorm_backward(dy, fastopt.batchnorm_forward(other)[1]).dx)
        for _ in range(3):  # of which one would have the memory
            _, saved = fastopt.batchnorm_forward(other)
            graph.launch()
            found = fastopt.batchnorm_backward(dy, saved).dx
            on.synchronize()
            np.testing.assert_array_equal(host(found), expected)


def test_a_captured_backward_pass_keeps_what_an_ordinary_forward_pass_left():
    rng = np.random.default_rng(0)
    x, dy, gamma = (uploaded(rng.normal(size=shape)) for shape in ((40, 3), (40, 3), 3))
    with stream() as on:
        dx, sums = uploaded(np.zeros((40, 3))), uploaded(np.zeros(3))
        kept = [fastopt.batchnorm_forward(x, gamma)[1] for _ in range(2)]
        graph = captured(lambda: fastopt.batchnorm_backward(dy, kept.pop(), out=dx, dgamma=sums))
        expected = host(dx)
        dx.fill(0)
        _, saved = fastopt.batchnorm_forward(x, gamma)  # memory that the graph reads is not given to it
        _, twin = fastopt.batchnorm_forward(x * 3.0, gamma)
        graph.launch()
        on.synchronize()
        np.testing.assert_array_equal(host(dx), expected)
    assert not saved.used
    assert not twin.used


def test_a_shape_that_was_not_seen_before_cannot_be_captured():
    with stream() as on:
        x, y = uploaded(np.ones((29, 2))), uploaded(np.ones((29, 2)))
        on.begin_capture()
        try:
            with pytest.raises(
                RuntimeError, match=r"captured before there was one like it.*make an ordinary one first"
            ):
                fastopt.batchnorm_forward(x, out=y)
        finally:
            on.end_capture()
        fastopt.batchnorm_forward(x, out=y)
        on.synchronize()
        assert not host(y).any()


def test_a_captured_step_of_float64_sums_again_beyond_the_squares():
    with stream() as on:
        opt = fastopt.SGD({"w": np.zeros(5)}, lr=1.0, backend="cuda", max_norm=1.0)
        grads = opt.grads["w"]
        grads.fill(1e200)
        graph = captured(lambda: opt.step())
        others = [xp().zeros(size) + 7.0 for size in (1, 2, 3, 6, 12) for _ in range(8)]
        info = opt.prepare_replay()
        graph.launch()
        on.synchronize()
        assert info.grad_norm == pytest.approx(1e200 * 5**0.5)
        np.testing.assert_allclose(host(opt.params["w"]), -2 / 5**0.5)
        assert all((host(array) == 7.0).all() for array in others)


# --- pinned memory ----------------------------------------------------------------------------------------------------


def test_a_decision_that_nobody_waits_for_writes_to_memory_of_its_own():
    """The copy to the host is made after the optimizer is gone, and with it all that knew where the copy goes."""
    backend = get_backend("cuda")
    with stream() as on:
        opt = fastopt.SGD({"w": np.ones(3)}, lr=1.0, backend="cuda", nonfinite="skip")
        grads = {"w": uploaded(np.ones(3))}
        opt.step(grads)
        on.synchronize()
        opt.step(grads)
        opt.step(grads)
        memory = [opt.flat, opt._pipeline.buffers]  # the kernels that wait know its addresses alone
        del opt
        gc.collect()
        others = [backend.pinned(3) for _ in range(6)]
        for array in others:
            array.fill(7.0)
        on.synchronize()
        assert [array.tolist() for array in others] == [[7.0] * 3] * 6
    assert len(memory) == 2


@simulator_only
def test_a_slot_is_used_again_on_its_stream_and_after_its_copy_on_another():
    from fastopt.kernels.cuda.decisions import Slots

    slots, on, other = Slots(get_backend("cuda")), stream(), stream()
    slot = slots.take(on)
    slot.event.record(on)
    slots.put_back(slot)
    assert slots.take(other) is not slot
    assert slots.take(on) is slot
    slots.put_back(slot)
    slot.event.synchronize()
    assert slots.take(other) is slot
