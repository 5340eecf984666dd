"""The formats of ``ssmzoo export``, each of which holds a model in one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ssmzoo.model import SequenceModel

Row = tuple[str, str, str, str]  # a tensor's name, shape and kind of numbers, and the weights it is made of


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model in a format, before it is written.

    Attributes:
        name: of the kind of model there.
        rows: of every tensor.
        write: writes the file.
    """

    name: str
    rows: list[Row]
    write: Callable[[Path], None]


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """A format.

    Attributes:
        what: it is for.
        dtypes: names of the kinds of numbers that it can hold.
        holds_tokenizer: whether a tokenizer goes into the file.
        prepare: of a model, the name of a kind of numbers or None for the model's own, and a tokenizer's file, "bytes"
            or None for none.
    """

    what: str
    dtypes: tuple[str, ...]
    holds_tokenizer: bool
    prepare: Callable[[SequenceModel, str | None, Path | str | None], Prepared]


def _gguf(model: SequenceModel, dtype: str | None, tokenizer: Path | str | None) -> Prepared:
    from ssmzoo.checkpoints.gguf.writing import as_gguf, write_gguf

    export = as_gguf(model, dtype, tokenizer)
    rows = [_row(t.name, t.tensor.shape, export.types[t.name], t.sources) for t in export.tensors]
    return Prepared(f"llama.cpp's {export.architecture}", rows, lambda path: write_gguf(export, path))


def _safetensors(model: SequenceModel, dtype: str | None, tokenizer: Path | str | None) -> Prepared:
    import torch

    from ssmzoo.checkpoints.exporting import named_weights
    from ssmzoo.checkpoints.tensors import write_tensors
    from ssmzoo.files import replacing

    wanted = None if dtype is None else getattr(torch, dtype)
    weights = {name: tensor.contiguous().cpu() for name, tensor in named_weights(model, wanted).items()}
    rows = [_row(name, t.shape, str(t.dtype).removeprefix("torch."), (name,)) for name, t in weights.items()]

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_tensors(weights, temporary)

    return Prepared("weights by the names of ssmzoo", rows, write)


def _row(name: str, shape: tuple[int, ...], kind: str, sources: tuple[str, ...]) -> Row:
    return name, " ".join(map(str, shape)) or "1", kind, ", ".join(sources)


def _named() -> dict[str, FileFormat]:
    from ssmzoo.checkpoints.gguf.types import FILE_TYPES

    return {
        "gguf": FileFormat("llama.cpp and the programs around it", tuple(FILE_TYPES), True, _gguf),
        "safetensors": FileFormat(
            "all weights by the names of ssmzoo", ("float32", "bfloat16", "float16", "float64"), False, _safetensors
        ),
    }


FILE_FORMATS = _named()
