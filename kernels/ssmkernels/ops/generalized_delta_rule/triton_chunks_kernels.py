"""The general delta rule's Triton kernels in chunks of matrix products: what the erased directions make of each chunk.

All else is linear attention, with queries q and a, with keys b and k, and with values U and v: its kernels give the
pairs of tokens and the gradients of keys. Here a program has some columns of one head's state, all its keys by its own
values, in registers, and goes through one sequence. Letters are those of ``tiled.py``; ``solved`` is (I - (a, b)⁻)⁻¹
without its diagonal. Pairs are float32 (chunks h Q Q), those of queries with their scale. What is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, heads_of, zeros
from ssmkernels.ops.delta_rule.triton_state_kernels import (
    columns_of,
    load_keys,
    load_state,
    load_values,
    store_state,
    store_values,
)
from ssmkernels.ops.linear_attention.triton_channels_kernels import over, since, until
from ssmkernels.ops.ssd.triton_pieces import place, product, square_at, turned_at


@triton.jit(do_not_specialize=["length"])
def solve(ab, solved, packing, length, dims: tl.constexpr):
    """``solved`` from (a, b)⁻, row by row."""
    task = tl.program_id(0).to(tl.int64)
    _, start, stop = place(packing, length, task // dims.H, dims.Q)
    slot = tl.arange(0, dims.Q)
    found = tl.load(square_at(ab, task, dims.Q))
    for i in range(1, stop - start):
        row = tl.load(ab + (task * dims.Q + i) * dims.Q + slot)
        known = tl.sum(tl.load(ab + (task * dims.Q + i) * dims.Q + slot)[:, None] * found, axis=0)
        found = tl.where((slot == i)[:, None], (row + known)[None, :], found)
    tl.store(square_at(solved, task, dims.Q), found)


@triton.jit
def weighed(x, weight, time, stop, dims: tl.constexpr):
    """(Q, BLOCK_K) queries or keys of a chunk, times their decays."""
    return load_keys(x, time, stop, 0, dims).to(tl.float32) * weight


@triton.jit(do_not_specialize=["length"])
def walk(
    q, k, v, a, b, decay, qb, qk, ak, solved, initial, final, o, U, states, packing, length, scale, dims: tl.constexpr
):
    """o (b l h v) and the final state; or U (b l h v) and the states before the chunks (chunks h k v)."""
    column, line, head, batch, begin, end, first = columns_of(packing, length, dims)
    slot, key, values = tl.arange(0, dims.Q), tl.arange(0, dims.BLOCK_K), column + tl.arange(0, dims.BLOCK_V)
    q, k, a, b = heads_of(q, k, a, b, batch, head)
    v = head_of(v, batch, head)
    if decay is not None:
        decay = head_of(decay, batch, head)
    S = load_state(initial, line * dims.K * dims.V, 0, values, dims)
    for i in tl.range(0, (end - begin + dims.Q - 1) // dims.Q, disable_licm=True):  # addresses would fill the registers
        own, start = (first + i) * dims.H + head, begin + i * dims.Q
        stop = tl.minimum(start + dims.Q, end)
        time = start + slot
        vs = load_values(v, time, stop, column, dims).to(tl.float32)
        weight = since(decay, time, start, stop, key, dims, 1)
        read = weighed(a, weight, time, stop, dims)
        u = product(read, S, zeros(dims.Q, dims.BLOCK_V), dims)
        u = product(tl.load(square_at(ak, own, dims.Q)), vs, u, dims)
        u = product(tl.load(square_at(solved, own, dims.Q)), u, u, dims)
        if states is not None:
            store_state(states, own * dims.K * dims.V, 0, values, S, dims)
            store_values(U, batch, time, stop, head, values, u, length, dims)
        if o is not None:
            weight = scale * since(decay, time, start, stop, key, dims, 0)
            asked = weighed(q, weight, time, stop, dims)
            out = product(asked, S, zeros(dims.Q, dims.BLOCK_V), dims)
            out = product(tl.load(square_at(qb, own, dims.Q)), u, out, dims)
            out = product(tl.load(square_at(qk, own, dims.Q)), vs, out, dims)
            store_values(o, batch, time, stop, head, values, out, length, dims)
        S *= over(decay, time, start, stop, key, dims)[:, None]
        weight = until(decay, time, start, stop, key, dims)
        S = product(tl.trans(weighed(b, weight, time, stop, dims)), u, S, dims)
        S = product(tl.trans(weighed(k, weight, time, stop, dims)), vs, S, dims)
    if final is not None:
        store_state(final, line * dims.K * dims.V, 0, values, S, dims)


@triton.jit(do_not_specialize=["length"])
def walk_backward(
    q,
    k,
    a,
    b,
    decay,
    do,
    qb,
    qk,
    ak,
    solved,
    dfinal,
    dinitial,
    dR,
    dv,
    dstates,
    packing,
    length,
    scale,
    dims: tl.constexpr,
):
    """The gradients of the triangular system's right side and of v (b l h v), and of the states after the chunks."""
    column, line, head, batch, begin, end, first = columns_of(packing, length, dims)
    slot, key, values = tl.arange(0, dims.Q), tl.arange(0, dims.BLOCK_K), column + tl.arange(0, dims.BLOCK_V)
    q, k, a, b = heads_of(q, k, a, b, batch, head)
    do = head_of(do, batch, head)
    if decay is not None:
        decay = head_of(decay, batch, head)
    dS = load_state(dfinal, line * dims.K * dims.V, 0, values, dims)
    count = (end - begin + dims.Q - 1) // dims.Q
    for i in tl.range(0, count, disable_licm=True):
        chunk = count - 1 - i
        own, start = (first + chunk) * dims.H + head, begin + chunk * dims.Q
        stop = tl.minimum(start + dims.Q, end)
        time = start + slot
        store_state(dstates, own * dims.K * dims.V, 0, values, dS, dims)
        dout = load_values(do, time, stop, column, dims).to(tl.float32)
        weight = until(decay, time, start, stop, key, dims)
        r = product(tl.load(turned_at(qb, own, dims.Q)), dout, zeros(dims.Q, dims.BLOCK_V), dims)
        r = product(weighed(b, weight, time, stop, dims), dS, r, dims)
        r = product(tl.load(turned_at(solved, own, dims.Q)), r, r, dims)
        x = product(tl.load(turned_at(qk, own, dims.Q)), dout, zeros(dims.Q, dims.BLOCK_V), dims)
        x = product(weighed(k, weight, time, stop, dims), dS, x, dims)
        x = product(tl.load(turned_at(ak, own, dims.Q)), r, x, dims)
        store_values(dR, batch, time, stop, head, values, r, length, dims)
        store_values(dv, batch, time, stop, head, values, x, length, dims)
        dS *= over(decay, time, start, stop, key, dims)[:, None]
        weight = since(decay, time, start, stop, key, dims, 1)
        dS = product(tl.trans(weighed(a, weight, time, stop, dims)), r, dS, dims)
        weight = scale * since(decay, time, start, stop, key, dims, 0)
        asked = weighed(q, weight, time, stop, dims)
        dS = product(tl.trans(asked), dout, dS, dims)
    store_state(dinitial, line * dims.K * dims.V, 0, values, dS, dims)
