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
from ssmzoo.parallel.left import of_mamba3, of_mlstm

Given = Mapping[str, Any]  # the public arguments of an op, with cu_seqlens
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transition:
    """How to find E and M of an op's part, and what they do to a state; each of these is a list of tensors ``(s, …)``.

    Attributes:
        like: the arguments → shapes of E, which are those of the state, and of M; and the dtype of all.
        found: the op and its arguments, without an initial state → E and M.
        joined: E, M and S → ``M S + E``.
        enters: the arguments that hold S; others that are part of a state are known before.
        summed: whether E is a sum over the part (:mod:`ssmzoo.parallel.left`), which takes no run of the op.
    """

    like: Callable[[Given], tuple[list[Shape], list[Shape], torch.dtype]]
    found: Callable[[Callable[..., Any], Given], tuple[list[Tensor], list[Tensor]]]
    joined: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]
    enters: tuple[str, ...] = ("initial_state",)
    summed: bool = False


def sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum over each sequence of x ``(1, l, …)``: ``(s, …)``, in float32 (float64)."""
    return torch.segment_reduce(x[0].to(precision(x)), "sum", lengths=cu_seqlens.diff().long())


def products(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The product over each sequence of x ``(1, l, d)``, real or complex: ``(s, d)``."""
    return torch.stack([x[0, span].prod(0) for _, span in spans(cu_seqlens)])


def _diagonal(
    decay: Callable[[Given], Tensor],
    state: Callable[[Given], tuple[Shape, torch.dtype]],
    decays: Callable[[Given], Shape],
) -> Transition:
    """A recurrence whose state is multiplied by numbers; ``decay`` gives their products over each sequence."""

    def like(given: Given) -> tuple[list[Shape], list[Shape], torch.dtype]:
        shape, dtype = state(given)
        return [shape], [decays(given)], dtype

    def found(call: Callable[..., Any], given: Given) -> tuple[list[Tensor], list[Tensor]]:
        return [call(**given)[-1]], [decay(given)]

    return Transition(like, found, lambda E, M, S: [M[0] * S[0] + E[0]])


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


def _channels(given: Given) -> tuple[Shape, torch.dtype]:
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


def _scan(given: Given) -> tuple[Shape, torch.dtype]:
    A, wide = given["A"], precision(given["u"])
    return (_rows(given), *A.shape), wide.to_complex() if A.is_complex() else wide


# ssd


def _decay_of_ssd(given: Given) -> Tensor:
    low, high = given["dt_limit"]
    dt = _steps(given["dt"], given["dt_bias"], given["dt_softplus"]).clamp(low, high)
    return torch.exp(sums(dt, given["cu_seqlens"]) * given["A"].to(dt.dtype))[..., None, None]


def _ssd(given: Given) -> tuple[Shape, torch.dtype]:
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


def _keys_values(given: Given) -> tuple[Shape, torch.dtype]:
    q, v = given["q"], given["v"]
    return (_rows(given), v.shape[2], q.shape[3], v.shape[3]), precision(v)


def _keys(given: Given) -> Shape:
    (rows, heads, keys, _), _ = _keys_values(given)
    log_decay = given["log_decay"]
    return (rows, heads, keys if log_decay is not None and log_decay.ndim == 4 else 1, 1)


# delta rules


def of_matrices(call: Callable[..., Any], given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """E and M in one call: with values (v, 0) the state (0, I) becomes (E, M)."""
    (rows, heads, keys, values), wide = _keys_values(given)
    v = given["v"]
    before = v.new_zeros(rows, heads, keys, values + keys, dtype=wide)
    before[..., values:] = torch.eye(keys, dtype=wide, device=v.device)
    _, after = call(**{**given, "v": F.pad(v, (0, keys)), "initial_state": before})
    return [after[..., :values]], [after[..., values:]]


def _matrices(given: Given) -> tuple[list[Shape], list[Shape], torch.dtype]:
    shape, dtype = _keys_values(given)
    return [shape], [(*shape[:3], shape[2])], dtype


_DELTA = Transition(_matrices, of_matrices, lambda E, M, S: [M[0] @ S[0] + E[0]])


# mlstm: C and n are exp(-m) times sums that are linear, and m is the larger of what came before and of the part's own


def _memory(given: Given) -> tuple[list[Shape], list[Shape], torch.dtype]:
    (rows, heads, keys, values), wide = _keys_values(given)
    return [(rows, heads, keys, values), (rows, heads, keys), (rows, heads)], [(rows, heads)], wide


def _of_memory(_: Callable[..., Any], given: Given) -> tuple[list[Tensor], list[Tensor]]:
    gates = F.logsigmoid(given["f"].to(precision(given["v"])))
    return of_mlstm(given), [sums(gates, given["cu_seqlens"])]


def _remembered(E: list[Tensor], M: list[Tensor], S: list[Tensor]) -> list[Tensor]:
    before = M[0] + S[2]
    m = torch.maximum(before, E[2])
    kept, new = torch.exp(before - m)[..., None], torch.exp(E[2] - m)[..., None]
    return [kept[..., None] * S[0] + new[..., None] * E[0], kept * S[1] + new * E[1], m]


# mamba3_scan: also the last key and value, of which the next step takes in a share


def _rotating(given: Given) -> tuple[list[Shape], list[Shape], torch.dtype]:
    rows, (rank, heads, width), n = _rows(given), given["x"].shape[2:], given["B"].shape[-1]
    state = [(rows, heads, width, n), (rows, heads, given["angles"].shape[-1])]
    state += [(rows, rank, heads, n), (rows, rank, heads, width)]
    return state, [(rows, heads)] * 3, precision(given["x"])


def _of_rotating(_: Callable[..., Any], given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """M: the decay, the share of the first step in what came before, and whether there is a step at all."""
    dt, cu_seqlens = given["dt"].to(precision(given["dt"])), given["cu_seqlens"]
    decay = torch.exp(sums(dt * given["A"].to(dt.dtype), cu_seqlens))
    some = (cu_seqlens.diff() > 0)[:, None].expand_as(decay)
    shares = F.pad((1 - given["trap"].to(dt.dtype)) * dt, (0, 0, 0, 1))[0]  # one more for sequences without a step
    return of_mamba3(given), [decay, shares[cu_seqlens[:-1].long()] * some, some.to(dt.dtype)]


def _turned(E: list[Tensor], M: list[Tensor], S: list[Tensor]) -> list[Tensor]:
    state, _, key, value = S
    decay, share, some = M
    last = torch.einsum("srhp,srhn->shpn", value, key)
    some = some[:, None, :, None]
    carried = [new * some + old * (1 - some) for new, old in ((E[2], key), (E[3], value))]
    return [decay[..., None, None] * (state + share[..., None, None] * last) + E[0], E[1], *carried]


def turns(given: Given) -> Tensor:
    """How far the maps of ``mamba3_scan`` turn over a part, ``(s, h, a)``; in float64, as many full turns add up."""
    steps = given["dt"].double()[..., None] * given["angles"].double()[..., None, :]
    return sums(steps, given["cu_seqlens"])


# By the op's name.
TRANSITIONS = {
    "linear_recurrence": _diagonal(_decay_of_channels, _channels, lambda given: _channels(given)[0]),
    "selective_scan": _diagonal(_decay_of_scan, _scan, lambda given: _scan(given)[0]),
    "ssd": _diagonal(_decay_of_ssd, _ssd, lambda given: (*_ssd(given)[0][:2], 1, 1)),
    "linear_attention": _diagonal(_decay_of_keys, _keys_values, _keys),
    "delta_rule": _DELTA,
    "generalized_delta_rule": _DELTA,
    "mlstm": Transition(_memory, _of_memory, _remembered, ("initial_C", "initial_n", "initial_m"), True),
    "mamba3_scan": Transition(
        _rotating, _of_rotating, _turned, ("initial_state", "initial_key", "initial_value"), summed=True
    ),
}
