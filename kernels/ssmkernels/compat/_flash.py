"""What the functions of :mod:`ssmkernels.compat.flash_attn` do, but for that with a cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import attention
from ssmkernels.compat._dropout import dropping
from ssmkernels.compat._dtypes import INDICES, beside, int32_borders
from ssmkernels.core.packing import spans
from ssmkernels.core.validate import check_dtypes, check_options, check_shapes

Found = tuple[Tensor, Tensor, Tensor | None]  # the output, the log-sum-exp, and the weights where some are dropped


class NoRoomError(ValueError, RuntimeError):
    """Keys beyond a cache or its pages, for which flash_attn raises a RuntimeError."""


def dense(a: Any) -> Any:
    """As :func:`ssmkernels.compat.flash_attn.flash_attn_func`, from separate or packed tensors."""
    q, k, v = _unpacked(a, "b l", "b m")
    slopes = a.alibi_slopes
    check_shapes(a.op, {"q": (q, "b l h d"), "alibi_slopes": (slopes, "h | b h")}, ("q",))
    if slopes is None or slopes.ndim == 1:
        return _result(a, attend(a, q, k, v, slopes))
    rows = [attend(a, q[i : i + 1], k[i : i + 1], v[i : i + 1], each) for i, each in enumerate(slopes)]
    return _result(a, _joined(rows, (0, 0)) if rows else attend(a, q, k, v, None))


def varlen(a: Any) -> Any:
    """As :func:`ssmkernels.compat.flash_attn.flash_attn_varlen_func`, from separate or packed tensors."""
    paged = getattr(a, "block_table", None)
    q, k, v = _unpacked(a, "l", "m" if paged is None else "pages page_size")
    slopes = a.alibi_slopes
    names = ("cu_seqlens",) if hasattr(a, "cu_seqlens") else ("cu_seqlens_q", "cu_seqlens_k")
    lengths = (len(q), len(k) if paged is None else None)
    borders = [int32_borders(a.op, getattr(a, n), length, n) for n, length in zip(names, lengths, strict=False)]
    cu_q, cu_k = borders[0], borders[-1]
    shapes: dict[str, tuple[Any, str]] = {"q": (q, "l h d")}
    shapes |= {name: (cu, "b+1") for name, cu in zip(names, borders, strict=True)}
    shapes |= {"alibi_slopes": (slopes, "h | b h"), "block_table": (paged, "b blocks")}
    check_shapes(a.op, shapes, ("q",), b=len(cu_q) - 1)
    if paged is not None:
        k, v = (from_pages(a.op, t, paged, cu_k) for t in (k, v))
    parts: list[Found] = []
    each = slopes is not None and slopes.ndim == 2
    if each or a.dropout_p:
        of_sequences = slopes if each else [slopes] * (len(cu_q) - 1)
        parts = [
            attend(a, q[None, rows], k[None, columns], v[None, columns], its)
            for (_, rows), (_, columns), its in zip(spans(cu_q), spans(cu_k), of_sequences, strict=True)
        ]
    if parts:
        out, lse, weights = _joined(parts, (1, 2))
    else:
        out, lse, weights = attend(a, q[None], k[None], v[None], None if each else slopes, cu_q, cu_k)
    return _result(a, (out[0], lse[0], weights))


def attend(
    a: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Found:
    """Our attention with the options of a call."""
    window = window_of(a)
    dropout_p = getattr(a, "dropout_p", 0.0)
    found = attention(
        q if not dropout_p else q[:, :0],  # for the checks alone
        k,
        v,
        causal=a.causal,
        window=window,
        scale=a.softmax_scale,
        softcap=max(a.softcap, 0.0),
        alibi_slopes=beside(slopes, q),
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        return_lse=True,
        implementation=a.implementation,
    )
    assert isinstance(found, tuple)
    if not dropout_p:
        return (*found, None)
    window = (window[0], 0 if a.causal else window[1])
    return dropping(q, k, v, dropout_p, a.softmax_scale, window, a.softcap, slopes)


def from_pages(op: str, pages: Tensor, block_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The tokens of all sequences out of pages (pages page_size h d), packed: (total h d)."""
    check_dtypes(op, {"block_table": block_table}, INDICES)
    size, lengths = pages.shape[1], cu_seqlens.diff().long()
    room = block_table.shape[1] * size
    if len(lengths) and int(lengths.max()) > room:
        raise NoRoomError(f"{op}: `block_table` has room for {room} tokens a sequence; got {int(lengths.max())}")
    row = torch.arange(len(lengths), device=pages.device).repeat_interleave(lengths)
    place = torch.arange(len(row), device=pages.device) - cu_seqlens[row].long()
    page = block_table[row, place // size].long()
    if len(page) and not 0 <= int(page.min()) <= int(page.max()) < len(pages):
        raise ValueError(
            f"{op}: `block_table` must name pages 0 to {len(pages) - 1}; got {int(page.min())} to {int(page.max())}"
        )
    return pages[page, place % size]


def _unpacked(a: Any, queries: str, keys: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, however they came, and the checks of what all functions take."""
    check_options(a.op, "number", dropout_p=a.dropout_p, softcap=a.softcap)
    check_options(a.op, "bool", causal=a.causal, return_attn_probs=a.return_attn_probs)
    window_of(a)
    if not 0 <= a.dropout_p < 1:
        raise ValueError(f"{a.op}: `dropout_p` must be in [0, 1); got {a.dropout_p}")
    if hasattr(a, "qkv"):
        check_shapes(a.op, {"qkv": (a.qkv, f"{queries} three h d")}, ("qkv",), three=3)
        return a.qkv.unbind(-3)
    if hasattr(a, "kv"):
        check_shapes(a.op, {"q": (a.q, f"{queries} h d"), "kv": (a.kv, f"{keys} two h_kv d")}, ("q", "kv"), two=2)
        return (a.q, *a.kv.unbind(-3))
    shapes = {"q": (a.q, f"{queries} h d"), "k": (a.k, f"{keys} h_kv d"), "v": (a.v, f"{keys} h_kv v")}
    check_shapes(a.op, shapes, ("q", "k", "v"))
    return a.q, a.k, a.v


def window_of(a: Any) -> tuple[int, int]:
    """The window, a pair; what :func:`ssmkernels.attention` finds in it is for that to say.

    Raises:
        TypeError: it is none.
    """
    given = a.window_size.tolist() if isinstance(a.window_size, Tensor) else a.window_size
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(
            f"{a.op}: `window_size` must be two ints (left, right), -1 for no bound; got {a.window_size!r:.100}"
        )
    return given[0], given[1]


def _joined(parts: list[Found], dims: tuple[int, int]) -> Found:
    outs, lses, weights = zip(*parts, strict=True)
    padded = None
    if weights[0] is not None:
        l, m = (max(each.shape[dim] for each in weights) for dim in (2, 3))
        padded = torch.cat([F.pad(each, (0, m - each.shape[3], 0, l - each.shape[2])) for each in weights])
    return torch.cat(outs, dims[0]), torch.cat(lses, dims[1]), padded


def _result(a: Any, found: Found) -> Any:
    return found if a.return_attn_probs else found[0]
