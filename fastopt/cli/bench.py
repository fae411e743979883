"""`fastopt bench`: the speed of the optimizers and of BatchNorm here, against NumPy, torch and the memory's limit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

import fastopt
from fastopt import get_num_threads
from fastopt.cli.choices import Choice, one_of, optimizers, parse_optimizers, parse_shapes, parse_sizes
from fastopt.cli.output import blame, check_files, console, spelled, waiting, write_json, writing
from fastopt.kernels.threads import processors, using
from fastopt.measure import Result, Work, compare_batchnorm, compare_company, compare_step, machine
from fastopt.measure.company import ways
from fastopt.measure.rivals import enter, of_fastopt, torch_as_before

EXAMPLES = "\n\n".join(
    [
        "[bold]Examples[/bold]",
        "fastopt bench",
        "fastopt bench --plot speed.png --json speed.json",
        "fastopt bench --optimizer adam,lion --sizes 1k,1M,30M --dtype float64",
        "fastopt bench --optimizer all --sizes 1M --seconds 120 --no-batch-norm",
        "fastopt bench --shapes 32x64,256x1024,32x256x14x14",
        "fastopt bench --threads 1",
    ]
)

RIVALS = ("numpy", "torch fused", "torch")
"""The members of `fastopt.measure.RIVALS` that need no compiling: the command should finish within a minute."""

SECONDS = 42.0
"""Default duration of the command."""

VISITS = 3
"""Passes over all cases, each with newly made contestants: a drift of the machine, or an unlucky place in memory, then
affects some rounds of many cases instead of all rounds of one case."""

ROUNDS = 2
"""Minimum number of rounds per visit."""

LEAST = 0.05
"""Minimum number of seconds per visit, even when no time is left."""

BUSY = 0.1
"""Share of the processors' time above which the command reports that other programs are running."""

COMPANY = "two products and Adam 100k"
"""Title of the iteration whose parts are measured together."""

PACKAGES = ("numba", "numpy", "torch")


class Case(NamedTuple):
    """A table row: its title, and a function of ``seconds``, ``after_round`` and the ``times`` of earlier visits."""

    title: str
    run: Callable[..., Result]


def bench(
    optimizer: Annotated[
        list[str],
        typer.Option(
            "--optimizer",
            "-o",
            metavar="NAME[:OPTION...]",
            help=f"{', '.join(optimizers())}, or all. Several: repeat the option, or separate them by commas. Options "
            "of an optimizer follow its name after colons: adam:amsgrad, rmsprop:momentum=0.9.",
        ),
    ] = ["sgd,momentum,adam,adamw"],  # noqa: B006 typer takes a default list this way
    sizes: Annotated[
        str,
        typer.Option(
            metavar="NUMBERS",
            help="Numbers of parameters, separated by commas; k, M and G stand for 1e3, 1e6 and 1e9. A size that does "
            "not fit into the free memory is skipped and reported.",
        ),
    ] = "1k,10k,100k,1M,10M",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32 or float64.")] = "float32",
    seconds: Annotated[
        float,
        typer.Option(metavar="NUMBER", help="Approximate duration of the whole measurement in seconds, from 1."),
    ] = SECONDS,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="NUMBER", help="Threads of fastopt and torch, from 1.", show_default="all"),
    ] = None,
    batch_norm: Annotated[
        bool, typer.Option("--batch-norm/--no-batch-norm", help="Also measure BatchNorm, in float32.")
    ] = True,
    shapes: Annotated[
        str,
        typer.Option(
            metavar="SHAPES",
            help="Shapes of the input of BatchNorm, separated by commas: NxC for matrices, the activations of dense "
            "layers, and NxCxHxW for images.",
        ),
    ] = "64x128,256x1024,32x256x14x14,64x64x28x28",
    company: Annotated[
        bool,
        typer.Option("--company/--no-company", help="Also measure a step of Adam that follows two NumPy matmuls."),
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the throughput of every optimizer against the size (.png, .pdf, .svg)."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all measurements as JSON; - is standard output.")
    ] = None,
) -> None:
    """Measure the optimizers on this machine: the time per step, and how close it is to the limit of the memory.

    The contestants of a table row take turns, so other load on the machine affects all of them alike. Every row is
    measured in three passes, and the table shows medians. The limit is a kernel that reads and writes the same buffers
    and computes almost nothing.

    No rival needs to be installed: torch is measured if it is there.
    """
    with blame("--optimizer"):
        choices = parse_optimizers(optimizer)
    with blame("--sizes"):
        counts = parse_sizes(sizes)
    with blame("--shapes"):
        inputs = parse_shapes(shapes) if batch_norm else []
    with blame("--dtype"):
        one_of(dtype, ("float32", "float64"), "dtype")
    with blame("--seconds"):
        if not 1.0 <= seconds < math.inf:
            raise ValueError(f"must be a finite number of seconds from 1, such as {SECONDS:g}, got {seconds:g}")
    with blame("--threads"):
        if threads is not None and threads > processors():
            raise ValueError(f"must be at most {processors()}, the number of processors, got {threads}")
    check_files({"--plot": plot, "--json": json})

    out = console(for_json=json)
    machine.keep_freed_memory()
    others = machine.OtherPrograms()
    with using(threads or get_num_threads()), torch_as_before():
        with blame("--optimizer"):
            steps, norms = _cases(choices, counts, dtype, inputs)
            together = [Case(COMPANY, _company)] if company else []
        results, skipped = _measure([*steps, *norms, *together], seconds)
        by_title = {result.title: result for result in results}
        step_results = [by_title[case.title] for case in steps if case.title in by_title]
        norm_results = [by_title[case.title] for case in norms if case.title in by_title]
        facts = machine.describe()
        _print(out, step_results, norm_results, skipped, facts, dtype)
        if COMPANY in by_title:
            out.print(_company_table(by_title[COMPANY]))
        share = others.share()
        if share is not None and share > BUSY:
            out.print(_busy(share, results))
        if json is not None:  # first: the figure can be drawn from it, if its own disk is full
            with writing("--json"):
                write_json(json, {**_report(results, skipped, facts, dtype, seconds), "others_share": share})
        if plot is not None and step_results:
            from fastopt.cli.plots.speed import draw_throughput

            panels = {
                choice.label: [r for r in step_results if r.title.startswith(f"{choice.label} ")] for choice in choices
            }
            panels = {label: results for label, results in panels.items() if results}
            with writing("--plot"):
                draw_throughput(plot, _title(facts, dtype), panels, machine.caches())
            out.print(f"throughput: {plot}", soft_wrap=True)


def _company(*, seconds: float, after_round: Callable[[], object], times: dict[str, list[np.ndarray]]) -> Result:
    work = Work("Adam", ((100_000,),))
    entered, absent = enter(work, ["torch fused"])
    steps, before = ways(of_fastopt(work).step)
    steps |= {name: each.step for name, each in entered.items()}
    try:
        return compare_company(
            COMPANY,
            steps,
            seconds=seconds,
            rounds=ROUNDS,
            before=before,
            after_round=after_round,
            times=times,
            absent=absent,
        )
    finally:
        before["fastopt"]()


def _cases(
    choices: Sequence[Choice], counts: Sequence[int], dtype: str, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[Case], list[Case]]:
    steps = []
    with waiting() as show:
        for k, choice in enumerate(choices):
            show(f"compiling {choice.label}", k, len(choices))
            choice.kind([np.zeros(1, dtype)], **_options(choice))  # raises for values out of range
    for choice in choices:
        options = _options(choice)
        for count in counts:
            work = Work(choice.kind.__name__, (_shape(choice, count),), dtype, options)
            title = f"{choice.label} {spelled(count)}"
            limit = choice.kind is not fastopt.Muon  # Muon's time is that of its matrix products
            steps.append(Case(title, partial(compare_step, title, work, RIVALS, rounds=ROUNDS, limit=limit)))
    norms = []
    for shape in shapes:
        for way in ("forward", "backward"):
            title = f"{'x'.join(map(str, shape))} {way}"
            norms.append(Case(title, partial(compare_batchnorm, title, shape, way=way, rounds=ROUNDS)))
    return steps, norms


def _options(choice: Choice) -> dict[str, Any]:
    return choice.options if choice.given_lr is None else {**choice.options, "lr": choice.given_lr}


def _shape(choice: Choice, count: int) -> tuple[int, ...]:
    """Return the shape of the one parameter: a vector, or for Muon, which needs a matrix, the one closest to square."""
    if choice.kind is not fastopt.Muon:
        return (count,)
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    return (rows, count // rows)


def _measure(cases: Sequence[Case], seconds: float) -> tuple[list[Result], dict[str, str]]:
    """Return the results, and the reasons for skipped cases by title.

    Every visit gets its share of the remaining seconds: later visits make up for time that an earlier one spent on
    compiling, and the progress bar, which shows seconds, stays accurate.
    """
    results: dict[str, Result] = {}
    skipped: dict[str, str] = {}
    times: dict[str, dict[str, list[float]]] = {case.title: {} for case in cases}
    start = perf_counter()
    with _progress() as bar:
        task = bar.add_task("", total=seconds)

        def tick() -> None:
            bar.update(task, completed=min(perf_counter() - start, seconds))

        for k, case in enumerate(case for _ in range(VISITS) for case in cases):
            bar.update(task, description=f"{case.title} ({k + 1} of {VISITS * len(cases)})")
            share = (seconds - (perf_counter() - start)) / (VISITS * len(cases) - k)
            try:
                results[case.title] = case.run(seconds=max(share, LEAST), after_round=tick, times=times[case.title])
                skipped.pop(case.title, None)
            except MemoryError as error:
                if case.title not in results:
                    skipped[case.title] = str(error)
            tick()
        bar.update(task, completed=seconds)
    return list(results.values()), skipped


def _progress() -> Progress:
    """Return a progress bar of seconds on standard error; it shows nothing unless standard error is a terminal."""
    return Progress(
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


# --- output -----------------------------------------------------------------------------------------------------------


def _print(
    out: Console,
    steps: Sequence[Result],
    norms: Sequence[Result],
    skipped: dict[str, str],
    facts: dict[str, Any],
    dtype: str,
) -> None:
    """Print the tables and the meaning of their columns, within 80 columns."""
    out.print(_title(facts, dtype), soft_wrap=True)
    for heading, results in (("step", steps), ("BatchNorm", norms)):
        if results:
            out.print(_table(heading, results))
    for title, reason in skipped.items():
        out.print(f"{title} skipped: {reason}", soft_wrap=True)
    out.print(
        "us: microseconds per call, the median over the rounds. 8 of 10: the range that holds 8 of 10 rounds. GB/s: "
        "bytes that must be read and written, divided by the time; numbers above the memory's speed come from the "
        "caches. of limit: the time of a kernel that moves the same bytes and computes almost nothing, divided by "
        "ours. Rivals: their time divided by ours. Every ratio is taken within a round; the table shows the medians."
    )
    reasons = dict.fromkeys(reason for result in (*steps, *norms) for reason in result.absent.values())
    for reason in reasons:
        out.print(reason, soft_wrap=True)


def _table(heading: str, results: Sequence[Result]) -> Table:
    rivals = [name for name in RIVALS if any(name in result.seconds for result in results)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(heading, overflow="fold")
    for column in ("us", "8 of 10", "GB/s", "of\nlimit", *(name.replace(" ", "\n") for name in rivals)):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        low, high = (_figures(1e6 * seconds) for seconds in (result.ours.low, result.ours.high))
        share = result.times("limit")
        cells = [_figures(1e6 * result.ours.median), f"{low}-{high}", f"{result.bandwidth():.1f}"]
        cells.append("-" if share is None else f"{share:.0%}")
        for name in rivals:
            times = result.times(name)
            cells.append("-" if times is None else f"{_figures(times)}x")
        table.add_row(result.title, *cells)
    return table


def _company_table(result: Result) -> Table:
    """Return the table of an iteration and its parts: ours in microseconds, the rivals as multiples of ours."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("in company", overflow="fold")
    for column in ("us", *(name.replace(" ", "\n") for name in list(result.seconds)[1:])):
        table.add_column(column, justify="right", no_wrap=True)
    for label, part in ((result.title, "iteration"), ("- the products", "work"), ("- the step", "step")):
        (median, *_), *others = result.facts["parts"][part].values()
        table.add_row(label, _figures(1e6 * median), *(f"{_figures(ratio)}x" for _, ratio, *_ in others))
    return table


def _busy(share: float, results: Sequence[Result]) -> str:
    """Return the sentence that reports a busy machine and its effect on the numbers."""
    slower = [result.ours.median / result.ours.low for result in results if result.ours.low > 0.0]
    return (
        f"This machine is busy: other programs had {share:.0%} of its processors' time, and the median round of "
        f"fastopt took {np.median(slower):.1f} times as long as its fastest; trust the ratios, not the microseconds."
    )


def _figures(number: float) -> str:
    """Format with at least three significant figures."""
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _title(facts: dict[str, Any], dtype: str) -> str:
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := machine.version_of(name)))
    count = get_num_threads()
    return f"{facts['cpu']}, {count} thread{'s' if count > 1 else ''}, {dtype}; {versions}"


def _report(
    results: Sequence[Result], skipped: dict[str, str], facts: dict[str, Any], dtype: str, seconds: float
) -> dict[str, Any]:
    """Return the content of ``--json``; times in seconds: median, 10th and 90th percentile, rounds, ratio."""
    return {
        "fastopt": fastopt.__version__,
        "command": "bench",
        "settings": {"dtype": dtype, "seconds": seconds, "threads": get_num_threads()},
        "machine": facts,
        "versions": {name: machine.version_of(name) for name in PACKAGES},
        "results": [result.record() for result in results],
        "skipped": skipped,
    }
