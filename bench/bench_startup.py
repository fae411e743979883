"""The startup cost of a new process: `import fastopt`, and the first step with and without cached kernels.

Every sample is a new process; the processes of the contestants take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from groups import Group, by_name, each_contestant

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
"""Measured seconds by moment and contestant; the cases share their processes."""


def process(code: str, cache: str = "0") -> dict[str, float]:
    """Run `code` in a new process; return the moments that it prints, and the time of the whole process."""
    path = os.pathsep.join([str(Path(fastopt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    surroundings = {**os.environ, "PYTHONPATH": path, "FASTOPT_CACHE_DIR": cache}
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True
    )
    return {"whole process": time.perf_counter() - start, **json.loads(finished.stdout.splitlines()[-1])}


def gather(seconds: float, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each moment, by contestant."""
    samples: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        contestants = {"fastopt": (OURS, "0"), "cached": (OURS, cache)} | ({} if MISSING else {"torch": (TORCHS, "0")})
        for code, folder in contestants.values():
            process(code, folder)  # loads the files into memory, and fills the cache
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or len(samples["import"]["fastopt"]) < rounds:
            for name, (code, folder) in contestants.items():
                for moment, taken in process(code, folder).items():
                    samples.setdefault(moment, {}).setdefault(name, []).append(taken)
    return samples


def moment_of(title: str, *, moment: str, seconds: float, rounds: int, times: dict[str, list[float]]) -> Result:
    if not SAMPLES:
        SAMPLES.update(gather(seconds, min(rounds, 3)))  # each process of torch takes seconds
    times |= SAMPLES[moment]
    if moment == "import":
        times["numba"] = SAMPLES["numba"]["fastopt"]
    return Result(title, {name: Spread.of(taken, times["fastopt"]) for name, taken in times.items()}, MISSING)


TITLES = {
    "import": "import fastopt, over numba",
    "first step": "first step of a process",
    "whole process": "whole process",
}
"""The title of each moment: `import fastopt` after `import numba`, and the imports of numba and torch; the construction
and the first step of Adam on 1,000 parameters; Python's start, the imports, the optimizer, the first step and the exit.
"""


def group_of(moment: str) -> Group:
    contestants = ("fastopt", "cached", "torch", *(["numba"] if moment == "import" else []))
    return Group(TITLES[moment], contestants, partial(moment_of, moment=moment), 15.0)


GROUPS = by_name(group_of(moment) for moment in TITLES)


@pytest.mark.parametrize(**each_contestant(GROUPS))
def test_startup(measure, group, contestant):
    measure(GROUPS[group], contestant)
