"""The machine that measurements are of: its processor, caches, memory and packages. Nothing that tells whose it is."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from fastopt.kernels.threads import processors

CPUS = Path("/sys/devices/system/cpu")
MEMORY = Path("/proc/meminfo")
STATISTICS = Path("/proc/stat")
CONTROL_GROUP = Path("/sys/fs/cgroup")


class Cache(NamedTuple):
    """A level of the caches for data, as far as the processors in use have it."""

    level: int
    bytes: int
    """Of one of them."""
    instances: int


def describe() -> dict[str, Any]:
    """What a reader of a measurement has to know of the machine, for JSON."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": processors(),
        "memory_bytes": memory(),
        "caches": [cache._asdict() for cache in caches()],
    }


class OtherPrograms:
    """How much of the processors other programs use, from here on. Known on Linux alone.

    >>> others = OtherPrograms()
    >>> others.share() is None or 0.0 <= others.share() <= 1.0
    True
    """

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """The part of all processors' time that others have had; None where the system does not tell, or too soon.

        Returns:
            A float from 0 to 1, or None.

        >>> OtherPrograms().share()
        """
        now = self._read()
        if now is None or self._start is None:
            return None
        everything, used, own = (after - before for after, before in zip(now, self._start, strict=True))
        if everything < 0.1:  # the system counts in hundredths of a second
            return None
        return min(1.0, max(0.0, (used - own) / everything))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds that all processors had, that all programs used, and that this one used with its children."""
        try:
            fields = [int(text) for text in STATISTICS.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        idle = sum(fields[3:5])  # and waiting for disks
        return sum(fields) / ticks, (sum(fields) - idle) / ticks, sum(os.times()[:4])


def keep_freed_memory() -> bool:
    """Have the C library keep what arrays of up to 32 MB leave behind, for the arrays to come; whether it does so.

    Left to itself glibc gives such memory back, or does not, by what happened to be freed before: NumPy's Adam on a
    million parameters took 18 ms or 4, by whether every temporary array is made of new pages. For the rest of the
    process, and only where the library is glibc.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**25  # names and the largest number that mallopt(3) takes
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_threshold, most) and mallopt(trim_threshold, 2**31 - 1))


def version_of(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The name the maker gave it, which Python's own `platform` does not know on Linux and macOS."""
    try:
        if platform.system() == "Darwin":
            return _sysctl("machdep.cpu.brand_string")
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() == "model name":
                return value.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or "unknown"


def caches() -> list[Cache]:
    """The caches that data goes through, from the first level; none where the system does not tell."""
    try:
        return _caches_of_macos() if platform.system() == "Darwin" else _caches_of_linux()
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def memory() -> int | None:
    """The bytes of memory of the machine, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def free_memory() -> int | None:
    """The bytes that can be allocated now without swapping; of the whole machine where the system tells no better."""
    found = [memory()]
    try:
        for line in MEMORY.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
        limit, used = ((CONTROL_GROUP / f"memory.{what}").read_text().strip() for what in ("max", "current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):  # another system, no control group, or one without a limit ("max")
        pass
    known = [number for number in found if number is not None]
    return max(0, min(known)) if known else None


def _caches_of_linux() -> list[Cache]:
    usable = sorted(os.sched_getaffinity(0))
    found: dict[tuple[int, int], set[str]] = {}
    for cpu in usable:
        for index in (CPUS / f"cpu{cpu}" / "cache").glob("index*"):
            kind, level, size, shared = (
                (index / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
            if kind != "Instruction":
                unit = {"K": 2**10, "M": 2**20}[size[-1]]
                found.setdefault((int(level), unit * int(size[:-1])), set()).add(shared)
    return [Cache(level, size, len(shared)) for (level, size), shared in sorted(found.items())]


def _caches_of_macos() -> list[Cache]:
    """Those of the fast cores."""
    count, sharing = int(_sysctl("hw.perflevel0.physicalcpu")), int(_sysctl("hw.perflevel0.cpusperl2"))
    first, second = int(_sysctl("hw.perflevel0.l1dcachesize")), int(_sysctl("hw.perflevel0.l2cachesize"))
    return [Cache(1, first, count), Cache(2, second, -(-count // sharing))]


def _sysctl(name: str) -> str:
    command = ["sysctl", "-n", name]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
