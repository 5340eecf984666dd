"""The gguf package, which is imported where a file is written or read, and nowhere else."""

from __future__ import annotations

import importlib.util


def need_gguf() -> None:
    """
    Raises:
        ImportError: the package is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("GGUF files need the gguf package: pip install 'ssmzoo[gguf]'")
