"""Output shared by all commands: consoles, JSON, files, checks of paths before the work begins, errors."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastopt.files import is_stream, same_file, write_file

STDOUT = Path("-")


def console(*, for_json: Path | None = None) -> Console:
    """Return the console for tables: standard output, or standard error if the JSON goes to standard output."""
    return Console(stderr=for_json == STDOUT, highlight=False, markup=False)


def progress(unit: str, shown: bool = True) -> Progress:
    """Return progress bars, one per task, on standard error; they show nothing unless standard error is a terminal.

    `unit` names what is counted; as a format string of rich it may show fields of the task. `shown`: False shows
    nothing anywhere.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not (shown and sys.stderr.isatty()),
    )


@contextmanager
def waiting(shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show what the command waits for before its own work, as in ``compiling adan (7/25)``, until the block ends.

    The block calls the returned function with a text, and for one of many things also with its index and their number.
    Shows nothing unless standard error is a terminal, and nothing at all if `shown` is False.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    hidden = not (shown and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        from fastopt.kernels.bind import WAIT  # imports numba

        def show(text: str, index: int = 0, count: int | None = None) -> None:
            place = "" if count is None else f" ({index + 1}/{count})"
            bar.update(task, description=f"{text}{place}", completed=index, total=count, refresh=True)

        before, WAIT.quiet = WAIT.quiet, True
        try:
            yield show
        finally:
            WAIT.quiet = before


@contextmanager
def blame(option: str) -> Iterator[None]:
    """Report an error inside the block as an error of `option`: its message, no traceback, exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


@contextmanager
def writing(option: str) -> Iterator[None]:
    """Report an error of a file inside the block, which the work has led to: its message, no usage, exit code 1."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        typer.echo(f"Error: {option}: {error}", err=True)
        raise typer.Exit(1) from None


def check_writable(path: Path) -> None:
    """Raise OSError unless `path` is ``-`` or can be written: check it before the training, not after."""
    if path == STDOUT:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path}: must be a file, got a directory; give the name of a file in it")
    stream = is_stream(path)
    folder = (Path(os.path.realpath(path)) if path.is_symlink() and not stream else path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: must be in an existing directory, got {folder}; run: mkdir -p {folder}")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: must be writable; choose another file")
    # A new file is made beside the old one, and replaces it.
    if not stream and not os.access(folder, os.W_OK):
        raise PermissionError(
            f"{path}: must be writable; choose another file, in a directory where files can be made, unlike {folder}"
        )


def check_files(files: Mapping[str, Path | None]) -> None:
    """Check that the files of options such as ``--plot`` and ``--json`` can be written, and that they differ.

    An error names the option. A plot and an animation must also have a format that can be drawn.
    """
    seen: dict[str, Path] = {}
    for option, path in files.items():
        if path is None:
            continue
        with blame(option):
            check_writable(path)
            if option in ("--plot", "--animate"):
                from fastopt.cli.plots import style  # importing matplotlib takes 0.5 s: only for a plot

                check = style.check_format if option == "--plot" else style.check_gif
                check(path)
            for other, taken in seen.items():
                if same_file(path, taken):
                    raise ValueError(f"{path}: must be another file than that of {other}, got the same; choose another")
        seen[option] = path


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path`, or to standard output for ``-``; numbers that are not finite become null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_file(path, text.encode())


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, or the name of its type where it has none."""
    return " ".join(str(error).split()).rstrip(" :") or type(error).__name__


def size(count: int) -> str:
    """Return a number of bytes in the largest unit of which it has one.

    >>> size(70), size(1_500_000), size(256 * 2**20)
    ('70 bytes', '1.4 MiB', '256 MiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            number = count / 2**power
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{count} byte{'' if count == 1 else 's'}"


def spelled(count: int) -> str:
    """Return a number of parameters in the notation of ``--sizes``: 1000 as 1k, 2500000 as 2.5M.

    >>> spelled(1000), spelled(2_500_000), spelled(1234)
    ('1k', '2.5M', '1234')
    """
    for unit, sign in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit and count * 10 % unit == 0:
            return f"{count / unit:g}{sign}"
    return str(count)
