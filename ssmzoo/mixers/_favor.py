"""Attention with a positive random-feature kernel, as sums over the past (FAVOR+, arXiv 2009.14794, section 2).

Features are φ_r(k) = exp(a_r) of log-features a. Every sum over keys is kept as S_r = e^{M_r} · S̃_r with M_r the
largest a_r in it, and every query's features are divided by the largest of φ_r(q) e^{M_r}: an online softmax for each
feature. Both cancel in the quotient of numerator and normaliser, so they change rounding alone, nothing overflows, and
no normaliser falls below 1. Only keys that a query sees enter its M_r, wherever a sequence is cut.

Letters: h heads, m features, d head dim. Values carry a last column of ones, whose sum is the normaliser.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.state import State

CHUNK = 32  # a power of two: tokens whose keys meet their queries one by one, before they enter the sums
LOWEST = -1e30  # stands for -∞, without its NaN in differences


@dataclasses.dataclass
class FeatureSums(State):
    """The sums over all keys so far, float32 (float64): ``sums · exp(logs)``."""

    sums: Tensor  # (s, h, m, d + 1)
    logs: Tensor  # (s, h, m)


def absorb(state: FeatureSums, keys: Tensor, values: Tensor) -> FeatureSums:
    """The sums with more keys' log-features (b h l m), l ≥ 1, and values (b h l d+1)."""
    logs = torch.maximum(state.logs, keys.detach().amax(-2))
    new = (keys - logs[..., None, :]).exp_().mT @ values
    return FeatureSums(state.sums * torch.exp(state.logs - logs)[..., None] + new, logs)


def read(state: FeatureSums, queries: Tensor) -> Tensor:
    """What queries' log-features (b h l m) find in the sums: (b h l d)."""
    return _quotient(_weighted(queries, state.logs, state.sums)[0])


def causal(state: FeatureSums, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, FeatureSums]:
    """Each query reads the sums with all keys up to its own: (b h l d), and the sums after the last; l ≥ 1."""
    l, size = queries.shape[-2], 1
    while size < min(l, CHUNK):
        size *= 2
    padding = -l % size
    if padding:
        queries, values = (F.pad(t, (0, 0, 0, padding)) for t in (queries, values))
        keys = F.pad(keys, (0, 0, 0, padding), value=LOWEST)
    queries, keys, values = (t.unflatten(-2, (-1, size)) for t in (queries, keys, values))  # (b h n c m)

    peaks = keys.detach().amax(-2)  # (b h n m)
    logs = torch.cat([state.logs[..., None, :], peaks], dim=-2).cummax(-2).values  # (b h n+1 m)
    new = (keys - logs[..., 1:, None, :]).exp_().mT @ values  # (b h n m d+1)
    kept = torch.exp(logs[..., :-1, :] - logs[..., 1:, :])[..., None]
    sums = [state.sums]
    for i in range(new.shape[2]):
        sums.append(torch.addcmul(new[:, :, i], kept[:, :, i], sums[-1]))
    earlier = _weighted(queries, logs[..., :-1, :], torch.stack(sums[:-1], dim=2))
    total, _ = _merge(earlier, _within(queries, keys, values))
    out = _quotient(total.flatten(2, 3)[:, :, :l])
    return out, FeatureSums(sums[-1], logs[..., -1, :])


# A numerator beside its normaliser (... d+1), divided by the exponential of a scale (... 1).
Scaled = tuple[Tensor, Tensor]


def _within(queries: Tensor, keys: Tensor, values: Tensor) -> Scaled:
    """Each query of a chunk over the chunk's keys up to its own.

    First its own key; then, for blocks of 1, 2, 4, … tokens, the queries of each second block over all keys of the
    block before it. Those keys are visible to all of those queries, so one M a feature serves the block.
    """
    own = queries + keys
    scale = own.detach().amax(-1, keepdim=True)
    total = (own - scale).exp_().sum(-1, keepdim=True) * values
    block = 1
    while block < queries.shape[-2]:
        pairs = (-1, 2, block)
        later = queries.unflatten(-2, pairs)[..., 1, :, :]  # (... pairs block m)
        earlier, seen = (t.unflatten(-2, pairs)[..., 0, :, :] for t in (keys, values))
        logs = earlier.detach().amax(-2)
        weights, weights_scale = _weighted(later, logs, (earlier - logs[..., None, :]).exp_().mT)
        parts = total.unflatten(-2, pairs), scale.unflatten(-2, pairs)
        first, second = (tuple(part[..., i, :, :] for part in parts) for i in (0, 1))
        merged = _merge(second, (weights @ seen, weights_scale))
        total, scale = (torch.stack(halves, dim=-3).flatten(-4, -2) for halves in zip(first, merged, strict=True))
        block *= 2
    return total, scale


def _weighted(queries: Tensor, logs: Tensor, sums: Tensor) -> Scaled:
    """Features of the queries (... l m) times sums · exp(logs), (... m k) and (... m)."""
    exponents = queries + logs[..., None, :]
    scale = exponents.detach().amax(-1, keepdim=True)
    return (exponents - scale).exp_() @ sums, scale


def _merge(one: Scaled, other: Scaled) -> Scaled:
    scale = torch.maximum(one[1], other[1])
    return one[0] * torch.exp(one[1] - scale) + other[0] * torch.exp(other[1] - scale), scale


def _quotient(total: Tensor) -> Tensor:
    return total[..., :-1] / total[..., -1:]
