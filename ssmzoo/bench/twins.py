"""Another implementation of a mixer with our weights in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssmkernels.bench.peers import refuse
from ssmzoo.mixer import Mixer
from ssmzoo.options import options_of


@dataclass(frozen=True)
class Twin:
    """Another implementation of a mixer.

    Attributes:
        call: maps x to y.
        weights: its parameters under our names.
        decoder: makes a function that reads one more token at each call, from a state of its own; None where the
            package has no such thing.
    """

    call: Callable[[Tensor], Tensor]
    weights: Mapping[str, nn.Parameter]
    decoder: Callable[[], Callable[[Tensor], Tensor]] | None = None


def same_names(theirs: nn.Module, mixer: Mixer) -> Twin:
    """A module whose weights have our names."""
    weights = dict(theirs.named_parameters())
    for name, ours in mixer.named_parameters():
        weights[name].data = weights[name].data.to(ours.device, ours.dtype)
    return filled(theirs.eval(), weights, mixer)


@torch.no_grad()
def filled(call: Callable[[Tensor], Tensor], weights: Mapping[str, nn.Parameter], mixer: Mixer) -> Twin:
    ours = dict(mixer.named_parameters())
    if set(ours) != set(weights):
        raise NotImplementedError(f"it has other weights: {', '.join(sorted(set(ours) ^ set(weights)))}")
    for name, value in ours.items():
        weights[name].copy_(value)
    return Twin(call, weights)


def defaults_but(mixer: Mixer, *allowed: str) -> None:
    """Refuses options that differ from their defaults, as far as the mixer keeps them under their names."""
    for name, parameter in options_of(type(mixer)).items():
        value = getattr(mixer, name, parameter.default)
        if name == "rope_dim" and value == getattr(mixer, "head_dim", None):
            continue  # what the default stands for
        if value is None and parameter.default is False:
            continue  # a switch whose weights are not there
        refuse(name not in allowed and (isinstance(value, Tensor) or value != parameter.default), f"such {name}")
