"""RWKV-6's time mixing, Finch (Peng et al. 2024, arXiv 2404.05892, section 4.2).

Glossary: b batch, l length, d: d_model, h: n_heads, k and v channels of a head's keys and values. For x (b l d)::

    δ_t = x_{t-1} - x_t                                          (b l d), the token shift
    m_t = x_bias + x_proj(x_t + μ δ_t)                           (b l 5 d), the share of each shift; rank 5 · 32
    r_t = r_proj(x_t + m_tʳ δ_t), and k_t, v_t, g_t likewise     (b l h k), likewise, (b l h v), (b l h v)
    w_t = exp(-exp(w_proj(x_t + m_tʷ δ_t)))                      (b l h k), the decay; w_proj has rank 64
    o_t = (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ r_t                      (b l h v); u is the bonus (h k)
    S_t = diag(w_t) S_{t-1} + k_t v_tᵀ                           (b h k v), the state
    out = o_proj(group_norm(o) · silu(g))                        (b l d), a norm for each head
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from einops import einsum
from torch import Tensor, nn

from ssmkernels.core.finite import finite_exp
from ssmkernels.core.validate import precision
from ssmzoo.init import wide_dtype
from ssmzoo.linear import Linear, WideBiasLinear, is_plain
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._linear_attention import ACTIVATIONS, attend, xavier
from ssmzoo.norm import HeadLayerNorm
from ssmzoo.registry import register_mixer
from ssmzoo.state import State
from ssmzoo.token_shift import token_shift

INPUTS = ("r", "w", "k", "v", "g")


@dataclasses.dataclass
class RWKV6State(State):
    """The last input of each sequence, and the matrix of each head."""

    shift: Tensor  # (s, d), float32
    S: Tensor  # (s, h, k, v), float32


class Shifted(nn.Module):
    """A linear map of x + μ δ; μ is learned, or given."""

    def __init__(self, linear: nn.Module, d_model: int | None = None):
        super().__init__()
        self.linear = linear
        self.mu = None if d_model is None else nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor, delta: Tensor, mu: Tensor | None = None) -> Tensor:
        mu = self.mu if mu is None else mu
        assert mu is not None
        return self.linear(x + delta * mu)


class LowRank(nn.Module):
    """W₂ tanh(W₁ x) + bias."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.lora = nn.Sequential(Linear(d_in, rank, bias=False), nn.Tanh(), WideBiasLinear(rank, d_out))
        self.lora[2].bias = nn.Parameter(torch.empty(d_out, dtype=wide_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


@register_mixer("rwkv6")
class RWKV6(Mixer):
    """RWKV-6's time mixing: linear attention with a decay for each channel, a bonus and token shifts.

    Args:
        d_model: width of input and output.
        expand_k: receptance and keys of all heads together have expand_k · d_model channels; 1 in the published models.
        expand_v: their values have expand_v · d_model.
        n_heads: h; d_model / 64 in the published models.
        gate_fn: the gate's activation; "swish" is SiLU.
        proj_low_rank_dim: rank of each of the five shifts.
        gate_low_rank_dim: rank of the decay.
        norm_eps: added to the variance.

    The names of its weights are those of flash-linear-attention; shifts, decay and bonus start as in the published code
    of RWKV, by the depth of the layer. Bonus and decay's bias stay float32.
    """

    crosses_in_ops = True
    state_class = RWKV6State
    residual_projections = ("o_proj",)
    float32_parameters = ("bonus", "w_proj.linear.lora.2.bias")

    def __init__(
        self,
        d_model: int,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        n_heads: int = 4,
        gate_fn: Literal["swish", "sigmoid", "gelu", "relu"] = "swish",
        proj_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 64,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model)
        self.check_at_least(
            1, n_heads=n_heads, proj_low_rank_dim=proj_low_rank_dim, gate_low_rank_dim=gate_low_rank_dim
        )
        k, v = round(expand_k * d_model), round(expand_v * d_model)
        for name, expand, total in (("expand_k", expand_k, k), ("expand_v", expand_v, v)):
            if total < 1 or total != expand * d_model or total % n_heads:
                raise ValueError(
                    f"RWKV6: `{name}` · d_model must be whole channels for each of the {n_heads} heads; got "
                    f"{expand} · {d_model}"
                )
        self.n_heads, self.k_dim, self.v_dim, self.rank = n_heads, k // n_heads, v // n_heads, proj_low_rank_dim
        self.gate = ACTIVATIONS["silu" if gate_fn == "swish" else gate_fn]
        wide = len(INPUTS) * proj_low_rank_dim
        self.x_proj = nn.Sequential(
            Shifted(Linear(d_model, wide, bias=False), d_model), nn.Tanh(), Linear(wide, d_model, bias=False)
        )
        self.x_bias = nn.Parameter(torch.empty(len(INPUTS), d_model))
        for name, width in (("r", k), ("k", k), ("v", v), ("g", v)):
            self.add_module(f"{name}_proj", Shifted(Linear(d_model, width, bias=False)))
        self.w_proj = Shifted(LowRank(d_model, k, gate_low_rank_dim))
        self.bonus = nn.Parameter(torch.empty(n_heads, self.k_dim, dtype=wide_dtype()))
        self.g_norm = HeadLayerNorm(v, n_heads, norm_eps, bias=True)
        self.o_proj = Linear(v, d_model, bias=False)
        self.no_weight_decay = (*self.float32_parameters, "x_bias", "x_proj.0.mu")
        xavier(*(self.get_submodule(f"{name}_proj") for name in "rkvgo"))
        self.at_layer(0, 1)

    @torch.no_grad()
    def at_layer(self, layer: int, n_layers: int) -> None:
        """Starts shifts, decays and bonus for a layer: the deeper, the less is shifted and the slower many decay."""
        if self.x_bias.is_meta:
            return
        depth, height = layer / max(n_layers - 1, 1), 1 - layer / n_layers
        keys = self.n_heads * self.k_dim
        channel = torch.arange(self.d_model, dtype=torch.float64) / self.d_model
        self.get_parameter("x_proj.0.mu").copy_(1 - channel**height)
        shifts = {"r": 1 - channel ** (height / 2), "w": 1 - channel**height, "k": 1 - channel**height}
        shifts |= {"v": 1 - channel**height - 0.3 * depth, "g": 1 - channel ** (height / 2)}
        self.x_bias.copy_(torch.stack([shifts[name] for name in INPUTS]))
        for low, high in (("x_proj.0.linear", "x_proj.2"), ("w_proj.linear.lora.0", "w_proj.linear.lora.2")):
            self.get_parameter(f"{low}.weight").uniform_(-1e-4, 1e-4)  # not 0: then no gradient would reach μ
            self.get_parameter(f"{high}.weight").uniform_(-0.01, 0.01)
        place = torch.arange(keys, dtype=torch.float64) / max(keys - 1, 1)
        self.get_parameter("w_proj.linear.lora.2.bias").copy_(-6 + 5 * place ** (0.7 + 1.3 * depth))
        zigzag = ((torch.arange(keys, dtype=torch.float64) + 1) % 3 - 1) * 0.1
        self.bonus.copy_((depth * (1 - place) + zigzag).view_as(self.bonus))

    def initial_state(self, batch_size: int, max_length: int | None = None) -> RWKV6State:
        new = self.like(wide=True).new_zeros
        return RWKV6State(new(batch_size, self.d_model), new(batch_size, self.n_heads, self.k_dim, self.v_dim))

    def mixing_flops(self, context: int) -> float:
        """Six for each number of the state, with the bonus."""
        return 6 * self.n_heads * self.k_dim * self.v_dim

    def mix(self, x: Tensor, state: RWKV6State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, RWKV6State | None]:
        before, S = (None, None) if state is None else (state.shift, state.S)
        previous, last = token_shift(x, before, cu_seqlens)
        delta = previous - x
        shifts = self._shifts(x, delta)
        projected = [
            self.get_submodule(f"{name}_proj")(x, delta, m) for name, m in zip(INPUTS, shifts.unbind(2), strict=True)
        ]
        r, w, k, v, g = projected
        log_decay = -finite_exp(w.to(precision(w)))
        r, k, v, log_decay = (t.unflatten(-1, (self.n_heads, -1)) for t in (r, k, v, log_decay))
        o, S = attend(r, k, v, log_decay, S, cu_seqlens, bonus=self.bonus, scale=1.0)
        y = self.o_proj(self.g_norm(o) * self.gate(g))
        return y, None if state is None else RWKV6State(last, S)

    def _shifts(self, x: Tensor, delta: Tensor) -> Tensor:
        """m (b l 5 d): each input has its own columns of the last map."""
        low = self.x_proj[1](self.x_proj[0](x, delta)).unflatten(-1, (len(INPUTS), self.rank))  # (b l 5 rank)
        high = self.x_proj[2]
        if is_plain(high):
            weight = cast(Tensor, high.weight).unflatten(-1, (len(INPUTS), self.rank))
            return einsum(low, weight, "b l i r, d i r -> b l i d") + self.x_bias
        apart = low[..., None, :] * torch.eye(len(INPUTS), dtype=low.dtype, device=low.device)[..., None]
        return high(apart.flatten(-2)) + self.x_bias
