"""A model out of a GGUF file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmzoo.checkpoints.families import family
from ssmzoo.checkpoints.gguf.architectures import Architecture, architecture
from ssmzoo.checkpoints.gguf.experts import together
from ssmzoo.checkpoints.gguf.header import Header, Stored, read_header
from ssmzoo.checkpoints.gguf.keys import check_kinds
from ssmzoo.checkpoints.gguf.needed import need_gguf
from ssmzoo.checkpoints.published import used
from ssmzoo.checkpoints.renaming import renamed
from ssmzoo.checkpoints.tensors import line
from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel

ARCHITECTURE = "general.architecture"

TYPES = "tokenizer.ggml.token_type_count"  # the only key of the vocabulary that says something of the model
# Those that have no value for each layer. The sections are of pictures' axes, which are the same for text.
OTHER_LISTS = ("rope.dimension_sections", "classifier.output_labels")

# Kinds of numbers that PyTorch has too; all others become float32.
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def from_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the weights, by our names, that a file holds; numbers in few bits become float32.

    Raises:
        FileNotFoundError, ImportError: there is no such file, or the gguf package is not installed.
        ValueError: a damaged file, or one of an architecture that the zoo does not have.
    """
    with _opened(path) as header:
        found, given, config = _described(header)
        weights = together({name: _tensor(path, stored, name) for name, stored in header.tensors.items()})
        weights = found.gathered(given, weights) if hasattr(found, "gathered") else weights
        return config, renamed(weights, found.rules(given), f"llama.cpp's {found.NAME}")


def gguf_config(path: Path) -> ModelConfig:
    """The config alone, without reading weights.

    Raises:
        FileNotFoundError, ImportError, ValueError: as :func:`from_gguf`.
    """
    with _opened(path) as header:
        return _described(header)[2]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Header]:
    """A file's header; what goes wrong with its content names the file."""
    need_gguf()
    header = read_header(path)
    try:
        yield header
    except KeyError as error:
        raise ValueError(f"{path}: the key {header.keys.get(ARCHITECTURE)}.{error.args[0]} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, ArithmeticError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} holds values that do not fit ({type(error).__name__}: {line(error)})") from None


def _described(header: Header) -> tuple[Architecture, dict[str, Any], ModelConfig]:
    """The architecture, the model in the words of its family, and our config, from which a model can be built."""
    name = header.keys.get(ARCHITECTURE)
    if not isinstance(name, str):
        raise ValueError(f"`{ARCHITECTURE}` must be a text; got {name!r:.80}")
    found = architecture(name)
    given = found.given(_own(header, f"{name}."), set(header.tensors))
    config = ModelConfig.from_dict(used(family(given["model_type"]).config(given)), "its keys")
    with torch.device("meta"):
        SequenceModel(config)
    return found, given, config


def _own(header: Header, prefix: str) -> dict[str, Any]:
    """The architecture's keys without its name, and how many token ids there are.

    Raises:
        ValueError: a value is of another kind than its key's, there are more layers than tensors, or no embedding.
    """
    keys = {key.removeprefix(prefix): value for key, value in header.keys.items() if key.startswith(prefix)}
    check_kinds(keys, prefix)
    check_kinds({TYPES: header.keys.get(TYPES, 0)}, "")
    layers, embedding = keys.get("block_count"), header.tensors.get("token_embd.weight")
    if type(layers) is not int or not 0 < layers <= len(header.tensors):
        raise ValueError(
            f"`{prefix}block_count` must be at most {len(header.tensors)}, as each layer has tensors; got "
            f"{layers!r:.80}"
        )
    if embedding is None:
        raise ValueError("it has no tensor `token_embd.weight`")
    if keys.get("embedding_length") == 0:
        raise ValueError(f"`{prefix}embedding_length` must be at least 1; got 0")
    lists = [key for key, value in keys.items() if isinstance(value, list) and key not in OTHER_LISTS]
    wrong = next((key for key in lists if len(keys[key]) != layers), None)
    if wrong is not None:
        raise ValueError(f"`{wrong}` must have {layers} values, one for each layer; got {len(keys[wrong])}")
    types = {TYPES: header.keys[TYPES]} if TYPES in header.keys else {}
    return keys | types | {"vocab_size": embedding.shape[0]}


def _tensor(path: Path, stored: Stored, name: str) -> Tensor:
    """A tensor's numbers, in memory of their own.

    Raises:
        ValueError: of a kind that cannot be read.
    """
    from gguf import GGMLQuantizationType, quants

    data = np.fromfile(path, np.uint8, stored.nbytes, offset=stored.start)
    if stored.kind in PLAIN:
        return torch.from_numpy(data).view(PLAIN[stored.kind]).view(stored.shape)
    try:
        with np.errstate(all="ignore"):  # scales that are no numbers: the weights that they give are refused by name
            numbers = quants.dequantize(data.reshape(*stored.shape[:-1], -1), GGMLQuantizationType[stored.kind])
    except NotImplementedError:
        raise ValueError(f"the tensor `{name:.80}` is of {stored.kind}, which the gguf package cannot read") from None
    return torch.from_numpy(numbers).view(stored.shape)
