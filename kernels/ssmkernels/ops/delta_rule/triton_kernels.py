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

from ssmkernels.ops.delta_rule.triton_pairs_kernels import keys_backward, prepare, weights_backward
from ssmkernels.ops.delta_rule.triton_state_kernels import (
    copy_state,
    decayed,
    load_state,
    read,
    store_state,
    whole,
    write,
)
from ssmkernels.ops.delta_rule.triton_step_kernels import step
from ssmkernels.ops.ssd.triton_pieces import load_tile, span

__all__ = ["keys_backward", "prepare", "step", "walk", "walk_backward", "weights_backward"]


@triton.jit
def load_beta(beta, time, stop, beta_time):
    """(slots), 0 beyond the chunk."""
    return tl.load(beta + time * beta_time, mask=time < stop, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def walk(
    q,
    k,
    v,
    beta,
    first,
    last,
    pairs,
    erased,
    initial,
    final,
    o,
    errors,
    states,
    cu_seqlens,
    q_batch,
    q_time,
    q_head,
    q_step,
    k_batch,
    k_time,
    k_head,
    k_step,
    v_batch,
    v_time,
    v_head,
    v_step,
    beta_batch,
    beta_time,
    beta_head,
    length,
    per_sequence,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    REGISTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o (b l h v) and the final state; or the errors (chunks h Q v), and the states before chunks (chunks h k v)."""
    tiles: tl.constexpr = (V + BLOCK - 1) // BLOCK
    task = tl.program_id(0).to(tl.int64)
    column, head, sequence = task % tiles * BLOCK, task // tiles % H, task // tiles // H
    batch, begin, end, chunk = span(cu_seqlens, sequence, length, per_sequence, Q)
    slot, values = tl.arange(0, Q), column + tl.arange(0, BLOCK)
    at = (sequence * H + head) * K * V
    if REGISTERS:
        S = load_state(initial, at, 0, values, V, K, B, BLOCK)
    else:
        here = final + at if states is None else states + (chunk * H + head) * K * V
        if states is None or begin < end:
            copy_state(initial, at, here, values, V, K, B, BLOCK)
    q += batch * q_batch + head // GROUP * q_head
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head * v_head
    beta += batch * beta_batch + head * beta_head
    for c in tl.range(0, (end - begin + Q - 1) // Q, disable_licm=True):  # addresses would fill the registers
        own = (chunk + c) * H + head
        time = begin + c * Q + slot
        since, until = first + own * Q * K, last + own * Q * K
        b = load_beta(beta, time, end, beta_time)
        held = tl.zeros((Q, BLOCK), tl.float32)
        if REGISTERS:
            if states is not None:
                store_state(states, own * K * V, 0, values, S, V, K, B)
            keys = decayed(k, since, time, end, 0, k_time, k_step, K, Q, B)
            held = tl.dot(keys, S, held, input_precision=PRECISION)
        else:
            tl.debug_barrier()  # what other threads wrote can be read after it
            held = read(k, since, here, values, held, time, end, k_time, k_step, K, V, Q, B, BLOCK, PRECISION)
        error = load_tile(v, time, v_time, end, column, v_step, V, BLOCK).to(tl.float32) - held
        square = own * Q * Q + slot[:, None] * Q + slot[None, :]
        error -= tl.dot(tl.load(erased + square), b[:, None] * error, input_precision=PRECISION)
        written = b[:, None] * error
        if errors is not None:
            to = (own * Q + slot)[:, None] * V + values[None, :]
            tl.store(errors + to, error, mask=(values < V)[None, :])
        if o is not None:
            out = tl.zeros((Q, BLOCK), tl.float32)
            if REGISTERS:
                queries = decayed(q, since, time, end, 0, q_time, q_step, K, Q, B)
                out = tl.dot(queries, S, out, input_precision=PRECISION)
            else:
                out = read(q, since, here, values, out, time, end, q_time, q_step, K, V, Q, B, BLOCK, PRECISION)
            out = tl.dot(tl.load(pairs + square), written, scale * out, input_precision=PRECISION)
            to = ((batch * length + time) * H + head)[:, None] * V + values[None, :]
            tl.store(o + to, out.to(o.dtype.element_ty), mask=(time < end)[:, None] & (values < V)[None, :])
        if REGISTERS:
            keys = decayed(k, until, time, end, 0, k_time, k_step, K, Q, B)
            S = tl.dot(tl.trans(keys), written, whole(since, 0, K, Q, B) * S, input_precision=PRECISION)
        else:
            tl.debug_barrier()  # all threads have read the state
            to = here if states is None else here + H * K * V
            if states is None or begin + (c + 1) * Q < end:
                write(
                    k,
                    written,
                    None,
                    None,
                    until,
                    since,
                    here,
                    to,
                    values,
                    time,
                    end,
                    k_time,
                    k_step,
                    0,
                    0,
                    K,
                    V,
                    Q,
                    B,
                    BLOCK,
                    PRECISION,
                )
            here = to
    if REGISTERS and final is not None:
        store_state(final, at, 0, values, S, V, K, B)


@triton.jit(do_not_specialize=["length", "per_sequence"])
def walk_backward(
    q,
    k,
    beta,
    do,
    first,
    last,
    pairs,
    erased,
    dfinal,
    dinitial,
    X,
    dv,
    dstates,
    cu_seqlens,
    q_batch,
    q_time,
    q_head,
    q_step,
    k_batch,
    k_time,
    k_head,
    k_step,
    beta_batch,
    beta_time,
    beta_head,
    do_batch,
    do_time,
    do_head,
    do_step,
    length,
    per_sequence,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    REGISTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X (chunks h Q v), the gradients of v (b l h v), of states after chunks and, just before them, of initial ones."""
    tiles: tl.constexpr = (V + BLOCK - 1) // BLOCK
    task = tl.program_id(0).to(tl.int64)
    column, head, sequence = task % tiles * BLOCK, task // tiles % H, task // tiles // H
    batch, begin, end, chunk = span(cu_seqlens, sequence, length, per_sequence, Q)
    slot, values = tl.arange(0, Q), column + tl.arange(0, BLOCK)
    at = (sequence * H + head) * K * V
    count = (end - begin + Q - 1) // Q
    if REGISTERS:
        dS = load_state(dfinal, at, 0, values, V, K, B, BLOCK)
    else:
        chunks = tl.num_programs(0).to(tl.int64) // tiles + head  # after the initial states of all sequences
        state = tl.where(count > 0, chunks + (chunk + count - 1) * H, sequence * H + head)
        copy_state(dfinal, at, dinitial + state * K * V, values, V, K, B, BLOCK)
    q += batch * q_batch + head // GROUP * q_head
    k += batch * k_batch + head // GROUP * k_head
    do += batch * do_batch + head * do_head
    beta += batch * beta_batch + head * beta_head
    for back in tl.range(0, count, disable_licm=True):
        c = count - 1 - back
        own = (chunk + c) * H + head
        time = begin + c * Q + slot
        since, until = first + own * Q * K, last + own * Q * K
        b = load_beta(beta, time, end, beta_time)
        dout = load_tile(do, time, do_time, end, column, do_step, V, BLOCK).to(tl.float32)
        square = own * Q * Q + slot[:, None] * Q + slot[None, :]
        x = tl.dot(tl.trans(tl.load(pairs + square)), dout, input_precision=PRECISION)
        if REGISTERS:
            keys = decayed(k, until, time, end, 0, k_time, k_step, K, Q, B)
            x = tl.dot(keys, dS, x, input_precision=PRECISION)
        else:
            tl.debug_barrier()
            x = read(
                k, until, dinitial + state * K * V, values, x, time, end, k_time, k_step, K, V, Q, B, BLOCK, PRECISION
            )
        x -= tl.dot(tl.trans(tl.load(erased + square)), b[:, None] * x, input_precision=PRECISION)
        tl.store(X + (own * Q + slot)[:, None] * V + values[None, :], x, mask=(values < V)[None, :])
        to = ((batch * length + time) * H + head)[:, None] * V + values[None, :]
        gradient = (b[:, None] * x).to(dv.dtype.element_ty)
        tl.store(dv + to, gradient, mask=(time < end)[:, None] & (values < V)[None, :])
        erasing, asking = -b[:, None] * x, scale * dout
        if REGISTERS:
            store_state(dstates, own * K * V, 0, values, dS, V, K, B)
            dS *= whole(since, 0, K, Q, B)
            queries = decayed(q, since, time, end, 0, q_time, q_step, K, Q, B)
            dS = tl.dot(tl.trans(queries), asking, dS, input_precision=PRECISION)
            keys = decayed(k, since, time, end, 0, k_time, k_step, K, Q, B)
            dS = tl.dot(tl.trans(keys), erasing, dS, input_precision=PRECISION)
        else:
            before = tl.where(c > 0, state - H, sequence * H + head)
            write(
                q,
                asking,
                k,
                erasing,
                since,
                since,
                dinitial + state * K * V,
                dinitial + before * K * V,
                values,
                time,
                end,
                q_time,
                q_step,
                k_time,
                k_step,
                K,
                V,
                Q,
                B,
                BLOCK,
                PRECISION,
            )
            state = before
    if REGISTERS:
        store_state(dinitial, at, 0, values, dS, V, K, B)
