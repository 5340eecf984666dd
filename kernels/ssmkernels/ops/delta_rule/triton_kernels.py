"""The delta rule's Triton kernels that carry the state from chunk to chunk.

A program has some columns of one head's state, with all of its keys, and goes through one sequence. ``REGISTERS`` says
where it has the state; in memory, it is where the state of this chunk has to be at the end. Letters are those of
``tiled.py``; what is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, zeros
from ssmkernels.ops.delta_rule.triton_pairs_kernels import keys_backward, load_beta, prepare, weights_backward
from ssmkernels.ops.delta_rule.triton_state_kernels import (
    columns_of,
    copy_state,
    decayed,
    load_state,
    load_values,
    read,
    store_state,
    store_values,
    whole,
    write,
)
from ssmkernels.ops.delta_rule.triton_step_kernels import step
from ssmkernels.ops.ssd.triton_pieces import product, square_at

__all__ = ["keys_backward", "prepare", "step", "walk", "walk_backward", "weights_backward"]


@triton.jit(do_not_specialize=["length"])
def walk(q, k, v, beta, between, initial, final, o, errors, states, packing, length, scale, dims: tl.constexpr):
    """o (b l h v) and the final state; or the errors (chunks h Q v), and the states before chunks (chunks h k v)."""
    REGISTERS: tl.constexpr = dims.BLOCK_K >= dims.K  # a program has all keys of its columns at once
    column, line, head, batch, begin, end, chunk = columns_of(packing, length, dims)
    slot, values = tl.arange(0, dims.Q), column + tl.arange(0, dims.BLOCK_V)
    at = line * dims.K * dims.V
    if REGISTERS:
        S = load_state(initial, at, 0, values, dims)
    else:
        here = final + at if states is None else states + (chunk * dims.H + head) * dims.K * dims.V
        if states is None or begin < end:
            copy_state(initial, at, here, values, dims)
    q = head_of(q, batch, head // dims.GROUP)
    k = head_of(k, batch, head // dims.GROUP)
    v = head_of(v, batch, head)
    beta = head_of(beta, batch, head)
    for c in tl.range(0, (end - begin + dims.Q - 1) // dims.Q, disable_licm=True):  # addresses would fill the registers
        own = (chunk + c) * dims.H + head
        time = begin + c * dims.Q + slot
        since, until = between.first + own * dims.Q * dims.K, between.last + own * dims.Q * dims.K
        b = load_beta(beta, time, end)
        held = zeros(dims.Q, dims.BLOCK_V)
        if REGISTERS:
            if states is not None:
                store_state(states, own * dims.K * dims.V, 0, values, S, dims)
            keys = decayed(k, since, time, end, 0, dims)
            held = product(keys, S, held, dims)
        else:
            tl.debug_barrier()  # what other threads wrote can be read after it
            held = read(k, since, here, values, held, time, end, dims)
        error = load_values(v, time, end, column, dims).to(tl.float32) - held
        error -= tl.dot(
            tl.load(square_at(between.erased, own, dims.Q)), b[:, None] * error, input_precision=dims.PRECISION
        )
        written = b[:, None] * error
        if errors is not None:
            to = (own * dims.Q + slot)[:, None] * dims.V + values[None, :]
            tl.store(errors + to, error, mask=(values < dims.V)[None, :])
        if o is not None:
            out = zeros(dims.Q, dims.BLOCK_V)
            if REGISTERS:
                queries = decayed(q, since, time, end, 0, dims)
                out = product(queries, S, out, dims)
            else:
                out = read(q, since, here, values, out, time, end, dims)
            out = tl.dot(
                tl.load(square_at(between.pairs, own, dims.Q)), written, scale * out, input_precision=dims.PRECISION
            )
            store_values(o, batch, time, end, head, values, out, length, dims)
        if REGISTERS:
            keys = decayed(k, until, time, end, 0, dims)
            S = tl.dot(tl.trans(keys), written, whole(since, 0, dims) * S, input_precision=dims.PRECISION)
        else:
            tl.debug_barrier()  # all threads have read the state
            to = here if states is None else here + dims.H * dims.K * dims.V
            if states is None or begin + (c + 1) * dims.Q < end:
                write(k, written, None, None, until, since, here, to, values, time, end, dims)
            here = to
    if REGISTERS and final is not None:
        store_state(final, at, 0, values, S, dims)


@triton.jit(do_not_specialize=["length"])
def walk_backward(
    q, k, beta, do, between, dfinal, dinitial, X, dv, dstates, packing, length, scale, dims: tl.constexpr
):
    """X (chunks h Q v), the gradients of v (b l h v), of states after chunks and, just before them, of initial ones."""
    REGISTERS: tl.constexpr = dims.BLOCK_K >= dims.K  # a program has all keys of its columns at once
    column, line, head, batch, begin, end, chunk = columns_of(packing, length, dims)
    slot, values = tl.arange(0, dims.Q), column + tl.arange(0, dims.BLOCK_V)
    at = line * dims.K * dims.V
    count = (end - begin + dims.Q - 1) // dims.Q
    if REGISTERS:
        dS = load_state(dfinal, at, 0, values, dims)
    else:
        tiles: tl.constexpr = (dims.V + dims.BLOCK_V - 1) // dims.BLOCK_V
        chunks = tl.num_programs(0).to(tl.int64) // tiles + head  # after the initial states of all sequences
        state = tl.where(count > 0, chunks + (chunk + count - 1) * dims.H, line)
        copy_state(dfinal, at, dinitial + state * dims.K * dims.V, values, dims)
    q = head_of(q, batch, head // dims.GROUP)
    k = head_of(k, batch, head // dims.GROUP)
    do = head_of(do, batch, head)
    beta = head_of(beta, batch, head)
    for back in tl.range(0, count, disable_licm=True):
        c = count - 1 - back
        own = (chunk + c) * dims.H + head
        time = begin + c * dims.Q + slot
        since, until = between.first + own * dims.Q * dims.K, between.last + own * dims.Q * dims.K
        b = load_beta(beta, time, end)
        dout = load_values(do, time, end, column, dims).to(tl.float32)
        x = tl.dot(tl.trans(tl.load(square_at(between.pairs, own, dims.Q))), dout, input_precision=dims.PRECISION)
        if REGISTERS:
            keys = decayed(k, until, time, end, 0, dims)
            x = product(keys, dS, x, dims)
        else:
            tl.debug_barrier()
            x = read(k, until, dinitial + state * dims.K * dims.V, values, x, time, end, dims)
        x -= tl.dot(
            tl.trans(tl.load(square_at(between.erased, own, dims.Q))), b[:, None] * x, input_precision=dims.PRECISION
        )
        tl.store(X + (own * dims.Q + slot)[:, None] * dims.V + values[None, :], x, mask=(values < dims.V)[None, :])
        store_values(dv, batch, time, end, head, values, b[:, None] * x, length, dims)
        erasing, asking = -b[:, None] * x, scale * dout
        if REGISTERS:
            store_state(dstates, own * dims.K * dims.V, 0, values, dS, dims)
            dS *= whole(since, 0, dims)
            queries = decayed(q, since, time, end, 0, dims)
            dS = product(tl.trans(queries), asking, dS, dims)
            keys = decayed(k, since, time, end, 0, dims)
            dS = product(tl.trans(keys), erasing, dS, dims)
        else:
            before = tl.where(c > 0, state - dims.H, line)
            write(
                q,
                asking,
                k,
                erasing,
                since,
                since,
                dinitial + state * dims.K * dims.V,
                dinitial + before * dims.K * dims.V,
                values,
                time,
                end,
                dims,
            )
            state = before
    if REGISTERS:
        store_state(dinitial, at, 0, values, dS, dims)
