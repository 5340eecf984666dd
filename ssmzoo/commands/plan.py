"""``ssmzoo plan``: a training run on paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmzoo.commands._output import console, count, flops, size, table
from ssmzoo.commands._settings import parse_settings, settings_option
from ssmzoo.screen import printable

if TYPE_CHECKING:
    from ssmzoo.planning import Estimate, Plan


def command(
    model: Annotated[
        str,
        typer.Argument(help="A model's name (see `ssmzoo list`), a YAML file, or a model's folder."),
    ],
    gpus: Annotated[int, typer.Option(help="Processors, up to 4096.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    device: Annotated[
        str,
        typer.Option(
            help="a100, h100, h200, b200, l40s or mi300x; or `this`, this machine's CPU with a thread for each rank, "
            "which is measured for some seconds."
        ),
    ] = "h100",
    batch: Annotated[
        int | None,
        typer.Option(help="Sequences of a step on all processors. [default: one for each part of the data]"),
    ] = None,
    precision: Annotated[str, typer.Option(help="bf16 (beside float32 weights) or fp32.")] = "bf16",
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="data=…,shard=…,context=…,tensor=…", help="The only mesh to look at. [default: the best of all]"
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Of every layer's activations. [default: whichever is faster and fits]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
    settings: Annotated[
        list[str] | None,
        settings_option("Change a config key first, such as d_model=512 or mixers.mamba.d_state=32."),
    ] = None,
) -> None:
    """Plan a training run: memory and time of a step, where they go, and the best mesh of processors.

    No weights are made, and no processor of the kind is needed. docs/planning.md has the formulas.
    """
    from dataclasses import replace

    from ssmzoo.planning import plan
    from ssmzoo.pretrained import architecture

    config = architecture(model).override(parse_settings(settings or []))
    found = plan(
        config,
        gpus,
        length,
        device=device,
        batch=batch,
        precision=precision,
        mesh=mesh,
        checkpointing=checkpointing,
    )
    found = replace(found, model=model)
    if as_json:
        print(found.to_json())
    else:
        _print(found)


def _print(plan: Plan) -> None:
    out, best = console(), plan.best
    out.print(
        f"{printable(plan.model)}: {count(plan.parameters)} parameters, sequences of {plan.length:,} tokens, "
        f"{plan.processors:,} × {plan.device.name}, {plan.precision}"
    )
    if best.fits:
        out.print(
            f"best mesh: {_mesh(best)}, {best.batch} {'sequence' if best.batch == 1 else 'sequences'} a step: "
            f"{_time(best.step)} a step, {count(best.tokens_per_second)} tokens a second, "
            f"{flops(best.flops)}FLOPs a step, {best.utilisation:.0%} of the matrix rate\n"
        )
    else:
        out.print(
            f"does not fit: the mesh that needs the least, {_mesh(best)}, takes {size(round(best.memory.total))} on "
            f"each processor, which has {size(round(plan.device.memory))}: {size(round(plan.short))} short"
        )
        for remedy in plan.remedies:
            out.print(f"  {remedy} would fit")
        out.print("")
    numbers = ("memory", "share", "time", "sent", "a processor")
    out.print(table(f"Memory of a processor ({best.memory.worst})", ("what", *numbers[:2]), _memory(best), numbers))
    out.print(table("A step", ("what", "time", "share"), _seconds(best), numbers))
    if best.traffic:
        rows = [[name, each.link, size(round(each.sent)), _time(each.seconds)] for name, each in best.traffic.items()]
        out.print(table("What a processor sends in a step", ("why", "link", "sent", "time"), rows, numbers))
    columns = ("mesh", "memory", "a step", "tokens a second", "fits")
    rows = [
        [
            _mesh(each),
            size(round(each.memory.total)),
            _time(each.step),
            count(each.tokens_per_second),
            "yes" if each.fits else "no",
        ]
        for each in (best, *plan.others)
    ]
    out.print(table("Meshes", columns, rows, columns[1:4]))
    out.print(f"{plan.device.name}: {plan.device.source}", style="dim")


def _mesh(estimate: Estimate) -> str:
    return str(estimate.mesh) + (", checkpointing" if estimate.checkpointing else "")


def _memory(estimate: Estimate) -> list[list[str]]:
    memory = estimate.memory
    parts: list[tuple[str, Any]] = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("copies of weights", memory.copies),
        ("communication", memory.buffers),
        *((f"activations: {name}", nbytes) for name, nbytes in memory.activations.items()),
        ("at the worst moment", memory.transient),
        ("total", memory.total),
    ]
    return [[name, size(round(nbytes)), f"{nbytes / memory.total:.0%}"] for name, nbytes in parts if nbytes]


def _seconds(estimate: Estimate) -> list[list[str]]:
    ranked = sorted(estimate.seconds.items(), key=lambda item: -item[1])
    rows = [[name, _time(seconds), f"{seconds / estimate.step:.0%}"] for name, seconds in ranked]
    return [*rows, ["total", _time(estimate.step), ""]]


def _time(seconds: float) -> str:
    """0.0123 → "12.3 ms"."""
    for unit, name in ((60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"
