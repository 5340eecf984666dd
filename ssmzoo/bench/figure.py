"""The figures: bars of time relative to the limit, and lines of time over length."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmkernels.bench import Measurement
from ssmkernels.bench.peers import ABSENT
from ssmzoo.bench.record import Machine
from ssmzoo.bench.units import ratio, seconds
from ssmzoo.files import replacing
from ssmzoo.screen import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEER, INK, FAINT = "#0b6e99", "#b9bec4", "#22262a", "#6b7278"
TITLES = {
    "ops": "Ops: time relative to the limit of memory bandwidth and matrix rate",
    "mixers": "Mixers: time relative to their matrix products alone",
    "models": "Models: time relative to their matrix products alone",
    "corpora": "Corpora: time relative to the tokenizer alone, and to a step of training",
    "context": "Over two processes: time relative to one process's time, shared",
    "busy": "Beside a busy process on each core: time relative to the same on one thread",
    "quantization": "Weights of fewer bytes: time relative to reading the bytes, and to the same in float32",
}
BAR, HEADING, GAP, WIDTH = 0.27, 0.3, 0.16, 11.0  # inches: a bar's line, a group's heading, the space after it
TOP, BOTTOM, LEFT = 1.12, 0.62, 1.75
LETTER, COLUMN = 0.075, 2.3  # inches: of an implementation's name, and the least for a kind of work
LINE = 0.165  # of the caption
MARGIN = 14 / 72


def draw(kind: str, rows: Sequence[Measurement], machine: Machine, folder: Path) -> list[Path]:
    """Writes the figures of one kind as PNG and SVG, as far as there is something to show.

    Raises:
        ImportError: matplotlib is missing.
    """
    made = []
    rows = [_drawable(row) for row in rows]
    bars = [row for row in rows if row.kind == kind and row.of_limit and row.role != "limit" and not row.length]
    if bars:
        failed = [row for row in rows if row.kind == kind and row.refused and not row.refused.startswith(ABSENT)]
        named = dict.fromkeys(f"{row.what}, {row.implementation} ({row.refused.partition(':')[0]})" for row in failed)
        made += _save(_bars(kind, bars, "; ".join(named), machine), folder / kind)
    lines = [row for row in rows if row.kind == kind and row.median and row.length]
    if lines:
        fitted = [row for row in rows if row.kind == kind and row.time_exponent is not None]
        made += _save(_growth_lines(lines, fitted, machine), folder / f"{kind}-growth")
    return made


def _drawable(row: Measurement) -> Measurement:
    words = ("what", "work", "implementation", "shape", "note", "refused")
    changes: dict[str, Any] = {name: drawable(getattr(row, name)) for name in words}
    return dataclasses.replace(row, **changes)


def _new(height: float, width: float = WIDTH) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in paths:
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=160, facecolor="white")
    return paths


def _groups(bars: Sequence[Measurement]) -> dict[str, list[str]]:
    """What → its implementations, in the order in which they came."""
    groups: dict[str, list[str]] = {}
    for row in bars:
        names = groups.setdefault(row.what, [])
        if row.implementation not in names:
            names.append(row.implementation)
    return groups


def _bars(kind: str, bars: Sequence[Measurement], failed: str, machine: Machine) -> Figure:
    """One column of bars for each kind of work; a group for each op, mixer or model."""
    works = list(dict.fromkeys(row.work for row in bars))
    places: dict[tuple[str, str], float] = {}
    headings: dict[str, float] = {}
    y = 0.0
    for what, names in _groups(bars).items():
        headings[what] = y + 0.45 * HEADING
        y += HEADING
        for name in names:
            places[what, name] = y + 0.5 * BAR
            y += BAR
        y += GAP
    notes = dict.fromkeys(f"{row.what}, {row.implementation}: {row.note}." for row in bars if row.note)
    read = "Medians, whiskers at the quartiles. “× ours”: time over that of our fastest."
    missing = [f"Not timed: {failed}."] if failed else []
    caption = _wrapped([read, *drawable(str(machine)).splitlines(), " ".join(notes), *missing])
    bottom = BOTTOM + LINE * len(caption)
    height = TOP + y + bottom
    left = max(LEFT, 0.3 + LETTER * max(len(name) for _, name in places))
    width = max(WIDTH, left + COLUMN * len(works))
    figure = _new(height, width)
    columns = figure.subplots(1, len(works), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=left / width, right=0.985, top=1 - TOP / height, bottom=bottom / height, wspace=0.06)
    for axes, work in zip(columns, works, strict=True):
        _column(axes, work, [row for row in bars if row.work == work], places, {1: 0.82, 2: 0.68}.get(len(works), 0.55))
    first = columns[0]
    first.set_ylim(y, 0)
    first.set_yticks(list(places.values()), [name for _, name in places], fontsize=9, color=INK)
    shapes = {row.what: row.shape for row in bars}
    alike = len(set(shapes.values())) == 1
    for what, place in headings.items():
        _heading(figure, first, what, "" if alike else shapes[what], place)
    setting = (f"{bars[0].dtype} on {bars[0].device}", *([shapes[bars[0].what]] if alike else []))
    told = f"{', '.join(setting)}. Blue: ours, grey: others. Shorter is better; the dashed line is the limit."
    _frame(figure, TITLES[kind], told, caption)
    return figure


def _heading(figure: Figure, axes: Axes, what: str, shape: str, place: float) -> None:
    """A group's name at the left margin, and its sizes after it."""
    at: dict[str, Any] = {
        "xycoords": ("figure fraction", "data"),
        "textcoords": "offset points",
        "va": "center",
        "zorder": 5,
    }
    name = axes.annotate(what, (0, place), xytext=(14, 0), fontsize=10, fontweight="bold", color=INK, **at)
    after = name.get_window_extent(figure.canvas.get_renderer()).x1 / figure.dpi * 72 + 7  # type: ignore[attr-defined]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate(shape, (0, place), xytext=(after, 0), fontsize=7.5, color=FAINT, bbox=box, **at)


def _column(
    axes: Axes, work: str, rows: Sequence[Measurement], places: dict[tuple[str, str], float], share: float
) -> None:
    """``share``: how much of the width the longest bar may take; the rest is for labels."""
    ends = [(row.of_limit or 1.0) * max(1.0, (row.high or 0.0) / (row.median or 1.0)) for row in rows]
    least, most = min([1.0, *ends]) * 0.8, max([2.0, *ends])
    axes.set_xscale("log")
    axes.set_xlim(least, least * (most / least) ** (1 / share))
    steps = (1, 2, 5) if most < 20 * least else (1,)
    ticks = [step * 10.0**power for power in range(-3, 7) for step in steps if least <= step * 10.0**power <= most]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    for row in rows:
        assert row.of_limit is not None
        assert row.median is not None
        y, ours = places[row.what, row.implementation], row.role == "ours"
        axes.barh(y, row.of_limit - least, left=least, height=0.8 * BAR, color=OURS if ours else PEER, zorder=2)
        scale = row.of_limit / row.median
        low, high = (scale * (value or row.median) for value in (row.low, row.high))
        axes.plot([low, high], [y, y], color=INK, linewidth=1, zorder=3, solid_capstyle="butt")
        label = seconds(row.median)
        if row.tokens_per_second and row.kind == "models":
            label = f"{row.tokens_per_second:,.0f} tokens/s"
        if row.of_ours and not (ours and row.of_ours == 1):
            label += f"   {ratio(row.of_ours)} ours"
        axes.annotate(
            label,
            (max(high, row.of_limit), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
            fontweight="bold" if ours else "normal",
        )
    axes.axvline(1, color=INK, linestyle=(0, (4, 3)), linewidth=1, zorder=3)
    axes.set_title(work, fontsize=11, color=INK, loc="left", pad=6)
    axes.set_xlabel("times the limit", fontsize=9, color=FAINT)
    axes.tick_params(axis="x", labelsize=8.5, colors=FAINT)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e8ea", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9cdd1")


def _growth_lines(rows: Sequence[Measurement], fitted: Sequence[Measurement], machine: Machine) -> Figure:
    """Time for each token over the length: a level line is linear growth."""
    from matplotlib.ticker import LogLocator

    caption = _wrapped(drawable(str(machine)).splitlines())
    figure = _new(5.0)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.68, top=1 - 0.85 / 5, bottom=(0.75 + LINE * len(caption)) / 5)
    exponents = {row.what: (row.time_exponent, row.memory_exponent) for row in fitted}
    for what in dict.fromkeys(row.what for row in rows):
        mine = sorted((row.length, row.median / row.length) for row in rows if row.what == what and row.median)
        time, memory = exponents.get(what, (None, None))
        label = what if time is None else f"{what}: time ∝ $l^{{{time:.2f}}}$"
        label += "" if memory is None else f", memory ∝ $l^{{{memory:.2f}}}$"
        axes.plot(*zip(*mine, strict=True), marker="o", markersize=4, linewidth=1.6, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: seconds(value))
    axes.minorticks_off()
    axes.set_xlabel("length l", fontsize=9, color=FAINT)
    axes.set_ylabel("time for each token", fontsize=9, color=FAINT)
    axes.tick_params(labelsize=8.5, colors=FAINT)
    axes.grid(color="#e6e8ea", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    title = f"Growth with the length, {' and '.join(dict.fromkeys(row.work for row in rows))}"
    _frame(figure, title, "A level line is linear growth. Medians.", caption)
    return figure


def _wrapped(paragraphs: Sequence[str]) -> list[str]:
    return [line for text in paragraphs for line in textwrap.wrap(text, 175)]


def _frame(figure: Figure, title: str, told: str, caption: Sequence[str]) -> None:
    """Title, what to know, and at the foot where it was measured."""
    height, x = figure.get_figheight(), MARGIN / figure.get_figwidth()
    figure.text(x, 1 - 0.36 / height, title, fontsize=14, fontweight="bold", color=INK)
    figure.text(x, 1 - 0.61 / height, told, fontsize=9.5, color=FAINT)
    figure.text(x, 0.1 / height, "\n".join(caption), fontsize=7.5, color=FAINT, va="bottom", linespacing=1.4)
