"""Curves of training losses, and their figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fastopt.cli.plots.style import line_style, new_figure, save, tidy

MARKS_PER_CURVE = 8
EXPLODED = 20.0
"""Multiple of the loss before training above which nothing is drawn."""


def draw_losses(path: Path, title: str, losses: Mapping[str, Sequence[float]]) -> None:
    """Draw each optimizer's mean training losses against the epoch (0 is before training), lowest at the end first."""
    figure = new_figure(title, width=10, height=max(6.0, 1.5 + 0.25 * len(losses)))
    axes = figure.add_subplot()
    draw_curves(axes, losses)
    legend(axes)
    save(figure, path)


def draw_curves(
    axes: Axes, losses: Mapping[str, Sequence[float]], steps_per_epoch: Mapping[str, int] | None = None
) -> None:
    """Draw losses against the epoch, or against the step on a logarithmic axis, which has no 0."""
    if steps_per_epoch is not None:
        axes.set_xscale("log")  # set it before the curves: if all diverged, they leave nothing to scale
    for k, label in in_order(losses):
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
            **line_style(k),
        )
    axes.set_yscale("log")
    # Let an exploding run leave the figure at the top: otherwise it flattens all other curves at the bottom.
    top = min(axes.get_ylim()[1], EXPLODED * max(curve[0] for curve in losses.values()))
    axes.set_ylim(top=top, auto=True)  # auto: curves of another panel with the same axis may still extend it
    axes.set_ylabel("mean training loss (cross-entropy, nats)")
    if steps_per_epoch is None:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    else:
        axes.set_xlabel("step")
    tidy(axes)


def in_order(losses: Mapping[str, Sequence[float]]) -> list[tuple[int, str]]:
    """Return the labels, lowest final loss first, each with the number that selects its style."""
    return sorted(enumerate(losses), key=lambda item: _rank(losses[item[1]]))


def legend(axes: Axes, title: str = "lowest final loss first") -> None:
    """Add a legend beside the curves."""
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        title=title,
        alignment="left",
        handlelength=3.5,
        frameon=False,
    )


def _rank(curve: Sequence[float]) -> float:
    return curve[-1] if math.isfinite(curve[-1]) else math.inf
