"""The causal convolution's step in Triton: its launch, and what the convolution itself shares with it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import kernels, missing, next_power_of_2, on_device_of, wrong_device

__all__ = ["block_of", "forward", "missing", "unsupported", "warps_of"]

WIDEST = 16  # taps are unrolled


class Dims(NamedTuple):
    """The constants of the kernels, in one argument: taps, the activation, and steps and channels of a program."""

    W: int
    SILU: bool
    T: int
    BLOCK_D: int


def unsupported(a: Any) -> str | None:
    if a.weight.shape[1] > WIDEST:
        return f"a width of more than {WIDEST}"
    return wrong_device(a)


def forward(a: Any, save: bool) -> Tensor:
    x, weight, bias = a.x, a.weight, a.bias
    y = x.new_empty(x.shape)
    b, d = x.shape
    block = block_of(d)
    d_blocks = -(-d // block)
    if y.numel():
        with on_device_of(x):
            kernels(__package__).step[(b * d_blocks,)](
                *(strided(t) for t in (a.state, x, weight, bias)),
                y,
                d,
                d_blocks,
                Dims(weight.shape[1], a.activation == "silu", 1, block),
                num_warps=warps_of(block, 1),
            )
    return y


def block_of(d: int) -> int:
    """Channels of a program."""
    return min(128, next_power_of_2(d))


def warps_of(block: int, channels: int) -> int:
    """Warps of 32 threads with so many channels each."""
    return max(1, block // (32 * channels))
