"""What the commands share: tables, and numbers as people write them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ssmzoo.screen import Screen

PIPED_WIDTH = 120  # of output that goes to a file or another program, which has no width of its own


def console() -> Screen:
    """Standard output, as wide as the terminal."""
    return Screen(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> Table:
    """A table for a :class:`Screen`; columns in ``numbers`` are set flush right, the first is never broken."""
    made = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if name in numbers else "left", no_wrap=i == 0 or name in numbers)
    for row in rows:
        made.add_row(*row)
    return made


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """The same as GitHub's Markdown."""
    rule = ["---:" if name in numbers else "---" for name in columns]
    lines = [columns, rule, *([" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def count(number: float) -> str:
    """129135360 → "129.1M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.99995 * unit:
            return f"{number / unit:.1f}{name}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    """2.6e8 → "260 M"."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"


def size(number: int) -> str:
    """1572864 → "1.5 MiB"."""
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.1f} {name}"
    return f"{number} B"


def options_text(options: Mapping[str, Any]) -> str:
    """{"d_state": 16} → "d_state=16"; the name alone where there is no default."""
    return ", ".join(name if value is Parameter.empty else f"{name}={value}" for name, value in options.items())
