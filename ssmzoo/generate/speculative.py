"""Speculative decoding: a draft proposes tokens, and the model reads all of them in one call.

Leviathan et al. 2023 (arXiv 2211.17192): a token x that was drawn by q is kept with probability min(1, p(x) / q(x)),
where p is the model's own distribution; the first that is not kept is drawn anew by max(p - q, 0), normalised. So each
token is distributed as the model alone would draw it, whatever the draft is. At temperature 0 that is the most likely
token.

A state cannot forget tokens, so the call works on a copy of it. If a token was not kept, the copy is dropped, and the
next call reads what was kept once more, before what is newly proposed: rolling back takes no call of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ssmkernels.native.alone import alone
from ssmzoo.generate.arguments import TokenModel
from ssmzoo.generate.beams import ROOM, check_finite
from ssmzoo.generate.drafts import Draft, Lookup, ModelDraft, Proposal
from ssmzoo.generate.penalties import History
from ssmzoo.generate.sampling import Sampling, draws_of, sample
from ssmzoo.state import State

REREAD = 12  # tokens that are read once more at most before the state is brought up to them


class Speculation:
    """Continues one prompt with a draft's help.

    Args:
        model: in evaluation mode.
        draft: proposes tokens.
        count: most of them at once.
        sampling: how tokens are drawn.
        draws: numbers uniform in [0, 1), each ``(1)``.

    Attributes:
        proposed, kept: tokens of the draft, and those of them that stayed.
        calls: of the model.
    """

    def __init__(self, model: TokenModel, draft: Draft, count: int, sampling: Sampling, draws: Iterator[Tensor]):
        self.model, self.draft, self.count, self.sampling, self.draws = model, draft, count, sampling, draws
        self.proposed = self.kept = self.calls = 0

    @classmethod
    def of(
        cls, model: TokenModel, draft: TokenModel | Literal["lookup"], count: int, sampling: Sampling, length: int
    ) -> Speculation:
        """With a draft as :func:`ssmzoo.generate.generate` takes it, for a text of at most ``length`` tokens."""
        draws = draws_of(1, 2**62, sampling.seed, model.device)
        if isinstance(draft, str):
            return cls(model, Lookup(), count, sampling, draws)
        return cls(model, ModelDraft(draft, sampling, draws, min(length, ROOM)), count, sampling, draws)

    def run(self, prompt: Tensor, steps: int, ends: tuple[int, ...]) -> Iterator[int]:
        """The new tokens, at most ``steps``, up to one of ``ends``.

        Args:
            prompt: int64 ``(1, l)``.
            steps: at least 1.
            ends: ids that end it.

        Raises:
            ValueError: logits that are not finite, naming the step.
        """
        text = prompt[0].tolist()
        positions = self.model.config.learned_positions
        history = self.sampling.history(prompt, None, self.model.config.vocab_size or 0)
        state = self.model.initial_state(1, len(text) + min(steps, ROOM))
        made, unread, proposal = 0, text.copy(), Proposal([], [])
        while True:
            copy = state.clone() if proposal.tokens else state
            scores, after = self._call([*unread, *proposal.tokens], copy, made == 0)
            fresh = []
            for i in range(len(proposal.tokens) + 1):
                row = scores[:, i - len(proposal.tokens) - 1]
                with alone(row, self.sampling.operations):
                    check_finite(row.amax(-1), made + 1)
                    token, kept = self._next(row, history, proposal, i)
                self.kept += kept
                made += 1
                fresh.append(token)
                yield token
                if made == steps or token in ends:
                    return
                if history is not None:
                    history.add(torch.tensor([token]))
                if not kept:
                    break
            if len(fresh) > len(proposal.tokens):  # all were kept
                state, unread = after, fresh[-1:]
            else:
                unread = [*unread, *fresh]
                if len(unread) > REREAD:
                    _, state = self._call(unread[:-1], state, True)
                    unread = unread[-1:]
            text += fresh
            room = steps - made - 1 if positions is None else min(steps - made - 1, max(0, positions - len(text)))
            proposal = self.draft.propose(text, min(self.count, room))
            self.proposed += len(proposal.tokens)

    def _call(self, ids: list[int], state: State, last_only: bool) -> tuple[Tensor, State]:
        """Scores ``(1 l vocab)``, and the state after."""
        self.calls += 1
        given = torch.tensor([ids], device=self.model.device)
        logits, after = self.model(given, state, last_only=last_only)
        return logits[..., : self.model.config.vocab_size].float(), after

    def _next(self, scores: Tensor, history: History | None, proposal: Proposal, i: int) -> tuple[int, bool]:
        """The next token by scores ``(1 vocab)``, and whether it is the draft's i-th."""
        if i == len(proposal.tokens):
            return self.sampling.draw(scores, history, self.draws)[0], False
        wanted, q = proposal.tokens[i], proposal.probabilities[i]
        if self.sampling.temperature == 0:
            token, _ = self.sampling.draw(scores, history, self.draws)
            return token, token == wanted
        p = self.sampling.probabilities(scores, history)[0]
        likely = 1.0 if q is None else float(q[wanted])
        if float(next(self.draws)) * likely < float(p[wanted]):
            return wanted, True
        if q is None:  # it was certain to be proposed
            rest = p.clone()
            rest[wanted] = 0
        else:
            rest = (p - q).clamp(min=0)
        if not bool(rest.any()):  # but for rounding, p and q are the same
            rest = p
        return int(sample(rest.log()[None], next(self.draws))), False
