"""Makes Markdown of docstrings, which are written for a terminal: examples become code, names become links."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

import fastopt

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?!\s*$).*)*(?:\n\n\1>>> .*(?:\n(?!\s*$).*)*)*", flags=re.MULTILINE)
"""Paragraphs that begin with a prompt."""

PUBLIC = [(name, getattr(fastopt, name)) for name in fastopt.__all__]
LINKS = {name: f"{thing.__module__}.{name}" for name, thing in PUBLIC if hasattr(thing, "__module__")}
NAME = re.compile(rf"(?<!`)`({'|'.join(LINKS)})`(?!`)")


class Markdown(griffe.Extension):
    """What griffe calls for every object it has read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object, before its sections are read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
        for parameter in getattr(obj, "parameters", ()):
            if str(parameter.annotation) == "Any":  # its text tells more
                parameter.annotation = None


def markdown(text: str) -> str:
    """A docstring with its examples fenced, and the public names in it linked to their place."""
    parts, end = [], 0
    for found in EXAMPLE.finditer(text):
        parts += [prose(text[end : found.start()]), f"```pycon\n{textwrap.dedent(found[0])}\n```"]
        end = found.end()
    return "".join([*parts, prose(text[end:])])


def prose(text: str) -> str:
    """Text between examples. An entry such as ``eps: >= 0`` would begin a quotation."""
    linked = NAME.sub(lambda name: f"[`{name[1]}`][{LINKS[name[1]]}]", text)
    return re.sub(r"(?<=: )>", r"\>", linked)
