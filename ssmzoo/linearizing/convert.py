"""A transformer with linear mixers in the place of its attention."""

from __future__ import annotations

import copy
import fnmatch
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmkernels.core.names import unknown
from ssmzoo.building import build
from ssmzoo.checkpoints.published import config_from, convert_state_dict
from ssmzoo.checkpoints.weights import assign, main_dtype, skeleton
from ssmzoo.linearizing.targets import TARGETS, Weights, fill
from ssmzoo.mixers.attention import Attention
from ssmzoo.model import SequenceModel
from ssmzoo.quantized.modules import QuantizedMap
from ssmzoo.swapping import swap_mixers


class Linearized(NamedTuple):
    """What :func:`linearize` gives.

    Attributes:
        model: the hybrid.
        weights: what became of the weights of the layers that were replaced; all others are the transformer's.
        layers: which layers were replaced, from 0.
    """

    model: SequenceModel
    weights: Weights
    layers: list[int]


def linearize(
    model: SequenceModel | nn.Module | str | os.PathLike[str],
    pattern: str | Sequence[str] = "layers.*",
    mixer: str = "mamba2",
    **options: Any,
) -> Linearized:
    """A transformer whose attention is replaced, in some layers or all, by a recurrence that begins with its weights.

    Queries, keys, values and the output become C, B, x and the output of Mamba-2, or the maps of those names of the
    others; where several heads share keys and values, these are repeated, as in "The Mamba in the Llama" (Wang et al.
    2024, arXiv 2408.15237). Decays and steps start anew, convolutions let each token through alone, and there is no
    gate or an open one, as in MOHAWK (Bick et al. 2024, arXiv 2408.10189). Rotary positions and norms of queries and
    keys have no place. The hybrid still has to learn from the transformer: see :func:`ssmzoo.distill`.

    Args:
        model: a model of ours; one of transformers, of a family in :mod:`ssmzoo.checkpoints.families`; or a name,
            folder or hub id, as :func:`ssmzoo.build` takes it. It is left as it is.
        pattern: which layers, ``"layers.3"`` or with wildcards; a layer that a wildcard matches is replaced if it is
            attention.
        mixer: "mamba2", "gated_deltanet" or "gla".
        options: of the new mixers, beside those that follow from attention.

    Returns:
        The hybrid, what became of the weights, and the layers that were replaced.

    Raises:
        ValueError, TypeError: an unknown mixer or option; a pattern that matches no layer of causal attention; sizes in
            ``options`` that attention's weights do not fit; a model that is none of ours.
    """
    if mixer not in TARGETS:
        raise ValueError(unknown("`mixer` of linearize", str(mixer), TARGETS))
    if "kind" in options:
        raise ValueError(f"linearize: `options` must leave the kind to `mixer`; got kind={options['kind']!r}")
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(each, str) for each in patterns):
        raise TypeError(f"linearize: `pattern` must be a string such as 'layers.3', or several; got {pattern!r}")
    teacher = zoo_model(model)
    layers = _matching(teacher, patterns)
    attention = {i: _attention(teacher, i) for i in layers}
    student = copy.deepcopy(teacher) if teacher is model else teacher
    swaps = {}
    for i in layers:
        entry = teacher.config.mixers.get(teacher.config.entry_of_layer(i), {})
        kept = {name: entry[name] for name in ("shared", "feed", "norm_placement") if name in entry}
        swaps[f"layers.{i}"] = kept | {"kind": mixer} | TARGETS[mixer].options(attention[i]) | options
    swap_mixers(student, swaps)
    weights = Weights()
    for i in layers:
        found, place = fill(attention[i], student.blocks[i].mixer, mixer), f"layers.{i}.mixer."
        weights.carried.update({place + name: place + source for name, source in found.carried.items()})
        weights.started.update({place + name: start for name, start in found.started.items()})
        weights.left.extend(place + name for name in found.left)
    return Linearized(student, weights, layers)


def zoo_model(model: SequenceModel | nn.Module | str | os.PathLike[str]) -> SequenceModel:
    """A model of ours as it is, or by name or folder, or one of transformers with its weights.

    Raises:
        ValueError, TypeError: as :func:`ssmzoo.build`; or a model of a family that the zoo does not express.
    """
    if isinstance(model, SequenceModel):
        return model
    if isinstance(model, str | os.PathLike):
        return build(model)
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "to_dict"):
        raise TypeError(
            f"linearize: `model` must be a SequenceModel, a model of transformers, or a name or path; got "
            f"{type(model).__name__}"
        )
    given = config.to_dict()
    given = {**given, "architectures": given.get("architectures") or [type(model).__name__]}
    kind = type(model).__name__
    converted = convert_state_dict(_weights(model), given.get("model_type"), given)
    ours = skeleton(config_from(given, kind), torch.device("cpu"), main_dtype(converted))
    assign(ours, {name: tensor.clone() for name, tensor in converted.items()}, kind, torch.device("cpu"))
    return ours


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Each weight once, by the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach()))
    return dict(found.values())


def _matching(model: SequenceModel, patterns: Sequence[str]) -> list[int]:
    """The layers of attention that patterns name.

    Raises:
        ValueError: one matches no layer of attention, or names one of something else.
    """
    names = {f"layers.{i}": i for i in range(len(model.blocks))}
    kinds = {name: type(model.blocks[i].mixer) for name, i in names.items()}
    found: set[int] = set()
    for pattern in patterns:
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern) and kinds[name] is Attention]
        if not matching:
            there = [name for name in names if kinds[name] is Attention]
            raise ValueError(
                f"linearize: {pattern!r} in `pattern` matches no layer of attention; there "
                f"{'are ' + ', '.join(there) if there else 'is none'}"
            )
        found |= {names[name] for name in matching}
    return sorted(found)


def _attention(model: SequenceModel, layer: int) -> Attention:
    mixer = model.blocks[layer].mixer
    assert isinstance(mixer, Attention)
    if not mixer.causal:
        raise ValueError(f"linearize: `pattern` must name causal attention; layers.{layer} looks both ways")
    if any(isinstance(module, QuantizedMap) for module in mixer.modules()):
        raise ValueError(f"linearize: `model` must have weights that can learn; those of layers.{layer} are quantised")
    return mixer
