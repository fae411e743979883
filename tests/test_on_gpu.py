"""bench/on_gpu.sh with commands that stand for those of a GPU machine: what runs, when, and what is left of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "on_gpu.sh"
STAND_INS = {
    "python": """
case "$*" in
    -\\ *) exec %(python)s -S "$@" ;;  # asks for packages, of which there are only those of this test
    --version) echo Python 3.12.0 ;;
    *pip*) echo "$*" >>"$LOG" ;;
    *) echo "begin $*" >>"$LOG"; sleep "${SLEEP:-0.2}"; echo "$PYTHONPATH, $CUDA_HOME"; echo "done: $*"
       echo "end $*" >>"$LOG"; [ -z "${FAIL:-}" ] || [[ "$*" != *$FAIL* ]] ;;
esac
""",
    "compute-sanitizer": """
case "$*" in *${FAIL:-nothing}*) code=1 ;; *) code=0 ;; esac
echo "begin $*" >>"$LOG"; sleep "${SLEEP:-0.2}"; echo "checked: $*"; echo "end $*" >>"$LOG"; exit $code
""",
    "nvidia-smi": 'echo "Some GPU, 1.2"; echo "another line"\n',
    "nvcc": "",
}

PACKAGES = ("numpy", "numba", "numba_cuda", "cupy", "optree", "platformdirs", "safetensors", "typing_extensions")
PACKAGES += ("pytest", "xdist", "pytest_benchmark", "hypothesis")


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with a GPU whose Python has all packages."""
    toolkit, packages = tmp_path / "toolkit", tmp_path / "packages"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "nvvm").mkdir()
    packages.mkdir()
    for name, source in STAND_INS.items():
        path = toolkit / "bin" / name
        path.write_text("#!/usr/bin/env bash\n" + source.replace("%(python)s", sys.executable))
        path.chmod(0o755)
    for name in PACKAGES:
        (packages / f"{name}.py").touch()
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "TMPDIR", "LANG")}
    return {
        **kept,
        "PATH": f"{toolkit / 'bin'}:/usr/bin:/bin",
        "PYTHON": "python",
        "PYTHONPATH": str(packages),
        "WHEELS": str(tmp_path / "wheels"),
        "LOG": str(tmp_path / "log"),
        "OUT": str(tmp_path / "out"),
    }


def run(machine: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command, env = ["bash", str(SCRIPT), *arguments], {**machine, **more}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_dry_run_shows_what_would_run_and_starts_nothing(machine):
    found = run(machine, "--dry-run")
    assert (found.returncode, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert lines[:2] == ["missing: nothing", f"wheels in {machine['WHEELS']}: 0"]
    assert lines[2].endswith("/toolkit")
    parts = [line.split(",")[0] for line in lines[4:]]
    assert parts == ["bench", "parity", "memcheck", "racecheck", "synccheck", "initcheck"]
    assert "bench/gpu.py --json" in lines[4]
    assert "-n 8 --gpu" in lines[5]
    assert "--tool memcheck --leak-check full" in lines[6]
    assert all("bench/gpu.py --sanitize" in line for line in lines[6:])
    limits = [int(line.split("at most ")[1].split()[0]) for line in lines[4:]]
    assert 60 + limits[0] + max(limits[1:]) < 600  # with the wheels' minute
    assert not Path(machine["LOG"]).exists()
    assert not Path(machine["OUT"]).exists()


def test_the_benchmark_runs_alone_and_the_rest_beside_each_other(machine):
    found = run(machine, SLEEP="0.5")
    assert (found.returncode, found.stderr) == (0, "")
    out = Path(machine["OUT"])
    names = ("bench", "parity", "memcheck", "racecheck", "synccheck", "initcheck")
    assert sorted(path.name for path in out.iterdir()) == sorted([*(f"{name}.txt" for name in names), "summary.txt"])
    log = [line.split()[0] for line in Path(machine["LOG"]).read_text().splitlines()]
    assert log == ["begin", "end", *["begin"] * 5, *["end"] * 5]
    summary = (out / "summary.txt").read_text().splitlines()
    assert found.stdout.splitlines() == summary
    assert len(summary) == 10
    assert summary[0] == "device: Some GPU, 1.2"
    assert summary[2].startswith("bench: passed in ")
    assert summary[2].endswith(f"done: bench/gpu.py --json {out}/gpu.json")
    assert summary[-1] == "all passed"
    assert "/toolkit" in (out / "bench.txt").read_text()


def test_what_fails_or_takes_too_long_is_told_and_the_rest_still_runs(machine, tmp_path):
    folder = str(tmp_path / "elsewhere")
    found = run(machine, folder, FAIL="racecheck", LIMIT_BENCH="1", SLEEP="1.5")
    assert found.returncode == 1
    lines = found.stdout.splitlines()
    assert lines[2].startswith("bench: STOPPED after ")
    assert lines[5].startswith("racecheck: FAILED with 1 in ")
    assert lines[6].startswith("synccheck: passed in ")
    assert lines[-1] == "failed: bench racecheck"
    assert (tmp_path / "elsewhere" / "summary.txt").read_text() == found.stdout


def test_what_is_missing_is_named_and_nothing_starts(machine, tmp_path):
    (tmp_path / "packages" / "optree.py").unlink()
    (tmp_path / "packages" / "cupy.py").unlink()
    (tmp_path / "toolkit" / "bin" / "nvidia-smi").unlink()
    (tmp_path / "toolkit" / "nvvm").rmdir()
    found = run(machine)
    assert (found.returncode, found.stdout) == (2, "")
    lacking = "missing: cupy-cuda13x optree nvidia-smi CUDA_HOME"
    assert found.stderr == f"bench/on_gpu.sh: {lacking}; see the head of this file for what to carry\n"
    assert run(machine, "--dry-run").stdout.splitlines()[0] == lacking
    assert not Path(machine["LOG"]).exists()


def test_wheels_that_were_carried_are_installed(machine, tmp_path):
    (tmp_path / "packages" / "cupy.py").unlink()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "cupy_cuda13x-14.2.0-cp312-cp312-manylinux2014_x86_64.whl").touch()
    found = run(machine)
    assert (found.returncode, found.stderr) == (0, "")
    installed = Path(machine["LOG"]).read_text().splitlines()[0]
    assert installed.startswith("-m pip install -q --no-index --no-deps")
    assert installed.endswith("manylinux2014_x86_64.whl")
