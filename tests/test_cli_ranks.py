"""`fastopt train` on several processes: the same result as one, and how processes are started or refused."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import Any

import pytest
from ranks import LACKING, MPIEXEC
from scripts import compiled, run
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

import fastopt
from fastopt.cli import ranks
from fastopt.cli.app import app
from fastopt.cli.choices import parse_optimizer
from fastopt.cli.network import backward, new_layers
from fastopt.cli.runs import Plan, Setting, make_run
from fastopt.cli.runs import train as train_run
from fastopt.communicators import run_threads
from fastopt.init import he_normal_

ARGUMENTS = ("train", "--epochs", "2", "--hidden", "16", "--batch-size", "100", "--lr", "0.01", "--json", "-")
WITHOUT_MPI = (
    "import shutil; shutil.which = lambda *args, **kwargs: None; from fastopt.cli import main; main()"  # for gloo
)
needs_mpi = pytest.mark.skipif(bool(LACKING["mpi"]), reason=LACKING["mpi"])
needs_torch = pytest.mark.skipif(bool(LACKING["gloo"]), reason=LACKING["gloo"])


def of_micro_batches(size: int) -> str:
    """The digest of one process that adds up the gradients of the parts of each batch."""
    setting = Setting("digits", [16], 2, "cpu", 0)
    opt = fastopt.Adam(new_layers(setting.layers, he_normal_, setting.rng("weights")), lr=0.01)
    x_train, y_train, *_ = setting.rows
    of_ranks = [
        fastopt.minibatches(x_train, y_train, batch_size=100, rng=setting.rng("batches"), part=(rank, size))
        for rank in range(size)
    ]
    with threadpool_limits(limits=1, user_api="blas"):
        for _ in range(2):
            for parts in zip(*of_ranks, strict=True):
                rows = sum(len(x) for x, _ in parts)
                for x, labels in parts:
                    backward(opt.params, x, labels, out=opt.grads, rows=rows)
                    opt.accumulate(opt.grads)
                opt.step(reduction="sum")
    return hashlib.sha256(opt.flat.data.tobytes()).hexdigest()


def alone(*more: str) -> dict[str, Any]:
    """The report of one process."""
    result = CliRunner().invoke(app, [*ARGUMENTS, *more])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def processes(*command: str) -> dict[str, Any]:
    """The report of several."""
    done = run(*command, timeout=120.0, **compiled())
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)  # of the first process alone
    return found


def assert_like_one(found: dict[str, Any], size: int) -> None:
    expected = alone()
    assert found["settings"].pop("ranks") == size
    assert found["settings"] == expected["settings"]
    own, other = found["runs"][0], expected["runs"][0]
    assert own["parameters_sha256"] == of_micro_batches(size)
    assert own["losses"] == pytest.approx(other["losses"], rel=1e-3)
    assert own["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=0.01)
    assert own["steps"] == other["steps"]


# --- several processes ------------------------------------------------------------------------------------------------


@needs_mpi
def test_ranks_starts_processes_of_mpi():
    assert_like_one(processes("-m", "fastopt", *ARGUMENTS, "--ranks", "2"), 2)


@needs_mpi
def test_processes_that_mpiexec_has_started():
    starter = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    command = (str(MPIEXEC), "-n", "3", sys.executable, "-m", "mpi4py", "-m", "fastopt")
    assert_like_one(processes("-c", starter, *command, *ARGUMENTS), 3)


@needs_torch
def test_ranks_starts_processes_of_torch():
    assert_like_one(processes("-c", WITHOUT_MPI, *ARGUMENTS, "--ranks", "2"), 2)


@needs_torch
def test_where_a_process_fails_the_others_are_ended():
    done = run("-c", WITHOUT_MPI, *ARGUMENTS, "--batch-size", "9999", "--ranks", "2", timeout=60.0, **compiled())
    assert done.returncode == 2, done.stdout + done.stderr
    assert "--batch-size" in done.stderr


# --- the same, in threads of this process -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_threads_are_one_process(size):
    def train(comm):
        setting = Setting("digits", [16], 2, "cpu", 0, comm)
        plan = Plan("adam", parse_optimizer("adam", 0.01), 100, "constant", "he_normal", "relu")
        return train_run(make_run(plan, setting), setting, epochs=2).parameters

    assert set(run_threads(size, train)) == {of_micro_batches(size)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_threads_train_one_network_with_batch_normalisation(size):
    def train(comm):
        setting = Setting("digits", [16], 2, "cpu", 0, comm)
        plan = Plan("sgd", parse_optimizer("sgd", 0.01), 100, "constant", "he_normal", "relu", batch_norm=True)
        made = make_run(plan, setting)
        outcome = train_run(made, setting, epochs=2)
        return outcome, made.norms[0].running_var.tobytes()

    found = run_threads(size, train)
    outcome, variances = found[0]
    expected = alone("--batch-norm", "--optimizer", "sgd")["runs"][1]
    assert outcome.losses == pytest.approx(expected["losses"], rel=1e-5)
    assert outcome.steps == expected["steps"]
    for other, other_variances in found[1:]:
        assert other.parameters == outcome.parameters
        assert other_variances == variances
        assert other.losses == outcome.losses


# --- what is refused, and what is started -----------------------------------------------------------------------------


def refused(*more: str) -> str:
    result = CliRunner().invoke(app, [*ARGUMENTS, *more], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    return re.sub(r"[\s│╭╮╰╯─]+", " ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.stderr))


def test_what_several_processes_cannot_do_is_refused(tmp_path, monkeypatch):
    text = refused("--ranks", "2", "--checkpoint", str(tmp_path / "x"))
    assert "--ranks: must be 1 with --checkpoint, got several processes" in text
    assert "--ranks" in refused("--ranks", "0")
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = refused("--ranks", "2")
    assert "needs mpi4py and an MPI, or torch, to start processes, got neither; pip install 'fastopt[mpi]'" in text
    monkeypatch.setenv("PMI_SIZE", "4")
    assert "needs mpi4py, because mpiexec has started 4 processes; pip install 'fastopt[mpi]'" in refused()


def test_one_process_is_none_of_several(monkeypatch):
    for value in ("1", "none"):
        monkeypatch.setenv("PMI_SIZE", value)
        assert ranks.world() is None


def test_processes_get_the_options_that_were_given(monkeypatch):
    started = []
    monkeypatch.setattr("fastopt.cli.train.start", lambda size, arguments: started.append((size, arguments)) or 7)
    more = ("-o", "sgd,adam", "-o", "lion", "--ranks", "4", "--batch-norm")
    result = CliRunner().invoke(app, [*ARGUMENTS, *more])
    assert result.exit_code == 7
    ((size, arguments),) = started
    assert size == 4
    assert arguments[0] == "train"
    given = [*ARGUMENTS[1:], "--optimizer", "sgd,adam", "--optimizer", "lion", "--batch-norm"]
    assert sorted(arguments[1:]) == sorted(given)
