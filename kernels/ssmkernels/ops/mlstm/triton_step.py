"""The matrix memory's step in Triton: what it can run, and its launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.strided import strided_token
from ssmkernels.core.triton_support import kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.ops.mlstm.reference import scale_of

__all__ = ["forward", "missing", "unsupported"]

NUMBERS = 2048  # of a state that a program has in registers


def unsupported(a: Any) -> str | None:
    return "no heads, keys or values" if 0 in a.C.shape[1:] else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    (y,) = a.declared.outputs(a)
    b, h, k, v = a.C.shape
    block_v = min(next_power_of_2(v), 64)
    tensors = {name: strided_token(getattr(a, name)) for name in ("n", "m", "q", "k", "v", "i", "f")}
    if b * h:
        with on_device_of(a.q):
            kernels(__package__).step[(b * h,)](
                C=a.C,
                C_strides=a.C.stride(),
                **tensors,
                y=y,
                scale=scale_of(a.scale, a.q),
                H=h,
                K=k,
                V=v,
                BLOCK_K=min(next_power_of_2(k), NUMBERS // block_v),
                BLOCK_V=block_v,
                num_warps=4,
            )
    return y
