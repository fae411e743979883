"""Every CUDA kernel, compiled to PTX and machine code without a GPU: exactly rounded, nothing spilled, 16-byte reads.

Skipped without numba-cuda and NVIDIA's compilers (0.8 GB, which no extra of this project brings). To run it in an
environment of its own, and to see the registers of each kernel:

    pip install 'numba-cuda[cu13]==0.30.4' numpy optree safetensors pytest
    PYTHONPATH=. python -m pytest -o addopts= -o filterwarnings= tests/test_ptx.py
    PYTHONPATH=.:tests python tests/test_ptx.py
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

import numpy as np
import pytest
from cases import MATHEMATICS, OfMathematics

import fastopt
from fastopt.batchnorm import formulas
from fastopt.kernels import elements
from fastopt.kernels.bind import bind
from fastopt.kernels.contract import CODED, STORED, Adder, Chunk, Features, Place, StepHyper, Storage, sums_per_block
from fastopt.rule import Rule
from fastopt.step.features import features_of
from fastopt.step.rows import form_of
from fastopt.storage.layout import Layout

WHY = "needs a CUDA compiler, and no GPU: pip install 'numba-cuda[cu13]==0.30.4'"
if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0":
    pytest.skip("the CUDA simulator compiles nothing", allow_module_level=True)
pytest.importorskip("numba_cuda", reason=WHY)
pytest.importorskip("cuda.bindings.nvjitlink", reason=WHY)

from compiler import code_of, linked  # noqa: E402 not before both are known to be there

from fastopt.kernels.cuda import backend as backend_module  # noqa: E402
from fastopt.kernels.cuda import batchnorm, coded, decisions, elementwise, lines, norms, simulated, sums  # noqa: E402
from fastopt.kernels.cuda.target import THREADS, type_of  # noqa: E402

NEW, OTHERS = (9, 0), ((7, 5), (8, 0), (10, 0))
"""Compute capabilities: every kernel is compiled for the first, those for float32 with all features for the others."""
DTYPES = (np.float32, np.float64)
MANY: dict[str, bool] = dict.fromkeys(
    ("unscale", "zero_nonfinite", "clip_value", "clip_norm", "ema", "gated", "zero_grad"), True
)
SIZE = 256


def rules_of_the_library() -> dict[str, Rule]:
    """Those of the optimizers, and those that they run beside them: Muon's direction, Nesterov's look-ahead."""
    folders = ("fastopt.rules.", "fastopt.optimizers.")
    modules = [module for name, module in sys.modules.items() if name.startswith(folders)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Rule)]
    named = Counter(rule.name for rule in set(found))
    return {
        rule.name if named[rule.name] == 1 else f"{rule.name} of {rule.__module__.split('.')[-1]}": rule
        for rule in found
    }


RULES = rules_of_the_library()
OF_EACH_KIND = ("sgd", "adam", "lamb", "novograd", "stable_adamw")
"""No state, an elementwise rule, and three of sums, with two norms, one and none."""
LINED = "adafactor"
"""A rule of sums over rows and columns."""


# --- from a rule to machine code --------------------------------------------------------------------------------------


class Arrays:
    """What stands for CuPy: NumPy, with the devices and streams of the simulator."""

    cuda = simulated.cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class Recorder(backend_module.CUDA):
    """The backend, but that kernels are noted with the types of their arguments where they would be launched."""

    def __init__(self) -> None:
        super().__init__()
        self._use(Arrays(), lambda size: np.zeros(size, np.uint8))
        self.launched: list[tuple[Any, tuple[Any, ...]]] = []

    def launch(self, kernel: Any, blocks: int, *arguments: Any) -> None:
        assert blocks > 0
        signature = tuple(type_of(argument) for argument in arguments)
        self.launched.append((kernel, signature))

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def addresses(self, arrays: tuple[np.ndarray, ...]) -> tuple[int, ...]:
        return tuple(map(self.address, arrays))

    def move(self, to: np.ndarray, source: np.ndarray) -> None:
        pass

    @property
    def device(self) -> int:
        return 0

    def device_of(self, array: np.ndarray) -> int:
        return 0

    def host(self, array: np.ndarray) -> np.ndarray:
        return array

    def capturing(self) -> bool:
        return False


OF_PLACES = {"elementwise": 2, "propose": 2, "apply": 1, "squares": 1, "add": 2, "sum_terms": 2}
"""How many of a kernel's buffers are at addresses of the table of places; the others are states."""


@dataclass(frozen=True)
class Code:
    """What a kernel has become."""

    name: str
    loop: str
    """The function of the backend that it was made of."""
    buffers: int
    """How many its loop reads or writes."""
    operations: Counter[str]
    """How often each instruction stands in the PTX, as in ``fma.rn.f32``."""
    local: bool
    """Whether it keeps anything in local memory, which is as slow as any other."""
    registers: int
    spilled: int
    """Bytes of registers written to and read from local memory, and of the stack."""
    cc: tuple[int, int]

    @property
    def blocks(self) -> int:
        """How many blocks of threads a multiprocessor runs at once. Registers are given out to threads by eights."""
        most = 1024 if self.cc == (7, 5) else 2048
        return min(65_536 // -(-self.registers // 8) // 8, most) // THREADS

    def wide(self, kind: str) -> int:
        """The reads (kind "ld") or writes ("st") of 16 bytes."""
        sizes = {name: re.match(rf"{kind}\.global(?:\.nc)?\.v(\d)\.[a-z](\d+)$", name) for name in self.operations}
        return sum(self.operations[name] for name, size in sizes.items() if size and int(size[1]) * int(size[2]) == 128)


READ_BY_TERMS = {"stable_adamw": 2, "mars": 2, "adam_mini": 1, "prodigy": 4, "lamb": 4, "lars": 2, "novograd": 1}
"""How many buffers the terms of a rule's sums read: the compiler leaves out the others."""


@cache
def recorder() -> Recorder:
    """One for all architectures, for which only the last step of compiling, from LLVM's code to PTX, differs."""
    return Recorder()


@cache
def compiled(kernel: Any, signature: tuple[Any, ...], cc: tuple[int, int], lto: bool) -> Code:
    """lto : by way of LLVM's code, as numba-cuda does for a launch where it can; slower, and less to be looked at."""
    made = code_of(kernel, signature, cc, "ltoir" if lto else "ptx")
    ptx = linked(made, cc, "-lto", "-ptx") if lto else made
    operations = Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*)", ptx, re.MULTILINE))
    assert operations["ret"]
    log = linked(made, cc, "-lto", "-verbose") if lto else linked(made.encode(), cc, "-verbose")
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills is not None, log
    assert registers is not None, log
    loop = kernel.py_func.__code__.co_name
    return Code(
        re.sub(r"_[0-9a-f]{16}$", "", kernel.py_func.__name__),
        loop,
        OF_PLACES.get(loop, 0) + sum(len(kind) for kind in signature if hasattr(kind, "count")),
        operations,
        ".local" in ptx,
        int(registers[1]),
        sum(map(int, spills.groups())),
        cc,
    )


def codes(cc: tuple[int, int], use: Callable[[Recorder], None], lto: bool = False) -> list[Code]:
    """The kernels that `use` launches."""
    backend = recorder()
    backend.launched.clear()
    use(backend)
    assert backend.launched
    return [compiled(*launched, cc, lto) for launched in backend.launched]


def vectors(count: int, dtype: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.zeros(SIZE, dtype) for _ in range(count))


def places(count: int = 1) -> np.ndarray:
    """Nothing is read or written there."""
    return np.array([Place(0, 0, 0, 0)] * count, np.int64)


def chunks(count: int = 1) -> np.ndarray:
    """A chunk of each of `count` parameters."""
    return np.array([Chunk(place=k, start=0, stop=SIZE, grad=0, group=0, block=k) for k in range(count)], np.int64)


def rows_of(*hypers: Any, dtype: Any) -> np.ndarray:
    return np.zeros((1, sum(len(hyper._fields) for hyper in (StepHyper, *hypers))), dtype)


def hyper_of(rule: Rule) -> Any:
    return get_type_hints(rule.prepare)["return"]


@cache
def of_rule(name: str, dtype: Any, everything: bool, cc: tuple[int, int] = NEW, lto: bool = False) -> list[Code]:
    """The kernels of a rule's step, with no features or with all."""
    rule = RULES[name]
    hyper = hyper_of(rule)
    features = features_of(rule, decays=True, **MANY) if everything else Features()

    def use(backend: Recorder) -> None:
        numbers = [np.zeros(SIZE) for _ in rule.numbers]
        states = (*vectors(len(rule.states) + features.ema, dtype), *numbers)
        kernel = backend.kernel(rule, hyper, np.dtype(dtype), features)
        work = Layout.of([(16, SIZE // 16)]).tiles([0]) if rule.lined else chunks()
        kernel.launch(places(), states, rows_of(hyper, dtype=dtype), work, SIZE)

    return codes(cc, use, lto)


@cache
def of_formats(name: str, storage: Storage, cc: tuple[int, int] = NEW) -> list[Code]:
    """The kernels of a rule's step with all features, its buffers in other formats."""
    rule = RULES[name]
    hyper = hyper_of(rule)
    features = features_of(rule, decays=True, **MANY)
    coded = [form for form in storage.states if form in CODED]

    def use(backend: Recorder) -> None:
        numbers = [np.zeros(SIZE) for _ in rule.numbers]
        states = [np.zeros(2 * SIZE, STORED[form]) for form in storage.states]
        units = [np.zeros(SIZE, np.float32) for _ in coded]
        kernel = backend.kernel(rule, hyper, np.dtype(np.float32), features, None, storage)
        work = Layout.of([(16, SIZE // 16)]).tiles([0]) if rule.lined else chunks()
        kernel.launch(places(), (*states, *units, *numbers), rows_of(hyper, dtype=np.float32), work, SIZE)

    return codes(cc, use)


@cache
def of_mathematics(name: str, dtype: Any, cc: tuple[int, int] = NEW) -> list[Code]:
    """The kernel of a rule that calls a function of `fastopt.math`, or `fastopt.uniform`."""

    def use(backend: Recorder) -> None:
        kernel = backend.kernel(MATHEMATICS[name], OfMathematics, np.dtype(dtype), Features())
        kernel.launch(places(), (), rows_of(OfMathematics, dtype=dtype), chunks(), SIZE)

    return codes(cc, use)


@cache
def of_norm(dtype: Any, everything: bool, cc: tuple[int, int] = NEW) -> list[Code]:
    before = ("unscale", "zero_nonfinite", "clip_value")
    features = Features(**dict.fromkeys(before, everything))
    return codes(
        cc,
        lambda backend: backend.norm(np.dtype(dtype), features).launch(places(), rows_of(dtype=dtype), chunks(), SIZE),
    )


@cache
def of_add(dtype: Any, adder: Adder, cc: tuple[int, int] = NEW) -> list[Code]:
    """One that adds, and one that overwrites."""

    def use(backend: Recorder) -> None:
        present, overwrite = np.array([True, True]), np.array([False, True])
        weight = np.array([0.5, 0.0], dtype)
        partials = np.zeros((2, sums_per_block(np.dtype(dtype))))
        backend.add(places(2), present, overwrite, weight, chunks(2), partials, adder, np.dtype(dtype))

    return codes(cc, use)


@cache
def of_rows(dtype: Any, ema: bool, cc: tuple[int, int] = NEW) -> list[Code]:
    """What `Optimizer.step_rows` launches for Adam: the closed form of what was missed, alone and before an update."""
    rule = fastopt.rules.ALL["adam"]
    hyper = hyper_of(rule)
    history = rule.idle.history(rule, 0.1 if ema else None)
    form = form_of(history.scalar, history.hyper)

    def use(backend: Recorder) -> None:
        states = vectors(len(form.states), dtype)
        kernel = backend.kernel(form, history.hyper, np.dtype(dtype), Features(still=True, scattered=True))
        kernel.launch(places(), states, rows_of(history.hyper, dtype=dtype), chunks(), SIZE)
        features = Features(ema=ema, scattered=True, clip_norm=True)
        kernel = backend.kernel(rule, hyper, np.dtype(dtype), features, (history.scalar, history.hyper))
        kernel.launch(places(), states, rows_of(hyper, history.hyper, dtype=dtype), chunks(), SIZE)

    return codes(cc, use)


@cache
def of_decision(dtype: Any, everything: bool, cc: tuple[int, int] = NEW) -> list[Code]:
    """What decides on the device: the coefficient of clipping; and whether the step is left out, and which it is."""
    table, partials = rows_of(dtype=dtype), np.zeros((1, sums_per_block(np.dtype(dtype))))
    skipped = (np.zeros(1, np.int64), 0) if everything else None
    candidates = np.stack([table, table]) if everything else None
    return codes(cc, lambda backend: backend.decide(table, candidates, partials, 0.5, 1.0, skipped))


@cache
def of_sums_of_rows(dtype: Any, cc: tuple[int, int] = NEW) -> list[Code]:
    order, starts = np.arange(8), np.array([0, 3])
    return codes(cc, lambda backend: backend.sum_rows(np.zeros((8, 4), dtype), order, starts))


LAYOUTS = ((8, 4, 16), (128, 4, 1))
"""(samples, channels, spatial): channels first, and channels last."""


@cache
def of_batchnorm(
    dtype: Any, relu: bool, residual: bool, given: bool, training: bool, cc: tuple[int, int] = NEW
) -> list[Code]:
    """given : gamma and beta are, and in training statistics to keep up."""

    def use(backend: Recorder) -> None:
        kernel = backend.batchnorm(formulas, np.dtype(dtype), relu=relu, residual=residual)
        for shape in LAYOUTS:
            x, dy, other, y, dx, of_residual = (np.zeros(math.prod(shape), dtype) for _ in range(6))
            gamma, beta, mean, var, dgamma, dbeta = (np.zeros(shape[1], dtype) for _ in range(6))
            affine = (gamma, beta) if given else (None, None)
            running = (mean, var) if given or not training else (None, None)
            saved = kernel.forward(
                shape,
                x,
                other if residual else None,
                y,
                (*affine, *running),
                training=training,
                eps=1e-5,
                weight=0.1,
            )
            both = relu and residual
            kernel.backward(
                shape,
                x,
                dy,
                y if both else None,
                (dx, of_residual if both else None),
                (dgamma, dbeta),
                saved,
                training=training,
            )

    found = codes(cc, use)
    half = len(found) // 2
    assert found[:half] == found[half:]  # a kernel is told the layout when it is launched
    return found[:half]


# --- what must hold of it ---------------------------------------------------------------------------------------------

DOUBLES: dict[str, set[str]] = {
    "elementwise": set(),
    "apply": {"ld", "cvt"},  # the ratio
    **{loop: {"mov", "cvt", "mul", "fma", "add", "ld", "st"} for loop in ("propose", "squares", "add")},  # the sums
    "map_slices": set(),
    "sum_runs": set(),
}
"""What a kernel for float32 may do in float64; the others work on sums or on a channel's statistics, all in float64."""
ROUNDED = ("div", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
"""The instructions that PTX has approximations of."""
UNDER_WAY = {(7, 5): 16, (8, 0): 32, (9, 0): 32, (10, 0): 32}
"""KiB that the threads of a multiprocessor are to read at once, where they read 16 bytes each. Memory moves half of it
in the time that a read takes (an H100's 3.35 TB/s for 0.7 us, by its 132: 17 KiB); the rest is being worked on."""


def faults(code: Code, dtype: Any) -> list[str]:
    """What is wrong with a kernel, in words."""
    names = list(code.operations)
    wrong = [name for name in names if re.search(r"\.(ftz|approx|full)\b", name)]
    wrong += [n for n in names if n.split(".")[0] in ROUNDED and re.search(r"\.f(32|64)$", n) and ".rn." not in n]
    if dtype == np.float32 and code.loop in DOUBLES:
        wrong += [n for n in names if ".f64" in n and n.split(".")[0] not in DOUBLES[code.loop]]
    wrong += [name for name in names if re.match(r"(ld|st)\.(v\d\.)?[a-z]\d+$", name)]  # at addresses of any memory
    if code.local:
        wrong.append("local memory")
    if code.spilled:
        wrong.append(f"{code.spilled} bytes spilled")
    under_way = code.blocks * THREADS * code.wide("ld") * 16 // 1024
    if code.wide("ld") and under_way < UNDER_WAY[code.cc]:
        wrong.append(f"{code.registers} registers: {code.blocks} blocks fit, which read {under_way} KiB at once")
    small = code.loop in DOUBLES and code.buffers < 6 and "_still" not in code.name and "_after_" not in code.name
    if code.blocks < (3 if dtype == np.float32 and small else 2):
        wrong.append(f"{code.registers} registers: {code.blocks} blocks fit on a multiprocessor")
    return [f"{code.name}: {fault}" for fault in wrong]


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


@by_dtype
@pytest.mark.parametrize("name", RULES)
def test_every_kernel_of_a_rule_is_exact_and_spills_no_register(name, dtype):
    for everything in (False, True):
        for code in of_rule(name, dtype, everything):
            assert faults(code, dtype) == []


@pytest.mark.parametrize("name", RULES)
def test_so_it_is_on_other_architectures(name):
    for cc in OTHERS:
        for code in of_rule(name, np.float32, True, cc):
            assert faults(code, np.float32) == []


FORMATS = {
    "bfloat16 states": ("adamw", Storage("float32", "float32", ("bfloat16", "bfloat16", "float32"))),
    "bfloat16 at random": ("lamb", Storage("bfloat16", "bfloat16", ("bfloat16",) * 3, "", True)),
    "float16, master": ("adafactor", Storage("float16", "float16", ("float32", "float32"), "master")),
    "codes": ("adamw", Storage("bfloat16", "bfloat16", ("int8", "uint8", "float32", "bfloat16"), "rest")),
}


@pytest.mark.parametrize(("name", "storage"), FORMATS.values(), ids=FORMATS)
def test_kernels_of_other_formats_are_exact_and_spill_no_register(name, storage):
    """What threads read at once is less than of float32: numbers of 16 bits come 8 bytes at a time."""
    for cc in (NEW, OTHERS[0]):
        for code in of_formats(name, storage, cc):
            assert [fault for fault in faults(code, np.float32) if "at once" not in fault] == []


LEFT_ALONE = {
    ("direction of muon", False): (2, 1),
    ("direction of muon", True): (1, 1),  # the average looks at p
    ("direction of shampoo", False): (1, 1),
    ("direction of shampoo", True): (0, 1),
    ("direction of soap", False): (3, 2),
    ("direction of soap", True): (2, 2),
    **{(name, everything): (1, 0) for name in ("look_ahead", "average") for everything in (False, True)},
}
"""How many buffers a rule does not read, and does not write: directions their other states and p, the last two g."""


@by_dtype
@pytest.mark.parametrize("name", RULES)
def test_every_buffer_is_read_and_written_16_bytes_at_a_time(name, dtype):
    rule = RULES[name]
    states = len(rule.states)
    for everything in (False, True):
        more = int(everything)  # the average, or the gradient that is set to zero
        not_read, not_written = LEFT_ALONE.get((name, everything), (0, 0))
        expected = {
            "elementwise": (2 + states + more - not_read, 1 + states + 2 * more - not_written),
            "propose": (2 + states, states + more),
            "apply": (1 + states + more, 1 + more),
            "squares": (1, 0),
            "squares_again": (1, 0),
            "propose_again": (1 + states, 0),
            "sum_terms": (READ_BY_TERMS.get(name, 0), 0),
        }
        for cc in (NEW, *OTHERS) if dtype == np.float32 and everything else (NEW,):
            for code in of_rule(name, dtype, everything, cc):
                found, wanted = (code.wide("ld"), code.wide("st")), expected.get(code.loop, (0, 0))
                if code.loop == "sum_again":  # of one norm, where squares are out of range
                    assert found[0] >= 1
                    continue
                if (
                    name in ("muon", "shampoo", "soap") or "_gated" in code.name
                ):  # two loops are made of it, one for each side of an `if`
                    found = min(found[0], wanted[0]), min(found[1], wanted[1])
                assert found == wanted, (code.name, cc)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_so_it_is_as_a_launch_links_it(name):
    for code in of_rule(name, np.float32, True, lto=True):
        assert faults(code, np.float32) == []
        if code.loop in ("elementwise", "sum_terms"):
            read = READ_BY_TERMS[name] if code.loop == "sum_terms" else code.buffers
            assert code.wide("ld") >= read  # a gated one is two loops


@by_dtype
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_so_are_the_norm_and_the_addition_of_gradients_and_both_see_what_is_not_finite(everything, dtype):
    found: list[Code] = []
    for cc in (NEW, *OTHERS) if dtype == np.float32 else (NEW,):
        found += of_norm(dtype, everything, cc)
        for measure in (False, True):
            added = of_add(dtype, Adder(measure, everything), cc)
            again = dtype == np.float64 and measure  # sums of scaled squares
            assert [code.loop for code in added] == ["add", *["squares_again"] * again] * 2
            found += added
    for code in found:
        assert faults(code, dtype) == []
        measures = any(name.startswith("st.shared.") for name in code.operations)
        assert (code.operations[f"sub.f{8 * dtype().nbytes}"] > 0) == measures  # x - x, which fast math takes for 0


@by_dtype
@pytest.mark.parametrize("ema", [False, True], ids=["plain", "ema"])
def test_so_are_the_scattered_kernels_of_rows_and_an_update_after_a_first(ema, dtype):
    for cc in (NEW, *OTHERS) if dtype == np.float32 else (NEW,):
        alone, after = of_rows(dtype, ema, cc)
        assert "_scattered" in alone.name
        assert "_scattered_after_adam_zero_gradient" in after.name
        assert faults(alone, dtype) + faults(after, dtype) == []
        states = alone.buffers - 2
        assert (alone.wide("ld"), after.wide("ld")) == (1 + states, 2 + states)  # of rows that begin at 16 bytes


def on_host(rule: Rule, function: Any) -> tuple[bool, bool]:
    """Whether a scalar function of this rule divides, and whether it takes roots: as LLVM sees it, for the CPU."""
    scalar = elements.scalar(bind(function, {}, label=rule.name, scalar=elements.scalar))
    elements.returned_dtypes(scalar, len(rule.states) + 2, hyper_of(rule), np.dtype(np.float32), "")
    llvm = scalar.inspect_llvm(scalar.signatures[0])
    return " fdiv " in llvm, re.search(r" call .*sqrt", llvm) is not None


@pytest.mark.parametrize("name", RULES)
def test_a_kernel_divides_and_takes_roots_where_its_rule_does_and_rounds_correctly(name):
    rule = RULES[name]
    expected = {"update" if rule.lined else "elementwise": on_host(rule, rule.scalar)}
    for dtype in DTYPES:
        kind = f"rn.f{8 * dtype().nbytes}"
        for everything in (False, True):
            found = {code.loop: code.operations for code in of_rule(name, dtype, everything)}
            for loop, exact in expected.items():
                assert (found[loop][f"div.{kind}"] > 0, found[loop][f"sqrt.{kind}"] > 0) == exact


@by_dtype
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_so_are_the_kernels_of_batchnorm_in_any_layout(relu, residual, dtype):
    for given in (False, True):
        for training in (False, True):
            for cc in (NEW, *OTHERS):
                found = of_batchnorm(dtype, relu, residual, given, training, cc)
                assert [code.loop for code in found] == ["forward_sums"] * training + [
                    "merge_statistics",
                    *["record"] * (training and given),
                    "map_slices",
                    "backward_sums",
                    "merge_gradients",
                    "map_slices",
                ]
                assert [fault for code in found for fault in faults(code, dtype)] == []


@by_dtype
@pytest.mark.parametrize("name", MATHEMATICS)
def test_functions_for_rules_stay_in_their_dtype_and_call_no_library(name, dtype):
    for cc in (NEW, *OTHERS):
        (code,) = of_mathematics(name, dtype, cc)
        found = faults(code, dtype)  # how much is read at once does not matter where a kernel computes for longer
        assert [fault for fault in found if "registers" not in fault] == []
        assert code.operations["call"] + code.operations["call.uni"] == 0


def test_clipping_by_norm_divides_and_takes_the_root_exactly():
    for dtype in DTYPES:
        for cc in (NEW, *OTHERS):
            for everything in (False, True):
                (code,) = of_decision(dtype, everything, cc)
                assert faults(code, dtype) == []
                assert code.operations["div.rn.f64"] == 1
                assert code.operations["sqrt.rn.f64"] == (1 if dtype == np.float32 else 3)  # also of scaled squares


def test_sums_of_repeated_rows_are_taken_in_their_own_dtype():
    for dtype in DTYPES:
        for cc in (NEW, *OTHERS):
            (code,) = of_sums_of_rows(dtype, cc)
            assert faults(code, dtype) == []
            assert code.operations[f"add.f{8 * dtype().nbytes}"] + code.operations[f"add.rn.f{8 * dtype().nbytes}"] > 0


# --- that nothing is left out -----------------------------------------------------------------------------------------


def test_no_rule_is_missing_here():
    folders = [Path(package.__file__).parent for package in (fastopt.rules, fastopt.optimizers)]
    sources = "".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    written = re.findall(r"^@rule\(.*?^def (\w+)\(", sources, re.MULTILINE | re.DOTALL)
    assert len(written) == sources.count("\n@rule(")
    assert sorted(written) == sorted(rule.name for rule in RULES.values())
    assert set(fastopt.rules.ALL) <= set(RULES)
    for name, rule in RULES.items():
        assert fastopt.rules.ALL.get(name, rule) is rule


def test_no_loop_of_the_backend_is_missing_here():
    modules = (elementwise, coded, norms, sums, lines, decisions, batchnorm)
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, FunctionType)]
    loops = {function.__name__ for function in functions if "blockIdx" in function.__code__.co_names}
    loops |= {"decide", "record"}  # of one block
    found = of_rule("lamb", np.float64, False) + of_rule(LINED, np.float32, False) + of_formats(*FORMATS["codes"])
    found += of_norm(np.float64, True) + of_add(np.float32, Adder(True, True)) + of_decision(np.float32, True)
    found += of_sums_of_rows(np.float32)
    found += of_batchnorm(np.float32, True, True, True, True)
    assert {code.loop for code in found} == loops


if __name__ == "__main__":
    for of_dtype in DTYPES:
        print(f"{'registers':>9} {'spilled':>7}")
        for each in [code for name in RULES for on in (False, True) for code in of_rule(name, of_dtype, on)]:
            print(f"{each.registers:9} {each.spilled:7}  {each.name}")
