"""One layer: a mixer along time, then perhaps an MLP along channels, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.config import ModelConfig
from ssmzoo.init import initialise_mixer, initialise_mlp
from ssmzoo.mixer import Mixer
from ssmzoo.mlp import MLPS
from ssmzoo.norm import NORMS
from ssmzoo.registry import build_mixer
from ssmzoo.state import State


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: ModelConfig, layer: int, mixer: Mixer | None = None):
        """``mixer`` is given where several layers share one; otherwise the config's entry for the layer is built."""
        super().__init__()
        norm = NORMS[config.norm]
        self.norm = norm(config.d_model, eps=config.norm_eps)
        self.mixer = mixer if mixer is not None else entry_mixer(config, config.entry_of_layer(layer))
        kind = config.mlp.get("kind", "none")
        self.mlp = None if kind == "none" else MLPS[kind](config.d_model, **config.mlp_options())
        if self.mlp is not None:
            initialise_mlp(self.mlp, config.n_residuals)
        self.norm2 = None if self.mlp is None else norm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State | None]:
        """The residual stream (b l d_model) and the mixer's state, before → after."""
        mixed = self.mixer(self.norm(x), state, cu_seqlens=cu_seqlens)
        if state is not None:
            mixed, state = mixed
        x = x + self._dropped(mixed)
        if self.mlp is not None and self.norm2 is not None:
            x = x + self._dropped(self.mlp(self.norm2(x)))
        return x, state

    def _dropped(self, x: Tensor) -> Tensor:
        return self.dropout(x) if self.training else x  # a call less for each token


def entry_mixer(config: ModelConfig, entry: str) -> Mixer:
    """The mixer of an entry of the config, started as in a model of the config's depth."""
    options = config.mixer_options(entry)
    mixer = build_mixer(options.pop("kind"), config.d_model, **options)
    initialise_mixer(mixer, config.n_residuals)
    return mixer
