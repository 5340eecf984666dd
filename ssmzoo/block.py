"""One layer: a mixer along time, then perhaps an MLP along channels, each added to the residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmkernels.native import eager
from ssmzoo.config import ModelConfig
from ssmzoo.feed import FedState, Feed, SharedBlock
from ssmzoo.init import initialise_mixer, initialise_mlp
from ssmzoo.mixer import Mixer
from ssmzoo.mlp import ShiftingChannelMixer, ShiftState, build_mlp
from ssmzoo.norm import NORMS
from ssmzoo.registry import build_mixer
from ssmzoo.state import State
from ssmzoo.value_residual import ValueResidualMixer


@dataclasses.dataclass
class LayerState(State):
    """The state of a layer whose channel mixer has one too."""

    mixer: State
    mlp: ShiftState


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm2(x)); each sum may be of a normalised or multiplied part.

    Attributes:
        gradient_checkpointing: in training without a state, activations are not kept for the backward pass, which
            computes them again. By the names that transformers has for it.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any] = staticmethod(partial(checkpoint, use_reentrant=False))

    def __init__(self, config: ModelConfig, layer: int, mixer: Mixer | None = None, shared: SharedBlock | None = None):
        """``mixer`` and ``shared``, the block that feeds the layer, are given where several layers share one.

        Otherwise the config's entry for the layer, and what feeds it, are built.
        """
        super().__init__()
        placement = config.norm_placement_of_layer(layer)
        before, after = placement not in ("post", "sum"), placement in ("post", "sum", "sandwich")
        self.norms_stream, self.norms_sum = placement == "stream", placement == "sum"

        def norm(wanted: bool) -> nn.Module | None:
            return NORMS[config.norm](config.d_model, eps=config.norm_eps) if wanted else None

        self.norm, self.feed = norm(before), None
        feed = config.feed_of_layer(layer)
        if feed is not None:
            self.feed = Feed(shared if shared is not None else SharedBlock(config.d_model, **config.feeds[feed]))
        self.mixer = mixer if mixer is not None else entry_mixer(config, config.entry_of_layer(layer), layer)
        self.mlp = build_mlp(config.d_model, config.mlp_of_layer(layer))
        if self.mlp is not None:
            self.mlp.at_layer(layer, config.n_layers)
            initialise_mlp(self.mlp, config.n_residuals)
        self.norm2 = norm(before and self.mlp is not None)
        self.norm_after = norm(after)
        self.norm2_after = norm(after and self.mlp is not None)
        self.multiplier, self.skip_multiplier = config.residual_multiplier, config.skip_multiplier
        self.dropout = nn.Dropout(config.dropout)

    @property
    def norms(self) -> list[nn.Module]:
        """Those that there are, in the order of use."""
        return [n for n in (self.norm, self.norm_after, self.norm2, self.norm2_after) if n is not None]

    def initial_state(self, batch_size: int, max_length: int | None = None) -> State:
        """The mixer's state before the first token, and those of its channel mixer and of what feeds it."""
        state = self.mixer.initial_state(batch_size, max_length)
        if isinstance(self.mlp, ShiftingChannelMixer):
            state = LayerState(state, self.mlp.initial_state(batch_size))
        if self.feed is not None:
            state = FedState(self.feed.attention.initial_state(batch_size, max_length), state)
        return state

    def forward(
        self,
        x: Tensor,
        state: State | None,
        cu_seqlens: Tensor | None,
        embedded: Tensor | None = None,
        values: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        """The residual stream (b l d_model) and the layer's state, before → after.

        ``embedded`` are the tokens' embeddings, which a layer that is fed by a shared block needs. ``values`` holds the
        first layer's values once there are some, for layers with a value residual.
        """
        # A layer that puts its values into the list would find them there the second time.
        begins = isinstance(self.mixer, ValueResidualMixer) and not values
        if self.gradient_checkpointing and self.training and state is None and torch.is_grad_enabled() and not begins:
            again = self._gradient_checkpointing_func
            return cast("tuple[Tensor, None]", again(self._forward, x, state, cu_seqlens, embedded, values))
        return self._forward(x, state, cu_seqlens, embedded, values)

    def _forward(
        self,
        x: Tensor,
        state: State | None,
        cu_seqlens: Tensor | None,
        embedded: Tensor | None,
        values: list[Tensor] | None,
    ) -> tuple[Tensor, State | None]:
        if self.feed is None:
            return self._added(x, x, state, cu_seqlens, values)
        assert embedded is not None
        before = state if isinstance(state, FedState) else None
        more, fed = self.feed(x, embedded, None if before is None else before.feed, cu_seqlens)
        x, after = self._added(x, x + more, None if before is None else before.mixer, cu_seqlens, values)
        return x, None if fed is None or after is None else FedState(fed, after)

    def _added(
        self, x: Tensor, u: Tensor, state: State | None, cu_seqlens: Tensor | None, values: list[Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """x and what the mixer makes of u, and then the channel mixer."""
        u, mlp = self._normalised(u, self.norm), self.mlp
        before, shift = (state.mixer, state.mlp) if isinstance(state, LayerState) else (state, None)
        if isinstance(self.mixer, ValueResidualMixer):
            mixed = self.mixer(u, before, cu_seqlens=cu_seqlens, values=values)
        else:
            mixed = self.mixer(u, before, cu_seqlens=cu_seqlens)
        if before is not None:
            mixed, state = mixed
        x = self._sum(x, u, mixed, self.norm_after)
        if mlp is None:
            return x, state
        u = y = self._normalised(x, self.norm2)
        if isinstance(mlp, ShiftingChannelMixer):
            y = mlp(y, shift, cu_seqlens=cu_seqlens)
            if shift is not None and state is not None:
                y, shift = y
                state = LayerState(state, shift)
        else:
            y = mlp(y)
        return self._sum(x, u, y, self.norm2_after), state

    def _normalised(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """What a mixer or MLP is given of the residual stream, in the dtype of the weights."""
        return x.to(self.norms[0].weight.dtype) if norm is None else norm(x)  # type: ignore[arg-type]

    def _sum(self, x: Tensor, normed: Tensor, y: Tensor, norm: nn.Module | None) -> Tensor:
        """The residual stream and what a mixer or MLP made of it, with the norm after one of the two, or the sum."""
        if self.norms_sum and norm is not None:
            return norm(self._skip(x, normed) + self._part(y, None)).to(x.dtype)
        return eager.add(self._skip(x, normed), self._part(y, norm))

    def _skip(self, x: Tensor, normed: Tensor) -> Tensor:
        """What of the residual stream goes on, before or after its norm."""
        kept = normed.to(x.dtype) if self.norms_stream else x
        return kept if self.skip_multiplier == 1 else kept * self.skip_multiplier

    def _part(self, y: Tensor, norm: nn.Module | None) -> Tensor:
        """What is added to the residual stream."""
        if norm is not None:
            y = norm(y)
        if self.multiplier != 1:
            y = y * self.multiplier
        return self.dropout(y) if self.training else y  # a call less for each token


def entry_mixer(config: ModelConfig, entry: str, layer: int) -> Mixer:
    """The mixer of an entry of the config, started as in a model of the config's depth, at the given layer."""
    options = config.mixer_options(entry)
    mixer = build_mixer(options.pop("kind"), config.d_model, **options)
    for module in mixer.modules():
        if isinstance(module, Mixer):
            module.at_layer(layer, config.n_layers)
    initialise_mixer(mixer, config.n_residuals)
    return mixer
