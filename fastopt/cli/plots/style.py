"""What all pictures share: colours, dashes and markers, the frame of a figure, and the file it is written to.

Figures are made without pyplot: no window, no global state, the same on a machine without a display.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito's colours, which stay apart for every kind of colour vision; without their yellow, too faint on white."""

DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX<>*hp"


def check_format(path: Path) -> None:
    """Raise ValueError where matplotlib cannot draw into a file with this ending."""
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        endings = ", ".join(f".{ending}" for ending in known)
        raise ValueError(f"{path}: the ending of the name says the format; use one of {endings}")


def check_gif(path: Path) -> None:
    """Raise ValueError where the ending of `path` is another."""
    if path.suffix.lower() != ".gif":
        raise ValueError(f"{path}: an animation is a GIF; let the name end in .gif")


def line_style(k: int) -> dict[str, Any]:
    """The line of the k-th optimizer: apart from the others by colour, and without colour by marker and dashes."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "linestyle": DASHES[k // len(COLOURS) % len(DASHES)],
        "linewidth": 1.8,
        "marker": MARKERS[k % len(MARKERS)],
    }


def new_figure(title: str, width: float, height: float) -> Figure:
    """A figure of so many inches, with a title that is broken to fit, in which nothing is clipped or overlaps."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    figure.suptitle(fill(title, round(11 * width)), fontsize=11)
    return figure


def tidy(axes: Axes) -> None:
    """A faint grid behind the curves, and no frame above and on the right."""
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, digest: str | None = None) -> None:
    """Write a picture; with a `digest` of what it shows, as an SVG that is the same every time and carries it."""
    if digest is None:
        figure.savefig(path, dpi=150)
    else:
        with rc_context({"svg.hashsalt": digest}):
            figure.savefig(path, format="svg", metadata={"Date": None, "Description": digest})
