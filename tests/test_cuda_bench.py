"""bench/gpu.py: its tables and files on made-up timings; its contestants in numba's simulator or on a GPU (--gpu).

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_bench.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scripts import run

from fastopt.kernels import get_backend

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Any:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")
    backend: Any = get_backend("cuda")
    return backend


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look the module up
    spec.loader.exec_module(module)
    return module


# --- tables and files -------------------------------------------------------------------------------------------------


def made_up(gpu: ModuleType, *, copy: float, torch: float | None, tensors: float) -> list[Any]:
    spread = {"fastopt": gpu.Spread(1e-3, 0.9e-3, 1.1e-3, 9, 1), "copy": gpu.Spread(copy, copy, copy, 9, copy / 1e-3)}
    missing = {}
    if torch is None:
        missing["torch fused"] = "torch is not installed"
    else:
        spread["torch fused"] = gpu.Spread(torch, torch, torch, 9, torch / 1e-3)
    ours = {
        "fastopt": gpu.Spread(2e-5, 1e-5, 3e-5, 9, 1),
        "torch fused": gpu.Spread(tensors, tensors, tensors, 9, tensors / 2e-5),
    }
    return [
        gpu.Result("Adam 25M", 700_000_000, spread, missing),
        gpu.Result("Adam 1000 x 64", 1_792_000, ours, {}),
    ]


def test_the_table_shows_times_ratios_rates_and_missing_rivals(gpu):
    text = gpu.table(made_up(gpu, copy=0.95e-3, torch=None, tensors=4e-4))
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["Adam", "25M", "fastopt", "1,000", "900.0", "..", "1,100", "700"]
    assert lines[2] == ["copy", "950.0", "950.0", "..", "950.0", "0.95", "737"]
    assert lines[3] == ["torch", "fused", "-", "torch", "is", "not", "installed"]
    assert lines[5] == ["torch", "fused", "400.0", "400.0", "..", "400.0", "20.00", "4"]
    assert max(map(len, text.splitlines())) <= 120


def test_bars_hold_or_not_or_were_not_measured(gpu):
    bars = gpu.bars(made_up(gpu, copy=0.95e-3, torch=0.99e-3, tensors=4e-4)).splitlines()
    assert bars[0] == "Adam 25M, share of the copy rate: 0.95, at least 0.9: holds"
    assert bars[1] == "Adam 25M, the time of torch fused over ours: 0.99, at least 1: does not hold"
    assert bars[2] == "Adam 100M, share of the copy rate: at least 0.9: not measured: the line was skipped"
    assert bars[4] == "Adam 1000 x 64, the time of torch fused over ours: 20.00, at least 5: holds"
    bars = gpu.bars(made_up(gpu, copy=0.89e-3, torch=None, tensors=9e-5)).splitlines()
    assert bars[0].endswith("0.89, at least 0.9: does not hold")
    assert bars[1].endswith("not measured: torch is not installed")
    assert bars[4].endswith("4.50, at least 5: does not hold")


def test_every_bar_belongs_to_an_existing_line(gpu):
    titles = [title for title, _ in gpu.lines(quick=False)]
    assert {bar.title for bar in gpu.BARS} <= set(titles)
    assert len(set(titles)) == len(titles)
    assert len(list(gpu.lines(quick=True))) < len(titles)


def test_results_are_stored_as_json_in_a_file_named_after_the_device(gpu):
    results = made_up(gpu, copy=0.95e-3, torch=None, tensors=4e-4)
    stored = json.loads(json.dumps(gpu.report(results, {"name": "NVIDIA H100 80GB HBM3"}, quick=False)))
    ours = stored["results"][0]["seconds"]["fastopt"]
    assert ours == {"median": 1e-3, "low": 0.9e-3, "high": 1.1e-3, "rounds": 9, "ratio": 1}
    assert stored["results"][0]["missing"] == {"torch fused": "torch is not installed"}
    assert stored["bars"][0] == {
        "title": "Adam 25M", "rival": "copy", "least": 0.9, "value": pytest.approx(0.95), "verdict": "holds"
    }  # fmt: skip
    assert {"fastopt", "numba", "numpy"} <= stored["versions"].keys()
    assert gpu.file_of("NVIDIA H100 80GB HBM3").name == "gpu-nvidia-h100-80gb-hbm3.json"


def test_contestants_take_turns_and_their_preparation_is_not_timed(gpu):
    calls: list[str] = []

    def clock(call: Any, repeat: int) -> float:
        for _ in range(repeat):
            call()
        return repeat * {"a": 1e-3, "b": 4e-3}[calls[-1]]

    line = gpu.Line(
        "", {name: lambda name=name: calls.append(name) for name in "ab"}, before={"a": lambda: calls.append("-")}
    )
    found = gpu.timed(line, clock, seconds=0.0, rounds=3)
    assert {name: (spread.median, spread.rounds) for name, spread in found.items()} == {"a": (1e-3, 3), "b": (4e-3, 3)}
    # Three calls each; then rounds of a warm-up call, the preparation, and a sample of 2 ms.
    assert "".join(calls) == "-a-a-abbb" + "a-aabb" + "bba-aa" + "a-aabb"


@pytest.mark.parametrize("arguments", [(), ("--sanitize",), ("--quick", "--only", "adam")])
def test_a_missing_gpu_is_reported(arguments):
    found = run(SCRIPT, *arguments, CUDA_VISIBLE_DEVICES="", NUMBA_ENABLE_CUDASIM="0")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("bench/gpu.py needs a GPU: ")
    assert len(found.stderr.splitlines()) == 1


def test_help_explains_the_sanitizer(gpu, capsys):
    with pytest.raises(SystemExit) as left:
        gpu.main(["--help"])
    assert left.value.code == 0
    assert "compute-sanitizer --tool racecheck" in capsys.readouterr().out


# --- the work ---------------------------------------------------------------------------------------------------------


def of_small_sizes(gpu: ModuleType, xp: Any) -> dict[str, Any]:
    lines = [
        gpu.adam(xp, None, "adam", 40),
        gpu.many(xp, None, "many", 3, 8),
        gpu.tail(xp, None, "tail", 40, tensors=2),
        *gpu.batchnorm(xp, None, "batchnorm", (6, 2, 3), 1),
        gpu.graph(xp, None, "graph", 20),
    ]
    return {line.title: line for line in lines}


def test_every_contestant_does_its_work_once(gpu, device):
    for title, line in of_small_sizes(gpu, device.xp).items():
        assert next(iter(line.contestants)) == "fastopt", title
        before = {name: device.host(array).copy() for name, array in line.outcomes.items()}
        found = gpu.timed(line, lambda call, repeat: [call() for _ in range(1)] and 1.0, seconds=0.0, rounds=1)
        assert found.keys() == line.contestants.keys()
        for name, array in line.outcomes.items():
            assert (device.host(array) != before[name]).any(), (title, name)


def test_contestants_do_the_same_work(gpu, device):
    lines = of_small_sizes(gpu, device.xp)
    adam, graph = lines["adam"], lines["graph"]
    for line, rival in ((adam, "cupy"), (graph, "not captured")):
        line.contestants["fastopt"]()
        line.contestants[rival]()
        ours, theirs = (device.host(line.outcomes[name]) for name in ("fastopt", rival))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=line.title)
    assert adam.bytes == 28 * 40


def test_the_event_clock_counts_calls(gpu, device):
    calls: list[int] = []
    assert 0.0 <= gpu.EventClock(device.xp)(lambda: calls.append(1), 3) < 1.0
    assert len(calls) == 3


def test_the_sanitizer_mode_agrees_with_the_cpu(gpu, device, monkeypatch):
    if SIMULATED:  # the simulator is slow; tests/test_cuda.py runs every rule in it
        few = {name: gpu.SANITIZED[name] for name in ("every flag", "norms and numbers")}
        monkeypatch.setattr(gpu, "SANITIZED", few)
        monkeypatch.setattr(gpu, "SIZE", 35)
        monkeypatch.setattr(gpu, "SHAPES", (((5, 3), 1), ((3, 2, 7), -1)))
        assert gpu.sanitized(((1,), (3, 11)), (np.float32,)) == []
    else:
        assert gpu.sanitized() == []


def test_after_the_sanitizer_mode_nothing_is_kept_on_the_device(gpu, monkeypatch):
    if not SIMULATED:
        pytest.skip("counts the memory of numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1)")
    from fastopt.kernels.cuda.simulated import MEMORY

    gpu.forget()
    monkeypatch.setattr(gpu, "SANITIZED", {"steps left out": gpu.SANITIZED["steps left out on the device"]})
    monkeypatch.setattr(gpu, "SIZE", 35)
    monkeypatch.setattr(gpu, "SHAPES", (((5, 3), 1),))
    before, backend = len(MEMORY._found), weakref.ref(get_backend("cuda"))
    assert gpu.sanitized(((1,), (3, 11)), (np.float32,)) == []
    assert backend() is not None
    assert len(MEMORY._found) > before
    gpu.forget()
    assert backend() is None
    assert len(MEMORY._found) == before


def test_the_sanitizer_mode_notices_differences(gpu, device, monkeypatch):
    monkeypatch.setattr(gpu, "SANITIZED", {"no state": ("SGD", {"lr": 0.1})})
    monkeypatch.setattr(gpu, "_rows", lambda dtype, place: [])
    monkeypatch.setattr(
        gpu, "_bare", lambda dtype, place: [np.zeros(2) if place == "cpu" else device.adopt(np.ones(2))]
    )
    monkeypatch.setattr(gpu, "_batchnorm", lambda dtype, place: [])
    assert gpu.sanitized(((5,),), (np.float32,)) == ["bare arrays, float32"]
