"""Pictures of results. The only file that imports matplotlib; import it only where a picture was asked for.

Figures are made without pyplot: no window, no global state, the same on a machine without a display.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from fastopt.cli.bench import spelled
from fastopt.measure import Result
from fastopt.measure.machine import Cache

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito's colours, which stay apart for every kind of colour vision; without their yellow, too faint on white."""

DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX<>*hp"
MARKS_PER_CURVE = 8

EXPLODED = 20.0
"""Times the loss before training: what lies above is not drawn."""


def check_format(path: Path) -> None:
    """Raise ValueError where matplotlib cannot draw into a file with this ending."""
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        endings = ", ".join(f".{ending}" for ending in known)
        raise ValueError(f"{path}: the ending of the name says the format; use one of {endings}")


def draw_losses(path: Path, title: str, losses: Mapping[str, Sequence[float]]) -> None:
    """Draw each optimizer's mean training losses against the epoch (0 is before training), lowest at the end first."""
    figure = _figure(title, width=10, height=max(6.0, 1.5 + 0.25 * len(losses)))
    axes = figure.add_subplot()
    _draw_losses(axes, losses)
    _legend(axes)
    figure.savefig(path, dpi=150)


def _style(k: int) -> dict[str, Any]:
    """The line of the k-th optimizer: apart from the others by colour, and without colour by marker and dashes."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "linestyle": DASHES[k // len(COLOURS) % len(DASHES)],
        "linewidth": 1.8,
        "marker": MARKERS[k % len(MARKERS)],
    }


def _rank(curve: Sequence[float]) -> float:
    return curve[-1] if math.isfinite(curve[-1]) else math.inf


# --- paths on a function of x and y -----------------------------------------------------------------------------------

GROUND = LinearSegmentedColormap.from_list("ground", ["#FFFFFF", "#C3CAD3"])
"""Low is white, high a grey that every one of `COLOURS` stands out from."""

LEVELS = 12
POLES = 98.0
"""Percentile of the values above which no level is drawn: a pole is not to take them all."""

SPACING, WIDE_SPACING, MANY = 0.012, 0.06, 8
"""Distance of marks in sides of the window: every step has one where steps are long; wide between many paths."""

LONGEST_TITLE = 180
FRAMES = 120
ANIMATION_MS = 9000
LAST_FRAME_MS = 3000


class Scene(NamedTuple):
    """A function on a mesh, and the paths on it, by what the legend says of them."""

    title: str
    x: NDArray[Any]
    y: NDArray[Any]
    z: NDArray[Any]
    lowest: float
    """The value at the minima; infinity where there are none."""
    start: tuple[float, float]
    minima: Sequence[tuple[float, float]]
    paths: Mapping[str, NDArray[Any]]


def draw_paths(path: Path, scene: Scene) -> None:
    """Draw the contour lines of the function, and the paths over them."""
    figure, axes, _ = _ground(scene)
    sides = np.array([np.ptp(scene.x), np.ptp(scene.y)])
    spacing = SPACING if len(scene.paths) <= MANY else WIDE_SPACING
    for (outline, line), points in zip(_lines(axes, scene), scene.paths.values(), strict=True):
        outline.set_data(*points.T)
        line.set_data(*points.T)
        line.set_markevery(_apart(points / sides, spacing))
    for k, points in enumerate(scene.paths.values()):  # over all lines: where each of them ends
        axes.plot(*points[-1], markersize=9, markeredgecolor="white", markeredgewidth=0.8, zorder=4, **_style(k))
    figure.savefig(path, dpi=150)


def check_gif(path: Path) -> None:
    """Raise ValueError where the ending of `path` is another."""
    if path.suffix.lower() != ".gif":
        raise ValueError(f"{path}: an animation is a GIF; let the name end in .gif")


def animate_paths(path: Path, scene: Scene, after: Callable[[], object]) -> None:
    """Draw the paths as they grow, into a GIF of `frames_of` frames; call `after` with each that is made."""
    figure, axes, marks = _ground(scene)
    canvas = FigureCanvasAgg(figure)
    lines = _lines(axes, scene)
    told = axes.text(0.98, 0.03, "", transform=axes.transAxes, ha="right", fontsize=12, bbox={"facecolor": "white"})
    moving = [told, *(outline for outline, _ in lines), *(line for _, line in lines), *marks]
    for artist in moving:
        artist.set_animated(True)  # not part of what is drawn once and kept
    canvas.draw()
    ground = canvas.copy_from_bbox(figure.bbox)
    steps = frames_of(scene)

    def frame(step: int) -> Image.Image:
        canvas.restore_region(ground)
        told.set_text(f"step {step}")
        for (outline, line), points in zip(lines, scene.paths.values(), strict=True):
            so_far = points[: step + 1]
            outline.set_data(*so_far.T)
            line.set_data(*so_far.T)
            line.set_markevery([len(so_far) - 1])
        for artist in moving:
            axes.draw_artist(artist)
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())

    # One palette for all frames: white and the colours of the paths as they are, the rest as in the last frame.
    exact = np.array([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in ("#FFFFFF", *COLOURS)])
    mixed = np.array(frame(steps[-1]).quantize(256 - len(exact)).getpalette()).reshape(-1, 3)
    mixed = mixed[np.abs(mixed[:, None] - exact).max(axis=2).min(axis=1) > 8]  # Pillow takes what is nearly nearest
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([exact, mixed]).astype(np.uint8).tobytes())

    def frames() -> Iterator[Image.Image]:
        for step in steps:
            yield frame(step).quantize(palette=palette, dither=Image.Dither.NONE)
            after()

    made = frames()
    duration = min(300, max(40, ANIMATION_MS // len(steps)))
    content = BytesIO()
    next(made).save(
        content,
        format="GIF",
        save_all=True,
        append_images=made,
        duration=[duration] * (len(steps) - 1) + [LAST_FRAME_MS],
        loop=0,
    )
    path.write_bytes(content.getvalue())


def frames_of(scene: Scene) -> list[int]:
    """The steps that an animation shows: all, or `FRAMES` of them, the first and the last included."""
    last = max(len(points) for points in scene.paths.values()) - 1
    return sorted({round(last * k / (FRAMES - 1)) for k in range(FRAMES)})


def _ground(scene: Scene) -> tuple[Figure, Axes, list[Line2D]]:
    """All but the paths: the function, the legend, and the marks at start and minima, which lie over the paths."""
    rows = len(scene.paths) + 6
    figure = Figure(figsize=(11, max(6.0, 0.24 * rows)), dpi=90, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.add_subplot()
    z = np.ma.masked_invalid(scene.z)
    levels = _levels(z, scene)
    if len(levels):
        colours = [GROUND(k / len(levels)) for k in range(len(levels) + 1)]
        bands = axes.contourf(scene.x, scene.y, z, levels=levels, colors=colours, extend="both")
        axes.contour(scene.x, scene.y, z, levels=levels, colors="#8A8F96", linewidths=0.5, linestyles="solid")
        bar = figure.colorbar(bands, ax=axes, ticks=levels, format="%.4g", pad=0.02)
        bar.set_label("f(x, y)", labelpad=8)
    axes.set_xlim(scene.x.min(), scene.x.max())
    axes.set_ylim(scene.y.min(), scene.y.max())
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    title = [line if len(line) <= LONGEST_TITLE else f"{line[:LONGEST_TITLE]} ..." for line in scene.title.splitlines()]
    axes.set_title("\n".join(fill(line, LONGEST_TITLE // 2) for line in title), fontsize=11, loc="left")
    handles = [Line2D([], [], label=fill(label, 45), markersize=6, **_style(k)) for k, label in enumerate(scene.paths)]
    looks = {
        "start": {"marker": "o", "markersize": 10, "zorder": 5},
        "minimum": {"marker": "*", "markersize": 15, "zorder": 6},
    }
    white = {"linestyle": "", "color": "white", "markeredgecolor": "black", "markeredgewidth": 1.3}
    marks = [
        axes.plot(*np.transpose(points), label=label, **white, **looks[label])[0]  # type: ignore[arg-type]
        for label, points in (("start", [scene.start]), ("minimum", scene.minima))
        if len(points)
    ]
    figure.legend(
        handles=[*handles, *marks],
        loc="outside right upper",
        title="steps to a minimum",
        alignment="left",
        handlelength=3.5,
        frameon=False,
    )
    return figure, axes, marks


def _lines(axes: Axes, scene: Scene) -> list[tuple[Line2D, Line2D]]:
    """Two lines without points for every path: a white one, and over all of those the one that is meant to be seen."""
    lines = []
    for k in range(len(scene.paths)):
        # The thinner, the later: paths that follow the same valley do not hide each other.
        above = 1.0 - k / max(1, len(scene.paths) - 1)
        style = {**_style(k), "linewidth": 1.6 + 2.0 * above, "markersize": 5.0 + 2.5 * above}
        edge = 1.6 if len(scene.paths) <= MANY else 0.0
        (outline,) = axes.plot([], [], color="white", linewidth=style["linewidth"] + edge, zorder=3, visible=edge > 0.0)
        (line,) = axes.plot([], [], markeredgecolor="white", markeredgewidth=0.5, zorder=3.5, **style)
        lines.append((outline, line))
    return lines


def _apart(points: NDArray[Any], spacing: float) -> list[int]:
    """Which of the points to mark, in order, so that none is nearer than `spacing` to the one marked before."""
    marked = [0]
    for k, (x, y) in enumerate(points.tolist()):
        before = points[marked[-1]]
        if abs(x - before[0]) + abs(y - before[1]) >= spacing:
            marked.append(k)
    return marked


def _levels(z: np.ma.MaskedArray[Any, Any], scene: Scene) -> list[float]:
    """Heights above the minimum that grow as 1, 2, 5, 10: there are lines near it, too. Else even ones."""
    values = z.compressed()
    if not values.size:
        return []
    lowest = min(float(values.min()), scene.lowest)
    top = float(np.percentile(values, POLES)) - lowest
    if not 0.0 < top < math.inf:
        return []
    if not len(scene.minima):
        return [float(level) for level in MaxNLocator(LEVELS).tick_values(lowest, lowest + top)]
    decade = math.floor(math.log10(top))
    digits = 6 - decade  # what is left of a level where it is almost 0
    heights = [float(f"{digit}e{decade + power}") for power in range(-(LEVELS // 3), 1) for digit in (1, 2, 5)]
    return sorted({round(lowest + height, digits) + 0.0 for height in heights if height <= top})[-LEVELS:]


# --- speed ------------------------------------------------------------------------------------------------------------

CONTESTANTS: dict[str, tuple[str, Any, str]] = {
    "fastopt": ("#0072B2", "-", "o"),
    "limit": ("#000000", (0, (5, 2)), ""),
    "torch fused": ("#D55E00", "-.", "s"),
    "torch": ("#D55E00", ":", "D"),
    "numpy": ("#009E73", "--", "^"),
    "optax": ("#CC79A7", "-", "v"),
    "deepspeed": ("#E69F00", "-", "P"),
    "thinc": ("#56B4E9", "-.", "X"),
    "scikit-learn": ("#56B4E9", "--", "*"),
}
"""Colour, dashes and marker of each, in every picture."""

GREY = "#707070"


def draw_throughput(
    path: Path,
    title: str,
    panels: Mapping[str, Sequence[Result]],
    caches: Sequence[Cache] = (),
    *,
    switch: int | None = None,
    digest: str | None = None,
) -> None:
    """Draw the throughput of steps against their size, and where the caches are full.

    panels : the results of each by name. switch : the number of parameters from which all threads are used.
    """
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(4.0 + 4.5 * columns, 2.2 + 3.6 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    shown: dict[str, Line2D] = {}
    for axes, (name, results) in zip(grid.flat, panels.items(), strict=False):
        by_size = sorted(results, key=lambda result: result.facts["parameters"])
        for k, contestant in enumerate(dict.fromkeys(name for result in by_size for name in result.seconds)):
            there = [result for result in by_size if contestant in result.seconds]
            sizes = [result.facts["parameters"] for result in there]
            style = _line_of(contestant, k)
            rates = [result.bandwidth(contestant) or math.nan for result in there]
            (shown[contestant],) = axes.plot(sizes, rates, **style, markersize=5, linewidth=1.8)
            low, high = (
                [1e-9 * (result.bytes or 0) / getattr(result.seconds[contestant], end) for result in there]
                for end in ("high", "low")
            )
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        _log_axes(axes)
        axes.set_title(name, fontsize=10, loc="left")
        _mark_sizes(axes, by_size[0], caches, switch)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("throughput (GB/s)")
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest of each column
        axes.set_xlabel("number of parameters")
        axes.tick_params(labelbottom=True)
    figure.suptitle(fill(title, 50 * columns), fontsize=11)
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="outside lower center",
        ncols=3 if columns == 1 else 5,
        frameon=False,
        handlelength=4,
    )
    save(figure, path, digest)


def draw_dots(
    path: Path, title: str, measure: str, rows: Mapping[str, Mapping[str, float]], *, digest: str | None = None
) -> None:
    """Draw a row of dots for each name, on a logarithmic axis that is called `measure`, with a line at 1."""
    figure = Figure(figsize=(9, 1.8 + 0.3 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.add_subplot()
    names = list(rows)
    for k, kind in enumerate(dict.fromkeys(kind for row in rows.values() for kind in row)):
        there = [name for name in names if kind in rows[name]]
        style = _line_of(kind, k) | {"linestyle": "none"}
        axes.plot([rows[name][kind] for name in there], [names.index(name) for name in there], **style, label=kind)
    axes.axvline(1.0, color=GREY, linewidth=1.0, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(True, axis="both", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(measure)
    figure.suptitle(fill(title, 90), fontsize=11)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    save(figure, path, digest)


def _line_of(name: str, k: int) -> dict[str, Any]:
    """That of a contestant, and of what has none of its own that of its number."""
    own = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)], MARKERS[k % len(MARKERS)]
    return dict(zip(("color", "linestyle", "marker"), CONTESTANTS.get(name, own), strict=True))


def _log_axes(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: spelled(round(size))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# --- the parts of figures of losses -----------------------------------------------------------------------------------


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    figure.suptitle(fill(title, round(11 * width)), fontsize=11)
    return figure


def _draw_losses(
    axes: Axes, losses: Mapping[str, Sequence[float]], steps_per_epoch: Mapping[str, int] | None = None
) -> None:
    """Curves of losses against the epoch, or against the step on a scale of logarithms, which has no 0."""
    if steps_per_epoch is not None:
        axes.set_xscale("log")  # before the curves, which may all have diverged and leave nothing to scale
    for k, label in _in_order(losses):
        curve = losses[label]
        every = max(1, math.ceil(len(curve) / MARKS_PER_CURVE))
        epochs = range(len(curve)) if steps_per_epoch is None else range(1, len(curve))
        at = epochs if steps_per_epoch is None else [epoch * steps_per_epoch[label] for epoch in epochs]
        axes.plot(
            at,
            [curve[epoch] for epoch in epochs],
            label=label if math.isfinite(curve[-1]) else f"{label} (diverged)",
            markevery=(k % every, every),
            markersize=6,
            **_style(k),
        )
    axes.set_yscale("log")
    # A run that explodes leaves the picture at the top, rather than press all others flat at the bottom.
    top = min(axes.get_ylim()[1], EXPLODED * max(curve[0] for curve in losses.values()))
    axes.set_ylim(top=top, auto=True)  # auto: the curves of another panel with the same axis may still make it longer
    axes.set_ylabel("mean training loss (cross-entropy, nats)")
    if steps_per_epoch is None:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    else:
        axes.set_xlabel("step")
    _tidy(axes)


def _in_order(losses: Mapping[str, Sequence[float]]) -> list[tuple[int, str]]:
    """The labels, lowest final loss first, each with its number, which decides about its style."""
    return sorted(enumerate(losses), key=lambda item: _rank(losses[item[1]]))


def _tidy(axes: Axes) -> None:
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_sizes(axes: Axes, result: Result, caches: Sequence[Cache], switch: int | None) -> None:
    """Lines at the switch, and where parameters, gradients and states fill the caches of one level of these threads."""
    each = (2 + result.facts["states"]) * np.dtype(result.facts["dtype"]).itemsize
    left, right = axes.get_xlim()
    marks = []
    for cache in caches:
        cores = min(cache.instances, result.facts["threads"])
        text = f"L{cache.level} full ({cores} x {_bytes(cache.bytes)})"
        marks.append((cores * cache.bytes / each, text, ":"))
    if switch is not None:
        marks.append((switch, f"all threads from {switch:,} on", "-"))
    for size, text, dashes in marks:
        if left < size < right:
            axes.axvline(size, color=GREY, linewidth=1.0, linestyle=dashes, zorder=1)
            axes.text(
                size,
                0.02,
                text + " ",
                rotation=90,
                transform=axes.get_xaxis_transform(),
                color="#404040",
                fontsize=8,
                ha="right",
                va="bottom",
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},  # curves may pass behind it
            )
    axes.set_xlim(left, right)


def _bytes(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"


def save(figure: Figure, path: Path, digest: str | None = None) -> None:
    """Write a picture; with a `digest` of what it shows, as an SVG that is the same every time and carries it."""
    if digest is None:
        figure.savefig(path, dpi=150)
    else:
        with rc_context({"svg.hashsalt": digest}):
            figure.savefig(path, format="svg", metadata={"Date": None, "Description": digest})


def _legend(axes: Axes, title: str = "lowest final loss first") -> None:
    """Beside the curves, not on them."""
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        title=title,
        alignment="left",
        handlelength=3.5,
        frameon=False,
    )


# --- the figures of --compare -----------------------------------------------------------------------------------------


def draw_batch_sizes(
    path: Path, title: str, losses: Mapping[str, Sequence[float]], steps_per_epoch: Mapping[str, int]
) -> None:
    """Draw the losses twice: against the epochs, in which every row is seen once, and against the steps."""
    figure = _figure(title, width=12, height=5.5)
    by_epoch, by_step = figure.subplots(1, 2, sharey=True)
    _draw_losses(by_epoch, losses)
    _draw_losses(by_step, losses, steps_per_epoch)
    by_epoch.set_title("for the same number of rows seen")
    by_step.set_title("for the same number of steps")
    by_step.set_ylabel("")
    _legend(by_step)
    figure.savefig(path, dpi=150)


def draw_optimizers(
    path: Path, title: str, losses: Mapping[str, Sequence[float]], accuracies: Mapping[str, tuple[float, float]]
) -> None:
    """Draw the losses, and beside them the accuracies at the end, on the training rows and on the test rows."""
    figure = _figure(title, width=13, height=max(5.5, 1.5 + 0.3 * len(losses)))
    curves, ends = figure.subplots(1, 2, width_ratios=[1.5, 1.0])
    _draw_losses(curves, losses)
    order = _in_order(losses)
    for place, (k, label) in enumerate(order):
        training, test = accuracies[label]
        if math.isfinite(test):
            colour = _style(k)["color"]
            ends.plot([training, test], [place, place], color=colour, linewidth=1.8, zorder=1)
            ends.scatter(training, place, s=50, facecolor="white", edgecolor=colour, linewidth=1.8)
            ends.scatter(test, place, s=50, color=colour)
    ends.scatter([], [], s=50, facecolor="white", edgecolor="#555555", linewidth=1.8, label="training rows")
    ends.scatter([], [], s=50, color="#555555", label="test rows")
    ends.set_yticks(range(len(order)), [label for _, label in order])
    ends.set_ylim(len(order) - 0.5, -0.5)
    ends.set_xlabel("accuracy at the end")
    ends.xaxis.set_major_formatter(PercentFormatter(1.0))
    _tidy(ends)
    ends.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    curves.legend(title="lowest final loss first", alignment="left", handlelength=3.5, frameon=False)
    figure.savefig(path, dpi=150)


def draw_schedules(
    path: Path, title: str, losses: Mapping[str, Sequence[float]], rates: Mapping[str, Sequence[float]]
) -> None:
    """Draw the learning rate of every step, and below it the losses."""
    figure = _figure(title, width=12, height=5.5)
    above, below = figure.subplots(1, 2)
    for k, label in enumerate(rates):
        every = max(1, math.ceil(len(rates[label]) / MARKS_PER_CURVE))
        above.plot(rates[label], markevery=(k * every // len(rates), every), markersize=6, **_style(k))
    above.set_xlabel("step")
    above.set_ylabel("learning rate")
    above.set_ylim(bottom=0.0)
    _tidy(above)
    _draw_losses(below, losses)
    _legend(below)
    figure.savefig(path, dpi=150)


def draw_batch_norm(path: Path, title: str, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw the losses at several learning rates: a panel without and one with batch normalisation."""
    figure = _figure(title, width=12, height=5.5)
    for axes, (heading, losses) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        _draw_losses(axes, losses)
        axes.set_title(heading)
        axes.legend(title="lowest final loss first", alignment="left", handlelength=3.5, framealpha=0.9)
        axes.label_outer()
    figure.savefig(path, dpi=150)


def draw_activations(
    path: Path, title: str, panels: Mapping[tuple[str, str], tuple[Sequence[NDArray[Any]], float]]
) -> None:
    """Draw how the activations of each layer are distributed: a row per initialisation, a column per activation.

    panels: by (initialisation, activation) what leaves each hidden layer, and the loss after training. Of ReLU the
        values above 0 are drawn, and the share of zeros is written there: their bar would dwarf all others.
    """
    inits = list(dict.fromkeys(init for init, _ in panels))
    activations = list(dict.fromkeys(activation for _, activation in panels))
    figure = _figure(title, width=13, height=1.0 + 2.6 * len(inits))
    grid = figure.subplots(len(inits), len(activations), squeeze=False, sharey="col")
    for column, activation in enumerate(activations):
        of_all = [values for name, (layers, _) in panels.items() if name[1] == activation for values in layers]
        low, high = -1.0, 1.0
        if activation == "relu":  # a few far out would press all others flat
            low, high = 0.0, max(1e-3, *(float(np.quantile(values, 0.999)) for values in of_all))
        for row, init in enumerate(inits):
            layers, loss = panels[init, activation]
            axes = grid[row][column]
            for k, values in enumerate(layers):
                _draw_distribution(axes, k + 1, values, low, high, COLOURS[column])
            after = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            axes.set_title(f"{init}, {activation}: loss after training {after}", fontsize=11)
            axes.set_xlim(0.9, len(layers) + 1)
            axes.set_ylim(low - 0.06 * (high - low), high + 0.3 * (high - low))
            axes.set_yticks([y for y in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= y <= high])
            axes.set_xticks([k + 1.4 for k in range(len(layers))], [f"layer {k + 1}" for k in range(len(layers))])
            axes.tick_params(axis="x", length=0)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel("activation before training")
    figure.savefig(path, dpi=150)


def _draw_distribution(axes: Axes, at: float, values: NDArray[Any], low: float, high: float, colour: str) -> None:
    """A histogram on its side, from `at` to the right, with what to know about it above."""
    shown = values[values > 0.0] if low == 0.0 else values
    counts, edges = np.histogram(shown, bins=41, range=(low, high))
    if counts.any():
        ends = at + 0.8 * counts / counts.max()
        axes.stairs(ends, edges, baseline=at, orientation="horizontal", fill=True, color=colour)
    axes.plot([at, at], [low, high], color="#888888", linewidth=0.8)
    told = f"std {values.std(dtype=np.float64):.2g}"
    if low == 0.0:
        told += f"\n{np.mean(values == 0.0):.0%} zeros"
    axes.text(at + 0.05, high + 0.27 * (high - low), told, fontsize=9, verticalalignment="top")
