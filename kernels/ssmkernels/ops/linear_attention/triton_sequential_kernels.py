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


@triton.jit
def span(cu_seqlens, sequence, length):
    """Where a sequence lies: its batch, its first token, and how many it has."""
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        return sequence * 0, begin, tl.load(cu_seqlens + sequence + 1).to(tl.int64) - begin
    return sequence, sequence * 0, sequence * 0 + length


@triton.jit
def decay_of(log_decay, at, c, here, step, DECAY: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_K) the decays of one token, from a pointer to its head's."""
    if DECAY == 3:
        return tl.exp(tl.load(log_decay + at + c * step, mask=here, other=0.0).to(WIDE))
    return tl.exp(tl.load(log_decay + at).to(WIDE) + tl.zeros((BLOCK_K,), WIDE))


@triton.jit(do_not_specialize=["length", "per_sequence"])
def forward(
    q,
    k,
    v,
    log_decay,
    bonus,
    initial,
    o,
    final,
    starts,
    cu_seqlens,
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
    decay_batch,
    decay_time,
    decay_head,
    decay_step,
    length,
    per_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """o (b l h V), the state after the last token (s h K V), and those before every CHUNK tokens (chunks h K V)."""
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    task = tl.program_id(0).to(tl.int64)
    tile, line = task % tiles, task // tiles
    head, sequence = line % H, line // H
    batch, begin, count = span(cu_seqlens, sequence, length)
    c, d = tl.arange(0, BLOCK_K).to(tl.int64), tile * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    here, there = c < K, d < V
    inside = c[:, None] * V + d[None, :]
    both = here[:, None] & there[None, :]
    S = tl.zeros((BLOCK_K, BLOCK_V), WIDE)
    if initial is not None:
        S += tl.load(initial + line * K * V + inside, mask=both, other=0.0)
    if bonus is not None:
        u = tl.load(bonus + head * K + c, mask=here, other=0.0).to(WIDE)
    q += batch * q_batch + head // GROUP * q_head + c * q_step
    k += batch * k_batch + head // GROUP * k_head + c * k_step
    v += batch * v_batch + head * v_head + d * v_step
    own = batch * decay_batch + head * decay_head
    first = begin // CHUNK + sequence if cu_seqlens is not None else sequence * per_sequence
    for i in range(count):
        if starts is not None:  # noqa: SIM102  (known when compiling, unlike the next)
            if i % CHUNK == 0:
                tl.store(starts + ((first + i // CHUNK) * H + head) * K * V + inside, S, mask=both)
        time = begin + i
        ks = tl.load(k + time * k_time, mask=here, other=0.0).to(WIDE)
        qs = tl.load(q + time * q_time, mask=here, other=0.0).to(WIDE) * SCALE
        vs = tl.load(v + time * v_time, mask=there, other=0.0).to(WIDE)
        fed = ks[:, None] * vs[None, :]
        seen = S
        if DECAY > 0:
            S = S * decay_of(log_decay, own + time * decay_time, c, here, decay_step, DECAY, WIDE, BLOCK_K)[:, None]
        S += fed
        if bonus is not None:
            seen += u[:, None] * fed
        else:
            seen = S
        out = tl.sum(qs[:, None] * seen, axis=0)
        to = o + ((batch * length + time) * H + head) * V + d
        tl.store(to, out.to(o.dtype.element_ty), mask=there)
    tl.store(final + line * K * V + inside, S, mask=both)


@triton.jit(do_not_specialize=["length", "per_sequence", "part_key", "part_token", "part_sequence"])
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
    decay_batch,
    decay_time,
    decay_head,
    decay_step,
    length,
    per_sequence,
    part_key,
    part_token,
    part_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DECAY: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """All gradients; those that are sums over value channels in parts, one a tile.

    From the last chunk to the first: forward through it from the state before it, whose states each program keeps in a
    place of its own in ``kept`` (programs CHUNK BLOCK_K BLOCK_V), and back, as cpu_backward.cpp does. ``dq`` and ``dk``
    are (tiles b l h K), ``d_decay`` (tiles b l h K), (tiles b l h) or (tiles s h), ``d_bonus`` (tiles s h K).
    """
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    task = tl.program_id(0).to(tl.int64)
    tile, line = task % tiles, task // tiles
    head, sequence = line % H, line // H
    batch, begin, count = span(cu_seqlens, sequence, length)
    c, d = tl.arange(0, BLOCK_K).to(tl.int64), tile * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    here, there = c < K, d < V
    inside = c[:, None] * V + d[None, :]
    both = here[:, None] & there[None, :]
    kept += task * CHUNK * BLOCK_K * BLOCK_V + c[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    D = tl.zeros((BLOCK_K, BLOCK_V), WIDE)
    if d_final is not None:
        D += tl.load(d_final + line * K * V + inside, mask=both, other=0.0)
    u = tl.zeros((BLOCK_K,), WIDE)
    if bonus is not None:
        u += tl.load(bonus + head * K + c, mask=here, other=0.0).to(WIDE)
    of_bonus = tl.zeros((BLOCK_K,), WIDE)
    of_head = tl.zeros((BLOCK_K,), WIDE)
    q += batch * q_batch + head // GROUP * q_head + c * q_step
    k += batch * k_batch + head // GROUP * k_head + c * k_step
    v += batch * v_batch + head * v_head + d * v_step
    own = batch * decay_batch + head * decay_head
    first = begin // CHUNK + sequence if cu_seqlens is not None else sequence * per_sequence
    chunks = (count + CHUNK - 1) // CHUNK
    for back in range(chunks):
        chunk = chunks - 1 - back
        begin_of = begin + chunk * CHUNK
        size = tl.minimum(CHUNK, count - chunk * CHUNK)
        S = tl.load(starts + ((first + chunk) * H + head) * K * V + inside, mask=both, other=0.0)
        for i in range(size):
            tl.store(kept + i * BLOCK_K * BLOCK_V, S)
            time = begin_of + i
            row = (batch * length + time) * H + head
            ks = tl.load(k + time * k_time, mask=here, other=0.0).to(WIDE)
            vs = tl.load(v + time * v_time, mask=there, other=0.0).to(WIDE)
            gs = tl.load(d_o + row * V + d, mask=there, other=0.0).to(WIDE)
            seen = S
            if DECAY > 0:
                w = decay_of(log_decay, own + time * decay_time, c, here, decay_step, DECAY, WIDE, BLOCK_K)
                S = S * w[:, None]
            S += ks[:, None] * vs[None, :]
            if bonus is None:
                seen = S
            total = tl.sum(seen * gs[None, :], axis=1)
            if bonus is not None:
                total += u * ks * tl.sum(vs * gs, axis=0)
            tl.store(dq + tile * part_key + row * K + c, total * SCALE, mask=here)
        tl.debug_barrier()
        for i in range(size):
            place = size - 1 - i
            time = begin_of + place
            row = (batch * length + time) * H + head
            before = tl.load(kept + place * BLOCK_K * BLOCK_V)
            ks = tl.load(k + time * k_time, mask=here, other=0.0).to(WIDE)
            qs = tl.load(q + time * q_time, mask=here, other=0.0).to(WIDE) * SCALE
            vs = tl.load(v + time * v_time, mask=there, other=0.0).to(WIDE)
            gs = tl.load(d_o + row * V + d, mask=there, other=0.0).to(WIDE)
            seen = qs[:, None] * gs[None, :]
            if bonus is None:
                D += seen
            of_key = tl.sum(D * vs[None, :], axis=1)
            of_value = tl.sum(D * ks[:, None], axis=0)
            if DECAY > 0:
                w = decay_of(log_decay, own + time * decay_time, c, here, decay_step, DECAY, WIDE, BLOCK_K)
                of_decay = tl.where(here, w * tl.sum(D * before, axis=1), 0.0)
                if DECAY == 3:
                    tl.store(d_decay + tile * part_key + row * K + c, of_decay, mask=here)
                elif DECAY == 2:
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
            tl.store(dk + tile * part_key + row * K + c, of_key, mask=here)
            tl.store(dv + row * V + d, of_value.to(dv.dtype.element_ty), mask=there)
        tl.debug_barrier()
    if d_initial is not None:
        tl.store(d_initial + line * K * V + inside, D, mask=both)
    if bonus is not None:
        tl.store(d_bonus + tile * part_sequence * K + line * K + c, of_bonus, mask=here)
    if DECAY == 1:
        tl.store(d_decay + tile * part_sequence + line, tl.sum(of_head, axis=0))
