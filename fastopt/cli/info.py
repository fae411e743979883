"""`fastopt info`: the environment of fastopt, in a form to paste into a bug report."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Any

import numba
import typer
from llvmlite import binding as llvm
from rich.table import Table
from rich.text import Text

import fastopt
from fastopt.cli.cache import facts as cache_facts
from fastopt.cli.memory import bytes_of, parameters_of, table_of
from fastopt.cli.output import STDOUT, blame, check_files, console, one_line, write_json, writing
from fastopt.kernels import find_cuda
from fastopt.kernels.driver import DRIVER
from fastopt.kernels.threads import get_num_threads, processors, source
from fastopt.measure.machine import cpu_name, version_of

EXAMPLES = "\n\n".join(
    ["[bold]Examples[/bold]", "fastopt info", "fastopt info --json -", "fastopt info --memory 125M --optimizer lion"]
)

PACKAGES = ("numba", "llvmlite", "numpy", "optree", "safetensors", "numba-cuda")
VARIABLES = ("FASTOPT_", "NUMBA_", "OMP_", "OPENBLAS_", "MKL_", "CUDA_")
"""Prefixes of the environment variables that influence fastopt, NumPy or CUDA."""

FEATURES = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "neon", "sve")


def info(
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as JSON; - is standard output.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="MODEL_SIZE", help="Show instead what so many parameters take in each format: 125M, 7B."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="The optimizer of --memory.")] = "adamw",
) -> None:
    """Show what fastopt finds on this machine: versions, CPU, threads, cache of compiled kernels, CUDA.

    The command changes nothing, and a missing part is not an error: if CUDA cannot work, the reason is printed.
    """
    check_files({"--json": json})
    if memory is not None:
        with blame("--memory"):
            count = parameters_of(memory)
        with blame("--optimizer"):
            rows = bytes_of(optimizer)
        found: dict[str, Any] = {"parameters": count, "optimizer": optimizer, "formats": rows}
        shown = table_of(count, rows, optimizer)
    else:
        found = gather()
        shown = _table(found)
    if json != STDOUT:
        console().print(shown)
    if json is not None:
        with writing("--json"):
            write_json(json, found)


def _table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for topic, facts in found.items():
        table.add_row(Text(topic, style="bold"), "")
        for name, value in facts.items():
            if value is not None:
                table.add_row(f"  {_spelled(name)}", Text(_in_words(value)))
    return table


def gather() -> dict[str, dict[str, Any]]:
    """Return everything that `fastopt info` prints, by topic."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "threads": _threads(),
        "cache": cache_facts(),
        "cuda": find_cuda(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {
        "fastopt": fastopt.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return {**found, **{package: version_of(package) for package in PACKAGES}}


def _cpu() -> dict[str, Any]:
    features = llvm.get_host_cpu_features()
    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "llvm": llvm.get_host_cpu_name(),
        "features": [name for name in FEATURES if features.get(name, False)],
        "cores": os.cpu_count(),
        "usable_cores": processors(),
    }


def _threads() -> dict[str, Any]:
    """Return the number of threads a step may use, what decided it, and their kind; on Linux this starts no thread."""
    found: dict[str, Any] = {"count": None, "decided_by": None, "kind": None, "reason": None}
    try:
        found |= {"count": get_num_threads(), "decided_by": source()}
    except ValueError as error:  # FASTOPT_NUM_THREADS
        return {**found, "reason": one_line(error)}
    mode = DRIVER.mode or DRIVER.choose()
    kinds = {"pool": "fastopt's own", "executor": "Python's"}
    found["kind"] = f"numba's ({numba.threading_layer()})" if mode == "numba" else kinds[mode]
    return {**found, "reason": DRIVER.reason}


def _spelled(key: str) -> str:
    """Return a key with spaces for underscores; keep the names of environment variables."""
    return key if key.isupper() else key.replace("_", " ")


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_in_words(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{_spelled(key)} {_in_words(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
