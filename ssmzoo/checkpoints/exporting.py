"""Models in the formats of others: what their ``config.json`` says, and their weights.

A model goes out through the same declarations by which it comes in (:mod:`ssmzoo.checkpoints.families`). Whether a
format can hold it is not guessed: the config is read back and compared, option by option.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

import torch
from torch import Tensor

from ssmkernels.core.names import unknown
from ssmzoo.checkpoints import rwkv7, state_spaces
from ssmzoo.checkpoints.families import family, rules_to_write, writable_families
from ssmzoo.checkpoints.fitting import MANY, SOME, described, family_reader, nearest, refusal_of
from ssmzoo.checkpoints.renaming import Written, published
from ssmzoo.checkpoints.weights import stored_weights
from ssmzoo.model import SequenceModel
from ssmzoo.quantized import QuantizedMap
from ssmzoo.wide import KeepsFloat32

Format = Literal["ssmzoo", "transformers", "original"]
FORMATS = typing.get_args(Format)
OURS = "ssmzoo"


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
    description = described(model, "transformers' models of language", outputs=("tokens", "classes"))
    refusals: list[tuple[int, str]] = []
    for kind in [model_type] if model_type else [name for name in writable_families() if name != OURS]:
        found = family(kind)
        try:
            given = found.config_json(description) | {"model_type": kind}
        except (ValueError, TypeError, ArithmeticError, IndexError) as error:
            refusals.append((SOME, f"{found.NAME}: {error}"))
            continue
        refusal = refusal_of(description, family_reader(found), given)
        if refusal is None:
            tensors = published(named_weights(model, dtype), rules_to_write(found, given), found.NAME)
            main = max((t.tensor for t in tensors if t.tensor.is_floating_point()), key=Tensor.numel).dtype
            words = {"architectures": [found.ARCHITECTURE], "dtype": str(main).removeprefix("torch.")}
            tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            return Export(found.NAME, words | given | tokens, tensors, "model.safetensors")
        where = found.NAME if model_type or refusal[0] < MANY else "architectures"  # none begins with this mixer
        refusals.append((refusal[0], f"{where}: {refusal[1]}"))
    ours = "" if model_type else f"; `model_type` {OURS!r} holds any model"
    raise ValueError(f"save: `model` has no place in transformers' {nearest(refusals)}{ours}")


def as_original(model: SequenceModel, dtype: torch.dtype | None) -> Export:
    """A model as the authors of Mamba, -2 and -3 (with a ``config.json``) or of RWKV-7 (weights alone) publish theirs.

    Raises:
        ValueError: neither can hold it; names the first option or weight that has no place.
    """
    description = described(model, "the original formats")
    if set(description.kinds) == {"rwkv7"}:
        tensors = published(named_weights(model, dtype), rwkv7.RULES, "RWKV-7")
        given = rwkv7.config_of({written.name: written.tensor for written in tensors})
        refusal = refusal_of(description, lambda read: dict(read), given)
        if refusal is None:
            return Export("RWKV-7", None, tensors, "model.pth")
        raise ValueError(f"save: `model` has no place in the original RWKV-7: {refusal[1]}")
    if not {"mamba", "mamba2", "mamba3"}.intersection(description.kinds):
        raise ValueError(
            f"save: `model` has no place in the original formats, of Mamba, Mamba-2, Mamba-3 and RWKV-7: "
            f"`layers.0.mixer.kind` is {description.kinds[0]!r}"
        )
    given = state_spaces.config_json(description)
    refusal = refusal_of(description, state_spaces.config_from_state_spaces, given)
    if refusal is not None:
        raise ValueError(f"save: `model` has no place in state-spaces' format: {refusal[1]}")
    tensors = published(named_weights(model, dtype), state_spaces.rules_for(given), "state-spaces' format")
    if model.tied:  # which its authors' class asks for under both names
        tensors += [t._replace(name="lm_head.weight") for t in tensors if t.name == "backbone.embedding.weight"]
    return Export("state-spaces", given, tensors, "pytorch_model.bin")


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
