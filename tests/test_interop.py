"""States and conventions of torch, optax and Keras: golden vectors, runs continued elsewhere, and refusals."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from scripts import run

import fastopt
from fastopt.interop import (
    from_keras_state,
    from_optax_state,
    from_torch_state,
    to_keras_state,
    to_optax_state,
    to_torch_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own numpy()

# --- the conventions: three steps by each framework's own formulas ----------------------------------------------------
#
# Each function is written from the framework's documentation and source, with its names and defaults; `gs` are the
# gradients of the steps. Nothing of fastopt is used.


def torch_sgd(p, gs, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    buf = None
    for g in gs:
        d = g + weight_decay * p
        if momentum:
            buf = d if buf is None else momentum * buf + (1 - dampening) * d
            d = d + momentum * buf if nesterov else buf
        p = p - lr * d
    return p


def torch_adagrad(p, gs, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
    total = np.full_like(p, initial_accumulator_value)
    for step, g in enumerate(gs, 1):
        d = g + weight_decay * p
        total = total + d * d
        p = p - lr / (1 + (step - 1) * lr_decay) * d / (np.sqrt(total) + eps)
    return p


def torch_adadelta(p, gs, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0):
    square_avg, acc_delta = np.zeros_like(p), np.zeros_like(p)
    for g in gs:
        d = g + weight_decay * p
        square_avg = rho * square_avg + (1 - rho) * d**2
        delta = np.sqrt(acc_delta + eps) / np.sqrt(square_avg + eps) * d
        acc_delta = rho * acc_delta + (1 - rho) * delta**2
        p = p - lr * delta
    return p


def torch_rmsprop(p, gs, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
    square_avg, grad_avg, buf = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for g in gs:
        d = g + weight_decay * p
        square_avg = alpha * square_avg + (1 - alpha) * d**2
        grad_avg = alpha * grad_avg + (1 - alpha) * d
        avg = np.sqrt(square_avg - grad_avg**2 if centered else square_avg) + eps
        buf = momentum * buf + d / avg
        p = p - lr * (buf if momentum else d / avg)
    return p


def torch_adam(
    p,
    gs,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    decoupled_weight_decay=False,
):
    exp_avg, exp_avg_sq, largest = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for step, g in enumerate(gs, 1):
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
            d = g
        else:
            d = g + weight_decay * p
        exp_avg = betas[0] * exp_avg + (1 - betas[0]) * d
        exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * d**2
        largest = np.maximum(largest, exp_avg_sq)
        denom = np.sqrt(largest if amsgrad else exp_avg_sq) / math.sqrt(1 - betas[1] ** step) + eps
        p = p - lr / (1 - betas[0] ** step) * exp_avg / denom
    return p


def torch_adamw(p, gs, weight_decay=1e-2, **options):
    return torch_adam(p, gs, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


def torch_nadam(p, gs, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3):
    exp_avg, exp_avg_sq, mu_product = np.zeros_like(p), np.zeros_like(p), 1.0
    for step, g in enumerate(gs, 1):
        d = g + weight_decay * p
        mu = betas[0] * (1 - 0.5 * 0.96 ** (step * momentum_decay))
        mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
        mu_product *= mu
        exp_avg = betas[0] * exp_avg + (1 - betas[0]) * d
        exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * d**2
        denom = np.sqrt(exp_avg_sq / (1 - betas[1] ** step)) + eps
        p = p - lr * (1 - mu) / (1 - mu_product) * d / denom
        p = p - lr * mu_next / (1 - mu_product * mu_next) * exp_avg / denom
    return p


def torch_radam(p, gs, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    exp_avg, exp_avg_sq = np.zeros_like(p), np.zeros_like(p)
    rho_inf = 2 / (1 - betas[1]) - 1
    for step, g in enumerate(gs, 1):
        d = g + weight_decay * p
        exp_avg = betas[0] * exp_avg + (1 - betas[0]) * d
        exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * d**2
        correction = 1 - betas[1] ** step
        rho = rho_inf - 2 * step * betas[1] ** step / correction
        scale = 1.0
        if rho > 5:
            rect = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            scale = rect * math.sqrt(correction) / (np.sqrt(exp_avg_sq) + eps)
        p = p - lr * exp_avg / (1 - betas[0] ** step) * scale
    return p


def torch_adamax(p, gs, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    exp_avg, exp_inf = np.zeros_like(p), np.zeros_like(p)
    for step, g in enumerate(gs, 1):
        d = g + weight_decay * p
        exp_avg = betas[0] * exp_avg + (1 - betas[0]) * d
        exp_inf = np.maximum(betas[1] * exp_inf, np.abs(d) + eps)
        p = p - lr / (1 - betas[0] ** step) * exp_avg / exp_inf
    return p


def torch_rprop(p, gs, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50)):
    prev, step_size = np.zeros_like(p), np.full_like(p, lr)
    for g in gs:
        sign = np.sign(g * prev)
        factor = np.where(sign > 0, etas[1], np.where(sign < 0, etas[0], 1.0))
        step_size = np.clip(step_size * factor, *step_sizes)
        prev = np.where(sign < 0, 0.0, g)
        p = p - np.sign(prev) * step_size
    return p


def torch_asgd(p, gs, lr=0.01, lambd=1e-4, alpha=0.75, t0=1e6):
    eta, mu, ax = lr, 1.0, np.zeros_like(p)
    for step, g in enumerate(gs, start=1):
        p = p * (1 - lambd * eta) - eta * g
        ax = ax + mu * (p - ax)
        eta = lr / (1 + lambd * lr * step) ** alpha
        mu = 1 / max(1, step - t0)
    return p


def keras_sgd(p, gs, learning_rate=0.01, momentum=0.0, nesterov=False, weight_decay=0.0):
    m = np.zeros_like(p)
    for g in gs:
        p = p - p * weight_decay * learning_rate
        m = m * momentum - g * learning_rate
        p = p + (m * momentum - g * learning_rate if nesterov else m)
    return p


def keras_adagrad(p, gs, learning_rate=0.001, initial_accumulator_value=0.1, epsilon=1e-7, weight_decay=0.0):
    accumulator = np.full_like(p, initial_accumulator_value)
    for g in gs:
        p = p - p * weight_decay * learning_rate
        accumulator = accumulator + g**2
        p = p - learning_rate * g / np.sqrt(accumulator + epsilon)
    return p


def keras_adadelta(p, gs, learning_rate=0.001, rho=0.95, epsilon=1e-7, weight_decay=0.0):
    accumulated_grad, accumulated_delta = np.zeros_like(p), np.zeros_like(p)
    for g in gs:
        p = p - p * weight_decay * learning_rate
        accumulated_grad = rho * accumulated_grad + (1 - rho) * g**2
        delta = -np.sqrt(accumulated_delta + epsilon) * g / np.sqrt(accumulated_grad + epsilon)
        accumulated_delta = rho * accumulated_delta + (1 - rho) * delta**2
        p = p + learning_rate * delta
    return p


def keras_rmsprop(p, gs, learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False, weight_decay=0.0):
    velocity, average, m = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for g in gs:
        p = p - p * weight_decay * learning_rate
        velocity = rho * velocity + (1 - rho) * g**2
        average = rho * average + (1 - rho) * g
        denominator = velocity - average**2 + epsilon if centered else velocity + epsilon
        increment = learning_rate * g / np.sqrt(denominator)
        m = momentum * m + increment
        p = p - (m if momentum > 0 else increment)
    return p


def keras_adam(p, gs, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7, amsgrad=False, weight_decay=0.0):
    m, v, v_hat = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for step, g in enumerate(gs, 1):
        p = p - p * weight_decay * learning_rate
        alpha = learning_rate * math.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        m = m + (g - m) * (1 - beta_1)
        v = v + (g**2 - v) * (1 - beta_2)
        v_hat = np.maximum(v_hat, v)
        p = p - m * alpha / (np.sqrt(v_hat if amsgrad else v) + epsilon)
    return p


def keras_adamw(p, gs, weight_decay=0.004, **options):
    return keras_adam(p, gs, weight_decay=weight_decay, **options)


def keras_nadam(p, gs, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7, weight_decay=0.0):
    m, v, u_product = np.zeros_like(p), np.zeros_like(p), 1.0
    for step, g in enumerate(gs, 1):
        p = p - p * weight_decay * learning_rate
        u = beta_1 * (1 - 0.5 * 0.96**step)
        u_next = beta_1 * (1 - 0.5 * 0.96 ** (step + 1))
        u_product *= u
        m = m + (g - m) * (1 - beta_1)
        v = v + (g**2 - v) * (1 - beta_2)
        m_hat = u_next * m / (1 - u_product * u_next) + (1 - u) * g / (1 - u_product)
        p = p - learning_rate * m_hat / (np.sqrt(v / (1 - beta_2**step)) + epsilon)
    return p


def keras_adamax(p, gs, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7, weight_decay=0.0):
    m, u = np.zeros_like(p), np.zeros_like(p)
    for step, g in enumerate(gs, 1):
        p = p - p * weight_decay * learning_rate
        m = m + (g - m) * (1 - beta_1)
        u = np.maximum(beta_2 * u, np.abs(g))
        p = p - learning_rate * m / ((1 - beta_1**step) * (u + epsilon))
    return p


def keras_lion(p, gs, learning_rate=0.001, beta_1=0.9, beta_2=0.99, weight_decay=0.0):
    m = np.zeros_like(p)
    for g in gs:
        p = p - p * weight_decay * learning_rate
        p = p - learning_rate * np.sign(m * beta_1 + g * (1 - beta_1))
        m = m * beta_2 + g * (1 - beta_2)
    return p


def optax_sgd(p, gs, learning_rate, momentum=None, nesterov=False):
    trace = np.zeros_like(p)
    for g in gs:
        update = g
        if momentum is not None:
            trace = g + momentum * trace
            update = g + momentum * trace if nesterov else trace
        p = p - learning_rate * update
    return p


def optax_adagrad(p, gs, learning_rate, initial_accumulator_value=0.1, eps=1e-7):
    sum_of_squares = np.full_like(p, initial_accumulator_value)
    for g in gs:
        sum_of_squares = sum_of_squares + g**2
        p = p - learning_rate * g / np.sqrt(sum_of_squares + eps)
    return p


def optax_adadelta(p, gs, learning_rate, rho=0.9, eps=1e-6, weight_decay=0.0):
    e_g, e_x = np.zeros_like(p), np.zeros_like(p)
    for g in gs:
        u = g + weight_decay * p
        e_g = rho * e_g + (1 - rho) * u**2
        u = np.sqrt(e_x + eps) / np.sqrt(e_g + eps) * u
        e_x = rho * e_x + (1 - rho) * u**2
        p = p - learning_rate * u
    return p


def optax_rmsprop(p, gs, learning_rate, decay=0.9, eps=1e-8, eps_in_sqrt=True, centered=False, momentum=None):
    mu, nu, trace = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for g in gs:
        mu = (1 - decay) * g + decay * mu
        nu = (1 - decay) * g**2 + decay * nu
        under = nu - mu**2 if centered else nu
        u = g / np.sqrt(under + eps) if eps_in_sqrt else g / (np.sqrt(under) + eps)
        u = -learning_rate * u
        if momentum is not None:
            u = trace = u + momentum * trace
        p = p + u
    return p


def optax_adam(p, gs, learning_rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, weight_decay=0.0):
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    for count, g in enumerate(gs, 1):
        mu = (1 - b1) * g + b1 * mu
        nu = (1 - b2) * g**2 + b2 * nu
        u = mu / (1 - b1**count) / (np.sqrt(nu / (1 - b2**count) + eps_root) + eps)
        p = p - learning_rate * (u + weight_decay * p)
    return p


def optax_adamw(p, gs, learning_rate, weight_decay=1e-4, **options):
    return optax_adam(p, gs, learning_rate, weight_decay=weight_decay, **options)


def optax_adamax(p, gs, learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    for count, g in enumerate(gs, 1):
        mu = (1 - b1) * g + b1 * mu
        nu = np.maximum(np.abs(g) + eps, b2 * nu)
        p = p - learning_rate * mu / (1 - b1**count) / nu
    return p


def optax_lion(p, gs, learning_rate, b1=0.9, b2=0.99, weight_decay=1e-3):
    mu = np.zeros_like(p)
    for g in gs:
        u = np.sign((1 - b1) * g + b1 * mu)
        mu = (1 - b2) * g + b2 * mu
        p = p - learning_rate * (u + weight_decay * p)
    return p


def optax_lamb(p, gs, learning_rate, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0):
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    for count, g in enumerate(gs, 1):
        mu = (1 - b1) * g + b1 * mu
        nu = (1 - b2) * g**2 + b2 * nu
        u = mu / (1 - b1**count) / (np.sqrt(nu / (1 - b2**count)) + eps) + weight_decay * p
        p = p - learning_rate * u * np.linalg.norm(p) / np.linalg.norm(u)
    return p


def optax_lars(p, gs, learning_rate, trust_coefficient=1e-3, eps=0.0, momentum=0.9, nesterov=False):
    trace = np.zeros_like(p)
    for g in gs:
        d = learning_rate * trust_coefficient * np.linalg.norm(p) / (np.linalg.norm(g) + eps) * g
        trace = d + momentum * trace
        p = p - (d + momentum * trace if nesterov else trace)
    return p


def optax_adabelief(p, gs, learning_rate, b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16):
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    for count, g in enumerate(gs, 1):
        mu = (1 - b1) * g + b1 * mu
        nu = (1 - b2) * (g - mu) ** 2 + b2 * nu + eps_root
        p = p - learning_rate * mu / (1 - b1**count) / (np.sqrt(nu / (1 - b2**count)) + eps)
    return p


def optax_radam(p, gs, learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    ro_inf = 2 / (1 - b2) - 1
    for count, g in enumerate(gs, 1):
        mu = (1 - b1) * g + b1 * mu
        nu = (1 - b2) * g**2 + b2 * nu
        ro = ro_inf - 2 * count * b2**count / (1 - b2**count)
        u = mu / (1 - b1**count)
        if ro >= 5:
            r = np.sqrt((ro - 4) * (ro - 2) * ro_inf / ((ro_inf - 4) * (ro_inf - 2) * ro))
            u = r * u / (np.sqrt(nu / (1 - b2**count)) + eps)
        p = p - learning_rate * u
    return p


def optax_novograd(p, gs, learning_rate, b1=0.9, b2=0.25, eps=1e-6, weight_decay=0.0):
    mu = nu = 0.0
    for count, g in enumerate(gs, 1):
        nu = np.linalg.norm(g) ** 2 if count == 1 else (1 - b2) * np.linalg.norm(g) ** 2 + b2 * nu
        mu = b1 * mu + g / (np.sqrt(nu) + eps) + weight_decay * p
        p = p - learning_rate * mu
    return p


def optax_yogi(p, gs, learning_rate, b1=0.9, b2=0.999, eps=1e-3):
    mu, nu = np.full_like(p, 1e-6), np.full_like(p, 1e-6)
    for count, g in enumerate(gs, 1):
        mu = (1 - b1) * g + b1 * mu
        nu = nu - (1 - b2) * np.sign(nu - g**2) * g**2
        p = p - learning_rate * mu / (1 - b1**count) / (np.sqrt(nu / (1 - b2**count)) + eps)
    return p


def optax_ademamix(p, gs, learning_rate, b1=0.9, b2=0.999, b3=0.9999, alpha=5.0, eps=1e-8, weight_decay=0.0):
    m1, m2, nu = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for count, g in enumerate(gs, 1):
        m1, m2, nu = (1 - b1) * g + b1 * m1, (1 - b3) * g + b3 * m2, (1 - b2) * g**2 + b2 * nu
        u = (m1 / (1 - b1**count) + alpha * m2) / (np.sqrt(nu / (1 - b2**count)) + eps)
        p = p - learning_rate * (u + weight_decay * p)
    return p


def optax_adan(p, gs, learning_rate, b1=0.98, b2=0.92, b3=0.99, eps=1e-8, eps_root=1e-8, weight_decay=0.0):
    m, v, n, before = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), gs[0]
    for t, g in enumerate(gs, 1):
        diff, before = g - before, g
        m, v = (1 - b1) * g + b1 * m, (1 - b2) * diff + b2 * v
        n = (1 - b3) * (g + (1 - b2) * diff) ** 2 + b3 * n
        u = m / (1 - b1**t) + (1 - b2) * v / (1 - b2**t)
        u = u / (np.sqrt(n / (1 - b3**t) + eps_root) + eps)
        p = p - learning_rate * (u + weight_decay * p)
    return p


def optax_schedule_free_adamw(
    p, gs, learning_rate=0.0025, warmup_steps=None, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0
):
    def schedule(count):
        return learning_rate * (min(count / warmup_steps, 1.0) if warmup_steps else 1.0)

    z, nu, total = p, np.zeros_like(p), 0.0
    for t, g in enumerate(gs, 1):
        weight = schedule(t) ** 2
        total += weight
        nu = (1 - b2) * g**2 + b2 * nu
        x = (p - (1 - b1) * z) / b1
        z = z - schedule(t - 1) * (g / (np.sqrt(nu / (1 - b2**t)) + eps) + weight_decay * p)
        x = (1 - weight / total) * x + weight / total * z
        p = b1 * x + (1 - b1) * z
    return p


def keras_schedulefreeadamw(p, gs, learning_rate=0.0025, beta_1=0.9, beta_2=0.999, epsilon=1e-8, warmup_steps=0):
    momentum, velocity = p, np.zeros_like(p)
    for step, g in enumerate(gs, 1):
        lr = learning_rate * (min(step / warmup_steps, 1.0) if warmup_steps else 1.0)
        velocity = velocity + (g**2 - velocity) * (1 - beta_2)
        x = (p - (1 - beta_1) * momentum) / beta_1
        momentum = momentum - lr * g / (np.sqrt(velocity / (1 - beta_2**step)) + epsilon)
        x = (1 - 1 / step) * x + 1 / step * momentum
        p = (1 - beta_1) * momentum + beta_1 * x
    return p


def keras_lamb(p, gs, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for step, g in enumerate(gs, 1):
        m, v = m + (g - m) * (1 - beta_1), v + (g**2 - v) * (1 - beta_2)
        update = m / (1 - beta_1**step) / (np.sqrt(v / (1 - beta_2**step)) + epsilon)
        p = p - np.linalg.norm(p) / np.linalg.norm(update) * learning_rate * update
    return p


class Golden(NamedTuple):
    """An optimizer in a framework's convention: the formulas, and the arguments in our words and in theirs."""

    optimizer: str
    convention: str
    formula: Callable[..., np.ndarray]
    here: dict[str, Any] = {}  # noqa: RUF012 - never written to
    there: dict[str, Any] = {}  # noqa: RUF012
    steps: int = 3

    def __str__(self) -> str:
        return "-".join([self.optimizer, self.convention, *(f"{name}={value}" for name, value in self.here.items())])

    @property
    def name(self) -> str:
        """Of the class or function there, in lower case."""
        return self.formula.__name__.partition("_")[2]

    @property
    def grads(self) -> np.ndarray:
        return np.resize(GRADS, (self.steps, START.size))


LR = ({"lr": 0.1}, {"learning_rate": 0.1})  # optax has no default for it
DECAY = {"weight_decay": 0.5}
GOLDEN = (
    Golden("SGD", "torch", torch_sgd),
    Golden("SGD", "torch", torch_sgd, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "dampening": 0.3}),
    Golden("SGD", "torch", torch_sgd, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    Golden("Momentum", "torch", torch_sgd, {}, {"momentum": 0.9}),
    Golden("Nesterov", "torch", torch_sgd, {}, {"momentum": 0.9, "nesterov": True}),
    Golden("Adagrad", "torch", torch_adagrad),
    Golden(
        "Adagrad",
        "torch",
        torch_adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    Golden("Adadelta", "torch", torch_adadelta),
    Golden("RMSprop", "torch", torch_rmsprop),
    Golden("RMSprop", "torch", torch_rmsprop, {"momentum": 0.9, "centered": True}, {"momentum": 0.9, "centered": True}),
    Golden("Adam", "torch", torch_adam),
    Golden("Adam", "torch", torch_adam, {"amsgrad": True}, {"amsgrad": True}),
    Golden("Adam", "torch", torch_adam, DECAY, DECAY),
    Golden("AdamW", "torch", torch_adamw),
    Golden("NAdam", "torch", torch_nadam),
    Golden("RAdam", "torch", torch_radam, steps=7),  # the last two are adaptive
    Golden("Adamax", "torch", torch_adamax),
    Golden("Rprop", "torch", torch_rprop),
    Golden("ASGD", "torch", torch_asgd),
    Golden("SGD", "keras", keras_sgd),
    Golden("SGD", "keras", keras_sgd, {"momentum": 0.9}, {"momentum": 0.9}),
    Golden("SGD", "keras", keras_sgd, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    Golden("Momentum", "keras", keras_sgd, {}, {"momentum": 0.9}),
    Golden("Momentum", "keras", keras_sgd, DECAY, {"momentum": 0.9, **DECAY}),
    Golden("Adagrad", "keras", keras_adagrad),
    Golden("Adadelta", "keras", keras_adadelta),
    Golden("RMSprop", "keras", keras_rmsprop),
    Golden("RMSprop", "keras", keras_rmsprop, {"momentum": 0.9, "centered": True}, {"momentum": 0.9, "centered": True}),
    Golden("Adam", "keras", keras_adam),
    Golden("Adam", "keras", keras_adam, {"amsgrad": True}, {"amsgrad": True}),
    Golden("Adam", "keras", keras_adam, DECAY, DECAY),
    Golden("AdamW", "keras", keras_adamw),
    Golden("NAdam", "keras", keras_nadam),
    Golden("Adamax", "keras", keras_adamax),
    Golden("Lion", "keras", keras_lion),
    Golden("SGD", "optax", optax_sgd, *LR),
    Golden("SGD", "optax", optax_sgd, {**LR[0], "momentum": 0.9}, {**LR[1], "momentum": 0.9}),
    Golden("Momentum", "optax", optax_sgd, LR[0], {**LR[1], "momentum": 0.9}),
    Golden("Nesterov", "optax", optax_sgd, LR[0], {**LR[1], "momentum": 0.9, "nesterov": True}),
    Golden("Adagrad", "optax", optax_adagrad, *LR),
    Golden("Adadelta", "optax", optax_adadelta, *LR),
    Golden("RMSprop", "optax", optax_rmsprop, *LR),
    Golden(
        "RMSprop",
        "optax",
        optax_rmsprop,
        {**LR[0], "momentum": 0.9, "centered": True},
        {**LR[1], "momentum": 0.9, "centered": True},
    ),
    Golden("RMSprop", "optax", optax_rmsprop, {**LR[0], "eps_inside": False}, {**LR[1], "eps_in_sqrt": False}),
    Golden("Adam", "optax", optax_adam, *LR),
    Golden(
        "Adam", "optax", optax_adam, {**LR[0], "eps": 1e-4, "eps_inside": True}, {**LR[1], "eps": 0, "eps_root": 1e-4}
    ),
    Golden("AdamW", "optax", optax_adamw, *LR),
    Golden("Adamax", "optax", optax_adamax, *LR),
    Golden("Lion", "optax", optax_lion, *LR),
    Golden("LAMB", "optax", optax_lamb, *LR),
    Golden("LAMB", "keras", keras_lamb),
    Golden("LARS", "optax", optax_lars, *LR),
    Golden(
        "LARS", "optax", optax_lars, {**LR[0], "nesterov": True, "eps": 0.1}, {**LR[1], "nesterov": True, "eps": 0.1}
    ),
    Golden("AdaBelief", "optax", optax_adabelief, *LR),
    Golden("RAdam", "optax", optax_radam, *LR, steps=7),  # the last two are adaptive
    Golden("RAdam", "optax", optax_radam, {**LR[0], "eps": 0.1}, {**LR[1], "eps": 0.1}, steps=9),
    Golden("NovoGrad", "optax", optax_novograd, *LR),
    Golden("NovoGrad", "optax", optax_novograd, {**LR[0], **DECAY}, {**LR[1], **DECAY}),
    Golden("Yogi", "optax", optax_yogi, *LR),
    Golden("AdEMAMix", "optax", optax_ademamix, *LR),
    Golden("AdEMAMix", "optax", optax_ademamix, {**LR[0], **DECAY}, {**LR[1], **DECAY}),
    Golden("Adan", "optax", optax_adan, *LR, steps=5),
    Golden("Adan", "optax", optax_adan, {**LR[0], **DECAY}, {**LR[1], **DECAY}, steps=5),
    Golden("ScheduleFreeAdamW", "optax", optax_schedule_free_adamw, steps=5),
    Golden(
        "ScheduleFreeAdamW",
        "optax",
        optax_schedule_free_adamw,
        {"warmup_steps": 4, "lr": 0.125, **DECAY},  # exact in float32, in which optax's schedules are
        {"warmup_steps": 4, "learning_rate": 0.125, **DECAY},
        steps=6,
    ),
    Golden("ScheduleFreeAdamW", "keras", keras_schedulefreeadamw, steps=5),
    Golden("ScheduleFreeAdamW", "keras", keras_schedulefreeadamw, *[{"warmup_steps": 3}] * 2, steps=5),
    Golden("SGD", "keras", keras_sgd, *[{"nesterov": True}] * 2),
)
START = np.array([0.5, -2.0, 1.0, 3.0, -0.25])
GRADS = np.array(
    [[0.3, -1.5, 2e-6, 40.0, 0.1], [-0.2, -1.0, 3e-6, -30.0, 0.4], [0.5, 2.0, -1e-6, 20.0, 0.3]]
)  # small gradients, which depend on the place of eps; constant and changing signs
every_golden = pytest.mark.parametrize("golden", GOLDEN, ids=str)


def test_every_convention_has_a_golden_vector():
    own = {name: kind for name, kind in fastopt.Optimizer.classes.items() if kind.__module__.startswith("fastopt.")}
    present = {(name, convention) for name, kind in own.items() for convention in kind.conventions}
    assert {(golden.optimizer, golden.convention) for golden in GOLDEN} == present


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_a_convention_computes_the_same_as_the_framework(golden):
    optimizer = getattr(fastopt, golden.optimizer)({"w": START}, convention=golden.convention, **golden.here)
    for g in golden.grads:
        optimizer.step({"w": g})
    expected = golden.formula(START, golden.grads, **golden.there)
    np.testing.assert_allclose(optimizer.params["w"], expected, rtol=1e-12)


STORED = json.loads((Path(__file__).parent / "golden.json").read_text())
"""What optax and Keras of these versions gave in float64: `real_optax` and `real_keras`, on one day."""


@pytest.mark.parametrize("golden", [golden for golden in GOLDEN if golden.convention != "torch"], ids=str)
def test_a_convention_computes_what_the_framework_has_computed(golden):
    expected = STORED["params"][str(golden)]
    np.testing.assert_allclose(golden.formula(START, golden.grads, **golden.there), expected, rtol=1e-12)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        optimizer = getattr(fastopt, golden.optimizer)(
            {"w": START.astype(dtype)}, convention=golden.convention, **golden.here
        )
        for g in golden.grads:
            optimizer.step({"w": g.astype(dtype)})
        np.testing.assert_allclose(optimizer.params["w"], expected, rtol=tolerance, atol=tolerance)


CLIPPED = [("SGD", {"w": START, "b": START[:2].copy()}, [{"w": g, "b": g[:2]} for g in GRADS], 1.5)]
CLIPPED += [("Adam", *CLIPPED[0][1:])]
"""Optimizers of `STORED`: parameters, gradients, and Keras' clipnorm; one gradient of b is not clipped."""


@pytest.mark.parametrize(("name", "params", "grads", "limit"), CLIPPED, ids=["SGD", "Adam"])
def test_clipping_per_tensor_is_the_clipnorm_of_keras(name, params, grads, limit):
    make = getattr(fastopt, name)
    opt = make(params, lr=0.1, convention="keras", clip_norm_per_tensor=limit)
    found = [opt.step(given).clip_coefficient for given in grads]
    assert found == pytest.approx([limit / np.linalg.norm(given["w"]) for given in grads], rel=1e-15)
    for path, expected in STORED["clipnorm"][name].items():
        np.testing.assert_allclose(opt.params[path], expected, rtol=1e-12, err_msg=path)


@pytest.mark.parametrize(("name", "params", "grads", "limit"), CLIPPED, ids=["SGD", "Adam"])
def test_the_stored_clipnorm_is_that_of_the_real_keras(name, params, grads, limit):
    keras = import_keras()
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        with double_precision(pytest.importorskip("jax")) if keras.backend.backend() == "jax" else nullcontext():
            optimizer = getattr(keras.optimizers, name)(learning_rate=0.1, clipnorm=limit)
            variables = {path: keras.Variable(p, dtype="float64") for path, p in params.items()}
            for given in grads:
                optimizer.apply([keras.ops.convert_to_tensor(given[path]) for path in params], [*variables.values()])
            for path, expected in STORED["clipnorm"][name].items():
                np.testing.assert_allclose(np.array(variables[path].numpy()), expected, rtol=1e-12)
    finally:
        keras.config.set_floatx(before)


def test_weight_decay_is_decoupled_in_all_of_keras():
    kinds = [kind for kind in fastopt.Optimizer.classes.values() if "keras" in kind.conventions]
    coupled = [kind.__name__ for kind in kinds if not kind({"w": START}, convention="keras").rule.decoupled]
    assert coupled == ["LAMB", "ScheduleFreeAdamW"]
    for name in coupled:
        with pytest.raises(ValueError, match=r"^weight_decay with convention='keras': must be 0, got 0\.1$"):
            getattr(fastopt, name)({"w": START}, convention="keras", weight_decay=0.1)
    with pytest.raises(ValueError, match=r"^weight_decay with convention='optax': must be 0, got 0\.1$"):
        fastopt.LARS({"w": START}, convention="optax", weight_decay=0.1)


@contextmanager
def double_precision(jax: Any) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def real_torch(golden: Golden) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="torch is not installed; the formulas are checked against it")
    kind = {kind.lower(): getattr(torch.optim, kind) for kind in dir(torch.optim)}[golden.name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # torch keeps NAdam's mu_product in this dtype
    try:
        param = torch.nn.Parameter(torch.from_numpy(START.copy()))
        optimizer = kind([param], **golden.there)
        for g in golden.grads:
            param.grad = torch.from_numpy(g.copy())
            optimizer.step()
        return param.detach().numpy()
    finally:
        torch.set_default_dtype(before)


def real_optax(golden: Golden) -> np.ndarray:
    optax = pytest.importorskip("optax", reason="optax is not installed; the formulas are checked against it")
    import jax

    with double_precision(jax):
        import optax.contrib

        transformation = getattr(optax, golden.name, None) or getattr(optax.contrib, golden.name)
        transformation = transformation(**golden.there)
        params = jax.numpy.asarray(START)
        state = transformation.init(params)
        for g in golden.grads:
            updates, state = transformation.update(jax.numpy.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params)


def real_keras(golden: Golden) -> np.ndarray:
    keras = import_keras()
    kind = {kind.lower(): getattr(keras.optimizers, kind) for kind in dir(keras.optimizers)}[golden.name]
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        with double_precision(pytest.importorskip("jax")) if keras.backend.backend() == "jax" else nullcontext():
            optimizer = kind(**golden.there)
            variable = keras.Variable(START, dtype="float64")
            for g in golden.grads:
                optimizer.apply([keras.ops.convert_to_tensor(g)], [variable])
            return np.array(variable.numpy())
    finally:
        keras.config.set_floatx(before)


def import_keras() -> Any:
    return pytest.importorskip("keras", reason="keras is not installed; the formulas are checked against it")


@every_golden
def test_the_formulas_equal_those_of_the_real_framework(golden):
    real = {"torch": real_torch, "optax": real_optax, "keras": real_keras}[golden.convention](golden)
    np.testing.assert_allclose(golden.formula(START, golden.grads, **golden.there), real, rtol=1e-12)


# --- shared helpers ---------------------------------------------------------------------------------------------------

ULP = 4
SQUARES = ("v", "v_max", "sum_sq", "square_avg")
TREE = {"w": np.zeros((3, 4)), "b": np.zeros(3), "c": np.zeros(2)}
ORDER = ("w", "b", "c")  # the order in a torch or Keras module; ours sorts the keys


def start(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        name: (rng.choice([-1.0, 1.0], a.shape) * rng.uniform(0.5, 2.0, a.shape)).astype(dtype)
        for name, a in TREE.items()
    }


def gradients(rng: np.random.Generator, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return gradients with the signs of the parameters: nothing cancels or amplifies rounding errors."""
    return {name: (np.sign(p) * 10.0 ** rng.uniform(-3.0, 0.0, p.shape)).astype(p.dtype) for name, p in params.items()}


def ulps(found: np.ndarray, expected: np.ndarray, magnitude: Any = 0.0) -> float:
    largest = np.maximum(np.abs(expected), magnitude).astype(np.float32)
    return float(np.max(np.abs(found.astype(np.float64) - expected) / np.spacing(largest), initial=0.0))


def bits(value: Any) -> Any:
    """Return the bits of all values of an optimizer or of a state in any format."""
    if isinstance(value, fastopt.Optimizer):
        return bits([value.state_dict(), value.flat.data, value.flat.grad, repr(value)])
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return (str(value.dtype), value.shape, value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


def filled(opt: fastopt.Optimizer, step: int = 5, missed: dict[str, int] | None = None) -> fastopt.Optimizer:
    """Return the optimizer with arbitrary states, as after `step` steps; this needs no kernel."""
    rng = np.random.default_rng(2)
    state = opt.state_dict()
    for arrays in state["state"].values():
        for path, array in arrays.items():
            if not missed or missed.get(path) != step:
                array[...] = rng.uniform(0.5, 2.0, array.shape)
    opt.load_state_dict({**state, "step": step, "missed": missed or {}})
    return opt


# --- torch ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """An optimizer here and the same one in torch."""

    optimizer: str
    here: dict[str, Any]
    torch: str
    there: dict[str, Any] | None = None  # only if they differ from `here`

    def __str__(self) -> str:
        return "-".join([self.optimizer, *(f"{name}={value}" for name, value in self.here.items())])

    def make(self, params: Any, **more: Any) -> fastopt.Optimizer:
        return getattr(fastopt, self.optimizer)(params, **{**self.here, **more})


RUNS = (
    Run("SGD", {"lr": 0.01}, "SGD"),
    Run("SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3}, "SGD"),
    Run("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}, "SGD"),
    Run("Momentum", {}, "SGD", {"lr": 0.01, "momentum": 0.9}),
    Run("Nesterov", {}, "SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    Run("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}, "Adagrad"),
    Run("Adadelta", {}, "Adadelta"),
    Run("RMSprop", {}, "RMSprop"),
    Run("RMSprop", {"lr": 1e-3, "centered": True, "momentum": 0.9}, "RMSprop"),
    Run("Adam", {"betas": (0.8, 0.99)}, "Adam"),
    Run("Adam", {"amsgrad": True}, "Adam"),
    Run("Adam", {"decoupled_weight_decay": True}, "Adam"),
    Run("AdamW", {}, "AdamW"),
    Run("AdamW", {"amsgrad": True}, "AdamW"),
    Run("NAdam", {"momentum_decay": 0.1}, "NAdam"),
    Run("RAdam", {"betas": (0.9, 0.9)}, "RAdam"),
    Run("Adamax", {}, "Adamax"),
)
every_run = pytest.mark.parametrize("run_", RUNS, ids=str)
GROUPS = {"weight_decay": 0.1}, {"weight_decay": 0.0, "lr": 0.005}  # of w and c, and of b
WITHOUT = (0, 3)  # the steps in which c has no gradient


def import_torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed; runs cannot continue there")


def torch_pair(run_: Run) -> tuple[Any, Any, dict[str, Any]]:
    """Return torch, its optimizer with two groups, and its parameters by name."""
    torch = import_torch()
    params = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in start().items()}
    common, of_b = GROUPS
    options = {**(run_.here if run_.there is None else run_.there)}
    groups = [{"params": [("w", params["w"]), ("c", params["c"])]}, {"params": [("b", params["b"])], **of_b}]
    return torch, getattr(torch.optim, run_.torch)(groups, **{**options, **common}), params


def torch_step(torch: Any, optimizer: Any, params: dict[str, Any], grads: dict[str, Any]) -> None:
    for name, param in params.items():
        param.grad = None if grads[name] is None else torch.from_numpy(grads[name].copy())
    optimizer.step()


def torch_tensors(torch: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Convert as in the docstring of `to_torch_state`."""
    state["state"] = {
        k: {name: torch.as_tensor(array) for name, array in arrays.items()} for k, arrays in state["state"].items()
    }
    return state


def assert_close(
    found: dict[str, Any], expected: dict[str, Any], before: dict[str, Any], name: str, factor: int
) -> None:
    for path, array in expected.items():
        bound = factor * ULP * (2 if name in SQUARES else 1)  # a square doubles the error of its root
        assert ulps(found[path], array, np.abs(before[path])) <= bound, f"{name} of {path}"


def torch_states(optimizer: Any, params: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    return {
        path: optimizer.state[param][name].numpy().copy()
        for path, param in params.items()
        if optimizer.state.get(param)
    }


OURS = {
    "momentum_buffer": ("velocity", "buf"),
    "sum": ("sum_sq",),
    "exp_avg": ("m",),
    "exp_avg_sq": ("v",),
    "max_exp_avg_sq": ("v_max",),
    "exp_inf": ("u",),
    "square_avg": ("square_avg",),
    "acc_delta": ("acc_delta",),
    "grad_avg": ("grad_avg",),
}


def assert_same_run(opt: Any, optimizer: Any, params: dict[str, Any], before: dict[str, Any], factor: int) -> None:
    expected = {path: param.detach().numpy() for path, param in params.items()}
    assert_close(opt.params, expected, before, "params", factor)
    for theirs, ours in OURS.items():
        for name in set(ours) & set(opt.rule.states):
            assert_close(
                opt.states[name],
                torch_states(optimizer, params, theirs),
                before | dict.fromkeys(before, 0.0),
                name,
                factor,
            )


@every_run
def test_a_torch_run_continues_here_as_if_uninterrupted(run_):
    torch, theirs, params = torch_pair(run_)
    mine = run_.make(start(), lr=0.5, weight_decay=0.3)  # all of these are replaced
    rng = np.random.default_rng(3)
    since = 0
    for step in range(9):
        if step < 7:  # the last steps run without torch
            from_torch_state(mine, theirs.state_dict(), step=step if run_.torch == "SGD" else None)
            since = 0
            for path, param in params.items():
                mine.params[path][...] = param.detach().numpy()
        before = {path: param.detach().numpy().copy() for path, param in params.items()}
        grads: dict[str, Any] = gradients(rng, before)
        if step in WITHOUT:
            grads["c"] = None
        mine.step(grads)
        torch_step(torch, theirs, params, grads)
        since += 1
        assert mine.step_count == step + 1
        assert_same_run(mine, theirs, params, before, since)


@every_run
def test_a_run_from_here_continues_in_torch_as_if_uninterrupted(run_):
    torch, theirs, params = torch_pair(run_)
    common, of_b = GROUPS
    mine = run_.make(start(), **common, overrides={"b": of_b})
    rng = np.random.default_rng(4)
    since = 0
    for group in theirs.param_groups:
        group["lr"] = 0.7
    for step in range(9):
        if step < 7:
            theirs.load_state_dict(torch_tensors(torch, to_torch_state(mine, ["w", "c", "b"])))
            since = 0
            with torch.no_grad():
                for path, param in params.items():
                    param.copy_(torch.from_numpy(mine.params[path].copy()))
        before = {path: array.copy() for path, array in mine.params.items()}
        grads: dict[str, Any] = gradients(rng, before)
        if step in WITHOUT:
            grads["c"] = None
        mine.step(grads)
        torch_step(torch, theirs, params, grads)
        since += 1
        assert_same_run(mine, theirs, params, before, since)


@pytest.mark.parametrize("with_gradient", [(), ("w", "b"), ("c",)], ids=str)
def test_a_parameter_without_an_entry_begins_as_it_does_in_torch(with_gradient):
    """Sums of squares at the initial value, not at 0: of a parameter that had no gradient yet torch keeps no entry."""
    initial = {"lr": 0.1, "initial_accumulator_value": 0.5}
    mine = filled(fastopt.Adagrad(start(), **initial), 4)
    grads: dict[str, Any] = {path: np.full(array.shape, 2.0, np.float32) for path, array in start().items()}
    source = fastopt.Adagrad(start(), **initial)
    source.step({path: array if path in with_gradient else None for path, array in grads.items()})
    state = to_torch_state(source, ["w", "c", "b"])
    for number, path in enumerate(["w", "c", "b"]):
        if path not in with_gradient:
            state["state"].pop(number, None)
    from_torch_state(mine, state, ["w", "c", "b"])
    for path, array in mine.states["sum_sq"].items():
        np.testing.assert_array_equal(array, 4.5 if path in with_gradient else 0.5, err_msg=path)


@every_run
def test_the_format_has_torchs_keys_and_types(run_):
    torch, theirs, params = torch_pair(run_)
    common, of_b = GROUPS
    mine = run_.make(start(), **common, overrides={"b": of_b})
    for k in range(2):
        grads: dict[str, Any] = {path: np.full(array.shape, 0.5, np.float32) for path, array in start().items()}
        grads["c"] = None if k == 0 else grads["c"]
        mine.step(grads)
        torch_step(torch, theirs, params, grads)
    expected, found = theirs.state_dict(), to_torch_state(mine, ["w", "c", "b"])
    assert found["param_groups"] == expected["param_groups"]
    assert {k: list(state) for k, state in found["state"].items()} == {
        k: sorted(state, key=list(found["state"][k]).index) for k, state in expected["state"].items()
    }
    for k, state in expected["state"].items():
        for name, tensor in state.items():
            array = found["state"][k][name]
            assert (array.dtype, array.shape) == (tensor.numpy().dtype, tuple(tensor.shape))
            np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-5)


@every_run
def test_a_state_of_torchs_format_restores_every_bit(run_):
    common, of_b = GROUPS
    arguments = {**common, "overrides": {"b": of_b}}
    mine = filled(run_.make(start(), **arguments), 5, {"c": 2})
    twin = run_.make(start(), **arguments)
    if run_.torch == "SGD":  # torch's SGD has no counts
        twin.load_state_dict({**twin.state_dict(), "step": 5, "missed": {"c": 2}})
    state = to_torch_state(mine)
    before = bits(state)
    from_torch_state(twin, state)
    assert bits(twin.state_dict()) == bits(mine.state_dict())
    assert bits(state) == before
    assert bits(to_torch_state(twin)) == before
    for arrays in state["state"].values():  # copies both ways
        for array in arrays.values():
            array[...] = -1.0
    assert bits(twin.state_dict()) == bits(mine.state_dict())


@pytest.mark.parametrize("run_", RUNS[1:], ids=str)
def test_a_parameter_that_never_had_a_gradient_has_no_state(run_):
    mine = filled(run_.make(start(), **GROUPS[0]), 3, {"c": 3})
    if "sum_sq" in mine.states:
        mine.states["sum_sq"]["c"][...] = 0.5  # its initial value
    state = to_torch_state(mine, names=ORDER)
    if run_.torch == "Adagrad":
        assert state["state"][2]["step"] == 0.0
    else:
        assert 2 not in state["state"]
    twin = filled(run_.make(start(), **GROUPS[0]), 7)
    from_torch_state(twin, state, names=ORDER, step=3)
    assert bits(twin.state_dict()) == bits(mine.state_dict())


def adam(**more: Any) -> fastopt.Optimizer:
    return fastopt.Adam(start(), **{"weight_decay": 0.1, **more})


def test_torchs_own_names_are_used_unless_names_are_given():
    mine = filled(adam())
    state = to_torch_state(mine, names=["c", "w", "b"])
    assert state["param_groups"][0]["param_names"] == ["c", "w", "b"]
    twin = adam()
    from_torch_state(twin, state)
    assert bits(twin.state_dict()) == bits(mine.state_dict())
    state["param_groups"][0]["param_names"] = ["0.bias", "0.weight", "1.bias"]
    with pytest.raises(ValueError, match=r"must be paths of parameters, b, c, w, got '0\.bias'"):
        from_torch_state(twin, state)
    from_torch_state(twin, state, names=["c", "w", "b"])
    assert bits(twin.state_dict()) == bits(mine.state_dict())
    del state["param_groups"][0]["param_names"]
    with pytest.raises(
        ValueError, match=r"\(parameter 'b'\)\['exp_avg'\]: must have the parameter's shape, \(3,\), got \(2,\)"
    ):
        from_torch_state(twin, state)  # in the order of the sorted keys
    from_torch_state(twin, to_torch_state(mine))
    assert bits(twin.state_dict()) == bits(mine.state_dict())


def test_hyperparameters_of_groups_become_overrides_and_a_schedule_stays():
    schedule = fastopt.schedules.exponential(0.1, 0.5)
    source = filled(adam(lr=0.25, overrides={"b": {"weight_decay": 0.0}, "c": {"lr": 0.125, "betas": (0.5, 0.75)}}))
    state = to_torch_state(source, names=ORDER)
    assert [group["param_names"] for group in state["param_groups"]] == [["w"], ["b"], ["c"]]
    assert [group["lr"] for group in state["param_groups"]] == [0.25, 0.25, 0.125]
    twin = adam(lr=0.5, weight_decay=0.0, overrides={"w": {"lr": 1.0}})
    from_torch_state(twin, state)
    assert bits(twin.state_dict()) == bits(source.state_dict())

    scheduled = adam(lr=schedule, overrides={"b": {"lr": 1.0}, "w": {"weight_decay": schedule}})
    from_torch_state(scheduled, state)
    hyper = {path: scheduled._pipeline.groups.values_of(k) for k, path in enumerate(scheduled.flat.paths)}
    assert hyper["w"]["lr"] is hyper["c"]["lr"] is hyper["w"]["weight_decay"] is schedule
    assert (hyper["b"]["lr"], hyper["b"]["weight_decay"], hyper["c"]["weight_decay"]) == (0.25, 0.0, 0.1)
    assert hyper["c"]["betas"] == (0.5, 0.75)
    assert scheduled.lr == schedule(5)
    assert to_torch_state(scheduled, ORDER)["param_groups"][0]["lr"] == schedule(5)


def test_extra_keys_and_keys_missing_in_older_versions_are_accepted():
    mine = filled(adam())
    state = to_torch_state(mine)
    group = state["param_groups"][0]
    group |= {"initial_lr": 1.0, "name": "backbone", "foreach": True, "fused": True, "capturable": True}
    for key in ("decoupled_weight_decay", "maximize", "differentiable"):
        del group[key]
    group["lr"], group["betas"] = np.array(1e-3), [0.9, np.float64(0.999)]
    for arrays in state["state"].values():
        arrays["step"] = 5
    twin = adam()
    from_torch_state(twin, state)
    assert bits(twin.state_dict()) == bits(mine.state_dict())


def test_sgd_keeps_its_own_count_because_torch_has_none():
    made = fastopt.SGD(start(), lr=0.01, momentum=0.9, dampening=0.5, weight_decay=0.1)
    state = to_torch_state(filled(made, 5))
    state["state"][1]["momentum_buffer"] = None  # as older torches write it: the first step of c is still to come
    fresh = fastopt.SGD(start(), lr=0.01, momentum=0.9, weight_decay=0.1)
    from_torch_state(fresh, state)
    assert fresh.step_count == 1
    assert fresh.state_dict()["missed"] == {"c": 1}
    from_torch_state(fresh, state, step=8)
    assert fresh.step_count == 8
    assert fresh.state_dict()["missed"] == {"c": 8}
    from_torch_state(fresh, state)
    assert fresh.step_count == 8
    with pytest.raises(ValueError, match="step: must be at least 1, because state_dict has velocities, got 0"):
        from_torch_state(fresh, state, step=0)


def test_a_group_without_momentum_is_accepted():
    mine = fastopt.SGD(start(), lr=0.01, momentum=0.9, weight_decay=0.1)
    state = to_torch_state(filled(mine))
    names = state["param_groups"][0]["param_names"]
    rest = {**state["param_groups"][0], "momentum": 0, "dampening": 0.5, "params": [2], "param_names": names[2:]}
    state["param_groups"] = [{**state["param_groups"][0], "params": [0, 1], "param_names": names[:2]}, rest]
    del state["state"][2]
    from_torch_state(mine, state)
    assert mine.state_dict()["overrides"] == {"w": {"momentum": 0.0}}


# --- the order of parameters ------------------------------------------------------------------------------------------

ONE_SHAPE = {"w": np.zeros((3, 4)), "bn": {"gamma": np.ones(3), "beta": np.zeros(3)}}


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    for group in state["param_groups"]:
        del group["param_names"]
    return state


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_position_among_sorted_keys_does_not_choose_between_parameters_of_one_shape(framework):
    opt, other = (fastopt.Adam(ONE_SHAPE, convention=framework) for _ in range(2))
    filled(opt)
    order = ["bn.gamma", "bn.beta", "w"]
    message = (
        r"names: must be the paths in the order of \w+, because 'bn\.beta' and 'bn\.gamma' have one shape, \(3,\),"
    )
    before = bits(other)
    if framework == "torch":
        state: Any = without_names(to_torch_state(opt, names=order))
        with pytest.raises(ValueError, match=message):
            from_torch_state(other, state)
        assert bits(other) == before
        from_torch_state(other, state, names=order)
    else:
        variables = list(to_keras_state(opt, names=order).values())
        with pytest.raises(ValueError, match=message):
            from_keras_state(other, variables)
        assert bits(other) == before
        from_keras_state(other, variables, names=order)
    assert bits(other.state_dict()["state"]) == bits(opt.state_dict()["state"])


def test_each_parameter_is_told_from_the_one_before_it():
    params = [np.zeros(3), {"gamma": np.ones(3), "beta": np.zeros(3)}]
    state = without_names(to_torch_state(fastopt.Adam(params)))
    with pytest.raises(ValueError, match=r"because '1\.beta' and '1\.gamma' have one shape"):
        from_torch_state(fastopt.Adam(params), state)


@pytest.mark.parametrize(
    "params",
    [
        [np.zeros(3), np.ones(3)],
        [{"w": np.zeros((3, 3)), "b": np.zeros(3)}, {"w": np.zeros((3, 3)), "b": np.zeros(3)}],
        OrderedDict(weight=np.zeros(3), bias=np.ones(3)),
        {"w": np.zeros((3, 2)), "b": np.ones(3)},
    ],
    ids=["list", "list of dicts", "ordered", "shapes"],
)
def test_a_position_serves_where_the_order_is_given_or_the_shapes_differ(params):
    opt, other = filled(fastopt.Adam(params)), fastopt.Adam(params)
    from_torch_state(other, without_names(to_torch_state(opt)))
    assert bits(other.state_dict()["state"]) == bits(opt.state_dict()["state"])


def test_positions_are_free_where_there_is_nothing_to_confuse():
    plain = fastopt.SGD(ONE_SHAPE, lr=0.5)
    from_torch_state(fastopt.SGD(ONE_SHAPE), without_names(to_torch_state(plain)))
    plain.groups["bn.beta"].lr = 0.25
    with pytest.raises(ValueError, match="names: must be the paths in the order of torch"):
        from_torch_state(fastopt.SGD(ONE_SHAPE), without_names(to_torch_state(plain)))


# --- optax ------------------------------------------------------------------------------------------------------------

L2 = {"weight_decay": 0.1}
OPTAX = (  # here, and there
    ("SGD", {"lr": 0.01}, "sgd", {"learning_rate": 0.01}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}, "sgd", {"learning_rate": 0.01, "momentum": 0.9}),
    (
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "nesterov": True},
        "sgd",
        {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True},
    ),
    ("Momentum", {}, "sgd", {"learning_rate": 0.01, "momentum": 0.9}),
    ("Nesterov", {}, "sgd", {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True}),
    ("Adagrad", {}, "adagrad", {"learning_rate": 0.01}),
    ("RMSprop", {}, "rmsprop", {"learning_rate": 0.01}),
    (
        "RMSprop",
        {"lr": 1e-3, "centered": True, "momentum": 0.9},
        "rmsprop",
        {"learning_rate": 1e-3, "centered": True, "momentum": 0.9},
    ),
    ("Adam", {}, "adam", {"learning_rate": 1e-3}),
    ("AdamW", {"weight_decay": 0.1}, "adamw", {"learning_rate": 1e-3, "weight_decay": 0.1}),
)
every_optax = pytest.mark.parametrize(("optimizer", "here", "name", "there"), OPTAX)


def optax_here(optimizer: str, here: dict[str, Any], **more: Any) -> fastopt.Optimizer:
    """Use the form with the same kernels as the torch runs above: with L2, which in optax is a chain."""
    return getattr(fastopt, optimizer)(start(), convention="optax", **{**L2, **here, **more})


@every_optax
def test_a_state_of_optaxs_format_restores_every_bit(optimizer, here, name, there):
    mine, twin = filled(optax_here(optimizer, here), 5), optax_here(optimizer, here)
    state = to_optax_state(mine)
    before = bits(state)
    from_optax_state(twin, state, step=5)
    assert bits(twin.state_dict()) == bits(mine.state_dict())
    assert bits(state) == bits(to_optax_state(twin)) == before
    twin.load_state_dict({**twin.state_dict(), "step": 0})
    if name not in ("adam", "adamw"):
        from_optax_state(twin, state)
        assert twin.step_count == 0  # optax has no count


@pytest.mark.parametrize("scheduled", [False, True])
@every_optax
def test_a_run_continues_in_optax_and_back_as_if_uninterrupted(optimizer, here, name, there, scheduled):
    optax = pytest.importorskip("optax", reason="optax is not installed; runs cannot continue there")
    import jax

    rate = there["learning_rate"]
    if scheduled:
        here = {**here, "lr": lambda step: rate * (1.0 + 0.1 * step)}
        there = {**there, "learning_rate": lambda count: rate * (1.0 + 0.1 * count)}
    mine = optax_here(optimizer, here)
    tx = getattr(optax, name)(**there)
    if name != "adamw":
        tx = optax.chain(optax.add_decayed_weights(0.1), tx)
    params = jax.tree.map(jax.numpy.asarray, start())
    state = tx.init(params)
    rng = np.random.default_rng(6)
    for step in range(8):
        if step < 3:
            from_optax_state(mine, state, step=None if scheduled else step if name not in ("adam", "adamw") else None)
            for path in mine.flat.paths:
                mine.params[path][...] = np.asarray(params[path])
        elif step < 6:
            exported = to_optax_state(mine)
            found = jax.tree.leaves(exported)
            assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
            state = jax.tree.unflatten(jax.tree.structure(state), found)
            params = jax.tree.map(lambda array: jax.numpy.array(array), mine.params)
        grads = gradients(rng, mine.params)
        updates, state = tx.update(jax.tree.map(jax.numpy.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
        mine.step(grads)
        assert mine.step_count == step + 1
        for path in mine.flat.paths:
            np.testing.assert_allclose(mine.params[path], np.asarray(params[path]), rtol=2e-6, err_msg=path)
    found = jax.tree.leaves(to_optax_state(mine))
    for array, expected in zip(found, jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(array, np.asarray(expected), rtol=1e-5)


Moments = namedtuple("Moments", "count mu nu")
Empty = namedtuple("Empty", "")


def test_optax_states_are_identified_by_fields_and_trees_by_paths():
    tree = {"bn": [np.zeros(2), {"beta": np.zeros(1)}], "w": np.zeros(3)}
    m = OrderedDict(w=np.full(3, 1.0), bn=(np.full(2, 2.0), SimpleNamespace(beta=np.full(1, 3.0))))
    v = {"w": np.full(3, 4.0), "bn": [np.full(2, 5.0), {"beta": np.full(1, 6.0)}]}
    count = np.array(7, np.int32)
    for state in (
        (Moments(count, m, v), Empty()),
        (Empty(), (Moments(count, m, v), Empty(), SimpleNamespace(count=count))),
        SimpleNamespace(
            count=3, hyperparams={"learning_rate": np.array(0.1)}, inner_state=[{"count": 7, "mu": m, "nu": v}]
        ),
    ):
        opt = fastopt.Adam(tree)
        from_optax_state(opt, state)
        assert opt.step_count == 7
        assert [float(opt.states["m"]["bn"][1]["beta"][0]), float(opt.states["v"]["w"][0])] == [3.0, 4.0]


def test_optax_counts_of_a_schedule_are_used():
    opt = fastopt.SGD(start(), lr=lambda step: 0.01, momentum=0.9, weight_decay=0.1)
    state = to_optax_state(filled(opt, 5))
    assert bits(state[1][1]) == bits({"count": np.array(5, np.int32)})
    twin = fastopt.SGD(start(), lr=0.1, momentum=0.9, weight_decay=0.1)
    from_optax_state(twin, state)
    assert twin.step_count == 5
    masked = fastopt.AdamW(start(), weight_decay=0.1, overrides={"b": {"weight_decay": 0.0}})
    assert len(to_optax_state(masked)) == 3


# --- Keras ------------------------------------------------------------------------------------------------------------

KERAS = (
    ("SGD", {}, "SGD", {}, []),
    ("SGD", {"momentum": 0.9}, "SGD", {"momentum": 0.9}, ["momentum"]),
    ("SGD", {"momentum": 0.9, "nesterov": True}, "SGD", {"momentum": 0.9, "nesterov": True}, ["momentum"]),
    ("Momentum", {}, "SGD", {"momentum": 0.9}, ["momentum"]),
    ("RMSprop", {}, "RMSprop", {}, ["velocity"]),
    (
        "RMSprop",
        {"centered": True, "momentum": 0.9},
        "RMSprop",
        {"centered": True, "momentum": 0.9},
        ["velocity", "momentum", "average_gradient"],
    ),
    ("Adam", {}, "Adam", {}, ["momentum", "velocity"]),
    ("Adam", {"amsgrad": True}, "Adam", {"amsgrad": True}, ["momentum", "velocity", "velocity_hat"]),
    ("AdamW", {}, "AdamW", {}, ["momentum", "velocity"]),
)
every_keras = pytest.mark.parametrize(("optimizer", "here", "name", "there", "kinds"), KERAS)


def keras_here(optimizer: str, here: dict[str, Any], **more: Any) -> fastopt.Optimizer:
    """Use float64: the golden vectors have compiled its kernels."""
    return getattr(fastopt, optimizer)(start(np.float64), convention="keras", **{**here, **more})


@every_keras
def test_a_state_of_keras_format_restores_every_bit(optimizer, here, name, there, kinds):
    mine = filled(keras_here(optimizer, here, lr=0.125), 5)
    state = to_keras_state(mine, names=ORDER)
    before = bits(state)
    for form in (state, {key.rsplit("/")[-1]: array for key, array in reversed(state.items())}):
        twin = keras_here(optimizer, here, lr=0.5)
        from_keras_state(twin, form)
        assert bits(twin.state_dict()) == bits(mine.state_dict())
    twin = keras_here(optimizer, here)
    from_keras_state(twin, list(state.values()), names=ORDER)
    assert bits(twin.state_dict()) == bits(mine.state_dict())
    renamed = {key.replace("w_", "dense_kernel_").replace("b_", "dense_bias_"): array for key, array in state.items()}
    from_keras_state(twin, renamed, names=ORDER)
    assert bits(twin.state_dict()) == bits(mine.state_dict())
    assert bits(state) == bits(to_keras_state(twin, names=ORDER)) == before


@every_keras
def test_the_names_and_their_order_equal_those_of_keras(optimizer, here, name, there, kinds):
    found = list(to_keras_state(keras_here(optimizer, here), names=ORDER))
    blocks = [kinds[:2], kinds[2:]] if name in ("Adam", "AdamW") else [[kind] for kind in kinds]
    stem = {"RMSprop": "rm_sprop", "AdamW": "adam_w"}.get(name, name.lower())
    states = [f"{stem}/{path}_{kind}" for block in blocks for path in ORDER for kind in block]
    assert found == [f"{stem}/iteration", f"{stem}/learning_rate", *states]
    keras = pytest.importorskip("keras", reason="keras is not installed; the names cannot be compared")
    real = getattr(keras.optimizers, name)(**there)
    real.build([keras.Variable(start()[path], name=path) for path in ORDER])
    assert [key.split("/")[-1] for key in found] == [variable.name for variable in real.variables]
    assert [key.split("/")[0] for key in found] == [
        variable.path.split("/")[0].rstrip("_0123456789") for variable in real.variables
    ]


@every_keras
def test_a_run_continues_in_keras_and_back_as_if_uninterrupted(optimizer, here, name, there, kinds):
    keras = import_keras()
    mine = getattr(fastopt, optimizer)(start(), convention="keras", **here)
    real = getattr(keras.optimizers, name)(learning_rate=0.01, **there)
    variables = {path: keras.Variable(start()[path], name=path) for path in ORDER}
    real.build(list(variables.values()))
    rng = np.random.default_rng(7)
    for step in range(8):
        if step < 3:
            found = (
                {v.path: np.array(v.numpy()) for v in real.variables}
                if step % 2
                else [np.array(v.numpy()) for v in real.variables]
            )
            from_keras_state(mine, found, names=ORDER)
            for path, variable in variables.items():
                mine.params[path][...] = np.array(variable.numpy())
        elif step < 6:
            for variable, array in zip(real.variables, to_keras_state(mine, ORDER).values(), strict=True):
                variable.assign(array)
            for path, variable in variables.items():
                variable.assign(mine.params[path].copy())
        grads = gradients(rng, mine.params)
        mine.step(grads)
        real.apply([keras.ops.convert_to_tensor(grads[path]) for path in ORDER])
        assert mine.lr == pytest.approx(0.01)
        assert mine.step_count == int(real.iterations) == step + 1
        for path, variable in variables.items():
            np.testing.assert_allclose(mine.params[path], np.array(variable.numpy()), rtol=5e-6, err_msg=path)


def test_a_schedule_stays_and_rounding_of_keras_rate_is_ignored():
    scheduled = keras_here("Adam", {}, lr=lambda step: 0.5)
    state = to_keras_state(filled(scheduled))
    assert "adam/learning_rate" not in state
    from_keras_state(scheduled, {**state, "adam/learning_rate": np.array(0.25)})
    assert scheduled.lr == 0.5
    mine = keras_here("Adam", {}, lr=0.1)
    from_keras_state(mine, {**state, "adam/learning_rate": np.array(0.1, np.float32)})
    assert mine.lr == 0.1
    from_keras_state(mine, {**state, "adam/learning_rate": np.array(0.25, np.float32)})
    assert mine.lr == 0.25
    from_keras_state(mine, [array for key, array in state.items()])
    assert mine.lr == 0.25


# --- refusals ---------------------------------------------------------------------------------------------------------


def edited(state: Any, *steps: Any) -> Any:
    """A deep copy of `state` in which the last of `steps` stands at the place that the others lead to; ... deletes."""
    *way, last, value = steps
    state = copy.deepcopy(state)
    place = state
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return state


def momentum(**more: Any) -> fastopt.Optimizer:
    return fastopt.SGD(start(), lr=0.01, **{"momentum": 0.9, "weight_decay": 0.1, **more})


def nadam() -> fastopt.Optimizer:
    return fastopt.NAdam(start(), weight_decay=0.1)


def radam() -> fastopt.Optimizer:
    return fastopt.RAdam(start(), weight_decay=0.1)


def rmsprop_of_torch(**more: Any) -> fastopt.Optimizer:
    return fastopt.RMSprop(start(), weight_decay=0.1, **more)


def torch_state(opt: fastopt.Optimizer | None = None, **arguments: Any) -> dict[str, Any]:
    return to_torch_state(filled(opt or adam()), **arguments)


GROUP, STATE = ("param_groups", 0), ("state", 0)
NAN = float("nan")
BAD_TORCH: tuple[tuple[Callable[[], fastopt.Optimizer], Callable[[], Any], dict[str, Any], type, str], ...] = (
    (adam, lambda: 3, {}, TypeError, "state_dict: must be a dict of 'state' and 'param_groups', got int"),
    (adam, lambda: {"state": {}}, {}, ValueError, "state_dict: must have 'state' and 'param_groups', got 'state'"),
    (adam, lambda: edited(torch_state(), "param_groups", []), {}, TypeError, "must be a list of at least one group"),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, 5),
        {},
        TypeError,
        r"\['param_groups'\]\[0\]: must be a dict, got int",
    ),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "params", ...),
        {},
        ValueError,
        "must be a list of indices, got None",
    ),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "params", [0, 2]),
        {},
        ValueError,
        r"must have the indices 0, 1, .*\[0, 2\]",
    ),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "params", [0, 1]),
        {},
        ValueError,
        "must hold 3 parameters, b, c, w, got 2",
    ),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "params", [0, 1, 2, 3]),
        {},
        ValueError,
        "must hold 3 parameters, b, c, w, got 4",
    ),
    (adam, lambda: edited(torch_state(), *GROUP, "param_names", ["b"]), {}, ValueError, "must have a name for each"),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "lr", NAN),
        {},
        ValueError,
        r"\[0\]: lr: must be a number in.*, got nan",
    ),
    (adam, lambda: edited(torch_state(), *GROUP, "lr", None), {}, TypeError, "lr: must be a number.*, got None"),
    (adam, lambda: edited(torch_state(), *GROUP, "lr", np.ones(2)), {}, ValueError, r"\['lr'\]: must be one number"),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "lr", ...),
        {},
        ValueError,
        "must be of torch.optim.Adam, .*got a group that lacks lr",
    ),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "betas", (0.9, 1.0)),
        {},
        ValueError,
        r"betas\[1\]: must be .*, got 1.0",
    ),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "amsgrad", True),
        {},
        ValueError,
        r"\['amsgrad'\]: must be False, as in this optimizer, got True",
    ),
    (
        adam,
        lambda: edited(torch_state(), *GROUP, "maximize", True),
        {},
        ValueError,
        "construct the optimizer with maximize=True",
    ),
    (
        adam,
        lambda: torch_state(fastopt.AdamW(start())),
        {},
        ValueError,
        "construct the optimizer with decoupled_weight_decay=True",
    ),
    (
        lambda: adam(amsgrad=True),
        torch_state,
        {},
        ValueError,
        r"\['amsgrad'\]: must be True, as in this optimizer, got False",
    ),
    (
        lambda: adam(maximize=True),
        torch_state,
        {},
        ValueError,
        r"\['maximize'\]: must be True, as in this optimizer, got False",
    ),
    (
        adam,
        lambda: torch_state(momentum()),
        {},
        ValueError,
        "group that has dampening, momentum, nesterov and lacks amsgrad, betas, eps; it may be of torch.optim.SGD",
    ),
    (
        adam,
        lambda: torch_state(radam()),
        {},
        ValueError,
        "got a group that lacks amsgrad; it may be of torch.optim.RAdam",
    ),
    (
        adam,
        lambda: torch_state(nadam()),
        {},
        ValueError,
        "got a group that has momentum_decay and lacks amsgrad; it may be of torch.optim.NAdam",
    ),
    (
        adam,
        lambda: edited(torch_state(), *STATE, "step", -1),
        {},
        ValueError,
        r"\[0\] \(parameter 'b'\)\['step'\]: must be a whole number from 0, got -1",
    ),
    (adam, lambda: edited(torch_state(), *STATE, "step", 1.5), {}, ValueError, "whole number from 0, got 1.5"),
    (adam, lambda: edited(torch_state(), *STATE, "step", NAN), {}, ValueError, "whole number from 0, got nan"),
    (adam, lambda: edited(torch_state(), *STATE, "step", "5"), {}, TypeError, "whole number from 0, got '5'"),
    (adam, lambda: edited(torch_state(), *STATE, "step", ...), {}, ValueError, "parameter 'b'.*: must have 'step'"),
    (
        adam,
        lambda: edited(torch_state(), *STATE, "exp_avg", ...),
        {},
        ValueError,
        "parameter 'b'.*: must have 'exp_avg'",
    ),
    (
        adam,
        lambda: edited(torch_state(), *STATE, "exp_avg", np.zeros(4, np.float32)),
        {},
        ValueError,
        r"\['exp_avg'\]: must have the parameter's shape, \(3,\), got \(4,\)",
    ),
    (
        adam,
        lambda: edited(torch_state(), *STATE, "exp_avg", np.zeros(3)),
        {},
        TypeError,
        "must have the parameter's dtype, float32, got float64; convert it",
    ),
    (
        adam,
        lambda: edited(torch_state(), *STATE, "exp_inf", np.zeros(3, np.float32)),
        {},
        ValueError,
        "must hold the states of this optimizer .*, got 'exp_inf'",
    ),
    (
        adam,
        lambda: edited(torch_state(), *STATE, []),
        {},
        TypeError,
        "parameter 'b'.*must be a dict by name, got list",
    ),
    (adam, lambda: edited(torch_state(), "state", []), {}, TypeError, "must be a dict by index, got list"),
    (
        adam,
        lambda: edited(torch_state(), "state", 3, {}),
        {},
        ValueError,
        r"\['state'\]\[3\]: must have an index of a parameter, 0 to 2, got 3",
    ),
    (
        adam,
        lambda: edited(torch_state(), *STATE, "exp_avg", Unreadable()),
        {},
        TypeError,
        r"must be readable as a NumPy array, got an error \(on a GPU\); move it to the CPU",
    ),
    (adam, torch_state, {"names": ["w", "b"]}, ValueError, "names: must name every parameter once, got no 'c'"),
    (adam, torch_state, {"names": ["w", "b", "b"]}, ValueError, "names: must name every parameter once, got 'b' twice"),
    (adam, torch_state, {"names": ["w", "b", "d"]}, ValueError, "names: must be paths of parameters, b, c, w, got 'd'"),
    (adam, torch_state, {"names": "wbc"}, TypeError, "names: must be a list"),
    (
        adam,
        torch_state,
        {"names": [["w"], "b", "c"]},
        ValueError,
        r"names: must be paths of parameters, b, c, w, got \['w'\]",
    ),
    (adam, torch_state, {"step": 4}, ValueError, "step: must be at least 5, the largest count in state_dict, got 4"),
    (adam, torch_state, {"step": -1}, ValueError, "step: must be a whole number"),
    (adam, torch_state, {"step": True}, TypeError, "step: must be a whole number"),
    (
        momentum,
        lambda: torch_state(fastopt.SGD(start(), weight_decay=0.1)),
        {},
        ValueError,
        "must have momentum in a group of torch.optim.SGD.*, got 0 in every group",
    ),
    (
        momentum,
        lambda: torch_state(momentum(nesterov=True)),
        {},
        ValueError,
        "construct the optimizer with nesterov=True",
    ),
    (
        lambda: fastopt.SGD(start(), weight_decay=0.1),
        lambda: torch_state(momentum()),
        {},
        ValueError,
        r"must be 0, because this optimizer has no momentum, got 0.9; construct fastopt.SGD\(..., momentum=0.9\)",
    ),
    (
        lambda: fastopt.Momentum(start(), weight_decay=0.1),
        lambda: torch_state(momentum(dampening=0.5)),
        {},
        ValueError,
        "must be 0, because this optimizer has no dampening, got 0.5; construct fastopt.SGD",
    ),
    (
        lambda: rmsprop_of_torch(centered=True, momentum=0.9),
        lambda: torch_state(rmsprop_of_torch(momentum=0.9)),
        {},
        ValueError,
        "construct the optimizer with centered=False",
    ),
    (
        lambda: nadam(),
        lambda: edited(torch_state(nadam()), *STATE, "mu_product", 0.5),
        {},
        ValueError,
        "mu_product'.*must be 0.0.* after 5 steps .*, got 0.5",
    ),
    (
        lambda: nadam(),
        lambda: edited(torch_state(nadam()), *STATE, "mu_product", NAN),
        {},
        ValueError,
        "mu_product'.*must be 0.0.* got nan",
    ),
    (
        lambda: adam(eps_inside=True),
        torch_state,
        {},
        ValueError,
        "torch.optim.Adam: adds eps to the root, not under it; parameter 'b' must have eps_inside=False, got True",
    ),
)


class Unreadable:
    shape = (3,)

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise RuntimeError("on a GPU")

    def __deepcopy__(self, memo: Any) -> Unreadable:
        return self


@pytest.mark.parametrize(
    ("make", "state", "arguments", "error", "message"), BAD_TORCH, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_torch_state_that_does_not_fit_changes_nothing(make, state, arguments, error, message):
    opt = filled(make(), 3)
    found = state()
    before = bits(opt)
    with pytest.raises(error, match=message):
        from_torch_state(opt, found, **arguments)
    assert bits(opt) == before


def rmsprop(**more: Any) -> fastopt.Optimizer:
    return fastopt.RMSprop(start(), convention="optax", **{"weight_decay": 0.1, **more})


def optax_state(opt: fastopt.Optimizer | None = None) -> Any:
    return list(to_optax_state(filled(opt or adam(weight_decay=0.0))))


def plain_adam(**more: Any) -> fastopt.Optimizer:
    return adam(**{"weight_decay": 0.0, **more})


BAD_OPTAX: tuple[tuple[Callable[[], fastopt.Optimizer], Callable[[], Any], dict[str, Any], type, str], ...] = (
    (
        plain_adam,
        lambda: 3,
        {},
        ValueError,
        "state: must be of optax.adam, .* ScaleByAdamState with count, mu, nu, got no state with arrays",
    ),
    (plain_adam, lambda: optax_state(momentum()), {}, ValueError, r", got state\[1\]\[0\] with trace"),
    (
        plain_adam,
        lambda: [*optax_state(), *optax_state()],
        {},
        ValueError,
        r", got state\[0\] with count, mu, nu and state\[2\]",
    ),
    (plain_adam, lambda: edited(optax_state(), 0, "count", ...), {}, ValueError, r", got state\[0\] with mu, nu"),
    (plain_adam, lambda: edited(optax_state(), 0, "nu_max", {}), {}, ValueError, "with count, mu, nu, nu_max"),
    (
        plain_adam,
        lambda: edited(optax_state(), 0, "count", -1),
        {},
        ValueError,
        r"state\[0\].count: must be a whole number from 0, got -1",
    ),
    (
        plain_adam,
        lambda: edited(optax_state(), 0, "mu", "b", ...),
        {},
        ValueError,
        r"state\[0\].mu: must have an array for each of b, c, w and no other, got w, c; 'b' is missing",
    ),
    (
        plain_adam,
        lambda: edited(optax_state(), 0, "mu", "d", np.zeros(1)),
        {},
        ValueError,
        "got w, b, c, d; 'd' is unknown",
    ),
    (
        plain_adam,
        lambda: edited(optax_state(), 0, "nu", "b", np.zeros(4, np.float32)),
        {},
        ValueError,
        r"state\[0\].nu of 'b': must have the parameter's shape, \(3,\), got \(4,\)",
    ),
    (
        plain_adam,
        lambda: edited(optax_state(), 0, "nu", "b", np.zeros(3, np.float16)),
        {},
        TypeError,
        "of 'b': must have the parameter's dtype, float32, got float16",
    ),
    (plain_adam, optax_state, {"step": 4}, ValueError, r"step: must be 5 as in state\[0\].count, got 4"),
    (momentum, lambda: optax_state(momentum()), {"step": -1}, ValueError, "step: must be a whole number"),
    (rmsprop, optax_state, {}, ValueError, "and have ScaleByRmsState with nu, got "),
    (
        lambda: rmsprop(momentum=0.9),
        lambda: optax_state(rmsprop()),
        {},
        ValueError,
        "and have ScaleByRmsState with nu and TraceState with trace, got ",
    ),
)


@pytest.mark.parametrize(
    ("make", "state", "arguments", "error", "message"), BAD_OPTAX, ids=lambda x: x if isinstance(x, str) else ""
)
def test_an_optax_state_that_does_not_fit_changes_nothing(make, state, arguments, error, message):
    opt = filled(make(), 3)
    found = state()
    before = bits(opt)
    with pytest.raises(error, match=message):
        from_optax_state(opt, found, **arguments)
    assert bits(opt) == before


def adam_of_keras(**more: Any) -> fastopt.Optimizer:
    return fastopt.Adam(start(np.float64), convention="keras", **more)


def keras_state(opt: fastopt.Optimizer | None = None) -> dict[str, Any]:
    return to_keras_state(filled(opt or adam_of_keras()), names=ORDER)


def rmsprop_of_keras(**more: Any) -> fastopt.Optimizer:
    return fastopt.RMSprop(start(np.float64), convention="keras", **more)


BAD_KERAS: tuple[tuple[Callable[[], fastopt.Optimizer], Callable[[], Any], dict[str, Any], type, str], ...] = (
    (adam_of_keras, lambda: 3, {}, TypeError, "variables: must be a dict by path or a list of arrays.* got int"),
    (adam_of_keras, lambda: {3: 5}, {}, TypeError, "variables: must have the variables' paths as keys, got 3"),
    (adam_of_keras, dict, {}, ValueError, "variables: must have 'adam/iteration'"),
    (
        adam_of_keras,
        lambda: edited(keras_state(), "adam/iteration", -1),
        {},
        ValueError,
        r"variables\['adam/iteration'\]: must be a whole number",
    ),
    (
        adam_of_keras,
        lambda: edited(keras_state(), "adam/learning_rate", NAN),
        {},
        ValueError,
        r"lr: must be a number.*, got nan",
    ),
    (adam_of_keras, lambda: edited(keras_state(), "adam_1/iteration", 5), {}, ValueError, "must be the only iteration"),
    (
        adam_of_keras,
        lambda: edited(keras_state(), "adam/b_momentum", ...),
        {},
        ValueError,
        "variables: must have 'adam/b_momentum'",
    ),
    (
        adam_of_keras,
        lambda: edited(keras_state(), "adam/b_average", 1),
        {},
        ValueError,
        "must be a state of this optimizer",
    ),
    (
        adam_of_keras,
        lambda: edited(keras_state(), "adam/d_momentum", 1),
        {},
        ValueError,
        r"must have states of 3 parameters, b, c, w, got 4: w, b, c, d",
    ),
    (
        adam_of_keras,
        lambda: {key.replace("b_", "e_"): array for key, array in keras_state().items()},
        {},
        ValueError,
        "must have states of the parameters b, c, w, got w, e, c; give names=",
    ),
    (
        adam_of_keras,
        lambda: edited(keras_state(), "adam/b_momentum", np.zeros(4)),
        {},
        ValueError,
        r"b_momentum'\] of parameter 'b': must have the parameter's shape, \(3,\), got \(4,\)",
    ),
    (
        adam_of_keras,
        lambda: edited(keras_state(), "adam/b_momentum", np.zeros(3, np.float32)),
        {},
        TypeError,
        "of parameter 'b': must have the parameter's dtype, float64",
    ),
    (
        adam_of_keras,
        lambda: keras_state(rmsprop_of_keras(momentum=0.9)),
        {},
        ValueError,
        "must be of Keras' Adam, as this optimizer .* is, got 'rm_sprop'",
    ),
    (
        adam_of_keras,
        lambda: keras_state(adam_of_keras(amsgrad=True)),
        {},
        ValueError,
        "adam/w_velocity_hat'.*must be a state of this optimizer",
    ),
    (lambda: adam_of_keras(amsgrad=True), keras_state, {}, ValueError, "variables: must have 'adam/w_velocity_hat'"),
    (
        adam_of_keras,
        lambda: list(keras_state().values())[:-2],
        {},
        ValueError,
        "variables: must be .* 6 states of 3 parameters.* got 6 variables",
    ),
    (adam_of_keras, lambda: [*keras_state().values(), 1], {}, ValueError, "got 9 variables"),
    (
        adam_of_keras,
        lambda: list(keras_state().values()),
        {},
        ValueError,
        r"variables\[2\] of parameter 'b': must have the parameter's shape, \(3,\), got \(3, 4\)",
    ),
    (
        adam_of_keras,
        keras_state,
        {"names": ["w", "b"]},
        ValueError,
        "names: must name every parameter once, got no 'c'",
    ),
    (
        adam_of_keras,
        keras_state,
        {"names": ["w", "b", "b"]},
        ValueError,
        "names: must name every parameter once, got 'b' twice",
    ),
    (
        adam_of_keras,
        keras_state,
        {"names": ["w", "b", "d"]},
        ValueError,
        "names: must be paths of parameters, b, c, w, got 'd'",
    ),
)


@pytest.mark.parametrize(
    ("make", "state", "arguments", "error", "message"), BAD_KERAS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_keras_variables_that_do_not_fit_change_nothing(make, state, arguments, error, message):
    opt = filled(make(), 3)
    found = state()
    before = bits(opt)
    with pytest.raises(error, match=message):
        from_keras_state(opt, found, **arguments)
    assert bits(opt) == before


FOREIGN: tuple[tuple[Callable[..., Any], str, dict[str, Any], str], ...] = (
    (to_torch_state, "LAMB", {}, "no optimizer computes the same as rule 'lamb'"),
    (to_torch_state, "Nesterov", {"form": "lookahead"}, "its Nesterov is form='reformulated'"),
    (to_torch_state, "Momentum", {"form": "ema"}, "torch.optim.SGD: .*must have form='heavy_ball', got 'ema'"),
    (to_torch_state, "SGD", {"momentum": 0.9, "lr_inside": True}, "has lr outside the velocity"),
    (
        to_torch_state,
        "SGD",
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "torch.optim.SGD: has no decoupled weight",
    ),
    (
        to_torch_state,
        "SGD",
        {"momentum": 0.9, "dampening": 0.5, "overrides": {"b": {"momentum": 0.0}}},
        "ignores dampening if momentum is 0; parameter 'b'",
    ),
    (to_torch_state, "Adagrad", {"eps_inside": True}, "torch.optim.Adagrad: adds eps to the root"),
    (to_torch_state, "RMSprop", {"momentum": 0.9, "lr_inside": True}, "lr outside the momentum buffer"),
    (to_torch_state, "AdamW", {"convention": "keras"}, "torch.optim.AdamW: adds eps to the corrected root"),
    (to_torch_state, "Adam", {"bias_correction": False}, "always corrects the bias"),
    (to_torch_state, "Adamax", {"eps_inside": False}, "has eps inside the maximum"),
    (to_optax_state, "LAMB", {}, "the supported formats are those of sgd, adagrad, rmsprop, adam, adamw"),
    (to_optax_state, "Adam", {"amsgrad": True}, "optax.amsgrad keeps the largest bias-corrected nu"),
    (to_optax_state, "NAdam", {}, "does not have the momentum schedule"),
    (to_optax_state, "Adam", {"maximize": True}, "optax.adam: has no maximize"),
    (
        to_optax_state,
        "Adam",
        {"overrides": {"b": {"lr": 1.0}}},
        "supports one lr for all parameters, but 'c' has 0.001 and 'b' has 1.0",
    ),
    (to_optax_state, "AdamW", {"overrides": {"b": {"weight_decay": 0.5}}}, "supports one weight_decay for all"),
    (to_optax_state, "Momentum", {"form": "lr_inside"}, "its trace is v = momentum v"),
    (to_optax_state, "SGD", {"momentum": 0.9, "dampening": 0.5}, "optax.sgd: has no dampening"),
    (
        to_optax_state,
        "SGD",
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "has no decoupled weight decay; in optax only adamw has it",
    ),
    (to_optax_state, "RMSprop", {"momentum": 0.9}, "optax.rmsprop: has lr inside the trace"),
    (to_optax_state, "Adagrad", {}, "has eps under the root"),
    (to_optax_state, "Adagrad", {"eps_inside": True, "lr_decay": 0.1}, "has no lr_decay; use a schedule"),
    (to_keras_state, "LAMB", {}, "keras.optimizers: no optimizer computes"),
    (to_keras_state, "Nesterov", {}, "whose Nesterov has lr inside"),
    (to_keras_state, "SGD", {"momentum": 0.9}, "keras.optimizers.SGD: has lr inside the momentum"),
    (to_keras_state, "Momentum", {}, "its momentum is v = momentum v - lr g"),
    (to_keras_state, "RMSprop", {}, "has eps under the root"),
    (to_keras_state, "Adam", {}, "adds eps to the uncorrected root"),
    (to_keras_state, "Adam", {"eps_hat": True, "maximize": True}, "has no maximize"),
    (
        to_keras_state,
        "Adam",
        {"eps_hat": True, "weight_decay": 0.1},
        "construct the optimizer with decoupled_weight_decay=True",
    ),
)


@pytest.mark.parametrize(
    ("export", "optimizer", "options", "message"), FOREIGN, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_form_that_the_framework_does_not_have_is_refused_both_ways(export, optimizer, options, message):
    opt = getattr(fastopt, optimizer)(start(np.float64), **options)
    before = bits(opt)
    with pytest.raises(ValueError, match=message):
        export(opt)
    load = {to_torch_state: from_torch_state, to_optax_state: from_optax_state, to_keras_state: from_keras_state}[
        export
    ]
    with pytest.raises(ValueError, match=message):
        load(opt, {})
    assert bits(opt) == before


@pytest.mark.parametrize("export", [to_optax_state, to_keras_state])
def test_counts_per_parameter_are_refused_by_a_format_with_one_count(export):
    opt = filled(adam_of_keras() if export is to_keras_state else plain_adam(), 5, {"b": 2})
    with pytest.raises(ValueError, match="'b' had no gradient in 2 of 5 steps here"):
        export(opt)


@pytest.mark.parametrize("export", [to_torch_state, to_optax_state, to_keras_state])
def test_a_users_rule_is_not_confused_with_ours_of_the_same_name(export):
    class Hyper(NamedTuple):
        lr: float

    def adam(p, g, m, v, h):
        return p - h.lr * g, m, v

    opt = fastopt.Optimizer(start(), fastopt.rule(lambda t, lr: Hyper(lr))(adam), lr=0.1)
    with pytest.raises(ValueError, match=r"no optimizer computes the same as rule 'test_interop\.adam'"):
        export(opt)


def test_exported_states_have_the_frameworks_units():
    """Check a first step: the frameworks store the change of the parameters, with its sign."""
    params = start(np.float64)
    grads = gradients(np.random.default_rng(5), params)

    def moved(optimizer: str, convention: str, **options: Any) -> tuple[Any, np.ndarray]:
        opt = getattr(fastopt, optimizer)(params, convention=convention, momentum=0.9, **options)
        opt.step(grads)
        return opt, opt.params["w"] - params["w"]

    opt, step = moved("RMSprop", "optax", centered=True)
    np.testing.assert_allclose(to_optax_state(opt)[2]["trace"]["w"], step, rtol=1e-9)
    np.testing.assert_allclose(to_optax_state(opt)[0]["nu"]["w"], 0.1 * grads["w"] ** 2, rtol=1e-9)
    np.testing.assert_allclose(to_optax_state(opt)[0]["mu"]["w"], 0.1 * grads["w"], rtol=1e-9)
    opt, step = moved("RMSprop", "keras", centered=True)
    np.testing.assert_allclose(to_keras_state(opt)["rm_sprop/w_momentum"], -step, rtol=1e-9)
    np.testing.assert_allclose(to_keras_state(opt)["rm_sprop/w_velocity"], 0.1 * grads["w"] ** 2, rtol=1e-9)
    opt, step = moved("SGD", "keras")
    np.testing.assert_allclose(to_keras_state(opt)["sgd/w_momentum"], step, rtol=1e-9)
    opt, step = moved("SGD", "optax", lr=0.1)
    np.testing.assert_allclose(to_optax_state(opt)[0]["trace"]["w"], -step / 0.1, rtol=1e-9)


def test_the_place_of_a_zero_eps_does_not_matter():
    opt = filled(fastopt.Adam(start(np.float64), eps=0.0, eps_inside=True))
    twin = fastopt.Adam(start(np.float64), eps=0.0, eps_hat=True)
    from_torch_state(twin, to_torch_state(opt))
    from_keras_state(twin, to_keras_state(opt))
    assert bits(twin.states) == bits(opt.states)


def test_two_parameters_of_one_name_in_keras_are_refused():
    opt = fastopt.Adam({"a": {"b": np.zeros(1)}, "a_b": np.zeros(1)}, convention="keras")
    with pytest.raises(
        ValueError, match="parameter 'a_b': must have its own name in Keras, got 'adam/a_b_momentum' twice"
    ):
        to_keras_state(opt)
    arrays = [5, 0.001, *(np.full(1, k) for k in (1.0, 2.0, 3.0, 4.0))]
    from_keras_state(opt, arrays, names=["a_b", "a.b"])
    assert [float(opt.states["m"]["a_b"][0]), float(opt.states["v"]["a"]["b"][0])] == [1.0, 4.0]


def test_the_average_the_parameters_and_other_options_do_not_change():
    opt = filled(adam(ema=0.5, max_norm=1.0))
    average, params = bits(opt.ema), bits(opt.flat.data)
    from_torch_state(opt, torch_state(filled(adam())))
    from_optax_state(opt, optax_state())
    assert (bits(opt.ema), bits(opt.flat.data)) == (average, params)


def test_loading_is_refused_while_the_average_is_swapped_in():
    opt = adam(ema=0.5)
    state = torch_state()
    with opt.swap_ema(), pytest.raises(RuntimeError, match="inside `with opt"):
        from_torch_state(opt, state)


# --- the package ------------------------------------------------------------------------------------------------------


def test_no_framework_is_imported():
    report = "import json, sys, fastopt.interop; print(json.dumps(sorted(sys.modules)))"
    finished = run("-c", report)
    assert finished.returncode == 0, finished.stderr
    assert not {"torch", "jax", "optax", "keras", "tensorflow"} & set(json.loads(finished.stdout))
