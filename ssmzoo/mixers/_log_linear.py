"""A linear recurrence that keeps its past in a hierarchy of states (Guo et al. 2025, arXiv 2506.04761, section 3).

Seen from token t, token s ≤ t is of the level of the highest binary digit in which t and s differ::

    level(t, s) = number of binary digits of (t xor s)       0 for the token itself, then blocks of 1, 2, 4, … tokens
    y_t = Σ_{s≤t} λ_t^level(t,s) · exp(a_{s+1} + … + a_t) · (C_t · B_s) x_s

So the tokens before t lie in one block for each digit 1 of t, and a block is remembered by its sum, a state. With the
next token the blocks that the digits of t carry over become one: their states are added. With all λ alike it is the
state-space dual (:func:`ssmkernels.ssd`). Levels are numbered up to a last one, which holds whatever is further away.

Within a chunk of c tokens the sum over pairs is a matrix product; across chunks only states are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssmkernels.core.packing import pad
from ssmkernels.ops.ssd.tiled import segment_sums

CHUNK = 64  # tokens; a power of 2, so that all tokens of a chunk are of one level for whoever comes after it


class Tokens(NamedTuple):
    """What comes in: x (b l h p), log decays a (b l h), B and C (b l h n), and λ (b l h levels)."""

    x: Tensor
    a: Tensor
    B: Tensor
    C: Tensor
    scales: Tensor


class Chunk(NamedTuple):
    """A chunk of it, heads before tokens: C (b h c n), λ (b h c levels); E (b h c 1), the decays from its start.

    ``fed`` are the keys, decayed to its end, (b h n c), and ``x`` (b h c p).
    """

    C: Tensor
    scales: Tensor
    E: Tensor
    fed: Tensor
    x: Tensor


def level(t: Tensor, s: Tensor, last: int) -> Tensor:
    """Number of binary digits of t xor s, at most ``last``."""
    return torch.frexp((t ^ s).double()).exponent.long().clamp(max=last)


def recall(tokens: Tokens, cu_seqlens: Tensor | None) -> Tensor:
    """y (b l h p) of sequences from their first token on."""
    if cu_seqlens is None:
        return _from_start(tokens)
    index, mask = pad(cu_seqlens)
    return _from_start(_padded(tokens, index, mask))[mask][None]


def recall_further(
    tokens: Tokens, states: Tensor, position: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of sequences that go on.

    Args:
        tokens: the next ones.
        states: of levels 1, 2, …, ``(s, levels - 1, h, n, p)``.
        position: how many tokens came before, int64 ``(s)``.
        cu_seqlens: borders of packed sequences.

    Returns:
        y (b l h p), and states and position after it.
    """
    if cu_seqlens is None:
        lengths = position.new_full((tokens.x.shape[0],), tokens.x.shape[1])
        return _further(tokens, states, position, lengths)
    index, mask = pad(cu_seqlens)
    lengths = cu_seqlens.diff().to(position.dtype)
    y, states, position = _further(_padded(tokens, index, mask), states, position, lengths)
    return y[mask][None], states, position


def _padded(tokens: Tokens, index: Tensor, mask: Tensor) -> Tokens:
    """Packed sequences side by side; what fills them up changes no state."""
    return Tokens(*(torch.where(mask.view(*mask.shape, *[1] * (t.ndim - 2)), t[0, index], 0) for t in tokens))


def _from_start(tokens: Tokens) -> Tensor:
    """No sequence has a state yet, so that it is known which levels have one at each chunk."""
    b, length = tokens.x.shape[:2]
    if not length:
        return tokens.x
    last = tokens.scales.shape[-1] - 1
    time = torch.arange(-(-length // CHUNK) * CHUNK if length > CHUNK else length, device=tokens.x.device)
    y, chunks = _within(tokens, time.expand(b, -1))
    held: dict[int, Tensor] = {}  # level → state (b h n p)
    ys = []
    for k, chunk in enumerate(chunks):
        read = y[:, k]
        for of, S in held.items():
            read = read + (chunk.scales[..., of, None] * chunk.E * chunk.C) @ S
        ys.append(read)
        if k + 1 == len(chunks):
            break
        start = k * CHUNK
        to = min((start ^ (start + CHUNK)).bit_length(), last)
        whole = chunk.E[..., -1:, :]
        new = chunk.fed @ chunk.x
        for of in [of for of in held if of <= to]:
            new = new + whole * held.pop(of)
        held = {of: whole * S for of, S in held.items()} | {to: new}
    return rearrange(torch.stack(ys, dim=1), "b k h c p -> b (k c) h p")[:, :length]


def _further(tokens: Tokens, states: Tensor, position: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence from its own position on: any level may have a state."""
    length = tokens.x.shape[1]
    if not length:
        return tokens.x, states, position
    last = tokens.scales.shape[-1] - 1
    c = min(CHUNK, length)
    within = torch.arange(-(-length // c) * c, device=position.device)
    y, chunks = _within(tokens, position[:, None] + within)
    levels = torch.arange(1, last + 1, device=position.device)
    ys = []
    for k, chunk in enumerate(chunks):
        time = position[:, None] + within[k * c : (k + 1) * c]
        before, after = (position + torch.clamp(lengths, max=at) for at in (k * c, (k + 1) * c))
        block = before[:, None] >> levels << levels  # the first token of each level's block, (b levels)
        of = torch.maximum(level(time[..., None], block[:, None], last), levels)  # (b c levels)
        weights = _of_level(chunk.scales, of) * chunk.E
        queries = (weights[..., None] * chunk.C[..., None, :]).flatten(-2)  # (b h c (levels n))
        ys.append(y[:, k] + queries @ rearrange(states, "b m h n p -> b h (m n) p"))
        moved = torch.maximum(level(after[:, None], block, last), levels)  # each block's level from now on
        into = (levels[:, None] == moved[:, None]).to(states.dtype)  # (b levels levels)
        written = level(after[:, None], time, last).clamp(min=1)
        fed = (levels[:, None] == written[:, None])[:, :, None, None] * chunk.fed[:, None]  # (b levels h n c)
        states = (into @ states.flatten(2)).view_as(states) * chunk.E[:, None, :, -1:] + fed @ chunk.x[:, None]
    y = rearrange(torch.stack(ys, dim=1), "b k h c p -> b (k c) h p")[:, :length]
    return y, states, position + lengths


def _within(tokens: Tokens, time: Tensor) -> tuple[Tensor, list[Chunk]]:
    """What tokens see of their own chunk, (b chunks h c p), and the chunks, from each token's place ``time`` (b l)."""
    missing = time.shape[1] - tokens.x.shape[1]
    c = min(CHUNK, time.shape[1])
    x, a, B, C, scales = (
        rearrange(F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)), "b (k c) h ... -> b k h c ...", c=c) for t in tokens
    )
    place = time.unflatten(1, (-1, c))
    of = level(place[..., :, None], place[..., None, :], scales.shape[-1] - 1)  # (b k i j)
    L = torch.exp(segment_sums(a))  # (b k h i j)
    y = (L * _of_level(scales, of) * (C @ B.mT)) @ x
    E = torch.exp(a.cumsum(-1))[..., None]
    fed = (L[..., -1, :, None] * B).mT
    return y, [Chunk(*parts) for parts in zip(*(t.unbind(1) for t in (C, scales, E, fed, x)), strict=True)]


def _of_level(scales: Tensor, of: Tensor) -> Tensor:
    """λ (… h c levels) of the levels ``of`` (… c m): (… h c m)."""
    of = of.unsqueeze(-3)
    return scales.gather(-1, of.expand(*scales.shape[:-1], of.shape[-1]))
