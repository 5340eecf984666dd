"""A head's state in the delta rule's Triton kernels: some columns of it, in registers or in memory.

A state (K, V) is contiguous and float32. In registers it has all of its rows at once. In memory it is read and written
``B`` rows at a time by a loop that is not unrolled, so that registers hold one piece of it and of the keys.
"""

# mypy: disable-error-code="assignment"
# (a tensor's dtype and shape change where a branch or a loop assigns to it)

from __future__ import annotations

import triton
import triton.language as tl

from ssmkernels.ops.ssd.triton_pieces import load_tile


@triton.jit
def load_state(x, at, row, values, V: tl.constexpr, K: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    """(B, BLOCK) of a state from this row on; 0 where there is none."""
    key = row + tl.arange(0, B)
    if x is None:
        S = tl.zeros((B, BLOCK), tl.float32)
    else:
        inside = (key < K)[:, None] & (values < V)[None, :]
        S = tl.load(x + at + key[:, None] * V + values[None, :], mask=inside, other=0.0)
    return S


@triton.jit
def store_state(x, at, row, values, S, V: tl.constexpr, K: tl.constexpr, B: tl.constexpr):
    key = row + tl.arange(0, B)
    tl.store(x + at + key[:, None] * V + values[None, :], S, mask=(key < K)[:, None] & (values < V)[None, :])


@triton.jit
def copy_state(x, at, to, values, V: tl.constexpr, K: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    """A state's columns to another place; 0 where there is none."""
    for row in range(0, K, B):
        store_state(to, 0, row, values, load_state(x, at, row, values, V, K, B, BLOCK), V, K, B)


@triton.jit
def decayed(x, decays, time, stop, row, x_time, x_step, K: tl.constexpr, Q: tl.constexpr, B: tl.constexpr):
    """(Q, B) queries or keys of a chunk from channel ``row`` on, times decays (Q, K)."""
    tile = load_tile(x, time, x_time, stop, row, x_step, K, B).to(tl.float32)
    return tile * load_tile(decays, tl.arange(0, Q), K, Q, row, 1, K, B)


@triton.jit
def whole(first, row, K: tl.constexpr, Q: tl.constexpr, B: tl.constexpr):
    """(B, 1) the decay over all of a chunk."""
    key = row + tl.arange(0, B)
    return tl.load(first + (Q - 1) * K + key, mask=key < K, other=0.0)[:, None]


@triton.jit
def read(
    x,
    decays,
    state,
    values,
    total,
    time,
    stop,
    x_time,
    x_step,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total`` (Q, BLOCK), and what decayed queries or keys read from a state in memory."""
    for row in tl.range(0, K, B, disable_licm=True):
        S = load_state(state, 0, row, values, V, K, B, BLOCK)
        tile = decayed(x, decays, time, stop, row, x_time, x_step, K, Q, B)
        total = tl.dot(tile, S, total, input_precision=PRECISION)
    return total


@triton.jit
def write(
    x,
    written,
    y,
    further,
    decays,
    first,
    state,
    to,
    values,
    time,
    stop,
    x_time,
    x_step,
    y_time,
    y_step,
    K: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From a state in memory to another, or to itself: decayed over the chunk, plus outer products with (Q, BLOCK).

    These are of decayed queries or keys x with ``written``, and of y with ``further`` unless y is None.
    """
    for row in tl.range(0, K, B, disable_licm=True):
        S = whole(first, row, K, Q, B) * load_state(state, 0, row, values, V, K, B, BLOCK)
        tile = decayed(x, decays, time, stop, row, x_time, x_step, K, Q, B)
        S = tl.dot(tl.trans(tile), written, S, input_precision=PRECISION)
        if y is not None:
            tile = decayed(y, decays, time, stop, row, y_time, y_step, K, Q, B)
            S = tl.dot(tl.trans(tile), further, S, input_precision=PRECISION)
        store_state(to, 0, row, values, S, V, K, B)
