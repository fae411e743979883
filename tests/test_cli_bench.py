"""`fastopt bench`: tables, JSON and a figure of the measurements; errors name bad input; rivals may be missing."""

from __future__ import annotations

import json
import re
import sys
from functools import partial

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

import fastopt
from fastopt.cli import bench
from fastopt.cli.app import app
from fastopt.cli.choices import parse_shapes, parse_sizes
from fastopt.kernels.threads import processors
from fastopt.measure import Result, Spread, machine

QUICK = ("--optimizer", "sgd", "--sizes", "100,1k", "--seconds", "1", "--no-batch-norm", "--no-company")


def invoke(*arguments, columns="80"):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": columns})


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One run: its output, its JSON, its figure."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ("--optimizer", "sgd,adam:amsgrad", "--sizes", "100,1k", "--seconds", "1")
    shapes = ("--shapes", "8x16x7x7,32x64")
    result = invoke(*arguments, *shapes, "--json", folder / "b.json", "--plot", folder / "b.png")
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "b.json").read_text(encoding="utf-8")), folder / "b.png"


def test_the_tables_have_a_row_for_each_case(outcome):
    output, _, _ = outcome
    lines = output.splitlines()
    for title in ("sgd 100", "sgd 1k", "adam:amsgrad 100", "adam:amsgrad 1k", "8x16x7x7 forward", "32x64 backward"):
        (line,) = (line for line in lines if line.strip().startswith(title + " "))
        cells = line.strip().removeprefix(title).split()
        assert float(cells[0]) > 0
        low, high = map(float, cells[1].split("-"))
        assert low <= float(cells[0]) <= high
        assert float(cells[2]) > 0
        assert cells[3].endswith("%")
        assert cells[4].endswith("x")
    assert max(map(len, lines)) <= 80 or "throughput:" in max(lines, key=len)


def test_the_json_holds_every_result_and_the_machine(outcome):
    _, content, _ = outcome
    assert content["fastopt"] == fastopt.__version__
    assert content["command"] == "bench"
    assert content["settings"]["threads"] == fastopt.get_num_threads()
    assert content["machine"] == machine.describe()
    results = [Result.of(record) for record in content["results"]]
    assert [(result.facts["optimizer"], result.facts["parameters"]) for result in results[:4]] == [
        ("SGD", 100),
        ("SGD", 1000),
        ("Adam", 100),
        ("Adam", 1000),
    ]
    assert results[2].facts["options"] == {"amsgrad": True}
    assert [result.facts["way"] for result in results[4:-1]] == ["forward", "backward"] * 2
    assert [result.facts["shape"] for result in results[4:-1:2]] == [[8, 16, 7, 7], [32, 64]]
    assert set(results[-1].facts["parts"]) == {"iteration", "work", "step"}
    for result in results[:-1]:
        assert {"fastopt", "limit", "numpy"} <= result.seconds.keys()
        assert all(spread.low <= spread.median <= spread.high for spread in result.seconds.values())
        assert result.seconds.keys() | result.absent.keys() >= {"torch"}


def test_the_picture_is_not_blank_and_nothing_is_cut_off(outcome):
    _, _, picture = outcome
    pixels = imread(picture)[:, :, :3]
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    ink = np.any(pixels < 0.99, axis=2)
    assert ink.mean() > 0.005
    for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
        assert not edge.any()
    left, right = ink[:, : ink.shape[1] // 2].mean(), ink[:, ink.shape[1] // 2 :].mean()
    assert min(left, right) > 0.003  # a panel for each optimizer


def test_json_has_standard_output_for_itself():
    result = invoke(*QUICK, "--json", "-", "--dtype", "float64")
    content = json.loads(result.stdout)
    assert content["settings"]["dtype"] == "float64"
    assert [record["facts"]["dtype"] for record in content["results"]] == ["float64"] * 2


def test_a_missing_rival_is_reported_once_without_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = invoke(*QUICK)
    assert result.exit_code == 0
    assert result.output.count("torch is not installed") == 1


def test_a_size_that_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 10**6)
    result = invoke("--optimizer", "sgd", "--sizes", "100,1M", "--seconds", "1", "--no-batch-norm", columns="200")
    assert result.exit_code == 0
    assert "sgd 1M skipped: needs 0.1 GB of memory, and 0.0 GB are free" in result.output
    assert "sgd 100 " in result.output


def test_the_number_of_threads_is_used_and_restored():
    before = fastopt.get_num_threads()
    content = json.loads(invoke(*QUICK, "--threads", "1", "--json", "-").stdout)
    assert content["settings"]["threads"] == 1
    assert content["results"][0]["facts"]["threads"] == 1
    assert fastopt.get_num_threads() == before


def test_a_busy_machine_is_reported_with_its_effect(monkeypatch):
    monkeypatch.setattr(machine.OtherPrograms, "share", lambda self: 0.62)
    output = " ".join(invoke(*QUICK).output.split())
    assert re.search(
        r"This machine is busy: other programs had 62% of its processors' time, and the median round of fastopt took "
        r"\d+\.\d times as long as its fastest",
        output,
    )
    for share in (0.05, None):
        monkeypatch.setattr(machine.OtherPrograms, "share", lambda self, share=share: share)
        assert "is busy" not in invoke(*QUICK).output


def test_a_step_in_company_has_a_line_for_each_part():
    result = invoke("--optimizer", "sgd", "--sizes", "100", "--seconds", "1", "--no-batch-norm", "--json", "-")
    (company,) = [found for found in json.loads(result.stdout)["results"] if "products" in found["title"]]
    assert {"fastopt", "one thread"} <= set(company["seconds"])
    for name in company["seconds"]:
        whole, work, step = (
            company["facts"]["parts"][part][name][2] for part in ("iteration", "work", "step")
        )  # means
        assert whole == pytest.approx(work + step, rel=0.02)
    lines = result.stderr.splitlines()
    (first,) = [number for number, line in enumerate(lines) if "two products and Adam 100k" in line]
    assert lines[first + 1].strip().startswith("- the products")
    assert lines[first + 2].strip().startswith("- the step")


def test_every_visit_gets_its_share_of_the_seconds_and_the_earlier_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench, "perf_counter", lambda: now[0])
    given, calls = [], []

    def run(name, seconds, after_round, times):
        given.append(seconds)
        calls.append(name)
        now[0] += 3.0 if len(given) == 1 else seconds  # the first visit compiles and exceeds its share
        after_round()
        times.setdefault("fastopt", []).append(float(len(given)))
        return Result(name, {"fastopt": Spread.of(times["fastopt"], times["fastopt"])}, {})

    cases = [bench.Case(name, partial(run, name)) for name in "ab"]
    results, skipped = bench._measure(cases, 12.0)
    assert "".join(calls) == "ab" * bench.VISITS
    assert given == pytest.approx([12.0 / 6, *[9.0 / 5] * 5])
    assert [(result.title, result.ours.rounds) for result in results] == [("a", 3), ("b", 3)]
    assert (results[0].ours.median, skipped) == (3.0, {})


def test_a_case_that_fits_into_memory_once_is_not_reported_as_skipped():
    def run(seconds, after_round, times):
        times.setdefault("calls", []).append(0.0)
        if len(times["calls"]) != 2:
            raise MemoryError("needs 9 GB")
        return Result("a", {}, {})

    def never(seconds, after_round, times):
        raise MemoryError("needs 99 GB")

    results, skipped = bench._measure([bench.Case("a", run), bench.Case("b", never)], 1.0)
    assert [result.title for result in results] == ["a"]
    assert skipped == {"b": "needs 99 GB"}


def test_muon_gets_a_matrix():
    result = invoke("--optimizer", "muon", "--sizes", "64", *QUICK[4:], "--json", "-")
    (record,) = json.loads(result.stdout)["results"]
    assert "limit" not in record["seconds"]
    assert record["facts"]["parameters"] == 64
    assert "muon" in result.stderr


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "option", "message"),
    [
        (("--optimizer", "adamm"), "--optimizer", "did you mean 'adam'"),
        (("--optimizer", "adam:betas=2/3"), "--optimizer", "betas"),
        (("--sizes", "1k,many"), "--sizes", "must be whole numbers from 1 to 10G, such as 1000, 1k, 2.5M, 1e6, got 'm"),
        (("--sizes", "0"), "--sizes", "must be whole numbers from 1 to 10G, such as 1000, 1k, 2.5M, 1e6, got '0'"),
        (("--sizes", ""), "--sizes", "must be whole numbers from 1 to 10G, such as 1000, 1k, 2.5M, 1e6, got ''"),
        (("--shapes", "64"), "--shapes", "must be shapes (N, C) or (N, C, H, W) with at least 2 values per channel"),
        (("--shapes", "1x64"), "--shapes", "such as 256x1024 or 32x256x14x14, got '1x64'"),
        (("--shapes", "8x-4"), "--shapes", "got '8x-4'"),
        (("--shapes", "8x0"), "--shapes", "got '8x0'"),
        (("--shapes", "8x4,"), "--shapes", "got ''"),
        (("--shapes", "1000000x1000000"), "--shapes", "got '1000000x1000000'"),
        (("--dtype", "float16"), "--dtype", "dtype: must be one of float32, float64, got 'float16'"),
        (("--seconds", "0"), "--seconds", "must be a finite number of seconds from 1, such as 42, got 0"),
        (("--seconds", "nan"), "--seconds", "must be a finite number of seconds from 1, such as 42, got nan"),
        (("--threads", "4096"), "--threads", f"must be at most {processors()}, the number of processors, got 4096"),
        (("--plot", "x.nope"), "--plot", "must end in one of ."),
        (("--plot", "nowhere/x.png"), "--plot", "mkdir -p nowhere"),
        (("--json", "nowhere/x.json"), "--json", "mkdir -p nowhere"),
    ],
)
def test_bad_input_is_refused_before_the_measurement(arguments, option, message, monkeypatch):
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured"))
    result = invoke(*arguments, columns="500")
    assert result.exit_code == 2
    assert option in result.output
    assert message in result.output


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("1k", [1000]), ("1M, 1k", [1000, 10**6]), ("2.5M,1e3,1_000", [1000, 2_500_000]), ("1g", [10**9]), ("7", [7])],
)
def test_sizes(text, sizes):
    assert parse_sizes(text) == sizes


def test_shapes():
    assert parse_shapes("256x1024, 32x256x14x14,256x1024,1x3x5") == [(256, 1024), (32, 256, 14, 14), (1, 3, 5)]


@pytest.mark.parametrize("text", ["1.5", "-1k", "nan", "inf", "k", "1kk", "1,,2", "1e11", "0.0001k"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(ValueError, match="must be whole numbers from 1 to 10G"):
        parse_sizes(text)


@pytest.mark.parametrize("count", [1, 999, 1000, 1234, 2_500_000, 10**9, 12_345_678])
def test_a_spelled_size_parses_to_itself(count):
    assert parse_sizes(bench.spelled(count)) == [count]
