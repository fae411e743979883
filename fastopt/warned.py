"""`warn_caller`: a warning that shows the line outside of the package that led to it."""

from __future__ import annotations

import sys
import warnings


def warn_caller(message: str) -> None:
    """Warn, at the line of the code that has called into fastopt."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("fastopt."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
