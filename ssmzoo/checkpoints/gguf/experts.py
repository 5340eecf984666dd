"""The first maps of experts: gate and up are one tensor with us, and two in most GGUF files."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.checkpoints.renaming import Written

BOTH, GATE, UP = (f"ffn_{name}_exps.weight" for name in ("gate_up", "gate", "up"))


def apart(tensors: list[Written]) -> list[Written]:
    """With gate and up of each layer's experts as two tensors."""
    found = []
    for written in tensors:
        if not written.name.endswith(BOTH):
            found.append(written)
            continue
        for name, half in zip((GATE, UP), written.tensor.chunk(2, dim=1), strict=True):
            found.append(Written(written.name.removesuffix(BOTH) + name, half, written.sources))
    return found


def together(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way, of a file's tensors by name; a lone one of the two is left as it is, and no rule will know it."""
    for gate in [name for name in weights if name.endswith(GATE)]:
        layer = gate.removesuffix(GATE)
        if layer + UP in weights and weights[gate].shape == weights[layer + UP].shape:
            weights[layer + BOTH] = torch.cat([weights.pop(gate), weights.pop(layer + UP)], dim=1)
    return weights
