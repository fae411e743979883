"""The one list of optimizers that every property test runs over: an entry here, and a rule is fully tested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fastopt
from fastopt import reference

SIZES = (0, 1, 7, 15, 16, 17, 1000, 100_003)  # around the widths of SIMD registers, and beyond one chunk
DTYPES = (np.float32, np.float64)


@dataclass(frozen=True)
class Case:
    """An optimizer in one of its forms, and what it is called in the reference and in torch."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: str = ""
    torch: str | None = None  # the class in torch.optim, where it has this form
    torch_options: dict[str, Any] | None = None  # where they differ from `options`

    def __str__(self) -> str:
        return self.optimizer + "".join(f"-{name}={value}" for name, value in self.options.items())

    def make(self, params: Any, **more: Any) -> fastopt.Optimizer:
        return getattr(fastopt, self.optimizer)(params, **{**self.options, **more})

    @property
    def rule(self) -> fastopt.Rule:
        return self.make({"w": np.zeros(1)}).rule

    def oracle(self, p: np.ndarray, **more: Any) -> Oracle:
        return Oracle(self.reference or self.optimizer.lower(), p, {**self.options, **more})


class Oracle:
    """The reference of one case on one array, with the state it keeps."""

    def __init__(self, name: str, p: np.ndarray, hyper: dict[str, Any]):
        self.p = p.copy()
        self.hyper = hyper
        self.update = reference.OPTIMIZERS[name]
        self.state = reference.init_state(name, self.p, **hyper)
        self.t = 0

    def step(self, g: np.ndarray, **more: Any) -> None:
        self.t += 1
        self.update(self.p, g, self.state, self.t, **{**self.hyper, **more})


CASES = (
    Case("SGD", {"lr": 0.1}, torch="SGD"),
    Case("SGD", {"lr": 0.1, "momentum": 0.9}, torch="SGD"),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}, torch="SGD"),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, torch="SGD"),
    Case("Momentum", torch="SGD", torch_options={"lr": 0.01, "momentum": 0.9}),
    Case("Momentum", {"form": "ema", "weight_decay": 0.1}),
    Case("Momentum", {"form": "lr_inside"}),
    Case("Nesterov", torch="SGD", torch_options={"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    Case("Nesterov", {"form": "lookahead", "weight_decay": 0.1}),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.01}, torch="Adagrad"),
    Case("Adagrad", {"lr": 0.1, "eps": 1e-3, "eps_inside": True, "weight_decay": 0.1}),
    Case("Adadelta", torch="Adadelta"),
    Case("Adadelta", {"rho": 0.95, "eps": 1e-4, "weight_decay": 0.1}, torch="Adadelta"),
    Case("RMSprop", torch="RMSprop"),
    Case("RMSprop", {"eps": 1e-4, "eps_inside": True, "weight_decay": 0.1}),
    Case("RMSprop", {"centered": True, "alpha": 0.9}, torch="RMSprop"),
    Case("RMSprop", {"momentum": 0.9}, torch="RMSprop"),
    Case("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}, torch="RMSprop"),
    Case("RMSprop", {"momentum": 0.9, "centered": True, "eps_inside": True, "eps": 1e-4}),
    Case("Adam", torch="Adam"),
    Case("Adam", {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.1}, torch="Adam"),
    Case("Adam", {"eps_inside": True, "eps": 1e-4}),
    Case("Adam", {"bias_correction": False}),
    Case("Adam", {"amsgrad": True, "betas": (0.9, 0.9)}, torch="Adam"),
    Case("AdamW", torch="AdamW"),
    Case("AdamW", {"eps_inside": True, "eps": 1e-4, "weight_decay": 0.5}),
    Case("AdamW", {"amsgrad": True, "betas": (0.9, 0.9)}, torch="AdamW"),
    Case("LAMB"),
    Case("LAMB", {"bias_correction": False, "weight_decay": 0.0, "betas": (0.5, 0.75)}),
)

BY_NAME = {str(case): case for case in CASES}


def gradients(rng: np.random.Generator, size: int, dtype: Any) -> np.ndarray:
    """Non-zero gradients of every magnitude from 1e-9 to 10."""
    magnitude = 10.0 ** rng.uniform(-9.0, 1.0, size)
    return (rng.choice([-1.0, 1.0], size) * magnitude).astype(dtype)
