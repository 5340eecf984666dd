"""``ssmzoo list``: which models and mixers there are."""

from __future__ import annotations

import fnmatch
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from ssmkernels.core.names import unknown
from ssmzoo.commands._output import console, count, markdown_table, options_text, table
from ssmzoo.screen import say

if TYPE_CHECKING:
    from ssmzoo import ModelConfig


RUNS = 6  # of one mixer, that a pattern is written out with


def command(
    pattern: Annotated[
        str, typer.Argument(help="A wildcard, such as 'mamba*' (quoted, so that the shell leaves it alone).")
    ] = "*",
    mixers: Annotated[bool, typer.Option("--mixers", help="List mixers, the layers that models are made of.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """List the models, or the mixers that they are made of.

    A model's name goes to `ssmzoo info`, `ssmzoo train` or, in Python, `ssmzoo.build`.
    """
    columns, rows = _mixers(pattern, here=not markdown) if mixers else _models(pattern)
    numbers = ("parameters", "layers", "d_model")
    if markdown:
        say(markdown_table(columns, rows, numbers))
    else:
        console().print(table("", columns, rows, numbers))


def _models(pattern: str) -> tuple[list[str], list[list[str]]]:
    import ssmzoo
    from ssmzoo.config import load_config
    from ssmzoo.footprint import footprint

    names = ssmzoo.list_models(pattern)
    if not names:
        raise ValueError(unknown("model", pattern, ssmzoo.list_models()))
    rows = []
    for name in names:
        config = load_config(name)
        parameters = footprint(config).parameters
        kinds = [config.mlp_of_layer(i)["kind"] for i in range(len(config.mlp_pattern) or 1)]
        mlp = ", ".join(dict.fromkeys(kinds))
        sizes = [count(parameters), str(config.n_layers), str(config.d_model)]
        rows.append([name, *sizes, _pattern(config), mlp, config.description])
    return ["model", "parameters", "layers", "d_model", "mixers", "MLP", "what it is"], rows


def _mixers(pattern: str, here: bool) -> tuple[list[str], list[list[str]]]:
    """Names and summaries; ``here`` adds the options, and whether each mixer works on this machine."""
    import ssmzoo

    known = ssmzoo.list_mixers()
    names = fnmatch.filter(known, pattern)
    if not names:
        raise ValueError(unknown("mixer", pattern, known))
    infos = [known[name] for name in names]
    if not here:
        return ["mixer", "what it is"], [[info.name, info.summary] for info in infos]
    rows = []
    for info in infos:
        available = "yes" if info.available else "pip install " + " ".join(info.missing)
        rows.append([info.name, info.summary, options_text(info.options), ", ".join(("torch", *info.needs)), available])
    return ["mixer", "what it is", "options", "needs", "here"], rows


def _pattern(config: ModelConfig) -> str:
    """[mamba, mamba, local] → "2 mamba, local (attention)"; of many runs, how often each mixer comes."""
    runs = [(name, len(list(run))) for name, run in groupby(config.pattern)]
    mixed = len(runs) > RUNS
    parts = []
    for name, length in Counter(config.pattern).items() if mixed else runs:
        kind = config.mixers.get(name, {}).get("kind", name)
        parts.append((f"{length} " if length > 1 else "") + (name if kind == name else f"{name} ({kind})"))
    return ", ".join(parts) + ", mixed" * mixed
