"""The delta rule's Triton kernels that carry the state from chunk to chunk, and its step.

A program has some columns of one head's state, with all of its keys, and goes through one sequence. The rows are in one
piece, or with ``TWO`` in two, so that no product needs more than half of them in registers. Letters are those of
``tiled.py``; what is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.delta_rule.triton_pairs_kernels import keys_backward, prepare, weights_backward
from ssmkernels.ops.ssd.triton_pieces import load_tile

__all__ = ["keys_backward", "prepare", "step", "walk", "walk_backward", "weights_backward"]


@triton.jit
def span(sequence, cu_seqlens, length, per_sequence, Q: tl.constexpr):
    """A sequence's batch, where it begins and ends there, and the number of its first chunk."""
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        return sequence * 0, begin, tl.load(cu_seqlens + sequence + 1).to(tl.int64), begin // Q + sequence
    return sequence, sequence * 0, sequence * 0 + length, sequence * per_sequence


@triton.jit
def load_beta(beta, time, stop, beta_time):
    """(slots), 0 beyond the chunk."""
    return tl.load(beta + time * beta_time, mask=time < stop, other=0.0).to(tl.float32)


@triton.jit
def load_state(x, at, row, values, V: tl.constexpr, K: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    """(B, BLOCK) of a state from this row on; 0 where there is none."""
    key = row + tl.arange(0, B)
    if x is None:
        S = tl.zeros((B, BLOCK), tl.float32)
    else:
        inside = (key < K)[:, None] & (values < V)[None, :]
        S = tl.load(x + at + key[:, None] * V + values[None, :], mask=inside, other=0.0)
    return S


@triton.jit
def store_state(x, at, row, values, S, V: tl.constexpr, K: tl.constexpr, B: tl.constexpr):
    key = row + tl.arange(0, B)
    tl.store(x + at + key[:, None] * V + values[None, :], S, mask=(key < K)[:, None] & (values < V)[None, :])


@triton.jit
def decayed(x, decays, time, stop, row, x_time, x_step, K: tl.constexpr, Q: tl.constexpr, B: tl.constexpr):
    """(Q, B) queries or keys of a chunk from channel ``row`` on, times decays (Q, K)."""
    tile = load_tile(x, time, x_time, stop, row, x_step, K, B).to(tl.float32)
    return tile * load_tile(decays, tl.arange(0, Q), K, Q, row, 1, K, B)


@triton.jit
def whole(first, row, K: tl.constexpr, Q: tl.constexpr, B: tl.constexpr):
    """(B, 1) the decay over all of a chunk."""
    key = row + tl.arange(0, B)
    return tl.load(first + (Q - 1) * K + key, mask=key < K, other=0.0)[:, None]


@triton.jit(do_not_specialize=["length", "per_sequence"])
def walk(
    q,
    k,
    v,
    beta,
    first,
    last,
    pairs,
    erased,
    initial,
    final,
    o,
    errors,
    states,
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
    beta_batch,
    beta_time,
    beta_head,
    length,
    per_sequence,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o (b l h v) and the final state; or the errors (chunks h Q v), and the states before chunks (chunks h k v)."""
    tiles: tl.constexpr = (V + BLOCK - 1) // BLOCK
    task = tl.program_id(0).to(tl.int64)
    column, head, sequence = task % tiles * BLOCK, task // tiles % H, task // tiles // H
    batch, begin, end, chunk = span(sequence, cu_seqlens, length, per_sequence, Q)
    slot, values = tl.arange(0, Q), column + tl.arange(0, BLOCK)
    at = (sequence * H + head) * K * V
    S = load_state(initial, at, 0, values, V, K, B, BLOCK)
    if TWO:
        S2 = load_state(initial, at, B, values, V, K, B, BLOCK)
    q += batch * q_batch + head // GROUP * q_head
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head * v_head
    beta += batch * beta_batch + head * beta_head
    for c in tl.range(0, (end - begin + Q - 1) // Q, disable_licm=True):  # addresses would fill the registers
        own = (chunk + c) * H + head
        time = begin + c * Q + slot
        since, until = first + own * Q * K, last + own * Q * K
        if states is not None:
            store_state(states, own * K * V, 0, values, S, V, K, B)
            if TWO:
                store_state(states, own * K * V, B, values, S2, V, K, B)
        b = load_beta(beta, time, end, beta_time)
        held = tl.dot(decayed(k, since, time, end, 0, k_time, k_step, K, Q, B), S, input_precision=PRECISION)
        if TWO:
            keys = decayed(k, since, time, end, B, k_time, k_step, K, Q, B)
            held = tl.dot(keys, S2, held, input_precision=PRECISION)
        error = load_tile(v, time, v_time, end, column, v_step, V, BLOCK).to(tl.float32) - held
        square = own * Q * Q + slot[:, None] * Q + slot[None, :]
        error -= tl.dot(tl.load(erased + square), b[:, None] * error, input_precision=PRECISION)
        written = b[:, None] * error
        if errors is not None:
            to = (own * Q + slot)[:, None] * V + values[None, :]
            tl.store(errors + to, error, mask=(values < V)[None, :])
        if o is not None:
            if TWO:
                tl.debug_barrier()  # or the compiler loads everything at once, and spills
            out = tl.dot(decayed(q, since, time, end, 0, q_time, q_step, K, Q, B), S, input_precision=PRECISION)
            if TWO:
                tl.debug_barrier()
                queries = decayed(q, since, time, end, B, q_time, q_step, K, Q, B)
                out = tl.dot(queries, S2, out, input_precision=PRECISION)
            out = tl.dot(tl.load(pairs + square), written, scale * out, input_precision=PRECISION)
            to = ((batch * length + time) * H + head)[:, None] * V + values[None, :]
            tl.store(o + to, out.to(o.dtype.element_ty), mask=(time < end)[:, None] & (values < V)[None, :])
        if TWO:
            tl.debug_barrier()
        keys = decayed(k, until, time, end, 0, k_time, k_step, K, Q, B)
        S = tl.dot(tl.trans(keys), written, whole(since, 0, K, Q, B) * S, input_precision=PRECISION)
        if TWO:
            tl.debug_barrier()
            keys = decayed(k, until, time, end, B, k_time, k_step, K, Q, B)
            S2 = tl.dot(tl.trans(keys), written, whole(since, B, K, Q, B) * S2, input_precision=PRECISION)
    if final is not None:
        store_state(final, at, 0, values, S, V, K, B)
        if TWO:
            store_state(final, at, B, values, S2, V, K, B)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def walk_backward(
    q,
    k,
    beta,
    do,
    first,
    last,
    pairs,
    erased,
    dfinal,
    dinitial,
    X,
    dv,
    dstates,
    cu_seqlens,
    q_batch,
    q_time,
    q_head,
    q_step,
    k_batch,
    k_time,
    k_head,
    k_step,
    beta_batch,
    beta_time,
    beta_head,
    do_batch,
    do_time,
    do_head,
    do_step,
    length,
    per_sequence,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X (chunks h Q v), the gradients of v (b l h v), of the states after chunks, and of the initial state."""
    tiles: tl.constexpr = (V + BLOCK - 1) // BLOCK
    task = tl.program_id(0).to(tl.int64)
    column, head, sequence = task % tiles * BLOCK, task // tiles % H, task // tiles // H
    batch, begin, end, chunk = span(sequence, cu_seqlens, length, per_sequence, Q)
    slot, values = tl.arange(0, Q), column + tl.arange(0, BLOCK)
    at = (sequence * H + head) * K * V
    dS = load_state(dfinal, at, 0, values, V, K, B, BLOCK)
    if TWO:
        dS2 = load_state(dfinal, at, B, values, V, K, B, BLOCK)
    q += batch * q_batch + head // GROUP * q_head
    k += batch * k_batch + head // GROUP * k_head
    do += batch * do_batch + head * do_head
    beta += batch * beta_batch + head * beta_head
    count = (end - begin + Q - 1) // Q
    for back in tl.range(0, count, disable_licm=True):
        c = count - 1 - back
        own = (chunk + c) * H + head
        time = begin + c * Q + slot
        since, until = first + own * Q * K, last + own * Q * K
        b = load_beta(beta, time, end, beta_time)
        dout = load_tile(do, time, do_time, end, column, do_step, V, BLOCK).to(tl.float32)
        square = own * Q * Q + slot[:, None] * Q + slot[None, :]
        x = tl.dot(tl.trans(tl.load(pairs + square)), dout, input_precision=PRECISION)
        keys = decayed(k, until, time, end, 0, k_time, k_step, K, Q, B)
        x = tl.dot(keys, dS, x, input_precision=PRECISION)
        if TWO:
            keys = decayed(k, until, time, end, B, k_time, k_step, K, Q, B)
            x = tl.dot(keys, dS2, x, input_precision=PRECISION)
        x -= tl.dot(tl.trans(tl.load(erased + square)), b[:, None] * x, input_precision=PRECISION)
        tl.store(X + (own * Q + slot)[:, None] * V + values[None, :], x, mask=(values < V)[None, :])
        to = ((batch * length + time) * H + head)[:, None] * V + values[None, :]
        gradient = (b[:, None] * x).to(dv.dtype.element_ty)
        tl.store(dv + to, gradient, mask=(time < end)[:, None] & (values < V)[None, :])
        store_state(dstates, own * K * V, 0, values, dS, V, K, B)
        erasing, asking = -b[:, None] * x, scale * dout
        dS *= whole(since, 0, K, Q, B)
        queries = decayed(q, since, time, end, 0, q_time, q_step, K, Q, B)
        dS = tl.dot(tl.trans(queries), asking, dS, input_precision=PRECISION)
        keys = decayed(k, since, time, end, 0, k_time, k_step, K, Q, B)
        dS = tl.dot(tl.trans(keys), erasing, dS, input_precision=PRECISION)
        if TWO:
            store_state(dstates, own * K * V, B, values, dS2, V, K, B)
            dS2 *= whole(since, B, K, Q, B)
            queries = decayed(q, since, time, end, B, q_time, q_step, K, Q, B)
            dS2 = tl.dot(tl.trans(queries), asking, dS2, input_precision=PRECISION)
            keys = decayed(k, since, time, end, B, k_time, k_step, K, Q, B)
            dS2 = tl.dot(tl.trans(keys), erasing, dS2, input_precision=PRECISION)
    if dinitial is not None:
        store_state(dinitial, at, 0, values, dS, V, K, B)
        if TWO:
            store_state(dinitial, at, B, values, dS2, V, K, B)


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
