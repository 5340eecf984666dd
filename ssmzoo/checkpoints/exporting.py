"""Models in the formats of others: what their ``config.json`` says, and their weights.

A model goes out through the same declarations by which it comes in (:mod:`ssmzoo.checkpoints.families`). Whether a
format can hold it is not guessed: the config is read back and compared, option by option.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels.core.names import unknown
from ssmzoo.checkpoints import rwkv7, state_spaces
from ssmzoo.checkpoints.description import Description, differences
from ssmzoo.checkpoints.families import Family, family, rules_to_write, writable_families
from ssmzoo.checkpoints.published import used
from ssmzoo.checkpoints.renaming import Written, published
from ssmzoo.checkpoints.weights import stored_weights
from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel
from ssmzoo.quantized import QuantizedMap
from ssmzoo.wide import KeepsFloat32

Format = Literal["ssmzoo", "transformers", "original"]
FORMATS = typing.get_args(Format)

Reader = Callable[[Mapping[str, Any]], dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Export:
    """A model in a published format.

    Attributes:
        name: of the format's kind of model.
        config: what goes into ``config.json``; None where the format has no such file.
        weights: every tensor that is written.
        file: the name of the file of weights.
    """

    name: str
    config: dict[str, Any] | None
    weights: list[Written]
    file: str


def exported(model: SequenceModel, format: Format, dtype: torch.dtype | None, model_type: str | None) -> Export:
    """A model in a format: see :func:`as_transformers` and :func:`as_original`; as it is in ours."""
    if format == "ssmzoo":
        tensors = [Written(name, tensor, (name,)) for name, tensor in named_weights(model, dtype).items()]
        return Export("ssmzoo", None, tensors, "model.safetensors")
    return as_original(model, dtype) if format == "original" else as_transformers(model, dtype, model_type)


def as_transformers(model: SequenceModel, dtype: torch.dtype | None, model_type: str | None) -> Export:
    """A model as transformers stores it.

    Args:
        model: any of ours.
        dtype: of the weights but those that stay float32; their own if None.
        model_type: transformers' name of the architecture; if None, the first that can hold the model, but for
            "ssmzoo", which can hold any and needs ``import ssmzoo.integrations.transformers`` to be loaded.

    Raises:
        ValueError: no architecture can hold it; names the first option or weight that has no place.
    """
    if model_type is not None and model_type not in writable_families():
        raise ValueError(unknown("model_type", model_type, writable_families()))
    description = _described(model, "transformers' models of language")
    refusals: list[tuple[int, str]] = []
    for kind in [model_type] if model_type else [name for name in writable_families() if name != OURS]:
        found = family(kind)
        try:
            given = found.config_json(description) | {"model_type": kind}
        except (ValueError, TypeError, ArithmeticError, IndexError) as error:
            refusals.append((SOME, f"{found.NAME}: {error}"))
            continue
        refusal = _refusal(description, _reader(found), given)
        if refusal is None:
            tensors = published(named_weights(model, dtype), rules_to_write(found, given), found.NAME)
            main = max((t.tensor for t in tensors if t.tensor.is_floating_point()), key=Tensor.numel).dtype
            words = {"architectures": [found.ARCHITECTURE], "dtype": str(main).removeprefix("torch.")}
            tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            return Export(found.NAME, words | given | tokens, tensors, "model.safetensors")
        refusals.append((refusal[0], f"{found.NAME}: {refusal[1]}"))
    nearest = min(refusals, key=lambda pair: (pair[0], len(pair[1])))
    ours = "" if model_type else f"; `model_type` {OURS!r} holds any model"
    raise ValueError(f"save: `model` has no place in transformers' {nearest[1]}{ours}")


def as_original(model: SequenceModel, dtype: torch.dtype | None) -> Export:
    """A model as the authors of Mamba, -2 and -3 (with a ``config.json``) or of RWKV-7 (weights alone) publish theirs.

    Raises:
        ValueError: neither can hold it; names the first option or weight that has no place.
    """
    description = _described(model, "the original formats")
    if set(description.kinds) == {"rwkv7"}:
        tensors = published(named_weights(model, dtype), rwkv7.RULES, "RWKV-7")
        given = rwkv7.config_of({written.name: written.tensor for written in tensors})
        refusal = _refusal(description, lambda read: dict(read), given)
        if refusal is None:
            return Export("RWKV-7", None, tensors, "model.pth")
        raise ValueError(f"save: `model` has no place in the original RWKV-7: {refusal[1]}")
    if not {"mamba", "mamba2", "mamba3"}.intersection(description.kinds):
        raise ValueError(
            f"save: `model` has no place in the original formats, of Mamba, Mamba-2, Mamba-3 and RWKV-7: "
            f"`layers.0.mixer.kind` is {description.kinds[0]!r}"
        )
    given = state_spaces.config_json(description)
    refusal = _refusal(description, state_spaces.config_from_state_spaces, given)
    if refusal is not None:
        raise ValueError(f"save: `model` has no place in state-spaces' format: {refusal[1]}")
    tensors = published(named_weights(model, dtype), state_spaces.rules_for(given), "state-spaces' format")
    if model.tied:  # which its authors' class asks for under both names
        tensors += [t._replace(name="lm_head.weight") for t in tensors if t.name == "backbone.embedding.weight"]
    return Export("state-spaces", given, tensors, "pytorch_model.bin")


# How far a model is from a format, beyond the number of options that differ.
SOME = 10**6  # an option has a value that the format has no words for
OURS = "ssmzoo"
MANY = 10**9  # not even the kinds of mixers are the same


def _described(model: SequenceModel, where: str) -> Description:
    """What its config says.

    Raises:
        ValueError: it is no model from tokens to tokens.
    """
    for name, wanted in (("d_input", None), ("output", "tokens")):
        value = getattr(model.config, name)
        if value != wanted:
            raise ValueError(f"save: `model` has no place in {where}: `{name}` is {value!r}")
    return Description(model.config)


def _reader(found: Family) -> Reader:
    return lambda given: used(found.config(given))


def _refusal(description: Description, read: Reader, given: Mapping[str, Any]) -> tuple[int, str] | None:
    """How many options a config would not bring back, and the first of them; None where it brings back the model."""
    try:
        values = read(given)
        config = None if values is None else ModelConfig.from_dict(values)
    except (ValueError, TypeError, KeyError) as error:
        return MANY, str(error)
    kinds = [] if config is None else _kinds(config)
    if config is None or kinds != description.kinds:
        i = next((i for i, pair in enumerate(zip(kinds, description.kinds, strict=False)) if pair[0] != pair[1]), 0)
        return MANY, f"`layers.{i}.mixer.kind` is {description.kinds[i]!r}"
    try:
        found = differences(description, Description(config))
    except (ValueError, TypeError, RuntimeError) as error:
        return MANY, str(error)
    if not found:
        return None
    key, ours, theirs = found[0]
    return len(found), f"`{key}` is {ours!r:.80}, and would come back as {theirs!r:.80}"


def _kinds(config: ModelConfig) -> list[str]:
    """The mixer of each layer by its registered name, without building any."""
    return [config.mixer_options(config.entry_of_layer(i))["kind"] for i in range(config.n_layers)]


def named_weights(model: SequenceModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Each weight once, under the first of its names; in ``dtype``, but for those that stay float32, and scales."""
    wide = {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, KeepsFloat32)
        for name in module.float32_parameters
    }
    wide |= {f"{place}.scales" for place, module in model.named_modules() if isinstance(module, QuantizedMap)}
    found = {}
    for names, tensor in stored_weights(model):
        tensor = tensor.detach()
        convert = dtype is not None and tensor.is_floating_point() and not wide.intersection(names)
        found[names[0]] = tensor.to(dtype) if convert else tensor
    return found
