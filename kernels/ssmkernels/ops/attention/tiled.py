"""FlashAttention in PyTorch (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691).

No matrix of all logits is ever there. A tile of queries meets one tile of keys after another and carries along the
largest logit so far, the sum of exponentials, and the sum of values that they weigh (online softmax: Milakov and
Gimelshein 2018). The backward pass keeps but the log-sum-exp of each query, and computes each tile once more. Tiles
in which nothing is visible are never touched. See docs/attention.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision
from ssmkernels.ops.attention import hidden, reference
from ssmkernels.ops.attention._parts import LN2, LOG2E, Call, Part, parts
from ssmkernels.ops.attention._tiles import Lists, Tile


def compute(a: Any) -> tuple[Tensor, Tensor]:
    call = call_of(a)
    constants = a._replace(q=None, k=None, v=None, alibi_slopes=None, sinks=None, return_lse=True)

    def again(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        names = ("q", "k", "v", "alibi_slopes", "sinks")
        return reference.compute(constants._replace(**dict(zip(names, tensors[2:], strict=True))))

    out, lse = _Attention.apply(call, again, a.q, a.k, a.v, a.alibi_slopes, a.sinks)
    return out, lse if a.return_lse else lse.new_empty(0)


def call_of(a: Any) -> Call:
    """What all parts of a call have in common."""
    lists = None
    if a.block_offsets is not None:
        lists = Lists(a.block_offsets, a.block_columns, a.block_patterns, a.block_bits, dtype=precision(a.q))
    sequences = [(slice(0, a.q.shape[1]), slice(0, a.k.shape[1]))]
    if a.cu_seqlens is not None:
        both = zip(spans(a.cu_seqlens), spans(a.cu_seqlens_k), strict=True)
        sequences = [(queries, keys) for (_, queries), (_, keys) in both if queries.stop > queries.start]
    return Call(sequences, lists, a.left, a.right, a.scale, a.softcap, a.q_positions, a.k_positions)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        again: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        b, l, h, _ = q.shape
        wide = precision(q)
        out = torch.zeros(b, l, h, v.shape[3], dtype=wide, device=q.device)
        lse = torch.zeros(b, h, l, dtype=wide, device=q.device)
        for part in parts(call, q, k, alibi_slopes is not None):
            slopes, logits = (None if x is None else part.per_head(x) for x in (alibi_slopes, sinks))
            inputs = (part, part.rows(q), part.columns(k), part.columns(v), slopes, logits)
            part_out, part_lse = _forward(*inputs)
            if hidden.spread(part_out if part_out.numel() else part_lse):
                careful_out, careful_lse = _forward(*inputs, careful=True)
                part_out = hidden.repaired(part_out, careful_out)
                part_lse = torch.where(part_lse.isnan(), careful_lse, part_lse)
            part.put_rows(out, part_out)
            part.put_row_sums(lse, part_lse)
        ctx.call, ctx.again = call, again
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, alibi_slopes, sinks, out, lse)
        return out.to(q.dtype), lse

    @staticmethod
    @twice_differentiable(lambda ctx: (ctx.again, (None, None, *ctx.saved_tensors[:5])))
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, sinks, out, lse = ctx.saved_tensors
        return None, None, *gradients(ctx.call, q, k, v, slopes, sinks, out, lse, dout, dlse)


def gradients(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, slopes and sinks. ``out`` and ``lse`` may be over more keys than these."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dslopes, dsinks = (None if x is None else torch.zeros_like(x, dtype=precision(q)) for x in (alibi_slopes, sinks))
    for part in parts(call, q, k, alibi_slopes is not None):
        part_lse = part.row_sums(lse)
        part_lse = part_lse.masked_fill(part_lse == -torch.inf, 0)  # all of such a row is hidden
        do = part.rows(out) * 0 if dout is None else part.rows(dout)
        delta = (do * part.rows(out)).sum(-1)  # Σ_j p_ij (do_i · v_j), what the softmax takes off every logit
        if dlse is not None:
            delta -= part.row_sums(dlse)
        slopes = None if alibi_slopes is None else part.per_head(alibi_slopes)
        part_dq, part_dk, part_dv, part_dslopes = _backward(
            part, part.rows(q), part.columns(k), part.columns(v), slopes, do, part_lse, delta
        )
        part.put_rows(dq, part_dq)
        part.put_columns(dk, part_dk)
        part.put_columns(dv, part_dv)
        if dslopes is not None and part_dslopes is not None:
            dslopes[part.heads] += part_dslopes
        if dsinks is not None and sinks is not None:
            weight = torch.exp(part.per_row(part.per_head(sinks), slice(0, delta.shape[1])) - part_lse)
            dsinks[part.heads] -= part.sum_by_head(weight * delta)
    return dq, dk, dv, _like(dslopes, alibi_slopes), _like(dsinks, sinks)


def _like(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if grad is None or x is None else grad.to(x.dtype)


def _forward(
    part: Part,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    careful: bool = False,
) -> tuple[Tensor, Tensor]:
    """q (n r k), k (n c k), v (n c v) → out (n r v), lse (n r).

    Args:
        careful: keep NaN and infinity away from the rows that do not see them, at the price of a third product.
    """
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2])
    lowest = torch.finfo(q.dtype).min  # and not -∞, as -∞ less -∞ is NaN
    for rows, tiles in part.tiles():
        q_i = q[:, rows] * part.call.factor
        top = q.new_full(q_i.shape[:2], lowest)
        total, mean = torch.zeros_like(top), torch.zeros_like(out[:, rows])
        if sinks is not None:
            sinks_i = part.per_row(sinks * LOG2E, rows)
            top = sinks_i.clamp(min=lowest)
            total = torch.exp2(sinks_i - top)
        for tile in tiles:
            k_j, v_j = part.take(k, tile), part.take(v, tile)
            s = _logits(part, q_i, k_j, tile, slopes, careful)
            if careful:
                v_j, met = hidden.met(s != -torch.inf, v_j)
                mean.masked_fill_(met, torch.nan)
            higher = torch.maximum(top, s.amax(-1))
            p = s.sub_(higher[..., None]).exp2_()
            decay = torch.exp2(top - higher)
            total = total.mul_(decay).add_(p.sum(-1))
            mean = mean.mul_(decay[..., None]).baddbmm_(p, v_j)
            top = higher
        lse[:, rows] = (top + total.log2()) * LN2  # -∞ where nothing was seen
        out[:, rows] = mean / total.masked_fill(total == 0, 1)[..., None]
    return out, lse


def _backward(
    part: Part,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and slopes (h of the part), by computing every tile's weights again from ``lse``."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dslopes = None if slopes is None else torch.zeros_like(slopes)
    softcap, factor = part.call.softcap, part.call.factor
    unit = 1.0 if softcap > 0 else LN2  # what ``factor`` has too much
    for rows, tiles in part.tiles():
        q_i, do_i, lse_i, delta_i = q[:, rows] * factor, do[:, rows], lse[:, rows, None] * LOG2E, delta[:, rows, None]
        for tile in tiles:
            k_j, v_j = part.take(k, tile), part.take(v, tile)
            s = _logits(part, q_i, k_j, tile, slopes)
            tanh = torch.bmm(q_i, k_j.transpose(1, 2)).tanh_() if softcap > 0 else None
            p = s.sub_(lse_i).exp2_()
            part.add(dv, tile, p.transpose(1, 2), do_i)
            ds = torch.bmm(do_i, v_j.transpose(1, 2)).sub_(delta_i).mul_(p)
            if dslopes is not None and tile.far is not None:
                dslopes -= (part.spread(ds) * tile.far).sum((0, 2, 4))
            if tanh is not None:
                ds.mul_(tanh.square_().neg_().add_(1)).mul_(softcap)
            part.add(dk, tile, ds.transpose(1, 2), q_i)
            dq[:, rows].baddbmm_(ds, k_j)
    return dq.mul_(factor * unit), dk.mul_(unit), dv, None if dslopes is None else dslopes.flatten()


def _logits(part: Part, q: Tensor, k: Tensor, tile: Tile, slopes: Tensor | None, careful: bool = False) -> Tensor:
    """Of one tile, (n r c), to base 2, from queries that are scaled already; -∞ where a query does not see the key.

    Adding -∞ is fast and does not hide NaN. ``careful`` writes -∞ instead; so does a GPU, where both cost the same.
    """
    s = torch.bmm(q, k.transpose(1, 2))
    if part.call.softcap > 0:
        s.tanh_().mul_(part.call.softcap * LOG2E)
    if slopes is not None and tile.far is not None:
        part.spread(s).addcmul_(slopes[:, None, :, None] * LOG2E, tile.far, value=-1)
    if tile.bias is not None and (careful or s.device.type != "cpu"):
        part.spread(s).masked_fill_(tile.bias == -torch.inf, -torch.inf)
    elif tile.bias is not None:
        part.spread(s).add_(tile.bias)
    return s
