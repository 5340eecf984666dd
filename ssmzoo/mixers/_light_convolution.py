"""What lightweight and dynamic convolutions share (Wu et al. 2019, arXiv 1901.10430, section 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.state import State


@dataclasses.dataclass(kw_only=True)
class LightConvolutionOptions:
    """The options of both.

    Attributes:
        kernel_size: K, the taps; the paper's rise with depth: 3, 7, 15, then 31.
        n_heads: how many kernels there are, or how many a token has; each is shared by d_model / n_heads channels.
        glu: the gated linear unit; without it u = in_proj(x).
        weight_dropout: in training, the share of a kernel's taps that DropConnect leaves out.
        bias: biases on the projections in and out.
        bidirectional: kernels are centred, with ⌊K / 2⌋ later tokens; there is then no state.
    """

    kernel_size: int = 31
    n_heads: int = 16
    glu: bool = True
    weight_dropout: float = 0.0
    bias: bool = True
    bidirectional: bool = False


@dataclasses.dataclass
class ConvolutionState(State):
    """What the next call looks back on."""

    last: Tensor  # (s, kernel_size - 1, d_model), the last inputs of the convolution; float32 (float64)


class LightConvolution(Mixer):
    """Projection, gated linear unit, convolution, projection; a subclass defines :meth:`convolve`.

    Raises:
        ValueError: sizes that do not fit together, or a share outside of [0, 1).
    """

    options_class = LightConvolutionOptions
    state_class = ConvolutionState

    def __init__(self, d_model: int, **options: Any):
        o = LightConvolutionOptions(**options)
        super().__init__(d_model)
        self.look_ahead(o.bidirectional)
        name = type(self).__name__
        if o.kernel_size < 2:
            raise ValueError(
                f"{name}: `kernel_size` must be at least 2, as a kernel of one tap is 1; got {o.kernel_size}"
            )
        if o.n_heads < 1 or d_model % o.n_heads:
            raise ValueError(f"{name}: `n_heads` must divide d_model={d_model}; got {o.n_heads}")
        if not 0 <= o.weight_dropout < 1:
            raise ValueError(f"{name}: 0 <= `weight_dropout` < 1 must hold; got {o.weight_dropout}")
        self.kernel_size, self.n_heads = o.kernel_size, o.n_heads
        self.weight_dropout, self.glu = o.weight_dropout, o.glu
        self.ahead = o.kernel_size // 2 if o.bidirectional else 0  # how many later tokens a token sees
        self.in_proj = Linear(d_model, 2 * d_model if o.glu else d_model, bias=o.bias)
        self.out_proj = Linear(d_model, d_model, bias=o.bias)

    def convolve(self, u: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(b l d_model) and the inputs before it (s kernel_size-1 d_model) → as many, and the last if some came in."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, max_length: int | None = None) -> ConvolutionState:
        self.check_has_state()
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
