"""The CUDA backend with its compiled kernels run on the CPU: numba-cuda and gcc are all it needs.

Arrays are those that stand for CuPy's in numba's simulator, but what runs is the PTX that a GPU would get, thread after
thread, in the machine of machine.c. Every access to memory is checked: `EmulationError` names the first that is out of
bounds, misaligned, of memory that was never written, or part of a race; and a barrier that not all threads reach.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastopt.kernels.cuda import launcher, simulated
from fastopt.kernels.cuda.backend import CUDA
from fastopt.kernels.cuda.target import SIMULATED, THREADS, type_of

if SIMULATED:
    pytest.skip("the emulator runs what is compiled, and the CUDA simulator compiles nothing", allow_module_level=True)
if shutil.which("gcc") is None:
    pytest.skip("the emulator needs gcc", allow_module_level=True)
for name in ("numba_cuda", "cuda.bindings.nvjitlink"):
    pytest.importorskip(name, reason="the emulator needs a CUDA compiler, and no GPU: pip install 'numba-cuda[cu13]'")

from compiler import code_of, linked  # noqa: E402 not before the compiler is known to be there
from translate import translate  # noqa: E402

HERE = Path(__file__).parent
CC = (9, 0)
FLAGS = ("-O1", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-Werror=implicit-function-declaration")
launcher.MOST_ROOMS = 0  # memory that is used again holds what was written the time before
UNWRITTEN = bytes.fromhex("addea57f")
"""UNWRITTEN32 of machine.h."""
FIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64))
LAUNCHES: Counter[bool] = Counter()
"""How many there were, by contraction."""


class EmulationError(RuntimeError):
    """What compute-sanitizer would report of a launch."""


# --- from PTX to a function -------------------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fastopt-emulated-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _library(source: Path) -> ctypes.CDLL:
    """A C file as a loaded library."""
    made = _folder() / f"{source.stem}.so"
    command = ["gcc", *FLAGS, f"-I{HERE}", "-o", str(made), str(source), "-lm"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"PTX: must be of the instructions of machine.h; gcc reports:\n{found.stderr}")
    return ctypes.CDLL(str(made))


@cache
def _machine() -> Any:
    launch = _library(HERE / "machine.c").launch
    word, many = ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint64)
    launch.argtypes = [ctypes.c_void_p, word, word, many, word, ctypes.c_int, FIND, ctypes.c_char_p]
    return launch


@cache
def loaded(ptx: str) -> ctypes.CDLL:
    """The library of a kernel."""
    source = _folder() / f"{len(list(_folder().glob('*.c')))}.c"
    source.write_text(translate(ptx))
    return _library(source)


# --- a launch ---------------------------------------------------------------------------------------------------------


@FIND
def _find(address: int, start: Any, end: Any) -> int:
    """The array of the device that is alive at an address."""
    found = simulated.MEMORY.find(address)
    if found is None:
        return 0
    start[0], end[0] = found.start, found.end
    return 1


def _word(argument: Any) -> int:
    """An argument of a kernel as 8 bytes."""
    if isinstance(argument, np.ndarray):
        return int(argument.__array_interface__["data"][0])
    if isinstance(argument, float):
        return int(struct.unpack("<Q", struct.pack("<d", argument))[0])
    return int(argument) & (2**64 - 1)


def run(ptx: str, blocks: int, threads: int, arguments: tuple[Any, ...], *, backwards: bool = False) -> None:
    """Launch the kernel of a PTX module. Raises EmulationError for what a launch must not do.

    backwards : the last thread of the last block runs first.
    """
    words = [_word(each) for given in arguments for each in (given if isinstance(given, tuple) else (given,))]
    message = ctypes.create_string_buffer(512)
    kernel = ctypes.addressof(ctypes.c_char.in_dll(loaded(ptx), "kernel"))
    passed = (ctypes.c_uint64 * len(words))(*words)
    if _machine()(kernel, blocks, threads, passed, len(words), backwards, _find, message):
        raise EmulationError(message.value.decode())


class Arrays:
    """What stands for CuPy in numba's simulator; but arrays that are not filled hold what no kernel may read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(simulated, name)

    @staticmethod
    def empty(shape: Any, dtype: Any = np.float64) -> Any:
        """As CuPy's."""
        made = np.empty(shape, dtype)
        filling = UNWRITTEN * (made.nbytes // len(UNWRITTEN) + 1)
        return np.frombuffer(filling[: made.nbytes], made.dtype).reshape(made.shape).copy().view(simulated.ndarray)


class Emulated(CUDA):
    """The backend "cuda", wherever it is asked for while it is installed."""

    contracted = False
    """Whether a product and a sum are one instruction, as a GPU has it; else results are those of the CPU."""
    backwards = False
    """Whether the last thread of the last block runs first."""

    def __init__(self) -> None:
        super().__init__()
        self._use(Arrays(), np.empty)
        self._most_blocks = 3  # so that blocks take several chunks each
        self._lto: dict[Any, bytes] = {}
        self._ptx: dict[Any, str] = {}

    def connect(self) -> Emulated:
        return self

    def address(self, array: Any) -> int:
        return _word(array)

    def partials(self, found: Any, width: int) -> tuple[Any, Any]:
        array = self.empty(width * found.blocks)  # as above
        return array, array.reshape(-1, width)

    def launch(self, kernel: Any, blocks: int, *arguments: Any) -> None:
        if blocks == 0:
            return
        self._check_device(arguments[0])
        if self.capturing():
            simulated.cuda.recorded.append(partial(self.launch, kernel, blocks, *arguments))
            return
        key = (kernel, self.contracted)
        if key not in self._ptx:
            if kernel not in self._lto:
                signature = tuple(type_of(argument) for argument in arguments)
                self._lto[kernel] = code_of(kernel, signature, CC, "ltoir")
            self._ptx[key] = linked(self._lto[kernel], CC, "-lto", "-ptx", f"-fma={int(self.contracted)}")
        LAUNCHES[self.contracted] += 1
        try:
            run(self._ptx[key], min(blocks, self._most_blocks), THREADS, arguments, backwards=self.backwards)
        except EmulationError as error:
            raise EmulationError(f"{kernel.py_func.__name__}: {error}") from None
