"""``ssmzoo generate``: text from a trained model, as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ssmzoo.commands._model import Device, Draft, DraftTokens, Source, TokenizerFile, draft_of, model_of
from ssmzoo.screen import printable


def command(
    model: Source,
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
    presence_penalty: Annotated[
        float, typer.Option(help="From -2 to 2; above 0, tokens that were generated before become less likely.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="From -2 to 2; above 0, the less likely the more often they were generated.")
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=NUMBER",
            help="From -100 to 100, added to the logit of this token id; repeatable. Or a JSON object of them, as in "
            "OpenAI's API.",
        ),
    ] = None,
    eos_id: Annotated[list[int] | None, typer.Option(help="Stop after this token id; repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text, which is not printed; repeatable.")
    ] = None,
    num_beams: Annotated[
        int, typer.Option(help="With more than 1, use beam search instead of sampling, and print the text at the end.")
    ] = 1,
    draft: Draft = None,
    draft_tokens: DraftTokens = 8,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    tokenizer: TokenizerFile = None,
    device: Device = None,
) -> None:
    """Continue a prompt with a trained model, and print the text as it is generated."""
    from ssmzoo.commands._biases import parse_biases
    from ssmzoo.commands._vocabulary import vocabulary_of
    from ssmzoo.train.vocabulary import decode

    if not prompt:
        raise ValueError("`prompt` is empty: give the model at least one character")
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError(f"`prompt` must be UTF-8 text; got {prompt!r:.80}")
    if "" in (stop or []):
        raise ValueError("--stop must be a text of at least one character; got an empty one")
    biases = parse_biases(logit_bias or [])
    built = model_of(model, device)
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
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=biases,
            eos_id=eos_id or None,
            stream=None if num_beams > 1 else lambda tokens: show(step(int(tokens[0]))),
            seed=seed,
            num_beams=num_beams,
            draft=draft_of(draft, str(built.device)),
            draft_tokens=draft_tokens,
        )
        show(decode(vocabulary, out[0][len(ids) :]) if num_beams > 1 else "")
    finally:
        show.end()


class Shown:
    """Prints a prompt, once there is something to follow it, and text piece by piece up to a stop string.

    On a terminal, control characters are spelled out.
    """

    def __init__(self, prompt: str, stops: list[str]):
        from ssmzoo.generate import StopStrings

        self._prompt: str | None = prompt
        self._shown = printable if sys.stdout.isatty() else str  # a file or a program gets the text as it is
        self._text = StopStrings(stops)

    def __call__(self, text: str) -> bool:
        """Prints what can be; returns whether a stop string came."""
        if self._prompt is not None:
            sys.stdout.write(self._shown(self._prompt))
            self._prompt = None
        sys.stdout.write(self._shown(self._text.add(text)))
        sys.stdout.flush()
        return self._text.stopped

    def end(self) -> None:
        """Prints what was held back, and ends the line, if one was begun."""
        if self._prompt is None:
            sys.stdout.write(self._shown(self._text.rest()) + "\n")
            sys.stdout.flush()
