"""Linear attention's Triton kernels in chunks, where each key channel has a decay of its own: the forward pass.

A chunk of ``Q`` slots is cut into parts of ``C``. Tokens of different parts see each other through the border of the
later one: the decay between them is that from the earlier token to the border times that from there on, and neither
has a positive exponent. Within a part the decay is multiplied on from token to token. Every sum of logarithms is taken
over its own terms, so that no decay is a quotient and all of them are safe.

Letters are those of ``tiled.py``. With a bonus, queries come before their token's decay: ``SHIFT`` is then 1, else 0.
Without a bonus such queries do not see their own token. Tensors over slots of a chunk are float32 and contiguous,
``(chunks h Q …)``, and so are states, ``(chunks h k v)``. What is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.delta_rule.triton_pairs_kernels import decay_of, load_row
from ssmkernels.ops.delta_rule.triton_state_kernels import load_state, store_state
from ssmkernels.ops.ssd.triton_pieces import load_tile, place, product, span


@triton.jit
def logarithms(decay, time, first, last, column, decay_time, decay_step, K: tl.constexpr):
    """(tokens, columns) of the decays, 0 outside of the tokens from ``first`` to before ``last``."""
    if decay is None:
        found = tl.zeros((time.shape[0], column.shape[0]), tl.float32)
    else:
        inside = ((time >= first) & (time < last))[:, None] & (column < K)[None, :]
        at = decay + time[:, None] * decay_time + column.to(tl.int64)[None, :] * decay_step
        found = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def since(decay, time, first, last, column, decay_time, decay_step, K: tl.constexpr, SHIFT: tl.constexpr):
    """(tokens, columns) the decay from before token ``first`` to each query."""
    g = logarithms(decay, time - SHIFT, first, last, column, decay_time, decay_step, K)
    return tl.exp(tl.cumsum(g, axis=0))


@triton.jit
def until(decay, time, first, last, column, decay_time, decay_step, K: tl.constexpr):
    """(tokens, columns) the decay from each key to before token ``last``."""
    g = logarithms(decay, time + 1, first, last, column, decay_time, decay_step, K)
    return tl.exp(tl.cumsum(g, axis=0, reverse=True))


@triton.jit
def over(decay, time, first, last, column, decay_time, decay_step, K: tl.constexpr):
    """(columns) the decay over the tokens from ``first`` to before ``last``."""
    return tl.exp(tl.sum(logarithms(decay, time, first, last, column, decay_time, decay_step, K), axis=0))


@triton.jit(do_not_specialize=["length", "per_sequence"])
def walk(
    x,
    y,
    decay,
    initial,
    final,
    states,
    cu_seqlens,
    x_batch,
    x_time,
    x_head,
    x_step,
    y_batch,
    y_time,
    y_head,
    y_step,
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
    REVERSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The states before the chunks, from keys x and values y, and the last one.

    In reverse the gradients of the states after the chunks, from queries x and gradients y of the output. A program
    has a block of one head's state and goes through one sequence.
    """
    v_tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    k_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    task = tl.program_id(0).to(tl.int64)
    row, column, line = task // v_tiles % k_tiles * BLOCK_K, task % v_tiles * BLOCK_V, task // v_tiles // k_tiles
    head, sequence = line % H, line // H
    batch, begin, end, first = span(cu_seqlens, sequence, length, per_sequence, Q)
    channel, values = row + tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
    x += batch * x_batch + head // GROUP * x_head
    y += batch * y_batch + head * y_head
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    S = load_state(initial, line * K * V, row, values, V, K, BLOCK_K, BLOCK_V)
    count = (end - begin + Q - 1) // Q
    for i in tl.range(0, count, disable_licm=True):  # addresses would fill the registers
        chunk = count - 1 - i if REVERSE else i
        start = begin + chunk * Q
        stop = tl.minimum(start + Q, end)
        time = start + tl.arange(0, Q)
        store_state(states, ((first + chunk) * H + head) * K * V, row, values, S, V, K, BLOCK_K)
        if REVERSE:
            weight = scale * since(decay, time, start, stop, channel, decay_time, decay_step, K, SHIFT)
        else:
            weight = until(decay, time, start, stop, channel, decay_time, decay_step, K)
        weighed = load_tile(x, time, x_time, stop, row, x_step, K, BLOCK_K).to(tl.float32) * weight
        S *= over(decay, time, start, stop, channel, decay_time, decay_step, K)[:, None]
        S = product(
            tl.trans(weighed), load_tile(y, time, y_time, stop, column, y_step, V, BLOCK_V), S, FACTOR, PRECISION
        )
    if final is not None:
        store_state(final, line * K * V, row, values, S, V, K, BLOCK_K)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def pairs(
    q,
    k,
    decay,
    bonus,
    P,
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
    scale,
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
    """P, (chunks h Q Q). A program has the rows of one part."""
    task = tl.program_id(0).to(tl.int64) // (Q // C)
    part = tl.program_id(0).to(tl.int64) % (Q // C) * C
    head = task % H
    batch, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    slot, all_slots = tl.arange(0, C), tl.arange(0, Q)
    time = start + part + slot
    border, last = tl.minimum(start + part, stop), tl.minimum(start + part + C, stop)
    q += batch * q_batch + head // GROUP * q_head
    k += batch * k_batch + head // GROUP * k_head
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    far, near = tl.zeros((C, Q), tl.float32), tl.zeros((C, C), tl.float32)
    for row in tl.range(0, K, BLOCK_K, disable_licm=True):
        channel = row + tl.arange(0, BLOCK_K)
        if part > 0:
            queries = load_tile(q, time, q_time, last, row, q_step, K, BLOCK_K).to(tl.float32)
            queries *= since(decay, time, border, last, channel, decay_time, decay_step, K, SHIFT)
            earlier = load_tile(k, start + all_slots, k_time, border, row, k_step, K, BLOCK_K).to(tl.float32)
            earlier *= until(decay, start + all_slots, start, border, channel, decay_time, decay_step, K)
            far = product(queries, tl.trans(earlier), far, FACTOR, PRECISION)
        keys = load_tile(k, time, k_time, last, row, k_step, K, BLOCK_K).to(tl.float32)
        if bonus is not None:
            u = tl.load(bonus + head * K + channel, mask=channel < K, other=0.0).to(tl.float32)
        E = tl.zeros((C, BLOCK_K), tl.float32)
        for i in range(last - border):
            d = decay_of(decay, border + i, last, channel, decay_time, decay_step, K)
            qs = load_row(q, border + i, last, channel, q_time, q_step, K)
            here = (slot == i)[:, None]
            seen = E
            E = tl.where(here, 1.0, E * d[None, :])
            if bonus is not None:
                seen = tl.where(here, u[None, :], seen)
            elif not SHIFT:
                seen = E
            row_of = tl.sum(seen * keys * qs[None, :], axis=1)
            near = tl.where(here, near + row_of[None, :], near)
    at = P + (task * Q + part + slot)[:, None] * Q
    outside = (all_slots < part) | (all_slots >= part + C)
    tl.store(at + all_slots[None, :], scale * far, mask=outside[None, :])
    tl.store(at + part + slot[None, :], scale * near)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def outputs(
    x,
    y,
    decay,
    P,
    states,
    to,
    cu_seqlens,
    owners,
    x_batch,
    x_time,
    x_head,
    x_step,
    y_batch,
    y_time,
    y_head,
    y_step,
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
    REVERSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o (b l h v), from queries x, values y and the states before the chunks.

    In reverse the gradient of v, from keys x, gradients y of the output and those of the states after the chunks.
    """
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    task = tl.program_id(0).to(tl.int64) // tiles
    column = tl.program_id(0).to(tl.int64) % tiles * BLOCK_V
    head = task % H
    batch, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    slot, values = tl.arange(0, Q), column + tl.arange(0, BLOCK_V)
    time = start + slot
    x += batch * x_batch + head // GROUP * x_head
    y += batch * y_batch + head * y_head
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    if REVERSE:
        seen = tl.load(P + task * Q * Q + slot[None, :] * Q + slot[:, None])
    else:
        seen = tl.load(P + task * Q * Q + slot[:, None] * Q + slot[None, :])
    total = tl.zeros((Q, BLOCK_V), tl.float32)
    total = product(seen, load_tile(y, time, y_time, stop, column, y_step, V, BLOCK_V), total, FACTOR, PRECISION)
    for row in tl.range(0, K, BLOCK_K, disable_licm=True):
        channel = row + tl.arange(0, BLOCK_K)
        if REVERSE:
            weight = until(decay, time, start, stop, channel, decay_time, decay_step, K)
        else:
            weight = scale * since(decay, time, start, stop, channel, decay_time, decay_step, K, SHIFT)
        weighed = load_tile(x, time, x_time, stop, row, x_step, K, BLOCK_K).to(tl.float32) * weight
        S = load_state(states, task * K * V, row, values, V, K, BLOCK_K, BLOCK_V)
        total = product(weighed, S, total, FACTOR, PRECISION)
    at = to + ((batch * length + time) * H + head)[:, None] * V + values[None, :]
    tl.store(at, total.to(to.dtype.element_ty), mask=(time < stop)[:, None] & (values < V)[None, :])
