"""Whole iterations in torch: forward, backward and step, by fastopt.torch and by torch.optim.

Every contestant trains a model of its own, from the same weights, on the same batches. `zero_grad` is part of the
iteration. The step alone is measured for the smallest and the largest numbers of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from groups import Group, by_name, each_contestant

import fastopt
from fastopt.kernels.threads import using
from fastopt.measure import Result, compare

THREADS = (1, 2)
TURNS = 9

RIVALS = ("torch fused", "torch")
"""AdamW of torch with one kernel for all tensors, and as it is by default."""


class Training(NamedTuple):
    """A model and what one iteration of it is."""

    model: Any
    loss: Callable[[], Any]


def _torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def actor_critic() -> Training:
    """An actor and a critic on a body of two hidden layers of 64, as in reinforcement learning: 8 tensors."""
    torch = _torch()
    nn = torch.nn
    body = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    model = nn.ModuleList([body, nn.Linear(64, 4), nn.Linear(64, 1)])
    x, actions, returns = torch.randn(64, 8), torch.randint(4, (64,)), torch.randn(64)

    def loss() -> Any:
        hidden = model[0](x)
        logits, value = model[1](hidden), model[2](hidden)[:, 0]
        advantage = (returns - value).detach()
        policy = (nn.functional.cross_entropy(logits, actions, reduction="none") * advantage).mean()
        return policy + 0.5 * (returns - value).square().mean()

    return Training(model, loss)


def mlp() -> Training:
    """50 layers of 64: 100 tensors."""
    torch = _torch()
    nn = torch.nn
    layers = [module for _ in range(49) for module in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 1))
    x, target = torch.randn(64, 64), torch.randn(64, 1)
    return Training(model, lambda: nn.functional.mse_loss(model(x), target))


def transformer() -> Training:
    """83 encoder layers of width 32: 999 tensors with the last layer's."""
    torch = _torch()
    nn = torch.nn
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 83, enable_nested_tensor=False), nn.LayerNorm(32), nn.Linear(32, 8, bias=False)
    )
    x, target = torch.randn(4, 16, 32), torch.randn(4, 16, 8)
    return Training(model, lambda: nn.functional.mse_loss(model(x), target))


def cnn() -> Training:
    """Six convolutions with BatchNorm and ReLU, on 32 images of 32x32."""
    torch = _torch()
    nn = torch.nn
    widths = (3, 32, 32, 64, 64, 64, 64)
    blocks = [
        module
        for k in range(6)
        for module in (
            nn.Conv2d(widths[k], widths[k + 1], 3, stride=2 if k in (2, 4) else 1, padding=1, bias=False),
            nn.BatchNorm2d(widths[k + 1]),
            nn.ReLU(),
        )
    ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    x, target = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return Training(model, lambda: nn.functional.cross_entropy(model(x), target))


CASES: dict[str, Callable[[], Training]] = {
    "actor-critic of 8 tensors": actor_critic,
    "MLP of 100 tensors": mlp,
    "transformer of 999 tensors": transformer,
    "CNN with BatchNorm": cnn,
}


def optimizer_of(name: str, model: Any) -> Any:
    torch = _torch()
    if name.startswith("fastopt"):
        import fastopt.torch

        return fastopt.torch.AdamW(model.parameters(), lr=1e-3)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True if name == "torch fused" else None)


def iteration(name: str, case: Callable[[], Training]) -> Callable[[], None]:
    torch = _torch()
    torch.manual_seed(0)
    model, loss = case()
    if name == "fastopt" and case is cnn:
        import fastopt.torch

        with_relu(fastopt.torch.convert_batchnorm(model))
    opt = optimizer_of(name, model)

    def iterate() -> None:
        opt.zero_grad()
        loss().backward()
        opt.step()

    return iterate


def with_relu(model: Any) -> None:
    """Have each BatchNorm that a ReLU follows apply it in the same pass."""
    nn = _torch().nn
    for k in range(len(model) - 1):
        if isinstance(model[k], nn.BatchNorm2d) and type(model[k + 1]) is nn.ReLU:
            model[k].relu, model[k + 1] = True, nn.Identity()


def threads(stack: ExitStack, count: int) -> None:
    """Have torch and fastopt use so many threads inside the block."""
    torch = _torch()
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(count)
    stack.enter_context(using(count))


def iterations(case: str, count: int) -> Group:
    # With our BatchNorm, and without it.
    contestants = ("fastopt", *(("fastopt's AdamW alone",) if CASES[case] is cnn else ()), *RIVALS)

    def run(title: str, **how: Any) -> Result:
        with ExitStack() as stack:
            threads(stack, count)
            calls = {name: iteration(name, CASES[case]) for name in contestants}
            return compare(title, calls, case=case, threads=count, **{**how, "rounds": TURNS})

    title = f"{case}, {count} thread{'s' if count > 1 else ''}"
    return Group(f"iteration of {title}", contestants, run, 6.0, title=title)


STEPS = {"1 tensor of 10": (1, 10), "10,000 tensors of 10": (10_000, 10), "1 tensor of 30M": (1, 30_000_000)}


def step(name: str, tensors: int, size: int) -> Callable[[], None]:
    torch = _torch()
    params = [torch.nn.Parameter(torch.ones(size)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.full((size,), 0.5)
    model = torch.nn.ParameterList(params)
    found: Callable[[], None] = optimizer_of(name, model).step
    return found


def steps(case: str, count: int) -> Group:
    tensors, size = STEPS[case]
    contestants = ("fastopt", *RIVALS)

    def run(title: str, **how: Any) -> Result:
        with ExitStack() as stack:
            threads(stack, count)
            return compare(title, {name: step(name, tensors, size) for name in contestants}, threads=count, **how)

    title = f"step of {case}, {count} thread{'s' if count > 1 else ''}"
    return Group(f"torch: {title}", contestants, run, 2.0, tensors * size, title=title)


ITERATIONS = by_name(iterations(case, count) for case in CASES for count in THREADS)
ALL_STEPS = by_name(steps(case, count) for case in STEPS for count in (THREADS if STEPS[case][1] > 10 else (1,)))


@pytest.fixture(autouse=True)
def restored():
    _torch()
    with using(fastopt.get_num_threads()):
        yield


@pytest.mark.parametrize(**each_contestant(ITERATIONS))
def test_iteration(measure, group, contestant):
    measure(ITERATIONS[group], contestant)


@pytest.mark.parametrize(**each_contestant(ALL_STEPS))
def test_step(measure, group, contestant):
    measure(ALL_STEPS[group], contestant)
