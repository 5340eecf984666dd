"""Attention over a cache in the native CPU library (``cpu.cpp``): flash decoding, each key and value read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import check_range, gradient_wanted, precision
from ssmkernels.native import address, missing, rows
from ssmkernels.ops.attention import hidden
from ssmkernels.ops.decode_attention import check_places, reference

__all__ = ["decode_attention", "missing", "unsupported"]

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


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    if arguments["q"].device.type != "cpu":
        return f"its tensors must be on the CPU; `q` is on {arguments['q'].device}"
    if arguments["v_cache"].shape[3] == 0:
        return "the values have no head dim"
    return gradient_wanted(arguments)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    left: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    num_splits: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    run = decode if torch.compiler.is_compiling() else _decode
    biases = (alibi_slopes, sinks)
    return run(q, k_cache, v_cache, lengths, block_table, left, scale, softcap, *biases, num_splits, return_lse)


decode_attention.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    left: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    num_splits: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q, k_cache, v_cache, return_lse)
    q = rows(q)
    wide = precision(q)
    slopes, sinks = (None if t is None else t.to(wide).contiguous() for t in (alibi_slopes, sinks))
    (s, l, h, k_size), (h_kv, v_size) = q.shape, v_cache.shape[2:]
    keys = lengths.sum() if left < 0 else lengths.clamp(max=left + l).sum()
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
            lse.data_ptr() if return_lse else 0,
            native.DTYPES[q.dtype],
            s,
            l,
            h,
            h_kv,
            k_size,
            v_size,
            k_cache.shape[1],
            left,
            num_splits or 0,
            native.threads(int(keys) * l * h * (k_size + v_size)),
            *q.stride()[:3],
            lengths.stride(0),
            *((0, 0) if block_table is None else block_table.stride()),
            *_steps(k_cache),
            *_steps(v_cache),
            scale,
            softcap,
        ),
    )
    if l > 1 and hidden.spread(out):  # a single query sees all keys that the library visits
        rest = (lengths, block_table, left, scale, softcap, alibi_slopes, sinks, num_splits, False)
        out = hidden.repaired(out, reference.decode_attention(q, k_cache, v_cache, *rest)[0])
    return out, lse


def _steps(cache: Tensor) -> tuple[int, ...]:
    """Its strides; the last is 1 where there is nothing to step to, so that elements count as side by side."""
    return *cache.stride()[:3], cache.stride(3) if cache.shape[3] > 1 else 1


def _outputs(q: Tensor, k_cache: Tensor, v_cache: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    s, l, h, _ = q.shape
    return q.new_empty(s, l, h, v_cache.shape[3]), q.new_empty((s, h, l) if return_lse else 0, dtype=precision(q))


def _checked(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    left: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    num_splits: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """In compiled code nobody has read lengths and pages yet, and the library reads wherever they point."""
    lengths, block_table = lengths.clone(), None if block_table is None else block_table.clone()
    check_places(lengths, block_table, k_cache)
    check_range("decode_attention", 1, num_splits=num_splits)
    biases = (alibi_slopes, sinks)
    return _decode(q, k_cache, v_cache, lengths, block_table, left, scale, softcap, *biases, num_splits, return_lse)


decode = torch.library.custom_op("ssmkernels::decode_attention_cpu", _checked, mutates_args=())


@decode.register_fake
def _(q, k_cache, v_cache, lengths, block_table, left, scale, softcap, alibi_slopes, sinks, num_splits, return_lse):
    return _outputs(q, k_cache, v_cache, return_lse)
