"""Models on disk: our own folders, published checkpoints of Mamba, Mamba-2, hybrids and RWKV-7, and GGUF files.

A saved model is a folder with ``config.yaml``, the architecture, and ``model.safetensors``, the weights. A
weight used at several places (a tied embedding, a shared mixer) is stored once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from ssmkernels.core.memory import blocks_apart
from ssmkernels.core.names import unknown
from ssmzoo.checkpoints import checksums, sharded
from ssmzoo.checkpoints.exporting import FORMATS, Format, exported, named_weights
from ssmzoo.checkpoints.folders import check_new, size_of, write_folder
from ssmzoo.checkpoints.gguf.reading import from_gguf, gguf_config
from ssmzoo.checkpoints.gguf.writing import as_gguf, write_gguf
from ssmzoo.checkpoints.published import (
    convert_mamba_state_dict,
    convert_state_dict,
    published_config,
    published_type,
    published_weights,
    take_converted,
)
from ssmzoo.checkpoints.rwkv7 import from_pth
from ssmzoo.checkpoints.tensors import read_tensors, write_tensors
from ssmzoo.checkpoints.weights import assign, check_storable, main_dtype, skeleton
from ssmzoo.config import ModelConfig, load_config, model_folder
from ssmzoo.files import replacing
from ssmzoo.footprint import check_memory, footprint
from ssmzoo.model import SequenceModel

__all__ = ["CONFIG", "WEIGHTS", "architecture", "convert_mamba_state_dict", "convert_state_dict", "load", "save"]

CONFIG, WEIGHTS, PTH, GGUF, PUBLISHED = "config.yaml", "model.safetensors", "model.pth", "model.gguf", "config.json"


def save(
    model: SequenceModel,
    folder: str | os.PathLike[str],
    format: Format | Literal["gguf"] = "ssmzoo",
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    model_type: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model into a folder, which is made if need be.

    In our own format these are ``config.yaml`` and ``model.safetensors``. Each file appears whole or not at all: a
    crash leaves the one that was there before. A folder in another format appears whole or not at all; it must be new
    or empty. Options that no output depends on, such as ``dropout`` or how weights start, are left out there. A GGUF
    file takes the place of one that was there.

    Args:
        model: of any architecture, for our own format.
        folder: where it goes; for "gguf", a folder for ``model.gguf``, or the path of a file that ends in ``.gguf``.
        format: "ssmzoo"; "transformers", what its ``AutoModelForCausalLM.from_pretrained`` loads, with equal logits;
            "original", what the authors of Mamba, Mamba-2, Mamba-3 and RWKV-7 publish; or "gguf", one file for
            llama.cpp, for which the gguf package must be installed.
        dtype: of the weights, but for those that the papers keep in float32; their own if None. For "gguf", also a
            name: "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0" or "q5_1".
        max_shard_size: most bytes of weights in a file, or a text such as "5GB"; our own format has one file.
        model_type: for "transformers", its name of the architecture, such as "bamba"; if None, the first of those that
            can hold the model.
        tokenizer: for "gguf", a JSON file of the `tokenizers` library, or "bytes"; None leaves the vocabulary out.

    Raises:
        ImportError: the format is "gguf", and the package is not installed.
        OSError: a file cannot be written, as on a full disk, or (FileExistsError) the folder holds files already.
        TypeError: ``model`` is no SequenceModel, or ``folder`` no path.
        ValueError: the model has other weights than its config asks for, as with adapters; a weight holds NaN, which
            :func:`load` refuses too; the config ties the head to the embedding, and the model's are two weights; an
            unknown format; or a model that the format cannot hold, with the first option or weight that has no place.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"save: `model` must be a SequenceModel; got {type(model).__name__}")
    if format not in (*FORMATS, "gguf"):
        raise ValueError(unknown("`format` of save", str(format), [*FORMATS, "gguf"]))
    named = format == "gguf" and isinstance(dtype, str)
    if dtype is not None and not named and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"save: `dtype` must be a floating-point torch.dtype such as torch.bfloat16; got {dtype!r}")
    for option, value, wanted in (("model_type", model_type, "transformers"), ("tokenizer", tokenizer, "gguf")):
        if value is not None and format != wanted:
            raise ValueError(f"save: `{option}` goes with the format {wanted!r}; got {format!r}")
    if model.wants_tied and not model.tied:
        raise ValueError(
            "save: with `tie_embeddings` in its config, `model` must have one weight for embedding and head; got two. "
            "Call model.tie_weights() to use the embedding's, or set model.config.tie_embeddings to False"
        )
    check_storable(model)
    folder, size = _path("save", folder), size_of(max_shard_size)
    if format == "gguf":
        export = as_gguf(model, dtype, None if tokenizer is None else _path("save", tokenizer, "tokenizer"))
        write_gguf(export, folder if folder.suffix == ".gguf" else folder / GGUF)
        return
    assert not isinstance(dtype, str)
    if format != "ssmzoo":
        check_new(folder)
        write_folder(exported(model, format, dtype, model_type), folder, size)
        return
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous().cpu() for name, tensor in named_weights(model, dtype).items()}
    with replacing(folder / WEIGHTS) as path:
        write_tensors(weights, path)
        (folder / checksums.SUMS).unlink(missing_ok=True)  # those of a run's own weights, which are replaced now
    with replacing(folder / CONFIG) as path:
        path.write_text(model.config.to_yaml())


def architecture(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The config of a named model, of a YAML file, or of a folder, whose weights need not be there.

    Raises:
        FileNotFoundError: a path where nothing is, or a folder without a config.
        ValueError, TypeError: no such model, or a config that is none.
    """
    folder = model_folder(name_or_path)
    if folder is None:
        return load_config(name_or_path)
    if folder.is_file():
        return gguf_config(folder)
    if (folder / CONFIG).is_file():
        return load_config(folder / CONFIG)
    if (folder / PUBLISHED).is_file():
        return published_config(folder / PUBLISHED)
    raise FileNotFoundError(f"{folder} holds no model: there is no {CONFIG} in it, nor a {PUBLISHED}")


def _path(function: str, folder: object, argument: str = "folder") -> Path:
    """What an argument gives, as a path.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"{function}: `{argument}` must be a path; got {type(folder).__name__}")
    if not os.fspath(folder):
        raise ValueError(f"{function}: `{argument}` must be a path, such as '.' for the current folder; got ''")
    return Path(folder)


@blocks_apart(only_if_kept=True)  # gaps of the file's dtype, where weights are converted, would fit nothing again
def load(
    folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SequenceModel:
    """The model that a folder holds.

    No weights are made but those in the file. Together they take the file's size; where ``dtype`` is another than the
    file's, the larger of the two sizes, and the largest weight once more while they are converted, or while its parts
    in a published file are put together. PyTorch's random state is left as it is, unless a module draws buffers that no
    file holds.

    Args:
        folder: what :func:`save` or a training run wrote; or a published checkpoint with a ``config.json``: Mamba
            or Mamba-2 as state-spaces stores it (``pytorch_model.bin``); Mamba, Falcon Mamba or Mamba-2 as transformers
            stores it (``model.safetensors``), or a hybrid of :mod:`ssmzoo.checkpoints.families`. Weights may be cut
            into shards, with their index beside them. Or the ``.pth`` file of an RWKV-7 as its authors publish it, or a
            folder with it under the name ``model.pth``. Or a GGUF file of one of llama.cpp's architectures that the
            zoo has, whose numbers in few bits become float32.
        device: where the weights go; PyTorch's default device if None.
        dtype: their dtype; the one they were saved in if None. What the papers keep in float32 stays there.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing.
        ValueError, TypeError: a damaged file (a run's and a checkpoint's are compared with their checksums), a config
            that does not fit, or weights that do not fit the config, by name.
    """
    folder = _path("load", folder)
    if (folder / PTH).is_file():
        folder = folder / PTH
    if folder.suffix == ".pth" and folder.is_file():
        source = folder
        config, weights = from_pth(read_tensors(source), str(source))
    elif folder.suffix == ".gguf" and not folder.is_dir():
        source = folder
        config, weights = from_gguf(source)
    elif not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give one that ssmzoo.pretrained.save or `ssmzoo train` wrote")
    elif (folder / CONFIG).is_file():
        folder = checksums.newest(folder, WEIGHTS)
        config, source = ModelConfig.from_yaml(folder / CONFIG), folder / WEIGHTS
        if not source.is_file() and sharded.is_sharded(folder):
            weights = sharded.read_whole(folder, sharded.WEIGHTS_KIND)
        else:
            weights = read_tensors(source)
    elif (folder / PUBLISHED).is_file():
        config = published_config(folder / PUBLISHED)
        source, found = published_weights(folder)
        weights = take_converted(found, *published_type(folder / PUBLISHED))
        del found  # as `assign` takes them out of the one dictionary, one by one
    else:
        raise FileNotFoundError(f"{folder} holds no model: there is no {CONFIG} in it, nor a {PUBLISHED}")
    if dtype is None:
        dtype = main_dtype(weights)
    elif not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"load: `dtype` must be a floating-point torch.dtype such as torch.bfloat16; got {dtype!r}")
    where = torch.device(device if device is not None else torch.get_default_device())
    if where.type not in ("cpu", "meta"):  # on a CPU the weights are there already
        taken = sum(weight.nbytes for weight in weights.values()) if config.quantization else None
        check_memory(config, where, dtype, taken)
    if config.n_layers > len(weights):  # each layer has a weight of its own; no time goes into thousands of others
        raise ValueError(
            f"the weights in {source} do not fit the config: it has n_layers={config.n_layers}, and they are "
            f"{len(weights)} tensors"
        )
    try:
        model = skeleton(config, where, dtype, weights, str(source))
    except (RuntimeError, OverflowError):
        footprint(config)  # says which size PyTorch cannot hold
        raise
    assign(model, weights, str(source), where)
    return model
