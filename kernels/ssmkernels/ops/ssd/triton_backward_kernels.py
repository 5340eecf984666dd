"""The state-space dual's Triton kernels for gradients of x, of products of maps, and of step sizes.

``dout`` is the gradient of y before its gate. ``dstates`` are the gradients of the states after the chunks.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, sigmoid, softplus, zeros
from ssmkernels.ops.ssd.triton_pieces import (
    decays,
    decays_to_end,
    from_states,
    group_part,
    head_tile,
    load_inputs,
    place,
    product,
    sizes_of,
    square_at,
    store_rows,
)


@triton.jit(do_not_specialize=["length"])
def pairs_backward(
    x, dout, steps, products, dproducts, dexponent, ddelta, packing, length, dims: tl.constexpr, HEADS: tl.constexpr
):
    """Through the pairs of tokens of a chunk, for up to ``HEADS`` heads of a group.

    ``dproducts`` (chunks g parts Q Q) are parts of the gradient of the products of maps; ``ddelta`` is that of the step
    sizes as weights of x, and ``dexponent`` that of Δ A: of one at t, a sum over the pairs j < t ≤ i.
    """
    task = tl.program_id(0).to(tl.int64)
    part, line, group, chunk, batch, start, stop = group_part(task, packing, length, dims, HEADS)
    slot = tl.arange(0, dims.Q)
    total = zeros(dims.Q, dims.Q)
    for within in range(part * HEADS, tl.minimum(part * HEADS + HEADS, dims.GROUP)):
        head = group * dims.GROUP + within
        to = (chunk * dims.H + head) * dims.Q
        pairs = zeros(dims.Q, dims.Q)
        for first in range(0, dims.P, dims.BLOCK_P):
            xs = load_inputs(head_of(x, batch, head), start + slot, stop, first, dims)
            douts = load_inputs(head_of(dout, batch, head), start + slot, stop, first, dims)
            pairs = tl.dot(douts, tl.trans(xs), pairs, input_precision=dims.PRECISION)
        pairs *= decays(steps, chunk * dims.H + head, dims.Q)
        factors = tl.load(square_at(products, line, dims.Q))
        tl.store(ddelta + to + slot, tl.sum(pairs * factors, axis=0))
        pairs *= sizes_of(steps, chunk * dims.H + head, dims.Q)[None, :]
        total += pairs
        sums = tl.cumsum(pairs * factors, axis=1)  # over the tokens to j: no difference of sums, which loses digits
        after = tl.sum(tl.where(slot[:, None] > slot[None, :], sums, 0.0), axis=0)
        tl.store(dexponent + to + slot + 1, after, mask=slot + 1 < dims.Q)
        tl.store(dexponent + to + slot, zeros(dims.Q), mask=slot == 0)
    tl.store(square_at(dproducts, task, dims.Q), total)


@triton.jit(do_not_specialize=["length"])
def inputs_backward(x, dout, B, D, steps, products, dstates, dx, dD, packing, length, dims: tl.constexpr):
    """dx (b l h p), and each chunk's part of dD, (chunks h p)."""
    first_p, task, head, chunk, batch, start, stop = head_tile(tl.program_id(0).to(tl.int64), packing, length, dims)
    time = start + tl.arange(0, dims.Q)
    total = from_states(head_of(B, batch, head // dims.GROUP), dstates, task, time, stop, first_p, dims)
    total *= decays_to_end(steps, task, dims.Q)[:, None]
    weights = tl.load(square_at(products, chunk * (dims.H // dims.GROUP) + head // dims.GROUP, dims.Q))
    weights *= decays(steps, task, dims.Q)
    dout = head_of(dout, batch, head)
    douts = load_inputs(dout, time, stop, first_p, dims)
    total = product(tl.trans(weights), douts, total, dims)
    total *= sizes_of(steps, task, dims.Q)[:, None]
    p = first_p + tl.arange(0, dims.BLOCK_P)
    if D is not None:
        douts = douts.to(tl.float32)
        total += tl.load(D.at + head * D.head + p * D.step, mask=p < dims.P, other=0.0)[None, :] * douts
        x = head_of(x, batch, head)
        xs = load_inputs(x, time, stop, first_p, dims).to(tl.float32)
        tl.store(dD + task * dims.P + p, tl.sum(xs * douts, axis=0), mask=p < dims.P)
    store_rows(dx, batch, time, stop, head, p, total, length, dims.H, dims.P)


@triton.jit
def of_steps(steps, parts, task, N_TILES: tl.constexpr, BLOCKS: tl.constexpr, Q: tl.constexpr):
    """Of a head's chunk ``task``, (Q) each: gradients of the decays' logarithms, and of step sizes as weights of x."""
    slot = tl.arange(0, Q)
    whole = tl.zeros((Q,), tl.float32)
    for i in range(BLOCKS):
        whole += tl.load(parts.between + task * BLOCKS + i)
    left, right = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
    for i in range(N_TILES):
        left += tl.load(parts.from_state + (task * N_TILES + i) * Q + slot)
        right += tl.load(parts.to_state + (task * N_TILES + i) * Q + slot)
    earlier = slot[:, None] < slot[None, :]
    added = (right * sizes_of(steps, task, Q))[:, None]
    da = tl.load(parts.dexponent + task * Q + slot) + whole
    da += tl.sum(tl.where(earlier, 0.0, left[:, None]), axis=0)  # outputs of this token and later ones
    da += tl.sum(tl.where(earlier, added, 0.0), axis=0)  # what earlier tokens add to the state
    return da, tl.load(parts.ddelta + task * Q + slot) + right


@triton.jit(do_not_specialize=["length"])
def steps_backward(
    dt,
    A,
    bias,
    steps,
    parts,
    ddt,
    dA,
    dbias,
    packing,
    length,
    least,
    most,
    dims: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    N_TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """ddt (b l h), and each chunk's part of dA and of the bias's gradient, (chunks h). Without A, dt is log decays."""
    task = tl.program_id(0).to(tl.int64)
    head, chunk = task % dims.H, task // dims.H
    batch, start, stop = place(packing, length, chunk, dims.Q)
    slot = tl.arange(0, dims.Q)
    here = start + slot < stop
    da, dsize = of_steps(steps, parts, task, N_TILES, BLOCKS, dims.Q)
    if A is not None:
        dsize += da * tl.load(A + head)
    else:
        dsize = da
    at = dt.at + batch * dt.batch + head * dt.head + (start + slot) * dt.time
    raw = tl.load(at, mask=here, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head)
    unbounded = raw
    if SOFTPLUS:
        unbounded = softplus(raw)
        dsize *= sigmoid(raw)
    dsize = tl.where((unbounded < least) | (unbounded > most), 0.0, dsize)
    tl.store(ddt + (batch * length + start + slot) * dims.H + head, dsize.to(ddt.dtype.element_ty), mask=here)
    if dA is not None:
        tl.store(dA + task, tl.sum(tl.where(here, da * sizes_of(steps, task, dims.Q), 0.0), axis=0))
    if dbias is not None:
        tl.store(dbias + task, tl.sum(tl.where(here, dsize, 0.0), axis=0))
