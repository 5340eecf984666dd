"""The general delta rule's Triton kernels in chunks of matrix products: what the erased directions make of each chunk.

All else is linear attention, with queries q and a, with keys b and k, and with values U and v: its kernels give the
pairs of tokens and the gradients of keys. Here a program has some columns of one head's state, all its keys by its own
values, in registers, and goes through one sequence. Letters are those of ``tiled.py``; ``solved`` is (I - (a, b)⁻)⁻¹
without its diagonal. Pairs are float32 (chunks h Q Q), those of queries with their scale. What is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.delta_rule.triton_state_kernels import load_state, store_state
from ssmkernels.ops.linear_attention.triton_channels_kernels import over, since, until
from ssmkernels.ops.ssd.triton_pieces import load_tile, place, product, span


@triton.jit(do_not_specialize=["length", "per_sequence"])
def solve(
    ab,
    solved,
    cu_seqlens,
    owners,
    length,
    per_sequence,
    H: tl.constexpr,
    Q: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``solved`` from (a, b)⁻, row by row."""
    task = tl.program_id(0).to(tl.int64)
    _, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    at = task * Q * Q + slot[:, None] * Q + slot[None, :]
    found = tl.load(ab + at)
    for i in range(1, stop - start):
        row = tl.load(ab + (task * Q + i) * Q + slot)
        known = tl.sum(tl.load(ab + (task * Q + i) * Q + slot)[:, None] * found, axis=0)
        found = tl.where((slot == i)[:, None], (row + known)[None, :], found)
    tl.store(solved + at, found)


@triton.jit
def weighed(x, weight, time, stop, x_time, x_step, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(Q, BLOCK_K) queries or keys of a chunk, times their decays."""
    return load_tile(x, time, x_time, stop, 0, x_step, K, BLOCK_K).to(tl.float32) * weight


@triton.jit(do_not_specialize=["length", "per_sequence"])
def walk(
    q,
    k,
    v,
    a,
    b,
    decay,
    qb,
    qk,
    ak,
    solved,
    initial,
    final,
    o,
    U,
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
    length,
    per_sequence,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o (b l h v) and the final state; or U (b l h v) and the states before the chunks (chunks h k v)."""
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    task = tl.program_id(0).to(tl.int64)
    column, line = task % tiles * BLOCK_V, task // tiles
    head, sequence = line % H, line // H
    batch, begin, end, first = span(cu_seqlens, sequence, length, per_sequence, Q)
    slot, key, values = tl.arange(0, Q), tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
    a += batch * a_batch + head * a_head
    b += batch * b_batch + head * b_head
    k += batch * k_batch + head * k_head
    q += batch * q_batch + head * q_head
    v += batch * v_batch + head * v_head
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    S = load_state(initial, line * K * V, 0, values, V, K, BLOCK_K, BLOCK_V)
    for i in tl.range(0, (end - begin + Q - 1) // Q, disable_licm=True):  # addresses would fill the registers
        own, start = (first + i) * H + head, begin + i * Q
        stop = tl.minimum(start + Q, end)
        time = start + slot
        square = own * Q * Q + slot[:, None] * Q + slot[None, :]
        to = ((batch * length + time) * H + head)[:, None] * V + values[None, :]
        inside = (time < stop)[:, None] & (values < V)[None, :]
        vs = load_tile(v, time, v_time, stop, column, v_step, V, BLOCK_V).to(tl.float32)
        weight = since(decay, time, start, stop, key, decay_time, decay_step, K, 1)
        read = weighed(a, weight, time, stop, a_time, a_step, K, BLOCK_K)
        u = product(read, S, tl.zeros((Q, BLOCK_V), tl.float32), FACTOR, PRECISION)
        u = product(tl.load(ak + square), vs, u, FACTOR, PRECISION)
        u = product(tl.load(solved + square), u, u, FACTOR, PRECISION)
        if states is not None:
            store_state(states, own * K * V, 0, values, S, V, K, BLOCK_K)
            tl.store(U + to, u, mask=inside)
        if o is not None:
            weight = scale * since(decay, time, start, stop, key, decay_time, decay_step, K, 0)
            asked = weighed(q, weight, time, stop, q_time, q_step, K, BLOCK_K)
            out = product(asked, S, tl.zeros((Q, BLOCK_V), tl.float32), FACTOR, PRECISION)
            out = product(tl.load(qb + square), u, out, FACTOR, PRECISION)
            out = product(tl.load(qk + square), vs, out, FACTOR, PRECISION)
            tl.store(o + to, out.to(o.dtype.element_ty), mask=inside)
        S *= over(decay, time, start, stop, key, decay_time, decay_step, K)[:, None]
        weight = until(decay, time, start, stop, key, decay_time, decay_step, K)
        S = product(tl.trans(weighed(b, weight, time, stop, b_time, b_step, K, BLOCK_K)), u, S, FACTOR, PRECISION)
        S = product(tl.trans(weighed(k, weight, time, stop, k_time, k_step, K, BLOCK_K)), vs, S, FACTOR, PRECISION)
    if final is not None:
        store_state(final, line * K * V, 0, values, S, V, K, BLOCK_K)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def walk_backward(
    q,
    k,
    a,
    b,
    decay,
    do,
    qb,
    qk,
    ak,
    solved,
    dfinal,
    dinitial,
    dR,
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
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the triangular system's right side and of v (b l h v), and of the states after the chunks."""
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    task = tl.program_id(0).to(tl.int64)
    column, line = task % tiles * BLOCK_V, task // tiles
    head, sequence = line % H, line // H
    batch, begin, end, first = span(cu_seqlens, sequence, length, per_sequence, Q)
    slot, key, values = tl.arange(0, Q), tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
    a += batch * a_batch + head * a_head
    b += batch * b_batch + head * b_head
    k += batch * k_batch + head * k_head
    q += batch * q_batch + head * q_head
    do += batch * do_batch + head * do_head
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    dS = load_state(dfinal, line * K * V, 0, values, V, K, BLOCK_K, BLOCK_V)
    count = (end - begin + Q - 1) // Q
    for i in tl.range(0, count, disable_licm=True):
        chunk = count - 1 - i
        own, start = (first + chunk) * H + head, begin + chunk * Q
        stop = tl.minimum(start + Q, end)
        time = start + slot
        turned = own * Q * Q + slot[None, :] * Q + slot[:, None]
        store_state(dstates, own * K * V, 0, values, dS, V, K, BLOCK_K)
        dout = load_tile(do, time, do_time, stop, column, do_step, V, BLOCK_V).to(tl.float32)
        weight = until(decay, time, start, stop, key, decay_time, decay_step, K)
        r = product(tl.load(qb + turned), dout, tl.zeros((Q, BLOCK_V), tl.float32), FACTOR, PRECISION)
        r = product(weighed(b, weight, time, stop, b_time, b_step, K, BLOCK_K), dS, r, FACTOR, PRECISION)
        r = product(tl.load(solved + turned), r, r, FACTOR, PRECISION)
        x = product(tl.load(qk + turned), dout, tl.zeros((Q, BLOCK_V), tl.float32), FACTOR, PRECISION)
        x = product(weighed(k, weight, time, stop, k_time, k_step, K, BLOCK_K), dS, x, FACTOR, PRECISION)
        x = product(tl.load(ak + turned), r, x, FACTOR, PRECISION)
        to = ((batch * length + time) * H + head)[:, None] * V + values[None, :]
        inside = (time < stop)[:, None] & (values < V)[None, :]
        tl.store(dR + to, r, mask=inside)
        tl.store(dv + to, x.to(dv.dtype.element_ty), mask=inside)
        dS *= over(decay, time, start, stop, key, decay_time, decay_step, K)[:, None]
        weight = since(decay, time, start, stop, key, decay_time, decay_step, K, 1)
        dS = product(tl.trans(weighed(a, weight, time, stop, a_time, a_step, K, BLOCK_K)), r, dS, FACTOR, PRECISION)
        weight = scale * since(decay, time, start, stop, key, decay_time, decay_step, K, 0)
        asked = weighed(q, weight, time, stop, q_time, q_step, K, BLOCK_K)
        dS = product(tl.trans(asked), dout, dS, FACTOR, PRECISION)
    store_state(dinitial, line * K * V, 0, values, dS, V, K, BLOCK_K)
