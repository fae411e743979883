"""`fastopt cache` shows and clears the kernels on disk."""

from __future__ import annotations

import json
import os
import sys
from datetime import date
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastopt.cli.app import app
from fastopt.kernels import cache


def invoke(command, *arguments, **environment):
    surroundings = {"COLUMNS": "500", "FASTOPT_CACHE_DIR": "0", **environment}
    return CliRunner().invoke(app, [command, *map(str, arguments)], env=surroundings)


def report(*arguments, code=0, **environment):
    result = invoke("cache", "--json", "-", *arguments, **environment)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path):
    """A cache of two kernels, and files that are not kernels."""
    path = tmp_path / "kernels"
    path.mkdir(mode=0o700)
    for name, size, used in (("adam-0.kernel", 70, 1e9), ("sgd-0.kernel", 1030, 1.1e9), ("notes.txt", 10, 1.2e9)):
        (path / name).write_bytes(bytes(size))
        os.utime(path / name, (used, used))
    return path


def day(seconds):
    return date.fromtimestamp(seconds).isoformat()


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_kernels_their_size_and_their_use_are_shown(folder):
    found = report(FASTOPT_CACHE_DIR=str(folder))
    assert found == {
        "FASTOPT_CACHE_DIR": str(folder),
        "directory": str(folder),
        "chosen_by": "FASTOPT_CACHE_DIR",
        "usable": True,
        "reason": None,
        "kernels": 2,
        "bytes": 1100,
        "most_bytes": cache.MOST_BYTES,
        "oldest_use": day(1e9),
        "newest_use": day(1.1e9),
    }
    lines = invoke("cache", FASTOPT_CACHE_DIR=str(folder)).output.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        f"directory {folder}",
        "chosen by FASTOPT_CACHE_DIR",
        "kernels 2",
        "size 1.1 KiB of at most 256 MiB",
        f"oldest use {day(1e9)}",
        f"newest use {day(1.1e9)}",
        "usable yes",
    ]


def test_info_reports_the_same(folder):
    result = invoke("info", "--json", "-", FASTOPT_CACHE_DIR=str(folder))
    assert json.loads(result.stdout)["cache"] == report(FASTOPT_CACHE_DIR=str(folder))


def test_the_command_does_not_make_the_directory(tmp_path):
    path = tmp_path / "a" / "b"
    for arguments in ((), ("--clear",)):
        found = report(*arguments, FASTOPT_CACHE_DIR=str(path))
        assert (found["usable"], found["kernels"], found["oldest_use"]) == (True, 0, None)
        assert "will be made" in found["reason"]
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME decides on Linux")
def test_the_choice_of_the_directory_is_explained(tmp_path):
    found = report(FASTOPT_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path))
    assert (found["chosen_by"], found["FASTOPT_CACHE_DIR"]) == ("XDG_CACHE_HOME", None)
    assert Path(found["directory"]) == tmp_path / "fastopt" / "kernels"
    found = report(FASTOPT_CACHE_DIR="", XDG_CACHE_HOME="", HOME=str(tmp_path))
    assert found["chosen_by"] == "the default for this user"
    assert Path(found["directory"]).is_relative_to(tmp_path)
    assert not list(tmp_path.iterdir())


# --- a cache that cannot be used --------------------------------------------------------------------------------------


@pytest.fixture(params=["off", "shared", "file", "below a file", "unknown user"])
def unusable(request, folder, tmp_path):
    """A setting of FASTOPT_CACHE_DIR that cannot be used, and the reason."""
    if request.param == "shared":
        if not hasattr(os, "getuid"):
            pytest.skip("POSIX permissions")
        folder.chmod(0o777)
    return {
        "off": ("0", "FASTOPT_CACHE_DIR is 0: every process compiles"),
        "shared": (str(folder), "run: chmod 700"),
        "file": (str(folder / "notes.txt"), "Not a directory"),
        "below a file": (str(folder / "notes.txt" / "a"), "otes.txt"),
        "unknown user": ("~nobody-of-this-name/cache", "home"),
    }[request.param]


@pytest.mark.parametrize("command", [("cache",), ("cache", "--clear")])
def test_a_cache_that_cannot_be_used_is_exit_code_1_with_the_reason(folder, unusable, command):
    setting, reason = unusable
    before = sorted(folder.iterdir())
    result = invoke(*command, FASTOPT_CACHE_DIR=setting)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert reason in result.output
    assert "Usage" not in result.output
    assert sorted(folder.iterdir()) == before


def test_an_unusable_cache_is_reported_as_json_too(unusable):
    setting, reason = unusable
    found = report(code=1, FASTOPT_CACHE_DIR=setting)
    assert found["usable"] is False
    assert reason in found["reason"]


def test_a_directory_that_cannot_be_made_is_not_usable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = report(code=1, FASTOPT_CACHE_DIR=str(tmp_path / "a" / "b"))
    assert found["reason"] == f"the directory does not exist and cannot be made in {tmp_path}"


# --- clear ------------------------------------------------------------------------------------------------------------


def test_clear_removes_the_kernels_and_nothing_else(folder):
    result = invoke("cache", "--clear", FASTOPT_CACHE_DIR=str(folder))
    assert (result.exit_code, result.output) == (0, f"removed 2 kernels, 1.1 KiB, from {folder}\n")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    found = report("--clear", FASTOPT_CACHE_DIR=str(folder))
    assert (found["removed"], found["kernels"]) == ({"kernels": 0, "bytes": 0}, 0)


def test_a_kernel_that_cannot_be_removed_is_an_error(folder, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    result = invoke("cache", "--clear", FASTOPT_CACHE_DIR=str(folder))
    assert result.exit_code == 1
    assert result.output.startswith("Error: --clear: [Errno 13] Permission denied")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cache", ("--clear", "--json", "FASTOPT_CACHE_DIR", "exit code is 1")),
    ],
)
def test_help_explains_the_command(command, words):
    text = " ".join(invoke(command, "--help").output.split())
    for word in (*words, "Examples", f"fastopt {command}"):
        assert word in text
