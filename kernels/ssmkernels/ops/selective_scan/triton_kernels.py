"""The selective scan's Triton kernels.

A program holds the states h of ``BLOCK_D`` channels, (BLOCK_D, N), in registers and walks one sequence, ``T`` steps at
a time: the inputs of all ``T`` are loaded before any of them is used. ``N`` is n rounded up to a power of two; the
states beyond n stay 0. Steps beyond a sequence's end have Δ = 0 and leave the state as it is.

``A2`` is A / log 2, so that exp(ΔA) = exp2(Δ A2). What is absent is None. Offsets are 64-bit; sums have the dtype of
A2. A2, D, bias, fixed B and C, states, and all that is written are contiguous. ``zero`` is 0, which the compiler may
not know: it would carry a pointer for every row of every tensor through the loops, in more registers than there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid, softplus, zeros
from ssmkernels.ops.selective_scan.triton_backward_kernels import add_parts, backward
from ssmkernels.ops.selective_scan.triton_pieces import along, along_map, extent, maps, rows, step_sizes, weights

__all__ = ["add_parts", "backward", "forward", "step"]


@triton.jit(do_not_specialize=["length", "blocks", "d_blocks", "per_group", "zero"])
def forward(
    u,
    delta,
    A2,
    B,
    C,
    D,
    z,
    bias,
    initial,
    cu_seqlens,
    starts,
    y,
    final,
    u_strides,
    delta_strides,
    z_strides,
    B_strides,
    C_strides,
    length,
    blocks,
    d_blocks,
    per_group,
    zero,
    d,
    dims: tl.constexpr,
):
    """y, the final state, and where they are wanted the states before each chunk, (chunks d n)."""
    WIDE: tl.constexpr = A2.dtype.element_ty
    T: tl.constexpr = dims.T
    pid = tl.program_id(0).to(tl.int64)
    sequence, block = pid // d_blocks, pid % d_blocks
    batch, start, steps, chunk = extent(sequence, cu_seqlens, length, dims.CHUNK)
    group, within = block // blocks, block % blocks * dims.BLOCK_D + tl.arange(0, dims.BLOCK_D)
    here, channel = within < per_group, group * per_group + within
    state = tl.arange(0, dims.N)
    live = here[:, None] & (state < dims.n)[None, :]
    at = channel[:, None] * dims.n + state[None, :]
    u, delta = along(u, u_strides, batch, start, channel), along(delta, delta_strides, batch, start, channel)
    y += (batch * length + start) * d + channel
    if z is not None:
        z = along(z, z_strides, batch, start, channel)
    B = along_map(B, B_strides, batch, start, group, state, at, dims.FIXED_B)
    C = along_map(C, C_strides, batch, start, group, state, at, dims.FIXED_C)
    A2_, D_, bias_ = weights(A2, D, bias, at, channel, live, here, dims.BLOCK_D, WIDE)
    h = zeros(dims.BLOCK_D, dims.N, WIDE)
    if initial is not None:
        h += tl.load(initial + sequence * d * dims.n + at, mask=live, other=0.0)

    for begin in range(0, steps, T):
        first = begin ^ zero
        if starts is not None:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if first % dims.CHUNK == 0:
                tl.store(starts + (chunk + first // dims.CHUNK) * d * dims.n + at, h, mask=live)
        us = rows(u, u_strides[1], here, first, steps, T, WIDE)
        raw = rows(delta, delta_strides[1], here, first, steps, T, WIDE)
        Bs = maps(B, B_strides[1], live if dims.FIXED_B else state < dims.n, first, steps, T, dims.FIXED_B, WIDE)
        Cs = maps(C, C_strides[1], live if dims.FIXED_C else state < dims.n, first, steps, T, dims.FIXED_C, WIDE)
        if z is not None:
            zs = rows(z, z_strides[1], here, first, steps, T, WIDE)
        _, dts = step_sizes(raw, bias_, first, steps, T, dims.SOFTPLUS)
        for i in tl.static_range(T):
            h = tl.exp2(dts[i][:, None] * A2_) * h + (dts[i] * us[i])[:, None] * Bs[i]
            out = tl.sum(h * Cs[i], 1) + D_ * us[i]
            if z is not None:
                out = out * zs[i] * sigmoid(zs[i])
            tl.store(y + (first + i) * d, out.to(y.dtype.element_ty), mask=here & (first + i < steps))
    tl.store(final + sequence * d * dims.n + at, h, mask=live)


@triton.jit(do_not_specialize=["blocks", "d_blocks", "per_group"])
def step(
    state,
    u,
    delta,
    A2,
    B,
    C,
    D,
    z,
    bias,
    y,
    state_strides,
    u_strides,
    delta_strides,
    z_strides,
    B_strides,
    C_strides,
    blocks,
    d_blocks,
    per_group,
    d,
    dims: tl.constexpr,
):
    WIDE: tl.constexpr = A2.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    batch, block = pid // d_blocks, pid % d_blocks
    group, within = block // blocks, block % blocks * dims.BLOCK_D + tl.arange(0, dims.BLOCK_D)
    here, channel = within < per_group, group * per_group + within
    index = tl.arange(0, dims.N).to(tl.int64)
    there = index < dims.n
    live = here[:, None] & there[None, :]
    state += batch * state_strides[0] + channel[:, None] * state_strides[1] + index[None, :] * state_strides[2]
    u_ = tl.load(u + batch * u_strides[0] + channel * u_strides[2], mask=here, other=0.0).to(WIDE)
    dt = tl.load(delta + batch * delta_strides[0] + channel * delta_strides[2], mask=here, other=0.0).to(WIDE)
    B_ = tl.load(B + batch * B_strides[0] + group * B_strides[2] + index * B_strides[3], mask=there, other=0.0).to(WIDE)
    C_ = tl.load(C + batch * C_strides[0] + group * C_strides[2] + index * C_strides[3], mask=there, other=0.0).to(WIDE)
    A2_ = tl.load(A2 + channel[:, None] * dims.n + index[None, :], mask=live, other=0.0)
    h = tl.load(state, mask=live, other=0.0)
    if bias is not None:
        dt += tl.load(bias + channel, mask=here, other=0.0)
    if dims.SOFTPLUS:
        dt = softplus(dt)
    h = tl.exp2(dt[:, None] * A2_) * h + (dt * u_)[:, None] * B_[None, :]
    out = tl.sum(h * C_[None, :], 1)
    if D is not None:
        out += tl.load(D + channel, mask=here, other=0.0) * u_
    if z is not None:
        z_ = tl.load(z + batch * z_strides[0] + channel * z_strides[2], mask=here, other=0.0).to(WIDE)
        out = out * z_ * sigmoid(z_)
    tl.store(state, h, mask=live)
    tl.store(y + batch * d + channel, out.to(y.dtype.element_ty), mask=here)
