"""bench/: a benchmark per contestant, replayed samples, skipped contestants, the plugin's table and its comparison."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import groups
import pytest
import results
from scripts import compiled, run

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


def groups_of(file: str) -> list[groups.Group]:
    found = vars(importlib.import_module(f"bench_{file}")).values()
    tables = [each for each in found if isinstance(each, dict) and each]
    return [group for table in tables for group in table.values() if isinstance(group, groups.Group)]


def benchmarks(*arguments: str | Path, folder: Path = BENCH, **environment: str):
    """Run pytest on a folder of benchmarks with almost no time."""
    options = ("--benchmark-only", "-p", "no:cacheprovider", "--scale", "0.01", "-c", ROOT / "pyproject.toml")
    return run("-m", "pytest", folder, *options, *arguments, timeout=120, COLUMNS="120", **compiled(), **environment)


def table_of(output: str, group: str) -> list[list[str]]:
    """Return the words of the rows of the plugin's table for a group."""
    _, table = output.split(f" benchmark '{group}': ")
    return [line.split() for line in re.split(r"^-+$", table, flags=re.MULTILINE)[1].strip().splitlines()]


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_timer_replays_the_samples_exactly():
    timer = groups.Replay()
    for samples in ([3e-6, 0.1, 7.25], [5.0]):
        timer.load(samples)
        starts_and_ends = [(timer(), timer()) for _ in samples]
        assert [end - start for start, end in starts_and_ends] == samples


def test_every_group_begins_with_fastopt_and_has_its_own_name():
    everything = [group for file in results.FILES for group in groups_of(file)]
    assert {group.contestants[0] for group in everything} == {"fastopt"}
    for group in everything:
        assert len(set(group.contestants)) == len(group.contestants), group.name
    assert len({group.name for group in everything}) == len(everything), "the plugin merges groups of one name"
    ids = [each.id for each in groups.each_contestant({group.name: group for group in everything})["argvalues"]]
    assert len(set(ids)) == len(ids)
    assert "Adam-1M-float32-torch-fused" in ids


def test_two_groups_of_one_name_are_refused():
    group = groups.Group("a", ("fastopt",), None, 1.0)
    with pytest.raises(ValueError, match="names must differ, got 'a' twice"):
        groups.by_name([group, group])


def test_matrices_are_measured_forward_and_backward():
    titles = {group.title for group in groups_of("batchnorm")}
    for shape in ("32x64", "64x128", "128x256", "256x512", "256x1024", "1024x1024", "4096x256"):
        assert {f"forward {shape}", f"backward {shape}"} <= titles


def test_rows_are_measured_far_from_the_first_steps():
    group = importlib.import_module("bench_tail").of_rows(0.1, rows=100)
    times = {}
    result = group.run(group.title, seconds=0.001, rounds=1, times=times)
    assert set(times) == set(result.seconds) == set(group.contestants)


# --- runs -------------------------------------------------------------------------------------------------------------

CASES = """
import pytest
from groups import Group, by_name, each_contestant
from fastopt.measure import Result, Spread

CALLS = []


def run(title, *, seconds, rounds, times):
    CALLS.append(title)
    times |= {"fastopt": [3e-6, 2e-6], "zebra": [9e-6, 7e-6], "aardvark": [1e-6, 1e-6]}
    absent = {"torch": "torch is not installed"}
    return Result(title, {name: Spread.of(taken, times["fastopt"]) for name, taken in times.items()}, absent)


def too_large(title, **how):
    raise MemoryError("needs 9 GB")


def broken(title, **how):
    raise ZeroDivisionError("of the contestant")


NAMES = ("fastopt", "zebra", "aardvark", "torch")
GROUPS = by_name([
    Group("good 1M", NAMES, run, 1.0, title="titled"),
    Group("large", NAMES, too_large, 1.0),
    Group("many", NAMES, run, 1.0, size=10**9),
    Group("broken", NAMES[:2], broken, 1.0),
    Group("undeclared", NAMES[:1], run, 1.0),
])


@pytest.mark.parametrize(**each_contestant(GROUPS))
def test_case(measure, group, contestant):
    measure(GROUPS[group], contestant)
    assert CALLS == ["titled"]
"""


@pytest.fixture
def folder(tmp_path):
    """Return a folder of benchmarks with made-up times."""
    shutil.copy(BENCH / "conftest.py", tmp_path)
    (tmp_path / "bench_case.py").write_text(CASES)
    return tmp_path


def test_a_group_is_measured_once_and_its_contestants_are_benchmarks(folder):
    path = folder / "run.json"
    finished = benchmarks("--most", "1e6", f"--benchmark-json={path}", "-k", "good or large or many", folder=folder)
    output = finished.stdout
    assert finished.returncode == 0, output + finished.stderr
    assert "3 passed, 9 skipped" in output
    for reason in ("torch is not installed", "too little memory: needs 9 GB", "--most is 1e+06"):
        assert reason in output
    rows = table_of(output, "good 1M")
    assert [row[0] for row in rows] == ["fastopt", "zebra", "aardvark"], "the order of the contestants"
    assert rows[0][1:5] == ["2.0000", "(2.00)", "2.5000", "(2.50)"]
    assert [row[-1] for row in rows] == ["2"] * 3
    ours = "titled                           fastopt 2.5  zebra 8.0 (3.25x)  aardvark 1.0 (0.42x)"
    assert output.index(ours) > output.index("Legend:"), "ratios stand below the plugin's table"
    stored = {entry["params"]["contestant"]: entry for entry in json.loads(path.read_text())["benchmarks"]}
    assert list(stored) == ["fastopt", "zebra", "aardvark"]
    assert stored["zebra"]["stats"]["data"] == [9e-6, 7e-6]
    assert (stored["zebra"]["group"], stored["zebra"]["extra_info"]) == ("good 1M", {})
    assert stored["fastopt"]["extra_info"]["result"]["absent"] == {"torch": "torch is not installed"}


def test_one_contestant_can_be_chosen_and_the_plugins_options_hold(folder):
    options = ("--benchmark-time-unit=ns", "--benchmark-columns=max")
    output = benchmarks("-k", "good and zebra", *options, folder=folder).stdout
    assert table_of(output, "good 1M") == [["zebra", "9,000.0000"]]
    assert "fastopt 2.5  zebra 8.0 (3.25x)" in output
    output = benchmarks("-k", "good", "--benchmark-sort=min", folder=folder).stdout
    assert [row[0] for row in table_of(output, "good 1M")] == ["aardvark", "fastopt", "zebra"]
    output = benchmarks("-k", "good", "--benchmark-group-by=param:contestant", folder=folder).stdout
    assert table_of(output, "contestant=zebra")[0][0] == "test_case[good-1M-zebra]"


def test_a_group_that_fails_is_reported_once(folder):
    finished = benchmarks("-k", "broken or undeclared", folder=folder)
    assert finished.returncode == 1
    assert "2 failed, 1 skipped" in finished.stdout
    assert "ZeroDivisionError: of the contestant" in finished.stdout
    assert "its group could not be measured: see the error of the first benchmark" in finished.stdout
    assert "contestants of 'undeclared': must be ('fastopt',), got ['fastopt', 'zebra', 'aardvark']" in finished.stdout


def test_two_runs_are_compared(folder):
    good = ("-k", "good", f"--benchmark-storage={folder / 'stored'}")
    assert benchmarks(*good, "--benchmark-save=before", folder=folder).returncode == 0
    finished = benchmarks(*good, "--benchmark-compare", "--benchmark-compare-fail=min:1%", folder=folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    names = [" ".join(row[:2]) for row in table_of(finished.stdout, "good 1M")]
    contestants = ("fastopt", "zebra", "aardvark")
    assert names == [f"{name} ({of})" for name in contestants for of in ("0001_before", "NOW")]


@pytest.mark.skipif(find_spec("pygal") is None, reason="pytest-benchmark[histogram] is not installed")
def test_a_histogram_shows_the_contestants(folder):
    finished = benchmarks("-k", "good", f"--benchmark-histogram={folder / 'picture'}", folder=folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    picture = (folder / "picture-good_1M.svg").read_text(encoding="utf-8")
    assert "Speed in Microseconds (us) of good 1M" in picture
    for name in ("fastopt", "zebra", "aardvark"):
        assert f">{name}</text>" in picture


def test_contestants_of_the_repository_are_benchmarks(tmp_path):
    chosen = "SGD-1k-float32 or (BatchNorm-forward-32x64 and not 4096) or (Adam-300k and not beside)"
    finished = benchmarks("-k", chosen, f"--benchmark-json={tmp_path / 'run.json'}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [row[0] for row in table_of(finished.stdout, "SGD 1k float32")][:3] == ["fastopt", "limit", "numpy"]
    assert [row[0] for row in table_of(finished.stdout, "BatchNorm forward 32x64")][:2] == ["fastopt", "limit"]
    iterations = table_of(finished.stdout, "two matmuls and Adam 300k")
    assert [row[0] for row in iterations][:2] == ["fastopt", "one"]
    assert int(iterations[0][-1]) >= 15, "every iteration is a round"
    assert results.store(tmp_path / "run.json", tmp_path) == ["batchnorm", "company", "step"]
    kept = results.load(tmp_path)
    assert list(kept["company"].results) == ["X@W; X@W; Adam 300k", "Adam 300k, alone"]
    assert kept["batchnorm"].results["forward 32x64"].facts["shape"] == [32, 64]
