"""Penalties: they make ids less likely that stand in the text already."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass
class History:
    """What the penalties know of the text so far.

    Attributes:
        seen: bool ``(b, vocab)``, the ids that stand in the prompt or after it; None without a repetition penalty.
        counts: float32 ``(b, vocab)``, how often each id was generated; None without a penalty that counts.
    """

    seen: Tensor | None = None
    counts: Tensor | None = None

    @classmethod
    def of(cls, prompts: Tensor, mask: Tensor | None, vocab: int, *, seen: bool, counts: bool) -> History:
        """Of prompts ``(b, l)``, of which ``mask`` says what is real, before the first new token."""
        nothing = torch.zeros(len(prompts), vocab, dtype=torch.float32, device=prompts.device)
        return cls(seen_in(prompts, mask, vocab) if seen else None, nothing if counts else None)

    @classmethod
    def concatenate(cls, histories: Sequence[History]) -> History:
        """The rows of several, with the same penalties, in one."""
        first = histories[0]
        return cls(
            None if first.seen is None else torch.cat([h.seen for h in histories if h.seen is not None]),
            None if first.counts is None else torch.cat([h.counts for h in histories if h.counts is not None]),
        )

    def add(self, tokens: Tensor) -> None:
        """The next token ``(b)`` of each row, on any device."""
        known = self.counts if self.seen is None else self.seen
        if known is not None:
            tokens = tokens.to(known.device)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], self.counts.new_ones(len(tokens), 1))


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes seen ids less likely (CTRL, arXiv 1909.05858). scores (b v), seen (b v) bool → (b v)."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def discourage(scores: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """scores − presence · [counts > 0] − frequency · counts, as OpenAI's API defines it. All (b v)."""
    return scores - presence * (counts > 0) - frequency * counts


def seen_in(prompts: Tensor, mask: Tensor | None, vocab: int) -> Tensor:
    """(b vocab): the ids that stand in each prompt."""
    seen = torch.zeros(len(prompts), vocab + 1, dtype=torch.bool, device=prompts.device)
    seen.scatter_(1, prompts if mask is None else prompts.masked_fill(~mask, vocab), True)
    return seen[:, :vocab].contiguous()
