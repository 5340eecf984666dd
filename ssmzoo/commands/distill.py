"""``ssmzoo distill``: a transformer's attention replaced by recurrences that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmzoo.commands._settings import parse_settings, settings_option, texts_option
from ssmzoo.commands._stopping import stopping


def command(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file with `teacher`, `pattern`, `mixer`, `options`, `train` and `stages`. Not needed with "
            "--resume.",
        ),
    ] = None,
    more_data: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="")] = None,
    data: Annotated[
        list[str] | None,
        texts_option("UTF-8 text files, or folders of them; by default the source of Python's standard library."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where it goes. [default: runs/CONFIG]")] = None,
    settings: Annotated[
        list[str] | None, settings_option("Change a key of CONFIG, such as mixer=gla or stages.logits.steps=500.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Continue the one in this folder.")] = None,
) -> None:
    """Distil a transformer into a hybrid: attention is replaced in some layers, and learned again in three stages.

    The new mixers first learn attention's matrix, then its output, and then the whole model the transformer's logits.
    Each stage is a training run in a folder of its own. Ctrl-C saves, and shows how to continue.
    """
    from ssmkernels import keep_memory
    from ssmzoo.config.entries import merge
    from ssmzoo.devices import fit_threads
    from ssmzoo.train.distill import distill, resume_distill
    from ssmzoo.yaml_text import read_mapping

    if more_data and not data:
        raise ValueError(f"give one config; got {more_data[0]!r} as well. Text to train on goes after --data")
    sources = [*(data or []), *(more_data or [])] or None
    changes = parse_settings(settings or [])
    keep_memory()
    fit_threads()
    with stopping():
        if resume is not None:
            for name, value in (("CONFIG", config), ("--out", out), ("--set", changes or None)):
                if value is not None:
                    raise ValueError(f"--resume continues with what is in the folder; leave out {name}")
            resume_distill(resume, sources)
            return
        if config is None:
            raise ValueError("`CONFIG` is missing; name a YAML file, whose keys `ssmzoo distill --help` shows")
        values = read_mapping(config)
        for key, value in changes.items():
            merge(values, key.split("."), value)
        distill(values, sources, out if out is not None else Path("runs") / config.stem)
