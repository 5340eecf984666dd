"""The vocabulary of a model that reads text."""

from __future__ import annotations

from pathlib import Path

from ssmzoo.checkpoints.hub import fetch, hub_id
from ssmzoo.config import ModelConfig, model_folder
from ssmzoo.train.vocabulary import Bytes, Vocabulary, open_vocabulary


def folder_of(source: str) -> Path | None:
    """The folder of a model's weights, in the cache where it is one of the hub's; None where there is none."""
    name = hub_id(source)
    return model_folder(source) if name is None else fetch(name)[0]


def vocabulary_of(source: str, config: ModelConfig, tokenizer: Path | None) -> Vocabulary:
    """That of a file, of the model's own folder, or bytes.

    Args:
        source: what the model was built from.
        config: of the model.
        tokenizer: a file of the `tokenizers` library that somebody named; None for the folder's.

    Raises:
        ValueError: there is none, and the model does not read bytes.
    """
    folder = folder_of(source)
    if tokenizer is None and folder is not None and (folder / "tokenizer.json").is_file():
        tokenizer = folder / "tokenizer.json"
    if tokenizer is None and config.vocab_size != Bytes.size:
        raise ValueError(f"{source} has {config.vocab_size} token ids and does not read bytes; give its --tokenizer")
    return open_vocabulary(tokenizer)
