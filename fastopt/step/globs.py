"""Which parameter paths a glob matches: one glob by itself, or thousands of them on the same paths."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

GRAM = 3
"""Characters of the fragments by which paths are looked up."""
FEW = 8
"""Globs that are tried on every path. An index pays from there on."""
END = "\0"
"""Stands before and behind a path in the index, so that fragments know where a path begins and ends."""
SPECIAL = re.compile(r"[*?]")


def matcher(glob: str) -> Callable[[str], bool]:
    """Return the function that tells whether a path matches, as `fnmatch.fnmatchcase` does."""
    if "?" in glob or "[" in glob:
        return lambda path: fnmatch.fnmatchcase(path, glob)
    first, *rest = glob.split("*")
    if not rest:
        return glob.__eq__
    *inner, last = rest
    inner = [piece for piece in inner if piece]
    shortest = sum(map(len, (first, *inner, last)))

    def matches(path: str) -> bool:
        if len(path) < shortest or not path.startswith(first) or not path.endswith(last):
            return False
        at, stop = len(first), len(path) - len(last)
        for piece in inner:  # the first place of each leaves most room for the next
            found = path.find(piece, at, stop)
            if found < 0:
                return False
            at = found + len(piece)
        return True

    return matches


class Paths:
    """Parameter paths, for many globs: a glob is tried only where the rarest of its fragments occurs."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self._numbers: dict[str, int] = {}
        for number, path in enumerate(paths):
            self._numbers.setdefault(path, number)
        self._tried = 0
        self._places: dict[str, list[int]] | None = None

    def matching(self, glob: str) -> list[int]:
        """The numbers of the paths that a glob matches; a path stands for itself alone, also where it has brackets."""
        exact = self._numbers.get(glob)
        if exact is not None:
            return [exact]
        matches = matcher(glob)
        return [number for number in self._candidates(glob) if matches(self.paths[number])]

    def _candidates(self, glob: str) -> Sequence[int]:
        """The numbers, in order, of paths among which are all that match."""
        self._tried += 1
        if self._tried <= FEW:
            return range(len(self.paths))
        if self._places is None:
            self._places = defaultdict(list)
            for number, path in enumerate(self.paths):
                for fragment in _fragments(f"{END}{path}{END}"):
                    self._places[fragment].append(number)
        literal, bracket, _ = glob.partition("[")
        pieces = SPECIAL.split(f"{END}{literal}" if bracket else f"{END}{literal}{END}")
        found = [self._places.get(fragment, []) for piece in pieces for fragment in _fragments(piece)]
        return min(found, key=len, default=range(len(self.paths)))


def _fragments(text: str) -> set[str]:
    return {text[k : k + GRAM] for k in range(len(text) - GRAM + 1)}
