"""``ssmzoo tokenize``: documents as token ids on disk, to train on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ssmzoo.commands._output import console, count, table
from ssmzoo.commands._stopping import stopped


def command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCES",
            help="Files and folders of text, JSON lines (.jsonl, .jsonl.gz, .jsonl.zst), Parquet and Arrow, as "
            "datasets writes it; datasets:OWNER/NAME[@REVISION][:CONFIG][:SPLIT] on the Hugging Face hub; NAME=SOURCE "
            "to say what a mixture calls one.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The corpus's folder; new, or to be completed.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of the tokenizers library. [default: bytes]")
    ] = None,
    key: Annotated[str, typer.Option(help="The name of the text in JSON lines and tables.")] = "text",
    end: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="A token to end each document, such as '<|endoftext|>'.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: as many as cores]")] = None,
) -> None:
    """Turn documents into a corpus of token ids, for `ssmzoo train MODEL --data FOLDER`.

    A text file is one document, and so is a line of JSON and a row of a table. If the command is stopped or killed, the
    same command does the rest. On a corpus that is complete it compares the files with their checksums, and makes those
    again that differ.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from ssmzoo.train.corpora.tokenize import kept, summary
    from ssmzoo.train.corpora.tokenize import tokenize as make

    screen = console()
    columns = (BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
            task = bar.add_task("", total=None)
            made = make(
                named(sources),
                out,
                tokenizer,
                key=key,
                end=end,
                workers=workers,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        options = {"--tokenizer": tokenizer, "--key": key, "--end": end, "--workers": workers, "--out": out}
        words = [str(word) for name, value in options.items() if value not in (None, "text") for word in (name, value)]
        again = shlex.join(["ssmzoo", "tokenize", *sources, *words])
        raise stopped(f"{told(kept(out), out)}. The same command does the rest: {again}") from None
    numbers = ("documents", "tokens", "bytes")
    screen.print(table("", ("source", *numbers), summary(made), numbers))
    shards = f"{len(made.shards)} shard{'s' if len(made.shards) > 1 else ''}"
    screen.print(f"{count(made.tokens)} tokens in {shards}. Train on them: ssmzoo train MODEL --data {out}")


def told(shards: int, out: Path) -> str:
    """What is kept of a corpus that is not finished."""
    if not shards:
        return f"stopped before a shard in {out} was finished"
    return f"stopped; {shards} {'shard is' if shards == 1 else 'shards are'} kept in {out}"


def named(sources: list[str]) -> list[str] | dict[str, str]:
    """Paths; or paths by names, if sources have them, as in ``web=FOLDER``.

    Raises:
        ValueError: some have a name and others have none, or two have the same.
    """
    from ssmzoo.train.corpora.hub import is_hub

    pairs = [source.partition("=") for source in sources]
    with_name = [
        bool(equals) and not is_hub(source) and not Path(source).exists()
        for source, (_, equals, _) in zip(sources, pairs, strict=True)
    ]
    if not any(with_name):
        return sources
    names = [name for name, _, _ in pairs]
    for i, source in enumerate(sources):
        if not with_name[i] or names[i] in names[:i] or not all(pairs[i]):
            raise ValueError(f"`SOURCES`: each must have a name of its own, NAME=PATH, if one has; got {source!r}")
    return {name: path for name, _, path in pairs}
