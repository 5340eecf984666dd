"""``ssmzoo export``: a model as one file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmzoo.commands._output import console, size, table


def command(
    source: Annotated[
        str, typer.Argument(help="A run, a saved or published model's folder, an RWKV .pth, or a hub id.")
    ],
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    format: Annotated[
        str | None, typer.Option(help="gguf or safetensors. [default: by the ending of the file's name]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the weights. gguf: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1. safetensors: float32, bfloat16, "
            "float16, float64. [default: as they are]"
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A JSON file of the `tokenizers` library, for a folder that has none.")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of a model on the hub.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what would be written, and write nothing.")
    ] = False,
) -> None:
    """Write a model into one file: GGUF for llama.cpp, or safetensors.

    Every tensor is listed with its name in the file, its kind of numbers and the weights that it is made of. If the
    format has no place for one of them, or for an option of the model, an error names it and nothing is written.
    """
    from ssmkernels.core.names import unknown
    from ssmzoo.commands._file_formats import FILE_FORMATS
    from ssmzoo.commands._model import open_model

    name = format or target.suffix.removeprefix(".")
    if name not in FILE_FORMATS:
        raise ValueError(unknown("--format" if format else "ending of the file", name, list(FILE_FORMATS)))
    found = FILE_FORMATS[name]
    if dtype is not None and dtype not in found.dtypes:
        raise ValueError(unknown(f"--dtype of {name}", dtype, list(found.dtypes)))
    if tokenizer is not None and (no_tokenizer or not found.holds_tokenizer):
        raise ValueError(f"--tokenizer goes with --format gguf, without --no-tokenizer; got {tokenizer}")
    if target.is_dir():
        raise IsADirectoryError(f"`target` must be a file; {target} is a folder")
    model = open_model(source, revision)
    left_out = no_tokenizer or not found.holds_tokenizer
    export = found.prepare(model, dtype, None if left_out else _vocabulary(source, model.config.vocab_size, tokenizer))
    out = console()
    out.print(table(f"{source} as {export.name}", ("tensor", "shape", "dtype", "from"), export.rows))
    if dry_run:
        out.print(f"{len(export.rows)} tensors; nothing was written")
        return
    export.write(target)
    out.print(f"{len(export.rows)} tensors, {size(target.stat().st_size)}; written to {target}")


def _vocabulary(source: str, size: int | None, tokenizer: Path | None) -> Path | str:
    """The tokenizer's file that somebody named, that of the folder, or bytes.

    Raises:
        ValueError: there is none, and the model does not read bytes.
    """
    from ssmzoo.checkpoints.gguf.vocabulary import BYTES
    from ssmzoo.config import model_folder
    from ssmzoo.train.vocabulary import Bytes

    folder = model_folder(source)
    if tokenizer is not None:
        return tokenizer
    if folder is not None and (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    if size != Bytes.size:
        raise ValueError(
            f"{source} has {size} token ids and does not read bytes; give its --tokenizer, or leave it out by "
            "--no-tokenizer"
        )
    return BYTES
