"""Pictures of results. The only file that imports matplotlib; import it only where a picture was asked for.

Figures are made without pyplot: no window, no global state, the same on a machine without a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

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
    figure = Figure(
        figsize=(10, max(6.0, 1.5 + 0.25 * len(losses))), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    axes = figure.add_subplot()
    by_result = sorted(losses, key=lambda label: _rank(losses[label]))
    styles = {label: k for k, label in enumerate(losses)}
    for label in by_result:
        curve = losses[label]
        k = styles[label]
        every = max(1, math.ceil(len(curve) / MARKS_PER_CURVE))
        diverged = not math.isfinite(curve[-1])
        axes.plot(
            range(len(curve)),
            curve,
            label=f"{label} (diverged)" if diverged else label,
            color=COLOURS[k % len(COLOURS)],
            linestyle=DASHES[k // len(COLOURS) % len(DASHES)],
            linewidth=1.8,
            marker=MARKERS[k % len(MARKERS)],
            markevery=(k % every, every),
            markersize=6,
        )
    axes.set_yscale("log")
    # A run that explodes leaves the picture at the top, rather than press all others flat at the bottom.
    axes.set_ylim(top=min(axes.get_ylim()[1], EXPLODED * max(curve[0] for curve in losses.values())))
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean training loss (cross-entropy, nats)")
    figure.suptitle(fill(title, 110), fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),  # beside the curves, not on them
        title="lowest final loss first",
        alignment="left",
        handlelength=3.5,
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def _rank(curve: Sequence[float]) -> float:
    return curve[-1] if math.isfinite(curve[-1]) else math.inf
