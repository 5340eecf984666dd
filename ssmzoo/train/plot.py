"""The loss curve of a run."""

from __future__ import annotations

from pathlib import Path

from ssmzoo.files import replacing
from ssmzoo.screen import drawable
from ssmzoo.train.log import read

FILE = "curve.png"


def draw(log: Path, picture: Path, title: str) -> None:
    """Draws a run's log as a PNG: training and validation, in bits per byte, (masked) token or label, over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = read(log)
    _, _, training, _, validation, *_ = rows[0]
    unit = training.removeprefix("bits_per_").replace("_", " ")
    axes.plot(*_points(rows, training), color="C0", alpha=0.5, linewidth=0.8, label="training")
    axes.plot(*_points(rows, validation), color="C1", marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel=f"bits per {unit}", title=drawable(title))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(picture) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", dpi=130)


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    """The steps that have a value in a column, and the values."""
    filled = [row for row in rows if row[column]]
    return [int(row["step"]) for row in filled], [float(row[column]) for row in filled]
