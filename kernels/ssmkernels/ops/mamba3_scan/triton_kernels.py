"""The Triton kernel of Mamba-3's step. Offsets are 64-bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def outer(state, keys, values, weight, batch, head, p, n, H: tl.constexpr, R: tl.constexpr, P, N):
    """state + weight Σ_r v_r k_rᵀ, of keys (b R H N) and values (b R H P)."""
    for r in tl.static_range(R):
        line = (batch * R + r) * H + head
        key = tl.load(keys + line * N + n, mask=n < N, other=0.0)
        value = tl.load(values + line * P + p, mask=p < P, other=0.0)
        state += (weight * value)[:, None] * key[None, :]
    return state


@triton.jit
def step(
    state,
    alpha,
    before,
    now,
    last_key,
    last_value,
    key,
    value,
    query,
    y,
    state_batch,
    state_head,
    state_p,
    state_n,
    H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (b R H P), and the state (b H P N) after the step in its own place: α h, what the last input adds, and this."""
    tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0).to(tl.int64)
    tile, head, batch = pid % tiles, pid // tiles % H, pid // tiles // H
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    here = (p < P)[:, None] & (n < N)[None, :]
    at = state + batch * state_batch + head * state_head + p[:, None] * state_p + n[None, :] * state_n
    line = batch * H + head
    h = tl.load(at, mask=here, other=0.0) * tl.load(alpha + line)
    h = outer(h, last_key, last_value, tl.load(before + line), batch, head, p, n, H, R, P, N)
    h = outer(h, key, value, tl.load(now + line), batch, head, p, n, H, R, P, N)
    tl.store(at, h, mask=here)
    for r in tl.static_range(R):
        to = (batch * R + r) * H + head
        asked = tl.load(query + to * N + n, mask=n < N, other=0.0)
        tl.store(y + to * P + p, tl.sum(h * asked[None, :], axis=1), mask=p < P)
