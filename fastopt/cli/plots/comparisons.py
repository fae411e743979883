"""The figures of `fastopt train --compare`, one for each comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from fastopt.cli.plots.losses import MARKS_PER_CURVE, draw_curves, in_order, legend
from fastopt.cli.plots.style import COLOURS, line_style, new_figure, save, tidy


def draw_batch_sizes(
    path: Path, title: str, losses: Mapping[str, Sequence[float]], steps_per_epoch: Mapping[str, int]
) -> None:
    """Draw the losses twice: against the epoch, in which every row is used once, and against the step."""
    figure = new_figure(title, width=12, height=5.5)
    by_epoch, by_step = figure.subplots(1, 2, sharey=True)
    draw_curves(by_epoch, losses)
    draw_curves(by_step, losses, steps_per_epoch)
    by_epoch.set_title("for the same number of rows seen")
    by_step.set_title("for the same number of steps")
    by_step.set_ylabel("")
    legend(by_step)
    save(figure, path)


def draw_optimizers(
    path: Path, title: str, losses: Mapping[str, Sequence[float]], accuracies: Mapping[str, tuple[float, float]]
) -> None:
    """Draw the losses, and beside them the final accuracies on the training rows and on the test rows."""
    figure = new_figure(title, width=13, height=max(5.5, 1.5 + 0.3 * len(losses)))
    curves, ends = figure.subplots(1, 2, width_ratios=[1.5, 1.0])
    draw_curves(curves, losses)
    order = in_order(losses)
    for place, (k, label) in enumerate(order):
        training, test = accuracies[label]
        if math.isfinite(test):
            colour = line_style(k)["color"]
            ends.plot([training, test], [place, place], color=colour, linewidth=1.8, zorder=1)
            ends.scatter(training, place, s=50, facecolor="white", edgecolor=colour, linewidth=1.8)
            ends.scatter(test, place, s=50, color=colour)
    ends.scatter([], [], s=50, facecolor="white", edgecolor="#555555", linewidth=1.8, label="training rows")
    ends.scatter([], [], s=50, color="#555555", label="test rows")
    ends.set_yticks(range(len(order)), [label for _, label in order])
    ends.set_ylim(len(order) - 0.5, -0.5)
    ends.set_xlabel("accuracy at the end")
    ends.xaxis.set_major_formatter(PercentFormatter(1.0))
    tidy(ends)
    ends.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    curves.legend(title="lowest final loss first", alignment="left", handlelength=3.5, frameon=False)
    save(figure, path)


def draw_schedules(
    path: Path, title: str, losses: Mapping[str, Sequence[float]], rates: Mapping[str, Sequence[float]]
) -> None:
    """Draw the learning rate of every step, and beside it the losses."""
    figure = new_figure(title, width=12, height=5.5)
    above, below = figure.subplots(1, 2)
    for k, label in enumerate(rates):
        every = max(1, math.ceil(len(rates[label]) / MARKS_PER_CURVE))
        above.plot(rates[label], markevery=(k * every // len(rates), every), markersize=6, **line_style(k))
    above.set_xlabel("step")
    above.set_ylabel("learning rate")
    above.set_ylim(bottom=0.0)
    tidy(above)
    draw_curves(below, losses)
    legend(below)
    save(figure, path)


def draw_batch_norm(path: Path, title: str, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw the losses at several learning rates: one panel without and one with batch normalisation."""
    figure = new_figure(title, width=12, height=5.5)
    for axes, (heading, losses) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        draw_curves(axes, losses)
        axes.set_title(heading)
        axes.legend(title="lowest final loss first", alignment="left", handlelength=3.5, framealpha=0.9)
        axes.label_outer()
    save(figure, path)


def draw_activations(
    path: Path, title: str, panels: Mapping[tuple[str, str], tuple[Sequence[NDArray[Any]], float]]
) -> None:
    """Draw the distribution of each layer's activations: a row per initialisation, a column per activation function.

    panels: by (initialisation, activation), the outputs of the hidden layers and the loss after training. For ReLU only
        values above 0 are drawn, and the share of zeros is a label: the bar of the zeros would dwarf all others.
    """
    inits = list(dict.fromkeys(init for init, _ in panels))
    activations = list(dict.fromkeys(activation for _, activation in panels))
    figure = new_figure(title, width=13, height=1.0 + 2.6 * len(inits))
    grid = figure.subplots(len(inits), len(activations), squeeze=False, sharey="col")
    for column, activation in enumerate(activations):
        of_all = [values for name, (layers, _) in panels.items() if name[1] == activation for values in layers]
        low, high = -1.0, 1.0
        if activation == "relu":  # clip the range: a few outliers would flatten all other bars
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
    save(figure, path)


def _draw_distribution(axes: Axes, at: float, values: NDArray[Any], low: float, high: float, colour: str) -> None:
    """Draw a horizontal histogram from `at` to the right, with its statistics above."""
    shown = values[values > 0.0] if low == 0.0 else values
    counts, edges = np.histogram(shown, bins=41, range=(low, high))
    if counts.any():
        ends = at + 0.8 * counts / counts.max()
        axes.stairs(ends, edges, baseline=at, orientation="horizontal", fill=True, color=colour)
    axes.plot([at, at], [low, high], color="#888888", linewidth=0.8)
    label = f"std {values.std(dtype=np.float64):.2g}"
    if low == 0.0:
        label += f"\n{np.mean(values == 0.0):.0%} zeros"
    axes.text(at + 0.05, high + 0.27 * (high - low), label, fontsize=9, verticalalignment="top")
