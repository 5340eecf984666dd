"""What a run shows and writes while it goes: the CSV log and the progress bar."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssmzoo.files import replacing
from ssmzoo.train.boards import Board, Meter

Row = dict[str, float]


class Log:
    """A row for each step in a CSV file; a bar that goes along; a line for each evaluation.

    Args:
        path: the CSV file. What stands in it after ``step`` is taken out.
        unit: what losses are counted by: "byte", "token", "masked_token" or "label".
        step, steps: how many are done, and how many there are.
        console: where the bar and the lines go.
        experts: the model has mixtures of experts.
        boards: where the numbers go as well.
        meter: adds columns of how much of the machine is used.
    """

    def __init__(
        self,
        path: Path,
        unit: str,
        step: int,
        steps: int,
        console: Console,
        experts: bool = False,
        boards: Sequence[Board] = (),
        meter: Meter | None = None,
    ):
        self.columns = columns(unit, experts, meter is not None)
        self._boards, self._meter = boards, meter
        self._unit = unit.replace("_", " ")
        self._console = console
        _rewind(path, step, self.columns)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, self.columns)
        self._bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            refresh_per_second=4,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, shown="")
        self._seconds_per_token: list[float] = []  # of the steps since the last line

    def __enter__(self) -> Log:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        # Rows that a full disk did not take have been told already.
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            self._file.close()
        for board in self._boards:
            board.close()

    def write(self, rows: list[Row]) -> None:
        """Rows of :func:`columns`, in the order of their steps; a column may be missing."""
        for row in rows:
            if self._meter is not None and "tokens_per_second" in row:
                row |= self._meter.of(row["tokens_per_second"])
            self._writer.writerow(row)
            for board in self._boards:
                board.write(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
            if "tokens_per_second" in row:
                self._seconds_per_token.append(1 / row["tokens_per_second"])
            if "loss" in row:
                self._bar.update(self._task, completed=row["step"], shown=self._describe(row))
            if "validation_loss" in row:
                validation = f"validation {row[self.columns[4]]:.3f} bits/{self._unit}"
                if "validation_accuracy" in row:
                    validation += f", {row['validation_accuracy']:.2%} right"
                self._console.print(f"step {row['step']:>6}   {validation}   {self._describe(row)}".rstrip())
                self._seconds_per_token.clear()
        self._file.flush()

    def _describe(self, row: Mapping[str, float]) -> str:
        """A step as "loss 1.386   2.000 bits/byte   12,345 tokens/s"; empty before the first."""
        if "loss" not in row:
            return ""
        rate = len(self._seconds_per_token) / sum(self._seconds_per_token)
        bits = f"{row[self.columns[2]]:.3f} bits/{self._unit}   " if self.columns[2] in row else ""
        return f"loss {row['loss']:.3f}   {bits}{rate:,.0f} tokens/s"


def columns(unit: str, experts: bool = False, metered: bool = False) -> list[str]:
    """The log's columns: losses in nats a token or label, and in bits a ``unit``; tokens of all processes.

    With ``experts`` also the load of the busiest expert over an even one, in the mean over the layers. With ``metered``
    also those of :class:`~ssmzoo.train.boards.Meter`.
    """
    accuracy = ["validation_accuracy"] if unit in ("label", "masked_token") else []
    return [
        "step",
        "loss",
        f"bits_per_{unit}",
        "validation_loss",
        f"validation_bits_per_{unit}",
        "lr",
        "gradient_norm",
        "tokens_per_second",
        *accuracy,
        *(["expert_load"] if experts else []),
        *(["utilisation", "memory_gb"] if metered else []),
    ]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a log, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewind(path: Path, copy: Path, step: int) -> str | None:
    """Gives a log the rows that it had at a checkpoint, which keeps a copy of them.

    Returns:
        What was wrong with the rows up to there, in a line; None if nothing was.
    """
    if not copy.is_file():
        return None  # a checkpoint of an earlier version
    wanted = copy.read_bytes()
    found = path.read_bytes() if path.is_file() else None
    with replacing(path) as temporary:
        temporary.write_bytes(wanted)
    if found is None:
        return f"{path} was missing: its rows up to step {step} are those of the checkpoint"
    if found.startswith(wanted):
        return None
    pairs = zip(found.split(b"\n"), wanted.split(b"\n"), strict=False)
    line = next((i for i, (ours, theirs) in enumerate(pairs, 1) if ours != theirs), 1 + found.count(b"\n"))
    return f"{path} was damaged from line {line} on: its rows up to step {step} are those of the checkpoint"


def _rewind(path: Path, step: int, header: list[str]) -> None:
    """Leaves the whole rows up to ``step``, under the header."""
    rows: list[dict[str, Any]] = read(path) if path.is_file() else []
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) <= step)
