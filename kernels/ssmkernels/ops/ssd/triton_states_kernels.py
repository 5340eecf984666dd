"""The state-space dual's Triton kernels that lead from step sizes to the states between chunks.

Tensors of a number for each slot of a chunk are float32 ``(chunks h Q)``, states float32 ``(chunks h p n)``; both are
contiguous. Offsets are 64-bit. What is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, zeros
from ssmkernels.ops.ssd.triton_pieces import (
    chunks_of,
    decays_from_start,
    decays_to_end,
    head_tile,
    load_inputs,
    load_map,
    place,
    product,
    sizes_of,
    square_at,
    step_size,
)

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e4)  # the least exponent of one token's decay: 2 to the power of it is 0 all the same


@triton.jit(do_not_specialize=["length"])
def step_sizes(
    dt, A, bias, steps, packing, length, least, most, dims: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Δ, 0 beyond a chunk's end, and the sums of log2 of the decays, high and low part.

    Without A, dt holds the logarithms of the decays themselves, and Δ is 1.
    """
    blocks: tl.constexpr = (dims.H + BLOCK_H - 1) // BLOCK_H
    chunk = tl.program_id(0).to(tl.int64) // blocks
    batch, start, stop = place(packing, length, chunk, dims.Q)
    head = (tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    slot, here = tl.arange(0, dims.Q), head < dims.H
    time = start + slot
    there = here[:, None] & (time < stop)[None, :]
    at = dt.at + batch * dt.batch + head[:, None] * dt.head + time[None, :] * dt.time
    raw = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head, mask=here, other=0.0)[:, None]
    if A is not None:
        size = tl.where(there, step_size(raw, least, most, SOFTPLUS), 0.0)
        exponent = size.to(tl.float64) * tl.load(A + head, mask=here, other=0.0).to(tl.float64)[:, None] * LOG2E
    else:
        size = tl.where(there, 1.0, 0.0)
        exponent = raw.to(tl.float64) * LOG2E
    sums = tl.cumsum(tl.where(exponent < LEAST, LEAST, exponent), axis=1)
    above = sums.to(tl.float32)
    to = (chunk * dims.H + head)[:, None] * dims.Q + slot[None, :]
    tl.store(steps.delta + to, size, mask=here[:, None])
    tl.store(steps.high + to, above, mask=here[:, None])
    tl.store(steps.low + to, (sums - above.to(tl.float64)).to(tl.float32), mask=here[:, None])


@triton.jit(do_not_specialize=["length"])
def map_products(B, C, products, packing, length, dims: tl.constexpr):
    """C_i · B_j of all tokens of a chunk, float32 (chunks g Q Q)."""
    groups: tl.constexpr = dims.H // dims.GROUP
    task = tl.program_id(0).to(tl.int64)
    chunk, group = task // groups, task % groups
    batch, start, stop = place(packing, length, chunk, dims.Q)
    slot = tl.arange(0, dims.Q)
    B = head_of(B, batch, group)
    C = head_of(C, batch, group)
    total = zeros(dims.Q, dims.Q)
    for first in range(0, dims.N, dims.BLOCK_N):
        Bs = load_map(B, start + slot, stop, first, dims)
        Cs = load_map(C, start + slot, stop, first, dims)
        total = tl.dot(Cs, tl.trans(Bs), total, input_precision=dims.PRECISION)
    tl.store(square_at(products, task, dims.Q), total)


@triton.jit(do_not_specialize=["length"])
def chunk_states(x, maps, steps, states, packing, length, dims: tl.constexpr, REVERSE: tl.constexpr):
    """What each chunk adds to the state after it: a sum of x_j B_jᵀ, by step sizes and the decay to the chunk's end.

    In reverse, what it adds to the gradient of the state before it: x is then the gradient of y before the gate, the
    map is C, and the weight is the decay from the chunk's start.
    """
    n_tiles: tl.constexpr = (dims.N + dims.BLOCK_N - 1) // dims.BLOCK_N
    task = tl.program_id(0).to(tl.int64)
    first_n, task = task % n_tiles * dims.BLOCK_N, task // n_tiles
    first_p, task, head, _, batch, start, stop = head_tile(task, packing, length, dims)
    time = start + tl.arange(0, dims.Q)
    if REVERSE:
        weight = decays_from_start(steps, task, dims.Q)
    else:
        weight = decays_to_end(steps, task, dims.Q) * sizes_of(steps, task, dims.Q)
    x = head_of(x, batch, head)
    xs = load_inputs(x, time, stop, first_p, dims).to(tl.float32) * weight[:, None]
    maps = head_of(maps, batch, head // dims.GROUP)
    rows = load_map(maps, time, stop, first_n, dims)
    total = product(tl.trans(xs), rows, zeros(dims.BLOCK_P, dims.BLOCK_N), dims)
    p, n = first_p + tl.arange(0, dims.BLOCK_P), first_n + tl.arange(0, dims.BLOCK_N)
    at = task * dims.P * dims.N + p[:, None] * dims.N + n[None, :]
    tl.store(states + at, total, mask=(p < dims.P)[:, None] & (n < dims.N)[None, :])


@triton.jit(do_not_specialize=["length"])
def walk(
    states,
    high,
    initial,
    final,
    other,
    parts,
    packing,
    length,
    dims: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replaces what each chunk adds to the state by the state before it; stores the last, (sequences h p n).

    In reverse it goes from the last chunk to the first, so that each has the gradient of the state after it. With
    ``other``, the states before the chunks, also ``parts`` (chunks h blocks): the gradients of their decays.
    """
    SIZE: tl.constexpr = dims.P * dims.N
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    block, line = pid % blocks, pid // blocks
    sequence, head = line // dims.H, line % dims.H
    first, count = chunks_of(packing, length, sequence, dims.Q)
    index = block * BLOCK + tl.arange(0, BLOCK)
    here = index < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        state += tl.load(initial + line * SIZE + index, mask=here, other=0.0)
    for step in range(count):
        chunk = first + (count - 1 - step if REVERSE else step)
        at = (chunk * dims.H + head) * SIZE + index
        added = tl.load(states + at, mask=here, other=0.0)
        tl.store(states + at, state, mask=here)
        decay = tl.exp2(tl.load(high + (chunk * dims.H + head) * dims.Q + dims.Q - 1))
        if other is not None:
            part = tl.sum(state * tl.load(other + at, mask=here, other=0.0), axis=0)
            tl.store(parts + (chunk * dims.H + head) * blocks + block, part * decay)
        state = state * decay + added
    if final is not None:
        tl.store(final + line * SIZE + index, state, mask=here)
