"""The scalar memory's Triton kernels.

A program holds one head of up to ``BLOCK_B`` sequences for its whole length, and is the only one that touches them. At
each token it goes through tiles of ``BLOCK_P`` channels, for which it needs the last outputs of all channels: states
pass from token to token through memory that its own threads have written, and a barrier stands between the two.

``cells`` holds c, n, h and m, float32, at ``depth`` tokens of each sequence by turns: at all of them where they are
kept. Offsets are 64-bit.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import sigmoid, softplus, tanh


@triton.jit
def rows_of(block, cu_seqlens, sequences, length, BLOCK_B: tl.constexpr):
    """A block's sequences, whether they are there, their batches, starts and lengths."""
    sequence = block * BLOCK_B + tl.arange(0, BLOCK_B)
    here = sequence < sequences
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence, mask=here, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1, mask=here, other=0).to(tl.int64)
        return sequence, here, sequence * 0, start, end - start
    return sequence, here, sequence, sequence * 0, tl.where(here, length, 0).to(tl.int64)


@triton.jit
def cell(gate_i, gate_f, gate_z, gate_o, c, n, m):
    """kept, m, the decay, the weight, tanh(z), σ(o), c and n after one token."""
    kept = tl.where(n == 0, -float("inf"), m - softplus(-gate_f))
    now = tl.maximum(kept, gate_i)
    decay, weight = tl.exp(kept - now), tl.exp(gate_i - now)
    z = tanh(gate_z)
    return kept, now, decay, weight, z, sigmoid(gate_o), decay * c + weight * z, decay * n + weight


@triton.jit
def state_before(cells, initial, from_cells, line, p, t, there, P: tl.constexpr):
    """One of the states before token t, (rows, tile): from the token before, or the initial one, or 0."""
    found = tl.load(cells + from_cells[:, None] + p[None, :], mask=there & (t > 0), other=0.0)
    if initial is not None:
        found += tl.load(initial + line[:, None] * P + p[None, :], mask=there & (t == 0), other=0.0)
    return found


@triton.jit(do_not_specialize=["sequences", "length", "depth"])
def forward(
    x,
    R,
    bias,
    c,
    n,
    h,
    m,
    y,
    gates,
    cells,
    final_c,
    final_n,
    final_h,
    final_m,
    cu_seqlens,
    x_gate,
    sequences,
    length,
    depth,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ONE: tl.constexpr,
):
    """y (b l h p), the final state (s h p), and where they are kept gates before activation, (b l h 4 p).

    With ``ONE`` there is one token alone, and each tile of channels has a program of its own.
    """
    pid = tl.program_id(0).to(tl.int64)
    begin, end = 0, P
    if ONE:
        tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
        begin = pid % tiles * BLOCK_P
        end = begin + BLOCK_P
        pid = pid // tiles
    head = pid % H
    sequence, here, batch, start, steps = rows_of(pid // H, cu_seqlens, sequences, length, BLOCK_B)
    line = sequence * H + head
    token = (batch * length + start) * H + head  # of token 0 among (b l h)
    cell_of = token if gates is not None else (sequence * depth) * H + head
    x_gate = tl.cast(x_gate, tl.int64)  # three times as much may need it
    R += head * P * 4 * P
    channel = tl.arange(0, BLOCK_P).to(tl.int64)
    for t in range(tl.max(steps, axis=0)):
        running = here & (t < steps)
        before, now = (cell_of + (t + depth - 1) % depth * H) * 4 * P, (cell_of + t % depth * H) * 4 * P
        for first in range(begin, end, BLOCK_P):
            p = first + channel
            there = running[:, None] & (p < P)[None, :]
            at = x.at + head * x.head + (batch * x.batch + (start + t) * x.time)[:, None] + p[None, :] * x.step
            gate_i = tl.load(at, mask=there, other=0.0).to(tl.float32)
            gate_f = tl.load(at + x_gate, mask=there, other=0.0).to(tl.float32)
            gate_z = tl.load(at + 2 * x_gate, mask=there, other=0.0).to(tl.float32)
            gate_o = tl.load(at + 3 * x_gate, mask=there, other=0.0).to(tl.float32)
            if bias is not None:
                biases = bias + head * 4 * P + p
                gate_i += tl.load(biases, mask=p < P, other=0.0)[None, :]
                gate_f += tl.load(biases + P, mask=p < P, other=0.0)[None, :]
                gate_z += tl.load(biases + 2 * P, mask=p < P, other=0.0)[None, :]
                gate_o += tl.load(biases + 3 * P, mask=p < P, other=0.0)[None, :]
            for first_k in range(0, P, BLOCK_P):
                k = first_k + channel
                last = state_before(cells, h, before + 2 * P, line, k, t, running[:, None] & (k < P)[None, :], P)
                weights = R + k[:, None] * 4 * P + p[None, :]
                inside = (k < P)[:, None] & (p < P)[None, :]
                gate_i = tl.dot(last, tl.load(weights, mask=inside, other=0.0), gate_i, input_precision="ieee")
                gate_f = tl.dot(last, tl.load(weights + P, mask=inside, other=0.0), gate_f, input_precision="ieee")
                gate_z = tl.dot(last, tl.load(weights + 2 * P, mask=inside, other=0.0), gate_z, input_precision="ieee")
                gate_o = tl.dot(last, tl.load(weights + 3 * P, mask=inside, other=0.0), gate_o, input_precision="ieee")
            c_before = state_before(cells, c, before, line, p, t, there, P)
            n_before = state_before(cells, n, before + P, line, p, t, there, P)
            m_before = state_before(cells, m, before + 3 * P, line, p, t, there, P)
            _, m_now, _, _, _, o, c_now, n_now = cell(gate_i, gate_f, gate_z, gate_o, c_before, n_before, m_before)
            out = o * (c_now / n_now)
            to = cells + now[:, None] + p[None, :]
            tl.store(to, c_now, mask=there)
            tl.store(to + P, n_now, mask=there)
            tl.store(to + 2 * P, out, mask=there)
            tl.store(to + 3 * P, m_now, mask=there)
            place = token + t * H
            tl.store(y + place[:, None] * P + p[None, :], out.to(y.dtype.element_ty), mask=there)
            if gates is not None:
                kept = gates + place[:, None] * 4 * P + p[None, :]
                tl.store(kept, gate_i, mask=there)
                tl.store(kept + P, gate_f, mask=there)
                tl.store(kept + 2 * P, gate_z, mask=there)
                tl.store(kept + 3 * P, gate_o, mask=there)
            ends = there & (t == steps - 1)[:, None]
            final = line[:, None] * P + p[None, :]
            tl.store(final_c + final, c_now, mask=ends)
            tl.store(final_n + final, n_now, mask=ends)
            tl.store(final_h + final, out, mask=ends)
            tl.store(final_m + final, m_now, mask=ends)
        tl.debug_barrier()


@triton.jit
def through_weights(total, dgates, at, rows, R, p, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """total (rows, tile) and what a token's gates send back through R to channels ``p`` of the outputs before it."""
    channel = tl.arange(0, BLOCK_P).to(tl.int64)
    for first in range(0, P, BLOCK_P):
        k = first + channel
        there, inside = rows[:, None] & (k < P)[None, :], (k < P)[:, None] & (p < P)[None, :]
        from_gates = dgates + at[:, None] + k[None, :]
        weights = R + p[None, :] * 4 * P + k[:, None]
        for gate in range(4):  # unrolled it would spill registers
            gradients = tl.load(from_gates + gate * P, mask=there, other=0.0)
            weight = tl.load(weights + gate * P, mask=inside, other=0.0)
            total = tl.dot(gradients, weight, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["sequences", "length"])
def backward(
    R,
    c,
    n,
    m,
    gates,
    cells,
    dy,
    dgates,
    dc,
    dn,
    dh,
    dm,
    cu_seqlens,
    sequences,
    length,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gradients of the gates before activation, float32 (b l h 4 p), and of the state before the first token.

    ``dc``, ``dn``, ``dh`` and ``dm`` (s h p) come in as the gradients of the final state. The larger of m's arguments
    gets what m does to decay and weight as well, written so that nothing that cancels is added: ``cpu_backward.cpp``.
    """
    pid = tl.program_id(0).to(tl.int64)
    head = pid % H
    sequence, here, batch, start, steps = rows_of(pid // H, cu_seqlens, sequences, length, BLOCK_B)
    line = sequence * H + head
    token = (batch * length + start) * H + head
    R += head * P * 4 * P
    channel = tl.arange(0, BLOCK_P).to(tl.int64)
    longest = tl.max(steps, axis=0)
    for i in range(longest):
        t = longest - 1 - i
        running, inner = here & (t < steps), here & (t < steps - 1)
        place = token + t * H
        before = (place - H) * 4 * P
        for first in range(0, P, BLOCK_P):
            p = first + channel
            there = running[:, None] & (p < P)[None, :]
            own = line[:, None] * P + p[None, :]
            gradient = tl.load(dh + own, mask=there & (t == steps - 1)[:, None], other=0.0)
            at = dy + place[:, None] * P + p[None, :]
            gradient += tl.load(at, mask=there, other=0.0).to(tl.float32)
            gradient = through_weights(gradient, dgates, (place + H) * 4 * P, inner, R, p, P, BLOCK_P)
            kept_gates = gates + place[:, None] * 4 * P + p[None, :]
            gate_i = tl.load(kept_gates, mask=there, other=0.0)
            gate_f = tl.load(kept_gates + P, mask=there, other=0.0)
            gate_z = tl.load(kept_gates + 2 * P, mask=there, other=0.0)
            gate_o = tl.load(kept_gates + 3 * P, mask=there, other=0.0)
            c_before = state_before(cells, c, before, line, p, t, there, P)
            n_before = state_before(cells, n, before + P, line, p, t, there, P)
            m_before = state_before(cells, m, before + 3 * P, line, p, t, there, P)
            kept, _, decay, weight, z, o, c_now, n_now = cell(
                gate_i, gate_f, gate_z, gate_o, c_before, n_before, m_before
            )
            out = o * (c_now / n_now)
            gc = tl.load(dc + own, mask=there, other=0.0) + gradient * o / n_now
            gn = tl.load(dn + own, mask=there, other=0.0) - gradient * out / n_now
            gm = tl.load(dm + own, mask=there, other=0.0)
            of_decay, of_weight = decay * (gc * c_before + gn * n_before), weight * (gc * z + gn)
            both = 0.5 * (gm - of_decay - of_weight)
            dkept = tl.where(kept < gate_i, of_decay, of_decay + both)
            dkept = tl.where(kept > gate_i, gm - of_weight, dkept)
            di = tl.where(kept < gate_i, gm - of_decay, of_weight + both)
            to = dgates + place[:, None] * 4 * P + p[None, :]
            tl.store(to, tl.where(kept > gate_i, of_weight, di), mask=there)
            tl.store(to + P, dkept * sigmoid(-gate_f), mask=there)
            tl.store(to + 2 * P, gc * weight * (1 - z * z), mask=there)
            tl.store(to + 3 * P, gradient * out * (1 - o), mask=there)
            tl.store(dc + own, gc * decay, mask=there)
            tl.store(dn + own, gn * decay, mask=there)
            tl.store(dm + own, dkept, mask=there)
        tl.debug_barrier()
    begun = here & (steps > 0)
    for first in range(0, P, BLOCK_P):
        p = first + channel
        total = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        total = through_weights(total, dgates, token * 4 * P, begun, R, p, P, BLOCK_P)
        tl.store(dh + line[:, None] * P + p[None, :], total, mask=begun[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def weights_backward(
    before,
    dgates,
    dR,
    tokens,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradient of R: over all tokens, products of the outputs ``before`` each, (tokens h p), and of its gates'."""
    tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    task = tl.program_id(0).to(tl.int64)
    gate, task = task % 4, task // 4
    column, task = task % tiles * BLOCK_P, task // tiles
    row, head = task % tiles * BLOCK_P, task // tiles
    channel = tl.arange(0, BLOCK_P).to(tl.int64)
    i, p = row + channel, column + channel
    total = tl.zeros((BLOCK_P, BLOCK_P), tl.float32)
    for first in range(0, tokens, BLOCK_T):
        token = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_T)
        line, there = token * H + head, token < tokens
        outputs = before + line[None, :] * P + i[:, None]
        gradients = dgates + line[:, None] * 4 * P + gate * P + p[None, :]
        total = tl.dot(
            tl.load(outputs, mask=there[None, :] & (i < P)[:, None], other=0.0),
            tl.load(gradients, mask=there[:, None] & (p < P)[None, :], other=0.0),
            total,
            input_precision="ieee",
        )
    to = dR + ((head * P + i)[:, None] * 4 + gate) * P + p[None, :]
    tl.store(to, total, mask=(i < P)[:, None] & (p < P)[None, :])
