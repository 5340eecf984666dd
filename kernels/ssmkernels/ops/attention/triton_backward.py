"""Attention's backward pass in Triton: its launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.strided import strided
from ssmkernels.core.triton_support import kernels, next_power_of_2, on_device_of
from ssmkernels.core.validate import precision
from ssmkernels.ops.attention.triton_arguments import key_lists, options, places, query_lists, settled, values

HEADS = 4  # of a group, for whose keys one program sums; more are parts


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    dout, lse = grads.out, saved.lse
    dlse = None if grads.lse is None else grads.lse.contiguous()
    tops, delta = _row_sums(saved.out, lse, dout, dlse)
    shared = values(a) | {"dout": strided(dout), "tops": tops, "delta": delta}
    with on_device_of(a.q):
        dq, dslopes = _queries_backward(a, shared, dlse, "alibi_slopes" in grads.wanted)
        dk, dv = _keys_backward(a, shared)
    dsinks = None
    if a.sinks is not None:
        blind = tops == torch.inf
        weight = torch.exp(a.sinks.to(lse.dtype)[:, None] - lse.masked_fill(blind, 0)).masked_fill(blind, 0)
        dsinks = -(weight * delta).sum((0, 2))
    dslopes = None if dslopes is None else dslopes.sum(1)
    return {"q": dq, "k": dk, "v": dv, "alibi_slopes": dslopes, "sinks": dsinks}


def _row_sums(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    b, l, h, v_size = out.shape
    tops, delta = torch.empty_like(lse), torch.empty_like(lse)
    rows = 32
    if lse.numel():
        with on_device_of(out):
            tensors = out, lse, strided(dout), dlse, tops, delta
            sizes = {"H": h, "V": v_size, "ROWS": rows, "BLOCK_V": next_power_of_2(v_size)}
            kernels(__package__).row_sums[(-(-l // rows) * h * b,)](*tensors, l, **sizes, num_warps=4)
    return tops, delta


def _queries_backward(
    a: Any, shared: dict[str, Any], dlse: Tensor | None, slopes_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    b, l, h, _ = a.q.shape
    own = options("queries_backward", shared)
    tiles, where = places(a.cu_seqlens, l, shared["MASK_Q"], own["ROWS"])
    dq = a.q.new_empty(a.q.shape)
    dslopes = a.q.new_zeros((h, b * tiles), dtype=precision(a.q)) if slopes_wanted else None
    if dq.numel():
        kernels(__package__).queries_backward[(tiles * h * b,)](
            **settled(shared, own), **where, **query_lists(a), dlse=dlse, dq=dq, dslopes=dslopes, tiles=tiles
        )
    return dq, dslopes


def _keys_backward(a: Any, shared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    b, m, h_kv, _ = a.k.shape
    own = options("keys_backward", shared)
    parts = -(-shared["GROUP"] // HEADS)
    tiles, where = places(a.cu_seqlens_k, m, shared["MASK_K"], own["COLUMNS"])
    dk, dv = (x.new_empty((parts, *x.shape), dtype=precision(x) if parts > 1 else x.dtype) for x in (a.k, a.v))
    if dk.numel():
        fields = settled(shared, where, key_lists(a), {"tiles": tiles, "parts": parts, "HEADS": HEADS}, own)
        apart = max(shared["BLOCK_K"], shared["BLOCK_V"]) > 128
        for sums in ({"dk": dk, "dv": None}, {"dk": None, "dv": dv}) if apart else ({"dk": dk, "dv": dv},):
            kernels(__package__).keys_backward[(tiles * parts * h_kv * b,)](**fields, **sums)
    return _total(dk, a.k), _total(dv, a.v)


def _total(parts: Tensor, x: Tensor) -> Tensor:
    return parts.view(x.shape) if len(parts) == 1 else parts.sum(0).to(x.dtype)
