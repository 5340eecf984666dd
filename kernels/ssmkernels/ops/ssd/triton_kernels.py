"""The state-space dual's Triton kernels; ``docs/kernels.md`` says how they follow each other."""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid
from ssmkernels.ops.ssd.triton_backward_kernels import inputs_backward, pairs_backward, steps_backward
from ssmkernels.ops.ssd.triton_maps_kernels import maps_backward
from ssmkernels.ops.ssd.triton_pieces import decays, load_state, load_tile, place, product
from ssmkernels.ops.ssd.triton_states_kernels import chunk_states, map_products, step_sizes, walk
from ssmkernels.ops.ssd.triton_step_kernels import step

__all__ = [
    "chunk_states",
    "inputs_backward",
    "map_products",
    "maps_backward",
    "outputs",
    "pairs_backward",
    "step",
    "step_sizes",
    "steps_backward",
    "walk",
]


@triton.jit(do_not_specialize=["length", "per_sequence"])
def outputs(
    x,
    C,
    D,
    z,
    dy,
    delta,
    high,
    low,
    products,
    states,
    y,
    dout,
    dz,
    cu_seqlens,
    owners,
    x_batch,
    x_time,
    x_head,
    x_step,
    C_batch,
    C_time,
    C_group,
    C_step,
    D_head,
    D_step,
    z_batch,
    z_time,
    z_head,
    z_step,
    dy_batch,
    dy_time,
    dy_head,
    dy_step,
    length,
    per_sequence,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y (b l h p) from the products of maps and the states before the chunks.

    With the gradient ``dy`` in place of y: the gradients ``dz`` of the gate and ``dout`` of y before the gate.
    """
    p_tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    task = tl.program_id(0).to(tl.int64)
    first_p, task = task % p_tiles * BLOCK_P, task // p_tiles
    head, chunk = task % H, task // H
    group = head // GROUP
    batch, start, stop = place(chunk, owners, cu_seqlens, length, per_sequence, Q)
    slot = tl.arange(0, Q)
    time, line = start + slot, task * Q
    C += batch * C_batch + group * C_group
    total = tl.zeros((Q, BLOCK_P), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        Cs = load_tile(C, time, C_time, stop, first_n, C_step, N, BLOCK_N)
        S = load_state(states + task * P * N, first_p, first_n, P, N, BLOCK_P, BLOCK_N)
        total = product(Cs, tl.trans(S), total, FACTOR, PRECISION)
    total *= tl.exp2(tl.load(high + line + slot))[:, None]
    weights = tl.load(products + (chunk * (H // GROUP) + group) * Q * Q + slot[:, None] * Q + slot[None, :])
    weights *= decays(high + line, low + line, Q) * tl.load(delta + line + slot)[None, :]
    xs = load_tile(x + batch * x_batch + head * x_head, time, x_time, stop, first_p, x_step, P, BLOCK_P)
    total = product(weights, xs, total, FACTOR, PRECISION)
    p = first_p + tl.arange(0, BLOCK_P)
    if D is not None:
        total += tl.load(D + head * D_head + p * D_step, mask=p < P, other=0.0)[None, :] * xs.to(tl.float32)
    there = (time < stop)[:, None] & (p < P)[None, :]
    to = ((batch * length + time) * H + head)[:, None] * P + p[None, :]
    if z is not None:
        gate = load_tile(z + batch * z_batch + head * z_head, time, z_time, stop, first_p, z_step, P, BLOCK_P)
        gate = gate.to(tl.float32)
        part = sigmoid(gate)
        if dy is not None:
            dy += batch * dy_batch + head * dy_head
            dys = load_tile(dy, time, dy_time, stop, first_p, dy_step, P, BLOCK_P).to(tl.float32)
            slope = part * (1 + gate * (1 - part))
            tl.store(dz + to, (dys * total * slope).to(dz.dtype.element_ty), mask=there)
            tl.store(dout + to, (dys * gate * part).to(dout.dtype.element_ty), mask=there)
        else:
            total *= gate * part
    if dy is None:
        tl.store(y + to, total.to(y.dtype.element_ty), mask=there)
