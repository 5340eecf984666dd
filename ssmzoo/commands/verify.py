"""``ssmzoo verify``: whether everything computes on this machine what it should."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssmzoo.commands._output import console, table

if TYPE_CHECKING:
    from ssmzoo.proof import Job, Summary

SHOWN = 3  # failures of one implementation; the rest are counted


def command(
    op: Annotated[list[str] | None, typer.Option(metavar="OP", help="Check this op alone; may be repeated.")] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Check this implementation alone; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where kernels are checked, such as cuda.")] = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="DTYPE", help="Check in this dtype alone; may be repeated.")
    ] = None,
    mixers: Annotated[bool, typer.Option("--mixers", help="Check the mixers alone.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every third case, in float32 and bfloat16, in well under a minute.")
    ] = False,
) -> None:
    """Check every kernel against its reference, and every mixer's properties, on this machine.

    An error may be at most twice that of the reference in the same dtype, plus a band of rounding. The exit status is 1
    if a check failed.
    """
    from ssmzoo import proof

    chosen = bool(op or implementation or dtype or device != "cpu")
    if mixers and chosen:
        raise ValueError("--mixers checks mixers alone; leave --op, --implementation, --device and --dtype away")
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
        screen.print("[dim]worst: the largest error, as a part of what is allowed[/dim]\n")
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
        print("nothing could be checked: the remarks above say why")
    if failed or not made:
        raise typer.Exit(1)


def _run(jobs: list[Job]) -> None:
    """Does the work, under a progress bar where somebody sees it."""
    screen = console()
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=len(jobs))
        for job in jobs:
            bar.update(task, description=f"{job.summary.subject} {job.summary.implementation}")
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
    return "cases passed over: " + ", ".join(skipped) if skipped else ""


def _show_failures(summary: Summary) -> None:
    if not summary.failures:
        return
    name = f"{summary.subject}: {summary.implementation}" if summary.implementation else f"mixer {summary.subject}"
    print(f"FAILED {name}")
    for failure in summary.failures[:SHOWN]:
        print(f"  {failure}".replace("\n", "\n  "))
    if len(summary.failures) > SHOWN:
        print(f"  and {len(summary.failures) - SHOWN} more")
    print(f"  {summary.advice}\n")
