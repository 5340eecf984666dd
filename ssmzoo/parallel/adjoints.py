"""Both ends of a part of a sequence, for recurrences that are linear in their state.

Over a part the state S becomes ``M S + E`` (:mod:`ssmzoo.parallel.transitions`), and its gradient G becomes ``M G +
F`` the other way. With P_t the product of the decays up to token t and k_t v_tᵀ what it adds to the state, of which
q_t reads the output::

    E = Σ_t (M / P_t) k_t v_tᵀ,   F = Σ_t P_t q_t d_o_tᵀ

Both are sums over the part, and no recurrence. They take a fraction of the time of the op, which therefore runs once,
from the true state before the part and, backward, from the true gradient of the state after it. Delta rules multiply
the state by matrices: :mod:`ssmzoo.parallel.delta`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision
from ssmkernels.ops.selective_scan.ends import Walk, after, ends
from ssmkernels.ops.ssd.reference import step_size
from ssmzoo.parallel import delta
from ssmzoo.parallel.left import outer

Given = Mapping[str, Any]


class Adjoint(NamedTuple):
    """What is summed, for one op.

    Attributes:
        can: whether this holds for a call's arguments.
        found: the op, its arguments, and whether the part is the first → E and M, ``(s, …)``. M broadcasts against E,
            or its matrices multiply E's.
        asked: the arguments and the gradient of the output → F, as E.
        matrices: whether M is of matrices. Of the first part, E is then what comes of its initial state, and M is 0.
    """

    can: Callable[[Given], bool]
    found: Callable[[Callable[..., Any], Given, bool], tuple[Tensor, Tensor]]
    asked: Callable[[Given, Tensor], Tensor]
    matrices: bool = False

    def forth(self, E: Tensor, M: Tensor, S: Tensor) -> Tensor:
        """M S + E."""
        return E + M @ S if self.matrices else torch.addcmul(E, M, S)

    def back(self, F: Tensor, M: Tensor, G: Tensor) -> Tensor:
        """Mᵀ G + F."""
        return F + M.mT @ G if self.matrices else torch.addcmul(F, M, G)


def _gated(grad: Tensor, z: Tensor | None, wide: torch.dtype) -> Tensor:
    """The gradient of what the gate multiplies."""
    return grad.to(wide) if z is None else grad.to(wide) * F.silu(z.to(wide))


# ssd


def _log_decays(given: Given) -> tuple[Tensor, Tensor]:
    """Δ and Δ A, (l h)."""
    dt = step_size(given["dt"][0], given["dt_bias"], given["dt_softplus"], given["dt_limit"])
    return dt, dt * given["A"].to(dt.dtype)


def _by_groups(x: Tensor, maps: Tensor) -> Tensor:
    """Σ_t x_t mapsᵗ: x (l h p), maps (l g n) → (h p n)."""
    (l, h, p), (g, n) = x.shape, maps.shape[1:]
    rows = x.reshape(l, g, h // g * p).permute(1, 2, 0)
    return torch.bmm(rows, maps.to(x.dtype).transpose(0, 1)).view(h, p, n)


def _of_ssd(call: Callable[..., Any], given: Given, first: bool) -> tuple[Tensor, Tensor]:
    x, wide = given["x"][0], precision(given["x"])
    dt, log_decay = _log_decays(given)
    E, M = [], []
    for _, span in spans(given["cu_seqlens"]):
        weight = torch.exp(after(log_decay[span])) * dt[span]
        E.append(_by_groups(x[span].to(wide) * weight[..., None], given["B"][0, span]))
        M.append(torch.exp(log_decay[span].sum(0)))
    return torch.stack(E), torch.stack(M)[..., None, None]


def _asked_of_ssd(given: Given, grad: Tensor) -> Tensor:
    grad = _gated(grad, given["z"], precision(given["x"]))[0]
    _, log_decay = _log_decays(given)
    found = []
    for _, span in spans(given["cu_seqlens"]):
        weight = torch.exp(log_decay[span].cumsum(0))
        found.append(_by_groups(grad[span] * weight[..., None], given["C"][0, span]))
    return torch.stack(found)


# linear_attention


def _log_decay(given: Given, span: slice) -> Tensor:
    """(l h 1) or (l h k)."""
    log_decay, v = given["log_decay"], given["v"][0, span]
    if log_decay is None:
        return v.new_zeros(*v.shape[:2], 1, dtype=precision(v))
    log_decay = log_decay.to(precision(v))
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(v.shape[:2])
    else:
        log_decay = log_decay[0, span]
    return log_decay if log_decay.ndim == 3 else log_decay[..., None]


def _per_head(x: Tensor, v: Tensor) -> Tensor:
    """(l g k) → (l h k), in the precision of sums."""
    return x.to(precision(v)).repeat_interleave(v.shape[1] // x.shape[1], 1)


def _of_linear_attention(call: Callable[..., Any], given: Given, first: bool) -> tuple[Tensor, Tensor]:
    E, M = [], []
    for _, span in spans(given["cu_seqlens"]):
        k, v, log_decay = given["k"][0, span], given["v"][0, span], _log_decay(given, span)
        E.append(outer(_per_head(k, v) * torch.exp(after(log_decay)), v))
        M.append(torch.exp(log_decay.sum(0)))
    return torch.stack(E), torch.stack(M)[..., None]


def _asked_of_linear_attention(given: Given, grad: Tensor) -> Tensor:
    scale = given["k"].shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    found = []
    for _, span in spans(given["cu_seqlens"]):
        q, v = given["q"][0, span], given["v"][0, span]
        found.append(scale * outer(_per_head(q, v) * torch.exp(_log_decay(given, span).cumsum(0)), grad[0, span]))
    return torch.stack(found)


# selective_scan


def _walk(given: Given, inputs: Tensor, maps: str, backward: bool) -> tuple[Tensor, Tensor]:
    walk = Walk(given["delta"], given["delta_bias"], given["delta_softplus"], given["A"], given["cu_seqlens"])
    return ends(walk, inputs, given[maps], backward)


def _asked_of_scan(given: Given, grad: Tensor) -> Tensor:
    return _walk(given, _gated(grad, given["z"], precision(given["u"])), "C", backward=False)[0]


ADJOINTS = {
    "ssd": Adjoint(lambda given: True, _of_ssd, _asked_of_ssd),
    "linear_attention": Adjoint(lambda given: given["bonus"] is None, _of_linear_attention, _asked_of_linear_attention),
    "selective_scan": Adjoint(
        lambda given: not given["A"].is_complex() and given["B"].ndim > 2 and given["C"].ndim > 2,
        lambda call, given, first: _walk(given, given["u"], "B", backward=True),
        _asked_of_scan,
    ),
    "delta_rule": Adjoint(lambda given: True, delta.found, delta.asked_of_delta_rule, matrices=True),
    "generalized_delta_rule": Adjoint(lambda given: True, delta.found, delta.asked_of_generalized, matrices=True),
}
