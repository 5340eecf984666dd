"""A head's state in the delta rule's Triton kernels: some columns of it, in registers or in memory.

A state (K, V) is contiguous and float32. In registers it has all of its rows at once. In memory it is read and written
``BLOCK_K`` rows at a time by a loop that is not unrolled, so that registers hold one piece of it and of the keys.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.core.triton_pieces import zeros
from ssmkernels.ops.ssd.triton_pieces import load_rows, load_tile, product, span, store_rows


@triton.jit
def columns_of(packing, length, dims: tl.constexpr):
    """What a program has that goes through one sequence with some columns of a head's state, all of its keys.

    Returns:
        column, line, head: its first column, the number of its head among those of all sequences, and of its sequence.
        batch, begin, end, chunk: where the sequence lies, as :func:`span`.
    """
    tiles: tl.constexpr = (dims.V + dims.BLOCK_V - 1) // dims.BLOCK_V
    task = tl.program_id(0).to(tl.int64)
    column, line = task % tiles * dims.BLOCK_V, task // tiles
    batch, begin, end, chunk = span(packing, length, line // dims.H, dims.Q)
    return column, line, line % dims.H, batch, begin, end, chunk


@triton.jit
def load_keys(x, time, stop, row, dims: tl.constexpr):
    """(tokens, BLOCK_K) of one head's queries or keys from channel ``row`` on; 0 from token ``stop`` on."""
    return load_rows(x, time, stop, row, dims.K, dims.BLOCK_K)


@triton.jit
def load_values(x, time, stop, column, dims: tl.constexpr):
    """(tokens, BLOCK_V) of one head's values from channel ``column`` on; 0 from token ``stop`` on."""
    return load_rows(x, time, stop, column, dims.V, dims.BLOCK_V)


@triton.jit
def load_slots(x, task, column, dims: tl.constexpr):
    """(Q, BLOCK_V) of the chunk ``task`` of x, contiguous (chunks h Q V), from column ``column`` on."""
    return load_tile(x + task * dims.Q * dims.V, tl.arange(0, dims.Q), dims.V, dims.Q, column, 1, dims.V, dims.BLOCK_V)


@triton.jit
def store_values(x, batch, time, stop, head, values, written, length, dims: tl.constexpr):
    """Rows (tokens, BLOCK_V) of a chunk into a head of x, contiguous (b l h V)."""
    store_rows(x, batch, time, stop, head, values, written, length, dims.H, dims.V)


@triton.jit
def load_state(x, at, row, values, dims: tl.constexpr):
    """(BLOCK_K, BLOCK_V) of a state from this row on; 0 where there is none."""
    key = row + tl.arange(0, dims.BLOCK_K)
    if x is None:
        S = zeros(dims.BLOCK_K, dims.BLOCK_V)
    else:
        inside = (key < dims.K)[:, None] & (values < dims.V)[None, :]
        S = tl.load(x + at + key[:, None] * dims.V + values[None, :], mask=inside, other=0.0)
    return S


@triton.jit
def store_state(x, at, row, values, S, dims: tl.constexpr):
    key = row + tl.arange(0, dims.BLOCK_K)
    tl.store(
        x + at + key[:, None] * dims.V + values[None, :], S, mask=(key < dims.K)[:, None] & (values < dims.V)[None, :]
    )


@triton.jit
def copy_state(x, at, to, values, dims: tl.constexpr):
    """A state's columns to another place; 0 where there is none."""
    for row in range(0, dims.K, dims.BLOCK_K):
        store_state(to, 0, row, values, load_state(x, at, row, values, dims), dims)


@triton.jit
def decayed(x, decays, time, stop, row, dims: tl.constexpr):
    """(Q, BLOCK_K) queries or keys of a chunk from channel ``row`` on, times decays (Q, K)."""
    tile = load_keys(x, time, stop, row, dims).to(tl.float32)
    return tile * load_tile(decays, tl.arange(0, dims.Q), dims.K, dims.Q, row, 1, dims.K, dims.BLOCK_K)


@triton.jit
def whole(first, row, dims: tl.constexpr):
    """(BLOCK_K, 1) the decay over all of a chunk."""
    key = row + tl.arange(0, dims.BLOCK_K)
    return tl.load(first + (dims.Q - 1) * dims.K + key, mask=key < dims.K, other=0.0)[:, None]


@triton.jit
def read(x, decays, state, values, total, time, stop, dims: tl.constexpr):
    """``total`` (Q, BLOCK_V), and what decayed queries or keys read from a state in memory."""
    for row in tl.range(0, dims.K, dims.BLOCK_K, disable_licm=True):
        S = load_state(state, 0, row, values, dims)
        tile = decayed(x, decays, time, stop, row, dims)
        total = product(tile, S, total, dims)
    return total


@triton.jit
def write(x, written, y, further, decays, first, state, to, values, time, stop, dims: tl.constexpr):
    """From a state in memory to another, or to itself: decayed over the chunk, plus outer products with (Q, BLOCK_V).

    These are of decayed queries or keys x with ``written``, and of y with ``further`` unless y is None.
    """
    for row in tl.range(0, dims.K, dims.BLOCK_K, disable_licm=True):
        S = whole(first, row, dims) * load_state(state, 0, row, values, dims)
        tile = decayed(x, decays, time, stop, row, dims)
        S = product(tl.trans(tile), written, S, dims)
        if y is not None:
            tile = decayed(y, decays, time, stop, row, dims)
            S = product(tl.trans(tile), further, S, dims)
        store_state(to, 0, row, values, S, dims)
