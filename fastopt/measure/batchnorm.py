"""The contestants of a BatchNorm pass: fastopt, the memory traffic that it cannot avoid, torch, plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastopt import batchnorm_backward, batchnorm_forward, reference
from fastopt.measure import limit
from fastopt.measure.rivals import Array, Contestant, torch_on_our_threads

WAYS = ("forward", "backward", "inference")
EPS = 1e-5


class Pass:
    """The arrays of one case. All contestants read them, and each writes to arrays of its own."""

    def __init__(self, shape: tuple[int, ...], axis: int, way: str):
        rng = np.random.default_rng(0)
        self.axis, self.way = axis, way
        self.x, self.dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
        channels = shape[axis]
        self.gamma, self.beta = (rng.standard_normal(channels, np.float32) for _ in range(2))
        self.mean, self.var = np.zeros(channels, np.float32), np.ones(channels, np.float32)

    def statistics(self) -> tuple[Array, Array]:
        """Return a running mean and variance that belong to one contestant."""
        return self.mean.copy(), self.var.copy()


def contestants(
    shape: tuple[int, ...], axis: int, way: str, rivals: Iterable[str]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return the contestants, and the reason for each rival that is absent. ``params()`` returns [y] or [dx].

    >>> both, absent = contestants((16, 3), 1, "forward", ["numpy"])
    >>> for each in both.values():
    ...     _ = each.step()
    >>> bool(np.allclose(both["fastopt"].params()[0], both["numpy"].params()[0], atol=1e-5)), absent
    (True, {})
    """
    if way not in WAYS:
        raise ValueError(f"way: must be one of {', '.join(map(repr, WAYS))}, got {way!r}")
    task = Pass(shape, axis, way)
    found = {"fastopt": _ours(task), "limit": _limit(task)}
    absent: dict[str, str] = {}
    for name in rivals:
        if find_spec(name) is None:
            absent[name] = f"{name} is not installed"
        else:
            found[name] = RIVALS[name](task)
    return found, absent


def _ours(task: Pass) -> Contestant:
    out = np.zeros_like(task.x)
    arguments = (task.x, task.gamma, task.beta, *task.statistics())
    if task.way == "inference":
        return Contestant(
            lambda: batchnorm_forward(*arguments, training=False, activation="relu", axis=task.axis, out=out),
            lambda: [out.copy()],
        )
    if task.way == "forward":
        return Contestant(lambda: batchnorm_forward(*arguments, axis=task.axis, out=out), lambda: [out.copy()])
    _, saved = batchnorm_forward(task.x, task.gamma, task.beta, axis=task.axis, out=out)

    def backward() -> None:
        saved.used, saved._x = False, task.x  # the forward pass is not part of what is timed
        batchnorm_backward(task.dy, saved, out=out)

    return Contestant(backward, lambda: [out.copy()])


def _limit(task: Pass) -> Contestant:
    x, dy, out = task.x.reshape(-1), task.dy.reshape(-1), np.zeros(task.x.size, np.float32)
    if task.way == "backward":
        return Contestant(lambda: limit.add(x, dy, out), lambda: [out.copy()])
    return Contestant(lambda: limit.copy(x, out), lambda: [out.copy()])


def _torch(task: Pass) -> Contestant:
    torch = torch_on_our_threads()
    norm = torch.nn.functional.batch_norm

    def of(array: Array) -> Any:
        tensor = torch.from_numpy(array.copy())
        # Channels last: the same bytes, seen as (N, C, H, W) in torch's format of that name.
        return tensor.movedim(-1, 1) if task.axis == -1 and array.ndim > 2 else tensor

    def back(tensor: Any) -> list[Array]:
        tensor = tensor.detach()
        return [(tensor.movedim(1, -1) if task.axis == -1 and tensor.ndim > 2 else tensor).numpy().copy()]

    x, dy = of(task.x), of(task.dy)
    gamma, beta, mean, var = (of(each) for each in (task.gamma, task.beta, *task.statistics()))
    y: Any = None

    def forward() -> None:
        nonlocal y
        with torch.no_grad():
            y = norm(x, mean, var, gamma, beta, True, 0.1, EPS)

    def inference() -> None:
        nonlocal y
        with torch.no_grad():
            y = torch.relu_(norm(x, mean, var, gamma, beta, False, 0.1, EPS))

    if task.way != "backward":
        return Contestant(forward if task.way == "forward" else inference, lambda: back(y))
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    gamma.requires_grad_()
    beta.requires_grad_()
    graph = norm(leaf, mean, var, gamma, beta, True, 0.1, EPS)

    def backward() -> None:
        nonlocal y
        y, _, _ = torch.autograd.grad(graph, (leaf, gamma, beta), dy, retain_graph=True)

    return Contestant(backward, lambda: back(y))


def _numpy(task: Pass) -> Contestant:
    y: Any = None
    arguments = (task.x, task.gamma, task.beta, *task.statistics())

    def forward() -> None:
        nonlocal y
        y, _ = reference.batchnorm_forward(*arguments, axis=task.axis)

    def inference() -> None:
        nonlocal y
        y, _ = reference.batchnorm_forward(*arguments, training=False, activation="relu", axis=task.axis)

    _, cache = reference.batchnorm_forward(task.x, task.gamma, task.beta, axis=task.axis)

    def backward() -> None:
        nonlocal y
        y = reference.batchnorm_backward(task.dy, cache)["dx"]

    steps = {"forward": forward, "inference": inference, "backward": backward}
    return Contestant(steps[task.way], lambda: [y.copy()])


RIVALS: dict[str, Callable[[Pass], Contestant]] = {"torch": _torch, "numpy": _numpy}
"""The rivals, by the name of their package."""
