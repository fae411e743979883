"""The suite on the oldest and the newest versions that are supported: ``nox -s oldest``, ``nox -s newest -- -m quick``.

nox (``pip install nox``) makes an environment for each, with an interpreter that it finds, such as one of pyenv.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["oldest", "newest"]

OLDEST = ("numba==0.60.*", "numpy==1.26.*", "optree==0.14.*", "platformdirs==4.*", "safetensors==0.4.*")
"""The lower bounds of pyproject.toml."""


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Run the tests on the oldest versions; further arguments are pytest's."""
    session.install("-e", ".[test]", *OLDEST)
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Run the tests on the newest versions that pip finds; further arguments are pytest's."""
    session.install("--upgrade", "-e", ".[test]")
    session.run("pytest", "-n", "2", *session.posargs)
