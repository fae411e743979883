"""`fastopt train`: one small network, one or many optimizers, a table and a picture of how they did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastopt.cli import data
from fastopt.cli.choices import (
    FORMS,
    INITS,
    SCHEDULES,
    one_of,
    optimizers,
    parse_backend,
    parse_batch_size,
    parse_hidden,
    parse_lr,
    parse_optimizers,
)
from fastopt.cli.compare import COMPARISONS, PLAIN, own_defaults
from fastopt.cli.network import ACTIVATIONS
from fastopt.cli.output import STDOUT, blame, check_files, check_writable, console, write_json
from fastopt.cli.report import Result, print_results, report, settings_of, title_of
from fastopt.cli.runs import Plan, Setting, beside, make_run, train_all

EXAMPLES = "\n\n".join(
    [
        "[bold]Examples[/bold]",
        "fastopt train",
        "fastopt train --optimizer sgd,momentum,adam --schedule cosine --epochs 50",
        "fastopt train --optimizer momentum:ema,nesterov:lookahead,adam:amsgrad:lr=0.003",
        "fastopt train --data breast-cancer --optimizer sgd,adam --batch-size full --plot curves.png",
        "fastopt train --optimizer all --plot curves.png --json results.json",
        "fastopt train --optimizer sgd --lr 0.005 --batch-norm --plot curves.png",
        "fastopt train --lr auto",
        "fastopt train --compare batch-sizes --plot batch-sizes.png",
        "fastopt train --compare inits --plot inits.png --json inits.json",
        "fastopt train --epochs 300 --schedule cosine --checkpoint run.safetensors --resume",
        "fastopt train --backend cuda --hidden 4096,4096 --batch-size 256",
    ]
)


def train(
    ctx: typer.Context,
    optimizer: Annotated[
        list[str],
        typer.Option(
            "--optimizer",
            "-o",
            metavar="NAME[:OPTION...]",
            help=f"{', '.join(optimizers())}, or all (these, and {', '.join(FORMS)}). Several: repeat the option, or "
            "separate them by commas. Options of an optimizer follow its name after colons: a form (momentum:ema), "
            "a flag (adam:amsgrad), a value (adam:lr=0.003, adam:betas=0.9/0.99). With --lr auto and with --compare "
            "the default is sgd.",
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
        str | None,
        typer.Option(
            metavar="NUMBER|auto",
            help="Learning rate, from 0, of every optimizer without an lr= of its own. auto measures lambda, the "
            "largest eigenvalue of the Hessian at the first weights over all training rows, prints it and takes "
            "1/lambda; (1 - momentum)/lambda where a velocity adds up gradients. It is for sgd, momentum and nesterov.",
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
        typer.Option(metavar="WIDTHS", help="Widths of the hidden layers, or none: plain softmax regression."),
    ] = "128,32",
    activation: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"What follows each hidden layer: {' or '.join(ACTIVATIONS)}."),
    ] = "relu",
    batch_norm: Annotated[
        bool,
        typer.Option(
            "--batch-norm",
            help="Train every optimizer twice: without, and with batch normalisation after each hidden layer.",
        ),
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One question with its own table and figure: "
            + "; ".join(f"{name} ({comparison.what})" for name, comparison in COMPARISONS.items())
            + ". It sets what it varies, and has defaults of its own for "
            + own_defaults()
            + "; all other options are as ever.",
        ),
    ] = None,
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
        typer.Option(
            metavar="FILE",
            help="Draw the loss of every optimizer against the epochs, or the figure of the "
            "comparison (.png, .pdf, .svg).",
        ),
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

    With --compare NAME it is not the optimizers that differ, but batch sizes, schedules, first weights, and so on.
    """
    with blame("--compare"):
        comparison = PLAIN if compare is None else COMPARISONS[one_of(compare, COMPARISONS, "comparison")]
    given = [name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"]
    usual = {**({"optimizer": ["sgd"]} if lr == "auto" else {}), **comparison.defaults}

    def chosen(name: str) -> Any:
        return ctx.params[name] if name in given else usual.get(name, ctx.params[name])

    with blame("--data"):
        one_of(dataset, data.NAMES, "data set")
    with blame("--lr"):
        rate = None if lr is None else parse_lr(lr)
    with blame("--optimizer"):
        choices = parse_optimizers(chosen("optimizer"), rate, auto=True)
    with blame("--schedule"):
        one_of(schedule, SCHEDULES, "schedule")
    with blame("--init"):
        one_of(init, INITS, "initialisation")
    with blame("--hidden"):
        widths = parse_hidden(chosen("hidden"))
    with blame("--activation"):
        one_of(activation, ACTIVATIONS, "activation")
    with blame("--batch-size"):
        rows_per_batch = parse_batch_size(chosen("batch_size"))
    with blame("--backend"):
        backend = parse_backend(backend)
    with blame("--compare"):
        if compare is not None:
            comparison.check(given, choices, widths)
    check_files(plot, json)
    with blame("--resume"):
        if resume and checkpoint is None:
            raise ValueError("it continues from a file; name it with --checkpoint FILE")
    with blame("--checkpoint"):
        if checkpoint is not None:
            _check_checkpoint(checkpoint, len(choices), batch_norm, resume)

    setting = Setting(dataset, widths, chosen("epochs"), backend, seed)
    with blame("--optimizer"):
        plans = [
            plan
            for choice in choices
            for plan in comparison.vary(
                Plan(choice.label, choice, rows_per_batch, schedule, init, activation, batch_norm=batch_norm)
            )
        ]
    with blame("--batch-norm"):
        for plan in plans:
            if plan.batch_norm:
                _check_batch_norm(widths, len(setting.rows.x_train), setting.batch_rows(plan))
    with blame("--optimizer"):  # all are made before any is trained: a value that is out of range ends the command here
        runs = [make_run(plan, setting, checkpoint) for plan in plans]
    with blame("--resume"):
        begun = [
            run.keeper.resume() if resume and run.keeper is not None and run.keeper.path.exists() else None
            for run in runs
        ]
    resumed_after = [0 if before is None else before.epochs for before in begun]
    seen = [comparison.look(plan, setting) for plan in plans]
    outcomes = train_all(runs, setting, begun)

    results = [Result(*parts) for parts in zip(runs, outcomes, seen, strict=True)]
    settings = settings_of(setting, plans)
    out = console(for_json=json)
    print_results(out, settings, results, comparison.columns, rules=comparison.rules)
    for run, done in zip(runs, resumed_after, strict=True):
        if run.keeper is not None:
            told = f", continued after epoch {done}" if done else ""
            out.print(f"checkpoint: {run.keeper.path}{told}", soft_wrap=True)
    if plot is not None:
        with blame("--plot"):
            comparison.draw(plot, title_of(settings), results)
        out.print(f"{comparison.picture}: {plot}", soft_wrap=True)
    if json is not None:
        with blame("--json"):
            write_json(json, report(settings, results, compare))


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
    for one in [path, beside(path)] if batch_norm else [path]:
        if one == STDOUT:
            raise ValueError("- is no file; give it a name, such as run.safetensors")
        check_writable(one)
        check_writable(one.parent / f".{one.name}.tmp")  # a file of such a name takes its place
        if one.exists() and not resume:
            raise FileExistsError(f"{one} is there already: --resume continues it; else delete it or choose another")
