"""The report of a benchmark run: stored results that do not identify the machine, tables, charts, bars."""

from __future__ import annotations

import json
import re
from pathlib import Path

import bars
import numpy as np
import pytest
import report
import results
from matplotlib.image import imread
from scripts import run

from fastopt.measure import Result, Spread

ROOT = Path(__file__).resolve().parent.parent
RUN = {
    "date": "2026-01-02",
    "machine": {
        "cpu": "Some CPU",
        "architecture": "x86_64",
        "system": "Linux",
        "cores": 4,
        "memory_bytes": 2**34,
        "caches": [{"level": 1, "bytes": 2**15, "instances": 4}, {"level": 2, "bytes": 2**20, "instances": 4}],
    },
    "threads": 4,
    "load": 0.1,
    "scale": 1.0,
    "versions": {"numba": "1.2", "numpy": "3.4"},
}


def result(title: str, microseconds: dict[str, float], **facts) -> Result:
    ours = next(iter(microseconds.values()))
    spreads = {name: Spread(1e-6 * us, 0.9e-6 * us, 1.1e-6 * us, 7, us / ours) for name, us in microseconds.items()}
    return Result(title, spreads, facts.pop("absent", {}), facts.pop("bytes", None), facts)


def step(name: str, size: int, spelled: str, dtype: str = "float32", **us: float) -> Result:
    title = f"{name} {spelled}" + ("" if dtype == "float32" else f" {dtype}")
    times = {key.replace("_", " "): value for key, value in us.items()}
    facts = {"optimizer": name, "options": {}, "parameters": size, "dtype": dtype, "states": 2, "serial_below": 65_536}
    facts["threads"] = 4
    return result(title, times, bytes=28 * size, absent={"thinc": "thinc is not installed"}, **facts)


STEPS = [
    step("Adam", 1000, "1k", fastopt=4.0, limit=3.0, numpy=12.0, torch_fused=40.0, optax=20.0),
    step("Adam", 1_000_000, "1M", fastopt=200.0, limit=160.0, numpy=18_000.0, torch_fused=300.0),
    step("Adam", 1000, "1k", "float64", fastopt=5.0, limit=4.0, numpy=15.0),
    step("Adam", 30_000_000, "30M", fastopt=10_000.0, limit=9_500.0, numpy=200_000.0, torch_fused=10_000.0),
    step("Lion", 30_000_000, "30M", fastopt=8_000.0, limit=7_000.0),
    step("SGD", 30_000_000, "30M", fastopt=8_000.0, limit=7_900.0),
]
NORMS = [
    result("forward 32x512x7x7", {"fastopt": 100.0, "limit": 50.0, "torch": 900.0, "numpy": 950.0}),
    result("backward 32x512x7x7", {"fastopt": 100.0, "limit": 50.0, "torch": 140.0}),
]
THREADS = [step("Adam", 10**k, str(10**k), fastopt=10.0**k, limit=9.0**k, numpy=12.0**k) for k in range(2, 7)]


def stored_of(*of: Result, **run) -> results.Stored:
    return results.Stored({**RUN, **run}, {each.title: each for each in of})


COMPANY = [
    result(f"X@W; X@W; {name}", {"fastopt": 600.0, "one thread": 660.0, "OpenMP": 8000.0, "no step": 590.0})
    for name in ("Adam 100k", "Adam 1M")
]
for each in COMPANY:
    each.facts["parts"] = {part: {"fastopt": [6e-4, 1.0, 7e-4, 9e-4]} for part in ("iteration", "work", "step")}

STORED = {"step": stored_of(*STEPS), "company": stored_of(*COMPANY)}
STORED |= {"batchnorm": stored_of(*NORMS), "scaling": stored_of(*THREADS)}


# --- the repository ---------------------------------------------------------------------------------------------------


def test_the_page_and_its_charts_match_the_stored_results():
    stored = results.load()
    assert report.PERFORMANCE.read_text(encoding="utf-8") == report.performance(stored), "run: python bench/report.py"
    for chart in report.CHARTS:
        if chart.of in stored:
            svg = (report.IMAGES / chart.file).read_text(encoding="utf-8")
            assert report.digest_of(stored[chart.of]) in svg, f"{chart.file} is out of date: python bench/report.py"


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_describe_the_machine_without_identifying_it(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content.keys() == {*RUN, "results"}
    assert content["machine"].keys() == RUN["machine"].keys()
    assert path.stem in results.FILES
    for record in content["results"]:
        assert record.keys() == set(Result._fields)
        assert Result.of(record).record() == record


def test_every_file_of_benchmarks_is_known_and_described():
    assert {path.stem for path in (ROOT / "bench").glob("bench_*.py")} == {f"bench_{name}" for name in results.FILES}
    assert set(report.SECTIONS) == set(results.FILES)


# --- storing ----------------------------------------------------------------------------------------------------------


def entry(file: str, contestant: str, **extra_info) -> dict:
    """Return a benchmark in the JSON of a run; the first of a group has the Result of the group."""
    fullname = f"bench/bench_{file}.py::test[{contestant}]"
    return {"fullname": fullname, "stats": {"min": 1}, "extra_info": extra_info}


def test_a_run_is_stored(tmp_path):
    everything = {
        "machine_info": {"node": "my-secret-host"},
        "commit_info": {"author": "me"},
        "fastopt": RUN,
        "benchmarks": [
            entry("step", "fastopt", result=STEPS[0].record()),
            entry("step", "numpy"),
            entry("batchnorm", "torch", result=NORMS[0].record()),
        ],
    }
    path, folder = tmp_path / "run.json", tmp_path / "results"
    path.write_text(json.dumps(everything))
    assert results.store(path, folder) == ["batchnorm", "step"]
    assert "secret" not in (folder / "step.json").read_text()
    assert "me" not in json.loads((folder / "step.json").read_text())
    loaded = results.load(folder)
    assert list(loaded) == ["step", "batchnorm"]
    assert loaded["step"].run == RUN
    (kept,) = loaded["step"].results.values()
    assert kept.record() == STEPS[0].record()


def test_an_unknown_file_of_benchmarks_is_refused(tmp_path):
    path = tmp_path / "run.json"
    benchmarks = [entry("new", "fastopt", result=STEPS[0].record())]
    path.write_text(json.dumps({"fastopt": RUN, "benchmarks": benchmarks}))
    with pytest.raises(ValueError, match=r"must be of files in FILES, got bench_new\.py"):
        results.store(path, tmp_path)


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_first_table_shows_the_headlines():
    rows = rows_of(report.speed(STORED))
    assert rows[0] == ["", "fastopt", "limit", "torch", "numpy", "the fastest other"]
    assert [row[0] for row in rows[2:]] == ["Adam 1k", "Adam 1M", "Adam 30M"]
    assert rows[2][1:] == ["4.00", "3.00 (0.75x)", "40.0 (10.0x)", "12.0 (3.00x)", "20.0 (5.00x) optax"]
    assert rows[3][-1] == ""
    assert report.speed({}) == "No measurements are stored."


def test_machine_versions_and_date_are_shown():
    for text in (report.speed(STORED), report.performance(STORED)):
        for fact in (
            "Some CPU",
            "4 threads",
            "L1 4 x 32 KiB",
            "L2 4 x 1024 KiB",
            "numba 1.2",
            "numpy 3.4",
            "2026-01-02",
        ):
            assert fact in text


def test_the_pages_tables_have_a_row_for_each_result_and_a_column_for_each_contestant():
    page = report.performance(STORED)
    assert report.speed(STORED) in page
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    headings = ["One step", "In company", "BatchNorm", "Size and threads"]
    assert [section.splitlines()[0] for section in sections] == headings
    first = rows_of(sections[0])
    assert first[0] == ["", "fastopt", "8 of 10", "GB/s", "limit", "numpy", "torch fused", "optax"]
    assert [row[0] for row in first[2:]] == [each.title for each in STEPS]
    assert {len(row) for row in first} == {8}
    assert first[2][1:5] == ["4.00", "3.60-4.40", "7.00", "3.00 (0.75x)"]
    assert rows_of(sections[2])[0] == ["", "fastopt", "8 of 10", "limit", "torch", "numpy"]
    assert "Empty cells: thinc is not installed." in page


def test_a_trial_and_a_busy_machine_are_noted():
    trial = {"step": stored_of(*STEPS, scale=0.1, load=3.0)}
    for text in (report.speed(trial), report.performance(trial)):
        assert "with 0.1 of the time" in text
        assert "busy with other work (load 3 before the run)" in text
    assert "**" not in report.speed(STORED)


# --- bars -------------------------------------------------------------------------------------------------------------


def test_bars_are_compared_with_the_results():
    table = {(row[0], row[1]): row[2:] for row in rows_of(bars.table(STORED))[2:]}
    assert len(table) == len(bars.BARS)
    assert table["Adam 1k", "microseconds, all Python included"] == ["<= 8", "4", "yes"]
    assert table["Adam 1k", "the time of the best rival over ours"] == [">= 2", "3", "yes"]
    assert table["Adam 1M", "the time of torch fused over ours"] == [">= 2", "1.5", "NO"]
    assert table["Adam 1M", "the limit's time over ours"] == [">= 0.75", "0.8", "yes"]
    assert table["every other optimizer, 30M", "the limit's time over ours"] == [">= 0.9", "0.875", "NO"]
    assert table["Adam 1M", "the time of deepspeed over ours"] == [">= 1.3", "not measured", ""]
    assert table["import fastopt", "seconds over importing numba"] == ["<= 0.15", "not measured", ""]


def test_every_bar_belongs_to_a_measured_case():
    """Each bar names a title of its file of benchmarks: with all titles present, every bar is measured."""
    import bench_batchnorm
    import bench_company
    import bench_many_tensors
    import bench_torch

    titles = {
        "step": [f"Adam {size}" for size in ("1k", "100k", "1M", "4M", "30M")],
        "many_tensors": [f"Adam {name}" for name in bench_many_tensors.CASES],
        "tail": ["tail 1M", "tail 30M"],
        "batchnorm": [f"{way} {name}" for way, name in bench_batchnorm.CASES],
        "company": [
            *(bench_company.title_of(name, busy) for name in bench_company.CASES for busy in bench_company.BUSY),
            *(f"{name}, alone" for name in (*bench_company.CASES, *bench_company.ALONE)),
        ],
        "startup": ["import fastopt, over numba", "first step of a process"],
        "torch": [group.title for group in (*bench_torch.ITERATIONS.values(), *bench_torch.ALL_STEPS.values())],
    }
    us = dict.fromkeys(("fastopt", "limit", "torch", "torch fused", "deepspeed", "numpy", "one thread", "OpenMP"), 1.0)
    facts = {"parameters": 30_000_000, "dtype": "float32"}
    everything = {file: stored_of(*(result(each, us, **facts) for each in of)) for file, of in titles.items()}
    assert "not measured" not in bars.table(everything)


# --- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chart", report.CHARTS, ids=lambda chart: chart.file)
def test_charts_are_drawn(chart, tmp_path, monkeypatch):
    from fastopt.cli.plots import speed

    path = tmp_path / chart.file
    chart.draw(path, STORED[chart.of], "sha256 abc")
    first = path.read_text(encoding="utf-8")
    assert "sha256 abc" in first
    chart.draw(path, STORED[chart.of], "sha256 abc")
    assert path.read_text(encoding="utf-8") == first, "the same results must give the same file"

    monkeypatch.setattr(speed, "save", lambda figure, path, digest: figure.savefig(path.with_suffix(".png")))
    chart.draw(path, STORED[chart.of], "")
    pixels = imread(path.with_suffix(".png"))[:, :, :3]
    assert min(pixels.shape[:2]) > 150
    ink = np.any(pixels < 0.99, axis=2)
    assert ink.mean() > 0.005
    for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
        assert not edge.any(), "something is cut off"
    assert len(np.unique(pixels.reshape(-1, 3).round(1), axis=0)) > 8


# --- end to end -------------------------------------------------------------------------------------------------------


def test_a_run_of_the_benchmarks_can_be_stored(tmp_path):
    path = tmp_path / "run.json"
    finished = run(
        *("-m", "pytest", ROOT / "bench", "--benchmark-only", "-p", "no:cacheprovider", "-q"),
        *("-k", "(test_step and Lion-1k-float32) or (test_batchnorm and 256x1024) or Adam-100-by-threads"),
        *("--scale", "0.01", "--most", "1000", f"--benchmark-json={path}", "-c", ROOT / "pyproject.toml"),
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Lion 1k" in finished.stdout
    assert "--most is 1000" in finished.stdout
    assert results.store(path, tmp_path) == ["scaling", "step"]
    stored = results.load(tmp_path)
    assert list(stored["step"].results) == ["Lion 1k"]
    assert stored["step"].results["Lion 1k"].facts["parameters"] == 1000
    assert stored["step"].run["scale"] == 0.01
