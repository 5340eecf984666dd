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
from ssmzoo.parallel.inputs import Gradients, Inputs, Results
from ssmzoo.parallel.line import Line


class Way(Protocol):
    """Attention of this process's queries, however it gets there."""

    line: Line

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Output, in the precision of sums or the inputs' own, and log-sum-exp."""

    def backward(self, inputs: Inputs, results: Results) -> Gradients: ...


def attended(way: Way, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output ``(l h v)`` and log-sum-exp ``(h l)``."""
    out, lse, way.line.token = _Attend.apply(way, way.line.token, *inputs)
    return out, lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Way, token: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = Inputs(*tensors)
        out, lse = way.line.once(lambda: way.forward(inputs))
        ctx.way = way
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, out, lse)
        return out.to(inputs.q.dtype, copy=True), lse.clone(), token.clone()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, token: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        inputs = Inputs(*tensors)
        d_out = torch.zeros_like(out, dtype=inputs.q.dtype) if d_out is None else d_out.contiguous()
        results = Results(out, lse, d_out, d_lse)
        *found, d_slopes = ctx.way.backward(inputs, results)
        d_slopes = None if inputs.slopes is None else d_slopes.to(inputs.slopes.dtype)
        return None, token, *found, d_slopes, of_sinks(inputs.sinks, results)


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

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        per_head = {"alibi_slopes": inputs.slopes, "sinks": inputs.sinks}
        batch = {"q": inputs.q[None], "k": inputs.k[None], "v": inputs.v[None]}
        out, lse = self.call(**{**self.given, **per_head, "return_lse": True, **batch})
        return out[0], lse[0]

    def backward(self, inputs: Inputs, results: Results) -> Gradients:
        left_out = ("q", "k", "v", "alibi_slopes", "sinks", "block_mask", "return_lse")
        options = {name: value for name, value in self.given.items() if name not in left_out}
        (q, k, v, slopes, _), (out, lse, d_out, d_lse) = inputs, results
        sums = None if d_lse is None else d_lse[None].contiguous()
        wide = out.to(precision(q))
        rows = (q[None], k[None], v[None], wide[None], lse[None], d_out[None], sums)
        found = partial_gradients(*rows, **options, alibi_slopes=slopes)
        dq, dk, dv = (found[name][0] for name in ("q", "k", "v"))  # type: ignore[index]
        return dq, dk, dv, found.get("alibi_slopes")
