"""The matrix memory's Triton kernels around those of the state-space dual: stabilisers, their gradients, a step.

Chunks and their tensors are those of ``ssd/triton_pieces.py``; the weight of a token, exp(i - m), stands in the place
of a step size. Stabilisers within a chunk come from a scan in float64, which never takes the difference of two sums: a
forget gate of -∞ would make that NaN.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid, softplus
from ssmkernels.ops.ssd.triton_backward_kernels import of_steps
from ssmkernels.ops.ssd.triton_pieces import place
from ssmkernels.ops.ssd.triton_states_kernels import LEAST

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def larger_of_both(sums, most, next_sums, next_most):
    """m → max(m + sums, most) and then m → max(m + next_sums, next_most), as one such pair."""
    return sums + next_sums, tl.maximum(most + next_sums, next_most)


@triton.jit
def where_chunks_lie(sequence, cu_seqlens, length, per_sequence, Q: tl.constexpr):
    """A sequence's batch, where it starts and ends there, its first chunk, and how many chunks it has."""
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        return sequence * 0, begin, end, begin // Q + sequence, (end - begin + Q - 1) // Q
    return sequence, sequence * 0, sequence * 0 + length, sequence * per_sequence, sequence * 0 + per_sequence


@triton.jit(do_not_specialize=["length", "per_sequence"])
def gates(
    i,
    f,
    initial,
    m,
    final,
    delta,
    high,
    low,
    cu_seqlens,
    owners,
    i_batch,
    i_time,
    i_head,
    f_batch,
    f_time,
    f_head,
    length,
    per_sequence,
    H: tl.constexpr,
    Q: tl.constexpr,
):
    """m (b l h) and the last one (s h); weights and the sums of log2 of the decays, as ``step_sizes`` of the dual.

    A program walks over the chunks of one head of a sequence.
    """
    line = tl.program_id(0).to(tl.int64)
    sequence, head = line // H, line % H
    batch, begin, end, first, count = where_chunks_lie(sequence, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    i += batch * i_batch + head * i_head
    f += batch * f_batch + head * f_head
    last = tl.full((), 0.0, tl.float64)
    if initial is not None:
        last += tl.load(initial + line).to(tl.float64)
    for step in range(count):
        time = begin + step * Q + slot
        there = time < end
        gate = tl.load(i + time * i_time, mask=there, other=-float("inf")).to(tl.float64)
        kept = -softplus(-tl.load(f + time * f_time, mask=there, other=0.0).to(tl.float32)).to(tl.float64)
        kept = tl.where(there, kept, 0.0)
        sums, most = tl.associative_scan((kept, gate), 0, larger_of_both)
        now = tl.maximum(most, sums + last)
        before = tl.sum(tl.where(slot[:, None] == slot[None, :] + 1, now[None, :], 0.0), axis=1)
        decay = (kept + tl.where(slot == 0, last, before) - now) * LOG2E
        exponent = tl.cumsum(tl.where(decay < LEAST, LEAST, decay), axis=0)
        above = exponent.to(tl.float32)
        to = ((first + step) * H + head) * Q + slot
        tl.store(m + ((batch * length + time) * H + head), now.to(tl.float32), mask=there)
        tl.store(delta + to, tl.exp((gate - now).to(tl.float32)))
        tl.store(high + to, above)
        tl.store(low + to, (exponent - above.to(tl.float64)).to(tl.float32))
        last = tl.sum(tl.where(slot == Q - 1, now, 0.0), axis=0)
    tl.store(final + line, last.to(tl.float32))


@triton.jit(do_not_specialize=["length", "per_sequence"])
def decays_backward(
    delta,
    dexponent,
    ddelta,
    from_state,
    to_state,
    between,
    ddecay,
    dweight,
    cu_seqlens,
    owners,
    length,
    per_sequence,
    H: tl.constexpr,
    N_TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    Q: tl.constexpr,
):
    """Gradients of the decays' logarithms and of the weights, (b l h) each."""
    task = tl.program_id(0).to(tl.int64)
    head, chunk = task % H, task // H
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    size = tl.load(delta + task * Q + slot)
    da, dsize = of_steps(size, dexponent, ddelta, from_state, to_state, between, task, N_TILES, BLOCKS, Q)
    to = (batch * length + start + slot) * H + head
    tl.store(ddecay + to, da, mask=start + slot < stop)
    tl.store(dweight + to, dsize, mask=start + slot < stop)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def gates_backward(
    i,
    f,
    initial,
    m,
    ddecay,
    dweight,
    dm,
    dfinal,
    di,
    df,
    dinitial,
    cu_seqlens,
    owners,
    i_batch,
    i_time,
    i_head,
    f_batch,
    f_time,
    f_head,
    length,
    per_sequence,
    H: tl.constexpr,
    Q: tl.constexpr,
):
    """Gradients of i and f (b l h) and of the initial m (s h), as in ``tiled.py``."""
    line = tl.program_id(0).to(tl.int64)
    sequence, head = line // H, line % H
    batch, begin, end, _, count = where_chunks_lie(sequence, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    i += batch * i_batch + head * i_head
    f += batch * f_batch + head * f_head
    later = tl.load(dfinal + line)
    for step in range(count):
        time = begin + (count - 1 - step) * Q + slot
        there = time < end
        at = (batch * length + time) * H + head
        gate = tl.load(i + time * i_time, mask=there, other=0.0).to(tl.float32)
        raw = tl.load(f + time * f_time, mask=there, other=0.0).to(tl.float32)
        last = tl.load(m + at - H, mask=there & (time > begin), other=0.0)
        if initial is not None:
            last += tl.where(time == begin, tl.load(initial + line), 0.0)
        kept = last - softplus(-raw)
        share = tl.where(kept > gate, 1.0, tl.where(kept < gate, 0.0, 0.5))
        share = tl.where(there, share, 1.0)
        weight = tl.exp(gate - tl.load(m + at, mask=there, other=0.0))
        W = weight * tl.load(dweight + at, mask=there, other=0.0)
        D = tl.load(ddecay + at, mask=there, other=0.0)
        own = (1.0 - share) * D - share * W
        # Of what m_j gets, the part that m_t gets: the product of the shares from t + 1 to j, halves or 0. That of what
        # token j's larger argument gets does without j's share.
        factor = tl.where(share == 1.0, 0.0, tl.where(share == 0.5, -1.0, -1000.0))
        power = tl.cumsum(factor, axis=0)
        before = power - factor
        reach = tl.exp2(tl.where(slot[None, :] >= slot[:, None], power[None, :] - power[:, None], -float("inf")))
        of_own = tl.exp2(tl.where(slot[None, :] > slot[:, None], before[None, :] - power[:, None], -float("inf")))
        direct = tl.load(dm + at, mask=there, other=0.0)
        direct = tl.where(slot == Q - 1, direct + later, direct)
        M = tl.sum(reach * direct[None, :] + of_own * own[None, :], axis=1)
        dkept = own + share * M
        tl.store(di + at, (share * W + (1.0 - share) * (M - D)).to(di.dtype.element_ty), mask=there)
        tl.store(df + at, (dkept * sigmoid(-raw)).to(df.dtype.element_ty), mask=there)
        later = tl.sum(tl.where(slot == 0, dkept, 0.0), axis=0)
    tl.store(dinitial + line, later)


@triton.jit
def step(
    C,
    n,
    m,
    q,
    k,
    v,
    i,
    f,
    y,
    C_batch,
    C_head,
    C_k,
    C_v,
    n_batch,
    n_head,
    n_k,
    m_batch,
    m_head,
    q_batch,
    q_head,
    q_k,
    k_batch,
    k_head,
    k_k,
    v_batch,
    v_head,
    v_v,
    i_batch,
    i_head,
    f_batch,
    f_head,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token of one head: y (b h v), and C, n and m in place."""
    WIDE: tl.constexpr = C.dtype.element_ty
    line = tl.program_id(0).to(tl.int64)
    batch, head = line // H, line % H
    keys, values = tl.arange(0, BLOCK_K).to(tl.int64), tl.arange(0, BLOCK_V).to(tl.int64)
    gate = tl.load(i + batch * i_batch + head * i_head).to(WIDE)
    m += batch * m_batch + head * m_head
    kept = tl.load(m) - softplus(-tl.load(f + batch * f_batch + head * f_head).to(WIDE))
    now = tl.maximum(kept, gate)
    decay, weight = tl.exp(kept - now), tl.exp(gate - now)
    C += batch * C_batch + head * C_head
    n += batch * n_batch + head * n_head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    sums = tl.zeros((), WIDE)
    for first in range(0, K, BLOCK_K):
        at, here = first + keys, first + keys < K
        added = weight * tl.load(k + at * k_k, mask=here, other=0.0).to(WIDE)
        norm = decay * tl.load(n + at * n_k, mask=here, other=0.0) + added
        tl.store(n + at * n_k, norm, mask=here)
        sums += tl.sum(norm * tl.load(q + at * q_k, mask=here, other=0.0).to(WIDE), axis=0)
    below = tl.maximum(tl.abs(sums * scale), tl.exp(tl.minimum(-now, 88.0))) + 1e-6
    for first_v in range(0, V, BLOCK_V):
        column = first_v + values
        value = tl.load(v + column * v_v, mask=column < V, other=0.0).to(WIDE)
        total = tl.zeros((BLOCK_V,), WIDE)
        for first in range(0, K, BLOCK_K):
            at = first + keys
            there = (at < K)[:, None] & (column < V)[None, :]
            place_of = C + at[:, None] * C_k + column[None, :] * C_v
            key = weight * tl.load(k + at * k_k, mask=at < K, other=0.0).to(WIDE)
            state = decay * tl.load(place_of, mask=there, other=0.0) + key[:, None] * value[None, :]
            tl.store(place_of, state, mask=there)
            query = tl.load(q + at * q_k, mask=at < K, other=0.0).to(WIDE)
            total += tl.sum(state * query[:, None], axis=0)
        out = (total * scale / below).to(y.dtype.element_ty)
        tl.store(y + line * V + column, out, mask=column < V)
    tl.store(m, now)
