"""One step of Mamba-3's recurrence in Triton: the small rotations in PyTorch, the state in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.core.validate import precision
from ssmkernels.ops.mamba3_scan.reference import biased, rotated, within_a_turn
from ssmkernels.ops.ssd.reference import finished

__all__ = ["forward", "missing", "unsupported"]

NUMBERS = 1024  # of a state that a program has in registers, or a row of it


def unsupported(a: Any) -> str | None:
    if 0 in (*a.x.shape[1:], a.B.shape[-1]):
        return "no inputs, heads, channels or states"
    return wrong_device(a)


def forward(a: Any, _: bool) -> Tensor:
    wide = precision(a.x)
    v, dt, A, trap, angles = (t.to(wide) for t in (a.x, a.dt, a.A, a.trap, a.angles))
    batch, rank, heads, p = v.shape
    n = a.B.shape[-1]
    theta = within_a_turn(a.angle + dt[..., None] * angles[:, None])
    k, q = (
        rotated(biased(t.to(wide), bias, heads), theta[:, None], a.interleaved)
        for t, bias in ((a.B, a.B_bias), (a.C, a.C_bias))
    )
    alpha, y = torch.exp(dt * A), torch.empty_like(v, memory_format=torch.contiguous_format)
    block_n = next_power_of_2(n)
    block_p = max(1, min(next_power_of_2(p), NUMBERS // block_n))
    if batch:
        with on_device_of(a.x):
            kernels(__package__).step[(batch * heads * -(-p // block_p),)](
                state=a.state,
                **{f"state_{axis}": a.state.stride(i) for i, axis in enumerate(("batch", "head", "p", "n"))},
                alpha=alpha,
                before=alpha * (1 - trap) * dt,
                now=trap * dt,
                last_key=a.key.contiguous(),
                last_value=a.value.contiguous(),
                key=k.contiguous(),
                value=v.contiguous(),
                query=q.contiguous(),
                y=y,
                H=heads,
                R=rank,
                P=p,
                N=n,
                BLOCK_P=block_p,
                BLOCK_N=block_n,
                num_warps=4,
            )
    for state, after in ((a.angle, theta), (a.key, k), (a.value, v)):
        state.copy_(after)
    return finished(y, v, a.D, a.z).to(a.x.dtype)
