"""A model as a GGUF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.exporting import named_weights
from ssmzoo.checkpoints.families import family
from ssmzoo.checkpoints.fitting import SOME, UNREAD, described, family_reader, nearest, refusal_of
from ssmzoo.checkpoints.gguf.architectures import Architecture, architectures
from ssmzoo.checkpoints.gguf.experts import apart
from ssmzoo.checkpoints.gguf.needed import need_gguf
from ssmzoo.checkpoints.gguf.types import FILE_TYPES, packed, type_name, type_of
from ssmzoo.checkpoints.gguf.vocabulary import vocabulary_keys
from ssmzoo.checkpoints.published import used
from ssmzoo.checkpoints.renaming import Written, published
from ssmzoo.files import replacing
from ssmzoo.model import SequenceModel
from ssmzoo.quantized import QuantizedMap

# What llama.cpp has no choice of: sums along the layers are in 32 bits.
NO_CHOICE = ("residual_in_fp32",)
ANY = "ssmzoo"  # the family that holds every model


@dataclasses.dataclass(frozen=True)
class GGUF:
    """A model as a GGUF file will hold it.

    Attributes:
        name: of the kind of model.
        architecture: llama.cpp's name of it.
        keys: all of them.
        tensors: in the order of the file, with their own numbers still.
        types: the kind of numbers that each tensor will have, by its name.
    """

    name: str
    architecture: str
    keys: dict[str, Any]
    tensors: list[Written]
    types: dict[str, str]


def as_gguf(model: SequenceModel, dtype: torch.dtype | str | None = None, tokenizer: Path | str | None = None) -> GGUF:
    """A model as llama.cpp stores it.

    Args:
        model: of one of :func:`ssmzoo.checkpoints.gguf.architectures.architectures`.
        dtype: one of FILE_TYPES, or a torch.dtype of those; that of the model's weights if None.
        tokenizer: a JSON file of the `tokenizers` library, "bytes", or None for a file without a vocabulary.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: llama.cpp has no such model, an unknown ``dtype``, or a tokenizer that a GGUF file cannot express.
    """
    need_gguf()
    mapped = next((name for name, module in model.named_modules() if isinstance(module, QuantizedMap)), None)
    if mapped is not None:
        raise ValueError(
            f"save: `model` must have weights that are not quantised, as GGUF rounds in its own way; got {mapped} in "
            "few bits. Save the model that was quantised, with dtype='q8_0' or 'q4_0'"
        )
    found, given, tensors = _fitting(model)
    kind = type_name(dtype, max((t.tensor for t in tensors), key=Tensor.numel).dtype)
    own = found.keys(given)
    size = int(own["vocab_size"])
    keys = {
        "general.name": f"{found.NAME} {model.config.d_model} x {model.config.n_layers}",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{key if key.startswith("tokenizer.") else f"{found.ARCHITECTURE}.{key}": v for key, v in own.items()},
        **vocabulary_keys(tokenizer, size),
    }
    types = {t.name: type_of(t.name, t.tensor.shape, kind) for t in tensors}
    return GGUF(found.NAME, found.ARCHITECTURE, keys, tensors, types)


def _fitting(model: SequenceModel) -> tuple[Architecture, dict[str, Any], list[Written]]:
    """The first architecture that holds a model, the model in the words of its family, and its tensors.

    Raises:
        ValueError: there is none; names the first option or weight that has no place in the nearest.
    """
    description = described(model, "llama.cpp's architectures", outputs=("tokens", "classes"))
    refusals: list[tuple[int, str]] = []
    for found, kind in [(each, kind) for each in architectures() for kind in each.FAMILIES]:
        theirs = family(kind)
        held = 0  # a family that holds the model is nearer than any that does not
        try:
            given = theirs.config_json(description) | {"model_type": kind}
            refusal = refusal_of(description, family_reader(theirs), given, NO_CHOICE)
            if refusal is None:
                held = 2 * SOME if kind != ANY else 0
                tensors = _tensors(model, found, given)
                names = {written.name for written in tensors}
                elsewhere = (*NO_CHOICE, *getattr(found, "FOLDED", ()))
                refusal = refusal_of(description, _reader(found, names), found.keys(given), elsewhere)
                if refusal is None:
                    return found, given, tensors
        except (ValueError, TypeError, ArithmeticError, IndexError) as error:
            refusal = (SOME if kind != ANY else UNREAD, str(error))
        refusals.append((refusal[0] - held, f"{found.NAME} ({found.ARCHITECTURE}): {refusal[1]}"))
    raise ValueError(f"save: `model` has no place in llama.cpp's {nearest(refusals)}")


def _reader(found: Architecture, names: set[str]) -> Any:
    """From GGUF keys to values of our config."""

    def read(keys: Mapping[str, Any]) -> dict[str, Any]:
        given = found.given(keys, names)
        return used(family(given["model_type"]).config(given))

    return read


def _tensors(model: SequenceModel, found: Architecture, given: Mapping[str, Any]) -> list[Written]:
    tensors = apart(published(named_weights(model, None), found.rules(given), f"llama.cpp's {found.NAME}"))
    return found.finished(given, tensors) if hasattr(found, "finished") else tensors


def write_gguf(export: GGUF, path: Path) -> None:
    """Writes a file that is whole or not there at all; one tensor at a time is in memory twice.

    Raises:
        OSError: it cannot be written, as on a full disk.
        ValueError: a tensor's numbers are too large for the file's kind; nothing is written then.
    """
    import gguf
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, export.architecture)
        try:
            for key, value in export.keys.items():
                _add(writer, key, value)
            for name, tensor, _ in export.tensors:
                kind = gguf.GGMLQuantizationType[export.types[name].upper()]
                block, size = gguf.GGML_QUANT_SIZES[kind]
                nbytes = tensor.numel() // block * size
                writer.add_tensor_info(name, list(tensor.shape), np.dtype(np.float32), nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor, _ in export.tensors:
                writer.write_tensor_data(packed(name, tensor, export.types[name]))
        finally:
            writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """A key with the type that llama.cpp reads."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
