"""LFM2's gated short convolution (Liquid AI 2025, arXiv 2511.23404, section 2).

Glossary: b batch, l length, d: d_model. For u (b l d)::

    B, C, x = in_proj(u)               (b l d) each
    y = C ∘ conv(B ∘ x)                conv: causal and depthwise, over d_conv tokens
    out = out_proj(y)
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class ShortConvState(State):
    """What the convolution remembers."""

    conv: Tensor  # (s, d_conv - 1, d_model), the last gated inputs; float32


@register_mixer("short_conv")
class ShortConv(Mixer):
    """A short causal convolution between two multiplicative gates, as in LFM2.

    Args:
        d_model: width of input and output.
        d_conv: tokens that the convolution sees, the newest included; LFM3 has 7.
        bias: biases on the convolution and on both projections.

    The names of its weights are those of LFM2's checkpoints.
    """

    crosses_in_ops = True
    state_class = ShortConvState

    def __init__(self, d_model: int, *, d_conv: int = 3, bias: bool = False):
        super().__init__(d_model)
        self.check_at_least(1, d_conv=d_conv)
        self.d_conv = d_conv
        self.in_proj = Linear(d_model, 3 * d_model, bias=bias)
        # Holds the weight and bias under their published names; the op does the convolution.
        self.conv = nn.Conv1d(d_model, d_model, d_conv, groups=d_model, bias=bias)
        self.out_proj = Linear(d_model, d_model, bias=bias)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> ShortConvState:
        return ShortConvState(self.like(wide=True).new_zeros(batch_size, self.d_conv - 1, self.d_model))

    def mixing_flops(self, context: int) -> float:
        """Two a tap, and one for each gate."""
        return self.d_model * (2 * self.d_conv + 2)

    def mix(
        self, x: Tensor, state: ShortConvState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ShortConvState | None]:
        B, C, x = self.in_proj(x).chunk(3, dim=-1)
        before = None if state is None else state.conv
        y, conv = convolve(self.conv, B * x, self.d_conv, None, before, cu_seqlens)
        return self.out_proj(C * y), None if state is None else ShortConvState(conv)
