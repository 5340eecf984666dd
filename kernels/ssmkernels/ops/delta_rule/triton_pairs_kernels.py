"""The delta rule's Triton kernels of what passes between the tokens of a chunk, forward and backward.

The decay from token j to token i is multiplied on from token to token, so that none is a quotient of two others and any
decay is safe. Tensors over slots of a chunk are float32 and contiguous, ``(chunks h Q …)``; letters are those of
``tiled.py``. What is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.ssd.triton_pieces import load_tile, place


@triton.jit
def decay_of(decay, time, stop, column, decay_time, decay_step, K: tl.constexpr):
    """(columns) what a token multiplies the state's rows by: 1 without a decay, and beyond the chunk."""
    if decay is None:
        factor = column.to(tl.float32) * 0 + 1
    else:
        at = decay + time * decay_time + column.to(tl.int64) * decay_step
        factor = tl.exp(tl.load(at, mask=(time < stop) & (column < K), other=0.0).to(tl.float32))
    return factor


@triton.jit
def load_row(x, time, stop, column, x_time, x_step, K: tl.constexpr):
    """(columns) of one token, 0 beyond the chunk."""
    at = x + time * x_time + column.to(tl.int64) * x_step
    return tl.load(at, mask=(time < stop) & (column < K), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def prepare(
    q,
    k,
    beta,
    decay,
    first,
    last,
    pairs,
    erased,
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
    beta_batch,
    beta_time,
    beta_head,
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
    BLOCK: tl.constexpr,
):
    """E_i in ``first``, F_j in ``last``, P in ``pairs``; in ``erased`` the matrix of which (I + M)⁻¹ = I - β erased."""
    task = tl.program_id(0).to(tl.int64)
    head, group = task % H, task % H // GROUP
    batch, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    slot, tokens = tl.arange(0, Q), tl.maximum(stop - start, 0)
    q += batch * q_batch + group * q_head
    k += batch * k_batch + group * k_head
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    P, M = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, Q), tl.float32)
    for block in range(0, K, BLOCK):
        column = block + tl.arange(0, BLOCK)
        keys = load_tile(k, start + slot, k_time, stop, block, k_step, K, BLOCK).to(tl.float32)
        E = tl.zeros((Q, BLOCK), tl.float32)
        since = tl.full((BLOCK,), 1.0, tl.float32)
        for i in range(tokens):
            d = decay_of(decay, start + i, stop, column, decay_time, decay_step, K)
            qs = load_row(q, start + i, stop, column, q_time, q_step, K)
            ks = load_row(k, start + i, stop, column, k_time, k_step, K)
            here = (slot == i)[:, None]
            since *= d
            tl.store(first + (task * Q + i) * K + column, since, mask=column < K)
            E *= d[None, :]
            of_k = tl.sum(E * keys * ks[None, :], axis=1)
            M = tl.where(here, M + of_k[None, :], M)
            E = tl.where(here, 1.0, E)
            of_q = tl.sum(E * keys * qs[None, :], axis=1)
            P = tl.where(here, P + of_q[None, :], P)
        to = (task * Q + slot)[:, None] * K + column[None, :]
        tl.store(last + to, E, mask=(column < K)[None, :])
        rest = tl.zeros((Q, BLOCK), tl.float32) + since[None, :]
        tl.store(first + to, rest, mask=(slot >= tokens)[:, None] & (column < K)[None, :])
    b = tl.load(
        beta + batch * beta_batch + (start + slot) * beta_time + head * beta_head, mask=start + slot < stop, other=0.0
    )
    b = b.to(tl.float32)
    solved = M
    for i in range(1, tokens):
        here = (slot == i)[:, None]
        row = tl.sum(tl.where(here, M, 0.0), axis=0)
        known = tl.sum(tl.where(here, 0.0, solved) * (row * b)[:, None], axis=0)
        solved = tl.where(here, (row - known)[None, :], solved)
    at = task * Q * Q + slot[:, None] * Q + slot[None, :]
    tl.store(pairs + at, scale * P)
    tl.store(erased + at, solved)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def weights_backward(
    beta,
    do,
    errors,
    X,
    dpairs,
    dkeys,
    dbeta,
    cu_seqlens,
    owners,
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
    V: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dP in ``dpairs``, N in ``dkeys``, and the gradient of β, (b l h)."""
    task = tl.program_id(0).to(tl.int64)
    head = task % H
    batch, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    time = start + slot
    b = tl.load(beta + batch * beta_batch + time * beta_time + head * beta_head, mask=time < stop, other=0.0)
    b = b.to(tl.float32)
    dP, N, db = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, Q), tl.float32), tl.zeros((Q,), tl.float32)
    do += batch * do_batch + head * do_head
    for block in tl.range(0, V, BLOCK, disable_licm=True):
        e = load_tile(errors + task * Q * V, slot, V, Q, block, 1, V, BLOCK)
        x = load_tile(X + task * Q * V, slot, V, Q, block, 1, V, BLOCK)
        dout = load_tile(do, time, do_time, stop, block, do_step, V, BLOCK).to(tl.float32)
        u = tl.trans(b[:, None] * e)
        dP = tl.dot(dout, u, dP, input_precision=PRECISION)
        N = tl.dot(x, u, N, input_precision=PRECISION)
        db += tl.sum(x * e, axis=1)
    earlier = slot[:, None] - slot[None, :]
    at = task * Q * Q + slot[:, None] * Q + slot[None, :]
    tl.store(dpairs + at, tl.where(earlier >= 0, scale * dP, 0.0))
    tl.store(dkeys + at, tl.where(earlier > 0, -b[:, None] * N, 0.0))
    tl.store(dbeta + (batch * length + time) * H + head, db, mask=time < stop)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def keys_backward(
    q,
    k,
    beta,
    decay,
    do,
    first,
    last,
    errors,
    X,
    states,
    dstates,
    dpairs,
    dkeys,
    dq,
    dk,
    ddecay,
    dlater,
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
    beta_batch,
    beta_time,
    beta_head,
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
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of q and k for each head, and of the log decays, float32 (b l h k).

    Of the decays' it leaves two parts that belong together: that of token t in ``ddecay``, and in ``dlater`` at token t
    a part of token t + 1's. Without a decay for each channel they are summed over a block of these, (blocks b l h).
    """
    tiles: tl.constexpr = (K + BLOCK - 1) // BLOCK
    task = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    block = tile * BLOCK
    head, group = task % H, task % H // GROUP
    batch, start, stop = place(task // H, owners, cu_seqlens, length, per_sequence, Q)
    slot, column = tl.arange(0, Q), block + tl.arange(0, BLOCK)
    tokens = tl.maximum(stop - start, 0)
    time, inside = start + slot, (column < K)[None, :]
    q += batch * q_batch + group * q_head
    k += batch * k_batch + group * k_head
    do += batch * do_batch + head * do_head
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    b = tl.load(beta + batch * beta_batch + time * beta_time + head * beta_head, mask=time < stop, other=0.0)
    b = b.to(tl.float32)
    of_q, of_k = tl.zeros((Q, BLOCK), tl.float32), tl.zeros((Q, BLOCK), tl.float32)
    earlier, around = tl.zeros((Q, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for v in tl.range(0, V, BLOCK_V, disable_licm=True):  # addresses outside of the loop would fill the registers
        S = load_tile(states + task * K * V, column, V, K, v, 1, V, BLOCK_V)
        dS = load_tile(dstates + task * K * V, column, V, K, v, 1, V, BLOCK_V)
        e = load_tile(errors + task * Q * V, slot, V, Q, v, 1, V, BLOCK_V)
        x = load_tile(X + task * Q * V, slot, V, Q, v, 1, V, BLOCK_V)
        dout = load_tile(do, time, do_time, stop, v, do_step, V, BLOCK_V).to(tl.float32)
        of_q = tl.dot(dout, tl.trans(S), of_q, input_precision=PRECISION)
        of_k = tl.dot(x, tl.trans(S), of_k, input_precision=PRECISION)
        earlier = tl.dot(b[:, None] * e, tl.trans(dS), earlier, input_precision=PRECISION)
        around += tl.sum(S * dS, axis=1)
    at = (task * Q + slot)[:, None] * K + column[None, :]
    since = tl.load(first + at, mask=inside, other=0.0)
    whole = tl.load(first + (task * Q + Q - 1) * K + column, mask=column < K, other=0.0)
    of_q *= scale * since
    of_k *= -b[:, None] * since
    earlier *= tl.load(last + at, mask=inside, other=0.0)
    queries = load_tile(q, time, q_time, stop, block, q_step, K, BLOCK).to(tl.float32)
    keys = load_tile(k, time, k_time, stop, block, k_step, K, BLOCK).to(tl.float32)
    dg = tl.cumsum(queries * of_q + keys * of_k, axis=0, reverse=True) + (whole * around)[None, :]
    later = tl.cumsum(keys * earlier, axis=0)
    E = tl.zeros((Q, BLOCK), tl.float32)
    for i in range(tokens):
        d = decay_of(decay, start + i, stop, column, decay_time, decay_step, K)
        qs = load_row(q, start + i, stop, column, q_time, q_step, K)
        ks = load_row(k, start + i, stop, column, k_time, k_step, K)
        dP = tl.load(dpairs + (task * Q + i) * Q + slot)
        N = tl.load(dkeys + (task * Q + i) * Q + slot)
        here = (slot == i)[:, None]
        E = tl.where(here, 1.0, E * d[None, :])
        back = E * (dP[:, None] * qs[None, :] + N[:, None] * ks[None, :])
        earlier += back
        passed = tl.where(here, 0.0, back * keys)
        later += tl.where((slot < i)[:, None], tl.cumsum(passed, axis=0), 0.0)
        decayed = E * keys
        of_q = tl.where(here, of_q + tl.sum(dP[:, None] * decayed, axis=0)[None, :], of_q)
        of_k = tl.where(here, of_k + tl.sum(N[:, None] * decayed, axis=0)[None, :], of_k)
    there = (time < stop)[:, None] & inside
    token = (batch * length + time) * H + head
    tl.store(dq + token[:, None] * K + column[None, :], of_q, mask=there)
    tl.store(dk + token[:, None] * K + column[None, :], of_k + earlier, mask=there)
    if decay is not None:
        later = tl.where((time + 1 < stop)[:, None] & (slot + 1 < Q)[:, None], later, 0.0)
        if CHANNELS:
            tl.store(ddecay + token[:, None] * K + column[None, :], dg, mask=there)
            tl.store(dlater + token[:, None] * K + column[None, :], later, mask=there)
        else:
            to = token * tiles + tile
            tl.store(ddecay + to, tl.sum(dg, axis=1), mask=time < stop)
            tl.store(dlater + to, tl.sum(later, axis=1), mask=time < stop)
