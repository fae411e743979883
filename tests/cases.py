"""The list of optimizers for all property tests: a rule with an entry here is fully tested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

import fastopt
from fastopt import reference
from fastopt.kernels.elements import MAX_STATES
from fastopt.source import written
from fastopt.wrappers import cautious, centralized, lookahead

SIZES = (0, 1, 7, 15, 16, 17, 1000, 100_003)  # around the widths of SIMD registers, and larger than a chunk
DTYPES = (np.float32, np.float64)
EVERYTHING: dict[str, Any] = {
    "max_norm": 0.5,
    "clip_value": 0.5,
    "nonfinite": "zero",
    "ema": 0.9,
    "maximize": True,
}
"""All step options together. Tests that use them share their kernels."""


@dataclass(frozen=True)
class Case:
    """An optimizer in one of its forms, and its names in the reference and in torch."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: str = ""
    torch: str | None = None  # the class in torch.optim, if torch has this form
    torch_options: dict[str, Any] | None = None  # only if they differ from `options`
    lr: float = 0.1  # converges on a quadratic from a distance of 10

    def __str__(self) -> str:
        return self.optimizer + "".join(f"-{name}={value}" for name, value in self.options.items())

    def make(self, params: Any, **more: Any) -> fastopt.Optimizer:
        return getattr(fastopt, self.optimizer)(params, **{**self.options, **more})

    def begin(self, p: np.ndarray, **more: Any) -> list[np.ndarray]:
        """Return the states of the rule before the first step on `p`: arrays, and arrays of one number."""
        states = self.make({"w": p}, **more).states
        return [states[name]["w"].copy().reshape(-1) for name in (*self.rule.states, *self.rule.numbers)]

    @property
    def rule(self) -> fastopt.Rule:
        return self.make(None).rule  # without parameters nothing is compiled

    def oracle(self, p: np.ndarray, **more: Any) -> Oracle:
        return Oracle(self.reference or self.optimizer.lower(), p, {**self.options, **more})


class Oracle:
    """The reference of one case on one array, with its state."""

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
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "lr_inside": True}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "lr_inside": True}),
    Case("Momentum", torch="SGD", torch_options={"lr": 0.01, "momentum": 0.9}, lr=0.05),
    Case("Momentum", {"form": "ema", "weight_decay": 0.1}, lr=0.05),
    Case("Momentum", {"form": "lr_inside"}, lr=0.05),
    Case("Nesterov", torch="SGD", torch_options={"lr": 0.01, "momentum": 0.9, "nesterov": True}, lr=0.05),
    Case("Nesterov", {"form": "lookahead", "weight_decay": 0.1}, lr=0.05),
    Case("Adagrad", {"lr": 0.1, "lr_decay": 0.01}, torch="Adagrad", lr=2.0),
    Case("Adagrad", {"lr": 0.1, "eps": 1e-3, "eps_inside": True, "weight_decay": 0.1}, lr=2.0),
    Case("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1}, torch="Adagrad", lr=2.0),
    Case("Adadelta", torch="Adadelta", lr=100.0),
    Case("Adadelta", {"rho": 0.95, "eps": 1e-4, "weight_decay": 0.1}, torch="Adadelta", lr=50.0),
    Case("RMSprop", torch="RMSprop"),
    Case("RMSprop", {"eps": 1e-4, "eps_inside": True, "weight_decay": 0.1}),
    Case("RMSprop", {"centered": True, "alpha": 0.9}, torch="RMSprop"),
    Case("RMSprop", {"momentum": 0.9}, torch="RMSprop"),
    Case("RMSprop", {"momentum": 0.9, "lr_inside": True}),
    Case("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}, torch="RMSprop"),
    Case("RMSprop", {"momentum": 0.9, "centered": True, "eps_inside": True, "eps": 1e-4}),
    Case("Adam", torch="Adam"),
    Case("Adam", {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.1}, torch="Adam"),
    Case("Adam", {"eps_inside": True, "eps": 1e-4}),
    Case("Adam", {"eps_hat": True, "eps": 1e-4}),
    Case("Adam", {"bias_correction": False}),
    Case("Adam", {"amsgrad": True, "betas": (0.9, 0.9)}, torch="Adam", lr=1.0),
    Case("AdamW", torch="AdamW"),
    Case("AdamW", {"eps_inside": True, "eps": 1e-4, "weight_decay": 0.5}),
    Case("AdamW", {"amsgrad": True, "betas": (0.9, 0.9)}, torch="AdamW", lr=1.0),
    Case("LAMB", lr=0.05),
    Case("LAMB", {"bias_correction": False, "weight_decay": 0.0, "betas": (0.5, 0.75)}, lr=0.05),
    Case("NAdam", torch="NAdam"),
    Case("NAdam", {"momentum_decay": 0.1, "betas": (0.5, 0.75)}, torch="NAdam"),
    Case("RAdam", torch="RAdam", lr=0.5),
    Case("RAdam", {"betas": (0.9, 0.9)}, torch="RAdam"),
    Case("RAdam", {"eps_hat": False, "eps": 1e-3, "betas": (0.9, 0.9)}, lr=0.5),
    Case("Adamax", torch="Adamax", lr=0.5),
    Case("Adamax", {"eps_inside": False, "eps": 1e-3, "weight_decay": 0.1}, lr=0.5),
    Case("Lion", {"weight_decay": 0.1}),
    Case("AdaBelief"),
    Case("AdaBelief", {"eps": 1e-4, "weight_decay": 0.1}),
    Case("Adan", {"weight_decay": 0.1}),
    Case("Adan", {"form": "optax", "eps_root": 1e-4, "weight_decay": 0.1}),
    Case("AdEMAMix", {"warmup_steps": 10}),
    Case("LARS", {"weight_decay": 0.1}, lr=10.0),
    Case("LARS", {"nesterov": True, "eps": 1e-3}, lr=10.0),
    Case("NovoGrad", {"weight_decay": 0.1}, lr=0.01),
    Case("StableAdamW", {"weight_decay": 0.1}, reference="stable_adamw"),
    Case("Adafactor", {"weight_decay": 0.1}),
    Case("Sophia", {"weight_decay": 0.1}),
    Case("Yogi"),
    Case("Yogi", {"bias_correction": False}),
    Case("Yogi", {"initial_momentum": 0.1}),
    Case("Rprop", torch="Rprop"),
    Case("Rprop", {"lr": 0.05, "step_sizes": (0.02, 0.15)}, torch="Rprop", lr=0.05),
    Case("ScheduleFreeAdamW", {"warmup_steps": 3, "weight_decay": 0.1}, reference="schedule_free_adamw"),
    Case("ScheduleFreeAdamW", {"form": "optax", "weight_decay": 0.1}, reference="schedule_free_adamw"),
    Case("ScheduleFreeAdamW", {"form": "keras", "warmup_steps": 3}, reference="schedule_free_adamw"),
    Case("ADOPT", {"betas": (0.9, 0.99), "weight_decay": 0.1}),
    Case("AdaBound", {"gamma": 0.25}),
    Case("FTRL", {"l1": 0.01, "l2": 0.1, "weight_decay": 0.1}, lr=2.0),
    Case("ASGD", {"lambd": 0.01, "t0": 2.0, "weight_decay": 0.1}, torch="ASGD"),
    Case("Prodigy", {"d0": 0.01, "weight_decay": 0.1}, lr=1.0),
    Case("MARS", {"gamma": 0.25, "weight_decay": 0.1}),
    Case("AdamMini", {"weight_decay": 0.1}, reference="adam_mini", lr=0.5),
    Case("Muon"),
    Case("Shampoo", {"momentum": 0.9, "weight_decay": 0.1}, lr=2.0),
    Case("SOAP", {"weight_decay": 0.1}),
)


# --- rules of one's own -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseOfRule(Case):
    """A rule that no class of the library has; `optimizer` is its name."""

    of: fastopt.Rule | None = None

    def make(self, params: Any, **more: Any) -> fastopt.Optimizer:
        return fastopt.Optimizer(params, self.rule, **{**self.options, **more})

    @property
    def rule(self) -> fastopt.Rule:
        assert self.of is not None
        return self.of


def aggregated(count: int) -> fastopt.Rule:
    """Aggregated momentum (Lucas et al. 2018, https://arxiv.org/abs/1804.00325) of so many velocities.

    v_k = b_k v_k + g,    p = p - lr / count sum(v_k),    b_k = 1 - 0.8^k
    """
    states = [f"v{k}" for k in range(count)]
    kind: Any = NamedTuple("AggregatedHyper", [("rate", float), *((f"b{k}", float) for k in range(count))])

    def prepare(t, lr=0.1):
        return kind(lr / count, *(1.0 - 0.8**k for k in range(count)))

    lines = [f"{v} = h.b{k} * {v} + g" for k, v in enumerate(states)]
    lines.append(f"return p - h.rate * ({' + '.join(states)}), {', '.join(states)}")
    function = written(f"aggregated_{count}", ["p", "g", *states, "h"], lines, {}, __name__)
    return fastopt.rule(prepare, idle=fastopt.Linear(with_l2=True))(function)


MANY_STATES = CaseOfRule("aggregated", of=aggregated(MAX_STATES))
WRAPPED = (
    CaseOfRule("lookahead_adamw", {"lookahead_k": 2, "weight_decay": 0.1}, of=lookahead(fastopt.rules.ALL["adamw"])),
    CaseOfRule("cautious_momentum", {"weight_decay": 0.1}, of=cautious(fastopt.rules.ALL["momentum"])),
    CaseOfRule("centralized_stable_adamw", {"weight_decay": 0.1}, of=centralized(fastopt.rules.ALL["stable_adamw"])),
)
"""An elementwise one, one of sums, and one whose sums over rows come before those of its rule."""

BY_NAME = {str(case): case for case in CASES}
PER_RULE = tuple({case.rule.name: case for case in reversed(CASES)}.values())
"""One case per rule, for properties that do not depend on its options."""
OF_EACH_KIND = tuple(
    BY_NAME[name]
    for name in (
        "SGD-lr=0.1",
        "Adam",
        "LAMB",
        "NovoGrad-weight_decay=0.1",
        "StableAdamW-weight_decay=0.1",
        "Adafactor-weight_decay=0.1",
        "ScheduleFreeAdamW-warmup_steps=3-weight_decay=0.1",
        "Muon",
    )
)
"""A rule without states and one with, four of sums, one whose states begin at the
parameters, and a matrixwise one: for properties that depend on the kind of a rule alone."""


def gradients(rng: np.random.Generator, size: int, dtype: Any) -> np.ndarray:
    """Return non-zero gradients of all magnitudes from 1e-9 to 10."""
    magnitude = 10.0 ** rng.uniform(-9.0, 1.0, size)
    return (rng.choice([-1.0, 1.0], size) * magnitude).astype(dtype)


# --- mathematics ------------------------------------------------------------------------------------------------------


class OfMathematics(NamedTuple):
    power: float
    seed: float


def prepare_mathematics(t, power=0.7, seed=7.0, weight_decay=0.0):
    return OfMathematics(power, seed)


@fastopt.rule(prepare_mathematics)
def exp_of(p, g, h):
    return fastopt.math.exp(g)


@fastopt.rule(prepare_mathematics)
def log_of(p, g, h):
    return fastopt.math.log(g)


@fastopt.rule(prepare_mathematics)
def tanh_of(p, g, h):
    return fastopt.math.tanh(g)


@fastopt.rule(prepare_mathematics)
def pow_of(p, g, h):
    return fastopt.math.pow(g, h.power)


@fastopt.rule(prepare_mathematics)
def power_of(p, g, h):
    return fastopt.math.pow(p, g)


@fastopt.rule(prepare_mathematics)
def uniform_of(p, g, h):
    return fastopt.uniform(h.seed, g)


MATHEMATICS = {rule.name: rule for rule in (exp_of, log_of, tanh_of, pow_of, power_of, uniform_of)}
"""Rules that replace p by a function of g (of p and g: power_of)."""
