"""The causal convolution by the CUDA kernel of the package causal_conv1d.

Written against the package's published signature and tested with a stand-in for it; it has not been run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core import external
from ssmkernels.core.packing import last_of_each
from ssmkernels.core.validate import precision

FARTHEST = 2**31  # its offsets have 32 bits


def missing() -> str | None:
    return external.missing("causal_conv1d")


def unsupported(a: Any) -> str | None:
    return external.wrong_device(a) or lacking(a)


def lacking(a: Any) -> str | None:
    """What the package lacks that a call needs, wherever its tensors are; None where it has all."""
    x = a.x
    if x.dtype == torch.float64:
        return "float64"
    if not 2 <= a.weight.shape[1] <= 4:
        return "widths but 2, 3 and 4"
    if x.numel() == 0:
        return "empty inputs"
    if x.numel() > FARTHEST:
        return "inputs of more than 2³¹ elements"
    if x.shape[2] % 8:
        return "channels that are no multiple of 8"
    if a.initial_state is not None and x.dtype != torch.float32:
        return "float32 states beside half precision"
    if a.initial_state is not None and a.cu_seqlens is not None:
        return "initial states of packed sequences"
    return None


def compute(a: Any) -> tuple[Tensor, Tensor]:
    return call(a).contiguous(), _final_state(a.x, a.weight.shape[1] - 1, a.initial_state, a.cu_seqlens)


def call(a: Any) -> Tensor:
    """The package's own function, which takes time-major tensors as transposed views: x (b l d) → y (b l d)."""
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias, initial_state = a.x, a.weight, a.bias, a.initial_state
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    seq_idx = None
    if a.cu_seqlens is not None:
        tokens = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
        seq_idx = torch.searchsorted(a.cu_seqlens[1:].contiguous(), tokens, right=True, out_int32=True)[None]
    y = causal_conv1d_fn(
        _aligned(x).transpose(1, 2),
        weight,
        bias,
        seq_idx=seq_idx,
        initial_states=None if initial_state is None else initial_state.contiguous().transpose(1, 2),
        activation=a.activation,
    )
    external.without_second_derivative("causal_conv1d", y)
    return y.transpose(1, 2)


def _aligned(x: Tensor) -> Tensor:
    """The same values where the package can load eight channels at once, and reach them all."""
    steps = x.stride(1) >= x.shape[2] and x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
    near = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) < FARTHEST
    return x if steps and near and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _final_state(x: Tensor, before: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last inputs of each sequence, which are inputs and nothing to compute: (s w-1 d)."""
    if cu_seqlens is not None:
        return last_of_each(x[0], cu_seqlens, before).to(precision(x))
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], before, x.shape[2], dtype=precision(x))
    last = x[:, max(0, x.shape[1] - before) :].to(precision(x))
    return torch.cat([initial_state[:, last.shape[1] :], last], dim=1)
