"""`fastopt train`: one small network, one or many optimizers, a table and a picture of how they did."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

import fastopt
from fastopt.cli import data
from fastopt.cli.choices import (
    FORMS,
    INITS,
    SCHEDULES,
    Choice,
    check_lr,
    one_of,
    optimizers,
    parse_backend,
    parse_batch_size,
    parse_hidden,
    parse_optimizers,
)
from fastopt.cli.network import new_layers, new_norms
from fastopt.cli.output import STDOUT, blame, check_writable, console, progress, write_json
from fastopt.cli.resume import OPTIONS, Keeper
from fastopt.cli.trainer import Outcome, train_network

EXAMPLES = "\n\n".join(
    [
        "[bold]Examples[/bold]",
        "fastopt train",
        "fastopt train --optimizer sgd,momentum,adam --schedule cosine --epochs 50",
        "fastopt train --optimizer momentum:ema,nesterov:lookahead,adam:amsgrad:lr=0.003",
        "fastopt train --data breast-cancer --optimizer sgd,adam --batch-size full --plot curves.png",
        "fastopt train --optimizer all --plot curves.png --json results.json",
        "fastopt train --optimizer sgd --lr 0.005 --batch-norm --plot curves.png",
        "fastopt train --epochs 300 --schedule cosine --checkpoint run.safetensors --resume",
        "fastopt train --backend cuda --hidden 4096,4096 --batch-size 256",
    ]
)


class Run(NamedTuple):
    """An optimizer with a fresh network in it, and how long it took to compile its kernels."""

    choice: Choice
    label: str
    lr: float
    optimizer: fastopt.Optimizer
    norms: list[fastopt.BatchNorm]
    compile_seconds: float
    keeper: Keeper | None


def train(
    optimizer: Annotated[
        list[str],
        typer.Option(
            "--optimizer",
            "-o",
            metavar="NAME[:OPTION...]",
            help=f"{', '.join(optimizers())}, or all (these, and {', '.join(FORMS)}). Several: repeat the option, or "
            "separate them by commas. Options of an optimizer follow its name after colons: a form (momentum:ema), "
            "a flag (adam:amsgrad), a value (adam:lr=0.003, adam:betas=0.9/0.99).",
        ),
    ] = ["adam"],  # noqa: B006 typer's way to say a default list
    dataset: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            metavar="NAME",
            help="digits (1797 images of 8x8 pixels, 10 classes) or breast-cancer (569 cases, 30 measurements, "
            "2 classes). A fifth of the rows is kept for the test.",
        ),
    ] = "digits",
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Learning rate, from 0, of every optimizer without an lr= of its own.",
            show_default="one that suits the optimizer and the batch size",
        ),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the learning rate moves over the run: "
            + "; ".join(f"{name} ({what})" for name, (what, _) in SCHEDULES.items())
            + ".",
        ),
    ] = "constant",
    init: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"How the weights begin: {', '.join(INITS)}. he is he_normal, xavier is xavier_normal; "
            "from zeros a network with hidden layers learns next to nothing. Biases begin at 0.",
        ),
    ] = "he_normal",
    hidden: Annotated[
        str,
        typer.Option(metavar="WIDTHS", help="Widths of the hidden layers (ReLU), or none: plain softmax regression."),
    ] = "128,32",
    batch_norm: Annotated[
        bool,
        typer.Option(
            "--batch-norm",
            help="Train every optimizer twice: without, and with batch normalisation after each hidden layer.",
        ),
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Passes over the training rows, from 1.")] = 30,
    batch_size: Annotated[
        str,
        typer.Option(metavar="NUMBER|full", help="Rows in a mini-batch, from 1, or full: all rows in every step."),
    ] = "32",
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where the network and the optimizer compute: cpu, cuda (CuPy and our kernels on a GPU; it rounds in "
            "other places than a CPU), or auto: cuda where it works, else cpu.",
        ),
    ] = "cpu",
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="NUMBER",
            help="Fixes the split, the first weights and the order of the batches. The same seed gives the same "
            "result, whatever the number of threads.",
        ),
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the loss of every optimizer against the epochs (.png, .pdf, .svg)."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write settings, results and losses as JSON; - is standard output."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save the run after every epoch (safetensors), so that an interrupted one loses no more than the "
            "epoch in progress. For one optimizer; with --batch-norm its second run goes to a file of its own, "
            "run.batch-norm.safetensors beside run.safetensors.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the --checkpoint FILE, if it is there, to the same result as an unbroken run, to the "
            "bit. The other options must be those of the run; --epochs may grow where the schedule is constant.",
        ),
    ] = False,
) -> None:
    """Train a small network with one or several optimizers and compare them.

    Every optimizer starts from the same weights and sees the same mini-batches.

    The last column of the table is the time that a step spends in the optimizer, forward and backward pass left out.
    """
    with blame("--data"):
        one_of(dataset, data.NAMES, "data set")
    with blame("--lr"):
        lr = None if lr is None else check_lr(lr, "the learning rate")
    with blame("--optimizer"):
        choices = parse_optimizers(optimizer, lr)
    with blame("--schedule"):
        one_of(schedule, SCHEDULES, "schedule")
    with blame("--init"):
        one_of(init, INITS, "initialisation")
    with blame("--hidden"):
        widths = parse_hidden(hidden)
    with blame("--batch-size"):
        rows_per_batch = parse_batch_size(batch_size)
    with blame("--backend"):
        backend = parse_backend(backend)
    with blame("--plot"):
        if plot is not None:
            check_writable(plot)
            from fastopt.cli.plots import check_format, draw_losses  # matplotlib: 0.5 s, only for those who plot

            check_format(plot)
    with blame("--json"):
        if json is not None:
            check_writable(json)
    with blame("--resume"):
        if resume and checkpoint is None:
            raise ValueError("it continues from a file; name it with --checkpoint FILE")
    with blame("--checkpoint"):
        if checkpoint is not None:
            _check_checkpoint(checkpoint, len(choices), batch_norm, resume)

    split_seed, weights_seed, batches_seed = np.random.SeedSequence(seed).spawn(3)
    rows = data.load(dataset, np.random.default_rng(split_seed))
    n, features = rows.x_train.shape
    batch_rows = n if rows_per_batch == "full" else min(rows_per_batch, n)
    settings = {
        "data": dataset,
        "training_rows": n,
        "test_rows": len(rows.x_test),
        "layers": [features, *widths, rows.classes],
        "epochs": epochs,
        "batch_size": rows_per_batch,
        "steps": epochs * -(-n // batch_rows),
        "schedule": schedule,
        "init": init,
        "backend": backend,
        "seed": seed,
    }
    with blame("--batch-norm"):
        if batch_norm:
            _check_batch_norm(widths, n, batch_rows)
    with blame("--optimizer"):  # all are made before any is trained: a value that is out of range ends the command here
        runs = [
            _make_run(choice, choice.lr(batch_rows), settings, np.random.default_rng(weights_seed), normed, checkpoint)
            for choice in choices
            for normed in ((False, True) if batch_norm else (False,))
        ]
    with blame("--resume"):
        begun = [
            run.keeper.resume() if resume and run.keeper is not None and run.keeper.path.exists() else None
            for run in runs
        ]
    resumed_after = [0 if before is None else before.epochs for before in begun]
    outcomes = []
    with progress("epochs {task.fields[loss]}") as bar:
        for run, before, done in zip(runs, begun, resumed_after, strict=True):
            task = bar.add_task(run.label, total=epochs, completed=done, loss="")
            outcomes.append(
                train_network(
                    run.optimizer,
                    rows,
                    epochs=epochs,
                    batch_size=rows_per_batch,
                    rng=np.random.default_rng(batches_seed),
                    norms=run.norms,
                    looks_ahead=run.choice.looks_ahead,
                    begun=before,
                    after_epoch=partial(_after_epoch, bar, task, run.keeper),
                )
            )

    out = console(for_json=json)
    _print_results(out, settings, runs, outcomes)
    for run, done in zip(runs, resumed_after, strict=True):
        if run.keeper is not None:
            told = f", continued after epoch {done}" if done else ""
            out.print(f"checkpoint: {run.keeper.path}{told}", soft_wrap=True)
    if plot is not None:
        labels = [run.label if "lr=" in run.label else f"{run.label}, lr {run.lr:.4g}" for run in runs]
        with blame("--plot"):
            draw_losses(plot, _title(settings), dict(zip(labels, (o.losses for o in outcomes), strict=True)))
        out.print(f"loss curves: {plot}", soft_wrap=True)
    if json is not None:
        with blame("--json"):
            write_json(json, _report(settings, runs, outcomes))


def _check_batch_norm(widths: Sequence[int], rows: int, batch_rows: int) -> None:
    """Refuse what leaves batch normalisation nothing to do, or a batch of one row, which has no variance."""
    if not widths:
        raise ValueError("it comes after hidden layers, and --hidden none has no such layer")
    if 1 in (batch_rows, rows % batch_rows):
        raise ValueError(
            f"--batch-size {batch_rows} makes a batch of one row of {rows}, which has no variance; use another size"
        )


def _check_checkpoint(path: Path, optimizers: int, batch_norm: bool, resume: bool) -> None:
    """Refuse a file that cannot be written, or would be lost, and more runs than it is for."""
    if optimizers > 1:
        raise ValueError(f"it is for one optimizer, and --optimizer names {optimizers}; train them one by one")
    for one in [path, _second_of(path)] if batch_norm else [path]:
        if one == STDOUT:
            raise ValueError("- is no file; give it a name, such as run.safetensors")
        check_writable(one)
        check_writable(one.parent / f".{one.name}.tmp")  # a file of such a name takes its place
        if one.exists() and not resume:
            raise FileExistsError(f"{one} is there already: --resume continues it; else delete it or choose another")


def _second_of(path: Path) -> Path:
    """Where the run with batch normalisation is kept."""
    return path.with_name(f"{path.stem}.batch-norm{path.suffix}")


def _make_run(
    choice: Choice,
    lr: float,
    settings: dict[str, Any],
    rng: np.random.Generator,
    normed: bool,
    checkpoint: Path | None,
) -> Run:
    layers = new_layers(settings["layers"], INITS[settings["init"]], rng)
    norms: list[fastopt.BatchNorm] = []
    if normed:
        layers, norms = new_norms(layers, settings["backend"])
    _, schedule = SCHEDULES[settings["schedule"]]
    started = perf_counter()
    opt = choice.kind(layers, lr=schedule(lr, settings["steps"]), backend=settings["backend"], **choice.options)
    if choice.looks_ahead and isinstance(opt, fastopt.Nesterov):
        with opt.lookahead():  # this has a kernel of its own: compile it here, not in the training loop
            pass
    if settings["backend"] == "cuda":  # where kernels are compiled when they are first launched
        copy.deepcopy(opt).step()
    for norm, params, grads in zip(norms, opt.params, opt.grads, strict=False):
        norm.attach(params.bn, grads.bn)
    label = f"{choice.label} + batch norm" if normed else choice.label
    seconds = perf_counter() - started
    keeper = None
    if checkpoint is not None:
        kept = {
            **{name: settings[name] for name in ("epochs", *OPTIONS) if name in settings},
            "optimizer": choice.label,
            "options": choice.options,
            "lr": lr,
            "batch_norm": normed,
        }
        keeper = Keeper(_second_of(checkpoint) if normed else checkpoint, kept, opt, norms)
    return Run(choice, label, lr, opt, norms, seconds, keeper)


def _after_epoch(bar: Progress, task: TaskID, keeper: Keeper | None, outcome: Outcome) -> None:
    bar.update(task, advance=1, loss=f"loss {outcome.losses[-1]:.4f}")
    if keeper is not None:
        with blame("--checkpoint"):
            keeper.keep(outcome)


def _title(settings: dict[str, Any]) -> str:
    return (
        f"{settings['data']}, layers {'-'.join(map(str, settings['layers']))}, batch size {settings['batch_size']}, "
        f"schedule {settings['schedule']}, init {settings['init']}, seed {settings['seed']}"
        + (", on cuda" if settings["backend"] == "cuda" else "")
    )


def _print_results(out: Console, settings: dict[str, Any], runs: Sequence[Run], outcomes: Sequence[Outcome]) -> None:
    """The table, and what its columns mean; narrow enough for a terminal of 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer", overflow="fold")
    for heading in ("lr", "loss", "train\naccuracy", "test\naccuracy", "seconds", "us per\nstep"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run, outcome in zip(runs, outcomes, strict=True):
        if outcome.diverged_in_epoch is None:
            results = f"{outcome.losses[-1]:.4f}", f"{outcome.train_accuracy:.2%}", f"{outcome.test_accuracy:.2%}"
        else:
            results = "diverged", "-", "-"
        spent = "-" if outcome.step_microseconds is None else f"{outcome.step_microseconds:.1f}"
        table.add_row(run.label, f"{run.lr:.4g}", *results, f"{outcome.seconds:.2f}", spent)
    out.print(_title(settings))
    out.print(table)
    for run, outcome in zip(runs, outcomes, strict=True):
        if outcome.diverged_in_epoch is not None:
            out.print(
                f"{run.label} diverged: its loss after epoch {outcome.diverged_in_epoch} is not a finite number; "
                f"try a learning rate below {run.lr:.4g}."
            )
    of_device = ", between two events on the device" if settings["backend"] == "cuda" else ""
    out.print(
        f"loss: mean over the {settings['training_rows']} training rows after {settings['epochs']} epochs "
        f"({settings['steps']} steps). accuracy: on these rows, and on {settings['test_rows']} test rows. us per step: "
        f"microseconds in the optimizer{of_device}. Compiling took {sum(run.compile_seconds for run in runs):.2f} s "
        f"and is not in these times."
    )


def _report(settings: dict[str, Any], runs: Sequence[Run], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What ``--json`` writes. Only the keys with ``seconds`` in their name differ from run to run."""
    return {
        "fastopt": fastopt.__version__,
        "command": "train",
        "settings": settings,
        "runs": [
            {
                "optimizer": run.choice.label,
                "batch_norm": bool(run.norms),
                "class": run.choice.kind.__name__,
                "options": run.choice.options,
                "lr": run.lr,
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
                "parameters_sha256": outcome.parameters,
            }
            for run, outcome in zip(runs, outcomes, strict=True)
        ],
    }
