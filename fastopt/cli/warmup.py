"""`fastopt warmup`: compiles the kernels of an ordinary training, so that later processes load them from the disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

import fastopt
from fastopt.cli.cache import counted, facts, refuse
from fastopt.cli.choices import FORMS, REFERENCE_BATCH, Choice, one_of, optimizers, parse_optimizers
from fastopt.cli.output import blame, console, one_line, size, waiting
from fastopt.cli.trainer import gradient_point, result_point
from fastopt.kernels import cache as disk
from fastopt.kernels.bind import WAIT
from fastopt.kernels.driver import SERIAL_BELOW_ELSEWHERE
from fastopt.kernels.threads import get_num_threads, using

EXAMPLES = "\n\n".join(
    [
        "[bold]Examples[/bold]",
        "fastopt warmup",
        "fastopt warmup --optimizer adam,momentum:ema",
        "fastopt warmup --optimizer adamw:weight_decay=0.1 --dtype all --batch-norm",
        "FASTOPT_CACHE_DIR=/opt/kernels fastopt warmup",
    ]
)

DTYPES = ("float32", "float64")

SIDE = 272
"""Rows and columns of the parameter. Its steps are worth a second thread, also on threads that are not our own."""
assert SIDE**2 > SERIAL_BELOW_ELSEWHERE

STEPS = 2
"""Steps of every kind: the threads are compiled at the second one."""

SHAPES = ((64, 16), (16384, 16), (8, 16, 4, 4), (64, 8, 32, 32))
"""The inputs of BatchNorm: matrices and maps, small ones for one thread and large ones for several."""


def warmup(
    optimizer: Annotated[
        list[str],
        typer.Option(
            "--optimizer",
            "-o",
            metavar="NAME[:OPTION...]",
            help=f"{', '.join(optimizers())}, or all (these, and {', '.join(FORMS)}). Several: repeat the option, or "
            "separate them by commas. Options of an optimizer follow its name after colons: momentum:ema, "
            "adam:amsgrad, adam:weight_decay=0.01. Options that switch something on, such as a weight decay, need "
            "kernels of their own; other values of a number do not.",
        ),
    ] = ["all"],  # noqa: B006 typer takes a default list this way
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32, float64, or all (both).")] = "float32",
    batch_norm: Annotated[
        bool,
        typer.Option("--batch-norm", help="Also compile BatchNorm: training and inference, with and without ReLU."),
    ] = False,
) -> None:
    """Fill the cache of compiled kernels, so that no later process waits for the compiler: in containers and on CI.

    Compiles, or finds in the cache, the kernels that an ordinary training on the CPU needs: steps on the optimizer's
    own gradients and on given ones, with and without max_norm, on one thread and on several.

    A kernel fits this kind of processor, these versions of fastopt, numba and Python, and no other. The exit code is 1
    where the cache is off or cannot be written.
    """
    with blame("--optimizer"):
        choices = parse_optimizers(optimizer)
    with blame("--dtype"):
        dtypes = DTYPES if one_of(dtype, (*DTYPES, "all"), "dtype") == "all" else (dtype,)
    _check_cache()
    tasks = [(choice.label, name, partial(_warm_optimizer, choice, name)) for choice, name in product(choices, dtypes)]
    if batch_norm:
        tasks += [
            ("BatchNorm", name, partial(_warm_batchnorm, name, training, activation))
            for name, training, activation in product(dtypes, (True, False), (None, "relu"))
        ]
    before = WAIT.compiled, WAIT.kept, WAIT.loaded
    started = perf_counter()
    # On one processor as well the threads are compiled, for processes that have more.
    with _failing_with_the_cache(), blame("--optimizer"), using(max(2, get_num_threads())), waiting() as show:
        for k, (label, name, warm) in enumerate(tasks):
            show(f"compiling {label} {name}" if len(dtypes) > 1 else f"compiling {label}", k, len(tasks))
            warm()
    seconds = perf_counter() - started
    compiled, kept, loaded = (
        now - then for now, then in zip((WAIT.compiled, WAIT.kept, WAIT.loaded), before, strict=True)
    )
    found = facts()
    unkept = f" ({compiled - kept} of them cannot be kept on disk)" if compiled > kept else ""
    console().print(
        f"{counted(compiled)} compiled{unkept}, {loaded} found, in {seconds:.1f} s; {found['directory']} has "
        f"{counted(found['kernels'])}, {size(found['bytes'])}",
        soft_wrap=True,
    )


def _check_cache() -> None:
    """Make the directory; end the command with the reason if kernels cannot be kept there."""
    found = facts()
    if found["usable"]:
        try:
            disk.checked_directory()
            found = facts()
        except OSError as error:
            found |= {"usable": False, "reason": one_line(error)}
    if not found["usable"] or found["reason"] is not None:  # a directory that can only be read has a reason as well
        refuse(found)


@contextmanager
def _failing_with_the_cache() -> Iterator[None]:
    """End the command when a kernel cannot be read or kept: the library itself goes on with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", disk.VARIABLE, RuntimeWarning)
        try:
            yield
        except RuntimeWarning as warning:
            refuse({"reason": one_line(warning.__context__ or warning)})


def _warm_optimizer(choice: Choice, dtype: str) -> None:
    """Make the steps of an ordinary training."""
    rng = np.random.default_rng(0)
    for max_norm in (None, 1.0):
        params = {"W": rng.normal(size=(SIDE, SIDE)).astype(dtype), "b": np.zeros(SIDE, dtype)}
        grads = {path: rng.normal(size=value.shape).astype(dtype) for path, value in params.items()}
        options = {"lr": choice.lr(REFERENCE_BATCH), "max_norm": max_norm, **choice.options}
        opt = choice.kind(params, **options)
        for given in (None, grads):
            for _ in range(STEPS):
                with gradient_point(opt, choice.looks_ahead):
                    for path, value in grads.items():
                        opt.grads[path][...] = value
                opt.step() if given is None else opt.step(given)
        with result_point(opt):
            pass


def _warm_batchnorm(dtype: str, training: bool, activation: str | None) -> None:
    """Go forwards and backwards through BatchNorm."""
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        x, dy = (rng.normal(size=shape).astype(dtype) for _ in range(2))
        channelwise = (np.full(shape[1], value, dtype) for value in (1.0, 0.0, 0.0, 1.0))
        forward = partial(fastopt.batchnorm_forward, x, *channelwise, training=training, activation=activation)
        for out in (None, dy):  # trainers often write one gradient over the other
            for _ in range(STEPS):
                fastopt.batchnorm_backward(dy, forward()[1], out=out)
        if not training:
            for _ in range(STEPS):
                forward(out=x)
