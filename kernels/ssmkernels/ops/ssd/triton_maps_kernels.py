"""The state-space dual's Triton kernel for gradients of B and C."""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, zeros
from ssmkernels.ops.ssd.triton_pieces import (
    decays_from_start,
    decays_to_end,
    group_part,
    load_inputs,
    load_map,
    load_state,
    product,
    sizes_of,
    square_at,
    store_rows,
)


@triton.jit(do_not_specialize=["length"])
def maps_backward(
    x,
    own,
    other,
    steps,
    dproducts,
    states,
    dmaps,
    dots,
    part_size,
    packing,
    length,
    dims: tl.constexpr,
    OUTPUT: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A part of the gradient of the map ``own``, (parts b l g n), from up to ``HEADS`` heads of a group.

    Without ``OUTPUT`` the map is B, x is x, and the states are the gradients of those after the chunks. With it, the
    map is C, x is the gradient of y before the gate, and the states are those before the chunks. ``dots`` (chunks h
    tiles Q) are the products of what comes through states with the map itself, before step sizes.
    """
    n_tiles: tl.constexpr = (dims.N + dims.BLOCK_N - 1) // dims.BLOCK_N
    task = tl.program_id(0).to(tl.int64)
    tile, task = task % n_tiles, task // n_tiles
    part, _, group, chunk, batch, start, stop = group_part(task, packing, length, dims, HEADS)
    slot = tl.arange(0, dims.Q)
    time, first_n = start + slot, tile * dims.BLOCK_N
    owns = load_map(head_of(own, batch, group), time, stop, first_n, dims)
    others = load_map(head_of(other, batch, group), time, stop, first_n, dims)
    pairs = tl.load(square_at(dproducts, task, dims.Q))
    pairs = pairs if OUTPUT else tl.trans(pairs)
    total = product(pairs, others, zeros(dims.Q, dims.BLOCK_N), dims)
    for within in range(part * HEADS, tl.minimum(part * HEADS + HEADS, dims.GROUP)):
        head = group * dims.GROUP + within
        of_head = chunk * dims.H + head
        rows = zeros(dims.Q, dims.BLOCK_N)
        for first_p in range(0, dims.P, dims.BLOCK_P):
            xs = load_inputs(head_of(x, batch, head), time, stop, first_p, dims)
            S = load_state(states, of_head, first_p, first_n, dims)
            rows = product(xs, S, rows, dims)
        if OUTPUT:
            rows *= decays_from_start(steps, of_head, dims.Q)[:, None]
        else:
            rows *= decays_to_end(steps, of_head, dims.Q)[:, None]
        tl.store(dots + (of_head * n_tiles + tile) * dims.Q + slot, tl.sum(rows * owns.to(tl.float32), axis=1))
        if not OUTPUT:
            rows *= sizes_of(steps, of_head, dims.Q)[:, None]
        total += rows
    n = first_n + tl.arange(0, dims.BLOCK_N)
    store_rows(dmaps + part * part_size, batch, time, stop, group, n, total, length, dims.H // dims.GROUP, dims.N)
