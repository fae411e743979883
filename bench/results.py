"""The measurements stored under bench/results: one JSON file per file of benchmarks, with facts about the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastopt.files import write_file
from fastopt.measure import Result

FOLDER = Path(__file__).resolve().parent / "results"
FILES = (
    "step",
    "company",
    "many_tensors",
    "tail",
    "batchnorm",
    "minibatches",
    "scaling",
    "startup",
    "torch",
    "population",
    "formats",
    "ranks",
)
BUSY = 0.5
"""Load per core before the run above which the machine counts as busy."""


class Stored(NamedTuple):
    """The results of one file of benchmarks."""

    run: dict[str, Any]
    """Date, machine, threads, load, scale, versions."""
    results: dict[str, Result]
    """Results by title."""

    def caveats(self) -> list[str]:
        """Return reservations about the numbers."""
        found = []
        if self.run["scale"] < 1:
            found.append(f"Measured in a trial, with {self.run['scale']:g} of the time of a full measurement.")
        if self.run["load"] > BUSY * self.run["machine"]["cores"]:
            found.append(f"The machine was busy with other work (load {self.run['load']:g} before the run).")
        return found


def load(folder: Path = FOLDER) -> dict[str, Stored]:
    """Return the stored measurements, by file."""
    stored = {}
    for name in FILES:
        path = folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            results = [Result.of(record) for record in content.pop("results")]
            stored[name] = Stored(content, {result.title: result for result in results})
    return stored


def store(path: Path, folder: Path = FOLDER) -> list[str]:
    """Store the part of a benchmark run that the tables need, without anything that identifies the machine.

    Return the names of the written files. path : the JSON of ``pytest --benchmark-json=FILE``. Files of benchmarks
    outside the run stay.
    """
    run = json.loads(path.read_text(encoding="utf-8"))
    records: dict[str, list[dict[str, Any]]] = {}
    for entry in run["benchmarks"]:
        name = Path(entry["fullname"].split("::")[0]).stem.removeprefix("bench_")
        if record := entry["extra_info"].get("result"):  # of the whole group, in the benchmark that measured it
            records.setdefault(name, []).append({key: record[key] for key in Result._fields})
    if unknown := sorted(records.keys() - set(FILES)):
        raise ValueError(f"{path}: must be of files in FILES, got bench_{unknown[0]}.py; add it in bench/results.py")
    folder.mkdir(exist_ok=True)
    for name, of_file in records.items():
        lines = ",\n".join("  " + json.dumps(record) for record in of_file)  # one per line, for readable diffs
        head = json.dumps(run["fastopt"], indent=1)[:-2]
        write_file(folder / f"{name}.json", f'{head},\n "results": [\n{lines}\n ]\n}}\n'.encode())
    return sorted(records)
