"""The state-space dual's Triton kernels for gradients of x, of products of maps, and of step sizes.

``dout`` is the gradient of y before its gate. ``dstates`` are the gradients of the states after the chunks.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid, softplus
from ssmkernels.ops.ssd.triton_pieces import decays, decays_to_end, load_state, load_tile, place, product


@triton.jit(do_not_specialize=["length", "per_sequence"])
def pairs_backward(
    x,
    dout,
    delta,
    high,
    low,
    products,
    dproducts,
    dexponent,
    ddelta,
    cu_seqlens,
    owners,
    x_batch,
    x_time,
    x_head,
    x_step,
    dout_batch,
    dout_time,
    dout_head,
    dout_step,
    length,
    per_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Through the pairs of tokens of a chunk, for up to ``HEADS`` heads of a group.

    ``dproducts`` (chunks g parts Q Q) are parts of the gradient of the products of maps; ``ddelta`` is that of the step
    sizes as weights of x, and ``dexponent`` that of Δ A: of one at t, a sum over the pairs j < t ≤ i.
    """
    groups: tl.constexpr = H // GROUP
    task = tl.program_id(0).to(tl.int64)
    part, line = task % PARTS, task // PARTS
    group, chunk = line % groups, line // groups
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    square = slot[:, None] * Q + slot[None, :]
    total = tl.zeros((Q, Q), tl.float32)
    for within in range(part * HEADS, tl.minimum(part * HEADS + HEADS, GROUP)):
        head = group * GROUP + within
        to = (chunk * H + head) * Q
        pairs = tl.zeros((Q, Q), tl.float32)
        for first in range(0, P, BLOCK_P):
            xs = load_tile(x + batch * x_batch + head * x_head, start + slot, x_time, stop, first, x_step, P, BLOCK_P)
            at = dout + batch * dout_batch + head * dout_head
            douts = load_tile(at, start + slot, dout_time, stop, first, dout_step, P, BLOCK_P)
            pairs = tl.dot(douts, tl.trans(xs), pairs, input_precision=PRECISION)
        pairs *= decays(high + to, low + to, Q)
        factors = tl.load(products + line * Q * Q + square)
        tl.store(ddelta + to + slot, tl.sum(pairs * factors, axis=0))
        pairs *= tl.load(delta + to + slot)[None, :]
        total += pairs
        sums = tl.cumsum(pairs * factors, axis=1)  # over the tokens to j: no difference of sums, which loses digits
        after = tl.sum(tl.where(slot[:, None] > slot[None, :], sums, 0.0), axis=0)
        tl.store(dexponent + to + slot + 1, after, mask=slot + 1 < Q)
        tl.store(dexponent + to + slot, tl.zeros((Q,), tl.float32), mask=slot == 0)
    tl.store(dproducts + task * Q * Q + square, total)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def inputs_backward(
    x,
    dout,
    B,
    D,
    delta,
    high,
    low,
    products,
    dstates,
    dx,
    dD,
    cu_seqlens,
    owners,
    x_batch,
    x_time,
    x_head,
    x_step,
    dout_batch,
    dout_time,
    dout_head,
    dout_step,
    B_batch,
    B_time,
    B_group,
    B_step,
    D_head,
    D_step,
    length,
    per_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx (b l h p), and each chunk's part of dD, (chunks h p)."""
    p_tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    task = tl.program_id(0).to(tl.int64)
    first_p, task = task % p_tiles * BLOCK_P, task // p_tiles
    head, chunk = task % H, task // H
    group = head // GROUP
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    time, line = start + slot, task * Q
    B += batch * B_batch + group * B_group
    total = tl.zeros((Q, BLOCK_P), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        Bs = load_tile(B, time, B_time, stop, first_n, B_step, N, BLOCK_N)
        dS = load_state(dstates + task * P * N, first_p, first_n, P, N, BLOCK_P, BLOCK_N)
        total = product(Bs, tl.trans(dS), total, FACTOR, PRECISION)
    total *= decays_to_end(high + line, low + line, Q)[:, None]
    weights = tl.load(products + (chunk * (H // GROUP) + group) * Q * Q + slot[:, None] * Q + slot[None, :])
    weights *= decays(high + line, low + line, Q)
    dout += batch * dout_batch + head * dout_head
    douts = load_tile(dout, time, dout_time, stop, first_p, dout_step, P, BLOCK_P)
    total = product(tl.trans(weights), douts, total, FACTOR, PRECISION)
    total *= tl.load(delta + line + slot)[:, None]
    p = first_p + tl.arange(0, BLOCK_P)
    if D is not None:
        douts = douts.to(tl.float32)
        total += tl.load(D + head * D_head + p * D_step, mask=p < P, other=0.0)[None, :] * douts
        x += batch * x_batch + head * x_head
        xs = load_tile(x, time, x_time, stop, first_p, x_step, P, BLOCK_P).to(tl.float32)
        tl.store(dD + task * P + p, tl.sum(xs * douts, axis=0), mask=p < P)
    to = ((batch * length + time) * H + head)[:, None] * P + p[None, :]
    tl.store(dx + to, total.to(dx.dtype.element_ty), mask=(time < stop)[:, None] & (p < P)[None, :])


@triton.jit
def of_steps(
    size,
    dexponent,
    ddelta,
    from_state,
    to_state,
    between,
    task,
    N_TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    Q: tl.constexpr,
):
    """Of a head's chunk ``task``, (Q) each: gradients of the decays' logarithms, and of step sizes as weights of x.

    ``from_state`` and ``to_state`` are parts of the gradients of these logarithms through the outputs of the state
    before the chunk and through the state after it, ``between`` through the decay of the one to the other.
    """
    slot = tl.arange(0, Q)
    whole = tl.zeros((Q,), tl.float32)
    for i in range(BLOCKS):
        whole += tl.load(between + task * BLOCKS + i)
    left, right = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
    for i in range(N_TILES):
        left += tl.load(from_state + (task * N_TILES + i) * Q + slot)
        right += tl.load(to_state + (task * N_TILES + i) * Q + slot)
    earlier = slot[:, None] < slot[None, :]
    da = tl.load(dexponent + task * Q + slot) + whole
    da += tl.sum(tl.where(earlier, 0.0, left[:, None]), axis=0)  # outputs of this token and later ones
    da += tl.sum(tl.where(earlier, (right * size)[:, None], 0.0), axis=0)  # what earlier tokens add to the state
    return da, tl.load(ddelta + task * Q + slot) + right


@triton.jit(do_not_specialize=["length", "per_sequence"])
def steps_backward(
    dt,
    A,
    bias,
    delta,
    dexponent,
    ddelta,
    from_state,
    to_state,
    between,
    ddt,
    dA,
    dbias,
    cu_seqlens,
    owners,
    dt_batch,
    dt_time,
    dt_head,
    length,
    per_sequence,
    least,
    most,
    H: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    N_TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    Q: tl.constexpr,
):
    """ddt (b l h), and each chunk's part of dA and of the bias's gradient, (chunks h). Without A, dt is log decays."""
    task = tl.program_id(0).to(tl.int64)
    head, chunk = task % H, task // H
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    here = start + slot < stop
    size = tl.load(delta + task * Q + slot)
    da, dsize = of_steps(size, dexponent, ddelta, from_state, to_state, between, task, N_TILES, BLOCKS, Q)
    if A is not None:
        dsize += da * tl.load(A + head)
    else:
        dsize = da
    at = dt + batch * dt_batch + head * dt_head + (start + slot) * dt_time
    raw = tl.load(at, mask=here, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head)
    unbounded = raw
    if SOFTPLUS:
        unbounded = softplus(raw)
        dsize *= sigmoid(raw)
    dsize = tl.where((unbounded < least) | (unbounded > most), 0.0, dsize)
    tl.store(ddt + (batch * length + start + slot) * H + head, dsize.to(ddt.dtype.element_ty), mask=here)
    if dA is not None:
        tl.store(dA + task, tl.sum(tl.where(here, da * size, 0.0), axis=0))
    if dbias is not None:
        tl.store(dbias + task, tl.sum(tl.where(here, dsize, 0.0), axis=0))
