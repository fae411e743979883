"""Plant faults, one at a time, run the tests that ought to notice, and print those that survived.

    python bench/mutants.py                    all of bench/faults.py: an hour on two cores
    python bench/mutants.py --only rprop       those with "rprop" in their file, text or tests
    python bench/mutants.py --list             what there is, and plant nothing

A fault is one small change of the source. Each is planted in a copy of the tree, never in yours. The exit code is 1 if
a fault survived that nobody has explained. A new feature adds its faults to the list.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from faults import FAULTS, Fault
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
FAILED, NO_TESTS = 1, 5
"""Exit codes of pytest: tests failed; none was selected."""
LONGEST = 300.0
"""Seconds after which tests count as hanging."""


class Outcome(NamedTuple):
    """What the tests said of a fault."""

    fault: Fault
    code: int
    output: str

    @property
    def word(self) -> str:
        """One word for the code of pytest, and for a fault that is known to change nothing."""
        if self.code == 0 and " passed" not in self.output:  # all of them were skipped
            return "no tests"
        if self.code == 0:
            return "equivalent" if self.fault.equivalent else "survived"
        noticed = self.code == FAILED or self.code < 0  # a signal ended it: the fault made it crash, or hang
        return "noticed" if noticed else "no tests" if self.code == NO_TESTS else "broke the run"


@contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """The fault in this tree; afterwards the file as it was."""
    path = tree / fault.file
    source = path.read_text(encoding="utf-8")
    if source.count(fault.old) != 1:
        raise ValueError(
            f"{fault.file}: must hold the text once, has it {source.count(fault.old)} times: {fault.old!r}"
        )
    path.write_text(source.replace(fault.old, fault.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(source, encoding="utf-8")


def run_tests(fault: Fault, tree: Path, kernels: Path) -> Outcome:
    """Run the tests that should notice, against what is in `tree`."""
    words = shlex.split(fault.tests)
    settings = dict(word.split("=", 1) for word in words if "=" in word and word.split("=", 1)[0].isupper())
    arguments = [word for word in words if word.split("=", 1)[0] not in settings]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *arguments],
        cwd=tree,
        env={**os.environ, "FASTOPT_CACHE_DIR": str(kernels), "PYTHONDONTWRITEBYTECODE": "1", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=LONGEST)[0]
    except subprocess.TimeoutExpired:  # the fault made it hang
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
    return Outcome(fault, process.returncode, output)


def copy_of_the_tree(folder: Path) -> Path:
    """What git tracks, and new files that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def outcomes(faults: Sequence[Fault], jobs: int) -> Iterator[Outcome]:
    """Plant each fault in one of `jobs` copies of the tree, and say how it went, as they end."""
    with tempfile.TemporaryDirectory(prefix="fastopt-mutants-") as name:
        kernels = Path(name, "kernels")
        kernels.mkdir(mode=0o700)
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            free.put(copy_of_the_tree(Path(name, str(number))))

        def plant(fault: Fault) -> Outcome:
            tree = free.get()
            try:
                with planted(fault, tree):
                    return run_tests(fault, tree, kernels)
            finally:
                free.put(tree)

        with ThreadPoolExecutor(jobs) as executor:
            yield from executor.map(plant, faults)


def main() -> int:
    """Parse the arguments, plant, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults with this text in them")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="copies of the tree at work (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the faults, and plant nothing")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if any(options.only in str(part) for part in fault)]
    console = Console(stderr=True)
    if options.list:
        for fault in chosen:
            print(f"{fault.file}: {fault.tests}\n  - {fault.old.strip()}\n  + {fault.new.strip()}")
        return 0
    counts: dict[str, int] = {}
    survived = False
    for outcome in track(outcomes(chosen, options.jobs), "planting", len(chosen), console=console):
        counts[outcome.word] = counts.get(outcome.word, 0) + 1
        if outcome.word == "noticed":
            continue
        fault = outcome.fault
        print(
            f"{outcome.word}: {fault.file}: {fault.tests}\n  - {fault.old.strip()}\n  + {fault.new.strip()}", flush=True
        )
        if outcome.word == "equivalent":
            print(f"  {fault.equivalent}")
        else:
            survived = True
            print("\n".join(f"  | {line}" for line in outcome.output.splitlines()[-6:]), flush=True)
    print(f"{len(chosen)} faults: " + ", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return int(survived)


if __name__ == "__main__":
    sys.exit(main())
