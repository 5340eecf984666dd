"""Attention that drops weights, as :mod:`ssmkernels.compat.flash_attn` has it."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.attention.reference import distances, in_window


def dropping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q (b l h d), k and v (b m h_kv d), whose weights are set to 0 with a probability of ``dropout_p``.

    One number is drawn for each weight, in the order of (b h l m), from PyTorch's generator of the device. All weights
    are in memory at once, and are kept for the backward pass.

    Returns:
        the output (b l h d); the log-sum-exp (b h l) before dropping; and the exponentials (b h l m) of the logits less
        their largest one, negative where they were dropped.
    """
    wide = precision(q)
    k, v = (t.to(wide).repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    s = torch.einsum("blhd,bmhd->bhlm", q.to(wide), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    distance = distances(q.shape[1], k.shape[1], q.device)
    if slopes is not None:
        s = s - slopes.to(wide)[..., None, None] * distance.abs()
    s = s.masked_fill(~in_window(distance, *window), -torch.inf)
    least = torch.finfo(wide).min
    largest = torch.cat([s.detach(), torch.full_like(s[..., :1], least)], dim=-1).amax(-1, keepdim=True)
    e = torch.exp(s - largest)  # all 0 where a query sees no key
    total = e.sum(-1, keepdim=True)
    kept = torch.rand(s.shape, device=s.device) >= dropout_p
    weights = e * kept / ((1 - dropout_p) * total.masked_fill(total == 0, 1))
    out = torch.einsum("bhlm,bmhv->blhv", weights, v).to(q.dtype)
    return out, (total.log() + largest).squeeze(-1), torch.where(kept, e, -e).detach()
