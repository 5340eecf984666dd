"""A channel mixer as a whole layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ssmzoo.mixer import Mixer
from ssmzoo.mlp import build_mlp
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class ChannelState(State):
    """Nothing but how many sequences there are."""

    rows: Tensor  # (s, 0)


@register_mixer("channel")
class Channel(Mixer):
    """A channel mixer that is a layer of its own, for models whose layers hold one operator each, as Nemotron-H's.

    Args:
        d_model: width of input and output.
        mlp: ``kind`` and options of the channel mixer, as those of a model's ``mlp``; "swiglu" if None.

    It sees each token alone, and its state is empty.
    """

    crosses_in_ops = True
    state_class = ChannelState
    one_token = True

    def __init__(self, d_model: int, *, mlp: dict[str, Any] | None = None):
        super().__init__(d_model)
        built = build_mlp(d_model, {"kind": "swiglu"} if mlp is None else mlp)
        if built is None:
            raise ValueError(f"Channel: `mlp` must have a `kind` other than 'none'; got {mlp}")
        if not built.one_token:
            raise ValueError(f"Channel: `mlp` must be of a `kind` that sees each token alone; got {mlp}")
        self.mlp = built
        self.residual_projections = tuple(f"mlp.{name}" for name in built.residual_projections)
        self.float32_parameters = tuple(f"mlp.{name}" for name in built.float32_parameters)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> ChannelState:
        return ChannelState(self.like().new_zeros(batch_size, 0))

    def mixing_flops(self, context: int) -> float:
        return self.mlp.flops()

    def mix(self, x: Tensor, state: ChannelState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State | None]:
        return self.mlp(x), state
