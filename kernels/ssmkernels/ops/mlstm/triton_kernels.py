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

from ssmkernels.core.triton_pieces import head_of, load_channels, sigmoid, softplus
from ssmkernels.ops.ssd.triton_backward_kernels import of_steps
from ssmkernels.ops.ssd.triton_pieces import place, span
from ssmkernels.ops.ssd.triton_states_kernels import LEAST

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def larger_of_both(sums, most, next_sums, next_most):
    """m → max(m + sums, most) and then m → max(m + next_sums, next_most), as one such pair."""
    return sums + next_sums, tl.maximum(most + next_sums, next_most)


@triton.jit
def chunks_of(packing, length, H: tl.constexpr, Q: tl.constexpr):
    """A program's head among those of all sequences and of its own; where this lies, its first chunk, and how many."""
    line = tl.program_id(0).to(tl.int64)
    batch, begin, end, first = span(packing, length, line // H, Q)
    return line, line % H, batch, begin, end, first, (end - begin + Q - 1) // Q


@triton.jit(do_not_specialize=["length"])
def gates(i, f, initial, m, final, steps, packing, length, H: tl.constexpr, Q: tl.constexpr):
    """m (b l h) and the last one (s h); weights and the sums of log2 of the decays, as ``step_sizes`` of the dual.

    A program walks over the chunks of one head of a sequence.
    """
    slot = tl.arange(0, Q)
    line, head, batch, begin, end, first, count = chunks_of(packing, length, H, Q)
    i, f = head_of(i, batch, head), head_of(f, batch, head)
    last = tl.full((), 0.0, tl.float64)
    if initial is not None:
        last += tl.load(initial + line).to(tl.float64)
    for n in range(count):
        time = begin + n * Q + slot
        there = time < end
        gate = tl.load(i.at + time * i.time, mask=there, other=-float("inf")).to(tl.float64)
        kept = -softplus(-tl.load(f.at + time * f.time, mask=there, other=0.0).to(tl.float32)).to(tl.float64)
        kept = tl.where(there, kept, 0.0)
        sums, most = tl.associative_scan((kept, gate), 0, larger_of_both)
        now = tl.maximum(most, sums + last)
        before = tl.sum(tl.where(slot[:, None] == slot[None, :] + 1, now[None, :], 0.0), axis=1)
        decay = (kept + tl.where(slot == 0, last, before) - now) * LOG2E
        exponent = tl.cumsum(tl.where(decay < LEAST, LEAST, decay), axis=0)
        above = exponent.to(tl.float32)
        to = ((first + n) * H + head) * Q + slot
        tl.store(m + ((batch * length + time) * H + head), now.to(tl.float32), mask=there)
        tl.store(steps.delta + to, tl.exp((gate - now).to(tl.float32)))
        tl.store(steps.high + to, above)
        tl.store(steps.low + to, (exponent - above.to(tl.float64)).to(tl.float32))
        last = tl.sum(tl.where(slot == Q - 1, now, 0.0), axis=0)
    tl.store(final + line, last.to(tl.float32))


@triton.jit(do_not_specialize=["length"])
def decays_backward(
    steps,
    parts,
    ddecay,
    dweight,
    packing,
    length,
    H: tl.constexpr,
    N_TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    Q: tl.constexpr,
):
    """Gradients of the decays' logarithms and of the weights, (b l h) each."""
    task = tl.program_id(0).to(tl.int64)
    head, chunk = task % H, task // H
    batch, start, stop = place(packing, length, chunk, Q)
    slot = tl.arange(0, Q)
    da, dsize = of_steps(steps, parts, task, N_TILES, BLOCKS, Q)
    to = (batch * length + start + slot) * H + head
    tl.store(ddecay + to, da, mask=start + slot < stop)
    tl.store(dweight + to, dsize, mask=start + slot < stop)


@triton.jit(do_not_specialize=["length"])
def gates_backward(
    i, f, initial, m, ddecay, dweight, dm, dfinal, di, df, dinitial, packing, length, H: tl.constexpr, Q: tl.constexpr
):
    """Gradients of i and f (b l h) and of the initial m (s h), as in ``tiled.py``."""
    slot = tl.arange(0, Q)
    line, head, batch, begin, end, _, count = chunks_of(packing, length, H, Q)
    i, f = head_of(i, batch, head), head_of(f, batch, head)
    later = tl.load(dfinal + line)
    for n in range(count):
        time = begin + (count - 1 - n) * Q + slot
        there = time < end
        at = (batch * length + time) * H + head
        gate = tl.load(i.at + time * i.time, mask=there, other=0.0).to(tl.float32)
        raw = tl.load(f.at + time * f.time, mask=there, other=0.0).to(tl.float32)
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
    C_strides,
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
    gate = tl.load(i.at + batch * i.batch + head * i.head).to(WIDE)
    m = m.at + (batch * m.batch + head * m.head)
    kept = tl.load(m) - softplus(-tl.load(f.at + batch * f.batch + head * f.head).to(WIDE))
    now = tl.maximum(kept, gate)
    decay, weight = tl.exp(kept - now), tl.exp(gate - now)
    C += batch * C_strides[0] + head * C_strides[1]
    sums = tl.zeros((), WIDE)
    for first in range(0, K, BLOCK_K):
        at = first + keys
        norm = decay * load_channels(n, batch, head, at, K) + weight * load_channels(k, batch, head, at, K).to(WIDE)
        tl.store(n.at + (batch * n.batch + head * n.head) + at * n.step, norm, mask=at < K)
        sums += tl.sum(norm * load_channels(q, batch, head, at, K).to(WIDE), axis=0)
    below = tl.maximum(tl.abs(sums * scale), tl.exp(tl.minimum(-now, 88.0))) + 1e-6
    for first_v in range(0, V, BLOCK_V):
        column = first_v + values
        value = load_channels(v, batch, head, column, V).to(WIDE)
        total = tl.zeros((BLOCK_V,), WIDE)
        for first in range(0, K, BLOCK_K):
            at = first + keys
            there = (at < K)[:, None] & (column < V)[None, :]
            place_of = C + at[:, None] * C_strides[2] + column[None, :] * C_strides[3]
            key = weight * load_channels(k, batch, head, at, K).to(WIDE)
            state = decay * tl.load(place_of, mask=there, other=0.0) + key[:, None] * value[None, :]
            tl.store(place_of, state, mask=there)
            query = load_channels(q, batch, head, at, K).to(WIDE)
            total += tl.sum(state * query[:, None], axis=0)
        out = (total * scale / below).to(y.dtype.element_ty)
        tl.store(y + line * V + column, out, mask=column < V)
    tl.store(m, now)
