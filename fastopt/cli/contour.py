"""`fastopt contour`: the paths of optimizers on a function of x and y, as a table, a picture and an animation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fastopt
from fastopt.cli.choices import Choice, check_lr, parse_optimizers
from fastopt.cli.descent import LEARNING_RATES, Outcome, descend, measure, suggest_lr
from fastopt.cli.expression import CONSTANTS, FUNCTIONS
from fastopt.cli.output import blame, check_files, console, progress, write_json, writing
from fastopt.cli.surfaces import SURFACES, Point, Surface, Window, placed, surface_of

EXAMPLES = "\n\n".join(
    [
        "[bold]Examples[/bold]",
        "fastopt contour --plot paths.png",
        "fastopt contour --function rosenbrock --optimizer momentum,nesterov,adam --animate paths.gif",
        "fastopt contour --function 'x^4 + x*y + (1 + y)^2' --start 1,2 --window=-2,2,-3,3 --plot paths.svg",
        "fastopt contour --function saddle --optimizer all --steps 300 --json paths.json",
        "fastopt contour --optimizer sgd:lr=0.95,sgd:lr=0.5,momentum:momentum=0.5:lr=0.1 --plot paths.png",
    ]
)

TOLERANCE = 0.01
"""Default ``--tolerance``, as a fraction of the shorter side of the window."""
MESH = 301
"""Points per side at which the picture evaluates the function."""


class Run(NamedTuple):
    """An optimizer, its learning rate, and the outcome of its path."""

    choice: Choice
    lr: float
    outcome: Outcome


def contour(
    function: Annotated[
        str,
        typer.Option(
            "--function",
            "-f",
            metavar="NAME|EXPRESSION",
            help="; ".join(f"{name} ({surface.f.text})" for name, surface in SURFACES.items())
            + f"; or an expression in x and y of + - * / ^ and {', '.join(FUNCTIONS)}, {', '.join(CONSTANTS)}.",
        ),
    ] = "bowl",
    optimizer: Annotated[
        list[str],
        typer.Option(
            "--optimizer",
            "-o",
            metavar="NAME[:OPTION...]",
            help="Names as in fastopt train, or all. Several: repeat the option, or separate them by commas. Options "
            "of an optimizer follow its name after colons: momentum:ema, adam:lr=0.3, adam:betas=0.9/0.99.",
        ),
    ] = ["sgd,momentum,adagrad,adam"],  # noqa: B006 typer takes a default list this way
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Learning rate, from 0, of every optimizer without an lr= of its own.",
            show_default=f"found by trying {LEARNING_RATES[0]:g}, {LEARNING_RATES[1]:g}, {LEARNING_RATES[2]:g}, ..., "
            f"{LEARNING_RATES[-1]:g}; on the bowl, fixed rates for sgd, momentum, adagrad and adam",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100_000,
            metavar="NUMBER",
            help="Number of steps of every optimizer, from 1 to 100000.",
            show_default=", ".join(f"{surface.name} {surface.steps}" for surface in SURFACES.values())
            + f", an expression {Surface.steps}",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="X,Y", help="Start of the paths.", show_default="depends on the function"),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="LEFT,RIGHT,BOTTOM,TOP",
            help="The part of the plane to draw and to search for minima.",
            show_default="depends on the function; -5,5,-5,5 for an expression",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Distance from a minimum, above 0, within which the minimum counts as reached.",
            show_default="a hundredth of the shorter side of the window",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw contour lines, start, minima and paths (.png, .pdf, .svg)."),
    ] = None,
    animate: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the paths as they grow (.gif).")] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write settings, results and paths as JSON; - is standard output."),
    ] = None,
) -> None:
    """Show the paths of optimizers on a function of two variables, and the number of steps to its minimum.

    A minimum is reached at the first step after which the path stays within --tolerance of it until the end.

    Minima of an expression are searched inside the window; only those that share the lowest value count.

    The command is deterministic: the same command gives the same paths.
    """
    with blame("--function"):
        surface = surface_of(function)
    with blame("--lr"):
        lr = None if lr is None else check_lr(lr, "learning rate")
    with blame("--optimizer"):
        choices = parse_optimizers(optimizer, lr)
    with blame("--window"):
        seen = None if window is None else _parse_window(window)
    with blame("--start"):
        begin = None if start is None else Point(*_numbers(start, ("X", "Y")))
        surface = placed(surface, begin, seen)
    with blame("--tolerance"):
        near = TOLERANCE * surface.window.extent if tolerance is None else _check_tolerance(tolerance)
    check_files({"--plot": plot, "--animate": animate, "--json": json})

    count = surface.steps if steps is None else steps
    with blame("--optimizer"):  # make all optimizers before the first step: a value out of range ends the command here
        for choice in choices:
            descend(surface, choice, [1.0 if choice.given_lr is None else choice.given_lr], 0)
    runs = []
    with progress("steps") as bar:
        for choice in choices:
            task = bar.add_task(choice.label, total=count)
            chosen = choice.given_lr
            if chosen is None:
                chosen = surface.learning_rates.get(choice.label)
            if chosen is None:
                chosen = suggest_lr(surface, choice, near)
            (points,) = descend(surface, choice, [chosen], count, partial(bar.advance, task))
            bar.update(task, completed=count)
            runs.append(Run(choice, chosen, measure(surface, points, count, near)))

    out = console(for_json=json)
    _print_results(out, surface, runs, count, near)
    if json is not None:  # first: a picture can be drawn from it, if its own disk is full
        with writing("--json"):
            write_json(json, _report(surface, runs, count, near))
    if plot is not None or animate is not None:
        from fastopt.cli.plots.paths import Scene, animate_paths, draw_paths, frames_of

        x, y = surface.window.mesh(MESH)
        paths = {_legend(run, count): run.outcome.points for run in runs}
        lowest = min((float(surface.f(*point)) for point in surface.minima), default=math.inf)
        scene = Scene(_title(surface, count), x, y, surface.f(x, y), lowest, surface.start, surface.minima, paths)
        if plot is not None:
            with writing("--plot"):
                draw_paths(plot, scene)
            out.print(f"picture: {plot}", soft_wrap=True)
        if animate is not None:
            with progress("frames") as bar, writing("--animate"):
                task = bar.add_task("animation", total=len(frames_of(scene)))
                animate_paths(animate, scene, lambda: bar.advance(task))
            out.print(f"animation: {animate}", soft_wrap=True)


def _numbers(text: str, names: Sequence[str]) -> list[float]:
    words = text.split(",")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != len(names) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"must be {len(names)} finite numbers separated by commas, {','.join(names)}, got {text!r}")
    return numbers


def _parse_window(text: str) -> Window:
    window = Window(*_numbers(text, ("LEFT", "RIGHT", "BOTTOM", "TOP")))
    if 0.0 < window.width < math.inf and 0.0 < window.height < math.inf:
        return window
    raise ValueError(f"must have LEFT below RIGHT and BOTTOM below TOP, such as -2,2,-1,3, got {text!r}")


def _check_tolerance(tolerance: float) -> float:
    if math.isfinite(tolerance) and tolerance > 0.0:
        return tolerance
    raise ValueError(f"must be a finite number above 0, such as 0.1, got {tolerance}")


def _point(point: Point) -> str:
    return f"({point.x:.4g}, {point.y:.4g})"


def _title(surface: Surface, steps: int) -> str:
    name = f"{surface.name}: " if surface.name else ""
    return f"{name}f(x, y) = {surface.f.text}\n{steps} steps from {_point(surface.start)}"


def _steps_to_minimum(run: Run, steps: int) -> str:
    if run.outcome.reached is not None:
        return str(run.outcome.reached)
    return {"diverged": "diverged", "left": "left the window"}.get(run.outcome.status, f"not in {steps}")


def _legend(run: Run, steps: int) -> str:
    label = run.choice.label if "lr=" in run.choice.label else f"{run.choice.label}, lr {run.lr:.4g}"
    return f"{label}: {_steps_to_minimum(run, steps)}"


def _print_results(out: Console, surface: Surface, runs: Sequence[Run], steps: int, tolerance: float) -> None:
    """Print the table and the meaning of its columns, within 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer", overflow="fold")
    for heading in ("lr", "steps to\na minimum", "final\nf(x, y)", "final\ndistance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        distance = "-" if run.outcome.distance is None else f"{run.outcome.distance:.3g}"
        table.add_row(
            run.choice.label, f"{run.lr:.4g}", _steps_to_minimum(run, steps), f"{run.outcome.value:.4g}", distance
        )
    out.print(_title(surface, steps))
    out.print(table)
    for run in runs:
        label = run.choice.label
        made = len(run.outcome.points) - 1
        if made < steps:
            out.print(f"{label}: after step {made} the function or its gradient is not finite.")
        if run.outcome.status == "diverged":
            out.print(f"{label} diverged; try a learning rate below {run.lr:.4g}.")
        elif run.outcome.status == "left":
            x, y = run.outcome.points[-1]
            out.print(f"{label} left the window downhill and ended at {_point(Point(x, y))}; widen --window.")
    if surface.minima:
        count = len(surface.minima)
        shown = ", ".join(map(_point, surface.minima[:6])) + (f" and {count - 6} more" if count > 6 else "")
        value = float(surface.f(*surface.minima[0]))
        out.print(f"{'minimum' if count == 1 else 'minima'}: {value:.4g} at {shown}.")
    else:
        out.print("minimum: none found inside the window; choose another --window.")
    out.print(
        f"steps to a minimum: steps until the path stays within {tolerance:.4g} of one. distance: to the nearest "
        "minimum."
    )


def _report(surface: Surface, runs: Sequence[Run], steps: int, tolerance: float) -> dict[str, Any]:
    """Return the content of ``--json``, which is the same in every run of one command."""
    return {
        "fastopt": fastopt.__version__,
        "command": "contour",
        "settings": {
            "function": surface.name or None,
            "expression": surface.f.text,
            "start": list(surface.start),
            "window": list(surface.window),
            "minima": [list(point) for point in surface.minima],
            "steps": steps,
            "tolerance": tolerance,
        },
        "runs": [
            {
                "optimizer": run.choice.label,
                "class": run.choice.kind.__name__,
                "options": run.choice.options,
                "lr": run.lr,
                "status": run.outcome.status,
                "steps_to_minimum": run.outcome.reached,
                "value": run.outcome.value,
                "distance": run.outcome.distance,
                "path": run.outcome.points.tolist(),
            }
            for run in runs
        ],
    }
