"""Linear attention's Triton kernels in chunks, where each key channel has a decay of its own: the forward pass.

A chunk of ``Q`` slots is cut into parts of ``C``. Tokens of different parts see each other through the border of the
later one: the decay between them is that from the earlier token to the border times that from there on, and neither
has a positive exponent. Within a part the decay is multiplied on from token to token. Every sum of logarithms is taken
over its own terms, so that no decay is a quotient and all of them are safe.

Letters are those of ``tiled.py``. With a bonus, queries come before their token's decay: ``SHIFT`` is then 1, else 0.
Without a bonus such queries do not see their own token. Tensors over slots of a chunk are float32 and contiguous,
``(chunks h Q …)``, and so are states, ``(chunks h k v)``. What is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, zeros
from ssmkernels.ops.delta_rule.triton_pairs_kernels import decay_of, load_row
from ssmkernels.ops.delta_rule.triton_state_kernels import (
    load_keys,
    load_state,
    load_values,
    store_state,
    store_values,
)
from ssmkernels.ops.ssd.triton_pieces import place, product, span, square_at, turned_at


@triton.jit
def logarithms(decay, time, first, last, column, dims: tl.constexpr):
    """(tokens, columns) of the decays, 0 outside of the tokens from ``first`` to before ``last``."""
    if decay is None:
        found = tl.zeros((time.shape[0], column.shape[0]), tl.float32)
    else:
        inside = ((time >= first) & (time < last))[:, None] & (column < dims.K)[None, :]
        at = decay.at + time[:, None] * decay.time + column.to(tl.int64)[None, :] * decay.step
        found = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def since(decay, time, first, last, column, dims: tl.constexpr, SHIFT: tl.constexpr):
    """(tokens, columns) the decay from before token ``first`` to each query."""
    g = logarithms(decay, time - SHIFT, first, last, column, dims)
    return tl.exp(tl.cumsum(g, axis=0))


@triton.jit
def until(decay, time, first, last, column, dims: tl.constexpr):
    """(tokens, columns) the decay from each key to before token ``last``."""
    g = logarithms(decay, time + 1, first, last, column, dims)
    return tl.exp(tl.cumsum(g, axis=0, reverse=True))


@triton.jit
def over(decay, time, first, last, column, dims: tl.constexpr):
    """(columns) the decay over the tokens from ``first`` to before ``last``."""
    return tl.exp(tl.sum(logarithms(decay, time, first, last, column, dims), axis=0))


@triton.jit(do_not_specialize=["length"])
def walk(
    x,
    y,
    decay,
    initial,
    final,
    states,
    packing,
    length,
    scale,
    dims: tl.constexpr,
    SHIFT: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The states before the chunks, from keys x and values y, and the last one.

    In reverse the gradients of the states after the chunks, from queries x and gradients y of the output. A program
    has a block of one head's state and goes through one sequence.
    """
    v_tiles: tl.constexpr = (dims.V + dims.BLOCK_V - 1) // dims.BLOCK_V
    k_tiles: tl.constexpr = (dims.K + dims.BLOCK_K - 1) // dims.BLOCK_K
    task = tl.program_id(0).to(tl.int64)
    row, column, line = (
        task // v_tiles % k_tiles * dims.BLOCK_K,
        task % v_tiles * dims.BLOCK_V,
        task // v_tiles // k_tiles,
    )
    head, sequence = line % dims.H, line // dims.H
    batch, begin, end, first = span(packing, length, sequence, dims.Q)
    channel, values = row + tl.arange(0, dims.BLOCK_K), column + tl.arange(0, dims.BLOCK_V)
    x = head_of(x, batch, head // dims.GROUP)
    y = head_of(y, batch, head)
    if decay is not None:
        decay = head_of(decay, batch, head)
    S = load_state(initial, line * dims.K * dims.V, row, values, dims)
    count = (end - begin + dims.Q - 1) // dims.Q
    for i in tl.range(0, count, disable_licm=True):  # addresses would fill the registers
        chunk = count - 1 - i if REVERSE else i
        start = begin + chunk * dims.Q
        stop = tl.minimum(start + dims.Q, end)
        time = start + tl.arange(0, dims.Q)
        store_state(states, ((first + chunk) * dims.H + head) * dims.K * dims.V, row, values, S, dims)
        if REVERSE:
            weight = scale * since(decay, time, start, stop, channel, dims, SHIFT)
        else:
            weight = until(decay, time, start, stop, channel, dims)
        weighed = load_keys(x, time, stop, row, dims).to(tl.float32) * weight
        S *= over(decay, time, start, stop, channel, dims)[:, None]
        S = product(tl.trans(weighed), load_values(y, time, stop, column, dims), S, dims)
    if final is not None:
        store_state(final, line * dims.K * dims.V, row, values, S, dims)


@triton.jit(do_not_specialize=["length"])
def pairs(q, k, decay, bonus, P, packing, length, scale, dims: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr):
    """P, (chunks h Q Q). A program has the rows of one part."""
    task = tl.program_id(0).to(tl.int64) // (dims.Q // C)
    part = tl.program_id(0).to(tl.int64) % (dims.Q // C) * C
    head = task % dims.H
    batch, start, stop = place(packing, length, task // dims.H, dims.Q)
    slot, all_slots = tl.arange(0, C), tl.arange(0, dims.Q)
    time = start + part + slot
    border, last = tl.minimum(start + part, stop), tl.minimum(start + part + C, stop)
    q = head_of(q, batch, head // dims.GROUP)
    k = head_of(k, batch, head // dims.GROUP)
    if decay is not None:
        decay = head_of(decay, batch, head)
    far, near = zeros(C, dims.Q), tl.zeros((C, C), tl.float32)
    for row in tl.range(0, dims.K, dims.BLOCK_K, disable_licm=True):
        channel = row + tl.arange(0, dims.BLOCK_K)
        if part > 0:
            queries = load_keys(q, time, last, row, dims).to(tl.float32)
            queries *= since(decay, time, border, last, channel, dims, SHIFT)
            earlier = load_keys(k, start + all_slots, border, row, dims).to(tl.float32)
            earlier *= until(decay, start + all_slots, start, border, channel, dims)
            far = product(queries, tl.trans(earlier), far, dims)
        keys = load_keys(k, time, last, row, dims).to(tl.float32)
        if bonus is not None:
            u = tl.load(bonus + head * dims.K + channel, mask=channel < dims.K, other=0.0).to(tl.float32)
        E = zeros(C, dims.BLOCK_K)
        for i in range(last - border):
            d = decay_of(decay, border + i, last, channel, dims)
            qs = load_row(q, border + i, last, channel, dims)
            here = (slot == i)[:, None]
            seen = E
            E = tl.where(here, 1.0, E * d[None, :])
            if bonus is not None:
                seen = tl.where(here, u[None, :], seen)
            elif not SHIFT:
                seen = E
            row_of = tl.sum(seen * keys * qs[None, :], axis=1)
            near = tl.where(here, near + row_of[None, :], near)
    at = P + (task * dims.Q + part + slot)[:, None] * dims.Q
    outside = (all_slots < part) | (all_slots >= part + C)
    tl.store(at + all_slots[None, :], scale * far, mask=outside[None, :])
    tl.store(at + part + slot[None, :], scale * near)


@triton.jit(do_not_specialize=["length"])
def outputs(
    x, y, decay, P, states, to, packing, length, scale, dims: tl.constexpr, SHIFT: tl.constexpr, REVERSE: tl.constexpr
):
    """o (b l h v), from queries x, values y and the states before the chunks.

    In reverse the gradient of v, from keys x, gradients y of the output and those of the states after the chunks.
    """
    tiles: tl.constexpr = (dims.V + dims.BLOCK_V - 1) // dims.BLOCK_V
    task = tl.program_id(0).to(tl.int64) // tiles
    column = tl.program_id(0).to(tl.int64) % tiles * dims.BLOCK_V
    head = task % dims.H
    batch, start, stop = place(packing, length, task // dims.H, dims.Q)
    slot, values = tl.arange(0, dims.Q), column + tl.arange(0, dims.BLOCK_V)
    time = start + slot
    x = head_of(x, batch, head // dims.GROUP)
    y = head_of(y, batch, head)
    if decay is not None:
        decay = head_of(decay, batch, head)
    if REVERSE:
        seen = tl.load(turned_at(P, task, dims.Q))
    else:
        seen = tl.load(square_at(P, task, dims.Q))
    total = zeros(dims.Q, dims.BLOCK_V)
    total = product(seen, load_values(y, time, stop, column, dims), total, dims)
    for row in tl.range(0, dims.K, dims.BLOCK_K, disable_licm=True):
        channel = row + tl.arange(0, dims.BLOCK_K)
        if REVERSE:
            weight = until(decay, time, start, stop, channel, dims)
        else:
            weight = scale * since(decay, time, start, stop, channel, dims, SHIFT)
        weighed = load_keys(x, time, stop, row, dims).to(tl.float32) * weight
        S = load_state(states, task * dims.K * dims.V, row, values, dims)
        total = product(weighed, S, total, dims)
    store_values(to, batch, time, stop, head, values, total, length, dims)
