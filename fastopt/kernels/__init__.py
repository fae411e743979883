"""The backends: where kernels are compiled and launched. `get_backend` imports one only when it is asked for."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from fastopt.kernels.contract import Backend
from fastopt.kernels.threads import COMPILING

NAMES = ("cpu", "cuda")

_made: dict[str, Backend] = {}


def get_backend(name: str) -> Backend:
    """The backend called `name`, made once per process.

    Raises ValueError for a name that is not ``"cpu"`` or ``"cuda"``, and RuntimeError, with the reason, for a backend
    that cannot work here.
    """
    backend = _made.get(name)
    if backend is None:
        with COMPILING:
            backend = _made.get(name)
            if backend is None:
                backend = _made[name] = _make(name)
    return backend


def _make(name: str) -> Backend:
    if name == "cpu":
        from fastopt.kernels.cpu.backend import CPU

        return CPU()
    if name == "cuda":
        try:
            from fastopt.kernels.cuda.backend import CUDA
        except ImportError as error:
            raise RuntimeError(
                f"backend='cuda': {error}; pip install 'fastopt[cuda13]', or use backend='cpu'"
            ) from None

        return CUDA().connect()
    raise ValueError(f"backend={name!r}: expected one of {', '.join(map(repr, NAMES))}")


def find_cuda() -> dict[str, Any]:
    """What there is of CUDA here: available, simulator, devices; whether the backend works, and the reason if not.

    Never raises; the reason is the message with which ``backend="cuda"`` is refused.
    """
    found: dict[str, Any] = {"available": False, "simulator": False, "devices": [], "backend": True, "reason": None}
    with suppress(ImportError):  # the reason below
        from fastopt.kernels.cuda.backend import survey

        found |= survey()
    try:
        get_backend("cuda")
        found["reason"] = None
    except Exception as error:
        found |= {"backend": False, "reason": str(error) or type(error).__name__}
    return found


def place_of(array: Any) -> str:
    """The name of the backend on which an array lives: ``"cuda"`` for those of a device, else ``"cpu"``."""
    try:
        return "cuda" if hasattr(array, "__cuda_array_interface__") else "cpu"
    except RuntimeError:  # torch's, of a tensor on a device that requires grad; `Backend.adopt` tells so
        return "cuda"
