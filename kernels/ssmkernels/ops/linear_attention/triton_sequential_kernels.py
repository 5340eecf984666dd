"""Linear attention's Triton kernels, token after token.

A program takes some of a head's value channels in one sequence, and has that part of the state, all channels of the
key by its own of the value, in registers. What is a sum over value channels is stored in parts, one for each program
of a head, and added afterwards in a fixed order. Sums and states have the dtype WIDE. Offsets are 64-bit. What is
absent is None.

DECAY says what has a decay of its own: 0 nothing, 1 a head, 2 a token of a head, 3 each of its key channels.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype changes where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, zeros


@triton.jit
def task_of(cu_seqlens, length, dims: tl.constexpr):
    """What a program has: some value channels of one head of a sequence.

    Returns:
        tile, line, head: the number of its block of channels, of its head among those of all sequences, and of its own.
        batch, begin, count, first: where the sequence lies, how long it is, and the number of its first saved state.
    """
    tiles: tl.constexpr = (dims.V + dims.BLOCK_V - 1) // dims.BLOCK_V
    task = tl.program_id(0).to(tl.int64)
    tile, line = task % tiles, task // tiles
    head, sequence = line % dims.H, line // dims.H
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        batch, count = sequence * 0, tl.load(cu_seqlens + sequence + 1).to(tl.int64) - begin
        first = begin // dims.CHUNK + sequence
    else:
        batch, begin, count = sequence, sequence * 0, sequence * 0 + length
        first = sequence * ((length + dims.CHUNK - 1) // dims.CHUNK)
    return tile, line, head, batch, begin, count, first


@triton.jit
def state_tile(tile, dims: tl.constexpr):
    """A program's channels of keys and values, their offsets in a state, and which of these there are."""
    c = tl.arange(0, dims.BLOCK_K).to(tl.int64)
    d = tile * dims.BLOCK_V + tl.arange(0, dims.BLOCK_V).to(tl.int64)
    return c, d, c[:, None] * dims.V + d[None, :], (c < dims.K)[:, None] & (d < dims.V)[None, :]


@triton.jit
def load_token(x, time, channel, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Some channels of a token of one head."""
    return tl.load(x.at + time * x.time + channel * x.step, mask=channel < SIZE, other=0.0).to(WIDE)


@triton.jit
def decay_of(log_decay, time, c, dims: tl.constexpr):
    """(BLOCK_K) the decays of one token."""
    if dims.DECAY == 3:
        return tl.exp(load_token(log_decay, time, c, dims.K, dims.WIDE))
    return tl.exp(tl.load(log_decay.at + time * log_decay.time).to(dims.WIDE) + zeros(dims.BLOCK_K, 0, dims.WIDE))


@triton.jit(do_not_specialize=["length"])
def forward(q, k, v, log_decay, bonus, initial, o, final, starts, cu_seqlens, length, dims: tl.constexpr):
    """o (b l h V), the state after the last token (s h K V), and those before every CHUNK tokens (chunks h K V)."""
    tile, line, head, batch, begin, count, first = task_of(cu_seqlens, length, dims)
    c, d, inside, both = state_tile(tile, dims)
    here, there = c < dims.K, d < dims.V
    S = zeros(dims.BLOCK_K, dims.BLOCK_V, dims.WIDE)
    if initial is not None:
        S += tl.load(initial + line * dims.K * dims.V + inside, mask=both, other=0.0)
    if bonus is not None:
        u = tl.load(bonus + head * dims.K + c, mask=here, other=0.0).to(dims.WIDE)
    q, k = head_of(q, batch, head // dims.GROUP), head_of(k, batch, head // dims.GROUP)
    v = head_of(v, batch, head)
    if log_decay is not None:
        log_decay = head_of(log_decay, batch, head)
    for i in range(count):
        if starts is not None:  # noqa: SIM102  (known when compiling, unlike the next)
            if i % dims.CHUNK == 0:
                tl.store(starts + ((first + i // dims.CHUNK) * dims.H + head) * dims.K * dims.V + inside, S, mask=both)
        time = begin + i
        ks = load_token(k, time, c, dims.K, dims.WIDE)
        qs = load_token(q, time, c, dims.K, dims.WIDE) * dims.SCALE
        vs = load_token(v, time, d, dims.V, dims.WIDE)
        fed = ks[:, None] * vs[None, :]
        seen = S
        if dims.DECAY > 0:
            S = S * decay_of(log_decay, time, c, dims)[:, None]
        S += fed
        if bonus is not None:
            seen += u[:, None] * fed
        else:
            seen = S
        out = tl.sum(qs[:, None] * seen, axis=0)
        to = o + ((batch * length + time) * dims.H + head) * dims.V + d
        tl.store(to, out.to(o.dtype.element_ty), mask=there)
    tl.store(final + line * dims.K * dims.V + inside, S, mask=both)


@triton.jit(do_not_specialize=["length", "part_key", "part_token", "part_sequence"])
def backward(
    q,
    k,
    v,
    log_decay,
    bonus,
    starts,
    kept,
    d_o,
    d_final,
    dq,
    dk,
    dv,
    d_decay,
    d_bonus,
    d_initial,
    cu_seqlens,
    length,
    part_key,
    part_token,
    part_sequence,
    dims: tl.constexpr,
):
    """All gradients; those that are sums over value channels in parts, one a tile.

    From the last chunk to the first: forward through it from the state before it, whose states each program keeps in a
    place of its own in ``kept`` (programs CHUNK BLOCK_K BLOCK_V), and back, as cpu_backward.cpp does. ``dq`` and ``dk``
    are (tiles b l h K), ``d_decay`` (tiles b l h K), (tiles b l h) or (tiles s h), ``d_bonus`` (tiles s h K).
    """
    tile, line, head, batch, begin, count, first = task_of(cu_seqlens, length, dims)
    c, d, inside, both = state_tile(tile, dims)
    here, there = c < dims.K, d < dims.V
    kept += tl.program_id(0).to(tl.int64) * dims.CHUNK * dims.BLOCK_K * dims.BLOCK_V
    kept += c[:, None] * dims.BLOCK_V + tl.arange(0, dims.BLOCK_V)[None, :]
    D = zeros(dims.BLOCK_K, dims.BLOCK_V, dims.WIDE)
    if d_final is not None:
        D += tl.load(d_final + line * dims.K * dims.V + inside, mask=both, other=0.0)
    u = zeros(dims.BLOCK_K, 0, dims.WIDE)
    if bonus is not None:
        u += tl.load(bonus + head * dims.K + c, mask=here, other=0.0).to(dims.WIDE)
    of_bonus = zeros(dims.BLOCK_K, 0, dims.WIDE)
    of_head = zeros(dims.BLOCK_K, 0, dims.WIDE)
    q, k = head_of(q, batch, head // dims.GROUP), head_of(k, batch, head // dims.GROUP)
    v = head_of(v, batch, head)
    if log_decay is not None:
        log_decay = head_of(log_decay, batch, head)
    chunks = (count + dims.CHUNK - 1) // dims.CHUNK
    for back in range(chunks):
        chunk = chunks - 1 - back
        begin_of = begin + chunk * dims.CHUNK
        size = tl.minimum(dims.CHUNK, count - chunk * dims.CHUNK)
        S = tl.load(starts + ((first + chunk) * dims.H + head) * dims.K * dims.V + inside, mask=both, other=0.0)
        for i in range(size):
            tl.store(kept + i * dims.BLOCK_K * dims.BLOCK_V, S)
            time = begin_of + i
            row = (batch * length + time) * dims.H + head
            ks = load_token(k, time, c, dims.K, dims.WIDE)
            vs = load_token(v, time, d, dims.V, dims.WIDE)
            gs = tl.load(d_o + row * dims.V + d, mask=there, other=0.0).to(dims.WIDE)
            seen = S
            if dims.DECAY > 0:
                w = decay_of(log_decay, time, c, dims)
                S = S * w[:, None]
            S += ks[:, None] * vs[None, :]
            if bonus is None:
                seen = S
            total = tl.sum(seen * gs[None, :], axis=1)
            if bonus is not None:
                total += u * ks * tl.sum(vs * gs, axis=0)
            tl.store(dq + tile * part_key + row * dims.K + c, total * dims.SCALE, mask=here)
        tl.debug_barrier()
        for i in range(size):
            place = size - 1 - i
            time = begin_of + place
            row = (batch * length + time) * dims.H + head
            before = tl.load(kept + place * dims.BLOCK_K * dims.BLOCK_V)
            ks = load_token(k, time, c, dims.K, dims.WIDE)
            qs = load_token(q, time, c, dims.K, dims.WIDE) * dims.SCALE
            vs = load_token(v, time, d, dims.V, dims.WIDE)
            gs = tl.load(d_o + row * dims.V + d, mask=there, other=0.0).to(dims.WIDE)
            seen = qs[:, None] * gs[None, :]
            if bonus is None:
                D += seen
            of_key = tl.sum(D * vs[None, :], axis=1)
            of_value = tl.sum(D * ks[:, None], axis=0)
            if dims.DECAY > 0:
                w = decay_of(log_decay, time, c, dims)
                of_decay = tl.where(here, w * tl.sum(D * before, axis=1), 0.0)
                if dims.DECAY == 3:
                    tl.store(d_decay + tile * part_key + row * dims.K + c, of_decay, mask=here)
                elif dims.DECAY == 2:
                    tl.store(d_decay + tile * part_token + row, tl.sum(of_decay, axis=0))
                else:
                    of_head += of_decay
                D = D * w[:, None]
            if bonus is not None:
                D += seen
                dot = tl.sum(vs * gs, axis=0)
                of_key += u * qs * dot
                of_value += tl.sum(qs * u * ks, axis=0) * gs
                of_bonus += qs * ks * dot
            tl.store(dk + tile * part_key + row * dims.K + c, of_key, mask=here)
            tl.store(dv + row * dims.V + d, of_value.to(dv.dtype.element_ty), mask=there)
        tl.debug_barrier()
    if d_initial is not None:
        tl.store(d_initial + line * dims.K * dims.V + inside, D, mask=both)
    if bonus is not None:
        tl.store(d_bonus + tile * part_sequence * dims.K + line * dims.K + c, of_bonus, mask=here)
    if dims.DECAY == 1:
        tl.store(d_decay + tile * part_sequence + line, tl.sum(of_head, axis=0))
