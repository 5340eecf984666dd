"""Attention whose output and log-sum-exp are kept where the layer is computed again: it is computed once.

As in DistFlashAttn (Li et al. 2023, arXiv 2310.03294, section 3.3). The backward pass of attention needs of the forward
pass no more than its inputs, its output and its log-sum-exp, so that with these nothing goes over the cuts, and no
product of queries and keys is made, while a layer is computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.attention.partial import partial_gradients
from ssmzoo.parallel.blocks import of_sinks
from ssmzoo.parallel.line import Line

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Way(Protocol):
    """Attention of this process's queries, however it gets there."""

    line: Line

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output, in the precision of sums or the inputs' own, and log-sum-exp."""

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        out: Tensor,
        lse: Tensor,
        d_out: Tensor,
        d_lse: Tensor | None,
    ) -> Gradients:
        """Gradients of q, k, v and slopes; ``out`` and ``lse`` are over all keys, with sinks."""


def attended(
    way: Way, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q ``(l h k)``, k ``(m h_kv k)`` and v ``(m h_kv v)`` → out ``(l h v)`` and lse ``(h l)``."""
    out, lse, way.line.token = _Attend.apply(q, k, v, slopes, sinks, way.line.token, way)
    return out, lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Any, sinks: Any, token: Tensor, way: Way
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = way.line.once(lambda: way.forward(q, k, v, slopes, sinks))
        ctx.way = way
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, slopes, sinks, out, lse)
        return out.to(q.dtype, copy=True), lse.clone(), token.clone()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, token: Tensor | None) -> tuple[Any, ...]:
        q, k, v, slopes, sinks, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out, dtype=q.dtype) if d_out is None else d_out.contiguous()
        dq, dk, dv, d_slopes = ctx.way.backward(q, k, v, slopes, out, lse, d_out, d_lse)
        d_slopes = None if slopes is None else d_slopes.to(slopes.dtype)
        return dq, dk, dv, d_slopes, of_sinks(sinks, out, lse, d_out, d_lse), token, None


@dataclasses.dataclass
class Here:
    """Attention over keys that have come, by the op itself.

    Attributes:
        line: to the other processes.
        call: the op.
        given: its further arguments.
    """

    line: Line
    call: Callable[..., Any]
    given: Mapping[str, Any]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        per_head = {"alibi_slopes": slopes, "sinks": sinks}
        out, lse = self.call(**{**self.given, **per_head, "return_lse": True, "q": q[None], "k": k[None], "v": v[None]})
        return out[0], lse[0]

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        out: Tensor,
        lse: Tensor,
        d_out: Tensor,
        d_lse: Tensor | None,
    ) -> Gradients:
        left_out = ("q", "k", "v", "alibi_slopes", "sinks", "block_mask", "return_lse")
        options = {name: value for name, value in self.given.items() if name not in left_out}
        wide = out.to(precision(q))
        sums = None if d_lse is None else d_lse[None].contiguous()
        rows = (q[None], k[None], v[None], wide[None], lse[None], d_out[None], sums)
        found = partial_gradients(*rows, **options, alibi_slopes=slopes)
        dq, dk, dv = (found[name][0] for name in ("q", "k", "v"))  # type: ignore[index]
        return dq, dk, dv, found.get("alibi_slopes")
