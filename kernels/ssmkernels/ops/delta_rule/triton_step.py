"""The delta rule's step in Triton: what it can run, and its launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.strided import strided_token
from ssmkernels.core.triton_support import kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.ops.delta_rule.reference import scale_of

__all__ = ["forward", "missing", "unsupported"]

NUMBERS = 4096  # of a state that a program has in registers


def unsupported(a: Any) -> str | None:
    if a.k.shape[2] > NUMBERS:
        return f"heads of more than {NUMBERS} key channels"
    return "no heads or channels" if 0 in (*a.k.shape[1:], *a.v.shape[1:]) else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    (o,) = a.declared.outputs(a)
    (b, h, v), (g, k) = a.v.shape, a.k.shape[1:]
    rows = next_power_of_2(k)
    block = min(next_power_of_2(v), max(1, NUMBERS // rows))
    programs = b * h * -(-v // block)
    if programs:
        with on_device_of(a.q):
            kernels(__package__).step[(programs,)](
                state=a.state,
                state_strides=a.state.stride(),
                q=strided_token(a.q),
                k=strided_token(a.k),
                v=strided_token(a.v),
                beta=strided_token(a.beta),
                decay=strided_token(a.log_decay),
                o=o,
                scale=scale_of(a.scale, k),
                H=h,
                GROUP=h // g,
                K=k,
                V=v,
                BLOCK_K=rows,
                BLOCK=block,
                num_warps=4,
            )
    return o
