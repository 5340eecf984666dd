"""The three calls of a step: a token for each answer, drafted tokens, and a part of the prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.engine.active import Active
from ssmzoo.engine.drafting import Drafting
from ssmzoo.engine.picking import pick
from ssmzoo.engine.prompts import Prompts
from ssmzoo.engine.request import Job
from ssmzoo.generate.arguments import TokenModel
from ssmzoo.state import State


class Turns:
    """Calls the model for the requests of an engine.

    Args:
        model: in evaluation mode.
        active: the requests.
        prompts: who reads how much of which prompt.
        drafting: takes the tokens of those that drafts are for.
    """

    def __init__(self, model: TokenModel, active: Active, prompts: Prompts, drafting: Drafting):
        self.model, self.active, self.prompts, self.drafting = model, active, prompts, drafting
        self.vocab = model.config.vocab_size or 0

    def write(self) -> None:
        """The next token of each request that has read its prompt."""
        jobs = self.active.writing
        if jobs and self.active.batch is not None:
            ids = torch.tensor([job.unread for job in jobs], device=self.model.device)
            done = self._call(jobs, ids, self.active.batch, {})
            if done is None:
                self.active.writing, self.active.batch = [], None
                return
            logits, self.active.batch = done
            self._advance(jobs, [1] * len(jobs))
            for job in jobs:
                job.unread = []
            pick(jobs, logits[:, 0, : self.vocab])

    def read(self) -> None:
        """A part of the prompts of those that have not read theirs, the earliest first."""
        self.prompts.take_shared(self.active.reading)
        parts = self.prompts.parts(self.active.reading)
        if not parts:
            return
        jobs, counts = map(list, zip(*parts, strict=True))
        ids = [job.request.prompt[job.position : job.position + count] for job, count in parts]
        done = self._packed(jobs, ids, [job.state for job in jobs if job.state is not None], last_only=True)
        if done is None:
            self.active.reading = [job for job in self.active.reading if job not in jobs]
            return
        logits, state = done
        self._advance(jobs, counts)
        finished = [i for i, job in enumerate(jobs) if job.position == len(job.request.prompt)]
        for i, job in enumerate(jobs):
            border = self.prompts.border(job)
            alone = border is not None or i not in finished  # the others' rows go into the batch all at once
            job.state = None if not alone else state if len(jobs) == 1 else state.select([i])
            if border is not None:
                self.active.snapshot(job, border)
        if finished:
            through = [jobs[i] for i in finished]
            self.active.reading = [job for job in self.active.reading if job not in through]
            pick(through, logits[finished, 0, : self.vocab])
            rows = [i for i in finished if not jobs[i].request.done]
            if len(rows) < len(finished):
                self.active.let_go()
            if rows:
                self.active.join([jobs[i] for i in rows], [state if len(rows) == len(jobs) else state.select(rows)])

    def check(self) -> None:
        """The next tokens of those for which some were proposed."""
        jobs = self.active.drafting
        if jobs:
            ids = [[*job.unread, *job.proposal] for job in jobs]
            states = [job.state for job in jobs if job.state is not None]
            if len(jobs) == 1 and jobs[0].proposal:
                states = [states[0].clone()]  # several are copied into one batch anyway
            done = self._packed(jobs, ids, states, last_only=False)
            if done is None:
                self.active.drafting = []
            else:
                self.drafting.check(done[0][0, :, : self.vocab].float(), done[1])

    def _packed(
        self, jobs: list[Job], ids: list[list[int]], states: list[State], last_only: bool
    ) -> tuple[Tensor, State] | None:
        """What :meth:`_call` gives for tokens of several requests with states of their own."""
        packed = torch.tensor([[id for part in ids for id in part]], device=self.model.device)
        options: dict[str, Tensor | bool] = {"last_only": last_only}
        if len(jobs) > 1:
            lengths = torch.tensor([0, *map(len, ids)])
            options["cu_seqlens"] = lengths.cumsum(0).to(packed.device, torch.int32)
        return self._call(jobs, packed, states[0] if len(states) == 1 else State.concatenate(states), options)

    def _advance(self, jobs: list[Job], counts: list[int]) -> None:
        for job, count in zip(jobs, counts, strict=True):
            job.position += count

    def _call(
        self, jobs: list[Job], ids: Tensor, state: State, options: dict[str, Tensor | bool]
    ) -> tuple[Tensor, State] | None:
        """The model's outputs and the state after; None where it raised an error, with which the requests end."""
        try:
            return self.model(ids, state, **options)
        except Exception as error:
            for job in jobs:
                job.fail(error)
            self.active.let_go()
            return None
