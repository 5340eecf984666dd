"""Figures that are saved as their numbers, for tests that train.

A run draws its curve at every checkpoint, and rendering it takes longer than the steps between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def quick() -> Iterator[Any]:
    """Inside, figures are not rendered. Yields the method that renders them."""
    from matplotlib.figure import Figure

    def save(figure: Any, file: Path, **_: object) -> None:
        lines = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
        file.write_bytes(b"\x89PNG" + repr(lines).encode())

    render = Figure.savefig
    Figure.savefig = save  # type: ignore[method-assign]
    try:
        yield render
    finally:
        Figure.savefig = render  # type: ignore[method-assign]
