"""Weights that stay float32 when the rest of a module moves to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """A module some of whose weights stay float32.

    Attributes:
        float32_parameters: dotted names of weights and buffers that stay float32 when the rest moves to half precision.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As PyTorch's, but ``float32_parameters`` move to another device without losing precision."""
        kept = [
            (parameters, name, parameters[name].data)
            for path in self.float32_parameters
            for parameters, name in stored(self, path)
        ]
        super()._apply(fn, recurse)
        for parameters, name, before in kept:
            parameter = parameters[name]
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(parameter.device, torch.float32)
        return self


def stored(module: nn.Module, path: str) -> list[tuple[dict[str, Any], str]]:
    """Where the numbers behind a parameter are: itself, or what pruning, weight norm or a parametrisation left of it.

    Nowhere if a module with other parameters has taken the place of its module.
    """
    *place, name = path.split(".")
    owner: Any = module
    for part in place:
        owner = getattr(owner, part, None)
    if not isinstance(owner, nn.Module):
        return []
    found: list[tuple[dict[str, Any], str]] = [(owner._buffers, name)]
    found += [(owner._parameters, key) for key in (name, f"{name}_orig", f"{name}_g", f"{name}_v")]
    parametrizations = getattr(owner, "parametrizations", {})
    if name in parametrizations:
        originals = parametrizations[name]._parameters
        found += [(originals, key) for key in originals]
    return [(parameters, key) for parameters, key in found if parameters.get(key) is not None]
