"""The command line: one command per file; typer reads the options from the signature of each command."""

from __future__ import annotations

from typing import Annotated

import typer

import fastopt
from fastopt.cli import bench, cache, contour, info, train, warmup

app = typer.Typer(
    help="Train small networks with fastopt's optimizers, draw their paths, measure their speed on this machine, and "
    "compile their kernels ahead.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a plain traceback is what a bug report needs
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("contour", epilog=contour.EXAMPLES)(contour.contour)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("warmup", epilog=warmup.EXAMPLES)(warmup.warmup)
app.command("cache", epilog=cache.EXAMPLES)(cache.cache)
app.command("info", epilog=info.EXAMPLES)(info.info)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(fastopt.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
