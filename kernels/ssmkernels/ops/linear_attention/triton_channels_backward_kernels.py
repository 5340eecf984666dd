"""Linear attention's Triton kernels in chunks, where each key channel has a decay of its own: the backward pass.

As in :mod:`triton_channels_kernels`, whose kernels give the states, P, and in reverse the gradients of the states and
of v. Gradients of q, k and the decays are float32 ``(b l h k)``. What reaches them through states comes first, and what
pairs of tokens give is added to it.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.delta_rule.triton_pairs_kernels import decay_of, load_row
from ssmkernels.ops.delta_rule.triton_state_kernels import load_state
from ssmkernels.ops.linear_attention.triton_channels_kernels import over, since, until
from ssmkernels.ops.ssd.triton_pieces import load_tile, place, product


@triton.jit
def tokens_of(to, time, H: tl.constexpr, K: tl.constexpr):
    """(tokens, 1) pointers to a head's rows in (l h K), from one to its first."""
    return to + (time * H * K)[:, None]


@triton.jit
def add_decays(to, time, first, last, column, base, taken, left, H: tl.constexpr, K: tl.constexpr, SHIFT: tl.constexpr):
    """Adds to the gradients of the decays of the tokens from ``first`` to before ``last``.

    ``taken`` is what a token and later ones take from before the first, for its decay; with ``SHIFT``, where queries
    come before their decay, for that of the token before. ``left`` is what a token and earlier ones leave to later
    ones, for the decay of the next token. No sum has a term that does not count, so nothing has to cancel.
    """
    there = (column < K)[None, :]
    inside = there & ((time >= first) & (time < last))[:, None]
    at = tokens_of(to, time, H, K) + column[None, :]
    if not SHIFT:
        base += taken
    tl.store(at, tl.load(at, mask=inside, other=0.0) + base, mask=inside)
    tl.debug_barrier()  # what other threads wrote can be read after it
    inside = there & ((time >= first) & (time + 1 < last))[:, None]
    at = tokens_of(to, time + 1, H, K) + column[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + left, mask=inside)
    if SHIFT:
        tl.debug_barrier()
        inside = there & ((time > first) & (time < last))[:, None]
        at = tokens_of(to, time - 1, H, K) + column[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + taken, mask=inside)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def weights_backward(
    v,
    do,
    dP,
    cu_seqlens,
    owners,
    v_batch,
    v_time,
    v_head,
    v_step,
    do_batch,
    do_time,
    do_head,
    do_step,
    length,
    per_sequence,
    scale,
    H: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of P, with the scale of the queries, (chunks h Q Q)."""
    task = tl.program_id(0).to(tl.int64)
    head = task % H
    batch, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    v += batch * v_batch + head * v_head
    do += batch * do_batch + head * do_head
    total = tl.zeros((Q, Q), tl.float32)
    for column in tl.range(0, V, BLOCK_V, disable_licm=True):
        values = load_tile(v, start + slot, v_time, stop, column, v_step, V, BLOCK_V)
        dout = load_tile(do, start + slot, do_time, stop, column, do_step, V, BLOCK_V)
        total = product(dout, tl.trans(values), total, FACTOR, PRECISION)
    total = tl.where(slot[:, None] >= slot[None, :], scale * total, 0.0)
    tl.store(dP + task * Q * Q + slot[:, None] * Q + slot[None, :], total)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def states_backward(
    q,
    k,
    v,
    do,
    decay,
    states,
    dstates,
    dq,
    dk,
    ddecay,
    cu_seqlens,
    owners,
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
    do_batch,
    do_time,
    do_head,
    do_step,
    decay_batch,
    decay_time,
    decay_head,
    decay_step,
    length,
    per_sequence,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    SHIFT: tl.constexpr,
    AROUND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What reaches q and k through the states before and after the chunks; adds what reaches the decays.

    With ``AROUND`` the latter includes what goes from the state before a chunk to the one after it.
    """
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    task = tl.program_id(0).to(tl.int64) // tiles
    row = tl.program_id(0).to(tl.int64) % tiles * BLOCK_K
    head = task % H
    batch, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    time, channel = start + tl.arange(0, Q), row + tl.arange(0, BLOCK_K)
    v += batch * v_batch + head * v_head
    do += batch * do_batch + head * do_head
    of_q, of_k = tl.zeros((Q, BLOCK_K), tl.float32), tl.zeros((Q, BLOCK_K), tl.float32)
    around = tl.zeros((BLOCK_K,), tl.float32)
    for column in tl.range(0, V, BLOCK_V, disable_licm=True):
        values = column + tl.arange(0, BLOCK_V)
        S = load_state(states, task * K * V, row, values, V, K, BLOCK_K, BLOCK_V)
        dS = load_state(dstates, task * K * V, row, values, V, K, BLOCK_K, BLOCK_V)
        if AROUND:
            around += tl.sum(S * dS, axis=1)
        dout = load_tile(do, time, do_time, stop, column, do_step, V, BLOCK_V)
        of_q = product(dout, tl.trans(S), of_q, FACTOR, PRECISION)
        vs = load_tile(v, time, v_time, stop, column, v_step, V, BLOCK_V)
        of_k = product(vs, tl.trans(dS), of_k, FACTOR, PRECISION)
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    of_q *= scale * since(decay, time, start, stop, channel, decay_time, decay_step, K, SHIFT)
    of_k *= until(decay, time, start, stop, channel, decay_time, decay_step, K)
    inside = (time < stop)[:, None] & (channel < K)[None, :]
    own = (batch * length * H + head) * K
    tl.store(tokens_of(dq + own, time, H, K) + channel[None, :], of_q, mask=inside)
    tl.store(tokens_of(dk + own, time, H, K) + channel[None, :], of_k, mask=inside)
    if ddecay is not None:
        queries = load_tile(q + batch * q_batch + head // GROUP * q_head, time, q_time, stop, row, q_step, K, BLOCK_K)
        keys = load_tile(k + batch * k_batch + head // GROUP * k_head, time, k_time, stop, row, k_step, K, BLOCK_K)
        around *= over(decay, time, start, stop, channel, decay_time, decay_step, K)
        base = tl.zeros((Q, BLOCK_K), tl.float32) + around[None, :]
        taken, left = tl.cumsum(queries * of_q, axis=0, reverse=True), tl.cumsum(keys * of_k, axis=0)
        add_decays(ddecay + own, time, start, stop, channel, base, taken, left, H, K, SHIFT)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def keys_backward(
    q,
    k,
    decay,
    bonus,
    dP,
    dq,
    dk,
    ddecay,
    dbonus,
    cu_seqlens,
    owners,
    q_batch,
    q_time,
    q_head,
    q_step,
    k_batch,
    k_time,
    k_head,
    k_step,
    decay_batch,
    decay_time,
    decay_head,
    decay_step,
    length,
    per_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what pairs of tokens give; ``dbonus`` (chunks h parts k). A program has one part of a chunk."""
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    parts: tl.constexpr = Q // C
    row, line = tl.program_id(0).to(tl.int64) % tiles * BLOCK_K, tl.program_id(0).to(tl.int64) // tiles
    part, task = line % parts * C, line // parts
    head = task % H
    batch, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    slot, all_slots, channel = tl.arange(0, C), tl.arange(0, Q), row + tl.arange(0, BLOCK_K)
    first, last = tl.minimum(start + part, stop), tl.minimum(start + part + C, stop)
    time, every = start + part + slot, start + all_slots
    q += batch * q_batch + head // GROUP * q_head
    k += batch * k_batch + head // GROUP * k_head
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    square = dP + task * Q * Q
    queries = load_tile(q, time, q_time, last, row, q_step, K, BLOCK_K).to(tl.float32)
    keys = load_tile(k, time, k_time, last, row, k_step, K, BLOCK_K).to(tl.float32)

    # The tokens of earlier parts and of later ones, with the decays between them and this part
    earlier = load_tile(k, every, k_time, first, row, k_step, K, BLOCK_K).to(tl.float32)
    earlier *= until(decay, every, start, first, channel, decay_time, decay_step, K)
    later = load_tile(q, every, q_time, stop, row, q_step, K, BLOCK_K).to(tl.float32)
    later *= since(decay, every, last, stop, channel, decay_time, decay_step, K, SHIFT)
    later = tl.where((all_slots >= part + C)[:, None], later, 0.0)
    from_earlier = tl.load(square + (part + slot)[:, None] * Q + all_slots[None, :])
    of_q = product(from_earlier, earlier, tl.zeros((C, BLOCK_K), tl.float32), FACTOR, PRECISION)
    of_q *= since(decay, time, first, last, channel, decay_time, decay_step, K, SHIFT)
    to_later = tl.load(square + all_slots[None, :] * Q + (part + slot)[:, None])
    of_k = product(to_later, later, tl.zeros((C, BLOCK_K), tl.float32), FACTOR, PRECISION)
    of_k *= until(decay, time, first, last, channel, decay_time, decay_step, K)
    taken, left = tl.cumsum(queries * of_q, axis=0, reverse=True), tl.cumsum(keys * of_k, axis=0)
    if ddecay is not None:
        between = tl.load(square + all_slots[:, None] * Q + all_slots[None, :])
        between = product(between, earlier, tl.zeros((Q, BLOCK_K), tl.float32), FACTOR, PRECISION)
        around = tl.sum(later * between, axis=0) * over(decay, time, first, last, channel, decay_time, decay_step, K)

    # Pairs within the part
    E = tl.zeros((C, BLOCK_K), tl.float32)
    for i in range(last - first):
        d = decay_of(decay, first + i, last, channel, decay_time, decay_step, K)
        qs = load_row(q, first + i, last, channel, q_time, q_step, K)
        weight = tl.load(square + (part + i) * Q + part + slot)
        here = (slot == i)[:, None]
        if not SHIFT:
            E = tl.where(here, 1.0, E * d[None, :])
        back = E * weight[:, None] * qs[None, :]
        of_k += back
        of_q = tl.where(here, of_q + tl.sum(E * weight[:, None] * keys, axis=0)[None, :], of_q)
        passed = tl.where(here, 0.0, back * keys)
        left += tl.where((slot < i - SHIFT)[:, None], tl.cumsum(passed, axis=0), 0.0)
        if SHIFT:
            E = tl.where(here, 1.0, E * d[None, :])
    own = (batch * length * H + head) * K
    inside = (time < last)[:, None] & (channel < K)[None, :]
    if bonus is not None:
        u = tl.load(bonus + head * K + channel, mask=channel < K, other=0.0).to(tl.float32)
        weight = tl.load(square + (part + slot) * (Q + 1))[:, None]
        of_q += weight * u[None, :] * keys
        of_k += weight * u[None, :] * queries
        of_bonus = tl.sum(weight * queries * keys, axis=0)
        tl.store(dbonus + line * K + channel, of_bonus, mask=channel < K)
    at = tokens_of(dq + own, time, H, K) + channel[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + of_q, mask=inside)
    at = tokens_of(dk + own, time, H, K) + channel[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + of_k, mask=inside)
    if ddecay is not None:
        base = tl.zeros((C, BLOCK_K), tl.float32) + around[None, :]
        add_decays(ddecay + own, time, first, last, channel, base, taken, left, H, K, SHIFT)
