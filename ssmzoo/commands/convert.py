"""``ssmzoo convert``: a model from one format on disk to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from ssmzoo.commands._output import console, count, size, table

DTYPES = ("float32", "bfloat16", "float16", "float64")


def command(
    source: Annotated[str, typer.Argument(help="A saved or published model's folder, an RWKV .pth, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    to: Annotated[str, typer.Option(help="The format: transformers, original (the authors' own) or ssmzoo.")],
    model_type: Annotated[
        str | None,
        typer.Option(help="For transformers, its name of the architecture. [default: the first that can hold it]"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}. [default: as they are]")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The most bytes of weights in one file.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of a model on the hub.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what would be written, and write nothing.")
    ] = False,
) -> None:
    """Convert a model between the formats of ssmzoo, of transformers and of the authors.

    Every tensor is listed with its name in the new format and the weights that it is made of. If the format has no
    place for one of them, or for an option of the model, an error names it and nothing is written.
    """
    import torch

    from ssmkernels.core.names import unknown
    from ssmzoo.checkpoints.exporting import FORMATS, Format, exported
    from ssmzoo.checkpoints.folders import check_new, size_of, write_folder
    from ssmzoo.commands._model import open_model
    from ssmzoo.pretrained import save

    if to not in FORMATS:
        raise ValueError(unknown("format in --to", to, FORMATS))
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(unknown("--dtype", dtype, DTYPES))
    check_new(target)
    largest = size_of(max_shard_size)
    model = open_model(source, revision)
    wanted = None if dtype is None else getattr(torch, dtype)
    export = exported(model, cast(Format, to), wanted, model_type)
    columns = ("tensor", "shape", "dtype", "from")
    rows = [
        [name, " ".join(map(str, tensor.shape)) or "1", str(tensor.dtype).removeprefix("torch."), ", ".join(sources)]
        for name, tensor, sources in export.weights
    ]
    out = console()
    out.print(table(f"{source} as {export.name}", columns, rows))
    total = sum(w.tensor.nbytes for w in export.weights)
    numbers = sum(w.tensor.numel() for w in export.weights)
    what = f"{len(rows)} tensors, {count(numbers)} numbers, {size(total)}"
    if dry_run:
        out.print(f"{what}; nothing was written")
        return
    if to == "ssmzoo":
        save(model, target, dtype=wanted)
    else:
        write_folder(export, target, largest)
    out.print(f"{what}; written to {target}")
