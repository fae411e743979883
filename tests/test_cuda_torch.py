"""`fastopt.torch` on tensors of a device: in numba's simulator, or on a GPU with ``--gpu``.

In the simulator a stand-in has tensors of the CPU count as tensors of a device: the simulator's arrays have the memory,
and torch's tensors are views of it. What is not simulated is how tensors and arrays are made of each other on a device,
and torch's own work there.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_torch.py
"""

from __future__ import annotations

import copy
import gc
import math
import os
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt.kernels.cuda import simulated

torch = pytest.importorskip("torch", reason="torch is not installed: fastopt.torch is for it (CI installs it)")

import fastopt.torch as ft  # noqa: E402
from fastopt.torch import memory  # noqa: E402

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
simulator_only = pytest.mark.skipif(not SIMULATED, reason="looks at what is simulated, or needs two devices")
CPU = torch.device("cpu")
SHAPES = {"W": (6, 5), "b": (5,), "number": (), "empty": (0, 2)}
NAMED = [name for name in ft.__all__ if name in fastopt.Optimizer.classes]
BOUND = 4 if SIMULATED else 6  # ulp: as in test_cuda.py
MULTIPLIED = ("Muon", "Shampoo", "SOAP", "Prodigy")
"""Optimizers that multiply the differences that a GPU's rounding makes: see docs/gpu.md."""
CURRENT = SimpleNamespace(stream=None)
"""Torch's current stream; None for the legacy one."""


class Simulated(memory.DeviceMemory):
    def _array(self, tensor: Any) -> Any:
        if tensor.numel() == 0:
            return super()._array(tensor)
        assert device_of(tensor) == self.device
        return tensor.numpy().view(simulated.ndarray)

    def _tensor(self, array: Any) -> Any:
        assert type(array) is simulated.ndarray
        assert array.device.id == simulated.cuda.Device.current == self.device.index
        return torch.from_numpy(array.view(np.ndarray))

    def empty(self, shape: Sequence[int], dtype: Any, strides: Sequence[int] | None = None) -> Any:
        like = torch.empty_strided(tuple(shape), tuple(strides)) if strides is not None else torch.empty(tuple(shape))
        flat = there(torch.zeros(like.untyped_storage().nbytes() // 4, dtype=dtype), self.device.index)  # of float32
        return flat.as_strided(like.shape, like.stride())


def device_of(tensor: Any) -> Any:
    if not SIMULATED or tensor.device.type != "cpu":
        return tensor.device
    if tensor.layout is not torch.strided or tensor.numel() == 0:  # without an address
        return getattr(tensor, "there", CPU)
    found = simulated.MEMORY.find(tensor.data_ptr())
    return CPU if found is None else torch.device("cuda", found.device)


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


@pytest.fixture(autouse=True)
def _tensors_of_a_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not SIMULATED:
        yield
        return
    monkeypatch.setattr(memory, "DeviceMemory", Simulated)
    monkeypatch.setattr(memory, "_known", {CPU: memory.HostMemory()})
    monkeypatch.setattr(memory, "stream_of", lambda device: 0 if CURRENT.stream is None else CURRENT.stream.ptr)
    for module in ("memory", "parameters", "part", "optimizer", "states"):
        monkeypatch.setattr(f"fastopt.torch.{module}.device_of", device_of)
    yield
    CURRENT.stream = None


def there(tensor: Any, device: int = 0) -> Any:
    """A copy of a tensor on a device."""
    if not SIMULATED:
        return tensor.detach().to(torch.device("cuda", device), copy=True)
    with simulated.cuda.Device(device):
        bits = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
        array = simulated.array(bits.detach().contiguous().numpy())
    assert simulated.cuda.get_current_stream().ptr == 0
    found = torch.from_numpy(array.view(np.ndarray)).view(tensor.dtype).reshape(tensor.shape)
    found.there = torch.device("cuda", device)
    return found


def parameter(tensor: Any, device: int | None = 0) -> Any:
    if device is None:
        return torch.nn.Parameter(tensor.detach().cpu().clone())
    found = torch.nn.Parameter(there(tensor, device))
    found.there = torch.device("cuda", device)
    return found


def give(params: Sequence[Any], seed: int, *, without: Sequence[int] = (), scale: float = 1.0) -> None:
    """Gradients, each where its parameter is."""
    generator = torch.Generator().manual_seed(seed)
    for k, p in enumerate(params):
        g = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        where = device_of(p)
        p.grad = None if k in without else g if where == CPU else there(g, where.index)


class Pair:
    """The same optimizer on a device (or several: `devices`) and on the CPU."""

    def __init__(
        self, kind: Any, shapes: Sequence[tuple[int, ...]] = tuple(SHAPES.values()), devices: Any = (0,), **options: Any
    ):
        generator = torch.Generator().manual_seed(5)
        dtype = options.pop("dtype", torch.float32)
        start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        self.mine = [parameter(p, devices[k % len(devices)]) for k, p in enumerate(start)]
        self.theirs = [parameter(p, None) for p in start]
        self.on_device, self.on_host = kind(self.mine, **options), kind(self.theirs, **options)

    @property
    def both(self) -> tuple[tuple[list[Any], Any], tuple[list[Any], Any]]:
        return (self.mine, self.on_device), (self.theirs, self.on_host)

    def step(self, seed: int, **more: Any) -> None:
        before = [p.detach().numpy().copy() for p in self.theirs]
        for params, opt in self.both:
            give(params, seed, **more)
            opt.step()
        self.check(before)

    def check(self, before: Sequence[np.ndarray] | None = None) -> None:
        for k, (p, q) in enumerate(zip(self.mine, self.theirs, strict=True)):
            expected = q.detach().numpy()
            scale = np.abs(expected)
            if before is not None:
                scale = np.maximum(np.abs(before[k]), 2.0 * np.abs(expected - before[k]))
            assert ulps(p, expected, scale) <= BOUND, k
            mine, theirs = self.on_device.state[p], self.on_host.state[q]
            assert list(mine) == list(theirs)
            for name, tensor in theirs.items():
                state = tensor.numpy().astype(np.float32)
                assert mine[name].shape == tensor.shape
                assert ulps(mine[name], state, np.full(state.shape, np.abs(state).max(initial=0.0))) <= BOUND, name


def ulps(found: Any, expected: np.ndarray, magnitude: np.ndarray) -> float:
    largest = np.maximum(np.abs(expected), magnitude).astype(expected.dtype)
    difference = np.abs(found.detach().cpu().numpy().astype(np.float64) - expected)
    return float(np.max(difference / np.spacing(largest), initial=0.0))


# --- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMED if SIMULATED or name not in MULTIPLIED])
def test_three_steps_of_every_optimizer_are_those_on_the_cpu(name):
    pair = Pair(getattr(ft, name), lr=0.02)
    pair.step(0)
    where = [p.data_ptr() for p in pair.mine]
    pair.step(1, without=[1])
    pair.step(2)
    assert [p.data_ptr() for p in pair.mine] == where
    (part,) = pair.on_device._parts
    assert part.pipeline.backend.name == "cuda"
    assert part.pipeline.flat._grad_arrays is None  # gradients are read where they are
    assert part.pipeline.steps == 3


def test_a_rule_of_ones_own():
    pair = Pair(ft.from_rule(fastopt.rules.adamax), lr=0.02, weight_decay=0.1, maximize=True)
    for step in range(3):
        pair.step(step)


FORMS = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("NAdam", {}),
    ("ASGD", {"lambd": 0.01, "t0": 1.0}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Rprop", {}),
    ("Adafactor", {"d": 1.5}),
]


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
@pytest.mark.parametrize("theirs_first", [True, False], ids=["torch-ours", "ours-torch"])
def test_a_run_begun_in_one_continues_in_the_other(name, options, theirs_first):
    start = [torch.linspace(-1.0, 1.0, 12).reshape(3, 4), torch.ones(3)]
    kinds = getattr(torch.optim, name), getattr(ft, name)
    places = (None, 0)
    first, second = (0, 1) if theirs_first else (1, 0)

    def run(opt: Any, params: list[Any], steps: range) -> None:
        for step in steps:
            give(params, step)
            opt.step()

    params = [parameter(p, places[first]) for p in start]
    begun = kinds[first](params, lr=0.02, **options)
    run(begun, params, range(3))
    others = [parameter(p, places[second]) for p in params]
    goes_on = kinds[second](others, lr=0.5)
    goes_on.load_state_dict(copy.deepcopy(begun.state_dict()))
    run(goes_on, others, range(3, 6))
    expected = [parameter(p, None) for p in start]
    alone = kinds[0](expected, lr=0.02, **options)
    run(alone, expected, range(6))
    for p, q in zip(others, expected, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=2e-5, atol=2e-6)
        assert set(goes_on.state[p]) == set(alone.state[q])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options_of_a_step(dtype):
    pair = Pair(ft.AdamW, dtype=dtype, max_norm=0.5, clip_value=0.7, ema=0.9, nonfinite="zero", grad_norm=True)
    for step in range(3):
        pair.step(step, without=[1] if step == 1 else [])
        assert pair.on_device.info.grad_norm == pytest.approx(pair.on_host.info.grad_norm, rel=1e-6)
        assert pair.on_device.info.clip_coefficient == pytest.approx(pair.on_host.info.clip_coefficient, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"states": "bfloat16", "rounding": "stochastic", "seed": 3}),
        (torch.float16, {"compensated": True}),
        (torch.float32, {"states": "bfloat16"}),
    ],
    ids=str,
)
def test_numbers_of_16_bits_are_those_on_the_cpu(dtype, options):
    """Bit for bit in the simulator, whose arithmetic is the CPU's; states are tensors of the device."""
    pair = Pair(ft.AdamW, dtype=dtype, lr=0.02, **options)
    for step in range(3):
        for params, opt in pair.both:
            give(params, step, without=[1] if step == 1 else [])
            opt.step()
    for p, q in zip(pair.mine, pair.theirs, strict=True):
        mine, theirs = pair.on_device.state[p], pair.on_host.state[q]
        assert list(mine) == list(theirs)
        for name, found, expected in [("p", p, q), *[(name, mine[name], theirs[name]) for name in theirs]]:
            assert found.dtype == expected.dtype, name
            off = {"rtol": 0.0, "atol": 0.0} if SIMULATED else {"rtol": 1e-2, "atol": 1e-5}
            torch.testing.assert_close(found.detach().cpu(), expected.detach(), **off, msg=name)


def test_each_gradient_is_clipped_by_its_own_norm():
    pair = Pair(ft.SGD, momentum=0.9, clip_norm_per_tensor=0.5, lr=0.1)
    for step in range(3):
        pair.step(step)


def test_a_step_that_is_skipped_counts_nothing():
    pair = Pair(ft.NAdam, nonfinite="skip", max_norm=1.0)
    for step, scale in enumerate((1.0, math.inf, 1.0, math.nan, 1.0)):
        pair.step(step, scale=scale, without=[1] if step == 4 else [])
        assert pair.on_device.info.skipped is pair.on_host.info.skipped is (not math.isfinite(scale))
        assert pair.on_device.info.nonfinite_total == pair.on_host.info.nonfinite_total
    assert pair.on_device.state[pair.mine[0]]["step"].item() == 3.0
    assert pair.on_device.state[pair.mine[1]]["step"].item() == 2.0


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}])
def test_a_gradient_that_is_not_finite_is_named(options):
    pair = Pair(ft.SGD, lr=0.1, nonfinite="raise", **options)
    give(pair.mine, 0)
    pair.mine[1].grad[2] = math.nan
    before = [p.detach().clone() for p in pair.mine]
    with pytest.raises(FloatingPointError, match=r"param_groups\[0\]\['params'\]\[1\]"):
        pair.on_device.step()
    assert all(torch.equal(p, q) for p, q in zip(pair.mine, before, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "context"),
    [
        ("SGD", {"ema": 0.75}, "swap_ema"),
        ("ScheduleFreeAdamW", {}, "eval_params"),
        ("Nesterov", {"lr": 0.1, "form": "lookahead"}, "lookahead"),
    ],
)
@pytest.mark.filterwarnings("ignore:step.. gradients must be computed inside")
def test_parameters_that_are_held_elsewhere(name, options, context):
    pair = Pair(getattr(ft, name), **options)
    for step in range(2):
        pair.step(step)
    before = [p.detach().clone() for p in pair.mine]
    versions = [p._version for p in pair.mine]
    with getattr(pair.on_device, context)(), getattr(pair.on_host, context)():
        for k, (p, q) in enumerate(zip(pair.mine, pair.theirs, strict=True)):
            expected = q.detach().numpy()
            assert ulps(p, expected, np.maximum(np.abs(before[k].cpu().numpy()), np.abs(expected))) <= BOUND
        assert not torch.equal(pair.mine[0], before[0])
        inside = [p._version for p in pair.mine]
    assert all(torch.equal(p, q) for p, q in zip(pair.mine, before, strict=True))
    assert all(a < b < p._version for a, b, p in zip(versions, inside, pair.mine, strict=True))
    pair.step(2)


# --- param groups, hyperparameters, states ----------------------------------------------------------------------------


def test_a_group_that_is_added_and_hyperparameters_that_are_set():
    pair = Pair(ft.Adam, lr=0.1)
    pair.step(0)
    for params, opt in pair.both:
        params.append(parameter(torch.ones(2, 3), None if opt is pair.on_host else 0))
        opt.add_param_group({"params": [params[-1]], "lr": 0.5, "weight_decay": 0.1})
    pair.step(1)
    for _, opt in pair.both:
        opt.param_groups[0]["lr"] = 0.01
        opt.param_groups[1]["betas"] = (0.5, 0.9)
    pair.step(2)
    steps = [pair.on_device.state[p]["step"].item() for p in pair.mine]
    assert steps == [3.0, 3.0, 3.0, 3.0, 2.0]


def test_changes_of_a_state_act():
    pair = Pair(ft.NAdam, lr=0.1)
    pair.step(0)
    for params, opt in pair.both:
        opt.state[params[0]]["exp_avg"].mul_(0.5)
        opt.state[params[1]]["step"].fill_(7.0)
    pair.step(1)
    assert pair.on_device.state[pair.mine[1]]["step"].item() == 8.0
    for params, opt in pair.both:
        opt.state[params[0]]["exp_avg"] = torch.full((6, 5), 2.0)
    pair.step(2)


@pytest.mark.parametrize("name", ["AdamW", "NovoGrad", *(["SOAP", "Prodigy"] if SIMULATED else [])])
def test_a_copy_goes_on_independently(name):
    pair = Pair(getattr(ft, name), lr=0.02)
    pair.step(0)
    twins = Pair(getattr(ft, name), lr=0.02)
    for mine, theirs in zip(twins.both, pair.both, strict=True):
        for p, q in zip(mine[0], theirs[0], strict=True):
            p.data.copy_(q.data)
        mine[1].load_state_dict(copy.deepcopy(theirs[1].state_dict()))
    pair.step(1)
    twins.step(1)
    for p, q in zip(pair.mine, twins.mine, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)  # torch loads numbers as float32


@simulator_only
def test_states_that_torch_has_copied_are_used_where_they_are():
    """As `copy.deepcopy` and `pickle` leave them: views of one buffer."""
    pair = Pair(ft.AdamW, lr=0.02)
    pair.step(0)
    state = copy.deepcopy([dict(pair.on_device.state[p]) for p in pair.mine])
    for name in ("exp_avg", "exp_avg_sq"):
        old = torch.empty(0).set_(state[0][name].untyped_storage())
        room = simulated.zeros(old.numel() + 15, np.float32)
        first = -room.data.ptr % 64 // 4  # a device aligns what it allocates
        buffer = torch.from_numpy(room[first : first + old.numel()].view(np.ndarray)).copy_(old)
        for own in state:
            own[name] = buffer.as_strided(own[name].shape, own[name].stride(), own[name].storage_offset())
    for p, own in zip(pair.mine, state, strict=True):
        pair.on_device.state[p] = own
    pair.step(1)
    for p, own in zip(pair.mine, state, strict=True):
        assert pair.on_device.state[p]["exp_avg"].data_ptr() == own["exp_avg"].data_ptr()


@simulator_only
def test_counts_and_following_numbers_are_on_the_host():
    (p,) = params = [parameter(torch.ones(3))]
    for name, extra in (("NAdam", ["mu_product"]), ("ASGD", ["eta", "mu"]), ("Adagrad", [])):
        opt = getattr(ft, name)(params)
        give(params, 0)
        opt.step()
        state = opt.state[p]
        assert all(simulated.MEMORY.find(state[each].data_ptr()) is None for each in ("step", *extra))
        others = [each for each in state if each not in ("step", *extra)]
        assert all(simulated.MEMORY.find(state[each].data_ptr()) is not None for each in others)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_parameters_and_gradients_that_move_are_followed():
    pair = Pair(ft.Adam, lr=0.1)
    pair.step(0)
    for params, opt in pair.both:
        for p in params[:2]:
            p.data = there(p.data + 1.0) if opt is pair.on_device else p.data + 1.0
    pair.step(1)
    pair.step(2)


def test_the_table_of_places_is_sent_again_only_where_a_gradient_moved():
    pair = Pair(ft.SGD, lr=0.1)
    pair.step(0)
    (part,) = pair.on_device._parts
    places = part.places
    assert not places.flags.writeable  # it was sent
    pair.on_device.step()
    assert part.places is places
    give(pair.mine, 1)
    pair.on_device.step()
    assert part.places is not places


@simulator_only
@pytest.mark.parametrize("to", [None, 1], ids=["cpu", "other"])
def test_parameters_that_move_to_another_device_are_followed(to):
    pair = Pair(ft.Adam, [(3, 4), (5,)], lr=0.1)
    pair.step(0)
    for device in (to, 0):
        for p in pair.mine:
            data = p.data.clone() if device is None else there(p.data, device)
            p.grad = None
            p.data = data
        pair.step(1)
        (part,) = pair.on_device._parts
        assert part.memory.device == (CPU if device is None else torch.device("cuda", device))
        pair.step(2)


@simulator_only
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}, {"nonfinite": "skip", "max_norm": 0.5}], ids=str)
def test_parameters_of_several_devices_are_updated_together(options):
    pair = Pair(ft.AdamW, [(3, 4), (5,), (2, 2), (7,)], devices=(0, None, 1), lr=0.1, **options)
    for step, scale in enumerate((1.0, math.inf if options.get("nonfinite") else 1.0, 1.0)):
        pair.step(step, scale=scale)
    found = [part.memory.device for part in pair.on_device._parts]
    assert found == [torch.device("cuda", 0), CPU, torch.device("cuda", 1)]
    assert simulated.cuda.Device.current == 0
    norm = pair.on_host.info.grad_norm
    assert norm is None or pair.on_device.info.grad_norm == pytest.approx(norm, rel=1e-6)


def transposed(p: Any) -> Any:
    return p.t()


def gaps(p: Any) -> Any:
    return p[:, ::2]


@pytest.mark.parametrize("change", [transposed, gaps])
@pytest.mark.parametrize("name", ["Adam", "LAMB", *(["Muon"] if SIMULATED else [])])
def test_parameters_and_gradients_of_any_strides(change, name):
    start = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)
    pair = Pair(getattr(ft, name), [(2, 3)], lr=0.1)
    for params, opt in pair.both:
        whole = there(start) if opt is pair.on_device else start.clone()
        params.append(torch.nn.Parameter(change(whole)))
        assert not params[-1].is_contiguous()
        opt.add_param_group({"params": params[1:]})
    for step in range(2):
        pair.step(step)
    pair.on_device.zero_grad()
    pair.on_host.zero_grad()
    for params, _ in pair.both:
        give(params, 3)
        for p in params:
            g = p.grad.t().contiguous().t()
            p.grad = g if device_of(p) == CPU else there(g.t()).t()
    pair.on_device.step()
    pair.on_host.step()
    pair.check([np.ones(1, np.float32)] * 2)
    if change is gaps:
        opt = ft.SGD([pair.mine[-1]], lr=0.1, ema=0.5)
        give(pair.mine, 0)
        opt.step()
        with pytest.raises(RuntimeError, match="must have no gaps between its elements"), opt.swap_ema():
            pass


@simulator_only
def test_a_sparse_gradient_is_made_dense(monkeypatch):
    dense = torch.Tensor.to_dense
    pair = Pair(ft.Adagrad, [(6, 2), (3,)], lr=0.1)
    for step in range(3):
        rows, values = torch.tensor([[step, 4, 4]]), torch.ones(3, 2) * (step + 1)
        for params, _ in pair.both:
            give(params, step)
            params[0].grad = torch.sparse_coo_tensor(rows, values, (6, 2), check_invariants=False)
        pair.mine[0].grad.there = torch.device("cuda", 0)
        pair.on_host.step()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to_dense", lambda g: there(dense(g)))
            pair.on_device.step()
        pair.check()


def test_memory_is_freed_without_the_garbage_collector():
    params = [parameter(torch.ones(3))]
    opt = ft.NAdam(params, nonfinite="skip", ema=0.5)
    give(params, 0)
    opt.step()
    with opt.swap_ema():
        pass
    pipeline = weakref.ref(opt._parts[0].pipeline)
    gc.disable()
    try:
        del opt
        assert pipeline() is None
    finally:
        gc.enable()


# --- streams ----------------------------------------------------------------------------------------------------------


@simulator_only
def test_a_step_is_work_of_torchs_current_stream():
    pair = Pair(ft.AdamW, lr=0.1, max_norm=0.5)
    pair.step(0)
    stream = simulated.cuda.Stream(non_blocking=True)
    for seed in (1, 2):
        before = [p.detach().clone() for p in pair.mine]
        for params, _ in pair.both:
            give(params, seed)
        CURRENT.stream = stream
        pair.on_device.step()
        pair.on_host.step()
        assert simulated.cuda.get_current_stream().ptr == 0
        assert all(torch.equal(p, q) for p, q in zip(pair.mine, before, strict=True))  # it waits in the stream
        norm = pair.on_host.info.grad_norm
        assert pair.on_device.info.grad_norm == pytest.approx(norm, rel=1e-6)  # waits for the stream
        stream.synchronize()
        pair.check([p.numpy() for p in before])
        CURRENT.stream = None


@simulator_only
def test_a_step_that_is_skipped_in_another_stream_counts_nothing():
    pair = Pair(ft.SGD, momentum=0.9, lr=0.1, nonfinite="skip")
    stream = simulated.cuda.Stream(non_blocking=True)
    pair.step(0)
    for seed, scale in ((1, math.nan), (2, 1.0)):
        for params, _ in pair.both:
            give(params, seed, scale=scale)
        CURRENT.stream = stream
        pair.on_device.step()
        pair.on_host.step()
        stream.synchronize()
        CURRENT.stream = None
        pair.check()
        assert pair.on_device.info.skipped is math.isnan(scale)


@simulator_only
def test_a_context_is_left_on_the_stream_that_is_current_then():
    pair = Pair(ft.SGD, lr=0.1, ema=0.5)
    pair.step(0)
    pair.step(1)
    before = [p.detach().clone() for p in pair.mine]
    stream = simulated.cuda.Stream(non_blocking=True)
    with pair.on_device.swap_ema():
        average = pair.mine[0].detach().clone()
        CURRENT.stream = stream
    assert torch.equal(pair.mine[0], average)  # restoring it waits in the stream
    stream.synchronize()
    assert not torch.equal(average, before[0])
    assert all(torch.equal(p, q) for p, q in zip(pair.mine, before, strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


@simulator_only
def test_a_step_that_torch_captures_is_refused():
    pair = Pair(ft.AdamW, lr=0.1)
    pair.step(0)
    give(pair.mine, 1)
    stream = CURRENT.stream = simulated.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    with pytest.raises(RuntimeError, match=r"step\(\): must not be captured in a CUDA graph, got a stream of cuda:0"):
        pair.on_device.step()
    assert simulated.cuda.get_current_stream().ptr == 0
    stream.end_capture()
    assert pair.on_device.state[pair.mine[0]]["step"].item() == 1.0
    CURRENT.stream = None
    pair.step(1)


def test_states_of_a_device_are_not_moved_to_shared_memory():
    pair = Pair(ft.AdamW, devices=(None, 0), lr=0.1)
    pair.step(0)
    with pytest.raises(RuntimeError, match=r"share_memory\(\): .*\[1\]: must be on the CPU, got a tensor on cuda:0"):
        pair.on_device.share_memory()
    assert not pair.on_device.state[pair.mine[0]]["exp_avg"].is_shared()
    pair.step(1)


@simulator_only
@pytest.mark.parametrize("on_device", [True, False])
def test_a_gradient_of_another_device_is_refused(on_device):
    """Which torch allows where a parameter was moved alone."""
    p = parameter(torch.ones(3), 0 if on_device else None)
    opt = ft.SGD([p], lr=0.1)
    p.grad = torch.ones(3) if on_device else there(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"grad: must be on .* as its parameter, got a tensor on"):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3))


def test_a_device_where_the_backend_cannot_work_is_refused_by_the_constructor(monkeypatch):
    def refuse(name: str) -> Any:
        raise RuntimeError("backend='cuda': no driver")

    monkeypatch.setattr(memory, "get_backend", refuse)
    p = parameter(torch.ones(3))
    expected = r"params'\]\[0\]: must be on the CPU where .*, got a tensor on cuda:0 \(backend='cuda': no driver\)"
    with pytest.raises(RuntimeError, match=expected):
        ft.SGD([p], lr=0.1)
