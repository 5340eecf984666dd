"""``ssmzoo generate``: text from a trained model, as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[
        str, typer.Argument(help="The folder of a trained model; or a model's name, with random weights.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to add, at most.")] = 300,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens that reach p.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens this fraction as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what is there already.")] = 1.0,
    eos_id: Annotated[int | None, typer.Option(help="Stop after this token id.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A `tokenizers` JSON file, where the folder has none and it is not a byte model."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="As PyTorch names it; a GPU if there is one, by default.")] = None,
) -> None:
    """Continue a prompt with a trained model, and print the text as it comes."""
    import torch

    from ssmkernels import keep_memory
    from ssmzoo import build
    from ssmzoo.train.vocabulary import Bytes, open_vocabulary

    if not prompt:
        raise ValueError("the prompt is empty: give the model at least one character to go on from")
    keep_memory()
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else found.type
    built = build(model, device=device)
    if not Path(model).is_dir():
        print(f"{model} holds no trained weights: what follows is noise", file=sys.stderr)
    beside = Path(model) / "tokenizer.json"
    if tokenizer is None and beside.is_file():
        tokenizer = beside
    if tokenizer is None and built.config.vocab_size != Bytes.size:
        raise ValueError(
            f"{model} has {built.config.vocab_size} token ids and does not read bytes: name its --tokenizer"
        )
    vocabulary = open_vocabulary(tokenizer)
    step = vocabulary.decoder()

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    ids = vocabulary.encode(prompt)
    show(prompt)
    built.generate(
        [ids],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_id=eos_id,
        stream=lambda tokens: show(step(int(tokens[0]))),
        seed=seed,
    )
    show("\n")
