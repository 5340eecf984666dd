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
        {
            "q": q.data_ptr(),
            "k": k_cache.data_ptr(),
            "v": v_cache.data_ptr(),
            "lengths": lengths.data_ptr(),
            "block_table": address(block_table),
            "slopes": address(slopes),
            "sinks": address(sinks),
            "out": out.data_ptr(),
            "lse": lse.data_ptr() if a.return_lse else 0,
            "dtype": native.DTYPES[q.dtype],
            "sequences": s,
            "l": l,
            "h": h,
            "h_kv": h_kv,
            "k_size": k_size,
            "v_size": v_size,
            "page_size": k_cache.shape[1],
            "left": a.left,
            "splits": a.num_splits or 0,
            "threads": native.threads(int(keys) * l * h * (k_size + v_size)),
            **steps("q", q, "sequence", "position", "head"),
            "lengths_step": lengths.stride(0),
            **steps("table", block_table, "sequence", "block"),
            **steps("k", k_cache, "page", "position", "head", "step"),
            **steps("v", v_cache, "page", "position", "head", "step"),
            "scale": a.scale,
            "softcap": a.softcap,
        },
    )
    if l > 1 and hidden.spread(out):  # a single query sees all keys that the library visits
        out = hidden.repaired(out, reference.compute(a)[0])
    return out, lse


def steps(name: str, x: Tensor | None, *axes: str) -> dict[str, int]:
    """The strides of the named axes. A head of one element has a step of 1, so that it counts as contiguous."""
    steps = (0,) * len(axes) if x is None else x.stride()
    if x is not None and axes[-1] == "step" and x.shape[-1] <= 1:
        steps = (*steps[:-1], 1)
    return {f"{name}_{axis}": step for axis, step in zip(axes, steps, strict=False)}
