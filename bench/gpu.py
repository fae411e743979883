"""Measure fastopt on a GPU against torch, CuPy and a copy of memory, by CUDA events in interleaved rounds.

    python bench/gpu.py                     all lines; the table, and JSON under bench/results/gpu-<device>.json
    python bench/gpu.py --quick             smaller sizes and less time; nothing is stored
    python bench/gpu.py --only "Adam 25M"   the lines whose title contains this text

torch with CUDA is a rival if it is installed. All contestants run on one stream. A sample is the time between two
events around several calls: the device's time, or the host's if launching takes longer, as in a training loop. The copy
moves as many bytes as the step on its line (7 x 4 for each parameter of Adam: p, g, m and v are read, p, m and v
written), so its time divided by ours is our share of the memory's speed.

To run every kind of kernel, with remainders and odd addresses, under NVIDIA's compute-sanitizer (in the CUDA toolkit;
minutes each):

    compute-sanitizer --tool memcheck --leak-check full --error-exitcode 1 python bench/gpu.py --sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python bench/gpu.py --sanitize
    compute-sanitizer --tool synccheck --error-exitcode 1 python bench/gpu.py --sanitize
    compute-sanitizer --tool initcheck --error-exitcode 1 python bench/gpu.py --sanitize

Under --sanitize CuPy's memory pool is off, because its blocks would hide out-of-bounds accesses, every result is
compared with the CPU's, and the backend's caches are cleared at the end, because they would count as leaks. All of this
in one command, for a machine that is at hand for a short time: bench/on_gpu.sh. The exit code is 1 if a result differs,
a line fails or a measured bar does not hold, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tail import DECAY, EMA, LR, MAX_NORM, SCALE, torch_sequence

import fastopt
from fastopt import kernels, reference
from fastopt.batchnorm import functional
from fastopt.files import write_file
from fastopt.kernels import get_backend
from fastopt.measure import Spread

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("fastopt", "numba", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "numpy", "torch")
SAMPLE = 2e-3  # seconds; a faster call is repeated until a sample takes this long
MOST_REPEATS = 500
ROUNDS = 9
Call = Callable[[], object]


@dataclass
class Line:
    """The contestants of one piece of work. The first is fastopt."""

    title: str
    contestants: dict[str, Call]
    bytes: int = 0
    """Minimum number of bytes that the work moves; 0 if memory is not its limit."""
    before: dict[str, Call] = field(default_factory=dict)
    """Functions to call before a contestant's sample."""
    missing: dict[str, str] = field(default_factory=dict)
    """Reasons of missing contestants, by name."""
    outcomes: dict[str, Any] = field(default_factory=dict)
    """Arrays that the contestants change, for comparison."""


class Result(NamedTuple):
    """A measured line."""

    title: str
    bytes: int
    seconds: dict[str, Spread]
    missing: dict[str, str]

    def times(self, rival: str) -> float | None:
        """Return a rival's time as a multiple of fastopt's."""
        return self.seconds[rival].ratio if rival in self.seconds else None


# --- the work ---------------------------------------------------------------------------------------------------------
# Functions of the array module, torch (None if it is missing) and the size.


def standard_normal(xp: Any, shape: Any, seed: int = 0) -> Any:
    """Draw the numbers on the host, part by part: they are the same everywhere."""
    array = xp.empty(shape, np.float32)
    flat, rng, piece = array.reshape(-1), np.random.default_rng(seed), 1 << 22
    for start in range(0, flat.size, piece):
        part = flat[start : start + piece]
        part[...] = xp.asarray(rng.standard_normal(part.size, np.float32))
    return array


def adam(xp: Any, torch: Any, title: str, n: int) -> Line:
    g = standard_normal(xp, n)
    opt = fastopt.Adam({"w": xp.asarray(np.ones(n, np.float32))}, lr=LR)
    opt.grads["w"][...] = g
    p, m, v = xp.array(opt.params["w"]), xp.zeros(n, np.float32), xp.zeros(n, np.float32)
    source, to = xp.zeros(7 * n // 2, np.float32), xp.zeros(7 * n // 2, np.float32)
    line = Line(
        title,
        {
            "fastopt": opt.step,
            "copy": lambda: xp.copyto(to, source),
            "cupy": lambda: reference.adam(p, g, {"m": m, "v": v}, 1, lr=LR),
        },
        bytes=28 * n,
        outcomes={"fastopt": opt.params["w"], "cupy": p},
    )
    if torch is not None:
        line.contestants["torch fused"], (line.outcomes["torch fused"],) = torch_adam(torch, [g])
    return line


def torch_adam(torch: Any, grads: Sequence[Any], **options: Any) -> tuple[Call, list[Any]]:
    params = [torch.nn.Parameter(torch.ones(g.shape, device="cuda")) for g in grads]
    for param, g in zip(params, grads, strict=True):
        param.grad = torch.from_dlpack(g.copy())
    return torch.optim.Adam(params, lr=LR, fused=True, **options).step, [param.detach() for param in params]


def many(xp: Any, torch: Any, title: str, count: int, size: int) -> Line:
    opt = fastopt.Adam([xp.asarray(np.ones(size, np.float32)) for _ in range(count)], lr=LR)
    g = standard_normal(xp, (count, size))
    for k, view in enumerate(opt.grads):
        view[...] = g[k]
    line = Line(title, {"fastopt": opt.step}, bytes=28 * count * size, outcomes={"fastopt": opt.params[-1]})
    if torch is not None:
        line.contestants["torch fused"], params = torch_adam(torch, list(g))
        line.outcomes["torch fused"] = params[-1]
    return line


def tail(xp: Any, torch: Any, title: str, n: int, tensors: int = 20) -> Line:
    """Compare whole steps: unscale, clip by norm, AdamW, moving average, zero the gradients."""
    sizes = [n // tensors] * tensors
    g = standard_normal(xp, sum(sizes))
    pieces = [g[k * sizes[0] : (k + 1) * sizes[0]] for k in range(tensors)]

    def made(**options: Any) -> tuple[Call, Call, Any]:
        params = [xp.asarray(np.ones(size, np.float32)) for size in sizes]
        opt = fastopt.AdamW(params, lr=LR, weight_decay=DECAY, **options)

        def write() -> None:
            for view, piece in zip(opt.grads, pieces, strict=True):
                view[...] = piece

        scale = SCALE if options else 1.0
        return lambda: opt.step(grad_scale=scale), write, opt.params[-1]

    line = Line(title, {})
    flags: dict[str, Any] = {"max_norm": MAX_NORM, "ema": EMA, "zero_grad": True}
    for name, options in {"fastopt": flags, "plain step": {}}.items():
        line.contestants[name], line.before[name], left = made(**options)
        if options:
            line.outcomes[name] = left
    if torch is not None:
        step, write, params = torch_sequence(torch, [torch.from_dlpack(piece) for piece in pieces])
        line.contestants["torch"], line.before["torch"], line.outcomes["torch"] = step, write, params[-1]
    return line


def batchnorm(xp: Any, torch: Any, title: str, shape: tuple[int, ...], axis: int) -> list[Line]:
    """Compare the forward pass in training, and both passes, with one and two copies of x, the minimum they move."""
    x, dy = standard_normal(xp, shape), standard_normal(xp, shape, seed=1)
    channels = shape[axis]
    gamma, beta = standard_normal(xp, channels, seed=2), standard_normal(xp, channels, seed=3)
    mean, var = xp.zeros(channels, np.float32), xp.asarray(np.ones(channels, np.float32))
    y, dx = xp.empty(shape, np.float32), xp.empty(shape, np.float32)
    to = xp.empty(shape, np.float32)

    def forward() -> Any:
        return fastopt.batchnorm_forward(x, gamma, beta, mean, var, axis=axis, out=y)[1]

    lines = [
        Line(f"{title} forward", {"fastopt": forward, "copy": lambda: xp.copyto(to, x)}, outcomes={"fastopt": y}),
        Line(
            f"{title} forward and backward",
            {
                "fastopt": lambda: fastopt.batchnorm_backward(dy, forward(), out=dx),
                "two copies": lambda: (xp.copyto(to, x), xp.copyto(to, dy)),
            },
            outcomes={"fastopt": dx},
        ),
    ]
    if torch is not None:
        found = torch_batchnorm(torch, (x, dy, gamma, beta), axis)
        for line, call in zip(lines, found, strict=True):
            line.contestants["torch"] = call
    return lines


def torch_batchnorm(torch: Any, arrays: Sequence[Any], axis: int) -> tuple[Call, Call]:
    x, dy, gamma, beta = (torch.from_dlpack(array.copy()) for array in arrays)
    if axis == -1:  # the same bytes, seen as (N, C, H, W) in torch's channels_last format
        x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
    leaf = x.detach().clone(memory_format=torch.preserve_format)
    inputs = [tensor.requires_grad_() for tensor in (leaf, gamma, beta)]

    def forward() -> None:
        with torch.no_grad():
            torch.nn.functional.batch_norm(x, mean, var, gamma, beta, True, 0.1, 1e-5)

    def both() -> None:
        y = torch.nn.functional.batch_norm(leaf, mean, var, gamma, beta, True, 0.1, 1e-5)
        torch.autograd.grad(y, inputs, dy)

    return forward, both


def graph(xp: Any, torch: Any, title: str, n: int) -> Line:
    """Compare a step captured in a CUDA graph, including the host's preparation of each replay."""
    g = standard_normal(xp, n)
    opt, plain = (fastopt.Adam({"w": xp.asarray(np.ones(n, np.float32))}, lr=LR) for _ in range(2))
    for each in (opt, plain):
        each.grads["w"][...] = g
    line = Line(title, {}, outcomes={"fastopt": opt.params["w"], "not captured": plain.params["w"]})
    opt.step()
    plain.step()
    stream = xp.cuda.get_current_stream()
    stream.begin_capture()
    opt.step()
    captured = stream.end_capture()

    def replay() -> None:
        opt.prepare_replay()
        captured.launch()

    line.contestants = {"fastopt": replay, "not captured": plain.step}
    if torch is not None:
        step, _ = torch_adam(torch, [g], capturable=True)
        step()
        try:
            theirs = torch.cuda.CUDAGraph()
            with torch.cuda.graph(theirs):
                step()
            line.contestants["torch"] = theirs.replay
        except RuntimeError as error:
            line.missing["torch"] = f"cannot be captured: {str(error).splitlines()[0]}"
    return line


def lines(quick: bool) -> Iterator[tuple[str, Callable[[Any, Any], list[Line]]]]:
    """Yield the work by title, as functions: a line needs much memory and is made only when it is measured."""
    sizes = {"1k": 1_000, "100k": 100_000, "1M": 1_000_000, "25M": 25_000_000, "100M": 100_000_000}
    for name in ("1k", "1M") if quick else sizes:
        yield f"Adam {name}", lambda xp, torch, name=name: [adam(xp, torch, f"Adam {name}", sizes[name])]
    count = 100 if quick else 1000
    title = f"Adam {count} x 64"
    yield title, lambda xp, torch: [many(xp, torch, title, count, 64)]
    for name in ("1M",) if quick else ("1M", "25M"):
        yield f"tail {name}", lambda xp, torch, name=name: [tail(xp, torch, f"tail {name}", sizes[name])]
    shapes = {(64, 64, 56, 56): 1, (32, 256, 14, 14): 1, (32, 512, 7, 7): 1, (128, 16, 32, 32): 1, (64, 56, 56, 64): -1}
    for shape, axis in list(shapes.items())[2:3] if quick else shapes.items():
        of_shape = f"BatchNorm {'x'.join(map(str, shape))}" + (" channels last" if axis == -1 else "")
        yield (
            of_shape,
            lambda xp, torch, shape=shape, axis=axis, name=of_shape: batchnorm(xp, torch, name, shape, axis),
        )
    for name in ("1k",) if quick else ("1k", "1M"):
        of_graph = f"Adam {name} in a CUDA graph"
        yield of_graph, lambda xp, torch, name=name, of_graph=of_graph: [graph(xp, torch, of_graph, sizes[name])]


# --- the clock --------------------------------------------------------------------------------------------------------


class EventClock:
    """Measures the seconds of a number of calls on the current stream, between two events."""

    def __init__(self, xp: Any):
        self._cuda = xp.cuda
        self._events = xp.cuda.Event(), xp.cuda.Event()

    def __call__(self, call: Call, repeat: int) -> float:
        start, end = self._events
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return float(self._cuda.get_elapsed_time(start, end)) / 1e3


def timed(
    line: Line, clock: Callable[[Call, int], float], seconds: float = 1.0, rounds: int = ROUNDS
) -> dict[str, Spread]:
    """Return the seconds per call of each contestant, from rounds of one sample each, in alternating order."""

    def prepare(name: str) -> None:
        if name in line.before:
            line.before[name]()

    repeats = {}
    for name, call in line.contestants.items():
        for _ in range(3):  # the first call compiles, the second fills memory pools
            prepare(name)
            took = clock(call, 1)
        repeats[name] = min(MOST_REPEATS, max(1, round(SAMPLE / max(took, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in line.contestants}
    order = list(times)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[order[0]]) < rounds:
        for name in order:
            call, repeat = line.contestants[name], repeats[name]
            clock(call, 1)  # refill the caches, which the other contestants have used
            prepare(name)
            times[name].append(clock(call, repeat) / repeat)
        order.reverse()
    first = times[next(iter(line.contestants))]
    return {name: Spread.of(found, first) for name, found in times.items()}


# --- output -----------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """The minimum of a rival's time as a multiple of fastopt's."""

    title: str
    rival: str
    least: float

    def verdict(self, results: Mapping[str, Result]) -> tuple[float | None, str]:
        """Return the value, None if it was not measured, and whether the bar holds."""
        result = results.get(self.title)
        value = None if result is None else result.times(self.rival)
        if value is None:
            why = "the line was skipped" if result is None else result.missing.get(self.rival, "it has no such rival")
            return None, f"not measured: {why}"
        return value, "holds" if value >= self.least else "does not hold"


BARS = (
    *(
        Bar(f"Adam {size}", rival, least)
        for size in ("25M", "100M")
        for rival, least in {"copy": 0.9, "torch fused": 1.0}.items()
    ),
    Bar("Adam 1000 x 64", "torch fused", 5.0),
)
"""The bars of a GPU; "copy": the share of the rate at which this device copies its own memory."""


def table(results: Sequence[Result]) -> str:
    """Return the lines as a table; the first contestant of each is fastopt."""
    rows = [("", "", "us", "10 % .. 90 %", "x ours", "GB/s")]
    for result in results:
        for k, (name, spread) in enumerate(result.seconds.items()):
            times = result.times(name)
            rate = f"{result.bytes / spread.median / 1e9:,.0f}" if result.bytes else ""
            between = f"{_us(spread.low)} .. {_us(spread.high)}"
            ours = "" if times is None or k == 0 else f"{times:.2f}"
            rows.append((result.title if k == 0 else "", name, _us(spread.median), between, ours, rate))
        rows += [("", name, "-", why, "", "") for name, why in result.missing.items()]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    left = (True, True, False, False, False, False)
    return "\n".join(
        "  ".join(
            cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    )


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}" if seconds < 1e-3 else f"{1e6 * seconds:,.0f}"


def bars(results: Sequence[Result]) -> str:
    """Return a sentence for each bar."""
    by_title = {result.title: result for result in results}
    sentences = []
    for bar in BARS:
        value, verdict = bar.verdict(by_title)
        what = "share of the copy rate" if bar.rival == "copy" else f"the time of {bar.rival} over ours"
        found = "" if value is None else f" {value:.2f},"
        sentences.append(f"{bar.title}, {what}:{found} at least {bar.least:g}: {verdict}")
    return "\n".join(sentences)


def report(results: Sequence[Result], device: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """Return the content to store; it identifies the device but not the machine."""
    by_title = {result.title: result for result in results}
    return {
        "date": datetime.date.today().isoformat(),
        "device": dict(device),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "quick": quick,
        "results": [
            {**result._asdict(), "seconds": {name: spread._asdict() for name, spread in result.seconds.items()}}
            for result in results
        ],
        "bars": [
            {**bar._asdict(), "value": bar.verdict(by_title)[0], "verdict": bar.verdict(by_title)[1]} for bar in BARS
        ],
    }


def _version(package: str) -> str | None:
    try:
        return fastopt.__version__ if package == "fastopt" else version(package)
    except PackageNotFoundError:
        return None


def file_of(device: str) -> Path:
    """Return the file for the results of a device."""
    return RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def describe(xp: Any) -> dict[str, Any]:
    """Return the facts about the current device."""
    runtime = xp.cuda.runtime
    found = runtime.getDeviceProperties(runtime.getDevice())
    return {
        "name": found["name"].decode(),
        "compute_capability": f"{found['major']}.{found['minor']}",
        "memory_bytes": int(found["totalGlobalMem"]),
        "multiprocessors": int(found["multiProcessorCount"]),
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
    }


# --- for compute-sanitizer --------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {"max_norm": 0.5, "clip_value": 0.5, "ema": 0.9, "zero_grad": True, "maximize": True}
SANITIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "no state": ("SGD", {"lr": 0.1}),
    "two states": ("Adam", {}),
    "every flag": ("AdamW", {**EVERYTHING, "nonfinite": "zero"}),
    "steps left out on the device": ("AdamW", {**EVERYTHING, "nonfinite": "skip"}),
    "three states": ("AdEMAMix", {}),
    "four states": ("Adan", {"weight_decay": 0.1}),
    "norms after": ("LAMB", {"ema": 0.9}),
    "norms before": ("LARS", {"weight_decay": 0.1}),
    "norms and numbers": ("NovoGrad", {"weight_decay": 0.1}),
}
"""An optimizer for each kind of loop, and the flags that change its kernels."""
ODD_SHAPES = ((1,), (33,), (4095,), (4097,), (3, 1367), (0,))
"""Shapes around the widths of loads, of thread blocks, and of a chunk (4096)."""
SIZE = 4099
"""Size of bare arrays."""
SHAPES = (((5, 3), 1), ((7, 37), 1), ((3, 5, 7, 7), 1), ((5, 7, 3, 33), -1), ((1031, 1), 1))
"""Shapes of BatchNorm's x, and the axis of its channels."""


def sanitized(
    shapes: Sequence[tuple[int, ...]] = ODD_SHAPES, dtypes: Sequence[Any] = (np.float32, np.float64)
) -> list[str]:
    """Launch every kind of kernel a few times; return the names of those whose results differ from the CPU's."""
    found: dict[str, bool] = {}
    for dtype in dtypes:
        for name, (kind, options) in SANITIZED.items():
            ours, theirs = (_steps(kind, options, shapes, dtype, place) for place in ("cuda", "cpu"))
            found[f"{name}, {np.dtype(dtype)}"] = _agree(ours, theirs, dtype)
        for name, work in {"rows": _rows, "bare arrays": _bare, "BatchNorm": _batchnorm}.items():
            found[f"{name}, {np.dtype(dtype)}"] = _agree(work(dtype, "cuda"), work(dtype, "cpu"), dtype)
    return [name for name, same in found.items() if not same]


def forget() -> None:
    """Let go of the CUDA backend, and so of all tables and scratch that it keeps on the device between calls."""
    functional.KINDS.clear()  # which hold kernels of BatchNorm
    kernels._made.pop("cuda", None)
    gc.collect()


def _agree(ours: Sequence[Any], theirs: Sequence[Any], dtype: Any) -> bool:
    host, tolerance = get_backend("cuda").host, 1e3 * float(np.finfo(dtype).eps)
    pairs = zip(ours, theirs, strict=True)
    return all(np.allclose(host(a), b, rtol=tolerance, atol=tolerance) for a, b in pairs)


def _normal(shape: Any, dtype: Any, seed: int, place: str) -> Any:
    array = np.asarray(np.random.default_rng(seed).normal(size=shape)).astype(dtype)
    return get_backend(place).adopt(array)


def _steps(kind: str, options: dict[str, Any], shapes: Sequence[Any], dtype: Any, place: str) -> list[Any]:
    opt = getattr(fastopt, kind)([_normal(shape, dtype, k, place) for k, shape in enumerate(shapes)], **options)
    for step in range(3):
        grads = [_normal(shape, dtype, 10 * step + k + 1, place) for k, shape in enumerate(shapes)]
        if step == 1 and options.get("nonfinite"):
            grads[0][...] = np.nan
        opt.step(grads, grad_scale=2.0)
    grads = [_normal(shape, dtype, 90 + k, place) for k, shape in enumerate(shapes)]
    opt.accumulate(grads)
    opt.accumulate(grads, weight=2.0)
    opt.step()
    return [opt.flat.data, *(leaf for leaves in opt.states.values() for leaf in leaves)]


def _rows(dtype: Any, place: str) -> list[Any]:
    opt = fastopt.Momentum({"table": _normal((37, 5), dtype, 0, place)}, lr=0.1)
    for step in range(3):
        indices = np.array([step, 36, 7, 36])
        opt.step_rows({"table": (indices, _normal((4, 5), dtype, step, place))})
    opt.flush_rows()
    return [opt.params["table"]]


def _bare(dtype: Any, place: str) -> list[Any]:
    """Update arrays that start at odd addresses and end at the end of their allocation."""
    found = []
    for rule in (fastopt.rules.adam, fastopt.rules.lamb):
        for skip in (0, 1, 3):
            arrays = [abs(_normal(skip + SIZE, dtype, k, place))[skip:] for k in range(4)]
            rule.update_(*arrays, t=2, lr=0.1)
            found += arrays
    return found


def _batchnorm(dtype: Any, place: str) -> list[Any]:
    found: list[Any] = []
    for shape, axis in SHAPES:
        for relu, residual in ((None, False), ("relu", True)):
            x, dy, more = (_normal(shape, dtype, seed, place) for seed in (1, 2, 3))
            channels = [_normal(shape[axis], dtype, seed, place) for seed in (4, 5)]
            extra = more if residual else None
            y, saved = fastopt.batchnorm_forward(x, *channels, axis=axis, activation=relu, residual=extra)
            found += [y, *fastopt.batchnorm_backward(dy, saved)[:3]]
    return found


# --- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def one_stream(xp: Any, torch: Any) -> Iterator[None]:
    """Use one stream for CuPy, our kernels and torch; not the default stream, which a graph cannot capture."""
    stream = xp.cuda.Stream(non_blocking=True)
    of_torch = nullcontext() if torch is None else torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))
    with stream, of_torch:
        yield


def find_torch() -> tuple[Any, str]:
    """Return torch with CUDA, or None and the reason."""
    try:
        import torch
    except ImportError:
        return None, "torch is not installed"
    return (torch, "") if torch.cuda.is_available() else (None, f"torch {torch.__version__} finds no CUDA device")


def measure(xp: Any, torch: Any, why: str, options: argparse.Namespace) -> list[Result]:
    """Measure every requested line, one after the other."""
    results = []
    clock = EventClock(xp)
    for title, make in lines(options.quick):
        if options.only.lower() not in title.lower():
            continue
        print(f"{title} ...", file=sys.stderr, flush=True)
        try:
            for line in make(xp, torch):
                if torch is None:
                    line.missing["torch fused" if title.startswith("Adam") else "torch"] = why
                seconds = timed(line, clock, options.seconds)
                results.append(Result(line.title, line.bytes, seconds, line.missing))
        except Exception as error:  # mostly too little memory; keep the lines measured so far
            reason = " ".join(str(error).split())[:100]
            results.append(Result(title, 0, {}, {"fastopt": f"failed: {type(error).__name__}: {reason}"}))
        xp.get_default_memory_pool().free_all_blocks()
        if torch is not None:
            torch.cuda.empty_cache()
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, little time; stores nothing by itself")
    parser.add_argument("--only", metavar="TEXT", default="", help="only lines whose title contains TEXT")
    parser.add_argument("--seconds", type=float, metavar="NUMBER", help="for each line (2, with --quick 0.3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to store (bench/results/gpu-<device>.json)")
    parser.add_argument(
        "--sanitize", action="store_true", help="run every kind of kernel for compute-sanitizer, see above"
    )
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (0.3 if options.quick else 2.0)
    try:
        xp = get_backend("cuda").xp
    except RuntimeError as error:
        print(f"bench/gpu.py needs a GPU: {error}", file=sys.stderr)
        return 2
    if xp.__name__ != "cupy":
        print("bench/gpu.py needs a GPU: numba's simulator (NUMBA_ENABLE_CUDASIM) is not enough", file=sys.stderr)
        return 2
    if options.sanitize:
        xp.cuda.set_allocator(None)
        wrong = sanitized()
        forget()
        xp.get_default_pinned_memory_pool().free_all_blocks()
        print(f"differs from the CPU: {'; '.join(wrong)}" if wrong else "as on the CPU")
        return 1 if wrong else 0
    torch, why = find_torch()
    device = describe(xp)
    with one_stream(xp, torch):
        results = measure(xp, torch, why, options)
    if not results:
        print(f"--only: must be part of a line's title, got {options.only!r}", file=sys.stderr)
        return 2
    print(f"{device['name']}\n\n{table(results)}\n\n{bars(results)}")
    path = options.json or (None if options.quick or options.only else file_of(device["name"]))
    if path is not None:
        text = json.dumps(report(results, device, options.quick), indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode())
        print(f"\nstored: {path}", file=sys.stderr)
    by_title = {result.title: result for result in results}
    failed = any("fastopt" in result.missing for result in results)
    return 1 if failed or any(bar.verdict(by_title)[1] == "does not hold" for bar in BARS) else 0


if __name__ == "__main__":
    sys.exit(main())
