"""Write the generated texts: the table of docs/optimizers.md, the page docs/performance.md with all measurements and
charts (from bench/results), and, for type checkers, the names of the optimizers in fastopt/__init__.py.

    python bench/report.py                 write all of these
    python bench/report.py --store FILE    first extract FILE, the JSON of a benchmark run, to bench/results
    python bench/report.py --bars          print which of the bars hold, and write nothing
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bars
from results import Stored, load, store

import fastopt
from fastopt.files import write_file
from fastopt.measure import Result
from fastopt.measure.machine import Cache

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = ROOT / "docs" / "optimizers.md"
INIT = ROOT / "fastopt" / "__init__.py"
PERFORMANCE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"


def paragraph(doc: str, start: str) -> str:
    """Return the paragraph of a docstring that begins with `start`, on one line."""
    lines = [line.strip() for line in doc.splitlines()]
    first = next(k for k, line in enumerate(lines) if line.startswith(start))
    last = next((k for k in range(first, len(lines)) if not lines[k]), len(lines))
    return " ".join(lines[first:last]).removeprefix(start).strip()


def optimizers() -> str:
    """Return the table of all registered optimizers, from their docstrings and rules."""
    rows = ["| optimizer | formula | states | source |", "|---|---|---|---|"]
    for name, optimizer in sorted(fastopt.Optimizer.classes.items(), key=lambda item: item[0].lower()):
        doc = optimizer.__doc__ or ""
        always = set.intersection(*(set(rule.states + rule.numbers + rule.matrices) for rule in optimizer.rules))
        states = dict.fromkeys(
            state for rule in optimizer.rules for state in rule.states + rule.numbers + rule.matrices
        )
        cells = ", ".join(f"{state}" if state in always else f"({state})" for state in states) or "none"
        # A bar would end the cell on some sites, and be shown with its backslash on others.
        formula = re.sub(r"\|(\w+)\|", r"abs(\1)", paragraph(doc, "Formula:").replace("``", "`"))
        assert "|" not in formula, f"{name}: the formula must be without bars, for the table; write abs(x)"
        rows.append(f"| `{name}` | {formula} | {cells} | {paragraph(doc, 'Source:')} |")
    return "\n".join(rows) + "\n\nStates in brackets exist only if an option requires them."


# --- speed ------------------------------------------------------------------------------------------------------------

HEADLINES = {
    "step": ("Adam 1k", "Adam 100k", "Adam 1M", "Adam 30M", "AdamW 30M", "SGD 1M", "LAMB 1M"),
    "many_tensors": ("Adam 1000 x 64", "Adam 1000 x 64, 501 groups"),
    "tail": ("tail 1M", "tail 30M"),
    "batchnorm": (
        "forward 32x256x14x14",
        "backward 32x256x14x14",
        "forward 64x64x56x56",
        "backward 64x64x56x56",
        "forward 256x1024",
        "backward 256x1024",
    ),
}
"""Titles of each file in the first table of the page."""

PREFIXES = {"batchnorm": "BatchNorm ", "tail": "unscale, clip, AdamW, EMA, zero_grad: "}
"""Prefixes that make titles clear outside their sections."""

SECTIONS = {
    "step": (
        "One step",
        "Every optimizer, by size and dtype. `limit` reads and writes the same buffers with one multiply-add per "
        "value; the limit of a rule with norms has the passes of the rule. Muon has no limit: its time is that of its "
        "matrix products.",
    ),
    "company": (
        "In company",
        "A step after two NumPy products, 256 x 512 by 512 x 512 in float32, alone, and beside busy processes. `one "
        "thread` is our serial kernel, `OpenMP` our kernel on numba's OpenMP threads, `no step` the products alone. "
        "Times are medians of five turns; below each iteration are its parts, and the mean and the 99th percentile of "
        "the steps. OpenMP's threads keep spinning after a step and compete with the threads of the products, which "
        "slows the whole iteration, not only the step.",
    ),
    "many_tensors": (
        "Many tensors",
        "Adam on many small tensors, and with a separate learning rate for 500 of them.",
    ),
    "tail": (
        "The whole step",
        "`tail`: unscale, clip by norm, AdamW, moving average, zero the gradients, against torch's sequence of calls. "
        "`accumulate`: add a micro-batch and measure the norm in the same pass. Rows: Adam on an embedding in which "
        "few rows have a gradient, against dense steps.",
    ),
    "batchnorm": (
        "BatchNorm",
        "float32, images (N, C, H, W) and matrices (N, C), the activations of dense layers. `limit` is a copy for "
        "forward, and two reads and a write for backward.",
    ),
    "minibatches": ("Mini-batches", "Rows gathered from 128 MiB of data, and epochs against a hand-written loop."),
    "scaling": (
        "Size and threads",
        "Adam from 100 to 100 million parameters. `fastopt` is the default step, which uses all threads from the "
        "switch on; the others use their number of threads at every size.",
    ),
    "startup": (
        "A new process",
        "`cached` is fastopt as usual, with its kernels on disk, and `fastopt` without (`FASTOPT_CACHE_DIR=0`); numba, "
        "which fastopt imports, and torch are shown for comparison.",
    ),
    "torch": (
        "In torch",
        "Whole iterations (zero_grad, forward, backward, step) with `fastopt.torch.AdamW` and torch's own, fused and "
        "by default. `fastopt` of the CNN has our BatchNorm as well, with ReLU in its pass; `fastopt's AdamW alone` "
        "has torch's. Below, the step alone.",
    ),
    "population": (
        "Populations",
        "Adam on stacked networks, each with a learning rate of its own. `one rate` is a step of the stack as one "
        "network, and `a loop` an optimizer for each.",
    ),
    "formats": (
        "Storage formats",
        "AdamW with parameters and gradients, or states, in 16 and 8 bits. `fastopt` is all in float32; the parameters "
        "of torch's are bfloat16.",
    ),
    "ranks": (
        "Two processes",
        "Adam on two processes of MPI with one thread each; `fastopt` is one process with two threads, and a call is "
        "several steps. `exchange` sums the gradients and sends the parameters; `half a step` is one part, on one "
        "thread, without an exchange. Below, float32 numbers into messages and out of them: `fastopt` encodes int8.",
    ),
}


def speed(stored: Mapping[str, Stored]) -> str:
    """Return the headline measurements."""
    rows = [
        (file, stored[file].results[title])
        for file, titles in HEADLINES.items()
        for title in titles
        if file in stored and title in stored[file].results
    ]
    if not rows:
        return "No measurements are stored."
    machines: dict[str, list[str]] = {}
    for file in dict.fromkeys(file for file, _ in rows):
        machines.setdefault(machine_of(stored[file]), []).append(SECTIONS[file][0])
    first, *others = machines
    where = "".join([first, *[f"; {' and '.join(machines[other])} on {other}" for other in others]])
    lines = [
        f"Microseconds, including all Python, in float32 on {where}. Each line was "
        "measured in one run, in which the contestants take turns; brackets show the time as a multiple of fastopt's. "
        "`limit` moves the same bytes and computes almost nothing: it is the limit of this memory.",
        *caveats(stored.values()),
        "",
        "| | fastopt | limit | torch | numpy | the fastest other |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for file, result in rows:
        torch = next((name for name in ("torch fused", "torch") if name in result.seconds), "")
        known = {"fastopt", "limit", "numpy", "torch fused", "torch", "no clipping", "plain step"}
        others = sorted(result.seconds.keys() - known, key=lambda name: result.seconds[name].median)
        other = f"{cell(result, others[0])} {others[0]}" if others else ""
        title = f"{PREFIXES.get(file, '')}{result.title}"
        cells = [title, *(cell(result, name) for name in ("fastopt", "limit", torch, "numpy")), other]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine_of(stored: Stored) -> str:
    """Return the machine, the versions and the date of a run."""
    run = stored.run
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    caches = ", ".join(
        f"L{cache['level']} {cache['instances']} x {cache['bytes'] // 1024} KiB" for cache in run["machine"]["caches"]
    )
    return f"{threads_of(stored)} of {run['machine']['cpu']} ({caches}; {versions}; {run['date']})"


def caveats(stored: Iterable[Stored]) -> list[str]:
    """Return the reservations about the measurements, each once."""
    return list(dict.fromkeys(f"**{caveat}**" for each in stored for caveat in each.caveats()))


def cell(result: Result, name: str) -> str:
    if name not in result.seconds:
        return ""
    value = figures(1e6 * result.seconds[name].median)
    times = result.times(name)
    return value if name == next(iter(result.seconds)) or times is None else f"{value} ({figures(times)}x)"


def figures(number: float) -> str:
    """Format with at least three significant figures."""
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def performance(stored: Mapping[str, Stored]) -> str:
    """Return the page docs/performance.md."""
    lines = [
        "<!-- generated by bench/report.py, do not edit -->",
        "",
        "# Performance",
        "",
        "Each line was measured in one run, in which the contestants take turns (A B C, C B A, ...): in a turn a "
        "contestant warms up, and then the fastest of up to eight samples counts. Times are medians of the rounds in "
        "microseconds, including all Python; after fastopt's time come the range of 8 of 10 rounds, and the bytes to "
        "move divided by the time. Brackets show a contestant's time as a multiple of fastopt's, the median of the "
        "ratios within a round. Freed memory is kept for the next array (as far as glibc does so), and rivals use as "
        "many threads as fastopt if they can. Tests compare the parameters of installed rivals with those of fastopt; "
        "DeepSpeed's, which take too long to build, were compared by hand.",
        "",
        "Measure your own machine with `fastopt bench`, or all of this with `pytest bench --benchmark-only`. There "
        "every contestant is a benchmark of pytest-benchmark, whose options work: `-k 'Adam and 1M'` chooses groups, "
        "`--benchmark-histogram` draws them, and `--benchmark-save` and `--benchmark-compare` compare two runs.",
        "",
        "A selection, on one line each:",
        "",
        speed(stored),
    ]
    for file, each in stored.items():
        heading, text = SECTIONS[file]
        lines += ["", f"## {heading}", "", text, "", f"Measured on {machine_of(each)}.", *caveats([each])]
        lines += [f"\n![{chart.alt}](images/{chart.file})" for chart in CHARTS if chart.of == file]
        lines += ["", *table(list(each.results.values()))]
        absent: dict[str, list[str]] = {}
        for result in each.results.values():
            for reason in result.absent.values():
                absent.setdefault(reason, []).append(result.title)
        if absent:
            lines += ["", "Empty cells: " + "; ".join(absent) + "."]
    return "\n".join(lines) + "\n"


def table(results: Sequence[Result]) -> list[str]:
    """Return a table with a row per result and a column per contestant."""
    names = list(dict.fromkeys(name for result in results for name in result.seconds if name != "fastopt"))
    moved = any(result.bytes is not None for result in results)
    head = ["", "fastopt", "8 of 10", *(["GB/s"] if moved else []), *names]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for result in results:
        low, high = (figures(1e6 * seconds) for seconds in (result.ours.low, result.ours.high))
        bandwidth = result.bandwidth()
        rate = [figures(bandwidth) if bandwidth is not None else ""] if moved else []
        cells = [result.title, cell(result, "fastopt"), f"{low}-{high}", *rate, *(cell(result, name) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
        for label, values in parts_of(result).items():
            cells = [label, values["fastopt"], "", *([""] if moved else []), *(values.get(name, "") for name in names)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def parts_of(result: Result) -> dict[str, dict[str, str]]:
    """Return the cells for the parts of an iteration, by label; empty for a result without parts."""
    parts = result.facts.get("parts")
    if parts is None:
        return {}
    found: dict[str, dict[str, str]] = {}
    for label, part in (("- products", "work"), ("- step", "step")):
        found[label] = {
            name: figures(1e6 * median) + ("" if name == "fastopt" else f" ({figures(ratio)}x)")
            for name, (median, ratio, _, _) in parts[part].items()
            if not (part == "step" and name == "no step")
        }
    for label, k in (("- step, mean", 2), ("- step, p99", 3)):
        found[label] = {name: figures(1e6 * numbers[k]) for name, numbers in parts["step"].items() if name != "no step"}
    return found


# --- charts -----------------------------------------------------------------------------------------------------------


class Chart(NamedTuple):
    """A chart: its file of results, its file name, its alternative text, and the function that draws it."""

    of: str
    file: str
    alt: str
    draw: Callable[[Path, Stored, str], None]


def caches_of(stored: Stored) -> list[Cache]:
    return [Cache(**cache) for cache in stored.run["machine"]["caches"]]


def draw_adam(path: Path, stored: Stored, digest: str) -> None:
    panels = {
        f"Adam, {dtype}": [
            result
            for result in stored.results.values()
            if result.facts["optimizer"] == "Adam" and not result.facts["options"] and result.facts["dtype"] == dtype
        ]
        for dtype in ("float32", "float64")
    }
    from fastopt.cli.plots.speed import draw_throughput

    draw_throughput(path, heading(stored), {k: v for k, v in panels.items() if v}, caches_of(stored), digest=digest)


def draw_optimizers(path: Path, stored: Stored, digest: str) -> None:
    from fastopt.cli.plots.speed import draw_dots

    rows: dict[str, dict[str, float]] = {}
    for result in stored.results.values():
        times = result.times("limit")
        name, _, size = result.title.rpartition(" ")
        if times is not None and result.facts["dtype"] == "float32" and size in ("1M", "30M"):
            rows.setdefault(name, {})[size] = 1 / times
    draw_dots(path, heading(stored), "time of a step over that of its limit, float32", rows, digest=digest)


def draw_threads(path: Path, stored: Stored, digest: str) -> None:
    from fastopt.cli.plots.speed import draw_throughput

    results = list(stored.results.values())
    draw_throughput(
        path,
        heading(stored),
        {"Adam, float32": results},
        caches_of(stored),
        switch=results[0].facts["serial_below"],
        digest=digest,
    )


def draw_batchnorm(path: Path, stored: Stored, digest: str) -> None:
    from fastopt.cli.plots.speed import draw_dots

    rows: dict[str, dict[str, float]] = {}
    for result in stored.results.values():
        limit = result.seconds["limit"].ratio
        for name in ("fastopt", "torch", "numpy"):
            if name in result.seconds:
                rows.setdefault(result.title, {})[name] = result.seconds[name].ratio / limit
    draw_dots(
        path, heading(stored), "time over that of the limit (a copy; backward: two reads, a write)", rows, digest=digest
    )


def draw_company(path: Path, stored: Stored, digest: str) -> None:
    from fastopt.cli.plots.speed import draw_dots

    rows = {
        result.title: {name: spread.ratio for name, spread in result.seconds.items()}
        for result in stored.results.values()
        if "parts" in result.facts
    }
    draw_dots(path, heading(stored), "time of an iteration (two products, a step) over fastopt's", rows, digest=digest)


def heading(stored: Stored) -> str:
    return f"{stored.run['machine']['cpu']}, {threads_of(stored)}, {stored.run['date']}"


def threads_of(stored: Stored) -> str:
    return f"{stored.run['threads']} thread{'s' if stored.run['threads'] > 1 else ''}"


CHARTS = (
    Chart("step", "performance-adam.svg", "Throughput of Adam against the number of parameters", draw_adam),
    Chart("step", "performance-optimizers.svg", "Every optimizer's time over that of its limit", draw_optimizers),
    Chart("company", "performance-company.svg", "Iterations' time over that with fastopt's step", draw_company),
    Chart("scaling", "performance-threads.svg", "Throughput by size and number of threads", draw_threads),
    Chart("batchnorm", "performance-batchnorm.svg", "BatchNorm's time over that of its limit", draw_batchnorm),
)


def digest_of(stored: Stored) -> str:
    """Return the digest that identifies the data of a chart."""
    content = [stored.run, [result.record() for result in stored.results.values()]]
    return "sha256 " + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def draw(stored: Mapping[str, Stored], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for chart in CHARTS:
        if chart.of in stored:
            chart.draw(folder / chart.file, stored[chart.of], digest_of(stored[chart.of]))


# --- writing ----------------------------------------------------------------------------------------------------------


def names() -> str:
    """Return the imports of the optimizers for type checkers; the package itself finds them at run time."""
    modules = {name: optimizer.__module__ for name, optimizer in fastopt.Optimizer.classes.items()}
    ours = sorted((module, name) for name, module in modules.items() if module.startswith("fastopt.optimizers."))
    return "\n".join(f"    from {module} import {name} as {name}" for module, name in ours)


def render(page: str) -> str:
    """Return the page of optimizers with its generated table replaced."""
    start = "<!-- optimizers: generated by bench/report.py, do not edit -->\n\n"
    return replaced(page, start, optimizers(), "\n\n<!-- end of optimizers -->")


def render_init(source: str) -> str:
    """Return the source of the package with its generated part replaced."""
    return replaced(
        source, "    # generated by bench/report.py, do not edit\n", names(), "\n    # end of what is generated\n"
    )


def replaced(text: str, start: str, new: str, end: str) -> str:
    """Return `text` with `new` between `start` and `end`."""
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}{new}{end}{after}"


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, metavar="FILE", help="JSON of pytest --benchmark-json=FILE")
    parser.add_argument("--bars", action="store_true", help="print which bars hold, from the stored results")
    options = parser.parse_args(arguments)
    if options.store:
        print("stored:", ", ".join(store(options.store)))
    stored = load()
    if options.bars:
        print(bars.table(stored))
        return
    write_file(OPTIMIZERS, render(OPTIMIZERS.read_text(encoding="utf-8")).encode())
    write_file(INIT, render_init(INIT.read_text(encoding="utf-8")).encode())
    PERFORMANCE.parent.mkdir(exist_ok=True)
    write_file(PERFORMANCE, performance(stored).encode())
    draw(stored, IMAGES)


if __name__ == "__main__":
    main()
