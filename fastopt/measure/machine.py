"""A description of the machine: its processor, caches, memory and packages, without anything that identifies it."""

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
    """A level of the data caches of the processors in use."""

    level: int
    bytes: int
    """Size of one instance."""
    instances: int


def describe() -> dict[str, Any]:
    """Return the facts about the machine that matter for a measurement, for JSON."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": processors(),
        "memory_bytes": memory(),
        "caches": [cache._asdict() for cache in caches()],
    }


class OtherPrograms:
    """The processor time that other programs use after the construction; known on Linux only.

    >>> others = OtherPrograms()
    >>> others.share() is None or 0.0 <= others.share() <= 1.0
    True
    """

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """Return the share of all processors' time that other programs used; None if unknown, or too soon to tell.

        Returns:
            A float from 0 to 1, or None.

        >>> OtherPrograms().share()
        """
        now = self._read()
        if now is None or self._start is None:
            return None
        everything, used, own = (after - before for after, before in zip(now, self._start, strict=True))
        if everything < 0.1:  # too soon: the system counts in hundredths of a second
            return None
        return min(1.0, max(0.0, (used - own) / everything))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Return the seconds of all processors, of all programs, and of this one with its children."""
        try:
            fields = [int(text) for text in STATISTICS.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        idle = sum(fields[3:5])  # idle, or waiting for disks
        return sum(fields) / ticks, (sum(fields) - idle) / ticks, sum(os.times()[:4])


def keep_freed_memory() -> bool:
    """Make glibc keep freed arrays of up to 32 MB for later arrays; return whether it does so.

    By default glibc returns such memory to the system or not, depending on earlier frees, so that a temporary array may
    or may not need new pages. The setting lasts for the rest of the process and needs glibc.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**25  # parameters of mallopt(3), and its largest value
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_threshold, most) and mallopt(trim_threshold, 2**31 - 1))


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the vendor's name of the processor, which `platform` does not know on Linux and macOS."""
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
    """Return the data caches, from the first level; empty if the system does not report them."""
    try:
        return _caches_of_macos() if platform.system() == "Darwin" else _caches_of_linux()
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def memory() -> int | None:
    """Return the machine's memory in bytes, or None if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def free_memory() -> int | None:
    """Return the bytes that can be allocated without swapping; the machine's memory if nothing better is known."""
    found = [memory()]
    try:
        for line in MEMORY.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
        limit, used = ((CONTROL_GROUP / f"memory.{what}").read_text().strip() for what in ("max", "current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):  # not Linux, no control group, or a control group without a limit ("max")
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
    """Return the caches of the fast cores."""
    count, sharing = int(_sysctl("hw.perflevel0.physicalcpu")), int(_sysctl("hw.perflevel0.cpusperl2"))
    first, second = int(_sysctl("hw.perflevel0.l1dcachesize")), int(_sysctl("hw.perflevel0.l2cachesize"))
    return [Cache(1, first, count), Cache(2, second, -(-count // sharing))]


def _sysctl(name: str) -> str:
    command = ["sysctl", "-n", name]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
