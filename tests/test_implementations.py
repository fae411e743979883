"""Optimizers that torch does not have, against the implementations that people use: 20 steps in float64.

Stored numbers are in golden.json, with the versions of the packages that gave them; where such a package is installed
its numbers are computed again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastopt

Tree = dict[str, np.ndarray]

STEPS = 20
START: Tree = {"w": np.array([[0.5, -2.0, 1.0], [3.0, -0.25, 0.125]]), "b": np.array([-1.0, 0.75])}
CURVES: Tree = {"w": np.array([[1.0, 0.5, 2.0], [0.25, 4.0, 0.0]]), "b": np.array([3.0, 0.125])}
"""Of bowls around 0; along one axis there is noise alone."""


def gradient(t: int, path: str, p: np.ndarray) -> np.ndarray:
    """The gradient at p, with noise of small binary fractions, which is the same on every machine."""
    noise = (7 * t + 3 * np.arange(p.size).reshape(p.shape) + len(path)) % 11 - 5
    return CURVES[path] * p + noise / 8


@dataclass(frozen=True)
class Implementation:
    """An optimizer of a package: how it is called here and there."""

    optimizer: str
    package: str
    module: str
    name: str
    here: dict[str, Any] = field(default_factory=dict)
    there: dict[str, Any] = field(default_factory=dict)
    start: float = 1.0
    """A factor of `START`."""

    def __str__(self) -> str:
        return "-".join([self.optimizer, *(f"{name}={value}" for name, value in self.here.items())])

    @property
    def params(self) -> Tree:
        return {path: self.start * leaf for path, leaf in START.items()}

    def ours(self) -> Tree:
        opt = getattr(fastopt, self.optimizer)(self.params, **self.here)
        for t in range(1, STEPS + 1):
            opt.step({path: gradient(t, path, p) for path, p in opt.params.items()})
        return dict(opt.params)

    def theirs(self) -> Tree:
        pytest.importorskip(self.package, reason="not installed; its numbers are stored")
        make = getattr(importlib.import_module(f"{self.package}.{self.module}"), self.name)
        return (of_optax if self.package == "optax" else of_torch)(make, self.params, self.there)


def of_torch(make: Callable[..., Any], params: Tree, options: Mapping[str, Any]) -> Tree:
    import torch

    tensors = {path: torch.nn.Parameter(torch.from_numpy(p.copy())) for path, p in params.items()}
    with contextlib.redirect_stdout(None):
        opt = make(tensors.items() if make.__name__ == "Adam_mini" else tensors.values(), **options)
        for t in range(1, STEPS + 1):
            for path, p in tensors.items():
                p.grad = torch.from_numpy(gradient(t, path, p.detach().numpy()))
            opt.step()
    return {path: p.detach().numpy() for path, p in tensors.items()}


def of_optax(make: Callable[..., Any], params: Tree, options: Mapping[str, Any]) -> Tree:
    import jax
    import optax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        transformation = make(**options)
        there = jax.tree.map(jax.numpy.asarray, params)
        state = transformation.init(there)
        for t in range(1, STEPS + 1):
            grads = {path: jax.numpy.asarray(gradient(t, path, np.asarray(p))) for path, p in there.items()}
            updates, state = transformation.update(grads, state, there)
            there = optax.apply_updates(there, updates)
        return {path: np.asarray(p) for path, p in there.items()}
    finally:
        jax.config.update("jax_enable_x64", before)


IMPLEMENTATIONS = [
    Implementation(
        "ADOPT",
        "optax",
        "contrib",
        "adopt",
        {"lr": 0.1, "betas": (0.75, 0.875)},
        {"learning_rate": 0.1, "b1": 0.75, "b2": 0.875},
    ),
    Implementation(
        "ADOPT",
        "timm",
        "optim.adopt",
        "Adopt",
        {"lr": 0.1, "betas": (0.75, 0.875), "eps": 0.5, "clip_exp": 0.5, "weight_decay": 0.25},
        {"lr": 0.1, "betas": (0.75, 0.875), "eps": 0.5, "clip_exp": 0.5, "weight_decay": 0.25, "foreach": False},
    ),
    Implementation(
        "AdaBound",
        "pytorch_optimizer",
        "optimizer.adabound",
        "AdaBound",
        {"lr": 0.1, "betas": (0.75, 0.875), "gamma": 0.25, "weight_decay": 0.25},
        {"lr": 0.1, "betas": (0.75, 0.875), "gamma": 0.25, "weight_decay": 0.25, "weight_decouple": False},
    ),
    Implementation(
        "FTRL",
        "pytorch_optimizer",
        "optimizer.ftrl",
        "FTRL",
        {"lr": 0.25, "beta": 0.5, "l1": 0.375, "l2": 0.125},
        {"lr": 0.25, "beta": 0.5, "lambda_1": 0.375, "lambda_2": 0.125},
        start=0.0,
    ),
    Implementation("Prodigy", "prodigyopt", "prodigy", "Prodigy", {"d0": 0.01, "eps": 1e-3}, {"d0": 0.01, "eps": 1e-3}),
    Implementation(
        "Prodigy",
        "prodigyopt",
        "prodigy",
        "Prodigy",
        {
            "lr": 0.5,
            "betas": (0.75, 0.875),
            "d0": 0.01,
            "d_coef": 2.0,
            "weight_decay": 0.25,
            "bias_correction": True,
            "safeguard_warmup": True,
        },
        {
            "lr": 0.5,
            "betas": (0.75, 0.875),
            "d0": 0.01,
            "d_coef": 2.0,
            "weight_decay": 0.25,
            "use_bias_correction": True,
            "safeguard_warmup": True,
        },
    ),
    Implementation(
        "MARS",
        "timm",
        "optim.mars",
        "Mars",
        {"lr": 0.1, "betas": (0.75, 0.875), "eps": 1e-3, "gamma": 0.25, "weight_decay": 0.25},
        {"lr": 0.1, "betas": (0.75, 0.875), "eps": 1e-3, "gamma": 0.25, "weight_decay": 0.25, "optimize_1d": True},
    ),
    Implementation(
        "AdamMini",
        "adam_mini",
        "adam_mini",
        "Adam_mini",
        {"lr": 0.1, "betas": (0.75, 0.875), "eps": 1e-3, "weight_decay": 0.25},
        {"lr": 0.1, "betas": (0.75, 0.875), "eps": 1e-3, "weight_decay": 0.25, "verbose": False},
    ),
]
STORED = json.loads((Path(__file__).parent / "golden.json").read_text())["implementations"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_an_optimizer_computes_what_the_implementation_has_computed(implementation):
    stored = STORED[str(implementation)]
    assert stored["package"].split()[0] == implementation.package
    for path, p in implementation.ours().items():
        np.testing.assert_allclose(p, stored["params"][path], rtol=1e-12, atol=1e-15, err_msg=path)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_the_stored_numbers_are_those_of_the_implementation(implementation):
    for path, p in implementation.theirs().items():
        np.testing.assert_allclose(p, STORED[str(implementation)]["params"][path], rtol=1e-12, atol=1e-15, err_msg=path)
