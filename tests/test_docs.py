"""What the pages say is true: their code runs, their commands exist, their pictures are theirs, nothing is left out.

The code blocks of a page run in their order, in one namespace, as a reader would type them. Those of the README, which
are copied one by one, run each on its own; and so does a block that imports what not every machine has (torch, cupy),
where that is there. A line with ``print`` tells what is printed, in a comment at its end.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import fastopt
from fastopt.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = {"cupy", "jax", "keras", "optax", "torch"}


def load(path: Path) -> Any:
    """A Python file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load(ROOT / "docs" / "hooks.py")


# --- code -------------------------------------------------------------------------------------------------------------


def needs(code: str) -> set[str]:
    """The packages that a block imports and that not every machine has."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names} & OPTIONAL


def units(page: Path) -> Iterator[tuple[str, list[str], set[str]]]:
    """What runs together: a name for it, its blocks, and what they need."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    where = page.relative_to(ROOT).as_posix()
    together = []
    for number, block in enumerate(blocks):
        if page.name == "README.md" or needs(block):
            yield " ".join([where, str(number), *sorted(needs(block))]), [block], needs(block)
        else:
            together.append(block)
    if together:
        yield where, together, set()


UNITS = {name: (blocks, needed) for page in PAGES for name, blocks, needed in units(page)}


@pytest.mark.parametrize("name", UNITS)
def test_code_blocks_run_and_print_what_they_say(name, capsys, tmp_path, monkeypatch, request):
    blocks, needed = UNITS[name]
    for package in needed:
        pytest.importorskip(package)
    if "cupy" in needed and not request.config.getoption("--gpu"):
        pytest.skip("needs a GPU, which --gpu chooses")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastopt.Optimizer, "classes", dict(fastopt.Optimizer.classes))  # a page may add one
    namespace: dict[str, Any] = {"__name__": "page"}
    promised = []
    for block in blocks:
        exec(compile(block, name, "exec", dont_inherit=True), namespace)
        said = [line for line in block.splitlines() if line.lstrip().startswith("print(")]
        assert all("  # " in line for line in said), said
        promised += [line.split("  # ")[1].strip() for line in said]
    assert capsys.readouterr().out.split("\n")[:-1] == promised


SESSIONS = {
    page.relative_to(ROOT).as_posix(): "\n".join(found)
    for page in PAGES
    if (found := re.findall(r"^```pycon\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE))
}


@pytest.mark.parametrize("name", SESSIONS)
def test_sessions_print_what_they_show(name, tmp_path, monkeypatch):
    """Of each page, its sessions in their order, as one doctest; ``...`` stands for any text."""
    monkeypatch.chdir(tmp_path)
    session = doctest.DocTestParser().get_doctest(SESSIONS[name], {"__name__": "page"}, name, name, 0)
    assert len(session.examples) > 10
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(session, out=failures.append)
    assert not failures, "".join(failures)


def test_there_is_code_to_run():
    assert sum(name.startswith("README.md") for name in UNITS) == 3
    pages = {f"docs/{name}.md" for name in ("index", "embedding", "rules", "numerics", "batchnorm", "checkpoints")}
    assert pages <= set(UNITS)
    assert {"torch"} in [needed for _, needed in UNITS.values()]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """The shell commands of a page: after a prompt, in an indented block, or, those of fastopt, as code in a line."""
    text = page.read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith(("$ ", "    python3 -m venv")):
            yield from (part.strip() for part in line.removeprefix("$ ").split("&&"))
    yield from (command for command in re.findall(r"`(fastopt [^`\n]+)`", text))


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_exist(page, command):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "fastopt":
        parse(arguments)
    elif program in ("pip", "python3") and "-m" not in arguments:
        assert arguments[0] == "install"
        known = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        for extra in re.findall(r"(?:\.|fastopt)\[([\w,]+)\]", command):
            assert set(extra.split(",")) <= set(re.findall(r"^(\w+) = ", known, flags=re.MULTILINE))
    else:
        assert program in (
            *("python3", "python", "pytest", "ruff", "mypy", "mkdocs", "source", "export", ".ci/run"),
            *("compute-sanitizer", "bench/on_gpu.sh"),
        )
        for word in arguments:
            if "/" in word and not word.startswith(("$", ".venv")) and "=" not in word:
                assert (ROOT / word).exists()
        assert "/" not in program or os.access(ROOT / program, os.X_OK)


def parse(arguments: list[str]) -> None:
    """Read the options of a command of fastopt, as it would, without running it."""
    group = typer.main.get_command(app)
    if arguments and arguments[0] not in group.commands and not arguments[0].startswith("-"):
        raise AssertionError(f"fastopt has no command {arguments[0]!r}; it has {', '.join(group.commands)}")
    if "--help" not in arguments:
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def test_a_command_that_does_not_exist_is_found():
    with pytest.raises(AssertionError, match="no command 'trian'"):
        parse(["trian"])
    with pytest.raises(Exception, match="No such option"):  # click's, which typer brings along
        parse(["train", "--polt", "curves.png"])


# --- pages ------------------------------------------------------------------------------------------------------------


def test_every_public_name_has_its_place_in_the_api():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    told = re.findall(r"^::: ([\w.]+)", f"{pages}\n{hooks.optimizers()}", flags=re.MULTILINE)
    for name in fastopt.__all__:
        thing = getattr(fastopt, name)
        module = thing.__name__ if not hasattr(thing, "__module__") else thing.__module__
        if name in ("rules", "interop"):  # their parts are told one by one
            continue
        own = module if module == thing.__name__ else f"{module}.{name}"
        assert own in told or module in told, f"docs/api tells nothing of fastopt.{name}: add `::: {own}`"
    for name in fastopt.interop.__all__:
        assert f"{getattr(fastopt.interop, name).__module__}.{name}" in told


def test_a_page_of_several_things_begins_with_a_table_of_them():
    page = "# Arrays\n\nTwo.\n\n::: fastopt.storage.flat.pack\n\n::: fastopt.storage.flat.FlatParams\n"
    before, head, rule, *lines = [line for line in hooks.with_summary(page).splitlines() if line][1:]
    assert (before, head, rule) == ("Two.", "| name | what it is |", "|---|---|")
    assert lines[0].startswith("| [`pack`][fastopt.storage.flat.pack] | ")
    assert lines[1].startswith("| [`FlatParams`][fastopt.storage.flat.FlatParams] | ")
    for line, thing in zip(lines[:2], (fastopt.pack, fastopt.FlatParams), strict=True):
        assert " ".join(inspect.getdoc(thing).partition("\n\n")[0].split()) in line
    assert lines[2:] == ["::: fastopt.storage.flat.pack", "::: fastopt.storage.flat.FlatParams"]
    for alone in ("# One\n\n::: fastopt.schedules\n", "::: fastopt.storage.flat.pack\n"):
        assert hooks.with_summary(alone) == alone


def test_the_readme_and_the_site_lead_to_each_other():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+\.md)", text):
            there = page.parent / target
            assert there.is_file() or there.name == "contributing.md", f"{page.name}: {target}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/index.md)" in readme
    assert "](CONTRIBUTING.md)" in readme


def test_the_house_names_what_is_there():
    text = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    plan = re.search(r"```text\nfastopt/\n(.*?)\ntests/", text, flags=re.DOTALL).group(1)
    named = {name for line in plan.splitlines() for name in re.findall(r"[\w]+(?:\.py|/)", line[:19])}
    there = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "fastopt").iterdir()}
    assert named == there - {"__pycache__/", "__main__.py", "py.typed"}
    command = re.search(r"```text\nfastopt/cli/\n(.*?)```", text, flags=re.DOTALL).group(1)
    files = {path.name for path in (ROOT / "fastopt" / "cli").rglob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", command)) == files


def test_every_promise_names_a_test_that_is_there():
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    promises = re.findall(r"^\| (.+) \| `(tests/\w+\.py)::(\w+)` \|$", text, flags=re.MULTILINE)
    assert len(promises) == text.count("| `tests/") > 40
    for promise, file, name in promises:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(def {name}\(|{name} = )", source, flags=re.MULTILINE), promise


def test_the_walk_through_a_step_leads_to_functions_that_are_there():
    text = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    walk = re.search(r"## A step, in five words\n(.*?)\n## ", text, flags=re.DOTALL).group(1)
    stations = re.findall(r"^\d\. \*\*(\w+)\*\*: \[`([\w.]+)`\]\(api/(\w+)\.md#([\w.]+)\)", walk, flags=re.MULTILINE)
    assert [word for word, *_ in stations] == ["Plan", "Check", "Decide", "Launch", "Commit"]
    for _, name, page, anchor in stations:
        module, owner, function = anchor.rsplit(".", 2)
        assert name == f"{owner}.{function}"
        assert callable(getattr(getattr(importlib.import_module(module), owner), function))
        shown = (ROOT / "docs" / "api" / f"{page}.md").read_text(encoding="utf-8")
        assert f"::: {module}" in shown


# --- pictures ---------------------------------------------------------------------------------------------------------

TABLE = """
| what | command | picture |
|---|---|---|
| Two | `fastopt train --epochs 1 --plot a.png` |
| No picture | `fastopt info` |

`fastopt train --plot not-in-a-table.png`
"""

BLOCK = """
```console
$ fastopt contour --plot a.png --animate a.gif
```

And then:
"""


def test_every_command_of_the_pictures_page_has_a_picture_beside_it():
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    found = hooks.commands_in(text)
    rows = [line for line in hooks.with_pictures(text).splitlines() if line.startswith("| ") and "`fastopt" in line]
    assert len(rows) == len(found) >= 10
    for row, command in zip(rows, found, strict=True):
        assert re.findall(r"!\[[^]]*\]\(images/([^)]+)\)", row) == hooks.pictures_of(command)


def test_a_command_behind_a_prompt_has_its_pictures_below_the_block():
    (command,) = hooks.commands_in(BLOCK)
    assert command == "fastopt contour --plot a.png --animate a.gif"
    shown = hooks.with_pictures(BLOCK)
    below = "```\n\n[![a.png](images/a.png)](images/a.png)\n[![a.gif](images/a.gif)](images/a.gif)\n\nAnd then:\n"
    assert shown == BLOCK.replace("```\n\nAnd then:\n", below)
    assert hooks.commands_in(BLOCK + BLOCK) == [command]


def test_no_two_commands_of_the_site_draw_one_picture():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    commands = {command for page in pages for command in hooks.commands_in(page)}
    names = [name for command in commands for name in hooks.pictures_of(command)]
    assert len(names) == len(set(names)) >= 20


def test_a_picture_is_made_by_its_command_once(tmp_path, monkeypatch):
    (command,) = hooks.commands_in(TABLE)
    assert hooks.make([command], tmp_path) == [command]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert hooks.make([command], tmp_path) == []
    monkeypatch.setattr(hooks, "sources", lambda: "another package")
    assert not hooks.is_made(command, tmp_path)
    shown = hooks.with_pictures(TABLE)
    assert "| `fastopt train --epochs 1 --plot a.png` | [![a.png](images/a.png)](images/a.png) |" in shown
    assert shown.count("![") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fastopt train --optimizer adma --plot a.png", "adma"),
        ("fastopt info --plot a.png", "No such option"),
    ],
)
def test_a_picture_that_fails_says_why(command, said, tmp_path):
    with pytest.raises(RuntimeError, match=said) as caught:
        hooks.make([command], tmp_path)
    assert command in str(caught.value)
    assert not list(tmp_path.glob("*.made"))


def test_two_commands_do_not_draw_one_picture(tmp_path):
    with pytest.raises(RuntimeError, match=r"two commands draw a\.png"):
        hooks.make(["fastopt train --plot a.png", "fastopt contour --plot a.png"], tmp_path)


def test_a_site_can_be_built_without_pictures(monkeypatch):
    monkeypatch.setenv("FASTOPT_DOCS_PICTURES", "0")
    assert hooks.commands_of([TABLE, BLOCK]) == []
    assert hooks.on_page_markdown(TABLE, page=None) == TABLE
    for value in ("1", ""):
        monkeypatch.setenv("FASTOPT_DOCS_PICTURES", value)
        assert hooks.commands_of([TABLE, BLOCK, TABLE]) == [*hooks.commands_in(TABLE), *hooks.commands_in(BLOCK)]
        assert hooks.on_page_markdown(TABLE, page=None) == hooks.with_pictures(TABLE)
    monkeypatch.setenv("FASTOPT_DOCS_PICTURES", "no")
    with pytest.raises(RuntimeError, match="FASTOPT_DOCS_PICTURES: must be 0 or 1, got 'no'"):
        hooks.commands_of([TABLE])


def test_two_commands_run_at_a_time(tmp_path, monkeypatch):
    running, most = [], []

    def stand_in(command, folder):
        running.append(command)
        most.append(len(running))
        time.sleep(0.1)
        running.remove(command)

    monkeypatch.setattr(hooks, "run", stand_in)
    hooks.make([f"fastopt train --plot {name}.png" for name in "abcd"], tmp_path)
    assert max(most) == 2
