"""What a part of a sequence does to the state that enters it, for recurrences that are linear in their state.

Over a whole part the state S becomes ``M S + E``. E is the state that the part leaves when it starts from zero. M is
the product of the part's decays: numbers for a diagonal recurrence, a matrix for each head for delta rules. M does not
depend on values, and both are known without the state that enters, so that no part waits for another to compute them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.packing import spans
from ssmkernels.core.validate import precision

Given = Mapping[str, Any]  # the public arguments of an op, with cu_seqlens


@dataclasses.dataclass(frozen=True)
class Transition:
    """How to find M and E of an op's part, and how M acts.

    Attributes:
        state: the arguments → the shape of the state, and its dtype.
        shape: the arguments → the shape of M.
        found: the op and its arguments → E and M.
        applied: M and S → M S.
    """

    state: Callable[[Given], tuple[tuple[int, ...], torch.dtype]]
    shape: Callable[[Given], tuple[int, ...]]
    found: Callable[[Callable[..., Any], Given], tuple[Tensor, Tensor]]
    applied: Callable[[Tensor, Tensor], Tensor]


def sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum over each sequence of x ``(1, l, …)``: ``(s, …)``, in float32 (float64)."""
    return torch.segment_reduce(x[0].to(precision(x)), "sum", lengths=cu_seqlens.diff().long())


def products(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The product over each sequence of x ``(1, l, d)``, real or complex: ``(s, d)``."""
    return torch.stack([x[0, span].prod(0) for _, span in spans(cu_seqlens)])


def _diagonal(decay: Callable[[Given], Tensor], state: Any, shape: Any) -> Transition:
    """A recurrence whose state is multiplied by numbers; ``decay`` gives their products over each sequence."""

    def found(call: Callable[..., Any], given: Given) -> tuple[Tensor, Tensor]:
        return call(**given)[-1], decay(given)

    return Transition(state, shape, found, lambda M, S: M * S)


def _rows(given: Given) -> int:
    return int(given["cu_seqlens"].shape[0]) - 1


def _counts(given: Given) -> Tensor:
    return given["cu_seqlens"].diff()


# linear_recurrence


def _decay_of_channels(given: Given) -> Tensor:
    a, cu_seqlens = given["a"], given["cu_seqlens"]
    wide = a if a.is_complex() else a.to(precision(a))
    if a.ndim == 1:
        counts = _counts(given)[:, None]
        return torch.exp(wide * counts) if given["log_a"] else wide**counts
    if given["log_a"] and not a.is_complex():
        return torch.exp(sums(a, cu_seqlens))
    return products(wide.exp() if given["log_a"] else wide, cu_seqlens)


def _channels(given: Given) -> tuple[tuple[int, ...], torch.dtype]:
    b = given["b"]
    return (_rows(given), b.shape[-1]), b.dtype if b.is_complex() else precision(b)


# selective_scan


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ in float32 (float64)."""
    delta = delta.to(precision(delta))
    delta = delta if bias is None else delta + bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def _decay_of_scan(given: Given) -> Tensor:
    delta = _steps(given["delta"], given["delta_bias"], given["delta_softplus"])
    A = given["A"]
    return torch.exp(sums(delta, given["cu_seqlens"])[..., None] * (A if A.is_complex() else A.to(delta.dtype)))


def _scan(given: Given) -> tuple[tuple[int, ...], torch.dtype]:
    A, wide = given["A"], precision(given["u"])
    return (_rows(given), *A.shape), wide.to_complex() if A.is_complex() else wide


# ssd


def _decay_of_ssd(given: Given) -> Tensor:
    low, high = given["dt_limit"]
    dt = _steps(given["dt"], given["dt_bias"], given["dt_softplus"]).clamp(low, high)
    return torch.exp(sums(dt, given["cu_seqlens"]) * given["A"].to(dt.dtype))[..., None, None]


def _ssd(given: Given) -> tuple[tuple[int, ...], torch.dtype]:
    x = given["x"]
    return (_rows(given), *x.shape[2:], given["B"].shape[-1]), precision(x)


# linear_attention


def _decay_of_keys(given: Given) -> Tensor:
    log_decay, wide = given["log_decay"], precision(given["v"])
    if log_decay is None:
        return given["v"].new_ones(_rows(given), given["v"].shape[2], 1, 1, dtype=wide)
    if log_decay.ndim == 1:
        return torch.exp(log_decay.to(wide) * _counts(given)[:, None])[..., None, None]
    total = torch.exp(sums(log_decay, given["cu_seqlens"]).to(wide))
    return total[..., None] if log_decay.ndim == 4 else total[..., None, None]


def _keys_values(given: Given) -> tuple[tuple[int, ...], torch.dtype]:
    q, v = given["q"], given["v"]
    return (_rows(given), v.shape[2], q.shape[3], v.shape[3]), precision(v)


def _keys(given: Given) -> tuple[int, ...]:
    (rows, heads, keys, _), _ = _keys_values(given)
    log_decay = given["log_decay"]
    return (rows, heads, keys if log_decay is not None and log_decay.ndim == 4 else 1, 1)


# delta rules


def _of_matrices(call: Callable[..., Any], given: Given) -> tuple[Tensor, Tensor]:
    """E and M in one call: with values (v, 0) the state (0, I) becomes (E, M)."""
    (rows, heads, keys, values), wide = _keys_values(given)
    v = given["v"]
    before = v.new_zeros(rows, heads, keys, values + keys, dtype=wide)
    before[..., values:] = torch.eye(keys, dtype=wide, device=v.device)
    _, after = call(**{**given, "v": F.pad(v, (0, keys)), "initial_state": before})
    return after[..., :values], after[..., values:]


def _matrices(given: Given) -> tuple[int, ...]:
    (rows, heads, keys, _), _ = _keys_values(given)
    return (rows, heads, keys, keys)


_DELTA = Transition(_keys_values, _matrices, _of_matrices, torch.matmul)

# By the op's name.
TRANSITIONS = {
    "linear_recurrence": _diagonal(_decay_of_channels, _channels, lambda given: _channels(given)[0]),
    "selective_scan": _diagonal(_decay_of_scan, _scan, lambda given: _scan(given)[0]),
    "ssd": _diagonal(_decay_of_ssd, _ssd, lambda given: (*_ssd(given)[0][:2], 1, 1)),
    "linear_attention": _diagonal(_decay_of_keys, _keys_values, _keys),
    "delta_rule": _DELTA,
    "generalized_delta_rule": _DELTA,
}
