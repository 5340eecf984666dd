"""Lightning attention as in MiniMax-Text-01 (MiniMax 2025, arXiv 2501.08313, section 2.2; Qin et al. 2024, 2401.04658).

Glossary: b batch, l length, h: n_heads, p: head_dim. For x (b l d_model)::

    q_t, k_t, v_t = silu(qkv_proj(x_t))                  (b l h p) each; one projection, head by head
    s_i = 2^(-8 i / h) (1 - layer / (n_layers - 1))      the slope of head i = 1 … h; later layers forget more slowly
    S_t = exp(-s) S_{t-1} + k_t v_tᵀ                     (b h p p), the state
    o_t = S_tᵀ q_t                                       (b l h p), without a scale
    out = out_proj(σ(output_gate(x)) · rms(o))           (b l d_model), one norm for all heads
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._heads import heads_of_width
from ssmzoo.mixers._linear_attention import LinearAttentionState, attend
from ssmzoo.norm import RMSNorm
from ssmzoo.registry import register_mixer

EPS = 1e-5  # keeps a little decay in the last layer


@register_mixer("lightning")
class Lightning(Mixer):
    """Lightning attention: linear attention with a fixed decay for each head, slower in later layers.

    Args:
        d_model: width of input and output.
        head_dim: p, channels of a head.
        n_heads: heads; d_model / head_dim of them if None.
        norm_eps: added to the mean of squares.

    The names of its weights are those of MiniMax-Text-01's checkpoints. On its own, outside a model, it decays as the
    first of several layers does.
    """

    crosses_in_ops = True
    state_class = LinearAttentionState

    def __init__(self, d_model: int, *, head_dim: int = 128, n_heads: int | None = None, norm_eps: float = 1e-6):
        super().__init__(d_model)
        self.check_at_least(1, head_dim=head_dim, n_heads=n_heads)
        self.n_heads, self.head_dim = heads_of_width("Lightning", d_model, head_dim, n_heads), head_dim
        inner = self.n_heads * head_dim
        self.slowness = 1 + EPS
        self.qkv_proj = Linear(d_model, 3 * inner, bias=False)
        self.output_gate = Linear(d_model, inner, bias=False)
        self.norm = RMSNorm(inner, norm_eps)
        self.out_proj = Linear(inner, d_model, bias=False)

    def at_layer(self, layer: int, n_layers: int) -> None:
        self.slowness = 1 - layer / (n_layers - 1 + EPS) + EPS

    def initial_state(self, batch_size: int, max_length: int | None = None) -> LinearAttentionState:
        new = self.like(wide=True).new_zeros
        return LinearAttentionState(S=new(batch_size, self.n_heads, self.head_dim, self.head_dim))

    def mixing_flops(self, context: int) -> float:
        """Five for each number of the state."""
        return 5 * self.n_heads * self.head_dim**2

    def mix(
        self, x: Tensor, state: LinearAttentionState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        qkv = F.silu(self.qkv_proj(x)).unflatten(-1, (self.n_heads, 3 * self.head_dim))
        q, k, v = qkv.split(self.head_dim, dim=-1)  # (b l h p)
        slopes = [2.0 ** (-8 * (i + 1) / self.n_heads) * self.slowness for i in range(self.n_heads)]
        log_decay = -x.new_tensor(slopes, dtype=precision(x))
        S = None if state is None else state.S
        o, S = attend(q, k, v, log_decay, S, cu_seqlens, scale=1.0)
        gate = self.output_gate(x).sigmoid()
        return self.out_proj(gate * self.norm(o.flatten(2))), None if state is None else LinearAttentionState(S)
