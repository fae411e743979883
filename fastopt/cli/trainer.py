"""The training loop: mini-batches, gradients written in place, one step, and the measurements along the way."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Literal

import numpy as np
from threadpoolctl import threadpool_limits

from fastopt import BatchNorm, Nesterov, Optimizer, ScheduleFreeAdamW, minibatches
from fastopt.cli.data import Dataset
from fastopt.cli.network import Array, backward, evaluate, module_of
from fastopt.distributed import Communicator


@dataclass
class Outcome:
    """The outcome of training one network."""

    losses: list[float] = field(default_factory=list)
    """The mean loss over the training rows, before the first epoch and after each epoch."""
    train_accuracy: float = math.nan
    test_accuracy: float = math.nan
    diverged_in_epoch: int | None = None
    """The first epoch, from 1, after which the loss is not finite. Training ends there, without accuracies."""
    steps: int = 0
    seconds: float = 0.0
    """Time of training and of measuring the loss after each epoch."""
    timed_seconds: float = 0.0
    timed_steps: int = 0
    """Number of calls of ``opt.step()`` in `timed_seconds`, without the first of a run, which may compile. On a device
    the time is the device's own, from the start to the end of each step."""
    parameters: str = ""
    """SHA-256 of the trained parameters: two runs with equal digests agree bit for bit."""

    @property
    def epochs(self) -> int:
        """The number of finished epochs."""
        return max(0, len(self.losses) - 1)

    @property
    def step_microseconds(self) -> float | None:
        """Mean time of ``opt.step()`` from the second step on; None without a second step."""
        return 1e6 * self.timed_seconds / self.timed_steps if self.timed_steps else None


class Stopwatch:
    """Measures calls: on the host by the clock, on a device, which works asynchronously, by events on its stream."""

    def __init__(self, xp: Any):
        self._cuda: Any = getattr(xp, "cuda", None)
        self._pairs: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def time(self, call: Callable[[], Any]) -> None:
        """Time one call, without waiting for a device."""
        if self._cuda is None:
            before = perf_counter()
            call()
            self._seconds += perf_counter() - before
            return
        start, end = self._cuda.Event(), self._cuda.Event()
        start.record()
        call()
        end.record()
        self._pairs.append((start, end))

    def read(self) -> float:
        """Wait for all calls since the last reading, and return their seconds."""
        for start, end in self._pairs:
            end.synchronize()
            self._seconds += self._cuda.get_elapsed_time(start, end) / 1e3
        found, self._seconds, self._pairs = self._seconds, 0.0, []
        return found


def train_network(
    opt: Optimizer,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int | Literal["full"],
    rng: np.random.Generator,
    norms: Sequence[BatchNorm] = (),
    activation: str = "relu",
    looks_ahead: bool = False,
    comm: Communicator | None = None,
    begun: Outcome | None = None,
    after_epoch: Callable[[Outcome], Any] = lambda outcome: None,
) -> Outcome:
    """Train the network whose layers are ``opt.params``; call `after_epoch` with the outcome so far after each epoch.

    `looks_ahead` takes each gradient inside ``with opt.lookahead()``. The result depends on `rng` but not on the number
    of threads: matrix products run on one thread, because BLAS may round differently on two. The data are copied to
    the optimizer's backend, and the matrix products run there; only the loss after each epoch is fetched from a device.

    `comm`: the processes of `opt` and `norms`, each of which takes a part of every mini-batch.

    `begun` is the outcome of earlier epochs of `opt` and `norms`; pass `rng` in its state before those epochs.
    """
    outcome = Outcome() if begun is None else begun
    xp = module_of(opt.flat.data)
    data = data.on(xp)
    stopwatch = Stopwatch(xp)
    part = None if comm is None else (comm.rank, comm.size)
    batches = minibatches(data.x_train, data.y_train, batch_size=batch_size, rng=rng, part=part)
    rows = len(data.x_train)
    most = rows if batch_size == "full" else min(batch_size, rows)
    step = opt.step if comm is None else partial(opt.step, reduction="sum")  # of gradients of the whole batch's mean
    for _ in range(outcome.epochs):
        iter(batches)  # draw the order of a finished epoch
    first = True
    # A diverging run overflows before it is detected; the outcome reports the divergence once.
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
        started = perf_counter()
        if not outcome.losses:
            outcome.losses.append(_evaluate(opt, data.x_train, data.y_train, norms, activation)[0])
        while outcome.epochs < epochs and outcome.diverged_in_epoch is None:
            for number, (x, labels) in enumerate(batches):
                of_batch = min(most, rows - number * most)
                with gradient_point(opt, looks_ahead) as layers:
                    backward(layers, x, labels, out=opt.grads, norms=norms, activation=activation, rows=of_batch)
                if first:
                    step()
                else:
                    stopwatch.time(step)
                    outcome.timed_steps += 1
                first = False
                outcome.steps += 1
            outcome.losses.append(_evaluate(opt, data.x_train, data.y_train, norms, activation)[0])
            if not math.isfinite(outcome.losses[-1]):
                outcome.diverged_in_epoch = outcome.epochs
            outcome.timed_seconds += stopwatch.read()
            outcome.seconds += perf_counter() - started
            after_epoch(outcome)
            started = perf_counter()
        if outcome.diverged_in_epoch is None:
            outcome.train_accuracy = _evaluate(opt, data.x_train, data.y_train, norms, activation)[1]
            outcome.test_accuracy = _evaluate(opt, data.x_test, data.y_test, norms, activation)[1]
    outcome.parameters = hashlib.sha256(opt.flat.data.tobytes()).hexdigest()
    return outcome


def gradient_point(opt: Optimizer, looks_ahead: bool) -> AbstractContextManager[Any]:
    """Yield the parameters at the point for the gradient: the look-ahead point with `looks_ahead`."""
    return opt.lookahead() if looks_ahead and isinstance(opt, Nesterov) else nullcontext(opt.params)


def result_point(opt: Optimizer) -> AbstractContextManager[Any]:
    """Yield the parameters at the optimizer's current result: the average if the optimizer maintains one."""
    return opt.eval_params() if isinstance(opt, ScheduleFreeAdamW) else nullcontext(opt.params)


def _evaluate(
    opt: Optimizer, x: Array, labels: Array, norms: Sequence[BatchNorm], activation: str
) -> tuple[float, float]:
    """Return `evaluate`; NaN if divergence left a norm without a valid variance, which the norm would refuse."""
    if not all(norm.running_var is None or (norm.running_var >= 0.0).all() for norm in norms):
        return math.nan, math.nan
    with result_point(opt) as layers:
        return evaluate(layers, x, labels, norms, activation)
