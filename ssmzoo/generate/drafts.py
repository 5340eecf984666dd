"""What proposes tokens for speculative decoding: a smaller model, or the text itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ssmkernels.native.alone import alone
from ssmzoo.generate.arguments import TokenModel
from ssmzoo.generate.sampling import Sampling
from ssmzoo.state import State


class Proposal(NamedTuple):
    """Tokens that may follow, each with the probabilities ``(vocab)`` it was drawn by; None where nothing was drawn."""

    tokens: list[int]
    probabilities: list[Tensor | None]


class Draft(Protocol):
    """Proposes tokens."""

    def propose(self, text: Sequence[int], count: int) -> Proposal:
        """At most ``count`` tokens after a text, which begins with that of the call before."""


class Lookup:
    """Proposes what followed the last tokens where they stood before (prompt lookup decoding).

    Args:
        longest, shortest: how many last tokens are looked for; more are tried first.
    """

    def __init__(self, longest: int = 3, shortest: int = 2):
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # of some tokens → where the text went on after them, the last time
        self._read = 0

    def propose(self, text: Sequence[int], count: int) -> Proposal:
        for end in range(self._read, len(text)):  # the last tokens themselves are no earlier place
            for size in self._sizes:
                if end >= size:
                    self._ends[tuple(text[end - size : end])] = end
        self._read = len(text)
        for size in self._sizes:
            place = self._ends.get(tuple(text[-size:])) if len(text) >= size else None
            if place is not None:
                return self._copied(text, place, count)
        return Proposal([], [])

    def _copied(self, text: Sequence[int], place: int, count: int) -> Proposal:
        """What stands from ``place`` on, and once more from there where that reaches the end: the text may repeat."""
        period = len(text) - place
        tokens = [text[place + i % period] for i in range(count)]
        return Proposal(tokens, [None] * count)


class ModelDraft:
    """Proposes what a smaller model draws, with the same options of sampling but the penalties.

    Args:
        model: of the same vocabulary.
        sampling: how it draws.
        draws: numbers uniform in [0, 1), each ``(1)``.
        room: tokens for which memory is set aside.
        caller: what errors name as called.

    Raises:
        ValueError: when it proposes: logits that are not finite.
    """

    def __init__(
        self, model: TokenModel, sampling: Sampling, draws: Iterator[Tensor], room: int, caller: str = "generate"
    ):
        self.model, self.sampling, self._draws, self._caller = model, sampling, draws, caller
        self._state, self._read = model.initial_state(1, room), 0

    def propose(self, text: Sequence[int], count: int) -> Proposal:
        positions = self.model.config.learned_positions
        if positions is not None:
            count = min(count, positions - len(text) + 1)
        found = Proposal([], [])
        if count < 1:
            return found
        logits, self._state = self._call(text[self._read :], self._state)
        self._read = len(text)
        state = self._state.clone() if count > 1 else self._state  # what is proposed is not yet part of the text
        while True:
            scores = logits[:, -1, : self.model.config.vocab_size]
            with alone(scores, self.sampling.operations):
                scores = scores.float()
                if not bool(scores.amax().isfinite()):
                    read = len(text) + len(found.tokens)
                    raise ValueError(
                        f"{self._caller}: the logits of `draft` are not finite after {read} tokens of text"
                    )
                token, probabilities = self.sampling.draw(scores, None, self._draws)
            found.tokens.append(token)
            found.probabilities.append(probabilities)
            if len(found.tokens) == count:
                return found
            logits, state = self._call([token], state)

    def _call(self, ids: Sequence[int], state: State) -> tuple[Tensor, State]:
        return self.model(torch.tensor([list(ids)], device=self.model.device), state, last_only=True)
