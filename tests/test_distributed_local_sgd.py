"""LocalSGD: ranks that train on their own agree, to the bit, after every outer step; and go on from their files.

A check is a function of a communicator, as in test_distributed.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import LACKING, launch
from test_distributed import communicator, content, in_a_shared_folder, same_on_all

import fastopt
from fastopt.communicators import CommunicatorError, run_threads
from fastopt.distributed import LocalSGD

SHAPES: dict[str, tuple[int, ...]] = {"W": (70, 61), "b": (61,), "s": ()}


def tree(dtype: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def gradients(step: int, rank: int, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of a bowl with a minimum of its own on each rank, and noise."""
    rng = np.random.default_rng((step, rank))
    return {name: np.asarray(p - rank + rng.normal(0.0, 0.1, p.shape), dtype=p.dtype) for name, p in params.items()}


def made(world: Any, every: int, dtype: Any = np.float64, **options: Any) -> LocalSGD:
    inner = fastopt.Adam(tree(dtype), lr=0.05, ema=0.9)
    return LocalSGD(
        inner, outer=fastopt.Nesterov(inner.params, lr=0.7, momentum=0.9, comm=world, **options), every=every
    )


def bits(opt: LocalSGD) -> dict[str, bytes]:
    """All of one rank."""
    own = {f"inner/{name}": data for name, data in content(opt.inner).items()}
    return own | content(opt.outer) | {"steps": repr((opt._steps, opt._since)).encode()}


def expected(size: int, every: int, steps: int, lr: float, momentum: float) -> dict[str, np.ndarray]:
    """The same in one process: an optimizer for each rank, and the outer step in NumPy."""
    workers = [fastopt.Adam(tree(), lr=0.05) for _ in range(size)]
    agreed = tree()
    velocity = {name: np.zeros_like(p) for name, p in agreed.items()}
    for step in range(steps):
        for rank, worker in enumerate(workers):
            worker.step(gradients(step, rank, worker.params))
        if (step + 1) % every == 0 or step == steps - 1:
            for name, p in agreed.items():
                change = p - np.mean([worker.params[name] for worker in workers], axis=0)
                velocity[name] = momentum * velocity[name] + change
                agreed[name] = np.asarray(p - lr * (change + momentum * velocity[name]))
            for worker in workers:
                for name, p in agreed.items():
                    worker.params[name][...] = p
    return agreed


# --- checks: what each rank runs --------------------------------------------------------------------------------------


def check_it_is_the_formula(world: Any) -> None:
    comm = communicator(world)
    for every, steps in ((1, 3), (4, 10)):
        agreed = expected(comm.size, every, steps, 0.7, 0.9)
        for options in ({"shard": False}, {"shard": True}, {"order": "fixed"}):
            opt = made(world, every, **options)
            for step in range(steps):
                opt.step(gradients(step, comm.rank, opt.params))
                if (step + 1) % every == 0:
                    assert same_on_all(world, b"".join(p.tobytes() for p in opt.params.values()))
            opt.synchronize()
            assert opt.synchronize() is None
            assert opt.step_count == steps
            assert opt.outer.step_count == -(-steps // every)
            for name, p in agreed.items():
                np.testing.assert_allclose(opt.params[name], p, rtol=1e-12, atol=1e-13)
            assert same_on_all(world, b"".join(p.tobytes() for p in opt.params.values()))


def check_the_mean_after_each_step_is_data_parallel(world: Any) -> None:
    comm = communicator(world)
    inner = fastopt.SGD(tree(), lr=0.1)
    opt = LocalSGD(inner, outer=fastopt.SGD(inner.params, lr=1.0, comm=world), every=1)
    other = fastopt.SGD(tree(), lr=0.1, comm=world)
    for step in range(5):
        opt.step(gradients(step, comm.rank, opt.params))
        other.step(gradients(step, comm.rank, other.params))
    for name, p in other.params.items():
        np.testing.assert_allclose(opt.params[name], p, rtol=1e-12, atol=1e-13)


@in_a_shared_folder
def check_a_run_goes_on_from_its_files(world: Any, folder: Path) -> None:
    comm = communicator(world)
    for shard, since in itertools.product((False, True), (0, 2)):
        path = folder / f"run-{shard}-{since}"
        opt = made(world, 3, np.float32, shard=shard)
        for step in range(3 + since):
            if step == 1:
                opt.save(path)
            opt.step(gradients(step, comm.rank, opt.params))
        opt.save(path, extra={"epoch": since})
        names = [f"{path.name}.rank-{rank}-of-{comm.size}.step-{3 + since}" for rank in range(comm.size)]
        assert sorted(file.name for file in folder.glob(f"{path.name}*")) == [path.name, *names]
        other = made(world, 3, np.float32, shard=shard)
        assert other.load(path) == {"epoch": since}
        assert bits(other) == bits(opt)
        for step in range(5):
            for each in (opt, other):
                each.step(gradients(step, comm.rank, each.params))
        assert bits(other) == bits(opt)
        alone = fastopt.Nesterov(tree(np.float32), lr=0.7, momentum=0.9)
        alone.load(path)
        assert alone.step_count == 1


@in_a_shared_folder
def check_files_that_are_lacking_change_nothing(world: Any, folder: Path) -> None:
    comm = communicator(world)
    last = comm.rank == comm.size - 1
    opt = made(world, 3)
    opt.step(gradients(0, comm.rank, opt.params))
    opt.save(folder / "run")
    opt.step(gradients(1, comm.rank, opt.params))
    before = bits(opt)
    if last:
        own = folder / f"run.rank-{comm.rank}-of-{comm.size}.step-1"
        kept = own.read_bytes()
        own.write_bytes(kept[:-1])
    with pytest.raises(ValueError if last else CommunicatorError):
        opt.load(folder / "run")
    if last:
        own.unlink()
    with pytest.raises(FileNotFoundError if last else CommunicatorError):
        opt.load(folder / "run")
    with pytest.raises((OSError, CommunicatorError)):
        opt.save(folder / "lacking" / "run")
    assert bits(opt) == before
    opt.outer.save(folder / "other")
    with pytest.raises(ValueError, match=r"must be a file of LocalSGD\.save, got one of an optimizer"):
        opt.load(folder / "other")
    assert bits(opt) == before


CHECKS: dict[str, Callable[[Any], None]] = {
    name: thing for name, thing in globals().items() if name.startswith("check_")
}


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_threads(name, size):
    run_threads(size, CHECKS[name], timeout=60.0)


@pytest.mark.skipif(bool(LACKING["mpi"]), reason=LACKING["mpi"])
def test_processes_of_mpi():
    launch("mpi", 2, "test_distributed_local_sgd")


def test_a_save_that_fails_leaves_the_old_files_in_force(tmp_path, monkeypatch):
    path = tmp_path / "run"

    def train(comm):
        opt = made(comm, 3)
        opt.step(gradients(0, comm.rank, opt.params))
        opt.save(path)
        kept = bits(opt)
        opt.step(gradients(1, comm.rank, opt.params))

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(opt.outer, "save", full)
        with pytest.raises(OSError, match="No space left"):
            opt.save(path)  # after the inner optimizers have been written
        other = made(comm, 3)
        other.load(path)
        assert bits(other) == kept

    run_threads(2, train)


def test_as_many_ranks_as_wrote_the_files(tmp_path):
    def write(comm):
        opt = made(comm, 2)
        opt.step(gradients(0, comm.rank, opt.params))
        opt.save(tmp_path / "run")

    def read(comm):
        opt = made(comm, 2)
        with pytest.raises(ValueError, match=r"^comm: must have 2 ranks, as the run that wrote .*run', got 3; or load"):
            opt.load(tmp_path / "run")
        opt.outer.load(tmp_path / "run")

    run_threads(2, write)
    run_threads(3, read)


def test_a_rank_whose_parameters_are_not_finite_is_set_back():
    """The outer optimizer skips the step on all ranks, which go on from what they had agreed on."""

    def train(comm):
        inner = fastopt.SGD(tree(), lr=0.1)
        outer = fastopt.SGD(inner.params, lr=1.0, comm=comm, nonfinite="skip")
        opt = LocalSGD(inner, outer=outer, every=2)
        for step in range(2):
            grads = gradients(step, comm.rank, opt.params)
            if comm.rank == 1:
                grads["b"][3] = np.nan
            opt.step(grads)
        for name, p in tree().items():
            np.testing.assert_array_equal(opt.params[name], p)

    run_threads(2, train)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"every": 0}, ValueError, "every: must be"),
        ({"every": 1.5}, TypeError, "every: must be"),
        ({"inner": 3}, TypeError, "inner: must be an optimizer of fastopt, got int"),
        ({"outer": None}, TypeError, "outer: must be an optimizer of fastopt, got NoneType"),
        ({"outer": fastopt.SGD(tree())}, ValueError, "outer: must be an optimizer with comm=, got one of one process"),
        ({"inner": fastopt.SGD({"W": np.ones(3)})}, ValueError, "inner: must have the paths of outer"),
        ({"inner": fastopt.SGD({**tree(), "b": np.ones(3)})}, ValueError, "inner: must have the shapes of outer"),
        ({"inner": fastopt.SGD(tree(np.float32))}, ValueError, "inner: must have the dtype of outer"),
        (
            {"inner": fastopt.ScheduleFreeAdamW(tree())},
            ValueError,
            "inner: must be of a rule whose states do not begin",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, error, text):
    def make(comm):
        given = {"inner": fastopt.SGD(tree()), "outer": fastopt.SGD(tree(), comm=comm), "every": 2, **change}
        LocalSGD(given.pop("inner"), **given)

    with pytest.raises(error, match="^" + re.escape(text)):
        run_threads(1, make)


def test_an_inner_optimizer_of_ranks_is_refused():
    def make(comm):
        opt = fastopt.SGD(tree(), comm=comm)
        with pytest.raises(ValueError, match=r"^inner: must be an optimizer of one process, got one with comm="):
            LocalSGD(opt, outer=opt, every=2)

    run_threads(2, make)
