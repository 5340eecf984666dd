"""Dynamic convolution (Wu et al. 2019, arXiv 1901.10430, section 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ssmkernels.core.validate import precision
from ssmzoo.linear import Linear
from ssmzoo.mixers._light_convolution import LightConvolution
from ssmzoo.mixers._places import Places
from ssmzoo.registry import register_mixer

CHUNK = 32  # a power of two: tokens whose kernels make one banded matrix


@register_mixer("dynamicconv")
class DynamicConv(LightConvolution):
    """A depthwise convolution whose kernels each token predicts for itself: attention by position, not by content.

    It takes the place of self-attention and approximates nothing. With the gated linear unit u = a · sigmoid(b) of
    [a, b] = in_proj(x), channel c of head h = ⌊c n_heads / d_model⌋, and K = kernel_size taps::

        y_tc = Σ_{j=0}^{K-1} softmax(weight_proj(u_t)_h)_j · u_{t-(K-1)+j, c},    out = out_proj(y)

    Args:
        d_model: width of input and output.
        options: those of :class:`~ssmzoo.mixers._light_convolution.LightConvolutionOptions`.
    """

    def __init__(self, d_model: int, **options: Any):
        super().__init__(d_model, **options)
        self.weight_proj = Linear(d_model, self.n_heads * self.kernel_size, bias=False)

    def convolve(self, u: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if u.shape[1] == 0:
            return u, before
        places = Places.of(self.kernel_size - 1, u.shape[1], cu_seqlens)
        inputs = places.spread(u, before)
        logits = self.weight_proj(inputs[:, places.gap :]).unflatten(-1, (self.n_heads, self.kernel_size))
        shifted = F.pad(inputs, (0, 0, 0, self.ahead))[:, self.ahead :].to(precision(u))
        y = apply_kernels(self.normalised(logits), shifted).to(u.dtype)
        return places.gather(y), None if before is None else places.last(inputs)


def apply_kernels(kernels: Tensor, inputs: Tensor) -> Tensor:
    """y_t = Σ_j kernels[t, h, j] · inputs[t + j], head by head, through matrix products.

    The kernels of c tokens in a row fill a band of a matrix (c c+w-1), which multiplies the
    c+w-1 inputs that they meet.

    Args:
        kernels: ``(b, l, h, w)``, l ≥ 1.
        inputs: ``(b, w-1+l, d)``, h dividing d.

    Returns:
        ``(b, l, d)``.
    """
    l, h, w = kernels.shape[1:]
    c = 1
    while c < min(l, CHUNK):
        c *= 2
    padding = -l % c
    kernels = F.pad(kernels, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, c)).transpose(2, 3)  # (b n h c w)
    # Rows of c + w read as rows one shorter: each starts one further to the right.
    band = F.pad(kernels, (0, c)).flatten(-2)[..., : c * (c + w - 1)].unflatten(-1, (c, c + w - 1))
    windows = F.pad(inputs, (0, 0, 0, padding)).unfold(1, c + w - 1, c).unflatten(2, (h, -1)).mT  # (b n h c+w-1 d/h)
    return (band @ windows).transpose(2, 3).flatten(3).flatten(1, 2)[:, :l]
