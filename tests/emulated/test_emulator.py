"""The emulator itself: PTX's instructions, the two ways to contract, and that it notices every fault planted here."""

from __future__ import annotations

import inspect
import struct
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

import emulator
import numpy as np
import pytest
from compiler import code_of, linked
from emulator import CC, Emulated, EmulationError, run

import fastopt
from fastopt import kernels
from fastopt.batchnorm import functional
from fastopt.kernels.cuda import backend as backend_module
from fastopt.kernels.cuda import batchnorm, decisions, elementwise, lines, memory, norms, simulated
from fastopt.kernels.cuda.target import cuda, type_of


def changed(function: Callable[..., Any], *changes: tuple[str, str]) -> FunctionType:
    """A function of another source: each text, which stands once in it, is replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, (old, source)
        source = source.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(source, function.__code__.co_filename, "exec"), function.__globals__, names)
    made: FunctionType = names[function.__name__]
    return made


# --- instructions -----------------------------------------------------------------------------------------------------

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"


def bits(value: Any) -> int:
    """The 8 bytes of an operand, or of a result."""
    if isinstance(value, np.float32):
        return int(value.view(np.uint32))
    if isinstance(value, float):
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    return int(value) & (2**64 - 1)


F = np.float32
INSTRUCTIONS: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
    ("add.rn.f32", (F(1), F(2**-24)), F(1)),
    ("sub.f32", (F(1), F(1e-45)), F(1)),
    ("mul.rn.f32", (F(1e-30), F(1e-15)), F(1e-45)),  # denormal numbers are kept
    ("div.rn.f32", (F(1), F(3)), F(1) / F(3)),
    ("sqrt.rn.f32", (F(2),), np.sqrt(F(2))),
    ("fma.rn.f64", (1.0 + 2.0**-52, 1.0 + 2.0**-52, -1.0 - 2.0**-51), 2.0**-104),
    ("neg.f32", (F(0),), F(-0.0)),
    ("abs.f64", (-0.0,), 0.0),
    ("min.f32", (F(np.nan), F(1)), F(1)),
    ("max.f32", (F(-0.0), F(0)), F(0)),
    ("max.f64", (1.0, float("nan")), 1.0),
    ("setp.lt.f32", (F(np.nan), F(1)), 0),
    ("setp.ltu.f32", (F(np.nan), F(1)), 1),
    ("setp.geu.f32", (F(0), F(1)), 0),
    ("setp.ne.f64", (float("nan"), 1.0), 0),
    ("setp.neu.f64", (float("nan"), 1.0), 1),
    ("setp.num.f64", (float("nan"), 1.0), 0),
    ("setp.eq.b64", (-1, 2**64 - 1), 1),
    ("setp.lt.s64", (-1, 1), 1),
    ("setp.lt.u64", (-1, 1), 0),
    ("setp.gt.s32", (2**31, 0), 0),
    ("setp.gt.u32", (2**31, 0), 1),
    ("div.s64", (-7, 2), -3),
    ("rem.s64", (-7, 2), -1),
    ("div.s64", (-(2**63), -1), -(2**63)),
    ("div.u32", (2**32 - 7, 2), (2**32 - 7) // 2),
    ("min.s64", (-1, 1), -1),
    ("min.u64", (-1, 1), 1),
    ("mul.wide.s32", (-2, 3), -6),
    ("mul.wide.u32", (2**32 - 2, 3), 3 * (2**32 - 2)),
    ("mad.lo.s64", (3, 5, -1), 14),
    ("shr.s64", (-8, 1), -4),
    ("shr.s64", (-8, 200), -1),
    ("shr.u64", (-8, 63), 1),
    ("shr.u32", (2**31, 32), 0),
    ("shl.b64", (1, 64), 0),
    ("shl.b32", (1, 31), 2**31),
    ("xor.b64", (5, 3), 6),
    ("not.b64", (0,), -1),
    ("cvt.s64.s32", (2**32 - 1,), -1),
    ("cvt.u64.u32", (2**32 - 1,), 2**32 - 1),
    ("cvt.u32.u64", (2**32 + 5,), 5),
    ("cvt.rn.f32.f64", (1.0 + 2.0**-24 + 2.0**-50,), F(1 + 2**-23)),
    ("cvt.f64.f32", (F(0.1),), float(F(0.1))),
    ("cvt.rn.f64.s64", (-3,), -3.0),
)
"""Of each, operands and what it gives, by the PTX manual."""


REGISTERS = {"f32": "%f", "f64": "%fd", "32": "%r", "64": "%rd", "pred": "%p"}


def register(kind: str, number: int) -> str:
    return f"{REGISTERS.get(kind) or REGISTERS[kind[1:]]}{number}"


def kind_of(instruction: str) -> str:
    """The type of what an instruction gives."""
    words = instruction.split(".")
    if words[0] == "setp":
        return "pred"
    if words[0] == "cvt":
        return words[-2]
    return f"{words[-1][0]}64" if "wide" in words else words[-1]


def ptx_of(instruction: str, operands: int) -> str:
    """A kernel that loads operands, executes an instruction and stores what it gives."""
    given, to = instruction.split(".")[-1], kind_of(instruction)
    kinds = [given, "u32" if instruction.startswith("sh") else given, given][:operands]
    declared = {"f32": "%f", "f64": "%fd", "b32": "%r", "b64": "%rd", "pred": "%p"}
    lines = [f".reg .{kind} {name}<9>;" for kind, name in declared.items()]
    lines += ["ld.param.u64 %rd7, [given];", "ld.param.u64 %rd8, [found];"]
    lines += [f"ld.global.{kind} {register(kind, k)}, [%rd7+{8 * k}];" for k, kind in enumerate(kinds)]
    lines.append(f"{instruction} {', '.join([register(to, 5), *(register(kind, k) for k, kind in enumerate(kinds))])};")
    if to == "pred":
        lines, to = [*lines, "selp.u32 %r5, 1, 0, %p5;"], "u32"
    body = "\n".join([*lines, f"st.global.{to} [%rd8], {register(to, 5)};", "ret;"])
    return f"{HEADER}.visible .entry k(.param .u64 given, .param .u64 found) {{\n{body}\n}}\n"


@pytest.mark.parametrize(("instruction", "operands", "expected"), INSTRUCTIONS)
def test_an_instruction_gives_what_the_manual_says(instruction, operands, expected):
    given = simulated.array(np.array([bits(value) for value in operands], np.uint64))
    found = simulated.zeros(1, np.uint64)
    run(ptx_of(instruction, len(operands)), 1, 1, (given, found))
    size = 64 if kind_of(instruction).endswith("64") else 32
    assert int(simulated.asnumpy(found)[0]) == bits(expected) & (2**size - 1)


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        (ptx_of("tanh.approx.f32", 1), "tanh_approx_f32"),
        (ptx_of("fma.rz.f32", 3), "fma_rz_f32"),
        (ptx_of("add.ftz.f32", 2), "add_ftz_f32"),
        (ptx_of("add.f32", 2).replace(".visible .entry", ".func g() {}\n.visible .entry"), "without functions"),
        (ptx_of("add.f32", 2).replace("%f0", "%z0"), "must be a register, got '%z0'"),
    ],
    ids=["approximate", "rounded to zero", "flushed", "with a function", "unknown register"],
)
def test_what_the_machine_does_not_have_is_refused(ptx, message):
    with pytest.raises(ValueError, match=message):
        run(ptx, 1, 1, ())


# --- the machine ------------------------------------------------------------------------------------------------------

WIDTH = 64


def block_sums(x, n, sums):
    """The sum of x over each block of threads: a kernel with all that can go wrong."""
    parts = cuda.shared.array(WIDTH, np.float64)
    thread = cuda.threadIdx.x
    k = cuda.blockIdx.x * cuda.blockDim.x + thread
    parts[thread] = x[k] if k < n else 0.0
    cuda.syncthreads()
    width = cuda.blockDim.x // 2
    while width > 0:
        if thread < width:
            parts[thread] += parts[thread + width]
        cuda.syncthreads()
        width //= 2
    if thread == 0:
        sums[cuda.blockIdx.x] = parts[0]


def compiled(function: Callable[..., Any], *arguments: Any, contracted: bool = False) -> str:
    signature = tuple(type_of(argument) for argument in arguments)
    options = ("-lto", "-ptx", f"-fma={int(contracted)}")
    return linked(code_of(cuda.jit(function), signature, CC, "ltoir"), CC, *options)


def summed(function: Callable[..., Any], *, backwards: bool = False, of: Any = None, sums: Any = None) -> np.ndarray:
    """What the kernel, or a changed one, leaves of 150 numbers in 3 blocks."""
    x = simulated.array(np.arange(150.0)) if of is None else of
    found = simulated.zeros(3) if sums is None else sums
    run(compiled(function, x, 150, found), 3, WIDTH, (x, 150, found), backwards=backwards)
    return simulated.asnumpy(found)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_kernel_without_a_fault_runs(backwards):
    x = np.arange(150.0)
    assert summed(block_sums, backwards=backwards).tolist() == [x[:64].sum(), x[64:128].sum(), x[128:].sum()]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("if k < n", "if k <= n", "reads out of bounds"),
        ("sums[cuda.blockIdx.x] =", "sums[cuda.blockIdx.x + 1] =", "writes out of bounds"),
        ("parts[thread + width]", "parts[thread + 2 * width]", "reads out of bounds"),
        ("parts[thread] = x[k] if k < n else 0.0", "if k < n:\n        parts[thread] = x[k]", "never written"),
        ("0.0\n    cuda.syncthreads()\n", "0.0\n", "race|never written"),
        ("        cuda.syncthreads()\n        width", "        width", "race"),
        ("        cuda.syncthreads()\n        w", "            cuda.syncthreads()\n        w", "not reached by all"),
        ("if thread < width:", "if thread <= width:", "race|out of bounds"),
        ("sums[cuda.blockIdx.x]", "sums[0]", "race of writes"),
        ("    if thread == 0:\n        sums", "    if thread < 2:\n        sums", "race of writes"),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_fault_is_noticed_in_either_order(old, new, message, backwards):
    with pytest.raises(EmulationError, match=message):
        summed(changed(block_sums, (old, new)), backwards=backwards)


def test_memory_that_is_no_array_or_not_filled_or_not_aligned_is_not_read():
    x = simulated.array(np.arange(150.0))
    empty = emulator.Arrays().empty(150)
    empty[:149] = 1.0
    with pytest.raises(EmulationError, match=r"never written: thread 21 of block 2: ld\.global"):
        summed(block_sums, of=empty)
    empty[149:] = 1.0
    assert summed(block_sums, of=empty).tolist() == [64.0, 64.0, 22.0]
    address, ptx = emulator._word(x), compiled(block_sums, x, 150, x)
    sums = simulated.zeros(3)
    with pytest.raises(EmulationError, match="reads at a misaligned address"):
        run(ptx, 1, WIDTH, (address + 4, 64, sums))
    run(ptx, 1, WIDTH, (address, 64, sums))
    del x
    with pytest.raises(EmulationError, match="reads out of bounds"):
        run(ptx, 1, WIDTH, (address, 64, sums))
    with pytest.raises(EmulationError, match="2 arguments, the kernel has 3"):
        run(ptx, 1, WIDTH, (address, sums))


def test_a_product_and_a_sum_are_contracted_or_not():
    def product_and_sum(x, found):
        found[0] = x[0] * x[0] + x[1]

    x = simulated.array(np.array([1.0 + 2.0**-30, -1.0]))
    results = []
    for contracted in (False, True):
        found = simulated.zeros(1)
        run(compiled(product_and_sum, x, found, contracted=contracted), 1, 1, (x, found))
        results.append(float(simulated.asnumpy(found)[0]))
    assert results == [2.0**-29, 2.0**-29 + 2.0**-60]


# --- faults of the library's kernels ----------------------------------------------------------------------------------


def planted(patch: pytest.MonkeyPatch, module: Any, name: str, *changes: tuple[str, str]) -> None:
    """Change the source of a function of the backend, for kernels that are bound from now on."""
    function = changed(getattr(module, name), *changes)
    patch.setattr(module, name, function)
    if hasattr(backend_module, name):
        patch.setattr(backend_module, name, function)
    parts = tuple((part, function if each.__name__ == name else each) for part, each in backend_module.PARTS)
    patch.setattr(backend_module, "PARTS", parts)
    patch.setitem(kernels._made, "cuda", Emulated())
    patch.setattr(functional, "KINDS", {})  # these hold kernels of the backend before


def a_step(name: str = "Adam", **options: Any) -> bool:
    """Make a step in arrays that end where their memory ends; return whether it is that of the CPU."""
    rng = np.random.default_rng(0)
    params, grads = ({f"p{n}": rng.normal(size=n).astype(np.float32) for n in (5, 33, 4098, 1, 7)} for _ in range(2))
    backend = kernels.get_backend("cuda")
    there, given = ({path: backend.adopt(array) for path, array in each.items()} for each in (params, grads))
    opt = getattr(fastopt, name)(there, copy=False, **options)
    cpu = getattr(fastopt, name)(params, **options)
    opt.step(given)
    cpu.step(grads)
    return all(backend.host(opt.params[path]).tobytes() == cpu.params[path].tobytes() for path in params)


def a_batchnorm(shape: tuple[int, ...] = (5, 3, 31, 33)) -> bool:
    """Return whether a forward pass is close to that of the CPU."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y, _ = fastopt.batchnorm_forward(kernels.get_backend("cuda").adopt(x))
    return bool(np.allclose(simulated.asnumpy(y), fastopt.batchnorm_forward(x)[0], rtol=1e-5, atol=1e-5))


def test_nothing_is_noticed_where_nothing_is_planted(backend):
    assert a_step()
    assert a_step("LAMB")
    assert a_batchnorm()


NOTICED: dict[str, tuple[Any, str, list[tuple[str, str]], Callable[[], bool], str]] = {
    "out of bounds by one": (
        elementwise,
        "elementwise",
        [("size = chunk.stop - chunk.start", "size = chunk.stop - chunk.start + 1")],
        a_step,
        "out of bounds",
    ),
    "16 bytes at a time over the end": (
        memory,
        "loop",
        [("first + (ITEMSIZE * size & -WIDE_BYTES)", "first + (ITEMSIZE * (size + 3) & -WIDE_BYTES)")],
        a_step,
        "out of bounds",
    ),
    "a lost barrier before a tree": (
        norms,
        "block_sums",
        [("cuda.syncthreads()\n    width =", "width =")],
        lambda: a_step(max_norm=1.0),
        "race|never written",
    ),
    "a lost barrier in a tree": (
        batchnorm,
        "tree",
        [("        cuda.syncthreads()\n        width", "        width")],
        a_batchnorm,
        "race",
    ),
    "a lost barrier before sums of a tile": (
        lines,
        "fold",
        [("cuda.syncthreads()\n    half", "half")],
        lambda: a_step("Adafactor"),
        "race|never written",
    ),
    "a swapped stride": (
        batchnorm,
        "advance",
        [("at += cut.stride", "at += cut.map_stride"), ("inside += cut.map_stride", "inside += cut.stride")],
        lambda: a_batchnorm((40, 3, 7, 7)),
        "race|out of bounds",
    ),
    "partial sums that are not written": (
        norms,
        "squares",
        [("while c < n:", "while c < n - 1:")],
        lambda: a_step(max_norm=1.0),
        "never written",
    ),
    "every thread leaves the result": (
        decisions,
        "decide",
        [("if cuda.threadIdx.x == 0:\n        result[0]", "if cuda.threadIdx.x >= 0:\n        result[0]")],
        lambda: a_step(max_norm=1.0),
        "race of writes",
    ),
}


@pytest.mark.parametrize("fault", NOTICED)
def test_the_machine_notices(fault, monkeypatch):
    module, name, changes, work, message = NOTICED[fault]
    planted(monkeypatch, module, name, *changes)
    with pytest.raises(EmulationError, match=message):
        work()


DIFFERENT: dict[str, tuple[Any, str, list[tuple[str, str]], Callable[[], bool]]] = {
    "a tail that is left out": (
        memory,
        "loop",
        [("s, t = SINGLES(buffers, middle + ITEMSIZE * thread", "s, t = SINGLES(buffers, stop + ITEMSIZE * thread")],
        a_step,
    ),
    "a chunk that begins at another element": (
        elementwise,
        "elementwise",
        [("place.g + ITEMSIZE * chunk.grad", "place.g + ITEMSIZE * chunk.group")],
        a_step,
    ),
}


@pytest.mark.parametrize("fault", DIFFERENT)
def test_the_comparison_with_the_cpu_notices(fault, monkeypatch):
    module, name, changes, work = DIFFERENT[fault]
    planted(monkeypatch, module, name, *changes)
    assert not work()
