"""Kernels on disk: never stale, shared by processes, bounded, and never the reason of an error."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from scripts import ROOT, run

import fastopt
from fastopt.kernels import bind, cache, elements

MAGIC = len(cache.MAGIC)

# --- between processes ------------------------------------------------------------------------------------------------

MODULE = """
import math
from typing import NamedTuple
import fastopt
import scaling

class Hyper(NamedTuple):
    lr: float

def prepare(t, lr=0.5):
    return Hyper(lr)

@fastopt.rule(prepare)
def descent(p, g, m, h):
    m = scaling_of(g) + m
    return p - h.lr * m, m

scaling_of = scaling.scaled
"""
SCALING = """
def scaled(x):
    return x + x
"""
TRAIN = """
import numpy as np, fastopt
from fastopt.kernels import cache
from fastopt.kernels.driver import DRIVER, SERIAL_BELOW
from users_rule import descent

DONE = {"load": 0, "save": 0}

def counted(name):
    function = getattr(cache, name)

    def call(*arguments):
        found = function(*arguments)
        DONE[name] += found is not None
        return found

    setattr(cache, name, call)

counted("load")
counted("save")
DRIVER.choose("pool")
for size in (5, SERIAL_BELOW):  # on one thread, and on two
    opt = fastopt.Optimizer([np.ones(size), np.ones(size)], descent)
    for _ in range(2):
        opt.step([np.ones(size), np.ones(size)])
    values = np.unique(opt.flat.data[opt.flat.data != 0.0])
    print("p =", *values)
print("loaded, saved =", *DONE.values())
"""


class Project:
    """A user's folder: a rule, a module it calls, a script that trains, and a cache directory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cache = folder / "cache"
        self.write("users_rule.py", MODULE)
        self.write("scaling.py", SCALING)
        self.write("train.py", TRAIN)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        shutil.rmtree(self.folder / "__pycache__", ignore_errors=True)  # whose stamps are too coarse for us

    def train(self, **environment: str) -> tuple[list[float], int, int]:
        """Return p after the run, and how many kernels were loaded and saved."""
        finished = run(
            self.folder / "train.py",
            **{"FASTOPT_CACHE_DIR": str(self.cache), "FASTOPT_NUM_THREADS": "2", **environment},
        )
        assert finished.returncode == 0, finished.stderr
        *results, counts = [line.split("=")[1] for line in finished.stdout.splitlines()]
        loaded, saved = map(int, counts.split())
        return [float(result) for result in results], loaded, saved

    def files(self) -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in self.cache.iterdir()}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_the_second_process_compiles_nothing_and_an_edit_is_seen(project):
    # Two steps of lr 0.5 on m = 2, 4: p = 1 - 1 - 2.
    results, loaded, saved = project.train()
    assert results == [-2.0, -2.0]
    assert loaded == 0
    assert saved >= 1
    first = project.files()
    assert stat.S_IMODE(project.cache.stat().st_mode) == 0o700

    assert project.train() == ([-2.0, -2.0], saved, 0)
    assert project.files() == first

    project.write("users_rule.py", MODULE.replace("p - h.lr * m", "p + h.lr * m"))
    assert project.train() == ([4.0, 4.0], saved - 1, 1)  # all but the rule's own loop is shared

    project.write("users_rule.py", MODULE)
    project.write("scaling.py", SCALING.replace("x + x", "x - x"))
    assert project.train() == ([1.0, 1.0], saved - 1, 1)

    project.write("scaling.py", SCALING)
    assert project.train() == ([-2.0, -2.0], saved, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="where other systems keep caches")
def test_kernels_are_kept_in_the_users_cache_directory(project):
    home = {"HOME": str(project.folder), "XDG_CACHE_HOME": "", "FASTOPT_CACHE_DIR": ""}
    _, loaded, saved = project.train(**home)
    assert loaded == 0
    kernels = project.folder / ".cache" / "fastopt" / "kernels"
    assert len(list(kernels.iterdir())) == saved
    assert stat.S_IMODE(kernels.stat().st_mode) == 0o700
    assert project.train(**home) == ([-2.0, -2.0], saved, 0)


def test_nothing_is_kept_where_the_variable_is_0(project):
    project.train(HOME=str(project.folder), XDG_CACHE_HOME=str(project.folder), FASTOPT_CACHE_DIR="0")
    assert not list(project.folder.rglob("*.kernel"))
    assert not list(ROOT.rglob("*.kernel"))


def test_processes_that_fill_it_at_once_do_not_disturb_each_other(project):
    with ThreadPoolExecutor(2) as executor:
        for results, _, _ in executor.map(lambda _: project.train(), range(2)):
            assert results == [-2.0, -2.0]
    results, loaded, saved = project.train()
    assert (results, saved) == ([-2.0, -2.0], 0)
    assert len(project.files()) == loaded
    assert all(name.endswith(".kernel") for name in project.files())


def test_a_process_that_is_killed_while_it_writes_leaves_no_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    script = "import os, signal, numpy, fastopt; os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
    finished = run("-c", script + "fastopt.SGD({'w': numpy.ones(3)})", FASTOPT_CACHE_DIR=str(tmp_path))
    assert finished.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    assert updated(REREAD) == 6.0
    assert left.exists()  # it may be another process' that is at work
    os.utime(left, (time.time() - 2 * cache.STALE,) * 2)
    assert updated(REREAD.replace("SCALE = 2.0", "SCALE = 4.0")) == 12.0
    assert not left.exists()


# --- in this process: a rule made again asks the disk again -----------------------------------------------------------

REREAD = """
import fastopt
from fastopt.rules.sgd import Hyper

def prepare(t, lr=0.5):
    return Hyper(lr)

SCALE = 2.0

def helper(x, factor=3.0):
    return x * factor * SCALE

@fastopt.rule(prepare)
def descent(p, g, h):
    return p - h.lr * helper(g)
"""


def updated(source: str) -> float:
    """What the rule of `source`, made anew, takes off a parameter of zeros."""
    namespace: dict[str, Any] = {"__name__": "users_module"}
    exec(source, namespace)
    p = np.zeros(3)
    namespace["descent"].update_(p, np.full(3, 2.0))
    return -p[0]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [("SCALE = 2.0", "SCALE = 4.0", 12.0), ("factor=3.0", "factor=9.0", 18.0), ("- h.lr", "+ h.lr", -6.0)],
    ids=["constant", "default", "body"],
)
def test_the_cache_is_never_stale(monkeypatch, tmp_path, before, after, expected):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "cache"))
    assert updated(REREAD) == 6.0
    assert updated(REREAD) == 6.0
    assert updated(REREAD.replace(before, after)) == expected


def test_a_rule_whose_named_tuple_cannot_be_imported_leaks_no_files(monkeypatch, tmp_path):
    """As one that is defined inside a function, or a notebook: a new class in every process, and here every time."""
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    own = "from typing import NamedTuple\nclass Hyper(NamedTuple):\n    lr: float\n"
    source = REREAD.replace("from fastopt.rules.sgd import Hyper\n", own)
    assert updated(source) == 6.0
    files = sorted(tmp_path.iterdir())
    for _ in range(3):
        assert updated(source) == 6.0
    assert sorted(tmp_path.iterdir()) == files


def damaged(content: bytes, how: str) -> bytes:
    if how == "a bit":
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if how == "a newer format":
        return content.replace(cache.MAGIC, b"fastopt kernel 2\n", 1)
    return {"cut off": content[: len(content) // 2], "garbled": b"pickle" * 9, "empty": b""}[how]


@pytest.mark.parametrize("how", ["cut off", "empty", "garbled", "a bit", "a newer format"])
def test_a_damaged_kernel_is_compiled_again(monkeypatch, tmp_path, how):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert updated(REREAD) == 6.0
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, how))
    assert cache.load(path.name) is None
    assert updated(REREAD) == 6.0
    assert cache.load(path.name) is not None
    mended = path.stat().st_mtime_ns
    assert updated(REREAD) == 6.0
    assert path.stat().st_mtime_ns == mended  # it was loaded


def test_a_whole_file_that_numba_cannot_read_is_compiled_again(monkeypatch, tmp_path):
    """As one that names a module which was moved."""
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert updated(REREAD) == 6.0
    (path,) = tmp_path.iterdir()
    body = b"cno_such_module\nname\n."
    path.write_bytes(cache.MAGIC + cache.hashlib.sha256(body).digest() + body)
    assert cache.load(path.name) is None
    assert updated(REREAD) == 6.0
    assert cache.load(path.name) is not None


def other_name(monkeypatch: pytest.MonkeyPatch, change: Any) -> str:
    """The name of a kernel's file after a change of what `cache` asks."""
    with monkeypatch.context() as patch:
        change(patch)
        cache._machine.cache_clear()
        found = cache.name_of("adam_float32_0123", (types.int64,), {"nogil": True, "fastmath": False})
    cache._machine.cache_clear()
    return found


CHANGES: dict[str, Any] = {
    "numba": lambda patch: patch.setattr(numba, "__version__", "99.1"),
    "llvmlite": lambda patch: patch.setattr(cache.llvmlite, "__version__", "99.1"),
    "processor": lambda patch: patch.setattr(
        type(cache.registry.cpu_target.target_context.codegen()), "magic_tuple", lambda self: ("another", "one")
    ),
    "setting": lambda patch: patch.setattr(numba.config, "OPT", "0"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_about_machine_code_is_in_the_name(monkeypatch, what):
    same = other_name(monkeypatch, lambda patch: None)
    assert other_name(monkeypatch, CHANGES[what]) != same
    assert other_name(monkeypatch, lambda patch: None) == same


def test_signature_options_and_label_are_in_the_name():
    names = {
        cache.name_of(label, signature, options)
        for label in ("adam_0123", "adam_0124", "lion_0123")
        for signature in ((types.int64,), (types.int32,))
        for options in ({"fastmath": False}, {"fastmath": {"reassoc"}}, {"fastmath": {"reassoc", "contract"}})
    }
    assert len(names) == 18
    one, other = ({"fastmath": set(flags)} for flags in ((0, 8), (8, 0)))  # equal sets, in the order of their making
    assert repr(one) != repr(other)
    assert cache.name_of("a_0", (), one) == cache.name_of("a_0", (), other)
    assert re.fullmatch(r"[A-Za-z0-9_]{1,100}-[0-9a-f]{32}\.kernel", cache.name_of("<lambda>/ä" * 99 + "_0", (), {}))


def test_a_kernel_that_is_loaded_is_not_checked_and_not_typed_again(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert updated(REREAD) == 6.0
    monkeypatch.setattr(elements, "returned_dtypes", None)
    monkeypatch.setattr(bind.numba, "njit", lambda **options: pytest.fail("compiled"))
    assert updated(REREAD) == 6.0


# --- its size ---------------------------------------------------------------------------------------------------------


def test_the_bound_is_kept_and_the_oldest_go_first(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    for k in range(10):
        path = tmp_path / f"old{k}.kernel"
        path.write_bytes(bytes(100_000))
        os.utime(path, (1e9 + k,) * 2)
    (tmp_path / "notes.txt").write_bytes(bytes(10**6))  # not ours
    monkeypatch.setattr(cache, "MOST_BYTES", 500_000)
    assert updated(REREAD) == 6.0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[0].startswith("descent_float64")
    assert left[1:] == ["notes.txt", "old6.kernel", "old7.kernel", "old8.kernel", "old9.kernel"]
    assert sum(file.bytes for file in cache.kept(tmp_path)) <= 500_000


def test_a_kernel_that_is_used_counts_as_new(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert updated(REREAD) == 6.0
    (path,) = tmp_path.iterdir()
    long_ago = time.time() - 2 * cache.FRESH
    os.utime(path, (long_ago,) * 2)
    assert updated(REREAD) == 6.0
    assert path.stat().st_mtime > long_ago + cache.FRESH
    assert [file.path for file in cache.kept(tmp_path)] == [path]


def test_start_does_not_depend_on_how_many_kernels_there_are(monkeypatch, tmp_path):
    """A kernel is opened by its name: nothing looks through the directory until one is saved."""
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert updated(REREAD) == 6.0
    monkeypatch.setattr(os, "scandir", None)
    monkeypatch.setattr(os, "listdir", None)
    assert updated(REREAD) == 6.0


# --- disks that cannot be written, and directories that must not be ---------------------------------------------------

ERRORS = [OSError(28, "No space left on device"), OSError(30, "Read-only file system"), PermissionError(13, "denied")]
GO_ON = (
    r"^FASTOPT_CACHE_DIR: must be a directory that can be read and written, got .*: {}.*; kernels are compiled without"
)


def unwritable(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """Let every write to the cache fail."""

    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(Path, "write_bytes", fail)


@pytest.mark.parametrize("error", ERRORS)
def test_a_cache_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path, error):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    unwritable(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=GO_ON.format(re.escape(str(error)))) as caught:
        found = [updated(source) for source in (REREAD, REREAD.replace("SCALE = 2.0", "SCALE = 4.0"))]
    assert found == [6.0, 12.0]
    assert len(caught) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ERRORS)
def test_kernels_in_a_cache_that_cannot_be_written_are_used(monkeypatch, tmp_path, error):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert updated(REREAD) == 6.0
    unwritable(monkeypatch, error)
    monkeypatch.setattr(bind.numba, "njit", lambda **options: pytest.fail("compiled"))
    assert updated(REREAD) == 6.0


@pytest.mark.parametrize("error", ERRORS)
def test_a_damaged_cache_that_cannot_be_mended_is_one_warning(monkeypatch, tmp_path, error):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert updated(REREAD) == 6.0
    for path in tmp_path.iterdir():
        path.write_bytes(b"pickle")
    unwritable(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=GO_ON.format("")) as caught:
        assert updated(REREAD) == 6.0
    assert len(caught) == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", ["file", "file/cache", "/proc/fastopt", "loop/cache", "~nobody-of-this-name/cache"])
def test_a_cache_directory_that_cannot_be_made_is_one_warning(monkeypatch, tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("FASTOPT_CACHE_DIR", name if name[0] in "/~" else str(tmp_path / name))
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(RuntimeWarning, match=GO_ON.format("")) as caught:
        found = [updated(source) for source in (REREAD, REREAD)]
    assert found == [6.0, 6.0]
    assert len(caught) == 1
    assert sorted(tmp_path.rglob("*")) == before


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import numpy as np, fastopt
for kind in (fastopt.Adam, fastopt.Lion):
    opt = kind({"w": np.ones(3)}, lr=0.5)
    opt.step({"w": np.ones(3)})
    assert (opt.params["w"].round(6) == 0.5).all()
"""


@pytest.mark.skipif(os.name == "nt", reason="of POSIX systems")
def test_the_system_refuses_the_bytes_of_kernels(tmp_path):
    """As a full disk does; in a new process, whose kernels of every kind are compiled."""
    finished = run("-c", LIMITED, timeout=240.0, FASTOPT_CACHE_DIR=str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("RuntimeWarning") == 1
    assert "[Errno 27] File too large" in finished.stderr
    assert not list(tmp_path.glob("*.tmp.*"))


def test_the_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", "0")
    assert cache.directory() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (None, ""):
        monkeypatch.delenv("FASTOPT_CACHE_DIR") if name is None else monkeypatch.setenv("FASTOPT_CACHE_DIR", name)
        if sys.platform == "linux":
            assert cache.directory() == tmp_path / "fastopt" / "kernels"
    wanted = tmp_path / "deep" / "cache"
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(wanted))
    assert cache.directory() == wanted
    assert stat.S_IMODE(wanted.stat().st_mode) == 0o700
    wanted.chmod(0o755)  # others may read
    assert cache.directory() == wanted


def test_a_user_without_a_home_is_one_warning(monkeypatch, tmp_path):
    import platformdirs

    monkeypatch.delenv("FASTOPT_CACHE_DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "_reported", set())
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *names, **options: "~/.cache/fastopt")
    with pytest.warns(RuntimeWarning, match="the home directory of this user is not known") as caught:
        assert [updated(REREAD), updated(REREAD)] == [6.0, 6.0]
    assert len(caught) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="where other systems keep caches")
def test_an_unsafe_directory_that_nobody_named_is_one_warning(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTOPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_reported", set())
    folder = tmp_path / "fastopt" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=r"the user's cache directory: .*chmod 700") as caught:
        assert [updated(REREAD), updated(REREAD)] == [6.0, 6.0]
    assert len(caught) == 1
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no owners and modes of files")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_cache_directory_that_others_may_write_to_is_refused(monkeypatch, tmp_path, mode):
    tmp_path.chmod(mode)
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    with pytest.raises(
        PermissionError, match=r"^FASTOPT_CACHE_DIR: must be .* nobody else can write to,.* got .*chmod 700"
    ):
        cache.directory()

    @fastopt.rule(lambda t, lr=0.1: fastopt.rules.sgd.prepare(t, lr))
    def descent(p, g, h):
        return p - h.lr * g

    p = np.ones(3)
    with pytest.raises(PermissionError, match=r"^FASTOPT_CACHE_DIR: must be a directory"):
        descent.update_(p, np.ones(3))
    assert (p == 1.0).all()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("FASTOPT_CACHE_DIR")
    descent.update_(p, np.ones(3))
    assert (p == 1.0 - 0.1).all()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a directory away")
def test_a_cache_directory_of_somebody_else_is_refused(monkeypatch, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 12345, 12345)
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(theirs))
    with pytest.raises(PermissionError, match="must be a directory that belongs to you or to root"):
        cache.directory()


def test_a_rule_that_was_refused_is_refused_again_when_its_kernel_is_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "cache"))

    @fastopt.rule(lambda t, lr=0.1: fastopt.rules.sgd.prepare(t, lr))
    def literal(p, g, h):
        return p - 0.5 * h.lr * g

    for _ in range(3):
        with pytest.raises(TypeError, match=r"^rule 'literal' on float32: must return float32, got p as float64"):
            literal.update_(np.ones(3, np.float32), np.ones(3, np.float32))


def test_clear_removes_kernels_and_what_killed_processes_left(tmp_path):
    names = ("adam-0.kernel", "sgd-0.kernel", f".{'0a' * 8}.tmp", f".{'1b' * 8}.tmp", ".draft.tmp", "notes.txt")
    for name in names:
        (tmp_path / name).write_bytes(bytes(10))
        if name != names[3]:  # of a process that is writing it
            os.utime(tmp_path / name, (1e9, 1e9))
    (tmp_path / "folder.kernel").mkdir()
    removed = cache.clear(tmp_path)
    assert sorted(file.path.name for file in removed) == list(names[:2])
    assert {path.name for path in tmp_path.iterdir()} == {*names[3:], "folder.kernel"}
    assert cache.clear(tmp_path) == []


# --- what people are told ---------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch):
    """A standard error that is a terminal; and a process that has not compiled anything yet."""
    written: list[str] = []
    stream = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None)
    monkeypatch.setattr(bind, "sys", SimpleNamespace(stderr=stream, version=sys.version))  # pytest has replaced sys'
    monkeypatch.setattr(bind, "WAIT", bind.Wait())
    return written


@pytest.mark.parametrize(("kept", "later"), [(True, "the next process loads them"), (False, "without a cache")])
def test_people_are_told_once_what_they_wait_for(terminal, kept, later):
    for k, seconds in enumerate((1.5, 0.7, 5.0)):
        bind.WAIT.add(f"adam_float32_{k}", seconds, kept)
    told = "".join(terminal)
    assert told.count("\n") == 1
    assert "compiling kernels, 2 s so far (adam_float32); " in told
    assert later in told


def test_nobody_is_told_what_takes_no_time_or_where_there_is_no_terminal(terminal, monkeypatch):
    bind.WAIT.add("adam_0", 1.9, True)
    bind.WAIT.quiet = True  # a progress bar shows it
    bind.WAIT.add("adam_0", 5.0, True)
    bind.WAIT.quiet = False
    monkeypatch.setattr(bind.sys.stderr, "isatty", lambda: False)
    bind.WAIT.add("adam_0", 5.0, True)
    monkeypatch.setattr(bind.sys, "stderr", None)  # as with pythonw
    bind.WAIT.add("adam_0", 5.0, True)
    assert terminal == []


def test_a_compilation_counts(terminal, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(bind, "PATIENCE", 0.0)
    assert updated(REREAD) == 6.0
    assert "(descent_float64); the next process loads them" in "".join(terminal)
    before = bind.WAIT.seconds
    assert (bind.WAIT.compiled, bind.WAIT.kept, bind.WAIT.loaded) == (1, 1, 0)
    assert updated(REREAD) == 6.0  # loaded
    assert bind.WAIT.seconds == before
    assert (bind.WAIT.compiled, bind.WAIT.kept, bind.WAIT.loaded) == (1, 1, 1)
