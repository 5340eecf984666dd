"""What a run learns from, opened and checked against its model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from ssmzoo.checkpoints.checksums import checksum
from ssmzoo.config import ModelConfig
from ssmzoo.train.checks import check_length, check_size, check_vocabulary
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.corpora.manifest import TOKENIZER, is_corpus, read_manifest
from ssmzoo.train.corpora.packed import load_corpus
from ssmzoo.train.data import Data, load_ids, load_text
from ssmzoo.train.labelled import LabelledData, load_labelled
from ssmzoo.train.masked import MaskedData, masked_data, masking_of
from ssmzoo.train.record import DataSource
from ssmzoo.train.vocabulary import Vocabulary, open_vocabulary

AnyData = Data | MaskedData | LabelledData


def chosen_data(data: DataSource, config: TrainConfig) -> tuple[DataSource, TrainConfig]:
    """The data of a run, given or named by its settings; and the settings, with the tokenizer of a corpus.

    Raises:
        ValueError: both are there, or a setting does not fit what the data are; names it.
    """
    if data is not None and config.data is not None:
        raise ValueError(f"train: `data` is given twice, and the setting is {config.data!r}: leave one out")
    data = config.data if data is None else data
    folder = corpus_of(data)
    if folder is None:
        if config.mixture is not None:
            raise ValueError(
                "training setting `mixture` needs a corpus, which `ssmzoo tokenize` makes: leave it out, or name one"
            )
        return data, config
    tokenizer = read_manifest(folder).tokenizer
    if config.tokenizer is not None and (tokenizer is None or checksum(Path(config.tokenizer)) != tokenizer):
        raise ValueError(
            f"training setting `tokenizer` must be that of the corpus {folder}, which is "
            f"{'bytes' if tokenizer is None else folder / TOKENIZER}; got {config.tokenizer}: leave it out"
        )
    if tokenizer is not None and config.tokenizer is None:
        config = dataclasses.replace(config, tokenizer=str(folder / TOKENIZER))
    return data, config


def load_data(data: DataSource, model_config: ModelConfig, config: TrainConfig) -> tuple[AnyData, Vocabulary | None]:
    """The data, and the vocabulary where they are text; both checked against the model.

    Raises:
        ValueError, FileNotFoundError: they do not fit.
    """
    size, masked = model_config.vocab_size or 0, config.learns_masked(model_config)
    vocabulary = None
    if model_config.output == "classes":
        if isinstance(data, Tensor | np.ndarray):
            raise ValueError(
                "train: `data` of a classifier must be a .npz file with `inputs` and `labels`; got an array"
            )
        files = [data] if isinstance(data, str | os.PathLike) else data or []
        return load_labelled(files, model_config, config.length, config.validation), None
    check_length(model_config, config.length)
    folder = corpus_of(data)
    if folder is not None and masked:
        raise ValueError(
            f"train: `data` must be text for a model that learns masked tokens; got the corpus {folder}, which serves "
            "models of the next token"
        )
    if isinstance(data, Tensor | np.ndarray):
        loaded = load_ids(data, config.validation)
    else:
        vocabulary = open_vocabulary(config.tokenizer)
        check_vocabulary(vocabulary, size, masked)
        sources = [data] if isinstance(data, str | os.PathLike) else data
        if folder is None:
            loaded = load_text(sources, vocabulary, config.validation)
        else:
            loaded = load_corpus(folder, config.validation, config.length, config.mixture)
    if folder is None:
        check_size(loaded, config.length)
    if isinstance(data, Tensor | np.ndarray) and data.max() >= size:
        raise ValueError(f"train: `data` must hold ids below vocab_size={size}; got {int(data.max())}")
    return masked_data(loaded, masking_of(config, vocabulary, size)) if masked else loaded, vocabulary


def corpus_of(data: DataSource) -> Path | None:
    """The folder, if the data are a corpus.

    Raises:
        ValueError: one corpus among other data.
    """
    if data is None or isinstance(data, Tensor | np.ndarray):
        return None
    folders = [Path(source) for source in ([data] if isinstance(data, str | os.PathLike) else data)]
    found = [folder for folder in folders if is_corpus(folder)]
    if found and len(folders) > 1:
        raise ValueError(
            f"train: `data` must be one corpus or text; got {found[0]} beside others: make one corpus of all sources"
        )
    return found[0] if found else None
