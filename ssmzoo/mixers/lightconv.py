"""Lightweight convolution (Wu et al. 2019, arXiv 1901.10430, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmkernels.ops.causal_conv1d import causal_conv1d
from ssmzoo.mixers._light_convolution import LightConvolution
from ssmzoo.mixers._places import Places
from ssmzoo.registry import register_mixer


@register_mixer("lightconv")
class LightConv(LightConvolution):
    """A depthwise convolution with few kernels, each a softmax over its taps: fixed weights in attention's place.

    It takes the place of self-attention and approximates nothing. With the gated linear unit u = a · sigmoid(b) of
    [a, b] = in_proj(x), channel c of head h = ⌊c n_heads / d_model⌋, and K = kernel_size taps::

        y_tc = Σ_{j=0}^{K-1} softmax(weight_h)_j · u_{t-(K-1)+j, c},    out = out_proj(y)

    Args:
        d_model: width of input and output.
        options: those of :class:`~ssmzoo.mixers._light_convolution.LightConvolutionOptions`.
    """

    def __init__(self, d_model: int, **options: Any):
        super().__init__(d_model, **options)
        self.weight = nn.Parameter(torch.empty(self.n_heads, self.kernel_size))
        nn.init.xavier_uniform_(self.weight)

    def convolve(self, u: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = self.normalised(self.weight).repeat_interleave(self.d_model // self.n_heads, dim=0)  # (d_model K)
        if self.causal:
            y, last = causal_conv1d(u, weight, initial_state=before, return_final_state=True, cu_seqlens=cu_seqlens)
            return y, None if before is None else last
        places = Places.of(self.kernel_size - 1, u.shape[1], cu_seqlens)
        shifted = F.pad(places.spread(u, None), (0, 0, 0, self.ahead))[:, self.ahead :]
        y = causal_conv1d(shifted, weight)
        assert isinstance(y, Tensor)
        return places.gather(y[:, places.gap :]), None
