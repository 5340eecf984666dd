"""What a part of a sequence leaves in a state, as a sum over its tokens, where the op itself would be a longer way.

Both are differentiable, and take a fraction of the time of their op: a product of matrices for each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision
from ssmkernels.ops.mamba3_scan.reference import biased, rotated, within_a_turn
from ssmkernels.ops.selective_scan.ends import after

Given = Mapping[str, Any]

LOWEST = -1e30  # a stabiliser below all others


def outer(k: Tensor, v: Tensor) -> Tensor:
    """Σ_t k_t v_tᵀ: (l h k), (l h v) → (h k v)."""
    return torch.bmm(k.permute(1, 2, 0), v.to(k.dtype).transpose(0, 1))


def of_mlstm(given: Given) -> list[Tensor]:
    """C, n and m ``(s, …)`` of ``mlstm``: with the gates' logarithms, ``Σ_t exp(i_t + Σ_{j > t} f_j - m) k_t v_tᵀ``."""
    wide, found = precision(given["v"]), []
    kept, new = F.logsigmoid(given["f"].to(wide))[0], given["i"].to(wide)[0]
    for _, span in spans(given["cu_seqlens"]):
        weights = new[span] + after(kept[span])  # (l h)
        m = F.pad(weights, (0, 0, 0, 1), value=LOWEST).amax(0)
        keys = given["k"][0, span].to(wide) * torch.exp(weights - m)[..., None]
        found.append((outer(keys, given["v"][0, span]), keys.sum(0), m))
    return [torch.stack(each) for each in zip(*found, strict=True)]


def of_mamba3(given: Given) -> list[Tensor]:
    """The state, angle, key and value ``(s, …)`` of ``mamba3_scan``.

    With γ = λ Δ and μ = (1 - λ) Δ, step t adds ``(γ_t + μ_{t+1}) v_t k_tᵀ``; μ of a step after the part is not here.
    """
    wide, heads = precision(given["x"]), given["x"].shape[3]
    v, dt, A, B, trap, angles = (given[name].to(wide)[0] for name in ("x", "dt", "A", "B", "trap", "angles"))
    found = []
    for s, span in spans(given["cu_seqlens"]):
        first, share = given["initial_angle"][s].to(wide), (1 - trap[span]) * dt[span]
        turned = (dt[span, :, None] * angles[span, None]).double().cumsum(0) + first.double()
        theta = within_a_turn(turned).to(wide)  # (l h a)
        weights = torch.exp(after(dt[span] * A[span])) * (trap[span] * dt[span] + F.pad(share[1:], (0, 0, 0, 1)))
        k, order = _turned(B[span], given["B_bias"], theta, given["interleaved"])  # (l r h n)
        state = outer((v[span] * weights[:, None, :, None]).flatten(0, 1), k.flatten(0, 1))
        last = (first, *_nothing(given))
        if len(theta):
            key = rotated(biased(B[span][-1], given["B_bias"], heads), theta[-1], given["interleaved"])
            last = (theta[-1], key, v[span][-1])
        found.append((state if order is None else state[..., order], *last))
    return [torch.stack(each) for each in zip(*found, strict=True)]


def _turned(maps: Tensor, bias: Tensor | None, theta: Tensor, interleaved: bool) -> tuple[Tensor, Tensor | None]:
    """The maps (l r g n) of heads, turned by θ (l h a) as complex numbers, and where their dimensions are now.

    Those that belong together are neighbours, and those that do not turn are the last. In None they are in order.
    """
    n, (heads, count) = maps.shape[-1], theta.shape[-2:]
    order = None
    if not interleaved:
        pairs = torch.arange(count, device=maps.device)
        turning = torch.stack([pairs, pairs + n // 2], dim=1).flatten()
        still = torch.ones(n, dtype=torch.bool, device=maps.device).index_fill(0, turning, False).nonzero()[:, 0]
        there = torch.cat([turning, still])
        maps, bias, order = maps[..., there], None if bias is None else bias[..., there], there.argsort()
    of_heads = maps[:, :, :, None].expand(-1, -1, -1, heads // maps.shape[2], -1).flatten(2, 3)
    if bias is not None:
        of_heads = of_heads + bias.to(maps.dtype).transpose(0, 1)
    turning, still = of_heads.split([2 * count, n - 2 * count], dim=-1)
    phases = torch.polar(torch.ones_like(theta), theta)[:, None]  # (l 1 h a)
    turning = torch.view_as_real(torch.view_as_complex(turning.unflatten(-1, (count, 2)).contiguous()) * phases)
    return torch.cat([turning.flatten(-2), still], dim=-1), order


def _nothing(given: Given) -> tuple[Tensor, Tensor]:
    """The last key and value of a sequence without a step here."""
    x, B = given["x"], given["B"]
    rank, heads, width = x.shape[2:]
    wide = precision(x)
    return x.new_zeros(rank, heads, B.shape[-1], dtype=wide), x.new_zeros(rank, heads, width, dtype=wide)
