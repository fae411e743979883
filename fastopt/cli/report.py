"""The report of `fastopt train`: a title, a table with the columns of the comparison, notes, and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fastopt
from fastopt.cli.runs import Plan, Run, Setting
from fastopt.cli.trainer import Outcome


class Activations(NamedTuple):
    """The outputs of a hidden layer before training, for every training row, and their statistics."""

    values: NDArray[Any]
    """(rows, units)."""
    mean: float
    std: float
    dead: float
    """Fraction of the units that are 0 on every row."""
    saturated: float | None
    """Fraction of the values of tanh so close to -1 or 1 that the gradient almost vanishes; None for ReLU."""


class Result(NamedTuple):
    """A run, its outcome, and the activations of its hidden layers if the comparison reports them."""

    run: Run
    outcome: Outcome
    layers: Sequence[Activations] = ()


class Column(NamedTuple):
    """A column of the table: its heading, the cell of a result, and the note below the table."""

    heading: str
    cell: Callable[[Result], str]
    note: str = ""
    left: bool = False


def _unless_diverged(shown: Callable[[Outcome], str], instead: str = "-") -> Callable[[Result], str]:
    return lambda result: instead if result.outcome.diverged_in_epoch is not None else shown(result.outcome)


def _step_microseconds(result: Result) -> str:
    spent = result.outcome.step_microseconds
    return "-" if spent is None else f"{spent:.1f}"


LR = Column("lr", lambda result: f"{result.run.lr:.4g}")
STEPS = Column("steps", lambda result: str(result.outcome.steps))
LOSS = Column("loss", _unless_diverged(lambda outcome: f"{outcome.losses[-1]:.4f}", "diverged"))
TRAIN = Column("train\naccuracy", _unless_diverged(lambda outcome: f"{outcome.train_accuracy:.2%}"))
TEST = Column("test\naccuracy", _unless_diverged(lambda outcome: f"{outcome.test_accuracy:.2%}"))
SECONDS = Column("seconds", lambda result: f"{result.outcome.seconds:.2f}")
MICROSECONDS = Column("us per\nstep", _step_microseconds)

RESULTS = (LR, LOSS, TRAIN, TEST, SECONDS, MICROSECONDS)


def named(heading: str) -> Column:
    """Return the first column: the label of each run under this heading."""
    return Column(heading, lambda result: result.run.plan.label, left=True)


SHARED = ("batch_size", "schedule", "init", "activation")
"""Fields of a plan that the report states once if all plans agree."""


def settings_of(setting: Setting, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return the settings that all runs share."""
    shared = {name: getattr(plans[0], name) for name in SHARED if len({getattr(plan, name) for plan in plans}) == 1}
    optimizers = {plan.choice.label for plan in plans}
    steps = {setting.epochs * setting.steps_per_epoch(plan) for plan in plans}
    return {
        "data": setting.dataset,
        "training_rows": len(setting.rows.x_train),
        "test_rows": len(setting.rows.x_test),
        "layers": setting.layers,
        "epochs": setting.epochs,
        **({"optimizer": optimizers.pop()} if len(optimizers) == 1 else {}),
        **shared,
        **({"steps": steps.pop()} if len(steps) == 1 else {}),
        "backend": setting.backend,
        **({} if setting.comm is None else {"ranks": setting.comm.size}),
        "seed": setting.seed,
    }


def title_of(settings: dict[str, Any]) -> str:
    """Return the settings in one line."""
    spelled = {
        "optimizer": "optimizer {}",
        "batch_size": "batch size {}",
        "schedule": "schedule {}",
        "init": "init {}",
        "activation": "activation {}",
        "ranks": "{} ranks",
        "seed": "seed {}",
    }
    layers = "-".join(map(str, settings["layers"]))
    parts = [text.format(settings[name]) for name, text in spelled.items() if name in settings]
    place = ["on cuda"] if settings["backend"] == "cuda" else []
    return ", ".join([settings["data"], f"layers {layers}", *parts, *place])


def print_results(
    out: Console, settings: dict[str, Any], results: Sequence[Result], columns: Sequence[Column], rules: bool = False
) -> None:
    """Print the table and the meaning of its columns, within 80 columns.

    rules: whether to draw a line between the results, for results of several lines.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_lines=rules)
    for column in columns:
        if column.left:
            table.add_column(column.heading, overflow="fold")
        else:
            table.add_column(column.heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*(column.cell(result) for column in columns))
    out.print(title_of(settings))
    out.print(table)
    for run, outcome, _ in results:
        if outcome.diverged_in_epoch is not None:
            out.print(
                f"{run.plan.label} diverged: its loss after epoch {outcome.diverged_in_epoch} is not finite; "
                f"try a learning rate below {run.lr:.4g}."
            )
    for run, _, _ in results:
        if isinstance(run.optimizer, fastopt.Rprop) and run.steps_per_epoch > 1:
            out.print(
                f"{run.plan.label} needs full batches: it follows the signs of gradients, which change from mini-batch "
                f"to mini-batch; use --batch-size full."
            )
    scanned = [run for run, _, _ in results if run.plan.scan]
    if scanned:
        chosen = ", ".join(f"{run.plan.label} {run.lr:.4g}" for run in scanned)
        count = len(scanned[0].plan.scan)
        out.print(f"lr: of {count} rates each, the one with the lowest training loss after one epoch: {chosen}.")
    eigenvalues = dict.fromkeys(run.eigenvalue for run, _, _ in results if run.eigenvalue is not None)
    if eigenvalues:
        out.print(
            "lr auto: lambda is the largest eigenvalue of the Hessian of the loss over all training rows, at the first "
            "weights."
        )
    for eigenvalue in eigenvalues:
        labels = ", ".join(run.plan.label for run, _, _ in results if run.eigenvalue == eigenvalue)
        out.print(f"lambda = {eigenvalue:.4g}, 1/lambda = {1.0 / eigenvalue:.4g}: {labels}")
    steps = f" ({settings['steps']} steps)" if "steps" in settings else ""
    notes = [f"loss: mean over the {settings['training_rows']} training rows after {settings['epochs']} epochs{steps}."]
    if TRAIN in columns:
        notes.append(f"accuracy: on the training rows and on {settings['test_rows']} test rows.")
    else:
        notes.append(f"accuracy: on {settings['test_rows']} test rows.")
    notes += [column.note for column in columns if column.note]
    if MICROSECONDS in columns:
        of_device = ", between two events on the device" if settings["backend"] == "cuda" else ""
        notes.append(f"us per step: microseconds in the optimizer{of_device}.")
    if SECONDS in columns:
        compiling = sum(run.compile_seconds for run, _, _ in results)
        notes.append(f"Compiling took {compiling:.2f} s and is not included.")
    out.print(" ".join(notes))


def report(settings: dict[str, Any], results: Sequence[Result], compare: str | None = None) -> dict[str, Any]:
    """Return the content of ``--json``; only keys with ``seconds`` in their name differ between runs of one command."""
    return {
        "fastopt": fastopt.__version__,
        "command": "train",
        **({} if compare is None else {"compare": compare}),
        "settings": settings,
        "runs": [_reported(settings, result) for result in results],
    }


def _reported(settings: dict[str, Any], result: Result) -> dict[str, Any]:
    run, outcome, layers = result
    return {
        "optimizer": run.plan.choice.label,
        **{name: getattr(run.plan, name) for name in SHARED if name not in settings},
        "batch_norm": bool(run.norms),
        "class": run.plan.choice.kind.__name__,
        "options": run.plan.choice.options,
        "lr": run.lr,
        "dominant_eigenvalue": run.eigenvalue,
        **({"lr_scan": [trial._asdict() for trial in run.plan.scan]} if run.plan.scan else {}),
        "status": "trained" if outcome.diverged_in_epoch is None else "diverged",
        "diverged_in_epoch": outcome.diverged_in_epoch,
        "loss": outcome.losses[-1],
        "train_accuracy": outcome.train_accuracy,
        "test_accuracy": outcome.test_accuracy,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "compile_seconds": run.compile_seconds,
        "optimizer_microseconds_per_step": outcome.step_microseconds,
        "losses": outcome.losses,
        **({"activations_before_training": [_statistics(layer) for layer in layers]} if layers else {}),
        "parameters_sha256": outcome.parameters,
    }


def _statistics(layer: Activations) -> dict[str, float | None]:
    return {"mean": layer.mean, "std": layer.std, "dead": layer.dead, "saturated": layer.saturated}
