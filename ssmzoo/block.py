"""One layer: a mixer along time, then perhaps an MLP along channels, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.config import ModelConfig
from ssmzoo.init import initialise_mixer, initialise_mlp
from ssmzoo.mixer import Mixer
from ssmzoo.mlp import build_mlp
from ssmzoo.norm import NORMS
from ssmzoo.registry import build_mixer
from ssmzoo.state import State


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm2(x)); each sum may be of a normalised or multiplied part."""

    def __init__(self, config: ModelConfig, layer: int, mixer: Mixer | None = None):
        """``mixer`` is given where several layers share one; otherwise the config's entry for the layer is built."""
        super().__init__()
        before, after = config.norm_placement != "post", config.norm_placement != "pre"

        def norm(wanted: bool) -> nn.Module | None:
            return NORMS[config.norm](config.d_model, eps=config.norm_eps) if wanted else None

        self.norm = norm(before)
        self.mixer = mixer if mixer is not None else entry_mixer(config, config.entry_of_layer(layer))
        self.mlp = build_mlp(config.d_model, config.mlp_of_layer(layer))
        if self.mlp is not None:
            initialise_mlp(self.mlp, config.n_residuals)
        self.norm2 = norm(before and self.mlp is not None)
        self.norm_after = norm(after)
        self.norm2_after = norm(after and self.mlp is not None)
        self.multiplier = config.residual_multiplier
        self.dropout = nn.Dropout(config.dropout)

    @property
    def norms(self) -> list[nn.Module]:
        """Those that there are, in the order of use."""
        return [n for n in (self.norm, self.norm_after, self.norm2, self.norm2_after) if n is not None]

    def forward(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State | None]:
        """The residual stream (b l d_model) and the mixer's state, before → after."""
        mixed = self.mixer(self._normalised(x, self.norm), state, cu_seqlens=cu_seqlens)
        if state is not None:
            mixed, state = mixed
        x = x + self._part(mixed, self.norm_after)
        mlp = self.mlp
        if mlp is not None:
            x = x + self._part(mlp(self._normalised(x, self.norm2)), self.norm2_after)
        return x, state

    def _normalised(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """What a mixer or MLP is given of the residual stream, in the dtype of the weights."""
        return x.to(self.norms[0].weight.dtype) if norm is None else norm(x)  # type: ignore[arg-type]

    def _part(self, y: Tensor, norm: nn.Module | None) -> Tensor:
        """What is added to the residual stream."""
        if norm is not None:
            y = norm(y)
        if self.multiplier != 1:
            y = y * self.multiplier
        return self.dropout(y) if self.training else y  # a call less for each token


def entry_mixer(config: ModelConfig, entry: str) -> Mixer:
    """The mixer of an entry of the config, started as in a model of the config's depth."""
    options = config.mixer_options(entry)
    mixer = build_mixer(options.pop("kind"), config.d_model, **options)
    initialise_mixer(mixer, config.n_residuals)
    return mixer
