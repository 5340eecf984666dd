"""The native causal convolution's step (``cpu.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, plain, rows
from ssmkernels.native import wrong_device as unsupported
from ssmkernels.native.prepared import Prepared, update

__all__ = ["forward", "missing", "prepared", "unsupported"]


def forward(a: Any, _: bool) -> Tensor:
    return update(prepared, a, ("state",))


def prepared(a: Any) -> Prepared:
    """The kernel's call; a state that is not contiguous is copied."""
    wide = precision(a.x)
    state, x, weight = a.state.contiguous(), rows(a.x), plain(a.weight, wide)
    bias = None if a.bias is None else plain(a.bias, wide)
    y = x.new_empty(x.shape)
    batch, d = x.shape
    return Prepared(
        "causal_conv1d_step",
        {
            "state": state.data_ptr(),
            "x": x.data_ptr(),
            "weight": weight.data_ptr(),
            "bias": address(bias),
            "y": y.data_ptr(),
            "dtype": native.DTYPES[x.dtype],
            "batch": batch,
            "d": d,
            "width": weight.shape[1],
            "silu": a.activation == "silu",
            "threads": native.threads(x.numel() * 4),
            "x_batch": x.stride(0),
        },
        (state, x, weight, bias),
        y,
    )
