"""What feeds a layer from elsewhere: Zamba2's shared blocks (Glorioso et al. 2024, arXiv 2411.15242).

A shared block is attention and an MLP, one set of weights for several layers. It sees the residual stream x beside the
embeddings e of the tokens. A layer that it feeds adds its output, through a map of its own, to its mixer's input::

    f = linear(mlp(norm2(o_proj(attention(norm([x, e]))))))       (b l d_model)
    x + mixer(norm(x + f))

Each such layer adapts the shared maps by low-rank maps of its own (LoRA, Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.mlp.base import ACTIVATIONS
from ssmzoo.norm import RMSNorm
from ssmzoo.registry import build_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class FedState(State):
    """The state of a layer that a shared block feeds: that of its attention here, and the mixer's."""

    feed: State
    mixer: State


class SharedBlock(nn.Module):
    """The weights that several layers share.

    Args:
        d_model: width of the residual stream; attention works in twice that.
        n_heads: heads of the attention, each of width 2 · d_model / n_heads.
        d_intermediate: width inside the MLP; 4 · d_model if None.
        activation: of its gate.
        rank: of the low-rank maps by which each layer adapts the first map of the MLP; 0 for none.
        adapt_attention: each layer also adapts the maps to queries, keys and values.
        rope: rotary positions.
        rope_base: their base.
        norm_eps: added to the mean of squares.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 32,
        d_intermediate: int | None = None,
        activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu",
        rank: int = 128,
        adapt_attention: bool = False,
        rope: bool = False,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        wide = 2 * d_model
        if n_heads < 1 or wide % n_heads:
            raise ValueError(f"SharedBlock: `n_heads` must divide 2 · d_model = {wide}; got {n_heads}")
        if rank < 0 or (adapt_attention and rank == 0):
            raise ValueError(f"SharedBlock: `rank` must be at least 1, or 0 without `adapt_attention`; got {rank}")
        if d_intermediate is not None and d_intermediate < 1:
            raise ValueError(f"SharedBlock: `d_intermediate` must be at least 1; got {d_intermediate}")
        inside = d_intermediate or 4 * d_model
        self.d_model, self.n_heads, self.rank, self.adapt_attention = d_model, n_heads, rank, adapt_attention
        self.rope, self.rope_base, self.activation = rope, rope_base, activation
        self.norm = RMSNorm(wide, eps=norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (Linear(wide, wide, bias=False) for _ in range(3))
        self.o_proj = Linear(wide, d_model, bias=False)
        self.norm2 = RMSNorm(d_model, eps=norm_eps)
        self.fc1 = Linear(d_model, 2 * inside, bias=False)
        self.fc2 = Linear(inside, d_model, bias=False)


class Adapted(nn.Module):
    """A shared linear map, and a low-rank map of this place's own, which starts at 0."""

    def __init__(self, base: Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = Linear(base.in_features, rank, bias=False)
        self.up = Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Feed(nn.Module):
    """One use of a shared block: its modules, what adapts them here, and a map of its own."""

    def __init__(self, shared: SharedBlock):
        super().__init__()
        d_model, head_dim, rank = shared.d_model, 2 * shared.d_model // shared.n_heads, shared.rank
        self.norm = shared.norm
        self.attention: Mixer = build_mixer(
            "attention",
            2 * d_model,
            head_dim=head_dim,
            rope=shared.rope,
            rope_base=shared.rope_base,
            scale=(head_dim / 2) ** -0.5,
        )
        for name in ("q_proj", "k_proj", "v_proj"):
            base = getattr(shared, name)
            setattr(self.attention, name, Adapted(base, rank) if shared.adapt_attention else base)
        self.attention.out_proj = nn.Identity()  # as what it gives has another width than what it takes
        self.o_proj, self.norm2 = shared.o_proj, shared.norm2
        self.fc1 = Adapted(shared.fc1, rank) if rank else shared.fc1
        self.fc2 = shared.fc2
        self.linear = Linear(d_model, d_model, bias=False)
        self.f = ACTIVATIONS[shared.activation]

    def forward(
        self, x: Tensor, embedded: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State | None]:
        """The residual stream and the embeddings (b l d_model) → what is added to the mixer's input, and the state."""
        y = self.attention(self.norm(torch.cat([x, embedded], dim=-1)), state, cu_seqlens=cu_seqlens)
        if state is not None:
            y, state = y
        a, b = self.fc1(self.norm2(self.o_proj(y))).chunk(2, dim=-1)
        return self.linear(self.fc2(self.f(a) * b)), state
