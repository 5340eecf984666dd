"""The long convolution as it stands in many repositories."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.bench.peers import TORCH, Peer, refuse


def torch_fft(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None = None,
    *,
    kernel_reverse: Tensor | None = None,
    gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Real FFTs along time of twice the length, with channels before time."""
    refuse(kernel_reverse is not None or cu_seqlens is not None, "reverse kernel or packed sequences")
    length = u.shape[1]
    size = 2 * max(length, kernel.shape[1])
    wide = torch.promote_types(u.dtype, torch.float32)
    transposed = u.transpose(1, 2).to(wide)
    product = torch.fft.rfft(transposed, n=size) * torch.fft.rfft(kernel.to(wide), n=size)
    y = torch.fft.irfft(product, n=size)[..., :length].transpose(1, 2)
    y = y if D is None else y + D * u
    return (y if gate is None else gate * y).to(u.dtype)


PEERS = {"fft_conv": (Peer("torch.fft", TORCH, torch_fft, "channels before time within, twice the length"),)}
