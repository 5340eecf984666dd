"""The matrix products of a module, alone: what its linear maps cost, and no layer can do without."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ssmkernels.bench import Contestant
from ssmkernels.products import linear
from ssmzoo.model import SequenceModel

NAME = "matrix products"


def weights_of(module: nn.Module) -> list[Tensor]:
    """The matrices (out, in) that each token passes: of every linear map, and of PyTorch's recurrent networks.

    In a model, a mixer that several layers share counts as often as it is used.
    """
    if isinstance(module, SequenceModel):
        parts: Iterable[nn.Module] = (*module.blocks, module.lm_head)
        if isinstance(module.embedding, nn.Linear):
            parts = (module.embedding, *parts)
        return [weight for part in parts for weight in weights_of(part)]
    found = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            found.append(part.weight.detach())
        elif isinstance(part, nn.RNNBase):
            found += [p.detach() for name, p in part.named_parameters() if name.startswith("weight")]
    return found


def products(module: nn.Module, tokens: int, backward: bool) -> Contestant | None:
    """A limit: ``tokens`` random rows times each weight, and with ``backward`` gradients times weight and times input.

    None where the module has no linear map.
    """
    weights = weights_of(module)
    if not weights:
        return None

    def rows(width: int) -> Tensor:
        return torch.randn(tokens, width, device=weights[0].device, dtype=weights[0].dtype)

    inputs = {width: rows(width) for width in {weight.shape[1] for weight in weights}}
    gradients = {width: rows(width) for width in {weight.shape[0] for weight in weights}} if backward else {}
    return Contestant(NAME, "limit", _call(weights, inputs, gradients))


def _call(
    weights: list[Tensor], inputs: dict[int, Tensor], gradients: dict[int, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        for weight in weights:
            x = inputs[weight.shape[1]]
            with torch.set_grad_enabled(bool(gradients)):  # as a model's own maps choose their library
                linear(x, weight)
            if gradients:
                g = gradients[weight.shape[0]]
                torch.mm(g, weight)
                torch.mm(g.t(), x)
        return {}

    return call
