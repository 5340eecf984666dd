"""The selective scan in short chunks, in PyTorch: the same steps, without a (b l d n) tensor over the whole length.

The forward pass keeps only the state at each chunk's start. The backward pass walks the chunks from the last to the
first, computes each chunk's states again and runs the adjoint recurrence g_t = C_t ∂y_t + Ā_{t+1} g_{t+1} through it.
Everything inside a chunk is time-first, so that one step is one fused multiply-add over contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.library import define
from ssmkernels.core.names import OPS
from ssmkernels.core.packing import pad
from ssmkernels.core.validate import precision
from ssmkernels.ops.selective_scan import reference

ELEMENTS = 2**19  # of one (t b d n) tensor in a chunk: a few of them stay in the cache


TRACEABLE = True  # its core is an operator
LOSES_TANGENTS = True  # as its core is an operator in eager calls too


def unsupported(a: Any) -> str | None:
    if a.A.is_complex():
        return "complex A"
    if a.B.ndim == 2 or a.C.ndim == 2:
        return "B or C fixed over time"
    return None


def compute(a: Any) -> tuple[Tensor, Tensor]:
    wide = precision(a.u)
    x, dt = a.u.to(wide), a.delta.to(wide)
    if a.delta_bias is not None:
        dt = dt + a.delta_bias.to(wide)
    if a.delta_softplus:
        dt = F.softplus(dt, threshold=40)
    B, C = (t.to(wide) if t.ndim == 4 else t.to(wide).unsqueeze(2) for t in (a.B, a.C))  # (b l g n)
    y, final_state, _ = scan(x, dt, a.A.to(wide), B, C, a.initial_state, a.cu_seqlens)
    if a.D is not None:
        y = y + a.D.to(wide) * x
    if a.z is not None:
        y = y * F.silu(a.z.to(wide))
    return y.to(a.u.dtype), final_state


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, dt (b l d), A (d n), B, C (b l g n), of one dtype → y (b l d), final state (s d n), the chunks' first ones."""
    if cu_seqlens is not None:
        index, mask = pad(cu_seqlens)
        y, final_state, starts = _scan(*_padded(x, dt, A, B, C, index, mask), initial_state, None)
        return y[mask][None], final_state, starts
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.clone()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    chunks = []
    for time in _chunks(x, A):
        chunks.append(h)
        chunk = _Chunk(x, dt, A, B, C, time)
        states = chunk.states(h)
        y[:, time] = torch.einsum("tbgcn,tbgn->btgc", chunk.grouped(states), chunk.C).flatten(2)
        h = states[-1].clone()
    return y, h, torch.stack(chunks) if chunks else x.new_empty(0, *h.shape)


def _scan_fake(x, dt, A, B, C, initial_state, cu_seqlens):
    s = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks: int | torch.SymInt
    if cu_seqlens is None:
        chunks = len_chunks(x, A)
    elif isinstance(x, FakeTensor):  # as long as the longest sequence
        chunks = torch.library.get_ctx().new_dynamic_size()
    else:  # on the meta device, where no size may be left open
        chunks = x.shape[1]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(s, *A.shape),
        x.new_empty(chunks, s, *A.shape),
    )


def _scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    dy: Tensor,
    dh: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state from those of y (b l d) and of the final state (s d n)."""
    if cu_seqlens is not None:
        index, mask = pad(cu_seqlens)
        padded = _padded(x, dt, A, B, C, index, mask)
        dy = torch.where(mask[..., None], dy[0, index], 0)
        dx, ddt, dA, dB, dC, dh = _scan_backward(*padded, None, starts, dy, dh)
        return dx[mask][None], ddt[mask][None], dA, dB[mask][None], dC[mask][None], dh
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    dA = torch.zeros_like(A)
    g = dh.clone()  # what reaches the state from later steps
    for start, time in reversed(list(zip(starts, _chunks(x, A), strict=True))):
        chunk = _Chunk(x, dt, A, B, C, time)
        states = chunk.states(start)
        dy_t = chunk.grouped(chunk.slice(dy)[..., None]).squeeze(-1)  # (t b g c)
        adjoint = torch.einsum("tbgc,tbgn->tbgcn", dy_t, chunk.C).flatten(2, 3)  # (t b d n)
        adjoint[-1] += g
        for t in range(len(adjoint) - 2, -1, -1):
            adjoint[t].addcmul_(chunk.decay[t + 1], adjoint[t + 1])
        g = chunk.decay[0] * adjoint[0]

        dB[:, time] = torch.einsum("tbgcn,tbgc->btgn", chunk.grouped(adjoint), chunk.dtx)
        dC[:, time] = torch.einsum("tbgcn,tbgc->btgn", chunk.grouped(states), dy_t)
        ddtx = torch.einsum("tbgcn,tbgn->tbgc", chunk.grouped(adjoint), chunk.B).flatten(2)
        before = torch.cat([start[None], states[:-1]])
        dlog = adjoint.mul_(chunk.decay).mul_(before)  # of log Ā = Δ A
        dA += torch.einsum("tbdn,tbd->dn", dlog, chunk.dt)
        dx[:, time] = (ddtx * chunk.dt).transpose(0, 1)
        ddt[:, time] = torch.einsum("tbdn,dn->tbd", dlog, A).addcmul_(ddtx, chunk.x).transpose(0, 1)
    return dx, ddt, dA, dB, dC, g


def _scan_backward_fake(x, dt, A, B, C, cu_seqlens, starts, dy, dh):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C, dh))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _again(ctx: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return _by_reference, ctx.saved_tensors[:-1]


def _by_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
    """:func:`scan` without the chunks' states."""
    arguments = OPS["selective_scan"].declared.Arguments
    return reference.compute(arguments(x, dt, A, B, C, None, None, None, False, initial_state, cu_seqlens))


@twice_differentiable(_again)
def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, _, cu_seqlens, starts = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dh = starts.new_zeros(starts.shape[1:]) if dh is None else dh
    *grads, dh = scan_backward(x, dt, A, B, C, cu_seqlens, starts, dy, dh)
    return (*grads, dh if ctx.needs_input_grad[5] else None, None)


scan = define("selective_scan_tiled", _scan, _scan_fake)
scan_backward = define("selective_scan_tiled_backward", _scan_backward, _scan_backward_fake)
torch.library.register_autograd(scan, _backward, setup_context=_setup_context)


class _Chunk:
    """One chunk, time-first, with Ā and Δu at hand; channels are split (g c) where B and C need it."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, time: slice):
        self.time, self.groups = time, B.shape[2]
        self.x, self.dt, self.B, self.C = (self.slice(t) for t in (x, dt, B, C))
        self.decay = torch.exp(self.dt[..., None] * A)  # (t b d n)
        self.dtx = (self.dt * self.x).unflatten(2, (self.groups, -1))  # (t b g c)

    def slice(self, x: Tensor) -> Tensor:
        return x[:, self.time].transpose(0, 1)

    def grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.groups, -1))  # (t b d n) → (t b g c n)

    def states(self, h: Tensor) -> Tensor:
        """h (b d n) before the chunk → the states after each step (t b d n)."""
        states = torch.einsum("tbgc,tbgn->tbgcn", self.dtx, self.B).flatten(2, 3)
        for decay, state in zip(self.decay, states, strict=True):
            h = state.addcmul_(decay, h)
        return states


def _chunk_length(x: Tensor, A: Tensor) -> int:
    return max(1, min(64, ELEMENTS // max(1, x.shape[0] * A.numel())))


def len_chunks(x: Tensor, A: Tensor) -> int:
    return -(-x.shape[1] // _chunk_length(x, A))


def _chunks(x: Tensor, A: Tensor) -> list[slice]:
    length = _chunk_length(x, A)
    return [slice(start, min(start + length, x.shape[1])) for start in range(0, x.shape[1], length)]


def _padded(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, index: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A packed batch as a padded one. Where Δ is 0 the state neither decays nor takes anything in: it stays."""
    kept = mask[..., None]
    x, dt = (torch.where(kept, t[0, index], 0) for t in (x, dt))
    B, C = (torch.where(kept[..., None], t[0, index], 0) for t in (B, C))
    return x, dt, A, B, C
