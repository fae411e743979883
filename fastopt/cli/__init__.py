"""The command `fastopt`. It uses the public names of the library, and the packages of one extra."""

from __future__ import annotations

import sys

EXTRA = ("typer", "rich", "matplotlib", "sklearn", "threadpoolctl")
"""Packages that `pip install 'fastopt[cli]'` installs; the library itself needs none of them."""


def main() -> None:
    """Run the command line; if a package of the extra is missing, exit with the command that installs it."""
    try:
        from fastopt.cli.app import app

        app(prog_name="fastopt")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(f"fastopt: the command needs the package {package!r}; install with: pip install 'fastopt[cli]'")
