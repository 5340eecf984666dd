"""The selective scan by the CUDA kernel of the package mamba_ssm.

Written against the package's published signature and tested with a stand-in for it; it has not been run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core import external
from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.names import OPS
from ssmkernels.ops.selective_scan import reference, tiled

MOST_STATES = 256
CHUNK = 2048  # steps; two numbers of each state and chunk are kept, in a tensor with 32-bit offsets


def missing() -> str | None:
    return external.missing("mamba_ssm.ops.selective_scan_interface")


def unsupported(a: Any) -> str | None:
    return external.wrong_device(a) or lacking(a)


def lacking(a: Any) -> str | None:
    """What the package lacks that a call needs, wherever its tensors are; None where it has all."""
    u, A, B, C = a.u, a.A, a.B, a.C
    if a.initial_state is not None:
        return "initial state"
    if a.cu_seqlens is not None:
        return "packed sequences"
    if u.dtype == torch.float64:
        return "float64"
    if A.shape[1] > MOST_STATES:
        return f"more than {MOST_STATES} states"
    if u.numel() == 0 or A.numel() == 0:
        return "empty inputs"
    if 2 * u.shape[0] * -(-u.shape[1] // CHUNK) * A.numel() > 2**31:
        return "records of more than 2³¹ numbers"
    takes = (u.dtype, torch.complex64) if u.dtype == torch.float32 else (u.dtype,)
    if any(t.ndim > 2 and t.dtype not in takes for t in (B, C)):
        return "`B` or `C` in another precision than `u`"
    if B.ndim == 2 and C.ndim == 4 and C.shape[2] > 1:
        return "groups of `C` beside a fixed `B`"
    return None


def compute(a: Any) -> tuple[Tensor, Tensor]:
    y, final_state = call(a)
    state = _FinalState.apply(final_state, a.u, a.delta, a.A, a.B, a.delta_bias, a.delta_softplus)
    return y.contiguous(), state


def call(a: Any) -> tuple[Tensor, Tensor]:
    """The package's own function, our layout into its and back; no gradient goes through the state."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    groups = next((t.shape[2] for t in (a.B, a.C) if t.ndim == 4), 1)
    weights = torch.complex64 if a.A.is_complex() else torch.float32

    def theirs(t: Tensor) -> Tensor:
        if t.ndim == 2:
            return t.to(weights)
        t = t if t.ndim == 4 else t[:, :, None].expand(-1, -1, groups, -1)
        t = t.permute(0, 2, 3, 1)  # (b g n l)
        if not a.A.is_complex():
            return t
        return torch.view_as_real(t.to(weights)).flatten(-2).to(a.u.dtype)  # (b g n 2l), the parts by turns

    y, last = selective_scan_fn(
        a.u.transpose(1, 2),
        a.delta.transpose(1, 2),
        a.A.to(weights),
        theirs(a.B),
        theirs(a.C),
        D=None if a.D is None else a.D.float(),
        z=None if a.z is None else a.z.transpose(1, 2),
        delta_bias=None if a.delta_bias is None else a.delta_bias.float(),
        delta_softplus=a.delta_softplus,
        return_last_state=True,
    )
    external.without_second_derivative("mamba_ssm", y)
    return y.transpose(1, 2), last


def _without_output(u, delta, A, B, delta_bias, delta_softplus):
    """A call for its final state alone."""
    arguments = OPS["selective_scan"].declared.Arguments
    return arguments(u, delta, A, B, B, None, None, delta_bias, delta_softplus, None, None)


def _final_state(final_state, u, delta, A, B, delta_bias, delta_softplus):
    return reference.compute(_without_output(u, delta, A, B, delta_bias, delta_softplus))[1]


class _FinalState(torch.autograd.Function):
    """The final state with its gradient, which the package leaves out: the scan runs again in PyTorch for it."""

    @staticmethod
    def forward(ctx, final_state, u, delta, A, B, delta_bias, delta_softplus):
        ctx.save_for_backward(u, delta, A, B, delta_bias)
        ctx.delta_softplus = delta_softplus
        return final_state.clone()  # out of the package's record of all chunks

    @staticmethod
    @twice_differentiable(lambda ctx: (_final_state, (None, *ctx.saved_tensors, ctx.delta_softplus)))
    def backward(ctx, dfinal):
        inputs: list[Any] = [None if t is None else t.detach() for t in ctx.saved_tensors]
        wanted = [t.requires_grad_() for t, needed in zip(inputs, ctx.needs_input_grad[1:], strict=False) if needed]
        u, delta, A, B, delta_bias = inputs
        a = _without_output(u, delta, A, B, delta_bias, ctx.delta_softplus)
        with torch.enable_grad():
            _, h = (reference if tiled.unsupported(a) else tiled).compute(a)
        found = iter(torch.autograd.grad(h, wanted, dfinal))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:6]), None
