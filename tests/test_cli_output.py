"""The files of all commands: whole or not at all, one option each; a full disk is an error of the run."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from scripts import ROOT, on_terminal
from typer.testing import CliRunner

from fastopt.cli.app import app

COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "train": (
        ("--data", "breast-cancer", "--epochs", "1", "--hidden", "none"),
        {"--json": "x.json", "--plot": "x.png", "--checkpoint": "x.safetensors"},
    ),
    "contour": (("-o", "sgd", "--steps", "2"), {"--json": "x.json", "--plot": "x.svg", "--animate": "x.gif"}),
    "bench": (
        ("-o", "sgd", "--sizes", "1k", "--seconds", "1", "--no-batch-norm", "--no-company"),
        {"--json": "x.json", "--plot": "x.pdf"},
    ),
    "warmup": (("-o", "sgd"), {}),
    "cache": ((), {"--json": "x.json"}),
    "info": ((), {"--json": "x.json"}),
}
"""The commands, each with arguments for a short run, and the options that name a file."""

OUTPUTS = [(command, option) for command, (_, files) in COMMANDS.items() for option in files]
PICTURES = [(command, option) for command, option in OUTPUTS if option in ("--plot", "--animate")]
PAIRS = [(command, *pair) for command, (_, files) in COMMANDS.items() for pair in combinations(files, 2)]


def plain(text: str) -> str:
    """Return text without colours, frames and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


def invoke(command: str, *arguments: Any) -> Any:
    return CliRunner().invoke(app, [command, *COMMANDS[command][0], *map(str, arguments)], env={"COLUMNS": "300"})


def run(*arguments: Any, out: Any = subprocess.PIPE, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fastopt", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "300", "PYTHONUNBUFFERED": ""},  # the interpreter flushes what is left at its end
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        **more,
    )


def test_every_option_that_names_a_file_is_listed():
    for command in app.registered_commands:
        hints = get_type_hints(command.callback)
        assert {f"--{name}" for name, hint in hints.items() if hint == Path | None} == set(COMMANDS[command.name][1])


@pytest.mark.parametrize(
    ("command", "option", "function"),
    [(*output, function) for output, function in zip(OUTPUTS, itertools.cycle(["fsync", "replace"]), strict=False)],
)
def test_a_full_disk_is_an_error_of_the_run_and_keeps_the_old_file(tmp_path, monkeypatch, command, option, function):
    path = tmp_path / COMMANDS[command][1][option]
    if option != "--checkpoint":  # which must not exist
        path.write_bytes(b"old")

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    result = invoke(command, option, path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"Error: {option}: [Errno 28] No space left on device: '{path}'" in plain(result.output)
    assert "Usage" not in result.output
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([] if option == "--checkpoint" else [b"old"])


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_an_interrupt_keeps_the_old_file(tmp_path, monkeypatch, command, option):
    path = tmp_path / COMMANDS[command][1][option]
    if option != "--checkpoint":
        path.write_bytes(b"old")
    before = [each.read_bytes() for each in tmp_path.iterdir()]

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    result = invoke(command, option, path)
    assert result.exit_code == 130
    assert [each.read_bytes() for each in tmp_path.iterdir()] == before


@pytest.mark.parametrize(("command", "one", "other"), PAIRS)
@pytest.mark.parametrize("way", ["relative", "link", "link to a file", "hard link", "folder"])
def test_two_options_that_name_one_file_are_refused(tmp_path, monkeypatch, command, one, other, way):
    monkeypatch.chdir(tmp_path)
    names = COMMANDS[command][1]
    first, second = tmp_path / names[one], Path(names[other])
    (tmp_path / "folder").mkdir()
    if way in ("hard link", "link to a file"):
        first.write_bytes(b"old")
    if way == "hard link":
        os.link(first, second)
    elif way == "folder":
        (tmp_path / "way").symlink_to("folder")
        second = Path("way") / second
        (tmp_path / "folder" / second.name).symlink_to(first)
    else:
        second.symlink_to(names[one])
    if way == "relative" and names[one].endswith("json") and other == "--checkpoint":
        second.unlink()
        second = Path("folder/..") / names[one]
    before = sorted(tmp_path.rglob("*"))
    result = invoke(command, one, first, other, second)
    assert result.exit_code == 2
    assert "must be another file than that of --" in plain(result.output)
    assert "Usage" in result.output
    assert sorted(tmp_path.rglob("*")) == before
    assert not first.exists() or first.read_bytes() == b"old"


def test_the_second_checkpoint_is_a_file_like_the_others(tmp_path):
    files = ("--checkpoint", tmp_path / "x", "--json", tmp_path / "x.batch-norm")
    result = invoke("train", "--hidden", "4", "--batch-norm", *files)
    assert result.exit_code == 2
    assert "must be another file than that of --json" in plain(result.output)


def test_a_checkpoint_survives_a_resumed_run_that_names_it_twice(tmp_path):
    """The report took its place, with exit code 0."""
    path = tmp_path / "k"
    assert invoke("train", "--checkpoint", path).exit_code == 0
    before = path.read_bytes()
    assert invoke("train", "--checkpoint", path, "--resume", "--json", path).exit_code == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(("command", "option"), PICTURES)
def test_a_picture_that_cannot_be_written_loses_no_numbers(tmp_path, monkeypatch, command, option):
    names = COMMANDS[command][1]
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).suffix != ".json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    result = invoke(command, option, tmp_path / names[option], "--json", tmp_path / "x.json")
    assert result.exit_code == 1
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["command"] == command


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")


@full
@pytest.mark.parametrize("command", [command for command, (_, files) in COMMANDS.items() if "--json" in files])
def test_a_full_device_is_an_error_of_the_run(command):
    result = invoke(command, "--json", "/dev/full")
    assert result.exit_code == 1
    assert "Error: --json: [Errno 28] No space left on device: '/dev/full'" in plain(result.output)
    assert "Usage" not in result.output


@full
@pytest.mark.parametrize(
    ("command", "more"),
    [("info", ()), ("contour", ("--json", "-")), ("info", ("--json", "/dev/stdout")), ("contour", ("--help",))],
)
def test_a_full_standard_output_is_one_line(command, more):
    with Path("/dev/full").open("w") as out:
        result = run(command, *COMMANDS[command][0], *more, out=out)
    assert result.returncode == 1
    assert re.search(r"^Error: .*No space left on device", result.stderr, flags=re.MULTILINE)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_closed_pipe_is_no_error_to_report():
    with subprocess.Popen(
        [sys.executable, "-m", "fastopt", "info"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors


@pytest.mark.skipif(os.name == "nt", reason="of POSIX systems")
def test_a_limit_on_the_size_of_files_is_an_error_of_the_run(tmp_path):
    """The system itself refuses the bytes, as a full disk does."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    path = tmp_path / "x"
    result = run("train", *COMMANDS["train"][0], "--checkpoint", path, preexec_fn=limit)
    assert result.returncode == 1
    assert f"Error: --checkpoint: [Errno 27] File too large: '{path}'" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Usage" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="of POSIX systems")
def test_a_disk_that_keeps_other_bytes_is_an_error_of_the_run(tmp_path, monkeypatch):
    fsync = os.fsync

    def damage(descriptor: int) -> None:
        fsync(descriptor)
        os.truncate(descriptor, 100)

    monkeypatch.setattr(os, "fsync", damage)
    result = invoke("train", "--checkpoint", tmp_path / "x")
    assert result.exit_code == 1
    assert "Error: --checkpoint: the description: must be in the new file" in plain(result.output)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="of POSIX systems")
@pytest.mark.parametrize(
    ("command", "waits"),
    [("train", ["loading breast-cancer", "compiling adam (1/1)"]), ("bench", ["compiling sgd (1/1)"])],
)
def test_a_terminal_shows_what_a_command_waits_for_before_its_work(command, waits):
    shown, out = on_terminal(command, *COMMANDS[command][0])
    places = [plain(shown).find(wait) for wait in waits]
    assert places[0] >= 0
    assert places == sorted(places)
    assert "fastopt: compiling kernels" not in shown  # the progress bar says more
    assert "compiling sgd" not in out


@pytest.mark.skipif(os.name == "nt", reason="of POSIX systems")
def test_json_goes_into_a_pipe():
    result = run("info", "--json", "/dev/stdout")
    assert result.returncode == 0
    assert '"versions": {' in result.stdout
