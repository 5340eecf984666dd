"""Locality-sensitive hashing of queries and keys by their directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.autocast import without_autocast
from ssmkernels.core.validate import precision


def rotation_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """Buckets by random rotations (Andoni et al. 2015; Reformer, arXiv 2001.04451): argmax of (R x, -R x).

    Args:
        x: ``(b, l, h, d)``.
        rotations: ``(rounds, h, d, n_buckets / 2)``.

    Returns:
        int32 ``(b, l, h, rounds)``.
    """
    with without_autocast(x.device.type):
        wide = precision(x)
        turned = torch.einsum("blhd,rhdn->blhrn", x.detach().to(wide), rotations.to(wide))
    return torch.cat([turned, -turned], dim=-1).argmax(-1).int()


def angular_ranks(x: Tensor, projections: Tensor) -> Tensor:
    """Ranks of angular hashes, neighbouring ones a bit apart (HyperAttention, arXiv 2310.05869, definition 1).

    A hash is the signs of ``projections``; read as a Gray code it gives a rank whose neighbours differ in one sign.

    Args:
        x: ``(b, l, h, d)``.
        projections: ``(h, d, bits)``.

    Returns:
        int64 ``(b, l, h)``, below 2 to the power of the bits.
    """
    with without_autocast(x.device.type):
        wide = precision(x)
        signs = torch.einsum("blhd,hdn->blhn", x.detach().to(wide), projections.to(wide)) > 0
    bits = projections.shape[2]
    code = (signs.long() << torch.arange(bits, device=x.device)).sum(-1)
    shift = 1
    while shift < bits:  # a rank is its Gray code, exclusive-ored with itself shifted by 1, 2, 3, … bits
        code = code ^ (code >> shift)
        shift *= 2
    return code
