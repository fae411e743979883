"""The training loop: mini-batches, gradients written in place, one step; and what it measures on the way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import numpy as np
from threadpoolctl import threadpool_limits

from fastopt import BatchNorm, Nesterov, Optimizer, minibatches
from fastopt.cli.data import Dataset
from fastopt.cli.network import backward, evaluate


@dataclass
class Outcome:
    """What came of training one network."""

    losses: list[float] = field(default_factory=list)
    """The mean loss over the training rows before the first epoch and after each."""
    train_accuracy: float = math.nan
    test_accuracy: float = math.nan
    diverged_in_epoch: int | None = None
    """The first epoch, from 1, after which the loss is not a finite number. Training ends there, without accuracies."""
    steps: int = 0
    seconds: float = 0.0
    """Of training and of measuring the loss after each epoch."""
    step_microseconds: float | None = None
    """Mean time of ``opt.step()`` from the second step on: the first may compile. None where there was no second."""
    parameters: str = ""
    """SHA-256 of the trained parameters: two runs with one digest agree to the bit."""


def train_network(
    opt: Optimizer,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int | Literal["full"],
    rng: np.random.Generator,
    norms: Sequence[BatchNorm] = (),
    looks_ahead: bool = False,
    after_epoch: Callable[[float], Any] = lambda loss: None,
) -> Outcome:
    """Train the network whose layers are ``opt.params``; call `after_epoch` with the loss after each epoch.

    `looks_ahead` takes each gradient inside ``with opt.lookahead()``. The result depends on `rng` and not on the number
    of threads: matrix products run on one, since BLAS may round differently on two.
    """
    outcome = Outcome()
    batches = minibatches(data.x_train, data.y_train, batch_size=batch_size, rng=rng)
    gradient_point = opt.lookahead if looks_ahead and isinstance(opt, Nesterov) else lambda: nullcontext(opt.params)
    first_step = stepping = 0.0
    started = perf_counter()
    # A diverging run overflows before it is found out; that is reported once, as its outcome.
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
        outcome.losses.append(evaluate(opt.params, data.x_train, data.y_train, norms)[0])
        for epoch in range(1, epochs + 1):
            for x, labels in batches:
                with gradient_point() as layers:
                    backward(layers, x, labels, out=opt.grads, norms=norms)
                before = perf_counter()
                opt.step()
                stepping += perf_counter() - before
                outcome.steps += 1
                if outcome.steps == 1:
                    first_step = stepping
            loss, accuracy = evaluate(opt.params, data.x_train, data.y_train, norms)
            outcome.losses.append(loss)
            after_epoch(loss)
            if not math.isfinite(loss):
                outcome.diverged_in_epoch = epoch
                break
        else:
            outcome.train_accuracy = accuracy
            outcome.test_accuracy = evaluate(opt.params, data.x_test, data.y_test, norms)[1]
    outcome.seconds = perf_counter() - started
    if outcome.steps > 1:
        outcome.step_microseconds = 1e6 * (stepping - first_step) / (outcome.steps - 1)
    outcome.parameters = hashlib.sha256(opt.flat.data.tobytes()).hexdigest()
    return outcome
