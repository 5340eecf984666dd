"""The state-space dual's Triton kernel for gradients of B and C."""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.ssd.triton_pieces import decays_to_end, load_state, load_tile, place, product


@triton.jit(do_not_specialize=["length", "per_sequence"])
def maps_backward(
    x,
    own,
    other,
    delta,
    high,
    low,
    dproducts,
    states,
    dmaps,
    dots,
    cu_seqlens,
    owners,
    x_batch,
    x_time,
    x_head,
    x_step,
    own_batch,
    own_time,
    own_group,
    own_step,
    other_batch,
    other_time,
    other_group,
    other_step,
    part_size,
    length,
    per_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    OUTPUT: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A part of the gradient of the map ``own``, (parts b l g n), from up to ``HEADS`` heads of a group.

    Without ``OUTPUT`` the map is B, x is x, and the states are the gradients of those after the chunks. With it, the
    map is C, x is the gradient of y before the gate, and the states are those before the chunks. ``dots`` (chunks h
    tiles Q) are the products of what comes through states with the map itself, before step sizes.
    """
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    groups: tl.constexpr = H // GROUP
    task = tl.program_id(0).to(tl.int64)
    tile, task = task % n_tiles, task // n_tiles
    part, line = task % PARTS, task // PARTS
    group, chunk = line % groups, line // groups
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    time, first_n = start + slot, tile * BLOCK_N
    owns = load_tile(own + batch * own_batch + group * own_group, time, own_time, stop, first_n, own_step, N, BLOCK_N)
    others = load_tile(
        other + batch * other_batch + group * other_group, time, other_time, stop, first_n, other_step, N, BLOCK_N
    )
    pairs = tl.load(dproducts + task * Q * Q + slot[:, None] * Q + slot[None, :])
    pairs = pairs if OUTPUT else tl.trans(pairs)
    total = product(pairs, others, tl.zeros((Q, BLOCK_N), tl.float32), FACTOR, PRECISION)
    for within in range(part * HEADS, tl.minimum(part * HEADS + HEADS, GROUP)):
        head = group * GROUP + within
        of_head = chunk * H + head
        rows = tl.zeros((Q, BLOCK_N), tl.float32)
        for first_p in range(0, P, BLOCK_P):
            xs = load_tile(x + batch * x_batch + head * x_head, time, x_time, stop, first_p, x_step, P, BLOCK_P)
            S = load_state(states + of_head * P * N, first_p, first_n, P, N, BLOCK_P, BLOCK_N)
            rows = product(xs, S, rows, FACTOR, PRECISION)
        if OUTPUT:
            rows *= tl.exp2(tl.load(high + of_head * Q + slot))[:, None]
        else:
            rows *= decays_to_end(high + of_head * Q, low + of_head * Q, Q)[:, None]
        tl.store(dots + (of_head * n_tiles + tile) * Q + slot, tl.sum(rows * owns.to(tl.float32), axis=1))
        if not OUTPUT:
            rows *= tl.load(delta + of_head * Q + slot)[:, None]
        total += rows
    n = first_n + tl.arange(0, BLOCK_N)
    to = part * part_size + ((batch * length + time) * groups + group)[:, None] * N + n[None, :]
    tl.store(dmaps + to, total.to(dmaps.dtype.element_ty), mask=(time < stop)[:, None] & (n < N)[None, :])
