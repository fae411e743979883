"""The runs of one command: from a `Plan` to a `Run`, an optimizer with a new network, and its training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from rich.progress import Progress, TaskID
from threadpoolctl import threadpool_limits

import fastopt
from fastopt.cli import data
from fastopt.cli.choices import INITS, SCHEDULES, Choice
from fastopt.cli.network import Layer, backward, new_layers, new_norms
from fastopt.cli.output import blame, progress, writing
from fastopt.cli.resume import OPTIONS, Keeper
from fastopt.cli.trainer import Outcome, train_network
from fastopt.distributed import Communicator


class Trial(NamedTuple):
    """A learning rate that was tried, and the mean loss over the training rows after it."""

    lr: float
    loss: float


class Plan(NamedTuple):
    """One requested run: the settings that may differ between the runs of one command."""

    label: str
    choice: Choice
    batch_size: int | Literal["full"]
    schedule: str
    init: str
    activation: str
    batch_norm: bool = False
    lr_factor: float = 1.0
    """Factor on the learning rate of `choice`."""
    scan: tuple[Trial, ...] = ()
    """The learning rates that were tried to choose the one of `choice`."""


@dataclass
class Setting:
    """Settings shared by all runs of one command: data, sizes of the network, epochs, backend and seed."""

    dataset: str
    hidden: Sequence[int]
    epochs: int
    backend: str
    seed: int
    comm: Communicator | None = None
    """The processes that share out each mini-batch; None for one."""

    def __post_init__(self) -> None:
        self.rows = data.load(self.dataset, self.rng("split"))
        self._eigenvalues: dict[Any, float] = {}

    def rng(self, purpose: Literal["split", "weights", "batches", "curvature"]) -> np.random.Generator:
        """Return the generator of a purpose, the same at every call: every run starts alike."""
        purposes = ("split", "weights", "batches", "curvature")
        seeds = np.random.SeedSequence(self.seed).spawn(len(purposes))
        return np.random.default_rng(seeds[purposes.index(purpose)])

    @property
    def layers(self) -> list[int]:
        """The widths of the network, from its inputs to its classes."""
        return [self.rows.x_train.shape[1], *self.hidden, self.rows.classes]

    @property
    def first(self) -> bool:
        """Whether this process is the one that shows what all do."""
        return self.comm is None or self.comm.rank == 0

    def batch_rows(self, plan: Plan) -> int:
        """Return the number of rows in a mini-batch; the last one of an epoch may have fewer."""
        n = len(self.rows.x_train)
        return n if plan.batch_size == "full" else min(plan.batch_size, n)

    def steps_per_epoch(self, plan: Plan) -> int:
        """Return the number of mini-batches per epoch."""
        return -(-len(self.rows.x_train) // self.batch_rows(plan))

    def network(
        self, plan: Plan, backend: str = "cpu", dtype: DTypeLike = np.float32, comm: Communicator | None = None
    ) -> tuple[list[Layer], list[fastopt.BatchNorm]]:
        """Return the initial network in NumPy arrays, and its norms for this backend, if the plan has norms.

        comm: the processes over whose batches the norms take their statistics.
        """
        layers = new_layers(self.layers, INITS[plan.init], self.rng("weights"))
        layers = [Layer(layer.W.astype(dtype), layer.b.astype(dtype)) for layer in layers]  # equal weights in any dtype
        return new_norms(layers, backend, plan.activation, comm) if plan.batch_norm else (layers, [])

    def eigenvalue(self, plan: Plan) -> float:
        """Return the largest eigenvalue of the Hessian of the loss over all training rows, at the initial weights.

        Raise ValueError if the eigenvalue is not positive: then its reciprocal is not a step length.
        """
        key = plan.init, plan.activation, plan.batch_norm
        if key not in self._eigenvalues:
            # Use float64: its difference steps are so short that hardly any row crosses the kink of a ReLU.
            layers, norms = self.network(plan, dtype=np.float64)
            flat = fastopt.pack(layers)
            attach(norms, flat)
            x, labels = self.rows.x_train.astype(np.float64), self.rows.y_train

            def grad(layers: Any) -> Any:
                backward(layers, x, labels, out=flat.grads, norms=norms, activation=plan.activation)
                return flat.grads

            with threadpool_limits(limits=1, user_api="blas"):  # as in training: the same result on any machine
                self._eigenvalues[key] = fastopt.curvature.dominant_eigenvalue(grad, flat, rng=self.rng("curvature"))
        found = self._eigenvalues[key]
        if found <= 0.0:
            raise ValueError(
                f"largest eigenvalue of the Hessian at the initial weights: must be above 0 for a rate of 1/lambda, "
                f"got {found:.4g}; give a number, or start from other weights"
            )
        return found


class Run(NamedTuple):
    """An optimizer with a new network, and the time to compile its kernels."""

    plan: Plan
    lr: float
    eigenvalue: float | None
    """The eigenvalue behind `lr`, if the learning rate is ``auto``."""
    schedule: Any
    """The learning rate: a function of the step, or a number."""
    steps_per_epoch: int
    optimizer: fastopt.Optimizer
    norms: list[fastopt.BatchNorm]
    compile_seconds: float
    keeper: Keeper | None


def attach(norms: Sequence[fastopt.BatchNorm], flat: fastopt.FlatParams) -> None:
    """Attach the norms to the flat buffer: they read gamma and beta there and write their gradients there."""
    for norm, params, grads in zip(norms, flat.params, flat.grads, strict=False):
        norm.attach(params.bn, grads.bn)


SCANNED = (0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0)
"""Multiples of the usual learning rate that `scan_rates` tries. With gaps of 3, the best rates of SGD and of momentum
would be the same effective step, and their curves one."""


def scan_rates(runs: Sequence[Run], setting: Setting) -> list[Run]:
    """Return the runs with the best of a few learning rates each; show a progress bar for each.

    Each rate trains a new network for one epoch, without a schedule, from the weights and over the mini-batches of the
    comparison. The rate with the lowest loss over the training rows wins.
    """
    chosen = []
    with progress("learning rates {task.fields[best]}", setting.first) as bar:
        for given in runs:
            plan = given.plan
            task = bar.add_task(plan.label, total=len(SCANNED), best="")
            trials: list[Trial] = []
            for factor in SCANNED:
                rate = float(f"{factor * given.lr:.2g}")
                run = make_run(_with_rate(plan._replace(schedule="constant"), rate), setting)
                trials.append(Trial(rate, train(run, setting, epochs=1).losses[-1]))
                best = min(trials, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf)
                bar.update(task, advance=1, best=f"best {best.lr:g}")
            rate = best.lr if math.isfinite(best.loss) else given.lr
            run = make_run(_with_rate(plan, rate)._replace(scan=tuple(trials)), setting)
            chosen.append(run._replace(compile_seconds=given.compile_seconds))
    return chosen


def _with_rate(plan: Plan, lr: float) -> Plan:
    return plan._replace(choice=replace(plan.choice, given_lr=lr))


def make_runs(plans: Sequence[Plan], setting: Setting, checkpoint: Path | None, show: Callable[..., None]) -> list[Run]:
    """Return the runs of `plans`, as `make_run`; `show` is the function of `fastopt.cli.output.waiting`."""
    runs = []
    for k, plan in enumerate(plans):
        show(f"compiling {plan.label}", k, len(plans))
        runs.append(make_run(plan, setting, checkpoint))
    return runs


def make_run(plan: Plan, setting: Setting, checkpoint: Path | None = None) -> Run:
    """Return the run of `plan`, ready for training; the optimizer raises ValueError for a value out of range."""
    choice = plan.choice
    eigenvalue = None
    if choice.auto:
        with blame("--lr"):
            eigenvalue = setting.eigenvalue(plan)
        lr = choice.auto_lr(eigenvalue)
    else:
        lr = choice.lr(setting.batch_rows(plan))
    lr *= plan.lr_factor
    layers, norms = setting.network(plan, setting.backend, comm=setting.comm)
    steps_per_epoch = setting.steps_per_epoch(plan)
    schedule = SCHEDULES[plan.schedule][1](lr, setting.epochs * steps_per_epoch)
    started = perf_counter()
    # Added up in the order of ranks, the gradients are those of one process that takes the parts one after the other.
    shared: dict[str, Any] = {} if setting.comm is None else {"comm": setting.comm, "shard": False, "order": "fixed"}
    opt = choice.kind(layers, lr=schedule, backend=setting.backend, **shared, **choice.options)
    if choice.looks_ahead and isinstance(opt, fastopt.Nesterov):
        with opt.lookahead():  # lookahead has its own kernel: compile it here, not in the training loop
            pass
    if setting.backend == "cuda":  # the first launch compiles the kernels
        copy.deepcopy(opt).step()
    attach(norms, opt.flat)
    seconds = perf_counter() - started
    keeper = None
    if checkpoint is not None:
        settings = {
            **plan._asdict(),
            "data": setting.dataset,
            "layers": setting.layers,
            "epochs": setting.epochs,
            "backend": setting.backend,
            "seed": setting.seed,
            "optimizer": choice.label,
            "options": choice.options,
            "lr": lr,
        }
        kept = {name: settings[name] for name in ("epochs", *OPTIONS)}
        keeper = Keeper(beside(checkpoint) if plan.batch_norm else checkpoint, kept, opt, norms)
    return Run(plan, lr, eigenvalue, schedule, steps_per_epoch, opt, norms, seconds, keeper)


def beside(checkpoint: Path) -> Path:
    """Return the checkpoint file of the run with batch normalisation."""
    return checkpoint.with_name(f"{checkpoint.stem}.batch-norm{checkpoint.suffix}")


def train_all(runs: Sequence[Run], setting: Setting, begun: Sequence[Outcome | None]) -> list[Outcome]:
    """Train every run, with a progress bar for each, and return the outcomes; `begun` holds those to continue from."""
    outcomes = []
    with progress("epochs {task.fields[loss]}", setting.first) as bar:
        for run, before in zip(runs, begun, strict=True):
            done = 0 if before is None else before.epochs
            task = bar.add_task(run.plan.label, total=setting.epochs, completed=done, loss="")
            after_epoch = partial(_after_epoch, bar, task, run.keeper)
            outcomes.append(train(run, setting, epochs=setting.epochs, begun=before, after_epoch=after_epoch))
    return outcomes


def train(run: Run, setting: Setting, *, epochs: int, **options: Any) -> Outcome:
    """Train a run for some epochs; `options` are those of `train_network`."""
    return train_network(
        run.optimizer,
        setting.rows,
        epochs=epochs,
        batch_size=run.plan.batch_size,
        rng=setting.rng("batches"),
        norms=run.norms,
        activation=run.plan.activation,
        looks_ahead=run.plan.choice.looks_ahead,
        comm=setting.comm,
        **options,
    )


def _after_epoch(bar: Progress, task: TaskID, keeper: Keeper | None, outcome: Outcome) -> None:
    bar.update(task, advance=1, loss=f"loss {outcome.losses[-1]:.4f}")
    if keeper is not None:
        with writing("--checkpoint"):
            keeper.keep(outcome)
