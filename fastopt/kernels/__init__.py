"""The backends, which compile and launch kernels. `get_backend` imports a backend when it is first requested."""

from __future__ import annotations

import copyreg
from contextlib import suppress
from typing import Any

from fastopt.kernels.contract import Backend
from fastopt.kernels.threads import COMPILING

NAMES = ("cpu", "cuda")

_made: dict[str, Backend] = {}


def get_backend(name: str) -> Backend:
    """Return the backend called `name`, which is made once per process.

    Raises ValueError for a name that is not ``"cpu"`` or ``"cuda"``, and RuntimeError, with the reason, for a backend
    that cannot work here.
    """
    backend = _made.get(name)
    if backend is None:
        with COMPILING:
            backend = _made.get(name)
            if backend is None:
                backend = _make(name)
                copyreg.pickle(type(backend), _by_name)
                _made[name] = backend
    return backend


def _by_name(backend: Backend) -> tuple[Any, ...]:
    """How a backend is copied and pickled: there is one in a process."""
    return get_backend, (backend.name,)


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
    raise ValueError(f"backend: must be one of {', '.join(map(repr, NAMES))}, got {name!r}")


def find_cuda() -> dict[str, Any]:
    """Return the state of CUDA: available, simulator, devices; whether the backend works, and the reason if not.

    Never raises. The reason is the message of the error that ``backend="cuda"`` raises.
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


def backend_of(array: Any) -> str:
    """Return the name of the backend of an array: ``"cuda"`` for an array on a device, else ``"cpu"``."""
    try:
        return "cuda" if hasattr(array, "__cuda_array_interface__") else "cpu"
    except RuntimeError:  # torch raises it for a tensor on a device that requires grad; `Backend.adopt` reports that
        return "cuda"


def check_device(name: str, array: Any, backend: Backend, expected: int | None, whose: str) -> None:
    """Refuse an array of the backend that is on another device than `expected`, which is `whose` device."""
    found = backend.device_of(array)
    if found != expected:
        raise ValueError(
            f"{name}: must be on device {expected}, {whose}, got an array on device {found}; move all arrays to one "
            f"device, and make it the current device by `with cupy.cuda.Device({found}):`"
        )
