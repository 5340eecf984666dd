"""The state-space dual's Triton kernels; ``docs/kernels.md`` says how they follow each other."""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, sigmoid
from ssmkernels.ops.ssd.triton_backward_kernels import inputs_backward, pairs_backward, steps_backward
from ssmkernels.ops.ssd.triton_maps_kernels import maps_backward
from ssmkernels.ops.ssd.triton_pieces import (
    decays,
    decays_from_start,
    from_states,
    head_tile,
    load_inputs,
    product,
    sizes_of,
    square_at,
    store_rows,
)
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


@triton.jit(do_not_specialize=["length"])
def outputs(x, C, D, z, dy, steps, products, states, y, dout, dz, packing, length, dims: tl.constexpr):
    """y (b l h p) from the products of maps and the states before the chunks.

    With the gradient ``dy`` in place of y: the gradients ``dz`` of the gate and ``dout`` of y before the gate.
    """
    first_p, task, head, chunk, batch, start, stop = head_tile(tl.program_id(0).to(tl.int64), packing, length, dims)
    time = start + tl.arange(0, dims.Q)
    total = from_states(head_of(C, batch, head // dims.GROUP), states, task, time, stop, first_p, dims)
    total *= decays_from_start(steps, task, dims.Q)[:, None]
    weights = tl.load(square_at(products, chunk * (dims.H // dims.GROUP) + head // dims.GROUP, dims.Q))
    weights *= decays(steps, task, dims.Q) * sizes_of(steps, task, dims.Q)[None, :]
    xs = load_inputs(head_of(x, batch, head), time, stop, first_p, dims)
    total = product(weights, xs, total, dims)
    p = first_p + tl.arange(0, dims.BLOCK_P)
    if D is not None:
        total += tl.load(D.at + head * D.head + p * D.step, mask=p < dims.P, other=0.0)[None, :] * xs.to(tl.float32)
    if z is not None:
        gate = load_inputs(head_of(z, batch, head), time, stop, first_p, dims)
        gate = gate.to(tl.float32)
        part = sigmoid(gate)
        if dy is not None:
            dy = head_of(dy, batch, head)
            dys = load_inputs(dy, time, stop, first_p, dims).to(tl.float32)
            slope = part * (1 + gate * (1 - part))
            store_rows(dz, batch, time, stop, head, p, dys * total * slope, length, dims.H, dims.P)
            store_rows(dout, batch, time, stop, head, p, dys * gate * part, length, dims.H, dims.P)
        else:
            total *= gate * part
    if dy is None:
        store_rows(y, batch, time, stop, head, p, total, length, dims.H, dims.P)
