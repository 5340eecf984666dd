"""The selective scan's Triton kernels.

A program holds the states h of ``BLOCK_D`` channels, (BLOCK_D, N), in registers and walks one sequence, ``T`` steps at
a time: the inputs of all ``T`` are loaded before any of them is used. ``N`` is n rounded up to a power of two; the
states beyond n stay 0. Steps beyond a sequence's end have Δ = 0 and leave the state as it is.

``A2`` is A / log 2, so that exp(ΔA) = exp2(Δ A2). What is absent is None. Offsets are 64-bit; sums have the dtype of
A2. A2, D, bias, fixed B and C, states, and all that is written are contiguous. ``zero`` is 0, which the compiler may
not know: it would carry a pointer for every row of every tensor through the loops, in more registers than there are.
"""

# mypy: disable-error-code="assignment"
# (tuples of registers grow in unrolled loops)

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a few roundings. With e = exp(-abs(x)), log(1 + e) = 2 atanh(e / (2 + e)), a short series."""
    e = tl.exp(-tl.abs(x))
    if x.dtype == tl.float64:
        one = 1 + e
        log = tl.where(one == 1, e, tl.log(one) * (e / (one - 1)))
    else:
        s = e / (2 + e)  # at most 1/3
        q = s * s
        series = 1 / 13 + q * (1 / 15)
        series = 1 / 9 + q * (1 / 11 + q * series)
        series = 1 / 5 + q * (1 / 7 + q * series)
        log = 2 * s * (1 + q * (1 / 3 + q * series))
    return tl.maximum(x, 0.0) + log


@triton.jit
def extent(sequence, cu_seqlens, length, CHUNK: tl.constexpr):
    """A sequence's batch, the time where it starts there, its length, and the number of its first chunk."""
    sequence = tl.cast(sequence, tl.int64)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        return sequence * 0, start, end - start, start // CHUNK + sequence
    steps = sequence * 0 + length
    return sequence, sequence * 0, steps, sequence * ((steps + CHUNK - 1) // CHUNK)


@triton.jit
def rows(x, x_time, here, first, steps, T: tl.constexpr, WIDE: tl.constexpr):
    """``T`` rows (BLOCK_D) from step ``first`` on; 0 beyond the end."""
    found = ()
    x += tl.cast(first, tl.int64) * x_time
    for i in tl.static_range(T):
        found = found + (tl.load(x, mask=here & (first + i < steps), other=0.0).to(WIDE),)
        x += x_time
    return found


@triton.jit
def maps(x, x_time, there, first, steps, T: tl.constexpr, FIXED: tl.constexpr, WIDE: tl.constexpr):
    """``T`` rows (1, N) of B or C from step ``first`` on, 0 beyond the end; if fixed, ``T`` times (BLOCK_D, N)."""
    found = ()
    if FIXED:
        same = tl.load(x, mask=there, other=0.0).to(WIDE)
        for _ in tl.static_range(T):
            found = found + (same,)
    else:
        x += tl.cast(first, tl.int64) * x_time
        for i in tl.static_range(T):
            found = found + (tl.load(x, mask=there & (first + i < steps), other=0.0).to(WIDE)[None, :],)
            x += x_time
    return found


@triton.jit
def step_sizes(raw, bias, first, steps, T: tl.constexpr, SOFTPLUS: tl.constexpr):
    """What Δ is computed from, and Δ, both ``T`` times (BLOCK_D)."""
    before, found = (), ()
    for i in tl.static_range(T):
        dt = raw[i] + bias
        before = before + (dt,)
        if SOFTPLUS:
            dt = softplus(dt)
        found = found + (tl.where(first + i < steps, dt, 0.0),)
    return before, found


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
    u_batch,
    u_time,
    u_d,
    delta_batch,
    delta_time,
    delta_d,
    z_batch,
    z_time,
    z_d,
    B_batch,
    B_time,
    B_group,
    B_n,
    C_batch,
    C_time,
    C_group,
    C_n,
    length,
    blocks,
    d_blocks,
    per_group,
    zero,
    d,
    n: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FIXED_B: tl.constexpr,
    FIXED_C: tl.constexpr,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y, the final state, and where they are wanted the states before each chunk, (chunks d n)."""
    WIDE: tl.constexpr = A2.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    sequence, block = pid // d_blocks, pid % d_blocks
    batch, start, steps, chunk = extent(sequence, cu_seqlens, length, CHUNK)
    group, within = block // blocks, block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    here, channel = within < per_group, group * per_group + within
    state = tl.arange(0, N)
    live = here[:, None] & (state < n)[None, :]
    at = channel[:, None] * n + state[None, :]
    u += batch * u_batch + start * u_time + channel * u_d
    delta += batch * delta_batch + start * delta_time + channel * delta_d
    y += (batch * length + start) * d + channel
    if z is not None:
        z += batch * z_batch + start * z_time + channel * z_d
    if FIXED_B:
        B += at
    else:
        B += batch * B_batch + start * B_time + group * B_group + state.to(tl.int64) * B_n
    if FIXED_C:
        C += at
    else:
        C += batch * C_batch + start * C_time + group * C_group + state.to(tl.int64) * C_n
    A2_ = tl.load(A2 + at, mask=live, other=0.0)
    D_ = tl.zeros([BLOCK_D], WIDE)
    if D is not None:
        D_ += tl.load(D + channel, mask=here, other=0.0)
    bias_ = tl.zeros([BLOCK_D], WIDE)
    if bias is not None:
        bias_ += tl.load(bias + channel, mask=here, other=0.0)
    h = tl.zeros([BLOCK_D, N], WIDE)
    if initial is not None:
        h += tl.load(initial + sequence * d * n + at, mask=live, other=0.0)

    for begin in range(0, steps, T):
        first = begin ^ zero
        if starts is not None:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if first % CHUNK == 0:
                tl.store(starts + (chunk + first // CHUNK) * d * n + at, h, mask=live)
        us = rows(u, u_time, here, first, steps, T, WIDE)
        raw = rows(delta, delta_time, here, first, steps, T, WIDE)
        Bs = maps(B, B_time, live if FIXED_B else state < n, first, steps, T, FIXED_B, WIDE)
        Cs = maps(C, C_time, live if FIXED_C else state < n, first, steps, T, FIXED_C, WIDE)
        if z is not None:
            zs = rows(z, z_time, here, first, steps, T, WIDE)
        _, dts = step_sizes(raw, bias_, first, steps, T, SOFTPLUS)
        for i in tl.static_range(T):
            h = tl.exp2(dts[i][:, None] * A2_) * h + (dts[i] * us[i])[:, None] * Bs[i]
            out = tl.sum(h * Cs[i], 1) + D_ * us[i]
            if z is not None:
                out = out * zs[i] * sigmoid(zs[i])
            tl.store(y + (first + i) * d, out.to(y.dtype.element_ty), mask=here & (first + i < steps))
    tl.store(final + sequence * d * n + at, h, mask=live)


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
    u_batch,
    u_time,
    u_d,
    delta_batch,
    delta_time,
    delta_d,
    z_batch,
    z_time,
    z_d,
    B_batch,
    B_time,
    B_group,
    B_n,
    C_batch,
    C_time,
    C_group,
    C_n,
    dy_batch,
    dy_time,
    dy_d,
    dB_part,
    dB_group,
    dB_time,
    dC_part,
    dC_group,
    dC_time,
    length,
    sequences,
    workers,
    parts,
    blocks,
    per_group,
    zero,
    d,
    n: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FIXED_B: tl.constexpr,
    FIXED_C: tl.constexpr,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of everything.

    Program (worker, group, part) takes every ``workers``-th sequence and every ``parts``-th block of the group's
    channels, one after another. dA, dD, dbias and those of fixed B and C are one sum for each worker, (worker d [n]);
    those of B and C over time are one for each part.
    """
    WIDE: tl.constexpr = A2.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    part = pid % parts
    group = pid // parts % (d // per_group)
    worker = pid // parts // (d // per_group)
    state = tl.arange(0, N)
    wide_state = state.to(tl.int64)
    scratch += pid * (CHUNK // T * BLOCK_D * N) + tl.arange(0, BLOCK_D)[:, None] * N + state[None, :]
    for block in range(part, blocks, parts):
        within = block * BLOCK_D + tl.arange(0, BLOCK_D)
        here, channel = within < per_group, group * per_group + within
        live = here[:, None] & (state < n)[None, :]
        at = channel[:, None] * n + state[None, :]
        A2_ = tl.load(A2 + at, mask=live, other=0.0)
        D_ = tl.zeros([BLOCK_D], WIDE)
        if D is not None:
            D_ += tl.load(D + channel, mask=here, other=0.0)
        bias_ = tl.zeros([BLOCK_D], WIDE)
        if bias is not None:
            bias_ += tl.load(bias + channel, mask=here, other=0.0)
        dA_ = tl.zeros([BLOCK_D, N], WIDE)
        dB_ = tl.zeros([BLOCK_D, N], WIDE)
        dC_ = tl.zeros([BLOCK_D, N], WIDE)
        dD_ = tl.zeros([BLOCK_D], WIDE)
        dbias_ = tl.zeros([BLOCK_D], WIDE)

        for sequence in range(worker, sequences, workers):
            batch, start, steps, chunk0 = extent(sequence, cu_seqlens, length, CHUNK)
            row0 = batch * length + start
            u_ = u + batch * u_batch + start * u_time + channel * u_d
            delta_ = delta + batch * delta_batch + start * delta_time + channel * delta_d
            dy_ = dy + batch * dy_batch + start * dy_time + channel * dy_d
            if z is not None:
                z_ = z + batch * z_batch + start * z_time + channel * z_d
            if FIXED_B:
                B_ = B + at
            else:
                B_ = B + batch * B_batch + start * B_time + group * B_group + wide_state * B_n
            if FIXED_C:
                C_ = C + at
            else:
                C_ = C + batch * C_batch + start * C_time + group * C_group + wide_state * C_n
            B_live = live if FIXED_B else state < n
            C_live = live if FIXED_C else state < n

            g = tl.zeros([BLOCK_D, N], WIDE)  # what reaches the state from later steps
            if dfinal is not None:
                g += tl.load(dfinal + sequence * d * n + at, mask=live, other=0.0)
            chunks = (steps + CHUNK - 1) // CHUNK
            for past in range(chunks):
                chunk = chunks - 1 - past
                tiles = (tl.minimum(steps - chunk * CHUNK, CHUNK) + T - 1) // T
                # The chunk once forwards: the state before each tile
                h = tl.load(starts + (chunk0 + chunk) * d * n + at, mask=live, other=0.0)
                tl.store(scratch, h)
                for tile in range(1, tiles):
                    first = (chunk * CHUNK + (tile - 1) * T) ^ zero
                    us = rows(u_, u_time, here, first, steps, T, WIDE)
                    raw = rows(delta_, delta_time, here, first, steps, T, WIDE)
                    Bs = maps(B_, B_time, B_live, first, steps, T, FIXED_B, WIDE)
                    _, dts = step_sizes(raw, bias_, first, steps, T, SOFTPLUS)
                    for i in tl.static_range(T):
                        h = tl.exp2(dts[i][:, None] * A2_) * h + (dts[i] * us[i])[:, None] * Bs[i]
                    tl.store(scratch + tile * (BLOCK_D * N), h)
                tl.debug_barrier()
                # Its tiles from the last to the first: their states once more, then the adjoint recurrence
                for past_tile in range(tiles):
                    tile = tiles - 1 - past_tile
                    first = (chunk * CHUNK + tile * T) ^ zero
                    h = tl.load(scratch + tile * (BLOCK_D * N))
                    us = rows(u_, u_time, here, first, steps, T, WIDE)
                    raw = rows(delta_, delta_time, here, first, steps, T, WIDE)
                    douts = rows(dy_, dy_time, here, first, steps, T, WIDE)
                    Bs = maps(B_, B_time, B_live, first, steps, T, FIXED_B, WIDE)
                    Cs = maps(C_, C_time, C_live, first, steps, T, FIXED_C, WIDE)
                    raw, dts = step_sizes(raw, bias_, first, steps, T, SOFTPLUS)
                    hs, decays = (h,), ()
                    for i in tl.static_range(T):
                        decays = decays + (tl.exp2(dts[i][:, None] * A2_),)
                        h = decays[i] * h + (dts[i] * us[i])[:, None] * Bs[i]
                        hs = hs + (h,)
                    if z is not None:
                        zs = rows(z_, z_time, here, first, steps, T, WIDE)
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
                        if FIXED_C:
                            dC_ += dC_t
                        else:
                            to = dC + part * dC_part + group * dC_group + row * dC_time + state
                            put(to, dC_t, (state < n) & inside, block >= parts)
                        if FIXED_B:
                            dB_ += dB_t
                        else:
                            to = dB + part * dB_part + group * dB_group + row * dB_time + state
                            put(to, dB_t, (state < n) & inside, block >= parts)
                        dinput = tl.sum(g * Bs[i], 1)
                        g = g * decays[i]
                        dlog = g * hs[i]
                        dA_ += dts[i][:, None] * dlog
                        ddt = dinput * us[i] + tl.sum(dlog * A2_, 1) * LN_2
                        if SOFTPLUS:
                            ddt = ddt * sigmoid(raw[i])
                        ddt = tl.where(inside, ddt, 0.0)
                        dbias_ += ddt
                        dD_ += douts[i] * us[i]
                        du_t = dinput * dts[i] + D_ * douts[i]
                        tl.store(du + row * d + channel, du_t.to(du.dtype.element_ty), mask=here & inside)
                        tl.store(ddelta + row * d + channel, ddt.to(ddelta.dtype.element_ty), mask=here & inside)
                tl.debug_barrier()
            if dinitial is not None:
                tl.store(dinitial + sequence * d * n + at, g, mask=live)

        tl.store(dA + worker * d * n + at, dA_, mask=live)
        if FIXED_B:
            tl.store(dB + worker * d * n + at, dB_, mask=live)
        if FIXED_C:
            tl.store(dC + worker * d * n + at, dC_, mask=live)
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
    state_batch,
    state_d,
    state_n,
    u_batch,
    u_d,
    delta_batch,
    delta_d,
    z_batch,
    z_d,
    B_batch,
    B_group,
    B_n,
    C_batch,
    C_group,
    C_n,
    blocks,
    d_blocks,
    per_group,
    d,
    n: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    WIDE: tl.constexpr = A2.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    batch, block = pid // d_blocks, pid % d_blocks
    group, within = block // blocks, block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    here, channel = within < per_group, group * per_group + within
    index = tl.arange(0, N).to(tl.int64)
    there = index < n
    live = here[:, None] & there[None, :]
    state += batch * state_batch + channel[:, None] * state_d + index[None, :] * state_n
    u_ = tl.load(u + batch * u_batch + channel * u_d, mask=here, other=0.0).to(WIDE)
    dt = tl.load(delta + batch * delta_batch + channel * delta_d, mask=here, other=0.0).to(WIDE)
    B_ = tl.load(B + batch * B_batch + group * B_group + index * B_n, mask=there, other=0.0).to(WIDE)
    C_ = tl.load(C + batch * C_batch + group * C_group + index * C_n, mask=there, other=0.0).to(WIDE)
    A2_ = tl.load(A2 + channel[:, None] * n + index[None, :], mask=live, other=0.0)
    h = tl.load(state, mask=live, other=0.0)
    if bias is not None:
        dt += tl.load(bias + channel, mask=here, other=0.0)
    if SOFTPLUS:
        dt = softplus(dt)
    h = tl.exp2(dt[:, None] * A2_) * h + (dt * u_)[:, None] * B_[None, :]
    out = tl.sum(h * C_[None, :], 1)
    if D is not None:
        out += tl.load(D + channel, mask=here, other=0.0) * u_
    if z is not None:
        z_ = tl.load(z + batch * z_batch + channel * z_d, mask=here, other=0.0).to(WIDE)
        out = out * z_ * sigmoid(z_)
    tl.store(state, h, mask=live)
    tl.store(y + batch * d + channel, out.to(y.dtype.element_ty), mask=here)
