"""``ssmzoo serve``: a model behind an HTTP server with OpenAI's routes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ssmzoo.commands._model import Device, Draft, DraftTokens, Source, TokenizerFile, draft_of, model_of
from ssmzoo.screen import say

KEY = "SSMZOO_API_KEY"


def command(
    model: Source,
    host: Annotated[str, typer.Option(help="The address to listen on; by default this machine alone can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the name of its folder.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help=f"What clients have to send. The variable {KEY} does the same, hidden from `ps`.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Room for states and caches, such as 512MiB or 4GiB.")] = "1GiB",
    max_batch: Annotated[int, typer.Option(min=1, help="Most answers that are written at once.")] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Most answers that wait; further requests get the status 429.")
    ] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = 4096,
    max_choices: Annotated[int, typer.Option(min=1, help="Most answers of one request.")] = 16,
    max_body: Annotated[str, typer.Option(help="The largest body of a request.")] = "1MiB",
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for answers that are under way at SIGTERM or Ctrl-C.")
    ] = 30.0,
    eos_id: Annotated[
        list[int] | None, typer.Option(help="End answers at this token id, besides the tokenizer's; repeatable.")
    ] = None,
    draft: Draft = None,
    draft_tokens: DraftTokens = 8,
    tokenizer: TokenizerFile = None,
    device: Device = None,
) -> None:
    """Serve a model over HTTP: /v1/completions, /v1/chat/completions and /v1/models, as OpenAI's clients call them.

    Many requests are answered at once within the given memory. docs/serving.md says more.
    """
    try:
        import ssmzoo.serve as serving
    except ImportError as error:
        raise ImportError(f"`ssmzoo serve` needs {error.name}: pip install 'ssmzoo[serve]'") from None
    from ssmzoo import Engine
    from ssmzoo.checkpoints.folders import size_of
    from ssmzoo.commands._vocabulary import folder_of, vocabulary_of

    key = api_key if api_key is not None else os.environ.get(KEY)
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ValueError(f"--api-key (or {KEY}) must be printable ASCII characters without spaces, at least one")
    limits = serving.Limits(size_of(max_body, "--max-body"), max_tokens, max_choices, max_waiting)
    budget = size_of(memory, "--memory")
    place = serving.listen(host, port)  # before the model is loaded, which may take long
    built = model_of(model, device)
    vocabulary, folder = vocabulary_of(model, built.config, tokenizer), folder_of(model)
    for id in eos_id or []:
        if not 0 <= id < (built.config.vocab_size or 0):
            raise ValueError(f"--eos-id must be from 0 to {(built.config.vocab_size or 0) - 1}; got {id}")
    prompter = serving.Prompter(vocabulary, folder, eos_id or [])
    called = name if name is not None else Path(model).name
    drafts = draft_of(draft, str(built.device))
    worker = serving.Worker(Engine(built, memory=budget, max_batch=max_batch, draft=drafts, draft_tokens=draft_tokens))
    service = serving.Service(worker, prompter, called, limits)
    address, bound, *_ = place.getsockname()
    shown = f"[{address}]" if ":" in address else address
    if key is None and not address.startswith("127.") and address != "::1":
        say(f"anybody who reaches {shown}:{bound} can use the model: --api-key asks for a key", sys.stderr)
    say(f"{called} is served at http://{shown}:{bound}/v1")
    serving.run(serving.create_app(service, key), service, place, grace)
