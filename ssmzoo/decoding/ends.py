"""What comes after the last layer, as native calls: the last norm and the head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmkernels import native, rms_norm
from ssmkernels.core.validate import HALF
from ssmkernels.native import products
from ssmkernels.native.calls import Calls, NotPreparedError
from ssmzoo.linear import Linear, prepare_map
from ssmzoo.norm import RMSNorm
from ssmzoo.quantized import QuantizedLinear


class Ends(NamedTuple):
    """A model's last norm and its head, where there is nothing else after the layers."""

    norm: RMSNorm
    head: Linear | QuantizedLinear

    @classmethod
    def of(cls, model: nn.Module) -> Ends | None:
        """Those of a sequence model; None where it has others."""
        norm, head, transform = (model._modules.get(name) for name in ("norm_f", "lm_head", "head_transform"))
        if type(norm) is not RMSNorm or type(head) not in (Linear, QuantizedLinear) or transform is not None:
            return None
        assert isinstance(norm, RMSNorm)
        assert isinstance(head, Linear | QuantizedLinear)
        return cls(norm, head)

    def check(self, rows: int, dtype: torch.dtype) -> None:
        """Before the layers' calls are made: whether :meth:`prepare` might add its own for so many rows of a dtype.

        Raises:
            NotPreparedError: it would not.
        """
        if isinstance(self.head, Linear):
            large = self.head.weight.numel() >= products.LARGE
            if not large or (dtype not in HALF and (dtype != torch.float32 or rows > native.FEW)):
                raise NotPreparedError("lm_head")

    def prepare(self, calls: Calls, mixed: Tensor, stream: Tensor) -> Tensor:
        """Adds the norm of what the last layer gives plus the stream, both ``(b, d_model)``, and the head's product.

        Returns:
            ``(b, outputs)``.

        Raises:
            NotPreparedError: the modules would compute it in another way, so that its bits would differ.
        """
        x = calls.op(rms_norm, mixed, self.norm.weight, eps=self.norm.eps, residual=stream)
        self.check(len(x), x.dtype)
        return prepare_map(calls, self.head, x)
