"""Parameters and states of 16 bits in fastopt.torch: the steps of the NumPy optimizer, where tensors are."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastopt  # noqa: E402
import fastopt.torch as ft  # noqa: E402

WAYS = (
    (torch.bfloat16, {}),
    (torch.bfloat16, {"states": "bfloat16", "rounding": "stochastic", "seed": 3}),
    (torch.bfloat16, {"compensated": True}),
    (torch.float16, {}),
    (torch.float32, {"states": "bfloat16"}),
)
SHAPES = {"w": (5, 7), "b": (7,), "s": ()}


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES.values()]


def gradients(dtype: torch.dtype, t: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + t)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES.values()]


def step(opt: torch.optim.Optimizer, params: list[torch.nn.Parameter], t: int) -> None:
    for p, g in zip(params, gradients(params[0].dtype, t), strict=True):
        p.grad = g
    opt.step()


@pytest.mark.parametrize(("dtype", "options"), WAYS, ids=str)
def test_steps_are_those_of_the_numpy_optimizer(dtype, options):
    """Bit for bit, states included; tensors stay where they are."""
    params = parameters(dtype)
    places = [p.data_ptr() for p in params]
    opt = ft.AdamW(params, lr=0.01, max_norm=1.0, ema=0.9, **options)
    name = str(dtype).removeprefix("torch.")
    start = [p.detach().float().numpy() for p in parameters(dtype)]
    twin = fastopt.AdamW(fastopt.pack(start, dtype=name), lr=0.01, weight_decay=0.01, max_norm=1.0, ema=0.9, **options)
    for t in range(4):
        step(opt, params, t)
        twin.step([g.float().numpy().astype(twin.flat.dtype) for g in gradients(dtype, t)])
    assert [p.data_ptr() for p in params] == places
    arrays = twin.state.arrays
    for k, p in enumerate(params):
        assert torch.equal(p.detach().float(), torch.from_numpy(twin.flat.arrays[k].astype(np.float32)))
        own = opt.state[p]
        pairs = {"exp_avg": "m", "exp_avg_sq": "v", "ema": "ema", "master": "master", "rest": "rest"}
        for shown, name in pairs.items():
            assert (shown in own) == (name in arrays)
            if name in arrays:
                assert torch.equal(own[shown].float(), torch.from_numpy(arrays[name][k].astype(np.float32)))


@pytest.mark.parametrize(("dtype", "options"), WAYS, ids=str)
def test_a_run_goes_on_exactly(dtype, options):
    """From a state_dict, from a file of torch's, and from a deep copy."""
    params = parameters(dtype)
    opt = ft.AdamW(params, lr=0.01, **options)
    for t in range(3):
        step(opt, params, t)
    runs = [(opt, params)]
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    for saved in (opt.state_dict(), torch.load(file)):
        own = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = ft.AdamW(own, lr=0.01, **options)
        other.load_state_dict(saved)
        runs.append((other, own))
    copied = copy.deepcopy((opt, params))
    runs.append(copied)
    for t in range(3, 5):
        for each, own in runs:
            step(each, own, t)
    for each, own in runs[1:]:
        for p, mine in zip(own, params, strict=True):
            assert torch.equal(p, mine)
            for name, value in opt.state[mine].items():
                assert torch.equal(each.state[p][name], value), name


def test_torchs_own_class_continues_and_is_continued():
    """Its states are of the dtype of the parameters: what they lack is rounding."""
    params = parameters(torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=0.01)
    for t in range(3):
        step(theirs, params, t)
    own = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = ft.AdamW(own, lr=0.01)
    ours.load_state_dict(theirs.state_dict())
    step(ours, own, 3), step(theirs, params, 3)
    for p, mine in zip(params, own, strict=True):
        assert torch.allclose(p, mine, atol=2.0**-7, rtol=2.0**-7)
    back = [torch.nn.Parameter(p.detach().clone()) for p in own]
    again = torch.optim.AdamW(back, lr=0.01)
    saved = ours.state_dict()
    again.load_state_dict(saved)
    step(again, back, 4), step(ours, own, 4)
    for p, mine in zip(back, own, strict=True):
        assert torch.allclose(p, mine, atol=2.0**-7, rtol=2.0**-7)


def test_models_of_both_kinds_have_one_optimizer():
    """Norms of bfloat16 layers in a float32 model are of all together; `master` is for those that need it."""
    half, full = parameters(torch.bfloat16), parameters(torch.float32)
    opt = ft.AdamW([*half, *full], lr=0.01, max_norm=1.0, master=True)
    for p, g in zip((*half, *full), (*gradients(torch.bfloat16, 0), *gradients(torch.float32, 0)), strict=True):
        p.grad = g
    opt.step()
    norm = sum(float(p.grad.double().square().sum()) for p in (*half, *full)) ** 0.5
    assert opt.info.grad_norm == pytest.approx(norm, rel=1e-6)
    assert "master" in opt.state[half[0]]
    assert "master" not in opt.state[full[0]]


def test_gradients_that_are_not_finite_are_named():
    (p, *_) = params = parameters(torch.bfloat16)
    opt = ft.SGD(params, lr=0.1, nonfinite="raise")
    before = p.detach().clone()
    for each in params:
        each.grad = torch.zeros_like(each)
    p.grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"param_groups\[0\]\['params'\]\[0\]"):
        opt.step()
    assert torch.equal(p, before)
