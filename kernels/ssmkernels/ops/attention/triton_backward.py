"""Attention's backward pass in Triton: its launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import kernels, next_power_of_2, on_device_of
from ssmkernels.core.validate import precision
from ssmkernels.ops.attention.triton_arguments import (
    Call,
    Mask,
    key_lists,
    options,
    places,
    query_lists,
    strides,
    values,
)

HEADS = 4  # of a group, for whose keys one program sums; more are parts


def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    block_offsets: Tensor | None,
    block_columns: Tensor | None,
    block_patterns: Tensor | None,
    block_bits: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    slopes_wanted: bool,
) -> list[Tensor]:
    """Gradients of q, k and v, then of those of sinks (if given) and slopes (if wanted)."""
    members = (block_offsets, block_columns, block_patterns, block_bits)
    mask = None if block_offsets is None else Mask(*members)  # type: ignore[arg-type]  # all or none
    call = Call(left, right, scale, softcap, mask, cu_seqlens, cu_seqlens_k)
    dlse = None if dlse is None else dlse.contiguous()
    tops, delta = _row_sums(out, lse, dout, dlse)
    shared = values(call, q, k, v, alibi_slopes)
    shared |= {"dout": dout, "tops": tops, "delta": delta, "scale": scale, **strides("dout", dout)}
    with on_device_of(q):
        dq, dslopes = _queries_backward(call, shared, dlse, slopes_wanted)
        dk, dv = _keys_backward(call, shared)
    found = [dq, dk, dv]
    if sinks is not None:
        blind = tops == torch.inf
        weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(blind, 0)).masked_fill(blind, 0)
        found.append(-(weight * delta).sum((0, 2)).to(sinks.dtype))
    if alibi_slopes is not None and dslopes is not None:
        found.append(dslopes.sum(1).to(alibi_slopes.dtype))
    return found


backward = torch.library.custom_op("ssmkernels::attention_triton_backward", _attention_backward, mutates_args=())


@backward.register_fake
def _(q, k, v, alibi_slopes, sinks, *arguments):
    given = (q, k, v, sinks, alibi_slopes if arguments[-1] else None)
    return [x.new_empty(x.shape) for x in given if x is not None]


def _row_sums(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    b, l, h, v_size = out.shape
    tops, delta = torch.empty_like(lse), torch.empty_like(lse)
    rows = 32
    if lse.numel():
        with on_device_of(out):
            kernels(__package__).row_sums[(-(-l // rows) * h * b,)](
                out=out,
                lse=lse,
                dout=dout,
                dlse=dlse,
                tops=tops,
                delta=delta,
                **strides("dout", dout),
                l=l,
                H=h,
                V=v_size,
                ROWS=rows,
                BLOCK_V=next_power_of_2(v_size),
                num_warps=4,
            )
    return tops, delta


def _queries_backward(
    call: Call, shared: dict[str, Any], dlse: Tensor | None, slopes_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    q = shared["q"]
    b, l, h, _ = q.shape
    own = options("queries_backward", shared)
    tiles, where = places(call.cu_seqlens, l, shared["MASK_Q"], own["ROWS"])
    dq = q.new_empty(q.shape)
    dslopes = q.new_zeros((h, b * tiles), dtype=precision(q)) if slopes_wanted else None
    if dq.numel():
        kernels(__package__).queries_backward[(tiles * h * b,)](
            **shared, **where, **query_lists(call.mask), dlse=dlse, dq=dq, dslopes=dslopes, tiles=tiles, **own
        )
    return dq, dslopes


def _keys_backward(call: Call, shared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    k, v = shared["k"], shared["v"]
    b, m, h_kv, _ = k.shape
    own = options("keys_backward", shared)
    parts = -(-shared["GROUP"] // HEADS)
    tiles, where = places(call.cu_seqlens_k, m, shared["MASK_K"], own["COLUMNS"])
    dk, dv = (x.new_empty((parts, *x.shape), dtype=precision(x) if parts > 1 else x.dtype) for x in (k, v))
    if dk.numel():
        fields = {**shared, **where, **key_lists(call.mask, m), "tiles": tiles, "parts": parts, "HEADS": HEADS, **own}
        apart = max(shared["BLOCK_K"], shared["BLOCK_V"]) > 128
        for sums in ({"dk": dk, "dv": None}, {"dk": None, "dv": dv}) if apart else ({"dk": dk, "dv": dv},):
            kernels(__package__).keys_backward[(tiles * parts * h_kv * b,)](**fields, **sums)
    return _total(dk, k), _total(dv, v)


def _total(parts: Tensor, x: Tensor) -> Tensor:
    return parts.view(x.shape) if len(parts) == 1 else parts.sum(0).to(x.dtype)
