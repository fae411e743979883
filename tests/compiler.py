"""A CUDA kernel, compiled without a GPU: to PTX or to LLVM's code, and from there to PTX or machine code.

Needs numba-cuda and NVIDIA's compilers: whoever imports this asks for both with ``pytest.importorskip`` before.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import nvjitlink

from fastopt.kernels.cuda.target import cuda


def code_of(kernel: Any, signature: tuple[Any, ...], cc: tuple[int, int], output: str) -> Any:
    """output : "ptx", or "ltoir" for LLVM's code."""
    options = {name: kernel.targetoptions[name] for name in ("fastmath", "opt", "launch_bounds")}
    with pytest.MonkeyPatch.context() as patch:  # a device function asks for the device when it is first called
        patch.setattr("numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=cc))
        made, _ = cuda.compile(kernel.py_func, signature, cc=cc, device=False, output=output, abi="numba", **options)
    return made


def linked(code: bytes, cc: tuple[int, int], *options: str) -> str:
    """The PTX that the linker makes of LLVM's code; or what the assembler has to say on making machine code."""
    of_ptx, lto = "-ptx" in options, "-lto" in options
    linker = nvjitlink.create(1 + len(options), [f"-arch=sm_{cc[0]}{cc[1]}", *options])
    try:
        kind = nvjitlink.InputType.LTOIR if lto else nvjitlink.InputType.PTX
        nvjitlink.add_data(linker, kind, code, len(code), "kernel")
        nvjitlink.complete(linker)
        size = nvjitlink.get_linked_ptx_size if of_ptx else nvjitlink.get_info_log_size
        text = bytearray(size(linker))
        (nvjitlink.get_linked_ptx if of_ptx else nvjitlink.get_info_log)(linker, text)
        assert of_ptx or nvjitlink.get_linked_cubin_size(linker) > 0
        return text.decode()
    finally:
        nvjitlink.destroy(linker)
