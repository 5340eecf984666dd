"""Small mixers in float64 whose weights are moved away from where they start, so that none is 0 or 1."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import ssmzoo


def moved_mixer(
    name: str, d_model: int, by: float = 0.3, names: Iterable[str] | None = None, **options
) -> ssmzoo.Mixer:
    """A mixer whose parameters, or those of these names, are moved by normal numbers of this size."""
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, d_model, **options).double()
    found = dict(mixer.named_parameters())
    with torch.no_grad():
        for each in found if names is None else [each for each in names if each in found]:
            found[each].add_(by * torch.randn_like(found[each]))
    return mixer


def both_ways(both: ssmzoo.Mixer, ways: list[ssmzoo.Mixer], renamed: dict[str, str]) -> None:
    """Gives two layers of one direction the weights of one of both, whose second one's have other names."""
    weights, reverse = dict(both.state_dict()), {}
    for name in list(weights):
        module, _, rest = name.partition(".")
        if module in renamed:
            reverse[renamed[module] + ("." + rest if rest else "")] = weights.pop(name)
    ways[0].load_state_dict(weights)
    ways[1].load_state_dict(weights | reverse)
