"""The formulas of the site: what is drawn says what is written."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import formulas
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOT_TYPESET = {"w ~ U[-a, a]", "lambda = d.y / d.d", "f(t) = values[i]", "f(t) = schedules[i](t - b)", "<= t"}
NOT_TYPESET |= {"+ residual", 'activation="relu"'}
"""Code beside formulas, and what the notation does not have."""


def written() -> set[str]:
    """Every formula of a docstring or of the table of optimizers."""
    found = set()
    for file in (ROOT / "fastopt").rglob("*.py"):
        for paragraph in re.findall(r"Formula:(.*?)\n\s*\n", file.read_text(), re.DOTALL):
            found |= {" ".join(each.split()) for each in re.findall(r"``(.+?)``", paragraph, re.DOTALL)}
    for line in (DOCS / "optimizers.md").read_text().splitlines():
        if line.startswith("| `"):
            found |= set(re.findall(r"`([^`]+)`", line.split("|")[2]))
    return found


def test_every_formula_is_drawn_as_markup_that_is_closed():
    texts = written()
    assert len(texts) > 150
    for text in texts - NOT_TYPESET:
        ElementTree.fromstring(formulas.mathml(text))
    for text in NOT_TYPESET:
        with pytest.raises(formulas.NotationError):
            formulas.mathml(text)
    assert texts >= NOT_TYPESET


GREEK = {"ε": "eps", "β": "beta", "γ": "gamma", "ρ": "rho"}


def python_of(node: ElementTree.Element) -> str:
    """What is drawn, as an expression of Python."""
    inside = [python_of(child) for child in node]
    kind, text = node.tag, (node.text or "").strip()
    if kind in ("mi", "mn", "mtext"):
        return GREEK.get(text, text)
    if kind == "mo":
        return {"−": "-", "⋅": "*"}.get(text, text)
    if kind == "mspace":
        return "*"
    if kind == "mfrac":
        return f"(({inside[0]})/({inside[1]}))"
    if kind == "msup":
        return f"(({inside[0]})**({inside[1]}))"
    if kind == "msub":
        return f"{inside[0]}{inside[1]}"
    return f"sqrt({''.join(inside)})" if kind == "msqrt" else "".join(inside)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("lr (m/bc1) / (sqrt(v/bc2) + eps)", "lr * (m / bc1) / (sqrt(v / bc2) + eps)"),
        ("b1 m + (1-b1) g", "b1 * m + (1 - b1) * g"),
        ("lr / (1 + (t-1) d) g / (sqrt(s) + eps)", "lr / (1 + (t - 1) * d) * g / (sqrt(s) + eps)"),
        ("sqrt((r+eps)/(s+eps)) g", "sqrt((r + eps) / (s + eps)) * g"),
        ("b2 v + (1-b2) (g + b2 d)^2", "b2 * v + (1 - b2) * (g + b2 * d) ** 2"),
        ("d^2/d0 lr g", "d**2 / d0 * lr * g"),
        ("1 - 0.96^(t m)/2", "1 - 0.96 ** (t * m) / 2"),
        ("-g + 2 (L + eps)^(-1/4)", "-g + 2 * (L + eps) ** (-1 / 4)"),
        ("min(lr, 1/sqrt(t)) max(v, s) / max(1, r / d) u", "min(lr, 1 / sqrt(t)) * max(v, s) / max(1, r / d) * u"),
        ("gamma (x - m) / sqrt(v + eps) + beta", "gamma * (x - m) / sqrt(v + eps) + beta"),
    ],
)
def test_what_is_drawn_has_the_value_of_what_is_written(text, meaning):
    rng = np.random.default_rng(0)
    names = set(re.findall(r"[A-Za-z]\w*", meaning)) - {"sqrt", "min", "max"}
    values = {name: float(rng.uniform(0.5, 2.0)) for name in names}
    values |= {"sqrt": math.sqrt, "min": min, "max": max}
    (math_element,) = ElementTree.fromstring(formulas.mathml(text))
    assert eval(python_of(math_element), values) == pytest.approx(eval(meaning, values), rel=1e-12)


def test_names_are_drawn_as_they_are_meant():
    assert formulas.named("v_hat") == "<mover><mi>v</mi><mo>^</mo></mover>"
    assert formulas.named("b1") == "<msub><mi>b</mi><mn>1</mn></msub>"
    assert formulas.named("mu_t") == "<msub><mi>μ</mi><mi>t</mi></msub>"
    assert formulas.named("mu_{t+1}") == "<msub><mi>μ</mi><mrow><mi>t</mi><mo>+</mo><mn>1</mn></mrow></msub>"
    assert formulas.named("d'") == "<msup><mi>d</mi><mo>′</mo></msup>"
    assert formulas.named("weight_decay") == "<mtext>weight_decay</mtext>"


def test_formulas_alone_are_typeset():
    """Those after "Formula:" and in the second column of a table of them; other code, and what is no formula, stays."""
    page = "<p>Formula: <code>p -= lr g</code>, <code>U[-a]</code></p><p><code>p -= lr g</code></p>"
    found = formulas.in_html(page)
    assert found.count("<math") == 1
    assert found.endswith("<code>U[-a]</code></p><p><code>p -= lr g</code></p>")
    table = (
        '<div class="formulas"><table><tr><td><code>SGD</code></td> <td><code>p -= lr g</code></td></tr></table></div>'
    )
    found = formulas.in_html(table)
    assert "<code>SGD</code>" in found
    assert "<code>p -= lr g</code>" not in found
