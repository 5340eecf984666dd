"""The kernels of the general delta rule in Triton, as a recurrence with the state in registers.

A program has a head of a sequence and a block of values, over which all is alike. That is how RWKV-7's own kernels go:
at a head dim of 64 a token takes fewer operations so than as a part of a chunk.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype changes where a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, heads_of, zeros


@triton.jit
def place(cu_seqlens, T, dims: tl.constexpr):
    """What a program has: its block of values, and one head of a sequence.

    Returns:
        tile, line, head: of the block, of the head among those of all sequences, and of its own.
        batch, start, length, first: where the sequence lies, and the number of its first saved state.
    """
    tiles: tl.constexpr = (dims.V + dims.BLOCK_V - 1) // dims.BLOCK_V
    pid = tl.program_id(0).to(tl.int64)
    tile, line = pid % tiles, pid // tiles
    head, sequence = line % dims.H, line // dims.H
    if cu_seqlens is None:
        batch, start, length = sequence, sequence * 0, sequence * 0 + T
        first = sequence * ((T + dims.SEGMENT - 1) // dims.SEGMENT)
    else:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
        batch, first = sequence * 0, start // dims.SEGMENT + sequence
    return tile, line, head, batch, start, length, first


@triton.jit
def state_tile(tile, dims: tl.constexpr):
    """A program's keys and values, their offsets in a state, and which of these there are."""
    i, j = tl.arange(0, dims.BLOCK_K), tile * dims.BLOCK_V + tl.arange(0, dims.BLOCK_V)
    return i, j, i[:, None] * dims.V + j[None, :], (i < dims.K)[:, None] & (j < dims.V)[None, :]


@triton.jit
def row(x, time, c, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """The channels of a token of one head."""
    return tl.load(x.at + time * x.time + c * x.step, mask=c < SIZE, other=0.0).to(WIDE)


@triton.jit
def decay_of(decay, time, c, dims: tl.constexpr, WIDE: tl.constexpr):
    """The decay of each key channel of a token: 1 without decay."""
    found = zeros(dims.BLOCK_K, 0, WIDE) + 1
    if decay is not None:
        found = tl.exp(row(decay, time, c, dims.K, WIDE))
    return found


@triton.jit
def written(S, a, b, k, v, decay, time, i, j, dims: tl.constexpr, WIDE: tl.constexpr):
    """The state after a token, from the one before it, and what the token has written there.

    Returns:
        after, u: the state, and what it erased along ``b``.
        a_t, b_t, k_t, v_t, w: the token's channels, and its decays.
    """
    a_t, b_t = row(a, time, i, dims.K, WIDE), row(b, time, i, dims.K, WIDE)
    k_t, v_t = row(k, time, i, dims.K, WIDE), row(v, time, j, dims.V, WIDE)
    w = decay_of(decay, time, i, dims, WIDE)
    u = tl.sum(a_t[:, None] * S, axis=0)
    after = w[:, None] * S + b_t[:, None] * u[None, :] + k_t[:, None] * v_t[None, :]
    return after, u, a_t, b_t, k_t, v_t, w


@triton.jit
def forward(
    q, k, v, a, b, decay, initial, cu_seqlens, o, final, starts, scale, T, dims: tl.constexpr, SAVE: tl.constexpr
):
    """o (b T H V), the final states (s H K V), and those before each segment. ``initial`` may be ``final``."""
    WIDE: tl.constexpr = final.dtype.element_ty
    tile, line, head, batch, start, length, first = place(cu_seqlens, T, dims)
    i, j, at, inside = state_tile(tile, dims)
    q, k, a, b = heads_of(q, k, a, b, batch, head)
    v = head_of(v, batch, head)
    if decay is not None:
        decay = head_of(decay, batch, head)
    own = line * dims.K * dims.V
    S = zeros(dims.BLOCK_K, dims.BLOCK_V, WIDE)
    if initial is not None:
        S = tl.load(initial + own + at, mask=inside, other=0.0)
    for t in range(length):
        time = start + t
        if SAVE:  # noqa: SIM102 (known when compiling, and apart from what is not)
            if t % dims.SEGMENT == 0:
                tl.store(starts + ((first + t // dims.SEGMENT) * dims.H + head) * dims.K * dims.V + at, S, mask=inside)
        S = written(S, a, b, k, v, decay, time, i, j, dims, WIDE)[0]
        out = scale * tl.sum(row(q, time, i, dims.K, WIDE)[:, None] * S, axis=0)
        tl.store(o + ((batch * T + time) * dims.H + head) * dims.V + j, out.to(o.dtype.element_ty), mask=j < dims.V)
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
    dims: tl.constexpr,
):
    """Gradients of all arguments; those over key channels as a part for each block of values, (tiles b T H K).

    A segment at a time, from the last to the first: the states before its tokens go into the program's own ``states``,
    (SEGMENT BLOCK_K BLOCK_V); then through its tokens from the last to the first. P is the state before a token, N the
    one after it, D the gradient of N.
    """
    WIDE: tl.constexpr = starts.dtype.element_ty
    tile, line, head, batch, start, length, first = place(cu_seqlens, T, dims)
    i, j, at, inside = state_tile(tile, dims)
    q, k, a, b = heads_of(q, k, a, b, batch, head)
    v = head_of(v, batch, head)
    if decay is not None:
        decay = head_of(decay, batch, head)
    kept = states + tl.program_id(0).to(tl.int64) * dims.SEGMENT * dims.BLOCK_K * dims.BLOCK_V
    kept += i[:, None] * dims.BLOCK_V + tl.arange(0, dims.BLOCK_V)[None, :]
    own = line * dims.K * dims.V
    D = zeros(dims.BLOCK_K, dims.BLOCK_V, WIDE)
    if d_final is not None:
        D = tl.load(d_final + own + at, mask=inside, other=0.0)
    segments = (length + dims.SEGMENT - 1) // dims.SEGMENT
    for back in range(segments):
        segment = segments - 1 - back
        count = tl.minimum(length - segment * dims.SEGMENT, dims.SEGMENT)
        S = tl.load(starts + ((first + segment) * dims.H + head) * dims.K * dims.V + at, mask=inside, other=0.0)
        for t in range(count):
            time = start + segment * dims.SEGMENT + t
            tl.store(kept + t * dims.BLOCK_K * dims.BLOCK_V, S)
            S = written(S, a, b, k, v, decay, time, i, j, dims, WIDE)[0]
        tl.debug_barrier()
        for ahead in range(count):
            t = count - 1 - ahead
            time = start + segment * dims.SEGMENT + t
            P = tl.load(kept + t * dims.BLOCK_K * dims.BLOCK_V)
            N, u, a_t, b_t, k_t, v_t, w = written(P, a, b, k, v, decay, time, i, j, dims, WIDE)
            token = (batch * T + time) * dims.H + head
            out = scale * tl.load(d_o + token * dims.V + j, mask=j < dims.V, other=0.0).to(WIDE)
            keys = tile * part + token * dims.K + i
            tl.store(dq + keys, tl.sum(N * out[None, :], axis=1), mask=i < dims.K)
            D += row(q, time, i, dims.K, WIDE)[:, None] * out[None, :]
            tl.store(dk + keys, tl.sum(D * v_t[None, :], axis=1), mask=i < dims.K)
            tl.store(db + keys, tl.sum(D * u[None, :], axis=1), mask=i < dims.K)
            tl.store(d_decay + keys, w * tl.sum(D * P, axis=1), mask=i < dims.K)
            du = tl.sum(b_t[:, None] * D, axis=0)
            tl.store(da + keys, tl.sum(P * du[None, :], axis=1), mask=i < dims.K)
            d_v = tl.sum(k_t[:, None] * D, axis=0)
            tl.store(dv + token * dims.V + j, d_v.to(dv.dtype.element_ty), mask=j < dims.V)
            D = w[:, None] * D + a_t[:, None] * du[None, :]
        tl.debug_barrier()
    tl.store(d_initial + own + at, D, mask=inside)
