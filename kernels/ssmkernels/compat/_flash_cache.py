"""What :func:`ssmkernels.compat.flash_attn.flash_attn_with_kvcache` does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import decode_attention
from ssmkernels.compat._dtypes import INDICES, beside
from ssmkernels.compat._flash import NoRoomError, attend, from_pages, window_of
from ssmkernels.compat._rotary import turned
from ssmkernels.core.validate import check_dtypes, check_options, check_same_dtype, check_shapes


@torch.no_grad()
def with_cache(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`ssmkernels.compat.flash_attn.flash_attn_with_kvcache`."""
    sizes = _check(a)
    (b, l), device = a.q.shape[:2], a.q.device
    size, room = a.k_cache.shape[1], a.k_cache.shape[1] * (1 if a.block_table is None else a.block_table.shape[1])
    # A row of a whole cache is one page, as long as the row.
    rows = torch.arange(b, device=device) if a.cache_batch_idx is None else a.cache_batch_idx
    table = (rows[:, None] if a.block_table is None else a.block_table).long()
    before = torch.full((b,), room, device=device) if a.cache_seqlens is None else a.cache_seqlens
    before = torch.full((b,), before, device=device) if isinstance(before, int) else before.long()
    new = 0 if a.k is None else a.k.shape[1]
    lengths = before + new
    if b and not 0 <= int(before.min()) <= int(lengths.max()) <= room:
        name = "the cache" if a.block_table is None else "`block_table`"
        raise NoRoomError(
            f"{a.op}: {name} has room for {room} tokens of a sequence; `cache_seqlens` and `k` make {lengths.max()}"
        )
    _check_places(a, table, lengths, size)
    q, k = a.q, a.k
    if a.rotary_cos is not None:
        still = not a.causal and window_of(a) == (-1, -1)
        step = torch.arange(max(l, new), device=device)
        q = _turned(a, q, before[:, None] + (0 * step[:l] if still else step[:l]))
        k = _turned(a, k, before[:, None] + step[:new])
    if k is not None:
        place = before[:, None] + torch.arange(new, device=device)
        page = table.gather(1, place // size)
        a.k_cache[page, place % size] = k
        a.v_cache[page, place % size] = a.v
    out, lse = _attended(a, q, table, lengths, sizes["h"])
    return (out, lse) if a.return_softmax_lse else out


def _attended(a: Any, q: Tensor, table: Tensor, lengths: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Attention over the cache: where it can be read in place, there; else over a packed copy."""
    (b, l), (left, right) = q.shape[:2], window_of(a)
    slopes = a.alibi_slopes
    looks_back = a.causal or right == 0 or l == 1
    sees_all = not a.causal and left == right == -1 and slopes is None
    if a.cache_leftpad is None and (slopes is None or slopes.ndim == 1) and (looks_back or sees_all):
        if not looks_back:  # each query is as the last of its sequence
            q = q.reshape(b * l, 1, *q.shape[2:])
            table, lengths = table.repeat_interleave(l, 0), lengths.repeat_interleave(l)
        found = decode_attention(
            q,
            a.k_cache,
            a.v_cache,
            lengths.int(),
            block_table=table.int(),
            window=(left, -1),
            scale=a.softmax_scale,
            softcap=max(a.softcap, 0.0),
            alibi_slopes=beside(slopes, q),
            return_lse=True,
            implementation=a.implementation,
        )
        assert isinstance(found, tuple)
        out, lse = found
        lse = lse.reshape(b, 1 if looks_back else l, heads, lse.shape[-1])
        return out.reshape(b, l, *out.shape[2:]), lse.transpose(1, 2).flatten(2)
    outs = []
    for i in range(b):
        each = slice(i, i + 1)
        borders = F.pad(lengths[each], (1, 0)).int()
        start = 0 if a.cache_leftpad is None else int(a.cache_leftpad[i])
        k, v = (from_pages(a.op, t, table[each], borders)[None, start:] for t in (a.k_cache, a.v_cache))
        outs.append(attend(a, q[each], k, v, slopes if slopes is None or slopes.ndim == 1 else slopes[i])[:2])
    if not outs:
        return torch.empty_like(q), q.new_empty(0, heads, l, dtype=torch.float32)
    return torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs])


def _turned(a: Any, x: Tensor, place: Tensor) -> Tensor:
    """x (b n h d) with its first channels turned by the angles of its places (b n)."""
    return turned(a.op, x, a.rotary_cos, a.rotary_sin, place, a.rotary_interleaved)


def _check_places(a: Any, table: Tensor, lengths: Tensor, size: int) -> None:
    """Checks the pages (b blocks) that hold tokens of sequences of these lengths, and where these begin.

    Raises:
        ValueError: naming the argument.
    """
    name = "cache_batch_idx" if a.block_table is None else "block_table"
    used = table[size * torch.arange(table.shape[1], device=table.device) < lengths[:, None]]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < len(a.k_cache):
        raise ValueError(
            f"{a.op}: `{name}` must be between 0 and {len(a.k_cache) - 1}; got {int(used.min())} to {int(used.max())}"
        )
    left = a.cache_leftpad
    if left is not None and not bool(((left >= 0) & (left <= lengths)).all()):
        raise ValueError(
            f"{a.op}: `cache_leftpad` must be between 0 and the lengths {lengths.tolist()}; got {left.tolist()}"
        )


def _check(a: Any) -> dict[str, int]:
    """Kinds and shapes; returns the sizes.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    rows = "rows m" if a.block_table is None else "pages page_size"
    cached = a.cache_seqlens if isinstance(a.cache_seqlens, Tensor) else None
    indices = {"cache_batch_idx": a.cache_batch_idx, "cache_leftpad": a.cache_leftpad, "cache_seqlens": cached}
    sizes = check_shapes(
        a.op,
        {
            "q": (a.q, "b l h d"),
            "k_cache": (a.k_cache, f"{rows} h_kv d"),
            "v_cache": (a.v_cache, f"{rows} h_kv v"),
            "k": (a.k, "b n h_kv d"),
            "v": (a.v, "b n h_kv v"),
            "rotary_cos": (a.rotary_cos, "positions half"),
            "rotary_sin": (a.rotary_sin, "positions half"),
            **{name: (t, "b") for name, t in indices.items()},
            "block_table": (a.block_table, "b blocks"),
            "alibi_slopes": (a.alibi_slopes, "h | b h"),
        },
        ("q", "k_cache", "v_cache"),
    )
    check_dtypes(a.op, {**indices, "block_table": a.block_table}, INDICES)
    check_same_dtype(a.op, {name: getattr(a, name) for name in ("q", "k_cache", "v_cache", "k", "v")})
    window_of(a)
    flags = {name: getattr(a, name) for name in ("causal", "rotary_interleaved", "return_softmax_lse")}
    check_options(a.op, "bool", **flags)
    if cached is None and a.cache_seqlens is not None:
        check_options(a.op, "int", cache_seqlens=a.cache_seqlens)
    for one, other in (("k", "v"), ("rotary_cos", "rotary_sin")):
        if (getattr(a, one) is None) != (getattr(a, other) is None):
            raise ValueError(f"{a.op}: give `{one}` and `{other}`, or neither of them")
    if a.rotary_cos is not None and a.k is None:
        raise ValueError(f"{a.op}: `rotary_cos` needs `k` and `v`, the new tokens; got None")
    if a.block_table is not None and (a.cache_batch_idx is not None or a.cache_leftpad is not None):
        name = "cache_batch_idx" if a.cache_leftpad is None else "cache_leftpad"
        raise ValueError(f"{a.op}: `{name}` goes with whole caches; got `block_table` as well")
    if a.block_table is None and a.cache_batch_idx is None and len(a.k_cache) < len(a.q):
        raise ValueError(f"{a.op}: `k_cache` must have {len(a.q)} rows, as `q`; got {len(a.k_cache)}")
    return sizes
