"""The selective scan's backward pass in Triton; written as in ``triton_kernels.py``."""

# mypy: disable-error-code="assignment"
# (tuples of registers grow in unrolled loops)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid, zeros
from ssmkernels.ops.selective_scan.triton_pieces import along, along_map, extent, maps, rows, step_sizes, weights

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["length", "sequences", "workers", "parts", "blocks", "per_group", "zero"])
def backward(
    u,
    delta,
    A2,
    B,
    C,
    D,
    z,
    bias,
    cu_seqlens,
    starts,
    scratch,
    dy,
    dfinal,
    du,
    ddelta,
    dA,
    dB,
    dC,
    dD,
    dz,
    dbias,
    dinitial,
    u_strides,
    delta_strides,
    z_strides,
    B_strides,
    C_strides,
    dy_strides,
    dB_strides,
    dC_strides,
    length,
    sequences,
    workers,
    parts,
    blocks,
    per_group,
    zero,
    d,
    dims: tl.constexpr,
):
    """Gradients of everything.

    Program (worker, group, part) takes every ``workers``-th sequence and every ``parts``-th block of the group's
    channels, one after another. dA, dD, dbias and those of fixed B and C are one sum for each worker, (worker d [n]);
    those of B and C over time are one for each part.
    """
    WIDE: tl.constexpr = A2.dtype.element_ty
    T: tl.constexpr = dims.T
    pid = tl.program_id(0).to(tl.int64)
    part = pid % parts
    group = pid // parts % (d // per_group)
    worker = pid // parts // (d // per_group)
    state = tl.arange(0, dims.N)
    scratch += (
        pid * (dims.CHUNK // T * dims.BLOCK_D * dims.N) + tl.arange(0, dims.BLOCK_D)[:, None] * dims.N + state[None, :]
    )
    for block in range(part, blocks, parts):
        within = block * dims.BLOCK_D + tl.arange(0, dims.BLOCK_D)
        here, channel = within < per_group, group * per_group + within
        live = here[:, None] & (state < dims.n)[None, :]
        at = channel[:, None] * dims.n + state[None, :]
        A2_, D_, bias_ = weights(A2, D, bias, at, channel, live, here, dims.BLOCK_D, WIDE)
        dA_ = zeros(dims.BLOCK_D, dims.N, WIDE)
        dB_ = zeros(dims.BLOCK_D, dims.N, WIDE)
        dC_ = zeros(dims.BLOCK_D, dims.N, WIDE)
        dD_ = zeros(dims.BLOCK_D, 0, WIDE)
        dbias_ = zeros(dims.BLOCK_D, 0, WIDE)

        for sequence in range(worker, sequences, workers):
            batch, start, steps, chunk0 = extent(sequence, cu_seqlens, length, dims.CHUNK)
            row0 = batch * length + start
            u_, delta_ = along(u, u_strides, batch, start, channel), along(delta, delta_strides, batch, start, channel)
            dy_ = along(dy, dy_strides, batch, start, channel)
            if z is not None:
                z_ = along(z, z_strides, batch, start, channel)
            B_ = along_map(B, B_strides, batch, start, group, state, at, dims.FIXED_B)
            C_ = along_map(C, C_strides, batch, start, group, state, at, dims.FIXED_C)
            B_live = live if dims.FIXED_B else state < dims.n
            C_live = live if dims.FIXED_C else state < dims.n

            g = zeros(dims.BLOCK_D, dims.N, WIDE)  # what reaches the state from later steps
            if dfinal is not None:
                g += tl.load(dfinal + sequence * d * dims.n + at, mask=live, other=0.0)
            chunks = (steps + dims.CHUNK - 1) // dims.CHUNK
            for past in range(chunks):
                chunk = chunks - 1 - past
                tiles = (tl.minimum(steps - chunk * dims.CHUNK, dims.CHUNK) + T - 1) // T
                # The chunk once forwards: the state before each tile
                h = tl.load(starts + (chunk0 + chunk) * d * dims.n + at, mask=live, other=0.0)
                tl.store(scratch, h)
                for tile in range(1, tiles):
                    first = (chunk * dims.CHUNK + (tile - 1) * T) ^ zero
                    us = rows(u_, u_strides[1], here, first, steps, T, WIDE)
                    raw = rows(delta_, delta_strides[1], here, first, steps, T, WIDE)
                    Bs = maps(B_, B_strides[1], B_live, first, steps, T, dims.FIXED_B, WIDE)
                    _, dts = step_sizes(raw, bias_, first, steps, T, dims.SOFTPLUS)
                    for i in tl.static_range(T):
                        h = tl.exp2(dts[i][:, None] * A2_) * h + (dts[i] * us[i])[:, None] * Bs[i]
                    tl.store(scratch + tile * (dims.BLOCK_D * dims.N), h)
                tl.debug_barrier()
                # Its tiles from the last to the first: their states once more, then the adjoint recurrence
                for past_tile in range(tiles):
                    tile = tiles - 1 - past_tile
                    first = (chunk * dims.CHUNK + tile * T) ^ zero
                    h = tl.load(scratch + tile * (dims.BLOCK_D * dims.N))
                    us = rows(u_, u_strides[1], here, first, steps, T, WIDE)
                    raw = rows(delta_, delta_strides[1], here, first, steps, T, WIDE)
                    douts = rows(dy_, dy_strides[1], here, first, steps, T, WIDE)
                    Bs = maps(B_, B_strides[1], B_live, first, steps, T, dims.FIXED_B, WIDE)
                    Cs = maps(C_, C_strides[1], C_live, first, steps, T, dims.FIXED_C, WIDE)
                    raw, dts = step_sizes(raw, bias_, first, steps, T, dims.SOFTPLUS)
                    hs, decays = (h,), ()
                    for i in tl.static_range(T):
                        decays = decays + (tl.exp2(dts[i][:, None] * A2_),)
                        h = decays[i] * h + (dts[i] * us[i])[:, None] * Bs[i]
                        hs = hs + (h,)
                    if z is not None:
                        zs = rows(z_, z_strides[1], here, first, steps, T, WIDE)
                        ungated = ()
                        for i in tl.static_range(T):
                            gate = sigmoid(zs[i])
                            out = tl.sum(hs[i + 1] * Cs[i], 1) + D_ * us[i]
                            dgate = douts[i] * out * gate * (1 + zs[i] * (1 - gate))
                            at_z = dz + (row0 + first + i) * d + channel
                            tl.store(at_z, dgate.to(dz.dtype.element_ty), mask=here & (first + i < steps))
                            ungated = ungated + (douts[i] * zs[i] * gate,)
                        douts = ungated
                    for i in tl.static_range(T - 1, -1, -1):
                        inside = first + i < steps
                        row = row0 + first + i
                        g += douts[i][:, None] * Cs[i]
                        dC_t = douts[i][:, None] * hs[i + 1]
                        dB_t = (dts[i] * us[i])[:, None] * g
                        if dims.FIXED_C:
                            dC_ += dC_t
                        else:
                            to = dC + part * dC_strides[0] + group * dC_strides[1] + row * dC_strides[2] + state
                            put(to, dC_t, (state < dims.n) & inside, block >= parts)
                        if dims.FIXED_B:
                            dB_ += dB_t
                        else:
                            to = dB + part * dB_strides[0] + group * dB_strides[1] + row * dB_strides[2] + state
                            put(to, dB_t, (state < dims.n) & inside, block >= parts)
                        dinput = tl.sum(g * Bs[i], 1)
                        g = g * decays[i]
                        dlog = g * hs[i]
                        dA_ += dts[i][:, None] * dlog
                        ddt = dinput * us[i] + tl.sum(dlog * A2_, 1) * LN_2
                        if dims.SOFTPLUS:
                            ddt = ddt * sigmoid(raw[i])
                        ddt = tl.where(inside, ddt, 0.0)
                        dbias_ += ddt
                        dD_ += douts[i] * us[i]
                        du_t = dinput * dts[i] + D_ * douts[i]
                        tl.store(du + row * d + channel, du_t.to(du.dtype.element_ty), mask=here & inside)
                        tl.store(ddelta + row * d + channel, ddt.to(ddelta.dtype.element_ty), mask=here & inside)
                tl.debug_barrier()
            if dinitial is not None:
                tl.store(dinitial + sequence * d * dims.n + at, g, mask=live)

        tl.store(dA + worker * d * dims.n + at, dA_, mask=live)
        if dims.FIXED_B:
            tl.store(dB + worker * d * dims.n + at, dB_, mask=live)
        if dims.FIXED_C:
            tl.store(dC + worker * d * dims.n + at, dC_, mask=live)
        if D is not None:
            tl.store(dD + worker * d + channel, dD_, mask=here)
        if bias is not None:
            tl.store(dbias + worker * d + channel, dbias_, mask=here)


@triton.jit
def put(to, value, mask, add):
    """The sum of (BLOCK_D, N) over channels, added to what an earlier block of the same program has put there."""
    total = tl.sum(value, 0)
    tl.store(to, total + tl.load(to, mask=mask & add, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["size"])
def add_parts(parts, total, size, PARTS, BLOCK: tl.constexpr):
    """The sum over the first axis of (PARTS, size), in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], parts.dtype.element_ty)
    for part in range(PARTS):
        sum += tl.load(parts + tl.cast(part, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(total + at, sum.to(total.dtype.element_ty), mask=at < size)
