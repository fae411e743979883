"""What all commands do with their results: consoles, JSON, paths that are checked before the work begins, errors."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

STDOUT = Path("-")


def console(*, for_json: Path | None = None) -> Console:
    """Where tables go: standard output, or standard error where the JSON is to have standard output for itself."""
    return Console(stderr=for_json == STDOUT, highlight=False, markup=False)


def progress(unit: str) -> Progress:
    """Bars on standard error, one a task, where that is a terminal; nothing where it is a file or a pipe.

    `unit` is what is counted; as a format of rich it may show fields of the task.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


@contextmanager
def blame(option: str) -> Iterator[None]:
    """Report an error inside the block as one of `option`: its message, no traceback, exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def check_writable(path: Path) -> None:
    """Raise OSError where `path` is neither ``-`` nor can become a file: better now than after the training."""
    folder = path.parent
    if path == STDOUT:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the name of a file in it")
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {folder}; make it first: mkdir -p {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"{path} may not be written; choose another place")


def check_files(plot: Path | None, json: Path | None) -> None:
    """Hold the files of ``--plot`` and ``--json`` against what can be written, and drawn."""
    with blame("--plot"):
        if plot is not None:
            check_writable(plot)
            from fastopt.cli.plots.style import check_format  # matplotlib: 0.5 s, only for those who plot

            check_format(plot)
    with blame("--json"):
        if json is not None:
            check_writable(json)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path`, or to standard output where that is ``-``. Numbers that are not finite become null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
