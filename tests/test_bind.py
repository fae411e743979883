"""bind: a loop and a rule become one function, named by a digest of all that went into it; and the cache on disk."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from numba.core import caching
from scripts import ROOT, run

import fastopt
from fastopt.kernels.bind import bind, cache_directory
from fastopt.kernels.elements import scalar

# --- the digest -------------------------------------------------------------------------------------------------------

SOURCE = """
import math
import numba
import numpy as np
from types import SimpleNamespace

SCALE = 2.0
TABLE = np.array([1.0, 2.0])
PAIR = (1.0, 2.0)
KIND = numba.float32
xp = math
unused = 1.0

def inner(x):
    return x * 3.0

def helper(x, factor=4.0):
    return factor * inner(x)

@numba.njit
def compiled_inner(x):
    return x + SCALE_OF_COMPILED

SCALE_OF_COMPILED = 5.0

@numba.njit(fastmath=False)
def compiled(x):
    return compiled_inner(x) * 6.0

def make(number, function):
    def closed(x):
        return function(x) * number
    return closed

closed = make(7.0, inner)

def rule(p, g, h):
    p = p * 8.0 + 0.0
    return helper(p) + SCALE * xp.sqrt(g) + compiled(g) + closed(g) + TABLE[0] + PAIR[0] + KIND(g)
"""

EDITS = [
    ("a literal of the rule", "8.0", "8.5"),
    ("the sign of a zero", "+ 0.0", "+ -0.0"),
    ("the type of a literal", "8.0 + ", "8 + "),
    ("an operator", "helper(p) + SCALE", "helper(p) - SCALE"),
    ("a name", "xp.sqrt", "xp.exp"),
    ("the order of the arguments", "rule(p, g, h)", "rule(g, p, h)"),
    ("a constant of the module", "SCALE = 2.0", "SCALE = 2.5"),
    ("a global array", "np.array([1.0, 2.0])", "np.array([1.0, 2.5])"),
    ("the dtype of a global array", "np.array([1.0, 2.0])", "np.array([1.0, 2.0], np.float32)"),
    ("a global tuple", "PAIR = (1.0, 2.0)", "PAIR = (1.0, 2.5)"),
    ("a helper", "return factor * inner", "return -factor * inner"),
    ("a helper of a helper", "x * 3.0", "x * 3.5"),
    ("a default of a helper", "factor=4.0", "factor=4.5"),
    ("a closed-over number", "make(7.0", "make(7.5"),
    ("a closed-over function", "make(7.0, inner)", "make(7.0, lambda x: x)"),
    ("the body of a closure", "function(x) * number", "function(x) / number"),
    ("the module behind a name", "xp = math", "xp = np"),
    ("a compiled function", "compiled_inner(x) * 6.0", "compiled_inner(x) * 6.5"),
    ("what a compiled function calls", "x + SCALE_OF", "x - SCALE_OF"),
    ("a constant of a compiled function", "SCALE_OF_COMPILED = 5.0", "SCALE_OF_COMPILED = 5.5"),
    ("the options of a compiled function", "fastmath=False", "fastmath=True"),
    ("a numba type", "KIND = numba.float32", "KIND = numba.float64"),
]


def name_of(source: str) -> str:
    namespace: dict[str, Any] = {"__name__": "users_module"}
    exec(source, namespace)
    return bind(namespace["rule"], {}, label="label", scalar=lambda function: function).__name__


@pytest.mark.parametrize(("before", "after"), [pytest.param(*edit[1:], id=edit[0].replace(" ", "_")) for edit in EDITS])
def test_an_edit_of_anything_that_goes_in_changes_the_digest(before, after):
    assert SOURCE.count(before) == 1
    assert name_of(SOURCE.replace(before, after)) != name_of(SOURCE)


def test_a_constant_of_an_imported_module_changes_the_digest():
    def name(scale: float) -> str:
        imported = ModuleType("imported")
        imported.scale = scale

        def rule(p, g, h):
            return p * imported.scale

        return bind(rule, {}, label="label", scalar=lambda function: function).__name__

    assert name(1.0) == name(1.0)
    assert name(1.0) != name(2.0)


def test_the_digest_of_one_source_is_always_the_same():
    assert name_of(SOURCE) == name_of(SOURCE)
    for before, after in (("unused = 1.0", "unused = 2.0"), ("def inner(x):", "def inner(x):  # a comment")):
        assert name_of(SOURCE.replace(before, after)) == name_of(SOURCE)


def test_the_digest_is_the_same_in_another_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_bind\n")
    with script.open("a") as file:
        file.write("print(test_bind.name_of(test_bind.SOURCE))\n")
    finished = run(script, PYTHONHASHSEED="12345")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == [name_of(SOURCE)]


# --- what is bound ----------------------------------------------------------------------------------------------------


def loop(x):
    """A loop as in cpu.py: it mentions globals that nobody has defined."""
    if FLAG:  # noqa: F821
        x = RULE(x)  # noqa: F821
    return x + OFFSET  # noqa: F821


def double(x):
    return x + x


def bound(scalar: Any = lambda function: function, **constants: Any) -> FunctionType:
    return bind(loop, {"FLAG": True, "RULE": double, "OFFSET": 1.0, **constants}, label="loop", scalar=scalar)


def test_a_bound_function_computes_with_its_constants_and_leaves_the_loop_alone():
    assert bound()(3.0) == 7.0
    assert bound(FLAG=False)(3.0) == 4.0
    assert bound(OFFSET=0.0)(3.0) == 6.0
    assert not {"FLAG", "RULE", "OFFSET"} & set(globals())
    with pytest.raises(NameError):
        loop(3.0)


def test_different_flags_constants_rules_and_labels_have_different_names():
    names = [
        bound().__name__,
        bound(FLAG=False).__name__,
        bound(OFFSET=2.0).__name__,
        bound(OFFSET=1).__name__,
        bound(RULE=lambda x: x - x).__name__,
        bind(
            loop, {"FLAG": True, "RULE": double, "OFFSET": 1.0}, label="other", scalar=lambda function: function
        ).__name__,
    ]
    assert len(set(names)) == len(names)
    assert names[0] == bound().__name__
    assert names[0].startswith("loop_")
    assert bound().__qualname__ == names[0]


def test_every_scalar_function_is_compiled_once():
    compiled: list[str] = []

    def scalar(function: FunctionType) -> FunctionType:
        compiled.append(function.__name__.rpartition("_")[0])
        return function

    def base(x):
        return double(x)

    def left(x):
        return base(x) + double(x)

    def both(x):
        return left(x) + base(x)

    assert bound(scalar, RULE=both)(1.0) == 7.0
    assert sorted(compiled) == ["base", "both", "double", "left"]


def test_a_rule_stands_for_its_scalar_function():
    def with_rule(p, g, h):
        return fastopt_sgd(p, g, h)

    fastopt_sgd = fastopt.rules.sgd
    compiled: list[FunctionType] = []

    def scalar(function: FunctionType) -> FunctionType:
        compiled.append(function)
        return function

    bind(with_rule, {}, label="r", scalar=scalar)
    assert [function.__code__ for function in compiled] == [fastopt.rules.sgd.scalar.__code__]


def test_an_attribute_named_like_a_global_is_not_that_global():
    """``h.double`` is a hyperparameter, whatever function the module calls double."""
    compiled: list[FunctionType] = []

    def reads(p, h):
        return p * h.double

    bind(reads, {}, label="reads", scalar=compiled.append)
    assert compiled == []


# --- the cache on disk ------------------------------------------------------------------------------------------------

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
from fastopt.kernels.driver import DRIVER, SERIAL_BELOW
from users_rule import descent

DRIVER.choose("pool")
for size in (5, SERIAL_BELOW):  # on one thread, and on two
    opt = fastopt.Optimizer([np.ones(size), np.ones(size)], descent)
    for _ in range(2):
        opt.step([np.ones(size), np.ones(size)])
    values = np.unique(opt.flat.data[opt.flat.data != 0.0])
    print("p =", *values)
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

    def train(self) -> tuple[list[float], int, int]:
        """Return p after the run, and how many kernels numba reports as loaded and saved."""
        finished = run(
            self.folder / "train.py", FASTOPT_CACHE_DIR=str(self.cache), FASTOPT_NUM_THREADS="2", NUMBA_DEBUG_CACHE="1"
        )
        assert finished.returncode == 0, finished.stderr
        lines = finished.stdout.splitlines()
        results = [float(line.split("=")[1]) for line in lines if line.startswith("p =")]
        loaded, saved = (sum(f"[cache] data {done}" in line for line in lines) for done in ("loaded from", "saved to"))
        return results, loaded, saved

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


def test_without_the_variable_nothing_is_written(tmp_path):
    project = Project(tmp_path)
    package = set((ROOT / "fastopt").rglob("*.nb*"))
    finished = run(tmp_path / "train.py", HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), NUMBA_NUM_THREADS="1")
    assert finished.returncode == 0, finished.stderr
    assert not project.cache.exists()
    assert not list(tmp_path.rglob("*.nb*"))
    assert set((ROOT / "fastopt").rglob("*.nb*")) == package


# A rule whose edit the cache has to see, once for each of what numba's own key leaves out. In this process: a rule made
# again is compiled again, and asks the disk again.

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


@pytest.mark.parametrize("suffix", [".nbc", ".nbi"])  # numba's files of code, and its indexes of them
@pytest.mark.parametrize("damage", ["truncated", "emptied", "garbled", "removed"])
def test_a_damaged_cache_is_mended(monkeypatch, tmp_path, suffix, damage):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert updated(REREAD) == 6.0
    damaged = list(tmp_path.glob(f"*{suffix}"))
    assert damaged
    for path in damaged:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "garbled": b"pickle" * 9}.get(damage, b""))
        if damage == "removed":
            path.unlink()
    assert updated(REREAD) == 6.0
    mended = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert updated(REREAD) == 6.0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == mended  # it was loaded


ERRORS = [OSError(28, "No space left on device"), OSError(30, "Read-only file system"), PermissionError(13, "denied")]
GO_ON = (
    r"^FASTOPT_CACHE_DIR: must be a directory that can be read and written, got .*: {}.*; kernels are compiled without"
)


def unwritable(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """Let every write to the cache fail."""

    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", fail)


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
    monkeypatch.setattr(caching.CompileResultCacheImpl, "reduce", None)  # nothing is compiled, nothing is saved
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


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTOPT_CACHE_DIR", raising=False)
    assert cache_directory() is None
    monkeypatch.setenv("FASTOPT_CACHE_DIR", "")
    assert cache_directory() is None
    wanted = tmp_path / "deep" / "cache"
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(wanted))
    assert cache_directory() == wanted
    assert stat.S_IMODE(wanted.stat().st_mode) == 0o700
    wanted.chmod(0o755)  # others may read
    assert cache_directory() == wanted


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no owners and modes of files")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_cache_directory_that_others_may_write_to_is_refused(monkeypatch, tmp_path, mode):
    tmp_path.chmod(mode)
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    with pytest.raises(
        PermissionError, match=r"^FASTOPT_CACHE_DIR: must be .* nobody else can write to,.* got .*chmod 700"
    ):
        cache_directory()

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
    with pytest.raises(PermissionError, match="must be a directory that belongs to you"):
        cache_directory()


def test_disabled_jit_is_refused_with_the_reason(monkeypatch):
    @fastopt.rule(lambda t, lr=0.1: fastopt.rules.sgd.prepare(t, lr))
    def descent(p, g, h):
        return p - h.lr * g

    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    with pytest.raises(RuntimeError, match=r"^NUMBA_DISABLE_JIT is set"):
        descent.update_(np.ones(3), np.ones(3))


def test_a_rule_that_was_refused_is_refused_again_when_its_kernel_is_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "cache"))

    @fastopt.rule(lambda t, lr=0.1: fastopt.rules.sgd.prepare(t, lr))
    def literal(p, g, h):
        return p - 0.5 * h.lr * g

    for _ in range(3):
        with pytest.raises(TypeError, match=r"^rule 'literal' on float32: must return float32, got p as float64"):
            literal.update_(np.ones(3, np.float32), np.ones(3, np.float32))


# --- the names that bind supplies -------------------------------------------------------------------------------------

LOOPS = sorted((Path(fastopt.__file__).parent / "kernels").rglob("*.py"))


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_upper_case_name_is_declared_in_its_file(path):
    """So that an editor finds its definition: with a type, and a docstring where the name does not say it all."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        declared |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        declared |= {node.name} if isinstance(node, ast.ClassDef | ast.FunctionDef) else set()
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    local = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert {name for name in read if name.isupper()} <= declared | local


def test_a_constant_that_is_not_supplied_is_named():
    def loop(x):
        return x + OFFSET  # noqa: F821

    with pytest.raises(TypeError, match=r"loop reads OFFSET: must be declared in its module"):
        bind(loop, {}, label="loop", scalar=scalar)
    assert bind(loop, {"OFFSET": 1}, label="loop", scalar=scalar)(1) == 2
