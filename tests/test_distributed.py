"""Several ranks make the steps of one process, to the bit; where one cannot, all raise, and nothing is changed.

A check is a function of a communicator. Threads run each as a test of its own; MPI and gloo run them all in one launch.
"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import resource
import shutil
import sys
import tempfile
import time
import tracemalloc
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING, OF_EACH_KIND, PER_RULE, WRAPPED, Case
from ranks import LACKING, launch

import fastopt
from fastopt.communicators import Communicator, communicator_of, run_threads
from fastopt.distributed import CommunicatorError
from fastopt.interop import from_torch_state, to_torch_state
from fastopt.kernels import get_backend
from fastopt.kernels.contract import BLOCK, N_CHUNK
from fastopt.step.ranks import Ranks
from fastopt.storage.flat import packed
from fastopt.storage.layout import Layout

ALL = {str(case): case for case in (*PER_RULE, *WRAPPED)}
ADAM, LAMB, SGD = BY_NAME["Adam"], BY_NAME["LAMB"], BY_NAME["SGD-lr=0.1"]


def tree(dtype: Any = np.float32, *, small: bool = False) -> dict[str, np.ndarray]:
    """Parameters some of which a boundary cuts, among them one that is 0-d and one that is empty.

    small : for rules whose linear algebra takes long.
    """
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"a": (100, 111), "b": (97,), "c": (5, 2, 3), "w": (100, 127)}
    shapes |= {"s": (), "empty": (0, 3)} | ({"a": (64, 64), "w": (50, 70)} if small else {})
    return {name: np.asarray(rng.normal(size=shape), dtype=dtype) for name, shape in shapes.items()}


def gradients(step: int, rank: int, params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The gradients of a rank, of all magnitudes. Some are None on one rank, some on all."""
    rng = np.random.default_rng((step, rank))
    scale = 10.0 ** rng.integers(-4, 3)
    found: dict[str, Any] = {
        name: np.asarray(scale * rng.normal(size=array.shape), dtype=array.dtype) for name, array in params.items()
    }
    found["b"][:5] = -0.0
    found["w"][0, :5] = -0.0
    if step % 3 == 1 and rank == 0:
        found["w"] = None
    if step % 3 == 2:
        found["b"] = None
    return found


def communicator(world: Any) -> Communicator:
    comm = communicator_of(world)
    assert comm is not None
    return comm


def tree_for(case: Case) -> dict[str, np.ndarray]:
    return tree(small=case.rule.matrixwise is not None)


def alone(case: Case, size: int, steps: int, **options: Any) -> fastopt.Optimizer:
    """One process that accumulates the gradients of all ranks."""
    opt = case.make(tree_for(case), **options)
    for step in range(steps):
        for rank in range(size):
            opt.accumulate(gradients(step, rank, opt.params))
        opt.step()
    return opt


def together(world: Any, case: Case, steps: int, **options: Any) -> fastopt.Optimizer:
    """The same by ranks."""
    opt = case.make(tree_for(case), comm=world, **options)
    for step in range(steps):
        opt.step(gradients(step, communicator(world).rank, opt.params))
    return opt


def content(opt: fastopt.Optimizer) -> dict[str, bytes]:
    """All bits of an optimizer, by name."""
    found = {f"p/{path}": array.tobytes() for path, array in zip(opt.flat.paths, opt.flat.arrays, strict=True)}
    state = opt.state_dict()
    for name, arrays in {**state["state"], "ema": state["ema"] or {}}.items():
        found.update({f"{name}/{path}": array.tobytes() for path, array in arrays.items()})
    return found | {"step": str(state["step"]).encode(), "missed": repr(state["missed"]).encode()}


def assert_same(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    assert [name for name in expected if found.get(name) != expected[name]] == []
    assert found.keys() == expected.keys()


def in_one_order(world: Any) -> dict[str, str]:
    """The option by which ranks add up as one process does; two numbers have one sum in any order."""
    return {"order": "engine" if communicator(world).size <= 2 else "fixed"}


def same_on_all(world: Any, data: bytes) -> bool:
    """Whether all ranks have the same bytes."""
    comm = communicator(world)
    found = np.zeros(comm.size, np.int64)
    comm.allgather(np.array([zlib.crc32(data)]), found)
    return len(set(found.tolist())) == 1


@contextmanager
def shared_folder(world: Any) -> Iterator[Path]:
    """A new folder that all ranks know, for a block."""
    comm = communicator(world)
    name = np.zeros(200, np.uint8)
    if comm.rank == 0:
        text = tempfile.mkdtemp(prefix="ranks").encode()
        name[: len(text)] = np.frombuffer(text, np.uint8)
    comm.allreduce(name, "max")
    folder = Path(bytes(name).rstrip(b"\0").decode())
    try:
        yield folder
        comm.allreduce(np.zeros(1))  # nobody uses it any more
    finally:
        if comm.rank == 0:
            shutil.rmtree(folder)


def in_a_shared_folder(check: Callable[[Any, Path], None]) -> Callable[[Any], None]:
    @wraps(check)
    def checked(world: Any) -> None:
        with shared_folder(world) as folder:
            check(world, folder)

    return checked


# --- checks: what each rank runs --------------------------------------------------------------------------------------


def rule_agrees(world: Any, case: Case, shard: bool, **options: Any) -> None:
    comm = communicator(world)
    found = content(together(world, case, 5, shard=shard, **in_one_order(world), **options))
    if comm.rank == 0:
        assert_same(found, content(alone(case, comm.size, 5, **options)))
    assert same_on_all(world, b"".join(found.values()))


def check_rules(world: Any) -> None:
    for case in ALL.values() if communicator(world).size <= 2 else OF_EACH_KIND:
        for shard in (False, True):
            rule_agrees(world, case, shard)


def check_flags(world: Any) -> None:
    for case in OF_EACH_KIND:
        for shard in (False, True):
            rule_agrees(world, case, shard, **EVERYTHING)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_norm": 0.5, "nonfinite": "skip"},
    {"clip_norm_per_tensor": 0.1},
    {"grad_norm": True, "overrides": {"b": {"lr": 0.02}, "w": {"frozen": True}}, "clip_value": 0.1},
    {"lr": fastopt.schedules.cosine(0.1, 0.0, steps=10), "overrides": {"a": {"lr_scale": 0.5}}, "ema": 0.9},
)


def check_options(world: Any) -> None:
    for options in OPTIONS:
        for case in (ADAM, LAMB):
            for shard in (False, True):
                rule_agrees(world, case, shard, **options)


def check_double_precision(world: Any) -> None:
    comm = communicator(world)
    for shard in (False, True):
        opt = LAMB.make(tree(np.float64), comm=world, max_norm=1e200, shard=shard, **in_one_order(world))
        other = LAMB.make(tree(np.float64), max_norm=1e200)
        huge = [
            {name: 1e180 * array for name, array in gradients(0, rank, opt.params).items()} for rank in range(comm.size)
        ]
        for _ in range(2):
            info = opt.step(huge[comm.rank])
            for grads in huge:
                other.accumulate(grads)
            assert info.grad_norm == other.step().grad_norm
        assert_same(content(opt), content(other))


def check_the_order_of_the_engine(world: Any) -> None:
    size = communicator(world).size
    expected = alone(ADAM, size, 100, max_norm=1.0)
    for shard in (False, True):
        opt = together(world, ADAM, 100, max_norm=1.0, shard=shard)
        for own, array in zip(opt.flat.arrays, expected.flat.arrays, strict=True):
            np.testing.assert_allclose(own, array, rtol=1e-3, atol=1e-4)
        assert same_on_all(world, b"".join(content(opt).values()))


def check_own_gradients_weights_and_accumulation(world: Any) -> None:
    comm = communicator(world)
    weights = [float(rank % 3) for rank in range(comm.size)]  # 0 on the first: it has no batch
    weights = weights if comm.size > 1 else [2.0]
    for shard in (False, True):
        for zero in (False, True):
            options = {"max_norm": 1.0, "zero_grad": zero}
            opt = ADAM.make(tree(), comm=world, shard=shard, **in_one_order(world), **options)
            other = ADAM.make(tree(), **options)
            for step in range(5):
                for rank in range(comm.size):
                    weight = 1.0 if step in (0, 3) else weights[rank]
                    other.accumulate(gradients(6, rank + step, other.params), weight)
                grads = gradients(6, comm.rank + step, opt.params)
                if step == 0:
                    for own, array in zip(opt.flat.grad_arrays, (grads[path] for path in opt.flat.paths), strict=True):
                        own[...] = array
                    kept = [array.copy() for array in opt.flat.grad_arrays]
                    opt.step()
                    for own, array in zip(opt.flat.grad_arrays, kept, strict=True):
                        np.testing.assert_array_equal(own, 0.0 * array if zero else array)
                elif step == 1:
                    opt.step(grads if weights[comm.rank] else dict.fromkeys(grads), weight=weights[comm.rank])
                elif step == 2:
                    opt.accumulate(grads, weights[comm.rank])
                    opt.step()
                elif step == 3:
                    opt.step(grads, 2.0, "sum")
                else:
                    opt.step(grads, weight=weights[comm.rank])
                other.step(None, *((2.0, "sum") if step == 3 else ()))
                assert_same(content(opt), content(other))


def check_a_step_for_which_no_rank_has_a_batch(world: Any) -> None:
    for shard in (False, True):
        opt = together(world, ADAM, 1, shard=shard)
        before = content(opt)
        opt.step(dict.fromkeys(opt.params), weight=0.0)
        found = content(opt)
        assert opt.step_count == 2
        assert opt.state_dict()["missed"] == dict.fromkeys(opt.flat.paths, 1)
        assert_same({**found, "step": b"", "missed": b""}, {**before, "step": b"", "missed": b""})


def check_several_micro_batches_on_each_rank(world: Any) -> None:
    comm = communicator(world)
    found = []
    for shard in (False, True):
        opt = SGD.make(tree(), comm=world, shard=shard, max_norm=0.1, **in_one_order(world))
        for micro in range(3):
            opt.accumulate(gradients(micro, comm.rank, opt.params))
        found.append((opt.step().grad_norm, content(opt)))
    assert found[0] == found[1]
    other = SGD.make(tree(), max_norm=0.1)
    for micro in range(3):
        for rank in range(comm.size):
            other.accumulate(gradients(micro, rank, other.params))
    assert other.step().grad_norm == pytest.approx(found[0][0], rel=1e-6)


def check_gradients_that_are_not_finite(world: Any) -> None:
    comm = communicator(world)
    for shard in (False, True):
        for nonfinite in ("skip", "zero", "raise"):
            opt = ADAM.make(tree(), comm=world, shard=shard, nonfinite=nonfinite, max_norm=1.0, **in_one_order(world))
            other = ADAM.make(tree(), nonfinite=nonfinite, max_norm=1.0)
            for step in range(3):
                each = [gradients(0, rank + 7 * step, opt.params) for rank in range(comm.size)]
                if step == 1:
                    each[-1]["w"][-1, -1] = np.nan
                    each[-1]["s"][...] = np.inf
                for grads in each:
                    other.accumulate(grads)
                if step == 1 and nonfinite == "raise":
                    before = content(opt)
                    with pytest.raises(
                        FloatingPointError, match=r"^gradient 's' holds NaN or infinity; nothing was upd"
                    ):
                        opt.step(each[comm.rank])
                    assert_same(content(opt), before)
                    other.zero_grad()
                else:
                    info, expected = opt.step(each[comm.rank]), other.step()
                    assert (info.skipped, info.nonfinite_total) == (expected.skipped, expected.nonfinite_total)
                    assert info.skipped is (step == 1 and nonfinite == "skip")
            assert_same(content(opt), content(other))


def check_what_a_rank_reads_alone(world: Any) -> None:
    """Nothing that one rank reads waits for the others."""
    comm = communicator(world)
    opt = ADAM.make(tree(), comm=world, max_norm=1.0)
    info = opt.step(gradients(0, comm.rank, opt.params))
    if comm.rank == 0:
        assert info.grad_norm > 0.0
        assert info.clip_coefficient < 1.0
        assert "grad_norm" in repr(info)
        assert opt.lr == 0.001
        assert opt.nbytes.states > 0
        assert "Adam" in repr(opt)
        for name in ("states", "ema"):
            if comm.size > 1:
                with pytest.raises(RuntimeError, match=f"^{name}: must be read where one process holds all of it"):
                    getattr(opt, name)
    opt = ADAM.make(tree(), comm=world)
    assert opt.step(gradients(0, comm.rank, opt.params)).grad_norm is None


def check_states_are_those_of_a_part(world: Any) -> None:
    size, elements = communicator(world).size, 2**20 + 17
    params = {"a": np.ones((elements,), np.float32), "b": np.ones(100, np.float32)}
    whole = fastopt.AdamW(params, ema=0.9)
    opt = fastopt.AdamW(params, ema=0.9, comm=world)
    states = len(opt.rule.states) + 1
    for found in (opt.nbytes, opt.step({"a": params["a"], "b": None}) and opt.nbytes):
        assert found.states <= whole.nbytes.states / size + 4 * states * BLOCK
        assert found.parameters <= whole.nbytes.parameters + 4 * size * BLOCK
    own = fastopt.AdamW(params, ema=0.9, comm=world)
    own.step()  # of what is in opt.grads, which is not copied
    assert size == 1 or own.nbytes.scratch == 4 * own.flat.layout.length
    matrices = {str(k): np.ones((64, 64), np.float32) for k in range(4)}
    shampoo = fastopt.Shampoo(matrices, comm=world)
    held = np.array([shampoo.nbytes.states])
    communicator(world).allreduce(held)
    assert held[0] <= fastopt.Shampoo(matrices).nbytes.states + 4 * size * BLOCK * len(shampoo.rule.states)


def check_errors_of_one_rank(world: Any) -> None:
    comm = communicator(world)
    last = comm.size - 1
    if last == 0:
        return
    failing = [False]

    def lr(step: int) -> float:
        if failing[0] and comm.rank == last:
            raise KeyError("the schedule of the last rank")
        return 0.01

    for shard in (False, True):
        opt = ADAM.make(tree(), comm=world, shard=shard, lr=lr)
        grads = gradients(0, comm.rank, opt.params)
        opt.step(grads)
        before = content(opt)
        for own, text, changed, more in (
            (KeyError, "the schedule of the last rank", {}, {}),
            (ValueError, "gradient 'b'", {"b": np.ones(5, np.float32)}, {}),
            (ValueError, "grad_scale: must be", {}, {"grad_scale": 0.0}),
            (ValueError, "weight: must be", {}, {"weight": -1.0}),
        ):
            failing[0] = own is KeyError
            kind, text = (own, text) if comm.rank == last else (CommunicatorError, f"rank {last} has raised an error")
            began = time.monotonic()
            with pytest.raises(kind, match=text):
                opt.step({**grads, **changed} if comm.rank == last else grads, **(more if comm.rank == last else {}))
            assert time.monotonic() - began < 1.0
            failing[0] = False
            assert_same(content(opt), before)
        for what in ("grad_scale, reduction and extra", "the number of updates", "the hyperparameters"):
            scale = 1.0
            if what == "the number of updates":
                opt._pipeline.steps += comm.rank
            elif what == "the hyperparameters":
                opt.groups["b"].lr_scale = 1.0 + comm.rank
            else:
                scale += comm.rank
            text = "must be the same on every rank, got others; nothing was changed"
            with pytest.raises(CommunicatorError, match=rf"^step\(\): {what} {text}$"):
                opt.step(grads, scale)
            opt._pipeline.steps = 1
        opt.groups["b"].lr_scale = 1.0
        assert_same(content(opt), before)
        opt.step(grads)
        expected = b"".join(content(opt).values())
        assert same_on_all(world, expected)


def check_constructors_that_differ(world: Any) -> None:
    comm = communicator(world)
    if comm.size == 1:
        return
    last = comm.rank == comm.size - 1
    with pytest.raises((TypeError, CommunicatorError), match=r"Adam\(\): rank \d has raised|parameter 'b'"):
        fastopt.Adam({**tree(), "b": "no array"} if last else tree(), comm=world)
    for params, options, what in (
        ({**tree(), "b": np.ones(98, np.float32)}, {}, "the tree of parameters"),
        ({**tree(), "b": np.ones(97, np.float32)}, {}, "the values of the parameters"),
        (tree(), {"max_norm": 2.0}, "rule and options"),
    ):
        with pytest.raises(CommunicatorError, match=rf"^Adam\(\): {what} must be the same on every rank"):
            fastopt.Adam(params if last else tree(), comm=world, **(options if last else {}))


@in_a_shared_folder
def check_files(world: Any, folder: Path) -> None:
    comm = communicator(world)
    for case in (ADAM, LAMB):
        opt = together(world, case, 3, ema=0.9, **in_one_order(world))
        opt.save(folder / "ranks", extra={"epoch": 3})
        other = alone(case, comm.size, 3, ema=0.9)
        if comm.rank == 0:
            other.save(folder / "one", extra={"epoch": 3})
            assert (folder / "one").read_bytes() == (folder / "ranks").read_bytes()
            resumed = case.make(tree(), ema=0.9)
            assert resumed.load(folder / "ranks") == {"epoch": 3}
            assert_same(content(resumed), content(other))
        for shard in (False, True):
            resumed = case.make(tree(), ema=0.9, comm=world, shard=shard, **in_one_order(world))
            assert resumed.load(folder / "ranks") == {"epoch": 3}
            resumed.step(gradients(3, comm.rank, resumed.params))
            if shard:
                opt.step(gradients(3, comm.rank, opt.params))
                assert_same(content(resumed), content(opt))
            else:
                resumed.load_state_dict(opt.state_dict())
                assert resumed.step_count == 3


@in_a_shared_folder
def check_files_that_cannot_be_written_or_read(world: Any, folder: Path) -> None:
    comm = communicator(world)
    opt = together(world, ADAM, 1)
    before = content(opt)

    def refused(error: type[Exception], call: Any) -> None:
        with pytest.raises(error if comm.rank == 0 or comm.size == 1 else CommunicatorError):
            call()

    refused(FileNotFoundError, lambda: opt.save(folder / "lacking" / "x"))
    refused(TypeError, lambda: opt.save(folder / "x", extra={"a": object()}))
    assert list(folder.iterdir()) == []
    opt.save(folder / f"x{comm.rank}")
    if comm.rank == 0:
        damaged = bytearray((folder / "x0").read_bytes())
        damaged[-1] ^= 1
        (folder / "damaged").write_bytes(damaged)
    comm.allreduce(np.zeros(1))  # it is there
    with pytest.raises((ValueError, CommunicatorError)):
        opt.load(folder / "damaged")
    if comm.size > 1:
        with pytest.raises((FileNotFoundError, CommunicatorError)):
            opt.load(folder / f"x{comm.rank}")  # which the first rank alone has written
    assert_same(content(opt), before)
    opt.load(folder / "x0")


def check_parameters_held_elsewhere(world: Any) -> None:
    comm = communicator(world)
    free = BY_NAME["ScheduleFreeAdamW-warmup_steps=3-weight_decay=0.1"]
    for shard in (False, True):
        opt = together(world, free, 3, ema=0.9, shard=shard, **in_one_order(world))
        other = alone(free, comm.size, 3, ema=0.9)
        for context in ("swap_ema", "eval_params"):
            with getattr(opt, context)() as own, getattr(other, context)() as params:
                for name in params:
                    np.testing.assert_array_equal(own[name], params[name])
        assert_same(content(opt), content(other))
        values = {name: np.asarray(array + 1) for name, array in tree().items()}
        for each in (opt, other):
            each.set_params(values)
            each.restart()
        assert_same(content(opt), content(other))
        twin = copy.deepcopy(opt)
        for each in (opt, twin):
            each.step(gradients(0, comm.rank, each.params))
        assert_same(content(twin), content(opt))
        with pytest.raises(TypeError, match=r"^comm: must be None to pickle an optimizer"):
            pickle.dumps(opt)
        if comm.size > 1:
            with pytest.raises(
                CommunicatorError, match=r"set_params\(\): the values of the parameters must be the same"
            ):
                opt.set_params({name: np.asarray(array + comm.rank) for name, array in values.items()})


def check_no_rank_goes_elsewhere_alone(world: Any) -> None:
    comm = communicator(world)
    if comm.size == 1:
        return
    opt = together(world, ADAM, 1, ema=0.9)

    def elsewhere() -> None:
        with opt.swap_ema():
            pass

    call = elsewhere if comm.rank == 0 else partial(opt.step, gradients(0, comm.rank, opt.params))
    with pytest.raises(CommunicatorError, match=r"^(swap_ema|step)\(\): must be called by every rank at the same time"):
        call()
    opt.step(gradients(0, comm.rank, opt.params))
    assert same_on_all(world, b"".join(content(opt).values()))


def check_states_of_torch(world: Any) -> None:
    comm = communicator(world)
    opt, other = together(world, ADAM, 2, **in_one_order(world)), alone(ADAM, comm.size, 2)
    state, expected = to_torch_state(opt), to_torch_state(other)
    assert state["param_groups"] == expected["param_groups"]
    for k, of_parameter in expected["state"].items():
        for name, array in of_parameter.items():
            np.testing.assert_array_equal(state["state"][k][name], array)
    resumed = ADAM.make({name: array.copy() for name, array in opt.params.items()}, comm=world)
    from_torch_state(resumed, expected)
    assert_same(content(resumed), content(opt))


def check_formats(world: Any) -> None:
    """Parameters and states of 16 bits, where parts can be cut."""
    comm = communicator(world)
    for shard in (False, True):
        for options in ({"states": "bfloat16"}, {"states": "bfloat16", "master": True}):
            dtype = "bfloat16" if "master" in options else "float32"
            found = []
            for world_or_none in (world, None):
                flat = {name: array.astype(fastopt.pack(tree(), dtype=dtype).dtype) for name, array in tree().items()}
                more = {} if world_or_none is None else {"comm": world, "shard": shard, **in_one_order(world)}
                opt = fastopt.AdamW(flat, lr=0.1, **options, **more)
                for step in range(3):
                    if world_or_none is None:
                        for rank in range(comm.size):
                            opt.accumulate(gradients(step, rank, opt.params))
                        opt.step()
                    else:
                        opt.step(gradients(step, comm.rank, opt.params))
                found.append(content(opt))
            assert_same(*found)


def check_populations_and_more_parameters(world: Any) -> None:
    comm = communicator(world)
    params = {"w": np.ones((3, 7, 5), np.float32), "b": np.ones((3, 5), np.float32)}
    more = {"head": np.ones((3, 4), np.float32)}
    options: dict[str, Any] = {"lr": [0.1, 0.2, 0.3], "members": 3, "max_norm": 0.5, "nonfinite": "skip"}
    opt = fastopt.Adam(params, comm=world, shard=False, **in_one_order(world), **options)
    other = fastopt.Adam(params, **options)
    for step in range(4):
        if step == 2:
            if comm.size > 1:
                with pytest.raises(CommunicatorError, match=r"^add\(\): the values of the parameters must be the same"):
                    opt.add({"head": more["head"] + comm.rank})
            opt.add(more)
            other.add(more)
        each = [
            {name: np.random.default_rng((step, rank)).normal(size=array.shape).astype(np.float32)}
            | dict.fromkeys(opt.params.keys() - {name})
            for rank in range(comm.size)
            for name, array in opt.params.items()
            if name == "w"
        ]
        each[-1]["w"][1] = np.nan if step == 1 else 1.0
        for grads in each:
            other.accumulate(grads)
        info = opt.step(each[comm.rank])
        assert info.skipped.tolist() == other.step().skipped.tolist() == [False, step == 1, False]
    assert_same(content(opt), content(other))


def check_arrays_of_the_caller(world: Any) -> None:
    comm = communicator(world)
    params, others = tree(), tree()
    opt, other = (
        fastopt.Adam(lr=0.1, comm=world, shard=False, **in_one_order(world)),
        fastopt.Adam(others, lr=0.1, copy=False),
    )
    for step in range(3):
        opt.update(params, gradients(step, comm.rank, params))
        for rank in range(comm.size):
            other.accumulate(gradients(step, rank, others))
        other.step()
    for name in params:
        np.testing.assert_array_equal(params[name], others[name])
    if comm.size > 1:
        wrong = {**params, "b": params["b"][:5]} if comm.rank == 0 else params
        with pytest.raises((ValueError, CommunicatorError)):
            opt.update(wrong, gradients(0, 0, params))
    assert opt.step_count == 3


def check_rows(world: Any) -> None:
    """A step of rows is that of one process which is given the rows of all ranks, one after the other."""
    comm = communicator(world)
    options: dict[str, Any] = {"lr": 0.1, "max_norm": 1.0, "ema": 0.9}
    opt = fastopt.Adam(tree(), comm=world, shard=False, **in_one_order(world), **options)
    other = fastopt.Adam(tree(), **options)
    sizes = dict(zip(opt.flat.paths, opt.flat.shapes, strict=True))

    def rows_of(step: int, rank: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((step, rank))
        count = 0 if step == 2 and rank == 0 else 5 + rank
        return rng.integers(0, 100, count), rng.normal(size=(count, sizes[name][1])).astype(np.float32)

    for step in range(4):
        names = ["a", "w"] if step == 1 else ["a"]
        dense = [gradients(6, rank, tree()) | {"a": None, "w": None} for rank in range(comm.size)]
        total = {name: np.zeros((), np.float32) - 0.0 for name in dense[0] if dense[0][name] is not None}
        for of_rank in dense:
            total = {name: np.asarray(total[name] + of_rank[name]) for name in total}
        given = {name: rows_of(step, comm.rank, name) for name in names}
        everything = {
            name: tuple(
                np.concatenate(each) for each in zip(*[rows_of(step, r, name) for r in range(comm.size)], strict=True)
            )
            for name in names
        }
        info = opt.step_rows(given, dense[comm.rank] if step else None)
        expected = other.step_rows(everything, total | {"a": None, "w": None} if step else None, float(comm.size))
        assert info.grad_norm == expected.grad_norm
        each = [np.arange(rank, 20 + rank) for rank in range(comm.size)]
        read = opt.read_rows("a", each[comm.rank])
        other.read_rows("a", np.unique(np.concatenate(each)))
        np.testing.assert_array_equal(read, other.read_rows("a", each[comm.rank]))
    if comm.size > 1:
        wrong = {"a": (np.array([1000 if comm.rank == 0 else 1]), np.ones((1, 111), np.float32))}
        with pytest.raises(
            (ValueError, CommunicatorError), match=r"row numbers from 0 to 99|rank 0 has raised an error"
        ):
            opt.step_rows(wrong)
        names = ["a" if comm.rank == 0 else "w"]
        both = {"a": tree()["a"]} if comm.rank else {}
        with pytest.raises(ValueError, match=r"^grads: must be None on every rank for 'a', which is in rows as well"):
            opt.step_rows({name: rows_of(0, 0, name) for name in names}, dict.fromkeys(opt.params) | both)
        if comm.rank == 0:
            opt.flush_rows()
        with pytest.raises(CommunicatorError, match="what is up to date of rows must be the same on every rank"):
            opt.step(gradients(0, comm.rank, opt.params))
    opt.flush_rows()
    other.flush_rows()
    assert_same(content(opt), content(other))


def check_inputs_of_rules(world: Any) -> None:
    comm = communicator(world)
    sophia = BY_NAME["Sophia-weight_decay=0.1"]
    for shard in (False, True):
        opt = sophia.make(tree(), comm=world, shard=shard, **in_one_order(world))
        other = sophia.make(tree())
        for step in range(3):
            hessian = {name: array * array for name, array in gradients(3, step, opt.params).items()}
            for rank in range(comm.size):
                other.accumulate(gradients(0, rank, other.params))
            other.step(extra={"hessian": hessian})
            opt.step(gradients(0, comm.rank, opt.params), extra={"hessian": hessian})
        assert_same(content(opt), content(other))
        if comm.size > 1:
            hessian["b"] = hessian["b"] + comm.rank
            with pytest.raises(CommunicatorError, match="grad_scale, reduction and extra must be the same"):
                opt.step(gradients(0, comm.rank, opt.params), extra={"hessian": hessian})


def check_refusals(world: Any) -> None:
    comm = communicator(world)
    opt = ADAM.make(tree(), comm=world, shard=False)
    with pytest.raises(RuntimeError, match=r"^ascent\(\): must be of one process, got"), opt.ascent(0.1, tree()):
        pass
    opt.accumulate(tree())
    with pytest.raises((ValueError, CommunicatorError), match=r"^grads: must be None while accumulated"):
        opt.step(tree())
    with pytest.raises((ValueError, CommunicatorError), match=r"^weight: must be None while accumulated"):
        opt.step(weight=2.0)
    opt.zero_grad()
    with pytest.raises(ValueError, match=r"^order: must be"):
        fastopt.Adam(tree(), comm=world, order="any")
    with pytest.raises(TypeError, match=r"^comm: must be"):
        fastopt.Adam(tree(), comm=3)
    if comm.size == 1:
        return
    for match, make in (
        ("copy=False", lambda: fastopt.Adam(tree(), comm=world, copy=False)),
        ("population", lambda: fastopt.Adam({"w": np.ones((2, 3))}, members=2, comm=world)),
        ("blocks of codes", lambda: fastopt.Adam({"w": np.ones(9000, np.float32)}, states={"m": "int8"}, comm=world)),
    ):
        with pytest.raises(ValueError, match=f"^shard: must be False.*{match}.*got True$"):
            make()
    params = {"a": np.ones((60, 185), np.float32), "w": np.ones((40, 40), np.float32)}
    muon = fastopt.Muon(params, comm=world, overrides={"a": {"orthogonal": False}}, **in_one_order(world))
    assert muon.flat.layout.is_cut == (True, False)
    muon.step(params)
    before = content(muon)
    muon.groups["a"].orthogonal = True
    with pytest.raises(
        ValueError, match=r"^parameter 'a': must have orthogonal from construction on, as in overrides="
    ):
        muon.step(params)
    assert_same(content(muon), before)
    muon.groups["a"].orthogonal = False
    muon.step(params)
    with pytest.raises(ValueError, match=r"^params: must be packed in \d parts, got 1"):
        fastopt.Adam(fastopt.pack(tree()), comm=world)
    sharded = ADAM.make(tree(), comm=world)
    rows = {"a": (np.array([1]), np.ones((1, 111), np.float32))}
    with pytest.raises(RuntimeError, match=r"^step_rows\(\): must have shard=False"):
        sharded.step_rows(rows)
    with pytest.raises(RuntimeError, match=r"^add\(\): must have shard=False"):
        sharded.add({"more": np.ones(3, np.float32)})


def check_constructors_allocate_a_part(world: Any) -> None:
    """Of the states; what is allocated by all ranks together, where these are threads."""
    comm = communicator(world)
    elements = 2**20
    threads = "ThreadCommunicator" in type(world).__name__
    params = {"w": np.ones(elements, np.float32)}
    fastopt.Adagrad(params, initial_accumulator_value=0.1, ema=0.9, comm=world)  # loads what there is to load
    comm.allreduce(np.zeros(1))
    if comm.rank == 0 or not threads:
        tracemalloc.start()
    comm.allreduce(np.zeros(1))
    opt = fastopt.Adagrad(params, initial_accumulator_value=0.1, ema=0.9, comm=world)
    comm.allreduce(np.zeros(1))
    if comm.rank == 0 or not threads:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        ranks = comm.size if threads else 1
        states = 2 * 4 * elements / comm.size
        assert peak < ranks * (4 * elements + states) + 2**20
        assert opt.nbytes.states > states - 2**16
    comm.allreduce(np.zeros(1))


def constructor_takes_memory_for_a_part(world: Any) -> None:
    """In a process of its own, whose peak it looks at."""
    comm, elements = communicator(world), 2**24
    options: dict[str, Any] = {"initial_accumulator_value": 0.1, "ema": 0.9, "comm": world}
    params = {"w": np.ones(elements, np.float32)}
    fastopt.Adagrad({"w": np.ones(10, np.float32)}, **options)  # loads what there is to load
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opt = fastopt.Adagrad(params, **options)
    taken = 2**10 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    states = 2 * 4 * elements
    assert opt.nbytes.states <= states / comm.size + 2 * 4 * BLOCK
    assert 4 * elements < taken < 4 * elements + states / comm.size + 2**24


CHECKS = {name: thing for name, thing in globals().items() if name.startswith("check_")}
ONE_BY_ONE = {"check_rules", "check_flags"}


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ALL)
def test_rules(name, size):
    for shard in (False, True):
        run_threads(size, rule_agrees, ALL[name], shard)


@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_flags(case):
    for shard in (False, True):
        run_threads(3, partial(rule_agrees, case=case, shard=shard, **EVERYTHING))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ONE_BY_ONE])
def test_threads(name, size):
    run_threads(size, CHECKS[name])


def test_more_ranks_than_blocks():
    def small(comm):
        opt = LAMB.make({"w": np.ones((5, 3), np.float32), "b": np.ones(2, np.float32)}, comm=comm, max_norm=0.1)
        for step in range(3):
            opt.step({"w": np.full((5, 3), step + comm.rank, np.float32), "b": None})
        return content(opt)

    first, *others = run_threads(5, small)
    opt = LAMB.make({"w": np.ones((5, 3), np.float32), "b": np.ones(2, np.float32)}, max_norm=0.1)
    for step in range(3):
        for rank in range(5):
            opt.accumulate({"w": np.full((5, 3), step + rank, np.float32), "b": None})
        opt.step()
    for found in (first, *others):
        assert_same(found, content(opt))


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "size"),
    [
        pytest.param(engine, size, marks=pytest.mark.skipif(bool(LACKING[engine]), reason=LACKING[engine]))
        for engine, size in (("mpi", 2), ("mpi", 3), ("mpi", 4), ("gloo", 2))
    ],
)
def test_processes(engine, size):
    launch(engine, size, "test_distributed", timeout=300.0)


@pytest.mark.skipif(bool(LACKING["mpi"]), reason=LACKING["mpi"])
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux")
def test_a_constructor_takes_memory_for_a_part():
    launch("mpi", 2, "test_distributed", "constructor_takes_memory_for_a_part")


@pytest.mark.skipif(bool(LACKING["mpi"]), reason=LACKING["mpi"])
def test_an_error_outside_of_steps_ends_all_processes():
    with pytest.raises(AssertionError, match="KeyError: 'no data left'"):
        launch("mpi", 2, "test_distributed", "fails_in_the_backward_pass", timeout=30.0)


def fails_in_the_backward_pass(world: Any) -> None:
    opt = fastopt.SGD(tree(), comm=world)
    if world.rank == 1:
        raise KeyError("no data left")
    opt.step(tree())


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_any_number_of_ranks_is_read_by_any_number(tmp_path):
    for case in (ADAM, LAMB, BY_NAME["Adafactor-weight_decay=0.1"], BY_NAME["Shampoo-momentum=0.9-weight_decay=0.1"]):
        other = alone(case, 4, 3, ema=0.9)
        other.save(tmp_path / "one")
        expected = content(other)

        def write(comm, case=case):
            opt = together(comm, case, 3, ema=0.9, order="fixed")
            opt.save(tmp_path / "four")

        run_threads(4, write)
        assert (tmp_path / "four").read_bytes() == (tmp_path / "one").read_bytes()

        def read(comm, case=case, expected=expected):
            opt = case.make(tree_for(case), ema=0.9, comm=comm)
            opt.load(tmp_path / "four")
            assert_same(content(opt), expected)

        for size in (1, 2, 3, 4):
            run_threads(size, read)


@pytest.mark.parametrize("moment", [0, 1, 5, 100])
def test_a_full_disk_is_an_error_on_every_rank(tmp_path, monkeypatch, moment):
    path = tmp_path / "x"
    run_threads(2, lambda comm: together(comm, ADAM, 1).save(path))
    old = path.read_bytes()
    monkeypatch.setattr("fastopt.step.ranks.WINDOW", 1000)
    real = fastopt.files.replace_file

    class Full:
        def __init__(self, file):
            self.file, self.left = file, moment

        def write(self, data):
            if self.left == 0:
                raise OSError(28, "No space left on device")
            self.left -= 1
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(
        "fastopt.checkpoint.replace_file",
        lambda target, write, check: real(target, lambda file: write(Full(file)), check),
    )

    def save(comm):
        opt = together(comm, ADAM, 2)
        if moment == 100:
            opt.save(path)
        else:
            error = (
                (OSError, r"No space left on device: .*x'$") if comm.rank == 0 else (CommunicatorError, "rank 0 has")
            )
            with pytest.raises(error[0], match=error[1]):
                opt.save(path)
        opt.step(gradients(2, comm.rank, opt.params))
        return opt.step_count

    assert run_threads(2, save) == [3, 3]
    assert (path.read_bytes() == old) == (moment != 100)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("shard", [False, True])
def test_an_optimizer_is_freed_when_it_is_dropped(shard):
    def drop(comm):
        opt = together(comm, LAMB, 2, shard=shard, max_norm=1.0)
        pipeline, buffer = weakref.ref(opt._pipeline), weakref.ref(opt._pipeline.states[0].base)
        del opt
        return pipeline() is None and buffer() is None

    gc.disable()
    try:
        assert run_threads(2, drop) == [True, True]
    finally:
        gc.enable()


def test_parts_that_are_much_longer_than_parameters_are_warned_of():
    params = {"large": np.ones((1100, 1000), np.float32), "small": np.ones((10, 10), np.float32)}

    def construct(comm):
        return fastopt.Muon(params, comm=comm).flat.size

    with pytest.warns(UserWarning, match=r"^shard: 2 parts that cut no matrix take 2\.0 times the memory of the param"):
        run_threads(2, construct)


def test_an_error_in_the_middle_of_a_step_ends_the_others(monkeypatch):
    """One that nobody has foreseen, such as that memory is exhausted."""

    def fail(comm):
        opt = together(comm, ADAM, 1)
        if comm.rank == 1:
            opt._pipeline._exchange = lambda *args: [][0]
        opt.step(gradients(1, comm.rank, opt.params))

    with pytest.raises(IndexError):
        run_threads(3, fail)


def test_parts_are_not_loaded_otherwise(tmp_path):
    def load(comm):
        opt = together(comm, ADAM, 1)
        opt.save(tmp_path / "x")
        for options, text in (
            ({"strict": False}, "strict: must be True"),
            ({"convert": True}, "convert: must be False"),
        ):
            with pytest.raises(ValueError, match=f"{text} where processes hold a part of the states each"):
                opt.load(tmp_path / "x", **options)
        with pytest.raises(ValueError, match=r"^strict: must be True where processes hold"):
            opt.load_state_dict(opt.state_dict(), strict=False)

    run_threads(2, load)


# --- exchanges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 10, 64, 2**20])
@pytest.mark.parametrize("count", [1, 6, 100, 1001])
def test_sums_in_the_order_of_ranks(monkeypatch, window, count):
    monkeypatch.setattr("fastopt.step.ranks.WINDOW", window)
    each = [np.random.default_rng(rank).normal(size=count).astype(np.float32) for rank in range(3)]
    expected = (each[0] + each[1]) + each[2]

    def add_up(comm):
        ranks, backend = Ranks(comm, "fixed"), get_backend("cpu")
        array = each[comm.rank].copy()
        ranks.add_up(array, backend)
        np.testing.assert_array_equal(array, expected)
        if count % 3 == 0:
            own = np.empty(count // 3, np.float32)
            ranks.add_up_parts(each[comm.rank].copy(), own, backend)
            np.testing.assert_array_equal(own, expected.reshape(3, -1)[comm.rank])

    run_threads(3, add_up)


# --- layout -----------------------------------------------------------------------------------------------------------

GPT2 = [(50257, 768), (1024, 768)] + 12 * [
    *[
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
]


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 64, 1000, 1024])
def test_padding_is_small(parts):
    layout = Layout.of([*GPT2, (768,), (768,)], 4, 0, parts)
    assert layout.size - sum(layout.sizes) < (parts + min(parts, len(layout.sizes))) * BLOCK
    assert layout.size % (parts * BLOCK if parts > 1 else 1) == 0
    assert parts == 1000 or layout.size <= 1.012 * sum(layout.sizes)


@pytest.mark.parametrize("longest", [None, 3 * BLOCK])
@pytest.mark.parametrize("parts", [2, 3, 5, 16])
def test_parts_cover_the_whole(parts, longest):
    shapes = [(), (7,), (3 * BLOCK + 5,), (0, 3), (BLOCK,), (2 * BLOCK,), (130, 77), (1,)]
    layouts = [Layout.of(shapes, 4, part, parts) for part in range(parts)]
    whole = layouts[0].chunks([0] * len(shapes), whole=True, longest=longest)
    assert layouts[0].length % BLOCK == 0
    pieces: dict[int, list[slice]] = {}
    partials = []
    for layout in layouts:
        own = layout.cut(whole)
        assert own.shape[1] == N_CHUNK
        assert layout.blocks_by_part(whole)[layout.part] == sum(
            -(-(stop - start) // BLOCK) for _, start, stop, *_ in own
        )
        for k, start, stop, grad, _, block in own.tolist():
            assert start == grad
            assert start % BLOCK == 0
            at = layout.offsets[k] + start
            assert layout.start <= at < at + stop - start <= layout.start + layout.length
            partials += [(k, start + BLOCK * number) for number in range(-(-(stop - start) // BLOCK))]
            assert block == partials.index((k, start)) - sum(layout.blocks_by_part(whole)[: layout.part])
        for k, held in enumerate(layout.held):
            pieces.setdefault(k, []).append(held)
    assert partials == [
        (k, start + BLOCK * number)
        for k, start, stop, *_ in whole.tolist()
        for number in range(-(-(stop - start) // BLOCK))
    ]
    for size, held in zip(layouts[0].sizes, (pieces[k] for k in range(len(shapes))), strict=True):
        assert [k for piece in held for k in range(size)[piece]] == list(range(size))


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parameters_that_must_not_be_cut_are_not(parts):
    rng = np.random.default_rng(parts)
    for _ in range(20):
        shapes = [(int(rows), 3) if rows % 3 else (int(rows),) for rows in rng.integers(1, 5000, 10)]
        whole = [len(shape) == 2 for shape in shapes]
        layout = Layout.of(shapes, 4, 0, parts, whole)
        assert not any(cut for cut, alone in zip(layout.is_cut, whole, strict=True) if alone)
        held = [Layout.of(shapes, 4, part, parts, whole).is_held for part in range(parts)]
        expected = [0 if cut else 1 for cut in layout.is_cut]
        assert [sum(of_rank[k] for of_rank in held) for k in range(len(shapes))] == expected
        ends = [offset + size for offset, size in zip(layout.offsets, layout.sizes, strict=True)]
        assert all(end <= offset for end, offset in zip(ends, [*layout.offsets[1:], layout.size], strict=True))


def test_one_part_is_the_layout_of_before():
    layout = Layout.of([(3,), (100, 50), (), (0, 3), (17,)])
    assert layout.offsets == (0, 16, 5024, 5040, 5040)
    assert (layout.size, layout.start, layout.length) == (5072, 0, 5072)
    assert packed({"w": np.ones(3)}).held([np.ones(3)])[0].shape == (3,)


# --- without a communicator -------------------------------------------------------------------------------------------


def test_a_weight_is_that_of_a_micro_batch():
    opt, other = (fastopt.Adam(tree(), max_norm=1.0, zero_grad=True) for _ in range(2))
    grads = gradients(0, 0, opt.params)
    opt.step(grads, weight=3.0)
    other.accumulate(grads, 3.0)
    other.step()
    assert_same(content(opt), content(other))
    for own, path in zip(opt.flat.grad_arrays, opt.flat.paths, strict=True):
        own[...] = grads[path]
    opt.step(weight=2.0)
    other.accumulate(grads, 2.0)
    other.step()
    assert_same(content(opt), content(other))
    assert all((own == 0).all() for own in opt.flat.grad_arrays)
    opt.step(grads, weight=0.0)
    other.step(dict.fromkeys(grads))
    assert_same(content(opt), content(other))
    with pytest.raises(ValueError, match=re.escape("weight: must be")):
        opt.step(grads, weight=-1.0)
    opt.accumulate(grads)
    with pytest.raises(ValueError, match=r"^weight: must be None while accumulated gradients are waiting"):
        opt.step(weight=2.0)
