"""Linear maps."""

from __future__ import annotations

from torch import Tensor, nn

from ssmkernels.products import linear


class Linear(nn.Linear):
    """PyTorch's, but for large float32 products without gradients on a CPU: see :func:`ssmkernels.products.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
