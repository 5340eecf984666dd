"""The long convolution as it stands in many repositories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.bench.peers import TORCH, Peer, calls_like


@calls_like("fft_conv", takes="D gate")
def torch_fft(a: Any) -> Tensor:
    """Real FFTs along time of twice the length, with channels before time."""
    length = a.u.shape[1]
    size = 2 * max(length, a.kernel.shape[1])
    wide = torch.promote_types(a.u.dtype, torch.float32)
    transposed = a.u.transpose(1, 2).to(wide)
    product = torch.fft.rfft(transposed, n=size) * torch.fft.rfft(a.kernel.to(wide), n=size)
    y = torch.fft.irfft(product, n=size)[..., :length].transpose(1, 2)
    y = y if a.D is None else y + a.D * a.u
    return (y if a.gate is None else a.gate * y).to(a.u.dtype)


PEERS = {"fft_conv": (Peer("torch.fft", TORCH, torch_fft, "channels before time within, twice the length"),)}
