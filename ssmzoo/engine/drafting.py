"""Drafts in the engine: which requests have tokens proposed, and which of those were the next.

Each position's token is drawn as it would be without a draft, with the request's own random numbers; a proposed one is
kept if it is the same. So a request's tokens do not depend on who proposes. A model proposes what it holds most likely
with the request's bias of ids, which is kept as often as it is drawn.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from ssmzoo.engine.active import Active
from ssmzoo.engine.picking import pick
from ssmzoo.engine.request import Job
from ssmzoo.generate.arguments import TokenModel
from ssmzoo.generate.beams import ROOM
from ssmzoo.generate.drafts import Draft, Lookup, ModelDraft
from ssmzoo.generate.loop import evaluating
from ssmzoo.generate.sampling import Sampling
from ssmzoo.generate.speculative import REREAD
from ssmzoo.state import State

FEW = 4  # requests with a state; with more, a call for one token of each has enough to do without drafts


class Drafting:
    """Moves requests between the batch, which reads one token of each, and those that read several.

    Args:
        draft: a model, ``"lookup"``, or None for no proposals.
        count: most tokens that are proposed at once.
        active: the engine's requests.

    Attributes:
        proposed, kept: tokens of drafts, and those of them that stayed.
    """

    def __init__(self, draft: TokenModel | Literal["lookup"] | None, count: int, active: Active):
        self.draft, self.count, self.active = draft, count, active
        self.proposed = self.kept = 0

    def ready(self) -> AbstractContextManager[None]:
        """Evaluation mode for a model that proposes."""
        return contextlib.nullcontext() if self.draft is None or isinstance(self.draft, str) else evaluating(self.draft)

    def propose(self) -> None:
        """Asks for tokens after those of each request, where few are under way and there is room for them."""
        active, few = self.active, self.draft is not None and 0 < len(self.active) <= FEW
        for job in active.drafting:
            job.proposal = self._proposal(job) if few and len(job.unread) <= REREAD else []
        for job in list(active.writing) if few else ():
            job.proposal = self._proposal(job)
            if job.proposal:
                active.take_out(job)
                active.drafting.append(job)
        if not active.drafting:
            return
        if active.next_need() > active.memory.limit:
            for job in active.drafting:
                job.proposal = []
        back = [job for job in active.drafting if not job.proposal and len(job.unread) == 1]
        if back:
            active.drafting = [job for job in active.drafting if job not in back]
            active.join(back)

    def _proposal(self, job: Job) -> list[int]:
        request = job.request
        count = min(self.count, request.max_tokens - len(request.tokens) - 1)
        if count < 1 or self.draft is None:
            return []
        if job.draft is None:
            job.draft = _new(self.draft, job)
        try:
            return job.draft.propose([*request.prompt, *request.tokens], count).tokens
        except Exception as error:  # the draft's own, which no other request has to do with
            job.fail(error)
            return []

    def check(self, scores: Tensor, after: State) -> None:
        """Takes the next tokens of the requests that drafts are for.

        Args:
            scores: ``(tokens, vocab)`` after each unread and each proposed token of each request in turn.
            after: the states after them.
        """
        jobs = self.active.drafting
        read = [len(job.unread) + len(job.proposal) for job in jobs]
        ends = torch.tensor(read).cumsum(0).tolist()
        kept, checking = [0] * len(jobs), list(range(len(jobs)))
        while checking:
            rows = [ends[i] - 1 - len(jobs[i].proposal) + kept[i] for i in checking]
            pick([jobs[i] for i in checking], scores[rows])
            checking = [i for i in checking if _kept(jobs[i], kept[i])]
            for i in checking:
                kept[i] += 1
        for i, job in enumerate(jobs):
            self.proposed += len(job.proposal)
            self.kept += kept[i]
            if kept[i] == len(job.proposal):
                job.state = after if len(jobs) == 1 else after.select([i])
                job.position += read[i]
                job.unread = job.unread[-1:]


def _kept(job: Job, i: int) -> bool:
    """Whether the newest token is the i-th that was proposed, and another is to follow."""
    return not job.request.done and i < len(job.proposal) and job.request.tokens[-1] == job.proposal[i]


def _new(draft: TokenModel | Literal["lookup"], job: Job) -> Draft:
    """What proposes tokens for one request."""
    if isinstance(draft, str):
        return Lookup()
    likeliest = Sampling(temperature=0, logit_bias=job.sampling.logit_bias)
    room = min(len(job.request.prompt) + job.request.max_tokens, ROOM)
    return ModelDraft(draft, likeliest, iter(()), room, "Engine")
