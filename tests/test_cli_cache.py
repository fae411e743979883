"""`fastopt cache` shows and clears the kernels on disk; `fastopt warmup` compiles those of an ordinary training."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from scripts import on_terminal, run
from typer.testing import CliRunner

import fastopt
from fastopt import kernels
from fastopt.cli import warmup
from fastopt.cli.app import app
from fastopt.kernels import bind, cache
from fastopt.kernels.cpu.backend import CPU


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


@pytest.mark.parametrize("command", [("cache",), ("cache", "--clear"), ("warmup",)])
def test_a_cache_that_cannot_be_used_is_exit_code_1_with_the_reason(folder, unusable, monkeypatch, command):
    monkeypatch.setattr(warmup, "_warm_optimizer", lambda *arguments: pytest.fail("compiled"))
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


def test_a_directory_that_can_only_be_read_is_usable_but_not_for_warmup(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(folder))
    assert report(FASTOPT_CACHE_DIR=str(folder))["kernels"] == 2
    result = invoke("warmup", FASTOPT_CACHE_DIR=str(folder))
    assert result.exit_code == 1
    assert "Error: the cache of kernels cannot be used: the directory cannot be written" in result.output


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


# --- warmup -----------------------------------------------------------------------------------------------------------

TRAIN = """
import numpy as np
import fastopt
from fastopt.kernels.bind import WAIT

for size in (5, 200_000):
    for max_norm in (None, 2.0):
        opt = fastopt.Momentum({"W": np.ones((size, 1), np.float32), "b": np.ones(3, np.float32)}, max_norm=max_norm)
        for _ in range(3):
            opt.step()
            opt.step({"W": np.ones((size, 1), np.float32), "b": np.ones(3, np.float32)})
print(WAIT.compiled, WAIT.loaded > 5)
"""


def test_after_warmup_a_training_compiles_nothing(tmp_path, monkeypatch):
    path = tmp_path / "kernels"
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(path))
    shown, out = on_terminal("warmup", "-o", "momentum,momentum:ema")
    assert "compiling momentum (1/2)" in shown
    assert "compiling momentum:ema (2/2)" in shown
    assert "fastopt: compiling kernels" not in shown
    count = len(list(path.glob("*.kernel")))
    assert out.startswith(f"{count} kernels compiled, 0 found, in ")
    assert f" s; {path} has {count} kernels, " in out
    assert (path.stat().st_mode & 0o777) == 0o700

    trained = run("-c", TRAIN, FASTOPT_CACHE_DIR=str(path), FASTOPT_NUM_THREADS="2")
    assert (trained.stdout, trained.stderr) == ("0 True\n", "")
    again = run("-m", "fastopt", "warmup", "-o", "momentum", FASTOPT_CACHE_DIR=str(path))
    assert again.stdout.startswith("0 kernels compiled, ")
    assert again.stderr == ""  # no progress without a terminal


@pytest.fixture
def with_shared_cache(monkeypatch):
    """Use the kernels of this test run, but none that this process has loaded already; small arrays."""
    monkeypatch.setattr(warmup, "SIDE", 4)
    monkeypatch.setitem(kernels._made, "cpu", CPU())
    return {"FASTOPT_CACHE_DIR": os.environ["FASTOPT_CACHE_DIR"]}


def test_warmup_runs_optimizers_with_a_point_of_their_own_without_a_warning(with_shared_cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = invoke("warmup", "-o", "muon,nesterov:lookahead,schedulefreeadamw", **with_shared_cache)
    assert (result.exit_code, result.stderr) == (0, "")
    compiled, found = map(int, re.match(r"(\d+) kernels? compiled, (\d+) found, in ", result.output).groups())
    assert compiled + found > 8  # for each one with and one without max_norm, the norm, and the moves to both points


def test_after_warmup_batchnorm_compiles_nothing(with_shared_cache, monkeypatch):
    monkeypatch.setattr(bind, "WAIT", bind.Wait())
    warmup._warm_batchnorm("float32", True, "relu")
    warmed = bind.WAIT.compiled + bind.WAIT.loaded
    assert warmed > 5
    for shape in ((8, 3), (4096, 32), (32, 3, 5, 5), (128, 16, 16, 16)):
        x, dy = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
        for out in (None, dy):
            _, saved = fastopt.batchnorm_forward(x, activation="relu")
            fastopt.batchnorm_backward(dy, saved, out=out)
    assert bind.WAIT.compiled + bind.WAIT.loaded == warmed


def test_warmup_names_the_dtype_where_there_are_two(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(warmup, "_warm_optimizer", lambda choice, dtype: calls.append((choice.label, dtype)))
    monkeypatch.setattr(warmup, "_warm_batchnorm", lambda dtype, *flags: calls.append(("BatchNorm", dtype, *flags)))
    arguments = ("-o", "sgd,adam:amsgrad", "--dtype", "all", "--batch-norm")
    result = invoke("warmup", *arguments, FASTOPT_CACHE_DIR=str(folder))
    assert result.exit_code == 0
    assert calls[:4] == [(label, dtype) for label in ("sgd", "adam:amsgrad") for dtype in ("float32", "float64")]
    assert len(set(calls[4:])) == 8
    assert result.output.startswith("0 kernels compiled, 0 found, in 0.")
    assert result.output.endswith(f" s; {folder} has 2 kernels, 1.1 KiB\n")


def test_warmup_ends_where_a_kernel_cannot_be_kept(folder, monkeypatch):
    def fail(*arguments):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            cache._go_on_without(error)

    monkeypatch.setattr(warmup, "_warm_optimizer", fail)
    monkeypatch.setattr(cache, "_reported", set())
    result = invoke("warmup", FASTOPT_CACHE_DIR=str(folder))
    assert result.exit_code == 1
    assert result.output == "Error: the cache of kernels cannot be used: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float16"), "must be one of float32, float64, all, got 'float16'"),
        (("-o", "adma"), "did you mean 'ada"),
        (("-o", "adam:eps=-1"), "eps"),
    ],
)
def test_a_wrong_option_is_refused(folder, arguments, message):
    result = invoke("warmup", *arguments, FASTOPT_CACHE_DIR=str(folder))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cache", ("--clear", "--json", "FASTOPT_CACHE_DIR", "fastopt warmup", "exit code is 1")),
        (
            "warmup",
            ("--optimizer", "--dtype", "--batch-norm", "momentum:ema", "max_norm", "[default: all]", "exit code"),
        ),
    ],
)
def test_help_explains_the_command(command, words):
    text = " ".join(invoke(command, "--help").output.split())
    for word in (*words, "Examples", f"fastopt {command}"):
        assert word in text
