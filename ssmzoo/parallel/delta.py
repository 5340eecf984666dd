"""Both ends of a part of a sequence for delta rules, whose state is multiplied by matrices.

A step is ``S_t = A_t S_{t-1} + …``. A run of the op without gradients finds what a part leaves, and its matrix. What
its outputs ask of the state before it is a recurrence of the same kind from the last token to the first,
``G_{t-1} = A_tᵀ (G_t + scale q_t do_tᵀ)``. Each takes about as long as the op's forward pass. The backward pass, which
takes several times as long, runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ssmkernels.ops.delta_rule.asked import Rule, asked
from ssmkernels.ops.generalized_delta_rule.asked import asked as generalized
from ssmzoo.parallel.transitions import of_matrices

Given = Mapping[str, Any]


def found(call: Callable[..., Any], given: Given, first: bool) -> tuple[Tensor, Tensor]:
    """E and M of a part; of the first one the state after it, and no M."""
    if first:
        E = call(**given)[1]
        return E, E.new_zeros(*E.shape[:3], E.shape[2])
    (E,), (M,) = of_matrices(call, given)
    return E, M


def asked_of_delta_rule(given: Given, grad: Tensor) -> Tensor:
    """F, the gradient of the state before the part, ``(s h k v)``."""
    beta, log_decay, scale = given["beta"], given["log_decay"], given["scale"]
    return asked(Rule(given["q"], given["k"], grad, beta, log_decay, scale, given["cu_seqlens"]))


def asked_of_generalized(given: Given, grad: Tensor) -> Tensor:
    """Likewise of the generalised delta rule."""
    a, b, log_decay, scale = given["a"], given["b"], given["log_decay"], given["scale"]
    return generalized(given["q"], grad, a, b, log_decay, scale, given["cu_seqlens"])
