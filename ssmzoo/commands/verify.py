"""``ssmzoo verify``: whether everything computes on this machine what it should."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssmzoo.commands._output import console, markdown_table, table
from ssmzoo.screen import printable, say

if TYPE_CHECKING:
    from ssmzoo.proof import Job, Summary

SHOWN = 3  # failures of one implementation; the rest are counted


def command(
    op: Annotated[list[str] | None, typer.Option(metavar="OP", help="Check only this op; repeatable.")] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Check only this implementation; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Check kernels on this device, such as cuda.")] = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="DTYPE", help="Check only in this dtype; repeatable.")
    ] = None,
    mixers: Annotated[bool, typer.Option("--mixers", help="Check the mixers alone.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Check every third case, in float32 and bfloat16, in well under a minute.")
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Call every op in unusual ways instead: compiled, under vmap, forked, ...")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the matrix as a Markdown table.")] = False,
) -> None:
    """Check every kernel against its reference, and every mixer's properties, on this machine.

    An error may be at most twice that of the reference in the same dtype, plus a band of rounding. The exit status is 1
    if a check failed.
    """
    from ssmzoo import proof

    chosen = bool(op or implementation or dtype or device != "cpu")
    if mixers and chosen:
        raise ValueError("--mixers checks only mixers; leave out --op, --implementation, --device and --dtype")
    if markdown and not matrix:
        raise ValueError("--markdown prints the table of --matrix; give both")
    if matrix:
        if mixers or quick or implementation or dtype or device != "cpu":
            raise ValueError("--matrix takes only --op and --markdown; it runs each op on the CPU")
        _matrix(op or (), markdown)
        return
    kernels: list[Summary] = []
    layers: list[Summary] = []
    jobs: list[Job] = []
    if not mixers:
        kernels, jobs = proof.kernel_jobs(op or (), implementation or (), device, dtype or (), quick)
    if not chosen:
        layers, more = proof.mixer_jobs()
        jobs = jobs + more

    start = time.monotonic()
    with proof.quietly():
        _run(jobs)
    seconds = time.monotonic() - start

    screen = console()
    if kernels:
        screen.print(
            table("Kernels", ("op", "implementation", "checks", "failed", "worst", "remarks"), _kernels(kernels))
        )
        screen.print("worst: the largest error, as a fraction of what is allowed\n", style="dim")
    if layers:
        screen.print(table("Mixers", ("mixer", "checks", "failed", "remarks"), _mixers(layers)))
    every = [*kernels, *layers]
    for summary in every:
        _show_failures(summary)
    made = sum(len(s.checks) for s in every)
    failed = sum(len(s.failures) for s in every)
    if failed:
        print(f"{made} checks in {seconds:.0f} s: {failed} failed")
    elif made:
        print(f"{made} checks in {seconds:.0f} s: all passed")
    else:
        print("nothing could be checked; the remarks above say why")
    if failed or not made:
        raise typer.Exit(1)


def _matrix(ops: Sequence[str], markdown: bool) -> None:
    """For each op, in which ways it can be called, and why not in others."""
    from ssmkernels.check.matrix import FAULT, RIGHT, TABLE, cells
    from ssmkernels.check.spec import spec_of

    for name in ops:
        spec_of(name)  # or the error says which ops there are
    rows: dict[str, dict[str, str]] = {}
    for cell in cells(ops, tuple(TABLE)):
        rows.setdefault(cell.op, {})[TABLE[cell.way]] = cell.verdict
    if markdown:
        reasons = list(dict.fromkeys(told for row in rows.values() for told in row.values() if told != RIGHT))
        marks = {RIGHT: RIGHT, **{reason: str(i) for i, reason in enumerate(reasons, 1)}}
        lines = [[f"`{op}`", *(marks[told] for told in row.values())] for op, row in rows.items()]
        print(markdown_table(["op", *TABLE.values()], lines), end="\n\n" if reasons else "\n")
        print("".join(f"{marks[reason]}. {reason}\n" for reason in reasons), end="")
    else:
        columns = ("op", "right", "other ways")
        console().print(table("Ways to call", columns, [[op, *_ways(row)] for op, row in rows.items()]))
    if any(told.startswith(FAULT) for row in rows.values() for told in row.values()):
        raise typer.Exit(1)


def _ways(row: dict[str, str]) -> list[str]:
    from ssmkernels.check.matrix import RIGHT

    right = [way for way, told in row.items() if told == RIGHT]
    others = "\n".join(f"{way}: {told}" for way, told in row.items() if told != RIGHT)
    return [", ".join(right), others]


def _run(jobs: list[Job]) -> None:
    """Does the work, under a progress bar where somebody sees it."""
    screen = console()
    columns = (
        TextColumn("{task.description:<36}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=len(jobs))
        for job in jobs:
            bar.update(task, description=printable(f"{job.summary.subject} {job.summary.implementation}"))
            job.run()
            bar.advance(task)


def _kernels(summaries: list[Summary]) -> list[list[str]]:
    rows, before = [], ""
    for s in summaries:
        first = s.subject if s.subject != before else ""
        before = s.subject
        worst = f"{s.worst.used:.2f} {s.worst.what}" if s.worst else ""
        rows.append([first, s.implementation, *_counts(s), worst, _remarks(s)])
    return rows


def _mixers(summaries: list[Summary]) -> list[list[str]]:
    return [[s.subject, *_counts(s), _remarks(s)] for s in summaries]


def _counts(summary: Summary) -> list[str]:
    return ["", ""] if summary.unavailable else [str(len(summary.checks)), str(len(summary.failures) or "")]


def _remarks(summary: Summary) -> str:
    if summary.unavailable:
        return f"not here: {summary.unavailable}"
    skipped = [f"{reason} ({count})" for reason, count in summary.skipped.most_common()]
    return "cases skipped: " + ", ".join(skipped) if skipped else ""


def _show_failures(summary: Summary) -> None:
    if not summary.failures:
        return
    name = f"{summary.subject}: {summary.implementation}" if summary.implementation else f"mixer {summary.subject}"
    say(f"FAILED {name}")
    for failure in summary.failures[:SHOWN]:
        say(f"  {failure}".replace("\n", "\n  "))
    if len(summary.failures) > SHOWN:
        say(f"  and {len(summary.failures) - SHOWN} more")
    say(f"  {summary.advice}\n")
