"""A small model behind ``ssmzoo.serve`` in this process, for tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ssmzoo
from ssmzoo import serve
from ssmzoo.train.vocabulary import Bytes, Vocabulary

NAME = "small"
HYBRID = {
    "d_model": 16,
    "n_layers": 3,
    "vocab_size": 256,
    "pattern": ["mamba", "attention", "mamba2"],
    "mixers": {"attention": {"head_dim": 8}, "mamba2": {"headdim": 8, "d_state": 4}},
}


def small_model(**options: Any) -> ssmzoo.SequenceModel:
    """In float64: so that rounding, which a batch changes, never changes a token."""
    torch.manual_seed(0)
    return ssmzoo.build({**HYBRID, **options}).double().eval()


@contextlib.contextmanager
def served(
    model: ssmzoo.SequenceModel,
    folder: Path | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    api_key: str | None = None,
    grace: float = 5.0,
    limits: serve.Limits | None = None,
    **options: Any,
) -> Iterator[tuple[str, serve.Service]]:
    """A server with an engine of these options → its address and what its routes share."""
    worker = serve.Worker(ssmzoo.Engine(model, **{"page_size": 4, "chunk": 8, "max_batch": 4, **options}))
    prompter = serve.Prompter(vocabulary or Bytes(), folder)
    service = serve.Service(worker, prompter, NAME, limits or serve.Limits())
    server = serve.Server(serve.create_app(service, api_key), service, grace)
    place = serve.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
