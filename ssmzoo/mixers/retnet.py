"""Multi-scale retention (Sun et al. 2023, arXiv 2307.08621, sections 2.1 and 2.2).

Glossary: b batch, l length, h: n_heads, k and v channels of a head's keys and values. For x (b l d_model)::

    q_t, k_t = R_t q_proj(x_t), R_t k_proj(x_t)      (b l h k), turned by their position t
    v_t = v_proj(x_t)                                (b l h v)
    γ   = 1 - 2^(-5 - i) for head i = 0 … h - 1      (h), the decay, which is fixed
    S_t = γ S_{t-1} + k_t v_tᵀ                       (b h k v), the state
    o_t = S_tᵀ q_t / √k                              (b l h v)
    out = o_proj(rms(o) · silu(g_proj(x)))           (b l d_model), a norm for each head

The paper normalises by GroupNorm; its released code, and flash-linear-attention, by a root mean square.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.crossing import in_whole
from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls
from ssmzoo.cache.tokens import owners
from ssmzoo.linear import Linear
from ssmzoo.mixers._linear_attention import LinearAttention, LinearAttentionOptions, LinearAttentionState, xavier
from ssmzoo.mixers._rope import frequencies, rotary_angles, rotate
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class RetNetOptions(LinearAttentionOptions):
    """Options of retention, beside those of :class:`LinearAttentionOptions`.

    Attributes:
        rope_base: of the rotary embedding: the longest wavelength is about 2π · rope_base tokens.
    """

    rope_base: float = 10000.0


@register_mixer("retnet")
class RetNet(LinearAttention):
    """Multi-scale retention: a matrix state with a fixed decay for each head, and rotary positions.

    The names of its weights are those of flash-linear-attention.
    """

    options_class = RetNetOptions

    def __init__(self, d_model: int, **options: Any):
        o = RetNetOptions(**options)
        super().__init__(d_model, o)
        if self.k_dim % 2:
            raise ValueError(f"RetNet: `expand_k` must give an even number of channels to a head; got {self.k_dim}")
        self.rope_base = o.rope_base
        xavier(*(module for module in self.children() if isinstance(module, Linear)))
        xavier(self.o_proj, gain=0.5)

    def log_decay(self, x: Tensor) -> Tensor:
        """(h), in float32 (float64)."""
        return x.new_tensor([math.log1p(-(2.0 ** (-5 - i))) for i in range(self.n_heads)], dtype=precision(x))

    def placed(
        self, q: Tensor, k: Tensor, state: LinearAttentionState | None, cu_seqlens: Tensor | None
    ) -> list[Tensor]:
        lengths = None if state is None else state.lengths
        if cu_seqlens is None:
            positions = torch.arange(q.shape[1], device=q.device)[None]
            if lengths is not None:
                positions = lengths[:, None] + positions
        else:
            row, positions = owners(cu_seqlens, q.shape[1])
            positions = in_whole(row, positions)
            positions = (positions if lengths is None else lengths[row] + positions)[None]
        cos, sin = rotary_angles(positions, self.k_dim, self.rope_base, precision(q))
        return [rotate(q, cos, sin), rotate(k, cos, sin)]

    def initial_state(self, batch_size: int, max_length: int | None = None) -> LinearAttentionState:
        state = super().initial_state(batch_size, max_length)
        state.lengths = torch.zeros(batch_size, dtype=torch.int32, device=state.S.device)
        return state

    def prepare_step(self, calls: Calls, x: Tensor, state: LinearAttentionState) -> Tensor | None:
        lengths, decays = state.lengths, self.log_decay(x)
        if lengths is None:
            return None
        frequency = frequencies(self.k_dim, self.rope_base, precision(x), x.device)
        placed = partial(calls.rotary, positions=lengths, frequency=frequency)
        return self.prepare_recall(calls, x, state, lambda: decays, placed)
