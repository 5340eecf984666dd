"""The state-space dual by the Triton kernels of the package mamba_ssm.

Written against the package's published signature and tested with a stand-in for it; it has not been run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core import external

CHUNK = 256  # tokens, the default of Mamba-2's configurations


def missing() -> str | None:
    return external.missing("mamba_ssm.ops.triton.ssd_combined")


def unsupported(a: Any) -> str | None:
    return external.wrong_device(a) or lacking(a)


def lacking(a: Any) -> str | None:
    """What the package lacks that a call needs, wherever its tensors are; None where it has all."""
    if a.cu_seqlens is not None:
        # It takes numbers of sequences, but one initial state for all, and gives no gradient to states of each
        return "states of packed sequences"
    if a.x.dtype == torch.float64:
        return "float64"
    if a.x.dtype == torch.float32:
        return "products in float32, which it rounds to TF32"
    if a.x.numel() == 0 or a.B.numel() == 0:
        return "empty inputs"
    return None


def compute(a: Any) -> tuple[Tensor, Tensor]:
    y, final_state = call(a)
    external.without_second_derivative("mamba_ssm", y, final_state)
    return y.contiguous(), final_state.float()


def call(a: Any) -> tuple[Tensor, Tensor]:
    """The package's own function. Gradients reach the initial state, and come from the final one."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        a.x,
        a.dt,
        a.A.float(),
        a.B,
        a.C,
        chunk_length(a.chunk_size),
        D=None if a.D is None else a.D.float(),
        z=a.z,
        dt_bias=None if a.dt_bias is None else a.dt_bias.float(),
        initial_states=a.initial_state,
        dt_softplus=a.dt_softplus,
        dt_limit=tuple(a.dt_limit),
        return_final_states=True,
    )


def chunk_length(size: int | None) -> int:
    """The hint as a power of two that the package's blocks fit into."""
    return CHUNK if size is None else min(max(1 << (size - 1).bit_length(), 16), CHUNK)
