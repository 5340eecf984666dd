"""The state-space dual's step in Triton: what it can run, and its launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.strided import strided_token
from ssmkernels.core.triton_support import kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.ops.ssd.triton_arguments import sizes, skip, wide

__all__ = ["forward", "missing", "unsupported"]

NUMBERS = 1024  # of a state that a program has in registers


def unsupported(a: Any) -> str | None:
    return "no heads, channels or states" if 0 in (*a.x.shape[1:], a.B.shape[2]) else wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    (y,) = a.declared.outputs(a)
    b, h, p = a.x.shape
    n, sums = a.B.shape[2], a.state.dtype
    block_n = min(next_power_of_2(n), 128)
    block_p = min(next_power_of_2(p), NUMBERS // block_n)
    programs = b * h * -(-p // block_p)
    if programs:
        with on_device_of(a.x):
            kernels(__package__).step[(programs,)](
                state=a.state,
                state_strides=a.state.stride(),
                x=strided_token(a.x),
                dt=strided_token(a.dt),
                A=wide(a.A, sums),
                bias=wide(a.dt_bias, sums),
                B=strided_token(a.B),
                C=strided_token(a.C),
                D=skip(a.D, h, p, sums),
                z=strided_token(a.z),
                y=y,
                least=float(a.dt_limit[0]),
                most=float(a.dt_limit[1]),
                **sizes(a),
                SOFTPLUS=a.dt_softplus,
                BLOCK_P=block_p,
                BLOCK_N=block_n,
                num_warps=4,
            )
    return y
