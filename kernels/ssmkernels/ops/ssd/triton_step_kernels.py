"""The kernel of the state-space dual's step in Triton."""

# mypy: disable-error-code="assignment"
# (a tensor's dtype changes where a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid
from ssmkernels.ops.ssd.triton_pieces import step_size


@triton.jit
def step(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    bias,
    y,
    state_batch,
    state_head,
    state_p,
    state_n,
    x_batch,
    x_head,
    x_step,
    dt_batch,
    dt_head,
    B_batch,
    B_group,
    B_step,
    C_batch,
    C_group,
    C_step,
    D_head,
    D_step,
    z_batch,
    z_head,
    z_step,
    least,
    most,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (b h P), and the state after the token in its own place. Sums have the state's dtype."""
    WIDE: tl.constexpr = state.dtype.element_ty
    tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0).to(tl.int64)
    tile, head, batch = pid % tiles, pid // tiles % H, pid // tiles // H
    group = head // GROUP
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    here = p < P
    raw = tl.load(dt + batch * dt_batch + head * dt_head).to(WIDE)
    if bias is not None:
        raw += tl.load(bias + head)
    delta = step_size(raw, least, most, SOFTPLUS).to(WIDE)
    decay = tl.exp(delta * tl.load(A + head))
    xs = tl.load(x + batch * x_batch + head * x_head + p * x_step, mask=here, other=0.0).to(WIDE)
    state += batch * state_batch + head * state_head + p[:, None] * state_p
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    total = tl.zeros((BLOCK_P,), WIDE)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        there = n < N
        both = here[:, None] & there[None, :]
        Bs = tl.load(B + n * B_step, mask=there, other=0.0).to(WIDE)
        Cs = tl.load(C + n * C_step, mask=there, other=0.0).to(WIDE)
        h = tl.load(state + n[None, :] * state_n, mask=both, other=0.0)
        h = h * decay + (delta * xs)[:, None] * Bs[None, :]
        tl.store(state + n[None, :] * state_n, h, mask=both)
        total += tl.sum(h * Cs[None, :], axis=1)
    if D is not None:
        total += tl.load(D + head * D_head + p * D_step, mask=here, other=0.0) * xs
    if z is not None:
        gate = tl.load(z + batch * z_batch + head * z_head + p * z_step, mask=here, other=0.0).to(WIDE)
        total *= gate * sigmoid(gate)
    tl.store(y + (batch * H + head) * P + p, total.to(y.dtype.element_ty), mask=here)
