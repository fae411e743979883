"""The command `fastopt`. It uses the public names of the library, and the packages of one extra."""

from __future__ import annotations

import errno
import os
import sys

FULL = (errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))
"""The errors of a device that takes no more."""

EXTRA = ("typer", "rich", "matplotlib", "sklearn", "threadpoolctl")
"""Packages that `pip install 'fastopt[cli]'` installs; the library itself needs none of them."""


def main() -> None:
    """Run the command line; if a package of the extra is missing, exit with the command that installs it.

    If standard output takes no more, exit with code 1 and that message.
    """
    try:
        from fastopt.cli.app import app

        try:
            app(prog_name="fastopt")
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:  # files have a name, standard output has none
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        sys.exit(f"Error: standard output: {error.strerror}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(f"fastopt: the command needs the package {package!r}; install with: pip install 'fastopt[cli]'")
