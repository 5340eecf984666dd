"""Attention over a cache in the native CPU library (``cpu.cpp``): flash decoding, each key and value read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import check_range, gradient_wanted, precision
from ssmkernels.native import address, missing, rows
from ssmkernels.ops.decode_attention import check_places

__all__ = ["decode_attention", "missing", "unsupported"]


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
        {
            "q": q.data_ptr(),
            "k": k_cache.data_ptr(),
            "v": v_cache.data_ptr(),
            "lengths": lengths.data_ptr(),
            "block_table": address(block_table),
            "slopes": address(slopes),
            "sinks": address(sinks),
            "out": out.data_ptr(),
            "lse": lse.data_ptr() if return_lse else 0,
            "dtype": native.DTYPES[q.dtype],
            "sequences": s,
            "l": l,
            "h": h,
            "h_kv": h_kv,
            "k_size": k_size,
            "v_size": v_size,
            "page_size": k_cache.shape[1],
            "left": left,
            "splits": num_splits or 0,
            "threads": native.threads(int(keys) * l * h * (k_size + v_size)),
            **_steps("q", q, "sequence", "position", "head"),
            "lengths_step": lengths.stride(0),
            **_steps("table", block_table, "sequence", "block"),
            **_steps("k", k_cache, "page", "position", "head", "step"),
            **_steps("v", v_cache, "page", "position", "head", "step"),
            "scale": scale,
            "softcap": softcap,
        },
    )
    return out, lse


def _steps(name: str, x: Tensor | None, *axes: str) -> dict[str, int]:
    """The strides of the named axes. A head of one element has a step of 1, so that it counts as contiguous."""
    steps = (0,) * len(axes) if x is None else x.stride()
    if x is not None and axes[-1] == "step" and x.shape[-1] <= 1:
        steps = (*steps[:-1], 1)
    return {f"{name}_{axis}": step for axis, step in zip(axes, steps, strict=False)}


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
