"""`fastopt train`: train a small network with one or many optimizers; print a table and draw a figure."""

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
from fastopt.cli.output import STDOUT, blame, check_files, console, waiting, write_json, writing
from fastopt.cli.ranks import given_arguments, start, world
from fastopt.cli.report import Result, print_results, report, settings_of, title_of
from fastopt.cli.resume import Keeper
from fastopt.cli.runs import SCANNED, Plan, Setting, beside, make_runs, scan_rates, train_all
from fastopt.distributed import communicator_of

RATES = ("scan", "defaults")

INTERRUPTED = 130
"""The exit code of shells after Ctrl-C: 128 + SIGINT."""

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
        "fastopt train --ranks 2 --batch-size 256",
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
    ] = ["adam"],  # noqa: B006 typer takes a default list this way
    dataset: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            metavar="NAME",
            help="digits (1797 images of 8x8 pixels, 10 classes) or breast-cancer (569 cases, 30 measurements, "
            "2 classes). A fifth of the rows is the test set.",
        ),
    ] = "digits",
    lr: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|auto",
            help="Learning rate, from 0, of every optimizer without an lr= of its own. auto measures lambda, the "
            "largest eigenvalue of the Hessian at the initial weights over all training rows, prints it and uses "
            "1/lambda, or (1 - momentum)/lambda if a velocity sums gradients; for sgd, momentum and nesterov only.",
            show_default="depends on the optimizer and the batch size",
        ),
    ] = None,
    rates: Annotated[
        str,
        typer.Option(
            metavar="scan|defaults",
            help="How --compare optimizers chooses the learning rate of each optimizer without --lr: scan trains one "
            f"epoch at each of {', '.join(f'{factor:g}' for factor in SCANNED)} times its usual rate, and takes the "
            "one with the lowest training loss; defaults takes the usual rate.",
        ),
    ] = "scan",
    schedule: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the learning rate changes during the run: "
            + "; ".join(f"{name} ({what})" for name, (what, _) in SCHEDULES.items())
            + ".",
        ),
    ] = "constant",
    init: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"Initial weights: {', '.join(INITS)}. he is he_normal, xavier is xavier_normal; "
            "from zeros a network with hidden layers learns almost nothing. Biases start at 0.",
        ),
    ] = "he_normal",
    hidden: Annotated[
        str,
        typer.Option(metavar="WIDTHS", help="Widths of the hidden layers, or none for plain softmax regression."),
    ] = "128,32",
    activation: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Activation after each hidden layer: {' or '.join(ACTIVATIONS)}."),
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
            help="A comparison with its own table and figure: "
            + "; ".join(f"{name} ({comparison.what})" for name, comparison in COMPARISONS.items())
            + ". A comparison sets the options it varies, and changes these defaults: "
            + own_defaults()
            + "; all other options work as usual.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="NUMBER", help="Passes over the training rows, from 1.")] = 30,
    batch_size: Annotated[
        str,
        typer.Option(metavar="NUMBER|full", help="Rows in a mini-batch, from 1, or full: all rows in every step."),
    ] = "32",
    ranks: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="NUMBER",
            help="Processes that share out the rows of every mini-batch: started here, by mpiexec with mpi4py, or by "
            "torch.distributed; or by yourself: mpiexec -n 2 python -m mpi4py -m fastopt train.",
        ),
    ] = 1,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where the network and the optimizer compute: cpu, cuda (CuPy and fastopt's kernels on a GPU, which "
            "rounds differently from a CPU), or auto: cuda if it works here, else cpu.",
        ),
    ] = "cpu",
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="NUMBER",
            help="Fixes the split, the initial weights and the order of the batches. The same seed gives the same "
            "result with any number of threads.",
        ),
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the loss of every optimizer against the epoch, or the figure of the "
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
            help="Save the run after every epoch (safetensors), so that an interrupted run loses at most the epoch in "
            "progress; Ctrl-C reports the last epoch in the file, with exit code 130. Needs a single optimizer; with "
            "--batch-norm the second run has its own file, "
            "run.batch-norm.safetensors beside run.safetensors.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the --checkpoint FILE, if it exists; the result equals that of an uninterrupted run "
            "bit for bit. The other options must equal those of the run; with a constant schedule --epochs may grow.",
        ),
    ] = False,
) -> None:
    """Train a small network with one or several optimizers and compare them.

    Every optimizer starts from the same weights and uses the same mini-batches.

    The last column of the table is the optimizer's time per step, without forward and backward pass.

    With --compare NAME the runs differ in batch size, schedule, initial weights, and so on, instead of the optimizer.
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
    with blame("--rates"):
        one_of(rates, RATES, "rates")
        if "rates" in given and not comparison.scans:
            raise ValueError("must be given with --compare optimizers, whose learning rates it chooses")
        if rates == "scan" and "rates" in given and rate is not None:
            raise ValueError(f"must be defaults with --lr {lr}, got scan; drop --rates or --lr")
    with blame("--ranks"):
        if ranks > 1 and backend == "cuda":
            raise ValueError("must be 1 with --backend cuda, got several processes, which would share the GPU")
        if ranks > 1 and checkpoint is not None:
            raise ValueError("must be 1 with --checkpoint, got several processes")
        comm = communicator_of(world())
        if comm is not None and "ranks" in given and ranks != comm.size:
            raise ValueError(f"must be {comm.size}, as many processes as were started, or left out, got {ranks}")
        if comm is not None and (backend == "cuda" or checkpoint is not None):
            raise ValueError(f"must be 1 with --backend cuda and with --checkpoint, got {comm.size} processes")
    first = comm is None or comm.rank == 0
    second = {"--checkpoint with --batch-norm": beside(checkpoint)} if checkpoint is not None and batch_norm else {}
    check_files({"--plot": plot, "--json": json, "--checkpoint": checkpoint, **second})
    with blame("--resume"):
        if resume and checkpoint is None:
            raise ValueError("must be given with --checkpoint FILE, the file to continue from")
    with blame("--checkpoint"):
        if checkpoint is not None:
            _check_checkpoint(checkpoint, len(choices), batch_norm, resume)

    if ranks > 1 and comm is None:
        with blame("--ranks"):
            code = start(ranks, given_arguments(ctx, without="ranks"))
        raise typer.Exit(code)
    with waiting(first) as show:
        show(f"loading {dataset}")
        setting = Setting(dataset, widths, chosen("epochs"), backend, seed, comm)
        with blame("--batch-size"):
            rows = len(setting.rows.x_train)
            if rows_per_batch != "full" and rows_per_batch > rows:
                raise ValueError(
                    f"must be at most the {rows} training rows of {dataset}, or full, got {rows_per_batch}"
                )
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
        with blame("--optimizer"):  # make all runs before training: a value out of range ends the command here
            runs = make_runs(plans, setting, checkpoint, show)
    if comparison.scans and rates == "scan" and rate is None:
        runs = scan_rates(runs, setting)
    with blame("--resume"):
        begun = [
            run.keeper.resume() if resume and run.keeper is not None and run.keeper.path.exists() else None
            for run in runs
        ]
    resumed_after = [0 if before is None else before.epochs for before in begun]
    seen = [comparison.look(plan, setting) for plan in plans]
    try:
        outcomes = train_all(runs, setting, begun)
    except KeyboardInterrupt:
        if checkpoint is None:
            raise
        typer.echo(_interrupted([run.keeper for run in runs if run.keeper is not None], setting.epochs), err=True)
        raise typer.Exit(INTERRUPTED) from None

    if not first:
        return  # all ranks have the same results
    results = [Result(*parts) for parts in zip(runs, outcomes, seen, strict=True)]
    settings = settings_of(setting, plans)
    out = console(for_json=json)
    print_results(out, settings, results, comparison.columns, rules=comparison.rules)
    for run, done in zip(runs, resumed_after, strict=True):
        if run.keeper is not None:
            note = f", continued after epoch {done}" if done else ""
            out.print(f"checkpoint: {run.keeper.path}{note}", soft_wrap=True)
    if json is not None:  # first: the figure can be drawn from it, if its own disk is full
        with writing("--json"):
            write_json(json, report(settings, results, compare))
    if plot is not None:
        with writing("--plot"):
            comparison.draw(plot, title_of(settings), results)
        out.print(f"{comparison.picture}: {plot}", soft_wrap=True)


def _interrupted(keepers: Sequence[Keeper], epochs: int) -> str:
    """Return what Ctrl-C left in the files, and how to continue."""
    kept = [
        f"{keeper.path} holds the run after epoch {keeper.epochs} of {epochs}" for keeper in keepers if keeper.epochs
    ]
    if not kept:
        return f"Interrupted in epoch 1: {keepers[0].path} was not written; run the command again from the start"
    return f"Interrupted: {'; '.join(kept)}. To continue, run the command again with --resume"


def _check_batch_norm(widths: Sequence[int], rows: int, batch_rows: int) -> None:
    """Refuse a network without hidden layers, and a batch of one row, which has no variance."""
    if not widths:
        raise ValueError("--hidden: must name at least one layer for batch normalisation, got none")
    if 1 in (batch_rows, rows % batch_rows):
        raise ValueError(
            f"--batch-size: must leave no batch of one of the {rows} rows, which has no variance, got {batch_rows}"
        )


def _check_checkpoint(path: Path, optimizers: int, batch_norm: bool, resume: bool) -> None:
    """Refuse a file that would be overwritten, and more than one optimizer."""
    if optimizers > 1:
        raise ValueError(f"--optimizer: must name one optimizer, got {optimizers}; train them one by one")
    for one in [path, beside(path)] if batch_norm else [path]:
        if one == STDOUT:
            raise ValueError("must be the name of a file, such as run.safetensors, got -")
        if one.exists() and not resume:
            raise FileExistsError(
                f"{one}: must not exist yet; continue it with --resume, delete it, or choose another file"
            )
