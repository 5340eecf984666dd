"""The Triton kernels of the real-gated linear recurrent unit's gates.

A program takes ``BLOCK`` channels of one head, and in the backward pass ``TOKENS`` tokens one after another, whose sum
of log_decay's gradient it stores by itself. Offsets are 64-bit; what is written is contiguous; what is absent is None.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype changes where a branch assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, sigmoid


@triton.jit
def expm1(x):
    """exp(x) - 1, by its series where x is small."""
    if x.dtype == tl.float64:
        # (1 + x/n)^n - 1 by halving the argument: e^2x - 1 = (e^x - 1)(e^x - 1 + 2)
        y = x / 32
        small = y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7 * (1 + y / 8)))))))
        for _ in tl.static_range(5):
            small = small * (small + 2)
    else:
        small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(tl.abs(x) < 0.25, small, tl.exp(x) - 1)


@triton.jit
def place(pid, length, H: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """A program's token or block of tokens, its head, and its channels."""
    blocks: tl.constexpr = (P + BLOCK - 1) // BLOCK
    pid = pid.to(tl.int64)
    return pid // blocks // H, pid // blocks % H, pid % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def opened(gates, log_decay, here, P: tl.constexpr, WIDE: tl.constexpr):
    """Both gates, the decay, 1 - a², and log_decay, of the logits at a pointer."""
    recurrence = sigmoid(tl.load(gates, mask=here, other=0.0).to(WIDE))
    inputs = sigmoid(tl.load(gates + P, mask=here, other=0.0).to(WIDE))
    log_a = log_decay * recurrence
    return recurrence, inputs, tl.exp(log_a), -expm1(2 * log_a)


@triton.jit(do_not_specialize=["length"])
def forward(
    x,
    gates,
    log_decay,
    first,
    a,
    b,
    length,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a and b (b l h p)."""
    WIDE: tl.constexpr = a.dtype.element_ty
    row, head, channel = place(tl.program_id(0), length, H, P, BLOCK)
    batch, time, here = row // length, row % length, channel < P
    rate = tl.load(log_decay + head * P + channel, mask=here, other=0.0)
    logits = head_of(gates, batch, head).at + time * gates.time + channel
    _, inputs, decay, rest = opened(logits, rate, here, P, WIDE)
    root = tl.sqrt(rest)
    if first is not None:
        root = tl.where(tl.load(first + row) != 0, 1.0, root)
    at = head_of(x, batch, head).at + time * x.time + channel
    value = root * inputs * tl.load(at, mask=here, other=0.0).to(WIDE)
    to = (row * H + head) * P + channel
    tl.store(a + to, decay, mask=here)
    tl.store(b + to, value.to(b.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["length", "rows"])
def backward(
    x,
    gates,
    log_decay,
    first,
    da,
    db,
    dx,
    dgates,
    dlog_decay,
    length,
    rows,
    H: tl.constexpr,
    P: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx (b l h p), dgates (b l h 2p), and each block of tokens' part of dlog_decay, (parts h p)."""
    WIDE: tl.constexpr = dlog_decay.dtype.element_ty
    part, head, channel = place(tl.program_id(0), length, H, P, BLOCK)
    here = channel < P
    rate = tl.load(log_decay + head * P + channel, mask=here, other=0.0)
    total = tl.zeros([BLOCK], WIDE)
    for token in range(part * TOKENS, tl.minimum(part * TOKENS + TOKENS, rows)):
        row = tl.cast(token, tl.int64)
        batch, time = row // length, row % length
        logits = head_of(gates, batch, head).at + time * gates.time + channel
        recurrence, inputs, decay, rest = opened(logits, rate, here, P, WIDE)
        at = head_of(x, batch, head).at + time * x.time + channel
        value = tl.load(at, mask=here, other=0.0).to(WIDE)
        to = (row * H + head) * P + channel
        incoming = tl.load(db + to, mask=here, other=0.0).to(WIDE)
        slope = tl.load(da + to, mask=here, other=0.0) * decay
        root = tl.sqrt(rest)
        steep = tl.where(rest < 2.5e-7, 1000.0, 0.5 / root)  # the cap, where the derivative is infinite
        through, down = incoming * root, 2 * decay * decay * steep * incoming * inputs * value
        if first is not None:
            begins = tl.load(first + row) != 0
            through, down = tl.where(begins, incoming, through), tl.where(begins, 0.0, down)
        slope -= down
        total += slope * recurrence
        tl.store(dx + to, (through * inputs).to(dx.dtype.element_ty), mask=here)
        to = (row * H + head) * 2 * P + channel
        of_recurrence = slope * rate * recurrence * (1 - recurrence)
        of_input = through * value * inputs * (1 - inputs)
        tl.store(dgates + to, of_recurrence.to(dgates.dtype.element_ty), mask=here)
        tl.store(dgates + to + P, of_input.to(dgates.dtype.element_ty), mask=here)
    tl.store(dlog_decay + (part * H + head) * P + channel, total, mask=here)
