"""The state-space dual's step in Triton: what it can run, and its launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.core.triton_support import kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.ops.ssd.triton_arguments import sizes, skip, strides, wide

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
                **strides("state", a.state, ("batch", "head", "p", "n")),
                x=a.x,
                **strides("x", a.x, ("batch", "head", "step")),
                dt=a.dt,
                **strides("dt", a.dt, ("batch", "head")),
                A=wide(a.A, sums),
                bias=wide(a.dt_bias, sums),
                B=a.B,
                **strides("B", a.B, ("batch", "group", "step")),
                C=a.C,
                **strides("C", a.C, ("batch", "group", "step")),
                **skip(a.D, h, p, sums),
                z=a.z,
                **strides("z", a.z, ("batch", "head", "step")),
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
