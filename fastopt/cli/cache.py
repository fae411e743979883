"""`fastopt cache`: the compiled kernels on disk; their directory, their size, and how to remove them."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from fastopt.cli.output import STDOUT, check_files, console, one_line, size, write_json, writing
from fastopt.kernels import cache as disk

EXAMPLES = "\n\n".join(
    [
        "[bold]Examples[/bold]",
        "fastopt cache",
        "fastopt cache --json -",
        "fastopt cache --clear",
        "FASTOPT_CACHE_DIR=/srv/kernels fastopt cache",
    ]
)

OFF = f"{disk.VARIABLE} is {disk.OFF}: every process compiles its kernels again"


def cache(
    clear: Annotated[
        bool,
        typer.Option(
            "--clear", help="Remove all kernels, but no other file and not the directory. They are compiled again."
        ),
    ] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as JSON; - is standard output.")
    ] = None,
) -> None:
    """Show where compiled kernels are kept on disk, how many there are, their size, and when they were last used.

    FASTOPT_CACHE_DIR names another directory, and FASTOPT_CACHE_DIR=0 turns the cache off. Above the bound on the size,
    the kernels go first that were not used for the longest time. To fill the cache, run: fastopt warmup

    The command does not make the directory. The exit code is 1 where the cache is off or cannot be used.
    """
    check_files({"--json": json})
    found = facts()
    if clear:
        if not found["usable"]:
            refuse(found)
        removed = _clear(Path(found["directory"]))
        found = {**facts(), "removed": removed}
        shown: Table | str = (
            f"removed {counted(removed['kernels'])}, {size(removed['bytes'])}, from {found['directory']}"
        )
    else:
        shown = _table(found)
    if json != STDOUT:
        console().print(shown, soft_wrap=True)
    if json is not None:
        with writing("--json"):
            write_json(json, found)
    if not found["usable"]:
        raise typer.Exit(1)


def facts() -> dict[str, Any]:
    """Return the setting of the cache, and its state, without making the directory: the first kernel makes it."""
    setting = os.environ.get(disk.VARIABLE) or None
    found: dict[str, Any] = {
        disk.VARIABLE: setting,
        **dict.fromkeys(("directory", "chosen_by")),
        "usable": False,
        **dict.fromkeys(("reason", "kernels", "bytes")),
        "most_bytes": disk.MOST_BYTES,
        **dict.fromkeys(("oldest_use", "newest_use")),
    }
    try:
        directory = disk.chosen_directory()
        if directory is None:
            return {**found, "reason": OFF}
        found |= {"directory": str(directory), "chosen_by": _chosen_by(setting, directory)}
        if not directory.exists():
            return {**found, **_of_absent(directory)}
        disk.checked_directory(make=False)
        kernels = disk.kept(directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        return {**found, "reason": one_line(error)}
    found |= {"usable": True, "kernels": len(kernels), "bytes": sum(file.bytes for file in kernels)}
    if kernels:
        newest, oldest = (date.fromtimestamp(kernels[k].used).isoformat() for k in (0, -1))
        found |= {"oldest_use": oldest, "newest_use": newest}
    if not os.access(directory, os.W_OK):
        found["reason"] = "the directory cannot be written: new kernels are compiled again in every process"
    return found


def refuse(found: dict[str, Any]) -> NoReturn:
    """End the command with exit code 1 and the reason why the cache cannot be used."""
    typer.echo(f"Error: the cache of kernels cannot be used: {found['reason']}", err=True)
    raise typer.Exit(1)


def _of_absent(directory: Path) -> dict[str, Any]:
    """Return whether a directory that does not exist can be made, and the reason."""
    parent = next(path for path in directory.parents if path.exists())
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return {"usable": True, "kernels": 0, "bytes": 0, "reason": "it will be made when the first kernel is compiled"}
    return {"reason": f"the directory does not exist and cannot be made in {parent}"}


def _chosen_by(setting: str | None, directory: Path) -> str:
    if setting is not None:
        return disk.VARIABLE
    of_desktop = os.environ.get("XDG_CACHE_HOME")
    return "XDG_CACHE_HOME" if of_desktop and directory.is_relative_to(of_desktop) else "the default for this user"


def _clear(directory: Path) -> dict[str, int]:
    """Remove the kernels and return their number and bytes; a directory that does not exist has none."""
    with writing("--clear"):
        removed = disk.clear(directory) if directory.exists() else []
    return {"kernels": len(removed), "bytes": sum(file.bytes for file in removed)}


def counted(kernels: int) -> str:
    """Return a number of kernels in words."""
    return f"{kernels} kernel{'' if kernels == 1 else 's'}"


def _table(found: dict[str, Any]) -> Table:
    rows = {
        "directory": found["directory"],
        "chosen by": found["chosen_by"],
        "kernels": found["kernels"],
        "size": None if found["bytes"] is None else f"{size(found['bytes'])} of at most {size(found['most_bytes'])}",
        "oldest use": found["oldest_use"],
        "newest use": found["newest_use"],
        "usable": "yes" if found["usable"] else "no",
        "reason" if not found["usable"] else "note": found["reason"],
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, Text(str(value)))
    return table
