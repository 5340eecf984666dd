"""What the outputs of a part of a sequence ask of the state before it: the gradient of the rule's first state.

With ``A_t = diag(exp(log_decay_t)) + b_t a_tᵀ`` and G_t the gradient of the state after token t, the gradient before it
is a recurrence of the same kind, from the last token to the first: ``G_{t-1} = A_tᵀ (G_t + scale q_t do_tᵀ)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmkernels.core.validate import precision
from ssmkernels.ops.generalized_delta_rule import generalized_delta_rule


def asked(
    q: Tensor, grad: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None, scale: float | None, cu_seqlens: Tensor
) -> Tensor:
    """The gradient of each packed sequence's first state, ``(s h k v)``, in float32 (float64).

    Args:
        q, a, b, log_decay, scale, cu_seqlens: those of :func:`~ssmkernels.generalized_delta_rule`.
        grad: the gradient of its output, ``(1 l h v)``.
    """
    wide = precision(q)
    q, grad, a, b = (t.to(wide) for t in (q, grad, a, b))
    kept, decay = q, None
    if log_decay is not None:
        decay = log_decay.to(wide)
        kept = q * torch.exp(decay)
    key = (q.shape[-1] ** -0.5 if scale is None else scale) * (
        kept + a * (b * q).sum(-1, keepdim=True)
    )  # scale A_tᵀ q_t
    back_key, grad, a, b = (t.flip(1) for t in (key, grad, a, b))
    back_decay = None if decay is None else decay.flip(1)
    borders = (cu_seqlens[-1] - cu_seqlens).flip(0)
    _, found = generalized_delta_rule(
        back_key, back_key, grad, b, a, back_decay, return_final_state=True, cu_seqlens=borders
    )
    return found.flip(0)
