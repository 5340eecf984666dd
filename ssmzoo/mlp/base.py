"""The interface of all channel mixers, and the activations that they share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.wide import KeepsFloat32

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: torch.square(F.relu(x)),
}


class ChannelMixer(KeepsFloat32):
    """Mixes the channels of each token: ``(b, l, d_model) → (b, l, d_model)``. It sees one token alone.

    Attributes:
        residual_projections: submodules that write into the residual stream; a model scales them by its depth.
    """

    residual_projections: tuple[str, ...] = ("fc2",)

    def flops(self) -> float:
        """FLOPs a token, forward, beyond two for each weight of its linear maps."""
        return 0.0


def check_at_least_one(mlp: ChannelMixer, **sizes: int | None) -> None:
    """Raises ValueError for a size that is given and below 1, by its name."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{type(mlp).__name__}: `{name}` must be at least 1; got {size}")
