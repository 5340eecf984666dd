"""Attention over a cache in the native CPU library (``cpu.cpp``): flash decoding, each key and value read once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import check_range, precision
from ssmkernels.native import address, missing, rows, wrong_device
from ssmkernels.ops.attention import hidden
from ssmkernels.ops.decode_attention import checked_places, reference

__all__ = ["checked", "forward", "missing", "unsupported"]

_Arguments = native.arguments(
    "_Arguments",
    """
    q k v lengths block_table slopes sinks out lse
    dtype sequences l h h_kv k_size v_size page_size left splits threads
    q_sequence q_position q_head lengths_step table_sequence table_block
    k_page k_position k_head k_step v_page v_position v_head v_step scale softcap
    """,
    numbers=("scale", "softcap"),
)


def unsupported(a: Any) -> str | None:
    return wrong_device(a) or ("the values have no head dim" if a.v_cache.shape[3] == 0 else None)


def checked(a: Any) -> Any:
    """In compiled code nobody has read lengths and pages yet, and the library reads wherever they point."""
    lengths, block_table = checked_places(a.lengths, a.block_table, a.k_cache)
    check_range("decode_attention", 1, num_splits=a.num_splits)
    return a._replace(lengths=lengths, block_table=block_table)


def forward(a: Any, _: bool) -> tuple[Tensor, Tensor]:
    q, k_cache, v_cache, lengths, block_table = rows(a.q), a.k_cache, a.v_cache, a.lengths, a.block_table
    (s, l, h, k_size), (h_kv, v_size) = q.shape, v_cache.shape[2:]
    wide = precision(q)
    out = q.new_empty(s, l, h, v_size)
    lse = q.new_empty((s, h, l) if a.return_lse else 0, dtype=wide)
    slopes, sinks = (None if t is None else t.to(wide).contiguous() for t in (a.alibi_slopes, a.sinks))
    keys = lengths.sum() if a.left < 0 else lengths.clamp(max=a.left + l).sum()
    native.run(
        "decode_attention",
        _Arguments(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            lengths.data_ptr(),
            address(block_table),
            address(slopes),
            address(sinks),
            out.data_ptr(),
            lse.data_ptr() if a.return_lse else 0,
            native.DTYPES[q.dtype],
            s,
            l,
            h,
            h_kv,
            k_size,
            v_size,
            k_cache.shape[1],
            a.left,
            a.num_splits or 0,
            native.threads(int(keys) * l * h * (k_size + v_size)),
            *q.stride()[:3],
            lengths.stride(0),
            *((0, 0) if block_table is None else block_table.stride()),
            *_steps(k_cache),
            *_steps(v_cache),
            a.scale,
            a.softcap,
        ),
    )
    if l > 1 and hidden.spread(out):  # a single query sees all keys that the library visits
        out = hidden.repaired(out, reference.compute(a)[0])
    return out, lse


def _steps(cache: Tensor) -> tuple[int, ...]:
    """Its strides; the last is 1 where there is nothing to step to, so that elements count as side by side."""
    return *cache.stride()[:3], cache.stride(3) if cache.shape[3] > 1 else 1
