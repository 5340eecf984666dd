"""``ssmzoo generate``: text from a trained model, as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ssmzoo.screen import printable, say


def command(
    model: Annotated[str, typer.Argument(help="The folder of a trained model, or a model's name for random weights.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="The largest number of tokens to add.")] = 300,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 always takes the most likely token. [default: 0.8]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample only from the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the fewest tokens that add up to probability p.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample from tokens at least this fraction as likely as the most likely one.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, repeated tokens become less likely.")] = 1.0,
    eos_id: Annotated[list[int] | None, typer.Option(help="Stop after this token id; repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text, which is not printed; repeatable.")
    ] = None,
    num_beams: Annotated[
        int, typer.Option(help="With more than 1, use beam search instead of sampling, and print the text at the end.")
    ] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A JSON file of the `tokenizers` library, for a folder that has none."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default a GPU if there is one.")] = None,
) -> None:
    """Continue a prompt with a trained model, and print the text as it is generated."""
    import torch

    from ssmkernels import keep_memory
    from ssmzoo import build
    from ssmzoo.commands._vocabulary import vocabulary_of
    from ssmzoo.config import model_folder
    from ssmzoo.devices import fit_threads, usable
    from ssmzoo.generate import check_model
    from ssmzoo.train.vocabulary import decode

    if not prompt:
        raise ValueError("`prompt` is empty: give the model at least one character")
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError(f"`prompt` must be UTF-8 text; got {prompt!r:.80}")
    keep_memory()
    fit_threads()
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else found.type
    usable(device, "--device")
    built = build(model, device=device)
    check_model(built)
    if model_folder(model) is None:
        say(f"{model} holds no trained weights: the output is noise", sys.stderr)
    vocabulary = vocabulary_of(model, built.config, tokenizer)
    if num_beams == 1 and temperature is None:
        temperature = 0.8
    step, show = vocabulary.decoder(), Shown(prompt, stop or [])
    ids = vocabulary.encode(prompt)
    try:
        out = built.generate(
            [ids],
            max_new_tokens,
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos_id=eos_id or None,
            stream=None if num_beams > 1 else lambda tokens: show(step(int(tokens[0]))),
            seed=seed,
            num_beams=num_beams,
        )
        show(decode(vocabulary, out[0][len(ids) :]) if num_beams > 1 else "")
    finally:
        show.end()


class Shown:
    """Prints a prompt, once there is something to follow it, and text piece by piece up to a stop string.

    On a terminal, control characters are spelled out.
    """

    def __init__(self, prompt: str, stops: list[str]):
        self._prompt: str | None = prompt
        self._shown = printable if sys.stdout.isatty() else str  # a file or a program gets the text as it is
        self._stops = [stop for stop in stops if stop]
        self._held = ""  # may be the start of a stop string
        self._stopped = False

    def __call__(self, text: str) -> bool:
        """Prints what can be; returns whether a stop string came."""
        if self._prompt is not None:
            sys.stdout.write(self._shown(self._prompt))
            self._prompt = None
        if self._stopped:
            return True
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self._held, self._stopped = self._held[: min(found)], True
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        keep = 0 if self._stopped else max(lengths, default=0)
        sys.stdout.write(self._shown(self._held[: len(self._held) - keep]))
        self._held = self._held[len(self._held) - keep :]
        sys.stdout.flush()
        return self._stopped

    def end(self) -> None:
        """Prints what was held back, and ends the line, if one was begun."""
        if self._prompt is None:
            sys.stdout.write(self._shown(self._held) + "\n")
            sys.stdout.flush()
