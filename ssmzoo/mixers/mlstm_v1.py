"""xLSTM's first mLSTM block (Beck et al. 2024, arXiv 2405.04517, figure 10): up-projection, convolution, matrix memory.

Glossary:

    b: batch    l: length    d: channels inside, proj_factor · d_model    h: heads    p: channels of a head; d = h p

One layer, for u (b l d_model)::

    x, z    = proj_up(u)                              (b l d) each; z is the gate
    c       = silu(conv1d(x))                         causal, channel by channel
    q, k, v = maps of c, c and x                      block-diagonal, blocks of 4 channels
    i, f    = maps of [q, k, v]                       (b l h), the gates before exp and σ
    y       = the matrix memory of q, k, v, i, f      :func:`ssmkernels.mlstm`, normalised within each head
    out     = proj_down((y + skip · c) · silu(z))
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.init import starting, wide_dtype
from ssmzoo.linear import Linear, WideBiasLinear
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve
from ssmzoo.mixers._matrix_memory import MemoryState, remember
from ssmzoo.mixers._xlstm import CausalConv, HeadwiseLinear, small_init
from ssmzoo.norm import HeadLayerNorm
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class MLSTMv1State(State):
    """What the convolution and the memory remember."""

    conv: Tensor  # (s, d_conv - 1, d), the last inputs
    memory: MemoryState


class Cell(nn.Module):
    """The gates of the matrix memory, and the norm of what it gives."""

    def __init__(self, d: int, n_heads: int):
        super().__init__()
        self.igate, self.fgate = WideBiasLinear(3 * d, n_heads), WideBiasLinear(3 * d, n_heads)
        self.outnorm = HeadLayerNorm(d, n_heads, centred=True)
        dtype = wide_dtype()
        with torch.no_grad():
            self.igate.weight.zero_()
            self.fgate.weight.zero_()
        self.igate.bias = nn.Parameter(starting(n_heads, dtype, lambda: 0.1 * torch.randn(n_heads, dtype=dtype)))
        self.fgate.bias = nn.Parameter(starting(n_heads, dtype, lambda: torch.linspace(3, 6, n_heads, dtype=dtype)))


@register_mixer("mlstm_v1")
class MLSTMv1(Mixer):
    """xLSTM's first matrix-memory block, with its own up-projection and a convolution.

    Args:
        d_model: width of input and output.
        n_heads: h, heads.
        proj_factor: proj_factor · d_model channels inside, rounded up to a multiple of ``multiple_of``.
        multiple_of: see above.
        qkv_proj_blocksize: channels of a block of the maps to queries, keys and values.
        d_conv: width of the causal convolution before queries and keys.
        conv_bias: a bias on the convolution.
        bias: biases on all maps; the gates have theirs anyway.

    The names of its weights are those of the paper's code. The gates' weights start at 0, their biases stay float32.
    """

    crosses_in_ops = True
    state_class = MLSTMv1State
    residual_projections = ("proj_down",)
    float32_parameters = ("mlstm_cell.igate.bias", "mlstm_cell.fgate.bias")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        proj_factor: float = 2.0,
        multiple_of: int = 64,
        qkv_proj_blocksize: int = 4,
        d_conv: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
    ):
        super().__init__(d_model)
        self.check_at_least(1, n_heads=n_heads, multiple_of=multiple_of, d_conv=d_conv)
        self.check_at_least(1, qkv_proj_blocksize=qkv_proj_blocksize)
        self.n_heads, self.d_conv = n_heads, d_conv
        self.d_inner = d = -(-int(proj_factor * d_model) // multiple_of) * multiple_of
        if d < 1:
            raise ValueError(f"MLSTMv1: `proj_factor` must give at least one channel; got {proj_factor} of {d_model}")
        for name, parts in (("n_heads", n_heads), ("qkv_proj_blocksize", qkv_proj_blocksize)):
            if d % parts:
                raise ValueError(f"MLSTMv1: `{name}` must divide the {d} channels inside; got {parts}")
        self.proj_up = Linear(d_model, 2 * d, bias=bias)
        self.q_proj, self.k_proj, self.v_proj = (HeadwiseLinear(d, d // qkv_proj_blocksize, bias) for _ in range(3))
        self.conv1d = CausalConv(d, d_conv, conv_bias)
        self.mlstm_cell = Cell(d, n_heads)
        self.learnable_skip = nn.Parameter(torch.ones(d))
        self.proj_down = Linear(d, d_model, bias=bias)
        for module in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            small_init(module.weight, d_model)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> MLSTMv1State:
        like, p = self.like(wide=True), self.d_inner // self.n_heads
        return MLSTMv1State(
            conv=like.new_zeros(batch_size, self.d_conv - 1, self.d_inner),
            memory=MemoryState.empty(like, batch_size, self.n_heads, p, p),
        )

    def mixing_flops(self, context: int) -> float:
        """Two a weight of the block-diagonal maps, two a tap, and five for each number of the memory."""
        blocks = 2.0 * sum(m.weight.numel() for m in (self.q_proj, self.k_proj, self.v_proj))
        return blocks + 2 * self.d_conv * self.d_inner + 5 * self.d_inner**2 / self.n_heads

    def mix(
        self, x: Tensor, state: MLSTMv1State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MLSTMv1State | None]:
        x, z = self.proj_up(x).chunk(2, dim=-1)
        before = None if state is None else state.conv
        c, after = convolve(self.conv1d.conv, x, self.d_conv, "silu", before, cu_seqlens)
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(x)
        together = torch.cat([q, k, v], dim=-1)
        i, f = self.mlstm_cell.igate(together), self.mlstm_cell.fgate(together)  # (b l h)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v))
        y, memory = remember(q, k, v, i, f, None if state is None else state.memory, cu_seqlens)
        y = self.mlstm_cell.outnorm(y) + self.learnable_skip * c
        return self.proj_down(y * F.silu(z)), None if memory is None else MLSTMv1State(after, memory)
