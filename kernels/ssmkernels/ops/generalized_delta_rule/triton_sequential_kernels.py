"""The kernels of the general delta rule in Triton, as a recurrence with the state in registers.

A program has a head of a sequence and a block of values, over which all is alike. That is how RWKV-7's own kernels go:
at a head dim of 64 a token takes fewer operations so than as a part of a chunk.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype changes where a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(cu_seqlens, T, pid, tiles: tl.constexpr, H: tl.constexpr, SEGMENT: tl.constexpr):
    """The program's block of values, head, sequence, batch, first token, number of tokens and first saved state."""
    tile, head, sequence = pid % tiles, pid // tiles % H, pid // tiles // H
    if cu_seqlens is None:
        batch, start, length = sequence, sequence * 0, sequence * 0 + T
        first = sequence * ((T + SEGMENT - 1) // SEGMENT)
    else:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
        batch, first = sequence * 0, start // SEGMENT + sequence
    return tile, head, sequence, batch, start, length, first


@triton.jit
def row(x, offset, c, step, C: tl.constexpr, WIDE: tl.constexpr):
    """C channels of a token."""
    return tl.load(x + offset + c * step, mask=c < C, other=0.0).to(WIDE)


@triton.jit
def decay_of(decay, offset, c, step, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The decay of each key channel of a token: 1 without decay."""
    found = tl.full((BLOCK,), 1.0, WIDE)
    if decay is not None:
        found = tl.exp(row(decay, offset, c, step, C, WIDE))
    return found


@triton.jit
def forward(
    q,
    k,
    v,
    a,
    b,
    decay,
    initial,
    cu_seqlens,
    o,
    final,
    starts,
    scale,
    T,
    q_batch,
    q_time,
    q_head,
    q_step,
    k_batch,
    k_time,
    k_head,
    k_step,
    v_batch,
    v_time,
    v_head,
    v_step,
    a_batch,
    a_time,
    a_head,
    a_step,
    b_batch,
    b_time,
    b_head,
    b_step,
    decay_batch,
    decay_time,
    decay_head,
    decay_step,
    SAVE: tl.constexpr,
    SEGMENT: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """o (b T H V), the final states (s H K V), and those before each segment. ``initial`` may be ``final``."""
    WIDE: tl.constexpr = final.dtype.element_ty
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0).to(tl.int64)
    tile, head, sequence, batch, start, length, first = place(cu_seqlens, T, pid, tiles, H, SEGMENT)
    i, j = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (i < K)[:, None] & (j < V)[None, :]
    at = i[:, None] * V + j[None, :]
    own = (sequence * H + head) * K * V
    S = tl.zeros((BLOCK_K, BLOCK_V), WIDE)
    if initial is not None:
        S = tl.load(initial + own + at, mask=inside, other=0.0)
    for t in range(length):
        time = start + t
        if SAVE:  # noqa: SIM102 (known when compiling, and apart from what is not)
            if t % SEGMENT == 0:
                tl.store(starts + ((first + t // SEGMENT) * H + head) * K * V + at, S, mask=inside)
        a_t = row(a, batch * a_batch + time * a_time + head * a_head, i, a_step, K, WIDE)
        b_t = row(b, batch * b_batch + time * b_time + head * b_head, i, b_step, K, WIDE)
        k_t = row(k, batch * k_batch + time * k_time + head * k_head, i, k_step, K, WIDE)
        q_t = row(q, batch * q_batch + time * q_time + head * q_head, i, q_step, K, WIDE)
        v_t = row(v, batch * v_batch + time * v_time + head * v_head, j, v_step, V, WIDE)
        w = decay_of(
            decay, batch * decay_batch + time * decay_time + head * decay_head, i, decay_step, K, BLOCK_K, WIDE
        )
        u = tl.sum(a_t[:, None] * S, axis=0)
        S = w[:, None] * S + b_t[:, None] * u[None, :] + k_t[:, None] * v_t[None, :]
        out = scale * tl.sum(q_t[:, None] * S, axis=0)
        tl.store(o + ((batch * T + time) * H + head) * V + j, out.to(o.dtype.element_ty), mask=j < V)
    tl.store(final + own + at, S, mask=inside)


@triton.jit
def backward(
    q,
    k,
    v,
    a,
    b,
    decay,
    cu_seqlens,
    starts,
    states,
    d_o,
    d_final,
    dq,
    dk,
    dv,
    da,
    db,
    d_decay,
    d_initial,
    scale,
    T,
    part,
    q_batch,
    q_time,
    q_head,
    q_step,
    k_batch,
    k_time,
    k_head,
    k_step,
    v_batch,
    v_time,
    v_head,
    v_step,
    a_batch,
    a_time,
    a_head,
    a_step,
    b_batch,
    b_time,
    b_head,
    b_step,
    decay_batch,
    decay_time,
    decay_head,
    decay_step,
    SEGMENT: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients of all arguments; those over key channels as a part for each block of values, (tiles b T H K).

    A segment at a time, from the last to the first: the states before its tokens go into the program's own ``states``,
    (SEGMENT BLOCK_K BLOCK_V); then through its tokens from the last to the first. P is the state before a token, N the
    one after it, D the gradient of N.
    """
    WIDE: tl.constexpr = starts.dtype.element_ty
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0).to(tl.int64)
    tile, head, sequence, batch, start, length, first = place(cu_seqlens, T, pid, tiles, H, SEGMENT)
    i, j = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (i < K)[:, None] & (j < V)[None, :]
    at = i[:, None] * V + j[None, :]
    kept = states + pid * SEGMENT * BLOCK_K * BLOCK_V
    kept += i[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    own = (sequence * H + head) * K * V
    D = tl.zeros((BLOCK_K, BLOCK_V), WIDE)
    if d_final is not None:
        D = tl.load(d_final + own + at, mask=inside, other=0.0)
    segments = (length + SEGMENT - 1) // SEGMENT
    for back in range(segments):
        segment = segments - 1 - back
        count = tl.minimum(length - segment * SEGMENT, SEGMENT)
        S = tl.load(starts + ((first + segment) * H + head) * K * V + at, mask=inside, other=0.0)
        for t in range(count):
            time = start + segment * SEGMENT + t
            tl.store(kept + t * BLOCK_K * BLOCK_V, S)
            a_t = row(a, batch * a_batch + time * a_time + head * a_head, i, a_step, K, WIDE)
            b_t = row(b, batch * b_batch + time * b_time + head * b_head, i, b_step, K, WIDE)
            k_t = row(k, batch * k_batch + time * k_time + head * k_head, i, k_step, K, WIDE)
            v_t = row(v, batch * v_batch + time * v_time + head * v_head, j, v_step, V, WIDE)
            offset = batch * decay_batch + time * decay_time + head * decay_head
            w = decay_of(decay, offset, i, decay_step, K, BLOCK_K, WIDE)
            u = tl.sum(a_t[:, None] * S, axis=0)
            S = w[:, None] * S + b_t[:, None] * u[None, :] + k_t[:, None] * v_t[None, :]
        tl.debug_barrier()
        for ahead in range(count):
            t = count - 1 - ahead
            time = start + segment * SEGMENT + t
            P = tl.load(kept + t * BLOCK_K * BLOCK_V)
            a_t = row(a, batch * a_batch + time * a_time + head * a_head, i, a_step, K, WIDE)
            b_t = row(b, batch * b_batch + time * b_time + head * b_head, i, b_step, K, WIDE)
            k_t = row(k, batch * k_batch + time * k_time + head * k_head, i, k_step, K, WIDE)
            q_t = row(q, batch * q_batch + time * q_time + head * q_head, i, q_step, K, WIDE)
            v_t = row(v, batch * v_batch + time * v_time + head * v_head, j, v_step, V, WIDE)
            offset = batch * decay_batch + time * decay_time + head * decay_head
            w = decay_of(decay, offset, i, decay_step, K, BLOCK_K, WIDE)
            token = (batch * T + time) * H + head
            out = scale * row(d_o, token * V, j, 1, V, WIDE)
            keys = tile * part + token * K + i
            u = tl.sum(a_t[:, None] * P, axis=0)
            N = w[:, None] * P + b_t[:, None] * u[None, :] + k_t[:, None] * v_t[None, :]
            tl.store(dq + keys, tl.sum(N * out[None, :], axis=1), mask=i < K)
            D += q_t[:, None] * out[None, :]
            tl.store(dk + keys, tl.sum(D * v_t[None, :], axis=1), mask=i < K)
            tl.store(db + keys, tl.sum(D * u[None, :], axis=1), mask=i < K)
            tl.store(d_decay + keys, w * tl.sum(D * P, axis=1), mask=i < K)
            du = tl.sum(b_t[:, None] * D, axis=0)
            tl.store(da + keys, tl.sum(P * du[None, :], axis=1), mask=i < K)
            d_v = tl.sum(k_t[:, None] * D, axis=0)
            tl.store(dv + token * V + j, d_v.to(dv.dtype.element_ty), mask=j < V)
            D = w[:, None] * D + a_t[:, None] * du[None, :]
        tl.debug_barrier()
    tl.store(d_initial + own + at, D, mask=inside)
