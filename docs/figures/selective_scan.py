"""Draws selective_scan.svg: what the scan's CPU kernel reads and writes where. Needs matplotlib.

python docs/figures/selective_scan.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#22262a", "#6b7278"
READ, WRITTEN, SAVED, SCRATCH = "#cfe3ec", "#f6d9c2", "#e3d5f0", "#f1f2f3"
EDGES = {READ: "#0b6e99", WRITTEN: "#c2601b", SAVED: "#7a4fa3", SCRATCH: "#9aa1a7"}
CHUNKS = 4
LEFT, WIDE = 2.0, 2.35  # where the first chunk starts, and how long each is


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", size: float = 9
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=EDGES[colour], linewidth=1, zorder=2))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK, zorder=3)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, bend: float = 0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    curve = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, color=colour, connectionstyle=curve, zorder=4, **style))


def strip(axes: Axes, y: float, colour: str, name: str, size: str) -> None:
    """An array in main memory, cut where the chunks are."""
    for k in range(CHUNKS):
        box(axes, LEFT + k * WIDE, y, WIDE, 0.34, colour)
    axes.text(LEFT - 0.12, y + 0.17, name, ha="right", va="center", fontsize=9.5, color=INK)
    axes.text(LEFT + CHUNKS * WIDE + 0.12, y + 0.17, size, ha="left", va="center", fontsize=8.5, color=FAINT)


def heading(axes: Axes, title: str, told: str) -> None:
    axes.text(0.0, 6.35, title, fontsize=12.5, fontweight="bold", color=INK, va="bottom")
    axes.text(1.25, 6.37, told, fontsize=9.5, color=FAINT, va="bottom")
    arrow(axes, (LEFT + CHUNKS * WIDE - 1.0, 6.45), (LEFT + CHUNKS * WIDE, 6.45), FAINT)
    axes.text(LEFT + CHUNKS * WIDE - 1.1, 6.45, "time", ha="right", va="center", fontsize=9, color=FAINT)


def levels(axes: Axes, lower: float) -> None:
    end = LEFT + CHUNKS * WIDE + 1.75
    for y in (4.72, 2.42):
        axes.plot([0, end], [y, y], color="#d5d8db", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for y, text in ((5.45, "main memory"), (3.57, "cache, registers"), (lower, "main memory")):
        axes.text(0.05, y, text, ha="left", va="center", fontsize=8.5, color=FAINT, rotation=90)


def tile(axes: Axes, x: float, lines: list[tuple[float, str, bool]]) -> None:
    """What a task has in its cache for one chunk: lines of text, large or small."""
    box(axes, x + 0.16, 2.72, WIDE - 0.32, 1.72, SCRATCH)
    for y, text, large in lines:
        size, colour = (8.2, INK) if large else (7.4, FAINT)
        axes.text(x + WIDE / 2, y, text, ha="center", va="center", fontsize=size, color=colour, zorder=3)


def forward(axes: Axes) -> None:
    heading(axes, "Forward", "one task: one sequence and 64 channels, chunk after chunk")
    levels(axes, 1.4)
    strip(axes, 5.6, READ, "u, Δ, z", "(l 64)  read once")
    strip(axes, 5.1, READ, "B, C", "(l n)  for all channels of a group")
    for k in range(CHUNKS):
        x = LEFT + k * WIDE
        lines = [(4.2, "softplus(Δ), Δu, sums of y", True), (3.94, "(64 steps, 64 channels)", False)]
        tile(axes, x, [*lines, (3.5, "h of 8 states in registers", True), (2.9, "through the whole chunk", False)])
        arrow(axes, (x + 0.3, 3.18), (x + WIDE - 0.3, 3.18), EDGES[SAVED])
        arrow(axes, (x + WIDE / 2, 5.1), (x + WIDE / 2, 4.46), EDGES[READ])
        arrow(axes, (x + WIDE / 2, 2.72), (x + WIDE / 2, 2.06), EDGES[WRITTEN])
        arrow(axes, (x - (0.16 if k else 0.35), 3.18), (x + 0.16, 3.18), EDGES[SAVED])
        arrow(axes, (x, 3.18), (x, 1.32), EDGES[SAVED])
        box(axes, x - 0.13, 0.97, 0.26, 0.34, SAVED)
    x = LEFT + CHUNKS * WIDE
    axes.text(LEFT - 0.42, 3.18, "initial state", ha="right", va="center", fontsize=9, color=INK)
    arrow(axes, (x - 0.16, 3.18), (x + 0.3, 3.18), EDGES[SAVED])
    axes.text(x + 0.36, 3.18, "final state", ha="left", va="center", fontsize=9, color=INK)
    strip(axes, 1.7, WRITTEN, "y", "(l 64)  written once")
    axes.text(LEFT - 0.25, 1.14, "h before\neach chunk", ha="right", va="center", fontsize=9.5, color=INK)
    axes.text(x + 0.12, 1.14, "(l/64 n 64)  written if a\ngradient is wanted", va="center", fontsize=8.5, color=FAINT)


def backward(axes: Axes) -> None:
    heading(axes, "Backward", "the same tasks; chunks from the last to the first")
    levels(axes, 1.3)
    strip(axes, 5.85, READ, "u, Δ, z, ∂y", "(l 64)  read once")
    strip(axes, 5.4, READ, "B, C", "(l n)")
    for k in range(CHUNKS):
        x = LEFT + k * WIDE
        lines = [(4.25, "1. h and exp(ΔA) again", True), (3.68, "(64 steps, 4 states), kept", False)]
        tile(axes, x, [*lines, (3.3, "2. g in registers", True)])
        arrow(axes, (x + 0.3, 3.97), (x + WIDE - 0.3, 3.97), EDGES[SAVED])
        arrow(axes, (x + WIDE - 0.3, 3.0), (x + 0.3, 3.0), EDGES[WRITTEN])
        arrow(axes, (x + WIDE / 2, 5.4), (x + WIDE / 2, 4.46), EDGES[READ])
        arrow(axes, (x + WIDE / 2, 2.72), (x + WIDE / 2, 2.24), EDGES[WRITTEN])
        box(axes, x - 0.13, 4.92, 0.26, 0.34, SAVED)
        arrow(axes, (x, 4.92), (x + 0.28, 3.97), EDGES[SAVED], bend=0.3)
        arrow(axes, (x + 0.16, 3.0), (x - (0.16 if k else 0.35), 3.0), EDGES[WRITTEN])
    x = LEFT + CHUNKS * WIDE
    axes.text(LEFT - 0.42, 3.0, "∂ initial state", ha="right", va="center", fontsize=9, color=INK)
    arrow(axes, (x + 0.3, 3.0), (x - 0.16, 3.0), EDGES[WRITTEN])
    axes.text(x + 0.36, 3.0, "∂ final state", ha="left", va="center", fontsize=9, color=INK)
    axes.text(LEFT - 0.25, 5.09, "saved h", ha="right", va="center", fontsize=9.5, color=INK)
    strip(axes, 1.88, WRITTEN, "∂u, ∂Δ, ∂z", "(l 64)  written once")
    strip(axes, 1.3, SAVED, "parts of ∂B, ∂C", "(tiles, window, 2n)  about 8 MB,\nused again for each window")
    strip(axes, 0.5, WRITTEN, "∂B, ∂C", "(l n)  parts added in their order:\nthe same bits on any threads")
    for k in range(CHUNKS):
        middle = LEFT + k * WIDE + WIDE / 2
        arrow(axes, (middle, 1.3), (middle, 0.86), EDGES[WRITTEN])


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    matplotlib.rcParams["svg.hashsalt"] = "selective_scan"  # the same file each time
    figure = Figure(figsize=(12.6, 11.2))
    FigureCanvasAgg(figure)
    for place, panel in zip(figure.subplots(2, 1), (forward, backward), strict=True):
        place.set_xlim(0, 14.0)
        place.set_ylim(0.3, 6.8)
        place.axis("off")
        panel(place)
    figure.subplots_adjust(left=0.015, right=0.99, top=0.985, bottom=0.01, hspace=0.04)
    figure.savefig(folder / "selective_scan.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
