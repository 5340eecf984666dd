"""Mixtures of experts in training: their balancing losses, biases and load."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssmzoo.mlp import MoE


class Balance:
    """Keeps the experts of a model evenly loaded."""

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]

    def __bool__(self) -> bool:
        return bool(self.layers)

    def with_losses(self, loss: Tensor) -> Tensor:
        """The loss, and the balancing losses of the last forward pass."""
        for layer in self.layers:
            if layer.balancing is not None:
                loss, layer.balancing = loss + layer.balancing, None
        return loss

    @torch.no_grad()
    def after_step(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """Moves the biases of the choice, and begins to count anew.

        Args:
            total: sums counts over processes.

        Returns:
            The load of a layer's busiest expert over an even one, in the mean over the layers.
        """
        loads = []
        for layer in self.layers:
            counts = total(layer.load.counts.float())
            layer.rebalance(counts)
            layer.load.reset_parameters()
            loads.append(counts.max() / counts.mean().clamp(min=1))
        return torch.stack(loads).mean()
