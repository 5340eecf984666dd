"""``ssmzoo list``: which models and mixers there are."""

from __future__ import annotations

import fnmatch
from itertools import groupby
from typing import Annotated, Any

import typer

from ssmkernels.dispatch import unknown
from ssmzoo.commands._output import console, count, markdown_table, table


def command(
    pattern: Annotated[str, typer.Argument(help="A wildcard, such as 'mamba*' (quoted, so that the shell leaves it alone).")] = "*",
    mixers: Annotated[bool, typer.Option("--mixers", help="List mixers, the layers that models are made of.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """List the models, or the mixers that they are made of.

    A model's name goes to `ssmzoo info`, `ssmzoo train` or, in Python, `ssmzoo.build`.
    """
    columns, rows = _mixers(pattern, here=not markdown) if mixers else _models(pattern)
    numbers = ("parameters", "layers", "d_model")
    if markdown:
        print(markdown_table(columns, rows, numbers))
    else:
        console().print(table("", columns, rows, numbers))


def _models(pattern: str) -> tuple[list[str], list[list[str]]]:
    import ssmzoo

    names = ssmzoo.list_models(pattern)
    if not names:
        raise ValueError(unknown("model", pattern, ssmzoo.list_models()))
    rows = []
    for name in names:
        config = ssmzoo.load_config(name)
        parameters = ssmzoo.build(config, device="meta").num_parameters()
        rows.append(
            [name, count(parameters), str(config.n_layers), str(config.d_model), pattern_text(config.pattern)]
            + [config.mlp.get("kind", "none"), config.description]
        )
    return ["model", "parameters", "layers", "d_model", "mixers", "MLP", "what it is"], rows


def _mixers(pattern: str, here: bool) -> tuple[list[str], list[list[str]]]:
    import ssmzoo

    known = ssmzoo.list_mixers()
    names = fnmatch.filter(known, pattern)
    if not names:
        raise ValueError(unknown("mixer", pattern, known))
    columns = ["mixer", "what it is", "options", "needs"] + ["here"] * here
    rows = []
    for info in (known[name] for name in names):
        row = [info.name, info.summary, options_text(info.options), ", ".join(("torch", *info.needs))]
        rows.append(row + ["yes" if info.available else "pip install " + " ".join(info.missing)] * here)
    return columns, rows


def pattern_text(pattern: list[str]) -> str:
    """["mamba", "mamba", "attention"] → "2 mamba, attention"."""
    runs = [(name, len(list(run))) for name, run in groupby(pattern)]
    return ", ".join(name if length == 1 else f"{length} {name}" for name, length in runs)


def options_text(options: dict[str, Any]) -> str:
    """{"d_state": 16} → "d_state=16"."""
    return ", ".join(f"{name}={value}" for name, value in options.items())
