"""The delta rule's Triton kernel for one token."""

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import load_channels


@triton.jit
def step(
    state,
    q,
    k,
    v,
    beta,
    decay,
    o,
    state_strides,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """o (b h v), and the state after the token in its own place. Sums have the state's dtype."""
    WIDE: tl.constexpr = state.dtype.element_ty
    tiles: tl.constexpr = (V + BLOCK - 1) // BLOCK
    task = tl.program_id(0).to(tl.int64)
    column, head, batch = task % tiles * BLOCK, task // tiles % H, task // tiles // H
    group = head // GROUP
    key, value = tl.arange(0, BLOCK_K).to(tl.int64), column + tl.arange(0, BLOCK)
    inside = (key < K)[:, None] & (value < V)[None, :]
    at = state + batch * state_strides[0] + head * state_strides[1]
    at += key[:, None] * state_strides[2] + value[None, :] * state_strides[3]
    S = tl.load(at, mask=inside, other=0.0)
    qs = load_channels(q, batch, group, key, K).to(WIDE)
    ks = load_channels(k, batch, group, key, K).to(WIDE)
    vs = load_channels(v, batch, head, value, V).to(WIDE)
    if decay is not None:
        S *= tl.exp(load_channels(decay, batch, head, key, K).to(WIDE))[:, None]
    b = tl.load(beta.at + batch * beta.batch + head * beta.head).to(WIDE)
    error = vs - tl.sum(S * ks[:, None], axis=0)
    S += ks[:, None] * (b * error)[None, :]
    tl.store(at, S, mask=inside)
    out = tl.sum(S * qs[:, None], axis=0) * scale
    tl.store(o + (batch * H + head) * V + value, out.to(o.dtype.element_ty), mask=value < V)
