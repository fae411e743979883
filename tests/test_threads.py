"""The number of threads: the user's choice, else the limit of numba, torch, and the process' affinity and quota."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from scripts import run

import fastopt
from fastopt.kernels import threads
from fastopt.kernels.threads import MOST, processors, source, using

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity of processes")


@pytest.fixture(autouse=True)
def unchosen(monkeypatch):
    """Nobody has chosen a number, and the processors are counted at every call."""
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setattr(threads, "_asked", True)
    monkeypatch.setattr(threads, "REFRESH", 0.0)


def test_the_number_that_is_set_is_the_number_that_is_used():
    for count in (1, 3, MOST, np.int64(7)):
        fastopt.set_num_threads(count)
        assert fastopt.get_num_threads() == count
        assert source() == "fastopt.set_num_threads"
    fastopt.set_num_threads(None)
    assert fastopt.get_num_threads() <= processors()


@pytest.mark.parametrize("count", [0, -1, MOST + 1, 10**30])
def test_a_number_out_of_range_is_refused_and_changes_nothing(count):
    fastopt.set_num_threads(2)
    with pytest.raises(ValueError, match=f"count: must be from 1 to {MOST}, got {count}"):
        fastopt.set_num_threads(count)
    assert fastopt.get_num_threads() == 2


@pytest.mark.parametrize("count", [1.0, "2", [1]])
def test_what_is_no_whole_number_is_refused(count):
    with pytest.raises(TypeError, match="count: must be a whole number from 1 to 256, or None, got"):
        fastopt.set_num_threads(count)


def test_a_block_gives_back_what_was_there_before():
    fastopt.set_num_threads(5)
    with using(2):
        assert fastopt.get_num_threads() == 2
        fastopt.set_num_threads(3)
    assert fastopt.get_num_threads() == 5
    with using(None):
        assert fastopt.get_num_threads() == 5


# --- the environment --------------------------------------------------------------------------------------------------

SAY = "import fastopt; from fastopt.kernels.threads import source; print(fastopt.get_num_threads(), source())"


def said(tmp_path: Path, text: str = SAY, **environment: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(text)
    finished = run(script, **environment)
    return finished.stdout.strip() or finished.stderr.strip().splitlines()[-1]


def test_the_environment_decides_unless_the_program_does(tmp_path):
    assert said(tmp_path, FASTOPT_NUM_THREADS="7") == "7 FASTOPT_NUM_THREADS"
    assert said(tmp_path, FASTOPT_NUM_THREADS="7", NUMBA_NUM_THREADS="1") == "7 FASTOPT_NUM_THREADS"
    text = f"import fastopt; fastopt.set_num_threads(2); {SAY}"
    assert said(tmp_path, text, FASTOPT_NUM_THREADS="7") == "2 fastopt.set_num_threads"
    assert said(tmp_path, FASTOPT_NUM_THREADS="", NUMBA_NUM_THREADS="1") == "1 numba"


@pytest.mark.parametrize("text", ["0", "257", "-2", "two", "1.5", "1e2"])
def test_a_wrong_environment_is_refused_where_the_optimizer_is_made(tmp_path, text):
    make = "import fastopt, numpy as np; fastopt.SGD([np.ones(3)])"
    message = f"ValueError: FASTOPT_NUM_THREADS: must be a whole number from 1 to 256, got {text!r}"
    assert said(tmp_path, make, FASTOPT_NUM_THREADS=text) == message


# --- numba and torch --------------------------------------------------------------------------------------------------


def test_numbas_number_is_read_and_never_set():
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert fastopt.get_num_threads() == 1
        opt = fastopt.SGD([np.ones(100_000)])
        opt.step()
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_torchs_number_counts_where_it_is_smaller(monkeypatch):
    monkeypatch.setattr(threads, "processors", lambda: 8)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.setitem(sys.modules, "numba.np.ufunc.parallel", SimpleNamespace(_is_initialized=False))
    for count in (1, 6, 20):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda count=count: count))
        assert fastopt.get_num_threads() == min(count, 8)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())  # as while it is being imported
    assert fastopt.get_num_threads() == 8
    monkeypatch.setitem(sys.modules, "torch", None)  # as where somebody has forbidden it
    assert fastopt.get_num_threads() == 8


def test_torch_on_one_thread_is_respected():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert (fastopt.get_num_threads(), source() in ("torch", "the processors of this process")) == (1, True)
        with using(2):  # fastopt's own setting takes precedence
            assert fastopt.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- what the process may use -----------------------------------------------------------------------------------------

ONE_PROCESSOR = """
import os
import numpy as np, fastopt
threads = fastopt.kernels.threads
threads.REFRESH = 0.0
opt = fastopt.Adam([np.ones(300_000, np.float32)])
before = len(os.listdir("/proc/self/task"))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for _ in range(20):
    opt.step()
print(threads.get_num_threads(), threads.source(), len(os.listdir("/proc/self/task")) - before)
"""


@linux
def test_on_one_processor_one_thread_is_used(tmp_path):
    assert said(tmp_path, ONE_PROCESSOR) == "1 the processors of this process 0"


@linux
def test_processors_are_those_of_the_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert processors() == fastopt.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A function that lays out control groups: the lines of /proc/self/cgroup, and the files below /sys/fs/cgroup."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(threads, "CONTROL_GROUP", tmp_path / "sys")
    monkeypatch.setattr(threads, "OWN_GROUPS", tmp_path / "cgroup")

    def lay(lines: str, **files: str) -> int:
        (tmp_path / "cgroup").write_text(lines)
        for name, text in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return processors()

    return lay


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("150000 100000\n", 2),
        ("100000 100000\n", 1),
        ("5000 100000\n", 1),
        ("1600000 100000\n", 16),
        ("max 100000\n", 64),
        ("9900000 100000\n", 64),
        ("", 64),
        ("-7\n", 64),
    ],
)
def test_a_quota_is_rounded_up(groups, quota, count):
    assert groups("0::/job\n", **{"job/cpu.max": quota}) == count


def test_the_tightest_quota_of_all_groups_around_counts(groups):
    files = {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n", "a/b/c/cpu.max": "400000 100000\n"}
    assert groups("0::/a/b/c\n", **files) == 2


def test_a_container_that_shows_only_its_own_group(groups):
    # The path is that of the host, and what is mounted begins at the container.
    assert groups("0::/kubepods/pod1\n", **{"cpu.max": "300000 100000\n"}) == 3


def test_the_first_version_of_control_groups(groups):
    lines = "5:memory:/x\n4:cpu,cpuacct:/x\n1:name=systemd:/x\n"
    files = {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"}
    assert groups(lines, **files) == 3
    assert groups(lines, **{**files, "cpu,cpuacct/x/cpu.cfs_quota_us": "-1\n"}) == 64


def test_no_control_groups_at_all(groups, tmp_path):
    assert groups("") == 64
    (tmp_path / "cgroup").unlink()
    assert processors() == 64
