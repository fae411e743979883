"""The list of planted faults, and the planting: that each fault still fits the source, and is taken back."""

from __future__ import annotations

import shlex
from pathlib import Path

import mutants
import pytest
from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent


def test_every_fault_fits_the_source():
    """Whoever changes a line that has a fault changes the fault with it."""
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in {fault.file for fault in FAULTS}}
    stale = [(fault.file, fault.old) for fault in FAULTS if sources[fault.file].count(fault.old) != 1]
    assert stale == []
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)
    assert all(fault.old != fault.new for fault in FAULTS)


def test_every_fault_names_tests_that_exist():
    for fault in FAULTS:
        files = [word for word in shlex.split(fault.tests) if word.startswith("tests/")]
        assert files, fault
        assert all((ROOT / file.split("::")[0]).is_file() for file in files), fault


def test_there_are_faults_of_every_room():
    rooms = {Path(fault.file).parts[1] for fault in FAULTS}
    assert {"rules", "step", "kernels", "storage", "batchnorm", "closed_forms", "interop"} <= rooms
    assert any("kernels/cuda" in fault.file for fault in FAULTS)
    assert len(FAULTS) >= 120


TESTED = "from module import double\n\ndef test_double():\n    assert double(3) == 6\n\ndef test_nothing():\n    pass\n"


@pytest.mark.parametrize(
    ("new", "tests", "word"),
    [
        ("x + 2", "test_module.py", "noticed"),
        ("x + x", "test_module.py", "survived"),
        ("x + 2", "test_module.py -k nothing", "survived"),
        ("x + 2", "test_module.py -k absent", "no tests"),
        ("x +", "test_module.py", "broke the run"),
    ],
)
def test_a_fault_is_planted_noticed_and_taken_back(tmp_path, new, tests, word):
    (tmp_path / "module.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_module.py").write_text(TESTED)
    fault = Fault("module.py", "2 * x", new, tests)
    with mutants.planted(fault, tmp_path):
        assert new in (tmp_path / "module.py").read_text()
        assert mutants.run_tests(fault, tmp_path, tmp_path / "kernels").word == word
    assert (tmp_path / "module.py").read_text() == "def double(x):\n    return 2 * x\n"


def test_a_fault_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "module.py").write_text("a = b = 1\n")
    with (
        pytest.raises(ValueError, match="must hold the text once, has it 0 times: 'c'"),
        mutants.planted(Fault("module.py", "c", "d", ""), tmp_path),
    ):
        pass


def test_a_survivor_with_a_reason_is_equivalent():
    fault = Fault("f", "a", "b", "tests", "no order of the two is visible")
    assert mutants.Outcome(fault, 0, "3 passed").word == "equivalent"
    assert mutants.Outcome(fault, 1, "").word == "noticed"


def test_what_was_skipped_has_noticed_nothing():
    fault = Fault("f", "a", "b", "tests", "")
    assert mutants.Outcome(fault, 0, "1 passed, 2 skipped").word == "survived"
    assert mutants.Outcome(fault, 0, "2 skipped, 9 deselected").word == "no tests"


def test_a_crash_and_a_hang_are_noticed(tmp_path, monkeypatch):
    (tmp_path / "test_module.py").write_text("import time\n\ndef test_it():\n    time.sleep(60)\n")
    monkeypatch.setattr(mutants, "LONGEST", 5.0)
    assert mutants.run_tests(Fault("f", "a", "b", "test_module.py"), tmp_path, tmp_path / "kernels").word == "noticed"
    assert mutants.Outcome(Fault("f", "a", "b", "tests"), -11, "").word == "noticed"
