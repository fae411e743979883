"""Paths of optimizers over the contour lines of a function of x and y: a picture, and an animation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from fastopt.cli.plots.style import COLOURS, line_style, save
from fastopt.files import write_file

GROUND = LinearSegmentedColormap.from_list("ground", ["#FFFFFF", "#C3CAD3"])
"""Low values are white, high ones a grey from which each of `COLOURS` stands out."""

LEVELS = 12
POLES = 98.0
"""Percentile of the values above which no level is drawn: otherwise a pole would use up all levels."""

SPACING, WIDE_SPACING, MANY = 0.012, 0.06, 8
"""Distance between marks in sides of the window: long steps are all marked; many paths have fewer marks."""

LONGEST_TITLE = 180
FRAMES = 120
ANIMATION_MS = 9000
LAST_FRAME_MS = 3000


class Scene(NamedTuple):
    """A function on a mesh, and the paths on it by their legend label."""

    title: str
    x: NDArray[Any]
    y: NDArray[Any]
    z: NDArray[Any]
    lowest: float
    """The value at the minima; infinity without minima."""
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
    for k, points in enumerate(scene.paths.values()):  # mark the end of each path, above all lines
        axes.plot(*points[-1], markersize=9, markeredgecolor="white", markeredgewidth=0.8, zorder=4, **line_style(k))
    save(figure, path)


def animate_paths(path: Path, scene: Scene, after: Callable[[], object]) -> None:
    """Draw the growing paths into a GIF of `frames_of` frames; call `after` once per frame."""
    figure, axes, marks = _ground(scene)
    canvas = FigureCanvasAgg(figure)
    lines = _lines(axes, scene)
    counter = axes.text(0.98, 0.03, "", transform=axes.transAxes, ha="right", fontsize=12, bbox={"facecolor": "white"})
    moving = [counter, *(outline for outline, _ in lines), *(line for _, line in lines), *marks]
    for artist in moving:
        artist.set_animated(True)  # keep it out of the background, which is drawn once
    canvas.draw()
    ground = canvas.copy_from_bbox(figure.bbox)
    steps = frames_of(scene)

    def frame(step: int) -> Image.Image:
        canvas.restore_region(ground)
        counter.set_text(f"step {step}")
        for (outline, line), points in zip(lines, scene.paths.values(), strict=True):
            so_far = points[: step + 1]
            outline.set_data(*so_far.T)
            line.set_data(*so_far.T)
            line.set_markevery([len(so_far) - 1])
        for artist in moving:
            axes.draw_artist(artist)
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())

    # One palette for all frames: exact white and path colours, the remaining entries from the last frame.
    exact = np.array([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in ("#FFFFFF", *COLOURS)])
    mixed = np.array(frame(steps[-1]).quantize(256 - len(exact)).getpalette()).reshape(-1, 3)
    mixed = mixed[np.abs(mixed[:, None] - exact).max(axis=2).min(axis=1) > 8]  # Pillow may pick an almost equal entry
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
    write_file(path, content.getvalue())


def frames_of(scene: Scene) -> list[int]:
    """Return the steps that an animation shows: all, or `FRAMES` of them, including the first and the last."""
    last = max(len(points) for points in scene.paths.values()) - 1
    return sorted({round(last * k / (FRAMES - 1)) for k in range(FRAMES)})


def _ground(scene: Scene) -> tuple[Figure, Axes, list[Line2D]]:
    """Draw all except the paths: the function, the legend, and the marks at start and minima, which cover the paths."""
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
    handles = [
        Line2D([], [], label=fill(label, 45), markersize=6, **line_style(k)) for k, label in enumerate(scene.paths)
    ]
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
    """Return two empty lines for every path: a white outline, and the path's own line above all outlines."""
    lines = []
    for k in range(len(scene.paths)):
        # Draw later paths thinner, so that paths along the same valley do not hide each other.
        above = 1.0 - k / max(1, len(scene.paths) - 1)
        style = {**line_style(k), "linewidth": 1.6 + 2.0 * above, "markersize": 5.0 + 2.5 * above}
        edge = 1.6 if len(scene.paths) <= MANY else 0.0
        (outline,) = axes.plot([], [], color="white", linewidth=style["linewidth"] + edge, zorder=3, visible=edge > 0.0)
        (line,) = axes.plot([], [], markeredgecolor="white", markeredgewidth=0.5, zorder=3.5, **style)
        lines.append((outline, line))
    return lines


def _apart(points: NDArray[Any], spacing: float) -> list[int]:
    """Return the points to mark, in order: each is at least `spacing` away from the previous mark."""
    marked = [0]
    for k, (x, y) in enumerate(points.tolist()):
        before = points[marked[-1]]
        if abs(x - before[0]) + abs(y - before[1]) >= spacing:
            marked.append(k)
    return marked


def _levels(z: np.ma.MaskedArray[Any, Any], scene: Scene) -> list[float]:
    """Return levels that rise above the minimum as 1, 2, 5, 10; without a minimum, return evenly spaced levels."""
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
    digits = 6 - decade  # rounding removes the remainder of a level that is almost 0
    heights = [float(f"{digit}e{decade + power}") for power in range(-(LEVELS // 3), 1) for digit in (1, 2, 5)]
    return sorted({round(lowest + height, digits) + 0.0 for height in heights if height <= top})[-LEVELS:]
