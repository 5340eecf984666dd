"""Linear attention's Triton kernels in chunks, where each key channel has a decay of its own: the backward pass.

As in :mod:`triton_channels_kernels`, whose kernels give the states, P, and in reverse the gradients of the states and
of v. Gradients of q, k and the decays are float32 ``(b l h k)``. What reaches them through states comes first, and what
pairs of tokens give is added to it.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import head_of, zeros
from ssmkernels.ops.delta_rule.triton_pairs_kernels import decay_of, load_row
from ssmkernels.ops.delta_rule.triton_state_kernels import load_keys, load_state, load_values
from ssmkernels.ops.linear_attention.triton_channels_kernels import over, since, until
from ssmkernels.ops.ssd.triton_pieces import place, product, square_at


@triton.jit
def tokens_of(to, time, dims: tl.constexpr):
    """(tokens, 1) pointers to a head's rows in (l h K), from one to its first."""
    return to + (time * dims.H * dims.K)[:, None]


@triton.jit
def add_decays(to, time, first, last, column, base, taken, left, dims: tl.constexpr, SHIFT: tl.constexpr):
    """Adds to the gradients of the decays of the tokens from ``first`` to before ``last``.

    ``taken`` is what a token and later ones take from before the first, for its decay; with ``SHIFT``, where queries
    come before their decay, for that of the token before. ``left`` is what a token and earlier ones leave to later
    ones, for the decay of the next token. No sum has a term that does not count, so nothing has to cancel.
    """
    there = (column < dims.K)[None, :]
    inside = there & ((time >= first) & (time < last))[:, None]
    at = tokens_of(to, time, dims) + column[None, :]
    if not SHIFT:
        base += taken
    tl.store(at, tl.load(at, mask=inside, other=0.0) + base, mask=inside)
    tl.debug_barrier()  # what other threads wrote can be read after it
    inside = there & ((time >= first) & (time + 1 < last))[:, None]
    at = tokens_of(to, time + 1, dims) + column[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + left, mask=inside)
    if SHIFT:
        tl.debug_barrier()
        inside = there & ((time > first) & (time < last))[:, None]
        at = tokens_of(to, time - 1, dims) + column[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + taken, mask=inside)


@triton.jit(do_not_specialize=["length"])
def weights_backward(v, do, dP, packing, length, scale, dims: tl.constexpr):
    """The gradient of P, with the scale of the queries, (chunks h Q Q)."""
    task = tl.program_id(0).to(tl.int64)
    head = task % dims.H
    batch, start, stop = place(packing, length, task // dims.H, dims.Q)
    slot = tl.arange(0, dims.Q)
    v = head_of(v, batch, head)
    do = head_of(do, batch, head)
    total = zeros(dims.Q, dims.Q)
    for column in tl.range(0, dims.V, dims.BLOCK_V, disable_licm=True):
        values = load_values(v, start + slot, stop, column, dims)
        dout = load_values(do, start + slot, stop, column, dims)
        total = product(dout, tl.trans(values), total, dims)
    total = tl.where(slot[:, None] >= slot[None, :], scale * total, 0.0)
    tl.store(square_at(dP, task, dims.Q), total)


@triton.jit(do_not_specialize=["length"])
def states_backward(
    q,
    k,
    v,
    do,
    decay,
    states,
    dstates,
    dq,
    dk,
    ddecay,
    packing,
    length,
    scale,
    dims: tl.constexpr,
    SHIFT: tl.constexpr,
    AROUND: tl.constexpr,
):
    """What reaches q and k through the states before and after the chunks; adds what reaches the decays.

    With ``AROUND`` the latter includes what goes from the state before a chunk to the one after it.
    """
    tiles: tl.constexpr = (dims.K + dims.BLOCK_K - 1) // dims.BLOCK_K
    task = tl.program_id(0).to(tl.int64) // tiles
    row = tl.program_id(0).to(tl.int64) % tiles * dims.BLOCK_K
    head = task % dims.H
    batch, start, stop = place(packing, length, task // dims.H, dims.Q)
    time, channel = start + tl.arange(0, dims.Q), row + tl.arange(0, dims.BLOCK_K)
    v = head_of(v, batch, head)
    do = head_of(do, batch, head)
    of_q, of_k = zeros(dims.Q, dims.BLOCK_K), zeros(dims.Q, dims.BLOCK_K)
    around = zeros(dims.BLOCK_K)
    for column in tl.range(0, dims.V, dims.BLOCK_V, disable_licm=True):
        values = column + tl.arange(0, dims.BLOCK_V)
        S = load_state(states, task * dims.K * dims.V, row, values, dims)
        dS = load_state(dstates, task * dims.K * dims.V, row, values, dims)
        if AROUND:
            around += tl.sum(S * dS, axis=1)
        dout = load_values(do, time, stop, column, dims)
        of_q = product(dout, tl.trans(S), of_q, dims)
        vs = load_values(v, time, stop, column, dims)
        of_k = product(vs, tl.trans(dS), of_k, dims)
    if decay is not None:
        decay = head_of(decay, batch, head)
    of_q *= scale * since(decay, time, start, stop, channel, dims, SHIFT)
    of_k *= until(decay, time, start, stop, channel, dims)
    inside = (time < stop)[:, None] & (channel < dims.K)[None, :]
    own = (batch * length * dims.H + head) * dims.K
    tl.store(tokens_of(dq + own, time, dims) + channel[None, :], of_q, mask=inside)
    tl.store(tokens_of(dk + own, time, dims) + channel[None, :], of_k, mask=inside)
    if ddecay is not None:
        queries = load_keys(head_of(q, batch, head // dims.GROUP), time, stop, row, dims)
        keys = load_keys(head_of(k, batch, head // dims.GROUP), time, stop, row, dims)
        around *= over(decay, time, start, stop, channel, dims)
        base = zeros(dims.Q, dims.BLOCK_K) + around[None, :]
        taken, left = tl.cumsum(queries * of_q, axis=0, reverse=True), tl.cumsum(keys * of_k, axis=0)
        add_decays(ddecay + own, time, start, stop, channel, base, taken, left, dims, SHIFT)


@triton.jit(do_not_specialize=["length"])
def keys_backward(
    q,
    k,
    decay,
    bonus,
    dP,
    dq,
    dk,
    ddecay,
    dbonus,
    packing,
    length,
    dims: tl.constexpr,
    C: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Adds what pairs of tokens give; ``dbonus`` (chunks h parts k). A program has one part of a chunk."""
    tiles: tl.constexpr = (dims.K + dims.BLOCK_K - 1) // dims.BLOCK_K
    parts: tl.constexpr = dims.Q // C
    row, line = tl.program_id(0).to(tl.int64) % tiles * dims.BLOCK_K, tl.program_id(0).to(tl.int64) // tiles
    part, task = line % parts * C, line // parts
    head = task % dims.H
    batch, start, stop = place(packing, length, task // dims.H, dims.Q)
    slot, all_slots, channel = tl.arange(0, C), tl.arange(0, dims.Q), row + tl.arange(0, dims.BLOCK_K)
    first, last = tl.minimum(start + part, stop), tl.minimum(start + part + C, stop)
    time, every = start + part + slot, start + all_slots
    q = head_of(q, batch, head // dims.GROUP)
    k = head_of(k, batch, head // dims.GROUP)
    if decay is not None:
        decay = head_of(decay, batch, head)
    square = dP + task * dims.Q * dims.Q
    queries = load_keys(q, time, last, row, dims).to(tl.float32)
    keys = load_keys(k, time, last, row, dims).to(tl.float32)

    # The tokens of earlier parts and of later ones, with the decays between them and this part
    earlier = load_keys(k, every, first, row, dims).to(tl.float32)
    earlier *= until(decay, every, start, first, channel, dims)
    later = load_keys(q, every, stop, row, dims).to(tl.float32)
    later *= since(decay, every, last, stop, channel, dims, SHIFT)
    later = tl.where((all_slots >= part + C)[:, None], later, 0.0)
    from_earlier = tl.load(square + (part + slot)[:, None] * dims.Q + all_slots[None, :])
    of_q = product(from_earlier, earlier, zeros(C, dims.BLOCK_K), dims)
    of_q *= since(decay, time, first, last, channel, dims, SHIFT)
    to_later = tl.load(square + all_slots[None, :] * dims.Q + (part + slot)[:, None])
    of_k = product(to_later, later, zeros(C, dims.BLOCK_K), dims)
    of_k *= until(decay, time, first, last, channel, dims)
    taken, left = tl.cumsum(queries * of_q, axis=0, reverse=True), tl.cumsum(keys * of_k, axis=0)
    if ddecay is not None:
        between = tl.load(square + all_slots[:, None] * dims.Q + all_slots[None, :])
        between = product(between, earlier, zeros(dims.Q, dims.BLOCK_K), dims)
        around = tl.sum(later * between, axis=0) * over(decay, time, first, last, channel, dims)

    # Pairs within the part
    E = zeros(C, dims.BLOCK_K)
    for i in range(last - first):
        d = decay_of(decay, first + i, last, channel, dims)
        qs = load_row(q, first + i, last, channel, dims)
        weight = tl.load(square + (part + i) * dims.Q + part + slot)
        here = (slot == i)[:, None]
        if not SHIFT:
            E = tl.where(here, 1.0, E * d[None, :])
        back = E * weight[:, None] * qs[None, :]
        of_k += back
        of_q = tl.where(here, of_q + tl.sum(E * weight[:, None] * keys, axis=0)[None, :], of_q)
        passed = tl.where(here, 0.0, back * keys)
        left += tl.where((slot < i - SHIFT)[:, None], tl.cumsum(passed, axis=0), 0.0)
        if SHIFT:
            E = tl.where(here, 1.0, E * d[None, :])
    own = (batch * length * dims.H + head) * dims.K
    inside = (time < last)[:, None] & (channel < dims.K)[None, :]
    if bonus is not None:
        u = tl.load(bonus + head * dims.K + channel, mask=channel < dims.K, other=0.0).to(tl.float32)
        weight = tl.load(square + (part + slot) * (dims.Q + 1))[:, None]
        of_q += weight * u[None, :] * keys
        of_k += weight * u[None, :] * queries
        of_bonus = tl.sum(weight * queries * keys, axis=0)
        tl.store(dbonus + line * dims.K + channel, of_bonus, mask=channel < dims.K)
    at = tokens_of(dq + own, time, dims) + channel[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + of_q, mask=inside)
    at = tokens_of(dk + own, time, dims) + channel[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + of_k, mask=inside)
    if ddecay is not None:
        base = zeros(C, dims.BLOCK_K) + around[None, :]
        add_decays(ddecay + own, time, first, last, channel, base, taken, left, dims, SHIFT)
