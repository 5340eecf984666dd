"""The delta rule's Triton kernel for one token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step(
    state,
    q,
    k,
    v,
    beta,
    decay,
    o,
    state_batch,
    state_head,
    state_key,
    state_value,
    q_batch,
    q_head,
    q_step,
    k_batch,
    k_head,
    k_step,
    v_batch,
    v_head,
    v_step,
    beta_batch,
    beta_head,
    decay_batch,
    decay_head,
    decay_step,
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
    at = state + batch * state_batch + head * state_head + key[:, None] * state_key + value[None, :] * state_value
    S = tl.load(at, mask=inside, other=0.0)
    qs = tl.load(q + batch * q_batch + group * q_head + key * q_step, mask=key < K, other=0.0).to(WIDE)
    ks = tl.load(k + batch * k_batch + group * k_head + key * k_step, mask=key < K, other=0.0).to(WIDE)
    vs = tl.load(v + batch * v_batch + head * v_head + value * v_step, mask=value < V, other=0.0).to(WIDE)
    if decay is not None:
        log = tl.load(decay + batch * decay_batch + head * decay_head + key * decay_step, mask=key < K, other=0.0)
        S *= tl.exp(log.to(WIDE))[:, None]
    b = tl.load(beta + batch * beta_batch + head * beta_head).to(WIDE)
    error = vs - tl.sum(S * ks[:, None], axis=0)
    S += ks[:, None] * (b * error)[None, :]
    tl.store(at, S, mask=inside)
    out = tl.sum(S * qs[:, None], axis=0) * scale
    tl.store(o + (batch * H + head) * V + value, out.to(o.dtype.element_ty), mask=value < V)
