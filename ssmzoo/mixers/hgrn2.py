"""HGRN-2: gated recurrences whose states are expanded by outer products (Qin et al. 2024, arXiv 2404.07904, section 3).

Glossary: b batch, l length, h: n_heads, n: expand_ratio, p: d_model / h. For x (b l d_model)::

    q_t = silu(q_proj(x_t)),  i_t = i_proj(x_t)      (b l h n), (b l h p), the input
    f_t = γ + (1 - γ) σ(f_proj(x_t))                 (b l h n), the decay; γ rises with depth, see ssmzoo.lower_bounds
    S_t = diag(f_t) S_{t-1} + (1 - f_t) i_tᵀ         (b h n p), the state
    o_t = S_tᵀ q_t / √n                              (b l h p)
    out = o_proj(rms(o))                             (b l d_model), one norm for all heads
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.linear import Linear
from ssmzoo.lower_bounds import BoundedMixer
from ssmzoo.mixers._convolution import convolve_each, depthwise
from ssmzoo.mixers._heads import heads_of_width
from ssmzoo.mixers._linear_attention import LinearAttentionState, attend, xavier
from ssmzoo.norm import RMSNorm
from ssmzoo.registry import register_mixer


@register_mixer("hgrn2")
class HGRN2(BoundedMixer):
    """HGRN-2: linear attention whose keys are what the decays leave room for, with lower bounds that rise with depth.

    Args:
        d_model: width of input and output.
        expand_ratio: n, rows of a head's state.
        n_heads: h; d_model / expand_ratio of them if None.
        use_short_conv: causal convolutions of the three projections.
        d_conv: their width.
        conv_bias: biases on them.
        use_lower_bound: lower bounds of the decays, from the model around the mixer.
        norm_eps: added to the mean square.

    The names of its weights are those of flash-linear-attention.
    """

    crosses_in_ops = True
    state_class = LinearAttentionState
    residual_projections = ("o_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        expand_ratio: int = 128,
        n_heads: int | None = None,
        use_short_conv: bool = False,
        d_conv: int = 4,
        conv_bias: bool = False,
        use_lower_bound: bool = True,
        norm_eps: float = 1e-5,
    ):
        heads = heads_of_width("HGRN2", d_model, max(expand_ratio, 1), n_heads, "expand_ratio")
        super().__init__(d_model, heads * expand_ratio, use_lower_bound)
        self.check_at_least(1, expand_ratio=expand_ratio, n_heads=heads, d_conv=d_conv)
        if d_model % heads:
            raise ValueError(f"HGRN2: `n_heads` must divide d_model={d_model}; got {heads}")
        self.n_heads, self.expand_ratio, self.d_conv, self.use_short_conv = heads, expand_ratio, d_conv, use_short_conv
        self.widths = {"q": self.n_gates, "f": self.n_gates, "i": d_model}
        for name, width in self.widths.items():
            self.add_module(f"{name}_proj", Linear(d_model, width, bias=False))
            if use_short_conv:
                self.add_module(f"{name}_conv1d", depthwise(width, d_conv, conv_bias))
        self.g_norm = RMSNorm(d_model, norm_eps)
        self.o_proj = Linear(d_model, d_model, bias=False)
        xavier(*(module for module in self.children() if isinstance(module, Linear)))

    def initial_state(self, batch_size: int, max_length: int | None = None) -> LinearAttentionState:
        new = self.like(wide=True).new_zeros
        widths = self.widths.values() if self.use_short_conv else ()
        return LinearAttentionState(
            S=new(batch_size, self.n_heads, self.expand_ratio, self.d_model // self.n_heads),
            convs=[new(batch_size, self.d_conv - 1, width) for width in widths],
        )

    def mixing_flops(self, context: int) -> float:
        """Five for each number of the state, two for each tap."""
        taps = 2 * self.d_conv * sum(self.widths.values()) if self.use_short_conv else 0
        return 5 * self.expand_ratio * self.d_model + taps

    def mix(
        self, x: Tensor, state: LinearAttentionState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        projected: list[Tensor] = [self.get_submodule(f"{name}_proj")(x) for name in self.widths]
        S, convs = (None, None) if state is None else (state.S, state.convs)
        if self.use_short_conv:
            modules: list[nn.Module] = [self.get_submodule(f"{name}_conv1d") for name in self.widths]
            projected, convs = convolve_each(modules, projected, self.d_conv, None, convs, cu_seqlens)
        q, f, i = projected
        _, k = self.forget_gate(f)
        q, k, i, log_decay = (
            t.unflatten(-1, (self.n_heads, -1)) for t in (F.silu(q), k.to(i.dtype), i, self.log_forget_gate(f))
        )
        o, S = attend(q, k, i, log_decay, S, cu_seqlens)
        y = self.o_proj(self.g_norm(o.flatten(2)))
        return y, None if state is None else LinearAttentionState(S, convs=convs or [])
