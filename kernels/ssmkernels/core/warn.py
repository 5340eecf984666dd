"""Warnings that point at the caller's own line."""

from __future__ import annotations

import sys
import warnings

# The packages whose lines a warning passes over: ours, and torch, whose modules call ours.
_PASSED = ("ssmkernels", "ssmzoo", "torch")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that called into this project, however deep in it the fault is found.

    ``skip_file_prefixes`` of :func:`warnings.warn` does this from Python 3.12 on.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
