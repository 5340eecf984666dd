"""The model of a command: with its weights to be written elsewhere, or to continue text with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ssmzoo.screen import say

if TYPE_CHECKING:
    from ssmzoo.model import SequenceModel

Source = Annotated[str, typer.Argument(help="The folder of a trained model, or a model's name for random weights.")]
TokenizerFile = Annotated[
    Path | None, typer.Option(help="A JSON file of the `tokenizers` library, for a folder that has none.")
]
Draft = Annotated[
    str | None,
    typer.Option(help="A smaller model that proposes tokens, as a folder; or `lookup`: what stood there before."),
]
DraftTokens = Annotated[int, typer.Option(min=1, max=64, help="Most tokens that are proposed at once.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default a GPU if there is one.")]


def model_of(source: str, device: str | None) -> SequenceModel:
    """The model on its device, with a process set up for decoding; says where its weights are random.

    Raises:
        ValueError, TypeError, OSError: no such model or device, or a model that cannot continue tokens.
    """
    import torch

    from ssmkernels import keep_memory
    from ssmzoo import build
    from ssmzoo.commands._vocabulary import folder_of
    from ssmzoo.devices import fit_threads, usable
    from ssmzoo.generate import check_model

    keep_memory()
    fit_threads()
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else found.type
    usable(device, "--device")
    built = build(source, device=device)
    check_model(built)
    if folder_of(source) is None and not source.endswith(".pth"):
        say(f"{source} holds no trained weights: the output is noise", sys.stderr)
    return built


def draft_of(source: str | None, device: str) -> SequenceModel | Literal["lookup"] | None:
    """What proposes tokens: a model on a device, ``"lookup"``, or nothing."""
    if source is None or source == "lookup":
        return cast(Literal["lookup"] | None, source)
    return model_of(source, device)


def open_model(source: str, revision: str | None) -> SequenceModel:
    """What a folder, an RWKV's .pth or the hub holds, on the CPU.

    Raises:
        FileNotFoundError: there are no weights there; a model's name alone is no source.
    """
    from ssmzoo import build
    from ssmzoo.checkpoints.hub import hub_id
    from ssmzoo.config import model_folder
    from ssmzoo.pretrained import load

    if source.endswith(".pth"):
        return load(source, "cpu")
    if model_folder(source) is None and hub_id(source) is None:
        raise FileNotFoundError(f"no weights at {source!r:.200}: give a model's folder, an RWKV's .pth, or a hub id")
    return build(source, device="cpu", revision=revision)
