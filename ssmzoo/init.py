"""The published start of what PyTorch's own layers start otherwise (GPT-2, and Mamba after it).

Biases of linear maps are 0, and each map that writes into the residual stream is divided by √residuals.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.config import ModelConfig
from ssmzoo.mixers._base import Mixer


def residuals(config: ModelConfig) -> int:
    """How many maps of a model write into its residual stream."""
    return config.n_layers * (1 if config.mlp.get("kind", "none") == "none" else 2)


@torch.no_grad()
def initialise_mixer(mixer: Mixer, residuals: int) -> None:
    """Linear biases, but for those that the mixer sets and keeps in float32; and its residual projections."""
    for name, module in mixer.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.bias" not in mixer.float32_parameters:
            _zero(module.bias)
    for name in mixer.residual_projections:
        mixer.get_parameter(f"{name}.weight").div_(residuals**0.5)


@torch.no_grad()
def initialise_mlp(mlp: nn.Module, residuals: int) -> None:
    """Biases of the MLP's two maps ``fc1`` and ``fc2``, and the second's weight."""
    for name, parameter in mlp.named_parameters():
        if name.endswith("bias"):
            _zero(parameter)
    mlp.get_parameter("fc2.weight").div_(residuals**0.5)


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        bias.zero_()
