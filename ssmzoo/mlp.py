"""Channel mixers: what stands after a mixer in a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.linear import Linear


class SwiGLU(nn.Module):
    """fc2(silu(a) · b) with a, b = fc1(x) (Shazeer 2020, arXiv 2002.05202).

    Args:
        d_model: width of input and output.
        d_intermediate: width inside; 8/3 · d_model rounded up to a multiple of ``multiple_of`` if None.
        multiple_of: see above.
        bias: biases on both maps.
    """

    def __init__(
        self, d_model: int, *, d_intermediate: int | None = None, multiple_of: int = 64, bias: bool = False
    ) -> None:
        super().__init__()
        inside = d_intermediate or -(-8 * d_model // (3 * multiple_of)) * multiple_of
        self.fc1 = Linear(d_model, 2 * inside, bias=bias)
        self.fc2 = Linear(inside, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(a) * b)


class GELU(nn.Module):
    """fc2(gelu(fc1(x))), the Transformer's own.

    Args:
        d_model: width of input and output.
        d_intermediate: width inside; 4 · d_model if None.
        bias: biases on both maps.
    """

    def __init__(self, d_model: int, *, d_intermediate: int | None = None, bias: bool = True) -> None:
        super().__init__()
        inside = d_intermediate or 4 * d_model
        self.fc1 = Linear(d_model, inside, bias=bias)
        self.fc2 = Linear(inside, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class NoMLP(nn.Module):
    """Nothing after the mixer."""

    def __init__(self, d_model: int) -> None:
        super().__init__()


MLPS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "gelu": GELU, "none": NoMLP}
