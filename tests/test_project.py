"""Files about the project agree with each other: versions, lower bounds, licence, workflows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastopt

ROOT = Path(__file__).resolve().parent.parent


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "pattern"),
    [("CITATION.cff", r"^version: (.+)$"), ("docs/project.md", r"^  version = \{(.+)\},$")],
)
def test_the_version_is_the_same_everywhere(path, pattern):
    assert re.findall(pattern, text_of(path), flags=re.MULTILINE) == [fastopt.__version__]


def test_the_oldest_versions_tested_are_the_lower_bounds():
    dependencies = re.search(r"^dependencies = \[(.*)\]$", text_of("pyproject.toml"), flags=re.MULTILINE).group(1)
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)"', dependencies))
    assert set(bounds) == {"numba", "numpy", "optree", "platformdirs", "safetensors"}
    workflow = text_of(".github/workflows/tests.yml")
    assert dict(re.findall(r"'(\w+)==([\d.]+)\.\*'", workflow)) == bounds
    assert dict(re.findall(r'"(\w+)==([\d.]+)\.\*"', text_of("noxfile.py"))) == bounds


def test_the_python_versions_are_the_same_everywhere():
    pyproject, workflow = text_of("pyproject.toml"), text_of(".github/workflows/tests.yml")
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject)
    assert f'requires-python = ">={classified[0]}"' in pyproject
    assert f"Python {classified[0]} to {classified[-1]}" in text_of("docs/project.md")
    named = {*re.findall(r'python: "(3\.\d+)"', workflow), *re.findall(r'python-version: "(3\.\d+)"', workflow)}
    assert named == set(classified)


def test_the_licence_is_the_same_everywhere():
    assert 'license = "Apache-2.0"' in text_of("pyproject.toml")
    assert "license: Apache-2.0" in text_of("CITATION.cff")
    assert text_of("README.md").endswith("## License\n\nApache-2.0\n")
    assert "Apache License" in text_of("LICENSE")


def test_workflows_name_files_that_are_there():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for name in re.findall(r"(?:tests|bench|docs)/\w+\.\w+|\.ci/\w+", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)$", text_of("mkdocs.yml"), flags=re.MULTILINE))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert named == there | {"contributing.md"}
