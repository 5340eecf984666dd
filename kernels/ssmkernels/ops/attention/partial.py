"""Attention over some of the keys, and its gradients where the output is over more of them.

A query's output over all keys is the mean of those over parts of them, weighted by their exponentials
(:func:`~ssmkernels.ops.attention.merge.merge_attention`). The weight of key j in the output over all,
p_ij = exp(s_ij - lse_i), needs of the other keys no more than lse_i, and so do the gradients::

    D_i = Σ_j p_ij (d_out_i · v_j) = d_out_i · out_i,   d_s_ij = p_ij (d_out_i · v_j - D_i + d_lse_i)

With ``out`` and ``lse`` over all keys, the backward pass of any kernel gives what these keys take part in (Liu,
Zaharia and Abbeel 2023, arXiv 2310.01889).
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ssmkernels.core.dispatch import looked_at
from ssmkernels.core.validate import HALF
from ssmkernels.ops.attention import attention, tiled

KERNELS = ("cpu", "triton")


def partial_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    **options: Any,
) -> dict[str, Tensor | None]:
    """Gradients of q, k, v and ``alibi_slopes``, by these names, as far as these keys take part in the output.

    Args:
        q, k, v: queries ``(b, l, h, k)``, and the keys and values of a part, ``(b, m, h_kv, k)`` and ``(b, m, h_kv,
            v)``.
        out: over all keys, ``(b, l, h, v)``, float32 (float64).
        lse: likewise, ``(b, h, l)``.
        d_out: gradient of ``out``, in q's dtype.
        d_lse: gradient of ``lse``; None for zeros.
        options: further arguments of :func:`~ssmkernels.attention`, without ``sinks``, ``block_mask`` and
            ``return_lse``.
    """
    seen = looked_at(attention, q, k, v, return_lse=True, **options)
    name, a = seen.explanation.chosen, seen.arguments
    if name not in KERNELS:
        found = tiled.gradients(tiled.call_of(a), q, k, v, a.alibi_slopes, None, out, lse, d_out, d_lse)
        return dict(zip(("q", "k", "v", "alibi_slopes"), found, strict=False))
    half = q.dtype in HALF
    wanted = ["q", "k", "v"] + ["alibi_slopes"] * (a.alibi_slopes is not None)
    out, lse = out.contiguous(), lse.contiguous()  # as the kernels save them
    saved = SimpleNamespace(out=out.to(q.dtype), exact=out if half else out.new_empty(0), logsums=lse, lse=lse)
    grads = SimpleNamespace(out=d_out, lse=d_lse, wanted=wanted)
    module = importlib.import_module(f"ssmkernels.ops.attention.{name}")
    return {name: found for name, found in module.backward(a, saved, grads).items() if name != "sinks"}
