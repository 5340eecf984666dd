"""Fixed multipliers of neighbouring groups of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Multipliers(nn.Module):
    """Multiplies the channels of ``(..., d)``, each group by its own number.

    Args:
        parts: how many channels a group has, and their multiplier, in order.
    """

    def __init__(self, parts: Sequence[tuple[int, float]]):
        super().__init__()
        self.parts = tuple(parts)
        self.channels = nn.Buffer(torch.empty(sum(size for size, _ in self.parts)), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for channels, (_, multiplier) in zip(self.channels.split([n for n, _ in self.parts]), self.parts, strict=True):
            channels.fill_(multiplier)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.channels.to(x.dtype)
