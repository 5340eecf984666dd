"""The interface of all channel mixers, and the activations that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls
from ssmzoo.state import State
from ssmzoo.wide import KeepsFloat32

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: torch.square(F.relu(x)),
    "tanh": torch.tanh,
}


def name_of(f: Callable[[Tensor], Tensor]) -> str | None:
    """The name of an activation, or of a copy of one; None for another function."""
    for name, known in ACTIVATIONS.items():
        if f is known:
            return name
        if (
            isinstance(f, partial)
            and isinstance(known, partial)
            and (f.func, f.keywords) == (known.func, known.keywords)
        ):
            return name
    return None


class ChannelMixer(KeepsFloat32):
    """Mixes the channels of each token: ``(b, l, d_model) → (b, l, d_model)``. It sees one token alone.

    Attributes:
        residual_projections: submodules that write into the residual stream; a model scales them by its depth.
        one_token: False for a :class:`ShiftingChannelMixer`.
    """

    residual_projections: tuple[str, ...] = ("fc2",)
    one_token: ClassVar[bool] = True

    def at_layer(self, layer: int, n_layers: int) -> None:
        """Told to a new channel mixer of a model: its layer, from 0. For those that start by their depth."""

    def prepare_step(self, calls: Calls, x: Tensor) -> Tensor | None:
        """Adds the native calls of one token, x ``(b, d_model)`` → ``(b, d_model)``, as a mixer's ``prepare_step``."""
        return None

    def flops(self) -> float:
        """FLOPs a token, forward, beyond two for each weight of its linear maps."""
        return 0.0


@dataclasses.dataclass
class ShiftState(State):
    """The last input of each sequence."""

    shift: Tensor  # (s, d_model), float32


class ShiftingChannelMixer(ChannelMixer):
    """A channel mixer that also sees the token before, and so has a state. A subclass defines :meth:`mix`."""

    one_token = False

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def initial_state(self, batch_size: int) -> ShiftState:
        """The state before the first token, zeros."""
        like = next(self.parameters())
        return ShiftState(like.new_zeros(batch_size, self.d_model, dtype=precision(like)))

    def forward(
        self, x: Tensor, state: ShiftState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ShiftState]:
        """As a mixer's: x ``(b, l, d_model)``; with a state also the state after the last token."""
        y, state = self.mix(x, state, cu_seqlens)
        return y if state is None else (y, state)

    def prepare_step(self, calls: Calls, x: Tensor, state: ShiftState | None = None) -> Tensor | None:
        """As a mixer's, with the state, which the calls also update."""
        return None

    def mix(self, x: Tensor, state: ShiftState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ShiftState | None]:
        """The output, and the state after it if one came in."""
        raise NotImplementedError


def check_at_least_one(mlp: ChannelMixer, **sizes: int | None) -> None:
    """Raises ValueError for a size that is given and below 1, by its name."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{type(mlp).__name__}: `{name}` must be at least 1; got {size}")
