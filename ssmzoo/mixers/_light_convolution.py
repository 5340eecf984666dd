"""What lightweight and dynamic convolutions share (Wu et al. 2019, arXiv 1901.10430, section 3)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.state import State


@dataclasses.dataclass
class ConvolutionState(State):
    """What the next call looks back on."""

    last: Tensor  # (s, kernel_size - 1, d_model), the last inputs of the convolution; float32 (float64)


class LightConvolution(Mixer):
    """Projection, gated linear unit, convolution, projection; a subclass defines :meth:`convolve`."""

    state_class = ConvolutionState

    def __init__(
        self,
        d_model: int,
        *,
        kernel_size: int = 31,
        n_heads: int = 16,
        glu: bool = True,
        weight_dropout: float = 0.0,
        bias: bool = True,
        bidirectional: bool = False,
    ):
        super().__init__(d_model)
        name = type(self).__name__
        if kernel_size < 2:
            raise ValueError(
                f"{name}: `kernel_size` must be at least 2, as a kernel of one tap is 1; got {kernel_size}"
            )
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"{name}: `n_heads` must divide d_model={d_model}; got {n_heads}")
        if not 0 <= weight_dropout < 1:
            raise ValueError(f"{name}: 0 <= `weight_dropout` < 1 must hold; got {weight_dropout}")
        self.kernel_size, self.n_heads, self.weight_dropout = kernel_size, n_heads, weight_dropout
        self.glu, self.causal = glu, not bidirectional
        self.ahead = kernel_size // 2 if bidirectional else 0  # how many later tokens a token sees
        self.in_proj = Linear(d_model, 2 * d_model if glu else d_model, bias=bias)
        self.out_proj = Linear(d_model, d_model, bias=bias)

    def convolve(self, u: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(b l d_model) and the inputs before it (s kernel_size-1 d_model) → as many, and the last if some came in."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, max_length: int | None = None) -> ConvolutionState:
        if not self.causal:
            raise ValueError(
                f"{type(self).__name__}: with `bidirectional` it has no state, as it sees the whole sequence at once"
            )
        return ConvolutionState(self.like(wide=True).new_zeros(batch_size, self.kernel_size - 1, self.d_model))

    def mixing_flops(self, context: int) -> float:
        """Two a tap and channel."""
        return 2 * self.kernel_size * self.d_model

    def mix(
        self, x: Tensor, state: ConvolutionState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ConvolutionState | None]:
        u = self.in_proj(x)
        if self.glu:
            u = F.glu(u)
        y, last = self.convolve(u, None if state is None else state.last, cu_seqlens)
        return self.out_proj(y), None if last is None else ConvolutionState(last)

    def normalised(self, logits: Tensor) -> Tensor:
        """Kernels that sum to 1 over their taps (... kernel_size), float32 (float64); DropConnect leaves out taps."""
        kernels = logits.softmax(-1, dtype=precision(logits))
        return F.dropout(kernels, self.weight_dropout, self.training)


@dataclasses.dataclass
class Places:
    """Where tokens stand once ``gap`` places precede every sequence: for the inputs before it, or zeros.

    Attributes:
        tokens: int64 ``(l)``; None without packing, where they follow one gap.
        gaps: int64 ``(s, gap)``, likewise.
        ends: int64 ``(s, gap)``, the last places of each sequence, some of its gap among them if it is short.
    """

    gap: int
    tokens: Tensor | None = None
    gaps: Tensor | None = None
    ends: Tensor | None = None

    @classmethod
    def of(cls, gap: int, length: int, cu_seqlens: Tensor | None) -> Places:
        if cu_seqlens is None:
            return cls(gap)
        borders, device = cu_seqlens.long(), cu_seqlens.device
        position = torch.arange(length, device=device)
        before = torch.searchsorted(borders[1:], position, right=True)  # how many sequences end before a token
        first = borders + gap * torch.arange(len(borders), device=device)
        within = torch.arange(gap, device=device)
        return cls(gap, position + gap * (before + 1), first[:-1, None] + within, first[1:, None] - gap + within)

    def spread(self, u: Tensor, before: Tensor | None) -> Tensor:
        """(b l d) → (b gap+l d), packed (1 s·gap+l d)."""
        if self.tokens is None or self.gaps is None:
            return F.pad(u, (0, 0, self.gap, 0)) if before is None else torch.cat([before.to(u.dtype), u], dim=1)
        out = u.new_zeros(1, u.shape[1] + self.gaps.numel(), u.shape[2]).index_copy(1, self.tokens, u)
        return out if before is None else out.index_copy(1, self.gaps.flatten(), before.to(u.dtype).flatten(0, 1)[None])

    def gather(self, y: Tensor) -> Tensor:
        """The tokens again, of what :meth:`spread` gave less its first gap."""
        return y if self.tokens is None else y.index_select(1, self.tokens - self.gap)

    def last(self, spread: Tensor) -> Tensor:
        """(s gap d) of what :meth:`spread` gave, float32 (float64)."""
        rows = spread[:, spread.shape[1] - self.gap :].clone() if self.ends is None else spread[0, self.ends]
        return rows.to(precision(spread))
