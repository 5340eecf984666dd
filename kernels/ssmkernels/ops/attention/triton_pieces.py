"""What attention's Triton kernels share: where a tile lies, which tiles it meets, and their logits.

Queries and keys are two sides that are treated alike. A program has one tile of its own side and goes through the
tiles of the other; a query at index i stands at key i + shift, with shift = end of its keys - end of its queries, and a
key at index j among the queries at j - shift.
"""

# mypy: disable-error-code="assignment"
# (tuples of registers change their types in branches)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.strided import Strided
from ssmkernels.core.triton_pieces import tanh

LOG2E = tl.constexpr(1.4426950408889634)
SCANNED = tl.constexpr(128)  # entries of a list that are looked at together
BEYOND = tl.constexpr(2**30)  # an index that nothing has


@triton.jit
def tile_of(number, places, borders, other_borders, length, other_length, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Where a tile starts and stops, its sequence begins and ends, and so on the other side.

    ``SIZE`` is that of the mask's blocks, which a tile does not cross; 0 where there is no mask.
    """
    if places.owners is not None:
        sequence = tl.load(places.owners + number)
        begin, end = tl.load(borders + sequence), tl.load(borders + sequence + 1)
        other_begin, other_end = tl.load(other_borders + sequence), tl.load(other_borders + sequence + 1)
        start = tl.load(places.starts + number)
    else:
        begin, end, other_begin, other_end = 0, length, 0, other_length
        if SIZE:
            parts: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
            start = number // parts * SIZE + number % parts * BLOCK
        else:
            start = number * BLOCK
    if SIZE:
        within = start % SIZE
        stop = start - within + tl.minimum((within // BLOCK + 1) * BLOCK, SIZE)
    else:
        stop = start + BLOCK
    return start, tl.minimum(stop, end), begin, end, other_begin, other_end


@triton.jit
def own_queries(tiles, places, sides, l, m, dims: tl.constexpr):
    """The tile of queries that a program has: its number, head and batch, and where it lies, as :func:`tile_of`.

    Under a causal mask the longest work is at the end, so that the last tiles come first.
    """
    number, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % dims.H
    number = tiles - 1 - number
    batch = (tl.program_id(0) // tiles // dims.H).to(tl.int64)
    start, stop, _, end, begin_k, end_k = tile_of(
        number, places, sides.cu_seqlens, sides.cu_seqlens_k, l, m, dims.MASK_Q, dims.ROWS
    )
    return number, head, batch, start, stop, end, begin_k, end_k


@triton.jit
def reach(first, last, begin, end, before, after):
    """What the positions first … last meet of begin … end, from ``before`` before to ``after`` after each, -1 for all.

    Returns:
        low, high, whole_low, whole_high: some meet low … high - 1, all of them whole_low … whole_high - 1.
    """
    low = tl.where(before < 0, begin, tl.maximum(begin, first - before))
    high = tl.where(after < 0, end, tl.minimum(end, last + after + 1))
    whole_low = tl.where(before < 0, begin, tl.maximum(begin, last - before))
    whole_high = tl.where(after < 0, end, tl.minimum(end, first + after + 1))
    return low, tl.maximum(high, low), whole_low, tl.maximum(whole_high, whole_low)


@triton.jit
def own_side(start, stop, shift, positions, other_begin, other_end, before, after, BLOCK: tl.constexpr):
    """A tile's indices and their positions on the other side, what each of them meets, and what the tile does.

    Where tokens have ``positions`` of their own, each may meet all: :func:`meets` looks at every tile.

    Returns:
        index, position, low, high, met: (BLOCK) each, of which low … high - 1 are met; ``met`` is :func:`reach` of the
        whole tile.
    """
    index = start + tl.arange(0, BLOCK)
    if positions is not None:
        position = tl.load(positions + index, mask=index < stop, other=0)
        low, high = tl.zeros_like(index) + other_begin, tl.zeros_like(index) + other_end
        met = (other_begin, other_end, other_begin, other_begin)
    else:
        position = index + shift
        low, high, _, _ = reach(position, position, other_begin, other_end, before, after)
        met = reach(start + shift, stop - 1 + shift, other_begin, other_end, before, after)
    return index, position, low, high, met


@triton.jit
def meets(own, own_there, positions, index, begin, end, before, after):
    """Positions of the other side's tokens at ``index``, and whether a token of the own tile may see one of them.

    Without ``positions`` these are the indices themselves, and :func:`work` has left out what nobody sees.
    """
    if positions is None:
        return index, True
    else:  # noqa: RET505
        there = (index >= begin) & (index < end)
        at = tl.load(positions + index, mask=there, other=0)
        first, last = (
            tl.min(tl.where(own_there, own, BEYOND), axis=0),
            tl.max(tl.where(own_there, own, -BEYOND), axis=0),
        )
        low, high = tl.min(tl.where(there, at, BEYOND), axis=0), tl.max(tl.where(there, at, -BEYOND), axis=0)
        return at, ((before < 0) | (high >= first - before)) & ((after < 0) | (low <= last + after))


@triton.jit
def within(positions, s, distance, before, after):
    """-∞ where tokens have ``positions`` of their own and these are too far: ``distance`` is own less other."""
    if positions is None:
        return s
    else:  # noqa: RET505
        seen = ((before < 0) | (distance <= before)) & ((after < 0) | (-distance <= after))
        return tl.where(seen, s, -float("inf"))


@triton.jit
def at_head(x, batch, head, across):
    """One head of x at position 0, its pointers spread over its width."""
    at = x.at + (batch * x.batch + head.to(tl.int64) * x.head + across.to(tl.int64) * x.step)
    return Strided(at, x.batch, x.time, x.head, x.step)


@triton.jit
def across(dims: tl.constexpr):
    """Channels (1, BLOCK_K) of queries and keys, and (1, BLOCK_V) of values."""
    return tl.arange(0, dims.BLOCK_K)[None, :], tl.arange(0, dims.BLOCK_V)[None, :]


@triton.jit
def at_heads(q, k, v, batch, head, across_k, across_v, dims: tl.constexpr):
    """One head of the queries, and its group's of keys and values, as :func:`at_head`."""
    q = at_head(q, batch, head, across_k)
    of_group = head // dims.GROUP
    return q, at_head(k, batch, of_group, across_k), at_head(v, batch, of_group, across_v)


@triton.jit
def tiles_met(low, high, whole_low, whole_high, begin, BLOCK: tl.constexpr):
    """Numbers of the tiles from ``begin`` on: a … d - 1 are met, of which b … c - 1 hide nothing."""
    a, d = (low - begin) // BLOCK, tl.cdiv(high - begin, BLOCK)
    b = tl.minimum(tl.cdiv(whole_low - begin, BLOCK), d)
    return a, b, tl.maximum((whole_high - begin) // BLOCK, b), d


@triton.jit
def entries_met(offsets, listed, low, high, length, SIZE: tl.constexpr):
    """Of one list of blocks, in rising order: the first that reaches into low … high - 1, and how many do."""
    first, last = tl.load(offsets), tl.load(offsets + 1)
    if (low <= 0) & (high >= length):
        skipped, kept = 0, last - first
    else:
        skipped, kept = 0, 0
        for at in range(first, last, SCANNED):
            entry = at + tl.arange(0, SCANNED)
            block = tl.load(listed + entry, mask=entry < last, other=length // SIZE + 1)
            skipped += tl.sum((block * SIZE + SIZE <= low).to(tl.int32), axis=0)
            kept += tl.sum((block * SIZE < high).to(tl.int32), axis=0)
    return first + skipped, tl.maximum(kept - skipped, 0)


@triton.jit
def work(offsets, listed, met, begin, length, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """What a program goes through on the other side: of a list of blocks where ``SIZE`` is not 0, all but the window.

    Returns:
        entry, count, a, b, c, d: the first block of the list and how many there are, and tiles as :func:`tiles_met`.
    """
    if SIZE:
        entry, count = entries_met(offsets, listed, met[0], met[1], length, SIZE)
        a, b, c, d = 0, 0, 0, tl.cdiv(count * SIZE, BLOCK)
    else:
        entry, count = 0, 0
        a, b, c, d = tiles_met(met[0], met[1], met[2], met[3], begin, BLOCK)
    return entry, count, a, b, c, d


@triton.jit
def blocks_at(listed, patterns, place, count, whole_low, whole_high, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of ``count`` listed blocks laid side by side, from a place on.

    Returns:
        index, pattern, cut, partial: (BLOCK) indices, ``BEYOND`` after the last block, and their blocks' patterns
        (1, BLOCK), or one number where a block holds the whole tile; whether some index is not within whole_low …
        whole_high - 1, and whether some pattern hides anything.
    """
    if SIZE % BLOCK == 0:
        entry = place // SIZE
        first = tl.load(listed + entry) * SIZE + place % SIZE
        index = first + tl.arange(0, BLOCK)
        cut = (first < whole_low) | (first + BLOCK > whole_high)
        pattern = tl.load(patterns + entry)
        partial = pattern >= 0
    else:
        places = place + tl.arange(0, BLOCK)
        entry = places // SIZE
        there = entry < count
        index = tl.where(there, tl.load(listed + entry, mask=there, other=0) * SIZE + places % SIZE, BEYOND)
        cut = (tl.min(index, axis=0) < whole_low) | (tl.max(index, axis=0) >= whole_high)
        pattern = tl.load(patterns + entry, mask=there, other=-1)[None, :]
        partial = tl.max(tl.max(pattern, axis=1), axis=0) >= 0
    return index, pattern, cut, partial


@triton.jit
def indices(
    lists,
    entry,
    count,
    met,
    n,
    b,
    c,
    begin,
    zero,
    GUARDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Indices of the n-th tile of :func:`work`, and (pattern, cut, partial) as :func:`blocks_at`, 0 without a list."""
    if SIZE:
        index, pattern, cut, partial = blocks_at(
            lists.listed + entry, lists.patterns + entry, n * BLOCK, count, met[2], met[3], SIZE, BLOCK
        )
        return index, (pattern, cut, partial)
    else:  # noqa: RET505 (the compiler wants to see it)
        n = tl.where(n < b, n, n + c - b) if GUARDED else n
        return begin + (n ^ zero) * BLOCK + tl.arange(0, BLOCK), (0, 0, 0)


@triton.jit
def take(x, index, begin, end, WIDTH: tl.constexpr, PADDED: tl.constexpr, GUARDED: tl.constexpr):
    """Rows of x, whose pointers already go (1, PADDED) across; 0 beyond the width and, if guarded, begin … end - 1."""
    at = x.at + index.to(tl.int64)[:, None] * x.time
    within = (tl.arange(0, PADDED) < WIDTH)[None, :]
    if GUARDED:
        there = ((index >= begin) & (index < end))[:, None]
        return tl.load(at, mask=there if WIDTH == PADDED else there & within, other=0.0)
    if WIDTH == PADDED:
        return tl.load(at)
    return tl.load(at, mask=within, other=0.0)


@triton.jit
def logits(product, distance, slope, scales, SOFTCAP: tl.constexpr):
    """Logits to base 2 of products of queries and keys, and their slope before ALiBi, less the factor."""
    slant = product
    if SOFTCAP:
        bent = tanh(product * scales.factor)
        s, slant = scales.cap * bent, 1 - bent * bent
    else:
        s = product * scales.factor
    if slope is not None:
        s -= slope * tl.abs(distance).to(tl.float32)
    return s, slant


@triton.jit
def hide(s, other, low, high):
    """-∞ where the other side's index is not within low … high - 1."""
    return tl.where((other >= low) & (other < high), s, -float("inf"))


@triton.jit
def hide_unlisted(s, bits, pattern, i, j, MASK_Q: tl.constexpr, MASK_K: tl.constexpr):
    """-∞ where the pattern has no bit for query i and key j; patterns below 0 show all."""
    bits += pattern.to(tl.int64) * (MASK_Q * MASK_K // 8)
    at = i % MASK_Q * (MASK_K // 8) + j % MASK_K // 8
    byte = tl.load(bits + at, mask=pattern >= 0, other=255)
    return tl.where((byte.to(tl.int32) >> (j % 8)) & 1 != 0, s, -float("inf"))


@triton.jit
def visible(
    s, other, low, high, listing, bits, i, j, GUARDED: tl.constexpr, MASK_Q: tl.constexpr, MASK_K: tl.constexpr
):
    """Logits (own, other), -∞ where one side does not see the other: by the window, the borders or the list."""
    if MASK_Q:
        pattern, cut, partial = listing
        if cut:
            s = hide(s, other[None, :], low[:, None], high[:, None])
        if partial:
            s = hide_unlisted(s, bits, pattern, i, j, MASK_Q, MASK_K)
    elif GUARDED:
        s = hide(s, other[None, :], low[:, None], high[:, None])
    return s
