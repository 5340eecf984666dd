"""The selective scan as the paper writes it: one step after another.

Mamba (arXiv 2312.00752), equations 1 and 2 with the simplified zero-order hold of section 3.2: Ā = exp(ΔA), B̄ = ΔB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        h = _zero_state(u, A) if initial_state is None else initial_state.clone()  # (b d n)
        return _one_batch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h)

    def part(x: Tensor | None, time: slice) -> Tensor | None:
        return x if x is None or x.ndim == 2 else x[:, time]  # fixed B and C have no time

    ys, states = [u[:, :0]], [_zero_state(u, A)[:0]]
    for i, time in spans(cu_seqlens):
        h = _zero_state(u, A) if initial_state is None else initial_state[i : i + 1]
        y, h = _one_batch(
            u[:, time], delta[:, time], A, part(B, time), part(C, time), D, part(z, time), delta_bias, delta_softplus, h
        )
        ys.append(y)
        states.append(h)
    return torch.cat(ys, dim=1), torch.cat(states)


def _zero_state(u: Tensor, A: Tensor) -> Tensor:
    return torch.zeros(u.shape[0], *A.shape, device=u.device, dtype=torch.promote_types(precision(u), A.dtype))


def _one_batch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h):
    ys = []
    for t in range(u.shape[1]):
        B_t = B if B.ndim == 2 else B[:, t]  # (d n), (b n) or (b g n)
        C_t = C if C.ndim == 2 else C[:, t]
        z_t = None if z is None else z[:, t]
        y, h = _step(h, u[:, t], delta[:, t], A, B_t, C_t, B.ndim == 2, C.ndim == 2, D, z_t, delta_bias, delta_softplus)
        ys.append(y)
    y = torch.stack(ys, dim=1) if ys else u.clone()  # (b 0 d), with u's graph
    return y.to(u.dtype), h


def _step(h, u, delta, A, B, C, B_fixed, C_fixed, D, z, delta_bias, delta_softplus):
    """h (b d n) and one time step of everything else → y (b d) before rounding, h (b d n)."""
    wide = precision(u)
    u, delta, A, B, C = (_widen(x, wide) for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide)  # (b d)
    if delta_softplus:
        delta = F.softplus(delta, threshold=40)  # from PyTorch's own 20 on, x is not yet softplus(x) in float64
    B = B if B_fixed else _per_channel(B, u.shape[-1])  # (b d n)
    C = C if C_fixed else _per_channel(C, u.shape[-1])
    delta = delta[..., None]  # (b d 1)
    h = torch.exp(delta * A) * h + delta * B * u[..., None]  # (b d n)
    y = (h * C).sum(-1)  # (b d)
    if A.is_complex():
        y = 2 * y.real  # each entry stands for itself and its conjugate
    if D is not None:
        y = y + D.to(wide) * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y, h


def _per_channel(x: Tensor, d: int) -> Tensor:
    """(b n) or (b g n) → what broadcasts against (b d n)."""
    if x.ndim == 2:
        return x[:, None]
    return repeat(x, "b g n -> b (g c) n", c=d // x.shape[1])


def _widen(x: Tensor, wide: torch.dtype) -> Tensor:
    return x.to(torch.promote_types(x.dtype, wide))


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    y, h = _step(state, u, delta, A, B, C, False, False, D, z, delta_bias, delta_softplus)
    state.copy_(h)
    return y.to(u.dtype)
