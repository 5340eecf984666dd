"""The kernel of the state-space dual's step in Triton."""

# mypy: disable-error-code="assignment"
# (a tensor's dtype changes where a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import load_channels, sigmoid
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
    state_strides,
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
    raw = tl.load(dt.at + batch * dt.batch + head * dt.head).to(WIDE)
    if bias is not None:
        raw += tl.load(bias + head)
    delta = step_size(raw, least, most, SOFTPLUS).to(WIDE)
    decay = tl.exp(delta * tl.load(A + head))
    xs = load_channels(x, batch, head, p, P).to(WIDE)
    state += batch * state_strides[0] + head * state_strides[1] + p[:, None] * state_strides[2]
    total = tl.zeros((BLOCK_P,), WIDE)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        there = n < N
        both = here[:, None] & there[None, :]
        Bs = load_channels(B, batch, group, n, N).to(WIDE)
        Cs = load_channels(C, batch, group, n, N).to(WIDE)
        h = tl.load(state + n[None, :] * state_strides[3], mask=both, other=0.0)
        h = h * decay + (delta * xs)[:, None] * Bs[None, :]
        tl.store(state + n[None, :] * state_strides[3], h, mask=both)
        total += tl.sum(h * Cs[None, :], axis=1)
    if D is not None:
        total += load_channels(D, batch, head, p, P) * xs
    if z is not None:
        gate = load_channels(z, batch, head, p, P).to(WIDE)
        total *= gate * sigmoid(gate)
    tl.store(y + (batch * H + head) * P + p, total.to(y.dtype.element_ty), mask=here)
