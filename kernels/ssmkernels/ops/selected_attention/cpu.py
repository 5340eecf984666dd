"""Attention to selected blocks in the native CPU library: products of a block's keys with those who selected it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import address, missing, plain, rows, wrong_device
from ssmkernels.ops.selected_attention import tiled

__all__ = ["SAVES", "backward", "checked", "empty", "forward", "missing", "unsupported"]

SAVES, empty, checked = tiled.SAVES, tiled.empty, tiled.checked

PARTS = 8  # of the queries, at most, that have gradients of keys and values of their own
LEAST = 1024  # queries of such a part


def unsupported(a: Any) -> str | None:
    return wrong_device(a) or ("no heads or head dim" if 0 in (*a.k.shape[2:], *a.v.shape[2:]) else None)


def forward(a: Any, save: bool) -> tuple[Tensor, ...]:
    out, lse, exact, sums = found = empty(a, save)
    results = {name: t if t.numel() else None for name, t in (("exact", exact), ("lse", lse), ("sums", sums))}
    fields, _kept = _fields(a, 2, out=out, **results)
    native.run("selected_attention", fields)
    return found


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor]:
    wide, (b, l, g, _), (m, h_kv) = precision(a.q), a.blocks.shape, a.k.shape[1:3]
    out = saved.exact if saved.exact.numel() else saved.out
    parts = max(1, min(PARTS // g, l // LEAST))
    d_out = plain(grads.out, a.q.dtype)
    d_lse = plain(grads.lse, wide) if a.return_lse and grads.lse is not None else None
    dq = a.q.new_empty(a.q.shape)
    dk, dv = (t.new_zeros(parts, b, g, m, t.shape[3], dtype=wide) for t in (a.k, a.v))
    fields, _kept = _fields(a, 5, out=out, exact=None, lse=None, sums=saved.logsums)
    tensors = {"d_out": d_out, "d_lse": d_lse, "dq": dq, "dk": dk, "dv": dv}
    fields |= {"out_dtype": native.DTYPES[out.dtype], "parts": parts}
    native.run("selected_attention_backward", fields | {name: address(t) for name, t in tensors.items()})
    return {"q": dq, "k": _of_heads(dk, h_kv), "v": _of_heads(dv, h_kv)}


def _fields(a: Any, products: int, **results: Tensor | None) -> tuple[dict[str, float], list[Any]]:
    """What both kernels take, and the tensors that it points into."""
    q, k, v, blocks = rows(a.q), rows(a.k), rows(a.v), a.blocks.contiguous()
    (b, l, h, k_size), (m, h_kv, v_size), (g, n) = q.shape, v.shape[1:], blocks.shape[2:]
    kept = {"q": q, "k": k, "v": v, "blocks": blocks, **results}
    fields: dict[str, float] = {name: address(t) for name, t in kept.items()}
    fields |= {"dtype": native.DTYPES[q.dtype], "batch": b, "l": l, "m": m, "h": h, "h_kv": h_kv, "g": g, "n": n}
    fields |= {"k_size": k_size, "v_size": v_size, "block_size": a.block_size, "scale": a.scale}
    fields["threads"] = native.threads(b * l * h * min(m, n * a.block_size) * max(k_size, v_size) * products)
    for name, t in (("q", q), ("k", k), ("v", v)):
        fields |= dict(zip((f"{name}_batch", f"{name}_time", f"{name}_head"), t.stride()[:3], strict=True))
    return fields, list(kept.values())


def _of_heads(x: Tensor, h_kv: int) -> Tensor:
    """Gradients (parts b g m d) of each part and selecting head → (b m h_kv d)."""
    x = x.unflatten(2, (h_kv, -1))
    x = x[0, :, :, 0] if x.shape[0] == x.shape[3] == 1 else x.sum((0, 3))
    return x.transpose(1, 2).contiguous()
