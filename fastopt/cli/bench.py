"""`fastopt bench`: how fast the optimizers and BatchNorm are here, against NumPy, torch, and what the memory allows."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
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
from fastopt.cli.choices import Choice, one_of, optimizers, parse_optimizers, parse_sizes
from fastopt.cli.output import blame, check_files, console, write_json
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
        "fastopt bench --threads 1",
    ]
)

RIVALS = ("numpy", "torch fused", "torch")
"""Those of `fastopt.measure.RIVALS` that need no compiling: the command is to be done in a minute."""

SHAPES = ((32, 256, 14, 14), (64, 64, 28, 28))
"""Of the images that BatchNorm is measured on: (N, C, H, W)."""

SECONDS = 42.0
"""What the command measures for, unless it is told."""

VISITS = 3
"""Times that all cases are gone through, each with contestants made anew: a drift of the machine, or an unlucky place
in memory, then hits a part of the rounds of many cases and not all rounds of one."""

ROUNDS = 2
"""Least of a visit."""

LEAST = 0.05
"""Seconds for a visit, whatever time is left."""

BUSY = 0.1
"""The share of the processors' time from which the user is told that other programs are running."""

COMPANY = "two products and Adam 100k"
"""What an iteration is called whose parts are measured together."""

PACKAGES = ("numba", "numpy", "torch")


class Case(NamedTuple):
    """A line of a table: what to call with ``seconds``, ``after_round`` and the ``times`` of the visits before."""

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
    ] = ["sgd,momentum,adam,adamw"],  # noqa: B006 typer's way to say a default list
    sizes: Annotated[
        str,
        typer.Option(
            metavar="NUMBERS",
            help="Numbers of parameters, separated by commas; k, M and G stand for 1e3, 1e6 and 1e9. A size that does "
            "not fit into the free memory is left out, with a word about it.",
        ),
    ] = "1k,10k,100k,1M,10M",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32 or float64.")] = "float32",
    seconds: Annotated[
        float,
        typer.Option(metavar="NUMBER", help="About how long the whole is to take, in seconds, from 1."),
    ] = SECONDS,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="NUMBER", help="Threads of fastopt and torch, from 1.", show_default="all"),
    ] = None,
    batch_norm: Annotated[
        bool, typer.Option("--batch-norm/--no-batch-norm", help="Measure BatchNorm too, in float32.")
    ] = True,
    company: Annotated[
        bool,
        typer.Option("--company/--no-company", help="Measure a step of Adam after two matrix products of NumPy's too."),
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the throughput of every optimizer against the size (.png, .pdf, .svg)."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything measured as JSON; - is standard output.")
    ] = None,
) -> None:
    """Measure the optimizers on this machine: time per step, and how near it is to what the memory allows.

    All contestants of a line take turns, so that whatever else the machine does hits all alike, and every line is
    visited three times; what is printed are medians. The limit is a kernel that reads and writes the same buffers and
    computes next to nothing.

    Nothing has to be installed to compare with: torch takes part where it is there.
    """
    with blame("--optimizer"):
        choices = parse_optimizers(optimizer)
    with blame("--sizes"):
        counts = parse_sizes(sizes)
    with blame("--dtype"):
        one_of(dtype, ("float32", "float64"), "dtype")
    with blame("--seconds"):
        if not 1.0 <= seconds < math.inf:
            raise ValueError(
                f"{seconds:g} is too short or no time; give a number of seconds from 1, such as {SECONDS:g}"
            )
    with blame("--threads"):
        if threads is not None and threads > processors():
            raise ValueError(f"{threads} threads are more than the {processors()} processors that there are")
    check_files(plot, json)

    out = console(for_json=json)
    machine.keep_freed_memory()
    others = machine.OtherPrograms()
    with using(threads or get_num_threads()), torch_as_before():
        with blame("--optimizer"):
            steps, norms = _cases(choices, counts, dtype, batch_norm)
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
        if plot is not None and step_results:
            from fastopt.cli.plots.speed import draw_throughput

            with blame("--plot"):
                panels = {
                    choice.label: [r for r in step_results if r.title.startswith(f"{choice.label} ")]
                    for choice in choices
                }
                panels = {label: results for label, results in panels.items() if results}
                draw_throughput(plot, _title(facts, dtype), panels, machine.caches())
            out.print(f"throughput: {plot}", soft_wrap=True)
        if json is not None:
            with blame("--json"):
                write_json(json, {**_report(results, skipped, facts, dtype, seconds), "others_share": share})


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
    choices: Iterable[Choice], counts: Sequence[int], dtype: str, batch_norm: bool
) -> tuple[list[Case], list[Case]]:
    steps = []
    for choice in choices:
        options = choice.options if choice.given_lr is None else {**choice.options, "lr": choice.given_lr}
        choice.kind([np.zeros(1, dtype)], **options)  # a value that is out of range ends the command here
        for count in counts:
            work = Work(choice.kind.__name__, (_shape(choice, count),), dtype, options)
            title = f"{choice.label} {spelled(count)}"
            limit = choice.kind is not fastopt.Muon  # whose time is that of products of matrices
            steps.append(Case(title, partial(compare_step, title, work, RIVALS, rounds=ROUNDS, limit=limit)))
    norms = []
    for shape in SHAPES if batch_norm else ():
        for way in ("forward", "backward"):
            title = f"{'x'.join(map(str, shape))} {way}"
            norms.append(Case(title, partial(compare_batchnorm, title, shape, way=way, rounds=ROUNDS)))
    return steps, norms


def _shape(choice: Choice, count: int) -> tuple[int, ...]:
    """Of the one parameter: a vector, and for Muon, which makes matrices orthogonal, the squarest matrix there is."""
    if choice.kind is not fastopt.Muon:
        return (count,)
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    return (rows, count // rows)


def _measure(cases: Sequence[Case], seconds: float) -> tuple[list[Result], dict[str, str]]:
    """The results, and the titles of what could not be measured with the reasons.

    Every visit to a case is given its share of the seconds that are left, so that what one has spent on compiling is
    saved by the others, and the bar, which shows seconds, tells the truth.
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
    """A bar of the seconds on standard error, where that is a terminal; nothing where it is a file or a pipe."""
    return Progress(
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


# --- what is told -----------------------------------------------------------------------------------------------------


def spelled(count: int) -> str:
    """A number of parameters as it is given: 1000 as 1k, 2500000 as 2.5M.

    >>> spelled(1000), spelled(2_500_000), spelled(1234)
    ('1k', '2.5M', '1234')
    """
    for unit, sign in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit and count * 10 % unit == 0:
            return f"{count / unit:g}{sign}"
    return str(count)


def _print(
    out: Console,
    steps: Sequence[Result],
    norms: Sequence[Result],
    skipped: dict[str, str],
    facts: dict[str, Any],
    dtype: str,
) -> None:
    """The tables, and what their columns mean; narrow enough for a terminal of 80 columns."""
    out.print(_title(facts, dtype), soft_wrap=True)
    for heading, results in (("step", steps), ("BatchNorm", norms)):
        if results:
            out.print(_table(heading, results))
    for title, reason in skipped.items():
        out.print(f"{title} left out: {reason}", soft_wrap=True)
    out.print(
        "us: microseconds per call, the median of the rounds, and between which times 8 of 10 rounds lie. GB/s: bytes "
        "that have to be read and written, by the time; beyond the speed of the memory, the caches help. of limit: the "
        "time of a kernel that moves the same bytes and computes next to nothing, by ours. Others: how many times as "
        "long they take. Ratios are medians of those within a round."
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
    """An iteration and its parts: ours in microseconds, the others by how many times as long they take."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("in company", overflow="fold")
    for column in ("us", *(name.replace(" ", "\n") for name in list(result.seconds)[1:])):
        table.add_column(column, justify="right", no_wrap=True)
    for label, part in ((result.title, "iteration"), ("- the products", "work"), ("- the step", "step")):
        (median, *_), *others = result.facts["parts"][part].values()
        table.add_row(label, _figures(1e6 * median), *(f"{_figures(ratio)}x" for _, ratio, *_ in others))
    return table


def _busy(share: float, results: Sequence[Result]) -> str:
    """One sentence: that the machine is busy, and what that did to the numbers."""
    slower = [result.ours.median / result.ours.low for result in results if result.ours.low > 0.0]
    return (
        f"This machine is busy: other programs had {share:.0%} of its processors' time, and the median round of "
        f"fastopt took {np.median(slower):.1f} times as long as its fastest; trust the ratios, not the microseconds."
    )


def _figures(number: float) -> str:
    """Three figures or more."""
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _title(facts: dict[str, Any], dtype: str) -> str:
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := machine.version_of(name)))
    count = get_num_threads()
    return f"{facts['cpu']}, {count} thread{'s' if count > 1 else ''}, {dtype}; {versions}"


def _report(
    results: Sequence[Result], skipped: dict[str, str], facts: dict[str, Any], dtype: str, seconds: float
) -> dict[str, Any]:
    """What ``--json`` writes; times in seconds: the median, the 10th and 90th percentile, the rounds, the ratio."""
    return {
        "fastopt": fastopt.__version__,
        "command": "bench",
        "settings": {"dtype": dtype, "seconds": seconds, "threads": get_num_threads()},
        "machine": facts,
        "versions": {name: machine.version_of(name) for name in PACKAGES},
        "results": [result.record() for result in results],
        "skipped": skipped,
    }
