"""Figures of measurements: throughput against size, and rows of dots for ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastopt.cli.output import spelled
from fastopt.cli.plots.style import COLOURS, DASHES, MARKERS, save
from fastopt.measure import Result
from fastopt.measure.machine import Cache

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
    "one thread": ("#56B4E9", ":", "<"),
    "OpenMP": ("#CC79A7", "--", ">"),
    "no step": ("#707070", ":", "d"),
}
"""Colour, dashes and marker of each contestant, in every figure."""

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
    """Draw the throughput of steps against their size, and mark the sizes that fill the caches.

    panels : the results of each panel by name. switch : the number of parameters from which all threads are used.
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
    """Draw a row of dots for each name, on a logarithmic axis labelled `measure`, with a line at 1."""
    figure = Figure(figsize=(9, 1.8 + 0.3 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.add_subplot()
    names = list(rows)
    for k, kind in enumerate(dict.fromkeys(kind for row in rows.values() for kind in row)):
        there = [name for name in names if kind in rows[name]]
        style = _line_of(kind, k) | {"linestyle": "none"}
        axes.plot([rows[name][kind] for name in there], [names.index(name) for name in there], **style, label=kind)
    axes.axvline(1.0, color=GREY, linewidth=1.0, linestyle="--")
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if right > 5.0 * left else (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0))
    )
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
    """Return the line style of a contestant; one without its own entry gets the style of its number."""
    own = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)], MARKERS[k % len(MARKERS)]
    return dict(zip(("color", "linestyle", "marker"), CONTESTANTS.get(name, own), strict=True))


def _log_axes(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: spelled(round(size))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark_sizes(axes: Axes, result: Result, caches: Sequence[Cache], switch: int | None) -> None:
    """Mark the switch to all threads, and the sizes whose parameters, gradients and states fill each cache level."""
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
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},  # curves may pass behind the text
            )
    axes.set_xlim(left, right)


def _bytes(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"
