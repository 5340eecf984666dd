"""The causal convolution's Triton kernels.

One program takes ``T`` steps of one sequence for ``BLOCK_D`` channels: it loads each row of inputs once, those of the
``W - 1`` steps before it too, and every sum is over rows in registers. A sequence's first program also sees to its
states. What is absent is None. Offsets are 64-bit; sums have the dtype of states; what is written is contiguous.
"""

# mypy: disable-error-code="assignment"
# (tuples of registers grow in unrolled loops)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.strided import Strided
from ssmkernels.core.triton_pieces import sigmoid, zeros


@triton.jit
def place(tile, tiles, cu_seqlens, owners, length, T: tl.constexpr):
    """A tile's sequence, the batch and time where that starts, its length, and the tile's first step within it."""
    if cu_seqlens is not None:
        sequence = tl.load(owners + tile).to(tl.int64)
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        return sequence, sequence * 0, start, end - start, (tile - start // T - sequence) * T
    sequence = tile // tiles
    return sequence, sequence, sequence * 0, sequence * 0 + length, (tile - sequence * tiles) * T


@triton.jit
def channels_of(x, batch, start, channel):
    """From one step of one sequence on, the same channels of a :class:`Strided` tensor (b l d)."""
    return Strided(x.at + (batch * x.batch + start * x.time + channel * x.head), x.batch, x.time, x.head, x.step)


@triton.jit
def rows(x, initial, here, first, length, COUNT: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """``COUNT`` inputs from step ``first - (W - 1)`` on: the initial state before step 0, and 0 beyond the end."""
    found = ()
    for i in tl.static_range(COUNT):
        t = first + i - (W - 1)
        row = tl.load(x.at + t * x.time, mask=here & (t >= 0) & (t < length), other=0.0).to(WIDE)
        if initial is not None and i < W - 1:
            row += tl.load(initial.at + (t + W - 1) * initial.time, mask=here & (t < 0), other=0.0)
        found = found + (row,)
    return found


@triton.jit
def taps(weight, bias, channel, here, W: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """The weights (d w), one tap after another, and the bias (d), 0 where there is none."""
    found = ()
    for j in tl.static_range(W):
        at = weight.at + channel * weight.batch + tl.cast(j, tl.int64) * weight.time
        found = found + (tl.load(at, mask=here, other=0.0).to(WIDE),)
    offset = tl.zeros([BLOCK_D], WIDE)
    if bias is not None:
        offset += tl.load(bias.at + channel * bias.batch, mask=here, other=0.0).to(WIDE)
    return found, offset


@triton.jit(do_not_specialize=["length", "tiles", "d_blocks"])
def forward(x, weight, bias, initial, cu_seqlens, owners, y, final, length, tiles, d, d_blocks, dims: tl.constexpr):
    WIDE: tl.constexpr = final.dtype.element_ty
    W: tl.constexpr = dims.W
    T: tl.constexpr = dims.T
    pid = tl.program_id(0).to(tl.int64)
    sequence, batch, start, steps, first = place(pid // d_blocks, tiles, cu_seqlens, owners, length, T)
    channel = pid % d_blocks * dims.BLOCK_D + tl.arange(0, dims.BLOCK_D)
    here = channel < d
    y += (batch * length + start) * d + channel
    x = channels_of(x, batch, start, channel)
    if initial is not None:
        initial = channels_of(initial, sequence, 0, channel)
    weights, offset = taps(weight, bias, channel, here, W, dims.BLOCK_D, WIDE)

    inputs = rows(x, initial, here, first, steps, T + W - 1, W, WIDE)
    for i in tl.static_range(T):
        sum = offset
        for j in tl.static_range(W):
            sum += weights[j] * inputs[i + j]
        if dims.SILU:
            sum = sum * sigmoid(sum)
        tl.store(y + (first + i) * d, sum.to(y.dtype.element_ty), mask=here & (first + i < steps))

    if first == 0:
        last = rows(x, initial, here, steps, steps, W - 1, W, WIDE)
        for j in tl.static_range(W - 1):
            tl.store(final + (sequence * (W - 1) + j) * d + channel, last[j], mask=here)


@triton.jit(do_not_specialize=["length", "tiles", "d_blocks"])
def backward(
    x,
    weight,
    bias,
    initial,
    cu_seqlens,
    owners,
    dy,
    dfinal,
    dx,
    dinitial,
    dweights,
    length,
    tiles,
    d,
    d_blocks,
    dims: tl.constexpr,
):
    """Gradients of x and the initial state; of the weights, and last of the bias, each tile's part, (tile W+1 d)."""
    WIDE: tl.constexpr = dweights.dtype.element_ty
    W: tl.constexpr = dims.W
    T: tl.constexpr = dims.T
    pid = tl.program_id(0).to(tl.int64)
    tile = pid // d_blocks
    sequence, batch, start, steps, first = place(tile, tiles, cu_seqlens, owners, length, T)
    channel = pid % d_blocks * dims.BLOCK_D + tl.arange(0, dims.BLOCK_D)
    here = channel < d
    dx += (batch * length + start) * d + channel
    dy = channels_of(dy, batch, start, channel)
    x = channels_of(x, batch, start, channel)
    if initial is not None:
        initial = channels_of(initial, sequence, 0, channel)
    if dfinal is not None:
        dfinal += sequence * (W - 1) * d + channel
    weights, offset = taps(weight, bias, channel, here, W, dims.BLOCK_D, WIDE)

    # Gradients of the sums of this tile and of the W - 1 after it, which its inputs reach too
    inputs = rows(x, initial, here, first, steps, T + 2 * (W - 1), W, WIDE)
    dsums = ()
    for i in tl.static_range(T + W - 1):
        dsum = tl.load(dy.at + (first + i) * dy.time, mask=here & (first + i < steps), other=0.0).to(WIDE)
        if dims.SILU:
            sum = offset
            for j in tl.static_range(W):
                sum += weights[j] * inputs[i + j]
            gate = sigmoid(sum)
            dsum = dsum * gate * (1 + sum * (1 - gate))
        dsums = dsums + (dsum,)

    dweights += tile * (W + 1) * d + channel
    for j in tl.static_range(W + 1):
        dweight = zeros(dims.BLOCK_D, 0, WIDE)
        for i in tl.static_range(T):
            dweight += dsums[i] * inputs[i + j] if j < W else dsums[i]
        tl.store(dweights + j * d, dweight, mask=here)

    for i in tl.static_range(T):
        dinput = zeros(dims.BLOCK_D, 0, WIDE)
        for j in tl.static_range(W):
            dinput += weights[j] * dsums[i + W - 1 - j]
        t = first + i
        if dfinal is not None:
            late = t - (steps - (W - 1))
            dinput += tl.load(dfinal + late * d, mask=here & (late >= 0) & (t < steps), other=0.0)
        tl.store(dx + t * d, dinput.to(dx.dtype.element_ty), mask=here & (t < steps))

    if dinitial is not None:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if first == 0:
            for i in tl.static_range(W - 1):
                dinput = zeros(dims.BLOCK_D, 0, WIDE)
                for j in tl.static_range(i + 1):
                    dinput += weights[j] * dsums[i - j]
                if dfinal is not None:  # a sequence shorter than the state hands it on
                    dinput += tl.load(dfinal + (i - steps) * d, mask=here & (i >= steps), other=0.0)
                tl.store(dinitial + (sequence * (W - 1) + i) * d + channel, dinput, mask=here)


@triton.jit(do_not_specialize=["d_blocks"])
def step(state, x, weight, bias, y, d, d_blocks, dims: tl.constexpr):
    WIDE: tl.constexpr = state.at.dtype.element_ty
    W: tl.constexpr = dims.W
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // d_blocks
    channel = pid % d_blocks * dims.BLOCK_D + tl.arange(0, dims.BLOCK_D)
    here = channel < d
    state = channels_of(state, batch, 0, channel)
    weights, sum = taps(weight, bias, channel, here, W, dims.BLOCK_D, WIDE)
    inputs = ()
    for j in tl.static_range(W - 1):
        inputs = inputs + (tl.load(state.at + tl.cast(j, tl.int64) * state.time, mask=here, other=0.0),)
    inputs = inputs + (tl.load(x.at + batch * x.batch + channel * x.time, mask=here, other=0.0).to(WIDE),)
    for j in tl.static_range(W):
        sum += weights[j] * inputs[j]
    if dims.SILU:
        sum = sum * sigmoid(sum)
    tl.store(y + batch * d + channel, sum.to(y.dtype.element_ty), mask=here)
    for j in tl.static_range(W - 1):
        tl.store(state.at + tl.cast(j, tl.int64) * state.time, inputs[j + 1], mask=here)
