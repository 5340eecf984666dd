"""What the outputs of a part of a sequence ask of the state before it: the gradient of the delta rule's first state.

With G_t the gradient of the state after token t, the gradient before it is a recurrence from the last token to the
first, of as many operations as the rule itself::

    G_{t-1} = diag(α_t) (I - β_t k_t k_tᵀ) (G_t + scale q_t do_tᵀ)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.core.plain import readable
from ssmkernels.core.validate import precision
from ssmkernels.ops.delta_rule.cpu_arguments import values
from ssmkernels.ops.generalized_delta_rule.asked import asked as generalized


class Rule(NamedTuple):
    """Arguments of :func:`~ssmkernels.delta_rule` over packed sequences; ``v`` is the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    scale: float | None
    cu_seqlens: Tensor


def asked(rule: Rule) -> Tensor:
    """The gradient of each sequence's first state, ``(s h k v)``, in float32 (float64)."""
    shape = (len(rule.cu_seqlens) - 1, rule.v.shape[2], rule.k.shape[3], rule.v.shape[3])
    if native.missing() is not None or not readable(rule.v) or rule.v.device.type != "cpu" or 0 in shape:
        return _plain(rule)
    found = rule.q.new_empty(shape, dtype=precision(rule.q))
    fields, _kept = values(rule, {"final_state": found}, None, rule.cu_seqlens)
    native.run("delta_rule_asked", fields)
    return found


def _plain(rule: Rule) -> Tensor:
    """By the generalised delta rule: ``A_t = diag(α) - β k (α ∘ k)ᵀ``."""
    wide, heads = precision(rule.q), rule.v.shape[2] // rule.k.shape[2]
    q, k = (t.to(wide).repeat_interleave(heads, 2) for t in (rule.q, rule.k))
    a, b, log_decay = k, -rule.beta.to(wide)[..., None] * k, rule.log_decay
    if log_decay is not None:
        log_decay = (log_decay if log_decay.ndim == 4 else log_decay[..., None]).to(wide).expand(k.shape)
        a = k * torch.exp(log_decay)
    return generalized(q, rule.v, a, b, log_decay, rule.scale, rule.cu_seqlens)
