"""The MLP of hybrids, where the package has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.compat.mamba_ssm._layers import Device

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """fc2(value · activation(gate)), where fc1 gives both, the value first.

    Args:
        in_features, out_features: width of input and output; the same if the latter is None.
        hidden_features: width inside, rounded up to a multiple of ``multiple_of``; 8/3 of the input's if None.
        activation: of the gate.
        bias: biases of both maps.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        inside = int(8 * in_features / 3) if hidden_features is None else hidden_features
        inside = -(-inside // multiple_of) * multiple_of
        self.activation = activation
        self.fc1 = nn.Linear(in_features, 2 * inside, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(inside, out_features or in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, in_features)`` → ``(…, out_features)``."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * self.activation(gate))
