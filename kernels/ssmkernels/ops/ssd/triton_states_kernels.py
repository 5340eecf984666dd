"""The state-space dual's Triton kernels that lead from step sizes to the states between chunks.

Tensors of a number for each slot of a chunk are float32 ``(chunks h Q)``, states float32 ``(chunks h p n)``; both are
contiguous. Offsets are 64-bit. What is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.ssd.triton_pieces import decays_to_end, load_tile, place, product, step_size

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e4)  # the least exponent of one token's decay: 2 to the power of it is 0 all the same


@triton.jit(do_not_specialize=["length", "per_sequence"])
def step_sizes(
    dt,
    A,
    bias,
    delta,
    high,
    low,
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
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Δ, 0 beyond a chunk's end, and the sums of log2 of the decays, high and low part.

    Without A, dt holds the logarithms of the decays themselves, and Δ is 1.
    """
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    chunk = tl.program_id(0).to(tl.int64) // blocks
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    head = (tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    slot, here = tl.arange(0, Q), head < H
    time = start + slot
    there = here[:, None] & (time < stop)[None, :]
    at = dt + batch * dt_batch + head[:, None] * dt_head + time[None, :] * dt_time
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
    to = (chunk * H + head)[:, None] * Q + slot[None, :]
    tl.store(delta + to, size, mask=here[:, None])
    tl.store(high + to, above, mask=here[:, None])
    tl.store(low + to, (sums - above.to(tl.float64)).to(tl.float32), mask=here[:, None])


@triton.jit(do_not_specialize=["length", "per_sequence"])
def map_products(
    B,
    C,
    products,
    cu_seqlens,
    owners,
    B_batch,
    B_time,
    B_group,
    B_step,
    C_batch,
    C_time,
    C_group,
    C_step,
    length,
    per_sequence,
    G: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C_i · B_j of all tokens of a chunk, float32 (chunks g Q Q)."""
    chunk, group = tl.program_id(0).to(tl.int64) // G, tl.program_id(0).to(tl.int64) % G
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    total = tl.zeros((Q, Q), tl.float32)
    for first in range(0, N, BLOCK_N):
        Bs = load_tile(B, start + slot, B_time, stop, first, B_step, N, BLOCK_N)
        Cs = load_tile(C, start + slot, C_time, stop, first, C_step, N, BLOCK_N)
        total = tl.dot(Cs, tl.trans(Bs), total, input_precision=PRECISION)
    at = tl.program_id(0).to(tl.int64) * Q * Q + slot[:, None] * Q + slot[None, :]
    tl.store(products + at, total)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def chunk_states(
    x,
    maps,
    delta,
    high,
    low,
    states,
    cu_seqlens,
    owners,
    x_batch,
    x_time,
    x_head,
    x_step,
    maps_batch,
    maps_time,
    maps_group,
    maps_step,
    length,
    per_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each chunk adds to the state after it: a sum of x_j B_jᵀ, by step sizes and the decay to the chunk's end.

    In reverse, what it adds to the gradient of the state before it: x is then the gradient of y before the gate, the
    map is C, and the weight is the decay from the chunk's start.
    """
    p_tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    task = tl.program_id(0).to(tl.int64)
    first_n, task = task % n_tiles * BLOCK_N, task // n_tiles
    first_p, task = task % p_tiles * BLOCK_P, task // p_tiles
    head, chunk = task % H, task // H
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    time = start + tl.arange(0, Q)
    line = task * Q
    if REVERSE:
        weight = tl.exp2(tl.load(high + line + tl.arange(0, Q)))
    else:
        weight = decays_to_end(high + line, low + line, Q) * tl.load(delta + line + tl.arange(0, Q))
    x += batch * x_batch + head * x_head
    xs = load_tile(x, time, x_time, stop, first_p, x_step, P, BLOCK_P).to(tl.float32) * weight[:, None]
    maps += batch * maps_batch + head // GROUP * maps_group
    rows = load_tile(maps, time, maps_time, stop, first_n, maps_step, N, BLOCK_N)
    total = product(tl.trans(xs), rows, tl.zeros((BLOCK_P, BLOCK_N), tl.float32), FACTOR, PRECISION)
    p, n = first_p + tl.arange(0, BLOCK_P), first_n + tl.arange(0, BLOCK_N)
    at = task * P * N + p[:, None] * N + n[None, :]
    tl.store(states + at, total, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["per_sequence"])
def walk(
    states,
    high,
    initial,
    final,
    other,
    parts,
    cu_seqlens,
    per_sequence,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    REVERSE: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replaces what each chunk adds to the state by the state before it; stores the last, (sequences h SIZE).

    In reverse it goes from the last chunk to the first, so that each has the gradient of the state after it. With
    ``other``, the states before the chunks, also ``parts`` (chunks h blocks): the gradients of their decays.
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    block, line = pid % blocks, pid // blocks
    sequence, head = line // H, line % H
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        first, count = begin // Q + sequence, (end - begin + Q - 1) // Q
    else:
        first, count = sequence * per_sequence, sequence * 0 + per_sequence
    index = block * BLOCK + tl.arange(0, BLOCK)
    here = index < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        state += tl.load(initial + line * SIZE + index, mask=here, other=0.0)
    for step in range(count):
        chunk = first + (count - 1 - step if REVERSE else step)
        at = (chunk * H + head) * SIZE + index
        added = tl.load(states + at, mask=here, other=0.0)
        tl.store(states + at, state, mask=here)
        decay = tl.exp2(tl.load(high + (chunk * H + head) * Q + Q - 1))
        if other is not None:
            part = tl.sum(state * tl.load(other + at, mask=here, other=0.0), axis=0)
            tl.store(parts + (chunk * H + head) * blocks + block, part * decay)
        state = state * decay + added
    if final is not None:
        tl.store(final + line * SIZE + index, state, mask=here)
