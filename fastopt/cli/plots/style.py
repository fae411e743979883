"""Shared by all figures: colours, dashes and markers, the frame of a figure, and its file.

Figures do not use pyplot: no window, no global state, and the same result on a machine without a display.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fastopt.files import write_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito's colours, distinct in every type of colour vision; without their yellow, which is too faint on white."""

DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX<>*hp"


def check_format(path: Path) -> None:
    """Raise ValueError if matplotlib cannot write a file with this ending."""
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        endings = ", ".join(f".{ending}" for ending in known)
        raise ValueError(f"{path}: must end in one of {endings}, got {path.suffix or 'no ending'}")


def check_gif(path: Path) -> None:
    """Raise ValueError unless `path` ends in ``.gif``."""
    if path.suffix.lower() != ".gif":
        raise ValueError(f"{path}: must end in .gif, got {path.suffix or 'no ending'}")


def line_style(k: int) -> dict[str, Any]:
    """Return the line style of the k-th optimizer: distinct by colour, and in print by marker and dashes."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "linestyle": DASHES[k // len(COLOURS) % len(DASHES)],
        "linewidth": 1.8,
        "marker": MARKERS[k % len(MARKERS)],
    }


def new_figure(title: str, width: float, height: float) -> Figure:
    """Return a figure of this size in inches, with a wrapped title and a layout without clipping or overlap."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    figure.suptitle(fill(title, round(11 * width)), fontsize=11)
    return figure


def tidy(axes: Axes) -> None:
    """Draw a faint grid behind the curves, and remove the frame at the top and on the right."""
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, digest: str | None = None) -> None:
    """Write a figure; with a `digest` of its data, write a reproducible SVG that contains the digest."""
    content = BytesIO()
    if digest is None:
        figure.savefig(content, format=path.suffix[1:].lower(), dpi=150)
    else:
        with rc_context({"svg.hashsalt": digest}):
            figure.savefig(content, format="svg", metadata={"Date": None, "Description": digest})
    write_file(path, content.getvalue())
