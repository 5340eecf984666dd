"""The native causal convolution's step (``cpu.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, plain, rows
from ssmkernels.native import wrong_device as unsupported

__all__ = ["forward", "missing", "unsupported"]

_Step = native.arguments("_Step", "state x weight bias y dtype batch d width silu threads x_batch")


def forward(a: Any, save: bool) -> Tensor:
    wide = precision(a.x)
    own = a.state.contiguous()
    x, weight = rows(a.x), plain(a.weight, wide)
    bias = None if a.bias is None else plain(a.bias, wide)
    y = x.new_empty(x.shape)
    batch, d = x.shape
    native.run(
        "causal_conv1d_step",
        _Step(
            own.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            address(bias),
            y.data_ptr(),
            native.DTYPES[x.dtype],
            batch,
            d,
            weight.shape[1],
            a.activation == "silu",
            native.threads(x.numel() * 4),
            x.stride(0),
        ),
    )
    if own is not a.state:
        a.state.copy_(own)
    return y
