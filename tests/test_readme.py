"""The README is short, its commands are those of CI, its rule is as fast as ours; generated texts are up to date."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import report

import fastopt
from fastopt.kernels.contract import Features
from fastopt.kernels.cpu import backend as cpu

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_generated_tables_are_up_to_date():
    page = report.OPTIMIZERS.read_text(encoding="utf-8")
    assert report.render(page) == page, "run: python bench/report.py"
    source = report.INIT.read_text()
    assert report.render_init(source) == source, "run: python bench/report.py"
    for name in fastopt.Optimizer.classes:
        assert f"| `{name}` |" in page


def test_the_readme_is_short_and_leads_to_what_is_there():
    assert len(README.splitlines()) < 150
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).is_file(), target


def test_the_two_commands_are_the_ones_that_ci_runs():
    assert "python3 -m venv .venv && .venv/bin/pip install '.[cli]' && .venv/bin/fastopt train\n" in README
    test_command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest -n 2\n"
    assert test_command in README
    assert test_command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_a_users_rule_compiles_to_the_same_instructions_as_ours(dtype, compiled_anew):
    namespace: dict = {"__name__": "readme"}
    (block,) = (block for block in BLOCKS if "def averaged" in block)
    exec(compile(block, "README.md", "exec", dont_inherit=True), namespace)
    theirs, ours = namespace["averaged"], fastopt.rules.momentum
    backend = cpu.CPU()
    instructions = []
    for rule, hyper in ((theirs, namespace["Hyper"]), (ours, type(ours.prepare(1, 0.1, 0.9, "ema")))):
        kernel = backend.kernel(rule, hyper, np.dtype(dtype), Features())
        assembly = kernel._loop.compiled.assembly()
        mnemonics = re.findall(r"^\t([a-z]\w*)", assembly, flags=re.MULTILINE)
        instructions.append(Counter(mnemonics))
    assert instructions[0] == instructions[1]
    assert sum(instructions[0].values()) > 50
