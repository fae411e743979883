"""The programs in examples/ run in seconds and reach what their docstrings say; the notebook prints what it shows."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from ast import Expr, Module, parse, unparse
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from scripts import ROOT, compiled, run

EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def printed_by(name: str, timeout: float = 120.0) -> str:
    """Run a program as a user does; return what it has printed."""
    finished = run(EXAMPLES / name, timeout=timeout, **compiled())
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr
    return finished.stdout


def numbers_after(label: str, text: str) -> list[float]:
    """Return the number that follows each `label` in a text."""
    return [float(number) for number in re.findall(rf"{label} ([\d.e+-]+)", text)]


def test_the_mlp_learns_the_digits():
    text = printed_by("numpy_mlp.py")
    accuracies = numbers_after("test accuracy", text)
    assert len(accuracies) == 5
    assert accuracies[-1] > 0.95
    losses = numbers_after("training loss", text)
    assert losses[-1] < 0.15 < losses[0]


def test_the_convnet_learns_the_digits():
    text = printed_by("numpy_convnet_batchnorm.py")
    accuracies = numbers_after("test accuracy", text)
    assert len(accuracies) == 6
    assert accuracies[-1] > 0.94
    assert numbers_after("training loss", text)[-1] < 0.2


def test_the_convnet_has_the_gradients_of_finite_differences():
    """A network that learns may still have a gradient that is a little wrong."""
    import numpy as np

    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile((EXAMPLES / "numpy_convnet_batchnorm.py").read_text(), "convnet", "exec"), namespace)
    network = namespace["Network"](np.random.default_rng(0))
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(16, 8, 8, 1)).astype(np.float32), rng.integers(0, 10, 16)

    def loss() -> float:
        return namespace["cross_entropy"](network.forward(x, training=True).astype(np.float64), labels)[0]

    network.backward(namespace["cross_entropy"](network.forward(x, training=True), labels)[1])
    for path in (("kernels", 0), ("kernels", 1), ("norms", 0), ("W",)):
        parameter, gradient = network.opt.params, network.opt.grads
        for key in path:
            parameter, gradient = parameter[key], gradient[key]
        if path[0] == "norms":
            parameter, gradient = parameter["gamma"], gradient["gamma"]
        direction = (gradient / np.linalg.norm(gradient)).astype(np.float32)
        before = parameter.copy()
        parameter[...] = before + 1e-2 * direction
        above = loss()
        parameter[...] = before - 1e-2 * direction
        slope = (above - loss()) / 2e-2
        parameter[...] = before
        assert slope == pytest.approx(np.linalg.norm(gradient), rel=0.05), path


def test_word_vectors_find_their_topics():
    shares = numbers_after("same topic", printed_by("word2vec_rows.py"))
    assert len(shares) == 4
    assert shares[0] < 0.2
    assert shares[-1] > 0.8


def test_the_rule_has_numpys_bits_and_damps_momentum():
    text = printed_by("own_rule.py")
    assert "the bits of NumPy: True\n" in text
    assert "resumed as if it had not stopped: True\n" in text
    plain, slow, aggregated = numbers_after("after 300 steps", text)
    assert aggregated < 0.5 * plain
    assert aggregated < 0.1 * slow


def test_actor_and_critic_balance_the_pole_in_torch():
    pytest.importorskip("torch", reason="torch is not installed; the example is for its users")
    lengths = numbers_after("last 50 episodes", printed_by("torch_actor_critic.py"))
    assert len(lengths) == 5
    assert max(lengths) > 100


def test_the_torch_example_says_what_it_needs():
    hidden = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"runpy.run_path({str(EXAMPLES / 'torch_actor_critic.py')!r}, run_name='__main__')"
    )
    finished = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    assert finished.stderr == "torch_actor_critic.py needs torch: pip install 'fastopt[torch]'\n"


def test_every_program_is_run_and_short():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert len(PROGRAMS) == 5
    for name in PROGRAMS:
        assert f'printed_by("{name}"' in tested
        lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
        assert 40 <= len(lines) <= 120
        assert f"    python examples/{name}" in lines


# --- the notebook -----------------------------------------------------------------------------------------------------


def executed(source: str, namespace: dict[str, Any]) -> str:
    """Run a cell as a notebook does: return what it prints, and the value of an expression at its end."""
    statements = parse(source).body
    last = statements.pop() if statements and isinstance(statements[-1], Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(Module(statements, []), "cell", "exec", dont_inherit=True), namespace)
        value = None if last is None else eval(unparse(last), namespace)
    return out.getvalue() + ("" if value is None else repr(value))


def shown(outputs: list[dict[str, Any]]) -> str:
    """Return the text that a notebook holds below a cell."""
    texts = [output["text"] for output in outputs if output["output_type"] == "stream"]
    texts += [output["data"]["text/plain"] for output in outputs if output["output_type"] == "execute_result"]
    return "".join("".join(text) for text in texts)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_the_notebook_prints_what_it_shows():
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    number = r"-?\d+\.?\d*(?:e[+-]\d+)?"
    namespace: dict[str, Any] = {"__name__": "notebook"}
    compared = 0
    with matplotlib.rc_context({"backend": "agg"}):
        for cell in code:
            assert not any(output["output_type"] == "error" for output in cell["outputs"])
            found, kept = executed("".join(cell["source"]), namespace), shown(cell["outputs"])
            # Products of matrices are BLAS's, whose last digits differ between machines.
            assert re.sub(number, "#", found) == re.sub(number, "#", kept)
            expected = [float(text) for text in re.findall(number, kept)]
            assert [float(text) for text in re.findall(number, found)] == pytest.approx(expected, rel=0.05)
            compared += len(expected)
    assert compared > 20
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
