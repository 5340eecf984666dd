"""``ssmzoo bench``: how fast ops, mixers and models are, beside the limit and beside other people's."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmzoo.commands._output import console, size, table
from ssmzoo.commands._settings import parse_settings, settings_option
from ssmzoo.screen import printable

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from ssmkernels.bench import Limits, Measurement
    from ssmzoo.bench.record import Machine

USUAL = ("ops", "mixers", "models")
KINDS = (*USUAL, "scaling", "busy", "quantization", "engine", "context", "corpora", "transformers", "llama.cpp")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SECONDS, QUICK_SECONDS = 1.0, 0.1  # for each contestant of a contest


def command(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ops|mixers|models|scaling|busy|quantization|engine|context|corpora|transformers|llama.cpp]",
            help="What to time; ops, mixers and models by default. quantization: weights in fewer bits. engine: many "
            "requests at once. context: sequences cut over processes. corpora: text to tokens, and loading them. "
            "transformers: its models on our kernels. llama.cpp: a model there and here.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME ...", help="Time only these ops, mixers or models.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Time other packages as well, if they are installed.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder for results; runs/bench-TIME by default.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S", help=f"Seconds for each measurement; more seconds give more samples. [default: {SECONDS:g}]"
        ),
    ] = None,
    keep_memory: Annotated[
        bool | None,
        typer.Option(
            "--keep-memory/--no-keep-memory",
            help="Keep freed memory in the process, as `ssmzoo train` does; by default wherever that is possible.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, in about a minute: only a quick look.")] = False,
    settings: Annotated[
        list[str] | None,
        settings_option("A size or an option, such as l=1024 or length=1024."),
    ] = None,
) -> None:
    """Time ops, mixers and models, and compare them with the hardware's limit and with other packages.

    An implementation is timed only if it passes its check. All take turns, and medians are compared. The folder
    receives a CSV file and figures; Ctrl-C keeps the measurements so far. docs/bench.md explains how to read them.
    """
    kinds, names = _kinds_and_names(what or [], only or [])
    if dtype not in DTYPES:
        from ssmkernels.core.names import unknown

        raise ValueError(unknown("dtype", dtype, DTYPES))
    if seconds is None:
        seconds = QUICK_SECONDS if quick else SECONDS
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds must be above 0; got {seconds}")
    changes = parse_settings(settings or [])
    if changes and len(kinds) > 1:
        raise ValueError("--set: also name ops, mixers or models, because their sizes have different names")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it says at each call that it is slow

    import torch

    import ssmkernels
    from ssmkernels.bench import Plan, measure_limits
    from ssmzoo.bench import session
    from ssmzoo.bench.record import Log, Machine
    from ssmzoo.devices import fit_threads

    fit_threads()
    todo = session.chosen(kinds, names)
    kept = keep_memory is not False and ssmkernels.keep_memory()
    if keep_memory and not kept:
        raise ValueError(
            "--keep-memory: the C library is not glibc, or MALLOC_... in the environment tells it otherwise"
        )
    for kind in todo:
        session.check_changes(kind, todo[kind], changes)
    place = _device(device)
    folder = out or Path("runs") / f"bench-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    screen, machine = console(), Machine.here(kept)
    log = Log(folder / "bench.csv", machine)
    rows: list[Measurement] = []
    stopped = False
    with _Progress(screen, sum(map(len, todo.values()))) as progress:
        try:
            progress.say("measuring the limits of this machine")
            kind_of = getattr(torch, dtype)
            limits = measure_limits(place, kind_of, quick=quick)
            screen.print(_limits_line(limits, machine, dtype, place))
            plan = Plan(place, kind_of, limits, seconds, peers, quick, changes, progress.say)
            for kind, wanted in todo.items():
                for made in session.run(kind, wanted, plan, progress.done):
                    log.write(made)
                    rows += made
                    progress.show(made)
        except KeyboardInterrupt:
            stopped = True
    measured = sum(row.median is not None or row.resident_bytes is not None for row in rows)
    screen.print(f"\n{measured} measurements in {log.path}")
    if rows and not measured and not stopped:
        raise ValueError(f"nothing was timed: {rows[0].what}, {rows[0].implementation}: {rows[0].refused}")
    _draw(rows, machine, folder, screen)
    if stopped:
        screen.print("stopped; the measurements so far are kept")
        raise typer.Exit(130)


class _Progress:
    """What is being done, and the tables of what is done: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, screen: Console, total: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self.screen = screen
        self.bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self.task = self.bar.add_task("", total=total)
        self.growing: list[Measurement] = []

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.bar.update(self.task, description=printable(text))

    def done(self) -> None:
        self.bar.advance(self.task)

    def show(self, rows: Sequence[Measurement]) -> None:
        """Prints a contest; those at several lengths together, once all of them are there."""
        self.growing += [row for row in rows if row.length and row.median is not None]
        if rows[0].time_exponent is not None:
            self.screen.print(_growth_table([*self.growing, *rows]))
            self.growing = []
        elif not (rows[0].length and rows[0].median is not None):
            timed = [row for row in rows if row.median is not None]
            if timed:
                self.screen.print(_table(timed))
            for row in rows:
                if row.resident_bytes is not None:
                    used = f"{row.what}, {row.work}: {size(row.resident_bytes)} of memory ({row.shape})"
                    beside = "room for the longest" if row.kind == "engine" else "those results"
                    self.screen.print(f"{used}\n{row.note}; {beside}: {size(row.result_bytes or 0)}\n")
                elif row.median is None:
                    work = f", {row.work}" if row.work else ""
                    self.screen.print(f"{row.what}{work}: {row.implementation} not timed: {row.refused}\n")


def _kinds_and_names(words: Sequence[str], only: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--only`` takes one word; those that follow it come as further arguments."""
    names = [name for given in only for name in given.replace(",", " ").split()]
    kinds = [words[0]] if words and words[0] in KINDS else list(USUAL)
    rest = list(words[1:] if words and words[0] in KINDS else words)
    if rest and not names:
        from ssmkernels.core.names import unknown

        raise ValueError(unknown("thing to time", rest[0], KINDS) + " Single ones go after --only.")
    return kinds, names + rest


def _device(name: str | None) -> torch.device:
    import torch

    from ssmzoo.devices import usable

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda; got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch finds no GPU; `ssmzoo env` shows what there is")
    return usable(device, "--device")


def _limits_line(limits: Limits, machine: Machine, dtype: str, place: torch.device) -> str:
    from ssmzoo.bench.units import rate

    where = machine.gpu if place.type == "cuda" else f"{machine.cpu}, {machine.threads} threads"
    copies, multiplies = rate(limits.bandwidth, "B/s"), rate(limits.flops, "FLOP/s")
    return f"{where}: copies {copies}, multiplies matrices of {dtype} at {multiplies}"


def _table(rows: Sequence[Measurement]) -> Table:
    """One contest."""
    from ssmzoo.bench.units import ratio, seconds, span

    first = rows[0]
    columns = ("implementation", "median", "quartiles", "of limit", "of ours", "memory")
    if first.kind == "models":
        columns = ("implementation", "median", "tokens/s", "of limit", "of ours", "memory")
    lines = []
    for row in rows:
        detail = span(row.low or 0.0, row.high or 0.0)
        if first.kind == "models":
            detail = f"{row.tokens_per_second:,.0f}"
        limit, ours = (ratio(value) if value else "" for value in (row.of_limit, row.of_ours))
        memory = size(row.peak_bytes) if row.peak_bytes is not None else ""
        lines.append([row.implementation, seconds(row.median or 0.0), detail, limit, ours, memory])
    return table(f"{first.what}, {first.work} ({first.shape})", columns, lines, numbers=columns[1:])


def _growth_table(rows: Sequence[Measurement]) -> Table:
    """The same at several lengths, and the exponents of the power laws that fit."""
    from ssmzoo.bench.units import seconds

    *measured, fitted = rows
    lines = [
        [
            f"{row.length:,}",
            seconds(row.median or 0),
            seconds((row.median or 0) / row.length),
            size(row.peak_bytes or 0),
        ]
        for row in measured
    ]
    held = "" if fitted.memory_exponent is None else f"l^{fitted.memory_exponent:.2f}"
    lines.append(["grows as", f"l^{fitted.time_exponent:.2f}", f"{fitted.per_token:.2f}× the first", held])
    columns = ("length", "median", "for each token", "peak memory")
    return table(f"{fitted.what}, {fitted.work}: growth", columns, lines, numbers=columns)


def _draw(rows: Sequence[Measurement], machine: Machine, folder: Path, screen: Console) -> None:
    from ssmzoo.bench.figure import draw

    try:
        made = [path for kind in KINDS for path in draw(kind, rows, machine, folder)]
    except ImportError:
        screen.print("no figures: they need matplotlib (pip install matplotlib)")
        return
    for path in made:
        if path.suffix == ".png":
            screen.print(f"figure: {path}")
