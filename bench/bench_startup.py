"""What a new process waits for: `import fastopt`, and its first step with and without a folder of compiled kernels.

Every sample is a process of its own; those of the contestants take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fastopt
from fastopt.measure import Result, Spread

OURS = """
import json, time
start = time.perf_counter()
import numba
numba_there = time.perf_counter()
import fastopt
fastopt_there = time.perf_counter()
import numpy as np
opt = fastopt.Adam({"w": np.zeros(1000, np.float32)})
opt.step()
print(json.dumps({"numba": numba_there - start, "import": fastopt_there - numba_there,
                  "first step": time.perf_counter() - fastopt_there}))
"""
TORCHS = """
import json, time
start = time.perf_counter()
import torch
torch_there = time.perf_counter()
param = torch.nn.Parameter(torch.zeros(1000))
param.grad = torch.zeros(1000)
torch.optim.Adam([param], fused=True).step()
print(json.dumps({"import": torch_there - start, "first step": time.perf_counter() - torch_there}))
"""
MISSING = {} if find_spec("torch") else {"torch": "torch is not installed"}
SAMPLES: dict[str, dict[str, list[float]]] = {}
"""What was measured, by the moment and by the contestant: the cases share their processes."""


def process(code: str, cache: str = "") -> dict[str, float]:
    """Run `code` in a new process; the moments it prints, and the time of the whole."""
    path = os.pathsep.join([str(Path(fastopt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    surroundings = {**os.environ, "PYTHONPATH": path, "FASTOPT_CACHE_DIR": cache}
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True
    )
    return {"whole process": time.perf_counter() - start, **json.loads(finished.stdout.splitlines()[-1])}


def gather(seconds: float, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each moment, of each contestant."""
    samples: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        contestants = {"fastopt": (OURS, ""), "cached": (OURS, cache)} | ({} if MISSING else {"torch": (TORCHS, "")})
        for code, folder in contestants.values():
            process(code, folder)  # brings the files into memory, and fills the folder
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or len(samples["import"]["fastopt"]) < rounds:
            for name, (code, folder) in contestants.items():
                for moment, taken in process(code, folder).items():
                    samples.setdefault(moment, {}).setdefault(name, []).append(taken)
    return samples


def moment_of(title: str, moment: str, *, seconds: float, rounds: int) -> Result:
    if not SAMPLES:
        SAMPLES.update(gather(seconds, min(rounds, 3)))  # torch's processes take seconds each
    times = dict(SAMPLES[moment])
    if moment == "import":
        times["numba"] = SAMPLES["numba"]["fastopt"]
    return Result(title, {name: Spread.of(taken, times["fastopt"]) for name, taken in times.items()}, MISSING)


def test_import(measure: Any) -> None:
    """`import fastopt` after `import numba`; beside it numba itself, and torch."""
    measure(moment_of, "import fastopt, over numba", "import", seconds=15.0)


def test_first_step(measure: Any) -> None:
    """Adam on 1,000 parameters: making it, and its first step."""
    measure(moment_of, "first step of a process", "first step", seconds=15.0)


def test_whole_process(measure: Any) -> None:
    """Python's start, the imports, the optimizer, the first step, the end."""
    measure(moment_of, "whole process", "whole process", seconds=15.0)
