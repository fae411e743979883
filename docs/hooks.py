"""What the site is built with besides its pages: pictures made by their commands, tables made from the code, formulas.

A command with ``--plot FILE`` or ``--animate FILE`` is run if it stands in a table of a page, or behind a prompt in a
code block (``$ fastopt ...``). Its pictures are shown beside it, or below the block: a new row is a new picture. A
command may stand on several pages. Two run at a time. Pictures are kept under build/pictures, and are made again when
the command, or anything in the package, has changed. A command that fails ends the build. With FASTOPT_DOCS_PICTURES=0
no command is run, and the pages show no pictures of commands.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from formulas import in_html

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "build" / "pictures"
COMMAND = re.compile(r"`(fastopt [^`]+)`")
PROMPT = re.compile(r"\$ (fastopt .+)")
DRAWN = re.compile(r"--(?:plot|animate)[ =](\S+)")
AT_ONCE = 2
LONGEST = 300
"""Seconds that a command may take."""


def pictures_wanted() -> bool:
    """Whether pictures are drawn and shown: FASTOPT_DOCS_PICTURES, 0 or 1; 1 if it is not set."""
    value = os.environ.get("FASTOPT_DOCS_PICTURES") or "1"
    if value not in ("0", "1"):
        raise RuntimeError(f"FASTOPT_DOCS_PICTURES: must be 0 or 1, got {value!r}")
    return value == "1"


def commands_in(text: str) -> list[str]:
    """The commands of a page that draw something, each once: in its tables, and behind the prompts of its blocks."""
    lines = text.splitlines()
    found = [command for line in lines if line.startswith("|") for command in COMMAND.findall(line)]
    found += [match.group(1) for match in map(PROMPT.fullmatch, lines) if match]
    return [command for command in dict.fromkeys(found) if DRAWN.search(command)]


def commands_of(pages: Sequence[str]) -> list[str]:
    """The commands of all pages whose pictures are wanted, each once."""
    if not pictures_wanted():
        return []
    return list(dict.fromkeys(command for page in pages for command in commands_in(page)))


def pictures_of(command: str) -> list[str]:
    """The names of the files that a command draws."""
    return DRAWN.findall(command)


def make(commands: Sequence[str], folder: Path) -> list[str]:
    """Run those commands in `folder` whose pictures are not there, or not those of this package; return what was run.

    Raises RuntimeError with what a command said where it fails, or leaves a picture out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for command in commands for name in pictures_of(command)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise RuntimeError(f"docs: two commands draw {', '.join(sorted(twice))}; give each picture a name of its own")
    due = [command for command in commands if not is_made(command, folder)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda command: run(command, folder), due))
    return due


def run(command: str, folder: Path) -> None:
    """Run one command in `folder`, and note that its pictures are made."""
    program, *arguments = shlex.split(command)
    assert program == "fastopt"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for name in pictures_of(command):
        (folder / name).unlink(missing_ok=True)
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "fastopt", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"docs: {command}\ntook longer than {LONGEST} s") from None
    missing = [name for name in pictures_of(command) if not (folder / name).is_file()]
    if finished.returncode != 0 or missing:
        said = finished.stderr.strip() or finished.stdout.strip()
        raise RuntimeError(f"docs: {command}\nended with {finished.returncode}, without {missing}:\n{said}")
    stamp(command, folder).write_text(key(command))


def is_made(command: str, folder: Path) -> bool:
    """Whether the pictures of a command are there, made by it and by the package as it is now."""
    there = stamp(command, folder)
    made = all((folder / name).is_file() for name in pictures_of(command))
    return made and there.is_file() and there.read_text() == key(command)


def stamp(command: str, folder: Path) -> Path:
    """Where is noted what the pictures of a command were made by."""
    return folder / f"{pictures_of(command)[0]}.made"


def key(command: str) -> str:
    """A digest of all that decides about a picture."""
    return hashlib.sha256(f"{command}\n{sources()}".encode()).hexdigest()


@cache
def sources() -> str:
    """A digest of the package."""
    files = sorted((ROOT / "fastopt").rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def with_pictures(text: str) -> str:
    """The page with the pictures of each command: at the end of its row of a table, or below its block."""
    lines: list[str] = []
    waiting: list[str] = []  # pictures of the block that has not ended yet
    for line in text.split("\n"):
        found = COMMAND.search(line) if line.startswith("|") else PROMPT.fullmatch(line)
        names = pictures_of(found.group(1)) if found else []
        pictures = [f"[![{name}](images/{name})](images/{name})" for name in names]
        if line.startswith("|") and pictures:
            lines.append(f"{line.rstrip()} {' '.join(pictures)} |")
            continue
        lines.append(line)
        waiting += pictures
        if line == "```" and waiting:
            lines += ["", *waiting]
            waiting = []
    return "\n".join(lines)


def optimizers() -> str:
    """For each optimizer what mkdocstrings makes its documentation of: a new file in optimizers/ is a new one."""
    import fastopt

    classes = sorted(fastopt.Optimizer.classes.items(), key=lambda item: item[0].lower())
    return "\n\n".join(f"::: {kind.__module__}.{name}" for name, kind in classes)


def conventions() -> str:
    """The table of what `convention=` stands for."""
    import fastopt

    frameworks = ("torch", "keras", "optax")
    lines = [f"| optimizer | {' | '.join(frameworks)} |", "|---|---|---|---|"]
    for name, kind in sorted(fastopt.Optimizer.classes.items(), key=lambda item: item[0].lower()):
        if kind.conventions:
            cells = [shown(kind.conventions.get(framework)) for framework in frameworks]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "*as it is*: the defaults of fastopt; *none*: there is none to follow."])


def shown(arguments: Any) -> str:
    """The arguments that stand for a convention, as the cell of a table."""
    if arguments is None:
        return "*none*"
    fixed = ", ".join(f"`{name}={getattr(value, 'low', value)!r}`" for name, value in arguments.items())
    return fixed or "*as it is*"


DOCUMENTED = re.compile(r"^::: ([\w.]+)$", flags=re.MULTILINE)


def with_summary(text: str) -> str:
    """A page that documents several things, with a table of them before the first: names and first lines."""
    found = [(name, line) for name in DOCUMENTED.findall(text) if (line := first_line(name)) is not None]
    if len(found) < 2:
        return text
    lines = [f"| [`{name.rpartition('.')[2]}`][{name}] | {line} |" for name, line in found]
    first = DOCUMENTED.search(text)
    assert first is not None
    return "\n".join([text[: first.start()], "| name | what it is |", "|---|---|", *lines, "", text[first.start() :]])


def first_line(name: str) -> str | None:
    """The first paragraph of the docstring of a class or function, as the cell of a table; None for a module.

    It is read, and not imported: what it needs may not be installed.
    """
    module, inside = ROOT, name.split(".")
    while inside and (module / inside[0]).is_dir():
        module /= inside.pop(0)
    file = module / "__init__.py"
    if inside and (module / f"{inside[0]}.py").is_file():
        file = module / f"{inside.pop(0)}.py"
    node: Any = ast.parse(file.read_text(encoding="utf-8"))
    for part in inside:
        node = next(each for each in node.body if getattr(each, "name", None) == part)
    text = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|") if inside else None


GENERATED = {"<!-- optimizers -->": optimizers, "<!-- conventions -->": conventions}


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Make the pictures, and add them and CONTRIBUTING.md to the site."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    sources.cache_clear()
    pages = [path.read_text(encoding="utf-8") for path in sorted(Path(config.docs_dir).glob("*.md"))]
    try:
        commands = commands_of(pages)
        make(commands, PICTURES)
    except RuntimeError as error:
        raise PluginError(str(error)) from None
    for name in (name for command in commands for name in pictures_of(command)):
        files.append(File.generated(config, f"images/{name}", abs_src_path=str(PICTURES / name)))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Typeset the formulas."""
    return in_html(html)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the pictures beside their commands, and what is generated in the place of its mark."""
    if pictures_wanted():
        markdown = with_pictures(markdown)
    for mark, make_text in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make_text())
    return with_summary(markdown)
