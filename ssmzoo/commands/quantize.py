"""``ssmzoo quantize``: a model with its weights in 8 or 4 bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ssmzoo.commands._output import console, size

SEQUENCES, LENGTH = 32, 512  # of the text that calibration reads
CHARACTERS = 64 * SEQUENCES * LENGTH  # in which there will be as many tokens


def command(
    source: Annotated[str, typer.Argument(help="A trained, saved or published model's folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    bits: Annotated[int, typer.Option(help="Of a weight: 8 or 4.")] = 8,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="With 4 bits, the inputs that share a scale; a multiple of 32. [default: 64; embedding, head: 32]"
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help="With 4 bits, what maps multiply: numbers of 8 bits (int8) or as they come (float). [default: int8]"
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="With 4 bits, a UTF-8 text such as the model will see; rounding then follows it."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="With --calibrate: gptq, or awq, which scales large inputs. [default: gptq]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A JSON file of the `tokenizers` library, for a folder that has none.")
    ] = None,
) -> None:
    """Keep a model's weights in 8 or 4 bits, for faster decoding in less memory.

    The new folder is a model like any other: `ssmzoo generate` and `ssmzoo.build` take it.
    """
    import torch

    from ssmkernels.core.names import unknown
    from ssmzoo import build, quantize, save
    from ssmzoo.calibrating import METHODS
    from ssmzoo.checkpoints.folders import check_new
    from ssmzoo.checkpoints.hub import TOKENIZER, hub_id
    from ssmzoo.commands._vocabulary import vocabulary_of
    from ssmzoo.config import model_folder

    if bits not in (4, 8):
        raise ValueError(unknown("--bits", str(bits), ["4", "8"]))
    if calibrate is not None and bits != 4:
        raise ValueError(f"--calibrate goes with --bits 4; got --bits {bits}")
    if method is not None and method not in METHODS:
        raise ValueError(unknown("--method", method, METHODS))
    if method is not None and calibrate is None:
        raise ValueError(f"--method goes with --calibrate, a text to calibrate on; got --method {method} alone")
    check_new(out)
    folder = model_folder(source)
    if folder is None and hub_id(source) is None:
        raise FileNotFoundError(f"no weights at {source!r:.200}: give a model's folder or a hub id")
    model = build(source, device="cpu")
    tokens = None
    if calibrate is not None:
        try:
            with calibrate.open(encoding="utf-8") as text:
                beginning = text.read(CHARACTERS)
        except UnicodeDecodeError as error:
            raise ValueError(f"--calibrate: {calibrate} must be a text in UTF-8: {error}") from None
        ids = vocabulary_of(source, model.config, tokenizer).encode(beginning)
        length = min(LENGTH, len(ids))
        if not length:
            raise ValueError(f"--calibrate: {calibrate} is empty")
        tokens = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:SEQUENCES]
    before = sum(t.nbytes for t in {*model.state_dict(keep_vars=True).values()})
    quantize(
        model,
        f"int{bits}",
        calibrate=tokens,
        method=method or "gptq",
        group_size=group_size,
        activations=activations,
    )
    after = sum(t.nbytes for t in {*model.state_dict(keep_vars=True).values()})
    save(model, out)
    for name in TOKENIZER:
        if folder is not None and (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    console().print(f"{size(before)} of weights in {size(after)}; written to {out}")
