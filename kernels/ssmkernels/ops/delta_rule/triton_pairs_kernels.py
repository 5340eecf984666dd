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

from ssmkernels.core.triton_pieces import head_of, zeros
from ssmkernels.ops.delta_rule.triton_state_kernels import load_keys, load_slots, load_values
from ssmkernels.ops.ssd.triton_pieces import load_tile, place, product, square_at


@triton.jit
def decay_of(decay, time, stop, column, dims: tl.constexpr):
    """(columns) what a token multiplies the state's rows by: 1 without a decay, and beyond the chunk."""
    if decay is None:
        factor = column.to(tl.float32) * 0 + 1
    else:
        at = decay.at + time * decay.time + column.to(tl.int64) * decay.step
        factor = tl.exp(tl.load(at, mask=(time < stop) & (column < dims.K), other=0.0).to(tl.float32))
    return factor


@triton.jit
def load_row(x, time, stop, column, dims: tl.constexpr):
    """(columns) of one token, 0 beyond the chunk."""
    at = x.at + time * x.time + column.to(tl.int64) * x.step
    return tl.load(at, mask=(time < stop) & (column < dims.K), other=0.0).to(tl.float32)


@triton.jit
def load_beta(beta, time, stop):
    """(tokens) of one head, 0 beyond the chunk."""
    return tl.load(beta.at + time * beta.time, mask=time < stop, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def prepare(q, k, beta, decay, between, packing, length, scale, dims: tl.constexpr):
    """E_i in ``first``, F_j in ``last``, P in ``pairs``; ``erased`` is the matrix of which (I + M)⁻¹ = I - β erased."""
    task = tl.program_id(0).to(tl.int64)
    head, group = task % dims.H, task % dims.H // dims.GROUP
    batch, start, stop = place(packing, length, task // dims.H, dims.Q)
    slot, tokens = tl.arange(0, dims.Q), tl.maximum(stop - start, 0)
    q = head_of(q, batch, group)
    k = head_of(k, batch, group)
    if decay is not None:
        decay = head_of(decay, batch, head)
    P, M = zeros(dims.Q, dims.Q), zeros(dims.Q, dims.Q)
    for block in range(0, dims.K, dims.BLOCK_K):
        column = block + tl.arange(0, dims.BLOCK_K)
        keys = load_keys(k, start + slot, stop, block, dims).to(tl.float32)
        E = zeros(dims.Q, dims.BLOCK_K)
        since = zeros(dims.BLOCK_K) + 1
        for i in range(tokens):
            d = decay_of(decay, start + i, stop, column, dims)
            qs = load_row(q, start + i, stop, column, dims)
            ks = load_row(k, start + i, stop, column, dims)
            here = (slot == i)[:, None]
            since *= d
            tl.store(between.first + (task * dims.Q + i) * dims.K + column, since, mask=column < dims.K)
            E *= d[None, :]
            of_k = tl.sum(E * keys * ks[None, :], axis=1)
            M = tl.where(here, M + of_k[None, :], M)
            E = tl.where(here, 1.0, E)
            of_q = tl.sum(E * keys * qs[None, :], axis=1)
            P = tl.where(here, P + of_q[None, :], P)
        to = (task * dims.Q + slot)[:, None] * dims.K + column[None, :]
        tl.store(between.last + to, E, mask=(column < dims.K)[None, :])
        rest = zeros(dims.Q, dims.BLOCK_K) + since[None, :]
        tl.store(between.first + to, rest, mask=(slot >= tokens)[:, None] & (column < dims.K)[None, :])
    b = load_beta(head_of(beta, batch, head), start + slot, stop)
    solved = M
    for i in range(1, tokens):
        here = (slot == i)[:, None]
        row = tl.sum(tl.where(here, M, 0.0), axis=0)
        known = tl.sum(tl.where(here, 0.0, solved) * (row * b)[:, None], axis=0)
        solved = tl.where(here, (row - known)[None, :], solved)
    tl.store(square_at(between.pairs, task, dims.Q), scale * P)
    tl.store(square_at(between.erased, task, dims.Q), solved)


@triton.jit(do_not_specialize=["length"])
def weights_backward(beta, do, errors, X, dpairs, dkeys, dbeta, packing, length, scale, dims: tl.constexpr):
    """dP in ``dpairs``, N in ``dkeys``, and the gradient of β, (b l h)."""
    task = tl.program_id(0).to(tl.int64)
    head = task % dims.H
    batch, start, stop = place(packing, length, task // dims.H, dims.Q)
    slot = tl.arange(0, dims.Q)
    time = start + slot
    b = load_beta(head_of(beta, batch, head), time, stop)
    dP, N, db = (
        zeros(dims.Q, dims.Q),
        zeros(dims.Q, dims.Q),
        zeros(dims.Q),
    )
    do = head_of(do, batch, head)
    for block in tl.range(0, dims.V, dims.BLOCK_V, disable_licm=True):
        e = load_slots(errors, task, block, dims)
        x = load_slots(X, task, block, dims)
        dout = load_values(do, time, stop, block, dims).to(tl.float32)
        u = tl.trans(b[:, None] * e)
        dP = product(dout, u, dP, dims)
        N = product(x, u, N, dims)
        db += tl.sum(x * e, axis=1)
    earlier = slot[:, None] - slot[None, :]
    tl.store(square_at(dpairs, task, dims.Q), tl.where(earlier >= 0, scale * dP, 0.0))
    tl.store(square_at(dkeys, task, dims.Q), tl.where(earlier > 0, -b[:, None] * N, 0.0))
    tl.store(dbeta + (batch * length + time) * dims.H + head, db, mask=time < stop)


@triton.jit(do_not_specialize=["length"])
def keys_backward(
    q,
    k,
    beta,
    decay,
    do,
    between,
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
    packing,
    length,
    scale,
    dims: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradients of q and k for each head, and of the log decays, float32 (b l h k).

    Of the decays' it leaves two parts that belong together: that of token t in ``ddecay``, and in ``dlater`` at token t
    a part of token t + 1's. Without a decay for each channel they are summed over a block of these, (blocks b l h).
    """
    tiles: tl.constexpr = (dims.K + dims.BLOCK_K - 1) // dims.BLOCK_K
    task = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    block = tile * dims.BLOCK_K
    head, group = task % dims.H, task % dims.H // dims.GROUP
    batch, start, stop = place(packing, length, task // dims.H, dims.Q)
    slot, column = tl.arange(0, dims.Q), block + tl.arange(0, dims.BLOCK_K)
    tokens = tl.maximum(stop - start, 0)
    time, inside = start + slot, (column < dims.K)[None, :]
    q = head_of(q, batch, group)
    k = head_of(k, batch, group)
    do = head_of(do, batch, head)
    if decay is not None:
        decay = head_of(decay, batch, head)
    b = load_beta(head_of(beta, batch, head), time, stop)
    of_q, of_k = zeros(dims.Q, dims.BLOCK_K), zeros(dims.Q, dims.BLOCK_K)
    earlier, around = zeros(dims.Q, dims.BLOCK_K), zeros(dims.BLOCK_K)
    for v in tl.range(
        0, dims.V, dims.BLOCK_V, disable_licm=True
    ):  # addresses outside of the loop would fill the registers
        S = load_tile(states + task * dims.K * dims.V, column, dims.V, dims.K, v, 1, dims.V, dims.BLOCK_V)
        dS = load_tile(dstates + task * dims.K * dims.V, column, dims.V, dims.K, v, 1, dims.V, dims.BLOCK_V)
        e = load_slots(errors, task, v, dims)
        x = load_slots(X, task, v, dims)
        dout = load_values(do, time, stop, v, dims).to(tl.float32)
        of_q = product(dout, tl.trans(S), of_q, dims)
        of_k = product(x, tl.trans(S), of_k, dims)
        earlier = product(b[:, None] * e, tl.trans(dS), earlier, dims)
        around += tl.sum(S * dS, axis=1)
    at = (task * dims.Q + slot)[:, None] * dims.K + column[None, :]
    since = tl.load(between.first + at, mask=inside, other=0.0)
    whole = tl.load(between.first + (task * dims.Q + dims.Q - 1) * dims.K + column, mask=column < dims.K, other=0.0)
    of_q *= scale * since
    of_k *= -b[:, None] * since
    earlier *= tl.load(between.last + at, mask=inside, other=0.0)
    queries = load_keys(q, time, stop, block, dims).to(tl.float32)
    keys = load_keys(k, time, stop, block, dims).to(tl.float32)
    dg = tl.cumsum(queries * of_q + keys * of_k, axis=0, reverse=True) + (whole * around)[None, :]
    later = tl.cumsum(keys * earlier, axis=0)
    E = zeros(dims.Q, dims.BLOCK_K)
    for i in range(tokens):
        d = decay_of(decay, start + i, stop, column, dims)
        qs = load_row(q, start + i, stop, column, dims)
        ks = load_row(k, start + i, stop, column, dims)
        dP = tl.load(dpairs + (task * dims.Q + i) * dims.Q + slot)
        N = tl.load(dkeys + (task * dims.Q + i) * dims.Q + slot)
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
    token = (batch * length + time) * dims.H + head
    tl.store(dq + token[:, None] * dims.K + column[None, :], of_q, mask=there)
    tl.store(dk + token[:, None] * dims.K + column[None, :], of_k + earlier, mask=there)
    if decay is not None:
        later = tl.where((time + 1 < stop)[:, None] & (slot + 1 < dims.Q)[:, None], later, 0.0)
        if CHANNELS:
            tl.store(ddecay + token[:, None] * dims.K + column[None, :], dg, mask=there)
            tl.store(dlater + token[:, None] * dims.K + column[None, :], later, mask=there)
        else:
            to = token * tiles + tile
            tl.store(ddecay + to, tl.sum(dg, axis=1), mask=time < stop)
            tl.store(dlater + to, tl.sum(later, axis=1), mask=time < stop)
