"""`fastopt info`: reports what exists, gives the reason for what is missing, changes nothing and never fails."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numba
import numpy as np
import pytest
from typer.testing import CliRunner

import fastopt
from fastopt.cli.app import app
from fastopt.kernels import driver, threads
from fastopt.kernels.driver import DRIVER


def invoke(*arguments, **environment):
    # Do not use the kernel cache of this test run: another worker may be writing to it.
    surroundings = {"COLUMNS": "500", "FASTOPT_CACHE_DIR": "0", **environment}
    return CliRunner().invoke(app, ["info", *map(str, arguments)], env=surroundings)


def report(**environment):
    result = invoke("--json", "-", **environment)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_memory_shows_what_an_optimizer_really_holds():
    result = invoke("--memory", "2M", "--json", "-")
    found = json.loads(result.stdout)
    assert (found["parameters"], found["optimizer"]) == (2e6, "adamw")
    rows = {(row["parameters"], row["options"]): row for row in found["formats"]}
    assert len(rows) == 9
    for (dtype, _), row in rows.items():
        assert row["bytes"]["parameters"] == row["bytes"]["gradients"] == (4 if dtype == "float32" else 2)
    opt = fastopt.AdamW({"w": np.zeros(2**16, np.float32)}, states="int8")
    assert rows["float32", "states='int8'"]["bytes"]["states"] == opt.nbytes.states / 2**16
    table = invoke("--memory", "7B", "--optimizer", "lamb")
    assert "GiB for 7,000,000,000 parameters" in table.output
    assert "int8" not in table.output  # which a rule of sums has not
    assert "104.31" in table.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "7x"), "--memory: must be a number of parameters, such as 125M, 7B or 350000, got '7x'"),
        (("--memory", "-3"), "must be a number of parameters"),
        (("--memory", "1M", "--optimizer", "adm"), "--optimizer: optimizer: must be one of"),
    ],
)
def test_memory_of_what_is_no_size_or_no_optimizer(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_versions_match_the_installed_packages():
    versions = report()["versions"]
    assert versions["fastopt"] == fastopt.__version__
    assert versions["python"] == platform.python_version()
    for package in ("numba", "llvmlite", "numpy", "optree"):
        assert versions[package] == version(package)


def test_cpu_and_threads():
    found = report()
    cpu, how = found["cpu"], found["threads"]
    assert cpu["name"]
    assert cpu["cores"] == os.cpu_count()
    assert 1 <= cpu["usable_cores"] <= cpu["cores"]
    assert how["count"] == fastopt.get_num_threads()
    assert how["decided_by"] in ("the processors of this process", "numba", "torch", "FASTOPT_NUM_THREADS")
    assert (how["kind"] == "fastopt's own") == (how["reason"] is None)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="compares with /proc/cpuinfo of Linux")
def test_cpu_features_match_those_of_the_kernel():
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no x86: /proc/cpuinfo has no line of flags")
    found = report()["cpu"]
    for name in ("avx2", "fma", "avx512f"):
        assert (name in found["features"]) == (name in flags)
    assert found["name"] in text


def test_the_table_shows_the_content_of_the_json():
    result = invoke()
    assert result.exit_code == 0
    found = report()
    for topic, facts in found.items():
        assert topic in result.output
        for value in facts.values():
            if isinstance(value, str | int) and not isinstance(value, bool):
                assert str(value) in result.output
    for feature in found["cpu"]["features"]:
        assert feature in result.output


def test_json_goes_to_a_file_beside_the_table(tmp_path):
    path = tmp_path / "info.json"
    result = invoke("--json", path)
    assert "versions" in result.output
    assert json.loads(path.read_text(encoding="utf-8")).keys() == report().keys()


def test_an_impossible_json_path_is_an_error_with_the_remedy(tmp_path):
    result = invoke("--json", tmp_path / "nowhere" / "info.json")
    assert result.exit_code == 2
    assert "mkdir -p" in result.output


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_users_own_cache_directory_is_reported(tmp_path):
    cache = report(FASTOPT_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path))["cache"]
    assert cache["FASTOPT_CACHE_DIR"] is None
    assert Path(cache["directory"]).parts[-2:] == ("fastopt", "kernels")


def test_no_cache_is_reported():
    cache = report(FASTOPT_CACHE_DIR="0")["cache"]
    assert (cache["FASTOPT_CACHE_DIR"], cache["directory"]) == ("0", None)
    assert "every process compiles" in cache["reason"]


def test_the_report_does_not_create_the_cache_directory(tmp_path):
    path = tmp_path / "cache"
    cache = report(FASTOPT_CACHE_DIR=str(path))["cache"]
    assert cache["FASTOPT_CACHE_DIR"] == str(path)
    assert "will be made" in cache["reason"]
    assert not path.exists()


def test_a_private_cache_directory_is_usable_and_its_kernels_are_counted(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "adam-0.kernel").write_bytes(bytes(70))
    cache = report(FASTOPT_CACHE_DIR=str(tmp_path))["cache"]
    assert (cache["usable"], cache["kernels"], cache["bytes"], cache["reason"]) == (True, 1, 70, None)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_a_cache_directory_that_others_may_write_to_is_not_usable(tmp_path):
    tmp_path.chmod(0o777)
    cache = report(FASTOPT_CACHE_DIR=str(tmp_path))["cache"]
    assert cache["usable"] is False
    assert "chmod 700" in cache["reason"]


def test_a_cache_directory_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    cache = report(FASTOPT_CACHE_DIR=str(tmp_path))["cache"]
    assert cache["usable"] is True
    assert "cannot be written" in cache["reason"]


@pytest.mark.parametrize("name", ["file", "~nobody-of-this-name/cache"])
def test_a_cache_directory_that_is_none_is_reported(tmp_path, name):
    (tmp_path / "file").touch()
    cache = report(FASTOPT_CACHE_DIR=name if name[0] == "~" else str(tmp_path / name))["cache"]
    assert cache["usable"] is False
    assert cache["reason"]


# --- CUDA and its failures --------------------------------------------------------------------------------------------


class Cuda:
    """A stand-in for numba.cuda."""

    def __init__(self, devices=(), error=None, compilers=True):
        self.devices = devices
        self.error = error
        self.compilers = compilers

    def is_available(self):
        return bool(self.devices) and self.compilers

    def list_devices(self):
        if self.error is not None:
            raise self.error
        return self.devices


class Device:
    name = b"NVIDIA Imaginary 1"
    compute_capability = (9, 0)


@pytest.fixture
def with_cuda(monkeypatch):
    def put(module):
        backend = importlib.import_module("fastopt.kernels.cuda.backend")
        monkeypatch.setattr(backend, "cuda", module)
        monkeypatch.setattr(backend, "SIMULATED", False)
        # Make the backend again and do not keep it for other tests: the simulator already has one.
        monkeypatch.setattr(fastopt.kernels, "get_backend", fastopt.kernels._make)

    return put


def refusal():
    with pytest.raises(RuntimeError) as caught:
        fastopt.kernels.get_backend("cuda")
    return str(caught.value)


def test_cuda_without_a_driver_gives_the_reason(with_cuda):
    with_cuda(Cuda(error=RuntimeError("Error at driver init:\n\nCUDA driver library cannot be found.\n:")))
    cuda = report()["cuda"]
    assert (cuda["available"], cuda["devices"], cuda["backend"]) == (False, [], False)
    assert cuda["reason"] == refusal()
    assert "no CUDA driver here (Error at driver init: CUDA driver library cannot be found); use" in cuda["reason"]


def test_a_failing_cuda_import_gives_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastopt.kernels.cuda.backend", None)
    monkeypatch.setattr(fastopt.kernels, "get_backend", fastopt.kernels._make)
    cuda = report()["cuda"]
    assert (cuda["available"], cuda["devices"], cuda["backend"]) == (False, [], False)
    assert cuda["reason"] == refusal()
    assert "pip install 'fastopt[cuda13]'" in cuda["reason"]


@pytest.mark.parametrize(
    ("module", "missing", "expected"),
    [
        (Cuda(), (), "numba finds no CUDA device here"),
        (Cuda([Device()], compilers=False), (), "numba does not find NVIDIA's compilers; pip install"),
        (Cuda([Device()]), ("numba_cuda",), "numba-cuda is not installed; pip install"),
        (Cuda([Device()]), ("cupy",), "CuPy, which holds the buffers, cannot be imported"),
    ],
    ids=["device", "compilers", "numba-cuda", "cupy"],
)
def test_a_backend_that_cannot_work_gives_the_reason(with_cuda, monkeypatch, module, missing, expected):
    with_cuda(module)
    found = lambda name: None if name in missing else name  # noqa: E731
    monkeypatch.setattr("fastopt.kernels.cuda.backend.find_spec", found)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    cuda = report()["cuda"]
    assert cuda["available"] == module.is_available()
    assert len(cuda["devices"]) == len(module.devices)
    assert cuda["backend"] is False
    assert cuda["reason"] == refusal()
    assert expected in cuda["reason"]
    assert cuda["reason"].startswith("backend='cuda': ")
    assert cuda["reason"].endswith("; use backend='cpu'")


def test_cuda_devices_are_listed(with_cuda, monkeypatch):
    with_cuda(Cuda(devices=[Device()]))
    monkeypatch.setattr(fastopt.kernels, "get_backend", lambda name: object())
    cuda = report()["cuda"]
    assert cuda["devices"] == [{"name": "NVIDIA Imaginary 1", "compute_capability": "9.0"}]
    assert (cuda["available"], cuda["backend"], cuda["reason"]) == (True, True, None)
    assert "name NVIDIA Imaginary 1, compute capability 9.0" in invoke().output


@pytest.mark.parametrize(("layer", "kind"), [("omp", "numba's (omp)"), (None, "Python's")])
def test_foreign_threads_are_reported_with_the_reason(monkeypatch, layer, kind):
    def start():
        if layer is None:
            raise ValueError("No threading layer could be loaded.")

    monkeypatch.setattr(driver, "why_not", lambda: "the C library lacks sem_post")
    monkeypatch.setattr(driver.numba_parallel, "_launch_threads", start)
    monkeypatch.setattr(numba, "threading_layer", lambda: layer)
    for name in ("mode", "reason", "adaptive"):
        monkeypatch.setattr(DRIVER, name, getattr(DRIVER, name))  # restored after the test
    DRIVER.mode = None
    found = report()["threads"]
    assert (found["kind"], found["reason"]) == (kind, "the C library lacks sem_post")


def test_an_invalid_number_of_threads_is_reported(monkeypatch):
    monkeypatch.setattr(threads, "_asked", False)
    found = report(FASTOPT_NUM_THREADS="all")["threads"]
    assert found["count"] is None
    assert found["reason"] == "FASTOPT_NUM_THREADS: must be a whole number from 1 to 256, got 'all'"


def test_the_command_works_with_the_cuda_of_this_machine():
    cuda = report()["cuda"]
    assert cuda["backend"] or cuda["reason"]


def test_relevant_environment_variables_are_listed():
    environment = report(NUMBA_DEVELOPER_NOTE="7", UNRELATED="8")["environment"]
    assert environment["NUMBA_DEVELOPER_NOTE"] == "7"
    assert "UNRELATED" not in environment


def test_a_count_of_one_is_printed_as_a_number(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert [line.split() for line in invoke().output.splitlines() if line.split()[:1] == ["cores"]] == [["cores", "1"]]
